// SPDX-License-Identifier: Apache-2.0

#include "call.h"

#include <float.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "geometry.h"
#include "isa.h"
#include "threads.h"

namespace nearsight {

namespace {

constexpr int64_t kMostScratch = (int64_t)1 << 31;  // bytes of one thread
constexpr double kLog2E = 1.44269504088896340736;

Tensor place(const nearsight_problem& p, const nearsight_tensor& tensor) {
    Tensor t = {(char*)tensor.data, tensor.strides[0], tensor.strides[1], 0, 0, 0, tensor.strides[p.rank + 2]};
    int64_t* axes[3] = {&t.z, &t.y, &t.x};
    for (int i = 0; i < p.rank; ++i) *axes[3 - p.rank + i] = tensor.strides[2 + i];
    return t;
}

// A number of the largest magnitude, with which masks are written, must not become infinite.
float in_base_2(float logit) {
    const float scaled = logit * (float)kLog2E;
    return std::isinf(scaled) && !std::isinf(logit) ? std::copysign(FLT_MAX, logit) : scaled;
}

// The first and last channel that any of a head's vectors uses: SASA's row and column tables are each half zero.
ChannelRange nonzero_channels(const float* table, int64_t entries, int64_t channels) {
    ChannelRange range = {(int32_t)channels, 0};
    for (int64_t e = 0; e < entries; ++e)
        for (int64_t c = 0; c < channels; ++c)
            if (table[e * channels + c] != 0) {
                range.begin = std::min(range.begin, (int32_t)c);
                range.end = std::max(range.end, (int32_t)c + 1);
            }
    range.begin = std::min(range.begin, range.end);
    return range;
}

// Small where neighbouring heads lie in the same pages, and those of few channels in the same lines: what one head
// reads is still near when the next one comes.
constexpr PassLists::Chunk kChunk = {8, 8192}, kSmallChunk = {4, 1024};

bool lines_are_shared(const Plan& plan) {
    return plan.query.channel == 1 && plan.query.head < plan.query.x && !plan.bfloat16;
}

// As many heads as fill a line, so that each line is brought near once for all of them.
int32_t heads_together(const Plan& plan) {
    if (!lines_are_shared(plan)) return 1;
    int64_t heads = std::max<int64_t>(1, 16 / std::max(plan.head_dim, plan.value_dim));
    while (plan.heads % heads != 0) --heads;
    return (int32_t)heads;
}

std::atomic<int64_t> calls{0};

// Owns what a plan points at.
struct Call {
    const Kernel* kernel;
    Geometry geometry;
    Row row;
    PassLists query_lists;
    std::vector<float> bias;
    std::vector<ChannelRange> nonzero[3];

    Call(const nearsight_problem& p, const nearsight_inputs& inputs, const Kernel* kernel, bool backward)
        : kernel(kernel),
          geometry(p),
          row(choose_row(geometry, p, inputs.key.strides[p.rank + 2] != 1, kernel->lanes, backward)),
          query_lists(geometry, Home::queries, kernel->lanes, row, backward) {}

    void describe(const nearsight_problem& p, const nearsight_inputs& inputs, Plan& plan);
    void list_tables(const nearsight_problem& p, const nearsight_inputs& inputs, Plan& plan);
};

// All of a plan but its passes and where its results go.
void Call::describe(const nearsight_problem& p, const nearsight_inputs& inputs, Plan& plan) {
    plan.call = ++calls;
    plan.bfloat16 = p.dtype == NEARSIGHT_BFLOAT16;
    plan.batch = p.batch;
    plan.heads = p.heads;
    plan.heads_together = 1;
    plan.head_dim = p.head_dim;
    plan.value_dim = p.value_dim;
    plan.batch_group = row.images;
    plan.scale = (float)p.scale;
    plan.query_multiplier = (float)(p.scale * kLog2E);
    plan.bias_entries = 1;
    for (int axis = 0; axis < 3; ++axis) {
        plan.entries[axis] = (int32_t)geometry.axes[axis].entries();
        plan.out[axis] = geometry.axes[axis].queries();
        plan.bias_entries *= plan.entries[axis];
    }
    plan.query = place(p, inputs.query);
    plan.key = place(p, inputs.key);
    plan.value = place(p, inputs.value);
    list_tables(p, inputs, plan);
}

void Call::list_tables(const nearsight_problem& p, const nearsight_inputs& inputs, Plan& plan) {
    if (inputs.bias) {
        bias.resize((size_t)(p.heads * plan.bias_entries));
        for (size_t i = 0; i < bias.size(); ++i) bias[i] = in_base_2(inputs.bias[i]);
        plan.bias = bias.data();
    }
    for (int i = 0; i < p.rank; ++i) {
        const int axis = 3 - p.rank + i;
        if (!inputs.relative[i]) continue;
        plan.relative[axis] = inputs.relative[i];
        const int64_t entries = plan.entries[axis];
        for (int64_t head = 0; head < p.heads; ++head)
            nonzero[axis].push_back(
                nonzero_channels(inputs.relative[i] + head * entries * p.head_dim, entries, p.head_dim));
        plan.nonzero[axis] = nonzero[axis].data();
    }
}

struct ForwardCall : Call {
    Plan plan = {};
    ForwardCall(const nearsight_problem& p, const nearsight_inputs& inputs, const Kernel* kernel)
        : Call(p, inputs, kernel, false) {
        describe(p, inputs, plan);
        plan.heads_together = heads_together(plan);
        const int64_t groups = (int64_t)query_lists.pass().z.group_count * query_lists.pass().y.group_count;
        const PassLists::Chunk& chunk = lines_are_shared(plan) ? kSmallChunk : kChunk;
        query_lists.deal(p.batch, p.heads, groups, groups * kGroupRows, 0, chunk);
        plan.query_pass = query_lists.pass();
        // What a problem needs was asked of one head at a time: it may take no more.
        if (kernel->forward_bytes(&plan) > (size_t)kMostScratch) plan.heads_together = 1;
    }
};

struct BackwardCall : Call {
    PassLists key_lists;
    BackwardPlan plan = {};
    BackwardCall(const nearsight_problem& p, const nearsight_inputs& inputs, const Kernel* kernel)
        : Call(p, inputs, kernel, true), key_lists(geometry, Home::keys, kernel->lanes, row) {
        describe(p, inputs, plan);
        int64_t table = plan.bias ? plan.bias_entries : 0;
        for (int axis = 0; axis < 3; ++axis)
            if (plan.relative[axis]) table += plan.entries[axis] * p.head_dim;
        PassLists::join(geometry, query_lists, key_lists);
        const int64_t rows = geometry.axes[1].cells * plan.out[0];
        query_lists.deal(p.batch, p.heads, key_lists.pass().y.group_count, rows, table, kChunk);
        plan.query_pass = query_lists.pass();
        plan.key_pass = key_lists.pass();
        plan.key_planes = geometry.axes[0].cells;
    }
};

// The packed rows of the heads that take turns: a megabyte of the second cache level.
constexpr int64_t kProjectedFloats = (int64_t)1 << 18;

struct ProjectedCall : Call {
    Plan plan = {};
    Projection projection = {};
    std::vector<float> weight;
    int64_t sets;  // of heads

    ProjectedCall(const nearsight_problem& p, const nearsight_projection& given, const nearsight_inputs& tables,
                  const Kernel* kernel)
        : Call(p, like_key(tables, given), kernel, false) {
        describe(p, tables, plan);
        projection.input = place(p, given.input);
        projection.has_bias = given.bias != nullptr;
        projection.channels = given.channels + projection.has_bias;
        deal(p);
        arrange(p, given);
        projection.weight = weight.data();
        plan.projection = &projection;
        plan.query_pass = query_lists.pass();
    }

    // Its rows are laid out as those of the input.
    static nearsight_inputs like_key(nearsight_inputs tables, const nearsight_projection& given) {
        tables.key = given.input;
        return tables;
    }

    // As large shares as there can be: sets of heads pack the input each, and chunks of a map make the rows between
    // them twice. Every number is the same however they are cut.
    void deal(const nearsight_problem& p) {
        const Pass& pass = query_lists.pass();
        const int64_t rows = (int64_t)pass.z.slots * pass.y.slots;
        const int64_t floats = rows * pass.max_away_pitch * (2 * p.head_dim + p.value_dim);
        const int64_t near = kProjectedFloats / std::max<int64_t>(1, floats);
        const int64_t together = std::max<int64_t>(1, std::min(p.heads, near));
        const int64_t maps = (p.batch + row.images - 1) / row.images * pass.tile_count;
        const int64_t parts = p.num_threads == 1 ? 1 : 4 * (int64_t)p.num_threads;
        sets = std::max((p.heads + together - 1) / together, std::min(p.heads, parts / maps));
        projection.heads = (p.heads + sets - 1) / sets;
        sets = (p.heads + projection.heads - 1) / projection.heads;
        const int64_t groups = (int64_t)pass.z.group_count * pass.y.group_count;
        query_lists.deal(p.batch, sets, groups, groups * kGroupRows, 0, {8, INT64_MAX, parts});
    }

    void arrange(const nearsight_problem& p, const nearsight_projection& given) {
        weight.resize((size_t)(p.heads * (2 * p.head_dim + p.value_dim) * projection.channels));
        float* target = weight.data();
        for (int64_t head = 0; head < p.heads; ++head) {
            int64_t first = 0;
            for (const int64_t outputs : {p.head_dim, p.head_dim, p.value_dim}) {
                for (int64_t o = 0; o < outputs; o += kProjectBlock) {
                    const int64_t some = std::min<int64_t>(kProjectBlock, outputs - o);
                    arrange_block(given, first + head * outputs + o, some, target);
                    target += some * projection.channels;
                }
                first += p.heads * outputs;
            }
        }
    }

    static void arrange_block(const nearsight_projection& given, int64_t first, int64_t count, float* target) {
        for (int64_t o = 0; o < count; ++o) {
            const float* source = given.weight + (first + o) * given.channels;
            for (int64_t c = 0; c < given.channels; ++c) target[c * count + o] = source[c];
            if (given.bias) target[given.channels * count + o] = given.bias[first + o];
        }
    }
};

int check_scratch(size_t bytes) { return bytes > (size_t)kMostScratch ? NEARSIGHT_ERROR_SCRATCH : NEARSIGHT_OK; }

// Adds up the jobs' partial sums, in the order of the jobs.
void reduce(const std::vector<float>& parts, int64_t heads, int64_t jobs, int64_t count, float* total) {
    for (int64_t head = 0; head < heads; ++head)
        for (int64_t i = 0; i < count; ++i) {
            double sum = 0;
            for (int64_t job = 0; job < jobs; ++job) sum += parts[(size_t)((head * jobs + job) * count + i)];
            total[head * count + i] = (float)sum;
        }
}

}  // namespace

int check_scratch(const nearsight_problem& p, int isa, bool backward) {
    if (!backward) {
        const ForwardCall call(p, {}, kernel_for(isa, p.dtype == NEARSIGHT_BFLOAT16));
        return check_scratch(call.kernel->forward_bytes(&call.plan));
    }
    BackwardCall call(p, {}, kernel_for(isa, p.dtype == NEARSIGHT_BFLOAT16));
    float wanted = 0;  // of these, only whether they are NULL counts
    call.plan.bias_parts = &wanted;
    for (float*& parts : call.plan.relative_parts) parts = &wanted;
    return check_scratch(call.kernel->backward_bytes(&call.plan));
}

int forward(const nearsight_problem& p, const nearsight_inputs& inputs, const nearsight_tensor& out, float* lse,
            int isa, const nearsight_executor* executor) {
    ForwardCall call(p, inputs, kernel_for(isa, p.dtype == NEARSIGHT_BFLOAT16));
    call.plan.out_tensor = place(p, out);
    call.plan.lse = lse;
    const size_t bytes = call.kernel->forward_bytes(&call.plan);
    if (int error = check_scratch(bytes)) return error;
    const int64_t together = call.plan.heads_together;
    const auto work = [&](int64_t heads, int64_t job, char* workspace) {
        call.kernel->forward(&call.plan, heads * together, job, workspace);
    };
    return run(p.heads / together, call.plan.query_pass.jobs, bytes, work, p.num_threads, executor);
}

int forward_projected(const nearsight_problem& p, const nearsight_projection& projection,
                      const nearsight_inputs& tables, const nearsight_tensor& out, float* lse, int isa) {
    ProjectedCall call(p, projection, tables, kernel_for(isa, p.dtype == NEARSIGHT_BFLOAT16));
    call.plan.out_tensor = place(p, out);
    call.plan.lse = lse;
    const size_t bytes = call.kernel->forward_bytes(&call.plan);
    if (int error = check_scratch(bytes)) return error;
    const auto work = [&](int64_t set, int64_t job, char* workspace) {
        call.kernel->forward(&call.plan, set, job, workspace);
    };
    return run(call.sets, call.plan.query_pass.jobs, bytes, work, p.num_threads);
}

int backward(const nearsight_problem& p, const nearsight_inputs& inputs, const nearsight_tensor& out, const float* lse,
             const nearsight_tensor& grad_out, const nearsight_gradients& gradients, int isa) {
    BackwardCall call(p, inputs, kernel_for(isa, p.dtype == NEARSIGHT_BFLOAT16));
    BackwardPlan& plan = call.plan;
    plan.out_tensor = place(p, out);
    plan.grad_out = place(p, grad_out);
    plan.lse = const_cast<float*>(lse);
    plan.want_query = gradients.query != nullptr;
    plan.want_key = gradients.key != nullptr;
    plan.want_value = gradients.value != nullptr;
    if (gradients.query) plan.grad_query = place(p, *gradients.query);
    if (gradients.key) plan.grad_key = place(p, *gradients.key);
    if (gradients.value) plan.grad_value = place(p, *gradients.value);

    const int64_t parts = p.heads * plan.query_pass.jobs;
    std::vector<float> bias_parts, relative_parts[3];
    if (gradients.bias) {
        bias_parts.resize((size_t)(parts * plan.bias_entries));
        plan.bias_parts = bias_parts.data();
    }
    for (int i = 0; i < p.rank; ++i) {
        const int axis = 3 - p.rank + i;
        if (!gradients.relative[i]) continue;
        relative_parts[axis].resize((size_t)(parts * plan.entries[axis] * p.head_dim));
        plan.relative_parts[axis] = relative_parts[axis].data();
    }

    const size_t bytes = call.kernel->backward_bytes(&plan);
    if (int error = check_scratch(bytes)) return error;
    const auto work = [&](int64_t head, int64_t job, char* workspace) {
        call.kernel->backward(&plan, head, job, workspace);
    };
    if (int error = run(p.heads, plan.query_pass.jobs, bytes, work, p.num_threads)) return error;
    if (gradients.bias) reduce(bias_parts, p.heads, plan.query_pass.jobs, plan.bias_entries, gradients.bias);
    for (int i = 0; i < p.rank; ++i) {
        const int axis = 3 - p.rank + i;
        if (gradients.relative[i])
            reduce(relative_parts[axis], p.heads, plan.query_pass.jobs, plan.entries[axis] * p.head_dim,
                   gradients.relative[i]);
    }
    return NEARSIGHT_OK;
}

int zero_tables(const nearsight_problem& p, const nearsight_gradients& gradients) {
    const Geometry geometry(p);
    int64_t entries = p.heads;
    for (const Axis& axis : geometry.axes) entries *= axis.entries();
    if (gradients.bias) memset(gradients.bias, 0, (size_t)entries * sizeof(float));
    for (int i = 0; i < p.rank; ++i)
        if (gradients.relative[i])
            memset(gradients.relative[i], 0,
                   (size_t)(p.heads * geometry.axes[3 - p.rank + i].entries() * p.head_dim) * sizeof(float));
    return NEARSIGHT_OK;
}

}  // namespace nearsight
