"""Finds the `searched:` schedules of a grid: in the grid, in an earlier session, or by a search now."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from tokbench.config import Grid, RunOptions, Searched
from tokbench.errors import UserError
from tokbench.fusion.core import Method
from tokbench.plugins import load_plugins, loaded_paths
from tokbench.progress import Progress
from tokbench.results.cell import CellKey
from tokbench.results.records import Session
from tokbench.running.bench import DTYPES, Subject
from tokbench.running.fresh import Job
from tokbench.schedules import parse_schedule
from tokbench.searching.images import DEFAULT_IMAGES, search_data, search_images
from tokbench.searching.objective import Asked, Objective
from tokbench.searching.searcher import Searcher
from tokbench.searching.space import Removals
from tokbench.validation import validated

if TYPE_CHECKING:
    from tokbench.running.cluster import Cluster


def searched_for(
    grid: Grid,
    subjects: Sequence[Subject],
    earlier: Sequence[Session],
    options: RunOptions,
    device: torch.device,
    progress: Progress,
    cluster: Cluster | None = None,
) -> Grid:
    """The grid with an entry for each searched cell, which its subject knows, too. cluster: helps to search.

    Raises UserError for an entry that was made for other weights.
    """
    known = known_searches(grid, earlier)
    for subject in subjects:
        searcher = None
        for cell in subject.cells:
            if not cell.schedule or not (budget := parse_schedule(cell.schedule).budget):
                continue
            if cell.key not in known:
                searcher = searcher or searcher_for(
                    subject, search_data(grid.data), options, device, progress, cluster=cluster
                )
                known[cell.key] = searcher.search(cell.method, budget)
            subject.searched[cell.key] = found = known[cell.key]
            if found.weights_sha256 != subject.weights:
                raise UserError(f"{cell.id} was searched for other weights than this model has: search again")
    kept = [found for subject in subjects for found in subject.searched.values()]
    return replace(grid, searched=tuple(kept))


def known_searches(grid: Grid, earlier: Sequence[Session]) -> dict[CellKey, Searched]:
    """What earlier sessions and the grid say that searched cells stand for."""
    before = [
        validated(Searched, one) for session in earlier for one in (session.grid.model_extra or {}).get("searched", ())
    ]
    return {found.key: found for found in (*before, *grid.searched)}


def searcher_for(
    subject: Subject,
    data: str,
    options: RunOptions,
    device: torch.device,
    progress: Progress,
    images: int = DEFAULT_IMAGES,
    cluster: Cluster | None = None,
) -> Searcher:
    """The searcher for a model of a grid, on the device and in the dtype that it will run in."""
    shown = search_images(data, subject.model, images, options.labels if data != "bundled:train" else None)
    model = subject.model.to(device, DTYPES[options.dtype])
    searcher = Searcher(
        subject.spec.label, subject.weights, model, data, shown, options.images_at_once(device.type), progress
    )
    if cluster:
        job = Job(
            subject.spec, Grid(data=data), options, device.type, [], images, 0, torch.get_num_threads(), loaded_paths()
        )
        searcher.workers = _Workers(cluster, job, _conditions(searcher))
    return searcher


def _conditions(searcher: Searcher) -> dict[str, Any]:
    """What must be the same for a searcher and its workers."""
    return {
        "weights_sha256": searcher.weights,
        "images to search on": hashlib.sha256(searcher.marks.encode()).hexdigest(),
    }


class Evaluator:
    """The searcher of a job, in a process of Ray's."""

    def __init__(self, job: Job) -> None:
        from tokbench.running.runner import load_subject  # which imports this module

        torch.set_num_threads(job.threads)
        load_plugins(job.plugins)
        options = replace(job.options, only=("flops",), check_answers=False)
        subject = load_subject(job.spec, job.grid, options)
        self._searcher = searcher_for(subject, job.grid.data, options, torch.device(job.device), Progress(), job.size)
        self._objective = Objective(subject.model, self._searcher.shown)

    def conditions(self) -> dict[str, Any]:
        """Of the model and the images."""
        return _conditions(self._searcher)

    def show(self, removals: Removals, method: Method, number: int) -> float:
        """The distance of a candidate's answers to a batch."""
        return self._objective.of_batch(removals, method, number)


@dataclass
class _Workers:
    """Workers that give distances; own: see `_conditions`.

    They are busy with nothing before the first: until then, a search may time what its budget is about.
    """

    cluster: Cluster
    job: Job
    own: dict[str, Any]
    begun: bool = False

    def __call__(self, asked: Sequence[Asked]) -> Iterator[float]:
        if not self.begun:
            self.cluster.begin(partial(Evaluator, self.job), self.own)
            self.begun = True
        return self.cluster.results(asked)

    def __str__(self) -> str:
        return str(self.cluster)
