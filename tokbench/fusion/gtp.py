"""GTP: Graph-based Token Propagation, Xu et al., WACV 2024 (arXiv 2311.03035)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokbench.fusion.core import (
    Assignment,
    Method,
    View,
    after_prefix,
    between,
    one_of,
    register_method,
    score_dtype,
    whole,
)


@register_method
@dataclass(frozen=True)
class GTP(Method):
    """Remove the tokens of lowest rank, and add what they were to those of their neighbours that stay.

    Ranks are by attention: what a token pays to itself, times what it receives. Who is whose neighbour is settled once,
    by the first tokens. alpha: how much is passed on. sparsity: the share of A that stays, the largest entries.
    neighbors: the most similar patches that a patch is joined to. graph: by place ("spatial"), likeness ("semantic") or
    both. token_scale: add the logarithm of tokens' scales, which are propagated too, to attention.
    """

    name = "gtp"
    paper = "Xu et al., GTP-ViT: Efficient Vision Transformers via Graph-based Token Propagation, WACV 2024, 2311.03035"
    pools_by_size = False
    needs_map = True

    alpha: float = 0.1
    sparsity: float = 1.0
    neighbors: int = 8
    graph: str = "mixed"
    token_scale: bool = True

    check_neighbors = staticmethod(whole(1))
    check_graph = staticmethod(one_of("mixed", "spatial", "semantic"))

    @staticmethod
    def check_sparsity(value: object, default: object) -> str:
        """What a value must be, "" if it is that."""
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1
        return "" if number else "a share above 0, at most 1"

    @property
    def proportional(self) -> bool:  # type: ignore[override]
        return self.token_scale

    @property
    def tracks_size(self) -> bool:  # type: ignore[override]
        return self.token_scale

    @property
    def reshapes_attention(self) -> bool:  # type: ignore[override]
        return self.sparsity < 1

    def reshape_attention(self, attention: Tensor) -> Tensor:
        """A without all below its k-th smallest entry, head by head; rows are not normalised again."""
        k = int(attention.shape[-1] ** 2 * (1 - self.sparsity))
        if k == 0:
            return attention
        least = attention.flatten(2).kthvalue(k).values
        return attention.masked_fill(attention < least[..., None, None], 0)

    def begin(self, x: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
        """The normalised graph of the patches, Ŵ: (B, T₀, T₀)."""
        patches = x[:, prefix:]
        near = torch.zeros(x.shape[0], patches.shape[1], patches.shape[1], dtype=torch.bool, device=x.device)
        if self.graph != "semantic":
            near = near | _adjacent(grid, x.device)
        if self.graph != "spatial":
            unit = F.normalize(patches.to(score_dtype(x)), dim=-1)
            alone = torch.eye(patches.shape[1], dtype=torch.bool, device=x.device)
            ranked = (unit @ unit.mT).masked_fill(alone, -torch.inf).argsort(dim=-1, descending=True, stable=True)
            near = near.scatter(2, ranked[..., : min(self.neighbors, patches.shape[1] - 1)], 1)
        degree = near.sum(-1).clamp_min(1).to(score_dtype(x))
        return near / (degree.unsqueeze(2) * degree.unsqueeze(1)).sqrt()

    def plan(self, view: View, r: int) -> Assignment:
        prefix, attention = view.prefix, view.attention()
        rank = attention.diagonal(dim1=-2, dim2=-1).amax(1) * attention.sum(2).amax(1)
        ranked = rank[:, prefix:].argsort(dim=-1, descending=True, stable=True)
        stay, gone = ranked[:, :-r], ranked[:, -r:]
        # The first tokens that are left, in the order in which they now come: all others are −1 in the map.
        assert view.token_map is not None
        origin = view.token_map.argsort(dim=1)[:, -view.patches :] - prefix
        mix = self.alpha * between(view.begun, origin.gather(1, stay), origin.gather(1, gone))
        return Assignment(after_prefix(prefix, stay + prefix), gone + prefix, mix=mix)


def _adjacent(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Which cells of a grid touch, corners included: (T₀, T₀)."""
    rows, columns = grid
    cell = torch.arange(rows * columns, device=device)
    row, column = cell // columns, cell % columns
    apart = torch.maximum((row - row.unsqueeze(1)).abs(), (column - column.unsqueeze(1)).abs())
    return apart == 1
