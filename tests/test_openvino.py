# SPDX-License-Identifier: Apache-2.0
"""nearsight::LocalAttention in OpenVINO: the cases of test_deploy.py, and the library that is compiled for it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openvino
import pytest
import torch
from conftest import lines_of
from test_contract import KINDS, Case, tensors_of
from test_deploy import CASES, WRONG_ATTRIBUTES, WRONG_INPUTS, a_call, as_in_pytorch, model_of, node_of
from torch import Tensor, nn

import nearsight as ns
from nearsight import cli, deploy, extras
from nearsight.attention import native, node
from nearsight.deploy import compiled
from nearsight.errors import BackendError, PackageError
from nearsight.saved.export import to_onnx, trace

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
PRECISE = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture(scope="module")
def core() -> openvino.Core:
    one = openvino.Core()
    one.add_extension(deploy.openvino_library())
    return one


def answer(compiled_model: openvino.CompiledModel, inputs: dict[str, Tensor]) -> Tensor:
    numbers = [one.float().numpy() for one in inputs.values() if one is not None]
    return torch.from_numpy(compiled_model(numbers)[0])


def run(core: openvino.Core, attributes: dict, named: dict[str, Tensor], **options) -> Tensor:
    model = core.read_model(model_of(attributes, named))
    return answer(core.compile_model(model, "CPU", {**PRECISE, **options}), named)


@pytest.mark.parametrize(
    "name",  # the node's own code is the one that test_deploy.py runs on them all
    [pytest.param(name, marks=[] if name in KINDS else pytest.mark.sweep) for name in CASES],
)
def test_the_bits_of_the_path_through_pytorch(core, name):
    case = CASES[name]
    dtype = torch.bfloat16 if len(name) % 3 == 0 else torch.float32
    _, inputs, arguments = tensors_of(Case(**{**vars(case), "dtype": dtype}))
    maps, window = [one.detach() for one in inputs[:3]], case.window
    attributes, named = node_of(maps, window, **arguments)
    found = run(core, attributes, named)
    expected = as_in_pytorch(maps, window, **arguments)
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7)) or found.numel() == expected.numel() == 0


@pytest.mark.parametrize("of_key", [1, 2])
def test_heads_that_share_a_key(core, of_key):
    maps, window = a_call(of_key=of_key)
    bias = torch.randn(4, 5, 5)
    attributes, named = node_of(maps, window, bias=bias)
    expected = ns.local_attention(*maps, window, bias=bias, backend="reference").movedim(-1, 2).flatten(1, 2)
    torch.testing.assert_close(run(core, attributes, named), expected)


def test_any_number_of_threads_and_of_requests_at_once(core):
    maps, window = a_call()
    attributes, named = node_of(maps, window)
    expected = as_in_pytorch(maps, window)
    model = core.read_model(model_of(attributes, named))
    made = [core.compile_model(model, "CPU", {**PRECISE, "INFERENCE_NUM_THREADS": count}) for count in (1, 2, 3)]
    numbers = [one.numpy() for one in named.values() if one is not None]

    def request(one: openvino.CompiledModel) -> Tensor:
        return torch.from_numpy(one.create_infer_request().infer(numbers)[0])

    with ThreadPoolExecutor(6) as pool:
        for found in pool.map(request, made * 8):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", WRONG_ATTRIBUTES)
def test_attributes_are_refused_when_the_file_is_read(core, name):
    changes, reason = WRONG_ATTRIBUTES[name]
    attributes, named = node_of(*a_call())
    changed = {key: value for key, value in {**attributes, **changes}.items() if value is not None}
    with pytest.raises(RuntimeError, match=reason):
        core.read_model(model_of(changed, named))


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_inputs_are_refused_in_a_line(core, name):
    inputs, changes, reason = WRONG_INPUTS[name]
    attributes, named = node_of(*a_call())
    named = {**{k: named.get(k) for k in ("query", "key", "value", "bias")}, **inputs}
    with pytest.raises(RuntimeError, match=reason):
        run(core, {**attributes, **changes}, named)


def test_other_elements_are_refused(core):
    attributes, named = node_of(*a_call())
    model = core.read_model(model_of(attributes, named))
    (attention,) = (one for one in model.get_ops() if one.get_type_name() == "LocalAttention")
    attention.input(0).replace_source_output(openvino.opset13.convert(attention.input_value(0), "f64").output(0))
    with pytest.raises(RuntimeError, match="LocalAttention takes float32 and bfloat16; received f64"):
        model.validate_nodes_and_infer_types()


# ------------------------------------------------------------------------------------------------------------- networks


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, bytes]:
    torch.manual_seed(0)
    attention = ns.LocalSelfAttention2d(1, 16, 3, num_heads=2)
    model = nn.Sequential(attention, nn.Conv2d(16, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with node.as_nodes():
        program = trace(model, torch.zeros(2, 1, 16, 24))
    return model, to_onnx(program, {}).SerializeToString()


@torch.no_grad()
def test_the_same_file_with_open_sizes_and_as_openvino_keeps_it(core, network, tmp_path):
    model, content = network
    read = core.read_model(content)
    openvino.save_model(read, tmp_path / "model.xml", compress_to_fp16=False)
    for one in (read, core.read_model(tmp_path / "model.xml")):
        compiled_model = core.compile_model(one, "CPU", PRECISE)
        for shape in ((1, 1, 20, 9), (3, 1, 8, 8)):
            pictures = torch.randn(shape)
            found = torch.from_numpy(compiled_model(pictures.numpy())[0])
            torch.testing.assert_close(found, model(pictures), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_in_bfloat16_the_node_stays_right(core, network):
    """What is around it is rounded, as everywhere in OpenVINO; the node computes in float32 on what it gets."""
    model, content = network
    compiled_model = core.compile_model(core.read_model(content), "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
    notes = [one.get_rt_info() for one in compiled_model.get_runtime_model().get_ops()]
    types = [note["runtimePrecision"].astype(str) for note in notes if note["layerType"].astype(str) == "Reference"]
    assert types == ["f32"]
    pictures = torch.randn(3, 1, 24, 24)
    expected = model(pictures)
    found = torch.from_numpy(compiled_model(pictures.numpy())[0])
    assert ((found - expected).abs().max() / expected.abs().max()).item() < 0.02


@pytest.mark.sweep
@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_a_network_is_converted_by_its_example(network):
    model, _ = network
    pictures = torch.randn(2, 1, 16, 24)
    converted = openvino.convert_model(model, example_input=pictures)
    found = openvino.compile_model(converted, "CPU", PRECISE)(pictures.numpy())[0]
    torch.testing.assert_close(torch.from_numpy(found), model(pictures), rtol=1e-5, atol=1e-5)


def test_the_lines_of_the_page(network, tmp_path, monkeypatch):
    model, content = network
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "model.onnx").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    page: dict = {}
    exec(lines_of("howto/deploy.md", "OpenVINO"), page)
    with torch.no_grad():
        expected = model(torch.from_numpy(page["pictures"]))
    torch.testing.assert_close(torch.from_numpy(page["logits"]), expected)


# ---------------------------------------------------------------------------------------------------------- the library


def test_it_is_compiled_once_and_the_command_says_where_it_is(capsys):
    path = deploy.openvino_library()
    before = os.stat(path).st_mtime_ns
    assert cli.main(["deploy", "openvino"]) == 0
    assert capsys.readouterr().out.startswith(f"{path}\nCore.add_extension(path) loads it")
    assert os.stat(path).st_mtime_ns == before
    assert cli.main(["deploy", "onnxruntime"]) == 0
    assert deploy.onnxruntime_library() in capsys.readouterr().out


def without_headers(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setattr(compiled, "_folder_of", lambda runtime: folder)


def without_a_cache(patch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "file").touch()
    patch.setenv("XDG_CACHE_HOME", str(folder / "file"))


def without_a_compiler(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.delenv("CXX", raising=False)
    patch.setenv("PATH", str(folder))


LACKING = {
    "openvino": (
        lambda patch, folder: patch.setattr(extras, "find_spec", lambda name: None),
        PackageError,
        "OpenVINO needs openvino: pip install 'nearsight.openvino.'",
    ),
    "headers": (without_headers, BackendError, "the installed openvino has no headers"),
    "a compiler": (without_a_compiler, BackendError, r"has no C\+\+17 compiler: looked for c\+\+, g\+\+, clang"),
    "that compiler": (
        lambda patch, folder: patch.setenv("CXX", "none_such -O2"),
        BackendError,
        r"has no C\+\+17 compiler: looked for none_such -O2",
    ),
    "a compiler that works": (
        lambda patch, folder: patch.setenv("CXX", "false"),
        BackendError,
        "false cannot build the operator for OpenVINO: it said nothing",
    ),
    "a compiler of C++17": (
        lambda patch, folder: patch.setenv("CXX", "g++ -fno-such-flag"),
        BackendError,
        r"g\+\+ cannot build the operator for OpenVINO: error: unrecognized",
    ),
    "the kernel": (
        lambda patch, folder: patch.setattr(compiled, "built", lambda package, stem: None),
        BackendError,
        "there is no operator for OpenVINO: ",
    ),
    "a place": (without_a_cache, BackendError, "nowhere to keep what is compiled: .*: Not a directory"),
}


@pytest.mark.parametrize("lacking", LACKING)
def test_what_lacks_is_told_in_a_line_and_nothing_is_left(lacking, monkeypatch, tmp_path):
    take_away, error, message = LACKING[lacking]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    take_away(monkeypatch, tmp_path)
    with pytest.raises(error, match=message) as told:
        deploy.openvino_library()
    assert "\n" not in str(told.value)
    assert {file.suffix for file in tmp_path.glob("cache/nearsight/*")} <= {".lock"}
