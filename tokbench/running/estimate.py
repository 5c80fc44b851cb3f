"""What a run would do, how long that would take, and in how much memory: what `tokbench run --dry-run` tells.

A probe does a little of everything: it reads a few images, makes a cell of each method and shows it a batch. The rest
is multiplied out.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from tokbench.config import Grid, PlannedCell
from tokbench.data.decoding import ImageError, Skipped
from tokbench.errors import RunStopped, UserError, one_line
from tokbench.fusion.anatomy import grid_for
from tokbench.fusion.core import METHODS, make_method
from tokbench.measure._model import release_memory
from tokbench.measure.accuracy import evaluate
from tokbench.measure.environment import available_cores
from tokbench.measure.speed import FEWEST_ROUNDS, VAGUE_WIDTH, plan
from tokbench.progress import Progress
from tokbench.rates import look_up
from tokbench.report.text import plural
from tokbench.resolve import relative_cost
from tokbench.results.cell import Setting
from tokbench.results.folder import RunFolder, fresh_path, is_run
from tokbench.running.answers import continues, passes, readers
from tokbench.running.bench import Bench
from tokbench.running.half_pass import kept_half
from tokbench.running.runner import load_subject, planned, require_possible
from tokbench.running.searched import known_searches
from tokbench.running.shared import blocks_before_removal
from tokbench.running.timing import Turn, in_turns, time_for
from tokbench.schedules import Schedule, parse_schedule

# For one model. Methods that are not reached are taken for as slow as the mean of the others.
PROBE_SECONDS = 30.0
READ_IMAGES, PASSES = 24, 3
# How far a pass may be from what the same method at another schedule, or other methods, say.
UNLIKE = 0.2
SEARCH_SECONDS = 600.0  # at most, for each schedule that is to be searched
SETUP, SEARCH, READING, FORWARD, SPEED = (
    "to load models, apply methods and count FLOPs", "to search schedules", "to read images", "to show them to models",
    "to time",
)  # fmt: skip
PARTS = (SETUP, SEARCH, READING, FORWARD, SPEED)
# Seconds: the least, the likely and the most.
Span = np.ndarray


@dataclass
class _Forecast:
    """What is to be done, line by line, and the seconds of its parts."""

    lines: list[str] = field(default_factory=list)
    parts: dict[str, Span] = field(default_factory=lambda: {part: np.zeros(3) for part in PARTS})
    probed: int = 0
    cells: int = 0


def preview(grid: Grid, out: str | Path | None = None, *, progress: Progress | None = None, fresh: bool = False) -> str:
    """What `run` would do with the same arguments, and how long that would take, for people. Nothing is written.

    Raises UserError where that run would be refused.
    """
    options, began, progress = grid.options, time.monotonic(), progress or Progress()
    path = Path(out) if out else None
    if path and fresh and is_run(path):
        path = fresh_path(path)
    device = require_possible(grid, options)
    folder = RunFolder.open(path) if path and is_run(path) else None
    subjects = [load_subject(spec, grid, options, keep=False) for spec in grid.models]
    loading = time.monotonic() - began
    known = known_searches(grid, folder.manifest.sessions if folder else [])
    forecast = _Forecast()
    forecast.parts[SETUP] += loading
    for bench in planned(grid, options, device, subjects, folder, progress).benches:
        subject = bench.subject
        subject.searched = {cell.key: known[cell.key] for cell in subject.cells if cell.key in known}
        _foresee(bench, forecast)
        bench.let_go()
    summary = _summary(forecast, time.monotonic() - began, device)
    return "\n".join([grid.describe(), "", *forecast.lines, "", *summary])


def _foresee(bench: Bench, forecast: _Forecast) -> None:
    label, cells, waiting = bench.subject.spec.label, bench.subject.cells, bench.waiting()
    done = f", {len(cells) - len(waiting)} are measured already and skipped" if len(waiting) < len(cells) else ""
    forecast.lines.append(f"{label}: {len(waiting)} of {len(cells)} cells to measure{done}")
    if not waiting:
        return
    forecast.cells += len(waiting)
    probe = _Probe(bench, waiting)
    forecast.probed += sum(cell.id in probe.passes for cell in waiting)
    forecast.lines += probe.failures
    forecast.parts[SETUP] += sum(probe.setup(cell) for cell in waiting)
    unknown = [cell for cell in waiting if _budget(cell) and cell.key not in bench.subject.searched]
    if unknown:
        forecast.lines.append(f"  search: {_count(len(unknown), 'schedule')}")
        forecast.parts[SEARCH] += np.array([0.1, 0.5, 1.0]) * SEARCH_SECONDS * len(unknown)
    if "flops" in bench.options.only:
        forecast.lines.append(f"  FLOPs: {_count(sum(bench.lacks(cell, 'flops') for cell in waiting), 'cell')}")
    half, source = None, cast(Any, bench.subject.source)
    if bench.folder and source is not None and continues(bench, source):
        half, _ = kept_half(bench.folder, label)
    for members, begun in passes(bench, lambda: cells, half):
        start, total = begun.end, len(source)
        what = f"images {start + 1:,} to {total:,}, where it was interrupted," if start else f"all {total:,} images"
        forecast.lines.append(f"  accuracy: one pass over {what} for {_count(len(members), 'cell')} together")
        forward = (total - start) * np.sum([probe.cost_beside_unreduced(cell) for cell in members], axis=0)
        reading = _reading(bench, (total - start) * probe.reading, forward)
        forecast.parts[FORWARD] += forward
        forecast.parts[READING] += reading
    for size in bench.options.sizes or (None,):
        _foresee_speed(bench, probe, size, forecast)


def _count(number: int, what: str) -> str:
    return f"{number:,} {plural(number, what)}"


def _budget(cell: PlannedCell) -> str:
    return parse_schedule(cell.schedule).budget if cell.schedule else ""


def _reading(bench: Bench, seconds: Span, forward: Span) -> Span:
    """What reading adds to a pass of so many seconds in models, if one process would read for `seconds`."""
    processes = min(readers(cast(Any, bench.subject.source), bench.options, bench.device), available_cores())
    if not processes:
        return seconds
    if bench.device.type == "cpu":  # the models take all cores, too
        return seconds / available_cores()
    return np.maximum(seconds / processes - forward, 0)


def _foresee_speed(bench: Bench, probe: _Probe, size: int | None, forecast: _Forecast) -> None:
    """Add the rounds at a batch size, as `time_members` and `measure_speed` plan them."""
    options = bench.options
    asked = [Turn(cell, runtime) for runtime in options.runtimes for cell in bench.subject.cells]
    lacking = [own for own in asked if bench.lacks(own.cell, "speed", Setting(size, own.runtime))]
    if not lacking:
        return
    members = [own.cell for own in in_turns(lacking, asked)]
    limited = [cell for cell in members if not cell.is_baseline and not METHODS[cell.method.name].speed_only]
    models, batch = len(members) + len(limited), size or bench.batch_size
    limits = probe.cost(bench.subject.cells[0]) * sum(map(probe.share, limited))
    once = batch * (sum(map(probe.cost, members)) + limits)
    budget, patience = time_for(options, models)
    fits, _ = plan({"": once[1]}, None, budget)
    # Half as much again for single images. Unless it was asked for, a few rounds may do, or they go on for longer.
    span = 1.5 * budget * np.array([FEWEST_ROUNDS / fits, 1, patience.get(VAGUE_WIDTH, 1)])
    if options.rounds:
        span = budget * np.array([1, 1.5, 1.5])
    rounds = np.maximum(span, (options.rounds or FEWEST_ROUNDS) * once)
    warmup = 8 * once + 0.1 * models  # five passes, of which the first are slow, and as many on single images
    forecast.parts[SPEED] += rounds + warmup * options.processes
    if options.processes > 1:
        forecast.parts[SETUP] += options.processes * sum(map(probe.setup, members))
    where = f" at batch {size}" if size else ""
    if options.runtimes != ("eager",):
        where += f" in {', '.join(options.runtimes)} (without the time to compile or export)"
    limits_too = f" and up to {_count(len(limited), 'speed limit')}" if limited else ""
    forecast.lines.append(f"  speed: {_count(len(members), 'cell')}{limits_too} in turns{where}")


class _Probe:
    """What the parts of a model's run take.

    reading: seconds for an image. passes: seconds for an image in a forward pass, by the id of the cells that were
    shown some. failures: a line for each cell that failed.
    """

    def __init__(self, bench: Bench, waiting: list[PlannedCell]) -> None:
        self.bench, began = bench, time.monotonic()
        self.reading, self.passes, self.failures = np.zeros(3), dict[str, Span](), list[str]()
        self._setups: dict[str, float] = {}
        self._overheads: dict[str, float] = {}
        self._shares: dict[str, float] = {}
        self._shared: dict[str, float] = {}
        baseline = bench.subject.cells[0]
        self._base = bench.subject.model.to(bench.device, bench.dtype)
        images, self._labels = self._read()
        self._images = images[torch.arange(bench.batch_size) % len(images)]
        chosen = self._chosen(waiting)
        bench.phase("probing", 1 + len(chosen))
        self._try(baseline)
        for done, cell in enumerate(chosen, start=1):
            if done > 1 and time.monotonic() - began > PROBE_SECONDS:
                break
            bench.progress.advance(done)
            self._try(cell)
        release_memory(bench.device)

    def setup(self, cell: PlannedCell) -> float:
        """Seconds to make a cell and count its FLOPs."""
        known = self._setups
        return known.get(str(cell.method), fmean(known.values()))

    def cost(self, cell: PlannedCell) -> Span:
        """Seconds for an image in a forward pass."""
        if cell.id in self.passes:
            return self.passes[cell.id]
        overhead = self._overheads.get(str(cell.method), fmean(self._overheads.values() or [1.0]))
        likely = self.passes[self.bench.subject.cells[0].id] * self.share(cell) * overhead
        return likely * (1 - UNLIKE, 1, 1 + UNLIKE)

    def cost_beside_unreduced(self, cell: PlannedCell) -> Span:
        """The same where the unreduced model has seen the image, and the first blocks need not be run again."""
        unreduced = self.passes[self.bench.subject.cells[0].id]
        return self.cost(cell) - unreduced * self._shared.get(str(cell.method), 0.0)

    def share(self, cell: PlannedCell) -> float:
        """About what a cell takes of the unreduced model's FLOPs; of its time where it was searched for a speed-up."""
        if cell.id not in self._shares:
            self._shares[cell.id] = self._share(cell)
        return self._shares[cell.id]

    def _share(self, cell: PlannedCell) -> float:
        bench, model = self.bench, self._base
        if cell.is_baseline:
            return 1.0
        if record := bench.index.find(cell.key, "flops"):
            return float(record.flops_ratio)
        schedule = parse_schedule(cell.schedule)
        if found := bench.searched(cell):
            schedule = parse_schedule(found.schedule)
        if schedule.kind in ("flops", "searched:flops"):
            return schedule.values[0]
        if schedule.kind == "searched:speedup":
            return 1 / schedule.values[0]
        method = make_method(cell.method.name, **cell.method.params)
        if schedule.kind == "diffrate":
            method, schedule = look_up(model, method, schedule)
        patches, method = math.prod(grid_for(model, bench.subject.input_size)), method.countable()
        whole = relative_cost(model, method, Schedule("list", (0.0,)), patches)
        return relative_cost(model, method, schedule, patches) / whole

    def _chosen(self, waiting: list[PlannedCell]) -> list[PlannedCell]:
        """A cell of each method: that of the middle one of its schedules."""
        methods: dict[str, list[PlannedCell]] = {}
        for cell in waiting:
            if not cell.is_baseline and not (_budget(cell) and cell.key not in self.bench.subject.searched):
                methods.setdefault(str(cell.method), []).append(cell)
        return [sorted(own, key=self.share)[len(own) // 2] for own in methods.values()]

    def _try(self, cell: PlannedCell) -> None:
        """Make a cell, count its FLOPs if the run would, and show it the images."""
        bench, began = self.bench, time.monotonic()
        try:
            runnable = bench.make(cell, self._base, bench.identity(cell))
            if bench.lacks(cell, "flops"):
                bench.counted(runnable)
            self._setups[str(cell.method)] = time.monotonic() - began
            self.passes[cell.id] = self._timed(runnable.model)
        except RunStopped:
            raise
        except Exception as error:
            failure = f"{cell.id} would fail: {one_line(error)}"
            if cell.is_baseline:
                raise UserError(failure) from error
            self.failures.append(f"  {failure}")
        else:
            unreduced = self.passes[bench.subject.cells[0].id][1]
            if not cell.is_baseline:
                fusion = cast(Any, runnable.model).fusion
                self._overheads[str(cell.method)] = float(self.passes[cell.id][1] / self.share(cell) / unreduced)
                self._shared[str(cell.method)] = blocks_before_removal(fusion) / fusion.depth

    def _timed(self, model: nn.Module) -> Span:
        """Seconds for an image of a batch, with what is read off the answers; after one that only warms up."""
        bench, took = self.bench, []
        source, sizes = bench.subject.source, dict[str, int]()
        for _ in range(1 + PASSES):
            began = time.monotonic()
            evaluate(
                {"": model}, [(self._images, self._labels)], device=bench.device, dtype=bench.dtype, batch_sizes=sizes,
                prepare=source.floats if source else None, classifier=bench.subject.model.num_classes > 0,
            )  # fmt: skip
            took.append((time.monotonic() - began) / len(self._images))
        return np.quantile(took[1:], [0, 0.5, 1])

    def _read(self) -> tuple[Tensor, Tensor]:
        """Some images all over the data, as bytes, or random ones where there is none; and no labels."""
        source, bench = self.bench.subject.source, self.bench
        nobody = torch.full((bench.batch_size,), -1)
        if source is None:
            return torch.rand(1, *bench.subject.input_size), nobody
        found: list[Tensor] = []
        took: list[float] = []
        began = time.monotonic()
        for pixels in _some(source):
            took.append(time.monotonic() - began)
            found += [] if pixels is None else [pixels]
            began = time.monotonic()
        if not found:
            raise RunStopped(f"none of the images of {source.name} can be decoded: nothing to measure.")
        usual = took[1:] or took  # the first one opens files and loads decoders
        error = 2 * np.std(usual) / len(usual) ** 0.5
        self.reading = np.clip(fmean(usual) + np.array([-error, 0, error]), 0, None)
        return torch.stack(found), nobody


def _some(source: Any) -> Iterator[Tensor | None]:
    """Bytes (H, W, C) of some images; None for one that cannot be decoded."""
    if not source.streaming:
        for index in np.unique(np.linspace(0, len(source) - 1, READ_IMAGES).astype(int)).tolist():
            try:
                yield source.pixels(index)[0]
            except ImageError:
                yield None
    else:
        for item in islice(source.items(), READ_IMAGES):
            yield None if isinstance(item, Skipped) else item[0]


def _summary(forecast: _Forecast, took: float, device: torch.device) -> list[str]:
    whole = np.sum([*forecast.parts.values()], axis=0)
    if not forecast.cells:
        return ["Everything is measured already."]
    low, likely, high = (_words(seconds) for seconds in whole)
    reach = f" (between {low} and {high})" if low != high else ""
    where = " of the GPU" if device.type == "cuda" else ""
    parts = [f"{_words(span[1])} {part}" for part, span in forecast.parts.items() if span[1] >= 0.02 * whole[1]]
    return [
        f"About {likely}{reach}: {', '.join(parts)}.",
        f"At the peak about {_peak_bytes(device) / 1e9:.1f} GB of memory{where}.",
        f"This is from a probe of {_words(took)}, in which {forecast.probed} of {_count(forecast.cells, 'cell')} ran. "
        "Other work on the machine makes it longer, above all timing; so do images on a slow disk.",
    ]


def _words(seconds: float) -> str:
    for unit, size in (("hour", 3600.0), ("minute", 60.0)):
        if seconds >= 1.5 * size:
            number = f"{seconds / size:.1f}".removesuffix(".0") if seconds < 10 * size else f"{seconds / size:.0f}"
            return f"{number} {unit}s"
    return f"{max(1, round(seconds))} s"


def _peak_bytes(device: torch.device) -> int:
    """What the probe, whose batches are the run's, took at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
