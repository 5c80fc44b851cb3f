"""Images to measure accuracy on: the bundled ones, folders, and whatever timm opens, labelled as the model counts."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from tokbench.config import BUNDLED_DATA, DATA_PACKAGES
from tokbench.data.batches import Batch, load_batches
from tokbench.data.bundled import open_bundled, read_composites
from tokbench.data.decoding import ImageError, Skipped, decode
from tokbench.data.folders import open_folder
from tokbench.data.labels import DataWarning, without_labels
from tokbench.data.preparing import preparation, to_pictures
from tokbench.data.sources import ImageSource, ImageStream
from tokbench.data.timm_readers import open_timm
from tokbench.errors import UserError, require_file

__all__ = [
    "Batch",
    "DataWarning",
    "ImageError",
    "ImageSource",
    "ImageStream",
    "Skipped",
    "load_batches",
    "load_images",
    "open_dataset",
    "to_pictures",
]
_logger = logging.getLogger(__name__)


def open_dataset(
    spec: str, model: nn.Module, *, limit: int | None = None, labels: str | Path | None = None
) -> ImageSource | ImageStream:
    """Open images and labels with the preprocessing of the model's timm configuration.

    Args:
        spec: what `tokbench list data` shows, such as "bundled" or a folder.
        model: a timm model.
        limit: so many images at most; a fixed random subset in the data's order (a smaller limit takes a part of a
            larger one's), or a stream's first.
        labels: a list of labels for a folder of images: lines of file name and class name or number.

    Raises:
        UserError: one line, for anything that cannot be opened or labelled.
    """
    source = _open(spec, model, limit, labels)
    for warning in source.warnings:
        _logger.warning(warning.text)
    return source


def load_images(names: Sequence[str], model: nn.Module) -> Tensor:
    """Single images as the model takes them: (B, C, H, W), preprocessed by the model's timm configuration.

    names: files, or `bundled:17` for the 17th bundled image. Raises UserError naming the one that cannot be read.
    """
    prepare = preparation(model, without_labels(model))
    return prepare.floats(torch.stack([prepare.pixels(_single_image(name)) for name in names]))


def _open(spec: str, model: nn.Module, limit: int | None, labels: str | Path | None) -> ImageSource | ImageStream:
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1 image, not {limit}.")
    if not spec:
        raise UserError("data is empty; give bundled, a folder of class folders, or what 'tokbench list data' shows.")
    kind, slash, rest = spec.partition("/")
    is_folder = spec not in BUNDLED_DATA and not (slash and kind.lower() in DATA_PACKAGES)
    if is_folder:
        return open_folder(Path(spec).expanduser(), model, limit, None if labels is None else Path(labels).expanduser())
    if labels is not None:
        raise UserError(f"labels go with a folder of images; data {spec!r} has its own.")
    return open_bundled(spec, model, limit) if spec in BUNDLED_DATA else open_timm(kind.lower(), rest, model, limit)


def _single_image(name: str) -> Image.Image:
    kind, _, number = name.partition(":")
    if kind == "bundled":
        composites = read_composites()
        if not (number.isdecimal() and 1 <= int(number) <= len(composites)):
            raise UserError(f"image {name!r}: bundled images are bundled:1 to bundled:{len(composites)}.")
        return composites[int(number) - 1][0]
    path = Path(os.path.expanduser(name))
    require_file(path, "image", "give single images, such as those in it")
    return decode(path, str(path))
