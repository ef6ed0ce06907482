// Gated FFNs and linear layers on a CPU, each in one call: routing, the chosen experts' products and their sum.
//
// Next to a small layer, calls into a framework cost as much as its weights take to read; and a framework's product
// cannot take its rows from wherever the router points. Here threads start once per layer, take blocks of neurons in
// turn, and read every chosen weight once. Bound by cpu.py, compiled by compiling.py.
//
// T tokens, D hidden size, N experts of H neurons, S shared neurons, K experts chosen per token, P = T*K pairs.

#include "few_tokens.h"
#include "many_tokens.h"

// The OpenMP library that torch has loaded, by name: what a compiler makes of pragmas may want a library of its own, and
// two of them in one call corrupt each other. LLVM's library has GNU's names, too.
extern "C" {
int omp_get_thread_num(void);
int omp_get_num_threads(void);
void GOMP_parallel(void (*body)(void *), void *argument, unsigned threads, unsigned flags);
void GOMP_barrier(void);
}

struct Layer {
    const void *gate_up;         // [N, 2H, D]; per expert the gate rows, then the up rows
    const void *shared_gate_up;  // [2S, D]
    const void *down;            // [D, S + N*H] with the strides below, one of which is 1
    const void *router;          // [N, D]
    int64_t hidden_size, num_experts, expert_size, shared_size, top_k;
    int64_t down_row_stride, down_column_stride;
    float scale;                 // what the K weights of a token sum to
    int32_t bfloat16, hard_gate, activation;
};

namespace {

enum Fault : int { NO_MEMORY = 1, NO_SUCH_EXPERT = 2 };

constexpr int MIN_BLOCK = 16, MAX_BLOCK = 64, BLOCKS_PER_THREAD = 8;  // of neurons, or rows, that a thread takes
constexpr int MAX_FEW = 2 * FEW_TOKENS;  // tokens that read rows as they lie
constexpr int64_t MAX_SUMS = 1 << 18;    // of all threads, where each sums up its own neurons
constexpr int64_t FEW_LOGITS = 8192;     // weights of routers so small that a barrier takes longer
constexpr int64_t IN_L1 = 1024;          // outputs that few tokens sum up at a time

// Runs body(me, team) in a team of up to so many threads.
template <class Body> void in_threads(int threads, Body body) {
    auto run = [](void *own) { (*static_cast<Body *>(own))(omp_get_thread_num(), omp_get_num_threads()); };
    GOMP_parallel(run, &body, unsigned(threads), 0);
}

// Neurons that run together, and the tokens that use them.
template <class W> struct Part {
    const W *gate, *up;
    int64_t neurons, first_column, tokens;
    const int32_t *token;    // null: all tokens in order
    const float *weight;     // null: one
    Activations<W> *hidden;  // [tokens, neurons]
    int64_t hidden_stride, first_neuron;  // among those of all parts

    INLINE int64_t token_at(int64_t i) const { return token ? token[i] : i; }
    INLINE bool has_few() const { return tokens <= MAX_FEW; }
};

// Activations, token after token.
template <class A> struct Tokens {
    const A *first;
    int64_t stride;
    INLINE const A *operator[](int64_t t) const { return first + t * stride; }
};

// Some neurons of a part; none when `neurons` is 0.
template <class W> struct Piece {
    const Part<W> *part;
    int64_t first;
    int neurons;
};

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
    struct Piece { void **to; int64_t offset; } pieces_[16];
    int used_ = 0;
    int64_t bytes_ = 0;
    char *memory_ = nullptr;
};

// A logit as torch keeps it, so that every path chooses alike.
template <class W> INLINE float as_torch_rounds(float logit) {
    W rounded;
    narrow(logit, &rounded);
    return widen(rounded);
}

// logits[t, from .. to) of some tokens.
template <class W>
void score_rows(const Layer &layer, Tokens<Activations<W>> x, int64_t start, int64_t tokens, int64_t from, int64_t to,
                float *logits) {
    const int64_t D = layer.hidden_size, N = layer.num_experts;
    for (int64_t t = 0; t < tokens; t += FEW_TOKENS) {
        const int M = at_most(tokens - t, FEW_TOKENS);
        const Activations<W> *rows[FEW_TOKENS];
        for (int m = 0; m < M; m++) rows[m] = x[start + t + m];
        for (int64_t e = from; e < to; e += TILE_ROWS) {
            const int R = at_most(to - e, TILE_ROWS);
            const W *w[TILE_ROWS];
            float out[FEW_TOKENS][TILE_ROWS];
            for (int r = 0; r < R; r++) w[r] = static_cast<const W *>(layer.router) + (e + r) * D;
            dots_of_rows<W>(R, M, rows, w, D, out);
            for (int m = 0; m < M; m++)
                for (int r = 0; r < R; r++) logits[(t + m) * N + e + r] = as_torch_rounds<W>(out[m][r]);
        }
    }
}

// The same for many tokens and up to C vectors of experts, whose router rows make a panel.
template <class W, int C>
void score_panel(const Layer &layer, Tokens<Activations<W>> x, int64_t start, const Tiles &tiles, int64_t from,
                 int count, float *panel, float *logits) {
    const W *w[WIDTH];
    for (int r = 0; r < count; r++) w[r] = static_cast<const W *>(layer.router) + (from + r) * layer.hidden_size;
    const Lines none = Ahead::nothing(panel).while_packing(tiles);
    pack_rows<W, C>(w, count, layer.hidden_size, panel, none);
    for (int64_t tile = 0; tile < tiles.count; tile++) {
        const int64_t t = tiles.start(tile);
        const int M = tiles.size(tile);
        const Activations<W> *rows[TILE_TOKENS];
        float sums[TILE_TOKENS][WIDTH] = {}, *out[TILE_TOKENS];
        for (int m = 0; m < M; m++) rows[m] = x[start + t + m], out[m] = sums[m];
        multiply_panel<Activations<W>, C>(M, rows, panel, layer.hidden_size, none, out);
        for (int m = 0; m < M; m++)
            for (int r = 0; r < count; r++)
                logits[(t + m) * layer.num_experts + from + r] = as_torch_rounds<W>(sums[m][r]);
    }
}

// All logits of some tokens.
template <class W>
void score_all(const Layer &layer, Tokens<Activations<W>> x, int64_t start, int64_t tokens, float *panel,
               float *logits) {
    const int64_t N = layer.num_experts;
    if (tokens <= FEW_TOKENS || N < LANES) return score_rows<W>(layer, x, start, tokens, 0, N, logits);
    const Tiles tiles(tokens, TILE_TOKENS);
    for (int64_t e = 0; e < N; e += WIDTH) {
        const int count = at_most(N - e, WIDTH);
        if (count > SINGLE_VECTOR) score_panel<W, PANEL_VECTORS>(layer, x, start, tiles, e, count, panel, logits);
        else score_panel<W, 1>(layer, x, start, tiles, e, count, panel, logits);
    }
}

// The K experts of one token with the largest logits, of equal ones the lower, and their weights.
void choose(const Layer &layer, const float *logits, int32_t *ids, float *weights) {
    const int64_t K = layer.top_k;
    for (int64_t e = 0, found = 0; e < layer.num_experts; e++) {  // the best so far, in order
        if (found == K && !(logits[e] > logits[ids[K - 1]])) continue;
        int64_t k = found < K ? found++ : K - 1;
        for (; k > 0 && logits[e] > logits[ids[k - 1]]; k--) ids[k] = ids[k - 1];
        ids[k] = int32_t(e);
    }
    float sum = 0;
    for (int64_t k = 0; k < K; k++) {
        weights[k] = layer.hard_gate || K == 1 ? 1.f : expf(logits[ids[k]] - logits[ids[0]]);
        sum += weights[k];
    }
    for (int64_t k = 0; k < K; k++) weights[k] *= layer.scale / sum;
}

// Pairs sorted by expert; within an expert the tokens keep their order.
void group(const Layer &layer, int64_t pairs, const int32_t *ids, const float *weights, int64_t *starts, int32_t *token,
           float *weight) {
    memset(starts, 0, (layer.num_experts + 2) * sizeof *starts);
    for (int64_t p = 0; p < pairs; p++) starts[ids[p] + 2]++;
    for (int64_t e = 2; e < layer.num_experts + 2; e++) starts[e] += starts[e - 1];
    for (int64_t p = 0; p < pairs; p++) {
        int64_t at = starts[ids[p] + 1]++;
        token[at] = int32_t(p / layer.top_k);
        weight[at] = weights[p];
    }
}

// hidden[m] = act(gates) * ups * weight for LANES neurons, of which `neurons` exist.
template <class W>
INLINE void put_hidden(const Layer &layer, const Part<W> &part, int64_t m, int64_t first, int neurons, Vector gates,
                       Vector ups) {
    const float weight = part.weight ? part.weight[m] : 1.f;
    float values[LANES];
    Activations<W> narrowed[LANES];
    store(values, activate(gates, layer.activation) * ups * weight);
    for (int h = 0; h < LANES; h++) narrow(values[h], narrowed + h);
    memcpy(part.hidden + m * part.hidden_stride + first, narrowed, neurons * sizeof *narrowed);
}

// The hidden activations of a piece's neurons, for few tokens.
template <class W> void gate_up_rows(const Layer &layer, const Piece<W> &piece, Tokens<Activations<W>> x) {
    const Part<W> &part = *piece.part;
    const int64_t D = layer.hidden_size;
    const Tiles tiles(part.tokens, FEW_TOKENS);
    const Activations<W> *tokens[MAX_FEW];
    float gates[MAX_FEW][MAX_BLOCK + LANES], ups[MAX_FEW][MAX_BLOCK + LANES];
    for (int64_t t = 0; t < part.tokens; t++) {
        tokens[t] = x[part.token_at(t)];
        memset(gates[t] + piece.neurons, 0, LANES * sizeof(float));  // the rest of the last vector
        memset(ups[t] + piece.neurons, 0, LANES * sizeof(float));
    }
    auto multiply = [&](const W *weight, float (*into)[MAX_BLOCK + LANES]) {
        for (int h = 0; h < piece.neurons; h += TILE_ROWS) {
            const int R = at_most(piece.neurons - h, TILE_ROWS);
            const W *w[TILE_ROWS];
            for (int r = 0; r < R; r++) w[r] = weight + (piece.first + h + r) * D;
            for (int64_t tile = 0; tile < tiles.count; tile++) {
                const int64_t start = tiles.start(tile);
                const int M = tiles.size(tile);
                float out[FEW_TOKENS][TILE_ROWS];
                dots_of_rows<W>(R, M, tokens + start, w, D, out);
                for (int m = 0; m < M; m++) memcpy(into[start + m] + h, out[m], R * sizeof(float));
            }
        }
    };
    multiply(part.gate, gates);
    multiply(part.up, ups);
    for (int64_t t = 0; t < part.tokens; t++)
        for (int h = 0; h < piece.neurons; h += LANES)
            put_hidden<W>(layer, part, t, piece.first + h, at_most(piece.neurons - h, LANES), load(gates[t] + h),
                          load(ups[t] + h));
}

// The same for many tokens and up to LANES neurons: their gates and ups share a panel of C vectors.
template <class W, int C>
void gate_up_panel(const Layer &layer, const Piece<W> &piece, const Piece<W> &following, Tokens<Activations<W>> x,
                   float *panel) {
    const Part<W> &part = *piece.part;
    const int64_t D = layer.hidden_size;
    const W *rows[WIDTH];
    for (int h = 0; h < piece.neurons; h++) {
        rows[h] = part.gate + (piece.first + h) * D;
        rows[piece.neurons + h] = part.up + (piece.first + h) * D;
    }
    const Tiles tiles(part.tokens, TILE_TOKENS);
    Ahead ahead = Ahead::nothing(panel);
    if (const Part<W> *next = following.part)
        ahead = Ahead::of_pieces(next->gate + following.first * D, next->up + following.first * D);
    pack_rows<W, C>(rows, 2 * piece.neurons, D, panel, ahead.while_packing(tiles));
    for (int64_t tile = 0; tile < tiles.count; tile++) {
        const int64_t start = tiles.start(tile);
        const int M = tiles.size(tile);
        const Activations<W> *tokens[TILE_TOKENS];
        float sums[TILE_TOKENS][WIDTH + LANES], *out[TILE_TOKENS];
        for (int m = 0; m < M; m++) {
            tokens[m] = x[part.token_at(start + m)], out[m] = sums[m];
            memset(sums[m], 0, sizeof sums[m]);
        }
        multiply_panel<Activations<W>, C>(M, tokens, panel, D, ahead.during(tile, tiles), out);
        for (int m = 0; m < M; m++)
            put_hidden<W>(layer, part, start + m, piece.first, piece.neurons, load(sums[m]),
                          load(sums[m] + piece.neurons));
    }
}

// Some of a part's neurons, and some of the outputs.
struct Area {
    int64_t neuron, neurons, from, to;
};

// y += hidden * down for up to FEW_TOKENS tokens and `down` stored column after column: a neuron's weights at once.
template <class W> void down_columns(const Layer &layer, const Part<W> &part, float *y, Area area) {
    const int64_t D = layer.hidden_size, stride = layer.down_column_stride;
    const W *down = static_cast<const W *>(layer.down) + (part.first_column + area.neuron) * stride;
    const int M = int(part.tokens);
    const Activations<W> *hidden[FEW_TOKENS];
    float *out[FEW_TOKENS];
    for (int m = 0; m < M; m++) hidden[m] = part.hidden + m * part.hidden_stride + area.neuron;
    const int64_t most = M > ROW_BY_ROW ? IN_L1 : D;
    for (int64_t d = area.from; d < area.to; d += most) {
        for (int m = 0; m < M; m++) out[m] = y + part.token_at(m) * D + d;
        add_neurons<W>(M, hidden, down + d, stride, area.neurons, area.to - d < most ? area.to - d : most, out);
    }
}

// y += hidden * down for few tokens and `down` stored row after row.
template <class W> void down_rows(const Layer &layer, const Part<W> &part, float *y, Area area) {
    const W *down = static_cast<const W *>(layer.down) + part.first_column + area.neuron;
    const Tiles tiles(part.tokens, FEW_TOKENS);
    const Activations<W> *hidden[MAX_FEW];
    for (int64_t t = 0; t < part.tokens; t++) hidden[t] = part.hidden + t * part.hidden_stride + area.neuron;
    for (int64_t d = area.from; d < area.to; d += TILE_ROWS) {
        const int R = at_most(area.to - d, TILE_ROWS);
        const W *w[TILE_ROWS];
        for (int r = 0; r < R; r++) w[r] = down + (d + r) * layer.down_row_stride;
        for (int64_t tile = 0; tile < tiles.count; tile++) {
            const int64_t start = tiles.start(tile);
            const int M = tiles.size(tile);
            float out[FEW_TOKENS][TILE_ROWS];
            dots_of_rows<W>(R, M, hidden + start, w, area.neurons, out);
            for (int m = 0; m < M; m++)
                for (int r = 0; r < R; r++) y[part.token_at(start + m) * layer.hidden_size + d + r] += out[m][r];
        }
    }
}

// The same for many tokens and up to C vectors of outputs, whose weights make a panel.
template <class W, int C>
void down_panel(const Layer &layer, const Part<W> &part, float *y, Area area, float *panel) {
    using A = Activations<W>;
    const int64_t D = layer.hidden_size, stride = layer.down_column_stride;
    const int count = int(area.to - area.from);
    const W *down = static_cast<const W *>(layer.down) + (part.first_column + area.neuron) * stride +
                    area.from * layer.down_row_stride;
    const Tiles tiles(part.tokens, TILE_TOKENS);
    Ahead ahead;
    if (stride == 1) {
        const W *rows[WIDTH];
        for (int r = 0; r < count; r++) rows[r] = down + r * layer.down_row_stride;
        ahead = Ahead::of_rows(down + count * layer.down_row_stride, layer.down_row_stride);
        pack_rows<W, C>(rows, count, area.neurons, panel, ahead.while_packing(tiles));
    } else {
        ahead = Ahead::of_columns(down + count, stride);
        pack_columns<W, C>(down, stride, count, area.neurons, panel, ahead.while_packing(tiles));
    }
    const bool in_place = count == C * LANES;
    for (int64_t tile = 0; tile < tiles.count; tile++) {
        const int64_t start = tiles.start(tile);
        const int M = tiles.size(tile);
        const A *hidden[TILE_TOKENS];
        float sums[TILE_TOKENS][WIDTH], *out[TILE_TOKENS];
        for (int m = 0; m < M; m++) {
            hidden[m] = part.hidden + (start + m) * part.hidden_stride + area.neuron;
            out[m] = in_place ? y + part.token_at(start + m) * D + area.from : sums[m];
            if (!in_place) memset(sums[m], 0, sizeof sums[m]);
        }
        multiply_panel<A, C>(M, hidden, panel, area.neurons, ahead.during(tile, tiles), out);
        for (int m = 0; m < M && !in_place; m++)
            for (int r = 0; r < count; r++) y[part.token_at(start + m) * D + area.from + r] += sums[m][r];
    }
}

template <class W>
void down_panels(const Layer &layer, const Part<W> &part, float *y, Area area, float *panel) {
    const int64_t end = area.neuron + area.neurons;
    for (int64_t neuron = area.neuron; neuron < end; neuron += DEPTH)
        for (int64_t d = area.from; d < area.to; d += WIDTH) {
            const Area own = {neuron, end - neuron < DEPTH ? end - neuron : DEPTH, d, d + at_most(area.to - d, WIDTH)};
            if (own.to - d > SINGLE_VECTOR) down_panel<W, PANEL_VECTORS>(layer, part, y, own, panel);
            else down_panel<W, 1>(layer, part, y, own, panel);
        }
}

// y[:, area's outputs] += hidden of the area's neurons * down
template <class W> void down(const Layer &layer, const Part<W> &part, float *y, Area area, float *panel) {
    if (area.neurons <= 0 || area.from >= area.to) return;
    const bool by_rows = layer.down_column_stride == 1;
    if (by_rows && part.has_few()) down_rows<W>(layer, part, y, area);
    else if (!by_rows && part.tokens <= FEW_TOKENS) down_columns<W>(layer, part, y, area);
    else down_panels<W>(layer, part, y, area, panel);
}

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
    float *logits, *weights, *weight, *panels, *sums = nullptr, *y;
    int32_t *ids, *token;
    int64_t *starts;
    Part<W> *parts;
    int64_t part_count = 0, total = 0, next = 0;
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
        const W *gate = static_cast<const W *>(gate_up);
        parts[part_count++] = {gate, gate + neurons * D, neurons, column, tokens, own, weight_of, into, stride, total};
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
            else if (2 * piece.neurons > SINGLE_VECTOR)
                gate_up_panel<W, PANEL_VECTORS>(layer, piece, following, x, panel);
            else gate_up_panel<W, 1>(layer, piece, following, x, panel);
        }
    }

    // With everyone on, the parts are one.
    template <class Use> void each_part_of_down(Use use) {
        if (everyone) use(Part<W>{nullptr, nullptr, F, 0, T, nullptr, nullptr, hidden, F, 0});
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
