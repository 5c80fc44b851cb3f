"""T2T-ViT: Yuan et al., Tokens-to-Token ViT, ICCV 2021 (arXiv 2101.11986), as timm VisionTransformers.

timm has none of them. Its VisionTransformer with `TokensToToken` for a stem is the authors' model; their checkpoints,
to be given with `--checkpoint`, load after `checkpoint_filter_fn`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokbench.fusion.core import score_dtype
from tokbench.models.stems import PATCH, Stem, configurations, register

NORM = partial(LayerNorm, eps=1e-5)
WIDTH = 64  # of the tokens inside the stem
FEATURES = WIDTH // 2  # of the Performer's kernel


class PerformerStep(nn.Module):
    """A layer with attention of a kernel, linear in the tokens, that leaves the width: (B, N, `dim`) → (B, N, 64).

    With φ(u) = exp(u wᵀ − ‖u‖²/2) / √m, y_t = φ(q_t)·Σ φ(k)ᵀv / (φ(q_t)·Σ φ(k)). The values are its residual.
    """

    def __init__(self, dim: int, **kind: Any) -> None:
        super().__init__()
        self.norm1 = NORM(dim, **kind)
        self.kqv = nn.Linear(dim, 3 * WIDTH, **kind)
        self.w = nn.Parameter(torch.empty(FEATURES, WIDTH, **kind), requires_grad=False)
        self.proj = nn.Linear(WIDTH, WIDTH, **kind)
        self.norm2 = NORM(WIDTH, **kind)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH, **kind), nn.GELU(), nn.Linear(WIDTH, WIDTH, **kind))
        if not self.w.is_meta:
            nn.init.orthogonal_(self.w, gain=math.sqrt(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        # As the authors do: the exponential overflows in half precision.
        with torch.autocast(x.device.type, enabled=False):
            y = self.attend(*(part.to(score_dtype(part)) for part in (q, k, v)))
        x = v + self.proj(y.to(v.dtype))
        return x + self.mlp(self.norm2(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each (B, N, 64), in float32 at least."""
        q, k = self.kernel(q), self.kernel(k)
        total = q @ k.sum(1).unsqueeze(-1)
        return q @ (k.mT @ v) / (total + 1e-8)

    def kernel(self, u: Tensor) -> Tensor:
        """φ(u): (B, N, 64) → (B, N, 32)."""
        return (u @ self.w.to(u.dtype).mT - u.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(FEATURES)


class OneHead(nn.Module):
    """Attention of one head that leaves the width: (B, N, `dim`) → (B, N, 64), the values being its residual."""

    def __init__(self, dim: int, **kind: Any) -> None:
        super().__init__()
        self.scale = dim**-0.5  # of the width that comes in, not of the head
        self.qkv = nn.Linear(dim, 3 * WIDTH, bias=False, **kind)
        self.proj = nn.Linear(WIDTH, WIDTH, **kind)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        out: Tensor = v + self.proj(attended)
        return out.squeeze(1)


class TransformerStep(nn.Module):
    """A layer with softmax attention that leaves the width: (B, N, `dim`) → (B, N, 64)."""

    def __init__(self, dim: int, **kind: Any) -> None:
        super().__init__()
        self.norm1 = NORM(dim, **kind)
        self.attn = OneHead(dim, **kind)
        self.norm2 = NORM(WIDTH, **kind)
        self.mlp = Mlp(WIDTH, WIDTH, **kind)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokensToToken(Stem):
    """T2T-ViT's stem (section 3.1): windows that overlap become tokens, three times, with a layer between.

    Takes timm's arguments of a patch embedding; step: the layer between.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        step: Callable[..., nn.Module] = PerformerStep,
        **kind: Any,
    ) -> None:
        super().__init__(img_size)
        self.attention1 = step(in_chans * 7 * 7, **kind)
        self.attention2 = step(WIDTH * 3 * 3, **kind)
        self.project = nn.Linear(WIDTH * 3 * 3, embed_dim, bias=bias, **kind)

    def forward(self, x: Tensor) -> Tensor:
        self.require_size(x)
        rows, columns = self.img_size
        x = self.attention1(F.unfold(x, 7, stride=4, padding=2).mT)
        x = F.unfold(x.mT.unflatten(2, (rows // 4, columns // 4)), 3, stride=2, padding=1)
        x = self.attention2(x.mT)
        x = F.unfold(x.mT.unflatten(2, (rows // 8, columns // 8)), 3, stride=2, padding=1)
        return self.project(x.mT)


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "t2t_vit_7": dict(embed_dim=256, depth=7, num_heads=4, mlp_ratio=2.0),
    "t2t_vit_10": dict(embed_dim=256, depth=10, num_heads=4, mlp_ratio=2.0),
    "t2t_vit_12": dict(embed_dim=256, depth=12, num_heads=4, mlp_ratio=2.0),
    "t2t_vit_14": dict(embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.0),
    "t2t_vit_19": dict(embed_dim=448, depth=19, num_heads=7, mlp_ratio=3.0),
    "t2t_vit_24": dict(embed_dim=512, depth=24, num_heads=8, mlp_ratio=3.0),
}
ARCHITECTURES |= {f"t2t_vit_t_{size}": ARCHITECTURES[f"t2t_vit_{size}"] for size in ("14", "19", "24")}

default_cfgs = configurations(
    ARCHITECTURES, "2101.11986", "https://github.com/yitu-opensource/T2T-ViT", first_conv=None
)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The authors' weights under timm's names. Their table of sinusoids is timm's `pos_embed`."""
    return {name.replace("tokens_to_token.", "patch_embed."): tensor for name, tensor in state_dict.items()}


for _name, _shape in ARCHITECTURES.items():
    _stem = partial(TokensToToken, step=TransformerStep if "_t_" in _name else PerformerStep)
    _parts: dict[str, Any] = dict(patch_size=PATCH, qkv_bias=False, norm_layer=NORM, embed_layer=_stem)
    register(_name, __name__, VisionTransformer, _shape | _parts)
