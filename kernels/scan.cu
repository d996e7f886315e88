// The GSPN-2 scan (arXiv 2512.07884, section 3): four directions, all images and channels in one
// launch, and its gradient. A thread owns V neighbouring positions of C channels and walks over the
// lines of one direction; its neighbours are the threads beside it in the warp:
//
//     short lines      | lanes 0 .. n-1: a line | lanes n .. 2n-1: another direction or channel | ..
//
//     long lines,      warp 0   | x |  0 ..  27 | x |
//     in strips        warp 1               | x | 28 ..  55 | x |        x: the halo, the positions
//                      ...                                                  of the warp beside
//
// A short line needs shuffles only. Of a long one every warp takes a strip, and computes what two
// threads beyond each end compute too: these 2 V positions lose one of truth with every line, so
// that after 2 V lines, and not before, the warps tell each other what their ends have become.
//
// Every warp copies what it needs itself, several lines ahead, into a ring in shared memory:
//
//     line i:      row x[0]    | thread 0: V numbers | thread 1: V numbers | ...
//                  row x[1]    | ...
//                  ...
//     line i + 1:  ...

enum : int {
    ALL = ~0,               // lanes of a warp
    HALO = 2,               // lanes at each end of a strip that belong to the warps beside
    STRIP = 32 - 2 * HALO,  // lanes of a strip without its halo
    QUAD_THREADS = 256      // of a block of the kernels that come before and after a scan
};

// Where a thread stands: its work, and its first position. Threads whose positions lie off the line
// compute with zeros.
template <int V, bool STRIPS> struct Place {
    Work work;
    int member, members;  // of the party: this thread's, or in strips this block's; how many meet
    int lane, width;      // within the threads of a line, or in strips of a warp
    int j;
    bool present;         // there are such positions
    bool writes;          // and this thread answers for them
    int threads;          // in strips: of the warps that have one
    int visits;           // lines of all directions in this warp: shuffles need every lane

    __device__ Place(const Arguments& a, int size, int chunk)
        : work(a, size, STRIPS ? blockIdx.x / count(a, chunk) : blockIdx.x,
               STRIPS ? blockIdx.x % count(a, chunk) : threadIdx.x / a.lanes, chunk) {
        members = STRIPS ? count(a, chunk) : 1;
        member = STRIPS ? blockIdx.x % members : 0;
        width = STRIPS ? 32 : a.lanes;
        lane = threadIdx.x % width;
        const bool halo = STRIPS && (lane < HALO || lane >= 32 - HALO);
        j = STRIPS ? (int(threadIdx.x) / 32 * STRIP + lane - HALO) * V : lane * V;
        present = !work.idle && j >= 0 && j < work.padded;
        writes = present && !halo;
        visits = width == 32 ? work.lines : max(a.height, a.width);
        threads = work.idle ? 0 : (work.padded + STRIP * V - 1) / (STRIP * V) * 32;
    }
    __device__ static int count(const Arguments& a, int chunk) { return 4 * a.party / chunk; }
    __device__ bool takes_part() const { return !STRIPS || threadIdx.x < threads; }
};

// A walk of one thread over the lines of one buffer, first to last or last to first.
struct Walk {
    char* at;
    int64 step;

    __device__ Walk(char* first_line, int64 line_bytes, const Work& work, bool back) {
        const bool down = work.reversed != back;
        at = first_line + (down ? (work.lines - 1) * line_bytes : 0);
        step = down ? -line_bytes : line_bytes;
    }
    __device__ Walk(const Lines& lines, const Work& work, int j, int size, bool back)
        : Walk(lines.data + (work.image * lines.image + j) * size, lines.line * size, work, back) {}
    __device__ __forceinline__ void advance() { at += step; }
};

// Bytes from the position of a walk over the inputs, or their gradients, to the rows of a thread.
struct Rows {
    int x, lam, u, skip, logits, row;  // row: from one row to the next

    __device__ Rows(const Arguments& a, const Work& work, int row) : row(row) {
        x = work.x_row() * row;
        lam = work.lam_row(a) * row;
        u = work.u_row(a) * row;
        skip = work.skip_row(a) * row;
        logits = work.logits_row(a) * row;
    }
};

// The ring, seen from one thread. In a stage every warp has its rows, and after them rows of floats,
// if any, so that a row is a constant number of bytes from the next.
template <class T, int V, int STAGES> struct Ring {
    static constexpr int BYTES = V * sizeof(T), ROW = 32 * BYTES;
    static constexpr int FLOATS = V * sizeof(float), FLOAT_ROW = 32 * FLOATS;
    int own, own_float, stage, end, now;  // offsets in shared memory; `now`: of the present stage

    __device__ Ring(int rows, int float_rows) {
        const int lane = threadIdx.x % 32, warp = rows * ROW + float_rows * FLOAT_ROW;
        own = int(threadIdx.x) / 32 * warp + lane * BYTES;
        own_float = int(threadIdx.x) / 32 * warp + rows * ROW + lane * FLOATS;
        stage = int(blockDim.x) / 32 * warp;
        end = STAGES * stage;
        now = 0;
    }
    __device__ __forceinline__ int next(int at) const { return at + stage == end ? 0 : at + stage; }
    __device__ __forceinline__ char* slot(int at, int r) const { return shared_at(at + own) + r * ROW; }
    __device__ __forceinline__ char* float_slot(int at, int r) const {
        return shared_at(at + own_float) + r * FLOAT_ROW;
    }
    // COUNT rows that are `row_bytes` apart.
    template <int COUNT>
    __device__ __forceinline__ void copy(int at, int r, const char* from, int row_bytes) const {
#pragma unroll
        for (int k = 0; k < COUNT; ++k, from += row_bytes) copy_async<BYTES>(slot(at, r + k), from);
    }
    template <int COUNT>
    __device__ __forceinline__ void copy_floats(int at, int r, const char* from, int64 row_bytes) const {
#pragma unroll
        for (int k = 0; k < COUNT; ++k, from += row_bytes) copy_async<FLOATS>(float_slot(at, r + k), from);
    }
    __device__ __forceinline__ void load(int at, int r, float (&to)[V]) const {
        Vector<T, V>::load(slot(at, r), to);
    }
    // Threads off the line are never copied anything.
    __device__ void clear(bool present, int rows, int float_rows) const {
        if (present) return;
        float zeros[V] = {};
        for (int at = 0; at < end; at += stage) {
            for (int r = 0; r < rows; ++r) Vector<T, V>::store(slot(at, r), zeros);
            for (int r = 0; r < float_rows; ++r) Vector<float, V>::store(float_slot(at, r), zeros);
        }
    }
};

// What the strips of a line tell each other: the values of their first and last HALO threads. Two
// boards in turn, so that one barrier is enough. Warps without a strip come to the barrier too.
template <int V, int C> struct Board {
    static constexpr int SLOT = C * V * sizeof(float), LINES = HALO * V;  // lines between exchanges
    int put, get, turn;  // offsets in shared memory, to the other board
    bool puts, gets;

    template <bool STRIPS> __device__ Board(int begin, const Place<V, STRIPS>& place) {
        const int lane = place.lane, own = begin + int(threadIdx.x) / 32 * 2 * HALO * SLOT;
        const bool first = lane < 2 * HALO, left = lane < HALO;
        puts = first ? !left : lane >= 32 - 2 * HALO && lane < 32 - HALO;
        gets = place.present && (left || lane >= 32 - HALO);
        put = own + (first ? lane - HALO : lane - (32 - 3 * HALO)) * SLOT;
        get = own + (left ? lane - HALO : lane - (32 - HALO) + 2 * HALO) * SLOT;
        turn = int(blockDim.x) / 32 * 2 * HALO * SLOT;
    }
    __device__ __forceinline__ void exchange(int which, float (&values)[C][V]) const {
        const int board = (which & 1) * turn;
        if (puts)
#pragma unroll
            for (int c = 0; c < C; ++c) Vector<float, V>::store(shared_at(put + board + c * V * 4), values[c]);
        __syncthreads();
        if (gets)
#pragma unroll
            for (int c = 0; c < C; ++c) Vector<float, V>::load(shared_at(get + board + c * V * 4), values[c]);
    }
    static __device__ void watch(const Place<V, true>& place) {
        for (int visit = LINES; visit < place.work.lines && !place.work.idle; visit += LINES) __syncthreads();
    }
};

// The weights of V neighbouring positions, of which j is the first, from their logits.
template <int V> __device__ __forceinline__ void
weights_of(const float (&l)[V], const float (&c)[V], const float (&r)[V], int j, int length, Weights (&w)[V], float (&slope)[V][3]) {
#pragma unroll
    for (int v = 0; v < V; ++v)
        w[v] = propagation_weights(l[v], c[v], r[v], v == 0 && j == 0, v + j == length - 1, slope[v]);
}

// Four positions of one of the `rows` rows that every line of every direction has in a workspace,
// for kernels whose threads take one each.
template <class T> struct Quad {
    enum : int { V = 4 };
    int axis, reversed, j, length, padded;
    int64 image, line, row, rows;
    bool present;

    __device__ Quad(const Arguments& a, int64 rows) : rows(rows) {
        constexpr int SIZE = sizeof(T);
        int64 rest = int64(blockIdx.x) * QUAD_THREADS + threadIdx.x;
        const int64 upright = 2 * a.batch * a.height * rows * (Work::pad(a.width, SIZE) / V);
        axis = rest >= upright;
        if (axis) rest -= upright;
        const int64 lines = axis ? a.width : a.height;
        length = axis ? a.height : a.width;
        padded = Work::pad(length, SIZE);
        j = rest % (padded / V) * V, rest /= padded / V;
        row = rest % rows, rest /= rows;
        line = rest % lines, rest /= lines;
        reversed = rest % 2, image = rest / 2;
        present = image < a.batch;
    }
    // Where it is in a workspace that has `each` rows for one of these.
    __device__ int64 in_workspace(const Arguments& a, int each = 1) const {
        const int64 plane = Work::plane(a, sizeof(T), each * rows, image, axis, reversed);
        return plane + (line * rows + row) * each * padded + j;
    }
    __device__ char* in(const Lines& lines, int64 row) const {
        return lines.data + (image * lines.image + line * lines.line + row * lines.row + j) * sizeof(T);
    }
};

// Where many channels share weights, they are made ready once, before the scan. The counters with
// which blocks wait for one another are set to zero on the way.
template <class T> __global__ void __launch_bounds__(QUAD_THREADS) ready_weights(const Arguments a) {
    constexpr int V = Quad<T>::V;
    const int64 index = int64(blockIdx.x) * QUAD_THREADS + threadIdx.x;
    if (index < a.batch * ((a.channels + a.party - 1) / a.party)) a.arrivals[index] = 0;

    const Quad<T> at(a, a.groups);
    if (!at.present) return;
    const Lines& lines = a.inputs[at.axis];
    const char* logits = at.in(lines, Work::logits_row(a, at.reversed, at.row));
    float l[V], c[V], r[V], left[V], right[V], slope[V][3];
    Vector<T, V>::load(logits, l);
    Vector<T, V>::load(logits + lines.row * sizeof(T), c);
    Vector<T, V>::load(logits + 2 * lines.row * sizeof(T), r);
    Weights w[V];
    weights_of(l, c, r, at.j, at.length, w, slope);
#pragma unroll
    for (int v = 0; v < V; ++v) left[v] = w[v].left, right[v] = w[v].right;
    float* const to = a.weights + at.in_workspace(a, 2);
    Vector<float, V>::store(to, left);
    Vector<float, V>::store(to + at.padded, right);
}

// What a forward scan writes: h alone, or y, which may have a skip, and h beside it if it is wanted.
enum Output : int { HIDDEN, RESULT, RESULT_WITH_SKIP };

// The inputs of a forward scan on their way: a walk over the lines, and the ring that they are
// copied into. A lane copies the positions of SPAN neighbouring lanes from every SPAN-th row, so
// that a copy has up to 16 bytes.
template <class T, int V, int C, bool STRIPS, bool READY, Output OUTPUT> struct Feed {
    static constexpr int SIZE = sizeof(T), BYTES = V * SIZE, FLOATS = V * sizeof(float);
    static constexpr int SPAN = STRIPS && BYTES < 16 ? HALO : 1, FLOAT_SPAN = STRIPS && FLOATS < 16 ? HALO : 1;
    enum : int {
        X = 0, LAM = C, U = 2 * C, SKIP = 3 * C,  // rows
        LOGITS = (OUTPUT == HIDDEN ? 2 : OUTPUT == RESULT ? 3 : 4) * C,
        ROWS = LOGITS + (READY ? 0 : 3), COPIES = (ROWS + SPAN - 1) / SPAN,
        FLOAT_ROWS = READY ? 2 : 0,
        ROW = 32 * BYTES, FLOAT_ROW = 32 * FLOATS, LINE = ROWS * ROW + FLOAT_ROWS * FLOAT_ROW
    };
    int own;           // offset in shared memory: of this warp's ring
    int lane;
    int rows[COPIES];  // bytes from the walk to what this lane copies of a line
    Walk inputs, weights;
    int weight_row;    // bytes from one row of weights to the next
    bool present, weights_present, last_row;

    __device__ Feed(const Arguments& a, const Place<V, STRIPS>& place, int lines_of_ring)
        : own(int(threadIdx.x) / 32 * lines_of_ring * LINE), lane(int(threadIdx.x) % 32),
          inputs(a.inputs[place.work.axis], place.work, first(place, SPAN), SIZE, false),
          weights(first_weights(a, place), 2 * a.groups * place.work.padded * sizeof(float), place.work, false) {
        const Work& work = place.work;
        const int row = a.inputs[work.axis].row * SIZE;
        weight_row = work.padded * sizeof(float);
        present = within(work, first(place, SPAN)), weights_present = within(work, first(place, FLOAT_SPAN));
        last_row = ROWS % SPAN == 0 || lane < 32 / SPAN;
        const int below = lane / (32 / SPAN);
#pragma unroll
        for (int k = 0; k < COPIES; ++k) {
            const int r = k * SPAN + below;
            const int64 begin = r < LAM ? work.x_row() : r < U ? work.lam_row(a)
                : r >= LOGITS ? work.logits_row(a) : r < SKIP ? work.u_row(a) : work.skip_row(a);
            rows[k] = (begin + (r < LOGITS ? r % C : r - LOGITS)) * row;
        }
    }
    // The first position that a lane copies if it does so for `span` lanes.
    static __device__ int first(const Place<V, STRIPS>& place, int span) {
        const int lane = int(threadIdx.x) % 32;
        return place.j + (lane % (32 / span) * span - lane) * V;
    }
    static __device__ bool within(const Work& work, int j) { return !work.idle && j >= 0 && j < work.padded; }
    static __device__ char* first_weights(const Arguments& a, const Place<V, STRIPS>& place) {
        const Work& work = place.work;
        const int64 tap = work.group(a) * 2 + int(threadIdx.x) % 32 / (32 / FLOAT_SPAN);
        const int64 plane = work.plane(a, SIZE, 2 * a.groups);
        return reinterpret_cast<char*>(a.weights + plane + tap * work.padded + first(place, FLOAT_SPAN));
    }
    __device__ __forceinline__ char* copied(int at, int k) const {
        return shared_at(own + at + k * SPAN * ROW + lane * SPAN * BYTES);
    }
    __device__ __forceinline__ char* copied_float(int at, int k) const {
        return shared_at(own + at + ROWS * ROW + (k * FLOAT_ROW + lane * FLOATS) * FLOAT_SPAN);
    }
    // The next line to the place `at` in the ring.
    __device__ __forceinline__ void copy(int at, bool exists) {
        if (exists && present) {
#pragma unroll
            for (int k = 0; k < COPIES; ++k)
                if (k + 1 < COPIES || last_row) copy_async<SPAN * BYTES>(copied(at, k), inputs.at + rows[k]);
        }
        if (READY && exists && weights_present) {
#pragma unroll
            for (int k = 0; k < FLOAT_ROWS / FLOAT_SPAN; ++k)
                copy_async<FLOAT_SPAN * FLOATS>(copied_float(at, k), weights.at + k * weight_row);
        }
        inputs.advance(), weights.advance();
    }
    // Positions off the line are never copied.
    __device__ void clear(int lines_of_ring) const {
        float zeros[V] = {};
        for (int at = 0; at < lines_of_ring * LINE; at += LINE) {
#pragma unroll
            for (int span = 0; span < SPAN && !present; ++span)
                for (int k = 0; k < COPIES; ++k)
                    if (k + 1 < COPIES || last_row) Vector<T, V>::store(copied(at, k) + span * BYTES, zeros);
#pragma unroll
            for (int span = 0; span < FLOAT_SPAN && !weights_present; ++span)
                for (int k = 0; k < FLOAT_ROWS / FLOAT_SPAN; ++k)
                    Vector<float, V>::store(copied_float(at, k) + span * FLOATS, zeros);
        }
    }
    // A lane's own positions of a row.
    __device__ __forceinline__ void load(int at, int row, float (&to)[V]) const {
        Vector<T, V>::load(shared_at(own + at + row * ROW + lane * BYTES), to);
    }
    __device__ __forceinline__ void load_weights(int at, int j, int length, Weights (&w)[V]) const {
        float left[V], center[V], right[V], slope[V][3];
        if constexpr (READY) {
            const int from = own + at + ROWS * ROW + lane * FLOATS;
            Vector<float, V>::load(shared_at(from), left);
            Vector<float, V>::load(shared_at(from + FLOAT_ROW), right);
#pragma unroll
            for (int v = 0; v < V; ++v) w[v] = {left[v], 1.f - (left[v] + right[v]), right[v]};
        } else {
            load(at, LOGITS, left), load(at, LOGITS + 1, center), load(at, LOGITS + 2, right);
            weights_of(left, center, right, j, length, w, slope);
        }
    }
};

// What a line needs besides the h before it.
template <int V, int C> struct Prepared {
    Weights w[V];
    float b[C][V];  // lam x
};

template <class T, int V, int C, bool STRIPS, int STAGES, int THREADS, bool READY, Output OUTPUT>
__global__ void __launch_bounds__(THREADS, 1) scan_forward(const Arguments a) {
    typedef Feed<T, V, C, STRIPS, READY, OUTPUT> Input;
    // Lines are copied, and waited for, in batches. Of one line, the next is prepared meanwhile.
    constexpr int SIZE = sizeof(T), BATCH = STAGES < 6 ? 1 : 2, BATCHES = STAGES / BATCH;
    constexpr bool AHEAD = BATCH == 1 && BATCHES > 2;
    constexpr int STEP = BATCH * Input::LINE, END = BATCHES * STEP;
    const Place<V, STRIPS> place(a, SIZE, C);
    const Work& work = place.work;

    if (place.takes_part()) {
        Input input(a, place, STAGES);
        input.clear(STAGES);
        const bool keeps = OUTPUT == HIDDEN || a.hidden != nullptr;
        const float scale = work.scale(a);
        const int64 elements = a.channels * work.padded;  // of a line
        const int64 begin = work.plane(a, SIZE, a.channels) + int64(work.channel) * work.padded + place.j;
        Walk y(a.partial + begin * SIZE, elements * SIZE, work, false);  // h has the same places

        int copied_lines = 0;
        auto copy_batch = [&](int at) {
#pragma unroll
            for (int k = 0; k < BATCH; ++k) input.copy(at + k * Input::LINE, copied_lines++ < work.lines);
            commit_copies();
        };
        auto prepare = [&](int at, Prepared<V, C>& line) {
            input.load_weights(at, place.j, work.length, line.w);
#pragma unroll
            for (int c = 0; c < C; ++c) {
                float gate[V];
                input.load(at, Input::X + c, line.b[c]);
                input.load(at, Input::LAM + c, gate);
#pragma unroll
                for (int v = 0; v < V; ++v) line.b[c][v] *= gate[v] * scale;
            }
        };

        const int chunk_size = min(a.chunk_size, int64(work.lines));
        int since_restart = 0;
        float h[C][V] = {};
        auto step = [&](int at, const Prepared<V, C>& line, bool exists) {
            const bool writes = place.writes && exists;
            if (since_restart == chunk_size) {  // but for the first line never, if it is 0
                since_restart = 0;
#pragma unroll
                for (int c = 0; c < C; ++c)
#pragma unroll
                    for (int v = 0; v < V; ++v) h[c][v] = 0.f;
            }
            ++since_restart;
            float left[C], right[C];
#pragma unroll
            for (int c = 0; c < C; ++c) {
                left[c] = __shfl_up_sync(ALL, h[c][V - 1], 1, place.width);
                right[c] = __shfl_down_sync(ALL, h[c][0], 1, place.width);
            }
#pragma unroll
            for (int c = 0; c < C; ++c) {
                float before[V];
#pragma unroll
                for (int v = 0; v < V; ++v) before[v] = h[c][v];
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const float beside_left = v == 0 ? left[c] : before[v - 1];
                    const float beside_right = v == V - 1 ? right[c] : before[v + 1];
                    const float own = line.w[v].center * before[v] + line.b[c][v];
                    h[c][v] = line.w[v].left * beside_left + (line.w[v].right * beside_right + own);
                }
                if constexpr (OUTPUT != HIDDEN) {
                    float out[V];
                    input.load(at, Input::U + c, out);
#pragma unroll
                    for (int v = 0; v < V; ++v) out[v] *= h[c][v];
                    if constexpr (OUTPUT == RESULT_WITH_SKIP) {
                        float x[V], gate[V];
                        input.load(at, Input::X + c, x);
                        input.load(at, Input::SKIP + c, gate);
#pragma unroll
                        for (int v = 0; v < V; ++v) out[v] += gate[v] * x[v];
                    }
                    if (writes) Vector<T, V>::store(y.at + c * work.padded * SIZE, out);
                }
            }
            if (keeps && writes) {
                float* const to = a.hidden + (y.at - a.partial) / SIZE;
#pragma unroll
                for (int c = 0; c < C; ++c) Vector<float, V>::store(to + c * work.padded, h[c]);
            }
            y.advance();
        };

        __syncwarp();
#pragma unroll 1
        for (int k = 0; k + 1 < BATCHES; ++k) copy_batch(k * STEP);
        Prepared<V, C> lines[BATCH];
        if constexpr (AHEAD) {
            wait_copies<BATCHES - 2>();
            __syncwarp();
            prepare(0, lines[0]);
        }
        const Board<V, C> board(int(blockDim.x) / 32 * END, place);
        int now = 0, free = END - STEP;  // places in the ring: of this batch and of the one before
#pragma unroll 1
        for (int i = 0; i < place.visits; i += BATCH) {
            if constexpr (STRIPS)
                if (i > 0 && i % Board<V, C>::LINES == 0) board.exchange(i / Board<V, C>::LINES, h);
            __syncwarp();  // everyone is done with the batch before
            copy_batch(free);
            wait_copies<BATCHES - 1 - AHEAD>();
            __syncwarp();
            free = now;
            now = now + STEP == END ? 0 : now + STEP;
            if constexpr (AHEAD) {
                Prepared<V, C> next;
                prepare(now, next);
                step(free, lines[0], i < work.lines);
                lines[0] = next;
            } else {
#pragma unroll
                for (int k = 0; k < BATCH; ++k) prepare(free + k * Input::LINE, lines[k]);
#pragma unroll
                for (int k = 0; k < BATCH; ++k)
                    if (k == 0 || i + k < place.visits) step(free + k * Input::LINE, lines[k], i + k < work.lines);
            }
        }
    }
    else if constexpr (STRIPS) Board<V, C>::watch(place);
    wait_copies<0>();
    if constexpr (OUTPUT != HIDDEN) merge_maps<T, (V * C > 4 ? 2 : 1)>(a, work, place.member, place.members);
}

// The gradient is a scan over the lines in reverse. With g the gradient of h,
//     g_i = u_i grad_y_i + A_(i+1)^T g_(i+1),
// and position j gets from its neighbours on line i + 1 what they read from it there:
//     w_left[i+1, j+1] g[i+1, j+1]   and   w_right[i+1, j-1] g[i+1, j-1].
// At visit v a thread stands on line lines - 1 - v; the ring's stage holds h of the line before.
template <class T, int V, int C, bool STRIPS, int STAGES, int THREADS>
__global__ void __launch_bounds__(THREADS, 1) scan_backward(const Arguments a) {
    constexpr int SIZE = sizeof(T), TOGETHER = Board<V, C>::LINES;
    enum { X = 0, LAM = C, LOGITS = 2 * C, U = 2 * C + 3, GRAD_Y = 3 * C + 3, SKIP = 4 * C + 3 };
    const Place<V, STRIPS> place(a, SIZE, C);
    const Work& work = place.work;
    const bool skips = a.skip;

    if (place.takes_part()) {
        const int ring_rows = skips ? 5 * C + 3 : 4 * C + 3;
        Ring<T, V, STAGES> ring(ring_rows, C);
        ring.clear(place.present, ring_rows, C);
        const Rows rows(a, work, work.padded * SIZE);  // of the inputs and of their gradients
        const float scale = work.scale(a);
        Walk input(a.inputs[work.axis], work, place.j, SIZE, true);
        Walk grad_y(a.grad_y[work.axis], work, place.j, SIZE, true);
        Walk grads(a.grads[work.axis], work, place.j, SIZE, true);
        const int64 plane = work.plane(a, SIZE, a.channels), line = a.channels * work.padded;
        const int64 begin = plane + int64(work.channel) * work.padded + place.j;
        const int64 hidden_row = work.padded * sizeof(float);
        Walk hidden(reinterpret_cast<char*>(a.hidden + begin), line * sizeof(float), work, true);
        Walk grad_x(a.partial + begin * SIZE, line * SIZE, work, true);

        // Gradients of the logits are sums over the channels of a group. What is left of a sum
        // that several blocks or warps share is added later.
        const int64 share = a.channels / a.groups, part = work.channel % share / C;
        const bool shared = a.shares != nullptr;
        const int64 tap_rows = 3 * a.groups, tap = work.channel / share * 3;
        const int64 all = 2 * a.batch * tap_rows *
            (a.height * Work::pad(a.width, SIZE) + a.width * Work::pad(a.height, SIZE));
        float* const first_share =
            a.shares + part * all + work.plane(a, SIZE, tap_rows) + tap * work.padded + place.j;
        Walk shares(reinterpret_cast<char*>(first_share), tap_rows * hidden_row, work, true);

        float h[C][V] = {};
        if (place.present)
#pragma unroll
            for (int c = 0; c < C; ++c) Vector<float, V>::load(hidden.at + c * hidden_row, h[c]);
        hidden.advance();

        auto copy_line = [&](int visit, int at) {
            if (visit < work.lines && place.present) {
                ring.template copy<C>(at, X, input.at + rows.x, rows.row);
                ring.template copy<C>(at, LAM, input.at + rows.lam, rows.row);
                ring.template copy<3>(at, LOGITS, input.at + rows.logits, rows.row);
                ring.template copy<C>(at, U, input.at + rows.u, rows.row);
                ring.template copy<C>(at, GRAD_Y, grad_y.at + rows.x, rows.row);
                if (skips) ring.template copy<C>(at, SKIP, input.at + rows.skip, rows.row);
                if (visit + 1 < work.lines) ring.template copy_floats<C>(at, 0, hidden.at, hidden_row);
            }
            input.advance(), grad_y.advance(), hidden.advance();
            commit_copies();
        };

#pragma unroll 1
        for (int s = 0; s < STAGES; ++s) copy_line(s, s * ring.stage);

        const Board<V, C> board(ring.end, place);
        const int last_line = work.lines - 1;
        int since_restart = a.chunk_size ? last_line % a.chunk_size : last_line;
        float carry[C][V] = {};
        const bool leftmost = place.lane == 0, rightmost = place.lane == place.width - 1;
        auto step = [&](int visit) {
            const bool writes = place.writes && visit < work.lines;
            const bool restart = since_restart == 0;
            since_restart = (restart ? int(a.chunk_size) : since_restart) - 1;
            wait_copies<STAGES - 1>();
            Weights w[V];
            float l[V], c[V], r[V], slope[V][3], sums[V][3] = {};
            ring.load(ring.now, LOGITS, l), ring.load(ring.now, LOGITS + 1, c), ring.load(ring.now, LOGITS + 2, r);
            weights_of(l, c, r, place.j, work.length, w, slope);
#pragma unroll
            for (int c = 0; c < C; ++c) {
                float g[V], dy[V], value[V], gate[V], out[V];
                ring.load(ring.now, GRAD_Y + c, dy);
                ring.load(ring.now, U + c, gate);
#pragma unroll
                for (int v = 0; v < V; ++v) g[v] = gate[v] * dy[v] + carry[c][v];

                float from_right = __shfl_down_sync(ALL, w[0].left * g[0], 1, place.width);
                float from_left = __shfl_up_sync(ALL, w[V - 1].right * g[V - 1], 1, place.width);
                if (rightmost) from_right = 0.f;
                if (leftmost) from_left = 0.f;
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const float sent_left = v == V - 1 ? from_right : w[v + 1 < V ? v + 1 : v].left * g[v + 1 < V ? v + 1 : v];
                    const float sent_right = v == 0 ? from_left : w[v > 0 ? v - 1 : v].right * g[v > 0 ? v - 1 : v];
                    carry[c][v] = restart ? 0.f : w[v].center * g[v] + (sent_left + sent_right);
                }

                const int64 row = int64(c) * rows.row;
#pragma unroll
                for (int v = 0; v < V; ++v) out[v] = dy[v] * h[c][v];
                if (writes) Vector<T, V>::store(grads.at + rows.u + row, out);

                // h of the line before, at these positions and beside them.
                Vector<float, V>::load(ring.float_slot(ring.now, c), h[c]);
                const float h_left = __shfl_up_sync(ALL, h[c][V - 1], 1, place.width);
                const float h_right = __shfl_down_sync(ALL, h[c][0], 1, place.width);
                if (!restart) {
#pragma unroll
                    for (int v = 0; v < V; ++v) {
                        sums[v][0] += g[v] * (v == 0 ? h_left : h[c][v > 0 ? v - 1 : v]);
                        sums[v][1] += g[v] * h[c][v];
                        sums[v][2] += g[v] * (v == V - 1 ? h_right : h[c][v + 1 < V ? v + 1 : v]);
                    }
                }

                ring.load(ring.now, X + c, value);
                ring.load(ring.now, LAM + c, gate);
#pragma unroll
                for (int v = 0; v < V; ++v) out[v] = g[v] * value[v] * scale;
                if (writes) Vector<T, V>::store(grads.at + rows.lam + row, out);
#pragma unroll
                for (int v = 0; v < V; ++v) out[v] = g[v] * gate[v] * scale;
                if (skips) {
                    ring.load(ring.now, SKIP + c, gate);
#pragma unroll
                    for (int v = 0; v < V; ++v) {
                        out[v] += dy[v] * gate[v];
                        value[v] *= dy[v];
                    }
                    if (writes) Vector<T, V>::store(grads.at + rows.skip + row, value);
                }
                if (writes) Vector<T, V>::store(grad_x.at + row, out);
            }
#pragma unroll
            for (int v = 0; v < V; ++v) weights_backward(w[v], slope[v], sums[v], sums[v]);
            if (writes) {
#pragma unroll
                for (int k = 0; k < 3; ++k) {
                    float some[V];
#pragma unroll
                    for (int v = 0; v < V; ++v) some[v] = sums[v][k];
                    if (shared) Vector<float, V>::store(shares.at + k * hidden_row, some);
                    else Vector<T, V>::store(grads.at + rows.logits + int64(k) * rows.row, some);
                }
            }
            grads.advance(), grad_x.advance(), shares.advance();
            copy_line(visit + STAGES, ring.now);
            ring.now = ring.next(ring.now);
        };
#pragma unroll 1
        for (int visit = 0; visit < place.visits; visit += TOGETHER) {
            if constexpr (STRIPS)
                if (visit > 0) board.exchange(visit / TOGETHER, carry);
#pragma unroll 1
            for (int k = 0; k < TOGETHER; ++k)
                if (visit + k < place.visits) step(visit + k);
        }
    }
    else if constexpr (STRIPS) Board<V, C>::watch(place);
    wait_copies<0>();
    merge_lines<T>(a, work, place.member, place.members);
}

// Add up the shares of the gradient of logits, after the scan.
template <class T> __global__ void __launch_bounds__(QUAD_THREADS) add_shares(const Arguments a) {
    constexpr int V = Quad<T>::V;
    const int64 rows = 3 * a.groups;
    const Quad<T> at(a, rows);
    if (!at.present) return;
    const int64 all = 2 * a.batch * rows *
        (a.height * Work::pad(a.width, sizeof(T)) + a.width * Work::pad(a.height, sizeof(T)));
    const float* share = a.shares + at.in_workspace(a);
    float sum[V] = {};
#pragma unroll 4
    for (int64 part = 0; part < a.parts; ++part, share += all) {
        float some[V];
        Vector<float, V>::load(share, some);
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += some[v];
    }
    Vector<T, V>::store(at.in(a.grads[at.axis], Work::logits_row(a, at.reversed, 0) + at.row), sum);
}

// The same for lines of any length: line buffers in global memory, threads that loop over positions
// and channels, nothing copied ahead. A block takes a whole party of channels in one direction.
template <class T> struct AnyLength {
    static constexpr int SIZE = sizeof(T);
    const Arguments& a;
    const Work work;
    const int64 share;  // channels of a group
    const int64 items;  // positions times channels
    const int64 hidden_plane;
    const float scale;

    __device__ AnyLength(const Arguments& a)
        : a(a), work(a, SIZE, blockIdx.x / 4, blockIdx.x % 4, a.party), share(a.channels / a.groups),
          items(min(a.party, a.channels - work.channel) * work.padded),
          hidden_plane(work.plane(a, SIZE, a.channels)), scale(work.scale(a)) {}

    // The k-th line buffer of this block, of `per_block`.
    __device__ float* buffer(int64 k, int64 per_block) const {
        return a.buffers + (blockIdx.x * per_block + k) * max(Work::pad(a.height, SIZE), Work::pad(a.width, SIZE)) * a.party;
    }
    template <class U> __device__ static float read(const char* data, int64 index) {
        float value[1];
        Vector<U, 1>::load(data + index * sizeof(U), value);
        return value[0];
    }
    template <class U> __device__ static void write(char* data, int64 index, float value) {
        const float one[1] = {value};
        Vector<U, 1>::store(data + index * sizeof(U), one);
    }
    __device__ int64 at(const Lines& lines, int64 i, int64 row, int64 j) const {
        return work.image * lines.image + work.line(i) * lines.line + row * lines.row + j;
    }
    __device__ float input(const Lines& lines, int64 i, int64 row, int64 j) const {
        return read<T>(lines.data, at(lines, i, row, j));
    }
    __device__ int64 in_plane(int64 i, int64 channel, int64 j) const {
        return hidden_plane + (work.line(i) * a.channels + work.channel + channel) * work.padded + j;
    }
    __device__ int64 logits_row(int64 channel) const {
        return (a.skip ? 7 : 5) * a.channels + 3 * (work.reversed * a.groups + (work.channel + channel) / share);
    }
    __device__ Weights weights(int64 i, int64 channel, int64 j, float (&slope)[3]) const {
        const Lines& lines = a.inputs[work.axis];
        const int64 row = logits_row(channel);
        return propagation_weights(input(lines, i, row, j), input(lines, i, row + 1, j),
                                   input(lines, i, row + 2, j), j == 0, j == work.length - 1, slope);
    }
    __device__ bool restarts(int64 i) const { return a.chunk_size ? i % a.chunk_size == 0 : i == 0; }
};

template <class T> __global__ void __launch_bounds__(512, 1) scan_forward_any_length(const Arguments a) {
    const AnyLength<T> scan(a);
    const Work& work = scan.work;
    const Lines& lines = a.inputs[work.axis];
    const bool gates = a.result != nullptr;
    for (int64 i = 0; i < work.lines; ++i) {
        const float* before = scan.buffer((i + 1) & 1, 2);
        float* now = scan.buffer(i & 1, 2);
        for (int64 item = threadIdx.x; item < scan.items; item += blockDim.x) {
            const int64 channel = item / work.padded, j = item % work.padded;
            const float x = scan.input(lines, i, work.x_row() + channel, j);
            float h = scan.input(lines, i, work.lam_row(a) + channel, j) * x * scan.scale;
            if (j >= work.length) h = 0.f;
            else if (!scan.restarts(i)) {
                float slope[3];
                const Weights w = scan.weights(i, channel, j, slope);
                if (j > 0) h += w.left * before[item - 1];
                h += w.center * before[item];
                if (j < work.length - 1) h += w.right * before[item + 1];
            }
            now[item] = h;
            const int64 at = scan.in_plane(i, channel, j);
            if (a.hidden != nullptr) a.hidden[at] = h;
            if (gates) {
                float y = scan.input(lines, i, work.u_row(a) + channel, j) * h;
                if (a.skip) y += scan.input(lines, i, work.skip_row(a) + channel, j) * x;
                scan.template write<T>(a.partial, at, y);
            }
        }
        __syncthreads();
    }
    if (gates) merge_maps<T, 1>(a, work, blockIdx.x % 4, 4);
}

template <class T> __global__ void __launch_bounds__(512, 1) scan_backward_any_length(const Arguments a) {
    const AnyLength<T> scan(a);
    const Work& work = scan.work;
    const Lines &lines = a.inputs[work.axis], &grads = a.grads[work.axis];
    const int64 tap_rows = 3 * a.groups;
    const int64 all = 2 * a.batch * tap_rows *
        (a.height * Work::pad(a.width, sizeof(T)) + a.width * Work::pad(a.height, sizeof(T)));
    for (int64 i = work.lines - 1; i >= 0; --i) {
        const bool restart = scan.restarts(i), carries = i + 1 < work.lines;
        const int64 now = (i & 1) * 3, before = 3 - now;
        for (int64 item = threadIdx.x; item < scan.items; item += blockDim.x) {
            const int64 channel = item / work.padded, j = item % work.padded;
            const bool first = j == 0, last = j >= work.length - 1;
            const int64 at = scan.in_plane(i, channel, j);
            const float x = scan.input(lines, i, work.x_row() + channel, j);
            const float lam = scan.input(lines, i, work.lam_row(a) + channel, j);
            const float dy = scan.input(a.grad_y[work.axis], i, work.x_row() + channel, j);
            float g = scan.input(lines, i, work.u_row(a) + channel, j) * dy;
            if (carries) {
                if (!first) g += scan.buffer(before + 2, 6)[item - 1];
                g += scan.buffer(before + 1, 6)[item];
                if (!last) g += scan.buffer(before, 6)[item + 1];
            }
            if (j >= work.length) g = 0.f;
            float slope[3], grad[3] = {};
            const Weights w = scan.weights(i, channel, j, slope);
            scan.buffer(now, 6)[item] = restart ? 0.f : w.left * g;
            scan.buffer(now + 1, 6)[item] = restart ? 0.f : w.center * g;
            scan.buffer(now + 2, 6)[item] = restart || last ? 0.f : w.right * g;
            if (!restart && j < work.length) {
                float h[3] = {};
                for (int k = 0; k < 3; ++k)
                    if ((k > 0 || !first) && (k < 2 || !last))
                        h[k] = a.hidden[scan.in_plane(i - 1, channel, j + k - 1)];
                const float grad_w[3] = {g * h[0], g * h[1], g * h[2]};
                weights_backward(w, slope, grad_w, grad);
            }
            const int64 part = (work.channel + channel) % scan.share;
            for (int k = 0; k < 3; ++k) {
                if (a.shares == nullptr) {
                    scan.template write<T>(grads.data, scan.at(grads, i, scan.logits_row(channel) + k, j), grad[k]);
                } else {
                    const int64 row = work.line(i) * tap_rows + (work.channel + channel) / scan.share * 3 + k;
                    a.shares[part * all + work.plane(a, sizeof(T), tap_rows) + row * work.padded + j] = grad[k];
                }
            }
            const float h = a.hidden[at];
            g *= scan.scale;
            scan.template write<T>(grads.data, scan.at(grads, i, work.lam_row(a) + channel, j), g * x);
            scan.template write<T>(grads.data, scan.at(grads, i, work.u_row(a) + channel, j), dy * h);
            float dx = g * lam;
            if (a.skip) {
                dx += dy * scan.input(lines, i, work.skip_row(a) + channel, j);
                scan.template write<T>(grads.data, scan.at(grads, i, work.skip_row(a) + channel, j), dy * x);
            }
            scan.template write<T>(a.partial, at, dx);
        }
        __syncthreads();
    }
    merge_lines<T>(a, work, blockIdx.x % 4, 4);
}
