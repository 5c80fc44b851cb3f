"""Pareto plots: a panel per pair of metrics, a row of panels per model and data, runs laid over each other."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import TICKUP
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from tokbench.errors import UserError, nearest
from tokbench.report.canvas import RC, require_format, save
from tokbench.report.labels import Spot, place, sampled, spots_along, spots_around
from tokbench.report.metrics import METRICS, PANEL, comparable, find_metric, nonfinite, pareto_front, run_names
from tokbench.report.published import PUBLISHED, published_points
from tokbench.report.styles import STYLES, Style, Theme, blend, find_theme, method_style, short_schedule, variant_name

DEFAULT_X = ("gflops", "throughput")


@dataclass(frozen=True)
class Size:
    """A figure's measures: inches, and font sizes in points.

    Attributes:
        panel: width of a panel; None where the figure's width is fixed.
        width: of the figure; the legend's, where panels have a width.
        height: of a row of panels.
        stacked: one panel a row, instead of all panels of a model beside each other.
        text: whether title, conditions and notes are in the picture; in a paper they are in its caption.
    """

    panel: float | None
    width: float
    height: float
    font: float
    label: float
    marker: float
    stacked: bool = False
    text: bool = False

    def figure(self, rows: int, columns: int) -> tuple[float, float]:
        """(width, height) of a figure of so many rows and columns of panels."""
        if self.panel:
            return self.width + self.panel * columns, 1.0 + self.height * rows
        return self.width, 0.7 + self.height * rows


SIZES = {
    "wide": Size(panel=4.9, width=1.3, height=4.5, font=9.5, label=8.5, marker=6.5, text=True),
    "page": Size(panel=None, width=7.0, height=2.7, font=8, label=7, marker=5),
    "paper": Size(panel=None, width=3.4, height=2.35, font=7.5, label=6.5, marker=4.5, stacked=True),
}


@dataclass(frozen=True)
class _Art:
    """What all parts of a figure draw with."""

    size: Size
    theme: Theme
    runs: dict[str, str] = field(default_factory=dict)  # runs laid over each other, by what the legend calls them

    @property
    def front(self) -> dict[str, Any]:
        width = 10.0 * self.size.marker / 6.5
        return {"color": self.theme.ink, "alpha": 0.18, "linewidth": width, "solid_capstyle": "round"}

    @property
    def halo(self) -> list[Any]:
        return [withStroke(linewidth=2.2, foreground=self.theme.background)] if HALOS else []

    @property
    def rc(self) -> dict[Any, Any]:
        theme = self.theme
        return {
            "font.size": self.size.font,
            "figure.facecolor": theme.background,
            "savefig.facecolor": theme.background,
            "axes.facecolor": theme.background,
            "axes.edgecolor": theme.axis,
            "axes.labelcolor": theme.ink,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "text.color": theme.ink,
            "xtick.color": theme.muted,
            "ytick.color": theme.muted,
            "grid.color": theme.grid,
            "grid.linewidth": 0.7,
            **RC,
        }


_UNITS = {
    **dict.fromkeys(("top1", "top5", "agreement", "method_share"), " %"),
    **dict.fromkeys((name for name in METRICS if name.startswith("gflops")), " GFLOPs"),
    **dict.fromkeys(("latency", "latency_p95"), " ms"),
    "throughput": " images/s", "speedup": "×", "memory": " MiB",
}  # fmt: skip
_LABEL_CHARACTERS = 36  # in a line
HALOS = True  # a rim of background around labels; in SVG it turns text into shapes
_FILLS = ("full", "none", "left", "right", "bottom", "top")  # of markers: the method as it is, then with parameters
_DASHES: tuple[Any, ...] = ("-", (0, (3, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))


def plot_pareto(
    df: pd.DataFrame,
    out: str | Path,
    *,
    x: str | Sequence[str] | None = None,
    y: str = "top1",
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
        y: a metric.
        size: "wide", for screens; "page", two columns of a paper; "paper", one column.
        theme: "light" or "dark".
        published: lay over what papers printed for the same model and metrics.
        linear: never stretch the y axis near the unreduced model, which happens where a few cells fall far behind.
        tell: is told in a line which runs are not in a panel, because none of their cells has both of its metrics.

    Raises UserError for an unknown metric, size, theme or suffix, when no cell has both metrics of a panel, and when
    nothing was published that fits.
    """
    out = Path(out)
    require_format(out)
    if size not in SIZES:
        raise UserError(f"no size {size!r}; there are {', '.join(SIZES)}.{nearest(size, SIZES)}")
    names = _panels(df, x, y)
    absent = [f"{' and '.join(lacking)} of {run}" for run, lacking in _absent(df, names, y).items()]
    if absent and tell:
        tell(f"left out of the plot: {', '.join(absent)} (no cell has that together with {y}).")
    groups = [group for _, group in df.groupby(list(PANEL), sort=False, dropna=False)]
    rows = [{name: cells for name in names if len(cells := _drawable(group, name, y))} for group in groups]
    rows = [row for row in rows if row]
    laid_over = {run for row in rows for cells in row.values() if cells["run"].nunique() > 1 for run in cells["run"]}
    art = _Art(SIZES[size], find_theme(theme), run_names(df[df["run"].isin(laid_over)]))
    printed = _published(df, names, y) if published else {}
    with rc_context(art.rc):
        figure = _draw(rows, y, art, printed, linear)
        save(figure, out, dpi=200 if art.size.text else 300)
    return out


def _panels(df: pd.DataFrame, x: str | Sequence[str] | None, y: str) -> list[str]:
    def measured(name: str) -> bool:
        return bool((df[find_metric(name).column].notna() & df[find_metric(y).column].notna()).any())

    asked = list(DEFAULT_X) if x is None else [x] if isinstance(x, str) else list(x)
    missing = [name for name in asked if not measured(name)]
    if x is None:
        asked = [name for name in asked if name not in missing]
    if missing and (x is not None or not asked):
        there = [name for name in METRICS if df[METRICS[name].column].notna().any()]
        raise UserError(
            f"nothing to plot: no cell has both {y} and {' or '.join(missing)}; "
            f"measured here: {', '.join(there) or 'nothing'}."
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


def _published(df: pd.DataFrame, names: Sequence[str], y: str) -> dict[str, pd.DataFrame]:
    """Printed points by x metric. Raises UserError where there are none for these models and metrics."""
    printed = {
        name: published_points(df["model"].unique(), [find_metric(name).column, find_metric(y).column])
        for name in names
    }
    if all(points.empty for points in printed.values()):
        models = list(dict.fromkeys(row.models[0] for row in PUBLISHED))
        raise UserError(
            f"nothing published is known for {', '.join(map(str, df['model'].unique()))} with {y} against "
            f"{' or '.join(names)}; there are figures for {', '.join(models)}."
        )
    return printed


def _draw(
    rows: list[dict[str, pd.DataFrame]], y: str, art: _Art, printed: dict[str, pd.DataFrame], linear: bool
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
            jobs.append((panel, _side_by_side(cells.assign(front=pareto_front(cells, name, y)), name, art), name))
    for number, head in heads.items():
        _row_title(head, groups[number], groups, columns, art)
    for panel, cells, name in jobs:
        _panel(panel, cells, name, y, art, first=panel in axes[:, 0])
        if name in printed:
            _draw_published(panel, _of_model(printed[name], cells), name, y, art)
    for panels, (number, _) in zip(axes, lines, strict=True):
        _scale_y(panels[0], groups[number], y, linear)
    _legend(figure, pd.concat(groups), names, y, art, printed)
    # Labels are placed by their size on the page, so everything else has to be in its place before.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for panel, group, name in jobs:
        _label(panel, group, name, y, art, _of_model(printed[name], group) if name in printed else None)
    return figure


def _of_model(printed: pd.DataFrame, group: pd.DataFrame) -> pd.DataFrame:
    return printed[printed["model"] == group["model"].iloc[0]]


def _row_title(panel: Axes, group: pd.DataFrame, groups: Sequence[pd.DataFrame], columns: int, art: _Art) -> None:
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
    parts = {
        "data {}": shared("data"),
        "{} px": shared("input_size") if differs("input_size") else None,
        "weights {:.8}": shared("weights_sha256") if differs("weights_sha256") else None,
        "{:,} images": shared("images"),
        "{}": where,
        "{} ": shared("dtype"),
        "batch {}": shared("batch_size"),
    }
    return [text.format(value).strip() for text, value in parts.items() if value is not None]


def _panel(panel: Axes, group: pd.DataFrame, x: str, y: str, art: _Art, *, first: bool) -> None:
    horizontal, vertical = find_metric(x), find_metric(y)
    panel.grid(True)
    panel.set_axisbelow(True)
    name = _axis_name(x, art, "lower is better ←" if horizontal.better == "lower" else "higher is better →")
    equal = group.attrs.get("equal", [])
    if equal:
        shift = f"{_round_up(group.attrs['shift']):g}{_UNITS.get(x, '')}"
        name += f"\n(equal costs moved aside, up to ±{shift};\nticks: as measured)"
        measured = group.attrs["measured"]
        panel.plot(
            measured, np.zeros(len(measured)), marker=TICKUP, markersize=art.size.marker, markeredgewidth=0.6,
            linestyle="none", color=art.theme.ink, transform=panel.get_xaxis_transform(),
        )  # fmt: skip
    panel.set_xlabel(name)
    for low, high in equal:
        panel.axvspan(low, high, color=art.theme.grid, alpha=0.5, linewidth=0, zorder=0.5)
    if first:
        panel.set_ylabel(_axis_name(y, art, f"{vertical.better} is better →"))
    if vertical.better == "lower" and first:
        # Up is better in every plot.
        panel.invert_yaxis()
    for cells in comparable(group[group["front"]]):
        _draw_front(panel, cells, x, y, art)
    for axis, value in _references(group, x, y):
        dashes: dict[str, Any] = {"color": art.theme.muted, "linewidth": 0.9, "linestyle": (0, (4, 3)), "zorder": 1.5}
        (panel.axvline if axis else panel.axhline)(value, **dashes)
    for series in _series(group, art):
        _draw_series(panel, series, x, y)
    _ring_front(panel, group, x, y, art)
    broken = group[nonfinite(group)]
    if len(broken):
        panel.plot(broken[horizontal.column], broken[vertical.column], **_broken_marks(art), zorder=5.5)
    panel.margins(0.11, 0.06)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=8 if art.size.text else 6, steps=[1, 2, 5, 10]))


def _side_by_side(group: pd.DataFrame, x: str, art: _Art) -> pd.DataFrame:
    """The cells with each method moved a little along x, where most share their cost with several others.

    Markers and bars of cells at the same FLOPs would cover each other. The whole series moves, so its shape stays;
    the unreduced model stays where it is. `attrs["equal"]` then holds (low, high) of each cost that cells share,
    `attrs["measured"]` the values before they were moved, `attrs["shift"]` how far the farthest was.
    """
    metric = find_metric(x)
    cells = group[~group["is_baseline"]]
    values = cells[metric.column].to_numpy(float)
    alike = (np.abs(values[:, None] - values) <= metric.tie * np.abs(values)).sum(axis=1) - 1
    if not metric.tie or not len(cells) or (alike >= 2).mean() <= 0.5:
        return group
    order = [*STYLES, *sorted(set(cells["method"]))]
    keys = sorted(set(zip(cells["method"], cells["variant"], cells["run"], strict=True)),
                  key=lambda key: (order.index(key[0]), key))  # fmt: skip
    every = group[metric.column].dropna()
    points_wide = 72 * (art.size.panel or art.size.width) * 0.85
    levels = _levels(values, metric.tie)
    room = np.diff(sorted(level.mean() for level in levels)).min(initial=np.inf)  # between neighboring columns
    gap = min(0.36, 4 / len(keys)) * art.size.marker / points_wide * 1.22 * (every.max() - every.min())
    gap = min(gap, 0.9 * room / len(keys))
    steps = {key: gap * (place - (len(keys) - 1) / 2) for place, key in enumerate(keys)}
    moves = pd.Series(
        [steps.get(key, 0.0) for key in zip(group["method"], group["variant"], group["run"], strict=True)], group.index
    )
    columns = [column for column in (metric.column, metric.low, metric.high) if column]
    moved = group.assign(**{column: group[column] + moves for column in columns})
    half = gap * len(keys) / 2
    moved.attrs["equal"] = [(level.min() - half, level.max() + half) for level in levels]
    moved.attrs["measured"] = values
    moved.attrs["shift"] = max(steps.values())
    return moved


def _levels(values: np.ndarray, tie: float) -> list[np.ndarray]:
    """Values that count as equal, together: neighbors within `tie` of each other."""
    ordered = np.sort(values[np.isfinite(values)])
    apart = np.flatnonzero(ordered[1:] > ordered[:-1] * (1 + tie)) + 1
    return [level for level in np.split(ordered, apart) if len(level) > 1]


def _axis_name(name: str, art: _Art, direction: str) -> str:
    label = find_metric(name).label
    if name == "gflops":
        label = f"{label} (multiply-adds)"
    return f"{label}\n{direction}" if art.size.text else label


def _scale_y(panel: Axes, group: pd.DataFrame, y: str, linear: bool) -> None:
    """Limits, ticks and, where a few cells fall far behind, a scale that leaves the others room."""
    bases = group.loc[group["is_baseline"], find_metric(y).column].dropna()
    values = group.loc[~group["is_baseline"], find_metric(y).column].dropna()
    unit = 0.0 if linear or bases.empty or values.empty else _stretch_unit(values - bases.iloc[0], y)
    if unit:
        base = float(bases.iloc[0])
        panel.set_yscale(
            "function",
            functions=(lambda v: np.arcsinh((v - base) / unit), lambda t: base + unit * np.sinh(t)),
        )
    to_axis = panel.yaxis.get_transform()
    bottom, top = to_axis.transform(np.array(panel.get_ylim()))
    limits = to_axis.inverted().transform(
        np.array([bottom, top + 0.14 * (top - bottom)])
    )  # room for the front's labels
    if unit:
        ticks = _spread_ticks(float(min(limits)), float(max(limits)), base, to_axis)
        panel.yaxis.set_major_locator(FixedLocator(ticks))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.set_ylabel(panel.get_ylabel() + "\n(stretched scale)")
    else:
        panel.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    panel.set_ylim(*limits)


def _stretch_unit(gaps: pd.Series, y: str) -> float:
    """The points near the unreduced model that a stretched axis draws about linearly; 0 where none is needed."""
    if find_metric(y).column not in ("top1", "top5", "drop", "agreement") or len(gaps) < 6:
        return 0.0
    most, near = gaps.abs().max(), gaps.abs().quantile(0.7)
    return max(near / 2, 0.5) if most > 8 and most > 5 * near else 0.0


def _spread_ticks(low: float, high: float, base: float, to_axis: Any) -> list[float]:
    """Numbers that stand apart on a scale stretched around `base`; the farther from it, the rounder."""
    room = 0.065 * abs(np.diff(to_axis.transform(np.array([low, high])))[0])
    ticks: list[float] = []
    for step in (50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1):
        for tick in np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step:
            there = to_axis.transform(np.array([*ticks, tick]))
            if abs(tick - base) < 5 * step and (abs(there[:-1] - there[-1]) > room).all():
                ticks.append(round(float(tick), 6) + 0.0)  # no −0
    return sorted(ticks)


def _references(group: pd.DataFrame, x: str, y: str) -> list[tuple[int, float]]:
    """The unreduced model's values, once for each run: (0, its y) for a horizontal line, (1, its x) for a vertical."""
    cells = group[group["is_baseline"]].drop_duplicates("run")
    return [
        (axis, float(value))
        for _, cell in cells.iterrows()
        for axis, name in enumerate((y, x))
        if pd.notna(value := cell[find_metric(name).column])
    ]


def _draw_front(panel: Axes, cells: pd.DataFrame, x: str, y: str, art: _Art) -> None:
    front = cells.sort_values(find_metric(x).column)
    panel.plot(
        front[find_metric(x).column], front[find_metric(y).column],
        solid_joinstyle="round", zorder=1, **art.front,
    )  # fmt: skip


def _ring_front(panel: Axes, group: pd.DataFrame, x: str, y: str, art: _Art) -> None:
    for series in _series(group[group["front"] & ~group["is_baseline"]], art):
        cells = series.cells
        marks = {**series.marks, "markersize": series.marks["markersize"] * 1.25, "linestyle": "none"}
        marks |= {"markeredgecolor": art.theme.ink, "markeredgewidth": 0.2 * art.size.marker}
        panel.plot(cells[find_metric(x).column], cells[find_metric(y).column], **marks, zorder=series.zorder + 0.05)


def _broken_marks(art: _Art) -> dict[str, Any]:
    """A cross over a cell whose logits were NaN or infinite for some images."""
    color, size = art.theme.ink, art.size.marker
    return {
        "linestyle": "none",
        "marker": "x",
        "markersize": 1.5 * size,
        "color": color,
        "markeredgewidth": 0.22 * size,
    }


@dataclass(frozen=True)
class _Series:
    """The cells of one method with one set of parameters in one run, and how they are drawn."""

    cells: pd.DataFrame
    marks: dict[str, Any]
    is_baseline: bool
    zorder: float


def _series(group: pd.DataFrame, art: _Art) -> Iterator[_Series]:
    ranks = _variant_ranks(group)
    for (variant, run), cells in group.groupby(["variant", "run"], sort=False):
        place = list(art.runs).index(run) if run in art.runs else 0
        method = cells["method"].iloc[0]
        zorder = (5 if method == "none" else 4) - 0.1 * place  # the first run on top
        yield _Series(cells, _marks(method, ranks[variant], place, art), method == "none", zorder)


def _variant_ranks(df: pd.DataFrame) -> dict[str, int]:
    """0 for a method as it is, then 1, 2, … for each set of parameters it is given."""
    ranks = {}
    for method, cells in df.groupby("method", sort=False):
        changed = sorted(set(cells["variant"]) - {method})
        ranks.update({method: 0, **{variant: rank for rank, variant in enumerate(changed, 1)}})
    return ranks


def _marks(method: str, rank: int, run: int, art: _Art) -> dict[str, Any]:
    """Line and marker. Parameters change how a marker is filled; a further run is paler, smaller and dashed."""
    style, theme = method_style(method), art.theme
    color = theme.method(style)
    paler = min(0.5 * run, 0.75)
    line, edge = (blend(_hex(theme.shade(color, share)), theme.background, paler) for share in (0.15, 0.38))
    dashes = _DASHES[(run if len(art.runs) > 1 else min(rank, 1)) % len(_DASHES)]
    return {
        "color": line,
        "linewidth": 0.17 * art.size.marker,
        "linestyle": "none" if method == "none" else dashes,
        "marker": style.marker,
        "markersize": art.size.marker * style.size * (0.85 if run else 1),
        "fillstyle": _FILLS[rank % len(_FILLS)],
        "markerfacecolor": blend(color, theme.background, paler) if rank % len(_FILLS) != 1 else theme.background,
        "markerfacecoloralt": theme.background,
        "markeredgecolor": line if rank else edge,
        "markeredgewidth": 0.2 * art.size.marker if rank else 0.11 * art.size.marker,
    }


def _hex(color: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * part):02X}" for part in color)


def _draw_series(panel: Axes, series: _Series, x: str, y: str) -> None:
    horizontal, vertical = find_metric(x), find_metric(y)
    cells = series.cells.dropna(subset=[horizontal.column, vertical.column]).sort_values(horizontal.column)
    xs, ys = cells[horizontal.column], cells[vertical.column]
    if not series.is_baseline:
        panel.errorbar(
            xs, ys, xerr=_bars(cells, x), yerr=_bars(cells, y), fmt="none",
            ecolor=series.marks["color"], elinewidth=0.8 * series.marks["linewidth"], alpha=0.6, zorder=2,
        )  # fmt: skip
    panel.plot(xs, ys, **series.marks, zorder=series.zorder)


def _bars(cells: pd.DataFrame, name: str) -> np.ndarray | None:
    """Distances to the interval's ends, (2, n); zero where there is no interval."""
    metric = find_metric(name)
    if not metric.low:
        return None
    middle, low, high = (cells[column].to_numpy(float) for column in (metric.column, metric.low, metric.high))
    return np.nan_to_num(np.clip([middle - low, high - middle], 0, None))


def _draw_published(panel: Axes, printed: pd.DataFrame, x: str, y: str, art: _Art) -> None:
    columns = [find_metric(x).column, find_metric(y).column]
    unreduced = printed[printed["method"] == "none"]
    for method, points in printed.groupby("method", sort=False):
        path = points if method == "none" else pd.concat([unreduced, points])
        panel.plot(*path[columns].to_numpy().T, linestyle=":", color=art.theme.muted, linewidth=1.0, zorder=2.5)
        panel.plot(*points[columns].to_numpy().T, **_published_marks(str(method), art), zorder=3)


def _published_marks(method: str, art: _Art) -> dict[str, Any]:
    style = method_style(method)
    return {
        "linestyle": "none",
        "marker": style.marker,
        "markersize": 1.5 * art.size.marker * style.size,
        "markerfacecolor": "none",
        "markeredgecolor": art.theme.shade(art.theme.method(style), 0.15),
        "markeredgewidth": 0.2 * art.size.marker,
    }


def _legend(
    figure: Figure, df: pd.DataFrame, names: list[str], y: str, art: _Art, printed: dict[str, pd.DataFrame]
) -> None:
    entries: list[tuple[Any, str]] = []
    order = [*STYLES, *sorted(set(df["method"]))]
    ranks = _variant_ranks(df)
    plain_art = _Art(art.size, art.theme)
    for variant, cells in sorted(df.groupby("variant"), key=lambda item: order.index(item[1]["method"].iloc[0])):
        method = cells["method"].iloc[0]
        name = variant_name(method, variant)
        text = name.replace(":", "\n", 1) if art.size.text else name
        entries.append((Line2D([], [], **_marks(method, ranks[variant], 0, plain_art)), text))
    entries += [(_run_handle(place, art), name) for place, name in enumerate(art.runs.values())]
    for where in dict.fromkeys(where for points in printed.values() for where in points["where"]):
        marks = _published_marks("tome", art) | {"marker": "o", "markeredgecolor": art.theme.muted}
        handle = Line2D([], [], **{**marks, "linestyle": ":", "color": art.theme.muted})
        entries.append((handle, "published" + (f":\n{where}" if art.size.text else f" ({where})")))
    band = Line2D([], [], **art.front)
    ring = Line2D([], [], marker="o", linestyle="none", color=art.theme.ink, markersize=art.size.marker)
    ring.set_markerfacecolor(art.theme.background)
    entries.append(((band, ring), "Pareto front"))
    if nonfinite(df).any():
        entries.append(
            (Line2D([], [], **_broken_marks(art)), "NaN logits,\non no front" if art.size.text else "NaN logits")
        )
    handles, labels = zip(*entries, strict=True)
    if art.size.text:
        figure.legend(handles, labels, loc="outside right center", frameon=False, handlelength=2.2, labelspacing=0.75)
        figure.supxlabel(_footnote(df, names, y), x=0.01, ha="left", fontsize=8, color=art.theme.muted)
        return
    longest = max(len(label) for label in labels)
    per_row = int(art.size.width * 72 / (0.55 * art.size.font * (longest + 5)))
    figure.legend(
        handles, labels, loc="outside lower center", frameon=False, ncols=max(1, min(per_row, len(labels))),
        handlelength=1.8, labelspacing=0.35, columnspacing=1.2, handletextpad=0.5,
    )  # fmt: skip


def _run_handle(place: int, art: _Art) -> Line2D:
    marks = _marks("none", 0, place, art)
    return Line2D([], [], **{**marks, "marker": "o", "markersize": art.size.marker, "linestyle": _DASHES[place % 4]})


def _footnote(df: pd.DataFrame, names: list[str], y: str) -> str:
    notes = ["Pareto front: no other cell is as good in both metrics and better in one (costs within 1 % are equal)."]
    bars = [("Vertical", [y]), ("Horizontal", names)]
    for direction, metrics in bars:
        shown = {find_metric(name).low for name in metrics} - {""}
        if {"top1_paired_low", "drop_low"} & shown and df["drop_low"].notna().any():
            notes.append(f"{direction} bars: 95 % interval of the difference from the unreduced model, same images.")
        if {"throughput_low", "speedup_low"} & shown:
            notes.append(f"{direction} bars: 95 % interval over timing rounds.")
        if "latency_low_ms" in shown and df["latency_low_ms"].notna().any():
            notes.append(f"{direction} bars: 95 % interval of the median latency.")
    return "\n".join(notes)


@dataclass(frozen=True)
class _Label:
    text: str
    at: tuple[float, float]
    color: Any
    spots: list[Spot]
    rotation: int = 0


def _label(panel: Axes, group: pd.DataFrame, x: str, y: str, art: _Art, printed: pd.DataFrame | None) -> None:
    """Name the members of the front, what was published and the reference lines, where there is room."""
    columns = [find_metric(x).column, find_metric(y).column]
    cells = group.dropna(subset=columns)
    front = cells[cells["front"] & ~cells["is_baseline"]]
    # The end of the front first: it has the frame beside it, so the fewest spots to choose from.
    front = front.sort_values(columns[0], ascending=find_metric(x).better == "lower")
    labels = _point_labels(panel, front, x, y, art)
    places = [cells[columns].to_numpy(float)]
    if printed is not None:
        places.append(printed[columns].to_numpy(float))
        labels += _point_labels(panel, printed[printed["method"] != "none"], x, y, art, ", published")
    lines = [_line_label(panel, axis, value, x if axis else y, art) for axis, value in _references(group, x, y)]
    labels += {label.text: label for label in reversed(lines)}.values()
    points = panel.transData.transform(np.concatenate(places))
    half = (art.size.marker / 2 + 1.5) * _pixels_per_point(panel)
    markers = np.hstack([points - half, points + half])
    chosen = place([label.spots for label in labels], markers, _line_points(panel), _frame(panel))
    for label, spot in zip(labels, chosen, strict=True):
        if spot is not None:
            _write(panel, label, spot, art)


def _point_labels(panel: Axes, cells: pd.DataFrame, x: str, y: str, art: _Art, addition: str = "") -> list[_Label]:
    leftwards = find_metric(x).better == "lower"
    labels: list[_Label] = []
    for _, cell in cells.iterrows():
        style: Style = method_style(cell["method"])
        name = variant_name(cell["method"], cell.get("variant", cell["method"]))
        text = textwrap.fill(f"{name} {short_schedule(cell['schedule'])}{addition}", _LABEL_CHARACTERS)
        at = (float(cell[find_metric(x).column]), float(cell[find_metric(y).column]))
        point = panel.transData.transform(at)
        near = 8 * _pixels_per_point(panel)
        if any(text == other.text and np.hypot(*(panel.transData.transform(other.at) - point)) < near
               for other in labels):  # fmt: skip
            continue  # the same cell of another run
        spots = spots_around(point, _text_size(panel, text, art), _pixels_per_point(panel), leftwards=leftwards)
        labels.append(_Label(text, at, art.theme.shade(art.theme.method(style), 0.4), spots))
    return labels


def _line_label(panel: Axes, axis: int, value: float, name: str, art: _Art) -> _Label:
    """The unreduced model's value of metric `name`, for the line along `axis` (0 horizontal, 1 vertical)."""
    text = f"unreduced: {_value(name, value)}"
    at = (value, panel.get_ylim()[0]) if axis else (panel.get_xlim()[0], value)
    line = panel.transData.transform(at)[1 - axis]
    size = _text_size(panel, text, art)
    spots = spots_along(line, axis, size[::-1] if axis else size, _frame(panel), gap=3 * _pixels_per_point(panel))
    return _Label(text, at, art.theme.muted, spots, rotation=90 * axis)


def _write(panel: Axes, label: _Label, spot: Spot, art: _Art) -> None:
    offset = (spot.center - panel.transData.transform(label.at)) / _pixels_per_point(panel)
    line = {"arrowstyle": "-", "color": label.color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
    panel.annotate(
        label.text, label.at, tuple(offset), textcoords="offset points", ha="center", va="center", zorder=6,
        color=label.color, fontsize=art.size.label, rotation=label.rotation, path_effects=art.halo,
        arrowprops=line if len(spot.leader) else None,
    )  # fmt: skip


def _value(name: str, value: float) -> str:
    metric = find_metric(name)
    unit = _UNITS.get(name, "")
    number = f"{value:.3g}" if name == "gflops" else f"{value:,.{1 if unit == ' %' else metric.digits}f}"
    return number + unit


def _round_up(value: float) -> float:
    """To one digit, upwards."""
    step = 10.0 ** np.floor(np.log10(value))
    return float(np.ceil(value / step) * step)


def _text_size(panel: Axes, text: str, art: _Art) -> np.ndarray:
    """(2,) width and height in pixels of a label's text, upright, with a little room around it."""
    drawn = panel.text(0, 0, text, fontsize=art.size.label)
    extent = drawn.get_window_extent()
    drawn.remove()
    return np.array([extent.width, extent.height]) + 2 * _pixels_per_point(panel)


def _frame(panel: Axes) -> np.ndarray:
    return np.asarray(panel.get_window_extent().extents)


def _pixels_per_point(panel: Axes) -> float:
    figure = panel.get_figure(root=True)
    assert figure is not None, "labels are placed on panels of a figure"
    return figure.dpi / 72


def _line_points(panel: Axes) -> np.ndarray:
    """Points every few pixels along all lines and error bars of the panel, (n, 2) in pixels."""
    paths = [np.asarray(line.get_path().transformed(line.get_transform()).vertices) for line in panel.lines]
    bars = [collection for collection in panel.collections if isinstance(collection, LineCollection)]
    paths += [panel.transData.transform(segment) for collection in bars for segment in collection.get_segments()]
    return np.concatenate([np.empty((0, 2)), *(sampled(path) for path in paths if np.isfinite(path).all())])
