"""Batches of a source, read by this process or by others."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from tokbench.data.decoding import ImageError, Skipped
from tokbench.data.sources import ImageSource, ImageStream


class Batch(NamedTuple):
    """Images (B, C, H, W) and labels (B,) of the places before `end` that no earlier batch held, without the skipped
    ones: B may be 0."""

    images: Tensor
    labels: Tensor
    skipped: list[Skipped]
    end: int


def load_batches(
    source: ImageSource | ImageStream, batch_size: int, *, workers: int = 0, start: int = 0
) -> Iterator[Batch]:
    """The images of a source from place `start` on, which must be 0 for a stream, `batch_size` places at a time.

    An image that cannot be decoded is skipped, and named in its batch.
    """
    images: Any
    if isinstance(source, ImageStream):
        images = _ForgivingStream(source)
    else:
        images = Subset(_Forgiving(source), range(start, len(source)))
    end = start
    loader = DataLoader(
        images, batch_size=batch_size, num_workers=workers, collate_fn=list, worker_init_fn=_end_without_a_word
    )
    for items in loader:
        end += len(items)
        good = [item for item in items if not isinstance(item, Skipped)]
        labels = torch.tensor([label for _, label in good], dtype=torch.long)
        stack = torch.stack([image for image, _ in good]) if good else torch.empty(0)
        yield Batch(stack, labels, [item for item in items if isinstance(item, Skipped)], end)


def _end_without_a_word(worker: int) -> None:
    """A worker ends with the process that made it, without the handlers it inherited and without a word."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.excepthook = _unless_nobody_reads


def _unless_nobody_reads(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What the thread says that hands images over, but for the loss of the process that took them."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


class _Forgiving(Dataset[tuple[Tensor, int] | Skipped]):
    """A source that says which images it cannot decode instead of raising."""

    def __init__(self, source: ImageSource):
        self.source = source

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Skipped:
        try:
            return self.source[index]
        except ImageError as error:
            return Skipped(index, error.name, error.reason or str(error))


class _ForgivingStream(IterableDataset[tuple[Tensor, int] | Skipped]):
    """A stream likewise."""

    def __init__(self, source: ImageStream):
        self.source = source

    def __iter__(self) -> Iterator[tuple[Tensor, int] | Skipped]:
        return self.source.items()
