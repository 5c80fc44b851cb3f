"""ToMe: Token Merging, Bolya et al., ICLR 2023 (arXiv 2210.09461)."""

from __future__ import annotations

from dataclasses import dataclass

from tokbench.fusion.core import Assignment, Method, View, register_method


@register_method
@dataclass(frozen=True)
class ToMe(Method):
    """Merge the r most similar pairs of tokens, by their keys, between attention and MLP (section 3).

    prop_attn: proportional attention, softmax(Q Kᵀ/√d + log s) (equation 1).
    """

    name = "tome"
    paper = "Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023, arXiv 2210.09461"

    prop_attn: bool = True

    @property
    def proportional(self) -> bool:  # type: ignore[override]
        return self.prop_attn

    def limit(self, patches: int, prefix: int) -> int:
        return patches // 2

    def plan(self, view: View, r: int) -> Assignment:
        kept, source, slot = view.match(view.mean_keys(), r)
        return Assignment(kept, source, slot)
