# SPDX-License-Identifier: Apache-2.0
"""Whether an installed nearsight computes: `python tests/check_wheel.py native`, or `blocked` where there is no kernel.

Asks for the wheel and what it depends on, and nothing of the tests.
"""

import sys
from pathlib import Path

sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).parent]

import torch  # noqa: E402

import nearsight as ns  # noqa: E402

WINDOWS = (
    ns.Window(3),
    ns.Window((4, 3), stride=2, dilation=(1, 2), border="zeros"),
    ns.Window(5, shared_by=(2, 3), border=("shift", "wrap")),
    ns.Window(3, causal=(True, False)),
)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def found(backend: str, window: ns.Window, dtype: torch.dtype) -> list[torch.Tensor]:
    """Values and every gradient, of numbers that bfloat16 can hold."""
    torch.manual_seed(0)
    size, heads, dim = (9, 11), 2, 8
    shapes = [(2, heads, *window.output_size(size), dim), *[(2, heads, *size, dim)] * 2]
    entries = [axis.table_size for axis in window.axes(2)]
    shapes += [(heads, *entries), *[(heads, count, dim) for count in entries]]
    tensors = [torch.randn(shape).bfloat16().to(dtype).requires_grad_() for shape in shapes]
    query, key, value, bias, *relative = tensors
    out = ns.local_attention(query, key, value, window, bias=bias, relative=relative, backend=backend)
    return [out, *torch.autograd.grad(out.square().sum(), tensors)]


def main(backend: str) -> None:
    reason = ns.backends()[backend]
    if reason is not None:
        raise SystemExit(reason)
    if backend == "native":
        from nearsight.attention.native.library import loaded

        if not loaded().nearsight_has_openmp():
            raise SystemExit("the kernel was built for one thread")
    for dtype in (torch.float32, torch.bfloat16):
        for window in WINDOWS:
            for one, wanted in zip(
                found(backend, window, dtype), found("reference", window, torch.float64), strict=True
            ):
                scale = wanted.abs().max().item()
                torch.testing.assert_close(one.double(), wanted, rtol=0, atol=TOLERANCE[dtype] * max(1.0, scale))
    layer = ns.LocalSelfAttention2d(16, kernel_size=7, num_heads=2)
    layer(torch.randn(2, 16, 14, 14)).sum().backward()
    print(f"{backend} computes what the reference does: {Path(ns.__file__).parent}")


if __name__ == "__main__":
    main(sys.argv[1])
