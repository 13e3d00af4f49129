# SPDX-License-Identifier: Apache-2.0
"""Calls that NATTEN 0.21.7 answers on a CPU, and what it answered: make_natten_cases.py asks it, the tests ask the stand-in.

There it attends through FlexAttention, uncompiled: forward only, in float32, for as many channels of key as of value and a
power of two of them. Of its gradients a CPU gives those of merged attentions.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

VERSION = "0.21.7"
FILE = Path(__file__).parent / "natten_cases.npz"

# The map, options of the call, and what else there is: heads of query and of key, additional keys.
FUSED: dict[str, tuple[tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    "one axis": ((13,), {"kernel_size": 5}, {}),
    "two axes": ((7, 9), {"kernel_size": 3}, {}),
    "three axes": ((4, 3, 5), {"kernel_size": (3, 2, 3)}, {}),
    "kernels of two": ((6, 5), {"kernel_size": 2}, {}),
    "even": ((11,), {"kernel_size": 6}, {}),
    "even along one": ((6, 8), {"kernel_size": (3, 4)}, {}),
    "the whole map": ((5, 4), {"kernel_size": (5, 4)}, {}),
    "dilated": ((9, 11), {"kernel_size": 3, "dilation": (3, 2)}, {}),
    "dilated, even": ((13,), {"kernel_size": 4, "dilation": 3}, {}),
    "dilated to the border": ((6, 9), {"kernel_size": (2, 3), "dilation": 3}, {}),
    "causal": ((12,), {"kernel_size": 4, "is_causal": True}, {}),
    "causal in the first": ((6, 7), {"kernel_size": 3, "is_causal": (True, False)}, {}),
    "causal in the second": ((6, 7), {"kernel_size": (2, 4), "is_causal": (False, True)}, {}),
    "causal in all": ((3, 4, 5), {"kernel_size": (2, 3, 2), "is_causal": True}, {}),
    "causal and dilated": ((13,), {"kernel_size": 3, "dilation": 3, "is_causal": True}, {}),
    "a stride": ((11,), {"kernel_size": 5, "stride": 2}, {}),
    "a stride of three": ((13,), {"kernel_size": 4, "stride": 3}, {}),
    "blocks": ((8, 6), {"kernel_size": (4, 3), "stride": (4, 3)}, {}),
    "blocks that the map cuts": ((7, 10), {"kernel_size": (3, 4), "stride": (3, 4)}, {}),
    "a stride along one": ((7, 8), {"kernel_size": 4, "stride": (1, 2)}, {}),
    "a stride, dilated": ((13, 7), {"kernel_size": 3, "stride": (2, 3), "dilation": (3, 2)}, {}),
    "a stride, causal": ((11, 5), {"kernel_size": (4, 3), "stride": (3, 1), "is_causal": (True, False)}, {}),
    "a stride, causal and dilated": ((14,), {"kernel_size": 3, "stride": 2, "dilation": 2, "is_causal": True}, {}),
    "a scale": ((9,), {"kernel_size": 3, "scale": 0.7}, {}),
    "a scale of zero": ((9,), {"kernel_size": 3, "scale": 0.0}, {}),
    "no dilation": ((9,), {"kernel_size": 3, "dilation": None}, {}),
    "grouped heads": ((6, 7), {"kernel_size": 3}, {"heads": (4, 2)}),
    "one head of keys": ((9,), {"kernel_size": 4, "is_causal": True}, {"heads": (3, 1)}),
    "log-sum-exp": ((6, 5), {"kernel_size": 3, "return_lse": True}, {}),
    "log-sum-exp, causal": ((9,), {"kernel_size": 4, "is_causal": True, "return_lse": True}, {}),
    "additional keys": ((6, 5), {"kernel_size": 3, "return_lse": True}, {"additional": 4}),
    "additional keys, causal": ((9,), {"kernel_size": 3, "is_causal": True}, {"additional": 2}),
    "additional keys, grouped": (
        (7,),
        {"kernel_size": 3, "stride": 2, "scale": 0.5},
        {"additional": 3, "heads": (4, 2)},
    ),
    "all at once": (
        (4, 6, 5),
        {
            "kernel_size": (2, 3, 2),
            "stride": (1, 2, 2),
            "dilation": (1, 2, 1),
            "is_causal": (True, False, False),
            "return_lse": True,
        },
        {"heads": (4, 2), "additional": 2},
    ),
}
ATTENTION: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {  # heads of query and of key, options
    "attention": ((2, 2), {"return_lse": True}),
    "attention, grouped": ((4, 2), {}),
    "attention, a scale": ((2, 2), {"scale": 0.3}),
}
MODULES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "module of one axis": ((9,), {"kernel_size": 4, "is_causal": True, "qk_scale": 0.4}),
    "module of two axes": ((6, 5), {"kernel_size": 3, "stride": 2, "qkv_bias": False, "qk_scale": False}),
    "module of three axes": ((3, 4, 4), {"kernel_size": (3, 2, 2), "dilation": (1, 2, 1)}),
}
MERGED = "merged attentions"
NAMES = [*FUSED, *ATTENTION, *MODULES, MERGED]


def answers(natten: ModuleType, name: str) -> list[Tensor]:
    """What a package named natten makes of a case."""
    # RandomState's numbers are the same in every version of NumPy.
    random = np.random.RandomState(NAMES.index(name))

    def tensor(*shape: int) -> Tensor:
        return torch.from_numpy(random.standard_normal(shape).astype(np.float32))

    if name == MERGED:
        return _merged(natten, tensor)
    with torch.no_grad():
        found = _found(natten, name, tensor)
    return list(found) if isinstance(found, tuple) else [found]


def _found(natten: ModuleType, name: str, tensor: Any) -> Any:
    if name in ATTENTION:
        (heads, shared), options = ATTENTION[name]
        return natten.attention(tensor(2, 7, heads, 8), tensor(2, 7, shared, 8), tensor(2, 7, shared, 8), **options)
    if name in MODULES:
        size, options = MODULES[name]
        layer = getattr(natten, f"NeighborhoodAttention{len(size)}D")(16, num_heads=2, **options)
        for parameter in layer.parameters():
            parameter.copy_(0.3 * tensor(*parameter.shape))
        return layer(tensor(1, *size, 16))
    size, options, more = FUSED[name]
    heads, shared = more.get("heads", (2, 2))
    maps = [tensor(1, *size, count, 8) for count in (heads, shared, shared)]
    if "additional" in more:
        both = [tensor(1, more["additional"], shared, 8) for _ in range(2)]
        options = {**options, "additional_keys": both[0], "additional_values": both[1]}
    return getattr(natten, f"na{len(size)}d")(*maps, **options)


def _merged(natten: ModuleType, tensor: Any) -> list[Tensor]:
    """Values and gradients. Its "fix" is none of the gradient here: it returns what its own kernels turn into one later."""
    inputs = [tensor(1, 6, 2, 8).requires_grad_() for _ in range(2)] + [
        tensor(1, 6, 2).requires_grad_() for _ in range(2)
    ]
    out, lse = natten.merge_attentions(inputs[:2], inputs[2:], torch_compile=False, use_autograd_fix=False)
    return [out.detach(), lse.detach(), *torch.autograd.grad((out * tensor(*out.shape)).sum(), inputs)]
