# SPDX-License-Identifier: Apache-2.0
"""What happens around the training: its files, its clock, and how it is stopped."""

from __future__ import annotations

import io
import signal
import sys
import threading
import time
from os import PathLike
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.plugins.io import CheckpointIO

from ..bench.memory import peak_memory
from ..files import to_path, write_bytes, write_text
from ..pages.csv_json import write_csv
from ..saved.trained_on import write_trained
from ..saved.weights import CHECKPOINT_FILE, read_checkpoint
from .data import PictureDataset, warn_of_broken

METRICS_FILE = "metrics.csv"
TIMING_FILE = "timing.csv"
TIMED_STEPS = (3, 20)  # the time is estimated from the steps after the first of these up to the second


class Journal(L.Callback):
    """After every epoch: one more row in ``metrics.csv`` and ``timing.csv``, then ``last.ckpt``; after the first, the
    digests of the training pictures in ``trained.npz``.

    The rows travel in the checkpoint, so that a resumed run's tables have no gap and no epoch twice. What may differ between
    two runs of one recipe stands in ``timing.csv`` alone: seconds of the epoch, of its training steps, training images per
    second, and the largest memory of the process so far in bytes (on a GPU: the largest allocated there).
    """

    def __init__(self, output: str | PathLike[str]) -> None:
        self.output = to_path(output)
        self.rows: list[dict[str, float]] = []
        self.timing: list[dict[str, float]] = []
        self.broken: set[str] = set()
        self.noted = False
        self.begin = self.trained = self.lr = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begin = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.lr = trainer.optimizers[0].param_groups[0]["lr"]  # once the step is done it is that of the next one

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.trained = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        names = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
        values = {name: trainer.callback_metrics[name].item() for name in names}
        self.rows.append({"epoch": epoch, "lr": self.lr, **values})
        self.timing.append({"epoch": epoch, **self._timing(trainer)})
        for data in (trainer.train_dataloader.dataset, trainer.val_dataloaders.dataset):  # pyright: ignore
            warn_of_broken(data, self.broken)
        if trainer.is_global_zero:
            write_text(self.output / METRICS_FILE, _to_csv(self.rows))
            write_text(self.output / TIMING_FILE, _to_csv(self.timing))
        if not self.noted:
            self._note_pictures(trainer)
        trainer.save_checkpoint(self.output / CHECKPOINT_FILE)

    def _note_pictures(self, trainer: L.Trainer) -> None:
        """Before the first checkpoint, so that no weights are without it. Most were decoded in this epoch anyway."""
        data: PictureDataset = trainer.train_dataloader.dataset  # pyright: ignore[reportOptionalMemberAccess]
        if trainer.world_size > 1:  # each process has decoded a share of them
            known = data.known.to(trainer.strategy.root_device)
            dist.all_reduce(known, dist.ReduceOp.MAX)
            data.known.copy_(known)
        if trainer.is_global_zero:
            write_trained(self.output, data.digests().numpy())
        self.noted = True

    def _timing(self, trainer: L.Trainer) -> dict[str, float]:
        seconds = self.trained - self.begin
        images = len(trainer.train_dataloader.sampler) * trainer.world_size  # pyright: ignore
        return {
            "seconds": round(time.perf_counter() - self.begin, 4),
            "train_seconds": round(seconds, 4),
            "images_per_second": round(images / seconds, 2),
            "peak_memory": _peak_memory(),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "timing": self.timing}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self.timing = list(state_dict["rows"]), list(state_dict["timing"])


class Forecast(L.Callback):
    """After the first batches, or an epoch that has too few of them: how long an epoch and the whole training will take."""

    def __init__(self) -> None:
        self.begin: float | None = None
        self.told = False

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begin = None  # between two epochs lies a validation
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        batches = int(trainer.num_training_batches)
        first, last = (min(bound, batches // 2) for bound in TIMED_STEPS)
        index = trainer.fit_loop.epoch_loop.batch_idx + 1
        if self.told or not trainer.is_global_zero:
            return
        if self.begin is None or index <= first:  # the first steps also compile, allocate and start the workers
            self.begin, self.first = time.perf_counter(), index
        elif index >= last:
            per_batch = (time.perf_counter() - self.begin) / (index - self.first)
            # A validation batch costs about a third of a training batch: there is no backward.
            self._tell(trainer, per_batch * (batches + sum(map(int, trainer.num_val_batches)) / 3))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.told and trainer.is_global_zero:
            self._tell(trainer, time.perf_counter() - self.start)

    def _tell(self, trainer: L.Trainer, epoch: float) -> None:
        left = trainer.max_epochs - trainer.current_epoch  # pyright: ignore[reportOptionalOperand]
        print(f"time     about {_duration(epoch)} per epoch, {_duration(epoch * left)} in all", flush=True)
        self.told = True


class Bar(RichProgressBar):
    """Lightning's, with epochs counted from one."""

    def __init__(self) -> None:
        super().__init__(leave=False)

    def _get_train_description(self, current_epoch: int) -> str:
        # Not public; a Lightning that asks for another counts from zero.
        assert self.trainer is not None
        return f"Epoch {current_epoch + 1}/{self.trainer.max_epochs}".ljust(len(self.validation_description))


class Lines(L.Callback):
    """After every epoch a line, where a bar would fill a file with its pieces."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begin = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        found = {name: one.item() for name, one in trainer.callback_metrics.items()}
        numbers = f"train_loss {found['train_loss']:.4f}, val_loss {found['val_loss']:.4f}"
        seconds = _duration(time.perf_counter() - self.begin)
        place = f"{trainer.current_epoch + 1} of {trainer.max_epochs}"
        print(f"epoch    {place}: {numbers}, val_accuracy {found['val_accuracy']:.2%}, {seconds}", flush=True)


def progress() -> L.Callback:
    """What shows how far a training is: a bar in a terminal, lines in a file, a pipe or a notebook."""
    return Bar() if sys.stdout.isatty() else Lines()


class StopTogether(L.Callback):
    """SIGTERM ends a run as Ctrl-C does, with all its processes.

    Lightning's own answer to SIGTERM waits for the other processes in the midst of whatever they are exchanging, for ever.
    The main process stops here as for Ctrl-C, and ends the others; these fall at once, and leave Ctrl-C to the main process.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows handlers there only
        if trainer.is_global_zero:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        else:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)


class WholeFiles(CheckpointIO):
    """Checkpoints that are whole or not there, and that cannot run code when they are read."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_bytes(Path(path), buffer.getvalue())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def _to_csv(rows: list[dict[str, float]]) -> str:
    return write_csv(list(rows[0]), [list(row.values()) for row in rows])


def _peak_memory() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_memory()


def _duration(seconds: float) -> str:
    """12 s, 3 min, 5.2 h."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
