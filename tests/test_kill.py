"""A real run on the bundled model, killed and interrupted: benchmarks/kill_and_resume.py in small."""

from __future__ import annotations

import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from made_run import make_run

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard():
    """Shells let what they start in the background ignore Ctrl-C, and so would the processes of these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_killed_run_comes_out_as_an_undisturbed_one():
    words = ["--", "--device=cpu", "--limit=48", "--method=tome", "--schedule=13"]
    script = [sys.executable, BENCHMARKS / "kill_and_resume.py", "--kills", "3", *words]
    done = subprocess.run(script, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("kill ") == 3
    assert "all figures equal the undisturbed run's" in done.stdout.splitlines()[-1]


def cpu_seconds(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize("word", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_once_and_names_the_command_that_continues(tmp_path, word):
    run = tmp_path / "a run"
    words = ["run", "--method", "tome", "--schedule", "13", "--workers", "1", "--limit", "9999", "--out", str(run)]
    command = [sys.executable, "-m", "tokbench", *words, "--device", "cpu", "--only", "flops,accuracy"]
    others = cpu_seconds(resource.getrusage(resource.RUSAGE_CHILDREN))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    while process.poll() is None and not (run / "records.jsonl").exists():
        time.sleep(0.05)
    time.sleep(2)
    until_asked = sum(psutil.Process(process.pid).cpu_times()[:2])
    process.send_signal(word)
    _, err = process.communicate()
    assert process.returncode == 130, err
    # Usually a second; by the clock it would be as many as there are other processes.
    assert cpu_seconds(resource.getrusage(resource.RUSAGE_CHILDREN)) - others - until_asked < 10
    (line,) = err.splitlines()
    assert re.match(r"tokbench: interrupted; \d of 4 measurements are kept in .*; continue with: tokbench run ", line)
    assert shlex.split(line.partition("continue with: tokbench ")[2])[: len(words)] == words
    assert {path.name for path in run.iterdir()} <= {"manifest.json", "records.jsonl", "partial"}


def test_ctrl_c_to_the_whole_process_group_is_one_clean_line(tmp_path):
    run = tmp_path / "run"
    words = ["run", "--method", "tome", "--schedule", "13", "--workers", "2", "--limit", "9999", "--out", str(run)]
    command = [sys.executable, "-m", "tokbench", *words, "--device", "cpu", "--only", "flops,accuracy"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
    )
    while process.poll() is None and not (run / "records.jsonl").exists():
        time.sleep(0.05)
    time.sleep(4)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130, err
    (line,) = err.splitlines()
    assert line.startswith("tokbench: interrupted; ") and "Traceback" not in out


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
    "amid an import": """
import builtins
kept, numpy_is_at = builtins.__build_class__, "numpy._core"
def build(function, name, *bases, **words):
    if function.__module__.startswith(numpy_is_at):
        ctrl_c()
    return kept(function, name, *bases, **words)
builtins.__build_class__ = build
""",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_is_one_line_at_any_moment(moment, tmp_path):
    script = tmp_path / "script.py"
    begin = "import os, signal, sys\nctrl_c = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
    script.write_text(f"{begin}{MOMENTS[moment]}from tokbench import cli\ncli.main()\n")
    words = ["run", "--method", "tome", "--schedule", "13", "--workers", "1", "--limit", "48", "--only", "accuracy"]
    command = [sys.executable, script, *words, "--device", "cpu", "--out", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 130, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("tokbench: interrupted")
    assert ("before anything was measured" in line) == (moment == "amid an import")


def _script(tmp_path: Path, before: str, *words: object) -> subprocess.CompletedProcess[str]:
    begin = "import os, signal\nctrl_c = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
    end = "from tokbench.__main__ import main\nmain()\n"
    (tmp_path / "script.py").write_text(begin + before + end)
    command = [sys.executable, tmp_path / "script.py", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)


def test_ctrl_c_before_the_command_line_is_read_is_one_line(tmp_path):
    early = MOMENTS["amid an import"].replace("numpy._core", "typer")
    done = _script(tmp_path, early, "list", "methods")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "tokbench: interrupted\n")


def test_ctrl_c_amid_python_s_tear_down_changes_nothing(tmp_path):
    done = _script(tmp_path, "import atexit\natexit.register(ctrl_c)\n", "list", "methods")
    assert (done.returncode, done.stderr) == (0, "") and "tome" in done.stdout
    done = _script(tmp_path, "import atexit\natexit.register(ctrl_c)\n", "list", "nothing")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["plot", "report"])
def test_ctrl_c_amid_writing_leaves_no_half_a_file(command, tmp_path):
    run, target = make_run(tmp_path / "run"), tmp_path / "drawn" / f"it.{'png' if command == 'plot' else 'html'}"
    target.parent.mkdir()
    done = _script(tmp_path, "os.fsync = lambda file: ctrl_c()\n", command, run, "--out", target)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "tokbench: interrupted\n")
    assert not list(target.parent.iterdir())
