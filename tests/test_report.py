# SPDX-License-Identifier: Apache-2.0
"""A run's report shows where a network of any family looked."""

import pytest
import torch

import nearsight as ns
from nearsight.saved.view import View
from nearsight.saved.weights import Blueprint
from nearsight.training.evaluate import Evaluation
from nearsight.training.report import _attention

FAMILIES = {
    "sasa_nano": 4,
    "halo_h0,depths=[1,1],widths=[16,32],num_heads=2,stem_width=16,stem_stride=1,block_size=4,halo_size=1": 2,
    "nat_mini,depths=[1,1],num_heads=[1,2],embed_dim=16,kernel_size=3": 2,
    "resnet18": 0,
}


@pytest.mark.parametrize("spec", FAMILIES)
def test_every_family_is_looked_at(spec):
    torch.manual_seed(0)
    model = ns.create_model(spec, num_classes=2).eval()
    evaluation = Evaluation(torch.arange(4) % 2, torch.eye(2)[[0, 1, 0, 0]], torch.arange(4))
    blueprint = Blueprint(spec, ("a", "b"), View(3, 16, (0.5,) * 3, (0.5,) * 3), "digits")
    pictures = _attention(model, blueprint, evaluation, [(torch.randn(3, 16, 16), 0) for _ in range(4)])
    if not FAMILIES[spec]:
        assert pictures == []
        return
    *images, heads = pictures
    assert len(images) == 4
    assert all(picture.caption.startswith("Test image") and "<svg" in picture.svg for picture in images)
    assert "head by head" in heads.caption
    layers = {line.split(",")[0] for line in heads.numbers.splitlines()[1:]}
    assert len(layers) == FAMILIES[spec]
