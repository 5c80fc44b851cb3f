"""MSTM: Multi-Scale And Token Mergence, Bian et al. 2023 (arXiv 2306.04897), in its training-free form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokbench.fusion.core import Assignment, Method, View, after_prefix, pick, register_method, wide


@register_method
@dataclass(frozen=True)
class MSTM(Method):
    """Keep the patch tokens that the class token attends to most; merge each other one into the most similar of them.

    Similarity is the cosine of f = k̄ + scale_weight · Σ pool_m(k̄), m in `scales`. The paper learns its multi-scale
    features in training; here they are the keys averaged over m×m windows of the patch grid.
    """

    name = "mstm"
    paper = "Bian et al., Multi-Scale And Token Mergence: Make Your ViT More Efficient, 2023, arXiv 2306.04897"
    proportional = True
    needs_map = True
    flops_shape = "keep"

    scales: tuple[int, ...] = (2, 4)
    scale_weight: float = 0.5

    @staticmethod
    def check_scales(value: object, default: object) -> str:
        """What a value must be, "" if it is that."""
        sides = isinstance(value, tuple) and all(isinstance(side, int) and side > 0 for side in value)
        return "" if sides else "a list of window sides, such as [2,4]"

    def plan(self, view: View, r: int) -> Assignment:
        prefix = view.prefix
        attention = view.class_attention().clamp_min(1e-30)  # softmax can underflow to 0, a mean needs some weight
        ranked = attention[:, prefix:].argsort(dim=-1, descending=True, stable=True)
        crucial, rest = (part.sort(dim=-1).values for part in (ranked[:, :-r], ranked[:, -r:]))
        unit = F.normalize(self.features(view)[:, prefix:], dim=-1)
        partner = (pick(unit, rest) @ pick(unit, crucial).mT).argmax(-1)
        weight = attention if view.size is None else attention * view.size
        return Assignment(after_prefix(prefix, crucial + prefix), rest + prefix, partner + prefix, weight)

    def features(self, view: View) -> Tensor:
        """f: (B, N, d)."""
        assert view.token_map is not None
        keys, owner = view.mean_keys(), view.token_map[:, view.prefix :]
        cells = pick(keys, owner).mT.unflatten(-1, view.grid)
        pooled = torch.zeros_like(cells)
        for side in self.scales:
            pooled += _pooled(cells, side)
        # Averaged over each token's own cells.
        summed = torch.zeros_like(keys).scatter_add_(1, wide(owner, keys), pooled.flatten(2).mT)
        count = torch.zeros_like(keys[..., 0]).scatter_add_(1, owner, torch.ones_like(owner, dtype=keys.dtype))
        return keys + self.scale_weight * summed / count.clamp_min(1).unsqueeze(-1)


def _pooled(cells: Tensor, side: int) -> Tensor:
    """To each cell of a grid (B, d, rows, columns) the mean of the side×side window that it is in."""
    rows, columns = cells.shape[2:]
    pooled = F.avg_pool2d(cells, side, ceil_mode=True)
    return pooled.repeat_interleave(side, 2).repeat_interleave(side, 3)[:, :, :rows, :columns]
