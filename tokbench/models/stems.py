"""What models share that timm has not: stems that end on a grid of 16 × 16 pixels, and their place among timm's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

PATCH = 16


def configurations(names: Iterable[str], paper: str, origin: str, **more: Any) -> Any:
    """timm's `default_cfgs` of models whose authors' weights are files to be given."""
    same: dict[str, Any] = dict(
        url="", num_classes=1000, input_size=(3, 224, 224), crop_pct=0.9, interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD, fixed_input_size=True, classifier="head",
        paper_ids=f"arXiv:{paper}", origin_url=origin,
    )  # fmt: skip
    return generate_default_cfgs({name: same | more for name in names})


def register(name: str, module: str, kind: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Register a model with timm as one of that module, which has `checkpoint_filter_fn` and `default_cfgs`."""
    home = sys.modules[module]

    def build(pretrained: bool = False, **options: Any) -> VisionTransformer:
        options = {"pretrained_filter_fn": home.checkpoint_filter_fn, **arguments, **options}
        return build_model_with_cfg(kind, name, pretrained, **options)

    build.__name__, build.__module__ = name, module
    setattr(home, name, register_model(build))


class Stem(nn.Module):
    """The sizes of a stem that turns images (B, channels, H, W) into tokens (B, H·W/256, C), rows first."""

    strict_img_size = True  # positions are learned for one grid

    def __init__(self, img_size: int | tuple[int, int]) -> None:
        super().__init__()
        self.patch_size = (PATCH, PATCH)
        self.set_input_size(img_size)

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: None = None) -> None:
        """Take images of another size from now on."""
        if img_size is not None:
            self.img_size: tuple[int, int] = to_2tuple(img_size)
        self.grid_size = self.img_size[0] // PATCH, self.img_size[1] // PATCH
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels from one token to the next."""
        return PATCH if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """The grid of tokens of an image of another size."""
        return img_size[0] // PATCH, img_size[1] // PATCH

    def require_size(self, x: Tensor) -> None:
        """Raise ValueError unless the images are of the size that the stem was built for."""
        if tuple(x.shape[-2:]) != self.img_size:
            raise ValueError(f"images of {tuple(x.shape[-2:])} pixels; the model was built for {self.img_size}")
