"""EViT: Liang et al., ICLR 2022 (arXiv 2202.07800)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokbench.fusion.core import Assignment, Method, View, after_prefix, register_method


@register_method
@dataclass(frozen=True)
class EViT(Method):
    """Replace the r patch tokens that the class token attends to least by one: Σ aⱼ xⱼ over them (section 3.2).

    Kept tokens come by falling attention, the fused one last. A block so records r − 1 tokens removed.
    """

    name = "evit"
    paper = "Liang et al., Not All Patches are What You Need, ICLR 2022, arXiv 2202.07800"
    tracks_size = False
    flops_shape = "keep"

    def plan(self, view: View, r: int) -> Assignment:
        attention = view.class_attention()
        ranked = attention[:, view.prefix :].argsort(dim=-1, descending=True, stable=True) + view.prefix
        stay = view.patches - r
        kept = after_prefix(view.prefix, ranked[:, : stay + 1])
        source = ranked[:, stay + 1 :]
        fused = torch.full_like(source, view.prefix + stay)
        weight = torch.ones_like(attention).scatter(1, ranked[:, stay:], attention.gather(1, ranked[:, stay:]))
        return Assignment(kept, source, fused, weight, combine="sum")
