# SPDX-License-Identifier: Apache-2.0
"""From a file to the picture that a person sees, by every way in: the same cells for training, evaluation and explorer."""

import io
import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from nearsight.errors import DataError, OptionError
from nearsight.inspect.explore import read_picture
from nearsight.models.data_config import seen
from nearsight.picture import ENDINGS, FORMATS, is_hidden, is_picture, opaque, open_picture
from nearsight.saved.view import View
from nearsight.training.data import load_pictures
from nearsight.training.recipe import Recipe

RAMP = np.arange(256).reshape(16, 16)  # every shade once
SHADES = np.array([[0, 255, 128, 7], [60, 61, 62, 63], [0, 0, 0, 9]], np.uint8)


def stored(picture, form="PNG", **options):
    content = io.BytesIO()
    picture.save(content, form, **options)
    return content.getvalue()


def grey(content, **options):
    return np.asarray(open_picture(content, channels=1, **options)).astype(int)


def cells(content, **options):
    return np.asarray(open_picture(content, **options)).tolist()


def pgm(largest):
    return b"P5 16 16 %d\n" % largest + (RAMP * largest // 255).astype(">u2").tobytes()


def with_tag(content, tag, before, after):
    """A TIFF with another value of one of its tags."""
    entry = struct.pack("<HHIH", tag, 3, 1, before)
    assert content.count(entry) == 1
    return content.replace(entry, struct.pack("<HHIH", tag, 3, 1, after))


# -------------------------------------------------------------------------------------------------------------- turned

TURNED = {
    1: lambda cells: cells,
    2: lambda cells: cells[:, ::-1],
    3: lambda cells: cells[::-1, ::-1],
    4: lambda cells: cells[::-1],
    5: lambda cells: cells.T,
    6: lambda cells: np.rot90(cells, -1),
    7: lambda cells: cells[::-1, ::-1].T,
    8: lambda cells: np.rot90(cells),
}


@pytest.mark.parametrize(
    ("form", "mode"),
    [("PNG", "RGB"), ("PNG", "I;16"), ("PNG", "LA"), ("PNG", "P"), ("TIFF", "L"), ("TIFF", "I;16"), ("WEBP", "RGB")],
)
def test_a_picture_is_turned_as_its_exif_says(form, mode):
    deep = Image.fromarray(SHADES.astype(np.uint16) * 257)
    picture = deep if mode == "I;16" else Image.fromarray(SHADES).convert(mode)
    for orientation, turn in TURNED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"lossless": True} if form == "WEBP" else {}
        assert np.array_equal(grey(stored(picture, form, exif=exif, **options)), turn(SHADES)), orientation


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_picture_with_damaged_exif_is_shown_as_it_lies():
    picture = Image.fromarray(SHADES)
    assert np.array_equal(grey(stored(picture, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")), SHADES)


def test_training_evaluation_and_explorer_see_the_same_picture(tmp_path):
    """As a phone writes it, turned; and as a drawing program does, on nothing."""
    exif = Image.Exif()
    exif[0x0112] = 6
    drawn = np.zeros((8, 8, 4), np.uint8)
    drawn[:, :4, 3] = 255  # the left half is black, the right half is nothing
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(10):
            Image.fromarray(drawn).save(tmp_path / name / f"{index}.png", exif=exif)
    view = View(3, 8, (0.0,) * 3, (1.0,) * 3)
    upright = torch.ones(3, 8, 8)
    upright[:, :4] = 0  # turned clockwise: the left half is at the top
    pictures = load_pictures(f"folder:{tmp_path}")
    for split in (pictures.train, pictures.validation, pictures.test):
        assert torch.equal(split.dataset(view, training=False)[0][0], upright)
    drawing = tmp_path / "a" / "0.png"
    assert torch.equal(seen(read_picture(drawing), view.data_config())[0], upright)
    blue = View(3, 8, (0.0,) * 3, (1.0,) * 3, background="#0000ff")
    assert pictures.test.dataset(blue, training=False)[0][0][:, 7, 0].tolist() == [0, 0, 1]
    assert read_picture(drawing, background="#0000ff").getpixel((0, 7)) == (0, 0, 255)


# ------------------------------------------------------------------------------------------------ more than eight bits


@pytest.mark.parametrize(
    "content",
    [
        stored(Image.fromarray((RAMP * 257).astype(np.uint16))),
        stored(Image.fromarray((RAMP * 257).astype(np.uint16)), "TIFF"),
        stored(Image.fromarray((RAMP * 257).astype(np.uint16)), "JPEG2000"),
        stored(Image.fromarray((RAMP * 257).astype(">u2")), "TIFF"),
        pgm(65535),
        pgm(4095),
        stored(Image.fromarray(RAMP.astype(np.int32)), "TIFF"),
        stored(Image.fromarray((RAMP * 257).astype(np.int32)), "TIFF"),
        stored(Image.fromarray((RAMP * 8_000_000).astype(np.int32)), "TIFF"),
        stored(Image.fromarray((RAMP * 1000 - 90_000).astype(np.int32)), "TIFF"),
        with_tag(stored(Image.fromarray((RAMP * 16_843_009).astype("u4").view("i4")), "TIFF"), 339, 2, 1),  # unsigned
        with_tag(stored(Image.fromarray(((255 - RAMP) * 257).astype(np.uint16)), "TIFF"), 262, 1, 0),  # white is zero
        stored(Image.fromarray((RAMP / 255).astype(np.float32)), "TIFF"),
        stored(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
        stored(Image.fromarray((RAMP * 1.5 / 255).astype(np.float32)), "TIFF"),
        stored(Image.fromarray((RAMP * 257).astype(np.float32)), "TIFF"),
        stored(Image.fromarray((RAMP / 127.5 - 1).astype(np.float32)), "TIFF"),
    ],
)
def test_more_than_eight_bits_are_scaled_by_their_range(content):
    assert abs(grey(content) - RAMP).max() == 0
    assert np.array_equal(
        np.asarray(open_picture(content)), np.asarray(open_picture(content, 1))[..., None].repeat(3, 2)
    )


def test_a_dark_picture_of_sixteen_bits_stays_dark():
    """The range is that of the kind, so that pictures can be told by their brightness."""
    for shade in (0, 1, 40, 200):
        for kind in (np.uint16, np.int32):
            assert (grey(stored(Image.fromarray(np.full((4, 4), shade * 257, kind)), "TIFF")) == shade).all()
        assert abs(grey(stored(Image.fromarray(np.full((4, 4), shade / 255, np.float32)), "TIFF")) - shade).max() == 0


def test_twelve_bits_are_scaled_by_theirs():
    pairs = np.array([[0, 4095], [2048, 1024]], np.uint32)
    packed = b"".join((int(a) << 12 | int(b)).to_bytes(3, "big") for a, b in pairs)
    tags = ((256, 2), (257, 2), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 2), (279, len(packed)))
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
    content = (
        struct.pack("<2sHI", b"II", 42, 8 + len(packed)) + packed + struct.pack("<H", len(tags)) + entries + bytes(4)
    )
    shown = grey(content).tolist()
    assert shown in ([[0, 255], [128, 64]],)


def test_cells_that_are_no_numbers_and_modes_that_cannot_be_shown_are_named():
    for value in (np.nan, np.inf):
        with pytest.raises(DataError, match="cells that are no finite numbers"):
            open_picture(stored(Image.fromarray(np.full((2, 2), value, np.float32)), "TIFF"))
    with pytest.raises(DataError, match="a picture of mode LAB cannot be shown"):
        open_picture(stored(Image.new("LAB", (2, 2)), "TIFF"))


# -------------------------------------------------------------------------------------------------------- transparency


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "TGA"])
def test_transparency_is_laid_on_the_background(form):
    """A black bar on nothing: nothing, half and whole of it."""
    drawn = np.zeros((2, 3, 4), np.uint8)
    drawn[..., 3] = 0, 128, 255
    content = stored(Image.fromarray(drawn), form, **({"lossless": True} if form == "WEBP" else {}))
    assert np.asarray(open_picture(content, 1)).tolist() == [[255, 127, 0]] * 2
    assert cells(content, background="#ff0000")[0] == [[255, 0, 0], [127, 0, 0], [0, 0, 0]]


def test_grey_with_alpha():
    drawn = np.array([[[9, 0], [9, 255], [0, 51]]], np.uint8)
    assert grey(stored(Image.fromarray(drawn, "LA"))).tolist() == [[255, 9, 204]]


def test_a_palette_and_its_transparency():
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    red, green, blue, white = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]
    assert cells(stored(picture)) == [[red, green, blue]]
    assert cells(stored(picture, transparency=1)) == [[red, white, blue]]
    assert cells(stored(picture, transparency=bytes([255, 0, 128]))) == [[red, white, [127, 127, 255]]]
    assert cells(stored(picture, "GIF", transparency=1)) == [[red, white, blue]]


def test_the_one_value_that_a_picture_without_alpha_does_not_show():
    three = Image.fromarray(np.array([[[1, 2, 3], [1, 2, 4]]], np.uint8))
    assert cells(stored(three, transparency=(1, 2, 3))) == [[[255] * 3, [1, 2, 4]]]
    assert grey(stored(Image.fromarray(np.array([[7, 9]], np.uint8)), transparency=7)).tolist() == [[255, 9]]
    deep = stored(Image.fromarray(np.array([[7, 9 * 257]], np.uint16)), transparency=7)
    assert cells(deep, background="#0000ff") == [[[0, 0, 255], [9] * 3]]


@pytest.mark.parametrize("colour", ["#ff000080", "transparent", "mauve-ish", "", None])
def test_a_background_is_an_opaque_colour(colour):
    with pytest.raises(OptionError, match="background must be an opaque colour"):
        opaque(colour)
    with pytest.raises(OptionError, match="background must be"):
        Recipe(background=colour)


# --------------------------------------------------------------------------------------------------------- other kinds


def test_one_bit_cmyk_and_animated_pictures():
    assert grey(stored(Image.fromarray(np.array([[True, False]])))).tolist() == [[255, 0]]
    inks = Image.fromarray(np.broadcast_to(np.array([255, 0, 0, 0], np.uint8), (8, 8, 4)), "CMYK")
    for form in ("TIFF", "JPEG"):
        assert cells(stored(inks, form))[0][0] == [0, 255, 255]
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    for form in ("GIF", "PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if form == "WEBP" else {}
        assert cells(stored(frames[0], form, save_all=True, append_images=frames[1:], **options))[0][0] == [255, 0, 0]


def test_every_ending_is_of_a_kind_that_pillow_reads():
    Image.init()
    assert set(FORMATS) <= set(Image.OPEN)
    assert Image.registered_extensions().keys() >= ENDINGS
    assert "EPS" not in FORMATS  # Pillow hands it to another program
    assert is_picture("A.JFIF")
    assert not is_picture("jpg")
    assert not is_hidden("../a/b.png")


def test_what_needs_another_program_is_no_picture():
    drawing = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n"
    with pytest.raises(DataError, match="no picture that Pillow knows"):
        open_picture(drawing)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(OSError, match="no regular file"):
        open_picture(tmp_path / "pipe.png")
    with pytest.raises(DataError, match="no regular file"):
        read_picture(tmp_path / "pipe.png")


# ------------------------------------------------------------------------------------------------- which files are read


def put(folder, name, shade=0, form="PNG"):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(stored(Image.new("L", (4, 4), shade), form))


def count(pictures):
    return sum(len(split) for split in (pictures.train, pictures.validation, pictures.test))


def fill(folder):
    """Twenty pictures of each of two classes with endings of many kinds, and what is none of them."""
    for name in ("cat", "dog"):
        for index, (ending, form) in enumerate(
            [("gif", "GIF"), ("JFIF", "JPEG"), ("PNG", "PNG"), ("TIF", "TIFF"), ("jpe", "JPEG")] * 4
        ):
            put(folder, f"{name}/{index}.{ending}", form=form)
        for other in ("Thumbs.db", "notes.TXT", "README"):
            (folder / name / other).write_text("no picture")
        (folder / name / "._1.png").write_text("a Mac's")
        put(folder, f"{name}/.ipynb_checkpoints/1.png")
    put(folder, ".ipynb_checkpoints/1.png")
    (folder / ".DS_Store").write_text("a Mac's")


@pytest.mark.parametrize("kind", ["folder", "hf"])
def test_endings_in_any_case_are_read_and_the_rest_is_counted(tmp_path, kind, capsys, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pets = tmp_path / ".own" / "pets"  # what is above the folder may be hidden
    fill(pets)
    pictures = load_pictures(f"{kind}:{pets}")
    assert pictures.classes == ("cat", "dog")
    assert count(pictures) == 40
    names = [pictures.train.store.name(index) for index in range(len(pictures.train))]  # pyright: ignore[reportAttributeAccessIssue]
    assert not any("/." in name.partition("/.own/")[2] for name in names)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out")]
    said, _, kinds = line.partition(": ")
    assert said == f"left out 6 files of {pets} that are not read as pictures"
    assert sorted(kinds.split(", ")) == ["2 .db", "2 .txt", "2 without an ending"]


def test_pictures_beside_the_class_folders_are_told(tmp_path, capsys):
    fill(tmp_path)
    for index in range(3):
        put(tmp_path, f"{index}.png")
    assert count(load_pictures(f"folder:{tmp_path}")) == 40
    assert f"left out 3 images in {tmp_path} that lie in no class's folder\n" in capsys.readouterr().err


def test_shards_have_the_same_endings(tmp_path, capsys):
    import tarfile

    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for index in range(40):
            picture = stored(Image.new("L", (4, 4), index), "GIF")
            files = {f"./{index}.{'JFIF' if index % 2 else 'gif'}": picture, f"./{index}.cls": b"%d" % (index % 2)}
            files |= {f"./{index}.json": b"{}", f"./._{index}.png": b"a Mac's", f"./.hidden/{index}.png": b""}
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    for _ in range(2):  # by the shard, and by the index that is kept
        assert count(load_pictures(f"wds:{tmp_path}")) == 40
        assert capsys.readouterr().err == f"left out 40 files of {tmp_path} that are not read as pictures: 40 .json\n"
