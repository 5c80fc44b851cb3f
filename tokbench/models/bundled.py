"""The model that tokbench brings along."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from tokbench.bundled.clutter import CANVAS, CLASSES

BUNDLED = "bundled"
BUNDLED_WEIGHTS = Path(__file__).parents[1] / "bundled" / "vit_clutter.safetensors"
_SHAPE: dict[str, Any] = dict(
    img_size=CANVAS, patch_size=4, in_chans=1, num_classes=len(CLASSES), embed_dim=96, depth=12, num_heads=3
)
_CFG: dict[str, Any] = dict(
    architecture="vit_clutter",
    input_size=(1, CANVAS, CANVAS),
    num_classes=len(CLASSES),
    label_names=list(CLASSES),
    mean=(0.5,),
    std=(0.5,),
    interpolation="bicubic",
    crop_pct=1.0,
    crop_mode="center",
    fixed_input_size=True,
    first_conv="patch_embed.proj",
    classifier="head",
)


def build_bundled(**options: Any) -> Any:
    """The bundled model's architecture without its weights; `options` replace arguments of VisionTransformer."""
    model: Any = VisionTransformer(**{**_SHAPE, **options})
    model.pretrained_cfg = dict(_CFG)
    return model
