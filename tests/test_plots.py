"""Plots of a small made-up run, what decides them, and where their labels go."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokbench.report import canvas, plots

# isort: split
import matplotlib
from made_run import changed, make_run
from matplotlib.figure import Figure as Picture
from matplotlib.text import Text

from tokbench import list_methods
from tokbench.errors import UserError
from tokbench.report.labels import Spot, place, spots_along, spots_around
from tokbench.report.panels import MOST_LABELS, Art
from tokbench.report.plots import SIZES, plot_pareto, plot_run
from tokbench.report.published import published_points
from tokbench.report.scene import Equal, Scene, bar_reach, scene, side_by_side
from tokbench.report.styles import STYLES, find_theme, method_style
from tokbench.report.text import short_schedule
from tokbench.results.cell import Cell, CellKey, Figure, Setting
from tokbench.results.table import load_cells

HOSTILE = "a$b$ $\\b$ _x_ {y} ^2 <b> \\frac"


def drawn(cells: Sequence[Cell], **asked: Any) -> Picture:
    """The picture that `plot_pareto` would write."""
    pictures: list[Picture] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save", lambda picture, *_, **__: pictures.append(picture))
        plot_pareto(cells, "never-written.png", **asked)
    return pictures[0]


def texts(picture: Picture) -> list[Text]:
    return [text for text in picture.findobj(Text) if text.get_text()]


def words(cells: Sequence[Cell], **asked: Any) -> str:
    return "\n".join(text.get_text() for text in texts(drawn(cells, **asked)))


def like(cell: Cell, method: str, schedule: str | None = None, /, **figures: float) -> Cell:
    """A copy of a cell of another method, with other figures."""
    schedule = cell.schedule if schedule is None else schedule
    measured = {**cell.figures, **{name: Figure(value) for name, value in figures.items()}}
    params = dict(cell.params)
    return replace(cell, key=CellKey.of(cell.model, method, params, schedule), schedule=schedule, figures=measured)


def of_model(cells: Sequence[Cell], model: str) -> list[Cell]:
    return [replace(cell, key=replace(cell.key, model=model)) for cell in cells]


# --- plots --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix, start", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_plots_are_written_by_suffix_and_always_the_same(
    cells: list[Cell], tmp_path: Path, suffix: str, start: bytes
) -> None:
    out = tmp_path / "new" / f"plot.{suffix}"
    assert plot_pareto(cells, out, x="gflops") == out and out.read_bytes().startswith(start)
    again = plot_pareto(cells, tmp_path / f"again.{suffix}", x="gflops")
    assert out.read_bytes() == again.read_bytes()


def test_the_plot_says_what_it_shows(cells: list[Cell]) -> None:
    text = words(cells)
    for part in ("bundled: token fusion", "1,000 images", "A CPU (cpu)", "fp32", "batch 32", "(multiply-adds)",
                 "Throughput (images/s)", "Top-1 accuracy (%)", "unreduced: 80.0 %", "unreduced: 0.400 GFLOPs",
                 "unreduced: 100 images/s", "ToMe r=8", "ToMe r=13", "top-k keep 0.7@3,6,9", "Pareto front",
                 "Vertical bars: 95 % interval of the difference", "Horizontal bars: 95 % interval over timing",
                 ):  # fmt: skip
        assert part in text, part
    assert "random r=13" not in text and "Arrow heads" not in text and "Too many" not in text


def test_any_metric_goes_on_any_axis(cells: list[Cell]) -> None:
    text = words(cells, x=["speedup", "flops_ratio"], y="drop")
    assert "Top-1 drop (points)" in text and "Speed-up over the unreduced model" in text


def test_a_picture_that_cannot_be_written_leaves_the_old_one(cells: list[Cell], tmp_path: Path) -> None:
    out = plot_pareto(cells, tmp_path / "a.png", x="gflops")
    before = out.read_bytes()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="cannot write .*a.png: No space left"):
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        plot_pareto(cells, out, x="gflops", theme="dark")
    assert out.read_bytes() == before and list(tmp_path.glob("a*")) == [out]


def test_unmeasured_default_panels_are_left_out(cells: list[Cell]) -> None:
    assert "Throughput" not in words(changed(cells, {"throughput": None}))


def test_without_accuracy_flops_are_drawn_against_speed(cells: list[Cell], tmp_path: Path) -> None:
    blind = changed(cells, dict.fromkeys(("top1", "top5", "drop", "agreement"), None))
    text = words(blind)
    assert "GFLOPs per image" in text and "Speed-up over the unreduced model" in text and "Top-1" not in text
    assert "Throughput (images/s)" in words(changed(blind, {"speedup": None}))
    assert "Throughput (images/s)" in words(blind, x="speedup")
    told: list[str] = []
    assert plot_run(blind, tmp_path / "a.png", told.append) == tmp_path / "a.png" and not told
    for alone in ({"gflops", "flops_ratio"}, {"speedup", "throughput"}, set()):
        only = changed(blind, {name: None for cell in blind for name in cell.figures if name not in alone})
        assert plot_run(only, tmp_path / "b.png", told.append) is None
    assert "no plot was drawn" in told[0] and "measured here: gflops, flops_ratio." in told[0] and len(told) == 3
    assert not (tmp_path / "b.png").exists()


def test_nothing_to_plot_is_one_line(cells: list[Cell], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no cell has both top1 and latency; measured here: gflops, flops_ratio, th"):
        plot_pareto(cells, tmp_path / "a.png", x="latency")
    with pytest.raises(UserError, match="measured here: nothing"):
        plot_pareto([], tmp_path / "a.png")
    with pytest.raises(UserError, match="drop is on both axes"):
        plot_pareto(cells, tmp_path / "a.png", x=["gflops", "drop"], y="drop")
    with pytest.raises(UserError, match="suffix must be one of png, svg, pdf"):
        plot_pareto(cells, tmp_path / "a.jpg")
    with pytest.raises(UserError, match="Did you mean 'gflops'"):
        plot_pareto(cells, tmp_path / "a.png", x="gflop")


def test_a_run_without_the_unreduced_model_can_be_drawn(cells: list[Cell]) -> None:
    assert "unreduced:" not in words(cells[1:])


def test_a_reference_line_needs_only_its_own_metric(cells: list[Cell]) -> None:
    text = words([*changed(cells[:1], {"throughput": None}), *cells[1:]], x="throughput")
    assert "unreduced: 80.0 %" in text and "unreduced: 100 images/s" not in text


def moved(cells: Sequence[Cell]) -> tuple[Scene, Equal]:
    shown = scene(cells, "gflops", "top1")
    assert shown is not None
    aside = side_by_side(shown, SIZES["wide"].marker_share)
    assert aside.equal is not None
    return aside, aside.equal


def test_methods_at_equal_cost_stand_side_by_side_on_the_front_they_had(cells: list[Cell]) -> None:
    names = ("tome", "tofu", "mctf", "evit")
    costs = [0.2 + 0.0001 * i for i in range(4)]
    level = [like(cells[1], name, gflops=cost, top1=79.8 - i)
             for i, (name, cost) in enumerate(zip(names, costs, strict=True))]  # fmt: skip
    text = words([cells[0], *level], x="gflops")
    assert "moved aside, up to ±0.00" in text and "ticks: as measured" in text
    assert "aside" not in words(cells)
    aside, equal = moved([cells[0], *level])
    assert [point.on_front for point in aside.points] == [True, True, False, False, False]
    xs = [point.x.value for point in aside.points]
    assert xs[0] == cells[0].value("gflops")  # the unreduced model
    shifts = np.abs(np.array(xs[1:]) - costs)
    assert xs[1:] == sorted(xs[1:]) and 0.002 < equal.shift < 0.02 and shifts.max() == pytest.approx(equal.shift)
    ((low, high),) = equal.bands
    assert low < xs[1] and xs[-1] < high and equal.measured == costs


def test_columns_of_equal_cost_never_run_into_each_other(cells: list[Cell]) -> None:
    level = [like(cells[1], name, gflops=cost)
             for cost in (0.2, 0.205) for name in ("tome", "tofu", "mctf", "evit")]  # fmt: skip
    _, equal = moved([cells[0], *level])
    (_, left), (right, _) = equal.bands
    assert left < right and equal.shift < 0.0025


def test_costs_all_along_the_axis_are_no_columns(cells: list[Cell]) -> None:
    shown = scene([like(cells[1], "tome", f"flops:{i + 100}e-3", gflops=0.1 * 1.004**i) for i in range(99)], "gflops",
                  "top1")  # fmt: skip
    assert shown is not None and side_by_side(shown, 0.02) is shown


def test_two_machines_are_laid_over_each_other_and_named(run: Path, cells: list[Cell], tmp_path: Path) -> None:
    other = load_cells([make_run(tmp_path / "other", device="cuda")])
    faster = [like(cell, cell.method, throughput=4 * (cell.value("throughput") or 0)) for cell in other]
    picture = drawn([*cells, *faster])
    text = "\n".join(text.get_text() for text in texts(picture))
    assert text.count("bundled: token fusion") == 1 and "A CPU" in text and "A GPU" in text
    assert "A CPU (cpu)" not in text  # in the legend, not among what all cells share
    slanted = {text.get_text() for text in texts(picture) if text.get_fontstyle() == "italic"}
    assert {"A GPU", "ToMe r=13"} <= slanted and "A CPU" not in slanted  # the second run's, elsewhere than the first's
    both = drawn([*cells, *faster], x="gflops")
    assert {text.get_text() for text in texts(both) if text.get_fontstyle() == "italic"} == {"A GPU"}
    again = words([*cells, *load_cells([make_run(tmp_path / "again")])])
    assert "\nrun\n" in again and "\nagain\n" in again and "a front of its own" in again


def test_a_run_is_left_out_of_the_panels_it_lacks_the_metric_of_and_that_is_told(
    cells: list[Cell], tmp_path: Path
) -> None:
    more = load_cells([make_run(tmp_path / "untimed", images=500, data_fingerprint="ef")])
    untimed = changed(more, {"throughput": None, "speedup": None})
    both, told = [*cells, *untimed], list[str]()
    text = words(both, tell=told.append)
    assert told == ["left out of the plot: throughput of untimed (no cell has that together with top1)."]
    assert text.count("GFLOPs per image") == 2 and text.count("Throughput (images/s)") == 1
    assert words(both, size="paper").count("Throughput (images/s)") == 1
    assert "500 images" not in words(both, x="throughput", tell=told.append) and told[0] == told[1]
    assert "1,000 images" in words(cells, tell=told.append) and len(told) == 2
    with pytest.raises(UserError, match="no cell has both top1 and throughput"):
        plot_pareto(untimed, tmp_path / "a.png", x="throughput")


def test_a_run_laid_over_another_keeps_its_looks_where_the_other_is_absent(cells: list[Cell], tmp_path: Path) -> None:
    second, told = load_cells([make_run(tmp_path / "second")]), list[str]()
    picture = drawn([*changed(cells, {"throughput": None}), *second], tell=told.append)
    assert told == ["left out of the plot: throughput of run (no cell has that together with top1)."]
    paler = Art(SIZES["wide"], find_theme("light"), second, {"a": "", "b": ""}).series("tome", "tome", 1)["color"]
    assert all(paler in [line.get_color() for line in panel.lines] for panel in picture.axes)


@pytest.mark.parametrize("size", ["wide", "page", "paper"])
def test_long_names_of_models_shrink_instead_of_being_cut(cells: list[Cell], size: str) -> None:
    name = "vit_base_patch16_224.augreg_in21k_ft_in1k@of_somebody_with_a_long_name"
    picture = drawn([*of_model(cells, name), *cells], x="gflops", size=size)
    named = [text for text in texts(picture) if text.get_text().startswith("vit_base")]
    assert named and all(text.get_window_extent().x1 <= picture.bbox.x1 for text in named)


@pytest.mark.parametrize("size", ["wide", "paper"])
def test_cells_with_nan_logits_are_crossed_out(cells: list[Cell], size: str) -> None:
    assert "NaN logits" not in words(cells, size=size)
    assert "NaN logits" in words([*cells[:2], *changed(cells[2:3], nonfinite=3), *cells[3:]], size=size)


def test_models_have_panels_of_their_own(cells: list[Cell]) -> None:
    text = words([*cells, *of_model(cells, "deit")])
    assert "bundled: token fusion" in text and "deit: token fusion" in text


@pytest.mark.parametrize("size, inches", [("wide", 11.1), ("page", 7.0), ("paper", 3.4)])
def test_a_figure_has_the_width_it_is_asked_for(cells: list[Cell], size: str, inches: float) -> None:
    picture = drawn(cells, size=size)
    assert picture.get_figwidth() == pytest.approx(inches)
    assert any("token fusion without training" in text.get_text() for text in texts(picture)) == (size == "wide")


def test_every_word_of_a_dark_figure_stands_out_from_its_background(cells: list[Cell]) -> None:
    picture = drawn(cells, theme="dark")
    assert matplotlib.colors.to_hex(picture.get_facecolor()) == "#16191d"
    assert all(sum(matplotlib.colors.to_rgb(text.get_color())) > 1 for text in texts(picture))


def test_the_axis_is_stretched_only_where_a_few_cells_fall_far_behind(cells: list[Cell]) -> None:
    more = [like(cell, cell.method, gflops=gflops) for cell in cells[1:3] for gflops in (0.1, 0.15)]
    fallen = [*cells[:-1], *more, like(cells[-1], "random", top1=20.0)]
    assert "stretched" not in words([*cells, *more]) and "stretched" in words(fallen)
    assert "stretched" not in words(fallen, linear=True)


def test_published_points_are_named_as_such(cells: list[Cell], tmp_path: Path) -> None:
    vit = of_model(cells, "vit_small_patch16_224.augreg_in21k_ft_in1k")
    text = words(vit, published=True)
    assert text.count("ToMe r=13, published") == 1 and "ImageNet-1k, V100" in text
    assert "published" not in words(vit)
    with pytest.raises(UserError, match="^--published: no paper printed agreement against gflops for vit_small.*, only "
                       "throughput, speedup, top1, drop"):  # fmt: skip
        plot_pareto(vit, tmp_path / "a.png", published=True, x="gflops", y="agreement")
    with pytest.raises(
        UserError, match="top1 against gflops or throughput for bundled, only for vit_small_patch16_224"
    ):
        plot_pareto(cells, tmp_path / "a.png", published=True)
    assert not (tmp_path / "a.png").exists()
    told: list[str] = []
    assert "ImageNet-1k, V100" in words([*vit, *cells], published=True, tell=told.append)
    assert len(told) == 1 and "against gflops for vit_small" in told[0] and "or throughput for bundled" in told[0]


def test_published_points_go_with_the_weights_they_were_measured_on() -> None:
    assert not published_points("vit_base_patch16_224", "top1")  # timm's default has other weights
    unreduced, tome = published_points("vit_base_patch16_224.augreg_in21k_ft_in1k", "top1", "drop", "speedup")
    assert (unreduced.method, tome.method) == ("none", "tome")
    assert (unreduced.values["top1"], tome.values["top1"]) == (84.57, 82.60)
    assert tome.values["drop"] == pytest.approx(1.97) and tome.values["speedup"] == pytest.approx(1.6537, abs=1e-4)
    assert not published_points("deit_small_patch16_224@mine", "gflops")


def test_wrong_sizes_and_themes_are_one_line(cells: list[Cell], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no size 'papre'; there are wide, page, paper. Did you mean 'paper'"):
        plot_pareto(cells, tmp_path / "a.png", size="papre")
    with pytest.raises(UserError, match="no theme 'drak'.* Did you mean 'dark'"):
        plot_pareto(cells, tmp_path / "a.png", theme="drak")


def test_styles_are_distinct_and_fixed() -> None:
    assert len({style.color for style in STYLES.values()}) == len({s.marker for s in STYLES.values()}) == len(STYLES)
    assert set(STYLES) == set(list_methods())


def test_a_method_of_other_people_looks_the_same_in_every_figure_and_like_none_of_ours() -> None:
    mine = method_style("mine")
    assert mine == method_style("mine") != method_style("yours") and mine.name == "mine"
    assert mine.color not in {style.color for style in STYLES.values()}


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


def test_labels_of_the_front_name_parameters_and_positions(cells: list[Cell]) -> None:
    later = like(cells[3], "topk", "keep:0.7@4,7,10", gflops=0.1, top1=75.0)
    other = replace(like(cells[1], "tome", gflops=0.25, top1=79.0), params={"prop_attn": False})
    text = words([*cells, later, other], x="gflops")
    assert "top-k keep 0.7@4,7,10" in text and "ToMe:prop_attn=false r=8" in text


# --- the user's matplotlib, and names -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "svg"])
def test_plots_are_drawn_whatever_the_users_matplotlib_is_set_to(run: Path, tmp_path: Path, backend: str) -> None:
    settings = "text.usetex: True\nfigure.dpi: 30\nlines.linewidth: 9\nsavefig.bbox: tight\nbackend: nonsense\n"
    (tmp_path / "matplotlibrc").write_text(settings)
    plain = plot_pareto(load_cells([run]), tmp_path / "plain.png", x="gflops").read_bytes()
    code = (
        "import sys, os; from tokbench.report.plots import plot_pareto; from tokbench.results.table import load_cells;"
        "plot_pareto(load_cells([sys.argv[1]]), sys.argv[2], x='gflops'); print(os.environ['MPLBACKEND'])"
    )
    theirs = {**os.environ, "MPLBACKEND": backend, "MPLCONFIGDIR": str(tmp_path)}
    out = tmp_path / "theirs.png"
    done = subprocess.run([sys.executable, "-c", code, run, out], env=theirs, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == backend, done.stderr
    assert out.read_bytes() == plain


@pytest.mark.parametrize("name", ["a$b$", "$\\b$", "ours $a_{$ v2", HOSTILE])
def test_names_are_text_and_no_formulas(cells: list[Cell], tmp_path: Path, name: str) -> None:
    named = [replace(cell, params={"$x_1$": "$\\b$"} if cell.params else {}, data=name) for cell in cells]
    for suffix in ("png", "svg"):
        plot_pareto(of_model(named, name), tmp_path / f"a.{suffix}", x="gflops")
    text = words([*of_model(named, name), *of_model(cells, name + "2")], x="gflops")
    assert name in text and name + "2" in text and f"data {name}" in text and "$x_1$=$\\b$" in text


def test_our_settings_end_with_the_drawing(cells: list[Cell], tmp_path: Path) -> None:
    with matplotlib.rc_context({"font.size": 31, "text.parse_math": True}):
        plot_pareto(cells, tmp_path / "a.png", x="gflops")
        assert matplotlib.rcParams["font.size"] == 31 and matplotlib.rcParams["text.parse_math"]


def test_a_picture_of_very_many_models_is_smaller_than_the_largest_there_can_be(tmp_path: Path) -> None:
    picture = Picture(figsize=(0.1, 1000))
    canvas.save(picture, tmp_path / "a.png", dpi=200)
    header = (tmp_path / "a.png").read_bytes()[16:24]
    assert int.from_bytes(header[4:], "big") <= 30_000


# --- long bars, and many cells ------------------------------------------------------------------------------


def with_bar(cell: Cell, metric: str, low: float, high: float) -> Cell:
    figure = cell[metric]
    assert figure is not None
    return replace(cell, figures={**cell.figures, metric: Figure(figure.value, low, high)})


def test_one_bar_that_says_nothing_does_not_press_the_markers_together(cells: list[Cell]) -> None:
    before = drawn(cells, x="speedup").axes[0]
    noisy = [*cells[:2], with_bar(cells[2], "speedup", 0.01, 76.3), *cells[3:]]
    picture = drawn(noisy, x="speedup")
    ((left, right), (low, high)) = picture.axes[0].get_xlim(), before.get_xlim()
    assert high - low < right - left < 4 * (high - low)
    assert "Arrow heads: the bar is longer" in "\n".join(text.get_text() for text in texts(picture))
    heads = picture.axes[0].collections[-4:]
    ends = sorted(float(x) for marks in heads for x, _ in np.asarray(marks.get_offsets()))
    assert ends == pytest.approx(bar_reach(noisy, "speedup")) and left < ends[0] < 1 < 1.8 < ends[1] < right


def test_bars_that_all_say_nothing_leave_a_tenth_of_the_panel_to_the_values(cells: list[Cell]) -> None:
    vague = [with_bar(cell, "top1", -500.0, 700.0) for cell in cells]
    low, high = drawn(vague, x="gflops").axes[0].get_ylim()
    assert 10 < high - low < 120
    upside_down = [with_bar(cell, "drop", -500.0, 700.0) for cell in cells]
    bottom, top = drawn(upside_down, x="gflops", y="drop").axes[0].get_ylim()
    assert 10 < bottom - top < 120


def test_usual_bars_are_drawn_whole(cells: list[Cell]) -> None:
    for metric in ("top1", "throughput", "drop"):
        low, high = bar_reach(cells, metric)
        ends = [end for cell in cells[1:] if (figure := cell[metric]) and figure.interval for end in figure.interval]
        assert low <= min(ends) and max(ends) <= high
    alike = [like(cell, cell.method) for cell in cells[:1]] + [with_bar(cells[1], "top1", 70.0, 90.0)]
    assert bar_reach([*alike[1:], *alike[1:]], "top1") == pytest.approx((59.6, 100.0), abs=1)


def test_of_a_thousand_cells_some_are_named_and_that_is_said(cells: list[Cell]) -> None:
    many = [cells[0]]
    for i in range(1000):
        share = 0.05 + 0.9 * i / 1000
        cell = like(cells[1], ("tome", "evit")[i % 2], f"flops:{share:.4f}", gflops=0.4 * share, top1=80 * share)
        many.append(replace(cell, params={"a": i % 90}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = drawn(many, x="gflops")
    told = [text.get_text() for text in texts(picture)]
    assert sum("% FLOPs" in text for text in told) <= MOST_LABELS
    assert any(f"to name all: {MOST_LABELS} of up to" in text for text in told)
    more = [text for text in texts(picture) if text.get_text().startswith("and ")]
    assert len(more) == 1 and picture.legends[0].get_window_extent().y0 >= 0


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


def test_official_weights_that_came_as_a_file_are_asked_to_be_named(cells: list[Cell], tmp_path: Path) -> None:
    mine = [replace(cell, key=replace(cell.key, model="deit_small_patch16_224@best")) for cell in cells]
    with pytest.raises(UserError, match="run it with --label deit_small_patch16_224.fb_in1k"):
        plot_pareto(mine, tmp_path / "a.png", published=True)


def test_speed_by_batch_size_is_a_line_for_each_cell(cells: list[Cell]) -> None:
    swept = [
        replace(changed([cell], {"speedup": Figure(gain * cell.figures["speedup"].value, 0.5, 3)})[0], at=Setting(size))
        for size, gain in ((1, 0.6), (8, 0.9), (32, 1.0))
        for cell in cells
    ]
    picture = drawn(swept, x="batch")
    (panel,) = picture.axes
    handles, labels = panel.get_legend_handles_labels()
    assert labels == ["ToMe at r=8", "ToMe at r=13", "top-k at keep 0.7@3,6,9", "random:seed=1 at r=13"]
    assert handles[0][0].get_xdata().tolist() == pytest.approx([1, 8, 32], rel=0.05)
    assert handles[0][0].get_ydata().tolist() == pytest.approx([0.78, 1.17, 1.3])
    assert panel.get_xlabel() == "Images in a batch" and len(drawn(swept).axes) == 6
    with pytest.raises(UserError, match="no run here was timed at several batch sizes"):
        drawn(cells, x=["batch"])
    with pytest.raises(UserError, match="no cell has efficiency; measured here"):
        drawn(swept, x="batch", y="efficiency")


def test_searched_schedules_are_filled_and_others_hollow(cells: list[Cell]) -> None:
    plain = next(cell for cell in cells if cell.schedule == "constant:13" and cell.method == "tome")
    usual, found = (
        replace(plain, schedule=text, key=CellKey.of("bundled", "tome", {}, text), tokens=tokens)
        for text, tokens in (("flops:0.5", (150.0, 100.0)), ("searched:flops:0.5", (120.0, 110.0)))
    )
    art = Art(SIZES["wide"], find_theme("light"), [*cells, usual, found])
    color, background = method_style("tome").color, find_theme("light").background
    assert [art.marks(cell)["markerfacecolor"] for cell in (found, usual)] == [color, background]
    assert Art(SIZES["wide"], find_theme("light"), cells).marks(usual)["markerfacecolor"] == color
    assert short_schedule(found.schedule) == "50 % FLOPs (searched)"
    best = replace(found, figures={**found.figures, "top1": Figure(99.0), "gflops": Figure(0.1)})
    both, without = (scene([*cells, usual, *more], "gflops", "top1") for more in ([best], []))
    assert both and without and [point.cell for front in both.fronts() for point in front] == [best]
    members = [[point.cell for front in fronts for point in front] for fronts in (both.fronts(False), without.fronts())]
    assert members[0] == members[1] != []
    assert "front without search" in words([*cells, usual, best]) and "front without" not in words([*cells, usual])
    (panel,) = drawn([*cells, usual, found], x="block").axes
    lines = dict(zip(panel.get_legend_handles_labels()[1], panel.get_lines(), strict=True))
    assert list(lines) == ["unreduced", "ToMe at 50 % FLOPs", "ToMe at 50 % FLOPs\n(searched)"]
    assert lines["ToMe at 50 % FLOPs\n(searched)"].get_ydata().tolist() == [120, 110]
    for asked, fault in (({"y": "top1"}, "no --y"), ({"x": ["block", "gflops"]}, "by itself")):
        with pytest.raises(UserError, match=fault):
            drawn(cells, **{"x": "block"} | asked)
