# SPDX-License-Identifier: Apache-2.0
"""The classes of other makers that are known, by name: their packages are not asked for until a model holds one."""

from __future__ import annotations

from importlib import import_module

from torch import nn

# Where a class is defined, and the file and the class here that stand in for it.
KNOWN = {
    "segment_anything.modeling.image_encoder.Attention": ("original_sam", "OriginalAttention"),
    "segment_anything.modeling.image_encoder.Block": ("original_sam", "OriginalBlock"),
    "timm.layers.bottleneck_attn.BottleneckAttn": ("timm_bottleneck", "BottleneckAttention"),
    "timm.layers.halo_attn.HaloAttn": ("timm_halo", "HaloAttention"),
    "timm.models.swin_transformer.WindowAttention": ("timm_swin", "SwinAttention"),
    "timm.models.swin_transformer_v2.WindowAttention": ("timm_swin", "SwinV2Attention"),
    "timm.models.vision_transformer_sam.Attention": ("timm_sam", "SamAttention"),
    "timm.models.vision_transformer_sam.Block": ("timm_sam", "SamBlock"),
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ("torchvision_swin", "ShiftedAttention"),
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": ("torchvision_swin", "ShiftedAttentionV2"),
    "transformers.models.sam.modeling_sam.SamVisionAttention": ("transformers_sam", "SamVisionOurs"),
    "transformers.models.sam.modeling_sam.SamVisionLayer": ("transformers_sam", "SamVisionLayerOurs"),
    "transformers.models.sam.modeling_sam.SamVisionSdpaAttention": ("transformers_sam", "SamVisionSdpaOurs"),
}
# NATTEN moved its modules twice: 0.14 and 0.15, 0.17, and since 0.20.
KNOWN |= {
    f"natten.{file}.NeighborhoodAttention{rank}D": ("natten_modules", f"Neighborhood{rank}D")
    for rank in (1, 2, 3)
    for file in (f"natten{rank}d", f"na{rank}d", "modules")
}


def stand_in_of(module: nn.Module) -> tuple[type, type] | None:
    """What stands in for the class of a module or for one that it derives from, and that class; None if none is known."""
    for kind in type(module).__mro__:
        if (entry := KNOWN.get(f"{kind.__module__}.{kind.__qualname__}")) is not None:
            file, name = entry
            return getattr(import_module(f".{file}", __package__), name), kind
    return None
