# SPDX-License-Identifier: Apache-2.0
"""How the operation behaves as a PyTorch function: its errors, dtypes, derivatives, transforms, compilation and memory."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import ALL, assert_near, every_backend
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.profiler import profile

import nearsight as ns
from nearsight.attention.backend import BACKENDS
from nearsight.attention.problem import describe
from nearsight.errors import BackendError, DtypeError, OptionError, ShapeError

WINDOWS = {
    "mask": ns.Window((3, 2)),
    "zeros": ns.Window((3, 2), border="zeros", dilation=(1, 2)),
    "shift": ns.Window((2, 3), border="shift", dilation=(2, 1)),
    "wrap": ns.Window((3, 5), border="wrap"),
    "causal": ns.Window((2, 3), causal=(True, False)),
    "shared": ns.Window((3, 4), shared_by=(2, 3), border=("mask", "wrap"), causal=(False, True)),
}
by_window = pytest.mark.parametrize("name", WINDOWS)


def one_window(one: str) -> pytest.MarkDecorator:
    """Where a compiler works on each for seconds: one, and the others in the sweeps."""
    names = [pytest.param(name, marks=[] if name == one else pytest.mark.sweep) for name in WINDOWS]
    return pytest.mark.parametrize("name", names)


def maps(*size, heads=2, dim=4, dtype=torch.float32, count=3) -> list[Tensor]:
    return [torch.randn(2, heads, *size, dim, dtype=dtype) for _ in range(count)]


def flat_problem(window: ns.Window, dtype=torch.float64, grad=True):
    """A function of all tensors in a row, and the tensors: what torch's checkers and transforms want."""
    query, key, value = maps(3, 4, dim=2, dtype=dtype)
    entries = window.table_size(2)
    tables = [torch.randn(2, *entries, dtype=dtype), *(torch.randn(2, n, 2, dtype=dtype) for n in entries)]
    inputs = [tensor.requires_grad_(grad) for tensor in (query, key, value, *tables)]

    def function(query, key, value, bias, *relative, backend="blocked"):
        return ns.local_attention(query, key, value, window, bias=bias, relative=relative, backend=backend)

    return function, inputs


# -------------------------------------------------------------------------------------------------------------- errors


def wrong(window=3, *, out=(5, 7), key=(2, 2, 5, 7, 4), value=(2, 2, 5, 7, 4), query=None, **options):
    """The arguments of a right call with some of them replaced; shapes become tensors."""
    query = (2, 2, *out, 4) if query is None else query
    tensors = [torch.randn(one) if isinstance(one, tuple) else one for one in (query, key, value)]
    return (*tensors, ns.Window(window) if isinstance(window, (int, tuple)) else window), options


def zeros(*shape, dtype=torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


ERRORS = {
    # what is wrong: (arguments, error, what the message shows)
    "query of rank 2": (wrong(query=(5, 4)), ShapeError, r"query must be .*received \(5, 4\)"),
    "four map axes": (wrong(query=(1, 1, 2, 2, 2, 2, 4)), ShapeError, r"1 to 3 map axes.*\(1, 1, 2, 2, 2, 2, 4\)"),
    "key without batch": (wrong(key=(2, 5, 7, 4)), ShapeError, r"same number of axes.*key \(2, 5, 7, 4\)"),
    "ranks differ": (wrong(value=(2, 2, 35, 4)), ShapeError, r"same number of axes.*value \(2, 2, 35, 4\)"),
    "batch differs": (wrong(key=(3, 2, 5, 7, 4)), ShapeError, r"share batch and heads.*key \(3, 2, 5, 7, 4\)"),
    "heads differ": (wrong(value=(2, 1, 5, 7, 4)), ShapeError, r"share batch and heads.*value \(2, 1, 5, 7, 4\)"),
    "heads that do not divide": (
        wrong(query=(2, 3, 5, 7, 4)),
        ShapeError,
        r"a divisor of the query's.*\(2, 3, 5, 7, 4\)",
    ),
    "head_dim differs": (wrong(key=(2, 2, 5, 7, 3)), ShapeError, r"share head_dim.*key \(2, 2, 5, 7, 3\)"),
    "maps differ": (wrong(value=(2, 2, 7, 5, 4)), ShapeError, r"share the map.*value \(2, 2, 7, 5, 4\)"),
    "query not one per output": (
        wrong(ns.Window(3, stride=2)),
        ShapeError,
        r"a map \(5, 7\) under .*gives \(3, 4\); received \(5, 7\)",
    ),
    "height and width exchanged": (wrong(out=(7, 5)), ShapeError, r"gives \(5, 7\); received \(7, 5\)"),
    "window for another rank": (wrong((3, 3, 3)), ShapeError, "has 3 axes but the map has 2"),
    "bias of too few axes": (wrong(bias=zeros(2, 3)), ShapeError, r"bias must be .*\(2, 3, 3\); received \(2, 3\)"),
    "bias for other heads": (wrong(bias=zeros(1, 3, 3)), ShapeError, r"\(2, 3, 3\); received \(1, 3, 3\)"),
    "bias table too long": (wrong(bias=zeros(2, 5, 5)), ShapeError, r"\(2, 3, 3\); received \(2, 5, 5\)"),
    "bias not 2k-1 on shift": (
        wrong(ns.Window(3, border="shift"), bias=zeros(2, 3, 3)),
        ShapeError,
        r"\(2, 5, 5\); received \(2, 3, 3\)",
    ),
    "one relative for two axes": (wrong(relative=[zeros(2, 3, 4)]), ShapeError, "2 in all; received 1 tensors"),
    "relative a tensor": (wrong(relative=zeros(2, 3, 4)), ShapeError, r"2 in all; received \(2, 3, 4\)"),
    "relative too long": (
        wrong(relative=[zeros(2, 3, 4), zeros(2, 5, 4)]),
        ShapeError,
        r"relative\[1\] must be .*\(2, 3, 4\); received \(2, 5, 4\)",
    ),
    "relative too narrow": (
        wrong(relative=[zeros(2, 3, 2), zeros(2, 3, 4)]),
        ShapeError,
        r"relative\[0\] must be .*\(2, 3, 4\); received \(2, 3, 2\)",
    ),
    "integer query": (wrong(query=zeros(2, 2, 5, 7, 4, dtype=torch.int64)), DtypeError, "query .*torch.int64"),
    "bool value": (wrong(value=zeros(2, 2, 5, 7, 4, dtype=torch.bool)), DtypeError, "value .*torch.bool"),
    "complex key": (wrong(key=zeros(2, 2, 5, 7, 4, dtype=torch.complex64)), DtypeError, "key .*torch.complex64"),
    "mixed dtypes": (
        wrong(key=zeros(2, 2, 5, 7, 4, dtype=torch.float64)),
        DtypeError,
        "query is torch.float32 on cpu, key is torch.float64 on cpu",
    ),
    "mixed devices": (
        wrong(value=torch.zeros(2, 2, 5, 7, 4, device="meta")),
        DtypeError,
        "query is torch.float32 on cpu, value is torch.float32 on meta",
    ),
    "bias on another device": (wrong(bias=torch.zeros(2, 3, 3, device="meta")), DtypeError, "bias must be on .*meta"),
    "integer bias": (wrong(bias=zeros(2, 3, 3, dtype=torch.int32)), DtypeError, "bias must be .*torch.int32"),
    "relative of lists": (wrong(relative=[[0.0], [0.0]]), DtypeError, r"relative\[0\] must be .*list"),
    "a list for a tensor": (wrong(query=[1.0, 2.0]), DtypeError, "query must be a torch.Tensor; received list"),
    "no value": (wrong(value=None), DtypeError, "value must be a torch.Tensor; received NoneType"),
    "window not a Window": (wrong([3, 3]), DtypeError, r"received list: write Window\(\[3, 3\]\)"),
    "window None": (wrong(None), DtypeError, "window must be a nearsight.Window; received NoneType"),
    "scale NaN": (wrong(scale=float("nan")), OptionError, "scale must be finite; received nan"),
    "scale infinite": (wrong(scale=float("inf")), OptionError, "scale must be finite; received inf"),
    "scale a tensor": (wrong(scale=torch.ones(())), DtypeError, "scale must be a number.*received Tensor"),
    "scale text": (wrong(scale="1"), DtypeError, "scale must be a number.*received str"),
    "unknown backend": (
        wrong(backend="cudnn"),
        OptionError,
        ", ".join(backend.name for backend in BACKENDS) + ", .*received 'cudnn'",
    ),
    "backend not a name": (wrong(backend=3), OptionError, "received 3"),
    "backend that cannot": (wrong(backend="dense"), BackendError, r"'dense' cannot run this: .*These can: .*blocked"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    (arguments, options), error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        ns.local_attention(*arguments, **options)


# What the weights do not take cannot be wrong for them.
ONLY_OF_ATTENTION = {
    *("no value", "bool value", "ranks differ", "heads differ", "maps differ", "mixed devices"),
    *("unknown backend", "backend not a name", "backend that cannot"),
}


@pytest.mark.parametrize("name", [name for name in ERRORS if name not in ONLY_OF_ATTENTION])
def test_errors_of_attention_weights(name):
    (arguments, options), error, message = ERRORS[name]
    query, key, _, window = arguments
    with pytest.raises(error, match=message):
        ns.attention_weights(query, key, window, **options)


WRONG_QUERIES = {
    "a list": ([[0, 0]], DtypeError, "queries must be a tensor .*received list"),
    "fractions": (torch.tensor([[1.0, 0.0]]), DtypeError, "queries must be whole numbers.*torch.float32"),
    "a mask": (torch.ones(4, 2, dtype=torch.bool), DtypeError, "queries must be whole numbers.*torch.bool"),
    "one axis": (torch.zeros(4, 1, dtype=torch.int64), ShapeError, r"\(Q, 2\).*received \(4, 1\)"),
    "below": (torch.tensor([[-1, 0]]), ShapeError, r"an output of \(5, 7\); received \[\[-1, 0\]\]"),
    "beyond": (torch.tensor([[4, 7]]), ShapeError, r"an output of \(5, 7\); received \[\[4, 7\]\]"),
}


@pytest.mark.parametrize("name", WRONG_QUERIES)
def test_queries_that_are_no_places(name):
    queries, error, message = WRONG_QUERIES[name]
    maps = torch.zeros(1, 2, 5, 7, 4)
    with pytest.raises(error, match=message):
        ns.attention_weights(maps, maps, ns.Window(3), queries=queries)


def test_indices_of_queries_of_every_integer_dtype():
    """A tensor of bytes indexes as a mask where PyTorch is asked, without a word."""
    query, key = torch.randn(2, 1, 2, 5, 7, 4)
    places = torch.tensor([[1, 0], [0, 1], [4, 6]])
    expected = ns.attention_weights(query, key, ns.Window(3))[:, :, places[:, 0], places[:, 1]]
    for dtype in (torch.int64, torch.int32, torch.uint8):
        found = ns.attention_weights(query, key, ns.Window(3), queries=places.to(dtype))
        torch.testing.assert_close(found, expected)


def test_errors_of_global_attention():
    query = torch.randn(1, 2, 3, 5, 4)
    with pytest.raises(ShapeError, match=r"\(2, 5, 9\); received \(2, 3, 5\)"):
        ns.global_attention(query, query, query, bias=zeros(2, 3, 5))
    with pytest.raises(ShapeError, match=r"gives \(3, 5\); received \(3, 4\)"):
        ns.global_attention(query[:, :, :, :4], query, query)
    with pytest.raises(DtypeError, match=r"key must be a torch.Tensor; received NoneType"):
        ns.global_attention(query, None, query)
    with pytest.raises(ShapeError, match=r"received \(3, 4\)"):
        ns.global_attention(query[0, 0, 0, :3], query[0, 0, 0, :3], query[0, 0, 0, :3])


def test_a_refusal_lists_those_that_can():
    query = torch.randn(1, 1, 5, 4)
    with pytest.raises(BackendError) as caught:
        ns.local_attention(query, query, query, ns.Window(3), backend="dense")
    able = str(caught.value).split("These can: ")[1].split(", ")
    problem = describe(query, query, query, ns.Window(3), None, None)
    assert able == [name for name, why in ns.backends(problem).items() if why is None]
    assert "dense" not in able


def test_backends_answers_for_each():
    assert list(ns.backends()) == [backend.name for backend in BACKENDS]
    assert ns.backends()["reference"] is None
    assert ns.backends()["blocked"] is None
    assert all(why is None or len(why) > 10 for why in ns.backends().values())


def test_a_wrong_call_changes_nothing():
    """The checks come before any work: a call that fails leaves its arguments alone."""
    query = torch.randn(1, 1, 5, 4, requires_grad=True)
    with pytest.raises(ShapeError):
        ns.local_attention(query, query, query[:, :, 1:], ns.Window(3))
    assert query.grad is None
    assert query._version == 0


# --------------------------------------------------------------------------------------------------- dtypes, autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_backend(ALL)
def test_float32_tables_serve_half_precision(contestant, dtype):
    """What a network under autocast has: parameters in float32, activations in half precision."""
    window = ns.Window((5, 9))
    query, key, value = (tensor.to(dtype) for tensor in maps(3, 5))
    bias = torch.randn(2, 5, 9) * 3
    relative = [torch.randn(2, n, 4) for n in (5, 9)]
    if contestant.why_not(query, key, value, window, bias=bias, relative=relative) is not None:
        return
    found = contestant.attend(query, key, value, window, bias=bias, relative=relative)
    doubles = [tensor.double() for tensor in (query, key, value, bias, *relative)]
    expected = ns.local_attention(*doubles[:3], window, bias=doubles[3], relative=doubles[4:], backend="reference")
    assert found.dtype == dtype
    assert_near("values", found, expected.numpy(), 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@every_backend(ALL)
def test_autocast_keeps_dtype_and_precision(contestant, dtype):
    """bfloat16 in, bfloat16 out; float32 in, float32 out at full precision; float32 sums in both."""
    window = ns.Window((5, 9))
    tensors = [tensor.to(dtype).requires_grad_() for tensor in maps(3, 5)]
    if contestant.why_not(*tensors, window) is not None:
        return
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = contestant.attend(*tensors, window)
    plain = contestant.attend(*tensors, window)
    assert found.dtype == dtype
    assert torch.equal(found, plain)
    for one, other in zip(
        torch.autograd.grad(found.sum(), tensors), torch.autograd.grad(plain.sum(), tensors), strict=True
    ):
        assert torch.equal(one, other)


def test_autocast_through_a_projection():
    """In a network: float32 parameters, bfloat16 activations, float32 gradients."""
    project = torch.nn.Linear(8, 24)
    bias = torch.randn(2, 3, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        query, key, value = project(torch.randn(1, 5, 7, 8)).view(1, 5, 7, 3, 2, 4).permute(3, 0, 4, 1, 2, 5)
        out = ns.local_attention(query, key, value, ns.Window(3), bias=bias)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert project.weight.grad.dtype == bias.grad.dtype == torch.float32
    assert project.weight.grad.abs().sum() > 0


def test_a_long_sum_is_held_in_float32():
    """The mean of 4096 ones: a sum in bfloat16 would stop at 256, a sum of rounded weights would miss 1 by far."""
    for dtype in (torch.bfloat16, torch.float16):
        ones = torch.ones(1, 1, 64, 64, 1, dtype=dtype)
        out = ns.local_attention(ones[..., :1, :1, :], ones, ones, ns.Window(127, stride=64))
        assert out.item() == 1


# ---------------------------------------------------------------------------------------------- derivatives, transforms


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@by_window
def test_gradcheck(name, backend):
    function, inputs = flat_problem(WINDOWS[name])
    few = [tensor[:1].detach().requires_grad_() if tensor.ndim == 5 else tensor for tensor in inputs]  # one image
    gradcheck(lambda *tensors: function(*tensors, backend=backend), few, fast_mode=True, check_forward_ad=True)
    gradgradcheck(lambda *tensors: function(*tensors, backend=backend), few, fast_mode=True)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_gradcheck_of_every_element(backend):
    query, key, value = (tensor[:1, :1].clone().requires_grad_() for tensor in maps(5, dim=2, dtype=torch.float64))
    bias = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)

    def function(query, key, value, bias):
        return ns.local_attention(query, key, value, ns.Window(3), bias=bias, backend=backend)

    gradcheck(function, (query, key, value, bias), check_forward_ad=True, check_batched_grad=True)
    gradgradcheck(function, (query, key, value, bias))


@by_window
def test_jvp_is_the_derivative_along_a_direction(name):
    """Against (f(x + h t) - f(x - h t)) / 2h, and against the transposed product of reverse mode."""
    function, inputs = flat_problem(WINDOWS[name], grad=False)
    tangents = [torch.randn_like(tensor) for tensor in inputs]
    value, tangent = torch.func.jvp(function, tuple(inputs), tuple(tangents))
    step = 1e-6
    above, below = (function(*(x + sign * step * t for x, t in zip(inputs, tangents, strict=True))) for sign in (1, -1))
    torch.testing.assert_close(value, function(*inputs))
    torch.testing.assert_close(tangent, (above - below) / (2 * step), rtol=1e-6, atol=1e-8)
    _, pull_back = torch.func.vjp(function, *inputs)
    cotangent = torch.randn_like(value)
    transposed = sum((g * t).sum() for g, t in zip(pull_back(cotangent), tangents, strict=True))
    torch.testing.assert_close((cotangent * tangent).sum(), transposed)


@pytest.mark.parametrize("backend", ["blocked", None])
def test_forward_mode_ad(backend):
    """Dual numbers, and the choice of a backend that has the derivative: the window covers the map."""
    query, key, value = maps(3, 4, dtype=torch.float64)
    tangent = torch.randn_like(value)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(value, tangent)
        out = ns.local_attention(query, key, dual, ns.Window(7), backend=backend)
        found = forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(found, ns.local_attention(query, key, tangent, ns.Window(7)))  # linear in the values


def test_default_backend_has_forward_mode_under_func():
    query, key, value = maps(3, 4, dtype=torch.float64)
    tangent = torch.randn_like(value)

    def function(value):
        return ns.local_attention(query, key, value, ns.Window(7))

    _, found = torch.func.jvp(function, (value,), (tangent,))
    torch.testing.assert_close(found, function(tangent))


@by_window
def test_vmap(name):
    function, inputs = flat_problem(WINDOWS[name], grad=False)
    many = [torch.stack([tensor, torch.randn_like(tensor), torch.randn_like(tensor)]) for tensor in inputs]
    expected = torch.stack([function(*(tensor[i] for tensor in many)) for i in range(3)])
    torch.testing.assert_close(torch.func.vmap(function)(*many), expected)
    in_dims = (0, None, 0, None, 0, None)  # some inputs are shared
    some = [tensor if dim == 0 else one for tensor, one, dim in zip(many, inputs, in_dims, strict=True)]
    expected = torch.stack(
        [function(*(t[i] if dim == 0 else t for t, dim in zip(some, in_dims, strict=True))) for i in range(3)]
    )
    torch.testing.assert_close(torch.func.vmap(function, in_dims)(*some), expected)


def test_gradients_per_sample():
    """vmap over grad: what differential privacy and influence functions need."""
    query, key, value = maps(3, 4, dtype=torch.float64)
    bias = torch.randn(2, 3, 3, dtype=torch.float64)

    def loss(bias, query, key, value):
        tensors = [tensor[None] for tensor in (query, key, value)]
        return ns.local_attention(*tensors, ns.Window(3), bias=bias, backend="blocked").square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0, 0, 0))(bias, query, key, value)
    expected = torch.stack([torch.func.grad(loss)(bias, query[i], key[i], value[i]) for i in range(2)])
    torch.testing.assert_close(found, expected)


def test_jacobians_of_both_modes_agree():
    query, key, value = (tensor[:1, :1] for tensor in maps(4, dim=2, dtype=torch.float64))

    def function(key):
        return ns.local_attention(query, key, value, ns.Window(3), backend="blocked")

    forward, reverse = torch.func.jacfwd(function)(key), torch.func.jacrev(function)(key)
    torch.testing.assert_close(forward, reverse)
    torch.testing.assert_close(
        torch.func.hessian(lambda key: function(key).square().sum())(key),
        torch.autograd.functional.hessian(lambda key: function(key).square().sum(), key),
    )


def test_default_backend_has_double_backward():
    """A gradient penalty. (Where the block covers the map, torch's fused kernel has none: name "blocked" there.)"""
    query, key, value = (tensor.requires_grad_() for tensor in maps(3, 4, dtype=torch.float64))

    def penalty(backend):
        out = ns.local_attention(query, key, value, ns.Window(3), backend=backend)
        (gradient,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), key)[0]

    torch.testing.assert_close(penalty(None), penalty("reference"))


def test_no_grad_and_inference_mode():
    tensors = [tensor.requires_grad_() for tensor in maps(5, 7)]
    expected = ns.local_attention(*tensors, ns.Window(3))
    assert expected.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found = ns.local_attention(*tensors, ns.Window(3))
        assert not found.requires_grad
        torch.testing.assert_close(found, expected.detach())


def test_checkpoint():
    tensors = [tensor.requires_grad_() for tensor in maps(5, 7)]

    def function(*tensors):
        return ns.local_attention(*tensors, ns.Window(3)).square().sum()

    plain = torch.autograd.grad(function(*tensors), tensors)
    saved = torch.autograd.grad(torch.utils.checkpoint.checkpoint(function, *tensors, use_reentrant=False), tensors)
    assert all(torch.equal(one, other) for one, other in zip(plain, saved, strict=True))


# -------------------------------------------------------------------------------------------------------- torch.compile


def check_compiled(function, inputs, **options) -> None:
    torch._dynamo.reset()
    found, expected = torch.compile(function, fullgraph=True, **options)(*inputs), function(*inputs)
    torch.testing.assert_close(found, expected)
    compiled, plain = (torch.autograd.grad(out.square().sum(), inputs) for out in (found, expected))
    for one, other in zip(compiled, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@one_window("shift")
def test_compiles_without_graph_breaks(name):
    check_compiled(*flat_problem(WINDOWS[name], torch.float32), backend="eager")


@pytest.mark.slow
@one_window("shared")
def test_compiles_its_backward(name):
    check_compiled(*flat_problem(WINDOWS[name], torch.float32), backend="aot_eager")


SIZES = {  # of a batch and a map, in turn
    "a line": [(2, 12), (3, 14), (5, 19)],
    "an image": [(2, 12, 14), (3, 14, 11), (5, 19, 17)],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("border", "sizes"),
    [
        ("shift", "a line"),
        pytest.param("shift", "an image", marks=pytest.mark.sweep),
        pytest.param("mask", "an image", marks=pytest.mark.sweep),
    ],
)
def test_compiles_for_every_size_at_once(border, sizes):
    """Symbolic sizes: graphs serve every map and batch."""

    class Layer(torch.nn.Module):
        window = ns.Window(3, border=border)

        def forward(self, query, key, value):
            return ns.local_attention(query, key, value, self.window, backend="blocked")

    torch._dynamo.reset()
    graphs = CompileCounter()
    compiled = torch.compile(Layer(), fullgraph=True, dynamic=True, backend=graphs)
    for batch, *size in SIZES[sizes]:
        tensors = [torch.randn(batch, 2, *size, 4) for _ in range(3)]
        torch.testing.assert_close(compiled(*tensors), Layer()(*tensors))
    assert graphs.frame_count <= 2  # maps that fit into one block are a case of their own


def test_compiles_with_the_default_backend():
    query, key, value = maps(5, 7)
    for window in (ns.Window(3), ns.Window(13)):
        torch._dynamo.reset()
        compiled = torch.compile(ns.local_attention, fullgraph=True, backend="eager")
        found = compiled(query, key, value, window)
        torch.testing.assert_close(found, ns.local_attention(query, key, value, window))


def test_compiles_windows_that_are_arguments():
    """Of the second of them the compiler holds every field by a symbol."""
    query, key, value = maps(5, 7)
    torch._dynamo.reset()
    compiled = torch.compile(ns.local_attention, fullgraph=True, backend="eager")
    for window in (ns.Window(3), ns.Window(5, dilation=3, border="wrap")):
        found = compiled(query, key, value, window, backend="blocked")
        torch.testing.assert_close(found, ns.local_attention(query, key, value, window))


@pytest.mark.sweep
@by_window
def test_compiles_to_native_code(name):
    assert shutil.which("g++"), "torch's inductor needs a C++ compiler"
    check_compiled(*flat_problem(WINDOWS[name], torch.float32))


@pytest.mark.sweep
def test_compiles_a_line_to_native_code():
    """Every rule that one axis can have; on a plane the compiler works on the same formulas ten times as long."""
    window = ns.Window(4, shared_by=2, dilation=2, stride=2, border="shift")
    query, key, value = torch.randn(2, 2, 6, 4), *torch.randn(2, 2, 2, 11, 4)
    tables = torch.randn(2, 7), torch.randn(2, 7, 4)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value, *tables)]

    def function(query, key, value, bias, relative):
        return ns.local_attention(query, key, value, window, bias=bias, relative=[relative], backend="blocked")

    check_compiled(function, inputs)


# --------------------------------------------------------------------------------------------------------------- memory


def peak_bytes(function) -> int:
    """The most bytes that PyTorch's allocator held at once beyond those it held before, kernels' own buffers included."""
    with profile(profile_memory=True) as recorded:
        function()
    events = recorded.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    assert changes, "the profiler recorded no allocation"
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def textbook(query: Tensor, key: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """What every tutorial copies: F.unfold writes each key and each value k*k times."""
    b, n, h, w, d = query.shape
    keys, values = (
        F.unfold(tensor.movedim(-1, 2).reshape(b, n * d, h, w), kernel_size, padding=kernel_size // 2)
        .view(b, n, d, kernel_size**2, h * w)
        .permute(0, 1, 4, 3, 2)
        for tensor in (key, value)
    )
    logits = (query.view(b, n, h * w, 1, d) * keys).sum(-1) * d**-0.5
    return (logits.softmax(-1)[..., None] * values).sum(-2).view(query.shape)


def test_peak_bytes_sees_what_is_held():
    assert peak_bytes(lambda: torch.ones(1 << 20)) == pytest.approx(4 << 20, rel=0.01)
    assert peak_bytes(lambda: [torch.ones(1 << 20) for _ in range(3)]) == pytest.approx(12 << 20, rel=0.01)
    assert peak_bytes(lambda: [torch.ones(1 << 20).sum() for _ in range(3)]) == pytest.approx(4 << 20, rel=0.01)


@torch.no_grad()
def test_blocked_needs_a_fifth_of_the_textbooks_memory():
    """On batch 8, 4 heads x 32, 64 x 64, k = 7. The textbook handles images one by one, so its peak for the batch is eight
    times that of one image: measured so, because the whole takes seconds and gigabytes."""
    query, key, value = (torch.randn(8, 4, 64, 64, 32) for _ in range(3))
    one_image = [tensor[:1].contiguous() for tensor in (query, key, value)]
    theirs = 8 * peak_bytes(lambda: textbook(*one_image, 7))
    ours = peak_bytes(lambda: ns.local_attention(query, key, value, ns.Window(7), backend="blocked"))
    assert ours <= theirs / 5, f"{ours / 2**20:.0f} MiB against {theirs / 2**20:.0f} MiB"
