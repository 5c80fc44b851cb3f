"""Tables of a small made-up run."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
from made_run import changed, make_run
from rich.console import Console

from tokbench.errors import UserError
from tokbench.report.tables import print_table, render_table
from tokbench.results.cell import Cell, Figure
from tokbench.results.folder import RunFolder
from tokbench.results.table import filter_cells, load_cells, load_shown


def rich_text(cells: list[Cell], width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(render_table(cells, "rich", width=width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_drop_that_may_be_none_is_printed_and_said_to_be(cells: list[Cell]) -> None:
    markdown = render_table(cells, "md")
    assert "| 0.2 [−0.3, 0.7] n.s. |" in markdown and "| 2.0 [1.0, 3.0] |" in markdown
    assert "n.s.: cannot be told from no drop." in markdown


def test_digits_follow_the_number_of_images(tmp_path: Path) -> None:
    many = load_cells([make_run(tmp_path / "many", images=10_000)])
    assert "| 2.00 [1.00, 3.00] |" in render_table(many, "md")


def test_front_members_are_marked(cells: list[Cell]) -> None:
    lines = [line for line in render_table(cells, "md").splitlines() if line.startswith("| ")]
    assert [line.split("|")[-2].strip() for line in lines] == ["Front", "both", "both", "both", "speed", ""]


def test_the_best_for_its_cost_is_bold_in_files(cells: list[Cell]) -> None:
    assert "| **79.8** |" in render_table(cells, "md") and "| 70.0 |" in render_table(cells, "md")
    assert r"\textbf{79.8}" in render_table(cells, "tex") and r"\textbf{70.0}" not in render_table(cells, "tex")


@pytest.mark.parametrize("format", ["md", "csv", "json", "tex"])
def test_a_column_named_twice_is_shown_once(cells: list[Cell], format: str) -> None:
    once, twice = (
        render_table(cells, format, columns=names) for names in (["method", "top1"], ["method", "top1", "top1"])
    )
    assert twice == once
    # In LaTeX both name the method as the plots do.
    assert render_table(cells, "tex", columns=["variant", "method"]) == render_table(cells, "tex", columns=["method"])


def test_speed_ups_have_their_interval(cells: list[Cell]) -> None:
    assert "| 1.30× | [1.29, 1.31] |" in render_table(cells, "md")


@pytest.mark.parametrize(
    "filters, rows",
    [(["method=tome"], [1, 2]), (["method=tome", "method=none"], [0, 1, 2]), (["schedule=constant:*"], [1, 2, 4]),
     (["drop<2"], [0, 1]), (["drop<=2", "gflops<0.25"], [2]), (["variant=random:seed=1"], [4]),
     (["images=1000"], [0, 1, 2, 3, 4]),
     (["tokens_final>=100", "method=to*", "top1>79"], [1]), ([], [0, 1, 2, 3, 4])],
)  # fmt: skip
def test_filters_choose_cells(cells: list[Cell], filters: list[str], rows: list[int]) -> None:
    assert filter_cells(cells, filters) == [cells[row] for row in rows]


def test_filters_leave_the_front_as_it_is(cells: list[Cell]) -> None:
    row = json.loads(render_table(cells, "json", filters=["method=random"]))[0]
    assert row["front_gflops"] is False


def test_filters_that_cannot_be_are_one_line(cells: list[Cell]) -> None:
    for wrong, answer in {
        "method": "write COLUMN=VALUE",
        "methd=tome": "no column 'methd'. Did you mean 'method'",
        "method<tome": "method is text",
        "drop<much": "'much' is not a number",
        "method=tme": "no cell meets method=tme; there are methods none, random, tome, topk; schedules constant:13",
    }.items():
        with pytest.raises(UserError, match=answer.replace("(", r"\(")):
            render_table(cells, "md", filters=[wrong])


def test_pareto_keeps_the_front_and_the_unreduced_model(cells: list[Cell]) -> None:
    beaten = [*changed(cells[:1], {"top1": Figure(1.0)}), *cells[1:]]
    methods = [row["variant"] for row in json.loads(render_table(beaten, "json", pareto=True))]
    assert methods == ["none", "tome", "tome", "topk"]


def test_sorting_puts_the_best_first(cells: list[Cell]) -> None:
    def order(sort: str) -> list[float]:
        return [row["gflops"] for row in json.loads(render_table(cells, "json", sort))]

    assert order("gflops") == sorted(order(""))
    assert order("top1") == [cell.value("gflops") for cell in cells]


def test_wrong_words_are_answered_with_the_right_ones(cells: list[Cell]) -> None:
    with pytest.raises(UserError, match="Did you mean 'top1'"):
        render_table(cells, "md", "top-1")
    with pytest.raises(UserError, match="no table format 'markdown'; there are rich, md, csv, tex, json"):
        render_table(cells, "markdown")


def test_csv_and_json_carry_everything_unrounded(cells: list[Cell]) -> None:
    rows = list(csv.DictReader(io.StringIO(render_table(cells, "csv"))))
    assert float(rows[0]["throughput_low"]) == 100 / 1.2 and rows[0]["images"] == "1000"
    records = json.loads(render_table(cells, "json"))
    assert records[4]["params"] == {"seed": 1} and records[0]["latency_ms"] is None
    assert records[0]["is_baseline"] is True and records[0]["images"] == 1000
    assert list(rows[0]) == list(records[0])


def test_latex_is_escaped(cells: list[Cell]) -> None:
    latex = render_table(changed(cells, params={"prop_attn": False}), "tex")
    assert r"tome:prop\_attn=false" in latex and r"Top-1 \%" in latex and r"$-$0.3" in latex and r"$\times$" in latex
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert len({line.count("&") - line.count(r"\&") for line in body}) == 1


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_terminal_table_fits_and_folds_no_number(cells: list[Cell], width: int) -> None:
    text = rich_text(cells, width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert "0.2 [−0.3, 0.7] n.s." in text and "10.0 [8.0, 12.0]" in text and "keep:0.7@3,6,9" in text
    assert ("FLOPs ratio" in text.splitlines()[1]) == (width == 140)


@pytest.mark.parametrize("width", [10, 20, 30, 40, 60, 80])
def test_no_number_is_cut_however_narrow_the_terminal_is(cells: list[Cell], width: int) -> None:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    print_table(console, cells)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = text.splitlines()
    for row in ("none .* 80.0", "tome +constant:8 .* ?79.8", "topk +keep:0.7@3,6,9 .* ?77.0", "random:seed=1 .* 70.0"):
        assert any(re.match(row, line) for line in lines), text
    assert "Too narrow for" in " ".join(line.strip() for line in lines)
    print_table(everything := Console(width=width, file=io.StringIO(), color_system=None), cells, every_column=True)
    assert "Too narrow" not in everything.file.getvalue()  # type: ignore[attr-defined]


def test_a_dropped_column_takes_its_footnote_with_it(cells: list[Cell]) -> None:
    costly = changed(cells, {"method_share": Figure(3.0)})
    for width in (80, 240):
        text = rich_text(costly, width)
        assert ("Overhead %" in text.splitlines()[1]) == ("Overhead:" in text) == (width == 240)


def test_a_failed_cell_is_shown_with_its_reason(run: Path) -> None:
    failure = {"kind": "failure", "cell": "bundled/tofu/constant:8", "model": "bundled", "method": "tofu"}
    RunFolder.open(run).append({**failure, "schedule": "constant:8", "phase": "setup", "message": "out of memory"})
    text = rich_text(load_cells([run]), 100)
    assert "failed" in text and "tofu constant:8 failed: out of memory" in text


def test_without_labels_the_front_is_one_of_agreement_and_named_so(cells: list[Cell]) -> None:
    unlabeled = [
        changed([cell], {"top1": None, "top5": None, "drop": None, "agreement": Figure(value)})[0]
        for cell, value in zip(cells, (100.0, 98.0, 97.0, 90.0, 96.0), strict=True)
    ]
    text = render_table(unlabeled, "md")
    assert "Front: the best agreement with the unreduced model, as the images have no labels, for" in text
    assert [line.split("|")[-2].strip() for line in text.splitlines()[4:9]] == ["both", "both", "both", "speed", ""]
    assert "| **98.0** |" in text and "Front: the best top-1" in render_table(cells, "md")
    features = changed(unlabeled, {"agreement": None, "similarity": Figure(0.98)})
    assert "cosine to the unreduced model's features, as the model has no classes, for" in render_table(features, "md")
    mixed = [*cells, *changed(unlabeled, data="others", run="others")]
    by = [row["front_by"] for row in json.loads(render_table(mixed, "json"))]
    assert by == ["top1"] * 5 + ["agreement"] * 5


def test_an_empty_table_renders_in_every_format() -> None:
    for kind in ("md", "csv", "tex", "json"):
        assert isinstance(render_table([], kind), str)
    assert rich_text([], 80)


def test_notes_under_a_table_of_several_runs_say_which_one_they_mean(run: Path, tmp_path: Path) -> None:
    both = load_cells([run, make_run(tmp_path / "other", device="cuda")])
    both[-1:] = changed(both[-1:], error="out of memory")
    text = render_table(both, "md")
    assert "Runs: run (A CPU), other (A GPU)." in text
    assert "other random:seed=1 constant:13 failed: out of memory" in text
    assert "Runs:" not in render_table([cell for cell in both if cell.run == "run"], "md")


def test_two_models_get_a_model_column(tmp_path: Path, run: Path) -> None:
    both = load_cells([run, make_run(tmp_path / "two", model="other")])
    assert render_table(both, "md").splitlines()[2].startswith("| Run | Model | Method |")


def test_what_nobody_measured_neither_sorts_nor_filters_and_has_no_front(cells: list[Cell]) -> None:
    gone = ("top1", "top5", "drop", "agreement", "speedup")
    counted = changed(cells, dict.fromkeys(gone))
    for words, part in [
        ({"sort": "drop"}, "cannot sort by drop: no cell here has it; measured: gflops,"),
        ({"filters": ["drop<1"]}, "filter 'drop<1': no cell here has drop; measured: gflops,"),
        ({"pareto": True}, "--pareto: there is no front, .*; measured: gflops,"),
    ]:
        with pytest.raises(UserError, match=part):
            render_table(counted, "md", **words)
    with pytest.raises(UserError, match="'nan' is not a number"):
        filter_cells(cells, ["drop<nan"])
    assert filter_cells(cells, ["error=*"]) == cells  # no text is text, too


def test_runs_that_hold_nothing_are_named(run: Path, tmp_path: Path) -> None:
    told: list[str] = []
    empty = RunFolder.create(tmp_path / "empty", {}).path
    assert len(load_shown([run, empty], told.append)) == 5
    assert told == [f"{empty} holds no records, and so is not shown."]
    with pytest.raises(UserError, match="nothing to show: .*empty holds no records"):
        load_shown([empty], told.append)


def test_chosen_columns_come_in_their_order_in_every_format(cells: list[Cell]) -> None:
    names = ["method", "schedule", "top1", "drop", "speedup"]
    lines = render_table(cells, "md", columns=names).splitlines()
    assert [line for line in lines if line.startswith("| ")][:3] == [
        "| Method | Schedule | Top-1 % | Drop [95 %] | Speed-up |",
        "| none |  | **80.0** |  | 1.00× |",
        "| tome | constant:8 | **79.8** | 0.2 [−0.3, 0.7] n.s. | 1.30× |",
    ]
    assert render_table(cells, "csv", columns=["throughput", "method", "front"]).splitlines()[:2] == [
        "throughput,method,front", "100.0,none,both",
    ]  # fmt: skip
    assert json.loads(render_table(cells, "json", columns=["params", "top1_low"]))[4] == {
        "params": {"seed": 1}, "top1_low": pytest.approx(68),
    }  # fmt: skip
    narrow = Console(width=30, file=io.StringIO(), color_system=None)
    print_table(narrow, cells, columns=["images", "run", "speedup_low", "front"])
    text = narrow.file.getvalue()  # type: ignore[attr-defined]
    assert "images" in text and "speedup low" in text and "1.29" in text and "both" in text


def test_a_k_nn_drop_has_its_interval(cells: list[Cell]) -> None:
    backbone = changed(cells, figures={"knn_top1": Figure(61.0, 58, 64), "knn_drop": Figure(1.04, 0.2, 1.9)})
    markdown = render_table(backbone, "md", columns=["method", "knn_top1", "knn_drop"])
    assert "| tome | 61.0 | 1.0 [0.2, 1.9] |" in markdown and "| none | 61.0 |  |" in markdown
    assert "k-NN: top-1 by the 20 nearest other images" in markdown


def test_latex_of_chosen_columns_names_methods_as_the_plots_do(cells: list[Cell]) -> None:
    latex = render_table(cells, "tex", columns=["method", "schedule", "drop"])
    assert "ToMe & r=8 & 0.2 [$-$0.3, 0.7] n.s. \\\\" in latex and "unreduced &  & " in latex
    assert "keep 0.7@3,6,9" in latex and "FLOPs are" not in latex and "n.s.: cannot be told" in latex
    assert "tome & constant:8" in render_table(cells, "tex")


def test_columns_that_cannot_be_are_one_line(cells: list[Cell]) -> None:
    for wrong, answer in {
        "top2": "no column 'top2'. Did you mean 'top5' or 'top1'",
        "": "no column ''. Try model, method, schedule",
        "similarity": "no cell here has similarity; measured: .*top1",
    }.items():
        for format in ("rich", "csv", "json", "tex"):
            with pytest.raises(UserError, match=answer):
                render_table(cells, format, columns=["method", wrong])
