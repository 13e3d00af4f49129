# SPDX-License-Identifier: Apache-2.0
"""Names of ``natten.functional`` that NATTEN has given up: those of 0.14 to 0.17 beside the ones that 0.17 ended with.

Their arguments stand in other orders than those of the calls that they are now, and some in others from one version to the
next. They are told apart by how many there are, or by what they are, where that leaves no doubt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from torch import Tensor

from ...errors import OptionError
from .arguments import names_its_arguments, only_reading

Sizes = int | Sequence[int]
WINDOW = ("kernel_size", "dilation", "is_causal")
WINDOW_OF_DEPTH = ("kernel_size_d", "kernel_size", "dilation_d", "dilation")


# ------------------------------------------------------------------------------------------------------- one to two axes


def _qkrpb(rank: int, call: Callable) -> Callable:
    def shown(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: Sizes, dilation: Sizes) -> Tensor: ...

    def qkrpb(query, key, rpb, *window, kernel_size=None, dilation=None):
        held = tuple((entries + 1) // 2 for entries in rpb.shape[1:]) if isinstance(rpb, Tensor) else None
        kernel_size, dilation = _window(f"natten{rank}dqkrpb", "0.14.4", window, kernel_size, dilation, held)
        return call(query, key, kernel_size, dilation, rpb=rpb)

    qkrpb.__doc__ = f"""The logits with a bias, :func:`na{rank}d_qk`, by their name up to 0.17.4.

    Up to 0.14.4 the dilation was the only argument after ``rpb``, whose size gives that of the kernel.

    Raises:
        OptionError: a fourth argument alone that could be either.
    """
    return names_its_arguments(qkrpb, f"natten{rank}dqkrpb", like=shown)


def _av(rank: int, call: Callable) -> Callable:
    def shown(attn: Tensor, value: Tensor, kernel_size: Sizes, dilation: Sizes) -> Tensor: ...

    def av(attn, value, *window, kernel_size=None, dilation=None):
        held = _root(attn.shape[-1], rank) if isinstance(attn, Tensor) else None
        kernel_size, dilation = _window(f"natten{rank}dav", "0.14.5", window, kernel_size, dilation, held)
        return call(attn, value, kernel_size, dilation)

    av.__doc__ = f"""The weighted sums of the values, :func:`na{rank}d_av`, by their name up to 0.17.4.

    Up to 0.14.5 the dilation was the only argument after ``value``; the number of weights gives the size of the kernel.

    Raises:
        OptionError: a third argument alone that could be either.
    """
    return names_its_arguments(av, f"natten{rank}dav", like=shown)


def _window(
    name: str, until: str, unnamed: Sequence[Any], kernel_size: Any, dilation: Any, held: tuple | None
) -> tuple[Any, Any]:
    """The kernel's size and the dilation; ``held`` is the size of which the other arguments are, None if they do not say."""
    if len(unnamed) > 2:
        raise OptionError(f"{name} takes kernel_size and dilation after its tensors; received {tuple(unnamed)}")
    if len(unnamed) == 1 and kernel_size is None and dilation is None:
        (one,) = unnamed
        after = {"kernel_size": one, "dilation": 1}
        before = {"kernel_size": held, "dilation": one}
        if held is None:
            readings = {"since": after}
        elif held in (one, (one,) * len(held)):
            readings = {f"up to NATTEN {until}": before | {"kernel_size": one}, "later": after}
        else:
            readings = {f"up to NATTEN {until}": before}
        reading = only_reading(f"{name}(..., {one})", readings)
        return reading["kernel_size"], reading["dilation"]
    given = dict(zip(("kernel_size", "dilation"), unnamed, strict=False))
    kernel_size, dilation = given.get("kernel_size", kernel_size), given.get("dilation", dilation)
    return held if kernel_size is None else kernel_size, dilation


def _root(cells: int, rank: int) -> tuple[int, ...] | None:
    """The size of a kernel of so many cells, as many along every axis; None if there is none."""
    size = round(cells ** (1 / rank))
    return (size,) * rank if size**rank == cells else None


def _qk(rank: int, call: Callable) -> Callable:
    def qk(query: Tensor, key: Tensor, kernel_size: Sizes, dilation: Sizes = 1) -> Tensor:
        return call(query, key, kernel_size, dilation)

    qk.__doc__ = f"""The logits, :func:`na{rank}d_qk`, by their name from 0.14.6 to 0.17.4."""
    return names_its_arguments(qk, f"natten{rank}dqk")


def _qk_with_bias(rank: int, call: Callable, name: str) -> Callable:
    def qk(
        query: Tensor,
        key: Tensor,
        bias: Tensor | None,
        kernel_size: Sizes,
        dilation: Sizes = 1,
        additional_keys: Tensor | None = None,
        is_causal: Any = False,
    ) -> Tensor:
        return call(query, key, kernel_size, dilation, additional_keys, is_causal, rpb=bias)

    qk.__doc__ = f"""The logits with a bias, :func:`na{rank}d_qk`, by a name and order of arguments of 0.15 to 0.17."""
    return names_its_arguments(qk, name)


# ------------------------------------------------------------------------ three axes, the first with arguments of its own


def also_as_in_0_15(call: Callable, additional: str) -> Callable:
    """``na3d_qk`` or ``na3d_av`` in its order of 0.15 too, where the third argument after the tensors is a number."""

    @wraps(call)
    def of_three_axes(*args: Any, **options: Any) -> Tensor:
        if len(args) <= 4 or not isinstance(args[4], int):
            return call(*args, **options)
        names = (*WINDOW_OF_DEPTH, additional)
        if len(args) > 2 + len(names):
            raise OptionError(
                f"in the order of 0.15 there are {', '.join(names)} after the tensors; received {args[2:]}"
            )
        return call(*args[:2], **dict(zip(names, args[2:], strict=False)), **options)

    return of_three_axes


def _qkrpb_of_depth(call: Callable, name: str) -> Callable:
    def qk(query, key, rpb, kernel_size_d, kernel_size, dilation_d=1, dilation=1, additional_keys=None):
        """:func:`na3d_qk`, by a name of 0.15 to 0.17.4, where depth has arguments of its own."""
        of_depth = {"kernel_size_d": kernel_size_d, "dilation_d": dilation_d}
        return call(query, key, kernel_size, dilation, additional_keys, rpb=rpb, **of_depth)

    return names_its_arguments(qk, name)


def _qk_of_depth(call: Callable) -> Callable:
    def qk(query, key, kernel_size_d, kernel_size, dilation_d=1, dilation=1):
        """:func:`na3d_qk`, by its name of 0.17, where depth has arguments of its own."""
        return call(query, key, kernel_size, dilation, kernel_size_d=kernel_size_d, dilation_d=dilation_d)

    return names_its_arguments(qk, "natten3dqk")


def _av_of_depth(call: Callable) -> Callable:
    def av(attn, value, kernel_size_d, kernel_size, dilation_d=1, dilation=1):
        """:func:`na3d_av`, by its name of 0.17, where depth has arguments of its own."""
        return call(attn, value, kernel_size, dilation, kernel_size_d=kernel_size_d, dilation_d=dilation_d)

    return names_its_arguments(av, "natten3dav")


# --------------------------------------------------------------------------------------------------- autograd functions


def _function(name: str, call: Callable, doc: str) -> type:
    """What clients import: a class with ``apply``, whose gradients are those of the call in it."""
    return type(name, (), {"__doc__": doc, "apply": staticmethod(call)})


def _qk_function(rank: int, call: Callable) -> type:
    def apply(query: Tensor, key: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        additional, window = _additional(rest)
        return call(query, key, additional_keys=additional, rpb=bias, **_geometry(rank, window))

    doc = f"``apply`` is :func:`na{rank}d_qk`, with the arguments of 0.15 or of 0.17."
    return _function(f"NeighborhoodAttention{rank}DQKAutogradFunction", apply, doc)


def _av_function(rank: int, call: Callable) -> type:
    def apply(attn: Tensor, value: Tensor, *rest: Any) -> Tensor:
        additional, window = _additional(rest)
        return call(attn, value, additional_values=additional, **_geometry(rank, window))

    doc = f"``apply`` is :func:`na{rank}d_av`, with the arguments of 0.15 or of 0.17."
    return _function(f"NeighborhoodAttention{rank}DAVAutogradFunction", apply, doc)


def _additional(rest: Sequence[Any]) -> tuple[Tensor | None, Sequence[Any]]:
    """Additional keys or values, which came with 0.15.1 and stand before the window, and the window."""
    if rest and (rest[0] is None or isinstance(rest[0], Tensor)):
        return rest[0], rest[1:]
    return None, rest


def _geometry(rank: int, window: Sequence[Any]) -> dict[str, Any]:
    """The window by its names in 0.15 or in 0.17: there it ends with ``is_causal``, and depth has a share of each."""
    names = WINDOW_OF_DEPTH if rank == 3 and len(window) == 4 else WINDOW
    if not 2 <= len(window) <= len(names):
        raise OptionError(f"apply takes {', '.join(names)} last; received {tuple(window)}")
    return dict(zip(names, window, strict=False))


def _fused_function(rank: int, call: Callable) -> type:
    def apply(query, key, value, bias, kernel_size, dilation, is_causal, scale, *tiling: Any) -> tuple[Tensor, Tensor]:
        window = dict(zip(WINDOW, (kernel_size, dilation, is_causal), strict=True))
        return call(query, key, value, **window, scale=scale, rpb=bias, return_lse=True)

    doc = f"``apply`` is :func:`na{rank}d` and its log-sum-exp, with the arguments of 0.17.4 and 0.17.5."
    return _function(f"FusedNeighborhoodAttention{rank}D", apply, doc)


def _flex(rank: int, call: Callable) -> Callable:
    def flex(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Sizes,
        dilation: Sizes = 1,
        is_causal: Any = False,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        xformers_kwargs: dict | None = None,
    ) -> Tensor:
        more = {"additional_keys": additional_keys, "additional_values": additional_values}
        return call(query, key, value, kernel_size, dilation=dilation, is_causal=is_causal, **more)

    flex.__doc__ = f""":func:`na{rank}d`, by its name and order of arguments in ``natten.flex`` of 0.17.5."""
    return names_its_arguments(flex, f"flex_na{rank}d")


# ---------------------------------------------------------------------------------------------------------- all of them


def older_names(rank: int, fused: Callable, qk: Callable, av: Callable) -> dict[str, Any]:
    """All of those over so many axes, made of the calls that they are now."""
    with_bias = f"na{rank}d_qk_with_bias"
    if rank < 3:
        calls = [_qkrpb(rank, qk), _qk(rank, qk), _av(rank, av), _qk_with_bias(rank, qk, with_bias)]
    else:
        calls = [
            _qkrpb_of_depth(qk, "natten3dqkrpb"),
            _qk_of_depth(qk),
            _av_of_depth(av),
            _qkrpb_of_depth(qk, with_bias),
        ]
    functions = [_qk_function(rank, qk), _av_function(rank, av), _fused_function(rank, fused)]
    for part, call in (("QKRPB", calls[0]), ("AV", calls[2])):
        doc = f"``apply`` is :func:`{call.__name__}`, as in NATTEN up to 0.14.6."
        functions.append(_function(f"NATTEN{rank}D{part}Function", call, doc))
    calls.append(_flex(rank, fused))
    # Nested tensors are refused by all calls; others are taken by the names that were for them.
    nested = {f"na{rank}d_qk_nested": _qk_with_bias(rank, qk, f"na{rank}d_qk_nested"), f"na{rank}d_av_nested": av}
    return {one.__name__: one for one in (*calls, *functions)} | nested
