// SPDX-License-Identifier: Apache-2.0
//
// Refuses compiler flags that would make the library wrong where it runs. CMakeLists.txt takes them out; this catches
// what comes another way, as from a compiler that adds them by itself.

#ifndef NEARSIGHT_FLAGS_H
#define NEARSIGHT_FLAGS_H

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || \
    defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || defined(__NO_SIGNED_ZEROS__) || \
    (defined(__GCC_IEC_559) && !__GCC_IEC_559)
#error "nearsight needs arithmetic by IEEE's rules: build it without -ffast-math, -Ofast and their parts"
#endif

// A kernel has the instruction set of its name, for which the dispatcher looks first, and all other code has none.
#if defined(__x86_64__)
#define NEARSIGHT_LEVEL_kernel_avx2 2
#define NEARSIGHT_LEVEL_kernel_avx512 3
#define NEARSIGHT_LEVEL_kernel_avx512_bf16 4
#define NEARSIGHT_LEVEL_OF(kernel) NEARSIGHT_JOINED(NEARSIGHT_LEVEL_, kernel)
#define NEARSIGHT_JOINED(a, b) a##b
#if defined(NEARSIGHT_KERNEL)
#define NEARSIGHT_ALLOWED NEARSIGHT_LEVEL_OF(NEARSIGHT_KERNEL)  // 0 of any other kernel
#else
#define NEARSIGHT_ALLOWED 0
#endif
#if (defined(__SSE3__) && NEARSIGHT_ALLOWED < 2) || (defined(__AVX512F__) && NEARSIGHT_ALLOWED < 3) || \
    (defined(__AVX512BF16__) && NEARSIGHT_ALLOWED < 4) || \
    defined(__BMI__) || defined(__BMI2__) || defined(__LZCNT__) || defined(__MOVBE__) || defined(__AVXVNNI__) || \
    defined(__AVX512FP16__) || defined(__AVX512VBMI__) || defined(__AVX10_1__)
#define NEARSIGHT_NOT_ALLOWED
#endif
#elif defined(__aarch64__) && !defined(__APPLE__)
#if defined(__ARM_FEATURE_SVE) || defined(__ARM_FEATURE_DOTPROD) || defined(__ARM_FEATURE_ATOMICS)
#define NEARSIGHT_NOT_ALLOWED
#endif
#endif
#if defined(NEARSIGHT_NOT_ALLOWED)
#error "nearsight chooses the instruction set when it runs: build it without -march, -mcpu, -mavx2 and the like"
#endif

#endif
