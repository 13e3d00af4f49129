# SPDX-License-Identifier: Apache-2.0
"""
A convolution, converted
========================

An exact conversion gives each place of a kernel a head that looks there and nowhere else. The outputs stay as they were.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import nearsight as ns

torch.manual_seed(0)
network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, padding=1))
picture = torch.randn(1, 3, 12, 12)
with torch.no_grad():
    before = network(picture)
    ns.convert(network, init="exact")
    difference = (network(picture) - before).abs().max().item()

block = ns.attention_maps(network, picture)[0].memory_block((6, 6))
figure, panels = plt.subplots(1, 9, figsize=(9, 1.6))
for head, panel in enumerate(panels):
    panel.imshow(block[head][4:9, 4:9], cmap="Oranges", vmin=0, vmax=1)
    panel.set(title=f"head {head + 1}", xticks=[], yticks=[])
figure.suptitle(f"outputs differ by {difference:.0e} at most", fontsize=9)
figure.tight_layout()
