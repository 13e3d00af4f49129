# SPDX-License-Identifier: Apache-2.0
"""What torch.onnx leaves around attention in a graph, made simple: runtimes fuse convolutions, and know nothing of our node.

All that changes is how the same function is written, for the node and for plain operators alike:

- *Reshapes* that lead back to the shape that was there before are left out.
- *Three convolutions* make query, key and value in place of one, whose output would be copied in three.
- *A batch norm after attention* goes into the convolution that makes the values. Attention takes means of these, and to
  scale a mean and add to it is to do so to what it is a mean of: sum_c w_c (a v_c + b) = a (sum_c w_c v_c) + b.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from ..attention.node import DOMAIN, OPERATOR

VALUE, BIAS = 2, 3  # places of the node's inputs


def tidy(model: Any) -> None:
    """Do all that to an ONNX model, whose weights are initializers."""
    for kind, change in (("Reshape", _leave_out), ("Split", _part_convolution), (OPERATOR, _fold_norm)):
        graph = _Graph(model.graph)
        for node in graph.nodes:
            if node.op_type == kind and node.domain in ("", DOMAIN):
                change(graph, node)
        graph.write()


class _Graph:
    """Nodes, with who makes and who takes each name."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.nodes = list(graph.node)
        self.constants = {one.name: one for one in graph.initializer}
        self.outputs = {one.name for one in graph.output}
        self.shapes = {one.name: _shape(one) for one in (*graph.value_info, *graph.input, *graph.output)}
        self.maker = {name: node for node in self.nodes for name in node.output}
        self.takers: dict[str, list[Any]] = defaultdict(list)
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.takers[name].append(node)
        self.instead: dict[int, list[Any]] = {}  # of a node, by its id: what is written in its place

    def array(self, name: str) -> np.ndarray:
        from onnx import numpy_helper

        return numpy_helper.to_array(self.constants[name])

    def constant(self, name: str, array: np.ndarray) -> str:
        from onnx import numpy_helper

        self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def only_taker(self, name: str) -> Any:
        """The one node that takes it, if it is one."""
        takers = self.takers[name]
        return takers[0] if len(takers) == 1 and name not in self.outputs else None

    def pass_on(self, name: str, other: str) -> None:
        """Let all who take a name take another."""
        for node in self.takers.pop(name, ()):
            node.input[:] = [other if one == name else one for one in node.input]
            self.takers[other].append(node)

    def put(self, node: Any, others: list[Any]) -> None:
        self.instead[id(node)] = others

    def write(self) -> None:
        """The nodes that lead to an output, in their order, and the constants that they take."""
        wanted, kept = set(self.outputs), []
        for node in reversed([one for each in self.nodes for one in self.instead.get(id(each), [each])]):
            if wanted.intersection(node.output):
                wanted.update(node.input)
                kept.append(type(node).FromString(node.SerializeToString()))  # the list that it lies in is emptied
        del self.graph.node[:]
        self.graph.node.extend(reversed(kept))
        for place in reversed(range(len(self.graph.initializer))):
            if self.graph.initializer[place].name not in wanted:
                del self.graph.initializer[place]


def _shape(value: Any) -> tuple[int | str, ...] | None:
    """Numbers, and names of what is open; None where a size is not known."""
    sizes = tuple(size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim)
    return sizes if all(sizes) else None


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    return {one.name: helper.get_attribute_value(one) for one in node.attribute}


def _leave_out(graph: _Graph, node: Any) -> None:
    """A reshape, if it and those before it make of something what it was."""
    shape, source = graph.shapes.get(node.output[0]), node
    while shape is not None and source is not None and source.op_type == "Reshape":
        name = source.input[0]
        if graph.shapes.get(name) == shape and node.output[0] not in graph.outputs:
            graph.pass_on(node.output[0], name)
            return
        source = graph.maker.get(name)


def _part_convolution(graph: _Graph, split: Any) -> None:
    """A convolution whose output is cut in three for attention becomes three."""
    from onnx import helper

    made = graph.maker.get(split.input[0])
    if made is None or not _is_plain(graph, made) or graph.only_taker(split.input[0]) is not split:
        return
    takers = [taker.op_type for name in split.output for taker in graph.takers[name]]
    sizes = graph.constants.get(split.input[1]) if len(split.input) > 1 else None
    if sizes is None or _attributes(split).get("axis") != 1 or set(takers) != {OPERATOR}:
        return
    cuts = np.cumsum(graph.array(sizes.name))[:-1]
    arrays = zip(*(np.split(graph.array(name), cuts) for name in made.input[1:]), strict=True)
    parts = []
    for number, (name, some) in enumerate(zip(split.output, arrays, strict=True)):
        given = [graph.constant(f"{of}/{number}", one) for of, one in zip(made.input[1:], some, strict=True)]
        parts.append(helper.make_node("Conv", [made.input[0], *given], [name], name=f"{made.name}/{number}"))
        parts[-1].attribute.extend(made.attribute)
    graph.put(split, parts)


def _is_plain(graph: _Graph, node: Any) -> bool:
    """A convolution whose output channels are each made by weights of their own, which are constants."""
    if node.op_type != "Conv" or _attributes(node).get("group", 1) != 1:
        return False
    return all(name in graph.constants for name in node.input[1:])


def _fold_norm(graph: _Graph, node: Any) -> None:
    """The batch norm after attention, or after the average pool that follows it, becomes part of what makes the values."""
    from onnx import helper

    pool = graph.only_taker(node.output[0])
    norm = graph.only_taker(pool.output[0]) if pool is not None and _takes_means(pool) else pool
    values = graph.maker.get(node.input[VALUE])
    if norm is None or norm.op_type != "BatchNormalization" or not _takes_means_of_values(graph, node):
        return
    if values is None or not _is_plain(graph, values) or graph.only_taker(node.input[VALUE]) is not node:
        return
    if any(name not in graph.constants for name in norm.input[1:]) or _attributes(norm).get("training_mode", 0):
        return
    if graph.outputs.intersection(norm.output):
        return
    gain, shift, mean, variance = (graph.array(name).astype(np.float64) for name in norm.input[1:])
    gain /= np.sqrt(variance + _attributes(norm).get("epsilon", 1e-5))
    weight, *bias = (graph.array(name) for name in values.input[1:])
    if len(gain) != len(weight):  # queries that share values scale them in ways of their own
        return
    bias = gain * (bias[0] if bias else 0) + shift - gain * mean
    scaled = weight * gain.reshape(-1, *[1] * (weight.ndim - 1))
    named = [graph.constant(f"{values.input[1]}/normed", scaled.astype(weight.dtype))]
    if bias.any():
        named.append(graph.constant(f"{values.input[1]}/shift", bias.astype(weight.dtype)))
    folded = helper.make_node("Conv", [values.input[0], *named], values.output, name=values.name)
    folded.attribute.extend(values.attribute)
    graph.put(values, [folded])
    graph.pass_on(norm.output[0], norm.input[0])


def _takes_means(pool: Any) -> bool:
    return pool.op_type == "AveragePool" and (
        not _attributes(pool).get("count_include_pad", 0) or not any(_attributes(pool).get("pads", ()))
    )


def _takes_means_of_values(graph: _Graph, node: Any) -> bool:
    """Whether the weights of every query sum to one: who sees cells of zeros, or nothing, has less."""
    given = _attributes(node)
    if "zeros" in given["border"].decode() or any(
        shared > 1 and pace > 1 for shared, pace in zip(given["shared_by"], given["dilation"], strict=True)
    ):
        return False
    bias = node.input[BIAS] if len(node.input) > BIAS else ""
    return not bias or (bias in graph.constants and bool(np.isfinite(graph.array(bias)).all()))
