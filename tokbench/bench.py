"""Measures one model of a grid: all its cells share one copy of the weights, one pass over the images, and rounds.

FLOPs come first: they take seconds and tell which cells run at all. Then accuracy, then speed. A record is on disk
as soon as it is measured, and a pass over the images every few seconds.
"""

from __future__ import annotations

import itertools
import json
import os
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tokbench.calibrate import CALIBRATION_IMAGES, wants_images
from tokbench.config import Cell, ModelSpec, RunOptions
from tokbench.data import ImageSource, ImageStream, load_batches
from tokbench.errors import RunStopped, UserError, one_line
from tokbench.fusion.core import METHODS, make_method
from tokbench.fusion.patch import fork, tokens_per_block
from tokbench.measure._model import is_out_of_memory, release_memory
from tokbench.measure.accuracy import Predictions, evaluate, join
from tokbench.measure.compiled import compile_model
from tokbench.measure.environment import Watch
from tokbench.measure.flops import count_flops
from tokbench.measure.speed import SpeedResult, largest_batch, measure_memory, measure_speed
from tokbench.progress import Progress
from tokbench.records import accuracy_fields, at_chance_level, doubtful_speedups, flops_fields, speed_fields
from tokbench.resolve import FlopsWarning, apply
from tokbench.resume import HalfPass, Measured, PassFile, Reader, require_same_answers
from tokbench.store import SKIPPED, RunFolder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# A budget for all rounds together; slow cells exceed it, because each makes five rounds at least.
SPEED_SECONDS_PER_CELL = 1.0
LARGEST_BATCH = 1024


@dataclass
class Subject:
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


def calibrates(cell: Cell) -> bool:
    return not cell.is_baseline and wants_images(make_method(cell.method.name, **cell.method.params))


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
    memory: dict[str, tuple[int, int] | None]


class _BaselineFailed(Exception):
    """Nothing can be said of a model's cells without the unreduced one."""


@dataclass
class Bench:
    """One model of the grid on the device: makes its cells and measures them."""

    subject: Subject
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
        phase = "setup"
        try:
            try:
                self._prepare(self.subject.model.to(self.device, DTYPES[self.options.dtype]), waiting)
                if (phase := "accuracy") in self.options.only:
                    self._measure_accuracy()
                if (phase := "speed") in self.options.only:
                    self._measure_speed()
            except (UserError, _BaselineFailed):
                raise
            except Exception as error:  # of no cell in particular: another model may fare better
                baseline = self.subject.cells[0]
                self._record_failure(baseline, self._identity(baseline), phase, error)
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
                    self._record(runnable, "flops", **flops_fields(count, limit, whole))
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
            images = self._calibration_images() if calibrates(cell) else None
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
        if first is None and not half.answers:
            raise RunStopped(f"none of the {len(source):,} images of {source.name} can be decoded: nothing to measure.")
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
            size = LARGEST_BATCH
            for member in list(self.running):
                with self._dropping(member):
                    size = largest_batch([member.model], input_size=self.subject.input_size, most=size)
        if self.options.compile:
            for member in list(self.running):
                with self._dropping(member):
                    for model in (model for model in (member.model, member.limit) if model):
                        compile_model(model)
        lacking = [runnable for runnable in lacking if runnable in self.running]
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
        for sentence in (*disturbance.warnings, *doubtful_speedups([timed.speed[name] for name in timed.memory])):
            self.progress.warn(sentence)
        # Added to a run, the cells ran beside an unreduced model whose own record is an earlier session's.
        again = {} if reference in lacking else {"reference_seconds": timed.speed[reference.cell.id].rounds}
        for runnable in lacking:
            if runnable.cell.id in timed.memory:
                cell_id = runnable.cell.id
                fields = speed_fields(
                    timed.speed[cell_id],
                    timed.memory[cell_id],
                    reference=timed.speed[reference.cell.id],
                    limit=timed.speed.get(runnable.limit_name) if runnable.limit is not None else None,
                    compiled=self.options.compile,
                )
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
            latency_of=[member.cell.id for member in members],
            on_round=self._advance_speed,
            on_failure=fail,
        )
        speed = {result.name: result for result in results}
        memory = {}
        for member in (member for member in members if member.cell.id in speed):
            try:
                memory[member.cell.id] = measure_memory(
                    member.model, batch_size=size, input_size=self.subject.input_size
                )
            except Exception as error:
                fail(member.cell.id, error)
        return _Timed(speed, memory)

    def _advance_speed(self, done: int, planned: int) -> None:
        if done == 1:
            self._phase("speed", planned)
        self.progress.advance(done)

    @contextmanager
    def _dropping(self, member: _Runnable) -> Iterator[None]:
        """Take a cell out of the running ones if it fails inside the block, before it is timed."""
        try:
            yield
        except Exception as error:
            self._drop(member.cell.id, "speed", error)

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
