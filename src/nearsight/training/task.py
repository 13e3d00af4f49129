# SPDX-License-Identifier: Apache-2.0
"""What Lightning's Trainer trains: the task, and the batches that it is given."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup, mixup_target
from timm.data.random_erasing import RandomErasing
from timm.loss.cross_entropy import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from ..errors import DataError, TrainingError
from ..saved.view import View
from ..saved.weights import KEY, PREFIX, RECIPE, Blueprint
from .data import IGNORED, Pictures, RandomAffine, SplitSampler, loader
from .data.decoded import seed_all
from .data.pictures import Split, hashed
from .optimizer import make_optimizer, make_schedule, state_apart
from .recipe import Recipe, check_mixed


class Mixed(Mixup):
    """timm's, for any number of pictures: they are mixed in reverse order, so that the middle one of an odd number stays."""

    def __call__(self, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        share = self._mix_batch(x)
        return x, mixup_target(target, self.num_classes, share, self.label_smoothing)


class Classifier(L.LightningModule):
    """A network learning to name pictures.

    Every step's random draws follow from the seed, the step's number and an image's place in the step alone: no state has to
    be kept to resume, and it is the same how a step is dealt out among processes and parts. Mixup, cutmix and the network's
    own dropout are the exception: they are drawn by each process for the images that it has. So are batch norms, whose
    statistics are those of a part, over all processes.
    """

    def __init__(self, model: nn.Module, augment: nn.Module, blueprint: Blueprint, recipe: Recipe) -> None:
        super().__init__()
        assert recipe.label_smoothing is not None
        self.model = model
        self.augment = augment
        self.blueprint = blueprint
        self.recipe = recipe
        classes = len(blueprint.classes)
        self.erase = RandomErasing(recipe.random_erasing, device="cpu") if recipe.random_erasing else None
        self.mix = None
        self.train_loss: nn.Module = LabelSmoothingCrossEntropy(recipe.label_smoothing)
        if recipe.mixup or recipe.cutmix:
            self.mix = Mixed(
                recipe.mixup or 0.0, recipe.cutmix or 0.0, label_smoothing=recipe.label_smoothing, num_classes=classes
            )
            self.train_loss = SoftTargetCrossEntropy()
        self.train_accuracy = MulticlassAccuracy(classes, average="micro")
        self.val_loss = MeanMetric()
        self.val_accuracy = MulticlassAccuracy(classes, average="micro")
        self.ema = None
        if recipe.ema_decay:
            # The decay rises as that of a plain mean until it is reached: the untrained weights do not linger.
            self.ema = ModelEmaV3(model, recipe.ema_decay, use_warmup=True, warmup_power=1.0)
            self.ema.requires_grad_(False)
        self.answer: Callable[[Tensor], Tensor] = torch.compile(model.forward) if recipe.compile else model.__call__

    @property
    def best(self) -> nn.Module:
        """The network that is validated and saved: the mean of the weights where there is one."""
        return self.model if self.ema is None else self.ema.module

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        part = index % self.recipe.accumulate
        images = self._changed(images, part)
        assert self.trainer is not None
        seed_all(self.recipe.seed, self.global_step, part * self.trainer.world_size + self.global_rank)
        targets = labels
        if self.mix is not None:
            images, targets = self.mix(images, labels)
            labels = targets.argmax(1)  # of the picture that has the larger share
        logits = self.answer(images)
        loss = self.train_loss(logits, targets)
        self._check_finite(loss, logits, f"step {index + 1}")
        self.train_accuracy(logits, labels)
        self.log("train_loss", loss, on_epoch=True, on_step=False, prog_bar=True, sync_dist=True)
        self.log("train_accuracy", self.train_accuracy, on_epoch=True, on_step=False)
        return loss

    def _changed(self, images: Tensor, part: int) -> Tensor:
        """The augmentation of a whole step, applied to those of its images that are here."""
        assert self.trainer is not None
        assert self.recipe.batch_size is not None
        world = self.trainer.world_size
        size = self.recipe.batch_size // (world * self.recipe.accumulate)
        rows = self.global_rank + world * (part * size + torch.arange(len(images), device=images.device))
        torch.manual_seed(hashed(self.recipe.seed, self.global_step))
        if isinstance(self.augment, RandomAffine):
            images = self.augment(images, rows, self.recipe.batch_size)
        if self.erase is not None:
            for row, image in zip(rows.tolist(), images, strict=True):
                random.seed(f"{self.recipe.seed} {self.global_step} {row}")
                self.erase(image)
        return images

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.model, step=self.global_step)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        if self.recipe.clip_grad:
            assert self.trainer is not None
            if self.recipe.strategy == "fsdp" and self.trainer.world_size > 1:
                self.trainer.model.clip_grad_norm_(self.recipe.clip_grad)  # pyright: ignore
            else:
                self.clip_gradients(optimizer, self.recipe.clip_grad, "norm")

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        counts = labels != IGNORED
        logits, labels = self.best(images)[counts], labels[counts]
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        self._check_finite(losses.sum(), logits, "validation")
        self.val_loss(losses)
        if len(labels):
            self.val_accuracy(logits, labels)
        self.log("val_loss", self.val_loss, on_epoch=True)
        self.log("val_accuracy", self.val_accuracy, on_epoch=True, prog_bar=True)

    def _check_finite(self, loss: Tensor, logits: Tensor, place: str) -> None:
        if not (loss.isfinite() & logits.isfinite().all()):
            what = "an output" if loss.isfinite() else "the loss"
            value = (logits[~logits.isfinite()][0] if loss.isfinite() else loss).item()
            raise TrainingError(
                f"{what} became {value} in epoch {self.current_epoch + 1}, {place}: stopped, with the last good "
                f"checkpoint kept; start again with a smaller --lr than {self.recipe.lr:g}"
            )

    def configure_optimizers(self) -> Any:
        assert self.trainer is not None
        assert self.recipe.warmup_share is not None
        optimizer = make_optimizer(self.model, self.recipe)
        # Not Lightning's estimate: that makes the workers load before a resumed run knows its epoch.
        steps = self.trainer.datamodule.steps  # pyright: ignore[reportAttributeAccessIssue]
        schedule = make_schedule(optimizer, steps, self.recipe.warmup_share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.global_step)  # timm's schedules count updates themselves

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        before = {name.removeprefix(PREFIX) for name in checkpoint["state_dict"] if name.startswith(PREFIX)}
        gone = before - self.model.state_dict().keys()
        if gone:  # of an older version: the network adopts its weights, and the optimiser what belongs to them
            optimizer = make_optimizer(self.model, self.recipe)
            states = checkpoint["optimizer_states"]
            checkpoint["optimizer_states"] = [state_apart(state, optimizer, self.model, gone) for state in states]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = self.blueprint.to_json()
        checkpoint[RECIPE] = {**asdict(self.recipe), "model": self.blueprint.model}


class Batches(L.LightningDataModule):
    """The same batches for any number of processes: a global batch is dealt out among them."""

    def __init__(self, pictures: Pictures, view: View, recipe: Recipe) -> None:
        super().__init__()
        self.pictures, self.view, self.recipe = pictures, view, recipe

    @property
    def parts(self) -> int:
        """Of a step: over all processes, and one after the other."""
        return self.recipe.processes * self.recipe.accumulate

    @property
    def step(self) -> int:
        """Images of a step. A ragged last one would weigh its images more than the others, and upset the batch norms."""
        assert self.recipe.batch_size is not None
        step = min(self.recipe.batch_size, len(self.pictures.train) // self.parts * self.parts)
        if step == 0:
            raise DataError(f"{len(self.pictures.train)} training images cannot be dealt out in {self.parts} parts")
        check_mixed(self.recipe, step)
        return step

    @property
    def steps(self) -> int:
        """Of the whole training."""
        assert self.recipe.epochs is not None
        return self.recipe.epochs * (len(self.pictures.train) // self.step)

    def train_dataloader(self) -> DataLoader:
        return self._loader(self.pictures.train, self.step // self.parts, training=True, step=self.step)

    def val_dataloader(self) -> DataLoader:
        assert self.recipe.batch_size is not None
        return self._loader(self.pictures.validation, self.recipe.batch_size // self.recipe.processes, training=False)

    def _loader(self, split: Split, batch_size: int, training: bool, step: int | None = None) -> DataLoader:
        assert self.trainer is not None
        seed, rank, world = self.recipe.seed, self.trainer.global_rank, self.trainer.world_size
        data = split.dataset(self.view, training, seed, self.recipe.max_broken)
        workers = split.workers if self.recipe.workers is None else self.recipe.workers
        sampler = SplitSampler(split, rank, world, step=step, seed=seed)
        # Lightning tells the epoch only after a resumed run's workers have begun to load.
        sampler.set_epoch(self.trainer.fit_loop.epoch_progress.total.processed)  # pyright: ignore[reportAttributeAccessIssue]
        return loader(data, batch_size, workers, sampler)
