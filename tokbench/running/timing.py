"""The timing of a model's cells, in turns with the unreduced model and each with its own speed limit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tokbench.errors import BaselineFailed, RunStopped, one_line
from tokbench.measure._model import is_out_of_memory, release_memory
from tokbench.measure.compiled import compile_model
from tokbench.measure.environment import Watch, thread_warnings
from tokbench.measure.speed import SpeedResult, largest_batch, measure_memory, measure_speed
from tokbench.running.bench import Bench, Runnable, counts_by_image
from tokbench.running.records import VAGUE, speed_fields, vague_sentence, vague_speedups

# A budget for all rounds together; slow cells exceed it, because each makes five rounds at least.
SPEED_SECONDS_PER_CELL = 1.0
LARGEST_BATCH = 1024


@dataclass
class _Timed:
    """What was timed, by cell id; among the speeds are those of speed limits, by their names."""

    speed: dict[str, SpeedResult]
    memory: dict[str, tuple[int, int] | None]


def time_cells(bench: Bench) -> None:
    """Time the cells that lack it in turns with the unreduced model, on as many images as all have memory for."""
    lacking = [runnable for runnable in bench.running if bench.lacks(runnable.cell, "speed")]
    if not lacking:
        return
    if not bench.is_fused:
        bench.progress.warn("fused attention is off (TIMM_FUSED_ATTN?): speed-ups are over a slower model than timm's")
    reference, size = bench.running[0], _batch_size(bench)
    asked = size
    timed: _Timed | None = None
    watch = Watch(bench.device)
    while timed is None:
        members = [reference, *(member for member in bench.running[1:] if member in lacking)]
        try:
            timed = _time(bench, members, size, watch)
        except (RunStopped, BaselineFailed):
            raise
        except Exception as error:  # the unreduced model's, or nobody's in particular: no speed-up can be told
            if not is_out_of_memory(error) or size == 1:
                bench.drop(reference.cell.id, "speed", error)
            size = (size + 1) // 2
        release_memory(bench.device)
    disturbance = watch.stop()
    speedups = [timed.speed[name] for name in timed.memory if name != reference.cell.id]
    vague = vague_speedups(speedups)
    for sentence in (*disturbance.warnings, *([vague_sentence(vague, len(speedups))] if vague else [])):
        if sentence not in thread_warnings(bench.device):  # said at the start
            bench.progress.warn(sentence)
    caveats = [sentence.partition(": ")[0] for sentence in disturbance.warnings]  # without what to do about it
    if size < asked:
        caveats.append(f"memory allowed batches of {size} only, where {asked} were asked for")
    # Added to a run, the cells ran beside an unreduced model whose own record is an earlier session's.
    base = timed.speed[reference.cell.id]
    measured = {"reference_seconds": base.rounds, "reference_latency_seconds": base.latency}
    again = {} if reference in lacking else measured
    earlier = _timed_before(bench)
    if earlier not in (None, size):
        bench.progress.warn(
            f"memory allows batches of {size} only, and the cells timed before had {earlier}: "
            "their speeds are no match; --fresh times all on the same"
        )
    for runnable in lacking:
        if runnable.cell.id in timed.memory:
            fields = speed_fields(
                timed.speed[runnable.cell.id],
                timed.memory[runnable.cell.id],
                reference=base,
                limit=timed.speed.get(runnable.limit_name) if runnable.limit is not None else None,
                compiled=bench.options.compile,
            )
            bench.record(
                runnable,
                "speed",
                **fields,
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


def _time(bench: Bench, members: list[Runnable], size: int, watch: Watch) -> _Timed:
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

    def advance(done: int, planned: int) -> None:
        watch.look()
        if done == 1:
            bench.phase("speed", planned)
        bench.progress.advance(done)

    images = bench.images(size) if any(counts_by_image(member.model) for member in members) else None
    results = measure_speed(
        {**{member.cell.id: member.model for member in members}, **limits},
        batch_size=size,
        input_size=bench.subject.input_size,
        images=images,
        seconds=SPEED_SECONDS_PER_CELL * (len(members) + len(limits)),
        latency_of=[member.cell.id for member in members],
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
    return _Timed(speed, memory)


@contextmanager
def _dropping(bench: Bench, member: Runnable) -> Iterator[None]:
    """Take a cell out of the running ones if it fails inside the block, before it is timed."""
    try:
        yield
    except Exception as error:
        bench.drop(member.cell.id, "speed", error)
