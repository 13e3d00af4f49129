# SPDX-License-Identifier: Apache-2.0
"""Folders of pictures, one per class, as torchvision's ``ImageFolder`` reads them; but links may lead in circles.

A picture is a file, and not its name: two names for one file, by links of either kind or through a folder that links to
another, are one picture. Under one class it counts once. Under two classes, or in two parts of a data set, where the network
would be measured on what it was trained on, it is an error.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike

from ...errors import DataError
from ...files import to_path
from ...pages.brief import Brief
from ...picture import (
    ENDINGS,
    Identity,
    folders_above,
    is_folder,
    is_hidden,
    is_picture,
    pictures_in,
    target_of,
    tell_left_out,
)


@dataclass(frozen=True, repr=False)
class ClassFolders(Brief):
    """The classes by name, and of every picture its file, its class and what tells the file from others."""

    classes: list[str]
    samples: list[tuple[str, int]]
    identities: list[Identity]


def class_folders(folder: str | PathLike[str]) -> ClassFolders:
    """Every picture below ``folder``, by the folder in it that it lies in, at any depth; in the order of their names.

    What is no regular file but has a picture's name is among them: whoever opens it says so. What is left out is told.

    Raises:
        DataError: no class, a class without a picture, a picture in two classes, or a folder that cannot be read.
    """
    folder = to_path(folder)
    found = ClassFolders([], [], [])
    known: dict[Identity, tuple[str, int]] = {}
    left_out: Counter[str] = Counter()
    try:
        above = folders_above(folder)
        with os.scandir(folder) as listed:
            entries = sorted((one for one in listed if not is_hidden(one.name)), key=lambda one: one.name)
        folders = {entry.name for entry in entries if is_folder(entry)}
        found.classes.extend(one.name for one in entries if one.name in folders and target_of(one) not in above)
        for label, name in enumerate(found.classes):
            for path, identity in pictures_in(folder / name, above, left_out):
                if identity not in known:
                    known[identity] = path, label
                    found.samples.append((path, label))
                    found.identities.append(identity)
                elif known[identity][1] != label:
                    raise DataError(f"a picture must be in one class; {known[identity][0]} and {path} are one file")
    except OSError as error:
        raise DataError(f"{folder} must hold one folder of images per class: {error}") from error
    empty = sorted(set(range(len(found.classes))) - {label for _, label in found.samples})
    if not found.classes or empty:
        lacks = f"there is no image in {found.classes[empty[0]]}" if found.classes else "there is no folder in it"
        kinds = ", ".join(sorted(ENDINGS))
        raise DataError(f"{folder} must hold one folder of images per class: {lacks}. Images end in {kinds}")
    tell_left_out(folder, left_out)
    astray = [entry for entry in entries if is_picture(entry.name) and entry.name not in folders]
    if astray:
        print(f"left out {len(astray)} images in {folder} that lie in no class's folder", file=sys.stderr, flush=True)
    return found


def refuse_shared(parts: Mapping[str, ClassFolders]) -> None:
    """
    Raises:
        DataError: a picture in two of the parts.
    """
    known: dict[Identity, str] = {}
    for part in parts.values():
        for (path, _), identity in zip(part.samples, part.identities, strict=True):
            other = known.setdefault(identity, path)
            if other != path:
                raise DataError(f"no picture may be in two parts of the data; {other} and {path} are one file")
