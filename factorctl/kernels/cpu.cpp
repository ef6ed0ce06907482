// Gated FFNs and linear layers on a CPU, each in one call: routing, the chosen experts' products and their sum.
//
// Next to a small layer, calls into a framework cost as much as its weights take to read; and a framework's product
// cannot take its rows from wherever the router points. Here threads start once per layer, take blocks of neurons in
// turn, and read every chosen weight once, in the order in which it lies in memory. Nothing is gathered or copied.
//
// Weights are float or bfloat16, sums are float. bfloat16 weights meet bfloat16 activations where the processor
// multiplies pairs of them, else both are widened. Vectors are the compiler's own, so that one text serves
// AVX-512, AVX2 and NEON. Bound by cpu.py, compiled by compiling.py.
//
// T tokens, D hidden size, N experts of H neurons, S shared neurons, K experts chosen per token, P = T*K pairs.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

extern "C" int omp_get_thread_num(void);
extern "C" int omp_get_num_threads(void);

namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif
constexpr int LANES = VECTOR_BYTES / 4;

// A tile of sums that fills, but does not overflow, the vector registers: 32 of them with AVX-512 and NEON, else 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int TILE_TOKENS = 6;
#else
constexpr int TILE_TOKENS = 3;
#endif
constexpr int TILE_ROWS = 4, TILE_VECTORS = 4;
constexpr int ROW_BY_ROW = 2;           // tokens up to which a product waits for its weights, not for arithmetic
constexpr int FEW_TOKENS = 3;           // up to which sums of whole rows stay in L1
constexpr int MIN_BLOCK = 16, MAX_BLOCK = 64, BLOCKS_PER_THREAD = 8;  // of neurons, or rows, that a thread takes
constexpr int64_t MAX_SUMS = 1 << 18;   // of all threads, where each sums up its own neurons
constexpr int64_t DEPTH = 1024;         // neurons that a tile of `down` sums up before the next tile: they stay in L2

using Vector = float __attribute__((vector_size(VECTOR_BYTES)));
using Unaligned = float __attribute__((vector_size(VECTOR_BYTES), aligned(4)));
using Integers = int32_t __attribute__((vector_size(VECTOR_BYTES)));
using Unsigned = uint32_t __attribute__((vector_size(VECTOR_BYTES)));
using Halves = uint16_t __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2)));
using Four = float __attribute__((vector_size(16)));
using FourUnaligned = float __attribute__((vector_size(16), aligned(4)));
using Bfloat16 = uint16_t;

#define INLINE inline __attribute__((always_inline))

// What activations are kept as next to weights of type W.
template <class W> struct Kept { using Type = float; };
#if defined(__AVX512BF16__)
template <> struct Kept<Bfloat16> { using Type = Bfloat16; };
#endif
template <class W> using Activations = typename Kept<W>::Type;

INLINE Vector load(const float *p) { return *reinterpret_cast<const Unaligned *>(p); }
INLINE Vector load(const Bfloat16 *p) {
    return (Vector)(__builtin_convertvector(*reinterpret_cast<const Halves *>(p), Unsigned) << 16);
}
INLINE void store(float *p, Vector v) { *reinterpret_cast<Unaligned *>(p) = v; }
INLINE Vector splat(float value) { return value - Vector{}; }

INLINE int at_most(int64_t left, int limit) { return left < limit ? int(left) : limit; }

INLINE float widen(float value) { return value; }
INLINE float widen(Bfloat16 value) {
    uint32_t bits = uint32_t(value) << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}
INLINE void narrow(float value, float *to) { *to = value; }
INLINE void narrow(float value, Bfloat16 *to) {  // to the nearest, ties to even, as torch rounds; NaN stays NaN
    uint32_t bits;
    memcpy(&bits, &value, 4);
    *to = value != value ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

INLINE Four quarter(Vector v) {
    if constexpr (VECTOR_BYTES == 16) {
        Four same;
        memcpy(&same, &v, 16);
        return same;
    } else {
        Four sum = __builtin_shufflevector(v, v, 0, 1, 2, 3) +
                   __builtin_shufflevector(v, v, 4 % LANES, 5 % LANES, 6 % LANES, 7 % LANES);
        if constexpr (VECTOR_BYTES == 64)
            sum += __builtin_shufflevector(v, v, 8 % LANES, 9 % LANES, 10 % LANES, 11 % LANES) +
                   __builtin_shufflevector(v, v, 12 % LANES, 13 % LANES, 14 % LANES, 15 % LANES);
        return sum;
    }
}

// The sums over the lanes of four vectors, by transposing while adding.
INLINE Four sums_of(Vector a, Vector b, Vector c, Vector d) {
    Four p = quarter(a), q = quarter(b), r = quarter(c), s = quarter(d);
    Four t = __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
    Four u = __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
    return __builtin_shufflevector(t, u, 0, 1, 4, 5) + __builtin_shufflevector(t, u, 2, 3, 6, 7);
}

// e^x to 2 units in the last place; the constants are those of Cephes' expf. NaN stays NaN.
INLINE Vector exponential(Vector x) {
    x = x < -87.3f ? splat(-87.3f) : x;
    x = x > 88.3f ? splat(88.3f) : x;
    Vector shifted = x * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the low bits now hold the nearest integer
    Vector n = shifted - 12582912.f;
    Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vector p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.f;
    return p * (Vector)(((Integers)shifted - 0x4B400000 + 127) << 23);
}

enum Fault : int { NO_MEMORY = 1, NO_SUCH_EXPERT = 2 };
enum Activation : int32_t { SILU = 0, GELU_TANH = 1, QUICK_GELU = 2, RELU = 3 };

INLINE Vector activate(Vector x, int32_t activation) {
    switch (activation) {
    case GELU_TANH:  // (1 + tanh u) / 2 is the sigmoid of 2u
        return x / (1.f + exponential(-1.5957691216f * (x + 0.044715f * x * x * x)));
    case QUICK_GELU:
        return x / (1.f + exponential(-1.702f * x));
    case RELU:
        return x < 0.f ? splat(0.f) : x;
    default:
        return x / (1.f + exponential(-x));
    }
}

// ---- products -------------------------------------------------------------------------------------------------------

// sums += x * w, element by element, for as many elements as the vectors hold; several elements may share a lane.
template <class W> struct Step {
    static constexpr int ELEMENTS = LANES;
    using Loaded = Vector;
    static INLINE Loaded weights(const W *w) { return load(w); }
    static INLINE Loaded activations(const float *x) { return load(x); }
    static INLINE void add(Vector &sums, Loaded x, Loaded w) { sums += x * w; }
};
#if defined(__AVX512BF16__)
template <> struct Step<Bfloat16> {
    static constexpr int ELEMENTS = 2 * LANES;
    using Loaded = __m512bh;
    static INLINE Loaded weights(const Bfloat16 *w) { return (__m512bh)_mm512_loadu_si512(w); }
    static INLINE Loaded activations(const Bfloat16 *x) { return (__m512bh)_mm512_loadu_si512(x); }
    static INLINE void add(Vector &sums, Loaded x, Loaded w) { sums = (Vector)_mm512_dpbf16_ps((__m512)sums, x, w); }
};
#endif

// out[m][r] = x[m] . w[r], both contiguous.
//
// For few tokens row after row, because memory streams fastest in one piece; for more, rows share the loads of x.
template <class W, int M, int R>
INLINE void dot_tile(const Activations<W> *const *x, const W *const *w, int64_t inputs, float (*out)[TILE_ROWS]) {
    constexpr int E = Step<W>::ELEMENTS;
    Vector sums[M][TILE_ROWS] = {};
    int64_t i = 0;
    if constexpr (M <= ROW_BY_ROW) {
        for (int r = 0; r < R; r++) {
            Vector odd[M] = {};  // two chains of sums: one would wait for itself
            for (i = 0; i + 2 * E <= inputs; i += 2 * E) {
                auto first = Step<W>::weights(w[r] + i), second = Step<W>::weights(w[r] + i + E);
                for (int m = 0; m < M; m++) {
                    Step<W>::add(sums[m][r], Step<W>::activations(x[m] + i), first);
                    Step<W>::add(odd[m], Step<W>::activations(x[m] + i + E), second);
                }
            }
            if (i + E <= inputs) {
                for (int m = 0; m < M; m++)
                    Step<W>::add(sums[m][r], Step<W>::activations(x[m] + i), Step<W>::weights(w[r] + i));
                i += E;
            }
            for (int m = 0; m < M; m++) sums[m][r] += odd[m];
        }
    } else {
        for (; i + E <= inputs; i += E) {
            typename Step<W>::Loaded rows[R];
            for (int r = 0; r < R; r++) rows[r] = Step<W>::weights(w[r] + i);
            for (int m = 0; m < M; m++) {
                auto token = Step<W>::activations(x[m] + i);
                for (int r = 0; r < R; r++) Step<W>::add(sums[m][r], token, rows[r]);
            }
        }
    }
    for (int m = 0; m < M; m++) {
        *reinterpret_cast<FourUnaligned *>(out[m]) = sums_of(sums[m][0], sums[m][1], sums[m][2], sums[m][3]);
        for (int64_t rest = i; rest < inputs; rest++)
            for (int r = 0; r < R; r++) out[m][r] += widen(x[m][rest]) * widen(w[r][rest]);
    }
}

template <class W, int R>
void dots(int tokens, const Activations<W> *const *x, const W *const *w, int64_t inputs, float (*out)[TILE_ROWS]) {
    switch (tokens) {
    case 1: return dot_tile<W, 1, R>(x, w, inputs, out);
    case 2: return dot_tile<W, 2, R>(x, w, inputs, out);
    case 3: return dot_tile<W, 3, R>(x, w, inputs, out);
    case 4: return dot_tile<W, TILE_TOKENS < 4 ? 1 : 4, R>(x, w, inputs, out);
    case 5: return dot_tile<W, TILE_TOKENS < 5 ? 1 : 5, R>(x, w, inputs, out);
    case 6: return dot_tile<W, TILE_TOKENS < 6 ? 1 : 6, R>(x, w, inputs, out);
    }
}

template <class W>
void dots_of_rows(int rows, int tokens, const Activations<W> *const *x, const W *const *w, int64_t inputs,
                  float (*out)[TILE_ROWS]) {
    switch (rows) {
    case 1: return dots<W, 1>(tokens, x, w, inputs, out);
    case 2: return dots<W, 2>(tokens, x, w, inputs, out);
    case 3: return dots<W, 3>(tokens, x, w, inputs, out);
    case 4: return dots<W, 4>(tokens, x, w, inputs, out);
    }
}

#if defined(__AVX512BF16__)
// `outer_tile` by products of pairs: two neurons' weights are interleaved, and so are the sums until they are stored.
template <int M, int C>
INLINE void outer_pairs(const Bfloat16 *const *a, const Bfloat16 *b, int64_t stride, int64_t neurons, float *const *y) {
    Vector low[M][C] = {}, high[M][C] = {};
    for (int64_t h = 0; h < neurons; h += 2) {
        const bool pair = h + 1 < neurons;  // the last may stand alone
        __m512bh lows[C], highs[C];
        for (int c = 0; c < C; c++) {
            const Bfloat16 *at = b + h * stride + c * 2 * LANES;
            const __m512i first = _mm512_loadu_si512(at);
            const __m512i second = pair ? _mm512_loadu_si512(at + stride) : _mm512_setzero_si512();
            lows[c] = (__m512bh)_mm512_unpacklo_epi16(first, second);
            highs[c] = (__m512bh)_mm512_unpackhi_epi16(first, second);
        }
        for (int m = 0; m < M; m++) {
            uint32_t factors = a[m][h];
            if (pair) memcpy(&factors, a[m] + h, 4);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(int(factors));
            for (int c = 0; c < C; c++) {
                low[m][c] = (Vector)_mm512_dpbf16_ps((__m512)low[m][c], lows[c], both);
                high[m][c] = (Vector)_mm512_dpbf16_ps((__m512)high[m][c], highs[c], both);
            }
        }
    }
    for (int m = 0; m < M; m++)
        for (int c = 0; c < C; c++) {  // unpacking took four elements of every eight
            const Vector l = low[m][c], u = high[m][c];
            float *to = y[m] + c * 2 * LANES;
            const Vector first =
                __builtin_shufflevector(l, u, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
            const Vector second =
                __builtin_shufflevector(l, u, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
            store(to, load(to) + first);
            store(to + LANES, load(to + LANES) + second);
        }
}
#endif

// y[m][0 .. C vectors) += sum over h of a[m][h] * b[h]; b's neurons lie `stride` apart, each contiguous.
template <class W, int M, int C>
INLINE void outer_tile(const Activations<W> *const *a, const W *b, int64_t stride, int64_t neurons, float *const *y) {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(W) == 2 && C % 2 == 0) return outer_pairs<M, C / 2>(a, b, stride, neurons, y);
#endif
    Vector sums[M][C];
    for (int m = 0; m < M; m++)
        for (int c = 0; c < C; c++) sums[m][c] = load(y[m] + c * LANES);
    for (int64_t h = 0; h < neurons; h++) {
        Vector row[C];
        for (int c = 0; c < C; c++) row[c] = load(b + h * stride + c * LANES);
        for (int m = 0; m < M; m++) {
            Vector factor = splat(widen(a[m][h]));
            for (int c = 0; c < C; c++) sums[m][c] += factor * row[c];
        }
    }
    for (int m = 0; m < M; m++)
        for (int c = 0; c < C; c++) store(y[m] + c * LANES, sums[m][c]);
}

template <class W, int C>
void outer(int tokens, const Activations<W> *const *a, const W *b, int64_t stride, int64_t neurons, float *const *y) {
    switch (tokens) {
    case 1: return outer_tile<W, 1, C>(a, b, stride, neurons, y);
    case 2: return outer_tile<W, 2, C>(a, b, stride, neurons, y);
    case 3: return outer_tile<W, 3, C>(a, b, stride, neurons, y);
    case 4: return outer_tile<W, TILE_TOKENS < 4 ? 1 : 4, C>(a, b, stride, neurons, y);
    case 5: return outer_tile<W, TILE_TOKENS < 5 ? 1 : 5, C>(a, b, stride, neurons, y);
    case 6: return outer_tile<W, TILE_TOKENS < 6 ? 1 : 6, C>(a, b, stride, neurons, y);
    }
}

// The same for few tokens and `width` elements of each neuron, one after another: that streams fastest. Sums stay in L1.
template <class W, int M>
void add_rows(const Activations<W> *const *a, const W *b, int64_t stride, int64_t neurons, int64_t width,
              float *const *y) {
    for (int64_t h = 0; h < neurons; h++) {
        const W *row = b + h * stride;
        Vector factors[M];
        for (int m = 0; m < M; m++) factors[m] = splat(widen(a[m][h]));
        int64_t d = 0;
        for (; d + LANES <= width; d += LANES) {
            const Vector loaded = load(row + d);
            for (int m = 0; m < M; m++) store(y[m] + d, load(y[m] + d) + factors[m] * loaded);
        }
        for (; d < width; d++)
            for (int m = 0; m < M; m++) y[m][d] += factors[m][0] * widen(row[d]);
    }
}

template <class W>
void add_rows(int tokens, const Activations<W> *const *a, const W *b, int64_t stride, int64_t neurons, int64_t width,
              float *const *y) {
    switch (tokens) {
    case 1: return add_rows<W, 1>(a, b, stride, neurons, width, y);
    case 2: return add_rows<W, 2>(a, b, stride, neurons, width, y);
    case 3: return add_rows<W, 3>(a, b, stride, neurons, width, y);
    }
}

// ---- the layer ------------------------------------------------------------------------------------------------------

}  // namespace

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

// Neurons that run together, and the tokens that use them.
template <class W> struct Part {
    const W *gate, *up;
    int64_t neurons, first_column, tokens;
    const int32_t *token;    // null: all tokens in order
    const float *weight;     // null: one
    Activations<W> *hidden;  // [tokens, neurons]
    int64_t hidden_stride, first_neuron;  // among those of all parts

    INLINE int64_t token_at(int64_t i) const { return token ? token[i] : i; }
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

// The K experts with the largest logits, of equal ones the lower, and their weights; for up to TILE_TOKENS tokens.
template <class W>
void choose(const Layer &layer, const Activations<W> *x, int tokens, float *logits, int32_t *ids, float *weights) {
    const int64_t D = layer.hidden_size, N = layer.num_experts, K = layer.top_k;
    const Activations<W> *rows[TILE_TOKENS];
    for (int m = 0; m < tokens; m++) rows[m] = x + m * D;
    for (int64_t e = 0; e < N; e += TILE_ROWS) {
        int R = at_most(N - e, TILE_ROWS);
        const W *w[TILE_ROWS];
        float out[TILE_TOKENS][TILE_ROWS];
        for (int r = 0; r < R; r++) w[r] = static_cast<const W *>(layer.router) + (e + r) * D;
        dots_of_rows<W>(R, tokens, rows, w, D, out);
        for (int m = 0; m < tokens; m++)
            for (int r = 0; r < R; r++) {  // rounded as torch's logits are, so that every path chooses alike
                W rounded;
                narrow(out[m][r], &rounded);
                logits[m * N + e + r] = widen(rounded);
            }
    }
    for (int m = 0; m < tokens; m++) {
        const float *own = logits + m * N;
        int32_t *id = ids + m * K;
        float *weight = weights + m * K, sum = 0;
        for (int64_t e = 0, found = 0; e < N; e++) {  // the best so far, in order
            if (found == K && !(own[e] > own[id[K - 1]])) continue;
            int64_t k = found < K ? found++ : K - 1;
            for (; k > 0 && own[e] > own[id[k - 1]]; k--) id[k] = id[k - 1];
            id[k] = int32_t(e);
        }
        for (int64_t k = 0; k < K; k++) {
            weight[k] = layer.hard_gate || K == 1 ? 1.f : expf(own[id[k]] - own[id[0]]);
            sum += weight[k];
        }
        for (int64_t k = 0; k < K; k++) weight[k] *= layer.scale / sum;
    }
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

// hidden = act(gate x) * (up x) * weight for a block of neurons and all tokens of the part.
template <class W>
void gate_up_block(const Layer &layer, const Part<W> &part, int64_t first, int neurons, const Activations<W> *x) {
    const int64_t D = layer.hidden_size;
    for (int64_t t = 0; t < part.tokens; t += TILE_TOKENS) {
        const int M = at_most(part.tokens - t, TILE_TOKENS);
        const Activations<W> *rows[TILE_TOKENS];
        float gates[TILE_TOKENS][MAX_BLOCK + LANES], ups[TILE_TOKENS][MAX_BLOCK + LANES];
        for (int m = 0; m < M; m++) {
            rows[m] = x + part.token_at(t + m) * D;
            memset(gates[m] + neurons, 0, LANES * sizeof(float));  // the rest of the last vector
            memset(ups[m] + neurons, 0, LANES * sizeof(float));
        }
        auto multiply = [&](const W *weight, float (*into)[MAX_BLOCK + LANES]) {
            for (int h = 0; h < neurons; h += TILE_ROWS) {
                const int R = at_most(neurons - h, TILE_ROWS);
                const W *w[TILE_ROWS];
                float out[TILE_TOKENS][TILE_ROWS];
                for (int r = 0; r < R; r++) w[r] = weight + (first + h + r) * D;
                dots_of_rows<W>(R, M, rows, w, D, out);
                for (int m = 0; m < M; m++) memcpy(into[m] + h, out[m], R * sizeof(float));
            }
        };
        multiply(part.gate, gates);
        multiply(part.up, ups);
        for (int m = 0; m < M; m++) {
            const float weight = part.weight ? part.weight[t + m] : 1.f;
            for (int h = 0; h < neurons; h += LANES)
                store(gates[m] + h, activate(load(gates[m] + h), layer.activation) * load(ups[m] + h) * weight);
            Activations<W> *hidden = part.hidden + (t + m) * part.hidden_stride + first;
            for (int h = 0; h < neurons; h++) narrow(gates[m][h], hidden + h);
        }
    }
}

// y += hidden of some of the part's neurons, `first` up to `end`, times their columns of `down`.
template <class W>
void down_of_neurons(const Layer &layer, const Part<W> &part, float *y, int64_t first, int64_t end) {
    const int64_t D = layer.hidden_size, stride = layer.down_column_stride;
    const W *down = static_cast<const W *>(layer.down) + (part.first_column + first) * stride;
    for (int64_t t = 0; t < part.tokens; t += FEW_TOKENS) {
        const int M = at_most(part.tokens - t, FEW_TOKENS);
        const Activations<W> *hidden[FEW_TOKENS];
        float *out[FEW_TOKENS];
        for (int m = 0; m < M; m++) {
            hidden[m] = part.hidden + (t + m) * part.hidden_stride + first;
            out[m] = y + part.token_at(t + m) * D;
        }
        add_rows<W>(M, hidden, down, stride, end - first, D, out);
    }
}

// y[:, from .. to) += hidden of the part times its columns of `down`, stored column after column.
template <class W> void down_columns(const Layer &layer, const Part<W> &part, float *y, int64_t from, int64_t to) {
    const int64_t D = layer.hidden_size, stride = layer.down_column_stride;
    for (int64_t first = 0; first < part.neurons; first += DEPTH) {
        const int64_t neurons = part.neurons - first < DEPTH ? part.neurons - first : DEPTH;
        const W *down = static_cast<const W *>(layer.down) + (part.first_column + first) * stride;
        for (int64_t d = from; d < to;) {
            const int64_t vectors = (to - d) / LANES;
            const int C = vectors >= TILE_VECTORS ? TILE_VECTORS : vectors > 0;
            for (int64_t t = 0; t < part.tokens; t += TILE_TOKENS) {
                const int M = at_most(part.tokens - t, TILE_TOKENS);
                const Activations<W> *hidden[TILE_TOKENS];
                float *out[TILE_TOKENS];
                for (int m = 0; m < M; m++) {
                    hidden[m] = part.hidden + (t + m) * part.hidden_stride + first;
                    out[m] = y + part.token_at(t + m) * D + d;
                }
                if (C == TILE_VECTORS) outer<W, TILE_VECTORS>(M, hidden, down + d, stride, neurons, out);
                else if (C == 1) outer<W, 1>(M, hidden, down + d, stride, neurons, out);
                else
                    for (int m = 0; m < M; m++)
                        for (int64_t h = 0; h < neurons; h++)
                            for (int64_t rest = 0; rest < to - d; rest++)
                                out[m][rest] += widen(hidden[m][h]) * widen(down[h * stride + d + rest]);
            }
            d += C ? C * LANES : to - d;
        }
    }
}

// The same for `down` stored row after row.
template <class W> void down_rows(const Layer &layer, const Part<W> &part, float *y, int64_t from, int64_t to) {
    const W *down = static_cast<const W *>(layer.down) + part.first_column;
    for (int64_t d = from; d < to; d += TILE_ROWS) {
        const int R = at_most(to - d, TILE_ROWS);
        const W *w[TILE_ROWS];
        for (int r = 0; r < R; r++) w[r] = down + (d + r) * layer.down_row_stride;
        for (int64_t t = 0; t < part.tokens; t += TILE_TOKENS) {
            const int M = at_most(part.tokens - t, TILE_TOKENS);
            const Activations<W> *hidden[TILE_TOKENS];
            float out[TILE_TOKENS][TILE_ROWS];
            for (int m = 0; m < M; m++) hidden[m] = part.hidden + (t + m) * part.hidden_stride;
            dots_of_rows<W>(R, M, hidden, w, part.neurons, out);
            for (int m = 0; m < M; m++)
                for (int r = 0; r < R; r++) y[part.token_at(t + m) * layer.hidden_size + d + r] += out[m][r];
        }
    }
}

// How many neurons, or rows, a thread takes at a time: long pieces stream faster, short ones end together.
INLINE int64_t block_of(int64_t total, int threads) {
    const int64_t block = total / (BLOCKS_PER_THREAD * threads) / MIN_BLOCK * MIN_BLOCK;
    return block < MIN_BLOCK ? MIN_BLOCK : block > MAX_BLOCK ? MAX_BLOCK : block;
}

// x as activations: as it is, or this thread's share of it widened into `own`.
template <class W>
INLINE const Activations<W> *as_activations(const W *x, Activations<W> *own, int64_t count, int me, int team) {
    if constexpr (sizeof(W) == sizeof(Activations<W>)) return x;
    else {
        for (int64_t i = count * me / team; i < count * (me + 1) / team; i++) own[i] = widen(x[i]);
        return own;
    }
}

template <class W>
int run_layer(const Layer &layer, const W *x_in, int64_t T, const int64_t *given_ids, const float *given_weights,
              W *y_out, int threads) {
    using A = Activations<W>;
    const int64_t D = layer.hidden_size, N = layer.num_experts, H = layer.expert_size, S = layer.shared_size;
    const int64_t K = layer.top_k, P = T * K;
    const bool everyone = K == N;  // then hidden is [T, F] and one product with all of `down`
    constexpr bool widens = sizeof(A) != sizeof(W), narrows = sizeof(W) != sizeof(float);
    float *y, *sums, *logits, *weights, *weight;
    A *x_own, *hidden, *shared_hidden;
    int32_t *ids, *token;
    int64_t *starts;
    Part<W> *parts;
    Arena arena;
    arena.plan(&hidden, everyone ? T * (S + N * H) : P * H);
    arena.plan(&shared_hidden, everyone ? 0 : T * S);
    arena.plan(&parts, N + 1);
    arena.plan(&logits, everyone ? 0 : N * TILE_TOKENS * threads);
    arena.plan(&ids, P), arena.plan(&token, P), arena.plan(&weights, P), arena.plan(&weight, P);
    arena.plan(&starts, N + 2);
    arena.plan(&x_own, widens ? T * D : 0), arena.plan(&y, narrows ? T * D : 0);
    const bool sums_fit = layer.down_column_stride != 1 && T * D * threads <= MAX_SUMS;
    arena.plan(&sums, sums_fit ? T * D * threads : 0);
    if (!arena.allocate()) return NO_MEMORY;
    if constexpr (!narrows) y = y_out;
    int64_t part_count = 0, total = 0, next = 0;
    bool unknown = false;  // some expert that was asked for
    // A few logits take less time than a barrier after them.
    const bool alone = !everyone && K && !given_ids && T <= TILE_TOKENS && N * D <= 8192;

    auto add_part = [&](const void *gate_up, int64_t neurons, int64_t column, int64_t tokens, const int32_t *own,
                        const float *weight_of, A *into) {
        const W *gate = static_cast<const W *>(gate_up);
        const int64_t stride = everyone ? S + N * H : neurons;
        parts[part_count++] = {gate, gate + neurons * D, neurons, column, tokens, own, weight_of, into, stride, total};
        total += neurons;
    };
    auto add_parts = [&] {
        if (S) add_part(layer.shared_gate_up, S, 0, T, nullptr, nullptr, everyone ? hidden : shared_hidden);
        if (!everyone) group(layer, P, ids, weights, starts, token, weight);
        for (int64_t e = 0; e < N && K; e++) {
            const void *gate_up = static_cast<const W *>(layer.gate_up) + e * 2 * H * D;
            const int64_t column = S + e * H;
            if (everyone) add_part(gate_up, H, column, T, nullptr, nullptr, hidden + column);
            else if (const int64_t start = starts[e], count = starts[e + 1] - start; count)
                add_part(gate_up, H, column, count, token + start, weight + start, hidden + start * H);
        }
    };

#pragma omp parallel num_threads(threads)
    {
        const int me = omp_get_thread_num(), team = omp_get_num_threads();
        const A *x = as_activations<W>(x_in, x_own, T * D, me, team);
        if (widens) {
#pragma omp barrier
        }
        if (!everyone && K && !alone) {
            if (given_ids) {
                for (int64_t p = P * me / team; p < P * (me + 1) / team; p++) {
                    ids[p] = int32_t(given_ids[p]), weights[p] = given_weights[p];
                    if (given_ids[p] < 0 || given_ids[p] >= N) __atomic_store_n(&unknown, true, __ATOMIC_RELAXED);
                }
            } else {
                const int64_t tiles = (T + TILE_TOKENS - 1) / TILE_TOKENS;
                for (int64_t tile = tiles * me / team; tile < tiles * (me + 1) / team; tile++) {
                    const int64_t t = tile * TILE_TOKENS;
                    choose<W>(layer, x + t * D, at_most(T - t, TILE_TOKENS), logits + me * TILE_TOKENS * N, ids + t * K,
                              weights + t * K);
                }
            }
#pragma omp barrier
        }
#pragma omp single
        {
            if (alone) choose<W>(layer, x, int(T), logits, ids, weights);
            if (!unknown) add_parts();
        }
        const int64_t block = block_of(total, team);
        int64_t p = 0;
        for (int64_t n; (n = __atomic_fetch_add(&next, block, __ATOMIC_RELAXED)) < total;)
            for (const int64_t end = n + block < total ? n + block : total; n < end;) {  // perhaps of several parts
                while (p + 1 < part_count && parts[p + 1].first_neuron <= n) p++;
                const int64_t first = n - parts[p].first_neuron, left = parts[p].neurons - first;
                const int neurons = int(left < end - n ? left : end - n);
                gate_up_block<W>(layer, parts[p], first, neurons, x);
                n += neurons;
            }
#pragma omp barrier
        const Part<W> all = {nullptr, nullptr, S + N * H, 0, T, nullptr, nullptr, hidden, S + N * H, 0};
        const Part<W> *down_parts = everyone ? &all : parts;
        const int64_t down_count = everyone ? 1 : part_count;
        const int64_t vectors = (D + LANES - 1) / LANES, from = vectors * me / team * LANES;
        const int64_t end = vectors * (me + 1) / team * LANES, to = end < D ? end : D;
        if (sums_fit && P + (S ? T : 0) <= FEW_TOKENS * part_count) {
            // Few tokens wait for memory: every thread reads columns of its own, from end to end.
            float *own = sums + me * T * D;
            memset(own, 0, T * D * sizeof *own);
            for (int64_t part = 0; part < down_count; part++) {
                const int64_t start = down_parts[part].first_neuron, stop = start + down_parts[part].neurons;
                const int64_t first = total * me / team, last = total * (me + 1) / team;
                const int64_t begin = first > start ? first : start, finish = last < stop ? last : stop;
                if (begin < finish) down_of_neurons<W>(layer, down_parts[part], own, begin - start, finish - start);
            }
#pragma omp barrier
            for (int64_t t = 0; t < T; t++)
                for (int64_t d = from; d < to; d++) {
                    float sum = 0;
                    for (int thread = 0; thread < team; thread++) sum += sums[(thread * T + t) * D + d];
                    narrow(sum, y_out + t * D + d);
                }
        } else if (from < to) {
            // Every thread owns a range of outputs: no two add to the same one.
            for (int64_t t = 0; t < T; t++) memset(y + t * D + from, 0, (to - from) * sizeof *y);
            for (int64_t part = 0; part < down_count; part++)
                if (layer.down_column_stride == 1) down_rows<W>(layer, down_parts[part], y, from, to);
                else down_columns<W>(layer, down_parts[part], y, from, to);
            for (int64_t t = 0; t < T && narrows; t++)
                for (int64_t d = from; d < to; d++) narrow(y[t * D + d], y_out + t * D + d);
        }
    }
    return unknown ? NO_SUCH_EXPERT : 0;
}

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
#pragma omp parallel num_threads(threads)
    {
        const A *x = as_activations<W>(x_in, x_own, T * inputs, omp_get_thread_num(), omp_get_num_threads());
        if (widens) {
#pragma omp barrier
        }
        const int64_t block = block_of(outputs, omp_get_num_threads());
        for (int64_t start; (start = __atomic_fetch_add(&next, block, __ATOMIC_RELAXED)) < outputs;) {
            const int64_t end = start + block < outputs ? start + block : outputs;
            for (int64_t t = 0; t < T; t += TILE_TOKENS) {
                const int M = at_most(T - t, TILE_TOKENS);
                const A *rows[TILE_TOKENS];
                for (int m = 0; m < M; m++) rows[m] = x + (t + m) * inputs;
                for (int64_t o = start; o < end; o += TILE_ROWS) {
                    const int R = at_most(end - o, TILE_ROWS);
                    const W *w[TILE_ROWS];
                    float out[TILE_TOKENS][TILE_ROWS];
                    for (int r = 0; r < R; r++) w[r] = weight + (o + r) * row_stride;
                    dots_of_rows<W>(R, M, rows, w, inputs, out);
                    for (int m = 0; m < M; m++)
                        for (int r = 0; r < R; r++)
                            narrow(out[m][r] + (bias ? widen(bias[o + r]) : 0.f), y + (t + m) * outputs + o + r);
                }
            }
        }
    }
    return 0;
}

}  // namespace

// Both return 0, or one of the faults above.
extern "C" int factorctl_ffn(const Layer *layer, const void *x, int64_t tokens, const int64_t *ids,
                             const float *weights, void *y, int threads) {
    auto run = [&](auto weight) {
        using W = decltype(weight);
        return run_layer(*layer, static_cast<const W *>(x), tokens, ids, weights, static_cast<W *>(y), threads);
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
