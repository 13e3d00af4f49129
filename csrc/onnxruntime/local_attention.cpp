// SPDX-License-Identifier: Apache-2.0
//
// nearsight::LocalAttention, version 1: onnxruntime runs it as docs/howto/deploy.md specifies. A session option
// registers this library; it needs nothing of PyTorch, and works on the session's own threads.

#include <string.h>

#include <memory>
#include <new>
#include <string>
#include <vector>

#include "../node.h"
#include "abi.h"

namespace {

using namespace onnxruntime;
using nearsight::Array;
using nearsight::Attributes;
using nearsight::Node;
using nearsight::Refusal;

const Api* api = nullptr;  // set before any kernel is made, to what it was, if it was

constexpr int kThreads = 8;  // about: the interface does not say, and onnxruntime deals out what it gets

// An error that onnxruntime reported itself goes back to it as it is.
struct Reported {
    Status* status;
};

void check(Status* status) {
    if (status) throw Reported{status};
}

ErrorCode code_of(const Refusal& refusal) {
    if (refusal.of == Refusal::kKernel) return kFail;
    return refusal.of == Refusal::kAttribute ? kInvalidGraph : kInvalidArgument;
}

// Runs it, and makes a status of what it throws: no exception may reach onnxruntime.
template <class Work>
Status* guarded(Work work) {
    try {
        work();
        return nullptr;
    } catch (const Reported& error) {
        return error.status;
    } catch (const Refusal& error) {
        return create_status(api, code_of(error), ("nearsight::LocalAttention: " + error.text).c_str());
    } catch (const std::bad_alloc&) {
        return create_status(api, kFail, "nearsight::LocalAttention: out of memory");
    }
}

// ---- Attributes -----------------------------------------------------------------------------------------------------

// onnxruntime does not say which attribute it misses.
void check_read(Status* status, const char* name) {
    if (!status) return;
    release_status(api, status);
    throw Refusal{std::string("the attribute ") + name + " is missing, or of another type", Refusal::kAttribute};
}

int64_t read_int(const KernelInfo* info, const char* name) {
    int64_t value = 0;
    check_read(attribute_int(api, info, name, &value), name);
    return value;
}

std::vector<int64_t> read_ints(const KernelInfo* info, const char* name) {
    size_t count = 0;
    check_read(attribute_ints(api, info, name, (int64_t*)nullptr, &count), name);
    std::vector<int64_t> values(count);
    check(attribute_ints(api, info, name, values.data(), &count));
    return values;
}

std::string read_string(const KernelInfo* info, const char* name) {
    size_t size = 0;
    check_read(attribute_string(api, info, name, (char*)nullptr, &size), name);
    std::string text(size, '\0');
    check(attribute_string(api, info, name, &text[0], &size));
    text.resize(strlen(text.c_str()));
    return text;
}

Attributes read_attributes(const KernelInfo* info) {
    Attributes a;
    a.rank = read_int(info, "rank");
    a.num_heads = read_int(info, "num_heads");
    a.num_kv_heads = read_int(info, "num_kv_heads");
    a.kernel_size = read_ints(info, "kernel_size");
    a.stride = read_ints(info, "stride");
    a.dilation = read_ints(info, "dilation");
    a.causal = read_ints(info, "causal");
    a.shared_by = read_ints(info, "shared_by");
    a.border = read_string(info, "border");
    check_read(attribute_float(api, info, "scale", &a.scale), "scale");
    nearsight::check(a);
    return a;
}

// ---- Inputs ---------------------------------------------------------------------------------------------------------

Array read_input(KernelContext* context, size_t index, size_t inputs, ElementType dtype) {
    Array array;
    const Value* value = nullptr;
    if (index >= inputs) return array;
    check(input(api, context, index, &value));
    if (!value) return array;
    TensorInfo* info = nullptr;
    check(tensor_info(api, value, &info));
    const std::unique_ptr<TensorInfo, void (*)(TensorInfo*)> owner(
        info, [](TensorInfo* one) { release_tensor_info(api, one); });
    ElementType found = kUndefined;
    check(element_type(api, (const TensorInfo*)info, &found));
    if (found != dtype)
        throw Refusal{"input " + std::to_string(index) + " has elements of another type than it must", Refusal::kInput};
    size_t rank = 0;
    check(rank_of(api, (const TensorInfo*)info, &rank));
    array.given = true;
    array.shape.resize(rank);
    check(dimensions(api, (const TensorInfo*)info, array.shape.data(), rank));
    check(tensor_data(api, (Value*)value, &array.data));
    return array;
}

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

// ---- The operator, once for each type -------------------------------------------------------------------------------

ElementType type_of(int32_t dtype) { return dtype == NEARSIGHT_BFLOAT16 ? kBfloat16 : kFloat; }

Status* create(const Operator*, const Api*, const KernelInfo* info, void** kernel) {
    return guarded([&] { *kernel = new Attributes(read_attributes(info)); });
}

void destroy(void* kernel) { delete (Attributes*)kernel; }

template <int32_t kDtype>
Status* compute(void* kernel, KernelContext* context) {
    return guarded([&] {
        Node node = {*(const Attributes*)kernel, kDtype, {}};
        size_t inputs = 0;
        check(input_count(api, (const KernelContext*)context, &inputs));
        for (size_t i = 0; i < nearsight::kInputs; ++i)
            node.inputs[i] = read_input(context, i, inputs, i < nearsight::kBias ? type_of(kDtype) : kFloat);
        const std::vector<int64_t> shape = node.out_shape();
        Value* made = nullptr;
        void* out = nullptr;
        check(output(api, context, (size_t)0, (const int64_t*)shape.data(), shape.size(), &made));
        check(tensor_data(api, made, &out));
        node.run(out, {on_session, context}, kThreads);
    });
}

template <int32_t kDtype>
constexpr Operator kOperator = {
    kVersion,
    nullptr,
    [](const Operator*) { return "LocalAttention"; },
    [](const Operator*) { return "CPUExecutionProvider"; },
    [](const Operator*, size_t i) { return i < nearsight::kBias ? type_of(kDtype) : kFloat; },
    [](const Operator*) { return (size_t)nearsight::kInputs; },
    [](const Operator*, size_t) { return type_of(kDtype); },
    [](const Operator*) { return (size_t)1; },
    nullptr,
    destroy,
    [](const Operator*, size_t i) { return i < nearsight::kBias ? kRequired : kOptional; },
    [](const Operator*, size_t) { return kRequired; },
    [](const Operator*, size_t) { return 0; },  // in the default memory
    [](const Operator*) { return 1; },
    [](const Operator*) { return 1; },
    [](const Operator*) { return 1; },
    [](const Operator*) { return 1; },
    create,
    compute<kDtype>,
    nullptr,
    [](const Operator*) { return 1; },
    [](const Operator*) { return 1; },
};

Domain* make_domain() {
    Domain* made = nullptr;
    check(create_domain(api, "nearsight", &made));
    check(add_operator(api, made, &kOperator<NEARSIGHT_FLOAT32>));
    check(add_operator(api, made, &kOperator<NEARSIGHT_BFLOAT16>));
    return made;
}

}  // namespace

// What SessionOptions.register_custom_ops_library and RegisterCustomOpsLibrary_V2 call.
extern "C" NEARSIGHT_API Status* RegisterCustomOps(SessionOptions* options, const ApiBase* base) {
    const Api* found = base->get_api(kVersion);
    if (!found) {  // every one has the first version, and in it the way to say so
        const std::string text = "nearsight::LocalAttention needs onnxruntime 1.17 or later; this is ";
        const Api* first = base->get_api(1);
        return first ? create_status(first, kFail, (text + base->get_version_string()).c_str()) : nullptr;
    }
    api = found;
    return guarded([&] {
        static Domain* const domain = make_domain();  // of the process: sessions only refer to it
        check(add_domain(api, options, domain));
    });
}
