"""`tokbench export`: from a cell of a run, or from the words for a model and a method, to a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tokbench.config import MethodSpec
from tokbench.errors import UserError, nearest
from tokbench.exporting.formats import find_format
from tokbench.exporting.writing import Exported, default_images, export, require_free
from tokbench.models import load_model, weights_sha256
from tokbench.report.code import applied, loaded
from tokbench.resolve import apply
from tokbench.results.cell import Cell
from tokbench.results.folder import RunFolder
from tokbench.results.table import columns_of, figure_columns, load_cells

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


def export_asked(
    run: Path | None,
    cell_id: str | None,
    asked: Mapping[str, Any],
    out: Path,
    *,
    format: str | None,
    batch: str,
    dtype: str | None,
    force: bool,
) -> Exported:
    """What the command line asks for: a cell of a run, or the model and the method in `asked`.

    Raises UserError and RunStopped as `export` does, before any model is loaded where that can be told.
    """
    find_format(out, format)
    require_free(out, force)
    if batch != "dynamic" and not batch.isdecimal():
        raise UserError(f"--batch must be a number of images or 'dynamic', not {batch!r}")
    if dtype not in (None, *_DTYPES):
        raise UserError(f"--dtype is {' or '.join(_DTYPES)}, not {dtype!r}.{nearest(str(dtype), _DTYPES)}")
    given = [f"--{key.replace('_', '-')}" for key, value in asked.items() if value is not None]
    if (run is None) != (cell_id is None):
        raise UserError("a cell is named by both: the run's folder, and --cell ID")
    if run is None or cell_id is None:
        if asked["model"] is None:
            raise UserError("there is nothing to export: name a RUN and its --cell, or a --model")
        model, about = _of_words(**asked)
    elif given:
        raise UserError(f"{given[0]} and --cell contradict each other: the run says how its cells are made")
    else:
        cell = find_cell(run, cell_id)
        model, about = _of_cell(cell, RunFolder.open(run))
        dtype = dtype or (cell.dtype if cell.dtype in _DTYPES else None)
    about["weights_sha256"] = weights_sha256(model)  # before they are cast
    model = model.to(_DTYPES[dtype or "fp32"])
    size = "dynamic" if batch == "dynamic" else int(batch)
    return export(model, out, format=format, batch=size, about=about, force=force)  # type: ignore[arg-type]


def find_cell(run: Path, cell_id: str) -> Cell:
    """The cell of that name. Raises UserError, with the nearest ones, where the run has none."""
    cells = {cell.id: cell for cell in load_cells([run])}
    if cell_id not in cells:
        close = nearest(cell_id, cells) or f" It has {', '.join(map(repr, list(cells)[:3]))} …"
        raise UserError(f"the run {str(run)!r} has no cell {cell_id!r}.{close}")
    return cells[cell_id]


def _of_cell(cell: Cell, folder: RunFolder) -> tuple[Any, dict[str, Any]]:
    words, named = loaded(cell, folder.manifest)
    model: Any = load_model(*words, **named)
    if cell.weights_sha256 and weights_sha256(model) != cell.weights_sha256:
        raise UserError(f"the weights of {words[0]!r} are not those that the run {str(folder.path)!r} measured")
    if not cell.is_baseline:
        schedule, params = applied(cell)
        apply(model, cell.method, schedule, **params)
    row = columns_of(cell)
    measured = {name: row[name] for name in ("images", "batch_size", "device", "machine", "dtype", "runtime", "data")}
    measured |= {name: row[name] for name in figure_columns()}
    return model, {
        "model": cell.model,
        "cell": cell.id,
        "measured": {name: value for name, value in measured.items() if value is not None},
    }


def _of_words(
    model: str, checkpoint: Path | None, input_size: int | None, method: str | None, schedule: str | None
) -> tuple[Any, dict[str, Any]]:
    spec = MethodSpec.from_text(method or "none")
    if (spec.name == "none") != (schedule is None):
        raise UserError("--method and --schedule go together, as in --method tome --schedule 13")
    if schedule is not None:
        spec.check()
    built: Any = load_model(model, checkpoint, input_size=input_size)
    if schedule is not None:
        apply(built, spec.name, schedule, images=default_images(built), **spec.params)
    return built, {"model": model} | ({"checkpoint": str(checkpoint)} if checkpoint else {})
