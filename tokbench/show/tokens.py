"""Pictures of what became of an image's patches. Arrays in, a file out: nothing here knows models or methods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokbench.report.canvas import drawing, require_format, save

# isort: split
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from tokbench.report.styles import Theme, find_theme
from tokbench.report.text import broken

_CELL_IN = 2.0  # a picture's longer side
_SMALL_IN = 1.35  # where there are many
_PER_ROW = 12
_CHARACTER_PT = 5.6  # of a title, on average


@dataclass(frozen=True)
class TokenGrid:
    """Which token each patch of an image went to.

    Attributes:
        title: over the picture.
        token: (rows, columns) int; patches of one token share a number, −1 is dropped.
    """

    title: str
    token: np.ndarray

    def sizes(self) -> np.ndarray:
        """(rows, columns) float: how many patches the token of each patch stands for, NaN where it was dropped."""
        _, inverse, counts = np.unique(self.token, return_inverse=True, return_counts=True)
        sizes: np.ndarray = counts[inverse.reshape(self.token.shape)].astype(float)
        return np.where(self.token < 0, np.nan, sizes)

    def count(self) -> int:
        """How many tokens are left of the patches."""
        return len(np.unique(self.token[self.token >= 0]))


@dataclass(frozen=True)
class TokenRow:
    """An image (H, W, 3), values from 0 to 1, and beside it what became of it; `label` stands over the image."""

    label: str
    image: np.ndarray
    grids: Sequence[TokenGrid]


def draw_tokens(
    rows: Sequence[TokenRow], out: str | Path, *, heading: str = "", sizes: bool = True, theme: str = "light"
) -> Path:
    """Draw each row's image and, beside it, its tokens as regions of their mean color with borders; returns `out`.

    Dropped patches are hatched. sizes: under each row, how many patches each token stands for, as a heat map.
    Raises UserError for an unknown suffix or theme and where the file cannot be written.
    """
    require_format(out := Path(out))
    colors = find_theme(theme)
    with drawing(colors, {"xtick.color": colors.ink, "font.size": 8, "hatch.linewidth": 0.6}):
        save(_draw(rows, heading, sizes, colors), out, dpi=150)
    return out


def _draw(rows: Sequence[TokenRow], heading: str, sizes: bool, theme: Theme) -> Figure:
    rows = [part for row in rows for part in _folded(row)]
    columns = 1 + max(len(row.grids) for row in rows)
    strips = 2 if sizes else 1
    side = _CELL_IN if columns <= 8 else _SMALL_IN
    rows = [_wrapped(row, int(72 * side / _CHARACTER_PT)) for row in rows]
    heading = broken(heading, int(72 * (side * columns) / 5))
    heights = [side * min(1.0, row.image.shape[0] / row.image.shape[1]) for row in rows]
    titles = sum(1 + max(text.count("\n") for text in (row.label, *(grid.title for grid in row.grids))) for row in rows)
    around = 0.13 * len(rows) + 0.14 * titles + 0.14 * heading.count("\n") + 0.25 + (0.6 if sizes else 0.0)
    figure = Figure(
        figsize=(side * columns + 0.1, sum(heights) * strips + around),
        layout=ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.01, hspace=0.01),
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows) * strips, columns, squeeze=False)
    for panel in axes.flat:
        panel.set_axis_off()
    most = max((np.nanmax(grid.sizes()) for row in rows for grid in row.grids if grid.count()), default=1)
    scale = LogNorm(1, max(float(most), 2))
    shown = None
    for number, row in enumerate(rows):
        strip = axes[number * strips]
        strip[0].imshow(row.image, interpolation="nearest")
        _title(strip[0], row.label, side)
        for column, grid in enumerate(row.grids, 1):
            _draw_regions(strip[column], row.image, grid, theme)
            _title(strip[column], grid.title, side)
            if sizes:
                values, panel = np.ma.masked_invalid(grid.sizes()), axes[number * strips + 1, column]
                shown = _fill(panel, row.image, grid, theme, values, norm=scale, cmap="viridis")
    if heading:
        figure.suptitle(heading, x=0.01, ha="left", fontsize=9, color=theme.muted)
    if shown is not None:
        bar = figure.colorbar(shown, ax=axes[-1, :].tolist(), location="bottom", shrink=0.4, aspect=40, pad=0.03)
        ticks = [2**power for power in range(12) if 2**power <= scale.vmax]
        bar.set_label("patches in the token (hatched: dropped)")
        bar.set_ticks(ticks, labels=list(map(str, ticks)))
        bar.minorticks_off()
    return figure


def _folded(row: TokenRow) -> Iterator[TokenRow]:
    """A row with more grids than fit the page's width as several."""
    for start in range(0, max(len(row.grids), 1), _PER_ROW):
        yield TokenRow(row.label, row.image, row.grids[start : start + _PER_ROW])


def _wrapped(row: TokenRow, width: int) -> TokenRow:
    """A row whose titles are broken into lines of at most so many characters, so that none runs into the next."""
    grids = [TokenGrid(broken(grid.title, width), grid.token) for grid in row.grids]
    return TokenRow(broken(row.label, width), row.image, grids)


def _title(panel: Axes, text: str, side: float) -> None:
    """Set a title, smaller where a word would be wider than the picture of `side` inches."""
    longest = max(map(len, text.split("\n")))
    size = FontProperties(size=rcParams["axes.titlesize"]).get_size_in_points()
    panel.set_title(text, fontsize=size * min(1.0, 72 * side / _CHARACTER_PT / longest))


def mean_colors(image: np.ndarray, token: np.ndarray) -> np.ndarray:
    """(rows, columns, 3): the mean color of all patches of each patch's token, of an image (H, W, 3)."""
    rows, columns = token.shape
    height, width = image.shape[:2]
    down, across = np.arange(height) * rows // height, np.arange(width) * columns // width
    members = token[down[:, None], across[None, :]].ravel() + 1
    sums = [np.bincount(members, image[..., channel].ravel()) for channel in range(3)]
    means: np.ndarray = np.stack(sums, axis=-1) / np.maximum(np.bincount(members), 1)[:, None]
    return means[token + 1]


def _draw_regions(panel: Axes, image: np.ndarray, grid: TokenGrid, theme: Theme) -> None:
    colors = np.clip(mean_colors(image, grid.token), 0, 1)
    _fill(panel, image, grid, theme, colors, alpha=(grid.token >= 0).astype(float))
    edges = _borders(grid.token) * _patch_size(image, grid)
    rim = [withStroke(linewidth=1.1, foreground="black", alpha=0.55)]
    panel.add_collection(LineCollection(list(edges), colors="white", linewidths=0.5, path_effects=rim))


def _fill(panel: Axes, image: np.ndarray, grid: TokenGrid, theme: Theme, values: np.ndarray, **how: Any) -> Any:
    """Draw a value for each patch over the image's extent, and hatch the dropped ones."""
    height, width = image.shape[:2]
    drawn = panel.imshow(values, extent=(0, width, height, 0), interpolation="nearest", **how)
    wide, high = _patch_size(image, grid)
    dropped = [Rectangle((column * wide, row * high), wide, high) for row, column in np.argwhere(grid.token < 0)]
    panel.add_collection(
        PatchCollection(dropped, facecolor=theme.grid, edgecolor=theme.muted, linewidth=0, hatch="/////", zorder=0.5)
    )
    panel.set(xlim=(0, width), ylim=(height, 0))
    return drawn


def _patch_size(image: np.ndarray, grid: TokenGrid) -> tuple[float, float]:
    """Width and height of a patch in pixels."""
    return image.shape[1] / grid.token.shape[1], image.shape[0] / grid.token.shape[0]


def _borders(token: np.ndarray) -> np.ndarray:
    """(n, 2, 2): line pieces (x, y) in units of patches between neighbors that belong to different tokens."""
    beside = np.argwhere(token[:, :-1] != token[:, 1:])
    below = np.argwhere(token[:-1] != token[1:])
    upright = np.stack([beside[:, ::-1] + (1, 0), beside[:, ::-1] + (1, 1)], axis=1)
    level = np.stack([below[:, ::-1] + (0, 1), below[:, ::-1] + (1, 1)], axis=1)
    return np.concatenate([upright, level]).astype(float)
