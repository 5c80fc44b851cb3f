"""Searches whose candidates workers evaluate: they find what one process finds, whoever dies."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import contextmanager

import pytest
from fake_ray import Died, FakeRay
from stand_ins import Listener, count_by_tokens, plain_records, small_grid
from test_cluster import dies

from tokbench.config import Grid, MethodSpec, ModelSpec, RunOptions
from tokbench.errors import RunStopped, UserError
from tokbench.fusion import blocks
from tokbench.running import cluster, runner
from tokbench.running.fresh import Job
from tokbench.searching import command, images, objective, searcher
from tokbench.searching import cost as costs
from tokbench.searching.objective import Objective
from tokbench.searching.search import Search

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(costs, "count_flops", count_by_tokens)
    # ToMe changes the tiny model's answers by rounding alone, in which kernels differ.
    monkeypatch.setattr(blocks, "kernels_for", lambda x: None)
    monkeypatch.setattr(Search, "is_over", lambda self: self.objective.passes >= 5)


@pytest.fixture
def small(source, monkeypatch):
    """Eight batches of the tiny model's images."""
    source.count = 32
    monkeypatch.setattr(images, "open_dataset", lambda spec, model, labels=None: source)
    monkeypatch.setattr(objective, "BATCH", 4)
    return source


@pytest.fixture
def search(tmp_path, monkeypatch):
    """Searches with nothing kept from before, and gives what was found."""

    def find(*methods: str, progress: Listener | None = None, kept: str = "") -> list:
        folder = tmp_path / (kept or f"kept{len(list(tmp_path.iterdir()))}")
        folder.mkdir(exist_ok=True)
        monkeypatch.setattr(searcher, "_folder", lambda: folder)
        unasked = {"only": ("speed",), "runtimes": ("eager", "openvino"), "check_answers": True}  # of no matter here
        grid, out = small_grid(*map(MethodSpec, methods), **unasked), tmp_path / "found.toml"
        return command.search_grid(grid, ["flops:0.5"], out, images=32, seconds=600, progress=progress or Listener())

    return find


@pytest.fixture
def fake(monkeypatch):
    """Two workers that are none."""
    monkeypatch.setattr(cluster.socket, "gethostname", lambda: "node7")
    monkeypatch.setattr(cluster.Cluster, "_let_go", lambda self, hands: [self._hands.remove(one) for one in hands])

    def use(ray: FakeRay) -> None:
        @contextmanager
        def opened(options, subjects, data, device, progress):
            workers = cluster.Cluster(ray, 2, {}, data, progress)
            workers.start(UserError)
            yield workers

        for module in (command, runner):
            monkeypatch.setattr(module, "opened", opened)

    return use


def of_workers(monkeypatch) -> list[int]:
    """The numbers of the batches that were shown to candidates, each a worker's."""
    shown, of_batch = [], Objective.of_batch

    def noted(self, removals, method, number):
        assert self.workers is None, "the driver worked itself"
        shown.append(number)
        return of_batch(self, removals, method, number)

    monkeypatch.setattr(Objective, "of_batch", noted)
    return shown


def test_workers_change_nothing_about_what_is_found(small, search, fake, monkeypatch):
    alone = search("tome", "evit")
    fake(FakeRay())
    shown, listener = of_workers(monkeypatch), Listener()
    assert search("tome", "evit", progress=listener) == alone
    assert shown.count(0) > shown.count(2) > shown.count(4) > 2  # some candidates were dropped early, others were not
    assert ("phase", "evit at flops:0.5 on 2 workers (2 on node7)", 10_240) in listener.told


def test_a_worker_that_dies_amid_a_search_is_replaced(small, search, fake):
    alone = search("tome")
    ray, listener = FakeRay(dies((1, "show"), (2, "begin"), (3, "look"))), Listener()
    fake(ray)
    assert search("tome", progress=listener) == alone
    assert len(listener.warnings) == 3 and ray.actors == 5


def test_a_search_that_is_stopped_leaves_the_best_and_is_continued(small, search, fake, tmp_path):
    calls: list[str] = []

    def until(most: int, end: type[BaseException] = Died) -> None:
        def on_call(actor: int, method: str) -> None:
            if method == "show" and calls.count("show") == most:
                raise end
            calls.append(method)

        calls.clear()
        fake(FakeRay(on_call))

    until(9999)
    alone, whole = search("tome"), calls.count("show")
    for end, raised in ((KeyboardInterrupt, KeyboardInterrupt), (Died, RunStopped)):  # Ctrl-C; all workers die
        until(30, end)
        with pytest.raises(raised):
            search("tome", kept="same")
        (best,) = Grid.from_toml(tmp_path / "found.toml").searched
        assert best.cost is None and alone[0].distance <= best.distance <= best.usual_distance
    until(9999)
    assert search("tome", kept="same") == alone
    assert whole - 60 <= calls.count("show") <= whole - 50  # each end may lose what was not in order


def test_workers_with_other_images_to_search_on_are_refused(small, search, fake, monkeypatch):
    taken = []

    def others(*of, **more):
        taken.append(images.search_images(*of, **more) + len(taken))
        return taken[-1]

    monkeypatch.setattr("tokbench.running.searched.search_images", others)
    fake(FakeRay())
    with pytest.raises(RunStopped, match="the worker on node7 has images to search on .*, and this process "):
        search("tome")


def test_a_run_has_its_workers_search(small, fake, tmp_path, monkeypatch):
    monkeypatch.setattr(searcher, "_folder", lambda: tmp_path)
    monkeypatch.setattr(runner, "_draw", lambda *_: [])
    fake(FakeRay())
    shown = of_workers(monkeypatch)
    runner.run(small_grid(MethodSpec("tome", ("searched:flops:0.5",)), only=("accuracy",)), tmp_path / "run")
    (record,) = (one for one in plain_records(tmp_path / "run") if one["method"] == "tome")
    assert shown and record["workers"] == 2 and record["resolved"].startswith("list:")


def test_workers_show_images_where_a_run_also_compares_answers(source):
    options = RunOptions(device="cpu", runtimes=("eager", "openvino"), check_answers=True)
    grid = Grid(models=(ModelSpec("tiny"),), options=options)
    cells = [(cell, "", "eager") for cell in grid.cells(grid.models[0])]
    worker = cluster.Worker(Job(grid.models[0], grid, options, "cpu", cells, 4, 0, 1, []), {})
    assert len(worker.show(0, 8, [cells[0][0].id]).answers[cells[0][0].id].label) == 8


def test_what_is_no_cluster_is_told_in_a_line(tokbench_command, tmp_path):
    words = ("search", "--method", "tome", "--device", "cpu", "--out", tmp_path / "found.toml", "--ray")
    faults = {"no": "write auto, a number of workers", "127.0.0.1:1": "--ray: no cluster answers at 127.0.0.1:1"}
    for where, fault in faults.items():
        code, _, err = tokbench_command(*words, where)
        assert code == 2 and fault in err and err.count("\n") == 1


@pytest.mark.slow
def test_two_processes_search_as_one_does_though_one_is_killed(tokbench_command, search, tmp_path, monkeypatch):
    """The workers are processes of their own, where no stand-in is: the bundled model and its images."""
    pytest.importorskip("ray", reason="Ray is not installed")
    killed: list[int] = []
    results = cluster.Cluster.results

    def kill_one(self, *parts):
        for number, found in enumerate(results(self, *parts)):
            if self._hands and not killed and number == 3:
                killed.append(self._hands[0].pid)
                os.kill(killed[0], signal.SIGKILL)
            yield found

    monkeypatch.setattr(cluster.Cluster, "results", kill_one)
    found = {}
    for ray in (None, "2"):
        folder = tmp_path / str(ray)
        folder.mkdir()
        monkeypatch.setattr(searcher, "_folder", lambda folder=folder: folder)
        words = ["search", "--method", "evit", "--budget", "flops:0.5", "--images", "96", "--device", "cpu"]
        code, out, err = tokbench_command(*words, "--out", folder / "found.toml", *(["--ray", ray] if ray else []))
        assert code == 0, err
        found[ray] = (folder / "found.toml").read_text()
    assert found[None] == found["2"] and killed
    assert f"the worker on {socket.gethostname()} died" in out + err
