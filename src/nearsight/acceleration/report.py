# SPDX-License-Identifier: Apache-2.0
"""What became of the attention of a model, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from ..pages.brief import html_table, text_table

ACCELERATED, ALREADY, LEFT = "accelerated", "accelerated before", "left alone"
HEADINGS = ("layer", "class", "outcome", "note")


@dataclass(frozen=True)
class Outcome:
    """One module.

    name        its name in the model
    kind        its class, as its makers call it
    outcome     ``"accelerated"``, ``"left alone"``, or ``"accelerated before"`` for what another call changed
    note        what is done in place of what, or why it was left alone
    """

    name: str
    kind: str
    outcome: str
    note: str


@dataclass(frozen=True, repr=False)
class AccelerationReport:
    """What :func:`nearsight.accelerate` returns. ``print(report)`` shows it as a table.

    rows        one per attention module that is known
    folded      the names of the batch norms that became part of a convolution, with ``inference=True``
    unfolded    why torch.fx could not follow the model, so that none did
    """

    rows: tuple[Outcome, ...]
    folded: tuple[str, ...]
    unfolded: str | None
    _originals: list[tuple[nn.Module, type, type]] = field(repr=False)
    _unfold: list[Callable[[], None]] = field(repr=False)

    @property
    def accelerated(self) -> tuple[str, ...]:
        """The names of the modules that were changed."""
        return tuple(row.name for row in self.rows if row.outcome == ACCELERATED)

    def restore(self) -> None:
        """Give every module the forward of its makers back, and the model its norms; weights stay what they are by now."""
        while self._unfold:
            self._unfold.pop()()
        while self._originals:
            module, original, stand_in = self._originals.pop()
            if type(module) is stand_in:  # and nothing that was made of it since
                module.__class__ = original

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        facts = {"folded": list(self.folded), "unfolded": self.unfolded}
        return {"rows": [asdict(row) for row in self.rows], "accelerated": list(self.accelerated), **facts}

    def summary(self) -> list[str]:
        """What became of the model, in a line or two."""
        return list(self._summary())

    def _summary(self) -> Iterator[str]:
        left = sum(row.outcome == LEFT for row in self.rows)
        if not self.rows:
            yield "nothing to accelerate: no attention that is known"
        elif not self.accelerated:
            yield f"nothing accelerated: {left} left alone, {len(self.rows) - left} accelerated before"
        else:
            yield f"{len(self.accelerated)} accelerated, {left} left alone"
        if self.folded:
            yield f"{len(self.folded)} batch norms folded into convolutions"
        if self.unfolded is not None:
            yield f"no batch norm folded: torch.fx cannot follow the model: {self.unfolded}"

    def __repr__(self) -> str:
        return f"AccelerationReport({'; '.join(self._summary())})"

    def _repr_html_(self) -> str:
        return html_table(self._cells(), "; ".join(self._summary()))

    def __str__(self) -> str:
        return "\n".join([*text_table(self._cells()), *self._summary()])

    def _cells(self) -> list[tuple[str, ...]]:
        return [HEADINGS, *((row.name, row.kind, row.outcome, row.note) for row in self.rows)]
