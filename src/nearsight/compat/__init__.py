# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for packages that do not run here, repairs of others, and what others need to see of our layers."""

from . import natten, transformers

__all__ = ["natten", "transformers"]
