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
from collections.abc import Iterator, Sequence, Set
from contextlib import suppress
from functools import partial
from glob import glob
from io import BytesIO
from itertools import takewhile
from math import prod
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import IO, Any, NoReturn

import numpy as np

from ...errors import DataError, TrainingError
from ...extras import need
from ...files import open_regular, read_text, to_path, write_bytes
from ...picture import ENDINGS, ending, is_hidden, is_picture, tell_left_out
from .decoded import Gather, divided
from .splits import PARTS, part_of, parts_among, tell_unread

INDEX_FILE = "nearsight-index.npz"
CLASSES_FILE = "classes.txt"
MOST_CLASSES = 1 << 15  # without names; ImageNet has 21,841
LONGEST_LABEL = 256  # bytes of a .cls file
LARGEST_INDEX = 1 << 32  # bytes of one of its columns
MOST_SHARDS = 1_000_000  # that a pattern may name
COLUMNS = ("shard", "offset", "size", "label")


class Shards:
    """Pictures in tar files, found by an index with one row per picture: shard, offset and size in bytes, label."""

    def __init__(self, files: Sequence[str | PathLike[str]], index: dict[str, np.ndarray]) -> None:
        self.files, self.index = [to_path(file) for file in files], index
        self.labels, self.blocks = index["label"], index["shard"]

    def name(self, index: int) -> str:
        file, offset = self._file(index), int(self.index["offset"][index])
        try:
            with file.open("rb") as content:
                content.seek(offset - tarfile.BLOCKSIZE)
                header = content.read(tarfile.BLOCKSIZE)
        except OSError:  # the shard is gone, of which the message tells
            return f"{file}, at byte {offset}"
        return f"{file}/{header[:100].rstrip(bytes(1)).decode(errors='replace')}"

    def fetch(self, index: int) -> bytes:
        with self._file(index).open("rb") as file:
            file.seek(int(self.index["offset"][index]))
            return file.read(int(self.index["size"][index]))

    def _file(self, index: int) -> Path:
        return self.files[self.index["shard"][index]]


def load_shards(name: str, gather: Gather = divided) -> Any:
    """``wds:PATH``: a folder of shards, or a pattern with braces or stars, as ``data/{train,val}-{000..127}.tar``.

    A word of a shard's name tells its split, or else the name of its folder, by any of their ``SPELLINGS``. A sample is an
    image and its label in a ``.cls`` file, a number or a name. The names of the classes stand in ``classes.txt`` beside the
    shards, one a line; else they are the labels.
    """
    pattern = name.partition(":")[2]
    files = _shards(pattern)
    spelled = [_spelling(file, Path(pattern).expanduser()) for file in files]
    parts_among(set(spelled), name)
    index, labels = _index(files)
    shards = Shards(files, index)
    names, classes = _classes(shards, labels, Path(pattern).expanduser())
    index["label"] = classes[index["label"]]
    part_of_shard = np.array([PARTS[word] for word in spelled])
    stores = {}
    for part in dict.fromkeys(part_of_shard.tolist()):
        chosen = part_of_shard[index["shard"]] == part
        stores[part] = Shards(files, {column: values[chosen] for column, values in index.items()})
    return gather(name, names, stores)


def _shards(pattern: str) -> list[Path]:
    need(("webdataset",), "wds:PATH", "webdataset")
    from webdataset.shardlists import expand_urls

    if "://" in pattern or pattern.startswith("pipe:"):
        raise DataError(f"wds:PATH reads shards at random, so they must be files: mount what {pattern} names")
    place = Path(pattern).expanduser()
    if place.is_dir():
        files = _shards_in(place)
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


def _shards_in(folder: Path) -> list[Path]:
    """Those in a folder, and in folders in it that are named as splits."""
    folders = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    found = {inner.name: sorted(_visible(inner)) for inner in folders}
    splits = [inner for inner in found if part_of(inner)]
    tell_unread((inner for inner, shards in found.items() if shards and inner not in splits), splits, str(folder))
    return [*sorted(_visible(folder)), *(file for inner in splits for file in found[inner])]


def _visible(folder: Path) -> Iterator[Path]:
    """The shards in a folder; a Mac leaves files of its own whose names begin with a dot."""
    return (file for file in folder.iterdir() if file.suffix.lower() == ".tar" and not file.name.startswith("."))


def _spelling(file: Path, place: Path) -> str:
    """The word that tells the split of a shard, in its name or else that of its folder."""
    words = {word for word in re.split(r"[^a-z]+", file.name.lower()) if word in PARTS}
    outer = file.parent.name.lower()
    if outer in PARTS and (not words or (file.parent != place and place.is_dir())):
        words.add(outer)
    parts = {PARTS[word] for word in words}
    if len(parts) > 1:
        raise DataError(f"a shard must be of one split; the name of {file} holds {' and '.join(sorted(words))}")
    if not words:
        raise DataError(f"the name of a shard or of its folder must hold the word train, val or test; received {file}")
    return min(words)


def _index(files: Sequence[Path]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Where every image lies, and the labels as they are written, of which the column ``label`` holds the places.

    They come from the index file beside the shards while that is up to date, else from the shards.
    """
    stamps = [sorted(ENDINGS), *map(_stamp, files)]
    cache = files[0].parent / INDEX_FILE
    try:
        with open_regular(cache) as file, np.load(file, allow_pickle=False) as stored:
            if max(part.file_size for part in stored.zip.infolist()) > LARGEST_INDEX:
                raise ValueError("it claims more samples than there can be")
            if json.loads(str(stored["files"])) == stamps:
                tell_left_out(files[0].parent, Counter(json.loads(str(stored["left_out"]))))
                return {column: stored[column] for column in COLUMNS}, json.loads(str(stored["labels"]))
    except Exception:  # none yet, or a damaged one, of which zipfile and NumPy say so in many ways
        pass

    left_out: Counter[str] = Counter()
    samples = [(shard, *sample) for shard, file in enumerate(files) for sample in _scan(file, left_out)]
    if not samples:
        raise DataError(f"there are no samples in {files[0]} ...")
    labels = sorted({label for *_, label in samples})
    places = {label: place for place, label in enumerate(labels)}
    rows = np.array([(*where, places[label]) for *where, label in samples], dtype=np.int64)
    index: dict[str, np.ndarray] = dict(zip(COLUMNS, rows.T.copy(), strict=True))
    tell_left_out(files[0].parent, left_out)
    content, notes = BytesIO(), {"files": stamps, "labels": labels, "left_out": left_out}
    np.savez(content, **{name: np.array(json.dumps(note)) for name, note in notes.items()}, **index)  # pyright: ignore[reportArgumentType]
    with suppress(TrainingError):  # a folder that cannot be written to: the shards are read again next time
        write_bytes(cache, content.getvalue())
    return index, labels


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


def _scan(file: Path, left_out: Counter[str]) -> list[tuple[int, int, str]]:
    """Offset, size and label of every sample of a shard, in its order; counts in ``left_out`` what belongs to none.

    A sample's key is the name without the ending, so that it may hold dots. What hangs on the key of a sample by a dot, as
    ``0001.mask.png`` beside ``0001.png`` and ``0001.cls``, is another field of that sample, which is not read.
    """
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, str] = {}
    endings: dict[str, str] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if not member.isfile() or is_hidden(member.name):
                    continue
                key = str(name.with_suffix(""))
                content = tar.extractfile(member) if name.suffix.lower() == ".cls" else None
                if is_picture(name.name):
                    if key in images:
                        raise DataError(
                            f"a sample must have one image; {key} in {file} has two, {endings[key]} and {name.suffix}: give "
                            "each sample a key of its own"
                        )
                    images[key], endings[key] = (member.offset_data, member.size), name.suffix
                elif content is not None:
                    if key in labels:
                        raise DataError(
                            f"a sample must have one label; {key} in {file} has two: give each sample a key of its own"
                        )
                    labels[key] = _label(content, f"{key} in {file}")
                else:
                    left_out[ending(member.name)] += 1
            _check_whole(file, tar.offset)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise DataError(
            f"cannot read the shard {file}: {error}; is it a whole tar file, not a packed one? Fetch it anew"
        ) from error
    samples = images.keys() & labels.keys()
    odd = sorted(key for key in images.keys() ^ labels.keys() if not _is_field(key, samples))
    if odd:
        has = "no label" if odd[0] in images else "no image"
        raise DataError(
            f"a sample must be an image and a .cls file with its label; {odd[0]} in {file} has {has}, and so "
            f"{len(odd)} in all"
        )
    left_out.update(endings[key].lower() for key in images if key not in samples)
    return [(*place, labels[key]) for key, place in images.items() if key in samples]


def _is_field(key: str, samples: Set[str]) -> bool:
    """Whether a key is that of a sample and more, behind a dot."""
    inner = PurePosixPath(key)
    while inner.suffix:
        inner = inner.with_suffix("")
        if str(inner) in samples:
            return True
    return False


def _label(content: IO[bytes], sample: str) -> str:
    """What a .cls file says; little of it is read, whatever its size."""
    written = content.read(LONGEST_LABEL + 1)
    if len(written) > LONGEST_LABEL:
        raise DataError(f"a label must have at most {LONGEST_LABEL} bytes; that of the sample {sample} has more")
    try:
        label = written.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(
            f"a label must be a number or a name in UTF-8; that of the sample {sample} is neither"
        ) from error
    if not label or "\n" in label:
        raise DataError(f"a label must be one number or one name; received {label!r} for the sample {sample}")
    return str(int(label)) if re.fullmatch(r"[+-]?[0-9]+", label) else label


def _classes(shards: Shards, labels: Sequence[str], place: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """The names of the classes, and the class of each label as it is written."""
    numbers = [re.fullmatch("-?[0-9]+", label) is not None for label in labels]
    file, names = _named_classes(shards.files, place)

    def refuse(label: str, rule: str) -> NoReturn:
        sample = shards.name(int((shards.labels == labels.index(label)).argmax()))
        raise DataError(f"labels must be {rule}; received {label!r} in {sample}")

    if names is None:
        if any(numbers) and not all(numbers):
            refuse(labels[numbers.index(False)], f"all numbers or all names, as {labels[numbers.index(True)]!r} is not")
        ordered = sorted(labels, key=int) if all(numbers) else list(labels)
        if all(numbers) and int(ordered[0]) < 0:
            refuse(ordered[0], "names or whole numbers from 0")
        if all(numbers) and int(ordered[-1]) >= MOST_CLASSES:  # such are no numbers of classes
            refuse(ordered[-1], f"below {MOST_CLASSES} without a {CLASSES_FILE}")
        names, known = tuple(ordered), {label: number for number, label in enumerate(ordered)}
    else:
        times = Counter(names)
        by_name = {name: number for number, name in enumerate(names) if times[name] == 1}
        known = by_name | {str(number): number for number in range(len(names))}
        for label in labels:
            if label not in known:
                refuse(label, f"0 to {len(names) - 1} or one of the names in {file}")
    return names, np.array([known[label] for label in labels], dtype=np.int64)


def _named_classes(files: Sequence[Path], place: Path) -> tuple[Path | None, tuple[str, ...] | None]:
    """The file that names the classes, and what it says; beside the shards, or in the folder above that was asked for."""
    folders: list[Path] = [place] if place.is_dir() else []
    folders = list(dict.fromkeys([*folders, *(file.parent for file in files)]))
    lists = [folder / CLASSES_FILE for folder in folders]
    found = {file: _read_names(file) for file in lists if file.exists()}
    if len(set(found.values())) > 1:
        raise DataError(f"all shards must have the same classes; {' and '.join(map(str, found))} differ")
    return next(iter(found.items()), (None, None))


def _read_names(file: Path) -> tuple[str, ...]:
    try:
        text = read_text(file, errors="surrogateescape").removeprefix("\ufeff")
    except OSError as error:
        raise DataError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error
    if "\0" in text:
        raise DataError(f"cannot read {file}: it must name a class a line, in UTF-8")
    # Lines end in \n alone: a name may hold one of the other characters that str.splitlines parts lines at.
    names = tuple(line.strip(" \t\r") for line in text.rstrip(" \t\r\n").split("\n"))
    if "" in names:
        raise DataError(
            f"{file} must name a class on every line; line {names.index('') + 1} is empty: the numbers of the classes "
            "behind it are not sure"
        )
    return names
