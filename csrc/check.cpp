// SPDX-License-Identifier: Apache-2.0

#include "check.h"

#include <algorithm>

#include "geometry.h"

namespace nearsight {

namespace {

constexpr int64_t kLargest = (int64_t)1 << 31;       // any size
constexpr int64_t kMostBytes = (int64_t)1 << 62;     // any tensor
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

}  // namespace

bool has_work(const nearsight_problem& p) { return !shape_of(p, false, p.head_dim).empty(); }

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

int check_forward(const nearsight_problem* p, const nearsight_inputs* inputs, const nearsight_tensor* out) {
    if (int error = check_problem(p)) return error;
    if (int error = check_inputs(*p, inputs)) return error;
    return check_tensor(out, shape_of(*p, true, p->value_dim), true);
}

int check_projected(const nearsight_problem* p, const nearsight_projection* projection, const nearsight_inputs* tables,
                    const nearsight_tensor* out) {
    if (int error = check_problem(p)) return error;
    if (!projection || !tables) return NEARSIGHT_ERROR_NULL;
    if (p->dtype != NEARSIGHT_FLOAT32) return NEARSIGHT_ERROR_ENUM;
    for (int axis = 0; axis < p->rank; ++axis)
        if (p->stride[axis] != 1) return NEARSIGHT_ERROR_SIZE;
    int64_t rows, unused;
    if (projection->channels < 1) return NEARSIGHT_ERROR_SIZE;
    if (projection->channels >= kLargest) return NEARSIGHT_ERROR_OVERFLOW;
    if (!multiply(p->heads, 2 * p->head_dim + p->value_dim, kMostBytes / 8, &rows) ||
        !multiply(rows, projection->channels, kMostBytes / 8, &unused))
        return NEARSIGHT_ERROR_OVERFLOW;
    if (!projection->weight && has_work(*p)) return NEARSIGHT_ERROR_NULL;
    Shape input = shape_of(*p, false, projection->channels);
    input.sizes[1] = 1;
    if (int error = check_tensor(&projection->input, input, false)) return error;
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

}  // namespace nearsight
