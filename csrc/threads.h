// SPDX-License-Identifier: Apache-2.0
//
// Deals the jobs of a call out to threads, each with scratch memory of its own.

#ifndef NEARSIGHT_THREADS_H
#define NEARSIGHT_THREADS_H

#include <stddef.h>
#include <stdint.h>

#include <functional>

#include "nearsight.h"

namespace nearsight {

typedef std::function<void(int64_t head, int64_t job, char* workspace)> Work;

// Does every job of every head, each in `bytes` of scratch memory. NEARSIGHT_OK, or the error.
// On the executor's threads, or without one on OpenMP's.
int run(int64_t heads, int64_t jobs, size_t bytes, const Work& work, int num_threads,
        const nearsight_executor* executor = nullptr);

}  // namespace nearsight

#endif
