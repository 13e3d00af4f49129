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
#include "rows.h"
#include "simd.h"
#include "steps.h"
#include "walk.h"

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
        dot_apart(dot_operands(s, source, 0, 0, s.plan->head_dim), visit.last - visit.first, s.lanes->entries, part);
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
    return carve(plan, plan.query_pass, plan.head_dim + plan.value_dim, plan.head_dim, plan.value_dim + 1, false,
                 arena);
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
        calls = 1 + mix_calls(plan.value_dim);
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
        s.w->prefetches->issue();
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
            add_relative_gradient(s.w->sums[axis], s.w->home, s.home_row, plan.head_dim, first, last,
                                  s.w->relative_gradient[axis]);
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
        calls = 2 + mix_calls(plan.head_dim);
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
        KeyWeightPart<kTerms> part = key_weight_part<kTerms>(s, source);
        dot_all(dot_operands(s, source, 0, 0, s.plan->head_dim), source.visit->last - source.visit->first,
                s.lanes->entries, part);
    }
}

void key_logit_gradients(const Spot& s) {
    const Plan& plan = *s.plan;
    const KeyAway channel(plan);
    for (int i = 0; i < s.source_count; ++i) {
        const Source& source = s.w->sources[i];
        const Visit& visit = *source.visit;
        s.w->prefetches->issue();
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
        calls = 2 + mix_calls(plan.head_dim) + mix_calls(plan.value_dim);
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
