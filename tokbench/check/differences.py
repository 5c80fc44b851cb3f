"""How the cells of runs differ, one by one, also between dtypes, checkpoints and machines."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import exp, hypot, log
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from tokbench.check.runs import Measured, Run, matched
from tokbench.config import MethodSpec
from tokbench.errors import UserError, nearest, printable, require_known
from tokbench.measure.stats import paired_drop, wilson
from tokbench.report.text import for_markdown, for_sheet, interval, number
from tokbench.results.cell import Cell, CellKey, Figure
from tokbench.results.metrics import METRICS
from tokbench.results.predictions import Predictions
from tokbench.results.records import AccuracyRecord

FORMATS = ("rich", "md", "csv", "json")
RATIOS = ("gflops", "throughput", "latency")
# By figure: its head in a table for reading, and digits.
_HEADS = {"top1_difference": ("Top-1 (points)", 2), "agreement": ("Same answer %", 1)} | {
    f"{name}_ratio": (f"{METRICS[name].short}, ×", 2) for name in RATIOS
}
_WORDS = ("Cell", "Against", "Images")
_NOTES = (
    "Top-1: the cell's minus the other's, [95 % interval]. On the same images it is paired, on other images not.",
    "×: the cell's over the other's. Two runs may differ in pace by more than these intervals say.",
)


@dataclass(frozen=True)
class Difference:
    """A cell and what it is compared with, as `run: cell`.

    Attributes:
        images: "same" or "other"; "" where either has no accuracy.
        figures: with 95 % intervals where known. `top1_difference` in points, `agreement` in percent of the same
            images, `gflops_ratio` and so on: the cell's value over the other's.
    """

    cell: str
    against: str
    images: str
    figures: dict[str, Figure]


def compare(runs: Sequence[str | Path], baseline: str | None = None) -> list[Difference]:
    """How each cell of the later runs differs from the same cell of the first run.

    baseline: `RUN:CELL`, such as `results/a:none` or `a:tome/13`: what every cell is compared with instead.
    Raises UserError for what cannot be read, and where there is nothing to compare.
    """
    opened = [Run(path) for path in dict.fromkeys(map(Path, runs))]
    if baseline is None:
        first, *others = opened
        if not others:
            raise UserError("one run has nothing to be compared with: name two, or a cell with --baseline RUN:CELL")
        return [
            _difference(first, old, other, new) for other in others for old, new in matched(first, other) if new
        ]  # fmt: skip
    home, bases = _find(opened, baseline)
    any_base = next(iter(bases.values()))
    others_of = [(run, own) for run in opened for own in run.cells if own not in bases.values()]
    return [_difference(home, bases.get(own.cell.model, any_base), run, own) for run, own in others_of]


def _find(runs: Sequence[Run], baseline: str) -> tuple[Run, dict[str, Measured]]:
    """The run that a baseline names, and its cells of that name by model."""
    named = [(run, name) for run in runs for name in (str(run.path), run.path.name) if baseline.startswith(f"{name}:")]
    if not named:
        first, names = runs[0].path.name, ", ".join(run.path.name for run in runs)
        raise UserError(f"--baseline {baseline!r}: write RUN:CELL, such as {first}:none; the runs are {names}")
    run, name = named[0]
    asked = baseline.removeprefix(f"{name}:")
    variant, _, schedule = asked.partition("/")
    spec = MethodSpec.from_text(variant)
    wanted = CellKey.of("", spec.name, spec.params, schedule)
    found = {own.cell.model: own for own in run.cells if replace(own.cell.key, model="") == wanted}
    if not found:
        cells = list(dict.fromkeys("/".join(filter(None, (own.cell.variant, own.cell.schedule))) for own in run.cells))
        hint = nearest(asked, cells) or f" There are {', '.join(cells[:8])}{', …' if len(cells) > 8 else ''}."
        raise UserError(f"--baseline: {run.path} has no cell {asked!r}.{hint}")
    return run, found


def _difference(before: Run, old: Measured, after: Run, new: Measured) -> Difference:
    found: dict[str, Figure | None] = {}
    images = ""
    if old.accuracy and new.accuracy:
        pair = _same_images(before, old.accuracy, after, new.accuracy)
        images = "same" if pair else "other"
        found = _paired(*pair) if pair else {"top1_difference": _minus(_top1(new.cell), _top1(old.cell))}
    for name in RATIOS:
        logs = _minus(*(_map(log, own.cell[name]) for own in (new, old)))
        found[f"{name}_ratio"] = _map(exp, logs)
    figures = {name: figure for name, figure in found.items() if figure is not None}
    name, other = (f"{printable(run.path.name)}: {own.cell.id}" for run, own in ((after, new), (before, old)))
    return Difference(name, other, images, figures)


def _same_images(
    before: Run, old: AccuracyRecord, after: Run, new: AccuracyRecord
) -> tuple[Predictions, Predictions] | None:
    """The answers of both, None unless they are to the same images with the same labels."""
    if old.data_fingerprint is None or old.data_fingerprint != new.data_fingerprint:
        return None
    (seen, then), (seen_now, now) = before.answers(old), after.answers(new)
    return (then, now) if np.array_equal(seen, seen_now) and np.array_equal(then.label, now.label) else None


def _paired(then: Predictions, now: Predictions) -> dict[str, Figure | None]:
    if not (then.classifies and now.classifies):
        return {}
    same, images = int(((then.predicted == now.predicted) & (now.predicted >= 0)).sum()), len(now.label)
    agreement = Figure(same / images, *wilson(same, images))
    found = {"agreement": _map(lambda share: 100 * share, agreement)}
    if then.labeled:
        found["top1_difference"] = Figure(*paired_drop(now.correct, then.correct))
    return found


def _top1(cell: Cell) -> Figure | None:
    """In percent, with the interval of this cell alone."""
    value = cell.value("top1")
    return None if value is None else Figure(value, cell.also.get("top1_low"), cell.also.get("top1_high"))


def _minus(new: Figure | None, old: Figure | None) -> Figure | None:
    """The difference of independent figures, its interval from both of theirs.

    Newcombe's method 10 (Statistics in Medicine 17, 1998, page 873).
    """
    if new is None or old is None:
        return None
    difference = new.value - old.value
    if not (new.interval and old.interval):
        return Figure(difference)
    (new_low, new_high), (old_low, old_high) = new.interval, old.interval
    below, above = hypot(new.value - new_low, old_high - old.value), hypot(new_high - new.value, old.value - old_low)
    return Figure(difference, difference - below, difference + above)


def _map(change: Callable[[float], float], figure: Figure | None) -> Figure | None:
    """An increasing function of a figure and both ends of its interval."""
    return figure and Figure(change(figure.value), *map(change, figure.interval or ()))


def render(found: Sequence[Difference], format: str) -> str:
    """Differences as Markdown, CSV or JSON. Raises UserError for another format."""
    if format == "md":
        head, *rows = [[for_markdown(text) for text in row] for row in _texts(found)]
        lines = [head, ["---"] * len(head), *rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n" + "\n".join(_NOTES) + "\n"
    if format == "json":
        return json.dumps([asdict(one) for one in found], indent=2, ensure_ascii=False) + "\n"
    require_known(format, FORMATS, "format")
    import pandas as pd

    ends = ("value", "low", "high")
    written = [
        {"cell": for_sheet(one.cell), "against": for_sheet(one.against), "images": one.images}
        | {f"{name}_{end}": getattr(one.figures.get(name), end, None) for name in _HEADS for end in ends}
        for one in found
    ]
    return pd.DataFrame(written).to_csv(index=False, lineterminator="\n")


def as_table(found: Sequence[Difference]) -> Table:
    """Differences for a terminal."""
    head, *rows = _texts(found)
    table = Table(caption="\n".join(_NOTES), caption_justify="left")
    for name in head:
        table.add_column(Text(name), justify="left" if name in _WORDS else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _texts(found: Sequence[Difference]) -> list[list[str]]:
    """Heads and rows, without columns that nobody has."""
    shown = {name: head for name, head in _HEADS.items() if any(name in one.figures for one in found)}
    rows = [[*_WORDS, *(head for head, _ in shown.values())]]
    for one in found:
        row = [one.cell, one.against, one.images]
        for name, (_, digits) in shown.items():
            figure = one.figures.get(name)
            row.append(f"{number(figure.value, digits)} {interval(figure, digits)}".rstrip() if figure else "")
        rows.append(row)
    return rows
