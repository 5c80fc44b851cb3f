"""Parameters that are measured on the model itself: where ToFu prunes, when it is asked to find out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tokbench.errors import UserError
from tokbench.fusion.core import Assignment, Method, View, bipartite_match, pick
from tokbench.fusion.patch import fork, insert
from tokbench.fusion.tofu import AUTO, ToFu
from tokbench.schedules import Schedule

CALIBRATION_IMAGES = 32
# Of these, how many FLOPs are counted on where they depend on the image: each takes about a second.
COUNTED_IMAGES = 8


def wants_images(method: Method) -> bool:
    """Whether images have to be looked at: for a parameter measured on them, or as FLOPs depend on them."""
    return _measures(method) or method.counts_by_image


def _measures(method: Method) -> bool:
    return isinstance(method, ToFu) and method.prune_blocks == AUTO


def countable(method: Method) -> Method:
    """A method with the FLOPs of `method`, whatever images will say: neither merging nor pruning counts any."""
    return dataclasses.replace(cast(ToFu, method), prune_blocks=None) if _measures(method) else method


def calibrate(model: VisionTransformer, method: Method, schedule: Schedule, images: Tensor | None) -> Method:
    """The method with its measured parameters filled in; the method itself when it has none.

    images: (B, C, H, W), preprocessed, on the model's device and in its dtype. Raises UserError when they are needed
    and not there, or there and not needed.
    """
    if not _measures(method):
        if images is not None and not method.counts_by_image:
            raise UserError(f"method '{method.name}' measures nothing with these parameters: it takes no images")
        return method
    if images is None:
        raise UserError(
            f"method '{method.name}': prune_blocks='{AUTO}' measures the model on calibration images; give some as "
            "images=…, or the blocks themselves"
        )
    errors = nonlinearity(model, schedule, images)
    limit = median(errors.values()) if errors else 0.0
    pruned = tuple(block for block, error in errors.items() if error > limit)
    return dataclasses.replace(cast(ToFu, method), prune_blocks=pruned)


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
        kept, source, slot = bipartite_match(view.mean_keys(), view.prefix, r)
        a, b = pick(view.x, source), pick(view.x, kept.gather(1, slot))
        middle, ends = self.branch(view, (a + b) / 2), (self.branch(view, a) + self.branch(view, b)) / 2
        self.errors[view.block] = ((middle - ends).norm(dim=-1) / ends.norm(dim=-1)).flatten().tolist()
        everyone = torch.arange(view.x.shape[1], device=view.x.device)
        return Assignment(everyone.expand(view.x.shape[0], -1))

    def branch(self, view: View, x: Tensor) -> Tensor:
        """What the block's MLP adds to tokens x (B, R, C) of the residual stream."""
        added: Tensor = self.blocks[view.block].add_mlp(x) - x
        return added
