// SPDX-License-Identifier: Apache-2.0
//
// Holds the functions of csrc/simd-inl.h and pairs-inl.h against doubles and plain loops, for the instruction set it is
// compiled for: prints the largest relative error of exp2 and of log_natural, and fails where another function is not
// exact.

#include <float.h>
#include <math.h>
#include <stdio.h>

#include "pairs-inl.h"
#include "simd-inl.h"

static bool failed = false;

static void expect(bool right, const char* what) {
    if (!right) printf("%s is wrong\n", what);
    failed |= !right;
}

// The largest relative error over numbers from `from` on, each by `factor` larger or by `step`.
template <class Function, class Truth, class Next>
static double worst(Function function, Truth truth, float from, float to, Next next) {
    double most = 0;
    for (float x = from; x < to;) {
        float numbers[kLanes], found[kLanes];
        for (float& number : numbers) number = x, x = next(x);
        store(found, function(load(numbers)));
        for (int i = 0; i < kLanes; ++i) {
            if (numbers[i] >= to) continue;
            const double right = truth((double)numbers[i]);
            const double error = right == found[i] ? 0 : fabs(found[i] - right) / fabs(right);
            if (!(error <= most)) most = error;
        }
    }
    return most;
}

static float one(Vector v) { return v[kLanes - 1]; }

static void transposes() {
    float rows[4][kLanes], columns[4][kLanes];
    for (int r = 0; r < 4; ++r)
        for (int i = 0; i < kLanes; ++i) rows[r][i] = (float)(100 * r + i);
    Vector v[4];
    for (int r = 0; r < 4; ++r) v[r] = load(rows[r]);
    transpose_quads(v[0], v[1], v[2], v[3]);
    for (int r = 0; r < 4; ++r) store(columns[r], v[r]);
    bool right = true;
    for (int r = 0; r < 4; ++r)
        for (int i = 0; i < kLanes; ++i) right &= columns[r][i] == rows[i % 4][i / 4 * 4 + r];
    expect(right, "transpose_quads");

    Quad q[4];
    for (int r = 0; r < 4; ++r) q[r] = load_quad(rows[r]);
    transpose_quad(q[0], q[1], q[2], q[3]);
    right = true;
    for (int r = 0; r < 4; ++r)
        for (int i = 0; i < 4; ++i) right &= q[r][i] == rows[i][r];
    expect(right, "transpose_quad");

    // As many quads, so far apart, as a vector holds.
    float memory[4 * 64], copy[4 * 64] = {};
    for (int i = 0; i < 4 * 64; ++i) memory[i] = (float)i;
    const Vector quads = load_quads(memory + 1, 9);
    store_quads(copy + 1, 9, quads);
    right = true;
    for (int i = 0; i < kLanes; ++i) right &= quads[i] == memory[1 + i / 4 * 9 + i % 4];
    for (int i = 0; i < 4 * 64; ++i) {
        const int k = (i - 1) / 9, within = (i - 1) % 9;
        const bool written = i >= 1 && k < kLanes / 4 && within < 4;
        right &= copy[i] == (written ? memory[i] : 0);
    }
    expect(right, "load_quads or store_quads");
}

static void halves() {
    bool right = true;
    for (uint32_t bits = 0; bits < 1u << 16; ++bits) {
        const Bfloat16 half = (Bfloat16)bits;
        Bfloat16 back[4];
        const Bfloat16 four[4] = {half, half, half, half};
        const float wide = load_one(&half);
        store_quad(back, load_quad(four));
        Bfloat16 single;
        store_one(&single, wide);
        Bfloat16 many[kLanes], all[kLanes];
        for (int i = 0; i < kLanes; ++i) many[i] = half;
        store_vector(all, load_vector(many));
        right &= all[0] == back[0] && all[kLanes - 1] == back[0];
        const bool number = wide == wide;
        right &= number ? single == half && back[3] == half : single == 0x7fc0 && back[3] == 0x7fc0;
        // Halfway to the next one: to the even of the two.
        if (!number || isinf(wide)) continue;
        float halfway;
        const uint32_t between = bits << 16 | 0x8000;
        memcpy(&halfway, &between, 4);
        store_one(&single, halfway);
        store_quad(back, Quad{} + halfway);
        store_vector(all, splat(halfway));
        right &= single == (Bfloat16)(bits + (bits & 1)) && back[0] == single && all[kLanes - 1] == single;
    }
    expect(right, "bfloat16");
}

// What the lanes of a vector hold.
static Bfloat16 first_of(Vector v, int lane) { return (Bfloat16)((BitVector)v)[lane]; }
static Bfloat16 second_of(Vector v, int lane) { return (Bfloat16)(((BitVector)v)[lane] >> 16); }

static void pairs() {
    Bfloat16 numbers[2 * kLanes];
    for (int i = 0; i < 2 * kLanes; ++i) store_one(numbers + i, (float)(i + 1) * (i % 3 ? 0.37f : -1.9f));
    const Vector first = load_vector(numbers), second = load_vector(numbers + kLanes);
    const Vector pair = pair_up(first, second);
    bool right = true;
    for (int i = 0; i < kLanes; ++i)
        right &= first_of(pair, i) == numbers[i] && second_of(pair, i) == numbers[kLanes + i];
    expect(right, "pair_up");

    if (!kHasPairs) return;
    const float third = 1.0f / 3;
    Bfloat16 rounded;
    store_one(&rounded, third);
    Vector numbers_too_long = {}, no_numbers = {};
    numbers_too_long[kLanes - 2] = third;
    no_numbers[1] = NAN;
    const Vector halves = round_pair(numbers_too_long, no_numbers);
    right = first_of(halves, kLanes - 2) == rounded && first_of(halves, kLanes - 1) == 0;
    right &= (second_of(halves, 1) & 0x7fff) > 0x7f80 && second_of(halves, kLanes - 2) == 0;
    expect(right, "round_pair");

    const Vector sum = Products::multiply_add(pair, pair, splat(0.5f));
    right = true;
    for (int i = 0; i < kLanes; ++i) {
        const double truth = 0.5 + (double)first[i] * first[i] + (double)second[i] * second[i];
        right &= fabs(sum[i] - truth) < 1e-6 * truth;
    }
    expect(right, "a product of pairs");
}

int main() {
    const auto by_step = [](float x) { return x + 1.0f / 4096 * 0.9973f; };
    const auto by_factor = [](float x) { return x * 1.0001237f; };
    const auto our_exp = [](Vector v) { return exp2(v); };
    const auto our_log = [](Vector v) { return log_natural(v); };
    const double of_exp = worst(our_exp, [](double x) { return pow(2, x); }, -126.0f, 127.0f, by_step);
    const double of_log = worst(our_log, [](double x) { return log(x); }, FLT_MIN, FLT_MAX / 2, by_factor);
    expect(one(exp2(splat(-127.0f))) == 0 && one(exp2(splat(-INFINITY))) == 0, "exp2 of what is too small");
    expect(one(exp2(splat(0.0f))) == 1 && isnan(one(exp2(splat(NAN)))), "exp2 of 0 or of no number");
    expect(one(log_natural(splat(1.0f))) == 0 && isnan(one(log_natural(splat(NAN)))), "log of 1 or of no number");
    expect(one(maximum(splat(1.0f), splat(2.0f))) == 2 && one(minimum(splat(1.0f), splat(2.0f))) == 1, "maximum");
    expect(isnan(one(maximum(splat(1.0f), splat(NAN)))), "maximum with NaN second");
    expect(one(maximum(splat(NAN), splat(1.0f))) == 1, "maximum with NaN first");
    transposes();
    halves();
    pairs();
    printf("%d lanes, exp2 %.3g, log %.3g\n", kLanes, of_exp, of_log);
    return failed;
}
