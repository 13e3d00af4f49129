# SPDX-License-Identifier: Apache-2.0
"""``nearsight.load``: a trained network that knows its classes, how it sees pictures, and what it says of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from os import PathLike
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import DataError, DtypeError, NearsightError, OptionError, ShapeError
from ..finite import why_not_finite
from ..models.data_config import as_source, fitting
from ..modes import evaluating
from ..picture import read_picture
from .view import View
from .weights import load_model

if TYPE_CHECKING:
    from ..picture import Source

    Image = Source | Tensor
    Images = Image | Iterable[Image]

BATCH = 32  # images that are predicted at a time


def load(
    path: str | PathLike[str],
    *,
    model: nn.Module | None = None,
    img_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Trained:
    """A trained network, ready to be used: the module itself, in evaluation mode, with ``classes``, ``view``,
    :meth:`~Trained.preprocess` and :meth:`~Trained.predict`.

    Whoever made the file, no code in it runs, and nothing is fetched: docs/reference/security.md.

    Args:
        path: a run's folder, or a ``.safetensors`` or ``.ckpt`` file in one; or the name of a network whose weights come
            with the package, ``"sasa_nano"``, where nothing on the disk is called so.
        model: a network like the one that :func:`nearsight.train` was given, which no file rebuilds: it gets the weights,
            and is what comes back. All others are rebuilt, and it is left out.
        device, dtype: where the weights are put, and the floating point kind that they get; None keeps CPU and float32.

    Raises:
        DataError: nothing there, an unreadable or damaged file, or one that nearsight did not write.
        OptionError: a device that there is not; a ``model`` where the file rebuilds its own; an ``img_size`` that the
            network cannot take.
        DtypeError: a dtype that is not floating point; a ``model`` that is no module.

    Example:
        >>> model = load("runs/digits")
        >>> model.predict("seven.png")
        [Prediction('7', 99.1 %)]
        >>> load("sasa_nano").classes[:3]
        ('0', '1', '2')
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise DtypeError(f"dtype must be a floating point one of PyTorch's, as torch.bfloat16; received {dtype!r}")
    if not isinstance(model, (nn.Module, NoneType)):
        raise DtypeError(f"model must be a network that is made, as Tiny(); received {model!r:.100}")
    network, blueprint = load_model(path, model, img_size)
    try:
        network.to(device=device, dtype=dtype)
    except (RuntimeError, AssertionError) as error:  # no such device, or PyTorch was built without it
        raise OptionError(f"device must be one that there is; received {device!r}: {_first_line(error)}") from error
    network.__class__ = trained_class(getattr(network, "network_class", type(network)))
    assert isinstance(network, Trained)
    network.classes, network.view = blueprint.classes, blueprint.view
    return network


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """What a network says of one image.

    Attributes:
        classes: the names of all classes.
        probabilities: (classes,), the softmax of the network's outputs: float32, on the CPU.
    """

    classes: tuple[str, ...]
    probabilities: Tensor

    @property
    def name(self) -> str:
        """Of the likeliest class."""
        return self.top(1)[0][0]

    @property
    def probability(self) -> float:
        """Of the likeliest class, between 0 and 1."""
        return self.top(1)[0][1]

    def top(self, count: int = 5) -> list[tuple[str, float]]:
        """Names and probabilities of the likeliest classes, the likeliest first; all where there are fewer.

        Raises:
            OptionError: ``count`` below 1.
        """
        if count < 1:
            raise OptionError(f"at least 1 class can be named; received {count}")
        best = self.probabilities.topk(min(count, len(self.classes)))
        return [(self.classes[place], value) for value, place in zip(*map(Tensor.tolist, best), strict=True)]

    def __repr__(self) -> str:
        return f"Prediction({self.name!r}, {self.probability:.1%})".replace("%", " %")


class Trained(nn.Module):
    """What a network can do besides being one, once it is trained; :func:`load` makes one.

    It stays what it was: an instance of its own class too, with the same weights by the same names.

    Attributes:
        classes: the names of its outputs, in their order.
        view: how it sees pictures.
        network_class: what it is an instance of besides.
    """

    classes: tuple[str, ...]
    view: View
    network_class: type[nn.Module]

    def preprocess(self, images: Images) -> Tensor:
        """Images as the network takes them, on its device and in its dtype: (B, C, H, W), for one image too.

        Pictures are shown as those of the training were: upright, in the network's channels, on its background, resized and
        normalised. A floating point tensor is taken to be what the network sees, and passes as it is.

        Args:
            images: one or several. A picture is a file, its bytes, a picture of Pillow's, an array (H, W) or (H, W, C) as
                :func:`nearsight.picture.from_array` takes it, or a uint8 tensor (H, W) or (C, H, W). Arrays and tensors of
                four axes are a batch of those.

        Raises:
            DataError: a file that is not there or holds no picture.
            ShapeError: what is no image, floating point tensors of other channels or of several sizes, or no image at all.
            OptionError: an array whose white is not known; pictures for a network of neither one channel nor three.
        """
        tensors = list(self._seen(images))
        if not tensors:
            raise ShapeError("at least one image is needed; received none")
        if len({tensor.shape for tensor in tensors}) > 1:
            sizes = ", ".join(sorted({"x".join(map(str, tensor.shape)) for tensor in tensors}))
            raise ShapeError(f"tensors of one batch must have one shape; received {sizes}")
        return torch.stack(tensors)

    def predict(self, images: Images, *, batch_size: int = BATCH) -> list[Prediction]:
        """What the network says of each image, in their order: probabilities, the softmax of its outputs.

        It is run in evaluation mode and without gradients, whatever mode it is in.

        Args:
            images: as of :meth:`preprocess`; of any number, which may come one by one from a generator.
            batch_size: images that are run at a time.

        Raises:
            DataError: a file that cannot be read; outputs that are not finite, of which the largest means nothing.
            ShapeError, OptionError: as :meth:`preprocess`; an image that the network cannot take; a number of outputs that
                is not that of ``classes``.

        Example:
            >>> model.predict(["seven.png", numpy.zeros((8, 8))])[0].top(2)
            [('7', 0.9912), ('1', 0.0037)]
        """
        if batch_size < 1:
            raise OptionError(f"batch_size must be at least 1; received {batch_size}")
        return [one for batch in _batches(self._seen(images), batch_size) for one in self._said(batch)]

    def _said(self, batch: Tensor) -> list[Prediction]:
        try:
            with evaluating(self), torch.no_grad():
                logits = self(batch)
        except (NearsightError, MemoryError):
            raise
        except Exception as error:  # a network raises what it likes about pictures that it cannot take
            height, width = batch.shape[2:]
            raise OptionError(f"the network cannot take {height}x{width} images: {_first_line(error)}") from error
        if logits.shape != (len(batch), len(self.classes)):
            raise OptionError(
                f"the network must have one output for each of its {len(self.classes)} classes; received "
                f"{tuple(logits.shape)}: set the model's .classes where its classifier was changed"
            )
        reason = why_not_finite(logits, self)
        if reason is not None:
            raise DataError(f"{reason}; there is no prediction")
        return [Prediction(self.classes, one) for one in logits.float().softmax(1).cpu()]

    def _seen(self, images: Images) -> Iterator[Tensor]:
        """Each image as the network takes it, (C, H, W)."""
        like = next((one for one in (*self.parameters(), *self.buffers()) if one.is_floating_point()), torch.empty(0))
        fit = None
        for image in _each(images):
            if isinstance(image, Tensor) and image.is_floating_point():
                seen = self._checked(image)
            else:
                fit = fit or fitting(self.view.data_config())
                seen = fit(read_picture(as_source(image), self.view.channels, self.view.background))
            yield seen.to(like)

    def _checked(self, image: Tensor) -> Tensor:
        if image.ndim != 3 or len(image) != self.view.channels:
            raise ShapeError(
                f"a floating point tensor is what the network sees, ({self.view.channels}, H, W) or a batch of those; "
                f"received {tuple(image.shape)}"
            )
        return image

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As any module, but that the class is made where it is needed: no module holds it for pickle to find."""
        _, _, *rest = super().__reduce_ex__(max(2, protocol))
        return _unbuilt, (self.network_class,), *rest


@cache
def trained_class(network: type[nn.Module]) -> type[Trained]:
    """A network's class that is :class:`Trained` too, under the same name."""
    same = {"__module__": network.__module__, "__doc__": network.__doc__}
    return type(network.__name__, (Trained, network), {**same, "network_class": network})


def _unbuilt(network: type[nn.Module]) -> Trained:
    """One without weights or anything, which whoever copies or unpickles fills."""
    made = trained_class(network)
    return made.__new__(made)


def _each(images: Images) -> Iterator[Any]:
    """One by one: arrays and tensors of four axes hold several."""
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
        yield from images
    elif isinstance(images, (str, PathLike, bytes, np.ndarray, Tensor)) or not isinstance(images, Iterable):
        yield images
    else:
        for image in images:
            yield from _each(image)


def _batches(tensors: Iterable[Tensor], most: int) -> Iterator[Tensor]:
    """Neighbours of one shape, at most so many."""
    waiting: list[Tensor] = []
    for tensor in tensors:
        if waiting and (len(waiting) == most or tensor.shape != waiting[0].shape):
            yield torch.stack(waiting)
            waiting = []
        waiting.append(tensor)
    if waiting:
        yield torch.stack(waiting)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
