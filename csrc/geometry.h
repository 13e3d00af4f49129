// SPDX-License-Identifier: Apache-2.0
//
// Turns a checked problem into the lists of a Plan. Integers only; compiled without instruction set flags.

#ifndef NEARSIGHT_GEOMETRY_H
#define NEARSIGHT_GEOMETRY_H

#include <vector>

#include "nearsight.h"
#include "plan.h"

namespace nearsight {

// Cells, steps, entries or lanes from `first` to `last` - 1.
struct Range {
    int64_t first, last;
    bool operator==(const Range& other) const { return first == other.first && last == other.last; }
    bool holds(int64_t i) const { return i >= first && i < last; }
};

// One axis of the map, taken apart into the phases of its dilation: a phase is a smaller map under undilated windows.
// Step t of phase f is the cell f + t * dilation, around the torus if it is one, where a phase goes on until it meets
// itself, and any of its cells may be called its first. A window's entry e is the step query + first_offset + e.
struct Axis {
    int64_t cells = 1, kernel = 1, stride = 1, dilation = 1, shared_by = 1;
    int64_t given_dilation = 1;  // by which groups of cells that share a window are counted
    int32_t border = NEARSIGHT_BORDER_MASK;
    bool causal = false;

    int64_t queries() const { return (cells + stride - 1) / stride; }
    // Whether a place of the window has another offset from query to query, so that tables go by the offset.
    bool by_offset() const { return border == NEARSIGHT_BORDER_SHIFT || shared_by > 1; }
    int64_t entries() const { return by_offset() ? 2 * kernel - 1 : kernel; }
    int64_t first_offset() const;
    // How many steps before and after itself a query may see.
    int64_t back() const;
    int64_t ahead() const;
    // The most steps that the windows of one group reach, or the most queries that see a key, at the map's edge aside.
    int64_t span() const { return kernel + shared_by - 1; }
    bool torus() const { return border == NEARSIGHT_BORDER_WRAP; }
    // Whether what lies beyond the edge has a part in the softmax.
    bool beyond() const { return torus() || border == NEARSIGHT_BORDER_ZEROS; }
    int64_t phases() const;
    int64_t steps(int64_t phase) const;
    int64_t longest() const { return steps(0); }
    // The cell of any step, -1 beyond the edge.
    int64_t cell(int64_t phase, int64_t step) const;
    // The steps that a query sees; some lie beyond the edge where that has a part. Neither end moves back from a query
    // to the next.
    Range window(int64_t phase, int64_t query) const;
    // The entries that a query sees.
    Range seen(int64_t phase, int64_t query) const;
    // The entries under which a key is seen, as if every cell had its query.
    Range seeing(int64_t phase, int64_t key) const;
    // The tensor's index of the query at a cell, or of the key; -1 where there is none.
    int64_t index(bool queries, int64_t cell) const {
        return !queries || cell < 0 ? cell : cell % stride == 0 ? cell / stride : -1;
    }
    // Whether rows that share keys are better kept all at once: a window that goes around the torus sees every one.
    bool whole() const { return torus() && kernel >= longest(); }

  private:
    // From a query to the one whose window it shares.
    int64_t to_leader(int64_t phase, int64_t query) const;
};

// Axes of rank 1 and 2 get leading axes of one cell: every problem has z, y and x.
struct Geometry {
    Axis axes[3];
    explicit Geometry(const nearsight_problem& problem);
};

enum class Home { queries, keys };

// How the cells of x lie in the lanes: image after image where maps are narrow, and either in their order or, with
// `apart`, phase after phase. Then a window's cells are neighbours, however far apart they lie on the map. Where cells
// beyond the edge have a part in the softmax, phases keep room for them between each other.
struct Row {
    int32_t images = 1;
    bool apart = false;
    bool across = false;  // runs go from phase to phase, whose cells are neighbours in planar memory
    int64_t tile = 1;  // lanes to work on at a time

    struct Place {
        int64_t image, phase, step;
        int64_t cell;  // -1: none
        bool inside;   // not beyond the edge
    };
    int64_t step(const Axis& x) const { return apart ? 1 : x.dilation; }
    int64_t pitch(const Axis& x) const;  // of an image's phases, or of images
    int64_t lanes(const Axis& x) const;
    // Beyond the edge a lane may hold a query or a key, which are cut off at different distances.
    Place place(const Axis& x, bool queries, int64_t lane) const;
};

// How to lay out a row so that what a group sees, and in a backward the ring, stays in the second cache level, and as
// few lanes as can be are worked on in vain.
// `planar`: neighbouring cells are neighbours in memory.
Row choose_row(const Geometry& geometry, const nearsight_problem& problem, bool planar, int lanes, bool backward);

// Whether the lists of a plan are small enough to be made.
bool can_be_listed(const Geometry& geometry);

// The lists behind a Pass. `lanes` is the width of a vector. With a margin the queries of a tile are all that see its
// keys, and the rows those that see any row, even from beyond the edge of a torus.
class PassLists {
  public:
    PassLists(const Geometry& geometry, Home home, int lanes, const Row& row, bool margin = false);
    PassLists(const PassLists&) = delete;
    PassLists& operator=(const PassLists&) = delete;
    const Pass& pass() const { return pass_; }

    // What a thread works on before it takes another head.
    struct Chunk {
        int64_t fewest_groups, cells;
        int64_t parts = 32;  // wanted in all, for the threads of a machine
    };
    // Cuts `groups` of `rows` rows in all into chunks, and these into jobs, each of which sums up the gradients of
    // tables of `table` numbers for every head.
    void deal(int64_t batch, int64_t heads, int64_t groups, int64_t rows, int64_t table, Chunk chunk);
    // Makes two passes one backward: lays out the ring, and finds the groups of queries that each group of keys needs.
    static void join(const Geometry& geometry, PassLists& queries, PassLists& keys);

  private:
    struct Rows {
        std::vector<Group> groups;
        std::vector<Visit> visits;
        std::vector<int64_t> cells;  // kGroupRows of every group
    };

    bool queries() const { return home_ == Home::queries; }
    RowAxis build_rows(const Axis& axis, int rows_per_group, bool margin, Rows& rows) const;
    void add_group(const Axis& axis, int64_t phase, const std::vector<int64_t>& homes, Rows& rows) const;
    void add_tile(const Axis& axis, Range own, bool margin);
    void make_room(LaneTile& tile, int64_t read) const;
    int32_t add_runs(const Axis& axis, bool queries, Range lanes, int64_t lane_zero, bool beyond);
    LaneVector add_vector(const Axis& axis, Range lanes, Range own, bool margin);
    int64_t away_lane(const Axis& axis, int64_t entry) const;
    static void join_rows(const Axis& axis, PassLists& queries, PassLists& keys);
    static void join_tiles(const Axis& axis, PassLists& queries, PassLists& keys);

    const Home home_;
    const int lanes_;
    const Row row_;
    const int64_t lanes_of_row_;
    Rows z_, y_;
    std::vector<LaneTile> tiles_;
    std::vector<Range> homes_;  // every tile's home lanes
    std::vector<LaneVector> vectors_;
    std::vector<Run> runs_;
    std::vector<int32_t> lane_lists_;
    Pass pass_ = {};
};

}  // namespace nearsight

#endif
