# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of speed.md, beside it, and the README's, from what `nearsight bench` measured:
`python docs/results/speed.py`.

docs/results/measured/MACHINE/ holds what `nearsight bench layers|models|core --json FILE` and `python bench/unfold.py --json
FILE` left, as layers.json, models.json, core.json and unfold.json. A table without such a file is left as it stands.
tests/test_results.py holds the pages to what this writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MEASURED = HERE / "measured"
PAGES = (HERE / "speed.md", HERE.parents[1] / "README.md")
# The folders of MEASURED, in the order in which they are shown; the README has the first that is there.
MACHINES = {
    "zen4": "an AMD EPYC (Zen 4, AVX-512)",
    "emerald-rapids": "an Intel Xeon (Emerald Rapids, AVX-512)",
    "ice-lake": "an Intel Xeon (Ice Lake, AVX-512)",
    "zen3": "an AMD EPYC (Zen 3, AVX2)",
}
MARKED = re.compile(
    r"(<!-- (\w+): from here on written by docs/results/speed\.py -->\n)(.*?)(<!-- up to here -->)", re.DOTALL
)
PASSES = ("forward", "forward+backward")
TIMES = "\N{MULTIPLICATION SIGN}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    head = list(head)
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    yield from ("| " + " | ".join(row) + " |" for row in rows)
    yield ""


def threads(run: dict[str, Any]) -> str:
    return "1 thread" if run["threads"] == 1 else f"{run['threads']} threads"


def found_on(machine: str, facts: dict[str, Any], command: str) -> Iterator[str]:
    """The line above a table."""
    yield f"On {MACHINES[machine]}, PyTorch {facts['torch'].partition('+')[0]}; `{command}`:"
    yield ""


# -------------------------------------------------------------------------------------------------------- nearsight bench


def layers(machine: str, report: dict[str, Any]) -> Iterator[str]:
    """How many times faster than the convolution, of the medians, as the command prints it."""
    yield from found_on(machine, report["runs"][0], "nearsight bench layers")
    head = [f"{pass_}, {threads(run)}" for run in report["runs"] for pass_ in ("forward", "with backward")]
    rows = {
        stage: [ratio for run in report["runs"] for ratio in faster(run)[stage]] for stage in faster(report["runs"][0])
    }
    yield from table(["width @ map", *head], ([stage, *ratios] for stage, ratios in rows.items()))


def faster(run: dict[str, Any]) -> dict[str, list[str]]:
    """Stage -> the forward's ratio and that of both passes."""
    found: dict[str, list[str]] = {}
    for row in run["rows"]:
        if "attention" in row:
            ratio = row["convolution"]["median_ms"] / row["attention"]["median_ms"]
            found.setdefault(stage_name(row["stage"]), []).append(f"{ratio:.2f}")
    return found


def stage_name(stage: str) -> str:
    """Channels and cells per axis, or the sum of all layers of the network."""
    channels, _, size = stage.partition("@")
    return f"{channels} @ {size}{TIMES}{size}" if size else "ResNet-50's sixteen"


def readme(machine: str, report: dict[str, Any]) -> Iterator[str]:
    """The layers on one thread, across."""
    stages = faster(next(run for run in report["runs"] if run["threads"] == 1))
    yield f"On one thread of {MACHINES[machine]} (`nearsight bench layers`):"
    yield ""
    rows = [
        [name, *(ratios[number] for ratios in stages.values())]
        for number, name in enumerate(("forward", "with backward"))
    ]
    yield from table(["width @ map", *stages], rows)


def models(machine: str, report: dict[str, Any]) -> Iterator[str]:
    """How many times as fast as the yardstick: the median of the rounds' ratios; and the memory of training beside its."""
    for run in report["runs"]:
        yield from found_on(machine, run, f"nearsight bench models --threads {run['threads']}")
        pairs: dict[str, dict[str, str]] = {}
        for row in run["rows"]:
            # Who does not run in a host has no names there: the pair is the one of the rows before.
            pair = (
                f"`{row['network']['name']}` against `{row['yardstick']['name']}`" if "network" in row else [*pairs][-1]
            )
            way = "training" if row["mode"] == "training" else f"{row['host']}, {row['dtype']}"
            cells = pairs.setdefault(pair, {})
            cells[way] = f"{row['faster']:.2f}" if "faster" in row else "-"
            if row["mode"] == "training":
                cells["training memory"] = f"{row['network']['peak_memory'] / row['yardstick']['peak_memory']:.2f}"
        ways = list(dict.fromkeys(way for cells in pairs.values() for way in cells))
        yield from table(["", *ways], ([pair, *(cells.get(way, "-") for way in ways)] for pair, cells in pairs.items()))


def core(machine: str, report: dict[str, Any]) -> Iterator[str]:
    """Milliseconds, and how many times the least time that the machine could take."""
    for run in report["runs"]:
        yield from found_on(machine, run, f"nearsight bench core --threads {run['threads']}")
        shapes: dict[str, dict[str, str]] = {}
        for row in run["rows"]:
            if "gap" in row and row["name"] in ("native", "blocked"):
                shape = f"{row['batch']} {TIMES} {row['heads']} {TIMES} {row['head_dim']}, {row['size']}{TIMES}{row['size']}"
                cell = f"{row['median_ms']:.2f}" + (f" ({row['gap']:.1f})" if row["name"] == "native" else "")
                shapes.setdefault(shape, {})[f"`{row['name']}`, {row['pass']}"] = cell
        ways = list(dict.fromkeys(way for cells in shapes.values() for way in cells))
        head = [f"batch {TIMES} heads {TIMES} head_dim, map", *ways]
        yield from table(head, ([shape, *(cells.get(way, "-") for way in ways)] for shape, cells in shapes.items()))


def unfold(machine: str, report: dict[str, Any]) -> Iterator[str]:
    """Against the textbook: times, and what a call adds to the memory of a fresh process."""
    yield from found_on(machine, report, f"python bench/unfold.py --threads {report['setting']['threads']}")
    rows = {(row["pass"], row["name"]): row for row in report["rows"]}
    names = list(dict.fromkeys(name for _, name in rows))
    head = ["", *(f"`{name}`" for name in names), *(f"`{name}`, extra memory" for name in names)]
    lines = []
    for pass_ in PASSES:
        of = [rows[pass_, name] for name in names]
        times = [f"{row['median_ms']:.1f} ms" + ratio(row["times_faster"]) for row in of]
        lines.append([pass_, *times, *(f"{row['extra_mib']:.0f} MiB" for row in of)])
    yield from table(head, lines)


def ratio(times: float) -> str:
    return "" if times == 1 else f", {times:.0f}{TIMES}"


# ------------------------------------------------------------------------------------------------------------------ pages

Written = Callable[[str, dict[str, Any]], Iterator[str]]
SECTIONS: dict[str, tuple[str, Written]] = {  # mark -> the bench whose file it is made from
    "layers": ("layers", layers),
    "models": ("models", models),
    "core": ("core", core),
    "unfold": ("unfold", unfold),
    "readme": ("layers", readme),
}


def reports(bench: str, measured: Path = MEASURED) -> list[tuple[str, dict[str, Any]]]:
    """What was measured, by machine."""
    unknown = {folder.name for folder in measured.iterdir() if folder.is_dir()} - set(MACHINES)
    assert not unknown, f"{measured} has {unknown}: name the machine in MACHINES"
    files = {machine: measured / machine / f"{bench}.json" for machine in MACHINES}
    found = [
        (machine, json.loads(file.read_text(encoding="utf-8"))) for machine, file in files.items() if file.exists()
    ]
    assert not any(report.get("quick") for _, report in found), (
        "a file of --quick is to see that it works, not to quote"
    )
    return found


def section(mark: str, found: Sequence[tuple[str, dict[str, Any]]]) -> str:
    _, written = SECTIONS[mark]
    shown = found[:1] if mark == "readme" else found
    return "\n" + "\n".join(line for machine, report in shown for line in written(machine, report)) + "\n"


def page(text: str, measured: Path = MEASURED) -> str:
    """The page with its tables; those of which no file is there as they are."""

    def filled(marked: re.Match[str]) -> str:
        found = reports(SECTIONS[marked[2]][0], measured)
        return marked[1] + (section(marked[2], found) if found else marked[3]) + marked[4]

    return MARKED.sub(filled, text)


if __name__ == "__main__":
    for file in PAGES:
        file.write_text(page(file.read_text(encoding="utf-8")), encoding="utf-8")
