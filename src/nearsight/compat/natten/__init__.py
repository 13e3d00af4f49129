# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the package ``natten``: the names of NATTEN 0.14 to 0.21, on every device, with every gradient.

    nearsight.compat.natten.install()
    import natten

What it covers, and what it does not, is in docs/howto/natten.md.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder, PackageNotFoundError, version
from importlib.util import find_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import OptionError

__all__ = ["install", "uninstall"]

# The NATTEN that decides where versions differ. The label after the plus says who answers.
NATTEN_VERSION = "0.21.7"
# The modules of NATTEN 0.14 to 0.21 that clients import from, and the files here that hold their names.
CALLS = ("context", "functional", "modules", "types", "utils")  # with what NATTEN's own files import beside them
MODULES: Mapping[str, tuple[str, ...]] = {
    "natten": ("context", "functional", "modules"),
    "natten.context": ("context",),
    "natten.flops": ("flops",),
    "natten.types": ("types",),
    **{f"natten.{name}": CALLS for name in ("attn_merge", "experimental", "flex", "functional", "modules", "nested")},
    **{f"natten.{name}{rank}d": CALLS for name in ("na", "natten") for rank in (1, 2, 3)},
    **{f"natten.nattencuda{rank}": CALLS for rank in ("", "1d", "2d")},
    "natten.utils": ("types", "utils"),
    **{
        f"natten.utils.{name}": ("types", "utils")
        for name in ("checks", "device", "misc", "tensor", "tuples", "typing")
    },
    "natten.utils.log": (),
    "natten.version": (),
}
EXTRA: Mapping[str, Mapping[str, Any]] = {"natten.utils.log": {"get_logger": logging.getLogger}}


class _Finder(DistributionFinder, Loader):
    """Answers to ``import natten`` and to ``importlib.metadata.version("natten")``."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in MODULES:
            return None
        is_package = any(name.startswith(f"{fullname}.") for name in MODULES)
        return spec_from_loader(fullname, self, origin=__file__, is_package=is_package)

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = f"nearsight's stand-in for {module.__name__}."
        module.__dict__["__version__"] = natten_version()
        if module.__name__ == "natten":
            # Clients write natten.functional.na2d after `import natten` alone. Before the names, because natten.na2d was a
            # module once and is a function now.
            for name in MODULES:
                import_module(name)
        for source in MODULES[module.__name__]:
            found = import_module(f".{source}", __name__)
            module.__dict__.update(
                {name: getattr(found, name) for name in found.__all__} | getattr(found, "ABSENT", {})
            )
        module.__dict__.update(EXTRA.get(module.__name__, {}))

    def find_distributions(self, context: DistributionFinder.Context | None = None) -> Iterator[Distribution]:
        if context is None or (context.name or "natten").lower() == "natten":
            yield _Distribution()


class _Distribution(Distribution):
    def read_text(self, filename: str) -> str | None:
        return metadata().get(filename)

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parent / path


_FINDER = _Finder()
_replaced: dict[str, ModuleType] = {}


def natten_version() -> str:
    """What ``natten.__version__`` says: the NATTEN that is followed, and who stands in for it.

    Example:
        >>> natten_version().startswith("0.21.7+nearsight.")
        True
    """
    return f"{NATTEN_VERSION}+nearsight.{version('nearsight')}"


def metadata() -> dict[str, str]:
    """The files that pip writes of a package, as far as someone asks them."""
    told = f"Metadata-Version: 2.1\nName: natten\nVersion: {natten_version()}\n"
    return {"METADATA": told, "top_level.txt": "natten\n"}


def install(force: bool = False, *, rel_pos_bias: bool = False) -> None:
    """From here on ``import natten`` gives nearsight's stand-in. Call it before whatever imports natten.

    A second call changes nothing but ``rel_pos_bias``.

    Args:
        force: also where a natten is installed, or imported already.
        rel_pos_bias: whether the modules have a relative positional bias where a client does not say. In NATTEN 0.14 to
            0.16 they had, from 0.17 on they have not.

    Raises:
        OptionError: there is a natten, and ``force`` is not set.

    Example:
        >>> install()
        >>> from natten.functional import na2d
        >>> na2d(*torch.randn(3, 1, 9, 9, 4, 8), kernel_size=3).shape
        torch.Size([1, 9, 9, 4, 8])
        >>> uninstall()
    """
    from .context import NattenContext

    if _FINDER not in sys.meta_path:
        if not force:
            _refuse_to_hide()
        _replaced.update(_take_out())
        sys.meta_path.insert(0, _FINDER)
        import_module("natten")
    NattenContext.rel_pos_bias = rel_pos_bias


def uninstall() -> None:
    """Undo :func:`install`. What was imported from the stand-in stays as it is, wherever it was imported."""
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
        _take_out()
        sys.modules.update(_replaced)
        _replaced.clear()


def _take_out() -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.split(".")[0] == "natten"]
    return {name: sys.modules.pop(name) for name in names}


def _refuse_to_hide() -> None:
    if "natten" in sys.modules or find_spec("natten") is not None:
        try:
            which = f"natten {version('natten')} is installed"
        except PackageNotFoundError:
            which = "there is a module named natten"
        raise OptionError(
            f"{which}, and nearsight does not hide it unasked: uninstall it, or call install(force=True) before anything "
            "imports natten"
        )
