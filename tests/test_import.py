# SPDX-License-Identifier: Apache-2.0
"""What is loaded later is there all the same: names of the package, networks in timm, formulas in PyTorch's counter."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import nearsight as ns
from nearsight.when_imported import _Waiting, when_imported

# In both orders: timm makes our network, and is as if nobody had waited for it.
ORDERS = {
    "nearsight first": "import nearsight.private, sys\nassert 'timm' not in sys.modules\nimport timm",
    "timm first": "import timm, nearsight",
}
PROGRAM = """
import sys, torch
assert timm.create_model("sasa_nano", num_classes=3).num_classes == 3
assert type(timm.models.__loader__) is type(timm.models.__spec__.loader) is type(timm.layers.__loader__)
waits = [finder.name for finder in sys.meta_path if type(finder).__module__ == "nearsight.when_imported"]
assert "timm.models" not in waits, waits
from torch.utils.flop_counter import flop_registry
assert torch.ops.nearsight.attend in flop_registry
"""


@pytest.mark.parametrize("order", ORDERS)
def test_timm_and_the_counter_know_us_in_both_orders(order):
    done = subprocess.run([sys.executable, "-c", ORDERS[order] + PROGRAM], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_attention_stands_on_may_come_first():
    """Each imports PyTorch, whose coming brings attention, which must not meet it half done: private above, and window."""
    program = "import nearsight.window, torch; torch.ops.nearsight.attend.default"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ----------------------------------------------------------------------------------------------------------- our own names


def test_what_is_loaded_later_is_what_type_checkers_see():
    """One list for those who run, one for those who only read."""
    tree = ast.parse(Path(ns.__file__).read_text())
    (seen,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in seen.body if isinstance(node, ast.ImportFrom)]
    rooms = {node.module: tuple(alias.name for alias in node.names) for node in imports if node.module}
    assert rooms == ns._LATER
    alone = [alias.name for node in imports if not node.module for alias in node.names]
    assert (*alone, *rooms) == ns._ROOMS
    assert ns.__all__ == sorted(name for names in rooms.values() for name in names)


def test_every_name_is_there_and_told():
    for room, names in ns._LATER.items():
        assert all(getattr(ns, name) is getattr(getattr(ns, room), name) for name in names)
    assert set(dir(ns)) >= {*ns.__all__, "__version__", "compat", "errors", "models"}
    assert ns.__version__ == version("nearsight")
    assert ns.errors.PackageError.__mro__[1] is ns.errors.NearsightError
    assert ns.compat.natten.install
    with pytest.raises(AttributeError, match="module 'nearsight' has no attribute 'convolve'"):
        _ = ns.convolve


# ---------------------------------------------------------------------------------------------------------------- waiting


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes the text of a module that can be imported, whose name it is."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a module that is mended within a second is read again
    before = list(sys.meta_path)

    def write(text, name="waited_for"):
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return name

    yield write
    assert sys.meta_path == before
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


def test_it_acts_once_when_the_module_is_whole(module):
    name, seen = module("a = 1\nb = 2"), []
    when_imported(name, lambda: seen.append(sys.modules[name].b))
    assert (
        importlib.util.find_spec(name).loader.get_filename(name).endswith(f"{name}.py")
    )  # who only asks, does not import
    assert seen == []
    found = importlib.import_module(name)
    assert seen == [2]
    assert type(found.__loader__).__name__ == type(found.__spec__.loader).__name__ == "SourceFileLoader"
    importlib.reload(found)
    assert seen == [2]


def test_it_acts_now_where_the_module_is_there(module):
    name, seen = module(""), []
    importlib.import_module(name)
    when_imported(name, lambda: seen.append(name))
    assert seen == [name]


def test_it_goes_on_waiting_for_a_module_that_failed(module):
    name, seen = module("1 / 0"), []
    when_imported(name, lambda: seen.append(name))
    with pytest.raises(ZeroDivisionError):
        importlib.import_module(name)
    assert seen == []
    module("a = 1")
    importlib.import_module(name)
    assert seen == [name]


def test_two_wait_for_one_module_and_others_are_left_alone(module):
    name, other, seen = module(""), module("", "another"), []
    for number in (1, 2):
        when_imported(name, lambda number=number: seen.append(number))
    importlib.import_module(other)
    assert seen == []
    importlib.import_module(name)
    assert sorted(seen) == [1, 2]


def test_a_module_that_does_not_exist_is_not_found():
    when_imported("no_such_module", lambda: None)
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        importlib.import_module("no_such_module")
    (waiting,) = [
        finder for finder in sys.meta_path if isinstance(finder, _Waiting) and finder.name == "no_such_module"
    ]
    sys.meta_path.remove(waiting)
