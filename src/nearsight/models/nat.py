# SPDX-License-Identifier: Apache-2.0
"""NAT and DiNAT: hierarchical transformers of neighbourhood attention, plain and dilated.

Hassani, Walton, Li, Li, Shi 2023, "Neighborhood Attention Transformer", arXiv:2204.07143.
Hassani, Shi 2022, "Dilated Neighborhood Attention Transformer", arXiv:2209.15001.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import DropPath, Mlp, SelectAdaptivePool2d, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..attention import attention_weights, local_attention
from ..errors import OptionError, ShapeError
from ..layers.whole import one_node
from ..positions import Tables
from ..private import unflatten
from ..window import Window
from .backbone import Backbone, Pace, build, check_pool, config, drop_path_rates, paces, take_indices
from .checkpoints import reading
from .published import from_published, refuse_other, resolve

__all__ = [
    "Nat",
    "dinat_base",
    "dinat_large",
    "dinat_mini",
    "dinat_small",
    "dinat_tiny",
    "nat_base",
    "nat_mini",
    "nat_small",
    "nat_tiny",
]


class Nat(Backbone):
    """Two strided convolutions, levels of pre-norm transformer blocks with neighbourhood attention, and a linear head.

        x = x + gamma1 * attention(norm(x));   x = x + gamma2 * mlp(norm(x))

    The window of every query is shifted inside the image (``border="shift"``), with a bias per head and offset. Between
    levels a strided 3 x 3 convolution halves the map and doubles the channels.

    state_dict: names and shapes of the checkpoints that github.com/SHI-Labs/Neighborhood-Attention-Transformer publishes,
    so ``create_model("nat_mini", checkpoint_path="nat_mini.pth")`` loads them. Differs from that code on maps smaller than
    the window, which it pads with cells that vote; here a query sees the cells there are.

    Args:
        depths: blocks per level.
        num_heads: per level.
        embed_dim: channels of the first level.
        mlp_ratio: hidden channels of the mlp per channel.
        kernel_size: of the neighbourhood, one for all blocks.
        dilations: per level and block; None for 1 everywhere.
        layer_scale: start of the gammas; None for none.
        output_stride: pixels per cell beyond which the map is not halved: what would be a stride is a dilation there, and
            the network, with the same weights, computes the same for more cells; None for no limit.
        num_classes, in_chans, global_pool, drop_rate, drop_path_rate: as everywhere in timm.

    Shapes: (B, in_chans, H, W) of any H and W -> (B, num_classes).

    Raises:
        OptionError: dilations for other blocks than there are.
        ShapeError: heads that do not divide the channels.

    Example:
        >>> Nat((1, 1), (2, 4), embed_dim=16)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 1000])
    """

    def __init__(
        self,
        depths: Sequence[int],
        num_heads: Sequence[int],
        *,
        embed_dim: int = 64,
        mlp_ratio: float = 3.0,
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        layer_scale: float | None = None,
        output_stride: int | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
    ) -> None:
        super().__init__()
        dilations = [[1] * depth for depth in depths] if dilations is None else dilations
        if [len(level) for level in dilations] != list(depths) or len(num_heads) != len(depths):
            raise OptionError(
                f"num_heads must have one entry per level and dilations one per block, depths={depths}; "
                f"received num_heads={num_heads}, dilations={dilations}"
            )
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.patch_embed = PatchEmbed(in_chans, embed_dim)
        self.levels = nn.ModuleList()
        self.feature_info = []
        rates = drop_path_rates(drop_path_rate, depths)
        plan = paces(len(depths), 4, output_stride)
        for index, heads in enumerate(num_heads):
            pace, to_next = plan[index], plan[index + 1 : index + 2]
            channels = embed_dim * 2**index
            blocks = [
                Block(
                    channels,
                    heads,
                    Window(kernel_size, dilation=dilation * pace.dilation, border="shift"),
                    mlp_ratio,
                    layer_scale,
                    rate,
                )
                for dilation, rate in zip(dilations[index], rates[index], strict=True)
            ]
            self.levels.append(Level(blocks, Downsample(channels, to_next[0]) if to_next else nn.Identity()))
            self.feature_info.append({"num_chs": channels, "reduction": pace.reduction, "module": f"levels.{index}"})
        self.num_features = channels
        self.norm: nn.Module = nn.LayerNorm(channels)
        self.global_pool = _pool(global_pool)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)
        self.apply(_initialise)

    def feature_maps(self, x: Tensor) -> Iterator[Tensor]:
        x = self.patch_embed(x)
        for level in self.levels:
            for block in level.blocks:  # pyright: ignore[reportGeneralTypeIssues]
                x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
            yield x.permute(0, 3, 1, 2)
            x = level.downsample(x)  # pyright: ignore[reportCallIssue]

    def finish(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Swap the classifier for a fresh one of ``num_classes`` outputs; 0 removes it.

        Raises:
            OptionError: a classifier without a pool before it.
        """
        check_pool(num_classes, self.global_pool.pool_type if global_pool is None else global_pool)
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = _pool(global_pool)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        like = self.levels[0].blocks[0].norm1.weight  # pyright: ignore
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=like.device, dtype=like.dtype)
            _initialise(self.head)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, cache_dir: Any = None, **kwargs: Any) -> Backbone:
        """A folder or repository that transformers wrote is read as one; others as huggingface_hub does."""
        source = "local-dir" if Path(model_id).is_dir() else "hf-hub"
        found = resolve(f"{source}:{model_id}", cache_dir)
        if found is None:
            return super()._from_pretrained(model_id=model_id, cache_dir=cache_dir, **kwargs)
        name, arguments = found
        options = {key: value for key, value in kwargs.items() if key in inspect.signature(cls.__init__).parameters}
        with reading(model_id):
            return timm.create_model(name, pretrained=True, cache_dir=cache_dir, **{**arguments, **options})  # pyright: ignore

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Throw away what no map at ``indices`` needs; returns the indices counted from the start."""
        wanted = take_indices(len(self.feature_info), indices)
        self.levels = self.levels[: max(wanted) + 1]
        self.levels[-1].downsample = nn.Identity()
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return wanted

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm's layer-wise learning rate decay groups the parameters."""
        down = (r"^levels\.(\d+)\.downsample", (0,))
        blocks = [(r"^levels\.(\d+)", None)] if coarse else [(r"^levels\.(\d+)\.blocks\.(\d+)", None), down]
        return {"stem": r"^patch_embed", "blocks": [*blocks, (r"^norm", (99999,))]}


class PatchEmbed(nn.Module):
    """From the image to a cell per 4 x 4 pixels: two overlapping strided convolutions. (B, C, H, W) -> (B, P, Q, dim)."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Conv2d(in_chans, dim // 2, 3, 2, 1), nn.Conv2d(dim // 2, dim, 3, 2, 1))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """Half the map, twice the channels: (B, H, W, C) -> (B, H/2, W/2, 2C); the whole map where the pace has no stride."""

    def __init__(self, dim: int, pace: Pace) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, pace.stride, pace.before, dilation=pace.before, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Level(nn.Module):
    """Blocks on one map, and what leads to the next: a container, so that the names are those of the checkpoints."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class Block(nn.Module):
    """Attention and mlp, each behind a norm and around a shortcut; (B, H, W, C) all the way."""

    def __init__(
        self, dim: int, num_heads: int, window: Window, mlp_ratio: float, layer_scale: float | None, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = NeighbourhoodAttention(dim, num_heads, window)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.gamma1 = self.gamma2 = None
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(layer_scale * torch.ones(dim))
            self.gamma2 = nn.Parameter(layer_scale * torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(_scaled(self.attn(self.norm1(x)), self.gamma1))
        return x + self.drop_path(_scaled(self.mlp(self.norm2(x)), self.gamma2))


class NeighbourhoodAttention(nn.Module):
    """Neighbourhood attention of channels-last maps, (B, H, W, C) -> (B, H, W, C).

        y[p] = W_o sum_{c in N(p)} softmax_c( q[p].k[c] / sqrt(D) + rpb[head, c - p] ) v[c]

    state_dict: ``qkv``, ``rpb`` (N, 2k-1, 2k-1), ``proj``. :class:`LocalSelfAttention2d` with ``border="shift"`` and
    ``position="bias"`` computes the same from channels-first maps, under its own names.
    """

    rank = 2
    channels_last = True

    def __init__(self, dim: int, num_heads: int, window: Window) -> None:
        super().__init__()
        if dim % num_heads:
            raise ShapeError(f"num_heads={num_heads} must divide the {dim} channels of its level")
        self.num_heads = num_heads
        self.window = window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.rpb = nn.Parameter(trunc_normal_(torch.empty(num_heads, *window.table_size(2)), std=0.02))
        self.proj = nn.Linear(dim, dim)

    @one_node
    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self._project(x)
        out = local_attention(query, key, value, self.window, bias=self.rpb)
        return self.proj(out.permute(0, 2, 3, 1, 4).flatten(-2))

    def attention_weights(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """The weights of every query, (B, N, H, W, k, k), or of those in ``queries`` (Q, 2) alone, (B, N, Q, k, k)."""
        query, key, _ = self._project(x)
        return attention_weights(query, key, self.window, queries=queries, bias=self.rpb)

    def window_on(self, size: Sequence[int]) -> Window:
        """The memory block, the same on a map of any size."""
        return self.window

    def tables_on(self, size: Sequence[int]) -> Tables:
        """The position tables, ``(bias, None)``."""
        return self.rpb, None

    def no_weight_decay(self) -> set[str]:
        """The bias table, as in the published training."""
        return {"rpb"}

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        """(B, H, W, C) -> query, key and value, three views (B, N, H, W, D)."""
        return unflatten(self.qkv(x), -1, (3, self.num_heads, -1)).permute(3, 0, 4, 1, 2, 5).unbind()

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, kernel_size={self.window.kernel_size}, dilation={self.window.dilation}"


def _pool(kind: str) -> SelectAdaptivePool2d:
    """The mean as a plain one: PyTorch's pooling asks how its input lies in memory, which ties an exported program to
    batches and maps of two and more."""
    return SelectAdaptivePool2d(pool_type="fastavg" if kind == "avg" else kind, flatten=bool(kind))


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else gamma * x


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _dilations(depths: Sequence[int], widest: Sequence[int] = (8, 4, 2, 1)) -> list[list[int]]:
    """DiNAT's: every second block of a level looks across the whole map of an image of 224 pixels, 56, 28, 14, 7 cells."""
    return [[1, wide] * (depth // 2) + [1] * (depth % 2) for depth, wide in zip(depths, widest, strict=False)]


_TINY = {"num_heads": (2, 4, 8, 16), "embed_dim": 64, "mlp_ratio": 3.0, "drop_path_rate": 0.2}
_SMALL = {"num_heads": (3, 6, 12, 24), "embed_dim": 96, "mlp_ratio": 2.0, "drop_path_rate": 0.3}
_BASE = {"num_heads": (4, 8, 16, 32), "embed_dim": 128, "mlp_ratio": 2.0, "drop_path_rate": 0.5, "layer_scale": 1e-5}
_LARGE = {"num_heads": (6, 12, 24, 48), "embed_dim": 192, "mlp_ratio": 2.0, "drop_path_rate": 0.35}
_SHALLOW, _DEEP = (3, 4, 6, 5), (3, 4, 18, 5)

_PAPERS = {"nat": "arXiv:2204.07143", "dinat": "arXiv:2209.15001"}
# The authors' repositories on the Hugging Face Hub. What they hold is named as in transformers.
_HUB = {
    "nat_mini.in1k": "nat-mini-in1k-224",
    "nat_tiny.in1k": "nat-tiny-in1k-224",
    "nat_small.in1k": "nat-small-in1k-224",
    "nat_base.in1k": "nat-base-in1k-224",
    "dinat_mini.in1k": "dinat-mini-in1k-224",
    "dinat_tiny.in1k": "dinat-tiny-in1k-224",
    "dinat_small.in1k": "dinat-small-in1k-224",
    "dinat_base.in1k": "dinat-base-in1k-224",
    "dinat_large.in22k_ft_in1k": "dinat-large-in22k-in1k-224",
    "dinat_large.in22k_ft_in1k_384": "dinat-large-in22k-in1k-384",
    "dinat_large.in22k_ft_in1k_384_11x11": "dinat-large-11x11-in22k-in1k-384",
}
# On their own site alone, named as here.
_SITE = {"dinat_large.in22k": "https://shi-labs.com/projects/dinat/checkpoints/imagenet22k/dinat_large_in22k_224.pth"}


def _published(name: str) -> dict[str, Any]:
    where = {"hf_hub_id": f"shi-labs/{_HUB[name]}"} if name in _HUB else {"url": _SITE[name], "num_classes": 21841}
    size = 384 if "_384" in name else 224
    return config(
        size,
        first_conv="patch_embed.proj.0",
        classifier="head",
        paper_ids=_PAPERS[name.partition("_")[0]],
        **{"license": "mit", "crop_pct": 1.0 if size == 384 else 0.875, **where},
    )


default_cfgs = generate_default_cfgs({name: _published(name) for name in [*_HUB, *_SITE]})


def _tagged(tag: str, depths: Sequence[int]) -> dict[str, Any]:
    """What a tag's network is made with in place of its family's: the same shapes say nothing of dilations."""
    if tag == "in22k_ft_in1k_384":
        return {"dilations": _dilations(depths, (13, 6, 3, 1))}
    return {"kernel_size": 11} if tag == "in22k_ft_in1k_384_11x11" else {}


def _create(variant: str, pretrained: bool, size: dict[str, Any], **kwargs: Any) -> nn.Module:
    given = kwargs.get("pretrained_cfg")
    tag = given if isinstance(given, str) else (given or {}).get("tag")
    arguments = {**size, **_tagged(tag or "", kwargs.get("depths", size["depths"])), **kwargs}
    if pretrained:
        where = {name: kwargs.get(name) for name in ("pretrained_cfg", "pretrained_cfg_overlay")}
        made_with = {"kernel_size": 7, "dilations": [[1] * depth for depth in arguments["depths"]], **arguments}
        refuse_other(variant, made_with, where, kwargs.get("cache_dir"))
    maps = len(arguments["depths"])
    return build(Nat, variant, pretrained, maps, pretrained_filter_fn=from_published, **arguments)


def _create_dilated(variant: str, pretrained: bool, size: dict[str, Any], **kwargs: Any) -> nn.Module:
    size = {"dilations": _dilations(kwargs.get("depths", size["depths"])), **size}
    return _create(variant, pretrained, size, **kwargs)


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NAT-Mini: 19,984,174 parameters."""
    return _create("nat_mini", pretrained, {"depths": _SHALLOW, **_TINY}, **kwargs)


@register_model
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NAT-Tiny: 27,901,582 parameters."""
    return _create("nat_tiny", pretrained, {"depths": _DEEP, **_TINY}, **kwargs)


@register_model
def nat_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NAT-Small: 50,743,297 parameters."""
    return _create("nat_small", pretrained, {"depths": _DEEP, **_SMALL, "layer_scale": 1e-5}, **kwargs)


@register_model
def nat_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """NAT-Base: 89,769,652 parameters."""
    return _create("nat_base", pretrained, {"depths": _DEEP, **_BASE}, **kwargs)


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Mini: NAT-Mini with every second block dilated; 19,984,174 parameters."""
    return _create_dilated("dinat_mini", pretrained, {"depths": _SHALLOW, **_TINY}, **kwargs)


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Tiny: NAT-Tiny with every second block dilated; 27,901,582 parameters."""
    return _create_dilated("dinat_tiny", pretrained, {"depths": _DEEP, **_TINY}, **kwargs)


@register_model
def dinat_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Small: NAT-Small with every second block dilated and, as published, without its layer scale; 50,719,681."""
    return _create_dilated("dinat_small", pretrained, {"depths": _DEEP, **_SMALL}, **kwargs)


@register_model
def dinat_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Base: NAT-Base with every second block dilated; 89,769,652 parameters."""
    return _create_dilated("dinat_base", pretrained, {"depths": _DEEP, **_BASE}, **kwargs)


@register_model
def dinat_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DiNAT-Large: 200,943,514 parameters with 1000 classes."""
    return _create_dilated("dinat_large", pretrained, {"depths": _DEEP, **_LARGE}, **kwargs)
