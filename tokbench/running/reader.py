"""Reads a run's images in batches, and keeps count of those that cannot be decoded."""

from __future__ import annotations

import time
from collections.abc import Iterator

from torch import Tensor

from tokbench.data import Batch, ImageSource, ImageStream, load_batches
from tokbench.data.decoding import Skipped
from tokbench.errors import RunStopped, one_line
from tokbench.running.half_pass import HalfPass


class Reader:
    """The rest of a source in batches, from where `half` ends to before `stop`. Knows how far it is, which images it
    skipped, and for how many seconds they were `waited` for.

    expected: places of the images that an earlier session skipped in the whole source, None when there was none.
    max_bad: per cent of the source that may be skipped. pinned: as `load_batches` has it.
    """

    def __init__(
        self,
        source: ImageSource | ImageStream,
        batch_size: int,
        workers: int,
        half: HalfPass,
        expected: list[int] | None,
        max_bad: float = 100.0,
        stop: int | None = None,
        pinned: bool = False,
    ) -> None:
        self.source, self.end, self.skipped = source, half.end, list(half.skipped)
        self._batch_size, self._workers, self._expected = batch_size, workers, expected
        self._max_bad, self._stop, self._pinned = max_bad, stop, pinned
        self._told = half.end
        self._ends: dict[int, int] = {}  # by how many images come before
        self.waited = 0.0

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images, as bytes (B, H, W, C), and labels.

        Raises RunStopped when images cannot be read at all, or others than before are bad.
        """
        try:
            batches = load_batches(
                self.source,
                self._batch_size,
                workers=self._workers,
                start=self.end,
                stop=self._stop,
                as_bytes=True,
                pinned=self._pinned,
            )
            while batch := self._next(batches):
                self.reach(batch.end, batch.skipped)
                if len(batch.labels):
                    yield batch.images, batch.labels
        except RunStopped:
            raise
        except Exception as error:
            raise RunStopped(f"the images of {self.source.name} cannot be read: {one_line(error)}") from error

    def reach(self, end: int, skipped: list[Skipped]) -> None:
        """Be at a place, where these images were skipped on the way. Raises RunStopped where that may not be."""
        self.end = end
        self.skipped += skipped
        self._require_same_skips()
        self._require_few_skips()
        self._ends[end - len(self.skipped)] = end

    def _next(self, batches: Iterator[Batch]) -> Batch | None:
        began = time.monotonic()
        batch = next(batches, None)
        self.waited += time.monotonic() - began
        return batch

    def passed(self, images: int) -> tuple[int, list[Skipped]]:
        """The place behind so many images that models saw, and what was skipped before it since this was last asked.

        images: of the whole pass, up to the end of a batch.
        """
        before, self._told = self._told, self._ends[images]
        return self._told, [image for image in self.skipped if before <= image.index < self._told]

    def _require_few_skips(self) -> None:
        if len(self.skipped) > self._max_bad / 100 * len(self.source):
            first = self.skipped[0]
            raise RunStopped(
                f"{len(self.skipped)} of the {len(self.source):,} images of {self.source.name} cannot be decoded, more "
                f"than {self._max_bad:g} %: the first is {first.name!r} ({first.reason}). --max-bad allows more."
            )

    def _require_same_skips(self) -> None:
        if self._expected is None:
            return
        before, now = {place for place in self._expected if place < self.end}, {image.index for image in self.skipped}
        if before != now:
            raise RunStopped(
                f"the images of {self.source.name} are not what they were: {len(before)} were skipped before image "
                f"{self.end:,}, now {len(now)}. --fresh begins a new run."
            )
