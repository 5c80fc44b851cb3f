"""Finds the `searched:` schedules of a grid: in the grid, in an earlier session, or by a search now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from tokbench.config import Grid, RunOptions, Searched
from tokbench.errors import UserError
from tokbench.progress import Progress
from tokbench.results.records import Session
from tokbench.running.bench import DTYPES, Subject
from tokbench.schedules import parse_schedule
from tokbench.searching.images import DEFAULT_IMAGES, search_data, search_images
from tokbench.searching.searcher import Searcher
from tokbench.validation import validated


def searched_for(
    grid: Grid,
    subjects: Sequence[Subject],
    earlier: Sequence[Session],
    options: RunOptions,
    device: torch.device,
    progress: Progress,
) -> Grid:
    """The grid with an entry for each searched cell, which its subject knows, too.

    Raises UserError for an entry that was made for other weights.
    """
    before = [
        validated(Searched, one) for session in earlier for one in (session.grid.model_extra or {}).get("searched", ())
    ]
    known = {found.key: found for found in (*before, *grid.searched)}
    for subject in subjects:
        searcher = None
        for cell in subject.cells:
            if not cell.schedule or not (budget := parse_schedule(cell.schedule).budget):
                continue
            if cell.key not in known:
                searcher = searcher or searcher_for(subject, search_data(grid.data), options, device, progress)
                known[cell.key] = searcher.search(cell.method, budget)
            subject.searched[cell.key] = found = known[cell.key]
            if found.weights_sha256 != subject.weights:
                raise UserError(f"{cell.id} was searched for other weights than this model has: search again")
    kept = [found for subject in subjects for found in subject.searched.values()]
    return replace(grid, searched=tuple(kept))


def searcher_for(
    subject: Subject,
    data: str,
    options: RunOptions,
    device: torch.device,
    progress: Progress,
    images: int = DEFAULT_IMAGES,
) -> Searcher:
    """The searcher for a model of a grid, on the device and in the dtype that it will run in."""
    shown = search_images(data, subject.model, images, options.labels if data != "bundled:train" else None)
    model = subject.model.to(device, DTYPES[options.dtype])
    return Searcher(
        subject.spec.label, subject.weights, model, data, shown, options.images_at_once(device.type), progress
    )
