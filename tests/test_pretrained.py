# SPDX-License-Identifier: Apache-2.0
"""Weights by name: our own, that come with the package, and the published ones of NAT and DiNAT."""

from __future__ import annotations

import json
import re
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import nearsight as ns
from nearsight import cli
from nearsight.errors import DataError, NearsightError, OptionError
from nearsight.models.first_weights import is_untrained
from nearsight.models.nat import Nat
from nearsight.models.published import from_published
from nearsight.models.sasa import SasaResNet
from nearsight.models.shipped import WEIGHTS, shipped

# ------------------------------------------------------------------------------------------------------------ our own


def test_the_name_alone_changes_nothing_and_pretrained_brings_the_digits():
    plain, trained = ns.create_model("sasa_nano"), ns.create_model("sasa_nano", pretrained=True)
    assert (plain.in_chans, plain.num_classes, plain.pretrained_cfg["input_size"]) == (3, 10, (3, 32, 32))
    assert is_untrained(plain)
    assert not is_untrained(trained)
    assert (trained.in_chans, trained.pretrained_cfg["input_size"]) == (1, (1, 8, 8))
    assert trained.pretrained_cfg["label_names"] == tuple("0123456789")
    x = torch.randn(2, 1, 8, 8)
    expected = trained.eval()(x)
    for other in (
        timm.create_model("sasa_nano", pretrained=True),
        timm.create_model("sasa_nano.digits", pretrained=True),
        ns.create_model("sasa-nano.digits,pretrained=true"),
        ns.load("sasa_nano"),
        ns.load("sasa_nano.digits"),
    ):
        assert torch.equal(other.eval()(x), expected)
    assert "sasa_nano.digits" in timm.list_pretrained("sasa*")


def test_they_see_pictures_as_their_run_did():
    view, config = ns.load("sasa_nano").view, ns.create_model("sasa_nano", pretrained=True).pretrained_cfg
    assert (view.mean, view.std) == (config["mean"], config["std"])
    assert view.data_config().items() <= config.items()


def test_they_are_adapted_to_other_channels_and_classes():
    model = ns.create_model("sasa_nano", pretrained=True, in_chans=3, num_classes=4)
    assert model.eval()(torch.randn(1, 3, 8, 8)).shape == (1, 4)
    trained = ns.create_model("sasa_nano", pretrained=True)
    assert torch.equal(model.stages[0][0].down[0].weight, trained.stages[0][0].down[0].weight)


def test_the_card_tells_their_accuracy(capsys):
    card = (WEIGHTS / "sasa_nano.digits.md").read_text()
    assert cli.main(["eval", "sasa_nano", "--data", "digits", "--json"]) == 0
    accuracy = json.loads(capsys.readouterr().out)["accuracy"]
    assert re.search(r"\*\*([\d.]+) %\*\* of 360", card)[1] == f"{100 * accuracy:.1f}"
    assert shipped("sasa_nano").stat().st_size < 400_000
    for part in ("Data", "Recipe", "Accuracy", "Licence"):
        assert f"\n## {part}\n" in card


def test_predict_and_explore_take_the_name(capsys, tmp_path, monkeypatch):
    from sklearn.datasets import load_digits

    monkeypatch.chdir(tmp_path)
    cells = load_digits().images[0] / 16 * 255
    Image.fromarray(cells.astype("uint8")).save("zero.png")
    assert cli.main(["predict", "sasa_nano", "zero.png"]) == 0
    assert capsys.readouterr().out.startswith("zero.png: 0 ")
    assert cli.main(["explore", "sasa_nano", "digits:3"]) == 0
    page = Path("explore.html").read_text()
    assert "Trained on digits." in page
    assert "Untrained" not in page
    assert cli.main(["explore", "sasa_nano,in_chans=1,pretrained=false", "digits:3", "--size", "8"]) == 0
    assert "Untrained" in Path("explore.html").read_text()


def test_what_is_on_the_disk_goes_before_what_comes_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sasa_nano").mkdir()
    with pytest.raises(DataError, match=r"there is no sasa_nano/model\.safetensors"):
        ns.load("sasa_nano")


def test_a_network_without_weights_says_how_to_make_some():
    rule = (
        "`nearsight train --model sasa_micro --data fashion-mnist`, which leaves them in runs/sasa_micro-fashion-mnist"
    )
    with pytest.raises(OptionError, match=rule):
        ns.create_model("sasa_micro", pretrained=True)
    for name in ("halo_h0", "conv_nano", "sasa_nano.untrained"):
        with pytest.raises(OptionError, match=f"{name} comes without weights"):
            ns.create_model(name, pretrained=True)
    with pytest.raises(OptionError, match="sasa_nano has no tag 'letters'; it has digits, untrained"):
        ns.create_model("sasa_nano.letters", pretrained=True)


# -------------------------------------------------------------------------------------------- NAT and DiNAT, published

SMALL = {"depths": [1, 2], "num_heads": [1, 2], "embed_dim": 16, "mlp_ratio": 2.0, "kernel_size": 3}
FULL = {
    "mini": ([3, 4, 6, 5], [2, 4, 8, 16], 64, 3.0),
    "tiny": ([3, 4, 18, 5], [2, 4, 8, 16], 64, 3.0),
    "small": ([3, 4, 18, 5], [3, 6, 12, 24], 96, 2.0),
    "base": ([3, 4, 18, 5], [4, 8, 16, 32], 128, 2.0),
    "large": ([3, 4, 18, 5], [6, 12, 24, 48], 192, 2.0),
}


def config_of(kind="dinat", classes=5, **changed):
    """As transformers writes it; hidden_size is wrong in the published ones too."""
    found = {**SMALL, "model_type": kind, "architectures": [f"{kind.capitalize()}ForImageClassification"]}
    found |= {"patch_size": 4, "num_channels": 3, "qkv_bias": True, "hidden_act": "gelu", "layer_norm_eps": 1e-05}
    found |= {"layer_scale_init_value": 0.0, "hidden_size": 512, "drop_path_rate": 0.2}
    found |= {"id2label": {str(index): f"label {index}" for index in range(classes)}}
    if kind == "dinat":
        found["dilations"] = [[1], [2, 1]]
    return {**found, **changed}


def names_of(config):
    """Names and shapes of transformers' weights, written down independently of our code."""
    dim, k, hidden, kind = config["embed_dim"], config["kernel_size"], config["mlp_ratio"], config["model_type"]
    shapes = {
        "embeddings.patch_embeddings.projection.0.weight": (dim // 2, 3, 3, 3),
        "embeddings.patch_embeddings.projection.0.bias": (dim // 2,),
        "embeddings.patch_embeddings.projection.1.weight": (dim, dim // 2, 3, 3),
        "embeddings.patch_embeddings.projection.1.bias": (dim,),
        **norm("embeddings.norm", dim),
    }
    for level, (depth, heads) in enumerate(zip(config["depths"], config["num_heads"], strict=True)):
        c = dim * 2**level
        for block in range(depth):
            start = f"encoder.levels.{level}.layers.{block}"
            shapes |= {**norm(f"{start}.layernorm_before", c), **norm(f"{start}.layernorm_after", c)}
            shapes |= {f"{start}.attention.self.rpb": (heads, 2 * k - 1, 2 * k - 1)}
            for part in ("self.query", "self.key", "self.value", "output.dense"):
                shapes |= linear(f"{start}.attention.{part}", c, c)
            shapes |= linear(f"{start}.intermediate.dense", c, int(hidden * c))
            shapes |= linear(f"{start}.output.dense", int(hidden * c), c)
            if config["layer_scale_init_value"]:
                shapes[f"{start}.layer_scale_parameters"] = (2, c)
        if level < len(config["depths"]) - 1:
            start = f"encoder.levels.{level}.downsample"
            shapes |= {f"{start}.reduction.weight": (2 * c, c, 3, 3), **norm(f"{start}.norm", 2 * c)}
    shapes |= norm("layernorm", c)
    return {f"{kind}.{name}": shape for name, shape in shapes.items()} | linear(
        "classifier", c, len(config["id2label"])
    )


def norm(name, channels):
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def linear(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def written(folder: Path, config, state=None) -> dict[str, torch.Tensor]:
    state = {name: torch.randn(shape) for name, shape in names_of(config).items()} if state is None else state
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    return state


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that holds what huggingface_hub keeps of repositories, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def keep(repository, config, state=None):
        kept = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        state = written(kept / "snapshots" / ("0" * 40), config, state)
        (kept / "refs").mkdir()
        (kept / "refs" / "main").write_text("0" * 40)
        return state

    return keep


def expected(state, config):
    """Our network, filled by hand from transformers' names."""
    kind, dilations = config["model_type"], config.get("dilations")
    size = {name: config[name] for name in SMALL}
    scale = 1.0 if config["layer_scale_init_value"] else None
    model = Nat(**size, dilations=dilations, layer_scale=scale, num_classes=len(config["id2label"]))
    own = {}
    for name, one in ((name.removeprefix(f"{kind}."), one) for name, one in state.items()):
        if name.startswith("encoder"):
            _, _, level, what, *rest = name.split(".")
            start = f"levels.{level}." + (f"blocks.{rest[0]}." if what == "layers" else "downsample.")
            rest = ".".join(rest[1:] if what == "layers" else rest)
            if "query" in rest:
                key, value = (state[f"{kind}.{name.replace('query', part)}"] for part in ("key", "value"))
                own[f"{start}attn.qkv.{rest.split('.')[-1]}"] = torch.cat([one, key, value])
            elif "layer_scale" in rest:
                own[f"{start}gamma1"], own[f"{start}gamma2"] = one
            elif "self.key" not in rest and "self.value" not in rest:
                for theirs, ours in (
                    ("attention.self", "attn"),
                    ("attention.output.dense", "attn.proj"),
                    ("layernorm_before", "norm1"),
                    ("layernorm_after", "norm2"),
                    ("intermediate.dense", "mlp.fc1"),
                ):
                    rest = rest.replace(theirs, ours)
                own[start + rest.replace("output.dense", "mlp.fc2")] = one
        else:
            name = name.replace("embeddings.patch_embeddings.projection", "patch_embed.proj").replace(
                "classifier", "head"
            )
            own[name.replace("embeddings.norm", "patch_embed.norm").replace("layernorm", "norm")] = one
    model.load_state_dict(own)
    return model.eval()


X = torch.randn(2, 3, 48, 40, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["nat", "dinat"])
@pytest.mark.parametrize("scale", [0.0, 1e-5])
def test_a_folder_of_transformers_is_our_network(kind, scale, tmp_path):
    config = config_of(kind, layer_scale_init_value=scale)
    wanted = expected(written(tmp_path / "x", config), config)(X)
    model = ns.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).eval()
    assert torch.equal(model(X), wanted)
    assert torch.equal(Nat.from_pretrained(tmp_path / "x").eval()(X), wanted)
    assert model.pretrained_cfg["label_names"][1] == "label 1"
    windows = [block.attn.window.dilation for level in model.levels for block in level.blocks]
    assert windows == ([1, 1, 1] if kind == "nat" else [1, 2, 1])
    # timm writes it as its own, and then reads it.
    timm.models.save_for_hf(model, tmp_path / "timm")
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()(X), wanted)
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(Nat.from_pretrained(tmp_path / "ours").eval()(X), wanted)
    other = ns.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True, num_classes=3).eval()
    assert torch.equal(other.forward_features(X), model.forward_features(X))


def test_names_take_their_repository(hub, tmp_path):
    config = config_of(classes=1000)
    state = hub("shi-labs/dinat-mini-in1k-224", config)
    wanted = expected(state, config)(X)
    options = {**SMALL, "dilations": config["dilations"], "pretrained": True, "cache_dir": tmp_path / "hub"}
    for make in (ns.create_model, timm.create_model):
        for name in ("dinat_mini", "dinat_mini.in1k"):
            assert torch.equal(make(name, **options).eval()(X), wanted)
    by_repository = ns.create_model("hf-hub:shi-labs/dinat-mini-in1k-224", pretrained=True, cache_dir=tmp_path / "hub")
    assert torch.equal(by_repository.eval()(X), wanted)
    by_class = Nat.from_pretrained("shi-labs/dinat-mini-in1k-224", cache_dir=tmp_path / "hub")
    assert torch.equal(by_class.eval()(X), wanted)
    with pytest.raises(
        DataError, match=r"cannot fetch nat_mini: .*put config\.json and model\.safetensors of its repos"
    ):
        ns.create_model("nat_mini", pretrained=True, cache_dir=tmp_path / "hub")


def test_weights_for_other_dilations_are_refused(hub, tmp_path):
    """The same names, the same shapes, another network."""
    hub("shi-labs/dinat-mini-in1k-224", config_of(classes=1000))
    where = {**SMALL, "pretrained": True, "cache_dir": tmp_path / "hub"}
    with pytest.raises(DataError, match=r"config\.json says dilations=\[\[1\],\[2,1\]\], and dinat_mini is made with"):
        ns.create_model("dinat_mini", **where)
    with pytest.raises(DataError, match=r"says depths=.*num_heads=.*embed_dim=16,.*kernel_size=3"):
        ns.create_model("dinat_mini", pretrained=True, cache_dir=tmp_path / "hub")
    with pytest.raises(DataError, match="says dilations="):
        timm.create_model("dinat_mini", **where)


def test_tags_have_their_dilations_with_weights_and_without(tmp_path):
    small = {**SMALL, "depths": [2, 2, 2, 2], "num_heads": [1] * 4, "kernel_size": 7}

    def windows(model):
        return [(b.attn.window.kernel_size, b.attn.window.dilation) for level in model.levels for b in level.blocks][
            1::2
        ]

    plain, wide = [(7, 8), (7, 4), (7, 2), (7, 1)], [(7, 13), (7, 6), (7, 3), (7, 1)]
    assert windows(ns.create_model("dinat_large", **small)) == plain
    assert windows(ns.create_model("dinat_large.in22k", **small)) == plain
    made = ns.create_model("dinat_large.in22k_ft_in1k_384", **small)
    assert windows(made) == wide
    assert made.pretrained_cfg["input_size"] == (3, 384, 384)
    small.pop("kernel_size")
    eleven = ns.create_model("dinat_large.in22k_ft_in1k_384_11x11", **small)
    assert windows(eleven) == [(11, one) for _, one in plain]
    timm.models.save_for_hf(made, tmp_path / "timm")  # which notes the tag alone
    assert windows(timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)) == wide


HUB = [name for name in timm.list_pretrained("nat_*") + timm.list_pretrained("dinat_*") if "." in name]
EVERY_RUN = ("nat_mini.in1k", "dinat_base.in1k", "dinat_large.in22k_ft_in1k_384_11x11")


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[] if one in EVERY_RUN else pytest.mark.sweep) for one in HUB]
)
def test_published_shapes_fit(name):
    config = ns.models.get_pretrained_cfg(name)
    if not config.hf_hub_id:
        return
    kind, _, size = name.partition(".")[0].partition("_")
    depths, heads, dim, ratio = FULL[size]
    scaled = size == "base" or (kind, size) == ("nat", "small")
    wanted = config_of(
        kind,
        1000,
        depths=depths,
        num_heads=heads,
        embed_dim=dim,
        mlp_ratio=ratio,
        kernel_size=11 if "11x11" in name else 7,
        layer_scale_init_value=1e-5 if scaled else 0.0,
    )
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in names_of(wanted).items()}
        model = ns.create_model(name)
    model.load_state_dict(from_published(state, model), assign=True)
    assert config.hf_hub_id.removeprefix("shi-labs/").startswith(f"{kind}-{size}-")


@pytest.mark.network
def test_the_published_logits():
    """Three logits of a photograph of COCO that transformers' own tests hold; resized as the repository says."""
    from io import BytesIO
    from urllib.request import urlopen

    with urlopen("http://images.cocodataset.org/val2017/000000039769.jpg", timeout=60) as answer:
        picture = Image.open(BytesIO(answer.read())).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
    model = ns.create_model("dinat_mini", pretrained=True).eval()
    transform = timm.data.create_transform(**{**timm.data.resolve_model_data_config(model), "crop_pct": 1.0})
    with torch.no_grad():
        logits = model(transform(picture)[None])
    torch.testing.assert_close(logits[0, :3], torch.tensor([-0.1545, -0.7667, 0.4642]), rtol=1e-3, atol=1e-3)


# -------------------------------------------------------------------------------------------------------- wrong files


class Planted:
    def __reduce__(self):
        return print, ("it ran",)


def test_wrong_files_are_one_line_and_run_nothing(tmp_path, capsys):
    whole = ns.create_model("nat_mini", **SMALL).state_dict()
    contents = {
        "would run code": {"state_dict": whole, "args": Planted()},
        r"the file has no norm\.bias; take the file of this network": {
            k: v for k, v in whole.items() if k != "norm.bias"
        },
        r"the file has no head\.bias, the network has no ": timm.create_model("test_resnet").state_dict(),
        r"head\.bias is \(1000,\) there and \(5,\) here; make it with num_classes=1000, and take .*r\(5\) then": whole,
    }
    for message, content in contents.items():
        torch.save(content, tmp_path / "x.pth")
        refused(tmp_path / "x.pth", message, **({"num_classes": 5} if "here" in message else {}))
    save_file(whole, tmp_path / "x.safetensors")
    for file in ("x.pth", "x.safetensors"):
        (tmp_path / f"half-{file}").write_bytes((tmp_path / file).read_bytes()[:-2000])
        refused(tmp_path / f"half-{file}", "the file is damaged, of another kind, or would run code")
    refused(tmp_path / "nowhere.pth", "no such file")
    assert "it ran" not in capsys.readouterr().out


def refused(file: Path, message: str, **options) -> None:
    with pytest.raises(DataError, match=message) as told:
        ns.create_model("nat_mini", checkpoint_path=str(file), **SMALL, **options)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"depths": "__import__('os')"}, "does not say depths as transformers writes it"),
        ({"dilations": [[1]]}, "needs dilations, a list for each level"),
        ({"qkv_bias": False}, "has qkv_bias=False; nearsight's network has True alone"),
        ({"layer_scale_init_value": "big"}, "needs a number for layer_scale_init_value"),
        ({"kernel_size": 5}, r"rpb is \(\d, 5, 5\) there and \(\d, 9, 9\) here"),
        ({"depths": [1, 3], "dilations": [[1], [1, 1, 1]]}, r"the file has no levels\.1\.blocks\.2"),
        ({"layer_scale_init_value": 1e-5}, r"the file has no levels\.0\.blocks\.0\.gamma1"),
    ],
)
def test_a_config_that_lies_is_one_line(changed, message, tmp_path):
    state = {name: torch.zeros(shape) for name, shape in names_of(config_of()).items()}
    written(tmp_path / "x", config_of(**changed), state)
    for make in (
        lambda: ns.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True),
        lambda: Nat.from_pretrained(tmp_path / "x"),
    ):
        with pytest.raises(DataError, match=message) as told:
            make()
        assert "\n" not in str(told.value)


def test_another_networks_folder_leaves_nothing_random(tmp_path):
    ns.create_model("sasa_nano").save_pretrained(tmp_path / "nano")
    state = ns.create_model("conv_nano").state_dict()
    save_file(state, tmp_path / "nano" / "model.safetensors")
    with pytest.raises(NearsightError) as told:
        type(ns.create_model("sasa_nano")).from_pretrained(tmp_path / "nano")
    assert "\n" not in str(told.value)
    file = {"file": str(tmp_path / "nano" / "model.safetensors")}
    with pytest.raises(DataError, match="the weights do not fit sasa_nano"):
        ns.create_model("sasa_nano", pretrained=True, pretrained_cfg_overlay=file, num_classes=3)


# ------------------------------------------------------------------------------------------ folders, as a user meets them


def test_from_pretrained_says_in_a_line_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    SasaResNet((1,), (16,), stem_stride=1, num_heads=2, num_classes=4).save_pretrained("own")
    assert SasaResNet.from_pretrained("own").num_classes == 4
    wrong = [
        (
            lambda: SasaResNet.from_pretrained("own", num_classes=7),
            "make it with num_classes=4, and take model.reset_class",
        ),
        (lambda: SasaResNet.from_pretrained("own", in_chans=1), r"do not fit own: size mismatch for stem\.0\.weight"),
        (
            lambda: SasaResNet.from_pretrained("own", colour=1),
            "SasaResNet cannot be made of what own and these options say",
        ),
        (lambda: Nat.from_pretrained("own"), "Nat cannot be made of what own and these options say"),
        (lambda: SasaResNet.from_pretrained("nowhere"), "cannot fetch nowhere: .*; without a network put"),
    ]
    for call, reason in wrong:
        with pytest.raises(DataError, match=reason) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_folder_of_timms_with_another_network_is_one_line(tmp_path):
    model = ns.create_model("sasa_nano")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    config = {"first_conv": "stem.0", "classifier": "head.fc", "num_classes": 10, "input_size": [3, 32, 32]}
    noted = {"architecture": "resnet18", "num_classes": 10, "pretrained_cfg": config}
    (tmp_path / "config.json").write_text(json.dumps(noted))
    with pytest.raises(DataError, match="the weights do not fit local-dir:"):
        ns.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1)
    noted["architecture"] = "sasa_nano"
    (tmp_path / "config.json").write_text(json.dumps(noted))
    adapted = ns.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1, features_only=True)
    assert adapted(torch.randn(1, 1, 32, 32))[-1].shape == (1, 192, 8, 8)
