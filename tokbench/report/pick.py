"""Pick the cell that best meets given limits, with the Python that applies it.

Limits and ranking use the unfavorable end of the 95 % interval, so that no cell wins by luck. With a limit on accuracy,
the fastest cell wins, or rather the most accurate of those whose speed cannot be told from the fastest one's, which is
the same in every run. With limits on cost only, the most accurate wins: by top-1, by agreement without labels, by
features without classes. The unreduced model takes part, with a drop of 0 and a speed-up of 1. Cells that failed or
gave NaN do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

from tokbench.catalogue import CONTROLS
from tokbench.errors import UserError
from tokbench.report.code import export_of, python_of
from tokbench.report.text import cell_name, figure_text, group_title, number, passed_over, told_caveats
from tokbench.results.cell import Cell, Figure
from tokbench.results.folder import RunFolder
from tokbench.results.metrics import METRICS
from tokbench.results.table import columns_of, comparable, group_by, load_cells

# Each limit's metric and wording.
LIMITS = {
    "max_drop": ("drop", "a drop of at most {} points of top-1"),
    "min_agreement": ("agreement", "at least {} % agreement with the unreduced model"),
    "min_speedup": ("speedup", "a speed-up of at least {}×"),
    "max_latency_ms": ("latency", "a median latency at batch 1 of at most {} ms"),
    "max_gflops": ("gflops", "at most {} GFLOPs an image"),
}
# Limits on accuracy, and measures of accuracy, the best first.
_ACCURACY = ("max_drop", "min_agreement")
_QUALITIES = ("drop", "agreement", "similarity", "output_correlation")
_SPEEDS = {"speedup", "latency"}


@dataclass(frozen=True)
class _Words:
    """Wording of a metric: what has to be measured for it, its values, and cells that are first or later by it."""

    measured: str
    unit: str
    known: str
    judged: str
    best: str = ""
    worse: str = ""
    surely: str = ""


_WORDS = {
    "drop": _Words("accuracy", " points", "drop {}", "a drop of {}", "the most accurate", "less accurate"),
    "agreement": _Words(
        "agreement", " %", "agreement {}", "{} agreement", "in most agreement with the unreduced model",
        "in less agreement",
    ),
    "similarity": _Words(
        "features", "", "cosine of features {}", "a cosine of {}", "the nearest to the unreduced model's features",
        "further away in features",
    ),
    "output_correlation": _Words(
        "outputs", "", "correlation of outputs {}", "a correlation of {}",
        "the nearest to the unreduced model's output", "further away in outputs",
    ),
    "speedup": _Words("speed", "×", "{} the speed", "{} the speed", "the fastest", "slower", "faster"),
    "latency": _Words("latency", " ms", "{} at batch 1", "a median latency of {}"),
    "gflops": _Words("FLOPs", " GFLOPs", "{}", "{}", "the one with the fewest FLOPs", "more FLOPs", "cheaper"),
}  # fmt: skip
# The unreduced model compared with itself.
_OF_ITSELF = {"drop": 0.0, "agreement": 100.0, "similarity": 1.0, "output_correlation": 1.0, "speedup": 1.0}
_FIELDS = (
    "cell", "method", "params", "schedule", "resolved", "top1", "drop", "drop_low", "drop_high", "agreement",
    "agreement_low", "agreement_high", "similarity", "similarity_low", "similarity_high", "speedup", "speedup_low",
    "speedup_high", "throughput", "latency_ms", "latency_low_ms", "latency_high_ms", "gflops",
)  # fmt: skip


@dataclass
class Pick:
    """The decision for one model under one set of conditions.

    Attributes:
        asked: the limits, in words.
        limits: the limits, by option.
        rule: why the best is the best.
        best: None if nothing meets the limits.
        other: the runner-up, or the nearest cell if nothing meets the limits; None if there is no other.
        other_meets: whether `other` meets the limits.
        why: why `other` lost, or what it misses; without `other`, why nothing could be judged.
        misses: by how much `other` misses which limits, in the limits' units.
        alike: other cells that meet the limits and whose speed cannot be told from the fastest one's or, without a
            best, from the unreduced model's.
        code: lines of Python that apply the best; "" if there is none.
        export: the command that exports the best, and lines that run what it wrote.
    """

    model: str
    title: str
    asked: str
    limits: dict[str, float]
    rule: str = ""
    best: Cell | None = None
    other: Cell | None = None
    other_meets: bool = False
    why: str = ""
    misses: dict[str, float] = field(default_factory=dict)
    alike: list[Cell] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    code: str = ""
    export: list[str] = field(default_factory=list)

    def text(self) -> str:
        """For people."""
        lines = [self.title, f"Asked for: {self.asked}."]
        if self.best is not None:
            lines += [f"Pick: {_told(self.best, self.limits)}.", f"It is {self.rule}."]
        else:
            lines.append("Nothing meets that." if self.other is not None or not self.why else f"No answer: {self.why}.")
        if self.other is not None:
            role = "Runner-up" if self.other_meets else "Nearest"
            lines.append(f"{role}: {_told(self.other, self.limits)}; {self.why}.")
        lines += [f"Note: {note}." for note in self.notes]
        return "\n".join([*lines, *(["", *self.export, "", self.code] if self.code else [])])

    def to_dict(self) -> dict[str, Any]:
        """For programs: plain JSON values. `nearest` is a cell that does not meet the limits."""
        return {
            "model": self.model, "title": self.title, "limits": self.limits, "met": self.best is not None,
            "rule": self.rule, "pick": _plain(self.best), "runner_up": _plain(self.other) if self.other_meets else None,
            "nearest": None if self.other_meets else _plain(self.other), "why": self.why, "misses": self.misses,
            "alike": [cell.id for cell in self.alike], "notes": self.notes, "code": self.code, "export": self.export,
        }  # fmt: skip


def pick_cells(run: str | Path, **limits: float | None) -> list[Pick]:
    """The best cell of each model of a run under the limits given (keys: `LIMITS`).

    A model that cannot be judged is skipped with the reason if another can be. Raises UserError for no limit, an
    impossible one, and one on something that the run has not measured.
    """
    asked = {name: value for name, value in limits.items() if value is not None}
    _require_limits(asked)
    folder = RunFolder.open(run)
    groups = comparable([_compared_with_itself(cell) for cell in load_cells([run])])
    if not groups:
        raise UserError(f"the run {folder.path} has measured nothing yet")
    said = " and ".join(LIMITS[name][1].format(_limit(value)) for name, value in asked.items())
    said = said.replace("at most 1 points", "at most 1 point")
    picks, refused = [], []
    for group in groups:
        found = Pick(group[0].model, group_title(group), said, asked)
        try:
            _decide(found, group, folder)
        except UserError as error:
            found.why = str(error)
            refused.append(error)
        picks.append(found)
    if len(refused) == len(picks):
        raise refused[0]
    return picks


def _require_limits(asked: Mapping[str, float]) -> None:
    if not asked:
        raise UserError(f"pick needs a limit: {', '.join(map(_option, LIMITS))}")
    for name, value in asked.items():
        if not math.isfinite(value) or value < 0 or (value == 0 and name != "max_drop"):
            least = "of 0 or more" if name == "max_drop" else "above 0"
            raise UserError(f"{_option(name)} must be a number {least}, not {value:g}")
        if name == "min_agreement" and value > 100:
            raise UserError(f"{_option(name)} is a percentage: at most 100, not {value:g}")


def _compared_with_itself(cell: Cell) -> Cell:
    """The unreduced model with the exact figures of a comparison with itself."""
    known = {name: Figure(value, value, value) for name, value in _OF_ITSELF.items() if cell[name]}
    return replace(cell, figures={**cell.figures, **known}) if cell.is_baseline else cell


def _ends(cell: Cell) -> dict[str, float]:
    """The values that count, by metric: the unfavorable end of the interval, or the value of metrics without intervals.

    A latency that lacks its interval counts as it is; other metrics that lack theirs do not count.
    """
    ends = {}
    for metric in _WORDS:
        figure, found = cell[metric], METRICS[metric]
        if figure and figure.interval:
            ends[metric] = figure.interval[1 if found.better == "lower" else 0]
        elif figure and (not found.interval or metric == "latency"):
            ends[metric] = figure.value
    return ends


def _unsound(cell: Cell) -> str:
    """Why a cell can never be picked; "" if it can."""
    if cell.method == "free":
        return "a speed limit, and no method"
    if cell.is_broken:
        return f"NaN or infinite for {cell.nonfinite:,} of {cell.images:,} images"
    return "" if cell.error is None else f"failed: {cell.error}"


def _decide(found: Pick, group: Sequence[Cell], folder: RunFolder) -> None:
    """Fill in a decision. Raises UserError where none can be made."""
    asked, reduced = found.limits, [cell for cell in group if not cell.is_baseline]
    if not reduced:
        raise UserError(f"the run {folder.path} holds only the unreduced {found.model}: nothing to pick from")
    sound = [cell for cell in reduced if not _unsound(cell)]
    if not sound:
        raise UserError(f"the run {folder.path} has no cell of {found.model} to pick: {_reasons(reduced, ())}")
    rank, quality = _ranking(sound, asked, f"the run {folder.path}")
    by = list(dict.fromkeys([rank, quality, "gflops"]))
    needed = dict.fromkeys([*(LIMITS[name][0] for name in asked), quality, rank])
    known = [cell for cell in group if not _unsound(cell) and _ends(cell).keys() >= needed.keys()]
    misses = {cell: _misses(cell, asked) for cell in known}
    met = [cell for cell in known if not misses[cell]]
    costs = _costs(met, by)
    by_speed = bool(_SPEEDS & needed.keys())
    floor = next((costs[cell] for cell in met if cell.is_baseline), [math.inf])

    def tier(cell: Cell) -> tuple[bool, int]:
        return costs[cell] >= floor, len(cell.doubts) if by_speed else 0

    met.sort(key=lambda cell: (tier(cell), costs[cell]))
    alike = [cell for cell in met if rank == "speedup" and _overlap(met[0], cell, rank)]
    met.sort(key=lambda cell: (tier(cell), cell not in alike, costs[cell][cell in alike :]))
    found.alike = [cell for cell in alike if cell is not met[0] and not cell.is_baseline]
    found.notes = _notes(group, known, needed, asked, rank)
    # Someone who gives up accuracy wants speed: the unreduced model is no answer.
    if met and met[0].is_baseline and set(asked) <= set(_ACCURACY):
        met = []
    if found.alike:
        of = "the fastest" if met else "the unreduced model"
        found.notes.append(f"the speed of {', '.join(map(_name, found.alike))} cannot be told from that of {of}")
    if met:
        found.code, notes = python_of(met[0], folder)
        found.export = export_of(met[0], folder)
        found.best, found.rule = met[0], "the only one that meets the limits with the unfavorable end of its interval"
        control = [f"{met[0].method} is a control, there to be beaten"] if met[0].method in CONTROLS else []
        found.notes += control + notes
        if by_speed:
            faster = [cell for cell in known if {LIMITS[name][0] for name in misses[cell]} <= _SPEEDS]
            others = [cell for cell in faster if not cell.is_baseline and cell not in found.alike]
            enough = None if rank == "speedup" else asked.get("min_speedup", 0)
            found.notes += [text for text in [passed_over(met[0], others, enough)] if text]
    if len(met) > 1:
        found.rule = (
            f"{_WORDS[rank].best} of {len(met)} that meet the limits with the unfavorable end of their intervals"
        )
        if met[0] in alike and found.alike:
            found.rule += f", or not to be told from it, and of those {_WORDS[quality].best}"
        found.other, found.other_meets, found.why = met[1], True, _why(met[0], met[1], by, costs)
        return
    fails = [cell for cell in known if not cell.is_baseline and cell not in met]
    if fails:
        found.other = _nearest(fails, misses, asked, by)
        found.misses = misses[found.other]
        found.why = " and ".join(_missed(found.other, name, asked[name], over) for name, over in found.misses.items())
        if not found.misses:
            found.why = f"it is within the limit, but not surely {_WORDS[rank].surely} than the unreduced model"


def _ranking(sound: Sequence[Cell], asked: Mapping[str, float], run: str) -> tuple[str, str]:
    """The metric that decides among cells that meet the limits, and the measure of accuracy.

    Raises UserError, with what can be asked instead, for a limit on something that no sound cell has.
    """
    there = {metric for cell in sound for metric in _ends(cell)}
    on_accuracy = [name for name in asked if name in _ACCURACY]
    quality = next((metric for metric in _QUALITIES if metric in there), "")
    if not quality:
        needs = f"{_option(on_accuracy[0])}: " if on_accuracy else ""
        raise UserError(f"{needs}{run} has not measured accuracy, which this needs")
    can = " or ".join(_option(name) for name, (metric, _) in LIMITS.items() if metric in there)
    hint = f"; ask for {can} instead" if can else ", nor anything else that can be limited"
    for name in asked:
        metric = LIMITS[name][0]
        if metric in there:
            continue
        why = f"has not measured {_WORDS[metric].measured}, which this needs"
        if any(cell[metric] for cell in sound):
            why = f"knows no interval of {_WORDS[metric].measured}, which this needs"
        elif name in on_accuracy and quality in ("similarity", "output_correlation"):
            why = f"compared {_WORDS[quality].measured} only, because the model has no classes"
        elif name == "max_drop":
            why = "had images without labels, so that no drop is known"
        raise UserError(f"{_option(name)}: {run} {why}{hint}")
    rank = next((metric for metric in ("speedup", "gflops") if metric in there), "") if on_accuracy else quality
    if not rank:
        raise UserError(f"{run} has measured neither speed nor FLOPs, so no cell is better than another")
    return rank, quality


def _costs(cells: Sequence[Cell], by: Sequence[str]) -> dict[Cell, list[float]]:
    """Sort keys of the cells, smallest first; unknown values come last.

    As the first key, costs without an interval are equal if they differ too little to matter.
    """
    signs = {metric: 1 if METRICS[metric].better == "lower" else -1 for metric in by}
    costs = {cell: [sign * _ends(cell).get(metric, math.inf) for metric, sign in signs.items()] for cell in cells}
    first = METRICS[by[0]]
    if first.tie and not first.interval:
        least = min((cost[0] for cost in costs.values()), default=0)
        for cost in costs.values():
            cost[0] = math.floor(math.log(cost[0] / least) / math.log1p(first.tie))
    return costs


def _misses(cell: Cell, asked: Mapping[str, float]) -> dict[str, float]:
    """By how much a cell misses which limits, in their units."""
    misses = {}
    for name, limit in asked.items():
        metric = LIMITS[name][0]
        over = (_ends(cell)[metric] - limit) * (1 if METRICS[metric].better == "lower" else -1)
        if over > 1e-9 * max(1e-3, abs(limit)):
            misses[name] = over
    return misses


def _nearest(
    cells: Sequence[Cell], misses: Mapping[Cell, Mapping[str, float]], asked: Mapping[str, float], by: Sequence[str]
) -> Cell:
    """The cell that misses the fewest limits, by the least (relative to them, or in points)."""
    costs = _costs(cells, by)

    def key(cell: Cell) -> tuple[int, float, list[float]]:
        shares = [over / (1 if name in _ACCURACY else asked[name]) for name, over in misses[cell].items()]
        return len(shares), max(shares, default=0), costs[cell]

    return min(cells, key=key)


def _missed(cell: Cell, name: str, limit: float, over: float) -> str:
    metric = LIMITS[name][0]
    more = "more" if METRICS[metric].better == "lower" else "less"
    return f"{_judged(cell, metric)}, {over:.3g} {more} than the limit of {_limit(limit)}"


def _why(best: Cell, other: Cell, by: Sequence[str], costs: Mapping[Cell, list[float]]) -> str:
    """Why the runner-up lost, and whether that is sure."""
    pairs = zip(by, costs[best], costs[other], strict=True)
    metric = next((metric for metric, first, second in pairs if first < second < math.inf), "")
    if not metric:
        return "equal in everything that counts, and measured later"
    text = f"{_WORDS[metric].worse}: {_judged(other, metric)}, against {_judged(best, metric)}"
    if metric != by[0]:
        alike = "not to be told apart" if _overlap(best, other, by[0]) else "equal"
        text = f"{alike} in {_WORDS[by[0]].measured}, but {text}"
    if len(other.doubts) > len(best.doubts):
        text = f"its speed is known less well: {other.doubts[-1]}"
    elif _overlap(best, other, metric):
        text += "; the intervals overlap, so that is not sure"
    return text


def _overlap(one: Cell, other: Cell, metric: str) -> bool:
    """Whether both have intervals, and these overlap."""
    intervals = [figure.interval for cell in (one, other) if (figure := cell[metric]) and figure.interval]
    return len(intervals) == 2 and max(low for low, _ in intervals) <= min(high for _, high in intervals)


def _judged(cell: Cell, metric: str) -> str:
    """A cell's value of a metric that counts, in words."""
    figure, end = cell[metric], _ends(cell)[metric]
    exact = figure is None or figure.interval is None or figure.low == figure.high
    text = f"{end:.4g}" if metric == "gflops" else number(end, METRICS[metric].digits)
    return _WORDS[metric].judged.format(f"{'' if exact else 'at worst '}{text}{_WORDS[metric].unit}")


def _notes(
    group: Sequence[Cell], known: Sequence[Cell], needed: Iterable[str], asked: Mapping[str, float], rank: str
) -> list[str]:
    notes = told_caveats(group)
    if rank == "gflops":
        notes.append("speed was not measured, and fewer FLOPs need not be faster")
    latencies = [(cell, cell["latency"]) for cell in known if "max_latency_ms" in asked]
    alone = [cell for cell, latency in latencies if latency and not latency.interval]
    if alone:
        of = "" if len(alone) == len(known) else f" of {', '.join(map(_name, alone))}"
        notes.append(f"the run has no interval of the latency{of}: that limit is held against the median itself")
    out = [cell for cell in group if cell not in known]
    if out:
        notes.append(f"left out: {_reasons(out, needed)}")
    images = max(cell.images or 0 for cell in group)
    # The end of the interval of a cell that answers just as the unreduced model does; see measure/stats.py.
    z = NormalDist().inv_cdf(0.975)
    least = 100 * z**2 / (images + z**2)
    same = f"on {images:,} images even a cell with the unreduced model's every answer"
    if asked.get("max_drop", least) < least:
        notes.append(f"{same} may lose {least:.2f} points: a lower limit needs more images")
    if asked.get("min_agreement", 0) > 100 - least:
        notes.append(f"{same} surely agrees on {100 - least:.2f} % only: a higher limit needs more images")
    return notes


def _reasons(out: Iterable[Cell], needed: Iterable[str]) -> str:
    """Why these cells were left out, grouped by reason: "ToMe at r=8 (failed: out of memory)"."""

    def reason(cell: Cell) -> str:
        missing = [metric for metric in needed if metric not in _ends(cell)]
        told = [f"no {_WORDS[metric].measured} {'interval' if cell[metric] else 'measured'}" for metric in missing]
        return _unsound(cell) or ", ".join(told)

    return "; ".join(f"{', '.join(map(_name, cells))} ({reason(cells[0])})" for cells in group_by(out, reason))


def _name(cell: Cell) -> str:
    return "the unreduced model" if cell.is_baseline else cell_name(cell)


def _told(cell: Cell, limits: Iterable[str]) -> str:
    """A cell with its best measure of accuracy and its values of the limited metrics."""
    shown = {"latency", "gflops"}
    if not cell.is_baseline:
        shown |= {"speedup", next(metric for metric in _QUALITIES if cell[metric])}
        shown |= {LIMITS[name][0] for name in limits}
    parts = ["as it is"] if cell.is_baseline else []
    for metric, words in _WORDS.items():
        figure = cell[metric]
        if metric in shown and figure:
            exact = f"{figure.value:.4g}{words.unit}"
            text = exact if metric == "gflops" else figure_text(cell, metric, bounds=True, unit=words.unit)
            parts.append(words.known.format(text))
    return f"{_name(cell)} ({', '.join(parts)})"


def _plain(cell: Cell | None) -> dict[str, Any] | None:
    if cell is None:
        return None
    row = columns_of(cell)
    return {name: row[name] for name in _FIELDS} | {"params": dict(sorted(cell.params.items()))}


def _limit(value: float) -> str:
    """A limit as it was given."""
    return f"{value:.10g}".replace("-", "−")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
