// SPDX-License-Identifier: Apache-2.0
//
// A network of `nearsight export DIR --format aoti` in a program without Python, by PyTorch's C++ library:
//
//     TORCH=$(python -c 'import torch; print(torch.__path__[0])')
//     g++ -std=c++20 -isystem "$TORCH/include" examples/deploy/aoti.cpp -o classify \
//         -L"$TORCH/lib" -Wl,-rpath,"$TORCH/lib" -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 -ldl
//     ./classify runs/demo/model-aoti.pt2 "$(nearsight deploy aoti | head -1)" picture.pgm

#include <ATen/ops/from_blob.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include "picture.h"

namespace {

void classify(const char* package, const char* library, const char* path) {
    if (!dlopen(library, RTLD_NOW)) throw std::runtime_error(dlerror());  // registers nearsight::attend
    torch::inductor::AOTIModelPackageLoader network(package);
    const std::string notes = network.get_metadata().at("nearsight");
    Picture picture = read_picture(path);
    normalize(picture, notes);
    const at::Tensor pictures =
        at::from_blob(picture.values.data(), {1, picture.channels, picture.height, picture.width});
    const at::Tensor logits = network.run({pictures}).at(0).contiguous();
    print_answer(logits.const_data_ptr<float>(), notes);
}

}  // namespace

int main(int count, char** arguments) try {
    if (count != 4) throw std::runtime_error("usage: classify PACKAGE.pt2 LIBRARY PICTURE.pgm|PICTURE.ppm");
    classify(arguments[1], arguments[2], arguments[3]);
    return 0;
} catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
