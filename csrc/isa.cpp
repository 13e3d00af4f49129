// SPDX-License-Identifier: Apache-2.0

#include "isa.h"

#include <stdlib.h>
#include <string.h>

#include <initializer_list>

#include "nearsight.h"

namespace nearsight {

extern const Kernel kernel_baseline;
#if defined(NEARSIGHT_WITH_AVX2)
extern const Kernel kernel_avx2;
#endif
#if defined(NEARSIGHT_WITH_AVX512)
extern const Kernel kernel_avx512;
#endif
#if defined(NEARSIGHT_WITH_AVX512_BF16)
extern const Kernel kernel_avx512_bf16;
#endif

const char* const kIsaNames[] = {"auto", "baseline", "avx2", "avx512", "neon", "avx512_bf16"};
const int kIsaCount = sizeof(kIsaNames) / sizeof(kIsaNames[0]);

namespace {

#if defined(__aarch64__)
constexpr int kBaselineIsa = NEARSIGHT_ISA_NEON;  // arm64 has no lesser one
#else
constexpr int kBaselineIsa = NEARSIGHT_ISA_BASELINE;
#endif

#if defined(NEARSIGHT_WITH_AVX512) || defined(NEARSIGHT_WITH_AVX512_BF16)
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#endif

}  // namespace

const Kernel* kernel_of(int isa) {
    if (isa == kBaselineIsa) return &kernel_baseline;
#if defined(NEARSIGHT_WITH_AVX2)
    if (isa == NEARSIGHT_ISA_AVX2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return &kernel_avx2;
#endif
#if defined(NEARSIGHT_WITH_AVX512)
    if (isa == NEARSIGHT_ISA_AVX512 && has_avx512()) return &kernel_avx512;
#endif
#if defined(NEARSIGHT_WITH_AVX512_BF16)
    if (isa == NEARSIGHT_ISA_AVX512_BF16 && has_avx512() && __builtin_cpu_supports("avx512bf16"))
        return &kernel_avx512_bf16;
#endif
    return nullptr;
}

namespace {

int widest_isa_of_numbers() {
    for (int isa : {NEARSIGHT_ISA_AVX512, NEARSIGHT_ISA_AVX2})
        if (kernel_of(isa)) return isa;
    return kBaselineIsa;
}

// Whether products of pairs run at the full rate of float32 multiply-adds: on AMD's processors that have them. On
// Intel's, where half the rate was measured, the conversions that they save do not make up for it.
bool pairs_pay() {
#if defined(__x86_64__)
    return __builtin_cpu_is("amd");
#else
    return false;
#endif
}

int best_isa() {
    if (pairs_pay() && kernel_of(NEARSIGHT_ISA_AVX512_BF16)) return NEARSIGHT_ISA_AVX512_BF16;
    return widest_isa_of_numbers();
}

}  // namespace

const Kernel* kernel_for(int isa, bool bfloat16) {
    return kernel_of(isa == NEARSIGHT_ISA_AVX512_BF16 && !bfloat16 ? widest_isa_of_numbers() : isa);
}

int resolve_isa(int isa) {
    if (isa < 0 || isa >= kIsaCount) return -NEARSIGHT_ERROR_ENUM;
    if (isa == NEARSIGHT_ISA_AUTO) {
        if (const char* wanted = getenv("NEARSIGHT_ISA")) {
            while (isa < kIsaCount && strcmp(wanted, kIsaNames[isa]) != 0) ++isa;
            if (isa == kIsaCount) return -NEARSIGHT_ERROR_ENVIRONMENT;
        }
    }
    if (isa == NEARSIGHT_ISA_AUTO) return best_isa();
    return kernel_of(isa) ? isa : -NEARSIGHT_ERROR_ISA;
}

}  // namespace nearsight
