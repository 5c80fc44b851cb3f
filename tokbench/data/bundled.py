"""The bundled composites: 10,000 to measure on, 512 to search on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn

from tokbench.bundled.clutter import CLASSES, Layout, compose, draw_layout, read_idx
from tokbench.data.labels import label_classes, without_labels
from tokbench.data.preparing import preparation
from tokbench.data.sources import ImageSource, choose, fingerprint

_BUNDLED = Path(__file__).parents[1] / "bundled"


@dataclass(frozen=True)
class Composites:
    items: np.ndarray  # (n, 28, 28) uint8
    labels: np.ndarray | None  # (n,) uint8
    layout: Layout

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Image.Image, int | None]:
        label = None if self.labels is None else int(self.labels[index])
        return Image.fromarray(compose(self.items, self.layout[index : index + 1])[0]), label


def read_composites() -> Composites:
    """The 10,000 of the test items."""
    labels = read_idx(_BUNDLED / "t10k-labels-idx1-ubyte.gz")
    return _composites("t10k-images-idx3-ubyte.gz", labels, seed=0)


def _composites(items_file: str, labels: np.ndarray | None, seed: int) -> Composites:
    items = read_idx(_BUNDLED / items_file)
    return Composites(items, labels, draw_layout(np.arange(len(items)), len(items), np.random.RandomState(seed)))


def open_bundled(spec: str, model: nn.Module, limit: int | None) -> ImageSource:
    """`bundled`, or the 512 composites of training items, `bundled:train`, which have no labels."""
    if spec == "bundled":
        composites, labelling = read_composites(), label_classes(list(CLASSES), model, "'bundled'")
    else:
        composites, labelling = _composites("train512-images-idx3-ubyte.gz", None, seed=1), without_labels(model)
    chosen = choose(len(composites), limit)
    arrays = [composites.items, *([] if composites.labels is None else [composites.labels])]
    arrays += [getattr(composites.layout, field) for field in composites.layout.__dataclass_fields__]
    return ImageSource(
        spec,
        composites,
        chosen,
        preparation(model, labelling),
        fingerprint(spec, *(array.tobytes() for array in arrays), chosen),
    )
