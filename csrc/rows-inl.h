// SPDX-License-Identifier: Apache-2.0
//
// Moves rows between tensors and packed memory, and asks for memory ahead of time. Part of kernel.cpp.

#ifndef NEARSIGHT_ROWS_INL_H
#define NEARSIGHT_ROWS_INL_H

#include "plan.h"
#include "simd-inl.h"

namespace {

using namespace nearsight;

// Packed memory holds channel c of lane l at [l * lane + c * channel]: in planes neighbouring lanes are neighbours, in
// cells neighbouring channels are.
struct Packed {
    float* data;
    ptrdiff_t lane, channel;
};

Packed planes(float* data, ptrdiff_t pitch) { return {data, 1, pitch}; }
Packed cells(float* data, int64_t channels) { return {data, channels, 1}; }

// Whether so many channels fill vectors, and these are wide enough that cells beat planes in `mix`.
bool fit_cells(int64_t channels) { return kLanes == 16 && channels % kLanes == 0; }

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

// Planes to planes, in blocks of lanes: a loop over a row of 14 cells would end in six steps of one cell.
template <class From, class To>
bool move_planes(const From* source, ptrdiff_t source_pitch, To* target, ptrdiff_t target_pitch, int64_t channels,
                 int count, float multiplier) {
    const auto vectors = [&](int i) {
        for (int64_t c = 0; c < channels; ++c)
            store_vector(target + c * target_pitch + i, load_vector(source + c * source_pitch + i) * multiplier);
    };
    const auto quads = [&](int i) {
        for (int64_t c = 0; c < channels; ++c)
            store_quad(target + c * target_pitch + i, load_quad(source + c * source_pitch + i) * multiplier);
    };
    return cover(count, kLanes, vectors) || cover(count, 4, quads);
}

template <class T>
void pack_planes(const T* source, ptrdiff_t stride, ptrdiff_t channel_stride, int64_t channels, const Run& run,
                 float multiplier, float* row, ptrdiff_t pitch) {
    float* lanes = row + run.lane;
    if (stride == 1 && channel_stride != 1) {
        if (run.step == 1 &&
            move_planes(source, channel_stride, lanes, pitch, channels, run.count, multiplier)) return;
        for (int64_t c = 0; c < channels; ++c)
            for (int i = 0; i < run.count; ++i)
                lanes[c * pitch + i * run.step] = load_one(source + c * channel_stride + i) * multiplier;
    } else if (run.step != 1) {
        for (int i = 0; i < run.count; ++i)
            pack_lane(source + i * stride, channel_stride, channels, multiplier, lanes + i * run.step, pitch);
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
void unpack_planes(T* target, ptrdiff_t stride, ptrdiff_t channel_stride, int64_t channels, const Run& run,
                   float multiplier, const float* row, ptrdiff_t pitch) {
    const float* lanes = row + run.lane;
    if (run.step == 1 && channel_stride == 1 && channels > 1) {
        unpack_interleaved(target, stride, channels, run.count, multiplier, lanes, pitch);
        return;
    }
    if (run.step == 1 && stride == 1 &&
        move_planes(lanes, pitch, target, channel_stride, channels, run.count, multiplier)) return;
    for (int64_t c = 0; c < channels; ++c)
        for (int i = 0; i < run.count; ++i)
            store_one(target + c * channel_stride + i * stride, lanes[c * pitch + i * run.step] * multiplier);
}

// Between planes and cells, whole vectors of channels: blocks of lanes x 4 channels are transposed in registers.
template <class T>
bool transpose_to_cells(const T* source, ptrdiff_t channel_stride, int64_t channels, int count, float multiplier,
                        float* cells, ptrdiff_t pitch) {
    const auto vectors = [&](int i) {
        for (int64_t c = 0; c < channels; c += 4) {
            Vector v[4];
            for (int k = 0; k < 4; ++k) v[k] = load_vector(source + (c + k) * channel_stride + i) * multiplier;
            transpose_quads(v[0], v[1], v[2], v[3]);
            for (int k = 0; k < 4; ++k) store_quads(cells + (i + k) * pitch + c, 4 * pitch, v[k]);
        }
    };
    const auto quads = [&](int i) {
        for (int64_t c = 0; c < channels; c += 4) {
            Quad v[4];
            for (int k = 0; k < 4; ++k) v[k] = load_quad(source + (c + k) * channel_stride + i) * multiplier;
            transpose_quad(v[0], v[1], v[2], v[3]);
            for (int k = 0; k < 4; ++k) store_quad(cells + (i + k) * pitch + c, v[k]);
        }
    };
    return cover(count, kLanes, vectors) || cover(count, 4, quads);
}

template <class T>
bool transpose_from_cells(const float* cells, ptrdiff_t pitch, int64_t channels, int count, float multiplier, T* target,
                          ptrdiff_t channel_stride) {
    const auto vectors = [&](int i) {
        for (int64_t c = 0; c < channels; c += 4) {
            Vector v[4];
            for (int k = 0; k < 4; ++k) v[k] = load_quads(cells + (i + k) * pitch + c, 4 * pitch) * multiplier;
            transpose_quads(v[0], v[1], v[2], v[3]);
            for (int k = 0; k < 4; ++k) store_vector(target + (c + k) * channel_stride + i, v[k]);
        }
    };
    const auto quads = [&](int i) {
        for (int64_t c = 0; c < channels; c += 4) {
            Quad v[4];
            for (int k = 0; k < 4; ++k) v[k] = load_quad(cells + (i + k) * pitch + c) * multiplier;
            transpose_quad(v[0], v[1], v[2], v[3]);
            for (int k = 0; k < 4; ++k) store_quad(target + (c + k) * channel_stride + i, v[k]);
        }
    };
    return cover(count, kLanes, vectors) || cover(count, 4, quads);
}

template <class T>
void pack_cells(const T* source, ptrdiff_t stride, ptrdiff_t channel_stride, int64_t channels, const Run& run,
                float multiplier, float* row, ptrdiff_t pitch) {
    float* cells = row + run.lane * pitch;
    if (channel_stride == 1) {
        for (int i = 0; i < run.count; ++i)
            for (int64_t c = 0; c < channels; c += kLanes)
                store(cells + i * run.step * pitch + c, load_vector(source + i * stride + c) * multiplier);
    } else if (stride != 1 || run.step != 1 ||
               !transpose_to_cells(source, channel_stride, channels, run.count, multiplier, cells, pitch)) {
        for (int i = 0; i < run.count; ++i)
            pack_lane(source + i * stride, channel_stride, channels, multiplier, cells + i * run.step * pitch, 1);
    }
}

template <class T>
void unpack_cells(T* target, ptrdiff_t stride, ptrdiff_t channel_stride, int64_t channels, const Run& run,
                  float multiplier, const float* row, ptrdiff_t pitch) {
    const float* cells = row + run.lane * pitch;
    if (channel_stride == 1) {
        for (int i = 0; i < run.count; ++i)
            for (int64_t c = 0; c < channels; c += kLanes)
                store_vector(target + i * stride + c, load(cells + i * run.step * pitch + c) * multiplier);
    } else if (stride != 1 || run.step != 1 ||
               !transpose_from_cells(cells, pitch, channels, run.count, multiplier, target, channel_stride)) {
        for (int i = 0; i < run.count; ++i)
            unpack_lane(target + i * stride, channel_stride, channels, multiplier, cells + i * run.step * pitch, 1);
    }
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
    return {lane - window.first_lane, run.step, room < left ? room : left, run.group,
            run.index + skipped * run.index_step, run.index_step};
}

int64_t row_offset(const Tensor& t, const RowAddress& at, const Run& run) {
    return (at.first_batch + run.group) * t.batch + at.head * t.head + at.z * t.z + at.y * t.y + run.index * t.x;
}

// Calls work(cells, stride, run) for the runs that lie in the window: the tensor's cells, and how far apart they are.
template <class Work>
NEARSIGHT_INLINE void each_run(const Plan& plan, const Tensor& t, const RowAddress& at, const Runs& runs, Work work) {
    for (int i = 0; i < runs.count; ++i) {
        const Run run = clip(runs.runs[i], runs);
        if (run.count <= 0 || at.first_batch + run.group >= plan.batch) continue;
        const int64_t offset = row_offset(t, at, run), stride = run.index_step * t.x;
        if (plan.bfloat16)
            work((Bfloat16*)t.data + offset, stride, run);
        else
            work((float*)t.data + offset, stride, run);
    }
}

void pack_row(const Plan& plan, const Tensor& t, int64_t channels, const RowAddress& at, const Runs& runs,
              float multiplier, const Packed& row) {
    each_run(plan, t, at, runs, [&](const auto* source, ptrdiff_t stride, const Run& run) {
        if (row.channel == 1)
            pack_cells(source, stride, t.channel, channels, run, multiplier, row.data, row.lane);
        else
            pack_planes(source, stride, t.channel, channels, run, multiplier, row.data, row.channel);
    });
}

void unpack_row(const Plan& plan, const Tensor& t, int64_t channels, const RowAddress& at, const Runs& runs,
                float multiplier, const Packed& row) {
    each_run(plan, t, at, runs, [&](auto* target, ptrdiff_t stride, const Run& run) {
        if (row.channel == 1)
            unpack_cells(target, stride, t.channel, channels, run, multiplier, row.data, row.lane);
        else
            unpack_planes(target, stride, t.channel, channels, run, multiplier, row.data, row.channel);
    });
}

// lse and delta: one contiguous float32 number per query.
int64_t scalar_offset(const Plan& plan, const RowAddress& at, const Run& run) {
    const int64_t image = (at.first_batch + run.group) * plan.heads + at.head;
    return ((image * plan.out[0] + at.z) * plan.out[1] + at.y) * plan.out[2] + run.index;
}

void pack_scalars(const Plan& plan, const float* source, const RowAddress& at, const Runs& runs, float multiplier,
                  float* row) {
    for (int i = 0; i < runs.count; ++i) {
        const Run run = clip(runs.runs[i], runs);
        if (run.count <= 0 || at.first_batch + run.group >= plan.batch) continue;
        pack_planes(source + scalar_offset(plan, at, run), run.index_step, 1, 1, run, multiplier, row, 0);
    }
}

void unpack_scalars(const Plan& plan, float* target, const RowAddress& at, const Runs& runs, float multiplier,
                    const float* row) {
    for (int i = 0; i < runs.count; ++i) {
        const Run run = clip(runs.runs[i], runs);
        if (run.count <= 0 || at.first_batch + run.group >= plan.batch) continue;
        unpack_planes(target + scalar_offset(plan, at, run), run.index_step, 1, 1, run, multiplier, row, 0);
    }
}

// ---- Asking for memory ahead of time --------------------------------------------------------------------------------

// Memory to ask for while something else is computed: waiting for it would take as long as the work. One line at a
// time: until it has come, from wherever it is, each occupies one of the few buffers through which lines reach the
// first cache level, and a burst makes the loads of the work itself wait.
struct Prefetches {
    static constexpr int kMostLines = 1024;
    uintptr_t lines[kMostLines + 1];
    const uintptr_t* next;
    uintptr_t* end;
    int at_once;  // of each call

    void clear() { next = end = lines; }
    // `count` lines, so many bytes apart.
    void add(uintptr_t line, uintptr_t stride, int64_t count) {
        if (end - lines + count > kMostLines) return;
        for (int64_t i = 0; i < count; ++i, line += stride) *end++ = line;
    }
    // Over so many calls, and over the steps of all of them where these ask as well.
    void spread_over(int64_t calls, int64_t steps) {
        *end = (uintptr_t)lines;  // for whoever asks for more
        const int64_t left = end - lines - (kLanes < 16 ? 0 : steps);
        at_once = left > 0 ? (int)(left / (calls > 0 ? calls : 1)) + 1 : 0;
    }
    NEARSIGHT_INLINE void issue() {
        for (int i = 0; i < at_once && next < end; ++i) __builtin_prefetch((const void*)*next++, 0, 2);
    }
    // One line for a step of a call, or one that is there anyway. With AVX-512 the work leaves room for it.
    NEARSIGHT_INLINE void step(const uintptr_t*& own_next) const {
        if (kLanes < 16) return;
        __builtin_prefetch((const void*)*own_next, 0, 2);
        own_next += own_next < end;
    }
};

// A tensor of which a pass reads or writes rows; none when NULL.
struct Stream {
    const Tensor* tensor;
    int64_t channels;
};

// Lists the lines of a run: contiguous memory is the channels of each cell or the cells of each channel.
void list_run(const Plan& plan, const Stream& stream, const RowAddress& at, const Run& run, Prefetches& list) {
    constexpr uintptr_t kLine = 64;
    const Tensor& t = *stream.tensor;
    if (t.channel != 1 && t.x != 1) return;
    const int64_t size = plan.bfloat16 ? 2 : 4;
    const bool interleaved = t.channel == 1;
    const int64_t pieces = interleaved ? run.count : stream.channels;
    const uintptr_t stride = (uintptr_t)((interleaved ? t.x * run.index_step : t.channel) * size);
    const uintptr_t bytes = (uintptr_t)((interleaved ? stream.channels : (run.count - 1) * run.index_step + 1) * size);
    const uintptr_t first = (uintptr_t)(t.data + row_offset(t, at, run) * size);
    if (pieces > Prefetches::kMostLines) return;
    for (uintptr_t byte = 0; byte < bytes; byte += kLine) list.add(first + byte, stride, pieces);
}

void list_row(const Plan& plan, const Stream* streams, int count, const RowAddress& at, const Runs& runs,
              Prefetches& list) {
    constexpr int kMostRuns = 256;
    if (runs.count > kMostRuns) return;  // to look through them for each vector would take longer
    for (int i = 0; i < runs.count; ++i) {
        const Run run = clip(runs.runs[i], runs);
        if (run.count <= 0 || at.first_batch + run.group >= plan.batch || run.step != 1) continue;
        for (int s = 0; s < count; ++s)
            if (streams[s].tensor) list_run(plan, streams[s], at, run, list);
    }
}

}  // namespace

#endif
