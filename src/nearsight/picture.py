# SPDX-License-Identifier: Apache-2.0
"""From a file to the picture that a person sees: upright, in eight bits, on a ground where it lets one through.

Training, evaluation, prediction and explorer open pictures here and nowhere else, so that a network is shown what it was
trained on; which files of a folder are pictures is told here as well.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from io import BytesIO
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from .errors import DataError, DtypeError, NearsightError, OptionError, ShapeError
from .files import open_regular, to_path

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    Source = str | PathLike[str] | bytes | Image | np.ndarray  # of a picture

Identity = tuple[int, int]  # of a file, whatever its names: device and inode

# What a file of pictures may be, by Pillow's names, and what its name then ends with, in any case. Not the kinds for which
# Pillow starts another program, such as PostScript.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "JPEG2000": (".jp2", ".j2k", ".jpx", ".jpf", ".jpc", ".j2c"),
    "TGA": (".tga",),
    "ICO": (".ico",),
    "PCX": (".pcx",),
    "QOI": (".qoi",),
    "SGI": (".sgi", ".rgb", ".bw"),
    "SUN": (".ras",),
    "DDS": (".dds",),
    "PSD": (".psd",),
    "XBM": (".xbm",),
}
ENDINGS = frozenset(ending for endings in FORMATS.values() for ending in endings)
BACKGROUND = "white"  # behind what is transparent

SHOWN = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
DEEP = ("I", "F")  # and all kinds of I;16: more than eight bits
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # of an array with so many channels
USUAL_TOPS = {"I": (255, 65535), "F": (1, 255, 65535)}  # the brightest cells that a kind without a range of its own has
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF's tags
WHITE_IS_ZERO, UNSIGNED = 0, 1  # and values of the last two


def is_picture(name: str) -> bool:
    """Whether a file's name is that of a picture: by its ending, in any case.

    Example:
        >>> is_picture("cat/IMG_1.JPG"), is_picture("cat/notes.txt")
        (True, False)
    """
    return PurePosixPath(name).suffix.lower() in ENDINGS


def is_hidden(name: str) -> bool:
    """Whether a file, or a folder that it lies in, has a name that begins with a dot: what programs put beside one's own.

    Args:
        name: below the folder that was asked for, with slashes; what is above is the user's.

    Example:
        >>> is_hidden("cat/._001.png"), is_hidden(".ipynb_checkpoints/1.png"), is_hidden("./cat/1.png")
        (True, True, False)
    """
    return any(part.startswith(".") and part not in (".", "..") for part in name.replace("\\", "/").split("/"))


def opaque(colour: str) -> tuple[int, int, int]:
    """Red, green and blue of a colour, 0 to 255: a name of CSS, ``#rrggbb``, ``rgb(...)`` or another way of Pillow's.

    Raises:
        OptionError: no such colour, or one that lets something through.

    Example:
        >>> opaque("white"), opaque("rgb(255, 128, 0)")
        ((255, 255, 255), (255, 128, 0))
    """
    from PIL import ImageColor

    try:
        red, green, blue, *alpha = ImageColor.getrgb(colour)
        if alpha:
            raise ValueError("it lets something through")
    except (ValueError, AttributeError, TypeError) as error:
        raise OptionError(
            f"background must be an opaque colour such as white or #ff8000; received {colour!r:.100}"
        ) from error
    return red, green, blue


def open_picture(source: Source, channels: int = 3, background: str = BACKGROUND) -> Image:
    """The picture in a file as a person sees it: the first, where it holds several, in eight bits.

    It is turned as its EXIF says. What is transparent shows ``background``. More than eight bits are scaled by their range:
    16 bits by 65535, 12 by 4095. 32 bits and floating point numbers have no range that all agree on: where no cell is
    negative and the largest is at most 255 or 65535, whole numbers are scaled by that; floating point ones by 1, 255 or
    65535, but where they pass one of these by less than double; all others by the picture's own smallest and largest cell.

    Args:
        source: a file, or what is in one; a picture of Pillow's, or an array as :func:`from_array` takes it.
        channels: 1 for a grey picture (mode L), else RGB.
        background: a colour, as :func:`opaque` has it.

    Raises:
        OSError: the file is not there, or no regular file.
        DataError: it holds no picture, a damaged one, or one that cannot be shown; the message is the reason alone.
        OptionError, ShapeError, DtypeError: no such colour; an array that is no picture; something else.

    Example:
        >>> open_picture("cat.jpg").mode
        'RGB'
    """
    from PIL import ImageOps

    ground = opaque(background)
    with _read(source) as picture:
        with _naming_damage():
            picture.load()
        try:
            upright = ImageOps.exif_transpose(picture)
        except Exception:  # a picture whose EXIF is damaged is shown as it lies, as all programs do
            upright = picture
        return _plain(upright, picture, ground).convert("L" if channels == 1 else "RGB")


def read_picture(source: Source, channels: int = 3, background: str = BACKGROUND) -> Image:
    """:func:`open_picture` with messages that name the file.

    Raises:
        DataError: there is no such file, or it holds no picture that can be read or shown.
        OptionError, ShapeError, DtypeError: no such colour; an array that is no picture; something else.
    """
    name = os.fspath(source) if isinstance(source, (str, PathLike)) else f"of type {type(source).__name__}"
    try:
        return open_picture(source, channels, background)
    except FileNotFoundError as error:
        raise DataError(f"there is no image {name}") from error
    except (OSError, DataError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read the image {name}: {reason}") from error


def from_array(cells: np.ndarray) -> Image:
    """An array as a picture of Pillow's: (H, W), or (H, W, channels) with grey, grey and alpha, RGB or RGBA.

    Black is 0. White is True, the largest number of ``uint8`` and ``uint16``, or 1 where the numbers are floating point.

    Raises:
        ShapeError: another shape.
        OptionError: numbers of another kind, or floating point ones outside of 0 to 1, whose white is not known.

    Example:
        >>> from_array(np.ones((8, 6, 3))).size
        (6, 8)
    """
    from PIL import Image

    channels = 1 if cells.ndim == 2 else cells.shape[-1]
    if cells.ndim not in (2, 3) or channels not in MODES or 0 in cells.shape:
        raise ShapeError(
            "an array is a picture of (H, W), or of (H, W, channels) with 1 to 4 channels, the colours last; received "
            f"{cells.shape}: several pictures are a list, or (B, H, W, channels)"
        )
    eight_bits = _in_eight_bits(cells)
    return Image.fromarray(eight_bits.reshape(*cells.shape[:2], *([channels] if channels > 1 else [])), MODES[channels])


def _in_eight_bits(cells: np.ndarray) -> np.ndarray:
    import numpy as np

    if cells.dtype == np.uint8:
        return np.ascontiguousarray(cells)
    if np.issubdtype(cells.dtype, np.floating):
        low, high = float(cells.min()), float(cells.max())
        if not (low >= 0 and high <= 1):  # NaN is neither
            raise OptionError(
                f"an array of floating point numbers is a picture where all are between 0 and 1; received {low:g} to "
                f"{high:g}: divide by what is white, or give uint8"
            )
        return np.round(cells.astype(np.float64) * 255).astype(np.uint8)
    if cells.dtype not in (np.bool_, np.uint16):
        raise OptionError(
            f"an array is a picture in uint8, uint16, bool or floating point; received {cells.dtype}, of which it is not "
            "known what is white: .astype(numpy.uint8) where it is 255"
        )
    white = 1 if cells.dtype == np.bool_ else 65535
    return np.round(cells * (255 / white)).astype(np.uint8)


def shorter_side(source: str | Path | bytes) -> int:
    """The smaller of a picture's width and height, by its header alone.

    Raises:
        OSError, DataError: as :func:`open_picture` does.
    """
    with _read(source) as picture:
        return min(picture.size)


@contextmanager
def _read(source: Source) -> Iterator[Image]:
    """A picture of which only the header has been read; nothing but regular files, and nothing that runs a program."""
    import numpy as np
    from PIL import Image

    if isinstance(source, (Image.Image, np.ndarray)):
        yield source if isinstance(source, Image.Image) else from_array(source)
        return
    if not isinstance(source, (str, PathLike, bytes)):
        kinds = "a file, its bytes, a picture of Pillow's or an array"
        raise DtypeError(f"an image is {kinds}; received {source!r:.100} of type {type(source).__name__}")
    with BytesIO(source) if isinstance(source, bytes) else open_regular(to_path(source)) as file:
        Image.init()  # an older Pillow knows fewer, and asked for one that it does not know it fails
        with _naming_damage():
            picture = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
        yield picture


@contextmanager
def _naming_damage() -> Iterator[None]:
    from PIL import UnidentifiedImageError

    try:
        yield
    except (MemoryError, NearsightError):
        raise
    except Exception as error:  # decoders raise what they like when bytes are damaged, struct.error included
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise DataError(f"it is damaged, or no picture that Pillow knows{reason}") from error


def _plain(upright: Image, file: Any, ground: tuple[int, int, int]) -> Image:
    """Without transparency, in a mode of eight bits.

    Args:
        upright: the picture, in the mode that its ``file`` has.
    """
    from PIL import Image

    if upright.mode in DEEP or upright.mode.startswith("I;16"):
        return _scaled(upright, file, ground)
    if upright.mode not in SHOWN:
        raise DataError(f"a picture of mode {upright.mode} cannot be shown: save it in grey, RGB or RGBA")
    if not upright.has_transparency_data:
        return upright
    coloured = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", coloured.size, (*ground, 255)), coloured).convert("RGB")


def _scaled(upright: Image, file: Any, ground: tuple[int, int, int]) -> Image:
    """Grey of more than eight bits in eight."""
    import numpy as np
    from PIL import Image

    cells = np.asarray(upright)
    tags = getattr(file, "tag_v2", {})
    bits = tags.get(BITS, (16,))[0]
    clear = file.info.get("transparency")  # the one value of a PNG that is not seen
    if file.mode == "I" and bits == 32 and tags.get(SAMPLE_FORMAT, (UNSIGNED,))[0] == UNSIGNED and tags:
        cells = cells.view(np.uint32)
    if not np.isfinite(cells).all():
        raise DataError("it has cells that are no finite numbers")
    if file.mode.startswith("I;16"):
        bottom, top = 0, 2**bits - 1
    else:
        # Pillow brings these to 16 bits, though its mode has more.
        bottom, top = (0, 65535) if file.format in ("PNG", "PPM") and file.mode == "I" else _limits(cells, file.mode)
    grey = ((cells.astype(np.float64) - bottom) * (255 / (top - bottom))).clip(0, 255).round().astype(np.uint8)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 255 - grey
    if not isinstance(clear, int):
        return Image.fromarray(grey)
    return Image.fromarray(np.where((cells == clear)[..., None], np.array(ground, np.uint8), grey[..., None]))


def _limits(cells: np.ndarray, mode: str) -> tuple[float, float]:
    """What is black and what is white, where neither the file's kind nor its bits tell."""
    bottom, top = min(float(cells.min()), 0.0), max(float(cells.max()), 0.0)
    if bottom == 0:
        least = 0.0
        for usual in USUAL_TOPS[mode]:
            if least <= top <= usual:
                return 0.0, float(usual)
            least = usual * (2 if mode == "F" else 1)  # resampling shoots a little beyond
    return bottom, top


# ------------------------------------------------------------------------------------------------------------- folders


def pictures_in(
    folder: str | PathLike[str], above: Collection[Identity] = (), left_out: Counter[str] | None = None
) -> list[tuple[str, Identity]]:
    """The pictures in a folder and in those in it, by path; a folder is entered once, whatever links lead to it.

    What is no regular file but has a picture's name is among them: whoever opens it says so.

    Args:
        above: folders that are not entered; see :func:`folders_above`.
        left_out: counts what is no picture, by :func:`ending`.

    Raises:
        OSError: a folder that cannot be read.
    """
    seen = {*above}
    waiting, found = [os.fspath(folder)], []
    while waiting:
        place = waiting.pop()
        status = os.stat(place)
        if identity_of(status) in seen:
            continue
        seen |= folders_above(place)
        with os.scandir(place) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if is_hidden(entry.name):
                    continue
                if is_folder(entry):
                    waiting.append(entry.path)
                elif is_picture(entry.name):
                    # Only a link is looked at: asking for each of a million files takes minutes on a network.
                    identity = target_of(entry) if entry.is_symlink() else (status.st_dev, entry.inode())
                    found.append((place, entry.name, entry.path, identity))
                elif left_out is not None:
                    left_out[ending(entry.name)] += 1
    return [(path, identity) for *_, path, identity in sorted(found)]


def ending(name: str) -> str:
    """What a file's name ends with, as it is counted and told."""
    return PurePosixPath(name).suffix.lower() or "without an ending"


def tell_left_out(source: object, counts: Counter[str]) -> None:
    """Tell on standard error how many files are no pictures by their endings, which :mod:`nearsight.picture` lists.

    Args:
        counts: of each :func:`nearsight.picture.ending`.
    """
    if counts:
        kinds = ", ".join(f"{count} {ending}" for ending, count in counts.most_common())
        print(
            f"left out {counts.total()} files of {source} that are not read as pictures: {kinds}",
            file=sys.stderr,
            flush=True,
        )


def folders_above(folder: str | PathLike[str]) -> set[Identity]:
    """A folder and those that it lies in: a link to one of them leads in a circle."""
    real = Path(folder).resolve()
    return {identity_of(os.stat(place)) for place in (real, *real.parents)}


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a circle of links
        return False


def target_of(entry: os.DirEntry[str]) -> Identity:
    """What an entry leads to."""
    try:
        return identity_of(entry.stat())
    except OSError:  # it leads nowhere; whoever opens it says so
        return identity_of(entry.stat(follow_symlinks=False))


def identity_of(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino
