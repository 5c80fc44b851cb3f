"""Cells and their figures as they come from records, what is compared with what, and who is on a front."""

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
from made_run import changed, make_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture
def cells(run: Path) -> list[Cell]:
    return load_cells([run])


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
