# SPDX-License-Identifier: Apache-2.0
"""The kernel in csrc/: local attention on the CPU, forward and backward, by SIMD."""

from .backend import as_operators, attend, name, second_best, takes_groups, unavailable, use_variant, why_not
from .library import instruction_set, variants

__all__ = [
    "as_operators",
    "attend",
    "instruction_set",
    "name",
    "second_best",
    "takes_groups",
    "unavailable",
    "use_variant",
    "variants",
    "why_not",
]
