"""The cost of removals: predicted from a few schedules that were counted or timed by block, then confirmed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokbench.calibrate import COUNTED_IMAGES
from tokbench.fusion.core import Method
from tokbench.fusion.patch import fork, insert, remove
from tokbench.measure._model import evaluation_mode
from tokbench.measure.flops import count_flops
from tokbench.measure.speed import measure_speed
from tokbench.schedules import Schedule
from tokbench.searching.budget import Budget
from tokbench.searching.space import Removals, Space

# Schedules to fit the blocks' costs to: the share of the tokens removed, and its slope over the blocks.
_PROBES = ((0.0, 0.0), (0.3, 0.0), (0.6, 0.0), (0.9, 0.0), (0.5, 1.0), (0.8, 1.0))
_TIMED_PASSES = 5
_CONFIRM_SECONDS = 8.0


@dataclass
class Cost:
    """The cost of removals as a share of the unreduced model's: FLOPs, or seconds of a batch on this device."""

    space: Space
    budget: Budget
    images: Tensor
    batch_size: int
    correction: float = 1.0  # confirmed over predicted, of the last confirmed one
    _table: np.ndarray = field(init=False)
    _rest: float = field(init=False)

    def __post_init__(self) -> None:
        """Fit a block's cost for n tokens before and m after it: a polynomial of degree 2, and one more in n, without
        the square of m, where tokens leave."""
        measure = self._blocks_counted if self.budget.kind == "flops" else self._blocks_timed
        space, rows, costs, rests = self.space, [], [], []
        for share, slope in _PROBES:
            weights = np.linspace(1 + slope, 1 - slope, space.depth)
            asked = np.diff(np.floor(np.cumsum(weights / weights.sum()) * share * space.tokens), prepend=0)
            removals = space.of(Schedule("list", tuple(asked.tolist())))
            blocks, total = measure(self.reduced(removals))
            rows += [_features(*step) for step in space.steps(removals)]
            rows[-space.depth][-1] = float(any(removals))  # one-time work of the method counts to the first block
            costs += blocks
            rests.append(total - sum(blocks))
        self._rest = float(np.median(rests))
        scale = np.maximum(np.abs(rows).max(0), 1)
        self._table = np.linalg.lstsq(np.array(rows) / scale, np.array(costs), rcond=None)[0] / scale
        self._whole = self._predicted((0,) * space.depth)

    def reduced(self, removals: Removals, method: Method | None = None) -> Any:
        """The model with these removals."""
        return insert(remove(fork(self.space.model)), method or self.space.method, Schedule("list", removals))

    def _predicted(self, removals: Removals) -> float:
        once = self._table[-1] * any(removals)
        return self._rest + once + sum(self.of_block(*step) for step in self.space.steps(removals))

    def of_block(self, before: float, after: float) -> float:
        """A block's cost, FLOPs or seconds."""
        return float(_features(before, after) @ self._table)

    def share_of_block(self, before: float, after: float) -> float:
        return self.correction * self.of_block(before, after) / self._whole

    def __call__(self, removals: Removals) -> float:
        return self.correction * self._predicted(removals) / self._whole

    def confirm(self, removals: Removals, method: Method | None = None) -> float:
        """The share as counted, or as timed in turns with the unreduced model; it corrects later predictions."""
        predicted, model = self(removals), self.reduced(removals, method)
        base = remove(fork(self.space.model))
        if self.budget.kind == "flops":
            measured = self._count(model).total / self._count(base).total
        else:
            images = self.images if self.space.method.counts_by_image else None
            results = measure_speed(
                {"none": base, "reduced": model},
                batch_size=self.batch_size, images=images, seconds=_CONFIRM_SECONDS, input_size=self.images.shape[1:],
            )  # fmt: skip
            measured = 1 / results[1].speedup
        self.correction *= measured / predicted
        return measured

    def _count(self, model: nn.Module) -> Any:
        by_image = self.space.method.counts_by_image and hasattr(model, "fusion")
        return count_flops(model, self.images.shape[1:], images=self.images[:COUNTED_IMAGES] if by_image else None)

    def _blocks_counted(self, model: Any) -> tuple[list[float], float]:
        count = self._count(model)
        return [float(count.by_module[f"blocks.{block}"]) for block in range(self.space.depth)], count.total

    def _blocks_timed(self, model: Any) -> tuple[list[float], float]:
        """The least of several times of each block and of the pass: other work on the machine only adds."""
        images = self.images[torch.arange(self.batch_size) % len(self.images)]
        passes: list[list[float]] = []

        def stamp(*_: Any) -> None:
            if images.device.type != "cpu":
                torch.accelerator.synchronize(images.device)
            passes[-1].append(time.perf_counter())

        hooks = [block.register_forward_pre_hook(partial(stamp)) for block in model.blocks]
        hooks.append(model.blocks[-1].register_forward_hook(stamp))
        with torch.inference_mode(), evaluation_mode([model]):
            for _ in range(1 + _TIMED_PASSES):
                passes.append([])
                stamp()
                model(images)
                stamp()
        for hook in hooks:
            hook.remove()
        least = np.diff(passes[1:], axis=1).min(0)
        return least[1:-1].tolist(), float(least.sum())


def _features(n: float, m: float) -> np.ndarray:
    leaves = float(m < n)
    return np.array([1, n, n * n, m, m * n, m * m, leaves, leaves * n, leaves * n * n, 0], dtype=float)
