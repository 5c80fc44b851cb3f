"""Throughput of several models, measured in turns so that what disturbs the machine disturbs them alike."""

from __future__ import annotations

import ctypes
import gc
import math
import platform
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from tokbench.measure._model import (
    evaluation_mode,
    is_out_of_memory,
    placement,
    release_memory,
    resolve_input_size,
)
from tokbench.measure.stats import batch_quantile, median_ratio_interval

# Below this many rounds a median and its interval mean little; above that many, time is better spent in longer turns.
FEWEST_ROUNDS, MOST_ROUNDS = 5, 40
# Half the width, relative to the speed-up, that its interval is to have, and the rounds that tell what this takes.
TARGET_WIDTH, PILOT_ROUNDS = 0.01, 5
# Passes on a single image: their 95th percentile is then not the slowest.
LATENCIES = 50
# Long enough for the clock and for an accelerator's queue, short enough not to matter.
ESTIMATE_SECONDS = 0.05

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@dataclass(frozen=True)
class SpeedResult:
    """One model's timings.

    `rounds` holds the seconds a forward pass on `batch_size` images took, one figure a round, each the mean
    of `iterations` passes. `throughput` is in images/s, from the median round. `speedup` is the median over
    the rounds of the first model's seconds over this one's, with its 95 % interval from `speedup_low` to
    `speedup_high`; the first model's own is 1. `latency` holds the seconds that forward passes on a single image took.
    """

    name: str
    batch_size: int
    rounds: list[float]
    iterations: int
    throughput: float
    speedup: float
    speedup_low: float
    speedup_high: float
    latency: list[float]


def measure_speed(
    models: Mapping[str, nn.Module],
    *,
    batch_size: int,
    input_size: int | Sequence[int] | None = None,
    images: Tensor | None = None,
    rounds: int | None = None,
    seconds: float = 30.0,
    latency_of: Collection[str] = (),
    warmup: int = 3,
    seed: int = 0,
    on_round: Callable[[int, int], None] | None = None,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> list[SpeedResult]:
    """Time the models' forward passes in interleaved rounds; speed-ups are over the first model.

    All models run on the same images, random unless some are given, on their parameters' device and in their dtype,
    which must be common. In each round every model has one turn. Models too slow for `seconds` get fewer rounds, at
    least 5 (or `rounds`), and those that a busy machine slows down later on stop after twice the time.

    Args:
        models: the models by name, the one that speed-ups are over first.
        batch_size: images in a pass.
        input_size: a side, (C, H, W), or None for what the first model was built for.
        images: (B, C, H, W), for models whose work depends on them, taken again from the first if a batch has more.
        rounds: how many, if they fit in `seconds`. None: a pilot of a few rounds, not counted, tells how many make
            every speed-up's interval ±1 % wide, and as many are made as fit in `seconds`. Their number is fixed before
            the first counts: stopping once the interval looks narrow would make it wrong too often.
        seconds: the time for all rounds of all models; a turn is as many passes as fit its share, at least one.
        latency_of: models to be timed on single images too, some passes in each round, so that latency has seen as
            much of the machine's moods as throughput: about 50 in all, or fewer that take half of `seconds` more.
            They are on the host's clock, from the call to the answer, because launching kernels is part of it.
        warmup: passes of every model before; a few more estimate its speed.
        seed: of the images and of the order of turns.
        on_round: told the rounds done and planned.
        on_failure: told of a model that raises, which is then left out of the results; without `on_failure`, or when
            it is the first model, the exception goes through.

    On the CPU the process keeps the memory that it frees from then on: see `keep_freed_memory`.

    Raises:
        ValueError: models on different devices or of different dtypes, and no models, images or rounds.
    """
    if not models or batch_size < 1 or (rounds is not None and rounds < 1):
        raise ValueError("measure_speed needs at least one model, one image in a batch and one round")
    device, dtype = _common_placement(models)
    reference = next(iter(models))
    images = _batch(models[reference], batch_size, input_size, images, seed)
    image = images[:1].clone()
    running = dict(models)
    if device.type == "cpu":
        keep_freed_memory()

    def each(order: Iterable[str], timed: Callable[[str], float]) -> dict[str, float]:
        """What `timed` says of these models, as far as they are still in the running."""
        figures = {}
        for name in order:
            if name in running:
                try:
                    figures[name] = timed(name)
                except Exception as error:
                    if on_failure is None or name == reference:
                        raise
                    del running[name]
                    on_failure(name, error)
        return figures

    def turn(name: str) -> float:
        return _seconds(models[name], images, iterations[name])

    with torch.inference_mode(), evaluation_mode(models.values()), _short_collections():
        estimates = each(models, lambda name: _warm_up(models[name], images, warmup))
        single = each(
            (name for name in models if name in latency_of), lambda name: _warm_up(models[name], image, warmup)
        )
        estimates = {name: estimates[name] for name in running}
        planned, iterations = plan(estimates, MOST_ROUNDS if rounds is None else rounds, seconds)
        if rounds is None and planned > FEWEST_ROUNDS + PILOT_ROUNDS:
            pilot = [each(order, turn) for order in _orders(running, PILOT_ROUNDS, seed + 1)]
            planned = min(rounds_for(pilot, reference), planned - PILOT_ROUNDS)
        affordable = seconds / 2 / planned / sum(single.values()) if single else 0
        answers = max(1, min(math.ceil(LATENCIES / planned), int(affordable)))
        timings: dict[str, list[float]] = {name: [] for name in models}
        latencies: dict[str, list[float]] = {name: [] for name in models}
        patience = 2 * (seconds * 1.5 if single else seconds)
        began = time.perf_counter()
        for done, order in enumerate(_orders(running, planned, seed), start=1):
            for name, mean in each(order, turn).items():
                timings[name].append(mean)
            for number, single_order in enumerate(_orders(single, answers, seed + done), start=done * answers):
                image = images[number % batch_size].unsqueeze(0)  # the same for every model
                for name, took in each(single_order, partial(_answer_seconds, models, image)).items():
                    latencies[name].append(took)
            if on_round is not None:
                on_round(done, planned)
            if done >= min(rounds or FEWEST_ROUNDS, FEWEST_ROUNDS) and time.perf_counter() - began > patience:
                break
    results = []
    for name in running:
        speedup, low, high = median_ratio_interval(timings[reference], timings[name])
        throughput = batch_size / median(timings[name])
        results.append(
            SpeedResult(
                name, batch_size, timings[name], iterations[name], throughput, speedup, low, high, latencies[name]
            )
        )
    return results


def plan(estimates: Mapping[str, float], rounds: int, seconds: float) -> tuple[int, dict[str, int]]:
    """(rounds, passes in a turn by model) for models whose passes take about `estimates` seconds."""
    affordable = int(seconds / sum(estimates.values()))
    rounds = min(rounds, max(affordable, FEWEST_ROUNDS))
    turn = seconds / (rounds * len(estimates))
    return rounds, {name: max(1, int(turn / estimate)) for name, estimate in estimates.items()}


def rounds_for(pilot: Sequence[Mapping[str, float]], reference: str) -> int:
    """How many rounds bring the 95 % interval of each median speed-up to ± `TARGET_WIDTH`, judged by a pilot's.

    The median of n normal log ratios of deviation σ has a deviation of 1.2533 σ / √n, and the interval reaches a
    quantile of Student's t times that.
    """
    names = sorted(set.intersection(*(set(seconds) for seconds in pilot)))
    logs = np.log([[seconds[reference] / seconds[name] for name in names] for seconds in pilot])
    deviation = float(logs.std(axis=0, ddof=1).max())
    return max(FEWEST_ROUNDS, int(np.ceil((batch_quantile() * 1.2533 * deviation / TARGET_WIDTH) ** 2)))


def keep_freed_memory() -> bool:
    """Have glibc's malloc keep what is freed instead of giving it back to the system; False where there is no glibc.

    Whether it gives back depends on what the process did before, and taking it again costs a page fault for every
    4 KiB: up to a fifth of a pass of a method that writes large matrices, in one process and not in the next.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def _batch(
    model: nn.Module, batch_size: int, input_size: int | Sequence[int] | None, images: Tensor | None, seed: int = 0
) -> Tensor:
    """(batch_size, C, H, W) on the model's device: of these images, or random ones."""
    if images is None:
        size = resolve_input_size(model, input_size)
        images = torch.rand(batch_size, *size, generator=torch.Generator().manual_seed(seed))
    device, dtype = placement(model)
    return images[torch.arange(batch_size) % len(images)].to(device, dtype)


def measure_memory(
    model: nn.Module,
    *,
    batch_size: int,
    input_size: int | Sequence[int] | None = None,
    images: Tensor | None = None,
) -> tuple[int, int] | None:
    """(bytes allocated, bytes reserved) at the peak of a forward pass on CUDA, weights included; None elsewhere.

    Everything else on the device counts as well, such as the weights of other models; models made by `fork` share one
    copy of theirs.
    """
    device, _ = placement(model)
    if device.type != "cuda":
        return None
    images = _batch(model, batch_size, input_size, images)
    with torch.inference_mode(), evaluation_mode([model]):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        model(images)
        torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def largest_batch(
    models: Iterable[nn.Module], *, input_size: int | Sequence[int] | None = None, most: int = 1024
) -> int:
    """The largest power of two, up to `most`, of images that every model has memory for. 1 is taken for granted."""
    size = 1
    while size < most and all(_fits(model, 2 * size, input_size) for model in models):
        size *= 2
    return size


def _fits(model: nn.Module, batch_size: int, input_size: int | Sequence[int] | None) -> bool:
    device, dtype = placement(model)
    images = torch.zeros(1, *resolve_input_size(model, input_size), device=device, dtype=dtype)
    try:
        with torch.inference_mode(), evaluation_mode([model]):
            model(images.expand(batch_size, -1, -1, -1).clone())
            _synchronize(device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    else:
        return True
    # Only here: while the exception is being handled, its frames still hold what filled the memory.
    release_memory(device)
    return False


@contextmanager
def _short_collections() -> Iterator[None]:
    """Python's garbage collector leaves alone what is there already: walking all of it takes as long as many passes."""
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


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
        answers = model(images)
        if isinstance(answers, Tensor) and len(answers) != len(images):  # it would look fast
            raise ValueError(f"the model gave {len(answers)} answers to {len(images)} images")
    once = _seconds(model, images, 1)
    return _seconds(model, images, max(1, int(ESTIMATE_SECONDS / once)))


def _orders(names: Iterable[str], rounds: int, seed: int) -> list[list[str]]:
    shuffler, names = random.Random(seed), list(names)
    return [shuffler.sample(names, len(names)) for _ in range(rounds)]


def _seconds(model: nn.Module, images: Tensor, iterations: int) -> float:
    """Mean seconds of a forward pass over `iterations` of them."""
    if images.device.type == "cuda":
        return _cuda_seconds(model, images, iterations)
    return _host_seconds(model, images, iterations)


def _answer_seconds(models: Mapping[str, nn.Module], image: Tensor, name: str) -> float:
    return _host_seconds(models[name], image, 1)


def _host_seconds(model: nn.Module, images: Tensor, iterations: int) -> float:
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
