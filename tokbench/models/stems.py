"""What timm and tokbench ask of a patch embedding, for stems that end on a grid of 16 × 16 pixels."""

from __future__ import annotations

from timm.layers import to_2tuple
from torch import Tensor, nn

PATCH = 16


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
