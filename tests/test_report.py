"""Metrics, tables and plots of a small made-up run."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from tokbench.errors import UserError
from tokbench.measure.stats import median_ratio_interval
from tokbench.report import panels, plots
from tokbench.report.findings import group_title
from tokbench.report.labels import Spot, place, spots_along, spots_around
from tokbench.report.metrics import (
    METRICS,
    comparable,
    filter_cells,
    load_cells,
    load_table,
    pareto_front,
    table_of_records,
)
from tokbench.report.plots import plot_pareto
from tokbench.report.published import published_points
from tokbench.report.styles import STYLES, method_style, short_schedule
from tokbench.report.tables import print_table, render_table
from tokbench.store import RunFolder

# method, params, schedule, top-1, FLOPs, images/s, drop with interval
CELLS: list[tuple[str, dict[str, Any], str, float, int, float, tuple[float, float, float]]] = [
    ("none", {}, "", 0.80, 400_000_000, 100.0, (0.0, 0.0, 0.0)),
    ("tome", {}, "constant:8", 0.798, 300_000_000, 130.0, (0.2, -0.3, 0.7)),
    ("tome", {}, "constant:13", 0.78, 200_000_000, 170.0, (2.0, 1.0, 3.0)),
    ("topk", {}, "keep:0.7@3,6,9", 0.77, 220_000_000, 180.0, (3.0, 2.0, 4.0)),
    ("random", {"seed": 1}, "constant:13", 0.70, 210_000_000, 165.0, (10.0, 8.0, 12.0)),
]


def make_run(path: Path, *, model: str = "bundled", images: int = 1000, **changed: Any) -> Path:
    run = RunFolder.create(path, {"machine": {"cpu": "A CPU", "gpu": "A GPU"}})
    for method, params, schedule, top1, flops, throughput, (drop, low, high) in CELLS:
        same = {
            "cell": f"{model}/{method}/{schedule}", "model": model, "weights_sha256": "ab", "method": method,
            "params": params, "schedule": schedule, "resolved": schedule, "tokens": [197, 100],
            "input_size": [1, 56, 56], "data": "bundled", "data_fingerprint": "cd", "dtype": "fp32", "device": "cpu",
        } | changed  # fmt: skip
        run.append(same | {
            "kind": "accuracy", "images": images, "correct": int(top1 * images), "top1": top1, "top1_low": top1 - 0.02,
            "top1_high": top1 + 0.02, "top5": 0.97, "drop": drop, "drop_low": low, "drop_high": high,
            "mcnemar_p": 0.5, "agreement": 0.9,
        })  # fmt: skip
        run.append(same | {"kind": "flops", "flops": flops, "flops_ratio": flops / 4e8})
        run.append(same | {
            "kind": "speed", "batch_size": 32, "throughput": throughput, "throughput_low": throughput / 1.2,
            "throughput_high": throughput / 0.9,
            "speedup": throughput / 100, "speedup_low": throughput / 101, "speedup_high": throughput / 99,
        })  # fmt: skip
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture
def df(run: Path) -> pd.DataFrame:
    return load_table([run])


# --- metrics ------------------------------------------------------------------------------------------------


def test_a_row_per_cell_in_the_units_of_the_labels(df: pd.DataFrame) -> None:
    assert df["variant"].to_list() == ["none", "tome", "tome", "topk", "random:seed=1"]
    assert df["is_baseline"].to_list() == [True, False, False, False, False]
    tome = df.iloc[1]
    assert tome["gflops"] == pytest.approx(0.3) and tome["flops_ratio"] == 0.75
    assert tome["top1"] == pytest.approx(79.8) and tome["agreement"] == 90 and tome["tokens_final"] == 100
    assert tome["drop"] == 0.2 and tome["images"] == 1000 and tome["machine"] == "A CPU"


def test_every_metric_is_a_column(df: pd.DataFrame) -> None:
    for metric in METRICS.values():
        assert {metric.column, metric.low, metric.high} - {""} <= set(df.columns)


def test_error_bars_of_top1_are_the_paired_interval(df: pd.DataFrame) -> None:
    assert df.loc[2, "top1_paired_low"] == pytest.approx(77.0)
    assert df.loc[2, "top1_paired_high"] == pytest.approx(79.0)


def test_models_timed_compiled_are_said_to_be_and_not_compared_with_others(df: pd.DataFrame, tmp_path: Path) -> None:
    assert set(df["compiled"]) == {"no"} and "compiled" not in render_table(df, "md")
    other = df.assign(compiled="yes", run="compiled")
    assert ", compiled, batch 32" in render_table(other, "md") and "compiled" in svg(other, tmp_path)
    assert len(comparable(pd.concat([df, other]))) == 2
    record = {"kind": "speed", "cell": "m/none", "model": "m", "method": "none", "compiled": True}
    flops = {"kind": "flops", "cell": "m/tome/8", "model": "m", "method": "tome", "schedule": "8"}
    assert list(table_of_records([record, flops])["compiled"]) == ["yes", "yes"]


def test_speed_at_one_batch_size_is_not_compared_with_speed_at_another(df: pd.DataFrame) -> None:
    single = df.assign(run="single", batch_size=1, speedup=df["speedup"] / 2)
    both = pd.concat([df.assign(run="batches"), single], ignore_index=True)
    assert [group_title(group).rpartition(", ")[2] for group in comparable(both)] == ["batch 32", "batch 1"]
    assert pareto_front(both, "speedup", "top1").to_list() == 2 * pareto_front(df, "speedup", "top1").to_list()
    assert "Runs: batches (batch 32), single (batch 1)." in render_table(both, "md")
    untimed = single.assign(speedup=np.nan, throughput=np.nan)  # how accuracy was measured does not matter
    assert len(comparable(pd.concat([df.assign(run="batches"), untimed], ignore_index=True))) == 1


def test_no_records_give_an_empty_table_with_all_columns(df: pd.DataFrame) -> None:
    empty = table_of_records([])
    assert len(empty) == 0 and list(empty.columns) == list(df.columns)
    assert load_table([]).empty


def test_a_partial_run_has_missing_values(df: pd.DataFrame) -> None:
    record = {"kind": "flops", "cell": "m/none", "model": "m", "method": "none", "flops": 3}
    row = table_of_records([record]).iloc[0]
    assert np.isnan(row["top1"]) and row["gflops"] == pytest.approx(3e-9)


def test_a_later_record_replaces_an_earlier_one() -> None:
    record = {"kind": "flops", "cell": "m/none", "model": "m", "method": "none", "flops": 3}
    assert table_of_records([record, record | {"flops": 4_000_000_000}])["gflops"].to_list() == [4]


def test_the_front_is_what_no_cell_beats(df: pd.DataFrame) -> None:
    assert pareto_front(df, "gflops", "top1").to_list() == [True, True, True, False, False]
    assert pareto_front(df, "throughput", "top1").to_list() == [True, True, True, True, False]
    assert pareto_front(df, "throughput", "drop").to_list() == [True, True, True, True, False]


def test_equal_cells_share_the_front_and_unmeasured_ones_are_off_it(df: pd.DataFrame) -> None:
    twice = pd.concat([df, df.assign(gflops=np.nan), df], ignore_index=True)
    front = pareto_front(twice, "gflops", "top1")
    assert front[:5].to_list() == front[10:].to_list() == [True, True, True, False, False]
    assert not front[5:10].any()


def test_costs_within_a_percent_are_equal_on_the_front(df: pd.DataFrame) -> None:
    worse = df.iloc[[2]].assign(gflops=0.1985, top1=60.0)
    assert pareto_front(pd.concat([df, worse], ignore_index=True), "gflops", "top1").to_list()[-1] is False
    cheaper = worse.assign(gflops=0.15)
    assert pareto_front(pd.concat([df, cheaper], ignore_index=True), "gflops", "top1").to_list()[-1] is True


def test_a_front_of_speed_is_judged_by_the_paired_speed_up(df: pd.DataFrame) -> None:
    twins = pd.concat([df.iloc[[0, 2]], df.iloc[[2]]], ignore_index=True)
    twins["throughput"], twins["speedup"] = [100.0, 175.0, 170.0], [1.0, 1.70, 1.75]
    assert pareto_front(twins, "throughput", "top1").to_list() == [True, False, True]
    twins["speedup"] = np.nan
    assert pareto_front(twins, "throughput", "top1").to_list() == [True, True, False]


def test_a_cell_with_nan_logits_is_on_no_front_and_beats_none(df: pd.DataFrame) -> None:
    broken = df.assign(nonfinite=pd.array([0, 3, 0, 0, 0], "Int64"))
    assert pareto_front(broken, "gflops", "top1").to_list() == [True, False, True, False, False]


def test_flops_are_told_by_part(df: pd.DataFrame) -> None:
    flops = {"kind": "flops", "cell": "a", "model": "m", "method": "tome", "schedule": "8", "flops": 4 * 10**9}
    parts = {"flops_attention": 10**9, "flops_mlp": 2 * 10**9, "flops_method": 10**8, "flops_rest": 9 * 10**8}
    cell = table_of_records([flops | parts]).iloc[0]
    assert [cell[f"gflops_{part}"] for part in ("attention", "mlp", "method", "rest")] == [1.0, 2.0, 0.1, 0.9]
    assert cell["method_share"] == 2.5
    assert np.isnan(table_of_records([flops]).iloc[0]["method_share"])


def test_a_run_named_twice_is_read_once_and_equal_names_are_told_apart(tmp_path: Path, run: Path) -> None:
    assert len(load_table([run, run])) == len(load_table([run]))
    both = load_table([run, make_run(tmp_path / "elsewhere" / "run")])
    assert list(both["run"].unique()) == [f"{tmp_path.name}/run", "elsewhere/run"]


def test_cells_of_other_models_or_data_do_not_compete(tmp_path: Path, run: Path) -> None:
    other = make_run(tmp_path / "other", model="better", data_fingerprint="ef")
    both = load_table([run, other])
    assert len(comparable(both)) == 2
    assert pareto_front(both, "gflops", "top1").sum() == 6


def test_where_the_machine_sets_the_pace_a_run_competes_with_itself_only(tmp_path: Path, run: Path) -> None:
    both = load_table([run, make_run(tmp_path / "again")])
    faster = both["run"] == "again"
    for column in ("throughput", "throughput_low", "throughput_high"):
        both.loc[faster, column] *= 1.4  # the same machine at another hour
    own = pareto_front(both[~faster], "throughput", "top1")
    assert 0 < own.sum() < len(own)
    assert pareto_front(both, "throughput", "top1").to_list() == [*own, *own]
    assert [set(group["run"]) for group in comparable(both, "throughput", "top1")] == [{"run"}, {"again"}]
    # Speed-ups are ratios within a run, and compare.
    both.loc[faster, "speedup"] *= 1.4
    assert pareto_front(both, "speedup", "top1")[faster & ~both["is_baseline"]].any()
    assert not pareto_front(both, "speedup", "top1")[~faster & ~both["is_baseline"]].any()


def test_runs_under_the_same_conditions_are_compared(tmp_path: Path, run: Path) -> None:
    assert len(comparable(load_table([run, make_run(tmp_path / "again")]))) == 1


def test_a_cell_that_failed_early_stays_with_its_run(run: Path) -> None:
    cell = "bundled/tome/constant:99"
    failure = {"kind": "failure", "cell": cell, "model": "bundled", "method": "tome", "schedule": "constant:99"}
    RunFolder.open(run).append({**failure, "message": "out of memory", "traceback": "..."})
    table = load_table([run])
    assert len(comparable(table)) == 1 and table.iloc[-1]["error"] == "out of memory"


def test_a_metric_that_is_not_there_is_one_line(df: pd.DataFrame) -> None:
    with pytest.raises(UserError, match="no metric 'gflop'. Did you mean 'gflops'"):
        pareto_front(df, "gflop", "top1")


# --- tables -------------------------------------------------------------------------------------------------


def rich_text(df: pd.DataFrame, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(render_table(df, "rich", width=width))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_drop_that_may_be_none_is_printed_and_said_to_be(df: pd.DataFrame) -> None:
    markdown = render_table(df, "md")
    assert "| 0.2 [-0.3, 0.7] n.s. |" in markdown and "| 2.0 [1.0, 3.0] |" in markdown
    assert "n.s.: cannot be told from no drop." in markdown


def test_digits_follow_the_number_of_images(tmp_path: Path) -> None:
    many = load_table([make_run(tmp_path / "many", images=10_000)])
    assert "| 2.00 [1.00, 3.00] |" in render_table(many, "md")


def test_front_members_are_marked(df: pd.DataFrame) -> None:
    lines = [line for line in render_table(df, "md").splitlines() if line.startswith("| ")]
    assert [line.split("|")[-2].strip() for line in lines] == ["Front", "both", "both", "both", "speed", ""]


def test_the_best_for_its_cost_is_bold_in_files(df: pd.DataFrame) -> None:
    assert "| **79.8** |" in render_table(df, "md") and "| 70.0 |" in render_table(df, "md")
    assert r"\textbf{79.8}" in render_table(df, "tex") and r"\textbf{70.0}" not in render_table(df, "tex")


def test_speed_ups_have_their_interval(df: pd.DataFrame) -> None:
    assert "| 1.30× | [1.29, 1.31] |" in render_table(df, "md")


@pytest.mark.parametrize(
    "filters, rows",
    [(["method=tome"], [1, 2]), (["method=tome", "method=none"], [0, 1, 2]), (["schedule=constant:*"], [1, 2, 4]),
     (["drop<2"], [0, 1]), (["drop<=2", "gflops<0.25"], [2]), (["variant=random:seed=1"], [4]),
     (["images=1000"], [0, 1, 2, 3, 4]),
     (["tokens_final>=100", "method=to*", "top1>79"], [1]), ([], [0, 1, 2, 3, 4])],
)  # fmt: skip
def test_filters_choose_cells(df: pd.DataFrame, filters: list[str], rows: list[int]) -> None:
    assert filter_cells(df, filters).index.to_list() == rows


def test_filters_leave_the_front_as_it_is(df: pd.DataFrame) -> None:
    row = json.loads(render_table(df, "json", filters=["method=random"]))[0]
    assert row["front_gflops"] is False


def test_filters_that_cannot_be_are_one_line(df: pd.DataFrame) -> None:
    for wrong, answer in {
        "method": "write COLUMN=VALUE",
        "methd=tome": "no column 'methd'. Did you mean 'method'",
        "method<tome": "method is text",
        "drop<much": "'much' is not a number",
        "method=tme": "no cell meets method=tme; there are methods none, random, tome, topk; schedules constant:13",
    }.items():
        with pytest.raises(UserError, match=answer.replace("(", r"\(")):
            render_table(df, "md", filters=[wrong])


def test_pareto_keeps_the_front_and_the_unreduced_model(df: pd.DataFrame) -> None:
    beaten = df.assign(top1=df["top1"].where(~df["is_baseline"], 1.0))
    methods = [row["variant"] for row in json.loads(render_table(beaten, "json", pareto=True))]
    assert methods == ["none", "tome", "tome", "topk"]


def test_sorting_puts_the_best_first(df: pd.DataFrame) -> None:
    def order(sort: str) -> list[float]:
        return [row["gflops"] for row in json.loads(render_table(df, "json", sort))]

    assert order("gflops") == sorted(df["gflops"])
    assert order("top1") == df.sort_values("top1", ascending=False)["gflops"].to_list()


def test_wrong_words_are_answered_with_the_right_ones(df: pd.DataFrame) -> None:
    with pytest.raises(UserError, match="Did you mean 'top1'"):
        render_table(df, "md", "top-1")
    with pytest.raises(UserError, match="no table format 'markdown'; there are rich, md, csv, tex, json"):
        render_table(df, "markdown")


def test_csv_and_json_carry_everything_unrounded(df: pd.DataFrame) -> None:
    rows = list(csv.DictReader(io.StringIO(render_table(df, "csv"))))
    assert float(rows[0]["throughput_low"]) == df.loc[0, "throughput_low"] and rows[0]["images"] == "1000"
    records = json.loads(render_table(df, "json"))
    assert records[4]["params"] == {"seed": 1} and records[0]["latency_ms"] is None
    assert records[0]["is_baseline"] is True and records[0]["images"] == 1000
    assert list(rows[0]) == list(records[0])


def test_latex_is_escaped(df: pd.DataFrame) -> None:
    latex = render_table(df.assign(variant="tome:prop_attn=false"), "tex")
    assert r"tome:prop\_attn=false" in latex and r"Top-1 \%" in latex and r"$-$0.3" in latex and r"$\times$" in latex
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert len({line.count("&") - line.count(r"\&") for line in body}) == 1


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_terminal_table_fits_and_folds_no_number(df: pd.DataFrame, width: int) -> None:
    text = rich_text(df, width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert "0.2 [-0.3, 0.7] n.s." in text and "10.0 [8.0, 12.0]" in text and "keep:0.7@3,6,9" in text
    assert ("FLOPs ratio" in text.splitlines()[1]) == (width == 140)


@pytest.mark.parametrize("width", [10, 20, 30, 40, 60, 80])
def test_no_number_is_cut_however_narrow_the_terminal_is(df: pd.DataFrame, width: int) -> None:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    print_table(console, df)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = text.splitlines()
    for row in ("none .* 80.0", "tome +constant:8 .* ?79.8", "topk +keep:0.7@3,6,9 .* ?77.0", "random:seed=1 .* 70.0"):
        assert any(re.match(row, line) for line in lines), text
    assert "Too narrow for" in " ".join(line.strip() for line in lines)
    print_table(everything := Console(width=width, file=io.StringIO(), color_system=None), df, every_column=True)
    assert "Too narrow" not in everything.file.getvalue()  # type: ignore[attr-defined]


def test_a_dropped_column_takes_its_footnote_with_it(df: pd.DataFrame) -> None:
    costly = df.assign(method_share=[0.0, 3.0, 3.0, 3.0, 3.0])
    for width in (80, 240):
        text = rich_text(costly, width)
        assert ("Overhead %" in text.splitlines()[1]) == ("Overhead:" in text) == (width == 240)


def test_a_plot_says_of_what_its_bars_are_intervals(df: pd.DataFrame, tmp_path: Path) -> None:
    known = df.assign(agreement_low=df["agreement"] - 1, agreement_high=df["agreement"] + 1)
    assert "Vertical bars: 95 % interval over images." in svg(known, tmp_path, y="agreement")
    assert "interval over images" not in svg(df, tmp_path, y="agreement")  # it has no bars
    assert "interval over images" not in svg(known, tmp_path)


def test_a_failed_cell_is_shown_with_its_reason(run: Path) -> None:
    failure = {"kind": "failure", "cell": "bundled/tofu/constant:8", "model": "bundled", "method": "tofu"}
    RunFolder.open(run).append({**failure, "schedule": "constant:8", "message": "out of memory"})
    text = rich_text(load_table([run]), 100)
    assert "failed" in text and "tofu constant:8 failed: out of memory" in text


def test_without_labels_the_front_is_one_of_agreement_and_named_so(df: pd.DataFrame, tmp_path: Path) -> None:
    labels = [column for column in df if column.startswith(("top", "drop"))]
    unlabeled = df.assign(**dict.fromkeys(labels, np.nan), agreement=[100.0, 98.0, 97.0, 90.0, 96.0])
    text = render_table(unlabeled, "md")
    assert "Front: the best agreement with the unreduced model, as the images have no labels, for" in text
    assert [line.split("|")[-2].strip() for line in text.splitlines()[4:9]] == ["both", "both", "both", "speed", ""]
    assert "| **98.0** |" in text and "Front: the best top-1" in render_table(df, "md")
    features = unlabeled.assign(agreement=np.nan, similarity=unlabeled["agreement"] / 100)
    assert "cosine to the unreduced model's features, as the model has no classes, for" in render_table(features, "md")
    mixed = pd.concat([df, unlabeled.assign(data="others", run="others")], ignore_index=True)
    by = [row["front_by"] for row in json.loads(render_table(mixed, "json"))]
    assert by == ["top1"] * 5 + ["agreement"] * 5
    assert "Agreement with the unreduced model" in svg(unlabeled, tmp_path)


def test_an_empty_table_renders_in_every_format() -> None:
    empty = table_of_records([])
    for kind in ("md", "csv", "tex", "json"):
        assert isinstance(render_table(empty, kind), str)
    assert rich_text(empty, 80)


def test_notes_under_a_table_of_several_runs_say_which_one_they_mean(run: Path, tmp_path: Path) -> None:
    both = load_table([run, make_run(tmp_path / "other", device="cuda")])
    both.loc[both.index[-1], "error"] = "out of memory"
    text = render_table(both, "md")
    assert "Runs: run (A CPU), other (A GPU)." in text
    assert "other random:seed=1 constant:13 failed: out of memory" in text
    assert "Runs:" not in render_table(both[both["run"] == "run"], "md")


def test_two_models_get_a_model_column(tmp_path: Path, run: Path) -> None:
    both = load_table([run, make_run(tmp_path / "two", model="other")])
    assert render_table(both, "md").splitlines()[2].startswith("| Run | Model | Method |")


def test_what_nobody_measured_neither_sorts_nor_filters_and_has_no_front(df: pd.DataFrame) -> None:
    counted = df.assign(**{column: np.nan for column in df if column.startswith(("top", "drop", "agree", "speed"))})
    for words, part in [
        ({"sort": "drop"}, "cannot sort by drop: no cell here has it; measured: gflops,"),
        ({"filters": ["drop<1"]}, "filter 'drop<1': no cell here has drop; measured: gflops,"),
        ({"pareto": True}, "--pareto: there is no front, .*; measured: gflops,"),
    ]:
        with pytest.raises(UserError, match=part):
            render_table(counted, "md", **words)
    with pytest.raises(UserError, match="'nan' is not a number"):
        filter_cells(df, ["drop<nan"])
    assert len(filter_cells(df, ["error=*"])) == len(df)  # no text is text, too


def test_runs_that_hold_nothing_are_named(run: Path, tmp_path: Path) -> None:
    told: list[str] = []
    empty = RunFolder.create(tmp_path / "empty", {}).path
    assert len(load_cells([run, empty], told.append)) == 5
    assert told == [f"{empty} holds no records, and so is not shown."]
    with pytest.raises(UserError, match="nothing to show: .*empty holds no records"):
        load_cells([empty], told.append)


# --- plots --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix, start", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_plots_are_written_by_suffix(df: pd.DataFrame, tmp_path: Path, suffix: str, start: bytes) -> None:
    out = tmp_path / "new" / f"plot.{suffix}"
    assert plot_pareto(df, out) == out and out.read_bytes().startswith(start)


def svg(df: pd.DataFrame, tmp_path: Path, **axes: Any) -> str:
    """The plot as SVG whose words can be searched: fonts as text, and no halos, which turn text into shapes."""
    with matplotlib.rc_context({"svg.fonttype": "none"}), pytest.MonkeyPatch.context() as patch:
        patch.setattr(panels, "HALOS", False)
        return plot_pareto(df, tmp_path / "plot.svg", **axes).read_text()


def test_the_plot_says_what_it_shows(df: pd.DataFrame, tmp_path: Path) -> None:
    text = svg(df, tmp_path)
    for words in ("bundled: token fusion", "1,000 images", "A CPU (cpu)", "fp32", "batch 32", "(multiply-adds)",
                  "Throughput (images/s)", "Top-1 accuracy (%)", "unreduced: 80.0 %", "unreduced: 0.4 GFLOPs",
                  "unreduced: 100 images/s", "ToMe r=8", "ToMe r=13", "top-k keep 0.7@3,6,9",
                  "Pareto front"):  # fmt: skip
        assert words in text, words
    assert "random r=13" not in text


def test_the_same_table_gives_the_same_file(df: pd.DataFrame, tmp_path: Path) -> None:
    assert svg(df, tmp_path) == svg(df, tmp_path)


def test_any_metric_goes_on_any_axis(df: pd.DataFrame, tmp_path: Path) -> None:
    text = svg(df, tmp_path, x=["speedup", "flops_ratio"], y="drop")
    assert "Top-1 drop (points)" in text and "Speed-up over the unreduced model" in text


def test_a_picture_that_cannot_be_written_leaves_the_old_one(df: pd.DataFrame, tmp_path: Path) -> None:
    out = plot_pareto(df, tmp_path / "a.png")
    before = out.read_bytes()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="cannot write .*a.png: No space left"):
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        plot_pareto(df, out, theme="dark")
    assert out.read_bytes() == before and list(tmp_path.glob("a*")) == [out]


def test_unmeasured_default_panels_are_left_out(df: pd.DataFrame, tmp_path: Path) -> None:
    assert "Throughput" not in svg(df.assign(throughput=np.nan), tmp_path)


def test_nothing_to_plot_is_one_line(df: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no cell has both top1 and latency; measured here: top1, top5, drop"):
        plot_pareto(df, tmp_path / "a.png", x="latency")
    with pytest.raises(UserError, match="measured here: nothing"):
        plot_pareto(table_of_records([]), tmp_path / "a.png")
    with pytest.raises(UserError, match="drop is on both axes"):
        plot_pareto(df, tmp_path / "a.png", x=["gflops", "drop"], y="drop")
    with pytest.raises(UserError, match="suffix must be one of png, svg, pdf"):
        plot_pareto(df, tmp_path / "a.jpg")
    with pytest.raises(UserError, match="Did you mean 'gflops'"):
        plot_pareto(df, tmp_path / "a.png", x="gflop")


def test_a_run_without_the_unreduced_model_can_be_drawn(df: pd.DataFrame, tmp_path: Path) -> None:
    assert "unreduced:" not in svg(df[~df["is_baseline"]], tmp_path)


def test_a_reference_line_needs_only_its_own_metric(df: pd.DataFrame, tmp_path: Path) -> None:
    untimed = df.assign(throughput=df["throughput"].mask(df["is_baseline"]))
    drawn = svg(untimed, tmp_path, x="throughput")
    assert "unreduced: 80.0 %" in drawn and "unreduced: 100 images/s" not in drawn


def test_methods_at_equal_cost_stand_side_by_side_on_the_front_they_had(tmp_path: Path, df: pd.DataFrame) -> None:
    level = [df.iloc[[1]].assign(method=name, variant=name, gflops=0.2 + 0.0001 * i, top1=79.8 - i)
             for i, name in enumerate(("tome", "tofu", "mctf", "evit"))]  # fmt: skip
    equal = pd.concat([df.iloc[[0]], *level], ignore_index=True)
    drawn = svg(equal, tmp_path, x="gflops")
    assert re.search(r"moved aside, up to ±0\.00\d GFLOPs;", drawn) and "ticks: as measured" in drawn
    assert "aside" not in svg(df, tmp_path)
    group = equal.assign(front=pareto_front(equal, "gflops", "top1"))
    moved = panels.side_by_side(group, "gflops", panels.Art(plots.SIZES["wide"], plots.find_theme("light")))
    assert moved["front"].to_list() == [True, True, False, False, False]
    assert moved["gflops"].iloc[0] == equal["gflops"].iloc[0]  # the unreduced model
    assert moved["gflops"].iloc[1:].is_monotonic_increasing and abs(moved["gflops"] - equal["gflops"]).max() < 0.02
    ((low, high),) = moved.attrs["equal"]
    assert low < moved["gflops"].iloc[1:].min() and moved["gflops"].iloc[1:].max() < high
    shift = float(re.findall(r"up to ±([\d.]+) GFLOPs", drawn)[0])
    assert shift * 0.8 < abs(moved["gflops"] - equal["gflops"]).max() <= shift
    assert moved.attrs["measured"].tolist() == equal["gflops"].iloc[1:].to_list()


def test_columns_of_equal_cost_never_run_into_each_other(df: pd.DataFrame) -> None:
    level = [df.iloc[[1]].assign(method=name, variant=name, gflops=cost)
             for cost in (0.2, 0.205) for name in ("tome", "tofu", "mctf", "evit")]  # fmt: skip
    equal = pd.concat([df.iloc[[0]], *level], ignore_index=True).assign(front=False)
    moved = panels.side_by_side(equal, "gflops", panels.Art(plots.SIZES["wide"], plots.find_theme("light")))
    (_, left), (right, _) = moved.attrs["equal"]
    assert left < right and moved.attrs["shift"] < 0.0025


def test_two_machines_are_laid_over_each_other_and_named(run: Path, tmp_path: Path) -> None:
    both = load_table([run, make_run(tmp_path / "other", device="cuda")])
    both.loc[both["run"] == "other", ["throughput", "throughput_low", "throughput_high"]] *= 4
    text = svg(both, tmp_path)
    assert text.count("bundled: token fusion") == 1 and "A CPU" in text and "A GPU" in text
    assert "A CPU (cpu)" not in text  # in the legend, not among what all cells share
    assert re.search(r"italic[^<]*>A GPU<", text) and not re.search(r"italic[^<]*>A CPU<", text)
    assert re.search(r"italic[^<]*>ToMe r=13<", text)  # the second run's, elsewhere than the first's
    assert "italic" not in svg(both, tmp_path, x="gflops").partition(">A GPU<")[0].rpartition(">ToMe")[0]
    again = svg(load_table([run, make_run(tmp_path / "again")]), tmp_path)
    assert ">run<" in again and ">again<" in again


def test_a_run_is_left_out_of_the_panels_it_lacks_the_metric_of_and_that_is_told(run: Path, tmp_path: Path) -> None:
    both = load_table([run, make_run(tmp_path / "untimed", images=500, data_fingerprint="ef")])
    both.loc[both["run"] == "untimed", ["throughput", "speedup"]] = np.nan
    told: list[str] = []
    drawn = svg(both, tmp_path, tell=told.append)
    assert told == ["left out of the plot: throughput of untimed (no cell has that together with top1)."]
    assert drawn.count("GFLOPs per image") == 2 and drawn.count("Throughput (images/s)") == 1
    assert svg(both, tmp_path, size="paper").count("Throughput (images/s)") == 1
    assert "500 images" not in svg(both, tmp_path, x="throughput", tell=told.append) and told[0] == told[1]
    one, words = both[both["run"] == "run"], len(told)
    assert "1,000 images" in svg(one, tmp_path, tell=told.append) and len(told) == words
    with pytest.raises(UserError, match="no cell has both top1 and throughput"):
        plot_pareto(both[both["run"] == "untimed"], tmp_path / "a.png", x="throughput")


def test_a_run_laid_over_another_keeps_its_looks_where_the_other_is_absent(run: Path, tmp_path: Path) -> None:
    both = load_table([run, make_run(tmp_path / "second")])
    both.loc[both["run"] == "run", "throughput"] = np.nan
    told: list[str] = []
    drawn = svg(both, tmp_path, tell=told.append)
    assert told == ["left out of the plot: throughput of run (no cell has that together with top1)."]
    dashed = panels.series_marks(
        "tome", 0, 1, panels.Art(plots.SIZES["wide"], plots.find_theme("light"), {"a": "", "b": ""})
    )
    assert drawn.count(f"stroke: {matplotlib.colors.to_hex(dashed['color'])}") >= 2  # in both panels


@pytest.mark.parametrize("size", ["wide", "page", "paper"])
def test_long_names_of_models_shrink_instead_of_being_cut(df: pd.DataFrame, tmp_path: Path, size: str) -> None:
    name = "vit_base_patch16_224.augreg_in21k_ft_in1k@of_somebody_with_a_long_name"
    both = pd.concat([df.assign(model=name), df], ignore_index=True)
    figures: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save", lambda figure, *_, **__: figures.append(figure))
        plot_pareto(both, tmp_path / "a.png", x="gflops", size=size)
    (figure,) = figures
    drawn = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text().startswith("vit_base")]
    assert drawn and all(text.get_window_extent().x1 <= figure.bbox.x1 for text in drawn)


@pytest.mark.parametrize("size", ["wide", "paper"])
def test_cells_with_nan_logits_are_crossed_out(df: pd.DataFrame, tmp_path: Path, size: str) -> None:
    assert "NaN logits" not in svg(df, tmp_path, size=size)
    assert "NaN logits" in svg(df.assign(nonfinite=pd.array([0, 0, 3, 0, 0], "Int64")), tmp_path, size=size)


def test_models_have_panels_of_their_own(run: Path, tmp_path: Path) -> None:
    text = svg(load_table([run, make_run(tmp_path / "other", model="deit")]), tmp_path)
    assert "bundled: token fusion" in text and "deit: token fusion" in text


@pytest.mark.parametrize("size, inches", [("wide", 11.1), ("page", 7.0), ("paper", 3.4)])
def test_a_figure_has_the_width_it_is_asked_for(df: pd.DataFrame, tmp_path: Path, size: str, inches: float) -> None:
    text = svg(df, tmp_path, size=size)
    assert f'width="{72 * inches:g}pt"' in text
    assert ("token fusion without training" in text) == (size == "wide")


def test_a_dark_figure_has_a_dark_background(df: pd.DataFrame, tmp_path: Path) -> None:
    assert "#16191d" in svg(df, tmp_path, theme="dark") and "#16191d" not in svg(df, tmp_path)


def test_the_axis_is_stretched_only_where_a_few_cells_fall_far_behind(df: pd.DataFrame, tmp_path: Path) -> None:
    many = pd.concat([df, df.iloc[1:3].assign(gflops=0.1), df.iloc[1:3].assign(gflops=0.15)], ignore_index=True)
    fallen = many.assign(top1=many["top1"].where(many["method"] != "random", 20.0))
    assert "stretched" not in svg(many, tmp_path) and "stretched" in svg(fallen, tmp_path)
    assert "stretched" not in svg(fallen, tmp_path, linear=True)


def test_published_points_are_named_as_such(tmp_path: Path) -> None:
    table = load_table([make_run(tmp_path / "run", model="vit_small_patch16_224.augreg_in21k_ft_in1k")])
    text = svg(table, tmp_path, published=True)
    assert text.count("ToMe r=13, published") == 1 and "ImageNet-1k, V100" in text
    assert "published" not in svg(table, tmp_path)
    with pytest.raises(UserError, match="^--published: no paper printed agreement against gflops for vit_small.*, only "
                       "top1, drop, throughput, speedup"):  # fmt: skip
        plot_pareto(table, tmp_path / "a.png", published=True, x="gflops", y="agreement")
    with pytest.raises(
        UserError, match="top1 against gflops or throughput for bundled, only for vit_small_patch16_224"
    ):
        plot_pareto(table.assign(model="bundled"), tmp_path / "a.png", published=True)
    assert not (tmp_path / "a.png").exists()
    told: list[str] = []
    both = pd.concat([table, table.assign(model="bundled")], ignore_index=True)
    assert "ImageNet-1k, V100" in svg(both, tmp_path, published=True, tell=told.append)
    assert len(told) == 1 and "against gflops for vit_small" in told[0] and "or throughput for bundled" in told[0]


def test_published_points_go_with_the_weights_they_were_measured_on() -> None:
    assert published_points(["vit_base_patch16_224"], ["top1"]).empty  # timm's default has other weights
    exact = published_points(["vit_base_patch16_224.augreg_in21k_ft_in1k"], ["top1", "drop", "speedup"])
    assert exact["method"].to_list() == ["none", "tome"] and exact["top1"].to_list() == [84.57, 82.60]
    assert exact["drop"].to_list() == pytest.approx([0, 1.97]) and exact["speedup"].iloc[1] == pytest.approx(
        1.6537, abs=1e-4
    )
    assert published_points(["deit_small_patch16_224@mine"], ["gflops"]).empty


def test_wrong_sizes_and_themes_are_one_line(df: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no size 'papre'; there are wide, page, paper. Did you mean 'paper'"):
        plot_pareto(df, tmp_path / "a.png", size="papre")
    with pytest.raises(UserError, match="no theme 'drak'.* Did you mean 'dark'"):
        plot_pareto(df, tmp_path / "a.png", theme="drak")


def test_styles_are_distinct_and_fixed() -> None:
    assert len({style.color for style in STYLES.values()}) == len({s.marker for s in STYLES.values()}) == len(STYLES)


def test_a_method_of_other_people_looks_the_same_in_every_figure_and_like_none_of_ours() -> None:
    mine = method_style("mine")
    assert mine == method_style("mine") != method_style("yours") and mine.name == "mine"
    assert mine.color not in {style.color for style in STYLES.values()}
    assert mine.marker not in {style.marker for style in STYLES.values()}


@pytest.mark.parametrize(
    "schedule, label",
    [("constant:13", "r=13"), ("13", "r=13"), ("keep:0.7@3,6,9", "keep 0.7@3,6,9"), ("linear:13,-1", "linear 13,-1"),
     ("list:8,8,0,4", "list 2×8 0 4"), ("ratio:0.9", "ratio 0.9"), ("flops:0.5", "50 % FLOPs")],
)  # fmt: skip
def test_schedules_are_short_in_labels(schedule: str, label: str) -> None:
    assert short_schedule(schedule) == label


def test_no_two_schedules_share_a_label() -> None:
    schedules = ["keep:0.7@3,6,9", "keep:0.7@4,7,10", "keep:0.75@3,6,9", "flops:0.5", "flops:0.5001", "linear:13,1",
                 "linear:13,-1", f"list:{','.join(map(str, range(24)))}", f"list:{','.join(map(str, range(23)))},99",
                 "list:8,8", "list:8,0,8", "ratio:0.9", "13", "constant:14"]  # fmt: skip
    assert len({short_schedule(schedule) for schedule in schedules}) == len(schedules)


def test_labels_of_the_front_name_parameters_and_positions(df: pd.DataFrame, tmp_path: Path) -> None:
    later = df.iloc[[3]].assign(schedule="keep:0.7@4,7,10", gflops=0.1, top1=75.0)
    other = df.iloc[[1]].assign(variant="tome:prop_attn=false", gflops=0.25, top1=79.0)
    text = svg(pd.concat([df, later, other], ignore_index=True), tmp_path, x="gflops")
    assert "top-k keep 0.7@4,7,10" in text and "ToMe:prop_attn=false r=8" in text


# --- labels -------------------------------------------------------------------------------------------------

FRAME = np.array([0.0, 0.0, 400.0, 300.0])
NO_LINES = np.empty((0, 2))


def overlap(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a[:2] < b[2:]).all() and (b[:2] < a[2:]).all())


def test_labels_of_crowded_points_cover_no_point_and_no_other_label() -> None:
    points = np.array([[100.0 + 12 * i, 150.0 + 3 * i] for i in range(10)])
    markers = np.hstack([points - 4, points + 4])
    options = [spots_around(point, np.array([60.0, 10.0]), 1.0, leftwards=True) for point in points]
    spots = [spot for spot in place(options, markers, NO_LINES, FRAME) if spot is not None]
    assert len(spots) >= 8
    for index, spot in enumerate(spots):
        assert (spot.box[:2] >= 0).all() and (spot.box[2:] <= FRAME[2:]).all()
        assert not any(overlap(spot.box, marker) for marker in markers)
        assert not any(overlap(spot.box, other.box) for other in spots[index + 1 :])


def test_a_label_without_a_free_spot_is_left_out() -> None:
    everywhere = np.array([[0.0, 0.0, 400.0, 300.0]])
    assert place([[Spot(np.array([10.0, 10.0, 20.0, 20.0]), 0.0)]], everywhere, NO_LINES, FRAME) == [None]


def test_labels_of_lines_lie_beside_them() -> None:
    for axis in (0, 1):
        for spot in spots_along(150.0, axis, np.array([50.0, 10.0])[:: 1 - 2 * axis], FRAME, 3.0):
            low, high = spot.box[1 - axis], spot.box[3 - axis]
            assert (low > 150) != (high < 150)
            assert spot.box[axis] >= 0 and spot.box[axis + 2] <= FRAME[axis + 2]


def test_the_committed_figures_follow_from_the_committed_timings() -> None:
    records = RunFolder.open(Path(__file__).parents[1] / "results" / "reference").records()
    timed = {record["cell"]: record for record in records if record["kind"] == "speed"}
    base = timed["bundled/none"]
    for record in timed.values():
        for name, above, below in (
            ("speedup", base["seconds"], record["seconds"]),
            ("latency_speedup", base["latency_seconds"], record["latency_seconds"]),
            ("efficiency", record.get("free_seconds"), record["seconds"]),
        ):
            if above:
                figures = [record[name], record[f"{name}_low"], record[f"{name}_high"]]
                assert figures == pytest.approx(median_ratio_interval(above, below))
    assert len(timed) == 17
