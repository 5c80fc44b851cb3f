"""What `tokbench run --dry-run` says of a run: which passes it makes, what it skips, how long it takes."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from stand_ins import IMAGES, small_grid

from tokbench.config import MethodSpec, RunOptions
from tokbench.data import open_dataset
from tokbench.errors import UserError
from tokbench.fusion.tome import ToMe
from tokbench.running import estimate, runner
from tokbench.running.estimate import preview

pytestmark = pytest.mark.usefixtures("one_thread")
TOME, RANDOM, TOPK = MethodSpec("tome", ("8", "4")), MethodSpec("random", ("8",)), MethodSpec("topk", ("keep:0.5@1,2",))
UNTIMED = small_grid(TOME, RANDOM, only=("flops", "accuracy"))


@pytest.fixture
def probed(monkeypatch) -> None:
    """Every pass takes a tenth of a second for an unreduced image, and every image a hundredth to read."""
    monkeypatch.setattr(estimate._Probe, "_timed", lambda self, model: np.full(3, 0.1))
    real = estimate._Probe._read

    def read(self: estimate._Probe):
        found = real(self)
        self.reading = np.full(3, 0.01)
        return found

    monkeypatch.setattr(estimate._Probe, "_read", read)


def seconds(told: str, part: str) -> float:
    found = re.search(rf"([\d.]+) (s|minutes|hours) {part}", told)
    assert found, told
    return float(found[1]) * {"s": 1, "minutes": 60, "hours": 3600}[found[2]]


def test_a_new_run_is_one_pass_for_all_cells(source, probed, tmp_path):
    told = preview(UNTIMED, tmp_path / "run")
    assert "tiny: 4 of 4 cells to measure\n" in told and "FLOPs: 4 cells" in told and "speed" not in told
    assert f"accuracy: one pass over all {IMAGES} images for 4 cells together" in told
    assert "3 of 4 cells ran" in told and not list(tmp_path.iterdir())
    # Three cells ran in the probe; the other one of ToMe is predicted by its FLOPs, and is the larger one.
    assert seconds(told, "to show them to models") == pytest.approx(IMAGES * 0.4, abs=2)


def test_what_resume_skips_is_told(source, probed, tmp_path, monkeypatch):
    runner.run(small_grid(RANDOM, only=("flops", "accuracy")), tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    told = preview(UNTIMED, tmp_path / "run")
    assert "tiny: 2 of 4 cells to measure, 2 are measured already and skipped" in told
    assert "accuracy: one pass over all 24 images for 3 cells together" in told  # the unreduced model again
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert "Everything is measured already" in preview(small_grid(RANDOM, only=("flops", "accuracy")), tmp_path / "run")
    with pytest.raises(UserError, match="batch size"):
        preview(replace(UNTIMED, options=replace(UNTIMED.options, batch_size=5)), tmp_path / "run")


def test_an_interrupted_pass_goes_on_and_new_cells_have_their_own(source, probed, tmp_path, monkeypatch):
    def interrupt(self, index):
        raise KeyboardInterrupt

    real, grid = type(source).pixels, small_grid(TOME, only=("accuracy",))
    monkeypatch.setattr(type(source), "pixels", lambda self, i: interrupt(self, i) if i == 15 else real(self, i))
    with pytest.raises(KeyboardInterrupt):
        runner.run(grid, tmp_path / "run")
    monkeypatch.setattr(type(source), "pixels", real)
    told = preview(small_grid(TOME, RANDOM, only=("accuracy",)), tmp_path / "run")
    assert "one pass over images 11 to 24, where it was interrupted, for 3 cells" in told
    assert "one pass over all 24 images for 2 cells" in told


def test_timing_is_known_from_the_options(source, probed, tmp_path):
    grid = small_grid(TOME, TOPK, only=("speed",))
    for sizes in (4, (2, 4)):
        options = replace(grid.options, seconds=30.0, batch_size=sizes)
        told = preview(replace(grid, options=options), tmp_path / "run")
        rounds = np.size(sizes)
        assert told.count("speed: 4 cells and up to 3 speed limits in turns") == rounds
        # As long again for single images, at most, and a few passes to warm up.
        assert seconds(told, "to time") == pytest.approx(1.5 * 30 * (4 + 3) * rounds, rel=0.2)


def test_a_cell_that_would_fail_is_named_and_the_unreduced_model_is_one_line(source, tmp_path, monkeypatch):
    monkeypatch.setattr(ToMe, "plan", lambda *_: 1 / 0)
    told = preview(UNTIMED, tmp_path / "run")
    assert "tiny/tome/4 would fail: ZeroDivisionError" in told and "tiny/random/8 would" not in told
    monkeypatch.setattr(estimate._Probe, "_timed", lambda self, model: 1 / 0)
    with pytest.raises(UserError, match="tiny/none would fail: ZeroDivisionError"):
        preview(UNTIMED, tmp_path / "run")


def test_a_probe_takes_from_the_cache_and_adds_nothing(tmp_path, monkeypatch):
    from image_folders import make_folder, vit

    folder = make_folder(tmp_path / "images", {"a": 3, "b": 2})
    monkeypatch.setattr(runner, "load_model", lambda *_, **__: vit(2))
    grid = small_grid(TOME, only=("accuracy",))
    grid = replace(
        grid, data=str(folder), options=RunOptions(device="cpu", only=("accuracy",), cache=str(tmp_path / "c"))
    )
    subject = runner.load_subject(grid.models[0], grid, grid.options, keep=False)
    subject.source.pixels(0)
    assert not (tmp_path / "c").exists()
    kept = open_dataset(str(folder), vit(2))
    kept.keep_in(tmp_path / "c")
    kept.pixels(0)
    (file,) = (tmp_path / "c").iterdir()
    before = file.read_bytes()
    subject = runner.load_subject(grid.models[0], grid, grid.options, keep=False)
    assert (subject.source.pixels(0)[0] == kept.pixels(0)[0]).all() and subject.source.pixels(1)[1] == 0
    assert file.read_bytes() == before
