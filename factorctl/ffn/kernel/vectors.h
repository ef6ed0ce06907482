// Vectors of floats, in the compiler's own notation, so that one text serves AVX-512, AVX2 and NEON.
//
// Weights W are float or bfloat16, sums are float. bfloat16 weights meet bfloat16 activations where the processor
// multiplies pairs of them, else both are widened: activations next to W are kept as Activations<W>.

#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif
constexpr int LANES = VECTOR_BYTES / 4;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif
constexpr int LINE_BYTES = 64;  // of a cache line

using Vector = float __attribute__((vector_size(VECTOR_BYTES)));
using Integers = int32_t __attribute__((vector_size(VECTOR_BYTES)));
using Unsigned = uint32_t __attribute__((vector_size(VECTOR_BYTES)));
using Halves = uint16_t __attribute__((vector_size(VECTOR_BYTES / 2)));
using Four = float __attribute__((vector_size(16)));
using Bfloat16 = uint16_t;

#define INLINE inline __attribute__((always_inline))

template <int VALUE> struct Constant { static constexpr int value = VALUE; };

// What activations are kept as next to weights of type W.
template <class W> struct Kept { using Type = float; };
#if defined(__AVX512BF16__)
template <> struct Kept<Bfloat16> { using Type = Bfloat16; };
#endif
template <class W> using Activations = typename Kept<W>::Type;

// Vectors from and to memory that need not be aligned.
template <class V> INLINE V read(const void *p) {
    V vector;
    memcpy(&vector, p, sizeof vector);
    return vector;
}
template <class V> INLINE void write(void *p, V vector) { memcpy(p, &vector, sizeof vector); }

INLINE Vector load(const float *p) { return read<Vector>(p); }
INLINE Unsigned whole_numbers(const Bfloat16 *p) {  // that have the same bits
    return __builtin_convertvector(read<Halves>(p), Unsigned);
}
INLINE Vector load(const Bfloat16 *p) { return (Vector)(whole_numbers(p) << 16); }
INLINE void store(float *p, Vector v) { write(p, v); }
INLINE Vector splat(float value) { return value - Vector{}; }

INLINE void ask_memory(const void *p) { __builtin_prefetch(p, 0, 2); }  // into L2: L1 has no room to wait in

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

// Tokens in tiles of about equal size, none larger than `most`.
struct Tiles {
    int64_t tokens, count;
    Tiles(int64_t tokens, int most) : tokens(tokens), count((tokens + most - 1) / most) {}
    INLINE int64_t start(int64_t tile) const { return tokens * tile / count; }
    INLINE int size(int64_t tile) const { return int(start(tile + 1) - start(tile)); }
};

// ---- units ----------------------------------------------------------------------------------------------------------
//
// Four bytes of inputs: a float, or a pair of bfloat16.

template <class A> constexpr int UNIT = 4 / int(sizeof(A));  // inputs in a unit
template <class A> INLINE int64_t units_of(int64_t inputs) { return (inputs + UNIT<A> - 1) / UNIT<A>; }

// A token's unit of inputs for all lanes; `left` inputs of it exist.
INLINE Vector unit_at(const float *x, int) { return splat(*x); }
INLINE Vector unit_at(const Bfloat16 *x, int left) {
    uint32_t pair = 0;
    memcpy(&pair, x, left < 2 ? 2 : 4);
    return (Vector)(Unsigned{} + pair);
}

INLINE void add_unit(float, Vector &sums, Vector x, Vector w) { sums += x * w; }
#if defined(__AVX512BF16__)
INLINE void add_unit(Bfloat16, Vector &sums, Vector x, Vector w) {
    sums = (Vector)_mm512_dpbf16_ps((__m512)sums, (__m512bh)x, (__m512bh)w);
}
#endif

// A unit of weights for all lanes: the inputs lie `stride` apart, `left` of them exist.
INLINE Vector unit_of(const float *w, int64_t, int) { return load(w); }
INLINE Vector unit_of(const Bfloat16 *w, int64_t stride, int left) {
    if constexpr (UNIT<Activations<Bfloat16>> == 1) return load(w);
    else return (Vector)(left < 2 ? whole_numbers(w) : whole_numbers(w) | whole_numbers(w + stride) << 16);
}

}  // namespace
