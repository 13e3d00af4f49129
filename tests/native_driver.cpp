// SPDX-License-Identifier: Apache-2.0
//
// Calls the C ABI with random problems in exactly as much memory as they need, for the sanitizers to watch:
//     driver PROBLEMS [SEED [FILE]]
// Right results are the contract tests' business; here every number has to be written, and finite. With FILE problems
// run on the instruction set that the machine picks, and each result goes there as a count and so many float32 numbers,
// for a test to hold one machine's against another's.

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "nearsight.h"

static std::mt19937 random_bits;
static FILE* results;

static int64_t pick(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_bits);
}

// One tensor with its own memory: its axes in random order, sometimes with gaps between them.
class Map {
  public:
    Map(const nearsight_problem& p, bool output, int64_t channels, bool written)
        : size_(p.dtype == NEARSIGHT_BFLOAT16 ? 2 : 4) {
        sizes_ = {p.batch, p.heads};
        for (int i = 0; i < p.rank; ++i)
            sizes_.push_back(output ? (p.size[i] + p.stride[i] - 1) / p.stride[i] : p.size[i]);
        sizes_.push_back(channels);
        std::vector<size_t> order(sizes_.size());
        for (size_t i = 0; i < order.size(); ++i) order[i] = i;
        std::shuffle(order.begin(), order.end(), random_bits);
        const bool expanded = !written && pick(0, 9) == 0;  // the same numbers for every image
        int64_t stride = pick(1, 3) == 3 ? 2 : 1, last = 0;
        for (size_t axis : order) {
            if (axis == 0 && expanded) continue;
            tensor.strides[axis] = stride;
            last += (sizes_[axis] - 1) * stride;
            stride *= sizes_[axis] + (pick(1, 4) == 4);
        }
        bool empty = false;
        for (int64_t size : sizes_) empty |= size == 0;
        const size_t count = empty ? 0 : (size_t)last + 1;
        memory_.reset((char*)malloc(count * size_));
        tensor.data = memory_.get();
        const float number = written ? NAN : 0;
        for (size_t i = 0; i < count; ++i) set(i, written ? number : std::normal_distribution<float>()(random_bits));
    }

    // Every element, not the gaps between them.
    std::vector<float> numbers() const {
        std::vector<float> found;
        collect(0, 0, found);
        return found;
    }

    nearsight_tensor tensor = {};

  private:
    struct Free {
        void operator()(char* p) const { free(p); }
    };

    void set(size_t i, float x) {
        uint32_t bits;
        memcpy(&bits, &x, 4);
        const uint16_t high = (uint16_t)(bits >> 16);
        if (size_ == 2)
            memcpy(memory_.get() + 2 * i, &high, 2);
        else
            memcpy(memory_.get() + 4 * i, &bits, 4);
    }

    float get(int64_t i) const {
        uint32_t bits = 0;
        memcpy((char*)&bits + 4 - size_, memory_.get() + (size_t)i * size_, size_);
        float x;
        memcpy(&x, &bits, 4);
        return x;
    }

    void collect(size_t axis, int64_t offset, std::vector<float>& found) const {
        if (axis == sizes_.size()) return found.push_back(get(offset));
        for (int64_t i = 0; i < sizes_[axis]; ++i) collect(axis + 1, offset + i * tensor.strides[axis], found);
    }

    size_t size_;
    std::vector<int64_t> sizes_;
    std::unique_ptr<char, Free> memory_;
};

static nearsight_problem random_problem() {
    nearsight_problem p = {};
    p.struct_size = sizeof p;
    p.abi_version = NEARSIGHT_ABI_VERSION;
    p.rank = (int32_t)pick(1, 3);
    p.dtype = (int32_t)pick(0, 1);
    if (!results)
        do p.isa = (int32_t)pick(NEARSIGHT_ISA_BASELINE, NEARSIGHT_ISA_AVX512_BF16);
        while (!(nearsight_available_isas() >> p.isa & 1));
    p.num_threads = 1;
    p.element_size = p.dtype == NEARSIGHT_BFLOAT16 ? 2 : 4;
    p.scalar_size = sizeof(float);
    p.batch = pick(0, 3);
    p.heads = pick(1, 3);
    p.head_dim = pick(1, 20);
    p.value_dim = pick(0, 1) ? p.head_dim : pick(1, 20);
    p.scale = results || pick(0, 4) ? 0.3 : 1e9;  // logits whose roundings alone are large
    const int64_t longest[] = {80, 24, 7}, widest[] = {17, 8, 4};
    for (int i = 0; i < p.rank; ++i) {
        p.size[i] = pick(0, 19) == 0 ? 0 : pick(1, longest[p.rank - 1]);
        p.kernel[i] = pick(0, 9) == 0 ? 2 * p.size[i] + 1 : pick(1, widest[p.rank - 1]);
        p.stride[i] = pick(0, 2) == 0 ? pick(1, 4) : 1;
        p.dilation[i] = pick(0, 2) == 0 ? pick(1, 9) : 1;
        p.border[i] = (int32_t)pick(0, 3);
        p.causal[i] = (int32_t)pick(0, 1);
        p.shared_by[i] = pick(0, 2) == 0 ? pick(1, p.kernel[i]) : 1;
    }
    return p;
}

static bool check(const std::vector<float>& numbers) {
    const int64_t count = (int64_t)numbers.size();
    if (results) {
        fwrite(&count, sizeof count, 1, results);
        fwrite(numbers.data(), sizeof(float), numbers.size(), results);
    }
    return std::all_of(numbers.begin(), numbers.end(), [](float x) { return isfinite(x); });
}

static std::vector<float> table(size_t count) {
    std::vector<float> numbers(count);
    for (float& x : numbers) x = std::normal_distribution<float>()(random_bits);
    return numbers;
}

static void describe(const nearsight_problem& p) {
    fprintf(stderr, "isa %d dtype %d batch %ld heads %ld head_dim %ld value_dim %ld\n", p.isa, p.dtype, (long)p.batch,
            (long)p.heads, (long)p.head_dim, (long)p.value_dim);
    for (int i = 0; i < p.rank; ++i)
        fprintf(stderr, "  size %ld kernel %ld stride %ld dilation %ld border %d causal %d shared_by %ld\n",
                (long)p.size[i], (long)p.kernel[i], (long)p.stride[i], (long)p.dilation[i], p.border[i], p.causal[i],
                (long)p.shared_by[i]);
}

// Query, key and value made of an input, by a weight in exactly as much memory as it needs.
static bool run_projected(const nearsight_problem& p, const nearsight_inputs& tables) {
    nearsight_problem of_one_head = p;
    of_one_head.heads = 1;
    const int64_t channels = pick(1, 9), rows = p.heads * (2 * p.head_dim + p.value_dim);
    const Map input(of_one_head, false, channels, false), out(p, true, p.value_dim, true);
    const std::vector<float> weight = table((size_t)(rows * channels)), bias = table((size_t)rows);
    const nearsight_projection projection = {input.tensor, channels, weight.data(), pick(0, 1) ? bias.data() : nullptr};
    nearsight_problem shared = p;
    shared.num_threads = (int32_t)pick(1, 3);  // by which the work is shared out
    if (int error = nearsight_forward_projected(&shared, &projection, &tables, &out.tensor, nullptr)) {
        fprintf(stderr, "projected: error %d: %s\n", error, nearsight_error_string(error));
        return false;
    }
    const std::vector<float> numbers = out.numbers();
    return std::all_of(numbers.begin(), numbers.end(), [](float x) { return isfinite(x); });
}

static bool run(const nearsight_problem& p) {
    size_t queries = (size_t)(p.batch * p.heads), bias_count = (size_t)p.heads;
    std::vector<std::vector<float>> relative, relative_gradients;
    for (int i = 0; i < p.rank; ++i) {
        const bool by_offset = p.border[i] == NEARSIGHT_BORDER_SHIFT || p.shared_by[i] > 1;
        const size_t entries = (size_t)(by_offset ? 2 * p.kernel[i] - 1 : p.kernel[i]);
        queries *= (size_t)((p.size[i] + p.stride[i] - 1) / p.stride[i]);
        bias_count *= entries;
        relative.push_back(table((size_t)(p.heads * p.head_dim) * entries));
        relative_gradients.push_back(std::vector<float>(relative.back().size(), NAN));
    }
    std::vector<float> bias = table(bias_count), bias_gradient(bias_count, NAN), lse(queries, NAN);
    const Map query(p, true, p.head_dim, false), key(p, false, p.head_dim, false), value(p, false, p.value_dim, false);
    const Map grad_out(p, true, p.value_dim, false);
    const Map out(p, true, p.value_dim, true), grad_query(p, true, p.head_dim, true);
    const Map grad_key(p, false, p.head_dim, true), grad_value(p, false, p.value_dim, true);
    nearsight_inputs inputs = {query.tensor, key.tensor, value.tensor, nullptr, {}};
    nearsight_gradients gradients = {&grad_query.tensor, &grad_key.tensor, &grad_value.tensor, nullptr, {}};
    const bool with_bias = pick(0, 1), with_relative = pick(0, 1);
    if (with_bias) inputs.bias = bias.data(), gradients.bias = bias_gradient.data();
    for (int i = 0; with_relative && i < p.rank; ++i) {
        inputs.relative[i] = relative[(size_t)i].data();
        gradients.relative[i] = relative_gradients[(size_t)i].data();
    }

    int error = nearsight_check(&p, 1);
    if (!error) error = nearsight_forward(&p, &inputs, &out.tensor, lse.data());
    if (!error) error = nearsight_backward(&p, &inputs, &out.tensor, lse.data(), &grad_out.tensor, &gradients);
    if (error) {
        fprintf(stderr, "error %d: %s\n", error, nearsight_error_string(error));
        return false;
    }
    bool finite = check(lse);
    for (const Map* map : {&out, &grad_query, &grad_key, &grad_value}) finite &= check(map->numbers());
    if (with_bias) finite &= check(bias_gradient);
    if (with_relative)
        for (const auto& one : relative_gradients) finite &= check(one);
    bool projects = p.dtype == NEARSIGHT_FLOAT32 && !results;
    for (int i = 0; i < p.rank; ++i) projects &= p.stride[i] == 1;
    if (projects) finite &= run_projected(p, inputs);
    if (!finite) fprintf(stderr, "an element was not written, or is not finite\n");
    return finite;
}

int main(int count, char** arguments) {
    const int problems = count > 1 ? atoi(arguments[1]) : 100;
    random_bits.seed(count > 2 ? (unsigned)atoi(arguments[2]) : 0);
    if (count > 3 && !(results = fopen(arguments[3], "wb"))) return 2;
    for (int i = 0; i < problems; ++i) {
        const nearsight_problem p = random_problem();
        if (!run(p)) {
            describe(p);
            return 1;
        }
    }
    printf("%d problems\n", problems);
    return results && fclose(results) ? 2 : 0;
}
