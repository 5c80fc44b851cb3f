"""Pareto plots: a panel per pair of metrics, a row of panels per model and data, runs laid over each other."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D

from tokbench.errors import UserError, nearest
from tokbench.report.canvas import require_format, save
from tokbench.report.metrics import (
    METRICS,
    PANEL,
    find_metric,
    known_gain,
    measured_names,
    nonfinite,
    pareto_front,
    run_names,
)
from tokbench.report.panels import (
    DASHES,
    Art,
    Size,
    broken_marks,
    draw_panel,
    draw_published,
    label_panel,
    published_marks,
    scale_y,
    series_marks,
    side_by_side,
    variant_ranks,
)
from tokbench.report.published import PUBLISHED, published_points
from tokbench.report.styles import STYLES, find_theme, variant_name

DEFAULT_X = ("gflops", "throughput")
_OVER_IMAGES = ("top5", "agreement", "kl", "similarity")  # intervals of means over all images
SIZES = {
    "wide": Size(panel=4.9, width=1.3, height=4.5, font=9.5, label=8.5, marker=6.5, text=True),
    "page": Size(panel=None, width=7.0, height=2.7, font=8, label=7, marker=5),
    "paper": Size(panel=None, width=3.4, height=2.35, font=7.5, label=6.5, marker=4.5, stacked=True),
}


def plot_pareto(
    df: pd.DataFrame,
    out: str | Path,
    *,
    x: str | Sequence[str] | None = None,
    y: str | None = None,
    size: str = "wide",
    theme: str = "light",
    published: bool = False,
    linear: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Path:
    """Draw y against each x for the cells of `metrics.load_table`; returns `out`.

    Args:
        out: the file; .png, .svg or .pdf.
        x: one or several metrics, a panel each; None means GFLOPs and images/s, as far as they were measured.
        y: a metric; None means top-1, agreement where images have no labels, features where there are no classes.
        size: "wide", for screens; "page", two columns of a paper; "paper", one column.
        theme: "light" or "dark".
        published: lay over what papers printed for the same model and metrics.
        linear: never stretch the y axis near the unreduced model, which happens where a few cells fall far behind.
        tell: is told in a line which runs are not in a panel, because none of their cells has both of its metrics, and
            for which panels nothing was published.

    Raises UserError for an unknown metric, size, theme or suffix, when no cell has both metrics of a panel, and when
    nothing was published that fits.
    """
    out = Path(out)
    require_format(out)
    if size not in SIZES:
        raise UserError(f"no size {size!r}; there are {', '.join(SIZES)}.{nearest(size, SIZES)}")
    y = known_gain(df) if y is None else y
    names = list(dict.fromkeys(_panels(df, x, y)))
    absent = [f"{' and '.join(lacking)} of {run}" for run, lacking in _absent(df, names, y).items()]
    groups = [group for _, group in df.groupby(list(PANEL), sort=False, dropna=False)]
    rows = [{name: cells for name in names if len(cells := _drawable(group, name, y))} for group in groups]
    rows = [row for row in rows if row]
    laid_over = {run for row in rows for cells in row.values() if cells["run"].nunique() > 1 for run in cells["run"]}
    art = Art(SIZES[size], find_theme(theme), run_names(df[df["run"].isin(laid_over)]))
    printed = _published(df, names, y, tell) if published else {}
    with rc_context(art.rc):
        figure = _draw(rows, y, art, printed, linear)
        save(figure, out, dpi=200 if art.size.text else 300)
    if absent and tell:
        tell(f"left out of the plot: {', '.join(absent)} (no cell has that together with {y}).")
    return out


def _panels(df: pd.DataFrame, x: str | Sequence[str] | None, y: str) -> list[str]:
    def measured(name: str) -> bool:
        return bool((df[find_metric(name).column].notna() & df[find_metric(y).column].notna()).any())

    asked = list(DEFAULT_X) if x is None else [x] if isinstance(x, str) else list(x)
    if y in asked:
        raise UserError(f"nothing to plot: {y} is on both axes; choose another --x or --y.")
    missing = [name for name in asked if not measured(name)]
    if x is None:
        asked = [name for name in asked if name not in missing]
    if missing and (x is not None or not asked):
        raise UserError(
            f"nothing to plot: no cell has both {y} and {' or '.join(missing)}; measured here: {measured_names(df)}."
        )
    return asked


def _drawable(df: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """The cells of one panel: what has both metrics, and a baseline with one of them for its reference line."""
    both = df[find_metric(x).column].notna() & df[find_metric(y).column].notna()
    return df[both | (df["is_baseline"] & df["run"].isin(df["run"][both]))]


def _absent(df: pd.DataFrame, names: Sequence[str], y: str) -> dict[str, list[str]]:
    """By run, or run and model where it has several: the x metrics of the panels it is not in."""
    absent: dict[str, list[str]] = {}
    for (run, model), cells in df.groupby(["run", "model"], sort=False):
        lacking = [name for name in names if _drawable(cells, name, y).empty]
        if lacking:
            several = df.loc[df["run"] == run, "model"].nunique() > 1
            absent[f"{model} of {run}" if several else str(run)] = lacking
    return absent


def _published(
    df: pd.DataFrame, names: Sequence[str], y: str, tell: Callable[[str], None] | None
) -> dict[str, pd.DataFrame]:
    """Printed points by x metric. Raises UserError where there are none for these models and metrics at all."""
    lacking: dict[str, list[str]] = {}
    printed = {
        name: published_points(df["model"].unique(), [find_metric(name).column, find_metric(y).column])
        for name in names
    }
    for (name, points), model in product(printed.items(), df["model"].unique()):
        if not (points["model"] == model).any():
            lacking.setdefault(str(model), []).append(name)
    if all(points.empty for points in printed.values()):
        raise UserError(f"--published: {'; '.join(_unpublished(model, names, y) for model in lacking)}.")
    if lacking and tell:
        tell(f"--published: {'; '.join(_unpublished(model, without, y) for model, without in lacking.items())}.")
    return printed


def _unpublished(model: str, names: Sequence[str], y: str) -> str:
    """That nothing was printed for a model in these panels, and what was: for it, or else for which models."""
    rows = [row.values for row in PUBLISHED if model in row.models]
    known = [name for name, metric in METRICS.items() if any(metric.column in values for values in rows)]
    there = (
        f"only {', '.join(known)}" if known else f"only for {', '.join(dict.fromkeys(r.models[0] for r in PUBLISHED))}"
    )
    return f"no paper printed {y} against {' or '.join(names)} for {model}, {there}"


def _draw(
    rows: list[dict[str, pd.DataFrame]], y: str, art: Art, printed: dict[str, pd.DataFrame], linear: bool
) -> Figure:
    """A figure of rows of panels, each given as the cells for each x metric."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    groups = [pd.concat(row.values()).pipe(lambda cells: cells[~cells.index.duplicated()]) for row in rows]
    lines = [
        (number, line)
        for number, row in enumerate(rows)
        for line in ([{name: cells} for name, cells in row.items()] if art.size.stacked else [row])
    ]
    columns = max(len(line) for _, line in lines)
    figure = Figure(figsize=art.size.figure(len(lines), columns), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(lines), columns, squeeze=False, sharey=False if art.size.stacked else "row")
    heads: dict[int, Axes] = {}
    jobs: list[tuple[Axes, pd.DataFrame, str]] = []
    for panels, (number, line) in zip(axes, lines, strict=True):
        heads.setdefault(number, panels[0])
        for panel in panels[len(line) :]:
            panel.remove()
        for panel, (name, cells) in zip(panels, line.items(), strict=False):
            jobs.append((panel, side_by_side(cells.assign(front=pareto_front(cells, name, y)), name, art), name))
    for number, head in heads.items():
        _row_title(head, groups[number], groups, columns, art)
    for panel, cells, name in jobs:
        draw_panel(panel, cells, name, y, art, first=panel in axes[:, 0])
        if name in printed:
            draw_published(panel, _of_model(printed[name], cells), name, y, art)
    for panels, (number, _) in zip(axes, lines, strict=True):
        scale_y(panels[0], groups[number], y, linear)
    _legend(figure, pd.concat(groups), names, y, art, printed)
    # Labels are placed by their size on the page, so everything else has to be in its place before.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for panel, group, name in jobs:
        label_panel(panel, group, name, y, art, _of_model(printed[name], group) if name in printed else None)
    return figure


def _of_model(printed: pd.DataFrame, group: pd.DataFrame) -> pd.DataFrame:
    return printed[printed["model"] == group["model"].iloc[0]]


def _row_title(panel: Axes, group: pd.DataFrame, groups: Sequence[pd.DataFrame], columns: int, art: Art) -> None:
    model = str(group["model"].iloc[0])
    if not art.size.text:
        if len(groups) > 1:
            room = 72 * 0.8 * art.size.width / columns
            panel.set_title(model, loc="left", fontsize=min(art.size.font, room / (0.62 * len(model))))
        return
    points = 72 * (columns * (art.size.panel or 0) - 0.7)
    details = textwrap.wrap(" · ".join(_conditions(group, groups)), int(points / 5.6))
    title = f"{model}: token fusion without training"
    if len(title) > points / 8:
        title = model
    # The blank title keeps the height free; the texts stay out of the layout, or their width would push the panels
    # apart.
    panel.set_title("\n".join(" " * (2 + len(details))), loc="left", fontsize=10)
    lines: list[tuple[str, int, dict[str, Any]]] = [
        (title, 9 + 14 * len(details), {"fontsize": min(12, points / (0.68 * len(title))), "weight": "bold"}),
        ("\n".join(details), 8, {"fontsize": 9.5, "color": art.theme.muted, "linespacing": 1.3}),
    ]
    for text, height, font in lines:
        note = panel.annotate(text, (0, 1), (0, height), xycoords="axes fraction", textcoords="offset points", **font)
        note.set_in_layout(False)


def _conditions(group: pd.DataFrame, groups: Sequence[pd.DataFrame]) -> list[str]:
    """What all cells of the group share, in words; what tells it from another group of the same model included."""

    def shared(column: str) -> Any:
        values = group[column].dropna().unique()
        return values[0] if len(values) == 1 else None

    def differs(column: str) -> bool:
        same_model = [other for other in groups if other["model"].iloc[0] == group["model"].iloc[0]]
        return len({other[column].iloc[0] for other in same_model}) > 1

    device, machine = shared("device"), shared("machine")
    where = f"{machine} ({device})" if machine and device else machine or device
    parts = [
        ("data {}", shared("data")),
        ("{} px", shared("input_size") if differs("input_size") else None),
        ("weights {:.8}", shared("weights_sha256") if differs("weights_sha256") else None),
        ("{:,} images", shared("images")),
        ("{}", where),
        ("{}", shared("dtype")),
        ("{}", "compiled" if shared("compiled") == "yes" else None),
        ("random weights", "random" if shared("weights") == "random" else None),
        ("batch {}", shared("batch_size")),
    ]
    return [text.format(value) for text, value in parts if value is not None]


def _legend(
    figure: Figure, df: pd.DataFrame, names: list[str], y: str, art: Art, printed: dict[str, pd.DataFrame]
) -> None:
    entries: list[tuple[Any, str]] = []
    order = [*STYLES, *sorted(set(df["method"]))]
    ranks = variant_ranks(df)
    plain_art = Art(art.size, art.theme)
    for variant, cells in sorted(df.groupby("variant"), key=lambda item: order.index(item[1]["method"].iloc[0])):
        method = cells["method"].iloc[0]
        name = variant_name(method, variant)
        text = name.replace(":", "\n", 1) if art.size.text else name
        entries.append((Line2D([], [], **series_marks(method, ranks[variant], 0, plain_art)), text))
    entries += [(_run_handle(place, art), name) for place, name in enumerate(art.runs.values())]
    for where in dict.fromkeys(where for points in printed.values() for where in points["where"]):
        marks = published_marks("tome", art) | {"marker": "o", "markeredgecolor": art.theme.muted}
        handle = Line2D([], [], **{**marks, "linestyle": ":", "color": art.theme.muted})
        entries.append((handle, "published" + (f":\n{where}" if art.size.text else f" ({where})")))
    band = Line2D([], [], **art.front)
    ring = Line2D([], [], marker="o", linestyle="none", color=art.theme.ink, markersize=art.size.marker)
    ring.set_markerfacecolor(art.theme.background)
    entries.append(((band, ring), "Pareto front"))
    if nonfinite(df).any():
        entries.append(
            (Line2D([], [], **broken_marks(art)), "NaN logits,\non no front" if art.size.text else "NaN logits")
        )
    handles, labels = zip(*entries, strict=True)
    if art.size.text:
        legend = figure.legend(
            handles, labels, loc="outside right center", frameon=False, handlelength=2.2, labelspacing=0.75
        )
        _slant_runs(legend, art)
        figure.supxlabel(_footnote(df, names, y), x=0.01, ha="left", fontsize=8, color=art.theme.muted)
        return
    longest = max(len(label) for label in labels)
    per_row = int(art.size.width * 72 / (0.55 * art.size.font * (longest + 5)))
    legend = figure.legend(
        handles, labels, loc="outside lower center", frameon=False, ncols=max(1, min(per_row, len(labels))),
        handlelength=1.8, labelspacing=0.35, columnspacing=1.2, handletextpad=0.5,
    )  # fmt: skip
    _slant_runs(legend, art)


def _slant_runs(legend: Legend, art: Art) -> None:
    """Further runs are named in italics, as the labels of their cells are."""
    further = list(art.runs.values())[1:]
    for text in legend.get_texts():
        if text.get_text() in further:
            text.set_fontstyle("italic")


def _run_handle(place: int, art: Art) -> Line2D:
    marks = series_marks("none", 0, place, art)
    return Line2D([], [], **{**marks, "marker": "o", "markersize": art.size.marker, "linestyle": DASHES[place % 4]})


def _footnote(df: pd.DataFrame, names: list[str], y: str) -> str:
    notes = ["Pareto front: no other cell is as good in both metrics and better in one (costs within 1 % are equal)."]
    if df["run"].nunique() > 1 and any(find_metric(name).paced for name in (*names, y)):
        notes.append("Each run has a front of its own in images/s and ms: machines change their pace between runs.")
    bars = [("Vertical", [y]), ("Horizontal", names)]
    for direction, metrics in bars:
        shown = {find_metric(name).low for name in metrics} - {""}
        if {"top1_paired_low", "drop_low"} & shown and df["drop_low"].notna().any():
            notes.append(f"{direction} bars: 95 % interval of the difference from the unreduced model, same images.")
        if any(name in metrics and df[find_metric(name).low].notna().any() for name in _OVER_IMAGES):
            notes.append(f"{direction} bars: 95 % interval over images.")
        if {"throughput_low", "speedup_low", "latency_speedup_low", "efficiency_low"} & shown:
            notes.append(f"{direction} bars: 95 % interval over timing rounds.")
        if "latency_low_ms" in shown and df["latency_low_ms"].notna().any():
            notes.append(f"{direction} bars: 95 % interval of the median latency.")
    return "\n".join(notes)
