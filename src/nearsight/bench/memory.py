# SPDX-License-Identifier: Apache-2.0
"""Taking memory fairly: the largest resident set of a process that has done nothing else, and keeps nothing back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

# Large pieces of memory go back to the system when they are freed, and come in small pages. What an allocator keeps for
# later differs from run to run by a tenth.
NOTHING_KEPT = {"MALLOC_MMAP_THRESHOLD_": "65536", "THP_MEM_ALLOC_ENABLE": "0"}


def peak_memory() -> float:
    """The largest resident set of this process so far, in bytes; NaN on Windows, which is not asked."""
    if sys.platform == "win32":
        return float("nan")
    import resource

    if sys.platform == "linux":  # where getrusage begins with the peak of the process that started this one
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function of a module returns in a process of its own, as far as JSON keeps it.

    Args:
        arguments: of the function; what Python prints of them has to be what makes them.
    """
    name = function.__name__
    here = "import sys; sys.path[:] = [place for place in sys.path if place]"  # without the current folder
    program = (
        f"{here}; import json; from {function.__module__} import {name}; print(json.dumps({name}(*{arguments!r})))"
    )
    environment = {**os.environ, **NOTHING_KEPT}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])
