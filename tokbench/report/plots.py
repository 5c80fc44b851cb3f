"""Pareto plots: a panel per pair of metrics, a row of panels per model and data, runs laid over each other.

`scene` decides what a panel shows, `panels` draws it: markers, bars, fronts and labels.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from tokbench.report.canvas import drawing, require_format, save

# isort: split
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tokbench.errors import UserError, require_known
from tokbench.report.lines import DRAW_LINES
from tokbench.report.panels import DASHES, MOST_LABELS, Art, Size, draw_panel, draw_published, label_panel, scale_y
from tokbench.report.published import PUBLISHED, Published, published_points
from tokbench.report.scene import Scene, scene, side_by_side
from tokbench.report.styles import find_theme, method_order
from tokbench.report.text import capital, listed, shared, told_caveats, variant_name
from tokbench.results.cell import Cell
from tokbench.results.metrics import METRICS, metric_name
from tokbench.results.table import PANEL, group_by, known_gain, measured_names, run_names

DEFAULT_X = ("gflops", "throughput")
SIZES = {
    "wide": Size(panel=4.9, width=1.3, height=4.5, font=9.5, label=8.5, marker=6.5, text=True),
    "page": Size(panel=None, width=7.0, height=2.7, font=8, label=7, marker=5),
    "paper": Size(panel=None, width=3.4, height=2.35, font=7.5, label=6.5, marker=4.5, stacked=True),
}


def plot_run(cells: Sequence[Cell], out: str | Path, tell: Callable[[str], None]) -> Path | None:
    """Draw a run as `plot_pareto` does; if it has no two metrics to draw, tells so and returns None."""
    try:
        return plot_pareto(cells, out, tell=tell)
    except NothingToPlot as nothing:
        tell(f"no plot was drawn: {nothing}")
        return None


class NothingToPlot(UserError):
    """No cell has two metrics to plot against each other."""


def plot_pareto(
    cells: Sequence[Cell],
    out: str | Path,
    *,
    x: str | Sequence[str] | None = None,
    y: str | None = None,
    size: str = "wide",
    theme: str = "light",
    published: bool = False,
    linear: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Path:
    """Draw y against each x; returns `out`.

    Args:
        out: the file; .png, .svg or .pdf.
        x: one or several metrics, a panel each; None means GFLOPs and images/s if measured. "batch"
            alone: y, the speed-up unless another metric is given, against batch size, a line for each cell. "block"
            alone: the tokens that each block leaves.
        y: a metric; None means top-1, agreement where images have no labels, features where there are no classes,
            and the speed-up where only the cost was measured.
        size: "wide", for screens; "page", two columns of a paper; "paper", one column.
        theme: "light" or "dark".
        published: overlay the papers' figures for the same model and metrics.
        linear: never stretch the y axis near the unreduced model (by default, if a few cells fall far behind).
        tell: called with a line about runs missing from a panel because none of their cells has both metrics, and about
            panels for which nothing was published.

    Raises UserError for an unknown metric, size, theme or suffix, when nothing was published that fits, and
    NothingToPlot when no cell has both metrics of a panel.
    """
    require_format(out := Path(out))
    require_known(size, SIZES, "size")
    x = [x] if isinstance(x, str) else x
    if alone := [name for name in x or () if name in DRAW_LINES]:
        if len(x or ()) > 1:
            raise UserError(f"--x {alone[0]} is a plot by itself: name no other --x")
        art = Art(SIZES[size], find_theme(theme), cells)
        with drawing(art.theme, art.settings):
            save(DRAW_LINES[alone[0]](cells, y, art), out, art.size.dpi)
        return out
    names, y = _axes(cells, x, y)
    groups = group_by(cells, attrgetter(*PANEL, "at"))
    rows = [row for group in groups if (row := {x: shown for x in names if (shown := scene(group, x, y))})]
    art = _art(rows, SIZES[size], theme)
    if published:
        _tell_unpublished(cells, names, y, tell)
    with drawing(art.theme, art.settings):
        save(_draw(rows, y, art, published, linear), out, art.size.dpi)
    if absent := _absent(cells, names, y):
        tell(f"left out of the plot: {', '.join(absent)} (no cell has that together with {y}).")
    return out


def _axes(cells: Sequence[Cell], x: Sequence[str] | None, y: str | None) -> tuple[list[str], str]:
    """The metrics of the panels, as asked for or as measured."""

    def have(name: str, other: str) -> bool:
        return any(cell[name] and cell[other] for cell in cells)

    asked = list(dict.fromkeys(map(metric_name, DEFAULT_X if x is None else x)))
    y = metric_name(y) if y else None
    if y is None:
        # Accuracy against cost, else one cost against another.
        others = (name for name in (known_gain(cells), "speedup", "throughput") if x is None or name not in asked)
        y = next((name for name in others if any(have(name, across) for across in asked if across != name)), None)
        y = y or known_gain(cells)
        if x is None and y in ("speedup", "throughput"):
            asked = ["gflops"]
    if y in asked:
        raise UserError(f"nothing to plot: {y} is on both axes; choose another --x or --y.")
    there = [name for name in asked if have(name, y)]
    missing = [name for name in asked if name not in there]
    if not there or (missing and x is not None):
        raise NothingToPlot(
            f"nothing to plot: no cell has both {y} and {' or '.join(missing)}; measured here: {measured_names(cells)}."
        )
    return there, y


def _art(rows: Sequence[Mapping[str, Scene]], size: Size, theme: str) -> Art:
    shown = [scene.cells for row in rows for scene in row.values()]
    laid_over = [cell for part in shown if len({cell.run for cell in part}) > 1 for cell in part]
    cells = dict.fromkeys(cell for part in shown for cell in part)
    return Art(size, find_theme(theme), [*cells], run_names(laid_over))


def _absent(cells: Sequence[Cell], names: Sequence[str], y: str) -> list[str]:
    """The x metrics that a run lacks, in words; by model if the run has several."""
    absent = []
    for group in group_by(cells, lambda cell: (cell.run, cell.model)):
        run, model = group[0].run, group[0].model
        lacking = [name for name in names if scene(group, name, y) is None]
        if lacking:
            several = len({cell.model for cell in cells if cell.run == run}) > 1
            absent.append(f"{listed(lacking)} of {f'{model} of {run}' if several else run}")
    return absent


def _tell_unpublished(cells: Sequence[Cell], names: Sequence[str], y: str, tell: Callable[[str], None]) -> None:
    """Tell for which models and metrics nothing was published. Raises UserError if that is all."""
    models = dict.fromkeys(cell.model for cell in cells)
    lacking = {model: [name for name in names if not published_points(model, name, y)] for model in models}
    told = "; ".join(_unpublished(model, without, y) for model, without in lacking.items() if without)
    if all(without == list(names) for without in lacking.values()):
        raise UserError(f"--published: {told}.")
    if told:
        tell(f"--published: {told}.")


def _unpublished(model: str, names: Sequence[str], y: str) -> str:
    """A sentence on what was published for a model, or for other models, instead of these panels."""
    known = ", ".join(name for name in METRICS if published_points(model, name))
    there = known or f"for {', '.join(dict.fromkeys(row.models[0] for row in PUBLISHED))}"
    name, at, _ = model.partition("@")
    official = next((row.models[0] for row in PUBLISHED if at and name in row.models), "")
    # Nobody publishes hashes of these files, so the user has to say which weights they are.
    hint = f"; if the checkpoint holds the official weights, run it with --label {official}" if official else ""
    return f"no paper printed {y} against {' or '.join(names)} for {model}, only {there}{hint}"


def _draw(rows: Sequence[Mapping[str, Scene]], y: str, art: Art, published: bool, linear: bool) -> Figure:
    """A figure of rows of panels, each given as what is shown for each x metric."""
    groups = [list(dict.fromkeys(cell for shown in row.values() for cell in shown.cells)) for row in rows]
    lines: list[tuple[int, bool, list[Scene]]] = []  # its group, whether it is the group's first, its panels
    for number, row in enumerate(rows):
        parts = [[shown] for shown in row.values()] if art.size.stacked else [list(row.values())]
        lines += [(number, part is parts[0], part) for part in parts]
    columns = max(len(line) for *_, line in lines)
    figure = Figure(figsize=art.size.figure(len(lines), columns), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(lines), columns, squeeze=False, sharey=False if art.size.stacked else "row")
    jobs: list[tuple[Axes, Scene, list[Published]]] = []
    for panels, (number, first, line) in zip(axes, lines, strict=True):
        for panel in panels[len(line) :]:
            panel.remove()
        if first:
            _row_title(panels[0], groups[number], groups, columns, art)
        for panel, shown in zip(panels, line, strict=False):
            printed = published_points(shown.cells[0].model, shown.x, y) if published else []
            jobs.append((panel, side_by_side(shown, art.size.marker_share), printed))
            draw_panel(panel, jobs[-1][1], art, first=panel is panels[0])
            draw_published(panel, printed, shown.x, y, art)
        scale_y(panels[0], groups[number], y, linear)
    _legend(figure, [(shown, printed) for _, shown, printed in jobs], art)
    # Labels are placed by their size on the page, so everything else has to be laid out before.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for panel, shown, printed in jobs:
        label_panel(panel, shown, art, printed)
    return figure


def _row_title(panel: Axes, group: Sequence[Cell], groups: Sequence[Sequence[Cell]], columns: int, art: Art) -> None:
    model = group[0].model
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


def _conditions(group: Sequence[Cell], groups: Sequence[Sequence[Cell]]) -> list[str]:
    """What all cells of the group share, in words, and what tells it from another group of the same model."""
    told = partial(shared, group)

    def differing(name: str, form: str) -> str:
        same_model = [other for other in groups if other[0].model == group[0].model]
        return told(name, form) if len({getattr(other[0], name) for other in same_model}) > 1 else ""

    device, machine = told("device"), told("machine")
    parts = [
        told("data", "data {}"),
        differing("input_size", "{} px"),
        differing("weights_sha256", "weights {:.8}"),
        told("images", "{:,} images"),
        f"{machine} ({device})" if machine and device else machine or device,
        told("dtype"),
        told("ran"),
        "random weights" if told("weights") == "random" else "",
        told("batch_size", "batch {}"),
    ]
    return [part for part in parts if part]


def _legend(figure: Figure, shown: Sequence[tuple[Scene, list[Published]]], art: Art) -> None:
    marks = _other_entries(shown, art)
    names = [variant_name(cell.method, cell.variant) for cell in art.cells]
    lines, font, height = (1 + any(":" in name for name in names)), art.size.font, 72 * figure.get_figheight()
    if art.size.text:
        place: dict[str, Any] = {"loc": "outside right center", "handlelength": 2.2, "labelspacing": 0.75}
        per_column = int(height / (font * (1.2 * lines + 0.75)))
        room, per_row = 2 * per_column, 1 + (len(set(names)) + len(marks) > per_column)
        figure.set_figwidth(figure.get_figwidth() + 1.5 * (per_row - 1))
        notes = "\n".join(_footnotes([scene for scene, _ in shown], art))
        figure.supxlabel(notes, x=0.01, ha="left", fontsize=8, color=art.theme.muted)
    else:
        longest = max(map(len, [*names, *(text for _, text in marks)]))
        per_row = max(1, int(art.size.width * 72 / (0.55 * font * (longest + 5))))
        room = per_row * int(0.4 * height / (1.55 * font))
        place = {"loc": "outside lower center", "handlelength": 1.8, "labelspacing": 0.35, "columnspacing": 1.2,
                 "handletextpad": 0.5}  # fmt: skip
    entries = _method_entries(art, max(room - len(marks), 1)) + marks
    handles, labels = zip(*entries, strict=True)
    legend = figure.legend(handles, labels, frameon=False, ncols=min(per_row, len(entries)), **place)
    further = list(art.runs.values())[1:]
    for text in legend.get_texts():
        if text.get_text() in further:
            text.set_fontstyle("italic")


def _method_entries(art: Art, room: int) -> list[tuple[Any, str]]:
    """(line, text) of each method and set of parameters; where there are more than `room`, how many are left out."""
    methods = {cell.variant: cell.method for cell in art.cells}
    order = method_order(methods.values())
    most = room if len(methods) <= room else room - 1
    named = sorted(sorted(methods, key=lambda variant: art.ranks[variant])[:most])
    plain, entries = Art(art.size, art.theme, art.cells), []
    for variant in sorted(named, key=lambda variant: order.index(methods[variant])):
        name = variant_name(methods[variant], variant)
        text = name.replace(":", "\n", 1) if art.size.text else name
        entries.append((Line2D([], [], **plain.series(variant, methods[variant], 0)), text))
    rest = [(Line2D([], [], linestyle="none"), f"and {len(methods) - most} more")] if len(methods) > most else []
    return entries + rest


def _other_entries(shown: Sequence[tuple[Scene, list[Published]]], art: Art) -> list[tuple[Any, str]]:
    """(lines, text) of everything but methods: runs, published points, the front, NaN logits."""
    theme, size = art.theme, art.size.marker
    entries: list[tuple[Any, str]] = []
    for place, name in enumerate(art.runs.values()):
        marks = {"marker": "o", "markersize": size, "linestyle": DASHES[place % len(DASHES)]}
        entries.append((Line2D([], [], **{**art.series("none", "none", place), **marks}), name))
    for where in dict.fromkeys(row.where for _, printed in shown for row in printed):
        marks = {"marker": "o", "markeredgecolor": theme.muted, "linestyle": ":", "color": theme.muted}
        text = "published" + (f":\n{where}" if art.size.text else f" ({where})")
        entries.append((Line2D([], [], **{**art.published("tome"), **marks}), text))
    if art.searched:
        for hollow, text in ((False, "searched schedule"), (True, "not searched")):
            marks = art.series("none", "none", 0, hollow) | {"marker": "o", "markersize": size, "linestyle": "none"}
            entries.append((Line2D([], [], **marks), text))
    ring = Line2D([], [], marker="o", linestyle="none", color=theme.ink, markersize=size)
    ring.set_markerfacecolor(theme.background)
    entries.append(((Line2D([], [], **art.front), ring), "Pareto front"))
    if art.searched:
        entries.append((Line2D([], [], **art.unsearched_front), "front without search"))
    if any(cell.is_broken for cell in art.cells):
        entries.append((Line2D([], [], **art.broken), "NaN logits,\non no front" if art.size.text else "NaN logits"))
    return entries


def _footnotes(shown: Sequence[Scene], art: Art) -> list[str]:
    names, y = list(dict.fromkeys(scene.x for scene in shown)), shown[0].y
    notes = ["Pareto front: no other cell is as good in both metrics and better in one (costs within 1 % are equal)."]
    if len({cell.run for cell in art.cells}) > 1 and any(METRICS[name].paced for name in (*names, y)):
        notes.append("Each run has a front of its own in images/s and ms: machines change their pace between runs.")
    for direction, metrics in (("Vertical", [y]), ("Horizontal", names)):
        has = [name for name in metrics if any(figure.interval for cell in art.cells if (figure := cell[name]))]
        notes += [f"{direction} bars: {bars}" for bars in dict.fromkeys(METRICS[name].bars for name in has) if bars]
    notes += [f"{capital(text)}." for text in told_caveats(art.cells)]
    if any(scene.has_cut for scene in shown):
        notes.append("Arrow heads: the bar is longer than the panel shows.")
    most = max(sum(point.on_front for point in scene.points) for scene in shown)
    if most > MOST_LABELS:
        notes.append(f"Too many cells are on the front to name all: {MOST_LABELS} of up to {most} in a panel.")
    return notes
