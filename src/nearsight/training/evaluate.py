# SPDX-License-Identifier: Apache-2.0
"""How good a trained model is: accuracy, loss and confusion matrix on one split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_confusion_matrix

from ..errors import DataError, TrainingError
from ..finite import why_not_finite
from ..modes import evaluating
from ..pages.brief import Brief
from .data import IGNORED, warn_of_broken
from .data.pictures import plainly


@dataclass(frozen=True, repr=False)
class Evaluation(Brief):
    """What a model said of every picture of a split that could be read, in order.

    Attributes:
        labels: (n,). logits: (n, classes). places: (n,), the index of each in its split.
    """

    labels: Tensor
    logits: Tensor
    places: Tensor

    def __repr__(self) -> str:
        score = f"{self.correct} of {self.count} right, {self.accuracy:.2%}"
        return f"Evaluation({score}; loss {self.loss:.4f}; {self.logits.shape[1]} classes)"

    @property
    def predictions(self) -> Tensor:
        return self.logits.argmax(1)

    @property
    def count(self) -> int:
        return len(self.labels)

    @property
    def correct(self) -> int:
        return int((self.predictions == self.labels).sum())

    @property
    def accuracy(self) -> float:
        return self.correct / self.count

    @property
    def loss(self) -> float:
        return F.cross_entropy(self.logits, self.labels).item()

    @property
    def confusion(self) -> np.ndarray:
        """Counts, (true class, predicted class)."""
        return multiclass_confusion_matrix(self.predictions, self.labels, self.logits.shape[1]).numpy()

    def part(self, chosen: Tensor) -> Evaluation:
        """Of some of the pictures: (n,), True for these."""
        return Evaluation(self.labels[chosen], self.logits[chosen], self.places[chosen])


def joined(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Of several splits, one after the other."""
    columns = ([getattr(one, name) for one in evaluations] for name in ("labels", "logits", "places"))
    return Evaluation(*map(torch.cat, columns))


def evaluate(model: nn.Module, batches: DataLoader, classes: Tensor | None = None) -> Evaluation:
    """Run a model over all batches, without gradients and in evaluation mode.

    Args:
        classes: (classes of the data,), the network's class of each; None where they are the same.

    Raises:
        DataError: no picture can be read.
        TrainingError: an output or a loss that is not finite. The largest of such numbers is some class, and its share of
            right answers would look like an accuracy.
    """
    device = next(model.parameters()).device
    labels, logits = [], []
    with evaluating(model), torch.inference_mode():
        for images, truth in plainly(batches):
            logits.append(model(images.to(device)).float().cpu())
            labels.append(truth)
    warn_of_broken(batches.dataset)
    everything = torch.cat(labels)
    (places,) = (everything != IGNORED).nonzero(as_tuple=True)
    if not len(places):
        raise DataError(f"none of the {len(everything)} images can be read")
    truth = everything[places] if classes is None else classes[everything[places]]
    result = Evaluation(truth, torch.cat(logits)[places], places)
    reason = why_not_finite(result.logits, model)
    if reason is None and not math.isfinite(result.loss):
        reason = f"the loss is {result.loss}, though every output of the network is finite"
    if reason is not None:
        raise TrainingError(f"{reason}; there is no accuracy: take earlier weights, or train anew with a smaller --lr")
    return result
