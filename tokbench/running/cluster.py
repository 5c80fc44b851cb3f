"""Accuracy and searches on several GPUs and machines, through Ray, whose workers share out images or candidates.

Each worker makes the model and its cells itself. It is given ranges of images, each of whole batches, so that its
batches are those of a single process, and its answers the same; or, by a search, candidates and batches. What comes
back is put in the order that was asked, and goes on as if this process had measured it. So whatever stops a run, it
continues with more workers, fewer or none.
"""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import signal
import socket
import textwrap
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import psutil
import torch

from tokbench.config import RunOptions
from tokbench.data.decoding import Skipped
from tokbench.errors import RunStopped, UserError, one_line, shortened
from tokbench.plugins import load_plugins
from tokbench.progress import Progress
from tokbench.results.predictions import Predictions, join
from tokbench.running.answers import reader_for, shown
from tokbench.running.bench import Bench, Runnable, Subject
from tokbench.running.fresh import Job, remade
from tokbench.running.half_pass import HalfPass
from tokbench.running.reader import Reader
from tokbench.searching.images import Overlap

ANSWER_SECONDS = 5.0  # to connect to an address, and again to be greeted there
START_SECONDS = 120.0  # for workers: a cluster may be busy, or a container only just be made
MOST_DEATHS = 3  # at the same images
MOST_BATCHES = 16  # in a range: what a worker that dies loses
_SETTINGS = 4  # the kind of HTTP/2's first frame
_SAME = ("tokbench", "torch")  # in versions


@dataclass(frozen=True)
class Range:
    """What a worker made of the images from place `start` to before `end`.

    failed: by cell, why it has no answers. same: by cell, how many images it was searched on. waited: seconds, for the
    images.
    """

    end: int
    answers: dict[str, Predictions]
    skipped: list[Skipped]
    batch_sizes: dict[str, int]
    failed: dict[str, str]
    same: dict[str, int]
    waited: float


class Worker:
    """All cells of a model, in a process of Ray's. marks: see `Overlap`."""

    def __init__(self, job: Job, marks: Mapping[str, str]) -> None:
        torch.set_num_threads(job.threads)
        load_plugins(job.plugins)
        self._bench = remade(job, replace(job.options, only=("accuracy",), check_answers=False), Progress())
        self._marks, self._batch_sizes = marks, dict[str, int]()

    def conditions(self) -> dict[str, Any]:
        """Of the model and its images."""
        return self._bench.subject.conditions()

    def show(self, start: int, end: int, cells: list[str]) -> Range:
        """Show these images to these cells, the unreduced model first."""
        bench, failed = self._bench, dict[str, str]()
        reader = reader_for(bench, bench.batch_size, HalfPass(start), None, stop=end)
        overlap = Overlap(reader.source, self._marks)
        members = [member for member in bench.running if member.cell.id in cells]

        def fail(cell: str, error: Exception) -> None:
            failed[cell] = one_line(error)

        answers = shown(bench, members, reader, overlap, self._batch_sizes, None, None, fail)
        for member in members:
            if member.cell.id in answers:
                try:
                    member.require_same_tokens()
                except ValueError as error:
                    fail(member.cell.id, error)
        return Range(end, answers, reader.skipped, dict(self._batch_sizes), failed, overlap.counts, reader.waited)


def _actor() -> type:
    """The class of Ray's actors. Made here, so that its code goes along: another machine may have another tokbench."""

    class Actor:
        def look(self, folder: str) -> dict[str, Any]:
            """Where this is, and what is installed; relative paths mean what they mean to the command."""
            if os.path.isdir(folder):
                os.chdir(folder)
            found: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
            for name in _SAME:
                try:
                    found[name] = str(importlib.import_module(name).__version__)
                except ImportError:
                    found[name] = None
            return found

        def require_data(self, data: str) -> None:
            importlib.import_module("tokbench.config").require_data(data)

        def begin(self, work: bytes) -> dict[str, Any]:
            self.worker: Any = None  # the last one's memory
            self.worker = pickle.loads(work)()
            return self.worker.conditions()

        def show(self, *what: Any) -> Any:
            return self.worker.show(*what)

    return Actor


@dataclass(eq=False)
class _Hand:
    """A worker as this process knows it. host, pid: once it has told."""

    actor: Any
    host: str = "?"
    pid: int = 0


class Cluster:
    """The workers of a run. count: how many there are. resources: what Ray keeps for each. data: the grid's."""

    def __init__(self, ray: Any, count: int, resources: dict[str, float], data: str, progress: Progress) -> None:
        self.count, self._ray, self._data, self._progress = count, ray, data, progress
        self._class = ray.remote(**resources)(_actor())
        self._hands: list[_Hand] = []
        self._idle: list[_Hand] = []
        self._asked: dict[Any, tuple[_Hand, int | None]] = {}  # by answer: whom, for which part (None: to get ready)

    def __str__(self) -> str:
        hosts = Counter(hand.host for hand in self._hands)
        return f"{self.count} workers ({', '.join(f'{count} on {host}' for host, count in hosts.items())})"

    def start(self, kind: type[UserError] = RunStopped) -> None:
        """Have all workers there, or those that come in time.

        Raises such an error where none comes, or one has another version or lacks the data.
        """
        self._hands += [_Hand(self._class.remote()) for _ in range(self.count - len(self._hands))]
        looks = {self._look(hand): hand for hand in self._hands}
        came, late = self._ray.wait(list(looks), num_returns=len(looks), timeout=START_SECONDS)
        if late:
            few = f"{len(came)} of {self.count} workers came within {START_SECONDS:g} seconds"
            if not came:
                raise kind(f"--ray: {few}; is the cluster busy? `ray status` tells")
            self._progress.warn(f"{few}, and share all images")
            self._let_go([looks[look] for look in late])
            self.count = len(came)
        for look in came:
            self._meet(looks[look], look, kind)
            self._told(looks[look], looks[look].actor.require_data.remote(self._data), kind)

    def _look(self, hand: _Hand) -> Any:
        return hand.actor.look.remote(os.getcwd())

    def _meet(self, hand: _Hand, look: Any, kind: type[UserError] = RunStopped) -> None:
        found = self._told(hand, look, kind)
        hand.host, hand.pid = found["host"], found["pid"]
        for name in _SAME:
            own = str(importlib.import_module(name).__version__)
            if found[name] != own:
                there = f"{name} {found[name]}" if found[name] else f"no {name}"
                raise kind(f"--ray: the worker on {hand.host} has {there}, and this process {name} {own}")

    def _told(self, hand: _Hand, answer: Any, kind: type[UserError] = RunStopped) -> Any:
        """What a worker answers. Raises what it raised, an error for users as of that kind and naming the worker."""
        try:
            return self._ray.get(answer)
        except self._ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, UserError):
                raise error.cause from error
            raise kind(f"the worker on {hand.host}: {error.cause}") from error

    def stop(self) -> None:
        """End the workers. Those of this machine are gone afterwards: nothing may disturb what is timed next."""
        self._let_go(list(self._hands))

    def _let_go(self, hands: list[_Hand]) -> None:
        here = []
        for hand in hands:
            self._hands.remove(hand)
            if hand.host == socket.gethostname():
                with suppress(psutil.NoSuchProcess):
                    here.append(psutil.Process(hand.pid))
            self._ray.kill(hand.actor)
        psutil.wait_procs(here, timeout=ANSWER_SECONDS)

    def shown(
        self,
        bench: Bench,
        members: list[Runnable],
        reader: Reader,
        marks: Mapping[str, str],
        same: dict[str, int],
        batch_sizes: dict[str, int],
        on_range: Callable[[dict[str, Predictions]], None],
    ) -> dict[str, Predictions]:
        """What these cells answer to the rest of the reader's images; `on_range` is given it as it is known, in order.

        same, batch_sizes: kept up to date.
        """
        parts: list[dict[str, Predictions]] = []

        def left() -> list[str]:
            return [member.cell.id for member in members if member in bench.running]

        job = replace(Job.of(bench, members, bench.batch_size), device=bench.device.type)
        self.begin(partial(Worker, job, dict(marks)), bench.subject.conditions())
        ranges = list(split(range(reader.end, len(reader.source)), job.size, self.count))
        for found in self.results(ranges, lambda part: (part.start, part.stop, left())):
            for name, message in found.failed.items():
                if name in left():
                    bench.drop(name, "accuracy", UserError(message))
            reader.waited += found.waited / self.count
            reader.reach(found.end, found.skipped)
            for name, size in found.batch_sizes.items():
                batch_sizes[name] = min(size, batch_sizes.get(name, size))
            for name, count in found.same.items():
                same[name] += count
            if found.answers:
                parts.append({name: found.answers[name] for name in left()})
                on_range(parts[-1])
        return {name: join(part[name] for part in parts) for name in left() if parts}

    def begin(self, work: Callable[[], Any], own: dict[str, Any]) -> None:
        """Have each worker make what it will show things to, whose conditions must be these."""
        self._work, self._own = pickle.dumps(work), own
        self._idle, self._asked = [], {}
        for hand in self._hands:
            self._prepare(hand)

    def results(self, parts: Sequence[Any], words: Callable[[Any], tuple[Any, ...]] = tuple) -> Iterator[Any]:
        """What the workers make of these parts, in order. One that dies is replaced, and its part done again.

        words: of a part, what a worker is asked.
        """
        todo, done, deaths = deque(range(len(parts))), dict[int, Any](), Counter[int | None]()
        at = 0
        while at < len(parts):
            while todo and self._idle:
                hand, number = self._idle.pop(), todo.popleft()
                self._asked[hand.actor.show.remote(*words(parts[number]))] = hand, number
            if at in done:
                yield done.pop(at)
                at += 1
                continue
            answer, hand, which = self._next()
            try:
                if which is None:
                    self._prepared(hand, answer)
                else:
                    done[which] = self._told(hand, answer)
                    self._idle.append(hand)
            except self._ray.exceptions.RayError as error:
                deaths[which] += 1
                self._prepare(self._replaced(hand, error, deaths[which] > MOST_DEATHS))
                if which is not None:
                    todo.appendleft(which)

    def _prepare(self, hand: _Hand) -> None:
        answer = hand.actor.begin.remote(self._work) if hand.pid else self._look(hand)
        self._asked[answer] = hand, None

    def _prepared(self, hand: _Hand, answer: Any) -> None:
        """A worker is there, or ready. Raises RunStopped where what it has is not the same."""
        if not hand.pid:
            self._meet(hand, answer)
            self._prepare(hand)
            return
        told = self._told(hand, answer)
        for name, own in self._own.items():
            if told.get(name) != own:
                there = f"the worker on {hand.host} has {name} {told.get(name)}"
                raise RunStopped(f"{there}, and this process {own}: are data and checkpoints the same there?")
        self._idle.append(hand)

    def _next(self) -> tuple[Any, _Hand, int | None]:
        """The next answer that is there, by whom, and to which part. Raises RunStopped where no worker is left."""
        alone = not any(hand.pid for hand, _ in self._asked.values())
        answers, _ = self._ray.wait(list(self._asked), timeout=START_SECONDS if alone else None)
        if not answers:
            raise RunStopped(f"all workers died, and none came in {START_SECONDS:g} s; what was measured is kept.")
        return answers[0], *self._asked.pop(answers[0])

    def _replaced(self, hand: _Hand, error: Exception, last: bool) -> _Hand:
        """A new worker for one that died. Raises RunStopped where that was the last chance."""
        text = f"the worker on {hand.host} died: {_reason(error)}"
        if last:
            raise RunStopped(f"{text}, as others did before at the same images; what was measured is kept.")
        self._progress.warn(f"{text}; another one takes its place")
        self._let_go([hand])
        self._hands.append(_Hand(self._class.remote()))
        return self._hands[-1]


def split(places: range, batch: int, workers: int) -> Iterator[range]:
    """The places in ranges of whole batches, smaller towards the end so that all workers end at about one time."""
    start = places.start
    while start < places.stop:
        batches = (places.stop - start) // batch // (2 * workers)
        stop = min(places.stop, start + batch * min(MOST_BATCHES, max(1, batches)))
        yield range(start, stop)
        start = stop


def _reason(error: Exception) -> str:
    """Why an actor died, without Ray's numbers of it."""
    return textwrap.shorten(str(error).rpartition("The actor is dead because ")[2], 160, placeholder=" …").rstrip(".")


def _require_shared(subject: Subject) -> None:
    """Raise UserError for a model or images of which no part can be measured alone."""
    if subject.source and subject.source.streaming:
        raise UserError(f"--ray: {subject.source.name} is a stream, which one process reads in order; leave --ray out")
    if not subject.model.num_classes:
        raise UserError(f"--ray: {subject.spec.label} gives features, which one process compares; leave --ray out")


@contextmanager
def opened(
    options: RunOptions, subjects: Iterable[Subject], data: str, device: torch.device, progress: Progress
) -> Iterator[Cluster | None]:
    """The workers that `options.ray` asks for; None where they are not asked for or have nothing to do.

    A Ray that the program has initialized itself is used, and left as it was. Raises UserError, in one line, where Ray
    or the cluster is not there, too small, or of other versions.
    """
    if not options.ray or "accuracy" not in options.only:
        yield None
        return
    for subject in subjects:
        _require_shared(subject)
    try:
        ray = importlib.import_module("ray")
    except ImportError as error:
        raise UserError("--ray needs Ray, which is not installed: pip install 'tokbench[ray]'") from error
    ours = not ray.is_initialized()
    try:
        if ours:
            _connect(ray, options.ray)
        cluster = Cluster(ray, *_size(ray, options.ray, device), data, progress)
        try:
            cluster.start(UserError)
            yield cluster
        finally:
            cluster.stop()
    finally:
        if ours:
            ray.shutdown()


def _connect(ray: Any, asked: str) -> None:
    """Join the cluster at that address or, without one, in RAY_ADDRESS; else start one on this machine."""
    address = asked if ":" in asked else os.environ.get("RAY_ADDRESS") or "local"
    if ":" in address:
        _require_answer(address)
    own = {"include_dashboard": False, "object_store_memory": 10**8} if address == "local" else {}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as error:
        raise UserError(f"--ray: the cluster at {address} cannot be joined from here: {shortened(error)}") from error
    finally:
        if signal.getsignal(signal.SIGTERM) is not handler:  # Ray's would end this process without a word
            signal.signal(signal.SIGTERM, handler)


def _require_answer(address: str) -> None:
    """Raise UserError unless a server there greets as gRPC's do; Ray itself would try for many minutes."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS) as there:
            there.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, _SETTINGS, 0, 0, 0, 0, 0]))
            if there.recv(4)[3:] != bytes([_SETTINGS]):
                raise OSError("what answers is no Ray")
    except (OSError, OverflowError, ValueError) as error:
        raise UserError(f"--ray: no cluster answers at {address}: {shortened(error)}") from error


def _size(ray: Any, asked: str, device: torch.device) -> tuple[int, dict[str, float]]:
    """How many workers to have, and what each takes: a GPU, or as many cores as this process has threads."""
    threads = torch.get_num_threads()
    kind, each = ("GPU", 1) if device.type == "cuda" else ("CPU", threads)
    there = int(ray.cluster_resources().get(kind, 0))
    count = int(asked) if asked.isdecimal() else max(1, there // each)
    if count * each > there:
        takes = "GPUs, and a worker takes one"
        if kind == "CPU":
            takes = f"cores, and a worker takes {each} (OMP_NUM_THREADS)"
        raise UserError(f"--ray {asked}: the cluster has {there} {takes}")
    return count, {"num_cpus": 0 if kind == "GPU" else each, "num_gpus": 1 if kind == "GPU" else 0}
