"""The one error users see: a single line that says what was wrong, where, and the nearest right thing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The message is one line for the user; the CLI prints it and exits with 2."""


def nearest(word: str, options: Iterable[str], count: int = 3) -> str:
    """The closest of `options` as a phrase to append to an error (with a leading space), or ""."""
    matches = difflib.get_close_matches(word, list(options), n=count, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(match) for match in matches)}?" if matches else ""
