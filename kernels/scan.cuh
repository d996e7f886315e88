// What the forward and the backward scan share: arguments, the division of work, the weights, and
// the line buffer through which neighbouring positions exchange values.

extern __shared__ uint4 shared_memory[];

__device__ __forceinline__ char* shared_at(int offset) {
    return reinterpret_cast<char*>(shared_memory) + offset;
}

// A tensor whose channels are neighbours in memory; strides in elements.
struct View {
    char* data;       // null: absent
    int64 batch;      // between images
    int64 direction;  // between directions, 0 for x
    int64 row;        // between rows of the map
    int64 column;     // between columns of the map
};

// Passed by value; every member has 64 bits, so that the host can build it as an array of integers.
struct Arguments {
    View x, logits, lam, u, skip;                            // inputs; logits [.., G, taps] innermost
    View grad_logits, grad_lam, grad_u, grad_skip;           // backward only
    char* result;       // [B, N, P]: y, or in the backward pass the gradient of x; null: not wanted
    char* partial;      // [B, 4, N, P]: the same, of each direction by itself
    float* hidden;      // [B, 4, N, P]: h; null: not wanted
    char* grad_result;  // [B, N, P], backward only
    float* shares;      // [parts, B, 4, N, G, 3]: gradient of logits by part of a group, or null
    int* arrivals;      // [B * chunks], zero
    float* lines;       // line buffers in global memory, for the kernels without a limit of length
    int64 batch, height, width, channels, groups, chunk_size;  // chunk_size 0: the whole map
    int64 chunk;          // channels that a block takes side by side
    int64 segment;        // positions of a line that a block takes
    int64 group_stride;   // elements between the logits of neighbouring groups
    int64 padded;         // not 0: a group's logits begin on a multiple of four elements
    int64 lanes;          // vectors side by side that always share a weight group, a power of two
};

// The part of the work that one block does, the same in both passes: a direction of a chunk of
// channels of one image, and of its lines one segment. Blocks of the same chunk follow one another
// in the grid: direction by direction, segment by segment.
struct Work {
    int64 image, chunk, chunks, tokens;
    int direction, segment;
    bool horizontal, reversed;
    int lines, length;  // of the direction

    __device__ Work(const Arguments& a, int segments) {
        chunks = (a.channels + a.chunk - 1) / a.chunk;
        int64 index = blockIdx.x;
        segment = index % segments;
        index /= segments;
        direction = index % 4;
        index /= 4;
        chunk = index % chunks;
        image = index / chunks;
        horizontal = direction >= 2;
        reversed = direction & 1;
        lines = horizontal ? a.width : a.height;
        length = horizontal ? a.height : a.width;
        tokens = a.height * a.width;
    }
    // Offset of position j on the line that the direction visits as its i-th.
    __device__ int64 offset(int64 i, int64 j, int64 row, int64 column) const {
        const int64 line = reversed ? lines - 1 - i : i;
        return horizontal ? j * row + line * column : line * row + j * column;
    }
    __device__ int64 offset(const View& view, int64 i, int64 j) const {
        return image * view.batch + direction * view.direction + offset(i, j, view.row, view.column);
    }
    __device__ int64 token(const Arguments& a, int64 i, int64 j) const {
        return offset(i, j, a.width, 1);
    }
    // First channel of token 0 in a [B, 4, N, P] tensor.
    __device__ int64 plane(const Arguments& a) const {
        return (image * 4 + direction) * tokens * a.channels;
    }
};

// Weights of the left, center and right tap: sigmoid(l_k) / sum of sigmoid(l_k') over the taps that
// exist. With s the largest logit, or 0 if that is positive,
//     sigmoid(l) = e^s / d,    d = e^s + e^(s-l) >= 1,
// so w_k is proportional to 1 / d_k, and d is finite for any logits once s - l is cut at 40.
struct Weights {
    float left, center, right;
};

// `slope` becomes 1 - sigmoid(l_k), the derivative of log sigmoid.
__device__ __forceinline__ Weights
propagation_weights(float l, float c, float r, bool first, bool last, float (&slope)[3]) {
    constexpr float LOG2_E = 1.44269504088896f, CUT = 40.f * LOG2_E;
    c *= LOG2_E;
    l = first ? c : l * LOG2_E;
    r = last ? c : r * LOG2_E;
    const float shift = fminf(fmaxf(fmaxf(l, c), r), 0.f);
    const float scale = exp2_approximate(shift);
    const float e_left = exp2_approximate(fminf(shift - l, CUT));
    const float e_center = exp2_approximate(fminf(shift - c, CUT));
    const float e_right = exp2_approximate(fminf(shift - r, CUT));
    const float d_left = scale + e_left, d_center = scale + e_center, d_right = scale + e_right;
    const float p_left = first ? 0.f : d_center * d_right;
    const float p_center = d_left * d_right;
    const float p_right = last ? 0.f : d_left * d_center;
    const float total = reciprocal(p_left + p_center + p_right);
    slope[0] = e_left * reciprocal(d_left);
    slope[1] = e_center * reciprocal(d_center);
    slope[2] = e_right * reciprocal(d_right);
    // The center tap is what is left of one: over many lines an error of the sum would add up.
    const float left = p_left * total, right = p_right * total;
    return {left, 1.f - (left + right), right};
}

// Gradient of the three logits from the gradient of the three weights.
__device__ __forceinline__ void
weights_backward(const Weights& w, const float (&slope)[3], const float* grad_w, float* grad_logits) {
    const float mean = w.left * grad_w[0] + w.center * grad_w[1] + w.right * grad_w[2];
    const float left = slope[0] * w.left * (grad_w[0] - mean);
    const float center = slope[1] * w.center * (grad_w[1] - mean);
    const float right = slope[2] * w.right * (grad_w[2] - mean);
    grad_logits[0] = left;
    grad_logits[1] = center;
    grad_logits[2] = right;
}

// Two lines of V floats for each slot, used in turn, seen from one slot. A line is kept as planes of
// 16 bytes a slot against bank conflicts.
template <int V> struct LineBuffer {
    static constexpr int WIDTH = V < 4 ? V : 4, BYTES = WIDTH * sizeof(float);
    int data, own;     // offsets in shared memory, of all and of the own slot
    int slots;         // of a line
    int plane, step;   // bytes of a plane, bytes from one position to the next

    static __host__ __device__ constexpr int bytes(int slots) { return 2 * slots * V * sizeof(float); }
    __device__ LineBuffer(int data, int slots, int slot, int vectors)
        : data(data), own(data + slot * BYTES), slots(slots), plane(slots * BYTES),
          step(vectors * BYTES) {
        keep(own), keep(plane), keep(step);
    }
    __device__ void clear() const {
        for (int k = threadIdx.x; k < bytes(slots) / 4; k += blockDim.x)
            *reinterpret_cast<float*>(shared_at(data + 4 * k)) = 0.f;
    }
    // `offset` positions from the own one.
    __device__ __forceinline__ char* at(int turn, int offset, int v) const {
        return shared_at(own + (turn * (V / WIDTH) + v / WIDTH) * plane + offset * step);
    }
    __device__ __forceinline__ void read(int turn, int offset, float (&to)[V]) const {
#pragma unroll
        for (int v = 0; v < V; v += WIDTH) {
            float part[WIDTH];
            Channels<float, WIDTH>::load(at(turn, offset, v), part);
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) to[v + k] = part[k];
        }
    }
    __device__ __forceinline__ void write(int turn, const float (&from)[V]) const {
#pragma unroll
        for (int v = 0; v < V; v += WIDTH) {
            float part[WIDTH];
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) part[k] = from[v + k];
            Channels<float, WIDTH>::store(at(turn, 0, v), part);
        }
    }
    // Into the line buffer of another block of the cluster.
    __device__ __forceinline__ void
    send(int turn, int offset, Receipt* receipt, int rank, const float (&from)[V]) const {
#pragma unroll
        for (int v = 0; v < V; v += WIDTH) {
            float part[WIDTH];
#pragma unroll
            for (int k = 0; k < WIDTH; ++k) part[k] = from[v + k];
            send_async<WIDTH>(at(turn, offset, v), receipt, rank, part);
        }
    }
};

// Sum the four directions' partial results into a.result. All blocks of a chunk call this when
// their direction is done; they wait for one another and then share the tokens. Blocks are started
// in the order of their index and those of a chunk are neighbours, so whoever waits, waits for
// blocks that run or are next to run.
template <class T, int V> __device__ void
merge_directions(const Arguments& a, const Work& work, int segments, int vectors) {
    const int partners = 4 * segments;
    __syncthreads();
    if (threadIdx.x == 0) {
        int* arrived = a.arrivals + work.image * work.chunks + work.chunk;
        __threadfence();
        atomicAdd(arrived, 1);
        while (*static_cast<volatile int*>(arrived) < partners) {}
        __threadfence();
    }
    __syncthreads();

    const int64 first = work.chunk * a.chunk;
    const int own = work.direction * segments + work.segment;
    const int64 plane = work.tokens * a.channels * sizeof(T);
    const char* from = a.partial + work.image * 4 * plane;
    char* to = a.result + work.image * plane;
    typedef typename Channels<T, V>::raw raw;
    constexpr int AHEAD = 4;  // tokens whose loads are on the way together
    // Threads beside one another take neighbouring channels; a block takes every partners-th part.
    const int64 rows = blockDim.x / vectors, row = threadIdx.x / vectors;
    const int64 channel = first + threadIdx.x % vectors * V, stride = partners * rows;
    if (row == rows || channel >= a.channels) return;
    for (int64 token = own * rows + row; token < work.tokens; token += AHEAD * stride) {
        raw parts[AHEAD][4];
        int64 at[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            const int64 here = token + k * stride;
            at[k] = here < work.tokens ? (here * a.channels + channel) * int(sizeof(T)) : -1;
            if (at[k] >= 0) {
#pragma unroll
                for (int d = 0; d < 4; ++d)
                    parts[k][d] = __ldcg(reinterpret_cast<const raw*>(from + d * plane + at[k]));
            }
        }
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            float sum[V] = {}, part[V];
#pragma unroll
            for (int d = 0; d < 4; ++d) {
                Channels<T, V>::load(&parts[k][d], part);
#pragma unroll
                for (int v = 0; v < V; ++v) sum[v] += part[v];
            }
            if (at[k] >= 0) Channels<T, V>::store(to + at[k], sum);
        }
    }
}
