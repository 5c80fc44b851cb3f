"""The timing of a model's cells, in turns with the unreduced model and each with its own speed limit."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from typing import Any

from tokbench.errors import BaselineFailed, RunStopped, one_line
from tokbench.measure._model import is_out_of_memory, release_memory
from tokbench.measure.compiled import compile_model
from tokbench.measure.environment import Watch, thread_warnings, together
from tokbench.measure.speed import SpeedResult, largest_batch, measure_memory, measure_speed
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

# A budget for all rounds together; slow cells exceed it, because each makes eight rounds at least. On a noisy machine
# rounds go on until every interval is useful, for so many times as long at most.
SPEED_SECONDS_PER_CELL, PATIENCE = 1.5, 4
LARGEST_BATCH = 1024


def time_cells(bench: Bench) -> None:
    """Time the cells that lack it in turns with the unreduced model, at each batch size that was asked for."""
    if not bench.is_fused and bench.waiting():
        bench.progress.warn("fused attention is off (TIMM_FUSED_ATTN?): speed-ups are over a slower model than timm's")
    for size in bench.options.sizes or (None,):
        lacking = [runnable for runnable in bench.running if bench.lacks(runnable.cell, "speed", size)]
        if lacking and not _time_lacking(bench, lacking, size):
            bench.progress.warn(f"memory does not allow batches of {size}: no cell is timed at that size or above")
            return


def _time_lacking(bench: Bench, lacking: list[Runnable], wanted: int | None) -> bool:
    """Time them on `wanted` images, or on as many as all have memory for; False where it is too small for `wanted`."""
    reference, size = bench.running[0], wanted or _batch_size(bench)
    asked, began = size, time.monotonic()
    timed: list[Timed] = []
    while not timed:
        members = [reference, *(member for member in bench.running[1:] if member in lacking)]
        try:
            timed = _time_in_each_process(bench, members, size)
        except (RunStopped, BaselineFailed):
            raise
        except Exception as error:  # the unreduced model's, or nobody's in particular: no speed-up can be told
            if not is_out_of_memory(error) or size == 1:
                bench.drop(reference.cell.id, "speed", error)
            if wanted:
                return False
            size = (size + 1) // 2
        release_memory(bench.device)
    _record(bench, [one for one in lacking if one in bench.running], timed, asked, time.monotonic() - began)
    return True


def _time_in_each_process(bench: Bench, members: list[Runnable], size: int) -> list[Timed]:
    if bench.options.processes > 1:
        return time_in_fresh_processes(bench, members, size)
    watch = Watch(bench.device)
    speed, memory = time_members(bench, members, size, watch)
    return [Timed(speed, memory, watch.stop())]


def _figures(bench: Bench, timed: list[Timed]) -> dict[str, dict[str, Any]]:
    """The speed part of the record of each cell that every process timed, by cell id."""
    base = [one.speed[bench.running[0].cell.id] for one in timed]
    return {
        name: speed_fields(
            [one.speed[name] for one in timed],
            references=base,
            limits=[one.speed[limit] for one in timed] if all(limit in one.speed for one in timed) else [],
            memory=max(filter(None, (one.memory[name] for one in timed)), default=None),
            compiled=bench.options.compile,
        )
        for name, limit in (
            (member.cell.id, "" if member.limit is None else member.limit_name) for member in bench.running
        )
        if all(name in one.memory for one in timed)
    }


def _record(bench: Bench, lacking: list[Runnable], timed: list[Timed], asked: int, seconds: float) -> None:
    """Warn of what may spoil these timings, and write them down. seconds: how long they took."""
    reference, processes, fields = bench.running[0], len(timed), _figures(bench, timed)
    base = [one.speed[reference.cell.id] for one in timed]
    disturbance = together([one.disturbance for one in timed], bench.device)
    vague = vague_speedups({name: figures for name, figures in fields.items() if name != reference.cell.id})
    warnings = list(disturbance.warnings)
    if vague:
        needed = {name: needed_for_speedup(fields[name], [one.speed[name] for one in timed], base) for name in vague}
        done, unit = (processes, "processes") if processes > 1 else (len(base[0].rounds), "rounds")
        warnings.append(vague_sentence(needed, len(fields) - 1, done, seconds, unit))
    for sentence in warnings:
        if sentence not in thread_warnings(bench.device):  # said at the start
            bench.progress.warn(sentence)
    caveats = [sentence.partition(": ")[0] for sentence in disturbance.warnings]  # without what to do about it
    size, earlier = base[0].batch_size, _timed_before(bench)
    if size < asked:
        caveats.append(f"memory allowed batches of {size} only, where {asked} were asked for")
    if processes < bench.options.processes:
        caveats.append(f"only {processes} of {bench.options.processes} processes came to the end of timing")
    # Added to a run, the cells ran beside an unreduced model whose own record is an earlier session's.
    again = {} if reference in lacking else {
        "reference_seconds": by_process([one.rounds for one in base]),
        "reference_latency_seconds": by_process([one.latency for one in base]),
    }  # fmt: skip
    if not bench.options.sizes and earlier not in (None, size):
        bench.progress.warn(
            f"memory allows batches of {size} only, and the cells timed before had {earlier}: "
            "their speeds are no match; --fresh times all on the same"
        )
    for runnable in lacking:
        if runnable.cell.id in fields:
            bench.record(
                runnable,
                "speed",
                **fields[runnable.cell.id],
                **again,
                attention_kernels=runnable.attention_kernels,
                other_cpu=disturbance.other_cpu,
                gpu_state=disturbance.gpu,
                caveats=caveats + [VAGUE] * (runnable.cell.id in vague),
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
        with _dropping(bench, member):
            size = largest_batch([member.model], input_size=bench.subject.input_size, most=size)
    return size


def time_members(
    bench: Bench, members: list[Runnable], size: int, watch: Watch, seed: int = 0
) -> tuple[dict[str, SpeedResult], dict[str, tuple[int, int] | None]]:
    """(speeds by cell id and by name of a speed limit, memory by cell id) of a process's share of the rounds."""
    if bench.options.compile:
        # For each size anew: torch compiles the same code for eight shapes only.
        for member in members:
            with _dropping(bench, member):
                for model in (model for model in (member.model, member.limit) if model):
                    compile_model(model)
        members = [member for member in members if member in bench.running]
    limits = {member.limit_name: member.limit for member in members if member.limit is not None}
    # A model is compiled as it is first shown a batch, and those of cells again for a single image.
    bench.phase("compiling" if bench.options.compile else "warming up for speed", 2 * len(members) + len(limits))

    def fail(name: str, error: Exception) -> None:
        if is_out_of_memory(error) and size > 1:
            raise error
        if name in limits:
            bench.progress.warn(f"no speed limit for the cells of {name}: {one_line(error)}")
        else:
            bench.drop(name, "speed", error)

    expected = 0

    def advance(done: int, planned: int) -> None:
        nonlocal expected
        watch.look()
        if planned != expected:
            bench.phase("speed, for longer, as it is not known well yet" if expected else "speed", planned)
            expected = planned
        bench.progress.advance(done)

    images = bench.images(size) if any(counts_by_image(member.model) for member in members) else None
    options = bench.options
    seconds = (options.seconds or SPEED_SECONDS_PER_CELL) * (len(members) + len(limits)) / options.processes
    # What was asked for is exact, and of several processes no one knows how far apart they lie.
    usual = options.seconds is None and options.processes == 1
    results = measure_speed(
        {**{member.cell.id: member.model for member in members}, **limits},
        batch_size=size,
        input_size=bench.subject.input_size,
        images=images,
        rounds=options.rounds and ceil(options.rounds / options.processes),
        seconds=seconds,
        longest=PATIENCE * seconds if usual else None,
        latency_of=[member.cell.id for member in members],
        seed=seed,
        on_warm=bench.progress.advance,
        on_round=advance,
        on_failure=fail,
    )
    speed = {result.name: result for result in results}
    memory = {}
    for member in (member for member in members if member.cell.id in speed):
        try:
            if not bench.options.compile:  # a compiled model need not say
                member.require_same_tokens()
            memory[member.cell.id] = measure_memory(
                member.model, batch_size=size, input_size=bench.subject.input_size, images=images
            )
        except Exception as error:
            fail(member.cell.id, error)
    return speed, memory


@contextmanager
def _dropping(bench: Bench, member: Runnable) -> Iterator[None]:
    """Take a cell out of the running ones if it fails inside the block, before it is timed."""
    try:
        yield
    except Exception as error:
        bench.drop(member.cell.id, "speed", error)
