"""A plot of runs that timed every cell at several batch sizes: where fusion begins to pay."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

from tokbench.report import canvas  # noqa: F401  # before matplotlib

# isort: split
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from tokbench.errors import UserError
from tokbench.report.panels import DASHES, Art, bars_within
from tokbench.report.scene import bar_reach
from tokbench.report.text import broken, capital, cell_name, group_title, told_caveats
from tokbench.results.cell import Cell
from tokbench.results.metrics import METRICS, find_metric, metric_name
from tokbench.results.table import PANEL, group_by, measured_names

SWEEP = frozenset({"batch", "batch_size"})  # what the x axis is called


def draw_sweep(cells: Sequence[Cell], y: str | None, art: Art) -> Figure:
    """A panel for each model and data: metric y, the speed-up where it is None, by batch size; a line for each cell.

    Raises UserError where no cell was timed at several sizes, or none has the metric.
    """
    name = metric_name(y or "speedup")
    find_metric(name)
    timed = [cell for cell in cells if cell.at_batch]
    if not timed:
        raise UserError(
            "nothing to plot: no run here was timed at several batch sizes; tokbench run --batch-size 1,8,32"
        )
    shown = [cell for cell in timed if cell[name] and not (cell.is_baseline and name == "speedup")]
    if not shown:
        raise UserError(f"nothing to plot: no cell has {name}; measured here: {measured_names(timed)}.")
    groups = group_by(shown, attrgetter(*PANEL))
    width, height = art.size.figure(len(groups), 1)
    figure = Figure(figsize=(width + 1.2 if art.size.panel else width, height), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, group in zip(figure.subplots(len(groups), 1, squeeze=False)[:, 0], groups, strict=True):
        _draw(panel, group, name, art)
    if art.size.text:
        notes = [
            METRICS[name].bars and f"Bars: {METRICS[name].bars}",
            *(f"{capital(text)}." for text in told_caveats(shown)),
        ]
        figure.supxlabel("\n".join(filter(None, notes)), x=0.01, ha="left", fontsize=8, color=art.theme.muted)
    return figure


def _draw(panel: Axes, group: Sequence[Cell], name: str, art: Art) -> None:
    several, reach = len({cell.run for cell in group}) > 1, bar_reach(group, name)
    lines = group_by(group, lambda cell: (cell.run, cell.key))
    schedules: dict[str, list[str]] = {}
    for place, line in enumerate(lines):
        first, figures = line[0], [figure for cell in line if (figure := cell[name])]
        dashes = schedules.setdefault(first.variant, [])
        dashes += [] if first.schedule in dashes else [first.schedule]
        # A little beside each other, so that no bar covers another.
        across = [(cell.at_batch or 0) * 2 ** (0.03 * (place - (len(lines) - 1) / 2)) for cell in line]
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
    sizes = sorted({cell.at_batch or 0 for cell in group})
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(sizes))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.grid(True)
    panel.set_xlabel("Images in a batch")
    panel.set_ylabel(f"{METRICS[name].label}\n{METRICS[name].better} is better →")
    if METRICS[name].better == "lower":
        panel.invert_yaxis()
    title = group_title(group).rpartition(", batch")[0]
    panel.set_title(broken(title, 60), loc="left", fontsize=art.size.font)
    panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=art.size.label)
