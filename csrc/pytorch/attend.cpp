// SPDX-License-Identifier: Apache-2.0
//
// nearsight::attend for processes without Python, such as those that run a package of AOTInductor: the schema and the
// results of src/nearsight/attention/native/operators.py. Written against PyTorch's stable interface and compiled on
// the machine that runs it: nearsight.deploy.aoti_library().

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <tuple>
#include <vector>

#include "../nearsight.h"

namespace {

using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

constexpr int kAxes = 3;
constexpr const char* kSchema =
    "attend(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor[] relative, SymInt[] kernel_size, "
    "int[] stride, int[] dilation, int[] causal, int[] shared_by, int[] border, float scale, int isa) -> "
    "(Tensor, Tensor)";

Ints sizes(const Tensor& tensor) {
    const auto found = tensor.sizes();
    return Ints(found.begin(), found.end());
}

Ints strides(const Tensor& tensor) {
    const auto found = tensor.strides();
    return Ints(found.begin(), found.end());
}

nearsight_tensor strided(const Tensor& tensor) {
    nearsight_tensor t = {tensor.mutable_data_ptr(), {}};
    const Ints found = strides(tensor);
    std::copy(found.begin(), found.end(), t.strides);
    return t;
}

// On PyTorch's own threads, each of which takes the next job when it is done with one.
void on_pytorch(void*, void (*job)(void*, int64_t), void* data, int64_t count) {
    std::atomic<int64_t> next{0};
    const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        for (int64_t i; (i = next++) < count;) job(data, i);
    });
}

// Memory whose axes lie in the order of another tensor's.
Tensor empty_in_order(const Ints& shape, const Tensor& like) {
    const Ints from = strides(like);
    Ints order(shape.size()), steps(shape.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return from[a] > from[b]; });
    int64_t step = 1;
    for (size_t i = order.size(); i-- > 0; step *= std::max<int64_t>(shape[order[i]], 1)) steps[order[i]] = step;
    int32_t dtype = 0;
    AtenTensorHandle made = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        (int64_t)shape.size(), shape.data(), steps.data(), dtype, aoti_torch_device_type_cpu(), 0, &made));
    return Tensor(made);
}

Tensor floats(const Ints& shape) {
    return torch::stable::empty(shape, torch::headeronly::ScalarType::Float, std::nullopt,
                                torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

struct Windows {
    const Ints &kernel_size, &stride, &dilation, &causal, &shared_by, &border;

    int64_t entries(size_t axis) const {
        const bool by_offset = border[axis] == NEARSIGHT_BORDER_SHIFT || shared_by[axis] > 1;
        return by_offset ? 2 * kernel_size[axis] - 1 : kernel_size[axis];
    }
};

// C reads where it is told to, and anyone can call an operator.
void check_all(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias,
               const std::vector<Tensor>& relative, const Windows& w) {
    const size_t rank = w.kernel_size.size();
    STD_TORCH_CHECK(rank >= 1 && rank <= kAxes, "nearsight::attend: a window has 1 to 3 axes; received ", rank);
    for (const Ints* one : {&w.stride, &w.dilation, &w.causal, &w.shared_by, &w.border})
        STD_TORCH_CHECK(one->size() == rank, "nearsight::attend: a window of ", rank,
                        " axes has a number for each in all that it says; received ", one->size());
    for (size_t i = 0; i < rank; ++i)
        STD_TORCH_CHECK(w.kernel_size[i] >= 1 && w.kernel_size[i] <= INT32_MAX && w.stride[i] >= 1,
                        "nearsight::attend: kernel_size and stride must be at least 1");
    for (const Tensor* one : {&query, &key, &value}) {
        STD_TORCH_CHECK(one->is_cpu() && one->scalar_type() == query.scalar_type() && one->dim() == (int64_t)rank + 3,
                        "nearsight::attend: query, key and value must be (batch, heads, *map, channels) of one dtype "
                        "on the CPU");
    }
    STD_TORCH_CHECK(query.scalar_type() == torch::headeronly::ScalarType::Float ||
                        query.scalar_type() == torch::headeronly::ScalarType::BFloat16,
                    "nearsight::attend takes float32 and bfloat16");
    Ints expected = sizes(key);
    for (size_t i = 0; i < rank; ++i) {
        const int64_t cells = expected[i + 2];
        expected[i + 2] = cells / w.stride[i] + (cells % w.stride[i] != 0);
    }
    STD_TORCH_CHECK(sizes(query) == expected, "nearsight::attend: query does not fit key and the strides");
    expected = sizes(key);
    expected.back() = sizes(value).back();
    STD_TORCH_CHECK(sizes(value) == expected, "nearsight::attend: value does not fit key");
    std::vector<Tensor> tables = relative;
    std::vector<Ints> right;
    STD_TORCH_CHECK(relative.empty() || relative.size() == rank,
                    "nearsight::attend: relative must be given for every axis or for none");
    for (size_t i = 0; i < relative.size(); ++i) right.push_back({key.size(1), w.entries(i), key.size(rank + 2)});
    if (bias) {
        tables.push_back(*bias);
        right.push_back({key.size(1)});
        for (size_t i = 0; i < rank; ++i) right.back().push_back(w.entries(i));
    }
    for (size_t i = 0; i < tables.size(); ++i)
        STD_TORCH_CHECK(tables[i].is_cpu() && tables[i].scalar_type() == torch::headeronly::ScalarType::Float &&
                            sizes(tables[i]) == right[i],
                        "nearsight::attend: bias and relative must be tables of the window, in float32 on the CPU");
}

std::tuple<Tensor, Tensor> attend(const Tensor& query, const Tensor& key, const Tensor& value,
                                  const std::optional<Tensor>& bias, const std::vector<Tensor>& relative,
                                  const Ints& kernel_size, const Ints& stride, const Ints& dilation,
                                  const Ints& causal, const Ints& shared_by, const Ints& border, double scale,
                                  int64_t isa) {
    const Windows windows = {kernel_size, stride, dilation, causal, shared_by, border};
    check_all(query, key, value, bias, relative, windows);
    const bool half = query.scalar_type() == torch::headeronly::ScalarType::BFloat16;
    const size_t rank = kernel_size.size();
    nearsight_problem p = {};
    p.struct_size = sizeof p;
    p.abi_version = NEARSIGHT_ABI_VERSION;
    p.rank = (int32_t)rank;
    p.dtype = half ? NEARSIGHT_BFLOAT16 : NEARSIGHT_FLOAT32;
    p.isa = (int32_t)isa;
    p.num_threads = (int32_t)torch::stable::get_num_threads();
    p.element_size = half ? 2 : 4;
    p.scalar_size = 4;
    p.batch = key.size(0);
    p.heads = key.size(1);
    p.head_dim = key.size(rank + 2);
    p.value_dim = value.size(rank + 2);
    p.scale = scale;
    for (size_t i = 0; i < rank; ++i) {
        p.border[i] = (int32_t)border[i];
        p.causal[i] = (int32_t)causal[i];
        p.size[i] = key.size((int64_t)i + 2);
        p.kernel[i] = kernel_size[i];
        p.stride[i] = stride[i];
        p.dilation[i] = dilation[i];
        p.shared_by[i] = shared_by[i];
    }
    Ints shape = sizes(query);
    const Ints of_lse(shape.begin(), shape.end() - 1);
    shape.back() = p.value_dim;
    Tensor out = p.value_dim == p.head_dim ? torch::stable::empty_like(query) : empty_in_order(shape, query);
    Tensor lse = floats(of_lse);
    nearsight_inputs inputs = {strided(query), strided(key), strided(value), nullptr, {}};
    std::vector<Tensor> kept;  // as long as the call takes
    if (bias) {
        kept.push_back(torch::stable::contiguous(*bias));
        inputs.bias = (const float*)kept.back().const_data_ptr();
    }
    for (size_t i = 0; i < relative.size(); ++i) {
        kept.push_back(torch::stable::contiguous(relative[i]));
        inputs.relative[i] = (const float*)kept.back().const_data_ptr();
    }
    const nearsight_tensor target = strided(out);
    const nearsight_executor executor = {on_pytorch, nullptr};
    const int error = nearsight_forward_on(&executor, &p, &inputs, &target, (float*)lse.mutable_data_ptr());
    STD_TORCH_CHECK(error == NEARSIGHT_OK, "nearsight::attend: ", nearsight_error_string(error));
    return {out, lse};
}

// As long as the process. Where Python was first, its operator is there already, and stays.
struct Registered {
    TorchLibraryHandle schema = nullptr, kernel = nullptr;

    Registered() {
        const int32_t tag = torch_tag_pt2_compliant_tag();
        if (aoti_torch_library_init_fragment("nearsight", __FILE__, __LINE__, &schema) ||
            torch_library_def_with_tags(schema, kSchema, &tag, 1))
            return;
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_library_init_impl("nearsight", "CPU", __FILE__, __LINE__, &kernel));
        STABLE_TORCH_ERROR_CODE_CHECK(torch_library_impl(kernel, "attend", TORCH_BOX(&attend), TORCH_ABI_VERSION));
    }
} registered;

}  // namespace
