# SPDX-License-Identifier: Apache-2.0
"""transformers' DiNAT, repaired: it computes what our network computes with the same weights."""

from __future__ import annotations

import pytest
import timm
import torch

import nearsight as ns
from nearsight.compat import transformers as repair
from nearsight.models.nat import Nat

# Maps that are not square, so that swapped axes show, and no smaller than the dilated window.
X = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))
SIZE = {"depths": [1, 2], "num_heads": [1, 2], "embed_dim": 16, "mlp_ratio": 2.0, "kernel_size": 3}


@pytest.fixture
def dinat():
    """What makes one, with random tables and scales."""
    from transformers import DinatConfig, DinatForImageClassification

    repair.install()

    def make(scale=0.5, **options):
        torch.manual_seed(0)
        model = DinatForImageClassification(
            DinatConfig(**SIZE, dilations=[[1], [2, 1]], layer_scale_init_value=scale, num_labels=5, **options)
        )
        for parameter in model.parameters():  # large: as they are made, where a cell looks changes next to nothing
            torch.nn.init.normal_(parameter, std=0.3)
        return model.eval()

    yield make
    repair.uninstall()


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_it_is_our_network(dinat, scale, tmp_path):
    theirs = dinat(scale)
    theirs.save_pretrained(tmp_path)
    ours = ns.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(theirs(X).logits, ours(X), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(Nat.from_pretrained(tmp_path).eval()(X), ours(X))
    a, b = X.clone().requires_grad_(), X.clone().requires_grad_()
    theirs(a).logits.square().sum().backward()
    ours(b).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)
    table = theirs.dinat.encoder.levels[1].layers[0].attention.self.rpb.grad
    torch.testing.assert_close(table, ours.levels[1].blocks[0].attn.rpb.grad, atol=1e-4, rtol=1e-4)


def test_the_weights_of_attention_are_shown(dinat):
    model = dinat(output_attentions=True)
    plain = dinat()
    found = model(X)
    torch.testing.assert_close(found.logits, plain(X).logits, atol=1e-5, rtol=1e-5)
    last = found.attentions[-1]
    assert last.shape == (2, 2, 12, 8, 9)
    torch.testing.assert_close(last.sum(-1), torch.ones(2, 2, 12, 8))


def test_training_with_dropout_goes_by_the_weights(dinat):
    model = dinat(attention_probs_dropout_prob=0.5).train()
    torch.manual_seed(0)
    first = model(X).logits
    assert not torch.equal(first, model(X).logits)
    first.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch.testing.assert_close(model.eval()(X).logits, dinat()(X).logits)


def test_maps_of_a_backbone(dinat):
    from transformers import DinatBackbone, DinatConfig

    backbone = DinatBackbone(DinatConfig(**SIZE, dilations=[[1], [2, 1]], out_features=["stage1", "stage2"]))
    assert [tuple(one.shape) for one in backbone(X).feature_maps] == [(2, 16, 24, 16), (2, 32, 12, 8)]


def test_it_is_undone():
    from transformers.models.dinat import modeling_dinat

    before = modeling_dinat.NeighborhoodAttention.forward, modeling_dinat.requires_backends
    repair.install()
    repair.install()
    assert modeling_dinat.NeighborhoodAttention.forward is repair.attend
    repair.uninstall()
    repair.uninstall()
    assert (modeling_dinat.NeighborhoodAttention.forward, modeling_dinat.requires_backends) == before


def test_timm_reads_what_was_saved_from_it(dinat, tmp_path):
    dinat().save_pretrained(tmp_path / "theirs")
    ours = ns.create_model(f"local-dir:{tmp_path / 'theirs'}", pretrained=True).eval()
    timm.models.save_for_hf(ours, tmp_path / "timm")
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()(X), ours(X))
