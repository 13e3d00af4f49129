// SPDX-License-Identifier: Apache-2.0
//
// Rows of query, key and value that are made of a row of the layer's input, where they are needed and as they are
// packed: a small matrix product in place of packing. Part of kernel.cpp.

#ifndef NEARSIGHT_PROJECT_INL_H
#define NEARSIGHT_PROJECT_INL_H

#include "plan.h"
#include "rows-inl.h"
#include "simd-inl.h"
#include "walk-inl.h"

namespace {

using namespace nearsight;

// Sums in registers: outputs x vectors of lanes, or cells x vectors of outputs.
constexpr int kProjectOutputs = kRegisters == 32 ? 8 : 4;
constexpr int kProjectVectors = kRegisters == 32 ? 3 : 2;
constexpr int kProjectSums = 16;

// Lanes of the input that are packed at a time: where rows are wide, a strip of all its channels has to stay near.
constexpr int kInputLanes = 128;

// Whole vectors, an odd number of them, as of packed rows.
ptrdiff_t input_pitch(int lanes) {
    return (((lanes < kInputLanes ? lanes : kInputLanes) + kLanes - 1) / kLanes | 1) * kLanes;
}

// A strip of a row of the input in planes.
struct InputRow {
    const float* data;
    ptrdiff_t pitch;
    int64_t channels;
    int first, count;  // away lanes; behind them lie zeros up to a whole vector
};

// Weights of some outputs, in blocks of kProjectBlock: [block][channel of the input][output].
struct Weights {
    const float* data;
    ptrdiff_t channel, block;
};

Weights weights_of(const InputRow& x, const float* weight, int64_t outputs, int64_t from) {
    const int64_t block = from / kProjectBlock * kProjectBlock, left = outputs - block;
    return {weight + block * x.channels + (from - block), left < kProjectBlock ? left : kProjectBlock,
            kProjectBlock * x.channels};
}

// ---- Into planes ----------------------------------------------------------------------------------------------------

// target[o][lane] = multiplier * sum over channels of weight[channel][o] * input[channel][lane].
template <int kOutputs, int kVectors>
NEARSIGHT_APART void project_block(const InputRow& x, int lane, const Weights& weights, float multiplier,
                                   float* target, ptrdiff_t target_pitch) {
    Vector sums[kOutputs][kVectors] = {};
    const float* weight = weights.data;
    const float* input = x.data + lane;
    for (int64_t c = 0; c < x.channels; ++c) {
        Vector a[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            a[v] = load(input + v * kLanes);
            pin(a[v]);
        }
#pragma GCC unroll 8
        for (int o = 0; o < kOutputs; ++o) {
            Vector b = splat(weight[o]);
            if (kVectors > 1) pin(b);
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) sums[o][v] += b * a[v];
        }
        input += x.pitch;
        weight += weights.channel;
    }
#pragma GCC unroll 8
    for (int o = 0; o < kOutputs; ++o)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v)
            store(target + o * target_pitch + v * kLanes, sums[o][v] * multiplier);
}

// All lanes, in parts as even as can be.
template <int kOutputs>
NEARSIGHT_INLINE void project_lanes(const InputRow& x, const Weights& weight, float multiplier, float* target,
                                    ptrdiff_t target_pitch) {
    int vectors = (x.count + kLanes - 1) / kLanes;
    for (int lane = 0, parts = (vectors + kProjectVectors - 1) / kProjectVectors; parts > 0; --parts) {
        const int some = (vectors + parts - 1) / parts;
        if (some == 1)
            project_block<kOutputs, 1>(x, lane, weight, multiplier, target + lane, target_pitch);
        else if (some == 2 || kProjectVectors == 2)
            project_block<kOutputs, 2>(x, lane, weight, multiplier, target + lane, target_pitch);
        else
            project_block<kOutputs, kProjectVectors>(x, lane, weight, multiplier, target + lane, target_pitch);
        lane += some * kLanes;
        vectors -= some;
    }
}

template <int kOutputs = kProjectOutputs>
void project_planes(const InputRow& x, const float* weight, int64_t outputs, int64_t from, float multiplier,
                    const Packed& row) {
    for (; from + kOutputs <= outputs; from += kOutputs)
        project_lanes<kOutputs>(x, weights_of(x, weight, outputs, from), multiplier,
                                row.data + from * row.channel + x.first, row.channel);
    if constexpr (kOutputs > 1)
        if (from < outputs) project_planes<kOutputs / 2>(x, weight, outputs, from, multiplier, row);
}

// ---- Into cells -----------------------------------------------------------------------------------------------------

// target[cell][o] = sum over channels of weight[channel][o] * input[channel][cell].
template <int kCells, int kVectors>
NEARSIGHT_APART void project_cells_block(const InputRow& x, int cell, const Weights& weights, float* target,
                                         ptrdiff_t target_pitch) {
    Vector sums[kCells][kVectors] = {};
    const float* weight = weights.data;
    const float* input = x.data + cell;
    for (int64_t c = 0; c < x.channels; ++c) {
        Vector w[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            w[v] = load(weight + v * weights.block);
            pin(w[v]);
        }
#pragma GCC unroll 16
        for (int q = 0; q < kCells; ++q) {
            Vector b = splat(input[q]);
            if (kVectors > 1) pin(b);
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) sums[q][v] += b * w[v];
        }
        input += x.pitch;
        weight += weights.channel;
    }
#pragma GCC unroll 16
    for (int q = 0; q < kCells; ++q)
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) store(target + q * target_pitch + v * kLanes, sums[q][v]);
}

template <int kVectors>
int64_t project_cells_blocks(const InputRow& x, const float* weight, int64_t outputs, int64_t from, const Packed& row) {
    constexpr int kCells = kProjectSums / kVectors;
    for (; from + kVectors * kLanes <= outputs; from += kVectors * kLanes) {
        const Weights some = weights_of(x, weight, outputs, from);
        float* cells = row.data + x.first * row.lane + from;
        const auto block = [&](int i) {
            project_cells_block<kCells, kVectors>(x, i, some, cells + i * row.lane, row.lane);
        };
        if (cover(x.count, kCells, block)) continue;
        for (int i = 0; i < x.count; ++i)
            project_cells_block<1, kVectors>(x, i, some, cells + i * row.lane, row.lane);
    }
    return from;
}

// Whichever way the row is packed.
void project_row(const InputRow& x, const float* weight, int64_t outputs, float multiplier, const Packed& row) {
    if constexpr (kLanes == 16) {
        if (row.channel == 1 && row.lane != 1) {  // the values, whose multiplier is one
            const int64_t from = project_cells_blocks<2>(x, weight, outputs, 0, row);
            project_cells_blocks<1>(x, weight, outputs, from, row);
            return;
        }
    }
    project_planes(x, weight, outputs, 0, multiplier, row);
}

}  // namespace

#endif
