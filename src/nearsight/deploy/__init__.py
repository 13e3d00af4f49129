# SPDX-License-Identifier: Apache-2.0
"""Networks where they are deployed: the native operator for runtimes other than PyTorch, none of which is needed here."""

from __future__ import annotations

from ..built import built, why_not_built
from ..errors import BackendError

__all__ = ["onnxruntime_library"]


def onnxruntime_library() -> str:
    """The library that makes ``nearsight::LocalAttention`` known to onnxruntime 1.17 and later, for its session options.

    What ``nearsight export --operators native`` writes asks for it. It needs no PyTorch, runs on the session's own threads,
    and computes to the bit what the native kernel does here. docs/howto/deploy.md specifies the operator.

    Raises:
        BackendError: it was not built, for lack of a compiler; the message says why.

    Example:
        >>> import onnxruntime
        >>> options = onnxruntime.SessionOptions()
        >>> options.register_custom_ops_library(onnxruntime_library())
    """
    path = built(__name__, "libnearsight_onnxruntime")
    if path is None:
        raise BackendError(f"there is no operator for onnxruntime: {why_not_built()}")
    return str(path)
