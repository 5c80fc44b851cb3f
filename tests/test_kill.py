"""Runs in processes of their own, killed and interrupted: benchmarks/kill_and_resume.py in small."""

from __future__ import annotations

import os
import re
import resource
import runpy
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fvcore.nn  # noqa: F401  (so that the processes below have it)
import psutil
import pytest
from forked import forked
from made_run import make_run

from tokbench import __main__, cli

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard():
    """Shells let what they start in the background ignore Ctrl-C, and so would the processes of these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_killed_run_comes_out_as_an_undisturbed_one(source, monkeypatch, capsys):
    source.count = 200
    words = ["--", "--device=cpu", "--method=tome", "--schedule=8"]
    monkeypatch.setattr(sys, "argv", ["kill_and_resume.py", "--kills", "3", *words])
    runpy.run_path(str(BENCHMARKS / "kill_and_resume.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert out.count("kill ") == 3
    assert "all figures equal the undisturbed run's" in out.splitlines()[-1]


def command(*words: object, main: Callable[[], object] = cli.main, before: str = "") -> Callable[[], None]:
    """What runs a command line, after a piece of code."""

    def work() -> None:
        exec(before, {"ctrl_c": lambda: os.kill(os.getpid(), signal.SIGINT)})
        sys.argv = ["tokbench", *map(str, words)]
        main()

    return work


def wait_for_the_pass(run: Path, alive: Callable[[], bool]) -> None:
    """Until FLOPs are counted, and a moment longer, which is amid the pass over the images."""
    records = run / "records.jsonl"
    while alive() and not (records.exists() and records.read_text().count("\n") == 2):
        time.sleep(0.05)
    time.sleep(0.5)


ACCURACY = ("run", "--method", "tome", "--schedule", "13", "--limit", "9999", "--readers")
REST = ("--device", "cpu", "--only", "flops,accuracy")


def cpu_seconds(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    ("send", "word", "readers"),
    # In a terminal, Ctrl-C is for the readers, too.
    [(os.kill, signal.SIGINT, "1"), (os.kill, signal.SIGTERM, "1"), (os.killpg, signal.SIGINT, "2")],
)
def test_a_signal_stops_at_once_and_names_the_command_that_continues(source, tmp_path, send, word, readers):
    source.count = 9999
    run = tmp_path / "a run"
    words = [*ACCURACY, readers, "--out", str(run)]
    others = cpu_seconds(resource.getrusage(resource.RUSAGE_CHILDREN))
    process = forked(command(*words, *REST), tmp_path)
    wait_for_the_pass(run, process.is_alive)
    until_asked = sum(psutil.Process(process.pid).cpu_times()[:2])
    send(process.pid, word)
    process.join()
    out, err = ((tmp_path / name).read_text() for name in ("out", "err"))
    assert process.exitcode == 130 and "Traceback" not in out, err
    # Usually a second; by the clock it would be as many as there are other processes.
    assert cpu_seconds(resource.getrusage(resource.RUSAGE_CHILDREN)) - others - until_asked < 10
    (line,) = err.splitlines()
    assert re.match(r"tokbench: interrupted; \d of 4 measurements are kept in .*; continue with: tokbench run ", line)
    assert shlex.split(line.partition("continue with: tokbench ")[2])[: len(words)] == words
    assert {path.name for path in run.iterdir()} <= {"manifest.json", "records.jsonl", "partial"}


# Ctrl-C at a moment that no test hits by chance: this code is run before the command line.
MOMENTS = {
    "while the readers are started": """
from torch.utils.data import dataloader
iterator, make = dataloader._MultiProcessingDataLoaderIter, dataloader._MultiProcessingDataLoaderIter.__init__
iterator.__init__ = lambda self, loader: (ctrl_c(), make(self, loader))
""",
    "where Python swallows it": """
from tokbench.running import half_pass
class Last:
    def __del__(self):
        ctrl_c()
half_pass.PassFile.add = lambda self, half: Last() and None
""",
    "again while the pass is saved": """
from tokbench.running import half_pass
save = half_pass.PassFile.save
half_pass.PassFile.add = lambda self, half: ctrl_c()
half_pass.PassFile.save = lambda self: (ctrl_c(), save(self))
""",
}
SHORT = ("run", "--method", "tome", "--schedule", "13", "--readers", "1", "--limit", "48", "--only", "accuracy")


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_is_one_line_at_any_moment(moment, source, tmp_path):
    words = [*SHORT, "--device", "cpu", "--out", tmp_path / "run"]
    process = forked(command(*words, before=MOMENTS[moment]), tmp_path)
    process.join()
    err = (tmp_path / "err").read_text()
    assert process.exitcode == 130, err
    (line,) = err.splitlines()
    assert line.startswith("tokbench: interrupted") and "before anything was measured" not in line


AMID_AN_IMPORT = """
import builtins
kept = builtins.__build_class__
def build(function, name, *bases, **words):
    if function.__module__.startswith("PACKAGE"):
        ctrl_c()
    return kept(function, name, *bases, **words)
builtins.__build_class__ = build
"""


def _script(tmp_path: Path, before: str, *words: object) -> subprocess.CompletedProcess[str]:
    """A new process, with imports still to do."""
    begin = "import os, signal\nctrl_c = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
    end = "from tokbench.__main__ import main\nmain()\n"
    (tmp_path / "script.py").write_text(begin + before + end)
    line = [sys.executable, tmp_path / "script.py", *words]
    return subprocess.run(line, capture_output=True, text=True, check=False, env=ENVIRONMENT)


def test_ctrl_c_amid_the_import_of_what_measures_is_one_line(tmp_path):
    early = AMID_AN_IMPORT.replace("PACKAGE", "numpy._core")
    done = _script(tmp_path, early, *SHORT, "--device", "cpu", "--out", tmp_path / "run")
    assert done.returncode == 130, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("tokbench: interrupted") and "before anything was measured" in line


def test_ctrl_c_before_the_command_line_is_read_is_one_line(tmp_path):
    early = AMID_AN_IMPORT.replace("PACKAGE", "typer")
    done = _script(tmp_path, early, "list", "methods")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "tokbench: interrupted\n")


def test_ctrl_c_amid_python_s_tear_down_changes_nothing(tmp_path):
    done = _script(tmp_path, "import atexit\natexit.register(ctrl_c)\n", "list", "methods")
    assert (done.returncode, done.stderr) == (0, "") and "tome" in done.stdout
    done = _script(tmp_path, "import atexit\natexit.register(ctrl_c)\n", "list", "nothing")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("what", ["plot", "report"])
def test_ctrl_c_amid_writing_leaves_no_half_a_file(what, tmp_path):
    run, target = make_run(tmp_path / "run"), tmp_path / "drawn" / f"it.{'png' if what == 'plot' else 'html'}"
    target.parent.mkdir()
    interrupt = "import os\nos.fsync = lambda file: ctrl_c()\n"
    process = forked(command(what, run, "--out", target, main=__main__.main, before=interrupt), tmp_path)
    process.join()
    assert (process.exitcode, (tmp_path / "out").read_text()) == (130, "")
    assert (tmp_path / "err").read_text() == "tokbench: interrupted\n"
    assert not list(target.parent.iterdir())
