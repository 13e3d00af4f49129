// SPDX-License-Identifier: Apache-2.0

#include "geometry.h"

#include <assert.h>

#include <algorithm>
#include <numeric>
#include <unordered_map>

namespace nearsight {

namespace {

int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b < 0); }
int64_t wrap(int64_t a, int64_t n) { return a - floor_divide(a, n) * n; }
int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// A pitch of whole vectors. An odd number of them keeps the channels of a row from falling on the same cache sets.
int32_t odd_vectors(int64_t count, int lanes) { return (int32_t)(round_up(count, lanes) / lanes | 1) * lanes; }

// Steps beyond the map are all alike, and on a torus only their remainder counts.
int64_t at_most_cells(int64_t step, int64_t cells, bool torus) {
    if (cells == 0) return 1;
    if (torus) return step % cells == 0 ? cells : step % cells;
    return std::min(step, cells);
}

// The first of `first` to `last` - 1 that `holds`, as do all after it; `last` if none does.
template <class Holds>
int64_t first_of(int64_t first, int64_t last, Holds holds) {
    while (first < last) {
        const int64_t middle = first + (last - first) / 2;
        if (holds(middle))
            last = middle;
        else
            first = middle + 1;
    }
    return first;
}

}  // namespace

int64_t Axis::first_offset() const { return by_offset() ? -(kernel - 1) : -back(); }

int64_t Axis::back() const {
    if (border == NEARSIGHT_BORDER_SHIFT || causal) return kernel - 1;
    return kernel / 2 + (shared_by - 1) / 2;
}

int64_t Axis::ahead() const {
    if (causal) return 0;
    return border == NEARSIGHT_BORDER_SHIFT ? kernel - 1 : (kernel - 1) / 2 + shared_by / 2;
}

int64_t Axis::phases() const { return torus() ? std::gcd(dilation, cells) : std::min(dilation, cells); }

int64_t Axis::steps(int64_t phase) const {
    return torus() ? cells / phases() : (cells - phase + dilation - 1) / dilation;
}

int64_t Axis::cell(int64_t phase, int64_t step) const {
    if (torus()) return (phase + wrap(step, steps(phase)) * dilation) % cells;
    const int64_t cell = phase + step * dilation;
    return cell < cells && step >= 0 ? cell : -1;
}

int64_t Axis::to_leader(int64_t phase, int64_t query) const {
    if (shared_by == 1) return 0;
    const int64_t at = cell(phase, query), step = at / given_dilation, group = step / shared_by * shared_by;
    if (!causal) return group + shared_by / 2 - step;
    const int64_t last = (cells - 1 - at % given_dilation) / given_dilation;
    return std::min(group + shared_by - 1, last) - step;
}

Range Axis::window(int64_t phase, int64_t query) const {
    const int64_t on_phase = steps(phase);
    int64_t first = query + to_leader(phase, query) - (causal ? kernel - 1 : kernel / 2);
    if (border == NEARSIGHT_BORDER_SHIFT && !causal)
        first = std::max<int64_t>(0, std::min(first, on_phase - kernel));
    const int64_t last = causal ? query + 1 : first + kernel;
    return beyond() ? Range{first, last} : Range{std::max<int64_t>(0, first), std::min(last, on_phase)};
}

Range Axis::seen(int64_t phase, int64_t query) const {
    const int64_t zero = query + first_offset();
    const Range held = window(phase, query);
    return {held.first - zero, held.last - zero};
}

Range Axis::seeing(int64_t phase, int64_t key) const {
    assert(window(phase, key).holds(key));  // the query of its own cell sees it, so shared_by is no more than kernel
    const int64_t least = torus() ? key - ahead() : std::max<int64_t>(0, key - ahead());
    const int64_t most = torus() ? key + back() : std::min(key + back(), steps(phase) - 1);
    const int64_t first = first_of(least, key, [&](int64_t query) { return window(phase, query).last > key; });
    const int64_t end = first_of(key + 1, most + 1, [&](int64_t query) { return window(phase, query).first > key; });
    const int64_t zero = key - first_offset();  // the query whose entry 0 it is
    return {zero - end + 1, zero - first + 1};
}

int64_t Row::pitch(const Axis& x) const {
    if (!apart) return x.cells;
    return x.longest() + (x.beyond() ? x.back() + x.ahead() : 0);
}

int64_t Row::lanes(const Axis& x) const {
    if (!apart) return images * x.cells;
    return images * x.phases() * pitch(x) - (pitch(x) - x.longest());
}

Row::Place Row::place(const Axis& x, bool queries, int64_t lane) const {
    if (!apart) {
        const int64_t image = images > 1 ? floor_divide(lane, x.cells) : 0;
        const int64_t cell = lane - image * x.cells;
        const bool inside = cell >= 0 && cell < x.cells && image >= 0 && image < images;
        if (x.torus()) return {image, wrap(cell, x.cells), 0, wrap(cell, x.cells), inside};
        return {image, cell % x.dilation, cell / x.dilation, inside ? cell : -1, inside};
    }
    const int64_t before = x.beyond() ? (queries ? x.ahead() : x.back()) : 0;
    const int64_t segment = floor_divide(lane + before, pitch(x)), step = lane - segment * pitch(x);
    if (segment < 0 || segment >= images * x.phases()) return {0, 0, 0, -1, false};
    const int64_t image = segment / x.phases(), phase = segment % x.phases();
    return {image, phase, step, x.cell(phase, step), step >= 0 && step < x.steps(phase)};
}

Geometry::Geometry(const nearsight_problem& p) {
    for (int i = 0; i < p.rank; ++i) {
        Axis& axis = axes[3 - p.rank + i];
        axis.cells = p.size[i];
        axis.kernel = p.kernel[i];
        axis.stride = at_most_cells(p.stride[i], axis.cells, false);
        axis.border = p.border[i];
        axis.dilation = at_most_cells(p.dilation[i], axis.cells, axis.torus());
        axis.given_dilation = p.dilation[i];
        axis.shared_by = p.shared_by[i];
        axis.causal = p.causal[i] != 0;
    }
}

PassLists::PassLists(const Geometry& geometry, Home home, int lanes, const Row& row, bool margin)
    : home_(home), lanes_(lanes), row_(row), lanes_of_row_(row.lanes(geometry.axes[2])) {
    const Axis& x = geometry.axes[2];
    pass_.z = build_rows(geometry.axes[0], 1, false, z_);
    pass_.y = build_rows(geometry.axes[1], kGroupRows, margin, y_);
    for (int64_t first = 0; first < lanes_of_row_; first += row.tile)
        add_tile(x, {first, std::min(first + row.tile, lanes_of_row_)}, margin);

    pass_.z.groups = z_.groups.data();
    pass_.z.visits = z_.visits.data();
    pass_.y.groups = y_.groups.data();
    pass_.y.visits = y_.visits.data();
    pass_.tiles = tiles_.data();
    pass_.vectors = vectors_.data();
    pass_.runs = runs_.data();
    pass_.lane_lists = lane_lists_.data();
    pass_.tile_count = (int32_t)tiles_.size();
    pass_.offset = away_lane(x, 0);
    pass_.step = queries() ? row.step(x) : -row.step(x);
    for (const LaneVector& vector : vectors_) pass_.max_entries = std::max(pass_.max_entries, vector.entries);
    for (const LaneTile& tile : tiles_) {
        pass_.max_away_pitch = std::max(pass_.max_away_pitch, tile.away_pitch);
        pass_.max_away_lanes = std::max(pass_.max_away_lanes, tile.away_lanes);
        pass_.max_vectors = std::max(pass_.max_vectors, tile.vectors);
    }
}

void PassLists::deal(int64_t batch, int64_t heads, int64_t groups, int64_t rows, int64_t table, Chunk chunk) {
    // Enough parts for a machine's threads; small enough that the next head finds in the cache what it shares lines of
    // memory with; none so small that packing the rows around it dominates. These numbers must not depend on the number
    // of threads: the partial sums of the tables' gradients follow them.
    constexpr int64_t kPartialSums = (int64_t)1 << 24;
    const int64_t batch_groups = (batch + row_.images - 1) / row_.images;
    const int64_t maps = std::max<int64_t>(1, batch_groups * heads * pass_.tile_count);
    const int64_t cells = rows * std::min(row_.tile, lanes_of_row_);
    const int64_t wanted = std::max((chunk.parts + maps - 1) / maps, cells / chunk.cells);
    pass_.chunks = (int32_t)std::max<int64_t>(1, std::min(groups / chunk.fewest_groups, wanted));
    pass_.items = (int32_t)(batch_groups * pass_.chunks * pass_.tile_count);
    const int64_t jobs = kPartialSums / std::max<int64_t>(1, heads * table);  // partial sums of 64 MB
    pass_.jobs = (int32_t)std::max<int64_t>(1, std::min<int64_t>({pass_.items, 64, jobs}));
}

void PassLists::join(const Geometry& geometry, PassLists& queries, PassLists& keys) {
    join_rows(geometry.axes[1], queries, keys);
    join_tiles(geometry.axes[2], queries, keys);
}

// Groups of keys come in the order of the groups of queries that they need, and a group of queries is made when the
// first of them asks for it. So the ring has to span from the first row that a group of keys sees to the last that was
// made; where every group sees all rows of its phase, it holds these.
void PassLists::join_rows(const Axis& axis, PassLists& queries, PassLists& keys) {
    std::unordered_map<int64_t, int32_t> group_of;
    Rows& made = queries.y_;
    for (size_t q = 0; q < made.groups.size(); ++q)
        for (int r = 0; r < made.groups[q].rows; ++r) group_of[made.cells[q * kGroupRows + (size_t)r]] = (int32_t)q;

    int64_t slots = axis.whole() ? axis.longest() : 1;
    int32_t last = 0;
    for (Group& group : keys.y_.groups) {
        group.first_away = group.last_away = last;
        if (group.visits == 0) continue;
        const Visit* visits = keys.y_.visits.data() + group.first_visit;
        const int32_t ends[2] = {group_of.at(visits[0].cell), group_of.at(visits[group.visits - 1].cell)};
        group.first_away = ends[0];
        last = group.last_away = ends[1] + 1;
        if (axis.whole()) {  // the visits go around the torus once or more
            for (int32_t i = 0; i < std::min<int64_t>(group.visits, axis.longest()); ++i) {
                const int32_t one = group_of.at(visits[i].cell);
                group.first_away = std::min(group.first_away, one);
                last = group.last_away = std::max(group.last_away, one + 1);
            }
            continue;
        }
        assert(ends[0] <= ends[1] && ends[1] < last);
        const size_t latest = (size_t)last - 1;
        const int64_t newest = made.cells[latest * kGroupRows + (size_t)made.groups[latest].rows - 1];
        slots = std::max(slots, newest - visits[0].cell + 1);
    }
    for (Visit& visit : keys.y_.visits) visit.slot = (int32_t)(visit.cell % slots);
    for (size_t q = 0; q < made.groups.size(); ++q)
        for (int r = 0; r < made.groups[q].rows; ++r)
            made.groups[q].slot[r] = (int32_t)(made.cells[q * kGroupRows + (size_t)r] % slots);
    keys.pass_.y.slots = (int32_t)slots;
}

// Home lane 0 of the queries lies in the ring where vectors are aligned, that of the keys wherever their first cell is.
void PassLists::join_tiles(const Axis& axis, PassLists& queries, PassLists& keys) {
    const int64_t step = keys.row_.step(axis), reach = axis.back() * step;
    const int64_t ring_lane = round_up(axis.ahead() * step, keys.lanes_);
    for (size_t i = 0; i < keys.tiles_.size(); ++i) {
        LaneTile &tile = keys.tiles_[i], &made = queries.tiles_[i];
        const int64_t left = ring_lane + keys.homes_[i].first - queries.homes_[i].first;
        const int64_t read = left + tile.vectors * keys.lanes_ + reach;
        tile.left = (int32_t)left;
        // As in make_room.
        const int64_t packed = ring_lane + made.vectors * keys.lanes_;
        tile.away_pitch = odd_vectors(std::max(packed, read - ring_lane), keys.lanes_);
        tile.away_lanes = (int32_t)std::max(packed, read);
        made.ring_lane = (int32_t)ring_lane;
        keys.pass_.max_away_pitch = std::max(i == 0 ? 0 : keys.pass_.max_away_pitch, tile.away_pitch);
        keys.pass_.max_away_lanes = std::max(i == 0 ? 0 : keys.pass_.max_away_lanes, tile.away_lanes);
    }
}

// From a home lane to the away lane that it meets under an entry.
int64_t PassLists::away_lane(const Axis& axis, int64_t entry) const {
    const int64_t offset = (axis.first_offset() + entry) * row_.step(axis);
    return queries() ? offset : -offset;
}

namespace {

// Names a row by its phase and step, which may lie beyond the edge; no two rows have the same name, and those of
// neighbouring steps follow each other.
int64_t row_name(const Axis& axis, int64_t phase, int64_t step) {
    const int64_t margin = axis.back() + axis.ahead();
    return phase * (axis.longest() + 2 * margin) + margin + (axis.whole() ? wrap(step, axis.longest()) : step);
}

}  // namespace

// Rows on the same phase of the dilation share the rows that they see, so groups are made phase by phase. No group lies
// across the edge of the map.
RowAxis PassLists::build_rows(const Axis& axis, int rows_per_group, bool margin, Rows& rows) const {
    const bool beyond = margin && axis.torus() && !axis.whole();
    std::vector<int64_t> homes;
    for (int64_t phase = 0; phase < axis.phases(); ++phase) {
        const auto close_group = [&] {
            if (!homes.empty()) add_group(axis, phase, homes, rows);
            homes.clear();
        };
        const int64_t steps = axis.steps(phase);
        for (int64_t step = beyond ? -axis.ahead() : 0; step < steps + (beyond ? axis.back() : 0); ++step) {
            if (step == 0 || step == steps) close_group();
            if (axis.index(queries(), axis.cell(phase, step)) < 0) continue;
            homes.push_back(step);
            if ((int)homes.size() == rows_per_group) close_group();
        }
        close_group();
    }
    RowAxis list = {};
    list.group_count = (int32_t)rows.groups.size();
    list.slots = axis.whole() ? (int32_t)axis.longest() : 1;
    for (const Group& group : rows.groups) {
        list.max_visits = std::max(list.max_visits, group.visits);
        for (int r = 0; r < group.rows; ++r) list.max_count = std::max(list.max_count, group.count[r]);
        if (group.visits == 0 || axis.whole()) continue;
        const Visit* visits = rows.visits.data() + group.first_visit;
        list.slots = std::max(list.slots, (int32_t)(visits[group.visits - 1].cell - visits[0].cell + 1));
    }
    for (Visit& visit : rows.visits) visit.slot = (int32_t)(visit.cell % list.slots);
    return list;
}

void PassLists::add_group(const Axis& axis, int64_t phase, const std::vector<int64_t>& homes, Rows& rows) const {
    Group group = {};
    group.rows = (int32_t)homes.size();
    group.repeated = homes.front() < 0 || homes.front() >= axis.steps(phase);
    group.first_visit = (int32_t)rows.visits.size();
    group.first_entry = (int32_t)axis.entries();
    const int64_t offset = axis.first_offset();
    Range entries[kGroupRows], away = {INT64_MAX, INT64_MIN};
    for (int r = 0; r < group.rows; ++r) {
        group.home[r] = (int32_t)axis.index(queries(), axis.cell(phase, homes[r]));
        entries[r] = queries() ? axis.seen(phase, homes[r]) : axis.seeing(phase, homes[r]);
        const int64_t zero = queries() ? homes[r] + offset : homes[r] - offset;
        away.first = std::min(away.first, queries() ? zero + entries[r].first : zero - entries[r].last + 1);
        away.last = std::max(away.last, queries() ? zero + entries[r].last : zero - entries[r].first + 1);
    }
    for (int64_t step = away.first; step < away.last; ++step) {
        Visit visit = {};
        visit.cell = row_name(axis, phase, step);
        visit.index = axis.index(!queries(), axis.cell(phase, step));
        if (visit.index < 0 && !queries()) continue;  // no query there; a key would vote as a zero
        visit.first = group.rows;
        const int64_t lowest = queries() ? 0 : axis.seen(phase, step).first;
        for (int r = 0; r < group.rows; ++r) {
            const int64_t entry = (queries() ? step - homes[r] : homes[r] - step) - offset;
            if (!entries[r].holds(entry)) continue;
            assert(entry >= 0 && entry < axis.entries());
            assert(visit.last == 0 || visit.last == r);  // rows that see it follow each other
            visit.first = std::min(visit.first, r);
            visit.last = r + 1;
            visit.entry[r] = (int32_t)entry;
            visit.order[r] = (int32_t)(entry - (queries() ? entries[r].first : lowest));
            ++group.count[r];
            group.first_entry = std::min(group.first_entry, (int32_t)entry);
            group.last_entry = std::max(group.last_entry, (int32_t)entry + 1);
        }
        if (visit.last > 0) rows.visits.push_back(visit);
    }
    group.visits = (int32_t)rows.visits.size() - group.first_visit;
    rows.groups.push_back(group);
    for (size_t r = 0; r < kGroupRows; ++r)
        rows.cells.push_back(r < homes.size() ? row_name(axis, phase, homes[r]) : 0);
}

void PassLists::add_tile(const Axis& axis, Range own, bool margin) {
    Range home = own;
    if (margin) {  // queries that see a key at the edge
        home.first -= axis.ahead() * row_.step(axis);
        home.last += axis.back() * row_.step(axis);
        if (!axis.torus()) home = {std::max<int64_t>(0, home.first), std::min(row_.lanes(axis), home.last)};
    }
    LaneTile tile = {};
    tile.vectors = (int32_t)((home.last - home.first + lanes_ - 1) / lanes_);
    tile.first_vector = (int32_t)vectors_.size();
    int64_t lowest = 0, highest = 0;
    for (int32_t v = 0; v < tile.vectors; ++v) {
        const int64_t first = home.first + (int64_t)v * lanes_;
        const Range lanes = {first, std::min(first + lanes_, home.last)};
        LaneVector vector = add_vector(axis, lanes, own, margin);
        vector.home_first_run = (int32_t)runs_.size();
        vector.home_runs = add_runs(axis, queries(), lanes, home.first, margin);
        vector.own_first_run = (int32_t)runs_.size();
        vector.own_runs = add_runs(axis, queries(), {std::max(lanes.first, own.first), std::min(lanes.last, own.last)},
                                   home.first, false);
        vectors_.push_back(vector);
        for (int32_t entry : {vector.first_entry, vector.first_entry + vector.entries - 1}) {
            lowest = std::min(lowest, away_lane(axis, entry));
            highest = std::max(highest, away_lane(axis, entry));
        }
    }
    // What a vector reads, entry 0 to the last, lies in two lines and not in three where entry 0 is aligned. A row of
    // one vector is packed in fewer pieces where the map is.
    tile.left = (int32_t)(tile.vectors == 1 ? round_up(-lowest, lanes_) : -lowest);
    tile.away_first_run = (int32_t)runs_.size();
    tile.away_runs =
        add_runs(axis, !queries(), {home.first + lowest, home.last + highest}, home.first - tile.left, true);
    // No lane reads further than windows reach: the margins of the cache and the ring are as wide as that.
    assert(-lowest <= (queries() ? axis.back() : axis.ahead()) * row_.step(axis));
    assert(highest <= (queries() ? axis.ahead() : axis.back()) * row_.step(axis));
    make_room(tile, tile.left + tile.vectors * lanes_ + highest);
    tiles_.push_back(tile);
    homes_.push_back(home);
}

// Room for what is packed into a plane; whoever reads on finds the next plane's margin, which holds zeros as well.
void PassLists::make_room(LaneTile& tile, int64_t read) const {
    int64_t margin = read, packed = 0;
    for (int32_t i = 0; i < tile.away_runs; ++i) {
        const Run& run = runs_[(size_t)(tile.away_first_run + i)];
        margin = std::min<int64_t>(margin, run.lane);
        packed = std::max<int64_t>(packed, run.lane + (run.count - 1) * run.step + 1);
    }
    tile.away_pitch = odd_vectors(std::max(packed, read - margin), lanes_);
    tile.away_lanes = (int32_t)std::max(packed, read);
}

int32_t PassLists::add_runs(const Axis& axis, bool queries, Range lanes, int64_t lane_zero, bool beyond) {
    struct Found {
        int64_t lane, step, index, image;
    };
    std::vector<Found> found;
    for (int64_t lane = lanes.first; lane < lanes.last; ++lane) {
        const Row::Place place = row_.place(axis, queries, lane);
        const int64_t index = axis.index(queries, place.cell);
        if (index >= 0 && (beyond || place.inside)) found.push_back({lane - lane_zero, place.step, index, place.image});
    }
    const auto before = [](const Found& a, const Found& b) {
        return a.image != b.image ? a.image < b.image : a.step < b.step;
    };
    if (row_.across) std::stable_sort(found.begin(), found.end(), before);

    const size_t first = runs_.size();
    for (const Found& one : found) {
        Run* run = runs_.size() > first ? &runs_.back() : nullptr;
        if (run && run->group == one.image && run->count == 1 && one.index > run->index && one.lane > run->lane) {
            run->step = (int32_t)one.lane - run->lane;
            run->index_step = one.index - run->index;
        }
        if (run && run->group == one.image && one.index == run->index + run->count * run->index_step &&
            one.lane == run->lane + run->count * run->step)
            ++run->count;
        else
            runs_.push_back({(int32_t)one.lane, 1, 1, (int32_t)one.image, one.index, 1});
    }
    return (int32_t)(runs_.size() - first);
}

LaneVector PassLists::add_vector(const Axis& axis, Range lanes, Range own, bool margin) {
    std::vector<Range> seen((size_t)lanes_, Range{0, 0});
    std::vector<int32_t> owned((size_t)lanes_, -1);
    Range all = {axis.entries(), 0};
    LaneVector vector = {};
    for (int64_t lane = 0; lane < lanes_; ++lane) {
        const Row::Place place = row_.place(axis, queries(), lanes.first + lane);
        const bool cell = axis.index(queries(), place.cell) >= 0 && (margin || place.inside);
        const bool found = cell && lanes.holds(lanes.first + lane);
        vector.gaps |= !found;
        if (!found) continue;
        if (!place.inside || !own.holds(lanes.first + lane)) owned[(size_t)lane] = 0;
        Range& entries = seen[(size_t)lane];
        entries = queries() ? axis.seen(place.phase, place.step) : axis.seeing(place.phase, place.step);
        assert(entries.first >= 0 && entries.first < entries.last && entries.last <= axis.entries());
        all = {std::min(all.first, entries.first), std::max(all.last, entries.last)};
    }
    const int64_t itself = -axis.first_offset();
    if (all.last == 0) all = {itself, itself + 1};  // no lane sees anything: keep one masked entry
    vector.first_entry = (int32_t)all.first;
    vector.entries = (int32_t)(all.last - all.first);
    // Where cells beyond the edge have a part there is room for them between phases, and images are not side by side.
    vector.hides_cells = axis.by_offset() || (!axis.beyond() && (row_.images > 1 || row_.apart));
    vector.seen = vector.own = -1;
    if (std::any_of(seen.begin(), seen.end(), [&](const Range& one) { return !(one == all); })) {
        vector.seen = (int64_t)lane_lists_.size();
        for (const Range& one : seen) lane_lists_.push_back((int32_t)(one.first - all.first));
        for (const Range& one : seen) lane_lists_.push_back((int32_t)(one.last - all.first));
    }
    if (std::find(owned.begin(), owned.end(), 0) != owned.end()) {
        vector.own = (int64_t)lane_lists_.size();
        lane_lists_.insert(lane_lists_.end(), owned.begin(), owned.end());
    }
    return vector;
}

namespace {

// How many images to lay side by side so that a narrow row fills vectors of `lanes`.
int choose_images(int64_t row, int64_t batch, int64_t heads, int lanes) {
    // Lanes that hold a cell, of all that are worked on; the last group may lack some of its images.
    const auto used = [&](int64_t group) {
        const int64_t groups = (batch + group - 1) / group;
        return (double)(batch * row) / (double)(groups * round_up(group * row, lanes));
    };
    int best = 1;
    for (int group = 2; group <= 4 && group * row <= 128; ++group) {
        if (batch / group * heads < 8) break;  // leave work for other threads; chunks of a map make more of it
        if (used(group) > 1.1 * used(best)) best = group;
    }
    return best;
}

// What it takes to work on a row of the map, about, in multiply-adds per channel and vector of lanes. Measured were:
// how rows beyond the cache slow a forward and a backward down, masks where phases meet, and packing a cell.
struct RowCost {
    double pairs, channels, rows, slowed, cache;
    int lanes;
    bool backward, hides;

    RowCost(const Geometry& geometry, int64_t channels, int lanes, bool backward)
        : pairs(1),
          channels((double)channels),
          rows((double)std::min(geometry.axes[1].span(), geometry.axes[1].longest()) + kGroupRows - 1),
          slowed(backward ? 1.4 : 1.2),
          cache(backward ? 96 * 1024 : 128 * 1024),  // floats, half of a second cache level of 1 MB or less
          lanes(lanes),
          backward(backward),
          hides(!geometry.axes[2].beyond() || geometry.axes[2].by_offset()) {
        for (const Axis& axis : geometry.axes) pairs *= (double)std::min(axis.kernel, axis.longest());
    }

    double vectors(int64_t count) const { return (double)((count + lanes - 1) / lanes); }

    // Of one tile, with so many lanes around it in which queries are worked on, and keys packed.
    double tile(const Row& row, int64_t own, int64_t around, int64_t halo) const {
        constexpr double kMostFloats = (double)((int64_t)1 << 27);  // 512 MB: other threads want some too
        const double masked = !row.apart ? 1 : hides ? 1.3 : 1.1, packing = row.across ? 12 : 4;
        const double kept = channels + (backward ? channels + 2 * pairs : 0);
        const double floats = rows * kept * (double)(own + halo);
        // Of the five products of a backward three are made for every query around the tile.
        const double products = backward ? 3 * vectors(own + around) + 2 * vectors(own) : 2 * vectors(own);
        const double packed = vectors(own + halo) + (backward ? vectors(own + around) : 0);
        const double waiting = floats <= cache ? 1 : floats <= kMostFloats ? slowed : 1000;
        return (products * pairs * masked + packed * packing) * waiting;
    }

    double of(const Row& row, const Axis& x) const {
        const int64_t all = row.lanes(x), halo = (x.span() - 1) * row.step(x), whole = (all - 1) / row.tile;
        // Beyond the edge of a map there is nothing to work on; beyond that of a torus there is.
        const int64_t around = backward && (whole > 0 || x.torus()) ? halo : 0;
        return (double)whole * tile(row, row.tile, around, halo) + tile(row, all - whole * row.tile, around, halo);
    }
};

// The best way to cut a row into tiles that share it evenly.
Row with_tiles(const Axis& x, Row row, const RowCost& cost) {
    const int64_t all = row.lanes(x), around = cost.backward ? (x.span() - 1) * row.step(x) : 0;
    const int64_t smallest = 4 * cost.lanes;  // with those around
    row.tile = round_up(all, cost.lanes);
    Row best = row;
    for (int64_t tiles = 2; tiles <= all; tiles += 1 + tiles / 8) {
        // The queries around a tile are worked on as well: together they fill whole vectors.
        const int64_t filled = round_up((all + tiles - 1) / tiles + around, cost.lanes);
        if (filled < smallest) break;
        row.tile = filled - around;
        if (cost.of(row, x) < cost.of(best, x)) best = row;
    }
    return best;
}

}  // namespace

Row choose_row(const Geometry& geometry, const nearsight_problem& p, bool planar, int lanes, bool backward) {
    const Axis& x = geometry.axes[2];
    Row row;
    // On a row that keeps cells beyond the edge there is no room for those of several images.
    if (!x.beyond()) row.images = choose_images(x.cells, p.batch, p.heads, lanes);
    row.tile = round_up(row.lanes(x), lanes);
    if (row.images > 1) return row;
    const RowCost cost(geometry, p.head_dim + p.value_dim, lanes, backward);
    const Row in_order = with_tiles(x, row, cost);
    if (x.dilation == 1) return in_order;
    row.apart = true;
    row.across = planar;
    const Row apart = with_tiles(x, row, cost);
    return cost.of(apart, x) < cost.of(in_order, x) ? apart : in_order;
}

bool can_be_listed(const Geometry& geometry) {
    constexpr int64_t kMostVisits = (int64_t)1 << 24, kMostLanes = (int64_t)1 << 28;
    for (const Axis& axis : {geometry.axes[0], geometry.axes[1]}) {
        const int64_t margin = axis.torus() && !axis.whole() ? axis.span() : 0;
        const int64_t groups = (axis.longest() + margin) / kGroupRows + 3;
        const int64_t visits = (axis.beyond() ? axis.span() : std::min(axis.span(), axis.longest())) + kGroupRows;
        if (groups * visits > kMostVisits / std::max<int64_t>(1, axis.phases())) return false;
    }
    const Axis& x = geometry.axes[2];
    return x.cells + x.phases() * (x.span() - 1) <= kMostLanes;
}

}  // namespace nearsight
