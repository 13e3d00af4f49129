# SPDX-License-Identifier: Apache-2.0
"""nearsight::attend registered from C++, and packages of AOTInductor that call it, in processes without nearsight."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import lines_of
from test_contract import Case, tensors_of
from test_deploy import CASES, a_call
from torch import nn

import nearsight as ns
from nearsight import deploy
from nearsight.attention import native
from nearsight.attention.native import backend
from nearsight.attention.problem import describe
from nearsight.errors import ShapeError
from nearsight.saved import export
from nearsight.saved.export import trace
from nearsight.saved.view import View

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))


def arguments_of(inputs, window: ns.Window, bias=None, relative=None, scale=None) -> list:
    """What the operator is called with."""
    problem = describe(*inputs, window, bias, relative)
    scale = inputs[0].shape[-1] ** -0.5 if scale is None else scale
    tables = [None if bias is None else bias.float(), [one.float() for one in relative or ()]]
    return [*inputs, *tables, *map(list, backend._geometry(problem)), scale, 0]


def case_of(name: str) -> list:
    case = CASES[name]
    dtype = torch.bfloat16 if len(name) % 3 == 0 else torch.float32
    _, inputs, options = tensors_of(Case(**{**vars(case), "dtype": dtype}))
    options = {key: [t.detach() for t in one] if key == "relative" and one else one for key, one in options.items()}
    options["bias"] = None if options.get("bias") is None else options["bias"].detach()
    return arguments_of([one.detach() for one in inputs[:3]], case.window, **options)


def changed(**changes) -> list:
    """The arguments of a call, some of them wrong."""
    maps, window = a_call()
    window_names = ("kernel_size", "stride", "dilation", "causal", "shared_by", "border")
    places = ("query", "key", "value", "bias", "relative", *window_names, "scale", "isa")
    named = dict(zip(places, arguments_of(maps, window), strict=True))
    return list({**named, **changes}.values())


WRONG = {
    "batch": (changed(key=torch.randn(3, 4, 23, 19, 8)), "query does not fit key"),
    "rank": (changed(query=torch.randn(2, 4, 23, 8)), "query, key and value must be"),
    "value": (changed(value=torch.randn(2, 4, 23, 18, 8)), "value does not fit key"),
    "dtypes": (changed(value=torch.randn(2, 4, 23, 19, 8).bfloat16()), "of one dtype"),
    "dtype": (
        changed(**{n: torch.randn(2, 4, 23, 19, 8).double() for n in ("query", "key", "value")}),
        "takes float32",
    ),
    "bias": (changed(bias=torch.randn(4, 5, 4)), "tables of the window"),
    "dtype of bias": (changed(bias=torch.randn(4, 5, 5).double()), "tables of the window"),
    "relative": (changed(relative=[torch.randn(4, 5, 8)]), "for every axis or for none"),
    "vectors": (changed(relative=[torch.randn(4, 5, 8), torch.randn(4, 5, 7)]), "tables of the window"),
    "strides": (changed(stride=[1]), "a number for each"),
    "no axes": (changed(kernel_size=[]), "1 to 3 axes"),
    "kernel": (changed(kernel_size=[0, 5]), "at least 1"),
    "border": (changed(border=[4, 0]), "unknown rank, dtype, border"),
    "dilation": (changed(dilation=[0, 1]), "a size is out of range"),
    "instructions": (changed(isa=77), "unknown rank, dtype, border"),
}

PROGRAM = """
import sys, torch
torch.ops.load_library(sys.argv[1])
calls, wrong = torch.load("calls.pt")
said = {}
for name, arguments in wrong.items():
    try:
        torch.ops.nearsight.attend(*arguments)
    except RuntimeError as error:
        said[name] = str(error).splitlines()[0]
found = {name: torch.ops.nearsight.attend(*arguments) for name, arguments in calls.items()}
assert not [name for name in sys.modules if name.startswith("nearsight")]
import nearsight  # adds what is lacking
query = calls["plain"][0].float().requires_grad_()
out, _ = torch.ops.nearsight.attend(query, *(one.float() for one in calls["plain"][1:3]), *calls["plain"][3:])
out.sum().backward()
torch.save((found, said, query.grad), "found.pt")
"""


def run_program(program: str, folder: Path, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_process_without_nearsight_and_one_that_imports_it_afterwards(tmp_path):
    calls = {name: case_of(name) for name in CASES}
    torch.save((calls, {name: arguments for name, (arguments, _) in WRONG.items()}), tmp_path / "calls.pt")
    run_program(PROGRAM, tmp_path, deploy.aoti_library())
    found, said, grad = torch.load(tmp_path / "found.pt")
    for name, arguments in calls.items():
        for one, expected in zip(found[name], torch.ops.nearsight.attend(*arguments), strict=True):
            assert torch.equal(one.nan_to_num(7), expected.nan_to_num(7)), name
            assert one.stride() == expected.stride(), name
    assert [name for name, (_, message) in WRONG.items() if message not in said.get(name, "")] == [], said
    assert grad.abs().sum() > 0


def test_where_python_was_first_its_operator_stays():
    torch.ops.load_library(deploy.aoti_library())
    with pytest.raises(ShapeError):
        torch.ops.nearsight.attend(*WRONG["value"][0])


@pytest.mark.sweep
def test_an_export_keeps_the_operator_where_it_is_asked_to():
    model = ns.LocalSelfAttention2d(3, 16, 3, num_heads=2)
    for context, kept in ((native.as_operators, 1), (lambda: native.use_variant("auto"), 0)):
        with context():
            program = trace(model, torch.zeros(2, 3, 16, 24))
        targets = [str(one.target) for one in program.graph.nodes]
        assert targets.count("nearsight.attend.default") == kept


# ------------------------------------------------------------------------------------------------------------- packages

LOADING = """
import sys, torch
torch.ops.load_library(sys.argv[1])
run = torch._inductor.aoti_load_package("model.pt2")
assert not [name for name in sys.modules if name.startswith("nearsight")]
torch.save([run(one) for one in torch.load("pictures.pt")], "found.pt")
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    attention = ns.LocalSelfAttention2d(1, 16, 3, num_heads=2)
    model = nn.Sequential(attention, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).eval()
    notes = json.dumps({"classes": list("abcde"), "view": {"mean": [0.5], "std": [0.25]}})
    subject = export.Subject("a network", View.of(model), notes)
    folder = tmp_path_factory.mktemp("package")
    export._written(model, subject, "aoti", folder / "model.pt2", None, "native")
    return model, folder


@pytest.mark.sweep
@torch.no_grad()
def test_a_package_of_aotinductor_in_a_process_without_nearsight(package):
    model, folder = package
    pictures = [torch.randn(1, 1, 20, 9), torch.randn(3, 1, 8, 8)]
    torch.save(pictures, folder / "pictures.pt")
    run_program(LOADING, folder, deploy.aoti_library())
    for found, one in zip(torch.load(folder / "found.pt"), pictures, strict=True):
        torch.testing.assert_close(found, model(one))


@pytest.mark.sweep
@torch.no_grad()
def test_the_lines_of_the_page(package, tmp_path, monkeypatch):
    model, folder = package
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "model-aoti.pt2").symlink_to(folder / "model.pt2")
    monkeypatch.chdir(tmp_path)
    page: dict = {}
    exec(lines_of("howto/deploy.md", "AOTInductor, and C++ without Python"), page)
    torch.testing.assert_close(page["logits"], model(torch.zeros(2, 1, 8, 8)))
    assert json.loads(page["notes"])["classes"] == list("abcde")
