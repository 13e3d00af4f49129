# SPDX-License-Identifier: Apache-2.0
"""The command line. Each command imports what it needs when it runs; each mistake is one line and exit code 2."""

from __future__ import annotations

import os

# Large tensors then come on huge pages. PyTorch reads it when it makes its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import argparse
import ctypes
import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from difflib import get_close_matches
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from .errors import DataError, NearsightError, OptionError, TrainingError
from .pages.names import readable

TRAIN_EXTRA = ("lightning", "torchmetrics", "jsonargparse", "sklearn", "scipy", "matplotlib", "jinja2", "PIL", "rich")

OVERVIEW = """\
Self-attention in the place of convolution: train, look, compare.

commands:
  train     train a network on images and write a report
  eval      measure a trained network on test images
  compare   train several networks with several seeds: a table, plots and a page
  convert   put attention in the place of a network's convolutions
  export    a trained network as an ONNX file, or a program of torch.export
  explore   a page that shows where a network looks, from every pixel of an image
  profile   what each layer of a network costs, and how attention grows with the image
  models    list nearsight's networks
  bench     measure speed against the convolution and other ways to attend
  info      versions, attention backends and what this machine offers

examples:
  nearsight train                               a network of attention learns digits, in about a minute
  nearsight train --model sasa_nano --data fashion-mnist --output runs/fashion
  nearsight eval runs/fashion --data fashion-mnist

`nearsight COMMAND --help` says more about each.
"""

TRAIN_EXAMPLES = """\
examples:
  nearsight train                                            the defaults: sasa_nano on digits
  nearsight train --data folder:~/photos --epochs 20         one folder of images per class
  nearsight train --model sasa_micro,kernel_size=5 --data wds:~/shards --devices 2
  nearsight train --config recipes/fashion_mnist.yaml
  nearsight train --model resnet18 --data cifar10 --size 64 --download
  nearsight train --resume --output runs/sasa_nano-digits    go on after an interruption
  nearsight train --config runs/a/config.yaml --seed 1 --output runs/b

The output folder then holds config.yaml, last.ckpt, model.safetensors, metrics.csv, timing.csv,
trained.npz and report.html.
"""

EVAL_EXAMPLES = """\
examples:
  nearsight eval runs/sasa_nano-digits --data digits
  nearsight eval model.safetensors --data folder:~/photos --json
  nearsight eval runs/photos --data folder:~/more-photos --leave-out-trained
"""

COMPARE_EXAMPLES = """\
examples:
  nearsight compare --models sasa_nano conv_nano --data digits --seeds 3 --output runs/twins
  nearsight compare --models sasa_micro "sasa_micro,kernel_size=3" --config recipe.yaml --output runs/kernels
  nearsight compare --models sasa_micro "conv_micro,lr=0.003,opt=sgd" --size 64 --output runs/own-rates
  nearsight compare --preset article --data fashion-mnist --seeds 3 --output runs/article

Stopped at any moment, the same command goes on; models and seeds can be added. The output folder then holds table.csv,
runs.csv, compare.html, plots, compare.yaml and a folder for every run.
"""

CONVERT_EXAMPLES = """\
examples:
  nearsight convert resnet18 --init exact --pretrained --output runs/exact
  nearsight convert resnet18 --init exact --checkpoint mine.pth --names "layer3.*" "layer4.*" --output runs/late
  nearsight convert runs/resnet --init exact --margin 1 --output runs/attends
  nearsight convert resnet50 --init random --kernel-size 7 --output runs/sasa

Without --pretrained and --checkpoint the weights are fresh. The output folder then holds model.safetensors, which
`nearsight eval` reads, and report.json.
"""

EXPORT_EXAMPLES = """\
examples:
  nearsight export runs/demo --format onnx                   writes runs/demo/model.onnx
  nearsight export runs/demo/last.ckpt --format pt2 --output sasa.pt2

The file takes batches and pictures of any size, where the network does, else of its own or of --size N or HxW, and runs
without nearsight. Before it is written
it has run on sizes other than the one it was made with, and computed what the network does.
"""

EXPLORE_EXAMPLES = """\
examples:
  nearsight explore runs/demo digits:3                       the fourth test image of the digits
  nearsight explore runs/photos cat.jpg --output cat.html
  nearsight explore nat_mini,pretrained=false cat.jpg --size 224

The page is one file that needs no network: open it in any browser, or send it to somebody.
"""

PROFILE_EXAMPLES = """\
examples:
  nearsight profile sasa_resnet26 --size 224
  nearsight profile runs/demo --batch-size 32 --output runs/demo-cost
  nearsight profile resnet50 --size 224 --no-growth --csv > resnet50.csv

The floor of a layer is the least time that its operations and bytes could take, by this machine's rates of a large matrix
product and a large copy, which are measured too. The output folder then holds profile.json, and layers and growth as .csv,
.svg and .png.
"""

BENCH_EXAMPLES = """\
examples:
  nearsight bench core               the operation: our backends and the ways of others, beside a convolution
  nearsight bench layers --threads 1 --json layers.json
  nearsight bench models             SASA-ResNets against ResNets, HaloNet against timm's: speed, training memory
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a mistake or what cannot be written, 130 after Ctrl-C."""
    _open_closed_streams()
    _keep_freed_memory()
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):  # a name may hold what a terminal's encoding has no bytes for
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _code_of(given)
    except SystemExit:  # after --help
        if _flushed() != 0:
            return 2
        raise
    return _flushed() or code


def _code_of(arguments: list[str]) -> int:
    try:
        _run(arguments)
    except NearsightError as error:
        _complain(f"error: {error}")
        stopped = isinstance(error.__cause__, (SystemExit, KeyboardInterrupt))  # Lightning turns Ctrl-C into SystemExit
        return 130 if stopped else 2
    except KeyboardInterrupt:
        _complain("stopped")
        return 130
    except OSError as error:
        return _code_without(error, finished=arguments[:1] not in (["train"], ["compare"]))
    return 0


def _code_without(error: OSError, *, finished: bool) -> int:
    """After what could not be read or written. A reader that has seen enough (`nearsight models | head`) is no mistake."""
    broken = isinstance(error, BrokenPipeError)
    if (
        broken or error.filename is None
    ):  # what is left of the output goes nowhere, or leaving would stumble over it again
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if broken and finished:
        return 0
    what = f"{error.filename}: " if error.filename is not None else "cannot write the output: "
    _complain(f"error: {what}{error.strerror or error}")
    return 2


def _flushed() -> int:
    """Whether all that was printed has arrived, as an exit code."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return _code_without(error, finished=True)
    return 0


def _complain(message: str) -> None:
    with suppress(OSError):  # where that cannot be written either, the exit code tells
        print(f"nearsight: {readable(' '.join(message.split()))}", file=sys.stderr)


def _open_closed_streams() -> None:
    """Let a stream that was closed (`>&-`) lead nowhere: the next file to be opened would take its place, and its text."""
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(descriptor)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)  # for the processes that are started, too
        setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115 (as long as the process)


def _keep_freed_memory() -> None:
    """Let glibc's malloc use freed tensors again in place of handing them back to the system, page by page.

    A training step of a small network takes 5 % less so, one operation on its own up to a fifth. The process of a large
    network is 5 to 10 % larger.
    """
    trim_threshold, mmap_max = -1, -4  # by their numbers in malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # another C library
    mallopt(trim_threshold, 1 << 30)
    mallopt(mmap_max, 0)


def _run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: nearsight COMMAND [options]\n       nearsight --version\n\n" + OVERVIEW, end="")
    elif arguments[0] == "--version":
        print(f"nearsight {version('nearsight')}")
    elif arguments[0] in COMMANDS:
        COMMANDS[arguments[0]](arguments[1:])
    else:
        raise OptionError(
            f"there is no command {arguments[0]!r}{_near(arguments[0], COMMANDS)}; commands are {', '.join(COMMANDS)}"
        )


# -------------------------------------------------------------------------------------------------------- commands


def _train(arguments: list[str]) -> None:
    _need_train_extra("train")
    from jsonargparse import ArgumentParser

    from .training.recipe import Recipe

    parser = ArgumentParser(
        prog="nearsight train",
        description="Train a network on images, with a checkpoint after every epoch and a report at the end.",
        epilog=TRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        print_config=None,  # every run leaves its config.yaml
    )
    parser.add_argument("--config", type=str, help="YAML file of settings; flags win")
    for field in fields(Recipe):
        common = field.metadata["common"] if field.default is None else field.default
        default = "the data's own" if common is None else common
        help = f"{field.metadata['help']} (default: {default})" if field.name != "data_root" else field.metadata["help"]
        parser.add_argument(_flag(field.name), default=field.default, help=help, **_form(field.metadata["kind"]))
    parser.add_argument("--output", type=str, help="the run's folder (default: runs/MODEL-DATA)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    parser.add_argument("--download", action="store_true", help="fetch data that is missing from the network")

    given = _with_config(parser, _parse(parser, arguments, defaults=False).as_dict())
    output = Path(given.pop("output")) if "output" in given else None
    resume, download = given.pop("resume", False), given.pop("download", False)
    recipe = Recipe(**given)

    from .training import train

    if resume:
        train.resume(output or train.default_output(recipe), given)
    else:
        train.train(recipe, output, download=download)


def _compare(arguments: list[str]) -> None:
    _need_train_extra("compare")
    from jsonargparse import ArgumentParser

    from .training.compare import PER_RUN, PRESETS, compare
    from .training.recipe import Recipe

    named = [flag for flag in map(_flag, PER_RUN) if any(word.split("=")[0] == flag for word in arguments)]
    if named:
        raise OptionError(f"compare takes --models A B ... and --seeds N, and no {named[0]}")
    parser = ArgumentParser(
        prog="nearsight compare",
        description="Train several models with several seeds by one recipe, and hold them against each other.",
        epilog=COMPARE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        print_config=None,
    )
    parser.add_argument("--models", nargs="+", type=str, help="two or more, as for train; NAME,option=value works too")
    parser.add_argument("--preset", type=str, help=f"models that belong together: {', '.join(PRESETS)}")
    parser.add_argument("--seeds", type=int, default=3, help="how many: 0, 1, 2 ... (default: 3)")
    parser.add_argument("--output", type=str, help="the comparison's folder (required)")
    parser.add_argument("--target", type=float, help="accuracy to take the time to (default: the highest all reach)")
    parser.add_argument("--download", action="store_true", help="fetch data that is missing from the network")
    parser.add_argument("--config", type=str, help="YAML file of a recipe; flags win")
    for field in fields(Recipe):  # a recipe's file may name model and seed, which are not used
        help = argparse.SUPPRESS if field.name in PER_RUN else field.metadata["help"]
        parser.add_argument(_flag(field.name), default=field.default, help=help, **_form(field.metadata["kind"]))

    given = _with_config(parser, _parse(parser, arguments, defaults=False).as_dict())
    models, preset = given.pop("models", None), given.pop("preset", None)
    seeds, output, target = given.pop("seeds", 3), given.pop("output", None), given.pop("target", None)
    download = given.pop("download", False)
    if (models is None) == (preset is None):
        raise OptionError("compare needs either --models A B ... or --preset; see nearsight compare --help")
    if preset is not None and preset not in PRESETS:
        raise OptionError(f"preset must be one of {', '.join(PRESETS)}; received {preset!r}")
    if output is None:
        raise OptionError("compare needs --output DIR, where it keeps its runs; see nearsight compare --help")
    groups = PRESETS[preset] if preset else {"": models}
    compare(groups, Recipe(**given), seeds, Path(output), target=target, download=download)


def _eval(arguments: list[str]) -> None:
    _need_train_extra("eval")
    parser = _parser("eval", "Measure a trained network on the images of a data set.", EVAL_EXAMPLES)
    parser.add_argument("run", metavar="DIR|FILE", help="folder of a run, a .safetensors or a .ckpt file")
    parser.add_argument("--data", required=True, help="as for `nearsight train`: digits, folder:PATH ...")
    parser.add_argument("--data-root", help="folder that holds the data; else the usual places are searched")
    parser.add_argument(
        "--split", help="test, val, train or all (default: test; all of a folder that was not trained on)"
    )
    parser.add_argument("--by-order", action="store_true", help="pair classes by their order, whatever they are called")
    parser.add_argument("--leave-out-trained", action="store_true", help="measure no image that the run was trained on")
    parser.add_argument(
        "--max-broken", type=int, default=10, metavar="N", help="unreadable images to skip (default: 10)"
    )
    parser.add_argument("--background", help="colour that shows where images are transparent (default: the run's)")
    parser.add_argument("--json", action="store_true", help="print JSON, with the confusion matrix")
    options = _parse(parser, arguments)

    from .pages.csv_json import to_json
    from .training.assess import assess

    found = assess(
        Path(options.run),
        options.data,
        options.data_root,
        split=options.split,
        by_order=options.by_order,
        leave_out_trained=options.leave_out_trained,
        max_broken=options.max_broken,
        background=options.background,
    )
    print(to_json(found.to_dict()) if options.json else "\n".join(found.summary()))


def _convert(arguments: list[str]) -> None:
    parser = _parser("convert", "Put attention in the place of a network's spatial convolutions.", CONVERT_EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="a name, or a folder or file that nearsight left")
    parser.add_argument("--init", required=True, choices=("exact", "random"), help="the same function, or fresh layers")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the converted network")
    parser.add_argument("--pretrained", action="store_true", help="take the weights that timm offers for MODEL")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="take weights from a .safetensors or .pth file")
    parser.add_argument("--names", nargs="+", metavar="PATTERN", help="only layers whose name matches, as 'layer4.*'")
    parser.add_argument("--stages", nargs="+", type=int, metavar="N", help="only these stages, as timm's out_indices")
    parser.add_argument("--kernels", nargs="+", type=int, metavar="K", help="only kernels of these sizes")
    parser.add_argument("--stem", action="store_true", help="also the layers that read the picture itself")
    parser.add_argument("--kernel-size", type=int, help="random: side of the memory block (default: 7)")
    parser.add_argument("--num-heads", type=int, help="random: heads, or the nearest number that fits (default: 8)")
    parser.add_argument("--position", help="random: the position encoding (default: relative)")
    parser.add_argument("--margin", type=int, help="exact: places that heads may reach beyond the kernel (default: 0)")
    parser.add_argument("--locality", type=float, help="exact: how hard heads look; below 1 is not exact (default: 1)")
    parser.add_argument(
        "--no-content", dest="content", action="store_false", default=None, help="exact: position alone"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    options = vars(_parse(parser, arguments))

    from .pages.csv_json import to_json
    from .saved.converted import convert_to_folder, has_random_weights

    as_json, output = options.pop("json"), options["output"]
    report = convert_to_folder(**options)
    if has_random_weights(options["model"], options["pretrained"], options["checkpoint"]):
        print(
            f"nearsight: the weights of {options['model']} are random: --pretrained takes those that timm offers, "
            "--checkpoint those of a file",
            file=sys.stderr,
        )
    if as_json:
        print(to_json(report.to_dict()))
        return
    if find_spec("rich"):
        from rich import print as show
    else:
        show = print
    show(report)
    print(f"wrote {output}")


def _explore(arguments: list[str]) -> None:
    _need(("jinja2", "PIL"), "explore", "explore")
    parser = _parser("explore", "See what every layer and head attends to, from each pixel.", EXPLORE_EXAMPLES)
    parser.add_argument(
        "model", metavar="MODEL", help="folder of a run, a .safetensors or .ckpt file, or NAME,option=value"
    )
    parser.add_argument("image", metavar="IMAGE", help="a picture, or DATA:N, the test image of that number (from 0)")
    parser.add_argument("--output", default="explore.html", help="the page to write (default: explore.html)")
    parser.add_argument("--size", type=int, help="pixels per side that the network is given (default: its own)")
    parser.add_argument(
        "--background", help="colour that shows where images are transparent (default: its run's, white)"
    )
    parser.add_argument("--data-root", help="folder that holds the data; else the usual places are searched")
    options = _parse(parser, arguments)
    if options.size is not None and options.size < 1:
        raise OptionError(f"--size must be at least 1; received {options.size}")

    from .inspect.explore import explore, fit_picture, normalise, read_picture

    model, view, classes, title, subtitle = _model_and_view(options.model, options.size)
    view = replace(view, background=options.background or view.background)
    if Path(options.image).exists() or not re.fullmatch(r".+:\d+", options.image):
        picture = fit_picture(read_picture(options.image, view.background), view.channels, view.size)
        image = normalise(picture, view.mean, view.std)
    else:
        _need_train_extra("explore DATA:N")
        image, picture, said = _test_image(options.image, view, options.data_root)
        subtitle += f" Test image {options.image}, of class {said}."
    with _taking(options.model, view):
        page = explore(model, image, picture=picture, classes=classes, title=title, subtitle=subtitle)
    print(f"The page: {page.save(options.output)}")


def _profile(arguments: list[str]) -> None:
    _need_train_extra("profile")
    parser = _parser("profile", "Measure every layer of a network, and how attention grows.", PROFILE_EXAMPLES)
    parser.add_argument(
        "model", metavar="MODEL", help="folder of a run, a .safetensors or .ckpt file, or NAME,option=value"
    )
    parser.add_argument("--size", type=int, help="pixels per side of the images (default: the network's own)")
    parser.add_argument("--batch-size", type=int, default=1, help="images at a time (default: 1)")
    parser.add_argument("--rounds", type=int, default=7, help="passes to take the median of (default: 7)")
    parser.add_argument("--threads", type=int, help="threads to use (default: PyTorch's own number)")
    parser.add_argument(
        "--no-growth", dest="growth", action="store_false", help="leave out how attention grows with the image"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the numbers and plots")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print every number as JSON")
    form.add_argument("--csv", action="store_true", help="print the layers as CSV")
    options = _parse(parser, arguments)
    for name in ("size", "batch_size", "rounds"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise OptionError(f"{_flag(name)} must be at least 1; received {getattr(options, name)}")

    import torch

    from .bench.growth import geometry_of, growth
    from .bench.profile import profile
    from .bench.timing import using_threads
    from .files import make_folder

    model, view, _, title, _ = _model_and_view(options.model, options.size)
    if options.output is not None:
        make_folder(options.output)
    with using_threads(options.threads):
        x = torch.randn(options.batch_size, view.channels, view.size, view.size)
        with _taking(options.model, view):
            found = profile(model, x, rounds=options.rounds)
        grown = growth(None, **geometry_of(model), rounds=options.rounds) if options.growth else None
    _tell_cost(title, found, grown, options)


def _tell_cost(title: str, found: Any, grown: Any, options: argparse.Namespace) -> None:
    from rich.console import Console

    from .bench import growth, profile
    from .files import write_text
    from .pages.charts import write_plot
    from .pages.csv_json import to_csv, to_json

    facts = {"model": title, "parameters": found.parameters, "flops": found.flops, **asdict(found)}
    text = to_json(facts if grown is None else {**facts, "growth": asdict(grown)})
    if options.output is not None:
        write_plot(options.output / "layers", profile.draw_profile(found, title), to_csv(found.rows))
        if grown is not None:
            write_plot(options.output / "growth", growth.draw_growth(grown), to_csv(grown.points))
        write_text(options.output / "profile.json", text + "\n")
    if options.json or options.csv:
        print(text if options.json else to_csv(found.rows).removesuffix("\n"))
        return
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a file has no edge to break lines at
    console.print(profile.table(found))
    if grown is not None:
        console.print(growth.table(grown))
    if options.output is not None:
        print(f"wrote {options.output}")


@contextmanager
def _taking(model: str, view: Any) -> Iterator[None]:
    """A network raises what it likes about pictures that it cannot take: one line says which."""
    try:
        yield
    except (NearsightError, MemoryError):
        raise
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise OptionError(f"{model} cannot take {view.size}x{view.size} images: {reason}") from error


def _model_and_view(name: str, size: int | None) -> tuple[Any, Any, Sequence[str] | None, str, str]:
    """A model, its view of pictures, its classes, and a title and a sentence that say what it is."""
    from .inspect.explore import view_of
    from .models import create_model, input_size, parse_spec
    from .saved.view import View
    from .saved.weights import load_model

    path = Path(name).expanduser()
    if path.exists() or path.suffix in (".safetensors", ".ckpt") or (os.sep in name and ":" not in name):
        model, blueprint = load_model(path)
        view, classes, title = blueprint.view, blueprint.classes, blueprint.model
        subtitle = "" if blueprint.data == "nothing" else f"Trained on {blueprint.data}."
    else:
        model = create_model(name)
        view, classes, title = View(**view_of(model)), None, name
        view = replace(view, size=input_size(name)) if "img_size" in parse_spec(name)[1] else view
        subtitle = "Made by its name, with the weights that it starts with."
    return model.eval(), replace(view, size=size or view.size), classes, title, subtitle


def _test_image(name: str, view: Any, root: str | None) -> tuple[Any, Any, str]:
    """DATA:N as the model sees it, as it is shown, and what it is."""

    from .training.data import load_pictures

    data, number = name.rsplit(":", 1)
    pictures = load_pictures(data, root)
    if int(number) >= len(pictures.test):
        raise OptionError(f"{data} has {len(pictures.test)} test images, counted from 0; received {name}")
    image, label = pictures.test.seen(view, training=False, max_broken=0)[int(number)]
    mean, std = (image.new_tensor(values).view(-1, 1, 1) for values in (view.mean, view.std))
    return image, (image * std + mean).clamp(0, 1), pictures.classes[int(label)]


def _export(arguments: list[str]) -> None:
    parser = _parser("export", "Write a trained network as one file that runs without nearsight.", EXPORT_EXAMPLES)
    parser.add_argument("run", metavar="DIR|FILE", type=Path, help="folder of a run, a .safetensors or a .ckpt file")
    parser.add_argument("--format", required=True, choices=("onnx", "pt2"), help="ONNX, or a torch.export program")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write it (default: beside the weights)")
    parser.add_argument("--size", metavar="N|HxW", help="take pictures of this size alone (default: any, where it can)")
    options = _parse(parser, arguments)

    from .saved.export import export_to_file

    exported = export_to_file(options.run, options.format, options.output, options.size)
    tried = " and ".join("x".join(map(str, shape)) for shape in exported.tried)
    print(f"{exported.file}: takes {' x '.join(map(str, exported.shape))}")
    if exported.fixed is not None:
        print(f"height and width are fixed, --size N|HxW takes others; any would be taken but for: {exported.fixed}")
    print(f"run on {tried}: at most {exported.difference:.0e} from the network")


def _models(arguments: list[str]) -> None:
    _parse(_parser("models", "List nearsight's own networks; every model of timm can be trained too."), arguments)
    import torch

    from .models import create_model, list_models

    for name in list_models():
        with torch.device("meta"):  # counts parameters without making them
            model = create_model(name)
        print(f"{name:24}{sum(parameter.numel() for parameter in model.parameters()) / 1e6:9.3f} M parameters")


def _bench(arguments: list[str]) -> None:
    from .bench import BENCHES, run

    parser = _parser("bench", "Measure speed in one process, with peers in the same table.", BENCH_EXAMPLES)
    parser.add_argument("what", choices=list(BENCHES), help="what to measure")
    parser.add_argument("--threads", type=int, help="threads to use (default: one, then all)")
    parser.add_argument(
        "--quick", action="store_true", help="fewer shapes and rounds: to see that it works, not to quote"
    )
    parser.add_argument("--json", metavar="FILE", help="write every number to a file")
    options = _parse(parser, arguments)
    run(options.what, threads=options.threads, quick=options.quick, json_file=options.json)


def _info(arguments: list[str]) -> None:
    parser = _parser("info", "Versions, attention backends (and why not), and what this machine offers.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = _parse(parser, arguments)
    from .pages.csv_json import to_json

    facts = _facts()
    if options.json:
        print(to_json(facts))
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, reason in value.items():
                print(f"  {key:14}{'can run' if reason is None else reason}")
        else:
            print(f"{name:16}{value}")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": _train,
    "eval": _eval,
    "compare": _compare,
    "convert": _convert,
    "export": _export,
    "explore": _explore,
    "profile": _profile,
    "models": _models,
    "bench": _bench,
    "info": _info,
}


def _facts() -> dict[str, Any]:
    import platform

    import timm
    import torch

    from .attention import backends

    return {
        "nearsight": version("nearsight"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "backends": backends(),
    }


# --------------------------------------------------------------------------------------------------------- parsing


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}; see {self.prog} --help")


def _parser(command: str, description: str, epilog: str | None = None) -> _Parser:
    return _Parser(
        prog=f"nearsight {command}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _parse(parser: Any, arguments: list[str], **kwargs: Any) -> Any:
    # argparse's own keeps to itself that the help could not be written.
    parser._print_message = lambda message, file=None: print(message, end="", file=file or sys.stderr)
    try:
        return parser.parse_args(arguments, **kwargs)
    except (argparse.ArgumentError, UnicodeDecodeError) as error:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        unknown = next((word for word in arguments if word.startswith("--") and word.split("=")[0] not in flags), "")
        raise OptionError(f"{error}{_near(unknown, flags)}; see {parser.prog} --help") from error


def _with_config(parser: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What was typed, and for the rest what the file says that ``--config`` names."""
    if "config" not in given:
        return given

    from .training.recipe import read_settings

    path = Path(given.pop("config"))
    if not path.exists():
        raise OptionError(f"--config: File does not exist: {path}")
    try:
        noted = parser.parse_object(read_settings(path, given), defaults=False).as_dict()
    except argparse.ArgumentError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return {**noted, **given}


def _form(kind: Any) -> dict[str, Any]:
    """How jsonargparse takes a value of a recipe: --compile and --no-compile, or --epochs 3."""
    from jsonargparse import ActionYesNo

    return {"action": ActionYesNo(no_prefix="no-")} if kind is bool else {"type": kind}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _near(word: str, known: Any) -> str:
    near = get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _need_train_extra(command: str) -> None:
    _need(TRAIN_EXTRA, command, "train")


def _need(packages: Sequence[str], command: str, extra: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise TrainingError(f"`nearsight {command}` needs {', '.join(missing)}: pip install 'nearsight[{extra}]'")
