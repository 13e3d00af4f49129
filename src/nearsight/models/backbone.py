# SPDX-License-Identifier: Apache-2.0
"""What the families share: timm's way of speaking to a network, and the bottleneck ResNet of SASA and HaloNet."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath
from timm.models import build_model_with_cfg, checkpoint_seq
from torch import Tensor, nn

from ..errors import DataError, OptionError
from ..positions import UNNAMED_POSITION, no_weight_decay_in
from ..window import plain
from .checkpoints import fitting, reading


class Backbone(nn.Module, PyTorchModelHubMixin, library_name="nearsight", license="apache-2.0", tags=["timm"]):
    """The methods that timm, and what builds on it, calls on a network.

    A family fills in :meth:`feature_maps`, :meth:`finish` and the attributes below. Through huggingface_hub's mixin every
    network has ``save_pretrained(folder)``, ``from_pretrained(folder or repository)`` and ``push_to_hub(repository)``.

    Attributes:
        feature_info: channels, reduction and module of every map of :meth:`feature_maps`, as timm writes it: one per
            stage, and so per scale where no ``output_stride`` is set.
        in_chans: of the images that it takes.
        num_features: channels of :meth:`forward_features`; head_hidden_size: of the pooled vector.
        num_classes: outputs; 0 for none.
    """

    feature_info: list[dict[str, Any]]
    in_chans: int
    num_classes: int
    num_features: int
    head_hidden_size: int
    head: nn.Module
    grad_checkpointing = False

    def feature_maps(self, x: Tensor) -> Iterator[Tensor]:
        """One map per entry of ``feature_info``, (B, C, H, W), from fine to coarse."""
        raise NotImplementedError

    def finish(self, x: Tensor) -> Tensor:
        """From the last feature map to what the head takes."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """What the head takes, (B, num_features, H, W)."""
        last = x
        for feature_map in self.feature_maps(x):
            last = feature_map
        return self.finish(last)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's feature pyramid: the maps at ``indices`` (an int for the last so many), and the final features.

        Args:
            indices: into ``feature_info``; None for all.
            norm: let the last map pass what stands before the head.
            stop_early: do not compute what comes after the last index.
            output_fmt: of the maps, ``"NCHW"`` or ``"NHWC"``.
            intermediates_only: leave out the final features.

        Raises:
            OptionError: another ``output_fmt``.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise OptionError(f"output_fmt must be 'NCHW' or 'NHWC'; received {output_fmt!r}")
        wanted = take_indices(len(self.feature_info), indices)
        maps, feature_map = [], x
        for index, feature_map in enumerate(self.feature_maps(x)):
            if index in wanted:
                is_end = index == len(self.feature_info) - 1
                maps.append(self.finish(feature_map) if norm and is_end else feature_map)
            if index == max(wanted) and (stop_early or intermediates_only):
                break
        if output_fmt == "NHWC":
            maps = [one.permute(0, 2, 3, 1) for one in maps]
        return maps if intermediates_only else (self.finish(feature_map), maps)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def get_classifier(self) -> nn.Module:
        return self.head.fc  # pyright: ignore[reportReturnType]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Swap the classifier for a fresh one of ``num_classes`` outputs; 0 removes it.

        Raises:
            OptionError: a classifier without a pool before it.
        """
        check_pool(num_classes, self.head.global_pool.pool_type if global_pool is None else global_pool)  # pyright: ignore
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)  # pyright: ignore[reportCallIssue]

    def no_weight_decay(self) -> set[str]:
        """The position tables of its layers, which timm's optimisers then leave alone."""
        return no_weight_decay_in(self)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep the inputs of blocks only, and compute them again in the backward."""
        self.grad_checkpointing = enable

    def save_pretrained(self, save_directory: str | Path, *, config: dict | None = None, **kwargs: Any) -> str | None:
        """Write weights, arguments and a model card to a folder, for ``from_pretrained``; see huggingface_hub.

        Raises:
            OptionError: a position that has no name; nothing is written then.
        """
        if isinstance(self._hub_mixin_config, dict) and self._hub_mixin_config.get("position", "") is None:
            raise OptionError(UNNAMED_POSITION)
        if config is None and isinstance(self._hub_mixin_config, dict):
            # The classifier may have been reset since.
            config = {**self._hub_mixin_config, "num_classes": self.num_classes}
        return super().save_pretrained(save_directory, config=config, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """A network of a folder or a repository that :meth:`save_pretrained` wrote; see huggingface_hub.

        Raises:
            DataError: there is none, it cannot be read, or it is another network's.
        """
        where = str(pretrained_model_name_or_path)
        try:
            with reading(where):
                return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except TypeError as error:
            raise DataError(f"{cls.__name__} cannot be made of what {where} and these options say: {error}") from error

    @classmethod
    def _from_pretrained(cls, *, model_id: str, strict: bool = True, **kwargs: Any) -> Backbone:
        """What ``from_pretrained`` makes; huggingface_hub's own leaves a network random where no name fits.

        Raises:
            DataError: weights that cannot be read or are another network's.
        """
        with reading(model_id):
            return super()._from_pretrained(model_id=model_id, strict=strict, **kwargs)

    def _run(self, blocks: nn.Sequential, x: Tensor) -> Tensor:
        return checkpoint_seq(blocks, x) if self.grad_checkpointing else blocks(x)


def check_pool(num_classes: int, global_pool: str | None) -> None:
    """Whether a head can be built: a classifier takes a vector per image, and without a pool there is a map.

    Raises:
        OptionError: a classifier without a pool.
    """
    if num_classes > 0 and not global_pool:
        raise OptionError(
            f"without a pool a map comes to the classifier, which takes vectors: with global_pool={global_pool!r} give "
            f"num_classes=0; received {num_classes}"
        )


class Bottleneck(nn.Module):
    """1 x 1 down, something spatial, 1 x 1 up, and the shortcut around them (He et al. 2016, arXiv:1512.03385; v1.5).

        y = relu( x' + up(relu(norm(pool(spatial(relu(down(x))))))) ),   x' = x, or a 1 x 1 projection of it

    The shortcut is a projection where the block changes size or channels. Every 1 x 1 convolution has a batch norm after it.

    Args:
        in_channels, width, out_channels: of the input, and after down and up.
        spatial: from ``width`` to ``spatial.out_channels`` channels. It strides, unless ``down`` or ``pool`` does.
        stride: of the whole block.
        dilation: see :func:`paces`; without a stride, two that differ make up for one.
        down: in place of the 1 x 1 convolution down.
        pool: after ``spatial``.
        avg_down: average the cells before a shortcut's projection, which else reads one of ``stride`` x ``stride``.
        norm, act: False leaves out the batch norm, the ReLU between ``spatial`` and up.
        drop_path: chance to skip the block for an image in training.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        spatial: nn.Module,
        *,
        stride: int = 1,
        dilation: tuple[int, int] = (1, 1),
        down: nn.Module | None = None,
        pool: nn.Module | None = None,
        avg_down: bool = False,
        norm: bool = True,
        act: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        channels: int = spatial.out_channels  # pyright: ignore[reportAssignmentType]
        down = nn.Conv2d(in_channels, width, 1, bias=False) if down is None else down
        self.down = nn.Sequential(down, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.spatial = spatial
        self.pool = nn.Identity() if pool is None else pool
        self.norm = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.act = nn.ReLU(inplace=True) if act else nn.Identity()
        self.up = nn.Sequential(nn.Conv2d(channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.shortcut = nn.Identity()
        halves = is_halving(stride, dilation)
        if halves or in_channels != out_channels:
            averages = avg_down and halves
            conv = nn.Conv2d(in_channels, out_channels, 1, 1 if averages else stride, bias=False)
            project = nn.Sequential(conv, nn.BatchNorm2d(out_channels))
            self.shortcut = nn.Sequential(average(stride, dilation[0]), project) if averages else project

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.pool(self.spatial(self.down(x)))))
        y = self.drop_path(self.up(y))
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


class BottleneckNet(Backbone):
    """A stem, stages of bottlenecks that halve the map from the second stage on, and a linear head.

    Args:
        depths: blocks per stage.
        block: makes one: ``block(stage, in_channels, stride=, dilation=, drop_path=)`` with stages counted from 1.
        out_channels: per stage.
        stem, stem_channels, stem_stride: the stem and what it puts out.
        final: between the last stage and the head, with its channels; None for nothing.
        in_chans: of the images.
        output_stride: see :func:`paces`.
        num_classes, global_pool, drop_rate, drop_path_rate: as everywhere in timm.
    """

    def __init__(
        self,
        depths: Sequence[int],
        block: Callable[..., Bottleneck],
        out_channels: Sequence[int],
        *,
        stem: nn.Module,
        stem_channels: int,
        stem_stride: int,
        final: Callable[[int], tuple[nn.Module, int]] | None = None,
        in_chans: int,
        output_stride: int | None,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        check_pool(num_classes, global_pool)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.stem = stem
        self.stages = nn.Sequential()
        self.feature_info = []
        channels, rates = stem_channels, drop_path_rates(drop_path_rate, depths)
        for stage, pace in enumerate(paces(len(depths), stem_stride, output_stride), start=1):
            blocks = nn.Sequential()
            for index, rate in enumerate(rates[stage - 1]):
                first = {"stride": pace.stride, "dilation": (pace.before, pace.dilation)}
                others = {"stride": 1, "dilation": (pace.dilation, pace.dilation)}
                blocks.append(block(stage, channels, **(others if index else first), drop_path=rate))
                channels = out_channels[stage - 1]
            self.stages.append(blocks)
            entry = {"num_chs": channels, "reduction": pace.reduction, "module": f"stages.{stage - 1}"}
            self.feature_info.append(entry)
        self.final, channels = (nn.Identity(), channels) if final is None else final(channels)
        self.num_features = self.head_hidden_size = channels
        self.head = ClassifierHead(channels, num_classes, pool_type=global_pool, drop_rate=drop_rate)

    def feature_maps(self, x: Tensor) -> Iterator[Tensor]:
        x = self.stem(x)
        for stage in self.stages:
            x = self._run(stage, x)  # pyright: ignore[reportArgumentType]
            yield x

    def finish(self, x: Tensor) -> Tensor:
        return self.final(x)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Throw away what no map at ``indices`` needs; returns the indices counted from the start."""
        wanted = take_indices(len(self.feature_info), indices)
        self.stages = self.stages[: max(wanted) + 1]
        if prune_norm:
            self.final = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm's layer-wise learning rate decay groups the parameters."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        return {"stem": r"^stem", "blocks": [(blocks, None), (r"^final", (99999,))]}


class Pace(NamedTuple):
    """How a stage goes from the map before it to its own, in cells of the map that it is given."""

    stride: int  # of its first block
    before: int  # how far apart the cells are that the first block mixes as neighbours
    dilation: int  # and the other blocks
    reduction: int  # pixels per cell of the stage's map


def paces(stages: int, reduction: int, output_stride: int | None) -> list[Pace]:
    """Stages that halve the map from the second on, until it has one cell per ``output_stride`` pixels.

    After that what would be a stride is a dilation, in that block and all that follow: every layer mixes the cells that it
    mixed before, and the network computes the same for more cells (the à trous algorithm, Chen et al. 2017,
    arXiv:1606.00915). Of every ``dilation``-th of them it is the undilated network's map, to rounding.

    Args:
        reduction: pixels per cell of the first stage's map.
        output_stride: None for no limit.

    Raises:
        OptionError: an ``output_stride`` that no stage's map has.

    Example:
        >>> [(pace.stride, pace.dilation) for pace in paces(4, 4, 8)]
        [(1, 1), (2, 1), (1, 2), (1, 4)]
    """
    output_stride = plain(output_stride)
    within = [reduction * 2**stage for stage in range(stages)]
    if output_stride is not None and output_stride not in within and not _is_beyond(output_stride, within[-1]):
        raise OptionError(
            f"output_stride must be one of {', '.join(map(str, within))}, pixels per cell, or a power of two above; "
            f"received {output_stride!r}"
        )
    found, dilation = [], 1
    for stage, pixels in enumerate(within):
        before, halves = dilation, stage > 0
        fits = output_stride is None or pixels <= output_stride
        dilation = dilation if fits else 2 * dilation
        found.append(Pace(2 if halves and fits else 1, before, dilation, pixels // dilation))
    return found


def _is_beyond(output_stride: Any, coarsest: int) -> bool:
    return isinstance(output_stride, int) and output_stride > coarsest and output_stride & (output_stride - 1) == 0


def is_halving(stride: int, dilation: tuple[int, int]) -> bool:
    """Whether a block halves the map, or would if its network's ``output_stride`` did not forbid it."""
    return stride > 1 or dilation[0] != dilation[1]


def average(stride: int, dilation: int = 1) -> nn.Module:
    """The mean of ``stride`` x ``stride`` cells that do not overlap; for a stride of 1, of 2 x 2 ``dilation`` apart."""
    # ceil_mode and the count keep odd sizes in step with a strided 1 x 1.
    return nn.AvgPool2d(stride, ceil_mode=True, count_include_pad=False) if stride > 1 else DilatedAverage2d(dilation)


class DilatedAverage2d(nn.Module):
    """Every cell becomes the mean of itself and the cells ``dilation`` further down and right, of those on the map.

    Example:
        >>> DilatedAverage2d(2)(torch.tensor([0.0, 1.0, 2.0]).view(1, 1, 1, 3)).flatten()
        tensor([1., 1., 2.])
    """

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        d = self.dilation
        x = (x + torch.cat([x[:, :, d:], x[:, :, -d:]], 2)) / 2  # at the end each with itself
        return (x + torch.cat([x[..., d:], x[..., -d:]], 3)) / 2

    def extra_repr(self) -> str:
        return f"dilation={self.dilation}"


def take_indices(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """timm's way of choosing from ``count`` feature maps: None for all, an int for the last so many, or a list.

    Raises:
        OptionError: an index that is not there.
    """
    indices = plain(indices)
    if indices is None or isinstance(indices, int):
        indices = range(-(count if indices is None else indices), 0)
    if not indices or not all(-count <= index < count for index in indices):
        raise OptionError(f"indices must be some of the {count} feature maps; received {list(indices)}")
    return [index % count for index in indices]


def drop_path_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Per stage and block: from 0 in the first block of the network linearly to ``last`` in its last."""
    rates = iter([last * block / max(1, sum(depths) - 1) for block in range(sum(depths))])
    return [list(islice(rates, depth)) for depth in depths]


def one_per_stage(name: str, value: Any, stages: int) -> list[Any]:
    """Spread one number (or word) over all stages, or check that there is one for each.

    Raises:
        OptionError: another number of them.
    """
    value = plain(value)
    values = [value] * stages if isinstance(value, (int, float, str)) else list(value)
    if len(values) != stages:
        raise OptionError(f"{name} must be one number or {stages}, one per stage; received {value}")
    return values


def known(name: str, given: Mapping[str, Any] | None, takers: Sequence[Callable], taken: set[str]) -> dict[str, Any]:
    """Arguments that are passed on, held against those that all who take them have, but for those ``taken`` already.

    Raises:
        OptionError: one that is not among them.
    """
    if not isinstance(given or {}, Mapping):
        raise OptionError(f"{name} must be a table of names and values; received {given!r}")
    allowed = set.intersection(*(set(inspect.signature(taker).parameters) for taker in takers)) - taken
    for one in given or {}:
        if one not in allowed:
            raise OptionError(f"{name} takes {', '.join(sorted(allowed)) or 'nothing here'}; received {one!r}")
    return dict(given or {})


def config(
    size: int,
    num_classes: int = 1000,
    *,
    reduction: int = 32,
    first_conv: str = "stem.0",
    classifier: str = "head.fc",
    **kwargs: Any,
) -> dict[str, Any]:
    """A timm configuration of a network that takes images of any size.

    Args:
        size: of the pictures that it is made for; the last map then has ``ceil(size / reduction)`` cells per axis.
        first_conv: what reads the picture, whose weights timm fits to other ``in_chans``.
    """
    cells = -(-size // reduction)
    normalisation = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    return {
        "num_classes": num_classes,
        "input_size": (3, size, size),
        "fixed_input_size": False,
        "pool_size": (cells, cells),
        "interpolation": "bicubic",
        "crop_pct": 0.875 if size >= 224 else 1.0,
        "first_conv": first_conv,
        "classifier": classifier,
        "license": "apache-2.0",
        **(normalisation if size >= 224 else {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}),
        **kwargs,
    }


def build(cls: type[Backbone], variant: str, pretrained: bool, maps: int, **kwargs: Any) -> nn.Module:
    """The network through timm's builder, which knows ``features_only`` (of ``maps`` maps), ``pretrained_cfg`` and kin."""
    features = {"feature_cls": "getter", "out_indices": tuple(range(maps))}
    kwargs = {"pretrained_filter_fn": fitting, **{name: plain(value) for name, value in kwargs.items()}}
    return build_model_with_cfg(cls, variant, pretrained, feature_cfg=features, **kwargs)
