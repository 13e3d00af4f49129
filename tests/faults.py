# SPDX-License-Identifier: Apache-2.0
"""Faults for csrc/ and src/nearsight/attention/: a substitution each, and the tests of `make test` that have to notice it.

`python tests/plant.py` plants them; tests/test_faults.py holds every substitution to today's source.
"""

from __future__ import annotations

from typing import NamedTuple

LOWEST = "baseline"


class Fault(NamedTuple):
    name: str  # what is wrong
    file: str
    old: str  # stands in the file once
    new: str
    tests: str  # arguments of pytest
    isa: str = LOWEST  # the instruction set that the fault is in


CONTRACT = "tests/test_contract.py::test_named_case"
KERNEL = f"{CONTRACT} -k 'native and {{}} and float32'"
GEOMETRY, CALL, CHECK = "csrc/geometry.cpp", "csrc/call.cpp", "csrc/check.cpp"
STEPS, SIMD, PAIRS, ROWS, WALK, PROJECT, MAIN = (
    f"csrc/{name}"
    for name in (
        "steps-inl.h",
        "simd-inl.h",
        "pairs-inl.h",
        "rows-inl.h",
        "walk-inl.h",
        "project-inl.h",
        "kernel.cpp",
    )
)
ATTENTION = "src/nearsight/attention"
OPERATORS, PROJECTED = f"{ATTENTION}/native/operators.py", f"{ATTENTION}/native/projected.py"

WINDOWS = (
    Fault(
        "a window that shifts ends one step beyond the map",
        GEOMETRY,
        "std::min(first, on_phase - kernel))",
        "std::min(first, on_phase - kernel + 1))",
        KERNEL.format("shift"),
    ),
    Fault(
        "the leader of an even group is the cell before its middle",
        GEOMETRY,
        "return group + shared_by / 2 - step;",
        "return group + (shared_by - 1) / 2 - step;",
        KERNEL.format("shared"),
    ),
    Fault(
        "the next of the heads that share a line has the keys of the first",
        WALK,
        "w.sources[s].away += steps.next_head;",
        "w.sources[s].away += 0;",
        "tests/test_native.py::test_heads_that_share_lines",
    ),
    Fault(
        "heads that share a line and do not divide the others are left out",
        CALL,
        "while (plan.heads % heads != 0) --heads;",
        "heads = std::min(heads, plan.heads);",
        "tests/test_native.py::test_heads_that_share_lines",
    ),
    Fault(
        "the last of a causal group may lie beyond the map",
        GEOMETRY,
        "return std::min(group + shared_by - 1, last) - step;",
        "return group + shared_by - 1 - step;",
        KERNEL.format("shared"),
    ),
    Fault(
        "an even window has its odd cell to the right",
        GEOMETRY,
        "(causal ? kernel - 1 : kernel / 2);",
        "(causal ? kernel - 1 : (kernel - 1) / 2);",
        KERNEL.format("even"),
    ),
    Fault(
        "a causal window does not hold its own query",
        GEOMETRY,
        "causal ? query + 1 : first + kernel;",
        "causal ? query : first + kernel;",
        KERNEL.format("causal"),
    ),
    Fault(
        "a dilation beyond a torus ends at its size",
        GEOMETRY,
        "return step % cells == 0 ? cells : step % cells;",
        "return std::min(step, cells);",
        KERNEL.format("wrap"),
    ),
    Fault(
        "all dilation phases are as long as the first",
        GEOMETRY,
        "(cells - phase + dilation - 1) / dilation",
        "(cells + dilation - 1) / dilation",
        KERNEL.format("dilat"),
    ),
    Fault(
        "the stride begins with the last cell",
        "csrc/geometry.h",
        "cell % stride == 0 ? cell / stride : -1",
        "cell % stride == stride - 1 ? cell / stride : -1",
        KERNEL.format("stride"),
    ),
    Fault(
        "tables of a shared window go by its places",
        "csrc/geometry.h",
        "border == NEARSIGHT_BORDER_SHIFT || shared_by > 1; }",
        "border == NEARSIGHT_BORDER_SHIFT; }",
        KERNEL.format("shared"),
    ),
    Fault(
        "the first key of a search is the first query's",
        GEOMETRY,
        "return window(phase, query).last > key; });",
        "return window(phase, query).last >= key; });",
        KERNEL.format("even"),
    ),
)

LISTS = (
    Fault(
        "a run of lanes goes on where the cells do not",
        GEOMETRY,
        "one.index == run->index + run->count * run->index_step &&",
        "",
        KERNEL.format("wrap"),
    ),
    Fault(
        "cells of the image beside are let through with a weight of zero",
        GEOMETRY,
        "axis.by_offset() || (!axis.beyond() && (row_.images > 1 || row_.apart));",
        "axis.by_offset();",
        "tests/test_native.py::test_an_image_knows_nothing_of_those_before_it",
    ),
    Fault(
        "queries around a tile are counted by both tiles",
        GEOMETRY,
        "if (!place.inside || !own.holds(lanes.first + lane)) owned",
        "if (!place.inside) owned",
        "tests/test_dilated.py::test_wide_maps_with_halos_wider_than_a_tile",
    ),
    Fault(
        "the ring is a row too short",
        GEOMETRY,
        "std::max(slots, newest - visits[0].cell + 1)",
        "std::max(slots, newest - visits[0].cell)",
        KERNEL.format("high"),
    ),
    Fault(
        "keys lie in the ring as if no query were before them",
        GEOMETRY,
        "ring_lane + keys.homes_[i].first - queries.homes_[i].first;",
        "ring_lane;",
        "tests/test_dilated.py::test_wide_maps_with_halos_wider_than_a_tile",
    ),
    Fault(
        "rows that go around a torus are not those of the ring",
        GEOMETRY,
        "group.home[r] = (int32_t)axis.index(queries(), axis.cell(phase, homes[r]));",
        "group.home[r] = (int32_t)axis.index(queries(), axis.cell(phase, std::max<int64_t>(0, homes[r])));",
        KERNEL.format("wrap"),
    ),
    Fault(
        "visits of a query are counted from entry 0 on",
        GEOMETRY,
        "visit.order[r] = (int32_t)(entry - (queries() ? entries[r].first : lowest));",
        "visit.order[r] = (int32_t)(entry - (queries() ? entries[r].first : 0));",
        KERNEL.format("mask"),
    ),
)

ARITHMETIC = (
    Fault(
        "entries of a later part get the terms of the first",
        STEPS,
        "Product::kPaired ? Vector{} : part.start(r, entry + e);",
        "Product::kPaired ? Vector{} : part.start(r, e);",
        "tests/test_native.py::test_edges",
    ),
    Fault(
        "an away cell that is not seen is not masked",
        STEPS,
        "if (kMasked) a = keep(seen, a);",
        "",
        "tests/test_contract.py::test_poison_stays_where_it_is_seen -k native",
    ),
    Fault(
        "the last row of a group takes what the one before sees",
        STEPS,
        "case 6: mix_source<Product, 1, 2, kChannels, kMasked>",
        "case 6: mix_source<Product, 1, 3, kChannels, kMasked>",
        KERNEL.format("cell"),
    ),
    Fault(
        "a softmax without its greatest logit",
        MAIN,
        "exp2(load(scores + i * kLanes) - greatest)",
        "exp2(load(scores + i * kLanes))",
        KERNEL.format("loud"),
    ),
    Fault(
        "a coefficient of the exponential in its fourth digit",
        SIMD,
        "splat(0.009671999141573906f)",
        "splat(0.009681999141573906f)",
        "tests/test_native.py::test_functions_of_a_vector",
    ),
    Fault(
        "a coefficient of the logarithm in its third digit",
        SIMD,
        "splat(2.0f / 5.0f)",
        "splat(2.02f / 5.0f)",
        "tests/test_native.py::test_functions_of_a_vector",
    ),
    Fault(
        "a log-sum-exp with its greatest logit in base 2",
        MAIN,
        "greatest[r] * kLn2 + log_natural(sum[r])",
        "greatest[r] + log_natural(sum[r])",
        "tests/test_lse.py::test_log_sum_exp -k native",
    ),
    Fault(
        "a query is blind where the greatest logit says so",
        MAIN,
        "sees[r] = (IntVector)(sum[r] != splat(0.0f));",
        "sees[r] = finite;",
        "tests/test_contract.py::test_poison_stays_where_it_is_seen -k native",
    ),
    Fault(
        "a weight of the backward above one",
        MAIN,
        "exp2(minimum(splat(0.0f), logits[e]))",
        "exp2(logits[e])",
        "tests/test_native.py::test_logits_of_more_digits_than_a_float_has",
    ),
    Fault(
        "delta is added where it is subtracted",
        MAIN,
        "plan.value_dim, at, runs, -1.0f, planes(scratch",
        "plan.value_dim, at, runs, 1.0f, planes(scratch",
        KERNEL.format("covers"),
    ),
    Fault(
        "a query that sees no key has weights in the backward",
        MAIN,
        "choose((IntVector)(minus_lse == infinity), -infinity, minus_lse)",
        "minus_lse",
        "tests/test_nothing_seen.py -k native",
    ),
    Fault(
        "a bias that masks with the lowest number becomes infinite",
        CALL,
        "return std::isinf(scaled) && !std::isinf(logit) ? std::copysign(FLT_MAX, logit) : scaled;",
        "return scaled;",
        "tests/test_nothing_seen.py",
    ),
)

TABLES = (
    Fault(
        "a relative vector without its last channel",
        CALL,
        "std::max(range.end, (int32_t)c + 1)",
        "std::max(range.end, (int32_t)c)",
        KERNEL.format("relative"),
    ),
    Fault(
        "terms of the last block of entries are those before",
        STEPS,
        "(entry + e < last ? entry + e : last - 1) * head_dim",
        "(entry + e < last - 1 ? entry + e : entry) * head_dim",
        KERNEL.format("line"),
    ),
    Fault(
        "the gradient of a relative table in base 2",
        MAIN,
        "flush(w.relative_gradient[axis], count, kLn2,",
        "flush(w.relative_gradient[axis], count, 1.0f,",
        KERNEL.format("relative"),
    ),
    Fault(
        "the gradient of a bias twice for a row beyond the edge",
        MAIN,
        "s.own ? keep(load_mask(s.own), gradient) : gradient",
        "gradient",
        KERNEL.format("wrap"),
    ),
    Fault(
        "the gradient of a relative table twice for a row beyond the edge",
        MAIN,
        "store(sums + i * kLanes, keep(load_mask(s.own), load(sums + i * kLanes)));",
        "break;",
        KERNEL.format("wrap"),
    ),
    Fault(
        "of a job's partial sums the last is forgotten",
        CALL,
        "for (int64_t job = 0; job < jobs; ++job) sum",
        "for (int64_t job = 0; job < (jobs > 1 ? jobs - 1 : 1); ++job) sum",
        KERNEL.format("plain or relative or bias"),
    ),
    Fault(
        "tables of an empty batch get whatever was in memory",
        CALL,
        "if (gradients.bias) memset(gradients.bias, 0, (size_t)entries * sizeof(float));",
        "if (gradients.bias) memset(gradients.bias, 0xff, (size_t)entries * sizeof(float));",
        "tests/test_native.py -k empty_batch",
    ),
)

MEMORY = (
    Fault(
        "bfloat16 is cut off",
        SIMD,
        "(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)",
        "(uint16_t)(bits >> 16)",
        "tests/test_native.py::test_functions_of_a_vector",
    ),
    Fault(
        "four bfloat16 round half up",
        SIMD,
        "const WordQuad rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;",
        "const WordQuad rounded = (bits + 0x8000) >> 16;",
        "tests/test_native.py::test_functions_of_a_vector",
    ),
    Fault(
        "a vector of bfloat16 rounds half up",
        SIMD,
        "const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;",
        "const Words rounded = (bits + 0x8000) >> 16;",
        "tests/test_native.py::test_functions_of_a_vector",
    ),
    Fault(
        "two rows of a transposed quad exchanged",
        SIMD,
        "b = NEARSIGHT_SHUFFLE(ab_low, cd_low, 2, 3, 6, 7);",
        "b = NEARSIGHT_SHUFFLE(ab_low, cd_low, 6, 7, 2, 3);",
        "tests/test_native.py::test_functions_of_a_vector",
    ),
    Fault(
        "the fourth quad of a wide vector is the third",
        SIMD,
        "store_quad(p + 3 * stride, NEARSIGHT_QUAD(v, 3));",
        "store_quad(p + 3 * stride, NEARSIGHT_QUAD(v, 2));",
        "tests/test_native.py::test_edges -k avx512",
        "avx512",
    ),
    Fault(
        "the cells that fill no vector are left out",
        ROWS,
        "    block(count - width);\n",
        "    block((count - width) / width * width);\n",
        "tests/test_native.py::test_edges",
    ),
    Fault(
        "strided queries of planar memory are packed without gaps",
        ROWS,
        "lanes[c * pitch + i * run.step] = load_one(source + c * channel_stride + i) * multiplier;",
        "lanes[c * pitch + i] = load_one(source + c * channel_stride + i) * multiplier;",
        KERNEL.format("strided"),
    ),
    Fault(
        "results of strided queries are written side by side",
        ROWS,
        "store_one(target + c * channel_stride + i * stride,",
        "store_one(target + c * channel_stride + i,",
        KERNEL.format("stride"),
    ),
    Fault(
        "images side by side are all the first",
        ROWS,
        "return (at.first_batch + run.group) * t.batch +",
        "return at.first_batch * t.batch +",
        KERNEL.format("narrow"),
    ),
    Fault(
        "log-sum-exps of images side by side are all the first's",
        ROWS,
        "image = (at.first_batch + run.group) * plan.heads + at.head;",
        "image = at.first_batch * plan.heads + at.head;",
        KERNEL.format("narrow"),
    ),
    Fault(
        "a smaller group of images keeps what the larger one left",
        WALK,
        "w.leftover->tile == item.tile && is_whole(plan, item)) return;",
        "w.leftover->tile == item.tile) return;",
        "tests/test_native.py::test_an_image_knows_nothing_of_those_before_it",
    ),
    Fault(
        "packed rows are told apart by y alone",
        WALK,
        "if (tag.z != visit_z.cell || tag.y != visit_y.cell) {",
        "if (tag.y != visit_y.cell) {",
        KERNEL.format("volume"),
    ),
    Fault(
        "planes of queries do not add to the gradient of a key",
        MAIN,
        "o.add = w.planes != nullptr;",
        "o.add = false;",
        KERNEL.format("volume"),
    ),
    Fault(
        "a call keeps its scratch memory however large",
        "csrc/threads.cpp",
        "if (size_ <= kKeptScratch) return;",
        "return;",
        "tests/test_dilated.py::test_much_scratch_memory_is_given_back",
    ),
    Fault(
        "scratch memory of any size is asked for",
        CALL,
        "return bytes > (size_t)kMostScratch ?",
        "return bytes > 4 * (size_t)kMostScratch ?",
        "tests/test_native.py -k 'scratch_memory'",
    ),
)

SHARES = (
    Fault(
        "rows that two chunks need are counted twice",
        MAIN,
        "item.first_group > 0 ? groups[item.first_group - 1].last_away : 0;",
        "0;",
        KERNEL.format("high"),
    ),
    Fault(
        "the last chunk of a map is left out",
        WALK,
        "item.last_group = groups * (chunk + 1) / pass.chunks;",
        "item.last_group = chunk > 0 && chunk + 1 == pass.chunks ? item.first_group : groups * (chunk + 1) / pass.chunks;",
        KERNEL.format("high"),
    ),
    Fault(
        "threads share one scratch memory",
        "csrc/threads.cpp",
        "thread_local Scratch scratch;",
        "Scratch scratch;",
        "tests/test_native.py -k 'number_of_threads or from_several_threads'",
    ),
    Fault(
        "the threads of a forked process are waited for",
        f"{ATTENTION}/native/library.py",
        "return 1 if _forked else torch.get_num_threads()",
        "return torch.get_num_threads()",
        "tests/test_native.py -k after_the_fork",
    ),
)

CHECKS = (
    Fault(
        "C takes a window that is shared by more cells than it holds",
        CHECK,
        "if (p.shared_by[axis] < 1 || p.shared_by[axis] > p.kernel[axis]) return",
        "if (p.shared_by[axis] < 1) return",
        "tests/test_native.py -k lies",
    ),
    Fault(
        "C writes to a tensor that is expanded",
        CHECK,
        "if (written && tensor->strides[i] == 0)",
        "if (false)",
        "tests/test_native.py -k 'written or lies'",
    ),
    Fault(
        "query and key may differ in their channels",
        f"{ATTENTION}/problem.py",
        "if query.shape[-1] != key.shape[-1]:",
        "if False:",
        "tests/test_operation.py::test_errors",
    ),
    Fault(
        "heads of the query need not be a multiple of the key's",
        f"{ATTENTION}/problem.py",
        " or heads % max(groups, 1):",
        ":",
        "tests/test_operation.py::test_errors",
    ),
    Fault(
        "a backend that is second best is taken",
        f"{ATTENTION}/backend.py",
        "if backend.second_best(problem) is None)",
        "if True)",
        "tests/test_backends.py tests/test_native.py -k 'page or default'",
    ),
    Fault(
        "query heads are dealt to keys one after another",
        f"{ATTENTION}/backend.py",
        "_heads(call, slice(nth, None, groups))",
        "_heads(call, slice(nth * problem.num_heads, (nth + 1) * problem.num_heads))",
        "tests/test_lse.py::test_grouped_query_attention",
    ),
)

BACKENDS = (
    Fault(
        "the reference lets no cell vote that lies beyond the edge",
        f"{ATTENTION}/reference.py",
        "_everywhere([cell != -1 for cell in block.cells])",
        "_everywhere([cell >= 0 for cell in block.cells])",
        f"{CONTRACT} -k 'reference and zeros'",
    ),
    Fault(
        "the span of a block that begins within a group is too short",
        f"{ATTENTION}/blocked.py",
        "(between if _begins_with_a_group(axis) else between + g - 1) // g * g",
        "between // g * g",
        f"{CONTRACT} -k 'blocked and shared'",
    ),
    Fault(
        "a window of blocks holds one cell more",
        f"{ATTENTION}/blocked.py",
        "visible = (offset >= 0) & (offset < axis.kernel_size)",
        "visible = (offset >= 0) & (offset <= axis.kernel_size)",
        f"{CONTRACT} -k 'blocked and plain'",
    ),
    Fault(
        "only where all axes vote with zeros do any",
        f"{ATTENTION}/blocked.py",
        'if any(axis.border == "zeros"',
        'if all(axis.border == "zeros"',
        f"{CONTRACT} -k 'blocked and zeros'",
    ),
    Fault(
        "a value that is not finite reaches all of its block",
        f"{ATTENTION}/blocked.py",
        "value = torch.where(value.isfinite(), value, 0)",
        "pass",
        "tests/test_contract.py::test_poison_stays_where_it_is_seen -k blocked",
    ),
    Fault(
        "what pads a block sees nothing",
        f"{ATTENTION}/blocked.py",
        "visible=(visible | padding[..., None])",
        "visible=(visible & ~padding[..., None])",
        f"{CONTRACT} -k 'blocked and dilat'",
    ),
    Fault(
        "the log-sum-exp of a query that sees no key is 0",
        f"{ATTENTION}/blocked.py",
        "zip(found, (0, NOTHING), strict=False)",
        "zip(found, (0, 0), strict=False)",
        "tests/test_nothing_seen.py",
    ),
    Fault(
        "plain operators let a query see all of its block's span",
        f"{ATTENTION}/plain_graph.py",
        "np.float32(0), NOTHING)",
        "np.float32(0), np.float32(0))",
        "tests/test_plain_graph.py -k 'line or volume'",
    ),
    Fault(
        "plain operators take a query that its bias lets see nothing for one that sees all alike",
        f"{ATTENTION}/plain_graph.py",
        'out = graph.op("Where", some, out, np.float32(0))',
        "pass",
        "tests/test_plain_graph.py::test_bias_that_hides",
    ),
    Fault(
        "a dense mask in half precision",
        f"{ATTENTION}/dense.py",
        "dtype = problem.dtype if mask is None else problem.compute_dtype",
        "dtype = problem.dtype\n    mask = None if mask is None else mask.to(dtype)",
        "tests/test_operation.py::test_float32_tables_serve_half_precision -k dense",
    ),
    Fault(
        "dense attention gives a query that sees no key the mean",
        f"{ATTENTION}/dense.py",
        "out = out.masked_fill(alone, 0)",
        "pass",
        "tests/test_nothing_seen.py",
    ),
    Fault(
        "FlexAttention sees behind a causal query",
        f"{ATTENTION}/flex.py",
        "end = smaller(first + axis.kernel_size, step + 1) if axis.causal else first",
        "end = first",
        "tests/test_flex.py::test_values",
    ),
    Fault(
        "FlexAttention's margin is too narrow for a shared window",
        f"{ATTENTION}/flex.py",
        "axis.kernel_size - 1 - axis.left + axis.shared_by // 2",
        "axis.kernel_size - 1 - axis.left",
        "tests/test_flex.py::test_values -k shared",
    ),
    Fault(
        "FlexAttention's windows reach into the next dilation phase",
        f"{ATTENTION}/flex.py",
        "apart = cells + 4 * axis.kernel_size",
        "apart = axis.steps(0, cells)",
        "tests/test_flex.py::test_values -k dilat",
    ),
    Fault(
        "FlexAttention skips blocks whose first cell is not seen",
        f"{ATTENTION}/flex.py",
        "cell // BLOCK)[inside]",
        "cell // BLOCK)[inside & (cell % BLOCK == 0)]",
        "tests/test_flex.py -k blocks",
    ),
)

DERIVATIVES = (
    Fault(
        "a copy of the output is kept for the backward",
        OPERATORS,
        "ctx.save_for_backward(query, key, value, bias, out, lse, *relative)",
        "ctx.save_for_backward(query, key, value, bias, out.clone(), lse, *relative)",
        "tests/test_native.py -k saves",
    ),
    Fault(
        "whether a relative table wants its gradient is asked of the next",
        OPERATORS,
        "ctx.needs_input_grad[:4], ctx.needs_input_grad[5:]",
        "ctx.needs_input_grad[:4], ctx.needs_input_grad[6:]",
        "tests/test_contract.py::test_each_input_alone_gets_its_gradient -k native",
    ),
    Fault(
        "the gradient of a log-sum-exp with the other sign",
        OPERATORS,
        "torch.cat([out, -grad_lse[..., None]], -1)",
        "torch.cat([out, grad_lse[..., None]], -1)",
        "tests/test_lse.py -k native",
    ),
    Fault(
        "a log-sum-exp's gradient needs no more scratch memory",
        f"{ATTENTION}/native/backend.py",
        "problem.value_dim + (problem.needs_grad and problem.lse)",
        "problem.value_dim",
        "tests/test_native.py -k one_channel_more",
    ),
    Fault(
        "mapped elements share the channels of one gradient",
        OPERATORS,
        "part.unflatten(1, (info.batch_size, -1)) for part in parts], 2)",
        "part.unflatten(1, (-1, info.batch_size)).transpose(1, 2) for part in parts], 2)",
        "tests/test_native.py -k vmap",
    ),
    Fault(
        "second derivatives are zero",
        f"{ATTENTION}/any_order.py",
        "(torch.zeros_like(one) if second is None else second for one, second",
        "(torch.zeros_like(one) for one, second",
        "tests/test_any_order.py -k 'of_derivatives and native'",
    ),
    Fault(
        "hidden cells count when a query is asked whether it sees any",
        f"{ATTENTION}/softmax.py",
        "alone = _sees_none(logits if hidden is None else logits.detach().masked_fill(hidden, NOTHING))",
        "alone = _sees_none(logits)",
        "tests/test_nothing_seen.py -k hidden_anyway",
    ),
    Fault(
        "a merge of nothing is not a number",
        f"{ATTENTION}/__init__.py",
        "seen = each.masked_fill(alone, 0)",
        "seen = each",
        "tests/test_lse.py::test_query_without_keys_gets_nothing",
    ),
)

# With AVX-512 and channels that fill vectors.
CELLS = tuple(
    Fault(name, file, old, new, "tests/test_native.py -k fill_vectors", "avx512")
    for name, file, old, new in (
        (
            "a cell that is hidden from its query counts",
            PAIRS,
            "return -(int32_t)(entry >= seen[0] && entry < seen[kLanes]) - IntVector{};",
            "return -(int32_t)(entry >= seen[0]) - IntVector{};",
        ),
        (
            "planes do not add to results in cells",
            STEPS,
            "for (int v = 0; v < kVectors; ++v) sums[r][q][v] = load(target(r, q, v));",
            "for (int v = 0; v < kVectors; ++v) sums[r][q][v] = Vector{};",
        ),
        (
            "weights of all cells of a block are the first one's",
            STEPS,
            "w[r] = Product::spread(weights[r] + q);",
            "w[r] = Product::spread(weights[r]);",
        ),
        (
            "all lanes have the share of the first",
            MAIN,
            "const Vector factor = splat(factors[lane]);",
            "const Vector factor = splat(factors[0]);",
        ),
        (
            "the ring's queries are not scaled",
            MAIN,
            "pack_row(plan, tensor, channels, at, runs, multiplier, row);",
            "pack_row(plan, tensor, channels, at, runs, 1.0f, row);",
        ),
        (
            "planes are copied into cells without a transpose",
            ROWS,
            "store_quads(cells + (i + k) * pitch + c, 4 * pitch, v[k]);",
            "store_quads(cells + i * pitch + c + k, 4 * pitch, v[k]);",
        ),
        (
            "results in cells go to their planes in another order",
            ROWS,
            "store_vector(target + (c + k) * channel_stride + i, v[k]);",
            "store_vector(target + (c + 3 - k) * channel_stride + i, v[k]);",
        ),
    )
)

AT_ONCE = tuple(
    Fault(name, file, old, new, "tests/test_at_once.py", isa)
    for name, file, old, new, isa in (
        (
            "a strip of the input keeps what the one before left",
            MAIN,
            "memset(w.input, 0, (size_t)(projection.channels * pitch) * sizeof(float));",
            "",
            LOWEST,
        ),
        (
            "the second block of a head's channels has the weights of the first",
            PROJECT,
            "return {weight + block * x.channels + (from - block),",
            "return {weight + (from - block),",
            LOWEST,
        ),
        (
            "the projected query is not scaled",
            MAIN,
            "project_row(x, weight, plan.head_dim, plan.query_multiplier, rows.query.of(row));",
            "project_row(x, weight, plan.head_dim, 1.0f, rows.query.of(row));",
            LOWEST,
        ),
        (
            "cells of the input have the second vector's weights in both",
            PROJECT,
            "w[v] = load(weight + v * weights.block);",
            "w[v] = load(weight + (kVectors - 1) * weights.block);",
            "avx512",
        ),
        (
            "every slice of a backward adds the first one's images",
            PROJECTED,
            "x, here = input[some],",
            "x, here = input[: some.stop - some.start],",
            LOWEST,
        ),
        (
            "a hook of the projection's backward is overlooked",
            "src/nearsight/private.py",
            'names = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")\n    hooked',
            'names = ("_forward_pre_hooks", "_forward_hooks")\n    hooked',
            LOWEST,
        ),
    )
)

# With products of bfloat16 pairs.
IN_PAIRS = tuple(
    Fault(name, file, old, new, f"tests/test_native.py -k {test}", "avx512_bf16")
    for name, file, old, new, test in (
        (
            "the cell beside an odd last entry meets a weight of zero",
            STEPS,
            "seen(o.entries) & kFirstOfPair",
            "seen(o.entries)",
            "half_of_a_pair",
        ),
        (
            "the same where channels are the lanes",
            STEPS,
            "seen(o.entries, q) & kFirstOfPair",
            "seen(o.entries, q)",
            "half_of_a_pair",
        ),
        (
            "an odd last channel is paired with the next plane's",
            PAIRS,
            "c + 1 < channels ? load(first + pitch) : Vector{};",
            "load(first + pitch);",
            "pairs_at_every_edge",
        ),
        (
            "the second cell of a pair is hidden with the first",
            PAIRS,
            "(within(seen, 2 * entry) & kFirstOfPair) | (within(seen, 2 * entry + 1) & kSecondOfPair)",
            "within(seen, 2 * entry)",
            "pairs_at_every_edge",
        ),
        (
            "keys have their gradient of queries that are scaled twice",
            MAIN,
            "in_pairs(plan) ? plan.scale : kLn2;",
            "in_pairs(plan) ? plan.scale * plan.scale : kLn2;",
            "pairs_at_every_edge",
        ),
    )
)

FAULTS = (
    *WINDOWS,
    *LISTS,
    *ARITHMETIC,
    *TABLES,
    *MEMORY,
    *CELLS,
    *IN_PAIRS,
    *SHARES,
    *CHECKS,
    *BACKENDS,
    *DERIVATIVES,
    *AT_ONCE,
)
