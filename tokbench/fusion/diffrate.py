"""DiffRate: Chen et al., ICCV 2023 (arXiv 2305.17997)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tokbench.fusion.core import Assignment, Method, View, after_prefix, keep_only, pick, register_method, score_dtype


@register_method
@dataclass(frozen=True)
class DiffRate(Method):
    """Of the least attended tokens, prune the very last, and merge the others into the most similar one that stays.

    prune: the share of the tokens to go that is pruned, or how many are, by block number. The authors searched such
    lists for some models on ImageNet-1k: schedules such as `diffrate:2.9` bring theirs along.
    """

    name = "diffrate"
    paper = "Chen et al., DiffRate: Differentiable Compression Rate for Efficient ViTs, ICCV 2023, arXiv 2305.17997"
    proportional = True

    prune: float | tuple[int, ...] = 0.35

    @staticmethod
    def check_prune(value: object, default: object) -> str:
        """What a value must be, "" if it is that."""
        share = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
        counts = isinstance(value, tuple) and all(type(count) is int and count >= 0 for count in value)
        return "" if share or counts else "a share from 0 to 1, or a list of tokens by block"

    def pruned(self, block: int, r: int) -> int:
        """How many of the r tokens that go from a block are pruned."""
        if not isinstance(self.prune, tuple):
            return int(self.prune * r)
        return min(self.prune[block], r) if block < len(self.prune) else 0

    def plan(self, view: View, r: int) -> Assignment:
        prefix, merged = view.prefix, r - self.pruned(view.block, r)
        ranked = view.class_attention()[:, prefix:].argsort(dim=-1, descending=True, stable=True)
        stay, source = ranked[:, :-r], ranked[:, view.patches - r : view.patches - r + merged]
        if merged == 0:
            return keep_only(stay, prefix)
        unit = F.normalize(view.x[:, prefix:].to(score_dtype(view.x)), dim=-1)
        cosine, partner = (pick(unit, source) @ pick(unit, stay).mT).max(-1)
        weight = torch.ones(view.x.shape[:2], dtype=unit.dtype, device=unit.device)
        size = weight if view.size is None else view.size
        source = source + prefix
        mass = size.scatter(1, source, size.gather(1, source) * cosine)
        return Assignment(after_prefix(prefix, stay + prefix), source, partner + prefix, weight, mass=mass)
