// Products of few tokens, which wait for their weights: each is read once, as it lies in memory.

#pragma once

#include "vectors.h"

namespace {

constexpr int TILE_ROWS = 4;
constexpr int FEW_TOKENS = REGISTERS == 32 ? 6 : 3;  // whose sums with TILE_ROWS rows fit the vector registers
constexpr int ROW_BY_ROW = 2;                        // tokens up to which memory alone counts
template <class W> constexpr int64_t SOON = 4096 / sizeof(W);  // how far ahead of a row to ask memory for what follows

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
// For one or two row after row, because memory streams fastest in one piece; for more, rows share the loads of x.
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
                ask_memory(w[r] + i + SOON<W>);
                ask_memory(w[r] + i + E + SOON<W>);
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
        const int64_t next = R > 1 ? R * (w[1] - w[0]) : 0;  // rows to ask memory for meanwhile
        for (; i + E <= inputs; i += E) {
            typename Step<W>::Loaded rows[R];
            for (int r = 0; r < R; r++) {
                rows[r] = Step<W>::weights(w[r] + i);
                ask_memory(w[r] + i + next);
            }
            for (int m = 0; m < M; m++) {
                auto token = Step<W>::activations(x[m] + i);
                for (int r = 0; r < R; r++) Step<W>::add(sums[m][r], token, rows[r]);
            }
        }
    }
    for (int m = 0; m < M; m++) {
        write(out[m], sums_of(sums[m][0], sums[m][1], sums[m][2], sums[m][3]));
        for (int64_t rest = i; rest < inputs; rest++)
            for (int r = 0; r < R; r++) out[m][r] += widen(x[m][rest]) * widen(w[r][rest]);
    }
}

template <class W, int R, int M = FEW_TOKENS>
void dots(int tokens, const Activations<W> *const *x, const W *const *w, int64_t inputs, float (*out)[TILE_ROWS]) {
    if (tokens == M) return dot_tile<W, M, R>(x, w, inputs, out);
    if constexpr (M > 1) dots<W, R, M - 1>(tokens, x, w, inputs, out);
}

template <class W, int R = TILE_ROWS>
void dots_of_rows(int rows, int tokens, const Activations<W> *const *x, const W *const *w, int64_t inputs,
                  float (*out)[TILE_ROWS]) {
    if (rows == R) return dots<W, R>(tokens, x, w, inputs, out);
    if constexpr (R > 1) dots_of_rows<W, R - 1>(rows, tokens, x, w, inputs, out);
}

// y[m] += sum over h of a[m][h] * b[h], for R neurons whose `width` elements each lie in one piece.
template <class W, int M, int R>
INLINE void add_rows(const Activations<W> *const *a, const W *b, int64_t stride, int64_t width, float *const *y) {
    using A = Activations<W>;
    constexpr int E = R < UNIT<A> ? R : UNIT<A>, UNITS = R / E;
    Vector factors[UNITS][M];
    for (int u = 0; u < UNITS; u++)
        for (int m = 0; m < M; m++) factors[u][m] = unit_at(a[m] + u * E, E);
    int64_t d = 0;
    for (; d + LANES <= width; d += LANES) {
        Vector units[UNITS];
        for (int u = 0; u < UNITS; u++) units[u] = unit_of(b + u * E * stride + d, stride, E);
        for (int r = 0; r < R; r++) ask_memory(b + (r + R) * stride + d);
        for (int m = 0; m < M; m++) {
            Vector sum = load(y[m] + d);
            for (int u = 0; u < UNITS; u++) add_unit(A(), sum, factors[u][m], units[u]);
            store(y[m] + d, sum);
        }
    }
    for (; d < width; d++)
        for (int m = 0; m < M; m++)
            for (int r = 0; r < R; r++) y[m][d] += widen(a[m][r]) * widen(b[r * stride + d]);
}

template <class W, int M = FEW_TOKENS>
void add_neurons(int tokens, const Activations<W> *const *a, const W *b, int64_t stride, int64_t neurons, int64_t width,
                 float *const *y) {
    if (tokens == M) {
        // The more neurons at a time, the fewer visits to y; their factors have to stay in registers.
        constexpr int R = M <= ROW_BY_ROW ? 1 : REGISTERS / 16 * 2 * UNIT<Activations<W>>;
        int64_t h = 0;
        const Activations<W> *at[M];
        auto add = [&](auto rows) {
            for (int m = 0; m < M; m++) at[m] = a[m] + h;
            add_rows<W, M, decltype(rows)::value>(at, b + h * stride, stride, width, y);
            h += decltype(rows)::value;
        };
        while (h + R <= neurons) add(Constant<R>());
        while (h < neurons) add(Constant<1>());
    } else if constexpr (M > 1) {
        add_neurons<W, M - 1>(tokens, a, b, stride, neurons, width, y);
    }
}

}  // namespace
