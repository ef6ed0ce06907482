// Which experts each token gets, with which weights: logits, the K best, and pairs sorted by expert.

#pragma once

#include "layer.h"

namespace {

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

}  // namespace
