"""What is said of measured cells: as much as the intervals allow, and every case of what was not measured."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from made_run import changed, make_run
from stand_ins import plain_records

from tokbench.report.findings import findings
from tokbench.results.cell import Cell, Figure
from tokbench.results.folder import RunFolder
from tokbench.results.table import load_cells

UNTOLD = {name: None for name in ("top1", "drop")}


def told(cells: list[Cell]) -> str:
    return "\n".join(sentence for finding in findings(cells) for sentence in finding.sentences)


def said(*runs: Path) -> str:
    return told(load_cells(runs))


def each(cells: list[Cell], metric: str, values: Iterable[float], reach: float | None = None) -> list[Cell]:
    """Copies of the cells with a value each, and an interval that reaches so far."""
    return [
        changed([cell], {metric: Figure(value) if reach is None else Figure(value, value - reach, value + reach)})[0]
        for cell, value in zip(cells, values, strict=True)
    ]


def only(run: Path, out: Path, keep: Any, **changed: Any) -> Path:
    """A run of those records of another that `keep` accepts, with fields changed."""
    folder = RunFolder.create(out, RunFolder.open(run).manifest.plain())
    for record in plain_records(run):
        if keep(record):
            folder.append({**record, **changed})
    return out


def test_findings_are_as_strong_as_the_intervals(run: Path) -> None:
    text = said(run)
    assert "Unreduced, the model has 80.0 % top-1, 0.4 GFLOPs an image (multiply-adds) and 100 images/s." in text
    assert "Of 4 reduced cells, 1 cannot be told from the unreduced model in top-1 and 3 lose top-1" in text
    assert (
        "That one is ToMe at r=8: on this CPU 1.30× [1.29, 1.31] the unreduced model's speed, drop 0.2 points" in text
    )
    assert "fastest cell on this CPU is top-k at keep 0.7@3,6,9: 1.80× [1.78, 1.82]" in text
    assert "with a loss of 3.0 points of top-1 [2.0, 4.0]" in text
    assert "random:seed=1 is never on it" in text
    assert "known to about ±1.0 points" in text


def test_the_answer_is_the_fastest_cell_without_a_significant_loss(cells: list[Cell]) -> None:
    def answer(*figures: tuple[str, Figure | None], of: list[Cell] = cells, **fields: Any) -> str:
        return findings(changed(of, dict(figures), **fields))[0].answer

    assert answer() == (
        "ToMe at r=8 makes bundled 1.30 times as fast [1.29, 1.31] on this CPU in batches of 32, with no loss of "
        "accuracy that 1,000 images can show: drop 0.2 points [−0.3, 0.7], so up to 0.7 may be lost."
    )
    assert answer(("drop", Figure(3, -10, 24.5)), images=20) == (
        "20 images cannot tell what is to be had without losing accuracy: top-k at keep 0.7@3,6,9, the fastest cell "
        "with no significant loss, may lose up to 24.5 points."
    )
    one = "One image at a time it is"
    slow = ("latency_speedup", Figure(0.84, 0.8, 0.9))
    assert answer(slow).endswith(f" {one} slower than the unreduced model: 0.84×.")
    alike = ("latency_speedup", Figure(1.05, 1.01, 1.09))
    assert answer(alike).endswith(f" {one} within 10 % of the unreduced model, by which runs differ: 1.05×.")
    vague = ("latency_speedup", Figure(1.12, 0.23, 1.15))
    assert answer(vague).endswith(" One image at a time it cannot be told from the unreduced model in speed: 1.12×.")
    assert "One image" not in answer(slow, batch_size=1)
    assert "One image" not in answer(("latency_speedup", Figure(1.2, 1.11, 1.3)))
    assert "One image" not in answer(("latency_speedup", Figure(1.0)))
    assert answer(("speedup", Figure(1.2, 0.9, 1.4))).startswith("Nothing that was tried makes bundled surely faster")
    untimed = answer(("speedup", None))
    assert untimed.startswith("ToMe at r=8 takes 75 % of the FLOPs of bundled, with no loss")
    assert "not measured" in untimed
    none = answer(("speedup", None), ("flops_ratio", Figure(1.0)))
    assert none.startswith("Nothing that was tried saves FLOPs of bundled with no loss")
    assert answer(of=[*cells[:1], *changed(cells[1:2], nonfinite=3), *cells[2:]]).startswith("Nothing that was tried")
    assert answer(("drop", Figure(0.2))) == ""


def test_where_a_control_wins_the_best_of_the_papers_methods_is_told(cells: list[Cell]) -> None:
    kept = changed(cells, {"drop": Figure(0.2, -1, 0.7)})
    answer = findings(kept)[0].answer
    assert answer.startswith("Top-k at keep 0.7@3,6,9 makes bundled 1.80 times as fast")
    assert answer.endswith(
        " Top-k is a control, there to be beaten; of the papers' methods it is ToMe at r=13, 1.70 times as fast "
        "[1.68, 1.72]."
    )
    lost = changed(kept, {"drop": Figure(2, 1, 3)})
    assert findings([*lost[:3], kept[3], lost[4]])[0].answer.endswith(
        " there to be beaten; no paper's method is surely faster without such a loss."
    )


def test_cells_of_two_runs_that_may_be_compared_are_told_apart(run: Path, tmp_path: Path) -> None:
    again = make_run(tmp_path / "again")
    text = said(run, again)
    assert "the model has in run 80.0 % top-1" in text and "the model has in again 80.0 %" in text
    assert "The fastest cell on this CPU is top-k at keep 0.7@3,6,9 in run: 1.80×" in text
    assert " in again" not in said(run, make_run(tmp_path / "gpu", device="cuda"))


def test_without_speed_the_findings_speak_of_flops(run: Path, tmp_path: Path) -> None:
    text = said(only(run, tmp_path / "slow", lambda record: record["kind"] != "speed"))
    assert "Speed was not measured" in text and "That one is ToMe at r=8: 75 % of the FLOPs" in text
    assert "images/s" not in text and "×" not in text


def test_without_accuracy_no_cost_is_claimed(run: Path, tmp_path: Path) -> None:
    text = said(only(run, tmp_path / "blind", lambda record: record["kind"] != "accuracy"))
    assert "Accuracy was not measured" in text and "fastest cell" in text
    assert "points" not in text and "cannot be told" not in text


def test_with_flops_alone_the_savings_are_told_and_nothing_else(run: Path, tmp_path: Path) -> None:
    text = said(only(run, tmp_path / "counted", lambda record: record["kind"] == "flops"))
    assert "The reduced cells take 50 to 75 % of its FLOPs." in text
    assert "Accuracy was not measured" in text and "Speed was not measured" in text and "front" not in text


def test_one_cell_is_spoken_of_in_the_singular(run: Path, tmp_path: Path) -> None:
    one = only(run, tmp_path / "one", lambda record: record["schedule"] in ("", "constant:8"))
    text = said(one)
    assert "The one reduced cell: it cannot be told from the unreduced model in top-1" in text
    assert not re.search(r"\b1 (cells|images)\b", text)
    alone = said(only(run, tmp_path / "alone", lambda record: record["method"] == "none"))
    assert "Nothing but the unreduced model was measured" in alone


def test_cells_that_all_equal_the_unreduced_model_are_spoken_of_without_ambiguity(run: Path, tmp_path: Path) -> None:
    same = only(run, tmp_path / "same", lambda record: True, drop=0.1, drop_low=-0.2, drop_high=0.4)
    assert "None of the 4 reduced cells can be told from the unreduced model in top-1 (95 %" in said(same)


def test_gains_and_slowdowns_are_called_so(run: Path, tmp_path: Path) -> None:
    slow = {
        "drop": -1.5,
        "drop_low": -2.0,
        "drop_high": -1.0,
        "speedup": 0.9,
        "speedup_low": 0.88,
        "speedup_high": 0.92,
    }
    base = only(run, tmp_path / "base", lambda record: record["method"] == "none")
    for record in plain_records(run):
        if record["schedule"] == "constant:8":
            known = {key: value for key, value in slow.items() if key in record}
            RunFolder.open(base).append({**record, **known})
    text = said(base)
    assert "The one reduced cell: it is better" in text and "with a gain of 1.5 points of top-1 [1.0, 2.0]" in text
    assert "Slower than the unreduced model: ToMe at r=8 (0.90×)." in text


def test_where_one_image_takes_no_less_time_the_findings_say_so(cells: list[Cell]) -> None:
    cells = each(cells, "latency_speedup", [1.0, 0.83, 0.99, 1.25, 1.43], 0.02)
    of = "One image at a time it is another story: of the {} cells faster than the unreduced model at batch 32, {}."
    slow, by = "1 is slower than it: ToMe at r=8 (0.83×)", "is within 10 % of it, by which runs differ"
    near = "ToMe at r=13 (0.99×)"
    assert of.format(4, f"{slow}; 1 {by}: {near}") in told(cells)
    assert of.format(3, f"1 {by}: {near}") in told([cells[0], *cells[2:]])
    two = [cells[0], *changed(cells[1:3], {"latency_speedup": Figure(0.8, 0.75, 0.85)})]
    assert "2 are slower than it: ToMe at r=8 (0.80×) and ToMe at r=13 (0.80×)." in told(two)
    assert "another story" not in told(changed(cells, {"latency_speedup": Figure(0.8)}))
    assert "another story" not in told([cells[0], *cells[3:]])
    assert "another story" not in told(changed(cells, {"speedup": Figure(1.2, 0.9, 1.4)}))  # nor in batches
    assert "another story" not in told(changed(cells, batch_size=1))
    one = "One image at a time the one cell faster than the unreduced model at batch 32 "
    assert f"{one}is slower than it: ToMe at r=8 (0.83×)." in told(cells[:2])
    assert f"{one}{by}: {near}." in told([cells[0], cells[2]])


def test_without_labels_the_findings_speak_of_agreement(cells: list[Cell]) -> None:
    cells = each(changed(cells, {**UNTOLD, "kl": Figure(0.0123)}), "agreement", [100, 98.5, 91, 90, 70], 1)
    text = told(cells)
    assert "Without labels top-1 is unknown" in text and "Accuracy was not measured" not in text
    assert "Of 4 reduced cells the agreement with the unreduced model is 70.0 to 98.5 %;" in text
    assert "it is the highest with ToMe at r=8: 98.5 % [97.5, 99.5], KL divergence 0.0123 nats." in text
    assert "unreduced model's speed, with the unreduced model's answer for 90.0 % of the images." in text
    assert (
        "On the front of agreement with the unreduced model against speed, by" in text and "top-1 against" not in text
    )


def test_of_a_backbone_the_features_are_compared(cells: list[Cell]) -> None:
    cells = each(changed(cells, {**UNTOLD, "agreement": None}), "similarity", [1, 0.99, 0.95, 0.9, 0.5])
    text = told(cells)
    assert (
        "The model has no classes" in text and "cosine to the unreduced model's features is 0.5000 to 0.9900;" in text
    )
    assert "with a cosine of 0.9000 to its features" in text
    one = told(cells[:2])
    assert "The one reduced cell has its cosine to the unreduced model's features at 0.9900." in one


def test_the_speed_limit_is_no_method_to_recommend(run: Path) -> None:
    speed = next(record for record in plain_records(run) if record["kind"] == "speed")
    limit = {"cell": "bundled/free/8", "method": "free", "schedule": "8", "speedup": 9.0, "speedup_low": 8.9}
    RunFolder.open(run).append({**speed, **limit, "speedup_high": 9.1, "throughput": 900.0})
    text = said(run)
    assert (
        "fastest cell on this CPU is top-k" in text and "free (speed limit) at r=8 runs at 9.00× [8.90, 9.10]" in text
    )


def test_failures_and_several_models_are_named(run: Path, tmp_path: Path) -> None:
    failure = {"kind": "failure", "cell": "bundled/tofu/8", "model": "bundled", "method": "tofu", "schedule": "8"}
    failure["phase"] = "setup"
    RunFolder.open(run).append({**failure, "message": "out of memory"})
    other = make_run(tmp_path / "other", model="deit", device="cuda")
    both = findings(load_cells([run, other]))
    assert [finding.title.split(",")[0] for finding in both] == ["bundled", "deit"]
    assert "1 cell failed (ToFu at r=8: out of memory)." in both[0].sentences
    assert any("on A GPU" in sentence for sentence in both[1].sentences)


def test_cells_that_cannot_be_told_apart_in_speed_or_gave_nan_are_named(cells: list[Cell]) -> None:
    unclear = changed(cells[1:2], {"speedup": Figure(1.01, 0.98, 1.03)})
    text = told([cells[0], *unclear, *cells[2:]])
    assert "Not to be told from the unreduced model in speed: ToMe at r=8 (1.01×)." in text.splitlines()
    text = told([cells[0], *changed(unclear, nonfinite=3), *cells[2:]])
    assert "NaN or infinite logits" in text and "ToMe at r=8 (3 of 1,000 images)." in text
    assert text.count("ToMe at r=8") == 1


def test_where_all_cells_lose_the_smallest_loss_is_told(cells: list[Cell]) -> None:
    lost = "The smallest loss is that of ToMe at r=13: {}a loss of 2.0 points of top-1 [1.0, 3.0]."
    assert lost.format("1.70× [1.68, 1.72] the unreduced model's speed, with ") in told([cells[0], *cells[2:]])
    untimed = changed([cells[0], *cells[2:]], {"speedup": None, "throughput": None})
    assert lost.format("50 % of the FLOPs, with ") in told(untimed)
    assert lost.format("") in told(changed(untimed, {"flops_ratio": None}))


def test_without_an_interval_a_drop_is_no_finding(cells: list[Cell]) -> None:
    text = told(changed(cells, {"drop": Figure(-3.0)}))
    assert "with a drop of −3.0 points (no interval)." in text and "cannot be told" not in text


def test_what_was_not_measured_of_the_unreduced_model_is_told(cells: list[Cell]) -> None:
    assert told(cells[1:]).startswith("The unreduced model was not measured, so no drop and no speed-up is known.")
    failed = changed(cells[:1], {name: None for name in cells[0].figures}, error="out of memory")
    assert told([*failed, *cells[1:]]).startswith("Of the unreduced model no figures are known.")


def doubted(cells: list[Cell], method: str, doubt: str = "vague") -> list[Cell]:
    """Copies of the cells with a warning about the timing of that method's."""
    return [changed([cell], caveats={"speed": (doubt,)} if cell.method == method else {})[0] for cell in cells]


def test_the_headline_prefers_speeds_that_are_known_and_the_list_agrees(cells: list[Cell]) -> None:
    kept = changed(cells, {"drop": Figure(0.1, -0.5, 0.7)})
    (finding,) = findings(kept)
    assert finding.answer.startswith("Top-k at keep 0.7@3,6,9 makes bundled 1.80 times as fast")
    (finding,) = findings(doubted(kept, "topk"))
    assert finding.answer.startswith("ToMe at r=13 makes bundled 1.70 times as fast")
    passed = "Passed over, as their speed is known less well: top-k at keep 0.7@3,6,9 (1.80× [1.78, 1.82])."
    assert finding.answer.endswith(passed)
    text = "\n".join(finding.sentences)
    assert "The fastest of the 4 with no significant loss is ToMe at r=13: on this CPU" in text
    assert "The fastest cell on this CPU is ToMe at r=13: 1.70×" in text and passed in text


def test_a_value_that_is_high_by_chance_is_neither_in_the_headline_nor_first_in_the_list(cells: list[Cell]) -> None:
    kept = changed(cells, {"drop": Figure(0.1, -0.5, 0.7)})
    wide = [changed([cell], {"speedup": Figure(2.5, 0.3, 7.6)})[0] if cell.method == "topk" else cell for cell in kept]
    (finding,) = findings(wide)
    text = "\n".join(finding.sentences)
    assert finding.answer.startswith("ToMe at r=13 makes") and "no significant loss is ToMe at r=13: on this" in text
    assert "fastest cell on this CPU is ToMe at r=13" in text and "Not to be told from the unreduced model" in text


def test_within_and_cannot_be_told_are_different_sentences(cells: list[Cell]) -> None:
    def alone(low: float, high: float, processes: int = 1) -> str:
        timed = changed(cells[:3], {"latency_speedup": Figure((low * high) ** 0.5, low, high)}, processes=processes)
        return told(timed)

    assert "2 are within 10 % of it, by which runs differ: " in alone(0.95, 1.05)
    assert "2 cannot be told from it in speed: " in alone(0.5, 2.0) and "within" not in alone(0.5, 2.0)
    assert "slower than it" in alone(0.5, 0.85) and "slower than it" not in alone(0.93, 0.97)
    # An interval over processes needs no allowance for how runs differ.
    assert "slower than it" in alone(0.93, 0.97, processes=5)
