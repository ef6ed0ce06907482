// What some neurons of a layer, of one expert or shared, compute for the tokens that use them.

#pragma once

#include "layer.h"

namespace {

constexpr int MAX_FEW = 2 * FEW_TOKENS;  // tokens that read rows as they lie
constexpr int MAX_BLOCK = 64;            // neurons, or rows, that a thread takes at most
constexpr int64_t IN_L1 = 1024;          // outputs that few tokens sum up at a time

// Neurons that run together, and the tokens that use them.
template <class W> struct Part {
    const W *gate, *up;
    int64_t neurons, first_column, tokens;
    const int32_t *token;    // null: all tokens in order
    const float *weight;     // null: one
    Activations<W> *hidden;  // [tokens, neurons]
    int64_t hidden_stride, first_neuron;  // among those of all parts
    float *packed;           // panels of its tokens; null: its weights are packed, or nothing

    INLINE int64_t token_at(int64_t i) const { return token ? token[i] : i; }
    INLINE bool has_few() const { return tokens <= MAX_FEW; }
};

// Some neurons of a part; none when `neurons` is 0.
template <class W> struct Piece {
    const Part<W> *part;
    int64_t first;
    int neurons;
};

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

// into[r][t] = rows[r] . token t, for the tokens of a batch and then those left over; `next` are the rows that come next.
template <class W>
void multiply_batch(const Part<W> &part, const Batch &batch, const W *rows, int count, int64_t inputs, const W *next,
                    const Activations<W> *const *left_over, int left, float (*into)[MAX_BATCH]) {
    for (int first = 0; first < count; first += ROWS) {
        const int R = at_most(count - first, ROWS);
        const W *w[ROWS], *after = first + ROWS < count ? rows + (first + ROWS) * inputs : next;
        for (int r = 0; r < ROWS; r++) w[r] = rows + (first + (r < R ? r : 0)) * inputs;  // too few: one of them again
        for (int64_t p = 0; p < batch.panels.count; p++) {
            const float *panel = part.packed + batch.start(p) * packed_size<Activations<W>>(inputs);
            multiply_tokens<W>(batch.vectors(p), w, panel, inputs, p ? w[0] : after,
                               into[first] + batch.start(p) - batch.first);
        }
        for (int r = 0; r < R && left; r += TILE_ROWS) {
            float out[FEW_TOKENS][TILE_ROWS];
            dots_of_rows<W>(at_most(R - r, TILE_ROWS), left, left_over, w + r, inputs, out);
            for (int m = 0; m < left; m++)
                for (int i = 0; i < TILE_ROWS && r + i < R; i++) into[first + r + i][batch.packed + m] = out[m][i];
        }
    }
}

// The same for packed tokens and up to LANES neurons.
template <class W>
void gate_up_packed(const Layer &layer, const Piece<W> &piece, const Piece<W> &following, Tokens<Activations<W>> x) {
    const Part<W> &part = *piece.part;
    const int64_t D = layer.hidden_size, packed = packed_count(part.tokens);
    const W *gate = part.gate + piece.first * D, *up = part.up + piece.first * D;
    const W *next = following.part ? following.part->gate + following.first * D : gate;
    float gates[LANES][MAX_BATCH], ups[LANES][MAX_BATCH];
    for (int64_t first = 0; first < packed; first += BATCH) {
        const Batch batch(first, packed);
        const bool last = first + BATCH >= packed;
        const int left = last && part.tokens > packed ? int(part.tokens - packed) : 0;
        const Activations<W> *left_over[FEW_TOKENS];
        for (int m = 0; m < left; m++) left_over[m] = x[part.token_at(packed + m)];
        multiply_batch<W>(part, batch, gate, piece.neurons, D, up, left_over, left, gates);
        multiply_batch<W>(part, batch, up, piece.neurons, D, next, left_over, left, ups);
        const int64_t end = last ? part.tokens : first + batch.packed;
        for (int64_t t = first; t < end; t += LANES) {
            const int M = at_most(end - t, LANES);
            Vector weight = splat(1.f);
            if (part.weight) memcpy(&weight, part.weight + t, M * sizeof(float));
            float values[LANES][LANES];  // [neuron][token]
            for (int h = 0; h < piece.neurons; h++)
                store(values[h], activate(load(gates[h] + t - first), layer.activation) * load(ups[h] + t - first) *
                                     weight);
            for (int m = 0; m < M; m++)
                for (int h = 0; h < piece.neurons; h++)
                    narrow(values[h][m], part.hidden + (t + m) * part.hidden_stride + piece.first + h);
        }
    }
}

// The same for packed weights and up to LANES neurons: their gates and ups share a panel of C vectors.
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

}  // namespace
