# SPDX-License-Identifier: Apache-2.0
"""One language of pictures: what each colour means, in drawings, reports and the explorer alike.

Colours are Okabe and Ito's, which people with any colour vision can tell apart on light and on dark.
"""

from __future__ import annotations

BLUE, ORANGE, GREEN, PINK, RED, SKY = "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9"
GREY = "#999999"

QUERY, BLOCK, WEIGHT = BLUE, SKY, ORANGE  # the query's own cell, the frame of its memory block, and what it weighs
POSITIVE, NEGATIVE = BLUE, ORANGE  # numbers above zero and below, the stronger the larger
BORDER, STRIDE, ENCODING, UNDIVIDED = ORANGE, SKY, BLUE, GREY  # what breaks a symmetry
# A weight has its full colour where it is the block's largest, but no less than so many times 1/n, the weight that each of
# n cells has where nothing is preferred: a network that attends to nothing in particular is pale.
FULL = 2


def as_css() -> str:
    """The meanings as custom properties, from which a page's style and script take them.

    Example:
        >>> as_css().split(";")[0]
        ':root { --query: #0072b2'
    """
    meanings = ("QUERY", "BLOCK", "WEIGHT", "POSITIVE", "NEGATIVE", "BORDER", "STRIDE", "ENCODING", "UNDIVIDED", "FULL")
    return f":root {{ {'; '.join(f'--{name.lower()}: {globals()[name]}' for name in meanings)}; }}\n"
