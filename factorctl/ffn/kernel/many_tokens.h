// Products of many tokens, which wait for arithmetic: weights are packed into panels, and a panel serves every token.
//
// A panel holds the weights of up to WIDTH outputs, unit after unit of inputs, each unit for all outputs. So tiles of
// sums need no adding up across lanes. While they multiply, they ask memory for the weights of the next panel.

#pragma once

#include "vectors.h"

namespace {

constexpr int PANEL_VECTORS = 2, WIDTH = PANEL_VECTORS * LANES;
constexpr int TILE_TOKENS = REGISTERS == 32 ? 12 : 6;  // whose sums with a panel fit the vector registers
constexpr int SINGLE_VECTOR = LANES < 8 ? 0 : LANES;   // outputs that need one vector only; eight are packed at a time
constexpr int64_t DEPTH = 1024;                        // inputs of a panel that should stay in L2 beside the tokens
constexpr int PACKED_UNITS = 32;                       // of a row that are read in one go

// Floats of memory for a panel of so many inputs; packing may fill a few units more than there are.
INLINE int64_t panel_size(int64_t inputs) { return (inputs + 4) * WIDTH; }

// Elements between the rows of activations that a tile reads in step: an odd number of cache lines, because rows that
// lie a multiple of 4096 bytes apart would all want the same few places in L1.
template <class A> int64_t spread(int64_t width) {
    constexpr int64_t line = LINE_BYTES / sizeof(A);
    return (((width + line - 1) / line) | 1) * line;
}

// A cache line for every unit of inputs, to ask memory for: units 16 apart lie `far` bytes apart, neighbours `near`.
struct Lines {
    const void *first;
    int64_t near, far;
    INLINE void ask(int64_t unit) const {
        ask_memory(static_cast<const char *>(first) + (unit & 15) * near + (unit >> 4) * far);
    }
};

// The weights of the next panel: two lines for every unit. They are asked for while this one serves its first two
// tiles, or while it is packed and serves its only tile.
struct Ahead {
    const void *halves[2];
    int64_t near, far;

    static INLINE Ahead nothing(const float *at) { return {{at, at}, 0, 0}; }
    // Of rows in one piece: half of them here, half there.
    template <class W> static INLINE Ahead of_pieces(const W *here, const W *there) {
        return {{here, there}, LINE_BYTES, 16 * LINE_BYTES};
    }
    // Of WIDTH rows, `stride` apart.
    template <class W> static INLINE Ahead of_rows(const W *rows, int64_t stride) {
        return {{rows, rows + LANES * stride}, stride * int64_t(sizeof(W)), LINE_BYTES};
    }
    // Of WIDTH outputs, whose inputs lie `stride` apart.
    template <class W> static INLINE Ahead of_columns(const W *columns, int64_t stride) {
        constexpr bool pairs = UNIT<Activations<W>> == 2;
        const int64_t unit = stride * int64_t(sizeof(W)) * UNIT<Activations<W>>;
        return {{columns, columns + (pairs ? stride : LANES)}, unit, 16 * unit};
    }

    INLINE Lines while_packing(const Tiles &tiles) const { return half(tiles.count == 1 ? 0 : 2); }
    INLINE Lines during(int64_t tile, const Tiles &tiles) const { return half(tiles.count == 1 ? 1 : tile); }

  private:
    INLINE Lines half(int64_t i) const { return i < 2 ? Lines{halves[i], near, far} : Lines{halves[0], 0, 0}; }
};

// ---- packing --------------------------------------------------------------------------------------------------------

// Four units of a row, of which `left` inputs exist; widened where activations are.
INLINE Four four_units(const float *w, int64_t left) {
    if (left >= 4) return read<Four>(w);
    Four units = {};
    for (int i = 0; i < left; i++) units[i] = w[i];
    return units;
}
INLINE Four four_units(const Bfloat16 *w, int64_t left) {
    Four units = {};
    if constexpr (UNIT<Activations<Bfloat16>> == 2) memcpy(&units, w, left >= 8 ? 16 : left * 2);
    else
        for (int i = 0; i < 4 && i < left; i++) units[i] = widen(w[i]);
    return units;
}

using Eight = float __attribute__((vector_size(32)));

// Four units of eight rows, turned over: to[u * stride + r] is unit u of row r; `read` gives those of one row.
template <class Read> INLINE void transpose(float *to, int64_t stride, Read read) {
    auto rows = [&](int r) { return __builtin_shufflevector(read(r), read(r + 4), 0, 1, 2, 3, 4, 5, 6, 7); };
    const Eight p = rows(0), q = rows(1), r = rows(2), s = rows(3);
    const Eight a = __builtin_shufflevector(p, q, 0, 8, 1, 9, 4, 12, 5, 13);
    const Eight b = __builtin_shufflevector(r, s, 0, 8, 1, 9, 4, 12, 5, 13);
    const Eight c = __builtin_shufflevector(p, q, 2, 10, 3, 11, 6, 14, 7, 15);
    const Eight d = __builtin_shufflevector(r, s, 2, 10, 3, 11, 6, 14, 7, 15);
    auto put = [&](int u, Eight unit) { write(to + u * stride, unit); };
    put(0, __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13));
    put(1, __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15));
    put(2, __builtin_shufflevector(c, d, 0, 1, 8, 9, 4, 5, 12, 13));
    put(3, __builtin_shufflevector(c, d, 2, 3, 10, 11, 6, 7, 14, 15));
}

// A panel of C vectors from `count` rows of weights, each contiguous; other outputs are zero.
template <class W, int C>
void pack_rows(const W *const *rows, int count, int64_t inputs, float *panel, Lines next) {
    constexpr int E = UNIT<Activations<W>>;
    const int64_t whole = inputs / (4 * E) * 4, units = units_of<Activations<W>>(inputs);
    auto unit = [&](int r, int64_t u, int64_t left) { return r < count ? four_units(rows[r] + u * E, left) : Four{}; };
    for (int64_t start = 0; start < whole; start += PACKED_UNITS) {
        for (int64_t u = start; u < whole && u < start + PACKED_UNITS; u++) next.ask(u);
        for (int r = 0; r < C * LANES; r += 8)
            for (int64_t u = start; u < whole && u < start + PACKED_UNITS; u += 4)
                transpose(panel + u * C * LANES + r, C * LANES, [&](int i) { return unit(r + i, u, 4 * E); });
    }
    for (int r = 0; r < C * LANES && whole < units; r += 8)
        transpose(panel + whole * C * LANES + r, C * LANES,
                  [&](int i) { return unit(r + i, whole, inputs - whole * E); });
}

// A panel of C vectors from inputs that lie `stride` apart, `count` outputs of each in one piece; others are zero.
template <class W, int C>
void pack_columns(const W *w, int64_t stride, int count, int64_t inputs, float *panel, Lines next) {
    constexpr int E = UNIT<Activations<W>>;
    for (int64_t i = 0; i < inputs; i += E, panel += C * LANES) {
        const int left = at_most(inputs - i, E);
        const W *from = w + i * stride;
        int64_t apart = stride;
        W some[E][WIDTH] = {};
        if (count < C * LANES) {
            for (int e = 0; e < left; e++) memcpy(some[e], from + e * stride, count * sizeof(W));
            from = some[0], apart = WIDTH;
        }
        next.ask(i / E);
        for (int l = 0; l < C * LANES; l += LANES) store(panel + l, unit_of(from + l, apart, left));
    }
}

// ---- multiplying ----------------------------------------------------------------------------------------------------

// out[m][0 .. C vectors) += x[m] . panel
template <class A, int C, int M>
INLINE void panel_tile(const A *const *x, const float *panel, int64_t inputs, Lines next, float *const *out) {
    Vector sums[M][C];
    for (int m = 0; m < M; m++)
        for (int c = 0; c < C; c++) sums[m][c] = load(out[m] + c * LANES);
    auto add = [&](int64_t u, int left) {
        Vector w[C];
        for (int c = 0; c < C; c++) w[c] = load(panel + (u * C + c) * LANES);
        for (int m = 0; m < M; m++) {
            const Vector factor = unit_at(x[m] + u * UNIT<A>, left);
            for (int c = 0; c < C; c++) add_unit(A(), sums[m][c], factor, w[c]);
        }
    };
    const int64_t whole = inputs / UNIT<A>;
    for (int64_t u = 0; u < whole; u++) {
        next.ask(u);
        add(u, UNIT<A>);
    }
    if (whole * UNIT<A> < inputs) add(whole, 1);
    for (int m = 0; m < M; m++)
        for (int c = 0; c < C; c++) store(out[m] + c * LANES, sums[m][c]);
}

// For a tile of more than FEW_TOKENS tokens, which is never less than half full.
template <class A, int C, int M = TILE_TOKENS>
void multiply_panel(int tokens, const A *const *x, const float *panel, int64_t inputs, Lines next, float *const *out) {
    if (tokens == M) return panel_tile<A, C, M>(x, panel, inputs, next, out);
    if constexpr (M > TILE_TOKENS / 2) multiply_panel<A, C, M - 1>(tokens, x, panel, inputs, next, out);
}

}  // namespace
