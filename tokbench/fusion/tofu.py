"""ToFu: Token Fusion, Kim et al., WACV 2024 (arXiv 2312.01026)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tokbench.errors import UserError
from tokbench.fusion.core import Assignment, Method, View, register_method
from tokbench.fusion.nonlinearity import nonlinearity
from tokbench.schedules import Schedule

AUTO = "auto"


@register_method
@dataclass(frozen=True)
class ToFu(Method):
    """ToMe's matching; the source of each pair is dropped in early blocks, and merged with MLERP in later ones.

    Early blocks answer badly to interpolated inputs, so nothing is averaged there (section 3.2). MLERP keeps the
    length of the longest member, which a mean would shrink (section 3.3).
    prune_blocks: that many first blocks prune, or a tuple of blocks; None: the first half, L // 2; "auto": those that
        calibration images show to be least linear, which `calibrated` turns into a tuple of blocks.
    """

    name = "tofu"
    paper = "Kim et al., Token Fusion: Bridging the Gap between Token Pruning and Token Merging, WACV 2024, 2312.01026"
    proportional = True

    prune_blocks: int | tuple[int, ...] | str | None = None

    @staticmethod
    def check_prune_blocks(value: object, default: object) -> str:
        """What a value must be, "" if it is that."""
        blocks = value if isinstance(value, tuple) else (value,)
        counts = all(isinstance(block, int) and not isinstance(block, bool) and block >= 0 for block in blocks)
        return "" if value is None or value == AUTO or counts else f"a number of blocks, a list of blocks, or '{AUTO}'"

    def require_depth(self, depth: int) -> None:
        if isinstance(self.prune_blocks, int) and self.prune_blocks > depth:
            raise UserError(f"method 'tofu': prune_blocks={self.prune_blocks}; the model has {depth} blocks")
        if isinstance(self.prune_blocks, tuple) and (beyond := max(self.prune_blocks, default=0)) >= depth:
            raise UserError(f"method 'tofu': prune_blocks: block {beyond} is not there; blocks are 0 to {depth - 1}")

    @property
    def needs_calibration(self) -> bool:
        return self.prune_blocks == AUTO

    def countable(self) -> ToFu:
        return replace(self, prune_blocks=None) if self.needs_calibration else self  # neither half counts any FLOPs

    def calibrated(self, model: VisionTransformer, schedule: Schedule, images: Tensor) -> ToFu:
        """Prunes in the blocks that are less linear than the median (section 3.2)."""
        errors = nonlinearity(model, schedule, images)
        limit = median(errors.values()) if errors else 0.0
        return replace(self, prune_blocks=tuple(block for block, error in errors.items() if error > limit))

    def limit(self, patches: int, prefix: int) -> int:
        return patches // 2

    def prunes(self, block: int, depth: int) -> bool:
        """Whether this block drops the sources instead of merging them."""
        match self.prune_blocks:
            case None:
                return block < depth // 2
            case int(first):
                return block < first
            case tuple(blocks):
                return block in blocks
        raise UserError(f"method 'tofu': prune_blocks='{AUTO}' has to be measured first; use tokbench.apply")

    def plan(self, view: View, r: int) -> Assignment:
        kept, source, slot = view.match(view.mean_keys(), r)
        if self.prunes(view.block, view.depth):
            return Assignment(kept)
        return Assignment(kept, source, slot, combine="mlerp")
