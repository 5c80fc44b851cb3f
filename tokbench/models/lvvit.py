"""LV-ViT: Jiang et al., All Tokens Matter, NeurIPS 2021 (arXiv 2104.10858), as timm VisionTransformers.

timm has none of them. Its VisionTransformer with a convolutional stem, LayerScale for the authors' division of each
branch, and a head that also looks at every patch is their model; their checkpoints, to be given with `--checkpoint`,
load after `checkpoint_filter_fn`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokbench.models.stems import PATCH, Stem, configurations, register


class ConvStem(Stem):
    """Three convolutions with batch norm at half the image's size, and one that cuts patches.

    Takes timm's arguments of a patch embedding; width: channels of the first three.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        width: int = 64,
        **kind: Any,
    ) -> None:
        super().__init__(img_size)
        self.conv1 = nn.Conv2d(in_chans, width, 7, stride=2, padding=3, bias=False, **kind)
        self.bn1 = nn.BatchNorm2d(width, **kind)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False, **kind)
        self.bn2 = nn.BatchNorm2d(width, **kind)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False, **kind)
        self.bn3 = nn.BatchNorm2d(width, **kind)
        self.proj = nn.Conv2d(width, embed_dim, PATCH // 2, stride=PATCH // 2, bias=bias, **kind)

    def forward(self, x: Tensor) -> Tensor:
        self.require_size(x)
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = norm(conv(x)).relu()
        return self.proj(x).flatten(2).mT


class DenseHead(nn.Linear):
    """The class token's logits, and half of what the patch that says it loudest adds, class by class.

    (B, 1 + T, C) → (B, classes). The maximum runs over the patch tokens that are left, whatever their sizes.
    """

    def __init__(self, dim: int, classes: int, **kind: Any) -> None:
        super().__init__(dim, classes, **kind)
        self.aux = nn.Linear(dim, classes, **kind)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, 0]) + 0.5 * self.aux(x[:, 1:]).amax(1)


# skip_lam: what the authors divide each branch by.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "lvvit_t": dict(embed_dim=240, depth=12, num_heads=4, skip_lam=1.0),
    "lvvit_s": dict(embed_dim=384, depth=16, num_heads=6, skip_lam=2.0),
    "lvvit_m": dict(embed_dim=512, depth=20, num_heads=8, skip_lam=2.0),
    "lvvit_l": dict(embed_dim=768, depth=24, num_heads=12, skip_lam=3.0, stem_width=128),
}

_configured = partial(
    configurations, paper="2104.10858", origin="https://github.com/zihangJiang/TokenLabeling",
    first_conv="patch_embed.conv1", classifier=("head", "head.aux"),
)  # fmt: skip
default_cfgs = _configured(["lvvit_t", "lvvit_s"]) | _configured(["lvvit_m", "lvvit_l"], crop_pct=1.0)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The authors' weights under timm's names, with LayerScale's, which are constants of theirs."""
    state = {name.replace("aux_head.", "head.aux."): tensor for name, tensor in state_dict.items()}
    for number, block in enumerate(model.blocks):
        for name in ("ls1", "ls2"):
            scale = getattr(block, name)
            state.setdefault(f"blocks.{number}.{name}.gamma", torch.full(scale.gamma.shape, scale.init_values))
    return state


def _build(stem_width: int = 64, skip_lam: float = 2.0, **options: Any) -> VisionTransformer:
    """LV-ViT of any size: `options` are those of timm's VisionTransformer."""
    shape: dict[str, Any] = dict(patch_size=PATCH, mlp_ratio=3.0, qkv_bias=False, init_values=1 / skip_lam)
    parts = dict(norm_layer=partial(LayerNorm, eps=1e-5), embed_layer=partial(ConvStem, width=stem_width))
    model = VisionTransformer(**{**shape, **parts, "global_pool": "", **options})
    if model.num_classes:
        weight = model.head.weight
        model.head = DenseHead(model.embed_dim, model.num_classes, device=weight.device, dtype=weight.dtype)
    return model


for _name, _arguments in ARCHITECTURES.items():
    register(_name, __name__, _build, _arguments)
