"""Batches of a source, read by this process or by others."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, default_collate

from tokbench.data.decoding import ImageError, Skipped
from tokbench.data.sources import ImageSource, ImageStream
from tokbench.errors import RunStopped


class Batch(NamedTuple):
    """Images, as floats (B, C, H, W) or bytes (B, H, W, C), and labels (B,) of the places before `end` that no earlier
    batch held, without the skipped ones: B may be 0."""

    images: Tensor
    labels: Tensor
    skipped: list[Skipped]
    end: int


# What a reader hands over. One tensor for all images: each one takes file descriptors and a piece of shared memory.
_Packed = tuple[Tensor, list[int], list[Skipped]]


def load_batches(
    source: ImageSource | ImageStream,
    batch_size: int,
    *,
    workers: int = 0,
    start: int = 0,
    stop: int | None = None,
    as_bytes: bool = False,
    pinned: bool = False,
) -> Iterator[Batch]:
    """The images of a source from place `start` to before `stop` (its end), `batch_size` places at a time.

    A stream can only be read from place 0 to its end. An image that cannot be decoded is skipped, and named in its
    batch. There are at most as many workers as cores.
    as_bytes: leave it to the caller to make floats of them, by `source.floats`, on the device where they will be.
    pinned: in memory that a GPU copies from while both work on.

    Raises RunStopped, in one line, for a worker that was killed or ran out of file descriptors or shared memory.
    """
    images: Any
    if isinstance(source, ImageStream):
        images = _ForgivingStream(source)
    else:
        images = Subset(_Forgiving(source), range(start, len(source) if stop is None else stop))
        workers = min(workers, _cores())
    loader = DataLoader(
        images, batch_size=batch_size, num_workers=workers, collate_fn=_pack, worker_init_fn=_begin_worker,
        pin_memory=pinned,
    )  # fmt: skip
    end = start
    for stack, labels, skipped in _watched(loader, source.name) if workers else loader:
        end += len(labels) + len(skipped)
        found = stack if as_bytes or not labels else source.floats(stack)
        yield Batch(found, torch.tensor(labels, dtype=torch.long, pin_memory=pinned), skipped, end)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pack(items: list[tuple[Tensor, int] | Skipped]) -> _Packed:
    good = [item for item in items if not isinstance(item, Skipped)]
    # In a worker this makes the tensor in shared memory, and raises where that is full.
    stack = default_collate([image for image, _ in good]) if good else torch.empty(0)
    return stack, [label for _, label in good], [item for item in items if isinstance(item, Skipped)]


def _watched(loader: DataLoader[Any], name: str) -> Iterator[_Packed]:
    """What the workers give. Raises RunStopped that says what happened to them."""
    others, handler = set(multiprocessing.active_children()), signal.getsignal(signal.SIGCHLD)
    workers: set[BaseProcess] = set()
    # torch's handler raises wherever this process is, as if a model had failed. Waiting notices it as well. Another
    # loader may have left it there.
    mild = handler and not str(getattr(handler, "__module__", "")).startswith("torch.")
    try:
        batches = iter(loader)
        workers = set(multiprocessing.active_children()) - others
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler if mild else signal.SIG_DFL)
        yield from batches
    except Exception as error:
        if isinstance(error, ImageError):
            raise
        ended = wait(
            [worker.sentinel for worker in workers], timeout=1
        )  # a lost connection shows before a worker's end
        for worker in workers:
            if worker.sentinel in ended:
                worker.join(timeout=1)  # its pipe closes a moment before it can be asked how it ended
        ends = [end for worker in workers if (end := _how_it_ended(worker))]
        number = _errno(error)
        if ends:
            reason = ends[0]
        elif number in _SCARCE:
            reason = f"{os.strerror(number)}{_SCARCE[number]}"
        else:  # what a worker raised ends with its message, after its traceback
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1][:200]
        raise RunStopped(f"the images of {name} cannot be read: {reason}") from error


_FEWER = ": fewer --readers and a smaller --batch-size need less"
_SCARCE = {
    errno.EMFILE: f" (ulimit -n){_FEWER}",
    errno.ENFILE: _FEWER,
    errno.ENOSPC: f" in shared memory (/dev/shm){_FEWER}",
    errno.ENOMEM: _FEWER,
    errno.EAGAIN: f" for another process{_FEWER}",
}


def _how_it_ended(worker: BaseProcess) -> str:
    """What is known of a worker that ended before its work did; "" for others."""
    code = worker.exitcode
    if not code:
        return ""
    if code > 0:
        why = f"{os.strerror(code)}{_SCARCE[code]}" if code in _SCARCE else f"exit code {code}"
        return f"their reader, process {worker.pid}, ended: {why}"
    hint = {
        signal.SIGKILL: "; the system does so where memory is short: fewer --readers need less",
        signal.SIGBUS: f", as where shared memory (/dev/shm) is full{_FEWER}",
    }.get(signal.Signals(-code), "")
    return f"their reader, process {worker.pid}, was killed by signal {-code} ({signal.Signals(-code).name}){hint}"


def _errno(error: BaseException) -> int:
    """The system's number for what is scarce; 0 for another fault. torch and workers only say it in words."""
    number = getattr(error, "errno", None)
    words = {os.strerror(scarce): scarce for scarce in _SCARCE} | {"ancdata": errno.EMFILE}
    return number or next((scarce for text, scarce in words.items() if text in str(error)), 0)


def _begin_worker(worker: int) -> None:
    """A worker ends with the process that made it, without the handlers it inherited and without a word; and it ends
    where it cannot hand over a batch, for which that process would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.excepthook = _unless_nobody_reads
    Queue._on_queue_feeder_error = staticmethod(_give_up)  # type: ignore[attr-defined]


def _give_up(error: Exception, item: object) -> None:
    os._exit(_errno(error) or 1)


def _unless_nobody_reads(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What the thread says that hands images over, but for the loss of the process that took them."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


class _Forgiving(Dataset[tuple[Tensor, int] | Skipped]):
    """A source that says which images it cannot decode instead of raising."""

    def __init__(self, source: ImageSource):
        self.source = source

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Skipped:
        try:
            return self.source.pixels(index)
        except ImageError as error:
            return Skipped(index, error.name, error.reason or str(error))


class _ForgivingStream(IterableDataset[tuple[Tensor, int] | Skipped]):
    """A stream likewise."""

    def __init__(self, source: ImageStream):
        self.source = source

    def __iter__(self) -> Iterator[tuple[Tensor, int] | Skipped]:
        return self.source.items()
