"""Where a timm ViT keeps what tokbench asks of it: NaFlexVit has its tokens in another place than all others."""

from __future__ import annotations

from typing import Any

from tokbench.errors import UserError
from tokbench.measure._model import resolve_input_size


def is_fused(model: Any) -> bool:
    """Whether all of a model's attention is PyTorch's fused one, as it is in timm unless one turns it off."""
    return all(getattr(block.attn, "fused_attn", True) for block in model.blocks)


def write_attention_out(model: Any) -> None:
    """Have a model attend without fused kernels; methods put into it then go by their definitions alone."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def stem(model: Any) -> Any:
    """The module that turns images into tokens."""
    return model.patch_embed if hasattr(model, "patch_embed") else model.embeds


def has_class_token(model: Any) -> bool:
    """Whether the first token is one that classes are read from."""
    holder = model if hasattr(model, "cls_token") else model.embeds
    return holder.cls_token is not None


def takes_any_size(model: Any) -> bool:
    """Whether one model takes images of several sizes, so that only a forward pass tells how many tokens there are."""
    return hasattr(model, "embeds") or not model.patch_embed.strict_img_size


def grid_for(model: Any, input_size: int | tuple[int, ...] | None = None) -> tuple[int, int]:
    """Rows and columns of patches of an image; None: of one that the model was built for.

    Raises UserError for a size that the model does not take.
    """
    _, *sides = resolve_input_size(model, input_size)
    if not takes_any_size(model) and tuple(sides) != (built := resolve_input_size(model, None)[1:]):
        raise UserError(f"the model takes images of {built[0]}×{built[1]} pixels, not {sides[0]}×{sides[1]}")
    rows, columns = stem(model).dynamic_feat_size(tuple(sides))
    return int(rows), int(columns)
