# SPDX-License-Identifier: Apache-2.0
"""hf:NAME: data sets of the Hugging Face Hub and local folders that the ``datasets`` library reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError
from ...extras import need
from ...picture import ending, is_hidden, is_picture, tell_left_out
from .decoded import Gather, divided
from .splits import parts_among, tell_unread


class HubImages:
    """Pictures in the rows of a table of ``datasets``."""

    blocks = None

    def __init__(self, table: Any, image: str, label: str, part: str) -> None:
        from datasets import Image

        self.table = table.cast_column(image, Image(decode=False))  # undecoded, so that a broken one can be named
        self.image, self.part = image, part
        labels = table.select_columns(label).with_format("arrow")[:][label]
        if labels.null_count:
            raise DataError(
                f"every row must have a label; {self.name(labels.is_null().to_pylist().index(True))} has none, and so "
                f"{labels.null_count} of {len(labels)}: leave them out"
            )
        self.labels = labels.to_numpy()

    def name(self, index: int) -> str:
        path = (self.table[index][self.image] or {}).get("path")  # a row may have no picture
        return f"row {index} of {self.part}" + (f" ({path})" if path else "")

    def fetch(self, index: int) -> str | bytes:
        image = self.table[index][self.image] or {}
        source = image.get("path") if image.get("bytes") is None else image["bytes"]
        if source is None:
            raise DataError("there is no image in it")
        return source


def load_hub(name: str, gather: Gather = divided) -> Any:
    """``hf:NAME``: a name on the Hub, fetched on first use, or a folder: one that ``save_to_disk`` wrote, or of images."""
    need(("datasets",), "hf:NAME", "datasets")
    import datasets

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

    tables = found if isinstance(found, dict) else {"train": found}
    parts = parts_among(tables, source)
    if not parts:
        raise DataError(f"{source} must have a split named train; it has {', '.join(tables)}")
    tell_unread(set(tables) - set(parts.values()), parts.values(), source)
    image, label = _columns(source, tables[parts["train"]].features)
    features = {split: tables[split].features for split in parts.values()}
    for split, columns in features.items():
        missing = [column for column in (image, label) if column not in columns]
        if missing:
            raise DataError(
                f"all splits of {source} must have the same columns; {split} lacks {missing[0]}, which {parts['train']} has"
            )
    if folder.is_dir():
        tables = _only_pictures(tables, image, folder)
    stores = {part: HubImages(tables[split], image, label, split) for part, split in parts.items()}
    classes = _classes(source, {part: features[split][label] for part, split in parts.items()}, stores)
    return gather(name, classes, stores)


def _only_pictures(tables: Mapping[str, Any], image: str, folder: Path) -> dict[str, Any]:
    """Where pictures lie in files of their own, those that end as pictures do; the others are counted and told."""
    from datasets import Image

    kept, read = {}, set()
    for split, table in tables.items():
        undecoded = table.cast_column(image, Image(decode=False)) if image in table.column_names else table
        first = undecoded[0].get(image) if len(table) else None
        if first is None or first["bytes"] is not None:
            return dict(tables)
        paths = [(cell or {}).get("path") for cell in undecoded.select_columns(image)[image]]
        kept[split] = table.select([row for row, path in enumerate(paths) if path is None or is_picture(path)])
        read |= {Path(path).resolve() for path in paths if path is not None and is_picture(path)}
    files = (file for file in folder.rglob("*") if file.is_file() and file.stem != "metadata")
    unread = (
        file for file in files if not is_hidden(file.relative_to(folder).as_posix()) and file.resolve() not in read
    )
    tell_left_out(folder, Counter(ending(file.name) for file in unread))
    return kept


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


def _classes(source: str, features: Mapping[str, Any], stores: Mapping[str, HubImages]) -> tuple[str, ...]:
    """The names of the classes, with the labels of every split numbered as train's names are.

    Each split may have an order of its own. Whole numbers without names are the names.
    """
    named = {part: getattr(feature, "names", None) for part, feature in features.items()}
    without = [stores[part].part for part, names in named.items() if names is None]
    if without and len(without) < len(named):
        raise DataError(
            f"all splits of {source} must name their classes or none; {', '.join(without)} does not: cast its labels to "
            "the ClassLabel of the others"
        )
    if without:
        numbers = sorted({int(label) for store in stores.values() for label in np.unique(store.labels)})
        names_of = {part: {number: str(number) for number in numbers if number >= 0} for part in stores}
        classes = tuple(map(str, numbers))
    else:
        names_of = {part: dict(enumerate(names or ())) for part, names in named.items()}
        classes = tuple(names_of["train"].values())
    places = {name: place for place, name in enumerate(classes)}
    for part, store in stores.items():
        store.labels = _renumbered(source, store, names_of[part], places)
    return classes


def _renumbered(source: str, store: HubImages, names: Mapping[int, str], places: Mapping[str, int]) -> np.ndarray:
    numbers, inverse = np.unique(store.labels, return_inverse=True)
    for number in numbers.tolist():
        row = int((store.labels == number).argmax())
        if number not in names:
            raise DataError(
                f"the labels of {source} must be 0 to {len(places) - 1}, or whole numbers from 0 where they have no names; "
                f"received {number} in {store.name(row)}: is {store.part} a split without labels?"
            )
        if names[number] not in places:
            raise DataError(
                f"all splits of {source} must have the classes of train; {store.name(row)} is of the class "
                f"{names[number]}, and train has {', '.join(places)}"
            )
    return np.array([places[names[number]] for number in numbers.tolist()], dtype=np.int64)[inverse]
