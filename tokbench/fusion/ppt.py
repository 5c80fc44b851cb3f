"""PPT: Token Pruning and Pooling, Wu et al. 2023 (arXiv 2310.01812)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tokbench.fusion.core import Assignment, Method, View, after_prefix, register_method, score_dtype


@register_method
@dataclass(frozen=True)
class PPT(Method):
    """Image by image: merge ToMe's pairs where all tokens matter alike, drop those that matter least where they don't.

    A token matters by the class token's attention to it times the length of its values. tau: the variance of this
    below which an image merges; it has the scale of 1/T², the authors' 7e-5 is for 196 patches. prop_attn: keep account
    of sizes, and add log s to attention.
    """

    name = "ppt"
    paper = "Wu et al., PPT: Token Pruning and Pooling for Efficient Vision Transformers, 2023, arXiv 2310.01812"
    needs_values = True

    tau: float = 7e-5
    prop_attn: bool = True

    @property
    def proportional(self) -> bool:  # type: ignore[override]
        return self.prop_attn

    @property
    def tracks_size(self) -> bool:  # type: ignore[override]
        return self.prop_attn

    def limit(self, patches: int, prefix: int) -> int:
        return patches // 2

    def plan(self, view: View, r: int) -> Assignment:
        prefix, values = view.prefix, view.values()
        length = values.to(score_dtype(values)).square().sum((1, 3)).sqrt()
        score = (view.class_attention() * length)[:, prefix:]
        score = score / score.sum(1, keepdim=True)
        merges = (score.var(1) < self.tau).unsqueeze(1)
        ranked = score.argsort(dim=-1, descending=True, stable=True) + prefix
        kept, source, slot = view.match(view.mean_keys(), r)
        kept = torch.where(merges, kept, after_prefix(prefix, ranked[:, :-r]))
        source = torch.where(merges, source, ranked[:, -r:])
        size = torch.ones(view.x.shape[:2], dtype=score.dtype, device=score.device) if view.size is None else view.size
        mass = size.scatter(1, source, size.gather(1, source) * merges)
        return Assignment(kept, source, slot, mass=mass)
