# SPDX-License-Identifier: Apache-2.0
"""What Lightning's Trainer trains: the task, its data, and the two places where a run is kept."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import CheckpointIO
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics.classification import MulticlassAccuracy

from ..errors import TrainingError
from .data import Pictures, View, loader
from .files import write_bytes, write_text
from .recipe import Recipe
from .weights import CHECKPOINT_FILE, KEY, Blueprint, read_checkpoint

LABEL_SMOOTHING = 0.1
WEIGHT_DECAY = 0.05
GRADIENT_CLIP = 1.0
WARMUP_SHARE = 0.1  # of all steps
FINAL_LR_SHARE = 0.01  # of the peak
METRICS_FILE = "metrics.csv"


class Classifier(L.LightningModule):
    """A network learning to name pictures: AdamW, linear warm-up and cosine, label smoothing."""

    def __init__(self, model: nn.Module, augment: nn.Module, blueprint: Blueprint, recipe: Recipe) -> None:
        super().__init__()
        self.model = model
        self.augment = augment
        self.blueprint = blueprint
        self.recipe = recipe
        self.train_loss = LabelSmoothingCrossEntropy(LABEL_SMOOTHING)
        self.loss = nn.CrossEntropyLoss()
        self.train_accuracy = MulticlassAccuracy(len(blueprint.classes), average="micro")
        self.accuracy = MulticlassAccuracy(len(blueprint.classes), average="micro")

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        # Every step's draws follow from the seed and its number alone, so a resumed run makes the same ones.
        torch.manual_seed(self.recipe.seed + 1_000_003 * (self.global_step + 1) + self.global_rank)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        logits = self.model(self.augment(images))
        loss = self.train_loss(logits, labels)
        self._check_finite(loss, f"step {index + 1}")
        self.train_accuracy(logits, labels)
        self.log("train_loss", loss, on_epoch=True, on_step=False, prog_bar=True, sync_dist=True)
        self.log("train_accuracy", self.train_accuracy, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        logits = self.model(images)
        loss = self.loss(logits, labels)
        self._check_finite(loss, "validation")
        self.accuracy(logits, labels)
        self.log("val_loss", loss, on_epoch=True, sync_dist=True)
        self.log("val_accuracy", self.accuracy, on_epoch=True, prog_bar=True)

    def _check_finite(self, loss: Tensor, place: str) -> None:
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss became {loss.item()} in epoch {self.current_epoch + 1}, {place}: stopped, with the last good "
                f"checkpoint kept; start again with a smaller --lr than {self.recipe.lr:g}"
            )

    def configure_optimizers(self) -> Any:
        optimizer = create_optimizer_v2(self.model, opt="adamw", lr=self.recipe.lr, weight_decay=WEIGHT_DECAY)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = CosineLRScheduler(
            optimizer,
            t_initial=steps,
            warmup_t=math.ceil(WARMUP_SHARE * steps),
            warmup_lr_init=FINAL_LR_SHARE * optimizer.defaults["lr"],
            lr_min=FINAL_LR_SHARE * optimizer.defaults["lr"],
            t_in_epochs=False,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.global_step)  # timm's schedules count updates themselves

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = self.blueprint.to_json()


class Batches(L.LightningDataModule):
    """The same batches for any number of processes: a global batch is dealt out among them."""

    def __init__(self, pictures: Pictures, view: View, recipe: Recipe) -> None:
        super().__init__()
        self.pictures, self.view, self.recipe = pictures, view, recipe

    def train_dataloader(self) -> DataLoader:
        data = self.pictures.train.seen(self.view, training=True)
        return self._loader(data, self.pictures.train.workers, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        data = self.pictures.validation.seen(self.view, training=False)
        return self._loader(data, self.pictures.validation.workers, shuffle=False)

    def _loader(self, data: Any, workers: int, shuffle: bool) -> DataLoader:
        trainer = self.trainer
        assert trainer is not None
        assert self.recipe.batch_size is not None
        # Its order follows from seed and epoch, which Lightning tells it; with one process it is a plain shuffle.
        sampler = DistributedSampler(
            data, trainer.world_size, trainer.global_rank, shuffle=shuffle, seed=self.recipe.seed
        )
        size = self.recipe.batch_size // trainer.world_size
        # A ragged last batch of training images would weigh more than the others, and upset the batch norms.
        return loader(data, size, workers, sampler, drop_last=shuffle and len(sampler) >= size)


class Journal(L.Callback):
    """After every epoch: one more row in ``metrics.csv``, then ``last.ckpt``.

    The rows travel in the checkpoint, so that a resumed run's table has no gap and no epoch twice.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        names = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")
        values = {name: trainer.callback_metrics[name].item() for name in names}
        self.rows.append({"epoch": trainer.current_epoch + 1, "lr": lr, **values})
        if trainer.is_global_zero:
            write_text(self.output / METRICS_FILE, _csv(self.rows))
        trainer.save_checkpoint(self.output / CHECKPOINT_FILE)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])


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


def _csv(rows: list[dict[str, float]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
