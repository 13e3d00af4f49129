# SPDX-License-Identifier: Apache-2.0
"""SASA's attention stem: the first layer of a network, on the raw image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import attention_weights, check_scale, local_attention
from ..attention.backend import check_backend
from ..errors import OptionError, ShapeError
from ..positions import RelativePosition, Tables, no_weight_decay_in
from ..precision import wide_of, without_autocast
from ..private import known_shape, unflatten
from ..window import Window, plain
from .convolution_words import refusing_words_of_convolutions
from .projection import check_channels, made_on, merge_heads, split_heads
from .whole import one_node


@refusing_words_of_convolutions
class AttentionStem2d(nn.Module):
    """SASA's stem: attention inside aligned blocks of the raw image, with values that know where in the block they are.

        v[c] = ( sum_m p[c, m] W_m ) x[c],   p[c, m] = softmax_m( (row[c] + column[c]) . nu_m )

    then batch norm and a max-pool over the same blocks. Row and column are those inside the block. Raw pixels say little
    about themselves, so a plain value would lose where in the block an edge was.

    Source: Ramachandran et al. 2019 (arXiv:1906.05909), section 3.2 and appendix. The paper states blocks of 4 x 4 and 4
    heads, and not the number of mixtures: 4 fits its FLOPs. Row, column and nu have head_dim entries each, which the paper
    does not state either. Queries, keys and relative embeddings are those of :class:`LocalSelfAttention2d`.
    An image that is no multiple of the block ends in smaller blocks.

    Shapes: (B, in_channels, H, W) -> (B, out_channels, ceil(H / kernel_size), ceil(W / kernel_size)).

    Parameters: (2 + mixtures) * in * out + (2 * kernel_size - 1) * out + (2 * kernel_size + mixtures) * out / num_heads,
    and 2 * out of the batch norm.

    state_dict: ``qk.weight``, ``value.weight`` (mixtures * out, in, 1, 1), ``row``, ``column``, ``mixture``,
    ``position.vectors.*``, ``norm.*``.

    Raises:
        ShapeError: channels that heads do not divide, an input of other channels or rank.
        OptionError: blocks of a single cell.

    Example:
        >>> AttentionStem2d(3, 64)(torch.randn(2, 3, 224, 224)).shape
        torch.Size([2, 64, 56, 56])
    """

    rank = 2

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 64,
        *,
        kernel_size: int = 4,
        num_heads: int = 4,
        mixtures: int = 4,
        scale: float | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_channels, out_channels, num_heads = plain((in_channels, out_channels, num_heads))
        kernel_size, mixtures = plain((kernel_size, mixtures))
        check_channels(num_heads, in_channels=in_channels, out_channels=out_channels)
        check_backend(backend)
        if kernel_size < 2:
            raise OptionError(
                f"kernel_size must be at least 2: in a block of one cell nothing attends; received {kernel_size}"
            )
        head_dim = out_channels // num_heads
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.num_heads = num_heads
        self.scale = check_scale(scale)
        self.backend = backend
        self.window = Window(kernel_size, shared_by=kernel_size)
        with made_on(device):
            self.qk = nn.Conv2d(in_channels, 2 * out_channels, 1, bias=False)
            self.value = nn.Conv2d(in_channels, mixtures * out_channels, 1, bias=False)
            self.row = nn.Parameter(torch.randn(kernel_size, head_dim))
            self.column = nn.Parameter(torch.randn(kernel_size, head_dim))
            self.mixture = nn.Parameter(torch.randn(mixtures, head_dim))
            self.position = RelativePosition(num_heads, head_dim, self.window.table_size(2))
            self.norm = nn.BatchNorm2d(out_channels)
        for projection in (self.qk, self.value):
            nn.init.normal_(projection.weight, std=in_channels**-0.5)
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)

    @one_node
    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        query, key = self._query_key(x)
        value = split_heads(self._values(x), self.num_heads)
        _, relative = self.tables_on(x.shape[2:])
        out = local_attention(query, key, value, self.window, relative=relative, scale=self.scale, backend=self.backend)
        return F.max_pool2d(self.norm(merge_heads(out, like=x)), self.kernel_size, ceil_mode=True)

    def attention_weights(self, x: Tensor, queries: Tensor | None = None) -> Tensor:
        """The weights before the max-pool, of every pixel over those of its block: (B, N, H, W, kernel_size, kernel_size).

        With ``queries`` (Q, 2), row and column of each, those alone: (B, N, Q, kernel_size, kernel_size).
        """
        self._check(x)
        query, key = self._query_key(x)
        _, relative = self.tables_on(x.shape[2:])
        return attention_weights(query, key, self.window, queries=queries, relative=relative, scale=self.scale)

    def no_weight_decay(self) -> set[str]:
        """The names of parameters that weight decay is not to shrink: those that say where in a block a pixel is."""
        return {"row", "column", "mixture"} | no_weight_decay_in(self)

    def window_on(self, size: Sequence[int]) -> Window:
        """The memory block, the same on an image of any size."""
        return self.window

    def tables_on(self, size: Sequence[int]) -> Tables:
        """The position tables, ``(None, relative)``."""
        return self.position.tables(self.window, size)

    def mixing(self) -> Tensor:
        """p: how much of each value matrix a place of the block uses, (mixtures, kernel_size, kernel_size).

        In float32 or wider, as all weights.
        """
        with without_autocast(self.mixture.device.type):
            row, column, mixture = (table.to(wide_of(table)) for table in (self.row, self.column, self.mixture))
            return torch.einsum("y x d, m d -> m y x", row[:, None] + column, mixture).softmax(0)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4 or known_shape(x)[1] != self.in_channels:
            raise ShapeError(f"AttentionStem2d takes (B, {self.in_channels}, H, W); received {tuple(x.shape)}")

    def _query_key(self, x: Tensor) -> list[Tensor]:
        return [split_heads(tensor, self.num_heads) for tensor in self.qk(x).chunk(2, 1)]

    def _values(self, x: Tensor) -> Tensor:
        rows, columns = (torch.arange(size, device=x.device) % self.kernel_size for size in x.shape[2:])
        p = self.mixing()[:, rows][:, :, columns]
        values = unflatten(self.value(x), 1, (-1, self.out_channels))
        return (p[:, None] * values.to(wide_of(values))).sum(1).to(values.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, num_heads={self.num_heads}"
