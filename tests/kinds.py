"""One method of each kind, for tests that take seconds a method: `pytest -m slow` tries the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

# Merges, merges by MLERP, before attention, keeps a share, spreads tokens, counts by image, and a control.
ONE_OF_EACH = frozenset({"none", "tome", "tofu", "mctf", "evit", "gtp", "ats", "random"})


def slowly(methods: Iterable[str], often: Collection[str] = ONE_OF_EACH) -> list[Any]:
    """The methods as parameters of a test, all but those of `often` marked as slow."""
    return [name if name in often else pytest.param(name, marks=pytest.mark.slow) for name in methods]
