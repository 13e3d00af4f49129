# SPDX-License-Identifier: Apache-2.0
"""HaloNet: bottleneck ResNets of blocked local attention.

Vaswani, Ramachandran, Srinivas, Parmar, Hechtman, Shlens 2021, "Scaling Local Self-Attention for Parameter Efficient
Visual Backbones", arXiv:2103.12731.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from timm.models import generate_default_cfgs, register_model
from torch import nn

from ..layers import HaloSelfAttention2d
from .backbone import Bottleneck, BottleneckNet, build, config, one_per_stage
from .stem import build_stem

__all__ = ["HaloNet", "halo_h0", "halo_h1", "halo_h2", "halo_h3", "halo_h4", "halo_h5", "halo_h6", "halo_h7"]


class HaloNet(BottleneckNet):
    """A bottleneck ResNet whose spatial layers are :class:`HaloSelfAttention2d`.

        1 x 1 down to w = 64, 128, 256, 512, attention with values of w * value_ratio, 1 x 1 up to w * bottleneck_ratio

    The value ratio (the paper's r_v) widens the values alone: queries, keys and 1 x 1 convolution stay at w. Only that
    reading gives the parameter counts of H5 to H7; H0 to H4, where it is 1, cannot tell. Stride is in the attention, which
    computes every second query. ReLU and one batch norm per convolution and attention as in SASA; the paper's counts fit,
    its activations are not known to us. Borders are masked; ``border="zeros"`` gives the paper's zero padding.

    Args:
        depths: blocks per stage.
        block_size, halo_size: of the attention (the paper's b and h), in cells.
        value_ratio, bottleneck_ratio: r_v and r_b.
        final_width: channels of an extra 1 x 1 convolution before pooling (d_f); 0 for none.
        widths: bottleneck width per stage.
        num_heads: one or one per stage.
        stem_width, stem_stride: the stem is convolutional, and stem_stride 1 or 2 serves small images.
        border, scale: of every attention layer.
        output_stride: pixels per cell beyond which the map is not halved: what would be a stride is a dilation there, and
            the network, with the same weights, computes the same for more cells; None for no limit.
        num_classes, in_chans, global_pool, drop_rate, drop_path_rate: as everywhere in timm.

    Shapes: (B, in_chans, H, W) of any H and W -> (B, num_classes).

    Raises:
        OptionError: an unknown border, sizes below 1, widths or heads for another number of stages.
        ShapeError: widths that heads or ratios do not divide.

    Example:
        >>> HaloNet((1, 1), widths=(16, 32), num_heads=4, block_size=4, halo_size=1)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 1000])
    """

    def __init__(
        self,
        depths: Sequence[int],
        *,
        block_size: int = 8,
        halo_size: int = 3,
        value_ratio: float = 1.0,
        bottleneck_ratio: float = 1.0,
        final_width: int = 0,
        widths: Sequence[int] = (64, 128, 256, 512),
        num_heads: int | Sequence[int] = (4, 8, 8, 8),
        stem_width: int = 64,
        stem_stride: int = 4,
        border: str = "mask",
        scale: float | None = None,
        output_stride: int | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        widths = one_per_stage("widths", widths, len(depths))
        heads = one_per_stage("num_heads", num_heads, len(depths))
        attention = partial(
            HaloSelfAttention2d,
            block_size=block_size,
            halo_size=halo_size,
            value_ratio=value_ratio,
            border=border,
            scale=scale,
        )

        def block(stage: int, in_channels: int, stride: int, dilation: tuple[int, int], drop_path: float) -> Bottleneck:
            width = widths[stage - 1]
            spatial = attention(width, stride=stride, dilation=dilation[0], num_heads=heads[stage - 1])
            out_channels = round(width * bottleneck_ratio)
            around = {"stride": stride, "dilation": dilation, "drop_path": drop_path}
            return Bottleneck(in_channels, width, out_channels, spatial, **around)

        super().__init__(
            depths,
            block,
            [round(width * bottleneck_ratio) for width in widths],
            stem=build_stem("conv", in_chans, stem_width, stem_stride),
            stem_channels=stem_width,
            stem_stride=stem_stride,
            final=partial(_final, out_channels=final_width) if final_width else None,
            in_chans=in_chans,
            output_stride=output_stride,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )


def _final(in_channels: int, out_channels: int) -> tuple[nn.Module, int]:
    conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU()), out_channels


class _Row(NamedTuple):
    """A row of the paper's table of networks."""

    block_size: int
    halo_size: int
    value_ratio: float
    bottleneck_ratio: float
    depth: int  # of stage 3; the others have 3 blocks
    final_width: int
    image_size: int


_TABLE = {
    "halo_h0": _Row(8, 3, 1.0, 0.5, 7, 0, 256),
    "halo_h1": _Row(8, 3, 1.0, 1.0, 10, 0, 256),
    "halo_h2": _Row(8, 3, 1.0, 1.25, 11, 0, 256),
    "halo_h3": _Row(10, 3, 1.0, 1.5, 12, 1024, 320),
    "halo_h4": _Row(12, 2, 1.0, 3.0, 12, 1280, 384),
    "halo_h5": _Row(14, 2, 2.5, 2.0, 23, 1536, 448),
    "halo_h6": _Row(8, 4, 3.0, 2.75, 24, 1536, 512),
    "halo_h7": _Row(10, 3, 4.0, 3.5, 26, 2048, 600),
}
default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": config(row.image_size, paper_ids="arXiv:2103.12731") for name, row in _TABLE.items()}
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    row = _TABLE[variant]._asdict()
    del row["image_size"]
    arguments = {"depths": (3, 3, row.pop("depth"), 3), **row, **kwargs}
    return build(HaloNet, variant, pretrained, len(arguments["depths"]), **arguments)


@register_model
def halo_h0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HaloNet-H0, 256 pixels: 5,502,248 parameters."""
    return _create("halo_h0", pretrained, **kwargs)


@register_model
def halo_h1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HaloNet-H1, 256 pixels: 8,101,352 parameters."""
    return _create("halo_h1", pretrained, **kwargs)


@register_model
def halo_h2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HaloNet-H2, 256 pixels: 9,405,608 parameters."""
    return _create("halo_h2", pretrained, **kwargs)


@register_model
def halo_h3(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HaloNet-H3, 320 pixels: 11,842,792 parameters."""
    return _create("halo_h3", pretrained, **kwargs)


@register_model
def halo_h4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HaloNet-H4, 384 pixels: 19,103,464 parameters."""
    return _create("halo_h4", pretrained, **kwargs)


@register_model
def halo_h5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HaloNet-H5, 448 pixels: 30,718,952 parameters."""
    return _create("halo_h5", pretrained, **kwargs)


@register_model
def halo_h6(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HaloNet-H6, 512 pixels: 43,458,280 parameters."""
    return _create("halo_h6", pretrained, **kwargs)


@register_model
def halo_h7(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """HaloNet-H7, 600 pixels: 67,434,728 parameters."""
    return _create("halo_h7", pretrained, **kwargs)
