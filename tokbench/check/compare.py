"""The check: does a run still say what a baseline run said, cell by cell and image by image?

Top-1 is compared on the same images by two rules. A loss beyond `Limits.max_drop` points fails, however few the images
are. A smaller one fails where it is significant: McNemar's exact test, one-sided because a gain is no failure, with
Holm's correction for the number of cells, at 5 %. Flips are counted whether right or wrong. Of models without classes
the features are compared instead, by their cosine to the unreduced model's, and of models of one output that output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np

from tokbench.check.runs import MEASURES, Measured, Run, matched, short
from tokbench.check.verdicts import Check, Verdict
from tokbench.errors import UserError
from tokbench.measure.stats import holm, mcnemar_p, paired_drop
from tokbench.progress import Progress
from tokbench.report.text import figure_text, interval, number, plural, told_caveats
from tokbench.results.cell import Cell, Figure
from tokbench.results.conditions import Differences, decide, differences, in_words
from tokbench.results.predictions import Predictions

FLOPS_TOLERANCE_PCT = 0.1
COSINE_TOLERANCE = 0.01
SIGNIFICANCE = 0.05
# Gates for models without classes: the metric they are of, and the array of the answers.
_WITHOUT_CLASSES = {"cosine": ("similarity", "similarity"), "output": ("output_shift", "output")}

Pairs = list[tuple[Measured, Measured]]
Answers = list[tuple[Cell, Predictions, Predictions]]


@dataclass(frozen=True)
class Limits:
    """What may change. max_drop: points of top-1 lost. max_flips: percent of the predictions, or of the images whose
    features move. max_slowdown: percent of the speed-up lost; None to leave speed alone, as other work on the machine
    disturbs it. despite_warnings: hold speed-ups against it even if there was a warning while they were measured.
    """

    max_drop: float = 1.0
    max_flips: float = 2.0
    max_slowdown: float | None = None
    despite_warnings: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UserError(f"--{name.replace('_', '-')} must be 0 or more, not {value:g}")

    def describe(self) -> dict[str, str]:
        """For each gate, in the order they are told, what cells that pass it do."""
        points = f"{self.max_drop:g} {plural(1 if self.max_drop == 1 else 2, 'point')}"
        gates = {
            "cells": "are there",
            "top-1": f"lose at most {points} of top-1, and not significantly",
            "flips": f"flip at most {self.max_flips:g} % of the predictions",
            "cosine": f"move it by more than {COSINE_TOLERANCE:g} for at most {self.max_flips:g} % of the images",
            "output": f"move it by more than {COSINE_TOLERANCE:g} σ for at most {self.max_flips:g} % of the images",
            "flops": f"have FLOPs within {FLOPS_TOLERANCE_PCT:g} %",
            "tokens": "have the same tokens after each block",
        }
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
    with_speed = limits.max_slowdown is not None
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1 image, not {limit}")
    before = Run(baseline)
    if with_speed and not before.has("speed"):
        raise UserError(f"--max-slowdown: the baseline {before.path} has not measured speed")
    _require_no_warning(before, limits)
    if run is not None:
        for option, value in (("--out", out), ("--device", device)):
            if value is not None:
                raise UserError(f"{option} is for the run that is made when no RUN is given")
        after = Run(run)
    if run is None or limit:
        from tokbench.check import remeasure

        if run is None:
            asked = remeasure.how_to_measure(before, with_speed=with_speed, limit=limit, device=device)
            remeasure.subsets(before, limit)  # before anything is measured
            after = Run(remeasure.measure_again(before, asked, out, progress))
        if limit:
            for own in (before, after):
                own.subsets = remeasure.subsets(own, limit)
    return _compare(before, after, limits)


def require_comparable_speed(differ: Differences, baseline: Run) -> None:
    """Raise UserError where conditions differ that speed-ups depend on."""
    if differ.settings:
        clauses = [clause for clause in differ.told if clause.split(" ")[0] in differ.settings]
        raise UserError(
            f"--max-slowdown: speed-ups cannot be held against those of {baseline.path}, as "
            f"{in_words(differ.settings)} {decide(differ.settings)} them: {', '.join(clauses)}; "
            "without it the rest is compared"
        )


def _require_no_warning(run: Run, limits: Limits) -> None:
    """Raise UserError where speed is to be judged by timings of which there was a warning."""
    doubted = [own.cell for own in run.cells if own.cell.doubts]
    if limits.max_slowdown is None or limits.despite_warnings or not doubted:
        return
    raise UserError(
        f"--max-slowdown: {run.path} is not to be judged by, as while {len(doubted)} of {len(run.cells)} cells were "
        f"timed {doubted[0].doubts[0]}; measure again on a quiet machine, or judge all the same with --despite-warnings"
    )


def speed_only(baseline: Run) -> UserError:
    """What to raise where nothing is left to compare without speed."""
    return UserError(f"the baseline {baseline.path} has measured speed only; give --max-slowdown to compare it")


def _compare(before: Run, after: Run, limits: Limits) -> Check:
    found = matched(before, after)
    pairs = [(old, new) for old, new in found if new]
    for old, new in pairs:
        _require_comparable(before, after, old, new)
    both_timed = before.has("speed") and after.has("speed")
    differ = differences(before.folder.manifest, after.folder.manifest, before.path, both_timed)
    kinds = set(MEASURES)
    if limits.max_slowdown is None:
        kinds.remove("speed")
    else:
        require_comparable_speed(differ, before)
        _require_no_warning(after, limits)
    presence = [_presence(old, new, old.kinds & kinds) for old, new in found if old.kinds & kinds]
    if not presence:
        raise speed_only(before)
    gates = limits.describe()
    for gate, (metric, _) in _WITHOUT_CLASSES.items():
        if not any(old.cell[metric] and new.cell[metric] for old, new in pairs):
            del gates[gate]
    check = Check(after.path, before.path, _scope(before, pairs), differ, gates, presence)
    _judge_answers(check, _answers(check, before, after, pairs), limits)
    for old, new in pairs:
        if old.kinds - {"speed"}:
            check.verdicts += _judge_cost(old.cell, new.cell)
        if limits.max_slowdown is not None:
            check.verdicts += _judge_speed(old.cell, new.cell, limits.max_slowdown)
    check.notes += [
        f"the plugin {name} is another one than the baseline's"
        for name, digest in after.folder.manifest.plugins.items()
        if before.folder.manifest.plugins.get(name, digest) != digest
    ]
    for run in (before, after):
        check.notes += [f"{run.path}: {text}" for text in told_caveats([own.cell for own in run.cells])]
    known = {new for old, new in pairs if old.kinds}
    if fresh := [own.cell.id for own in after.cells if own.kinds and own not in known]:
        check.notes.append(f"new, not measured in the baseline: {', '.join(fresh)}")
    return check


def _require_comparable(before: Run, after: Run, old: Measured, new: Measured) -> None:
    """Raise UserError if two runs of a cell had other weights or other images."""
    then, now = old.cell, new.cell
    if then.weights_sha256 != now.weights_sha256:
        raise UserError(
            f"the runs have other weights: {now.model} in {after.path} has sha256 {short(now.weights_sha256)}, "
            f"{then.model} in {before.path} has {short(then.weights_sha256)}; tokbench compare tells how they differ"
        )
    prints = before.fingerprint(then), after.fingerprint(now)
    if old.accuracy and new.accuracy and prints[0] != prints[1]:
        hint = f"; --limit {min(old.accuracy.images, new.accuracy.images)} compares a part of both"
        raise UserError(
            f"the runs saw other images: {now.images:,} of {now.data} ({short(prints[1])}) in {after.path}, "
            f"{then.images:,} of {then.data} ({short(prints[0])}) in {before.path}"
            f"{hint if then.data == now.data and not before.subsets else ''}"
        )


def _scope(before: Run, pairs: Pairs) -> str:
    cells = f"{len(pairs)} {plural(len(pairs), 'cell')}"
    for old, new in pairs:
        if old.accuracy and new.accuracy:
            subset = before.subsets.get(old.cell.model)
            part = f"{len(subset.images):,} of the baseline's " if subset else ""
            return f"{cells} on {part}{old.accuracy.images:,} images of {old.cell.data}"
    return cells


def _presence(old: Measured, new: Measured | None, kinds: frozenset[str]) -> Verdict:
    if new is None:
        return Verdict("cells", old.cell.id, False, "missing from this run")
    lost = [new.missing(kind) for kind in MEASURES if kind in kinds and kind not in new.kinds]
    return Verdict("cells", old.cell.id, not lost, "; ".join(dict.fromkeys(lost)))


def _answers(check: Check, before: Run, after: Run, pairs: Pairs) -> Answers:
    """The answers in both runs of every cell that has them; the check is told of which they cannot be compared."""
    answers: Answers = []
    for old, new in pairs:
        if not (old.accuracy and new.accuracy):
            continue
        if before.subsets and old.accuracy.calibrated != new.accuracy.calibrated:
            # Parameters that are measured on a run's first images are others on a part of them.
            check.notes.append(f"{old.cell.id}: predictions not compared, as it was calibrated on other images")
            continue
        (seen, then), (seen_now, now) = before.answers(old.accuracy), after.answers(new.accuracy)
        if not np.array_equal(seen, seen_now):
            raise UserError(
                f"{old.cell.model} answered {len(seen_now):,} of the images in {after.path} and {len(seen):,} in "
                f"{before.path}: some cannot be decoded; skipped.json there names them"
            )
        if not np.array_equal(then.label, now.label):
            raise UserError(f"{old.cell.id}: the images are the same, but their labels are not those of {before.path}")
        answers.append((old.cell, then, now))
    return answers


def _judge_answers(check: Check, answers: Answers, limits: Limits) -> None:
    """Add to the check: top-1 and flips, or features, of every cell, and what gained or cannot be judged."""
    rated: Answers = []
    for cell, then, now in answers:
        if then.classifies and now.classifies:
            share, text = _share((then.predicted != now.predicted).sum(), len(then.label), "flipped")
            check.verdicts.append(Verdict("flips", cell.id, share <= limits.max_flips, text, share))
            if then.labeled:
                rated.append((cell, then, now))
        else:
            if not then.classifies and not now.classifies:
                gate = "output" if cell["output_shift"] else "cosine"
                check.verdicts.append(_judge_moved(gate, cell, then, now, limits.max_flips))
            check.skipped |= dict.fromkeys(("top-1", "flips"), f"{cell.model} has no classes")
        if not then.labeled:
            check.skipped.setdefault("top-1", "the images have no labels")
    losses = holm([mcnemar_p(then.correct, now.correct, "greater") for _, then, now in rated])
    gains = holm([mcnemar_p(now.correct, then.correct, "greater") for _, then, now in rated])
    for (cell, then, now), p, p_gain in zip(rated, losses, gains, strict=True):
        drop = Figure(*paired_drop(then.correct, now.correct))
        lost, gained = int((then.correct & ~now.correct).sum()), int((now.correct & ~then.correct).sum())
        figures = f"{interval(drop, 1)}, {lost} lost and {gained} gained of {len(then.label):,} images"
        points = number(abs(drop.value), 2)
        if drop.value < 0 and p_gain < SIGNIFICANCE:
            check.notes.append(f"gain: {cell.id} gets {points} points more right, drop {figures}, p {p_gain:.2g}")
        text = f"{points} points lost {figures}, p {p:.2g}" if drop.value >= 0 else f"{points} points gained"
        too_much = drop.value > limits.max_drop
        why = "significant: " if p < SIGNIFICANCE else f"more than {limits.max_drop:g}: " if too_much else ""
        check.verdicts.append(Verdict("top-1", cell.id, not why, why + text, drop.value))


def _share(some: int, images: int, word: str) -> tuple[float, str]:
    """In percent, and in words."""
    share = 100 * int(some) / images
    return share, f"{number(share, 1)} % {word}, {some:,} of {images:,}"


def _judge_moved(gate: str, cell: Cell, before: Predictions, after: Predictions, max_moved: float) -> Verdict:
    """Of a model without classes: how far its features' cosines moved, or its one output in standard deviations."""
    then, now = (getattr(answers, _WITHOUT_CLASSES[gate][1]).astype(float) for answers in (before, after))
    if gate == "output":
        then, now = then / np.nanstd(then), now / np.nanstd(then)
    known = np.isfinite(then) & np.isfinite(now)
    one_unknown = np.isfinite(then) != np.isfinite(now)
    change = np.abs(now[known] - then[known])
    share, text = _share((change > COSINE_TOLERANCE).sum() + one_unknown.sum(), len(then), "moved")
    if known.any():
        means = " → ".join(number(float(values[known].mean()), 4) for values in (then, now))
        text += f", by {number(float(change.max()), 3)} at most; mean {gate} {means}"
    if not known.all():
        text += f"; not finite in {(~np.isfinite(then)).sum():,} before, {(~np.isfinite(now)).sum():,} now"
    return Verdict(gate, cell.id, share <= max_moved, text, share)


def _judge_cost(then: Cell, now: Cell) -> list[Verdict]:
    """FLOPs and tokens per block: the same code on the same model gives the same, so any change is one of code."""
    verdicts = []
    old, new = then.value("gflops"), now.value("gflops")
    if old and new:
        change = round(100 * (new / old - 1), 9)  # the digits behind are those of the division
        text = f"{'+' if change > 0 else ''}{number(change, 2)} %, {old:.4g} → {new:.4g} GFLOPs"
        verdicts.append(Verdict("flops", then.id, abs(change) <= FLOPS_TOLERANCE_PCT, text, abs(change)))
    if then.tokens and now.tokens:
        blocks = enumerate(zip_longest(then.tokens, now.tokens, fillvalue="none"))
        moved = [f"after block {block} {a} → {b}" for block, (a, b) in blocks if a != b]
        text = f"{moved[0]}, other in {len(moved)} {plural(len(moved), 'block')}" if moved else ""
        verdicts.append(Verdict("tokens", then.id, not moved, text, len(moved)))
    return verdicts


def _judge_speed(then: Cell, now: Cell, max_slowdown: float) -> list[Verdict]:
    """By the points: an interval is about one process, and two runs differ by more."""
    old, new = then.value("speedup"), now.value("speedup")
    if not (old and new):
        return []
    lost = 100 * (1 - new / old)
    text = " → ".join(figure_text(cell, "speedup", bounds=True, unit="×") for cell in (then, now))
    text += f", {number(lost, 1)} % lost" if lost > 0 else ""
    return [Verdict("speed", then.id, lost <= max_slowdown, text, lost)]
