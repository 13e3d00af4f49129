// SPDX-License-Identifier: Apache-2.0
//
// Looks through all that a caller says before any of it is believed. Each check returns NEARSIGHT_OK or an error.

#ifndef NEARSIGHT_CHECK_H
#define NEARSIGHT_CHECK_H

#include "nearsight.h"

namespace nearsight {

// Whether there is a cell to work on.
bool has_work(const nearsight_problem& problem);

int check_problem(const nearsight_problem* problem);
int check_forward(const nearsight_problem* problem, const nearsight_inputs* inputs, const nearsight_tensor* out);
int check_projected(const nearsight_problem* problem, const nearsight_projection* projection,
                    const nearsight_inputs* tables, const nearsight_tensor* out);
int check_backward(const nearsight_problem* problem, const nearsight_inputs* inputs, const nearsight_tensor* out,
                   const float* lse, const nearsight_tensor* grad_out, const nearsight_gradients* gradients);

}  // namespace nearsight

#endif
