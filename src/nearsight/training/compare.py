# SPDX-License-Identifier: Apache-2.0
"""Comparing models: every one of them trained with every seed by one recipe, and what came of it in one table.

    OUTPUT/compare.yaml        the recipe; also for ``nearsight compare --config``
    OUTPUT/runs/MODEL-seedN/   a run as ``nearsight train`` leaves it, and measures.json
    OUTPUT/table.csv           one row per model; runs.csv: one per run
    OUTPUT/plots/              every plot as PNG, SVG and CSV
    OUTPUT/compare.html        all of it on one page

Every run is a process of its own, so that its memory is its own and it can train on several devices. What is finished is not
done again: a comparison that was stopped at any moment goes on where it stopped, and models and seeds can be added to one.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from os import PathLike
from pathlib import Path

from .. import own_code
from ..errors import OptionError, TrainingError
from ..files import make_folder, make_inner_folder, to_path, write_text
from ..models import input_size
from ..saved.weights import CHECKPOINT_FILE, Blueprint
from .compare_report import Comparison, write_comparison
from .data import Pictures, check_trainable, load_pictures
from .measures import MEASURES_FILE, Measures, measure, read_measures, read_rows
from .recipe import OWN_SIZE, PER_RUN, Recipe, noted_imports, read_recipe
from .report import REPORT_FILE
from .train import MOVABLE, image_size

RECIPE_FILE = "compare.yaml"
COMMAND = Path(__file__).parents[1] / "start" / "nearsight_command.py"  # which says why it is not `python -m nearsight`


class Stopped(TrainingError):
    """The user stopped the comparison; the same command goes on."""


def compare(
    groups: Mapping[str, Sequence[str]],
    recipe: Recipe,
    seeds: int,
    output: str | PathLike[str],
    *,
    target: float | None = None,
    download: bool = False,
) -> Comparison:
    """Train every model with every seed, measure them, and write table, plots and page.

    Args:
        groups: name -> models that belong together in table and plots; a model may be in several. One group may be "".
        recipe: of every run; its model and seed are not used. A size of None takes the largest of the models' sizes for
            all, ``"own"`` each model's. What a model's string sets of :data:`.recipe.PER_MODEL` is that model's alone.
        seeds: how many; they are 0, 1, 2 ...
        output: the comparison's folder. Runs that are in it already are not trained again.
        target: the validation accuracy whose time is taken; None takes the highest that every run reached.
        download: fetch data that is missing.

    Raises:
        OptionError: no models, one twice in a group, seeds below 1, a target outside 0 to 1, other settings than those of
            the comparison in the folder, or what :func:`nearsight.training.train.train` refuses.
        DataError: data or a file in the folder that cannot be read.
        TrainingError: a run failed, or the folder is in use or cannot be written to.
        Stopped: by the user.

    Example:
        >>> table = compare({"": ["sasa_nano", "conv_nano"]}, Recipe(epochs=1), 1, Path("/tmp/compared"))
        >>> [row.model for row in table.rows]
        ['sasa_nano', 'conv_nano']
    """
    _check(groups, seeds, target)
    output = to_path(output)
    pictures = load_pictures(recipe.data, recipe.data_root, download)
    check_trainable(pictures)
    recipe = recipe.filled(pictures.defaults)
    models = list(dict.fromkeys(model for models in groups.values() for model in models))
    alone = {model: replace(recipe, model=model).settled() for model in models}
    recipe = replace(recipe, size=_size(recipe, alone, pictures, output / RECIPE_FILE))
    alone = {model: replace(one, size=recipe.size) for model, one in alone.items()}
    alone = {model: replace(one, size=image_size(one, pictures)) for model, one in alone.items()}
    for one in alone.values():
        Blueprint.of(one.model, pictures.classes, pictures.view(image_size(one, pictures)), one.data).build()
    print(_told_sizes(recipe, alone), flush=True)
    # Seed by seed, so that a comparison that is looked at early has all models in it.
    runs = [(model, seed) for seed in range(seeds) for model in models]
    make_folder(output)
    make_inner_folder(output / "runs")
    with _alone(output) as lock, _termination_as_interrupt():
        _keep_settings(output / RECIPE_FILE, recipe)
        found = {}
        for place, (model, seed) in enumerate(runs, start=1):
            print(f"[{place}/{len(runs)}] {model}, seed {seed}", flush=True)
            run = output / "runs" / run_name(model, seed)
            found[model, seed] = _measured(run, model, replace(alone[model], seed=seed), pictures, lock)
        rows = {key: read_rows(output / "runs" / run_name(*key)) for key in runs}
        table = Comparison.of(groups, found, rows, target)
        write_comparison(output, table, recipe, pictures)
    return table


def _size(recipe: Recipe, alone: Mapping[str, Recipe], pictures: Pictures, noted: Path) -> int | str:
    """That of all runs: what was asked for, what the comparison in the folder has, or the largest of the models' sizes."""
    known = read_recipe(noted).size if recipe.size is None and noted.is_file() else recipe.size
    return known or max(image_size(one, pictures) for one in alone.values())


def _told_sizes(recipe: Recipe, alone: Mapping[str, Recipe]) -> str:
    if recipe.size == OWN_SIZE:
        sizes = ", ".join(f"{model} {one.size}x{one.size}" for model, one in alone.items())
        return f"size     each model trains on pictures of its own size: {sizes}"
    made_for = {model: input_size(one.model) for model, one in alone.items()}
    others = [f"{model} is made for {size}x{size}" for model, size in made_for.items() if size != recipe.size]
    said = f"size     all models train on pictures of {recipe.size}x{recipe.size}"
    return said + (f" ({', '.join(others)}); --size N takes another, --size {OWN_SIZE} each model's" if others else "")


def run_name(model: str, seed: int) -> str:
    """The folder of a run: model and seed, with nothing in it that a folder's name should not hold."""
    return f"{re.sub(r'[^A-Za-z0-9_.,=-]+', '_', model).strip('_')}-seed{seed}"


def _check(groups: Mapping[str, Sequence[str]], seeds: int, target: float | None) -> None:
    if not any(groups.values()):
        raise OptionError("there is nothing to compare: name models, as `nearsight models` lists them")
    for models in groups.values():
        twice = [model for place, model in enumerate(models) if model in models[:place]]
        if twice:
            raise OptionError(f"each model can be compared once; received {twice[0]!r} twice")
    names = {model: run_name(model, 0) for models in groups.values() for model in models}
    if len(set(names.values())) < len(names):
        raise OptionError(f"two of the models would share a folder's name: {', '.join(names)}; write one differently")
    if seeds < 1:
        raise OptionError(f"seeds must be at least 1; received {seeds}")
    if target is not None and not 0 < target <= 1:
        raise OptionError(f"target must be an accuracy above 0 and up to 1; received {target:g}")


# ------------------------------------------------------------------------------------------------------------- one run


def _measured(run: Path, model: str, recipe: Recipe, pictures: Pictures, lock: int) -> Measures:
    """The numbers of a run, which is trained and measured as far as that has not been done."""
    if not (run / MEASURES_FILE).is_file() and not (run / REPORT_FILE).is_file():  # a run's last files
        _train(run, recipe, lock)
    found = read_measures(run) if (run / MEASURES_FILE).is_file() else None
    if found is None or not found.is_whole:
        assert recipe.batch_size is not None
        found = measure(run, model, recipe.seed, pictures, recipe.batch_size, recipe.max_broken)
    if found.size != recipe.size:
        raise OptionError(
            f"{run} was trained on pictures of {found.size}x{found.size}, and this comparison gives {model} "
            f"{recipe.size}x{recipe.size}: name another --output, or give --size"
        )
    return found


def _train(run: Path, recipe: Recipe, lock: int) -> None:
    """``nearsight train`` in a process of its own, from its last checkpoint if there is one."""
    command = [sys.executable, str(COMMAND), "train", f"--output={run}"]
    command += own_code.flags(own_code.imported())
    command += ["--resume"] if (run / CHECKPOINT_FILE).is_file() else []
    values = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
    given = {field.name: values[field.name] for field in fields(recipe) if values[field.name] != field.default}
    command += [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    mistake = "its messages are above"
    # The lock goes along: should this process be killed, the folder stays locked until the run has ended as well.
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, pass_fds=(lock,)) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if line.startswith("nearsight: error: "):
                    mistake = line.removeprefix("nearsight: error: ").strip()
                else:
                    print(line, end="", file=sys.stderr, flush=True)
            process.wait()
        except KeyboardInterrupt as stop:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise Stopped(f"stopped in {run}; the same command goes on from there") from stop
    if process.returncode:
        raise TrainingError(
            f"the run {run} ended with exit code {process.returncode}: {mistake}; what is finished is kept, and the same "
            "command goes on"
        )


# ---------------------------------------------------------------------------------------------------------- the folder


@contextmanager
def _alone(output: Path) -> Iterator[int]:
    """Keep other comparisons out of the folder; yields the lock, a file's descriptor."""
    if sys.platform == "win32":
        raise TrainingError(
            "a comparison locks its folder for the runs that it starts, which Windows cannot: use WSL there"
        )
    import fcntl

    try:
        lock = os.open(output / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise TrainingError(f"cannot open {output / '.lock'}: {error.strerror}; remove it if it is a link") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise TrainingError(
            f"another comparison, or a run that it had started, is still at work in {output}: wait for it or stop it"
        ) from error
    else:
        yield lock
    finally:
        os.close(lock)


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does, so that no run is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _keep_settings(file: Path, recipe: Recipe) -> None:
    """Note the recipe in the folder, or hold it against the one that is noted."""
    if not file.is_file():
        write_text(file, _settings(recipe))
        return
    noted = read_recipe(file, asdict(recipe))
    for name in (field.name for field in fields(Recipe) if field.name not in (*PER_RUN, *MOVABLE)):
        if getattr(noted, name) != getattr(recipe, name):
            raise OptionError(
                f"all runs of a comparison share one recipe: {name} is {getattr(noted, name)} in {file}; received "
                f"{getattr(recipe, name)}: name another --output"
            )


def _settings(recipe: Recipe) -> str:
    import yaml

    values = {name: value for name, value in asdict(recipe).items() if value is not None and name not in PER_RUN}
    values |= noted_imports()
    return "# The recipe of every run here, for `nearsight compare --config` and `nearsight train --config`\n" + (
        yaml.safe_dump(values, sort_keys=False)
    )
