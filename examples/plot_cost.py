# SPDX-License-Identifier: Apache-2.0
"""
What a window saves
===================

Global attention meets every pair of cells; local attention meets k x k cells per query, however large the map is. Counted,
not measured: two operations per multiply-add.
"""

import matplotlib.pyplot as plt

import nearsight as ns
from nearsight.flops import count_flops

sides = [7, 14, 28, 56]
layers = {
    "global": ns.GlobalSelfAttention2d(64, position="none"),
    "local, 7 x 7": ns.LocalSelfAttention2d(64, kernel_size=7, position="none"),
    "local, 3 x 3": ns.LocalSelfAttention2d(64, kernel_size=3, position="none"),
}
figure, axes = plt.subplots(figsize=(6, 3.4))
for (name, layer), colour in zip(layers.items(), ("#b85000", "#0072b2", "#56b4e9"), strict=True):
    axes.loglog(sides, [count_flops(layer, (64, side, side)) / 1e9 for side in sides], "o-", color=colour, label=name)
axes.set(xlabel="cells per side", ylabel="GFLOP", xticks=sides, xticklabels=sides)
axes.minorticks_off()
axes.legend(frameon=False)
figure.tight_layout()
