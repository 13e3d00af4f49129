# SPDX-License-Identifier: Apache-2.0
"""What `nearsight bench` measures: the operation, the layers that take the place of a convolution, and whole networks, in
PyTorch and where they are deployed."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import DataError, OptionError
from ..files import write_whole

BENCHES = ("core", "layers", "models", "deploy", "accelerated")  # files of this folder


def run(bench: str, *, threads: int | None = None, quick: bool = False, json_file: str | Path | None = None) -> None:
    """Measure and print tables; write every number to ``json_file``.

    Args:
        bench: one of ``BENCHES``.
        threads: None measures on one thread and on as many as PyTorch has.
        quick: fewer shapes and fewer rounds: to see that it works, not to quote.

    Raises:
        OptionError: an unknown bench, or a number of threads below one.
        DataError: ``json_file`` cannot be written.
    """
    if bench not in BENCHES:
        raise OptionError(f"there is no bench {bench!r}; there are {', '.join(BENCHES)}")
    import torch

    from ..pages.csv_json import to_json
    from .timing import setting, using_threads

    measure = import_module(f".{bench}", __name__).measure
    report: dict[str, Any] = {"bench": bench, "quick": quick, "runs": []}
    for count in sorted({1, torch.get_num_threads()} if threads is None else {threads}):
        with using_threads(count):
            facts = setting()
            print("\n" + ", ".join(f"{name} {value}" for name, value in facts.items()))
            report["runs"].append({**facts, "rows": measure(quick)})
    if json_file is not None:
        try:
            write_whole(Path(json_file), (to_json(report, indent=1) + "\n").encode())
        except OSError as error:
            raise DataError(f"cannot write {json_file}: {error.strerror or error}") from error
