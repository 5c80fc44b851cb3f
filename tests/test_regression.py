"""The check: what moves a verdict on made-up runs; on the bundled model, that it bites, and passes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from stand_ins import Source, count_each_once, stand_in_for_checks

from tokbench.check.compare import Limits, check
from tokbench.check.differences import compare
from tokbench.check.verdicts import Check, require_writable, summary, tell_github, write_junit
from tokbench.config import Grid, MethodSpec, RunOptions
from tokbench.errors import UserError
from tokbench.fusion.core import METHODS, bipartite_match
from tokbench.fusion.kernels import kernels_on
from tokbench.measure.stats import paired_drop, wilson
from tokbench.results.folder import RunFolder
from tokbench.results.predictions import Predictions
from tokbench.running.figures import accuracy_fields
from tokbench.running.runner import run

REPOSITORY = Path(__file__).resolve().parents[1]
REFERENCE = REPOSITORY / "results" / "reference"
IMAGES = 200
Answers = dict[str, np.ndarray]


pytestmark = pytest.mark.usefixtures("one_thread")


# --- made-up runs


def answers(wrong: int, other: int = 0) -> np.ndarray:
    """Predicted classes for labels of 0: the first `wrong` images get 1, the last `other` get 2 instead of 3."""
    predicted = np.zeros(IMAGES, np.int64)
    predicted[:wrong] = 1
    predicted[IMAGES - 20 :] = 3
    predicted[IMAGES - other :] = 2
    return predicted


CELLS = {("none", ""): answers(20), ("tome", "constant:8"): answers(24), ("topk", "keep:0.5@3"): answers(40)}


@pytest.fixture
def make_run(tmp_path) -> Callable[..., Path]:
    """A run of three cells. `cells`: predictions by method and schedule; `change`: edits or drops each record."""

    def make(
        name: str,
        cells: dict[tuple[str, str], np.ndarray] = CELLS,
        change: Callable[[dict[str, Any]], dict[str, Any] | None] = lambda record: record,
        label: int = 0,
        **manifest: Any,
    ) -> Path:
        folder = RunFolder.create(tmp_path / name, manifest)
        labels = np.full(IMAGES, label)
        base = _predictions(labels, cells["none", ""])
        for (method, schedule), predicted in cells.items():
            identity = {
                "cell": "/".join(filter(None, ("m", method, schedule))), "model": "m", "weights_sha256": "ab" * 32,
                "method": method, "params": {}, "schedule": schedule, "data": "pictures",
                "data_fingerprint": "cd" * 32, "tokens": [17, 9, 5],
            }  # fmt: skip
            mine = _predictions(labels, predicted)
            folder.replace(folder.prediction_name(identity["cell"]), mine.save)
            speed = {"speedup": 1.5, "speedup_low": 1.4, "speedup_high": 1.6}
            for kind, measured in [
                ("flops", {"flops": 10**9}),
                ("accuracy", accuracy_fields(mine, base)),
                ("speed", speed),
            ]:
                record = change({"kind": kind, **identity, **measured})
                if record is not None:
                    folder.append(record)
        return folder.path

    return make


def _predictions(labels: np.ndarray, predicted: np.ndarray) -> Predictions:
    """predicted: classes, or of a model that has none the cosines (float32) or its one output (float64)."""
    if predicted.dtype == np.float64:
        nothing = np.full(IMAGES, np.nan, np.float32)
        output = predicted.astype(np.float32)
        return Predictions(labels, labels * 0 - 1, nothing, labels < 0, nothing, nothing, output, classifies=False)
    if predicted.dtype.kind == "f":
        nothing = np.full(IMAGES, np.nan, np.float32)
        return Predictions(labels, labels * 0 - 1, nothing, labels < 0, nothing, predicted, classifies=False)
    return Predictions(labels, predicted, np.full(IMAGES, 0.5, np.float32), predicted == labels)


def failed(found: Check) -> set[tuple[str, str]]:
    return {(verdict.gate, verdict.cell) for verdict in found.verdicts if not verdict.passed}


def test_a_plugin_that_changed_is_noted(make_run):
    runs = [make_run(name, plugins={"mine.py": digest, name: "ef" * 32}) for name, digest in (("a", "ab"), ("b", "cd"))]
    assert check(*runs).notes == ["the plugin mine.py is another one than the baseline's"]
    assert not check(runs[0], runs[0]).notes


def edited(method: str, kind: str, **fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(record: dict[str, Any]) -> dict[str, Any]:
        return record | fields if (record["method"], record["kind"]) == (method, kind) else record

    return change


def test_a_run_that_says_the_same_passes_every_gate(make_run):
    found = check(make_run("old"), make_run("new"), limits=Limits(0, 0, 0))
    assert found.passed and len(found.verdicts) == 6 * 3
    assert found.scope == "3 cells on 200 images of pictures"
    assert found.lines()[-1].startswith("passed") and not found.notes and not found.differ.told
    assert [line[:4] for line in found.lines()[2:-1]] == ["pass"] * 6


def test_a_loss_beyond_the_limit_fails_however_few_the_images_are(make_run):
    new = make_run("new", CELLS | {("tome", "constant:8"): answers(27)})  # 3 of 200 more wrong: 1.5 points
    old = make_run("old")
    assert failed(check(old, new, limits=Limits(max_drop=1.4))) == {("top-1", "m/tome/constant:8")}
    assert check(old, new, limits=Limits(max_drop=1.5)).passed
    told = "\n".join(check(old, new, limits=Limits(max_drop=1.4)).lines())
    assert ": more than 1.4: 1.50 points lost [−0.4, 4.3], 3 lost and 0 gained of 200 images, p 0.38" in told


def test_a_significant_loss_fails_within_the_limit_and_is_corrected_for_the_number_of_cells(make_run):
    old = make_run("old")
    six, seven = (make_run(f"new{n}", CELLS | {("tome", "constant:8"): answers(24 + n)}) for n in (5, 6))
    lenient = Limits(max_drop=100, max_flips=100)
    # One-sided, 5 lost of 5 has p = 1/32 by itself, and 3/32 as the smallest of three; 6 of 6 has 3/64.
    assert check(old, six, limits=lenient).passed
    found = check(old, seven, limits=lenient)
    assert failed(found) == {("top-1", "m/tome/constant:8")}
    assert "significant: 3.00 points lost" in "\n".join(found.lines()) and "p 0.047" in "\n".join(found.lines())


def test_a_gain_is_told_and_never_fails(make_run):
    found = check(
        make_run("old"), make_run("new", CELLS | {("topk", "keep:0.5@3"): answers(20)}), limits=Limits(0, 100)
    )
    assert found.passed
    assert len(found.notes) == 1 and "gain: m/topk/keep:0.5@3 gets 10.00 points more right" in found.notes[0]


def test_of_a_model_without_classes_the_features_are_compared(make_run):
    def cosines(moved: int = 0, unknown: int = 0) -> dict[tuple[str, str], np.ndarray]:
        mine = np.full(IMAGES, 0.9, np.float32)
        mine[:moved] -= 0.02
        mine[moved:] += 0.005
        mine[IMAGES - unknown :] = np.nan
        return {("none", ""): np.ones(IMAGES, np.float32), ("tome", "constant:8"): mine}

    old, four, five = (make_run(name, cosines(moved)) for name, moved in (("old", 0), ("four", 4), ("five", 5)))
    found = check(old, four)
    assert found.passed and [found.word(gate) for gate in ("top-1", "flips", "cosine")] == ["skip", "skip", "pass"]
    assert found.lines()[-1].endswith("passed: this run says what the baseline says, but for top-1 and flips, which "
                                      "could not be compared")  # fmt: skip
    found = check(old, five)
    assert failed(found) == {("cosine", "m/tome/constant:8")}
    words = "2.5 % moved, 5 of 200, by 0.025 at most; mean cosine 0.9050 → 0.9044"
    assert f"        m/tome/constant:8: {words}" in found.lines()
    assert check(old, five, limits=Limits(max_flips=2.5)).passed
    # Features that are no numbers any more have moved, and those that never were have not.
    found = check(old, make_run("broken", cosines(unknown=5)))
    words = "2.5 % moved, 5 of 200, by 0.000 at most; mean cosine 0.9050 → 0.9050; not finite in 0 before, 5 now"
    assert not found.passed and f"        m/tome/constant:8: {words}" in found.lines()
    found = check(old, make_run("gone", cosines(unknown=IMAGES)))
    words = "100.0 % moved, 200 of 200; not finite in 0 before, 200 now"
    assert not found.passed and f"        m/tome/constant:8: {words}" in found.lines()
    assert check(make_run("old2", cosines(unknown=50)), make_run("new2", cosines(unknown=50))).passed
    assert "cosine" not in check(make_run("a"), make_run("b")).limits


def test_of_a_model_of_one_output_the_output_is_compared(make_run):
    def outputs(moved: int = 0, by: float = 0.02) -> dict[tuple[str, str], np.ndarray]:
        base = np.linspace(-1, 1, IMAGES)
        mine = base + 0.1
        mine[:moved] += by * np.std(mine)
        return {("none", ""): base, ("tome", "constant:8"): mine}

    old, four, five = (make_run(name, outputs(moved)) for name, moved in (("old", 0), ("four", 4), ("five", 5)))
    found = check(old, four)
    assert found.passed and [found.word(gate) for gate in ("top-1", "flips", "output")] == ["skip", "skip", "pass"]
    assert failed(check(old, five)) == {("output", "m/tome/constant:8")}
    assert check(old, make_run("little", outputs(IMAGES, by=0.005))).passed and "cosine" not in found.limits


def test_flips_count_though_top1_stays(make_run):
    old, new = make_run("old"), make_run("new", CELLS | {("topk", "keep:0.5@3"): answers(40, other=5)})
    found = check(old, new)
    assert failed(found) == {("flips", "m/topk/keep:0.5@3")}
    assert "        m/topk/keep:0.5@3: 2.5 % flipped, 5 of 200" in found.lines()
    assert check(old, new, limits=Limits(max_flips=2.5)).passed


@pytest.mark.parametrize(("flops", "passes"), [(1_001_000_000, True), (998_999_999, False), (1_001_000_001, False)])
def test_flops_may_change_by_a_thousandth(make_run, flops, passes):
    found = check(make_run("old"), make_run("new", change=edited("topk", "flops", flops=flops)))
    assert failed(found) == (set() if passes else {("flops", "m/topk/keep:0.5@3")})


def test_tokens_must_be_the_same_after_every_block(make_run):
    def change(record: dict[str, Any]) -> dict[str, Any]:
        return record | ({"tokens": [17, 10, 5]} if record["method"] == "tome" else {})

    found = check(make_run("old"), make_run("new", change=change))
    assert failed(found) == {("tokens", "m/tome/constant:8")}
    assert "        m/tome/constant:8: after block 1 9 → 10, other in 1 block" in found.lines()
    fewer = make_run("fewer", change=lambda record: record | {"tokens": [17, 9]})
    assert "after block 2 5 → none" in "\n".join(check(make_run("old2"), fewer).lines())


def test_speed_is_checked_only_when_asked(make_run):
    old, new = make_run("old"), make_run("new", change=edited("tome", "speed", speedup=1.2))
    assert check(old, new).passed
    assert check(old, new, limits=Limits(max_slowdown=20.1)).passed
    found = check(old, new, limits=Limits(max_slowdown=19.9))
    assert failed(found) == {("speed", "m/tome/constant:8")}
    assert "1.50× [1.40, 1.60] → 1.20× [1.40, 1.60], 20.0 % lost" in "\n".join(found.lines())
    without = make_run("without", change=lambda record: record if record["kind"] != "speed" else None)
    assert {gate for gate, _ in failed(check(old, without, limits=Limits(max_slowdown=20)))} == {"cells"}
    with pytest.raises(UserError, match="has not measured speed"):
        check(without, new, limits=Limits(max_slowdown=20))


def test_missing_cells_fail_and_new_ones_are_named(make_run):
    fewer = {key: value for key, value in CELLS.items() if key[0] != "topk"}
    found = check(make_run("old"), make_run("new", fewer | {("evit", "keep:0.5@3"): answers(20)}))
    assert failed(found) == {("cells", "m/topk/keep:0.5@3")}
    assert found.notes == ["new, not measured in the baseline: m/evit/keep:0.5@3"]
    assert "missing from this run" in "\n".join(found.lines())


def test_a_cell_that_fails_now_is_missing_and_its_error_told(make_run):
    def change(record: dict[str, Any]) -> dict[str, Any] | None:
        if record["method"] != "tome":
            return record
        return (
            record | {"kind": "failure", "phase": "setup", "message": "RuntimeError: it broke"}
            if record["kind"] == "flops"
            else None
        )

    broken, whole = make_run("broken", change=change), make_run("whole")
    found = check(whole, broken)
    assert failed(found) == {("cells", "m/tome/constant:8")}
    assert "        m/tome/constant:8: failed: RuntimeError: it broke" in found.lines()
    found = check(broken, whole)  # what failed in the baseline has nothing to fall behind
    assert found.passed and found.notes == ["new, not measured in the baseline: m/tome/constant:8"]


def test_one_schedule_written_in_two_ways_is_one_cell(make_run):
    written = {("tome", "8") if key[0] == "tome" else key: value for key, value in CELLS.items()}
    assert check(make_run("old"), make_run("new", written)).passed


def test_a_cell_of_two_sessions_that_wrote_its_schedule_in_two_ways_is_one(make_run):
    def change(record: dict[str, Any]) -> dict[str, Any]:
        first = record["method"] == "tome" and record["kind"] == "flops"
        return record | ({"cell": "m/tome/8", "schedule": "8"} if first else {})

    run_ = make_run("run", change=change)
    for baseline in (run_, make_run("old")):  # its answers lie under the second name
        found = check(run_, baseline, limits=Limits(0, 0, 0))
        assert found.passed and len(found.verdicts) == 6 * 3 and not found.notes


def test_the_one_model_of_two_runs_is_the_same_whatever_it_is_called(make_run):
    def called(model: str, **fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
        return lambda record: record | {"model": model, **fields}

    old = make_run("old")
    found = check(old, make_run("renamed", change=called("w2")))
    assert found.passed and found.scope == "3 cells on 200 images of pictures" and not found.notes
    with pytest.raises(UserError, match="other weights: w2 in .* has sha256 efef.*, m in .* has abab"):
        check(old, make_run("other", change=called("w2", weights_sha256="ef" * 32)))
    two = RunFolder.open(make_run("two", change=called("w2")))
    for record in two.records():
        two.append(called("w3")(record.plain()))
    with pytest.raises(UserError, match="no cell in common: .*two has w2, w3, .*old has m"):
        check(old, two.path)  # which of the two would it be?


def test_what_could_not_be_compared_is_not_said_to_have_passed(make_run):
    found = check(make_run("old", label=-1), make_run("new", label=-1))
    assert "skip  top-1   nothing to compare: the images have no labels" in found.lines()
    assert found.lines()[-1] == (
        "passed: this run says what the baseline says, but for top-1, which could not be compared"
    )
    assert "| top-1 | skip |" in summary(found) and not found.of_gate("top-1")
    counted = make_run("counted", change=lambda record: record if record["kind"] == "flops" else None)
    found = check(counted, make_run("all"))
    assert [line[:13] for line in found.lines() if line.startswith("skip")] == ["skip  top-1  ", "skip  flips  "]
    assert found.lines()[-1].endswith("but for top-1 and flips, which could not be compared")


@pytest.mark.parametrize(("kind", "field"), [("flops", "flops"), ("speed", "speedup")])
def test_a_baseline_of_zero_is_damaged(make_run, kind, field):
    old, new = make_run("old"), make_run("new")
    lines = [json.loads(line) for line in (old / "records.jsonl").read_text().splitlines()]
    lines = [edited("tome", kind, **{field: 0})(record) for record in lines]
    (old / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
    with pytest.raises(UserError, match=f"records.jsonl, line [456]: '{field}' must be above 0"):
        check(old, new, limits=Limits(0, 0, 5))


def test_other_weights_or_images_or_labels_are_refused(make_run):
    old = make_run("old")
    with pytest.raises(UserError, match=r"other weights: m in .*/weights has sha256 efef.*…, m in .*/old has abab"):
        check(old, make_run("weights", change=lambda record: record | {"weights_sha256": "ef" * 32}))
    with pytest.raises(UserError, match=r"saw other images: 200 of pictures \(0101.*, 200 of pictures \(cdcd.*--limit"):
        check(old, make_run("images", change=lambda record: record | {"data_fingerprint": "01" * 32}))
    with pytest.raises(UserError, match="their labels are not those"):
        check(old, make_run("labels", label=1))


def test_images_that_cannot_be_decoded_must_be_the_same(make_run):
    def skipping(name: str, *places: int) -> Path:
        path = make_run(name)
        skips = [{"index": place, "name": f"{place}.png", "reason": "broken"} for place in places]
        (path / "skipped.json").write_text(json.dumps({"m": skips}))
        return path

    one, same, other, none = skipping("one", 3), skipping("same", 3), skipping("other", 5), make_run("none")
    assert check(one, same).passed
    for run_ in (other, none):  # as many answers, and the same labels, but not to the same images
        with pytest.raises(UserError, match=r"answered 200 of the images in .*some cannot be decoded"):
            check(one, run_)


def conditions(
    device: str = "cpu", gpu: str | None = None, cpu: str = "A", kernels: str | None = None, **changed: Any
) -> dict[str, Any]:
    """The part of a manifest that says what a run was measured under."""
    known = {"device": device, "dtype": "fp32", "batch_size": 16, "compile": False} | changed
    machine = {"cpu": cpu, "device": f"{device}:0", "threads": 2, "kernels": kernels} | ({"gpu": gpu} if gpu else {})
    return {"conditions": known, "machine": machine, "packages": {"torch": "1"}}


def test_conditions_that_changed_are_told(make_run):
    old = make_run("old", packages={"torch": "1"}, machine={"cpu": "A"}, grid={"options": {"dtype": "fp32"}})
    new = make_run("new", packages={"torch": "2"}, machine={"cpu": "B"}, grid={"options": {"dtype": "bf16"}})
    found = check(old, new)
    assert found.differ.told == ["torch 1 → 2", "cpu A → B", "dtype fp32 → bf16"]
    assert (
        found.lines()[-1] == "passed: this run says what the baseline says (its CPU and dtype are not the baseline's)"
    )


@pytest.mark.parametrize(
    ("then", "now", "settings", "said", "unsaid"),
    [
        ({}, {}, [], [], ["compared"]),
        ({}, {"device": "cuda", "gpu": "G", "cpu": "B", "batch_size": 128}, ["device", "batch_size"],
         ["device cpu → cuda; gpu none → G; cpu A → B; batch_size 16 → 128", "near-ties",
          "device and batch size decide", "tokbench check --baseline"], ["on a machine with"]),
        ({"device": "cuda", "gpu": "G"}, {}, ["device"], ["on a machine with G"], []),
        ({"device": "cuda", "gpu": "G"}, {"device": "cuda", "gpu": "H", "cpu": "B"}, ["gpu"],
         ["as GPU decides", "on a machine with G"], ["CPU decide"]),
        ({}, {"dtype": "bf16"}, ["dtype"], ["another dtype by itself changes answers"], ["near-ties"]),
        ({}, {"cpu": "B"}, ["cpu"], ["near-ties"], ["tokbench check --baseline"]),
        ({}, {"kernels": "C"}, ["kernels"], ["kernels none → C", "as kernels decide", "near-ties"], ["--baseline"]),
        ({}, {"compile": True}, ["runtime"], ["runtime eager → compile", "not compared: speed-ups"], ["with care"]),
    ],
)  # fmt: skip
def test_what_other_conditions_leave_to_compare_is_said(make_run, then, now, settings, said, unsaid):
    old, new = make_run("old", **conditions(**then)), make_run("new", **conditions(**now))
    found = check(old, new)
    assert found.passed and found.differ.settings == settings
    text = "\n".join(found.lines())
    assert all(part in text for part in said) and not any(part in text for part in unsaid)
    assert all(part in summary(found) for part in said)
    if settings:
        with pytest.raises(UserError, match="--max-slowdown: speed-ups cannot be held against those of .*old, as "):
            check(old, new, limits=Limits(max_slowdown=5))
    else:
        assert check(old, new, limits=Limits(max_slowdown=5)).passed


def test_unreadable_runs_are_refused(make_run, tmp_path):
    old, new = make_run("old"), make_run("new")
    path = RunFolder.open(new).prediction_path("m/tome/constant:8")
    np.savez(path, label=np.zeros(3))
    with pytest.raises(UserError, match="predictions of m/tome/constant:8 cannot be read"):
        check(old, new)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read: .*No such file"):
        check(old, new)
    shutil.copy(RunFolder.open(old).prediction_path("m/tome/constant:8"), path)
    assert check(old, new).passed
    RunFolder.create(tmp_path / "empty", {})
    with pytest.raises(UserError, match="holds no measurements"):
        check(old, tmp_path / "empty")
    speed = make_run("speed", change=lambda record: record if record["kind"] == "speed" else None)
    with pytest.raises(UserError, match="speed only; give --max-slowdown"):
        check(speed, new)


def test_speed_that_was_warned_of_is_judged_only_when_told_to(make_run):
    def busy(record):
        return record | ({"caveats": ["other work took 52 % of the CPU"]} if record["kind"] == "speed" else {})

    quiet, noisy = make_run("quiet"), make_run("noisy", change=busy)
    for before, after in ((quiet, noisy), (noisy, quiet)):
        assert check(before, after).passed
        with pytest.raises(
            UserError, match="noisy is not to be judged by, as while 3 of 3 cells were timed other work"
        ):
            check(before, after, limits=Limits(max_slowdown=5))
        assert check(before, after, limits=Limits(max_slowdown=5, despite_warnings=True)).passed


def test_runs_at_several_batch_sizes_are_compared_size_by_size(make_run):
    def swept(slower):
        path = make_run(f"swept-{slower}")
        folder = RunFolder.open(path)
        for record in [own.plain() for own in folder.records() if own.kind == "speed"]:
            for size in (1, 8):
                speedup = 1.5 - slower * (size == 8)
                folder.append(record | {"batch_size": size, "speedup": speedup})
        lines = [line for line in (path / "records.jsonl").read_text().splitlines(keepends=True)
                 if '"speed"' not in line or '"batch_size"' in line]  # fmt: skip
        (path / "records.jsonl").write_text("".join(lines))
        return path

    before, after, single = swept(0), swept(0.5), make_run("single")
    found = check(before, after, limits=Limits(max_slowdown=5))
    assert {(one.gate, one.cell) for one in found.verdicts if not one.passed} == {
        ("speed", f"m/{cell} at batch 8") for cell in ("none", "tome/constant:8", "topk/keep:0.5@3")
    }
    assert len(found.of_gate("top-1")) == len(found.of_gate("flops")) == 3
    assert check(before, single).passed and check(single, before).passed
    assert len(compare([before, after])) == 6 and len(compare([before, single])) == 3


@pytest.mark.parametrize("limits", [{"max_drop": -1}, {"max_flips": float("nan")}, {"max_slowdown": float("inf")}])
def test_limits_that_cannot_be_are_refused(limits):
    with pytest.raises(UserError, match=f"--{next(iter(limits)).replace('_', '-')} must be 0 or more"):
        Limits(**limits)


# --- what other programs read


@pytest.fixture
def bad(make_run) -> Check:
    """A check with two gates failed, one of them with a text that XML cannot hold."""

    def change(record: dict[str, Any]) -> dict[str, Any] | None:
        if record["method"] == "topk":
            return (
                record | {"kind": "failure", "phase": "setup", "message": "100 %\x1b[31m <bad>"}
                if record["kind"] == "flops"
                else None
            )
        return edited("tome", "flops", flops=2)(record)

    return check(make_run("old"), make_run("new", change=change))


def test_junit_holds_a_case_per_gate_and_cell(bad, tmp_path):
    target = tmp_path / "deep" / "report.xml"
    require_writable(target)
    write_junit(bad, target)
    suite = ElementTree.parse(target).getroot().find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == (str(len(bad.verdicts)), "2")
    cases = {(case.get("classname"), case.get("name")): case.find("failure") for case in suite.iter("testcase")}
    assert len(cases) == len(bad.verdicts)
    failures = {key: failure.get("message") for key, failure in cases.items() if failure is not None}
    assert failures == {
        ("tokbench.cells", "m/topk/keep:0.5@3"): "failed: 100 %\\u001b[31m <bad>",
        ("tokbench.flops", "m/tome/constant:8"): "−100.00 %, 1 → 2e-09 GFLOPs",
    }
    with pytest.raises(UserError, match="it is a folder"):
        require_writable(tmp_path)
    with pytest.raises(UserError, match="cannot write"):
        require_writable(target / "below")


def test_github_is_told_only_there(bad, tmp_path, capsys):
    tell_github(bad, {})
    assert capsys.readouterr().out == ""
    page = tmp_path / "summary.md"
    page.write_text("before\n")
    tell_github(bad, {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(page)})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("::")[1] for line in lines] == [
        "error title=tokbench check, cells",
        "error title=tokbench check, flops",
    ]
    assert "%0Am/topk/keep:0.5@3: failed: 100 %25" in lines[0]
    text = page.read_text()
    assert text.startswith("before\n### tokbench check failed\n")
    assert "| cells | **FAIL** | 2 of 3 cells are there |" in text and "| tokens | pass |" in text


@pytest.mark.parametrize("name", ["::add-mask::x", "##[add-mask]x", "\n::add-mask::x", "<b>|\x1b[2J", "`_x_`\udcff"])
def test_names_are_text_wherever_they_are_told(make_run, tmp_path, capsys, name):
    def change(record: dict[str, Any]) -> dict[str, Any]:
        return record | ({"cell": name} if record["method"] == "topk" else {})

    found = check(make_run("old", change=change), make_run("new", {("none", ""): answers(20)}))
    tell_github(found, {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")})
    write_junit(found, tmp_path / "junit.xml")
    (command,) = capsys.readouterr().out.splitlines()
    assert command.startswith("::error title=tokbench check, cells::") and command.isprintable()
    told = "\n".join(found.lines())
    assert not re.search(r"^\s*::|##\[", told, re.MULTILINE)
    page = (tmp_path / "summary.md").read_text()
    assert not re.search(r"(?<!\\)[<`]|\W_x_", page)
    cases = [case.get("name", "") for case in ElementTree.parse(tmp_path / "junit.xml").getroot().iter("testcase")]
    assert len(cases) == 7 and all(case.isprintable() for case in cases)
    assert all(line.isprintable() for line in (told + page).splitlines())


# --- how two runs differ


def test_cells_of_two_checkpoints_are_paired_on_the_same_images(make_run):
    other = CELLS | {("tome", "8"): answers(30)}
    del other["tome", "constant:8"]
    old = make_run("old", change=lambda record: record | ({"throughput": 100.0, "throughput_low": 90.0,
                   "throughput_high": 110.0} if record["kind"] == "speed" else {}))  # fmt: skip
    new = make_run("new", other, change=lambda record: record | {"model": "w2", "weights_sha256": "ef" * 32}
                   | ({"throughput": 200.0, "throughput_low": 190.0, "throughput_high": 210.0}
                      if record["kind"] == "speed" else {}))  # fmt: skip
    found = {one.cell: one for one in compare([old, new])}
    tome = found["new: m/tome/8"]
    assert (tome.against, tome.images) == ("old: m/tome/constant:8", "same")
    drop, low, high = paired_drop(CELLS["tome", "constant:8"] == 0, answers(30) == 0)
    gained = tome.figures["top1_difference"]
    assert (gained.value, gained.low, gained.high) == pytest.approx((-drop, -high, -low)) and -drop == -3
    assert tome.figures["agreement"].value == 97 and tome.figures["gflops_ratio"].value == 1
    ratio = tome.figures["throughput_ratio"]
    assert ratio.value == pytest.approx(2) and ratio.low is not None and 1.6 < ratio.low < 190 / 110 + 0.1
    assert found["new: m/none"].figures["top1_difference"].value == 0


def test_cells_on_other_images_are_compared_without_pairs(make_run):
    old = make_run("old")
    new = make_run("new", CELLS | {("none", ""): answers(40)}, change=lambda one: one | {"data_fingerprint": "01" * 32})
    none = compare([old, new])[0]
    assert none.images == "other" and "agreement" not in none.figures
    # Newcombe's interval of 140/200 − 160/200, from Wilson's of both.
    (p, p_low, p_high), (q, q_low, q_high) = ((100 * n / 200, *(100 * e for e in wilson(n, 200))) for n in (140, 160))
    wanted = (p - q, p - q - np.hypot(p - p_low, q_high - q), p - q + np.hypot(p_high - p, q - q_low))
    figure = none.figures["top1_difference"]
    assert (figure.value, figure.low, figure.high) == pytest.approx(wanted)


def test_all_cells_may_be_compared_with_one(make_run, tokbench_command):
    old, new = make_run("old"), make_run("new", CELLS | {("none", ""): answers(30)})
    found = compare([old, new], "old:tome/8")
    assert {one.against for one in found} == {"old: m/tome/constant:8"} and len(found) == 5
    assert {one.cell: one.figures["top1_difference"].value for one in found}["new: m/none"] == -3
    code, out, _ = tokbench_command("compare", old, new, "--baseline", f"{new}:none", "--format", "json")
    assert code == 0 and [one["cell"] for one in json.loads(out)][0] == "old: m/none"
    assert tokbench_command("compare", old, new, "--format", "csv")[1].splitlines()[1].startswith("new: m/none,old: m/")
    for form in ("md", "rich"):
        code, out, _ = tokbench_command("compare", old, new, "--format", form)
        assert code == 0 and "−5.00" in out and "same" in out
    for words, part in [
        ((old,), "one run"),
        ((old, new, "--baseline", "old:tome/9"), "There are none, tome/constant:8, topk"),
        ((old, new, "--baseline", "odl:none"), "write RUN:CELL, such as old:none"),
        ((old, new, "--format", "xml"), "rich, md, csv, json"),
    ]:
        code, _, err = tokbench_command("compare", *words)
        assert code == 2 and err.count("\n") == 1 and part in err, err


# --- runs that are measured again: of the tiny model, and at the end of the bundled one

GRID = Grid(
    methods=(MethodSpec("tome", ("13",)), MethodSpec("evit", ("keep:0.6@1,2",))),
    options=RunOptions(device="cpu", batch_size=32, limit=32, only=("flops", "accuracy")),
)


@pytest.fixture(scope="module", autouse=True)
def _flops_are_counted_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        count_each_once(patch)
        yield


@pytest.fixture(scope="module")
def good_run(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("good") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stand_in_for_checks(patch, Source(32))
        run(GRID, path)
    return path


@pytest.fixture
def tiny(monkeypatch) -> Source:
    return stand_in_for_checks(monkeypatch, Source(32))


def test_the_unchanged_code_passes_on_a_subset_with_other_batches(tiny, good_run, tmp_path):
    found = check(good_run, limit=16, out=tmp_path / "again", limits=Limits(0, 0))
    assert found.passed, "\n".join(found.lines())
    assert found.scope == "3 cells on 16 of the baseline's 32 images of blobs"
    assert len(Predictions.load(RunFolder.open(found.run).prediction_path("bundled/none")).label) == 16
    # The two runs can be compared later, on what they have in common, but only if one says so.
    with pytest.raises(UserError, match=r"saw other images: 16 of blobs .* --limit 16"):
        check(good_run, found.run)
    assert check(good_run, found.run, limit=16, limits=Limits(0, 0)).passed
    assert check(good_run, found.run, limit=7).scope == "3 cells on 7 of the baseline's 32 images of blobs"
    with pytest.raises(UserError, match="--limit 17: the run .*again has only 16 images"):
        check(good_run, found.run, limit=17)


def test_a_baseline_that_was_continued_is_measured_again_as_a_whole(tiny, tmp_path):
    options = RunOptions(device="cpu", limit=6, only=("accuracy",))
    for method in (MethodSpec("tome", ("13",)), MethodSpec("topk", ("keep:0.6@2",))):
        run(Grid(methods=(method,), options=options), tmp_path / "run")
    found = check(tmp_path / "run", out=tmp_path / "again")
    assert found.passed and found.scope == "3 cells on 6 images of blobs"


def test_a_cell_measured_in_two_sessions_and_spellings_is_checked_as_one(tiny, tmp_path):
    for schedule, only in (("13", ("flops",)), ("constant:13", ("flops", "accuracy"))):
        options = RunOptions(device="cpu", limit=6, only=only)
        run(Grid(methods=(MethodSpec("tome", (schedule,)),), options=options), tmp_path / "run")
    found = check(tmp_path / "run", tmp_path / "run", limits=Limits(0, 0))
    assert found.passed and found.scope == "2 cells on 6 images of blobs" and len(found.verdicts) == 5 * 2


def test_the_check_never_takes_up_an_earlier_run(tiny, good_run):
    with pytest.raises(UserError, match="holds a run already"):
        check(good_run, out=good_run)


def test_nothing_is_measured_where_weights_or_images_are_not_the_baselines(tiny, good_run, tmp_path, monkeypatch):
    from tokbench.running import runner

    monkeypatch.setattr(runner, "run", lambda *args, **kwargs: pytest.fail("it ran"))
    for field, part in (
        ("weights_sha256", "weights of model bundled"),
        ("data_fingerprint", "images of data 'bundled'"),
    ):
        copy = Path(shutil.copytree(good_run, tmp_path / field))
        records = [json.loads(line) | {field: "01" * 32} for line in (copy / "records.jsonl").read_text().splitlines()]
        (copy / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        with pytest.raises(UserError, match=f"the {part} are not those of .*{field}: sha256 .* there"):
            check(copy, out=tmp_path / "out")
    with pytest.raises(UserError, match="--limit 33: the run .* has only 32 images"):
        check(good_run, limit=33, out=tmp_path / "out")
    with pytest.raises(UserError, match="at least 1"):
        check(good_run, limit=0, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def again(tiny, good_run, tmp_path, monkeypatch) -> Callable[..., RunOptions]:
    """With which options the check measures a baseline again that says of itself what `manifest` says."""
    from tokbench.running import runner

    def asked(device: str | None = None, limits: Limits | None = None, only: str = "accuracy", **manifest: Any) -> Any:
        base = Path(shutil.copytree(good_run, tmp_path / "base", dirs_exist_ok=True))
        own = json.loads((base / "manifest.json").read_text())
        own["grid"]["options"] |= {"device": "auto", "batch_size": "auto", "only": [only]}
        (base / "manifest.json").write_text(json.dumps(own | manifest))
        record = {"kind": "speed", "speedup": 1.0, "speedup_low": 0.9, "speedup_high": 1.1}
        RunFolder.open(base).append(RunFolder.open(base).records()[0].plain() | record)
        given = []

        def remember(grid: Grid, out: Path, *, options: RunOptions, **_: Any) -> None:
            given.append(options)
            shutil.copytree(base, out, dirs_exist_ok=True)

        monkeypatch.setattr(runner, "run", remember)
        check(base, device=device, limits=limits, out=tmp_path / f"again-{len(list(tmp_path.iterdir()))}")
        return given[0]

    return asked


def test_a_baseline_is_measured_again_where_and_as_it_was(again, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    same, moved = again(**conditions()), again(device="cuda", **conditions())
    assert (same.device, same.batch_size) == ("cpu", "auto")  # though "auto" would take the GPU now
    assert (moved.device, moved.batch_size) == ("cuda", 16)  # where "auto" would take more
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu = conditions("cuda", "H200", batch_size=128)
    with pytest.raises(UserError, match=r"was measured on H200 \(cuda\), and PyTorch sees no such .*; --device cpu"):
        again(**gpu)
    assert (again(device="cpu", **gpu).batch_size) == 128
    with pytest.raises(UserError, match="'cuda': PyTorch sees no CUDA device here"):
        again(device="cuda", **gpu)


def test_speed_is_not_measured_again_on_other_hardware_to_be_compared(again):
    with pytest.raises(UserError, match=r"--max-slowdown: .* as CPU and threads decide them: cpu A → "):
        again(limits=Limits(max_slowdown=5), only="speed", **conditions(kernels=kernels_on(torch.device("cpu"))))


# --- the command


def test_the_command_exits_with_1_when_something_moved_and_2_for_bad_input(tokbench_command, make_run, tmp_path):
    old, new = make_run("old"), make_run("new", CELLS | {("tome", "constant:8"): answers(60)})
    code, out, err = tokbench_command("check", new, "--baseline", old, "--junit", tmp_path / "report.xml")
    assert (code, err) == (1, "")
    assert "\nFAIL  top-1 " in out and out.endswith("failed: top-1, flips, in 1 of 3 cells\n")
    assert (tmp_path / "report.xml").is_file()
    assert tokbench_command("check", new, "--baseline", new)[0] == 0
    for words, part in [
        ((new,), "--baseline"),
        ((new, "--baseline", tmp_path / "odl"), "'old'"),
        ((new, "--baseline", old, "--out", "x"), "--out"),
        ((new, "--baseline", old, "--max-drop", "-1"), "--max-drop"),
        ((new, "--baseline", old, "--junit", tmp_path), "it is a folder"),
    ]:
        code, _, err = tokbench_command("check", *words)
        assert code == 2 and err.count("\n") == 1 and part in err


def test_a_refusal_to_compare_is_2_and_a_run_that_stopped_3(tokbench_command, tiny, good_run, monkeypatch, tmp_path):
    from tokbench.errors import RunStopped
    from tokbench.running import runner

    def remembered(grid: Grid, out: Path, *, progress: Any, **kwargs: Any) -> None:
        """A run that began as it should, and then was measured with other weights."""
        shutil.copytree(good_run, out)
        records = [json.loads(line) | {"weights_sha256": "01" * 32} for line in (out / "records.jsonl").open()]
        (out / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        progress.started(RunFolder.open(out), 4, 8)

    def stopped(grid: Grid, out: Path, *, progress: Any, **kwargs: Any) -> None:
        remembered(grid, out, progress=progress)
        raise RunStopped("cannot write to the run folder")

    for way, expected, part in ((remembered, 2, "other weights"), (stopped, 3, "cannot write")):
        monkeypatch.setattr(runner, "run", way)
        code, _, err = tokbench_command("check", "--baseline", good_run, "--out", tmp_path / way.__name__)
        assert (code, err.count("\n")) == (expected, 1) and part in err


# Another CPU rounds differently: of 32 images one may flip, which is 3.1 points. A wrong sign costs 47 and 62 points.
OURS = ("--limit", 32, "--max-drop", 3.2, "--max-flips", 3.2)


def part_of_reference(path: Path, keep: Callable[[str, str], bool]) -> Path:
    """A copy of the reference run with the methods and schedules that are kept, and its unreduced model."""
    copy = Path(shutil.copytree(REFERENCE, path))
    manifest = json.loads((copy / "manifest.json").read_text())
    for method in manifest["grid"]["methods"]:
        method["schedules"] = [one for one in method["schedules"] if keep(method["name"], one)]
    grid = manifest["grid"]
    grid["methods"] = [one for one in grid["methods"] if one["name"] == "none" or one["schedules"]]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    records = [json.loads(line) for line in (copy / "records.jsonl").read_text().splitlines()]
    kept = [one for one in records if one["method"] == "none" or keep(one["method"], one["schedule"])]
    (copy / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    return copy


def kept(*methods: str, at: Collection[str] = ("flops:0.35",)) -> Callable[[str, str], bool]:
    return lambda method, schedule: method in methods and schedule in at


@pytest.mark.parametrize(
    "keep",
    [
        kept("tome", "evit"),
        pytest.param(kept(*METHODS, at=("flops:0.35", "flops:0.5")), marks=pytest.mark.slow),  # the README's own check
    ],
    ids=["some", "all"],
)
def test_this_code_says_what_the_reference_run_says(tokbench_command, tmp_path, keep):
    """Our own check: `tokbench check --baseline results/reference`, on as many images as take well under a minute."""
    reference = part_of_reference(tmp_path / "reference", keep)
    words = ["--baseline", reference, *OURS, "--out", tmp_path / "run"]
    code, out, err = tokbench_command("check", *words)
    assert code == 0, f"tokbench check {' '.join(map(str, words))}\n{out}{err}"


def match_the_least_similar(metric: torch.Tensor, prefix: int, r: int):
    """Bipartite matching with the sign of every similarity wrong."""
    sign = torch.ones(metric.shape[1], 1)
    sign[::2] = -1
    return bipartite_match(metric * sign, prefix, r)


def test_a_wrong_sign_in_the_matching_fails_our_own_check_at_its_settings(tokbench_command, monkeypatch, tmp_path):
    from tokbench.fusion import tome

    copy = part_of_reference(tmp_path / "reference", kept("tome", "evit"))
    monkeypatch.setattr(tome, "bipartite_match", match_the_least_similar)
    code, out, err = tokbench_command("check", "--baseline", copy, *OURS, "--out", tmp_path / "run")
    assert code == 1, out + err
    # What does not match tokens by it stands: the unreduced model and EViT, and what tokens cost.
    assert {line.split()[1] for line in out.splitlines() if line.startswith("FAIL")} == {"top-1", "flips"}, out
    assert "bundled/tome/flops:0.35: " in out and "bundled/evit" not in out and "bundled/none" not in out, out
