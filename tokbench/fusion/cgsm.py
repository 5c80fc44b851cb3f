"""CGSM: complete-graph soft matching of CrossGET, Shi et al., ICML 2024 (arXiv 2305.17455)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tokbench.fusion.core import (
    Assignment,
    Method,
    View,
    after_prefix,
    between,
    both_ways_alike,
    inverse,
    one_of,
    register_method,
    score_dtype,
)


@register_method
@dataclass(frozen=True)
class CGSM(Method):
    """Merge the r tokens that are most like one of lower rank, each into the most similar token that stays.

    Any two patches may merge, not only those across two sets; ranks, by a token's best similarity, keep pairs from
    choosing each other. metric: the "keys" of all heads laid end to end, or "mean_keys".
    """

    name = "cgsm"
    paper = "Shi et al., CrossGET, ICML 2024, arXiv 2305.17455"

    prop_attn: bool = True
    metric: str = "keys"

    check_metric = staticmethod(one_of("keys", "mean_keys"))

    @property
    def proportional(self) -> bool:  # type: ignore[override]
        return self.prop_attn

    def limit(self, patches: int, prefix: int) -> int:
        return patches // 2

    def plan(self, view: View, r: int) -> Assignment:
        prefix = view.prefix
        keys = view.keys.transpose(1, 2).flatten(2) if self.metric == "keys" else view.mean_keys()
        unit = F.normalize(keys[:, prefix:].to(score_dtype(keys)), dim=-1)
        alike = both_ways_alike(unit @ unit.mT, alone=-torch.inf)
        rank = inverse(alike.amax(-1).argsort(dim=-1, descending=True, stable=True))
        lower = rank.unsqueeze(1) > rank.unsqueeze(2)
        score = alike.masked_fill(~lower, -torch.inf).amax(-1)
        ranked = score.argsort(dim=-1, descending=True, stable=True)
        source, stay = ranked[:, :r], ranked[:, r:]
        partner = between(alike, source, stay).argmax(-1)
        kept, order = stay.sort(dim=1)
        slot = inverse(order).gather(1, partner)
        return Assignment(after_prefix(prefix, kept + prefix), source + prefix, slot + prefix)
