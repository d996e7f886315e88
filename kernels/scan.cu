// The GSPN-2 scan (arXiv 2512.07884, section 3): four directions, all images and channels in one
// launch, and its gradient. A block walks over the lines of one direction; a thread owns V
// neighbouring channels of one position:
//
//     threads of a block       position j          j + 1         ...
//                              | c0 | c1 |         | c0 | c1 |        here 2 vectors of V channels
//     ring, shared memory      stage 0: x, lam, u, skip, logits of line i        one slot a thread,
//                              stage 1:                        of line i + 1     filled by itself
//                              ...
//     line buffer, shared      h of line i - 1, read by the neighbours; two of them, in turn
//
// Every thread copies what it needs itself, several lines ahead, so a line costs one barrier: the
// one between writing h of line i and reading it as a neighbour for line i + 1. Blocks of a cluster
// share a line and send the ends of their segments into one another's line buffers.

#if __CUDA_ARCH__ >= 900
#define CLUSTER_DIMS(blocks) __cluster_dims__(blocks, 1, 1)
#else
#define CLUSTER_DIMS(blocks)
#endif

// A walk of one thread over the lines of one tensor, in either order.
struct Walk {
    char* at;
    int64 step;

    // `inner` elements past the position; from the first line on, or back from the last.
    __device__ Walk(const View& view, const Work& work, int64 j, int64 inner, int size, bool back) {
        const int64 begin = work.offset(view, back ? work.lines - 1 : 0, j);
        const int64 stride = work.horizontal ? view.column : view.row;
        at = view.data + (begin + inner) * size;
        step = (work.reversed != back ? -stride : stride) * size;
        keep(at), keep(step);
    }
    __device__ __forceinline__ void advance() {
        asm("add.s64 %0, %0, %1;" : "+l"(at) : "l"(step));
        __builtin_assume(__isGlobal(at));  // which the compiler cannot see past the addition
    }
};

// One thread's slot in a stage of the ring: PLANES vectors, then the logits.
template <class T, int V, bool PER_CHANNEL, int PLANES> struct Slot {
    static constexpr int VECTOR = V * sizeof(T);
    // Three logits of 16 bits may begin in the middle of a 4-byte word: two words hold them.
    static constexpr int WORDS = sizeof(T) == 4 ? 3 : 2;
    static constexpr int LOGITS = PLANES * VECTOR;
    static constexpr int ROW = 4 * sizeof(T);  // of logits that are padded to four
    static constexpr int USED = LOGITS + (PER_CHANNEL ? 3 * VECTOR : ROW);
    // An odd multiple of a vector: slots of neighbouring threads then lie in different banks.
    static constexpr int BYTES = ((USED + VECTOR - 1) / VECTOR | 1) * VECTOR;

    static __device__ __forceinline__ void copy(char* slot, int plane, Walk& from) {
        copy_async<VECTOR>(slot + plane * VECTOR, from.at);
        from.advance();
    }
    static __device__ __forceinline__ void copy_logits(char* slot, Walk& from, bool padded) {
        if constexpr (PER_CHANNEL) {
#pragma unroll
            for (int part = 0; part < 3; ++part)
                copy_async<VECTOR>(slot + LOGITS + part * VECTOR, from.at + part * VECTOR);
        } else if (padded && VECTOR >= ROW) {
            copy_async<ROW>(slot + LOGITS, from.at);
        } else {
            const char* words = from.at - (reinterpret_cast<unsigned long long>(from.at) & 3);
#pragma unroll
            for (int k = 0; k < WORDS; ++k) copy_async<4>(slot + LOGITS + 4 * k, words + 4 * k);
        }
        from.advance();
    }
    static __device__ __forceinline__ void load(const char* slot, int plane, float (&to)[V]) {
        Channels<T, V>::load(slot + plane * VECTOR, to);
    }
    // Logits of the thread's weight groups, three for each; `shift`: 16 where they began in mid-word.
    template <int GROUPS>
    static __device__ __forceinline__ void
    load_logits(const char* slot, int shift, float (&to)[3 * GROUPS]) {
        if constexpr (PER_CHANNEL) {
#pragma unroll
            for (int part = 0; part < 3; ++part) {
                float some[V];
                load(slot, PLANES + part, some);
#pragma unroll
                for (int v = 0; v < V; ++v) to[part * V + v] = some[v];
            }
        } else if constexpr (sizeof(T) == 4) {
#pragma unroll
            for (int k = 0; k < 3; ++k) to[k] = reinterpret_cast<const float*>(slot + LOGITS)[k];
        } else {
            const unsigned* words = reinterpret_cast<const unsigned*>(slot + LOGITS);
            const unsigned low = words[0], high = words[1];
            float unused;
            unpack_word(T(), __funnelshift_r(low, high, shift), to[0], to[1]);
            unpack_word(T(), high >> shift, to[2], unused);
        }
    }
};

// The stage of the ring that the line at hand is in, in bytes from the first.
struct Stage {
    int bytes, end, at;

    __device__ Stage(int bytes, int count) : bytes(bytes), end(bytes * count), at(0) { keep(this->bytes); }
    __device__ __forceinline__ void advance() { at = at + bytes == end ? 0 : at + bytes; }
};

// Where a thread of a ring kernel stands. Threads past the end of the segment or of the channels
// repeat the work of the last one that has some, and write nothing.
struct Place {
    int64 j, channel;
    int slot;        // in a line buffer, which begins one position before the segment
    int writes;      // is not such a repetition
    int first, last; // position of the line: no left, no right neighbour
    int opens, closes;  // writes an end of the segment that has a neighbour in another block
    int speaks;      // first of the threads of its position
    int line_bytes;  // of what all threads of a position pass on

    __device__ Place(const Arguments& a, const Work& work, int vectors, int vector_size) {
        const int64 begin = work.segment * a.segment;
        const int positions = max(min(a.segment, work.length - begin), int64(1));
        const int channels = min(a.chunk, a.channels - work.chunk * a.chunk);
        const int position = threadIdx.x / vectors, vector = threadIdx.x % vectors;
        const int own_position = min(position, positions - 1);
        const int own_vector = min(vector, channels / vector_size - 1);
        const bool idle = begin >= work.length;  // the line is shorter than the segments before
        j = idle ? work.length - 1 : begin + own_position;
        channel = work.chunk * a.chunk + own_vector * vector_size;
        slot = (own_position + 1) * vectors + own_vector;
        writes = !idle && own_position == position && own_vector == vector;
        first = j == 0;
        last = j == work.length - 1;
        opens = writes && position == 0 && !first;
        closes = writes && position == a.segment - 1 && !last;
        speaks = vector == 0;
        line_bytes = channels * sizeof(float);
        keep(slot), keep(writes), keep(first), keep(last), keep(opens), keep(closes);
    }
};

// What a segment's ends get from the blocks beside it, line by line. Two receipts for each side, in
// turn: a block sends line i + 2 only after it got line i + 1, which was sent after line i was read.
template <int CLUSTER> struct Mail {
    Receipt* receipts;  // [side][turn], side 0 is the left one

    __device__ __forceinline__ void init() const {
        if (CLUSTER > 1 && threadIdx.x < 4) receipts[threadIdx.x].init();
    }
    __device__ __forceinline__ Receipt* from_left(int i) const { return receipts + (i & 1); }
    __device__ __forceinline__ Receipt* from_right(int i) const { return receipts + 2 + (i & 1); }

    // Called by all: the ends of the segment wait for line i of the blocks beside it.
    __device__ __forceinline__ void wait(const Place& place, int i) const {
        if constexpr (CLUSTER > 1) {
            if (place.opens) receive(from_left(i), place, i);
            if (place.closes) receive(from_right(i), place, i);
        }
    }

  private:
    __device__ __forceinline__ void receive(Receipt* receipt, const Place& place, int i) const {
        if (place.speaks) receipt->expect(place.line_bytes);
        receipt->wait((i >> 1) & 1);
    }
};

// Views of the workspaces, [B, 4, N, P] and [B, N, P], in the terms of the inputs.
__device__ __forceinline__ View plane_view(const Arguments& a, void* data) {
    const int64 plane = a.height * a.width * a.channels;
    return {static_cast<char*>(data), 4 * plane, plane, a.width * a.channels, a.channels};
}
__device__ __forceinline__ View token_view(const Arguments& a, void* data) {
    const int64 plane = a.height * a.width * a.channels;
    return {static_cast<char*>(data), plane, 0, a.width * a.channels, a.channels};
}

// How far logits in 16-bit words begin past a 4-byte word, in bits, on line after line.
struct WordShift {
    int now, change;

    __device__ WordShift(const Walk& logits)
        : now((reinterpret_cast<unsigned long long>(logits.at) & 2) * 8), change((logits.step & 2) * 8) {
        keep(now), keep(change);
    }
    __device__ __forceinline__ void advance() { now ^= change; }
};

template <class T, int V, bool PER_CHANNEL, int STAGES, int CLUSTER, int THREADS>
__global__ void __launch_bounds__(THREADS, 1) CLUSTER_DIMS(CLUSTER) scan_forward(const Arguments a) {
    constexpr int GROUPS = PER_CHANNEL ? V : 1;
    constexpr int SIZE = sizeof(T);
    enum { X, LAM, U, SKIP, PLANES };
    typedef Slot<T, V, PER_CHANNEL, PLANES> Own;
    const Work work(a, CLUSTER);
    const int vectors = a.chunk / V;
    const Place place(a, work, vectors, V);
    const bool skips = a.skip.data != nullptr, gates = a.partial != nullptr;
    const bool keeps = a.hidden != nullptr, padded = a.padded;

    Stage stage(Own::BYTES * int(blockDim.x), STAGES);
    int own = threadIdx.x * Own::BYTES;
    keep(own);
    const LineBuffer<V> line(stage.end, int(a.segment + 2) * vectors, place.slot, vectors);
    line.clear();  // neighbours that do not exist are read too, and weighted by zero
    __shared__ Receipt receipts[4];
    const Mail<CLUSTER> mail{receipts};
    mail.init();

    Walk x(a.x, work, place.j, place.channel, SIZE, false);
    Walk lam(a.lam, work, place.j, place.channel, SIZE, false);
    Walk u(a.u, work, place.j, place.channel, SIZE, false);
    Walk skip(a.skip, work, place.j, place.channel, SIZE, false);
    const int64 group = place.channel / (a.channels / a.groups);
    Walk logits(a.logits, work, place.j, a.group_stride * group, SIZE, false);
    Walk partial(plane_view(a, a.partial), work, place.j, place.channel, SIZE, false);
    Walk hidden(plane_view(a, a.hidden), work, place.j, place.channel, sizeof(float), false);
    WordShift shift(logits);

    auto copy_line = [&](int i, char* slot) {
        if (i < work.lines) {
            Own::copy(slot, X, x);
            Own::copy(slot, LAM, lam);
            if (gates) Own::copy(slot, U, u);
            if (skips) Own::copy(slot, SKIP, skip);
            Own::copy_logits(slot, logits, padded);
        }
        commit_copies();
    };

    // What line i needs, ready before line i - 1 is done: b = lam x, and skip x.
    float h[V] = {}, b[V], direct[V] = {};
    Weights w[GROUPS];
    auto prepare = [&](const char* slot) {
        wait_copies<STAGES - 2>();
        float value[V], gate[V], taps[3 * GROUPS], unused[3];
        Own::load(slot, X, value);
        Own::load(slot, LAM, gate);
#pragma unroll
        for (int v = 0; v < V; ++v) b[v] = gate[v] * value[v];
        if (skips) {
            Own::load(slot, SKIP, gate);
#pragma unroll
            for (int v = 0; v < V; ++v) direct[v] = gate[v] * value[v];
        }
        Own::template load_logits<GROUPS>(slot, shift.now, taps);
        shift.advance();
#pragma unroll
        for (int g = 0; g < GROUPS; ++g)
            w[g] = propagation_weights(taps[3 * g], taps[3 * g + 1], taps[3 * g + 2], place.first,
                                       place.last, unused);
    };

#pragma unroll 1
    for (int s = 0; s < STAGES; ++s) copy_line(s, shared_at(own + s * stage.bytes));
    prepare(shared_at(own));
    cluster_barrier<CLUSTER>();

    const int chunk_size = a.chunk_size ? a.chunk_size : work.lines;
    int until_restart = 0;
    float left[V] = {}, right[V] = {};
#pragma unroll 1
    for (int i = 0; i < work.lines; ++i) {
        const int turn = i & 1;
        if (until_restart == 0) {
            until_restart = chunk_size;
#pragma unroll
            for (int v = 0; v < V; ++v) h[v] = b[v];
        } else {
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const Weights& k = w[PER_CHANNEL ? v : 0];
                h[v] = k.left * left[v] + (k.right * right[v] + (k.center * h[v] + b[v]));
            }
        }
        --until_restart;
        if (place.writes) line.write(turn, h);
        if (CLUSTER > 1 && i + 1 < work.lines) {
            const int segment = a.segment;
            if (place.opens) line.send(turn, segment, mail.from_right(i), work.segment - 1, h);
            if (place.closes) line.send(turn, -segment, mail.from_left(i), work.segment + 1, h);
        }
        __syncthreads();

        if (i + 1 < work.lines) mail.wait(place, i);
        line.read(turn, -1, left);
        line.read(turn, 1, right);
        char* const slot = shared_at(own + stage.at);
        if (gates) {
            float y[V];
            Own::load(slot, U, y);
#pragma unroll
            for (int v = 0; v < V; ++v) y[v] = y[v] * h[v] + direct[v];
            if (place.writes) Channels<T, V>::store(partial.at, y);
            partial.advance();
        }
        if (keeps) {
            if (place.writes) Channels<float, V>::store(hidden.at, h);
            hidden.advance();
        }
        stage.advance();
        prepare(shared_at(own + stage.at));
        copy_line(i + STAGES, slot);
    }
    if (a.result != nullptr) merge_directions<T, V>(a, work, CLUSTER, vectors);
}

// The gradient is a scan over the lines in reverse. With g the gradient of h,
//     g_i = u_i grad_y_i + A_(i+1)^T g_(i+1),
// and position j gets from its neighbours on line i + 1 what they read from it there:
//     w_left[i+1, j+1] g[i+1, j+1]   and   w_right[i+1, j-1] g[i+1, j-1].
// At visit v the block stands on line lines - 1 - v; the ring's stage holds h of the line before.
template <class T, int V, bool PER_CHANNEL, int STAGES, int CLUSTER, int THREADS>
__global__ void __launch_bounds__(THREADS, 1) CLUSTER_DIMS(CLUSTER) scan_backward(const Arguments a) {
    constexpr int GROUPS = PER_CHANNEL ? V : 1;
    constexpr int SIZE = sizeof(T), HIDDEN = V * sizeof(float);
    enum { X, LAM, U, SKIP, GRAD_Y, PLANES };
    typedef Slot<T, V, PER_CHANNEL, PLANES> Own;
    const Work work(a, CLUSTER);
    const int vectors = a.chunk / V;
    const Place place(a, work, vectors, V);
    const bool skips = a.skip.data != nullptr, padded = a.padded;

    Stage stage(Own::BYTES * int(blockDim.x), STAGES);
    int own = threadIdx.x * Own::BYTES;
    keep(own);
    const int slots = int(a.segment + 2) * vectors;
    Stage hidden_stage(slots * HIDDEN, STAGES);  // read by neighbours too, so it has their slots
    int own_hidden = stage.end + place.slot * HIDDEN, beside = vectors * HIDDEN;
    keep(own_hidden), keep(beside);
    const LineBuffer<V> to_left(stage.end + hidden_stage.end, slots, place.slot, vectors);
    const LineBuffer<V> to_right(to_left.data + to_left.bytes(slots), slots, place.slot, vectors);
    // Neighbours that do not exist are read too, and weighted by zero.
    to_left.clear(), to_right.clear();
    for (int k = threadIdx.x; k < hidden_stage.end / 4; k += blockDim.x)
        *reinterpret_cast<float*>(shared_at(stage.end + 4 * k)) = 0.f;
    __shared__ Receipt receipts[4];
    const Mail<CLUSTER> mail{receipts};
    mail.init();
    __syncthreads();  // the zeros stand before the first copies overwrite them

    const int64 share = a.channels / a.groups, group = place.channel / share;
    Walk x(a.x, work, place.j, place.channel, SIZE, true);
    Walk lam(a.lam, work, place.j, place.channel, SIZE, true);
    Walk u(a.u, work, place.j, place.channel, SIZE, true);
    Walk skip(a.skip, work, place.j, place.channel, SIZE, true);
    Walk logits(a.logits, work, place.j, a.group_stride * group, SIZE, true);
    Walk grad_y(token_view(a, a.grad_result), work, place.j, place.channel, SIZE, true);
    const View hidden_view = plane_view(a, a.hidden);
    const int64 neighbour = (work.horizontal ? hidden_view.row : hidden_view.column) * sizeof(float);
    Walk hidden(hidden_view, work, place.j, place.channel, sizeof(float), true);
    Walk grad_x(plane_view(a, a.partial), work, place.j, place.channel, SIZE, true);
    Walk grad_lam(a.grad_lam, work, place.j, place.channel, SIZE, true);
    Walk grad_u(a.grad_u, work, place.j, place.channel, SIZE, true);
    Walk grad_skip(a.grad_skip, work, place.j, place.channel, SIZE, true);
    WordShift shift(logits);

    // Lanes side by side whose channels share a group add up their gradients of its logits; what
    // is left of the sum over the group are shares, added later.
    const int lanes = a.lanes;
    const bool sums_up = place.writes && threadIdx.x % lanes == 0, shared = a.shares != nullptr;
    const int64 part = place.channel % share / (V * lanes);
    const View shares_view = {reinterpret_cast<char*>(a.shares),
                              4 * work.tokens * a.groups * 3, work.tokens * a.groups * 3,
                              a.width * a.groups * 3, a.groups * 3};
    const int64 first_share = part * a.batch * shares_view.batch + 3 * group;
    Walk grad_logits = shared
        ? Walk(shares_view, work, place.j, first_share, sizeof(float), true)
        : Walk(a.grad_logits, work, place.j, a.group_stride * group, SIZE, true);

    float h[V];
    Channels<float, V>::load(hidden.at, h);
    hidden.advance();

    auto copy_line = [&](int visit, int at, int hidden_at) {
        if (visit < work.lines) {
            char* const slot = shared_at(own + at);
            Own::copy(slot, X, x);
            Own::copy(slot, LAM, lam);
            Own::copy(slot, U, u);
            if (skips) Own::copy(slot, SKIP, skip);
            Own::copy(slot, GRAD_Y, grad_y);
            Own::copy_logits(slot, logits, padded);
            if (visit + 1 < work.lines) {
                char* const to = shared_at(own_hidden + hidden_at);
                if (place.writes) copy_async<HIDDEN>(to, hidden.at);
                if (CLUSTER > 1 && place.opens)
                    copy_async<HIDDEN>(to - beside, hidden.at - neighbour);
                if (CLUSTER > 1 && place.closes)
                    copy_async<HIDDEN>(to + beside, hidden.at + neighbour);
                hidden.advance();
            }
        }
        commit_copies();
    };

    Weights w[GROUPS];
    float slope[GROUPS][3];
    auto prepare = [&]() {
        wait_copies<STAGES - 2>();
        float taps[3 * GROUPS];
        Own::template load_logits<GROUPS>(shared_at(own + stage.at), shift.now, taps);
        shift.advance();
#pragma unroll
        for (int g = 0; g < GROUPS; ++g)
            w[g] = propagation_weights(taps[3 * g], taps[3 * g + 1], taps[3 * g + 2], place.first,
                                       place.last, slope[g]);
    };

#pragma unroll 1
    for (int s = 0; s < STAGES - 1; ++s) copy_line(s, s * stage.bytes, s * hidden_stage.bytes);
    int copied = (STAGES - 1) * stage.bytes, hidden_copied = (STAGES - 1) * hidden_stage.bytes;
    prepare();
    cluster_barrier<CLUSTER>();

    const int64 last_line = work.lines - 1;
    int since_restart = a.chunk_size ? last_line % a.chunk_size : last_line;
    float carry[V] = {};
#pragma unroll 1
    for (int visit = 0; visit < work.lines; ++visit) {
        const int turn = visit & 1;
        const bool restart = since_restart == 0;
        since_restart = (restart ? int(a.chunk_size) : since_restart) - 1;
        const char* const slot = shared_at(own + stage.at);
        const char* const h_slot = shared_at(own_hidden + hidden_stage.at);
        // Into the stage of the last visit, which no neighbour reads any more.
        copy_line(visit + STAGES - 1, copied, hidden_copied);
        copied = stage.at, hidden_copied = hidden_stage.at;

        if (visit > 0) mail.wait(place, visit - 1);
        float g[V], dy[V], gate[V], left[V], right[V], sums[3 * GROUPS] = {};
        to_right.read(turn ^ 1, -1, left);
        to_left.read(turn ^ 1, 1, right);
        Own::load(slot, GRAD_Y, dy);
        Own::load(slot, U, gate);
#pragma unroll
        for (int v = 0; v < V; ++v) {
            const Weights& k = w[PER_CHANNEL ? v : 0];
            g[v] = gate[v] * dy[v] + (carry[v] + (left[v] + right[v]));
            left[v] = restart ? 0.f : k.left * g[v];
            right[v] = restart ? 0.f : k.right * g[v];
            carry[v] = restart ? 0.f : k.center * g[v];
        }
        if (place.writes) to_left.write(turn, left), to_right.write(turn, right);
        if (CLUSTER > 1 && visit + 1 < work.lines) {
            const int segment = a.segment, rank = work.segment;
            if (place.opens) to_left.send(turn, segment, mail.from_right(visit), rank - 1, left);
            if (place.closes) to_right.send(turn, -segment, mail.from_left(visit), rank + 1, right);
        }

        if (!restart) {
            float h_left[V], h_center[V], h_right[V];
            Channels<float, V>::load(h_slot - beside, h_left);
            Channels<float, V>::load(h_slot, h_center);
            Channels<float, V>::load(h_slot + beside, h_right);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                const int tap = PER_CHANNEL ? 3 * v : 0;
                sums[tap] += g[v] * h_left[v];
                sums[tap + 1] += g[v] * h_center[v];
                sums[tap + 2] += g[v] * h_right[v];
            }
        }
        if constexpr (PER_CHANNEL) {
#pragma unroll
            for (int v = 0; v < V; ++v) weights_backward(w[v], slope[v], sums + 3 * v, sums + 3 * v);
            if (place.writes) {
#pragma unroll
                for (int third = 0; third < 3; ++third) {
                    float some[V];
#pragma unroll
                    for (int v = 0; v < V; ++v) some[v] = sums[third * V + v];
                    Channels<T, V>::store(grad_logits.at + third * V * SIZE, some);
                }
            }
        } else {
            for (int offset = lanes / 2; offset > 0; offset /= 2)
#pragma unroll
                for (int k = 0; k < 3; ++k)
                    sums[k] += __shfl_down_sync(~0u, place.writes ? sums[k] : 0.f, offset);
            weights_backward(w[0], slope[0], sums, sums);
            if (sums_up) {
#pragma unroll
                for (int k = 0; k < 3; ++k) {
                    const float one[1] = {sums[k]};
                    if (shared) Channels<float, 1>::store(grad_logits.at + k * sizeof(float), one);
                    else Channels<T, 1>::store(grad_logits.at + k * SIZE, one);
                }
            }
        }
        grad_logits.advance();

        float value[V], out[V];
        Own::load(slot, X, value);
        Own::load(slot, LAM, gate);
#pragma unroll
        for (int v = 0; v < V; ++v) out[v] = g[v] * value[v];
        if (place.writes) Channels<T, V>::store(grad_lam.at, out);
#pragma unroll
        for (int v = 0; v < V; ++v) out[v] = dy[v] * h[v];
        if (place.writes) Channels<T, V>::store(grad_u.at, out);
#pragma unroll
        for (int v = 0; v < V; ++v) out[v] = g[v] * gate[v];
        if (skips) {
            Own::load(slot, SKIP, gate);
#pragma unroll
            for (int v = 0; v < V; ++v) {
                out[v] += dy[v] * gate[v];
                value[v] *= dy[v];
            }
            if (place.writes) Channels<T, V>::store(grad_skip.at, value);
        }
        if (place.writes) Channels<T, V>::store(grad_x.at, out);
        grad_lam.advance(), grad_u.advance(), grad_skip.advance(), grad_x.advance();
        Channels<float, V>::load(h_slot, h);
        stage.advance(), hidden_stage.advance();
        prepare();
        __syncthreads();
    }
    merge_directions<T, V>(a, work, CLUSTER, vectors);
}

// The same for lines of any length and any number of channels: the line buffers lie in global
// memory, threads loop over positions, nothing is copied ahead. A block takes `chunk`
// channels.
template <class T> struct AnyLength {
    const Arguments& a;
    const Work work;
    const int64 share, first_channel, count, items;  // channels of a group; channels, values of a line

    __device__ AnyLength(const Arguments& a)
        : a(a), work(a, 1), share(a.channels / a.groups),
          first_channel(work.chunk * a.chunk),
          count(min(a.chunk, a.channels - first_channel)), items(work.length * count) {}

    // The k-th line buffer of this block, of `per_block`.
    __device__ float* buffer(int64 k, int64 per_block) const {
        return a.lines + (blockIdx.x * per_block + k) * max(a.height, a.width) * a.chunk;
    }
    template <class U> __device__ static float read(const char* data, int64 index) {
        float value[1];
        Channels<U, 1>::load(data + index * sizeof(U), value);
        return value[0];
    }
    template <class U> __device__ static void write(char* data, int64 index, float value) {
        const float one[1] = {value};
        Channels<U, 1>::store(data + index * sizeof(U), one);
    }
    __device__ float input(const View& view, int64 i, int64 j, int64 inner) const {
        return read<T>(view.data, work.offset(view, i, j) + inner);
    }
    __device__ int64 in_plane(int64 i, int64 j, int64 channel) const {
        return work.plane(a) + work.token(a, i, j) * a.channels + channel;
    }
    __device__ Weights weights(int64 i, int64 j, int64 channel, float (&slope)[3]) const {
        const int64 row = channel / share * a.group_stride;
        return propagation_weights(
            input(a.logits, i, j, row), input(a.logits, i, j, row + 1),
            input(a.logits, i, j, row + 2), j == 0, j == work.length - 1, slope);
    }
    __device__ bool restarts(int64 i) const { return a.chunk_size ? i % a.chunk_size == 0 : i == 0; }
};

template <class T> __global__ void __launch_bounds__(512, 1) scan_forward_any_length(const Arguments a) {
    const AnyLength<T> scan(a);
    const Work& work = scan.work;
    for (int64 i = 0; i < work.lines; ++i) {
        const float* before = scan.buffer((i + 1) & 1, 2);
        float* now = scan.buffer(i & 1, 2);
        for (int64 item = threadIdx.x; item < scan.items; item += blockDim.x) {
            const int64 j = item / scan.count, channel = scan.first_channel + item % scan.count;
            const float x = scan.input(a.x, i, j, channel);
            float h = scan.input(a.lam, i, j, channel) * x;
            if (!scan.restarts(i)) {
                float slope[3];
                const Weights w = scan.weights(i, j, channel, slope);
                if (j > 0) h += w.left * before[item - scan.count];
                h += w.center * before[item];
                if (j < work.length - 1) h += w.right * before[item + scan.count];
            }
            now[item] = h;
            const int64 at = scan.in_plane(i, j, channel);
            if (a.hidden != nullptr) a.hidden[at] = h;
            if (a.partial != nullptr) {
                float y = scan.input(a.u, i, j, channel) * h;
                if (a.skip.data != nullptr) y += scan.input(a.skip, i, j, channel) * x;
                scan.template write<T>(a.partial, at, y);
            }
        }
        __syncthreads();
    }
    if (a.result != nullptr) merge_directions<T, 1>(a, work, 1, a.chunk);
}

template <class T> __global__ void __launch_bounds__(512, 1) scan_backward_any_length(const Arguments a) {
    const AnyLength<T> scan(a);
    const Work& work = scan.work;
    for (int64 i = work.lines - 1; i >= 0; --i) {
        const bool restart = scan.restarts(i);
        const bool carries = i + 1 < work.lines;
        const int64 now = (i & 1) * 3, before = 3 - now;
        for (int64 item = threadIdx.x; item < scan.items; item += blockDim.x) {
            const int64 j = item / scan.count, channel = scan.first_channel + item % scan.count;
            const bool first = j == 0, last = j == work.length - 1;
            const int64 at = scan.in_plane(i, j, channel);
            const int64 token = work.image * work.tokens + work.token(a, i, j);
            const float x = scan.input(a.x, i, j, channel), lam = scan.input(a.lam, i, j, channel);
            const float dy = scan.template read<T>(a.grad_result, token * a.channels + channel);
            float g = scan.input(a.u, i, j, channel) * dy;
            if (carries) {
                if (!first) g += scan.buffer(before + 2, 6)[item - scan.count];
                g += scan.buffer(before + 1, 6)[item];
                if (!last) g += scan.buffer(before, 6)[item + scan.count];
            }
            float slope[3], grad[3] = {};
            const Weights w = scan.weights(i, j, channel, slope);
            scan.buffer(now, 6)[item] = restart ? 0.f : w.left * g;
            scan.buffer(now + 1, 6)[item] = restart ? 0.f : w.center * g;
            scan.buffer(now + 2, 6)[item] = restart ? 0.f : w.right * g;
            if (!restart) {
                float h[3] = {};
                for (int k = 0; k < 3; ++k)
                    if ((k > 0 || !first) && (k < 2 || !last))
                        h[k] = a.hidden[scan.in_plane(i - 1, j + k - 1, channel)];
                const float grad_w[3] = {g * h[0], g * h[1], g * h[2]};
                weights_backward(w, slope, grad_w, grad);
            }
            const int64 group = channel / scan.share, part = channel % scan.share;
            for (int k = 0; k < 3; ++k) {
                if (a.shares == nullptr) {
                    const int64 to = work.offset(a.grad_logits, i, j) + a.group_stride * group + k;
                    scan.template write<T>(a.grad_logits.data, to, grad[k]);
                } else {
                    const int64 plane = (part * a.batch + work.image) * 4 + work.direction;
                    a.shares[((plane * work.tokens + work.token(a, i, j)) * a.groups + group) * 3 + k] = grad[k];
                }
            }
            const float h = a.hidden[at];
            scan.template write<T>(a.grad_lam.data, work.offset(a.grad_lam, i, j) + channel, g * x);
            scan.template write<T>(a.grad_u.data, work.offset(a.grad_u, i, j) + channel, dy * h);
            float dx = g * lam;
            if (a.skip.data != nullptr) {
                dx += dy * scan.input(a.skip, i, j, channel);
                scan.template write<T>(a.grad_skip.data, work.offset(a.grad_skip, i, j) + channel, dy * x);
            }
            scan.template write<T>(a.partial, at, dx);
        }
        __syncthreads();
    }
    merge_directions<T, 1>(a, work, 1, a.chunk);
}
