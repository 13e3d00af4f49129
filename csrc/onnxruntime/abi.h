// SPDX-License-Identifier: Apache-2.0
//
// What is used of onnxruntime's C interface, of version 17. Its table of functions only ever grows at its end, so that
// a library which asks for version 17 is served by every later onnxruntime. Neither the wheel nor its package for
// Debian carries the header; these are its facts: positions in the table, and the layout of one structure.

#ifndef NEARSIGHT_ONNXRUNTIME_ABI_H
#define NEARSIGHT_ONNXRUNTIME_ABI_H

#include <stddef.h>
#include <stdint.h>

namespace onnxruntime {

constexpr uint32_t kVersion = 17;  // that of onnxruntime 1.17

struct Status;
struct SessionOptions;
struct Domain;
struct KernelInfo;
struct KernelContext;
struct ShapeInferContext;
struct Value;
struct TensorInfo;

struct Operator;

struct Api {
    void* functions[275];
};

struct ApiBase {
    const Api* (*get_api)(uint32_t version);
    const char* (*get_version_string)();
};

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2, kInvalidGraph = 10 };
enum ElementType : int { kUndefined = 0, kFloat = 1, kBfloat16 = 16 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };

// A function of the table by its position and type.
#define NEARSIGHT_ORT(name, position, ...)                            \
    template <class... Arguments>                                     \
    auto name(const Api* api, Arguments... arguments) {               \
        return ((__VA_ARGS__)api->functions[position])(arguments...); \
    }
NEARSIGHT_ORT(create_status, 0, Status* (*)(ErrorCode, const char*))
NEARSIGHT_ORT(create_domain, 26, Status* (*)(const char*, Domain**))
NEARSIGHT_ORT(add_operator, 27, Status* (*)(Domain*, const Operator*))
NEARSIGHT_ORT(add_domain, 28, Status* (*)(SessionOptions*, Domain*))
NEARSIGHT_ORT(tensor_data, 51, Status* (*)(Value*, void**))
NEARSIGHT_ORT(element_type, 60, Status* (*)(const TensorInfo*, ElementType*))
NEARSIGHT_ORT(rank_of, 61, Status* (*)(const TensorInfo*, size_t*))
NEARSIGHT_ORT(dimensions, 62, Status* (*)(const TensorInfo*, int64_t*, size_t))
NEARSIGHT_ORT(tensor_info, 65, Status* (*)(const Value*, TensorInfo**))
NEARSIGHT_ORT(attribute_float, 85, Status* (*)(const KernelInfo*, const char*, float*))
NEARSIGHT_ORT(attribute_int, 86, Status* (*)(const KernelInfo*, const char*, int64_t*))
NEARSIGHT_ORT(attribute_string, 87, Status* (*)(const KernelInfo*, const char*, char*, size_t*))
NEARSIGHT_ORT(input_count, 88, Status* (*)(const KernelContext*, size_t*))
NEARSIGHT_ORT(input, 90, Status* (*)(const KernelContext*, size_t, const Value**))
NEARSIGHT_ORT(output, 91, Status* (*)(KernelContext*, size_t, const int64_t*, size_t, Value**))
NEARSIGHT_ORT(release_status, 93, void (*)(Status*))
NEARSIGHT_ORT(release_tensor_info, 99, void (*)(TensorInfo*))
NEARSIGHT_ORT(release_domain, 101, void (*)(Domain*))
NEARSIGHT_ORT(attribute_ints, 163, Status* (*)(const KernelInfo*, const char*, int64_t*, size_t*))
NEARSIGHT_ORT(parallel_for, 274, Status* (*)(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*))
#undef NEARSIGHT_ORT

struct Operator {
    uint32_t version;
    void* (*create_kernel)(const Operator*, const Api*, const KernelInfo*);  // not called where there is another below
    const char* (*name)(const Operator*);
    const char* (*provider)(const Operator*);
    ElementType (*input_type)(const Operator*, size_t);
    size_t (*input_type_count)(const Operator*);
    ElementType (*output_type)(const Operator*, size_t);
    size_t (*output_type_count)(const Operator*);
    void (*kernel_compute)(void*, KernelContext*);
    void (*kernel_destroy)(void*);
    Characteristic (*input_characteristic)(const Operator*, size_t);
    Characteristic (*output_characteristic)(const Operator*, size_t);
    int (*input_memory)(const Operator*, size_t);
    int (*variadic_input_least)(const Operator*);
    int (*variadic_input_alike)(const Operator*);
    int (*variadic_output_least)(const Operator*);
    int (*variadic_output_alike)(const Operator*);
    Status* (*create_kernel_2)(const Operator*, const Api*, const KernelInfo*, void**);
    Status* (*kernel_compute_2)(void*, KernelContext*);
    Status* (*infer_shape)(const Operator*, ShapeInferContext*);
    int (*first_version)(const Operator*);
    int (*last_version)(const Operator*);
};

}  // namespace onnxruntime

#endif
