// Between the tokens of a projection, [B, N, P] and [B, N, K], and the lines that the scan reads:
// a transposition of tiles, of some columns of the projection by some positions of a line. Of x
// alone, all lines of an axis are packed as one that has the columns of each: few channels then
// fill a tile too.

struct PackArguments {
    char* x[2];     // [B, N, P]; unpacking writes the part of each axis by itself
    char* params;   // [B, N, K]; null: absent, and of the lines there is but x
    char* lines[2]; // [B, lines, R, padded], of rows and of columns; null: not wanted
    int* arrivals;  // to be set to zero, for the scan that comes next; null: none
    int64 x_image, x_token, params_image, params_token;  // elements between images, tokens
    int64 batch, height, width, channels, groups;
    int64 group_stride;  // columns from the logits of one group to those of the next, 3 or 4
    int64 paired[2];     // by axis, not 0: two columns of 16 bits can be moved as one word
    int64 counters;      // in arrivals
};

enum : int { PACK_THREADS = 256, POSITIONS = 64 };  // of a tile

// One axis of one tile.
template <int SIZE> struct Tile {
    static constexpr int COLUMNS = 128 / SIZE, STRIDE = POSITIONS * SIZE / 4 + 1;
    const PackArguments& a;
    int axis, length, padded, first_column, first_position;
    int64 columns, lines, rows, line, image;

    __device__ Tile(const PackArguments& a) : a(a) {
        const int64 upright = a.batch * tiles_of_image(0);
        axis = blockIdx.x >= upright;
        int64 index = blockIdx.x - (axis ? upright : 0);
        lines = lines_of(axis);
        columns = columns_of(axis);
        rows = a.params ? 7 * a.channels + 6 * a.groups : columns;
        const int64 across = (columns + COLUMNS - 1) / COLUMNS;
        length = axis ? a.height : a.width;
        padded = Work::pad(length, SIZE);
        first_column = index % across * COLUMNS;
        index /= across;
        const int along = (padded + POSITIONS - 1) / POSITIONS;
        first_position = index % along * POSITIONS;
        index /= along;
        line = index % lines;
        image = index / lines;
    }
    __device__ int64 lines_of(int axis) const {
        if (!a.lines[axis]) return 0;
        return a.params ? (axis ? a.width : a.height) : 1;
    }
    __device__ int64 columns_of(int axis) const {
        return a.params ? 7 * a.channels + 2 * a.groups * a.group_stride : (axis ? a.width : a.height) * a.channels;
    }
    __device__ int64 tiles_of_image(int axis) const {
        const int padded = Work::pad(axis ? a.height : a.width, SIZE);
        return lines_of(axis) * ((columns_of(axis) + COLUMNS - 1) / COLUMNS) * ((padded + POSITIONS - 1) / POSITIONS);
    }
    // Where a column stands at token 0 of the image. The columns of a row of lines come in its
    // order, but for the fourth of each group of logits.
    __device__ char* column(int64 q) const {
        if (!a.params) {
            const int64 first_token = q / a.channels * (axis ? 1 : a.width);
            return a.x[axis] + (image * a.x_image + first_token * a.x_token + q % a.channels) * SIZE;
        }
        if (q < a.channels) return a.x[axis] + (image * a.x_image + q) * SIZE;
        q -= a.channels;
        const int64 gates = 2 * a.channels, gate = min(q / gates, int64(3));
        const int64 pair = gate < 3 ? gates : 2 * a.groups * a.group_stride;
        return a.params + (image * a.params_image + 2 * gate * gates + axis * pair + q - gate * gates) * SIZE;
    }
    __device__ int64 token_stride(int64 q) const {
        return (!a.params || q < a.channels ? a.x_token : a.params_token) * SIZE;
    }
    __device__ int64 token(int position) const {
        return axis ? position * a.width + line : line * a.width + position;
    }
    // The row of lines that a column becomes, or -1.
    __device__ int64 row(int64 q) const {
        if (q >= columns) return -1;
        if (!a.params) return q;
        const int64 tap = q - 7 * a.channels;
        if (tap < 0) return q;
        return tap % a.group_stride == 3 ? -1 : 7 * a.channels + tap / a.group_stride * 3 + tap % a.group_stride;
    }
    __device__ unsigned* at(int64 row, int position) const {
        const int64 place = ((image * lines + line) * rows + row) * padded + position;
        return reinterpret_cast<unsigned*>(a.lines[axis] + place * SIZE);
    }
    static __device__ unsigned* words() { return reinterpret_cast<unsigned*>(shared_at(0)); }  // [COLUMNS][STRIDE]
};

template <int SIZE> __global__ void __launch_bounds__(PACK_THREADS) pack_tokens(const PackArguments a) {
    const Tile<SIZE> tile(a);
    unsigned* const words = tile.words();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = PACK_THREADS / 32;
    if (blockIdx.x == 0)
        for (int k = threadIdx.x; k < a.counters; k += PACK_THREADS) a.arrivals[k] = 0;

    if constexpr (SIZE == 2) {
        // Two positions of two columns, which change places within two words.
        const int64 q = tile.first_column + 2 * lane;
        const bool first = q < tile.columns, second = q + 1 < tile.columns, paired = a.paired[tile.axis];
        const char* from = tile.column(first ? q : 0);
        const char* beside = tile.column(second ? q + 1 : 0);
        const int64 stride = tile.token_stride(first ? q : 0), beside_stride = tile.token_stride(second ? q + 1 : 0);
#pragma unroll
        for (int k = 0; k < POSITIONS / 2 / warps; ++k) {
            const int t = warp + k * warps, position = tile.first_position + 2 * t;
            unsigned pair[2] = {};
#pragma unroll
            for (int p = 0; p < 2; ++p) {
                if (position + p >= tile.length || !first) continue;
                const int64 token = tile.token(position + p);
                if (paired) pair[p] = *reinterpret_cast<const unsigned*>(from + token * stride);
                else {
                    pair[p] = *reinterpret_cast<const unsigned short*>(from + token * stride);
                    if (second) pair[p] |= unsigned(*reinterpret_cast<const unsigned short*>(beside + token * beside_stride)) << 16;
                }
            }
            words[2 * lane * tile.STRIDE + t] = (pair[0] & 0xffffu) | pair[1] << 16;
            words[(2 * lane + 1) * tile.STRIDE + t] = pair[0] >> 16 | (pair[1] & 0xffff0000u);
        }
    } else {
        const int64 q = tile.first_column + lane;
        const bool present = q < tile.columns;
        const char* from = tile.column(present ? q : 0);
        const int64 stride = tile.token_stride(present ? q : 0);
#pragma unroll
        for (int k = 0; k < POSITIONS / warps; ++k) {
            const int t = warp + k * warps, position = tile.first_position + t;
            const bool read = present && position < tile.length;
            words[lane * tile.STRIDE + t] =
                read ? *reinterpret_cast<const unsigned*>(from + tile.token(position) * stride) : 0u;
        }
    }
    __syncthreads();
    constexpr int PER_WORD = 4 / SIZE;
#pragma unroll 4
    for (int c = warp; c < tile.COLUMNS; c += warps) {
        const int64 row = tile.row(tile.first_column + c);
        for (int t = lane; t < POSITIONS / PER_WORD; t += 32) {
            const int position = tile.first_position + t * PER_WORD;
            if (row >= 0 && position < tile.padded) *tile.at(row, position) = words[c * tile.STRIDE + t];
        }
    }
}

// The way back. Columns without a row are left alone.
template <int SIZE> __global__ void __launch_bounds__(PACK_THREADS) unpack_tokens(const PackArguments a) {
    const Tile<SIZE> tile(a);
    unsigned* const words = tile.words();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = PACK_THREADS / 32;
    constexpr int PER_WORD = 4 / SIZE;
#pragma unroll 4
    for (int c = warp; c < tile.COLUMNS; c += warps) {
        const int64 row = tile.row(tile.first_column + c);
        for (int t = lane; t < POSITIONS / PER_WORD; t += 32) {
            const int position = tile.first_position + t * PER_WORD;
            words[c * tile.STRIDE + t] = row >= 0 && position < tile.padded ? *tile.at(row, position) : 0u;
        }
    }
    __syncthreads();
    if constexpr (SIZE == 2) {
        const int64 q = tile.first_column + 2 * lane;
        const bool first = tile.row(q) >= 0, second = tile.row(q + 1) >= 0, paired = a.paired[tile.axis];
        char* const to = tile.column(first ? q : 0);
        char* const beside = tile.column(second ? q + 1 : 0);
        const int64 stride = tile.token_stride(first ? q : 0), beside_stride = tile.token_stride(second ? q + 1 : 0);
        for (int t = warp; t < POSITIONS / 2; t += warps) {
            const unsigned above = words[2 * lane * tile.STRIDE + t], below = words[(2 * lane + 1) * tile.STRIDE + t];
            const unsigned pair[2] = {(above & 0xffffu) | below << 16, above >> 16 | (below & 0xffff0000u)};
#pragma unroll
            for (int p = 0; p < 2; ++p) {
                const int position = tile.first_position + 2 * t + p;
                if (position >= tile.length) continue;
                const int64 token = tile.token(position);
                if (paired && first) *reinterpret_cast<unsigned*>(to + token * stride) = pair[p];
                else {
                    if (first) *reinterpret_cast<unsigned short*>(to + token * stride) = pair[p];
                    if (second) *reinterpret_cast<unsigned short*>(beside + token * beside_stride) = pair[p] >> 16;
                }
            }
        }
    } else {
        const int64 q = tile.first_column + lane;
        const bool present = tile.row(q) >= 0;
        char* const to = tile.column(present ? q : 0);
        const int64 stride = tile.token_stride(present ? q : 0);
        for (int t = warp; t < POSITIONS; t += warps) {
            const int position = tile.first_position + t;
            if (present && position < tile.length)
                *reinterpret_cast<unsigned*>(to + tile.token(position) * stride) = words[lane * tile.STRIDE + t];
        }
    }
}
