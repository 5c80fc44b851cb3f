"""Findings in sentences, none stronger than its interval allows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

from tokbench.catalogue import CONTROLS
from tokbench.report.text import (
    capital,
    cell_name,
    figure_text,
    group_title,
    hardware,
    interval,
    listed,
    number,
    passed_over,
    plural,
    side_of,
    told_caveats,
    variant_name,
)
from tokbench.results.cell import Cell, Figure
from tokbench.results.metrics import GAINS, METRICS
from tokbench.results.table import comparable, group_by, known_gain, least_doubted, pareto_front

_VAGUE = 5.0  # points of top-1: a drop that may be more than this is no answer
_MODEL = "the unreduced model"
_WITHOUT_TOP1 = {
    "agreement": "Without labels top-1 is unknown: said below is how often answers stay what they were, right or not.",
    "similarity": "The model has no classes, so there is no top-1: its features are compared instead.",
    "output_correlation": "The model has one output and no classes: said below is how far it moves.",
    "top1": "Accuracy was not measured: what the savings cost is unknown.",
}
_RUNS_DIFFER = 1.1  # factor by which a speed-up at batch 1 may differ between runs: docs/measuring.md


@dataclass
class Findings:
    """Findings on one model under one set of conditions.

    Attributes:
        answer: the cell to use without losing accuracy, in one sentence; "" if that is not known.
        sentences: all findings.
    """

    title: str
    answer: str = ""
    sentences: list[str] = field(default_factory=list)


def findings(cells: Sequence[Cell]) -> list[Findings]:
    """Sentences for each set of comparable cells, in the order they were measured."""
    groups = map(_Group, comparable(cells))
    return [Findings(group_title(group.cells), group.answer(), group.sentences()) for group in groups]


class _Group:
    """Comparable cells.

    Attributes:
        reduced: all but the unreduced model.
        sound: those of them with any figure that counts, and without NaN or infinite logits.
    """

    def __init__(self, cells: list[Cell]) -> None:
        self.cells = cells
        self.name = partial(cell_name, several_runs=len({cell.run for cell in cells}) > 1)
        self.reduced = [cell for cell in cells if not cell.is_baseline]
        told = [cell for cell in self.reduced if any(map(cell.__getitem__, (*GAINS, "gflops", "speedup")))]
        self.sound = [cell for cell in told if not cell.is_broken]

    def answer(self) -> str:
        """The fastest cell, or the one with the fewest FLOPs, among those with no significant loss of top-1."""
        known = [cell for cell in self.sound if side_of(cell["drop"]) is not None]
        if not known:
            return ""
        kept = [cell for cell in known if side_of(cell["drop"]) != 1]
        images, model = _images(known), known[0].model
        unseen = f"no loss of accuracy that {images} can show"
        if timed := any(side_of(cell["speedup"], 1) is not None for cell in known):
            metric, which, gain = "speedup", "fastest", f"makes {model} surely faster"
            better = [cell for cell in kept if side_of(cell["speedup"], 1) == 1]
        else:
            metric, which, gain = "flops_ratio", "cheapest", f"saves FLOPs of {model}"
            better = [cell for cell, ratio in _known(kept, "flops_ratio") if ratio.value < 1]
        if not better:
            return f"Nothing that was tried {gain} with {unseen}." if timed or _known(kept, metric) else ""
        best = self._fastest(better) if timed else _best(better, metric)
        name, ((_, most),) = self.name(best), _drop_ends([best])
        points = number(most, _digits(best))
        if most > _VAGUE:
            return (
                f"{images} cannot tell what is to be had without losing accuracy: {name}, the {which} cell with no "
                f"significant loss, may lose up to {points} points."
            )
        loss = f"with {unseen}: {_drop(best)}" + (f", so up to {points} may be lost" if most > 0 else "")
        if timed:
            return f"{capital(name)} {self._faster(best, better, loss)}{self._passed_over(best, kept)}"
        return f"{capital(name)} takes {_share(best)} of {model}, {loss}. Whether it is faster was not measured."

    def _faster(self, best: Cell, faster: list[Cell], loss: str) -> str:
        """What the best of the faster cells does and, if it is a control, the best of the others."""
        batches = f" in batches of {best.batch_size}" if (best.batch_size or 0) > 1 else ""
        told = f"makes {best.model} {_times_as_fast(best)}{_on(best)}{batches}, {loss}."
        if batches and (alone := _alone(best)):
            told += f" One image at a time it {alone}: {figure_text(best, 'latency_speedup', unit='×')}."
        if best.method not in CONTROLS:
            return told
        told += f" {capital(variant_name(best.method, best.method))} is a control, there to be beaten"
        published = [cell for cell in faster if cell.method not in CONTROLS]
        if not published:
            return f"{told}; no paper's method is surely faster without such a loss."
        other = self._fastest(published)
        return f"{told}; of the papers' methods it is {self.name(other)}, {_times_as_fast(other)}."

    def _fastest(self, cells: list[Cell]) -> Cell:
        """The fastest of the least doubted cells that are surely faster than the unreduced model, else of all."""
        return _best(least_doubted([cell for cell in cells if side_of(cell["speedup"], 1) == 1] or cells), "speedup")

    def _passed_over(self, best: Cell, cells: list[Cell]) -> str:
        told = passed_over(best, cells, name=self.name)
        return told and f" {capital(told)}."

    def sentences(self) -> list[str]:
        told = [self._unreduced()]
        if not self.reduced:
            return [*told, "Nothing but the unreduced model was measured, so there is nothing to compare."]
        told += [*self._missing(), *self._broken(), *(f"{capital(text)}." for text in told_caveats(self.cells))]
        shares = [100 * ratio.value for _, ratio in _known(self.sound, "flops_ratio")]
        if shares and not _known(self.sound, "top1") and not _known(self.sound, "speedup"):
            cells = f"The {plural(len(shares), 'reduced cell takes', 'reduced cells take')}"
            told.append(f"{cells} {_span(shares)} of its FLOPs.")
        if _known(self.sound, "drop"):
            told += self._accuracy()
        elif not _known(self.cells, "top1"):
            told += [text for name in [*GAINS][1:] for text in self._likeness(name)]
        told += [*self._speed(), *self._latency()]
        y = known_gain(self.sound)
        return [*told, *self._front("speedup", y), *self._front("gflops", y), *self._failures()]

    def _unreduced(self) -> str:
        told, base = [], [cell for cell in self.cells if cell.is_baseline]
        for cell in base:
            gflops = cell["gflops"]
            values = [
                figure_text(cell, "top1", unit=" % top-1"),
                f"{gflops.value:.3g} GFLOPs an image (multiply-adds)" if gflops else "",
                figure_text(cell, "throughput", unit=" images/s"),
            ]
            known, run = [value for value in values if value], f" in {cell.run}" if len(base) > 1 else ""
            has = known and f"Unreduced, the model has{run} {listed(known)}."
            told.append(has or "Of the unreduced model no figures are known.")
        return " ".join(told) or "The unreduced model was not measured, so no drop and no speed-up is known."

    def _missing(self) -> list[str]:
        told = [] if _known(self.cells, "top1") else [_WITHOUT_TOP1[known_gain(self.cells)]]
        if not _known(self.cells, "throughput"):
            told.append("Speed was not measured: fewer FLOPs need not mean more images per second.")
        return told

    def _broken(self) -> list[str]:
        broken = [cell for cell in self.cells if cell.is_broken]
        names = [f"{self.name(cell)} ({cell.nonfinite:,} of {_images([cell])})" for cell in broken]
        left_out = "NaN or infinite logits, so left out of fronts and of what is said of reduced cells"
        return [f"{left_out}: {listed(names)}."] if names else []

    def _accuracy(self) -> list[str]:
        """How many cells show no loss against the unreduced model, and the cheapest of them."""
        same, gained, lost = ([cell for cell in self.sound if side_of(cell["drop"]) == side] for side in (0, -1, 1))
        known = [*same, *gained, *lost]
        if not known:
            return []
        count = len(known)
        parts = [
            (same, "cannot be told from the unreduced model in top-1"),
            (gained, f"{plural(len(gained), 'is', 'are')} better"),
            (lost, f"{plural(len(lost), 'loses', 'lose')} top-1"),
        ]
        counts = [f"{'all' if len(some) == count else len(some)} {what}" for some, what in parts if some]
        if count == 1:
            told = f"The one reduced cell: it {counts[0].partition(' ')[2]}"
        elif len(same) == count:
            told = f"None of the {count} reduced cells can be told from the unreduced model in top-1"
        else:
            told = f"Of {count} reduced cells, {listed(counts)}"
        sentences = [f"{told} (95 % intervals, each cell for itself).", *self._best_kept([*same, *gained], lost)]
        reach = median(high - low for low, high in _drop_ends(known)) / 2
        if reach >= 0.5:
            sentences.append(
                f"With {_images(known)} a drop is known to about ±{reach:.1f} points; smaller ones cannot be seen."
            )
        return sentences

    def _best_kept(self, kept: list[Cell], lost: list[Cell]) -> list[str]:
        """The fastest or cheapest cell that shows no loss, else the smallest loss."""
        gains = (("speedup", "fastest", _speed), ("flops_ratio", "cheapest", _share))
        if not kept:
            best = _best(lost, "drop")
            gain = [phrase(best) for metric, _, phrase in gains if best[metric]][:1]
            return [f"The smallest loss is that of {self.name(best)}: {', with '.join([*gain, _cost(best)])}."]
        for metric, which, phrase in gains:
            if timed := [cell for cell, _ in _known(kept, metric)]:
                best = self._fastest(timed) if metric == "speedup" else _best(kept, metric)
                if metric == "speedup" and side_of(best["speedup"], 1) != 1 and len(kept) > 1:
                    which = "nearest to being faster"
                subject = f"The {which} of the {len(kept)} with no significant loss" if len(kept) > 1 else "That one"
                on = _on(best) if metric == "speedup" else ""
                return [f"{subject} is {self.name(best)}:{on} {phrase(best)}, {_drop(best)}."]
        return []

    def _likeness(self, name: str) -> list[str]:
        """How close cells without a top-1 are to the unreduced model, in answers or in features."""
        known = _known(self.sound, name)
        if not known:
            return []
        unit = METRICS[name].unit
        best = _best(self.sound, name)
        told = figure_text(best, name, bounds=True, unit=unit)
        kl = best["kl"] if name == "agreement" else None
        told += f", KL divergence {kl.value:.3g} nats" if kl else ""
        if len(known) == 1:
            return [f"The one reduced cell has its {GAINS[name]} at {told}."]
        worst, _ = min(known, key=lambda pair: pair[1].value)
        ends = dict.fromkeys(figure_text(cell, name) for cell in (worst, best))
        of = f"Of {len(known)} reduced cells the {GAINS[name]} is {' to '.join(ends)}{unit}"
        return [f"{of}; it is the highest with {self.name(best)}: {told}."]

    def _speed(self) -> list[str]:
        timed = [cell for cell, _ in _known(self.sound, "speedup")]
        methods, limits = ([cell for cell in timed if (cell.method == "free") == free] for free in (False, True))
        told = self._speed_of_methods(methods) if methods else []
        same_shapes = "the same shapes, nothing chosen or merged"
        return [*told, *(f"{self.name(cell)} runs at {_speed(cell)}: {same_shapes}." for cell in limits)]

    def _speed_of_methods(self, timed: list[Cell]) -> list[str]:
        best = self._fastest(timed)
        cost = _cost(best) and f", with {_cost(best)}"
        passed = self._passed_over(best, timed)
        told = [f"The fastest cell{_on(best)} is {self.name(best)}: {_speed(best)}{cost}.{passed}"]
        for side, beginning in ((-1, f"Slower than {_MODEL}"), (0, f"Not to be told from {_MODEL} in speed")):
            if some := [cell for cell in timed if side_of(cell["speedup"], 1) == side]:
                told.append(f"{beginning}: {self._named(some, 'speedup')}.")
        shares = [
            100 * speedup.value * ratio.value
            for cell, speedup in _known(timed, "speedup")
            if (ratio := cell["flops_ratio"]) and ratio.value < 0.95
        ]
        if shares:
            told.append(f"The speed-ups are {_span(shares)} of what the FLOPs saved would give if time followed FLOPs.")
        return told

    def _latency(self) -> list[str]:
        """Which cells are faster in batches but not at batch 1, by paired speed-ups."""
        timed = [
            cell
            for cell, _ in _known(self.sound, "latency_speedup")
            if cell.method != "free" and side_of(cell["speedup"], 1) == 1 and (cell.batch_size or 0) > 1
        ]
        told = []
        for alike in group_by(timed, _alone):
            verb, _, rest = _alone(alike[0]).replace(_MODEL, "it").partition(" ")
            if verb:
                names = self._named(alike, "latency_speedup")
                told.append(f"{len(alike)} {plural(len(alike), verb, 'are') if verb == 'is' else verb} {rest}: {names}")
        if not told:
            return []
        faster = f"faster than {_MODEL} at batch {max(cell.batch_size or 0 for cell in timed)}"
        if len(timed) == 1:
            return [f"One image at a time the one cell {faster} {told[0].partition(' ')[2]}."]
        return [f"One image at a time it is another story: of the {len(timed)} cells {faster}, {'; '.join(told)}."]

    def _front(self, x: str, y: str) -> list[str]:
        """Which methods are on the front of y against x, and which never are."""
        there = group_by((cell for cell in self.sound if cell[x] and cell[y]), lambda cell: cell.variant)
        if len({cells[0].method for cells in there}) < 2:
            return []
        front = pareto_front(self.cells, x, y)
        counts = {variant_name(cells[0].method, cells[0].variant): len(front.intersection(cells)) for cells in there}
        times = {1: "once", 2: "twice"}
        on = [f"{name} ({times.get(count, f'{count} times')})" for name, count in counts.items() if count]
        never = [name for name, count in counts.items() if not count]
        what = f"{GAINS[y]} against {'speed' if x == 'speedup' else 'FLOPs'}"
        if not on:
            return [f"No reduced cell is on the front of {what}."]
        rest = f"; {listed(never)} {plural(len(never), 'is', 'are')} never on it" if never else ""
        return [f"On the front of {what}, by the measured values: {listed(on)}{rest}."]

    def _failures(self) -> list[str]:
        reasons = [f"{self.name(cell)}: {cell.error}" for cell in self.reduced if cell.error is not None]
        return [f"{len(reasons)} {plural(len(reasons), 'cell')} failed ({listed(reasons)})."] if reasons else []

    def _named(self, cells: list[Cell], metric: str) -> str:
        """The first four cells by name, each with a figure, and how many more there are."""
        return listed((f"{self.name(cell)} ({figure_text(cell, metric, unit='×')})" for cell in cells), 4)


def _known(cells: Iterable[Cell], metric: str) -> list[tuple[Cell, Figure]]:
    return [(cell, figure) for cell in cells if (figure := cell[metric])]


def _best(cells: Iterable[Cell], metric: str) -> Cell:
    """The first of those that are best in the metric."""
    sign = 1 if METRICS[metric].better == "lower" else -1
    return min(_known(cells, metric), key=lambda pair: sign * pair[1].value)[0]


def _drop_ends(cells: Iterable[Cell]) -> list[tuple[float, float]]:
    return [drop.interval for _, drop in _known(cells, "drop") if drop.interval]


def _digits(cell: Cell) -> int:
    return METRICS["drop"].digits_for(cell.images)


def _cost(cell: Cell) -> str:
    """A cell's effect on top-1: a loss, a gain, or not significant.

    Without labels, how close it stays to the unreduced model; "" if nothing is known.
    """
    drop, side = cell["drop"], side_of(cell["drop"])
    if drop and drop.interval is None:
        return f"a drop of {figure_text(cell, 'drop', unit=' points')} (no interval)"
    if side == 0:
        return f"top-1 that cannot be told from the unreduced model's ({_drop(cell)})"
    if side == 1:
        return f"a loss of {figure_text(cell, 'drop', bounds=True, unit=' points of top-1')}"
    if drop and drop.interval:
        gain = Figure(-drop.value, -drop.interval[1], -drop.interval[0])
        return f"a gain of {number(gain.value, _digits(cell))} points of top-1 {interval(gain, _digits(cell))}"
    if cell["agreement"]:
        return f"the unreduced model's answer for {figure_text(cell, 'agreement')} % of the images"
    if cell["similarity"]:
        return f"a cosine of {figure_text(cell, 'similarity')} to its features"
    known = figure_text(cell, "output_correlation")
    return f"a correlation of {known} with its output" if known else ""


def _drop(cell: Cell) -> str:
    return f"drop {figure_text(cell, 'drop', bounds=True, unit=' points')}"


def _speed(cell: Cell) -> str:
    """A cell's speed-up with its interval: "1.46× [1.44, 1.48] the unreduced model's speed"."""
    return f"{figure_text(cell, 'speedup', bounds=True, unit='×')} the unreduced model's speed"


def _times_as_fast(cell: Cell) -> str:
    return figure_text(cell, "speedup", bounds=True, unit=" times as fast")


def _share(cell: Cell) -> str:
    return f"{100 * (cell.value('flops_ratio') or 0):.0f} % of the FLOPs"


def _alone(cell: Cell) -> str:
    """Whether a cell is slower at batch 1 than the unreduced model; "" if it is faster.

    The interval of a single process does not cover how much runs differ; one over several processes does.
    """
    alone = cell["latency_speedup"]
    differ = _RUNS_DIFFER if cell.processes == 1 else 1.0
    side = side_of(alone, 1 / differ, differ)
    if side == -1:
        return f"is slower than {_MODEL}"
    if side != 0 or alone is None or alone.interval is None:
        return ""
    low, high = alone.interval
    if low >= 1 / _RUNS_DIFFER and high <= _RUNS_DIFFER:
        return f"is within {100 * (_RUNS_DIFFER - 1):.0f} % of {_MODEL}, by which runs differ"
    return f"cannot be told from {_MODEL} in speed"


def _on(cell: Cell) -> str:
    if cell.device is None:
        return ""
    return " on this CPU" if cell.device == "cpu" else f" on {hardware(cell)}"


def _images(cells: Iterable[Cell]) -> str:
    count = max(cell.images or 0 for cell in cells)
    return f"{count:,} {plural(count, 'image')}"


def _span(shares: Sequence[float]) -> str:
    """`50 to 75 %`."""
    ends = dict.fromkeys(f"{share:.0f}" for share in (min(shares), max(shares)))
    return f"{' to '.join(ends)} %"
