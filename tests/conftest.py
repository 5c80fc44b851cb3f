"""How tests are run; the fixtures are in shared_fixtures.py."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

# Before torch is imported. The cores are for the processes that run the tests, and those that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same inputs every time, however slow the machine, and whether Hypothesis sees that it is in CI or not.
# `--hypothesis-profile long` draws new ones and looks for the smallest form, too, which takes minutes.
_CALM = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("short", max_examples=40, derandomize=True, phases=[Phase.explicit, Phase.generate], **_CALM)
settings.register_profile("long", max_examples=1000, **_CALM)
settings.load_profile("short")


# First what sends signals to forked processes: late in a process that has loaded other runtimes, these once ended with
# SIGSEGV. Then by how long they take: begun last, one of them would run for a minute with the other cores idle.
_FIRST = (
    "kill", "cluster", "runner", "fusion", "fuzz", "modes", "plots", "coverage", "flops", "per_image", "runtimes",
    "resume", "export", "regression", "families", "images", "search", "docs", "search_ray", "cli", "html", "pick",
    "converted", "properties", "models", "plugins", "data", "accuracy", "golden", "speed",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {f"test_{name}": place for place, name in enumerate(_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_configure(config: pytest.Config) -> None:
    """What fixtures import takes seconds, and the process that shares the tests out runs none."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses"):
        config.pluginmanager.import_plugin("shared_fixtures")
