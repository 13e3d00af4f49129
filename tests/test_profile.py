# SPDX-License-Identifier: Apache-2.0
"""What a layer is said to cost is what it costs: counts against arithmetic by hand, times against a clock that is known."""

import csv
import io
import json
import mmap

import pytest
import torch
from torch import nn

import nearsight as ns
from nearsight.bench import growth as growing
from nearsight.bench import profile as profiling
from nearsight.bench.growth import GLOBAL, LOCAL, TEXTBOOK, Growth, Point, crossing, geometry_of, growth, verdict
from nearsight.bench.profile import REST, LayerCost, Profile, draw_profile, profile, profile_table
from nearsight.cli import main
from nearsight.errors import OptionError
from nearsight.flops import count_flops
from nearsight.pages.csv_json import to_csv

GFLOPS, GBS = 50.0, 10.0


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    """Rates without the time that measuring them takes."""
    monkeypatch.setattr(profiling, "matrix_rate", lambda: GFLOPS)
    monkeypatch.setattr(profiling, "copy_rate", lambda: GBS)
    monkeypatch.setattr(growing, "matrix_rate", lambda: GFLOPS)


def rows_of(model, x):
    return {row.layer: row for row in profile(model, x, rounds=1).rows}


# ------------------------------------------------------------------------------------------------------------ counting


def test_a_convolution_by_hand():
    row = rows_of(nn.Sequential(nn.Conv2d(3, 5, 3, padding=1)), torch.randn(2, 3, 7, 11))["0"]
    assert row.kind == "Conv2d"
    assert row.parameters == 5 * 3 * 9 + 5
    assert row.flops == 2 * (2 * 7 * 11) * 5 * 3 * 9
    assert row.bytes == 4 * (2 * 3 * 7 * 11 + 2 * 5 * 7 * 11 + row.parameters)


def test_an_attention_layer_by_hand():
    """The projection, and q.k, q.r and weights.v for every place of every window."""
    layer = ns.LocalSelfAttention2d(8, kernel_size=3, num_heads=2)
    row = rows_of(nn.Sequential(layer), torch.randn(1, 8, 7, 11))["0"]
    cells = 7 * 11
    assert row.kind == "LocalSelfAttention2d"
    assert row.flops == 2 * cells * 8 * 24 + 2 * cells * 9 * (8 + 8 + 8)
    assert row.parameters == sum(parameter.numel() for parameter in layer.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in layer.buffers())
    assert row.bytes == 4 * (2 * 8 * cells + row.parameters) + buffers


def test_buffers_are_read_too():
    row = rows_of(nn.Sequential(nn.BatchNorm2d(6)), torch.randn(1, 6, 4, 5))["0"]
    assert row.bytes == 4 * (2 * 6 * 4 * 5 + 2 * 6 + 2 * 6) + 8  # and a counter


class Doubled(nn.Module):
    """Adds its input to that of its layer, which runs twice."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 1, bias=False)
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.inner(self.inner(x)) + x


def test_what_a_module_computes_beside_its_layers_is_its_own():
    rows = rows_of(nn.Sequential(Doubled(), nn.Dropout()), torch.randn(1, 4, 6, 5))
    size = 4 * 6 * 5
    assert {name: row.kind for name, row in rows.items()} == {"0": "Doubled.forward", "0.inner": "Conv2d", REST: ""}
    assert (rows["0"].parameters, rows["0"].flops, rows["0"].bytes) == (1, 0, 4 * 3 * size)
    assert rows["0.inner"].flops == 2 * (2 * size * 4)
    assert rows["0.inner"].bytes == 2 * 4 * (2 * size + 16)


def test_shared_parameters_count_once():
    layer = nn.Linear(6, 6)
    twin = nn.Linear(6, 6)
    twin.weight = layer.weight
    rows = rows_of(nn.Sequential(layer, nn.ReLU(), twin), torch.randn(2, 6))
    assert [rows[name].parameters for name in ("0", "1", "2")] == [42, 0, 6]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("sasa_nano", 24), ("resnet18", 40), ("vit_tiny_patch16_224,img_size=32", 32)),
        pytest.param("sasa_resnet26_small", 32, marks=pytest.mark.sweep),
    ],
)
def test_a_network_adds_up(name, size):
    """Ours, and two of timm's, one of which transforms tokens."""
    model = ns.create_model(name)
    found = profile(model, torch.randn(1, 3, size, size), rounds=1)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.flops == count_flops(model.eval(), (3, size, size))
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    assert all(row.ms > 0 for row in found.rows)
    assert len({row.layer for row in found.rows}) == len(found.rows)


def test_the_floor_is_the_longer_of_computing_and_moving():
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten())
    rows = rows_of(model, torch.randn(1, 64, 12, 12))
    assert set(rows) == {"0", "1", REST}, "flattening neither computes nor moves anything"
    assert (rows[REST].flops, rows[REST].bytes, rows[REST].floor_ms, rows[REST].times_floor) == (0, 0, 0, None)
    assert rows["0"].floor_ms == pytest.approx(rows["0"].flops / (GFLOPS * 1e6))
    assert rows["1"].floor_ms == pytest.approx(rows["1"].bytes / (GBS * 1e6))
    assert rows["0"].times_floor == pytest.approx(rows["0"].ms / rows["0"].floor_ms)


def test_profiling_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout())
    model.train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    profile(model, torch.randn(1, 3, 8, 8), rounds=2)
    assert [module.training for module in model] == [True, False, True]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# --------------------------------------------------------------------------------------------------------------- times


class Clock:
    """Stands still but where a layer moves it on."""

    now = 0.0

    def __call__(self):
        return self.now


class Sleep(nn.Module):
    """Takes these many seconds, one number per run; then the last one again."""

    def __init__(self, clock, *seconds):
        super().__init__()
        self.clock, self.seconds = clock, list(seconds)
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        self.clock.now += self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
        return x * self.weight


class Nested(nn.Module):
    def __init__(self, clock):
        super().__init__()
        self.clock, self.first, self.second = clock, Sleep(clock, 0.5), Sleep(clock, 0.25)

    def forward(self, x):
        self.clock.now += 0.125
        y = self.first(x)
        self.clock.now += 1
        return self.second(self.second(y))


def test_every_moment_is_charged_to_the_innermost_module(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(profiling, "perf_counter", clock)
    found = profile(nn.Sequential(Nested(clock), Sleep(clock, 2)), torch.ones(1, 1), rounds=3)
    assert {row.layer: row.ms for row in found.rows} == {"0.first": 500, "0.second": 500, "1": 2000, REST: 1125}
    assert sum(row.ms for row in found.rows) == found.ms == 4125
    assert {row.layer: row.share for row in found.rows}["1"] == pytest.approx(2000 / 4125)


def test_times_are_medians_and_the_passes_take_turns(monkeypatch):
    """Passes: FLOPs, bytes, borders, one to warm up; then by turns one left alone and one looked into."""
    clock = Clock()
    monkeypatch.setattr(profiling, "perf_counter", clock)
    seconds = [9, 9, 9, 9, 1, 2, 3, 8, 100, 5]
    found = profile(nn.Sequential(Sleep(clock, *seconds)), torch.ones(1, 1), rounds=3)
    assert (found.ms, found.rows[0].ms) == (3000, 5000)


# --------------------------------------------------------------------------------------------------------------- shown


@pytest.fixture(scope="module")
def found():
    rows = [
        LayerCost("stem", "Conv2d", 1200, 4_000_000, 3_000_000, 1.5, 0.375, 0.3, 5.0),
        LayerCost("body", "ResNet.forward", 0, 0, 500_000, 2.0, 0.5, 0.05, 40.0),
        LayerCost("unused", "Conv2d", 10, 0, 0, 0.5, 0.125, 0.0, None),
    ]
    return Profile(rows, (1, 3, 32, 32), 3.9, GFLOPS, GBS, {"threads": 1})


def test_the_table_says_everything(found, capsys):
    from rich.console import Console

    Console(width=120).print(profile_table(found))
    text = capsys.readouterr().out
    assert "forward pass of 1 x 3 x 32 x 32 on 1 thread(s): 3.90 ms" in text
    assert "floor: 50 GFLOP/s (matrix product) or 10.0 GB/s (copy)" in text
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert lines["stem"] == ["stem", "1,200", "4.0", "3.00", "1.500", "37.5%", "0.300", "5.0"]
    assert lines["body"][:2] == ["body", "(ResNet.forward)"]
    assert lines["sum"] == ["sum", "1,210", "4.0", "3.50", "4.000", "0.350", "11.4"]


def test_the_plot_shows_the_longest_in_the_order_of_their_running(found, monkeypatch):
    monkeypatch.setattr(profiling, "DRAWN", 2)
    (axes,) = draw_profile(found, "a network").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["stem (Conv2d)", "body (ResNet.forward)"]
    assert [[bar.get_width() for bar in bars] for bars in axes.containers] == [[1.5, 2.0], [0.3, 0.05]]
    assert [text.get_text().strip() for text in axes.texts] == ["38%", "50%"]


# -------------------------------------------------------------------------------------------------------------- growth


def point(attention, size, ms=None, extra=None, predicted=1.0):
    return Point(attention, size, size**2, 0, predicted, ms, 1000, extra)


def test_growth_is_predicted_by_the_equation(monkeypatch):
    """4 N D per pair, h w k^2 pairs when local and (h w)^2 when global; and a float32 weight per head and pair."""
    monkeypatch.setattr(growing, "_extra_memory", lambda tasks: [None] * len(tasks))
    grown = growth([4, 7, 12], kernel_size=5, head_dim=6, num_heads=2, rounds=1)
    for attention, pairs in ((LOCAL, lambda n: n**2 * 25), (GLOBAL, lambda n: n**4), (TEXTBOOK, lambda n: n**4)):
        for one in grown.of(attention):
            n_pairs = pairs(one.size)
            assert one.flops == 4 * 2 * 6 * n_pairs
            assert one.predicted_ms == pytest.approx(one.flops / (GFLOPS * 1e6))
            assert one.predicted_bytes == 4 * 2 * n_pairs
            assert one.measured_ms > 0
    assert grown.overtaken("flops") == pytest.approx(5.0)  # k


def test_each_attention_computes_what_it_is_called(monkeypatch):
    """Local attention and the two ways to global attention, on one map that a block does not cover."""
    problem = growing.GrowthCase(6, kernel_size=3, head_dim=4, num_heads=2)
    maps = problem.maps()
    monkeypatch.setattr(growing.GrowthCase, "maps", lambda self: maps)
    window = ns.Window(3)
    torch.testing.assert_close(problem.attend(LOCAL)(), ns.local_attention(*maps, window, backend="reference"))
    expected = ns.global_attention(*maps, backend="reference")
    torch.testing.assert_close(problem.attend(GLOBAL)(), expected)
    torch.testing.assert_close(problem.attend(TEXTBOOK)(), expected)


def test_memory_is_that_of_a_fresh_process():
    """The textbook makes logits and weights, 4 n^4 N bytes each; what comes before must not hide it."""
    large, small = growing.GrowthCase(40, 3, 8, 1), growing.GrowthCase(8, 3, 8, 1)
    tasks = [(large, TEXTBOOK), (large, TEXTBOOK), (large, GLOBAL), (small, LOCAL)]
    *textbook, dense, unseen = growing._extra_memory(tasks)
    weights = 4 * 40**4
    assert all(1.95 * weights <= extra <= 2.3 * weights for extra in textbook)  # the call before leaves a little to use
    assert dense is None or dense < 0.3 * weights
    assert unseen is None or unseen <= 16 * mmap.PAGESIZE  # 2 KB of output, and what a process takes by the way


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(4, 4.0, 1.0), (16, 1.0, 4.0)], 8.0),
        ([(4, 1.0, 2.0), (8, 1.0, 0.5), (16, 1.0, 2.0)], 8 * 2**0.5),
        ([(4, 1.0, 2.0), (8, 1.0, 4.0)], 0.0),
        ([(4, 2.0, 1.0), (8, 2.0, 1.0)], None),
        ([], None),
    ],
)
def test_crossing(points, expected):
    assert crossing(points) == (expected if expected is None else pytest.approx(expected))


def test_the_verdict_in_words():
    points = [point(LOCAL, 4, 4.0), point(LOCAL, 16, 1.0), point(GLOBAL, 4, 1.0), point(GLOBAL, 16, 4.0)]
    points += [point(TEXTBOOK, 4, 5.0), point(TEXTBOOK, 16, 9.0)]
    grown = Growth(points, 7, 32, 4, GFLOPS, {"threads": 1})
    assert verdict(grown) == (
        "global attention takes longer than local: predicted from n = k = 7 on; "
        "measured from n = 8.0 on; where its weights are kept at all of these sizes"
    )
    slow = Growth([point(LOCAL, 4, 4.0), point(GLOBAL, 4, 1.0), point(TEXTBOOK, 4)], 7, 32, 4, GFLOPS, {})
    assert verdict(slow).endswith("measured at none of these sizes; where its weights are kept at none of these sizes")


def test_the_curves_drawn_are_the_numbers_in_the_csv():
    points = [point(LOCAL, 4, 1.0, 2000, 0.5), point(LOCAL, 8, 4.0, None, 2.0)]
    points += [point(GLOBAL, 4, 3.0, None, 0.25), point(GLOBAL, 8, 9.0, 5000, 7.0)]
    grown = Growth(points, 7, 32, 4, GFLOPS, {"threads": 1})
    time, memory = growing.draw_growth(grown).axes
    lines = list(csv.DictReader(io.StringIO(to_csv(points))))

    def column(name, attention, factor=1.0):
        rows = [line for line in lines if line["attention"] == attention and line[name]]
        return [[float(line["size"]) for line in rows], [factor * float(line[name]) for line in rows]]

    def drawn(axes):
        return [[list(map(float, values)) for values in line.get_data()] for line in axes.lines]

    assert drawn(time)[:4] == [
        column("predicted_ms", LOCAL),
        column("predicted_ms", GLOBAL),
        column("measured_ms", LOCAL),
        column("measured_ms", GLOBAL),
    ]
    assert drawn(memory)[2:] == [
        column("measured_bytes", LOCAL, 1e-6),
        column("measured_bytes", GLOBAL, 1e-6),
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sasa_nano", {"kernel_size": 5, "num_heads": 4, "head_dim": 4}),
        ("nat_mini", {"kernel_size": 7, "num_heads": 2, "head_dim": 32}),
        ("resnet18", {}),
    ],
)
def test_the_growth_is_of_the_network_s_own_attention(name, expected):
    assert geometry_of(ns.create_model(name)) == expected


def test_global_attention_has_no_window_to_take():
    assert geometry_of(ns.GlobalSelfAttention2d(8, num_heads=2)) == {}


def test_growth_says_what_is_wrong():
    with pytest.raises(OptionError, match="kernel_size must be at least 1; received 0"):
        growth(kernel_size=0)
    with pytest.raises(OptionError, match=r"sizes must be one or more, each at least 1; received \[4, 0\]"):
        growth([4, 0])


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def small_growth(monkeypatch):
    points = [point(one, n, 1.0 + n, 10**6) for one in (LOCAL, GLOBAL, TEXTBOOK) for n in (4, 8)]
    asked = []

    def given(sizes, **options):
        asked.append(options)
        return Growth(points, options.get("kernel_size", 7), 4, 4, GFLOPS, {"threads": 1})

    monkeypatch.setattr(growing, "growth", given)
    return asked


def test_the_command_leaves_numbers_and_plots(tmp_path, capsys, small_growth):
    folder = tmp_path / "new" / "cost"
    arguments = ["profile", "sasa_nano,num_classes=4", "--size", "20", "--rounds", "1", "--threads", "1"]
    assert main([*arguments, "--output", str(folder)]) == 0
    names = {f"{plot}.{kind}" for plot in ("layers", "growth") for kind in ("csv", "svg", "png")}
    assert {file.name for file in folder.iterdir()} == names | {"profile.json"}
    told = json.loads((folder / "profile.json").read_text())
    assert told["input_size"] == [1, 3, 20, 20]
    assert told["flops"] == sum(row["flops"] for row in told["rows"])
    assert [point["attention"] for point in told["growth"]["points"]][::2] == [LOCAL, GLOBAL, TEXTBOOK]
    lines = list(csv.DictReader(io.StringIO((folder / "layers.csv").read_text())))
    assert [line["layer"] for line in lines] == [row["layer"] for row in told["rows"]]
    assert [float(line["ms"]) for line in lines] == [row["ms"] for row in told["rows"]]
    assert (folder / "layers.svg").read_text().count("stages.1.0.spatial (LocalSelfAttention2d)") == 1
    assert small_growth == [{"kernel_size": 5, "num_heads": 4, "head_dim": 4, "rounds": 1}]
    text = capsys.readouterr().out
    assert "stages.0.0.spatial" in text
    assert "global attention takes longer than local" in " ".join(text.split())


def test_the_command_prints_json_or_csv(capsys, small_growth):
    arguments = ["profile", "resnet10t", "--size", "33", "--batch-size", "2", "--rounds", "1", "--no-growth"]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["input_size"] == [2, 3, 33, 33]
    assert told["flops"] == 2 * count_flops(ns.create_model("resnet10t").eval(), (3, 33, 33))
    assert "growth" not in told
    assert main([*arguments, "--csv"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [line["layer"] for line in lines] == [row["layer"] for row in told["rows"]]
    assert small_growth == []


def test_a_network_is_profiled_at_the_size_that_its_name_asks_for(capsys):
    assert main(["profile", "sasa_nano,img_size=20", "--no-growth", "--json", "--rounds", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["input_size"] == [1, 3, 20, 20]


def test_the_command_reads_a_run_s_folder(tmp_path, capsys):
    from nearsight.saved.weights import Blueprint, save_model
    from nearsight.training.data import load_pictures

    pictures = load_pictures("digits")
    blueprint = Blueprint("sasa_nano", pictures.classes, pictures.view(8), "digits")
    save_model(tmp_path / "model.safetensors", ns.create_model("sasa_nano", num_classes=10, in_chans=1), blueprint)
    assert main(["profile", str(tmp_path), "--no-growth", "--json", "--rounds", "1"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["model"], told["input_size"]) == ("sasa_nano", [1, 1, 8, 8])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sasa_nano", "--size", "0"], "--size must be at least 1; received 0"),
        (["sasa_nano", "--batch-size", "-1"], "--batch-size must be at least 1; received -1"),
        (["sasa_nano", "--threads", "0"], "threads must be at least 1; received 0"),
        (["sasa_nani"], "there is no model 'sasa_nani'"),
        (["vit_tiny_patch16_224", "--size", "32"], "vit_tiny_patch16_224 cannot take 32x32 images: Input height"),
        (["sasa_nano", "--json", "--csv"], "not allowed with argument"),
        (
            ["sasa_nano", "--size", "16", "--output", "/dev/null/x"],
            "cannot make the folder /dev/null/x: Not a directory",
        ),
    ],
)
def test_mistakes_are_one_line(capsys, arguments, message):
    assert main(["profile", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("nearsight: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
