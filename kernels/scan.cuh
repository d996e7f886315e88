// What the forward and the backward scan share: arguments, the division of work, the weights, and
// the sum over directions.

extern __shared__ uint4 shared_memory[];

__device__ __forceinline__ char* shared_at(int offset) {
    return reinterpret_cast<char*>(shared_memory) + offset;
}

// The lines along one axis of a map, [B, lines, R, padded]: all that a line needs, one row of
// positions below the other. `padded` is its length, rounded up to whole vectors of 16 bytes; past
// the length there are zeros. Rows, for the two directions along the axis (their senses):
//
//     x [P]   lam [2, P]   u [2, P]   skip [2, P], if any   logits [2, G, 3]
struct Lines {
    char* data;  // null: absent
    int64 image, line, row;  // elements from one image, line, row to the next
};

// Passed by value; every member has 64 bits, so that the host can build it as an array of integers.
struct Arguments {
    Lines inputs[2];    // the rows of the map, and its columns
    Lines grad_y[2];    // x of the rows above, and no more; backward only
    Lines grads[2];     // gradients of the inputs, laid out like them; backward only
    char* result;       // y [B, N, P]; forward only, null: not wanted
    char* partial;      // y, or the gradient of x, of each direction by itself: a workspace
    float* hidden;      // h, a workspace; null: not wanted
    float* weights;     // [B, 4, lines, G * 2, padded]: left and right taps, made ready; forward only
    float* shares;      // [parts, B, 4, lines, G * 3, padded]: gradient of logits by part of a group
    int* arrivals;      // [B * parties], zero
    float* buffers;     // lines in global memory, for the kernels without a limit of length
    int64 batch, height, width, channels, groups;
    int64 chunk_size;   // 0: the whole map
    int64 skip;         // not 0: there is a skip
    int64 native_height, native_width;  // lam counts native lines / lines times; 0: as it is
    int64 parts;        // of a group's channels, in shares
    int64 party;        // channels whose directions one set of threads adds up in the end
    int64 lanes;        // threads to a line, where a warp takes whole lines
};

// One direction of some channels of one image. In a workspace, [B, 4, lines, P, padded], every
// direction has the lines of its axis.
struct Work {
    int64 image, party;
    int direction, axis, reversed, channel;  // the first channel
    int lines, length, padded;
    bool idle;  // past the last channel

    // `member` of the party number `party`: direction by direction, then channels by `chunk`.
    __device__ Work(const Arguments& a, int size, int64 party, int member, int chunk) : party(party) {
        const int64 parties = (a.channels + a.party - 1) / a.party;
        image = party / parties;
        direction = member % 4;
        axis = direction / 2;
        reversed = direction % 2;
        channel = party % parties * a.party + member / 4 * chunk;
        idle = channel >= min(a.channels, (party % parties + 1) * a.party);
        lines = axis ? a.width : a.height;
        length = axis ? a.height : a.width;
        padded = pad(length, size);
    }
    __device__ static int pad(int length, int size) {
        const int vector = 16 / size;
        return (length + vector - 1) / vector * vector;
    }
    // What lam is multiplied by.
    __device__ float scale(const Arguments& a) const {
        const int64 native = axis ? a.native_width : a.native_height;
        return native ? float(native) / lines : 1.f;
    }
    __device__ int64 line(int64 visit) const { return reversed ? lines - 1 - visit : visit; }

    // Rows of the inputs.
    __device__ int64 x_row() const { return channel; }
    __device__ int64 lam_row(const Arguments& a) const { return (1 + reversed) * a.channels + channel; }
    __device__ int64 u_row(const Arguments& a) const { return (3 + reversed) * a.channels + channel; }
    __device__ int64 skip_row(const Arguments& a) const { return (5 + reversed) * a.channels + channel; }
    __device__ int64 group(const Arguments& a) const { return channel / (a.channels / a.groups); }
    __device__ int64 logits_row(const Arguments& a) const { return logits_row(a, reversed, group(a)); }
    __device__ static int64 logits_row(const Arguments& a, int reversed, int64 group) {
        return (a.skip ? 7 : 5) * a.channels + 3 * (reversed * a.groups + group);
    }
    // First element of this direction in a workspace that has `rows` rows to a line.
    __device__ int64 plane(const Arguments& a, int size, int64 rows) const {
        return plane(a, size, rows, image, axis, reversed);
    }
    __device__ static int64
    plane(const Arguments& a, int size, int64 rows, int64 image, int axis, int reversed) {
        const int64 upright = a.height * rows * pad(a.width, size);
        const int64 sideways = a.width * rows * pad(a.height, size);
        return 2 * image * (upright + sideways) + (axis ? 2 * upright + reversed * sideways : reversed * upright);
    }
};

// Weights of the left, center and right tap: sigmoid(l_k) / sum of sigmoid(l_k') over the taps that
// exist. With d_k = 1 + e^-l_k, w_k is proportional to 1 / d_k. Below -20, sigmoid(l) is e^l to the
// last digit, so three logits below it can be shifted up together; and what is e^-22 of the largest
// counts for nothing in float32, so exponents can be cut where products of two d would overflow.
struct Weights {
    float left, center, right;
};

// `slope` becomes 1 - sigmoid(l_k), the derivative of log sigmoid.
__device__ __forceinline__ Weights
propagation_weights(float l, float c, float r, bool first, bool last, float (&slope)[3]) {
    constexpr float LOG2_E = 1.44269504088896f, FLAT = 20.f, CUT = 42.f * LOG2_E;
    l = first ? c : l;
    r = last ? c : r;
    const float shift = fminf(fmaxf(fmaxf(l, c), r) + FLAT, 0.f) * LOG2_E;
    const float e_left = exp2_approximate(fminf(shift - l * LOG2_E, CUT));
    const float e_center = exp2_approximate(fminf(shift - c * LOG2_E, CUT));
    const float e_right = exp2_approximate(fminf(shift - r * LOG2_E, CUT));
    const float d_left = 1.f + e_left, d_center = 1.f + e_center, d_right = 1.f + e_right;
    const float p_left = first ? 0.f : d_center * d_right;
    const float p_right = last ? 0.f : d_left * d_center;
    const float total = reciprocal(d_left * d_right + (p_left + p_right));
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

// Wait until every block of the party has come here. Blocks start in the order of their index and
// those of a party are neighbours, so whoever waits, waits for blocks that run or are next to run.
__device__ __forceinline__ void meet(const Arguments& a, int64 party, int members) {
    __syncthreads();
    if (members == 1) return;
    if (threadIdx.x == 0) {
        int* arrived = a.arrivals + party;
        __threadfence();
        atomicAdd(arrived, 1);
        while (*static_cast<volatile int*>(arrived) < members) pause();
        __threadfence();
    }
    __syncthreads();
}

// Positions along each side of the tiles that a party's results are added up in: a power of two.
__device__ __forceinline__ int tile_bits(int64 party) { return party > 4 ? 4 : party > 1 ? 5 : 6; }

// Vectors of one axis of a tile: of two directions, along lines that run across the tile.
template <class T> struct TilePart {
    static constexpr int WIDE = 16 / sizeof(T), BITS = WIDE == 8 ? 3 : 2;
    typedef Vector<T, WIDE> Wide;
    const char* data;   // of the first direction, channel and line
    int64 plane;        // bytes to the other direction
    int64 line;         // bytes from line to line
    int lines, padded;  // of the map
    int bits, items;    // of the tile

    // Vector `item` of the tile whose first line and position these are.
    struct Place { int position, line, channel; };
    __device__ __forceinline__ Place place(int item) const {
        const int along = bits - BITS;
        return {(item & ((1 << along) - 1)) << BITS, item >> along & ((1 << bits) - 1), item >> (along + bits)};
    }
    __device__ __forceinline__ bool
    load(int item, int first_line, int first_position, typename Wide::raw& there, typename Wide::raw& back) const {
        const Place at = place(item);
        if (item >= items || first_line + at.line >= lines || first_position + at.position >= padded) return false;
        const int along = at.channel * padded + first_position + at.position;
        const char* from = data + (first_line + at.line) * line + int64(along) * int(sizeof(T));
        there = __ldcg(reinterpret_cast<const typename Wide::raw*>(from));
        back = __ldcg(reinterpret_cast<const typename Wide::raw*>(from + plane));
        return true;
    }
};

// Add up the four directions' results of a party into a.result. Two of them lie in lines that are
// columns of the map, so the sum goes through tiles in shared memory. AHEAD vectors of each thread
// are on the way while the tile before is written.
template <class T, int AHEAD> __device__ void
merge_maps(const Arguments& a, const Work& work, int member, int members) {
    constexpr int SIZE = sizeof(T), WIDE = 16 / SIZE;
    typedef Vector<T, WIDE> Wide;
    meet(a, work.party, members);

    const int64 parties = (a.channels + a.party - 1) / a.party;
    const int64 first = work.party % parties * a.party, image = work.image;
    const int channels = min(a.party, a.channels - first);
    const int bits = tile_bits(a.party), side = 1 << bits, stride = side + 1;
    const int items = channels << (2 * bits - TilePart<T>::BITS);
    const int height = a.height, width = a.width;
    const int padded[2] = {Work::pad(width, SIZE), Work::pad(height, SIZE)};
    const int64 row[2] = {padded[0] * SIZE, padded[1] * SIZE};
    const int64 planes[2] = {height * a.channels * row[0], width * a.channels * row[1]};
    const char* data = a.partial + 2 * image * (planes[0] + planes[1]);
    const TilePart<T> upright = {data + first * row[0], planes[0], a.channels * row[0], height, padded[0], bits, items};
    const TilePart<T> sideways = {data + 2 * planes[0] + first * row[1], planes[1], a.channels * row[1], width, padded[1], bits, items};
    float* const tile = reinterpret_cast<float*>(shared_at(0));  // [channels][side][side + 1]
    const bool wide = a.channels % WIDE == 0 && a.party % WIDE == 0;
    const int across = (width + side - 1) >> bits;
    const int64 tiles = int64(across) * ((height + side - 1) >> bits);

    typename Wide::raw there[2][AHEAD], back[2][AHEAD];
    bool present[2][AHEAD];
    auto load_ahead = [&](int64 index) {
        const int top = int(index / across) << bits, left = int(index % across) << bits;
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            const int item = threadIdx.x + k * blockDim.x;
            present[0][k] = sideways.load(item, left, top, there[0][k], back[0][k]);
            present[1][k] = upright.load(item, top, left, there[1][k], back[1][k]);
        }
    };
    // A vector of a column goes down in the tile, one of a row across.
    auto put_column = [&](int item, const typename Wide::raw& there, const typename Wide::raw& back) {
        const auto at = sideways.place(item);
        float one[WIDE], other[WIDE];
        Wide::unpack(there, one), Wide::unpack(back, other);
#pragma unroll
        for (int k = 0; k < WIDE; ++k)
            tile[((at.channel << bits) + at.position + k) * stride + at.line] = one[k] + other[k];
    };
    auto add_row = [&](int item, const typename Wide::raw& there, const typename Wide::raw& back) {
        const auto at = upright.place(item);
        float one[WIDE], other[WIDE];
        Wide::unpack(there, one), Wide::unpack(back, other);
#pragma unroll
        for (int k = 0; k < WIDE; ++k)
            tile[((at.channel << bits) + at.line) * stride + at.position + k] += one[k] + other[k];
    };

    if (member < tiles) load_ahead(member);
    for (int64 index = member; index < tiles; index += members) {
        const int top = int(index / across) << bits, left = int(index % across) << bits;
#pragma unroll
        for (int k = 0; k < AHEAD; ++k)
            if (present[0][k]) put_column(threadIdx.x + k * blockDim.x, there[0][k], back[0][k]);
#pragma unroll 2
        for (int item = threadIdx.x + AHEAD * blockDim.x; item < items; item += blockDim.x) {
            typename Wide::raw one, other;
            if (sideways.load(item, left, top, one, other)) put_column(item, one, other);
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < AHEAD; ++k)
            if (present[1][k]) add_row(threadIdx.x + k * blockDim.x, there[1][k], back[1][k]);
#pragma unroll 2
        for (int item = threadIdx.x + AHEAD * blockDim.x; item < items; item += blockDim.x) {
            typename Wide::raw one, other;
            if (upright.load(item, top, left, one, other)) add_row(item, one, other);
        }
        __syncthreads();
        if (index + members < tiles) load_ahead(index + members);

        const int step = wide ? WIDE : 1;
        for (int item = threadIdx.x; item < channels / step << 2 * bits; item += blockDim.x) {
            const int column = item & (side - 1), line = item >> bits & (side - 1), channel = (item >> 2 * bits) * step;
            if (top + line >= height || left + column >= width) continue;
            const int64 token = (image * height + top + line) * width + left + column;
            char* const to = a.result + (token * a.channels + first + channel) * SIZE;
            const float* const from = tile + ((channel << bits) + line) * stride + column;
            if (wide) {
                float sum[WIDE];
#pragma unroll
                for (int k = 0; k < WIDE; ++k) sum[k] = from[k * (stride << bits)];
                Wide::store(to, sum);
            } else {
                const float sum[1] = {*from};
                Vector<T, 1>::store(to, sum);
            }
        }
        __syncthreads();
    }
}

// Add up the gradients of x of a party, of the two directions along each axis.
template <class T> __device__ void
merge_lines(const Arguments& a, const Work& work, int member, int members) {
    constexpr int SIZE = sizeof(T), WIDE = 16 / SIZE;
    typedef Vector<T, WIDE> Wide;
    meet(a, work.party, members);

    const int64 parties = (a.channels + a.party - 1) / a.party;
    const int64 first = work.party % parties * a.party;
    const int channels = min(a.party, a.channels - first);
    for (int axis = 0; axis < 2; ++axis) {
        const int64 lines = axis ? a.width : a.height;
        const int64 padded[2] = {Work::pad(a.width, SIZE), Work::pad(a.height, SIZE)};
        const int64 planes[2] = {a.height * a.channels * padded[0], a.width * a.channels * padded[1]};
        const int vectors = padded[axis] / WIDE;
        const int64 begin = 2 * (work.image * (planes[0] + planes[1]) + axis * planes[0]);
        const char* from = a.partial + (begin + first * padded[axis]) * SIZE;
        const Lines& grads = a.grads[axis];
        char* to = grads.data + (work.image * grads.image + first * padded[axis]) * SIZE;
        for (int64 line = member; line < lines; line += members) {
            const char* there = from + line * a.channels * padded[axis] * SIZE;
            // A line's rows of these channels are neighbours, there and here.
#pragma unroll 4
            for (int item = threadIdx.x; item < channels * vectors; item += blockDim.x) {
                float sum[WIDE], back[WIDE];
                Wide::load_fresh(there + item * 16, sum);
                Wide::load_fresh(there + planes[axis] * SIZE + item * 16, back);
#pragma unroll
                for (int k = 0; k < WIDE; ++k) sum[k] += back[k];
                Wide::store(to + line * grads.line * SIZE + item * 16, sum);
            }
        }
    }
}
