# SPDX-License-Identifier: Apache-2.0
"""What the README says a run reaches, it reaches; and the tables of speed are the files that the benches left."""

import importlib.util
import json
from pathlib import Path

import pytest

from nearsight.training import train
from nearsight.training.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
SETTING = {"threads": 1, "torch": "2.14.1+cpu"}


@pytest.mark.slow
def test_three_epochs_reach_most_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "write_report", lambda *arguments: None)
    assert train.train(Recipe(epochs=3), tmp_path).evaluation.accuracy >= 0.8


@pytest.mark.sweep
def test_the_defaults_reach_98_percent_on_digits(tmp_path):
    run = train.train(Recipe(), tmp_path)
    assert run.evaluation.count == 360
    assert run.evaluation.accuracy >= 0.98


# ---------------------------------------------------------------------------------------------------------------- speed


@pytest.fixture(scope="module")
def speed():
    spec = importlib.util.spec_from_file_location("speed", ROOT / "docs" / "results" / "speed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_speed_are_what_was_measured(speed):
    for file in speed.PAGES:
        text = file.read_text()
        assert speed.MARKED.search(text)
        assert speed.page(text) == text, "python docs/results/speed.py"


def measured(folder, bench, report):
    file = folder / "emerald-rapids" / f"{bench}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(report))


def marked(name):
    return f"<!-- {name}: from here on written by docs/results/speed.py -->\nold\n<!-- up to here -->"


def test_tables_of_layers_from_a_file(speed, tmp_path):
    rows = [
        {"stage": stage, "pass": pass_, "attention": {"median_ms": 2.0}, "convolution": {"median_ms": ms}}
        for stage, times in {"64@56": (1.0, 3.0), "sum": (5.0, 6.5)}.items()
        for pass_, ms in zip(speed.PASSES, times, strict=True)
    ] + [{"stage": "alternation 128@28", "pass": "forward", "whole_ms": 1.0}]
    text = marked("layers") + marked("readme") + marked("core")
    assert speed.page(text, tmp_path) == text  # nothing was measured
    measured(tmp_path, "layers", {"quick": False, "runs": [{**SETTING, "rows": rows}]})
    page = speed.page(text, tmp_path)
    assert page.count("old") == 1
    assert "| 64 @ 56\N{MULTIPLICATION SIGN}56 | 0.50 | 1.50 |\n| ResNet-50's sixteen | 2.50 | 3.25 |" in page
    assert "| forward | 0.50 | 2.50 |\n| with backward | 1.50 | 3.25 |" in page
    assert speed.page(page, tmp_path) == page
    measured(tmp_path, "layers", {"quick": True, "runs": []})
    with pytest.raises(AssertionError, match="--quick"):
        speed.page(text, tmp_path)


def test_tables_of_models_core_and_unfold_from_a_file(speed, tmp_path):
    way = {"mode": "inference", "dtype": "float32", "batch": 16, "size": 224}
    pair = {"network": {"name": "one", "peak_memory": 1e9}, "yardstick": {"name": "other", "peak_memory": 2e9}}
    rows = [
        {**way, "host": "eager", **pair, "faster": 1.25},
        {**way, "host": "onnxruntime", "dtype": "bfloat16", "why_not": "it has none"},
        {**way, "host": "eager", "mode": "training", **pair, "faster": 0.75},
    ]
    measured(tmp_path, "models", {"quick": False, "runs": [{**SETTING, "rows": rows}]})
    page = speed.page(marked("models"), tmp_path)
    assert "|  | eager, float32 | onnxruntime, bfloat16 | training | training memory |" in page
    assert "| `one` against `other` | 1.25 | - | 0.75 | 0.50 |" in page

    shape = {"batch": 8, "heads": 4, "head_dim": 32, "size": 56}
    rows = [
        {**shape, "name": name, "pass": "forward", "median_ms": ms, "gap": 2.5}
        for name, ms in {"native": 1.0, "dense": 9.0, "blocked": 4.0}.items()
    ]
    measured(tmp_path, "core", {"quick": False, "runs": [{**SETTING, "rows": rows}]})
    page = speed.page(marked("core"), tmp_path)
    assert (
        "| 8 \N{MULTIPLICATION SIGN} 4 \N{MULTIPLICATION SIGN} 32, 56\N{MULTIPLICATION SIGN}56 | 1.00 (2.5) | 4.00 |"
        in page
    )

    rows = [
        {"pass": pass_, "name": name, "median_ms": ms, "times_faster": 40 / ms, "extra_mib": 2 * ms}
        for pass_ in speed.PASSES
        for name, ms in {"unfold": 40.0, "native": 2.0}.items()
    ]
    measured(tmp_path, "unfold", {"setting": {"threads": 1}, "torch": "2.14.1", "rows": rows})
    page = speed.page(marked("unfold"), tmp_path)
    assert "| forward+backward | 40.0 ms | 2.0 ms, 20\N{MULTIPLICATION SIGN} | 80 MiB | 4 MiB |" in page
