# SPDX-License-Identifier: Apache-2.0
"""What the backward makes again in place of keeping it: the same gradients, or the same error, as if it had been kept."""

import gc
import weakref

import pytest
import torch
from conftest import projections
from torch.utils.checkpoint import checkpoint

import nearsight as ns
from nearsight.attention import native
from nearsight.attention.native import projected
from nearsight.positions import MixedRotaryPosition, Position
from nearsight.recompute import keep_in_place_of

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


@pytest.fixture(autouse=True)
def in_two_steps(monkeypatch):
    """Where one operator projects and attends there is nothing to keep; test_at_once.py is about that."""
    monkeypatch.setattr(projected, "serves", lambda *_: False)


KINDS = {
    "plain": {},
    "strided": {"stride": 2, "qkv_bias": True},
    "learned": {"position": "learned", "map_size": 6},
    "turned": {"position": "mixed_rope"},
}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def pair(options):
    """Two layers with the same weights; one keeps, one makes again."""
    layers = []
    for again in (False, True):
        torch.manual_seed(0)
        layers.append(ns.LocalSelfAttention2d(8, kernel_size=3, num_heads=2, **options, recompute_qkv=again))
    return layers


def image():
    torch.manual_seed(1)
    return torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last).requires_grad_()


def gradients(y, layer, x, **options):
    return torch.autograd.grad(y.square().sum(), [x, *layer.parameters()], **options)


CHANGES = {
    "the first weight": lambda layer, x, y: projections(layer)[0].weight,
    "the last weight": lambda layer, x, y: projections(layer)[-1].weight,
    "the input": lambda layer, x, y: x,
    "the output": lambda layer, x, y: y,
    "the position": lambda layer, x, y: next(iter(layer.position.parameters())),
}


@every_kind
@pytest.mark.parametrize("what", CHANGES.values(), ids=CHANGES)
def test_a_change_in_place_is_an_error_where_it_is_one_without(options, what):
    outcomes = []
    for layer in pair(options):
        x = image()
        y = layer(x * 1)  # the loss keeps no more of it than the layer does
        with torch.no_grad():
            what(layer, x, y).add_(1)
        try:
            outcomes.append(torch.autograd.grad(y.sum(), [x, *layer.parameters()], allow_unused=True))
        except RuntimeError:
            outcomes.append(None)
    keeping, remaking = outcomes
    # Only frequencies that have changed are an error here alone: the turned queries have to be made from them.
    assert (keeping is None) == (remaking is None) or isinstance(layer.position, MixedRotaryPosition)
    assert None in (keeping, remaking) or all(map(torch.equal, remaking, keeping))


@every_kind
def test_a_changed_weight_is_an_error(options):
    """Of both layers, whichever has weights that the gradient depends on."""
    for layer in pair(options):
        y = layer(image())
        with torch.no_grad():
            projections(layer)[-1].weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def doubled_unrecorded(module, inputs, output):
    output.detach().mul_(2)


HOOKS = {
    "in place": lambda module, inputs, output: output.mul_(2),
    "in place, unrecorded": doubled_unrecorded,
    "replaced": lambda module, inputs, output: output.tanh(),
}


@every_kind
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_hooks_on_a_projection_mean_what_they_do(options, hook):
    found = []
    for layer in pair(options):
        projections(layer)[-1].register_forward_hook(hook)
        x = image()
        found.append(gradients(layer(x), layer, x))
    assert all(map(torch.equal, *found))


def test_a_weight_that_changes_during_the_backward_is_an_error():
    """As by an optimiser that steps as soon as a gradient is there."""
    for layer in pair({}):
        y = layer(image())

        def step(_, layer=layer):
            with torch.no_grad():
                layer.qkv.weight.mul_(2)

        layer.position.vectors[0].register_post_accumulate_grad_hook(step)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@every_kind
def test_twice_through_a_retained_graph(options):
    keeping, remaking = pair(options)
    x = image()
    expected = gradients(keeping(x), keeping, x)
    y = remaking(x)
    for retain in (True, True, False):
        found = gradients(y, remaking, x, retain_graph=retain)
        assert all(map(torch.equal, found, expected))
    y = remaking(x)
    gradients(y, remaking, x, retain_graph=True)
    with torch.no_grad():
        projections(remaking)[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(y, remaking, x)


def test_autocast_around_the_backward_changes_nothing():
    keeping, remaking = pair({})
    x = image()
    expected = gradients(keeping(x), keeping, x)
    y = remaking(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(y, remaking, x)
    assert all(map(torch.equal, found, expected))


@every_kind
def test_other_hooks_for_saved_tensors_see_what_is_kept(options):
    """Such as those that move it elsewhere; what they hand back is used."""
    keeping, remaking = pair(options)
    x = image()
    expected = gradients(keeping(x), keeping, x)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append(t.clone()) or len(packed) - 1, packed.__getitem__
    ):
        y = remaking(x)
    assert all(map(torch.equal, gradients(y, remaking, x), expected))


@pytest.fixture
def embedded(monkeypatch):
    """References to what the projections of every layer take."""
    seen, embed = [], Position.embed

    def spy(position, x):
        x = embed(position, x) * 1
        seen.append(weakref.ref(x))
        return x

    monkeypatch.setattr(Position, "embed", spy)
    gc.disable()  # what goes has to go by itself
    yield seen
    gc.enable()


def test_nothing_is_kept_longer_than_it_is_needed(embedded):
    y = pair({"stride": 2})[1](image())
    assert embedded[0]() is not None
    y.sum().backward()
    assert embedded[0]() is None


@every_kind
def test_a_checkpoint_makes_all_of_it_again(options, embedded):
    keeping, remaking = pair(options)
    x = image()
    expected = gradients(keeping(x), keeping, x)
    for reentrant in (False, True):
        del embedded[:]
        y = checkpoint(remaking, x, use_reentrant=reentrant)
        assert all(reference() is None for reference in embedded)
        x.grad = None
        remaking.zero_grad()
        y.square().sum().backward()
        found = [x.grad, *(parameter.grad for parameter in remaking.parameters())]
        assert all(map(torch.equal, found, expected))


def test_it_trains_as_one_graph():
    keeping, remaking = pair({"stride": 2})
    compiled = torch.compile(remaking, fullgraph=True, backend="aot_eager")
    optimizers = [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (keeping, remaking)]
    for _ in range(2):
        x = image()
        for run, optimizer in zip((keeping, compiled), optimizers, strict=True):
            optimizer.zero_grad()
            run(x).square().mean().backward()
            optimizer.step()
    for one, other in zip(keeping.parameters(), remaking.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_only_what_is_asked_for_is_made_and_all_else_is_kept():
    calls = []

    def make(x):
        calls.append(x)
        return x.sin(), x.cos()

    x = torch.randn(5, requires_grad=True)
    sin, cos = make(x)
    del calls[:]
    with keep_in_place_of([sin, cos], make, [x]):
        y = (sin * cos * x).sum()
    torch.testing.assert_close(torch.autograd.grad(y, x)[0], (2 * x).cos() * x + (2 * x).sin() / 2)
    assert len(calls) == 1
