"""Pareto plots: a panel per pair of metrics, a row of panels per set of comparable cells."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from tokbench.errors import UserError, nearest
from tokbench.report.labels import Spot, place, sampled, spots_along, spots_around
from tokbench.report.metrics import METRICS, comparable, find_metric, pareto_front

FORMATS = ("png", "svg", "pdf")
DEFAULT_X = ("gflops", "throughput")
Color = tuple[float, float, float]


@dataclass(frozen=True)
class Style:
    """How a method looks in every plot: the name papers use, an Okabe-Ito color, a marker and its relative size."""

    name: str
    color: str
    marker: str
    size: float = 1.0


STYLES: dict[str, Style] = {
    "none": Style("unreduced", "#000000", "*", 1.9),
    "tome": Style("ToMe", "#0072B2", "o"),
    "tofu": Style("ToFu", "#56B4E9", "s", 0.92),
    "mctf": Style("MCTF", "#D55E00", "^", 1.1),
    "mstm": Style("MSTM", "#F0E442", "D", 0.88),
    "evit": Style("EViT", "#009E73", "v", 1.1),
    "pitome": Style("PiToMe", "#CC79A7", "h", 1.15),
    "topk": Style("top-k", "#E69F00", "P", 1.15),
    "random": Style("random", "#999999", "X", 1.1),
}
# Methods registered by users take these in turn.
_SPARE = ("#6A3D9A", "#8C510A", "#01665E", "#B2182B"), ("p", "8", "<", ">")

_INK, _MUTED, _FRONT = "#222222", "#666666", "#222222"
_MARKER_PT, _FRONT_WIDTH_PT, _FRONT_ALPHA = 6.5, 10.0, 0.18
_LABEL_PT = 8.5
_HALO = [withStroke(linewidth=2.2, foreground="white")]
_RC: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "grid.color": "#E8E8E8",
    "grid.linewidth": 0.7,
    "pdf.fonttype": 42,
    "svg.hashsalt": "tokbench",
}


def plot_pareto(df: pd.DataFrame, out: str | Path, *, x: str | Sequence[str] | None = None, y: str = "top1") -> Path:
    """Draw y against each x for the cells of `metrics.load_table`; returns `out`.

    Args:
        out: the file; .png, .svg or .pdf.
        x: one or several metrics, a panel each; None means GFLOPs and images/s, as far as they were measured.
        y: a metric.

    Raises UserError for an unknown metric or suffix, and when no cell has both metrics of a panel.
    """
    out = Path(out)
    if out.suffix.lstrip(".") not in FORMATS:
        hint = nearest(out.suffix.lstrip("."), FORMATS)
        raise UserError(f"cannot draw to {out}: the suffix must be one of {', '.join(FORMATS)}.{hint}")
    names = _panels(df, x, y)
    both = [df[find_metric(name).column].notna() & df[find_metric(y).column].notna() for name in names]
    df = df[np.logical_or.reduce(both)]
    groups = comparable(df)
    with rc_context(_RC):
        figure = _draw(groups, names, y)
        metadata: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(out.suffix[1:], {})
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(out, dpi=200, metadata=metadata)
        except OSError as error:
            raise UserError(f"cannot write the plot {out}: {error.strerror}.") from error
    return out


def method_style(method: str, methods: Sequence[str] = ()) -> Style:
    """The method's fixed style; for one that is not among ours, a spare style by its place among such `methods`."""
    if method in STYLES:
        return STYLES[method]
    colors, markers = _SPARE
    place = sorted({name for name in methods if name not in STYLES} | {method}).index(method)
    return Style(method, colors[place % len(colors)], markers[place // len(colors) % len(markers)])


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


def _draw(groups: list[pd.DataFrame], names: list[str], y: str) -> Figure:
    width = 1.3 + 4.9 * len(names)
    figure = Figure(figsize=(width, 1.0 + 4.5 * len(groups)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(groups), len(names), squeeze=False, sharey="row")
    for row, group in zip(axes, groups, strict=True):
        _row_title(row[0], group)
        for panel, name in zip(row, names, strict=True):
            _panel(panel, group, name, y, first=panel is row[0])
        bottom, top = row[0].get_ylim()
        row[0].set_ylim(bottom, top + 0.14 * (top - bottom))  # room for the labels of the front
    _legend(figure, pd.concat(groups), names, y)
    # Labels are placed by their size on the page, so everything else has to be in its place before.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for row, group in zip(axes, groups, strict=True):
        for panel, name in zip(row, names, strict=True):
            _label(panel, group, name, y)
    return figure


def _row_title(panel: Axes, group: pd.DataFrame) -> None:
    first = group.iloc[0]
    images, batch = group["images"].dropna(), group["batch_size"].dropna()
    parts = [
        f"data {first['data']}" if pd.notna(first["data"]) else "",
        f"{images.max():,} images" if len(images) else "",
        f"{first['machine']} ({first['device']})" if pd.notna(first["machine"]) else str(first["device"] or ""),
        str(first["dtype"] or ""),
        f"batch {batch.max()}" if len(batch) else "",
    ]
    figure = panel.get_figure(root=True)
    assert figure is not None, "panels belong to a figure"
    per_line = int(figure.get_figwidth() * 72 / 5.6) - 16  # characters of this size beside the axis labels
    details = textwrap.wrap(" · ".join(part for part in parts if part), per_line)
    # The blank title keeps the height free; the texts stay out of the layout, or their width would push the panels
    # apart.
    panel.set_title("\n".join(" " * (2 + len(details))), loc="left", fontsize=10)
    lines: list[tuple[str, int, dict[str, Any]]] = [
        (f"{first['model']}: token fusion without training", 9 + 14 * len(details),
         {"fontsize": 12, "weight": "bold", "color": _INK}),
        ("\n".join(details), 8, {"fontsize": 9.5, "color": _MUTED, "linespacing": 1.3}),
    ]  # fmt: skip
    for text, height, font in lines:
        note = panel.annotate(text, (0, 1), (0, height), xycoords="axes fraction", textcoords="offset points", **font)
        note.set_in_layout(False)


def _panel(panel: Axes, group: pd.DataFrame, x: str, y: str, *, first: bool) -> None:
    horizontal, vertical = find_metric(x), find_metric(y)
    panel.grid(True)
    panel.set_axisbelow(True)
    better_x = "lower is better ←" if horizontal.better == "lower" else "higher is better →"
    panel.set_xlabel(f"{_axis_name(x, group)}\n{better_x}")
    if first:
        panel.set_ylabel(f"{vertical.label}\n{vertical.better} is better →")
    if vertical.better == "lower" and first:
        # Up is better in every plot.
        panel.invert_yaxis()
    _draw_front(panel, group, x, y)
    base = _baseline(group, x, y)
    if base:
        _reference_lines(panel, *base)
    methods = sorted(set(group["method"]))
    for variant in dict.fromkeys(group["variant"]):
        _draw_variant(panel, group[group["variant"] == variant], x, y, methods)
    _ring_front(panel, group, x, y, methods)
    panel.margins(0.11, 0.06)
    panel.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    panel.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))


def _baseline(group: pd.DataFrame, x: str, y: str) -> tuple[float, float] | None:
    """Where the unreduced model lies; the first run's, where several runs measured it."""
    columns = [find_metric(x).column, find_metric(y).column]
    cells = group[group["is_baseline"]].dropna(subset=columns)
    return None if cells.empty else (float(cells.iloc[0][columns[0]]), float(cells.iloc[0][columns[1]]))


def _axis_name(x: str, group: pd.DataFrame) -> str:
    label = find_metric(x).label
    if x == "gflops":
        return label.replace("GFLOPs per image", "GFLOPs per image (multiply-adds)")
    return label


def _draw_front(panel: Axes, group: pd.DataFrame, x: str, y: str) -> None:
    front = group[pareto_front(group, x, y)].sort_values(find_metric(x).column)
    panel.plot(
        front[find_metric(x).column], front[find_metric(y).column],
        color=_FRONT, alpha=_FRONT_ALPHA, linewidth=_FRONT_WIDTH_PT, solid_capstyle="round", solid_joinstyle="round",
        zorder=1,
    )  # fmt: skip


def _ring_front(panel: Axes, group: pd.DataFrame, x: str, y: str, methods: Sequence[str]) -> None:
    for _, cell in group[pareto_front(group, x, y) & ~group["is_baseline"]].iterrows():
        marks = _marks(method_style(cell["method"], methods), cell["variant"] == cell["method"])
        marks |= {"markeredgecolor": "black", "markeredgewidth": 1.3, "markersize": marks["markersize"] * 1.25}
        panel.plot(cell[find_metric(x).column], cell[find_metric(y).column], **marks, zorder=4.5)


def _draw_variant(panel: Axes, cells: pd.DataFrame, x: str, y: str, methods: Sequence[str]) -> None:
    first = cells.iloc[0]
    style = method_style(first["method"], methods)
    horizontal, vertical = find_metric(x), find_metric(y)
    plain = first["variant"] == first["method"]
    cells = cells.dropna(subset=[horizontal.column, vertical.column]).sort_values(horizontal.column)
    xs, ys = cells[horizontal.column], cells[vertical.column]
    if not first["is_baseline"]:
        panel.errorbar(
            xs, ys, xerr=_bars(cells, x), yerr=_bars(cells, y), fmt="none",
            ecolor=_shade(style.color, 0.85), elinewidth=0.9, alpha=0.6, zorder=2,
        )  # fmt: skip
    panel.plot(xs, ys, **_marks(style, plain), zorder=5 if first["is_baseline"] else 4)


def _marks(style: Style, plain: bool) -> dict[str, Any]:
    """Line and marker of a method; one with parameters changed is hollow and dashed."""
    edge = _shade(style.color, 0.62)
    return {
        "color": _shade(style.color, 0.85),
        "linewidth": 1.1,
        "linestyle": "none" if style.marker == "*" else "-" if plain else (0, (3, 2)),
        "marker": style.marker,
        "markersize": _MARKER_PT * style.size,
        "markerfacecolor": style.color if plain else "white",
        "markeredgecolor": edge if plain else _shade(style.color, 0.85),
        "markeredgewidth": 0.7 if plain else 1.4,
    }


def _bars(cells: pd.DataFrame, name: str) -> np.ndarray | None:
    """Distances to the interval's ends, (2, n); zero where there is no interval."""
    metric = find_metric(name)
    if not metric.low:
        return None
    middle, low, high = (cells[column].to_numpy(float) for column in (metric.column, metric.low, metric.high))
    return np.nan_to_num(np.clip([middle - low, high - middle], 0, None))


def _shade(color: str, factor: float) -> Color:
    red, green, blue = to_rgb(color)
    return red * factor, green * factor, blue * factor


def _legend(figure: Figure, df: pd.DataFrame, names: list[str], y: str) -> None:
    methods = sorted(set(df["method"]))
    handles: list[Any] = []
    labels: list[str] = []
    order = [*STYLES, *methods]
    variants = df.drop_duplicates("variant")
    for _, cell in sorted(variants.iterrows(), key=lambda item: order.index(item[1]["method"])):
        style = method_style(cell["method"], methods)
        handles.append(Line2D([], [], **_marks(style, cell["variant"] == cell["method"])))
        labels.append(style.name + cell["variant"].removeprefix(cell["method"]).replace(":", "\n", 1))
    band = Line2D([], [], color=_FRONT, alpha=_FRONT_ALPHA, linewidth=_FRONT_WIDTH_PT, solid_capstyle="round")
    ring = Line2D([], [], marker="o", linestyle="none", markerfacecolor="white", color="black")
    handles.append((band, ring))
    labels.append("Pareto front")
    figure.legend(handles, labels, loc="outside right center", frameon=False, handlelength=2.2, labelspacing=0.75)
    figure.supxlabel(_footnote(df, names, y), x=0.01, ha="left", fontsize=8, color=_MUTED)


def _footnote(df: pd.DataFrame, names: list[str], y: str) -> str:
    notes = ["Pareto front: no other cell is as good in both metrics and better in one."]
    if y in ("top1", "drop") and df["drop_low"].notna().any():
        notes.append("Vertical bars: 95 % interval of the difference from the unreduced model on the same images.")
    if any(find_metric(name).low for name in names):
        notes.append("Horizontal bars: 95 % interval over timing rounds.")
    return "\n".join(notes)


def _reference_lines(panel: Axes, at_x: float, at_y: float) -> None:
    dashes: dict[str, Any] = {"color": _MUTED, "linewidth": 0.9, "linestyle": (0, (4, 3)), "zorder": 1.5}
    panel.axhline(at_y, **dashes)
    panel.axvline(at_x, **dashes)


@dataclass(frozen=True)
class _Label:
    text: str
    at: tuple[float, float]
    color: Any
    spots: list[Spot]
    rotation: int = 0


def _label(panel: Axes, group: pd.DataFrame, x: str, y: str) -> None:
    """Name the members of the front and the reference lines, where there is room."""
    columns = [find_metric(x).column, find_metric(y).column]
    cells = group.dropna(subset=columns)
    labels = _front_labels(panel, cells, x, y)
    base = _baseline(cells, x, y)
    if base:
        labels += [_line_label(panel, base, axis, name) for axis, name in enumerate((y, x))]
    points = panel.transData.transform(cells[columns].to_numpy(float))
    half = (_MARKER_PT / 2 + 1.5) * _pixels_per_point(panel)
    markers = np.hstack([points - half, points + half])
    chosen = place([label.spots for label in labels], markers, _line_points(panel), _frame(panel))
    for label, spot in zip(labels, chosen, strict=True):
        if spot is not None:
            _write(panel, label, spot)


def _front_labels(panel: Axes, cells: pd.DataFrame, x: str, y: str) -> list[_Label]:
    leftwards = find_metric(x).better == "lower"
    methods = sorted(set(cells["method"]))
    labels = []
    front = cells[pareto_front(cells, x, y) & ~cells["is_baseline"]]
    # The end of the front first: it has the frame beside it, so the fewest spots to choose from.
    for _, cell in front.sort_values(find_metric(x).column, ascending=leftwards).iterrows():
        style = method_style(cell["method"], methods)
        text = f"{style.name} {short_schedule(cell['schedule'])}"
        at = (float(cell[find_metric(x).column]), float(cell[find_metric(y).column]))
        point = panel.transData.transform(at)
        spots = spots_around(point, _text_size(panel, text), _pixels_per_point(panel), leftwards=leftwards)
        labels.append(_Label(text, at, _shade(style.color, 0.6), spots))
    return labels


def _line_label(panel: Axes, base: tuple[float, float], axis: int, name: str) -> _Label:
    """The unreduced model's value of metric `name`, for the line along `axis` (0 horizontal, 1 vertical)."""
    text = f"unreduced: {_value(name, base[1 - axis])}"
    line = panel.transData.transform(base)[1 - axis]
    size = _text_size(panel, text)
    spots = spots_along(line, axis, size[::-1] if axis else size, _frame(panel), gap=3 * _pixels_per_point(panel))
    return _Label(text, base, _MUTED, spots, rotation=90 * axis)


def _write(panel: Axes, label: _Label, spot: Spot) -> None:
    offset = (spot.center - panel.transData.transform(label.at)) / _pixels_per_point(panel)
    line = {"arrowstyle": "-", "color": label.color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}
    panel.annotate(
        label.text, label.at, tuple(offset), textcoords="offset points", ha="center", va="center", zorder=6,
        color=label.color, fontsize=_LABEL_PT, rotation=label.rotation, path_effects=_HALO,
        arrowprops=line if len(spot.leader) else None,
    )  # fmt: skip


def short_schedule(schedule: str) -> str:
    """A schedule as a plot's label: `constant:13` is "r=13", `keep:0.7@3,6,9` is "keep 0.7"."""
    kind, _, rest = schedule.rpartition(":")
    if kind in ("", "constant"):
        return f"r={rest}"
    return kind if kind == "list" else f"{kind} {rest.partition('@')[0]}"


def _value(name: str, value: float) -> str:
    metric = find_metric(name)
    unit = {"top1": " %", "top5": " %", "agreement": " %", "gflops": " GFLOPs", "throughput": " images/s"}
    number = f"{value:.3g}" if name == "gflops" else f"{value:,.{1 if unit.get(name) == ' %' else metric.digits}f}"
    return number + unit.get(name, "")


def _text_size(panel: Axes, text: str) -> np.ndarray:
    """(2,) width and height in pixels of a label's text, upright, with a little room around it."""
    drawn = panel.text(0, 0, text, fontsize=_LABEL_PT)
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
    return np.concatenate([np.empty((0, 2)), *(sampled(path) for path in paths)])
