# SPDX-License-Identifier: Apache-2.0
"""What the small networks of attention are held against: the same network of convolutions, and a transformer of patches.

They are registered with timm and can be named wherever a model is; ``nearsight models`` lists them after ours.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from .backbone import config
from .sasa import MICRO, NANO, create

__all__ = ["conv_micro", "conv_nano", "vit_micro"]

CONVOLUTIONAL = ("conv_micro", "conv_nano")

default_cfgs = generate_default_cfgs(
    {
        "conv_nano.untrained": config(32, 10, reduction=4, notes=("sasa_nano with convolutions",)),
        "conv_micro.untrained": config(32, 10, reduction=8, notes=("sasa_micro with convolutions",)),
        "vit_micro.untrained": config(
            32,
            10,
            first_conv="patch_embed.proj",
            classifier="head",
            fixed_input_size=True,
            pool_size=None,
            paper_ids="arXiv:2010.11929",
        ),
    }
)


@register_model
def conv_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The twin of ``sasa_nano``: 3 x 3 convolutions in the place of attention, in the stem too, and all else the same."""
    return create("conv_nano", pretrained, NANO, attention_stages=(), **kwargs)


@register_model
def conv_micro(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The twin of ``sasa_micro``: 3 x 3 convolutions in the place of attention, and widths, depths and stem the same.

    A norm and a ReLU follow them, and they stride where ``sasa_micro`` projects patches of 2 x 2 cells: a ResNet's ways.
    """
    return create("conv_micro", pretrained, MICRO, attention_stages=(), **kwargs)


@register_model
def vit_micro(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's Vision Transformer on patches of 4 x 4 pixels, with as many parameters as ``sasa_micro`` within 3 %.

    Dosovitskiy et al. 2021, arXiv:2010.11929. It takes images of one size, ``img_size``, 32 unless given.
    """
    size = {"patch_size": 4, "embed_dim": 150, "depth": 4, "num_heads": 3}
    features = {"feature_cls": "getter", "out_indices": 3}
    return build_model_with_cfg(VisionTransformer, "vit_micro", pretrained, feature_cfg=features, **{**size, **kwargs})
