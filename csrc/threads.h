// SPDX-License-Identifier: Apache-2.0
//
// Deals the jobs of a call out to threads, each with scratch memory of its own.

#ifndef NEARSIGHT_THREADS_H
#define NEARSIGHT_THREADS_H

#include "plan.h"

namespace nearsight {

typedef void (*Work)(const Plan*, int64_t head, int64_t job, char* workspace);

// Does every job of every head, each in `bytes` of scratch memory. NEARSIGHT_OK, or the error.
int run(const Plan& plan, size_t bytes, Work work, int num_threads);

}  // namespace nearsight

#endif
