"""One panel of a plot: what is drawn in it, how equal costs are moved apart, and where its labels go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.markers import TICKUP
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from tokbench.report.canvas import RC
from tokbench.report.labels import Spot, place, sampled, spots_along, spots_around
from tokbench.report.metrics import METRICS, comparable, find_metric, nonfinite
from tokbench.report.styles import STYLES, Style, Theme, blend, broken, method_style, short_schedule, variant_name

_UNITS = {
    **dict.fromkeys(("top1", "top5", "agreement", "method_share"), " %"),
    **dict.fromkeys((name for name in METRICS if name.startswith("gflops")), " GFLOPs"),
    **dict.fromkeys(("latency", "latency_p95"), " ms"),
    "throughput": " images/s", "speedup": "×", "latency_speedup": "×", "memory": " MiB",
}  # fmt: skip
_LABEL_CHARACTERS = 36  # in a line
HALOS = True  # a rim of background around labels; in SVG it turns text into shapes
_FILLS = ("full", "none", "left", "right", "bottom", "top")  # of markers: the method as it is, then with parameters
DASHES: tuple[Any, ...] = ("-", (0, (3, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))


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


@dataclass(frozen=True)
class Art:
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


def draw_panel(panel: Axes, group: pd.DataFrame, x: str, y: str, art: Art, *, first: bool) -> None:
    """Draw the cells of one panel, all but their labels. group: with a column `front`. first: it has the y label."""
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
    for cells in comparable(group[group["front"]], x, y):
        _draw_front(panel, cells, x, y, art)
    for axis, value in _references(group, x, y):
        dashes: dict[str, Any] = {"color": art.theme.muted, "linewidth": 0.9, "linestyle": (0, (4, 3)), "zorder": 1.5}
        (panel.axvline if axis else panel.axhline)(value, **dashes)
    for series in _series(group, art):
        _draw_series(panel, series, x, y)
    _ring_front(panel, group, x, y, art)
    broken = group[nonfinite(group)]
    if len(broken):
        panel.plot(broken[horizontal.column], broken[vertical.column], **broken_marks(art), zorder=5.5)
    panel.margins(0.11, 0.06)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=8 if art.size.text else 6, steps=[1, 2, 5, 10]))


def side_by_side(group: pd.DataFrame, x: str, art: Art) -> pd.DataFrame:
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
    if every.max() == every.min():
        return group
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


def _axis_name(name: str, art: Art, direction: str) -> str:
    label = find_metric(name).label
    if name == "gflops":
        label = f"{label} (multiply-adds)"
    return f"{label}\n{direction}" if art.size.text else label


def scale_y(panel: Axes, group: pd.DataFrame, y: str, linear: bool) -> None:
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


def _draw_front(panel: Axes, cells: pd.DataFrame, x: str, y: str, art: Art) -> None:
    front = cells.sort_values(find_metric(x).column)
    panel.plot(
        front[find_metric(x).column], front[find_metric(y).column],
        solid_joinstyle="round", zorder=1, **art.front,
    )  # fmt: skip


def _ring_front(panel: Axes, group: pd.DataFrame, x: str, y: str, art: Art) -> None:
    for series in _series(group[group["front"] & ~group["is_baseline"]], art):
        cells = series.cells
        marks = {**series.marks, "markersize": series.marks["markersize"] * 1.25, "linestyle": "none"}
        marks |= {"markeredgecolor": art.theme.ink, "markeredgewidth": 0.2 * art.size.marker}
        panel.plot(cells[find_metric(x).column], cells[find_metric(y).column], **marks, zorder=series.zorder + 0.05)


def broken_marks(art: Art) -> dict[str, Any]:
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


def _series(group: pd.DataFrame, art: Art) -> Iterator[_Series]:
    ranks = variant_ranks(group)
    for (variant, run), cells in group.groupby(["variant", "run"], sort=False):
        place = list(art.runs).index(run) if run in art.runs else 0
        method = cells["method"].iloc[0]
        zorder = (3 if method == "none" else 4) - 0.1 * place  # the first run on top; the star is too large to vanish
        yield _Series(cells, series_marks(method, ranks[variant], place, art), method == "none", zorder)


def variant_ranks(df: pd.DataFrame) -> dict[str, int]:
    """0 for a method as it is, then 1, 2, … for each set of parameters it is given."""
    ranks = {}
    for method, cells in df.groupby("method", sort=False):
        changed = sorted(set(cells["variant"]) - {method})
        ranks.update({method: 0, **{variant: rank for rank, variant in enumerate(changed, 1)}})
    return ranks


def series_marks(method: str, rank: int, run: int, art: Art) -> dict[str, Any]:
    """Line and marker. Parameters change how a marker is filled; a further run is paler, smaller and dashed."""
    style, theme = method_style(method), art.theme
    color = theme.method(style)
    paler = min(0.5 * run, 0.75)
    line, edge = (blend(_hex(theme.shade(color, share)), theme.background, paler) for share in (0.15, 0.38))
    dashes = DASHES[(run if len(art.runs) > 1 else min(rank, 1)) % len(DASHES)]
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


def draw_published(panel: Axes, printed: pd.DataFrame, x: str, y: str, art: Art) -> None:
    """Lay printed points over a panel, each method joined to its unreduced model."""
    columns = [find_metric(x).column, find_metric(y).column]
    unreduced = printed[printed["method"] == "none"]
    for method, points in printed.groupby("method", sort=False):
        path = points if method == "none" else pd.concat([unreduced, points])
        panel.plot(*path[columns].to_numpy().T, linestyle=":", color=art.theme.muted, linewidth=1.0, zorder=2.5)
        panel.plot(*points[columns].to_numpy().T, **published_marks(str(method), art), zorder=3)


def published_marks(method: str, art: Art) -> dict[str, Any]:
    """Marker of a printed point: the method's, hollow and larger."""
    style = method_style(method)
    return {
        "linestyle": "none",
        "marker": style.marker,
        "markersize": 1.5 * art.size.marker * style.size,
        "markerfacecolor": "none",
        "markeredgecolor": art.theme.shade(art.theme.method(style), 0.15),
        "markeredgewidth": 0.2 * art.size.marker,
    }


@dataclass(frozen=True)
class _Label:
    text: str
    at: tuple[float, float]
    color: Any
    spots: list[Spot]
    rotation: int = 0
    slant: str = "normal"


def label_panel(panel: Axes, group: pd.DataFrame, x: str, y: str, art: Art, printed: pd.DataFrame | None) -> None:
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


def _point_labels(panel: Axes, cells: pd.DataFrame, x: str, y: str, art: Art, addition: str = "") -> list[_Label]:
    leftwards = find_metric(x).better == "lower"
    labels: list[_Label] = []
    for _, cell in cells.iterrows():
        style: Style = method_style(cell["method"])
        name = variant_name(cell["method"], cell.get("variant", cell["method"]))
        text = broken(f"{name} {short_schedule(cell['schedule'])}{addition}", _LABEL_CHARACTERS)
        at = (float(cell[find_metric(x).column]), float(cell[find_metric(y).column]))
        point = panel.transData.transform(at)
        near = 8 * _pixels_per_point(panel)
        # Of further runs in italics, as in the legend.
        slant = "italic" if cell.get("run") in list(art.runs)[1:] else "normal"
        same = [place for place, other in enumerate(labels) if other.text == text
                and np.hypot(*(panel.transData.transform(other.at) - point)) < near]  # fmt: skip
        if same:  # the same cell of another run
            labels[same[0]] = labels[same[0]] if slant == "italic" else replace(labels[same[0]], slant=slant)
            continue
        spots = spots_around(point, _text_size(panel, text, art), _pixels_per_point(panel), leftwards=leftwards)
        labels.append(_Label(text, at, art.theme.shade(art.theme.method(style), 0.4), spots, slant=slant))
    return labels


def _line_label(panel: Axes, axis: int, value: float, name: str, art: Art) -> _Label:
    """The unreduced model's value of metric `name`, for the line along `axis` (0 horizontal, 1 vertical)."""
    text = f"unreduced: {_value(name, value)}"
    at = (value, panel.get_ylim()[0]) if axis else (panel.get_xlim()[0], value)
    line = panel.transData.transform(at)[1 - axis]
    size = _text_size(panel, text, art)
    spots = spots_along(line, axis, size[::-1] if axis else size, _frame(panel), gap=3 * _pixels_per_point(panel))
    return _Label(text, at, art.theme.muted, spots, rotation=90 * axis)


def _write(panel: Axes, label: _Label, spot: Spot, art: Art) -> None:
    offset = (spot.center - panel.transData.transform(label.at)) / _pixels_per_point(panel)
    line = {"arrowstyle": "-", "color": label.color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
    panel.annotate(
        label.text, label.at, tuple(offset), textcoords="offset points", ha="center", va="center", zorder=6,
        color=label.color, fontsize=art.size.label, rotation=label.rotation, style=label.slant, path_effects=art.halo,
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


def _text_size(panel: Axes, text: str, art: Art) -> np.ndarray:
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
