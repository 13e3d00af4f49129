# SPDX-License-Identifier: Apache-2.0
"""Models on disk: written, read, exported, converted; and what a file from elsewhere may hold.

view.py        how a network sees pictures
spec.py        what a file may hold of the text that a network is written as
weights.py     a trained model and all that is needed to rebuild it, in one safetensors file
trained_on.py  the pictures that a run was trained on, eight bytes of each
export.py      a trained network as one file that runs without nearsight
converted.py   a network's convolutions made attention, in a folder
foreign.py     weights that others saved
timm_folder.py a run's folder as timm reads one
opened.py      a network by what a person types
loaded.py      a trained network, ready to be used
"""

from .export import export_onnx
from .loaded import Prediction, load

__all__ = ["Prediction", "export_onnx", "load"]
