"""K-medoids: Haurum et al. 2023 (arXiv 2308.04657)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokbench.fusion.core import (
    Assignment,
    Method,
    View,
    after_prefix,
    between,
    chosen_first,
    distances,
    inverse,
    register_method,
    whole,
)


@register_method
@dataclass(frozen=True)
class KMedoids(Method):
    """Cluster by distance, starting from the most attended tokens; each cluster's medoid stays, and speaks for all.

    The medoid is the member of least cost, its distance to all tokens times the attention it receives: so the authors'
    code, and so the least attended member is favoured. iterations: rounds of assigning tokens and choosing medoids.
    """

    name = "kmedoids"
    paper = "Haurum et al., Which Tokens to Use? Investigating Token Reduction in ViTs, ICCVW 2023, arXiv 2308.04657"
    place = "end"
    flops_shape = "keep"

    iterations: int = 3

    check_iterations = staticmethod(whole(0))

    def plan(self, view: View, r: int) -> Assignment:
        prefix = view.prefix
        received = view.attention().sum((1, 2))[:, prefix:]
        apart = distances(view.x[:, prefix:])
        by_cost = (received * apart.sum(-1)).argsort(dim=-1, stable=True)
        rank = inverse(by_cost)
        centres = received.argsort(dim=-1, descending=True, stable=True)[:, :-r]
        for _ in range(self.iterations):
            first = torch.full_like(centres, view.patches).scatter_reduce(1, nearest(apart, centres), rank, "amin")
            centres = by_cost.gather(1, first)
        chosen = torch.zeros_like(received, dtype=torch.bool).scatter(1, centres, 1)
        rest = chosen_first(chosen)[:, -r:]
        slot = nearest(apart, centres).gather(1, rest)
        weight = torch.ones_like(view.x[..., 0], dtype=apart.dtype).scatter(1, rest + prefix, 0)
        return Assignment(after_prefix(prefix, centres + prefix), rest + prefix, slot + prefix, weight)


def nearest(apart: Tensor, centres: Tensor) -> Tensor:
    """The number of each token's nearest centre, by distances (B, T, T) and centres (B, K), its own for a centre."""
    everyone = torch.arange(apart.shape[1], device=apart.device).expand(apart.shape[0], -1)
    found = between(apart, everyone, centres).argmin(-1)
    return found.scatter(1, centres, torch.arange(centres.shape[1], device=apart.device).expand_as(centres))
