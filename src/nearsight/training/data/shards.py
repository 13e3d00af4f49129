# SPDX-License-Identifier: Apache-2.0
"""wds:PATH: WebDataset shards, tar files of images with their labels, for data too large to lie about as single files.

The shards are read once to note where each image lies. Then any process can fetch any image with a single read, so shards
are dealt out, shuffled and resumed as all other data are, and no image is seen twice in an epoch whatever the number of
processes. The order goes shard by shard, so that a disk or a network mount is read in long runs.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from glob import glob
from io import BytesIO
from itertools import takewhile
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from ...errors import DataError, TrainingError
from ...files import open_regular, read_text
from ...picture import ENDINGS, is_hidden, is_picture
from ..files import write_bytes
from .folders import ending, tell_left_out
from .stored import Gather, divided

INDEX_FILE = "nearsight-index.npz"
CLASSES_FILE = "classes.txt"
PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
MOST_CLASSES = 1 << 15  # without names; ImageNet has 21,841
LONGEST_LABEL = 32  # bytes of a .cls file
LARGEST_INDEX = 1 << 32  # bytes of one of its columns
MOST_SHARDS = 1_000_000  # that a pattern may name
COLUMNS = ("shard", "offset", "size", "label")


class Shards:
    """Pictures in tar files, found by an index with one row per picture: shard, offset and size in bytes, label."""

    def __init__(self, files: Sequence[Path], index: dict[str, np.ndarray]) -> None:
        self.files, self.index = files, index
        self.labels, self.blocks = index["label"], index["shard"]

    def name(self, index: int) -> str:
        with self._file(index).open("rb") as file:
            file.seek(int(self.index["offset"][index]) - tarfile.BLOCKSIZE)
            header = file.read(tarfile.BLOCKSIZE)
        member = header[:100].rstrip(b"\0").decode(errors="replace")
        return f"{self._file(index)}/{member}"

    def fetch(self, index: int) -> bytes:
        with self._file(index).open("rb") as file:
            file.seek(int(self.index["offset"][index]))
            return file.read(int(self.index["size"][index]))

    def _file(self, index: int) -> Path:
        return self.files[self.index["shard"][index]]


def load_shards(name: str, gather: Gather = divided) -> Any:
    """``wds:PATH``: a folder of shards, or a pattern with braces or stars, as ``data/{train,val}-{000..127}.tar``.

    The words train, val (or validation) and test in a shard's name tell its split. A sample is an image and its label in a
    ``.cls`` file; the names of the classes stand in ``classes.txt`` beside the shards, one a line, or they are numbers.
    """
    files = _shards(name.partition(":")[2])
    parts = [_part(file) for file in files]
    if "train" not in parts:
        raise DataError(f"{name} must match shards with the word train in their names; it matches {files[0].name} ...")
    index = _index(files)
    part_of_shard = np.array(parts)
    albums = {}
    for part in dict.fromkeys(parts):
        chosen = part_of_shard[index["shard"]] == part
        albums[part] = Shards(files, {column: values[chosen] for column, values in index.items()})
    return gather(name, _classes(files[0].parent / CLASSES_FILE, index["label"]), albums)


def _shards(pattern: str) -> list[Path]:
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise TrainingError("wds:PATH needs the package webdataset: pip install 'nearsight[train]'") from error

    if "://" in pattern or pattern.startswith("pipe:"):
        raise DataError(f"wds:PATH reads shards at random, so they must be files: mount what {pattern} names")
    place = Path(pattern).expanduser()
    if place.is_dir():
        files = sorted(place.glob("*.tar"))
    else:
        ranges = re.findall(r"(\d+)\.\.(\d+)", pattern)
        if prod(abs(int(first) - int(last)) + 1 for first, last in ranges) > MOST_SHARDS:
            raise DataError(f"wds:PATH takes at most {MOST_SHARDS} shards; received {pattern}")
        found = [sorted(glob(one)) or [one] for one in expand_urls(str(place))]
        files = [Path(file) for files in found for file in files]
    missing = [str(file) for file in files if not file.is_file()]
    if not files or missing:
        raise DataError(f"there is no shard {(missing or [place / '*.tar'])[0]}; wds:PATH needs tar files")
    known: dict[tuple[int, int], Path] = {}
    for file in files:  # by any name and link
        other = known.setdefault((file.stat().st_dev, file.stat().st_ino), file)
        if other is not file:
            raise DataError(
                f"a shard must be named once, or its pictures are seen twice; {other} and {file} are one file"
            )
    return files


def _part(file: Path) -> str:
    for word in re.split(r"[^a-z]+", file.name.lower()):
        if word in PARTS:
            return PARTS[word]
    raise DataError(f"the name of a shard must hold the word train, val or test; received {file}")


def _index(files: Sequence[Path]) -> dict[str, np.ndarray]:
    """Where every image lies: from the index file beside the shards while that is up to date, else from the shards."""
    stamps = [sorted(ENDINGS), *map(_stamp, files)]
    cache = files[0].parent / INDEX_FILE
    try:
        with open_regular(cache) as file, np.load(file, allow_pickle=False) as stored:
            if max(part.file_size for part in stored.zip.infolist()) > LARGEST_INDEX:
                raise ValueError("it claims more samples than there can be")
            if json.loads(str(stored["files"])) == stamps:
                tell_left_out(files[0].parent, Counter(json.loads(str(stored["left_out"]))))
                return {column: stored[column] for column in COLUMNS}
    except Exception:  # none yet, or a damaged one, of which zipfile and NumPy say so in many ways
        pass

    left_out: Counter[str] = Counter()
    rows = [(shard, *row) for shard, file in enumerate(files) for row in _scan(file, left_out)]
    if not rows:
        raise DataError(f"there are no samples in {files[0]} ...")
    index: dict[str, np.ndarray] = dict(zip(COLUMNS, np.array(rows, dtype=np.int64).T.copy(), strict=True))
    tell_left_out(files[0].parent, left_out)
    content, notes = BytesIO(), {"files": stamps, "left_out": left_out}
    np.savez(content, **{name: np.array(json.dumps(note)) for name, note in notes.items()}, **index)  # pyright: ignore[reportArgumentType]
    with suppress(TrainingError):  # a folder that cannot be written to: the shards are read again next time
        write_bytes(cache, content.getvalue())
    return index


def _stamp(file: Path) -> list[str | int]:
    """What tells a file from another of its name; the time of its last change, which none can set, from one of its age."""
    status = file.stat()
    return [str(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _check_whole(file: Path, end: int) -> None:
    """A tar file ends in two blocks of zeros. Where one was cut between two members, their absence is all that tells."""
    with file.open("rb") as content:
        content.seek(end)
        blocks = iter(partial(content.read, tarfile.BLOCKSIZE), b"")
        zeros = list(takewhile(bytes(tarfile.BLOCKSIZE).__eq__, blocks))
        if len(zeros) < 2 or content.tell() != end + len(zeros) * tarfile.BLOCKSIZE:
            raise EOFError("it was cut or damaged, since it does not end as tar files do")


def _scan(file: Path, left_out: Counter[str]) -> list[tuple[int, int, int]]:
    """Offset, size and label of every sample of a shard, in its order; counts in ``left_out`` what belongs to none."""
    from webdataset.tariterators import base_plus_ext

    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                key, extension = base_plus_ext(member.name) if member.isfile() else (None, None)
                if key is None or is_hidden(member.name):
                    continue
                extension = extension.lower()
                content = tar.extractfile(member) if extension == "cls" else None
                if is_picture(f"image.{extension}"):
                    images[key] = (member.offset_data, member.size)
                elif content is not None:
                    labels[key] = _label(content)
                else:
                    left_out[ending(member.name)] += 1
            _check_whole(file, tar.offset)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise DataError(
            f"cannot read the shard {file}: {error}; is it a whole tar file, not a packed one? Fetch it anew"
        ) from error
    odd = sorted(images.keys() ^ labels.keys())
    if odd:
        raise DataError(f"a sample must be an image and a .cls file with its label; {odd[0]} in {file} has only one")
    return [(*place, labels[key]) for key, place in images.items()]


def _label(content: IO[bytes]) -> int:
    """The number in a .cls file, of which little is read, whatever its size."""
    label = int(content.read(LONGEST_LABEL))
    if abs(label) >= 1 << 63:
        raise ValueError(f"a label is {label}")
    return label


def _classes(file: Path, labels: np.ndarray) -> tuple[str, ...]:
    if file.exists():
        try:
            text = read_text(file, errors="surrogateescape").removeprefix("\ufeff").removesuffix("\n")
        except OSError as error:
            raise DataError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error
        # Lines end in \n alone: a name may hold one of the other characters that str.splitlines parts lines at.
        names = tuple(line.removesuffix("\r") for line in text.split("\n"))
    else:
        if labels.max() >= MOST_CLASSES:  # each takes memory in the network, whether or not there is a picture of it
            raise DataError(
                f"the labels of shards without a {CLASSES_FILE} must be below {MOST_CLASSES}; received {labels.max()}"
            )
        names = tuple(str(number) for number in range(int(labels.max()) + 1))
    if labels.min() < 0 or labels.max() >= len(names):
        raise DataError(
            f"labels must be 0 to {len(names) - 1}; received {labels.min()} to {labels.max()} beside {file}"
        )
    return names
