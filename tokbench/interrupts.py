"""Ctrl-C and SIGTERM (which schedulers send before SIGKILL): one line and exit code 130, at any moment."""

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

_exit = os._exit  # tests replace it, to continue


@contextmanager
def ending_at_once() -> Iterator[None]:
    """End the process immediately on a signal: for work that has nothing to save."""
    with _heard(lambda *_: _leave("interrupted")):
        yield


@contextmanager
def ending_after_unwinding(say: Callable[[], str] = lambda: "interrupted") -> Iterator[None]:
    """Raise KeyboardInterrupt, so that `finally` and `with` can save their state, then end the process.

    A second signal ends it at once, and so does a first one where Python would lose the exception. `say` returns the
    line to print.
    """
    interrupted, process, unraisable = False, os.getpid(), sys.unraisablehook

    def interrupt(_: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        if os.getpid() != process:  # a forked reader of images, which this process kills at the end
            return
        if interrupted or _amid_import(frame):
            _leave(say())
        interrupted = True
        raise KeyboardInterrupt

    def swallowed(error: sys.UnraisableHookArgs) -> None:
        if isinstance(error.exc_value, KeyboardInterrupt):  # for example during a fork
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
    """Keep the exit code once the work is done: an interrupt while Python shuts down would print a traceback."""
    atexit.register(_ignore)  # registered last, so it runs first


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
    """Whether the signal came during an import: NumPy turns a KeyboardInterrupt there into an ImportError."""
    while frame and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def _leave(text: str) -> NoReturn:
    """Print the line and end the process without cleanup, during which torch would print long errors.

    Nothing is lost: files on disk are complete at any moment.
    """
    _ignore()
    with suppress(OSError, ValueError, RuntimeError):  # RuntimeError: during another print
        sys.stdout.flush()
    with suppress(OSError, ValueError):  # the other end of the pipe may be closed
        complain(text)
    for reader in multiprocessing.active_children():
        reader.kill()
    _exit(130)
