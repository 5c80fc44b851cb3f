"""Weights from a file, put under a model's names and checked against its shapes."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import timm.models
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tokbench.errors import UserError
from tokbench.fusion.anatomy import grid_for

Grid = tuple[int, int]
Vit = VisionTransformer | Eva


def with_timms_names(state: dict[str, Tensor], model: Any, any_size: bool) -> dict[str, Tensor]:
    """Weights as the model's authors publish them (OpenAI's CLIP, Meta's DINOv2, …) under the names timm has for them.

    The same weights where timm knows no such conversion, or where it does not lead to this model's names. timm would
    also resample patches of another size: that is a model nobody trained. Positions stay as they are in the file, but
    for biases by relative position, if the caller asked for a size of image (`any_size`).
    """
    own = model.state_dict().keys()
    architecture = model.pretrained_cfg.get("architecture") or ""
    if state.keys() == own or not timm.models.is_model(architecture):
        return state
    convert = sys.modules[timm.models.model_entrypoint(architecture).__module__].checkpoint_filter_fn
    positions = getattr(model, "pos_embed", None)
    if positions is not None:
        model.pos_embed = None  # what timm would resample the file's to
    try:
        converted: dict[str, Tensor] = convert(dict(state), model)
    except (LookupError, RuntimeError, ValueError, TypeError, AttributeError):
        return state  # none of the formats it knows: what does not fit is then named as it stands in the file
    finally:
        if positions is not None:
            model.pos_embed = positions
    if converted.keys() != own:
        return state
    kept = [name for name in own if name.endswith(("embed.proj.weight", "embeds.proj.weight"))]
    kept += [name for name in own if name.endswith("relative_position_bias_table") and not any_size]
    for name in kept:
        if not any(_same_numbers(converted[name], tensor) for tensor in state.values()):
            # What is told to differ is then the shape it has in the file.
            stored = (tensor for key, tensor in state.items() if key.endswith((name, "conv1.weight")))
            converted[name] = next(stored, torch.empty(0))
    return converted


def _same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether one is the other, perhaps in another order."""
    if a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr():
        return True
    return a.numel() == b.numel() and torch.equal(a.flatten().sort().values, b.flatten().sort().values)


def resample_positions(state: dict[str, Tensor], model: Vit, native: Grid, *, antialias: bool = True) -> None:
    """Bring the positions in `state` to the model's grid, in place, if all its names are the model's.

    `native`: the patches (rows, columns) of the model at its own size. They are the file's too if it has as many
    positions; another number is taken for a square's if `native` is a square. Raises UserError if the grid of the
    file cannot be told.
    """
    old = state.get("pos_embed")
    is_fit = old is not None and old.ndim == 3 and len(old) == 1 and old.numel()
    if old is None or not is_fit or state.keys() != model.state_dict().keys():
        return
    prefix = _embedded_prefix_tokens(model)
    count = old.shape[1] - prefix
    side = math.isqrt(max(0, count))
    if count == math.prod(native):
        source = native
    elif count > 0 and side**2 == count and native[0] == native[1]:
        source = side, side
    else:
        raise UserError(
            f"the checkpoint has positions for {count} patches, which are no square and not the {native[0]}×{native[1]}"
            " of this model: the grid they lie on cannot be told, so they cannot be brought to another input size."
        )
    target = grid_for(model)
    if source != target:
        state["pos_embed"] = resample_abs_pos_embed(old, list(target), list(source), prefix, antialias=antialias)


def _embedded_prefix_tokens(model: Vit) -> int:
    return 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens


def require_match(state: Mapping[str, Tensor], model: Vit, complaint: str) -> None:
    """Raise UserError, beginning with `complaint`, unless names, shapes and kinds of number are the model's."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    file = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = [
        f"{name} is {file[name]} in the file, {own[name]} in the model"
        for name in own
        if name in file and file[name] != own[name]
    ]
    wrong += [
        f"{name} holds {str(state[name].dtype).removeprefix('torch.')} numbers"
        for name, tensor in model.state_dict().items()
        if name in file and tensor.is_floating_point() and not state[name].is_floating_point()
    ]
    wrong += [f"{name} {own[name]} is not in the file" for name in own if name not in file]
    wrong += [f"{name} {file[name]} is not in the model" for name in file if name not in own]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        hint = _size_hint(state["pos_embed"], model) if len(wrong) == 1 and wrong[0].startswith("pos_embed is") else ""
        raise UserError(f"{complaint}: {'; '.join(wrong[:3])}{more}.{hint}")


def _size_hint(positions: Tensor, model: Vit) -> str:
    count = positions.shape[1] - _embedded_prefix_tokens(model) if positions.ndim == 3 else 0
    side = math.isqrt(max(0, count))
    if not side or side**2 != count:
        return ""
    return f" Its positions look like those of input_size {side * model.patch_embed.feat_ratio()}."
