# SPDX-License-Identifier: Apache-2.0
"""What NATTEN computes, by plain loops over cells in float64, as a module that can stand for ``natten`` itself.

This file never imports nearsight. Which cells a query sees is decided by loops over integers; the rest is four formulas on
the gathered cells, whose derivatives PyTorch takes.
"""

from __future__ import annotations

from itertools import product
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


def each(value, rank: int) -> tuple:
    """One value for all axes, or one per axis."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * rank


def seen_along(n: int, k: int, stride: int, dilation: int, causal: bool, query: int) -> list[int]:
    """The cells that a query sees along one axis, from left to right."""
    phase = range(query % dilation, n, dilation)
    place = query // dilation
    group = [i for i in range(len(phase)) if i // stride == place // stride]
    if causal:
        end = group[0] + stride - 1 if group[0] + stride - 1 < len(phase) else len(phase) - 1
        return [phase[i] for i in range(len(phase)) if end - k < i <= place]
    leader = min(group[0] + stride // 2, len(phase) - 1)
    left, right = leader - k // 2, leader - k // 2 + k - 1
    while left < 0:
        left, right = left + 1, right + 1
    while right > len(phase) - 1 and left > 0:
        left, right = left - 1, right - 1
    return [phase[i] for i in range(left, min(right, len(phase) - 1) + 1)]


def table(size, kernel_size, stride=1, dilation=1, causal=False) -> tuple[Tensor, Tensor]:
    """For every query the cells in its places (queries, K), -1 for none, and their bias entries (queries, K, rank)."""
    rank = len(size)
    kernel_size, stride, dilation = each(kernel_size, rank), each(stride, rank), each(dilation, rank)
    causal = each(causal, rank)
    cells, entries = [], []
    for query in product(*map(range, size)):
        axes = [seen_along(*axis) for axis in zip(size, kernel_size, stride, dilation, causal, query, strict=True)]
        cell_row, entry_row = [], []
        for places in product(*map(range, kernel_size)):
            if any(place >= len(seen) for place, seen in zip(places, axes, strict=True)):
                cell_row.append(-1)
                entry_row.append([0] * rank)
                continue
            cell = [seen[place] for place, seen in zip(places, axes, strict=True)]
            flat = 0
            for c, n in zip(cell, size, strict=True):
                flat = flat * n + c
            cell_row.append(flat)
            steps = zip(cell, query, dilation, kernel_size, strict=True)
            entry_row.append([(c - q) // d + k - 1 for c, q, d, k in steps])
        cells.append(cell_row)
        entries.append(entry_row)
    return torch.tensor(cells), torch.tensor(entries)


def scores(query: Tensor, key: Tensor, cells: Tensor) -> Tensor:
    """(B, N, *map, D) twice -> q.k of every place (B, N, P, K), -inf where there is no cell."""
    query, key = query.flatten(2, -2), key.flatten(2, -2)
    found = (query[..., None, :] * key[:, :, cells.clamp(min=0)]).sum(-1)
    return found.masked_fill(cells < 0, float("-inf"))


def mixed(weights: Tensor, value: Tensor, cells: Tensor) -> Tensor:
    """(B, N, P, K), (B, N, *map, E) -> (B, N, P, E)."""
    return (weights.masked_fill(cells < 0, 0)[..., None] * value.flatten(2, -2)[:, :, cells.clamp(min=0)]).sum(-2)


def biases(rpb: Tensor, entries: Tensor) -> Tensor:
    """(N, *(2k-1)) -> (N, P, K)."""
    return rpb[(slice(None), *entries.unbind(-1))]


def qk(query, key, kernel_size, dilation=1, additional_keys=None, is_causal=False, rpb=None):
    size = query.shape[2:-1]
    cells, entries = table(size, kernel_size, 1, dilation, is_causal)
    logits = scores(query, key, cells)
    if rpb is not None:
        logits = logits + biases(rpb, entries)
    if additional_keys is not None:
        logits = torch.cat([logits, (query.flatten(2, -2)[..., None, :] * additional_keys[:, :, None]).sum(-1)], -1)
    return logits.unflatten(2, size)


def av(attn, value, kernel_size, dilation=1, additional_values=None, is_causal=False):
    size = value.shape[2:-1]
    cells, _ = table(size, kernel_size, 1, dilation, is_causal)
    attn = attn.flatten(2, -2)
    out = mixed(attn[..., : cells.shape[1]], value, cells)
    if additional_values is not None:
        out = out + (attn[..., cells.shape[1] :, None] * additional_values[:, :, None]).sum(-2)
    return out.unflatten(2, size)


def na(query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None, rpb=None, **options):
    """Heads last; the log-sum-exp too. Grouped heads are repeated, additional keys are one more window for everybody."""
    size, groups = query.shape[1:-2], query.shape[-2] // key.shape[-2]
    query, key, value = (tensor.movedim(-2, 1) for tensor in (query, key, value))
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    cells, entries = table(size, kernel_size, stride, dilation, is_causal)
    scale = scale or query.shape[-1] ** -0.5
    logits = scale * scores(query, key, cells)
    if rpb is not None:
        logits = logits + biases(rpb, entries)
    window = cells.shape[1]
    if options.get("additional_keys") is not None:
        keys, values = (
            options[name].movedim(-2, 1).repeat_interleave(groups, 1)
            for name in ("additional_keys", "additional_values")
        )
        logits = torch.cat([logits, scale * (query.flatten(2, -2)[..., None, :] * keys[:, :, None]).sum(-1)], -1)
    weights = logits.softmax(-1)
    out = mixed(weights[..., :window], value, cells)
    if weights.shape[-1] > window:
        out = out + (weights[..., window:, None] * values[:, :, None]).sum(-2)
    out, lse = out.unflatten(2, size).movedim(1, -2), logits.logsumexp(-1).unflatten(2, size).movedim(1, -1)
    return (out, lse) if options.get("return_lse") else out


class Layer(nn.Module):
    """A module of NATTEN up to 0.14.6: with a bias unless told otherwise, padded to the window."""

    def __init__(self, rank, dim, num_heads, kernel_size, dilation=None, qk_scale=None, **options) -> None:
        super().__init__()
        self.rank, self.num_heads, self.kernel_size = rank, num_heads, kernel_size
        self.dilation = each(dilation or 1, rank)
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=options.get("qkv_bias", True))
        self.proj = nn.Linear(dim, dim)
        sizes = [2 * k - 1 for k in each(kernel_size, rank)]
        with_bias = options.get("bias", options.get("rel_pos_bias", True))
        self.rpb = nn.Parameter(torch.zeros(num_heads, *sizes)) if with_bias else None

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1:-1]
        for axis, (n, k, d) in enumerate(zip(size, each(self.kernel_size, self.rank), self.dilation, strict=True)):
            x = pad(x, [0, 0] * (self.rank - axis) + [0, max(0, k * d - n)])
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        out = na(q, k, v, self.kernel_size, dilation=self.dilation, scale=self.scale, rpb=self.rpb).flatten(-2)
        return self.proj(out[(slice(None), *map(slice, size))])


def modules() -> dict[str, ModuleType]:
    """``natten`` and its submodules, for sys.modules."""
    natten, functional = ModuleType("natten"), ModuleType("natten.functional")
    natten.__dict__.update(functional=functional, context=ModuleType("natten.context"), has_fused_na=lambda: True)
    functional.__dict__.update(neighborhood_attention_generic=na, is_fna_enabled=lambda: True)
    for rank in (1, 2, 3):
        layer = type(f"NeighborhoodAttention{rank}D", (Layer,), {"__init__": _with_rank(rank)})
        natten.__dict__[layer.__name__] = layer
        functional.__dict__.update({f"na{rank}d": na, f"na{rank}d_qk": qk, f"na{rank}d_av": av})
        qkrpb, product_ = _old_names()
        functional.__dict__.update({f"natten{rank}dqkrpb": qkrpb, f"natten{rank}dav": product_})
        for part, call in (("QKRPB", qkrpb), ("AV", product_)):
            name = f"NATTEN{rank}D{part}Function"
            functional.__dict__[name] = type(name, (), {"apply": staticmethod(call)})
    return {"natten": natten, "natten.functional": functional, "natten.context": natten.context}


def _with_rank(rank: int):
    return lambda self, *args, **options: Layer.__init__(self, rank, *args, **options)


def _old_names():
    return (
        lambda query, key, rpb, kernel_size, dilation: qk(query, key, kernel_size, dilation, rpb=rpb),
        lambda attn, value, kernel_size, dilation: av(attn, value, kernel_size, dilation),
    )
