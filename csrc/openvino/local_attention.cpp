// SPDX-License-Identifier: Apache-2.0
//
// nearsight::LocalAttention, version 1, as an operation of OpenVINO's and of its reader of ONNX. OpenVINO's interface
// is of one version: nearsight.deploy.openvino_library() compiles this against the headers of what is installed.

#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <algorithm>

#include <openvino/core/op_extension.hpp>
#include <openvino/frontend/onnx/extension/conversion.hpp>
#include <openvino/op/constant.hpp>
#include <openvino/op/op.hpp>
#include <openvino/op/transpose.hpp>

#include "../node.h"

namespace {

using nearsight::Array;
using nearsight::Attributes;

// On the threads that OpenVINO gave this inference, in whose arena it is called.
void on_arena(void*, void (*job)(void*, int64_t), void* data, int64_t count) {
    tbb::parallel_for(
        tbb::blocked_range<int64_t>(0, count, 1),
        [&](const tbb::blocked_range<int64_t>& some) {
            for (int64_t i = some.begin(); i < some.end(); ++i) job(data, i);
        },
        tbb::simple_partitioner());
}

int threads() { return tbb::this_task_arena::max_concurrency(); }

template <class Work>
void guarded(Work work) {
    try {
        work();
    } catch (const nearsight::Refusal& error) {
        OPENVINO_THROW("nearsight::LocalAttention: ", error.text);
    }
}

// Of (batch, channels, *axes) that lie as (batch, *axes, channels), and back.
template <class Shape>
Shape channels_last(Shape shape) {
    std::rotate(shape.begin() + 1, shape.begin() + 2, shape.end());
    return shape;
}

template <class Shape>
Shape channels_first(Shape shape) {
    std::rotate(shape.begin() + 1, shape.end() - 1, shape.end());
    return shape;
}

// What an input of a graph is for: nodes of OpenVINO have no empty inputs, so that each says which it has.
using Slots = std::vector<int64_t>;

}  // namespace

class LocalAttention : public ov::op::Op {
  public:
    OPENVINO_OP("LocalAttention", "nearsight");

    LocalAttention() = default;
    LocalAttention(const ov::OutputVector& inputs, const Slots& slots, const Attributes& attributes, bool last)
        : Op(inputs), slots_(slots), attributes_(attributes), last_(last) {
        constructor_validate_and_infer_types();
    }

    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("num_heads", attributes_.num_heads);
        visitor.on_attribute("num_kv_heads", attributes_.num_kv_heads);
        visitor.on_attribute("rank", attributes_.rank);
        visitor.on_attribute("kernel_size", attributes_.kernel_size);
        visitor.on_attribute("stride", attributes_.stride);
        visitor.on_attribute("dilation", attributes_.dilation);
        visitor.on_attribute("causal", attributes_.causal);
        visitor.on_attribute("shared_by", attributes_.shared_by);
        visitor.on_attribute("border", attributes_.border);
        visitor.on_attribute("scale", attributes_.scale);
        visitor.on_attribute("inputs", slots_);
        visitor.on_attribute("channels_last", last_);
        return true;
    }

    std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<LocalAttention>(inputs, slots_, attributes_, last_);
    }

    void validate_and_infer_types() override {
        guarded([&] { nearsight::check(attributes_); });
        check_slots();
        const ov::element::Type type = get_input_element_type(0);
        if (type != ov::element::dynamic) dtype_of(type);
        for (size_t i = 0; i < get_input_size(); ++i) check_type(i, type);
        set_output_type(0, type, out_shape());
    }

    bool has_evaluate() const override { return true; }

    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        guarded([&] {
            nearsight::Node node = {attributes_, dtype_of(inputs[0].get_element_type()), {}, last_};
            for (size_t i = 0; i < inputs.size(); ++i)
                node.inputs[slots_[i]] = array(const_cast<void*>(inputs[i].data()), given(i, inputs[i].get_shape()));
            const std::vector<int64_t> shape = made(node.out_shape());
            outputs[0].set_shape(ov::Shape(shape.begin(), shape.end()));
            node.run(outputs[0].data(), {on_arena, nullptr}, threads());
        });
        return true;
    }

  private:
    // Shapes as the specification has them, from those of the inputs, and the output's from them.
    template <class Shape>
    Shape given(size_t i, const Shape& shape) const {
        return last_ && slots_[i] < nearsight::kBias && shape.size() > 2 ? channels_first(shape) : shape;
    }

    template <class Shape>
    Shape made(const Shape& shape) const {
        return last_ ? channels_last(shape) : shape;
    }

    static int32_t dtype_of(const ov::element::Type& type) {
        OPENVINO_ASSERT(type == ov::element::f32 || type == ov::element::bf16,
                        "nearsight::LocalAttention takes float32 and bfloat16; received ", type);
        return type == ov::element::bf16 ? NEARSIGHT_BFLOAT16 : NEARSIGHT_FLOAT32;
    }

    static Array array(void* data, const ov::Shape& shape) {
        return {data, std::vector<int64_t>(shape.begin(), shape.end()), true};
    }

    void check_slots() const {
        bool right = slots_.size() == get_input_size();
        for (size_t i = 0; i < slots_.size(); ++i)
            right = right && slots_[i] < nearsight::kInputs && slots_[i] > (i ? slots_[i - 1] : -1);
        OPENVINO_ASSERT(right, "nearsight::LocalAttention: the attribute inputs does not fit its inputs");
    }

    void check_type(size_t i, const ov::element::Type& of_query) const {
        const ov::element::Type found = get_input_element_type(i);
        const ov::element::Type right = slots_[i] < nearsight::kBias ? of_query : ov::element::Type(ov::element::f32);
        OPENVINO_ASSERT(found == right || found == ov::element::dynamic,
                        "nearsight::LocalAttention: input ", slots_[i], " must be ", right, "; it is ", found);
    }

    // Open sizes stay so; where none is, shapes that do not fit are refused before anything runs.
    ov::PartialShape out_shape() const {
        bool known = true;
        nearsight::Node node = {attributes_, NEARSIGHT_FLOAT32, {}};
        for (size_t i = 0; i < get_input_size(); ++i) {
            const ov::PartialShape& shape = get_input_partial_shape(i);
            known = known && shape.is_static();
            if (known) node.inputs[slots_[i]] = array(nullptr, given(i, shape.to_shape()));
        }
        if (known) {
            std::vector<int64_t> shape;
            guarded([&] { shape = made(node.out_shape()); });
            return ov::PartialShape(std::vector<ov::Dimension>(shape.begin(), shape.end()));
        }
        ov::PartialShape shape = get_input_partial_shape(0);
        const ov::PartialShape value = get_input_size() > 2 ? get_input_partial_shape(2) : ov::PartialShape::dynamic();
        if (shape.rank().is_dynamic() || shape.size() < 2) return ov::PartialShape::dynamic(attributes_.rank + 2);
        const size_t channels = last_ ? shape.size() - 1 : 1;
        const bool open = value.rank().is_dynamic() || value.size() != shape.size() || value[channels].is_dynamic();
        shape[channels] = open
            ? ov::Dimension::dynamic()
            : ov::Dimension(value[channels].get_length() / attributes_.num_kv_heads * attributes_.num_heads);
        return shape;
    }

    Slots slots_;
    Attributes attributes_;
    bool last_ = false;
};

namespace {

// A node of ONNX. What it misses is refused as onnxruntime's operator does.
class FromOnnx {
  public:
    explicit FromOnnx(const ov::frontend::NodeContext& node) : node_(node) {}

    Attributes attributes() const {
        Attributes a;
        a.rank = read<int64_t>("rank");
        a.num_heads = read<int64_t>("num_heads");
        a.num_kv_heads = read<int64_t>("num_kv_heads");
        a.kernel_size = read<std::vector<int64_t>>("kernel_size");
        a.stride = read<std::vector<int64_t>>("stride");
        a.dilation = read<std::vector<int64_t>>("dilation");
        a.causal = read<std::vector<int64_t>>("causal");
        a.shared_by = read<std::vector<int64_t>>("shared_by");
        a.border = read<std::string>("border");
        a.scale = read<float, double>("scale");
        return a;
    }

  private:
    template <class T, class OrAs = T>
    T read(const char* name) const {
        const ov::Any value = node_.get_attribute_as_any(name);
        OPENVINO_ASSERT(value.is<T>() || value.is<OrAs>(), "nearsight::LocalAttention: the attribute ", name,
                        " is missing, or of another type");
        return value.as<T>();
    }

    const ov::frontend::NodeContext& node_;
};

ov::Output<ov::Node> transposed(const ov::Output<ov::Node>& map, const std::vector<int64_t>& order) {
    const auto constant = ov::op::v0::Constant::create(ov::element::i64, {order.size()}, order);
    return std::make_shared<ov::op::v1::Transpose>(map, constant);
}

bool are_maps(const ov::frontend::NodeContext& node, int64_t rank) {
    if (node.get_input_size() < nearsight::kBias) return false;
    for (int i = 0; i < nearsight::kBias; ++i) {
        const ov::Rank found = node.get_input(i).get_partial_shape().rank();
        if (found.is_dynamic() || found.get_length() != rank + 2) return false;
    }
    return true;
}

// Convolutions leave the channels of a cell side by side here: to transpose moves nothing then, where to ask for planes
// would. What are no maps is refused by the node.
ov::OutputVector converted(const ov::frontend::NodeContext& node) {
    Attributes attributes = FromOnnx(node).attributes();
    guarded([&] { nearsight::check(attributes); });
    const bool last = are_maps(node, attributes.rank);
    std::vector<int64_t> order;
    for (int64_t i = 0; i < attributes.rank + 2; ++i) order.push_back(i);
    ov::OutputVector inputs;
    Slots slots;
    for (size_t i = 0; i < node.get_input_size(); ++i) {
        const ov::Output<ov::Node> one = node.get_input((int)i);
        if (std::string(one.get_node()->get_type_name()) == "NullNode") continue;  // an empty name
        inputs.push_back(last && i < nearsight::kBias ? transposed(one, channels_last(order)) : one);
        slots.push_back((int64_t)i);
    }
    const auto made = std::make_shared<LocalAttention>(inputs, slots, attributes, last);
    return {last ? transposed(made, channels_first(order)) : ov::Output<ov::Node>(made)};
}

}  // namespace

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>(
    {std::make_shared<ov::OpExtension<LocalAttention>>(),
     std::make_shared<ov::frontend::onnx::ConversionExtension>("LocalAttention", "nearsight", converted)}));
