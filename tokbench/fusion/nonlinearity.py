"""How far the blocks of a model are from linear, by which ToFu may choose where it prunes."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tokbench.fusion.core import Assignment, Method, View, pick
from tokbench.fusion.patch import fork, insert
from tokbench.schedules import Schedule


def nonlinearity(model: VisionTransformer, schedule: Schedule, images: Tensor) -> dict[int, float]:
    """How far each block's MLP is from linear on the pairs that ToFu would match there (arXiv 2312.01026, section 3.2).

    Mean over pairs (a, b) and images of ‖f((a+b)/2) − (f(a)+f(b))/2‖ / ‖(f(a)+f(b))/2‖, where f is the MLP branch with
    its norm, and a and b are tokens of the unreduced model. Blocks in which the schedule removes nothing are left out.
    """
    probe = fork(model).eval()
    gauge = _Gauge(list(probe.blocks))
    insert(probe, gauge, schedule)
    with torch.inference_mode():
        probe(images)
    return {block: fmean(errors) for block, errors in gauge.errors.items()}


@dataclass(frozen=True)
class _Gauge(Method):
    """Takes ToFu's place in a model to measure its blocks; no token is touched."""

    name = "gauge"

    blocks: list[Any]
    errors: dict[int, list[float]] = field(default_factory=dict)

    def limit(self, patches: int, prefix: int) -> int:
        return patches // 2

    def plan(self, view: View, r: int) -> Assignment:
        kept, source, slot = view.match(view.mean_keys(), r)
        a, b = pick(view.x, source), pick(view.x, kept.gather(1, slot))
        middle, ends = self.branch(view, (a + b) / 2), (self.branch(view, a) + self.branch(view, b)) / 2
        self.errors[view.block] = ((middle - ends).norm(dim=-1) / ends.norm(dim=-1)).flatten().tolist()
        everyone = torch.arange(view.x.shape[1], device=view.x.device)
        return Assignment(everyone.expand(view.x.shape[0], -1))

    def branch(self, view: View, x: Tensor) -> Tensor:
        """What the block's MLP adds to tokens x (B, R, C) of the residual stream."""
        added: Tensor = self.blocks[view.block].add_mlp(x) - x
        return added
