# SPDX-License-Identifier: Apache-2.0
"""From a file to the picture that a person sees: upright, in eight bits, on a ground where it lets one through.

Training, evaluation and explorer open pictures here and nowhere else, so that a network is shown what it was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from .errors import DataError, OptionError
from .files import open_regular

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

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


def open_picture(source: str | Path | bytes, channels: int = 3, background: str = BACKGROUND) -> Image:
    """The picture in a file as a person sees it: the first, where it holds several, in eight bits.

    It is turned as its EXIF says. What is transparent shows ``background``. More than eight bits are scaled by their range:
    16 bits by 65535, 12 by 4095. 32 bits and floating point numbers have no range that all agree on: where no cell is
    negative and the largest is at most 255 or 65535, whole numbers are scaled by that; floating point ones by 1, 255 or
    65535, but where they pass one of these by less than double; all others by the picture's own smallest and largest cell.

    Args:
        source: a file, or what is in one.
        channels: 1 for a grey picture (mode L), else RGB.
        background: a colour, as :func:`opaque` has it.

    Raises:
        OSError: the file is not there, or no regular file.
        DataError: it holds no picture, a damaged one, or one that cannot be shown; the message is the reason alone.
        OptionError: no such colour.

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


def shorter_side(source: str | Path | bytes) -> int:
    """The smaller of a picture's width and height, by its header alone.

    Raises:
        OSError, DataError: as :func:`open_picture` does.
    """
    with _read(source) as picture:
        return min(picture.size)


@contextmanager
def _read(source: str | Path | bytes) -> Iterator[ImageFile]:
    """A picture of which only the header has been read; nothing but regular files, and nothing that runs a program."""
    from PIL import Image

    with BytesIO(source) if isinstance(source, bytes) else open_regular(source) as file:
        Image.init()  # an older Pillow knows fewer, and asked for one that it does not know it fails
        with _naming_damage():
            picture = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
        yield picture


@contextmanager
def _naming_damage() -> Iterator[None]:
    from PIL import UnidentifiedImageError

    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # decoders raise what they like when bytes are damaged, struct.error included
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise DataError(f"it is damaged, or no picture that Pillow knows{reason}") from error


def _plain(upright: Image, file: Image, ground: tuple[int, int, int]) -> Image:
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
