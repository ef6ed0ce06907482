// What a layer is made of, and the tokens that it is given.
//
// T tokens, D hidden size, N experts of H neurons, S shared neurons, K experts chosen per token, P = T*K pairs.

#pragma once

#include "few_tokens.h"
#include "many_tokens.h"
#include "packed_tokens.h"

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

// Activations, token after token.
template <class A> struct Tokens {
    const A *first;
    int64_t stride;
    INLINE const A *operator[](int64_t t) const { return first + t * stride; }
};

}  // namespace
