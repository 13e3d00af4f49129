# SPDX-License-Identifier: Apache-2.0
"""Segment Anything's image encoder on a photograph, as timm has it and accelerated: the same features, sooner.

.venv/bin/python examples/segment_anything.py 512      # pixels per side; the encoder was trained with 1024
"""

from __future__ import annotations

import sys
import time
from typing import Any

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

import nearsight as ns

NAME = "samvit_base_patch16"


def encoder() -> Any:
    """With the published weights, or where there is no network with those that it starts with."""
    try:
        model = timm.create_model(NAME, pretrained=True)
    except Exception as error:  # of whatever lies between here and there
        print(f"random weights, as the published ones cannot be fetched: {type(error).__name__}")
        model = timm.create_model(NAME)
        for name, table in model.named_parameters():
            if "rel_pos" in name:  # zeros before training, which would hide a mistake
                nn.init.normal_(table, std=0.05)
    return model.eval()


def photograph(model: Any, size: int) -> Tensor:
    """scikit-learn's china.jpg, square, as the encoder sees pictures."""
    picture = torch.from_numpy(load_sample_image("china.jpg").copy()).movedim(-1, 0)[None] / 255
    picture = F.interpolate(picture, (size, size), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    return (picture - mean) / std


@torch.no_grad()
def encode(model: Any, x: Tensor) -> Tensor:
    begin = time.perf_counter()
    features = model.forward_features(x)
    print(f"  {time.perf_counter() - begin:.2f} s, features {tuple(features.shape)}")
    return features


def main(size: int) -> None:
    model = encoder()
    x = photograph(model, size)
    print("as timm has it")
    before = encode(model, x)
    report = ns.accelerate(model)
    print(f"accelerated: {'; '.join(report.summary())}")
    after = encode(model, x)
    print(f"largest difference: {(after - before).abs().max() / before.abs().max():.1e} of the largest feature")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 512)
