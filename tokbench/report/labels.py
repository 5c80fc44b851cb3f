"""Placing the labels of a plot so that none covers a point, a line or another label. Geometry only, in pixels.

Every label has candidate spots with costs. Labels first take their cheapest free spots in turn; then, a few times over,
each moves to the spot that is cheapest given all the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

STEP = 3.0  # between sampled points of a line
_SWEEPS = 4
# Costs are distances from the preferred spot, in points.
_COVERS_LINE, _LEADER_OVER_MARKER, _LEADER_OVER_LABEL, _LEADERS_CROSS = 2.5, 15.0, 60.0, 30.0
_MISSING = 120.0  # a label that costs more is left out
_DISTANCES_PT = (5.0, 11.0, 19.0, 29.0, 41.0, 55.0, 70.0)
_LEADER_FROM_PT = 19.0
# Best first: towards the upper right (mirrored where the upper left is the better corner), then around.
_ANGLES = np.radians([55, 40, 70, 90, 25, 105, 0, 120, 140, -30, 160, -90, 180, -55, -120, -150])


@dataclass
class Spot:
    """One place for one label.

    Attributes:
        box: (4,) x0, y0, x1, y1.
        leader: (n, 2) points along the line to what is labeled; none when the label is beside it.
        cost: what this spot costs by itself.
    """

    box: np.ndarray
    cost: float
    leader: np.ndarray = field(default_factory=lambda: np.empty((0, 2)))

    @property
    def center(self) -> np.ndarray:
        return (self.box[:2] + self.box[2:]) / 2


def place(
    options: Sequence[Sequence[Spot]], markers: np.ndarray, lines: np.ndarray, frame: np.ndarray
) -> list[Spot | None]:
    """Choose a spot for each label; None for one that has no free spot.

    Args:
        options: for each label, its spots.
        markers: (m, 4) boxes that are never covered.
        lines: (n, 2) points along lines, covered only where nothing else is free.
        frame: (4,) box that labels stay inside.
    """
    lines = lines[np.argsort(lines[:, 0])]
    priced = [[(spot, _own_cost(spot, markers, lines, frame)) for spot in spots] for spots in options]
    indices = range(len(options))
    # The order matters even after the sweeps, so both directions are tried.
    settled = [_settle(priced, order) for order in (indices, indices[::-1])]
    return list(min(settled, key=lambda result: result[0])[1])


def _settle(priced: Sequence[Sequence[tuple[Spot, float]]], order: Sequence[int]) -> tuple[float, list[Spot | None]]:
    """Total cost, and the spots that labels end up with if they choose in this order."""
    chosen: list[Spot | None] = [None] * len(priced)
    costs = [_MISSING] * len(priced)
    for _ in range(_SWEEPS):
        for index in order:
            others = [spot for other, spot in enumerate(chosen) if spot is not None and other != index]
            chosen[index], costs[index] = _cheapest(priced[index], others)
    return sum(costs), chosen


def _cheapest(spots: Sequence[tuple[Spot, float]], others: Sequence[Spot]) -> tuple[Spot | None, float]:
    best, best_cost = None, _MISSING
    for spot, cost in spots:
        if cost < best_cost and (total := cost + _clash(spot, others)) < best_cost:
            best, best_cost = spot, total
    return best, best_cost


def spots_around(point: np.ndarray, size: np.ndarray, pixels_per_point: float, *, leftwards: bool) -> list[Spot]:
    """Spots for a label of `size` (2,) around a marker at `point` (2,), nearest first."""
    spots = []
    for distance in _DISTANCES_PT:
        for preference, angle in enumerate(_ANGLES):
            direction = np.array([-np.cos(angle) if leftwards else np.cos(angle), np.sin(angle)])
            center = point + direction * (size / 2 + distance * pixels_per_point)
            spot = Spot(np.concatenate([center - size / 2, center + size / 2]), 0.5 * preference + 0.35 * distance)
            if distance >= _LEADER_FROM_PT:
                spot.leader = _leader(point, spot, clear=6 * pixels_per_point)
                spot.cost += 0.2 * len(spot.leader)
            spots.append(spot)
    return spots


def spots_along(line: float, axis: int, size: np.ndarray, frame: np.ndarray, gap: float) -> list[Spot]:
    """Spots beside a straight line across the panel, its ends first.

    Args:
        line: where it runs, in pixels: x of a vertical line, y of a horizontal one.
        axis: along which it runs: 0 horizontal, 1 vertical.
        size: (2,) width and height of the label as drawn.
    """
    start, end = frame[axis] + gap, frame[axis + 2] - gap - size[axis]
    # Above a horizontal line, left of a vertical one, then the other side.
    sides = (line + gap, line - gap - size[1 - axis])
    spots = []
    for rank, side in enumerate(sides if axis == 0 else sides[::-1]):
        for share in (0.0, 1.0, *np.linspace(0.05, 0.95, 19)):
            corner = np.empty(2)
            corner[axis], corner[1 - axis] = start + share * (end - start), side
            inward = 0.0 if share in (0.0, 1.0) else 3.0
            spots.append(Spot(np.concatenate([corner, corner + size]), 4.0 * rank + inward))
    return spots


def _own_cost(spot: Spot, markers: np.ndarray, lines: np.ndarray, frame: np.ndarray) -> float:
    """lines: from left to right."""
    inside = (spot.box[:2] >= frame[:2]).all() and (spot.box[2:] <= frame[2:]).all()
    if not inside or _overlaps(spot.box, markers).any():
        return np.inf
    start, end = np.searchsorted(lines[:, 0], spot.box[[0, 2]], side="right")
    heights = lines[start:end, 1]
    covered = np.count_nonzero((heights > spot.box[1]) & (heights < spot.box[3]))
    return spot.cost + _COVERS_LINE * covered + _LEADER_OVER_MARKER * _inside(spot.leader, markers).sum()


def _clash(spot: Spot, others: Sequence[Spot]) -> float:
    """The cost of what a spot covers of the other labels' spots."""
    if not others:
        return 0.0
    boxes = np.stack([other.box for other in others])
    if _overlaps(spot.box, boxes).any():
        return np.inf
    leaders = np.concatenate([other.leader for other in others])
    cost = _LEADER_OVER_LABEL * bool(_inside(leaders, spot.box[None]).any())
    cost += _LEADER_OVER_LABEL * bool(_inside(spot.leader, boxes).any())
    apart = np.hypot(*(spot.leader[:, None] - leaders).transpose(2, 0, 1))
    return cost + _LEADERS_CROSS * bool((apart < STEP).any())


def _overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    return np.all((boxes[:, :2] < box[2:]) & (box[:2] < boxes[:, 2:]), axis=1)


def _inside(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(n, m): whether point n lies in box m."""
    return np.all((points[:, None] > boxes[:, :2]) & (points[:, None] < boxes[:, 2:]), axis=2)


def _leader(point: np.ndarray, spot: Spot, clear: float) -> np.ndarray:
    """Points from `clear` off the marker to the edge of the label's box, on the line to its center."""
    points = sampled(np.stack([point, spot.center]))
    apart = np.hypot(*(points - point).T)
    return points[(apart > clear) & ~_inside(points, spot.box[None])[:, 0]]


def sampled(path: np.ndarray) -> np.ndarray:
    """Points (n, 2) every `STEP` along a path given by its corners (k, 2)."""
    pieces = [
        np.linspace(start, end, 2 + int(np.hypot(*(end - start)) / STEP))
        for start, end in zip(path[:-1], path[1:], strict=True)
    ]
    return np.concatenate([np.empty((0, 2)), *pieces])
