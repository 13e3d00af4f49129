// SPDX-License-Identifier: Apache-2.0
//
// Local attention for one instruction set: compiled once for each, with NEARSIGHT_KERNEL the name of the table that it
// exports. Everything else has internal linkage.
//
// How it works (docs/kernel.md has the picture). A vector holds neighbouring cells of one row, one channel. Rows are
// packed, channel by channel, into a small cache, which absorbs strides, dtype and border; then for a group of up to
// three home rows and one vector of lanes
//     dot   multiplies home channels with shifted away channels, rows x entries sums in registers: the logits;
//     mix   multiplies weights with shifted away channels, rows x channels sums in registers: the output;
// and between the two the softmax is taken on a tile of logits that never leaves the first cache level. The gradients
// are the same two steps with other operands. No lane ever meets a cell that its query does not see: entries that only
// some lanes of a vector see go through a mask.

#include "plan.h"
#include "simd.h"

namespace nearsight {
extern const Kernel NEARSIGHT_KERNEL;
}

namespace {

using namespace nearsight;

constexpr int kDotEntries = kRegisters == 32 ? 7 : 4;   // 3 x 7 sums, 3 home and 1 away vectors: 25 registers
constexpr int kMixChannels = kRegisters == 32 ? 8 : 4;  // 3 x 8 sums

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// ---- Moving rows between tensors and packed memory ----------------------------------------------------------------

// Planar memory holds channel c of lane l at [c * pitch + l].
struct Planar {
    float* data;
    ptrdiff_t pitch;
};

template <class T>
NEARSIGHT_INLINE void pack_lane(const T* source, ptrdiff_t channel_stride, int64_t channels, float multiplier,
                                float* lane, ptrdiff_t pitch) {
    for (int64_t c = 0; c < channels; ++c) lane[c * pitch] = load_one(source + c * channel_stride) * multiplier;
}

// The cells at which to start blocks of `width` so that they cover `count` of them: the last block may overlap the one
// before. Calls block(i) for each, or returns false when there are fewer cells than one block.
template <class Block>
NEARSIGHT_INLINE bool cover(int count, int width, Block block) {
    if (count < width) return false;
    for (int i = 0; i < count - width; i += width) block(i);
    block(count - width);
    return true;
}

// Cells whose channels are contiguous: blocks of cells x 4 channels are transposed in registers.
template <class T>
void pack_interleaved(const T* source, ptrdiff_t stride, int64_t channels, int count, float multiplier, float* lanes,
                      ptrdiff_t pitch) {
    const int64_t whole = channels & ~(int64_t)3;
    const auto vectors = [&](int i) {
        for (int64_t c = 0; c < whole; c += 4) {
            const T* cell = source + i * stride + c;
            float* target = lanes + c * pitch + i;
            for (int k = 0; k < 4; ++k) __builtin_prefetch(target + k * pitch + kLanes, 1);
            Vector v[4];
            for (int k = 0; k < 4; ++k) v[k] = load_quads(cell + k * stride, 4 * stride);
            transpose_quads(v[0], v[1], v[2], v[3]);
            for (int k = 0; k < 4; ++k) store(target + k * pitch, v[k] * multiplier);
        }
    };
    const auto quads = [&](int i) {
        for (int64_t c = 0; c < whole; c += 4) {
            const T* cell = source + i * stride + c;
            float* target = lanes + c * pitch + i;
            Quad v[4];
            for (int k = 0; k < 4; ++k) v[k] = load_quad(cell + k * stride);
            transpose_quad(v[0], v[1], v[2], v[3]);
            for (int k = 0; k < 4; ++k) store_quad(target + k * pitch, v[k] * multiplier);
        }
    };
    const int64_t left = cover(count, kLanes, vectors) || cover(count, 4, quads) ? whole : 0;
    for (int i = 0; i < count && left < channels; ++i)
        pack_lane(source + i * stride + left, 1, channels - left, multiplier, lanes + left * pitch + i, pitch);
}

template <class T>
NEARSIGHT_INLINE void unpack_lane(T* target, ptrdiff_t channel_stride, int64_t channels, float multiplier,
                                  const float* lane, ptrdiff_t pitch) {
    for (int64_t c = 0; c < channels; ++c) store_one(target + c * channel_stride, lane[c * pitch] * multiplier);
}

template <class T>
void unpack_interleaved(T* target, ptrdiff_t stride, int64_t channels, int count, float multiplier, const float* lanes,
                        ptrdiff_t pitch) {
    const int64_t whole = channels & ~(int64_t)3;
    const auto vectors = [&](int i) {
        for (int64_t c = 0; c < whole; c += 4) {
            T* cell = target + i * stride + c;
            const float* source = lanes + c * pitch + i;
            Vector v[4];
            for (int k = 0; k < 4; ++k) v[k] = load(source + k * pitch) * multiplier;
            transpose_quads(v[0], v[1], v[2], v[3]);
            for (int k = 0; k < 4; ++k) store_quads(cell + k * stride, 4 * stride, v[k]);
        }
    };
    const auto quads = [&](int i) {
        for (int64_t c = 0; c < whole; c += 4) {
            T* cell = target + i * stride + c;
            const float* source = lanes + c * pitch + i;
            Quad v[4];
            for (int k = 0; k < 4; ++k) v[k] = load_quad(source + k * pitch) * multiplier;
            transpose_quad(v[0], v[1], v[2], v[3]);
            for (int k = 0; k < 4; ++k) store_quad(cell + k * stride, v[k]);
        }
    };
    const int64_t left = cover(count, kLanes, vectors) || cover(count, 4, quads) ? whole : 0;
    for (int i = 0; i < count && left < channels; ++i)
        unpack_lane(target + i * stride + left, 1, channels - left, multiplier, lanes + left * pitch + i, pitch);
}

template <class T>
void pack_run(const T* source, ptrdiff_t stride, ptrdiff_t channel_stride, int64_t channels, const Run& run,
              float multiplier, float* row, ptrdiff_t pitch) {
    float* lanes = row + run.lane;
    if (run.step != 1) {
        for (int i = 0; i < run.count; ++i)
            pack_lane(source + i * stride, channel_stride, channels, multiplier, lanes + (ptrdiff_t)i * run.step, pitch);
    } else if (channel_stride == 1 && channels > 1) {
        pack_interleaved(source, stride, channels, run.count, multiplier, lanes, pitch);
    } else if (stride == 1) {
        for (int64_t c = 0; c < channels; ++c)
            for (int i = 0; i < run.count; ++i)
                lanes[c * pitch + i] = load_one(source + c * channel_stride + i) * multiplier;
    } else {
        for (int i = 0; i < run.count; ++i)
            pack_lane(source + i * stride, channel_stride, channels, multiplier, lanes + i, pitch);
    }
}

template <class T>
void unpack_run(T* target, ptrdiff_t stride, ptrdiff_t channel_stride, int64_t channels, const Run& run,
                float multiplier, const float* row, ptrdiff_t pitch) {
    const float* lanes = row + run.lane;
    if (run.step == 1 && channel_stride == 1 && channels > 1) {
        unpack_interleaved(target, stride, channels, run.count, multiplier, lanes, pitch);
        return;
    }
    for (int64_t c = 0; c < channels; ++c)
        for (int i = 0; i < run.count; ++i)
            store_one(target + c * channel_stride + i * stride, lanes[c * pitch + (ptrdiff_t)i * run.step] * multiplier);
}

// Where a packed row comes from or goes to.
struct RowAddress {
    int64_t first_batch, head, z, y;
};

// The lanes first_lane to last_lane - 1 of a row; the first of them is lane 0 in packed memory.
struct Runs {
    const Run* runs;
    int count, first_lane, last_lane;
};

Run clip(const Run& run, const Runs& window) {
    const int skipped = window.first_lane > run.lane ? (window.first_lane - run.lane + run.step - 1) / run.step : 0;
    const int lane = run.lane + skipped * run.step;
    const int room = lane < window.last_lane ? (window.last_lane - lane + run.step - 1) / run.step : 0;
    const int left = run.count - skipped;
    return {lane - window.first_lane, run.step, room < left ? room : left, run.group, run.index + skipped};
}

int64_t row_offset(const Tensor& t, const RowAddress& at, const Run& run) {
    return (at.first_batch + run.group) * t.batch + at.head * t.head + at.z * t.z + at.y * t.y + run.index * t.x;
}

void pack_row(const Plan& plan, const Tensor& t, int64_t channels, const RowAddress& at, Runs runs, float multiplier,
              Planar row) {
    for (int i = 0; i < runs.count; ++i) {
        const Run run = clip(runs.runs[i], runs);
        if (run.count <= 0 || at.first_batch + run.group >= plan.batch) continue;
        const int64_t offset = row_offset(t, at, run);
        if (plan.bfloat16)
            pack_run((const Bfloat16*)t.data + offset, t.x, t.channel, channels, run, multiplier, row.data, row.pitch);
        else
            pack_run((const float*)t.data + offset, t.x, t.channel, channels, run, multiplier, row.data, row.pitch);
    }
}

void unpack_row(const Plan& plan, const Tensor& t, int64_t channels, const RowAddress& at, Runs runs, float multiplier,
                Planar row) {
    for (int i = 0; i < runs.count; ++i) {
        const Run run = clip(runs.runs[i], runs);
        if (run.count <= 0 || at.first_batch + run.group >= plan.batch) continue;
        const int64_t offset = row_offset(t, at, run);
        if (plan.bfloat16)
            unpack_run((Bfloat16*)t.data + offset, t.x, t.channel, channels, run, multiplier, row.data, row.pitch);
        else
            unpack_run((float*)t.data + offset, t.x, t.channel, channels, run, multiplier, row.data, row.pitch);
    }
}

// lse and delta: one contiguous float32 number per query.
int64_t scalar_offset(const Plan& plan, const RowAddress& at, const Run& run) {
    const int64_t image = (at.first_batch + run.group) * plan.heads + at.head;
    return ((image * plan.out[0] + at.z) * plan.out[1] + at.y) * plan.out[2] + run.index;
}

// Memory to ask for while something else is computed: waiting for it would take as long as the work. A few lines at a
// time, since a burst fills the queues of the processor and makes it wait after all.
struct Prefetches {
    static constexpr int kMost = 1024;
    uintptr_t lines[kMost];  // the lowest bit is set for those that will be written
    int count, done, at_once;

    void spread_over(int points) { at_once = count / (points > 0 ? points : 1) + 1; }
    NEARSIGHT_INLINE void issue() {
        const int last = done + at_once < count ? done + at_once : count;
        for (; done < last; ++done) {
            if (lines[done] & 1)
                __builtin_prefetch((const void*)lines[done], 1, 2);
            else
                __builtin_prefetch((const void*)lines[done], 0, 2);
        }
    }
};

void list_row(const Plan& plan, const Tensor& t, int64_t channels, const RowAddress& at, Runs runs, bool write,
              Prefetches& list) {
    constexpr uintptr_t kLine = 64;
    const int64_t size = plan.bfloat16 ? 2 : 4;
    for (int i = 0; i < runs.count; ++i) {
        const Run run = clip(runs.runs[i], runs);
        if (run.count <= 0 || at.first_batch + run.group >= plan.batch || run.step != 1) continue;
        if (t.channel != 1 && t.x != 1) continue;
        // Strips of contiguous memory: the channels of each cell, or the cells of each channel.
        const bool interleaved = t.channel == 1;
        const int64_t strips = interleaved ? run.count : channels;
        const uintptr_t stride = (uintptr_t)((interleaved ? t.x : t.channel) * size);
        const uintptr_t bytes = (uintptr_t)((interleaved ? channels : run.count) * size);
        const uintptr_t first = (uintptr_t)(t.data + row_offset(t, at, run) * size) & ~(uintptr_t)1;
        if (list.count + strips * (int64_t)((bytes + kLine - 1) / kLine) > Prefetches::kMost) return;
        uintptr_t* next = list.lines + list.count;
        for (uintptr_t byte = 0; byte < bytes; byte += kLine)
            for (int64_t strip = 0; strip < strips; ++strip)
                *next++ = (first + (uintptr_t)strip * stride + byte) | (uintptr_t)write;
        list.count = (int)(next - list.lines);
    }
}

void pack_scalars(const Plan& plan, const float* source, const RowAddress& at, Runs runs, float multiplier, float* row) {
    for (int i = 0; i < runs.count; ++i) {
        const Run run = clip(runs.runs[i], runs);
        if (run.count <= 0 || at.first_batch + run.group >= plan.batch) continue;
        pack_run(source + scalar_offset(plan, at, run), 1, 1, 1, run, multiplier, row, 0);
    }
}

void unpack_scalars(const Plan& plan, float* target, const RowAddress& at, Runs runs, float multiplier,
                    const float* row) {
    for (int i = 0; i < runs.count; ++i) {
        const Run run = clip(runs.runs[i], runs);
        if (run.count <= 0 || at.first_batch + run.group >= plan.batch) continue;
        unpack_run(target + scalar_offset(plan, at, run), 1, 1, 1, run, multiplier, row, 0);
    }
}

// ---- The two inner steps --------------------------------------------------------------------------------------------

// An away row as a group sees it.
struct Source {
    const float* away;  // channel 0, the lane below home lane 0
    const Visit* visit;
    int32_t entry_z, order_z;
};

struct DotOperands {
    const float* home;  // first row that takes part
    ptrdiff_t home_row;
    const float* away;  // entry 0
    ptrdiff_t away_pitch, step;
    int64_t channels;
};

// sums[r][e] = part.start + sum over channels of home[r] * away[shifted by entry e], handed to part.finish.
template <int kRows, int kEntries, class Part>
NEARSIGHT_INLINE void dot(const DotOperands& o, int entry, Part& part) {
    Vector sums[kRows][kEntries];
    for (int r = 0; r < kRows; ++r)
        for (int e = 0; e < kEntries; ++e) sums[r][e] = part.start(r, entry + e);
    const float* home = o.home;
    const float* away = o.away + entry * o.step;
    for (int64_t c = 0; c < o.channels; ++c) {
        Vector h[kRows];
        for (int r = 0; r < kRows; ++r) h[r] = load(home + r * o.home_row);
        for (int e = 0; e < kEntries; ++e) {
            Vector a = load(away + e * o.step);
            pin(a);
            for (int r = 0; r < kRows; ++r) sums[r][e] += h[r] * a;
        }
        home += kLanes;
        away += o.away_pitch;
    }
    for (int r = 0; r < kRows; ++r) part.template finish<kEntries>(r, entry, sums[r]);
}

template <int kRows, int kEntries, class Part>
NEARSIGHT_INLINE void dot_some(const DotOperands& o, int entry, int entries, Part& part) {
    if (entries == kEntries)
        dot<kRows, kEntries>(o, entry, part);
    else if constexpr (kEntries > 1)
        dot_some<kRows, kEntries - 1>(o, entry, entries, part);
}

// Any number of entries, in parts as even as can be.
template <class Part>
void dot_all(const DotOperands& o, int rows, int entries, Part part) {
    int parts = (entries + kDotEntries - 1) / kDotEntries;
    for (int entry = 0; parts > 0; --parts) {
        const int some = (entries - entry + parts - 1) / parts;
        switch (rows) {
            case 1: dot_some<1, kDotEntries>(o, entry, some, part); break;
            case 2: dot_some<2, kDotEntries>(o, entry, some, part); break;
            default: dot_some<3, kDotEntries>(o, entry, some, part); break;
        }
        entry += some;
    }
}

// Tile of logits, weights or their gradients: [row][visit of the row][entry][lane].
struct Tile {
    float* data;
    ptrdiff_t row;  // floats per home row
    int entries;
    float* at(int r, int visit) const { return data + r * row + (ptrdiff_t)visit * entries * kLanes; }
};

struct MixOperands {
    const Source* sources;
    int source_count;
    Tile weights;
    const int32_t* mask;  // entries x lanes, or NULL
    ptrdiff_t away_lane;  // from Source::away to the lane of entry 0
    ptrdiff_t away_pitch, step;
    const int32_t* visits;  // of each home row along y
    Prefetches* prefetches;
};

int order(const Source& s, const int32_t* visits, int r) { return s.order_z * visits[r] + s.visit->order[r]; }

// Adds the entries of one source to the sums of home rows kFirst to kLast - 1.
template <int kFirst, int kLast, int kChannels, bool kMasked>
NEARSIGHT_INLINE void mix_source(const MixOperands& o, const Source& s, int64_t channel,
                                 Vector (&sums)[kGroupRows][kChannels]) {
    const float* weights[kGroupRows];
    for (int r = kFirst; r < kLast; ++r) weights[r] = o.weights.at(r, order(s, o.visits, r));
    const float* away = s.away + channel * o.away_pitch + o.away_lane;
    for (int e = 0; e < o.weights.entries; ++e) {
        Vector w[kGroupRows];
#pragma GCC unroll 3
        for (int r = kFirst; r < kLast; ++r) w[r] = load(weights[r] + e * kLanes);
#pragma GCC unroll 8
        for (int c = 0; c < kChannels; ++c) {
            Vector a = load(away + c * o.away_pitch);
            if (kMasked) a = keep(load_mask(o.mask + e * kLanes), a);
            pin(a);
#pragma GCC unroll 3
            for (int r = kFirst; r < kLast; ++r) sums[r][c] += w[r] * a;
        }
        away += o.step;
    }
}

template <int kChannels, bool kMasked>
void mix(const MixOperands& o, int64_t channel, float* result, ptrdiff_t result_row) {
    Vector sums[kGroupRows][kChannels] = {};
    for (int i = 0; i < o.source_count; ++i) {
        const Source& s = o.sources[i];
        o.prefetches->issue();
        switch (s.visit->first * 4 + s.visit->last) {
            case 1: mix_source<0, 1, kChannels, kMasked>(o, s, channel, sums); break;
            case 2: mix_source<0, 2, kChannels, kMasked>(o, s, channel, sums); break;
            case 3: mix_source<0, 3, kChannels, kMasked>(o, s, channel, sums); break;
            case 6: mix_source<1, 2, kChannels, kMasked>(o, s, channel, sums); break;
            case 7: mix_source<1, 3, kChannels, kMasked>(o, s, channel, sums); break;
            default: mix_source<2, 3, kChannels, kMasked>(o, s, channel, sums); break;
        }
    }
#pragma GCC unroll 3
    for (int r = 0; r < kGroupRows; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < kChannels; ++c) store(result + r * result_row + (channel + c) * kLanes, sums[r][c]);
}

template <int kChannels>
int64_t mix_blocks(const MixOperands& o, int64_t channel, int64_t channels, float* result, ptrdiff_t result_row) {
    for (; channel + kChannels <= channels; channel += kChannels) {
        if (o.mask)
            mix<kChannels, true>(o, channel, result, result_row);
        else
            mix<kChannels, false>(o, channel, result, result_row);
    }
    return channel;
}

// result[r][c] = sum over sources and entries of weights * away channel c.
void mix_all(const MixOperands& o, int64_t channels, float* result, ptrdiff_t result_row) {
    int64_t c = mix_blocks<kMixChannels>(o, 0, channels, result, result_row);
    if constexpr (kMixChannels > 4) c = mix_blocks<4>(o, c, channels, result, result_row);
    c = mix_blocks<2>(o, c, channels, result, result_row);
    mix_blocks<1>(o, c, channels, result, result_row);
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

// gradient[entry][c] += sum over rows of sums[entry][r] * query[r][c], lane by lane. Sums of rows that a group lacks are
// zero, and so must be their queries.
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

// ---- A thread's scratch memory --------------------------------------------------------------------------------------

// Cuts memory into aligned pieces; from a null base it only counts.
struct Arena {
    char* base;
    size_t used;
    char* take(int64_t bytes) {
        char* piece = base ? base + used : nullptr;
        used += ((size_t)bytes + 63) & ~(size_t)63;
        return piece;
    }
    float* floats(int64_t count) { return (float*)take(count * (int64_t)sizeof(float)); }
};

struct Tag {
    int64_t z, y;
};

struct Workspace {
    float* cache;  // packed away rows
    Tag* tags;     // which rows they are
    Source* sources;
    float* home;    // one vector of the group's home rows: [row][channel][lane]
    float* result;  // alike
    Prefetches* prefetches;
    float* scores;  // the tile
    float* terms[3];  // of every axis: [entry][row][lane]
    float* zeros;     // stands for a missing bias
    float* sums[3];
    float* bias_gradient;
    float* relative_gradient[3];
    int64_t away_channels, home_channels;
    size_t cache_bytes, home_bytes;
};

int64_t slots(const Pass& pass) { return (int64_t)pass.z.slots * pass.y.slots; }

Workspace carve(const Plan& plan, const Pass& pass, int64_t away_channels, int64_t home_channels,
                int64_t result_channels, bool gradients, Arena& arena) {
    Workspace w = {};
    w.away_channels = away_channels;
    w.home_channels = home_channels;
    const int64_t row = away_channels * pass.max_away_pitch;
    w.cache = arena.floats(slots(pass) * row);
    w.cache_bytes = (size_t)(slots(pass) * row) * sizeof(float);
    w.tags = (Tag*)arena.take(slots(pass) * (int64_t)sizeof(Tag));
    w.sources = (Source*)arena.take((int64_t)pass.z.max_visits * pass.y.max_visits * (int64_t)sizeof(Source));
    w.prefetches = (Prefetches*)arena.take((int64_t)sizeof(Prefetches));
    w.home = arena.floats(kGroupRows * home_channels * kLanes);
    w.home_bytes = (size_t)(kGroupRows * home_channels * kLanes) * sizeof(float);
    w.result = arena.floats(kGroupRows * result_channels * kLanes);
    w.scores = arena.floats((int64_t)kGroupRows * pass.z.max_count * pass.y.max_count * pass.max_entries * kLanes);
    for (int axis = 0; axis < 3; ++axis) {
        w.terms[axis] = arena.floats((int64_t)plan.entries[axis] * kGroupRows * kLanes);
        w.sums[axis] = arena.floats((int64_t)plan.entries[axis] * kGroupRows * kLanes);
    }
    w.zeros = arena.floats(plan.entries[2]);
    if (gradients && plan.bias_parts) w.bias_gradient = arena.floats(plan.bias_entries * kLanes);
    for (int axis = 0; axis < 3; ++axis)
        if (gradients && plan.relative_parts[axis])
            w.relative_gradient[axis] = arena.floats(plan.entries[axis] * plan.head_dim * kLanes);
    return w;
}

// ---- Walking over a head's share of the work ------------------------------------------------------------------------

struct Item {
    int64_t head, first_batch;
    const LaneTile* tile;
    int64_t first_group, last_group;  // z groups x y groups, y fastest
};

Item item_of(const Plan& plan, const Pass& pass, int64_t head, int64_t index) {
    Item item;
    item.head = head;
    item.tile = pass.tiles + index % pass.tile_count;
    index /= pass.tile_count;
    const int64_t chunk = index % pass.chunks;
    item.first_batch = index / pass.chunks * plan.batch_group;
    const int64_t groups = (int64_t)pass.z.group_count * pass.y.group_count;
    item.first_group = groups * chunk / pass.chunks;
    item.last_group = groups * (chunk + 1) / pass.chunks;
    return item;
}

void start_item(const Plan& plan, const Pass& pass, Workspace& w) {
    memset(w.cache, 0, w.cache_bytes);  // lanes outside of the runs stay zero
    memset(w.zeros, 0, (size_t)plan.entries[2] * sizeof(float));
    for (int axis = 0; axis < 3; ++axis)
        if (!plan.relative[axis])
            memset(w.terms[axis], 0, (size_t)plan.entries[axis] * kGroupRows * kLanes * sizeof(float));
    for (int64_t i = 0; i < slots(pass); ++i) w.tags[i].z = w.tags[i].y = INT64_MIN;
}

// The rows that a group sees, packed unless they still are.
template <class Steps>
int find_sources(const Pass& pass, const LaneTile& tile, const Group& z, const Group& y, Workspace& w, Steps& steps) {
    int count = 0;
    for (int i = 0; i < z.visits; ++i) {
        const Visit& visit_z = pass.z.visits[z.first_visit + i];
        for (int j = 0; j < y.visits; ++j) {
            const Visit& visit_y = pass.y.visits[y.first_visit + j];
            const int64_t slot = (int64_t)visit_z.slot * pass.y.slots + visit_y.slot;
            float* row = w.cache + slot * w.away_channels * pass.max_away_pitch;
            Tag& tag = w.tags[slot];
            if (tag.z != visit_z.cell || tag.y != visit_y.cell) {
                tag.z = visit_z.cell;
                tag.y = visit_y.cell;
                steps.pack_away(visit_z.index, visit_y.index, Planar{row, tile.away_pitch});
            }
            w.sources[count++] = {row + tile.left, &visit_y, visit_z.entry[0], visit_z.order[0]};
        }
    }
    return count;
}

// One vector of lanes of one group: what the parts of `dot` need to know.
struct Spot {
    const Plan* plan;
    Workspace* w;
    const LaneVector* lanes;
    const int32_t* mask;
    const Group* y;
    int64_t head;
    Tile tile;
    int visits[kGroupRows];  // sources of each home row
    int source_count;
    ptrdiff_t away_lane, home_row, away_pitch, step;
};

Spot spot_of(const Plan& plan, const Pass& pass, const Item& item, const Group& z, const Group& y, int source_count,
             int vector, Workspace& w) {
    const LaneTile& tile = *item.tile;
    Spot s;
    s.plan = &plan;
    s.w = &w;
    s.lanes = pass.vectors + tile.first_vector + vector;
    s.mask = s.lanes->mask < 0 ? nullptr : pass.masks + s.lanes->mask;
    s.y = &y;
    s.head = item.head;
    s.tile.data = w.scores;
    s.tile.entries = s.lanes->entries;
    s.tile.row = (ptrdiff_t)pass.z.max_count * pass.y.max_count * pass.max_entries * kLanes;
    for (int r = 0; r < kGroupRows; ++r) s.visits[r] = r < y.rows ? z.visits * y.count[r] : 0;
    s.source_count = source_count;
    s.step = pass.step;
    s.away_lane = (ptrdiff_t)vector * kLanes + pass.offset + (ptrdiff_t)s.lanes->first_entry * pass.step;
    s.home_row = w.home_channels * kLanes;
    s.away_pitch = tile.away_pitch;
    return s;
}

DotOperands dot_operands(const Spot& s, const Source& source, int64_t home_channel, int64_t away_channel,
                         int64_t channels) {
    const float* home = s.w->home + source.visit->first * s.home_row + home_channel * kLanes;
    const float* away = source.away + away_channel * s.away_pitch + s.away_lane;
    return {home, s.home_row, away, s.away_pitch, s.step, channels};
}

MixOperands mix_operands(const Spot& s, int64_t away_channel) {
    // Unless it holds a cell, an away lane holds zeros: lanes that see nothing there cannot be spoilt.
    const int32_t* mask = s.lanes->hides_cells ? s.mask : nullptr;
    return {s.w->sources, s.source_count, s.tile,     mask, s.away_lane + away_channel * s.away_pitch,
            s.away_pitch, s.step,         s.y->count, s.w->prefetches};
}

// A tensor that a pass reads, and how much of it.
struct Stream {
    const Tensor* tensor;
    int64_t channels;
};

// What every pass knows about the item that it works on. Passes add
//     pack_away(z, y, row)      for each row that a group sees and that is not in the cache; then, for each vector,
//     pack_home(at, runs, row)  for each row of the group,
//     compute(spot),
//     unpack(r, at, runs)       for each row of the group
struct Walk {
    const Plan& plan;
    const Pass& pass;
    const Item& item;
    const LaneTile& tile;
    Workspace& w;
    Stream home_streams[3] = {}, away_streams[2] = {}, result_streams[2] = {};
    Walk(const Plan& plan, const Pass& pass, const Item& item, Workspace& w)
        : plan(plan), pass(pass), item(item), tile(*item.tile), w(w) {}

    const Group& group_z(int64_t g) const { return pass.z.groups[g / pass.y.group_count]; }
    const Group& group_y(int64_t g) const { return pass.y.groups[g % pass.y.group_count]; }
    RowAddress address(int64_t z, int64_t y) const { return {item.first_batch, item.head, z, y}; }
    float* home_row(int r) const { return w.home + r * w.home_channels * kLanes; }
    Runs home_runs(int vector) const {
        return {pass.runs + tile.home_first_run, tile.home_runs, vector * kLanes, (vector + 1) * kLanes};
    }
    Runs away_runs(int first_lane, int last_lane) const {
        return {pass.runs + tile.away_first_run, tile.away_runs, first_lane, last_lane};
    }
    // A row has more away lanes than home lanes: each vector sees to its share of them.
    Runs away_share(int vector) const {
        return away_runs(tile.away_pitch * vector / tile.vectors, tile.away_pitch * (vector + 1) / tile.vectors);
    }

    void list(const Stream* streams, int count, const RowAddress& at, Runs runs, bool write) const {
        for (int i = 0; i < count; ++i)
            if (streams[i].tensor)
                list_row(plan, *streams[i].tensor, streams[i].channels, at, runs, write, *w.prefetches);
    }

    // Lists the results of this vector, and its share of what the next group will read.
    void list_prefetches(int64_t g, int vector) const {
        w.prefetches->count = w.prefetches->done = 0;
        for (int r = 0; r < group_y(g).rows; ++r)
            list(result_streams, 2, address(group_z(g).home[0], group_y(g).home[r]), home_runs(vector), true);
        if (g + 1 >= item.last_group) return;
        const Group &z = group_z(g + 1), &y = group_y(g + 1);
        for (int r = 0; r < y.rows; ++r)
            list(home_streams, 3, address(z.home[0], y.home[r]), home_runs(vector), false);
        for (int i = 0; i < z.visits; ++i)
            for (int j = 0; j < y.visits; ++j) {
                const Visit& visit_z = pass.z.visits[z.first_visit + i];
                const Visit& visit_y = pass.y.visits[y.first_visit + j];
                const Tag& tag = w.tags[(int64_t)visit_z.slot * pass.y.slots + visit_y.slot];
                if (tag.z == visit_z.cell && tag.y == visit_y.cell) continue;
                if (visit_z.index >= 0 && visit_y.index >= 0)
                    list(away_streams, 2, address(visit_z.index, visit_y.index), away_share(vector), false);
            }
    }
};

template <class Steps>
void walk(Steps& steps) {
    const Pass& pass = steps.pass;
    const Item& item = steps.item;
    const LaneTile& tile = steps.tile;
    Workspace& w = steps.w;
    start_item(steps.plan, pass, w);
    for (int64_t g = item.first_group; g < item.last_group; ++g) {
        const Group &z = steps.group_z(g), &y = steps.group_y(g);
        const int sources = find_sources(pass, tile, z, y, w, steps);
        for (int v = 0; v < tile.vectors; ++v) {
            const Spot spot = spot_of(steps.plan, pass, item, z, y, sources, v, w);
            const Runs runs = steps.home_runs(v);
            steps.list_prefetches(g, v);
            w.prefetches->spread_over(sources * (int)(1 + steps.plan.value_dim / kMixChannels));
            // Some rows or lanes may hold no cell.
            if (spot.mask || y.rows < kGroupRows || item.first_batch + steps.plan.batch_group > steps.plan.batch)
                memset(w.home, 0, w.home_bytes);
            for (int r = 0; r < y.rows; ++r)
                steps.pack_home(steps.address(z.home[0], y.home[r]), runs, Planar{steps.home_row(r), kLanes});
            steps.compute(spot);
            for (int r = 0; r < y.rows; ++r) steps.unpack(r, steps.address(z.home[0], y.home[r]), runs);
        }
    }
}

int64_t bias_entry(const Plan& plan, const Source& source, int r, int entry_x) {
    return ((int64_t)source.entry_z * plan.entries[1] + source.visit->entry[r]) * plan.entries[2] + entry_x;
}

// ---- What a query adds to its logits --------------------------------------------------------------------------------

const float* relative_table(const Plan& plan, int axis, int64_t head) {
    return plan.relative[axis] + head * plan.entries[axis] * plan.head_dim;
}

void entry_range(const Plan& plan, const Spot& s, int axis, int* first, int* last) {
    *first = 0;
    *last = plan.entries[axis];
    if (axis == 1) *first = s.y->first_entry, *last = s.y->last_entry;
    if (axis == 2) *first = s.lanes->first_entry, *last = *first + s.lanes->entries;
}

void query_terms(const Plan& plan, const Spot& s) {
    for (int axis = 0; axis < 3; ++axis) {
        if (!plan.relative[axis]) continue;
        int first, last;
        entry_range(plan, s, axis, &first, &last);
        table_terms<kGroupRows>(s.w->home, s.home_row, kLanes, relative_table(plan, axis, s.head), plan.head_dim,
                                plan.nonzero[axis][s.head], first, last, s.w->terms[axis], kGroupRows * kLanes, kLanes);
    }
}

// What is added to the logits, known to the compiler: branches in the middle of `dot` cost as much as the sums.
enum Terms { kNoTerms, kRelativeTerms, kAllTerms };  // nothing; relative of y and x; relative of all axes and bias

Terms terms_of(const Plan& plan) {
    if (plan.bias || plan.relative[0]) return kAllTerms;
    return plan.relative[1] || plan.relative[2] ? kRelativeTerms : kNoTerms;
}

// Relative and bias of the logits of one source, queries at home. Axes without a table have terms of zero.
template <Terms kTerms>
struct QueryTerms {
    Vector row[kGroupRows];
    const float* x;  // [entry][row][lane]
    const float* bias[kGroupRows];
    QueryTerms(const Spot& s, const Source& source) {
        if (kTerms == kNoTerms) return;
        const Plan& plan = *s.plan;
        const Workspace& w = *s.w;
        const int first_entry = s.lanes->first_entry, first_row = source.visit->first;
        x = w.terms[2] + (first_entry * kGroupRows + first_row) * kLanes;
        for (int r = first_row; r < source.visit->last; ++r) {
            const int i = r - first_row;
            row[i] = load(w.terms[1] + (source.visit->entry[r] * kGroupRows + r) * kLanes);
            if (kTerms != kAllTerms) continue;
            row[i] += load(w.terms[0] + (source.entry_z * kGroupRows + r) * kLanes);
            bias[i] = plan.bias ? plan.bias + s.head * plan.bias_entries + bias_entry(plan, source, r, first_entry)
                                : w.zeros;
        }
    }
    NEARSIGHT_INLINE Vector at(int r, int e) const {
        if (kTerms == kNoTerms) return Vector{};
        const Vector relative = row[r] + load(x + (e * kGroupRows + r) * kLanes);
        return kTerms == kAllTerms ? relative + splat(bias[r][e]) : relative;
    }
};

// ---- Forward --------------------------------------------------------------------------------------------------------

// The part of `dot` that makes logits and finds the greatest of each query.
template <Terms kTerms>
struct LogitPart {
    const QueryTerms<kTerms>* terms;
    float* target[kGroupRows];
    const int32_t* mask;
    Vector* greatest;  // of the first row
    Vector start(int r, int e) const { return terms->at(r, e); }
    template <int kEntries>
    void finish(int r, int entry, Vector* logits) {
        if (mask)
            for (int e = 0; e < kEntries; ++e)
                logits[e] = choose(load_mask(mask + (entry + e) * kLanes), logits[e], splat(-__builtin_inff()));
        Vector most = greatest[r];
        for (int e = 0; e < kEntries; ++e) {
            most = maximum(most, logits[e]);
            store(target[r] + (entry + e) * kLanes, logits[e]);
        }
        greatest[r] = most;
    }
};

template <Terms kTerms>
void logits(const Spot& s, Vector* greatest) {
    for (int i = 0; i < s.source_count; ++i) {
        const Source& source = s.w->sources[i];
        const Visit& visit = *source.visit;
        s.w->prefetches->issue();
        const QueryTerms<kTerms> terms(s, source);
        LogitPart<kTerms> part = {&terms, {}, s.mask, greatest + visit.first};
        for (int r = visit.first; r < visit.last; ++r)
            part.target[r - visit.first] = s.tile.at(r, order(source, s.y->count, r));
        dot_all(dot_operands(s, source, 0, 0, s.plan->head_dim), visit.last - visit.first, s.lanes->entries, part);
    }
}

// Logits become weights, not yet divided by their sum, which is returned.
Vector softmax(float* scores, int count, Vector greatest) {
    Vector sum = {};
    for (int i = 0; i < count; ++i) {
        const Vector weight = exp2(load(scores + i * kLanes) - greatest);
        store(scores + i * kLanes, weight);
        sum += weight;
    }
    return sum;
}

void forward_spot(const Spot& s) {
    const Plan& plan = *s.plan;
    Vector greatest[kGroupRows];
    for (int r = 0; r < kGroupRows; ++r) greatest[r] = splat(-__builtin_inff());
    query_terms(plan, s);
    switch (terms_of(plan)) {
        case kNoTerms: logits<kNoTerms>(s, greatest); break;
        case kRelativeTerms: logits<kRelativeTerms>(s, greatest); break;
        case kAllTerms: logits<kAllTerms>(s, greatest); break;
    }
    Vector sum[kGroupRows];
    for (int r = 0; r < s.y->rows; ++r) sum[r] = softmax(s.tile.at(r, 0), s.visits[r] * s.tile.entries, greatest[r]);

    const ptrdiff_t result_row = (plan.value_dim + 1) * kLanes;
    float* result = s.w->result;
    mix_all(mix_operands(s, plan.head_dim), plan.value_dim, result, result_row);
    for (int r = 0; r < s.y->rows; ++r) {
        float* row = result + r * result_row;
        const Vector share = 1.0f / sum[r];
        for (int64_t c = 0; c < plan.value_dim; ++c) store(row + c * kLanes, load(row + c * kLanes) * share);
        if (plan.lse) store(row + plan.value_dim * kLanes, greatest[r] * kLn2 + log_natural(sum[r]));
    }
}

Workspace forward_workspace(const Plan& plan, Arena& arena) {
    return carve(plan, plan.query_pass, plan.head_dim + plan.value_dim, plan.head_dim, plan.value_dim + 1, false, arena);
}

void pack_keys(const Plan& plan, const RowAddress& at, Runs runs, Planar row) {
    const Planar values = {row.data + plan.head_dim * row.pitch, row.pitch};
    if (at.z < 0 || at.y < 0) {
        memset(row.data, 0, (size_t)((plan.head_dim + plan.value_dim) * row.pitch) * sizeof(float));
        return;
    }
    pack_row(plan, plan.key, plan.head_dim, at, runs, 1.0f, row);
    pack_row(plan, plan.value, plan.value_dim, at, runs, 1.0f, values);
}

struct ForwardWalk : Walk {
    ForwardWalk(const Plan& plan, const Item& item, Workspace& w) : Walk(plan, plan.query_pass, item, w) {
        home_streams[0] = {&plan.query, plan.head_dim};
        away_streams[0] = {&plan.key, plan.head_dim};
        away_streams[1] = {&plan.value, plan.value_dim};
        result_streams[0] = {&plan.out_tensor, plan.value_dim};
    }
    void pack_home(const RowAddress& at, Runs runs, Planar row) const {
        pack_row(plan, plan.query, plan.head_dim, at, runs, plan.query_multiplier, row);
    }
    void pack_away(int64_t z, int64_t y, Planar row) const {
        pack_keys(plan, address(z, y), away_runs(0, tile.away_pitch), row);
    }
    void compute(const Spot& spot) const { forward_spot(spot); }
    void unpack(int r, const RowAddress& at, Runs runs) const {
        float* row = w.result + r * (plan.value_dim + 1) * kLanes;
        unpack_row(plan, plan.out_tensor, plan.value_dim, at, runs, 1.0f, {row, kLanes});
        if (plan.lse) unpack_scalars(plan, plan.lse, at, runs, 1.0f, row + plan.value_dim * kLanes);
    }
};

// ---- Gradients of query, bias and relative --------------------------------------------------------------------------

// Home channels: query, gradient of out, -lse in base 2, -delta.
struct QueryHome {
    int64_t query, grad_out, minus_lse, minus_delta, channels;
    explicit QueryHome(const Plan& plan)
        : query(0),
          grad_out(plan.head_dim),
          minus_lse(grad_out + plan.value_dim),
          minus_delta(minus_lse + 1),
          channels(minus_delta + 1) {}
};

// Logits minus log-sum-exp become weights.
template <Terms kTerms>
struct WeightPart {
    const QueryTerms<kTerms>* terms;
    Vector minus_lse[kGroupRows];
    float* target[kGroupRows];
    Vector start(int r, int e) const { return terms->at(r, e) + minus_lse[r]; }
    template <int kEntries>
    void finish(int r, int entry, const Vector* logits) {
        for (int e = 0; e < kEntries; ++e) store(target[r] + (entry + e) * kLanes, exp2(logits[e]));
    }
};

// weight * (grad_out . value - delta) is the gradient of the logit.
template <int kEntries>
NEARSIGHT_INLINE void multiply_weights(float* weights, const int32_t* mask, const Vector* sums) {
    Vector gradients[kEntries];
    for (int e = 0; e < kEntries; ++e) gradients[e] = sums[e] * load(weights + e * kLanes);
    if (mask)
        for (int e = 0; e < kEntries; ++e) gradients[e] = keep(load_mask(mask + e * kLanes), gradients[e]);
    for (int e = 0; e < kEntries; ++e) store(weights + e * kLanes, gradients[e]);
}

struct LogitGradientPart {
    Vector minus_delta[kGroupRows];
    float* target[kGroupRows];
    const int32_t* mask;
    Vector start(int r, int) const { return minus_delta[r]; }
    template <int kEntries>
    void finish(int r, int entry, const Vector* sums) {
        multiply_weights<kEntries>(target[r] + entry * kLanes, mask ? mask + entry * kLanes : nullptr, sums);
    }
};

template <Terms kTerms>
void logit_gradients(const Spot& s) {
    const Plan& plan = *s.plan;
    const QueryHome channel(plan);
    for (int i = 0; i < s.source_count; ++i) {
        const Source& source = s.w->sources[i];
        const Visit& visit = *source.visit;
        s.w->prefetches->issue();
        const QueryTerms<kTerms> terms(s, source);
        WeightPart<kTerms> weights;
        LogitGradientPart gradients;
        weights.terms = &terms;
        gradients.mask = s.mask;
        for (int r = visit.first; r < visit.last; ++r) {
            const float* home = s.w->home + r * s.home_row;
            const int i_row = r - visit.first;
            weights.minus_lse[i_row] = load(home + channel.minus_lse * kLanes);
            gradients.minus_delta[i_row] = load(home + channel.minus_delta * kLanes);
            weights.target[i_row] = gradients.target[i_row] = s.tile.at(r, order(source, s.y->count, r));
        }
        const int rows = visit.last - visit.first;
        dot_all(dot_operands(s, source, channel.query, 0, plan.head_dim), rows, s.lanes->entries, weights);
        dot_all(dot_operands(s, source, channel.grad_out, plan.head_dim, plan.value_dim), rows, s.lanes->entries,
                gradients);
    }
}

// Sums of the logits' gradients of home row r, entries `entry` onwards: over y and z for each of them, and over them
// for each source.
template <int kEntries>
NEARSIGHT_INLINE void sum_entries(const Spot& s, int r, int entry, int entries) {
    if constexpr (kEntries > 1)
        if (entries < kEntries) return sum_entries<kEntries - 1>(s, r, entry, entries);
    const Workspace& w = *s.w;
    Vector sums[kEntries] = {};
    for (int i = 0; i < s.source_count; ++i) {
        const Source& source = w.sources[i];
        if (r < source.visit->first || r >= source.visit->last) continue;
        const float* row = s.tile.at(r, order(source, s.y->count, r)) + entry * kLanes;
        Vector sum = {};
#pragma GCC unroll 8
        for (int e = 0; e < kEntries; ++e) {
            const Vector gradient = load(row + e * kLanes);
            sums[e] += gradient;
            sum += gradient;
        }
        add_to(w.sums[1] + (source.visit->entry[r] * kGroupRows + r) * kLanes, sum);
        if (s.plan->relative[0]) add_to(w.sums[0] + (source.entry_z * kGroupRows + r) * kLanes, sum);
    }
    float* x = w.sums[2] + ((s.lanes->first_entry + entry) * kGroupRows + r) * kLanes;
#pragma GCC unroll 8
    for (int e = 0; e < kEntries; ++e) store(x + e * kGroupRows * kLanes, sums[e]);
}

// Sums of the logits' gradients over all entries but those of one axis.
void sum_over_axes(const Spot& s) {
    constexpr int kBlock = 8;
    for (int axis = 0; axis < 3; ++axis)
        memset(s.w->sums[axis], 0, (size_t)s.plan->entries[axis] * kGroupRows * kLanes * sizeof(float));
    for (int r = 0; r < s.y->rows; ++r)
        for (int entry = 0; entry < s.tile.entries; entry += kBlock)
            sum_entries<kBlock>(s, r, entry, s.tile.entries - entry);
}

void add_bias_gradient(const Spot& s) {
    for (int i = 0; i < s.source_count; ++i) {
        const Source& source = s.w->sources[i];
        for (int r = source.visit->first; r < source.visit->last; ++r) {
            const float* row = s.tile.at(r, order(source, s.y->count, r));
            float* target = s.w->bias_gradient + bias_entry(*s.plan, source, r, s.lanes->first_entry) * kLanes;
            for (int e = 0; e < s.tile.entries; ++e) add_to(target + e * kLanes, load(row + e * kLanes));
        }
    }
}

void query_gradient_spot(const Spot& s) {
    const Plan& plan = *s.plan;
    query_terms(plan, s);
    switch (terms_of(plan)) {
        case kNoTerms: logit_gradients<kNoTerms>(s); break;
        case kRelativeTerms: logit_gradients<kRelativeTerms>(s); break;
        case kAllTerms: logit_gradients<kAllTerms>(s); break;
    }
    if (plan.bias_parts) add_bias_gradient(s);

    const ptrdiff_t result_row = plan.head_dim * kLanes;
    float* result = s.w->result;
    if (plan.want_query) mix_all(mix_operands(s, 0), plan.head_dim, result, result_row);
    if (!plan.relative[0] && !plan.relative[1] && !plan.relative[2]) return;
    sum_over_axes(s);
    for (int axis = 0; axis < 3; ++axis) {
        if (!plan.relative[axis]) continue;
        int first, last;
        entry_range(plan, s, axis, &first, &last);
        if (plan.want_query)
            add_table_gradient(s.w->sums[axis], relative_table(plan, axis, s.head), plan.head_dim,
                               plan.nonzero[axis][s.head], first, last, result, result_row);
        if (plan.relative_parts[axis])
            add_relative_gradient(s.w->sums[axis], s.w->home, s.home_row, plan.head_dim, first, last, s.w->relative_gradient[axis]);
    }
}

Workspace query_gradient_workspace(const Plan& plan, Arena& arena) {
    const int64_t result = plan.head_dim > plan.value_dim ? plan.head_dim : plan.value_dim;
    return carve(plan, plan.query_pass, plan.head_dim + plan.value_dim, QueryHome(plan).channels, result, true, arena);
}

// Packs a home row, and computes delta, which the gradients of key and value need as well.
void pack_query_home(const Plan& plan, const RowAddress& at, Runs runs, Planar home, float* scratch) {
    const QueryHome channel(plan);
    const auto plane = [&](int64_t c) { return home.data + c * home.pitch; };
    pack_row(plan, plan.query, plan.head_dim, at, runs, plan.query_multiplier, home);
    pack_row(plan, plan.grad_out, plan.value_dim, at, runs, 1.0f, {plane(channel.grad_out), home.pitch});
    pack_scalars(plan, plan.lse, at, runs, -kLog2E, plane(channel.minus_lse));
    pack_row(plan, plan.out_tensor, plan.value_dim, at, runs, -1.0f, {scratch, home.pitch});
    Vector sum = {};
    for (int64_t c = 0; c < plan.value_dim; ++c)
        sum += load(scratch + c * home.pitch) * load(plane(channel.grad_out + c));
    store(plane(channel.minus_delta), sum);
    unpack_scalars(plan, plan.delta, at, runs, -1.0f, plane(channel.minus_delta));
}

struct QueryGradientWalk : Walk {
    QueryGradientWalk(const Plan& plan, const Item& item, Workspace& w) : Walk(plan, plan.query_pass, item, w) {
        home_streams[0] = {&plan.query, plan.head_dim};
        home_streams[1] = {&plan.grad_out, plan.value_dim};
        home_streams[2] = {&plan.out_tensor, plan.value_dim};
        away_streams[0] = {&plan.key, plan.head_dim};
        away_streams[1] = {&plan.value, plan.value_dim};
        if (plan.want_query) result_streams[0] = {&plan.grad_query, plan.head_dim};
    }
    void pack_home(const RowAddress& at, Runs runs, Planar row) const {
        pack_query_home(plan, at, runs, row, w.result);
    }
    void pack_away(int64_t z, int64_t y, Planar row) const {
        pack_keys(plan, address(z, y), away_runs(0, tile.away_pitch), row);
    }
    void compute(const Spot& spot) const { query_gradient_spot(spot); }
    void unpack(int r, const RowAddress& at, Runs runs) const {
        float* row = w.result + r * plan.head_dim * kLanes;
        if (plan.want_query) unpack_row(plan, plan.grad_query, plan.head_dim, at, runs, plan.scale, {row, kLanes});
    }
};

bool wants_query_gradients(const Plan& plan) {
    return plan.want_query || plan.bias_parts || plan.relative_parts[0] || plan.relative_parts[1] ||
           plan.relative_parts[2];
}

void query_gradient_item(const Plan& plan, const Item& item, Workspace& w) {
    const int64_t result_channels = plan.head_dim > plan.value_dim ? plan.head_dim : plan.value_dim;
    memset(w.result, 0, (size_t)(kGroupRows * result_channels * kLanes) * sizeof(float));
    QueryGradientWalk steps(plan, item, w);
    if (wants_query_gradients(plan)) {
        walk(steps);
        return;
    }
    // The gradients of key and value still need delta.
    for (int64_t g = item.first_group; g < item.last_group; ++g)
        for (int r = 0; r < steps.group_y(g).rows; ++r)
            for (int v = 0; v < steps.tile.vectors; ++v)
                steps.pack_home(steps.address(steps.group_z(g).home[0], steps.group_y(g).home[r]), steps.home_runs(v),
                                {w.home, kLanes});
}

// ---- Gradients of key and value -------------------------------------------------------------------------------------

// Away channels: query, gradient of out, -lse in base 2, -delta, zeros, then the relative terms of every entry of z, y
// and x; those of x have -lse added.
struct KeyAway {
    int64_t query, grad_out, minus_lse, minus_delta, zeros, terms[3], channels;
    explicit KeyAway(const Plan& plan) {
        query = 0;
        grad_out = plan.head_dim;
        minus_lse = grad_out + plan.value_dim;
        minus_delta = minus_lse + 1;
        zeros = minus_delta + 1;
        channels = zeros + 1;
        for (int axis = 0; axis < 3; ++axis) {
            terms[axis] = channels;
            if (plan.relative[axis]) channels += plan.entries[axis];
        }
    }
};

// As QueryTerms, but the queries are away: lane l of entry e finds its own at l + e * step.
template <Terms kTerms>
struct KeyWeightPart {
    const float* x;
    const float* y[kGroupRows];
    const float* z;
    const float* bias[kGroupRows];
    ptrdiff_t step, x_step;
    float* target[kGroupRows];
    const int32_t* mask;
    NEARSIGHT_INLINE Vector start(int r, int e) const {
        Vector sum = load(x + e * x_step);
        if (kTerms != kNoTerms) sum += load(y[r] + e * step);
        if (kTerms == kAllTerms) sum += load(z + e * step) + splat(bias[r][e]);
        return sum;
    }
    template <int kEntries>
    void finish(int r, int entry, const Vector* logits) {
        Vector weights[kEntries];
        for (int e = 0; e < kEntries; ++e) weights[e] = exp2(logits[e]);
        if (mask)
            for (int e = 0; e < kEntries; ++e) weights[e] = keep(load_mask(mask + (entry + e) * kLanes), weights[e]);
        for (int e = 0; e < kEntries; ++e) store(target[r] + (entry + e) * kLanes, weights[e]);
    }
};

struct KeyGradientPart {
    const float* minus_delta;
    ptrdiff_t step;
    float* target[kGroupRows];
    const int32_t* mask;
    Vector start(int, int e) const { return load(minus_delta + e * step); }
    template <int kEntries>
    void finish(int r, int entry, const Vector* sums) {
        multiply_weights<kEntries>(target[r] + entry * kLanes, mask ? mask + entry * kLanes : nullptr, sums);
    }
};

template <Terms kTerms>
KeyWeightPart<kTerms> key_weight_part(const Spot& s, const Source& source) {
    const Plan& plan = *s.plan;
    const KeyAway channel(plan);
    const Visit& visit = *source.visit;
    const float* away = source.away + s.away_lane;
    const int first_entry = s.lanes->first_entry;
    const auto terms = [&](int axis, int entry) {
        return away + (plan.relative[axis] ? channel.terms[axis] + entry : channel.zeros) * s.away_pitch;
    };
    KeyWeightPart<kTerms> part = {};
    part.step = s.step;
    part.x = plan.relative[2] ? terms(2, first_entry) : away + channel.minus_lse * s.away_pitch;
    part.x_step = plan.relative[2] ? s.step + s.away_pitch : s.step;
    part.z = terms(0, source.entry_z);
    part.mask = s.mask;
    for (int r = visit.first; r < visit.last; ++r) {
        const int i = r - visit.first;
        part.target[i] = s.tile.at(r, order(source, s.y->count, r));
        part.y[i] = terms(1, visit.entry[r]);
        part.bias[i] = plan.bias
                           ? plan.bias + s.head * plan.bias_entries + bias_entry(plan, source, r, first_entry)
                           : s.w->zeros;
    }
    return part;
}

template <Terms kTerms>
void key_weights(const Spot& s) {
    for (int i = 0; i < s.source_count; ++i) {
        const Source& source = s.w->sources[i];
        s.w->prefetches->issue();
        dot_all(dot_operands(s, source, 0, 0, s.plan->head_dim), source.visit->last - source.visit->first,
                s.lanes->entries, key_weight_part<kTerms>(s, source));
    }
}

void key_logit_gradients(const Spot& s) {
    const Plan& plan = *s.plan;
    const KeyAway channel(plan);
    for (int i = 0; i < s.source_count; ++i) {
        const Source& source = s.w->sources[i];
        const Visit& visit = *source.visit;
        KeyGradientPart part = {source.away + s.away_lane + channel.minus_delta * s.away_pitch, s.step, {}, s.mask};
        for (int r = visit.first; r < visit.last; ++r)
            part.target[r - visit.first] = s.tile.at(r, order(source, s.y->count, r));
        dot_all(dot_operands(s, source, plan.head_dim, channel.grad_out, plan.value_dim), visit.last - visit.first,
                s.lanes->entries, part);
    }
}

// Result channels: gradient of key, gradient of value.
void key_gradient_spot(const Spot& s) {
    const Plan& plan = *s.plan;
    const KeyAway channel(plan);
    switch (terms_of(plan)) {
        case kNoTerms: key_weights<kNoTerms>(s); break;
        case kRelativeTerms: key_weights<kRelativeTerms>(s); break;
        case kAllTerms: key_weights<kAllTerms>(s); break;
    }
    const ptrdiff_t result_row = (plan.head_dim + plan.value_dim) * kLanes;
    float* result = s.w->result;
    if (plan.want_value)
        mix_all(mix_operands(s, channel.grad_out), plan.value_dim, result + plan.head_dim * kLanes, result_row);
    if (!plan.want_key) return;
    key_logit_gradients(s);
    mix_all(mix_operands(s, channel.query), plan.head_dim, result, result_row);
}

Workspace key_gradient_workspace(const Plan& plan, Arena& arena) {
    const int64_t channels = plan.head_dim + plan.value_dim;
    return carve(plan, plan.key_pass, KeyAway(plan).channels, channels, channels, false, arena);
}

void pack_queries(const Plan& plan, const RowAddress& at, Runs runs, Planar row) {
    const KeyAway channel(plan);
    const auto plane = [&](int64_t c) { return row.data + c * row.pitch; };
    pack_row(plan, plan.query, plan.head_dim, at, runs, plan.query_multiplier, row);
    pack_row(plan, plan.grad_out, plan.value_dim, at, runs, 1.0f, {plane(channel.grad_out), row.pitch});
    pack_scalars(plan, plan.lse, at, runs, -kLog2E, plane(channel.minus_lse));
    pack_scalars(plan, plan.delta, at, runs, -1.0f, plane(channel.minus_delta));
    for (int axis = 0; axis < 3; ++axis) {
        if (!plan.relative[axis]) continue;
        for (ptrdiff_t lane = 0; lane < row.pitch; lane += kLanes)
            table_terms<1>(row.data + lane, 0, row.pitch, relative_table(plan, axis, at.head), plan.head_dim,
                           plan.nonzero[axis][at.head], 0, plan.entries[axis], plane(channel.terms[axis]) + lane,
                           row.pitch, 0);
    }
    for (int entry = 0; plan.relative[2] && entry < plan.entries[2]; ++entry)
        for (ptrdiff_t lane = 0; lane < row.pitch; lane += kLanes)
            add_to(plane(channel.terms[2] + entry) + lane, load(plane(channel.minus_lse) + lane));
}

struct KeyGradientWalk : Walk {
    KeyGradientWalk(const Plan& plan, const Item& item, Workspace& w) : Walk(plan, plan.key_pass, item, w) {
        home_streams[0] = {&plan.key, plan.head_dim};
        home_streams[1] = {&plan.value, plan.value_dim};
        away_streams[0] = {&plan.query, plan.head_dim};
        away_streams[1] = {&plan.grad_out, plan.value_dim};
        if (plan.want_key) result_streams[0] = {&plan.grad_key, plan.head_dim};
        if (plan.want_value) result_streams[1] = {&plan.grad_value, plan.value_dim};
    }
    void pack_home(const RowAddress& at, Runs runs, Planar row) const { pack_keys(plan, at, runs, row); }
    void pack_away(int64_t z, int64_t y, Planar row) const {
        pack_queries(plan, address(z, y), away_runs(0, tile.away_pitch), row);
    }
    void compute(const Spot& spot) const { key_gradient_spot(spot); }
    void unpack(int r, const RowAddress& at, Runs runs) const {
        float* row = w.result + r * (plan.head_dim + plan.value_dim) * kLanes;
        float* values = row + plan.head_dim * kLanes;
        // The packed query carries scale * log2(e).
        if (plan.want_key) unpack_row(plan, plan.grad_key, plan.head_dim, at, runs, kLn2, {row, kLanes});
        if (plan.want_value) unpack_row(plan, plan.grad_value, plan.value_dim, at, runs, 1.0f, {values, kLanes});
    }
};

// ---- Jobs -----------------------------------------------------------------------------------------------------------

template <class Work>
void each_item(const Plan& plan, const Pass& pass, int64_t head, int64_t job, Work work) {
    const int64_t last = (int64_t)pass.items * (job + 1) / pass.jobs;
    for (int64_t i = (int64_t)pass.items * job / pass.jobs; i < last; ++i) work(item_of(plan, pass, head, i));
}

// Adds the lanes of an accumulator to a job's partial sums, and clears it.
void flush(float* accumulator, int64_t count, float multiplier, float* part) {
    for (int64_t i = 0; i < count; ++i) {
        part[i] += sum_lanes(load(accumulator + i * kLanes)) * multiplier;
        store(accumulator + i * kLanes, Vector{});
    }
}

void forward(const Plan* plan, int64_t head, int64_t job, char* workspace) {
    Arena arena = {workspace, 0};
    Workspace w = forward_workspace(*plan, arena);
    each_item(*plan, plan->query_pass, head, job, [&](const Item& item) {
        ForwardWalk steps(*plan, item, w);
        walk(steps);
    });
}

void query_gradient(const Plan* plan, int64_t head, int64_t job, char* workspace) {
    Arena arena = {workspace, 0};
    Workspace w = query_gradient_workspace(*plan, arena);
    const int64_t part = head * plan->query_pass.jobs + job;
    if (w.bias_gradient) memset(w.bias_gradient, 0, (size_t)(plan->bias_entries * kLanes) * sizeof(float));
    for (int axis = 0; axis < 3; ++axis)
        if (w.relative_gradient[axis])
            memset(w.relative_gradient[axis], 0,
                   (size_t)(plan->entries[axis] * plan->head_dim * kLanes) * sizeof(float));
    each_item(*plan, plan->query_pass, head, job, [&](const Item& item) {
        query_gradient_item(*plan, item, w);
        if (w.bias_gradient)
            flush(w.bias_gradient, plan->bias_entries, 1.0f, plan->bias_parts + part * plan->bias_entries);
        for (int axis = 0; axis < 3; ++axis) {
            const int64_t count = plan->entries[axis] * plan->head_dim;
            // The packed query carries scale * log2(e).
            if (w.relative_gradient[axis])
                flush(w.relative_gradient[axis], count, kLn2, plan->relative_parts[axis] + part * count);
        }
    });
}

void key_gradient(const Plan* plan, int64_t head, int64_t job, char* workspace) {
    Arena arena = {workspace, 0};
    Workspace w = key_gradient_workspace(*plan, arena);
    each_item(*plan, plan->key_pass, head, job, [&](const Item& item) {
        KeyGradientWalk steps(*plan, item, w);
        walk(steps);
    });
}

size_t forward_bytes(const Plan* plan) {
    Arena arena = {nullptr, 0};
    forward_workspace(*plan, arena);
    return arena.used;
}

size_t query_gradient_bytes(const Plan* plan) {
    Arena arena = {nullptr, 0};
    query_gradient_workspace(*plan, arena);
    return arena.used;
}

size_t key_gradient_bytes(const Plan* plan) {
    Arena arena = {nullptr, 0};
    key_gradient_workspace(*plan, arena);
    return arena.used;
}

}  // namespace

const nearsight::Kernel nearsight::NEARSIGHT_KERNEL = {
    kLanes, forward_bytes, query_gradient_bytes, key_gradient_bytes, forward, query_gradient, key_gradient,
};
