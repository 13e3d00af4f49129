# SPDX-License-Identifier: Apache-2.0
"""Derivatives of derivatives, for backends whose kernels have the first alone: those of ``blocked``, where they are wanted.

A first derivative is the kernel's own, whoever may differentiate it again: only that second step is computed anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import blocked
from .problem import Call, Problem

Found = tuple[Tensor, Tensor | None]


def of_any_order(attend: Callable[[Call], Found], call: Call, problem: Problem) -> Found:
    """``attend(call)``, of which PyTorch takes the first derivative, with derivatives of every order."""
    if not problem.needs_grad or problem.compiling:  # a compiled program has no second derivative in any case
        return attend(call)
    passing = _Passing(call.scale, problem)
    out, lse = attend(Call.of(_Enter.apply(passing, *call.tensors), call.scale, problem))
    out, *lses = _Leave.apply(passing, out, *([] if lse is None else [lse]))
    return out, lses[0] if lses else None


class _Passing:
    """What the two ends of a call tell one another in a backward: the gradients of its results."""

    def __init__(self, scale: float, problem: Problem) -> None:
        self.scale, self.problem = scale, problem
        self.grads: Sequence[Tensor | None] = ()


class _Enter(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(passing: _Passing, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.passing, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *firsts: Tensor | None) -> Any:
        # Gradients are on in a backward only for someone who may differentiate again.
        if not torch.is_grad_enabled():
            return None, *firsts
        wanted = tuple(first is not None for first in firsts)
        grads, ctx.passing.grads = ctx.passing.grads, ()
        there = [first.detach() for first in firsts if first is not None]  # what PyTorch knows of them ends here
        found = iter(_Again.apply(ctx.passing, wanted, len(grads), *grads, *ctx.saved_tensors, *there))
        return None, *(next(found) if want else None for want in wanted)


class _Leave(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(passing: _Passing, *results: Tensor) -> tuple[Tensor, ...]:
        return tuple(result.view_as(result) for result in results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.passing = inputs[0]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        ctx.passing.grads = grads if torch.is_grad_enabled() else ()
        return None, *grads


class _Again(torch.autograd.Function):
    """The first derivatives as they are, with the second ones."""

    generate_vmap_rule = True

    @staticmethod
    def forward(passing: _Passing, wanted: tuple[bool, ...], results: int, *tensors: Tensor | None) -> tuple:
        firsts = tensors[len(tensors) - sum(wanted) :]
        return tuple(first.view_as(first) for first in firsts if first is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.passing, ctx.wanted, ctx.results, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[: len(tensors) - sum(ctx.wanted)])

    @staticmethod
    def backward(ctx: Any, *seconds: Tensor | None) -> Any:
        grads, tensors = ctx.saved_tensors[: ctx.results], ctx.saved_tensors[ctx.results :]
        scale, problem = ctx.passing.scale, ctx.passing.problem
        found = second_derivatives(tensors, scale, problem, grads, ctx.wanted, seconds)
        return None, None, None, *found, *[None] * sum(ctx.wanted)


def second_derivatives(
    tensors: Sequence[Tensor],
    scale: float,
    problem: Problem,
    grads: Sequence[Tensor | None],
    wanted: Sequence[bool],
    seconds: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The gradients by ``grads`` and by ``tensors`` of a call's first derivatives, by ``blocked``, which have theirs again.

    Args:
        tensors: query, key, value, bias and relative, as :attr:`Call.tensors` has them.
        grads: those of the result and, where there is one, of the log-sum-exp: the first derivatives are linear in them.
        wanted: which of ``tensors`` were differentiated by.
        seconds: the gradients of those derivatives, of the wanted ones alone.
    """
    given = [grad for grad in grads if grad is not None]
    alone = replace(problem, num_heads=problem.num_heads * problem.groups, groups=1)

    def attend(*tensors: Tensor) -> tuple[Tensor, ...]:
        call = Call.of(tensors, scale, problem)
        keys = {name: getattr(call, name).repeat_interleave(problem.groups, 1) for name in ("key", "value")}
        found = blocked.attend(call._replace(**keys), alone)
        return tuple(one for one, grad in zip(found, grads, strict=False) if one is not None and grad is not None)

    def firsts(*numbers: Tensor) -> tuple[Tensor, ...]:
        inputs = list(numbers[len(given) :])

        def results(*sources: Tensor) -> tuple[Tensor, ...]:
            some = iter(sources)
            return attend(*(next(some) if want else one for one, want in zip(inputs, wanted, strict=True)))

        _, pull, *_ = torch.func.vjp(results, *(one for one, want in zip(inputs, wanted, strict=True) if want))
        return pull(numbers[: len(given)])

    first, pull, *_ = torch.func.vjp(firsts, *given, *tensors)
    filled = (torch.zeros_like(one) if second is None else second for one, second in zip(first, seconds, strict=True))
    places = iter(pull(tuple(filled)))
    return [*(None if grad is None else next(places) for grad in grads), *places]
