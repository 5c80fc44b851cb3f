"""What all tests may use, and what is the same for every one of them."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from made_run import make_run
from stand_ins import Source, stand_in

from tokbench import cli, interrupts, plugins
from tokbench.fusion.core import METHODS
from tokbench.measure import speed
from tokbench.results.cell import Cell
from tokbench.results.table import load_cells
from tokbench.running import runner

_draw = runner._draw


@pytest.fixture(autouse=True, scope="session")
def _runs_are_quick():
    """They draw no plot, which takes a second, and do not wait for the disk: no test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_draw", lambda *_: [])
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _collections_are_quick():
    """They leave out what was imported, which is nearly all there is."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def _traces_are_quick():
    """To name a value, a trace goes through all variables of the frames around it: half of the time that FLOPs take."""
    with pytest.MonkeyPatch.context() as patch:
        name = "_create_interpreter_name_lookup_fn"
        patch.setattr(torch.jit._trace, name, lambda frames_up=1: lambda value: "", raising=False)
        yield


@pytest.fixture(autouse=True, scope="session")
def _freed_memory_goes_back():
    """Timing has malloc keep it until the process ends: with what hostile files claim, more than may be forked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "keep_freed_memory", lambda: False)
        yield


@pytest.fixture(autouse=True)
def _runs_draw_where_their_plot_is_looked_at(monkeypatch, request):
    if request.node.get_closest_marker("draws"):
        monkeypatch.setattr(runner, "_draw", _draw)


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
def source(monkeypatch):
    """The tiny model and its images behind every name."""
    return stand_in(monkeypatch, Source())
