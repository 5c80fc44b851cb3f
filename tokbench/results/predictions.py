"""Models' answers image by image, and their file format."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from math import nan
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from tokbench.errors import one_line

LARGEST_ARCHIVE = 2**31  # sixty million answers


@dataclass(frozen=True, eq=False)
class Predictions:
    """A model's answers to n images, in order.

    `label` (n,) int64 is the true class, −1 where there is none; such an image is never correct.
    `predicted` (n,) int64 is the class with the largest logit, −1 where the logits were not finite.
    `label_probability` (n,) float32 is the true class's softmax probability, NaN where either is missing.
    `top5` (n,) bool tells whether the true class is among the five most probable.
    `divergence` (n,) float32 is the Kullback-Leibler divergence, in nats, of the answer from the unreduced model's:
    Σ p log(p / q) over the classes, p the unreduced model's probabilities; NaN where either is not finite.
    `similarity` (n,) float32 is the cosine of the pooled features to the unreduced model's, for models without a
    classifier; NaN for all others, and where either is not finite.
    `output` (n,) float32 is the output of a model with only one (a score, a logit); NaN for all others, and where it is
    not finite.
    `neighbor` (n,) int64 is the class that k-NN gives the image by the features of the others, for models without a
    classifier; −1 where they are not finite, −2 if not asked for.
    `classifies` tells whether there are classes at all: not for a model without a classifier or of one output.
    """

    label: NDArray[np.int64]
    predicted: NDArray[np.int64]
    label_probability: NDArray[np.float32]
    top5: NDArray[np.bool_]
    divergence: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    similarity: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    output: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    neighbor: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    classifies: bool = True

    def __post_init__(self) -> None:
        for name in _LATER:
            if len(getattr(self, name)) != len(self.label):
                nothing = np.int64(-2) if _KINDS[name] == "i" else np.float32(np.nan)
                object.__setattr__(self, name, np.full(len(self.label), nothing))

    @property
    def labeled(self) -> bool:
        """Whether any image has a true class."""
        return bool((self.label >= 0).any())

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(n,) bool: whether the predicted class is the true one."""
        return (self.predicted == self.label) & (self.label >= 0)

    def top1(self) -> float:
        """Share of the images with a label whose predicted class is the true one, in [0, 1]; NaN without any."""
        return float(self.correct[self.label >= 0].mean()) if self.labeled else nan

    def top5_accuracy(self) -> float:
        """Share of the images with a label whose true class is among the five most probable, in [0, 1]."""
        return float(self.top5[self.label >= 0].mean()) if self.labeled else nan

    def nonfinite(self) -> int:
        """How many images got logits, features or an output that are not all finite."""
        if self.classifies:
            return int((self.predicted < 0).sum())
        return int((np.isnan(self.similarity) & np.isnan(self.output)).sum())

    def with_label(self) -> Predictions:
        """The answers to the images that have a label."""
        return self.take(np.flatnonzero(self.label >= 0))

    def take(self, places: NDArray[np.int64]) -> Predictions:
        """The answers to the images at these places, in this order."""
        return Predictions(**{name: getattr(self, name)[places] for name in ARRAYS}, classifies=self.classifies)

    def save(self, file: str | Path | BinaryIO) -> None:
        """Write as a compressed NumPy archive, to an open file or under exactly that name."""
        if isinstance(file, str | Path):
            with open(file, "wb") as opened:
                return self.save(opened)
        np.savez_compressed(file, **{own.name: getattr(self, own.name) for own in fields(self)})

    @classmethod
    def load(cls, path: str | Path) -> Predictions:
        """Read what `save` wrote. Raises OSError or ValueError for anything else."""
        return cls.from_arrays(load_arrays(Path(path)))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Predictions:
        """Answers from arrays by name. Raises ValueError if one is missing or has the wrong type or length."""
        found = {name: arrays[name] for name in ARRAYS if name in arrays}
        if absent := [name for name in ARRAYS if name not in found and name not in _LATER]:
            raise ValueError(f"it has no array {absent[0]!r}")
        for name, array in found.items():
            if array.dtype.kind != _KINDS[name] or array.shape != (found["label"].size,):
                raise ValueError(f"its array {name!r} is {array.dtype} of shape {array.shape}")
        if "classifies" in arrays:
            return cls(**found, classifies=bool(np.all(arrays["classifies"])))
        # Older archives of a model without a classifier hold nothing but features.
        return cls(**found, classifies=not np.isfinite(found.get("similarity", np.nan)).any())


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a NumPy archive by name. Nothing is unpickled, and no more than `LARGEST_ARCHIVE` bytes unpacked.

    Raises OSError, and ValueError for anything that is no such archive.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")
    try:
        with zipfile.ZipFile(path) as members:
            if sum(member.file_size for member in members.infolist()) > LARGEST_ARCHIVE:
                raise ValueError(f"unpacked it would be larger than {LARGEST_ARCHIVE / 2**30:g} GiB")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError):
        raise
    except Exception as error:  # zipfile, zlib and NumPy have a dozen ways to stumble over a damaged archive
        raise ValueError(f"it is no archive of arrays, or damaged ({one_line(error)})") from error


ARRAYS = tuple(own.name for own in fields(Predictions) if own.name != "classifies")
"""The fields of Predictions with one entry per image."""
_KINDS = {
    "label": "i", "predicted": "i", "label_probability": "f", "top5": "b", "divergence": "f", "similarity": "f",
    "output": "f", "neighbor": "i",
}  # fmt: skip
_LATER = ("divergence", "similarity", "output", "neighbor")  # which archives of earlier versions lack


def join(parts: Iterable[Predictions]) -> Predictions:
    """Join answers to successive images."""
    parts = list(parts)
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ARRAYS}
    return Predictions(**arrays, classifies=parts[0].classifies)
