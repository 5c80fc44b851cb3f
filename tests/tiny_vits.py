"""Small models of timm's VisionTransformer and Eva, with one size for the tests of how people run models."""

from __future__ import annotations

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

TINY = dict(img_size=32, patch_size=4, embed_dim=24, depth=4, num_heads=3, num_classes=10)
ROTARY = TINY | dict(embed_dim=48, use_rot_pos_emb=True)


def vit(**changes) -> VisionTransformer:
    return VisionTransformer(**(TINY | changes)).eval()


def eva(**changes) -> Eva:
    model = Eva(**(ROTARY | changes)).eval()
    for parameter in model.blocks.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def rotary(kind: str, **changes) -> Eva:
    return eva(**{"axial": {}, "mixed": {"rope_type": "mixed"}, "dinov3": {"rope_type": "dinov3"}}[kind], **changes)
