// SPDX-License-Identifier: Apache-2.0

#include "node.h"

#include <math.h>

#include <algorithm>

namespace nearsight {

namespace {

// Below so many multiply-adds, waking threads takes as long as the work.
constexpr double kWorthThreads = 200000;
const char* const kBorders[] = {"mask", "zeros", "shift", "wrap"};  // as numbered in nearsight.h

[[noreturn]] void refuse(const std::string& text, Refusal::Of of) { throw Refusal{text, of}; }

void check_range(const char* name, int64_t value, int64_t least, int64_t most) {
    if (value < least || value > most)
        refuse(std::string(name) + " must be " + std::to_string(least) + " to " + std::to_string(most) + "; it is " +
                   std::to_string(value),
               Refusal::kAttribute);
}

void check_count(const char* name, const std::vector<int64_t>& values, int64_t rank) {
    if (values.size() != (size_t)rank)
        refuse(std::string(name) + " must have one number for each of " + std::to_string(rank) + " axes; it has " +
                   std::to_string(values.size()),
               Refusal::kAttribute);
}

// The rules of every axis, parted by a space; none where one is unknown.
std::vector<int32_t> borders_of(const std::string& text) {
    std::vector<int32_t> found;
    size_t from = 0;
    while (from <= text.size()) {
        const size_t end = std::min(text.find(' ', from), text.size());
        const auto known = std::find(std::begin(kBorders), std::end(kBorders), text.substr(from, end - from));
        if (known == std::end(kBorders)) return {};
        found.push_back((int32_t)(known - kBorders));
        from = end + 1;
    }
    return found;
}

std::string written(const std::vector<int64_t>& shape) {
    std::string text = "(";
    for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + ")";
}

void check_map(const char* name, const Array& array, int64_t rank, int64_t heads, const char* heads_name) {
    if (!array.given) refuse(std::string(name) + " is missing", Refusal::kInput);
    if ((int64_t)array.shape.size() != rank + 2)
        refuse(std::string(name) + " must have batch, channels and " + std::to_string(rank) + " axes; it is " +
                   written(array.shape),
               Refusal::kInput);
    if (array.shape[1] % heads || array.shape[1] == 0)
        refuse(std::string(heads_name) + " must divide the channels of " + name + "; it is " + written(array.shape),
               Refusal::kInput);
}

// (batch, heads * channels, *axes): the strides of (batch, heads, *axes, channels).
nearsight_tensor laid_out(void* data, const std::vector<int64_t>& shape, int64_t heads, bool channels_last) {
    const size_t rank = shape.size() - 2;
    const int64_t channels = shape[1];
    nearsight_tensor t = {data, {}};
    int64_t step = channels_last ? channels : 1;
    for (size_t i = rank; i-- > 0; step *= shape[i + 2]) t.strides[i + 2] = step;
    t.strides[rank + 2] = channels_last ? 1 : step;
    t.strides[1] = channels / heads * t.strides[rank + 2];
    t.strides[0] = channels_last ? step : channels * step;
    return t;
}

void* past(void* data, int64_t elements, int64_t size) { return (char*)data + elements * size; }

}  // namespace

void check(Attributes& a) {
    check_range("rank", a.rank, 1, kAxes);
    check_range("num_heads", a.num_heads, 1, INT32_MAX);
    check_range("num_kv_heads", a.num_kv_heads, 1, a.num_heads);
    if (a.num_heads % a.num_kv_heads)
        refuse("num_kv_heads must divide num_heads; " + std::to_string(a.num_kv_heads) + " does not divide " +
                   std::to_string(a.num_heads),
               Refusal::kAttribute);
    check_count("kernel_size", a.kernel_size, a.rank);
    check_count("stride", a.stride, a.rank);
    check_count("dilation", a.dilation, a.rank);
    check_count("causal", a.causal, a.rank);
    check_count("shared_by", a.shared_by, a.rank);
    a.borders = borders_of(a.border);
    if (a.borders.size() != (size_t)a.rank)
        refuse("border must name mask, zeros, shift or wrap for each of " + std::to_string(a.rank) +
                   " axes, parted by a space; it is '" + a.border + "'",
               Refusal::kAttribute);
    if (!isfinite(a.scale)) refuse("scale must be finite", Refusal::kAttribute);
}

int64_t Node::entries(int axis) const {
    const bool by_offset = attributes.borders[axis] == NEARSIGHT_BORDER_SHIFT || attributes.shared_by[axis] > 1;
    return by_offset ? 2 * attributes.kernel_size[axis] - 1 : attributes.kernel_size[axis];
}

int64_t Node::queries(int axis) const {
    const int64_t cells = inputs[kKey].shape[axis + 2], stride = attributes.stride[axis];
    return cells / stride + (cells % stride != 0);
}

// Calls of the kernel: one where every head has a key of its own, else one for each key.
int64_t Node::groups() const {
    return attributes.num_kv_heads == attributes.num_heads ? 1 : attributes.num_kv_heads;
}

std::vector<int64_t> Node::out_shape() const {
    const Attributes& a = attributes;
    const Array &query = inputs[kQuery], &key = inputs[kKey], &value = inputs[kValue], &bias = inputs[kBias];
    check_map("query", query, a.rank, a.num_heads, "num_heads");
    check_map("key", key, a.rank, a.num_kv_heads, "num_kv_heads");
    check_map("value", value, a.rank, a.num_kv_heads, "num_kv_heads");
    std::vector<int64_t> expected = key.shape;
    expected[1] = value.shape[1];
    if (value.shape != expected)
        refuse("value must have the batch and axes of key; they are " + written(value.shape) + " and " +
                   written(key.shape),
               Refusal::kInput);
    expected[1] = key.shape[1] / a.num_kv_heads * a.num_heads;
    for (int i = 0; i < a.rank; ++i) {
        if (a.stride[i] < 1 || a.kernel_size[i] < 1 || a.kernel_size[i] > INT32_MAX)
            refuse("kernel_size and stride must be at least 1", Refusal::kInput);
        expected[(size_t)i + 2] = queries(i);
    }
    if (query.shape != expected)
        refuse("query must be " + written(expected) + " for this key; it is " + written(query.shape), Refusal::kInput);
    std::vector<int64_t> table = {a.num_heads};
    for (int i = 0; i < a.rank; ++i) table.push_back(entries(i));
    if (bias.given && bias.shape != table)
        refuse("bias must be " + written(table) + "; it is " + written(bias.shape), Refusal::kInput);
    for (int i = 0; i < kAxes; ++i) {
        const Array& vectors = inputs[kRelative + i];
        if (vectors.given != (i < a.rank && inputs[kRelative].given))
            refuse("relative must be given for every axis or for none", Refusal::kInput);
        if (!vectors.given) continue;
        const std::vector<int64_t> right = {a.num_heads, entries(i), query.shape[1] / a.num_heads};
        if (vectors.shape != right)
            refuse("relative of axis " + std::to_string(i) + " must be " + written(right) + "; it is " +
                       written(vectors.shape),
                   Refusal::kInput);
    }
    std::vector<int64_t> shape = query.shape;
    shape[1] = value.shape[1] / a.num_kv_heads * a.num_heads;
    return shape;
}

double Node::work() const {
    const Array &query = inputs[kQuery], &value = inputs[kValue];
    const double channels = query.shape[1] + (double)value.shape[1] / attributes.num_kv_heads * attributes.num_heads;
    double products = (double)query.shape[0] * channels;
    for (int i = 0; i < attributes.rank; ++i)
        products *= (double)queries(i) * std::min(attributes.kernel_size[i], inputs[kKey].shape[(size_t)i + 2]);
    return products;
}

nearsight_problem Node::problem(int threads) const {
    const Attributes& a = attributes;
    nearsight_problem p = {};
    p.struct_size = sizeof p;
    p.abi_version = NEARSIGHT_ABI_VERSION;
    p.rank = (int32_t)a.rank;
    p.dtype = dtype;
    p.element_size = dtype == NEARSIGHT_BFLOAT16 ? 2 : 4;
    p.scalar_size = 4;
    p.batch = inputs[kKey].shape[0];
    p.heads = a.num_heads / groups();
    p.head_dim = inputs[kQuery].shape[1] / a.num_heads;
    p.value_dim = inputs[kValue].shape[1] / a.num_kv_heads;
    // Attributes are float32: the usual scale, rounded, stands for what it was.
    const double usual = 1 / sqrt((double)p.head_dim);
    p.scale = (float)usual == a.scale ? usual : a.scale;
    for (int i = 0; i < a.rank; ++i) {
        p.border[i] = a.borders[i];
        p.causal[i] = (int32_t)std::min<int64_t>(std::max<int64_t>(a.causal[i], -1), 2);  // what is no flag stays none
        p.size[i] = inputs[kKey].shape[(size_t)i + 2];
        p.kernel[i] = a.kernel_size[i];
        p.stride[i] = a.stride[i];
        p.dilation[i] = a.dilation[i];
        p.shared_by[i] = a.shared_by[i];
    }
    p.num_threads = work() < kWorthThreads ? 1 : threads;
    return p;
}

// Heads that share a key go in one call, with a key that is the same for all of them.
void Node::run(void* out, const nearsight_executor& executor, int threads) const {
    const Attributes& a = attributes;
    const nearsight_problem p = problem(threads);
    nearsight_tensor query = laid_out(inputs[kQuery].data, inputs[kQuery].shape, a.num_heads, channels_last);
    nearsight_tensor key = laid_out(inputs[kKey].data, inputs[kKey].shape, a.num_kv_heads, channels_last);
    nearsight_tensor value = laid_out(inputs[kValue].data, inputs[kValue].shape, a.num_kv_heads, channels_last);
    nearsight_tensor result = laid_out(out, out_shape(), a.num_heads, channels_last);
    const int64_t of_key = key.strides[1], of_value = value.strides[1];
    if (a.num_kv_heads != a.num_heads) key.strides[1] = value.strides[1] = 0;
    int64_t table = 1;
    for (int i = 0; i < a.rank && inputs[kBias].given; ++i) table *= entries(i);
    for (int64_t group = 0; group < groups(); ++group) {
        nearsight_inputs given = {query, key, value, nullptr, {}};
        nearsight_tensor target = result;
        const int64_t head = group * p.heads;
        given.query.data = past(query.data, head * query.strides[1], p.element_size);
        given.key.data = past(key.data, group * of_key, p.element_size);
        given.value.data = past(value.data, group * of_value, p.element_size);
        target.data = past(result.data, head * result.strides[1], p.element_size);
        if (inputs[kBias].given) given.bias = (const float*)inputs[kBias].data + head * table;
        for (int i = 0; i < a.rank; ++i)
            if (inputs[kRelative + i].given)
                given.relative[i] = (const float*)inputs[kRelative + i].data + head * entries(i) * p.head_dim;
        if (const int error = nearsight_forward_on(&executor, &p, &given, &target, nullptr))
            refuse(nearsight_error_string(error), Refusal::kKernel);
    }
}

}  // namespace nearsight
