"""Accuracy shared between two workers of a real Ray cluster on this machine: the same answers, whatever dies."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from stand_ins import Listener, plain_records, tiny_model

import tokbench
from tokbench.config import Grid, MethodSpec, RunOptions
from tokbench.errors import RunStopped, UserError
from tokbench.results.folder import RunFolder
from tokbench.results.predictions import ARRAYS, Predictions
from tokbench.running import cluster, half_pass, runner

pytestmark = pytest.mark.usefixtures("one_thread")

# The workers are processes of their own, where no stand-in is: the bundled model, and an image-dependent method.
CPU = {"device": "cpu", "batch_size": 4, "limit": 40, "only": ("flops", "accuracy")}
GRID = Grid(methods=(MethodSpec("tome", ("13",)), MethodSpec("ats", ("keep:0.5@3",))), options=RunOptions(**CPU))
SHARED = RunOptions(**CPU, ray="2")
WORDS = [
    *("run", "--method", "tome", "--schedule", "13", "--device", "cpu", "--batch-size", "4"),
    *("--only", "flops,accuracy", "--ray", "2"),
]
UNLIKE = ("pass_seconds", "reading_seconds", "workers")


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=10**8, log_to_driver=False, logging_level=logging.ERROR
    )
    yield ray
    ray.shutdown()


@pytest.fixture(autouse=True)
def _no_plot(monkeypatch):
    monkeypatch.setattr(runner, "_draw", lambda *_: [])


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    """What one process finds."""
    path = tmp_path_factory.mktemp("alone") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_draw", lambda *_: [])
        runner.run(GRID, path)
    return figures(path)


def figures(run: Path) -> dict:
    """All records but for how long they took, and every answer."""
    folder = RunFolder.open(run)
    records = plain_records(run)
    found = {
        (one["cell"], one["kind"]): {name: value for name, value in one.items() if name not in UNLIKE}
        for one in records
    }
    for cell, kind in list(found):
        if kind == "accuracy":
            answers = Predictions.load(folder.prediction_path(cell))
            found[cell, "answers"] = [getattr(answers, name).tobytes() for name in ARRAYS]
    assert len(records) == 2 * len(GRID.cells(GRID.models[0]))
    return found


class At(Listener):
    """Does something once as the pass reaches its first images."""

    def __init__(self, do) -> None:
        super().__init__()
        self.do = do

    def advance(self, done: int) -> None:
        super().advance(done)
        if self.told[-2][0] == "phase" and "accuracy" in self.told[-2][1]:
            self.do()


def test_an_address_at_which_no_cluster_answers_is_refused_in_ten_seconds():
    pytest.importorskip("ray", reason="Ray is not installed")
    began = time.monotonic()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        address = "127.0.0.1:{}".format(silent.getsockname()[1])
        assert refused(address).startswith(f"--ray: nobody answers at {address}: ")
        silent.listen()  # and says nothing
        assert refused(address).startswith(f"--ray: the cluster at {address} cannot be joined from here: ")
    assert time.monotonic() - began < 12


def test_two_workers_answer_as_one_process_does(ray, alone, tmp_path):
    listener = Listener()
    runner.run(GRID, tmp_path / "run", options=SHARED, progress=listener)
    assert figures(tmp_path / "run") == alone
    (phase,) = (one[1] for one in listener.told if one[0] == "phase" and "accuracy" in one[1])
    assert phase == f"bundled: accuracy on 2 workers (2 on {socket.gethostname()})"
    assert {one.get("workers") for one in plain_records(tmp_path / "run") if one["kind"] == "accuracy"} == {2}
    assert not listener.warnings


def kill_the_first(hands: list) -> None:
    os.kill(hands[0].pid, signal.SIGKILL)


@pytest.fixture
def hands(monkeypatch) -> list:
    """The workers, once they are there."""
    found: list = []
    start = cluster.Cluster.start
    monkeypatch.setattr(
        cluster.Cluster, "start", lambda self, *kind: (start(self, *kind), found.__setitem__(slice(None), self._hands))
    )
    return found


def test_a_worker_that_is_killed_is_replaced_and_its_images_shown_again(ray, alone, tmp_path, hands):
    listener = At(lambda: kill_the_first(hands))
    runner.run(GRID, tmp_path / "run", options=SHARED, progress=listener)
    assert figures(tmp_path / "run") == alone
    (warning,) = listener.warnings
    assert warning.startswith(f"the worker on {socket.gethostname()} died: ") and warning.endswith("takes its place")


def test_half_a_pass_is_continued_with_workers_and_without(ray, alone, tmp_path, monkeypatch):
    monkeypatch.setattr(half_pass, "SAVE_SECONDS", 0)

    def interrupt():
        raise KeyboardInterrupt

    for first, then in ((SHARED, GRID.options), (GRID.options, SHARED)):
        run = tmp_path / str(first.ray)
        with pytest.raises(KeyboardInterrupt):
            runner.run(GRID, run, options=first, progress=At(interrupt))
        (part,) = (run / "partial").rglob("*.npz")
        half = int(part.stem)
        listener = Listener()
        runner.run(GRID, run, options=then, progress=listener)
        assert figures(run) == alone
        place = next(i for i, one in enumerate(listener.told) if one[0] == "phase" and "accuracy" in one[1])
        assert listener.told[place + 1] == ("advance", half)  # another one without: the first range is not a batch


@pytest.mark.parametrize("word", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_of_a_driver_that_is_stopped(word, tmp_path):
    """Ctrl-C in a terminal is for all processes of a group."""
    pytest.importorskip("ray", reason="Ray is not installed")
    run = tmp_path / "run"
    line = [sys.executable, "-m", "tokbench", *WORDS, "--limit", "9999", "--out", str(run)]
    driver = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    records = run / "records.jsonl"
    while driver.poll() is None and not (records.exists() and records.read_text().count("\n") == 2):
        time.sleep(0.05)
    time.sleep(0.5)  # amid the pass
    others = psutil.Process(driver.pid).children(recursive=True)
    assert len([one for one in others if "ray::" in " ".join(one.cmdline())]) == 2
    (os.killpg if word == signal.SIGINT else os.kill)(driver.pid, word)
    _, err = driver.communicate(timeout=60)
    if word == signal.SIGINT:
        assert driver.returncode == 130, err
        assert err.startswith("tokbench: interrupted; 2 of 4 measurements are kept") and err.count("\n") == 1
    assert not psutil.wait_procs(others, timeout=10)[1]


def refused(options: str, **more) -> str:
    """What is wrong, in the one line that a user sees."""
    with pytest.raises(UserError) as caught, cluster.opened(
        RunOptions(**CPU, ray=options), (), **{"data": "bundled", "device": torch.device("cpu"), **more},
        progress=Listener(),
    ):  # fmt: skip
        pass
    assert "\n" not in str(caught.value) and not isinstance(caught.value, RunStopped)
    return str(caught.value)


def test_data_that_a_worker_does_not_see_is_told_with_its_name(ray):
    assert refused("1", data="/no/images") == (
        f"the worker on {socket.gethostname()}: data folder '/no/images' does not exist. "
        "Other data: bundled, hfds/…, hfids/…, wds/…, tfds/…, torch/…."
    )


def test_more_workers_than_there_is_room_for_are_refused(ray):
    assert refused("3") == "--ray 3: the cluster has 2 cores, and a worker takes 1 (OMP_NUM_THREADS)"
    for asked in ("2", "auto"):
        words = f"--ray {asked}: the cluster has 0 GPUs, and a worker takes one"
        assert refused(asked, device=torch.device("cuda")) == words


@pytest.mark.parametrize(
    ("name", "there", "words"),
    [
        ("tokbench", "0.0.9", f"tokbench 0.0.9, and this process tokbench {tokbench.__version__}"),
        ("torch", "1.0", f"torch 1.0, and this process torch {torch.__version__}"),
        ("tokbench", None, "no tokbench, and this process"),
    ],
)
def test_workers_of_another_version_are_refused(name, there, words):
    ray = SimpleNamespace(
        remote=lambda **_: lambda actor: actor,
        get=lambda found: found,
        exceptions=SimpleNamespace(RayTaskError=ZeroDivisionError),
    )
    same = {"tokbench": tokbench.__version__, "torch": str(torch.__version__), "host": "node7", "pid": 1}
    workers = cluster.Cluster(ray, 1, {}, "bundled", Listener())
    workers._meet(cluster._Hand(None), same)
    with pytest.raises(UserError, match=f"the worker on node7 has {words}"):
        workers._meet(cluster._Hand(None), same | {name: there})


def test_without_ray_the_line_to_install_it_is_told(tokbench_command, source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = tokbench_command("run", "--ray", "auto", "--device", "cpu", "--out", tmp_path / "run")
    line = "tokbench: --ray needs Ray, which is not installed: pip install 'tokbench[ray]'\n"
    assert (code, err) == (2, line) and not (tmp_path / "run").exists()
    assert tokbench_command("run", "--ray", "auto", "--device", "cpu", "--only", "flops", "--method", "tome",
                            "--out", tmp_path / "run")[0] == 0  # fmt: skip


def test_what_cannot_be_shared_is_refused(tokbench_command, source, tmp_path, monkeypatch):
    def run() -> str:
        code, _, err = tokbench_command("run", "--ray", "2", "--device", "cpu", "--out", tmp_path / "run")
        assert code == 2 and err.count("\n") == 1
        return err

    with monkeypatch.context() as patch:
        patch.setattr(source, "streaming", True)
        assert "blobs is a stream" in run()
    features = tiny_model()
    features.reset_classifier(0)
    monkeypatch.setattr(runner, "load_model", lambda *_, **__: features)
    assert "bundled gives features" in run()


@pytest.mark.parametrize("text", ["0", "many", "ray://head:10001", "head", "-1", "host:port", "1.5"])
def test_words_that_name_no_workers_are_refused(text):
    with pytest.raises(UserError, match="write auto, a number of workers, or the HOST:PORT of a running cluster"):
        RunOptions(ray=text)


def test_ranges_are_whole_batches_and_become_smaller():
    ranges = list(cluster.split(range(8, 1003), batch=4, workers=3))
    assert [place for part in ranges for place in part] == list(range(8, 1003))
    sizes = [len(part) for part in ranges]
    assert all(size % 4 == 0 for size in sizes[:-1]) and sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 4 * cluster.MOST_BATCHES and sizes[-2] == 4
    assert not list(cluster.split(range(8, 8), 4, 3))
