# SPDX-License-Identifier: Apache-2.0
"""The names of PyTorch that are not public: why each is needed, and what happens in a PyTorch that does not have it.

No other file uses any. ``tests/test_private.py`` takes each of them away and looks at what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as every_module

from .errors import BackendError

_UNKNOWN = True  # in place of hooks that cannot be asked for

# ----------------------------------------------------------------------------------------------------------- who watches


def transforms_are_active() -> bool:
    """Whether torch.func transforms what is called: it sees through PyTorch's own operators only.

    Not public, as nothing else tells. Without it always True: then those operators serve, which is slower.
    """
    return _transforms_are_active()


def within_forward_mode() -> bool:
    """Whether what is called is part of a forward-mode derivative of torch.func's.

    Not public: a tensor tells of the innermost derivative alone. Without it False: PyTorch says itself what it cannot do.
    """
    return any(getattr(interpreter.key(), "name", "") == "Jvp" for interpreter in _interpreters() or ())


_interpreters: Callable[[], Any] = getattr(getattr(torch._C, "_functorch", None), "get_interpreter_stack", lambda: None)
_transforms_are_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether more happens when a module is called than its forward, by hooks of its own or of all modules.

    Not public, as hooks can be registered and not listed. Without it always True: then nothing is taken for plain.
    """
    names = ("_forward_pre_hooks", "_forward_hooks")
    return any(getattr(module, name, _UNKNOWN) or getattr(every_module, f"_global{name}", _UNKNOWN) for name in names)


def is_called_plainly(module: nn.Module) -> bool:
    """Whether a call of a module is one of its forward and nothing else, in the backward too.

    Not public, as above. Without these names never: then every module is called.
    """
    names = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    hooked = any(getattr(module, name, _UNKNOWN) or getattr(every_module, f"_global{name}", _UNKNOWN) for name in names)
    return not hooked and not is_compiled(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module carries hooks, forward or backward, that would be lost with it; True where that is not known."""
    names = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    return any(getattr(module, name, _UNKNOWN) for name in names)


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of a module go to what torch.compile made of it; False where that cannot be told.

    Not public, as PyTorch keeps it for its own use. Without it such a module is taken for one that was not compiled.
    """
    forward = getattr(module, "forward", None)
    by_decorator = hasattr(forward, "_torchdynamo_orig_callable") and not getattr(
        forward, "_torchdynamo_disable", False
    )
    return by_decorator or getattr(module, "_compiled_call_impl", None) is not None


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile(module)`` was made of, which is not public; any other as it is."""
    return getattr(module, "_orig_mod", module) if type(module).__name__ == "OptimizedModule" else module


def noted_padding(convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[tuple[int, int], ...] | None:
    """What a convolution noted, when it was made, to add before and after each axis in other modes than "zeros".

    Not public, as PyTorch keeps it for its own use. None where it is not there: then its ``padding`` is believed.
    """
    cells = getattr(convolution, "_reversed_padding_repeated_twice", None)
    return None if cells is None else tuple(zip(cells[::2], cells[1::2], strict=True))[::-1]


# -------------------------------------------------------------------------------------------------------------- operators

# What a Python kernel of the autograd key calls its operator through, to reach the kernel below. The native backend is not
# there without it, and says so.
below_autograd: Callable[[], AbstractContextManager] | None = getattr(torch._C, "_AutoDispatchBelowAutograd", None)

# PyTorch's own attention on CPUs, forward and backward, whose FLOPs it does not count. Without it it does not run either.
FLASH_ON_CPU, FLASH_ON_CPU_BACKWARD = (
    getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{suffix}", None)
    for suffix in ("", "_backward")
)


def is_mutable(operator: Any) -> bool:
    """Whether an operator writes into what it is given; without its schema by PyTorch's way of naming those that do."""
    schema = getattr(operator, "_schema", None)
    return operator.__name__.split(".")[0].endswith("_") if schema is None else schema.is_mutable


# -------------------------------------------------------------------------------------------------- tracing and exporting


@contextmanager
def untraced() -> Iterator[None]:
    """Keep what is called within out of a ``torch.jit.trace``; without these names the trace holds it as well."""
    interface: Any = torch._C
    if not hasattr(interface, "_get_tracing_state") or not hasattr(interface, "_set_tracing_state"):
        yield
        return
    state = interface._get_tracing_state()
    interface._set_tracing_state(None)
    try:
        yield
    finally:
        interface._set_tracing_state(state)


def unwatched() -> AbstractContextManager:
    """Within, a ``torch.jit.trace`` does not look on: sizes are plain numbers, of which checks may ask what they like."""
    return untraced() if torch.jit.is_tracing() else nullcontext()


def known_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape as plain numbers, in a ``torch.jit.trace`` too, where sizes are tensors that it follows."""
    with unwatched():
        return tuple(tensor.shape)


def unflatten(tensor: torch.Tensor, dim: int, sizes: Sequence[Any]) -> torch.Tensor:
    """``tensor.unflatten(dim, sizes)``, in words that ``torch.onnx.export(dynamo=False)`` does not make numbers of.

    What its ``unflatten`` returns has the sizes of the example for ever, and so has all that asks for them afterwards.
    """
    if not torch.jit.is_tracing():
        return tensor.unflatten(dim, sizes)
    dim %= tensor.ndim
    return tensor.reshape(*tensor.shape[:dim], *sizes, *tensor.shape[dim + 1 :])


def constant_to_compilers(function: Callable[[], Any]) -> Callable[[], Any]:
    """``torch.compiler.assume_constant_result``, which would import all of the compiler at once: two seconds.

    A PyTorch that looks for another mark follows the call, and compiles what lies around it in two parts.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


@contextmanager
def open_sizes_of_one() -> Iterator[None]:
    """Let ``torch.export`` keep a size open also for 1, which it otherwise takes to be two or more for ever.

    ``torch.export`` has no argument for it. Without it a program takes batches of one size, or of two and more.
    """
    try:
        from torch.fx.experimental import _config as config
    except ImportError:
        config = None
    if not hasattr(config, "backed_size_oblivious"):
        yield
        return
    before = config.backed_size_oblivious  # pyright: ignore
    config.backed_size_oblivious = True  # pyright: ignore
    try:
        yield
    finally:
        config.backed_size_oblivious = before  # pyright: ignore


def compiled_ahead(program: Any, path: str, notes: dict[str, str]) -> Callable[..., Any]:
    """A program of ``torch.export`` as a package of AOTInductor, with notes: written to ``path``, and loaded.

    PyTorch's documented way, whose module is not public by its name. Without it no package is written.
    """
    try:
        from torch._inductor import aoti_compile_and_package
    except ImportError as error:
        raise BackendError(
            f"packages are written by torch._inductor.aoti_compile_and_package, which PyTorch {torch.__version__} does not "
            "have: take another PyTorch"
        ) from error
    aoti_compile_and_package(program, package_path=path, inductor_configs={"aot_inductor.metadata": notes})
    return loaded_ahead(path)


def loaded_ahead(path: str) -> Callable[..., Any]:
    """What :func:`compiled_ahead` wrote, loaded again; as public as that is."""
    from torch._inductor import aoti_load_package

    return aoti_load_package(path)


# ------------------------------------------------------------------------------------------------- modes and structures

try:
    from torch._subclasses import FakeTensorMode
except ImportError:
    FakeTensorMode = None

try:
    from torch.utils._python_dispatch import TorchDispatchMode  # pyright: ignore[reportAssignmentType]
except ImportError:

    class TorchDispatchMode:
        """Stands where PyTorch's should be, and says what cannot be done without it."""

        def __init__(self) -> None:
            raise BackendError(
                "operations are watched through torch.utils._python_dispatch.TorchDispatchMode, which PyTorch "
                f"{torch.__version__} does not have: take another PyTorch"
            )


try:
    from torch.utils._pytree import tree_leaves, tree_map  # pyright: ignore[reportAssignmentType]
except ImportError:

    def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
        """Lists, tuples and dictionaries of what ``function`` makes of their leaves."""
        if isinstance(tree, dict):
            return {key: tree_map(function, part) for key, part in tree.items()}
        if isinstance(tree, (list, tuple)):
            return type(tree)(tree_map(function, part) for part in tree)
        return function(tree)

    def tree_leaves(tree: Any) -> list[Any]:
        """What lists, tuples and dictionaries hold, however deep."""
        leaves: list[Any] = []
        tree_map(leaves.append, tree)
        return leaves


def without_computing() -> AbstractContextManager:
    """Tensors that have shapes and no numbers; without them what is only asked for its shapes is computed."""
    return nullcontext() if FakeTensorMode is None else FakeTensorMode(allow_non_fake_inputs=True)
