"""Cells and their figures as they come from records, what is compared with what, and who is on a front."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_run import changed, make_run
from stand_ins import plain_records

from tokbench.errors import UserError
from tokbench.measure.stats import median_ratio_interval
from tokbench.report.html import plot_data
from tokbench.report.plots import plot_pareto
from tokbench.report.tables import _TOKENS, render_table
from tokbench.report.text import group_title
from tokbench.results.cell import Cell, CellKey, Figure
from tokbench.results.folder import RunFolder
from tokbench.results.metrics import METRICS, Metric
from tokbench.results.records import Record, make_record
from tokbench.results.table import all_columns, cells_of, comparable, frame, load_cells, load_table, pareto_front


def flops(method: str = "none", schedule: str = "", **fields: Any) -> Record:
    return make_record(
        {"schema": 1, "kind": "flops", "cell": f"m/{method}/{schedule}", "model": "m", "method": method}
        | {"schedule": schedule, "flops": 3}
        | fields
    )


def on_front(cells: list[Cell], x: str = "gflops", y: str = "top1") -> list[bool]:
    front = pareto_front(cells, x, y)
    return [cell in front for cell in cells]


def test_a_cell_has_its_figures_in_the_units_of_the_labels(cells: list[Cell]) -> None:
    assert [cell.variant for cell in cells] == ["none", "tome", "tome", "topk", "random:seed=1"]
    assert [cell.is_baseline for cell in cells] == [True, False, False, False, False]
    tome = cells[1]
    assert tome.value("gflops") == pytest.approx(0.3) and tome.value("flops_ratio") == 0.75
    assert tome.value("top1") == pytest.approx(79.8) and tome["agreement"] == Figure(90) and tome.tokens_final == 100
    assert tome["drop"] == Figure(0.2, -0.3, 0.7) and tome.images == 1000 and tome.machine == "A CPU"


def test_a_table_has_a_row_per_cell_and_a_column_per_figure(run: Path) -> None:
    table = load_table(run)
    assert list(table.columns) == all_columns() and len(table) == 5
    assert {column for metric in METRICS.values() for column in metric.columns} <= set(all_columns())
    assert table.loc[2, "top1_paired_low"] == pytest.approx(77.0)
    assert table.loc[2, "top1_low"] == pytest.approx(76.0)
    assert table["tokens_final"].to_list() == [100] * 5


def test_tokens_that_are_means_over_images_are_read_and_shown_in_whole_ones(run: Path) -> None:
    folder = RunFolder.open(run)
    for record in [record for record in folder.records() if record.method == "tome"]:
        folder.append(record.plain() | {"tokens": [197, 100.6]})
    cell = next(cell for cell in load_cells([run]) if cell.method == "tome")
    assert cell.tokens == (197, 100.6) and cell.tokens_final == 101


def test_a_figure_is_one_row_of_metrics(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Metric("Energy per image (mJ)", "Energy mJ", "lower", 1, "joules", " mJ", 1000, "energy_mj", place=19, rank=3)
    monkeypatch.setitem(METRICS, "energy", row)
    for number, record in enumerate(RunFolder.open(run).records()):
        if record.kind == "speed":
            RunFolder.open(run).append(record.plain() | {"joules": 0.001 * (10 + number)})
    cells = load_cells([run])
    assert "| Energy mJ |" in render_table(cells, "md")
    assert "energy_mj" in render_table(cells, "csv").splitlines()[0] and '"energy_mj": 12.0' in render_table(
        cells, "json"
    )
    drawn = plot_pareto(cells, tmp_path / "energy.svg", x="energy").read_text()
    assert "Energy per image (mJ)" in drawn
    assert "energy" in plot_data(cells)["metrics"]
    places = [metric.place for metric in METRICS.values() if metric.place is not None]
    assert len({*places, _TOKENS}) == len(places) + 1  # a place shared would hide a column


def test_error_bars_of_top1_are_the_paired_interval(cells: list[Cell]) -> None:
    top1 = cells[2]["top1"]
    assert top1 and top1.interval == pytest.approx((77.0, 79.0))


def test_models_timed_compiled_are_said_to_be_and_not_compared_with_others(cells: list[Cell]) -> None:
    assert {cell.runtime for cell in cells} == {"eager"} and "compiled" not in render_table(cells, "md")
    other = changed(cells, runtime="compile", run="compiled")
    assert ", compiled, batch 32" in render_table(other, "md")
    assert len(comparable([*cells, *other])) == 2
    timed = make_record(flops().plain() | {"kind": "speed", "compiled": True})
    assert [cell.runtime for cell in cells_of([timed, flops("tome", "8")])] == ["compile", "compile"]


def test_speed_at_one_batch_size_is_not_compared_with_speed_at_another(cells: list[Cell]) -> None:
    single = changed(cells, run="single", batch_size=1)
    both = [*changed(cells, run="batches"), *single]
    assert [group_title(group).rpartition(", ")[2] for group in comparable(both)] == ["batch 32", "batch 1"]
    assert on_front(both, "speedup") == 2 * on_front(cells, "speedup")
    assert "Runs: batches (batch 32), single (batch 1)." in render_table(both, "md")
    untimed = changed(single, {"speedup": None, "throughput": None})  # how accuracy was measured does not matter
    assert len(comparable([*changed(cells, run="batches"), *untimed])) == 1


def test_no_records_give_an_empty_table_with_all_columns() -> None:
    assert cells_of([]) == [] and load_table().empty
    assert list(frame([]).columns) == all_columns()


def test_a_partial_run_has_missing_figures() -> None:
    (cell,) = cells_of([flops()])
    assert cell["top1"] is None and cell.value("gflops") == pytest.approx(3e-9)


def test_a_later_record_replaces_an_earlier_one() -> None:
    (cell,) = cells_of([flops(), flops(flops=4_000_000_000)])
    assert cell.value("gflops") == 4


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"schedule": "13"}, {"schedule": "constant:13"}),
        ({"schedule": "keep:0.7@9,3"}, {"schedule": "keep:0.70@3,9"}),
        ({"schedule": "8", "params": {"tau": 1}}, {"schedule": "8", "params": {"tau": 1.0}}),
    ],
)
def test_a_cell_is_one_however_it_was_written(first: dict[str, Any], then: dict[str, Any]) -> None:
    accuracy = flops("tome", **then).plain() | {"kind": "accuracy", "images": 4, "top1": 0.5}
    (cell,) = cells_of([flops("tome", **first), make_record(accuracy)])
    assert cell["gflops"] and cell["top1"] and cell.schedule == first["schedule"]
    assert CellKey.of("m", "tome", {"seed": 1}, "8") != CellKey.of("m", "tome", {"seed": 2}, "8")


def test_the_front_is_what_no_cell_beats(cells: list[Cell]) -> None:
    assert on_front(cells, "gflops", "top1") == [True, True, True, False, False]
    assert on_front(cells, "throughput", "top1") == [True, True, True, True, False]
    assert on_front(cells, "throughput", "drop") == [True, True, True, True, False]


def test_equal_cells_share_the_front_and_unmeasured_ones_are_off_it(cells: list[Cell]) -> None:
    front = on_front([*cells, *changed(cells, {"gflops": None}), *changed(cells)])
    assert front[:5] == front[10:] == [True, True, True, False, False]
    assert not any(front[5:10])


def test_costs_within_a_percent_are_equal_on_the_front(cells: list[Cell]) -> None:
    worse = changed(cells[2:3], {"gflops": Figure(0.1985), "top1": Figure(60)})
    assert on_front([*cells, *worse])[-1] is False
    assert on_front([*cells, *changed(worse, {"gflops": Figure(0.15)})])[-1] is True


def test_a_front_of_speed_is_judged_by_the_paired_speed_up(cells: list[Cell]) -> None:
    base, first, second = cells[0], *changed([cells[2], cells[2]])
    twins = [
        base,
        *changed([first], {"throughput": Figure(175), "speedup": Figure(1.70)}),
        *changed([second], {"throughput": Figure(170), "speedup": Figure(1.75)}),
    ]
    assert on_front(twins, "throughput") == [True, False, True]
    assert on_front(changed(twins, {"speedup": None}), "throughput") == [True, True, False]


def test_a_cell_with_nan_logits_is_on_no_front_and_beats_none(cells: list[Cell]) -> None:
    broken = [cells[0], *changed(cells[1:2], nonfinite=3), *cells[2:]]
    assert on_front(broken) == [True, False, True, False, False]


def test_flops_are_told_by_part() -> None:
    parts = {"flops_attention": 10**9, "flops_mlp": 2 * 10**9, "flops_method": 10**8, "flops_rest": 9 * 10**8}
    (cell,) = cells_of([flops(flops=4 * 10**9, **parts)])
    told = [cell.value(f"gflops_{part}") for part in ("attention", "mlp", "method", "rest")]
    assert told == pytest.approx([1.0, 2.0, 0.1, 0.9])
    assert cell.value("method_share") == 2.5
    assert cells_of([flops()])[0]["method_share"] is None


def test_a_run_named_twice_is_read_once_and_equal_names_are_told_apart(tmp_path: Path, run: Path) -> None:
    assert len(load_cells([run, run])) == len(load_cells([run]))
    both = load_cells([run, make_run(tmp_path / "elsewhere" / "run")])
    assert list(dict.fromkeys(cell.run for cell in both)) == [f"{tmp_path.name}/run", "elsewhere/run"]


def test_cells_of_other_models_or_data_do_not_compete(tmp_path: Path, run: Path) -> None:
    both = load_cells([run, make_run(tmp_path / "other", model="better", data_fingerprint="ef")])
    assert len(comparable(both)) == 2
    assert sum(on_front(both)) == 6


def test_where_the_machine_sets_the_pace_a_run_competes_with_itself_only(tmp_path: Path, run: Path) -> None:
    own = load_cells([run])
    again = [  # the same machine at another hour
        changed([cell], {name: Figure(1.4 * (cell.value(name) or 0)) for name in ("throughput", "speedup")})[0]
        for cell in load_cells([make_run(tmp_path / "again")])
    ]
    both, front = [*own, *again], on_front(own, "throughput")
    assert 0 < sum(front) < len(front)
    assert on_front(both, "throughput") == [*front, *front]
    assert [{cell.run for cell in group} for group in comparable(both, "throughput", "top1")] == [{"run"}, {"again"}]
    # Speed-ups are ratios within a run, and compare.
    assert any(on_front(both, "speedup")[6:]) and not any(on_front(both, "speedup")[1:5])


def test_runs_under_the_same_conditions_are_compared(tmp_path: Path, run: Path) -> None:
    assert len(comparable(load_cells([run, make_run(tmp_path / "again")]))) == 1


def test_a_cell_that_failed_early_stays_with_its_run(run: Path) -> None:
    RunFolder.open(run).append(
        {"kind": "failure", "cell": "bundled/tome/99", "model": "bundled", "method": "tome", "schedule": "99"}
        | {"phase": "setup", "message": "out of memory", "traceback": "..."}
    )
    cells = load_cells([run])
    assert len(comparable(cells)) == 1 and cells[-1].error == "out of memory"


def test_a_metric_that_is_not_there_is_one_line(cells: list[Cell]) -> None:
    with pytest.raises(UserError, match="no metric 'gflop'. Did you mean 'gflops'"):
        pareto_front(cells, "gflop", "top1")


def test_the_committed_figures_follow_from_the_committed_timings() -> None:
    records = plain_records(Path(__file__).parents[1] / "results" / "reference")
    timed = {record["cell"]: record for record in records if record["kind"] == "speed"}
    base = timed["bundled/none"]
    for record in timed.values():
        for name, above, below in (
            ("speedup", base["seconds"], record["seconds"]),
            ("latency_speedup", base["latency_seconds"], record["latency_seconds"]),
            ("efficiency", record.get("free_seconds"), record["seconds"]),
        ):
            if above:
                middle, low, high = median_ratio_interval(above, below)
                assert record[name] == pytest.approx(middle)
                if "processes" in record:  # measured with the interval of today
                    assert [record[f"{name}_low"], record[f"{name}_high"]] == pytest.approx([low, high])
    assert len(timed) == 17
