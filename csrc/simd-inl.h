// SPDX-License-Identifier: Apache-2.0
//
// A vector of floats as wide as the instruction set's registers, by compiler vector extensions. Included by kernel.cpp
// only; everything here has internal linkage, since the same names mean other code in each instruction set's object.

#ifndef NEARSIGHT_SIMD_INL_H
#define NEARSIGHT_SIMD_INL_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__SSE__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define NEARSIGHT_LANES 16
#define NEARSIGHT_EACH_QUAD(f) f(0), f(4), f(8), f(12)
#elif defined(__AVX__)
#define NEARSIGHT_LANES 8
#define NEARSIGHT_EACH_QUAD(f) f(0), f(4)
#else
#define NEARSIGHT_LANES 4
#define NEARSIGHT_EACH_QUAD(f) f(0)
#endif

#define NEARSIGHT_INLINE inline __attribute__((always_inline))
#define NEARSIGHT_APART __attribute__((noinline))

namespace {

constexpr int kLanes = NEARSIGHT_LANES;
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVector __attribute__((vector_size(4 * kLanes)));
typedef uint32_t BitVector __attribute__((vector_size(4 * kLanes)));  // for sums and shifts that may wrap around
typedef float UnalignedVector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t UnalignedIntVector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef float Quad __attribute__((vector_size(16)));
typedef float UnalignedQuad __attribute__((vector_size(16), aligned(4), may_alias));
typedef uint16_t ShortQuad __attribute__((vector_size(8)));
typedef uint32_t WordQuad __attribute__((vector_size(16)));
typedef uint16_t Bfloat16;

// Clang has __builtin_shufflevector only, GCC below 12 __builtin_shuffle only, and GCC below 9 nothing that converts.
#if defined(__clang__) || __GNUC__ >= 12
#define NEARSIGHT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define NEARSIGHT_QUAD(v, k) __builtin_shufflevector(v, v, 4 * k, 4 * k + 1, 4 * k + 2, 4 * k + 3)
#else
#define NEARSIGHT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype((a) == (b)){__VA_ARGS__})
#define NEARSIGHT_QUAD(v, k) ((const UnalignedQuad*)&(v))[k]
#endif

template <class To, class From>
NEARSIGHT_INLINE To convert(From v) {
#if defined(__clang__) || __GNUC__ >= 9
    return __builtin_convertvector(v, To);
#else
    To converted;
    for (size_t i = 0; i < sizeof(From) / sizeof(v[0]); ++i) converted[i] = v[i];
    return converted;
#endif
}

NEARSIGHT_INLINE Vector load(const float* p) { return *(const UnalignedVector*)p; }
NEARSIGHT_INLINE IntVector load_mask(const int32_t* p) { return *(const UnalignedIntVector*)p; }
// Whether `number` lies in each lane's range: so many firsts, and as many lasts, which lie behind the range.
NEARSIGHT_INLINE IntVector within(const int32_t* ranges, int32_t number) {
    const IntVector numbers = number - IntVector{};
    return (numbers >= load_mask(ranges)) & (numbers < load_mask(ranges + kLanes));
}
NEARSIGHT_INLINE void store(float* p, Vector v) { *(UnalignedVector*)p = v; }
NEARSIGHT_INLINE void add_to(float* target, Vector v) { store(target, load(target) + v); }
NEARSIGHT_INLINE Vector splat(float x) { return x - Vector{}; }
NEARSIGHT_INLINE Vector keep(IntVector mask, Vector v) { return (Vector)((IntVector)v & mask); }
NEARSIGHT_INLINE Vector choose(IntVector mask, Vector yes, Vector no) {
    return (Vector)(((IntVector)yes & mask) | ((IntVector)no & ~mask));
}

// max(a, b), and b when either is not a number.
NEARSIGHT_INLINE Vector maximum(Vector a, Vector b) {
#if defined(__AVX512F__)
    return (Vector)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);  // GCC 12 warns of the plain one
#elif defined(__AVX__)
    return (Vector)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE__)
    return (Vector)_mm_max_ps((__m128)a, (__m128)b);
#else
    return a > b ? a : b;
#endif
}

// min(a, b), and b when either is not a number.
NEARSIGHT_INLINE Vector minimum(Vector a, Vector b) {
#if defined(__AVX512F__)
    return (Vector)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
#elif defined(__AVX__)
    return (Vector)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE__)
    return (Vector)_mm_min_ps((__m128)a, (__m128)b);
#else
    return a < b ? a : b;
#endif
}

// Keeps a value in a register. Without it the compiler folds one unaligned load into every multiplication that uses it,
// and the loads, not the multiplications, become the limit.
NEARSIGHT_INLINE void pin(Vector& v) {
#if defined(__x86_64__)
    __asm__("" : "+v"(v));
#elif defined(__aarch64__)
    __asm__("" : "+w"(v));
#else
    (void)v;
#endif
}

NEARSIGHT_INLINE float sum_lanes(Vector v) {
    float sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += v[i];
    return sum;
}

// 2^t for t <= 127, relative error 1.7e-7; what would be below 2^-126.5 is 0. NaN stays NaN.
#if defined(__AVX512DQ__)
// What is above the integer below, and a multiplication by a power of two, are an instruction each. The polynomial of
// degree 5 is the best on [0, 1) of those that are 1 at 0.
NEARSIGHT_INLINE Vector exp2(Vector t) {
    constexpr int kDown = 1;
    const Vector f = (Vector)_mm512_maskz_reduce_ps(0xffff, (__m512)t, kDown);
    Vector p = splat(0.00186712644f);
    p = p * f + splat(0.00901703723f);
    p = p * f + splat(0.0557998531f);
    p = p * f + splat(0.240164503f);
    p = p * f + splat(0.693151295f);
    p = p * f + splat(1.0f);
    const __mmask16 normal = _mm512_cmp_ps_mask((__m512)t, (__m512)splat(-126.0f), _CMP_NLT_UQ);  // or not a number
    return (Vector)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)t);
}
#else
NEARSIGHT_INLINE Vector exp2(Vector t) {
    t = maximum(splat(-127.0f), t);
    const Vector magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    const Vector rounded = t + magic;
    const Vector f = t - (rounded - magic);
    Vector p = splat(0.00132546026725322f);
    p = p * f + splat(0.009671999141573906f);
    p = p * f + splat(0.05550779402256012f);
    p = p * f + splat(0.24022231996059418f);
    p = p * f + splat(0.6931469440460205f);
    p = p * f + splat(1.0f);
    const BitVector power = ((BitVector)rounded << 23) + 0x3f800000;  // for t = -127 just zero
    return p * (Vector)power;
}
#endif

// Natural logarithm of positive normal numbers, relative error 2.2e-7. NaN stays NaN.
NEARSIGHT_INLINE Vector log_natural(Vector x) {
    const BitVector bits = (BitVector)x;
    // So that the mantissa lies in [sqrt(1/2), sqrt(2)).
    const IntVector exponent = (IntVector)(bits - 0x3f3504f3) >> 23;
    const Vector mantissa = (Vector)(bits - ((BitVector)exponent << 23));
    const Vector s = (mantissa - 1.0f) / (mantissa + 1.0f);  // log(mantissa) = 2 atanh(s)
    const Vector s2 = s * s;
    Vector p = splat(2.0f / 9.0f);
    p = p * s2 + splat(2.0f / 7.0f);
    p = p * s2 + splat(2.0f / 5.0f);
    p = p * s2 + splat(2.0f / 3.0f);
    p = p * s2 + splat(2.0f);
    const Vector log = p * s + convert<Vector>(exponent) * 0.693147180559945f;
    return choose((IntVector)(x == x), log, x);
}

// Four vectors hold four rows of 4 numbers per quad; afterwards quad by quad the columns.
NEARSIGHT_INLINE void transpose_quads(Vector& a, Vector& b, Vector& c, Vector& d) {
#define LOW(k) k, kLanes + k, k + 1, kLanes + k + 1
#define HIGH(k) k + 2, kLanes + k + 2, k + 3, kLanes + k + 3
#define LOW_PAIRS(k) k, k + 1, kLanes + k, kLanes + k + 1
#define HIGH_PAIRS(k) k + 2, k + 3, kLanes + k + 2, kLanes + k + 3
    const Vector ab_low = NEARSIGHT_SHUFFLE(a, b, NEARSIGHT_EACH_QUAD(LOW));
    const Vector ab_high = NEARSIGHT_SHUFFLE(a, b, NEARSIGHT_EACH_QUAD(HIGH));
    const Vector cd_low = NEARSIGHT_SHUFFLE(c, d, NEARSIGHT_EACH_QUAD(LOW));
    const Vector cd_high = NEARSIGHT_SHUFFLE(c, d, NEARSIGHT_EACH_QUAD(HIGH));
    a = NEARSIGHT_SHUFFLE(ab_low, cd_low, NEARSIGHT_EACH_QUAD(LOW_PAIRS));
    b = NEARSIGHT_SHUFFLE(ab_low, cd_low, NEARSIGHT_EACH_QUAD(HIGH_PAIRS));
    c = NEARSIGHT_SHUFFLE(ab_high, cd_high, NEARSIGHT_EACH_QUAD(LOW_PAIRS));
    d = NEARSIGHT_SHUFFLE(ab_high, cd_high, NEARSIGHT_EACH_QUAD(HIGH_PAIRS));
#undef LOW
#undef HIGH
#undef LOW_PAIRS
#undef HIGH_PAIRS
}

NEARSIGHT_INLINE void transpose_quad(Quad& a, Quad& b, Quad& c, Quad& d) {
    const Quad ab_low = NEARSIGHT_SHUFFLE(a, b, 0, 4, 1, 5), ab_high = NEARSIGHT_SHUFFLE(a, b, 2, 6, 3, 7);
    const Quad cd_low = NEARSIGHT_SHUFFLE(c, d, 0, 4, 1, 5), cd_high = NEARSIGHT_SHUFFLE(c, d, 2, 6, 3, 7);
    a = NEARSIGHT_SHUFFLE(ab_low, cd_low, 0, 1, 4, 5);
    b = NEARSIGHT_SHUFFLE(ab_low, cd_low, 2, 3, 6, 7);
    c = NEARSIGHT_SHUFFLE(ab_high, cd_high, 0, 1, 4, 5);
    d = NEARSIGHT_SHUFFLE(ab_high, cd_high, 2, 3, 6, 7);
}

NEARSIGHT_INLINE float load_one(const float* p) { return *p; }
NEARSIGHT_INLINE float load_one(const Bfloat16* p) {
    const uint32_t bits = (uint32_t)*p << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
NEARSIGHT_INLINE Quad load_quad(const float* p) { return *(const UnalignedQuad*)p; }
NEARSIGHT_INLINE Quad load_quad(const Bfloat16* p) {
    ShortQuad bits;
    memcpy(&bits, p, 8);
    return (Quad)(convert<WordQuad>(bits) << 16);
}

NEARSIGHT_INLINE void store_one(float* p, float x) { *p = x; }
NEARSIGHT_INLINE void store_one(Bfloat16* p, float x) {  // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    *p = x == x ? (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : (uint16_t)0x7fc0;
}
NEARSIGHT_INLINE void store_quad(float* p, Quad v) { *(UnalignedQuad*)p = v; }
NEARSIGHT_INLINE void store_quad(Bfloat16* p, Quad v) {
    const WordQuad bits = (WordQuad)v;
    const WordQuad rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const WordQuad number = (WordQuad)(v == v);
    const ShortQuad out = convert<ShortQuad>((rounded & number) | (0x7fc0 & ~number));
    memcpy(p, &out, 8);
}

// As many numbers as a vector has lanes.
NEARSIGHT_INLINE Vector load_vector(const float* p) { return load(p); }
NEARSIGHT_INLINE Vector load_vector(const Bfloat16* p) {
    typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes)));
    typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
    Shorts bits;
    memcpy(&bits, p, sizeof bits);
    return (Vector)(convert<Words>(bits) << 16);
}
NEARSIGHT_INLINE void store_vector(float* p, Vector v) { store(p, v); }
NEARSIGHT_INLINE void store_vector(Bfloat16* p, Vector v) {
    typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes)));
    typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
    const Words bits = (Words)v;
    const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const Words number = (Words)(v == v);
    const Shorts out = convert<Shorts>((rounded & number) | (0x7fc0 & ~number));
    memcpy(p, &out, sizeof out);
}

// Quads `stride` elements apart, side by side. Compilers shuffle where the processor can load in place, so on x86 it is
// spelt out.
template <class T>
NEARSIGHT_INLINE Vector load_quads(const T* p, ptrdiff_t stride) {
#if NEARSIGHT_LANES == 16
    __m512 v = _mm512_castps128_ps512((__m128)load_quad(p));
    v = _mm512_mask_broadcast_f32x4(v, 0x00f0, (__m128)load_quad(p + stride));
    v = _mm512_mask_broadcast_f32x4(v, 0x0f00, (__m128)load_quad(p + 2 * stride));
    v = _mm512_mask_broadcast_f32x4(v, 0xf000, (__m128)load_quad(p + 3 * stride));
    return (Vector)v;
#elif NEARSIGHT_LANES == 8
    return (Vector)_mm256_insertf128_ps(_mm256_castps128_ps256((__m128)load_quad(p)), (__m128)load_quad(p + stride), 1);
#else
    (void)stride;  // one quad is a whole vector
    return load_quad(p);
#endif
}

template <class T>
NEARSIGHT_INLINE void store_quads(T* p, ptrdiff_t stride, Vector v) {
    (void)stride;  // one quad is a whole vector
    store_quad(p, NEARSIGHT_QUAD(v, 0));
#if NEARSIGHT_LANES >= 8
    store_quad(p + stride, NEARSIGHT_QUAD(v, 1));
#endif
#if NEARSIGHT_LANES == 16
    store_quad(p + 2 * stride, NEARSIGHT_QUAD(v, 2));
    store_quad(p + 3 * stride, NEARSIGHT_QUAD(v, 3));
#endif
}

}  // namespace

#endif
