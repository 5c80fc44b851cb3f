"""A run's folder on disk: a manifest, append-only records, per-image predictions.

    results/20261121-101500-bundled/
      manifest.json       what was asked, under which conditions, and the machine
      records.jsonl       one JSON object per cell and measurement, appended as soon as it is measured
      predictions/        one .npz per cell, so that two runs can be compared image by image
      partial/            the answers of a pass over the images that is not over yet
      pareto.png          plots

A write survives a crash once it returns. Files are replaced atomically; a line torn by a crash is ignored by readers
and cut off by the next `append`. Only one process at a time writes to a folder: the one in `RunFolder.held`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from tokbench.errors import RunStopped, UserError, nearest
from tokbench.results.records import KINDS, SCHEMA, Manifest, Record, read_manifest, read_record
from tokbench.validation import shown

MANIFEST = "manifest.json"
RECORDS = "records.jsonl"
# The images that no cell saw, with reasons, by model.
SKIPPED = "skipped.json"
RESULTS = Path("results")
_LOCK, _OWNER = ".lock", ".owner.json"
# Bytes of all records (of about 50,000 cells, which take a minute and 1.5 GB to read), and of one.
_MOST_BYTES, _LONGEST_LINE = 2**27, 2**26
_TEMPORARY = ".tokbench.tmp"  # no other file ends so: `repair` removes those that a crash left


class RunFolder:
    """One run on disk. Make it with `RunFolder.create` or `RunFolder.open`.

    Attributes:
        path: the folder.
        manifest: what `create` was given, with `schema` added.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
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
            text = (path / MANIFEST).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot read the run folder {str(path)!r}: {error.strerror}.") from error
        except ValueError as error:
            raise UserError(f"{path / MANIFEST} is no text ({error}).") from error
        for link in _links(path):
            raise UserError(f"{link} is a link, and might lead out of the run folder: put the file itself there.")
        return cls(path, read_manifest(text, path / MANIFEST))

    @staticmethod
    @contextmanager
    def held(path: str | Path) -> Iterator[None]:
        """Keep other processes from writing to the run folder at `path` inside the block; it need not exist yet.

        Raises UserError at once, naming process and host, if another process holds it. The system releases the lock of
        a killed process.
        """
        path = Path(path)
        lock, owner = FileLock(path / _LOCK, timeout=0), path / _OWNER
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        about = {"pid": os.getpid(), "host": socket.gethostname(), "started": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            replace_file(owner, lambda file: file.write(json.dumps(about).encode()), follow=False)
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
                with suppress(OSError):  # not empty, or gone
                    folder.rmdir()

    def write_manifest(self, manifest: Manifest) -> None:
        """Replace the manifest. Raises RunStopped if that cannot be written."""
        self.replace(MANIFEST, lambda file: file.write(_as_json(manifest.plain())))
        self.manifest = manifest

    def replace(self, name: str, write: Callable[[BinaryIO], object]) -> Path:
        """Replace a file of this folder atomically: `write` gets it open.

        Raises RunStopped if it cannot be written; the old file is then still there.
        """
        path = self.path / name
        with stopping_at_write_errors(self.path):
            if not (self.path / MANIFEST).is_file():
                raise FileNotFoundError(0, "the folder is gone")
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, write, follow=False)
        return path

    def append(self, fields: Mapping[str, Any]) -> Record:
        """Append a record made of these fields (see `results.records`), sync it to disk, and return it.

        Raises ValueError for invalid fields, such as NaN and infinity: absent values are left out or None. Raises
        RunStopped if it cannot be written; earlier records are then unchanged.
        """
        record = KINDS[fields["kind"]].model_validate({"schema": SCHEMA, **fields})
        text = json.dumps(record.plain(), allow_nan=False)
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
        return record

    def records(self) -> list[Record]:
        """All records in the order they were written. Raises UserError naming the line that cannot be read."""
        path = self.path / RECORDS
        if not path.is_file():
            return []
        records: list[Record] = []
        try:
            if (size := path.stat().st_size) > _MOST_BYTES:
                raise UserError(f"{path} has {size:,} bytes; a run's records are read up to {_MOST_BYTES:,}.")
            with open(path, "rb") as file:
                for number in itertools.count(1):
                    line = file.readline(_LONGEST_LINE + 1)
                    if len(line) > _LONGEST_LINE:
                        raise UserError(f"{path}, line {number}: longer than {_LONGEST_LINE:,} bytes.")
                    if not line.endswith(b"\n"):  # torn, or the end
                        return records
                    if line.strip():
                        records.append(read_record(line, f"{path}, line {number}"))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}.") from error
        return records

    def repair(self) -> None:
        """Repair what a crash left: a torn last line, temporary files, missing records."""
        with stopping_at_write_errors(self.path):
            with open(self.path / RECORDS, "ab+") as file:
                _cut_torn_line(file)
            for left in self.path.rglob(f"*{_TEMPORARY}"):
                left.unlink()

    def skipped(self) -> dict[str, list[dict[str, Any]]]:
        """By model, the images that no cell saw: index (place among the run's images), name, reason."""
        path = self.path / SKIPPED
        try:
            known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if not (isinstance(known, dict) and all(isinstance(images, list) for images in known.values())):
            raise UserError(f"{path} holds no lists of images by model.")
        for image in itertools.chain(*known.values()):
            place = image.get("index") if isinstance(image, dict) else None
            if type(place) is not int or not 0 <= place < 2**63:
                raise UserError(f"{path}: an image must be an object with an index, not {shown(image)}.")
        return known

    def prediction_name(self, cell_id: str) -> str:
        """The name of the file with the cell's per-image predictions: readable, unique per cell id."""
        return f"predictions/{_slug(cell_id)}.npz"

    def prediction_path(self, cell_id: str) -> Path:
        return self.path / self.prediction_name(cell_id)

    def partial_name(self, model: str, end: int) -> str:
        """The name of the file with the answers of a model's cells to images before `end`."""
        return f"partial/{_slug(model)}/{end:09d}.npz"

    def partial_paths(self, model: str) -> list[Path]:
        """The files with that model's answers to some of the images, in order."""
        return sorted((self.path / self.partial_name(model, 0)).parent.glob("*.npz"))

    def remove_partial(self, model: str) -> None:
        """Remove that model's answers to some of the images, the last first, so that there is never a gap."""
        with stopping_at_write_errors(self.path):
            for path in reversed(self.partial_paths(model)):
                path.unlink()
            for folder in (self.path / self.partial_name(model, 0)).parents[:2]:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()


@contextmanager
def stopping_at_write_errors(folder: Path) -> Iterator[None]:
    """Turn an OSError inside the block into RunStopped, which says that earlier results are kept."""
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
    """The error for a run folder that no longer exists."""
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
    # Files of a process that was killed before it wrote the manifest do not count.
    return any(file.name not in (_LOCK, _OWNER) and _TEMPORARY not in file.name for file in folder.iterdir())


def fresh_path(path: Path) -> Path:
    """`path` where a new run can go there, else the first of path-2, path-3, … that does not exist."""
    return path if path.is_dir() and not _is_used(path) else _new_path(path)


def _new_path(first: Path) -> Path:
    path, number = first, 2
    while path.exists():
        path, number = first.with_name(f"{first.name}-{number}"), number + 1
    return path


def new_run_path(root: str | Path = RESULTS, label: str = "run") -> Path:
    """A folder under `root` that does not exist yet: local time, then `label`. Nothing is created."""
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-.")[:60] or "run"
    return _new_path(Path(root) / f"{datetime.now():%Y%m%d-%H%M%S}-{words}")


def _owner(path: Path) -> str:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return f"by process {about['pid']} on {about['host']} since {about['started']}"
    except (OSError, ValueError, LookupError, TypeError):  # it is being written
        return "by another process"


def _slug(cell_id: str) -> str:
    # The hash keeps names apart that differ only in replaced characters, in case, or past the cut.
    digest = hashlib.sha256(cell_id.encode(errors="surrogatepass")).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9.=@,-]+", "_", cell_id)[:100].strip("._") + f"-{digest}"


def _as_json(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, indent=2).encode() + b"\n"


def replace_file(path: Path, write: Callable[[BinaryIO], object], *, follow: bool = True) -> None:
    """Replace a file atomically: `write` gets it open.

    follow: write to a link's target; otherwise, and always in a run's folder, which may come from somebody else, the
    link is replaced. Raises OSError if the file cannot be written; the old file is then still there. Pipes and devices
    are written to directly.
    """
    if follow and not (path.parent / MANIFEST).is_file():
        path = path.resolve()
    if path.exists() and not path.is_file() and not path.is_symlink():
        with open(path, "wb") as pipe:
            write(pipe)
        return
    temporary = path.with_name(f".{os.getpid()}{_TEMPORARY}")  # as short as can be: names have a limit
    try:
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the name, too; Windows cannot
        descriptor = os.open(path.parent, os.O_RDONLY)
        with suppress(OSError):  # some network file systems cannot
            os.fsync(descriptor)
        os.close(descriptor)


def write_out(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write an output file atomically and make its folders. Raises UserError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, write)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}.") from error


def _cut_torn_line(file: BinaryIO) -> int:
    """Cut what follows the last newline, go to the end, and return its position."""
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


def _links(folder: Path) -> Iterator[Path]:
    """Links in place of a run's own files."""
    own = [folder / name for name in (MANIFEST, RECORDS, SKIPPED, "predictions", "partial")]
    below = (path for root in own[-2:] if not root.is_symlink() for path in root.rglob("*"))
    return (path for path in itertools.chain(own, below) if path.is_symlink())


def runs_in(folder: Path) -> list[Path]:
    """The runs in a folder, the newest last."""
    return sorted((child.parent for child in folder.glob(f"*/{MANIFEST}")), key=lambda run: (run.stat().st_mtime, run))


def _no_run_message(path: Path) -> str:
    if not path.exists():
        runs = runs_in(path.parent)
        hint = nearest(path.name, [run.name for run in runs])
        if not hint and runs:
            hint = f" The newest run in {path.parent} is {runs[-1].name!r}."
        return f"no run folder {path}.{hint}"
    if inside := runs_in(path):
        return f"{path} is no run folder (it has no {MANIFEST}), but holds runs; the newest is {inside[-1]}."
    return f"{path} is no run folder: it has no {MANIFEST}."
