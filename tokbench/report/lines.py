"""Plots with a line for each cell: a metric by batch size, or the tokens left by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter

from tokbench.report import canvas  # noqa: F401  # before matplotlib

# isort: split
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter

from tokbench.errors import UserError
from tokbench.report.panels import DASHES, Art, bars_within
from tokbench.report.scene import bar_reach
from tokbench.report.text import broken, capital, cell_name, group_title, told_caveats
from tokbench.results.cell import Cell
from tokbench.results.metrics import METRICS, metric_name
from tokbench.results.table import PANEL, group_by, measured_names


def draw_sweep(cells: Sequence[Cell], y: str | None, art: Art) -> Figure:
    """A panel for each model and data: metric y (default: the speed-up) by batch size, a line for each cell.

    Raises UserError if no cell was timed at several sizes, or none has the metric.
    """
    name = metric_name(y or "speedup")
    timed = [cell for cell in cells if cell.at.batch_size]
    if not timed:
        raise UserError(
            "nothing to plot: no run here was timed at several batch sizes; tokbench run --batch-size 1,8,32"
        )
    shown = [cell for cell in timed if cell[name] and not (cell.is_baseline and name == "speedup")]
    if not shown:
        raise UserError(f"nothing to plot: no cell has {name}; measured here: {measured_names(timed)}.")
    figure = _figure(shown, art, lambda panel, group: _draw_sweep(panel, group, name, art))
    if art.size.text:
        notes = [
            METRICS[name].bars and f"Bars: {METRICS[name].bars}",
            *(f"{capital(text)}." for text in told_caveats(shown)),
        ]
        figure.supxlabel("\n".join(filter(None, notes)), x=0.01, ha="left", fontsize=8, color=art.theme.muted)
    return figure


def draw_tokens(cells: Sequence[Cell], y: str | None, art: Art) -> Figure:
    """A panel for each model and data: the tokens that each block leaves, a line for each cell.

    If schedules were searched, only these and others of the same budgets. Raises UserError if y is given, and if no
    cell has token counts.
    """
    if y is not None:
        raise UserError("--x block goes with no --y: it draws the tokens that each block leaves")
    searched = {(cell.variant, cell.key.schedule.budget) for cell in cells if cell.is_searched and cell.key.schedule}
    asked = [c for c in cells if c.is_searched or c.is_baseline or (c.variant, c.schedule) in searched or not searched]
    shown = [cell for cell in asked if cell.tokens]
    if not shown:
        raise UserError("nothing to plot: no cell says how many tokens its blocks leave")
    return _figure(shown, art, lambda panel, group: _draw_tokens(panel, group, art))


DRAW_LINES = {"batch": draw_sweep, "batch_size": draw_sweep, "block": draw_tokens}  # by the name of the x axis


def _figure(shown: Sequence[Cell], art: Art, draw: Callable[[Axes, Sequence[Cell]], None]) -> Figure:
    """A panel for each model and data."""
    groups = group_by(shown, attrgetter(*PANEL))
    width, height = art.size.figure(len(groups), 1)
    figure = Figure(figsize=(width + 1.2 if art.size.panel else width, height), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, group in zip(figure.subplots(len(groups), 1, squeeze=False)[:, 0], groups, strict=True):
        draw(panel, group)
        panel.grid(True)
        title = group_title(group).rpartition(", batch")[0] or group_title(group)
        panel.set_title(broken(title, 60), loc="left", fontsize=art.size.font)
        panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=art.size.label)
    return figure


def _draw_tokens(panel: Axes, group: Sequence[Cell], art: Art) -> None:
    several = len({cell.run for cell in group}) > 1
    for cell in dict.fromkeys(group):
        marks = art.marks(cell) | {"linestyle": "-" if cell.is_searched else DASHES[1]}
        panel.plot(range(len(cell.tokens)), cell.tokens, label=broken(cell_name(cell, several), 28), **marks)
    panel.set_ylim(bottom=0)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlabel("Block")
    panel.set_ylabel("Tokens after it, prefix included")


def _draw_sweep(panel: Axes, group: Sequence[Cell], name: str, art: Art) -> None:
    several, reach = len({cell.run for cell in group}) > 1, bar_reach(group, name)
    lines = group_by(group, lambda cell: (cell.run, cell.key))
    schedules: dict[str, list[str]] = {}
    for place, line in enumerate(lines):
        first, figures = line[0], [figure for cell in line if (figure := cell[name])]
        dashes = schedules.setdefault(first.variant, [])
        dashes += [] if first.schedule in dashes else [first.schedule]
        # Shifted a little, so that no bar covers another.
        across = [(cell.at.batch_size or 0) * 2 ** (0.03 * (place - (len(lines) - 1) / 2)) for cell in line]
        marks = art.marks(first) | {"linestyle": DASHES[dashes.index(first.schedule) % len(DASHES)]}
        up, label = bars_within(figures, reach), broken(cell_name(first, several), 28)
        panel.errorbar(across, [figure.value for figure in figures], yerr=up, label=label, elinewidth=0.9, **marks)
        for side, head in enumerate("v^"):
            sign, limit = (-1, 1)[side], reach[side]
            cut = [
                at
                for at, own in zip(across, figures, strict=True)
                if own.interval and sign * own.interval[side] > sign * limit
            ]
            panel.plot(cut, [limit] * len(cut), head, color=marks["color"], markersize=5)
    if METRICS[name].unit == "×":
        panel.axhline(1, color=art.theme.muted, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1.5)
    sizes = sorted({cell.at.batch_size or 0 for cell in group})
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(sizes))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.set_xlabel("Images in a batch")
    panel.set_ylabel(f"{METRICS[name].label}\n{METRICS[name].better} is better →")
    if METRICS[name].better == "lower":
        panel.invert_yaxis()
