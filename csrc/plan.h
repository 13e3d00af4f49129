// SPDX-License-Identifier: Apache-2.0
//
// The plan of a call: its geometry turned into lists, once, so that the kernels see no border, stride or dilation.
//
// Words. A *pass* computes something for every *home* cell by looking at *away* cells: the forward and the gradient of
// the query have queries at home and keys away, the gradients of key and value have keys at home and queries away.
// Lanes run along the last axis, x. A *group* is up to three home rows that share the away rows they see, a *visit* is
// one away row seen by a group, an *entry* is an index into the tables of bias and relative of one axis.
//
// The backward interleaves its two passes. Weights and gradients of the logits are made once, with queries at home, and
// kept in a *ring* of the latest query rows; when all query rows that a group of keys sees are there, the gradients of
// key and value are gathered from it.
//
// Plain data only: the files that include this are compiled for different instruction sets, and any inline function or
// template here could be linked from the wrong one.

#ifndef NEARSIGHT_PLAN_H
#define NEARSIGHT_PLAN_H

#include <stddef.h>
#include <stdint.h>

#include "flags.h"

namespace nearsight {

constexpr int kGroupRows = 3;

struct Tensor {
    char* data;
    int64_t batch, head, z, y, x, channel;  // strides in elements
};

// Lanes `lane + i * step` hold the cells `index + i * index_step` of the tensor's x axis, of batch `group` of a batch
// group.
struct Run {
    int32_t lane, step, count, group;
    int64_t index, index_step;
};

// One vector of home lanes: which entries of x any of its lanes sees, and which lanes see which.
struct LaneVector {
    int32_t first_entry, entries;
    int32_t hides_cells;  // whether a lane may find a cell of the map where it must not look
    int32_t gaps;         // whether a lane holds no home cell
    int32_t home_first_run, home_runs;
    int32_t own_first_run, own_runs;  // of the home lanes that belong to the tile
    // Into Pass::lane_lists, negative when all lanes are alike. Of each lane the first of these entries that it sees,
    // then of each lane the last and one more; and a mask of the lanes that are the tile's own, where others are
    // another tile's as well or repeat a lane from beyond the edge.
    int64_t seen, own;
};

struct LaneTile {
    int32_t vectors, first_vector;
    int32_t away_first_run, away_runs;
    int32_t left;        // away lane of home lane 0
    int32_t away_pitch;  // of planes, which share their margins: whoever reads on finds the next one's
    int32_t away_lanes;  // that are packed or read
    int32_t ring_lane;   // queries at home: lane of home lane 0 in the ring
};

struct Visit {
    int64_t cell;         // unwrapped, names the row in the cache of packed rows
    int64_t index;        // of the tensor's row; negative for a row of zeros
    int32_t slot;         // in the cache of packed rows, or the ring
    int32_t first, last;  // the rows of the group that see it
    int32_t entry[kGroupRows], order[kGroupRows];  // order: among the entries that the query sees
};

struct Group {
    int32_t rows;
    int32_t home[kGroupRows];   // index of the tensor's row
    int32_t count[kGroupRows];  // visits of each row
    int32_t first_visit, visits;
    int32_t first_entry, last_entry;
    // For a backward.
    int32_t slot[kGroupRows];      // queries at home: of each row in the ring
    int32_t repeated;              // queries at home: the rows are in another group, and here once more beyond the edge
    int32_t first_away, last_away; // keys at home: the groups of queries that it sees
};

struct RowAxis {
    const Group* groups;
    const Visit* visits;
    int32_t group_count, slots, max_count, max_visits;
};

struct Pass {
    RowAxis z, y;  // the groups of z have one row each
    const LaneTile* tiles;
    const LaneVector* vectors;
    const Run* runs;
    const int32_t* lane_lists;
    int32_t tile_count, max_entries, max_away_pitch, max_away_lanes, max_vectors;
    int64_t step;    // away lanes per entry: dilation, negated when queries are away
    int64_t offset;  // away lane of entry 0, relative to the home lane
    int32_t chunks;  // the groups of a map, of the backward those of y alone, are cut into so many parts
    int32_t items;   // batch groups * chunks * tiles, for each head
    int32_t jobs;    // items of a head are dealt out in so many consecutive parts
};

struct ChannelRange {
    int32_t begin, end;  // all other channels of the table are zero
};

// Query, key and value that are not in memory: rows of them are made of rows of an input where others are packed.
struct Projection {
    Tensor input;
    int64_t channels;  // of the input, and one of ones where there is a bias
    int32_t has_bias;
    // Of each head's query, key and value: [block of so many of its channels][channel of the input][channel].
    const float* weight;
    int64_t heads;  // that take turns, and share what is packed of the input: a set of heads
};

constexpr int kProjectBlock = 16;

// Of a forward, and what a backward shares with it.
struct Plan {
    int64_t call;  // from one on, another for every call
    int32_t bfloat16;
    int64_t batch, heads, head_dim, value_dim;
    int32_t batch_group;    // batches side by side in one row, for maps narrower than a vector
    int32_t heads_together; // of a forward: neighbouring heads, whose cells lie in the same lines of memory
    int64_t out[3];         // queries along z, y, x
    int32_t entries[3];     // of the tables
    int64_t bias_entries;   // product of the above
    float query_multiplier; // scale * log2(e): logits are kept in base 2
    float scale;
    Pass query_pass;

    const float* bias;             // (heads, entries), times log2(e), or NULL
    const float* relative[3];      // z, y, x
    const ChannelRange* nonzero[3];  // (heads)
    Tensor query, key, value, out_tensor;
    float* lse;
    const Projection* projection;  // NULL where query, key and value are in memory
};

struct BackwardPlan : Plan {
    Pass key_pass;
    int64_t key_planes;  // keys along z
    Tensor grad_out, grad_query, grad_key, grad_value;
    float* bias_parts;  // (heads, jobs, bias_entries) partial sums, or NULL
    float* relative_parts[3];
    int32_t want_query, want_key, want_value;
};

// What the last item left in the workspace. Lanes without a cell stay zero from item to item of one tile.
struct Leftover {
    int64_t call, tile;
};

// One instruction set's code. A workspace is one thread's scratch memory; fresh, it begins with a Leftover of zeros.
struct Kernel {
    int lanes;
    size_t (*forward_bytes)(const Plan*);
    size_t (*backward_bytes)(const BackwardPlan*);
    void (*forward)(const Plan*, int64_t head, int64_t job, char* workspace);
    void (*backward)(const BackwardPlan*, int64_t head, int64_t job, char* workspace);
};

}  // namespace nearsight

#endif
