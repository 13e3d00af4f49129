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


def run(
    bench: str,
    *,
    threads: int | None = None,
    quick: bool = False,
    json_file: str | Path | None = None,
    network: str | None = None,
    size: int | None = None,
) -> None:
    """Measure and print tables; write every number to ``json_file``.

    Args:
        bench: one of ``BENCHES``.
        threads: None measures on one thread and on as many as PyTorch has.
        quick: fewer shapes and fewer rounds: to see that it works, not to quote.
        network, size: of ``"deploy"``, one network alone, and other images than it is measured with.

    Raises:
        OptionError: an unknown bench or network, or a number below one.
        DataError: ``json_file`` cannot be written.
    """
    if bench not in BENCHES:
        raise OptionError(f"there is no bench {bench!r}; there are {', '.join(BENCHES)}")
    given = {name: value for name, value in (("network", network), ("size", size)) if value is not None}
    if given and bench != "deploy":
        raise OptionError(f"--{' and --'.join(given)} is for nearsight bench deploy; received bench {bench}")
    if size is not None and size < 1:
        raise OptionError(f"--size must be at least 1; received {size}")
    import torch

    from ..pages.csv_json import to_json
    from .timing import setting, using_threads

    measure = import_module(f".{bench}", __name__).measure
    report: dict[str, Any] = {"bench": bench, "quick": quick, "runs": []}
    for count in sorted({1, torch.get_num_threads()} if threads is None else {threads}):
        with using_threads(count):
            facts = setting()
            print("\n" + ", ".join(f"{name} {value}" for name, value in facts.items()))
            report["runs"].append({**facts, "rows": measure(quick, **given)})
    if json_file is not None:
        try:
            write_whole(Path(json_file), (to_json(report, indent=1) + "\n").encode())
        except OSError as error:
            raise DataError(f"cannot write {json_file}: {error.strerror or error}") from error
