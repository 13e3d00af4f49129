# SPDX-License-Identifier: Apache-2.0
"""The command line. Each command imports what it needs when it runs; each mistake is one line and exit code 2."""

from __future__ import annotations

import os

# Fresh tensors above 32 MB then come on huge pages: large networks run up to 1.6 times faster. PyTorch reads it when it
# makes its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from .errors import NearsightError, OptionError, TrainingError

TRAIN_EXTRA = ("lightning", "torchmetrics", "jsonargparse", "sklearn", "matplotlib", "jinja2", "PIL", "rich")

OVERVIEW = """\
Self-attention in the place of convolution: train, look, compare.

commands:
  train     train a network on images and write a report
  eval      measure a trained network on test images
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
  nearsight train --model resnet18 --data cifar10 --download
  nearsight train --resume --output runs/sasa_nano-digits    go on after an interruption
  nearsight train --config runs/a/config.yaml --seed 1 --output runs/b

The output folder then holds config.yaml, last.ckpt, model.safetensors, metrics.csv and report.html.
"""

EVAL_EXAMPLES = """\
examples:
  nearsight eval runs/sasa_nano-digits --data digits
  nearsight eval model.safetensors --data folder:~/photos --json
"""

BENCH_EXAMPLES = """\
examples:
  nearsight bench core               the operation: native, blocked, dense and textbook, beside a convolution
  nearsight bench layers --threads 1 --json layers.json
  nearsight bench models             SASA-ResNets against ResNets, inference and training
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a mistake, 130 after Ctrl-C."""
    try:
        _run(list(sys.argv[1:] if arguments is None else arguments))
    except NearsightError as error:
        print(f"nearsight: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 130 if isinstance(error.__cause__, SystemExit) else 2  # Lightning turns Ctrl-C into SystemExit
    except KeyboardInterrupt:
        print("nearsight: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `nearsight models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


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
    parser.add_argument("--config", action="config", help="YAML file of settings; flags after it win")
    for field in fields(Recipe):
        default = "the data's own" if field.default is None else field.default
        help = f"{field.metadata['help']} (default: {default})" if field.name != "data_root" else field.metadata["help"]
        parser.add_argument(_flag(field.name), type=field.metadata["kind"], default=field.default, help=help)
    parser.add_argument("--output", type=str, help="the run's folder (default: runs/MODEL-DATA)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the output folder")
    parser.add_argument("--download", action="store_true", help="fetch data that is missing from the network")

    given = _parse(parser, arguments, defaults=False).as_dict()
    given.pop("config", None)
    output = Path(given.pop("output")) if "output" in given else None
    resume, download = given.pop("resume", False), given.pop("download", False)
    recipe = Recipe(**given)

    from .training import train

    if resume:
        train.resume(output or train.default_output(recipe), given)
    else:
        train.train(recipe, output, download=download)


def _eval(arguments: list[str]) -> None:
    _need_train_extra("eval")
    parser = _parser("eval", "Measure a trained network on the test images of a data set.", EVAL_EXAMPLES)
    parser.add_argument("run", metavar="DIR|FILE", help="folder of a run, a .safetensors or a .ckpt file")
    parser.add_argument("--data", required=True, help="digits, mnist, fashion-mnist, cifar10, cifar100 or folder:PATH")
    parser.add_argument("--data-root", help="folder that holds the data; else the usual places are searched")
    parser.add_argument("--json", action="store_true", help="print JSON, with the confusion matrix")
    options = _parse(parser, arguments)

    from .training.data import load_pictures, loader
    from .training.evaluate import evaluate
    from .training.weights import load_model

    model, blueprint = load_model(Path(options.run))
    pictures = load_pictures(options.data, options.data_root)
    if len(pictures.classes) != len(blueprint.classes):
        raise OptionError(
            f"{options.data} has {len(pictures.classes)} classes; {options.run} tells {len(blueprint.classes)} apart, "
            f"those of {blueprint.data}"
        )
    test = pictures.test.seen(blueprint.view, training=False)
    result = evaluate(model, loader(test, 256, pictures.test.workers))
    if options.json:
        summary = {"model": blueprint.model, "data": options.data, "images": result.count}
        measures = {"accuracy": result.accuracy, "loss": result.loss, "confusion": result.confusion.tolist()}
        print(json.dumps({**summary, "classes": blueprint.classes, **measures}, indent=2))
    else:
        share = f"{result.accuracy:.2%} ({result.correct} of {result.count} test images)"
        print(f"{blueprint.model} on {options.data}: {share}")


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
    facts = _facts()
    if options.json:
        print(json.dumps(facts, indent=2))
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
    try:
        return parser.parse_args(arguments, **kwargs)
    except (argparse.ArgumentError, UnicodeDecodeError) as error:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        unknown = next((word for word in arguments if word.startswith("--") and word.split("=")[0] not in flags), "")
        raise OptionError(f"{error}{_near(unknown, flags)}; see {parser.prog} --help") from error


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _near(word: str, known: Any) -> str:
    near = get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _need_train_extra(command: str) -> None:
    missing = [name for name in TRAIN_EXTRA if find_spec(name) is None]
    if missing:
        raise TrainingError(f"`nearsight {command}` needs {', '.join(missing)}: pip install 'nearsight[train]'")
