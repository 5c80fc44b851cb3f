"""Throughput and latency of several models, measured in turns so that disturbances affect all of them alike."""

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
from itertools import pairwise
from statistics import median

import torch
from torch import Tensor, nn

from tokbench.measure._model import (
    evaluation_mode,
    is_out_of_memory,
    placement,
    release_memory,
    resolve_input_size,
)
from tokbench.measure.stats import FEWEST_VALUES, median_ratio_interval, widest

# With fewer rounds there is no interval; where more would fit, longer turns are worth more.
FEWEST_ROUNDS, MOST_ROUNDS = FEWEST_VALUES, 100
# Half-widths of intervals, relative to their values: nothing more to learn, and too wide to choose by.
SHARP_WIDTH, VAGUE_WIDTH = 0.01, 0.05
# Passes on a single image: enough that the 95th percentile is not the slowest one.
LATENCIES = 50
# Long enough for the clock's resolution and an accelerator's queue, short compared with the measurement.
ESTIMATE_SECONDS = 0.05

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@dataclass(frozen=True)
class SpeedResult:
    """One model's timings.

    `rounds` holds one value a round: the seconds of a forward pass on `batch_size` images, the median of `iterations`
    passes. `throughput` is in images/s, from the median round. `speedup` is the median over rounds of the first model's
    seconds / this one's (so 1 for the first model), with its 95 % interval from `speedup_low` to `speedup_high`, NaN
    where there were too few rounds. `latency` holds the seconds of forward passes on a single image.
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
    patience: Mapping[float, float] | None = None,
    latency_of: Collection[str] = (),
    warmup: int = 3,
    seed: int = 0,
    on_warm: Callable[[int], None] | None = None,
    on_round: Callable[[int, int], None] | None = None,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> list[SpeedResult]:
    """Time the models' forward passes in interleaved rounds; speed-ups are over the first model.

    All models run on the same images, random unless some are given. Their parameters must be on one device and of one
    dtype. In each round every model has one turn.

    Args:
        models: the models by name; the first is the reference of the speed-ups.
        batch_size: images in a pass.
        input_size: the side, (C, H, W), or None for the size the first model was built for.
        images: (B, C, H, W), for models whose work depends on them, taken again from the first if a batch has more.
        rounds: the number of rounds, however long they take. None: as many as fit in `seconds`, at least 8; fewer once
            every time and every speed-up has an interval of ±1 %.
        seconds: time for all rounds of all models; a turn has as many passes as fit its share, at least one.
        patience: how many times as long to go on, where `rounds` is None, while any of these intervals is wider, by
            half-width: {0.05: 2, 0.25: 6}. Wider intervals come later.
        latency_of: models to time on single images too, some passes in each round: about 50 in all, or fewer so that
            they take at most half of `seconds` more. They use the host's clock, because latency includes kernel
            launches.
        warmup: uncounted passes of every model before; a few more estimate its speed.
        seed: of the images and of the order of turns.
        on_warm: called with the number of warm-ups that are done: one a model, which compiles it where it compiles, and
            one more for each of `latency_of`.
        on_round: called with the rounds done and planned.
        on_failure: called with a model that raises, which is then left out; without `on_failure`, and for the first
            model, the exception propagates.

    On the CPU the process keeps freed memory from then on: see `keep_freed_memory`.

    Raises:
        ValueError: the models differ in device or dtype, or there are no models, images or rounds.
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
        """`timed` of these models, except those that have failed."""
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

    warm = 0

    def warmed(name: str, images: Tensor) -> float:
        nonlocal warm
        estimate = _warm_up(models[name], images, warmup)
        warm += 1
        if on_warm is not None:
            on_warm(warm)
        return estimate

    def turn(name: str) -> float:
        return _seconds(models[name], images, iterations[name])

    with torch.inference_mode(), evaluation_mode(models.values()), _short_collections():
        estimates = each(models, lambda name: warmed(name, images))
        single = each((name for name in models if name in latency_of), lambda name: warmed(name, image))
        estimates = {name: estimates[name] for name in running}
        planned, iterations = plan(estimates, rounds, seconds)
        affordable = seconds / 2 / planned / sum(single.values()) if single else 0
        answers = max(1, min(math.ceil(LATENCIES / planned), int(affordable)))
        timings: dict[str, list[float]] = {name: [] for name in models}
        latencies: dict[str, list[float]] = {name: [] for name in models}
        share = 1.5 if single else 1.0  # of the time for batches, with that for single images
        limits = {SHARP_WIDTH: share * seconds} | {
            width: share * seconds * more for width, more in (patience or {}).items()
        }
        due = _rounds_due(planned, limits, lambda: widest([timings[name] for name in running]))
        if rounds is not None:
            due = ((done, rounds) for done in range(1, rounds + 1))
        for (done, total), order in zip(due, _orders(running, seed), strict=False):
            for name, typical in each(order, turn).items():
                timings[name].append(typical)
            for number, single_order in zip(range(answers), _orders(single, seed + done), strict=False):
                image = images[(done * answers + number) % batch_size].unsqueeze(0)  # the same for every model
                for name, took in each(single_order, partial(_answer_seconds, models, image)).items():
                    latencies[name].append(took)
            if on_round is not None:
                on_round(done, total)
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


def plan(estimates: Mapping[str, float], rounds: int | None, seconds: float) -> tuple[int, dict[str, int]]:
    """(rounds, passes in a turn by model) for models with passes of about `estimates` seconds.

    rounds: so many in any case; None for as many as fit.
    """
    affordable = int(seconds / sum(estimates.values()))
    rounds = rounds or min(MOST_ROUNDS, max(affordable, FEWEST_ROUNDS))
    turn = seconds / (rounds * len(estimates))
    return rounds, {name: max(1, int(turn / estimate)) for name, estimate in estimates.items()}


def _rounds_due(planned: int, limits: Mapping[float, float], width: Callable[[], float]) -> Iterator[tuple[int, int]]:
    """(number, planned so far) of each round to make, at least `FEWEST_ROUNDS`.

    limits: by half-width of the widest interval, seconds from the first round on up to which to go on while it is
    wider. width: of the widest interval now.
    """
    done, began = 0, time.perf_counter()
    for enough, limit in limits.items():
        look = max(done, FEWEST_ROUNDS)
        if done:
            planned = int(done * limit / (time.perf_counter() - began))
        while done < FEWEST_ROUNDS or (done < planned and time.perf_counter() - began < limit):
            if done == look:
                if width() <= enough:
                    return
                look += max(1, done // 8)  # the more looks, the more often chance ends it
            done += 1
            yield done, planned


def keep_freed_memory() -> bool:
    """Make glibc's malloc keep freed memory instead of returning it to the system; False without glibc.

    Whether malloc returns memory depends on what the process did before, and getting it back costs a page fault for
    every 4 KiB, so that the same pass is slower in one process than in another.
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

    Everything else on the device counts too, such as the weights of other models; models made by `fork` share theirs.
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
    """The largest power of two, up to `most`, of images that fit in memory for every model; 1 is not tried."""
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
    # Not in the handler: there, the frames of the exception still hold the memory.
    release_memory(device)
    return False


@contextmanager
def _short_collections() -> Iterator[None]:
    """Exclude existing objects from garbage collection: traversing them takes as long as many passes."""
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
    """Estimated seconds of a pass, after warm-up passes that compile, allocate and choose kernels."""
    for _ in range(passes):
        answers = model(images)
        if isinstance(answers, Tensor) and len(answers) != len(images):  # it would only look fast
            raise ValueError(f"the model gave {len(answers)} answers to {len(images)} images")
    once = _seconds(model, images, 1)
    return _seconds(model, images, max(1, int(ESTIMATE_SECONDS / once)))


def _orders(names: Iterable[str], seed: int) -> Iterator[list[str]]:
    shuffler, names = random.Random(seed), list(names)
    while True:
        yield shuffler.sample(names, len(names))


def _seconds(model: nn.Module, images: Tensor, iterations: int) -> float:
    """Seconds of a forward pass, the median of `iterations`."""
    return median((_cuda_seconds if images.device.type == "cuda" else _host_seconds)(model, images, iterations))


def _answer_seconds(models: Mapping[str, nn.Module], image: Tensor, name: str) -> float:
    return _host_seconds(models[name], image, 1)[0]


def _host_seconds(model: nn.Module, images: Tensor, iterations: int) -> list[float]:
    """Of each pass; beside an accelerator, which would idle between them, the mean."""
    together = 1 if images.device.type == "cpu" else iterations
    _synchronize(images.device)
    moments = [time.perf_counter()]
    for _ in range(iterations // together):
        for _ in range(together):
            model(images)
        _synchronize(images.device)
        moments.append(time.perf_counter())
    return [(end - start) / together for start, end in pairwise(moments)]


def _cuda_seconds(model: nn.Module, images: Tensor, iterations: int) -> list[float]:
    """`_host_seconds` by CUDA events, which exclude the time until the host wakes up; passes follow without a gap."""
    with torch.cuda.device(images.device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(iterations + 1)]  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        events[0].record()
        for event in events[1:]:
            model(images)
            event.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in pairwise(events)]


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
