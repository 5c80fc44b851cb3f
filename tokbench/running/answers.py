"""One pass over the images for all cells of a model that lack their answers."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict

import numpy as np
import torch

from tokbench.config import PlannedCell, RunOptions
from tokbench.data import ImageSource, ImageStream
from tokbench.errors import RunStopped
from tokbench.measure.accuracy import evaluate
from tokbench.measure.neighbors import Neighbors
from tokbench.results.folder import SKIPPED
from tokbench.results.predictions import Predictions, join
from tokbench.running.bench import Bench, Runnable
from tokbench.running.figures import accuracy_fields, at_chance_level
from tokbench.running.half_pass import HalfPass, PassFile
from tokbench.running.reader import Reader
from tokbench.running.shared import sharing_first_blocks
from tokbench.searching.images import Overlap

MUCH_READING = 0.2  # of a pass over the images


def measure_accuracy(bench: Bench) -> None:
    """One pass over the images for all cells that lack it, or two where an earlier session left half of one."""
    source = bench.subject.source
    assert source is not None
    file = PassFile(bench.folder, bench.subject.spec.label)
    half = file.load() if continues(bench, source) else None
    for cells, start in passes(bench, lambda: [member.cell for member in bench.running], half):
        if start is not half:  # which is over, or of other cells
            file.remove()
        _pass_over_images(bench, source, [one for one in bench.running if one.cell in cells], start, file)
        file.remove()


def continues(bench: Bench, source: ImageSource | ImageStream) -> bool:
    """Whether half a pass is kept: a stream cannot seek, and features are too large to keep."""
    return not source.streaming and bench.subject.model.num_classes > 0


def passes(
    bench: Bench, cells: Callable[[], list[PlannedCell]], half: HalfPass | None
) -> Iterator[tuple[list[PlannedCell], HalfPass]]:
    """Which cells see the images together, the unreduced one first, and from where on: those of half a pass, then those
    that lack accuracy still. cells: what runs, the unreduced one first."""
    shown: list[PlannedCell] = []
    for start in filter(None, [half, HalfPass()]):
        running = cells()
        waiting = [cell for cell in running if cell not in shown and bench.lacks(cell, "accuracy")]
        members = [*running[:1], *(cell for cell in running[1:] if cell in waiting)]
        if start is half:
            members = [cell for cell in members if cell.id in start.answers]
        if members[:1] == running[:1] and any(cell in waiting for cell in members):
            shown += members
            yield members, start


def _pass_over_images(
    bench: Bench, source: ImageSource | ImageStream, members: list[Runnable], half: HalfPass, file: PassFile
) -> None:
    """Show the images from where `half` ends to these cells, the unreduced model first, and record all answers."""
    reference = members[0]
    before = _stored_answers(bench, reference)
    skips = _stored_skips(bench, reference)
    reader = reader_for(bench, bench.batch_size, half, skips, bench.options.max_bad)
    batch_sizes = dict(half.batch_sizes)
    if bench.cluster:
        bench.cluster.start()
    bench.phase(f"accuracy on {bench.cluster}" if bench.cluster else "accuracy", len(source))
    if half.end:
        bench.progress.advance(half.end)
    seen = len(half.answers[reference.cell.id].label) if half.answers else 0

    def keep(answers: dict[str, Predictions]) -> None:
        nonlocal seen
        own = answers[reference.cell.id]
        if before is not None:
            _require_same_answers(before, own, seen, repr(str(bench.folder.path)))
        seen += len(own.label)
        end, skipped = reader.passed(seen)
        if continues(bench, source):
            file.add(HalfPass(end, answers, dict(batch_sizes), skipped))
        bench.progress.advance(end)

    searched = {cell.id: found.marks for member in members if (found := bench.searched(cell := member.cell))}
    overlap = Overlap(source, searched)
    overlap.read_again(half.end)
    neighbors = None
    if not bench.subject.model.num_classes and not any(w.code == "no_labels" for w in source.warnings):
        neighbors = Neighbors(len(source), len(members))
    began = time.monotonic()
    try:
        if bench.cluster:
            rest = bench.cluster.shown(bench, members, reader, searched, overlap.counts, batch_sizes, keep)
        else:
            rest = shown(
                bench, members, reader, overlap, batch_sizes, neighbors, keep,
                lambda cell_id, error: bench.drop(cell_id, "accuracy", error),
            )  # fmt: skip
    except BaseException:
        file.save()
        raise
    if not rest and not half.answers:
        raise RunStopped(f"none of the {len(source):,} images of {source.name} can be decoded: nothing to measure.")
    joined = {name: join([half.answers[name], own] if half.answers else [own]) for name, own in rest.items()}
    results = joined or half.answers
    thinned = neighbors is not None and neighbors.step > 1
    caveats = [f"k-NN is of one in {neighbors.step} images, as features fill memory"] if neighbors and thinned else []
    seconds = time.monotonic() - began
    _tell_where_time_went(bench, reader, seconds)
    _record_answers(bench, source, members, results, reader, batch_sizes, caveats, overlap, seconds)


def shown(
    bench: Bench,
    members: list[Runnable],
    reader: Reader,
    overlap: Overlap,
    batch_sizes: dict[str, int],
    neighbors: Neighbors | None,
    on_batch: Callable[[dict[str, Predictions]], None] | None,
    on_failure: Callable[[str, Exception], None],
) -> dict[str, Predictions]:
    """What these cells, the unreduced one first, answer to the reader's images; nothing where there are none."""
    batches = overlap.watching(reader.batches())
    if (first := next(batches, None)) is None:
        return {}
    models = {member.cell.id: member.model for member in members}
    with sharing_first_blocks(*models.values(), input_size=bench.subject.input_size):
        return evaluate(
            models, itertools.chain([first], batches), device=bench.device, dtype=bench.dtype,
            prepare=reader.source.floats, classifier=bench.subject.model.num_classes > 0, among=reader.source.among,
            neighbors=neighbors, batch_sizes=batch_sizes, on_batch=on_batch, on_failure=on_failure,
        )  # fmt: skip


def _tell_where_time_went(bench: Bench, reader: Reader, seconds: float) -> None:
    share = reader.waited / seconds
    text = f"{bench.subject.spec.label}: the pass over the images took {seconds:.1f} s, {share:.0%} of it to read them"
    if share > MUCH_READING and seconds > 10:
        bench.progress.warn(f"{text}: more --readers would save time, and in later runs --cache DIR")
    else:
        bench.progress.note(text)


def _record_answers(
    bench: Bench,
    source: ImageSource | ImageStream,
    members: list[Runnable],
    results: dict[str, Predictions],
    reader: Reader,
    batch_sizes: dict[str, int],
    caveats: list[str],
    overlap: Overlap,
    seconds: float,
) -> None:
    label, reference = bench.subject.spec.label, members[0]
    baseline = results[reference.cell.id]
    first_time = bench.lacks(reference.cell, "accuracy")
    if reader.skipped:
        skips = {**bench.folder.skipped(), label: [asdict(image) for image in reader.skipped]}
        bench.folder.replace(SKIPPED, lambda file: file.write(json.dumps(skips, indent=1).encode() + b"\n"))
        if first_time:
            bench.progress.warn(
                f"{len(reader.skipped)} of {len(source):,} images of {source.name} cannot be decoded, and no cell "
                f"of {label} saw them: {bench.folder.path / SKIPPED} names them"
            )
    caveats = [*(warning.text for warning in source.warnings), *caveats]
    if at_chance_level(baseline, source.num_classes):
        chance = f"{label} gets {baseline.top1():.1%} of {source.name} right, which is chance level"
        caveats.append(chance)
        if first_time:
            bench.progress.warn(
                f"{chance}: the model's classes and the data's labels probably don't match, and drops mean nothing"
            )
    for member in members:
        if member.cell.id not in results or not bench.lacks(member.cell, "accuracy"):
            continue
        predictions = results[member.cell.id]
        try:
            member.require_same_tokens()
        except ValueError as error:
            bench.drop(member.cell.id, "accuracy", error)
            continue
        bench.folder.replace(bench.folder.prediction_name(member.cell.id), predictions.save)
        own = []
        if same := overlap.counts.get(member.cell.id):
            own = [f"{same:,} of these images are among those that the schedule was searched on"]
        bench.record(
            member,
            "accuracy",
            **accuracy_fields(predictions, baseline),
            skipped=len(reader.skipped),
            batch_size=min(bench.batch_size, batch_sizes.get(member.cell.id, bench.batch_size)),
            pass_seconds=seconds,
            reading_seconds=reader.waited,
            workers=bench.cluster.count if bench.cluster else None,
            caveats=caveats + own,
        )
        if wrong := predictions.nonfinite():
            bench.progress.warn(
                f"{member.cell.id} gives NaN or infinite logits for {wrong:,} of {len(predictions.label):,} "
                "images; they count as wrong"
            )


def _stored_answers(bench: Bench, reference: Runnable) -> Predictions | None:
    """What the unreduced model answered in an earlier session, None where there was no such."""
    if bench.lacks(reference.cell, "accuracy"):
        return None
    path = bench.folder.prediction_path(reference.cell.id)
    try:
        return Predictions.load(path)
    except (OSError, ValueError) as error:
        raise RunStopped(f"the predictions in {path} cannot be read: {error}; --fresh begins a new run.") from error


def _stored_skips(bench: Bench, reference: Runnable) -> list[int] | None:
    if bench.lacks(reference.cell, "accuracy"):
        return None
    return [image["index"] for image in bench.folder.skipped().get(bench.subject.spec.label, [])]


def _require_same_answers(before: Predictions, now: Predictions, start: int, what: str) -> None:
    """Raise RunStopped unless the answers are those that `before` holds from place `start` on."""
    for name, word in (("label", "label"), ("predicted", "prediction")):
        was, is_ = getattr(before, name)[start : start + len(now.label)], getattr(now, name)
        if not np.array_equal(was, is_):
            raise RunStopped(
                f"the unreduced model no longer answers as in {what}: its {word}s differ among images {start:,} to "
                f"{start + len(is_):,}, and new cells cannot be compared with old ones. --fresh begins a new run."
            )


def reader_for(
    bench: Bench,
    size: int,
    half: HalfPass,
    expected: list[int] | None,
    max_bad: float = 100.0,
    stop: int | None = None,
) -> Reader:
    """A `Reader` of a bench's images, `size` at a time, with as many processes as its options and device ask for."""
    source = bench.subject.source
    assert source is not None
    count, pinned = readers(source, bench.options, bench.device), bench.device.type == "cuda"
    return Reader(source, size, count, half, expected, max_bad, stop, pinned)


def readers(source: ImageSource | ImageStream, options: RunOptions, device: torch.device) -> int:
    """How many processes read the images: 0 for none but this one."""
    if options.readers is not None:
        return options.readers
    # On the CPU the cells themselves use every core, and reading an image costs little next to running them all.
    if device.type == "cpu":
        return 0
    return 1 if source.streaming else min(8, os.cpu_count() or 1)
