# SPDX-License-Identifier: Apache-2.0
"""The layers have the borders of nn.ConvNd, the papers' parameter counts, and train."""

import inspect
import math
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import projected, projections
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import nearsight as ns
from nearsight.attention import native
from nearsight.attention.native import projected as by_one_operator
from nearsight.errors import DtypeError, OptionError, ShapeError
from nearsight.layers import projection as room
from nearsight.layers.projection import POINTWISE, PatchProjection2d, _whole, project
from nearsight.models.blocks import RelativeOnlySelfAttention2d

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
SIZE = (7, 10, 5)


def local(rank):
    return getattr(ns, f"LocalSelfAttention{rank}d")


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
def test_drop_in_for_convolutions(rank, stride, dilation):
    x = torch.randn(2, 6, *SIZE[:rank])
    conv = CONV[rank](6, 12, 3, stride, padding=dilation, dilation=dilation)
    attention = local(rank)(6, 12, 3, stride=stride, dilation=dilation, num_heads=4)
    assert attention(x).shape == conv(x).shape
    assert attention(x[0]).shape == conv(x[0]).shape
    torch.testing.assert_close(attention(x[:1])[0], attention(x[0]))


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("kind", ["Local", "Global"])
def test_memory_formats(rank, kind):
    layer = getattr(ns, f"{kind}SelfAttention{rank}d")(8, 16, num_heads=2, map_size=10)
    last = torch.channels_last if rank == 2 else torch.channels_last_3d
    x = torch.randn(2, 8, *SIZE[:rank])
    y = layer(x)
    assert y.is_contiguous()
    y_last = layer(x.to(memory_format=last))
    assert y_last.is_contiguous(memory_format=last)
    torch.testing.assert_close(y, y_last)


def test_the_layer_is_the_operation_between_projections():
    torch.manual_seed(0)
    layer = ns.LocalSelfAttention2d(6, 8, 3, stride=2, num_heads=2, qkv_bias=True, out_proj=True).double()
    for projection in projections(layer):
        nn.init.normal_(projection.bias)
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    q, k, v = (t.unflatten(1, (2, 4)).movedim(2, -1) for t in projected(layer, x).chunk(3, 1))
    _, relative = layer.position.tables(ns.Window(3), (5, 7))
    y = ns.local_attention(q[:, :, ::2, ::2], k, v, ns.Window(3, stride=2), relative=relative, backend="reference")
    torch.testing.assert_close(layer(x), layer.proj(y.movedim(-1, 2).flatten(1, 2)))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", [ns.LocalSelfAttention2d, RelativeOnlySelfAttention2d])
@pytest.mark.parametrize("qk_channels", [4, 12])
def test_queries_and_keys_of_another_width_than_the_values(qk_channels, kind, stride):
    torch.manual_seed(0)
    content = kind is ns.LocalSelfAttention2d
    layer = kind(6, 8, 3, stride=stride, num_heads=2, qkv_bias=True, qk_channels=qk_channels).double()
    for projection in projections(layer):
        nn.init.normal_(projection.bias)
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64, requires_grad=True)
    *pair, v = projected(layer, x).split([*[qk_channels] * (2 if content else 1), 8], 1)
    q, k = pair if content else (pair[0], torch.zeros_like(pair[0]))
    q, k, v = (t.unflatten(1, (2, -1)).movedim(2, -1) for t in (q, k, v))
    _, relative = layer.position.tables(ns.Window(3), (5, 7))
    window = ns.Window(3, stride=stride)
    y = ns.local_attention(q[:, :, ::stride, ::stride], k, v, window, relative=relative, backend="reference")
    y = y.movedim(-1, 2).flatten(1, 2)
    grad = torch.randn_like(y)
    wanted = [x, *layer.parameters()]
    expected, weights = torch.autograd.grad(y, wanted, grad), layer.attention_weights(x)
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(torch.autograd.grad(layer(x), wanted, grad), expected)
    torch.testing.assert_close(weights, ns.attention_weights(q[:, :, ::stride, ::stride], k, window, relative=relative))
    single = layer.float()  # on a CPU the native kernel
    torch.testing.assert_close(single(x.float()), y.float(), atol=1e-5, rtol=1e-5)
    assert f"num_heads=2, qk_channels={qk_channels}" in repr(layer)


@pytest.mark.parametrize("stride", [1, 2])
def test_layer_weights_mix_the_values(stride):
    layer = ns.LocalSelfAttention2d(6, 6, 3, stride=stride, num_heads=1, border="zeros")
    x = torch.randn(2, 6, 5, 7)
    weights = layer.attention_weights(x)
    assert weights.shape == (2, 1, *ns.Window(3, stride=stride).output_size((5, 7)), 3, 3)
    patches = F.unfold(projected(layer, x)[:, 12:], 3, padding=1, stride=stride).unflatten(1, (6, 9))
    torch.testing.assert_close(
        torch.einsum("bckp,bpk->bcp", patches, weights.flatten(1, 3).flatten(2)), layer(x).flatten(2)
    )


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 3 * 16 * 32 + 7 * 32),
        ({"position": "none"}, 3 * 16 * 32),
        ({"qkv_bias": True}, 3 * 16 * 32 + 3 * 32 + 7 * 32),
        ({"out_proj": True}, 3 * 16 * 32 + 7 * 32 + 32 * 33),
        ({"qk_channels": 24, "qkv_bias": True}, (2 * 24 + 32) * 17 + 7 * 24),
    ],
)
def test_parameter_count_formula(options, count):
    assert sum(p.numel() for p in ns.LocalSelfAttention2d(16, 32, **options).parameters()) == count


def test_state_dict_names_survive():
    layer = ns.LocalSelfAttention2d(16, 32, qkv_bias=True, out_proj=True)
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == {
        "qkv.weight": (96, 16, 1, 1),
        "qkv.bias": (96,),
        "position.vectors.0": (8, 7, 2),
        "position.vectors.1": (8, 7, 2),
        "proj.weight": (32, 32, 1, 1),
        "proj.bias": (32,),
    }
    stem = ns.AttentionStem2d(3, 8)
    assert set(stem.state_dict()) == {
        "row", "column", "mixture", "qk.weight", "value.weight", "position.vectors.0", "position.vectors.1",
        "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked",
    }  # fmt: skip
    # Encodings without parameters leave no trace.
    assert set(ns.LocalSelfAttention2d(16, num_heads=2, position="rope").state_dict()) == {"qkv.weight"}


def test_extra_repr():
    assert repr(ns.LocalSelfAttention2d(16, 32, 5, stride=2, border="shift", scale=1.0)).splitlines()[1].strip() == (
        "16, 32, kernel_size=5, num_heads=8, stride=2, border='shift', scale=1.0"
    )
    assert "16, 32, num_heads=8" in repr(ns.GlobalSelfAttention2d(16, 32))


def test_eval_changes_nothing():
    layer, x = ns.LocalSelfAttention2d(8, num_heads=2), torch.randn(1, 8, 6, 6)
    assert torch.equal(layer(x), layer.eval()(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    layer = ns.LocalSelfAttention2d(8, num_heads=2).to(dtype)
    assert layer(torch.randn(1, 8, 6, 6, dtype=dtype)).dtype == dtype


def test_autocast():
    layer = ns.LocalSelfAttention2d(8, num_heads=2, out_proj=True)
    x = torch.randn(1, 8, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), atol=5e-2, rtol=5e-2)


def test_logits_start_with_variance_one():
    torch.manual_seed(0)
    layer = ns.LocalSelfAttention2d(64, num_heads=2)
    q, k, _ = layer.qkv(torch.randn(4, 64, 16, 16)).unflatten(1, (3, 2, 32)).unbind(1)
    assert ((q * k).sum(2) * 32**-0.5).std().item() == pytest.approx(1, abs=0.15)


def test_hills_decide_at_first():
    """Content moves the logits of a quadratic encoding by a tenth at first, and the values are as large as everywhere."""
    torch.manual_seed(0)
    layer = ns.LocalSelfAttention2d(64, num_heads=2, position="quadratic")
    q, k, v = layer.qkv(torch.randn(4, 64, 16, 16)).unflatten(1, (3, 2, 32)).unbind(1)
    assert ((q * k).sum(2) * 32**-0.5).std().item() == pytest.approx(0.09, abs=0.02)
    assert v.std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (
            lambda: ns.LocalSelfAttention2d(16, qk_channels=12),
            ShapeError,
            "must divide qk_channels=12; num_heads=4 does",
        ),
        (lambda: ns.LocalSelfAttention2d(16, qk_channels=0), OptionError, "qk_channels must be an int of at least 1"),
        (lambda: ns.LocalSelfAttention2d(16, 30), ShapeError, "num_heads=8 must divide out_channels=30; num_heads=6"),
        (lambda: ns.LocalSelfAttention2d(0), OptionError, "in_channels must be .* received 0"),
        (lambda: ns.LocalSelfAttention2d(16, num_heads=0), OptionError, "num_heads must be .* received 0"),
        (lambda: ns.LocalSelfAttention2d(16, kernel_size=0), OptionError, "kernel_size must be at least 1; received 0"),
        (lambda: ns.LocalSelfAttention2d(16, stride=-1), OptionError, "stride must be at least 1; received -1"),
        (lambda: ns.LocalSelfAttention2d(16, kernel_size=(3, 3, 3)), ShapeError, "3 axes but the map has 2"),
        (lambda: ns.LocalSelfAttention2d(16, scale=math.nan), OptionError, "scale must be finite; received nan"),
        (lambda: ns.GlobalSelfAttention1d(16, scale=torch.ones(())), DtypeError, "scale must be a number .*Tensor"),
        (lambda: ns.HaloSelfAttention2d(16, scale="1"), DtypeError, "scale must be a number .*received str"),
        (lambda: ns.AttentionStem2d(3, scale=math.inf), OptionError, "scale must be finite; received inf"),
        (lambda: ns.LocalSelfAttention2d(16)(torch.randn(2, 8, 5, 5)), ShapeError, r"\(B, 16, H, W\).*\(2, 8, 5, 5\)"),
        (lambda: ns.LocalSelfAttention1d(16)(torch.randn(1, 2, 16, 5)), ShapeError, r"\(B, 16, L\).*\(1, 2, 16, 5\)"),
        (lambda: ns.AttentionStem2d(3, 10), ShapeError, "num_heads=4 must divide out_channels=10; num_heads=2"),
        (lambda: ns.AttentionStem2d(3, kernel_size=1), OptionError, "at least 2.*received 1"),
        (
            lambda: ns.AttentionStem2d(3)(torch.randn(1, 1, 8, 8)),
            ShapeError,
            r"\(B, 3, H, W\); received \(1, 1, 8, 8\)",
        ),
    ],
)
def test_errors(run, error, message):
    with pytest.raises(error, match=message):
        run()


def test_a_causal_layer_learns_a_sequence():
    """Predict the next symbol of a sequence in which each repeats the one four steps before it."""
    torch.manual_seed(0)
    seeds = torch.randint(0, 5, (256, 4))
    sequences = seeds.repeat(1, 5)
    embed, head = nn.Embedding(5, 16), nn.Conv1d(16, 5, 1)
    layer = ns.LocalSelfAttention1d(16, kernel_size=5, causal=True, num_heads=2)
    parameters = [*embed.parameters(), *layer.parameters(), *head.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=1e-2)

    def predict(tokens):
        return head(layer(embed(tokens).mT))

    for _ in range(60):
        logits = predict(sequences[:, :-1])
        loss = F.cross_entropy(logits[..., 4:], sequences[:, 5:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert (logits[..., 4:].argmax(1) == sequences[:, 5:]).float().mean() > 0.99
    # Causal: the future changes nothing.
    changed = sequences.clone()
    changed[:, 12:] = 0
    torch.testing.assert_close(predict(sequences)[..., :12], predict(changed)[..., :12])


def stem_by_hand(stem, x):
    """The stem's equation for one aligned block of the image, cell by cell."""
    heads, side = stem.num_heads, stem.kernel_size
    p = stem.mixing()
    q, k = (t.unflatten(0, (heads, -1)) for t in stem.qk(x[None])[0].chunk(2))
    matrices = stem.value.weight[..., 0, 0].unflatten(0, (-1, stem.out_channels))
    row, column = stem.position.vectors
    y = torch.zeros(heads, stem.out_channels // heads, *x.shape[1:], dtype=x.dtype)
    v = torch.stack(
        [
            torch.einsum("m,moc,c->o", p[:, i, j], matrices, x[:, i, j])
            for i in range(x.shape[1])
            for j in range(x.shape[2])
        ]
    ).view(*x.shape[1:], heads, -1)
    for n in range(heads):
        for i in range(x.shape[1]):
            for j in range(x.shape[2]):
                logits = torch.stack([
                    q[n, :, i, j] @ (k[n, :, a, b] + torch.cat([row[n, a - i + side - 1], column[n, b - j + side - 1]]))
                    for a in range(x.shape[1]) for b in range(x.shape[2])
                ])  # fmt: skip
                weights = (logits * q.shape[1] ** -0.5).softmax(0)
                y[n, :, i, j] = weights @ v[:, :, n].flatten(0, 1)
    return y.flatten(0, 1)


def test_stem_equation():
    torch.manual_seed(0)
    stem = ns.AttentionStem2d(3, 8, kernel_size=3, num_heads=2, mixtures=4).double().eval()
    image = torch.randn(3, 6, 8, dtype=torch.float64)  # the last blocks are two cells wide
    whole = torch.cat(
        [torch.cat([stem_by_hand(stem, strip) for strip in band.split(3, 2)], 2) for band in image.split(3, 1)], 1
    )
    expected = F.max_pool2d(stem.norm(whole[None]), 3, ceil_mode=True)
    torch.testing.assert_close(stem(image[None]), expected)


def test_stem_shapes_parameters_and_gradients():
    stem = ns.AttentionStem2d()
    y = stem(torch.randn(2, 3, 30, 33))
    assert y.shape == (2, 64, 8, 9)
    assert sum(p.numel() for p in stem.parameters()) == (2 + 4) * 3 * 64 + 7 * 64 + (2 * 4 + 4) * 16 + 2 * 64
    y.square().sum().backward()
    assert [name for name, p in stem.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["planar", "channels_last"]
)
def test_gradient_of_the_fused_projection_is_taken_as_it_lies(memory_format, monkeypatch):
    layer = ns.LocalSelfAttention2d(16, num_heads=2)
    x = torch.randn(2, 16, 9, 11).to(memory_format=memory_format).requires_grad_()
    grad = torch.randn(2, 16, 9, 11)
    wholes = []
    monkeypatch.setattr(room, "_whole", lambda parts: wholes.append(_whole(parts)) or wholes[-1])
    found = torch.autograd.grad(layer(x), [x, *layer.parameters()], grad)
    monkeypatch.setattr(room, "split_parts", lambda joined, widths: joined.split(widths, 1))
    expected = torch.autograd.grad(layer(x), [x, *layer.parameters()], grad)
    assert [one is not None for one in wholes] == [ns.backends()["native"] is None]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_layer_runs_where_there_is_no_autocast():
    layer = ns.LocalSelfAttention2d(8, num_heads=2, device="meta")
    x = torch.empty(2, 8, 16, 16, device="meta").to(memory_format=torch.channels_last)
    assert layer(x).shape == x.shape


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("images", [1, 3])  # with one there are too few cells for a product to pay
def test_a_projection_is_a_convolution_with_a_kernel_of_one(rank, bias, images):
    size = {1: (17,), 2: (5, 4), 3: (2, 3, 3)}[rank]
    convolution = CONV[rank](3, 2, 1, bias=bias).double()
    projection = POINTWISE[rank](3, 2, 1, bias=bias).double()
    projection.load_state_dict(convolution.state_dict())
    x = torch.randn(images, *size, 3, dtype=torch.float64).movedim(-1, 1).requires_grad_()
    grad = torch.randn(images, 2, *size, dtype=torch.float64)
    y = projection(x)
    assert type(y.grad_fn).__name__ == "_ProjectBackward"
    torch.testing.assert_close(y, convolution(x))
    found = torch.autograd.grad(y, [x, *projection.parameters()], grad)
    expected = torch.autograd.grad(convolution(x), [x, *convolution.parameters()], grad)
    torch.testing.assert_close(found, expected)
    inputs = [x, *projection.parameters()]
    assert torch.autograd.gradgradcheck(lambda x, *weights: project(x, *weights), inputs)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(("size", "patch_size"), [((6, 8), 2), ((7, 5), 2), ((9, 7), 3), ((8, 11), 3)])
def test_a_patch_projection_is_a_convolution_whose_stride_is_its_kernel(size, patch_size, memory_format):
    projection = PatchProjection2d(3, 5, patch_size).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    filled = torch.nn.functional.pad(x, (0, -size[1] % patch_size, 0, -size[0] % patch_size))
    expected = torch.nn.functional.conv2d(filled, projection.weight, stride=patch_size)
    y = projection(x)
    assert (type(y.grad_fn).__name__ == "ConvolutionBackward0") == (memory_format is torch.contiguous_format)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(expected)
    inputs = [x, projection.weight]
    torch.testing.assert_close(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad))
    with torch.no_grad():
        torch.testing.assert_close(projection(x), expected)
    torch.testing.assert_close(torch.jit.trace(projection, x)(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert projection.float()(x.float()).dtype == torch.bfloat16


def test_a_projection_leaves_transforms_and_autocast_alone():
    """What torch compiles, traces, maps or casts is the plain convolution."""
    projection = POINTWISE[2](6, 10, 1)
    x = torch.randn(2, 6, 10, 9).to(memory_format=torch.channels_last)
    assert type(projection(x).grad_fn).__name__ == "_ProjectBackward"
    with torch.no_grad():
        assert projection(x).grad_fn is None
    with torch.autocast("cpu", torch.bfloat16):
        assert type(projection(x).grad_fn).__name__ != "_ProjectBackward"
    weights = dict(projection.named_parameters())
    per_image = torch.func.vmap(
        torch.func.grad(lambda w, one: functional_call(projection, w, (one[None],)).sum()), (None, 0)
    )
    found = per_image(weights, x)["weight"]
    torch.testing.assert_close(found, x.sum((2, 3))[:, None, :, None, None].expand_as(found))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tracing is of yesterday
        assert torch.jit.trace(projection, x)(x).shape == (2, 10, 10, 9)


REMADE = {
    "plain": {},
    "stride": {"stride": 2},
    "wide, biases": {"out_channels": 32, "qkv_bias": True, "out_proj": True},
    "rotary": {"position": "mixed_rope"},
    "learned": {"position": "learned", "map_size": 6},
    "q.r alone": {"kind": RelativeOnlySelfAttention2d},
}


def trained(layer, x, grad):
    """The output, and the gradients of the input and of all that is learnt."""
    wanted = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    for tensor in wanted:
        tensor.grad = None
    y = layer(x)
    y.backward(grad[:, :, : y.shape[2], : y.shape[3]])
    return [y, *(tensor.grad for tensor in wanted)]


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
@pytest.mark.parametrize("options", REMADE.values(), ids=REMADE)
@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_projected_again_is_the_same_to_the_bit(options, frozen, monkeypatch):
    monkeypatch.setattr(by_one_operator, "serves", lambda *_: False)  # which keeps none of them
    torch.manual_seed(0)
    options = {"kind": ns.LocalSelfAttention2d, "in_channels": 16, "kernel_size": 3, "num_heads": 2, **options}
    kind = options.pop("kind")
    keeping, remaking = (kind(**options, recompute_qkv=again) for again in (False, True))
    remaking.load_state_dict(keeping.state_dict())
    for layer in (keeping, remaking):
        for projection in projections(layer):
            projection.requires_grad_(not frozen)
    x = torch.randn(2, 16, 9, 11).to(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn(2, keeping.out_channels, 9, 11)
    assert all(map(torch.equal, trained(remaking, x, grad), trained(keeping, x, grad)))


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
@pytest.mark.parametrize("stride", [1, 2])
def test_queries_keys_and_values_are_not_kept(stride, monkeypatch):
    monkeypatch.setattr(by_one_operator, "serves", lambda *_: False)  # which keeps none of them

    def kept(recompute_qkv):
        layer = ns.LocalSelfAttention2d(16, kernel_size=3, stride=stride, num_heads=2, recompute_qkv=recompute_qkv)
        x = torch.randn(4, 16, 20, 20).to(memory_format=torch.channels_last).requires_grad_()
        stores = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: stores.update({t.data_ptr(): t.nbytes}) or t, lambda t: t
        ):
            y = layer(x)
        y.sum().backward()
        return sum(stores.values())

    outputs = 4 * 4 * 16 * 20 * 20
    assert kept(False) - kept(True) == pytest.approx(outputs * (2 + stride**-2))


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
def test_projecting_again_sees_that_its_input_was_changed():
    layer = ns.LocalSelfAttention2d(8, num_heads=2, recompute_qkv=True)
    x = torch.randn(1, 8, 9, 9).requires_grad_().clone()
    y = layer(x)
    x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_where_nothing_can_be_projected_again_the_layer_is_the_same(monkeypatch):
    """Under a checkpoint, a compiler, autocast and torch.func, with another backend and another projection."""
    monkeypatch.setattr(by_one_operator, "serves", lambda *_: False)  # which keeps none of them
    torch.manual_seed(0)
    keeping, remaking = (
        ns.LocalSelfAttention2d(8, kernel_size=3, num_heads=2, recompute_qkv=on) for on in (False, True)
    )
    remaking.load_state_dict(keeping.state_dict())
    x = torch.randn(2, 8, 9, 9).to(memory_format=torch.channels_last).requires_grad_()
    grad = torch.randn(2, 8, 9, 9)

    def everywhere(layer):
        for reentrant in (False, True):
            yield trained(_Wrapped(layer, partial(checkpoint, layer, use_reentrant=reentrant)), x, grad)
        yield trained(_Wrapped(layer, torch.compile(layer, backend="aot_eager")), x, grad)
        with torch.autocast("cpu", torch.bfloat16):
            found = trained(layer, x, grad.bfloat16())
        yield found
        yield [torch.func.grad(lambda x: (layer(x) * grad).sum())(x)]
        layer.backend = "blocked"
        yield trained(layer, x, grad)
        layer.backend = None
        layer.qkv = nn.Sequential(layer.qkv, nn.Tanh())
        yield trained(layer, x, grad)

    for one, other in zip(everywhere(remaking), everywhere(keeping), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


class _Wrapped(nn.Module):
    def __init__(self, layer, run):
        super().__init__()
        self.layer, self.run = layer, run

    def forward(self, x):
        return self.run(x)


def test_parts_that_are_not_neighbours_are_no_whole():
    joined = torch.randn(2, 9, 4, 5)
    first, second, third = joined.split(3, 1)
    assert torch.equal(_whole((first, second, third)), joined)
    assert _whole((first, third, second)) is None
    assert _whole((first, second, third.clone())) is None
    assert _whole((first, second, third.transpose(2, 3))) is None


# ------------------------------------------------------------------------------------------- mistakes when it is made

MADE = {
    "local": lambda **given: ns.LocalSelfAttention2d(16, **given),
    "global": lambda **given: ns.GlobalSelfAttention1d(16, **given),
    "halo": lambda **given: ns.HaloSelfAttention2d(16, **given),
    "stem": lambda **given: ns.AttentionStem2d(3, 8, num_heads=2, **given),
}


@pytest.mark.parametrize("kind", MADE)
def test_a_backend_that_does_not_exist_is_refused_at_once(kind):
    with pytest.raises(OptionError, match=r"backend must be one of native, .* or None to choose; received 'nativ'"):
        MADE[kind](backend="nativ")
    assert MADE[kind](backend="reference").backend == "reference"


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize(
    ("word", "ours"),
    [("padding", "border="), ("padding_mode", "border="), ("groups", "num_heads="), ("bias", "qkv_bias=")],
)
def test_words_of_convolutions_are_answered_with_ours(kind, word, ours):
    with pytest.raises(OptionError, match=f"has no {word}=: .*{ours}.*; received 3"):
        MADE[kind](**{word: 3})


def test_the_constructor_keeps_its_signature():
    assert [*inspect.signature(ns.LocalSelfAttention2d).parameters][:3] == [
        "in_channels",
        "out_channels",
        "kernel_size",
    ]
