"""ATC: Agglomerative Token Clustering, Haurum et al., ECCV 2024 (arXiv 2409.11923)."""

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
    both_ways_alike,
    chosen_first,
    one_of,
    register_method,
)


@register_method
@dataclass(frozen=True)
class ATC(Method):
    """Join the two nearest clusters of patches, by the cosine distance of their keys, r times; each becomes its mean.

    linkage: the distance of two clusters is the "average", the least ("single") or the largest ("complete") of their
    members'. prop_attn: proportional attention.
    """

    name = "atc"
    paper = "Haurum et al., Agglomerative Token Clustering, ECCV 2024, arXiv 2409.11923"

    linkage: str = "average"
    prop_attn: bool = True

    check_linkage = staticmethod(one_of("average", "single", "complete"))

    @property
    def proportional(self) -> bool:  # type: ignore[override]
        return self.prop_attn

    def plan(self, view: View, r: int) -> Assignment:
        prefix = view.prefix
        cluster = self.clusters(view.mean_keys()[:, prefix:], r)
        is_first = cluster == torch.arange(view.patches, device=cluster.device)
        order = chosen_first(is_first)
        kept, source = order[:, :-r], order[:, -r:]
        slot = (is_first.cumsum(1) - 1).gather(1, cluster.gather(1, source))
        return Assignment(after_prefix(prefix, kept + prefix), source + prefix, slot + prefix)

    def clusters(self, metric: Tensor, joins: int) -> Tensor:
        """For each token of metric (B, T, d) the first member of its cluster, after so many joins: (B, T)."""
        batch, tokens, _ = metric.shape
        unit = F.normalize(metric, dim=-1)
        apart = both_ways_alike(1 - unit @ unit.mT, alone=torch.inf)
        everyone = torch.arange(tokens, device=metric.device)
        cluster, members = everyone.expand(batch, -1), torch.ones_like(apart[:, 0])
        image = torch.arange(batch, device=metric.device)
        for _ in range(joins):
            nearest = apart.flatten(1).argmin(1)
            first, second = nearest // tokens, nearest % tokens  # the first is the lower, for it is met before
            joined = self.link(apart[image, first], apart[image, second], members, first, second)
            gone = (everyone == second.unsqueeze(1)) | (everyone == first.unsqueeze(1))
            joined = joined.masked_fill(gone, torch.inf)
            is_first, is_second = (everyone == one.unsqueeze(1) for one in (first, second))
            apart = torch.where(is_first.unsqueeze(2), joined.unsqueeze(1), apart)
            apart = torch.where(is_first.unsqueeze(1), joined.unsqueeze(2), apart)
            apart = apart.masked_fill(is_second.unsqueeze(1) | is_second.unsqueeze(2), torch.inf)
            members = members + torch.where(is_first, members.gather(1, second.unsqueeze(1)), 0)
            cluster = torch.where(cluster == second.unsqueeze(1), first.unsqueeze(1), cluster)
        return cluster

    def link(self, one: Tensor, other: Tensor, members: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Distances of a joined cluster, from those of its two parts, (B, T)."""
        if self.linkage == "single":
            return one.minimum(other)
        if self.linkage == "complete":
            return one.maximum(other)
        n, m = members.gather(1, first.unsqueeze(1)), members.gather(1, second.unsqueeze(1))
        return (n * one + m * other) / (n + m)
