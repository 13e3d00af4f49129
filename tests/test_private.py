# SPDX-License-Identifier: Apache-2.0
"""What is not public in PyTorch and Lightning is used by one file, and each of these names may be gone."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import nearsight as ns
from nearsight import flops, private
from nearsight.attention import native
from nearsight.attention.native import library as lib
from nearsight.errors import BackendError

SOURCE = Path(ns.__file__).parent
OTHERS = ("torch", "lightning")
OF_MODULES = {name for name in vars(nn.Module()) if name.startswith("_")}  # hooks, parameters, buffers, modules


def private_names(text: str) -> list[str]:
    """The names of PyTorch and Lightning in a file that begin with a single underscore, or lie in a module that does."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            is_own = owner in ("self", "cls")  # a subclass may use what it has inherited
            found += [f"torch.nn.Module.{node.attr}"] if node.attr in OF_MODULES and not is_own else []
            found += [ast.unparse(node)]
    outer = [name.split(".") for name in found if name.split(".")[0] in OTHERS and "(" not in name]
    return [".".join(parts) for parts in outer if any(part[:1] == "_" and part[:2] != "__" for part in parts)]


def test_one_file_uses_them():
    files = [file for file in sorted(SOURCE.rglob("*.py")) if file.name != "private.py"]
    assert len(files) > 50
    assert {str(file): names for file in files if (names := private_names(file.read_text()))} == {}
    assert len(set(private_names(Path(private.__file__).read_text()))) >= 4


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch._C._get_tracing_state()",
        "from torch.utils._pytree import tree_map",
        "from torch.fx.experimental import _config",
        "import torch._inductor.config",
        "def f():\n    from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher",
        "import torch\ntorch.ops.aten._softmax",
        "def f(module):\n    return module._forward_hooks",
    ],
)
def test_a_private_name_would_be_seen(text):
    assert private_names(text)
    assert (
        private_names("import torch\nclass A(torch.nn.Module):\n    def f(self):\n        return self._modules") == []
    )


def test_what_cannot_compile_ahead_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch._inductor", None)
    with pytest.raises(BackendError, match="take another PyTorch"):
        private.compiled_ahead(None, "model.pt2", {})


@pytest.fixture
def without(monkeypatch):
    """The file as it is read in a PyTorch that lacks a name, or a module."""

    def read(*names):
        for name in names:
            owner, _, attribute = name.rpartition(".")
            if owner == "torch.ops.aten":  # which makes what is asked for
                monkeypatch.setattr(
                    type(torch.ops.aten), "__getattr__", lambda *_: (_ for _ in ()).throw(AttributeError)
                )
                monkeypatch.delitem(vars(torch.ops.aten), attribute, raising=False)
            elif owner in sys.modules and name not in sys.modules:
                monkeypatch.delattr(sys.modules[owner], attribute)
            else:
                monkeypatch.setitem(sys.modules, name, None)
        spec = importlib.util.spec_from_file_location("nearsight.private", private.__file__)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return read


def test_transforms_are_taken_to_be_active(without):
    name = "torch._C._are_functorch_transforms_active"
    assert not private.transforms_are_active()
    assert without(name).transforms_are_active()


def test_what_cannot_be_asked_for_hooks_has_some(without, monkeypatch):
    module = nn.Linear(2, 2)
    assert not private.has_forward_hooks(module)
    assert not private.has_hooks(module)
    with module.register_full_backward_hook(lambda *_: None):
        assert private.has_hooks(module)
        assert not private.has_forward_hooks(module)
    with module.register_forward_hook(lambda *_: None):
        assert private.has_hooks(module)
        assert private.has_forward_hooks(module)
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        assert private.has_forward_hooks(module)
        assert not private.has_hooks(module)
    monkeypatch.delattr(nn.modules.module, "_global_forward_hooks")
    assert private.has_forward_hooks(module)
    del module._backward_hooks
    assert private.has_hooks(module)


def test_the_native_backend_says_what_it_lacks(without, monkeypatch):
    assert without("torch._C._AutoDispatchBelowAutograd").below_autograd is None
    monkeypatch.setattr(native.backend, "below_autograd", None)
    if not isinstance(lib.find(), str):
        assert "_AutoDispatchBelowAutograd" in native.unavailable()


def test_an_operator_that_is_not_there_is_not_counted(without):
    names = [f"torch.ops.aten._scaled_dot_product_flash_attention_for_cpu{part}" for part in ("", "_backward")]
    found = without(*names)
    assert (found.FLASH_ON_CPU, found.FLASH_ON_CPU_BACKWARD) == (None, None)
    assert private.FLASH_ON_CPU is not None


class Nameless:
    def __init__(self, operator):
        self.__name__ = operator.__name__


@pytest.mark.parametrize("operator", ["add_.Tensor", "add.Tensor", "relu_.default", "relu.default"])
def test_operators_that_write_are_known_by_their_names(operator):
    name, overload = operator.split(".")
    operator = getattr(getattr(torch.ops.aten, name), overload)
    assert private.is_mutable(operator) == private.is_mutable(Nameless(operator)) == name.endswith("_")


def test_a_trace_holds_what_it_is_not_kept_from(without):
    def twice(module):
        def call(x):
            with module.untraced():
                y = x.sin()
            return x + y

        return str(torch.jit.trace(call, torch.ones(2)).graph)

    assert "aten::sin" not in twice(private)
    assert "aten::sin" in twice(without("torch._C._set_tracing_state"))


def test_sizes_of_one_are_left_to_pytorch(monkeypatch):
    config = importlib.import_module("torch.fx.experimental._config")
    with private.open_sizes_of_one():
        assert config.backed_size_oblivious
    assert not config.backed_size_oblivious
    monkeypatch.delattr(config, "backed_size_oblivious", raising=False)
    with private.open_sizes_of_one():
        assert not hasattr(config, "backed_size_oblivious")
    monkeypatch.delattr(torch.fx.experimental, "_config")
    monkeypatch.setitem(sys.modules, config.__name__, None)
    with private.open_sizes_of_one():
        pass


def test_a_constant_is_marked_as_the_compiler_itself_marks_it():
    def ours():
        return None

    def theirs():
        return None

    private.constant_to_compilers(ours)
    assert vars(ours) == vars(torch.compiler.assume_constant_result(theirs)) != {}


def test_flops_are_counted_of_what_is_run(without, monkeypatch):
    model = ns.create_model("sasa_nano").eval()
    expected = flops.count_flops(model, (3, 32, 32))
    monkeypatch.setattr(flops, "without_computing", without("torch._subclasses").without_computing)
    assert flops.count_flops(model, (3, 32, 32)) == expected > 0


def test_a_mode_that_is_not_there_is_named(without):
    class Mode(without("torch.utils._python_dispatch").TorchDispatchMode):
        pass

    with pytest.raises(BackendError, match=r"_python_dispatch.*does not have"):
        Mode()


def test_structures_are_walked_by_hand(without):
    tree = {"a": [1, (2, 3)], "b": ({"c": 4},)}
    for module in (private, without("torch.utils._pytree")):
        assert module.tree_leaves(tree) == [1, 2, 3, 4]
        assert module.tree_map(lambda one: -one, tree) == {"a": [-1, (-2, -3)], "b": ({"c": -4},)}
