// Products of many tokens with more neurons: the tokens are packed, side by side in the lanes of vectors, and weights are
// read as they lie in memory.
//
// A panel holds up to TOKEN_VECTORS vectors of tokens, unit after unit of inputs. A few tokens that would leave the last
// vector mostly empty share passes over rows instead: few_tokens.h.

#pragma once

#include "few_tokens.h"
#include "many_tokens.h"

namespace {

constexpr int ROWS = REGISTERS == 32 && LANES >= 8 ? 8 : 4;       // of weights that meet a panel at a time
constexpr int TOKEN_VECTORS = (REGISTERS == 32 ? 24 : 8) / ROWS;  // whose sums with ROWS fit the vector registers
constexpr int GROUP = LANES < 8 ? 8 : LANES;                      // tokens that are packed at a time
constexpr int GROUP_VECTORS = GROUP / LANES;
constexpr int BATCH = 2 * TOKEN_VECTORS * LANES;  // tokens that meet a piece's rows in one go
constexpr int MAX_BATCH = BATCH + GROUP;          // with those that are left over

// Of so many tokens, how many are packed: whole groups, the last one padded if more than a few would be left over.
INLINE int64_t packed_count(int64_t tokens) {
    const int64_t rest = tokens % GROUP;
    return rest > FEW_TOKENS ? tokens - rest + GROUP : tokens - rest;
}
// Floats of memory for each of them; packing fills four units at a time.
template <class A> INLINE int64_t packed_size(int64_t inputs) { return (units_of<A>(inputs) + 3) / 4 * 4; }

// Up to BATCH of the packed tokens, from the token `first` on, in panels of about equal width.
struct Batch {
    int64_t first, packed;
    Tiles panels;  // counted in groups
    Batch(int64_t first, int64_t of)
        : first(first), packed(of - first < BATCH ? of - first : BATCH),
          panels(packed / GROUP, TOKEN_VECTORS / GROUP_VECTORS) {}
    INLINE int64_t start(int64_t panel) const { return first + panels.start(panel) * GROUP; }
    INLINE int vectors(int64_t panel) const { return panels.size(panel) * GROUP_VECTORS; }
};

template <class A, int C = TOKEN_VECTORS>
void pack_tokens(int vectors, const A *const *tokens, int count, int64_t inputs, float *panel) {
    if (vectors == C) return pack_rows<A, C>(tokens, count, inputs, panel, Lines{panel, 0, 0});
    if constexpr (C > GROUP_VECTORS) pack_tokens<A, C - GROUP_VECTORS>(vectors, tokens, count, inputs, panel);
}

// A row's unit of weights for all lanes; `left` inputs of it exist.
INLINE Vector weight_unit_at(const float *w, int) { return splat(*w); }
INLINE Vector weight_unit_at(const Bfloat16 *w, int left) {
    if constexpr (UNIT<Activations<Bfloat16>> == 1) return splat(widen(*w));
    else return unit_at(w, left);
}

// out[r] = w[r] . tokens for ROWS rows and C vectors of tokens; memory is asked for the rows from `next` on.
template <class W, int C>
INLINE void token_tile(const W *const *w, const float *panel, int64_t inputs, const W *next, float *out) {
    using A = Activations<W>;
    Vector sums[ROWS][C] = {};
    auto add = [&](int64_t u, int left) {
        Vector x[C];
        for (int c = 0; c < C; c++) x[c] = load(panel + (u * C + c) * LANES);
        for (int r = 0; r < ROWS; r++) {
            const Vector factor = weight_unit_at(w[r] + u * UNIT<A>, left);
            for (int c = 0; c < C; c++) add_unit(A(), sums[r][c], x[c], factor);
        }
    };
    const int64_t whole = inputs / UNIT<A>;
    for (int64_t u = 0; u < whole; u++) {
        ask_memory(next + u * ROWS * UNIT<A>);
        add(u, UNIT<A>);
    }
    if (whole * UNIT<A> < inputs) add(whole, 1);
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < C; c++) store(out + r * MAX_BATCH + c * LANES, sums[r][c]);
}

template <class W, int C = TOKEN_VECTORS>
void multiply_tokens(int vectors, const W *const *w, const float *panel, int64_t inputs, const W *next, float *out) {
    if (vectors == C) return token_tile<W, C>(w, panel, inputs, next, out);
    if constexpr (C > GROUP_VECTORS) multiply_tokens<W, C - GROUP_VECTORS>(vectors, w, panel, inputs, next, out);
}

}  // namespace
