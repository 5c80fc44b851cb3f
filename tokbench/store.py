"""A run's folder on disk: a manifest, append-only records, per-image predictions.

    results/20261121-101500-bundled/
      manifest.json       what was asked, and the machine: written once
      records.jsonl       one JSON object per cell and measurement, appended as soon as it is measured
      predictions/        one .npz per cell, so that two runs can be compared image by image
      pareto.png          plots

A record survives a crash from the moment `append` returns. A line torn by a crash is ignored by readers and cut
off by the next `append`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from tokbench.errors import UserError, nearest

SCHEMA = 1
MANIFEST = "manifest.json"
RECORDS = "records.jsonl"


class RunFolder:
    """One run on disk. Make it with `RunFolder.create` or `RunFolder.open`.

    Attributes:
        path: the folder.
        manifest: what `create` was given, with `schema` added.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def create(cls, path: str | Path, manifest: dict[str, Any]) -> RunFolder:
        """Make the folder (parents too) and write the manifest.

        Raises UserError if `path` is a file or a folder that is not empty: a run never overwrites another.
        """
        path = Path(path)
        require_free(path)
        try:
            (path / "predictions").mkdir(parents=True, exist_ok=True)
            (path / RECORDS).touch()
            manifest = {"schema": SCHEMA, **manifest}
            _write_atomically(path / MANIFEST, json.dumps(manifest, indent=2, default=_plain) + "\n")
        except OSError as error:
            raise UserError(f"cannot write the run folder {path}: {error.strerror}.") from error
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open a run made earlier. Raises UserError if `path` is no run folder, naming the nearest one."""
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise UserError(_no_run_message(path))
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path / MANIFEST} is not valid JSON ({error}).") from error
        if not isinstance(manifest, dict):
            raise UserError(f"{path / MANIFEST} is not a tokbench manifest: it holds no JSON object.")
        _check_schema(manifest, path / MANIFEST)
        return cls(path, manifest)

    def append(self, record: dict[str, Any]) -> None:
        """Add one record (any JSON-able dict; numpy values are fine) and force it to disk.

        `schema` is filled in when absent. NaN and infinity raise ValueError: absent values are left out or None.
        """
        text = json.dumps({"schema": SCHEMA, **record}, allow_nan=False, default=_plain)
        with open(self.path / RECORDS, "ab+") as file:
            _cut_torn_line(file)
            file.write(text.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> list[dict[str, Any]]:
        """All records in the order they were written. Raises UserError naming the line that cannot be read."""
        path = self.path / RECORDS
        if not path.is_file():
            return []
        *lines, _torn = path.read_bytes().split(b"\n")
        return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]

    def prediction_path(self, cell_id: str) -> Path:
        """Where the cell's per-image predictions lie: a readable name, unique per cell id."""
        return self.path / "predictions" / f"{_slug(cell_id)}.npz"


def require_free(path: Path) -> None:
    """Raise UserError if a new run cannot go to `path`: it is a file, or a folder that is not empty."""
    if path.exists() and not path.is_dir():
        raise UserError(f"cannot make the run folder {path}: a file of that name exists.")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"the run folder {path} is not empty; name a new one with --out, or remove it.")


def new_run_path(root: str | Path = "results", label: str = "run") -> Path:
    """A folder under `root` that does not exist yet: local time, then `label`. Nothing is created."""
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.")[:60] or "run"
    first = Path(root) / f"{datetime.now():%Y%m%d-%H%M%S}-{words}"
    path, number = first, 2
    while path.exists():
        path, number = first.with_name(f"{first.name}-{number}"), number + 1
    return path


def _slug(cell_id: str) -> str:
    # The hash keeps names apart that differ only in replaced characters, in case, or past the cut.
    digest = hashlib.sha256(cell_id.encode()).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9.=@,-]+", "_", cell_id)[:100].strip("._") + f"-{digest}"


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _cut_torn_line(file: Any) -> None:
    """Drop what follows the last newline of a file opened "ab+"."""
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return
    file.seek(end - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}).") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}.")
    _check_schema(record, where)
    return record


def _check_schema(holder: dict[str, Any], where: str | Path) -> None:
    schema = holder.get("schema")
    if schema != SCHEMA:
        raise UserError(f"{where}: schema {schema!r}, but this tokbench reads schema {SCHEMA}.")


def _runs_in(folder: Path) -> list[Path]:
    return sorted(child.parent for child in folder.glob(f"*/{MANIFEST}")) if folder.is_dir() else []


def _no_run_message(path: Path) -> str:
    if not path.exists():
        runs = _runs_in(path.parent)
        hint = nearest(path.name, [run.name for run in runs])
        if not hint and runs:
            hint = f" The newest run in {path.parent} is {runs[-1].name!r}."
        return f"no run folder {path}.{hint}"
    inside = _runs_in(path) if path.is_dir() else []
    if inside:
        return f"{path} is no run folder (it has no {MANIFEST}), but holds runs; the newest is {inside[-1]}."
    return f"{path} is no run folder: it has no {MANIFEST}."


def _plain(value: Any) -> Any:
    """Numpy scalars and arrays, and paths, as JSON can hold them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} cannot be written to a record: {value!r}")
