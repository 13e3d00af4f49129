# SPDX-License-Identifier: Apache-2.0
"""SASA: ResNets in which attention takes the place of every spatial convolution.

Ramachandran, Parmar, Vaswani, Bello, Levskaya, Shlens 2019, "Stand-Alone Self-Attention in Vision Models",
arXiv:1906.05909.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from ..errors import OptionError
from ..layers import AttentionStem2d, LocalSelfAttention2d
from ..positions import Position

__all__ = ["SasaResNet", "sasa_nano"]

EXPANSION = 4


class SasaResNet(nn.Module):
    """A bottleneck ResNet with local self-attention in place of its 3 x 3 convolutions.

    Where the convolution had stride 2, attention runs at full resolution and a 2 x 2 average pool follows it directly
    (section 4.1 of the paper). 1 x 1 convolutions, batch norms, activations and shortcuts stay. The paper is silent on
    borders: windows are masked at the image's edge. It has no factor in the logits; we divide by sqrt(head_dim), and
    ``scale=1.0`` gives the paper's.

    Args:
        depths: blocks per stage.
        widths: bottleneck width per stage; a stage puts out four times as many channels.
        stem: ``"attention"``, ``"conv"``, or ``"pixel"``, a 1 x 1 projection that makes every pixel a cell. None takes
            the convolution where there is no attention stage, else the pixel stem for stride 1, else attention.
        stem_width: channels of the stem.
        stem_stride: pixels per cell after the stem, in each direction.
        attention_stages: stages (from 1) with attention; the others keep 3 x 3 convolutions. ``()`` gives the
            convolutional twin.
        kernel_size: side of the memory block, one or one per stage.
        num_heads, position, scale: of every attention layer.
        num_classes, in_chans, global_pool, drop_rate: as everywhere in timm.

    Raises:
        OptionError: a stage that is not there, an unknown stem, as many kernel sizes as there are no stages.
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int] = (64, 128, 256, 512),
        *,
        stem: str | None = None,
        stem_width: int = 64,
        stem_stride: int = 4,
        attention_stages: Sequence[int] | None = None,
        kernel_size: int | Sequence[int] = 7,
        num_heads: int = 8,
        position: str | Position = "relative",
        scale: float | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        stages = range(1, len(depths) + 1)
        attention_stages = tuple(stages if attention_stages is None else attention_stages)
        if not set(attention_stages) <= set(stages):
            raise OptionError(f"attention_stages must be among {list(stages)}; received {attention_stages}")
        kernel_sizes = [kernel_size] * len(depths) if isinstance(kernel_size, int) else list(kernel_size)
        if len(kernel_sizes) != len(depths):
            raise OptionError(f"kernel_size must be one number or {len(depths)}, one per stage; received {kernel_size}")
        self.num_classes = num_classes
        self.grad_checkpointing = False
        if stem is None:
            stem = "conv" if not attention_stages else "pixel" if stem_stride == 1 else "attention"
        self.stem = _stem(stem, in_chans, stem_width, stem_stride)
        self.feature_info = [{"num_chs": stem_width, "reduction": stem_stride, "module": "stem"}]
        self.stages = nn.Sequential()
        channels, reduction = stem_width, stem_stride
        for stage, depth, width, side in zip(stages, depths, widths, kernel_sizes, strict=True):
            blocks = nn.Sequential()
            for block in range(depth):
                stride = 2 if stage > 1 and block == 0 else 1
                spatial = _attention(width, side, num_heads, position, scale) if stage in attention_stages else None
                blocks.append(Bottleneck(channels, width, stride, spatial))
                channels, reduction = EXPANSION * width, reduction * stride
            self.stages.append(blocks)
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"stages.{stage - 1}"})
        self.num_features = self.head_hidden_size = channels
        self.head = ClassifierHead(channels, num_classes, pool_type=global_pool, drop_rate=drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, (B, num_features, H, W)."""
        x = self.stem(x)
        for stage in self.stages:
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits)

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm's layer-wise learning rate decay groups the parameters."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}


class Bottleneck(nn.Module):
    """1 x 1 down, attention or a 3 x 3 convolution, 1 x 1 up, and the shortcut around them (ResNet v1.5).

    ``spatial`` is the attention layer, or None for the convolution.
    """

    def __init__(self, in_channels: int, width: int, stride: int, spatial: nn.Module | None) -> None:
        super().__init__()
        out_channels = EXPANSION * width
        self.down = nn.Sequential(nn.Conv2d(in_channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        if spatial is None:
            self.spatial = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
            self.pool = nn.Identity()
        else:
            self.spatial = spatial
            # ceil_mode and the count keep odd sizes in step with the shortcut.
            self.pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False) if stride == 2 else nn.Identity()
        self.norm = nn.BatchNorm2d(width)
        self.up = nn.Sequential(nn.Conv2d(width, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels))
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.spatial(self.down(x)))
        y = self.up(F.relu(self.norm(y)))
        return F.relu(y + self.shortcut(x))


def _attention(
    width: int, kernel_size: int, num_heads: int, position: str | Position, scale: float | None
) -> nn.Module:
    return LocalSelfAttention2d(width, kernel_size=kernel_size, num_heads=num_heads, position=position, scale=scale)


def _stem(name: str, in_chans: int, width: int, stride: int) -> nn.Module:
    if name == "attention":
        return AttentionStem2d(in_chans, width, kernel_size=stride)
    if name == "pixel" and stride == 1:
        conv, pool = nn.Conv2d(in_chans, width, 1, bias=False), nn.Identity()
    elif name == "conv" and stride < 4:
        # Small images keep their resolution in the convolution.
        conv, pool = nn.Conv2d(in_chans, width, 3, padding=1, bias=False), nn.MaxPool2d(stride, ceil_mode=True)
    elif name == "conv" and stride == 4:
        conv, pool = nn.Conv2d(in_chans, width, 7, 2, padding=3, bias=False), nn.MaxPool2d(3, 2, padding=1)
    else:
        raise OptionError(
            f"stem must be 'attention', 'conv' (stem_stride up to 4) or 'pixel' (stem_stride 1); "
            f"received {name!r} with stem_stride={stride}"
        )
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU(), pool)


def _cfg(num_classes: int, size: int, **kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": num_classes,
        "input_size": (3, size, size),
        "fixed_input_size": False,
        "pool_size": None,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": None,
        "classifier": "head.fc",
        "license": "apache-2.0",
        **kwargs,
    }


default_cfgs = generate_default_cfgs({"sasa_nano.untrained": _cfg(10, 32)})


def _create(variant: str, pretrained: bool, depths: Sequence[int], **kwargs: Any) -> nn.Module:
    features = {"flatten_sequential": True, "out_indices": tuple(range(len(depths) + 1))}
    return build_model_with_cfg(SasaResNet, variant, pretrained, depths=depths, feature_cfg=features, **kwargs)


@register_model
def sasa_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A network for images of 8 to 64 pixels with no spatial convolution in it: about 0.08 M parameters."""
    small = {"depths": (1, 2, 1), "widths": (16, 32, 48), "stem_width": 32, "stem_stride": 1, "num_heads": 4}
    return _create("sasa_nano", pretrained, **{"kernel_size": 5, **small, **kwargs})
