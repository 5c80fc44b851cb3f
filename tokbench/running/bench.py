"""One model of a grid on the device: its cells, which share one copy of the weights, and the records of them."""

from __future__ import annotations

import itertools
import math
import traceback
import warnings
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tokbench.calibrate import CALIBRATION_IMAGES, COUNTED_IMAGES, wants_images
from tokbench.config import Grid, ModelSpec, PlannedCell, RunOptions, Searched
from tokbench.data import ImageSource, ImageStream, load_batches
from tokbench.errors import BaselineFailed, RunStopped, one_line
from tokbench.exporting.runtimes import RUNTIMES
from tokbench.fusion.anatomy import grid_for, is_fused
from tokbench.fusion.core import METHODS, make_method
from tokbench.fusion.patch import fork, rehearse, tokens_per_block, watch
from tokbench.measure._model import release_memory
from tokbench.measure.flops import count_flops
from tokbench.measure.kernels import attention_kernels
from tokbench.progress import Progress
from tokbench.resolve import FlopsWarning, apply
from tokbench.results.cell import ANYHOW, CellKey, RecordIndex, Setting
from tokbench.results.folder import RunFolder
from tokbench.results.records import FailureRecord, Record, SpeedRecord
from tokbench.running.figures import flops_fields
from tokbench.schedules import parse_schedule

if TYPE_CHECKING:
    from tokbench.running.cluster import Cluster

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Subject:
    """A loaded model of the grid, on the CPU, with its images (None when accuracy is not asked for)."""

    spec: ModelSpec
    model: VisionTransformer
    weights: str
    input_size: tuple[int, int, int]
    source: ImageSource | ImageStream | None
    cells: list[PlannedCell]
    searched: dict[CellKey, Searched] = field(default_factory=dict)

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


def counts_by_image(model: Any) -> bool:
    """Whether a model's tokens, and so its FLOPs and its speed, depend on the image."""
    return hasattr(model, "fusion") and model.fusion.method.counts_by_image


def looks_at_images(cell: PlannedCell) -> bool:
    """Whether a cell's FLOPs and speed depend on the images."""
    return not cell.is_baseline and wants_images(make_method(cell.method.name, **cell.method.params))


@dataclass
class Runnable:
    """A cell as a model that runs, its speed limit, and what all its records have in common.

    attention_kernels: see `measure.kernels`. limit: the control `free` with the cell's own tokens per block; None for
    cells that remove nothing, and for `free`. runtime: in which it is to be timed; the models are eager ones.
    """

    cell: PlannedCell
    model: nn.Module
    identity: dict[str, Any]
    attention_kernels: list[str]
    limit: nn.Module | None = None
    runtime: str = "eager"

    @property
    def name(self) -> str:
        """The cell's name, and the runtime's if that is not eager PyTorch."""
        return self.cell.id + self._where

    @property
    def limit_name(self) -> str:
        """The limit's name, the same for cells with the same limit, so that it is timed once."""
        return f"free/{cast(Any, self.model).fusion.method.place}/{self.identity['tokens']}{self._where}"

    @property
    def _where(self) -> str:
        return "" if self.runtime == "eager" else Setting(runtime=self.runtime).words

    def timed_in(self, runtime: str) -> Runnable:
        """The same cell to time in that runtime."""
        kernels = self.attention_kernels if RUNTIMES[runtime].open is None else []
        return replace(self, runtime=runtime, identity=self.identity | {"runtime": runtime}, attention_kernels=kernels)

    def require_same_tokens(self) -> None:
        """Raise ValueError unless the last forward pass had the token counts (or their mean) of the cell's records."""
        if counts_by_image(self.model):
            return
        tokens = tokens_per_block(self.model)
        if tokens != self.identity["tokens"]:
            raise ValueError(
                f"the method removes other numbers of tokens from other images: {tokens} are left in the blocks, and "
                f"{self.identity['tokens']} at first"
            )


@dataclass
class Bench:
    """One model of the grid on the device: makes its cells, counts their FLOPs, and writes down what is measured."""

    subject: Subject
    folder: RunFolder
    options: RunOptions
    device: torch.device
    progress: Progress
    index: RecordIndex
    batch_size: int
    grid: Grid
    running: list[Runnable] = field(default_factory=list)
    cluster: Cluster | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights and the images."""
        return DTYPES[self.options.dtype]

    def searched(self, cell: PlannedCell) -> Searched | None:
        """The search result of a cell's `searched:` schedule; None for other schedules."""
        return self.subject.searched.get(cell.key)

    def lacks(self, cell: PlannedCell, kind: str, at: Setting = ANYHOW) -> bool:
        """Whether a cell has to be measured. at: timed in this setting, without one in any that was asked for."""
        if kind == "accuracy" and not cell.is_baseline and METHODS[cell.method.name].speed_only:
            return False
        if kind == "speed" and at == ANYHOW:
            return any(self.lacks(cell, kind, setting) for setting in self.options.settings)
        record = self.index.find(cell.key, kind, at)
        return kind in self.options.only and (record is None or not self.holds(cell, record))

    def holds(self, cell: PlannedCell, record: Record) -> bool:
        """Whether a cell's record says what would be measured now: its answers are there, and of all images."""
        if record.kind == "accuracy" and not self.folder.prediction_path(record.cell).is_file():
            return False
        unasked = isinstance(record, SpeedRecord) and record.runtime != "eager" and record.same_answers is None
        if unasked and self.options.check_answers:
            return False
        source = self.subject.source
        grown = source is not None and record.data_fingerprint not in (None, source.fingerprint)
        return not grown or (record.kind != "accuracy" and not looks_at_images(cell))

    def waiting(self) -> list[PlannedCell]:
        """The cells of which something is not measured yet."""
        return [cell for cell in self.subject.cells if any(self.lacks(cell, kind) for kind in self.options.only)]

    def prepare(self) -> None:
        """Make the waiting cells, and the unreduced model if any is compared with it; count FLOPs where they lack.

        A cell that fails here takes no further part.
        """
        release_memory(self.device)
        base, waiting = self.subject.model.to(self.device, self.dtype), self.waiting()
        compared = any(self.lacks(cell, kind) for cell in waiting for kind in ("accuracy", "speed"))
        cells = [cell for cell in self.subject.cells if cell in waiting or (cell.is_baseline and compared)]
        counting = any(self.lacks(cell, "flops") for cell in cells)
        self.phase("counting FLOPs" if counting else "applying methods", len(cells))
        uncounted: set[str] = set()
        for done, cell in enumerate(cells, start=1):
            identity = self.identity(cell)
            try:
                runnable = self.make(cell, base, identity)
                self._require_unchanged(runnable)
                if self.lacks(cell, "flops"):
                    counted = self.counted(runnable)
                    uncounted |= {name.removeprefix("aten::") for name in counted["unsupported"]}
                    self.record(runnable, "flops", **counted)
            except RunStopped:
                raise
            except Exception as error:
                self._record_failure(cell, identity, "setup", error)
                if cell.is_baseline:
                    raise BaselineFailed from error
            else:
                self.running.append(runnable)
            self.progress.advance(done)
        if uncounted:
            self.progress.warn(f"FLOPs are too low: no count is known for {', '.join(sorted(uncounted))}")

    def counted(self, runnable: Runnable) -> dict[str, Any]:
        """The FLOPs part of a cell's record."""
        images = self.images(COUNTED_IMAGES) if counts_by_image(runnable.model) else None
        count = count_flops(runnable.model, self.subject.input_size, images=images)
        limit = count_flops(runnable.limit, self.subject.input_size) if runnable.limit else count
        whole = count.total if runnable.cell.is_baseline else self._unreduced_flops
        return flops_fields(count, limit, whole)

    def _require_unchanged(self, runnable: Runnable) -> None:
        """Raise RunStopped if the cell no longer is what an earlier session measured."""
        for kind in self.options.only:
            before = self.index.find(runnable.cell.key, kind)
            held = before is not None and self.holds(runnable.cell, before)
            for name in ("resolved", "tokens"):
                if held and getattr(before, name) != runnable.identity.get(name):
                    raise RunStopped(
                        f"{runnable.cell.id} is not what it was: {name} were {getattr(before, name)} and are "
                        f"{runnable.identity.get(name)}. Has the code of the method changed? --fresh begins a new run."
                    )

    def make(self, cell: PlannedCell, base: VisionTransformer, identity: dict[str, Any]) -> Runnable:
        model = fork(base)
        if cell.is_baseline:
            watch(model)
        else:
            images = self.images(CALIBRATION_IMAGES) if looks_at_images(cell) else None
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", FlopsWarning)
                whole = self._unreduced_flops if parse_schedule(cell.schedule).kind == "flops" else None
                found = self.searched(cell)
                apply(
                    model,
                    cell.method.name,
                    found.schedule if found else cell.schedule,
                    images=images,
                    unreduced_flops=whole,
                    **cell.method.params,
                )
            for warning in caught:
                self.progress.warn(f"{cell.id}: {warning.message}")
            fusion = cast(Any, model).fusion
            identity["resolved"] = str(fusion.schedule)
            if found:
                identity["searched_on"] = {"data": found.data, "images": found.images, "seed": found.seed}
            if images is not None:
                identity["calibrated"] = {"images": len(images), **fusion.method.parameters()}
        image = torch.rand(1, *self.subject.input_size, generator=torch.Generator().manual_seed(0))
        image = self.images(COUNTED_IMAGES) if counts_by_image(model) else image.to(self.device, self.dtype)
        with torch.inference_mode():
            rehearse(model, image)
        kernels = attention_kernels(model, image)
        identity["tokens"] = tokens_per_block(model)
        return Runnable(cell, model, identity, kernels, speed_limit(model, base))

    @cached_property
    def _unreduced_flops(self) -> int:
        record = self.index.find(self.subject.cells[0].key, "flops")
        return record.flops if record else count_flops(self.subject.model, self.subject.input_size).total

    def images(self, count: int) -> torch.Tensor:
        """The first `count` images of the data that can be decoded, without their labels."""
        source = self.subject.source
        assert source is not None
        batches = load_batches(source, count, workers=0)
        images = list(itertools.islice((image for batch in batches for image in batch.images), count))
        if not images:
            raise RunStopped(f"none of the {len(source):,} images of {source.name} can be decoded: nothing to measure.")
        return torch.stack(images).to(self.device, self.dtype)

    def identity(self, cell: PlannedCell) -> dict[str, Any]:
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

    def let_go(self) -> None:
        """Free the model, so that its weights do not count to the next one's peak memory."""
        self.running.clear()
        self.subject.model.to("meta")

    def fail(self, phase: str, error: Exception) -> None:
        """Record a failure of no particular cell as the unreduced model's. Raises BaselineFailed."""
        baseline = self.subject.cells[0]
        self._record_failure(baseline, self.identity(baseline), phase, error)
        raise BaselineFailed from error

    def drop(self, name: str, phase: str, error: Exception) -> None:
        """Remove what failed: a cell, or with the unreduced model all cells in its runtime.

        Raises BaselineFailed where nothing is left.
        """
        for failed in [runnable for runnable in self.running if runnable.name == name]:
            self._record_failure(failed.cell, failed.identity, phase, error)
            self.running[:] = [
                other
                for other in self.running
                if other.name != name and not (failed.cell.is_baseline and other.runtime == failed.runtime)
            ]
            if not failed.cell.is_baseline:
                continue
            if not self.running:
                raise BaselineFailed from error
            self.progress.warn(
                f"{self.subject.spec.label}: the unreduced model failed in {failed.runtime}, and there is nothing to "
                "compare its cells there with"
            )

    def record(self, runnable: Runnable, kind: str, **measured: Any) -> None:
        record = self.folder.append({"kind": kind, **runnable.identity, **measured})
        self.index.add(record)
        self.progress.recorded(record)

    def _record_failure(self, cell: PlannedCell, identity: dict[str, Any], phase: str, error: Exception) -> None:
        record = FailureRecord(
            kind="failure",
            **identity,
            phase=phase,
            message=one_line(error),
            traceback="".join(traceback.format_exception(error)),
        )
        before = self.index.find(cell.key, "failure", Setting.of(record))
        if not before or (before.phase, before.message) != (record.phase, record.message):
            self.folder.append(record.plain())
        self.progress.recorded(record)

    def phase(self, name: str, total: int | None) -> None:
        self.progress.phase(f"{self.subject.spec.label}: {name}", total)


def speed_limit(model: VisionTransformer, base: VisionTransformer) -> VisionTransformer | None:
    """The control `free` with the tokens per block of a model that has made a forward pass."""
    fusion = getattr(model, "fusion", None)
    unreduced = math.prod(grid_for(base)) + base.num_prefix_tokens
    tokens = [unreduced, *(round(after) for after in tokens_per_block(model))]
    if fusion is None or fusion.method.speed_only or tokens[-1] == tokens[0]:
        return None
    removals = ",".join(str(before - after) for before, after in itertools.pairwise(tokens))
    return apply(fork(base), "free", f"list:{removals}", place=fusion.method.place)
