# SPDX-License-Identifier: Apache-2.0
"""What a comparison leaves: its table, its plots with their numbers, and one page that shows both."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from itertools import accumulate
from os import PathLike
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, NamedTuple

import numpy as np

from ..bench.timing import setting
from ..errors import DataError
from ..files import make_inner_folder, to_path, write_text
from ..pages.brief import html_table, short_table
from ..pages.charts import Chart, Series, draw_charts, write_plot
from ..pages.csv_json import write_csv
from ..pages.html import render
from ..pages.style import to_svg
from .data import Pictures
from .intervals import Interval, paired, wilson
from .measures import Measures
from .recipe import Recipe
from .report import Drawing, is_drawn

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
class ModelResult:
    """A model, over all seeds: means, of what :mod:`.measures` defines for a run.

    accuracy_low, accuracy_high: Wilson's interval of the mean, see :mod:`.intervals`. difference and its ends: of the
    accuracy from that of the first model of the table, on the same images and seeds; None for that model itself. Both are
    None where the runs' answers are not known.
    seconds_per_epoch: of the median epoch of each run. seconds: of all epochs. seconds_to_target: see
    :func:`seconds_to`; None if a seed does not reach it.
    """

    group: str
    model: str
    seeds: int
    size: int
    opt: str
    lr: float
    accuracy: Spread
    accuracy_low: float | None
    accuracy_high: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    parameters: int
    flops: int
    train_images_per_second: float
    inference_images_per_second: float
    peak_memory: float
    equivariance_error: Spread
    seconds_per_epoch: float
    seconds: float
    seconds_to_target: float | None


@dataclass(frozen=True, repr=False)
class Comparison:
    """All rows, what they were made from, and the accuracy whose time was taken."""

    rows: list[ModelResult]
    measures: Mapping[Key, Measures]
    epochs: Mapping[Key, Epochs]
    target: float

    def __repr__(self) -> str:
        return short_table(self._cells(most=5), verdict(self))

    def _repr_html_(self) -> str:
        return html_table(self._cells(), verdict(self))

    def _cells(self, most: int | None = None) -> list[list[str]]:
        """The table for readers, or the first of its columns."""
        shown = dict(list(columns(self).items())[:most])
        return [["model", *shown], *([row.model, *(cell(row) for cell in shown.values())] for row in self.rows)]

    @classmethod
    def of(
        cls,
        groups: Mapping[str, Sequence[str]],
        measures: Mapping[Key, Measures],
        epochs: Mapping[Key, Epochs],
        target: float | None = None,
    ) -> Comparison:
        """Put runs together; ``target`` None takes :func:`common_accuracy`."""
        target = common_accuracy(list(epochs.values())) if target is None else target
        first = next(model for models in groups.values() for model in models)
        rows = []
        for group, models in groups.items():
            for model in models:
                keys = [key for key in measures if key[0] == model]
                times = [seconds_to(target, epochs[key], measures[key].seconds) for key in keys]
                accuracy = _accuracy([measures[key] for key in keys])
                ahead = None if model == first else _difference(measures, model, first)
                rows.append(_row(group, model, [measures[key] for key in keys], times, accuracy, ahead))
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
        """One line per run; its difference is from the first model's run with the same seed."""
        return _csv(self.run_lines())

    def run_lines(self) -> list[dict[str, Any]]:
        """The values of :meth:`runs_to_csv`."""
        lines = []
        for one in self.measures.values():
            values = {name: value for name, value in asdict(one).items() if name != "answers"}
            ahead = None if one.model == self.first else _difference(self.measures, one.model, self.first, one.seed)
            against = {"difference": None if ahead is None else ahead.value, **_ends("difference", ahead)}
            lines.append({**values, "seconds": sum(one.seconds), **_ends("accuracy", _accuracy([one])), **against})
        return lines

    @property
    def first(self) -> str:
        """The model that the others are held against."""
        return self.rows[0].model

    @property
    def undecided(self) -> list[str]:
        """Models whose accuracy may be as high as that of the most accurate one, or higher; empty if that is ahead of all.

        That the interval of a difference leaves out zero is asked of every other model, so that the more there are, the
        harder it is to be ahead.
        """
        best = self.best.model
        others = [model for model in dict.fromkeys(row.model for row in self.rows) if model != best]
        found = {model: _difference(self.measures, best, model) for model in others}
        return [model for model, ahead in found.items() if ahead is None or ahead.spans_zero]

    @property
    def best(self) -> ModelResult:
        """The row with the highest mean, which luck alone may have put there."""
        return max(self.rows, key=lambda row: row.accuracy.mean)


def common_accuracy(runs: Sequence[Epochs]) -> float:
    """The highest validation accuracy that every run reached, rounded down to a tenth of a percent."""
    return math.floor(1000 * min(max(row["val_accuracy"] for row in rows) for rows in runs)) / 1000


def seconds_to(target: float, rows: Epochs, seconds: Sequence[float]) -> float | None:
    """Wall-clock until the end of the first epoch with a validation accuracy of at least ``target``; None without one."""
    times = accumulate(seconds)
    return next((time for row, time in zip(rows, times, strict=True) if row["val_accuracy"] >= target), None)


def _row(
    group: str,
    model: str,
    runs: Sequence[Measures],
    times: Sequence[float | None],
    accuracy: Interval | None,
    ahead: Interval | None,
) -> ModelResult:
    reached = [time for time in times if time is not None]
    return ModelResult(
        group=group,
        model=model,
        seeds=len(runs),
        size=runs[0].size,
        opt=runs[0].opt,
        lr=runs[0].lr,
        accuracy=Spread.of([run.accuracy for run in runs]),
        **_ends("accuracy", accuracy),
        difference=None if ahead is None else ahead.value,
        **_ends("difference", ahead),
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


def _ends(name: str, interval: Interval | None) -> dict[str, Any]:
    low, high = (None, None) if interval is None else (interval.low, interval.high)
    return {f"{name}_low": low, f"{name}_high": high}


def _accuracy(runs: Sequence[Measures]) -> Interval | None:
    """Of the mean of a model's runs."""
    images = [len(run.answers) - run.answers.count("-") for run in runs]
    return wilson(fmean(run.accuracy for run in runs), min(images)) if all(images) else None


def _difference(measures: Mapping[Key, Measures], model: str, other: str, seed: int | None = None) -> Interval | None:
    """How far ``model`` is ahead of ``other``, with one seed or with all that both have.

    Raises:
        DataError: they were measured on other images.
    """
    seeds = [s for name, s in measures if name == model and (other, s) in measures and seed in (None, s)]
    answers = [[measures[name, s].answers for s in seeds] for name in (model, other)]
    lengths = {len(one) for both in answers for one in both}
    if len(lengths) > 1:
        raise DataError(
            f"{model} and {other} were measured on {' and '.join(map(str, sorted(lengths)))} test images: delete the "
            f"measures.json of their runs, and they are measured again"
        )
    if not seeds or lengths == {0}:
        return None
    said = [np.array([list(one) for one in both]) for both in answers]
    read = np.all([(one != "-").all(0) for one in said], axis=0)
    first, second = (one[:, read] == "1" for one in said)
    return paired(first, second)


# --------------------------------------------------------------------------------------------------------- the output


def write_comparison(output: str | PathLike[str], table: Comparison, recipe: Recipe, pictures: Pictures) -> None:
    """Write and show the table, then the plots and the page; a line tells if these cannot be drawn."""
    output = to_path(output)
    write_text(output / TABLE_FILE, table.to_csv())
    write_text(output / RUNS_FILE, table.runs_to_csv())
    _show(table)
    print(f"table    {output / TABLE_FILE}", flush=True)
    if is_drawn(output / PAGE_FILE, lambda: _draw(output, table, recipe, pictures)):
        print(f"page     {output / PAGE_FILE}")


def _draw(output: Path, table: Comparison, recipe: Recipe, pictures: Pictures) -> None:
    make_inner_folder(output / PLOTS)
    shown = []
    for name, (chart, caption) in charts(table).items():
        figure = draw_charts([chart], legend_below=True)
        write_plot(output / PLOTS / name, figure, chart.to_csv())
        shown.append(Drawing(to_svg(figure, _described(chart, caption)), caption, chart.to_csv()))
    write_text(output / PAGE_FILE, _page(table, shown, recipe, pictures))


def columns(table: Comparison) -> dict[str, Callable[[ModelResult], str]]:
    """Headings of the table for readers, and what stands under them."""
    return {
        "image": lambda row: f"{row.size}x{row.size}",
        "optimiser": lambda row: f"{row.opt}, lr {row.lr:g}",
        "test accuracy, %": lambda row: _plus_minus(row.accuracy, 100, "{:.2f}"),
        "95 % interval": lambda row: _between(row.accuracy_low, row.accuracy_high, "{:.2f}"),
        "points from the first": lambda row: _points(row.difference, row.difference_low, row.difference_high),
        "parameters": lambda row: f"{row.parameters:,}",
        "MFLOP": lambda row: f"{row.flops / 1e6:,.1f}",
        "training, images/s": lambda row: f"{row.train_images_per_second:,.0f}",
        "inference, images/s": lambda row: f"{row.inference_images_per_second:,.0f}",
        "memory, MB": lambda row: f"{row.peak_memory / 1e6:,.0f}",
        "equivariance error": lambda row: _plus_minus(row.equivariance_error, 1, "{:.3f}"),
        "s per epoch": lambda row: f"{row.seconds_per_epoch:,.1f}",
        f"s to {table.target:.1%}": lambda row: (
            "-" if row.seconds_to_target is None else f"{row.seconds_to_target:,.0f}"
        ),
    }


def charts(table: Comparison) -> dict[str, tuple[Chart, str]]:
    """File name -> what is drawn, and the sentence under it. A panel per group of models."""
    several = table.rows[0].seeds > 1
    bars = "Bars: one standard deviation over the seeds." if several else "One seed: others would lie elsewhere."
    bands = "Mean over the seeds, and one standard deviation to either side." if several else "One seed."
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


def _scatter(table: Comparison, x: str, of: Callable[[ModelResult], float]) -> Chart:
    panels: dict[str, list[Series]] = {}
    for row in table.rows:
        sd = None if row.accuracy.sd is None else [100 * row.accuracy.sd]
        panels.setdefault(row.group, []).append(Series(row.model, [of(row)], [100 * row.accuracy.mean], sd))
    return Chart(x, "test accuracy, %", panels)


def _curves(table: Comparison, what: str, y: str, unit: float) -> Chart:
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


def _page(table: Comparison, pictures: Sequence[Drawing], recipe: Recipe, data: Pictures) -> str:
    groups: dict[str, list[ModelResult]] = {}
    for row in table.rows:
        groups.setdefault(row.group, []).append(row)
    return render(
        "compare.html.jinja",
        version=version("nearsight"),
        recipe=recipe,
        config="\n".join(f"{name}: {value}" for name, value in asdict(recipe).items() if value is not None),
        images={part: len(getattr(data, part)) for part in ("train", "validation", "test")},
        groups=groups,
        columns=columns(table),
        best=table.best,
        undecided=table.undecided,
        first=table.first,
        sizes=sorted({row.size for row in table.rows}),
        own=any(row.lr != recipe.lr or row.opt != recipe.opt for row in table.rows),
        models=len({row.model for row in table.rows}),
        seeds=table.rows[0].seeds,
        target=table.target,
        verdict=verdict(table),
        runs=table.run_lines(),
        between=_between,
        points=_points,
        pictures=pictures,
        machine=setting(),
    )


def _show(table: Comparison) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as Grid

    shown = columns(table)
    console = Console()
    if not console.is_terminal:
        console.width = 240  # a file has no edge to break lines at
    for group in dict.fromkeys(row.group for row in table.rows):
        grid = Grid(title=group or None, title_justify="left", box=box.SIMPLE, pad_edge=False)
        grid.add_column("model", overflow="fold")
        for heading in shown:
            grid.add_column(heading, justify="right")
        for row in (row for row in table.rows if row.group == group):
            grid.add_row(escape(row.model), *(cell(row) for cell in shown.values()))
        console.print(grid)
    print(verdict(table))


def verdict(table: Comparison) -> str:
    """Which model is ahead of all others, or that none is known to be."""
    best, undecided = table.best, table.undecided
    if len({row.model for row in table.rows}) == 1:
        return f"{best.model}: {best.accuracy.mean:.2%}"
    if undecided:
        return (
            f"no model is known to be ahead: {best.model} has the highest test accuracy ({best.accuracy.mean:.2%}), but the "
            f"interval of its difference from {', '.join(undecided)} spans zero"
        )
    seeds = "" if best.seeds > 1 else " with this one seed, which says nothing about other seeds"
    return f"{best.model} is ahead of all others ({best.accuracy.mean:.2%}){seeds}"


def _between(low: float | None, high: float | None, form: str) -> str:
    return "-" if low is None or high is None else f"{form.format(100 * low)} to {form.format(100 * high)}"


def _points(difference: float | None, low: float | None, high: float | None) -> str:
    return "-" if difference is None else f"{100 * difference:+.2f} ({_between(low, high, '{:+.2f}')})"


def _plus_minus(spread: Spread, unit: float, form: str) -> str:
    mean = form.format(unit * spread.mean)
    return mean if spread.sd is None else f"{mean} ± {form.format(unit * spread.sd)}"


def _csv(lines: Sequence[Mapping[str, Any]]) -> str:
    return write_csv(list(lines[0]), [list(line.values()) for line in lines])
