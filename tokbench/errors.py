"""The one error users see: a single line that says what was wrong, where, and the nearest right thing."""

from __future__ import annotations

import difflib
import sys
import textwrap
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message is one line for the user; the CLI prints it and exits with 2."""


class BaselineFailed(Exception):
    """The unreduced model failed, without which nothing can be said of a model's cells."""


class RunStopped(UserError):
    """A run that began and cannot go on; what it measured is kept. The CLI prints the message and exits with 3."""


def nearest(word: str, options: Iterable[str], count: int = 3) -> str:
    """The closest of `options` as a phrase to append to an error (with a leading space), or ""."""
    matches = difflib.get_close_matches(word, list(options), n=count, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""


def one_line(error: BaseException) -> str:
    """A UserError says it all; of other errors the kind and the first line."""
    lines = _text(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, UserError) else f"{type(error).__name__}: {lines[0]}".rstrip(": ")


def shortened(error: BaseException) -> str:
    """What an error says, on one line of at most 200 characters; its kind where it says nothing."""
    return textwrap.shorten(_text(error), 200, placeholder=" …") or type(error).__name__


def printable(text: str) -> str:
    """Text as any file can hold it and no terminal obeys it: what cannot be printed becomes \\n, \\x1b and \\udcff."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def complain(text: str) -> None:
    """The line the CLI ends with where it did not do what it was asked for."""
    print("tokbench:", printable(" ".join(text.split())), file=sys.stderr)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as second:
        return f"(its text cannot be had: {type(second).__name__})"
