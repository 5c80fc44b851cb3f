"""Prepared images in a file, so that a run that finds them there decodes nothing."""

from __future__ import annotations

import logging
import shutil
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tokbench.errors import UserError, shortened

_logger = logging.getLogger(__name__)


@dataclass
class PixelCache:
    """Images as the preprocessing leaves them before they become floats, with the model's labels, in one file.

    Each row begins with a checksum of the rest. A row that is absent, half written or damaged does not match it, and
    its image is decoded again. Several processes may read and write: all write the same to a row.

    path: the file; made, at its full size, where it is missing. count: rows. shape: of an image, (H, W, C). add: take
    more images.
    Raises UserError for a folder that cannot be written, or a disk without the room.
    """

    path: Path
    count: int
    shape: tuple[int, ...]
    add: bool = True
    _rows: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._row = np.dtype([("sum", "<u4"), ("label", "<i8"), ("pixels", "u1", self.shape)])
        size = self.count * self._row.itemsize
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                missing = size - file.tell()
                if missing > shutil.disk_usage(self.path.parent).free:
                    raise OSError(f"it takes {size / 1e9:.1f} GB, more than the disk has left")
                file.truncate(size)
        except OSError as error:
            raise UserError(f"--cache {str(self.path.parent)!r}: images cannot be kept: {shortened(error)}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_rows": None}  # a mapped file would be copied

    def get(self, index: int) -> tuple[np.ndarray, int] | None:
        """The pixels (H, W, C) and the label of an image; None where they are not there."""
        if self._rows is None:
            self._rows = np.memmap(self.path, self._row, mode="r", shape=(self.count,))
        row = self._rows[index]
        if not row["sum"] or _checksum(row) != row["sum"]:
            return None
        return np.array(row["pixels"]), int(row["label"])

    def put(self, index: int, pixels: np.ndarray, label: int) -> None:
        """Keep an image, pixels (H, W, C). Where the disk does not take it, that is said once, and none is kept."""
        if not self.add:
            return
        row = np.zeros((), self._row)
        row["label"], row["pixels"] = label, pixels
        row["sum"] = _checksum(row)
        try:
            with self.path.open("r+b") as file:
                file.seek(index * self._row.itemsize)
                file.write(row.tobytes())
        except OSError as error:
            self.add = False
            _logger.warning("no more images are kept in %s: %s", self.path, shortened(error))


def _checksum(row: Any) -> int:
    """Of all of a row behind its own checksum."""
    return zlib.crc32(memoryview(row.tobytes())[4:])
