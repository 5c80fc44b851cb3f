"""The runner on a tiny model: what is measured, in what order, what is written, and what a failure does."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import signal
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from made_run import changed
from stand_ins import CLASSES, IMAGES, Listener, Source, plain_records, small_grid, stand_in, tiny_model
from timm.models.vision_transformer import VisionTransformer

from tokbench import resolve
from tokbench.check.compare import check
from tokbench.config import Grid, MethodSpec, ModelSpec, PlannedCell, RunOptions
from tokbench.data import load_batches
from tokbench.data.labels import DataWarning
from tokbench.errors import RunStopped, UserError
from tokbench.exporting import writing
from tokbench.fusion.core import METHODS, Method
from tokbench.fusion.patch import tokens_per_block
from tokbench.measure import accuracy, environment, speed
from tokbench.measure.environment import Disturbance
from tokbench.measure.flops import FlopCount, count_flops
from tokbench.measure.speed import SpeedResult
from tokbench.report.findings import findings
from tokbench.report.pick import pick_cells
from tokbench.report.plots import plot_pareto
from tokbench.report.tables import render_table
from tokbench.results.folder import RunFolder
from tokbench.results.predictions import Predictions
from tokbench.results.table import load_cells
from tokbench.running import answers, bench, figures, fresh, runner, timing

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def broken_method(monkeypatch):
    """Register a method whose plan raises on batches of more than `most` images."""

    def register(most: int) -> str:
        class Broken(Method):
            name = "broken"

            def plan(self, view, r):
                if view.x.shape[0] > most:
                    raise RuntimeError("it broke\nin two lines")
                return METHODS["random"]().plan(view, r)

        monkeypatch.setitem(METHODS, "broken", dataclasses.dataclass(frozen=True)(Broken))
        return "broken"

    return register


@pytest.mark.draws
def test_a_run_measures_every_cell_and_writes_records_in_order(source, tmp_path):
    listener = Listener()
    table = runner.run(small_grid(), tmp_path / "run", progress=listener)
    folder = RunFolder.open(tmp_path / "run")
    records = plain_records(folder.path)
    cells = ["tiny/none", "tiny/tome/8", "tiny/random/8"]
    assert [(r["kind"], r["cell"]) for r in records] == [
        (kind, cell) for kind in ("flops", "accuracy", "speed") for cell in cells
    ]
    assert list(table["cell"]) == cells
    assert table[["gflops", "top1", "throughput", "speedup", "agreement", "drop"]].notna().all(axis=None)
    assert folder.manifest.plain()["grid"]["options"]["batch_size"] == 10
    assert {"machine", "packages", "started"} <= folder.manifest.plain().keys()
    assert (tmp_path / "run" / "pareto.png").stat().st_size > 10_000
    assert listener.told[-1] == ("finished", 3, ["pareto.png"])
    assert not listener.warnings


def test_every_record_says_what_was_measured_and_under_which_conditions(source, tmp_path):
    runner.run(small_grid(MethodSpec("tome", ("linear:8,-1",), {"prop_attn": False})), tmp_path / "run")
    records = plain_records(tmp_path / "run")
    for record in records[1::2]:
        assert record["cell"] == "tiny/tome:prop_attn=false/linear:8,-1"
        assert record["params"] == {"prop_attn": False}
        assert record["resolved"] == "linear:8,-1"
        assert record["tokens"] == [49, 39, 34, 34]
    for record in records:
        assert record["input_size"] == [3, 32, 32]
        assert (record["data"], record["data_fingerprint"]) == ("blobs", "f" * 64)
        assert (record["dtype"], record["device"], len(record["weights_sha256"])) == ("fp32", "cpu", 64)
    assert records[0]["tokens"] == [65] * 4
    assert records[1]["flops_ratio"] == records[1]["flops"] / records[0]["flops"] < 1


def test_accuracy_is_one_pass_over_the_images(source, tmp_path):
    runner.run(small_grid(only=("accuracy",)), tmp_path / "run")
    assert source.read == list(range(IMAGES))


def test_predictions_lie_beside_the_records_and_agree_with_them(source, tmp_path):
    runner.run(small_grid(only=("accuracy",)), tmp_path / "run")
    folder = RunFolder.open(tmp_path / "run")
    for record in plain_records(folder.path):
        predictions = Predictions.load(folder.prediction_path(record["cell"]))
        assert len(predictions.label) == record["images"] == IMAGES
        assert int(predictions.correct.sum()) == record["correct"]
    baseline = plain_records(folder.path)[0]
    assert (baseline["correct"], baseline["agreement"], baseline["drop"]) == (IMAGES, 1.0, 0.0)


@pytest.mark.parametrize(
    ("only", "kinds", "plots"),
    [
        (("flops",), {"flops"}, []),
        (("accuracy",), {"accuracy"}, []),
        (("accuracy", "flops"), {"flops", "accuracy"}, ["pareto.png"]),
        (("flops", "speed"), {"flops", "speed"}, ["pareto.png"]),
    ],
)
@pytest.mark.draws
def test_only_what_is_asked_for_is_measured(source, tmp_path, only, kinds, plots):
    listener = Listener()
    runner.run(small_grid(only=only), tmp_path / "run", progress=listener)
    assert {record["kind"] for record in plain_records(tmp_path / "run")} == kinds
    assert listener.told[-1][2] == plots
    assert bool(source.read) == ("accuracy" in only)


def test_cells_share_one_copy_of_the_weights(source, tmp_path, monkeypatch):
    seen = {}
    real = answers.evaluate
    monkeypatch.setattr(answers, "evaluate", lambda models, *a, **k: seen.update(models) or real(models, *a, **k))
    runner.run(small_grid(only=("accuracy",)), tmp_path / "run")
    storages = [{p.data_ptr() for p in model.parameters()} for model in seen.values()]
    assert len(storages) == 3
    assert storages[0] == storages[1] == storages[2]


def test_flops_schedules_are_resolved_to_what_runs(source, tmp_path):
    runner.run(small_grid(MethodSpec("tome", ("flops:0.6",)), only=("flops",)), tmp_path / "run")
    record = plain_records(tmp_path / "run")[1]
    assert record["schedule"] == "flops:0.6"
    assert record["resolved"].startswith("list:")
    assert record["flops_ratio"] == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize("only", [("flops",), ("accuracy",)])
def test_the_unreduced_model_is_counted_once_for_all_cells(source, tmp_path, monkeypatch, only):
    counted = []
    for module in (bench, resolve):
        real = module.count_flops
        spy = lambda model, *size, real=real, **on: counted.append(hasattr(model, "fusion")) or real(model, *size, **on)  # noqa: E731
        monkeypatch.setattr(module, "count_flops", spy)
    grid = small_grid(MethodSpec("tome", ("flops:0.8",)), MethodSpec("topk", ("flops:0.6",)), only=only)
    runner.run(grid, tmp_path / "run")
    assert counted.count(False) == 1 and counted.count(True) >= 3


def test_reduced_precision_reaches_the_model(source, tmp_path):
    runner.run(small_grid(dtype="bf16", only=("accuracy", "speed")), tmp_path / "run")
    records = plain_records(tmp_path / "run")
    assert [r["kind"] for r in records] == ["accuracy"] * 3 + ["speed"] * 3
    assert {r["dtype"] for r in records} == {"bf16"}


def test_several_models_are_measured_one_after_the_other(source, tmp_path):
    models = (ModelSpec("tiny"), ModelSpec("tiny", label="again"))
    table = runner.run(small_grid(models=models, only=("flops",)), tmp_path / "run")
    assert list(table["model"]) == ["tiny"] * 3 + ["again"] * 3
    assert table["is_baseline"].sum() == 2


@pytest.mark.parametrize(("most", "phase"), [(0, "setup"), (1, "accuracy")])
def test_a_cell_that_raises_is_recorded_and_the_others_go_on(source, tmp_path, broken_method, most, phase):
    grid = small_grid(MethodSpec(broken_method(most), ("8",)), MethodSpec("tome", ("8",)))
    table = runner.run(grid, tmp_path / "run")
    failure, *more = [r for r in plain_records(tmp_path / "run") if r["kind"] == "failure"]
    assert not more
    assert (failure["cell"], failure["phase"]) == ("tiny/broken/8", phase)
    assert failure["message"] == "RuntimeError: it broke"
    assert "in two lines" in failure["traceback"]
    rows = table.set_index("cell")
    assert rows.loc["tiny/broken/8", "error"] == "RuntimeError: it broke"
    assert rows.loc[["tiny/none", "tiny/tome/8"], "throughput"].notna().all()
    assert source.read == list(range(IMAGES))


def test_a_cell_that_raises_in_the_speed_measurement_only(source, tmp_path, broken_method):
    grid = small_grid(MethodSpec(broken_method(1), ("8",)), MethodSpec("tome", ("8",)), only=("flops", "speed"))
    runner.run(grid, tmp_path / "run")
    kinds = [(r["kind"], r["cell"]) for r in plain_records(tmp_path / "run")]
    assert kinds[-3:] == [("failure", "tiny/broken/8"), ("speed", "tiny/none"), ("speed", "tiny/tome/8")]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (MethodSpec("topk", ("keep:0.5@9", "keep:0.5@1")), "block 9 is not there"),
        (MethodSpec("topk", ("list:1,1,1,1,1",)), "has 5 entries.*4 blocks"),
        (MethodSpec("tofu", ("8",), {"prune_blocks": [0, 10**20]}), f"block {10**20} is not there; blocks are 0 to 3"),
        (MethodSpec("tofu", ("8",), {"prune_blocks": 5}), "prune_blocks=5; the model has 4 blocks"),
    ],
)
def test_a_block_that_is_not_there_is_refused_before_anything_is_measured(source, tmp_path, method, words):
    with pytest.raises(UserError, match=words):
        runner.run(small_grid(method), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_levels_that_whole_tokens_cannot_reach_are_said(source, tmp_path):
    listener = Listener()
    runner.run(small_grid(MethodSpec("topk", ("flops:0.05",)), only=("flops",)), tmp_path / "run", progress=listener)
    assert len(listener.warnings) == 1
    assert "tiny/topk/flops:0.05: topk at flops:0.05 takes 0." in listener.warnings[0]


def test_tofu_finds_its_pruning_blocks_on_the_first_images(source, tmp_path):
    runner.run(small_grid(MethodSpec("tofu", ("8",), {"prune_blocks": "auto"}), only=("flops",)), tmp_path / "run")
    _, record = plain_records(tmp_path / "run")
    assert record["params"] == {"prune_blocks": "auto"}
    assert record["calibrated"]["images"] == IMAGES and len(record["calibrated"]["prune_blocks"]) == 2


def test_the_speed_control_is_no_accuracy_row(source, tmp_path):
    table = runner.run(small_grid(MethodSpec("free", ("8",))), tmp_path / "run").set_index("cell")
    assert table["top1"].isna().to_dict() == {"tiny/none": False, "tiny/free/8": True}
    assert table["throughput"].notna().all() and table["gflops"].notna().all()


def test_without_the_unreduced_model_nothing_is_compared(source, tmp_path, monkeypatch):
    def refuse(models, *args, on_failure, **kwargs):
        on_failure("tiny/none", RuntimeError("out of memory"))

    monkeypatch.setattr(answers, "evaluate", refuse)
    listener = Listener()
    table = runner.run(small_grid(), tmp_path / "run", progress=listener)
    assert table.set_index("cell").loc["tiny/none", "error"] == "RuntimeError: out of memory"
    assert table["top1"].isna().all() and table["throughput"].isna().all() and table["gflops"].notna().all()
    assert len(listener.warnings) == 1 and "unreduced model failed" in listener.warnings[0]


def test_labels_that_do_not_match_are_said_loudly(source, tmp_path, monkeypatch):
    monkeypatch.setattr(Source, "__getitem__", lambda self, i: (torch.rand(3, 32, 32), i % CLASSES))
    with pytest.warns(UserWarning, match="chance level.*probably don't match"):
        runner.run(small_grid(only=("accuracy",)), tmp_path / "run")


def test_operators_without_a_count_are_said(source, tmp_path, monkeypatch):
    count = FlopCount(total=10, by_module={}, by_operator={}, unsupported={"aten::fft": 2})
    monkeypatch.setattr(bench, "count_flops", lambda model, size, **on: count)
    with pytest.warns(UserWarning, match="too low: no count is known for fft"):
        runner.run(small_grid(only=("flops",)), tmp_path / "run")


def test_an_interrupted_run_keeps_what_was_measured(source, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "measure_speed", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        runner.run(small_grid(), tmp_path / "run")
    kinds = [record["kind"] for record in plain_records(tmp_path / "run")]
    assert kinds == ["flops"] * 3 + ["accuracy"] * 3


def test_bad_input_measures_nothing_and_leaves_no_folder(source, tmp_path, monkeypatch):
    def unknown(name, checkpoint, input_size):
        raise UserError(f"unknown model '{name}'")

    monkeypatch.setattr(runner, "load_model", unknown)
    with pytest.raises(UserError, match="unknown model 'tiny'"):
        runner.run(small_grid(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_never_overwrites_another(source, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").touch()
    with pytest.raises(UserError, match="not empty"):
        runner.run(small_grid(), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious"]


def test_from_python_a_run_prints_nothing_and_names_its_own_folder(source, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.toml").write_text(
        "[[models]]\nname = 'tiny'\n[[methods]]\nname = 'tome'\nschedules = ['8']\n"
        "[options]\ndevice = 'cpu'\nbatch_size = 10\n"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = runner.run(tmp_path / "grid.toml")
    assert capfd.readouterr() == ("", "")
    assert (tmp_path / "results" / table["run"].unique().item() / "manifest.json").is_file()


def test_progress_counts_cells_images_and_rounds(source, tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "FETCH_SECONDS", 0)
    listener = Listener()
    runner.run(small_grid(), tmp_path / "run", progress=listener)
    told = [event for event in listener.told if event[0] != "finished"]
    assert told[:4] == [("phase", "tiny: counting FLOPs", 3), ("advance", 1), ("advance", 2), ("advance", 3)]
    assert told[4:8] == [("phase", "tiny: accuracy", IMAGES), ("advance", 10), ("advance", 20), ("advance", 24)]
    # Three cells on a batch and on one image, and the speed limit that two of them share.
    warm = [("phase", "tiny: warming up for speed", 7), *(("advance", done) for done in range(1, 8))]
    assert told[8:18] == [*warm, ("phase", "tiny: speed", speed.FEWEST_ROUNDS), ("advance", 1)]


def test_options_can_be_given_apart_from_the_grid(source, tmp_path):
    runner.run(small_grid(), tmp_path / "run", options=RunOptions(device="cpu", only=("flops",)))
    folder = RunFolder.open(tmp_path / "run")
    assert {record["kind"] for record in plain_records(folder.path)} == {"flops"}
    assert folder.manifest.plain()["grid"]["options"]["only"] == ["flops"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("name", ["cuda", "cuda:3"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(UserError, match=f"'{name}'.*no CUDA device"):
        runner.find_device(name)


@pytest.mark.gpu
def test_a_gpu_that_is_not_there():
    with pytest.raises(UserError, match="counted from cuda:0"):
        runner.find_device("cuda:99")


@pytest.mark.gpu
def test_a_run_on_the_gpu(source, tmp_path):
    grid = small_grid()
    options = RunOptions(device="cuda", dtype="fp16", batch_size=10)
    table = runner.run(grid, tmp_path / "run", options=options)
    assert table["error"].isna().all() and table["throughput"].notna().all()
    assert set(table["device"]) == {"cuda"} and table["machine"].notna().all()


def predictions(right: int, wrong: int, classes: int = 10) -> Predictions:
    n = right + wrong
    label = np.arange(n) % classes
    predicted = np.where(np.arange(n) < right, label, (label + 1) % classes)
    return Predictions(label, predicted, np.full(n, 0.5, np.float32), np.ones(n, bool))


def test_accuracy_figures_follow_from_the_predictions():
    fields = figures.accuracy_fields(predictions(60, 40), predictions(80, 20))
    assert (fields["images"], fields["correct"], fields["correct5"]) == (100, 60, 100)
    assert (fields["top1"], fields["top5"]) == (0.6, 1.0)
    assert fields["drop"] == pytest.approx(20) and fields["drop_low"] < 20 < fields["drop_high"]
    assert fields["agreement"] == pytest.approx(0.8)
    assert fields["mcnemar_p"] < 1e-4
    assert fields["top1_low"] < 0.6 < fields["top1_high"]


def test_intervals_end_where_the_mean_must():
    few = predictions(3, 0)
    near = np.array([0.9, 0.999, 0.999], np.float32)
    fields = figures.accuracy_fields(dataclasses.replace(few, divergence=1 - near), few)
    assert 0 == fields["kl_low"] < fields["kl"] < fields["kl_high"]
    fields = figures.accuracy_fields(dataclasses.replace(few, similarity=near, classifies=False), few)
    assert fields["similarity_low"] < fields["similarity"] < fields["similarity_high"] == 1
    fields = figures.accuracy_fields(dataclasses.replace(few, similarity=near * 0 + 1.0000001, classifies=False), few)
    assert fields["similarity_low"] <= fields["similarity"] <= fields["similarity_high"]  # rounded, it may be above 1


@pytest.mark.parametrize(
    ("right", "wrong", "chance"),
    [(0, 1000, True), (100, 900, True), (130, 870, False), (700, 300, False), (4, 4, False), (1, 9, True)],
)
def test_chance_level(right, wrong, chance):
    assert figures.at_chance_level(predictions(right, wrong), 10) is chance


def test_chance_level_when_one_class_or_no_label_is_there():
    rest = (np.full(100, 0.5, np.float32), np.ones(100, bool))
    one_class = Predictions(np.zeros(100, int), np.repeat([0, 1], [90, 10]), *rest)
    assert not figures.at_chance_level(one_class, 10)
    unlabelled = Predictions(np.full(100, -1), np.zeros(100, int), *rest)
    assert not figures.at_chance_level(unlabelled, 0)


def test_readers_of_images_follow_device_and_source(source, tmp_path):
    def workers(device: str, streaming: bool, asked: int | None) -> int:
        source.streaming = streaming
        return answers.readers(source, RunOptions(readers=asked), torch.device(device))

    assert workers("cpu", False, None) == 0
    assert workers("cuda", True, None) == 1
    assert 1 <= workers("cuda", False, None) <= 8
    assert workers("cpu", False, 3) == 3


def test_cell_names():
    assert PlannedCell("m", MethodSpec("none")).id == "m/none"
    assert PlannedCell("m", MethodSpec("tome", ("8",), {"prop_attn": False}), "8").id == "m/tome:prop_attn=false/8"


def test_a_folder_in_use_is_refused_before_any_model_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").touch()
    monkeypatch.setattr(runner, "load_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match="not empty"):
        runner.run(Grid(), tmp_path)


def test_each_cell_is_set_against_its_own_speed_limit(source, tmp_path):
    grid = small_grid(
        MethodSpec("tome", ("8",)), MethodSpec("tofu", ("8",)), MethodSpec("mctf", ("8", "0")), only=("speed",)
    )
    table = runner.run(grid, tmp_path / "run").set_index("cell")
    records = {r["cell"]: r for r in plain_records(tmp_path / "run") if r["kind"] == "speed"}
    assert len(records["tiny/tome/8"]["free_seconds"]) == len(records["tiny/tome/8"]["seconds"])
    # The same tokens at the same place are timed once; what removes nothing has no limit but itself.
    assert records["tiny/tome/8"]["free_seconds"] == records["tiny/tofu/8"]["free_seconds"]
    assert records["tiny/tome/8"]["free_seconds"] != records["tiny/mctf/8"]["free_seconds"]
    assert table["efficiency"].notna().to_dict() == {cell: cell.endswith("8") for cell in table.index}
    assert all(record["latency_p95_ms"] >= record["latency_ms"] > 0 for record in records.values())
    assert all(r["latency_low_ms"] <= r["latency_ms"] <= r["latency_high_ms"] for r in records.values())
    assert records["tiny/none"]["latency_ms"] == pytest.approx(
        1000 * np.median(records["tiny/none"]["latency_seconds"])
    )
    single = {cell: np.array(record["latency_seconds"]) for cell, record in records.items()}
    for cell, record in records.items():
        assert record["latency_speedup"] == pytest.approx(np.median(single["tiny/none"] / single[cell]))
        assert record["latency_speedup_low"] <= record["latency_speedup"] <= record["latency_speedup_high"]
    assert table.loc["tiny/none", "latency_speedup"] == 1


def test_flops_are_broken_down(source, tmp_path):
    runner.run(small_grid(MethodSpec("tome", ("8", "0")), only=("flops",)), tmp_path / "run")
    records = {r["cell"]: r for r in plain_records(tmp_path / "run")}
    parts = ("flops_attention", "flops_mlp", "flops_method", "flops_rest")
    for record in records.values():
        assert sum(record[part] for part in parts) == record["flops"]
    # 64 patches and a class token, width 24, 4 blocks: qkv and projection, scores and values.
    assert records["tiny/none"]["flops_attention"] == 4 * (4 * 65 * 24**2 + 2 * 65**2 * 24)
    assert records["tiny/none"]["flops_mlp"] == 4 * 8 * 65 * 24**2
    assert records["tiny/none"]["flops_method"] == records["tiny/tome/0"]["flops_method"] == 0
    # Every block compares half of its patches with the other half, by keys of 12 channels.
    tokens = [64, 56, 48, 40]
    assert records["tiny/tome/8"]["flops_method"] == sum((n // 2) ** 2 * 12 for n in tokens)


def test_what_makes_a_timing_worthless_is_warned_of_and_stays_in_its_records(source, tmp_path, monkeypatch):
    busy = "other work took 52% of the machine's CPU time"
    disturbed = Disturbance(0.52, None, (f"{busy}: time again",))
    monkeypatch.setattr(
        timing, "Watch", lambda device: SimpleNamespace(begin=lambda: None, look=lambda: None, stop=lambda: disturbed)
    )
    monkeypatch.setattr(timing, "vague_speedups", lambda fields: ["tiny/tome/8"])
    listener = Listener()
    runner.run(small_grid(only=("flops", "speed")), tmp_path / "run", progress=listener)
    assert listener.warnings[0] == f"{busy}: time again" and len(listener.warnings) == 2
    assert listener.warnings[1].startswith("1 of 2 speed-ups are known to no better than ±5 % (tiny/tome/8): ")
    caveats = {r["cell"]: r["caveats"] for r in plain_records(tmp_path / "run") if r["kind"] == "speed"}
    assert caveats == {"tiny/none": [busy], "tiny/tome/8": [busy, figures.VAGUE], "tiny/random/8": [busy]}
    cells = load_cells([tmp_path / "run"])
    told = [f"Speed is in doubt: {busy}.", f"Speed is in doubt: {figures.VAGUE} (1 of 3 cells)."]
    assert all(sentence in render_table(cells, "md") for sentence in told)
    assert all(sentence in findings(cells)[0].sentences for sentence in told)


def test_compilers_are_no_other_work(source, tmp_path, monkeypatch):
    told = []
    watch = SimpleNamespace(
        begin=lambda: told.append("begin"), look=lambda: told.append("look"), stop=lambda: Disturbance(0.0, None, ())
    )
    monkeypatch.setattr(timing, "Watch", lambda device: watch)
    runner.run(small_grid(MethodSpec("tome", ("8",)), only=("flops", "speed")), tmp_path / "run")
    first = told.index("look")
    assert first == 5 and set(told[first:]) == {"look"}  # two models, one limit, and two on single images


def test_threads_that_outnumber_the_cores_are_told_once_and_first(source, tmp_path, monkeypatch):
    for module in (runner, timing, environment):
        monkeypatch.setattr(module, "thread_warnings", lambda device: ["99 threads share 2 cores: set something"])
    monkeypatch.setattr(timing, "Watch", environment.Watch)
    monkeypatch.setattr(runner, "load_subject", lambda *args, real=runner.load_subject: loaded.append(1) or real(*args))
    loaded, listener = [], Listener()
    monkeypatch.setattr(listener, "warn", lambda text: listener.warnings.append((text, len(loaded))))
    runner.run(small_grid(only=("flops", "speed")), tmp_path / "run", progress=listener)
    assert [count for text, count in listener.warnings if text.startswith("99 threads")] == [0]
    speed = next(r for r in plain_records(tmp_path / "run") if r["kind"] == "speed")
    assert "99 threads share 2 cores" in speed["caveats"]


def test_speedups_are_vague_where_their_interval_is_wide_or_none_is_known():
    fields = {
        "wide": {"speedup": 1.5, "speedup_low": 1.4, "speedup_high": 1.6}, "none": {"speedup": 1.5},
        "sharp": {"speedup": 1.5, "speedup_low": 1.49, "speedup_high": 1.51},
    }  # fmt: skip
    assert figures.vague_speedups(fields) == ["wide", "none"]


def test_a_vague_speedup_says_how_long_it_takes_to_know_it():
    told = figures.vague_sentence({"a": 60, "b": 30, "c": 30, "d": 30}, 9, 20, 10.0, "rounds")
    assert told == (
        "4 of 9 speed-ups are known to no better than ±5 % (a, b, c and 1 more): "
        "about 20 seconds more would do, in a new run with --rounds 60"
    )
    assert figures.vague_sentence({"a": 5000}, 9, 20, 10.0, "rounds").endswith(": measure again on a quieter machine")
    noisy = [1.0, 1.3, 0.8, 1.1, 0.9, 1.2, 1.0, 0.7]
    reference, result = (SpeedResult("", 8, rounds, 1, 8.0, 1.0, 1.0, 1.0, []) for rounds in (noisy, [1.0] * 8))
    assert figures.needed_for_speedup({}, [result], [reference]) > 8
    over = {"speedup": 1.0, "speedup_low": 0.9, "speedup_high": 1.1}
    assert figures.needed_for_speedup(over, [result] * 3, [reference] * 3) in (12, 13)


def test_what_was_warned_of_labels_stays_with_the_run(tmp_path, monkeypatch):
    guessed = DataWarning("labels_guessed", "labels are guessed from the alphabetical order of 3 folders")
    images = Source()
    images.warnings = (guessed,)
    stand_in(monkeypatch, images)
    monkeypatch.setattr(Source, "__getitem__", lambda self, index: (torch.rand(3, 32, 32), index % CLASSES))
    listener = Listener()
    runner.run(small_grid(), tmp_path / "run", progress=listener)
    record = next(r for r in plain_records(tmp_path / "run") if r["kind"] == "accuracy")
    assert record["caveats"][0] == guessed.text and "which is chance level" in record["caveats"][1]
    cells = load_cells([tmp_path / "run"])
    drawn = plot_pareto(cells, tmp_path / "a.svg").read_text()
    (picked,) = pick_cells(tmp_path / "run", max_drop=100)
    checked = check(tmp_path / "run", tmp_path / "run")
    for text in record["caveats"]:
        for output in (render_table(cells, "md"), " ".join(findings(cells)[0].sentences), drawn, picked.text(),
                       "\n".join(checked.lines())):  # fmt: skip
            assert f"ccuracy is in doubt: {text}" in " ".join(output.split())


def test_logits_that_are_not_finite_are_counted_told_and_never_agree(source, tmp_path, monkeypatch):
    from tokbench.report.tables import render_table

    def poisoned(name, checkpoint, input_size):
        model = tiny_model()
        model.head.register_forward_hook(lambda m, i, out: out.index_fill(0, torch.tensor([0]), float("nan")))
        return model

    monkeypatch.setattr(runner, "load_model", poisoned)
    listener = Listener()
    table = runner.run(small_grid(only=("accuracy",)), tmp_path / "run", progress=listener)
    records = plain_records(tmp_path / "run")
    assert [record["nonfinite"] for record in records] == [3, 3, 3]  # the first image of each batch
    assert [record["correct"] for record in records] == [IMAGES - 3] * 3
    assert records[1]["agreement"] == (IMAGES - 3) / IMAGES
    assert sum("NaN or infinite logits for 3 of 24 images" in text for text in listener.warnings) == 3
    assert list(table["nonfinite"]) == [3, 3, 3]
    assert "tome 8: NaN or infinite logits for 3 images, which count as wrong" in render_table(
        load_cells([tmp_path / "run"]), "md"
    )


def test_a_cell_that_answers_with_nan_only_has_no_image_right(source, tmp_path, monkeypatch):
    class Lost(Method):
        name = "lost"

        def plan(self, view, r):
            weight = torch.full(view.x.shape[:2], float("nan"))
            return dataclasses.replace(METHODS["tome"]().plan(view, r), weight=weight)

    monkeypatch.setitem(METHODS, "lost", dataclasses.dataclass(frozen=True)(Lost))
    listener = Listener()
    grid = small_grid(MethodSpec("lost", ("8",)), only=("accuracy",))
    row = runner.run(grid, tmp_path / "run", progress=listener).set_index("cell").loc["tiny/lost/8"]
    assert row[["top1", "top5", "agreement", "drop", "nonfinite"]].tolist() == [0, 0, 0, 100, IMAGES]
    assert any("tiny/lost/8 gives NaN or infinite logits for 24 of 24" in text for text in listener.warnings)


def test_where_tokens_depend_on_the_image_all_is_measured_on_the_runs_images(source, tmp_path):
    runner.run(small_grid(MethodSpec("ats", ("keep:0.5@1",))), tmp_path / "run")
    records = {record.kind: record for record in RunFolder.open(tmp_path / "run").records()[1::2]}
    model = resolve.apply(tiny_model(), "ats", "keep:0.5@1")
    images = next(iter(load_batches(source, 8, workers=0))).images
    count = count_flops(model, images=images)
    with torch.inference_mode():
        model(images)
    assert set(records) == {"flops", "accuracy", "speed"}
    assert records["flops"].flops == count.total and records["flops"].plain().get("flops_spread", 0.0) == count.spread
    assert all(record.tokens == tokens_per_block(model) for record in records.values())


@pytest.fixture
def small_memory(monkeypatch):
    """Cells of that method have memory for so many images at a time."""

    def limit(method: str, most: int) -> None:
        make = bench.Bench.make

        def limited(self, cell, base, identity):
            runnable = make(self, cell, base, identity)
            if cell.method.name == method:
                runnable.model.register_forward_pre_hook(lambda m, inputs: guard(len(inputs[0])))
            return runnable

        def guard(images: int) -> None:
            if images > most:
                raise torch.OutOfMemoryError("out of memory")

        monkeypatch.setattr(bench.Bench, "make", limited)

    return limit


def test_out_of_memory_halves_the_batch_and_is_recorded(source, tmp_path, small_memory):
    plain = runner.run(small_grid(only=("accuracy",)), tmp_path / "plain")
    small_memory("tome", 3)
    table = runner.run(small_grid(), tmp_path / "run")
    assert table["error"].isna().all()
    assert list(table["top1"]) == list(plain["top1"])
    sizes = {(r["kind"], r["method"]): r["batch_size"] for r in plain_records(tmp_path / "run")[3:]}
    # Accuracy is each cell's own; speed is compared, so all cells get the size that fits them all.
    assert sizes == {
        ("accuracy", "none"): 10, ("accuracy", "tome"): 3, ("accuracy", "random"): 10,
        ("speed", "none"): 3, ("speed", "tome"): 3, ("speed", "random"): 3,
    }  # fmt: skip


def test_a_cell_without_memory_for_one_image_fails_alone(source, tmp_path, small_memory):
    small_memory("tome", 0)
    table = runner.run(small_grid(), tmp_path / "run")
    assert list(table["cell"][table["error"].notna()]) == ["tiny/tome/8"]
    assert table.set_index("cell").loc["tiny/tome/8", "error"] == "OutOfMemoryError: out of memory"
    assert table.set_index("cell").loc["tiny/random/8", "throughput"] > 0


@pytest.mark.draws
def test_without_labels_cells_are_compared_with_the_unreduced_model(source, tmp_path, monkeypatch):
    monkeypatch.setattr(Source, "__getitem__", lambda self, i: (torch.rand(3, 32, 32), -1))
    table = runner.run(small_grid(only=("flops", "accuracy")), tmp_path / "run").set_index("cell")
    assert table["top1"].isna().all() and table["drop"].isna().all()
    assert table.loc["tiny/none", ["agreement", "kl"]].tolist() == [100, 0]
    assert table.loc["tiny/tome/8", "kl"] > 0 and table["agreement_low"].notna().all()
    assert (tmp_path / "run" / "pareto.png").exists()


@pytest.mark.draws
def test_a_backbone_is_compared_by_its_features(source, tmp_path, monkeypatch):
    def headless(name, checkpoint, input_size):
        model = tiny_model()
        model.reset_classifier(0)
        return model

    monkeypatch.setattr(runner, "load_model", headless)
    grid = small_grid(MethodSpec("random", ("16",)), only=("flops", "accuracy"))
    table = runner.run(grid, tmp_path / "run").set_index("cell")
    assert table[["top1", "agreement", "kl"]].isna().all(axis=None)
    assert table.loc["tiny/none", "similarity"] == pytest.approx(1)
    assert 0 < table.loc["tiny/random/16", "similarity"] < 1
    base = table.loc["tiny/none"]
    assert base["knn_top1_low"] < base["knn_top1"] == 100 and base["knn_drop"] == 0  # each class has its own channel
    drops = 100 - table["knn_top1"]
    assert table["knn_drop"].tolist() == pytest.approx(drops.tolist()) and table["knn_drop_high"].notna().all()
    record = next(own for own in plain_records(tmp_path / "run") if own["kind"] == "accuracy")
    assert record["knn_images"] == IMAGES and not (tmp_path / "run" / "partial").exists()
    with pytest.raises(UserError, match="similarity"):
        plot_pareto(load_cells([tmp_path / "run"]), tmp_path / "top1.png", y="top1")


def test_compiled_models_are_timed_and_eager_ones_judged(source, tmp_path, monkeypatch):
    compiled, judged = [], []
    real = answers.evaluate
    monkeypatch.setattr(writing, "compile_model", lambda model: compiled.append(model) or model)
    monkeypatch.setattr(
        answers, "evaluate", lambda *args, **kwargs: judged.append(len(compiled)) or real(*args, **kwargs)
    )
    grid = small_grid(MethodSpec("tome", ("8",)))
    grid = dataclasses.replace(grid, options=dataclasses.replace(grid.options, compile=True))
    listener = Listener()
    runner.run(grid, tmp_path / "run", progress=listener)
    assert ("phase", "tiny: compiling", 5) in listener.told
    assert judged == [0] and len(compiled) == 3  # the unreduced model, the cell and its speed limit
    folder = RunFolder.open(tmp_path / "run")
    assert {record["runtime"] for record in plain_records(folder.path) if record["kind"] == "speed"} == {"compile"}
    with pytest.raises(UserError, match="runtime was compile and is eager"):
        runner.run(small_grid(MethodSpec("tome", ("8",)), MethodSpec("tofu", ("8",))), tmp_path / "run")


def test_a_baseline_without_fused_attention_is_said(source, tmp_path, monkeypatch):
    def unfused(name, checkpoint, input_size):
        model = tiny_model()
        model.blocks[1].attn.fused_attn = False
        return model

    monkeypatch.setattr(runner, "load_model", unfused)
    listener = Listener()
    runner.run(small_grid(only=("flops", "speed")), tmp_path / "run", progress=listener)
    cells = load_cells([tmp_path / "run"])
    assert any("fused attention is off" in text for text in listener.warnings)
    assert "Fused attention was off" in render_table(cells, "md")
    speeds = [record for record in plain_records(tmp_path / "run") if record["kind"] == "speed"]
    assert all(record["attention_kernels"] == ["flash_attention_for_cpu"] for record in speeds)  # of the other blocks
    assert "Fused attention was off" not in render_table(changed(cells, fused_attention="on"), "md")


def test_attention_can_be_written_out_for_a_whole_run(source, tmp_path):
    listener, out = Listener(), tmp_path / "run"
    runner.run(small_grid(only=("flops", "speed"), fused="off"), out, progress=listener)
    assert not any("fused" in text for text in listener.warnings)
    speeds = [record for record in plain_records(out) if record["kind"] == "speed"]
    assert {(record["fused_attention"], *record["attention_kernels"]) for record in speeds} == {("off",)}
    with pytest.raises(UserError, match="fused attention was off and is on"):
        runner.run(small_grid(only=("flops", "speed")), out)


def test_a_cell_that_fails_in_latency_alone_is_the_one_that_failed(source, tmp_path, monkeypatch):
    real = speed._host_seconds

    def fail(model, images, iterations):
        if len(images) == 1 and getattr(model, "fusion", None) and model.fusion.method.name == "tome":
            raise RuntimeError("out of luck")
        return real(model, images, iterations)

    monkeypatch.setattr(speed, "_host_seconds", fail)
    table = runner.run(small_grid(only=("speed",)), tmp_path / "run").set_index("cell")
    assert table["error"].dropna().to_dict() == {"tiny/tome/8": "RuntimeError: out of luck"}
    assert table["throughput"].notna().to_dict() == {"tiny/none": True, "tiny/tome/8": False, "tiny/random/8": True}


@pytest.mark.draws
def test_a_folder_removed_while_its_plot_is_drawn_is_said_to_be_gone(source, tmp_path, monkeypatch):
    real = runner._draw

    def remove_and_draw(cells, folder, tell):
        shutil.rmtree(folder)
        return real(cells, folder, tell)

    monkeypatch.setattr(runner, "_draw", remove_and_draw)
    with pytest.raises(RunStopped, match="was removed while running"):
        runner.run(small_grid(only=("flops", "accuracy")), tmp_path / "run")


def fail_once(monkeypatch, owner, name: str, error: Exception) -> None:
    """The first call raises."""
    real, calls = getattr(owner, name), []

    def flaky(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, flaky)


@pytest.mark.parametrize(
    ("owner", "name", "phase"),
    [
        (VisionTransformer, "to", "setup"),
        (bench, "release_memory", "setup"),
        (answers, "evaluate", "accuracy"),
        (timing, "Watch", "speed"),
    ],
)
def test_a_model_that_fails_as_a_whole_leaves_the_others(source, tmp_path, monkeypatch, owner, name, phase):
    fail_once(monkeypatch, owner, name, RuntimeError("lost the device"))
    models = (ModelSpec("tiny"), ModelSpec("tiny", label="again"))
    listener = Listener()
    grid = small_grid(MethodSpec("tome", ("8",)), models=models, only=("accuracy", "speed"))
    table = runner.run(grid, tmp_path / "run", progress=listener).set_index("cell")
    failures = [r for r in plain_records(tmp_path / "run") if r["kind"] == "failure"]
    assert [(r["cell"], r["phase"], r["message"]) for r in failures] == [
        ("tiny/none", phase, "RuntimeError: lost the device")
    ]
    assert "lost the device" in failures[0]["traceback"]
    assert any("tiny: the unreduced model failed" in text for text in listener.warnings)
    assert table.loc[["again/none", "again/tome/8"], ["top1", "throughput"]].notna().all(axis=None)
    again = runner.run(grid, tmp_path / "run").set_index("cell")
    assert again["error"].isna().all() and again["throughput"].notna().all()


def test_a_cell_that_cannot_be_compiled_fails_alone(source, tmp_path, monkeypatch):
    def refuse(model):
        if getattr(model, "fusion", None) and model.fusion.method.name == "tome":
            raise RuntimeError("no compiler")
        return model

    monkeypatch.setattr(writing, "compile_model", refuse)
    table = runner.run(small_grid(only=("flops", "speed"), compile=True), tmp_path / "run").set_index("cell")
    assert table["error"].dropna().to_dict() == {"tiny/tome/8": "RuntimeError: no compiler"}
    assert table["throughput"].notna().to_dict() == {"tiny/none": True, "tiny/tome/8": False, "tiny/random/8": True}


def test_out_of_memory_after_throughput_halves_the_batch_as_well(source, tmp_path, monkeypatch):
    fail_once(monkeypatch, timing, "measure_memory", torch.OutOfMemoryError("full"))
    table = runner.run(small_grid(only=("speed",)), tmp_path / "run")
    assert table["error"].isna().all() and set(table["batch_size"]) == {5}


@pytest.mark.parametrize(
    ("origin", "found"),
    [
        ({"url": "https://a.org/t.git", "vcs_info": {"vcs": "git", "commit_id": "ab" * 20}}, {"commit": "ab" * 20}),
        ({"url": "file:///home/me/tokbench", "dir_info": {"editable": True}}, None),
        ({"url": "https://a.org/t.whl", "archive_info": {}}, None),
        ({"vcs_info": {"commit_id": 7}}, None),
        (["vcs_info"], None),
        (None, None),
        ("{", None),
    ],
)
def test_an_installed_copy_names_the_commit_that_pip_took_it_from(tmp_path, monkeypatch, origin, found):
    home = Path(runner.__file__).parents[2]
    for site, expected in ((home, found), (tmp_path, None)):  # and not that of a copy that is not running
        text = origin if origin is None or isinstance(origin, str) else json.dumps(origin)
        copy = SimpleNamespace(read_text=lambda name, text=text: text, locate_file=lambda name, site=site: site / name)
        monkeypatch.setattr(runner, "distribution", lambda name, copy=copy: copy)
        assert runner.installed_commit() == expected


def test_a_model_is_let_go_before_the_next_one_is_measured(source, tmp_path, monkeypatch):
    """Its weights would count to the next one's peak memory."""
    loaded, weights = [], []
    monkeypatch.setattr(runner, "load_model", lambda *_, **__: loaded.append(tiny_model()) or loaded[-1])
    real = timing.measure_memory

    def measure_memory(model, **how):
        weights.append([sum(p.numel() for p in one.parameters() if p.device.type != "meta") > 0 for one in loaded])
        return real(model, **how)

    monkeypatch.setattr(timing, "measure_memory", measure_memory)
    models = (ModelSpec("tiny"), ModelSpec("tiny", label="again"))
    runner.run(small_grid(MethodSpec("tome", ("8",)), models=models, only=("speed",)), tmp_path / "run")
    assert weights == [[True, True]] * 2 + [[False, True]] * 2


def test_cells_added_to_a_run_are_timed_on_its_batches(source, tmp_path, small_memory):
    small_memory("tome", 3)
    runner.run(small_grid(MethodSpec("tome", ("8",)), only=("speed",)), tmp_path / "run")
    listener = Listener()
    grid = small_grid(MethodSpec("tome", ("8",)), MethodSpec("random", ("8",)), only=("speed",))
    table = runner.run(grid, tmp_path / "run", progress=listener)
    assert list(table["batch_size"]) == [3, 3, 3] and not listener.warnings
    small_memory("tofu", 1)
    grid = small_grid(MethodSpec("tome", ("8",)), MethodSpec("tofu", ("8",)), only=("speed",))
    table = runner.run(grid, tmp_path / "run", progress=listener).set_index("cell")
    assert table.loc["tiny/tofu/8", "batch_size"] == 1
    assert (
        len(listener.warnings) == 1 and "batches of 1 only" in listener.warnings[0] and "had 3" in listener.warnings[0]
    )


def test_smaller_batches_are_compiled_anew(source, tmp_path, monkeypatch, small_memory):
    # torch compiles the same code for eight shapes, and refuses the ninth.
    compiled = []
    monkeypatch.setattr(writing, "compile_model", lambda model: compiled.append(model) or model)
    small_memory("tome", 3)
    runner.run(small_grid(MethodSpec("tome", ("8",)), only=("speed",), compile=True), tmp_path / "run")
    assert len(compiled) == 3 * 3  # the unreduced model, the cell and its limit, for batches of 10, 5 and 3


def test_the_unreduced_model_that_is_timed_is_timms_own(source, tmp_path, monkeypatch):
    timed = {}
    real = timing.measure_speed
    monkeypatch.setattr(timing, "measure_speed", lambda models, **how: timed.update(models) or real(models, **how))
    runner.run(small_grid(only=("speed",)), tmp_path / "run")
    baseline, own = timed["tiny/none"], tiny_model()
    assert next(iter(timed)) == "tiny/none" and type(baseline) is VisionTransformer
    assert {type(module) for module in baseline.modules()} == {type(module) for module in own.modules()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in baseline.modules())
    assert all(block.attn.fused_attn for block in baseline.blocks)
    assert torch.equal(baseline(torch.ones(2, 3, 32, 32)), own(torch.ones(2, 3, 32, 32)))


def test_the_unreduced_model_is_no_speedup_to_doubt(source, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(timing, "vague_speedups", lambda fields: told.extend(fields) or [])
    runner.run(small_grid(only=("speed",)), tmp_path / "run")
    assert told == ["tiny/tome/8", "tiny/random/8"]


def test_rounds_go_on_only_where_no_time_was_asked_for_and_the_bar_starts_anew(source, tmp_path, monkeypatch):
    real, allowed = timing.measure_speed, []

    def measure(models, *, on_round, **how):
        allowed.append(how["patience"])
        for done, planned in ((1, 2), (2, 2), (3, 9)):
            on_round(done, planned)
        return real(models, on_round=None, **how)

    monkeypatch.setattr(timing, "measure_speed", measure)
    listener = Listener()
    runner.run(small_grid(only=("speed",)), tmp_path / "usual", progress=listener)
    runner.run(small_grid(only=("speed",), seconds=0.001), tmp_path / "asked")
    assert allowed == [timing.PATIENCE, {}]
    start = listener.told.index(("phase", "tiny: speed", 2))
    longer = ("phase", "tiny: speed, for longer, as it is not known well yet", 9)
    assert listener.told[start + 1 : start + 5] == [("advance", 1), ("advance", 2), longer, ("advance", 3)]


def test_every_cell_is_timed_at_each_batch_size_and_the_run_goes_on_with_what_it_lacks(source, tmp_path):
    grid = small_grid(MethodSpec("tome", ("8",)), only=("flops", "accuracy", "speed"))
    swept = dataclasses.replace(grid, options=dataclasses.replace(grid.options, batch_size=(4, 1)))
    table = runner.run(swept, tmp_path / "run")
    assert list(table["cell"]) == [f"tiny/{cell} at batch {size}" for size in (1, 4) for cell in ("none", "tome/8")]
    assert list(table["batch_size"]) == [1, 1, 4, 4] and table["top1"].notna().all()
    speeds = [r for r in plain_records(tmp_path / "run") if r["kind"] == "speed"]
    assert [(r["cell"], r["batch_size"]) for r in speeds] == [
        (f"tiny/{cell}", size) for size in (1, 4) for cell in ("none", "tome/8")
    ]
    cells = load_cells([tmp_path / "run"])
    assert [len(found.sentences) > 2 for found in findings(cells)] == [True, True]
    assert [cell.split("|")[3].strip() for cell in render_table(cells, "md").splitlines()[4:8]] == ["1", "1", "4", "4"]
    path = tmp_path / "run" / "records.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    runner.run(swept, tmp_path / "run")
    again = [r for r in plain_records(tmp_path / "run") if r["kind"] == "speed"]
    assert [r["batch_size"] for r in again] == [1, 1, 4, 4] and again[:3] == speeds[:3]
    with pytest.raises(UserError, match="batch size was \\[1, 4\\] and is 10"):
        runner.run(grid, tmp_path / "run")


@pytest.fixture
def processes_here(monkeypatch):
    """Fresh processes are played by this one."""
    told = []

    def in_process(job, tell):
        told.append(job)
        return pickle.loads(pickle.dumps(fresh.work(pickle.loads(pickle.dumps(job)), tell)))

    monkeypatch.setattr(fresh, "in_process", in_process)
    return told


def test_cells_are_timed_in_several_processes_in_turn(source, tmp_path, processes_here):
    runner.run(small_grid(MethodSpec("tome", ("flops:0.8",)), processes=3, rounds=7), tmp_path / "run")
    assert [job.number for job in processes_here] == [0, 1, 2]
    speeds = [r for r in plain_records(tmp_path / "run") if r["kind"] == "speed"]
    assert [r["cell"] for r in speeds] == ["tiny/none", "tiny/tome/flops:0.8"]
    for record in speeds:
        assert record["processes"] == 3 and [len(own) for own in record["seconds"]] == [3, 3, 3]
        assert record["throughput_low"] <= record["throughput"] <= record["throughput_high"]
        assert record["latency_low_ms"] >= 1000 * min(map(min, record["latency_seconds"]))
    assert len(speeds[1]["free_seconds"]) == 3
    assert {cell.processes for cell in load_cells([tmp_path / "run"])} == {3}


def test_a_process_that_dies_costs_its_own_timings_only(source, tmp_path, processes_here, monkeypatch):
    real, dead = fresh.in_process, {1}

    def dying(job, tell):
        if job.number in dead:
            raise fresh.ProcessDied("was ended by signal 9")
        return real(job, tell)

    monkeypatch.setattr(fresh, "in_process", dying)
    listener = Listener()
    grid = small_grid(MethodSpec("tome", ("8",)), processes=3, rounds=7)
    runner.run(grid, tmp_path / "run", progress=listener)
    assert listener.warnings == ["timing process 2 of 3 was ended by signal 9"]
    speed = next(r for r in plain_records(tmp_path / "run") if r["kind"] == "speed")
    assert speed["processes"] == 2 and speed["caveats"] == ["only 2 of 3 processes came to the end of timing"]
    dead |= {0, 2}
    with pytest.raises(RunStopped, match="no process came to the end of timing; what was measured before is kept"):
        runner.run(grid, tmp_path / "other")
    assert {r["kind"] for r in plain_records(tmp_path / "other")} == {"flops", "accuracy"}


def test_what_fails_in_a_process_is_recorded_as_it_would_be_here(source, tmp_path, processes_here, monkeypatch):
    real = timing.measure_speed

    def fail(models, *, on_failure, **how):
        if "tiny/tome/8" in models:
            on_failure("tiny/tome/8", RuntimeError("no"))
        return real({name: own for name, own in models.items() if name != "tiny/tome/8"}, on_failure=on_failure, **how)

    monkeypatch.setattr(timing, "measure_speed", fail)
    runner.run(small_grid(MethodSpec("tome", ("8",)), only=("speed",), processes=2), tmp_path / "run")
    kept = {r["cell"]: r for r in plain_records(tmp_path / "run")}
    assert kept["tiny/tome/8"]["message"] == "RuntimeError: no" and kept["tiny/none"]["kind"] == "speed"


def test_a_real_process_tells_what_it_comes_to():
    job = fresh.Job(ModelSpec(), Grid(), RunOptions(device="cpu", rounds=6, seconds=0.01, processes=2), "cpu",
                    [(PlannedCell("bundled", MethodSpec("none")), "", "eager")], 1, 0, 1, [])  # fmt: skip
    told = []
    timed = fresh.in_process(job, lambda *what: told.append(what))
    assert len(timed.speed["bundled/none"].rounds) == 3 and timed.memory == {"bundled/none": None}
    assert ("phase", "bundled: speed", 3) in told


@pytest.mark.parametrize(
    ("does", "told"),
    [("echo one >&2; echo two >&2; exit 3", "ended with exit code 3: two"), ("kill -9 $$", "was ended by signal 9")],
)
def test_how_a_process_died_is_told(does, told, tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\n{does}\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(fresh.ProcessDied, match=f"^{told}$"):
        fresh.in_process(None, print)


def test_ctrl_c_ends_the_process_that_times(tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexec sleep 20\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    before = psutil.Process().children()
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # which pytest-xdist's workers do not
    threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            fresh.in_process(None, print)
    finally:
        signal.signal(signal.SIGINT, heard)
    assert psutil.Process().children() == before
