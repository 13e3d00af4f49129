# SPDX-License-Identifier: Apache-2.0
"""``nearsight::LocalAttention`` in ONNX's own operators, for runtimes that do not have nearsight's library.

The map is cut into blocks as in blocked.py, whose geometry this is. The operators are chosen by what runtimes are fast at:

- *Terms.* Each query has a number for every row, and one for every column, of its block's span: q.r, or ``NOTHING`` where
  its window does not reach. One matrix product with a constant adds them up at the span's cells. So there is no broadcasting
  along short axes, and no choosing between two tensors.
- *Least logits.* What is hidden is lifted to ``FLOOR`` below the largest logit of its query, where its weight is 1e-26 and
  nothing to a sum in float32. ``exp`` of what underflows would take several times as long as that of all else.

Numbers that are not finite are not kept apart: a key or value that is NaN reaches all queries of the blocks around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, reduce
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
import torch

from ..window import Axis
from .blocked import all_blocks_alike, block_and_span, cut_any_size
from .node import DOMAIN, OPERATOR

NOTHING = np.float32(-1e30)  # finite, as it is multiplied by zeros; far below every logit
FLOOR = np.float32(60)
GATHERED = 10  # a cell of a block's span costs as much as so many pairs of a query and a cell: measured on one machine
LARGEST_BLOCK = 32


def write_out(model: Any) -> None:
    """Put plain operators in the place of every node of an ONNX model, whose other nodes stay as they are."""
    values = {value.name: value.type.tensor_type for value in (*model.graph.value_info, *model.graph.input)}
    graph = Graph()
    places: dict[Any, Places] = {}
    for node in model.graph.node:
        if (node.domain, node.op_type) == (DOMAIN, OPERATOR):
            _write_attention(graph, node, values, places)
        else:
            graph.nodes.append(type(node).FromString(node.SerializeToString()))  # the list that it lies in is emptied
    del model.graph.node[:]
    model.graph.node.extend(graph.nodes)
    model.graph.initializer.extend(graph.initializers)
    others = [type(opset).FromString(opset.SerializeToString()) for opset in model.opset_import]
    del model.opset_import[:]
    model.opset_import.extend(opset for opset in others if opset.domain != DOMAIN)


def block_size(axes: Sequence[Axis]) -> int:
    """Queries of a block along each axis: large blocks hide more pairs, small ones gather more cells."""

    def cost(size: int) -> float:
        blocks, spans = zip(*(block_and_span(axis, size) for axis in axes), strict=True)
        return prod(spans) * (1 + GATHERED / prod(blocks))

    return min(range(1, LARGEST_BLOCK + 1), key=cost)


# --------------------------------------------------------------------------------------------------------- the operation


def _write_attention(graph: Graph, node: Any, values: dict[str, Any], places: dict[Any, Places]) -> None:
    from onnx import TensorProto, helper

    given = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    query, key, value, bias, *relative = [*node.input, ""][: max(4, len(node.input))]
    relative = [name for name in relative if name]
    elements, heads, heads_of_keys = values[query].elem_type, given["num_heads"], given["num_kv_heads"]
    if elements != TensorProto.FLOAT:
        maps = [graph.op("Cast", name, to=TensorProto.FLOAT) for name in (query, key, value)]
    else:
        maps = [query, key, value]
    rows = [graph.op("Mul", maps[0], np.float32(given["scale"])), *maps[1:]]
    rows = [_rows(graph, name, count) for name, count in zip(rows, (heads, *[heads_of_keys] * 2), strict=True)]
    if heads_of_keys < heads:
        each = np.arange(heads) // (heads // heads_of_keys)
        rows[1:] = [graph.op("Gather", name, each, axis=1) for name in rows[1:]]
    out = _attend(graph, rows, bias, relative, _places(graph, key, given, values, places))
    out = graph.op("Transpose", out, perm=[0, 1, 3, 2])
    channels = graph.op("Mul", graph.op("Shape", value, start=1, end=2), [heads])
    channels = graph.op("Div", channels, [heads_of_keys])
    shape = graph.op("Concat", [0], channels, graph.op("Shape", query, start=2), axis=0)
    if elements != TensorProto.FLOAT:
        out = graph.op("Cast", out, to=elements)
    graph.op("Reshape", out, shape, output=node.output[0])


def _places(graph: Graph, key: str, given: dict[str, Any], values: dict[str, Any], places: dict[Any, Places]) -> Places:
    """The geometry of a node; nodes with the same window on maps of the same size share it."""
    columns = [given[name] for name in ("kernel_size", "stride", "dilation")]
    columns += [given["border"].decode().split(), map(bool, given["causal"]), given["shared_by"]]
    axes = tuple(Axis(*rule) for rule in zip(*columns, strict=True))
    sizes = [size.dim_param or size.dim_value for size in values[key].shape.dim[2:]] if key in values else []
    known = (axes, *(sizes if sizes and all(sizes) else [key]))
    if known not in places:
        shape = graph.op("Shape", key)
        cells = [Whole(graph, graph.op("Gather", shape, np.int64(2 + axis)), ()) for axis in range(len(axes))]
        places[known] = Places(graph, axes, cells)
    return places[known]


def _rows(graph: Graph, name: str, heads: int) -> str:
    """(B, N*D, *map) -> (B, N, cells, D)."""
    width = graph.op("Div", graph.op("Shape", name, start=1, end=2), [heads])
    shape = graph.op("Concat", [0, heads], width, [-1], axis=0)
    return graph.op("Transpose", graph.op("Reshape", name, shape), perm=[0, 1, 3, 2])


def _attend(graph: Graph, rows: Sequence[str], bias: str, relative: Sequence[str], places: Places) -> str:
    """(B, N, queries, E) of queries that are scaled, keys and values."""
    query, key, value = rows
    query = graph.op("Gather", query, places.queries, axis=2)  # B, N, places of the blocks, D
    if places.votes_as_zeros:  # one cell more, of zeros
        key, value = (graph.op("Pad", name, [0, 0, 0, 0, 0, 0, 1, 0]) for name in (key, value))
    key, value = (graph.op("Gather", name, places.cells, axis=2) for name in (key, value))  # B, N, G, C, D
    blocks = graph.op("Reshape", query, _shape(graph, [0, 0, -1, places.queries_of_block], query))
    logits = graph.op("MatMul", blocks, graph.op("Transpose", key, perm=[0, 1, 2, 4, 3]))  # B, N, G, P, C
    static = ""
    if bias or not relative:
        static = graph.op("MatMul", places.reach, places.spread)
    if bias:
        static = graph.op("Add", _bias(graph, bias, places), static)
    if relative:
        terms = _relative(graph, query, relative, places)
        terms = terms if bias else graph.op("Add", terms, places.reach)
        logits = graph.op("Add", logits, graph.op("MatMul", terms, places.spread))
    if static:
        logits = graph.op("Add", logits, static)
    least = graph.op("Sub", graph.op("ReduceMax", logits, [-1], keepdims=1), FLOOR)
    weights = graph.op("Softmax", graph.op("Max", logits, least), axis=-1)
    out = graph.op("MatMul", weights, value)
    if bias:  # -inf hides: a query that sees no key gets zeros
        some = graph.op("Greater", graph.op("ReduceMax", static, [-1], keepdims=1), NOTHING / 2)
        out = graph.op("Where", some, out, np.float32(0))
    out = graph.op("Reshape", out, _shape(graph, [0, 0, -1], out))
    return graph.op("Gather", out, places.out, axis=2)


def _shape(graph: Graph, first: Sequence[int], like: str) -> str:
    """A shape that ends like another."""
    return graph.op("Concat", list(first), graph.op("Shape", like, start=-1), axis=0)


def _relative(graph: Graph, query: str, tables: Sequence[str], places: Places) -> str:
    """q.r of every query with the rows and columns of its block's span: (B, N, G, P, all S together)."""
    table = tables[0] if len(tables) == 1 else graph.op("Concat", *tables, axis=1)
    if places.alike is not None:  # the n-th queries of all blocks together: they ask for the same entries
        table = graph.op("Transpose", graph.op("Gather", table, places.alike, axis=1), perm=[0, 1, 3, 2])  # N, P, D, S
        blocks = graph.op("Reshape", query, _shape(graph, [0, 0, -1, places.queries_of_block], query))
        scores = graph.op("MatMul", graph.op("Transpose", blocks, perm=[0, 1, 3, 2, 4]), table)
        return graph.op("Transpose", scores, perm=[0, 1, 3, 2, 4])
    scores = graph.op("MatMul", query, graph.op("Transpose", table, perm=[0, 2, 1]))
    return graph.op("Gather", graph.op("Reshape", scores, [0, 0, -1]), places.entries_of_axes, axis=2)


def _bias(graph: Graph, table: str, places: Places) -> str:
    """The table's entry for every pair: (N, G, P, C)."""
    return graph.op("Gather", graph.op("Reshape", table, [0, -1]), places.entries_of_pairs, axis=1)


# ------------------------------------------------------------------------------------------------------------- the graph


class Graph:
    """Nodes and constants in the order in which they are made."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self._constants: dict[Any, str] = {}

    def op(self, kind: str, *inputs: Any, output: str | None = None, **attributes: Any) -> str:
        """The name of what an operator makes of names, numbers and arrays."""
        from onnx import helper

        name = output or f"attention/{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, [self._name(one) for one in inputs], [name], **attributes))
        return name

    def _name(self, value: Any) -> str:
        if isinstance(value, (str, Whole)):
            return str(value)
        array = np.asarray(value, dtype=np.int64) if isinstance(value, (int, list, tuple)) else np.asarray(value)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            from onnx import numpy_helper

            self._constants[key] = f"attention/constant_{len(self._constants)}"
            self.initializers.append(numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]


class Whole:
    """Integers or flags of a graph, in the words of tensors that the geometry is written in.

    ``shape`` has None for what is open.
    """

    def __init__(self, graph: Graph, name: str, shape: tuple[int | None, ...]) -> None:
        self.graph, self.name, self.shape = graph, name, shape

    def __str__(self) -> str:
        return self.name

    def _op(self, kind: str, *others: Any, shape: tuple[int | None, ...] | None = None, **attributes: Any) -> Whole:
        name = self.graph.op(kind, self, *others, **attributes)
        return Whole(self.graph, name, self.shape if shape is None else shape)

    def _with(self, kind: str, other: Any, swapped: bool = False) -> Whole:
        shape = _broadcast(self.shape, tuple(getattr(other, "shape", ())))
        other = np.asarray(other) if isinstance(other, bool) else other
        pair = (other, self) if swapped else (self, other)
        return Whole(self.graph, self.graph.op(kind, *pair), shape)

    def __add__(self, other: Any) -> Whole:
        return self._with("Add", other)

    def __sub__(self, other: Any) -> Whole:
        return self._with("Sub", other)

    def __rsub__(self, other: Any) -> Whole:
        return self._with("Sub", other, swapped=True)

    def __mul__(self, other: Any) -> Whole:
        return self._with("Mul", other)

    __radd__, __rmul__ = __add__, __mul__

    def __floordiv__(self, other: Any) -> Whole:
        """ONNX rounds towards zero: the geometry divides nothing below zero but what is even, by two."""
        return self._with("Div", other)

    def __mod__(self, other: Any) -> Whole:
        return self._with("Mod", other)

    def __abs__(self) -> Whole:
        return self._op("Abs")

    def __lt__(self, other: Any) -> Whole:
        return self._with("Less", other)

    def __le__(self, other: Any) -> Whole:
        return self._with("LessOrEqual", other)

    def __ge__(self, other: Any) -> Whole:
        return self._with("GreaterOrEqual", other)

    def __and__(self, other: Any) -> Whole:
        return self._with("And", other)

    def __or__(self, other: Any) -> Whole:
        return self._with("Or", other)

    def __invert__(self) -> Whole:
        return self._op("Not")

    def __getitem__(self, key: tuple[Any, ...]) -> Whole:
        """``[..., :1]`` and new axes."""
        if key == (..., slice(None, 1)):
            return self._op("Slice", [0], [1], [len(self.shape) - 1], shape=(*self.shape[:-1], 1))
        before = len(self.shape) - (key != (..., None))  # else (..., None, :)
        return self._op("Unsqueeze", [before], shape=(*self.shape[:before], 1, *self.shape[before:]))

    def clamp(self, min: Any = None, max: Any = None) -> Whole:
        return self._op("Clip", "" if min is None else min, max)

    def view(self, *shape: Any) -> Whole:
        """One of the sizes may be another Whole: it is the one that is open."""
        sizes = [None if isinstance(one, Whole) or one == -1 else one for one in shape]
        return self._op("Reshape", [-1 if one is None else one for one in sizes], shape=tuple(sizes))

    def flatten(self, first: int, last: int) -> Whole:
        return self.view(*self.shape[:first], -1, *self.shape[last + 1 :])


def _broadcast(a: tuple[int | None, ...], b: tuple[int | None, ...]) -> tuple[int | None, ...]:
    rank = max(len(a), len(b))
    pairs = zip((1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b, strict=True)
    return tuple(one if other == 1 else other for one, other in pairs)


# -------------------------------------------------------------------------------------------------------------- geometry


class Places:
    """One window on maps of one size: G blocks of P queries, each with its span of C cells. What is asked for is made
    once, where it is asked for first."""

    def __init__(self, graph: Graph, axes: Sequence[Axis], sizes: Sequence[Whole]) -> None:
        self.graph, self.axes, self.sizes = graph, axes, sizes
        size = block_size(axes)
        self.blocks, self.spans = zip(*(block_and_span(axis, size) for axis in axes), strict=True)
        self.queries_of_block = prod(self.blocks)
        pairs = zip(axes, sizes, strict=True)
        self.cut: list[Any] = [cut_any_size(axis, cells, self._arange, size) for axis, cells in pairs]
        self.votes_as_zeros = any(axis.border == "zeros" for axis in axes)

    @cached_property
    def queries(self) -> Whole:
        """The query of each place of the blocks, one block after another."""
        outputs = [axis.output_size(cells) for axis, cells in zip(self.axes, self.sizes, strict=True)]
        return _flat([self._lay(cut.queries, axis, 2) for axis, cut in enumerate(self.cut)], outputs).view(-1)

    @cached_property
    def out(self) -> Whole:
        """Where each query is found among these places."""
        blocks, rank = self.blocks, len(self.axes)
        group = [_along(cut.out // n, axis, rank) for axis, (cut, n) in enumerate(zip(self.cut, blocks, strict=True))]
        within = [_along(cut.out % n, axis, rank) for axis, (cut, n) in enumerate(zip(self.cut, blocks, strict=True))]
        return _flat([*group, *within], [*self._groups, *blocks]).view(-1)

    @cached_property
    def cells(self) -> Whole:
        """(G, C) the cell in each place of the spans; what votes as zeros is a cell behind the last."""
        cells = _flat([self._lay(cut.cells, axis, 2) for axis, cut in enumerate(self.cut)], self.sizes)
        if self.votes_as_zeros:
            zero = reduce(Whole.__or__, [self._lay(cut.zero, axis, 2) for axis, cut in enumerate(self.cut)])
            behind = reduce(Whole.__mul__, self.sizes)
            cells = Whole(self.graph, self.graph.op("Where", zero, behind, cells), cells.shape)
        return cells.view(-1, prod(self.spans))

    @cached_property
    def alike(self) -> np.ndarray | None:
        """(P, all S together): the entries in the tables behind one another, where they are the same in all blocks."""
        if not all(map(all_blocks_alike, self.axes)):
            return None
        entries, first = [], 0
        within = np.indices(self.blocks).reshape(len(self.blocks), -1)
        for axis, block, places in zip(self.axes, self.blocks, within, strict=True):
            cut = cut_any_size(axis, 1, self._arange, block)
            entries.append(first + cut.entries[0].numpy()[places])
            first += axis.table_size
        return np.concatenate(entries, 1)

    @cached_property
    def entries_of_axes(self) -> Whole:
        """(G, P, all S together) into the scores of all places with all entries, flattened."""
        entries = [axis.table_size for axis in self.axes]
        first = [0, *accumulate(entries)]
        row = self._number[..., None] * sum(entries)
        return self._joined([row + start + one for start, one in zip(first, self._per_axis("entries"), strict=False)])

    @cached_property
    def reach(self) -> str:
        """(G, P, all S together): 0 where the query's window holds the row or column, else NOTHING."""
        everywhere = self._number[..., None] >= 0
        visible = self._joined([everywhere & one for one in self._per_axis("visible")])
        return self.graph.op("Where", visible, np.float32(0), NOTHING)

    @cached_property
    def entries_of_pairs(self) -> Whole:
        """(G, P, C) into the flattened table."""
        entries = [self._lay(cut.entries, axis, 3) for axis, cut in enumerate(self.cut)]
        return _flat(entries, [axis.table_size for axis in self.axes]).view(-1, self.queries_of_block, prod(self.spans))

    @cached_property
    def spread(self) -> np.ndarray:
        """(all S together, C): 1 where a cell lies in the row or column."""
        places = np.indices(self.spans).reshape(len(self.spans), -1)
        ones = [np.arange(n)[:, None] == place for n, place in zip(self.spans, places, strict=True)]
        return np.concatenate(ones).astype(np.float32)

    @cached_property
    def _groups(self) -> list[Whole]:
        """How many blocks each axis has."""
        shapes = [self.graph.op("Shape", cut.queries) for cut in self.cut]
        return [Whole(self.graph, self.graph.op("Gather", shape, np.int64(0)), ()) for shape in shapes]

    @cached_property
    def _number(self) -> Whole:
        """(*G, *b): which place it is of all."""
        counts = [*self._groups, *self.blocks]
        return _flat([_along(self._arange(n), axis, len(counts)) for axis, n in enumerate(counts)], counts)

    def _arange(self, count: Any) -> Any:
        if isinstance(count, int):
            return torch.arange(count, device="cpu")
        return Whole(self.graph, self.graph.op("Range", np.int64(0), count, np.int64(1)), (None,))

    def _per_axis(self, table: str) -> list[Whole]:
        """A (G, b, S) table of each axis as (*G, *b, S)."""
        return [self._lay(getattr(cut, table), axis, 2) for axis, cut in enumerate(self.cut)]

    def _joined(self, parts: Sequence[Whole]) -> Whole:
        parts = [part.view(-1, self.queries_of_block, span) for part, span in zip(parts, self.spans, strict=True)]
        return Whole(
            self.graph, self.graph.op("Concat", *parts, axis=-1), (None, self.queries_of_block, sum(self.spans))
        )

    def _lay(self, table: Whole, axis: int, spread: int) -> Whole:
        """(G, x, y ...) of one axis as (*G, *x, y ...), with ones along the other axes for so many of its dimensions."""
        sizes = [-1, *table.shape[1:]]
        ones = [1] * len(self.axes)
        laid = [[*ones[:axis], size, *ones[axis + 1 :]] for size in sizes[:spread]]
        return table.view(*(size for part in laid for size in part), *sizes[spread:])


def _along(table: Any, axis: int, rank: int) -> Any:
    """A list along one of so many axes."""
    return table.view(*(-1 if one == axis else 1 for one in range(rank)))


def _flat(indices: Sequence[Any], sizes: Sequence[Any]) -> Any:
    """The row-major index of a place from its index along every axis."""
    return reduce(lambda flat, more: flat * more[0] + more[1], zip(sizes[1:], indices[1:], strict=True), indices[0])
