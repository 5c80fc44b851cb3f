"""Plots of a small made-up run, and where their labels go."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from made_run import make_run
from tokbench.report.metrics import (
    load_cells,
    load_table,
    pareto_front,
    table_of_records,
)

from tokbench.errors import UserError
from tokbench.measure.stats import median_ratio_interval
from tokbench.report import panels, plots
from tokbench.report.labels import Spot, place, spots_along, spots_around
from tokbench.report.plots import plot_pareto
from tokbench.report.published import published_points


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture
def cells(run: Path) -> list[Cell]:
    return load_cells([run])


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
