"""Half a pass over the images, kept in the run folder so that an interrupted run goes on from there."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tokbench.data.decoding import Skipped
from tokbench.results.folder import RunFolder, stopping_at_write_errors
from tokbench.results.predictions import ARRAYS, Predictions, join, load_arrays

SAVE_SECONDS = 5.0


@dataclass
class HalfPass:
    """What a pass over the images has so far: the answers of cells (by id) to all images before place `end`."""

    end: int = 0
    answers: dict[str, Predictions] = field(default_factory=dict)
    batch_sizes: dict[str, int] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)


class PassFile:
    """Keeps a model's pass over the images in the run folder while it goes on: a file every few seconds."""

    def __init__(self, folder: RunFolder, model: str) -> None:
        self.folder, self.model = folder, model
        self._waiting: list[HalfPass] = []
        self._start = 0
        self._saved_at = time.monotonic()

    def load(self) -> HalfPass | None:
        """What an earlier session saved, for the cells that were there to the end of it; None where there is nothing.

        Files after a missing or broken one are removed.
        """
        parts: list[HalfPass] = []
        paths = self.folder.partial_paths(self.model)
        for path in paths:
            part = _read(path)
            if part is None or part[0] != (parts[-1].end if parts else 0):
                break
            parts.append(part[1])
        with stopping_at_write_errors(self.folder.path):
            for path in reversed(paths[len(parts) :]):
                path.unlink()
        if not parts:
            return None
        self._start = parts[-1].end
        return HalfPass(
            self._start,
            {cell: join(part.answers[cell] for part in parts) for cell in parts[-1].answers},
            parts[-1].batch_sizes,
            [image for part in parts for image in part.skipped],
        )

    def add(self, batch: HalfPass) -> None:
        """Take the answers to one more batch, and save what there is if the last time is long ago."""
        self._waiting.append(batch)
        if time.monotonic() - self._saved_at >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write what was added since the last time."""
        if not self._waiting:
            return
        last = self._waiting[-1]
        answers = {cell: join(part.answers[cell] for part in self._waiting) for cell in last.answers}
        about = {
            "start": self._start,
            "end": last.end,
            "cells": list(answers),
            "batch_sizes": last.batch_sizes,
            "skipped": [asdict(image) for part in self._waiting for image in part.skipped],
        }
        first = next(iter(answers.values()))
        about["classifies"] = first.classifies
        own_arrays = [name for name in ARRAYS if name != "label"]
        arrays = {f"{name}_{i}": getattr(own, name) for i, own in enumerate(answers.values()) for name in own_arrays}
        self.folder.replace(
            self.folder.partial_name(self.model, last.end),
            lambda file: np.savez(file, about=np.array(json.dumps(about)), label=first.label, **arrays),
        )
        self._waiting, self._start, self._saved_at = [], last.end, time.monotonic()

    def remove(self) -> None:
        """Forget the pass: it is over, or will not be continued."""
        self._waiting, self._start = [], 0
        self.folder.remove_partial(self.model)


def _read(path: Any) -> tuple[int, HalfPass] | None:
    """(start, what `PassFile.save` wrote), None for a broken file."""
    try:
        arrays = load_arrays(path)
        about = json.loads(str(arrays["about"]))
        start, end, batch_sizes = about["start"], about["end"], about["batch_sizes"]
        answers = {
            cell: Predictions.from_arrays(
                {name: arrays[name if name == "label" else f"{name}_{i}"] for name in ARRAYS}
                | {"classifies": about["classifies"]}
            )
            for i, cell in enumerate(about["cells"])
        }
        skipped = [Skipped(**image) for image in about["skipped"]]
        fits = len(arrays["label"]) + len(skipped) == end - start and all(
            start <= image.index < end and isinstance(image.name, str) and isinstance(image.reason, str)
            for image in skipped
        )
        sized = all(isinstance(size, int) and size > 0 for size in batch_sizes.values())
        return (start, HalfPass(end, answers, batch_sizes, skipped)) if answers and fits and sized else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
