"""The command line as a user meets it: exit codes, one-line errors, what is printed."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import tokbench
from tokbench import progress
from tokbench.config import Grid
from tokbench.results.folder import RunFolder
from tokbench.running import bench, timing
from tokbench.running.unfinished import find_unfinished

pytestmark = pytest.mark.usefixtures("one_thread")


QUICK = ("--device", "cpu", "--batch-size", 12, "--method", "tome", "--schedule", 8)


@pytest.mark.draws
def test_run_shows_table_and_plot_and_the_other_commands_read_the_run(tokbench_command, source, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run = tmp_path / "run"
    code, out, err = tokbench_command("run", *QUICK, "--out", run)
    assert (code, err) == (0, "")
    assert "2 cells" in out and "tome" in out and "Speed-up" in out
    assert out.rstrip().endswith(f"Plot: {run / 'pareto.png'}")

    code, out, _ = tokbench_command("table", run, "--format", "json", "--sort", "gflops")
    assert code == 0
    assert [row["method"] for row in json.loads(out)] == ["tome", "none"]
    code, out, _ = tokbench_command("table", run, run, "--pareto")
    assert code == 0 and "none" in out

    code, out, _ = tokbench_command("plot", run, "--format", "svg", "--x", "gflops", "--y", "agreement")
    assert (code, out.strip()) == (0, str(run / "pareto.svg"))
    code, out, _ = tokbench_command("table", run, "--filter", "method=tome", "--format", "csv")
    assert code == 0 and out.count("\n") == 2
    code, out, _ = tokbench_command("report", run)
    assert (code, out.strip()) == (0, str(run / "report.html")) and "tome" in (run / "report.html").read_text()

    code, out, _ = tokbench_command("plot", run, "--out", tmp_path / "mine.pdf", "--size", "paper", "--theme", "dark")
    assert code == 0 and (tmp_path / "mine.pdf").is_file()


def test_show_draws_the_tokens_of_bundled_images(tokbench_command, tmp_path):
    out = tmp_path / "tokens.png"
    code, text, err = tokbench_command(
        "show", "bundled:17", "--method", "evit", "--schedule", "keep:0.5@3", "--out", out
    )
    assert (code, text.strip(), err) == (0, str(out), "") and out.read_bytes().startswith(b"\x89PNG")


def test_show_warns_of_flops_that_whole_tokens_cannot_meet_in_a_line(tokbench_command, tmp_path):
    out = tmp_path / "tokens.png"
    code, text, err = tokbench_command(
        "show", "bundled:17", "--method", "topk", "--schedule", "flops:0.05", "--out", out
    )
    assert (code, text.strip()) == (0, str(out))
    assert err.startswith("tokbench: warning: topk at flops:0.05 takes") and err.count("\n") == 1


def test_on_a_terminal_the_table_grows_under_a_bar(source, tmp_path, monkeypatch):
    import io

    from rich.console import Console

    from tokbench.config import Grid
    from tokbench.running.runner import run

    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    grid = Grid.from_flags(methods=["tome"], schedules=["8"], device="cpu", batch_size="12")
    threads = set(threading.enumerate())
    with progress.LiveProgress(console) as live:
        # A frame drawn by a thread would be drawn in the middle of a timed pass.
        assert set(threading.enumerate()) == threads
        run(grid, tmp_path / "run", progress=live)
    shown = console.file.getvalue()
    assert "accuracy" in shown and "24/24" in shown and "Top-1" in shown
    assert live.failures == 0


def test_without_a_terminal_a_long_phase_says_how_far_it_is(monkeypatch):
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=120)
    with progress.LiveProgress(console) as live:
        live.phase("accuracy", 2000)
        live.advance(10)  # too soon for a line
        monkeypatch.setattr(progress, "_LINE_SECONDS", -1.0)
        live.advance(1000)
    first, second = console.file.getvalue().splitlines()
    assert first == "accuracy" and re.fullmatch(r"accuracy: 1,000 of 2,000, about 0:\d\d:\d\d left", second)


def test_a_run_with_failed_cells_ends_with_3_and_names_them(tokbench_command, source, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("busy")

    monkeypatch.setattr(bench, "apply", refuse)
    run = tmp_path / "run"
    code, out, err = tokbench_command("run", *QUICK, "--out", run)
    assert (code, err) == (3, "")
    assert "failed: bundled/tome/8: RuntimeError: busy" in out
    assert f"1 failed; tracebacks: {run / 'records.jsonl'}" in out


def test_an_interrupted_run_says_what_is_kept(tokbench_command, source, tmp_path, monkeypatch):
    from tokbench.running import runner

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(timing, "measure_speed", interrupt)
        code, _, err = tokbench_command("run", *QUICK, "--out", run)
    assert code == 130
    command = f"tokbench run {' '.join(map(str, QUICK))} --out {run}"
    assert err == f"tokbench: interrupted; 4 of 6 measurements are kept in {run}; continue with: {command}\n"
    code, out, err = tokbench_command(*command.split()[1:])
    assert (code, err) == (0, "") and "Continuing: 4 of 6 measurements already done" in out

    monkeypatch.setattr(runner, "load_model", interrupt)
    code, _, err = tokbench_command("run", *QUICK)
    assert (code, err) == (130, "tokbench: interrupted before anything was measured\n")
    code, _, err = tokbench_command(*command.split()[1:])
    kept = f"interrupted before anything was added to {run}; its results are kept; continue with: {command}"
    assert (code, err) == (130, f"tokbench: {kept}\n")

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    assert tokbench_command("run", *QUICK)[0] == 130


def test_a_new_run_says_that_an_unfinished_one_of_its_grid_is_there(tokbench_command, source, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(timing, "measure_speed", interrupt)
        assert tokbench_command("run", *QUICK)[0] == 130
    (left,) = Path("results").iterdir()
    (Path("results") / "broken").mkdir()
    (Path("results") / "broken" / "manifest.json").write_text("{")
    words = " ".join(map(str, QUICK))
    told = (
        f"tokbench: {left} is an unfinished run of this grid (4 of 6 measurements); this begins a new one, and to "
        f"continue that: tokbench run {words} --out {left}\n"
    )
    flops = ("--only", "flops")
    assert tokbench_command("run", *QUICK, *flops)[2] == ""  # another grid
    assert tokbench_command("run", *QUICK, *flops)[2] == "" == tokbench_command("run", *QUICK, "--fresh", *flops)[2]
    with RunFolder.held(left):  # another process is at it
        assert find_unfinished(Grid.from_dict(RunFolder.open(left).manifest.grid.plain())) is None
    code, _, err = tokbench_command("run", *QUICK)
    assert (code, err) == (0, told)
    assert tokbench_command("run", *QUICK, "--out", left)[2] == ""
    assert find_unfinished(Grid.from_dict(RunFolder.open(left).manifest.grid.plain())) is None


def test_the_command_that_continues_names_the_folder_that_was_made(tokbench_command, source, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "count_flops", interrupt)
    assert tokbench_command("run", *QUICK)[2].rstrip().endswith(f"--out {next(tmp_path.glob('results/*'))}"[-20:])
    for _ in range(2):
        _, _, err = tokbench_command("run", *QUICK, "--fresh", "--out", "a b")
    assert err.endswith(" --schedule 8 --out 'a b' --out 'a b-2'\n")
    (tmp_path / "grid.toml").touch()
    _, _, err = tokbench_command("run", *QUICK, "--out", "c", "--", "grid.toml")
    assert err.endswith(" --schedule 8 --out c -- grid.toml\n")
    _, _, err = tokbench_command("run", *QUICK, "--out", "c", "--fresh", "--", "grid.toml")
    assert err.endswith(" --schedule 8 --out c --out c-2 -- grid.toml\n")


def test_an_interrupt_amid_a_frame_gives_the_terminal_back():
    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=True)
    with progress.LiveProgress(console) as live, console:
        live.abandon()
        assert console.file.getvalue().endswith("\x1b[?25h")  # the cursor is shown
        assert not hasattr(sys.stderr, "rich_proxied_file")


def test_dry_run_names_the_cells_and_writes_nothing(tokbench_command, source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ("run", "--model", "tiny", "--method", "topk", "--schedule", "keep:0.7@1", "--dry-run", "--data")
    code, out, err = tokbench_command(*words, "bundled")
    assert code == 0 and not err and "tiny/topk/keep:0.7@1" in out and re.search(r"^About [\d.]+ \w+", out, re.M)
    assert not list(tmp_path.iterdir())
    code, _, err = tokbench_command(*words, "my_imags")
    assert code == 2 and "data folder 'my_imags' does not exist" in err
    assert tokbench_command(*words, "my_imags", "--only", "flops")[0] == 0


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["runn"], ["'runn'", "'run'"]),
        (["run", "--methd", "tome"], ["--methd", "--method"]),
        (["run", "--method", "tme"], ["'tme'", "'tome'"]),
        (["run", "--method", "tome:prop=1"], ["'prop'", "'prop_attn'"]),
        (["run", "--schedule", "constant:x"], ["'constant:x'", "'x'"]),
        (["run", "--method", "tome", "--schedule", "list:" + "9" * 5000], ["whole number of tokens"]),
        (["run", "--max-bad", "101"], ["max_bad", "at most 100"]),
        (["run", "--schedule", "kep:0.7@3"], ["'kep'", "'keep'"]),
        (["run", "--model", "deit_smal_patch16_224"], ["'deit_smal_patch16_224'", "'deit_small_patch16_224"]),
        (["run", "--model", "resnet50"], ["'resnet50'"]),
        (["run", "--model", "bundled", "--checkpoint", "nowhere.pth"], ["'nowhere.pth'", "does not exist"]),
        (["run", "--model", "a", "--model", "b", "--checkpoint", "x"], ["--checkpoint", "exactly one"]),
        (["run", "nowhere.toml"], ["nowhere.toml", "No such file"]),
        (["run", "--batch-size", "0"], ["batch_size", "at least 1"]),
        (["run", "--batch-size", "many"], ["batch_size", "'many'"]),
        (["run", "--limit", "0"], ["limit", "at least 1"]),
        (["run", "--limit", "ten"], ["--limit", "whole number"]),
        (["run", "--readers", "-1"], ["readers"]),
        (["run", "--dtype", "fp8"], ["dtype", "'fp8'"]),
        (["run", "--device", "gpu"], ["'gpu'"]),
        (["run", "--only", "foo"], ["only", "'foo'"]),
        (["run", "--data", ""], ["data"]),
        (["plot"], ["RUN"]),
        (["plot", "nowhere"], ["nowhere"]),
        (["table", "nowhere"], ["nowhere"]),
        (["report", "nowhere"], ["nowhere"]),
        (["show", "nowhere.png"], ["nowhere.png", "does not exist"]),
        (["show", "bundled:0"], ["bundled:1 to bundled:10000"]),
        (["show", "bundled:1", "--method", "none"], ["nothing to show"]),
        (["show", "bundled:1", "--out", "a.gif"], ["png, svg, pdf"]),
        (["report", "nowhere", "--out", "page.pdf"], ["page.html"]),
        (["list"], ["models|methods|schedules|data"]),
        (["list", "method"], ["'method'", "Did you mean 'methods'"]),
        (["list", "methods", "tome"], ["'tome'", "only models"]),
        (["pick", "run", "--max-drop", "abc"], ["--max-drop must be a number, not 'abc'"]),
        (["run", "--limit", "1.5"], ["--limit must be a whole number, not '1.5'"]),
    ],
)
def test_wrong_input_is_one_line_and_2(tokbench_command, monkeypatch, tmp_path, words, parts):
    monkeypatch.chdir(tmp_path)
    code, out, err = tokbench_command(*words)
    assert code == 2
    assert err.startswith("tokbench: ") and err.endswith("\n") and err.count("\n") == 1
    for part in parts:
        assert part in err
    assert not list(tmp_path.iterdir())


def test_wrong_metric_format_or_column_is_one_line_and_2(tokbench_command, source, tmp_path):
    run = tmp_path / "run"
    assert tokbench_command("run", *QUICK, "--only", "flops,accuracy", "--out", run)[0] == 0
    for words, part in [
        (["plot", run, "--x", "gflop"], "'gflops'"),
        (["plot", run, "--y", "top"], "'top1'"),
        (["plot", run, "--format", "jpg"], "png"),
        (["plot", run, "--format", "pdf", "--out", tmp_path / "a.svg"], "contradict each other"),
        (["table", run, "--format", "html"], "'html'"),
        (["table", run, "--sort", "speed"], "'speed"),
        (["table", run, "--filter", "method"], "COLUMN=VALUE"),
        (["plot", run, "--size", "papre"], "'paper'"),
        (["plot", run, "--theme", "black"], "light, dark"),
        (["plot", run, "--published"], "no paper printed top1"),
        (["run", *QUICK, "--dtype", "bf16", "--out", run], "dtype was fp32 and is bf16"),
        (["run", *QUICK, "--out", run.parent], "not empty"),
    ]:
        code, _, err = tokbench_command(*words)
        assert (code, err.count("\n")) == (2, 1), words
        assert part in err


def test_lists(tokbench_command):
    for what, word in {"methods": "tome", "schedules": "linear:13,-1", "data": "wds/", "models": "bundled"}.items():
        code, out, _ = tokbench_command("list", what)
        assert code == 0 and word in out
    code, out, _ = tokbench_command("list", "models", "deit3_small")
    assert code == 0 and out.split() and all("deit3_small" in name for name in out.split())


def test_version_and_help(tokbench_command):
    assert tokbench_command("--version") == (0, f"tokbench {tokbench.__version__}\n", "")
    for words in ([], ["--help"], ["-h"]):
        code, out, _ = tokbench_command(*words)
        assert code == 0 and "Commands" in out
    code, out, _ = tokbench_command("run", "--help")
    assert code == 0 and "--checkpoint" in out and "(default: auto)" in out


HEAVY = {"torch", "timm", "pandas", "numpy", "matplotlib", "scipy"}


def test_what_only_tells_imports_nothing_heavy(tmp_path):  # of runs: tests/test_folder.py
    commands = ["--help", "list methods", "list schedules", "list data"]
    code = f"""
import sys
from tokbench.cli import main
for words in {commands}:
    sys.argv = ["tokbench", *words.split()]
    try:
        main()
    except SystemExit as end:
        print(words, end.code or 0, {HEAVY} & set(sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines() == [f"{words} 0 set()" for words in commands]


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "tokbench", "run", "--only", "foo"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert (
        done.stderr
        == "tokbench: only[0]: unknown word 'foo'; use 'flops', 'accuracy' or 'speed'. Did you mean 'flops'?\n"
    )


@pytest.mark.parametrize("words", [("run", "--out"), ("run", "--fresh", "--out"), ("run", "--plugin"), ("table",)])
def test_a_name_too_long_for_the_system_is_one_line(tokbench_command, words):
    code, out, err = tokbench_command(*words, "n" * 300)
    assert (code, out, err.count("\n")) == (2, "", 1) and "File name too long" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "tokbench", "list", "schedules"], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert done.returncode == 3
    assert done.stderr == b"tokbench: cannot write the output: No space left on device\n"


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (("run", "--method", "ToMe", "--schedule", "8", "--dry-run"), 0, "bundled/tome/8"),
        (("run", "--schedule", "13,16", "--dry-run"), 2, "--schedule 13 --schedule 16"),
        (("list", "models", "resnet999"), 2, "no model is called 'resnet999'"),
        (("list", "models", "deit_tny"), 2, "'deit_tiny"),
    ],
)
def test_what_a_user_means_is_understood_or_answered(tokbench_command, source, words, code, part):
    found, out, err = tokbench_command(*words)
    assert found == code and part in (err if code else out) and err.count("\n") == (code == 2)


def test_readers_may_be_called_workers_for_a_release(tokbench_command):
    code, _, err = tokbench_command("run", "--workers", "-2")
    warning, refusal = err.splitlines()
    assert warning == "tokbench: --workers is called --readers now; the next release no longer takes the old name"
    assert code == 2 and "readers" in refusal
    assert "--workers" not in tokbench_command("run", "--help")[1]


def test_a_metric_may_be_called_by_its_column(tokbench_command, source, tmp_path):
    run = tmp_path / "run"
    assert tokbench_command("run", *QUICK, "--out", run)[0] == 0
    assert tokbench_command("table", run, "--sort", "latency_ms")[0] == 0
    assert tokbench_command("plot", run, "--x", "latency_ms", "--out", tmp_path / "x.svg")[0] == 0
    code, _, err = tokbench_command("pick", run, "--max-drop", "-1")
    assert code == 2 and "--max-drop must be a number of 0 or more, not -1" in err
    code, _, err = tokbench_command("table", run, "--filter", "drp<1")
    assert code == 2 and err.count("'drop'") == 1


@pytest.mark.draws
def test_without_answers_the_plot_sets_flops_against_speed(tokbench_command, source, tmp_path):
    run = tmp_path / "run"
    code, out, err = tokbench_command("run", *QUICK, "--only", "flops,speed", "--out", run)
    assert (code, err) == (0, "") and (run / "pareto.png").is_file() and out.rstrip().endswith("pareto.png")


def test_a_closed_output_and_a_folder_that_is_gone_are_no_traceback(tmp_path):
    table = f"{sys.executable} -m tokbench table {Path(__file__).parents[1] / 'results' / 'reference'}"
    gone = f"mkdir {tmp_path}/gone && cd {tmp_path}/gone && rmdir {tmp_path}/gone && {table}"
    for shell, words in ((f"{table} >&-", ""), (gone, "tokbench: the current folder no longer exists")):
        done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, check=False)
        assert words in done.stderr and done.stderr.count("\n") <= 1
