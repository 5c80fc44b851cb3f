"""What earlier sessions of a run left: their conditions, their measurements, and half a pass over the images."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from tokbench.config import Cell
from tokbench.data import ImageSource, ImageStream, load_batches
from tokbench.data.decoding import Skipped
from tokbench.errors import RunStopped, UserError, one_line
from tokbench.measure.accuracy import ARRAYS, Predictions, join, load_arrays
from tokbench.schedules import parse_schedule
from tokbench.store import RunFolder, stopping_at_write_errors

SAVE_SECONDS = 5.0
# What predictions and speed may depend on, so that one run has one version of each.
_VERSIONS = ("tokbench", "torch", "torchvision", "timm")


def agreed_conditions(before: Mapping[str, Any], now: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The conditions to go on under: those of the manifest `before`, and those of models and data new in `now`.

    Conditions are a manifest's `machine`, `packages`, `plugins` and `conditions`: dtype, device, batch_size, compile,
    and for each model's label its weights_sha256, input_size, data, data_fingerprint and images. `what` names the run.
    Raises UserError that names every difference between what both have.
    """
    if not before.get("conditions"):
        raise UserError(f"{what} was made by an older tokbench, and cannot be continued; --fresh begins a new run.")
    old, new = before["conditions"], now["conditions"]
    differences = [
        f"{name.replace('_', ' ')} was {old.get(name)} and is {new[name]}"
        for name in ("dtype", "device", "batch_size", "compile")
        if old.get(name, False) != new[name]
    ]
    for part, names in (("machine", _hardware(new["device"])), ("packages", _VERSIONS)):
        was, is_ = before.get(part) or {}, now.get(part) or {}
        differences += [
            f"{name} was {was.get(name)} and is {is_.get(name)}" for name in names if was.get(name) != is_.get(name)
        ]
    plugins = before.get("plugins") or {}
    differences += [
        f"the plugin {name} is another one than before"
        for name, digest in now.get("plugins", {}).items()
        if plugins.get(name, digest) != digest
    ]
    models = dict(old.get("models") or {})
    for label, model in new["models"].items():
        known = models.get(label, {})
        differences += _model_differences(label, known, model)
        models[label] = {key: known.get(key) if value is None else value for key, value in model.items()}
    if differences:
        raise UserError(f"cannot continue {what}: {'; '.join(differences)}. --fresh begins a new run beside it.")
    return {**old, "models": models}


def _hardware(device: str) -> tuple[str, ...]:
    return ("gpu",) if device == "cuda" else ("cpu", "threads")


def _model_differences(label: str, was: Mapping[str, Any], is_: Mapping[str, Any]) -> Iterable[str]:
    def differ(key: str) -> bool:
        return None not in (was.get(key), is_[key]) and was[key] != is_[key]

    if differ("weights_sha256"):
        yield f"the weights of model {label!r} were {was['weights_sha256'][:12]}… and are {is_['weights_sha256'][:12]}…"
    if differ("input_size"):
        yield f"the input size of model {label!r} was {was['input_size']} and is {is_['input_size']}"
    if differ("data") or differ("images"):
        yield f"data was {was['images']:,} images of {was['data']} and is {is_['images']:,} of {is_['data']}"
    elif differ("data_fingerprint"):
        yield f"the images of {is_['data']} are others ({is_['data_fingerprint'][:12]}…)"


class Measured:
    """The records of a run, to be asked what need not be measured again."""

    def __init__(self, records: Iterable[dict[str, Any]]) -> None:
        self._records: dict[tuple[str, ...], dict[str, Any]] = {}
        for record in records:
            self.add(record)

    def add(self, record: dict[str, Any]) -> None:
        """Take one more record; it replaces an earlier one of its cell and kind."""
        cell = cell_key(record["model"], record["method"], record["params"], record["schedule"])
        self._records[*cell, record["kind"]] = record

    def find(self, cell: Cell, kind: str) -> dict[str, Any] | None:
        """The last record of that kind for the cell, however its schedule was written."""
        return self._records.get((*cell_key(cell.model, cell.method.name, cell.method.params, cell.schedule), kind))


def cell_key(model: str, method: str, params: Mapping[str, Any], schedule: str) -> tuple[str, ...]:
    """What a cell is, however its schedule was written."""
    return model, method, json.dumps(params, sort_keys=True), str(parse_schedule(schedule)) if schedule else ""


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

        What lies behind a file that is missing or broken is removed.
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


class Reader:
    """The rest of a source in batches, from where `half` ends. Knows how far it is, and which images it skipped.

    expected: places of the images that an earlier session skipped in the whole source, None when there was none.
    max_bad: per cent of the source that may be skipped.
    """

    def __init__(
        self,
        source: ImageSource | ImageStream,
        batch_size: int,
        workers: int,
        half: HalfPass,
        expected: list[int] | None,
        max_bad: float = 100.0,
    ) -> None:
        self.source, self.end, self.skipped = source, half.end, list(half.skipped)
        self._batch_size, self._workers, self._expected = batch_size, workers, expected
        self._max_bad = max_bad
        self._told = len(self.skipped)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels. Raises RunStopped when images cannot be read at all, or others than before are bad."""
        try:
            for batch in load_batches(self.source, self._batch_size, workers=self._workers, start=self.end):
                self.end = batch.end
                self.skipped += batch.skipped
                self._require_same_skips()
                self._require_few_skips()
                if len(batch.labels):
                    yield batch.images, batch.labels
        except RunStopped:
            raise
        except Exception as error:
            raise RunStopped(f"the images of {self.source.name} cannot be read: {one_line(error)}") from error

    def skipped_since(self) -> list[Skipped]:
        """What was skipped since this was last asked."""
        new, self._told = self.skipped[self._told :], len(self.skipped)
        return new

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


def require_same_answers(before: Predictions, now: Predictions, start: int, what: str) -> None:
    """Raise RunStopped unless the answers are those that `before` holds from place `start` on."""
    for name, word in (("label", "label"), ("predicted", "prediction")):
        was, is_ = getattr(before, name)[start : start + len(now.label)], getattr(now, name)
        if not np.array_equal(was, is_):
            raise RunStopped(
                f"the unreduced model no longer answers as in {what}: its {word}s differ among images {start:,} to "
                f"{start + len(is_):,}, and new cells cannot be compared with old ones. --fresh begins a new run."
            )
