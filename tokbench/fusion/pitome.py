"""PiToMe: Tran et al., NeurIPS 2024 (arXiv 2405.16148)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F

from tokbench.fusion.core import Assignment, Method, View, after_prefix, pick, register_method


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
        unit = F.normalize(view.mean_keys()[:, view.prefix :], dim=-1)
        cosine = unit @ unit.mT
        margin = 0.75 - 0.75 * view.block / view.depth
        energy = F.elu(cosine - margin, inplace=True).mean(-1)
        ranked = energy.argsort(dim=-1, descending=True, stable=True)

        everywhere = view.block < (view.depth + 1) // 2
        matched = ranked if everywhere else ranked[:, : 2 * r]
        a, b = matched[:, ::2], matched[:, 1::2]
        columns = b.unsqueeze(1).expand(-1, a.shape[1], -1)
        best, partner = pick(cosine, a).gather(2, columns).max(-1)
        if everywhere:
            order = best.argsort(dim=-1, descending=True, stable=True)
            source, stay = a.gather(1, order[:, :r]), a.gather(1, order[:, r:])
            partner = partner.gather(1, order[:, :r])
        else:
            source, stay = a, ranked[:, 2 * r :]
        kept = after_prefix(view.prefix, stay + view.prefix, b + view.prefix)
        return Assignment(kept, source + view.prefix, partner + view.prefix + stay.shape[1])
