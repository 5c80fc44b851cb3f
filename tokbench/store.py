"""A run's folder on disk: a manifest, append-only records, per-image predictions.

    results/20261121-101500-bundled/
      manifest.json       what was asked, under which conditions, and the machine
      records.jsonl       one JSON object per cell and measurement, appended as soon as it is measured
      predictions/        one .npz per cell, so that two runs can be compared image by image
      partial/            the answers of a pass over the images that is not over yet
      pareto.png          plots

Every write survives a crash from the moment it returns, and never leaves half a file: files are replaced as a whole,
and a line torn by a crash is ignored by readers and cut off by the next `append`. One process at a time writes to a
folder: the one in `RunFolder.held`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import socket
import stat
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from tokbench.errors import RunStopped, UserError, nearest

SCHEMA = 1
MANIFEST = "manifest.json"
RECORDS = "records.jsonl"
# Which images no cell saw, and why, by model.
SKIPPED = "skipped.json"
_LOCK, _OWNER = ".lock", ".owner.json"
_LONGEST_LINE = 2**26
_TEMPORARY = ".tokbench.tmp"  # nobody else names files so: repair removes those that a crash left
# What readers of records rely on. A field that is not named here may hold anything.
_IDENTITY = ("kind", "cell", "model", "method", "schedule")
_TEXTS = frozenset({
    *_IDENTITY, "resolved", "weights_sha256", "weights", "data", "data_fingerprint", "dtype", "device",
    "fused_attention", "phase", "message",
})  # fmt: skip
_NUMBERS = frozenset({
    "flops", "flops_ratio", "flops_attention", "flops_mlp", "flops_method", "flops_rest", "images", "correct",
    "correct5", "skipped", "nonfinite", "top1", "top1_low", "top1_high", "top5", "top5_low", "top5_high", "drop",
    "drop_low", "drop_high", "mcnemar_p", "agreement", "agreement_low", "agreement_high", "kl", "kl_low", "kl_high",
    "similarity", "similarity_low", "similarity_high", "batch_size", "iterations", "throughput",
    "throughput_low", "throughput_high",
    "speedup", "speedup_low", "speedup_high", "latency_ms", "latency_low_ms", "latency_high_ms", "latency_p95_ms",
    "latency_speedup", "latency_speedup_low", "latency_speedup_high", "efficiency", "efficiency_low", "efficiency_high",
    "free_speedup", "peak_memory_bytes",
})  # fmt: skip
_COUNTS = frozenset({"images", "correct", "correct5", "skipped", "nonfinite", "batch_size"})
# The same for the manifest, its conditions, and the conditions of each model.
_MANIFEST_KINDS: dict[str, type] = {
    "machine": dict, "packages": dict, "plugins": dict, "grid": dict, "conditions": dict, "continued": list,
}  # fmt: skip
_CONDITION_KINDS: dict[str, type] = {"dtype": str, "device": str, "batch_size": int, "models": dict}
_MODEL_KINDS: dict[str, type] = {
    "weights_sha256": str, "input_size": list, "data": str, "data_fingerprint": str, "images": int,
}  # fmt: skip
_COUNT_LISTS, _TIME_LISTS = frozenset({"input_size", "tokens"}), frozenset({"seconds", "free_seconds"})


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
        manifest = {"schema": SCHEMA, **manifest}
        try:
            path.mkdir(parents=True, exist_ok=True)
            replace_file(path / MANIFEST, lambda file: file.write(_as_json(manifest)))
            (path / RECORDS).touch()
        except OSError as error:
            raise UserError(f"cannot write the run folder {str(path)!r}: {error.strerror}.") from error
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open a run made earlier. Raises UserError if `path` is no run folder, naming the nearest one."""
        path = Path(path)
        try:
            if not (path / MANIFEST).is_file():
                raise UserError(_no_run_message(path))
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read the run folder {str(path)!r}: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path / MANIFEST} is not valid JSON ({error}).") from error
        if not isinstance(manifest, dict):
            raise UserError(f"{path / MANIFEST} is not a tokbench manifest: it holds no JSON object.")
        _check_schema(manifest, path / MANIFEST)
        _check_manifest(manifest, path / MANIFEST)
        return cls(path, manifest)

    @staticmethod
    @contextmanager
    def held(path: str | Path) -> Iterator[None]:
        """Keep other processes from writing to the run folder at `path` inside the block; it need not exist yet.

        Raises UserError at once, naming process and host, when another process holds it. The system lets go of what a
        killed process held, so nothing is ever left locked.
        """
        path = Path(path)
        lock, owner = FileLock(path / _LOCK, timeout=0), path / _OWNER
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        about = {"pid": os.getpid(), "host": socket.gethostname(), "started": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            owner.write_text(json.dumps(about), encoding="utf-8")
        except Timeout:
            raise UserError(f"the run folder {str(path)!r} is in use {_owner(owner)}.") from None
        except OSError as error:
            lock.release()
            raise UserError(f"cannot write to the run folder {str(path)!r}: {error.strerror}.") from error
        try:
            yield
        finally:
            # In this order: whoever gets the lock next finds neither file. What cannot be removed does no harm.
            with suppress(OSError):
                owner.unlink(missing_ok=True)
                (path / _LOCK).unlink(missing_ok=True)
            lock.release()
            for folder in made:
                with suppress(OSError):  # not empty, then, or gone
                    folder.rmdir()

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Replace the manifest. Raises RunStopped if that cannot be written."""
        self.replace(MANIFEST, lambda file: file.write(_as_json(manifest)))
        self.manifest = manifest

    def replace(self, name: str, write: Callable[[BinaryIO], object]) -> Path:
        """Write a file of this folder as a whole: `write` gets it open, and it takes its name once it is on disk.

        Raises RunStopped if it cannot be written; what was there under this name is then still there.
        """
        path = self.path / name
        with stopping_at_write_errors(self.path):
            if not (self.path / MANIFEST).is_file():
                raise FileNotFoundError(0, "the folder is gone")
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, write)
        return path

    def append(self, record: dict[str, Any]) -> None:
        """Add one record (any JSON-able dict; numpy values are fine) and force it to disk.

        `schema` is filled in when absent. NaN and infinity raise ValueError: absent values are left out or None.
        Raises RunStopped if it cannot be written; the records before it are then as they were.
        """
        text = json.dumps({"schema": SCHEMA, **record}, allow_nan=False, default=_plain)
        # Not "ab+": a folder that somebody removed or emptied must not come back with half of the records.
        with stopping_at_write_errors(self.path), open(self.path / RECORDS, "rb+") as file:
            end = _cut_torn_line(file)
            try:
                file.write(text.encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                os.truncate(self.path / RECORDS, end)
                raise

    def records(self) -> list[dict[str, Any]]:
        """All records in the order they were written. Raises UserError naming the line that cannot be read."""
        path = self.path / RECORDS
        if not path.is_file():
            return []
        records: list[dict[str, Any]] = []
        try:
            with open(path, "rb") as file:
                for number in itertools.count(1):
                    line = file.readline(_LONGEST_LINE + 1)
                    if len(line) > _LONGEST_LINE:
                        raise UserError(f"{path}, line {number}: longer than {_LONGEST_LINE:,} bytes.")
                    if not line.endswith(b"\n"):  # torn, or the end
                        return records
                    if line.strip():
                        records.append(_parse(line, f"{path}, line {number}"))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}.") from error
        return records

    def repair(self) -> None:
        """Finish what a crash left half done: a torn last line, temporary files, no records yet."""
        with stopping_at_write_errors(self.path):
            with open(self.path / RECORDS, "ab+") as file:
                _cut_torn_line(file)
            for left in self.path.rglob(f"*{_TEMPORARY}"):
                left.unlink()

    def skipped(self) -> dict[str, list[dict[str, Any]]]:
        """By model, the images that no cell of it saw: index (their place among the run's images), name, reason."""
        path = self.path / SKIPPED
        try:
            known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if not (isinstance(known, dict) and all(isinstance(images, list) for images in known.values())):
            raise UserError(f"{path} holds no lists of images by model.")
        for image in itertools.chain(*known.values()):
            if not isinstance(image, dict) or not _is_place(image.get("index")):
                raise UserError(f"{path}: an image must be an object with an index, not {_shown(image)}.")
        return known

    def prediction_name(self, cell_id: str) -> str:
        """Where in the folder the cell's per-image predictions lie: a readable name, unique per cell id."""
        return f"predictions/{_slug(cell_id)}.npz"

    def prediction_path(self, cell_id: str) -> Path:
        """The path of the cell's per-image predictions."""
        return self.path / self.prediction_name(cell_id)

    def partial_name(self, model: str, end: int) -> str:
        """Where in the folder the answers lie that a model's cells gave to the images before `end`."""
        return f"partial/{_slug(model)}/{end:09d}.npz"

    def partial_paths(self, model: str) -> list[Path]:
        """The files with that model's answers to some of the images, in order."""
        return sorted((self.path / self.partial_name(model, 0)).parent.glob("*.npz"))

    def remove_partial(self, model: str) -> None:
        """Remove that model's answers to some of the images, last ones first, so that no gap is ever left."""
        with stopping_at_write_errors(self.path):
            for path in reversed(self.partial_paths(model)):
                path.unlink()
            for folder in (self.path / self.partial_name(model, 0)).parents[:2]:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()


@contextmanager
def stopping_at_write_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError inside the block into RunStopped, which says that what was written before is kept."""
    try:
        yield
    except OSError as error:
        if folder.is_dir() and (folder / MANIFEST).is_file():
            raise RunStopped(
                f"cannot write to the run folder {str(folder)!r}: {error.strerror or error}; what was measured before "
                "is kept, and the same command continues."
            ) from error
        raise removed(folder) from error


def removed(folder: Path) -> RunStopped:
    """What to raise where a run's folder is no longer there."""
    return RunStopped(f"the run folder {str(folder)!r} was removed while running; its results are gone.")


def is_run(path: Path) -> bool:
    """Whether a run was begun in that folder. Raises UserError for a path that cannot be looked at."""
    try:
        return stat.S_ISREG(os.stat(path / MANIFEST).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot use the run folder {str(path)[:100]!r}: {reason}.") from error


def require_free(path: Path) -> None:
    """Raise UserError if a new run cannot go to `path`: it is a file, or a folder that is not empty."""
    if path.exists() and not path.is_dir():
        raise UserError(f"cannot make the run folder {path}: a file of that name exists.")
    if path.is_dir() and _is_used(path):
        raise UserError(f"the run folder {path} is not empty and holds no run; name a new one with --out.")


def _is_used(folder: Path) -> bool:
    # What a process leaves that is killed before it writes the manifest is nothing.
    return any(file.name not in (_LOCK, _OWNER) and _TEMPORARY not in file.name for file in folder.iterdir())


def fresh_path(path: Path) -> Path:
    """`path` where a new run can go there, else the first of path-2, path-3, … that does not exist."""
    return path if path.is_dir() and not _is_used(path) else _new_path(path)


def _new_path(first: Path) -> Path:
    path, number = first, 2
    while path.exists():
        path, number = first.with_name(f"{first.name}-{number}"), number + 1
    return path


def new_run_path(root: str | Path = "results", label: str = "run") -> Path:
    """A folder under `root` that does not exist yet: local time, then `label`. Nothing is created."""
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.")[:60] or "run"
    return _new_path(Path(root) / f"{datetime.now():%Y%m%d-%H%M%S}-{words}")


def _owner(path: Path) -> str:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return f"by process {about['pid']} on {about['host']} since {about['started']}"
    except (OSError, ValueError, LookupError, TypeError):  # it is only just being taken
        return "by another process"


def _slug(cell_id: str) -> str:
    # The hash keeps names apart that differ only in replaced characters, in case, or past the cut.
    digest = hashlib.sha256(cell_id.encode()).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9.=@,-]+", "_", cell_id)[:100].strip("._") + f"-{digest}"


def _as_json(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, indent=2, default=_plain).encode() + b"\n"


def replace_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file as a whole: `write` gets it open, and it takes its name once it is on disk.

    Raises OSError if it cannot be written; what was there under this name is then still there. Pipes and devices are
    written to as they are.
    """
    path = path.resolve()  # a link stays one
    if path.exists() and not path.is_file():
        with open(path, "wb") as pipe:
            write(pipe)
        return
    temporary = path.with_name(f".{os.getpid()}{_TEMPORARY}")  # as short as can be: names have a limit
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Force the names in a folder to disk, where the system can (not on Windows)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        with suppress(OSError):  # some network file systems cannot
            os.fsync(descriptor)
        os.close(descriptor)


def _cut_torn_line(file: BinaryIO) -> int:
    """Drop what follows the last newline, and go to the end: its position comes back."""
    end = kept = file.seek(0, os.SEEK_END)
    while kept:
        start = max(0, kept - 2**16)
        file.seek(start)
        newline = file.read(kept - start).rfind(b"\n")
        kept = start + newline + 1
        if newline >= 0:
            break
    if kept < end:
        file.truncate(kept)
    return file.seek(kept)


def _check_manifest(manifest: dict[str, Any], path: Path) -> None:
    """Raise UserError where what readers rely on is there and of another kind."""
    _check_kinds(manifest, _MANIFEST_KINDS, path)
    conditions = manifest.get("conditions") or {}
    _check_kinds(conditions, _CONDITION_KINDS, f"{path}, conditions")
    for label, model in (conditions.get("models") or {}).items():
        _check_kinds({"model": model}, {"model": dict}, f"{path}, conditions")
        _check_kinds(model, _MODEL_KINDS, f"{path}, conditions of {label!r}")
    _check_kinds(manifest.get("machine") or {}, {"cpu": str, "gpu": str}, f"{path}, machine")
    for session in (manifest, *(manifest.get("continued") or [])):
        _check_kinds({"session": session}, {"session": dict}, f"{path}, continued")
        grid = session.get("grid") or {}
        _check_kinds({"grid": grid}, {"grid": dict}, path)
        _check_kinds(grid, {"models": list, "methods": list, "options": dict}, f"{path}, grid")


def _check_kinds(holder: dict[str, Any], kinds: dict[str, type], where: str | Path) -> None:
    words = {dict: "an object", list: "a list", str: "text", int: "a whole number"}
    for name, kind in kinds.items():
        if name in holder and not isinstance(holder[name], kind) and not (holder[name] is None and kind is not dict):
            raise UserError(f"{where}: {name!r} must be {words[kind]}, not {_shown(holder[name])}.")


def _shown(value: Any) -> str:
    return textwrap.shorten(ascii(value), 60)


def _is_place(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}).") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(record).__name__}.")
    _check_schema(record, where)
    for name in _IDENTITY:
        if name not in record:
            raise UserError(f"{where}: a record without {name!r}.")
    for name, value in record.items():
        wanted = _violated(name, value)
        if wanted:
            raise UserError(f"{where}: {name!r} must be {wanted}, not {_shown(value)}.")
    return {"params": {}, **record}


def _violated(name: str, value: Any) -> str:
    """What a field of a record should be and is not; "" where there is nothing to say."""
    if name == "params" and not isinstance(value, dict):
        return "an object"
    if value is None and name not in _IDENTITY:
        return ""
    if name in _TEXTS and not isinstance(value, str):
        return "text"
    if name in _COUNTS and not (_is_number(value) and value == int(value) and 0 <= value < 2**63):
        return "a whole number"
    if name in _NUMBERS and not _is_number(value):
        return "a number"
    if name in _COUNT_LISTS | _TIME_LISTS and not (isinstance(value, list) and all(map(_is_number, value))):
        return "a list of numbers"
    if name in _COUNT_LISTS and not all(0 <= item < 2**63 for item in value):
        return "a list of numbers, 0 or more"
    if name == "input_size" and not all(isinstance(item, int) for item in value):  # tokens may be means over images
        return "a list of whole numbers"
    if name in _TIME_LISTS and not all(item > 0 for item in value):
        return "a list of times above 0"
    return ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _check_schema(holder: dict[str, Any], where: str | Path) -> None:
    schema = holder.get("schema")
    if not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        hint = "a newer tokbench wrote it; upgrade to read it" if newer else "no tokbench wrote that"
        raise UserError(f"{where}: schema {schema!r}, and this tokbench reads up to schema {SCHEMA}: {hint}.")


def _runs_in(folder: Path) -> list[Path]:
    """The runs in a folder, the newest last."""
    if not folder.is_dir():
        return []
    return sorted((child.parent for child in folder.glob(f"*/{MANIFEST}")), key=lambda run: (run.stat().st_mtime, run))


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
