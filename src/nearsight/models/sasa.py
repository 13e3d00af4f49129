# SPDX-License-Identifier: Apache-2.0
"""SASA: ResNets in which attention takes the place of every spatial convolution.

Ramachandran, Parmar, Vaswani, Bello, Levskaya, Shlens 2019, "Stand-Alone Self-Attention in Vision Models",
arXiv:1906.05909.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from ..errors import OptionError
from ..layers import GlobalSelfAttention2d, LocalSelfAttention2d, SelfAttention
from ..positions import PositionLike, RelativePosition, name_of, refuse_instance, refuse_shared
from .backbone import Bottleneck, BottleneckNet, build, config, one_per_stage
from .stem import build_stem

__all__ = [
    "SasaResNet",
    "sasa_micro",
    "sasa_nano",
    "sasa_resnet26",
    "sasa_resnet26_small",
    "sasa_resnet38",
    "sasa_resnet50",
]

# What a network of convolutions (``attention_stages=()``) has no use for.
OF_ATTENTION = {
    *("content", "downsample", "img_size", "kernel_size", "num_heads", "position", "post_attn_act", "post_attn_norm"),
    *("qk_ratio", "recompute_qkv", "scale", "value_ratio"),
}
NANO = {
    "depths": (1, 2, 1),
    "widths": (16, 32, 48),
    "stem_width": 32,
    "stem_stride": 1,
    "num_heads": 4,
    "kernel_size": 5,
    "img_size": 32,
}
MICRO = {
    "depths": (1, 1, 2),
    "widths": (48, 96, 224),
    "stem": "conv",
    "stem_width": 32,
    "stem_stride": 2,
    "num_heads": (6, 12, 14),
    "value_ratio": (2, 2, 1.75),
    "qk_ratio": (0.5, 0.5, 0.25),
    "kernel_size": (3, 5, 5),
    "position": "quadratic",
    "expansion": 2,
    "downsample": "patch",
    "avg_down": True,
    "post_attn_act": False,
    "post_attn_norm": False,
    "img_size": 32,
}


class SasaResNet(BottleneckNet):
    """A bottleneck ResNet with local self-attention in place of its 3 x 3 convolutions.

        1 x 1 convolution, 7 x 7 attention with 8 heads, 2 x 2 average pool where the convolution had stride 2, 1 x 1 up

    1 x 1 convolutions, batch norms, activations and shortcuts stay (section 4.1 of the paper). The paper leaves open or
    contradicts itself on:

    - projections: its text has one d/N x d/N matrix per head, its parameter counts (Table 1) need full ones: full;
    - biases and an output projection: not mentioned, and the counts fit without: none;
    - row and column vectors: not said whether the heads share them: every head has its own, which also fits the counts;
    - scale: no factor in its equations; we divide the logits by sqrt(head_dim), and ``scale=1.0`` gives the paper's;
    - borders: silent; cells outside the image take no part;
    - stride: ResNet v1.5 (in the spatial layer), where alone its FLOPs fit. Attention runs at full resolution before the
      pool, which the paper does say;
    - mixtures of the attention stem: their number is not stated; 4, see :class:`AttentionStem2d`;
    - which stem is better: Table 1 has the attention stem ahead for ResNet-50 (77.6 against 77.4) and behind for 26 and
      38, and the text calls the convolutional one at least as good. It needs fewer FLOPs, and Tables 3 to 6 are built on
      it: ``sasa_resnet*`` have ``stem="conv"``.

    Args:
        depths: blocks per stage.
        widths: bottleneck width per stage; a stage puts out ``expansion`` times as many channels.
        stem: ``"attention"``, ``"conv"``, or ``"patch"``, a projection of patches of ``stem_stride`` pixels per side (of
            single pixels for stride 1). None takes the convolution where there is no attention stage, else patches for
            stride 1, else attention.
        stem_width: channels of the stem.
        stem_stride: pixels per cell after the stem, in each direction.
        attention_stages: stages (from 1) with attention; the others keep 3 x 3 convolutions. ``()`` gives the
            convolutional twin.
        kernel_size: side of the memory block, one or one per stage; ``"global"`` lets every cell see the whole map.
        expansion: channels that a stage puts out per channel of its bottleneck.
        downsample: how a stage's first block halves the map: ``"pool"``, after its attention, as the paper does, or
            ``"patch"``: the 1 x 1 down becomes a projection of 2 x 2 cells (Swin's patch merging, Liu et al. 2021,
            arXiv:2103.14030), so that attention runs on the halved map, at a quarter of the cost.
        avg_down: where the map is halved, average 2 x 2 cells before the shortcut's projection, which else reads one of the
            four (ResNet-D, He et al. 2019, arXiv:1812.01187, and timm's word). For the convolutional twin too.
        post_attn_act: a ReLU between attention's norm and the 1 x 1 up, as there is after a convolution. Without it up is
            attention's output projection: softmax makes means, and a ReLU right after them hides the sign of what differs
            between two of them before up can subtract one from the other.
        post_attn_norm: attention's norm. Up is linear and has one of its own, so that without the ReLU this one can go.
        num_heads: of every attention layer, one number or one per stage.
        value_ratio, qk_ratio: channels of attention's values, and of its queries and keys, per channel of the bottleneck;
            one number or one per stage. A convolution has a matrix for each of its cells. What reaches up from a cell here
            are the values of those heads that look at it, so wide values are what comes nearest.
        position: of every attention layer: a name, or a factory that makes an encoding for each; see
            :func:`nearsight.positions.register`.
        scale: of every attention layer.
        content: False leaves out q.k, and with it the key's projection (Table 6).
        recompute_qkv: of every attention layer: less memory in training for a little more time. The networks of the paper,
            ``sasa_resnet26/38/50``, have it: with it SASA-ResNet-50 takes less memory than ResNet-50.
        img_size: side, or height and width, of the pictures that learned positions are made for, and of the largest that
            the relative tables of global attention serve.
        num_classes, in_chans, global_pool, drop_rate, drop_path_rate: as everywhere in timm.

    Shapes: (B, in_chans, H, W) of any H and W -> (B, num_classes).

    Raises:
        OptionError: a stage that is not there, an unknown stem or downsample, widths, kernel sizes, heads or ratios for
            another number of stages, ``content=False`` with global attention, a position that layers would share.
        ShapeError: channels that heads do not divide, pictures larger than ``img_size`` for global attention with tables.

    Example:
        >>> SasaResNet((1, 1), (16, 32), stem_stride=1, num_heads=4)(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 1000])
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
        kernel_size: int | str | Sequence[int | str] = 7,
        expansion: int = 4,
        downsample: str = "pool",
        avg_down: bool = False,
        post_attn_act: bool = True,
        post_attn_norm: bool = True,
        num_heads: int | Sequence[int] = 8,
        value_ratio: float | Sequence[float] = 1.0,
        qk_ratio: float | Sequence[float] = 1.0,
        position: PositionLike = "relative",
        content: bool = True,
        scale: float | None = None,
        recompute_qkv: bool = False,
        img_size: int | Sequence[int] = 224,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        refuse_instance(position)
        stages = range(1, len(depths) + 1)
        attending = set(stages if attention_stages is None else attention_stages)
        if not attending <= set(stages):
            raise OptionError(f"attention_stages must be among {list(stages)}; received {attention_stages}")
        widths = one_per_stage("widths", widths, len(depths))
        kernel_sizes = one_per_stage("kernel_size", kernel_size, len(depths))
        heads = one_per_stage("num_heads", num_heads, len(depths))
        value_ratios = one_per_stage("value_ratio", value_ratio, len(depths))
        qk_ratios = one_per_stage("qk_ratio", qk_ratio, len(depths))
        if stem is None:
            stem = "conv" if not attending else "patch" if stem_stride == 1 else "attention"
        if downsample not in ("pool", "patch"):
            raise OptionError(f"downsample must be 'pool' or 'patch'; received {downsample!r}")
        if "global" in kernel_sizes and not content:
            raise OptionError('content=False needs local attention; received kernel_size="global"')
        sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        shared = {"position": position, "scale": scale, "recompute_qkv": recompute_qkv}

        def attention(stage: int, width: int, stride: int) -> SelfAttention:
            # The map that it looks at: a block that halves it does so after its attention, unless told otherwise.
            reduction = stem_stride * 2 ** (stage - 1) // (1 if downsample == "patch" else stride)
            map_size = tuple(-(-side // reduction) for side in sides)
            values, queries = round(value_ratios[stage - 1] * width), round(qk_ratios[stage - 1] * width)
            kwargs = {"num_heads": heads[stage - 1], "qk_channels": queries, "map_size": map_size, **shared}
            if kernel_sizes[stage - 1] == "global":
                return GlobalSelfAttention2d(width, values, **kwargs)
            local = LocalSelfAttention2d if content else RelativeOnlySelfAttention2d
            return local(width, values, kernel_sizes[stage - 1], **kwargs)

        def block(stage: int, in_channels: int, stride: int, drop_path: float) -> Bottleneck:
            width = widths[stage - 1]
            options = {"stride": stride, "drop_path": drop_path, "avg_down": avg_down}
            if stage not in attending:
                spatial = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
            else:
                spatial = attention(stage, width, stride)
                options |= {"downsample": downsample, "act": post_attn_act, "norm": post_attn_norm}
            return Bottleneck(in_channels, width, spatial.out_channels, expansion * width, spatial, **options)

        super().__init__(
            depths,
            block,
            [expansion * width for width in widths],
            stem=build_stem(stem, in_chans, stem_width, stem_stride),
            stem_channels=stem_width,
            stem_stride=stem_stride,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )
        refuse_shared(self.modules())
        if isinstance(self._hub_mixin_config, dict):
            self._hub_mixin_config["position"] = name_of(position)


class RelativeOnlySelfAttention2d(LocalSelfAttention2d):
    """Local self-attention by q.r alone: where to look does not depend on what is there (Table 6 of the SASA paper).

        q, v = W x;   y[p] = sum_{c in N(p)} softmax_c( scale * q[p] . r[c - p] ) v[c]   in each head

    It is :class:`LocalSelfAttention2d` with keys of zero, and has no projection that makes them: qk_channels * in_channels
    parameters less. state_dict: as there, without the key's rows.

    Raises:
        OptionError: also for another position than relative embeddings.

    Example:
        >>> RelativeOnlySelfAttention2d(64, 128, 7, stride=2)(torch.randn(2, 64, 32, 32)).shape
        torch.Size([2, 128, 16, 16])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.position, RelativePosition):
            raise OptionError(
                f"q.r alone needs position='relative', which has an r; received {type(self.position).__name__}"
            )

    @property
    def _widths(self) -> list[int]:
        return [self.qk_channels, self.out_channels]

    def _split(self, projected: Sequence[Tensor]) -> list[Tensor]:
        query, value = super()._split(projected)
        return [query, value.new_zeros(()).expand(*value.shape[:-1], self.head_dim), value]


default_cfgs = generate_default_cfgs(
    {
        "sasa_nano.untrained": config(32, 10),
        "sasa_micro.untrained": config(32, 10),
        "sasa_resnet26_small.untrained": config(32, 10),
        "sasa_resnet26.untrained": config(224),
        "sasa_resnet38.untrained": config(224),
        "sasa_resnet50.untrained": config(224),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    return build(SasaResNet, variant, pretrained, 1 + len(kwargs["depths"]), **kwargs)


@register_model
def sasa_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A network for images of 8 to 64 pixels with no spatial convolution in it: about 0.08 M parameters."""
    return _create("sasa_nano", pretrained, **{**NANO, **kwargs})


@register_model
def sasa_micro(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A network for images of 28 to 64 pixels that trains about as fast as its convolutional twin: 1.1 M parameters.

    A convolutional stem of stride 2, as the paper found best, then attention in every block; ``stem="patch"`` leaves no
    spatial convolution that overlaps. Not the paper's: heads start as hills at places of their own
    (``position="quadratic"``), values are wide and queries and keys narrow (``value_ratio``, ``qk_ratio``), no norm and no
    ReLU stand right after attention (``post_attn_norm=False``, ``post_attn_act=False``), and where the map is halved patches
    of 2 x 2 cells are projected (``downsample="patch"``) and the shortcut averages them (``avg_down=True``).
    """
    return _create("sasa_micro", pretrained, **{**MICRO, **kwargs})


@register_model
def sasa_resnet26_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SASA-ResNet-26 for images of 28 to 64 pixels: a 3 x 3 convolution for a stem, at full resolution.

    ``stem_stride=2`` adds a 2 x 2 max-pool, for the larger ones.
    """
    small = {"depths": (1, 2, 4, 1), "stem": "conv", "stem_stride": 1, "img_size": 32}
    return _create("sasa_resnet26_small", pretrained, **{**small, **kwargs})


@register_model
def sasa_resnet26(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SASA-ResNet-26 with a convolutional stem: 10,342,632 parameters (Table 1: 10.3 M)."""
    return _create(
        "sasa_resnet26", pretrained, **{"depths": (1, 2, 4, 1), "stem": "conv", "recompute_qkv": True, **kwargs}
    )


@register_model
def sasa_resnet38(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SASA-ResNet-38 with a convolutional stem: 14,190,632 parameters (Table 1: 14.1 M)."""
    return _create(
        "sasa_resnet38", pretrained, **{"depths": (2, 3, 5, 2), "stem": "conv", "recompute_qkv": True, **kwargs}
    )


@register_model
def sasa_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SASA-ResNet-50 with a convolutional stem: 18,038,632 parameters (Table 1: 18.0 M)."""
    return _create(
        "sasa_resnet50", pretrained, **{"depths": (3, 4, 6, 3), "stem": "conv", "recompute_qkv": True, **kwargs}
    )
