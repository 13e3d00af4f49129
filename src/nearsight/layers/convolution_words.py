# SPDX-License-Identifier: Apache-2.0
"""Arguments that ``nn.Conv2d`` has and an attention layer says otherwise: who exchanges the two types them."""

from __future__ import annotations

from functools import wraps
from typing import Any, TypeVar

from ..errors import OptionError

OURS = {
    "padding": "the output keeps the map's size, and border= says what happens at the edge: 'zeros' is zero padding",
    "padding_mode": "border= says what happens at the edge: 'zeros' pads with zeros, 'wrap' is 'circular'",
    "groups": "num_heads= splits the width",
    "bias": "qkv_bias= adds one to the projections",
}

Layer = TypeVar("Layer", bound=type)


def refusing_words_of_convolutions(layer: Layer) -> Layer:
    """Has a layer's constructor say, of an argument of convolutions, what is there in its place.

    Raises:
        OptionError: such an argument, by the constructor.
    """
    init = layer.__init__

    @wraps(init)
    def told(self: Any, *args: Any, **kwargs: Any) -> None:
        for word in OURS.keys() & kwargs.keys():
            raise OptionError(f"{type(self).__name__} has no {word}=: {OURS[word]}; received {kwargs[word]!r}")
        init(self, *args, **kwargs)

    layer.__init__ = told  # pyright: ignore[reportAttributeAccessIssue]
    return layer
