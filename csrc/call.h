// SPDX-License-Identifier: Apache-2.0
//
// One call, of a problem that was checked: planned, run, and its partial sums added up.

#ifndef NEARSIGHT_CALL_H
#define NEARSIGHT_CALL_H

#include "nearsight.h"

namespace nearsight {

// Plans a forward, or a backward that everything is wanted of, to see what scratch memory it would take.
int check_scratch(const nearsight_problem& problem, int isa, bool backward);

int forward(const nearsight_problem& problem, const nearsight_inputs& inputs, const nearsight_tensor& out, float* lse,
            int isa, const nearsight_executor* executor);
int forward_projected(const nearsight_problem& problem, const nearsight_projection& projection,
                      const nearsight_inputs& tables, const nearsight_tensor& out, float* lse, int isa);
int backward(const nearsight_problem& problem, const nearsight_inputs& inputs, const nearsight_tensor& out,
             const float* lse, const nearsight_tensor& grad_out, const nearsight_gradients& gradients, int isa);

// A backward over no cells: the tables still have gradients, of zero.
int zero_tables(const nearsight_problem& problem, const nearsight_gradients& gradients);

}  // namespace nearsight

#endif
