"""What timm does to an image before the model sees it, and the way back."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import numpy as np
import torch
from timm.data.config import resolve_model_data_config
from timm.data.transforms import MaybeToTensor
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn

from tokbench.data.labels import Labelling
from tokbench.data.sources import Preparation
from tokbench.errors import UserError
from tokbench.measure._model import resolve_input_size


def preparation(model: nn.Module, labelling: Labelling) -> Preparation:
    """How images and labels become what the model takes."""
    config = data_config(model)
    whole: Any = create_transform(**config, is_training=False)
    tensor = next(place for place, step in enumerate(whole.transforms) if isinstance(step, MaybeToTensor))
    crop = type(whole)(whole.transforms[:tensor])  # behind it floats are made and normalized, as `Preparation` does
    channels, height, width = config["input_size"]
    mean, std = (tuple(config[key]) for key in ("mean", "std"))
    return Preparation(image_mode(config), (height, width, channels), crop, mean, std, labelling)


def data_config(model: nn.Module) -> dict[str, Any]:
    """timm's preprocessing for the model, at the size and with the channels it was built for."""
    config: dict[str, Any] = resolve_model_data_config(model, args={"input_size": resolve_input_size(model, None)})
    channels = config["input_size"][0]
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            config[key] = (fmean(config[key]),) * channels
    return config


def image_mode(config: dict[str, Any]) -> str:
    """Pillow's mode for the model's channels. Raises UserError for other than 1 and 3."""
    channels = config["input_size"][0]
    if channels not in (1, 3):
        raise UserError(f"the model takes {channels} channels; images have 1 (grey) or 3 (color).")
    return "L" if channels == 1 else "RGB"


def to_pictures(images: Tensor, model: nn.Module) -> np.ndarray:
    """What a model sees, to look at: preprocessed (B, C, H, W) → (B, H, W, 3), values from 0 to 1."""
    config = data_config(model)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    colors = (images * std + mean).clamp(0, 1).expand(-1, 3, -1, -1)
    return colors.permute(0, 2, 3, 1).numpy()
