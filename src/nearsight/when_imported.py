# SPDX-License-Identifier: Apache-2.0
"""What is to be done once another package is there, without importing it now."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # these would be a third of what `nearsight --help` loads
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


def when_imported(name: str, act: Callable[[], object]) -> None:
    """Call ``act`` as soon as the module ``name`` has been imported: now, if it has been already.

    Until then a finder waits in ``sys.meta_path``; afterwards nothing of it is left, there or on the module.

    Example:
        >>> when_imported("math", lambda: print("now"))
        now
    """
    if name in sys.modules:
        act()
    else:
        sys.meta_path.insert(0, _Waiting(name, act))


class _Waiting:
    """Has a module found by the other finders, and notices when it has been executed."""

    def __init__(self, name: str, act: Callable[[], object]) -> None:
        self.name, self.act = name, act
        self.asks_others = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name or self.asks_others:
            return None
        self.asks_others = True
        try:
            found = (finder.find_spec(fullname, path, target) for finder in sys.meta_path)
            spec = next((one for one in found if one is not None), None)
        finally:
            self.asks_others = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Noticing(spec.loader, self)  # pyright: ignore[reportAttributeAccessIssue]
        return spec

    def done(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            self.act()


class _Noticing:
    """The loader that was found, but that it says when it is done."""

    def __init__(self, loader: Any, waiting: _Waiting) -> None:
        self.loader, self.waiting = loader, waiting

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader  # nobody sees that another was here
        self.loader.exec_module(module)
        self.waiting.done()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)
