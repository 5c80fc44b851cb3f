"""Runtimes as an axis of speed: each cell in each of them, compared within each, and against eager PyTorch."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_run import changed, make_run
from stand_ins import Listener, Source, plain_records, small_grid, stand_in, tiny_model
from torch import nn

import tokbench
from tokbench import UserError
from tokbench.config import MethodSpec, RunOptions
from tokbench.exporting import runtimes, writing
from tokbench.report.findings import findings
from tokbench.report.pick import pick_cells
from tokbench.report.plots import plot_run
from tokbench.report.tables import render_table
from tokbench.results.cell import Setting
from tokbench.results.records import make_record
from tokbench.results.table import cells_of, comparable, load_cells, pareto_front
from tokbench.running import fresh, runner, timing

TOME = MethodSpec("tome", ("8",))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run in two real runtimes, and what was told meanwhile."""
    patch = pytest.MonkeyPatch()
    stand_in(patch, Source())
    patch.setattr(runner, "load_model", lambda *_, **__: tiny_model(depth=1))  # exporting takes seconds a block
    grid = small_grid(TOME, runtimes=("openvino", "onnxruntime", "eager"), check_answers=True, rounds=6)
    folder, listener = tmp_path_factory.mktemp("runtimes") / "run", Listener()
    runner.run(grid, folder, progress=listener)
    patch.undo()
    return SimpleNamespace(folder=folder, grid=grid, told=listener)


def test_every_cell_is_timed_in_every_runtime_against_the_unreduced_model_there(measured):
    speeds = [record for record in plain_records(measured.folder) if record["kind"] == "speed"]
    assert [(own["runtime"], own["method"]) for own in speeds] == [
        (runtime, method) for runtime in ("eager", "onnxruntime", "openvino") for method in ("none", "tome")
    ]
    by = {(own["runtime"], own["method"]): own for own in speeds}
    for (runtime, _), own in by.items():
        there, eager = (np.array(by[name, "none"]["seconds"]) for name in (runtime, "eager"))
        assert own["speedup"] == pytest.approx(np.median(there / own["seconds"]))
        assert own["threads"] == torch.get_num_threads()
        if runtime == "eager":
            assert not own.keys() & {"runtime_speedup", "same_answers", "compared_images"} and own["provider"] is None
        else:
            assert own["runtime_speedup"] == pytest.approx(np.median(eager / there))
            assert (own["same_answers"], own["compared_images"]) == (1, 24)
    assert all(len(by[runtime, "tome"]["free_seconds"]) == 6 for runtime in ("eager", "onnxruntime", "openvino"))
    assert {by[name, "tome"]["provider"] for name in ("onnxruntime", "openvino")} == {"CPUExecutionProvider", "CPU"}
    assert by["eager", "none"]["attention_kernels"] and not by["openvino", "none"]["attention_kernels"]
    manifest = json.loads((measured.folder / "manifest.json").read_text())
    assert manifest["conditions"]["runtimes"] == ["eager", "onnxruntime", "openvino"]
    assert {"onnx", "onnxruntime", "openvino"} <= manifest["packages"].keys()
    assert not measured.told.warnings and ("phase", "tiny: exporting", 6) in measured.told.told


def test_speeds_of_different_runtimes_stay_apart_in_all_that_is_shown(measured, tmp_path):
    cells = load_cells([measured.folder])
    names = [cell.id for cell in cells]
    assert names[:3] == ["tiny/none in eager", "tiny/tome/8 in eager", "tiny/none in onnxruntime"] and len(names) == 6
    assert [[cell.runtime for cell in group] for group in comparable(cells)] == [
        [name] * 2 for name in ("eager", "onnxruntime", "openvino")
    ]
    assert len({cell.runtime for cell in pareto_front(cells, "throughput", "top1")}) == 3
    assert [" in " + name in found.title or name in found.title for found, name in zip(
        findings(cells), ("eager", "onnxruntime", "openvino"), strict=True
    )] == [True] * 3  # fmt: skip
    head, *rows = [line.split("|") for line in render_table(cells, "md").splitlines() if line.startswith("|")]
    place = [text.strip() for text in head].index("Runtime")
    assert [row[place].strip() for row in rows if "tome" in row[1]] == ["eager", "onnxruntime", "openvino"]
    assert "| Runtime × |" in render_table(cells, "md") and "| As eager % |" in render_table(cells, "md")
    assert [row["runtime"] for row in json.loads(render_table(cells, "json"))][::2] == [
        "eager",
        "onnxruntime",
        "openvino",
    ]
    assert "runtime_speedup" in render_table(cells, "csv") and "openvino" in render_table(cells, "tex")
    assert len(render_table(cells, "csv", filters=["runtime=openvino"]).splitlines()) == 3
    assert plot_run(cells, tmp_path / "all.png", print)
    picks = pick_cells(measured.folder, max_drop=50)
    assert [[word for word in ("eager", "onnxruntime", "openvino") if word in own.title] for own in picks] == [
        ["eager"], ["onnxruntime"], ["openvino"]
    ]  # fmt: skip
    assert [note for own in picks for note in own.notes if note.startswith("speed is that of")] == [
        f"speed is that of {name}: export it, and run the file there" for name in ("onnxruntime", "openvino")
    ]


def opened(model, name, files):
    """In place of a runtime: the model itself, in other clothes."""
    return model if name == "eager" else writing.Opened(model, model)


def test_a_run_goes_on_with_the_runtime_and_the_answers_that_it_lacks(source, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "in_runtime", opened)
    grid = small_grid(TOME, runtimes=("eager", "openvino"), only=("speed",))
    runner.run(grid, tmp_path / "run")
    path = tmp_path / "run" / "records.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    runner.run(grid, tmp_path / "run")
    speeds = plain_records(tmp_path / "run")
    assert [(own["runtime"], own["method"]) for own in speeds] == [
        ("eager", "none"), ("eager", "tome"), ("openvino", "none"), ("openvino", "tome")
    ]  # fmt: skip
    assert "reference_seconds" in speeds[-1] and "reference_seconds" not in speeds[1]
    asked = replace(grid, options=replace(grid.options, check_answers=True))
    runner.run(asked, tmp_path / "run")
    again = plain_records(tmp_path / "run")[4:]
    assert [(own["method"], own["same_answers"]) for own in again] == [("none", 1), ("tome", 1)]
    with pytest.raises(UserError, match="runtime was eager, openvino and is eager"):
        runner.run(replace(grid, options=replace(grid.options, runtimes=("eager",))), tmp_path / "run")


def test_each_runtime_is_timed_at_each_batch_size(source, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "in_runtime", opened)
    grid = small_grid(TOME, runtimes=("eager", "openvino"), only=("speed",))
    runner.run(replace(grid, options=replace(grid.options, batch_size=(2, 1))), tmp_path / "run")
    assert [cell.at for cell in load_cells([tmp_path / "run"])[::2]] == [
        Setting(1, "eager"), Setting(1, "openvino"), Setting(2, "eager"), Setting(2, "openvino")
    ]  # fmt: skip


def refusing(*refused):
    def make(model, name, files):
        cell = "tome" if hasattr(model, "fusion") and model.fusion.method.name == "tome" else "none"
        if (cell, name) in refused:
            raise RuntimeError(f"no {cell} here")
        return opened(model, name, files)

    return make


def test_what_a_runtime_cannot_do_fails_there_alone(source, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "in_runtime", refusing(("tome", "openvino")))
    grid = small_grid(TOME, MethodSpec("topk", ("8",)), runtimes=("eager", "openvino"), only=("speed",))
    table = runner.run(grid, tmp_path / "run").set_index("cell")
    assert table["error"].dropna().to_dict() == {"tiny/tome/8 in openvino": "RuntimeError: no tome here"}
    assert table["speedup"].notna().sum() == 5
    (failure,) = [record for record in plain_records(tmp_path / "run") if record["kind"] == "failure"]
    assert (failure["phase"], failure["runtime"]) == ("speed", "openvino")
    monkeypatch.setattr(timing, "in_runtime", opened)
    assert runner.run(grid, tmp_path / "run")["error"].isna().all()


def test_without_the_unreduced_model_a_runtime_has_no_speedups(source, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "in_runtime", refusing(("none", "openvino")))
    listener = Listener()
    grid = small_grid(TOME, runtimes=("eager", "openvino"), only=("speed",))
    table = runner.run(grid, tmp_path / "run", progress=listener)
    assert set(table["runtime"][table["speedup"].notna()]) == {"eager"}
    assert listener.warnings == [
        "tiny: the unreduced model failed in openvino, and there is nothing to compare its cells there with"
    ]
    monkeypatch.setattr(timing, "in_runtime", refusing(("none", "openvino"), ("none", "eager")))
    table = runner.run(small_grid(TOME, runtimes=("openvino",), only=("speed",)), tmp_path / "other")
    assert table["speedup"].isna().all() and set(table["error"].dropna()) == {"RuntimeError: no none here"}


def test_fresh_processes_time_in_every_runtime_too(source, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "in_runtime", refusing(("tome", "openvino")))
    monkeypatch.setattr(fresh, "in_process", lambda job, tell: fresh.work(job, tell))
    grid = small_grid(TOME, runtimes=("eager", "openvino"), check_answers=True, only=("speed",), processes=2, rounds=6)
    table = runner.run(grid, tmp_path / "run").set_index("cell")
    assert table["error"].dropna().to_dict() == {"tiny/tome/8 in openvino": "RuntimeError: no tome here"}
    assert table.loc["tiny/none in openvino", "same_answers"] == 100 and table["speedup"].notna().sum() == 3


class Contrary(nn.Module):
    """Gives the other answer to every second image."""

    def __init__(self, model):
        super().__init__()
        self.model, self.shown = model, 0

    def forward(self, images):
        sign = torch.ones(len(images), 1)
        sign[::2] = -1
        return self.model(images) * sign


def test_answers_are_compared_with_those_of_the_same_cell_in_eager(source, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "in_runtime", lambda model, name, files: Contrary(model) if name != "eager" else model)
    grid = small_grid(TOME, runtimes=("onnxruntime",), check_answers=True, only=("speed",))
    table = runner.run(grid, tmp_path / "run")
    assert list(table["same_answers"]) == [50, 50] and table["runtime_speedup"].isna().all()


def test_records_of_older_runs_were_timed_eager_or_compiled(tmp_path):
    folder = make_run(tmp_path / "run")
    fields = json.loads((folder / "records.jsonl").read_text().splitlines()[2])
    del fields["runtime"]
    for compiled, runtime in ((None, "eager"), (False, "eager"), (True, "compile")):
        (cell,) = cells_of([make_record(fields | {"compiled": compiled})])
        assert cell.runtime == runtime and cell.id == fields["cell"]


def test_runs_of_other_runtimes_are_never_compared(tmp_path):
    cells = load_cells([make_run(tmp_path / "run")])
    both = cells + changed(cells, runtime="onnxruntime", run="other")
    assert len(comparable(both)) == 2
    assert "Runs: run (eager), other (onnxruntime)." in render_table(both, "md")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--runtime", "onnxrutime"], r"unknown runtime 'onnxrutime'; use eager, .* Did you mean 'onnxruntime'\?"),
        (["--runtime", ""], r"unknown runtime ''"),
        (["--runtime", "eager", "--compile"], r"--compile and --runtime contradict each other"),
        (["--runtime", "tensorrt"], r"runtime 'tensorrt' computes on cuda, and the device here is cpu"),
        (["--runtime", "onnxruntime", "--dtype", "bf16"], r"runtime 'onnxruntime' takes fp32 or fp16, not bf16"),
        (["--check-answers"], r"check_answers compares what is timed in other runtimes"),
        (["--check-answers", "--runtime", "openvino", "--only", "flops"], r"name some, and speed in `only`"),
    ],
)
def test_wrong_words_are_told_in_a_line(words, told, tmp_path, tokbench_command):
    code, _, err = tokbench_command("run", "--device", "cpu", "--out", tmp_path / "run", *words)
    assert code == 2 and err.count("\n") == 1 and not (tmp_path / "run").exists()
    assert re.search(told, err), err


@pytest.mark.parametrize(
    ("runtime", "package", "extra"),
    [
        ("onnxruntime", "onnxruntime", "onnx"),
        ("openvino", "openvino", "openvino"),
        ("openvino", "onnxscript", "openvino"),
    ],
)
def test_a_missing_package_is_named_with_the_pip_line(runtime, package, extra, monkeypatch):
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None if name == package else name)
    told = rf"^runtime '{runtime}' needs {package}: pip install 'tokbench\[{extra}\]'$"
    with pytest.raises(UserError, match=told):
        runtimes.require_runtimes([runtime], torch.device("cpu"), "fp32")


def test_a_gpu_needs_the_build_that_computes_on_it(monkeypatch):
    """As on a machine with a GPU, and ONNX Runtime for the CPU."""
    with pytest.raises(UserError, match="runtime 'openvino' computes on cpu, and the device here is cuda"):
        runtimes.require_runtimes(["openvino"], torch.device("cuda"), "fp32")
    for name, provider in (("onnxruntime", "CUDA"), ("tensorrt", "Tensorrt")):
        with pytest.raises(
            UserError, match=f"'{name}' needs .* {provider}ExecutionProvider.*: pip install onnxruntime-gpu"
        ):
            runtimes.require_runtimes([name], torch.device("cuda"), "fp16")


def test_options_say_the_same_by_flag_by_file_and_in_old_manifests(tmp_path):
    grid = tokbench.Grid.from_flags(runtimes="openvino, eager", batch_size="1,8")
    assert grid.options.runtimes == ("eager", "openvino")
    assert grid.options.settings == [
        Setting(1, "eager"), Setting(1, "openvino"), Setting(8, "eager"), Setting(8, "openvino")
    ]  # fmt: skip
    assert "timed in eager, openvino" in grid.describe()
    compiled = RunOptions(compile=True)
    assert compiled.runtimes == ("compile",) and replace(compiled, dtype="fp16").runtimes == ("compile",)
    file = Path(tmp_path, "grid.toml")
    file.write_text("[options]\nruntimes = ['eager', 'onnxruntime']\n")
    read = tokbench.Grid.from_toml(file)
    assert read.options.runtimes == ("eager", "onnxruntime")
    assert tokbench.Grid.from_flags(read, compile=True).options == replace(read.options, runtimes=("compile",))
    assert tokbench.Grid.from_dict(read.to_dict()) == read
    assert tokbench.Grid.from_dict({"options": {"compile": True}}).options == compiled
    with pytest.raises(UserError, match="compile and runtimes contradict each other"):
        RunOptions(compile=True, runtimes=("openvino",))
