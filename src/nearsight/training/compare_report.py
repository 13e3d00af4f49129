# SPDX-License-Identifier: Apache-2.0
"""What a comparison leaves: its table, its plots with their numbers, and one page that shows both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

from ..bench.timing import setting
from ..inspect import draw
from ..inspect.pages import render
from ..inspect.plots import Chart, Series
from ..inspect.plots import draw as draw_charts
from ..inspect.table import write_csv
from .data import Pictures
from .files import make_inner_folder, write_plot, write_text
from .measures import Measures
from .recipe import Recipe
from .report import Picture

TABLE_FILE, RUNS_FILE, PAGE_FILE, PLOTS = "table.csv", "runs.csv", "compare.html", "plots"

Key = tuple[str, int]  # model and seed
Epochs = Sequence[Mapping[str, float]]  # rows of a run's metrics.csv


class Spread(NamedTuple):
    """Mean over the seeds, and the standard deviation with n - 1 in it; of one seed there is none."""

    mean: float
    sd: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(fmean(values), stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class Row:
    """A model, over all seeds: means, of what :mod:`.measures` defines for a run.

    seconds_per_epoch: of the median epoch of each run. seconds: of all epochs. seconds_to_target: see
    :func:`seconds_to`; None if a seed does not reach it.
    """

    group: str
    model: str
    seeds: int
    accuracy: Spread
    parameters: int
    flops: int
    train_images_per_second: float
    inference_images_per_second: float
    peak_memory: float
    equivariance_error: Spread
    seconds_per_epoch: float
    seconds: float
    seconds_to_target: float | None


@dataclass(frozen=True)
class Table:
    """All rows, what they were made from, and the accuracy whose time was taken."""

    rows: list[Row]
    measures: Mapping[Key, Measures]
    epochs: Mapping[Key, Epochs]
    target: float

    @classmethod
    def of(
        cls,
        groups: Mapping[str, Sequence[str]],
        measures: Mapping[Key, Measures],
        epochs: Mapping[Key, Epochs],
        target: float | None = None,
    ) -> Table:
        """Put runs together; ``target`` None takes :func:`common_accuracy`."""
        target = common_accuracy(list(epochs.values())) if target is None else target
        rows = []
        for group, models in groups.items():
            for model in models:
                keys = [key for key in measures if key[0] == model]
                times = [seconds_to(target, epochs[key], measures[key].seconds) for key in keys]
                rows.append(_row(group, model, [measures[key] for key in keys], times))
        return cls(rows, measures, epochs, target)

    def of_model(self, model: str) -> list[Epochs]:
        """The epochs of a model's runs."""
        return [rows for key, rows in self.epochs.items() if key[0] == model]

    def to_csv(self) -> str:
        """One line per row, a standard deviation beside its mean; what there is not is empty."""
        lines = []
        for row in self.rows:
            line: dict[str, Any] = {}
            for name, value in ((field.name, getattr(row, field.name)) for field in fields(row)):
                line |= {name: value.mean, f"{name}_sd": value.sd} if isinstance(value, Spread) else {name: value}
            lines.append({**line, "target": self.target})
        return _csv(lines)

    def runs_to_csv(self) -> str:
        """One line per run."""
        return _csv([{**asdict(one), "seconds": sum(one.seconds)} for one in self.measures.values()])


def common_accuracy(runs: Sequence[Epochs]) -> float:
    """The highest validation accuracy that every run reached, rounded down to a tenth of a percent."""
    return math.floor(1000 * min(max(row["val_accuracy"] for row in rows) for rows in runs)) / 1000


def seconds_to(target: float, rows: Epochs, seconds: Sequence[float]) -> float | None:
    """Wall-clock until the end of the first epoch with a validation accuracy of at least ``target``; None without one."""
    times = accumulate(seconds)
    return next((time for row, time in zip(rows, times, strict=True) if row["val_accuracy"] >= target), None)


def _row(group: str, model: str, runs: Sequence[Measures], times: Sequence[float | None]) -> Row:
    reached = [time for time in times if time is not None]
    return Row(
        group=group,
        model=model,
        seeds=len(runs),
        accuracy=Spread.of([run.accuracy for run in runs]),
        parameters=runs[0].parameters,
        flops=runs[0].flops,
        train_images_per_second=fmean(run.train_images_per_second for run in runs),
        inference_images_per_second=fmean(run.inference_images_per_second for run in runs),
        peak_memory=fmean(run.peak_memory for run in runs),
        equivariance_error=Spread.of([run.equivariance_error for run in runs]),
        seconds_per_epoch=fmean(median(run.seconds) for run in runs),
        seconds=fmean(sum(run.seconds) for run in runs),
        seconds_to_target=fmean(reached) if len(reached) == len(times) else None,
    )


# --------------------------------------------------------------------------------------------------------- the output


def write_comparison(output: Path, table: Table, recipe: Recipe, pictures: Pictures) -> None:
    """Write the table, the plots and the page, and show the table."""
    write_text(output / TABLE_FILE, table.to_csv())
    write_text(output / RUNS_FILE, table.runs_to_csv())
    make_inner_folder(output / PLOTS)
    shown = []
    for name, (chart, caption) in charts(table).items():
        figure = draw_charts([chart], legend_below=True)
        write_plot(output / PLOTS / name, figure, chart.to_csv())
        shown.append(Picture(draw.to_svg(figure, _described(chart, caption)), caption, chart.to_csv()))
    write_text(output / PAGE_FILE, _page(table, shown, recipe, pictures))
    _show(table)
    print(f"table    {output / TABLE_FILE}\npage     {output / PAGE_FILE}")


def columns(target: float) -> dict[str, Callable[[Row], str]]:
    """Headings of the table for readers, and what stands under them."""
    return {
        "test accuracy, %": lambda row: _plus_minus(row.accuracy, 100, "{:.2f}"),
        "parameters": lambda row: f"{row.parameters:,}",
        "MFLOP": lambda row: f"{row.flops / 1e6:,.1f}",
        "training, images/s": lambda row: f"{row.train_images_per_second:,.0f}",
        "inference, images/s": lambda row: f"{row.inference_images_per_second:,.0f}",
        "memory, MB": lambda row: f"{row.peak_memory / 1e6:,.0f}",
        "equivariance error": lambda row: _plus_minus(row.equivariance_error, 1, "{:.3f}"),
        "s per epoch": lambda row: f"{row.seconds_per_epoch:,.1f}",
        f"s to {target:.1%}": lambda row: "-" if row.seconds_to_target is None else f"{row.seconds_to_target:,.0f}",
    }


def charts(table: Table) -> dict[str, tuple[Chart, str]]:
    """File name -> what is drawn, and the sentence under it. A panel per group of models."""
    bars = "Bars: one standard deviation over the seeds."
    bands = "Mean over the seeds, and one standard deviation to either side."
    against = {
        "accuracy_parameters": ("parameters, millions", lambda row: row.parameters / 1e6),
        "accuracy_flops": ("MFLOP per image", lambda row: row.flops / 1e6),
        "accuracy_seconds": ("wall-clock of the whole training, s", lambda row: row.seconds),
    }
    found = {
        name: (_scatter(table, x, of), f"Test accuracy against {x.split(',')[0]}. {bars}")
        for name, (x, of) in against.items()
    }
    accuracy = _curves(table, "val_accuracy", "validation accuracy, %", 100)
    loss = _curves(table, "train_loss", "training loss", 1)
    return {
        **found,
        "validation_accuracy": (accuracy, f"Learning curves: accuracy on the validation split. {bands}"),
        "training_loss": (loss, f"Learning curves: training loss. {bands}"),
    }


def _scatter(table: Table, x: str, of: Callable[[Row], float]) -> Chart:
    panels: dict[str, list[Series]] = {}
    for row in table.rows:
        sd = None if row.accuracy.sd is None else [100 * row.accuracy.sd]
        panels.setdefault(row.group, []).append(Series(row.model, [of(row)], [100 * row.accuracy.mean], sd))
    return Chart(x, "test accuracy, %", panels)


def _curves(table: Table, what: str, y: str, unit: float) -> Chart:
    panels: dict[str, list[Series]] = {}
    for row in table.rows:
        runs = table.of_model(row.model)
        spreads = [Spread.of([unit * epoch[what] for epoch in epochs]) for epochs in zip(*runs, strict=True)]
        sd = None if row.seeds == 1 else [spread.sd or 0.0 for spread in spreads]
        epochs = [epoch["epoch"] for epoch in runs[0]]
        panels.setdefault(row.group, []).append(Series(row.model, epochs, [spread.mean for spread in spreads], sd))
    return Chart("epoch", y, panels)


def _described(chart: Chart, caption: str) -> str:
    """For those who cannot see the picture: the last point of every series."""
    points = []
    for title, series in chart.panels.items():
        group = f"{title}, " if title else ""
        points += [f"{group}{one.label}: {chart.x} {one.x[-1]:.4g}, {chart.y} {one.y[-1]:.4g}" for one in series]
    return f"{caption} {'; '.join(points)}."


def _page(table: Table, pictures: Sequence[Picture], recipe: Recipe, data: Pictures) -> str:
    groups: dict[str, list[Row]] = {}
    for row in table.rows:
        groups.setdefault(row.group, []).append(row)
    return render(
        "nearsight.training",
        "compare.html.jinja",
        version=version("nearsight"),
        recipe=recipe,
        config="\n".join(f"{name}: {value}" for name, value in asdict(recipe).items() if value is not None),
        images={part: len(getattr(data, part)) for part in ("train", "validation", "test")},
        groups=groups,
        columns=columns(table.target),
        best=max(table.rows, key=lambda row: row.accuracy.mean),
        models=len({row.model for row in table.rows}),
        seeds=table.rows[0].seeds,
        target=table.target,
        runs=table.measures.values(),
        pictures=pictures,
        machine=setting(),
    )


def _show(table: Table) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Grid

    shown = columns(table.target)
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a file has no edge to break lines at
    for group in dict.fromkeys(row.group for row in table.rows):
        grid = Grid(title=group or None, title_justify="left", box=box.SIMPLE, pad_edge=False)
        grid.add_column("model", overflow="fold")
        for heading in shown:
            grid.add_column(heading, justify="right")
        for row in (row for row in table.rows if row.group == group):
            grid.add_row(escape(row.model), *(cell(row) for cell in shown.values()))
        console.print(grid)


def _plus_minus(spread: Spread, unit: float, form: str) -> str:
    mean = form.format(unit * spread.mean)
    return mean if spread.sd is None else f"{mean} ± {form.format(unit * spread.sd)}"


def _csv(lines: Sequence[Mapping[str, Any]]) -> str:
    return write_csv(list(lines[0]), [list(line.values()) for line in lines])
