// One direction of the scan (top_to_bottom) on planar maps, step by step from one launch per line
// to weights shared by the channels of a block. Baselines to compare the package's kernels with:
// bfloat16 in and out, float32 inside, no prefetching, no include.
//
//   x, lam, u, y  [planes, lines, length]     a plane is one channel of one image
//   logits        [groups, 3, lines, length]  group = plane / shared_by; taps left, center, right
//   h             as y, float32               only where the hidden state lives in global memory
//
// Line i, position j of a plane lies at i * line_stride + j * position_stride. With position_stride
// 1 neighbouring threads touch neighbouring elements; with line_stride 1 (the map transposed in
// memory, as a left_to_right scan of a planar map finds it) they touch elements a line apart.

typedef unsigned short bf16;
typedef long long int64;

struct Geometry {
    int64 lines, length, shared_by, line_stride, position_stride;

    __device__ int64 plane_size() const { return lines * length; }
    __device__ int64 at(int64 plane, int64 i, int64 j) const {
        return plane * plane_size() + i * line_stride + j * position_stride;
    }
};

struct Weights {
    float left, center, right;
};

__device__ float widen(bf16 bits) { return __uint_as_float((unsigned)bits << 16); }

__device__ bf16 narrow(float value) {  // of a finite value, to nearest even
    unsigned bits = __float_as_uint(value);
    return (bf16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

__device__ float sigmoid(bf16 logit) { return 1.0f / (1.0f + __expf(-widen(logit))); }

// Rows sum to one over the taps that exist: the neighbour outside the line is left out.
__device__ Weights normalised(const bf16* logits, const Geometry& map, int64 group, int64 i,
                              int64 j) {
    const bf16* tap = logits + map.at(3 * group, i, j);
    float left = j > 0 ? sigmoid(tap[0]) : 0.0f;
    float center = sigmoid(tap[map.plane_size()]);
    float right = j + 1 < map.length ? sigmoid(tap[2 * map.plane_size()]) : 0.0f;
    float scale = 1.0f / (left + center + right);
    return {left * scale, center * scale, right * scale};
}

// One position of one line, with the line before it read from global memory.
__device__ void step_in_global(const bf16* x, const bf16* logits, const bf16* lam, const bf16* u,
                               float* h, bf16* y, const Geometry& map, int64 plane, int64 i,
                               int64 j) {
    int64 at = map.at(plane, i, j);
    float state = widen(lam[at]) * widen(x[at]);
    if (i > 0) {
        Weights w = normalised(logits, map, plane / map.shared_by, i, j);
        const float* before = h + at - map.line_stride;
        state += w.center * before[0];
        if (j > 0) state += w.left * before[-map.position_stride];
        if (j + 1 < map.length) state += w.right * before[map.position_stride];
    }
    h[at] = state;
    y[at] = narrow(widen(u[at]) * state);
}

// Line i of every plane; the host launches it once per line. A thread per position.
extern "C" __global__ void one_line(
    const bf16* x, const bf16* logits, const bf16* lam, const bf16* u, float* h, bf16* y,
    int64 lines, int64 length, int64 shared_by, int64 line_stride, int64 position_stride,
    int64 planes, int64 i) {
    Geometry map = {lines, length, shared_by, line_stride, position_stride};
    int64 thread = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (thread < planes * length)
        step_in_global(x, logits, lam, u, h, y, map, thread / length, i, thread % length);
}

// All lines of a plane by one block.
extern "C" __global__ void all_lines(
    const bf16* x, const bf16* logits, const bf16* lam, const bf16* u, float* h, bf16* y,
    int64 lines, int64 length, int64 shared_by, int64 line_stride, int64 position_stride) {
    Geometry map = {lines, length, shared_by, line_stride, position_stride};
    for (int64 i = 0; i < lines; ++i) {
        for (int64 j = threadIdx.x; j < length; j += blockDim.x)
            step_in_global(x, logits, lam, u, h, y, map, blockIdx.x, i, j);
        __syncthreads();
    }
}

// The last line of a plane and the one being computed, in shared memory, with a zero at either end.
struct ChipState {
    float* memory;
    int64 pitch;

    __device__ ChipState(float* shared, int64 length)
        : memory(shared + 2 * (length + 2) * threadIdx.y), pitch(length + 2) {
        for (int64 j = threadIdx.x; j < 2 * pitch; j += blockDim.x) memory[j] = 0.0f;
    }
    __device__ float step(int64 i, int64 j, Weights w, float gated) {
        const float* before = memory + ((i + 1) & 1) * pitch + j;
        float state = gated + w.left * before[0] + w.center * before[1] + w.right * before[2];
        memory[(i & 1) * pitch + j + 1] = state;
        return state;
    }
};

extern __shared__ float shared_memory[];

// As all_lines, with the hidden state on chip. A block has blockDim.y planes.
extern "C" __global__ void state_on_chip(
    const bf16* x, const bf16* logits, const bf16* lam, const bf16* u, bf16* y, int64 lines,
    int64 length, int64 shared_by, int64 line_stride, int64 position_stride) {
    Geometry map = {lines, length, shared_by, line_stride, position_stride};
    int64 plane = (int64)blockIdx.x * blockDim.y + threadIdx.y;
    ChipState h(shared_memory, length);
    __syncthreads();
    for (int64 i = 0; i < lines; ++i) {
        for (int64 j = threadIdx.x; j < length; j += blockDim.x) {
            int64 at = map.at(plane, i, j);
            Weights w = normalised(logits, map, plane / shared_by, i, j);
            float state = h.step(i, j, w, widen(lam[at]) * widen(x[at]));
            y[at] = narrow(widen(u[at]) * state);
        }
        __syncthreads();
    }
}

// As state_on_chip, with the weights of a line read and normalised once for the planes of a block,
// which belong to one group. Those of line i + 1 are prepared beside line i: one barrier a line.
extern "C" __global__ void shared_weights(
    const bf16* x, const bf16* logits, const bf16* lam, const bf16* u, bf16* y, int64 lines,
    int64 length, int64 shared_by, int64 line_stride, int64 position_stride) {
    Geometry map = {lines, length, shared_by, line_stride, position_stride};
    int64 plane = (int64)blockIdx.x * blockDim.y + threadIdx.y;
    int64 group = (int64)blockIdx.x * blockDim.y / shared_by;
    int64 thread = threadIdx.y * blockDim.x + threadIdx.x, threads = blockDim.x * blockDim.y;
    ChipState h(shared_memory, length);
    float* taps = shared_memory + 2 * (length + 2) * blockDim.y;  // [2, 3, length]
    for (int64 i = -1; i < lines; ++i) {
        const float* now = taps + 3 * length * (i & 1);
        for (int64 j = threadIdx.x; i >= 0 && j < length; j += blockDim.x) {
            int64 at = map.at(plane, i, j);
            Weights w = {now[j], now[length + j], now[2 * length + j]};
            float state = h.step(i, j, w, widen(lam[at]) * widen(x[at]));
            y[at] = narrow(widen(u[at]) * state);
        }
        float* next = taps + 3 * length * ((i + 1) & 1);
        for (int64 j = thread; i + 1 < lines && j < length; j += threads) {
            Weights w = normalised(logits, map, group, i + 1, j);
            next[j] = w.left;
            next[length + j] = w.center;
            next[2 * length + j] = w.right;
        }
        __syncthreads();
    }
}
