// SPDX-License-Identifier: Apache-2.0
//
// The C ABI. All but the kernels is compiled without instruction set flags, so that it runs on any processor.

#include "nearsight.h"

#include <new>

#include "call.h"
#include "check.h"
#include "isa.h"

using namespace nearsight;

int nearsight_check(const nearsight_problem* problem, int32_t backward) try {
    if (int error = check_problem(problem)) return error;
    const int isa = resolve_isa(problem->isa);
    if (isa < 0) return -isa;
    if (!has_work(*problem)) return NEARSIGHT_OK;
    if (int error = check_scratch(*problem, isa, false)) return error;
    return backward ? check_scratch(*problem, isa, true) : NEARSIGHT_OK;
} catch (const std::bad_alloc&) {
    return NEARSIGHT_ERROR_MEMORY;
}

int nearsight_forward(const nearsight_problem* problem, const nearsight_inputs* inputs, const nearsight_tensor* out,
                      float* lse) {
    return nearsight_forward_on(nullptr, problem, inputs, out, lse);
}

int nearsight_forward_on(const nearsight_executor* executor, const nearsight_problem* problem,
                         const nearsight_inputs* inputs, const nearsight_tensor* out, float* lse) try {
    if (executor && !executor->run) return NEARSIGHT_ERROR_NULL;
    if (int error = check_forward(problem, inputs, out)) return error;
    const int isa = resolve_isa(problem->isa);
    if (isa < 0) return -isa;
    if (!has_work(*problem)) return NEARSIGHT_OK;
    return forward(*problem, *inputs, *out, lse, isa, executor);
} catch (const std::bad_alloc&) {
    return NEARSIGHT_ERROR_MEMORY;
}

int nearsight_forward_projected(const nearsight_problem* problem, const nearsight_projection* projection,
                                const nearsight_inputs* tables, const nearsight_tensor* out, float* lse) try {
    if (int error = check_projected(problem, projection, tables, out)) return error;
    const int isa = resolve_isa(problem->isa);
    if (isa < 0) return -isa;
    if (!has_work(*problem)) return NEARSIGHT_OK;
    return forward_projected(*problem, *projection, *tables, *out, lse, isa);
} catch (const std::bad_alloc&) {
    return NEARSIGHT_ERROR_MEMORY;
}

int nearsight_backward(const nearsight_problem* problem, const nearsight_inputs* inputs, const nearsight_tensor* out,
                       const float* lse, const nearsight_tensor* grad_out, const nearsight_gradients* gradients) try {
    if (int error = check_backward(problem, inputs, out, lse, grad_out, gradients)) return error;
    const int isa = resolve_isa(problem->isa);
    if (isa < 0) return -isa;
    if (!has_work(*problem)) return zero_tables(*problem, *gradients);
    return backward(*problem, *inputs, *out, lse, *grad_out, *gradients, isa);
} catch (const std::bad_alloc&) {
    return NEARSIGHT_ERROR_MEMORY;
}

int nearsight_abi_version(void) { return NEARSIGHT_ABI_VERSION; }

const char* nearsight_error_string(int error) {
    switch (error) {
        case NEARSIGHT_OK: return "no error";
        case NEARSIGHT_ERROR_VERSION: return "the caller was written for another version of the library's interface";
        case NEARSIGHT_ERROR_NULL: return "a required pointer is NULL";
        case NEARSIGHT_ERROR_ENUM: return "unknown rank, dtype, border, causal flag or instruction set";
        case NEARSIGHT_ERROR_SIZE: return "a size is out of range";
        case NEARSIGHT_ERROR_STRIDE: return "a stride is negative, or zero in a tensor to be written";
        case NEARSIGHT_ERROR_OVERFLOW: return "sizes or strides are too large to address";
        case NEARSIGHT_ERROR_UNSUPPORTED: return "the block of cells is too large for the native kernel";
        case NEARSIGHT_ERROR_ISA: return "this build or processor lacks the instruction set";
        case NEARSIGHT_ERROR_ENVIRONMENT:
            return "NEARSIGHT_ISA must be auto, baseline, avx2, avx512, avx512_bf16 or neon";
        case NEARSIGHT_ERROR_MEMORY: return "out of memory";
        case NEARSIGHT_ERROR_SCRATCH: return "the native kernel's scratch memory would exceed 2 GiB per thread";
        case NEARSIGHT_ERROR_ELEMENT: return "an element's size is not that of the dtype";
        default: return "unknown error";
    }
}

int nearsight_available_isas(void) {
    int isas = 0;
    for (int isa = NEARSIGHT_ISA_AUTO + 1; isa < kIsaCount; ++isa)
        if (kernel_of(isa)) isas |= 1 << isa;
    return isas;
}

int nearsight_default_isa(void) { return resolve_isa(NEARSIGHT_ISA_AUTO); }

const char* nearsight_isa_name(int isa) { return isa >= 0 && isa < kIsaCount ? kIsaNames[isa] : nullptr; }

int nearsight_has_openmp(void) {
#if defined(_OPENMP)
    return 1;
#else
    return 0;
#endif
}
