"""The removals per block that a method can carry out in a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tokbench.fusion.anatomy import grid_for, has_class_token
from tokbench.fusion.blocks import Fusion
from tokbench.fusion.core import Method
from tokbench.fusion.patch import fork, insert, remove, tokens_per_block
from tokbench.measure._model import evaluation_mode
from tokbench.schedules import Schedule

# Tokens that leave each block.
Removals = tuple[int, ...]


@dataclass(frozen=True)
class Space:
    """Removals of `method` in `model`, for images like `images` (B, C, H, W)."""

    model: VisionTransformer
    method: Method
    images: Tensor
    _most: dict[tuple[int, int], int] = field(default_factory=dict, repr=False)
    _counted: dict[Removals, list[float]] = field(default_factory=dict, repr=False)

    @property
    def depth(self) -> int:
        return len(self.model.blocks)

    @property
    def prefix(self) -> int:
        return self.model.num_prefix_tokens

    @cached_property
    def tokens(self) -> int:
        """Tokens of the unreduced model, prefix included."""
        return math.prod(grid_for(self.model, tuple(self.images.shape[1:]))) + self.prefix

    @cached_property
    def returned(self) -> int:
        """Tokens that a block adds if it removes any: EViT's fused one. 0 if it depends on the image."""
        if self.method.counts_by_image:
            return 0
        return round(self._count((2,) * self.depth)[self.acting[0]]) - (self.tokens - 2)

    def _count(self, removals: Removals) -> list[float]:
        """Tokens after each block, mean over the images."""
        if removals not in self._counted:
            images = self.images if self.method.counts_by_image else self.images[:1]
            model = insert(remove(fork(self.model)), self.method, Schedule("list", removals))
            with torch.inference_mode(), evaluation_mode([model]):
                model(images)
            self._counted[removals] = [float(tokens) for tokens in tokens_per_block(model)]
        return self._counted[removals]

    @cached_property
    def acting(self) -> list[int]:
        """The blocks that the method may act in."""
        return [block for block in range(self.depth) if self.method.acts_in(block, self.depth)]

    def most(self, block: int, tokens: int) -> int:
        """The most of `tokens` tokens that the method can remove in a block."""
        if (block, tokens) not in self._most:
            all_of_them = Schedule("list", (tokens,) * self.depth)
            fusion = Fusion(self.method, all_of_them, self.depth, self.prefix, (1, 1), has_class_token(self.model))
            self._most[block, tokens] = fusion.to_remove(block, tokens)
        return self._most[block, tokens]

    def of(self, schedule: Schedule) -> Removals:
        """What the method actually removes at a schedule."""
        tokens, done = self.tokens, []
        for block in range(self.depth):
            asked = schedule.removals(block, self.depth, tokens - self.prefix)
            done.append(min(asked, self.most(block, tokens)))
            tokens = self.after(tokens, done[-1])
        return tuple(done)

    def after(self, tokens: int, removed: int) -> int:
        """Tokens after a block that removes so many."""
        return tokens - removed + self.returned if removed else tokens

    def steps(self, removals: Removals) -> Sequence[tuple[float, float]]:
        """Tokens (before, after) each block."""
        if self.method.counts_by_image:
            return list(pairwise([self.tokens, *self._count(removals)]))
        return list(pairwise(accumulate(removals, self.after, initial=self.tokens)))

    def fit(self, weights: np.ndarray, cost: Callable[[Removals], float], most: float) -> Removals:
        """Removals in proportion to `weights` (depth,), as far as the method can: the fewest that cost at most `most`,
        or its maximum if that costs more."""
        weights = np.where(np.isin(np.arange(self.depth), self.acting), np.maximum(weights, 0), 0)
        if not weights.sum():
            return (0,) * self.depth
        ends = np.cumsum(weights / weights.sum())

        def scaled(total: int) -> Removals:
            return self.of(Schedule("list", tuple(np.diff(np.floor(ends * total + 1e-9), prepend=0).tolist())))

        low, high = 0, self.tokens
        while cost(scaled(high)) > most and high < 1000 * self.tokens:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if cost(scaled(middle)) > most else (low, middle)
        return scaled(high)
