"""Runs a grid: every cell of a model shares one copy of the weights, one pass over the images, and the same rounds.

FLOPs come first: they take seconds and tell which cells run at all. Then accuracy, then speed. A record is on disk
as soon as it is measured, so an interrupted run keeps what it has.
"""

from __future__ import annotations

import os
import traceback
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader

from tokbench.config import Cell, Grid, ModelSpec, RunOptions
from tokbench.data import ImageSource, ImageStream, open_dataset
from tokbench.errors import UserError
from tokbench.fusion.patch import fork, require_supported, tokens_per_block
from tokbench.measure._model import resolve_input_size
from tokbench.measure.accuracy import Predictions, evaluate
from tokbench.measure.environment import describe_machine, package_versions
from tokbench.measure.flops import FlopCount, count_flops
from tokbench.measure.speed import SpeedResult, measure_speed
from tokbench.measure.stats import mcnemar_p, paired_drop, wilson
from tokbench.models import load_model, weights_sha256
from tokbench.progress import Progress
from tokbench.resolve import apply
from tokbench.store import RunFolder, new_run_path, require_free

if TYPE_CHECKING:
    import pandas as pd

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A budget for all rounds together; slow cells exceed it, because each makes five rounds at least.
SPEED_SECONDS_PER_CELL = 2.0


def run(
    grid: Grid | str | Path | None = None,
    out: str | Path | None = None,
    *,
    options: RunOptions | None = None,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Measure every cell of a grid and draw the Pareto plot; one row per cell comes back (see `load_table`).

    grid: a Grid, the path of a grid file, or None for the default one. out: the run folder, by default a new one
    under results/. options: instead of the grid's own. progress: told what happens; silent by default.
    Raises UserError for bad input, before anything is measured. A cell that fails is recorded as a failure (column
    `error`) and the others go on.
    """
    from tokbench.report.metrics import load_table

    if not isinstance(grid, Grid):
        grid = Grid.default() if grid is None else Grid.from_toml(grid)
    options = options or grid.options
    progress = progress or Progress()
    path = Path(out) if out else new_run_path(label=grid.models[0].label)
    require_free(path)  # before any model is downloaded
    device = find_device(options.device)
    subjects = [_load(spec, grid, options) for spec in grid.models]
    folder = RunFolder.create(path, _manifest(grid, options, device))
    progress.started(folder, sum(len(subject.cells) for subject in subjects))
    for subject in subjects:
        _Bench(subject, folder, options, device, progress).measure()
    table = load_table([folder.path])
    progress.finished(table, _draw(table, folder.path))
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


def _load(spec: ModelSpec, grid: Grid, options: RunOptions) -> _Subject:
    model = cast(VisionTransformer, load_model(spec.name, spec.checkpoint, input_size=spec.input_size))
    require_supported(model)
    source = open_dataset(grid.data, model, limit=options.limit) if "accuracy" in options.only else None
    return _Subject(spec, model, weights_sha256(model), resolve_input_size(model, None), source, grid.cells(spec))


def _manifest(grid: Grid, options: RunOptions, device: torch.device) -> dict[str, Any]:
    return {
        "grid": replace(grid, options=options).to_dict(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": describe_machine(device),
        "packages": package_versions(),
    }


def _draw(table: pd.DataFrame, folder: Path) -> list[Path]:
    """The Pareto plot of what was measured: none without accuracy, and without a cost to set it against."""
    from tokbench.report.metrics import METRICS
    from tokbench.report.plots import plot_pareto

    costs = [name for name in ("gflops", "throughput") if table[METRICS[name].column].notna().any()]
    if not costs or not table["top1"].notna().any():
        return []
    return [plot_pareto(table, folder / "pareto.png", x=costs)]


@dataclass
class _Runnable:
    """A cell as a model that runs, and what all its records have in common."""

    cell: Cell
    model: nn.Module
    identity: dict[str, Any]


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
    running: list[_Runnable] = field(default_factory=list)

    def measure(self) -> None:
        dtype = DTYPES[self.options.dtype]
        base = self.subject.model.to(self.device, dtype)
        try:
            self._prepare(base)
            if "accuracy" in self.options.only:
                self._measure_accuracy()
            if "speed" in self.options.only:
                self._measure_speed()
        except _BaselineFailed:
            self.progress.warn(
                f"{self.subject.spec.label}: the unreduced model failed, and there is nothing to compare its cells with"
            )

    def _prepare(self, base: VisionTransformer) -> None:
        """Make every cell and count its FLOPs; a cell that fails here takes no further part."""
        counting = "flops" in self.options.only
        self._phase("counting FLOPs" if counting else "applying methods", len(self.subject.cells))
        unreduced: int | None = None
        uncounted: set[str] = set()
        for done, cell in enumerate(self.subject.cells, start=1):
            identity = self._identity(cell)
            try:
                runnable = self._make(cell, base, identity)
                if counting:
                    count = count_flops(runnable.model, self.subject.input_size)
                    unreduced = count.total if cell.is_baseline else unreduced
                    uncounted |= count.unsupported.keys()
                    self._record(runnable, "flops", **_flops_fields(count, unreduced))
            except Exception as error:
                self._record_failure(cell, identity, "setup", error)
            else:
                self.running.append(runnable)
            self.progress.advance(done)
        if uncounted:
            self.progress.warn(f"FLOPs are too low: no count is known for {', '.join(sorted(uncounted))}")

    def _make(self, cell: Cell, base: VisionTransformer, identity: dict[str, Any]) -> _Runnable:
        model = fork(base)
        if not cell.is_baseline:
            apply(model, cell.method.name, cell.schedule, **cell.method.params)
            identity["resolved"] = str(cast(Any, model).fusion.schedule)
        image = torch.rand(1, *self.subject.input_size, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            model(image.to(self.device, DTYPES[self.options.dtype]))
        identity["tokens"] = tokens_per_block(model)
        return _Runnable(cell, model, identity)

    def _identity(self, cell: Cell) -> dict[str, Any]:
        source = self.subject.source
        return {
            "cell": cell.id,
            "model": self.subject.spec.label,
            "weights_sha256": self.subject.weights,
            "method": cell.method.name,
            "params": dict(cell.method.params),
            "schedule": cell.schedule,
            "input_size": list(self.subject.input_size),
            "data": source.name if source else None,
            "data_fingerprint": source.fingerprint if source else None,
            "dtype": self.options.dtype,
            "device": str(self.device),
        }

    def _measure_accuracy(self) -> None:
        source = self.subject.source
        assert source is not None
        self._phase("accuracy", len(source))
        results = evaluate(
            self._models(),
            DataLoader(source, batch_size=self._batch_size(), num_workers=self._workers(source)),
            device=self.device,
            dtype=DTYPES[self.options.dtype],
            on_batch=self.progress.advance,
            on_failure=lambda cell_id, error: self._drop(cell_id, "accuracy", error),
        )
        baseline = results[self.running[0].cell.id]
        for runnable in self.running:
            predictions = results[runnable.cell.id]
            predictions.save(self.folder.prediction_path(runnable.cell.id))
            self._record(runnable, "accuracy", **accuracy_fields(predictions, baseline))
        if at_chance_level(baseline, source.num_classes):
            self.progress.warn(
                f"{self.subject.spec.label} gets {baseline.top1():.1%} of {source.name} right, which is chance level: "
                "the model's classes and the data's labels probably don't match, and drops mean nothing"
            )

    def _measure_speed(self) -> None:
        self._phase("warming up for speed", None)
        try:
            results = measure_speed(
                self._models(),
                batch_size=self._batch_size(),
                input_size=self.subject.input_size,
                seconds=SPEED_SECONDS_PER_CELL * len(self.running),
                on_round=self._advance_speed,
                on_failure=lambda cell_id, error: self._drop(cell_id, "speed", error),
            )
        except Exception as error:  # the unreduced model's, or nobody's in particular: no speed-up can be told
            self._drop(self.running[0].cell.id, "speed", error)
        for runnable, result in zip(self.running, results, strict=True):
            self._record(runnable, "speed", **_speed_fields(result))

    def _advance_speed(self, done: int, planned: int) -> None:
        if done == 1:
            self._phase("speed", planned)
        self.progress.advance(done)

    def _models(self) -> dict[str, nn.Module]:
        return {runnable.cell.id: runnable.model for runnable in self.running}

    def _drop(self, cell_id: str, phase: str, error: Exception) -> None:
        """Take a cell that failed out of the running ones."""
        failed = next(runnable for runnable in self.running if runnable.cell.id == cell_id)
        self.running.remove(failed)
        self._record_failure(failed.cell, failed.identity, phase, error)

    def _record(self, runnable: _Runnable, kind: str, **measured: Any) -> None:
        record = {"kind": kind, **runnable.identity, **measured}
        self.folder.append(record)
        self.progress.recorded(record)

    def _record_failure(self, cell: Cell, identity: dict[str, Any], phase: str, error: Exception) -> None:
        record = {
            "kind": "failure",
            **identity,
            "phase": phase,
            "message": _one_line(error),
            "traceback": "".join(traceback.format_exception(error)),
        }
        self.folder.append(record)
        self.progress.recorded(record)
        if cell.is_baseline:
            raise _BaselineFailed from error

    def _phase(self, name: str, total: int | None) -> None:
        self.progress.phase(f"{self.subject.spec.label}: {name}", total)

    def _batch_size(self) -> int:
        if isinstance(self.options.batch_size, int):
            return self.options.batch_size
        return 128 if self.device.type == "cuda" else 16

    def _workers(self, source: ImageSource | ImageStream) -> int:
        if self.options.workers is not None:
            return self.options.workers
        # On the CPU the cells themselves use every core, and reading an image costs little next to running them all.
        if self.device.type == "cpu":
            return 0
        return 1 if source.streaming else min(8, os.cpu_count() or 1)


def accuracy_fields(predictions: Predictions, baseline: Predictions) -> dict[str, Any]:
    """The accuracy part of a record: counts, fractions and their intervals, against the unreduced model's."""
    images = len(predictions.label)
    right, right_before = predictions.correct, baseline.correct
    low, high = wilson(int(right.sum()), images)
    drop, drop_low, drop_high = paired_drop(right_before, right)
    return {
        "images": images,
        "correct": int(right.sum()),
        "correct5": int(predictions.top5.sum()),
        "top1": predictions.top1(),
        "top1_low": low,
        "top1_high": high,
        "top5": predictions.top5_accuracy(),
        "drop": drop,
        "drop_low": drop_low,
        "drop_high": drop_high,
        "mcnemar_p": mcnemar_p(right_before, right),
        "agreement": float(np.mean(predictions.predicted == baseline.predicted)),
    }


def at_chance_level(baseline: Predictions, num_classes: int) -> bool:
    """Whether a model knows the labels no better than guessing among the classes that are there would."""
    present = len(np.unique(baseline.label[baseline.label >= 0]))
    chance = 1 / (present if present > 1 else max(num_classes, 2))
    low, _ = wilson(int(baseline.correct.sum()), len(baseline.label))
    # Few images make a wide interval: a model that is far above chance on them is not accused.
    return low <= chance and baseline.top1() <= 2 * chance


def _one_line(error: Exception) -> str:
    """A UserError says it all; of other errors the kind and the first line."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, UserError) else f"{type(error).__name__}: {lines[0]}".rstrip(": ")


def _flops_fields(count: FlopCount, unreduced: int | None) -> dict[str, Any]:
    return {
        "flops": count.total,
        "flops_ratio": count.total / unreduced if unreduced else None,
        "by_module": count.by_module,
        "unsupported": count.unsupported,
    }


def _speed_fields(result: SpeedResult) -> dict[str, Any]:
    return {
        "batch_size": result.batch_size,
        "seconds": result.rounds,
        "iterations": result.iterations,
        "throughput": result.throughput,
        "speedup": result.speedup,
        "speedup_low": result.speedup_low,
        "speedup_high": result.speedup_high,
    }
