"""Ctrl-C, and SIGTERM, a scheduler's last word before SIGKILL: one line and exit code 130, whatever they come amid."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from tokbench.errors import complain

_exit = os._exit  # a name of its own, for tests that go on


@contextmanager
def ending_at_once() -> Iterator[None]:
    """The process ends where it stands: for what has nothing to save."""
    with _heard(lambda *_: _leave("interrupted")):
        yield


@contextmanager
def ending_after_unwinding(say: Callable[[], str] = lambda: "interrupted") -> Iterator[None]:
    """KeyboardInterrupt is raised, for `finally` and `with` to save what they can, and then the process ends.

    It ends at once at a second signal, or where an exception would be lost. `say` gives the line for either.
    """
    interrupted, process, unraisable = False, os.getpid(), sys.unraisablehook

    def interrupt(_: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if os.getpid() != process:  # one that reads images, and ends with this one
            return
        if interrupted or _amid_import(frame):
            _leave(say())
        interrupted = True
        raise KeyboardInterrupt

    def swallowed(error: sys.UnraisableHookArgs) -> None:
        if isinstance(error.exc_value, KeyboardInterrupt):  # amid a fork, say
            _leave(say())
        unraisable(error)

    with _heard(interrupt):
        sys.unraisablehook = swallowed
        try:
            yield
        except KeyboardInterrupt:
            _leave(say())
        finally:
            sys.unraisablehook = unraisable


def ignoring_at_exit() -> None:
    """For a process whose work is over: its exit code stays, as an interrupt amid Python's tear-down is a traceback."""
    atexit.register(_ignore)  # registered last, run first


def _ignore() -> None:
    for word in (signal.SIGINT, signal.SIGTERM):
        signal.signal(word, signal.SIG_IGN)


@contextmanager
def _heard(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    before = {word: signal.getsignal(word) for word in (signal.SIGINT, signal.SIGTERM)}
    heard = [word for word, usual in before.items() if usual not in (None, signal.SIG_IGN)]
    try:
        for word in heard:
            signal.signal(word, handler)
        yield
    finally:
        for word in heard:
            signal.signal(word, before[word])


def _amid_import(frame: FrameType | None) -> bool:
    """NumPy's, interrupted, comes out as an ImportError of whoever wants it."""
    while frame and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _leave(text: str) -> NoReturn:
    """Say so and end the process without tearing down what is half done, which torch would complain of at length.

    Nothing is lost: what is on disk is whole at any moment.
    """
    _ignore()
    with suppress(OSError, ValueError, RuntimeError):  # RuntimeError: amid another print
        sys.stdout.flush()
    with suppress(OSError, ValueError):  # nobody may be left to read it
        complain(text)
    for reader in multiprocessing.active_children():
        reader.kill()
    _exit(130)
