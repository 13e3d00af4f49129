// SPDX-License-Identifier: Apache-2.0

#include "geometry.h"

#include <algorithm>

namespace nearsight {

namespace {

int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b < 0); }
int64_t wrap(int64_t a, int64_t n) { return a - floor_divide(a, n) * n; }
int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// The index of a query or key at a cell that may lie outside of the map, or -1.
int64_t tensor_index(const Axis& axis, bool queries, int64_t cell) {
    if (axis.border == NEARSIGHT_BORDER_WRAP) cell = wrap(cell, axis.cells);
    if (cell < 0 || cell >= axis.cells) return -1;
    if (!queries) return cell;
    return cell % axis.stride == 0 ? cell / axis.stride : -1;
}

// Steps beyond the map are all alike, and on a torus only their remainder counts.
int64_t at_most_cells(int64_t step, int64_t cells, bool torus) {
    if (cells == 0) return 1;
    if (torus) return step % cells == 0 ? cells : step % cells;
    return std::min(step, cells);
}

}  // namespace

int64_t Axis::first_offset() const {
    if (border == NEARSIGHT_BORDER_SHIFT || causal) return -(kernel - 1) * dilation;
    return -(kernel / 2) * dilation;
}

bool Axis::sees(int64_t query_cell, int64_t entry) const {
    const int64_t cell = query_cell + first_offset() + entry * dilation;
    if (border == NEARSIGHT_BORDER_ZEROS || border == NEARSIGHT_BORDER_WRAP) return true;
    if (cell < 0 || cell >= cells) return false;
    if (border == NEARSIGHT_BORDER_MASK) return true;
    const int64_t phase = query_cell % dilation;
    const int64_t on_phase = (cells - phase + dilation - 1) / dilation;
    const int64_t query = query_cell / dilation, key = cell / dilation;
    if (causal) return key > query - kernel && key <= query;
    const int64_t seen = std::min(kernel, on_phase);
    const int64_t start = std::max<int64_t>(0, std::min(query - kernel / 2, on_phase - seen));
    return key >= start && key < start + seen;
}

Geometry::Geometry(const nearsight_problem& p) {
    for (int i = 0; i < p.rank; ++i) {
        Axis& axis = axes[3 - p.rank + i];
        axis.cells = p.size[i];
        axis.kernel = p.kernel[i];
        axis.stride = at_most_cells(p.stride[i], axis.cells, false);
        axis.dilation = at_most_cells(p.dilation[i], axis.cells, p.border == NEARSIGHT_BORDER_WRAP);
        axis.border = p.border;
        axis.causal = p.causal[i] != 0;
    }
}

PassLists::PassLists(const Geometry& geometry, Home home, int lanes, int64_t batch, int64_t heads, int batch_group,
                     int64_t tile_cells)
    : home_(home), lanes_(lanes) {
    const Axis& x = geometry.axes[2];
    pass_.z = build_rows(geometry.axes[0], 1, z_);
    pass_.y = build_rows(geometry.axes[1], kGroupRows, y_);
    const int64_t row = batch_group * x.cells;
    for (int64_t first = 0; first < row; first += tile_cells)
        add_tile(x, first, std::min(first + tile_cells, row), batch_group);

    pass_.z.groups = z_.groups.data();
    pass_.z.visits = z_.visits.data();
    pass_.y.groups = y_.groups.data();
    pass_.y.visits = y_.visits.data();
    pass_.tiles = tiles_.data();
    pass_.vectors = vectors_.data();
    pass_.runs = runs_.data();
    pass_.masks = masks_.data();
    pass_.tile_count = (int32_t)tiles_.size();
    pass_.offset = away_offset(x, 0);
    pass_.step = home_ == Home::queries ? x.dilation : -x.dilation;
    for (const LaneVector& vector : vectors_) pass_.max_entries = std::max(pass_.max_entries, vector.entries);
    for (const LaneTile& tile : tiles_) pass_.max_away_pitch = std::max(pass_.max_away_pitch, tile.away_pitch);

    // Enough parts for a machine's threads; small enough that the next head finds in the cache what it shares lines of
    // memory with; none so small that packing the rows around it dominates. These numbers must not depend on the number
    // of threads: the partial sums of the tables' gradients follow them.
    constexpr int64_t kParts = 32, kCells = 8192, kFewestGroups = 8;
    const int64_t batch_groups = (batch + batch_group - 1) / batch_group;
    const int64_t groups = (int64_t)pass_.z.group_count * pass_.y.group_count;
    const int64_t maps = std::max<int64_t>(1, batch_groups * heads * pass_.tile_count);
    const int64_t cells = groups * kGroupRows * std::min(tile_cells, row);
    const int64_t wanted = std::max((kParts + maps - 1) / maps, cells / kCells);
    pass_.chunks = (int32_t)std::max<int64_t>(1, std::min(groups / kFewestGroups, wanted));
    pass_.items = (int32_t)(batch_groups * pass_.chunks * pass_.tile_count);
    pass_.jobs = std::min(pass_.items, 64);
}

int64_t PassLists::away_offset(const Axis& axis, int64_t entry) const {
    const int64_t offset = axis.first_offset() + entry * axis.dilation;
    return home_ == Home::queries ? offset : -offset;
}

bool PassLists::sees(const Axis& axis, int64_t home, int64_t entry) const {
    if (home_ == Home::queries) return home % axis.stride == 0 && axis.sees(home, entry);
    const int64_t query = tensor_index(axis, true, home + away_offset(axis, entry));
    return query >= 0 && axis.sees(query * axis.stride, entry);
}

// Rows on the same phase of the dilation share the rows that they see, so groups are made phase by phase.
RowAxis PassLists::build_rows(const Axis& axis, int rows_per_group, Rows& rows) const {
    std::vector<int64_t> homes;
    const int64_t stride = home_ == Home::queries ? axis.stride : 1;
    for (int64_t phase = 0; phase < std::min(axis.dilation, axis.cells); ++phase) {
        for (int64_t cell = phase; cell < axis.cells; cell += axis.dilation) {
            if (cell % stride) continue;
            homes.push_back(cell);
            if ((int)homes.size() < rows_per_group) continue;
            add_group(axis, homes, rows);
            homes.clear();
        }
        if (!homes.empty()) add_group(axis, homes, rows);
        homes.clear();
    }
    RowAxis list = {};
    list.group_count = (int32_t)rows.groups.size();
    for (const Group& group : rows.groups) {
        list.max_visits = std::max(list.max_visits, group.visits);
        for (int r = 0; r < group.rows; ++r) list.max_count = std::max(list.max_count, group.count[r]);
        if (group.visits == 0) continue;
        const Visit* visits = rows.visits.data() + group.first_visit;
        const int64_t span = (visits[group.visits - 1].cell - visits[0].cell) / axis.dilation + 1;
        list.slots = std::max(list.slots, (int32_t)span);
    }
    list.slots = std::max(list.slots, 1);
    for (Visit& visit : rows.visits) visit.slot = (int32_t)wrap(floor_divide(visit.cell, axis.dilation), list.slots);
    return list;
}

void PassLists::add_group(const Axis& axis, const std::vector<int64_t>& homes, Rows& rows) const {
    const int64_t entries = axis.entries();
    const int64_t edges[2] = {away_offset(axis, 0), away_offset(axis, entries - 1)};
    const int64_t lowest = homes.front() + std::min(edges[0], edges[1]);
    const int64_t highest = homes.back() + std::max(edges[0], edges[1]);

    Group group = {};
    group.rows = (int32_t)homes.size();
    group.first_visit = (int32_t)rows.visits.size();
    group.first_entry = (int32_t)entries;
    for (int r = 0; r < group.rows; ++r) group.home[r] = (int32_t)tensor_index(axis, home_ == Home::queries, homes[r]);
    for (int64_t cell = lowest; cell <= highest; cell += axis.dilation) {
        Visit visit = {};
        visit.cell = cell;
        visit.index = tensor_index(axis, home_ == Home::keys, cell);
        visit.first = group.rows;
        for (int r = 0; r < group.rows; ++r) {
            const int64_t distance = (cell - homes[r] - edges[0]) / axis.dilation;
            const int64_t entry = home_ == Home::queries ? distance : -distance;
            if (entry < 0 || entry >= entries || !sees(axis, homes[r], entry)) continue;
            visit.first = std::min(visit.first, r);
            visit.last = r + 1;
            visit.entry[r] = (int32_t)entry;
            visit.order[r] = group.count[r]++;
            group.first_entry = std::min(group.first_entry, (int32_t)entry);
            group.last_entry = std::max(group.last_entry, (int32_t)entry + 1);
        }
        if (visit.last > 0) rows.visits.push_back(visit);
    }
    group.visits = (int32_t)rows.visits.size() - group.first_visit;
    rows.groups.push_back(group);
}

void PassLists::add_tile(const Axis& axis, int64_t first, int64_t last, int batch_group) {
    LaneTile tile = {};
    tile.vectors = (int32_t)((last - first + lanes_ - 1) / lanes_);
    tile.first_vector = (int32_t)vectors_.size();
    int64_t lowest = 0, highest = 0;
    for (int32_t v = 0; v < tile.vectors; ++v) {
        const int64_t lane = first + (int64_t)v * lanes_;
        const LaneVector vector = add_vector(axis, lane, last, batch_group);
        vectors_.push_back(vector);
        for (int32_t entry : {vector.first_entry, vector.first_entry + vector.entries - 1}) {
            lowest = std::min(lowest, away_offset(axis, entry));
            highest = std::max(highest, away_offset(axis, entry));
        }
    }
    const int64_t left = round_up(-lowest, lanes_);
    // An odd number of vectors keeps the channels of a row from falling on the same cache sets.
    tile.left = (int32_t)left;
    tile.away_pitch = (int32_t)(round_up(left + tile.vectors * lanes_ + highest, lanes_) / lanes_ | 1) * lanes_;

    tile.home_first_run = (int32_t)runs_.size();
    tile.home_runs = add_runs(axis, home_ == Home::queries, first, last, batch_group);
    tile.away_first_run = (int32_t)runs_.size();
    const int32_t shift = tile.left + (int32_t)lowest;
    tile.away_runs = add_runs(axis, home_ == Home::keys, first + lowest, last + highest, batch_group);
    for (int32_t i = 0; i < tile.away_runs; ++i) runs_[(size_t)(tile.away_first_run + i)].lane += shift;
    tiles_.push_back(tile);
}

// Lane 0 is position `first` of a row in which the batches of a group follow each other.
int32_t PassLists::add_runs(const Axis& axis, bool queries, int64_t first, int64_t last, int batch_group) {
    const size_t before = runs_.size();
    for (int64_t position = first; position < last; ++position) {
        const int64_t batch = batch_group > 1 ? floor_divide(position, axis.cells) : 0;
        if (batch < 0 || batch >= batch_group) continue;
        const int64_t index = tensor_index(axis, queries, position - batch * axis.cells);
        if (index < 0) continue;
        const int32_t lane = (int32_t)(position - first);
        Run* run = runs_.size() > before ? &runs_.back() : nullptr;
        if (run && run->group == batch && index == run->index + run->count) {
            if (run->count == 1) run->step = lane - run->lane;
            if (lane == run->lane + run->count * run->step) {
                ++run->count;
                continue;
            }
            if (run->count == 1) run->step = 1;
        }
        runs_.push_back({lane, 1, 1, (int32_t)batch, index});
    }
    return (int32_t)(runs_.size() - before);
}

LaneVector PassLists::add_vector(const Axis& axis, int64_t first, int64_t last, int batch_group) {
    const int64_t entries = axis.entries();
    const int64_t reach = axis.kernel * axis.dilation;  // farther from the edges than that, all lanes see the same
    if (batch_group == 1 && axis.stride == 1 && first >= reach && first + lanes_ + reach <= last) {
        int64_t first_entry = 0, last_entry = entries;
        while (!sees(axis, first, first_entry)) ++first_entry;
        while (!sees(axis, first, last_entry - 1)) --last_entry;
        return {(int32_t)first_entry, (int32_t)(last_entry - first_entry), 0, -1};
    }
    std::vector<int32_t> seen((size_t)(entries * lanes_), 0);
    int64_t first_entry = entries, last_entry = 0;
    for (int64_t lane = 0; lane < lanes_ && first + lane < last; ++lane) {
        const int64_t cell = batch_group > 1 ? (first + lane) % axis.cells : first + lane;
        for (int64_t entry = 0; entry < entries; ++entry) {
            if (!sees(axis, cell, entry)) continue;
            seen[(size_t)(entry * lanes_ + lane)] = -1;
            first_entry = std::min(first_entry, entry);
            last_entry = std::max(last_entry, entry + 1);
        }
    }
    if (last_entry == 0) first_entry = 0, last_entry = 1;  // no lane sees anything: keep one masked entry
    const auto begin = seen.begin() + first_entry * lanes_, end = seen.begin() + last_entry * lanes_;
    LaneVector vector = {(int32_t)first_entry, (int32_t)(last_entry - first_entry), 0, -1};
    vector.hides_cells = batch_group > 1 || axis.border == NEARSIGHT_BORDER_SHIFT;
    if (std::find(begin, end, 0) != end) {
        vector.mask = (int64_t)masks_.size();
        masks_.insert(masks_.end(), begin, end);
    }
    return vector;
}

int choose_batch_group(const Axis& x, int64_t batch, int64_t heads, int lanes) {
    const auto used = [&](int64_t group) {
        const int64_t cells = group * x.cells;
        return (double)cells / (double)round_up(cells, lanes);
    };
    if (x.border == NEARSIGHT_BORDER_ZEROS || x.border == NEARSIGHT_BORDER_WRAP) return 1;  // they have cells beyond
    if (x.cells == 0) return 1;
    int best = 1;
    for (int group = 2; group <= 4 && group * x.cells <= 128; ++group) {
        if (batch / group * heads < 16) break;  // leave work for other threads
        if (used(group) > 1.1 * used(best)) best = group;
    }
    return best;
}

int64_t choose_tile_cells(const Geometry& geometry, int64_t channels, int lanes) {
    constexpr int64_t kCacheFloats = 128 * 1024;  // half of a second cache level of 1 MB
    const Axis &y = geometry.axes[1], &x = geometry.axes[2];
    const int64_t rows = std::min(y.kernel, y.cells) + kGroupRows - 1;
    const int64_t halo = std::min((x.kernel - 1) * x.dilation, x.cells);
    const int64_t fits = kCacheFloats / std::max<int64_t>(1, rows * channels) - halo;
    const int64_t width = round_up(std::max<int64_t>(x.cells, 1), lanes);
    if (fits >= width) return width;
    const int64_t smallest = std::max<int64_t>(4 * lanes, round_up(halo, lanes));  // the halo is packed in vain
    const int64_t tiles = (width + std::max(fits, smallest) - 1) / std::max(fits, smallest);
    return round_up((width + tiles - 1) / tiles, lanes);
}

}  // namespace nearsight
