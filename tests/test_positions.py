# SPDX-License-Identifier: Apache-2.0
"""Every encoding holds its equation, its parameter count and its claim of equivariance."""

import copy
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import skip_init

import nearsight as ns
from nearsight import positions
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

OWN = tuple(POSITIONS)  # before any test registers another
EQUIVARIANT = ("none", "relative", "relative_shared", "bias", "cpb", "quadratic", "rope", "mixed_rope")
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


def test_all_are_tested():
    assert sorted(EQUIVARIANT + ABSOLUTE) == sorted(OWN)


@pytest.mark.parametrize("position", EQUIVARIANT)
@pytest.mark.parametrize("dilation", [1, 2])
def test_equivariant_on_a_torus(position, dilation, x):
    made = layer(position, border="wrap", dilation=dilation)
    assert made.position.equivariant
    assert ns.equivariance_error(made, x, roll) < 1e-12


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


@pytest.mark.parametrize("position", OWN)
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
        ("relative_shared", 2 * 7 * 6),
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
    first, second = RotaryPosition(8, 2).frequencies(torch.zeros(()))[0]
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


@pytest.mark.parametrize("position", OWN)
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
        (lambda: ns.LocalSelfAttention2d(16, position=nn.Linear(1, 1)), DtypeError, "received Linear"),
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


# ----------------------------------------------------------------------------- weights that are loaded, half precision


def poison(module):
    """What memory may hold that nobody has written to."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.detach().fill_(float("nan") if tensor.is_floating_point() else 77)
    return module


@pytest.mark.parametrize("position", OWN)
@pytest.mark.parametrize("kind", [ns.LocalSelfAttention2d, ns.GlobalSelfAttention2d])
def test_a_layer_is_all_that_its_state_says(kind, position):
    arguments = {"num_heads": 2, "position": position, "map_size": 7}
    trained, x = kind(16, **arguments), torch.randn(1, 16, 6, 7)
    skipped = poison(skip_init(kind, 16, **arguments))
    with torch.device("meta"):
        emptied, assigned = kind(16, **arguments), kind(16, **arguments)
    for made in (skipped, poison(emptied.to_empty(device="cpu"))):
        made.load_state_dict(trained.state_dict())
        assert torch.equal(made(x), trained(x))
    assigned.load_state_dict(trained.state_dict(), assign=True)
    assert torch.equal(assigned(x), trained(x))


@pytest.mark.parametrize(
    "name",
    [
        "sasa_nano,position=rope",
        "sasa_nano,stem=attention,stem_stride=2,position=sinusoidal",
        "sasa_micro",
        "halo_h0,depths=[1,1],widths=[16,32],num_heads=4",
        "nat_mini,depths=[1,1],num_heads=[2,2],embed_dim=16",
        "dinat_mini,depths=[2,1],num_heads=[2,2],embed_dim=16",
        "conv_nano",
    ],
)
def test_a_network_is_all_that_its_state_says(name):
    trained, x = ns.create_model(name, num_classes=5).eval(), torch.randn(1, 3, 32, 32)
    with torch.device("meta"):
        made = ns.create_model(name, num_classes=5).eval()
    poison(made.to_empty(device="cpu")).load_state_dict(trained.state_dict())
    assert torch.equal(made(x), trained(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_cell_has_a_code_of_its_own_in_half_precision(dtype):
    position = SinusoidalPosition(16, 1).to(dtype)
    codes = position.embed(torch.zeros(1, 16, 600, dtype=dtype))[0].T
    assert len(codes.unique(dim=0)) == 600
    exact = position.embed(torch.zeros(1, 16, 600, dtype=torch.float64))[0].T
    assert (codes.double() - exact).abs().max() <= torch.finfo(dtype).eps / 2


@pytest.mark.parametrize("position", ["cpb", "quadratic"])
@pytest.mark.parametrize("way", ["bfloat16", "float16", "autocast"])
def test_tables_of_offsets_are_computed_in_float32(position, way):
    made = ns.LocalSelfAttention1d(16, kernel_size=1201, num_heads=2, position=position).position
    if way != "autocast":
        made.to(getattr(torch, way))
    window = ns.Window(1201)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        bias, _ = made.tables(window, (700,))
    exact, _ = copy.deepcopy(made).double().tables(window, (700,))
    torch.testing.assert_close(bias.double(), exact, rtol=1e-5, atol=1e-5)
    if way != "autocast":
        (bias.mean() / 1e4).backward()  # float16 ends at 65504
        assert all(one.grad.isfinite().all() and one.grad.dtype == one.dtype for one in made.parameters())


def test_the_network_of_offsets_is_called_with_its_hooks_in_half_precision():
    made, seen = ContinuousBias(2, ns.Window(5).offsets(2)).bfloat16(), []
    made.mlp[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    made.tables(ns.Window(5), (9, 9))
    assert seen == [torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_angles_do_not_follow_the_layers_dtype(dtype):
    window, x = ns.Window(3), torch.randn(1, 1, 600, 8).to(dtype)
    turned, _ = RotaryPosition(8, 1).to(dtype).rotate(x, x, window)
    exact, _ = RotaryPosition(8, 1).rotate(x.double(), x.double(), window)
    torch.testing.assert_close(turned.double(), exact, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_exact_conversion_places_its_heads_in_float32():
    model = nn.Sequential(nn.Conv1d(8, 8, 601, padding=300))
    ns.convert(model, init="exact", content=False)
    hats = model.bfloat16()[0]._hats()
    assert torch.equal(hats, torch.eye(601, dtype=torch.bfloat16))


# ------------------------------------------------------------------------------------------------- encodings of one's own


class Table(Position):
    """A number per head and offset, as a user would write it."""

    def __init__(self, *, channels, num_heads, head_dim, window, map_size):
        super().__init__()
        assert channels
        assert head_dim
        self.table = nn.Parameter(torch.randn(num_heads, *window.table_size(len(map_size))))

    def tables(self, window, size):
        return self.table, None


class Nothing(Position):
    """Without arguments of its own."""


@pytest.fixture
def registry(monkeypatch):
    """Names that are registered meanwhile are forgotten afterwards."""
    names = dict(positions._FACTORIES)
    yield positions.register
    positions._FACTORIES.clear()
    positions._FACTORIES.update(names)


def encodings(model):
    return [module for module in model.modules() if isinstance(module, Position)]


@pytest.mark.parametrize("how", ["class", "function", "name"])
def test_a_factory_makes_an_encoding_for_each_layer(how, registry):
    given = {"class": Table, "function": lambda **arguments: Table(**arguments), "name": "mine"}[how]
    if how == "name":
        registry("mine", Table)
        assert "mine" in POSITIONS
    layer = ns.LocalSelfAttention2d(16, kernel_size=3, num_heads=2, position=given)
    assert layer.position.table.shape == (2, 3, 3)
    model = ns.create_model("sasa_nano", num_classes=10, position=given)
    found = encodings(model)
    assert len(found) == len(set(found)) == 4
    keys = [key for key in model.state_dict() if key.endswith("position.table")]
    assert len(keys) == sum(name.endswith("position.table") for name, _ in model.named_parameters()) == 4
    assert len(encodings(copy.deepcopy(model))) == 4
    converted = timm.create_model("resnet10t")
    report = ns.convert(converted, init="random", position=given, names=["layer1.*", "layer2.*"])
    assert len(encodings(converted)) == len(report.converted) == 4
    assert report.to_dict()["options"]["position"] == {"class": "Table", "name": "mine"}.get(
        how, given.__qualname__ if how == "function" else None
    )


def test_a_class_without_arguments_is_a_factory():
    assert isinstance(ns.LocalSelfAttention2d(16, position=Nothing).position, Nothing)
    assert type(ns.LocalSelfAttention2d(16, position=Position).position) is Position


def test_an_instance_is_for_a_layer_and_not_for_a_network():
    own = Table(channels=16, num_heads=2, head_dim=8, window=ns.Window(3), map_size=(9, 9))
    assert ns.LocalSelfAttention2d(16, kernel_size=3, num_heads=2, position=own).position is own
    with pytest.raises(OptionError, match="instance of Table, which all layers would share"):
        ns.create_model("sasa_nano", position=own)
    model = timm.create_model("resnet10t")
    with pytest.raises(OptionError, match="instance of Table"):
        ns.convert(model, init="random", position=own)
    with pytest.raises(OptionError, match="a new encoding at every call"):
        ns.create_model("sasa_nano", position=lambda **_: own, kernel_size=3, num_heads=2)
    with pytest.raises(OptionError, match="a new encoding at every call"):
        ns.convert(model, init="random", position=lambda **_: own, num_heads=2, names="layer1.*")
    assert not encodings(model)  # as it was


@pytest.mark.parametrize(
    ("name", "factory", "error", "message"),
    [
        ("rope", Table, OptionError, "nearsight's own"),
        ("none", Position, OptionError, "nearsight's own"),
        ("taken", Nothing, OptionError, "registered already"),
        ("", Table, OptionError, "letters.*received ''"),
        ("a,b=c", Table, OptionError, "letters"),
        (3, Table, OptionError, "received 3"),
        ("mine", "Table", DtypeError, "class or a function.*received str"),
        ("mine", Nothing(), DtypeError, "received Nothing"),
    ],
)
def test_registering_what_cannot_be(name, factory, error, message, registry):
    registry("taken", Table)
    registry("taken", Table)  # as a module does that is imported again
    with pytest.raises(error, match=message):
        registry(name, factory)
    assert set(POSITIONS) == {*OWN, "taken"}


@pytest.mark.parametrize(
    ("position", "error", "message"),
    [
        ("roep", OptionError, r"did you mean rope\?.*positions.register\('roep', factory\)"),
        (RotaryPosition, OptionError, "called with channels, num_heads, head_dim, window, map_size"),
        (lambda channels: Position(), OptionError, "does not take them"),
        (lambda **_: nn.Linear(1, 1), DtypeError, "made Linear"),
    ],
)
def test_what_is_no_position(position, error, message):
    with pytest.raises(error, match=message):
        ns.create_model("sasa_nano", position=position)


def test_files_hold_a_position_by_its_name(registry, tmp_path):
    model = ns.create_model("sasa_nano", num_classes=10, position=Table)
    with pytest.raises(OptionError, match=r"positions.register\(name, factory\)"):
        model.save_pretrained(tmp_path / "unnamed")
    assert not (tmp_path / "unnamed").exists()
    registry("mine", Table)
    model = ns.create_model("sasa_nano", num_classes=10, position=Table)
    model.save_pretrained(tmp_path / "named")
    again, x = type(model).from_pretrained(tmp_path / "named"), torch.randn(1, 3, 32, 32)
    assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize("position", ["rope", "mixed_rope"])
def test_turns_are_whole_along_the_axes_that_go_around_alone(position):
    """Down the first column only rows turn, and along the first row only columns."""
    made = ns.LocalSelfAttention2d(16, kernel_size=3, num_heads=2, position=position).double().position
    query = torch.randn(1, 2, 5, 7, 8, dtype=torch.float64)

    def turned(border):
        return made.rotate(query, query, ns.Window(3, border=border))[0]

    both, mask, wrap = (turned(border) for border in (("mask", "wrap"), "mask", "wrap"))
    torch.testing.assert_close(both[:, :, :, 0], mask[:, :, :, 0])
    torch.testing.assert_close(both[:, :, 0], wrap[:, :, 0])
    assert (both - mask).abs().max() > 1e-2
    assert (both - wrap).abs().max() > 1e-2
