# SPDX-License-Identifier: Apache-2.0
"""What docs/reference/security.md promises of files, folders and pictures that come from elsewhere: a test per promise."""

import base64
import gzip
import hashlib
import io
import json
import os
import re
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import EpsImagePlugin, Image
from safetensors import safe_open
from safetensors.torch import save_file

import nearsight as ns
from nearsight import cli
from nearsight.errors import DataError, OptionError, TrainingError
from nearsight.files import make_inner_folder, open_regular, read_yaml, remove_leftovers, write_whole
from nearsight.inspect.explore import read_picture
from nearsight.pages import html
from nearsight.pages.html import without_styles
from nearsight.saved.spec import check_saved_spec, own_options, saved_spec
from nearsight.saved.view import View
from nearsight.saved.weights import Blueprint, load_model, save_model
from nearsight.training import data
from nearsight.training import train as training
from nearsight.training.compare import COMMAND
from nearsight.training.data import IGNORED
from nearsight.training.data.arrays import _read_idx
from nearsight.training.recipe import Recipe, read_recipe

TEN = tuple("0123456789")
BLUEPRINT = Blueprint("sasa_nano", TEN, View(1, 8, (0.3,), (0.4,)), "digits")
VALUES = {
    "model": "sasa_nano",
    "classes": list(TEN),
    "view": {"channels": 1, "size": 8, "mean": [0.3], "std": [0.4]},
    "data": "digits",
    "converted": None,
}


@pytest.fixture(scope="module")
def network():
    return ns.create_model("sasa_nano", num_classes=10, in_chans=1).eval()


@pytest.fixture
def no_network(monkeypatch):
    """Every way out of the machine is an error, and so is every file that timm would read weights from."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"something was to be fetched: {args} {kwargs}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("load_state_dict_from_hf", "load_state_dict_from_url", "load_state_dict", "load_checkpoint"):
        for module in (timm.models._builder, timm.models._factory):
            monkeypatch.setattr(module, name, refuse, raising=False)


def hostile(folder: Path, network, **changed) -> list[Path]:
    """model.safetensors and last.ckpt as somebody else might write them."""
    header = json.dumps({**VALUES, **changed})
    folder.mkdir(exist_ok=True)
    state = network.state_dict()
    save_file(state, folder / "model.safetensors", metadata={"nearsight": header})
    checkpoint = {"nearsight": header, "state_dict": {f"model.{name}": tensor for name, tensor in state.items()}}
    torch.save(checkpoint, folder / "last.ckpt")
    return [folder / "model.safetensors", folder / "last.ckpt"]


# ------------------------------------------------------------------------------------------------- what a file may hold

HOSTILE = [
    "resnet18,pretrained=true",
    "resnet18,pretrained_cfg={url: 'http://127.0.0.1:1/x.pth'}",
    "resnet18,pretrained=true,pretrained_cfg_overlay={file: weights.pth}",
    "sasa_nano,pretrained_cfg=a1_in1k",
    "sasa_nano,checkpoint_path=/etc/passwd",
    "sasa_nano,cache_dir=/tmp/elsewhere",
    "sasa_nano,features_only=true",
    "sasa_nano,pruned=true",
    "sasa_nano,url='http://127.0.0.1:1/x'",
    "sasa_nano,hf_hub_id=a/b",
    "sasa_nano,stem=[{url: x}]",
    "sasa_nano,position='../../x'",
    "sasa_nano,position='http://x'",
    "sasa_nano,kernel_size=[3, [~/x]]",
    "resnet18,norm_layer='os:system'",
    "sasa_nano,stem='..'",
    "sasa_nano,stem='.ssh'",
    "resnet18,block_args={deep: {checkpoint_path: x}}",
    "sasa_nano,nothing_of_the_kind=1",
    "sasa_nano,kernel_size=2020-01-01",
    "hf-hub:somebody/something",
    "hf_hub:somebody/something",
    "local-dir:/tmp",
    "timm/resnet18",
    "sasa_nano.x/../y",
    "../sasa_nano",
    "sasa_nan",
    "",
    7,
    ["sasa_nano"],
]


@pytest.mark.parametrize("model", HOSTILE, ids=str)
def test_a_model_file_names_a_registered_network_and_its_own_options_alone(tmp_path, network, no_network, model):
    for file in hostile(tmp_path, network, model=model):
        with pytest.raises(DataError, match="does not hold a model that can be rebuilt"):
            load_model(file)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    with pytest.raises(DataError, match=r"config\.yaml"):
        read_recipe(tmp_path / "config.yaml")


@pytest.mark.parametrize("command", ["eval", "explore", "export", "profile", "convert", "train", "compare", "resume"])
def test_no_command_does_what_a_file_asks_for(tmp_path, network, no_network, capsys, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    hostile(tmp_path / "run", network, model="resnet18,pretrained=true,cache_dir=/tmp/elsewhere")
    (tmp_path / "run" / "config.yaml").write_text("model: resnet18,pretrained=true\ndata: digits\n")
    arguments = {
        "eval": ["eval", "run", "--data", "digits"],
        "explore": ["explore", "run", "digits:0"],
        "export": ["export", "run", "--format", "pt2"],
        "profile": ["profile", "run"],
        "convert": ["convert", "run", "--init", "exact", "--output", "converted"],
        "train": ["train", "--config", "run/config.yaml", "--output", "new"],
        "compare": ["compare", "--config", "run/config.yaml", "--models", "sasa_nano", "--output", "new"],
        "resume": ["train", "--resume", "--output", "run"],
    }
    before = set(tmp_path.rglob("*"))
    assert cli.main(arguments[command]) == 2
    said = capsys.readouterr().err
    assert said.startswith("nearsight: error: ")
    assert said.count("\n") == 1
    assert "a file may name a registered network" in said
    assert set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "changed",
    [
        {"converted": {"init": "exact", "where": "os.system"}},
        {"converted": {"init": "random", "position": "/etc/passwd"}},
        {"converted": {"init": "exact", "names": [{"url": "x"}]}},
        {"converted": ["init"]},
        {"view": {"channels": 1, "size": "8", "mean": [0.3], "std": [0.4]}},
        {"view": {"channels": 1, "size": 8, "mean": ["x"], "std": [0.4]}},
        {"view": {"channels": True, "size": 8, "mean": [0.3], "std": [0.4]}},
        {"classes": [1, 2]},
        {"classes": "0123456789"},
        {"data": ["digits"]},
        {"more": 1},
    ],
    ids=str,
)
def test_all_else_in_a_header_is_plain_too(tmp_path, network, changed):
    for file in hostile(tmp_path, network, **changed):
        with pytest.raises(DataError, match="does not hold a model that can be rebuilt"):
            load_model(file)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "hf:somebody/something"}, "name no data set that is fetched"),
        ({"output": "/tmp/elsewhere"}, "must hold only"),
        ({"download": True}, "must hold only"),
        ({"resume": True}, "must hold only"),
        ({"config": "other.yaml"}, "must hold only"),
        ({"model": {"class_path": "os.system"}}, "NAME,option=value"),
        ({"data": ["digits"]}, "wrong type"),
        ({"tensorboard": "/tmp/elsewhere"}, "wrong type"),
        ({"epochs": True}, "wrong type"),
        ({"seed": 0.5}, "wrong type"),
    ],
)
def test_a_recipe_fetches_nothing_and_says_nothing_of_where_to_write(tmp_path, values, message):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(DataError, match=message):
        read_recipe(tmp_path / "recipe.yaml")
    assert cli.main(["train", "--config", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()


def test_what_is_typed_stays_allowed(tmp_path):
    (tmp_path / "config.yaml").write_text("model: resnet18,pretrained=true\ndata: hf:beans\nlr: 1e-3\n")
    assert read_recipe(tmp_path / "config.yaml", ["model", "data"]).data == "hf:beans"
    assert read_recipe(tmp_path / "config.yaml", {"model": "x", "data": "y"}).lr == 1e-3
    for given in ([], ["model"], ["data"]):
        with pytest.raises(DataError, match="type it: --"):
            read_recipe(tmp_path / "config.yaml", given)


def test_options_of_a_network_are_its_own():
    """Every argument of the class that is built, whichever way it gets there, and no way to weights among them."""
    for name in ("sasa_nano", "halo_h0", "vit_micro", "resnet18", "halonet26t", "deit_tiny_distilled_patch16_224"):
        with torch.device("meta"):
            kind = type(timm.create_model(name))
        assert {"num_classes", "drop_rate"} <= own_options(name), (name, kind)
        assert not own_options(name) & {"pretrained", "checkpoint_path", "cache_dir", "url", "file", "state_dict"}
    assert "block_kwargs" in own_options("halonet26t")  # a field of its dataclass
    assert "kernel_size" in own_options("sasa_nano")


# -------------------------------------------------------------------------------------------------- what a file is given


@pytest.mark.parametrize(
    ("typed", "stored"),
    [
        ("resnet18,pretrained=true", "resnet18"),
        ("resnet18,pretrained=true,act_layer=silu,cache_dir='/x y'", "resnet18,act_layer=silu"),
        ("sasa_nano,kernel_size=[3, 5],checkpoint_path=x", "sasa_nano,kernel_size=[3, 5]"),
        ("sasa_nano,position='none',drop_rate=1e-3,pretrained_cfg={url: x}", "sasa_nano,position=none,drop_rate=0.001"),
        (
            "sasa_micro,block_kwargs={norm: true},attn_kwargs={border: wrap},pretrained=true",
            'sasa_micro,block_kwargs={"norm": true},attn_kwargs={"border": "wrap"}',
        ),
        ("sasa_nano,kernel_size=3,  position=none", "sasa_nano,kernel_size=3,  position=none"),
    ],
)
def test_where_weights_came_from_is_left_out(typed, stored):
    assert saved_spec(typed) == check_saved_spec(stored) == stored
    assert Blueprint.from_json(replace(BLUEPRINT, model=typed).to_json()).model == stored


@pytest.mark.parametrize("typed", ["sasa_nano,features_only=true", "resnet18,pruned=true", "resnet18,norm_layer='a/b'"])
def test_what_no_file_can_hold_is_said_before_training(typed):
    with pytest.raises(OptionError, match="a file may name"):
        saved_spec(typed)


@pytest.fixture(scope="module")
def begun_elsewhere(tmp_path_factory):
    """A run that began with the weights of a network that timm saved in a folder, which is gone since."""
    folder, output = tmp_path_factory.mktemp("saved"), tmp_path_factory.mktemp("run") / "run"
    own = {"kernel_size": 5}
    timm.models.save_for_hf(timm.create_model("sasa_nano", num_classes=10, in_chans=1, **own), folder, model_args=own)
    whole = data.SOURCES["digits"]

    def few(*args):
        pictures = whole(*args)
        parts = {name: getattr(pictures, name) for name in ("train", "validation", "test")}
        small = {name: data.ArraySplit(part.images[:64], part.labels[:64]) for name, part in parts.items()}
        return replace(pictures, **small)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nearsight.training.train.write_report", lambda *arguments: None)
        patch.setitem(data.SOURCES, "digits", few)
        typed = f"local-dir:{folder},pretrained=true"
        training.train(Recipe(model=typed, epochs=1, batch_size=32), output)
        for file in folder.iterdir():
            file.unlink()
        yield output, typed


def test_a_network_that_began_elsewhere_is_whole_without_it(begun_elsewhere, no_network):
    output, typed = begun_elsewhere
    for file in (output, output / "model.safetensors", output / "last.ckpt"):
        network, blueprint = load_model(file)
        assert "local-dir" not in blueprint.model
        assert blueprint.model.startswith("sasa_nano,")
        assert network.stages[0][0].spatial.window.axes(2)[0].kernel_size == 5
    with safe_open(output / "model.safetensors", framework="pt") as file:
        assert "local-dir" not in file.metadata()["nearsight"]
    text = (output / "config.yaml").read_text()
    assert yaml.safe_load(text)["model"] == blueprint.model
    assert (
        f'# It began with weights from elsewhere, which no file may ask for; for the same add --model "{typed}"' in text
    )


@pytest.mark.parametrize("given", ["nothing", "typed", "stored"])
def test_such_a_run_goes_on_without_it(begun_elsewhere, no_network, given):
    output, typed = begun_elsewhere
    stored = read_recipe(output / "config.yaml").model
    asked = {} if given == "nothing" else {"model": typed if given == "typed" else stored}
    assert training.resume(output, asked).recipe.model == stored
    assert typed in (output / "config.yaml").read_text()


def test_a_run_that_goes_on_keeps_its_model(begun_elsewhere):
    with pytest.raises(OptionError, match="a resumed run keeps its settings: model"):
        training.resume(begun_elsewhere[0], {"model": "sasa_nano,kernel_size=3"})


# ----------------------------------------------------------------------------------------------------------- settings

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "model: &a sasa_nano\ndata: *a",
        "<<: *a",
        "a: !!python/object/apply:os.system [x]",
        "[" * 1500,
        "9" * 5000,
        "2020-99-99",
    ],
    ids=["bomb", "alias", "merge", "tag", "deep", "digits", "date"],
)
def test_yaml_is_plain_values(tmp_path, text):
    with pytest.raises(ValueError):  # noqa: PT011 (whatever it is, it is told)
        read_yaml(text)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(DataError):
        read_recipe(tmp_path / "config.yaml")
    assert cli.main(["train", "--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "new")]) == 2


def test_an_alias_in_a_models_options_is_no_option():
    with pytest.raises(OptionError, match="NAME,option=value"):
        check_saved_spec("sasa_nano,kernel_size=[&a [1, 1], *a, *a]")


def test_a_recipe_is_small(tmp_path):
    (tmp_path / "config.yaml").write_text("# " + "x" * (1 << 16) + "\nmodel: sasa_nano\n")
    with pytest.raises(DataError, match="more than 65536 characters"):
        read_recipe(tmp_path / "config.yaml")


# ------------------------------------------------------------------------------------------------- what is opened


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder", "loop"])
def test_only_regular_files_are_opened(tmp_path, kind):
    path = tmp_path / "config.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path)
    with pytest.raises(OSError):  # noqa: PT011 (the system's word for a loop of links is its own)
        open_regular(path)
    with pytest.raises(DataError, match="cannot read"):
        read_recipe(path)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(owned) print\n%%EOF\n"


@pytest.fixture
def no_ghostscript(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("Ghostscript was to be started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", refuse)


def save_pictures(folder: Path, classes=("cat", "dog"), count=14) -> None:
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for place in range(count):
            Image.new("RGB", (8, 8), (9 * place, 99 * number, 0)).save(folder / name / f"{place}.png")


@pytest.mark.parametrize("kind", ["eps", "pipe", "device", "loop", "bomb"])
def test_a_picture_is_of_the_kinds_that_were_asked_for_or_is_broken(tmp_path, no_ghostscript, kind):
    """In the explorer as in a folder to train on, whatever the name of the file."""
    save_pictures(tmp_path)
    path = tmp_path / "cat" / "x.jpg"
    if kind == "eps":
        path.write_bytes(EPS)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "bomb":
        chunks = [b"IHDR" + struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""), b"IEND"]
        packed = [struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in chunks]
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path.name)
    with pytest.raises(DataError, match="cannot read the image"):
        read_picture(path)
    pictures = data.load_pictures(f"folder:{tmp_path}")
    parts = [
        part.dataset(BLUEPRINT.view, training=False) for part in (pictures.train, pictures.validation, pictures.test)
    ]
    read = [int(label) for part in parts for _, label in (part[index] for index in range(len(part)))]
    assert sorted(read) == [IGNORED, *[0] * 14, *[1] * 14]
    assert [name for part in parts for name in part.broken()] == [str(path)]


def test_pillow_opens_files_in_one_place():
    """So that none is opened without its kinds being named."""
    files = [file for file in Path(ns.__file__).parent.rglob("*.py") if "Image.open" in file.read_text()]
    assert [file.name for file in files] == ["picture.py"]


def paths(pictures) -> list[str]:
    parts = (pictures.train, pictures.validation, pictures.test)
    return sorted(part.store.name(int(index)) for part in parts for index in part.chosen)


def test_links_in_circles_add_nothing(tmp_path):
    save_pictures(tmp_path / "photos")
    expected = paths(data.load_pictures(f"folder:{tmp_path / 'photos'}"))
    cats = tmp_path / "photos" / "cat"
    for name, target in (("a", "."), ("b", ".."), ("c", "../.."), ("d", "/"), ("e", "e"), ("f", "../cat")):
        (cats / name).symlink_to(target, target_is_directory=True)
    (tmp_path / "photos" / "self").symlink_to(".")
    (cats / "again.png").symlink_to("0.png")
    os.link(cats / "1.png", cats / "once-more.png")
    (cats / "more").mkdir()
    (cats / "more" / "back").symlink_to("..")
    assert paths(data.load_pictures(f"folder:{tmp_path / 'photos'}")) == expected


def test_folders_elsewhere_that_links_lead_to_are_read(tmp_path):
    save_pictures(tmp_path / "elsewhere")
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    (tmp_path / "photos" / "cat" / "linked").symlink_to(tmp_path / "elsewhere" / "cat")
    (tmp_path / "elsewhere" / "cat" / "loop").symlink_to(tmp_path / "elsewhere")
    found = paths(data.load_pictures(f"folder:{tmp_path / 'photos'}"))
    assert found == sorted(f"{tmp_path}/photos/{place}/{n}.png" for place in ("cat/linked", "dog") for n in range(14))


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_no_picture_is_in_two_parts_or_classes(tmp_path, link):
    save_pictures(tmp_path / "a" / "train")
    save_pictures(tmp_path / "a" / "val")
    link(tmp_path / "a" / "train" / "cat" / "0.png", tmp_path / "a" / "val" / "cat" / "x.png")
    with pytest.raises(DataError, match=r"no picture may be in two parts.*train/cat/0\.png and .*val/cat/x\.png"):
        data.load_pictures(f"folder:{tmp_path / 'a'}")
    save_pictures(tmp_path / "b")
    link(tmp_path / "b" / "cat" / "0.png", tmp_path / "b" / "dog" / "x.png")
    with pytest.raises(DataError, match=r"a picture must be in one class.*cat/0\.png and .*dog/x\.png"):
        data.load_pictures(f"folder:{tmp_path / 'b'}")


def test_a_part_that_is_another_one_is_refused(tmp_path):
    save_pictures(tmp_path / "train")
    (tmp_path / "test").symlink_to("train")
    with pytest.raises(DataError, match="no picture may be in two parts"):
        data.load_pictures(f"folder:{tmp_path}")


def write_shard(file: Path, labels) -> None:
    with tarfile.open(file, "w") as tar:
        for place, label in enumerate(labels):
            for name, content in ((f"{place}.png", b"x"), (f"{place}.cls", label)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("label", [b"1000000000", b"32768", b"9" * 30, b"1" + b"0" * 5000])
def test_a_label_is_no_reason_to_count_for_ever(tmp_path, label):
    write_shard(tmp_path / "train.tar", [b"0", label])
    with pytest.raises(
        DataError, match=r"labels of shards without a classes\.txt|a label is|at most|two|Exceeds|labels"
    ):
        data.load_pictures(f"wds:{tmp_path}")


def test_shards_are_files_and_each_is_one_part(tmp_path):
    write_shard(tmp_path / "train.tar", [b"0"] * 8 + [b"1"] * 8)
    os.mkfifo(tmp_path / "nearsight-index.npz")
    os.mkfifo(tmp_path / "classes.txt")
    with pytest.raises(DataError, match=r"cannot read .*classes\.txt: it is no regular file"):
        data.load_pictures(f"wds:{tmp_path}")
    (tmp_path / "val.tar").symlink_to("train.tar")
    with pytest.raises(DataError, match="a shard must be named once"):
        data.load_pictures(f"wds:{tmp_path}")
    with pytest.raises(DataError, match="at most 1000000 shards"):
        data.load_pictures("wds:train-{0..99999}-{0..99999}.tar")


def test_a_packed_file_unfolds_to_what_it_claims_and_no_further(tmp_path):
    def idx(shape, content):
        return b"\0\0\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}i", *shape) + content

    bomb = gzip.compress(idx((1, 2, 2), bytes(1 << 24)))
    for name, content in (("train-images-idx3-ubyte", bomb), ("vast", gzip.compress(idx((1 << 30, 1 << 30), b"")))):
        (tmp_path / f"{name}.gz").write_bytes(content)
        with pytest.raises(DataError, match="claims to"):
            _read_idx(tmp_path, name)


# ---------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_follow_the_umask(tmp_path, network, mask):
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "file", b"x")
        save_model(tmp_path / "model.safetensors", network, BLUEPRINT)
    finally:
        os.umask(before)
    for file in tmp_path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask


def test_temporary_names_cannot_be_guessed_and_follow_no_link(tmp_path, monkeypatch):
    made = []
    replaced = os.replace
    monkeypatch.setattr(
        os, "replace", lambda source, target: (made.append(Path(source).name), replaced(source, target))
    )
    for _ in range(3):
        write_whole(tmp_path / "file", b"x")
    assert len(set(made)) == 3
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    monkeypatch.setattr("secrets.token_hex", lambda bytes: "guessed")
    (tmp_path / ".nearsight-guessed.part").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "file", b"y")
    assert (victim.read_bytes(), (tmp_path / "file").read_bytes()) == (b"mine", b"x")


def test_a_link_is_replaced_and_not_written_through(tmp_path):
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "file").symlink_to("victim")
    write_whole(tmp_path / "file", b"y")
    assert ((tmp_path / "victim").read_bytes(), (tmp_path / "file").read_bytes()) == (b"mine", b"y")
    assert not (tmp_path / "file").is_symlink()


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, message in (("pipe", "no regular file"), ("folder", "Is a directory")):
        with pytest.raises(OSError, match=message):
            write_whole(tmp_path / name, b"x")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "pipe"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_only_its_own_leftovers_are_removed(tmp_path):
    (tmp_path / ".download.part").write_text("somebody's")
    (tmp_path / ".nearsight-0123.part").write_text("ours")
    remove_leftovers(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [".download.part"]


def test_no_link_leads_out_of_a_run(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "tensorboard").symlink_to(elsewhere)
    with pytest.raises(TrainingError, match="is a link"):
        make_inner_folder(tmp_path / "tensorboard")
    make_inner_folder(tmp_path / "plots")
    (tmp_path / "plots" / "accuracy.png").symlink_to(elsewhere / "x")
    with pytest.raises(TrainingError, match="is a link"):
        make_inner_folder(tmp_path / "plots")
    assert list(elsewhere.iterdir()) == []


def test_the_lock_of_a_comparison_follows_no_link(tmp_path):
    from nearsight.training.compare import _alone

    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(TrainingError, match=r"cannot open .*\.lock"), _alone(tmp_path):
        pass
    assert not (tmp_path / "victim").exists()


# ------------------------------------------------------------------------------------------------------ what is started


def test_no_process_that_is_started_looks_for_modules_in_the_current_folder(tmp_path, monkeypatch):
    """A tqdm.py in the folder in which a comparison is started is somebody's file and not the package."""
    from nearsight.bench.memory import in_fresh_process

    package = tmp_path / "site" / "nearsight"
    (package / "start").mkdir(parents=True)
    (package / "cli.py").write_text("import json\ndef main(): print(json.dumps('the package'))")
    command = package / "start" / COMMAND.name
    command.write_bytes(COMMAND.read_bytes())
    for name in ("tqdm", "json", "nearsight"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    started = [sys.executable, "-S", command]  # without the packages that are installed
    assert subprocess.run(started, capture_output=True, text=True, check=True).stdout == '"the package"\n'
    assert in_fresh_process(json.dumps, 1) == "1"
    assert not (tmp_path / "ran").exists()


def test_a_comparison_and_its_processes_are_started_that_way(tmp_path, monkeypatch):
    """A run on several devices starts its other processes as it was started itself: by a script that stands alone."""
    from lightning.fabric.strategies.launchers.subprocess_script import _basic_subprocess_cmd

    from nearsight.training import compare

    started = []

    class Child:
        def __init__(self, command, **kwargs):
            started.append(command)
            raise KeyboardInterrupt

    monkeypatch.setattr(compare.subprocess, "Popen", Child)
    with pytest.raises(KeyboardInterrupt):
        compare._train(tmp_path, Recipe(), 0)
    assert started[0][:3] == [sys.executable, str(COMMAND), "train"]
    assert [file.name for file in COMMAND.parent.iterdir() if file.suffix == ".py"] == ["nearsight_command.py"]
    monkeypatch.setattr(sys, "argv", [str(COMMAND), "train", "--devices=2"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert _basic_subprocess_cmd() == [sys.executable, str(COMMAND), "train", "--devices=2"]


# ---------------------------------------------------------------------------------------------------------- the pages


class Elements(HTMLParser):
    """What a browser would make of a page: elements with their attributes, and the texts of styles and scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements, self.inside, self.texts = [], "", {"style": [], "script": []}
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = "" if dict(attrs).get("type") == "application/json" else tag

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, text):
        if self.inside in self.texts:
            self.texts[self.inside].append(text)


def check_page(page: str, styles: int, scripts: int) -> None:
    """A policy that allows the page's own style and script and pictures inside it, and a page that needs no more."""
    found = Elements(page)
    policies = [one["content"] for tag, one in found.elements if one.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    rules = dict(rule.split(" ", 1) for rule in policies[0].split("; "))
    assert rules.pop("default-src") == rules.pop("base-uri") == rules.pop("form-action") == "'none'"
    assert rules.pop("img-src") == "data:"
    for kind, texts in found.texts.items():
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts]
        assert rules.pop(f"{kind}-src", "") == " ".join(f"'sha256-{one}'" for one in hashes)
    assert rules == {}
    assert (len(found.texts["style"]), len(found.texts["script"])) == (styles, scripts)
    assert page.index("Content-Security-Policy") < page.index("<title>") < page.index("<style>")
    for tag, attributes in found.elements:
        assert tag not in ("iframe", "object", "embed", "base", "form")
        assert not [name for name in attributes if name == "style" or name.startswith("on")], (tag, attributes)
        assert not str(attributes.get("src", "")).startswith(("http", "//"))


EVIL = "</script></style><img src=x onerror=alert(1)>"


def test_the_page_of_a_run_runs_nothing_that_came_from_outside(tmp_path, network):
    from nearsight.training.evaluate import Evaluation
    from nearsight.training.report import write_report

    pictures = data.load_pictures("digits")
    test = pictures.test.dataset(BLUEPRINT.view, training=False)
    logits = torch.eye(10)[torch.arange(10).roll(1)]
    evaluation = Evaluation(torch.arange(10), logits, torch.arange(10))
    rows = [dict.fromkeys(("epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", EVIL), 1.0)] * 2
    recipe = Recipe(data=f"folder:{EVIL}", epochs=2, batch_size=8).filled(pictures.defaults)
    evil = replace(BLUEPRINT, classes=(EVIL, '" style="x: y', *TEN[2:]))
    write_report(tmp_path / "report.html", recipe, evil, network, rows, evaluation, test)
    page = (tmp_path / "report.html").read_text()
    check_page(page, styles=2, scripts=0)
    assert "onerror" in page
    assert "<img" not in page


def test_the_explorer_runs_its_own_script_alone(network):
    page = ns.explore(network, torch.randn(1, 8, 8), classes=[EVIL] * 10, title=EVIL, subtitle=EVIL).html
    check_page(page, styles=2, scripts=1)
    assert page.count("<img") == 1  # the explorer's own, which has no address yet


def test_a_page_with_another_script_or_a_style_attribute_would_be_seen():
    for spoilt in ("<script>alert(1)</script>", '<p style="color: red">', '<p onclick="x()">'):
        page = ns.explore(ns.create_model("sasa_nano"), torch.zeros(3, 8, 8), transform=None).html
        with pytest.raises(AssertionError):
            check_page(page.replace("<main>", f"<main>{spoilt}"), styles=2, scripts=1)


def test_styles_of_a_drawing_become_attributes():
    svg = "<svg a='1'><defs><style type=\"text/css\">*{x: y}</style></defs><text style=\"font: italic 10px 'A b', c; x: y\">"
    drawn = without_styles(svg + 'style="a: b"</text></svg>')
    assert drawn == (
        '<svg stroke-linejoin="round" stroke-linecap="butt" a=\'1\'>'
        '<text x="y" font-style="italic" font-size="10px" font-family="\'A b\', c">style="a: b"</text></svg>'
    )


def test_no_template_holds_what_the_policy_refuses():
    """Style attributes and handlers; and styles and scripts hold no value, so that what is allowed was written by us."""
    templates = [*Path(ns.__file__).parent.rglob("*.jinja")]
    assert len(templates) >= 4
    for file in templates:
        text = file.read_text()
        assert not re.findall(r"\s(?:style|on\w+)=", text), file
        data = text.count('<script type="application/json"')  # which holds a value, and is not run
        for kind in ("style", "script"):
            inline = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)
            assert len(inline) == text.count(f"<{kind}") - data * (kind == "script")
            assert all(re.fullmatch(r'\{\{ file\("\w+\.(css|js)"\) \}\}', one) for one in inline), file


def test_a_style_or_script_that_would_end_its_element_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(html, "TEMPLATES", tmp_path)
    (tmp_path / "page.jinja").write_text('<script>{{ file("run.js") }}</script>')
    (tmp_path / "run.js").write_text("run({{ 1 }})")
    assert html.render("page.jinja") == "<script>run({{ 1 }})</script>"
    (tmp_path / "run.js").write_text('print("</script>")')
    with pytest.raises(AssertionError, match=r"run\.js holds what ends"):
        html.render("page.jinja")
