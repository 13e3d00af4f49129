# SPDX-License-Identifier: Apache-2.0
"""What takes long says what it is: a line on standard error, and none where it is done in a moment."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Timer

MOMENT = 1.0  # seconds


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Say ``what`` is being done, unless it is done within a moment.

    Example:
        >>> with telling("tracing sasa_resnet50"):
        ...     trace()
    """
    timer = Timer(MOMENT, _say, [what])
    timer.daemon = True  # nobody who leaves waits for it
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(what: str) -> None:
    with suppress(OSError, ValueError):  # a stream that cannot be written to, or is closed, is no reason to stop
        print(f"{what} ...", file=sys.stderr, flush=True)
