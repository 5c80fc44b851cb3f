"""The errors users see: one line that says what was wrong, where, and the nearest right thing."""

from __future__ import annotations

import difflib
import json
import re
import sys
import textwrap
from collections.abc import Collection, Iterable
from pathlib import Path


class UserError(Exception):
    """Bad input. The message is one line for the user; the CLI prints it and exits with 2."""


class BaselineFailed(Exception):
    """The unreduced model failed, so its cells have no reference."""


class RunStopped(UserError):
    """A run that started and cannot continue; its results are kept. The CLI prints the message and exits with 3."""


def nearest(word: str, options: Iterable[str]) -> str:
    """A hint to append to an error, " Did you mean …?", with the closest of `options`; "" if none is close."""
    matches = difflib.get_close_matches(word, list(options), cutoff=0.5)
    return f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""


def one_line(error: BaseException) -> str:
    """The message of a UserError; the type and first line of any other error."""
    lines = _text(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, UserError) else f"{type(error).__name__}: {lines[0]}".rstrip(": ")


def require_known(word: str, options: Collection[str], what: str) -> None:
    """Raise UserError, with all options and the nearest, unless the word is one of them. what: it should be."""
    if word not in options:
        raise UserError(f"no {what} {word!r}; there are {', '.join(options)}.{nearest(word, options)}")


def require_file(path: Path, what: str, instead: str) -> None:
    """Raise UserError unless there is a file of that path. what: it is to be; instead: what to give for a folder."""
    try:
        if path.is_file():
            return
        is_folder, is_there = path.is_dir(), path.exists()
        siblings = [other.name for other in path.parent.iterdir() if other.is_file()] if path.parent.is_dir() else []
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise UserError(f"{what} {str(path)[:100]!r} cannot be read: {error.strerror}.") from error
    if is_folder:
        raise UserError(f"{what} {str(path)!r} is a folder; {instead}.")
    wrong = "is no regular file." if is_there else f"does not exist.{nearest(path.name, siblings)}"
    raise UserError(f"{what} {str(path)!r} {wrong}")


def shortened(error: BaseException) -> str:
    """The error's message on one line of at most 200 characters, or its type if it has none."""
    return textwrap.shorten(_text(error), 200, placeholder=" …") or type(error).__name__


def printable(text: str) -> str:
    """Text that any file can hold, and that neither a terminal nor a CI server obeys.

    Control characters, the `::` that begins a command in GitHub's logs and the `##[` that does in others' are escaped
    as both JSON and Python read them in a string: \\n, \\u001b, \\udcff, :\\u003a, #\\u0023[. Twice is as once.
    """
    if not text.isprintable():
        text = "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)
    if "::" in text or "##" in text:
        text = re.sub(r"(?<=:):|(?<=#)#(?=\w*\[)", lambda found: f"\\u{ord(found[0]):04x}", text)
    return text


def say(text: str) -> None:
    """Print what a command found, on standard output."""
    print("\n".join(map(printable, text.removesuffix("\n").split("\n"))))


def complain(text: str) -> None:
    """Print the last line of a command that failed, on standard error."""
    print("tokbench:", printable(" ".join(text.split())), file=sys.stderr)


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as second:
        return f"(its message raised {type(second).__name__})"
