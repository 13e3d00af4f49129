# SPDX-License-Identifier: Apache-2.0
"""``natten.context``: NATTEN's switches, each telling the truth about what stands in for it.

One switch has an effect, ``use_fused_na``. The others choose between kernels that are not here, so they are taken, and
asked whether they are on, they say no.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch

from ...errors import OptionError

__all__ = [
    "HAS_LIBNATTEN",
    "MemoryUsagePreference",
    "NattenContext",
    "are_deterministic_algorithms_enabled",
    "disable_fna",
    "disable_fused_na",
    "enable_fna",
    "enable_fused_na",
    "get_memory_usage_preference",
    "has_bfloat",
    "has_cuda",
    "has_fna",
    "has_fused_na",
    "has_half",
    "is_fna_enabled",
    "is_fused_na_enabled",
    "is_memory_usage_default",
    "is_memory_usage_strict",
    "is_memory_usage_unrestricted",
    "set_memory_usage_preference",
    "use_deterministic_algorithms",
    "use_fna",
    "use_fused_na",
]

HAS_LIBNATTEN = False


class MemoryUsagePreference(Enum):
    """How much memory NATTEN's backward may take; kept, and without effect here."""

    Default = 0
    Strict = 1
    Unrestricted = 2


class NattenContext:
    """The switches' state, for all threads."""

    is_fused_na_enabled = True
    is_deterministic_mode_enabled = False
    training_memory_preference = MemoryUsagePreference.Default
    rel_pos_bias = False  # what the modules take where a client does not say

    @staticmethod
    def reset() -> None:
        NattenContext.is_fused_na_enabled = True
        NattenContext.is_deterministic_mode_enabled = False
        NattenContext.training_memory_preference = MemoryUsagePreference.Default


def use_fused_na(mode: bool = True, *_: Any, **__: Any) -> None:
    """Whether the modules attend in one call (the default) or hold the weights between two."""
    NattenContext.is_fused_na_enabled = bool(mode)


def enable_fused_na() -> bool:
    """The modules attend in one call; and whether they do."""
    use_fused_na(True)
    return is_fused_na_enabled()


def disable_fused_na() -> bool:
    """The modules hold the weights between two calls; and whether they attend in one."""
    use_fused_na(False)
    return is_fused_na_enabled()


def is_fused_na_enabled() -> bool:
    """Whether the modules attend in one call."""
    return NattenContext.is_fused_na_enabled


def set_memory_usage_preference(pref: str = "default") -> None:
    """Keep a preference that has no effect here.

    Raises:
        OptionError: none of "default", "strict" and "unrestricted".
    """
    names = {preference.name.lower(): preference for preference in MemoryUsagePreference}
    if pref not in names:
        raise OptionError(f"the preference must be one of {', '.join(names)}; received {pref!r}")
    NattenContext.training_memory_preference = names[pref]


def get_memory_usage_preference() -> MemoryUsagePreference:
    return NattenContext.training_memory_preference


def is_memory_usage_default() -> bool:
    return get_memory_usage_preference() is MemoryUsagePreference.Default


def is_memory_usage_strict() -> bool:
    return get_memory_usage_preference() is MemoryUsagePreference.Strict


def is_memory_usage_unrestricted() -> bool:
    return get_memory_usage_preference() is MemoryUsagePreference.Unrestricted


def use_deterministic_algorithms(mode: bool = True) -> None:
    """Kept. On the CPU everything is deterministic anyway; elsewhere PyTorch's own switch decides."""
    NattenContext.is_deterministic_mode_enabled = bool(mode)


def are_deterministic_algorithms_enabled() -> bool:
    return NattenContext.is_deterministic_mode_enabled


def has_cuda() -> bool:
    """Whether there is a CUDA device that the calls can run on."""
    return torch.cuda.is_available()


def has_fused_na(device: Any = None) -> bool:
    """Yes: ``na1d``, ``na2d`` and ``na3d`` attend in one call on every device, with gradients."""
    return True


def has_half(device: Any = None) -> bool:
    """Yes: every call takes float16 on every device."""
    return True


def has_bfloat(device: Any = None) -> bool:
    """Yes: every call takes bfloat16 on every device."""
    return True


has_fna, use_fna, is_fna_enabled = has_fused_na, use_fused_na, is_fused_na_enabled
enable_fna, disable_fna = enable_fused_na, disable_fused_na

# What is asked of kernels, and chosen between them, that are not here.
QUESTIONS = [
    "has_gemm",
    "has_gemm_na",
    "has_fp32_gemm",
    "has_fp64_gemm",
    "has_tf32_gemm",
    "is_autotuner_enabled",
    "is_autotuner_enabled_for_backward",
    "is_autotuner_enabled_for_forward",
    "is_autotuner_thorough_for_backward",
    "is_autotuner_thorough_for_forward",
    "is_flex_compile_allowed",
    "is_flex_compile_backprop_allowed",
    "is_gemm_na_enabled",
    "is_kv_parallelism_in_fused_na_enabled",
    "is_tf32_in_gemm_na_enabled",
    "is_tiled_na_enabled",
    "should_force_flex_attention",
    "should_use_flex_attention",
]
SWITCHES = [
    "allow_flex_compile",
    "allow_flex_compile_backprop",
    "disable_autotuner",
    "disable_flex_compile",
    "disable_flex_compile_backprop",
    "disable_gemm_na",
    "disable_tf32",
    "disable_tiled_na",
    "enable_autotuner",
    "enable_gemm_na",
    "enable_tf32",
    "enable_tiled_na",
    "force_flex_attention",
    "use_autotuner",
    "use_flex_attention",
    "use_gemm_na",
    "use_kv_parallelism_in_fused_na",
    "use_tf32_in_gemm_na",
    "use_tiled_na",
]


CONFIGURATIONS = [
    f"get_{direction}configs_for_{kernel}_{operation}"
    for direction, kernels in (
        ("", ("cutlass", "cutlass_blackwell", "cutlass_hopper", "flex")),
        ("bwd_", ("cutlass", "cutlass_blackwell", "cutlass_hopper")),
    )
    for kernel in kernels
    for operation in ("fmha", "fna")
]


def _answer(name: str, doc: str, kind: type) -> Callable:
    def answer(*_: Any, **__: Any) -> Any:
        return kind()

    answer.__name__, answer.__qualname__, answer.__doc__ = name, name, doc
    return answer


ABSENT: dict[str, Callable] = {
    **{name: _answer(name, "No: what it asks for is not here.", bool) for name in QUESTIONS},
    **{name: _answer(name, "Taken, without effect: what it chooses is not here.", bool) for name in SWITCHES},
    **{name: _answer(name, "None: the kernel that they are of is not here.", list) for name in CONFIGURATIONS},
}
