"""What a check has to open and to measure: the baseline's grid once more, and the images that `--limit` takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from tokbench import data, models
from tokbench.check.compare import require_comparable_speed, speed_only
from tokbench.check.runs import Run, Subset, short
from tokbench.config import Grid, ModelSpec, RunOptions
from tokbench.errors import UserError, printable
from tokbench.measure.environment import describe_machine
from tokbench.progress import Progress
from tokbench.results.conditions import differences
from tokbench.results.folder import SKIPPED, is_run, new_run_path, require_free
from tokbench.results.records import Conditions, Machine
from tokbench.running import runner

Asked = list[tuple[Grid, RunOptions]]


def how_to_measure(baseline: Run, *, with_speed: bool, limit: int | None, device: str | None) -> Asked:
    """The baseline's grids, and how to measure them again: as they were, but for speed where nobody asks for it.

    Raises UserError where there is no such device, and for speed where this is other hardware.
    """
    manifest = baseline.folder.manifest
    known = manifest.conditions or Conditions()
    asked: Asked = []
    for grid in baseline.grids:
        own = grid.options
        kinds = tuple(kind for kind in own.only if kind != "speed" or with_speed)
        if not kinds:
            continue
        place = device or (known.device or "auto" if own.device == "auto" else own.device)
        answers = own.check_answers and "speed" in kinds
        options = replace(own, only=kinds, check_answers=answers, limit=limit or own.limit, device=place, ray=None)
        try:
            found = runner.find_device(place)
        except UserError as error:
            if device is not None:
                raise
            where = f"{manifest.machine.gpu} ({place})" if manifest.machine.gpu else place
            raise UserError(
                f"the baseline {baseline.path} was measured on {where}, and PyTorch sees no such device here; "
                "--device cpu compares all but speed"
            ) from error
        if known.batch_size and found.type != known.device:
            # "auto" is another on every kind of device
            size = tuple(known.batch_size) if isinstance(known.batch_size, list) else known.batch_size
            options = replace(options, batch_size=size)
        if "speed" in kinds:
            here = {
                "conditions": known.model_copy(update={"device": found.type}),
                "machine": Machine.model_validate(describe_machine(found)),
            }
            require_comparable_speed(differences(manifest, manifest.model_copy(update=here), baseline.path), baseline)
        asked.append((grid, options))
    if not asked:
        raise speed_only(baseline)
    return asked


def measure_again(baseline: Run, asked: Asked, out: str | Path | None, progress: Progress | None) -> Path:
    """Run the baseline's grids once more, into a new folder.

    No run is continued: what the code gave before its last change is not what it gives now.
    """
    path = Path(out) if out else new_run_path(label=f"check-{baseline.grids[0].models[0].label}")
    if is_run(path):
        raise UserError(f"{path} holds a run already: name a new folder, or compare that run: tokbench check {path} …")
    require_free(path)
    for grid, options in asked:
        runner.run(grid, path, options=options, progress=progress)
    return path


def subsets(run: Run, limit: int | None) -> dict[str, Subset]:
    """Of each model of the run, the images that `limit` takes.

    Opens the models and their data, and raises UserError unless they are what the run measured.
    """
    if limit and not run.has("accuracy"):
        raise UserError(f"--limit {limit}: the run {run.path} has not measured accuracy")
    chosen: dict[str, Subset] = {}
    for grid in reversed(run.grids):  # a run that was continued may have grown: the last session saw all images
        for spec in grid.models:
            label = printable(spec.label)
            if label not in chosen and run.known(spec.label, "weights_sha256") is not None:
                drawn = {"random_weights": True} if spec.random_weights else {}
                model = models.load_model(spec.name, spec.checkpoint, input_size=spec.input_size, **drawn)
                now = models.weights_sha256(model)
                _require_same(run, spec, "weights_sha256", now, f"weights of model {spec.label}")
                if "accuracy" in grid.options.only:
                    chosen[label] = _subset(run, grid, spec, model, limit)
    return chosen


def _subset(run: Run, grid: Grid, spec: ModelSpec, model: nn.Module, limit: int | None) -> Subset:
    source = data.open_dataset(grid.data, model, limit=grid.options.limit, labels=grid.options.labels)
    _require_same(run, spec, "data_fingerprint", source.fingerprint, f"images of data '{grid.data}'")
    wanted = source if limit is None else data.open_dataset(grid.data, model, limit=limit, labels=grid.options.labels)
    if len(wanted) < (limit or 0) or not np.isin(wanted.indices, source.indices).all():
        raise UserError(f"--limit {limit}: the run {run.path} has only {len(source):,} images")
    skipped = run.skipped(spec.label)
    known = run.known(spec.label, "images")
    if known is not None and known + len(skipped) != len(source):
        raise UserError(
            f"{run.path} has answers to {known:,} of the {len(source):,} images, and {SKIPPED} names {len(skipped):,} "
            "that could not be decoded"
        )
    answered = np.delete(source.indices, skipped)
    images = np.intersect1d(wanted.indices, answered)
    if not len(images):
        raise UserError(f"--limit {limit}: none of these images can be decoded")
    return Subset(images, np.searchsorted(answered, images), wanted.fingerprint)


def _require_same(run: Run, spec: ModelSpec, field: str, now: str, what: str) -> None:
    then = run.known(spec.label, field)
    if then is not None and then != now:
        raise UserError(f"the {what} are not those of {run.path}: sha256 {short(now)} now, {short(then)} there")
