# SPDX-License-Identifier: Apache-2.0
"""Stand-alone self-attention for vision: the exact operation, its layers, and networks made of them."""

import sys as _sys
import typing as _typing
from importlib import import_module as _import_module

from .when_imported import when_imported as _when_imported

if _typing.TYPE_CHECKING:  # for those who read and do not run
    from . import compat as compat
    from . import deploy as deploy
    from . import errors as errors
    from . import positions as positions
    from .acceleration import accelerate
    from .attention import (
        attention_scores,
        attention_weights,
        backends,
        global_attention,
        local_attention,
        merge_attentions,
    )
    from .conversion import convert
    from .from_python import train
    from .inspect import (
        attention_maps,
        attention_rollout,
        attention_statistics,
        equivariance_by_layer,
        equivariance_error,
        explore,
    )
    from .layers import (
        AttentionStem2d,
        GlobalSelfAttention1d,
        GlobalSelfAttention2d,
        GlobalSelfAttention3d,
        HaloSelfAttention2d,
        LocalSelfAttention1d,
        LocalSelfAttention2d,
        LocalSelfAttention3d,
    )
    from .models import create_model, list_models, resize_positions
    from .saved import export_onnx, load
    from .window import Window

    __version__: str

__all__ = [
    "AttentionStem2d",
    "GlobalSelfAttention1d",
    "GlobalSelfAttention2d",
    "GlobalSelfAttention3d",
    "HaloSelfAttention2d",
    "LocalSelfAttention1d",
    "LocalSelfAttention2d",
    "LocalSelfAttention3d",
    "Window",
    "accelerate",
    "attention_maps",
    "attention_rollout",
    "attention_scores",
    "attention_statistics",
    "attention_weights",
    "backends",
    "convert",
    "create_model",
    "equivariance_by_layer",
    "equivariance_error",
    "explore",
    "export_onnx",
    "global_attention",
    "list_models",
    "load",
    "local_attention",
    "merge_attentions",
    "resize_positions",
    "train",
]

# Everything is loaded when it is first asked for, PyTorch included: names by the room that they are in, and rooms.
_LATER = {
    "acceleration": ("accelerate",),
    "attention": (
        "attention_scores",
        "attention_weights",
        "backends",
        "global_attention",
        "local_attention",
        "merge_attentions",
    ),
    "conversion": ("convert",),
    "from_python": ("train",),
    "inspect": (
        "attention_maps",
        "attention_rollout",
        "attention_statistics",
        "equivariance_by_layer",
        "equivariance_error",
        "explore",
    ),
    "layers": (
        "AttentionStem2d",
        "GlobalSelfAttention1d",
        "GlobalSelfAttention2d",
        "GlobalSelfAttention3d",
        "HaloSelfAttention2d",
        "LocalSelfAttention1d",
        "LocalSelfAttention2d",
        "LocalSelfAttention3d",
    ),
    "models": ("create_model", "list_models", "resize_positions"),
    "saved": ("export_onnx", "load"),
    "window": ("Window",),
}
_ROOMS = ("compat", "deploy", "errors", "positions", *_LATER)


def __getattr__(name: str) -> _typing.Any:
    if name in _ROOMS:
        return _import_module(f".{name}", __name__)
    if name == "__version__":
        from importlib.metadata import version

        return version(__name__)
    for room, names in _LATER.items():
        if name in names:
            globals()[name] = value = getattr(_import_module(f".{room}", __name__), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS, "__version__"})


# PyTorch then has our operators, timm our networks, PyTorch's counter their formulas, and Opacus sees layers whole, whoever
# imports them and when.
# Attention stands on modules that import PyTorch themselves: where one of these comes first, it waits until that is whole.
_BELOW_ATTENTION = [f"{__name__}.{module}" for module in ("precision", "private", "window")]
_whole: set[str] = set()


def _bring_attention(came: str) -> None:
    _whole.add(came)
    if all(module in _whole for module in _BELOW_ATTENTION if module in _sys.modules):
        _import_module(".attention", __name__)


for _module in ("torch", *_BELOW_ATTENTION):
    _when_imported(_module, lambda came=_module: _bring_attention(came))
_when_imported("timm.models", lambda: _import_module(".models", __name__))
_when_imported("torch.utils.flop_counter", lambda: _import_module(".flops", __name__))
_when_imported("opacus", lambda: _import_module(".compat.opacus", __name__).take_layers_whole())
