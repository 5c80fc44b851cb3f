"""A run that stopped goes on where it stopped, measures nothing twice, and comes out as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from stand_ins import CLASSES, IMAGES, Listener, Source, plain_records, small_grid, stand_in, tiny_model

from tokbench.config import Grid, MethodSpec, ModelSpec, RunOptions
from tokbench.errors import RunStopped, UserError
from tokbench.measure import accuracy
from tokbench.results.folder import RunFolder
from tokbench.results.predictions import Predictions
from tokbench.running import answers, bench, half_pass, runner, timing

TOME, RANDOM = MethodSpec("tome", ("8",)), MethodSpec("random", ("8",))
UNTIMED = small_grid(TOME, RANDOM, only=("flops", "accuracy"))
ACCURACY = small_grid(TOME, RANDOM, only=("accuracy",))


pytestmark = pytest.mark.usefixtures("one_thread")


def quiet_stand_in(patch) -> Source:
    patch.setattr(half_pass, "SAVE_SECONDS", 0)
    patch.setattr(accuracy, "FETCH_SECONDS", 0)
    return stand_in(patch, Source())


@pytest.fixture
def source(monkeypatch) -> Source:
    return quiet_stand_in(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """The figures of a run that nothing interrupted."""
    path = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        quiet_stand_in(patch)
        runner.run(UNTIMED, path)
    return figures(path)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that was interrupted amid its pass over the images."""
    path = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, quiet_stand_in(patch), 15, ACCURACY, path)
    return path


def stop_at(monkeypatch, source: Source, index: int, grid: Grid, out: Path) -> None:
    """A session that is interrupted when it reads that image."""
    read = Source.__getitem__

    def interrupting(self: Source, i: int):
        if i == index:
            raise KeyboardInterrupt
        return read(self, i)

    with monkeypatch.context() as patch:
        patch.setattr(Source, "__getitem__", interrupting)
        with pytest.raises(KeyboardInterrupt):
            runner.run(grid, out)
    source.read.clear()


UNLIKE = ("traceback", "pass_seconds", "reading_seconds")  # from session to session


def figures(run: Path) -> dict:
    """What must not depend on interruptions: records without timings, and every prediction."""
    folder = RunFolder.open(run)
    kept = {
        (record["cell"], record["kind"]): {key: value for key, value in record.items() if key not in UNLIKE}
        for record in plain_records(folder.path)
        if record["kind"] != "speed"
    }
    assert len(kept) == sum(record["kind"] != "speed" for record in plain_records(folder.path))
    for cell, kind in list(kept):
        if kind == "accuracy":
            answers = Predictions.load(folder.prediction_path(cell))
            kept[cell, "answers"] = [
                getattr(answers, name).tobytes() for name in ("label", "predicted", "label_probability", "top5")
            ]
    return kept


def test_a_finished_run_is_not_measured_again(source, tmp_path, monkeypatch):
    table = runner.run(small_grid(), tmp_path / "run")
    before = (tmp_path / "run" / "records.jsonl").read_bytes()
    monkeypatch.setattr(bench, "count_flops", lambda *a: pytest.fail("counted"))
    monkeypatch.setattr(timing, "measure_speed", lambda *a, **k: pytest.fail("timed"))
    source.read.clear()
    again = runner.run(small_grid(), tmp_path / "run")
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == before
    assert not source.read
    assert table.equals(again)


@pytest.mark.parametrize(("stop", "fetch"), [(0, 0), (15, 0), (23, 0), (23, 1e9)])
def test_a_half_done_pass_goes_on_from_the_last_batch(source, whole, tmp_path, monkeypatch, stop, fetch):
    monkeypatch.setattr(accuracy, "FETCH_SECONDS", fetch)
    stop_at(monkeypatch, source, stop, UNTIMED, tmp_path / "run")
    runner.run(UNTIMED, tmp_path / "run")
    assert source.read == list(range(stop // 10 * 10, IMAGES))
    assert figures(tmp_path / "run") == whole
    assert not (tmp_path / "run" / "partial").exists()


def test_a_pass_that_is_interrupted_again_and_again(source, whole, tmp_path, monkeypatch):
    for stop in (12, 14, 21):
        stop_at(monkeypatch, source, stop, UNTIMED, tmp_path / "run")
    runner.run(UNTIMED, tmp_path / "run")
    assert source.read == list(range(20, IMAGES))
    assert figures(tmp_path / "run") == whole


def test_a_pass_that_was_over_but_not_recorded_reads_no_image(source, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(answers, "accuracy_fields", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            runner.run(UNTIMED, tmp_path / "run")
    source.read.clear()
    runner.run(UNTIMED, tmp_path / "run")
    assert not source.read
    assert figures(tmp_path / "run") == whole


def test_a_broken_part_of_a_pass_is_measured_again(source, whole, tmp_path, monkeypatch):
    stop_at(monkeypatch, source, 21, UNTIMED, tmp_path / "run")
    first, second = sorted((tmp_path / "run" / "partial").rglob("*.npz"))
    second.write_bytes(second.read_bytes()[:100])
    runner.run(UNTIMED, tmp_path / "run")
    assert source.read == list(range(10, IMAGES))
    assert figures(tmp_path / "run") == whole


@pytest.mark.parametrize(
    "change",
    [
        {"start": 1},
        {"end": 10**20},
        {"end": "10"},
        {"cells": []},
        {"cells": 3},
        {"batch_sizes": {"tiny/none": 0}},
        {"batch_sizes": [1]},
        {"skipped": [{"index": 0, "name": "a", "reason": "b"}]},
        {"skipped": [{"index": "0"}]},
        "[" * 20_000,
    ],
    ids=str,
)
def test_a_part_of_a_pass_that_contradicts_itself_is_measured_again(source, stopped, tmp_path, change):
    shutil.copytree(stopped, tmp_path / "run")
    (part,) = (tmp_path / "run" / "partial").rglob("*.npz")
    with np.load(part) as archive:
        arrays = dict(archive)
    about = change if isinstance(change, str) else json.dumps({**json.loads(str(arrays["about"])), **change})
    np.savez(part, **{**arrays, "about": np.array(about)})
    runner.run(ACCURACY, tmp_path / "run")
    assert source.read == list(range(IMAGES))


def test_a_stream_starts_again(source, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "streaming", True)
    stop_at(monkeypatch, source, 15, ACCURACY, tmp_path / "run")
    assert not (tmp_path / "run" / "partial").exists()
    runner.run(ACCURACY, tmp_path / "run")
    assert source.read == list(range(IMAGES))


def test_a_larger_grid_adds_only_what_is_new(source, whole, tmp_path):
    runner.run(small_grid(TOME), tmp_path / "run")
    before = plain_records(tmp_path / "run")
    table = runner.run(small_grid(MethodSpec("tome", ("constant:8",)), RANDOM), tmp_path / "run")
    added = plain_records(tmp_path / "run")[len(before) :]
    assert [(record["kind"], record["cell"]) for record in added] == [
        (kind, "tiny/random/8") for kind in ("flops", "accuracy", "speed")
    ]
    assert len(added[-1]["reference_seconds"]) == len(added[-1]["seconds"])
    paired = np.divide(added[-1]["reference_latency_seconds"], added[-1]["latency_seconds"])
    assert added[-1]["latency_speedup"] == pytest.approx(np.median(paired))
    assert figures(tmp_path / "run") == whole
    assert list(table["cell"]) == ["tiny/none", "tiny/tome/8", "tiny/random/8"]
    manifest = RunFolder.open(tmp_path / "run").manifest
    assert [len(session.grid.methods) for session in manifest.continued] == [3]


def test_what_is_new_waits_for_the_half_done_pass(source, whole, tmp_path, monkeypatch):
    stop_at(monkeypatch, source, 15, small_grid(TOME, only=("flops", "accuracy")), tmp_path / "run")
    runner.run(UNTIMED, tmp_path / "run")
    assert source.read == [*range(10, IMAGES), *range(IMAGES)]
    assert figures(tmp_path / "run") == whole


def test_a_measure_can_be_added(source, tmp_path):
    runner.run(small_grid(only=("flops",)), tmp_path / "run")
    runner.run(small_grid(only=("speed", "flops")), tmp_path / "run")
    runner.run(small_grid(), tmp_path / "run")
    assert [r["kind"] for r in plain_records(tmp_path / "run")] == [
        kind for kind in ("flops", "speed", "accuracy") for _ in range(3)
    ]
    assert RunFolder.open(tmp_path / "run").manifest.conditions.models["tiny"].images == IMAGES


def test_a_model_can_be_added(source, tmp_path):
    runner.run(small_grid(only=("flops",)), tmp_path / "run")
    both = (ModelSpec("tiny"), ModelSpec("tiny", label="again"))
    table = runner.run(small_grid(models=both, only=("flops",)), tmp_path / "run")
    assert len(plain_records(tmp_path / "run")) == len(table) == 6


def test_the_unreduced_model_must_answer_as_before(source, tmp_path):
    runner.run(small_grid(TOME, only=("accuracy",)), tmp_path / "run")
    folder = RunFolder.open(tmp_path / "run")
    path = folder.prediction_path("tiny/none")
    answers = Predictions.load(path)
    answers.predicted[13] = (answers.predicted[13] + 1) % CLASSES
    answers.save(path)
    with pytest.raises(RunStopped, match="predictions differ among images 10 to 20"):
        runner.run(ACCURACY, tmp_path / "run")
    assert "tiny/random/8" not in {r["cell"] for r in plain_records(folder.path) if r["kind"] == "accuracy"}
    path.write_bytes(b"no archive")
    with pytest.raises(RunStopped, match="predictions in .* cannot be read"):
        runner.run(ACCURACY, tmp_path / "run")


@pytest.mark.parametrize("cell", ["tiny/none", "tiny/tome/8"])
def test_answers_that_were_deleted_are_measured_again(source, tmp_path, cell):
    runner.run(small_grid(TOME, only=("accuracy",)), tmp_path / "run")
    path = RunFolder.open(tmp_path / "run").prediction_path(cell)
    before = Predictions.load(path)
    path.unlink()
    runner.run(small_grid(TOME, only=("accuracy",)), tmp_path / "run")
    assert np.array_equal(Predictions.load(path).predicted, before.predicted)
    assert [r["cell"] for r in plain_records(tmp_path / "run") if r["kind"] == "accuracy"].count(cell) == 2


def test_a_cell_must_be_what_it_was(source, tmp_path):
    runner.run(small_grid(TOME, only=("flops",)), tmp_path / "run")
    path = tmp_path / "run" / "records.jsonl"
    path.write_text(path.read_text().replace("[57, 49, 41, 33]", "[57, 49, 41, 32]"))
    with pytest.raises(RunStopped, match="tiny/tome/8 is not what it was: tokens were"):
        runner.run(small_grid(TOME), tmp_path / "run")


def test_more_images_measure_accuracy_again_and_keep_the_rest(source, tmp_path, monkeypatch):
    dynamic = MethodSpec("ats", ("keep:0.5@1",))  # its FLOPs depend on the images
    grid = small_grid(TOME, dynamic, MethodSpec("free", ("8",)))
    accuracy = RunOptions(device="cpu", batch_size=10, only=("accuracy",))
    runner.run(grid, tmp_path / "whole", options=accuracy)
    few, all_ = (RunOptions(device="cpu", batch_size=10, limit=limit) for limit in (12, None))
    runner.run(grid, tmp_path / "run", options=few)
    before = plain_records(tmp_path / "run")
    source.read.clear()
    listener = Listener()
    stop_at(monkeypatch, source, 21, grid, tmp_path / "run")
    table = runner.run(grid, tmp_path / "run", options=all_, progress=listener)
    added = plain_records(tmp_path / "run")[len(before) :]
    assert sorted((record["kind"], record["method"]) for record in added) == [
        ("accuracy", "ats"), ("accuracy", "none"), ("accuracy", "tome"), ("flops", "ats"), ("speed", "ats"),
    ]  # fmt: skip
    for cell in ("tiny/none", "tiny/tome/8"):
        answers = [RunFolder.open(tmp_path / run).prediction_path(cell) for run in ("run", "whole")]
        assert answers[0].read_bytes() == answers[1].read_bytes()
    assert set(table["data_fingerprint"]) == {source.fingerprint} and set(table["images"].dropna()) == {IMAGES}
    assert RunFolder.open(tmp_path / "run").manifest.conditions.models["tiny"].images == IMAGES
    source.read.clear()
    runner.run(grid, tmp_path / "run", options=all_)
    assert not source.read
    with pytest.raises(UserError, match="data was 24 images of blobs and is 12 of blobs"):
        runner.run(grid, tmp_path / "run", options=few)


def test_half_a_pass_over_fewer_images_is_forgotten(source, tmp_path, monkeypatch):
    monkeypatch.setattr(source, "count", 20)
    stop_at(monkeypatch, source, 15, small_grid(TOME, only=("accuracy",)), tmp_path / "run")
    part, larger = source, Source()
    larger.fingerprint = "e" * 64
    notes = []
    monkeypatch.setattr(Listener, "note", lambda self, text: notes.append(text))
    monkeypatch.setattr(runner, "open_dataset", lambda *a, limit, labels: part if limit == 20 else larger)
    table = runner.run(small_grid(TOME, only=("accuracy",)), tmp_path / "run", progress=Listener())
    assert notes[0].startswith("tiny: 24 images instead of 20, so accuracy is measured again on all of them")
    assert larger.read == list(range(IMAGES)) and set(table["images"]) == {IMAGES}
    source.fingerprint = "d" * 64  # more images, and the first ones are others
    monkeypatch.setattr(runner, "open_dataset", lambda *a, limit, labels: part if limit == 24 else Source(30))
    with pytest.raises(UserError, match="data was 24 images of blobs and is 30 of blobs"):
        runner.run(small_grid(TOME, only=("accuracy",)), tmp_path / "run")


def other_weights(monkeypatch, source):
    def load(*args, **kwargs):
        model = tiny_model()
        with torch.no_grad():
            model.head.bias += 1
        return model

    monkeypatch.setattr(runner, "load_model", load)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (None, {"dtype": "bf16"}, "dtype was fp32 and is bf16"),
        (None, {"batch_size": 11}, "batch size was 10 and is 11"),
        (other_weights, {}, "the weights of model 'tiny' were .* and are"),
        (lambda m, source: m.setattr(source, "count", 20), {}, "data was 24 images of blobs and is 20 of blobs"),
        (lambda m, source: m.setattr(source, "fingerprint", "e" * 64), {}, "the images of blobs are others"),
        (
            lambda m, source: m.setattr(runner, "package_versions", lambda: {"torch": "1.0"}),
            {},
            ".*torch was .* 1.0",
        ),
        (lambda m, source: m.setattr(runner, "describe_machine", lambda d: {"cpu": "Z80"}), {}, "cpu was .* is Z80"),
    ],
)
def test_another_model_data_or_dtype_is_refused(source, tmp_path, monkeypatch, change, options, message):
    runner.run(small_grid(TOME, only=("accuracy",)), tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    if change:
        change(monkeypatch, source)
    grid = small_grid(TOME, RANDOM)
    options = RunOptions(**{"device": "cpu", "batch_size": 10, "only": ("accuracy",), **options})
    with pytest.raises(UserError, match=f"cannot continue the run '.*run': {message}") as caught:
        runner.run(grid, tmp_path / "run", options=options)
    assert "--fresh" in str(caught.value) and "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    table = runner.run(grid, tmp_path / "run", options=options, fresh=True)
    assert set(table["run"]) == {"run-2"}
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_an_automatic_batch_size_stays_what_it_was(source, tmp_path):
    runner.run(small_grid(TOME), tmp_path / "run")
    auto = RunOptions(device="cpu", batch_size="auto")
    table = runner.run(small_grid(TOME, RANDOM), tmp_path / "run", options=auto)
    assert set(table["batch_size"]) == {10}


def test_a_failed_cell_is_tried_again_and_told_once(source, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("busy")

    with monkeypatch.context() as patch:
        patch.setattr(bench, "apply", refuse)
        for _ in range(2):
            table = runner.run(small_grid(TOME, only=("flops", "accuracy")), tmp_path / "run")
    assert list(table["error"].notna()) == [False, True]
    assert [r["kind"] for r in plain_records(tmp_path / "run")].count("failure") == 1
    table = runner.run(small_grid(TOME, only=("flops", "accuracy")), tmp_path / "run")
    assert table["error"].isna().all() and table["top1"].notna().all()


def test_a_run_of_an_older_version_is_not_continued(source, tmp_path):
    RunFolder.create(tmp_path / "run", {"grid": {}})
    with pytest.raises(UserError, match="older tokbench"):
        runner.run(small_grid(TOME), tmp_path / "run")


def test_progress_tells_what_is_there(source, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(Listener, "continued", lambda self, records: told.append(len(records)))
    stop_at(monkeypatch, source, 15, UNTIMED, tmp_path / "run")
    listener = Listener()
    runner.run(UNTIMED, tmp_path / "run", progress=listener)
    assert told == [3]
    phase = listener.told.index(("phase", "tiny: accuracy", IMAGES))
    assert listener.told[phase + 1 : phase + 4] == [("advance", 10), ("advance", 20), ("advance", 24)]


def test_a_second_process_is_told_at_once_who_holds_the_folder(source, tmp_path, monkeypatch):
    def load(*args, **kwargs):
        code = f"from tokbench.results.folder import RunFolder\nwith RunFolder.held({str(tmp_path / 'run')!r}): pass"
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        told = f"is in use by process {os.getpid()} on {socket.gethostname()} since 20"
        assert told in second.stderr.splitlines()[-1]
        raise UserError("that was it")

    monkeypatch.setattr(runner, "load_model", load)
    with pytest.raises(UserError, match="that was it"):
        runner.run(small_grid(TOME), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_killed_process_held_is_free(source, tmp_path):
    code = (
        "import os, signal\nfrom tokbench.results.folder import RunFolder\n"
        f"with RunFolder.held({str(tmp_path / 'run')!r}): os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL and list((tmp_path / "run").iterdir())
    runner.run(small_grid(TOME, only=("flops",)), tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"manifest.json", "records.jsonl"}
