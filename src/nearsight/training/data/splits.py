# SPDX-License-Identifier: Apache-2.0
"""What the splits of a data set are called where people store them: one table for folders, shards and the Hub's library."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from functools import cache

from ...errors import DataError

SPELLINGS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev", "development"),
    "test": ("test", "testing", "tst", "tests"),
}
PARTS = {word: part for part, words in SPELLINGS.items() for word in words}


def part_of(name: str) -> str | None:
    """``train``, ``val`` or ``test`` where a name is one of its spellings, in any case.

    Example:
        >>> part_of("Validation"), part_of("cat")
        ('val', None)
    """
    return PARTS.get(name.casefold())


def parts_among(names: Iterable[str], where: str) -> dict[str, str]:
    """The name of each split that is among some names, train first; empty where none is.

    Raises:
        DataError: two names of one split, or a split without a train beside it.

    Example:
        >>> parts_among(["Test", "notes", "training"], "photos")
        {'train': 'training', 'test': 'Test'}
    """
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        part = part_of(name)
        if part is not None:
            found.setdefault(part, []).append(name)
    for part, spelled in found.items():
        if len(spelled) > 1:
            raise DataError(
                f"a data set must have one {part} split; {where} has {' and '.join(spelled)}: join them, or rename all but "
                "one"
            )
    if found and "train" not in found:
        there = ", ".join(name for spelled in found.values() for name in spelled)
        raise DataError(
            f"{where} must have a split named train; it has {there}: add it, or, where {there} is a class, rename that"
        )
    return {part: found[part][0] for part in SPELLINGS if part in found}


@cache
def tell(line: str) -> None:
    """A line on standard error, once however often the data is loaded, and by one process alone."""
    if os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0":
        print(line, file=sys.stderr, flush=True)


def tell_unread(names: Iterable[str], read: Iterable[str], where: str) -> None:
    """Say what lies beside the splits and is not read."""
    unread = sorted(names)
    if unread:
        tell(f"not read: {', '.join(unread)} in {where}, beside the splits {', '.join(read)}")
