"""The decision from a run: who wins, by which end of the interval, what is said, and that the printed Python works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_report import make_run

import tokbench
from tokbench.config import Grid, MethodSpec, RunOptions
from tokbench.errors import UserError
from tokbench.report.pick import Pick, pick_cells
from tokbench.runner import run as run_grid
from tokbench.store import RunFolder

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


def only(path: Path, **limits: float) -> Pick:
    (found,) = pick_cells(path, **limits)
    return found


def name(row: Any) -> str:
    return "" if row is None else row["cell"].partition("/")[2].rstrip("/")


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
    assert "Runner-up: ToMe at r=8 (" in text and "slower: down to 1.29× the speed, against down to 1.68×" in text
    assert text.endswith(
        'import tokbench\nmodel = tokbench.load_model("bundled")\ntokbench.apply(model, "tome", "constant:13")'
    )
    text = only(made, max_drop=0.5).text()
    assert "Nothing meets that.\nNearest: ToMe at r=8" in text and "0.70 points, and the limit is 0.5" in text
    assert "import" not in text


def test_an_unsure_win_says_so(made):
    text = only(made, min_speedup=1.68).text()
    assert "up to a drop of 4.00 points, against up to a drop of 3.00 points; the intervals overlap" in text
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
    assert found.notes == ["left out, not measured or failed: top-k at keep 0.7"]


@pytest.mark.parametrize(
    ("limits", "gone", "message"),
    [
        ({}, (), "--max-drop, --min-speedup, --max-latency-ms, --max-gflops"),
        ({"max_latency_ms": 5.0}, (), "--max-latency-ms: the run .* has not measured latency"),
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
    assert tokbench_command("pick", made, "--max-drop", 0.5)[0] == 1
    code, _, err = tokbench_command("pick", made)
    assert code == 2 and err.count("\n") == 1


def test_the_printed_python_makes_the_measured_cell(tmp_path):
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
    record = RunFolder.open(tmp_path / "run").records()[1]
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
