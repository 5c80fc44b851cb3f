"""Lists of labels: which class each image file shows, as CSV files, ILSVRC's and Tiny ImageNet's texts say it."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from scipy.io import loadmat
from torch import nn

from tokbench.data.labels import DataWarning, Labelling, label_classes, some
from tokbench.errors import UserError, nearest, shortened

LARGEST_LIST = 2**28  # bytes: ten million lines
_FILE_COLUMNS = ("file", "filename", "file_name", "image", "imageid", "image_id", "path", "name", "id")
_LABEL_COLUMNS = ("label", "class", "class_name", "classname", "wnid", "target", "category", "predictionstring")
_WORDS = ("annotation", "ground_truth", "label", "solution", "val")


def find_lists(folders: Iterable[Path]) -> list[Path]:
    """Files in these folders that look like lists of labels, by their names."""
    return sorted(
        path
        for folder in folders
        if os.access(folder, os.R_OK | os.X_OK)
        for path in folder.iterdir()
        if path.suffix in (".csv", ".txt") and any(word in path.stem.lower() for word in _WORDS)
    )


def read_list(
    path: Path, images: Sequence[str], model: nn.Module, what: str
) -> tuple[list[tuple[str, int]], Labelling]:
    """Each image with its place among the labelling's classes, −1 where the list does not name it.

    A line is a file name and a class name or number, separated by comma, tab, semicolon or space; or a class alone,
    one line for each image in the order of their names. A first line may name the columns. Files are known by their
    path below the data folder or by their name, with or without its ending.

    Raises UserError for a file that is no such list, or names none of the images.
    """
    rows = _rows(path)
    if all(len(row) == 1 for row in rows):
        if len(rows) != len(images):
            raise UserError(f"labels {str(path)!r} has {len(rows)} lines of one class each, for {len(images)} images.")
        found = dict(zip(images, _devkit_classes(path, [row[0] for row in rows]), strict=True))
    else:
        told = dict(_columns(path, rows))
        found = {name: label for name in images if (label := _look_up(told, name)) is not None}
        if not found:
            raise UserError(f"labels {str(path)!r} names none of the images of {what}, such as {images[0]!r}.")
    classes = sorted(set(found.values()))
    place = {name: number for number, name in enumerate(classes)}
    labelling = label_classes(classes, model, f"labels {str(path)!r}")
    missing = [name for name in images if name not in found]
    if missing:
        text = f"{len(missing)} of {len(images)} images have no label in {path.name!r} ({some(missing)})"
        labelling = labelling.warned(DataWarning("unlabelled", f"{text}: they count in no accuracy"))
    return [(name, place[found[name]] if name in found else -1) for name in images], labelling


def _rows(path: Path) -> list[list[str]]:
    try:
        if path.stat().st_size > LARGEST_LIST:
            raise UserError(
                f"labels {str(path)!r} is larger than {LARGEST_LIST / 2**20:g} MiB: it is no list of labels."
            )
        lines = [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except FileNotFoundError:
        close = nearest(path.name, [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else [])
        raise UserError(f"labels {str(path)!r} does not exist.{close}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"labels {str(path)!r} cannot be read as text: {shortened(error)}") from error
    if not lines:
        raise UserError(f"labels {str(path)!r} is empty: a line should be a file name and a class, as in cat.png,tabby")
    separator = next((mark for mark in "\t,;" if all(mark in line for line in lines[:5])), None)
    if separator is None:
        return [line.strip().rsplit(maxsplit=1) for line in lines]
    return [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=separator)]


def _columns(path: Path, rows: list[list[str]]) -> Iterable[tuple[str, str]]:
    """File and class of each row."""
    head = [cell.casefold() for cell in rows[0]]
    file, label = (
        next((head.index(name) for name in names if name in head), None) for names in (_FILE_COLUMNS, _LABEL_COLUMNS)
    )
    named = file is not None and label is not None
    if file is None or label is None:
        file, label = 0, 1
    for number, row in enumerate(rows[1:] if named else rows, 2 if named else 1):
        if len(row) <= max(file, label) or not row[label]:
            raise UserError(f"labels {str(path)!r}, line {number}: no file name and class, as in cat.png,tabby")
        name = row[label]
        # Kaggle's LOC_val_solution.csv adds boxes to the wnid.
        yield row[file], name.split()[0] if head[label] == "predictionstring" else name


def _look_up(told: dict[str, str], image: str) -> str | None:
    path = PurePosixPath(image)
    for name in (image, path.name, str(path.with_suffix("")), path.stem):
        if name in told:
            return told[name]
    return None


def _devkit_classes(path: Path, labels: list[str]) -> list[str]:
    """Class names of labels by line: the ILSVRC devkit's numbers are not in ImageNet's order; its meta.mat tells."""
    if path.name != "ILSVRC2012_validation_ground_truth.txt":
        return labels
    meta = path.with_name("meta.mat")
    if not meta.is_file():
        raise UserError(
            f"labels {str(path)!r} needs the devkit's 'meta.mat' beside it: it tells which wnid a number is."
        )
    try:
        wnids = {str(row[0]): str(row[1]) for row in loadmat(meta, squeeze_me=True)["synsets"]}
        return [wnids[label] for label in labels]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{str(meta)!r} is not the ILSVRC devkit's list of classes: {shortened(error)}") from error
