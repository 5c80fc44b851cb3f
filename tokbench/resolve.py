"""`apply`: a method by name with a schedule as text, put into a model. `flops:` schedules are resolved here."""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import tokbench.fusion  # noqa: F401  (registers the methods)
from tokbench.calibrate import COUNTED_IMAGES, calibrate
from tokbench.errors import UserError
from tokbench.fusion.anatomy import grid_for, has_class_token
from tokbench.fusion.blocks import Fusion
from tokbench.fusion.core import METHODS, Method, make_method
from tokbench.fusion.patch import fork, insert, remove, require_supported, watch
from tokbench.measure.flops import count_flops
from tokbench.rates import look_up
from tokbench.schedules import Schedule, parse_schedule

__all__ = ["FlopsWarning", "apply", "check_schedule", "list_methods", "resolve_schedule"]


class FlopsWarning(UserWarning):
    """A `flops:` schedule that whole tokens cannot bring within 1 % of what was asked for."""


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
    input_size: int | tuple[int, int, int] | None = None,
    unreduced_flops: int | None = None,
    **params: Any,
) -> VisionTransformer:
    """Put a token-fusion method into a timm ViT, in place; calling it again replaces the method.

    Args:
        model: a timm VisionTransformer, VisionTransformerDistilled, Eva, Beit or NaFlexVit.
        method: a name from `list_methods()`; "none" is `remove`, and lets `tokens_per_block` see what comes.
        schedule: how many tokens go where, as `tokbench list schedules` shows: 13, "keep:0.7@3,6,9", "flops:0.5".
        trace: keep the token map.
        images: (B, C, H, W) calibration images, for methods that measure the model, and for "flops:…" where FLOPs
            depend on the images.
        input_size: side of the square image, or (C, H, W), that a "flops:…" schedule is to hold for, in models that
            take images of any size. Default: what the model was built for.
        unreduced_flops: what `count_flops` gives without a method, where it is known; "flops:…" counts it if not.
        params: the method's own parameters, as `tokbench list methods` shows.

    Raises:
        UserError: an unknown method or parameter.
        ScheduleError: a schedule that does not parse, or does not fit the model.
        UnsupportedModelError: a model of another structure.
    """
    require_supported(model)
    parsed = parse_schedule(schedule)
    if method == "none":
        if params:
            raise UserError(f"method 'none' has no parameter '{next(iter(params))}'")
        return watch(remove(model))
    made = make_method(method, **params)
    made.require_depth(len(model.blocks))
    if parsed.kind == "diffrate":
        made, parsed = look_up(model, made, parsed)
    resolved = resolve_schedule(model, made.countable(), parsed, unreduced_flops, images, input_size)
    return insert(model, calibrate(model, made, resolved, images), resolved, trace=trace)


def check_schedule(schedule: Schedule, depth: int) -> None:
    """Raise UserError if the schedule names a block that a model of `depth` blocks does not have."""
    if schedule.kind == "keep" and schedule.blocks[-1] >= depth:
        raise UserError(f"schedule '{schedule}': block {schedule.blocks[-1]} is not there; blocks are 0 to {depth - 1}")
    if schedule.kind == "list" and len(schedule.values) > depth:
        raise UserError(f"schedule '{schedule}' has {len(schedule.values)} entries; the model has {depth} blocks")


def resolve_schedule(
    model: VisionTransformer,
    method: Method,
    schedule: Schedule,
    unreduced_flops: int | None = None,
    images: Tensor | None = None,
    input_size: int | tuple[int, ...] | None = None,
) -> Schedule:
    """A schedule that names tokens, found by counting if it names FLOPs; what is known already is not counted again.

    `flops:F` becomes the method's own shape, scaled until its counted FLOPs are nearest F × the unreduced model's:
    a list of removals that differ by at most one, or one keep rate at blocks L//4, L//2 and 3L//4. Warns
    (FlopsWarning) when whole tokens at those blocks come no nearer than 1 %. Where FLOPs depend on the image, they are
    the mean over `images`; raises UserError if there are none.
    """
    depth = len(model.blocks)
    check_schedule(schedule, depth)
    if schedule.budget:
        raise UserError(
            f"schedule '{schedule}' has to be searched first: schedule = tokbench.search(model, '{method.name}', "
            f"'{schedule.budget}', images=images)"
        )
    if schedule.kind != "flops":
        return schedule
    counted_on = None
    if method.counts_by_image:
        if images is None:
            raise UserError(f"method '{method.name}': its FLOPs depend on the image; '{schedule}' needs some: images=…")
        counted_on = images[:COUNTED_IMAGES]
        input_size = tuple(images.shape[1:])
    patches = math.prod(grid_for(model, input_size))
    probe = remove(fork(model))
    unreduced, wanted = unreduced_flops or count_flops(probe, input_size).total, schedule.values[0]
    scaled, last = own_shape(method, depth, patches)

    @cache
    def excess(step: int) -> float:
        if step == 0:
            return 1 - wanted
        counted = count_flops(insert(probe, method, scaled(step)), input_size, images=counted_on)
        return counted.total / unreduced - wanted

    @cache
    def estimate(step: int) -> float:
        return relative_cost(model, method, scaled(step), patches)

    step = _nearest_zero(excess, estimate, last)
    if abs(excess(step)) > 0.01 * wanted:
        warnings.warn(
            f"{method.name} at {schedule} takes {wanted + excess(step):.3f} of the unreduced model's FLOPs: "
            f"whole tokens come no nearer (resolved to {scaled(step)})",
            FlopsWarning,
            stacklevel=2,
        )
    return scaled(step)


def relative_cost(model: Any, method: Method, schedule: Schedule, patches: int) -> float:
    """What attention and MLP take for n tokens of C channels, up to a factor: (4 C + 2 n) n, and 8 C n in each block.

    schedule: of tokens, and no longer of FLOPs.
    """
    depth = len(model.blocks)
    fusion = Fusion(method, schedule, depth, model.num_prefix_tokens, (1, patches), has_class_token(model))
    tokens, total = patches + model.num_prefix_tokens, 0
    for block in range(depth):
        left = tokens - fusion.to_remove(block, tokens)
        attended, fed = left if method.place == "start" else tokens, tokens if method.place == "end" else left
        total += (4 * model.embed_dim + 2 * attended) * attended + 8 * model.embed_dim * fed
        tokens = left
    return total


def own_shape(method: Method, depth: int, patches: int) -> tuple[Callable[[int], Schedule], int]:
    """The schedules that `flops:` chooses from, by the number of tokens that go: a function, and the last number."""
    return _keep_rates(depth, patches) if method.flops_shape == "keep" else _even(method, depth, patches)


def _even(method: Method, depth: int, patches: int) -> tuple[Callable[[int], Schedule], int]:
    """Schedules that remove `step` tokens in all, evenly over the blocks the method acts in; and the last step."""
    acting = [block for block in range(depth) if method.acts_in(block, depth)]

    def scaled(step: int) -> Schedule:
        removals = [0.0] * depth
        for number, block in enumerate(acting):
            removals[block] = (number + 1) * step // len(acting) - number * step // len(acting)
        return Schedule("list", tuple(removals))

    return scaled, len(acting) * patches


def _keep_rates(depth: int, patches: int) -> tuple[Callable[[int], Schedule], int]:
    """Schedules that keep all but `step` of the first `patches` tokens; and the last step."""
    blocks = tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))

    def scaled(step: int) -> Schedule:
        # Four digits, rounded down: ceil(rate · T) is then what was meant, and the schedule can be read.
        return Schedule("keep", (math.floor(1e4 * (patches - step) / patches) / 1e4,), blocks)

    return scaled, patches - 1


def _nearest_zero(excess: Callable[[int], float], estimate: Callable[[int], float], last: int) -> int:
    """Where in 0 … last the falling function `excess` is nearest 0.

    Each call of it counts a model's FLOPs; `estimate` is nearly proportional to FLOPs and costs nothing, so each next
    step is where the estimate lies between those at the bracket's ends as 0 lies between theirs.
    """
    low, high = 0, last
    above = excess(0)
    below = above - (1 - estimate(last) / estimate(0))  # not counted: the far end is seldom where the answer is
    if above <= 0 or below >= 0:
        return low if above <= 0 else high
    while high - low > 1:
        goal = estimate(low) + above / (above - below) * (estimate(high) - estimate(low))
        middle = low + bisect_left(range(low, high), -goal, key=lambda step: -estimate(step))
        middle = min(max(middle, low + 1), high - 1)
        if excess(middle) > 0:
            low, above = middle, excess(middle)
        else:
            high, below = middle, excess(middle)
    return min((low, high), key=lambda step: abs(excess(step)))
