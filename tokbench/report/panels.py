"""Drawing one panel of a plot: markers, bars and fronts, the axes, and the labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from tokbench.report import canvas  # noqa: F401  # before matplotlib

# isort: split
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.markers import TICKUP
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from tokbench.report.labels import Spot, place, sampled, spots_along, spots_around
from tokbench.report.published import Published
from tokbench.report.scene import Point, Scene
from tokbench.report.styles import Theme, blend, method_style
from tokbench.report.text import broken, number, short_schedule, variant_name
from tokbench.results.cell import Cell, Figure
from tokbench.results.metrics import METRICS
from tokbench.results.table import group_by

MOST_LABELS = 30  # per panel: more take minutes to place, and nobody reads them
_LABEL_CHARACTERS = 36  # per line
_FILLS = ("full", "none", "left", "right", "bottom", "top")  # of markers: the method's defaults, then with parameters
DASHES: tuple[Any, ...] = ("-", (0, (3, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))


@dataclass(frozen=True)
class Size:
    """Sizes of a figure in inches, and of fonts in points.

    Attributes:
        panel: width of a panel; None if the figure's width is fixed.
        width: of the figure; of the legend if panels have a width.
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

    @property
    def dpi(self) -> int:
        return 200 if self.text else 300

    @property
    def marker_share(self) -> float:
        """A marker's width as a share of that of a panel, roughly."""
        return 1.22 * self.marker / (72 * (self.panel or self.width) * 0.85)


@dataclass(frozen=True)
class Art:
    """The style shared by all parts of a figure.

    Attributes:
        cells: all that are drawn; each of a method's sets of parameters among them gets its own marker.
        runs: the overlaid runs, with their names in the legend.
    """

    size: Size
    theme: Theme
    cells: Sequence[Cell] = ()
    runs: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def ranks(self) -> dict[str, int]:
        """By variant: 0 for a method's defaults, then 1, 2, … for each set of parameters."""
        ranks: dict[str, int] = {}
        for group in group_by(self.cells, lambda cell: cell.method):
            method = group[0].method
            changed = sorted({cell.variant for cell in group} - {method})
            ranks |= {variant: rank for rank, variant in enumerate([method, *changed])}
        return ranks

    def place(self, run: str) -> int:
        """0 for the first of the overlaid runs, then 1, 2, …; 0 for a single run."""
        return list(self.runs).index(run) if run in self.runs else 0

    def slant(self, run: str) -> str:
        """Further runs are named in italics."""
        return "italic" if self.place(run) else "normal"

    @property
    def front(self) -> dict[str, Any]:
        width = 10.0 * self.size.marker / 6.5
        return {"color": self.theme.ink, "alpha": 0.18, "linewidth": width, "solid_capstyle": "round"}

    @property
    def unsearched_front(self) -> dict[str, Any]:
        return {"color": self.theme.ink, "alpha": 0.45, "linewidth": 0.3 * self.size.marker, "linestyle": ":"}

    @property
    def broken(self) -> dict[str, Any]:
        """A cross over a cell whose logits were NaN or infinite for some image."""
        size = self.size.marker
        return _marker("x", 1.5 * size, 0.22 * size, self.theme.ink)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of matplotlib."""
        return {"font.size": self.size.font, "grid.linewidth": 0.7, "axes.spines.top": False,
                "axes.spines.right": False}  # fmt: skip

    @cached_property
    def searched(self) -> bool:
        """Whether searched schedules are drawn: these are filled, and others hollow."""
        return any(cell.is_searched for cell in self.cells)

    def marks(self, cell: Cell) -> dict[str, Any]:
        """Line and marker of a cell's series."""
        hollow = self.searched and not (cell.is_searched or cell.is_baseline)
        return self.series(cell.variant, cell.method, self.place(cell.run), hollow)

    def series(self, variant: str, method: str, place: int, hollow: bool = False) -> dict[str, Any]:
        """Line and marker. Parameters change how a marker is filled; a further run is paler, smaller and dashed."""
        style, theme, rank = method_style(method), self.theme, self.ranks.get(variant, 0)
        color, size = theme.method(style), self.size.marker
        paler = min(0.5 * place, 0.75)
        line, edge = (blend(theme.shade(color, share), theme.background, paler) for share in (0.15, 0.38))
        dashes = DASHES[(place if len(self.runs) > 1 else min(rank, 1) + 2 * hollow) % len(DASHES)]
        is_empty = hollow or rank % len(_FILLS) == 1
        return {
            "color": line,
            "linewidth": 0.17 * size,
            "linestyle": "none" if method == "none" else dashes,
            "marker": style.marker,
            "markersize": size * style.size * (0.85 if place else 1),
            "fillstyle": _FILLS[rank % len(_FILLS)],
            "markerfacecolor": theme.background if is_empty else blend(color, theme.background, paler),
            "markerfacecoloralt": theme.background,
            "markeredgecolor": line if rank or hollow else edge,
            "markeredgewidth": (0.2 if rank or hollow else 0.11) * size,
        }

    def published(self, method: str) -> dict[str, Any]:
        """Marker of a printed point: the method's, hollow and larger."""
        style, size = method_style(method), self.size.marker
        color = self.theme.shade(self.theme.method(style), 0.15)
        return _marker(style.marker, 1.5 * size * style.size, 0.2 * size, color) | {"markerfacecolor": "none"}


def _marker(marker: Any, size: float, edge: float, color: Any) -> dict[str, Any]:
    return {"linestyle": "none", "marker": marker, "markersize": size, "markeredgewidth": edge, "color": color}


def draw_panel(panel: Axes, shown: Scene, art: Art, *, first: bool) -> None:
    """Draw all of a panel but its labels. first: it has the y label."""
    horizontal, vertical = METRICS[shown.x], METRICS[shown.y]
    panel.grid(True)
    panel.set_axisbelow(True)
    name = _axis_name(shown.x, art, "lower is better ←" if horizontal.better == "lower" else "higher is better →")
    panel.set_xlabel(name + _draw_equal(panel, shown, art))
    if first:
        panel.set_ylabel(_axis_name(shown.y, art, f"{vertical.better} is better →"))
    if vertical.better == "lower" and first:
        # Up is better in every plot.
        panel.invert_yaxis()
    for front in shown.fronts():
        panel.plot(*_at(front), solid_joinstyle="round", zorder=1, **art.front)
    for front in shown.fronts(searched=False) if art.searched else ():
        panel.plot(*_at(front), zorder=1.2, **art.unsearched_front)
    for axis, figure in shown.references():
        dashes: dict[str, Any] = {"color": art.theme.muted, "linewidth": 0.9, "linestyle": (0, (4, 3)), "zorder": 1.5}
        (panel.axvline if axis else panel.axhline)(figure.value, **dashes)
    for points in group_by(shown.points, lambda point: (point.cell.variant, point.cell.run, point.cell.is_searched)):
        _draw_series(panel, points, art)
    _draw_bars(panel, shown, art)
    crossed = [point for point in shown.points if point.cell.is_broken]
    if crossed:
        panel.plot(*_at(crossed), **art.broken, zorder=5.5)
    panel.margins(0.11, 0.06)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=8 if art.size.text else 6, steps=[1, 2, 5, 10]))


def _at(points: Iterable[Point]) -> tuple[list[float], list[float]]:
    places = [(point.x.value, point.y.value) for point in points]
    return [x for x, _ in places], [y for _, y in places]


def _draw_equal(panel: Axes, shown: Scene, art: Art) -> str:
    """Draw bands and ticks where cells were moved aside; returns the axis's note on it."""
    equal, ink = shown.equal, art.theme.ink
    if equal is None:
        return ""
    ticks = _marker(TICKUP, art.size.marker, 0.6, ink)
    panel.plot(equal.measured, np.zeros(len(equal.measured)), **ticks, transform=panel.get_xaxis_transform())
    for low, high in equal.bands:
        panel.axvspan(low, high, color=art.theme.grid, alpha=0.5, linewidth=0, zorder=0.5)
    shift = f"{_round_up(equal.shift):g}{METRICS[shown.x].unit}"
    return f"\n(equal costs moved aside, up to ±{shift};\nticks: as measured)"


def _axis_name(name: str, art: Art, direction: str) -> str:
    label = METRICS[name].label
    if name == "gflops":
        label = f"{label} (multiply-adds)"
    return f"{label}\n{direction}" if art.size.text else label


def _draw_series(panel: Axes, points: Sequence[Point], art: Art) -> None:
    """The cells of one method with one set of parameters in one run."""
    cell, points = points[0].cell, sorted(points, key=lambda point: point.x.value)
    marks = art.marks(cell)
    # The first run on top; the star is too large to vanish.
    zorder = (3 if cell.is_baseline else 4) - 0.1 * art.place(cell.run)
    panel.plot(*_at(points), **marks, zorder=zorder)
    front = [point for point in points if point.on_front and not cell.is_baseline]
    if front:
        ring = {"markersize": marks["markersize"] * 1.25, "markeredgewidth": 0.2 * art.size.marker}
        marks |= {**ring, "linestyle": "none", "markeredgecolor": art.theme.ink}
        panel.plot(*_at(front), **marks, zorder=zorder + 0.05)


def _draw_bars(panel: Axes, shown: Scene, art: Art) -> None:
    """Draw error bars; long ones are cut and end in an arrow head."""
    points = [point for point in shown.points if not point.cell.is_baseline]
    colors = {point.cell: art.marks(point.cell)["color"] for point in points}
    width: float = 0.136 * art.size.marker
    look: dict[str, Any] = {"alpha": 0.6, "zorder": 2}
    if points:
        across = bars_within([point.x for point in points], shown.reach[0])
        up = bars_within([point.y for point in points], shown.reach[1])
        bars: dict[str, Any] = {"ecolor": list(colors.values()), "elinewidth": width, **look}
        panel.errorbar(*_at(points), xerr=across, yerr=up, fmt="none", **bars)
    for axis, heads in enumerate(("<>", "^v" if METRICS[shown.y].better == "lower" else "v^")):
        for side, head in enumerate(heads):
            cut = shown.cut(axis, side)
            ends = list(_at(cut))
            ends[axis] = [shown.reach[axis][side]] * len(cut)
            sizes, paint = (6 * width) ** 2, [colors[point.cell] for point in cut]
            panel.scatter(ends[0], ends[1], sizes, paint, marker=head, linewidths=0, **look)


def bars_within(figures: Sequence[Figure], reach: tuple[float, float]) -> np.ndarray:
    """Distances to the interval's ends (2, n), no farther than `reach`; zero where there is no interval."""
    ends = [figure.interval or (figure.value, figure.value) for figure in figures]
    low, high = np.clip(np.array(ends).T, *reach)
    values = np.array([figure.value for figure in figures])
    return np.clip([values - low, high - values], 0, None)


def draw_published(panel: Axes, printed: Sequence[Published], x: str, y: str, art: Art) -> None:
    """Lay printed points over a panel, each method joined to its unreduced model."""

    def at(rows: Sequence[Published]) -> tuple[list[float], list[float]]:
        return [row.values[x] for row in rows], [row.values[y] for row in rows]

    unreduced = [row for row in printed if row.method == "none"]
    for rows in group_by(printed, lambda row: row.method):
        path = rows if rows[0].method == "none" else [*unreduced, *rows]
        panel.plot(*at(path), linestyle=":", color=art.theme.muted, linewidth=1.0, zorder=2.5)
        panel.plot(*at(rows), **art.published(rows[0].method), zorder=3)


def scale_y(panel: Axes, cells: Sequence[Cell], y: str, linear: bool) -> None:
    """Set limits, ticks and, if a few cells fall far behind, a scale that leaves the others room."""
    bases = [figure.value for cell in cells if cell.is_baseline and (figure := cell[y])]
    values = [figure.value for cell in cells if not cell.is_baseline and (figure := cell[y])]
    unit = 0.0 if linear or not bases else _stretch_unit(np.array(values) - bases[0], y)
    if unit:
        base = bases[0]
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
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
        panel.set_ylabel(panel.get_ylabel() + "\n(stretched scale)")
    else:
        panel.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    panel.set_ylim(*limits)


def _stretch_unit(gaps: np.ndarray, y: str) -> float:
    """The points near the unreduced model that a stretched axis draws about linearly; 0 where none is needed."""
    if not METRICS[y].of_images or len(gaps) < 6:
        return 0.0
    most, near = abs(gaps).max(), np.quantile(abs(gaps), 0.7)
    return max(float(near) / 2, 0.5) if most > 8 and most > 5 * near else 0.0


def _spread_ticks(low: float, high: float, base: float, to_axis: Any) -> list[float]:
    """Tick values for a scale stretched around `base`; the farther from it, the rounder."""
    room = 0.065 * abs(np.diff(to_axis.transform(np.array([low, high])))[0])
    ticks: list[float] = []
    for step in (50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1):
        for tick in np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step:
            there = to_axis.transform(np.array([*ticks, tick]))
            if abs(tick - base) < 5 * step and (abs(there[:-1] - there[-1]) > room).all():
                ticks.append(round(float(tick), 6) + 0.0)  # no −0
    return sorted(ticks)


@dataclass(frozen=True)
class _Label:
    text: str
    at: tuple[float, float]
    color: Any
    spots: list[Spot]
    rotation: int = 0
    slant: str = "normal"


def named_points(shown: Scene) -> list[Point]:
    """The members of the front to label; if there are too many, a few spread over it."""
    front = [point for point in shown.points if point.on_front and not point.cell.is_baseline]
    # The end of the front first: next to the frame it has the fewest spots to choose from.
    front.sort(key=lambda point: point.x.value, reverse=METRICS[shown.x].better == "higher")
    chosen = np.linspace(0, len(front) - 1, min(len(front), MOST_LABELS)).round().astype(int)
    return [front[index] for index in chosen]


def label_panel(panel: Axes, shown: Scene, art: Art, printed: Sequence[Published]) -> None:
    """Label the members of the front, published points and reference lines, where there is room."""
    x, y = shown.x, shown.y
    labels: list[_Label] = []
    for point in named_points(shown):
        cell, at = point.cell, (point.x.value, point.y.value)
        text = f"{variant_name(cell.method, cell.variant)} {short_schedule(cell.schedule)}"
        _add_label(labels, panel, text, at, cell.method, art.slant(cell.run), x, art)
    for row in printed:
        if row.method != "none":
            text = f"{variant_name(row.method, row.method)} {short_schedule(row.schedule)}, published"
            _add_label(labels, panel, text, (row.values[x], row.values[y]), row.method, "normal", x, art)
    lines = [_line_label(panel, axis, figure.value, x if axis else y, art) for axis, figure in shown.references()]
    labels += {label.text: label for label in reversed(lines)}.values()
    places = [*zip(*_at(shown.points), strict=True), *((row.values[x], row.values[y]) for row in printed)]
    points = panel.transData.transform(np.array(places))
    half = (art.size.marker / 2 + 1.5) * _pixels_per_point(panel)
    markers = np.hstack([points - half, points + half])
    chosen = place([label.spots for label in labels], markers, _line_points(panel), _frame(panel))
    for label, spot in zip(labels, chosen, strict=True):
        if spot is not None:
            _write(panel, label, spot, art)


def _add_label(
    labels: list[_Label], panel: Axes, text: str, at: tuple[float, float], method: str, slant: str, x: str, art: Art
) -> None:
    """Add a label, or let an existing one name the same cell of another run."""
    text, point, scale = broken(text, _LABEL_CHARACTERS), panel.transData.transform(at), _pixels_per_point(panel)
    for index, other in enumerate(labels):
        if other.text == text and np.hypot(*(panel.transData.transform(other.at) - point)) < 8 * scale:
            labels[index] = replace(other, slant="normal" if "normal" in (slant, other.slant) else "italic")
            return
    leftwards = METRICS[x].better == "lower"
    spots = spots_around(point, _text_size(panel, text, art), scale, leftwards=leftwards)
    labels.append(_Label(text, at, art.theme.shade(art.theme.method(method_style(method)), 0.4), spots, slant=slant))


def _line_label(panel: Axes, axis: int, value: float, name: str, art: Art) -> _Label:
    """The unreduced model's value of metric `name`, for the line along `axis` (0 horizontal, 1 vertical)."""
    text = f"unreduced: {number(value, METRICS[name].digits_for(None))}{METRICS[name].unit}"
    at = (value, panel.get_ylim()[0]) if axis else (panel.get_xlim()[0], value)
    line = panel.transData.transform(at)[1 - axis]
    size = _text_size(panel, text, art)
    spots = spots_along(line, axis, size[::-1] if axis else size, _frame(panel), gap=3 * _pixels_per_point(panel))
    return _Label(text, at, art.theme.muted, spots, rotation=90 * axis)


def _write(panel: Axes, label: _Label, spot: Spot, art: Art) -> None:
    offset = (spot.center - panel.transData.transform(label.at)) / _pixels_per_point(panel)
    line = {"arrowstyle": "-", "color": label.color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
    halo = [withStroke(linewidth=2.2, foreground=art.theme.background)]
    panel.annotate(
        label.text, label.at, tuple(offset), textcoords="offset points", ha="center", va="center", zorder=6,
        color=label.color, fontsize=art.size.label, rotation=label.rotation, style=label.slant, path_effects=halo,
        arrowprops=line if len(spot.leader) else None,
    )  # fmt: skip


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
    return panel.figure.dpi / 72


def _line_points(panel: Axes) -> np.ndarray:
    """Points every few pixels along all lines and error bars of the panel, (n, 2) in pixels."""
    paths = [np.asarray(line.get_path().transformed(line.get_transform()).vertices) for line in panel.lines]
    bars = [collection for collection in panel.collections if isinstance(collection, LineCollection)]
    paths += [panel.transData.transform(segment) for collection in bars for segment in collection.get_segments()]
    return np.concatenate([np.empty((0, 2)), *(sampled(path) for path in paths if np.isfinite(path).all())])
