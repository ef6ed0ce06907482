// Gated FFNs and linear layers on a CPU, each in one call: routing, the chosen experts' products and their sum.
//
// Next to a small layer, calls into a framework cost as much as its weights take to read; and a framework's product
// cannot take its rows from wherever the router points. Here threads start once per layer, take blocks of neurons in
// turn, and read every chosen weight once. Bound by cpu.py, compiled by compiling.py.
//
// T tokens, D hidden size, N experts of H neurons, S shared neurons, K experts chosen per token, P = T*K pairs.

#include "experts.h"
#include "routing.h"

// The OpenMP library that torch has loaded, by name: what a compiler makes of pragmas may want a library of its own, and
// two of them in one call corrupt each other. LLVM's library has GNU's names, too.
extern "C" {
int omp_get_thread_num(void);
int omp_get_num_threads(void);
void GOMP_parallel(void (*body)(void *), void *argument, unsigned threads, unsigned flags);
void GOMP_barrier(void);
}

namespace {

enum Fault : int { NO_MEMORY = 1, NO_SUCH_EXPERT = 2 };

constexpr int MIN_BLOCK = 16, BLOCKS_PER_THREAD = 8;  // of neurons, or rows, that a thread takes
constexpr int64_t MAX_SUMS = 1 << 18;  // of all threads, where each sums up its own neurons
// Floats up to which malloc keeps memory for the next call. More is mapped anew, page by page: too slow for small experts.
constexpr int64_t MAX_PACKED = 6 << 20;
constexpr int64_t LARGE_EXPERT = 512;  // neurons
constexpr int64_t FEW_LOGITS = 8192;   // weights of routers so small that a barrier takes longer

// Runs body(me, team) in a team of up to so many threads.
template <class Body> void in_threads(int threads, Body body) {
    auto run = [](void *own) { (*static_cast<Body *>(own))(omp_get_thread_num(), omp_get_num_threads()); };
    GOMP_parallel(run, &body, unsigned(threads), 0);
}

// One allocation for everything that a call needs, each piece on its own cache lines.
class Arena {
  public:
    template <class T> void plan(T **piece, int64_t count) {
        pieces_[used_++] = {reinterpret_cast<void **>(piece), bytes_};
        bytes_ += (int64_t(sizeof(T)) * count + 127) / 64 * 64;
    }
    bool allocate() {
        memory_ = static_cast<char *>(malloc(bytes_ + 64));
        if (!memory_) return false;
        char *start = memory_ + (64 - reinterpret_cast<uintptr_t>(memory_) % 64);
        for (int i = 0; i < used_; i++) *pieces_[i].to = start + pieces_[i].offset;
        return true;
    }
    ~Arena() { free(memory_); }

  private:
    struct Piece { void **to; int64_t offset; } pieces_[18];
    int used_ = 0;
    int64_t bytes_ = 0;
    char *memory_ = nullptr;
};

// How many neurons, or rows, a thread takes at a time: long pieces stream faster, short ones end together.
INLINE int64_t block_of(int64_t total, int threads) {
    const int64_t block = total / (BLOCKS_PER_THREAD * threads) / MIN_BLOCK * MIN_BLOCK;
    return block < MIN_BLOCK ? MIN_BLOCK : block > MAX_BLOCK ? MAX_BLOCK : block;
}

// This thread's share of T tokens, converted and spread.
template <class W>
INLINE void copy_tokens(const W *x, int64_t T, int64_t width, Activations<W> *to, int64_t stride, int me, int team) {
    for (int64_t t = T * me / team; t < T * (me + 1) / team; t++)
        for (int64_t i = 0; i < width; i++) narrow(widen(x[t * width + i]), to + t * stride + i);
}

// One call: what it is about, the memory that it needs, and its steps, each of which all threads take part in.
template <class W> class Call {
    using A = Activations<W>;
    static constexpr bool NARROWS = sizeof(W) != sizeof(float);

  public:
    Call(const Layer &layer, const W *x, int64_t T, const int64_t *given_ids, const float *given_weights, W *y)
        : layer(layer), D(layer.hidden_size), N(layer.num_experts), H(layer.expert_size), S(layer.shared_size),
          K(layer.top_k), T(T), x_in(x), y_out(y), given_ids(given_ids), given_weights(given_weights) {}

    int compute(int threads) {
        if (!allocate(threads)) return NO_MEMORY;
        in_threads(threads, [&](int me, int team) {
            if (copies) {
                copy_tokens<W>(x_in, T, D, x_own, x.stride, me, team);
                GOMP_barrier();
            }
            if (!everyone && (many || given_ids || N * D > FEW_LOGITS)) {
                route(me, team);
                GOMP_barrier();
            }
            if (me == 0) {
                if (routes && !many) route_few();
                if (!unknown) add_parts();
            }
            GOMP_barrier();
            if (packs) {
                pack(me, team);
                GOMP_barrier();
            }
            gate_up(me, team);
            GOMP_barrier();
            if (sums && P + (S ? T : 0) <= FEW_TOKENS * part_count) {
                down_by_neurons(me, team);
                GOMP_barrier();
                add_up(me, team);
            } else {
                down_by_outputs(me, team);
            }
        });
        return unknown ? NO_SUCH_EXPERT : 0;
    }

  private:
    const Layer &layer;
    const int64_t D, N, H, S, K, T, P = T * K, F = S + N * H;
    const W *x_in;
    W *y_out;
    const int64_t *given_ids;
    const float *given_weights;
    const bool everyone = K == N;  // then hidden is [T, F] and one product with all of `down`
    const bool routes = !everyone && K && !given_ids, many = T > MAX_FEW, copies = many || sizeof(A) != sizeof(W);
    const int64_t hidden_stride = everyone ? F : many ? spread<A>(H) : H, shared_stride = everyone ? F : S;
    const int64_t panel_floats = panel_size(D > DEPTH ? D : DEPTH);
    Arena arena;
    Tokens<A> x{reinterpret_cast<const A *>(x_in), many ? spread<A>(D) : D};
    A *x_own, *hidden, *shared_hidden;
    float *logits, *weights, *weight, *panels, *packed, *all_packed, *sums = nullptr, *y;
    int32_t *ids, *token;
    int64_t *starts;
    Part<W> *parts;
    int64_t part_count = 0, total = 0, next = 0;
    bool packs_pairs, packs = false;  // tokens of experts, if they are fewer than neurons; tokens of some part
    bool unknown = false;  // some expert that was asked for

    bool allocate(int threads) {
        const bool sums_fit = layer.down_column_stride != 1 && T * D * threads <= MAX_SUMS;
        arena.plan(&hidden, (everyone ? T : P) * hidden_stride);
        arena.plan(&shared_hidden, everyone ? 0 : T * S);
        arena.plan(&parts, N + 1);
        arena.plan(&logits, routes ? T * N : 0);
        arena.plan(&ids, P), arena.plan(&token, P), arena.plan(&weights, P), arena.plan(&weight, P);
        arena.plan(&starts, N + 2);
        arena.plan(&x_own, copies ? T * x.stride : 0), arena.plan(&y, NARROWS ? T * D : 0);
        arena.plan(&panels, T > FEW_TOKENS ? panel_floats * threads : 0);
        const int64_t most = (P < N * H ? P : N * H) + N * GROUP;  // tokens of all experts that are packed
        packs_pairs = many && !everyone && (H >= LARGE_EXPERT || most * packed_size<A>(D) <= MAX_PACKED);
        arena.plan(&packed, packs_pairs ? most * packed_size<A>(D) : 0);
        arena.plan(&all_packed, many && (everyone || S) ? (T + GROUP) * packed_size<A>(D) : 0);
        if (sums_fit) arena.plan(&sums, T * D * threads);
        if (!arena.allocate()) return false;
        if (copies) x.first = x_own;
        if constexpr (!NARROWS) y = y_out;
        return true;
    }

    void route(int me, int team) {
        if (given_ids) {
            for (int64_t p = P * me / team; p < P * (me + 1) / team; p++) {
                ids[p] = int32_t(given_ids[p]), weights[p] = given_weights[p];
                if (given_ids[p] < 0 || given_ids[p] >= N) __atomic_store_n(&unknown, true, __ATOMIC_RELAXED);
            }
        } else if (K && many) {
            const int64_t start = T * me / team, end = T * (me + 1) / team;
            score_all<W>(layer, x, start, end - start, panels + me * panel_floats, logits + start * N);
            for (int64_t t = start; t < end; t++) choose(layer, logits + t * N, ids + t * K, weights + t * K);
        } else if (K) {
            score_rows<W>(layer, x, 0, T, N * me / team, N * (me + 1) / team, logits);
        }
    }

    // What is left to one thread: a few logits take less time than a barrier after them.
    void route_few() {
        if (N * D <= FEW_LOGITS) score_rows<W>(layer, x, 0, T, 0, N, logits);
        for (int64_t t = 0; t < T; t++) choose(layer, logits + t * N, ids + t * K, weights + t * K);
    }

    void add_part(const void *gate_up, int64_t neurons, int64_t column, int64_t tokens, const int32_t *own,
                  const float *weight_of, A *into, int64_t stride) {
        const W *gate = static_cast<const W *>(gate_up), *up = gate + neurons * D;
        float *panels_of = nullptr;
        const bool fewer = tokens <= (everyone ? F : neurons);  // the smaller matrix is packed
        if (tokens > MAX_FEW && fewer && (packs_pairs || !own)) {
            packs = true;
            panels_of = own ? packed : all_packed;
            if (own) packed += packed_count(tokens) * packed_size<A>(D);
        }
        parts[part_count++] = {gate, up, neurons, column, tokens, own, weight_of, into, stride, total, panels_of};
        total += neurons;
    }

    void add_parts() {
        A *shared = everyone ? hidden : shared_hidden;
        if (S) add_part(layer.shared_gate_up, S, 0, T, nullptr, nullptr, shared, shared_stride);
        if (!everyone) group(layer, P, ids, weights, starts, token, weight);
        for (int64_t e = 0; e < N && K; e++) {
            const void *gate_up = static_cast<const W *>(layer.gate_up) + e * 2 * H * D;
            const int64_t column = S + e * H;
            if (everyone) {
                add_part(gate_up, H, column, T, nullptr, nullptr, hidden + column, hidden_stride);
            } else if (const int64_t start = starts[e], count = starts[e + 1] - start; count) {
                A *into = hidden + start * hidden_stride;
                add_part(gate_up, H, column, count, token + start, weight + start, into, hidden_stride);
            }
        }
    }

    // This thread's share of the panels of tokens; parts that all tokens use have them in common.
    void pack(int me, int team) {
        int64_t turn = 0;
        for (int64_t p = 0; p < part_count; p++) {
            const Part<W> &part = parts[p];
            if (!part.packed || (p && !part.token)) continue;
            const int64_t count = packed_count(part.tokens);
            for (int64_t first = 0; first < count; first += BATCH) {
                const Batch batch(first, count);
                for (int64_t i = 0; i < batch.panels.count; i++) {
                    if (turn++ % team != me) continue;
                    const int64_t start = batch.start(i);
                    const int M = at_most(part.tokens - start, batch.vectors(i) * LANES);
                    const A *tokens[TOKEN_VECTORS * LANES];
                    for (int m = 0; m < M; m++) tokens[m] = x[part.token_at(start + m)];
                    pack_tokens<A>(batch.vectors(i), tokens, M, D, part.packed + start * packed_size<A>(D));
                }
            }
        }
    }

    void gate_up(int me, int team) {
        float *panel = panels + me * panel_floats;
        const int64_t block = block_of(total, team);
        int64_t n = 0, end = 0, p = 0;
        auto take = [&]() -> Piece<W> {  // neurons that no other thread has taken
            if (n == end) {
                n = __atomic_fetch_add(&next, block, __ATOMIC_RELAXED);
                end = n + block < total ? n + block : total;
            }
            if (n >= total) return {};
            while (p + 1 < part_count && parts[p + 1].first_neuron <= n) p++;
            const int64_t first = n - parts[p].first_neuron, left = parts[p].neurons - first;
            const int neurons = at_most(left < end - n ? left : end - n, parts[p].has_few() ? MAX_BLOCK : LANES);
            n += neurons;
            return {&parts[p], first, neurons};
        };
        for (Piece<W> piece = take(), following; piece.neurons; piece = following) {
            following = take();
            if (piece.part->has_few()) gate_up_rows<W>(layer, piece, x);
            else if (piece.part->packed) gate_up_packed<W>(layer, piece, following, x);
            else if (2 * piece.neurons > SINGLE_VECTOR)
                gate_up_panel<W, PANEL_VECTORS>(layer, piece, following, x, panel);
            else gate_up_panel<W, 1>(layer, piece, following, x, panel);
        }
    }

    // With everyone on, the parts are one.
    template <class Use> void each_part_of_down(Use use) {
        if (everyone) use(Part<W>{nullptr, nullptr, F, 0, T, nullptr, nullptr, hidden, F, 0, nullptr});
        else
            for (int64_t p = 0; p < part_count; p++) use(parts[p]);
    }

    // This thread's share of the outputs, in whole vectors.
    void own_outputs(int me, int team, int64_t *from, int64_t *to) const {
        const int64_t vectors = (D + LANES - 1) / LANES, end = vectors * (me + 1) / team * LANES;
        *from = vectors * me / team * LANES, *to = end < D ? end : D;
    }

    // Few tokens wait for memory: every thread reads neurons of its own, from end to end, into sums of its own.
    void down_by_neurons(int me, int team) {
        const int64_t first = total * me / team, last = total * (me + 1) / team;
        float *own = sums + me * T * D;
        memset(own, 0, T * D * sizeof *own);
        each_part_of_down([&](const Part<W> &part) {
            const int64_t start = part.first_neuron, stop = start + part.neurons;
            const int64_t begin = first > start ? first : start, end = last < stop ? last : stop;
            down<W>(layer, part, own, {begin - start, end - begin, 0, D}, panels + me * panel_floats);
        });
    }

    void add_up(int me, int team) {
        int64_t from, to;
        own_outputs(me, team, &from, &to);
        for (int64_t t = 0; t < T; t++)
            for (int64_t d = from; d < to; d++) {
                float sum = 0;
                for (int thread = 0; thread < team; thread++) sum += sums[(thread * T + t) * D + d];
                narrow(sum, y_out + t * D + d);
            }
    }

    // Many tokens wait for arithmetic: every thread owns a range of outputs, so that no two add to the same one.
    void down_by_outputs(int me, int team) {
        int64_t from, to;
        own_outputs(me, team, &from, &to);
        for (int64_t t = 0; t < T && from < to; t++) memset(y + t * D + from, 0, (to - from) * sizeof *y);
        each_part_of_down([&](const Part<W> &part) {
            down<W>(layer, part, y, {0, part.neurons, from, to}, panels + me * panel_floats);
        });
        for (int64_t t = 0; t < T && NARROWS; t++)
            for (int64_t d = from; d < to; d++) narrow(y[t * D + d], y_out + t * D + d);
    }
};

template <class W>
int run_linear(const W *x_in, const W *weight, int64_t row_stride, const W *bias, W *y, int64_t T, int64_t inputs,
               int64_t outputs, int threads) {
    using A = Activations<W>;
    constexpr bool widens = sizeof(A) != sizeof(W);
    A *x_own;
    Arena arena;
    arena.plan(&x_own, widens ? T * inputs : 0);
    if (!arena.allocate()) return NO_MEMORY;
    int64_t next = 0;
    in_threads(threads, [&](int me, int team) {
        const A *x = widens ? x_own : reinterpret_cast<const A *>(x_in);
        if (widens) {
            copy_tokens<W>(x_in, T, inputs, x_own, inputs, me, team);
            GOMP_barrier();
        }
        const int64_t block = block_of(outputs, team);
        for (int64_t start; (start = __atomic_fetch_add(&next, block, __ATOMIC_RELAXED)) < outputs;) {
            const int64_t end = start + block < outputs ? start + block : outputs;
            for (int64_t t = 0; t < T; t += FEW_TOKENS) {
                const int M = at_most(T - t, FEW_TOKENS);
                const A *rows[FEW_TOKENS];
                for (int m = 0; m < M; m++) rows[m] = x + (t + m) * inputs;
                for (int64_t o = start; o < end; o += TILE_ROWS) {
                    const int R = at_most(end - o, TILE_ROWS);
                    const W *w[TILE_ROWS];
                    float out[FEW_TOKENS][TILE_ROWS];
                    for (int r = 0; r < R; r++) w[r] = weight + (o + r) * row_stride;
                    dots_of_rows<W>(R, M, rows, w, inputs, out);
                    for (int m = 0; m < M; m++)
                        for (int r = 0; r < R; r++)
                            narrow(out[m][r] + (bias ? widen(bias[o + r]) : 0.f), y + (t + m) * outputs + o + r);
                }
            }
        }
    });
    return 0;
}

}  // namespace

// Both return 0, or one of the faults above.
extern "C" int factorctl_ffn(const Layer *layer, const void *x, int64_t tokens, const int64_t *ids,
                             const float *weights, void *y, int threads) {
    auto run = [&](auto weight) {
        using W = decltype(weight);
        return Call<W>(*layer, static_cast<const W *>(x), tokens, ids, weights, static_cast<W *>(y)).compute(threads);
    };
    return layer->bfloat16 ? run(Bfloat16()) : run(float());
}

extern "C" int factorctl_linear(const void *x, const void *weight, int64_t row_stride, const void *bias, void *y,
                                int64_t tokens, int64_t inputs, int64_t outputs, int bfloat16, int threads) {
    auto run = [&](auto element) {
        using W = decltype(element);
        return run_linear(static_cast<const W *>(x), static_cast<const W *>(weight), row_stride,
                          static_cast<const W *>(bias), static_cast<W *>(y), tokens, inputs, outputs, threads);
    };
    return bfloat16 ? run(Bfloat16()) : run(float());
}
