# SPDX-License-Identifier: Apache-2.0
"""The blocks of :class:`SasaResNet`: the paper's, and that of ``sasa_micro``.

Each says what stands around its attention, which layer that is, and what takes its place in stages without attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import OptionError
from ..layers import LocalSelfAttention2d, SelfAttention
from ..layers.projection import PatchProjection2d
from ..positions import RelativePosition
from .backbone import Bottleneck, average, is_halving

Attention = Callable[..., SelfAttention]
"""Makes a block's attention: ``attention(layer, halved=)``, with the layer for local attention, and whether the block halves
the map before it or after."""

Dilation = tuple[int, int]
"""How far apart the cells are that a block mixes as neighbours, in the map that it takes and in that which it puts out."""


class RelativeOnlySelfAttention2d(LocalSelfAttention2d):
    """Local self-attention by q.r alone: where to look does not depend on what is there (Table 6 of the SASA paper).

        q, v = W x;   y[p] = sum_{c in N(p)} softmax_c( scale * q[p] . r[c - p] ) v[c]   in each head

    It is :class:`LocalSelfAttention2d` with keys of zero, and has no projection that makes them: qk_channels * in_channels
    parameters less. state_dict: as there, without the key's rows.

    Raises:
        OptionError: also for another position than relative embeddings.

    Example:
        >>> RelativeOnlySelfAttention2d(64, 128, 7, stride=2)(torch.randn(2, 64, 32, 32)).shape
        torch.Size([2, 128, 16, 16])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.position, RelativePosition):
            raise OptionError(
                f"q.r alone needs position='relative', which has an r; received {type(self.position).__name__}"
            )

    @property
    def _widths(self) -> list[int]:
        return [self.qk_channels, self.out_channels]

    def _split(self, projected: Sequence[Tensor]) -> list[Tensor]:
        query, value = super()._split(projected)
        return [query, value.new_zeros(()).expand(*value.shape[:-1], self.head_dim), value]


class SasaBlock(Bottleneck):
    """The paper's: a bottleneck of attention at full resolution, which an average pool halves afterwards.

        y = relu( x' + up(relu(norm(pool(attention(relu(down(x))))))) )

    Args:
        in_channels, width, out_channels: of the input, and after down and up.
        attention: makes the attention.
        stride, dilation, drop_path: as in :class:`Bottleneck`.
    """

    expansion = 4  # channels that a stage puts out per channel of its bottleneck
    layer: type[LocalSelfAttention2d] = LocalSelfAttention2d

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        attention: Attention,
        *,
        stride: int = 1,
        dilation: Dilation = (1, 1),
        drop_path: float = 0.0,
    ) -> None:
        spatial = attention(self.layer, halved=False)
        pool = average(stride, dilation[0]) if is_halving(stride, dilation) else None
        around = {"stride": stride, "dilation": dilation, "drop_path": drop_path}
        super().__init__(in_channels, width, out_channels, spatial, pool=pool, **around)

    @classmethod
    def of_convolutions(cls, in_channels: int, width: int, out_channels: int, **kwargs: Any) -> Bottleneck:
        """What stands in a stage without attention: the bottleneck of ResNet v1.5."""
        spatial = _spatial(width, kwargs["stride"], kwargs.get("dilation", (1, 1)))
        return Bottleneck(in_channels, width, out_channels, spatial, **kwargs)


class RelativeOnlyBlock(SasaBlock):
    """The paper's block with q.r alone, of Table 6; see :class:`RelativeOnlySelfAttention2d`."""

    layer = RelativeOnlySelfAttention2d


class MicroBlock(Bottleneck):
    """That of ``sasa_micro``: halved first, a shortcut that averages, and attention whose values go up as they are.

        y = relu( x' + up(attention(relu(down(x)))) )

    Up is attention's output projection. Softmax makes means, and a ReLU right after them would hide the sign of what differs
    between two of them before up can subtract one from the other; up is linear and has a norm of its own, so that without
    the ReLU that of attention can go.

    Args:
        in_channels, width, out_channels, attention, stride, dilation, drop_path: as in :class:`SasaBlock`.
        downsample: how the map is halved: ``"patch"``, the 1 x 1 down becomes a projection of 2 x 2 cells (Swin's patch
            merging, Liu et al. 2021, arXiv:2103.14030), so that attention runs on the halved map, at a quarter of the cost;
            or ``"pool"``, as in the paper's block.
        avg_down: where the map is halved, average 2 x 2 cells before the shortcut's projection, which else reads one of the
            four (ResNet-D, He et al. 2019, arXiv:1812.01187, and timm's word). For stages of convolutions too.
        norm, act: True puts the paper's norm, and its ReLU, between attention and up.

    Raises:
        OptionError: another way to halve.
    """

    expansion = 2
    layer: type[LocalSelfAttention2d] = LocalSelfAttention2d

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        attention: Attention,
        *,
        stride: int = 1,
        dilation: Dilation = (1, 1),
        drop_path: float = 0.0,
        downsample: str = "patch",
        avg_down: bool = True,
        norm: bool = False,
        act: bool = False,
    ) -> None:
        if downsample not in ("pool", "patch"):
            raise OptionError(f"downsample must be 'pool' or 'patch'; received {downsample!r}")
        patches = downsample == "patch"
        spatial = attention(self.layer, halved=patches)
        parts: dict[str, Any] = {"avg_down": avg_down, "norm": norm, "act": act}
        if is_halving(stride, dilation):
            if patches:
                parts["down"] = PatchProjection2d(in_channels, width, 2, stride=stride, dilation=dilation[0])
            else:
                parts["pool"] = average(stride, dilation[0])
        around = {"stride": stride, "dilation": dilation, "drop_path": drop_path}
        super().__init__(in_channels, width, out_channels, spatial, **around, **parts)

    @classmethod
    def of_convolutions(
        cls, in_channels: int, width: int, out_channels: int, *, avg_down: bool = True, **kwargs: Any
    ) -> Bottleneck:
        """What stands in a stage without attention: a bottleneck of ResNet-D."""
        around = {name: kwargs[name] for name in ("stride", "dilation", "drop_path") if name in kwargs}
        spatial = _spatial(width, around["stride"], around.get("dilation", (1, 1)))
        return Bottleneck(in_channels, width, out_channels, spatial, avg_down=avg_down, **around)


BLOCKS: dict[str, type[SasaBlock] | type[MicroBlock]] = {
    "sasa": SasaBlock,
    "sasa_relative_only": RelativeOnlyBlock,
    "micro": MicroBlock,
}
"""What ``block=`` of :class:`SasaResNet` names. A block of one's own can be added, and a file holds its name alone."""


def _spatial(width: int, stride: int, dilation: Dilation) -> nn.Conv2d:
    return nn.Conv2d(width, width, 3, stride, padding=dilation[0], dilation=dilation[0], bias=False)
