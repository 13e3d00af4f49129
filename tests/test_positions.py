# SPDX-License-Identifier: Apache-2.0
"""Every encoding holds its equation, its parameter count and its claim of equivariance."""

import math

import pytest
import torch

import nearsight as ns
from nearsight.errors import DtypeError, OptionError, ShapeError
from nearsight.positions import (
    POSITIONS,
    ContinuousBias,
    LearnedPosition,
    MixedRotaryPosition,
    Position,
    QuadraticPosition,
    RelativePosition,
    RotaryPosition,
    SinusoidalPosition,
)

EQUIVARIANT = ("none", "relative", "bias", "cpb", "quadratic", "rope", "mixed_rope")
ABSOLUTE = ("sinusoidal", "learned")


def roll(x):
    return x.roll((2, 3), (-2, -1))


def layer(position, **kwargs):
    torch.manual_seed(0)
    made = ns.LocalSelfAttention2d(16, kernel_size=3, num_heads=2, position=position, map_size=(11, 13), **kwargs)
    with torch.no_grad():
        # Learnt terms start small; make them matter.
        for parameter in made.position.parameters():
            parameter.add_(torch.randn_like(parameter))
    return made.double()


@pytest.fixture
def x():
    return torch.randn(2, 16, 11, 13, dtype=torch.float64)


def test_all_nine_are_tested():
    assert sorted(EQUIVARIANT + ABSOLUTE) == sorted(POSITIONS)


@pytest.mark.parametrize("position", EQUIVARIANT)
@pytest.mark.parametrize("dilation", [1, 2])
def test_equivariant_on_a_torus(position, dilation, x):
    made = layer(position, border="wrap", dilation=dilation)
    assert made.position.equivariant
    assert ns.equivariance_error(made, x, roll) < 1e-6  # rotary angles are held in float32


@pytest.mark.parametrize("position", EQUIVARIANT)
@pytest.mark.parametrize("border", ["mask", "zeros", "shift"])
def test_equivariant_in_the_interior(position, border, x):
    # A torus shift by (2, 3) brings cells from the other side in; further in than shift and window nothing changes.
    made = layer(position, border=border)
    assert ns.equivariance_error(made, x, roll, margin=4) < 1e-6
    assert ns.equivariance_error(made, x, roll) > 1e-3


@pytest.mark.parametrize("position", ABSOLUTE)
@pytest.mark.parametrize("border", ["wrap", "mask"])
def test_absolute_encodings_break_it(position, border, x):
    made = layer(position, border=border)
    assert not made.position.equivariant
    assert ns.equivariance_error(made, x, roll, margin=4) > 1e-2


@pytest.mark.parametrize("position", POSITIONS)
def test_global_attention_is_permutation_equivariant_without_encoding_only(position, x):
    torch.manual_seed(0)
    made = ns.GlobalSelfAttention2d(16, num_heads=2, position=position, map_size=13).double()
    order = torch.randperm(11 * 13)

    def shuffle(t):
        return t.flatten(2)[..., order].unflatten(2, (11, 13))

    error = ns.equivariance_error(made, x, shuffle)
    assert error < 1e-12 if position == "none" else error > 1e-4


@pytest.mark.parametrize(
    ("position", "count"),
    [
        ("none", 0),
        ("sinusoidal", 0),
        ("learned", 24 * 5 * 6),
        ("relative", 7 * 24),
        ("bias", 4 * 49),
        ("cpb", 512 * 3 + 512 * 4),
        ("quadratic", 3 * 4),
        ("rope", 0),
        ("mixed_rope", 24),
    ],
)
def test_parameter_counts(position, count):
    # head_dim 8 for the rotary ones, 24 channels otherwise
    heads, channels = (3, 24) if "rope" in position else (4, 24)
    made = ns.LocalSelfAttention2d(channels, kernel_size=7, num_heads=heads, position=position, map_size=(5, 6))
    assert sum(p.numel() for p in made.position.parameters()) == count


def test_parameter_counts_of_the_other_tables():
    def count(made):
        return sum(p.numel() for p in made.position.parameters())

    assert count(ns.LocalSelfAttention2d(24, num_heads=4, position="bias", border="shift")) == 4 * 13**2
    assert count(ns.GlobalSelfAttention2d(24, num_heads=4, map_size=9)) == 17 * 24
    assert count(ns.GlobalSelfAttention2d(24, num_heads=4, position="bias", map_size=9)) == 4 * 17**2
    assert count(ns.LocalSelfAttention3d(24, kernel_size=(3, 5, 5), num_heads=2)) == 2 * (3 * 4 + 5 * 4 + 5 * 4)


def test_sinusoidal_values():
    p = SinusoidalPosition(8, 2).embed(torch.zeros(1, 8, 5, 7))[0]
    # Channels: sin and cos of the row at two frequencies, then of the column.
    assert p[0, 3, 2] == pytest.approx(math.sin(3))
    assert p[1, 3, 2] == pytest.approx(math.sin(3 * 10000**-0.5), abs=1e-6)
    assert p[2, 3, 2] == pytest.approx(math.cos(3))
    assert p[4, 3, 2] == pytest.approx(math.sin(2))
    assert p[7, 3, 2] == pytest.approx(math.cos(2 * 10000**-0.5), abs=1e-6)


def test_learned_is_resampled_on_another_map():
    position = LearnedPosition(3, (4, 4))
    x = torch.zeros(1, 3, 8, 8)
    assert torch.equal(position.embed(torch.zeros(1, 3, 4, 4))[0], position.embedding)
    torch.testing.assert_close(position.embed(x).mean((0, 2, 3)), position.embedding.mean((1, 2)), atol=5e-3, rtol=0)


def test_relative_halves_lie_inside_every_head():
    position = RelativePosition(2, 4, (3, 5))
    bias, (row, column) = position.tables(ns.Window((3, 5)), (6, 6))
    assert bias is None
    assert row.shape == (2, 3, 4)
    assert column.shape == (2, 5, 4)
    assert torch.equal(row[..., :2], position.vectors[0])
    assert not row[..., 2:].any()
    assert torch.equal(column[..., 2:], position.vectors[1])
    assert not column[..., :2].any()


def test_global_tables_use_their_middle_on_smaller_maps():
    position = RelativePosition(1, 2, (9, 9))  # made for maps up to 5
    _, (row, column) = position.tables(ns.Window.everywhere((3, 5)), (3, 5))
    assert torch.equal(row[..., :1], position.vectors[0][:, 2:7])
    assert torch.equal(column[..., 1:], position.vectors[1])


def test_global_tables_refuse_larger_maps():
    with pytest.raises(ShapeError, match=r"7 entries along an axis that needs 9.*map_size"):
        ns.GlobalSelfAttention2d(8, num_heads=2, map_size=4)(torch.randn(1, 8, 5, 3))


@pytest.mark.parametrize("position", ["cpb", "quadratic", "rope", "mixed_rope", "none", "sinusoidal", "learned"])
def test_encodings_without_tables_take_any_map(position):
    made = ns.GlobalSelfAttention2d(16, num_heads=2, position=position, map_size=4)
    assert made(torch.randn(1, 16, 6, 5)).shape == (1, 16, 6, 5)


def test_continuous_bias_equation():
    position = ContinuousBias(2, ns.Window(5, dilation=2).offsets(2))
    bias, _ = position.tables(ns.Window(5, dilation=2), (9, 9))
    # Entry (0, 3): offsets of -4 and +2 cells in a window that reaches 4.
    g = torch.tensor([-math.log2(1 + 8) / 3, math.log2(1 + 8 * 2 / 4) / 3])
    torch.testing.assert_close(bias[:, 0, 3], 16 * position.mlp(g).sigmoid())


def test_quadratic_equation_and_its_limit_is_a_shift():
    position = QuadraticPosition(1, 2)
    with torch.no_grad():
        position.centre.copy_(torch.tensor([[-1.0, 1.0]]))
        position.alpha.fill_(46.0)
    bias, _ = position.tables(ns.Window(3), (6, 7))
    assert bias[0, 0, 2] == 0
    assert bias[0, 1, 1] == -46 * 2
    v = torch.randn(1, 1, 6, 7, 3)
    zero = torch.zeros(1, 1, 6, 7, 2)
    y = ns.local_attention(zero, zero, v, ns.Window(3, border="wrap"), bias=bias)
    torch.testing.assert_close(y, v.roll((1, -1), (2, 3)))


def rotary(kind):
    return RotaryPosition(8, 2) if kind == "rope" else MixedRotaryPosition(1, 8, 2)


@pytest.mark.parametrize("kind", ["rope", "mixed_rope"])
def test_rotary_logits_depend_on_the_offset_alone(kind):
    torch.manual_seed(0)
    q, k = torch.randn(2, 8)
    query, key = (t.expand(1, 1, 9, 9, 8) for t in (q, k))
    query, key = rotary(kind).rotate(query, key, ns.Window(3))
    logits = torch.einsum("pqd,ijd->pqij", query[0, 0], key[0, 0])
    torch.testing.assert_close(logits[2, 3, 4, 2], logits[5, 4, 7, 3])
    assert not torch.isclose(logits[2, 3, 4, 2], logits[2, 3, 2, 4], atol=1e-3)
    torch.testing.assert_close(query.norm(dim=-1), torch.full((1, 1, 9, 9), q.norm().item()))


def test_axial_rotary_frequencies():
    first, second = RotaryPosition(8, 2).get_buffer("frequencies")[0]
    assert first.tolist() == pytest.approx([1, 0.1, 0, 0])
    assert second.tolist() == pytest.approx([0, 0, 1, 0.1])


@pytest.mark.parametrize("kind", ["rope", "mixed_rope"])
def test_rotary_knows_the_stride_of_the_queries(kind):
    position, x = rotary(kind), torch.randn(1, 1, 9, 9, 8)
    at_once, _ = position.rotate(x, x, ns.Window(3))
    strided, _ = position.rotate(x[:, :, ::2, ::2], x, ns.Window(3, stride=2))
    torch.testing.assert_close(strided, at_once[:, :, ::2, ::2])


def test_mixed_rotary_learns_on_a_torus():
    made = ns.LocalSelfAttention2d(8, kernel_size=3, num_heads=2, position="mixed_rope", border="wrap")
    made(torch.randn(1, 8, 6, 6)).square().sum().backward()
    assert made.position.frequencies.grad.abs().sum() > 0


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("kind", ["Local", "Global"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_parameter_gets_a_gradient(position, kind, rank):
    torch.manual_seed(0)
    made = getattr(ns, f"{kind}SelfAttention{rank}d")(12, 24, num_heads=2, position=position, map_size=6)
    made(torch.randn(2, 12, *(6, 4, 5)[:rank])).square().sum().backward()
    dead = [name for name, p in made.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


def test_a_users_own_encoding():
    class East(Position):
        """Looks at the cell to the right."""

        def tables(self, window, size):
            bias = torch.zeros(2, 3, 3)
            bias[:, 1, 2] = 1e4
            return bias, None

    made = ns.LocalSelfAttention2d(4, kernel_size=3, num_heads=2, position=East())
    x = torch.randn(1, 4, 5, 6)
    values = made.qkv(x).chunk(3, 1)[2]
    torch.testing.assert_close(made(x)[..., :-1], values[..., 1:])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ns.LocalSelfAttention2d(16, position="relativ"), OptionError, "one of none, .*received 'relativ'"),
        (lambda: ns.LocalSelfAttention2d(16, position=3), DtypeError, "received int"),
        (lambda: ns.LocalSelfAttention2d(6, num_heads=2, position="sinusoidal"), ShapeError, "multiple of 4.*=6"),
        (lambda: ns.LocalSelfAttention2d(12, num_heads=2, position="rope"), ShapeError, "multiple of 4.*=6"),
        (lambda: ns.LocalSelfAttention2d(6, num_heads=2, position="mixed_rope"), ShapeError, "multiple of 2.*=3"),
        (lambda: ns.LocalSelfAttention3d(4, num_heads=2), ShapeError, "head_dim=2 for 3 axes"),
        (lambda: ns.LocalSelfAttention2d(8, map_size=(3, 4, 5)), ShapeError, r"map_size .* received \(3, 4, 5\)"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
