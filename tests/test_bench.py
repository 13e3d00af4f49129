# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, compare what they time, and write every number. What the times are is not asserted."""

import json
import re
import sys
from contextlib import nullcontext
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nearsight.attention import local_attention
from nearsight.bench import core, deploy, hosts, layers, models, run
from nearsight.bench.memory import in_fresh_process, peak_memory
from nearsight.bench.timing import Times, passes, race
from nearsight.cli import main
from nearsight.errors import OptionError
from nearsight.window import Window


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(core, "QUICK", (core.Shape(1, 2, 8, 9),))
    monkeypatch.setattr(layers, "STAGES", ((16, 9, 2),))
    monkeypatch.setattr(models, "PAIRS", (("sasa_nano", "sasa_nano of convolutions", 16),))
    few = {"eager": hosts.eager, "nowhere": lambda model, images: "it is not here"}
    monkeypatch.setattr(hosts, "HOSTS", few)
    monkeypatch.setattr(models, "HOSTS", few)


def printed_and_written(bench, folder, capsys):
    """The lines that a bench prints, and the facts that it writes."""
    file = folder / "numbers.json"
    assert main(["bench", bench, "--quick", "--threads", "1", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["bench"] == bench
    assert report["quick"] is True
    (facts,) = report["runs"]
    assert facts["threads"] == 1
    assert facts["rows"]
    out = capsys.readouterr().out
    assert "threads 1" in out
    return out.splitlines(), facts


@pytest.mark.parametrize("bench", ["core", "layers"])
def test_every_bench_prints_and_writes(bench, tiny, tmp_path, capsys):
    printed_and_written(bench, tmp_path, capsys)


def test_bench_of_models_compares_networks_with_yardsticks(tiny, tmp_path, capsys, monkeypatch):
    # Processes of their own are looked at below; here they would take the most of the time.
    monkeypatch.setattr(models, "in_fresh_process", lambda function, *arguments: 3_000_000)
    lines, facts = printed_and_written("models", tmp_path, capsys)
    rows = facts["rows"]
    ways = [("eager", "float32"), ("eager", "bfloat16")]
    *inferred, trained = [(row["mode"], row["host"], row["dtype"]) for row in rows]
    assert inferred == [("inference", *way) for way in [*ways, ("nowhere", "float32"), ("nowhere", "bfloat16")]]
    assert trained == ("training", "eager", "float32")
    assert [row.get("why_not") for row in rows] == [None, None, "it is not here", "it is not here", None]
    for row in (rows[0], rows[1], rows[-1]):
        ratios = [there / here for here, there in zip(row["network"]["ms"], row["yardstick"]["ms"], strict=True)]
        assert row["faster"] == sum(ratios) / 2
        for who, name in (("network", "sasa_nano"), ("yardstick", "sasa_nano of convolutions")):
            assert row[who]["name"] == name
            assert row[who]["median_ms"] > 0
            assert ("peak_memory" in row[who]) == (row["mode"] == "training")
    _, *inference, training = lines[lines.index("sasa_nano against sasa_nano of convolutions, 16") :]
    for way, line in zip(ways, inference, strict=False):
        assert re.fullmatch(rf"  inference +{way[0]} +{way[1]}( +[\d.]+ \(\w+\)){{2}} +[\d.]+x", line)
    assert re.fullmatch(r"  inference +nowhere +bfloat16 +it is not here", inference[3])
    assert re.fullmatch(r"  training .*( +[\d.]+ \(\w+\)){2} +[\d.]+x +\d+ +\d+ +[\d.]+x", training)


def test_hosts_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr(hosts, "find_spec", lambda package: None if package == "openvino" else package)
    assert hosts.prepared("openvino", nn.Identity(), torch.ones(1)) == "openvino is not installed"
    monkeypatch.setattr(hosts, "find_spec", lambda package: None)
    assert "onnx, onnxscript, onnxruntime are not installed" in hosts.prepared(
        "onnxruntime", nn.Identity(), torch.ones(1)
    )
    assert hosts.NEEDS.keys() <= hosts.HOSTS.keys()


@pytest.mark.slow
def test_deploy_has_a_row_for_every_runtime_and_says_what_is_missing(tmp_path, monkeypatch, capsys):
    elsewhere = deploy.Runtime(None, "", lambda *_: lambda: None, ("nowhere",))
    chosen = {name: deploy.RUNTIMES[name] for name in ("eager", "onnxruntime native")}
    monkeypatch.setattr(deploy, "RUNTIMES", {**chosen, "elsewhere": elsewhere})
    small = "sasa_nano,depths=[1,1],widths=[8,16],stem_width=8,num_heads=2"
    monkeypatch.setattr(deploy, "PAIRS", (deploy.Pair(small, f"{small} of convolutions", 32),))
    monkeypatch.setattr(deploy, "in_fresh_process", lambda function, *asked: function(*asked))
    file = tmp_path / "deploy.json"
    run("deploy", threads=1, quick=True, json_file=file)
    rows = {(row["runtime"], row["dtype"]): row for row in json.loads(file.read_text())["runs"][0]["rows"]}
    assert len(rows) == 6
    for dtype in ("float32", "bfloat16"):
        assert rows["elsewhere", dtype]["why_not"] == "nowhere is not installed"
        assert (
            f"elsewhere           {dtype:10}nowhere is not installed" in capsys.readouterr().out or dtype == "bfloat16"
        )
    assert rows["onnxruntime native", "bfloat16"]["why_not"] == hosts.NO_CONVOLUTIONS
    assert rows["eager", "float32"]["network"]["difference"] == 0
    assert 1e-4 < rows["eager", "bfloat16"]["network"]["difference"] < 0.1
    native = rows["onnxruntime native", "float32"]
    assert native["network"]["difference"] < 1e-5
    assert native["network"]["images_per_second"] == pytest.approx(8e3 / native["network"]["median_ms"])
    assert native["yardstick"]["name"] == f"{small} of convolutions"


def small_sam(name: str, img_size: int) -> nn.Module:
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    sizes = {
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "window_size": 3,
        "global_attn_indexes": (1,),
    }
    parts = {"use_rel_pos": True, "use_abs_pos": True, "neck_chans": 8, "num_classes": 0}
    return VisionTransformerSAM(img_size=img_size, **sizes, **parts)


@pytest.mark.slow
def test_deploy_runs_segment_anything_both_ways_on_images_of_a_size_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(deploy, "create_model", small_sam)
    monkeypatch.setattr(deploy, "in_fresh_process", lambda function, *asked: function(*asked))
    file = tmp_path / "deploy.json"
    run("deploy", threads=1, quick=True, json_file=file, network="samvit_base_patch16", size=40)
    rows = {(row["runtime"], row["dtype"]): row for row in json.loads(file.read_text())["runs"][0]["rows"]}
    assert [runtime for runtime, _ in rows] == ["eager", "eager", "onnxruntime native", "onnxruntime native"]
    for row in (rows["eager", "float32"], rows["onnxruntime native", "float32"]):
        assert (row["size"], row["batch"]) == (40, 1)
        assert row["network"]["name"] == "samvit_base_patch16 accelerated"
        assert max(row["network"]["difference"], row["yardstick"]["difference"]) < 1e-5


@pytest.mark.parametrize(
    ("bench", "given", "message"),
    [
        ("core", {"network": "sasa_resnet50"}, "--network is for nearsight bench deploy"),
        ("deploy", {"size": 0}, "--size must be at least 1; received 0"),
        (
            "deploy",
            {"network": "resnet51"},
            "--network must be one of sasa_resnet26, sasa_resnet50, samvit_base_patch16",
        ),
    ],
)
def test_what_bench_deploy_alone_takes(bench, given, message):
    with pytest.raises(OptionError, match=message):
        run(bench, threads=1, **given)


@pytest.mark.sweep
def test_the_memory_of_a_session_is_that_of_its_network():
    """A larger batch of larger pictures asks for more, though this process has held much more."""
    assert torch.ones(1 << 28).sum() > 0
    small, large = (in_fresh_process(deploy.session_memory, "eager", "sasa_nano", False, n, 1) for n in (32, 128))
    assert 3 * small < large < peak_memory()


# What compiles for seconds.
COMPILED = [pytest.param("compiled", dtype, marks=pytest.mark.sweep) for dtype in models.DTYPES]


@pytest.mark.parametrize(
    ("host", "dtype"), [*product((*hosts.NEEDS, "eager", "folded"), models.DTYPES), *COMPILED], ids=str
)
def test_every_host_gives_the_network_s_outputs(host, dtype):
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(2, 3, 8, 8)
    expected = model(images)
    step = hosts.prepared(host, model, images.to(dtype))
    if isinstance(step, str):
        assert re.search(r"not installed|on CPUs|on this processor", step), step
        return
    found = step()
    found = found if isinstance(found, torch.Tensor) else torch.as_tensor(found[0])
    torch.testing.assert_close(found.float(), expected, atol=1e-5 if dtype == torch.float32 else 3e-2, rtol=1e-2)
    assert not found.requires_grad


@pytest.mark.parametrize(
    "name", ["sasa_nano", "resnet10t", "sasa_nano of convolutions"], ids=["ours", "yardstick", "twin"]
)
def test_folding_is_done_to_every_network_alike(name, monkeypatch):
    """Networks and yardsticks: by the host "folded" and by no other, and without a trace in the network itself."""
    model, images = models._model(name, "contiguous"), torch.randn(2, 3, 32, 32)
    for norm in (one for one in model.modules() if isinstance(one, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_var, 0.5, 2)
    eager = hosts.prepared("eager", model, images)
    ran = []
    monkeypatch.setattr(
        torch.nn.functional,
        "batch_norm",
        lambda *args, _was=torch.nn.functional.batch_norm, **named: ran.append(1) or _was(*args, **named),
    )
    expected = eager()
    norms, count = sum(isinstance(one, nn.BatchNorm2d) for one in model.modules()), len(ran)
    assert count == norms > 4
    found = hosts.prepared("folded", model, images)()
    assert len(ran) - count < norms / 3  # those before a convolution cannot be
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(eager(), expected)


def test_what_cannot_be_folded_is_run_for_neither():
    alone = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)).eval()
    assert hosts.prepared("folded", alone, torch.ones(1, 3, 2, 2)) == (
        "no batch norm can be folded: none follows a convolution"
    )
    steps = {"network": "it cannot", "yardstick": lambda: None}
    found = models._contest(
        {"network": "network", "yardstick": "yardstick"}, lambda name, _: steps[name], ("contiguous",), 1, 1
    )
    assert found == {"why_not": "it cannot"}


@pytest.mark.parametrize(
    ("network", "yardstick", "size"),
    [pytest.param(*pair, marks=[pytest.mark.sweep] * (pair[0] != "sasa_resnet26")) for pair in models.PAIRS],
)
def test_network_and_yardstick_take_the_size(network, yardstick, size):
    with torch.device("meta"), torch.no_grad():
        images = torch.empty(1, 3, size, size)
        assert models._model(network, "contiguous")(images).shape == (1, 1000)
        assert models._model(yardstick, "contiguous")(images).shape == (1, 1000)


@pytest.mark.sweep
def test_training_memory_is_the_network_s_own():
    """What a step of more images keeps is seen, although the process that asks has held much more."""
    assert torch.ones(1 << 28).sum() > 0
    some, more = (in_fresh_process(models.training_memory, "sasa_nano", "contiguous", n, 32, 1) for n in (16, 64))
    assert peak_memory() > 2 * more
    assert 2.5 * some < more < 4 * some


def test_contenders_that_disagree_are_not_timed(tiny):
    with pytest.raises(AssertionError, match="wrong"):
        core._check_equal(core.QUICK[0], {"wrong": lambda query, key, value: value})


def test_natten_mps_is_left_out_where_it_is_not_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "natten_mps", None)
    assert core._natten_mps() == {}
    assert "without natten-mps: " in capsys.readouterr().out


@pytest.mark.parametrize("scale", [None, 1.0])
def test_natten_mps_is_held_against_ours(scale, tiny, monkeypatch):
    """A stand-in that computes na2d as the package documents it, by our reference; or with another scale."""

    def na2d(query, key, value, kernel_size):
        maps = (tensor.movedim(-2, 1) for tensor in (query, key, value))
        window = Window(kernel_size, border="shift")
        return local_attention(*maps, window, scale=scale, backend="reference").movedim(1, -2)

    monkeypatch.setitem(sys.modules, "natten_mps", SimpleNamespace(na2d=na2d))
    found = core._natten_mps()
    assert list(found) == ["natten-mps"]
    with nullcontext() if scale is None else pytest.raises(AssertionError, match="natten-mps"):
        core._check_equal(core.QUICK[0], found)


def test_times():
    times = race({"a": lambda: None, "b": lambda: sum(range(1000))}, rounds=4, seconds=10)
    assert len(times["a"].ms) == len(times["b"].ms) == 4
    assert times["b"].median > times["a"].median
    assert Times([3.0, 1.0, 2.0]).median == 2.0
    # Two slow rounds and one fast, of both alike; one of them sat out the last.
    assert Times([1.0, 10.0, 8.0]).faster_than(Times([2.0, 30.0, 16.0, 1.0])) == 2.0


def test_passes_take_every_gradient():
    seen = []
    weight = torch.ones(3, requires_grad=True)

    def product(x):
        x.register_hook(lambda grad: seen.append("x")) if x.requires_grad else None
        return x * weight

    both = passes(product, [torch.ones(3)], [weight])
    both["forward"]()
    assert seen == []
    both["forward+backward"]()
    assert seen == ["x"]
    assert weight.grad is None


def test_mistakes():
    with pytest.raises(OptionError, match="no bench 'cor'; there are core, layers, models, deploy, accelerated"):
        run("cor")
    with pytest.raises(OptionError, match="threads must be at least 1; received 0"):
        run("core", threads=0)
