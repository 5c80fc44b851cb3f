"""DCT: the cosine transform of Fourier Transformer, He et al., ACL 2023 (arXiv 2305.15099), on a ViT's tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokbench.fusion.core import Assignment, Method, View, after_prefix, constant, register_method, score_dtype


@register_method
@dataclass(frozen=True)
class DCT(Method):
    """Drop the r highest frequencies of the sequence of patch tokens: a cosine transform, cut off, transformed back.

    No token survives as such. In the token map, and where attention looks at places, an output token stands for the
    stretch of the sequence that it is the resampled value of.
    """

    name = "dct"
    paper = "He et al., Fourier Transformer, Findings of ACL 2023, arXiv 2305.15099; as ported to ViTs by PiToMe's code"
    place = "end"
    tracks_size = False

    def plan(self, view: View, r: int) -> Assignment:
        prefix, before, after = view.prefix, view.patches, view.patches - r
        batch, tokens, _ = view.x.shape
        source, kept = (torch.arange(count, device=view.x.device).expand(batch, -1) for count in (before, after))
        kept = (2 * kept + 1) * before // (2 * after)
        slot = (2 * source + 1) * after // (2 * before)
        weight = (torch.arange(tokens, device=view.x.device) < prefix).expand(batch, -1)
        mix = resampling(before, after, view.x.device, score_dtype(view.x))
        return Assignment(after_prefix(prefix, kept + prefix), source + prefix, slot + prefix, weight, mix=mix)


@constant(256)
def resampling(before: int, after: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """What makes `after` tokens of `before` by their low frequencies: (after, before)."""
    with torch.inference_mode(False):  # kept for passes with gradients, too
        return torch.from_numpy(_cosines(after).T @ _cosines(before)[:after]).to(device, dtype)


def _cosines(length: int) -> NDArray[np.float64]:
    """The orthonormal DCT-II as a matrix, a row for each frequency."""
    k, i = np.arange(length)[:, None], np.arange(length)
    return np.sqrt((1 + (k > 0)) / length) * np.cos(np.pi * (2 * i + 1) * k / (2 * length))
