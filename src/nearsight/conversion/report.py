# SPDX-License-Identifier: Apache-2.0
"""What a conversion did: a table for the terminal, a dict for programs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..pages.brief import html_table, text_table

if TYPE_CHECKING:
    from rich.console import RenderableType

CONVERTED, SKIPPED, ATTENTION = "converted", "skipped", "attention"
HEADINGS = ("layer", "was", "outcome", "parameters", "note")


@dataclass(frozen=True)
class LayerOutcome:
    """One layer.

    name                its name in the model
    layer               what it was, as ``Conv2d 64 -> 128, 3x3, stride 2``
    outcome             ``"converted"``, ``"skipped"``, or ``"attention"`` for what attends already
    note                why it was skipped, or what is worth knowing
    parameters_before, parameters_after
    """

    name: str
    layer: str
    outcome: str
    note: str
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True, repr=False)
class ConversionReport:
    """What :func:`nearsight.convert` returns. ``print(report)``, or with rich ``rich.print(report)``, shows it as a table.

    Attributes:
        init: ``"random"`` or ``"exact"``.
        rows: one per spatial convolution, attention layer, and layer that looks like a convolution and is none.
        options: ``nearsight.convert(another, **report.options)`` converts a model of the same kind in the same way.
        parameters_before, parameters_after: of the whole model.
        flops_before, flops_after: of one picture, two per multiply-add; None without ``input_size``.
        flops_with_content: once all gates of an exact conversion are open; None otherwise.
        error: the largest difference between the outputs before and after, relative to the largest output, in evaluation
            mode on one random picture; None without ``input_size`` or with ``init="random"``.
    """

    init: str
    rows: tuple[LayerOutcome, ...]
    options: dict[str, Any]
    parameters_before: int
    parameters_after: int
    flops_before: int | None = None
    flops_after: int | None = None
    flops_with_content: int | None = None
    error: float | None = None

    @property
    def converted(self) -> tuple[str, ...]:
        """The names of the layers that were converted."""
        return tuple(row.name for row in self.rows if row.outcome == CONVERTED)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON; a position that has no name is said by that of its factory."""
        options = {
            name: getattr(one, "__qualname__", str(one)) if callable(one) else one for name, one in self.options.items()
        }
        return {
            **asdict(self),
            "options": options,
            "rows": [asdict(row) for row in self.rows],
            "converted": list(self.converted),
        }

    def summary(self) -> list[str]:
        """What became of the model, in a few lines."""
        return list(self._summary())

    def _summary(self) -> Iterator[str]:
        counts = {kind: sum(row.outcome == kind for row in self.rows) for kind in (CONVERTED, SKIPPED, ATTENTION)}
        if counts[CONVERTED]:
            yield f"{counts[CONVERTED]} converted ({self.init}), {counts[SKIPPED]} skipped"
        elif counts[ATTENTION]:
            yield f"nothing to convert: {counts[ATTENTION]} layers attend already, {counts[SKIPPED]} skipped"
        else:
            yield f"nothing to convert: {counts[SKIPPED]} skipped"
        yield f"parameters: {self.parameters_before:,} before, {self.parameters_after:,} after"
        if self.flops_before is not None and self.flops_after is not None:
            grown = f", {self.flops_with_content:,} with all gates open" if self.flops_with_content else ""
            yield f"FLOPs: {self.flops_before:,} before, {self.flops_after:,} after{grown}"
        if self.error is not None:
            yield f"largest relative difference of the outputs: {self.error:.1e}"

    def __repr__(self) -> str:
        return f"ConversionReport({'; '.join(self._summary())})"

    def _repr_html_(self) -> str:
        return html_table([HEADINGS, *map(_cells, self.rows)], "; ".join(self._summary()))

    def __str__(self) -> str:
        return "\n".join([*text_table([HEADINGS, *map(_cells, self.rows)]), *self._summary()])

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.markup import escape
        from rich.table import Table

        table = Table(*HEADINGS)
        colours = {CONVERTED: "green", SKIPPED: "yellow", ATTENTION: "cyan"}
        for row in self.rows:
            name, layer, outcome, parameters, note = map(escape, _cells(row))
            table.add_row(name, layer, f"[{colours[row.outcome]}]{outcome}[/]", parameters, note)
        return Group(table, *map(escape, self._summary()))


def _cells(row: LayerOutcome) -> tuple[str, ...]:
    before, after = row.parameters_before, row.parameters_after
    parameters = f"{before:,}" if before == after else f"{before:,} -> {after:,}"
    return row.name, row.layer, row.outcome, parameters, row.note
