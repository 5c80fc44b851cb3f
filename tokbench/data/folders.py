"""Folders of class folders, and folders of images alone."""

from __future__ import annotations

import logging
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from timm.utils.misc import natural_key
from torch import nn

from tokbench.config import require_folder
from tokbench.data.decoding import decode
from tokbench.data.labels import class_count, model_labels, some
from tokbench.data.preparing import preparation
from tokbench.data.sources import ImageSource, choose, fingerprint
from tokbench.errors import UserError, printable, shortened

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".jfif")
_SPLIT_FOLDERS = ("validation", "val", "valid", "eval", "evaluation", "test")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Files:
    root: Path
    files: list[tuple[str, int]]  # path below root, class

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        name, label = self.files[index]
        return decode(self.root / name, str(self.root / name)), label


def open_folder(folder: Path, model: nn.Module, limit: int | None) -> ImageSource:
    try:
        root = _class_root(folder)
        classes = _subfolders(root)
        unheard: list[str] = []
        special: list[str] = []
        found = [_files(root, root / name, unheard, special) for name in classes or ["."]]
    except OSError as error:
        raise UserError(f"data folder {str(folder)!r} cannot be read: {shortened(error)}") from error
    names = [sorted(name for name in own if name.lower().endswith(_EXTENSIONS)) for own in found]
    files = [(name, label if classes else -1) for label, own in enumerate(names) for name in own]
    others = [repr(name) for own in found for name in own if not name.lower().endswith(_EXTENSIONS)]
    empty = [repr(name) for name, own in zip(classes, names, strict=bool(classes)) if not own]
    for what, left_out in (
        ("files are no images by their names", others),
        ("class folders have no images", empty),
        ("are no regular files, and are left out", special),
        ("sub-folders cannot be read, and what is in them is left out", unheard),
    ):
        if files and left_out:
            _logger.warning("%r: %d %s (%s)", str(root), len(left_out), what, some(left_out))
    if not files:
        raise UserError(
            f"data folder {str(root)!r} has class folders ({some(classes)}) but no images in them "
            f"({', '.join(_EXTENSIONS)})." + (f" {some(unheard)} cannot be read." if unheard else "")
        )
    if not classes:
        _logger.warning("%r has no class folders: its images go without labels, and without top-1", str(root))
    labels = model_labels(classes, model, f"data folder {str(root)!r}") if classes else None
    if labels == list(range(len(classes))) and classes != sorted(classes, key=natural_key):
        _logger.warning("class folders of %r are counted in alphabetical order, 10 before 2 and B before a", str(root))
    chosen = choose(len(files), limit)
    sizes = [f"{files[i][0]} {_size(root / files[i][0])}\n" for i in chosen]
    return ImageSource(
        printable(f"{root.parent.name}/{root.name}" if root.name in _SPLIT_FOLDERS else root.resolve().name),
        _Files(root, files),
        chosen,
        preparation(model, labels),
        fingerprint("folder", "".join(sizes)),
        classes or None,
        len(classes) or class_count(model),
    )


def _size(path: Path) -> int:
    """Bytes, −1 for a file that is not to be had: it is going to be skipped."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _class_root(folder: Path) -> Path:
    """Where the images are: the folder itself, with or without class folders, or its validation split.

    Raises UserError when there are none.
    """
    require_folder(folder)
    subfolders = _subfolders(folder)
    only_splits = {"train", *_SPLIT_FOLDERS}.issuperset(subfolders)
    for split in _SPLIT_FOLDERS:
        if split in subfolders and (only_splits or _subfolders(folder / split)):
            return _class_root(folder / split)
    images = [path.name for path in folder.iterdir() if path.name.lower().endswith(_EXTENSIONS)]
    if subfolders == ["train"]:
        raise UserError(f"data folder {str(folder)!r} has only a training split; if you mean it, give {folder}/train.")
    if subfolders:
        return folder
    if any(name.startswith("ILSVRC2012_val_") for name in images):
        raise UserError(
            f"data folder {str(folder)!r} is flat, so nothing tells the labels: move each image into a folder named by "
            "its wnid, as in n01440764/ILSVRC2012_val_00000293.JPEG (torchvision.datasets.ImageNet does it, given the "
            "devkit's archive)."
        )
    if images:
        return folder
    raise UserError(f"data folder {str(folder)!r} is empty: it should hold one folder of images for each class.")


def _subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _files(root: Path, folder: Path, unheard: list[str], special: list[str]) -> list[str]:
    """Paths of the files in a folder and below, relative to root, without hidden ones.

    Folders that cannot be read are added to `unheard`, pipes, sockets and devices to `special`, in quotes.
    """
    found = []

    def say(error: OSError) -> None:
        unheard.append(repr(Path(error.filename).relative_to(root).as_posix()))

    for parent, folders, names in os.walk(folder, onerror=say):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            name = path.relative_to(root).as_posix()
            if _is_special(path):
                special.append(repr(name))
            else:
                found.append(name)
    return found


def _is_special(path: Path) -> bool:
    """Whether reading it could wait for ever. What is not to be had is no such file: it is named when it is decoded."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False
