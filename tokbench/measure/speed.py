"""Throughput of several models, measured in turns so that what disturbs the machine disturbs them alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from tokbench.measure._model import evaluation_mode, placement, resolve_input_size
from tokbench.measure.stats import median_ratio_interval

# Below this many rounds a median and its interval mean little.
FEWEST_ROUNDS = 5
# Long enough for the clock and for an accelerator's queue, short enough not to matter.
ESTIMATE_SECONDS = 0.05


@dataclass(frozen=True)
class SpeedResult:
    """One model's timings.

    `rounds` holds the seconds a forward pass on `batch_size` images took, one figure a round, each the mean
    of `iterations` passes. `throughput` is in images/s, from the median round. `speedup` is the median over
    the rounds of the first model's seconds over this one's, with its 95 % bootstrap interval from
    `speedup_low` to `speedup_high`; the first model's own is 1.
    """

    name: str
    batch_size: int
    rounds: list[float]
    iterations: int
    throughput: float
    speedup: float
    speedup_low: float
    speedup_high: float


def measure_speed(
    models: Mapping[str, nn.Module],
    *,
    batch_size: int,
    input_size: int | Sequence[int] | None = None,
    rounds: int = 20,
    seconds: float = 30.0,
    warmup: int = 3,
    seed: int = 0,
    on_round: Callable[[int, int], None] | None = None,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> list[SpeedResult]:
    """Time the models' forward passes in interleaved rounds; speed-ups are over the first model.

    All models run on the same random images, `batch_size` of `input_size` (a side, (C, H, W), or None for
    what the first model was built for), on their parameters' device and in their dtype, which must be common.
    In each round every model has one turn, in an order shuffled by `seed`; a turn is as many passes as fit
    its share of `seconds`, the time for all rounds of all models, and at least one. Models too slow for that
    get fewer rounds, at least 5 (or `rounds`). Before, every model makes `warmup` passes, and a few more to
    estimate its speed. `on_round` is told the rounds done and planned.
    A model that raises in its warm-up is reported to `on_failure` and left out of the results; without
    `on_failure`, or when it is the first, the exception goes through, as it does later on.
    Raises ValueError for models on different devices or of different dtypes, and for no models, images or
    rounds.
    """
    if not models or min(batch_size, rounds) < 1:
        raise ValueError("measure_speed needs at least one model, one image in a batch and one round")
    device, dtype = _common_placement(models)
    reference = next(iter(models))
    size = resolve_input_size(models[reference], input_size)
    images = torch.rand(batch_size, *size, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    with torch.inference_mode(), evaluation_mode(models.values()):
        estimates: dict[str, float] = {}
        for name, model in models.items():
            try:
                estimates[name] = _warm_up(model, images, warmup)
            except Exception as error:
                if on_failure is None or name == reference:
                    raise
                on_failure(name, error)
        planned, iterations = plan(estimates, rounds, seconds)
        running = {name: models[name] for name in estimates}
        timings: dict[str, list[float]] = {name: [] for name in running}
        for done, order in enumerate(_orders(running, planned, seed), start=1):
            for name in order:
                timings[name].append(_seconds(running[name], images, iterations[name]))
            if on_round is not None:
                on_round(done, planned)
    return [
        _result(name, batch_size, seconds_each, iterations[name], timings[reference])
        for name, seconds_each in timings.items()
    ]


def plan(estimates: Mapping[str, float], rounds: int, seconds: float) -> tuple[int, dict[str, int]]:
    """(rounds, passes in a turn by model) for models whose passes take about `estimates` seconds."""
    affordable = int(seconds / sum(estimates.values()))
    rounds = min(rounds, max(affordable, FEWEST_ROUNDS))
    turn = seconds / (rounds * len(estimates))
    return rounds, {name: max(1, int(turn / estimate)) for name, estimate in estimates.items()}


def _common_placement(models: Mapping[str, nn.Module]) -> tuple[torch.device, torch.dtype]:
    placements = {name: placement(model) for name, model in models.items()}
    first = next(iter(placements))
    for name, place in placements.items():
        if place != placements[first]:
            raise ValueError(f"not on one device in one dtype: {first} {placements[first]}, {name} {place}")
    return placements[first]


def _warm_up(model: nn.Module, images: Tensor, passes: int) -> float:
    """Seconds of a pass, roughly, after the passes that compile, allocate and choose kernels."""
    for _ in range(passes):
        model(images)
    once = _seconds(model, images, 1)
    return _seconds(model, images, max(1, int(ESTIMATE_SECONDS / once)))


def _orders(names: Iterable[str], rounds: int, seed: int) -> list[list[str]]:
    shuffler, names = random.Random(seed), list(names)
    return [shuffler.sample(names, len(names)) for _ in range(rounds)]


def _seconds(model: nn.Module, images: Tensor, iterations: int) -> float:
    """Mean seconds of a forward pass over `iterations` of them."""
    if images.device.type == "cuda":
        return _cuda_seconds(model, images, iterations)
    _synchronize(images.device)
    start = time.perf_counter()
    for _ in range(iterations):
        model(images)
    _synchronize(images.device)
    return (time.perf_counter() - start) / iterations


def _cuda_seconds(model: nn.Module, images: Tensor, iterations: int) -> float:
    """As `_seconds`, on the GPU's own clock: events in the stream know nothing of the host's wake-up time."""
    with torch.cuda.device(images.device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        start.record()
        for _ in range(iterations):
            model(images)
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1000 / iterations


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _result(name: str, batch_size: int, rounds: list[float], iterations: int, reference: list[float]) -> SpeedResult:
    speedup, low, high = median_ratio_interval(reference, rounds)
    return SpeedResult(name, batch_size, rounds, iterations, batch_size / median(rounds), speedup, low, high)
