# SPDX-License-Identifier: Apache-2.0
"""The rooms of docs/design.md: a file imports only from rooms above it; and what `import nearsight` brings along."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import nearsight as ns

SOURCE = Path(ns.__file__).parent
# From the top down. A file may import from every line above its own, and from its own where it is a folder or a group that
# says so: the files of "models/" share blocks, but two backends never know each other, and neither do commands and compat.
ROOMS = [
    ("errors", "when_imported", "telling"),
    ("private", "extras", "built"),
    ("deploy",),
    ("files",),
    ("own_code",),
    ("pages",),
    ("picture",),
    ("window",),
    ("precision",),
    ("positions",),
    ("attention.problem", "attention.softmax"),
    ("attention.reference", "attention.blocked"),
    ("attention.any_order",),
    (
        "attention.dense",
        "attention.flex",
        "attention.native",
        "attention.natten",
        "attention.node",
    ),
    ("attention.plain_graph",),
    ("attention.backend",),
    ("attention",),
    ("flops", "modes", "finite"),
    ("recompute",),
    ("layers",),
    ("models",),
    ("conversion", "acceleration"),
    ("saved",),
    ("inspect",),
    ("bench",),
    ("training",),
    ("from_python",),
    ("compat", "commands"),
    ("cli",),
    ("__init__",),
    ("__main__", "start"),
]
SHARED_WITHIN = (
    "attention.native",
    "layers",
    "models",
    "inspect",
    "bench",
    "training",
    "compat",
    "commands",
    "conversion",
    "acceleration",
    "deploy",
    "pages",
    "saved",
)
# What `import nearsight` may not bring along once PyTorch is there: packages of the extras, and what is loaded when used.
OPTIONAL = ("lightning", "matplotlib", "sklearn", "jsonargparse", "torchmetrics", "jinja2", "rich", "PIL")
LATER = ("timm", "torchvision", "torch._dynamo", "torch._inductor", "torch.utils.flop_counter")
LATER += tuple(
    f"nearsight.{room}"
    for room in ("acceleration", "compat", "conversion", "deploy", "flops", "inspect", "models", "pages", "saved")
)


# -------------------------------------------------------------------------------------------------------- import arrows


def module_of(file: Path, root: Path) -> str:
    """attention/blocked.py -> attention.blocked, attention/__init__.py -> attention."""
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def room_of(module: str) -> str | None:
    """The longest prefix that is a room."""
    names = {name for group in ROOMS for name in group}
    parts = module.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in names), None)


def imports_of(file: Path, root: Path) -> set[str]:
    """The modules of the package that a file imports, anywhere in it: a late import is an arrow too."""
    package = module_of(file, root).split(".") if file.name == "__init__.py" else module_of(file, root).split(".")[:-1]
    package = [part for part in package if part != "__init__"]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == root.name]
            found |= {name.removeprefix(root.name).removeprefix(".") or "__init__" for name in names}
        elif isinstance(node, ast.ImportFrom):
            base = base_of(node, package, root)
            if base is not None:
                found |= {target_of(base, alias.name, root) for alias in node.names}
    return found


def base_of(node: ast.ImportFrom, package: list[str], root: Path) -> list[str] | None:
    """The folder or file that a `from` statement names, relative to the package; None outside of it."""
    module = node.module.split(".") if node.module else []
    if node.level == 0:
        return module[1:] if module[:1] == [root.name] else None
    assert node.level - 1 <= len(package), f"an import above {root.name}: line {node.lineno}"
    return package[: len(package) - node.level + 1] + module


def target_of(base: list[str], name: str, root: Path) -> str:
    """`from .attention import blocked` names a file, `from .attention import local_attention` a thing of the room."""
    path = root.joinpath(*base, name)
    is_module = path.is_dir() or path.with_suffix(".py").exists()
    return ".".join([*base, name] if is_module else base) or "__init__"


def wrong_arrows(root: Path) -> list[str]:
    level = {name: depth for depth, group in enumerate(ROOMS) for name in group}
    wrong = []
    for file in sorted(root.rglob("*.py")):
        module = module_of(file, root)
        here = room_of(module)
        if here is None:
            wrong.append(f"{module} is in no room")
            continue
        for target in sorted(imports_of(file, root)):
            there = room_of(target)
            if there is None:
                wrong.append(f"{module} imports {target}, which is in no room")
            elif there == here:
                if here not in SHARED_WITHIN and target != module:
                    wrong.append(f"{module} imports {target} of its own room")
            elif level[there] >= level[here]:
                wrong.append(f"{module} imports {target} from below")
    return wrong


def test_arrows():
    assert len(list(SOURCE.rglob("*.py"))) >= 8
    assert imports_of(SOURCE / "attention" / "__init__.py", SOURCE) >= {
        "window",
        "attention.problem",
        "attention.backend",
    }
    assert wrong_arrows(SOURCE) == []


PLANTED = {
    "from below": ("window.py", "from .attention import local_attention", "window imports attention from below"),
    "a file from below": ("window.py", "from .attention import blocked", "window imports attention.blocked from below"),
    "absolute": ("errors.py", "from nearsight.window import Window", "errors imports window from below"),
    "whole module": ("errors.py", "import nearsight.window", "errors imports window from below"),
    "late": ("window.py", "def f():\n    from .cli import main", "window imports cli from below"),
    "type only": (
        "window.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .layers import X",
        "window imports layers from below",
    ),
    "the package itself": ("layers.py", "from . import Window", "layers imports __init__ from below"),
    "one backend from another": (
        "attention/blocked.py",
        "from . import dense",
        "attention.blocked imports attention.dense from below",
    ),
    "backend from its package": (
        "attention/blocked.py",
        "from . import local_attention",
        "attention.blocked imports attention from below",
    ),
    "position from attention": (
        "positions.py",
        "from .attention.problem import Problem",
        "positions imports attention.problem from below",
    ),
    "compat from cli": ("compat/natten.py", "from ..cli import main", "compat.natten imports cli from below"),
    "a page from a network": ("pages/html.py", "from ..models import x", "pages.html imports models from below"),
    "a saved model from training": ("saved/x.py", "from ..training import x", "saved.x imports training from below"),
    "a command from the list": ("commands/x.py", "from ..cli import main", "commands.x imports cli from below"),
    "no room": ("utils.py", "", "utils is in no room"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_arrows_can_be_wrong(name, tmp_path):
    """The test above can fail: a small right tree, and the same with one wrong line."""
    root = tmp_path / "nearsight"
    for path in ("attention", "compat", "pages", "saved", "commands"):
        (root / path).mkdir(parents=True)
    right = {
        "__init__.py": "from .attention import local_attention\nfrom .window import Window",
        "errors.py": "import torch",
        "window.py": "from .errors import ShapeError",
        "positions.py": "from .window import Window",
        "layers.py": "from . import positions\nfrom .attention import local_attention",
        "cli.py": "import nearsight.layers",
        "attention/__init__.py": "from ..window import Window\nfrom . import blocked, dense",
        "attention/problem.py": "from ..window import Window",
        "attention/blocked.py": "from .problem import Problem",
        "attention/dense.py": "from nearsight.attention.problem import Problem",
        "compat/__init__.py": "",
        "compat/natten.py": "from ..layers import Layer",
    }
    for path, text in right.items():
        (root / path).write_text(text)
    assert wrong_arrows(root) == []
    path, line, message = PLANTED[name]
    (root / path).write_text(line)
    assert wrong_arrows(root) == [message]


# ----------------------------------------------------------------------------------------------------------- public API

CONTRACT = ["Window", "attention_weights", "backends", "global_attention", "local_attention"]


def public_names() -> list[str]:
    """What does not begin with an underscore and is not a folder or file of the package."""
    names = [name for name in dir(ns) if not name.startswith("_")]
    return sorted(name for name in names if not inspect.ismodule(getattr(ns, name)))


def test_all_names_what_is_public():
    exported = [name for name in ns.__all__ if not name.startswith("_") and not inspect.ismodule(getattr(ns, name))]
    assert sorted(exported) == public_names()


def test_all_is_sorted_and_complete():
    assert list(ns.__all__) == sorted(set(ns.__all__))
    assert all(hasattr(ns, name) for name in ns.__all__)
    assert set(CONTRACT) <= set(ns.__all__)


def test_everything_public_has_a_docstring():
    for name in public_names():
        thing = getattr(ns, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert inspect.getdoc(thing), f"{name} has no docstring"


def test_every_file_names_its_licence_and_purpose():
    for file in SOURCE.rglob("*.py"):
        assert file.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n"), file
        assert ast.get_docstring(ast.parse(file.read_text())), f"{file} has no docstring"


def test_lines_of_c_are_as_short_as_those_of_python():
    """ruff looks at Python alone."""
    root = Path(__file__).parents[1]
    files = [*root.glob("csrc/**/*.h"), *root.glob("csrc/**/*.cpp"), *root.glob("tests/*.cpp")]
    assert len(files) >= 10
    lines = [(file.name, line) for file in files for line in file.read_text().splitlines()]
    assert [(name, line) for name, line in lines if len(line) > 120] == []


# ---------------------------------------------------------------------------------------------------- optional packages


def brought_along(statement: str) -> list[str]:
    """What of these a fresh interpreter has loaded after a statement, which may not print or warn."""
    program = f"import sys\n{statement}\nprint(*(name for name in {OPTIONAL + LATER!r} if name in sys.modules))"
    finished = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout.count("\n") == 1, finished.stdout
    return finished.stdout.split()


@pytest.mark.parametrize("first", ["nearsight, torch", pytest.param("torch, nearsight", marks=pytest.mark.sweep)])
def test_import_is_quiet_quick_and_brings_the_operators(first):
    assert brought_along(f"import {first}\ntorch.ops.nearsight.attend") == []


def test_an_optional_package_would_be_seen():
    assert brought_along("import jinja2") == ["jinja2"]
