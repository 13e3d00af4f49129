// SPDX-License-Identifier: Apache-2.0
//
// The inner steps: dot and mix, and what tables of relative vectors add. Part of kernel.cpp.

#ifndef NEARSIGHT_STEPS_INL_H
#define NEARSIGHT_STEPS_INL_H

#include "pairs-inl.h"
#include "plan.h"
#include "rows-inl.h"
#include "simd-inl.h"

namespace {

using namespace nearsight;

constexpr int kDotEntries = kRegisters == 32 ? 7 : 4;   // 3 x 7 sums, 3 home and 1 away vectors: 25 registers
constexpr int kMixChannels = kRegisters == 32 ? 8 : 4;  // 3 x 8 sums

// ---- Dot and mix ----------------------------------------------------------------------------------------------------

// An away row as a group sees it.
struct Source {
    const float* away;  // its start
    const Visit* visit;
    int32_t entry_z, order_z;
};

struct DotOperands {
    const float* home;  // first row that takes part
    ptrdiff_t home_row;
    const float* away;  // entry 0
    ptrdiff_t away_pitch, step;
    int64_t channels;  // or pairs of them
    float multiplier;  // pairs: of the sums
    ptrdiff_t ahead;  // to the next row that `dot` will be called for; 0 when there is none
    Prefetches* prefetches;
};

// sums[r][e] = part.start + sum over channels of home[r] * away[shifted by entry e], handed to part.finish. Pairs are
// as they were given, and their sums multiplied.
template <class Product, int kRows, int kEntries, class Part>
NEARSIGHT_INLINE void dot(const DotOperands& o, int entry, Part& part) {
    Vector sums[kRows][kEntries];
#pragma GCC unroll 3
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
        for (int e = 0; e < kEntries; ++e) sums[r][e] = Product::kPaired ? Vector{} : part.start(r, entry + e);
    const float* home = o.home;
    const float* away = o.away + entry * o.step;
    const uintptr_t* next = o.prefetches->next;
#pragma GCC unroll 2
    for (int64_t c = 0; c < o.channels; ++c) {
        o.prefetches->step(next);
        Vector h[kRows];
#pragma GCC unroll 3
        for (int r = 0; r < kRows; ++r) h[r] = load(home + r * o.home_row);
        if (kLanes == 16 && o.ahead) {
            __builtin_prefetch(away + o.ahead, 0, 3);
            __builtin_prefetch(away + o.ahead + kLanes, 0, 3);
        }
#pragma GCC unroll 8
        for (int e = 0; e < kEntries; ++e) {
            Vector a = load(away + e * o.step);
            pin(a);
#pragma GCC unroll 3
            for (int r = 0; r < kRows; ++r) sums[r][e] = Product::multiply_add(h[r], a, sums[r][e]);
        }
        home += kLanes;
        away += o.away_pitch;
    }
    o.prefetches->next = next;
#pragma GCC unroll 3
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int e = 0; Product::kPaired && e < kEntries; ++e)
            sums[r][e] = sums[r][e] * splat(o.multiplier) + part.start(r, entry + e);
        part.template finish<kEntries>(r, entry, sums[r]);
    }
}

template <class Product, int kRows, int kEntries, class Part>
NEARSIGHT_INLINE void dot_some(const DotOperands& o, int entry, int entries, Part& part) {
    if (entries == kEntries)
        dot<Product, kRows, kEntries>(o, entry, part);
    else if constexpr (kEntries > 1)
        dot_some<Product, kRows, kEntries - 1>(o, entry, entries, part);
}

// Any number of entries, in parts as even as can be.
template <class Product, class Part>
NEARSIGHT_INLINE void dot_by(const DotOperands& o, int rows, int entries, Part& part) {
    int parts = (entries + kDotEntries - 1) / kDotEntries;
    for (int entry = 0; parts > 0; --parts) {
        const int some = (entries - entry + parts - 1) / parts;
        switch (rows) {
            case 1: dot_some<Product, 1, kDotEntries>(o, entry, some, part); break;
            case 2: dot_some<Product, 2, kDotEntries>(o, entry, some, part); break;
            default: dot_some<Product, 3, kDotEntries>(o, entry, some, part); break;
        }
        entry += some;
    }
}

template <class Part>
NEARSIGHT_INLINE void dot_all(const DotOperands& o, int rows, int entries, Part& part) {
    dot_by<Products>(o, rows, entries, part);
}

// The same, not inlined: measured to be faster in the forward and slower in the gradients.
template <class Part>
NEARSIGHT_APART void dot_apart(const DotOperands& o, int rows, int entries, Part& part) {
    dot_all(o, rows, entries, part);
}

// Logits, weights or their gradients of a group: of each home row [visit][entry][lane].
struct Tile {
    float* rows[kGroupRows];
    ptrdiff_t visit, entry;  // floats per visit and per entry
    float* at(int r, int visit_order) const { return rows[r] + visit_order * visit; }
};

// With queries at home the weights lie where the tile says; with keys at home they lie beside each away row.
struct MixOperands {
    const Source* sources;
    int source_count;
    bool keys_at_home, add;  // add: to what the result holds already
    Tile weights;
    ptrdiff_t away_weights;  // keys at home: from Source::away
    const int32_t* orders;   // visits of each home row along y
    int entries;          // that are taken: in pairs so many pairs, and then
    bool half;            // the first of one more
    const int32_t* seen;  // each lane's range of entries, or NULL
    ptrdiff_t first;          // from Source::away to channel 0 of what lane 0 meets under entry 0
    ptrdiff_t lane, channel;  // of away rows and results alike, as of Packed
    ptrdiff_t step;           // lanes per entry
    Prefetches* prefetches;
    float* pairs;  // NULL, or room for all weights in pairs: [source][row][pair][lane]

    float* pairs_of(const Source& s, int r) const {
        return pairs + ((&s - sources) * kGroupRows + r) * weights.visit;
    }
    const float* weights_of(const Source& s, int r) const {
        if (keys_at_home) return s.away + away_weights + s.visit->order[r] * weights.visit;
        return weights.at(r, s.order_z * orders[r] + s.visit->order[r]);
    }
};

// Rounds the weights to bfloat16, each beside that of the entry after it, and makes the operands those of pairs.
MixOperands pair_weights(const MixOperands& o) {
    MixOperands paired = o;
    paired.entries = o.entries / 2;
    paired.half = o.entries % 2;
    paired.step = 2 * o.step;
    paired.weights.entry = kLanes;
    paired.weights.visit = (paired.entries + paired.half) * kLanes;
    for (int i = 0; i < o.source_count; ++i) {
        const Source& s = o.sources[i];
        for (int r = s.visit->first; r < s.visit->last; ++r) {
            const float* weights = o.weights_of(s, r);
            float* target = paired.pairs_of(s, r);
            for (int e = 0; e < paired.entries; ++e, weights += 2 * o.weights.entry)
                store(target + e * kLanes, round_pair(load(weights), load(weights + o.weights.entry)));
            if (paired.half) store(target + paired.entries * kLanes, round_pair(load(weights), Vector{}));
        }
    }
    return paired;
}

template <class Product>
NEARSIGHT_INLINE const float* weights_of(const MixOperands& o, const Source& s, int r) {
    return Product::kPaired ? o.pairs_of(s, r) : o.weights_of(s, r);
}

// Adds one entry: what `away` has of it and `seen` does not hide.
template <class Product, int kFirst, int kLast, int kChannels, bool kMasked>
NEARSIGHT_INLINE void mix_entry(const MixOperands& o, const float* const (&weights)[kGroupRows], const float* away,
                                int e, IntVector seen, Vector (&sums)[kGroupRows][kChannels]) {
    Vector w[kGroupRows];
#pragma GCC unroll 3
    for (int r = kFirst; r < kLast; ++r) w[r] = load(weights[r] + e * o.weights.entry);
#pragma GCC unroll 8
    for (int c = 0; c < kChannels; ++c) {
        Vector a = load(away + c * o.channel);
        if (kMasked) a = keep(seen, a);
        pin(a);
#pragma GCC unroll 3
        for (int r = kFirst; r < kLast; ++r) sums[r][c] = Product::multiply_add(w[r], a, sums[r][c]);
    }
}

// Adds the entries of one source to the sums of home rows kFirst to kLast - 1.
template <class Product, int kFirst, int kLast, int kChannels, bool kMasked>
NEARSIGHT_INLINE void mix_source(const MixOperands& o, const Source& s, int64_t channel,
                                 Vector (&sums)[kGroupRows][kChannels]) {
    const float* weights[kGroupRows];
    for (int r = kFirst; r < kLast; ++r) weights[r] = weights_of<Product>(o, s, r);
    const float* away = s.away + o.first + channel * o.channel;
    const uintptr_t* next = o.prefetches->next;
    const auto seen = [&](int e) { return kMasked ? Product::sees(o.seen, e) : ~IntVector{}; };
    for (int e = 0; e < o.entries; ++e) {
        mix_entry<Product, kFirst, kLast, kChannels, kMasked>(o, weights, away, e, seen(e), sums);
        o.prefetches->step(next);
        away += o.step;
    }
    // A cell that is not among the entries may be no number, and zero times that is none.
    if (Product::kPaired && o.half)
        mix_entry<Product, kFirst, kLast, kChannels, true>(o, weights, away, o.entries, seen(o.entries) & kFirstOfPair,
                                                           sums);
    o.prefetches->next = next;
}

template <class Product, int kChannels, bool kMasked>
void mix(const MixOperands& o, int64_t channel, float* result, ptrdiff_t result_row) {
    Vector sums[kGroupRows][kChannels] = {};
    if (o.add) {
#pragma GCC unroll 3
        for (int r = 0; r < kGroupRows; ++r)
#pragma GCC unroll 8
            for (int c = 0; c < kChannels; ++c) sums[r][c] = load(result + r * result_row + (channel + c) * kLanes);
    }
    for (int i = 0; i < o.source_count; ++i) {
        const Source& s = o.sources[i];
        o.prefetches->issue();
        switch (s.visit->first * 4 + s.visit->last) {
            case 1: mix_source<Product, 0, 1, kChannels, kMasked>(o, s, channel, sums); break;
            case 2: mix_source<Product, 0, 2, kChannels, kMasked>(o, s, channel, sums); break;
            case 3: mix_source<Product, 0, 3, kChannels, kMasked>(o, s, channel, sums); break;
            case 6: mix_source<Product, 1, 2, kChannels, kMasked>(o, s, channel, sums); break;
            case 7: mix_source<Product, 1, 3, kChannels, kMasked>(o, s, channel, sums); break;
            default: mix_source<Product, 2, 3, kChannels, kMasked>(o, s, channel, sums); break;
        }
    }
#pragma GCC unroll 3
    for (int r = 0; r < kGroupRows; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < kChannels; ++c) store(result + r * result_row + (channel + c) * kLanes, sums[r][c]);
}

template <class Product, int kChannels>
int64_t mix_blocks(const MixOperands& o, int64_t channel, int64_t channels, float* result, ptrdiff_t result_row) {
    for (; channel + kChannels <= channels; channel += kChannels) {
        if (o.seen)
            mix<Product, kChannels, true>(o, channel, result, result_row);
        else
            mix<Product, kChannels, false>(o, channel, result, result_row);
    }
    return channel;
}

// ---- Mix, cell by cell ----------------------------------------------------------------------------------------------
// Channels are the lanes: a cell is loaded in whole lines, whatever its entry shifts it by, and each weight is spread
// over a vector. The same sums in the same order as in planes.

constexpr int kMixVectors = 8;  // 3 x 8 sums, of cells x vectors of channels

// Adds one entry. seen(q): what cell q does not hide.
template <class Product, int kFirst, int kLast, int kCells, int kVectors, bool kMasked, class Seen>
NEARSIGHT_INLINE void mix_cells_entry(const MixOperands& o, const float* const (&weights)[kGroupRows],
                                      const float* away, Seen seen, Vector (&sums)[kGroupRows][kCells][kVectors]) {
#pragma GCC unroll 8
    for (int q = 0; q < kCells; ++q) {
        Vector w[kGroupRows];
#pragma GCC unroll 3
        for (int r = kFirst; r < kLast; ++r) {
            w[r] = Product::spread(weights[r] + q);
            if (kVectors > 1) pin(w[r]);
        }
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            Vector a = load(away + q * o.lane + v * kLanes);
            if (kMasked) a = keep(seen(q), a);
            pin(a);
#pragma GCC unroll 3
            for (int r = kFirst; r < kLast; ++r) sums[r][q][v] = Product::multiply_add(w[r], a, sums[r][q][v]);
        }
    }
}

// Adds the entries of one source to the sums of home rows kFirst to kLast - 1, of the lanes from `lane` on.
template <class Product, int kFirst, int kLast, int kCells, int kVectors, bool kMasked>
NEARSIGHT_INLINE void mix_cells_source(const MixOperands& o, const Source& s, int lane, int64_t channel,
                                       Vector (&sums)[kGroupRows][kCells][kVectors]) {
    const float* weights[kGroupRows];
    for (int r = kFirst; r < kLast; ++r) weights[r] = weights_of<Product>(o, s, r) + lane;
    const float* away = s.away + o.first + lane * o.lane + channel;
    const uintptr_t* next = o.prefetches->next;
    const auto seen = [&](int e, int q) { return kMasked ? Product::lane_sees(o.seen + lane + q, e) : ~IntVector{}; };
    for (int e = 0; e < o.entries; ++e) {
        mix_cells_entry<Product, kFirst, kLast, kCells, kVectors, kMasked>(
            o, weights, away, [&](int q) { return seen(e, q); }, sums);
        o.prefetches->step(next);
        away += o.step * o.lane;
#pragma GCC unroll 3
        for (int r = kFirst; r < kLast; ++r) weights[r] += o.weights.entry;
    }
    if (Product::kPaired && o.half)
        mix_cells_entry<Product, kFirst, kLast, kCells, kVectors, true>(
            o, weights, away, [&](int q) { return seen(o.entries, q) & kFirstOfPair; }, sums);
    o.prefetches->next = next;
}

template <class Product, int kVectors, bool kMasked>
NEARSIGHT_APART void mix_cells(const MixOperands& o, int lane, int64_t channel, float* result, ptrdiff_t result_row) {
    constexpr int kCells = kMixVectors / kVectors;
    const auto target = [&](int r, int q, int v) {
        return result + r * result_row + (lane + q) * o.lane + channel + v * kLanes;
    };
    Vector sums[kGroupRows][kCells][kVectors] = {};
    if (o.add) {
#pragma GCC unroll 3
        for (int r = 0; r < kGroupRows; ++r)
#pragma GCC unroll 8
            for (int q = 0; q < kCells; ++q)
#pragma GCC unroll 8
                for (int v = 0; v < kVectors; ++v) sums[r][q][v] = load(target(r, q, v));
    }
    for (int i = 0; i < o.source_count; ++i) {
        const Source& s = o.sources[i];
        o.prefetches->issue();
        switch (s.visit->first * 4 + s.visit->last) {
            case 1: mix_cells_source<Product, 0, 1, kCells, kVectors, kMasked>(o, s, lane, channel, sums); break;
            case 2: mix_cells_source<Product, 0, 2, kCells, kVectors, kMasked>(o, s, lane, channel, sums); break;
            case 3: mix_cells_source<Product, 0, 3, kCells, kVectors, kMasked>(o, s, lane, channel, sums); break;
            case 6: mix_cells_source<Product, 1, 2, kCells, kVectors, kMasked>(o, s, lane, channel, sums); break;
            case 7: mix_cells_source<Product, 1, 3, kCells, kVectors, kMasked>(o, s, lane, channel, sums); break;
            default: mix_cells_source<Product, 2, 3, kCells, kVectors, kMasked>(o, s, lane, channel, sums); break;
        }
    }
#pragma GCC unroll 3
    for (int r = 0; r < kGroupRows; ++r)
#pragma GCC unroll 8
        for (int q = 0; q < kCells; ++q)
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) store(target(r, q, v), sums[r][q][v]);
}

template <class Product, int kVectors>
int64_t mix_cells_blocks(const MixOperands& o, int64_t channel, int64_t channels, float* result, ptrdiff_t result_row) {
    for (; channel + kVectors * kLanes <= channels; channel += kVectors * kLanes)
        for (int lane = 0; lane < kLanes; lane += kMixVectors / kVectors) {
            if (o.seen)
                mix_cells<Product, kVectors, true>(o, lane, channel, result, result_row);
            else
                mix_cells<Product, kVectors, false>(o, lane, channel, result, result_row);
        }
    return channel;
}

// ---- Mix, whichever way the rows are packed -------------------------------------------------------------------------

// How often the sources are gone through.
int64_t mix_calls(int64_t channels, bool in_cells) {
    return in_cells ? channels / kMixVectors : (channels + kMixChannels - 1) / kMixChannels;
}

template <class Product>
void mix_by(const MixOperands& o, int64_t channels, float* result, ptrdiff_t result_row) {
    if constexpr (kLanes == 16) {
        if (o.channel == 1) {
            int64_t c = mix_cells_blocks<Product, 4>(o, 0, channels, result, result_row);
            c = mix_cells_blocks<Product, 2>(o, c, channels, result, result_row);
            mix_cells_blocks<Product, 1>(o, c, channels, result, result_row);
            return;
        }
    }
    int64_t c = mix_blocks<Product, kMixChannels>(o, 0, channels, result, result_row);
    if constexpr (kMixChannels > 4) c = mix_blocks<Product, 4>(o, c, channels, result, result_row);
    c = mix_blocks<Product, 2>(o, c, channels, result, result_row);
    mix_blocks<Product, 1>(o, c, channels, result, result_row);
}

// result[r], packed as the away rows are = sum over sources and entries of weights * away.
void mix_all(const MixOperands& o, int64_t channels, float* result, ptrdiff_t result_row) {
    mix_by<Products>(kHasPairs ? pair_weights(o) : o, channels, result, result_row);
}

// ---- Tables of relative vectors -------------------------------------------------------------------------------------

// terms[entry][r] = sum over channels of query[r] * table[entry], for the entries first to last - 1.
template <int kRows>
void table_terms(const float* query, ptrdiff_t query_row, ptrdiff_t query_pitch, const float* table, int64_t head_dim,
                 ChannelRange nonzero, int first, int last, float* terms, ptrdiff_t terms_entry, ptrdiff_t terms_row) {
    constexpr int kBlock = 4;
    for (int entry = first; entry < last; entry += kBlock) {
        const float* rows[kBlock];  // the last block repeats the last entry
        for (int e = 0; e < kBlock; ++e) rows[e] = table + (entry + e < last ? entry + e : last - 1) * head_dim;
        Vector sums[kRows][kBlock] = {};
        for (int64_t c = nonzero.begin; c < nonzero.end; ++c) {
            Vector q[kRows];
            for (int r = 0; r < kRows; ++r) q[r] = load(query + r * query_row + c * query_pitch);
            for (int e = 0; e < kBlock; ++e)
                for (int r = 0; r < kRows; ++r) sums[r][e] += q[r] * splat(rows[e][c]);
        }
        for (int e = 0; e < kBlock && entry + e < last; ++e)
            for (int r = 0; r < kRows; ++r) store(terms + (entry + e) * terms_entry + r * terms_row, sums[r][e]);
    }
}

// result[r][c] += sum over entries of sums[entry][r] * table[entry][c].
void add_table_gradient(const float* sums, const float* table, int64_t head_dim, ChannelRange nonzero, int first,
                        int last, float* result, ptrdiff_t result_row) {
    for (int64_t c = nonzero.begin; c < nonzero.end; ++c) {
        Vector total[kGroupRows];
        for (int r = 0; r < kGroupRows; ++r) total[r] = load(result + r * result_row + c * kLanes);
        for (int e = first; e < last; ++e)
            for (int r = 0; r < kGroupRows; ++r)
                total[r] += load(sums + (e * kGroupRows + r) * kLanes) * splat(table[e * head_dim + c]);
        for (int r = 0; r < kGroupRows; ++r) store(result + r * result_row + c * kLanes, total[r]);
    }
}

// gradient[entry][c] += sum over rows of sums[entry][r] * query[r][c], lane by lane. Sums of rows that a group lacks
// are zero, and so must be their queries.
void add_relative_gradient(const float* sums, const float* query, ptrdiff_t query_row, int64_t head_dim, int first,
                           int last, float* gradient) {
    constexpr int kBlock = kRegisters == 32 ? 4 : 2;
    for (int entry = first; entry < last; entry += kBlock) {
        const int entries = last - entry < kBlock ? last - entry : kBlock;
        Vector s[kBlock][kGroupRows] = {};
        for (int e = 0; e < entries; ++e)
            for (int r = 0; r < kGroupRows; ++r) s[e][r] = load(sums + ((entry + e) * kGroupRows + r) * kLanes);
        for (int64_t c = 0; c < head_dim; ++c) {
            float* target = gradient + (entry * head_dim + c) * kLanes;
            Vector q[kGroupRows];
            for (int r = 0; r < kGroupRows; ++r) q[r] = load(query + r * query_row + c * kLanes);
#pragma GCC unroll 4
            for (int e = 0; e < kBlock; ++e) {
                if (e >= entries) break;
                add_to(target + e * head_dim * kLanes, s[e][0] * q[0] + s[e][1] * q[1] + s[e][2] * q[2]);
            }
        }
    }
}

}  // namespace

#endif
