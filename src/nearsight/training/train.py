# SPDX-License-Identifier: Apache-2.0
"""A run: from a recipe to a folder with checkpoint, weights, metrics and report."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from ..errors import DataError, OptionError, TrainingError
from ..extras import need
from ..files import make_folder, make_inner_folder, read_text, remove_leftovers, to_path, write_text
from ..models import ELSEWHERE, GIVEN, input_size, parse_spec
from ..pages.brief import Brief
from ..pages.html import frame
from ..saved.spec import saved_spec
from ..saved.timm_folder import write_timm_config
from ..saved.trained_on import TRAINED_FILE, told_overlap
from ..saved.view import View
from ..saved.weights import (
    CHECKPOINT_FILE,
    RECIPE,
    WEIGHTS_FILE,
    Blueprint,
    read_blueprint,
    read_checkpoint,
    save_model,
)
from .announce import announcement, conclusion
from .batchnorm import synced_batch_norms
from .callbacks import Bar, Forecast, Journal, StopTogether, WholeFiles, progress
from .data import FILE_KINDS, Pictures, augmented, check_trainable, load_pictures, loader, told
from .data.pictures import last_words
from .evaluate import Evaluation, evaluate
from .matching import check_same_classes
from .recipe import BEGAN, CONFIG_FILE, OWN_SIZE, Recipe, read_recipe
from .report import REPORT_FILE, is_drawn, write_report, write_result
from .task import Batches, Classifier

TENSORBOARD_FOLDER = "tensorboard"
# What may change when a run is resumed: where it runs and what it tells, not what it computes.
MOVABLE = ("data_root", "devices", "nodes", "strategy", "workers", "max_broken", "tensorboard")


@dataclass(frozen=True, repr=False)
class TrainedRun(Brief):
    """A finished run."""

    recipe: Recipe
    output: Path
    model: nn.Module
    evaluation: Evaluation

    def _repr_html_(self) -> str:
        """The report, where it is still there."""
        report = self.output / REPORT_FILE
        return frame(report.read_text(), str(report)) if report.is_file() else f"<pre>{escape(repr(self))}</pre>"


@dataclass(frozen=True, repr=False)
class Given(Brief):
    """What a recipe only names, because it was there already as objects of Python's; None is found by its name."""

    network: nn.Module | None = None
    pictures: Pictures | None = None


NOTHING = Given()


class Interrupted(TrainingError):
    """The user stopped the run; the message says how to go on."""


def train(
    recipe: Recipe, output: str | PathLike[str] | None = None, *, download: bool = False, objects: Given = NOTHING
) -> TrainedRun:
    """Train as the recipe says; leave config, checkpoint, weights, metrics, timing and report in a folder.

    Every file is written whole or not at all. The same recipe gives the same metrics on the same CPU.

    Args:
        output: the run's folder; None takes ``runs/MODEL-DATA``.
        download: fetch data that is missing.
        objects: network and data that the recipe stands for with names only; see :func:`nearsight.train`.

    Raises:
        OptionError: unknown model or data, or a model that cannot take pictures of this size.
        DataError: data that is missing or cannot be read.
        TrainingError: the folder holds a run or cannot be written, the loss is not finite, or the user stopped it.

    Example:
        >>> run = train(Recipe(model="sasa_nano", data="digits", epochs=1), Path("/tmp/run"))
        >>> run.evaluation.count
        360
    """
    output = default_output(recipe) if output is None else to_path(output)
    if recipe.tensorboard:
        need(("tensorboard",), "--tensorboard", "tensorboard")
    if _is_main_process() and any((output / file).exists() for file in (CHECKPOINT_FILE, WEIGHTS_FILE)):
        raise TrainingError(f"{output} holds a run already: continue it with --resume, or name another --output")
    return _run(recipe.settled(), output, download=download, objects=objects)


def resume(output: str | PathLike[str], given: Mapping[str, Any] | None = None, objects: Given = NOTHING) -> TrainedRun:
    """Go on from the last checkpoint of a run that was stopped, to the end that it would have had.

    Args:
        output: the run's folder.
        given: settings asked for again; None leaves one as it is, and only those that say where it runs may differ.
        objects: as of :func:`train`.

    Raises:
        OptionError: a setting that is not the run's, or data whose classes are not those that it began with.
        DataError: a checkpoint or config that cannot be read.
        TrainingError: no checkpoint in the folder, or what :func:`train` raises it for.
    """
    output = to_path(output)
    checkpoint = output / CHECKPOINT_FILE
    if not checkpoint.is_file():
        raise TrainingError(f"there is no checkpoint {checkpoint} to resume from; start the run without --resume")
    given = {name: value for name, value in (given or {}).items() if value is not None}  # null leaves it to the run
    noted = read_recipe(output / CONFIG_FILE, given)
    stored = read_checkpoint(checkpoint)
    begun = read_blueprint(stored, checkpoint)
    kept = noted if noted.size is not None else replace(noted, size=begun.view.size)  # older configs do not name it
    if "augment" not in stored.get(RECIPE, {}) and kept.data.partition(":")[0] in FILE_KINDS:
        kept = replace(kept, augment="full")  # as all did before there was a choice
    given = _asked(given, kept)
    asked = replace(kept, **given)  # by the same rules, whether a number or a word was typed
    for name in given:
        if name not in MOVABLE and not _is_same(name, getattr(asked, name), kept):
            raise OptionError(
                f"a resumed run keeps its settings: {name} is {getattr(kept, name)} in {output / CONFIG_FILE}; "
                f"received {getattr(asked, name)}"
            )
    _check_unchanged(noted, stored.get(RECIPE, {}), output / CONFIG_FILE)
    # The weights are in the checkpoint: those that the run began with are not fetched again.
    recipe = replace(kept, **{**given, "model": saved_spec(kept.model)})
    return _run(recipe, output, checkpoint, begun=begun, objects=objects)


def _asked(given: Mapping[str, Any], kept: Recipe) -> dict[str, Any]:
    """What a resumed run is asked for, as its config would have it: the command that began it may be given again."""
    if given.get("model", kept.model) == kept.model:
        asked = dict(given)
    else:
        recipe = Recipe(**given).settled()
        values = {field.name: getattr(recipe, field.name) for field in fields(recipe)}
        asked = {field.name: values[field.name] for field in fields(recipe) if values[field.name] != field.default}
        asked |= {name: values[name] for name in given}
    if asked.get("size") == OWN_SIZE:
        asked["size"] = input_size(kept.model)
    return asked


def _check_unchanged(recipe: Recipe, trained: Mapping[str, Any], config: Path) -> None:
    """Hold the settings in a file, which may be edited, cut or damaged, against those of the checkpoint."""
    for name, value in trained.items():
        if name not in MOVABLE and getattr(recipe, name, value) != value:
            raise DataError(
                f"{config} is not what the run was started with: {name} is {getattr(recipe, name)} there and {value} in "
                f"{CHECKPOINT_FILE}; put {name} back, or start another run with --config {config} and another --output"
            )


def default_output(recipe: Recipe) -> Path:
    """``runs/MODEL-DATA``, with nothing in the names that a folder's name should not hold."""
    model, data = (name.removeprefix(GIVEN) for name in (recipe.model, recipe.data))
    return Path("runs") / re.sub(r"[^\w.-]+", "_", f"{model}-{data}").strip("_")


def image_size(recipe: Recipe, pictures: Pictures, network: nn.Module | None = None) -> int:
    """Pixels per side of the pictures that a run with a single model trains on."""
    if isinstance(recipe.size, int):
        return recipe.size
    made_for = input_size(recipe.model) if network is None else View.of(network).size
    return made_for if recipe.size == OWN_SIZE else pictures.fitting(made_for)


def _run(
    recipe: Recipe,
    output: Path,
    checkpoint: Path | None = None,
    *,
    begun: Blueprint | None = None,
    download: bool = False,
    objects: Given = NOTHING,
) -> TrainedRun:
    pictures = objects.pictures or load_pictures(recipe.data, recipe.data_root, download)
    pictures = augmented(pictures, recipe.augment, recipe.mirror, recipe.crop)
    check_trainable(pictures)
    size = image_size(recipe, pictures, objects.network)
    recipe = replace(recipe.filled(pictures.defaults), size=size)
    assert recipe.batch_size is not None
    assert recipe.drop_path is not None
    view = replace(pictures.view(size), background=recipe.background)
    described = Blueprint.of if objects.network is None else Blueprint
    blueprint = described(recipe.model, pictures.classes, view, recipe.data)
    if begun is not None:
        check_same_classes(begun, pictures)
        blueprint = replace(blueprint, img_size=begun.img_size)
    L.seed_everything(recipe.seed, workers=True, verbose=False)
    model = _built(blueprint, recipe.drop_path) if objects.network is None else blueprint.fitted(objects.network)
    blueprint = blueprint.kept(model)
    task = Classifier(model, pictures.augment, blueprint, recipe)
    if _is_main_process():
        make_folder(output)
        remove_leftovers(output)
        if checkpoint is None:
            (output / TRAINED_FILE).unlink(missing_ok=True)  # of a run that ended before its first checkpoint
        if recipe.tensorboard:
            make_inner_folder(output / TENSORBOARD_FOLDER)
        began = _began(output / CONFIG_FILE) if checkpoint is not None else ""
        write_text(output / CONFIG_FILE, began + recipe.to_yaml(blueprint.model))
        print(announcement(recipe, pictures, view, model, output), flush=True)

    start = time.perf_counter()
    journal = Journal(output)
    synced = synced_batch_norms(model) if recipe.processes > 1 and not torch.cuda.is_available() else nullcontext()
    with _quiet(), synced:
        trainer = _trainer(recipe, journal, output)
        _fit(trainer, task, Batches(pictures, view, recipe), checkpoint, output)
    seconds = time.perf_counter() - start

    best = task.best.to(trainer.strategy.root_device)  # Lightning has moved it to the CPU
    test = pictures.test.dataset(view, training=False, max_broken=recipe.max_broken)
    evaluation = evaluate(best, loader(test, recipe.batch_size, pictures.test.workers))
    if _is_main_process():
        save_model(output / WEIGHTS_FILE, best, blueprint)
        if not blueprint.is_given:
            write_timm_config(output, best, blueprint)
        print(conclusion(evaluation, seconds), flush=True)
        report = output / REPORT_FILE
        if is_drawn(report, lambda: write_result(report, recipe, evaluation)):
            facts = (recipe, blueprint, best, journal.rows, evaluation, test, told(pictures))
            is_drawn(report, lambda: write_report(report, *facts))
        print(f"report   {report}", flush=True)
        print(told_overlap(output, test.digests(evaluation.places).numpy()), end="", flush=True)
    return TrainedRun(recipe, output, best, evaluation)


def _built(blueprint: Blueprint, drop_path: float) -> nn.Module:
    """Channels last is the faster layout for convolutions and attention alike, and the images follow the weights."""
    return blueprint.build(drop_path).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _began(file: Path) -> str:
    """The line of a run's ``config.yaml`` that says with which weights it began, if there is one; it stays."""
    return "".join(line + "\n" for line in read_text(file).splitlines() if line.startswith(BEGAN))


def _is_same(name: str, value: Any, recipe: Recipe) -> bool:
    """Whether a setting that is given again is the run's; of a model the file has only what a file may hold."""
    noted = getattr(recipe, name)
    if name != "model" or value == noted:
        return value == noted
    return value.startswith(ELSEWHERE) or parse_spec(saved_spec(value)) == parse_spec(noted)


def _trainer(recipe: Recipe, journal: Journal, output: Path) -> L.Trainer:
    shown = progress()
    callbacks = [journal, Forecast(), StopTogether(), shown]
    if recipe.tensorboard:
        callbacks.append(LearningRateMonitor("step"))
    return L.Trainer(
        max_epochs=recipe.epochs,
        devices=recipe.devices,
        num_nodes=recipe.nodes,
        accelerator="auto",
        strategy=_strategy(recipe),
        precision="bf16-mixed" if recipe.precision == "bf16" else "32-true",
        accumulate_grad_batches=recipe.accumulate,
        sync_batchnorm=recipe.processes > 1 and torch.cuda.is_available(),
        callbacks=callbacks,
        plugins=[WholeFiles()],
        use_distributed_sampler=False,  # Batches deals out the samples itself
        enable_checkpointing=False,  # Journal writes the checkpoint, after the row that belongs to it
        enable_model_summary=False,
        enable_progress_bar=isinstance(shown, Bar),
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=TensorBoardLogger(output, name=TENSORBOARD_FOLDER, version="") if recipe.tensorboard else False,
    )


def _strategy(recipe: Recipe) -> Any:
    if recipe.processes == 1:
        return "auto"
    if recipe.strategy == "fsdp" and not torch.cuda.is_available():
        raise OptionError("strategy fsdp needs GPUs, and this machine has none that PyTorch can use: take ddp")
    return recipe.strategy


def _fit(trainer: L.Trainer, task: Classifier, data: Batches, checkpoint: Path | None, output: Path) -> None:
    try:
        trainer.fit(task, data, ckpt_path=checkpoint)
    except SystemExit as stop:  # Lightning's answer to Ctrl-C, after which it ignores all further ones
        signal.signal(signal.SIGINT, signal.default_int_handler)
        advice = _way_on(task.recipe, output)
        raise Interrupted(f"stopped in epoch {trainer.current_epoch + 1}; {advice}") from stop
    except DataError as error:  # from a worker process it comes with that process's traceback around it
        raise DataError(last_words(error)) from error
    finally:
        launcher = trainer.strategy.launcher  # None where Lightning started no processes
        if sys.exc_info()[0] is not None and launcher is not None:
            launcher.kill(signal.SIGKILL)  # they would wait for this process


def _way_on(recipe: Recipe, output: Path) -> str:
    if not (output / CHECKPOINT_FILE).is_file():
        return (
            f"there is no checkpoint yet; start again with {'the same call' if recipe.given else f'--output {output}'}"
        )
    by_name = f"nearsight train --resume --output {output}"
    return f"go on with: {f'the same call, output={str(output)!r}, resume=True' if recipe.given else by_name}"


def _is_main_process() -> bool:
    """Before Lightning knows: under torchrun RANK tells, in processes that Lightning started LOCAL_RANK and NODE_RANK."""
    environment = os.environ
    if "RANK" in environment:
        return int(environment["RANK"]) == 0
    return int(environment.get("LOCAL_RANK", 0)) == 0 and int(environment.get("NODE_RANK", 0)) == 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's tips (how many workers, which logger) are not about the user's run; its errors still are."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\.")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
