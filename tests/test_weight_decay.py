# SPDX-License-Identifier: Apache-2.0
"""Layers and networks name the parameters that weight decay is not to shrink, and optimisers leave these alone."""

import pytest
import timm.optim
import torch
from torch import nn

import nearsight as ns
from nearsight.training.optimizer import undecayed

VECTORS = {"position.vectors.0", "position.vectors.1"}
SASA = {"depths": (1, 1), "widths": (8, 16), "stem_width": 8, "num_heads": 2, "kernel_size": 3}
NETWORKS = {
    "sasa_nano": (SASA, {f"stages.{stage}.0.spatial.position.vectors.{axis}" for stage in (0, 1) for axis in (0, 1)}),
    "sasa_micro": (
        {**SASA, "value_ratio": 1, "qk_ratio": 1},
        {f"stages.{stage}.0.spatial.position.{name}" for stage in (0, 1) for name in ("alpha", "centre")},
    ),
    "sasa_resnet26": (
        {**SASA, "stem": "attention", "position": "none"},
        {f"stem.{name}" for name in ("row", "column", "mixture", "position.vectors.0", "position.vectors.1")},
    ),
    "nat_mini": (
        {"depths": (1, 2), "num_heads": (1, 2), "embed_dim": 16, "kernel_size": 3},
        {f"levels.{level}.blocks.{block}.attn.rpb" for level, block in ((0, 0), (1, 0), (1, 1))},
    ),
    "halo_h0": (
        {"depths": (1, 1), "widths": (8, 16), "stem_width": 8, "num_heads": 2, "block_size": 4, "halo_size": 1},
        {f"stages.{stage}.0.spatial.position.vectors.{axis}" for stage in (0, 1) for axis in (0, 1)},
    ),
    "resnet18": ({}, set()),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_tables_are_not_decayed(name):
    options, tables = NETWORKS[name]
    model = ns.create_model(name, **options)
    if name != "resnet18":
        assert model.no_weight_decay() == tables
    parameters = dict(model.named_parameters())
    assert tables <= undecayed(model) <= parameters.keys()
    decayed = parameters.keys() - undecayed(model)
    assert all(name.endswith("weight") and parameters[name].ndim > 1 for name in decayed)
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.1)
    left_alone = [id(one) for group in optimizer.param_groups if not group["weight_decay"] for one in group["params"]]
    assert {id(parameters[name]) for name in tables} <= set(left_alone)
    assert {id(parameters[name]) for name in decayed}.isdisjoint(left_alone)


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (lambda: ns.LocalSelfAttention1d(8, num_heads=2, position="bias"), {"position.table"}),
        (lambda: ns.GlobalSelfAttention2d(8, num_heads=2, position="none"), set()),
        (lambda: ns.HaloSelfAttention2d(8, num_heads=2), VECTORS),
        (lambda: ns.AttentionStem2d(3, 8), {"row", "column", "mixture", *VECTORS}),
    ],
)
def test_a_layer_names_its_tables(layer, names):
    layer = layer()
    assert layer.no_weight_decay() == names
    nested = nn.Sequential(nn.Linear(2, 2), layer)
    assert {f"1.{name}" for name in names} <= undecayed(nested)
    assert {name for name, _ in layer.named_parameters()} >= names
    assert torch.is_tensor(nested[1].get_parameter(next(iter(names)))) if names else True
