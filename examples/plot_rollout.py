# SPDX-License-Identifier: Apache-2.0
"""
Through all layers
==================

Rollout multiplies the weights of the layers: where the content of a query may have come from. The network is the trained
one that comes with the package.
"""

from typing import Any

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import nearsight as ns

digits: Any = load_digits()
picture = digits.images[11]
network: Any = ns.load("sasa_nano")
seen = network.preprocess(torch.tensor(picture * 255 / 16).byte()[None])
maps = ns.attention_maps(network, seen)

figure, panels = plt.subplots(1, 5, figsize=(9, 2.2))
panels[0].imshow(picture, cmap="Greys")
panels[0].set_title(f"said: {network(seen).argmax().item()}")
for layer, weights, panel in zip(maps, ns.attention_rollout(maps, [(3, 4)]), panels[1:], strict=True):
    panel.imshow(weights[0], cmap="Oranges", vmin=0)
    panel.plot(4, 3, "o", color="#0072b2")
    panel.set_title(layer.layer.split(".attn")[0], fontsize=8)
for panel in panels:
    panel.set_axis_off()
figure.tight_layout()
