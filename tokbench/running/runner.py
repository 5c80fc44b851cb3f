"""Runs a grid: loads its models, opens or continues the run folder, and has every model measured.

The same command on the same folder continues where the last one stopped.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer

from tokbench.config import Grid, ModelSpec, RunOptions, require_data
from tokbench.data import ImageStream, open_dataset
from tokbench.errors import BaselineFailed, RunStopped, UserError
from tokbench.exporting.runtimes import require_runtimes, runtime_versions
from tokbench.fusion.anatomy import write_attention_out
from tokbench.fusion.core import make_method
from tokbench.fusion.patch import require_supported
from tokbench.measure._model import resolve_input_size
from tokbench.measure.environment import describe_machine, git_state, package_versions, thread_warnings
from tokbench.models import load_model, weights_sha256
from tokbench.plugins import LOADED
from tokbench.progress import Progress
from tokbench.resolve import check_schedule
from tokbench.results.cell import Cell, RecordIndex, key_of
from tokbench.results.conditions import agreed
from tokbench.results.folder import RunFolder, fresh_path, is_run, new_run_path, removed, require_free
from tokbench.results.records import SCHEMA, Manifest, Record, Session
from tokbench.results.table import frame, load_cells
from tokbench.running.answers import measure_accuracy
from tokbench.running.bench import Bench, Subject, looks_at_images
from tokbench.running.cluster import Cluster, opened
from tokbench.running.searched import searched_for
from tokbench.running.timing import time_cells
from tokbench.schedules import parse_schedule

if TYPE_CHECKING:
    import pandas as pd


def run(
    grid: Grid | str | Path | None = None,
    out: str | Path | None = None,
    *,
    options: RunOptions | None = None,
    progress: Progress | None = None,
    fresh: bool = False,
) -> pd.DataFrame:
    """Measure every cell of a grid and draw the Pareto plot; returns a row per cell (see `load_table`).

    A cell that fails is recorded as a failure (column `error`) and the others go on; a later session tries it again.

    Args:
        grid: a Grid, the path of a grid file, or None for the default one.
        out: the run folder, by default a new one under results/; an existing run is continued: only what it lacks is
            measured.
        options: instead of the grid's own.
        progress: told what happens; silent by default.
        fresh: never continue, but begin in `out`-2 and so on.

    Raises:
        UserError: bad input, before anything is measured, also when the run in `out` had another model, data or dtype.
        RunStopped: it cannot go on; what was measured is kept.
    """
    if not isinstance(grid, Grid):
        grid = Grid.default() if grid is None else Grid.from_toml(grid)
    options = options or grid.options
    progress = progress or Progress()
    path = Path(out) if out else new_run_path(label=grid.models[0].label)
    if fresh and is_run(path):
        path = fresh_path(path)
    if not is_run(path):
        require_free(path)  # before any model is downloaded
    device = require_possible(grid, options)
    if "speed" in options.only:
        for warning in thread_warnings(device):
            progress.warn(warning)
    with RunFolder.held(path), ExitStack() as stack:
        folder = RunFolder.open(path) if is_run(path) else None
        subjects = [load_subject(spec, grid, options) for spec in grid.models]
        cluster = stack.enter_context(opened(options, subjects, grid.data, device, progress))
        earlier = folder.manifest.sessions if folder else []
        grid = searched_for(grid, subjects, earlier, options, device, progress, cluster)
        plan = planned(grid, options, device, subjects, folder, progress, cluster)
        folder = _continued(folder, plan) if folder else RunFolder.create(path, plan.manifest.plain())
        count = sum(len(subject.cells) for subject in subjects)
        speeds = len(options.settings) if "speed" in options.only else 0
        progress.started(folder, count, count * (len({*options.only} - {"speed"}) + speeds))
        for text in plan.grown.values():
            progress.note(text)
        for bench in plan.benches:
            bench.folder = folder
        if plan.records:
            asked = {cell.key: (bench, cell) for bench in plan.benches for cell in bench.subject.cells}
            found = ((record, *asked.get(key_of(record), (None, None))) for record in plan.records)
            progress.continued(
                [
                    record
                    for record, bench, cell in found
                    if bench and cell and record.kind in options.only and bench.holds(cell, record)
                ]
            )
        for bench in plan.benches:
            _measure(bench)
        try:
            cells = load_cells([folder.path])
            plots = _draw(cells, folder.path, progress.note)
        except UserError as error:
            kept = "; what was measured is kept." if is_run(path) else ""
            raise RunStopped(f"{str(error).rstrip('.')}{kept}") from error
        if not is_run(path):  # removed meanwhile: drawing brings back only the plot
            raise removed(path)
        progress.finished(cells, plots)
    return frame(cells)


def require_possible(grid: Grid, options: RunOptions) -> torch.device:
    """The device to measure on. Raises UserError where it, a runtime or the data is not there."""
    if "accuracy" in options.only or options.check_answers:
        require_data(grid.data)
    device = find_device(options.device)
    if "speed" in options.only:
        require_runtimes(options.runtimes, device, options.dtype)
    return device


def _measure(bench: Bench) -> None:
    """Measure what the run lacks of one model.

    FLOPs come first: they take seconds and tell which cells run at all. Then accuracy, then speed. A record is on disk
    as soon as it is measured, and a pass over the images every few seconds.
    """
    if not bench.waiting():
        return
    steps: dict[str, Callable[[], None]] = {
        "setup": bench.prepare,
        "accuracy": partial(measure_accuracy, bench),
        "speed": partial(time_cells, bench),
    }
    try:
        for phase, step in steps.items():
            if phase == "setup" or phase in bench.options.only:
                try:
                    step()
                except (UserError, BaselineFailed):
                    raise
                except Exception as error:  # of no cell in particular: another model may fare better
                    bench.fail(phase, error)
    except BaselineFailed:
        bench.progress.warn(
            f"{bench.subject.spec.label}: the unreduced model failed, and there is nothing to compare its cells with"
        )
    finally:
        bench.let_go()


def find_device(name: str) -> torch.device:
    """The device of that name; "auto" takes CUDA, else MPS, else the CPU. Raises UserError if it is not there."""
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if has_cuda else "mps" if has_mps else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not has_cuda:
        raise UserError(f"device '{name}': PyTorch sees no CUDA device here; --device cpu works anywhere")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device '{name}': there are {torch.cuda.device_count()} CUDA devices, counted from cuda:0")
    if device.type == "mps" and not has_mps:
        raise UserError(f"device '{name}': PyTorch sees no MPS device here; --device cpu works anywhere")
    return device


def load_subject(spec: ModelSpec, grid: Grid, options: RunOptions, *, keep: bool = True) -> Subject:
    """A model of the grid with the images it needs. Raises UserError where a cell of it cannot be.

    keep: add the images to the cache that was asked for.
    """
    load = partial(load_model, random_weights=True) if spec.random_weights else load_model
    model = cast(VisionTransformer, load(spec.name, spec.checkpoint, input_size=spec.input_size))
    require_supported(model)
    if options.fused == "off":
        write_attention_out(model)
    cells = grid.cells(spec)
    for cell in cells:
        if cell.schedule:
            check_schedule(parse_schedule(cell.schedule), len(model.blocks))
        if not cell.is_baseline:
            make_method(cell.method.name, **cell.method.params).require_depth(len(model.blocks))
    if options.check_answers and model.num_classes < 2:
        raise UserError(f"--check-answers compares classes, and model {spec.label!r} has none")
    wants_images = "accuracy" in options.only or options.check_answers or any(map(looks_at_images, cells))
    source = open_dataset(grid.data, model, limit=options.limit, labels=options.labels) if wants_images else None
    if source and options.cache:
        if isinstance(source, ImageStream):
            raise UserError(f"--cache: {source.name} is a stream, of which images cannot be kept by place")
        source.keep_in(Path(options.cache).expanduser(), add=keep)
    return Subject(spec, model, weights_sha256(model), resolve_input_size(model, None), source, cells)


@dataclass
class Plan:
    """What a run is to measure. manifest: of this session. grown: see `grown_models`. records: of earlier sessions."""

    manifest: Manifest
    grown: dict[str, str]
    records: list[Record]
    benches: list[Bench]


def planned(
    grid: Grid,
    options: RunOptions,
    device: torch.device,
    subjects: list[Subject],
    folder: RunFolder | None,
    progress: Progress,
    cluster: Cluster | None = None,
) -> Plan:
    """What is to be measured of these models in this run, None for a new one; writes nothing.

    Raises UserError where the run was measured under other conditions.
    """
    batch_size = batch_size_of(options, device, folder)
    manifest = manifest_of(grid, options, device, subjects, batch_size)
    grown, records = dict[str, str](), list[Record]()
    if folder:
        grown = grown_models(folder.manifest, grid, options, subjects)
        conditions = agreed(folder.manifest, manifest, f"the run {str(folder.path)!r}", grown)
        manifest, records = manifest.model_copy(update={"conditions": conditions}), folder.records()
    index = RecordIndex(records)
    for subject in subjects:
        subject.cells = [cell.named_as(index) for cell in subject.cells]
    benches = [
        Bench(subject, cast(RunFolder, folder), options, device, progress, index, batch_size, grid, cluster=cluster)
        for subject in subjects
    ]
    return Plan(manifest, grown, records, benches)


def batch_size_of(options: RunOptions, device: torch.device, folder: RunFolder | None) -> int:
    """What was asked for, the largest of several, or what the run that is continued had."""
    before = folder.manifest.conditions if folder and options.batch_size == "auto" else None
    known = before.batch_size if before else None
    return (max(known) if isinstance(known, list) else known) or options.images_at_once(device.type)


def manifest_of(
    grid: Grid, options: RunOptions, device: torch.device, subjects: list[Subject], batch_size: int
) -> Manifest:
    """What a new run would write now."""
    described = {
        "grid": replace(grid, options=options).to_dict(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "conditions": {
            "dtype": options.dtype,
            "device": device.type,
            "batch_size": list(options.sizes) or batch_size,
            "runtimes": list(options.runtimes),
            "fused": options.fused,
            "models": {subject.spec.label: subject.conditions() for subject in subjects},
        },
        "machine": describe_machine(device),
        "packages": package_versions() | runtime_versions(options.runtimes),
        "git": git_state() or installed_commit(),
        "command": shlex.join(["tokbench", *sys.argv[1:]])
        if Path(sys.argv[0]).stem in ("tokbench", "__main__")
        else None,
        "plugins": dict(LOADED),
        "seeds": {"subset of the images": 0, "order of timing": 0, "images that are timed": 0},
    }
    return Manifest.model_validate({"schema": SCHEMA, **described})


def installed_commit() -> dict[str, Any] | None:
    """{"commit"} that pip says it installed this tokbench from (PEP 610, `direct_url.json`); None where it does not.

    Whether somebody changed the installed files is not known.
    """
    try:
        installed = distribution("tokbench")
        origin = json.loads(installed.read_text("direct_url.json") or "{}")
    except (PackageNotFoundError, OSError, ValueError):
        return None
    # Another copy may be first on the path.
    if Path(str(installed.locate_file("tokbench"))).resolve() != Path(__file__).resolve().parents[1]:
        return None
    vcs = origin.get("vcs_info") if isinstance(origin, dict) else None
    commit = vcs.get("commit_id") if isinstance(vcs, dict) else None
    return {"commit": commit} if isinstance(commit, str) else None


def grown_models(before: Manifest, grid: Grid, options: RunOptions, subjects: list[Subject]) -> dict[str, str]:
    """The models whose images are those of earlier sessions and more, and what that means in words.

    Accuracy is measured again on all of these images: the new ones lie between the old, and a calibration is of all.
    """
    known = before.conditions.models if before.conditions else {}
    grown = {}
    for subject in subjects:
        was, source, label = known.get(subject.spec.label), subject.source, subject.spec.label
        if was is None or source is None or was.images is None or was.images >= len(source):
            continue
        part = open_dataset(grid.data, subject.model, limit=was.images, labels=options.labels)
        if (part.name, part.fingerprint) == (was.data, was.data_fingerprint):
            grown[label] = (
                f"{label}: {len(source):,} images instead of {was.images:,}, so accuracy is measured again on all of "
                "them; FLOPs and speed are kept where they do not depend on the images"
            )
    return grown


def _continued(folder: RunFolder, plan: Plan) -> RunFolder:
    """The run with this session added to its manifest."""
    before, manifest = folder.manifest, plan.manifest
    session = Session(**{name: getattr(manifest, name) for name in ("started", "grid", "command", "git", "plugins")})
    folder.repair()
    for label in plan.grown:
        folder.remove_partial(label)  # half a pass over fewer images
    plugins = {**before.plugins, **manifest.plugins}
    more = {"conditions": manifest.conditions, "plugins": plugins, "continued": [*before.continued, session]}
    folder.write_manifest(before.model_copy(update=more))
    return folder


def _draw(cells: list[Cell], folder: Path, tell: Callable[[str], None]) -> list[Path]:
    """Draw the Pareto plot; if there is nothing to plot, tell why."""
    from tokbench.report.plots import plot_run

    drawn = plot_run(cells, folder / "pareto.png", tell)
    return [drawn] if drawn else []
