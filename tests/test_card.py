# SPDX-License-Identifier: Apache-2.0
"""`nearsight bench card` on the CPU: it runs to the end, finds what is wrong, and writes all of it down."""

from __future__ import annotations

import json

import pytest
import torch

from nearsight.bench import card
from nearsight.cli import main

FEW = card.CHECKS[1], card.CHECKS[-2]


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(card, "CHECKS", FEW)
    pairs = card.layer(16, 9, 2), card.network("sasa_nano", 16, 2, in_chans=1)
    monkeypatch.setattr(card, "races", lambda device: [(pairs[0], "bfloat16", False), (pairs[1], "float16", False)])


def run(folder, device="cpu") -> tuple[int, dict, str]:
    code = main(["bench", "card", "--device", device, "--output", str(folder)])
    return code, json.loads((folder / "card.json").read_text()), (folder / "card.html").read_text()


@pytest.mark.slow
def test_it_runs_to_the_end(few, tmp_path, capsys):
    code, report, page = run(tmp_path / "card")
    assert code == 0, capsys.readouterr().err
    checks = {(row["backend"], row["name"]): row for row in report["checks"]}
    assert set(checks) == {(backend, check.name) for check in FEW for backend in ("flex", "blocked")}
    for (backend, _), row in checks.items():
        assert row["verdict"] == "right"
        assert row["gradients"] == (backend == "blocked")  # on the CPU FlexAttention has none
        assert 0 < row["largest error"] <= row["allowed"]
    tables = checks["blocked", FEW[0].name]["errors"]
    assert set(tables) == {"values", "query", "key", "value", "bias", "relative 0", "relative 1"}
    for row in report["races"]:
        assert row["faster"] > 0
        assert row["attention"]["peak_memory"] is None
    assert [(row["name"], row["mode"]) for row in report["races"]] == [
        (name, mode) for name in ("layer 16 @ 9x9", "sasa_nano") for mode in ("inference", "training")
    ]
    assert "layer 16 @ 9x9, batch 2" in page
    assert f"{checks['flex', FEW[0].name]['largest error']:.1e}" in page
    assert report["torch"] == torch.__version__
    assert "wrote" in capsys.readouterr().out


def test_what_is_wrong_and_what_fails_is_found(few, tmp_path, monkeypatch, capsys):
    right = card.local_attention

    def wrong(query, key, value, window, backend, **tables):
        if backend == "flex":
            raise RuntimeError("no kernel <b>\nmore of it")
        out = right(query, key, value, window, backend=backend, **tables)
        return out if backend == "reference" else out * 1.1

    monkeypatch.setattr(card, "local_attention", wrong)
    monkeypatch.setattr(card, "race", lambda *given: 1 / 0)
    code, report, page = run(tmp_path / "card")
    assert code == 2
    assert "4 of the checks failed: flex, the same in bfloat16; blocked, the same" in capsys.readouterr().err
    assert [row["verdict"] for row in report["checks"]] == ["failed", "wrong"] * 2
    assert "more of it" in report["checks"][0]["traceback"]
    assert "RuntimeError: no kernel &lt;b&gt;" in page
    assert {row["reason"] for row in report["races"]} == {"ZeroDivisionError: division by zero"}


def test_what_is_no_number_is_not_right():
    found = [torch.tensor([float("nan"), 1.0])]
    assert card.judged(found, [torch.ones(2, dtype=torch.float64)], 1.0)["verdict"] == "wrong"


def test_what_the_time_does_not_reach_is_named(few, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(card, "SECONDS", 0.0)
    code, report, page = run(tmp_path / "card")
    assert code == 0
    assert {row["verdict"] for row in report["checks"] + report["races"]} == {card.LEFT_OUT}
    assert card.LEFT_OUT in page


def test_every_check_and_network_can_be_made():
    """What a card would be asked, as far as sizes and names go."""
    for check in card.CHECKS:
        assert card._able("reference", check, card.inputs(check), "cpu") == (None, True)
    for pair, dtype, _ in card.races("cuda"):
        assert dtype in card.DTYPES
        with torch.device("meta"), torch.no_grad():
            images = torch.empty(1, *pair.images[1:])
            model, twin = pair.attention().eval(), pair.convolution().eval()
            assert twin(images).shape[0] == 1
            names = {type(module).__name__ for module in model.modules()}
            assert any("SelfAttention" in name for name in names), names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["card"], "--output DIR names the folder"),
        (["card", "--output", "x", "--quick"], "takes --device and --output alone"),
        (["card", "--output", "x", "--device", "mps"], "--device must be cuda or cpu; received 'mps'"),
        (["core", "--output", "x"], "--output and --device are for nearsight bench card"),
    ],
)
def test_mistakes(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_a_card(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "card", "--output", str(tmp_path / "x")]) == 2
    assert "PyTorch sees no CUDA card; --device cpu shows" in capsys.readouterr().err
