"""MCTF: Multi-Criteria Token Fusion with One-Step-Ahead Attention, Lee et al., CVPR 2024 (arXiv 2403.10030)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokbench.fusion.core import (
    Assignment,
    Method,
    View,
    after_prefix,
    best_proposals,
    first_of_sets,
    pick,
    register_method,
    two_sets,
)


@register_method
@dataclass(frozen=True)
class MCTF(Method):
    """Fuse pairs that are similar, uninformative and small (equations 3 to 7), at the start of blocks 1 to L−1.

    W = sim^(1/tau_sim) · info^(1/tau_info) · size^(1/tau_size).
    bidirectional: half of the pairs are proposed from each set (section 3.3).
    one_step_ahead: information is judged by this block's own attention on the tokens before fusion (section 3.4).
        "approximate" attends with that matrix, reduced; "precise" computes attention anew on the fused tokens;
        "off" fuses after the block, by the attention it used.
    """

    name = "mctf"
    paper = "Lee et al., Multi-criteria Token Fusion with One-step-ahead Attention, CVPR 2024, arXiv 2403.10030"
    proportional = True

    tau_sim: float = 1.0
    tau_info: float = 20.0
    tau_size: float = 40.0
    bidirectional: bool = True
    one_step_ahead: str = "approximate"

    @staticmethod
    def check_tau_sim(value: object, default: object) -> str:
        """What a value must be, "" if it is that."""
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf"):
            return ""
        return "a temperature, a number above 0"

    check_tau_info = check_tau_size = check_tau_sim

    @staticmethod
    def check_one_step_ahead(value: object, default: object) -> str:
        """What a value must be, "" if it is that."""
        return "" if value in ("approximate", "precise", "off") else "approximate, precise or off"

    @property
    def place(self) -> Literal["start", "end"]:  # type: ignore[override]
        return "end" if self.one_step_ahead == "off" else "start"

    @property
    def reuses_attention(self) -> bool:  # type: ignore[override]
        return self.one_step_ahead == "approximate"

    def acts_in(self, block: int, depth: int) -> bool:
        return block > 0

    def limit(self, patches: int, prefix: int) -> int:
        return min(patches // 2, patches + prefix - 10)

    def plan(self, view: View, r: int) -> Assignment:
        weigh = view.kernel("criteria", view.x) or criteria
        alone, weight = weigh(view.received(), view.size, self.tau_info, self.tau_size)
        propose = view.kernel("best_proposals", view.x)
        if propose is not None and self.tau_sim == 1:
            a, b = two_sets(view.kernel("unit", view.x)(view.x), view.prefix)  # type: ignore[misc]
            back = r - r // 2 if self.bidirectional else 0
            kept, source, slot = propose(a @ b.mT, view.prefix, r, back, alone)
        else:
            match = _both_ways if self.bidirectional else best_proposals
            kept, source, slot = match(self.attraction(view, alone), view.prefix, r)
        return Assignment(kept, source, slot, weight)

    def attraction(self, view: View, alone: Tensor) -> Tensor:
        """W between the tokens of A and B, (B, |A|, |B|), of which `alone` (B, N) is each token's own part."""
        a, b = two_sets(F.normalize(view.x.to(alone.dtype), dim=-1), view.prefix)
        similar = (a @ b.mT).add_(1).div_(2).clamp_min_(0) ** (1 / self.tau_sim)
        a, b = two_sets(alone, view.prefix)
        return similar.mul_(a.unsqueeze(-1)).mul_(b.unsqueeze(1))


def criteria(received: Tensor, size: Tensor | None, tau_info: float, tau_size: float) -> tuple[Tensor, Tensor]:
    """What a token brings into the scores of its pairs, and its weight in a merge, both (B, N), by the attention that
    it received and its size, (B, N) each."""
    received = received.clamp_min(1e-30)  # softmax can underflow to 0, which no weighted mean or reciprocal survives
    alone = _root(1 / received, tau_info)
    if size is None:
        return alone, received
    return alone * _root(1 / size, tau_size), received * size / size.amax(1, keepdim=True)


def _root(score: Tensor, temperature: float) -> Tensor:
    """A token's part of what its pairs share, up to a factor that an image's pairs have in common. The product of two
    scores before the root may be no float32."""
    return (score / score.amax(1, keepdim=True)) ** (1 / temperature)


def _both_ways(attraction: Tensor, prefix: int, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """r // 2 from A to B, then the rest from B to the A tokens left; order: prefix, A ascending, B by falling score."""
    batch = attraction.shape[0]
    best, partner = attraction.max(-1)
    ranked = best.argsort(dim=-1, descending=True, stable=True)
    going, staying = ranked[:, : r // 2], ranked[:, r // 2 :].sort(dim=-1).values

    left = pick(attraction, staying)
    best_back, partner_back = left.max(1)
    ranked_back = best_back.argsort(dim=-1, descending=True, stable=True)
    going_back, staying_back = ranked_back[:, : r - r // 2], ranked_back[:, r - r // 2 :]

    # Where each B token ends: in the slot of an A token, or in its own. What A tokens joined goes along.
    slot_back = prefix + partner_back.gather(1, going_back)
    own = prefix + staying.shape[1] + torch.arange(staying_back.shape[1], device=attraction.device).expand(batch, -1)
    slot_of_b = torch.zeros_like(ranked_back).scatter(1, going_back, slot_back).scatter(1, staying_back, own)
    a, b = first_of_sets(prefix)
    kept = after_prefix(prefix, a + 2 * staying, b + 2 * staying_back)
    source = torch.cat([a + 2 * going, b + 2 * going_back], dim=1)
    return kept, source, torch.cat([slot_of_b.gather(1, partner.gather(1, going)), slot_back], dim=1)
