// SPDX-License-Identifier: Apache-2.0
//
// nearsight::LocalAttention, version 1, as docs/howto/deploy.md specifies it, without a runtime: what it looks at, and
// how it calls the kernel. A runtime's operator reads attributes and inputs in its own way, and hands them on.

#ifndef NEARSIGHT_NODE_H
#define NEARSIGHT_NODE_H

#include <stdint.h>

#include <string>
#include <vector>

#include "nearsight.h"

namespace nearsight {

constexpr int kAxes = 3;
enum Input { kQuery, kKey, kValue, kBias, kRelative, kInputs = kRelative + kAxes };

// What is wrong, in one line.
struct Refusal {
    std::string text;
    enum Of { kAttribute, kInput, kKernel } of;
};

// As they are written in a graph.
struct Attributes {
    int64_t num_heads = 0, num_kv_heads = 0, rank = 0;
    std::vector<int64_t> kernel_size, stride, dilation, causal, shared_by;
    std::string border;
    float scale = 0;

    std::vector<int32_t> borders;  // as numbered in nearsight.h; check() finds them
};

void check(Attributes& attributes);  // throws a Refusal

struct Array {
    void* data = nullptr;
    std::vector<int64_t> shape;
    bool given = false;
};

struct Node {
    const Attributes& attributes;  // that were checked
    int32_t dtype;
    Array inputs[kInputs];
    bool channels_last = false;  // query, key, value and output lie in memory as (batch, *axes, channels)

    // Throws a Refusal where the shapes do not fit; the shape of the output where they do.
    std::vector<int64_t> out_shape() const;
    // Runs on these threads, about so many. Throws a Refusal.
    void run(void* out, const nearsight_executor& executor, int threads) const;

  private:
    int64_t entries(int axis) const;
    int64_t queries(int axis) const;
    int64_t groups() const;
    double work() const;
    nearsight_problem problem(int threads) const;
};

}  // namespace nearsight

#endif
