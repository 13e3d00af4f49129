// SPDX-License-Identifier: Apache-2.0
//
// The C ABI: checks everything, picks the instruction set, plans, and hands jobs to threads. Compiled without
// instruction set flags, so that it runs on any processor.

#include <float.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "geometry.h"
#include "nearsight.h"
#include "plan.h"

namespace nearsight {

extern const Kernel kernel_baseline;
#if defined(NEARSIGHT_WITH_AVX2)
extern const Kernel kernel_avx2;
#endif
#if defined(NEARSIGHT_WITH_AVX512)
extern const Kernel kernel_avx512;
#endif

namespace {

// ---- Instruction sets -----------------------------------------------------------------------------------------------

#if defined(__aarch64__)
constexpr int kBaselineIsa = NEARSIGHT_ISA_NEON;  // arm64 has no lesser one
#else
constexpr int kBaselineIsa = NEARSIGHT_ISA_BASELINE;
#endif

const Kernel* kernel_of(int isa) {
    if (isa == kBaselineIsa) return &kernel_baseline;
#if defined(NEARSIGHT_WITH_AVX2)
    if (isa == NEARSIGHT_ISA_AVX2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return &kernel_avx2;
#endif
#if defined(NEARSIGHT_WITH_AVX512)
    if (isa == NEARSIGHT_ISA_AVX512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return &kernel_avx512;
#endif
    return nullptr;
}

const char* const kIsaNames[] = {"auto", "baseline", "avx2", "avx512", "neon"};
constexpr int kIsaCount = sizeof(kIsaNames) / sizeof(kIsaNames[0]);

int widest_isa() {
    for (int isa : {NEARSIGHT_ISA_AVX512, NEARSIGHT_ISA_AVX2})
        if (kernel_of(isa)) return isa;
    return kBaselineIsa;
}

// An instruction set, or a negated error.
int resolve_isa(int isa) {
    if (isa < 0 || isa >= kIsaCount) return -NEARSIGHT_ERROR_ENUM;
    if (isa == NEARSIGHT_ISA_AUTO) {
        if (const char* wanted = getenv("NEARSIGHT_ISA")) {
            while (isa < kIsaCount && strcmp(wanted, kIsaNames[isa]) != 0) ++isa;
            if (isa == kIsaCount) return -NEARSIGHT_ERROR_ENVIRONMENT;
        }
    }
    if (isa == NEARSIGHT_ISA_AUTO) return widest_isa();
    return kernel_of(isa) ? isa : -NEARSIGHT_ERROR_ISA;
}

// ---- Checks ---------------------------------------------------------------------------------------------------------

constexpr int64_t kLargest = (int64_t)1 << 31;       // any size
constexpr int64_t kMostBytes = (int64_t)1 << 62;     // any tensor
constexpr int64_t kMostScratch = (int64_t)1 << 31;   // bytes of one thread
constexpr int64_t kMostEntries = (int64_t)1 << 24;   // table entries, and channels x entries of an axis

// a * b, or false when it is larger than `most`.
bool multiply(int64_t a, int64_t b, int64_t most, int64_t* product) {
    return !__builtin_mul_overflow(a, b, product) && *product <= most;
}

struct Shape {
    int64_t sizes[6];  // batch, head, axes, channel
    int dimensions;
    bool empty() const {
        for (int i = 0; i < dimensions; ++i)
            if (sizes[i] == 0) return true;
        return false;
    }
};

Shape shape_of(const nearsight_problem& p, bool output, int64_t channels) {
    Shape shape = {{p.batch, p.heads}, p.rank + 3};
    for (int i = 0; i < p.rank; ++i)
        shape.sizes[2 + i] = output && p.size[i] > 0 ? (p.size[i] - 1) / p.stride[i] + 1 : p.size[i];
    shape.sizes[p.rank + 2] = channels;
    return shape;
}

bool has_work(const nearsight_problem& p) { return !shape_of(p, false, p.head_dim).empty(); }

int check_axis(const nearsight_problem& p, int axis) {
    if (p.border[axis] < NEARSIGHT_BORDER_MASK || p.border[axis] > NEARSIGHT_BORDER_WRAP) return NEARSIGHT_ERROR_ENUM;
    if (p.causal[axis] != 0 && p.causal[axis] != 1) return NEARSIGHT_ERROR_ENUM;
    if (p.size[axis] < 0 || p.kernel[axis] < 1 || p.stride[axis] < 1 || p.dilation[axis] < 1)
        return NEARSIGHT_ERROR_SIZE;
    if (p.shared_by[axis] < 1 || p.shared_by[axis] > p.kernel[axis]) return NEARSIGHT_ERROR_SIZE;
    for (int64_t size : {p.size[axis], p.kernel[axis], p.stride[axis], p.dilation[axis]})
        if (size >= kLargest) return NEARSIGHT_ERROR_OVERFLOW;
    return NEARSIGHT_OK;
}

int32_t element_size(int32_t dtype) { return dtype == NEARSIGHT_BFLOAT16 ? 2 : 4; }

int check_problem(const nearsight_problem* p) {
    if (!p) return NEARSIGHT_ERROR_NULL;
    if (p->struct_size != sizeof(nearsight_problem) || p->abi_version != NEARSIGHT_ABI_VERSION)
        return NEARSIGHT_ERROR_VERSION;
    if (p->rank < 1 || p->rank > 3) return NEARSIGHT_ERROR_ENUM;
    if (p->dtype != NEARSIGHT_FLOAT32 && p->dtype != NEARSIGHT_BFLOAT16) return NEARSIGHT_ERROR_ENUM;
    if (p->element_size != element_size(p->dtype) || p->scalar_size != (int32_t)sizeof(float))
        return NEARSIGHT_ERROR_ELEMENT;
    if (p->num_threads < 1) return NEARSIGHT_ERROR_SIZE;
    if (p->batch < 0 || p->heads < 0 || p->head_dim < 1 || p->value_dim < 1) return NEARSIGHT_ERROR_SIZE;
    int64_t cells = 1, channels = std::max(p->head_dim, p->value_dim);
    for (int64_t size : {p->batch, p->heads, channels})
        if (size >= kLargest) return NEARSIGHT_ERROR_OVERFLOW;
    for (int axis = 0; axis < p->rank; ++axis)
        if (int error = check_axis(*p, axis)) return error;

    // An empty map would hide an overflow of the other sizes, so its sizes count as one.
    for (int64_t size : {p->batch, p->heads, channels})
        if (!multiply(cells, std::max<int64_t>(size, 1), kMostBytes / 8, &cells)) return NEARSIGHT_ERROR_OVERFLOW;
    for (int axis = 0; axis < p->rank; ++axis)
        if (!multiply(cells, std::max<int64_t>(p->size[axis], 1), kMostBytes / 8, &cells))
            return NEARSIGHT_ERROR_OVERFLOW;

    const Geometry geometry(*p);
    int64_t entries = 1, unused;
    for (const Axis& axis : geometry.axes) {
        if (!multiply(entries, axis.entries(), kMostEntries, &entries)) return NEARSIGHT_ERROR_UNSUPPORTED;
        if (!multiply(axis.entries(), channels, kMostEntries, &unused)) return NEARSIGHT_ERROR_UNSUPPORTED;
    }
    if (!multiply(entries, std::max<int64_t>(p->heads, 1), kMostBytes / 8, &unused)) return NEARSIGHT_ERROR_OVERFLOW;
    if (has_work(*p) && !can_be_listed(geometry)) return NEARSIGHT_ERROR_UNSUPPORTED;
    return NEARSIGHT_OK;
}

int check_tensor(const nearsight_tensor* tensor, const Shape& shape, bool written) {
    if (!tensor) return NEARSIGHT_ERROR_NULL;
    const bool empty = shape.empty();
    if (!tensor->data && !empty) return NEARSIGHT_ERROR_NULL;
    int64_t last = 0;
    for (int i = 0; i < shape.dimensions; ++i) {
        int64_t reach;
        if (tensor->strides[i] < 0) return NEARSIGHT_ERROR_STRIDE;
        if (empty || shape.sizes[i] == 1) continue;
        if (written && tensor->strides[i] == 0) return NEARSIGHT_ERROR_STRIDE;
        if (!multiply(shape.sizes[i] - 1, tensor->strides[i], kMostBytes / 8, &reach)) return NEARSIGHT_ERROR_OVERFLOW;
        last += reach;  // at most 6 / 8 of kMostBytes
        if (last > kMostBytes / 8) return NEARSIGHT_ERROR_OVERFLOW;
    }
    return NEARSIGHT_OK;
}

int check_inputs(const nearsight_problem& p, const nearsight_inputs* inputs) {
    if (!inputs) return NEARSIGHT_ERROR_NULL;
    if (int error = check_tensor(&inputs->query, shape_of(p, true, p.head_dim), false)) return error;
    if (int error = check_tensor(&inputs->key, shape_of(p, false, p.head_dim), false)) return error;
    return check_tensor(&inputs->value, shape_of(p, false, p.value_dim), false);
}

// ---- Threads --------------------------------------------------------------------------------------------------------

// The OpenMP runtime's threads do not survive a fork, and waiting for them would hang.
std::atomic<bool> in_child_of_fork{false};
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { in_child_of_fork = true; });

constexpr size_t kKeptScratch = (size_t)32 << 20;  // bytes

// A thread keeps its scratch memory from call to call: fresh pages cost more than the work of a small map. What is too
// large for that goes back to the system after the call; to fill it takes longer than to get it.
class Scratch {
  public:
    ~Scratch() { free(data_); }
    void give_back() {
        if (size_ <= kKeptScratch) return;
        free(data_);
        data_ = nullptr;
        size_ = 0;
    }
    char* reserve(size_t bytes) {
        if (bytes > size_) {
            free(data_);
            size_ = 0;
            data_ = nullptr;
            void* fresh = nullptr;
            if (posix_memalign(&fresh, 64, bytes) != 0) return nullptr;
            data_ = (char*)fresh;
            size_ = bytes;
            memset(data_, 0, sizeof(Leftover));
        }
        return data_;
    }

  private:
    char* data_ = nullptr;
    size_t size_ = 0;
};

thread_local Scratch scratch;

typedef void (*Work)(const Plan*, int64_t head, int64_t job, char* workspace);

// Heads that a thread takes at a time: as many as leave work enough to share out evenly. In heads-last memory
// neighbouring heads lie in the same lines, and threads that write to one line at once wait for each other.
[[maybe_unused]] int heads_at_a_time(const Plan& plan, int num_threads) {
    int64_t heads = plan.heads;
    while (heads > 1 && plan.heads * plan.query_pass.jobs / heads < 8 * (int64_t)num_threads) heads = (heads + 1) / 2;
    return (int)heads;
}

int run(const Plan& plan, size_t bytes, Work work, int num_threads) {
    const int64_t count = plan.heads * plan.query_pass.jobs;
    std::atomic<bool> failed{false};
    // Heads innermost: neighbouring heads share cache lines of heads-last memory.
    const auto one = [&](int64_t i) {
        char* workspace = scratch.reserve(bytes);
        if (workspace)
            work(&plan, i % plan.heads, i / plan.heads, workspace);
        else
            failed = true;
    };
#if defined(_OPENMP)
    if (num_threads > 1 && count > 1 && !in_child_of_fork) {
        const int heads = heads_at_a_time(plan, num_threads);
#pragma omp parallel num_threads(num_threads)
        {
#pragma omp for schedule(dynamic, heads)
            for (int64_t i = 0; i < count; ++i) one(i);
            scratch.give_back();
        }
        return failed ? NEARSIGHT_ERROR_MEMORY : NEARSIGHT_OK;
    }
#endif
    (void)num_threads;
    for (int64_t i = 0; i < count; ++i) one(i);
    scratch.give_back();
    return failed ? NEARSIGHT_ERROR_MEMORY : NEARSIGHT_OK;
}

// ---- Calls ----------------------------------------------------------------------------------------------------------

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

std::atomic<int64_t> calls{0};

// Owns what a Plan points at.
struct Call {
    const Kernel* kernel;
    Geometry geometry;
    Plan plan = {};
    std::unique_ptr<PassLists> query_lists, key_lists;
    std::vector<float> bias;
    std::vector<ChannelRange> nonzero[3];

    Call(const nearsight_problem& p, const nearsight_inputs& inputs, const Kernel* kernel, bool backward);
};

Call::Call(const nearsight_problem& p, const nearsight_inputs& inputs, const Kernel* kernel, bool backward)
    : kernel(kernel), geometry(p) {
    const int lanes = kernel->lanes;
    plan.call = ++calls;
    plan.bfloat16 = p.dtype == NEARSIGHT_BFLOAT16;
    plan.batch = p.batch;
    plan.heads = p.heads;
    plan.head_dim = p.head_dim;
    plan.value_dim = p.value_dim;
    const bool planar = inputs.key.strides[p.rank + 2] != 1;
    const Row row = choose_row(geometry, p, planar, lanes, backward);
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

    plan.key_planes = geometry.axes[0].cells;
    query_lists = std::make_unique<PassLists>(geometry, Home::queries, lanes, row, backward);
    const RowAxis &z = query_lists->pass().z, &y = query_lists->pass().y;
    int64_t table = inputs.bias ? plan.bias_entries : 0;
    for (int i = 0; i < p.rank; ++i)
        if (inputs.relative[i]) table += plan.entries[3 - p.rank + i] * p.head_dim;
    if (backward) {
        key_lists = std::make_unique<PassLists>(geometry, Home::keys, lanes, row);
        PassLists::join(geometry, *query_lists, *key_lists);
        plan.key_pass = key_lists->pass();
        query_lists->deal(p.batch, p.heads, plan.key_pass.y.group_count, geometry.axes[1].cells * plan.out[0], table);
    } else {
        const int64_t groups = (int64_t)z.group_count * y.group_count;
        query_lists->deal(p.batch, p.heads, groups, groups * kGroupRows, 0);
    }
    plan.query_pass = query_lists->pass();

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

int check_scratch(size_t bytes) { return bytes > (size_t)kMostScratch ? NEARSIGHT_ERROR_SCRATCH : NEARSIGHT_OK; }

// Plans a forward, or a backward that everything is wanted of, to see what scratch memory it would take.
int check_scratch(const nearsight_problem& p, int isa, bool backward) {
    Call call(p, {}, kernel_of(isa), backward);
    if (!backward) return check_scratch(call.kernel->forward_bytes(&call.plan));
    float wanted = 0;  // of these, only whether they are NULL counts
    call.plan.bias_parts = &wanted;
    for (float*& parts : call.plan.relative_parts) parts = &wanted;
    return check_scratch(call.kernel->backward_bytes(&call.plan));
}

int forward(const nearsight_problem& p, const nearsight_inputs& inputs, const nearsight_tensor& out, float* lse,
            int isa) {
    Call call(p, inputs, kernel_of(isa), false);
    call.plan.out_tensor = place(p, out);
    call.plan.lse = lse;
    const size_t bytes = call.kernel->forward_bytes(&call.plan);
    if (int error = check_scratch(bytes)) return error;
    return run(call.plan, bytes, call.kernel->forward, p.num_threads);
}

// Adds up the jobs' partial sums, in the order of the jobs.
void reduce(const std::vector<float>& parts, int64_t heads, int64_t jobs, int64_t count, float* total) {
    for (int64_t head = 0; head < heads; ++head)
        for (int64_t i = 0; i < count; ++i) {
            double sum = 0;
            for (int64_t job = 0; job < jobs; ++job) sum += parts[(size_t)((head * jobs + job) * count + i)];
            total[head * count + i] = (float)sum;
        }
}

int backward(const nearsight_problem& p, const nearsight_inputs& inputs, const nearsight_tensor& out, const float* lse,
             const nearsight_tensor& grad_out, const nearsight_gradients& gradients, int isa) {
    Call call(p, inputs, kernel_of(isa), true);
    Plan& plan = call.plan;
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
    if (int error = run(plan, bytes, call.kernel->backward, p.num_threads)) return error;
    if (gradients.bias) reduce(bias_parts, p.heads, plan.query_pass.jobs, plan.bias_entries, gradients.bias);
    for (int i = 0; i < p.rank; ++i) {
        const int axis = 3 - p.rank + i;
        if (gradients.relative[i])
            reduce(relative_parts[axis], p.heads, plan.query_pass.jobs, plan.entries[axis] * p.head_dim,
                   gradients.relative[i]);
    }
    return NEARSIGHT_OK;
}

// A backward over no cells: the tables still have gradients, of zero.
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

int check_forward(const nearsight_problem* p, const nearsight_inputs* inputs, const nearsight_tensor* out) {
    if (int error = check_problem(p)) return error;
    if (int error = check_inputs(*p, inputs)) return error;
    return check_tensor(out, shape_of(*p, true, p->value_dim), true);
}

int check_backward(const nearsight_problem* p, const nearsight_inputs* inputs, const nearsight_tensor* out,
                   const float* lse, const nearsight_tensor* grad_out, const nearsight_gradients* gradients) {
    if (int error = check_problem(p)) return error;
    if (int error = check_inputs(*p, inputs)) return error;
    const Shape like_query = shape_of(*p, true, p->head_dim), like_out = shape_of(*p, true, p->value_dim);
    if (int error = check_tensor(out, like_out, false)) return error;
    if (int error = check_tensor(grad_out, like_out, false)) return error;
    if (!gradients || (!lse && has_work(*p))) return NEARSIGHT_ERROR_NULL;
    if (gradients->query)
        if (int error = check_tensor(gradients->query, like_query, true)) return error;
    if (gradients->key)
        if (int error = check_tensor(gradients->key, shape_of(*p, false, p->head_dim), true)) return error;
    if (gradients->value)
        if (int error = check_tensor(gradients->value, shape_of(*p, false, p->value_dim), true)) return error;
    for (int i = 0; i < p->rank; ++i)
        if (gradients->relative[i] && !inputs->relative[i]) return NEARSIGHT_ERROR_NULL;
    return NEARSIGHT_OK;
}

}  // namespace
}  // namespace nearsight

using namespace nearsight;

int nearsight_check(const nearsight_problem* problem, int32_t backward) try {
    if (int error = check_problem(problem)) return error;
    const int isa = resolve_isa(problem->isa);
    if (isa < 0) return -isa;
    if (!has_work(*problem)) return NEARSIGHT_OK;
    if (int error = check_scratch(*problem, isa, false)) return error;
    return backward ? check_scratch(*problem, isa, true) : NEARSIGHT_OK;
} catch (const std::bad_alloc&) {
    return NEARSIGHT_ERROR_MEMORY;
}

int nearsight_forward(const nearsight_problem* problem, const nearsight_inputs* inputs, const nearsight_tensor* out,
                      float* lse) try {
    if (int error = check_forward(problem, inputs, out)) return error;
    const int isa = resolve_isa(problem->isa);
    if (isa < 0) return -isa;
    if (!has_work(*problem)) return NEARSIGHT_OK;
    return forward(*problem, *inputs, *out, lse, isa);
} catch (const std::bad_alloc&) {
    return NEARSIGHT_ERROR_MEMORY;
}

int nearsight_backward(const nearsight_problem* problem, const nearsight_inputs* inputs, const nearsight_tensor* out,
                       const float* lse, const nearsight_tensor* grad_out, const nearsight_gradients* gradients) try {
    if (int error = check_backward(problem, inputs, out, lse, grad_out, gradients)) return error;
    const int isa = resolve_isa(problem->isa);
    if (isa < 0) return -isa;
    if (!has_work(*problem)) return zero_tables(*problem, *gradients);
    return backward(*problem, *inputs, *out, lse, *grad_out, *gradients, isa);
} catch (const std::bad_alloc&) {
    return NEARSIGHT_ERROR_MEMORY;
}

int nearsight_abi_version(void) { return NEARSIGHT_ABI_VERSION; }

const char* nearsight_error_string(int error) {
    switch (error) {
        case NEARSIGHT_OK: return "no error";
        case NEARSIGHT_ERROR_VERSION: return "the caller was written for another version of the library's interface";
        case NEARSIGHT_ERROR_NULL: return "a required pointer is NULL";
        case NEARSIGHT_ERROR_ENUM: return "unknown rank, dtype, border, causal flag or instruction set";
        case NEARSIGHT_ERROR_SIZE: return "a size is out of range";
        case NEARSIGHT_ERROR_STRIDE: return "a stride is negative, or zero in a tensor to be written";
        case NEARSIGHT_ERROR_OVERFLOW: return "sizes or strides are too large to address";
        case NEARSIGHT_ERROR_UNSUPPORTED: return "the block of cells is too large for the native kernel";
        case NEARSIGHT_ERROR_ISA: return "this build or processor lacks the instruction set";
        case NEARSIGHT_ERROR_ENVIRONMENT: return "NEARSIGHT_ISA must be auto, baseline, avx2, avx512 or neon";
        case NEARSIGHT_ERROR_MEMORY: return "out of memory";
        case NEARSIGHT_ERROR_SCRATCH: return "the native kernel's scratch memory would exceed 2 GiB per thread";
        case NEARSIGHT_ERROR_ELEMENT: return "an element's size is not that of the dtype";
        default: return "unknown error";
    }
}

int nearsight_available_isas(void) {
    int isas = 0;
    for (int isa = NEARSIGHT_ISA_AUTO + 1; isa < kIsaCount; ++isa)
        if (kernel_of(isa)) isas |= 1 << isa;
    return isas;
}

int nearsight_default_isa(void) { return resolve_isa(NEARSIGHT_ISA_AUTO); }

const char* nearsight_isa_name(int isa) { return isa >= 0 && isa < kIsaCount ? kIsaNames[isa] : nullptr; }

int nearsight_has_openmp(void) {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}
