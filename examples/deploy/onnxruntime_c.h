// SPDX-License-Identifier: Apache-2.0
//
// What onnxruntime.cpp uses of onnxruntime's C interface, of version 17: functions by their positions in its table,
// which only ever grows. pip's wheel has no header; where you have onnxruntime_c_api.h, use that.

#ifndef NEARSIGHT_EXAMPLES_ONNXRUNTIME_C_H
#define NEARSIGHT_EXAMPLES_ONNXRUNTIME_C_H

#include <cstddef>
#include <cstdint>

namespace ort {

constexpr uint32_t kVersion = 17;
enum Level : int { kWarning = 2 };
enum ElementType : int { kFloat = 1 };

struct Allocator;
struct Env;
struct MemoryInfo;
struct Metadata;
struct Options;
struct RunOptions;
struct Session;
struct Status;
struct Value;

struct Api {
    void* functions[118];
};

struct ApiBase {
    const Api* (*get_api)(uint32_t version);
    const char* (*get_version_string)();
};

#define ORT_FUNCTION(name, position, result, ...)                                  \
    template <class... Arguments>                                                  \
    result name(const Api* api, Arguments... arguments) {                          \
        return ((result(*)(__VA_ARGS__))api->functions[position])(arguments...);   \
    }
ORT_FUNCTION(message_of, 2, const char*, const Status*)
ORT_FUNCTION(create_env, 3, Status*, Level, const char*, Env**)
ORT_FUNCTION(create_session, 7, Status*, const Env*, const char*, const Options*, Session**)
ORT_FUNCTION(run, 9, Status*, Session*, const RunOptions*, const char* const*, const Value* const*, size_t,
             const char* const*, size_t, Value**)
ORT_FUNCTION(create_options, 10, Status*, Options**)
ORT_FUNCTION(tensor_of, 49, Status*, const MemoryInfo*, void*, size_t, const int64_t*, size_t, ElementType, Value**)
ORT_FUNCTION(data_of, 51, Status*, Value*, void**)
ORT_FUNCTION(cpu_memory, 69, Status*, int, int, MemoryInfo**)
ORT_FUNCTION(default_allocator, 78, Status*, Allocator**)
ORT_FUNCTION(session_metadata, 111, Status*, const Session*, Metadata**)
ORT_FUNCTION(custom_metadata, 116, Status*, const Metadata*, Allocator*, const char*, char**)
#undef ORT_FUNCTION

}  // namespace ort

extern "C" const ort::ApiBase* OrtGetApiBase();

#endif
