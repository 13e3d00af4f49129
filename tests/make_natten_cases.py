# SPDX-License-Identifier: Apache-2.0
"""Ask NATTEN 0.21.7 the cases of natten_cases.py and write its answers; with ``--time``, tell how long both take.

    python tests/make_natten_cases.py [--time]

NATTEN is installed in an environment of its own, in a temporary folder, beside the PyTorch that is here.
"""

from __future__ import annotations

import argparse
import json
import site
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

import natten_cases
import numpy as np
import torch

TIMED = {  # maps (images, size, heads, channels) and windows
    "28 x 28, kernel 7": ((1, 28, 28, 4, 32), {"kernel_size": 7}),
    "56 x 56, kernel 7": ((1, 56, 56, 2, 32), {"kernel_size": 7}),
    "56 x 56, kernel 7, dilation 8": ((1, 56, 56, 2, 32), {"kernel_size": 7, "dilation": 8}),
    "1024, kernel 33": ((1, 1024, 4, 32), {"kernel_size": 33}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--time", action="store_true", help="tell the times of both as well")
    parser.add_argument("--with-natten", action="store_true", help=argparse.SUPPRESS)  # in its environment
    arguments = parser.parse_args()
    if arguments.with_natten:
        import natten  # pyright: ignore[reportMissingImports]

        if arguments.time:
            print(json.dumps(seconds(natten)))
        else:
            write(natten)
        return
    with tempfile.TemporaryDirectory() as folder:
        python = environment(Path(folder))
        here = [str(python), __file__, "--with-natten"]
        subprocess.run(here, check=True)
        if arguments.time:
            theirs = json.loads(subprocess.run([*here, "--time"], check=True, capture_output=True, text=True).stdout)
            tell(theirs)


def environment(folder: Path) -> Path:
    """The Python of a new environment, in which NATTEN is installed and the packages of this one are seen."""
    venv.create(folder)
    python = folder / "bin" / "python"
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "here.pth").write_text("\n".join(site.getsitepackages()))
    # Without isolation: it would fetch a PyTorch to build a package that has nothing to compile here.
    install = ["install", "-q", "--no-deps", "--no-build-isolation", f"natten=={natten_cases.VERSION}"]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    return python


def write(natten) -> None:
    """All answers as numbers, each under the name of its case and its place."""
    assert natten.__version__ == natten_cases.VERSION, natten.__version__
    found = {
        f"{name}/{place}": answer.numpy()
        for name in natten_cases.NAMES
        for place, answer in enumerate(natten_cases.answers(natten, name))
    }
    np.savez_compressed(natten_cases.FILE, natten=natten.__version__, torch=torch.__version__, **found)
    print(f"{len(natten_cases.NAMES)} cases, {natten_cases.FILE.stat().st_size} bytes")


def seconds(natten) -> dict[str, float]:
    """The least of five forward passes, after one that is not counted."""
    torch.set_num_threads(1)
    times = {}
    for name, (shape, window) in TIMED.items():
        maps = torch.randn(3, *shape)
        call = getattr(natten, f"na{len(shape) - 3}d")
        rounds = []
        with torch.no_grad():
            for _ in range(6):
                start = time.perf_counter()
                call(*maps, **window)
                rounds.append(time.perf_counter() - start)
        times[name] = min(rounds[1:])
    return times


def tell(theirs: dict[str, float]) -> None:
    from nearsight.compat.natten import functional

    for name, ours in seconds(functional).items():
        print(
            f"{name}: natten {1e3 * theirs[name]:.1f} ms, nearsight {1e3 * ours:.2f} ms, {theirs[name] / ours:.0f} times"
        )


if __name__ == "__main__":
    main()
