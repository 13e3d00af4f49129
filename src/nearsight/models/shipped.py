# SPDX-License-Identifier: Apache-2.0
"""Weights of our own: those that come with the package, each with a card beside it, and commands that make others."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).with_name("weights")
TAGS = {"sasa_nano": "digits"}  # of the weights that a network's plain name stands for
SOURCES = {"file", "hf_hub_id", "state_dict", "url"}  # of a pretrained_cfg: weights from elsewhere
# What is too large to come along: the command, and the folder in which it leaves the network.
MADE_BY = {
    "sasa_micro": ("nearsight train --model sasa_micro --data fashion-mnist", "runs/sasa_micro-fashion-mnist"),
}


def shipped(name: str) -> Path | None:
    """The file of weights that comes with the package for a network's name, with or without its tag; None for none.

    Example:
        >>> shipped("sasa_nano").name, shipped("resnet18")
        ('sasa_nano.digits.safetensors', None)
    """
    base, _, tag = name.partition(".")
    known = TAGS.get(base)
    return WEIGHTS / f"{base}.{known}.safetensors" if known and tag in ("", known) else None
