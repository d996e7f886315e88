// Number formats, vectors of numbers, asynchronous copies.
//
// Nothing is included, so that NVRTC needs no CUDA toolkit: conversions are PTX or bit operations,
// chosen by __CUDA_ARCH__.

typedef long long int64;

struct bfloat16 { unsigned short bits; };
struct float16 { unsigned short bits; };

// ---- two 16-bit numbers in a word, the first in the low half

__device__ __forceinline__ void unpack_word(bfloat16, unsigned word, float& low, float& high) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
}

__device__ __forceinline__ void unpack_word(float16, unsigned word, float& low, float& high) {
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(low), "=f"(high) : "r"(word));
}

__device__ __forceinline__ unsigned round_bfloat16(float value) {  // to nearest even, NaN stays NaN
    unsigned bits = __float_as_uint(value);
    if (value != value) return 0x7fffu;
    return (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
}

__device__ __forceinline__ unsigned pack_word(bfloat16, float low, float high) {
#if __CUDA_ARCH__ >= 800
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#else
    return round_bfloat16(low) | round_bfloat16(high) << 16;
#endif
}

__device__ __forceinline__ unsigned pack_word(float16, float low, float high) {
    unsigned word;
    asm("{ .reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h}; }"
        : "=r"(word) : "f"(low), "f"(high));
    return word;
}

// ---- V neighbouring numbers, moved as one access of up to 16 bytes

template <int BYTES> struct raw_of;
template <> struct raw_of<16> { typedef uint4 type; };
template <> struct raw_of<8> { typedef uint2 type; };
template <> struct raw_of<4> { typedef unsigned type; };

template <class T, int V> struct Vector {
    typedef typename raw_of<V * sizeof(T)>::type raw;

    static __device__ __forceinline__ void unpack(raw from, float (&to)[V]) {
        union { raw all; unsigned word[V / 2]; } bits;
        bits.all = from;
#pragma unroll
        for (int v = 0; v < V; v += 2) unpack_word(T(), bits.word[v / 2], to[v], to[v + 1]);
    }
    static __device__ __forceinline__ void load(const void* from, float (&to)[V]) {
        unpack(*static_cast<const raw*>(from), to);
    }
    // What another block wrote: not from the L1 cache.
    static __device__ __forceinline__ void load_fresh(const void* from, float (&to)[V]) {
        unpack(__ldcg(static_cast<const raw*>(from)), to);
    }
    static __device__ __forceinline__ void store(void* to, const float (&from)[V]) {
        union { raw all; unsigned word[V / 2]; } bits;
#pragma unroll
        for (int v = 0; v < V; v += 2) bits.word[v / 2] = pack_word(T(), from[v], from[v + 1]);
        *static_cast<raw*>(to) = bits.all;
    }
};

template <class T> struct Vector<T, 1> {
    typedef unsigned short raw;

    static __device__ __forceinline__ void load(const void* from, float (&to)[1]) {
        float unused;
        unpack_word(T(), *static_cast<const unsigned short*>(from), to[0], unused);
    }
    static __device__ __forceinline__ void store(void* to, const float (&from)[1]) {
        *static_cast<unsigned short*>(to) = pack_word(T(), from[0], 0.f);
    }
};

template <int V> struct Vector<float, V> {
    static constexpr int WIDTH = V < 4 ? V : 4;  // of one access
    typedef typename raw_of<WIDTH * sizeof(float)>::type raw;

    static __device__ __forceinline__ void load(const void* from, float (&to)[V]) {
        union { raw all; float value[WIDTH]; } bits;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            if (v % WIDTH == 0) bits.all = static_cast<const raw*>(from)[v / WIDTH];
            to[v] = bits.value[v % WIDTH];
        }
    }
    static __device__ __forceinline__ void unpack(raw from, float (&to)[V]) {
        static_assert(V == WIDTH, "one access");
        union { raw all; float value[WIDTH]; } bits;
        bits.all = from;
#pragma unroll
        for (int v = 0; v < V; ++v) to[v] = bits.value[v];
    }
    static __device__ __forceinline__ void load_fresh(const void* from, float (&to)[V]) {
        unpack(__ldcg(static_cast<const raw*>(from)), to);
    }
    static __device__ __forceinline__ void store(void* to, const float (&from)[V]) {
        union { raw all; float value[WIDTH]; } bits;
#pragma unroll
        for (int v = 0; v < V; ++v) {
            bits.value[v % WIDTH] = from[v];
            if ((v + 1) % WIDTH == 0) static_cast<raw*>(to)[v / WIDTH] = bits.all;
        }
    }
};

template <> struct Vector<float, 1> {
    typedef float raw;

    static __device__ __forceinline__ void load(const void* from, float (&to)[1]) {
        to[0] = *static_cast<const float*>(from);
    }
    static __device__ __forceinline__ void store(void* to, const float (&from)[1]) {
        *static_cast<float*>(to) = from[0];
    }
};

// ---- asynchronous copies from global to shared memory, in groups that complete in order

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

template <int BYTES> __device__ __forceinline__ void copy_async(void* to, const void* from) {
    constexpr int STEP = BYTES < 16 ? BYTES : 16;
#pragma unroll
    for (int byte = 0; byte < BYTES; byte += STEP) {
        char* target = static_cast<char*>(to) + byte;
        const char* source = static_cast<const char*>(from) + byte;
#if __CUDA_ARCH__ >= 800
        // Through the L1 cache: strips beside each other copy their common positions twice.
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2;"
                     :: "r"(shared_address(target)), "l"(source), "n"(STEP) : "memory");
#else
        typedef typename raw_of<STEP>::type raw;
        *reinterpret_cast<raw*>(target) = *reinterpret_cast<const raw*>(source);
#endif
    }
}

__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int PENDING> __device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" :: "n"(PENDING) : "memory");
#endif
}

// ---- threads that wait for one another

// Between two looks at what another block will change.
__device__ __forceinline__ void pause() { __nanosleep(100); }

// ---- mathematics

__device__ __forceinline__ float exp2_approximate(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

__device__ __forceinline__ float reciprocal(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
