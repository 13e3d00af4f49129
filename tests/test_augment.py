# SPDX-License-Identifier: Apache-2.0
"""How training varies pictures: what is promised by default, what each flag does, and where it is said."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nearsight import cli
from nearsight.errors import OptionError
from nearsight.saved.view import View
from nearsight.training import train
from nearsight.training.data import RandomAffine, augmented, load_pictures, told
from nearsight.training.recipe import Recipe, read_recipe

SIDE, DRAWS = 64, 60
VIEW = View(3, SIDE, (0.0,) * 3, (1.0,) * 3)
RAMP = np.arange(SIDE, dtype=np.uint8) * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures whose red tells the column and whose green tells the row."""
    path = tmp_path_factory.mktemp("ramps")
    cells = np.stack(np.broadcast_arrays(RAMP[None], RAMP[:, None], np.uint8(0)), 2)
    for name in ("a", "b"):
        (path / name).mkdir()
        for index in range(15):
            Image.fromarray(cells).save(path / name / f"{index}.png")
    return path


def drawn(folder, augment=None, mirror=None, crop=None):
    """Of many draws, whether each is mirrored, and which share of the area it shows."""
    split: Any = augmented(load_pictures(f"folder:{folder}"), augment, mirror, crop).train
    split = replace(split, changes=replace(split.changes, jitter=0.0))  # which would change the slopes
    images = [split.dataset(VIEW, training=True)[draw][0] for draw in range(DRAWS)]
    slopes = torch.stack([image[0, 32, -4] - image[0, 32, 3] for image in images])
    heights = torch.stack([image[1, -4, 32] - image[1, 3, 32] for image in images])
    shares = (slopes.abs() * heights) / (57 * 4 / 255) ** 2
    return (slopes < 0).double().mean().item(), shares


@pytest.mark.parametrize(
    ("flags", "mirrored", "least", "most"),
    [
        ({}, False, 0.77, 0.9),
        ({"augment": "light"}, False, 0.77, 0.9),
        ({"augment": "light", "mirror": True}, True, 0.77, 0.9),
        ({"augment": "none", "crop": 0.5}, False, 0.47, 0.75),
    ],
)
def test_what_a_folder_is_cropped_to_and_whether_it_is_mirrored(folder, flags, mirrored, least, most):
    share, areas = drawn(folder, **flags)
    assert (0.25 < share < 0.75) if mirrored else share == 0
    assert least < areas.min() < most


def test_full_mirrors_and_crops_far(folder):
    share, _ = drawn(folder, "full")
    assert 0.25 < share < 0.75
    assert drawn(folder, "full", mirror=False)[0] == 0
    split = augmented(load_pictures(f"folder:{folder}"), "full", None, None).train
    greens = [split.dataset(VIEW, training=True)[draw][0][1] for draw in range(DRAWS)]
    assert min((green.max() - green.min()).item() for green in greens) < 0.35  # of a narrow cut


@pytest.mark.parametrize(("augment", "varies"), [("none", False), ("light", True), ("full", True)])
def test_colours_vary_with_light_and_full(folder, augment, varies):
    whole = augmented(load_pictures(f"folder:{folder}"), augment, False, 1.0).train.dataset(VIEW, training=True)
    blues = torch.stack([whole[draw][0][2] for draw in range(10)])
    assert (blues.max() > 0) == varies  # there is no blue in the picture itself


def test_none_only_resizes(folder):
    pictures = augmented(load_pictures(f"folder:{folder}"), "none", None, None)
    seen, plain = pictures.train.dataset(VIEW, training=True), pictures.train.dataset(VIEW, training=False)
    for draw in range(5):
        assert torch.equal(seen[draw][0], plain[draw][0])
    assert told(pictures) == "no crop, no mirror"
    assert drawn(folder, "none", mirror=True)[1].min() > 0.98
    assert 0.25 < drawn(folder, "none", mirror=True)[0] < 0.75


def test_pictures_are_measured_without_changes(folder):
    pictures = augmented(load_pictures(f"folder:{folder}"), "full", None, None)
    test = pictures.test.dataset(VIEW, training=False)
    assert torch.equal(test[0][0], test[len(test) - 1][0])


def test_named_data_keeps_its_own_changes():
    pictures = load_pictures("digits")
    assert augmented(pictures, None, None, None) is pictures
    assert told(pictures) == (
        "shifts by up to 0.25 pixels, turns by up to 10 degrees, scales by up to 10 %, no crop, no mirror"
    )
    mirrored = augmented(pictures, None, True, None)
    assert told(mirrored).endswith("scales by up to 10 %, no crop, mirrors half")
    assert told(augmented(pictures, None, None, 0.9)).endswith("crops to 90 to 100 % of the area, no mirror")
    none = augmented(pictures, "none", None, None)
    assert isinstance(none.augment, torch.nn.Identity)
    assert told(none) == "no crop, no mirror"
    assert told(augmented(pictures, "full", None, None)) == "crops to 8 to 100 % of the area, mirrors half"


def test_a_batch_is_cropped_to_a_share_of_its_area():
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    images = torch.stack([columns, rows])[None].repeat(200, 1, 1, 1)
    cut = RandomAffine(shift=0, crop=0.5)(images)
    wide, high = cut[:, 0, 16, 24] - cut[:, 0, 16, 8], cut[:, 1, 24, 16] - cut[:, 1, 8, 16]
    shares = wide * high / 16**2
    assert 0.49 < shares.min() < 0.55
    assert 0.95 < shares.max() < 1.01
    assert max(wide.max(), high.max()) < 16.01
    assert cut.min() >= 0
    assert cut.max() <= 31
    centre = cut[:, 0, 15:17, 15:17].mean((1, 2)) - 15.5
    assert -6.3 < centre.min() < -2
    assert 2 < centre.max() < 6.3


@pytest.mark.parametrize("values", [{"augment": "some"}, {"crop": 0.0}, {"crop": 1.1}, {"crop": float("nan")}])
def test_what_is_no_augmentation_is_refused(values):
    with pytest.raises(OptionError, match=rf"{next(iter(values))} must be"):
        Recipe(**values)


def test_a_run_says_what_it_does_to_its_pictures(folder, tmp_path, capsys):
    run = tmp_path / "run"
    asked = [
        "train",
        "--data",
        f"folder:{folder}",
        "--size",
        "16",
        "--epochs",
        "1",
        "--batch-size",
        "8",
        "--workers",
        "0",
    ]
    assert cli.main([*asked, "--mirror", "--output", str(run)]) == 0
    said = "crops to 80 to 100 % of the area, mirrors half, varies colours"
    assert f"\naugment  {said}\n" in capsys.readouterr().out
    assert said in (run / "report.html").read_text()
    noted = read_recipe(run / "config.yaml")
    assert (noted.augment, noted.mirror, noted.crop) == ("light", True, None)


def test_a_run_from_before_there_was_a_choice_goes_on_as_it_began(tmp_path, monkeypatch):
    """Its checkpoint does not say: then folders were mirrored and cropped far, named data as now."""
    (tmp_path / "last.ckpt").touch()
    monkeypatch.setattr(train, "_run", lambda recipe, *_, **__: recipe)
    monkeypatch.setattr(train, "read_checkpoint", lambda _: {"nearsight-recipe": {}})
    monkeypatch.setattr(train, "read_blueprint", lambda *_: None)
    for data, augment in (("folder:pets", "full"), ("digits", None)):
        (tmp_path / "config.yaml").write_text(f"data: {data}\nsize: 32\n")
        assert train.resume(tmp_path).augment == augment  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("command", ["train", "compare"])
def test_the_help_names_the_flags(command, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert not left.value.code
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--augment", "--mirror", "--no-mirror", "--crop", "--background"))
