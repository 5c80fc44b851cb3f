"""One method of each kind, for tests that take seconds a method: `pytest -m slow` tries the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

# Merges, merges by MLERP, before attention, keeps a share, spreads tokens, counts by image, and a control.
ONE_OF_EACH = frozenset({"none", "tome", "tofu", "mctf", "evit", "gtp", "ats", "random"})


def slowly(methods: Iterable[str]) -> list[Any]:
    """The methods as parameters of a test, all but one of each kind marked as slow."""
    return [name if name in ONE_OF_EACH else pytest.param(name, marks=pytest.mark.slow) for name in methods]
