"""DPC-KNN: density peaks, as in TCFormer, Zeng et al., CVPR 2022 (arXiv 2204.08680)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokbench.fusion.core import Assignment, Method, View, after_prefix, between, distances, register_method, whole


@register_method
@dataclass(frozen=True)
class DPCKNN(Method):
    """Cluster around tokens that many are near to and that are far from any denser one; each cluster becomes its mean.

    Density is by the `neighbors` nearest tokens, itself among them. In the form of Haurum et al. 2023 (arXiv
    2308.04657), without learned weights.
    """

    name = "dpcknn"
    paper = "Zeng et al., Not All Tokens Are Equal (TCFormer), CVPR 2022, arXiv 2204.08680"
    place = "start"
    flops_shape = "keep"

    neighbors: int = 5

    check_neighbors = staticmethod(whole(1))

    def plan(self, view: View, r: int) -> Assignment:
        x, prefix = view.x[:, view.prefix :], view.prefix
        apart = distances(x) / x.shape[-1] ** 0.5
        nearest = apart.topk(min(self.neighbors, view.patches), largest=False).values
        spread = nearest.square().mean(-1)  # density is exp(−spread), which may be no float32
        place = torch.arange(view.patches, device=x.device)
        i, j = spread.unsqueeze(2), spread.unsqueeze(1)
        denser = (j < i) | ((j == i) & (place < place.unsqueeze(1)))
        peak = apart.masked_fill(~denser, torch.inf).amin(-1)
        peak = torch.where(denser.any(-1), peak, apart.amax((1, 2)).unsqueeze(1))
        ranked = (peak.log() - spread).argsort(dim=-1, descending=True, stable=True)
        centres, rest = ranked[:, :-r], ranked[:, -r:]
        nearest_centre = between(apart, rest, centres).argmin(-1)
        weight = torch.ones_like(view.x[..., 0], dtype=apart.dtype)
        return Assignment(after_prefix(prefix, centres + prefix), rest + prefix, nearest_centre + prefix, weight)
