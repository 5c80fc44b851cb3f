"""The timing of a model's cells, in turns with the unreduced model and each with its own speed limit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from tokbench.config import PlannedCell, RunOptions
from tokbench.errors import BaselineFailed, RunStopped, one_line
from tokbench.exporting.runtimes import RUNTIMES
from tokbench.exporting.writing import in_runtime
from tokbench.fusion.anatomy import is_fused
from tokbench.measure._model import is_out_of_memory, release_memory
from tokbench.measure.accuracy import evaluate
from tokbench.measure.environment import Watch, thread_warnings, together
from tokbench.measure.speed import VAGUE_WIDTH, SpeedResult, largest_batch, measure_memory, measure_speed
from tokbench.results.cell import Setting
from tokbench.running.answers import reader_for
from tokbench.running.bench import Bench, Runnable, counts_by_image
from tokbench.running.figures import (
    VAGUE,
    by_process,
    needed_for_speedup,
    speed_fields,
    vague_sentence,
    vague_speedups,
)
from tokbench.running.fresh import Timed, time_in_fresh_processes
from tokbench.running.half_pass import HalfPass

# A budget for all rounds together; slow cells exceed it, as each makes eight rounds at least. On a noisy machine rounds
# go on while any interval is as wide as this, for so many times as long at most: an answer that is 25 % off is none.
SPEED_SECONDS_PER_CELL, PATIENCE = 1.5, {VAGUE_WIDTH: 2.0, 0.25: 6.0}
LARGEST_BATCH = 1024


def time_cells(bench: Bench) -> None:
    """Time the cells that lack it in turns with the unreduced model, at each batch size that was asked for."""
    if bench.cluster:
        bench.cluster.stop()  # its workers would share the device
    if not is_fused(bench.subject.model) and bench.options.fused == "on" and bench.waiting():
        bench.progress.warn("fused attention is off (TIMM_FUSED_ATTN?): speed-ups are over a slower model than timm's")
    bench.running[:] = [member.timed_in(runtime) for runtime in bench.options.runtimes for member in bench.running]
    for size in bench.options.sizes or (None,):
        lacking = [own for own in bench.running if bench.lacks(own.cell, "speed", Setting(size, own.runtime))]
        if lacking and not _time_lacking(bench, lacking, size):
            bench.progress.warn(f"memory does not allow batches of {size}: no cell is timed at that size or above")
            return


def _time_lacking(bench: Bench, lacking: list[Runnable], wanted: int | None) -> bool:
    """Time them on `wanted` images, or on as many as all have memory for; False where it is too small for `wanted`."""
    size = wanted or _batch_size(bench)
    asked, began = size, time.monotonic()
    timed: list[Timed] = []
    while not timed:
        lacking = [member for member in lacking if member in bench.running]
        if not lacking:
            return True
        members = in_turns(lacking, bench.running)
        try:
            timed = _time_in_each_process(bench, members, size)
        except (RunStopped, BaselineFailed):
            raise
        except Exception as error:  # the unreduced model's, or nobody's in particular: no speed-up can be told
            if not is_out_of_memory(error) or size == 1:
                bench.drop(members[0].name, "speed", error)
            elif wanted:
                return False
            else:
                size = (size + 1) // 2
        release_memory(bench.device)
    _record(bench, [one for one in lacking if one in bench.running], timed, asked, time.monotonic() - began)
    return True


class Turn(NamedTuple):
    """A cell that is to be timed in that runtime."""

    cell: PlannedCell
    runtime: str


T = TypeVar("T", Runnable, Turn)


def in_turns(lacking: Sequence[T], asked: Sequence[T]) -> list[T]:
    """What of `asked` is timed together: what lacks it, beside the unreduced model in eager and in each runtime."""
    runtimes = {"eager", *(own.runtime for own in lacking)}
    return [own for own in asked if own in lacking or (own.cell.is_baseline and own.runtime in runtimes)]


def time_for(options: RunOptions, models: int) -> tuple[float, dict[float, float]]:
    """Seconds for the rounds of so many models, in all processes together, and with which `patience`."""
    # What was asked for is exact, and of several processes no one knows how far apart they lie.
    usual = options.seconds is None and options.processes == 1
    return (options.seconds or SPEED_SECONDS_PER_CELL) * models, PATIENCE if usual else {}


def _time_in_each_process(bench: Bench, members: list[Runnable], size: int) -> list[Timed]:
    if bench.options.processes > 1:
        return time_in_fresh_processes(bench, members, size)
    return [time_members(bench, members, size)]


def _references(bench: Bench, timed: list[Timed]) -> dict[str, list[SpeedResult]]:
    """The unreduced model's timings, of each process, by runtime."""
    names = {member.runtime: member.name for member in bench.running if member.cell.is_baseline}
    return {
        runtime: [one.speed[name] for one in timed]
        for runtime, name in names.items()
        if all(name in one.speed for one in timed)
    }


def _figures(bench: Bench, timed: list[Timed], bases: dict[str, list[SpeedResult]]) -> dict[str, dict[str, Any]]:
    """The speed part of the record of each cell that every process timed, by name. bases: from `_references`."""
    fields = {}
    for member in bench.running:
        name, limit = member.name, "" if member.limit is None else member.limit_name
        if all(name in one.memory for one in timed):
            fields[name] = speed_fields(
                [one.speed[name] for one in timed],
                references=bases[member.runtime],
                limits=[one.speed[limit] for one in timed] if all(limit in one.speed for one in timed) else [],
                eager=bases.get("eager", []) if member.runtime != "eager" else [],
                memory=max(filter(None, (one.memory[name] for one in timed)), default=None),
                answers=next((one.answers[name] for one in timed if name in one.answers), None),
            )
    return fields


def _record(bench: Bench, lacking: list[Runnable], timed: list[Timed], asked: int, seconds: float) -> None:
    """Warn of what may spoil these timings, and write them down. seconds: how long they took."""
    processes, bases = len(timed), _references(bench, timed)
    fields = _figures(bench, timed, bases)
    some = next(iter(bases.values()))
    disturbance = together([one.disturbance for one in timed], bench.device)
    reduced = {
        member.name: bases[member.runtime]
        for member in bench.running
        if member.name in fields and not member.cell.is_baseline
    }
    vague = vague_speedups({name: fields[name] for name in reduced})
    warnings = list(disturbance.warnings)
    if vague:
        needed = {
            name: needed_for_speedup(fields[name], [one.speed[name] for one in timed], reduced[name]) for name in vague
        }
        done, unit = (processes, "processes") if processes > 1 else (len(some[0].rounds), "rounds")
        warnings.append(vague_sentence(needed, len(reduced), done, seconds, unit))
    for sentence in warnings:
        if sentence not in thread_warnings(bench.device):  # said at the start
            bench.progress.warn(sentence)
    caveats = [sentence.partition(": ")[0] for sentence in disturbance.warnings]  # without what to do about it
    size, earlier = some[0].batch_size, _timed_before(bench)
    if size < asked:
        caveats.append(f"memory allowed batches of {size} only, where {asked} were asked for")
    if processes < bench.options.processes:
        caveats.append(f"only {processes} of {bench.options.processes} processes came to the end of timing")
    # Added to a run, cells ran beside an unreduced model whose own record is an earlier session's.
    known = {member.runtime for member in bench.running if member.cell.is_baseline and member not in lacking}
    again = {
        runtime: {
            "reference_seconds": by_process([one.rounds for one in base]),
            "reference_latency_seconds": by_process([one.latency for one in base]),
        }
        for runtime, base in bases.items()
        if runtime in known
    }
    if not bench.options.sizes and earlier not in (None, size):
        bench.progress.warn(
            f"memory allows batches of {size} only, and the cells timed before had {earlier}: "
            "their speeds are no match; --fresh times all on the same"
        )
    for runnable in lacking:
        if runnable.name in fields:
            bench.record(
                runnable,
                "speed",
                **fields[runnable.name],
                **again.get(runnable.runtime, {}),
                provider=RUNTIMES[runnable.runtime].provider(bench.device),
                threads=torch.get_num_threads(),
                attention_kernels=runnable.attention_kernels,
                other_cpu=disturbance.other_cpu,
                gpu_state=disturbance.gpu,
                caveats=caveats + [VAGUE] * (runnable.name in vague),
            )


def _timed_before(bench: Bench) -> int | None:
    """The images in a batch of an earlier session, None where there was none."""
    before = bench.index.find(bench.subject.cells[0].key, "speed")
    return before.batch_size if before else None


def _batch_size(bench: Bench) -> int:
    """An earlier session's, so that its cells can be compared; or what was asked for, or what fits every cell."""
    if earlier := _timed_before(bench):
        return earlier
    if bench.options.batch_size != "auto" or bench.device.type != "cuda":
        return bench.batch_size
    bench.phase("finding the largest batch", None)
    size = LARGEST_BATCH
    for member in list(bench.running):
        try:
            if member.runtime == bench.running[0].runtime:
                size = largest_batch([member.model], input_size=bench.subject.input_size, most=size)
        except Exception as error:
            bench.drop(member.name, "speed", error)
    return size


def time_members(bench: Bench, members: list[Runnable], size: int, seed: int = 0) -> Timed:
    """A process's share of the rounds."""

    def fail(name: str, error: Exception) -> None:
        if is_out_of_memory(error) and size > 1:
            raise error
        if name in {member.limit_name for member in members if member.limit is not None}:
            bench.progress.warn(f"no speed limit for the cells of {name}: {one_line(error)}")
        else:
            bench.drop(name, "speed", error)

    models = _ready(bench, members, fail)
    watch = Watch(bench.device)
    members = [member for member in members if member in bench.running]
    limits = dict.fromkeys(own.limit_name for own in members if own.limit is not None and own.limit_name in models)
    # A model is compiled as it is first shown a batch, and those of cells again for a single image.
    compiling = any(member.runtime == "compile" for member in members)
    bench.phase("compiling" if compiling else "warming up for speed", 2 * len(members) + len(limits))
    expected = 0

    def warm(done: int) -> None:
        watch.begin()
        bench.progress.advance(done)

    def advance(done: int, planned: int) -> None:
        nonlocal expected
        watch.look()
        if planned != expected:
            bench.phase("speed, for longer, as it is not known well yet" if expected else "speed", planned)
            expected = planned
        bench.progress.advance(done)

    images = bench.images(size) if any(counts_by_image(member.model) for member in members) else None
    options = bench.options
    seconds, patience = time_for(options, len(members) + len(limits))
    results = measure_speed(
        {name: models[name] for name in [*(member.name for member in members), *limits]},
        batch_size=size,
        input_size=bench.subject.input_size,
        images=images,
        rounds=options.rounds and ceil(options.rounds / options.processes),
        seconds=seconds / options.processes,
        patience=patience,
        latency_of=[member.name for member in members],
        seed=seed,
        on_warm=warm,
        on_round=advance,
        on_failure=fail,
    )
    speed = {result.name: result for result in results}
    memory: dict[str, tuple[int, int] | None] = {}
    for member in (member for member in members if member.name in speed):
        try:
            if member.runtime == "eager":  # others need not say
                member.require_same_tokens()
            # What another runtime takes, torch does not know.
            memory[member.name] = None if RUNTIMES[member.runtime].open else measure_memory(
                models[member.name], batch_size=size, input_size=bench.subject.input_size, images=images
            )  # fmt: skip
        except Exception as error:
            fail(member.name, error)
    disturbance = watch.stop()
    members = [member for member in members if member.name in memory and member in bench.running]
    answers = _same_answers(bench, members, models, size) if options.check_answers and not seed else {}
    return Timed(speed, memory, answers, disturbance)


def _ready(bench: Bench, members: list[Runnable], fail: Callable[[str, Exception], None]) -> dict[str, nn.Module]:
    """The members' models by name, and their speed limits' by theirs, each in its runtime.

    For each batch size anew: torch compiles the same code for eight shapes only.
    """
    models: dict[str, nn.Module] = {}
    if any(RUNTIMES[member.runtime].open for member in members):
        bench.phase("exporting", len(members))
    with TemporaryDirectory() as folder:
        for done, member in enumerate(members, start=1):
            both = {member.name: member.model}
            if member.limit is not None:
                both[member.limit_name] = member.limit
            for name, model in both.items():
                if name not in models and member in bench.running:
                    try:
                        models[name] = in_runtime(model, member.runtime, Path(folder))
                    except Exception as error:
                        fail(name, error)
            if RUNTIMES[member.runtime].open:
                bench.progress.advance(done)
    return models


def _same_answers(
    bench: Bench, members: list[Runnable], models: dict[str, nn.Module], size: int
) -> dict[str, tuple[int, int]]:
    """By the names of those in other runtimes: of how many images the answer is eager's, and of how many."""
    source = bench.subject.source
    assert source is not None
    others = [member for member in members if member.runtime != "eager"]
    reader = reader_for(bench, size, HalfPass(), None, bench.options.max_bad)
    bench.phase("comparing answers", len(source))
    shown = {member.cell.id: member.model for member in others} | {own.name: models[own.name] for own in others}
    unlabelled = ((images, torch.full_like(labels, -1)) for images, labels in reader.batches())
    found = evaluate(
        shown, unlabelled, device=bench.device, dtype=bench.dtype, prepare=source.floats, among=source.among,
        on_batch=lambda _: bench.progress.advance(reader.end),
        on_failure=lambda name, error: bench.drop(name, "speed", error),
    )  # fmt: skip
    pairs = {
        own.name: (found[own.name].predicted, found[own.cell.id].predicted)
        for own in others
        if {own.name, own.cell.id} <= found.keys()
    }
    return {name: (int(((there == eager) & (eager >= 0)).sum()), len(eager)) for name, (there, eager) in pairs.items()}
