# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for packages that do not run here."""

from . import natten

__all__ = ["natten"]
