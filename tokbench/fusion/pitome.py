"""PiToMe: Tran et al., NeurIPS 2024 (arXiv 2405.16148)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from tokbench.fusion.core import Assignment, Method, View, after_prefix, best_proposals, pick, register_method


@register_method
@dataclass(frozen=True)
class PiToMe(Method):
    """Merge where energy is high: tokens that resemble many others are redundant, isolated ones are kept.

    energyᵢ = meanⱼ elu(cos(kᵢ, kⱼ) − m), with a margin m that falls over the depth (equation 4). In the first half of
    the blocks all patch tokens take part in the matching, then only the 2r of highest energy.
    """

    name = "pitome"
    paper = "Tran et al., Accelerating Transformers with Spectrum-Preserving Token Merging, NeurIPS 2024, 2405.16148"

    def limit(self, patches: int, prefix: int) -> int:
        return patches // 2  # what its sets allow: tokens go from A, every other one of the sorted list

    def plan(self, view: View, r: int) -> Assignment:
        prefix, metric = view.prefix, view.mean_keys()[:, view.prefix :]
        unit = (view.kernel("unit", metric) or partial(F.normalize, dim=-1))(metric)
        cosine = unit @ unit.mT
        margin = 0.75 - 0.75 * view.block / view.depth
        energy = (view.kernel("energy", cosine) or mean_elu)(cosine, margin)
        ranked = energy.argsort(dim=-1, descending=True, stable=True)

        matched, isolated = ranked, ranked[:, :0]
        if view.block >= (view.depth + 1) // 2:
            matched, isolated = ranked[:, : 2 * r], ranked[:, 2 * r :]
        ordered = pick(unit, matched)
        propose = view.kernel("best_proposals", unit) or best_proposals
        kept, source, slot = propose(ordered[:, ::2] @ ordered[:, 1::2].mT, 0, r, by_score=True)
        kept = after_prefix(prefix, isolated + prefix, matched.gather(1, kept) + prefix)
        return Assignment(kept, matched.gather(1, source) + prefix, slot + prefix + isolated.shape[1])


def mean_elu(cosine: Tensor, margin: float) -> Tensor:
    """Energies (B, T) from cosines (B, T, T)."""
    return F.elu(cosine - margin, inplace=True).mean(-1)
