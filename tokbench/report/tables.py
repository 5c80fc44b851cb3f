"""The table of cells for terminals, Markdown, LaTeX and programs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, overload

import pandas as pd
import rich
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokbench.errors import UserError, nearest
from tokbench.report.metrics import (
    GAINS,
    METRICS,
    Metric,
    comparable,
    filter_cells,
    find_metric,
    known_gain,
    measured_names,
    nonfinite,
    pareto_front,
    run_names,
)

TextFormat = Literal["md", "csv", "tex", "json"]
Format = Literal["rich", "md", "csv", "tex", "json"]
FORMATS: tuple[str, ...] = get_args(Format)

# The fronts that are marked: word in the table → x metric; y is top-1, or what stands in for it.
FRONTS = {"FLOPs": "gflops", "speed": "throughput"}
_GAINS = {
    "top1": "top-1",
    "agreement": "agreement with the unreduced model, as the images have no labels,",
    "similarity": "cosine to the unreduced model's features, as the model has no classes,",
}
_ALL = 100_000  # characters: wide enough for every column
_SORT_ALSO = ("model", "method", "schedule", "tokens_final")


@dataclass(frozen=True)
class _Column:
    head: str
    text: Callable[[pd.Series], str]
    left: bool = False
    # Where a terminal is too narrow for all, the highest rank goes first; 0 never goes. Files get every column.
    rank: float = 0
    # The table's column whose numbers sort it; "" sorts by the text.
    sort: str = ""

    @property
    def name(self) -> str:
        """The head, where no neighbor explains it."""
        return f"Speed-up {self.head}" if self.sort == "speedup_low" else self.head


@overload
def render_table(
    df: pd.DataFrame,
    format: Literal["rich"] = "rich",
    sort: str = "",
    pareto: bool = False,
    *,
    filters: Sequence[str] = (),
    width: int | None = None,
) -> Table: ...
@overload
def render_table(
    df: pd.DataFrame,
    format: TextFormat,
    sort: str = "",
    pareto: bool = False,
    *,
    filters: Sequence[str] = (),
    width: int | None = None,
) -> str: ...
@overload
def render_table(
    df: pd.DataFrame,
    format: str,
    sort: str = "",
    pareto: bool = False,
    *,
    filters: Sequence[str] = (),
    width: int | None = None,
) -> str | Table: ...


def render_table(
    df: pd.DataFrame,
    format: str = "rich",
    sort: str = "",
    pareto: bool = False,
    *,
    filters: Sequence[str] = (),
    width: int | None = None,
) -> str | Table:
    """The cells of `metrics.load_table` as a table.

    `rich`, `md` and `tex` are for reading: rounded, columns nobody measured left out, the best for their cost (members
    of a Pareto front) marked, drops that cannot be told from none followed by `n.s.`. `csv` and `json` carry every
    column unrounded.

    Args:
        sort: a metric (best first), or model, method, schedule, tokens_final; "" keeps the order of the runs.
        pareto: only members of a front, and the unreduced models.
        filters: conditions as of `metrics.filter_cells`; who is on a front does not depend on them.
        width: characters to fill, the terminal's when None; the least important columns go where all do not
            fit (`rich` only).

    Raises UserError for an unknown format, sort column or filter, for filters that no cell meets, and for a metric or a
    front that cells were to be chosen or sorted by and that none has.
    """
    if format not in FORMATS:
        raise UserError(f"no table format {format!r}; there are {', '.join(FORMATS)}.{nearest(format, FORMATS)}")
    df = _with_fronts(df)
    if pareto:
        _require_front(df)
        df = df[df["is_baseline"] | df[[f"front_{x}" for x in FRONTS.values()]].any(axis=1)]
    chosen = _sorted(filter_cells(df, filters), sort)
    if filters and chosen.empty and not df.empty:
        raise UserError(f"no cell meets {' and '.join(filters)}; there are {_some_cells(df)}.")
    df = chosen
    if format == "csv":
        return df.to_csv(index=False, lineterminator="\n")
    if format == "json":
        return _json(df)
    columns = _columns(df)
    if format == "rich":
        fitting = _fitting(df, columns, width or rich.get_console().width)
        return _rich(df, fitting, [column.name for column in columns if column not in fitting])
    title, notes = _title(df), _notes(df, columns)
    return (_markdown if format == "md" else _latex)(df, columns, title, notes)


def readable(df: pd.DataFrame) -> dict[str, Any]:
    """The table for reading, in parts for a page: title, heads, rows of cells with sort values, notes.

    A cell's `value` sorts it: the number behind it, "" where it is missing, else its text. A head's `first` is the
    order that puts the best first.
    """
    df = _with_fronts(df)
    columns = _columns(df)
    rows = [
        {
            "kind": "failed" if row["error"] else "baseline" if row["is_baseline"] else "front" if _front(row) else "",
            "cells": [
                {"text": column.text(row), "left": column.left, "value": _sort_value(column, row)} for column in columns
            ],
        }
        for _, row in df.iterrows()
    ]
    falling = {
        column for metric in METRICS.values() if metric.better == "higher" for column in (metric.column, metric.low)
    }
    heads = [
        {
            "text": column.head,
            "left": column.left,
            "first": "descending" if column.sort in falling - {""} else "ascending",
        }
        for column in columns
    ]
    return {"title": _title(df), "heads": heads, "rows": rows, "notes": _notes(df, columns)}


def _with_fronts(df: pd.DataFrame) -> pd.DataFrame:
    """With columns `front_<x>`, whether a cell is on that front, and `front_by`, by which metric it is one."""
    marked = df.assign(**{f"front_{x}": False for x in FRONTS.values()}, front_by=GAINS[0])
    for group in comparable(df):
        gain = known_gain(group)
        for x in FRONTS.values():
            # Of several runs the speed-ups compare, and not the throughputs, which follow the machine's pace.
            judged = "speedup" if x == "throughput" else x
            marked.loc[group.index, f"front_{x}"] = pareto_front(group, judged, gain)
        marked.loc[group.index, "front_by"] = gain
    return marked


def _sort_value(column: _Column, row: pd.Series) -> str:
    if not column.sort:
        return column.text(row)
    value = row[column.sort]
    return "" if pd.isna(value) else f"{float(value)!r}"


def _sorted(df: pd.DataFrame, sort: str) -> pd.DataFrame:
    if not sort:
        return df
    if sort in _SORT_ALSO:
        return df.sort_values(sort, kind="stable")
    if sort not in METRICS:
        options = [*METRICS, *_SORT_ALSO]
        hint = nearest(sort, options)
        raise UserError(f"cannot sort by {sort!r}; there are {', '.join(options)}.{hint}")
    metric = find_metric(sort)
    if len(df) and df[metric.column].isna().all():
        raise UserError(f"cannot sort by {sort}: no cell here has it; measured: {measured_names(df)}.")
    return df.sort_values(metric.column, ascending=metric.better == "lower", kind="stable", na_position="last")


def _require_front(df: pd.DataFrame) -> None:
    if len(df) and not df[[f"front_{x}" for x in FRONTS.values()]].to_numpy().any():
        raise UserError(
            "--pareto: there is no front, as no cell has both accuracy and FLOPs or speed; "
            f"measured: {measured_names(df)}."
        )


def _some_cells(df: pd.DataFrame) -> str:
    """What a filter could have named."""
    words = {column: sorted(set(df[column])) for column in ("method", "schedule")}
    return "; ".join(f"{column}s {', '.join(filter(None, values))}" for column, values in words.items())


def _json(df: pd.DataFrame) -> str:
    rows = [
        {key: None if not isinstance(value, bool) and pd.isna(value) else value for key, value in row.items()}
        for row in df.to_dict("records")
    ]
    for row in rows:
        row["params"] = json.loads(str(row["params"]))
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


def _columns(df: pd.DataFrame) -> list[_Column]:
    """The columns for reading, in a fixed order, without those that say nothing in this table."""
    columns = [
        _Column("Method", lambda row: row["variant"], left=True),
        _Column("Schedule", lambda row: "" if row["is_baseline"] else row["schedule"], left=True),
        _number(METRICS["top1"]),
        _number(METRICS["top5"], rank=6),
        _Column("Drop [95 %]", _drop, rank=0.1, sort="drop"),
        _number(METRICS["agreement"], rank=2),
        _number(METRICS["kl"], rank=9),
        _number(METRICS["similarity"]),
        _Column("Tokens", lambda row: _digits(row, "tokens_final", 0), rank=4, sort="tokens_final"),
        _number(METRICS["gflops"], rank=0.3),
        _number(METRICS["flops_ratio"], rank=5),
        _number(METRICS["method_share"], rank=10),
        _number(METRICS["throughput"], rank=1),
        _Column("Speed-up", _speedup, rank=0.2, sort="speedup"),
        _Column("[95 %]", _speedup_interval, rank=8, sort="speedup_low"),
        _number(METRICS["efficiency"], rank=2),
        _number(METRICS["latency"], rank=3),
        _number(METRICS["latency_p95"], rank=9),
        _number(METRICS["latency_speedup"], rank=6),
        _number(METRICS["memory"], rank=7),
        _Column("Front", _front, left=True, rank=0.4),
    ]
    if df["model"].nunique() > 1:
        columns.insert(0, _Column("Model", lambda row: row["model"], left=True))
    if df["run"].nunique() > 1:
        columns.insert(0, _Column("Run", lambda row: row["run"], left=True))
    return [c for c in columns if c.left or any(c.text(row) not in ("", "failed") for _, row in df.iterrows())]


def _needed(df: pd.DataFrame, column: _Column) -> int:
    return max(len(column.head), *(len(column.text(row)) for _, row in df.iterrows()), 0)


def _fitting(df: pd.DataFrame, columns: list[_Column], width: int) -> list[_Column]:
    """The columns that there is room for, the lowest ranks first; those of rank 0 in any case."""
    chosen: list[_Column] = []
    for column in sorted(columns, key=lambda column: column.rank):
        if not column.rank or _width(df, [*chosen, column]) <= width:
            chosen.append(column)
    return [column for column in columns if column in chosen]


def _width(df: pd.DataFrame, columns: list[_Column]) -> int:
    return sum(_needed(df, column) + 1 for column in columns) - 1


def print_table(
    console: Console,
    df: pd.DataFrame,
    sort: str = "",
    pareto: bool = False,
    *,
    filters: Sequence[str] = (),
    every_column: bool = False,
) -> None:
    """Print a table of `render_table` on a console: the columns that fit, or every one.

    Where not even those fit that are always there, lines are longer than the console is wide: a number without its
    last digits would be another one.
    """
    width = _ALL if every_column else console.width
    table = render_table(df, "rich", sort, pareto, filters=filters, width=width)
    console.width = max(console.width, table.min_width or 0)
    console.print(table)


def _number(metric: Metric, rank: float = 0) -> _Column:
    def text(row: pd.Series) -> str:
        return _digits(row, metric.column, sensible_digits(metric, row["images"]))

    return _Column(metric.short, text, rank=rank, sort=metric.column)


def sensible_digits(metric: Metric, images: float) -> int:
    """One digit of accuracy for fewer than 10,000 images, where the second would be noise."""
    per_image = metric.column in ("top1", "top5", "drop", "agreement")
    few = pd.isna(images) or images < 10_000
    return 1 if per_image and few else metric.digits


def _digits(row: pd.Series, column: str, digits: int) -> str:
    if pd.isna(row[column]):
        return "failed" if row["error"] else ""
    return f"{row[column]:,.{digits}f}"


def _drop(row: pd.Series) -> str:
    digits = sensible_digits(METRICS["drop"], row["images"])
    if row["is_baseline"] or pd.isna(row["drop"]):
        return "" if row["is_baseline"] else _digits(row, "drop", digits)
    text = _signed(row["drop"], digits)
    if pd.isna(row["drop_low"]):
        return text
    interval = f"[{_signed(row['drop_low'], digits)}, {_signed(row['drop_high'], digits)}]"
    return f"{text} {interval}{' n.s.' if not_significant(row) else ''}"


def not_significant(row: pd.Series) -> bool:
    """True where the drop's 95 % interval holds 0."""
    return bool(row["drop_low"] <= 0 <= row["drop_high"])


def _signed(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def _speedup(row: pd.Series) -> str:
    text = _digits(row, "speedup", 2)
    return text if text in ("", "failed") else f"{text}×"


def _speedup_interval(row: pd.Series) -> str:
    if row["is_baseline"] or pd.isna(row["speedup_low"]):
        return ""
    return f"[{row['speedup_low']:.2f}, {row['speedup_high']:.2f}]"


def _front(row: pd.Series) -> str:
    words = [word for word, x in FRONTS.items() if row[f"front_{x}"]]
    return "both" if len(words) == len(FRONTS) else "".join(words)


def _title(df: pd.DataFrame) -> str:
    """What all rows share: model, data, images, hardware."""

    def shared(column: str) -> str:
        values = df[column].dropna().unique()
        return str(values[0]) if len(values) == 1 else ""

    images = df["images"].dropna().unique()
    count = f"{int(images[0]):,} images" if len(images) == 1 else ""
    batch = df["batch_size"].dropna().unique()
    parts = [
        f"model {shared('model')}" if shared("model") else "",
        f"data {shared('data')}" if shared("data") else "",
        count,
        shared("machine") or shared("device"),
        shared("dtype"),
        "compiled" if shared("compiled") == "yes" else "",
        f"batch {int(batch[0])}" if len(batch) == 1 else "",
    ]
    return ", ".join(part for part in parts if part)


def _notes(df: pd.DataFrame, columns: Sequence[_Column]) -> list[str]:
    """Only what a reader of this table, with these columns, needs."""
    heads = {column.head for column in columns}
    notes = []
    runs = {run: name for run, name in run_names(df).items() if run != name}
    if len(runs) > 1:
        notes.append(f"Runs: {', '.join(f'{run} ({name})' for run, name in runs.items())}.")
    if df["gflops"].notna().any():
        notes.append("FLOPs are multiply-adds, per image.")
    if df["drop"].notna().any():
        notes.append(
            "Drop: points of top-1 lost against `none` (negative: gained), same images, with its 95 % interval."
        )
    if any(not_significant(row) for _, row in df[~df["is_baseline"]].iterrows()):
        notes.append("n.s.: cannot be told from no drop.")
    on_front = df[df[[f"front_{x}" for x in FRONTS.values()]].any(axis=1)]
    for gain in on_front["front_by"].unique():
        notes.append(
            f"Front: the best {_GAINS[gain]} for its FLOPs (or speed-up): no other cell is as good in both and better "
            "in one; costs within 1 % are equal."
        )
    if METRICS["agreement"].short in heads:
        notes.append("Agree: share of the images on which the answer is that of `none`, right or wrong.")
    if METRICS["kl"].short in heads:
        notes.append("KL: how far the class probabilities are from those of `none`; 0 is the same.")
    if METRICS["similarity"].short in heads:
        notes.append("Cosine: of the features with those of `none`; 1 is the same direction.")
    if "Tokens" in heads:
        notes.append("Tokens: left after the last block, class token and the like included.")
    if METRICS["latency"].short in heads:
        notes.append("Latency: of a single image, the median; p95: 95 % of the passes are faster.")
    if METRICS["latency_speedup"].short in heads:
        notes.append("× at batch 1: speed-up for a single image, by pairs of passes side by side.")
    if METRICS["efficiency"].short in heads:
        notes.append("Efficiency: speed relative to the control `free`, which drops as many tokens without choosing.")
    if (df["fused_attention"] == "off").any():
        notes.append("Fused attention was off: speed-ups are over a model that is slower than timm's own.")
    if (df["weights"] == "random").any():
        notes.append("Random weights: FLOPs and speed only, nothing here is a trained model.")
    if METRICS["method_share"].short in heads and df["method_share"].gt(0).any():
        notes.append("Overhead: what the method itself computes, as a share of the cell's FLOPs.")
    for _, row in df[nonfinite(df)].iterrows():
        notes.append(
            f"{_cell_words(row, df)}: NaN or infinite logits for {row['nonfinite']:,} images, which count as wrong; "
            "on no front."
        )
    for _, row in df[df["error"].notna()].iterrows():
        notes.append(f"{_cell_words(row, df)} failed: {row['error']}")
    return notes


def _cell_words(row: pd.Series, df: pd.DataFrame) -> str:
    """A row as one says it, with its run and model where there are several."""
    several = [row[column] for column in ("run", "model") if df[column].nunique() > 1]
    return " ".join(filter(None, (*several, row["variant"], row["schedule"])))


def _rich(df: pd.DataFrame, columns: list[_Column], left_out: list[str]) -> Table:
    notes = _notes(df, columns)
    if left_out:
        notes.append(f"Too narrow for: {', '.join(left_out)}.")
    caption = "\n".join(notes)
    table = Table(
        title=_title(df) or None,
        caption=Text(caption, style="dim") if caption else None,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        header_style="bold",
        min_width=_width(df, columns),
    )
    for column in columns:
        # Folded numbers cannot be read; long method parameters and `list:` schedules may fold.
        table.add_column(
            column.head,
            justify="left" if column.left else "right",
            overflow="fold",
            no_wrap=not column.left or _needed(df, column) <= 16,
        )
    for _, row in df.iterrows():
        style = "bold" if row["is_baseline"] else "green" if _front(row) else "red" if row["error"] else ""
        table.add_row(*(Text(column.text(row)) for column in columns), style=style)
    return table


def _marked(column: _Column, row: pd.Series, bold: str, escape: Callable[[str], str] = str) -> str:
    """A cell's text, in bold where it puts the cell on a front."""
    text = escape(column.text(row))
    return bold.format(text) if column.head == METRICS[row["front_by"]].short and _front(row) else text


def _markdown(df: pd.DataFrame, columns: list[_Column], title: str, notes: list[str]) -> str:
    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    lines = [f"**{title}**", ""] if title else []
    lines.append(line([column.head for column in columns]))
    lines.append("|" + "|".join(":---" if column.left else "---:" for column in columns) + "|")
    lines += [line([_marked(column, row, "**{}**") for column in columns]) for _, row in df.iterrows()]
    # Two spaces end a line without a paragraph.
    return "\n".join(lines) + "\n" + ("\n" + "  \n".join(notes) + "\n" if notes else "")


_LATEX_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
    "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "×": r"$\times$", "`": "",
}  # fmt: skip


def _tex(text: str) -> str:
    escaped = "".join(_LATEX_SPECIAL.get(character, character) for character in text)
    return re.sub(r"(?<![\w.])-(?=\d)", "$-$", escaped)


def _latex(df: pd.DataFrame, columns: list[_Column], title: str, notes: list[str]) -> str:
    def line(cells: list[str]) -> str:
        return "  " + " & ".join(cells) + r" \\"

    lines = [
        f"% {_tex(title)}. Needs \\usepackage{{booktabs}}.",
        r"\begin{tabular}{" + "".join("l" if column.left else "r" for column in columns) + "}",
        r"  \toprule",
        line([_tex(column.head) for column in columns]),
        r"  \midrule",
        *(line([_marked(column, row, r"\textbf{{{}}}", _tex) for column in columns]) for _, row in df.iterrows()),
        r"  \bottomrule",
        r"\end{tabular}",
        *(f"% {_tex(note)}" for note in notes),
    ]
    return "\n".join(lines) + "\n"
