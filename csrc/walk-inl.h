// SPDX-License-Identifier: Apache-2.0
//
// Walks over a head's share of a map, group by group and vector by vector, and lays out the scratch memory that this
// takes. Part of kernel.cpp.

#ifndef NEARSIGHT_WALK_INL_H
#define NEARSIGHT_WALK_INL_H

#include <assert.h>

#include "pairs-inl.h"
#include "plan.h"
#include "rows-inl.h"
#include "simd-inl.h"
#include "steps-inl.h"

namespace {

using namespace nearsight;

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
    Leftover* leftover;
    float* cache;  // packed away rows
    Tag* tags;     // which rows they are
    Source* sources;
    float* home;    // one vector of the group's home rows: [row][channel][lane]
    float* result;  // alike
    Prefetches* prefetches;
    float* scores;  // the tile
    float* terms[3];  // of every axis: [entry][row][lane]
    float* zeros;     // stands for a missing bias
    int64_t home_channels;
    ptrdiff_t away_row;  // from one packed row to the next
    size_t cache_bytes, home_bytes;
    float* input;  // a strip of a row of what query, key and value are made of

    // Of pairs.
    float* loose;  // an away row of numbers that are not paired yet
    float* weight_pairs;

    // Of a backward.
    float* sums[3];
    float* bias_gradient;
    float* relative_gradient[3];
    float* ring;
    float* loose_ring;  // rows of a group, as `loose`
    size_t ring_bytes;
    ptrdiff_t ring_row;  // from one of its rows to the next
    Source* ring_sources;
    float* planes;  // sums of the gradients of key and value, where several planes of queries add to them
    int64_t plane_groups;
    size_t planes_bytes;
};

// Floats between the rows of the cache: without them rows of many shapes lie a multiple of 4096 bytes apart and compete
// for the same sets of the first cache level.
constexpr int64_t kSlotPadding = 7 * 16;

int64_t slots(const Pass& pass) { return (int64_t)pass.z.slots * pass.y.slots; }

// ---- What packed rows hold ------------------------------------------------------------------------------------------

// Whether dot and mix multiply in pairs: a kernel that has them is given bfloat16 alone.
constexpr bool in_pairs(const Plan&) { return kHasPairs; }
int64_t pairs_of(int64_t count) { return (count + 1) / 2; }
// Home channels that pairs take beside the numbers.
int64_t pairs_at_home(const Plan& plan, int64_t channels) { return in_pairs(plan) ? pairs_of(channels) : 0; }
// Steps of `dot` over so many channels, and of `mix` over the entries along x.
int64_t dot_steps(const Plan& plan, int64_t channels) { return in_pairs(plan) ? pairs_of(channels) : channels; }
int64_t mix_steps(const Plan& plan) { return in_pairs(plan) ? pairs_of(plan.entries[2]) : plan.entries[2]; }

// A part of a packed row, from so many floats behind its start on.
struct Section {
    ptrdiff_t at, lane, channel;  // as of Packed
    ptrdiff_t size;
    Packed of(float* row) const { return {row + at, lane, channel}; }
};

// Lays one part behind the other.
struct Sections {
    ptrdiff_t pitch, lanes, size;
    Section add(ptrdiff_t lane, ptrdiff_t channel, ptrdiff_t floats) {
        size += floats;
        return {size - floats, lane, channel, floats};
    }
    Section in_planes(int64_t channels) { return add(1, pitch, channels * pitch); }
    // As `mix` is fastest on it.
    Section for_mix(int64_t channels) {
        return fit_cells(channels) ? add(channels, 1, channels * lanes) : in_planes(channels);
    }
    // Of pairs. On planes of numbers a margin of zeros follows, and pairs have their own: the first of a pair may lie
    // in it and the second not.
    Section with_margin(Section planes) {
        if (planes.channel == 1) return planes;  // cells
        const ptrdiff_t beyond = lanes > pitch ? (lanes - pitch + kLanes - 1) / kLanes * kLanes : 0;
        size += beyond;
        planes.size += beyond;
        return planes;
    }
    Section pairs_of_channels(int64_t channels) { return with_margin(in_planes(pairs_of(channels))); }
    Section pairs_of_cells(int64_t channels) { return with_margin(for_mix(channels)); }
};

void pair_cells(const Section& numbers, const float* row, ptrdiff_t step, const Section& pairs, float* paired) {
    pair_at_distance(row + numbers.at, pairs.size, step * numbers.lane, paired + pairs.at);
}

// A row that queries see. `dot` takes planes: of the keys, in a backward of the values as well.
struct KeyRow {
    Section key, value;          // as they are packed
    Section dot_key, dot_value;  // the same sections, or pairs of their channels
    Section mix_key, mix_value;  // the same sections, or pairs of cells
    ptrdiff_t loose_size, size;  // loose: as packed
    bool backward;
    KeyRow(const Plan& plan, ptrdiff_t pitch, ptrdiff_t lanes, bool backward) : backward(backward) {
        Sections loose = {pitch, lanes, 0};
        key = dot_key = mix_key = loose.in_planes(plan.head_dim);
        value = dot_value = mix_value = backward ? loose.in_planes(plan.value_dim) : loose.for_mix(plan.value_dim);
        size = loose_size = loose.size;
        if (!in_pairs(plan)) return;
        Sections row = {pitch, lanes, 0};
        dot_key = row.pairs_of_channels(plan.head_dim);
        if (backward) dot_value = row.pairs_of_channels(plan.value_dim);
        if (backward)
            mix_key = row.with_margin(row.in_planes(plan.head_dim));
        else
            mix_value = row.pairs_of_cells(plan.value_dim);
        size = row.size;
    }
    // Fills a row of pairs from one of numbers.
    void pair(const Plan& plan, const float* loose, float* row) const {
        const auto channels = [&](const Section& numbers, int64_t count, const Section& pairs) {
            pair_channels(loose + numbers.at, numbers.channel, count, numbers.channel, row + pairs.at);
        };
        channels(key, plan.head_dim, dot_key);
        if (backward) channels(value, plan.value_dim, dot_value);
        pair_cells(backward ? key : value, loose, plan.query_pass.step, backward ? mix_key : mix_value, row);
    }
};

// What a row of results holds for `channels` channels, in the order that `mix` leaves them in.
Packed mixed(float* row, int64_t channels) {
    return fit_cells(channels) ? cells(row, channels) : planes(row, kLanes);
}

// Floats around loose rows: pairs reach so far past their ends.
int64_t loose_margin(const Plan& plan, const Pass& pass) {
    const int64_t channels = plan.head_dim > plan.value_dim ? plan.head_dim : plan.value_dim;
    const int64_t reach = (pass.step < 0 ? -pass.step : pass.step) * channels + pass.max_away_lanes;
    return (reach / kLanes + 2) * kLanes;
}

// Floats for the pairs of weights of one spot.
int64_t weight_pairs(const Pass& pass) {
    return (int64_t)pass.z.max_visits * pass.y.max_visits * kGroupRows * pairs_of(pass.max_entries) * kLanes;
}

Workspace carve(const Plan& plan, const Pass& pass, const KeyRow& row, int64_t home_channels, int64_t result_channels,
                Arena& arena) {
    Workspace w = {};
    w.leftover = (Leftover*)arena.take((int64_t)sizeof(Leftover));
    w.away_row = row.size + kSlotPadding;
    w.home_channels = home_channels;
    // Reads may go past the last plane, into the next row's margin.
    int64_t cache = slots(pass) * w.away_row + pass.max_away_pitch;
    const int64_t loose = cache + loose_margin(plan, pass);
    if (in_pairs(plan)) cache = loose + row.loose_size + loose_margin(plan, pass);
    w.cache = arena.floats(cache);
    if (in_pairs(plan)) w.loose = w.cache + loose;
    w.cache_bytes = (size_t)cache * sizeof(float);
    w.tags = (Tag*)arena.take(slots(pass) * (int64_t)sizeof(Tag));
    w.sources = (Source*)arena.take((int64_t)pass.z.max_visits * pass.y.max_visits * (int64_t)sizeof(Source));
    w.prefetches = (Prefetches*)arena.take((int64_t)sizeof(Prefetches));
    w.home = arena.floats(kGroupRows * home_channels * kLanes);
    w.home_bytes = (size_t)(kGroupRows * home_channels * kLanes) * sizeof(float);
    w.result = arena.floats(kGroupRows * result_channels * kLanes);
    for (int axis = 0; axis < 3; ++axis)
        w.terms[axis] = arena.floats((int64_t)plan.entries[axis] * kGroupRows * kLanes);
    w.zeros = arena.floats(plan.entries[2]);
    return w;
}

// ---- Walking over a head's share of the work ------------------------------------------------------------------------

struct Item {
    int64_t head, first_batch;
    int64_t tile;
    int64_t first_group, last_group;
};

// Of so many groups in all.
Item item_of(const Plan& plan, const Pass& pass, int64_t groups, int64_t head, int64_t index) {
    Item item;
    item.head = head;
    item.tile = index % pass.tile_count;
    index /= pass.tile_count;
    const int64_t chunk = index % pass.chunks;
    item.first_batch = index / pass.chunks * plan.batch_group;
    item.first_group = groups * chunk / pass.chunks;
    item.last_group = groups * (chunk + 1) / pass.chunks;
    assert(index / pass.chunks * plan.batch_group < plan.batch && item.last_group <= groups);
    return item;
}

// Whether there are as many images as a batch group has room for.
bool is_whole(const Plan& plan, const Item& item) { return item.first_batch + plan.batch_group <= plan.batch; }

void start_item(const Plan& plan, const Pass& pass, const Item& item, Workspace& w) {
    for (int64_t i = 0; i < slots(pass); ++i) w.tags[i].z = w.tags[i].y = INT64_MIN;
    // Every run of a whole item is written before it is read. Clearing all each time made up to a third of a
    // small map's instructions.
    if (w.leftover->call == plan.call && w.leftover->tile == item.tile && is_whole(plan, item)) return;
    *w.leftover = {plan.call, item.tile};
    memset(w.cache, 0, w.cache_bytes);
    memset(w.zeros, 0, (size_t)plan.entries[2] * sizeof(float));
    for (int axis = 0; axis < 3; ++axis)
        if (!plan.relative[axis])
            memset(w.terms[axis], 0, (size_t)plan.entries[axis] * kGroupRows * kLanes * sizeof(float));
    if (w.ring) memset(w.ring, 0, w.ring_bytes);
}

// The rows that a group sees, packed unless they still are.
template <class Steps>
int find_sources(const Pass& pass, const Group& z, const Group& y, Workspace& w, Steps& steps) {
    int count = 0;
    for (int i = 0; i < z.visits; ++i) {
        const Visit& visit_z = pass.z.visits[z.first_visit + i];
        for (int j = 0; j < y.visits; ++j) {
            const Visit& visit_y = pass.y.visits[y.first_visit + j];
            const int64_t slot = (int64_t)visit_z.slot * pass.y.slots + visit_y.slot;
            assert(slot >= 0 && slot < slots(pass));
            float* row = w.cache + slot * w.away_row;
            Tag& tag = w.tags[slot];
            if (tag.z != visit_z.cell || tag.y != visit_y.cell) {
                tag.z = visit_z.cell;
                tag.y = visit_y.cell;
                steps.pack_away(visit_z.index, visit_y.index, row);
            }
            w.sources[count++] = {row, &visit_y, visit_z.entry[0], visit_z.order[0]};
        }
    }
    return count;
}

// One vector of lanes of one group: what the parts of `dot` need to know.
struct Spot {
    const Plan* plan;
    Workspace* w;
    const LaneVector* lanes;
    const int32_t* seen;     // each lane's range of entries, or NULL
    const Group *z, *y;
    const KeyRow* row;       // queries at home: what they see
    const int32_t* own;      // mask of the lanes that belong to the tile, or NULL
    int64_t head;
    Tile tile;               // logits, then weights
    ptrdiff_t gradients;     // from a weight to the gradient of its logit
    const int32_t* orders;   // visits of each home row along y, as the tile counts them
    int source_count, entries;
    ptrdiff_t away_lane, home_row, away_pitch, step;  // away_lane: that home lane 0 meets under entry 0
    float* scores_of(const Source& source, int r) const {
        return tile.at(r, source.order_z * orders[r] + source.visit->order[r]);
    }
};

const int32_t* lane_list(const Pass& pass, int64_t at) { return at < 0 ? nullptr : pass.lane_lists + at; }

Spot spot_of(const Plan& plan, const Pass& pass, const LaneTile& tile, int64_t head, int vector, Workspace& w) {
    Spot s = {};
    s.plan = &plan;
    s.w = &w;
    s.lanes = pass.vectors + tile.first_vector + vector;
    s.seen = lane_list(pass, s.lanes->seen);
    s.own = lane_list(pass, s.lanes->own);
    s.head = head;
    s.entries = s.lanes->entries;
    s.step = pass.step;
    s.away_lane = tile.left + (ptrdiff_t)vector * kLanes + pass.offset + (ptrdiff_t)s.lanes->first_entry * pass.step;
    s.home_row = w.home_channels * kLanes;
    s.away_pitch = tile.away_pitch;
    [[maybe_unused]] const ptrdiff_t first = s.away_lane, last = first + (s.entries - 1) * s.step;
    assert(first >= 0 && last >= 0);
    assert(first + kLanes <= tile.away_lanes && last + kLanes <= tile.away_lanes);
    return s;
}

// Home channels from `home_channel` on times `away`, in planes, of the spot's i-th source. multiplier: of pairs.
DotOperands dot_operands(const Spot& s, int i, int64_t home_channel, const Section& away, int64_t channels,
                         float multiplier) {
    const Source& source = s.w->sources[i];
    DotOperands o = {};
    o.home = s.w->home + source.visit->first * s.home_row + home_channel * kLanes;
    o.home_row = s.home_row;
    o.away = source.away + away.at + s.away_lane;
    o.away_pitch = away.channel;
    o.step = s.step;
    o.channels = dot_steps(*s.plan, channels);
    o.multiplier = multiplier;
    o.ahead = i + 1 < s.source_count ? s.w->sources[i + 1].away - source.away : 0;
    o.prefetches = s.w->prefetches;
    return o;
}

// Weights, or what lies `weights` after them, times `away`.
MixOperands mix_operands(const Spot& s, const Section& away, ptrdiff_t weights) {
    MixOperands o = {};
    o.sources = s.w->sources;
    o.source_count = s.source_count;
    o.weights = s.tile;
    for (int r = 0; r < kGroupRows; ++r) o.weights.rows[r] += weights;
    o.orders = s.orders;
    o.entries = s.entries;
    // Unless it holds a cell, an away lane holds zeros: lanes that see nothing there cannot be spoilt.
    o.seen = s.lanes->hides_cells ? s.seen : nullptr;
    o.first = away.at + s.away_lane * away.lane;
    o.lane = away.lane;
    o.channel = away.channel;
    o.step = s.step;
    o.prefetches = s.w->prefetches;
    o.pairs = s.w->weight_pairs;
    return o;
}

// What every pass knows about the item that it works on. Passes add
//     pack_away(z, y, row)          for each row that a group sees and the cache lacks; then, for each vector,
//     place(spot, vector)           where the tile is,
//     pack_home(spot, r, at, runs)  for each row of the group,
//     compute(spot),
//     unpack(r, at, runs)           for each row of the group
struct Walk {
    const Plan& plan;
    const Pass& pass;
    const Item& item;
    const LaneTile& tile;
    Workspace& w;
    Stream home_streams[3] = {}, away_streams[2] = {}, result_streams[2] = {};
    int64_t calls = 0, steps = 0;  // of dot and mix for each source, and in these: prefetches are spread over them
    int64_t together = 1, head;    // heads from the item's on, packed and listed together; that which is worked on
    ptrdiff_t next_head = 0;       // from a head's away row to the next one's
    Walk(const Plan& plan, const Pass& pass, const Item& item, Workspace& w)
        : plan(plan), pass(pass), item(item), tile(pass.tiles[item.tile]), w(w), head(item.head) {}

    RowAddress address(int64_t z, int64_t y) const { return {item.first_batch, head, z, y}; }
    float* home_row(int r) const { return w.home + r * w.home_channels * kLanes; }
    Runs home_runs(int vector) const {
        const LaneVector& lanes = pass.vectors[tile.first_vector + vector];
        return {pass.runs + lanes.home_first_run, lanes.home_runs, vector * kLanes, (vector + 1) * kLanes};
    }
    Runs own_runs(int vector) const {
        const LaneVector& lanes = pass.vectors[tile.first_vector + vector];
        return {pass.runs + lanes.own_first_run, lanes.own_runs, vector * kLanes, (vector + 1) * kLanes};
    }
    Runs away_runs(int first_lane, int last_lane) const {
        return {pass.runs + tile.away_first_run, tile.away_runs, first_lane, last_lane};
    }
    // A row has more away lanes than home lanes: each vector sees to its share of them.
    Runs away_share(int vector) const {
        return away_runs(tile.away_pitch * vector / tile.vectors, tile.away_pitch * (vector + 1) / tile.vectors);
    }

    void list(const Stream* streams, int count, const RowAddress& at, const Runs& runs) const {
        list_row(plan, streams, count, at, runs, *w.prefetches);
    }

    // Lists the results of this vector.
    void list_results(int64_t z, const Group& y, int vector) const {
        w.prefetches->clear();
        for (int r = 0; r < y.rows; ++r) list(result_streams, 2, address(z, y.home[r]), own_runs(vector));
    }

    // Lists this vector's share of what the next group will read.
    void list_next(const Group& z, const Group& y, int vector) const {
        for (int r = 0; r < y.rows; ++r)
            list(home_streams, 3, address(z.home[0], y.home[r]), home_runs(vector));
        for (int i = 0; i < z.visits; ++i)
            for (int j = 0; j < y.visits; ++j) {
                const Visit& visit_z = pass.z.visits[z.first_visit + i];
                const Visit& visit_y = pass.y.visits[y.first_visit + j];
                const Tag& tag = w.tags[(int64_t)visit_z.slot * pass.y.slots + visit_y.slot];
                if (tag.z == visit_z.cell && tag.y == visit_y.cell) continue;
                if (visit_z.index >= 0 && visit_y.index >= 0)
                    list(away_streams, 2, address(visit_z.index, visit_y.index), away_share(vector));
            }
    }
};

struct GroupPair {
    const Group *z, *y;
};

// One group of rows, all of its vectors. `next` is the group that will follow, if any.
template <class Steps>
void walk_group(Steps& steps, const Group& z, const Group& y, const GroupPair* next) {
    const Plan& plan = steps.plan;
    const LaneTile& tile = steps.tile;
    Workspace& w = steps.w;
    steps.head = steps.item.head;
    const int sources = find_sources(steps.pass, z, y, w, steps);
    for (int v = 0; v < tile.vectors; ++v) {
        const Runs runs = steps.home_runs(v);
        steps.list_results(z.home[0], y, v);
        if (next) steps.list_next(*next->z, *next->y, v);
        w.prefetches->spread_over(steps.together * sources * steps.calls, steps.together * sources * steps.steps);
        for (int64_t i = 0; i < steps.together; ++i) {
            steps.head = steps.item.head + i;
            for (int s = 0; i > 0 && s < sources; ++s) w.sources[s].away += steps.next_head;
            Spot spot = spot_of(plan, steps.pass, tile, steps.head, v, w);
            spot.z = &z;
            spot.y = &y;
            spot.source_count = sources;
            steps.place(spot, v);
            // Some rows or lanes may hold no cell.
            if (spot.lanes->gaps || y.rows < kGroupRows || !is_whole(plan, steps.item))
                memset(w.home, 0, w.home_bytes);
            for (int r = 0; r < y.rows; ++r)
                steps.pack_home(spot, r, steps.address(z.home[0], y.home[r]), runs);
            steps.compute(spot);
            for (int r = 0; r < y.rows; ++r) steps.unpack(r, steps.address(z.home[0], y.home[r]), steps.own_runs(v));
        }
        steps.head = steps.item.head;
        for (int s = 0; s < sources; ++s) w.sources[s].away -= (steps.together - 1) * steps.next_head;
    }
}

}  // namespace

#endif
