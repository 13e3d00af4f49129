# SPDX-License-Identifier: Apache-2.0
"""SASA: ResNets in which attention takes the place of every spatial convolution.

Ramachandran, Parmar, Vaswani, Bello, Levskaya, Shlens 2019, "Stand-Alone Self-Attention in Vision Models",
arXiv:1906.05909.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from ..errors import OptionError
from ..layers import GlobalSelfAttention2d, LocalSelfAttention2d, SelfAttention
from ..positions import PositionLike, name_of, refuse_instance, refuse_shared
from ..window import plain
from .backbone import Bottleneck, BottleneckNet, build, config, known, one_per_stage, paces
from .blocks import BLOCKS, Dilation
from .shipped import SOURCES, TAGS, shipped
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

# What a network of convolutions (``attention_stages=()``) has no use for, and its block.
OF_ATTENTION = {"attn_kwargs", "img_size", "kernel_size", "num_heads", "position", "qk_ratio", "value_ratio"}
OF_ATTENTION_IN_BLOCKS = {"act", "downsample", "norm"}
# What the network itself says to each block, and to each attention layer.
SET_IN_BLOCKS = {"in_channels", "width", "out_channels", "attention", "stride", "dilation", "drop_path"}
SET_IN_LAYERS = {
    *("in_channels", "out_channels", "kernel_size", "stride", "num_heads", "qk_channels", "position", "map_size"),
    *("device", "dtype"),
}
# Positions that a dilated window finds the same entries of, whatever its dilation.
COUNTED_IN_STEPS = ("relative", "relative_shared", "bias", "cpb", "none")
READERS = {
    "attention": ("stem.qk", "stem.value")
}  # what reads the picture in a stem that does not begin with a convolution
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
    "block": "micro",
    "img_size": 32,
}
RESNET = {"stem": "conv", "attn_kwargs": {"recompute_qkv": True}}


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
        widths: bottleneck width per stage; a stage puts out ``expansion`` of its block times as many channels.
        block: what a stage is made of, by its name in ``nearsight.models.blocks.BLOCKS``: ``"sasa"``, the paper's,
            ``"sasa_relative_only"``, its Table 6, or ``"micro"``.
        block_kwargs: passed to every block; see :class:`MicroBlock`.
        attention_stages: stages (from 1) with attention; the others keep 3 x 3 convolutions. ``()`` gives the
            convolutional twin.
        kernel_size: side of the memory block, one or one per stage; ``"global"`` lets every cell see the whole map.
        num_heads: of every attention layer, one number or one per stage.
        value_ratio, qk_ratio: channels of attention's values, and of its queries and keys, per channel of the bottleneck;
            one number or one per stage. A convolution has a matrix for each of its cells. What reaches up from a cell here
            are the values of those heads that look at it, so wide values are what comes nearest.
        position: of every attention layer: a name, or a factory that makes an encoding for each; see
            :func:`nearsight.positions.register`.
        attn_kwargs: passed to every attention layer: ``scale``, ``border``, ``qkv_bias`` … ``recompute_qkv`` costs a little
            time and saves memory in training: the networks of the paper, ``sasa_resnet26/38/50``, have it, and with it
            SASA-ResNet-50 takes less memory than ResNet-50.
        stem: ``"attention"``, ``"conv"``, or ``"patch"``, a projection of patches of ``stem_stride`` pixels per side (of
            single pixels for stride 1). None takes the convolution where there is no attention stage, else patches for
            stride 1, else attention.
        stem_width: channels of the stem.
        stem_stride: pixels per cell after the stem, in each direction.
        img_size: side, or height and width, of the pictures that learned positions are made for, and of the largest that
            the relative tables of global attention serve.
        output_stride: pixels per cell beyond which the map is not halved: what would be a stride is a dilation there, and
            the network, with the same weights, computes the same for more cells; None for no limit. As attention's windows
            alone can be dilated, so that places are counted in steps of it, it takes local attention with a position that
            goes by entries of a table: "relative", "relative_shared", "bias", "cpb" or "none".
        num_classes, in_chans, global_pool, drop_rate, drop_path_rate: as everywhere in timm.

    Shapes: (B, in_chans, H, W) of any H and W -> (B, num_classes).

    Raises:
        OptionError: a stage that is not there, an unknown stem, block or option of it, widths, kernel sizes, heads or ratios
            for another number of stages, global attention in a block that has none, a position that layers would share.
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
        block: str = "sasa",
        block_kwargs: Mapping[str, Any] | None = None,
        attention_stages: Sequence[int] | None = None,
        kernel_size: int | str | Sequence[int | str] = 7,
        num_heads: int | Sequence[int] = 8,
        value_ratio: float | Sequence[float] = 1.0,
        qk_ratio: float | Sequence[float] = 1.0,
        position: PositionLike = "relative",
        attn_kwargs: Mapping[str, Any] | None = None,
        stem: str | None = None,
        stem_width: int = 64,
        stem_stride: int = 4,
        img_size: int | Sequence[int] = 224,
        output_stride: int | None = None,
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
        if block not in BLOCKS:
            raise OptionError(f"block must be one of {', '.join(BLOCKS)}; received {block!r}")
        kind = BLOCKS[block]
        widths = one_per_stage("widths", widths, len(depths))
        kernel_sizes = one_per_stage("kernel_size", kernel_size, len(depths))
        heads = one_per_stage("num_heads", num_heads, len(depths))
        value_ratios = one_per_stage("value_ratio", value_ratio, len(depths))
        qk_ratios = one_per_stage("qk_ratio", qk_ratio, len(depths))
        layers = [GlobalSelfAttention2d if kernel == "global" else LocalSelfAttention2d for kernel in kernel_sizes]
        if "global" in kernel_sizes and kind.layer is not LocalSelfAttention2d:
            raise OptionError(f'block={block!r} has local attention alone; received kernel_size="global"')
        block_kwargs = known("block_kwargs", block_kwargs, [kind], SET_IN_BLOCKS)
        attn_kwargs = known("attn_kwargs", attn_kwargs, layers, SET_IN_LAYERS)
        stem = default_stem(attending, stem_stride) if stem is None else stem
        plan = paces(len(depths), stem_stride, output_stride)
        dilated = [stage for stage in attending if plan[stage - 1].dilation > 1]
        in_steps = name_of(position) in COUNTED_IN_STEPS and "global" not in [kernel_sizes[at - 1] for at in dilated]
        if dilated and not in_steps:
            raise OptionError(
                f"output_stride={output_stride} dilates attention, which then computes the same for local attention with "
                f"position {', '.join(COUNTED_IN_STEPS)} alone; received position={name_of(position) or position!r}, "
                f"kernel_size={kernel_size!r}"
            )
        img_size = plain(img_size)
        sides = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)

        def attention(
            stage: int, stride: int, dilation: Dilation, local: type[LocalSelfAttention2d], *, halved: bool
        ) -> SelfAttention:
            reduction = plan[stage - 1].reduction // (1 if halved else stride)
            width, kernel = widths[stage - 1], kernel_sizes[stage - 1]
            values, queries = round(value_ratios[stage - 1] * width), round(qk_ratios[stage - 1] * width)
            kwargs = {
                "num_heads": heads[stage - 1],
                "qk_channels": queries,
                "map_size": tuple(-(-side // reduction) for side in sides),
                "position": position,
                **attn_kwargs,
            }
            if kernel == "global":
                return GlobalSelfAttention2d(width, values, **kwargs)
            apart = dilation[1] if halved else dilation[0]
            if apart > 1:
                kwargs["dilation"] = _times(kwargs.get("dilation", 1), apart)
            return local(width, values, kernel, **kwargs)

        def make(stage: int, in_channels: int, stride: int, dilation: Dilation, drop_path: float) -> Bottleneck:
            width = widths[stage - 1]
            channels = (in_channels, width, kind.expansion * width)
            options = {"stride": stride, "drop_path": drop_path, **block_kwargs}
            if dilation != (1, 1):  # a block of one's own need not know it
                options["dilation"] = dilation
            if stage not in attending:
                return kind.of_convolutions(*channels, **options)
            return kind(*channels, partial(attention, stage, stride, dilation), **options)

        super().__init__(
            depths,
            make,
            [kind.expansion * width for width in widths],
            stem=build_stem(stem, in_chans, stem_width, stem_stride),
            stem_channels=stem_width,
            stem_stride=stem_stride,
            in_chans=in_chans,
            output_stride=output_stride,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
        )
        refuse_shared(self.modules())
        if isinstance(self._hub_mixin_config, dict):
            self._hub_mixin_config["position"] = name_of(position)


def default_stem(attending: Collection[int], stem_stride: int) -> str:
    """The stem of a network that is not told which: a convolution before convolutions, and none before attention."""
    return "conv" if not attending else "patch" if stem_stride == 1 else "attention"


def _times(dilation: int | Sequence[int], factor: int) -> int | tuple[int, ...]:
    return tuple(one * factor for one in dilation) if isinstance(dilation, Sequence) else dilation * factor


_PAPER = "arXiv:1906.05909"
_OURS = (f"ours, after {_PAPER}",)
default_cfgs = generate_default_cfgs(
    {
        "sasa_nano.digits": config(
            8,
            10,
            reduction=4,
            file=str(shipped("sasa_nano")),
            input_size=(1, 8, 8),
            mean=(0.305,),
            std=(0.376,),
            interpolation="bilinear",
            label_names=tuple("0123456789"),
            notes=_OURS,
        ),
        "sasa_nano.untrained*": config(32, 10, reduction=4, notes=_OURS),  # also what the plain name is without weights
        "sasa_micro.untrained": config(32, 10, reduction=8, notes=_OURS),
        "sasa_resnet26_small.untrained": config(32, 10, reduction=8, notes=_OURS),
        "sasa_resnet26.untrained": config(224, paper_ids=_PAPER),
        "sasa_resnet38.untrained": config(224, paper_ids=_PAPER),
        "sasa_resnet50.untrained": config(224, paper_ids=_PAPER),
    }
)


def create(variant: str, pretrained: bool, defaults: Mapping[str, Any], **kwargs: Any) -> nn.Module:
    """A registered network; what is passed on to blocks and layers is joined to what its defaults pass on."""
    joined = {**defaults, **kwargs}
    for name in ("attn_kwargs", "block_kwargs"):
        if isinstance(kwargs.get(name), Mapping):
            joined[name] = {**defaults.get(name, {}), **kwargs[name]}
    attending = joined.get("attention_stages")
    stem = joined.get("stem") or default_stem([1] if attending is None else attending, joined.get("stem_stride", 4))
    overlay = {"first_conv": READERS.get(stem, "stem.0"), **(joined.pop("pretrained_cfg_overlay", None) or {})}
    maps = len(joined["depths"])
    if pretrained and not joined.get("pretrained_cfg") and not overlay.keys() & SOURCES:
        joined["pretrained_cfg"] = TAGS.get(variant)
    return build(SasaResNet, variant, pretrained, maps, pretrained_cfg_overlay=overlay, **joined)


@register_model
def sasa_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A network for images of 8 to 64 pixels with no spatial convolution in it: about 0.08 M parameters."""
    return create("sasa_nano", pretrained, NANO, **kwargs)


@register_model
def sasa_micro(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A network for images of 28 to 64 pixels that trains about as fast as its convolutional twin: 1.1 M parameters.

    A convolutional stem of stride 2, as the paper found best, then attention in every block; ``stem="patch"`` leaves no
    spatial convolution that overlaps. Not the paper's: heads start as hills at places of their own
    (``position="quadratic"``), values are wide and queries and keys narrow (``value_ratio``, ``qk_ratio``), and so is what
    stands around attention: :class:`nearsight.models.blocks.MicroBlock`.
    """
    return create("sasa_micro", pretrained, MICRO, **kwargs)


@register_model
def sasa_resnet26_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SASA-ResNet-26 for images of 28 to 64 pixels: a 3 x 3 convolution for a stem, at full resolution.

    ``stem_stride=2`` adds a 2 x 2 max-pool, for the larger ones.
    """
    small = {"depths": (1, 2, 4, 1), "stem": "conv", "stem_stride": 1, "img_size": 32}
    return create("sasa_resnet26_small", pretrained, small, **kwargs)


@register_model
def sasa_resnet26(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SASA-ResNet-26 with a convolutional stem: 10,342,632 parameters (Table 1: 10.3 M)."""
    return create("sasa_resnet26", pretrained, {"depths": (1, 2, 4, 1), **RESNET}, **kwargs)


@register_model
def sasa_resnet38(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SASA-ResNet-38 with a convolutional stem: 14,190,632 parameters (Table 1: 14.1 M)."""
    return create("sasa_resnet38", pretrained, {"depths": (2, 3, 5, 2), **RESNET}, **kwargs)


@register_model
def sasa_resnet50(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SASA-ResNet-50 with a convolutional stem: 18,038,632 parameters (Table 1: 18.0 M)."""
    return create("sasa_resnet50", pretrained, {"depths": (3, 4, 6, 3), **RESNET}, **kwargs)
