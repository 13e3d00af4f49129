# SPDX-License-Identifier: Apache-2.0
"""
What the heads of a layer look at
=================================

The weights of one query over its memory block, for each head: of a layer that has learnt nothing yet, on a digit.
"""

from typing import Any

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import nearsight as ns

torch.manual_seed(2)
digits: Any = load_digits()
digit = torch.tensor(digits.images[13] / 16, dtype=torch.float32)[None, None]
layer = ns.LocalSelfAttention2d(1, 32, kernel_size=5, num_heads=4)
maps = ns.attention_maps(layer, digit)

figure, panels = plt.subplots(1, 5, figsize=(9, 2.2))
panels[0].imshow(digit[0, 0], cmap="Greys")
panels[0].plot(3, 4, "o", color="#0072b2")
for head, (panel, weights) in enumerate(zip(panels[1:], maps[0].memory_block((4, 3)), strict=True)):
    panel.imshow(weights, cmap="Oranges", vmin=0)
    panel.set_title(f"head {head}")
for panel in panels:
    panel.set_axis_off()
figure.tight_layout()
