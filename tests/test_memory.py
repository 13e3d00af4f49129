# SPDX-License-Identifier: Apache-2.0
"""What a training step needs beyond its inputs, as the operating system sees it: the kernel's own scratch memory counts."""

import subprocess
import sys

import pytest

from nearsight.attention import native

pytestmark = [
    pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable())),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

STEP = """
import torch
import nearsight as ns

def peak():
    # Not getrusage: its maximum outlives an exec and would be that of the process which started this one.
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

def step(*shape):
    maps = [torch.randn(shape).unflatten(1, (4, -1)).movedim(2, -1).requires_grad_() for _ in range(3)]
    before = peak()
    out = ns.local_attention(*maps, ns.Window(7), backend="{backend}")
    torch.autograd.grad(out, maps, torch.ones_like(out[..., :1]).expand_as(out))
    return peak() - before, 8 * 4 * out.numel()  # query, key, value, out and the gradient of each

step(1, 16, 16, 16)  # what is made once: threads, code pages
extra, tensors = step({shape})
assert extra > tensors / 16, "the measure is blind"
print(extra / tensors)
"""


def share(backend: str, shape: str) -> float:
    """Extra memory of forward and backward over the bytes of query, key, value, out and their gradients."""
    program = STEP.format(backend=backend, shape=shape)
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-2000:]
    return float(finished.stdout)


def test_a_training_step_of_the_kernel_needs_little_memory():
    assert share("native", "4, 128, 64, 64") <= 1.3


@pytest.mark.sweep
def test_the_measure_sees_what_gathering_windows_costs():
    assert share("reference", "1, 64, 48, 48") > 10


@pytest.mark.sweep
def test_a_large_map_trains():
    assert share("native", "1, 64, 1024, 1024") <= 1.3
