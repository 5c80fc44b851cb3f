"""The table of cells for terminals, Markdown, LaTeX and programs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import rich
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokbench.errors import UserError, nearest, require_known
from tokbench.report.text import (
    capital,
    figure_text,
    for_markdown,
    for_sheet,
    interval,
    number,
    shared,
    short_schedule,
    side_of,
    told_caveats,
    variant_name,
)
from tokbench.results.cell import Cell, Figure, Setting
from tokbench.results.metrics import GAINS, METRICS, metric_of_column
from tokbench.results.table import (
    COUNTS,
    all_columns,
    columns_of,
    comparable,
    filter_cells,
    find_column,
    frame,
    known_gain,
    measured_names,
    pareto_front,
    run_names,
)

FORMATS = ("rich", "md", "csv", "tex", "json")

# The fronts that are marked: word in the table → x metric; y is top-1, or what stands in for it.
FRONTS = {"FLOPs": "gflops", "speed": "throughput"}
_GAINS = {
    "top1": GAINS["top1"],
    "agreement": f"{GAINS['agreement']}, as the images have no labels,",
    "similarity": f"{GAINS['similarity']}, as the model has no classes,",
    "output_correlation": f"{GAINS['output_correlation']}, as the model has but one,",
}
_ALL = 100_000  # characters: wide enough for every column
_TOKENS = 8  # the place of the tokens' column among the metrics
_SORT_ALSO = ("model", "method", "schedule", "batch_size", "tokens_final")  # attributes of a cell


class Fronts:
    """The fronts among all cells of a table, also those that filters hide."""

    names = (*(f"front_{x}" for x in FRONTS.values()), "front_by", "front")

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._members: dict[str, set[Cell]] = {x: set() for x in FRONTS.values()}
        self.gain: dict[Cell, str] = {}
        for group in comparable(cells):
            gain = known_gain(group)
            self.gain |= dict.fromkeys(group, gain)
            for x, members in self._members.items():
                # Between runs only speed-ups compare: throughputs follow the machine's pace.
                members |= pareto_front(group, "speedup" if x == "throughput" else x, gain)

    def word(self, cell: Cell) -> str:
        """Which fronts the cell is on."""
        words = [word for word, x in FRONTS.items() if cell in self._members[x]]
        return "both" if len(words) == len(FRONTS) else "".join(words)

    def columns(self, cell: Cell) -> dict[str, Any]:
        """The same for files."""
        on = {f"front_{x}": cell in own for x, own in self._members.items()}
        return {**on, "front_by": self.gain[cell], "front": self.word(cell)}


@dataclass(frozen=True, eq=False)
class _Column:
    head: str
    texts: list[str]  # of each cell
    left: bool = False
    # In a narrow terminal the highest rank is left out first, 0 never. Files get every column.
    rank: float = 0
    # Sort values, None where missing; without them the texts sort.
    values: list[float | None] | None = None
    falls: bool = False  # whether the best is the highest
    metric: str = ""

    @property
    def name(self) -> str:
        """The head where it stands alone."""
        return "Speed-up [95 %]" if self.head == "[95 %]" else self.head

    @cached_property
    def width(self) -> int:
        """In characters."""
        return max(map(len, (self.head, *self.texts)))


@dataclass(frozen=True)
class _Sheet:
    """The table for reading: its columns and their texts."""

    cells: Sequence[Cell]
    fronts: Fronts
    columns: Sequence[_Column]

    @classmethod
    def of(cls, cells: Sequence[Cell], fronts: Fronts) -> _Sheet:
        """All columns that are not empty, in order."""
        columns = [column for column in _columns(cells, fronts) if column.left or {*column.texts} - {"", "failed"}]
        return cls(cells, fronts, columns)

    @property
    def width(self) -> int:
        """In characters, with one between columns."""
        return sum(column.width + 1 for column in self.columns) - 1

    def fitting(self, width: int) -> _Sheet:
        """With the columns that fit, the lowest ranks first; always those of rank 0."""
        chosen = replace(self, columns=[])
        for column in sorted(self.columns, key=lambda column: column.rank):
            wider = replace(chosen, columns=[*chosen.columns, column])
            if not column.rank or wider.width <= width:
                chosen = wider
        return replace(self, columns=[column for column in self.columns if column in chosen.columns])

    def rows(self) -> Iterator[tuple[Cell, tuple[str, ...]]]:
        """Each cell with its texts."""
        return zip(self.cells, zip(*(column.texts for column in self.columns), strict=True), strict=True)

    def is_best(self, column: _Column, cell: Cell) -> bool:
        """Whether the column's metric puts the cell on a front."""
        return column.metric == self.fronts.gain[cell] and bool(self.fronts.word(cell))


def render_table(
    cells: Sequence[Cell],
    format: str = "rich",
    sort: str = "",
    pareto: bool = False,
    *,
    filters: Sequence[str] = (),
    columns: Sequence[str] | None = None,
    width: int | None = None,
) -> Any:
    """Cells as a table: a rich Table for "rich", else text.

    `rich`, `md` and `tex` are for reading: numbers are rounded, empty columns left out, members of a front marked, and
    drops that are not significant followed by `n.s.`. `csv` and `json` have every column, unrounded.

    Args:
        sort: a metric (best first), or model, method, schedule, batch_size, tokens_final; "" keeps the runs' order.
        pareto: only members of a front, and the unreduced models.
        filters: conditions as of `filter_cells`; fronts do not depend on them.
        columns: names of metrics, of columns of `load_table`, or "front": these only, in this order. LaTeX then has
            methods and schedules as the plots name them.
        width: characters to fill (default: the terminal's); the least important columns are left out if not all fit
            (`rich` only).

    Raises UserError for an unknown format, sort column, column or filter, for filters that no cell meets, and for a
    metric or front to filter, sort by or show that no cell has.
    """
    require_known(format, FORMATS, "table format")
    fronts, chosen = Fronts(cells), list(cells)
    if pareto:
        if cells and not any(map(fronts.word, cells)):
            raise UserError(
                "--pareto: there is no front, as no cell has both accuracy and FLOPs or speed; "
                f"measured: {measured_names(cells)}."
            )
        chosen = [cell for cell in cells if cell.is_baseline or fronts.word(cell)]
    before = chosen
    chosen = _sorted(filter_cells(chosen, filters), sort)
    if before and not chosen:
        raise UserError(f"no cell meets {' and '.join(filters)}; there are {_some_cells(before)}.")
    names = None if columns is None else list(dict.fromkeys(find_column(n, chosen, Fronts.names) for n in columns))
    kept = names or [name for name in (*all_columns(), *fronts.names) if name != "front"]
    if format == "csv":
        table = frame(chosen).assign(**{name: [fronts.columns(cell)[name] for cell in chosen] for name in fronts.names})
        table = table[kept]
        texts = [name for name in table.columns if table[name].dtype == object]
        table[texts] = table[texts].map(for_sheet)
        return table.to_csv(index=False, lineterminator="\n")
    if format == "json":
        rows = [columns_of(cell) | {"params": dict(cell.params)} | fronts.columns(cell) for cell in chosen]
        return json.dumps([{name: row[name] for name in kept} for row in rows], indent=2, ensure_ascii=False) + "\n"
    if names is None:
        sheet = _Sheet.of(chosen, fronts)
    else:
        printed = format == "tex"
        names = list(dict.fromkeys("method" if printed and name == "variant" else name for name in names))
        sheet = _Sheet(chosen, fronts, [_chosen_column(name, chosen, fronts, printed) for name in names])
    if format == "rich":
        fitting = sheet.fitting(width or rich.get_console().width)
        return _rich(fitting, [column.name for column in sheet.columns if column not in fitting.columns])
    return (_markdown if format == "md" else _latex)(sheet)


def readable(cells: Sequence[Cell]) -> dict[str, Any]:
    """The table for reading, in parts for a page: title, heads, rows of cells with sort values, notes.

    A cell's `value` is the number to sort by where its text does not sort, "" if it is missing. A head's `first` is the
    order that puts the best first.
    """
    sheet = _Sheet.of(cells, Fronts(cells))
    heads = [
        {"text": column.head, "left": column.left, "first": "descending" if column.falls else "ascending"}
        for column in sheet.columns
    ]
    rows = []
    for place, (cell, texts) in enumerate(sheet.rows()):
        told = [
            {"text": text, "left": column.left, "value": column.values and _sort_value(column.values[place])}
            for column, text in zip(sheet.columns, texts, strict=True)
        ]
        rows.append({"kind": _kind(cell, sheet.fronts), "cells": told})
    return {"title": _title(cells), "heads": heads, "rows": rows, "notes": _notes(sheet)}


def _kind(cell: Cell, fronts: Fronts) -> str:
    return "failed" if cell.error else "baseline" if cell.is_baseline else "front" if fronts.word(cell) else ""


def _sort_value(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def print_table(console: Console, cells: Sequence[Cell], *, every_column: bool = False, **asked: Any) -> None:
    """Print a table on a console: the columns that fit, or all. asked: of `render_table`.

    If not even the columns of rank 0 fit, lines are longer than the console: cut numbers would be wrong.
    """
    table = render_table(cells, width=_ALL if every_column else console.width, **asked)
    console.width = max(console.width, table.min_width or 0)
    console.print(table)


def _chosen_column(name: str, cells: Sequence[Cell], fronts: Fronts, printed: bool) -> _Column:
    """A column for reading that was asked for. printed: names as in plots."""
    if metric := metric_of_column(name):
        return replace(_figures(metric, cells)[0], rank=0)
    if printed and name == "method":
        return _Column("Method", [variant_name(cell.method, cell.variant) for cell in cells], left=True)
    if printed and name == "schedule":
        return _Column("Schedule", [short_schedule(cell.schedule) for cell in cells], left=True)
    if name in _READ:
        return _read(name, cells)
    row = fronts.columns if name in Fronts.names else columns_of
    interval_of = next((metric for metric in METRICS.values() if name in metric.columns), None)
    told: Callable[[Any], str] = str if interval_of is None else partial(number, digits=interval_of.digits)
    texts = ["" if (value := row(cell)[name]) is None else told(value) for cell in cells]
    return _Column(name.replace("_", " "), texts, left=name not in COUNTS and interval_of is None)


def _sorted(cells: list[Cell], sort: str) -> list[Cell]:
    if not sort:
        return cells
    sort = metric_of_column(sort) or sort
    if sort in _SORT_ALSO:
        return sorted(cells, key=lambda cell: (getattr(cell, sort) is not None, getattr(cell, sort)))
    if sort not in METRICS:
        options = [*METRICS, *_SORT_ALSO]
        raise UserError(f"cannot sort by {sort!r}; there are {', '.join(options)}.{nearest(sort, options)}")
    known = [cell for cell in cells if cell[sort]]
    if cells and not known:
        raise UserError(f"cannot sort by {sort}: no cell here has it; measured: {measured_names(cells)}.")
    sign = 1 if METRICS[sort].better == "lower" else -1
    known.sort(key=lambda cell: sign * (cell.value(sort) or 0.0))
    return known + [cell for cell in cells if not cell[sort]]


def _some_cells(cells: Sequence[Cell]) -> str:
    """Names that a filter could have used."""
    words = {name: sorted({getattr(cell, name) for cell in cells} - {""}) for name in ("method", "schedule")}
    return "; ".join(f"{name}s {', '.join(values)}" for name, values in words.items())


def _columns(cells: Sequence[Cell], fronts: Fronts) -> list[_Column]:
    """All columns for reading, in their order."""
    names = [name for name in ("run", "model") if len({getattr(cell, name) for cell in cells}) > 1]
    names += ["method", "schedule", *(name for name in Setting._fields if any(getattr(own.at, name) for own in cells))]
    placed = {metric.place: _figures(name, cells) for name, metric in METRICS.items() if metric.place is not None}
    placed[_TOKENS] = [replace(_read("tokens_final", cells), rank=4)]
    columns = [_read(name, cells) for name in names] + [column for place in sorted(placed) for column in placed[place]]
    return [*columns, _Column("Front", [*map(fronts.word, cells)], left=True, rank=0.4)]


def _figures(name: str, cells: Sequence[Cell]) -> list[_Column]:
    metric, falls = METRICS[name], METRICS[name].better == "higher"
    values, texts = [cell.value(name) for cell in cells], [_text(name, cell) for cell in cells]
    column = _Column(metric.short, texts, rank=metric.rank, values=values, falls=falls, metric=name)
    if name != "speedup":
        return [column]
    figures = [cell[name] or Figure(math.nan) for cell in cells]
    ends = [
        "" if cell.is_baseline else interval(figure, metric.digits) for cell, figure in zip(cells, figures, strict=True)
    ]
    return [column, _Column("[95 %]", ends, rank=8, values=[figure.low for figure in figures], falls=True)]


def _text(name: str, cell: Cell) -> str:
    """A figure as its column shows it, a loss with its interval."""
    is_loss = name in ("drop", "knn_drop")
    if is_loss and cell.is_baseline:
        return ""
    text = figure_text(cell, name, bounds=is_loss, unit="×" if name == "speedup" else "") or _failed(cell)
    return f"{text} n.s." if name == "drop" and side_of(cell["drop"]) == 0 else text


def _failed(cell: Cell) -> str:
    return "failed" if cell.error else ""


_Described = tuple[str, Callable[[Cell], str], Callable[[Cell], float | None] | None]
# Columns other than metrics: head, text, and the number to sort by; text is left-aligned.
_READ: dict[str, _Described] = {
    "run": ("Run", lambda cell: cell.run, None),
    "model": ("Model", lambda cell: cell.model, None),
    "method": ("Method", lambda cell: cell.variant, None),
    "schedule": ("Schedule", lambda cell: "" if cell.is_baseline else cell.schedule, None),
    "batch_size": ("Batch", lambda cell: f"{cell.batch_size or ''}", lambda cell: cell.batch_size),
    "runtime": ("Runtime", lambda cell: cell.at.runtime or "", None),
    "tokens_final": (
        "Tokens",
        lambda cell: f"{cell.tokens_final:,}" if cell.tokens else _failed(cell),
        lambda cell: cell.tokens_final,
    ),
}


def _read(name: str, cells: Sequence[Cell]) -> _Column:
    head, text, value = _READ[name]
    return _Column(head, [*map(text, cells)], left=value is None, values=value and [*map(value, cells)])


def _title(cells: Sequence[Cell]) -> str:
    """What all rows share: model, data, images, hardware."""
    parts = [
        shared(cells, "model", "model {}"),
        shared(cells, "data", "data {}"),
        shared(cells, "images", "{:,} images"),
        shared(cells, "machine") or shared(cells, "device"),
        shared(cells, "dtype"),
        shared(cells, "ran"),
        shared(cells, "batch_size", "batch {}"),
    ]
    return ", ".join(filter(None, parts))


def _notes(sheet: _Sheet) -> list[str]:
    """The notes that this table's columns need."""
    cells, shown = sheet.cells, {column.metric for column in sheet.columns}
    notes = []
    runs = {run: name for run, name in run_names(cells).items() if run != name}
    if len(runs) > 1:
        notes.append(f"Runs: {', '.join(f'{run} ({name})' for run, name in runs.items())}.")
    if "gflops" in shown:
        notes.append("FLOPs are multiply-adds, per image.")
    if "drop" in shown and any(cell["drop"] for cell in cells):
        notes.append(
            "Drop: points of top-1 lost against `none` (negative: gained), same images, with its 95 % interval."
        )
    if "drop" in shown and any(side_of(cell["drop"]) == 0 for cell in cells if not cell.is_baseline):
        notes.append("n.s.: cannot be told from no drop.")
    for gain in dict.fromkeys(sheet.fronts.gain[cell] for cell in cells if sheet.fronts.word(cell)):
        notes.append(
            f"Front: the best {_GAINS[gain]} for its FLOPs (or speed-up): no other cell is as good in both and better "
            "in one; costs within 1 % are equal."
        )
    told = [(metric.place or 0, metric.note) for name, metric in METRICS.items() if name in shown and metric.note]
    notes += [note for place, note in told if place < _TOKENS]
    if "Tokens" in {column.head for column in sheet.columns}:
        notes.append("Tokens: left after the last block, class token and the like included.")
    notes += [note for place, note in told if place > _TOKENS]
    notes += [f"{capital(sentence)}." for sentence in told_caveats(cells)]
    if any(cell.fused_attention == "off" for cell in cells):
        notes.append("Fused attention was off: speed-ups are over a model that is slower than timm's own.")
    if any(cell.weights == "random" for cell in cells):
        notes.append("Random weights: FLOPs and speed only, nothing here is a trained model.")
    if "method_share" in shown and any((cell.value("method_share") or 0) > 0 for cell in cells):
        notes.append("Overhead: what the method itself computes, as a share of the cell's FLOPs.")
    several = [name for name in ("run", "model") if len({getattr(cell, name) for cell in cells}) > 1]
    notes += [
        f"{_cell_words(cell, several)}: NaN or infinite logits for {cell.nonfinite:,} images, which count as wrong; "
        "on no front."
        for cell in cells
        if cell.is_broken
    ]
    return notes + [f"{_cell_words(cell, several)} failed: {cell.error}" for cell in cells if cell.error]


def _cell_words(cell: Cell, several: Sequence[str]) -> str:
    """A cell as the command line writes it, with its run and model if there are several."""
    return " ".join(filter(None, (*(getattr(cell, name) for name in several), cell.variant, cell.schedule)))


def _rich(sheet: _Sheet, left_out: list[str]) -> Table:
    title, caption = _title(sheet.cells), "\n".join(_notes(sheet))
    if left_out:
        caption += f"\nToo narrow for: {', '.join(left_out)}."
    table = Table(
        title=Text(title) if title else None, title_justify="left", title_style="bold",
        caption=Text(caption.strip(), style="dim") if caption else None, caption_justify="left",
        box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", min_width=sheet.width,
    )  # fmt: skip
    for column in sheet.columns:
        # Folded numbers cannot be read; long method parameters and `list:` schedules may fold.
        table.add_column(
            Text(column.head),
            justify="left" if column.left else "right",
            overflow="fold",
            no_wrap=not column.left or column.width <= 16,
        )
    styles = {"failed": "red", "front": "green"}
    for cell, texts in sheet.rows():
        style = "bold" if cell.is_baseline else styles.get(_kind(cell, sheet.fronts))
        table.add_row(*map(Text, texts), style=style)
    return table


def _markdown(sheet: _Sheet) -> str:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"

    title = for_markdown(_title(sheet.cells))
    notes = [re.sub(r"\\`(none|free)\\`", r"`\1`", for_markdown(note)) for note in _notes(sheet)]
    lines = [f"**{title}**", ""] if title else []
    lines.append(line([column.head for column in sheet.columns]))
    lines.append("|" + "|".join(":---" if column.left else "---:" for column in sheet.columns) + "|")
    for cell, texts in sheet.rows():
        told = [for_markdown(text) if own.left else text for own, text in zip(sheet.columns, texts, strict=True)]
        best = [sheet.is_best(own, cell) for own in sheet.columns]
        lines.append(line([f"**{text}**" if marked else text for text, marked in zip(told, best, strict=True)]))
    # Two spaces end a line without a paragraph.
    return "\n".join(lines) + "\n" + ("\n" + "  \n".join(notes) + "\n" if notes else "")


def _latex(sheet: _Sheet) -> str:
    import pandas as pd

    table = pd.DataFrame([texts for _, texts in sheet.rows()], columns=[column.head for column in sheet.columns])
    bold = [
        ["textbf:--rwrap;" if sheet.is_best(column, cell) else "" for column in sheet.columns] for cell in sheet.cells
    ]
    styled = table.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1)
    styled = styled.apply(lambda own: pd.DataFrame(bold, own.index, own.columns), axis=None)
    aligned = "".join("l" if column.left else "r" for column in sheet.columns)
    # Characters that LaTeX lacks.
    text = styled.to_latex(hrules=True, column_format=aligned).replace("−", "$-$").replace("×", r"$\times$")
    notes = [f"{_title(sheet.cells)}. Needs \\usepackage{{booktabs}}.", *_notes(sheet)]
    return "".join(f"% {note}\n" for note in notes[:1]) + text + "".join(f"% {note}\n" for note in notes[1:])
