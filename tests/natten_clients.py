# SPDX-License-Identifier: Apache-2.0
"""Small layers that call NATTEN as published networks do: the same imports, arguments and layouts, in our own words.

Imported under the stand-in, and a second time under the oracle of natten_oracle.py.
"""

from __future__ import annotations

import natten  # pyright: ignore[reportMissingImports]
import torch
from natten import NeighborhoodAttention1D, NeighborhoodAttention2D  # pyright: ignore[reportMissingImports]
from natten.functional import (  # pyright: ignore[reportMissingImports]
    NATTEN2DAVFunction,
    NATTEN2DQKRPBFunction,
    is_fna_enabled,
    na2d,
    na2d_av,
    na2d_qk,
    natten1dav,
    natten1dqkrpb,
    natten2dav,
    natten2dqkrpb,
    neighborhood_attention_generic,
)
from torch import Tensor, nn

# NAT and DiNAT ask which NATTEN there is, and name the bias accordingly.
BIAS = {"rel_pos_bias" if hasattr(natten, "context") else "bias": True}


class NatLayer(nn.Module):
    """NAT and DiNAT since NATTEN 0.17: (B, H, W, C), pre-norm and a residual."""

    def __init__(self, dim: int = 24, num_heads: int = 3, kernel_size: int = 3, dilation: int = 1) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        options = {"qkv_bias": True, "qk_scale": None, "attn_drop": 0.0, "proj_drop": 0.0}
        self.attn = NeighborhoodAttention2D(
            dim, kernel_size=kernel_size, dilation=dilation, num_heads=num_heads, **options, **BIAS
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm1(x))


class OldNatLayer(nn.Module):
    """OneFormer and Mask2Former on NATTEN 0.14: the bias is not asked for, maps smaller than the window come in."""

    def __init__(self, dim: int = 16, num_heads: int = 2, kernel_size: int = 5, dilation: int = 2) -> None:
        super().__init__()
        options = {"qkv_bias": True, "qk_scale": None, "attn_drop": 0.0, "proj_drop": 0.0}
        self.attn = NeighborhoodAttention2D(
            dim, kernel_size=kernel_size, dilation=dilation, num_heads=num_heads, **options
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)


class SequenceLayer(nn.Module):
    """planTF's encoder of trajectories: (B, L, C) with NATTEN 0.14, the dilation None."""

    def __init__(self, dim: int = 16, num_heads: int = 4, kernel_size: int = 5) -> None:
        super().__init__()
        options = {"qkv_bias": True, "qk_scale": None, "attn_drop": 0.0, "proj_drop": 0.0}
        self.attn = NeighborhoodAttention1D(dim, kernel_size=kernel_size, dilation=None, num_heads=num_heads, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)


class HydraLayer(nn.Module):
    """StyleNAT: every group of heads has a window of its own; natten2dqkrpb and natten2dav, heads first, chunks of views."""

    def __init__(
        self, dim: int = 24, num_heads: int = 4, kernels=(3, 5), dilations=(2, 1), new_names: bool = False
    ) -> None:
        super().__init__()
        self.num_heads, self.kernels, self.dilations, self.new_names = num_heads, kernels, dilations, new_names
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        heads = num_heads // len(kernels)
        self.rpb = nn.ParameterList([nn.Parameter(torch.zeros(heads, 2 * k - 1, 2 * k - 1)) for k in kernels])

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        qkv = self.qkv(x).reshape(b, h, w, 3, self.num_heads, c // self.num_heads).permute(3, 0, 4, 1, 2, 5)
        q, k, v = (part.squeeze(0) for part in qkv.chunk(3, dim=0))
        q = q * (c // self.num_heads) ** -0.5
        parts = (tensor.chunk(len(self.kernels), dim=1) for tensor in (q, k, v))
        outs = []
        for q, k, v, rpb, size, dilation in zip(*parts, self.rpb, self.kernels, self.dilations, strict=True):
            if self.new_names:
                weights = na2d_qk(q, k, kernel_size=size, dilation=dilation, rpb=rpb).softmax(-1)
                outs.append(na2d_av(weights, v, kernel_size=size, dilation=dilation))
            else:
                weights = natten2dqkrpb(q, k, rpb, size, dilation).softmax(-1)
                outs.append(natten2dav(weights, v, size, dilation))
        return self.proj(torch.cat(outs, dim=1).permute(0, 2, 3, 1, 4).reshape(b, h, w, c))


class NewHydraLayer(HydraLayer):
    """StyleNAT since NATTEN 0.17: na2d_qk and na2d_av."""

    def __init__(self) -> None:
        super().__init__(new_names=True)


class DatLayer(nn.Module):
    """DAT on NATTEN 0.14: the autograd functions themselves, (B, C, H, W) in and out."""

    def __init__(self, dim: int = 16, num_heads: int = 2, kernel_size: int = 3, dilation: int = 2) -> None:
        super().__init__()
        self.num_heads, self.kernel_size, self.dilation = num_heads, kernel_size, dilation
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        qkv = self.qkv(x).reshape(b, h, w, 3, self.num_heads, c // self.num_heads).permute(3, 0, 4, 1, 2, 5)
        q, k, v = qkv[0] * (c // self.num_heads) ** -0.5, qkv[1], qkv[2]
        weights = NATTEN2DQKRPBFunction.apply(q, k, self.rpb, self.kernel_size, self.dilation).softmax(dim=-1)
        out = NATTEN2DAVFunction.apply(weights, v, self.kernel_size, self.dilation)
        return self.proj(out.permute(0, 2, 3, 1, 4).reshape(b, h, w, c)).permute(0, 3, 1, 2)


class NewDatLayer(DatLayer):
    """DAT since NATTEN 0.17: asks whether the fused call is on, and gives it the bias."""

    def forward(self, x: Tensor) -> Tensor:
        assert is_fna_enabled()
        x = x.permute(0, 2, 3, 1).contiguous()
        b, h, w, c = x.shape
        q, k, v = self.qkv(x).reshape(b, h, w, 3, self.num_heads, c // self.num_heads).permute(3, 0, 1, 2, 4, 5)
        window = {"kernel_size": (self.kernel_size,) * 2, "dilation": (self.dilation,) * 2, "is_causal": (False, False)}
        out = na2d(q, k, v, **window, rpb=self.rpb, scale=(c // self.num_heads) ** -0.5)
        return self.proj(out.reshape(b, h, w, c)).permute(0, 3, 1, 2).contiguous()


class UpsamplerLayer(nn.Module):
    """NAF: queries of a fine map see a coarse one spread out by the dilation; values are wider than keys."""

    def __init__(self, num_heads: int = 2, kernel_size=(3, 3), fused: bool = False) -> None:
        super().__init__()
        self.num_heads, self.kernel_size, self.fused = num_heads, kernel_size, fused

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dilation = (q.shape[-2] // k.shape[-2], q.shape[-1] // k.shape[-1])
        k, v = (nn.functional.interpolate(x, size=q.shape[-2:], mode="nearest-exact") for x in (k, v))
        q, k, v = (x.unflatten(1, (self.num_heads, -1)).permute(0, 3, 4, 1, 2) for x in (q, k, v))
        if self.fused:
            window = {"kernel_size": self.kernel_size, "dilation": dilation, "stride": 1}
            out = na2d(q, k, v, **window, backend="cutlass-fna")
        else:
            q, k, v = (x.permute(0, 3, 1, 2, 4) for x in (q, k, v))
            scores = na2d_qk(q, k, kernel_size=self.kernel_size, dilation=dilation) * q.shape[-1] ** -0.5
            out = na2d_av(scores.softmax(dim=-1), v, kernel_size=self.kernel_size, dilation=dilation)
            out = out.permute(0, 2, 3, 1, 4)
        return out.flatten(3).permute(0, 3, 1, 2)


class FusedUpsamplerLayer(UpsamplerLayer):
    """NAF on NATTEN 0.20 and later, with the backend that it names."""

    def __init__(self) -> None:
        super().__init__(fused=True)


class HourglassLayer(nn.Module):
    """k-diffusion's HDiT: cosine similarity with a learned scale, so that of the call is 1."""

    fused = True

    def __init__(self, dim: int = 24, num_heads: int = 2, kernel_size: int = 3) -> None:
        super().__init__()
        self.num_heads, self.kernel_size = num_heads, kernel_size
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.scale = nn.Parameter(torch.full([num_heads], 10.0))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(3, 0, 1, 2, 4, 5) if self.fused else qkv.permute(3, 0, 4, 1, 2, 5)
        root = self.scale.sqrt()[:, None] if self.fused else self.scale.sqrt()[:, None, None, None]
        q, k = (root * y * torch.rsqrt((y**2).sum(-1, keepdim=True) + 1e-6) for y in (q, k))
        if self.fused and natten.has_fused_na():
            out = natten.functional.na2d(q, k, v, self.kernel_size, scale=1.0)
        else:
            scores = natten.functional.na2d_qk(q, k, self.kernel_size)
            out = natten.functional.na2d_av(torch.softmax(scores, dim=-1).to(v.dtype), v, self.kernel_size)
            out = out.permute(0, 2, 3, 1, 4)
        return x + self.proj(out.flatten(-2))


class SplitHourglassLayer(HourglassLayer):
    """The same where there is no fused call."""

    fused = False


class BeatLayer(nn.Module):
    """allin1: along time alone, then over instruments and time; 12 channels in every head, a dilation per layer."""

    def __init__(self, num_heads: int = 2, kernel_size: int = 5, dilation: int = 2) -> None:
        super().__init__()
        self.window = (kernel_size, dilation)
        self.rpb1 = nn.Parameter(torch.zeros(num_heads, 2 * kernel_size - 1))
        self.rpb2 = nn.Parameter(torch.zeros(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = natten2dqkrpb(q, k, self.rpb2, *self.window).softmax(-1)
        over_both = natten2dav(weights, v, *self.window)
        rows = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, over_both))
        q, k, v = rows
        return natten1dav(natten1dqkrpb(q, k, self.rpb1, *self.window).softmax(-1), v, *self.window)


class DynamicConvolution(nn.Module):
    """OverLoCK: na2d_av with weights from elsewhere, normalised over the window."""

    def __init__(self, channels: int = 8, num_heads: int = 2, kernel_size: int = 3) -> None:
        super().__init__()
        self.num_heads, self.kernel_size = num_heads, kernel_size
        self.weights = nn.Conv2d(channels, num_heads * kernel_size**2, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights(x).unflatten(1, (self.num_heads, -1)).permute(0, 1, 3, 4, 2).softmax(-1)
        value = x.unflatten(1, (self.num_heads, -1)).permute(0, 1, 3, 4, 2)
        return na2d_av(weights, value, kernel_size=self.kernel_size).permute(0, 1, 4, 2, 3).flatten(1, 2)


class VideoLayer(nn.Module):
    """Cosmos: the generic call by keywords over time, rows and columns, with a window stride and causal in time."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window = {
            "kernel_size": (2, 3, 4),
            "stride": (1, 2, 3),
            "dilation": (1, 1, 1),
            "is_causal": (True, False, False),
        }
        tiles = {"q_tile_shape": (4, 4, 4), "kv_tile_shape": (4, 4, 4), "backend": "cutlass-fna"}
        return neighborhood_attention_generic(query=q, key=k, value=v, **window, **tiles)
