// SPDX-License-Identifier: Apache-2.0
//
// A network of `nearsight export DIR --format onnx --operators native` in a program of OpenVINO's:
//
//     OPENVINO=$(python -c 'import openvino; print(openvino.__path__[0])')
//     g++ -std=c++17 -isystem "$OPENVINO/include" examples/deploy/openvino.cpp "$OPENVINO"/libs/libopenvino.so.* \
//         -Wl,-rpath,"$OPENVINO/libs" -o classify
//     ./classify runs/demo/model.onnx "$(nearsight deploy openvino | head -1)" picture.pgm

#include <openvino/openvino.hpp>

#include "picture.h"

namespace {

void classify(const char* model, const char* library, const char* path) {
    ov::Core core;
    core.add_extension(library);
    const std::shared_ptr<ov::Model> read = core.read_model(model);
    ov::CompiledModel network = core.compile_model(read, "CPU", ov::hint::inference_precision(ov::element::f32));
    // What an ONNX file has for metadata, OpenVINO has under "framework".
    const std::string notes = read->get_rt_info<std::string>("framework", "nearsight");
    Picture picture = read_picture(path);
    normalize(picture, notes);
    const ov::Shape shape = {1, (size_t)picture.channels, (size_t)picture.height, (size_t)picture.width};
    ov::InferRequest request = network.create_infer_request();
    request.set_input_tensor(ov::Tensor(ov::element::f32, shape, picture.values.data()));
    request.infer();
    print_answer(request.get_output_tensor().data<float>(), notes);
}

}  // namespace

int main(int count, char** arguments) try {
    if (count != 4) throw std::runtime_error("usage: classify MODEL.onnx LIBRARY PICTURE.pgm|PICTURE.ppm");
    classify(arguments[1], arguments[2], arguments[3]);
    return 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
