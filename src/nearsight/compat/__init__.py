# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for packages that do not run here, and what others need to see of our layers."""

from . import natten

__all__ = ["natten"]
