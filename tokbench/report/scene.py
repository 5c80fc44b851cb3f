"""What a panel shows, decided before anything is drawn: its cells, the front, and how far bars may go."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean, median

from tokbench.report.styles import method_order
from tokbench.results.cell import Cell, Figure
from tokbench.results.metrics import METRICS
from tokbench.results.table import Rivals, comparable, group_by, pareto_front


@dataclass(frozen=True)
class Point:
    """A cell where it is drawn; `x` may be moved aside, see `side_by_side`."""

    cell: Cell
    x: Figure
    y: Figure
    on_front: bool


@dataclass(frozen=True)
class Equal:
    """Costs that several cells share.

    Attributes:
        bands: (low, high) of each such cost, as wide as its cells are spread.
        measured: the costs before cells were moved.
        shift: how far the farthest was moved.
    """

    bands: list[tuple[float, float]]
    measured: list[float]
    shift: float


@dataclass(frozen=True)
class Scene:
    """The cells of one panel.

    Attributes:
        x, y: names of metrics.
        cells: those with both metrics, and the unreduced models of their runs, which may have one only.
        points: the cells with both.
        reach: how far error bars may go along x and along y, (low, high) each.
        equal: set where cells were moved aside.
    """

    x: str
    y: str
    cells: list[Cell]
    points: list[Point]
    reach: tuple[tuple[float, float], tuple[float, float]]
    equal: Equal | None = None

    def fronts(self, searched: bool = True) -> list[list[Point]]:
        """The members of each front, from low to high x. searched: whether searched cells count."""
        of = {point.cell: point for point in self.points}
        groups = comparable([cell for cell in self.cells if searched or not cell.is_searched], self.x, self.y)
        fronts = [[of[cell] for cell in Rivals(group).front(self.x, self.y)] for group in groups]
        return [sorted(points, key=lambda point: point.x.value) for points in fronts if points]

    def references(self) -> list[tuple[int, Figure]]:
        """The unreduced model of each run: (0, its y) for a horizontal line, (1, its x) for a vertical one."""
        runs = group_by((cell for cell in self.cells if cell.is_baseline), lambda cell: cell.run)
        lines = [(axis, cell[name]) for cell, *_ in runs for axis, name in enumerate((self.y, self.x))]
        return [(axis, figure) for axis, figure in lines if figure]

    def cut(self, axis: int, side: int) -> list[Point]:
        """The points whose error bars end too far along x (0) or y (1), at the low (0) or high (1) end."""
        limit, sign = self.reach[axis][side], (-1, 1)[side]
        return [
            point
            for point in self.points
            if not point.cell.is_baseline
            and (ends := (point.x, point.y)[axis].interval)
            and sign * ends[side] > sign * limit
        ]

    @property
    def has_cut(self) -> bool:
        """Whether any error bar is longer than drawn."""
        return any(self.cut(axis, side) for axis in (0, 1) for side in (0, 1))


def scene(cells: Sequence[Cell], x: str, y: str) -> Scene | None:
    """The panel of y against x for these cells of one model and data; None if it would be empty."""
    both = {cell: (across, up) for cell in cells if (across := cell[x]) and (up := cell[y])}
    if not both:
        return None
    runs = {cell.run for cell in both}
    shown = [cell for cell in cells if cell in both or (cell.is_baseline and cell.run in runs)]
    front = pareto_front(shown, x, y)
    points = [Point(cell, across, up, cell in front) for cell, (across, up) in both.items()]
    return Scene(x, y, shown, points, (bar_reach(shown, x), bar_reach(shown, y)))


def bar_reach(cells: Iterable[Cell], metric: str) -> tuple[float, float]:
    """The lowest and highest value that error bars may reach; longer ones are cut there.

    One bar many times longer than all others, or all of them many times longer than the values are spread, would
    press the markers together.
    """
    figures = [figure for cell in cells if (figure := cell[metric])]
    if not figures:
        return 0.0, 0.0
    low, high = min(figure.value for figure in figures), max(figure.value for figure in figures)
    lengths = [max(abs(end - figure.value) for end in figure.interval) for figure in figures if figure.interval]
    usual, spread = 2 * median([length for length in lengths if length] or [0.0]), high - low
    room = max(spread, min(usual, 4 * spread)) if spread else usual
    return low - room, high + room


def side_by_side(shown: Scene, marker: float) -> Scene:
    """The same with each method moved a little along x if most cells share their cost with several others.

    Markers and bars of cells at the same FLOPs would cover each other. The whole series moves, so its shape stays;
    the unreduced model stays where it is. marker: a marker's width as a share of the axis.
    """
    tie = METRICS[shown.x].tie
    moving = [point for point in shown.points if not point.cell.is_baseline]
    costs = sorted(point.x.value for point in moving)
    crowded = [
        cost for cost in costs if bisect_right(costs, cost * (1 + tie)) - bisect_left(costs, cost * (1 - tie)) > 2
    ]
    every = [figure.value for cell in shown.cells if (figure := cell[shown.x])]
    levels = _levels(costs, tie)
    columns = all(level[-1] <= level[0] * (1 + 5 * tie) for level in levels)  # not spread along the axis
    if not tie or 2 * len(crowded) <= len(costs) or not columns or max(every) == min(every):
        return shown
    order = method_order(point.cell.method for point in moving)
    series = sorted({_series(point.cell) for point in moving}, key=lambda key: (order.index(key[0]), key))
    middles = [fmean(level) for level in levels]
    gap = min(0.36, 4 / len(series)) * marker * (max(every) - min(every))
    gap = min([gap, *(0.9 * (after - before) / len(series) for before, after in pairwise(middles))])
    steps = {key: gap * (place - (len(series) - 1) / 2) for place, key in enumerate(series)}
    half = gap * len(series) / 2
    bands = [(min(level) - half, max(level) + half) for level in levels]
    points = [replace(point, x=_moved(point.x, steps.get(_series(point.cell), 0.0))) for point in shown.points]
    return replace(shown, points=points, equal=Equal(bands, costs, max(steps.values())))


def _series(cell: Cell) -> tuple[str, str, str]:
    return cell.method, cell.variant, cell.run


def _moved(figure: Figure, step: float) -> Figure:
    return Figure(figure.value + step, *(end + step for end in figure.interval or ()))


def _levels(ordered: Sequence[float], tie: float) -> list[list[float]]:
    """Groups of values that count as equal: neighbors within `tie` of each other."""
    ends = [place for place, (before, after) in enumerate(pairwise(ordered), 1) if after > before * (1 + tie)]
    levels = [list(ordered[start:end]) for start, end in pairwise([0, *ends, len(ordered)])]
    return [level for level in levels if len(level) > 1]
