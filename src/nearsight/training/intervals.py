# SPDX-License-Identifier: Apache-2.0
"""How far an accuracy, and the difference between two, could be off by luck: 95 % intervals.

**An accuracy** p over n test images has Wilson's interval (1927, J. Am. Stat. Assoc. 22, 209), p being the mean over seeds:

    ( p + z^2 / 2n  -+  z sqrt( p (1 - p) / n + z^2 / 4n^2 ) ) / (1 + z^2 / n)

**A difference** is taken on the same images, seed by seed. With one seed, b of n images are right with one model alone and c
with the other alone; the difference is d = (b - c) / n. What the images leave open is Tango's score interval for paired
proportions (1998, Stat. Med. 17, 891): all D with

    ( b - c - n D )^2  <=  z^2 n ( 2 q + D (1 - D) ),    q the likeliest share of c if the difference were D.

It excludes zero exactly where McNemar's test rejects, and it has a width where two models agree on every image. With S seeds
an image has a mean difference e between -1 and 1; then b - c is the sum of e, and b + c the sum of e^2, which with one seed
it is already, but no less than |b - c|. What the seeds leave open is Student's interval of the mean of their differences,
with half width h = t s / sqrt(S). Both are joined by squaring and adding (Newcombe 1998, Stat. Med. 17, 2635; Zou and Donner
2008, Stat. Med. 27, 1693):

    low = d - sqrt( (d - low of the images)^2 + h^2 ),    high alike.

With one seed there is no h: the interval is then one of two trained networks, and says nothing about other seeds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """An estimate and the ends of its interval, all as shares."""

    value: float
    low: float
    high: float

    @property
    def spans_zero(self) -> bool:
        return self.low <= 0 <= self.high


def wilson(share: float, count: int) -> Interval:
    """Of a share of ``count`` independent images.

    Example:
        >>> [round(end, 3) for end in wilson(0.9, 40)]
        [0.9, 0.769, 0.96]
    """
    z = _z()
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return Interval(share, max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale))


def tango(better: float, worse: float, count: int) -> Interval:
    """Of (better - worse) / count, where that many of ``count`` images are right with one model alone, and with the other.

    Example:
        >>> [round(end, 3) for end in tango(12, 2, 50)]
        [0.2, 0.061, 0.345]
    """
    ends = -_upper(worse, better, count), _upper(better, worse, count)
    return Interval(float(better - worse) / count, *ends)


def paired(model: np.ndarray, other: np.ndarray) -> Interval:
    """Of the accuracy of ``model`` less that of ``other``.

    Args:
        model, other: (seeds, images) bool, whether an image is named rightly; the same seeds and images in both.

    Example:
        >>> paired(np.array([[True, True, False]]), np.array([[True, False, False]])).spans_zero
        True
    """
    from scipy.stats import t

    seeds, count = model.shape
    each = model.mean(0) - other.mean(0)
    balance = each.sum()
    unlike = max((each**2).sum(), abs(balance))
    found = tango((unlike + balance) / 2, (unlike - balance) / 2, count)
    if seeds == 1:
        return found
    by_seed = model.mean(1) - other.mean(1)
    half = float(t.ppf((1 + CONFIDENCE) / 2, seeds - 1) * by_seed.std(ddof=1)) / math.sqrt(seeds)
    low = found.value - math.hypot(found.value - found.low, half)
    high = found.value + math.hypot(found.high - found.value, half)
    return Interval(found.value, max(-1.0, low), min(1.0, high))


def _upper(better: float, worse: float, count: int) -> float:
    from scipy.optimize import brentq

    z = _z()
    estimate = (better - worse) / count

    def beyond(difference: float) -> float:
        """Above zero where ``difference`` is too large to be true."""
        a, b = 2 * count, (2 * count - better + worse) * difference - better - worse
        c = -worse * difference * (1 - difference)
        q = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        variance = count * (2 * q + difference * (1 - difference))
        return (better - worse - count * difference) ** 2 - z * z * variance

    start = estimate + 1e-9 * (1 - estimate)  # at the estimate itself both sides can be zero
    return 1.0 if estimate >= 1 else float(brentq(beyond, start, 1.0))  # pyright: ignore[reportArgumentType]


def _z() -> float:
    from scipy.stats import norm

    return float(norm.ppf((1 + CONFIDENCE) / 2))
