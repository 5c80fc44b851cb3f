"""A run as it is compared with another: its cells, which of them are the same, and what they answered."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokbench.config import Grid
from tokbench.errors import UserError, printable, shortened
from tokbench.results.cell import Cell, CellKey, RecordIndex
from tokbench.results.folder import SKIPPED, RunFolder
from tokbench.results.predictions import Predictions
from tokbench.results.records import AccuracyRecord
from tokbench.results.table import cells_of

Places = NDArray[np.intp]
MEASURES = {"flops": "FLOPs", "accuracy": "accuracy", "speed": "speed"}


@dataclass(frozen=True, eq=False)
class Measured:
    """A cell, which of `MEASURES` it has, and the record of its answers."""

    cell: Cell
    kinds: frozenset[str]
    accuracy: AccuracyRecord | None

    def missing(self, kind: str) -> str:
        """Why a measurement is not there."""
        return f"failed: {self.cell.error}" if self.cell.error else f"{MEASURES[kind]} not measured"


@dataclass(frozen=True)
class Subset:
    """Some of the images that a model's cells answered.

    images: their numbers in the data set. places: where they are among the answers. fingerprint: the data's with these
    images, and those among them that could not be decoded.
    """

    images: Places
    places: Places
    fingerprint: str


class Run:
    """A run folder and its cells.

    Attributes:
        subsets: by model (its label, printable), which images to compare; one that is not there is compared on all.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises UserError for what is no run, and for a run without measurements."""
        self.folder = RunFolder.open(path)
        self.path = self.folder.path
        records = self.folder.records()
        for record in records:
            needed = ("weights_sha256", "data_fingerprint")[: 1 + isinstance(record, AccuracyRecord)]
            for name in needed if record.kind in MEASURES else ():
                if getattr(record, name) is None:
                    raise UserError(
                        f"{self.path}: the {record.kind} record of {printable(record.cell)} has no {name!r}"
                    )
        index = RecordIndex(records)
        self.cells = []
        told: set[CellKey] = set()  # a cell that was timed in several settings has one accuracy
        cells = cells_of(records, machine=self.folder.manifest.machine)
        for cell, (key, _, found) in zip(cells, index.rows(), strict=True):
            kinds = frozenset(MEASURES if key not in told else ["speed"]) & found.keys()
            self.cells.append(Measured(cell, kinds, index.find(key, "accuracy") if "accuracy" in kinds else None))
            told.add(key)
        self.subsets: dict[str, Subset] = {}
        if not any(own.kinds for own in self.cells):
            raise UserError(f"the run {self.path} holds no measurements")

    @cached_property
    def grids(self) -> list[Grid]:
        """What was asked for: once, or again in other words each time the run was continued."""
        grids = [Grid.from_dict(session.grid.plain()) for session in self.folder.manifest.sessions]
        return [grid for place, grid in enumerate(grids) if grid not in grids[:place]]

    @property
    def models(self) -> list[str]:
        """The labels of its models, printable."""
        return list(dict.fromkeys(own.cell.model for own in self.cells))

    def has(self, kind: str) -> bool:
        return any(kind in own.kinds for own in self.cells)

    def known(self, model: str, field: str) -> Any:
        """What the cells of the model with that label say in a field that they share, None where none says anything."""
        values = (getattr(own.cell, field) for own in self.cells if own.cell.model == printable(model))
        return next((value for value in values if value is not None), None)

    def fingerprint(self, cell: Cell) -> str | None:
        """Of the images that the cell is compared on."""
        subset = self.subsets.get(cell.model)
        return subset.fingerprint if subset else cell.data_fingerprint

    def answers(self, record: AccuracyRecord) -> tuple[Places, Predictions]:
        """Which images a cell is compared on, and what it answered. Raises UserError where that cannot be read."""
        path = self.folder.prediction_path(record.cell)
        try:
            found = Predictions.load(path)
        except (OSError, ValueError) as error:
            raise UserError(f"the predictions of {record.cell} cannot be read: {path} ({shortened(error)})") from error
        if len(found.label) != record.images:
            raise UserError(f"{path} has {len(found.label)} predictions, its record {record.images}")
        if subset := self.subsets.get(printable(record.model)):
            return subset.images, found.take(subset.places)
        skipped = self.skipped(record.model)
        return np.delete(np.arange(record.images + len(skipped)), skipped), found

    def skipped(self, model: str) -> list[int]:
        """Places, among the images of the run, of those that could not be decoded."""
        places = [image["index"] for image in self.folder.skipped().get(model, [])]
        images = (self.known(model, "images") or 0) + len(places)
        if len(set(places)) < len(places) or any(place >= images for place in places):
            raise UserError(f"{self.path / SKIPPED} names images of {model} that are not among its {images:,}")
        return places


def matched(before: Run, after: Run) -> list[tuple[Measured, Measured | None]]:
    """Each cell of `before` with the same one of `after`, None where there is none.

    Models are the same by their labels. Where both runs have one, it is the same whatever it is called. Raises
    UserError where no cell has a partner.
    """
    alone = len(before.models) == len(after.models) == 1
    swept = [axis for axis in range(2) if all(any(own.cell.at[axis] for own in run.cells) for run in (before, after))]

    def by_meaning(run: Run) -> dict[tuple[Any, ...], Measured]:
        """Its cells, the first where only the setting is another and the other run has but one."""
        found: dict[tuple[Any, ...], Measured] = {}
        for own in run.cells:
            key = replace(own.cell.key, model="") if alone else own.cell.key
            found.setdefault((key, *(own.cell.at[axis] for axis in swept)), own)
        return found

    known = by_meaning(after)
    pairs = [(own, known.get(key)) for key, own in by_meaning(before).items()]
    if not any(new for _, new in pairs):
        raise UserError(
            f"the runs have no cell in common: {after.path} has {', '.join(after.models)}, "
            f"{before.path} has {', '.join(before.models)}"
        )
    return pairs


def short(digest: str | None) -> str:
    """The beginning of a SHA-256."""
    return f"{digest[:12]}…" if digest else "unknown"
