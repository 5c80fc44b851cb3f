"""The table of cells for terminals, Markdown, LaTeX and programs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import rich
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokbench.errors import UserError, nearest
from tokbench.report.text import (
    capital,
    figure_text,
    for_markdown,
    for_sheet,
    interval,
    not_significant,
    number,
    short_schedule,
    told_caveats,
    variant_name,
)
from tokbench.results.cell import Cell, Setting
from tokbench.results.metrics import GAINS, METRICS, metric_name, metric_of_column
from tokbench.results.table import (
    COUNTS,
    all_columns,
    columns_of,
    comparable,
    filter_cells,
    frame,
    known_gain,
    measured_names,
    pareto_front,
    run_names,
)

Format = Literal["rich", "md", "csv", "tex", "json"]
FORMATS: tuple[str, ...] = get_args(Format)

# The fronts that are marked: word in the table → x metric; y is top-1, or what stands in for it.
FRONTS = {"FLOPs": "gflops", "speed": "throughput"}
_GAINS = {
    "top1": GAINS["top1"],
    "agreement": f"{GAINS['agreement']}, as the images have no labels,",
    "similarity": f"{GAINS['similarity']}, as the model has no classes,",
    "output_correlation": f"{GAINS['output_correlation']}, as the model has but one,",
}
_ALL = 100_000  # characters: wide enough for every column
_TOKENS = 8  # the place of the tokens' column among those of the metrics
_SORT_ALSO: dict[str, Callable[[Cell], Any]] = {
    "model": lambda cell: cell.model,
    "method": lambda cell: cell.method,
    "schedule": lambda cell: cell.schedule,
    "batch_size": lambda cell: cell.batch_size or 0,
    "tokens_final": lambda cell: cell.tokens[-1:],
}


class Fronts:
    """Who is on which front, among all cells of a table whatever is shown of them."""

    names = (*(f"front_{x}" for x in FRONTS.values()), "front_by", "front")

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._members: dict[str, set[Cell]] = {x: set() for x in FRONTS.values()}
        self.gain: dict[Cell, str] = {}
        for group in comparable(cells):
            gain = known_gain(group)
            self.gain |= dict.fromkeys(group, gain)
            for x, members in self._members.items():
                # Of several runs the speed-ups compare, and not the throughputs, which follow the machine's pace.
                members |= pareto_front(group, "speedup" if x == "throughput" else x, gain)

    def word(self, cell: Cell) -> str:
        """Which fronts the cell is on."""
        words = [word for word, x in FRONTS.items() if cell in self._members[x]]
        return "both" if len(words) == len(FRONTS) else "".join(words)

    def columns(self, cell: Cell) -> dict[str, Any]:
        """The same for files."""
        on = {f"front_{x}": cell in own for x, own in self._members.items()}
        return {**on, "front_by": self.gain[cell], "front": self.word(cell)}


@dataclass(frozen=True)
class _Column:
    head: str
    text: Callable[[Cell], str]
    left: bool = False
    # Where a terminal is too narrow for all, the highest rank goes first; 0 never goes. Files get every column.
    rank: float = 0
    # What sorts its cells, None where it is missing; without it the text does.
    value: Callable[[Cell], float | None] | None = None
    falls: bool = False  # whether the best is the highest
    metric: str = ""

    @property
    def name(self) -> str:
        """The head, where no neighbor explains it."""
        return "Speed-up [95 %]" if self.head == "[95 %]" else self.head


@dataclass(frozen=True, eq=False)
class _Sheet:
    """The table for reading: its columns, and what stands in them."""

    cells: Sequence[Cell]
    fronts: Fronts
    columns: Sequence[_Column]
    made: dict[_Column, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, cells: Sequence[Cell], fronts: Fronts) -> _Sheet:
        """All columns that say something, in their order."""
        sheet = cls(cells, fronts, _columns(cells, fronts))
        return sheet.narrowed(
            [
                column
                for column, texts in zip(sheet.columns, sheet.texts, strict=True)
                if column.left or not {*texts} <= {"", "failed"}
            ]
        )

    def narrowed(self, columns: Sequence[_Column]) -> _Sheet:
        """With these columns only."""
        return _Sheet(self.cells, self.fronts, columns, self.made)

    @property
    def texts(self) -> list[list[str]]:
        """By column. Made once, also for sheets with fewer columns."""
        self.made.update({own: [*map(own.text, self.cells)] for own in self.columns if own not in self.made})
        return [self.made[column] for column in self.columns]

    @cached_property
    def widths(self) -> list[int]:
        """Characters that each column takes."""
        return [max(map(len, (column.head, *texts))) for column, texts in zip(self.columns, self.texts, strict=True)]

    @property
    def width(self) -> int:
        return sum(self.widths) + len(self.widths) - 1

    def fitting(self, width: int) -> _Sheet:
        """With the columns that there is room for, the lowest ranks first; those of rank 0 in any case."""
        needed = dict(zip(self.columns, self.widths, strict=True))
        chosen: list[_Column] = []
        for column in sorted(self.columns, key=lambda column: column.rank):
            if not column.rank or sum(needed[own] + 1 for own in (*chosen, column)) - 1 <= width:
                chosen.append(column)
        return self.narrowed([column for column in self.columns if column in chosen])

    def rows(self) -> list[tuple[Cell, tuple[str, ...]]]:
        return list(zip(self.cells, zip(*self.texts, strict=True), strict=True))

    def is_best(self, column: _Column, cell: Cell) -> bool:
        """Whether this is what puts the cell on a front."""
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

    `rich`, `md` and `tex` are for reading: rounded, columns nobody measured left out, the best for their cost (members
    of a Pareto front) marked, drops that cannot be told from none followed by `n.s.`. `csv` and `json` carry every
    column unrounded.

    Args:
        sort: a metric (best first), or model, method, schedule, batch_size, tokens_final; "" keeps the runs' order.
        pareto: only members of a front, and the unreduced models.
        filters: conditions as of `filter_cells`; who is on a front does not depend on them.
        columns: names of metrics, of columns of `load_table`, or "front": these only, in this order. LaTeX then has
            methods and schedules as the plots name them.
        width: characters to fill, the terminal's when None; the least important columns go where all do not
            fit (`rich` only).

    Raises UserError for an unknown format, sort column, column or filter, for filters that no cell meets, and for a
    metric or a front that cells were to be chosen or sorted by, or that was to be shown, and that none has.
    """
    if format not in FORMATS:
        raise UserError(f"no table format {format!r}; there are {', '.join(FORMATS)}.{nearest(format, FORMATS)}")
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
    names = None if columns is None else [_known_column(name, chosen) for name in columns]
    match format:
        case "csv":
            more = {name: [fronts.columns(cell)[name] for cell in chosen] for name in fronts.names}
            table = frame(chosen).assign(**more)
            table = table.drop(columns="front") if names is None else table[names]
            texts = [name for name in table.columns if table[name].dtype == object]
            table[texts] = table[texts].map(for_sheet)
            return table.to_csv(index=False, lineterminator="\n")
        case "json":
            rows = [columns_of(cell) | {"params": dict(cell.params)} | fronts.columns(cell) for cell in chosen]
            kept = [name for name in rows[0] if name != "front"] if names is None and rows else names or ()
            rows = [{name: row[name] for name in kept} for row in rows]
            return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    if names is None:
        sheet = _Sheet.of(chosen, fronts)
    else:
        sheet = _Sheet(chosen, fronts, [_chosen_column(name, fronts, printed=format == "tex") for name in names])
    if format == "rich":
        fitting = sheet.fitting(width or rich.get_console().width)
        return _rich(fitting, [column.name for column in sheet.columns if column not in fitting.columns])
    return (_markdown if format == "md" else _latex)(sheet)


def readable(cells: Sequence[Cell]) -> dict[str, Any]:
    """The table for reading, in parts for a page: title, heads, rows of cells with sort values, notes.

    A cell's `value` sorts it where its text does not: the number behind it, "" where it is missing. A head's `first` is
    the order that puts the best first.
    """
    sheet = _Sheet.of(cells, Fronts(cells))
    return {
        "title": _title(cells),
        "heads": [
            {"text": column.head, "left": column.left, "first": "descending" if column.falls else "ascending"}
            for column in sheet.columns
        ],
        "rows": [
            {
                "kind": _kind(cell, sheet.fronts),
                "cells": [
                    {"text": text, "left": column.left, "value": _sort_value(column, cell)}
                    for column, text in zip(sheet.columns, texts, strict=True)
                ],
            }
            for cell, texts in sheet.rows()
        ],
        "notes": _notes(sheet),
    }


def _kind(cell: Cell, fronts: Fronts) -> str:
    return "failed" if cell.error else "baseline" if cell.is_baseline else "front" if fronts.word(cell) else ""


def _sort_value(column: _Column, cell: Cell) -> str | None:
    if column.value is None:
        return None
    value = column.value(cell)
    return "" if value is None else f"{value:.6g}"


def print_table(
    console: Console,
    cells: Sequence[Cell],
    sort: str = "",
    pareto: bool = False,
    *,
    filters: Sequence[str] = (),
    columns: Sequence[str] | None = None,
    every_column: bool = False,
) -> None:
    """Print a table of `render_table` on a console: the columns that fit, or every one.

    Where not even those fit that are always there, lines are longer than the console is wide: a number without its
    last digits would be another one.
    """
    width = _ALL if every_column else console.width
    table = render_table(cells, "rich", sort, pareto, filters=filters, columns=columns, width=width)
    console.width = max(console.width, table.min_width or 0)
    console.print(table)


def _known_column(name: str, cells: Sequence[Cell]) -> str:
    """The column that a name stands for: a metric's, or that of the name itself."""
    column = METRICS[name].columns[0] if name in METRICS else name
    options = dict.fromkeys([*METRICS, *all_columns(), *Fronts.names])
    if column not in options:
        raise UserError(f"no column {name!r}.{nearest(name, options) or ' Try method, schedule, tokens_final, top1.'}")
    metric = metric_of_column(column)
    if metric and cells and not any(cell[metric] for cell in cells):
        raise UserError(f"no cell here has {name}; measured: {measured_names(cells)}.")
    return column


def _chosen_column(name: str, fronts: Fronts, printed: bool) -> _Column:
    """A column for reading that was asked for. printed: names as in plots."""
    if metric := metric_of_column(name):
        return replace(_figures(metric)[0], rank=0)
    if printed and name in ("method", "variant"):
        return _Column("Method", lambda cell: variant_name(cell.method, cell.variant), left=True)
    if printed and name == "schedule":
        return _Column("Schedule", lambda cell: short_schedule(cell.schedule), left=True)
    if name in _READ:
        return _READ[name]
    row = fronts.columns if name in Fronts.names else columns_of
    interval_of = next((metric for metric in METRICS.values() if name in metric.columns), None)
    digits = None if interval_of is None else interval_of.digits

    def text(cell: Cell) -> str:
        value = row(cell)[name]
        if value is None:
            return ""
        return str(value) if digits is None else number(value, digits)

    return _Column(name.replace("_", " "), text, left=name not in COUNTS and interval_of is None)


def _sorted(cells: list[Cell], sort: str) -> list[Cell]:
    if not sort:
        return cells
    sort = metric_name(sort)
    if sort in _SORT_ALSO:
        return sorted(cells, key=_SORT_ALSO[sort])
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
    """What a filter could have named."""
    words = {name: sorted({getattr(cell, name) for cell in cells} - {""}) for name in ("method", "schedule")}
    return "; ".join(f"{name}s {', '.join(values)}" for name, values in words.items())


def _columns(cells: Sequence[Cell], fronts: Fronts) -> list[_Column]:
    """All columns for reading, in their order."""
    columns = [_READ[name] for name in ("run", "model") if len({getattr(cell, name) for cell in cells}) > 1]
    columns += [_READ["method"], _READ["schedule"]]
    columns += [_READ[name] for name in Setting._fields if any(getattr(cell.at, name) for cell in cells)]
    placed = {metric.place: _figures(name) for name, metric in METRICS.items() if metric.place is not None}
    placed[_TOKENS] = [replace(_READ["tokens_final"], rank=4)]
    columns += [column for place in sorted(placed) for column in placed[place]]
    return [*columns, _Column("Front", fronts.word, left=True, rank=0.4)]


def _figures(name: str) -> list[_Column]:
    """The columns of a metric."""
    metric = METRICS[name]
    head, text = metric.short, lambda cell: figure_text(cell, name) or _failed(cell)
    if name == "drop":
        head, text = "Drop [95 %]", _drop
    elif name == "knn_drop":
        head, text = "k-NN drop [95 %]", lambda cell: "" if cell.is_baseline else figure_text(cell, name, bounds=True)
    elif name == "speedup":
        head, text = metric.short, lambda cell: figure_text(cell, name, unit="×") or _failed(cell)
    falls = metric.better == "higher"
    column = _Column(head, text, rank=metric.rank, value=lambda cell: cell.value(name), falls=falls, metric=name)
    if name != "speedup":
        return [column]
    return [column, _Column("[95 %]", _speedup_interval, rank=8, value=_slowest, falls=True)]


def _failed(cell: Cell) -> str:
    return "failed" if cell.error else ""


def _tokens(cell: Cell) -> str:
    return f"{cell.tokens_final:,}" if cell.tokens else _failed(cell)


_READ = {
    "run": _Column("Run", lambda cell: cell.run, left=True),
    "model": _Column("Model", lambda cell: cell.model, left=True),
    "method": _Column("Method", lambda cell: cell.variant, left=True),
    "schedule": _Column("Schedule", lambda cell: "" if cell.is_baseline else cell.schedule, left=True),
    "batch_size": _Column("Batch", lambda cell: f"{cell.batch_size or ''}", value=lambda cell: cell.batch_size),
    "runtime": _Column("Runtime", lambda cell: cell.at.runtime or "", left=True),
    "tokens_final": _Column("Tokens", _tokens, value=lambda cell: cell.tokens_final),
}


def _drop(cell: Cell) -> str:
    if cell.is_baseline:
        return ""
    text = figure_text(cell, "drop", bounds=True) or _failed(cell)
    return f"{text} n.s." if not_significant(cell) else text


def _speedup_interval(cell: Cell) -> str:
    figure = cell["speedup"]
    return "" if cell.is_baseline or figure is None else interval(figure, METRICS["speedup"].digits)


def _slowest(cell: Cell) -> float | None:
    figure = cell["speedup"]
    return figure.low if figure else None


def _title(cells: Sequence[Cell]) -> str:
    """What all rows share: model, data, images, hardware."""

    def shared(name: str, form: str = "{}") -> str:
        values = {getattr(cell, name) for cell in cells} - {None}
        return form.format(values.pop()) if len(values) == 1 else ""

    parts = [
        shared("model", "model {}"),
        shared("data", "data {}"),
        shared("images", "{:,} images"),
        shared("machine") or shared("device"),
        shared("dtype"),
        shared("ran"),
        shared("batch_size", "batch {}"),
    ]
    return ", ".join(part for part in parts if part)


def _notes(sheet: _Sheet) -> list[str]:
    """Only what a reader of this table, with these columns, needs."""
    cells, shown = sheet.cells, {column.metric for column in sheet.columns}
    notes = []
    runs = {run: name for run, name in run_names(cells).items() if run != name}
    if len(runs) > 1:
        notes.append(f"Runs: {', '.join(f'{run} ({name})' for run, name in runs.items())}.")
    if "gflops" in shown and any(cell["gflops"] for cell in cells):
        notes.append("FLOPs are multiply-adds, per image.")
    if "drop" in shown and any(cell["drop"] for cell in cells):
        notes.append(
            "Drop: points of top-1 lost against `none` (negative: gained), same images, with its 95 % interval."
        )
    if "drop" in shown and any(not_significant(cell) for cell in cells if not cell.is_baseline):
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
    """A cell as the command line writes it, with its run and model where there are several."""
    return " ".join(filter(None, (*(getattr(cell, name) for name in several), cell.variant, cell.schedule)))


def _rich(sheet: _Sheet, left_out: list[str]) -> Table:
    notes = _notes(sheet)
    if left_out:
        notes.append(f"Too narrow for: {', '.join(left_out)}.")
    caption = "\n".join(notes)
    table = Table(
        title=Text(_title(sheet.cells)) if _title(sheet.cells) else None,
        caption=Text(caption, style="dim") if caption else None,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
        min_width=sheet.width,
    )
    for column, width in zip(sheet.columns, sheet.widths, strict=True):
        # Folded numbers cannot be read; long method parameters and `list:` schedules may fold.
        table.add_column(
            Text(column.head),
            justify="left" if column.left else "right",
            overflow="fold",
            no_wrap=not column.left or width <= 16,
        )
    styles = {"failed": "red", "baseline": "bold", "front": "green", "": ""}
    for cell, texts in sheet.rows():
        style = "bold" if cell.is_baseline else styles[_kind(cell, sheet.fronts)]
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
    # What LaTeX has no letters for.
    text = styled.to_latex(hrules=True, column_format=aligned).replace("−", "$-$").replace("×", r"$\times$")
    notes = [f"{_title(sheet.cells)}. Needs \\usepackage{{booktabs}}.", *_notes(sheet)]
    return "".join(f"% {note}\n" for note in notes[:1]) + text + "".join(f"% {note}\n" for note in notes[1:])
