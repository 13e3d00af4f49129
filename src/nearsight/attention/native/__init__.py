# SPDX-License-Identifier: Apache-2.0
"""The kernel in csrc/: local attention on the CPU, forward and backward, by SIMD."""

from .backend import (
    as_operators,
    attend,
    name,
    project_and_attend,
    second_best,
    takes_groups,
    unavailable,
    use_variant,
    why_not,
)
from .library import instruction_set, variants
from .projected import heads_of

__all__ = [
    "as_operators",
    "attend",
    "heads_of",
    "instruction_set",
    "name",
    "project_and_attend",
    "second_best",
    "takes_groups",
    "unavailable",
    "use_variant",
    "variants",
    "why_not",
]
