"""The check: does a run still say what a baseline run said, cell by cell and image by image?

Top-1 is compared on the same images by two rules: a loss beyond `Limits.max_drop` points fails, however few the images
are; so does a smaller one that is no chance find: McNemar's exact test, one-sided because a gain is no failure,
with Holm's correction for the number of cells, at 5 %. Flips are counted whether right or wrong. Of models without
classes the features are compared instead, by their cosine to the unreduced model's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokbench.conditions import Differences, decide, differences, in_words
from tokbench.config import Grid, ModelSpec, RunOptions
from tokbench.errors import UserError, shortened
from tokbench.measure.accuracy import Predictions
from tokbench.measure.stats import holm, mcnemar_p, paired_drop
from tokbench.progress import Progress
from tokbench.report.verdicts import Check, Verdict
from tokbench.running.resume import cell_key
from tokbench.store import SKIPPED, RunFolder, is_run, new_run_path, require_free

FLOPS_TOLERANCE_PCT = 0.1
COSINE_TOLERANCE = 0.01
SIGNIFICANCE = 0.05

Record = dict[str, Any]
Places = NDArray[np.intp]
_IDENTITY = ("model", "method", "params", "schedule")
_NEEDED = {
    "flops": ("weights_sha256", "flops"),
    "accuracy": ("weights_sha256", "images", "data", "data_fingerprint"),
    "speed": ("weights_sha256", "speedup", "speedup_low", "speedup_high"),
}
_MEASURES = {"flops": "FLOPs", "accuracy": "accuracy", "speed": "speed"}


@dataclass(frozen=True)
class Limits:
    """What may change. max_drop: points of top-1 lost. max_flips: percent of the predictions, or of the images whose
    features move. max_slowdown: percent of the speed-up lost; None to leave speed alone, as other work on the machine
    disturbs it.
    """

    max_drop: float = 1.0
    max_flips: float = 2.0
    max_slowdown: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UserError(f"--{name.replace('_', '-')} must be 0 or more, not {value:g}")

    def describe(self, features: bool) -> dict[str, str]:
        """For each gate, in the order they are told, what cells that pass it do. features: of models without classes
        too."""
        points = "1 point" if self.max_drop == 1 else f"{self.max_drop:g} points"
        gates = {
            "cells": "are there",
            "top-1": f"lose at most {points} of top-1, and not significantly",
            "flips": f"flip at most {self.max_flips:g} % of the predictions",
            "cosine": f"move it by more than {COSINE_TOLERANCE:g} for at most {self.max_flips:g} % of the images",
            "flops": f"have FLOPs within {FLOPS_TOLERANCE_PCT:g} %",
            "tokens": "have the same tokens after each block",
        }
        if not features:
            del gates["cosine"]
        if self.max_slowdown is not None:
            gates["speed"] = f"lose at most {self.max_slowdown:g} % of their speed-up"
        return gates


def check(
    baseline: str | Path,
    run: str | Path | None = None,
    *,
    limits: Limits | None = None,
    limit: int | None = None,
    out: str | Path | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Check:
    """Compare a run with a baseline run; without a run, first measure the baseline's own grid on its images.

    limit: compare on so many images, the subset that `run --limit` takes. out: folder for the new run, by default a
    new one under results/. device: where to measure it, by default on the kind of device that the baseline was
    measured on. Raises UserError for what cannot be compared: other weights, other images, speed-ups of other hardware.
    """
    limits = limits or Limits()
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1 image, not {limit}")
    before = _Run(baseline)
    if limits.max_slowdown is not None and not before.has("speed"):
        raise UserError(f"--max-slowdown: the baseline {before.path} has not measured speed")
    if run is not None:
        for option, value in (("--out", out), ("--device", device)):
            if value is not None:
                raise UserError(f"{option} is for the run that is made when no RUN is given")
        after = _Run(run)
    else:
        options = _options(before, limits, limit, device)
        _subset(before, limit)  # before anything is measured
        after = _Run(_measure_again(before, options, out, progress))
    chosen = {**_subset(before, limit), **_subset(after, limit)} if limit else {}
    return _compare(before, after, limits, chosen)


@dataclass(frozen=True)
class _Cell:
    """What a run says of one cell."""

    id: str
    model: str
    kinds: dict[str, Record]

    @property
    def measured(self) -> bool:
        """Whether there is anything but a failure."""
        return any(kind in self.kinds for kind in _MEASURES)

    @property
    def has_features(self) -> bool:
        """Whether there are features and no classes to compare."""
        return self.kinds.get("accuracy", {}).get("similarity") is not None

    @property
    def calibrated(self) -> Any:
        """Parameters that were measured on calibration images, None where there are none."""
        return self.kinds["accuracy"].get("calibrated")

    def missing(self, kind: str) -> str:
        """Why a measurement is not there."""
        failure = self.kinds.get("failure")
        return f"failed: {failure['message']}" if failure else f"{_MEASURES[kind]} not measured"


class _Run:
    """A run folder, its records by cell. Cells are the same if model, method, parameters and schedule mean the same."""

    def __init__(self, path: str | Path) -> None:
        self.folder = RunFolder.open(path)
        self.path = self.folder.path
        self.cells: dict[tuple[str, ...], _Cell] = {}
        for record in self.folder.records():
            lacks = [name for name in _NEEDED.get(record["kind"], ()) if record.get(name) is None]
            if lacks:
                raise UserError(f"{self.path}: the {record['kind']} record of {record['cell']} has no {lacks[0]!r}")
            for name in ("flops", "speedup"):
                if record.get(name) is not None and record[name] <= 0:
                    raise UserError(
                        f"{self.path}: {name} of {record['cell']} is {record[name]:g}: the record is damaged"
                    )
            key = cell_key(*(record[name] for name in _IDENTITY))
            cell = self.cells.setdefault(key, _Cell(record["cell"], record["model"], {}))
            cell.kinds[record["kind"]] = record
        if not any(cell.measured for cell in self.cells.values()):
            raise UserError(f"the run {self.path} holds no measurements")

    @cached_property
    def grids(self) -> list[Grid]:
        """What was asked for: once, or again in other words each time the run was continued."""
        manifest = self.folder.manifest
        sessions = [manifest, *manifest.get("continued", [])]
        grids = [Grid.from_dict(session.get("grid") or {}) for session in sessions]
        return [grid for place, grid in enumerate(grids) if grid not in grids[:place]]

    def has(self, kind: str) -> bool:
        return any(kind in cell.kinds for cell in self.cells.values())

    def one(self, model: str, field: str) -> Any:
        """What a model's accuracy records say in a field they share, or any record where there is none of them."""
        records = [record for cell in self.cells.values() if cell.model == model for record in cell.kinds.values()]
        records.sort(key=lambda record: record["kind"] != "accuracy")
        return next((record[field] for record in records if record.get(field) is not None), None)

    def answers(self, cell: _Cell, subset: _Subset | None) -> tuple[Places, Predictions]:
        """Which images a cell answered, and what; of the subset only where one is given."""
        path = self.folder.prediction_path(cell.id)
        try:
            found = Predictions.load(path)
        except (OSError, ValueError) as error:
            raise UserError(f"the predictions of {cell.id} cannot be read: {path} ({shortened(error)})") from error
        images = cell.kinds["accuracy"]["images"]
        if len(found.label) != images:
            raise UserError(f"{path} has {len(found.label)} predictions, its record {images}")
        if subset is None:
            skipped = self.skipped(cell.model)
            return np.delete(np.arange(images + len(skipped)), skipped), found
        return subset.images, found.take(subset.places)

    def skipped(self, model: str) -> list[int]:
        """Places, among the images of the run, of those that could not be decoded."""
        places = [image["index"] for image in self.folder.skipped().get(model, [])]
        images = (self.one(model, "images") or 0) + len(places)
        if len(set(places)) < len(places) or any(not 0 <= place < images for place in places):
            raise UserError(f"{self.path / SKIPPED} names images of {model} that are not among its {images:,}")
        return places


@dataclass(frozen=True)
class _Subset:
    """Some of the images that a model's cells answered.

    images: their numbers in the data set. places: where they are among the answers. fingerprint: the data's with these
    images, and those among them that could not be decoded.
    """

    images: Places
    places: Places
    fingerprint: str


def _subset(run: _Run, limit: int | None) -> dict[tuple[Path, str], _Subset]:
    """Of each model of the run, the images that `limit` takes.

    Opens the models and their data, and raises UserError unless they are what the run measured.
    """
    from tokbench.data import open_dataset
    from tokbench.models import load_model, weights_sha256

    if limit and not run.has("accuracy"):
        raise UserError(f"--limit {limit}: the run {run.path} has not measured accuracy")
    chosen: dict[tuple[Path, str], _Subset] = {}
    for grid in run.grids:
        for spec in grid.models:
            if (run.path, spec.label) in chosen or run.one(spec.label, "weights_sha256") is None:
                continue
            model = load_model(spec.name, spec.checkpoint, input_size=spec.input_size)
            _require_same(run, spec, "weights_sha256", weights_sha256(model), f"weights of model {spec.label}")
            if "accuracy" not in grid.options.only:
                continue
            source = open_dataset(grid.data, model, limit=grid.options.limit, labels=grid.options.labels)
            _require_same(run, spec, "data_fingerprint", source.fingerprint, f"images of data '{grid.data}'")
            wanted = (
                source if limit is None else open_dataset(grid.data, model, limit=limit, labels=grid.options.labels)
            )
            if len(wanted) < (limit or 0) or not np.isin(wanted.indices, source.indices).all():
                raise UserError(f"--limit {limit}: the run {run.path} has only {len(source):,} images")
            skipped = run.skipped(spec.label)
            if any(place >= len(source) for place in skipped):
                raise UserError(f"{run.path / SKIPPED} names images that are not among the {len(source):,} of the run")
            answered = np.delete(source.indices, skipped)
            images = np.intersect1d(wanted.indices, answered)
            chosen[run.path, spec.label] = _Subset(images, np.searchsorted(answered, images), wanted.fingerprint)
    return chosen


def _require_same(run: _Run, spec: ModelSpec, field: str, now: str, what: str) -> None:
    then = run.one(spec.label, field)
    if then is not None and then != now:
        raise UserError(f"the {what} are not those of {run.path}: sha256 {_short(now)} now, {_short(then)} there")


def _short(digest: str) -> str:
    return f"{digest[:12]}…"


def _options(baseline: _Run, limits: Limits, limit: int | None, device: str | None) -> list[tuple[Grid, RunOptions]]:
    """The baseline's grids, and how to measure them again: as they were, but for speed where nobody asks for it.

    Raises UserError where there is no such device, and for speed where this is other hardware.
    """
    from tokbench.measure.environment import describe_machine
    from tokbench.running.runner import find_device

    manifest = baseline.folder.manifest
    known = manifest.get("conditions") or {}
    chosen = []
    for grid in baseline.grids:
        own = grid.options
        kinds = tuple(kind for kind in own.only if kind != "speed" or limits.max_slowdown is not None)
        if not kinds:
            continue
        place = (known.get("device") or "auto" if own.device == "auto" else own.device) if device is None else device
        options = replace(own, only=kinds, limit=limit or own.limit, device=place)
        try:
            found = find_device(place)
        except UserError as error:
            if device is not None:
                raise
            gpu = (manifest.get("machine") or {}).get("gpu")
            where = f"{gpu} ({place})" if gpu else place
            raise UserError(
                f"the baseline {baseline.path} was measured on {where}, and PyTorch sees no such device here; "
                "--device cpu compares all but speed"
            ) from error
        if known.get("batch_size") and found.type != known.get("device"):
            options = replace(options, batch_size=known["batch_size"])  # "auto" is another on every kind of device
        if "speed" in kinds:
            here = {"conditions": {**known, "device": found.type}, "machine": describe_machine(found)}
            now = {**here, "packages": manifest.get("packages")}
            _require_comparable_speed(differences(manifest, now, baseline.path), baseline)
        chosen.append((grid, options))
    if not chosen:
        raise _speed_only(baseline)
    return chosen


def _require_comparable_speed(differ: Differences, baseline: _Run) -> None:
    if differ.settings:
        clauses = [clause for clause in differ.told if clause.split(" ")[0] in differ.settings]
        raise UserError(
            f"--max-slowdown: speed-ups cannot be held against those of {baseline.path}, as "
            f"{in_words(differ.settings)} {decide(differ.settings)} them: {', '.join(clauses)}; "
            "without it the rest is compared"
        )


def _measure_again(
    baseline: _Run, chosen: list[tuple[Grid, RunOptions]], out: str | Path | None, progress: Progress | None
) -> Path:
    """Run the baseline's grids again.

    Never continues a run: what the code said before its last change is not what it says now.
    """
    from tokbench.running.runner import run

    path = Path(out) if out else new_run_path(label=f"check-{baseline.grids[0].models[0].label}")
    if is_run(path):
        raise UserError(f"{path} holds a run already: name a new folder, or compare that run: tokbench check {path} …")
    require_free(path)
    for grid, options in chosen:
        run(grid, path, options=options, progress=progress)
    return path


def _speed_only(baseline: _Run) -> UserError:
    return UserError(f"the baseline {baseline.path} has measured speed only; give --max-slowdown to compare it")


def _compare(before: _Run, after: _Run, limits: Limits, chosen: Mapping[tuple[Path, str], _Subset]) -> Check:
    pairs = [(cell, after.cells[meaning]) for meaning, cell in before.cells.items() if meaning in after.cells]
    for old, new in pairs:
        _require_comparable(before, after, old, new, chosen)
    both_timed = before.has("speed") and after.has("speed")
    differ = differences(before.folder.manifest, after.folder.manifest, before.path, both_timed)
    if limits.max_slowdown is not None:
        _require_comparable_speed(differ, before)
    features = any(old.has_features and new.has_features for old, new in pairs)
    check = Check(after.path, before.path, "", differ, limits.describe(features))
    kinds = [kind for kind in _MEASURES if kind != "speed" or limits.max_slowdown is not None]
    for meaning, old in before.cells.items():
        if any(kind in old.kinds for kind in kinds):
            check.verdicts.append(_presence(old, after.cells.get(meaning), kinds))
    if not check.verdicts:
        raise _speed_only(before)
    check.verdicts += _judge_predictions(before, after, pairs, limits, chosen, check)
    for old, new in pairs:
        check.verdicts += _judge_cost(old.kinds, new.kinds, old.id)
        if limits.max_slowdown is not None and "speed" in old.kinds and "speed" in new.kinds:
            check.verdicts.append(_judge_speed(old.kinds["speed"], new.kinds["speed"], old.id, limits.max_slowdown))
    known = {meaning for meaning, cell in before.cells.items() if cell.measured}
    fresh = [cell.id for meaning, cell in after.cells.items() if meaning not in known and cell.measured]
    if fresh:
        check.notes.append(f"new, not measured in the baseline: {', '.join(fresh)}")
    check.scope = _scope(before, after, pairs, chosen)
    return check


def _require_comparable(
    before: _Run, after: _Run, old: _Cell, new: _Cell, chosen: Mapping[tuple[Path, str], _Subset]
) -> None:
    """Raise UserError if two runs of a cell had other weights or other images."""
    weights = [next(iter(cell.kinds.values()))["weights_sha256"] for cell in (old, new)]
    if weights[0] != weights[1]:
        raise UserError(
            f"the runs have other weights under the name {old.model}: sha256 {_short(weights[1])} in {after.path}, "
            f"{_short(weights[0])} in {before.path}"
        )
    if not ("accuracy" in old.kinds and "accuracy" in new.kinds):
        return
    then, now = old.kinds["accuracy"], new.kinds["accuracy"]
    prints = [then["data_fingerprint"], now["data_fingerprint"]]
    if chosen:
        prints = [chosen[run.path, old.model].fingerprint for run in (before, after)]
    if prints[0] != prints[1]:
        hint = f"; --limit {min(then['images'], now['images'])} compares a part of both"
        described = [
            f"{record['images']:,} of {record['data']} ({_short(print_)})"
            for record, print_ in zip((then, now), prints, strict=True)
        ]
        raise UserError(
            f"the runs saw other images: {described[1]} in {after.path}, {described[0]} in {before.path}"
            f"{hint if then['data'] == now['data'] and not chosen else ''}"
        )


def _scope(
    before: _Run, after: _Run, pairs: list[tuple[_Cell, _Cell]], chosen: Mapping[tuple[Path, str], _Subset]
) -> str:
    cells = f"{len(pairs)} cells" if len(pairs) != 1 else "1 cell"
    compared = [old for old, new in pairs if "accuracy" in old.kinds and "accuracy" in new.kinds]
    if not compared:
        return cells
    images = compared[0].kinds["accuracy"]["images"]
    subset = chosen.get((before.path, compared[0].model))
    part = f"{len(subset.images):,} of the baseline's {images:,}" if subset else f"{images:,}"
    return f"{cells} on {part} images of {before.one(compared[0].model, 'data')}"


def _presence(old: _Cell, new: _Cell | None, kinds: list[str]) -> Verdict:
    if new is None:
        return Verdict("cells", old.id, False, "missing from this run")
    lost = [new.missing(kind) for kind in kinds if kind in old.kinds and kind not in new.kinds]
    return Verdict("cells", old.id, not lost, "; ".join(dict.fromkeys(lost)) or "")


def _judge_predictions(
    before: _Run,
    after: _Run,
    pairs: list[tuple[_Cell, _Cell]],
    limits: Limits,
    chosen: Mapping[tuple[Path, str], _Subset],
    check: Check,
) -> list[Verdict]:
    """Top-1 and flips, or features, of every cell that both runs have answers of; the check is told of gains and of
    what is not judged.
    """
    compared = [(old, new) for old, new in pairs if "accuracy" in old.kinds and "accuracy" in new.kinds]
    if chosen:  # parameters that are measured on a run's first images are others on a part of them
        other = [(old, new) for old, new in compared if old.calibrated != new.calibrated]
        check.notes += [f"{old.id}: predictions not compared, as it was calibrated on other images" for old, _ in other]
        compared = [pair for pair in compared if pair not in other]
    answers = []
    for old, new in compared:
        seen, then = before.answers(old, chosen.get((before.path, old.model)))
        seen_now, now = after.answers(new, chosen.get((after.path, new.model)))
        if not np.array_equal(seen, seen_now):
            raise UserError(
                f"{old.model} answered {len(seen_now):,} of the images in {after.path} and {len(seen):,} in "
                f"{before.path}: some cannot be decoded; skipped.json there names them"
            )
        if not np.array_equal(then.label, now.label):
            raise UserError(f"{old.id}: the images are the same, but their labels are not those of {before.path}")
        answers.append((then, now))
    verdicts = []
    for (old, _), (then, now) in zip(compared, answers, strict=True):
        if then.classifies and now.classifies:
            flipped, images = int((then.predicted != now.predicted).sum()), len(then.label)
            share = 100 * flipped / images
            text = f"{share:.1f} % flipped, {flipped} of {images:,}"
            verdicts.append(Verdict("flips", old.id, share <= limits.max_flips, text, share))
        else:
            if not then.classifies and not now.classifies:
                verdicts.append(_judge_features(old.id, then.similarity, now.similarity, limits.max_flips))
            check.skipped |= dict.fromkeys(("top-1", "flips"), f"{old.model} has no classes")
        if not then.labeled:
            check.skipped.setdefault("top-1", "the images have no labels")
    right = [
        (old, then.with_label(), now.with_label())
        for (old, _), (then, now) in zip(compared, answers, strict=True)
        if then.labeled and then.classifies and now.classifies
    ]
    return verdicts + _judge_top1(right, limits, check.notes)


def _judge_features(cell: str, then: NDArray[np.float32], now: NDArray[np.float32], max_moved: float) -> Verdict:
    """`then` and `now`: cosines (n,), NaN where the features are not finite."""
    known = np.isfinite(then) & np.isfinite(now)
    one_unknown = np.isfinite(then) != np.isfinite(now)
    change = np.abs(now[known] - then[known])
    moved, images = int((change > COSINE_TOLERANCE).sum() + one_unknown.sum()), len(then)
    share = 100 * moved / images
    text = f"{share:.1f} % moved, {moved} of {images:,}"
    if known.any():
        text += f", by {change.max():.3f} at most; mean cosine {then[known].mean():.4f} → {now[known].mean():.4f}"
    if not known.all():
        text += f"; not finite in {int((~np.isfinite(then)).sum()):,} before, {int((~np.isfinite(now)).sum()):,} now"
    return Verdict("cosine", cell, share <= max_moved, text, share)


def _judge_top1(
    answers: list[tuple[_Cell, Predictions, Predictions]], limits: Limits, notes: list[str]
) -> list[Verdict]:
    """Top-1 of cells with their answers in both runs; gains go to `notes`."""
    adjusted = holm([mcnemar_p(then.correct, now.correct, "greater") for _, then, now in answers])
    gains = holm([mcnemar_p(now.correct, then.correct, "greater") for _, then, now in answers])
    verdicts = []
    for (old, then, now), p, p_gain in zip(answers, adjusted, gains, strict=True):
        drop, low, high = paired_drop(then.correct, now.correct)
        lost, gained = int((then.correct & ~now.correct).sum()), int((now.correct & ~then.correct).sum())
        figures = f"[{low:.1f}, {high:.1f}], {lost} lost and {gained} gained of {len(then.label):,} images"
        if drop < 0 and p_gain < SIGNIFICANCE:
            notes.append(f"gain: {old.id} gets {-drop:.2f} points more right, drop {figures}, p {p_gain:.2g}")
        broken = [f"more than {limits.max_drop:g}"] * (drop > limits.max_drop) + ["significant"] * (p < SIGNIFICANCE)
        text = f"{drop:.2f} points lost {figures}, p {p:.2g}" if drop >= 0 else f"{-drop:.2f} points gained"
        verdicts.append(Verdict("top-1", old.id, not broken, ": ".join([*broken[-1:], text]), drop))
    return verdicts


def _judge_cost(then: Mapping[str, Record], now: Mapping[str, Record], cell: str) -> list[Verdict]:
    """FLOPs and tokens per block: the same code on the same model gives the same, so any change is one of code."""
    verdicts = []
    if "flops" in then and "flops" in now:
        old, new = then["flops"]["flops"], now["flops"]["flops"]
        change = 100 * (new / old - 1)
        text = f"{change:+.2f} %, {old / 1e9:.4g} → {new / 1e9:.4g} GFLOPs"
        verdicts.append(Verdict("flops", cell, abs(change) <= FLOPS_TOLERANCE_PCT, text, abs(change)))
    old, new = (next((r["tokens"] for r in kinds.values() if r.get("tokens")), None) for kinds in (then, now))
    if old and new:
        moved = [block for block, (a, b) in enumerate(zip_longest(old, new)) if a != b]
        text = ""
        if moved:
            text = f"after block {moved[0]} {_at(old, moved[0])} → {_at(new, moved[0])}, other in {len(moved)} blocks"
        verdicts.append(Verdict("tokens", cell, not moved, text, len(moved)))
    return verdicts


def _at(tokens: list[int], block: int) -> str:
    return str(tokens[block]) if block < len(tokens) else "none"


def _judge_speed(then: Record, now: Record, cell: str, max_slowdown: float) -> Verdict:
    """By the points: an interval is about one process, and two runs differ by more."""

    def written(record: Record) -> str:
        return f"{record['speedup']:.2f}× [{record['speedup_low']:.2f}, {record['speedup_high']:.2f}]"

    lost = 100 * (1 - now["speedup"] / then["speedup"])
    text = f"{written(then)} → {written(now)}, {lost:.1f} % lost" if lost > 0 else f"{written(then)} → {written(now)}"
    return Verdict("speed", cell, lost <= max_slowdown, text, lost)
