# SPDX-License-Identifier: Apache-2.0
"""``NAME,option=value``: how a network is written where only text fits."""

import pytest
import torch

import nearsight as ns
from nearsight.errors import OptionError
from nearsight.models import parse_spec


@pytest.mark.parametrize(
    ("spec", "name", "options"),
    [
        ("sasa_nano", "sasa_nano", {}),
        ("hf-hub:timm/resnet50.a1_in1k", "hf-hub:timm/resnet50.a1_in1k", {}),
        ("sasa_nano,kernel_size=5,position=none", "sasa_nano", {"kernel_size": 5, "position": "none"}),
        ("net,a=[3, [5,7]],b=1e-3,c=null", "net", {"a": [3, [5, 7]], "b": 1e-3, "c": None}),
        ("net,a=true,b=-0.5, c = x", "net", {"a": True, "b": -0.5, "c": "x"}),
    ],
)
def test_options_are_read_as_yaml(spec, name, options):
    assert parse_spec(spec) == (name, options)


@pytest.mark.parametrize("spec", ["net,kernel_size", "net,=3", "net,a=[3", "net,a=1,b", "net,a(=3", "net,a=b=c"])
def test_what_is_no_list_of_options_is_refused(spec):
    with pytest.raises(OptionError, match=r"NAME,option=value,option=value; received 'net,"):
        parse_spec(spec)


def test_create_model_takes_a_spec():
    model = ns.create_model("sasa_nano,kernel_size=3,position=none", num_classes=5)
    twin = ns.create_model("sasa_nano", kernel_size=3, position="none", num_classes=5)
    assert [(n, p.shape) for n, p in model.named_parameters()] == [(n, p.shape) for n, p in twin.named_parameters()]
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sasa_nano,colour=5", "model 'sasa_nano' has no option 'colour'; received"),
        ("resnet18,colour=5", "model 'resnet18' has no option 'colour'; received"),
        ("sasa_nano,num_classes=5", "num_classes of model 'sasa_nano' is set by what creates it"),
        ("sasa_nano,kernel_size=[3, 5]", r"kernel_size must be one number or 3.*received \[3, 5\]"),
    ],
)
def test_options_that_the_network_does_not_take_are_refused(spec, message):
    with pytest.raises(OptionError, match=message):
        ns.create_model(spec, num_classes=10)
