// SPDX-License-Identifier: Apache-2.0
//
// How dot and mix multiply: numbers one by one, or bfloat16 numbers in pairs, of which a lane holds two and a product
// takes both. Packed rows of pairs lie in memory as rows of floats do, with a pair for a number. Part of kernel.cpp.

#ifndef NEARSIGHT_PAIRS_INL_H
#define NEARSIGHT_PAIRS_INL_H

#include "simd-inl.h"

namespace {

// Of float32, and of bfloat16 where the processor has no products of pairs.
struct Floats {
    static constexpr bool kPaired = false;
    static NEARSIGHT_INLINE Vector multiply_add(Vector a, Vector b, Vector sum) { return sum + a * b; }
    static NEARSIGHT_INLINE Vector spread(const float* p) { return splat(*p); }
    // Which numbers of a vector belong to lanes that see an entry, given each lane's range of entries.
    static NEARSIGHT_INLINE IntVector sees(const int32_t* seen, int entry) { return within(seen, entry); }
    // The same of one lane, which the whole vector belongs to.
    static NEARSIGHT_INLINE IntVector lane_sees(const int32_t* seen, int entry) {
        return -(int32_t)(entry >= seen[0] && entry < seen[kLanes]) - IntVector{};
    }
};

#if defined(__AVX512BF16__)

constexpr bool kHasPairs = true;
constexpr int32_t kFirstOfPair = 0xffff, kSecondOfPair = ~kFirstOfPair;

// Numbers of pairs: the first of each in the low half. An entry is here a pair of them, 2 * entry and the next.
struct Pairs {
    static constexpr bool kPaired = true;
    static NEARSIGHT_INLINE Vector multiply_add(Vector a, Vector b, Vector sum) {
        return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
    static NEARSIGHT_INLINE Vector spread(const float* p) {
        int32_t pair;
        memcpy(&pair, p, sizeof pair);
        return (Vector)(pair - IntVector{});
    }
    static NEARSIGHT_INLINE IntVector sees(const int32_t* seen, int entry) {
        return (within(seen, 2 * entry) & kFirstOfPair) | (within(seen, 2 * entry + 1) & kSecondOfPair);
    }
    static NEARSIGHT_INLINE IntVector lane_sees(const int32_t* seen, int entry) {
        return (Floats::lane_sees(seen, 2 * entry) & kFirstOfPair) |
               (Floats::lane_sees(seen, 2 * entry + 1) & kSecondOfPair);
    }
};

using Products = Pairs;

// Pairs of any numbers, rounded to nearest, ties to even. NaN stays NaN.
NEARSIGHT_INLINE Vector round_pair(Vector first, Vector second) {
    typedef uint16_t Halves __attribute__((vector_size(4 * kLanes)));
    const Halves halves = (Halves)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#define FOUR_PAIRS(k) k, k + 16, k + 1, k + 17, k + 2, k + 18, k + 3, k + 19
    return (Vector)NEARSIGHT_SHUFFLE(halves, halves, NEARSIGHT_EACH_QUAD(FOUR_PAIRS));
#undef FOUR_PAIRS
}

#else

constexpr bool kHasPairs = false;
constexpr int32_t kFirstOfPair = -1;
using Products = Floats;
NEARSIGHT_INLINE Vector round_pair(Vector first, Vector) { return first; }

#endif

// Pairs of numbers that are bfloat16 already.
NEARSIGHT_INLINE Vector pair_up(Vector first, Vector second) {
    return (Vector)((BitVector)first >> 16 | (BitVector)second);
}

// Planes of `lanes` lanes become planes of pairs of neighbouring channels; an odd last one is paired with zeros.
void pair_channels(const float* planes, ptrdiff_t pitch, int64_t channels, ptrdiff_t lanes, float* paired) {
    for (int64_t c = 0; c < channels; c += 2)
        for (ptrdiff_t lane = 0; lane < lanes; lane += kLanes) {
            const float* first = planes + c * pitch + lane;
            const Vector second = c + 1 < channels ? load(first + pitch) : Vector{};
            store(paired + c / 2 * pitch + lane, pair_up(load(first), second));
        }
}

// Every number is paired with that which lies `distance` behind it.
void pair_at_distance(const float* numbers, int64_t count, ptrdiff_t distance, float* paired) {
    for (int64_t i = 0; i < count; i += kLanes)
        store(paired + i, pair_up(load(numbers + i), load(numbers + i + distance)));
}

}  // namespace

#endif
