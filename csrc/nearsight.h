// SPDX-License-Identifier: Apache-2.0
//
// nearsight: local attention on the CPU, forward and backward. This header is the whole contract.
//
// Every query of a map of 1, 2 or 3 axes attends to a block of cells around it (docs/design.md has the exact rules):
//     logit[c] = scale * (q . k[c] + sum over axes q . relative[axis][entry]) + bias[entries]
//     out      = sum over cells c of softmax(logit)[c] * v[c]
//
// Layout    A tensor has the logical shape (batch, heads, *axes, channels) and any strides, counted in elements. query,
//           out and their gradients have the axes of the output, ceil(size / stride); key and value those of the input.
//           Negative strides are refused; a stride of 0 (an expanded tensor) is fine for inputs only.
// Alignment that of the element type.
// Aliasing  inputs may alias one another; nothing that is written may alias anything else.
// Types     query, key, value, out and their gradients share one dtype. Arithmetic is float32. bias, relative, lse and
//           the gradients of bias and relative are contiguous float32. The caller says how large its elements are, and
//           nothing is touched where that is not what the dtype says: memory of another type would be overrun.
// Windows   may differ from axis to axis in all that says where a query looks. Where shared_by is above one, the
//           queries of so many neighbouring cells share the window of the one in their middle; on a causal axis that of
//           the last, where none sees a key after itself.
// Tables    entries per axis: kernel, or 2 * kernel - 1 with NEARSIGHT_BORDER_SHIFT or where a window is shared.
//           bias: (heads, *entries); relative[axis]: (heads, entries[axis], head_dim). NULL means none.
// lse       natural logarithm of the softmax denominator, (batch, heads, *output axes).
// Threads   num_threads at most, from the OpenMP runtime that the process already has, or the caller's; results are the
//           same bit for bit for every number of threads. Calls may come from several threads at once. The child of a
//           fork runs on one thread.
// Returns   NEARSIGHT_OK, or an error and no tensor was touched (except for NEARSIGHT_ERROR_MEMORY in the midst of
//           work, after which the outputs are unspecified).

#ifndef NEARSIGHT_H
#define NEARSIGHT_H

#include <stdint.h>

#define NEARSIGHT_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

#define NEARSIGHT_ABI_VERSION 5

enum {  // what a call returns
    NEARSIGHT_OK = 0,
    NEARSIGHT_ERROR_VERSION = 1,      // struct_size or abi_version is not the one of this header
    NEARSIGHT_ERROR_NULL = 2,         // a pointer that must be given is NULL
    NEARSIGHT_ERROR_ENUM = 3,         // unknown rank, dtype, border or instruction set
    NEARSIGHT_ERROR_SIZE = 4,         // a size below what it may be, or a window shared by more cells than it has
    NEARSIGHT_ERROR_STRIDE = 5,       // a stride is negative, or 0 in a tensor that is written
    NEARSIGHT_ERROR_OVERFLOW = 6,     // sizes or strides whose products leave the address space
    NEARSIGHT_ERROR_UNSUPPORTED = 7,  // right, but not for this kernel (a block of too many cells)
    NEARSIGHT_ERROR_ISA = 8,          // this build or this processor lacks the instruction set that was asked for
    NEARSIGHT_ERROR_ENVIRONMENT = 9,  // NEARSIGHT_ISA names no instruction set, nor is it auto
    NEARSIGHT_ERROR_MEMORY = 10,      // out of memory
    NEARSIGHT_ERROR_SCRATCH = 11,     // right, but a thread would need more scratch memory than it may have
    NEARSIGHT_ERROR_ELEMENT = 12,     // the caller's elements are of another size than the dtype's
};

enum { NEARSIGHT_FLOAT32 = 0, NEARSIGHT_BFLOAT16 = 1 };
enum { NEARSIGHT_BORDER_MASK = 0, NEARSIGHT_BORDER_ZEROS = 1, NEARSIGHT_BORDER_SHIFT = 2, NEARSIGHT_BORDER_WRAP = 3 };
enum {  // NEARSIGHT_ISA_AUTO obeys the environment variable NEARSIGHT_ISA, then takes what pays here
    NEARSIGHT_ISA_AUTO = 0,
    NEARSIGHT_ISA_BASELINE = 1,
    NEARSIGHT_ISA_AVX2 = 2,
    NEARSIGHT_ISA_AVX512 = 3,
    NEARSIGHT_ISA_NEON = 4,
    NEARSIGHT_ISA_AVX512_BF16 = 5,  // bfloat16 numbers are multiplied in pairs; float32 as with AVX512
};

typedef struct {
    uint32_t struct_size;  // sizeof(nearsight_problem)
    uint32_t abi_version;  // NEARSIGHT_ABI_VERSION
    int32_t rank;          // 1, 2 or 3; only the first `rank` entries of the arrays below are read
    int32_t dtype;
    int32_t isa;
    int32_t num_threads;  // at least 1
    int32_t element_size;  // bytes of an element of query, key, value, out and their gradients
    int32_t scalar_size;   // bytes of an element of bias, relative, lse and the gradients of bias and relative
    int32_t border[3];
    int32_t causal[3];  // 0 or 1
    int64_t batch, heads, head_dim, value_dim;
    int64_t size[3];  // cells of key and value per axis
    int64_t kernel[3], stride[3], dilation[3], shared_by[3];
    double scale;
} nearsight_problem;

typedef struct {
    void* data;  // may be NULL when the tensor has no elements
    int64_t strides[6];  // batch, head, one per axis, channel: rank + 3 are read
} nearsight_tensor;

typedef struct {
    nearsight_tensor query, key, value;
    const float* bias;
    const float* relative[3];
} nearsight_inputs;

typedef struct {  // NULL: not wanted
    const nearsight_tensor *query, *key, *value;
    float* bias;
    float* relative[3];
} nearsight_gradients;

// lse may be NULL when no backward will follow.
NEARSIGHT_API int nearsight_forward(const nearsight_problem* problem, const nearsight_inputs* inputs,
                                    const nearsight_tensor* out, float* lse);

// What query, key and value of every head are made of: weight * input + bias.
typedef struct {
    nearsight_tensor input;  // as a tensor of one head; float32 is all that it may be
    int64_t channels;
    const float* weight;  // (2 * heads * head_dim + heads * value_dim, channels), contiguous: queries, keys, values
    const float* bias;    // one for each row of weight, or NULL
} nearsight_projection;

// A forward that makes query, key and value itself, row by row, and keeps none. Of `tables` only bias and relative are
// read. Every stride must be 1.
NEARSIGHT_API int nearsight_forward_projected(const nearsight_problem* problem, const nearsight_projection* projection,
                                              const nearsight_inputs* tables, const nearsight_tensor* out, float* lse);

// Threads of the caller's own: calls job(data, i) once for every i below count, on any of them and in any order, and
// returns when all are done.
typedef struct {
    void (*run)(void* context, void (*job)(void* data, int64_t i), void* data, int64_t count);
    void* context;
} nearsight_executor;

// The same on these threads; num_threads says how many there are, about. The same bits.
NEARSIGHT_API int nearsight_forward_on(const nearsight_executor* executor, const nearsight_problem* problem,
                                       const nearsight_inputs* inputs, const nearsight_tensor* out, float* lse);

// out and lse are those of the forward, grad_out is the gradient of out.
NEARSIGHT_API int nearsight_backward(const nearsight_problem* problem, const nearsight_inputs* inputs,
                                     const nearsight_tensor* out, const float* lse, const nearsight_tensor* grad_out,
                                     const nearsight_gradients* gradients);

// NEARSIGHT_OK when a problem can run here, else the error its calls would return: of the forward, and unless
// `backward` is 0 of a backward that everything is wanted of. Looks at no tensor.
NEARSIGHT_API int nearsight_check(const nearsight_problem* problem, int32_t backward);

NEARSIGHT_API int nearsight_abi_version(void);
NEARSIGHT_API const char* nearsight_error_string(int error);

// Bit 1 << NEARSIGHT_ISA_X is set when X was built in and this processor can run it.
NEARSIGHT_API int nearsight_available_isas(void);
// What NEARSIGHT_ISA_AUTO means now: an instruction set, or a negated error.
NEARSIGHT_API int nearsight_default_isa(void);
NEARSIGHT_API const char* nearsight_isa_name(int isa);  // NULL when unknown
NEARSIGHT_API int nearsight_has_openmp(void);

#ifdef __cplusplus
}
#endif

#endif
