"""Find the removals per block that change a model's answers least within a budget. No labels, no training."""

from __future__ import annotations

import time
from bisect import bisect_left
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from cmaes import CMA
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tokbench.calibrate import CALIBRATION_IMAGES, COUNTED_IMAGES, calibrate
from tokbench.errors import UserError
from tokbench.fusion.core import Method, make_method
from tokbench.progress import Progress
from tokbench.resolve import own_shape
from tokbench.schedules import Schedule
from tokbench.searching.budget import Budget
from tokbench.searching.cost import Cost
from tokbench.searching.objective import Memory, Objective, Workers
from tokbench.searching.space import Removals, Space

# Images shown to all candidates together: 40 passes over 256.
MOST_SHOWN = 10_240
_FIRST = 2  # batches; a candidate is dropped after these, after 4, 8, …, if it is that much farther than the best:
_BEHIND = 0.2  # over the root of the number of batches
_STEP = 0.5  # first standard deviation of the logarithm of a block's share
_TRIES = 10  # per pass over the images; repeated candidates take none, and a small model has few schedules
_RETRIES = 5  # to bring the confirmed cost under the budget
# How far under the budget the confirmed cost may be: counts are exact, times are not.
_UNDER = {"flops": 0.01, "speedup": 0.05}


class Candidate(NamedTuple):
    removals: Removals
    method: Method


@dataclass(frozen=True)
class Found:
    """The best removals of a search.

    schedule: as `list:…`. method: with its searched parameters. distance: of the answers from the unreduced model's, on
    `images` images. usual, before: the usual schedule at the same cost, and its distance. predicted, cost: share of the
    unreduced model's FLOPs or time; cost is None if the search was interrupted before it was counted or timed. passes:
    forward passes over the images.
    """

    schedule: Schedule
    method: Method
    distance: float
    before: float
    usual: Schedule
    predicted: float
    cost: float | None
    images: int
    passes: float
    seconds: float


@dataclass
class Search:
    """One search: `run` it, with workers or without, to the same end; `found` gives the best so far.

    Raises UserError for a budget that the method cannot reach.
    """

    model: VisionTransformer
    method: Method
    budget: Budget
    images: Tensor
    batch_size: int = 16
    seed: int = 0
    most_shown: int = MOST_SHOWN
    seconds: float = float("inf")
    tune: bool = False
    progress: Progress = field(default_factory=Progress)
    memory: Memory = field(default_factory=Memory)
    workers: Workers | None = None

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.best: Candidate | None = None
        if self.method.needs_calibration:
            even = Schedule("list", (1,) * len(self.model.blocks))
            self.method = calibrate(self.model, self.method, even, self.images[:CALIBRATION_IMAGES])
        self.space = Space(self.model, self.method, self.images[:COUNTED_IMAGES])
        self.cost = Cost(self.space, self.budget, self.images, self.batch_size)
        self._require_reachable()
        self.usual = self._usual()
        self.objective = Objective(self.model, self.images, self.memory, self.workers)

    def _require_reachable(self) -> None:
        everything = self.space.fit(np.ones(self.space.depth), self.cost, 0)
        least, kind = self.cost(everything), self.budget.kind
        if least <= self.budget.share:
            return
        near = f"; the nearest is flops:{np.ceil(100 * least) / 100:g}"
        if kind == "speedup":
            near = (
                f"; the nearest is speedup:{np.floor(100 / least) / 100:g}" if least < 0.99 else ", and makes it slower"
            )
        raise UserError(f"method '{self.method.name}' cannot reach {self.budget} on this model{near}")

    def run(self) -> Found:
        """Search until the images or the seconds are spent, and confirm the result."""
        where = f" on {self.workers}" if self.workers else ""
        self.progress.phase(f"{self.method.name} at {self.budget}{where}", self.most_shown)
        even = self.space.fit(np.ones(self.space.depth), self.cost, self.budget.share)
        first = [Candidate(removals, self.method) for removals in (self.usual, even)]
        self.look_ahead(first)
        for candidate in first:
            self.attempt(candidate)
        self.polish()
        return self._confirmed()

    def found(self) -> Found | None:
        """The best so far, with its predicted cost; None before anything was tried."""
        if self.best is None:
            return None
        whole = len(self.objective.batches)
        return Found(
            schedule=Schedule("list", self.best.removals),
            method=self.best.method,
            distance=self._distance(self.best, whole),
            before=self._distance(Candidate(self.usual, self.method), whole),
            usual=Schedule("list", self.usual),
            predicted=self.cost(self.best.removals),
            cost=None,
            images=len(self.images),
            passes=self.objective.passes,
            seconds=time.monotonic() - self.began,
        )

    def _usual(self) -> Removals:
        """The method's usual removals at this budget."""
        space = self.space
        scaled, last = own_shape(self.method, space.depth, space.tokens - space.prefix)
        step = bisect_left(range(last), -self.budget.share, key=lambda step: -self.cost(space.of(scaled(step))))
        return space.of(scaled(step))

    def polish(self) -> None:
        """Go on from there by CMA-ES (Hansen 2016, arXiv 1604.00772)."""
        assert self.best is not None
        names = self._tuned()
        start = np.concatenate([self.logarithms(self.best.removals), np.zeros(len(names))])
        if start.size < 2:  # one block: the budget leaves no choice
            return
        cma = CMA(start, _STEP, seed=self.seed)
        for _ in range(_TRIES * self.most_shown // len(self.images) // cma.population_size):
            points = [cma.ask() for _ in range(cma.population_size)]
            candidates = [self.candidate(point, names) for point in points]
            self.look_ahead(candidates)
            told = []
            for point, candidate in zip(points, candidates, strict=True):
                if self.is_over():
                    return
                told.append((point, self.attempt(candidate)))
            cma.tell(told)

    def logarithms(self, removals: Removals) -> np.ndarray:
        """Logarithms of each block's share of the removals; blocks without any get a small one, to grow from."""
        return np.log(np.array(removals) + 0.05 * np.mean(removals))

    def is_over(self) -> bool:
        """Whether the images or the seconds are spent."""
        return self._shown() >= self.most_shown or time.monotonic() - self.began >= self.seconds

    def candidate(self, point: np.ndarray, names: list[str]) -> Candidate:
        """The candidate at a point: logarithms of each block's share, and of factors for these parameters."""
        weights, factors = np.exp(point[: self.space.depth]), np.exp(point[self.space.depth :])
        tuned = {name: getattr(self.method, name) * float(f) for name, f in zip(names, factors, strict=True)}
        method = make_method(self.method.name, **{**self.method.parameters(), **tuned}) if tuned else self.method
        return Candidate(self.space.fit(weights, self.cost, self.budget.share), method)

    def look_ahead(self, candidates: list[Candidate]) -> None:
        """Have workers find what `attempt` will ask for, as far as the best one stays the best."""
        whole = len(self.objective.batches)
        shown = _FIRST if self.best else whole
        while self.workers and candidates and not self.is_over():
            distances = self.objective.look_ahead(candidates, shown, self._tell)
            if self.best is None or shown >= whole:
                return
            ahead = self._distance(self.best, shown)
            found = zip(candidates, distances, strict=True)
            candidates = [candidate for candidate, first in found if not _is_behind(first, ahead, shown)]
            shown *= 2

    def attempt(self, candidate: Candidate) -> float:
        """The candidate's distance; keeps it if it is the best. If it falls behind on the first images, an estimate:
        the best's distance plus the lag."""
        shown, whole = _FIRST, len(self.objective.batches)
        while self.best and shown < whole:
            first, ahead = self._distance(candidate, shown), self._distance(self.best, shown)
            self._tell()
            if _is_behind(first, ahead, shown):
                return self._distance(self.best, whole) + first - ahead
            shown *= 2
        distance = self._distance(candidate, whole)
        self._tell()
        if self.best is None or distance < self._distance(self.best, whole):
            self.best = candidate
        return distance

    def _distance(self, candidate: Candidate, batches: int) -> float:
        return float(np.mean(self.objective.of_batches(*candidate, batches)))

    def _tuned(self) -> list[str]:
        """The parameters that are numbers above 0."""
        values = self.method.parameters().items() if self.tune else ()
        return [name for name, value in values if isinstance(value, float) and value > 0]

    def _tell(self) -> None:
        self.progress.advance(min(self._shown(), self.most_shown))

    def _shown(self) -> int:
        return round(self.objective.passes * len(self.images))

    def _confirmed(self) -> Found:
        """The best one, counted or timed; if it misses the budget, its shape is scaled and confirmed again."""
        assert self.best is not None
        share, weights = self.budget.share, np.array(self.best.removals, dtype=float)
        confirmed: list[tuple[float, Candidate]] = []
        for _ in range(_RETRIES):
            confirmed.append((self.cost.confirm(*self.best), self.best))
            if (1 - _UNDER[self.budget.kind]) * share <= confirmed[-1][0] <= share:
                break
            self.best = self.best._replace(removals=self.space.fit(weights, self.cost, share))
        # The most expensive within the budget; if all were over it, the cheapest.
        cost, self.best = max(confirmed, key=lambda one: (one[0] <= share, one[0] if one[0] <= share else -one[0]))
        if self.budget.kind == "flops" and cost > share:  # times are not exact; the table shows the confirmed one
            raise UserError(
                f"no schedule of method '{self.method.name}' was found within {self.budget}: the nearest is {cost:.3f}"
            )
        found = self.found()
        assert found is not None
        return replace(found, cost=cost)


def _is_behind(distance: float, best: float, batches: int) -> bool:
    return distance > (1 + _BEHIND / batches**0.5) * best
