"""The 10,000 bundled composites."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn

from tokbench.bundled.clutter import CLASSES, Layout, compose, draw_layout, read_idx
from tokbench.data.labels import label_classes
from tokbench.data.preparing import preparation
from tokbench.data.sources import ImageSource, choose, fingerprint

_BUNDLED = Path(__file__).parents[1] / "bundled"


@dataclass(frozen=True)
class Composites:
    items: np.ndarray  # (10000, 28, 28) uint8
    labels: np.ndarray  # (10000,) uint8
    layout: Layout

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(compose(self.items, self.layout[index : index + 1])[0]), int(self.labels[index])


def read_composites() -> Composites:
    items = read_idx(_BUNDLED / "t10k-images-idx3-ubyte.gz")
    labels = read_idx(_BUNDLED / "t10k-labels-idx1-ubyte.gz")
    return Composites(items, labels, draw_layout(np.arange(len(items)), len(items), np.random.RandomState(0)))


def open_bundled(model: nn.Module, limit: int | None) -> ImageSource:
    composites = read_composites()
    items, labels, layout = composites.items, composites.labels, composites.layout
    chosen = choose(len(items), limit)
    parts = [getattr(layout, field) for field in layout.__dataclass_fields__]
    return ImageSource(
        "bundled",
        composites,
        chosen,
        preparation(model, label_classes(list(CLASSES), model, "'bundled'")),
        fingerprint("bundled", items.tobytes(), labels.tobytes(), *(part.tobytes() for part in parts), chosen),
    )
