"""ToFu: Token Fusion, Kim et al., WACV 2024 (arXiv 2312.01026)."""

from __future__ import annotations

from dataclasses import dataclass

from tokbench.fusion.core import Assignment, Method, View, bipartite_match, register_method


@register_method
@dataclass(frozen=True)
class ToFu(Method):
    """ToMe's matching; the source of each pair is dropped in early blocks, and merged with MLERP in later ones.

    Early blocks answer badly to interpolated inputs, so nothing is averaged there (section 3.2). MLERP keeps the
    length of the longest member, which a mean would shrink (section 3.3).
    prune_blocks: that many first blocks prune, or a tuple of blocks; None: the first half, L // 2.
    """

    name = "tofu"
    paper = "Kim et al., Token Fusion: Bridging the Gap between Token Pruning and Token Merging, WACV 2024, 2312.01026"
    proportional = True

    prune_blocks: int | tuple[int, ...] | None = None

    @staticmethod
    def check_prune_blocks(value: object, default: object) -> bool:
        """Whether a value is a whole number, or a tuple of them."""
        blocks = value if isinstance(value, tuple) else (value,)
        return value is None or all(isinstance(block, int) and not isinstance(block, bool) for block in blocks)

    def limit(self, patches: int, prefix: int) -> int:
        return patches // 2

    def prunes(self, block: int, depth: int) -> bool:
        """Whether this block drops the sources instead of merging them."""
        if isinstance(self.prune_blocks, tuple):
            return block in self.prune_blocks
        return block < (depth // 2 if self.prune_blocks is None else self.prune_blocks)

    def plan(self, view: View, r: int) -> Assignment:
        kept, source, slot = bipartite_match(view.mean_keys(), view.prefix, r)
        if self.prunes(view.block, view.depth):
            return Assignment(kept)
        return Assignment(kept, source, slot, combine="mlerp")
