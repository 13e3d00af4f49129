# SPDX-License-Identifier: Apache-2.0
"""
How far an edge reaches
=======================

Shift a picture and then attend, or attend and then shift: where the two differ, an edge was seen. Each layer lets it reach
half a block further.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import nearsight as ns

torch.manual_seed(0)
picture = torch.randn(1, 16, 28, 28)
layers = [ns.LocalSelfAttention2d(16, kernel_size=5, num_heads=4) for _ in range(4)]

figure, panels = plt.subplots(1, 4, figsize=(9, 2.6))
for count, panel in enumerate(panels, start=1):
    network = nn.Sequential(*layers[:count])
    with torch.no_grad():
        difference = network(picture.roll((1, 1), (2, 3))) - network(picture).roll((1, 1), (2, 3))
    panel.imshow(difference[0].abs().amax(0) > 1e-5, cmap="Oranges", vmin=0, vmax=2)
    panel.set(title=f"{count} layer{'s' if count > 1 else ''}", xticks=[], yticks=[])
figure.tight_layout()
