# SPDX-License-Identifier: Apache-2.0
"""
What a window sees
==================

A window is one rule per axis. From the rules of both axes follows which cells a query sees, before any tensor is there.
"""

import matplotlib.pyplot as plt
import numpy as np

import nearsight as ns

SIDE = 12


def seen(window: ns.Window, query: tuple[int, int]) -> np.ndarray:
    rows, columns = (
        axis.neighbours(SIDE)[place, :, 0].numpy() for axis, place in zip(window.axes(2), query, strict=True)
    )  # -1 stands for a place outside of the map
    cells = np.zeros((SIDE, SIDE))
    cells[np.ix_(rows[rows >= 0], columns[columns >= 0])] = 1
    return cells


windows = {
    "Window(5)": ns.Window(5),
    "border='shift'": ns.Window(5, border="shift"),
    "border='wrap'": ns.Window(5, border="wrap"),
    "dilation=2": ns.Window(5, dilation=2),
}
figure, panels = plt.subplots(1, 4, figsize=(9, 2.6))
for panel, (title, window) in zip(panels, windows.items(), strict=True):
    panel.imshow(seen(window, (1, 10)), cmap="Oranges", vmin=0, vmax=2)
    panel.plot(10, 1, "o", color="#0072b2")
    panel.set(title=title, xticks=[], yticks=[])
figure.tight_layout()
