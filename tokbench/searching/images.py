"""The images of a search, and how a run recognizes them."""

from __future__ import annotations

import base64
import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from tokbench.data import ImageSource, ImageStream, load_batches, open_dataset
from tokbench.errors import UserError

FEWEST = 32
DEFAULT_IMAGES = 256
_MARK = 6  # bytes: among 10⁶ images that were measured and 10³ that were searched on, no two are alike by chance
_logger = logging.getLogger(__name__)


def search_data(run_data: str) -> str:
    """Where to search for schedules that will be measured on `run_data`."""
    return "bundled:train" if run_data == "bundled" else run_data


def search_images(spec: str, model: nn.Module, count: int = DEFAULT_IMAGES, labels: str | None = None) -> Tensor:
    """Images (B, C, H, W) of the data `spec`, the last ones that a run with a growing --limit would take.

    Raises UserError where there is none; warns where there are few.
    """
    source = open_dataset(spec, model, labels=labels)
    if isinstance(source, ImageSource):
        # `choose` takes a permutation's first; these are its last.
        source.indices = np.sort(np.random.RandomState(0).permutation(len(source))[-count:])
    batches = load_batches(source, min(count, 64))
    images = list(itertools.islice((image for batch in batches for image in batch.images), count))
    if not images:
        raise UserError(f"data {spec!r}: none of the images can be decoded, so there is nothing to search on")
    if len(images) < FEWEST:
        _logger.warning("%d images are few to search on: schedules found on less than %d fit these, and no others",
                        len(images), FEWEST)  # fmt: skip
    return torch.stack(images)


def mark(image: Tensor) -> bytes:
    """A short hash of an image (C, H, W) as prepared for the model."""
    return hashlib.blake2b(image.numpy().tobytes(), digest_size=_MARK).digest()


def written_marks(images: Tensor) -> str:
    """The marks of images (B, C, H, W) as text."""
    return base64.b64encode(b"".join(map(mark, images))).decode()


def read_marks(text: str) -> set[bytes]:
    """Parse `written_marks`. Raises UserError for other text."""
    try:
        joined = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise UserError(f"the marks of the images of a search cannot be read: {error}") from error
    return {joined[start : start + _MARK] for start in range(0, len(joined), _MARK)}


class Overlap:
    """Counts, by cell, the shown images that the cell's schedule was searched on.

    marks: what `written_marks` gave, by cell; cells without any are left out.
    """

    def __init__(self, marks: Mapping[str, str]) -> None:
        self._marks = {cell: read_marks(text) for cell, text in marks.items()}
        self.counts = dict.fromkeys(self._marks, 0)

    def read_again(self, source: ImageSource | ImageStream, end: int) -> None:
        """Count the images before place `end`, which an earlier session showed."""
        if self._marks and end:
            for batch in itertools.takewhile(lambda batch: batch.end <= end, load_batches(source, 1)):
                self._count(batch.images)

    def watching(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The same batches, counted."""
        for images, labels in batches:
            self._count(images)
            yield images, labels

    def _count(self, images: Tensor) -> None:
        for found in map(mark, images if self._marks else ()):
            for cell, marks in self._marks.items():
                self.counts[cell] += found in marks
