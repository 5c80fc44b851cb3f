"""PiToMe: Tran et al., NeurIPS 2024 (arXiv 2405.16148)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor

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
        metric = view.mean_keys()[:, view.prefix :]
        unit = (view.kernel("unit", metric) or partial(F.normalize, dim=-1))(metric)
        margin = 0.75 - 0.75 * view.block / view.depth
        matched = view.patches if view.block < (view.depth + 1) // 2 else 2 * r
        choose = view.kernel("by_energy", unit) or by_energy
        return Assignment(*choose(unit @ unit.mT, view.prefix, r, matched, margin))


def by_energy(cosine: Tensor, prefix: int, r: int, matched: int, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    """Which r of the `matched` tokens of highest energy go, by the cosines (B, T, T) of the T patch tokens.

    Returns kept: (B, P + T − r); source: (B, r); slot: (B, r).
    """
    energy = F.elu(cosine - margin).mean(-1)
    ranked = energy.argsort(dim=-1, descending=True, stable=True)
    a, b, apart = ranked[:, :matched:2], ranked[:, 1:matched:2], ranked[:, matched:]
    best, partner = pick(cosine, a).gather(2, b.unsqueeze(1).expand(-1, a.shape[1], -1)).max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    source, stay = a.gather(1, order[:, :r]), a.gather(1, order[:, r:])
    kept = after_prefix(prefix, apart + prefix, stay + prefix, b + prefix)
    return kept, source + prefix, partner.gather(1, order[:, :r]) + prefix + apart.shape[1] + stay.shape[1]
