"""Runs a grid: every cell of a model shares one copy of the weights, one pass over the images, and the same rounds.

FLOPs come first: they take seconds and tell which cells run at all. Then accuracy, then speed. A record is on disk
as soon as it is measured, and a pass over the images every few seconds: the same command on the same folder goes on
where the last one stopped, whatever stopped it.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import sys
import traceback
import warnings
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tokbench.calibrate import CALIBRATION_IMAGES, wants_images
from tokbench.config import Cell, Grid, ModelSpec, RunOptions
from tokbench.data import ImageSource, ImageStream, load_batches, open_dataset
from tokbench.errors import RunStopped, UserError, one_line
from tokbench.fusion.core import METHODS, make_method
from tokbench.fusion.patch import fork, require_supported, tokens_per_block
from tokbench.measure._model import is_out_of_memory, release_memory, resolve_input_size
from tokbench.measure.accuracy import Predictions, evaluate, join
from tokbench.measure.compiled import compile_model
from tokbench.measure.environment import Watch, describe_machine, git_state, package_versions
from tokbench.measure.flops import FlopCount, count_flops
from tokbench.measure.speed import SpeedResult, largest_batch, measure_latency, measure_memory, measure_speed
from tokbench.measure.stats import mcnemar_p, mean_interval, median_ratio_interval, paired_drop, wilson
from tokbench.models import load_model, weights_sha256
from tokbench.plugins import LOADED
from tokbench.progress import Progress
from tokbench.resolve import FlopsWarning, apply, check_schedule
from tokbench.resume import HalfPass, Measured, PassFile, Reader, agreed_conditions, require_same_answers
from tokbench.schedules import parse_schedule
from tokbench.store import SKIPPED, RunFolder, fresh_path, is_run, new_run_path, require_free, stopping_at_write_errors

if TYPE_CHECKING:
    import pandas as pd

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A budget for all rounds together; slow cells exceed it, because each makes five rounds at least.
SPEED_SECONDS_PER_CELL = 1.0


def run(
    grid: Grid | str | Path | None = None,
    out: str | Path | None = None,
    *,
    options: RunOptions | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
) -> pd.DataFrame:
    """Measure every cell of a grid and draw the Pareto plot; one row per cell comes back (see `load_table`).

    grid: a Grid, the path of a grid file, or None for the default one. out: the run folder, by default a new one
    under results/; a run that is there already is continued: only what it lacks is measured. options: instead of the
    grid's own. progress: told what happens; silent by default. fresh: never continue, but begin in `out`-2 and so on.
    Raises UserError for bad input, before anything is measured, also when the run in `out` had another model, data
    or dtype, and RunStopped when it cannot go on; what was measured is then kept. A cell that fails is recorded as a
    failure (column `error`) and the others go on; a later session tries it again.
    """
    from tokbench.report.metrics import load_table

    if not isinstance(grid, Grid):
        grid = Grid.default() if grid is None else Grid.from_toml(grid)
    options = options or grid.options
    progress = progress or Progress()
    path = Path(out) if out else new_run_path(label=grid.models[0].label)
    path = fresh_path(path) if fresh else path
    if not is_run(path):
        require_free(path)  # before any model is downloaded
    device = find_device(options.device)
    with RunFolder.held(path):
        folder = RunFolder.open(path) if is_run(path) else None
        subjects = [_load(spec, grid, options) for spec in grid.models]
        manifest = _manifest(grid, options, device, subjects, folder)
        folder = _continued(folder, manifest) if folder else RunFolder.create(path, manifest)
        records = folder.records()
        measured = Measured(records)
        cells = sum(len(subject.cells) for subject in subjects)
        progress.started(folder, cells, cells * len(options.only))
        if records:
            progress.continued(records)
        for subject in subjects:
            batch_size = manifest["conditions"]["batch_size"]
            _Bench(subject, folder, options, device, progress, measured, batch_size).measure()
        table = load_table([folder.path])
        with stopping_at_write_errors(folder.path):
            plots = _draw(table, folder.path)
        progress.finished(table, plots)
    return table


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" takes CUDA, else MPS, else the CPU. Raises UserError if it is not there."""
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if has_cuda else "mps" if has_mps else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not has_cuda:
        raise UserError(f"device '{name}': PyTorch sees no CUDA device here; --device cpu works anywhere")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device '{name}': there are {torch.cuda.device_count()} CUDA devices, counted from cuda:0")
    if device.type == "mps" and not has_mps:
        raise UserError(f"device '{name}': PyTorch sees no MPS device here; --device cpu works anywhere")
    return device


@dataclass
class _Subject:
    """A loaded model of the grid, on the CPU, with its images (None when accuracy is not asked for)."""

    spec: ModelSpec
    model: VisionTransformer
    weights: str
    input_size: tuple[int, int, int]
    source: ImageSource | ImageStream | None
    cells: list[Cell]

    def conditions(self) -> dict[str, Any]:
        """What must be the same in every session of a run, ready for JSON; None where there is no data."""
        source = self.source
        return {
            "weights_sha256": self.weights,
            "input_size": list(self.input_size),
            "data": source.name if source else None,
            "data_fingerprint": source.fingerprint if source else None,
            "images": len(source) if source else None,
        }


def _load(spec: ModelSpec, grid: Grid, options: RunOptions) -> _Subject:
    load = partial(load_model, random_weights=True) if spec.random_weights else load_model
    model = cast(VisionTransformer, load(spec.name, spec.checkpoint, input_size=spec.input_size))
    require_supported(model)
    cells = grid.cells(spec)
    for cell in cells:
        if cell.schedule:
            check_schedule(parse_schedule(cell.schedule), len(model.blocks))
    looks_at_images = "accuracy" in options.only or any(_calibrates(cell) for cell in cells)
    source = open_dataset(grid.data, model, limit=options.limit) if looks_at_images else None
    return _Subject(spec, model, weights_sha256(model), resolve_input_size(model, None), source, cells)


def _calibrates(cell: Cell) -> bool:
    return not cell.is_baseline and wants_images(make_method(cell.method.name, **cell.method.params))


def _manifest(
    grid: Grid, options: RunOptions, device: torch.device, subjects: list[_Subject], folder: RunFolder | None
) -> dict[str, Any]:
    """What a new run would write now; `folder` is the run that is to be continued, if there is one."""
    before = folder.manifest.get("conditions", {}) if folder else {}
    size = options.batch_size
    if not isinstance(size, int):
        size = before.get("batch_size") or (128 if device.type == "cuda" else 16)
    return {
        "grid": replace(grid, options=options).to_dict(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "conditions": {
            "dtype": options.dtype,
            "device": device.type,
            "batch_size": size,
            "compile": options.compile,
            "models": {subject.spec.label: subject.conditions() for subject in subjects},
        },
        "machine": describe_machine(device),
        "packages": package_versions(),
        "git": git_state(),
        "command": shlex.join(["tokbench", *sys.argv[1:]])
        if Path(sys.argv[0]).stem in ("tokbench", "__main__")
        else None,
        "plugins": dict(LOADED),
        "seeds": {"subset of the images": 0, "order of timing": 0, "images that are timed": 0},
    }


def _continued(folder: RunFolder, manifest: dict[str, Any]) -> RunFolder:
    """The run with this session added to its manifest. Raises UserError if it was measured under other conditions."""
    before = folder.manifest
    conditions = agreed_conditions(before, manifest, f"the run {str(folder.path)!r}")
    session = {name: manifest[name] for name in ("started", "grid", "command", "git", "plugins")}
    folder.repair()
    plugins = {**before.get("plugins", {}), **manifest["plugins"]}
    continued = [*before.get("continued", []), session]
    folder.write_manifest({**before, "conditions": conditions, "plugins": plugins, "continued": continued})
    return folder


def _draw(table: pd.DataFrame, folder: Path) -> list[Path]:
    """The Pareto plot of what was measured: none without answers, and without a cost to set it against."""
    from tokbench.report.metrics import METRICS
    from tokbench.report.plots import plot_pareto

    costs = [name for name in ("gflops", "throughput") if table[METRICS[name].column].notna().any()]
    gains = [name for name in ("top1", "agreement", "similarity") if table[METRICS[name].column].notna().any()]
    if not costs or not gains:
        return []
    return [plot_pareto(table, folder / "pareto.png", x=costs, y=gains[0])]


@dataclass
class _Runnable:
    """A cell as a model that runs, its speed limit, and what all its records have in common.

    limit: the control `free` with the cell's own tokens per block; None for cells that remove nothing, and for `free`.
    """

    cell: Cell
    model: nn.Module
    identity: dict[str, Any]
    limit: nn.Module | None = None

    @property
    def limit_name(self) -> str:
        """The same for cells with the same limit, so that it is timed once."""
        return f"free/{cast(Any, self.model).fusion.method.place}/{self.identity['tokens']}"


@dataclass
class _Timed:
    """What was timed, by cell id; among the speeds are those of speed limits, by their names."""

    speed: dict[str, SpeedResult]
    latency: dict[str, list[float]]
    memory: dict[str, tuple[int, int] | None]


class _BaselineFailed(Exception):
    """Nothing can be said of a model's cells without the unreduced one."""


@dataclass
class _Bench:
    """One model of the grid on the device: makes its cells and measures them."""

    subject: _Subject
    folder: RunFolder
    options: RunOptions
    device: torch.device
    progress: Progress
    measured: Measured
    batch_size: int
    running: list[_Runnable] = field(default_factory=list)

    def measure(self) -> None:
        """Measure what the run lacks."""
        waiting = [cell for cell in self.subject.cells if any(self._lacks(cell, kind) for kind in self.options.only)]
        if not waiting:
            return
        dtype = DTYPES[self.options.dtype]
        base = self.subject.model.to(self.device, dtype)
        try:
            self._prepare(base, waiting)
            if "accuracy" in self.options.only:
                self._measure_accuracy()
            if "speed" in self.options.only:
                self._measure_speed()
        except _BaselineFailed:
            self.progress.warn(
                f"{self.subject.spec.label}: the unreduced model failed, and there is nothing to compare its cells with"
            )

    def _lacks(self, cell: Cell, kind: str) -> bool:
        if kind == "accuracy" and not cell.is_baseline and METHODS[cell.method.name].speed_only:
            return False
        return kind in self.options.only and self.measured.find(cell, kind) is None

    def _prepare(self, base: VisionTransformer, waiting: list[Cell]) -> None:
        """Make these cells, and the unreduced model where they are compared with it, and count FLOPs where they lack.

        A cell that fails here takes no further part.
        """
        compared = any(self._lacks(cell, kind) for cell in waiting for kind in ("accuracy", "speed"))
        cells = [cell for cell in self.subject.cells if cell in waiting or (cell.is_baseline and compared)]
        counting = any(self._lacks(cell, "flops") for cell in cells)
        self._phase("counting FLOPs" if counting else "applying methods", len(cells))
        uncounted: set[str] = set()
        for done, cell in enumerate(cells, start=1):
            identity = self._identity(cell)
            try:
                runnable = self._make(cell, base, identity)
                self._require_unchanged(runnable)
                if self._lacks(cell, "flops"):
                    count = count_flops(runnable.model, self.subject.input_size)
                    uncounted |= count.unsupported.keys()
                    limit = count_flops(runnable.limit, self.subject.input_size) if runnable.limit else count
                    unreduced = self.measured.find(self.subject.cells[0], "flops")
                    whole = unreduced["flops"] if unreduced else count.total
                    self._record(runnable, "flops", **_flops_fields(count, limit, whole))
            except RunStopped:
                raise
            except Exception as error:
                self._record_failure(cell, identity, "setup", error)
            else:
                self.running.append(runnable)
            self.progress.advance(done)
        if uncounted:
            self.progress.warn(f"FLOPs are too low: no count is known for {', '.join(sorted(uncounted))}")

    def _require_unchanged(self, runnable: _Runnable) -> None:
        """Raise RunStopped if the cell no longer is what an earlier session measured."""
        for kind in self.options.only:
            before = self.measured.find(runnable.cell, kind)
            for name in ("resolved", "tokens"):
                if before and before.get(name) != runnable.identity.get(name):
                    raise RunStopped(
                        f"{runnable.cell.id} is not what it was: {name} were {before.get(name)} and are "
                        f"{runnable.identity.get(name)}. Has the code of the method changed? --fresh begins a new run."
                    )

    def _make(self, cell: Cell, base: VisionTransformer, identity: dict[str, Any]) -> _Runnable:
        model = fork(base)
        if not cell.is_baseline:
            images = self._calibration_images() if _calibrates(cell) else None
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", FlopsWarning)
                apply(model, cell.method.name, cell.schedule, images=images, **cell.method.params)
            for warning in caught:
                self.progress.warn(f"{cell.id}: {warning.message}")
            fusion = cast(Any, model).fusion
            identity["resolved"] = str(fusion.schedule)
            if images is not None:
                identity["calibrated"] = {"images": len(images), **fusion.method.parameters()}
        image = torch.rand(1, *self.subject.input_size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            model(image.to(self.device, DTYPES[self.options.dtype]))
        identity["tokens"] = tokens_per_block(model)
        return _Runnable(cell, model, identity, _speed_limit(model, base))

    def _calibration_images(self) -> torch.Tensor:
        """The first images of the data, without their labels."""
        source = self.subject.source
        assert source is not None
        batch = next(iter(load_batches(source, CALIBRATION_IMAGES, workers=0)))
        return batch.images.to(self.device, DTYPES[self.options.dtype])

    def _identity(self, cell: Cell) -> dict[str, Any]:
        subject = self.subject.conditions()
        return {
            "cell": cell.id,
            "model": self.subject.spec.label,
            "weights_sha256": subject["weights_sha256"],
            "method": cell.method.name,
            "params": dict(cell.method.params),
            "schedule": cell.schedule,
            "input_size": subject["input_size"],
            "data": subject["data"],
            "data_fingerprint": subject["data_fingerprint"],
            "dtype": self.options.dtype,
            "device": self.device.type,
            "weights": "random" if self.subject.spec.random_weights else "trained",
            "fused_attention": "on" if is_fused(self.subject.model) else "off",
        }

    def _measure_accuracy(self) -> None:
        """One pass over the images for all cells that lack it, or two where an earlier session left half of one."""
        source = self.subject.source
        assert source is not None
        file = PassFile(self.folder, self.subject.spec.label)
        half = None if source.streaming else file.load()
        while any(self._lacks(runnable.cell, "accuracy") for runnable in self.running):
            reference, *others = self.running
            members = [reference, *(other for other in others if self._lacks(other.cell, "accuracy"))]
            if half:
                members = [member for member in members if member.cell.id in half.answers]
            if reference in members and any(self._lacks(member.cell, "accuracy") for member in members):
                self._pass_over_images(source, members, half or HalfPass(), file)
            file.remove()
            half = None

    def _pass_over_images(
        self, source: ImageSource | ImageStream, members: list[_Runnable], half: HalfPass, file: PassFile
    ) -> None:
        """Show the images from where `half` ends to these cells, the unreduced model first, and record all answers."""
        reference = members[0]
        before = self._stored_answers(reference)
        skips = self._stored_skips(reference)
        reader = Reader(source, self.batch_size, self._workers(source), half, skips, self.options.max_bad)
        batch_sizes = dict(half.batch_sizes)
        self._phase("accuracy", len(source))
        if half.end:
            self.progress.advance(half.end)
        seen = len(half.answers[reference.cell.id].label) if half.answers else 0

        def keep(answers: dict[str, Predictions]) -> None:
            nonlocal seen
            own = answers[reference.cell.id]
            if before is not None:
                require_same_answers(before, own, seen, repr(str(self.folder.path)))
            seen += len(own.label)
            if not source.streaming:
                file.add(HalfPass(reader.end, answers, dict(batch_sizes), reader.skipped_since()))
            self.progress.advance(reader.end)

        batches = reader.batches()
        first = next(batches, None)
        results = dict(half.answers)
        if first is not None:
            try:
                rest = evaluate(
                    {member.cell.id: member.model for member in members},
                    itertools.chain([first], batches),
                    device=self.device,
                    dtype=DTYPES[self.options.dtype],
                    classifier=self.subject.model.num_classes > 0,
                    batch_sizes=batch_sizes,
                    on_batch=keep,
                    on_failure=lambda cell_id, error: self._drop(cell_id, "accuracy", error),
                )
            except BaseException:
                file.save()
                raise
            results = {name: join([half.answers[name], own] if half.answers else [own]) for name, own in rest.items()}
        self._record_answers(source, members, results, reader, batch_sizes)

    def _record_answers(
        self,
        source: ImageSource | ImageStream,
        members: list[_Runnable],
        results: dict[str, Predictions],
        reader: Reader,
        batch_sizes: dict[str, int],
    ) -> None:
        label, reference = self.subject.spec.label, members[0]
        baseline = results[reference.cell.id]
        first_time = self._lacks(reference.cell, "accuracy")
        if reader.skipped:
            skips = {**self.folder.skipped(), label: [asdict(image) for image in reader.skipped]}
            self.folder.replace(SKIPPED, lambda file: file.write(json.dumps(skips, indent=1).encode() + b"\n"))
            if first_time:
                self.progress.warn(
                    f"{len(reader.skipped)} of {len(source):,} images of {source.name} cannot be decoded, and no cell "
                    f"of {label} saw them: {self.folder.path / SKIPPED} names them"
                )
        for member in members:
            if member.cell.id not in results or not self._lacks(member.cell, "accuracy"):
                continue
            predictions = results[member.cell.id]
            self.folder.replace(self.folder.prediction_name(member.cell.id), predictions.save)
            self._record(
                member,
                "accuracy",
                **accuracy_fields(predictions, baseline),
                skipped=len(reader.skipped),
                batch_size=min(self.batch_size, batch_sizes.get(member.cell.id, self.batch_size)),
            )
            if wrong := predictions.nonfinite():
                self.progress.warn(
                    f"{member.cell.id} gives NaN or infinite logits for {wrong:,} of {len(predictions.label):,} "
                    "images; they count as wrong"
                )
        if first_time and at_chance_level(baseline, source.num_classes):
            self.progress.warn(
                f"{label} gets {baseline.top1():.1%} of {source.name} right, which is chance level: "
                "the model's classes and the data's labels probably don't match, and drops mean nothing"
            )

    def _stored_answers(self, reference: _Runnable) -> Predictions | None:
        """What the unreduced model answered in an earlier session, None where there was no such."""
        if self._lacks(reference.cell, "accuracy"):
            return None
        path = self.folder.prediction_path(reference.cell.id)
        try:
            return Predictions.load(path)
        except (OSError, ValueError, KeyError) as error:
            raise RunStopped(f"the predictions in {path} cannot be read: {error}; --fresh begins a new run.") from error

    def _stored_skips(self, reference: _Runnable) -> list[int] | None:
        if self._lacks(reference.cell, "accuracy"):
            return None
        return [image["index"] for image in self.folder.skipped().get(self.subject.spec.label, [])]

    def _measure_speed(self) -> None:
        """Time the cells that lack it in turns with the unreduced model, on as many images as all have memory for."""
        lacking = [runnable for runnable in self.running if self._lacks(runnable.cell, "speed")]
        if not lacking:
            return
        if not is_fused(self.subject.model):
            self.progress.warn(
                "fused attention is off (TIMM_FUSED_ATTN?): speed-ups are over a slower model than timm's"
            )
        self._phase("warming up for speed", None)
        reference, size = self.running[0], self.batch_size
        if self.options.batch_size == "auto" and self.device.type == "cuda":
            size = largest_batch([runnable.model for runnable in self.running], input_size=self.subject.input_size)
        if self.options.compile:
            for model in (model for member in self.running for model in (member.model, member.limit) if model):
                compile_model(model)
        timed: _Timed | None = None
        watch = Watch(self.device)
        while timed is None:
            members = [reference, *(runnable for runnable in self.running[1:] if runnable in lacking)]
            try:
                timed = self._time(members, size)
            except (RunStopped, _BaselineFailed):
                raise
            except Exception as error:  # the unreduced model's, or nobody's in particular: no speed-up can be told
                if not is_out_of_memory(error) or size == 1:
                    self._drop(reference.cell.id, "speed", error)
                size = (size + 1) // 2
            release_memory(self.device)
        disturbance = watch.stop()
        for sentence in (*disturbance.warnings, *_wide([timed.speed[name] for name in timed.latency])):
            self.progress.warn(sentence)
        # Added to a run, the cells ran beside an unreduced model whose own record is an earlier session's.
        again = {} if reference in lacking else {"reference_seconds": timed.speed[reference.cell.id].rounds}
        for runnable in lacking:
            if runnable.cell.id in timed.memory:
                fields = _speed_fields(runnable, timed, timed.speed[reference.cell.id], self.options.compile)
                self._record(
                    runnable, "speed", **fields, **again, other_cpu=disturbance.other_cpu, gpu_state=disturbance.gpu
                )

    def _time(self, members: list[_Runnable], size: int) -> _Timed:
        limits = {member.limit_name: member.limit for member in members if member.limit is not None}

        def fail(name: str, error: Exception) -> None:
            if is_out_of_memory(error) and size > 1:
                raise error
            if name in limits:
                self.progress.warn(f"no speed limit for the cells of {name}: {one_line(error)}")
            else:
                self._drop(name, "speed", error)

        results = measure_speed(
            {**{member.cell.id: member.model for member in members}, **limits},
            batch_size=size,
            input_size=self.subject.input_size,
            seconds=SPEED_SECONDS_PER_CELL * (len(members) + len(limits)),
            on_round=self._advance_speed,
            on_failure=fail,
        )
        speed = {result.name: result for result in results}
        remaining = [member for member in members if member.cell.id in speed]
        self._phase("latency", None)
        latency = measure_latency(
            {member.cell.id: member.model for member in remaining},
            input_size=self.subject.input_size,
            seconds=SPEED_SECONDS_PER_CELL / 2 * len(remaining),
            on_failure=lambda name, error: self._drop(name, "speed", error),
        )
        memory = {}
        for member in (member for member in remaining if member.cell.id in latency):
            try:
                memory[member.cell.id] = measure_memory(
                    member.model, batch_size=size, input_size=self.subject.input_size
                )
            except Exception as error:
                self._drop(member.cell.id, "speed", error)
        return _Timed(speed, latency, memory)

    def _advance_speed(self, done: int, planned: int) -> None:
        if done == 1:
            self._phase("speed", planned)
        self.progress.advance(done)

    def _drop(self, cell_id: str, phase: str, error: Exception) -> None:
        """Take a cell that failed out of the running ones."""
        failed = next(runnable for runnable in self.running if runnable.cell.id == cell_id)
        self.running.remove(failed)
        self._record_failure(failed.cell, failed.identity, phase, error)

    def _record(self, runnable: _Runnable, kind: str, **measured: Any) -> None:
        record = {"kind": kind, **runnable.identity, **measured}
        self.folder.append(record)
        self.measured.add(record)
        self.progress.recorded(record)

    def _record_failure(self, cell: Cell, identity: dict[str, Any], phase: str, error: Exception) -> None:
        record = {
            "kind": "failure",
            **identity,
            "phase": phase,
            "message": one_line(error),
            "traceback": "".join(traceback.format_exception(error)),
        }
        before = self.measured.find(cell, "failure")
        if not before or any(before.get(name) != record[name] for name in ("phase", "message")):
            self.folder.append(record)
        self.progress.recorded(record)
        if cell.is_baseline:
            raise _BaselineFailed from error

    def _phase(self, name: str, total: int | None) -> None:
        self.progress.phase(f"{self.subject.spec.label}: {name}", total)

    def _workers(self, source: ImageSource | ImageStream) -> int:
        if self.options.workers is not None:
            return self.options.workers
        # On the CPU the cells themselves use every core, and reading an image costs little next to running them all.
        if self.device.type == "cpu":
            return 0
        return 1 if source.streaming else min(8, os.cpu_count() or 1)


def is_fused(model: VisionTransformer) -> bool:
    """Whether all of a model's attention is PyTorch's fused one, as it is in timm unless one turns it off."""
    return all(getattr(block.attn, "fused_attn", True) for block in model.blocks)


def _speed_limit(model: VisionTransformer, base: VisionTransformer) -> VisionTransformer | None:
    """The control `free` with the tokens per block of a model that has made a forward pass."""
    fusion = getattr(model, "fusion", None)
    tokens = [tokens_per_block(base)[0], *tokens_per_block(model)]
    if fusion is None or fusion.method.speed_only or tokens[-1] == tokens[0]:
        return None
    removals = ",".join(str(before - after) for before, after in itertools.pairwise(tokens))
    return apply(fork(base), "free", f"list:{removals}", place=fusion.method.place)


def accuracy_fields(predictions: Predictions, baseline: Predictions) -> dict[str, Any]:
    """The accuracy part of a record: counts, fractions and their intervals, against the unreduced model's.

    Without labels only what compares the two models; without a classifier only their features.
    """
    fields: dict[str, Any] = {"images": len(predictions.label), "nonfinite": predictions.nonfinite()}
    if predictions.labeled and predictions.classifies:
        right, right_before = predictions.correct, baseline.correct
        correct5 = int(predictions.top5.sum())
        fields |= {"correct": int(right.sum()), "correct5": correct5}
        fields |= dict(zip(("top1_low", "top1_high"), wilson(int(right.sum()), len(right)), strict=True))
        fields |= dict(zip(("top5_low", "top5_high"), wilson(correct5, len(right)), strict=True))
        fields |= dict(zip(("drop", "drop_low", "drop_high"), paired_drop(right_before, right), strict=True))
        fields |= {"top1": predictions.top1(), "top5": predictions.top5_accuracy()}
        fields["mcnemar_p"] = mcnemar_p(right_before, right)
    if predictions.classifies:
        agree = (predictions.predicted == baseline.predicted) & (baseline.predicted >= 0)
        fields["agreement"] = float(np.mean(agree))
        fields |= dict(zip(("agreement_low", "agreement_high"), wilson(int(agree.sum()), len(agree)), strict=True))
    for name, values in (("kl", predictions.divergence), ("similarity", predictions.similarity)):
        if np.isfinite(values).any():
            fields |= dict(zip((name, f"{name}_low", f"{name}_high"), mean_interval(values), strict=True))
    return fields


def at_chance_level(baseline: Predictions, num_classes: int) -> bool:
    """Whether a model knows the labels no better than guessing among the classes that are there would."""
    if not (baseline.labeled and baseline.classifies):
        return False
    present = len(np.unique(baseline.label[baseline.label >= 0]))
    chance = 1 / (present if present > 1 else max(num_classes, 2))
    low, _ = wilson(int(baseline.correct.sum()), len(baseline.label))
    # Few images make a wide interval: a model that is far above chance on them is not accused.
    return low <= chance and baseline.top1() <= 2 * chance


def _flops_fields(count: FlopCount, limit: FlopCount, unreduced: int) -> dict[str, Any]:
    """The FLOPs part of a record. What the model takes without the method's own work is its speed limit's count."""
    parts = {
        part: sum(flops for name, flops in limit.by_module.items() if re.fullmatch(rf"blocks\.\d+\.{part}", name))
        for part in ("attn", "mlp")
    }
    return {
        "flops": count.total,
        "flops_ratio": count.total / unreduced,
        "flops_attention": parts["attn"],
        "flops_mlp": parts["mlp"],
        "flops_method": count.total - limit.total,
        "flops_rest": limit.total - sum(parts.values()),
        "unsupported": count.unsupported,
    }


def _speed_fields(runnable: _Runnable, timed: _Timed, reference: SpeedResult, compiled: bool) -> dict[str, Any]:
    """The speed part of a record: every timing, and what follows from them."""
    result, latency = timed.speed[runnable.cell.id], timed.latency[runnable.cell.id]
    fields = {
        "batch_size": result.batch_size,
        "seconds": result.rounds,
        "iterations": result.iterations,
        "compiled": compiled,
        "throughput": result.throughput,
        "speedup": result.speedup,
        "speedup_low": result.speedup_low,
        "speedup_high": result.speedup_high,
        "latency_seconds": latency,
        "latency_ms": 1000 * float(np.median(latency)),
        "latency_p95_ms": 1000 * float(np.quantile(latency, 0.95)),
    }
    if memory := timed.memory[runnable.cell.id]:
        fields |= {"peak_memory_bytes": memory[0], "reserved_memory_bytes": memory[1]}
    if runnable.limit is not None and (limit := timed.speed.get(runnable.limit_name)):
        efficiency, low, high = median_ratio_interval(limit.rounds, result.rounds)
        fields |= {
            "free_seconds": limit.rounds,
            "free_speedup": median_ratio_interval(reference.rounds, limit.rounds)[0],
            "efficiency": efficiency,
            "efficiency_low": low,
            "efficiency_high": high,
        }
    return fields


def _wide(results: list[SpeedResult]) -> list[str]:
    """A warning where speed-ups are known too badly to choose by."""
    doubtful = [result.name for result in results if result.speedup_high - result.speedup_low > 0.1 * result.speedup]
    if not doubtful:
        return []
    return [
        f"{len(doubtful)} of {len(results)} speed-ups are known to no better than ±5 % (as for {doubtful[0]}): "
        "too few rounds for so noisy a machine"
    ]
