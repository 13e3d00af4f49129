// SPDX-License-Identifier: Apache-2.0
//
// A network of `nearsight export DIR --format onnx --operators native` in a program of onnxruntime's C interface:
//
//     RUNTIME=$(python -c 'import onnxruntime; print(onnxruntime.__path__[0])')
//     ln -sf "$RUNTIME"/capi/libonnxruntime.so.1.* libonnxruntime.so.1  # as it is called; not so in the wheel
//     g++ -std=c++17 examples/deploy/onnxruntime.cpp libonnxruntime.so.1 -Wl,-rpath,'$ORIGIN' -ldl -o classify
//     ./classify runs/demo/model.onnx "$(nearsight deploy onnxruntime | head -1)" picture.pgm

#include <dlfcn.h>

#include "onnxruntime_c.h"
#include "picture.h"

namespace {

const ort::Api* api = nullptr;

void check(ort::Status* status) {
    if (status) throw std::runtime_error(ort::message_of(api, (const ort::Status*)status));
}

// What nearsight's library exports for RegisterCustomOpsLibrary; calling it does the same.
void register_attention(ort::Options* options, const char* library) {
    void* handle = dlopen(library, RTLD_NOW);
    if (!handle) throw std::runtime_error(dlerror());
    const auto enter = (ort::Status * (*)(ort::Options*, const ort::ApiBase*)) dlsym(handle, "RegisterCustomOps");
    if (!enter) throw std::runtime_error(dlerror());
    check(enter(options, OrtGetApiBase()));
}

std::string notes_of(const ort::Session* session) {
    ort::Metadata* metadata = nullptr;
    ort::Allocator* allocator = nullptr;
    char* notes = nullptr;
    check(ort::session_metadata(api, session, &metadata));
    check(ort::default_allocator(api, &allocator));
    check(ort::custom_metadata(api, (const ort::Metadata*)metadata, allocator, "nearsight", &notes));
    if (!notes) throw std::runtime_error("the file has no notes of nearsight's");
    return notes;
}

void classify(const char* model, const char* library, const char* path) {
    ort::Env* env = nullptr;
    ort::Options* options = nullptr;
    ort::Session* session = nullptr;
    check(ort::create_env(api, ort::kWarning, "classify", &env));
    check(ort::create_options(api, &options));
    register_attention(options, library);
    check(ort::create_session(api, (const ort::Env*)env, model, (const ort::Options*)options, &session));

    const std::string notes = notes_of(session);
    Picture picture = read_picture(path);
    normalize(picture, notes);

    const int64_t shape[] = {1, picture.channels, picture.height, picture.width};
    ort::MemoryInfo* memory = nullptr;
    ort::Value *pictures = nullptr, *logits = nullptr;
    check(ort::cpu_memory(api, 0, 0, &memory));
    check(ort::tensor_of(api, (const ort::MemoryInfo*)memory, (void*)picture.values.data(),
                         picture.values.size() * sizeof(float), shape, (size_t)4, ort::kFloat, &pictures));
    const char *inputs[] = {"pictures"}, *outputs[] = {"logits"};
    const ort::Value* given[] = {pictures};
    check(ort::run(api, session, nullptr, inputs, given, (size_t)1, outputs, (size_t)1, &logits));
    void* data = nullptr;
    check(ort::data_of(api, logits, &data));
    print_answer((const float*)data, notes);
}

}  // namespace

int main(int count, char** arguments) try {
    if (count != 4) throw std::runtime_error("usage: classify MODEL.onnx LIBRARY PICTURE.pgm|PICTURE.ppm");
    api = OrtGetApiBase()->get_api(ort::kVersion);
    if (!api) throw std::runtime_error("onnxruntime is older than 1.17");
    classify(arguments[1], arguments[2], arguments[3]);
    return 0;  // the process takes back what was made
} catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
