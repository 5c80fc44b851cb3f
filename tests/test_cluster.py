"""Accuracy shared between two workers of a real Ray cluster on this machine: the same answers, whatever dies."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from fake_ray import Died, FakeRay
from stand_ins import Listener, Source, plain_records, tiny_model

import tokbench
from tokbench.config import Grid, MethodSpec, ModelSpec, RunOptions
from tokbench.data.decoding import unreadable
from tokbench.errors import RunStopped, UserError
from tokbench.measure import accuracy
from tokbench.progress import Progress
from tokbench.results.folder import RunFolder
from tokbench.results.predictions import ARRAYS, Predictions
from tokbench.running import cluster, half_pass, runner

pytestmark = pytest.mark.usefixtures("one_thread")

# The workers are processes of their own, where no stand-in is: the bundled model, and an image-dependent method.
CPU = {"device": "cpu", "batch_size": 4, "limit": 80, "only": ("accuracy",)}
GRID = Grid(methods=(MethodSpec("tome", ("13",)), MethodSpec("ats", ("keep:0.5@3",))), options=RunOptions(**CPU))
SHARED = RunOptions(**CPU, ray="2")
WORDS = [
    *("run", "--method", "tome", "--schedule", "13", "--device", "cpu", "--batch-size", "4"),
    *("--only", "flops,accuracy", "--ray", "2"),
]
UNLIKE = ("pass_seconds", "reading_seconds", "workers", "traceback")


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    ray.init(
        num_cpus=2, include_dashboard=False, object_store_memory=10**8, log_to_driver=False, logging_level=logging.ERROR
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    """What one process finds."""
    path = tmp_path_factory.mktemp("alone") / "run"
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
    assert len(records) == len({(one["cell"], one["kind"]) for one in records})
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


def test_two_workers_answer_as_one_process_does_and_one_that_is_killed_is_replaced(ray, alone, tmp_path, hands):
    """Its images are shown again."""
    listener = At(lambda: kill_the_first(hands))
    runner.run(GRID, tmp_path / "run", options=SHARED, progress=listener)
    assert figures(tmp_path / "run") == alone
    (phase,) = (one[1] for one in listener.told if one[0] == "phase" and "accuracy" in one[1])
    assert phase == f"bundled: accuracy on 2 workers (2 on {socket.gethostname()})"
    assert {one.get("workers") for one in plain_records(tmp_path / "run") if one["kind"] == "accuracy"} == {2}
    (warning,) = listener.warnings
    assert warning.startswith(f"the worker on {socket.gethostname()} died: ") and warning.endswith("takes its place")


def interrupt() -> None:
    raise KeyboardInterrupt


def half_of(run: Path) -> int:
    """How many images the pass has shown that was interrupted."""
    (part,) = (run / "partial").rglob("*.npz")
    return int(part.stem)


def first_place(listener: Listener) -> int:
    """Where the pass over the images began to tell how far it is."""
    place = next(i for i, one in enumerate(listener.told) if one[0] == "phase" and "accuracy" in one[1])
    return listener.told[place + 1][1]


def is_at_work(process: psutil.Process) -> bool:
    """Whether it is a worker that shows images."""
    with suppress(psutil.NoSuchProcess):
        return process.name() == "ray::Actor.show"
    return False


@pytest.mark.slow
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
    others: list[psutil.Process] = []
    while driver.poll() is None and sum(map(is_at_work, others)) < 2:  # amid the pass
        time.sleep(0.1)
        others = psutil.Process(driver.pid).children(recursive=True)
    workers = [one for one in others if is_at_work(one)]
    (os.killpg if word == signal.SIGINT else os.kill)(driver.pid, word)
    _, err = driver.communicate(timeout=600)
    if word == signal.SIGINT:
        assert driver.returncode == 130, err
        assert err.startswith("tokbench: interrupted; 2 of 4 measurements are kept") and err.count("\n") == 1
    # After SIGKILL Ray's own agents take a minute to see that they are alone.
    assert len(workers) == 2 and not psutil.wait_procs(others if word == signal.SIGINT else workers, timeout=60)[1]


@pytest.fixture
def fake(monkeypatch, source):
    """Runs the small grid on two workers that are none, and gives the run's figures."""
    monkeypatch.setattr(cluster.socket, "gethostname", lambda: "node7")

    def share(ray: FakeRay, path: Path, progress: Progress | None = None, grid: Grid | None = None) -> dict:
        @contextmanager
        def opened(options, subjects, data, device, progress):
            workers = cluster.Cluster(ray, 2, {}, "bundled", progress)
            workers.start(UserError)
            yield workers

        with monkeypatch.context() as patch:
            patch.setattr(runner, "opened", opened)
            patch.setattr(cluster.Cluster, "_let_go", lambda self, hands: [self._hands.remove(one) for one in hands])
            runner.run(grid or SMALL, path, progress=progress or Listener())
        return figures(path)

    return share


SMALL = Grid(
    models=(ModelSpec("tiny"),),
    methods=(MethodSpec("tome", ("8",)), MethodSpec("random", ("8",))),
    options=RunOptions(device="cpu", batch_size=4, only=("flops", "accuracy")),
)


def test_answers_that_come_in_any_order_are_put_in_the_images(fake, source, tmp_path):
    source.count = 23
    runner.run(SMALL, tmp_path / "alone")
    expected = figures(tmp_path / "alone")
    source.read.clear()
    assert fake(FakeRay(), tmp_path / "run") == expected
    assert sorted(source.read) == list(range(23)) and source.read != list(range(23))


def test_half_a_pass_of_one_process_is_continued_by_workers(fake, source, tmp_path, monkeypatch):
    monkeypatch.setattr(half_pass, "SAVE_SECONDS", 0)
    monkeypatch.setattr(accuracy, "FETCH_SECONDS", 0)
    source.count = 99
    runner.run(SMALL, tmp_path / "alone")
    with pytest.raises(KeyboardInterrupt):
        runner.run(SMALL, tmp_path / "run", progress=At(interrupt))
    source.read.clear()
    listener = Listener()
    assert fake(FakeRay(), tmp_path / "run", listener) == figures(tmp_path / "alone")
    assert first_place(listener) == 4 and sorted(source.read) == list(range(4, 99))


def test_half_a_pass_of_workers_is_continued_by_one_process(fake, source, tmp_path, monkeypatch):
    monkeypatch.setattr(half_pass, "SAVE_SECONDS", 0)
    source.count = 99
    runner.run(SMALL, tmp_path / "alone")
    with pytest.raises(KeyboardInterrupt):
        fake(FakeRay(), tmp_path / "run", At(interrupt))
    half, listener = half_of(tmp_path / "run"), Listener()
    source.read.clear()
    runner.run(SMALL, tmp_path / "run", progress=listener)
    assert figures(tmp_path / "run") == figures(tmp_path / "alone")
    assert first_place(listener) == half > 4 and source.read == list(range(half, 99))


def test_images_and_cells_that_fail_in_a_worker_are_as_in_one_process(fake, source, tmp_path, monkeypatch):
    source.count = 200
    read, output = Source.__getitem__, accuracy._output

    def some(self, index):
        if index in (9, 196, 197, 198, 199):  # the last ones are all of a batch
            raise unreadable(f"{index}.png", "broken")
        image, label = read(self, index)
        image[0, 0, 0] = index
        return image, label

    def busy(name, model, images, batch_sizes):
        if "random" in name and 17 in images[:, 0, 0, 0]:
            raise RuntimeError("busy")
        return output(name, model, images, batch_sizes)

    monkeypatch.setattr(Source, "__getitem__", some)
    monkeypatch.setattr(accuracy, "_output", busy)
    tolerant, listener = replace(SMALL, options=replace(SMALL.options, max_bad=5.0)), Listener()
    runner.run(tolerant, tmp_path / "alone")
    expected = figures(tmp_path / "alone")
    assert fake(FakeRay(), tmp_path / "run", listener, tolerant) == expected
    assert expected["tiny/random/8", "failure"]["message"] == "RuntimeError: busy"
    assert ("tiny/tome/8", "answers") in expected and ("tiny/random/8", "answers") not in expected
    skipped = [RunFolder.open(tmp_path / name).skipped() for name in ("alone", "run")]
    assert skipped[0] == skipped[1] and len(skipped[0]["tiny"]) == 5


def dies(*when: tuple[int, str]):
    """Workers, by number, that die at their first call of a method; 0 for all."""
    left = list(when)

    def on_call(actor: int, method: str) -> None:
        for one in left:
            if one[0] in (0, actor) and one[1] == method:
                if one[0]:
                    left.remove(one)
                raise Died

    return on_call


@pytest.mark.parametrize("method", ["show", "begin"])
def test_the_images_of_a_worker_that_dies_are_shown_by_another(fake, source, tmp_path, method):
    runner.run(SMALL, tmp_path / "alone")
    ray, listener = FakeRay(dies((1, method), (3, "look"))), Listener()
    assert fake(ray, tmp_path / "run", listener) == figures(tmp_path / "alone")
    assert ray.actors == 4
    died = "the worker on node7 died: its worker process has died; another one takes its place"
    assert listener.warnings == [died, died.replace("node7", "?")]


def test_a_run_stops_where_workers_keep_dying_or_none_comes(fake, source, tmp_path):
    with pytest.raises(RunStopped, match="died: .*as others did before at the same images; what was measured is kept"):
        fake(FakeRay(dies((0, "show"))), tmp_path / "run")
    ray = FakeRay(dies((1, "show"), (2, "show")))
    ray.late = {3, 4}
    with pytest.raises(RunStopped, match="all workers died, and none came in 120 s"):
        fake(ray, tmp_path / "other")
    assert runner.run(SMALL, tmp_path / "run") is not None


def test_workers_that_come_too_late_are_left_out(fake, source, tmp_path):
    runner.run(SMALL, tmp_path / "alone")
    ray, listener = FakeRay(), Listener()
    ray.late = {2}
    assert fake(ray, tmp_path / "run", listener) == figures(tmp_path / "alone")
    assert listener.warnings == ["1 of 2 workers came within 120 seconds, and share all images"]
    ray.late = {4, 5}
    with pytest.raises(UserError, match="0 of 2 workers came within 120 seconds; is the cluster busy"):
        ray.actors = 3
        fake(ray, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_worker_with_other_images_is_refused(fake, source, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster.Worker, "conditions", lambda self: {"data_fingerprint": "0"})
    with pytest.raises(RunStopped, match="the worker on node7 has weights_sha256 None, and this process"):
        fake(FakeRay(), tmp_path / "run")
    monkeypatch.setattr(cluster, "remade", lambda *_: (_ for _ in ()).throw(UserError("no checkpoint 'mine.pth'")))
    with pytest.raises(RunStopped, match="the worker on node7: no checkpoint 'mine.pth'"):
        fake(FakeRay(), tmp_path / "run")


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


def test_a_cluster_is_known_by_its_greeting(ray):
    cluster._require_answer(ray.get_runtime_context().gcs_address)


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
    with pytest.raises(UserError, match=re.escape(f"the worker on node7 has {words}")):
        workers._meet(cluster._Hand(None), same | {name: there})


def test_without_ray_the_line_to_install_it_is_told(tokbench_command, source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = tokbench_command("run", "--ray", "auto", "--device", "cpu", "--out", tmp_path / "run")
    line = "tokbench: --ray needs Ray, which is not installed: pip install 'tokbench[ray]'\n"
    assert (code, err) == (2, line) and not (tmp_path / "run").exists()
    words = ("--ray", "auto", "--device", "cpu", "--only", "flops", "--method", "tome", "--schedule", "8")
    assert tokbench_command("run", *words, "--out", tmp_path / "run")[0] == 0  # nothing to share


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


def test_an_address_at_which_no_cluster_answers_is_refused(monkeypatch):
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 0.1)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"

        def refusal(where: str) -> str:
            monkeypatch.setenv("RAY_ADDRESS", where)
            with pytest.raises(UserError, match=f"--ray: no cluster answers at {where}: ") as caught:
                cluster._connect(None, "2")
            with pytest.raises(UserError, match=re.escape(str(caught.value))):
                cluster._connect(None, where)
            return str(caught.value)

        assert "refused" in refusal(address)
        server.listen()
        assert "timed out" in refusal(address)
        assert refusal("127.0.0.1:99999")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"

        def speak_http() -> None:
            for _ in range(2):
                server.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n")

        threading.Thread(target=speak_http, daemon=True).start()
        assert refusal(address).endswith("what answers is no Ray")


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
