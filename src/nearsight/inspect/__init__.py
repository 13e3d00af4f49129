# SPDX-License-Identifier: Apache-2.0
"""Looking at what a network does: where it attends, and which symmetries it keeps."""

from .equivariance import equivariance_error
from .maps import AttentionMap, attention_maps

__all__ = ["AttentionMap", "attention_maps", "equivariance_error"]
