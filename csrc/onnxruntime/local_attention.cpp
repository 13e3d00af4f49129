// SPDX-License-Identifier: Apache-2.0
//
// nearsight::LocalAttention, version 1: onnxruntime runs it as docs/howto/deploy.md specifies. A session option
// registers this library; it needs nothing of PyTorch, and works on the session's own threads.

#include <math.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "../nearsight.h"
#include "abi.h"

namespace {

using namespace onnxruntime;

const Api* api = nullptr;  // set before any kernel is made, to what it was, if it was

constexpr size_t kQuery = 0, kKey = 1, kValue = 2, kBias = 3, kRelative = 4, kInputs = 7;
constexpr int kAxes = 3;
// Below so many multiply-adds, waking threads takes as long as the work.
constexpr double kWorthThreads = 200000;
constexpr int kThreads = 8;  // about: the interface does not say, and onnxruntime deals out what it gets

// What went wrong, and nothing when empty.
struct Refusal {
    std::string text;
    ErrorCode code = kInvalidArgument;
};

// An error that onnxruntime reported itself goes back to it as it is.
struct Reported {
    Status* status;
};

void check(Status* status) {
    if (status) throw Reported{status};
}

[[noreturn]] void refuse(const std::string& text, ErrorCode code = kInvalidArgument) { throw Refusal{text, code}; }

// Runs it, and makes a status of what it throws: no exception may reach onnxruntime.
template <class Work>
Status* guarded(Work work) {
    try {
        work();
        return nullptr;
    } catch (const Reported& error) {
        return error.status;
    } catch (const Refusal& error) {
        return create_status(api, error.code, ("nearsight::LocalAttention: " + error.text).c_str());
    } catch (const std::bad_alloc&) {
        return create_status(api, kFail, "nearsight::LocalAttention: out of memory");
    }
}

// ---- Attributes -----------------------------------------------------------------------------------------------------

struct Attributes {
    int32_t dtype;
    int64_t heads, kv_heads, rank;
    int64_t kernel[kAxes], stride[kAxes], dilation[kAxes], causal[kAxes], shared_by[kAxes];
    int32_t border[kAxes];
    float scale;
};

// onnxruntime does not say which attribute it misses.
void check_read(Status* status, const char* name) {
    if (!status) return;
    release_status(api, status);
    refuse(std::string("the attribute ") + name + " is missing, or of another type", kInvalidGraph);
}

int64_t read_int(const KernelInfo* info, const char* name, int64_t least, int64_t most) {
    int64_t value = 0;
    check_read(attribute_int(api, info, name, &value), name);
    if (value < least || value > most)
        refuse(std::string(name) + " must be " + std::to_string(least) + " to " + std::to_string(most) +
                   "; it is " + std::to_string(value),
               kInvalidGraph);
    return value;
}

void read_ints(const KernelInfo* info, const char* name, int64_t rank, int64_t* values) {
    size_t count = 0;
    check_read(attribute_ints(api, info, name, (int64_t*)nullptr, &count), name);
    if (count != (size_t)rank)
        refuse(std::string(name) + " must have one number for each of " + std::to_string(rank) + " axes; it has " +
                   std::to_string(count),
               kInvalidGraph);
    check(attribute_ints(api, info, name, values, &count));
}

std::string read_string(const KernelInfo* info, const char* name) {
    size_t size = 0;
    check_read(attribute_string(api, info, name, (char*)nullptr, &size), name);
    std::string text(size, '\0');
    check(attribute_string(api, info, name, &text[0], &size));
    text.resize(strlen(text.c_str()));
    return text;
}

// The rules of every axis, parted by a space.
void read_borders(const KernelInfo* info, int64_t rank, int32_t* borders) {
    static const char* const kNames[] = {"mask", "zeros", "shift", "wrap"};  // as numbered in nearsight.h
    const std::string text = read_string(info, "border");
    size_t from = 0;
    int64_t axis = 0;
    for (; axis < rank && from <= text.size(); ++axis) {
        const size_t end = std::min(text.find(' ', from), text.size());
        const auto found = std::find(std::begin(kNames), std::end(kNames), text.substr(from, end - from));
        if (found == std::end(kNames)) break;
        borders[axis] = (int32_t)(found - kNames);
        from = end + 1;
    }
    if (axis != rank || from != text.size() + 1)
        refuse("border must name mask, zeros, shift or wrap for each of " + std::to_string(rank) +
                   " axes, parted by a space; it is '" + text + "'",
               kInvalidGraph);
}

Attributes read_attributes(const KernelInfo* info, int32_t dtype) {
    Attributes a = {};
    a.dtype = dtype;
    a.rank = read_int(info, "rank", 1, kAxes);
    a.heads = read_int(info, "num_heads", 1, INT32_MAX);
    a.kv_heads = read_int(info, "num_kv_heads", 1, a.heads);
    if (a.heads % a.kv_heads)
        refuse("num_kv_heads must divide num_heads; " + std::to_string(a.kv_heads) + " does not divide " +
                   std::to_string(a.heads),
               kInvalidGraph);
    read_ints(info, "kernel_size", a.rank, a.kernel);
    read_ints(info, "stride", a.rank, a.stride);
    read_ints(info, "dilation", a.rank, a.dilation);
    read_ints(info, "causal", a.rank, a.causal);
    read_ints(info, "shared_by", a.rank, a.shared_by);
    read_borders(info, a.rank, a.border);
    check_read(attribute_float(api, info, "scale", &a.scale), "scale");
    if (!isfinite(a.scale)) refuse("scale must be finite", kInvalidGraph);
    return a;
}

// ---- Tensors --------------------------------------------------------------------------------------------------------

struct Tensor {
    void* data = nullptr;  // NULL of an input that is not there
    std::vector<int64_t> shape;
};

std::string written(const std::vector<int64_t>& shape) {
    std::string text = "(";
    for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + ")";
}

Tensor read_tensor(KernelContext* context, size_t index, size_t inputs, ElementType dtype) {
    Tensor tensor;
    const Value* value = nullptr;
    if (index >= inputs) return tensor;
    check(input(api, context, index, &value));
    if (!value) return tensor;
    TensorInfo* info = nullptr;
    check(tensor_info(api, value, &info));
    const std::unique_ptr<TensorInfo, void (*)(TensorInfo*)> owner(
        info, [](TensorInfo* one) { release_tensor_info(api, one); });
    ElementType found = kUndefined;
    check(element_type(api, (const TensorInfo*)info, &found));
    if (found != dtype)
        refuse("input " + std::to_string(index) + " has elements of another type than it must");
    size_t rank = 0;
    check(rank_of(api, (const TensorInfo*)info, &rank));
    tensor.shape.resize(rank);
    check(dimensions(api, (const TensorInfo*)info, tensor.shape.data(), rank));
    check(tensor_data(api, (Value*)value, &tensor.data));
    return tensor;
}

// (batch, heads * channels, *axes), planar: the strides of (batch, heads, *axes, channels).
nearsight_tensor planar(const Tensor& tensor, int64_t heads) {
    const size_t rank = tensor.shape.size() - 2;
    nearsight_tensor t = {tensor.data, {}};
    int64_t cells = 1;
    for (size_t i = rank; i-- > 0; cells *= tensor.shape[i + 2]) t.strides[i + 2] = cells;
    t.strides[rank + 2] = cells;
    t.strides[1] = tensor.shape[1] / heads * cells;
    t.strides[0] = tensor.shape[1] * cells;
    return t;
}

void check_map(const char* name, const Tensor& tensor, int64_t rank, int64_t heads, const char* heads_name) {
    if (!tensor.data && tensor.shape.empty()) refuse(std::string(name) + " is missing");
    if ((int64_t)tensor.shape.size() != rank + 2)
        refuse(std::string(name) + " must have batch, channels and " + std::to_string(rank) + " axes; it is " +
               written(tensor.shape));
    if (tensor.shape[1] % heads || tensor.shape[1] == 0)
        refuse(std::string(heads_name) + " must divide the channels of " + name + "; it is " + written(tensor.shape));
}

// ---- A call ---------------------------------------------------------------------------------------------------------

struct Call {
    Attributes a;
    Tensor query, key, value, bias, relative[kAxes];

    int64_t entries(int axis) const {
        const bool by_offset = a.border[axis] == NEARSIGHT_BORDER_SHIFT || a.shared_by[axis] > 1;
        return by_offset ? 2 * a.kernel[axis] - 1 : a.kernel[axis];
    }
    // Calls of the kernel: one where every head has a key of its own, else one for each key.
    int64_t groups() const { return a.kv_heads == a.heads ? 1 : a.kv_heads; }
    int64_t queries(int axis) const { return (key.shape[axis + 2] + a.stride[axis] - 1) / a.stride[axis]; }

    void check_shapes() const;
    nearsight_problem problem() const;
    double work() const;
};

void Call::check_shapes() const {
    check_map("query", query, a.rank, a.heads, "num_heads");
    check_map("key", key, a.rank, a.kv_heads, "num_kv_heads");
    check_map("value", value, a.rank, a.kv_heads, "num_kv_heads");
    std::vector<int64_t> expected = key.shape;
    expected[1] = value.shape[1];
    if (value.shape != expected)
        refuse("value must have the batch and axes of key; they are " + written(value.shape) + " and " +
               written(key.shape));
    expected[1] = key.shape[1] / a.kv_heads * a.heads;
    for (int i = 0; i < a.rank; ++i) {
        if (a.stride[i] < 1 || a.kernel[i] < 1 || a.kernel[i] > INT32_MAX)
            refuse("kernel_size and stride must be at least 1");
        expected[(size_t)i + 2] = queries(i);
    }
    if (query.shape != expected)
        refuse("query must be " + written(expected) + " for this key; it is " + written(query.shape));
    std::vector<int64_t> table = {a.heads};
    for (int i = 0; i < a.rank; ++i) table.push_back(entries(i));
    if (bias.data && bias.shape != table) refuse("bias must be " + written(table) + "; it is " + written(bias.shape));
    for (int i = 0; i < kAxes; ++i) {
        if (!!relative[i].data != (i < a.rank && relative[0].data))
            refuse("relative must be given for every axis or for none");
        if (!relative[i].data) continue;
        const std::vector<int64_t> vectors = {a.heads, entries(i), query.shape[1] / a.heads};
        if (relative[i].shape != vectors)
            refuse("relative of axis " + std::to_string(i) + " must be " + written(vectors) + "; it is " +
                   written(relative[i].shape));
    }
}

nearsight_problem Call::problem() const {
    nearsight_problem p = {};
    p.struct_size = sizeof p;
    p.abi_version = NEARSIGHT_ABI_VERSION;
    p.rank = (int32_t)a.rank;
    p.dtype = a.dtype;
    p.element_size = a.dtype == NEARSIGHT_BFLOAT16 ? 2 : 4;
    p.scalar_size = 4;
    p.batch = key.shape[0];
    p.heads = a.heads / groups();
    p.head_dim = query.shape[1] / a.heads;
    p.value_dim = value.shape[1] / a.kv_heads;
    // Attributes are float32: the usual scale, rounded, stands for what it was.
    const double usual = 1 / sqrt((double)p.head_dim);
    p.scale = (float)usual == a.scale ? usual : a.scale;
    for (int i = 0; i < a.rank; ++i) {
        p.border[i] = a.border[i];
        p.causal[i] = (int32_t)a.causal[i];
        p.size[i] = key.shape[(size_t)i + 2];
        p.kernel[i] = a.kernel[i];
        p.stride[i] = a.stride[i];
        p.dilation[i] = a.dilation[i];
        p.shared_by[i] = a.shared_by[i];
    }
    p.num_threads = work() < kWorthThreads ? 1 : kThreads;
    return p;
}

double Call::work() const {
    double products = (double)query.shape[0] * (double)(query.shape[1] + value.shape[1] / a.kv_heads * a.heads);
    for (int i = 0; i < a.rank; ++i)
        products *= (double)queries(i) * (double)std::min(a.kernel[i], key.shape[(size_t)i + 2]);
    return products;
}

void* past(void* data, int64_t elements, int64_t size) { return (char*)data + elements * size; }

// On the threads of the session.
void on_session(void* context, void (*job)(void*, int64_t), void* data, int64_t count) {
    struct Jobs {
        void (*job)(void*, int64_t);
        void* data;
    } jobs = {job, data};
    const auto one = [](void* all, size_t i) { ((Jobs*)all)->job(((Jobs*)all)->data, (int64_t)i); };
    Status* status = parallel_for(api, (const KernelContext*)context, +one, (size_t)count, (size_t)0, &jobs);
    if (!status) return;
    release_status(api, status);
    for (int64_t i = 0; i < count; ++i) job(data, i);
}

// Heads that share a key go in one call, with a key that is the same for all of them.
void run(const Call& call, const Tensor& out, KernelContext* context) {
    const Attributes& a = call.a;
    const nearsight_problem p = call.problem();
    const nearsight_executor executor = {on_session, context};
    nearsight_tensor query = planar(call.query, a.heads), key = planar(call.key, a.kv_heads);
    nearsight_tensor value = planar(call.value, a.kv_heads), result = planar(out, a.heads);
    const int64_t of_key = key.strides[1], of_value = value.strides[1];
    if (a.kv_heads != a.heads) key.strides[1] = value.strides[1] = 0;
    int64_t table = 1;
    for (int i = 0; i < a.rank; ++i) table *= call.entries(i);
    for (int64_t group = 0; group < call.groups(); ++group) {
        nearsight_inputs inputs = {query, key, value, nullptr, {}};
        nearsight_tensor target = result;
        const int64_t head = group * p.heads;
        inputs.query.data = past(query.data, head * query.strides[1], p.element_size);
        inputs.key.data = past(key.data, group * of_key, p.element_size);
        inputs.value.data = past(value.data, group * of_value, p.element_size);
        target.data = past(result.data, head * result.strides[1], p.element_size);
        if (call.bias.data) inputs.bias = (const float*)call.bias.data + head * table;
        for (int i = 0; i < a.rank; ++i)
            if (call.relative[i].data)
                inputs.relative[i] = (const float*)call.relative[i].data + head * call.entries(i) * p.head_dim;
        const int error = nearsight_forward_on(&executor, &p, &inputs, &target, nullptr);
        if (error) refuse(nearsight_error_string(error), kFail);
    }
}

// ---- The operator, once for each type -------------------------------------------------------------------------------

ElementType type_of(int32_t dtype) { return dtype == NEARSIGHT_BFLOAT16 ? kBfloat16 : kFloat; }

template <int32_t kDtype>
Status* create(const Operator*, const Api*, const KernelInfo* info, void** kernel) {
    return guarded([&] { *kernel = new Attributes(read_attributes(info, kDtype)); });
}

void destroy(void* kernel) { delete (Attributes*)kernel; }

Status* compute(void* kernel, KernelContext* context) {
    return guarded([&] {
        Call call;
        call.a = *(const Attributes*)kernel;
        const ElementType type = type_of(call.a.dtype);
        size_t inputs = 0;
        check(input_count(api, (const KernelContext*)context, &inputs));
        call.query = read_tensor(context, kQuery, inputs, type);
        call.key = read_tensor(context, kKey, inputs, type);
        call.value = read_tensor(context, kValue, inputs, type);
        call.bias = read_tensor(context, kBias, inputs, kFloat);
        for (size_t i = 0; i < kAxes; ++i) call.relative[i] = read_tensor(context, kRelative + i, inputs, kFloat);
        call.check_shapes();
        Tensor out;
        out.shape = call.query.shape;
        out.shape[1] = call.value.shape[1] / call.a.kv_heads * call.a.heads;
        Value* made = nullptr;
        check(output(api, context, (size_t)0, (const int64_t*)out.shape.data(), out.shape.size(), &made));
        check(tensor_data(api, made, &out.data));
        run(call, out, context);
    });
}

template <int32_t kDtype>
constexpr Operator kOperator = {
    kVersion,
    nullptr,
    [](const Operator*) { return "LocalAttention"; },
    [](const Operator*) { return "CPUExecutionProvider"; },
    [](const Operator*, size_t i) { return i < kBias ? type_of(kDtype) : kFloat; },
    [](const Operator*) { return kInputs; },
    [](const Operator*, size_t) { return type_of(kDtype); },
    [](const Operator*) { return (size_t)1; },
    nullptr,
    destroy,
    [](const Operator*, size_t i) { return i < kBias ? kRequired : kOptional; },
    [](const Operator*, size_t) { return kRequired; },
    [](const Operator*, size_t) { return 0; },  // in the default memory
    [](const Operator*) { return 1; },
    [](const Operator*) { return 1; },
    [](const Operator*) { return 1; },
    [](const Operator*) { return 1; },
    create<kDtype>,
    compute,
    nullptr,
    [](const Operator*) { return 1; },
    [](const Operator*) { return 1; },
};

}  // namespace

// What SessionOptions.register_custom_ops_library and RegisterCustomOpsLibrary_V2 call.
extern "C" NEARSIGHT_API Status* RegisterCustomOps(SessionOptions* options, const ApiBase* base) {
    const Api* found = base->get_api(kVersion);
    if (!found) return nullptr;  // the session then says that it does not know the operator
    api = found;
    return guarded([&] {
        static Domain* domain = nullptr;  // of the process: sessions only refer to it
        if (!domain) {
            Domain* made = nullptr;
            check(create_domain(api, "nearsight", &made));
            check(add_operator(api, made, &kOperator<NEARSIGHT_FLOAT32>));
            check(add_operator(api, made, &kOperator<NEARSIGHT_BFLOAT16>));
            domain = made;
        }
        check(add_domain(api, options, domain));
    });
}
