# SPDX-License-Identifier: Apache-2.0
"""hf:NAME: data sets of the Hugging Face Hub and local folders that the ``datasets`` library reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError, TrainingError
from .stored import Album, Gather, divided

PARTS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val", "test": "test"}


class Rows:
    """Pictures in the rows of a table of ``datasets``."""

    blocks = None

    def __init__(self, table: Any, image: str, label: str, part: str) -> None:
        from datasets import Image

        self.table = table.cast_column(image, Image(decode=False))  # undecoded, so that a broken one can be named
        self.image, self.part = image, part
        self.labels = np.array(table.select_columns(label).with_format("numpy")[:][label])

    def name(self, index: int) -> str:
        path = self.table[index][self.image]["path"]
        return f"row {index} of {self.part}" + (f" ({path})" if path else "")

    def fetch(self, index: int) -> str | bytes:
        image = self.table[index][self.image]
        return image["path"] if image["bytes"] is None else image["bytes"]


def load_hub(name: str, gather: Gather = divided) -> Any:
    """``hf:NAME``: a name on the Hub, fetched on first use, or a folder: one that ``save_to_disk`` wrote, or of images."""
    try:
        import datasets
    except ImportError as error:
        raise TrainingError("hf:NAME needs the package datasets: pip install 'nearsight[train]'") from error

    source = name.partition(":")[2]
    folder = Path(source).expanduser()
    try:
        if any((folder / file).exists() for file in ("dataset_dict.json", "dataset_info.json")):
            found: Any = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(str(folder) if folder.is_dir() else source)
    except Exception as error:  # the library raises many kinds; each means the same to the user
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"datasets cannot load {source}: {reason}") from error

    tables = {PARTS[part]: table for part, table in found.items() if part in PARTS} if isinstance(found, dict) else {}
    if not isinstance(found, dict):
        tables = {"train": found}
    if "train" not in tables:
        raise DataError(f"{source} must have a split named train; it has {', '.join(found)}")
    image, label = _columns(source, tables["train"].features)
    albums = {part: Rows(table, image, label, part) for part, table in tables.items()}
    return gather(name, _classes(source, tables["train"].features[label], albums), albums)


def _columns(source: str, features: Any) -> tuple[str, str]:
    """The only column of images, and that of class labels: the only one, or the one named label or fine_label."""
    from datasets import ClassLabel, Image

    images = [column for column, kind in features.items() if isinstance(kind, Image)]
    labels = [column for column, kind in features.items() if isinstance(kind, ClassLabel)]
    whole = [column for column, kind in features.items() if getattr(kind, "dtype", "").startswith(("int", "uint"))]
    named = [column for column in ("label", "labels", "fine_label") if column in labels + whole]
    label = named[:1] or (labels if len(labels) == 1 else [])
    if len(images) != 1 or not label:
        raise DataError(
            f"{source} must have one column of images and one of class labels; its columns are "
            f"{', '.join(f'{column} ({type(kind).__name__})' for column, kind in features.items())}"
        )
    return images[0], label[0]


def _classes(source: str, feature: Any, albums: Mapping[str, Album]) -> tuple[str, ...]:
    labels = np.concatenate([album.labels for album in albums.values()])
    names = getattr(feature, "names", None) or [str(number) for number in range(int(labels.max()) + 1)]
    if labels.min() < 0 or labels.max() >= len(names):
        raise DataError(
            f"the labels of {source} must be 0 to {len(names) - 1}; received {labels.min()} to {labels.max()}: is a "
            f"split without labels among {', '.join(albums)}?"
        )
    return tuple(names)
