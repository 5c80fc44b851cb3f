"""Timing in fresh processes, as pyperf does: memory layout and caches make the same pass differ between processes.

Several processes take turns, each with its share of the rounds. `python -m tokbench.running.fresh` is such a process:
it reads a job from standard input, and writes its progress and timings to standard output, each as a pickle.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from tokbench.config import Grid, ModelSpec, PlannedCell, RunOptions
from tokbench.errors import RunStopped, UserError, one_line
from tokbench.measure._model import is_out_of_memory
from tokbench.measure.environment import Disturbance
from tokbench.measure.speed import SpeedResult
from tokbench.plugins import load_plugins, loaded_paths
from tokbench.progress import Progress
from tokbench.results.cell import RecordIndex
from tokbench.running.bench import Bench, Runnable

if TYPE_CHECKING:
    from tokbench.results.folder import RunFolder


@dataclass(frozen=True)
class Timed:
    """The timings of one process, by the names of cells and of speed limits.

    answers: of how many images a cell's answer is eager PyTorch's, and of how many it was asked, where it was.
    """

    speed: dict[str, SpeedResult]
    memory: dict[str, tuple[int, int] | None]
    answers: dict[str, tuple[int, int]]
    disturbance: Disturbance
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """What a process is to time, or to show images to: cells of a model, the unreduced one first, with their schedules
    as resolved, and in which runtime."""

    spec: ModelSpec
    grid: Grid
    options: RunOptions
    device: str
    cells: list[tuple[PlannedCell, str, str]]
    size: int
    number: int
    threads: int
    plugins: list[str]

    @classmethod
    def of(cls, bench: Bench, members: list[Runnable], size: int, number: int = 0) -> Job:
        """These cells of a bench, `size` images at a time, for a process with as many threads as this one."""
        cells = [(member.cell, member.identity.get("resolved") or "", member.runtime) for member in members]
        return cls(
            bench.subject.spec, bench.grid, bench.options, str(bench.device), cells, size, number,
            torch.get_num_threads(), loaded_paths(),
        )  # fmt: skip


class ProcessDied(Exception):
    """A process ended without an answer; how, as the end of a sentence."""


def time_in_fresh_processes(bench: Bench, members: list[Runnable], size: int) -> list[Timed]:
    """The timings of each process, run one after the other; one that dies is left out.

    Raises RunStopped if all die.
    """
    timed: list[Timed] = []
    of = bench.options.processes
    for number in range(of):
        running = [member for member in members if member in bench.running]
        job = Job.of(bench, running, size, number)
        try:
            one = in_process(job, _Told(bench, f"process {number + 1} of {of}"))
        except ProcessDied as death:
            bench.progress.warn(f"timing process {number + 1} of {of} {death}")
            continue
        for name, message in one.failed.items():
            bench.drop(name, "speed", UserError(message))
        timed.append(one)
    if not timed:
        raise RunStopped("no process came to the end of timing; what was measured before is kept.")
    return timed


@dataclass
class _Told:
    """Shows what a process tells."""

    bench: Bench
    which: str

    def __call__(self, kind: str, *what: Any) -> None:
        if kind == "phase":
            self.bench.progress.phase(f"{what[0]}, {self.which}", what[1])
        else:
            getattr(self.bench.progress, kind)(*what)


def in_process(job: Job, tell: Callable[..., None]) -> Timed:
    """The job's timings from a new process. Raises ProcessDied, or what `work` raised there."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "tokbench.running.fresh"]
    with tempfile.TemporaryFile() as complaints:
        # In a session of its own: Ctrl-C is for this process, which then ends that one.
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, env=environment,
            start_new_session=True,
        )  # fmt: skip
        assert child.stdin is not None and child.stdout is not None
        try:
            child.stdin.write(pickle.dumps(job))
            child.stdin.flush()
            while True:
                kind, *what = pickle.load(child.stdout)
                if kind == "timed":
                    return cast(Timed, what[0])
                if kind == "raised":
                    raise _raised(*what)
                tell(kind, *what)
        except (EOFError, BrokenPipeError):
            code = child.wait()
            complaints.seek(0)
            last = (complaints.read().decode(errors="replace").strip().splitlines() or [""])[-1]
            how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise ProcessDied(f"{how}: {last}".removesuffix(": ")) from None
        finally:
            child.kill()
            with suppress(BrokenPipeError), child:  # closes its pipes, and waits
                pass


def _raised(kind: str, text: str) -> Exception:
    kinds: dict[str, type[Exception]] = {"memory": torch.OutOfMemoryError, "stopped": RunStopped}
    return kinds.get(kind, UserError)(text)


@dataclass
class _Bench(Bench):
    """The bench in such a process: it has no folder, and keeps failures for its parent."""

    failed: dict[str, str] = field(default_factory=dict)

    def drop(self, name: str, phase: str, error: Exception) -> None:
        if name == self.running[0].name:
            raise error
        self.failed[name] = one_line(error)
        super().drop(name, phase, error)

    def _record_failure(self, cell: PlannedCell, identity: dict[str, Any], phase: str, error: Exception) -> None:
        pass


class _Relay(Progress):
    def __init__(self, tell: Callable[..., None]) -> None:
        self.tell = tell

    def phase(self, name: str, total: int | None) -> None:
        self.tell("phase", name, total)

    def advance(self, done: int) -> None:
        self.tell("advance", done)

    def warn(self, text: str) -> None:
        self.tell("warn", text)


def remade(job: Job, options: RunOptions, progress: Progress) -> _Bench:
    """A bench without a folder whose running cells are the job's, made anew in this process."""
    from tokbench.running.runner import load_subject  # which imports this module

    subject = load_subject(job.spec, job.grid, options)
    folder, device = cast("RunFolder", None), torch.device(job.device)
    bench = _Bench(subject, folder, options, device, progress, RecordIndex(), job.size, job.grid)
    base = subject.model.to(bench.device, bench.dtype)
    made: dict[str, Runnable] = {}
    for cell, resolved, runtime in job.cells:
        if cell.id not in made:
            made[cell.id] = bench.make(replace(cell, schedule=resolved), base, bench.identity(cell))
        bench.running.append(replace(made[cell.id], cell=cell).timed_in(runtime))
    return bench


def work(job: Job, tell: Callable[..., None]) -> Timed:
    """Make the job's cells anew and time them."""
    from tokbench.running.timing import time_members  # which imports this module

    bench = remade(job, replace(job.options, only=("speed",)), _Relay(tell))
    timed = time_members(bench, list(bench.running), job.size, seed=job.number)
    return replace(timed, failed=bench.failed)


def main() -> None:
    """Work for the process that started this one, and end when it does."""
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever is printed by plugins and libraries
    job = pickle.load(sys.stdin.buffer)
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()

    def tell(*message: Any) -> None:
        pickle.dump(message, channel)
        channel.flush()

    torch.set_num_threads(job.threads)
    try:
        load_plugins(job.plugins)
        tell("timed", work(job, tell))
    except Exception as error:
        kind = "memory" if is_out_of_memory(error) else "stopped" if isinstance(error, RunStopped) else "failed"
        tell("raised", kind, one_line(error))


if __name__ == "__main__":
    # Not as `__main__`, by which name nobody else could unpickle what it tells.
    from tokbench.running import fresh

    fresh.main()
