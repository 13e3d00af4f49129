# SPDX-License-Identifier: Apache-2.0
"""``nearsight deploy``: the library that runs attention in another runtime, and how it is loaded there."""

from __future__ import annotations

from .arguments import parse, parser_of

EXAMPLES = """\
examples:
  nearsight deploy onnxruntime    where the library is that nearsight was installed with
  nearsight deploy openvino       compiles one for the installed OpenVINO, once, and says where it is
  nearsight deploy aoti           the same for the installed PyTorch, to run packages of AOTInductor without Python

docs/howto/deploy.md says how each is used.
"""


MOVED = "moved elsewhere, it looks for libnearsight_onnxruntime beside itself"


def run(arguments: list[str]) -> None:
    from .. import deploy

    libraries = {
        "onnxruntime": deploy.onnxruntime_library,
        "openvino": deploy.openvino_library,
        "aoti": deploy.aoti_library,
    }
    loading = {
        "onnxruntime": "SessionOptions.register_custom_ops_library(path) loads it",
        "openvino": f"Core.add_extension(path) loads it; {MOVED}",
        "aoti": f"dlopen(path), or torch.ops.load_library(path) in Python, loads it before the package; {MOVED}",
    }
    parser = parser_of("deploy", "The library that runs attention in another runtime: where it is.", EXAMPLES)
    parser.add_argument("runtime", metavar="RUNTIME", choices=tuple(libraries), help=", ".join(libraries))
    runtime = parse(parser, arguments).runtime
    print(libraries[runtime]())
    print(loading[runtime])
