// SPDX-License-Identifier: Apache-2.0
//
// Turns a checked problem into the lists of a Plan. Integers only; compiled without instruction set flags.

#ifndef NEARSIGHT_GEOMETRY_H
#define NEARSIGHT_GEOMETRY_H

#include <vector>

#include "nearsight.h"
#include "plan.h"

namespace nearsight {

// One axis of the map. A window's entry e is the cell query + first_offset + e * dilation.
struct Axis {
    int64_t cells = 1, kernel = 1, stride = 1, dilation = 1;
    int32_t border = NEARSIGHT_BORDER_MASK;
    bool causal = false;

    int64_t queries() const { return (cells + stride - 1) / stride; }
    int64_t entries() const { return border == NEARSIGHT_BORDER_SHIFT ? 2 * kernel - 1 : kernel; }
    int64_t first_offset() const;
    bool sees(int64_t query_cell, int64_t entry) const;
};

// Axes of rank 1 and 2 get leading axes of one cell: every problem has z, y and x.
struct Geometry {
    Axis axes[3];
    explicit Geometry(const nearsight_problem& problem);
};

enum class Home { queries, keys };

// Cells from `first` to `last` - 1.
struct Range {
    int64_t first, last;
};

// The lists behind a Pass. `lanes` is the width of a vector. With a margin the queries of a tile are all that see its
// keys, and the rows those that see any row, even from beyond the edge of a torus.
class PassLists {
  public:
    PassLists(const Geometry& geometry, Home home, int lanes, int batch_group, int64_t tile_cells, bool margin = false);
    PassLists(const PassLists&) = delete;
    PassLists& operator=(const PassLists&) = delete;
    const Pass& pass() const { return pass_; }

    // Cuts `groups` of `rows` rows in all into chunks, and these into jobs.
    void deal(int64_t batch, int64_t heads, int64_t groups, int64_t rows);
    // Makes two passes one backward: lays out the ring, and finds the groups of queries that each group of keys needs.
    static void join(const Geometry& geometry, PassLists& queries, PassLists& keys);

  private:
    struct Rows {
        std::vector<Group> groups;
        std::vector<Visit> visits;
        std::vector<int64_t> cells;  // kGroupRows of every group
    };

    RowAxis build_rows(const Axis& axis, int rows_per_group, bool margin, Rows& rows) const;
    void add_group(const Axis& axis, const std::vector<int64_t>& homes, Rows& rows) const;
    void add_tile(const Axis& axis, Range own, bool margin);
    int32_t away_pitch(const LaneTile& tile, int64_t read) const;
    int32_t add_runs(const Axis& axis, bool queries, Range cells, int64_t lane_zero);
    LaneVector add_vector(const Axis& axis, int64_t first, int64_t last);
    bool sees(const Axis& axis, int64_t home, int64_t entry) const;
    int64_t away_offset(const Axis& axis, int64_t entry) const;
    int64_t lowest_entry(const Axis& axis, int64_t home, int64_t entry) const;
    static void join_rows(const Axis& axis, PassLists& queries, PassLists& keys);
    static void join_tiles(const Axis& axis, PassLists& queries, PassLists& keys);

    const Home home_;
    const int lanes_, batch_group_;
    const int64_t tile_cells_, row_;
    Rows z_, y_;
    std::vector<LaneTile> tiles_;
    std::vector<Range> homes_;  // cells of every tile's home lanes
    std::vector<LaneVector> vectors_;
    std::vector<Run> runs_;
    std::vector<int32_t> masks_;
    Pass pass_ = {};
};

// How many batches to lay side by side so that a narrow map fills vectors of `lanes`.
int choose_batch_group(const Axis& x, int64_t batch, int64_t heads, int lanes);

// Cells of x to work on at a time so that the packed rows that a group sees stay in the second cache level.
int64_t choose_tile_cells(const Geometry& geometry, int64_t channels, int lanes);

// The same for a backward, which keeps the ring there as well.
int64_t choose_backward_tile_cells(const Geometry& geometry, int64_t channels, int lanes);

}  // namespace nearsight

#endif
