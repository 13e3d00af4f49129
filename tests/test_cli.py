# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, and that every mistake is one line on stderr and exit code 2."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from PIL import Image

from nearsight import cli
from nearsight.attention import native
from nearsight.models import create_model
from nearsight.saved.weights import Blueprint, save_model
from nearsight.training.data import load_pictures


@pytest.fixture
def untrained(tmp_path):
    """A model file as a run leaves it, without the time of a run."""
    pictures = load_pictures("digits")
    torch.manual_seed(0)
    blueprint = Blueprint("sasa_nano", pictures.classes, pictures.view(8), "digits")
    save_model(tmp_path / "model.safetensors", create_model("sasa_nano", num_classes=10, in_chans=1), blueprint)
    return tmp_path


def fails(capsys, *arguments):
    """The one line that a mistake leaves on stderr."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("nearsight: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_no_command_shows_the_overview(capsys, arguments):
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in cli.COMMANDS)


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"nearsight {version('nearsight')}\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    assert f"usage: nearsight {command}" in capsys.readouterr().out


def test_train_help_has_every_flag_of_the_contract_and_examples(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    for flag in ("model", "data", "data-root", "epochs", "batch-size", "lr", "seed", "output", "resume", "devices"):
        assert f"--{flag} " in text or f"--{flag}\n" in text, flag
    assert "examples:\n  nearsight train " in text


def test_models_lists_what_matches_and_the_twins(capsys):
    """GFLOP as docs/reference/models.md has them, where the native kernel is."""
    assert cli.main(["models", "*nano"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["model", "sasa_nano", "to", "conv_nano"]
    assert cli.main(["models", "*nano", "--json"]) == 0
    ours, twin = json.loads(capsys.readouterr().out)
    counted = sum(parameter.numel() for parameter in create_model("sasa_nano").parameters())
    assert (ours["parameters"], ours["image"]) == (counted, 32)
    assert twin["source"] == "sasa_nano with convolutions"
    if native.unavailable() is None:
        assert round(ours["flops"] / 1e9, 3) == 0.053
    assert cli.main(["models", "sasa_nano", "--csv"]) == 0
    assert capsys.readouterr().out.startswith("model,parameters,flops,image,source\nsasa_nano,84906,")
    assert "no network of nearsight matches 'resnet*'" in fails(capsys, "models", "resnet*")


def test_info_names_versions_and_backends(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text
    assert "reference     can run" in text
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backends"]["reference"] is None
    assert facts["threads"] == torch.get_num_threads()
    assert facts["kernel"] in ("none", "baseline", "neon", "avx2", "avx512", "avx512_bf16")
    assert (facts["kernel"] == "none") == (facts["backends"]["native"] is not None)


def test_eval_prints_the_accuracy_and_json_agrees(capsys, untrained):
    assert cli.main(["eval", str(untrained), "--data", "digits", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 360
    assert sum(map(sum, result["confusion"])) == 360
    correct = sum(row[index] for index, row in enumerate(result["confusion"]))
    assert result["accuracy"] == correct / 360
    assert result["accuracy_low"] < correct / 360 < result["accuracy_high"]
    named = {row["class"]: (row["images"], row["correct"]) for row in result["by_class"]}
    assert named == {
        name: (sum(row), row[place])
        for place, (name, row) in enumerate(zip(result["classes"], result["confusion"], strict=True))
    }
    assert cli.main(["eval", str(untrained / "model.safetensors"), "--data", "digits"]) == 0
    assert f"{correct / 360:.2%} ({correct} of 360 test images)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "there is no command 'trian' (did you mean train?); commands are train, eval, "),
        (["models", "--all"], "unrecognized arguments: --all; see nearsight models --help"),
        (["eval"], "the following arguments are required: DIR|FILE, --data"),
        (["eval", "nowhere", "--data", "digits"], "there is no nowhere; `nearsight train` leaves them"),
        (["train", "--epocs", "3"], "unrecognized arguments: --epocs 3 (did you mean --epochs?)"),
        (["train", "--epochs", "many"], 'Parser key "epochs":'),
        (["train", "--epochs", "0"], "epochs must be at least 1; received 0"),
        (["train", "--lr", "-1"], "lr must be a positive number; received -1"),
        (["train", "--model", "sasa_nan"], "there is no model 'sasa_nan'; did you mean sasa_nano"),
        (["train", "--data", "digit"], "data must be one of digits, mnist"),
        (
            ["train", "--data", "mnist", "--data-root", "nowhere"],
            "mnist is not in nowhere: name its folder with --data-root",
        ),
        (["train", "--data", "folder:nowhere"], "there is no folder nowhere"),
        (["train", "--config", "nowhere.yaml"], "File does not exist"),
        (["train", "--resume"], "there is no checkpoint runs/sasa_nano-digits/last.ckpt to resume from"),
    ],
)
def test_mistakes_are_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *arguments)


@pytest.mark.parametrize("content", [b"model: [", b"surprise: 1", b"epochs: soon", b"\xff\xfe\x00broken", b"- 1"])
def test_a_damaged_config_is_one_line(capsys, tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    fails(capsys, "train", "--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "run"))


def test_an_output_that_holds_a_run_is_one_line(capsys, untrained):
    assert "holds a run already" in fails(capsys, "train", "--output", str(untrained))


def test_an_output_that_cannot_be_written_is_one_line(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "Not a directory" in fails(capsys, "train", "--output", str(tmp_path / "file" / "run"))


def test_eval_of_a_truncated_file_is_one_line(capsys, untrained):
    file = untrained / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert "is it a whole safetensors file?" in fails(capsys, "eval", str(untrained), "--data", "digits")


def test_eval_on_data_of_other_classes_is_one_line(capsys, untrained, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(20):
            Image.new("RGB", (8, 8)).save(tmp_path / "images" / name / f"{index}.png")
    message = fails(capsys, "eval", str(untrained), "--data", f"folder:{tmp_path / 'images'}")
    assert "has 2 classes" in message
    assert "tells 10 apart, those of digits" in message


@pytest.mark.parametrize(
    ("package", "arguments", "said"),
    [
        ("lightning", "train", "`nearsight train` needs lightning: pip install 'nearsight[train]'"),
        ("jsonargparse", "train --help", "`nearsight train` needs jsonargparse: pip install 'nearsight[train]'"),
        ("matplotlib", "compare --models a b --output c", "needs matplotlib: pip install 'nearsight[train]'"),
        ("sklearn", "eval nowhere --data digits", "needs scikit-learn: pip install 'nearsight[train]'"),
        ("jinja2", "explore sasa_nano cat.jpg", "`nearsight explore` needs jinja2: pip install 'nearsight[explore]'"),
        (
            "sklearn",
            "explore sasa_nano,in_chans=1 digits:3",
            "digits needs scikit-learn: pip install 'nearsight[explore]'",
        ),
        ("rich", "profile sasa_nano", "`nearsight profile` needs rich: pip install 'nearsight[profile]'"),
        ("matplotlib", "profile sasa_nano --output x", "needs matplotlib: pip install 'nearsight[profile]'"),
        ("datasets", "train --data hf:x", "hf:NAME needs datasets: pip install 'nearsight[datasets]'"),
        ("webdataset", "train --data wds:x", "wds:PATH needs webdataset: pip install 'nearsight[webdataset]'"),
        ("tensorboard", "train --tensorboard", "--tensorboard needs tensorboard: pip install 'nearsight[tensorboard]'"),
    ],
)
def test_a_package_that_is_not_there_is_named_with_its_extra(package, arguments, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    assert said in fails(capsys, *arguments.split())


AT_ONCE = """
import sys
from nearsight import cli
asked = [[], ["-h"], ["--version"], ["no-such-command"], ["eval"], ["train", "--epocs", "3"], ["train", "--lr", "-1"]]
for arguments in [*asked, *([command, "--help"] for command in cli.COMMANDS)]:
    try:
        cli.main(arguments)
    except SystemExit:
        pass
    loaded = {"torch", "timm", "numpy", "lightning"} & set(sys.modules)
    assert not loaded, (arguments, loaded)
"""


def test_help_the_version_and_mistakes_come_before_pytorch_is_loaded():
    done = subprocess.run([sys.executable, "-c", AT_ONCE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


LIGHT = """
import sys
from nearsight import cli
assert cli.main(["models", "sasa_nano"]) == cli.main(["info"]) == 0
print("heavy:", sorted({"lightning", "matplotlib", "jsonargparse", "sklearn", "torchmetrics"} & set(sys.modules)))
"""


def test_models_and_info_import_none_of_the_train_extra_and_huge_pages_are_asked_for():
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    script = LIGHT + "import os; print(os.environ['THP_MEM_ALLOC_ENABLE'])"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["heavy: []", "1"]


FAULTS = """
import resource
import torch
from nearsight import cli
cli.main(["--version"])
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.ones(5_000_000)
before = faults()
for _ in range(5):
    torch.ones(5_000_000)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_tensors_are_used_again():
    """Otherwise five tensors of 20 MB are fetched anew: 25,000 pages of 4 kB, or hundreds where some are huge."""
    assert int(subprocess.check_output([sys.executable, "-c", FAULTS], text=True).split()[-1]) < 50


def test_python_dash_m_and_the_exit_code():
    done = subprocess.run([sys.executable, "-m", "nearsight", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("nearsight: error: there is no command 'nonsense'")


# ------------------------------------------------------------------------------------- what cannot be written or read


@pytest.mark.parametrize("buffering", [1, -1], ids=["line by line", "at the end"])
@pytest.mark.parametrize("arguments", [[], ["--version"], ["models", "--help"], ["train", "--help"]])
def test_a_full_disk_is_one_line_and_an_exit_code(arguments, buffering, capsys, monkeypatch):
    with open("/dev/full", "w", buffering=buffering) as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(arguments) == 2
        full.flush()  # what is left of it goes nowhere: the interpreter's last flush finds nothing to complain of
    assert capsys.readouterr().err == "nearsight: error: cannot write the output: No space left on device\n"


@pytest.mark.parametrize("buffering", [1, -1])
def test_a_reader_that_leaves_is_no_mistake(buffering, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", buffering=buffering) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert cli.main([]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("command", "code"), [("train", 2), ("compare", 2), ("models", 0)], ids=["train", "compare", "models"]
)
def test_work_that_a_reader_cut_short_is_not_done(command, code, monkeypatch):
    def broken(arguments):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(f"nearsight.commands.{command}.run", broken)
    with open(os.devnull, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert cli.main([command]) == code


def test_files_that_cannot_be_used_are_named(capsys, monkeypatch):
    monkeypatch.setattr("nearsight.commands.info.run", lambda arguments: os.stat("/no/such/file"))
    assert fails(capsys, "info") == "nearsight: error: /no/such/file: No such file or directory\n"


def test_an_error_that_cannot_be_told_has_its_exit_code(monkeypatch):
    with open("/dev/full", "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert cli.main(["no-such-command"]) == 2
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def test_closed_streams_lead_nowhere():
    """Else the next file that is opened takes their place, and gets what is printed."""
    program = (
        "import os, sys\nfor stream in (0, 1, 2): os.close(stream)\nsys.stdin = sys.stdout = sys.stderr = None\n"
        "from nearsight.cli import _open_closed_streams\n_open_closed_streams()\n"
        "print('lost'), sys.stdout.flush(), sys.stderr.write('lost')\n"
        "os._exit(os.open(os.devnull, os.O_RDONLY) + 40 * (sys.stdin.read() == ''))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert finished.returncode > 42
    assert (finished.stdout, finished.stderr) == (b"", b"")
