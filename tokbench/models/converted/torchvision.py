"""torchvision's Vision Transformers."""

from __future__ import annotations

import hashlib
import math
from functools import partial
from pathlib import Path
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer

from tokbench.errors import UserError, nearest
from tokbench.models.checkpoints import count_outputs
from tokbench.models.converted import common
from tokbench.models.converted.common import Conversion, Rules

_Shape = tuple[int, int, int, int]
# Patch, blocks, heads, width; the MLP is four times as wide.
ARCHITECTURES: dict[str, _Shape] = {
    "vit_b_16": (16, 12, 12, 768),
    "vit_b_32": (32, 12, 12, 768),
    "vit_l_16": (16, 24, 16, 1024),
    "vit_l_32": (32, 24, 16, 1024),
    "vit_h_14": (14, 32, 16, 1280),
}
# torchvision's own files, by how their SHA-256 begins (it stands in their names): the side to which images are resized
# before the crop, and how.
OFFICIAL: dict[str, tuple[str, int, str]] = {
    "c867db91": ("vit_b_16", 256, "bilinear"),
    "9ac1b537": ("vit_b_16", 384, "bicubic"),
    "4e70ced5": ("vit_b_16", 224, "bicubic"),
    "d86f8d99": ("vit_b_32", 256, "bilinear"),
    "852ce7e3": ("vit_l_16", 242, "bilinear"),
    "4f3808c9": ("vit_l_16", 512, "bicubic"),
    "4d563306": ("vit_l_16", 224, "bicubic"),
    "c7638314": ("vit_l_32", 256, "bilinear"),
    "80465313": ("vit_h_14", 518, "bicubic"),
    "c1eb923e": ("vit_h_14", 224, "bicubic"),
}
_NAMES: Rules = (
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^class_token", "cls_token"),
    (r"^encoder\.pos_embedding", "pos_embed"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"^encoder\.ln\.", "norm."),
    (r"ln_(\d)", r"norm\1"),
    (r"self_attention\.in_proj_", "attn.qkv."),
    (r"self_attention\.out_proj", "attn.proj"),
    (r"mlp\.(0|linear_1)\.", "mlp.fc1."),
    (r"mlp\.(3|linear_2)\.", "mlp.fc2."),
    (r"^heads\.(head|0)\.", "head."),
)
_NOTHING = r"(?!)"


def class_names() -> list[str]:
    """ImageNet-1k's classes as torchvision writes them."""
    info = ImageNetInfo("imagenet-1k")
    names = [info.index_to_description(index).partition(",")[0] for index in range(info.num_classes())]
    names[134], names[639] = "crane bird", "maillot tank suit"
    return names


def convert(name: str, architecture: str, checkpoint: Path | None, with_weights: bool) -> Conversion:
    """A model of torchvision whose weights are in a file; see `converted.convert`.

    A file that torchvision does not publish is taken to want the preprocessing of its training scripts: resized with
    a bilinear filter to 8/7 of the crop. Its image size is that of its positions.
    """
    if architecture not in ARCHITECTURES:
        close = nearest(architecture, ARCHITECTURES) or f" These can be converted: {', '.join(ARCHITECTURES)}."
        raise UserError(f"unknown model {name!r}.{close}")
    if checkpoint is None and with_weights:
        raise UserError(
            f"model {name!r} needs its weights: fetch a file of torchvision.models.get_model_weights({architecture!r}) "
            "and give it as --checkpoint FILE."
        )
    patch, depth, heads, width = ARCHITECTURES[architecture]
    state = common.read_weights(checkpoint, _NAMES, _NOTHING) if checkpoint else None
    positions = (state or {}).get("pos_embed")
    patches = positions.shape[1] - 1 if positions is not None and positions.ndim == 3 else 0
    side, outputs = patch * (math.isqrt(max(0, patches)) or 224 // patch), count_outputs(state or {}) or 1000
    arguments = dict(
        img_size=side, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=outputs,
        norm_layer=partial(LayerNorm, eps=1e-6),
    )  # fmt: skip
    told = dict(architecture=architecture, input_size=(3, side, side), num_classes=outputs, classifier="head")
    cfg = _preprocessing(checkpoint, architecture, side) | told
    return Conversion(common.builder(name, VisionTransformer, arguments, cfg), state, checkpoint)


def _preprocessing(checkpoint: Path | None, architecture: str, side: int) -> dict[str, Any]:
    mean_std: dict[str, Any] = dict(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, crop_mode="center")
    known = None
    if checkpoint:
        with checkpoint.open("rb") as file:
            known = OFFICIAL.get(hashlib.file_digest(file, "sha256").hexdigest()[:8])
    if known is None or known[0] != architecture:
        return mean_std | dict(crop_pct=0.875, interpolation="bilinear")
    _, resized, interpolation = known
    crop_pct = common.crop(side, resized)
    return mean_std | dict(crop_pct=crop_pct, interpolation=interpolation, label_names=class_names())
