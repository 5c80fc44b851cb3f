"""The decision from a run: who wins, by which end of the interval, what is said, and that the printed Python works."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from made_run import make_run
from safetensors.torch import save_file
from stand_ins import count_each_once, plain_records

import tokbench
from tokbench.config import Grid, MethodSpec, ModelSpec, RunOptions
from tokbench.errors import UserError
from tokbench.fusion.core import METHODS
from tokbench.plugins import LOADED
from tokbench.report.pick import Pick, pick_cells
from tokbench.results.cell import Cell
from tokbench.results.folder import RunFolder
from tokbench.running.runner import run as run_grid

# test_report's cells: drop [interval], speed-up [× 100/101, × 100/99], GFLOPs
#   tome constant:8        0.2 [-0.3, 0.7]    1.30   0.30
#   tome constant:13       2.0 [1.0, 3.0]     1.70   0.20
#   topk keep:0.7@3,6,9    3.0 [2.0, 4.0]     1.80   0.22
#   random constant:13    10.0 [8.0, 12.0]    1.65   0.21


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def without(path: Path, *kinds: str, cell: str = "") -> Path:
    """Take records of these kinds out of a run."""
    lines = [json.loads(line) for line in (path / "records.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["kind"] not in kinds or cell not in line["cell"]]
    (path / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    return path


def changed(path: Path, kind: str, cell: str = "", gone: tuple[str, ...] = (), **fields: Any) -> Path:
    """Change fields of the records of a kind: to a value, or by what a function makes of the record."""
    lines = [json.loads(line) for line in (path / "records.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == kind and cell in line["cell"]:
            line |= {key: value(line) if callable(value) else value for key, value in fields.items()}
            for key in gone:
                del line[key]
    (path / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


LABELED = ("correct", "top1", "top1_low", "top1_high", "top5", "drop", "drop_low", "drop_high", "mcnemar_p")


def unlabeled(path: Path) -> Path:
    """As a run on images without labels is: the cells agree with the model the less they hold of its top-1."""
    return changed(
        changed(path, "accuracy", agreement=lambda line: 1 - line["drop"] / 100,
                agreement_low=lambda line: 1 - line["drop_high"] / 100,
                agreement_high=lambda line: min(1, 1 - line["drop_low"] / 100)), "accuracy", gone=LABELED)  # fmt: skip


def only(path: Path, **limits: float) -> Pick:
    (found,) = pick_cells(path, **limits)
    return found


def name(cell: Cell | None) -> str:
    return "" if cell is None else cell.id.partition("/")[2].rstrip("/")


@pytest.mark.parametrize(
    ("limits", "best", "other", "meets"),
    [
        # The fastest within a drop, and the ends of intervals decide, not the points: 2.0 may be 3.0.
        ({"max_drop": 3.0}, "tome/constant:13", "tome/constant:8", True),
        ({"max_drop": 2.9}, "tome/constant:8", "none", True),
        ({"max_drop": 4.0}, "topk/keep:0.7@3,6,9", "tome/constant:13", True),
        # The most accurate within a cost; 1.70 may be 1.683.
        ({"min_speedup": 1.68}, "tome/constant:13", "topk/keep:0.7@3,6,9", True),
        ({"min_speedup": 1.69}, "topk/keep:0.7@3,6,9", "tome/constant:13", False),
        ({"max_gflops": 0.22}, "tome/constant:13", "topk/keep:0.7@3,6,9", True),
        ({"max_gflops": 0.4}, "none", "tome/constant:8", True),
        # Together: the fastest of what meets both.
        ({"max_drop": 5.0, "max_gflops": 0.21}, "tome/constant:13", "topk/keep:0.7@3,6,9", False),
        # Nothing: what misses by the least.
        ({"max_drop": 0.5}, "", "tome/constant:8", False),
        ({"min_speedup": 2.0}, "", "topk/keep:0.7@3,6,9", False),
        ({"max_drop": 1.0, "max_gflops": 0.25}, "", "tome/constant:8", False),
    ],
)
def test_who_wins_and_who_comes_next(made, limits, best, other, meets):
    found = only(made, **limits)
    assert (name(found.best), name(found.other), found.other_meets) == (best, other, meets)


def test_the_text_says_the_rule_the_numbers_and_why_the_other_lost(made):
    text = only(made, max_drop=3.0).text()
    assert "Asked for: a drop of at most 3 points of top-1." in text
    assert "Pick: ToMe at r=13 (drop 2.0 points [1.0, 3.0], 1.70× [1.68, 1.72] the speed, 0.2 GFLOPs)." in text
    assert "It is the fastest of 3 that meet the limits" in text
    assert "Runner-up: ToMe at r=8 (" in text and "slower: at worst 1.29× the speed, against at worst 1.68×" in text
    assert text.endswith(
        'import tokbench\nmodel = tokbench.load_model("bundled")\ntokbench.apply(model, "tome", "constant:13")'
    )
    text = only(made, max_drop=0.5).text()
    assert "Nothing meets that.\nNearest: ToMe at r=8" in text and "import" not in text
    assert "at worst 0.70 points, 0.2 more than the limit of 0.5." in text


def test_an_unsure_win_says_so(made):
    text = only(made, min_speedup=1.68).text()
    assert "a drop of at worst 4.00 points, against a drop of at worst 3.00 points; the intervals overlap" in text
    assert "overlap" not in only(made, max_drop=4.0).text()


def test_a_limit_that_so_few_images_cannot_show_is_told(made):
    assert "even a cell with the unreduced model's every answer may lose 0.38 points" in only(made, max_drop=0.3).text()
    assert not only(made, max_drop=0.39).notes


def test_without_speed_flops_decide_and_near_equal_flops_do_not(made):
    without(made, "speed")
    found = only(made, max_drop=13.0)
    assert name(found.best) == "tome/constant:13"
    assert "the one with the fewest FLOPs" in found.rule and "need not be faster" in found.text()
    # random takes 0.4 % more than tome does now, which is nothing; its drop is what tells them apart.
    lines = (made / "records.jsonl").read_text().replace('"flops": 210000000', '"flops": 199200000')
    (made / "records.jsonl").write_text(lines)
    found = only(made, max_drop=13.0)
    assert (name(found.best), name(found.other)) == ("tome/constant:13", "random/constant:13")
    assert "equal in FLOPs, but less accurate" in found.why


def test_what_is_not_faster_than_the_unreduced_model_answers_no_accuracy_limit(made):
    lines = [json.loads(line) for line in (made / "records.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "speed":
            line.update(speedup=1.0, speedup_low=0.98, speedup_high=1.02)
    (made / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = only(made, max_drop=3.0)
    assert found.best is None and "not surely faster than the unreduced model" in found.why


def test_a_cell_that_failed_is_left_out_and_named(made):
    found = only(without(made, "speed", cell="topk"), max_drop=4.0)
    assert name(found.best) == "tome/constant:13"
    assert found.notes == ["left out: top-k at keep 0.7@3,6,9 (no speed measured)"]


def test_latency_is_judged_by_the_upper_end_of_its_interval_and_by_the_median_where_there_is_none(made):
    changed(made, "speed", latency_ms=lambda line: 1000 / line["throughput"])  # 1000/170 = 5.88 ms
    found = only(made, max_latency_ms=5.9)
    assert name(found.best) == "tome/constant:13" and "a median latency at batch 1 of at most 5.9 ms" in found.asked
    assert found.notes == ["the run has no interval of the latency: that limit is held against the median itself"]
    changed(made, "speed", latency_low_ms=lambda line: 0.98 * line["latency_ms"],
            latency_high_ms=lambda line: 1.02 * line["latency_ms"])  # fmt: skip
    found = only(made, max_latency_ms=5.9)
    assert name(found.best) == "topk/keep:0.7@3,6,9"
    assert found.notes == ["topk is a control, there to be beaten"]
    assert "a median latency of at worst 6.00 ms, 0.1 more than the limit of 5.9" in found.why
    changed(made, "speed", "topk", latency_low_ms=None, latency_high_ms=None)
    assert "of the latency of top-k at keep 0.7@3,6,9: that limit" in only(made, max_latency_ms=5.9).notes[0]


def test_images_without_labels_are_judged_by_agreement(made):
    unlabeled(made)
    with pytest.raises(UserError, match="--max-drop: .* had images without labels.* ask for --min-agreement or --min"):
        pick_cells(made, max_drop=1.0)
    # The lower ends: 99.3, 97, 96 and 88.
    found = only(made, min_agreement=97.0)
    assert (name(found.best), name(found.other)) == ("tome/constant:13", "tome/constant:8")
    assert "It is the fastest of 3" in found.text() and "agreement 98.0 % [97.0, 99.0]" in found.text()
    found = only(made, min_agreement=99.5)
    assert found.best is None and found.misses == {"min_agreement": pytest.approx(0.2)}
    assert "at worst 99.30 % agreement, 0.2 less than the limit of 99.5" in found.why
    found = only(made, max_gflops=0.25)
    assert name(found.best) == "tome/constant:13" and "in most agreement with the unreduced model" in found.rule
    assert "agrees on 99.62 % only" in only(made, min_agreement=99.9).notes[0]


def test_a_model_without_classes_is_judged_by_its_features(made):
    changed(made, "accuracy", similarity=lambda line: 1 - line["drop"] / 100, gone=("agreement",),
            similarity_low=lambda line: 1 - line["drop_high"] / 100, similarity_high=1.0)  # fmt: skip
    changed(made, "accuracy", gone=LABELED)
    for limit in ("max_drop", "min_agreement"):
        with pytest.raises(UserError, match="no classes; ask for --min-speedup or --max-gflops instead"):
            pick_cells(made, **{limit: 1.0})
    found = only(made, max_gflops=0.25)
    assert name(found.best) == "tome/constant:13" and "cosine of features 0.9800 [0.9700, 1.0000]" in found.text()
    assert found.why.startswith(
        "further away in features: a cosine of at worst 0.9600, against a cosine of at worst 0.97"
    )


def test_what_gave_nan_or_failed_is_never_picked_and_the_reason_is_told(made):
    changed(made, "accuracy", "tome/constant:13", nonfinite=3)
    failure = {"kind": "failure", "phase": "speed", "message": "out of memory"}
    with open(made / "records.jsonl", "a") as file:
        same = json.loads((made / "records.jsonl").read_text().splitlines()[-1])
        same = {key: same[key] for key in ("schema", "model", "weights_sha256", "input_size", "params", "schedule")}
        file.write(json.dumps(same | failure | {"cell": "bundled/random/constant:13", "method": "random"}) + "\n")
    found = only(made, max_drop=20.0)
    assert name(found.best) == "topk/keep:0.7@3,6,9" and name(found.other) == "tome/constant:8"
    assert found.notes == [
        "left out: ToMe at r=13 (NaN or infinite for 3 of 1,000 images); random:seed=1 at r=13 (failed: out of memory)",
        "topk is a control, there to be beaten",
    ]
    changed(made, "accuracy", nonfinite=1000)
    with pytest.raises(UserError, match="has no cell of bundled to pick: ToMe at r=8, .* infinite for 1,000 of 1,000"):
        pick_cells(made, max_gflops=1.0)


def test_a_run_that_has_measured_nothing_yet_is_refused(tmp_path):
    RunFolder.create(tmp_path / "run", {})
    with pytest.raises(UserError, match="measured nothing yet"):
        pick_cells(tmp_path / "run", max_drop=1.0)


def test_a_limit_as_precise_as_the_value_is_met(made):
    changed(made, "flops", "tome/constant:8", flops=353521440)  # 0.35352144000000003 GFLOPs
    changed(made, "flops", "none", flops=700000000)
    assert name(only(made, max_gflops=0.35352144).best) == "tome/constant:8"


@pytest.mark.parametrize(
    ("limits", "gone", "message"),
    [
        ({}, (), "--max-drop, --min-agreement, --min-speedup, --max-latency-ms, --max-gflops"),
        ({"max_latency_ms": 5.0}, (), "--max-latency-ms: .* not measured latency.* --max-drop or --min-speedup or --m"),
        ({"min_agreement": 90.0}, (), "--min-agreement: the run .* knows no interval of agreement"),
        ({"min_agreement": 101.0}, (), "--min-agreement is a percentage: at most 100, not 101"),
        ({"min_speedup": 2.0}, ("speed",), "--min-speedup: .* has not measured speed"),
        ({"max_drop": 2.0}, ("accuracy",), "--max-drop: .* has not measured accuracy"),
        ({"max_gflops": 2.0}, ("accuracy",), "the run .* has not measured accuracy"),
        ({"max_drop": 2.0}, ("flops", "speed"), "neither speed nor FLOPs"),
        ({"max_gflops": 0.0}, (), "--max-gflops must be a number above 0"),
        ({"max_drop": float("nan")}, (), "--max-drop must be a number"),
    ],
)
def test_a_limit_that_cannot_be_judged_is_refused(made, limits, gone, message):
    with pytest.raises(UserError, match=message):
        pick_cells(without(made, *gone), **limits)


def test_two_models_get_a_decision_each(made):
    other = make_run(made.parent / "other", model="large", weights_sha256="ff")
    with open(made / "records.jsonl", "a") as file:
        file.write((other / "records.jsonl").read_text())
    assert [name(found.best) for found in pick_cells(made, max_drop=3.0)] == ["tome/constant:13"] * 2
    without(made, "speed", cell="large/")
    first, second = pick_cells(made, min_speedup=1.5)
    assert first.best is not None and second.model == "large" and second.best is None
    assert "No answer: --min-speedup: the run" in second.text() and second.to_dict()["why"] == second.why
    for kind in ("accuracy", "flops"):
        changed(made, kind, "large/", dtype="fp8")
    second = pick_cells(made, max_drop=3.0)[1]
    assert second.best is None and "made in 'fp8', which" in second.why


def test_the_command_exits_with_1_when_nothing_meets_it(tokbench_command, made):
    code, out, err = tokbench_command("pick", made, "--max-drop", 3, "--json")
    (found,) = json.loads(out)
    assert (code, err) == (0, "") and found["met"] and found["nearest"] is None
    assert found["pick"]["cell"] == "bundled/tome/constant:13" and found["runner_up"]["speedup"] == 1.3
    assert found["pick"]["params"] == {} and found["limits"] == {"max_drop": 3}
    code, out, _ = tokbench_command("pick", made, "--max-drop", 0.5, "--json")
    (found,) = json.loads(out)
    assert code == 1 and not found["met"] and found["pick"] is None and found["runner_up"] is None
    assert found["nearest"]["cell"] == "bundled/tome/constant:8"
    assert found["misses"] == {"max_drop": pytest.approx(0.2)} and "0.2 more than the limit" in found["why"]
    assert tokbench_command("pick", made, "--max-drop", 0.5)[0] == 1
    code, _, err = tokbench_command("pick", made)
    assert code == 2 and err.count("\n") == 1


def test_the_printed_python_makes_the_measured_cell(tmp_path, monkeypatch):
    count_each_once(monkeypatch)
    grid = Grid(
        methods=(MethodSpec("tome", ("flops:0.5",), {"prop_attn": False}),),
        options=RunOptions(device="cpu", limit=4, only=("flops", "accuracy")),
    )
    run_grid(grid, tmp_path / "run")
    found = only(tmp_path / "run", max_gflops=0.2)
    scope: dict[str, Any] = {}
    exec(found.code, scope)
    with torch.inference_mode():
        scope["model"](torch.rand(1, 1, 56, 56))
    record = plain_records(tmp_path / "run")[1]
    assert len(found.code.splitlines()) == 3 and "prop_attn=False" in found.code and record["method"] == "tome"
    assert tokbench.tokens_per_block(scope["model"]) == record["tokens"]


def test_the_python_names_checkpoint_size_device_and_dtype(tmp_path):
    path = make_run(tmp_path / "run", dtype="bf16", device="cuda", params={"prune_blocks": "auto"},
                    calibrated={"images": 32, "prune_blocks": [0, 1], "min_norm": 1})  # fmt: skip
    manifest = json.loads((path / "manifest.json").read_text())
    spec = {"name": "vit_tiny", "checkpoint": "it's mine.pth", "input_size": 384, "label": "bundled"}
    (path / "manifest.json").write_text(json.dumps(manifest | {"grid": {"models": [spec]}}))
    lines = only(path, max_drop=3.0).code.splitlines()
    assert lines[1] == (
        'model = tokbench.load_model("vit_tiny", "it\'s mine.pth", input_size=384).to("cuda").bfloat16()'
    )
    assert lines[2] == 'tokbench.apply(model, "tome", "constant:13", prune_blocks=[0, 1])'


@pytest.mark.filterwarnings("ignore:.*chance level")
def test_the_printed_python_loads_a_checkpoint_a_size_and_a_dtype(tmp_path):
    weights = tmp_path / 'it\'s "mine".safetensors'
    save_file(tokbench.load_model().state_dict(), weights)
    grid = Grid(
        models=(ModelSpec("bundled", weights, 48),),
        methods=(MethodSpec("evit", ("keep:0.5@3",)),),
        options=RunOptions(device="cpu", dtype="bf16", limit=4, only=("flops", "accuracy")),
    )
    run_grid(grid, tmp_path / "run")
    scope: dict[str, Any] = {}
    exec(only(tmp_path / "run", max_gflops=0.2).code, scope)
    with torch.inference_mode():
        scope["model"](torch.rand(1, 1, 48, 48, dtype=torch.bfloat16))
    assert tokbench.tokens_per_block(scope["model"]) == plain_records(tmp_path / "run")[1]["tokens"]


def test_the_printed_python_loads_a_plugin(tokbench_command, tmp_path, monkeypatch):
    plugin = tmp_path / "own methods.py"
    plugin.write_text((Path(__file__).parents[1] / "docs" / "my_method.py").read_text())

    def forget() -> None:
        for known, key in ((METHODS, "long-keys"), (LOADED, plugin.name), (sys.modules, "tokbench_plugin_own methods")):
            monkeypatch.setitem(known, key, None)  # so that it is not there afterwards, either
            del known[key]

    forget()
    words = ["--plugin", plugin, "--method", "long-keys:power=0.5", "--schedule", "13", "--limit", 4]
    code, *told = tokbench_command("run", *words, "--only", "flops,accuracy", "--out", tmp_path / "run")
    assert code == 0, told
    forget()
    found, scope = only(tmp_path / "run", max_gflops=0.3), dict[str, Any]()
    exec(found.code, scope)
    assert scope["model"].fusion.method.name == "long-keys" and scope["model"].fusion.method.power == 0.5
    assert found.code.splitlines()[2] == f'load_plugins(["{plugin}"])' and not found.notes
    plugin.write_text(plugin.read_text() + "# changed\n")
    assert only(tmp_path / "run", max_gflops=0.3).notes == [
        f"the plugin {str(plugin)!r} is no longer the file that the run loaded"
    ]
    plugin.unlink()
    assert "is not found from this folder" in only(tmp_path / "run", max_gflops=0.3).notes[0]


def test_a_method_of_nobody_known_has_to_be_registered_first(tmp_path):
    found = only(make_run(tmp_path / "run", method="mine"), max_gflops=0.25)
    assert "register it before these lines" in found.text() and "load_plugins" not in found.code


def test_nothing_in_a_run_gets_into_the_python_as_code(tmp_path):
    bad = 'x")\nimport os\nos.abort() #'
    path = make_run(tmp_path / "run", model=bad, device=bad, params={bad: bad, "class": [True, None], "a": 1e-9})
    lines = ast.parse(only(path, max_drop=3.0).code).body
    assert [type(line) for line in lines] == [ast.Import, ast.Assign, ast.Expr]
    call: Any = lines[2]
    given = {word.arg: ast.literal_eval(word.value) for word in call.value.keywords}
    assert given == {"a": 1e-9, None: {bad: bad, "class": [True, None]}}
    in_one_line = bad.replace("\n", "\\n")  # as names are read from records
    assert in_one_line in {node.value for node in ast.walk(lines[1]) if isinstance(node, ast.Constant)}
    (path / "manifest.json").write_text(json.dumps({"schema": 1, "command": "'", "plugins": {bad: bad}}))
    assert only(path, max_drop=3.0).best is not None
    with pytest.raises(UserError, match="made in 'fp8', which"):
        pick_cells(make_run(tmp_path / "other", dtype="fp8"), max_drop=3.0)


def test_speed_of_compiled_models_takes_compiled_models(made):
    changed(made, "speed", runtime="compile")
    found = only(made, max_drop=3.0)
    assert found.code.endswith("\nmodel.compile(dynamic=False, fullgraph=True)") and "compiled" in found.notes[-1]


def test_what_is_known_of_a_speed_goes_first_and_what_was_passed_over_is_said(made: Path) -> None:
    changed(made, "speed", "topk", caveats=["vague"])
    (found,) = pick_cells(made, max_drop=20)
    assert found.best and (found.best.method, found.best.schedule) == ("tome", "constant:13")
    assert "passed over, as their speed is known less well: top-k at keep 0.7@3,6,9 (1.80× [1.78, 1.82])" in found.notes
    changed(made, "speed", caveats=["busy"])  # where there was a warning of all, none is passed over
    (found,) = pick_cells(made, max_drop=20)
    assert found.best and found.best.method == "topk" and not any("passed over" in note for note in found.notes)


def test_a_doubtful_cell_that_is_surely_faster_is_better_than_none(made: Path) -> None:
    changed(made, "speed", "topk", caveats=["vague"])
    for cell in ("tome", "random"):
        changed(made, "speed", cell, speedup=1.0, speedup_low=0.9, speedup_high=1.1)
    (found,) = pick_cells(made, max_drop=20)
    assert found.best and found.best.method == "topk"


def test_of_those_that_cannot_be_told_apart_the_most_accurate_is_picked_whatever_the_noise(made: Path) -> None:
    for least, most in ((1.65, 2.0), (1.69, 1.9)):  # which of the two is ahead at worst is chance
        changed(made, "speed", "topk", speedup_low=least, speedup_high=most)
        changed(made, "speed", "tome/constant:13", speedup_low=1.67, speedup_high=1.75)
        found = only(made, max_drop=4.5)
        assert name(found.best) == "tome/constant:13" and "and of those the most accurate" in found.rule
        assert found.to_dict()["alike"] == ["bundled/topk/keep:0.7@3,6,9"]
        assert "the speed of top-k at keep 0.7@3,6,9 cannot be told from that of the fastest" in found.notes
    assert found.why.startswith("not to be told apart in speed, but less accurate: ")
    # Of what is known less well, none is picked for its accuracy.
    changed(made, "speed", "tome/constant:13", caveats=["vague"])
    found = only(made, max_drop=4.5)
    assert name(found.best) == "topk/keep:0.7@3,6,9"
    assert found.to_dict()["alike"] == ["bundled/tome/constant:13"]


def test_what_may_be_faster_than_the_unreduced_model_is_named_where_nothing_surely_is(made: Path) -> None:
    changed(made, "speed", speedup_low=0.9, speedup_high=0.95)
    changed(made, "speed", "tome/constant:8", speedup_low=0.9, speedup_high=1.7)
    found = only(made, max_drop=4.5)
    assert found.best is None and found.to_dict()["alike"] == ["bundled/tome/constant:8"]
    assert "the speed of ToMe at r=8 cannot be told from that of the unreduced model" in found.text()
