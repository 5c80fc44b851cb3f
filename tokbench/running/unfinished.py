"""Earlier runs of the same grid that stopped: a new command without --out would begin again beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokbench.config import Grid
from tokbench.errors import UserError
from tokbench.fusion.core import METHODS
from tokbench.results.cell import ANYHOW, RecordIndex
from tokbench.results.folder import RESULTS, RunFolder, runs_in


@dataclass(frozen=True)
class Unfinished:
    """A run that lacks some of its measurements, and that no process is working on."""

    path: Path
    done: int
    measurements: int


def find_unfinished(grid: Grid, root: Path = RESULTS) -> Unfinished | None:
    """The newest run under `root` that was asked for this grid and lacks measurements; None where there is none."""
    for path in reversed(runs_in(root)):
        try:
            folder = RunFolder.open(path)
            if any(Grid.from_dict(session.grid.plain()) == grid for session in folder.manifest.sessions):
                found = _progress(folder, grid)
                if found.done < found.measurements:
                    with RunFolder.held(path):  # not while another process is at it
                        return found
        except UserError:  # it is broken, of another version, or in use: none to continue
            continue
    return None


def _progress(folder: RunFolder, grid: Grid) -> Unfinished:
    """How far a run is; failures count as measured."""
    index = RecordIndex(folder.records())
    done = [
        bool(index.find(cell.key, "failure", at) or index.find(cell.key, kind, at))
        for model in grid.models
        for cell in grid.cells(model)
        for kind in grid.options.only
        for at in (grid.options.settings if kind == "speed" else [ANYHOW])
        if kind != "accuracy" or cell.is_baseline or not METHODS[cell.method.name].speed_only
    ]
    return Unfinished(folder.path, sum(done), len(done))
