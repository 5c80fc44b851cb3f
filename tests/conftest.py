"""Shared by all tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before torch is imported. The cores are for the processes that run the tests, and those that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from made_run import make_run
from stand_ins import Source, stand_in

from tokbench import cli, interrupts, plugins
from tokbench.fusion.core import METHODS
from tokbench.results.cell import Cell
from tokbench.results.table import load_cells
from tokbench.running import runner

# The same inputs every time, however slow the machine, and whether Hypothesis sees that it is in CI or not.
# `--hypothesis-profile long` draws new ones and looks for the smallest form, too, which takes minutes.
_CALM = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("short", max_examples=40, derandomize=True, phases=[Phase.explicit, Phase.generate], **_CALM)
settings.register_profile("long", max_examples=1000, **_CALM)
settings.load_profile("short")


# By how long they take: begun last, one of them would run for a minute with the other cores idle.
_LONGEST = (
    "runner", "regression", "cluster", "modes", "fusion", "resume", "per_image", "kill", "speed", "data", "export",
    "search", "coverage", "families", "fuzz", "converted", "plugins",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first."""
    rank = {f"test_{name}": place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(autouse=True)
def _same_draws_every_time():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_terminal_everywhere(monkeypatch):
    """Whatever the tests were started from; in GitHub's CI, `tokbench check` would put its verdicts into the job's."""
    terminal = ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "PY_COLORS", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
    for name in (*terminal, "GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture(autouse=True)
def _skip_gpu_tests_without_a_gpu(request):
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU; there is none here")


@pytest.fixture(autouse=True)
def _same_methods_every_time():
    """The registry, the plugins and their modules as they were before, afterwards."""
    known, loaded, modules = dict(METHODS), dict(plugins.LOADED), set(sys.modules)
    yield
    for registry, before in ((METHODS, known), (plugins.LOADED, loaded)):
        registry.clear()
        registry.update(before)
    for name in set(sys.modules) - modules:
        if name.startswith("tokbench_plugin_"):
            del sys.modules[name]


@pytest.fixture
def tokbench_command(monkeypatch, capsys):
    """Run a command line in this process: (exit code, standard output, standard error)."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tokbench", *map(str, words)])
        monkeypatch.setattr(interrupts, "_exit", sys.exit)
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


@pytest.fixture
def one_thread():
    """One thread for what is too small to share out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A small made-up run."""
    return make_run(tmp_path / "run")


@pytest.fixture
def cells(run: Path) -> list[Cell]:
    return load_cells([run])


@pytest.fixture
def source(monkeypatch, request):
    """The tiny model and its images behind every name; a plot, which takes a second, only for tests marked `draws`."""
    if not request.node.get_closest_marker("draws"):
        monkeypatch.setattr(runner, "_draw", lambda *_: [])
    return stand_in(monkeypatch, Source())
