"""`apply`: a method by name with a schedule as text, put into a model. `flops:` schedules are resolved here."""

from __future__ import annotations

from functools import cache
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import tokbench.fusion  # noqa: F401  (registers the methods)
from tokbench.errors import UserError
from tokbench.fusion.core import METHODS, Method, make_method
from tokbench.fusion.patch import fork, insert, remove, require_supported
from tokbench.measure.flops import count_flops
from tokbench.schedules import Schedule, parse_schedule

__all__ = ["apply", "list_methods", "resolve_schedule"]


def list_methods() -> list[str]:
    """Names that `apply` takes, the unreduced model first."""
    return ["none", *METHODS]


def apply(
    model: VisionTransformer,
    method: str,
    schedule: str | int = 0,
    *,
    trace: bool = False,
    images: Tensor | None = None,
    **params: Any,
) -> VisionTransformer:
    """Put a token-fusion method into a timm ViT, in place; calling it again replaces the method.

    method: a name from `list_methods()`; "none" is `remove`. schedule: METHODS' grammar, such as "constant:13",
    "keep:0.7@3,6,9" or "flops:0.5". trace: keep the token map. images: (B, C, H, W) calibration images, for methods
    that measure the model. params: the method's own parameters.
    Raises UserError (unknown method or parameter), ScheduleError, UnsupportedModelError.
    """
    require_supported(model)
    parsed = parse_schedule(schedule)
    if method == "none":
        if params:
            raise UserError(f"method 'none' has no parameter '{next(iter(params))}'")
        return remove(model)
    made = make_method(method, **params)
    if images is not None:
        raise UserError(f"method '{method}' takes no calibration images")
    return insert(model, made, resolve_schedule(model, made, parsed), trace=trace)


def resolve_schedule(model: VisionTransformer, method: Method, schedule: Schedule) -> Schedule:
    """A schedule that names tokens, found by counting if it names FLOPs.

    `flops:F` becomes the method's own shape, scaled until its counted FLOPs are nearest F × the unreduced model's:
    a list of removals that differ by at most one, or one keep rate at blocks L//4, L//2 and 3L//4.
    """
    depth, patches = len(model.blocks), model.patch_embed.num_patches
    if schedule.kind == "keep" and schedule.blocks[-1] >= depth:
        raise UserError(f"schedule '{schedule}': block {schedule.blocks[-1]} is not there; blocks are 0 to {depth - 1}")
    if schedule.kind != "flops":
        return schedule
    probe = remove(fork(model))
    goal = schedule.values[0] * count_flops(probe).total

    @cache
    def miss(step: int) -> float:
        return count_flops(insert(probe, method, candidate(step))).total - goal

    if method.flops_shape == "keep":
        blocks = tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))
        last = patches - 1

        def candidate(step: int) -> Schedule:
            return Schedule("keep", ((patches - step) / patches,), blocks)

    else:
        acting = [block for block in range(depth) if method.acts_in(block, depth)]
        last = len(acting) * patches // 2

        def candidate(step: int) -> Schedule:
            removals = [0.0] * depth
            for number, block in enumerate(acting):
                removals[block] = (number + 1) * step // len(acting) - number * step // len(acting)
            return Schedule("list", tuple(removals))

    low, high = 0, last
    while high - low > 1:
        middle = (low + high) // 2
        if miss(middle) > 0:
            low = middle
        else:
            high = middle
    return candidate(min((low, high), key=lambda step: abs(miss(step))))
