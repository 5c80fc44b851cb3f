"""Fashion-MNIST in clutter: 28×28 items at a random place of a 56×56 canvas, over crops of other items.

The construction follows Cluttered MNIST (Mnih et al., "Recurrent Models of Visual Attention", 2014). A frozen
`numpy.random.RandomState` stream draws the layout, so a seed gives the same pictures under every NumPy.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CANVAS = 56
ITEM = 28
CROP = 11
CROPS_PER_IMAGE = 10
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes, the format MNIST and Fashion-MNIST are published in."""
    with gzip.open(path) as file:
        data = file.read()
    if data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not a gzipped IDX file of unsigned bytes")
    dims = data[3]
    shape = np.frombuffer(data, dtype=">i4", count=dims, offset=4)
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * dims).reshape(shape)


@dataclass(frozen=True)
class Layout:
    """Where everything goes, for n composites. Positions are (row, column) of upper left corners."""

    item: np.ndarray  # (n,) which item is shown
    mirror: np.ndarray  # (n,) bool
    place: np.ndarray  # (n, 2)
    donor: np.ndarray  # (n, CROPS_PER_IMAGE) the items that clutter is cut from, never the one shown
    cut: np.ndarray  # (n, CROPS_PER_IMAGE, 2) where in the donor
    drop: np.ndarray  # (n, CROPS_PER_IMAGE, 2) where on the canvas

    def __getitem__(self, which: slice | np.ndarray) -> Layout:
        return Layout(*(getattr(self, field)[which] for field in self.__dataclass_fields__))


def draw_layout(item: np.ndarray, item_count: int, rng: np.random.RandomState) -> Layout:
    """Draw the layout of one composite for each index in `item`, with clutter from `item_count` items."""
    n, k = len(item), CROPS_PER_IMAGE
    return Layout(
        item=item,
        mirror=rng.randint(0, 2, n).astype(bool),
        place=rng.randint(0, CANVAS - ITEM + 1, (n, 2)),
        donor=(item[:, None] + rng.randint(1, item_count, (n, k))) % item_count,
        cut=rng.randint(0, ITEM - CROP + 1, (n, k, 2)),
        drop=rng.randint(0, CANVAS - CROP + 1, (n, k, 2)),
    )


def compose(items: np.ndarray, layout: Layout) -> np.ndarray:
    """Paint the composites: clutter first (brightest wins), then the item wherever it is not black.

    items: (m, 28, 28) uint8. Returns (n, 56, 56) uint8.
    """
    n = len(layout.item)
    canvas = np.zeros((n, CANVAS, CANVAS), np.uint8)
    image = np.arange(n)[:, None, None]
    row, col = np.arange(CROP)[:, None], np.arange(CROP)
    for k in range(CROPS_PER_IMAGE):
        cut, drop = layout.cut[:, k, :, None, None], layout.drop[:, k, :, None, None]
        crop = items[layout.donor[:, k, None, None], cut[:, 0] + row, cut[:, 1] + col]
        at = image, drop[:, 0] + row, drop[:, 1] + col
        canvas[at] = np.maximum(canvas[at], crop)
    row, col = np.arange(ITEM)[:, None], np.arange(ITEM)
    shown = items[layout.item]
    shown = np.where(layout.mirror[:, None, None], shown[:, :, ::-1], shown)
    place = layout.place[:, :, None, None]
    at = image, place[:, 0] + row, place[:, 1] + col
    canvas[at] = np.where(shown > 0, shown, canvas[at])
    return canvas
