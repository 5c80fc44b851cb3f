"""Images by index or in a stream, prepared for a model and labelled as it counts its classes."""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from tokbench.data.cache import PixelCache
from tokbench.data.decoding import ImageError, Skipped, unreadable
from tokbench.data.labels import Labelling
from tokbench.errors import shortened

# An image with the label that the data gives it, or why it cannot be had.
StreamItem = tuple[Image.Image, int | str | None] | ImageError
_logger = logging.getLogger(__name__)


class Images(Protocol):
    """Images in their own form and class order. Pickleable."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int | str | None]: ...


@dataclass(frozen=True)
class Preparation:
    """From an image and its data set's label to what the model takes, and how the model numbers its classes.

    mode: Pillow's. shape: (H, W, C) of what `crop` makes of an image. mean, std: of each channel, from 0 to 1.
    """

    mode: str
    shape: tuple[int, int, int]
    crop: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]
    labelling: Labelling

    def pixels(self, image: Image.Image) -> Tensor:
        """The part of an image that the model sees, at its size: (H, W, C) bytes."""
        return torch.from_numpy(np.array(self.crop(image.convert(self.mode)))).reshape(self.shape)

    def floats(self, pixels: Tensor) -> Tensor:
        """Bytes (…, H, W, C) as the model takes them: (…, C, H, W) float32, on the device where the bytes are."""
        whole, mean, std = _constants(self.mean, self.std, pixels.device)
        return pixels.movedim(-1, -3).contiguous().float().div_(whole).sub_(mean).div_(std)


@cache
def _constants(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    # All are tensors there: CUDA multiplies by a number's reciprocal, which is not the CPU's quotient to the last bit.
    each = torch.tensor([mean, std], device=device)[:, :, None, None]
    return torch.tensor(255.0, device=device), each[0], each[1]


class _Prepared:
    """What sources and streams have in common; see ImageSource."""

    def __init__(self, name: str, images: Any, indices: np.ndarray, prepare: Preparation, fingerprint: str) -> None:
        self.name, self.fingerprint, self.indices = name, fingerprint, indices
        self.classes, self.num_classes = prepare.labelling.classes, prepare.labelling.num_classes
        self.warnings, self.among = prepare.labelling.warnings, prepare.labelling.among
        self.floats, self._images, self._prepare = prepare.floats, images, prepare

    def __len__(self) -> int:
        return len(self.indices)


class ImageSource(_Prepared, Dataset[tuple[Tensor, int]]):
    """Images by index: `source[i]` is (preprocessed (C, H, W) float tensor, label in the model's order, −1 = none).

    name: short, for titles. fingerprint: sha256 (hex) of which images these are, in which order; it does not depend on
    the model. classes: their names in the data's own order, None where they have none. num_classes: how many classes
    the data has (the model's, where the data does not tell). warnings: why figures read off these images may not mean
    what they seem to. among: the model's classes that answers are chosen from, None for all. indices: (n,), their
    places in the whole data set, ascending. streaming: False. images: `Images`, all that `indices` choose from.
    version: what else changes with the images, as the times of files. floats: `Preparation.floats`.
    """

    streaming = False

    def __init__(
        self, name: str, images: Any, indices: np.ndarray, prepare: Preparation, fingerprint: str, version: str = ""
    ) -> None:
        super().__init__(name, images, indices, prepare, fingerprint)
        self._version = version
        self._cache: PixelCache | None = None

    def keep_in(self, folder: Path, *, add: bool = True) -> None:
        """Keep prepared images in a file in `folder`, and take them from there; or, not to `add`, only take them.

        Raises UserError where it cannot be.
        """
        how = self._prepare
        parts = (how.mode, how.shape, how.crop, how.labelling, PIL.__version__)
        key = fingerprint(self.fingerprint, self._version, *map(repr, parts))[:16]
        name = re.sub(r"[^\w.-]+", "_", self.name)[-60:]
        path = folder / f"{name}-{key}.pixels"
        if add or path.exists():
            self._cache = PixelCache(path, len(self), how.shape, add)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels, label = self.pixels(index)
        return self.floats(pixels), label

    def pixels(self, index: int) -> tuple[Tensor, int]:
        """The same as (H, W, C) bytes, of which `floats` makes what the model takes."""
        if self._cache and (kept := self._cache.get(index)):
            return torch.from_numpy(kept[0]), kept[1]
        place, prepare = int(self.indices[index]), self._prepare
        try:
            image, given = self._images[place]
            pixels, label = prepare.pixels(image), prepare.labelling(given)
            if self._cache:
                self._cache.put(index, pixels.numpy(), label)
            return pixels, label
        except ImageError:
            raise
        except Exception as error:  # whatever a data set's own reader stumbles over is about this image only
            raise unreadable(f"{self.name}, number {place}", shortened(error)) from error


class ImageStream(_Prepared, IterableDataset[tuple[Tensor, int]]):
    """The first `length` images of a stream; attributes and items as ImageSource's. streaming: True.

    images: gives, for every place in order, an image and its label, or the ImageError that says why there is none.
    promised: the data itself says that it has so many images, so that those that do not come are skipped ones.
    One DataLoader worker at most: several would share out the shards, so that the first images would be others.
    """

    streaming = True

    def __init__(
        self, name: str, images: Iterable[StreamItem], length: int, prepare: Preparation, fingerprint: str,
        promised: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(name, images, np.arange(length), prepare, fingerprint)
        self._promised = promised

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for item in self.items():
            if isinstance(item, Skipped):
                raise unreadable(item.name, item.reason)
            yield self.floats(item[0]), item[1]

    def items(self) -> Iterator[tuple[Tensor, int] | Skipped]:
        """What iterating gives, but as (H, W, C) bytes, and images that cannot be had are named and not raised."""
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ImageError(f"the stream {self.name!r} is read in order by one process: use --readers 0 or 1.")
        count, length = 0, len(self)
        for item in itertools.islice(self._images, length):
            yield self._prepared(count, item)
            count += 1
        if not count:
            raise ImageError(f"the stream {self.name!r} gives no images: are its folder and split right?")
        if count < length:
            _logger.warning("the stream %r ended after %d of %d images", self.name, count, length)
        for place in range(count, length if self._promised else count):
            yield Skipped(place, f"{self.name}, number {place}", "the stream ended before it")

    def _prepared(self, place: int, item: StreamItem) -> tuple[Tensor, int] | Skipped:
        if isinstance(item, ImageError):
            return Skipped(place, item.name, item.reason)
        try:
            return self._prepare.pixels(item[0]), self._prepare.labelling(item[1])
        except Exception as error:  # as in ImageSource
            return Skipped(place, f"{self.name}, number {place}", shortened(error))


def choose(count: int, limit: int | None) -> np.ndarray:
    """Places of a fixed random subset, ascending; a smaller limit takes a part of a larger one's."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.RandomState(0).permutation(count)[:limit])


def fingerprint(*parts: str | bytes | np.ndarray) -> str:
    """sha256 (hex) of all parts and their lengths."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode(errors="surrogateescape") if isinstance(part, str) else bytes(part)
        digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()
