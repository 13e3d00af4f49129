// SPDX-License-Identifier: Apache-2.0

#include "geometry.h"

#include <algorithm>
#include <unordered_map>

namespace nearsight {

namespace {

int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b < 0); }
int64_t wrap(int64_t a, int64_t n) { return a - floor_divide(a, n) * n; }
int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// A pitch of whole vectors. An odd number of them keeps the channels of a row from falling on the same cache sets.
int32_t odd_vectors(int64_t count, int lanes) { return (int32_t)(round_up(count, lanes) / lanes | 1) * lanes; }

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

PassLists::PassLists(const Geometry& geometry, Home home, int lanes, int batch_group, int64_t tile_cells, bool margin)
    : home_(home),
      lanes_(lanes),
      batch_group_(batch_group),
      tile_cells_(tile_cells),
      row_(batch_group * geometry.axes[2].cells) {
    const Axis& x = geometry.axes[2];
    pass_.z = build_rows(geometry.axes[0], 1, false, z_);
    pass_.y = build_rows(geometry.axes[1], kGroupRows, margin, y_);
    for (int64_t first = 0; first < row_; first += tile_cells)
        add_tile(x, {first, std::min(first + tile_cells, row_)}, margin);

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
    for (const LaneTile& tile : tiles_) {
        pass_.max_away_pitch = std::max(pass_.max_away_pitch, tile.away_pitch);
        pass_.max_vectors = std::max(pass_.max_vectors, tile.vectors);
    }
}

void PassLists::deal(int64_t batch, int64_t heads, int64_t groups, int64_t rows) {
    // Enough parts for a machine's threads; small enough that the next head finds in the cache what it shares lines of
    // memory with; none so small that packing the rows around it dominates. These numbers must not depend on the number
    // of threads: the partial sums of the tables' gradients follow them.
    constexpr int64_t kParts = 32, kCells = 8192, kFewestGroups = 8;
    const int64_t batch_groups = (batch + batch_group_ - 1) / batch_group_;
    const int64_t maps = std::max<int64_t>(1, batch_groups * heads * pass_.tile_count);
    const int64_t cells = rows * std::min(tile_cells_, row_);
    const int64_t wanted = std::max((kParts + maps - 1) / maps, cells / kCells);
    pass_.chunks = (int32_t)std::max<int64_t>(1, std::min(groups / kFewestGroups, wanted));
    pass_.items = (int32_t)(batch_groups * pass_.chunks * pass_.tile_count);
    pass_.jobs = std::min(pass_.items, 64);
}

void PassLists::join(const Geometry& geometry, PassLists& queries, PassLists& keys) {
    join_rows(geometry.axes[1], queries, keys);
    join_tiles(geometry.axes[2], queries, keys);
}

// Groups of keys come in the order of the groups of queries that they need, and a group of queries is made when the
// first of them asks for it. So the ring has to span from the first row that a group of keys sees to the last that was
// made.
void PassLists::join_rows(const Axis& axis, PassLists& queries, PassLists& keys) {
    std::unordered_map<int64_t, int32_t> group_of;
    Rows& made = queries.y_;
    for (size_t q = 0; q < made.groups.size(); ++q)
        for (int r = 0; r < made.groups[q].rows; ++r) group_of[made.cells[q * kGroupRows + (size_t)r]] = (int32_t)q;

    int64_t slots = 1;
    int32_t last = 0;
    for (Group& group : keys.y_.groups) {
        group.first_away = group.last_away = last;
        if (group.visits == 0) continue;
        const Visit* visits = keys.y_.visits.data() + group.first_visit;
        group.first_away = group_of.at(visits[0].cell);
        last = group.last_away = group_of.at(visits[group.visits - 1].cell) + 1;
        const size_t latest = (size_t)last - 1;
        const int64_t newest = made.cells[latest * kGroupRows + (size_t)made.groups[latest].rows - 1];
        slots = std::max(slots, (newest - visits[0].cell) / axis.dilation + 1);
    }
    const auto slot = [&](int64_t cell) { return (int32_t)wrap(floor_divide(cell, axis.dilation), slots); };
    for (Visit& visit : keys.y_.visits) visit.slot = slot(visit.cell);
    for (size_t q = 0; q < made.groups.size(); ++q)
        for (int r = 0; r < made.groups[q].rows; ++r)
            made.groups[q].slot[r] = slot(made.cells[q * kGroupRows + (size_t)r]);
    keys.pass_.y.slots = (int32_t)slots;
}

// Home lane 0 of the queries lies in the ring where vectors are aligned, that of the keys wherever their first cell is.
void PassLists::join_tiles(const Axis& axis, PassLists& queries, PassLists& keys) {
    const int64_t edges[2] = {keys.away_offset(axis, 0), keys.away_offset(axis, axis.entries() - 1)};
    const int64_t ring_lane = round_up(std::max<int64_t>(0, -std::min(edges[0], edges[1])), keys.lanes_);
    for (size_t i = 0; i < keys.tiles_.size(); ++i) {
        LaneTile &tile = keys.tiles_[i], &made = queries.tiles_[i];
        const int64_t left = ring_lane + keys.homes_[i].first - queries.homes_[i].first;
        const int64_t reach = std::max<int64_t>(0, std::max(edges[0], edges[1]));
        const int64_t read = left + tile.vectors * keys.lanes_ + reach;
        tile.left = (int32_t)left;
        // As in away_pitch.
        tile.away_pitch = odd_vectors(std::max(ring_lane + made.vectors * keys.lanes_, read - ring_lane), keys.lanes_);
        made.ring_lane = (int32_t)ring_lane;
        keys.pass_.max_away_pitch = std::max(i == 0 ? 0 : keys.pass_.max_away_pitch, tile.away_pitch);
    }
}

int64_t PassLists::away_offset(const Axis& axis, int64_t entry) const {
    const int64_t offset = axis.first_offset() + entry * axis.dilation;
    return home_ == Home::queries ? offset : -offset;
}

bool PassLists::sees(const Axis& axis, int64_t home, int64_t entry) const {
    const int64_t query = tensor_index(axis, true, home_ == Home::queries ? home : home + away_offset(axis, entry));
    return query >= 0 && axis.sees(query * axis.stride, entry);
}

// The first entry that the query sees of the pair that this home cell makes with an entry.
int64_t PassLists::lowest_entry(const Axis& axis, int64_t home, int64_t entry) const {
    const int64_t query = tensor_index(axis, true, home_ == Home::queries ? home : home + away_offset(axis, entry));
    int64_t lowest = 0;
    while (!axis.sees(query * axis.stride, lowest)) ++lowest;
    return lowest;
}

// Rows on the same phase of the dilation share the rows that they see, so groups are made phase by phase. No group lies
// across the edge of the map.
RowAxis PassLists::build_rows(const Axis& axis, int rows_per_group, bool margin, Rows& rows) const {
    std::vector<int64_t> homes;
    const auto close_group = [&] {
        if (!homes.empty()) add_group(axis, homes, rows);
        homes.clear();
    };
    const bool beyond = margin && axis.border == NEARSIGHT_BORDER_WRAP;
    const int64_t reach = beyond ? axis.kernel * axis.dilation : 0;
    for (int64_t phase = 0; phase < std::min(axis.dilation, axis.cells); ++phase) {
        for (int64_t cell = phase - reach; cell < axis.cells + reach; cell += axis.dilation) {
            if (cell == phase || (cell >= axis.cells && cell - axis.dilation < axis.cells)) close_group();
            if (home_ == Home::queries && tensor_index(axis, true, cell) < 0) continue;
            homes.push_back(cell);
            if ((int)homes.size() == rows_per_group) close_group();
        }
        close_group();
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
    group.repeated = homes.front() < 0 || homes.front() >= axis.cells;
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
            visit.order[r] = (int32_t)(entry - lowest_entry(axis, homes[r], entry));
            ++group.count[r];
            group.first_entry = std::min(group.first_entry, (int32_t)entry);
            group.last_entry = std::max(group.last_entry, (int32_t)entry + 1);
        }
        if (visit.last > 0) rows.visits.push_back(visit);
    }
    group.visits = (int32_t)rows.visits.size() - group.first_visit;
    rows.groups.push_back(group);
    for (size_t r = 0; r < kGroupRows; ++r) rows.cells.push_back(r < homes.size() ? homes[r] : 0);
}

void PassLists::add_tile(const Axis& axis, Range own, bool margin) {
    Range home = own;
    if (margin) {  // queries that see a key at the edge
        const int64_t edges[2] = {-away_offset(axis, 0), -away_offset(axis, axis.entries() - 1)};
        home.first += std::min(edges[0], edges[1]);
        home.last += std::max(edges[0], edges[1]);
        if (axis.border != NEARSIGHT_BORDER_WRAP) home = {std::max<int64_t>(0, home.first), std::min(row_, home.last)};
    }
    LaneTile tile = {};
    tile.vectors = (int32_t)((home.last - home.first + lanes_ - 1) / lanes_);
    tile.first_vector = (int32_t)vectors_.size();
    int64_t lowest = 0, highest = 0;
    for (int32_t v = 0; v < tile.vectors; ++v) {
        const int64_t lane = home.first + (int64_t)v * lanes_;
        LaneVector vector = add_vector(axis, lane, home.last);
        const auto within = [&](int64_t cell) {
            return (int32_t)std::max<int64_t>(0, std::min<int64_t>(lanes_, cell));
        };
        vector.first_own = within(own.first - lane);
        vector.last_own = own.last == home.last ? lanes_ : within(own.last - lane);
        vectors_.push_back(vector);
        for (int32_t entry : {vector.first_entry, vector.first_entry + vector.entries - 1}) {
            lowest = std::min(lowest, away_offset(axis, entry));
            highest = std::max(highest, away_offset(axis, entry));
        }
    }
    tile.left = (int32_t)round_up(-lowest, lanes_);
    tile.home_first_run = (int32_t)runs_.size();
    tile.home_runs = add_runs(axis, home_ == Home::queries, home, home.first);
    tile.own_first_run = (int32_t)runs_.size();
    tile.own_runs = add_runs(axis, home_ == Home::queries, own, home.first);
    tile.away_first_run = (int32_t)runs_.size();
    tile.away_runs =
        add_runs(axis, home_ == Home::keys, {home.first + lowest, home.last + highest}, home.first - tile.left);
    tile.away_pitch = away_pitch(tile, tile.left + tile.vectors * lanes_ + highest);
    tiles_.push_back(tile);
    homes_.push_back(home);
}

// Room for what is packed into a channel; whoever reads on finds the next channel's margin, which holds zeros as well.
int32_t PassLists::away_pitch(const LaneTile& tile, int64_t read) const {
    int64_t margin = read, packed = 0;
    for (int32_t i = 0; i < tile.away_runs; ++i) {
        const Run& run = runs_[(size_t)(tile.away_first_run + i)];
        margin = std::min<int64_t>(margin, run.lane);
        packed = std::max<int64_t>(packed, run.lane + (run.count - 1) * run.step + 1);
    }
    return odd_vectors(std::max(packed, read - margin), lanes_);
}

// Cells are positions of a row in which the batches of a group follow each other.
int32_t PassLists::add_runs(const Axis& axis, bool queries, Range cells, int64_t lane_zero) {
    const size_t before = runs_.size();
    for (int64_t position = cells.first; position < cells.last; ++position) {
        const int64_t batch = batch_group_ > 1 ? floor_divide(position, axis.cells) : 0;
        if (batch < 0 || batch >= batch_group_) continue;
        const int64_t index = tensor_index(axis, queries, position - batch * axis.cells);
        if (index < 0) continue;
        const int32_t lane = (int32_t)(position - lane_zero);
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

LaneVector PassLists::add_vector(const Axis& axis, int64_t first, int64_t last) {
    const int64_t entries = axis.entries();
    const int64_t reach = axis.kernel * axis.dilation;  // farther from the edges than that, all lanes see the same
    if (batch_group_ == 1 && axis.stride == 1 && first >= reach && first + lanes_ + reach <= last) {
        int64_t first_entry = 0, last_entry = entries;
        while (!sees(axis, first, first_entry)) ++first_entry;
        while (!sees(axis, first, last_entry - 1)) --last_entry;
        return {(int32_t)first_entry, (int32_t)(last_entry - first_entry), 0, 0, 0, lanes_, -1};
    }
    std::vector<int32_t> seen((size_t)(entries * lanes_), 0);
    int64_t first_entry = entries, last_entry = 0;
    bool gaps = first + lanes_ > last;
    for (int64_t lane = 0; lane < lanes_ && first + lane < last; ++lane) {
        const int64_t cell = batch_group_ > 1 ? (first + lane) % axis.cells : first + lane;
        gaps |= tensor_index(axis, home_ == Home::queries, cell) < 0;
        for (int64_t entry = 0; entry < entries; ++entry) {
            if (!sees(axis, cell, entry)) continue;
            seen[(size_t)(entry * lanes_ + lane)] = -1;
            first_entry = std::min(first_entry, entry);
            last_entry = std::max(last_entry, entry + 1);
        }
    }
    if (last_entry == 0) first_entry = 0, last_entry = 1;  // no lane sees anything: keep one masked entry
    const auto begin = seen.begin() + first_entry * lanes_, end = seen.begin() + last_entry * lanes_;
    LaneVector vector = {(int32_t)first_entry, (int32_t)(last_entry - first_entry), 0, gaps, 0, lanes_, -1};
    vector.hides_cells = batch_group_ > 1 || axis.border == NEARSIGHT_BORDER_SHIFT;
    if (std::find(begin, end, 0) != end) {
        vector.mask = (int64_t)masks_.size();
        masks_.insert(masks_.end(), begin, end);
    }
    return vector;
}

int choose_batch_group(const Axis& x, int64_t batch, int64_t heads, int lanes) {
    // Lanes that hold a cell, of all that are worked on; the last group may lack some of its images.
    const auto used = [&](int64_t group) {
        const int64_t groups = (batch + group - 1) / group;
        return (double)(batch * x.cells) / (double)(groups * round_up(group * x.cells, lanes));
    };
    if (x.border == NEARSIGHT_BORDER_ZEROS || x.border == NEARSIGHT_BORDER_WRAP) return 1;  // they have cells beyond
    if (x.cells == 0) return 1;
    int best = 1;
    for (int group = 2; group <= 4 && group * x.cells <= 128; ++group) {
        if (batch / group * heads < 8) break;  // leave work for other threads; chunks of a map make more of it
        if (used(group) > 1.1 * used(best)) best = group;
    }
    return best;
}

namespace {

// Tiles of about this many cells that share a row evenly. They are not so small that their halo, worked on in vain,
// dominates.
int64_t even_tiles(const Axis& x, int64_t fits, int64_t halo, int lanes) {
    const int64_t width = round_up(std::max<int64_t>(x.cells, 1), lanes);
    if (fits >= width) return width;
    const int64_t smallest = std::max<int64_t>(4 * lanes, round_up(halo, lanes));
    const int64_t tiles = (width + std::max(fits, smallest) - 1) / std::max(fits, smallest);
    return round_up((width + tiles - 1) / tiles, lanes);
}

int64_t halo_of(const Axis& x) { return std::min((x.kernel - 1) * x.dilation, x.cells); }
int64_t rows_seen(const Axis& y) { return std::min(y.kernel, y.cells) + kGroupRows - 1; }

}  // namespace

int64_t choose_tile_cells(const Geometry& geometry, int64_t channels, int lanes) {
    constexpr int64_t kCacheFloats = 128 * 1024;  // half of a second cache level of 1 MB
    const Axis& x = geometry.axes[2];
    const int64_t fits = kCacheFloats / std::max<int64_t>(1, rows_seen(geometry.axes[1]) * channels) - halo_of(x);
    return even_tiles(x, fits, halo_of(x), lanes);
}

int64_t choose_backward_tile_cells(const Geometry& geometry, int64_t channels, int lanes) {
    constexpr int64_t kCacheFloats = 96 * 1024;
    const Axis &z = geometry.axes[0], &y = geometry.axes[1], &x = geometry.axes[2];
    const int64_t pairs = std::min(z.kernel, z.cells) * std::min(y.kernel, y.cells) * x.entries();
    const int64_t floats = rows_seen(y) * (2 * channels + 2 * pairs);
    const int64_t halo = halo_of(x);
    const int64_t tile = even_tiles(x, kCacheFloats / std::max<int64_t>(1, floats) - halo, halo, lanes);
    // The queries around a tile are worked on as well: together they fill whole vectors.
    return tile >= x.cells ? tile : std::max<int64_t>(tile - halo, lanes);
}

}  // namespace nearsight
