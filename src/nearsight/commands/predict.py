# SPDX-License-Identifier: Apache-2.0
"""``nearsight predict``: what a trained network says of pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import DataError, OptionError
from .arguments import parse, parser_of

EXAMPLES = """\
examples:
  nearsight predict runs/photos cat.jpg
  nearsight predict sasa_nano seven.png                      its weights, of digits, come along
  nearsight predict runs/photos ~/new-photos --top 3         every picture in a folder
  nearsight predict runs/photos *.png --csv > said.csv

Numbers are probabilities: the softmax of the network's outputs. A picture that cannot be read is named, the others are
done, and the exit code is 2.
"""
COLUMNS = ("image", "rank", "class", "probability")
BATCH = 32  # pictures that are read, and then told, at a time


def run(arguments: list[str]) -> None:
    parser = parser_of("predict", "What a trained network says of pictures.", EXAMPLES)
    parser.add_argument("run", metavar="DIR|FILE", help="folder of a run, a .safetensors or a .ckpt file, or sasa_nano")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="a picture, or a folder with some, at any depth")
    parser.add_argument("--top", type=int, default=1, metavar="N", help="the likeliest N classes of each (default: 1)")
    parser.add_argument("--csv", action="store_true", help=f"print CSV: {', '.join(COLUMNS)}")
    parser.add_argument(
        "--background", help="colour that shows where images are transparent (default: the run's, white)"
    )
    options = parse(parser, arguments)
    if options.top < 1:
        raise OptionError(f"--top must be at least 1; received {options.top}")

    from ..pages.csv_json import csv_lines
    from ..picture import opaque
    from ..saved import load

    model = load(options.run)
    if options.background is not None:
        opaque(options.background)
        model.view = replace(model.view, background=options.background)
    unread: list[str] = []
    if options.csv:
        print(csv_lines([COLUMNS]), end="")
    for names in _batches(_files(options.images, unread)):
        said = _said(model, names, unread, options.top)
        print(csv_lines(_rows(said)) if options.csv else _lines(said), end="", flush=True)
    if unread:
        raise DataError(f"{len(unread)} of the images cannot be read: {'; '.join(unread)}")


def _files(images: Sequence[str], unread: list[str]) -> Iterator[str]:
    """The pictures that were named, and those in folders that were."""
    from ..picture import pictures_in, tell_left_out

    for image in images:
        if not Path(image).is_dir():
            yield image
            continue
        left_out: Counter[str] = Counter()
        try:
            found = [path for path, _ in pictures_in(image, left_out=left_out)]
        except OSError as error:
            unread.append(f"cannot read the folder {error.filename}: {error.strerror}")
            continue
        tell_left_out(image, left_out)
        if not found:
            unread.append(f"there is no image in {image}")
        yield from found


def _batches(names: Iterator[str]) -> Iterator[list[str]]:
    waiting: list[str] = []
    for name in names:
        waiting.append(name)
        if len(waiting) == BATCH:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _said(model, names: Sequence[str], unread: list[str], count: int) -> list[tuple[str, list[tuple[str, float]]]]:
    """Of each picture that can be read, its likeliest classes."""
    seen, read = [], []
    for name in names:
        try:
            seen.append(model.preprocess(name)[0])
        except DataError as error:
            unread.append(str(error))
        else:
            read.append(name)
    return [(name, one.top(count)) for name, one in zip(read, model.predict(seen), strict=True)]


def _rows(said: Sequence[tuple[str, list[tuple[str, float]]]]) -> Iterator[tuple[str, int, str, str]]:
    for name, classes in said:
        for rank, (label, probability) in enumerate(classes, start=1):
            yield name, rank, label, f"{probability:.6g}"


def _lines(said: Sequence[tuple[str, list[tuple[str, float]]]]) -> str:
    from ..pages.names import readable

    return "".join(
        f"{readable(name)}: {', '.join(f'{label} {100 * probability:.1f} %' for label, probability in classes)}\n"
        for name, classes in said
    )
