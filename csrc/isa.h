// SPDX-License-Identifier: Apache-2.0
//
// Which instruction sets were built in and can run here, and which one is meant.

#ifndef NEARSIGHT_ISA_H
#define NEARSIGHT_ISA_H

#include "plan.h"

namespace nearsight {

extern const char* const kIsaNames[];
extern const int kIsaCount;

// NULL when this build or this processor lacks it.
const Kernel* kernel_of(int isa);

// What computes a problem under an instruction set that is there: the kernel of pairs has products of bfloat16 alone.
const Kernel* kernel_for(int isa, bool bfloat16);

// An instruction set, or a negated error.
int resolve_isa(int isa);

}  // namespace nearsight

#endif
