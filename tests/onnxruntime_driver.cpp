// SPDX-License-Identifier: Apache-2.0
//
// Stands for onnxruntime: hands the operator of csrc/onnxruntime right and wrong nodes, for sanitizers to look on.
// tests/test_deploy.py builds and runs it: `driver 2000` tries so many.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "onnxruntime/abi.h"

namespace onnxruntime {

struct Status {
    ErrorCode code;
    std::string text;
};
struct SessionOptions {};
struct Domain {
    std::vector<const Operator*> operators;
};
struct KernelInfo {
    std::map<std::string, int64_t> ints;
    std::map<std::string, std::vector<int64_t>> lists;
    std::map<std::string, std::string> texts;
    std::map<std::string, float> floats;
};
struct TensorInfo {
    ElementType type = kFloat;
    std::vector<int64_t> shape;
};
struct Value {
    TensorInfo info;
    std::vector<char> data;  // no byte more than it has
};
struct KernelContext {
    std::vector<Value*> inputs;  // NULL where one is left out
    Value out;
};

}  // namespace onnxruntime

using namespace onnxruntime;

extern "C" Status* RegisterCustomOps(SessionOptions* options, const ApiBase* base);

namespace {

Domain* registered = nullptr;
int live = 0;  // statuses

Status* failed(ErrorCode code, const char* text) {
    ++live;
    return new Status{code, text};
}

void release(Status* status) {
    --live;
    delete status;
}

Status* missing() { return failed(kFail, "no such attribute"); }

Status* get_ints(const KernelInfo* info, const char* name, int64_t* values, size_t* count) {
    const auto found = info->lists.find(name);
    if (found == info->lists.end()) return missing();
    if (values) memcpy(values, found->second.data(), found->second.size() * sizeof(int64_t));
    *count = found->second.size();
    return nullptr;
}

Status* get_string(const KernelInfo* info, const char* name, char* text, size_t* size) {
    const auto found = info->texts.find(name);
    if (found == info->texts.end()) return missing();
    if (text) memcpy(text, found->second.c_str(), found->second.size() + 1);
    *size = found->second.size() + 1;
    return nullptr;
}

template <class T>
Status* get(const std::map<std::string, T>& all, const char* name, T* value) {
    const auto found = all.find(name);
    if (found == all.end()) return missing();
    *value = found->second;
    return nullptr;
}

int64_t cells(const std::vector<int64_t>& shape) {
    int64_t count = 1;
    for (int64_t one : shape) count *= one;
    return count;
}

Status* get_output(KernelContext* context, size_t, const int64_t* shape, size_t rank, Value** value) {
    context->out.info.shape.assign(shape, shape + rank);
    context->out.data.assign((size_t)cells(context->out.info.shape) * (context->out.info.type == kFloat ? 4 : 2), 0);
    *value = &context->out;
    return nullptr;
}

Status* parallel(const KernelContext*, void (*job)(void*, size_t), size_t count, size_t, void* data) {
    std::thread other([&] { for (size_t i = 1; i < count; i += 2) job(data, i); });
    for (size_t i = 0; i < count; i += 2) job(data, i);
    other.join();
    return nullptr;
}

template <class Function>
void* entry(Function* function) {
    return (void*)function;
}

Api table() {
    Api api = {};
    void** f = api.functions;
    f[0] = entry(+[](ErrorCode code, const char* text) { return failed(code, text); });
    f[26] = entry(+[](const char*, Domain** domain) -> Status* { return *domain = new Domain, nullptr; });
    f[27] = entry(+[](Domain* d, const Operator* o) -> Status* { return d->operators.push_back(o), nullptr; });
    f[28] = entry(+[](SessionOptions*, Domain* domain) -> Status* { return registered = domain, nullptr; });
    f[51] = entry(+[](Value* value, void** data) -> Status* { return *data = value->data.data(), nullptr; });
    f[60] = entry(+[](const TensorInfo* info, ElementType* type) -> Status* { return *type = info->type, nullptr; });
    f[61] = entry(+[](const TensorInfo* info, size_t* rank) -> Status* { return *rank = info->shape.size(), nullptr; });
    f[62] = entry(+[](const TensorInfo* info, int64_t* shape, size_t rank) -> Status* {
        for (size_t i = 0; i < rank; ++i) shape[i] = info->shape[i];
        return nullptr;
    });
    f[65] = entry(+[](const Value* value, TensorInfo** info) -> Status* {
        return *info = new TensorInfo(value->info), nullptr;
    });
    f[85] = entry(+[](const KernelInfo* info, const char* name, float* v) { return get(info->floats, name, v); });
    f[86] = entry(+[](const KernelInfo* info, const char* name, int64_t* v) { return get(info->ints, name, v); });
    f[87] = entry(get_string);
    f[88] = entry(+[](const KernelContext* context, size_t* count) -> Status* {
        return *count = context->inputs.size(), nullptr;
    });
    f[90] = entry(+[](const KernelContext* context, size_t i, const Value** value) -> Status* {
        return *value = context->inputs[i], nullptr;
    });
    f[91] = entry(get_output);
    f[93] = entry(release);
    f[99] = entry(+[](TensorInfo* info) { delete info; });
    f[163] = entry(get_ints);
    f[274] = entry(parallel);
    return api;
}

const Api kApi = table();

// ---- Nodes ----------------------------------------------------------------------------------------------------------

std::mt19937_64 random_bits(0);

int64_t below(int64_t n) { return (int64_t)(random_bits() % (uint64_t)n); }

template <class T>
const T& one_of(const std::vector<T>& all) {
    return all[(size_t)below((int64_t)all.size())];
}

int64_t hostile() { return one_of<int64_t>({0, -1, 1, 2, 7, 64, INT32_MAX, INT32_MAX + 1LL, INT64_MAX, INT64_MIN}); }

struct Case {
    KernelInfo info;
    std::vector<Value> inputs;
    std::vector<bool> given;
};

Value tensor(std::vector<int64_t> shape, ElementType type) {
    Value value = {{type, shape}, {}};
    value.data.resize((size_t)cells(shape) * (type == kFloat ? 4 : 2));
    for (size_t i = 0; i + 3 < value.data.size() && type == kFloat; i += 4) {
        const float number = (float)below(200) / 100 - 1;
        memcpy(&value.data[i], &number, 4);
    }
    return value;
}

Case right_case(ElementType type) {
    const int64_t rank = 1 + below(3), kv = 1 + below(2), heads = kv * (1 + below(2)), dim = 1 + below(9);
    const int64_t value_dim = 1 + below(9), batch = below(3);
    Case c;
    c.info.ints = {{"rank", rank}, {"num_heads", heads}, {"num_kv_heads", kv}};
    c.info.floats["scale"] = 0.5f;
    std::vector<int64_t> query = {batch, heads * dim}, key = {batch, kv * dim}, value = {batch, kv * value_dim};
    std::vector<int64_t> bias = {heads};
    std::vector<Value> relative;
    for (int64_t i = 0; i < rank; ++i) {
        const int64_t size = below(12), stride = 1 + below(3), kernel = 1 + below(6);
        const char* border = one_of<const char*>({"mask", "zeros", "shift", "wrap"});
        c.info.lists["kernel_size"].push_back(kernel);
        c.info.lists["stride"].push_back(stride);
        c.info.lists["dilation"].push_back(1 + below(3));
        c.info.lists["causal"].push_back(below(2));
        c.info.lists["shared_by"].push_back(1);
        c.info.texts["border"] += (i ? " " : "") + std::string(border);
        query.push_back((size + stride - 1) / stride);
        key.push_back(size);
        value.push_back(size);
        const int64_t entries = strcmp(border, "shift") ? kernel : 2 * kernel - 1;
        bias.push_back(entries);
        relative.push_back(tensor({heads, entries, dim}, kFloat));
    }
    c.inputs = {tensor(query, type), tensor(key, type), tensor(value, type), tensor(bias, kFloat)};
    c.inputs.insert(c.inputs.end(), relative.begin(), relative.end());
    const bool with_bias = below(2), with_relative = below(2);
    for (size_t i = 0; i < c.inputs.size(); ++i) c.given.push_back(i < 3 || (i == 3 ? with_bias : with_relative));
    return c;
}

void spoil(Case& c) {
    static const std::vector<std::string> lists = {"kernel_size", "stride", "dilation", "causal", "shared_by"};
    switch (below(10)) {
        case 0: c.info.ints[one_of<std::string>({"rank", "num_heads", "num_kv_heads"})] = hostile(); break;
        case 1: one_of<std::vector<int64_t>*>({&c.info.lists[one_of(lists)]})->at(0) = hostile(); break;
        case 2: for (int64_t& one : c.info.lists[one_of(lists)]) one = hostile(); break;
        case 3: c.info.lists[one_of(lists)].resize((size_t)below(5), 1); break;
        case 4: c.info.lists.erase(one_of(lists)); break;
        case 5: c.info.texts["border"] = one_of<std::string>({"", " ", "mask", "mask  mask", "wrap edge"}); break;
        case 6: c.info.floats["scale"] = one_of<float>({1e38f * 1e38f, -3, 0, 1e30f}); break;
        case 7: {
            Value& one = c.inputs[(size_t)below((int64_t)c.inputs.size())];
            std::vector<int64_t> shape = one.info.shape;
            if (below(2)) shape.resize((size_t)below(7), 1);
            else shape[(size_t)below((int64_t)shape.size())] = below(9);
            one = tensor(shape, below(4) ? one.info.type : kBfloat16);
            break;
        }
        case 8: for (int64_t& size : c.info.lists["kernel_size"]) size = INT32_MAX; break;  // a table without end
        default: c.given[(size_t)below((int64_t)c.given.size())] = below(2);
    }
}

// Whether it ran; otherwise what it was refused with has to be a line of the operator's.
bool run(const Operator& op, Case& c) {
    void* kernel = nullptr;
    Status* status = op.create_kernel_2(&op, &kApi, &c.info, &kernel);
    if (!status) {
        KernelContext context;
        context.out.info.type = op.output_type(&op, 0);
        for (size_t i = 0; i < c.inputs.size(); ++i) context.inputs.push_back(c.given[i] ? &c.inputs[i] : nullptr);
        status = op.kernel_compute_2(kernel, &context);
        op.kernel_destroy(kernel);
    }
    if (!status) return true;
    const std::string text = status->text;
    release(status);
    if (text.rfind("nearsight::LocalAttention: ", 0) != 0 || text.find('\n') != std::string::npos) {
        printf("refused with: %s\n", text.c_str());
        exit(1);
    }
    return false;
}

}  // namespace

int main(int, char** arguments) {
    SessionOptions options;
    const ApiBase old = {[](uint32_t version) -> const Api* { return version < 17 ? &kApi : nullptr; },
                         [] { return "1.16.3"; }};
    Status* status = RegisterCustomOps(&options, &old);
    if (!status || status->text.find("needs onnxruntime 1.17 or later; this is 1.16.3") == std::string::npos) return 2;
    release(status);
    const ApiBase base = {[](uint32_t version) -> const Api* { return version <= 17 ? &kApi : nullptr; },
                          [] { return "1.17.0"; }};
    if (RegisterCustomOps(&options, &base) || RegisterCustomOps(&options, &base)) return 3;
    const int count = atoi(arguments[1]);
    int refused = 0;
    for (int i = 0; i < count; ++i) {
        const Operator& op = *registered->operators[(size_t)below(2)];
        Case c = right_case(op.input_type(&op, 0));
        if (i % 2 == 0 && !run(op, c)) return 4;
        spoil(c);
        refused += !run(op, c);
    }
    delete registered;
    printf("%d nodes, %d refused, %d statuses left\n", count, refused, live);
    return live;
}
