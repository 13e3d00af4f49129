// SPDX-License-Identifier: Apache-2.0
//
// Local attention for one instruction set: compiled once for each, with NEARSIGHT_KERNEL the name of the table that it
// exports. Everything else has internal linkage.
//
// How it works (docs/inside/kernel.md has a picture). A vector holds neighbouring cells of a row, one channel. Rows are
// packed, channel by channel, into a small cache, which absorbs strides, dtype and border; then for a group of up to
// three home rows and one vector of lanes
//     dot   multiplies home channels with shifted away channels, rows x entries sums in registers: the logits;
//     mix   multiplies weights with shifted away channels, rows x channels sums in registers: the output;
// and between the two the softmax is taken on a tile of logits that never leaves the first cache level. The gradients
// are the same two steps with other operands, and the tiles of weights and of their gradients stay in a ring of rows
// until the keys that they belong to have gathered them. No lane ever meets a cell that its query does not see: entries
// that only some lanes of a vector see go through a mask.

#include <assert.h>

#include "pairs-inl.h"
#include "plan.h"
#include "project-inl.h"
#include "rows-inl.h"
#include "simd-inl.h"
#include "steps-inl.h"
#include "walk-inl.h"

namespace nearsight {
extern const Kernel NEARSIGHT_KERNEL;
}

namespace {

using namespace nearsight;

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

// ---- What a query adds to its logits --------------------------------------------------------------------------------

int64_t bias_entry(const Plan& plan, const Source& source, int r, int entry_x) {
    return ((int64_t)source.entry_z * plan.entries[1] + source.visit->entry[r]) * plan.entries[2] + entry_x;
}

const float* relative_table(const Plan& plan, int axis, int64_t head) {
    return plan.relative[axis] + head * plan.entries[axis] * plan.head_dim;
}

void entry_range(const Plan& plan, const Spot& s, int axis, int* first, int* last) {
    *first = 0;
    *last = plan.entries[axis];
    if (axis == 1) *first = s.y->first_entry, *last = s.y->last_entry;
    if (axis == 2) *first = s.lanes->first_entry, *last = *first + s.entries;
}

// Pairs are taken of the query as it is, what tables add of the query times scale and log2(e).
float packed_multiplier(const Plan& plan) { return in_pairs(plan) ? 1.0f : plan.query_multiplier; }

// Behind the numbers their pairs, where dot takes those.
void pair_home(const Plan& plan, const float* numbers, int64_t channels, float* pairs) {
    if (in_pairs(plan)) pair_channels(numbers, kLanes, channels, kLanes, pairs);
}

void multiply_for_tables(const Plan& plan, float* query) {
    if (!in_pairs(plan) || !(plan.relative[0] || plan.relative[1] || plan.relative[2])) return;
    for (float* plane = query; plane < query + plan.head_dim * kLanes; plane += kLanes)
        store(plane, load(plane) * plan.query_multiplier);
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

// Home channels: query, and where there are pairs its pairs.
struct ForwardHome {
    int64_t dot_query, channels;
    explicit ForwardHome(const Plan& plan)
        : dot_query(in_pairs(plan) ? plan.head_dim : 0), channels(plan.head_dim + pairs_at_home(plan, plan.head_dim)) {}
};

// The part of `dot` that makes logits and finds the greatest of each query.
template <Terms kTerms>
struct LogitPart {
    const QueryTerms<kTerms>* terms;
    float* target[kGroupRows];
    const int32_t* seen;
    Vector* greatest;  // of the first row
    NEARSIGHT_INLINE Vector start(int r, int e) const { return terms->at(r, e); }
    template <int kEntries>
    NEARSIGHT_INLINE void finish(int r, int entry, const Vector* logits) {
        float* to = target[r] + entry * kLanes;
        const int32_t* ranges = seen;
        Vector most = greatest[r];
#pragma GCC unroll 8
        for (int e = 0; e < kEntries; ++e) {
            const Vector hidden = splat(-__builtin_inff());
            const Vector logit = ranges ? choose(within(ranges, entry + e), logits[e], hidden) : logits[e];
            most = maximum(most, logit);
            store(to + e * kLanes, logit);
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
        LogitPart<kTerms> part = {&terms, {}, s.seen, greatest + visit.first};
        for (int r = visit.first; r < visit.last; ++r)
            part.target[r - visit.first] = s.scores_of(source, r);
        dot_apart(dot_operands(s, i, ForwardHome(*s.plan).dot_query, s.row->dot_key, s.plan->head_dim,
                               s.plan->query_multiplier),
                  visit.last - visit.first, s.entries, part);
    }
}

// Logits become weights, not yet divided by their sum, which is returned.
Vector softmax(float* scores, int count, Vector greatest) {
    Vector sum = {};
#pragma GCC unroll 4
    for (int i = 0; i < count; ++i) {
        const Vector weight = exp2(load(scores + i * kLanes) - greatest);
        store(scores + i * kLanes, weight);
        sum += weight;
    }
    return sum;
}

// Multiplies each lane by its share; those that see nothing become zeros.
void scale_lanes(const Packed& row, int64_t channels, Vector share, IntVector sees) {
    if (row.channel != 1) {
        for (int64_t c = 0; c < channels; ++c)
            store(row.data + c * kLanes, keep(sees, load(row.data + c * kLanes) * share));
        return;
    }
    float factors[kLanes];
    int32_t seen[kLanes];
    store(factors, share);
    memcpy(seen, &sees, sizeof seen);
    for (int lane = 0; lane < kLanes; ++lane) {
        float* cell = row.data + lane * channels;
        const Vector factor = splat(factors[lane]);
        const IntVector mask = seen[lane] - IntVector{};
        for (int64_t c = 0; c < channels; c += kLanes) store(cell + c, keep(mask, load(cell + c) * factor));
    }
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
    IntVector sees[kGroupRows];  // the queries that see a key: not all their logits are -inf
    for (int r = 0; r < s.y->rows; ++r) {
        const IntVector finite = (IntVector)(greatest[r] != splat(-__builtin_inff()));
        sum[r] = softmax(s.tile.rows[r], s.z->visits * s.y->count[r] * s.entries, keep(finite, greatest[r]));
        // By the sum: the greatest forgets a logit that is not a number where a hidden one follows.
        sees[r] = (IntVector)(sum[r] != splat(0.0f));
    }

    const ptrdiff_t result_row = (plan.value_dim + 1) * kLanes;
    float* result = s.w->result;
    mix_all(mix_operands(s, s.row->mix_value, 0), plan.value_dim, result, result_row);
    for (int r = 0; r < s.y->rows; ++r) {
        float* row = result + r * result_row;
        scale_lanes(mixed(row, plan.value_dim), plan.value_dim, 1.0f / sum[r], sees[r]);
        if (plan.lse) store(row + plan.value_dim * kLanes, greatest[r] * kLn2 + log_natural(sum[r]));
    }
}

ptrdiff_t forward_tile_row(const Pass& pass) {
    return (ptrdiff_t)pass.z.max_count * pass.y.max_count * pass.max_entries * kLanes;
}

Workspace forward_workspace(const Plan& plan, Arena& arena) {
    const Pass& pass = plan.query_pass;
    KeyRow row(plan, pass.max_away_pitch, pass.max_away_lanes, false);
    row.size *= plan.heads_together;
    Workspace w = carve(plan, pass, row, ForwardHome(plan).channels, plan.value_dim + 1, arena);
    w.scores = arena.floats(kGroupRows * forward_tile_row(pass));
    if (in_pairs(plan)) w.weight_pairs = arena.floats(weight_pairs(pass));
    return w;
}

void pack_keys(const Plan& plan, const RowAddress& at, const Runs& runs, const KeyRow& layout, float* row,
               float* loose) {
    if (at.z < 0 || at.y < 0) {
        memset(row, 0, (size_t)layout.size * sizeof(float));
        return;
    }
    float* target = loose ? loose : row;
    pack_row(plan, plan.key, plan.head_dim, at, runs, 1.0f, layout.key.of(target));
    pack_row(plan, plan.value, plan.value_dim, at, runs, 1.0f, layout.value.of(target));
    if (loose) layout.pair(plan, loose, row);
}

struct ForwardWalk : Walk {
    const KeyRow keys;
    const ForwardHome home;
    ForwardWalk(const Plan& plan, const Item& item, Workspace& w)
        : Walk(plan, plan.query_pass, item, w), keys(plan, tile.away_pitch, tile.away_lanes, false), home(plan) {
        together = plan.heads_together;
        next_head = keys.size;
        home_streams[0] = {&plan.query, plan.head_dim};
        away_streams[0] = {&plan.key, plan.head_dim};
        away_streams[1] = {&plan.value, plan.value_dim};
        result_streams[0] = {&plan.out_tensor, plan.value_dim};
        calls = 1 + mix_calls(plan.value_dim, keys.value.channel == 1);
        steps = dot_steps(plan, plan.head_dim) + (calls - 1) * mix_steps(plan);
    }
    void pack_home(const Spot&, int r, const RowAddress& at, const Runs& runs) const {
        float* query = home_row(r);
        pack_row(plan, plan.query, plan.head_dim, at, runs, packed_multiplier(plan), planes(query, kLanes));
        pair_home(plan, query, plan.head_dim, query + home.dot_query * kLanes);
        multiply_for_tables(plan, query);
    }
    void pack_away(int64_t z, int64_t y, float* row) const {
        for (int64_t i = 0; i < together; ++i, row += next_head)
            pack_keys(plan, {item.first_batch, item.head + i, z, y}, away_runs(0, tile.away_lanes), keys, row, w.loose);
    }
    void place(Spot& spot, int) const {
        for (int r = 0; r < kGroupRows; ++r) spot.tile.rows[r] = w.scores + r * forward_tile_row(pass);
        spot.row = &keys;
        spot.tile.visit = (ptrdiff_t)spot.entries * kLanes;
        spot.tile.entry = kLanes;
        spot.orders = spot.y->count;
    }
    void compute(const Spot& spot) const { forward_spot(spot); }
    void unpack(int r, const RowAddress& at, const Runs& runs) const {
        float* row = w.result + r * (plan.value_dim + 1) * kLanes;
        unpack_row(plan, plan.out_tensor, plan.value_dim, at, runs, 1.0f, mixed(row, plan.value_dim));
        if (plan.lse) unpack_scalars(plan, plan.lse, at, runs, 1.0f, row + plan.value_dim * kLanes);
    }
};

// ---- Forward, of what is made of the layer's input ------------------------------------------------------------------

// Queries need not be packed again: their row, made with that of the keys, lies behind it.
struct ProjectedRow : KeyRow {
    Section query;
    ProjectedRow(const Plan& plan, ptrdiff_t pitch, ptrdiff_t lanes) : KeyRow(plan, pitch, lanes, false) {
        Sections row = {pitch, lanes, size};
        query = row.in_planes(plan.head_dim);
        size = row.size;
    }
};

// The packed rows of one head.
int64_t head_floats(const Workspace& w, const Pass& pass) { return slots(pass) * w.away_row + pass.max_away_pitch; }

// Those of all heads of a set, and a strip of a row of the input.
Workspace projected_workspace(const Plan& plan, Arena& arena) {
    const Pass& pass = plan.query_pass;
    const ProjectedRow row(plan, pass.max_away_pitch, pass.max_away_lanes);
    Workspace w = carve(plan, pass, row, plan.head_dim, plan.value_dim + 1, arena);
    w.scores = arena.floats(kGroupRows * forward_tile_row(pass));
    const int64_t heads = plan.projection->heads * head_floats(w, pass);
    w.cache = arena.floats(heads);
    w.cache_bytes = (size_t)heads * sizeof(float);
    w.input = arena.floats(plan.projection->channels * input_pitch(pass.max_away_lanes));
    return w;
}

// A row of the input becomes rows of query, key and value, those of all heads of a set at once while it is near.
struct ProjectedWalk : ForwardWalk {
    const Projection& projection;
    const ProjectedRow rows;
    const int64_t first_head, heads;
    int first, last;  // away lanes that may hold a cell
    ProjectedWalk(const Plan& plan, const Item& item, int64_t first_head, Workspace& w)
        : ForwardWalk(plan, item, w),
          projection(*plan.projection),
          rows(plan, tile.away_pitch, tile.away_lanes),
          first_head(first_head),
          heads(plan.heads - first_head < projection.heads ? plan.heads - first_head : projection.heads),
          first(tile.away_lanes),
          last(0) {
        for (int i = 0; i < tile.away_runs; ++i) {
            const Run& run = pass.runs[tile.away_first_run + i];
            const int end = run.lane + (run.count - 1) * run.step + 1;
            first = run.lane < first ? run.lane : first;
            last = end > last ? end : last;
        }
        home_streams[0] = away_streams[1] = {};
    }
    int64_t given() const { return projection.channels - projection.has_bias; }
    // All heads see the same rows of the input: only while the first is worked on are the next ones asked for.
    void ask_for_input(bool now) { away_streams[0] = now ? Stream{&projection.input, given()} : Stream{}; }
    void pack_away(int64_t z, int64_t y, float* row) const {
        const int64_t next_head = head_floats(w, pass);
        if (z < 0 || y < 0) {
            for (int64_t h = 0; h < heads; ++h) memset(row + h * next_head, 0, (size_t)rows.size * sizeof(float));
            return;
        }
        const RowAddress at = {item.first_batch, 0, z, y};
        for (int lane = first; lane < last; lane += kInputLanes) {
            const InputRow x = pack_input(at, lane, lane + kInputLanes < last ? lane + kInputLanes : last);
            for (int64_t h = 0; h < heads; ++h) project_head(x, first_head + h, row + h * next_head);
        }
    }
    InputRow pack_input(const RowAddress& at, int from, int to) const {
        const ptrdiff_t pitch = input_pitch(to - from);
        const Runs runs = away_runs(from, to);
        memset(w.input, 0, (size_t)(projection.channels * pitch) * sizeof(float));
        pack_row(plan, projection.input, given(), at, runs, 1.0f, planes(w.input, pitch));
        if (projection.has_bias) pack_ones(at, runs, w.input + given() * pitch);
        return {w.input, pitch, projection.channels, from, to - from};
    }
    // A channel whose weight is the bias: where there is no cell, all stays zero.
    void pack_ones(const RowAddress& at, const Runs& runs, float* lanes) const {
        for (int i = 0; i < runs.count; ++i) {
            const Run run = clip(runs.runs[i], runs);
            if (at.first_batch + run.group >= plan.batch) continue;
            for (int j = 0; j < run.count; ++j) lanes[run.lane + j * run.step] = 1.0f;
        }
    }
    void project_head(const InputRow& x, int64_t head, float* row) const {
        const float* weight = projection.weight + head * (2 * plan.head_dim + plan.value_dim) * x.channels;
        project_row(x, weight, plan.head_dim, plan.query_multiplier, rows.query.of(row));
        weight += plan.head_dim * x.channels;
        project_row(x, weight, plan.head_dim, 1.0f, rows.key.of(row));
        weight += plan.head_dim * x.channels;
        project_row(x, weight, plan.value_dim, 1.0f, rows.value.of(row));
    }
    // A query's own cell is among those that its group sees.
    const float* row_of(const Spot& spot, const RowAddress& at) const {
        const Source* source = w.sources;
        for (int i = 0; i < spot.z->visits; ++i)
            for (int j = 0; j < spot.y->visits; ++j, ++source)
                if (pass.z.visits[spot.z->first_visit + i].index == at.z && source->visit->index == at.y)
                    return source->away;
        assert(false);
        return nullptr;
    }
    void pack_home(const Spot& spot, int r, const RowAddress& at, Runs) const {
        const ptrdiff_t lane = tile.left + (spot.lanes - pass.vectors - tile.first_vector) * kLanes;
        const float* query = row_of(spot, at) + rows.query.at + lane;
        for (int64_t c = 0; c < plan.head_dim; ++c)
            store(home_row(r) + c * kLanes, load(query + c * rows.query.channel));
    }
};

// ---- Backward: queries at home --------------------------------------------------------------------------------------

// Home channels: query, gradient of out, -lse in base 2, -delta, and where there are pairs those of the first two.
struct QueryHome {
    int64_t query, grad_out, minus_lse, minus_delta, dot_query, dot_grad_out, channels;
    explicit QueryHome(const Plan& plan)
        : query(0),
          grad_out(plan.head_dim),
          minus_lse(grad_out + plan.value_dim),
          minus_delta(minus_lse + 1),
          dot_query(in_pairs(plan) ? minus_delta + 1 : query),
          dot_grad_out(in_pairs(plan) ? dot_query + pairs_of(plan.head_dim) : grad_out),
          channels(minus_delta + 1 + pairs_at_home(plan, plan.head_dim) + pairs_at_home(plan, plan.value_dim)) {}
};

// A row of the ring: query, gradient of out, then weights and gradients of the logits, [visit][entry] each, in planes.
struct RingRow {
    Section query, grad_out;          // as they are packed
    Section mix_query, mix_grad_out;  // the same sections, or pairs of cells
    int64_t visits_y, entries;
    ptrdiff_t weights, gradients, loose_size, size;
    RingRow(const Plan& plan, ptrdiff_t pitch, ptrdiff_t lanes)
        : visits_y(plan.query_pass.y.max_count), entries(plan.entries[2]) {
        Sections row = {pitch, lanes, 0};
        query = mix_query = row.for_mix(plan.head_dim);
        grad_out = mix_grad_out = row.for_mix(plan.value_dim);
        loose_size = row.size;
        if (in_pairs(plan)) {
            row.size = 0;
            mix_query = row.pairs_of_cells(plan.head_dim);
            mix_grad_out = row.pairs_of_cells(plan.value_dim);
        }
        const int64_t scores = plan.query_pass.z.max_count * visits_y * entries;
        weights = row.in_planes(scores).at;
        gradients = row.in_planes(scores).at;
        size = row.size;
    }
};

// Logits minus log-sum-exp become weights.
template <Terms kTerms>
struct WeightPart {
    const QueryTerms<kTerms>* terms;
    Vector minus_lse[kGroupRows];
    float* target[kGroupRows];
    ptrdiff_t target_entry;
    const int32_t* seen;
    Vector start(int r, int e) const { return terms->at(r, e) + minus_lse[r]; }
    template <int kEntries>
    void finish(int r, int entry, const Vector* logits) {
        Vector weights[kEntries];
        // No weight is above one: what is, came of rounding logits of many digits.
        for (int e = 0; e < kEntries; ++e) weights[e] = exp2(minimum(splat(0.0f), logits[e]));
        if (seen)
            for (int e = 0; e < kEntries; ++e) weights[e] = keep(within(seen, entry + e), weights[e]);
        for (int e = 0; e < kEntries; ++e) store(target[r] + (entry + e) * target_entry, weights[e]);
    }
};

// weight * (grad_out . value - delta) is the gradient of the logit.
struct LogitGradientPart {
    Vector minus_delta[kGroupRows];
    float* weights[kGroupRows];
    ptrdiff_t target_entry, target;  // target: from a weight to its gradient
    const int32_t* seen;
    Vector start(int r, int) const { return minus_delta[r]; }
    template <int kEntries>
    void finish(int r, int entry, const Vector* sums) {
        Vector gradients[kEntries];
        for (int e = 0; e < kEntries; ++e) gradients[e] = sums[e] * load(weights[r] + (entry + e) * target_entry);
        if (seen)
            for (int e = 0; e < kEntries; ++e)
                gradients[e] = keep(within(seen, entry + e), gradients[e]);
        for (int e = 0; e < kEntries; ++e) store(weights[r] + (entry + e) * target_entry + target, gradients[e]);
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
        weights.seen = gradients.seen = s.seen;
        weights.target_entry = gradients.target_entry = s.tile.entry;
        gradients.target = s.gradients;
        for (int r = visit.first; r < visit.last; ++r) {
            const float* home = s.w->home + r * s.home_row;
            const int i_row = r - visit.first;
            weights.minus_lse[i_row] = load(home + channel.minus_lse * kLanes);
            gradients.minus_delta[i_row] = load(home + channel.minus_delta * kLanes);
            weights.target[i_row] = gradients.weights[i_row] = s.scores_of(source, r);
        }
        const int rows = visit.last - visit.first;
        dot_all(dot_operands(s, i, channel.dot_query, s.row->dot_key, plan.head_dim, plan.query_multiplier), rows,
                s.entries, weights);
        s.w->prefetches->issue();
        dot_all(dot_operands(s, i, channel.dot_grad_out, s.row->dot_value, plan.value_dim, 1.0f), rows, s.entries,
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
        const float* row = s.scores_of(source, r) + s.gradients + entry * s.tile.entry;
        Vector sum = {};
#pragma GCC unroll 8
        for (int e = 0; e < kEntries; ++e) {
            const Vector gradient = load(row + e * s.tile.entry);
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
        for (int entry = 0; entry < s.entries; entry += kBlock) sum_entries<kBlock>(s, r, entry, s.entries - entry);
}

void add_bias_gradient(const Spot& s) {
    for (int i = 0; i < s.source_count; ++i) {
        const Source& source = s.w->sources[i];
        for (int r = source.visit->first; r < source.visit->last; ++r) {
            const float* row = s.scores_of(source, r) + s.gradients;
            float* target = s.w->bias_gradient + bias_entry(*s.plan, source, r, s.lanes->first_entry) * kLanes;
            for (int e = 0; e < s.entries; ++e) {
                const Vector gradient = load(row + e * s.tile.entry);
                add_to(target + e * kLanes, s.own ? keep(load_mask(s.own), gradient) : gradient);
            }
        }
    }
}

// Lanes of other tiles are dropped from the sums of entries first to last - 1: nothing must be counted twice.
void keep_own(const Spot& s, float* sums, int first, int last) {
    for (int i = first * kGroupRows; s.own && i < last * kGroupRows; ++i)
        store(sums + i * kLanes, keep(load_mask(s.own), load(sums + i * kLanes)));
}

void relative_gradients(const BackwardPlan& plan, const Spot& s, float* result, ptrdiff_t result_row) {
    sum_over_axes(s);
    for (int axis = 0; axis < 3; ++axis) {
        if (!plan.relative[axis]) continue;
        int first, last;
        entry_range(plan, s, axis, &first, &last);
        if (plan.want_query)
            add_table_gradient(s.w->sums[axis], relative_table(plan, axis, s.head), plan.head_dim,
                               plan.nonzero[axis][s.head], first, last, result, result_row);
        if (!plan.relative_parts[axis]) continue;
        keep_own(s, s.w->sums[axis], first, last);
        add_relative_gradient(s.w->sums[axis], s.w->home, s.home_row, plan.head_dim, first, last,
                              s.w->relative_gradient[axis]);
    }
}

void query_gradients(const BackwardPlan& plan, const Spot& s) {
    if (plan.bias_parts) add_bias_gradient(s);
    const ptrdiff_t result_row = plan.head_dim * kLanes;
    float* result = s.w->result;
    if (plan.want_query) mix_all(mix_operands(s, s.row->mix_key, s.gradients), plan.head_dim, result, result_row);
    if (plan.relative[0] || plan.relative[1] || plan.relative[2]) relative_gradients(plan, s, result, result_row);
}

void weights_and_gradients(const Spot& s) {
    const Plan& plan = *s.plan;
    query_terms(plan, s);
    switch (terms_of(plan)) {
        case kNoTerms: logit_gradients<kNoTerms>(s); break;
        case kRelativeTerms: logit_gradients<kRelativeTerms>(s); break;
        case kAllTerms: logit_gradients<kAllTerms>(s); break;
    }
}

bool wants_query_gradients(const BackwardPlan& plan) {
    return plan.want_query || plan.bias_parts || plan.relative_parts[0] || plan.relative_parts[1] ||
           plan.relative_parts[2];
}

// Packs a home row, and computes delta, the sum over channels of out * grad_out.
void pack_query_home(const BackwardPlan& plan, const RowAddress& at, const Runs& runs, float* home, float* scratch) {
    const QueryHome channel(plan);
    const auto plane = [&](int64_t c) { return home + c * kLanes; };
    pack_row(plan, plan.query, plan.head_dim, at, runs, packed_multiplier(plan), planes(home, kLanes));
    pack_row(plan, plan.grad_out, plan.value_dim, at, runs, 1.0f, planes(plane(channel.grad_out), kLanes));
    pair_home(plan, home, plan.head_dim, plane(channel.dot_query));
    pair_home(plan, plane(channel.grad_out), plan.value_dim, plane(channel.dot_grad_out));
    pack_scalars(plan, plan.lse, at, runs, -kLog2E, plane(channel.minus_lse));
    // A query that sees no key has a log-sum-exp of -inf, and weights of zero: 2^(-inf - inf).
    const Vector minus_lse = load(plane(channel.minus_lse)), infinity = splat(__builtin_inff());
    store(plane(channel.minus_lse), choose((IntVector)(minus_lse == infinity), -infinity, minus_lse));
    pack_row(plan, plan.out_tensor, plan.value_dim, at, runs, -1.0f, planes(scratch, kLanes));
    Vector sum = {};
    for (int64_t c = 0; c < plan.value_dim; ++c)
        sum += load(scratch + c * kLanes) * load(plane(channel.grad_out + c));
    store(plane(channel.minus_delta), sum);
}

struct QueryWalk : Walk {
    const BackwardPlan& plan;
    const KeyRow keys;
    const LaneTile& ring_tile;
    const RingRow ring;
    int32_t orders[kGroupRows];
    bool own = true;  // whether the gradients of the query and the tables are this item's business
    QueryWalk(const BackwardPlan& plan, const Item& item, Workspace& w)
        : Walk(plan, plan.query_pass, item, w),
          plan(plan),
          keys(plan, tile.away_pitch, tile.away_lanes, true),
          ring_tile(plan.key_pass.tiles[item.tile]),
          ring(plan, ring_tile.away_pitch, ring_tile.away_lanes) {
        home_streams[0] = {&plan.query, plan.head_dim};
        home_streams[1] = {&plan.grad_out, plan.value_dim};
        home_streams[2] = {&plan.out_tensor, plan.value_dim};
        away_streams[0] = {&plan.key, plan.head_dim};
        away_streams[1] = {&plan.value, plan.value_dim};
        if (plan.want_query) result_streams[0] = {&plan.grad_query, plan.head_dim};
        calls = 2 + mix_calls(plan.head_dim, keys.mix_key.channel == 1);
        steps = dot_steps(plan, plan.head_dim) + dot_steps(plan, plan.value_dim) + (calls - 2) * mix_steps(plan);
        for (int32_t& visits : orders) visits = (int32_t)ring.visits_y;
    }
    float* ring_row(const Spot& spot, int r) const { return w.ring + spot.y->slot[r] * w.ring_row; }
    ptrdiff_t ring_lane(const Spot& spot) const {
        return tile.ring_lane + (spot.lanes - pass.vectors - tile.first_vector) * kLanes;
    }
    void pack_away(int64_t z, int64_t y, float* row) const {
        pack_keys(plan, address(z, y), away_runs(0, tile.away_lanes), keys, row, w.loose);
    }
    void place(Spot& spot, int) const {
        for (int r = 0; r < spot.y->rows; ++r)
            spot.tile.rows[r] = ring_row(spot, r) + ring_lane(spot) + ring.weights +
                                spot.lanes->first_entry * ring_tile.away_pitch;
        spot.tile.visit = ring.entries * ring_tile.away_pitch;
        spot.tile.entry = ring_tile.away_pitch;
        spot.gradients = ring.gradients - ring.weights;
        spot.orders = orders;
        spot.row = &keys;
    }
    void pack_home(const Spot& spot, int r, const RowAddress& at, const Runs& runs) const {
        const auto in_ring = [&](const Section& section) {
            Packed row = section.of(w.loose_ring ? w.loose_ring + r * ring.loose_size : ring_row(spot, r));
            row.data += ring_lane(spot) * row.lane;
            return row;
        };
        float* home = home_row(r);
        pack_query_home(plan, at, runs, home, w.result);
        keep_in_ring(plan.query, plan.head_dim, at, runs, packed_multiplier(plan), home, in_ring(ring.query));
        keep_in_ring(plan.grad_out, plan.value_dim, at, runs, 1.0f, home + plan.head_dim * kLanes,
                     in_ring(ring.grad_out));
        multiply_for_tables(plan, home);
    }
    // Once all vectors of a group have been packed.
    void pair_ring(const Group& y) const {
        for (int r = 0; w.loose_ring && r < y.rows; ++r) {
            const float* loose = w.loose_ring + r * ring.loose_size;
            float* row = w.ring + y.slot[r] * w.ring_row;
            pair_cells(ring.query, loose, plan.key_pass.step, ring.mix_query, row);
            pair_cells(ring.grad_out, loose, plan.key_pass.step, ring.mix_grad_out, row);
        }
    }
    // In planes a copy of what was packed at home; in cells what has no cell has been zeros from the start.
    void keep_in_ring(const Tensor& tensor, int64_t channels, const RowAddress& at, const Runs& runs, float multiplier,
                      const float* home, const Packed& row) const {
        if (row.channel == 1) {
            pack_row(plan, tensor, channels, at, runs, multiplier, row);
            return;
        }
        for (int64_t c = 0; c < channels; ++c) store(row.data + c * row.channel, load(home + c * kLanes));
    }
    void compute(const Spot& spot) const {
        weights_and_gradients(spot);
        if (own && wants_query_gradients(plan)) query_gradients(plan, spot);
    }
    void unpack(int r, const RowAddress& at, const Runs& runs) const {
        float* row = w.result + r * plan.head_dim * kLanes;
        if (own && plan.want_query)
            unpack_row(plan, plan.grad_query, plan.head_dim, at, runs, plan.scale, planes(row, kLanes));
    }
};

// ---- Backward: keys at home -----------------------------------------------------------------------------------------

bool wants_key_gradients(const BackwardPlan& plan) { return plan.want_key || plan.want_value; }

// Gathers the gradients of key and value of groups of key rows from the rows of queries in the ring.
struct KeyWalk : Walk {
    const BackwardPlan& plan;
    const RingRow ring;
    KeyWalk(const BackwardPlan& plan, const Item& item, Workspace& w)
        : Walk(plan, plan.key_pass, item, w), plan(plan), ring(plan, tile.away_pitch, tile.away_lanes) {
        if (plan.want_key) result_streams[0] = {&plan.grad_key, plan.head_dim};
        if (plan.want_value) result_streams[1] = {&plan.grad_value, plan.value_dim};
        if (plan.want_key) calls += mix_calls(plan.head_dim, ring.mix_query.channel == 1);
        if (plan.want_value) calls += mix_calls(plan.value_dim, ring.mix_grad_out.channel == 1);
        steps = calls * mix_steps(plan);
    }

    int64_t channels() const { return plan.head_dim + plan.value_dim; }

    // Gradient of key, then of value: [row][channel][lane].
    float* result(int64_t plane, int64_t group, int vector) const {
        if (!w.planes) return w.result;
        const int64_t block = ((plane * w.plane_groups + group - item.first_group) * tile.vectors + vector);
        return w.planes + block * kGroupRows * channels() * kLanes;
    }

    void find_queries(const Group& y) const {
        for (int i = 0; i < y.visits; ++i) {
            const Visit& visit = pass.y.visits[y.first_visit + i];
            assert(visit.slot >= 0 && visit.slot < pass.y.slots);
            w.ring_sources[i] = {w.ring + visit.slot * w.ring_row, &visit, 0, 0};
        }
    }

    // Gathers by one plane of weights.
    void gather(const Spot& spot, int order_z, ptrdiff_t weights, const Section& away, int64_t channels_,
                float* target) const {
        MixOperands o = mix_operands(spot, away, 0);
        o.sources = w.ring_sources;
        o.keys_at_home = true;
        o.add = w.planes != nullptr;
        o.weights.visit = ring.entries * spot.away_pitch;
        o.weights.entry = spot.away_pitch + spot.step;
        o.away_weights = weights + spot.away_lane +
                         (order_z * ring.visits_y * ring.entries + spot.lanes->first_entry) * spot.away_pitch;
        mix_all(o, channels_, target, channels() * kLanes);
    }

    // What the queries of one plane add to a group of key rows.
    void gather_group(const Group& queries_z, int64_t g) const {
        const Group& y = pass.y.groups[g];
        find_queries(y);
        for (int v = 0; v < tile.vectors; ++v) {
            Spot spot = spot_of(plan, pass, tile, item.head, v, w);
            spot.source_count = y.visits;
            for (int i = 0; i < queries_z.visits; ++i) {
                const Visit& visit = plan.query_pass.z.visits[queries_z.first_visit + i];
                if (visit.index < 0) continue;
                list_results(visit.index, y, v);
                w.prefetches->spread_over(y.visits * calls, y.visits * steps);
                float* target = result(visit.index, g, v);
                if (plan.want_key)
                    gather(spot, visit.order[0], ring.gradients, ring.mix_query, plan.head_dim, target);
                if (plan.want_value)
                    gather(spot, visit.order[0], ring.weights, ring.mix_grad_out, plan.value_dim,
                           target + plan.head_dim * kLanes);
                if (!w.planes) unpack(visit.index, g, v);
            }
        }
    }

    void unpack(int64_t plane, int64_t g, int v) const {
        const Group& y = pass.y.groups[g];
        for (int r = 0; r < y.rows; ++r) {
            const RowAddress at = address(plane, y.home[r]);
            float* row = result(plane, g, v) + r * channels() * kLanes;
            float* values = row + plan.head_dim * kLanes;
            // The packed query carries scale * log2(e), or nothing.
            const float multiplier = in_pairs(plan) ? plan.scale : kLn2;
            if (plan.want_key)
                unpack_row(plan, plan.grad_key, plan.head_dim, at, own_runs(v), multiplier, mixed(row, plan.head_dim));
            if (plan.want_value)
                unpack_row(plan, plan.grad_value, plan.value_dim, at, own_runs(v), 1.0f,
                           mixed(values, plan.value_dim));
        }
    }

    void unpack_planes() const {
        for (int64_t plane = 0; w.planes && plane < plan.key_planes; ++plane)
            for (int64_t g = item.first_group; g < item.last_group; ++g)
                for (int v = 0; v < tile.vectors; ++v) unpack(plane, g, v);
    }
};

// ---- Backward -------------------------------------------------------------------------------------------------------

Workspace backward_workspace(const BackwardPlan& plan, Arena& arena) {
    const Pass &queries = plan.query_pass, &keys = plan.key_pass;
    const int64_t channels = plan.head_dim + plan.value_dim;
    const KeyRow key_row(plan, queries.max_away_pitch, queries.max_away_lanes, true);
    const RingRow ring_row(plan, keys.max_away_pitch, keys.max_away_lanes);
    Workspace w = carve(plan, queries, key_row, QueryHome(plan).channels, channels, arena);
    for (int axis = 0; axis < 3; ++axis)
        w.sums[axis] = arena.floats((int64_t)plan.entries[axis] * kGroupRows * kLanes);
    if (plan.bias_parts) w.bias_gradient = arena.floats(plan.bias_entries * kLanes);
    for (int axis = 0; axis < 3; ++axis)
        if (plan.relative_parts[axis])
            w.relative_gradient[axis] = arena.floats(plan.entries[axis] * plan.head_dim * kLanes);
    w.ring_row = ring_row.size;
    int64_t ring = keys.y.slots * w.ring_row + keys.max_away_pitch;
    const int64_t loose = ring + loose_margin(plan, keys);
    if (in_pairs(plan)) ring = loose + kGroupRows * ring_row.loose_size + loose_margin(plan, keys);
    w.ring = arena.floats(ring);
    if (in_pairs(plan)) {
        w.loose_ring = w.ring + loose;
        const int64_t with_queries = weight_pairs(queries), with_keys = weight_pairs(keys);
        w.weight_pairs = arena.floats(with_queries > with_keys ? with_queries : with_keys);
    }
    w.ring_bytes = (size_t)ring * sizeof(float);
    w.ring_sources = (Source*)arena.take((int64_t)keys.y.max_visits * (int64_t)sizeof(Source));
    if (plan.key_planes > 1 || queries.z.max_visits > 1) {
        w.plane_groups = (keys.y.group_count + queries.chunks - 1) / queries.chunks;
        const int64_t vectors = plan.key_planes * w.plane_groups * keys.max_vectors * kGroupRows * channels;
        w.planes = arena.floats(vectors * kLanes);
        w.planes_bytes = (size_t)(vectors * kLanes) * sizeof(float);
    }
    return w;
}

// Makes the groups of queries that a group of keys needs and that are not in the ring, from `next` on.
void make_queries(const BackwardPlan& plan, QueryWalk& queries, int64_t z, const Group& keys, int32_t& next,
                  int32_t own_from, int32_t last) {
    const Pass& pass = plan.query_pass;
    if (next < keys.first_away) next = keys.first_away;
    for (; next < keys.last_away; ++next) {
        const Group& y = pass.y.groups[next];
        queries.own = next >= own_from && !y.repeated;
        const GroupPair following = {pass.z.groups + z, pass.y.groups + next + 1};
        walk_group(queries, pass.z.groups[z], y, next + 1 < last ? &following : nullptr);
        queries.pair_ring(y);
    }
}

void backward_item(const BackwardPlan& plan, const Item& item, Workspace& w) {
    const Group* groups = plan.key_pass.y.groups;
    start_item(plan, plan.query_pass, item, w);
    if (w.planes) memset(w.planes, 0, w.planes_bytes);
    const int64_t result_channels = plan.head_dim + plan.value_dim;
    memset(w.result, 0, (size_t)(kGroupRows * result_channels * kLanes) * sizeof(float));
    QueryWalk queries(plan, item, w);
    const KeyWalk keys(plan, item, w);
    // What an earlier item's keys needed already is made here once more, and not counted again.
    const int32_t own_from = item.first_group > 0 ? groups[item.first_group - 1].last_away : 0;
    const int32_t last = groups[item.last_group - 1].last_away;
    for (int32_t z = 0; z < plan.query_pass.z.group_count; ++z) {
        int32_t next = 0;
        for (int64_t g = item.first_group; g < item.last_group; ++g) {
            make_queries(plan, queries, z, groups[g], next, own_from, last);
            if (wants_key_gradients(plan)) keys.gather_group(plan.query_pass.z.groups[z], g);
        }
    }
    if (wants_key_gradients(plan)) keys.unpack_planes();
}

// ---- Jobs -----------------------------------------------------------------------------------------------------------

// Of `groups` groups in all.
template <class Work>
void each_item(const Plan& plan, const Pass& pass, int64_t groups, int64_t head, int64_t job, Work work) {
    const int64_t last = (int64_t)pass.items * (job + 1) / pass.jobs;
    for (int64_t i = (int64_t)pass.items * job / pass.jobs; i < last; ++i) work(item_of(plan, pass, groups, head, i));
}

// Adds the lanes of an accumulator to a job's partial sums, and clears it.
void flush(float* accumulator, int64_t count, float multiplier, float* part) {
    for (int64_t i = 0; i < count; ++i) {
        part[i] += sum_lanes(load(accumulator + i * kLanes)) * multiplier;
        store(accumulator + i * kLanes, Vector{});
    }
}

void forward_item(const Plan& plan, const Item& item, Workspace& w) {
    const RowAxis &z = plan.query_pass.z, &y = plan.query_pass.y;
    const auto pair = [&](int64_t g) { return GroupPair{z.groups + g / y.group_count, y.groups + g % y.group_count}; };
    start_item(plan, plan.query_pass, item, w);
    ForwardWalk steps(plan, item, w);
    for (int64_t g = item.first_group; g < item.last_group; ++g) {
        const GroupPair here = pair(g), next = pair(g + 1 < item.last_group ? g + 1 : g);
        walk_group(steps, *here.z, *here.y, g + 1 < item.last_group ? &next : nullptr);
    }
}

// Group by group, so that the rows that they are made of are packed once.
void projected_item(const Plan& plan, Item item, int64_t set, Workspace& w) {
    const RowAxis &z = plan.query_pass.z, &y = plan.query_pass.y;
    const auto pair = [&](int64_t g) { return GroupPair{z.groups + g / y.group_count, y.groups + g % y.group_count}; };
    start_item(plan, plan.query_pass, item, w);
    ProjectedWalk steps(plan, item, set * plan.projection->heads, w);
    float* const cache = w.cache;
    for (int64_t g = item.first_group; g < item.last_group; ++g) {
        const bool more = g + 1 < item.last_group;
        const GroupPair here = pair(g), next = pair(more ? g + 1 : g);
        for (int64_t h = 0; h < steps.heads; ++h) {
            item.head = steps.first_head + h;
            w.cache = cache + h * head_floats(w, plan.query_pass);
            steps.ask_for_input(h == 0);
            walk_group(steps, *here.z, *here.y, more ? &next : nullptr);
        }
    }
    w.cache = cache;
}

void forward_projected(const Plan& plan, int64_t set, int64_t job, char* workspace) {
    Arena arena = {workspace, 0};
    Workspace w = projected_workspace(plan, arena);
    const int64_t groups = (int64_t)plan.query_pass.z.group_count * plan.query_pass.y.group_count;
    each_item(plan, plan.query_pass, groups, 0, job, [&](const Item& item) { projected_item(plan, item, set, w); });
}

void forward(const Plan* plan, int64_t head, int64_t job, char* workspace) {
    if (plan->projection) return forward_projected(*plan, head, job, workspace);
    Arena arena = {workspace, 0};
    Workspace w = forward_workspace(*plan, arena);
    const Pass& pass = plan->query_pass;
    const int64_t groups = (int64_t)pass.z.group_count * pass.y.group_count;
    each_item(*plan, pass, groups, head, job, [&](const Item& item) { forward_item(*plan, item, w); });
}

void backward(const BackwardPlan* plan, int64_t head, int64_t job, char* workspace) {
    Arena arena = {workspace, 0};
    Workspace w = backward_workspace(*plan, arena);
    const int64_t part = head * plan->query_pass.jobs + job;
    if (w.bias_gradient) memset(w.bias_gradient, 0, (size_t)(plan->bias_entries * kLanes) * sizeof(float));
    for (int axis = 0; axis < 3; ++axis)
        if (w.relative_gradient[axis])
            memset(w.relative_gradient[axis], 0,
                   (size_t)(plan->entries[axis] * plan->head_dim * kLanes) * sizeof(float));
    each_item(*plan, plan->query_pass, plan->key_pass.y.group_count, head, job, [&](const Item& item) {
        backward_item(*plan, item, w);
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

size_t forward_bytes(const Plan* plan) {
    Arena arena = {nullptr, 0};
    if (plan->projection)
        projected_workspace(*plan, arena);
    else
        forward_workspace(*plan, arena);
    return arena.used;
}

size_t backward_bytes(const BackwardPlan* plan) {
    Arena arena = {nullptr, 0};
    backward_workspace(*plan, arena);
    return arena.used;
}

}  // namespace

const nearsight::Kernel nearsight::NEARSIGHT_KERNEL = {kLanes, forward_bytes, backward_bytes, forward, backward};
