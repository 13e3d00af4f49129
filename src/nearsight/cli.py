# SPDX-License-Identifier: Apache-2.0
"""The command line. Each command imports what it needs when it runs; each mistake is one line and exit code 2.

What a command is asked to do is read before PyTorch is loaded, which takes two seconds: help and mistakes come at once.
"""

from __future__ import annotations

import os

# Large tensors then come on huge pages. PyTorch reads it when it makes its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import ctypes
import io
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module

from .errors import NearsightError, OptionError
from .pages.names import readable

# A file of commands/ for each.
COMMANDS = {
    "train": "train a network on images and write a report",
    "eval": "measure a trained network on test images",
    "predict": "what a trained network says of pictures",
    "compare": "train several networks with several seeds: a table, plots and a page",
    "convert": "put attention in the place of a network's convolutions",
    "accelerate": "other people's attention on nearsight's operation: what it gains a network",
    "export": "a trained network as an ONNX file, or a program of torch.export",
    "deploy": "the library that runs attention in onnxruntime, OpenVINO or C++",
    "explore": "a page that shows where a network looks, from every pixel of an image",
    "profile": "what each layer of a network costs, and how attention grows with the image",
    "models": "list nearsight's networks",
    "bench": "measure speed against the convolution and other ways to attend",
    "info": "versions, attention backends and what this machine offers",
}
OVERVIEW = """\
usage: nearsight COMMAND [options]
       nearsight --version

Self-attention in the place of convolution: train, look, compare.

commands:
{commands}

examples:
  nearsight train                               a network of attention learns digits, in about a minute
  nearsight train --model sasa_nano --data fashion-mnist --output runs/fashion
  nearsight eval runs/fashion --data fashion-mnist

`nearsight COMMAND --help` says more about each."""


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
        print(OVERVIEW.format(commands="\n".join(f"  {name:11}{does}" for name, does in COMMANDS.items())))
    elif arguments[0] == "--version":
        from importlib.metadata import version

        print(f"nearsight {version('nearsight')}")
    elif arguments[0] in COMMANDS:
        from .commands.arguments import without_imports
        from .own_code import import_own

        words, modules = without_imports(arguments[1:])
        if not {"-h", "--help"} & set(words):
            for module in modules:
                import_own(module)
        import_module(f".commands.{arguments[0]}", __package__).run(words)
    else:
        from .commands.arguments import near

        raise OptionError(
            f"there is no command {arguments[0]!r}{near(arguments[0], COMMANDS)}; commands are {', '.join(COMMANDS)}"
        )
