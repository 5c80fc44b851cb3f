"""Folders of class folders, and folders of images alone."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import nn

from tokbench.config import require_folder
from tokbench.data.decoding import decode
from tokbench.data.labels import DataWarning, Labelling, ModelNames, label_classes, model_names, some, without_labels
from tokbench.data.lists import find_lists, read_list
from tokbench.data.preparing import preparation
from tokbench.data.sources import ImageSource, choose, fingerprint
from tokbench.errors import UserError, printable, shortened

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".jp2", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif",
    ".tga",
)  # fmt: skip
SPLITS = ("validation", "val", "valid", "eval", "evaluation", "test")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Files:
    root: Path
    files: list[tuple[str, int]]  # path below root, class or −1

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        name, label = self.files[index]
        return decode(self.root / name, str(self.root / name)), label


@dataclass
class _Tree:
    """What lies below `root`, paths relative to it. classes: images by class folder; without such, all under ""."""

    root: Path
    classes: dict[str, list[str]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    special: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    @property
    def is_flat(self) -> bool:
        return list(self.classes) == [""]

    def find(self, name: str) -> None:
        """Find the images of a class folder, or of the whole root (name "")."""
        files = sorted(self._walk(self.root / name, name, frozenset([_identity(self.root)] if name else [])))
        self.classes[name] = [file for file in files if file.lower().endswith(EXTENSIONS)]
        self.others += [file for file in files if not file.lower().endswith(EXTENSIONS)]

    def _walk(self, folder: Path, name: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
        """The files in a folder and below, without hidden ones. Links are followed, but not back to a folder above."""
        try:
            here, entries = _identity(folder), list(os.scandir(folder))
        except OSError:
            self.closed.append(name)
            return
        if here in above:
            return
        for entry in entries:
            path = f"{name}/{entry.name}".lstrip("/")
            target = Path(entry) if entry.is_symlink() else entry  # an entry's own is_dir raises for a link to itself
            if entry.name.startswith("."):
                continue
            if target.is_dir():
                yield from self._walk(Path(entry), path, above | {here})
            elif target.is_file() or not Path(entry).exists():  # what is not there is named when it is decoded
                yield path
            else:
                self.special.append(path)  # reading it could wait for ever

    def say_left_out(self) -> None:
        for what, names in (
            ("files are no images by their names", self.others),
            ("class folders have no images", [name for name, images in self.classes.items() if not images]),
            ("are no regular files, and are left out", self.special),
            ("sub-folders cannot be read, and what is in them is left out", self.closed),
        ):
            if names:
                _logger.warning("%r: %d %s (%s)", str(self.root), len(names), what, some([*map(repr, names)]))


def open_folder(folder: Path, model: nn.Module, limit: int | None, labels: Path | None = None) -> ImageSource:
    """A folder's images, labelled by their class folders or by the list in the file `labels`."""
    require_folder(folder)
    try:
        given = _split(folder)
        tree = _scan(given, model_names(model), flat=labels is not None)
    except OSError as error:
        raise UserError(f"data folder {str(folder)!r} cannot be read: {shortened(error)}") from error
    root, what = tree.root, f"data folder {str(tree.root)!r}"
    if not any(tree.classes.values()):
        closed = f" {some([*map(repr, tree.closed)])} cannot be read." if tree.closed else ""
        if tree.is_flat:
            raise UserError(f"{what} is empty: it should hold one folder of images for each class.{closed}")
        raise UserError(
            f"{what} has class folders ({some([*tree.classes])}) but no images in them "
            f"({', '.join(EXTENSIONS)}).{closed}"
        )
    tree.say_left_out()
    if labels is not None:
        files, labelling = read_list(labels, tree.classes[""], model, what)
    else:
        files = [
            (name, -1 if tree.is_flat else place) for place, own in enumerate(tree.classes.values()) for name in own
        ]
        labelling = _unlabelled(tree, folder, model) if tree.is_flat else label_classes([*tree.classes], model, what)
    chosen = choose(len(files), limit)
    stats = [_size_and_time(root / files[i][0]) for i in chosen]
    sizes = "".join(f"{files[i][0]} {size}\n" for i, (size, _) in zip(chosen, stats, strict=True))
    listed = [] if labels is None else ["labels", *(labelling.name(files[i][1]) for i in chosen)]
    return ImageSource(
        printable(f"{given.parent.name}/{given.name}" if given.name in SPLITS else given.resolve().name),
        _Files(root, files),
        chosen,
        preparation(model, labelling),
        fingerprint("folder", sizes, *listed),
        version=" ".join(str(time) for _, time in stats),
    )


def _split(folder: Path) -> Path:
    """The validation split of a folder that has one, else the folder. Raises UserError for a training split alone."""
    subfolders = _subfolders(folder)
    only_splits = {"train", *SPLITS}.issuperset(subfolders)
    for split in SPLITS:
        if split in subfolders and (only_splits or _subfolders(folder / split)):
            return _split(folder / split)
    if subfolders == ["train"]:
        raise UserError(f"data folder {str(folder)!r} has only a training split; if you mean it, give {folder}/train.")
    return folder


def _scan(folder: Path, names: ModelNames, flat: bool) -> _Tree:
    """The images of a folder by class folder, or of the one folder in it that holds images.

    names: of the model's classes. flat: class folders do not matter.
    """
    tree = _Tree(folder)
    for name in [""] if flat else _subfolders(folder) or [""]:
        tree.find(name)
    full = [name for name, images in tree.classes.items() if images]
    if not tree.is_flat and len(full) == 1 and full[0] not in names:  # one folder of images is no set of classes
        return _scan(_split(folder / full[0]), names, flat)
    return tree


def _unlabelled(tree: _Tree, folder: Path, model: nn.Module) -> Labelling:
    """What is known of images without class folders. Raises UserError for ILSVRC's, which are meant to have labels."""
    lists = find_lists({tree.root, tree.root.parent, folder})
    hint = f"; labels may be in a list: --labels {lists[0]}" if lists else ""
    what = f"data folder {str(tree.root)!r}"
    if any(Path(name).name.startswith("ILSVRC2012_val_") for name in tree.classes[""]):
        raise UserError(
            f"{what} is flat, so nothing tells the labels: give a list of them with --labels, or move each image into "
            "a folder named by its wnid, as in n01440764/ILSVRC2012_val_00000293.JPEG "
            f"(torchvision.datasets.ImageNet does it, given the devkit's archive){hint}."
        )
    text = f"{what} has no class folders: its images go without labels, and without top-1{hint}"
    return without_labels(model, DataWarning("no_labels", text))


def _subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _identity(folder: Path) -> tuple[int, int]:
    """What tells a folder from others, however it was reached."""
    stat = folder.stat()
    return stat.st_dev, stat.st_ino


def _size_and_time(path: Path) -> tuple[int, int]:
    """Bytes, and when it last changed; (−1, 0) for a file that is not to be had: it is going to be skipped."""
    try:
        stat = path.stat()
    except OSError:
        return -1, 0
    return stat.st_size, stat.st_mtime_ns
