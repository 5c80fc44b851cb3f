"""The report page: what it says, what it escapes, and, where there is a Chromium, how it behaves in a browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_run import changed, make_run
from stand_ins import plain_records

from tokbench.errors import UserError
from tokbench.report import html
from tokbench.report.findings import findings
from tokbench.report.html import plot_data, write_report
from tokbench.report.tables import render_table
from tokbench.report.text import variant_name
from tokbench.results.cell import Cell, Figure
from tokbench.results.folder import RunFolder
from tokbench.results.table import load_cells

HOSTILE = "<script>window.hacked = true</script><b>&amp;"


# --- the page -----------------------------------------------------------------------------------------------


def test_the_page_needs_no_network(run: Path, tmp_path: Path) -> None:
    page = write_report([run], tmp_path / "page.html").read_text()
    own = page.replace(html_library(), "")
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", own) and "@import" not in own and "http" not in own
    assert "fetch(" not in own


def html_library() -> str:
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def test_every_name_is_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", model=HOSTILE, data=HOSTILE)
    page = write_report([run], tmp_path / "page.html").read_text().replace(html_library(), "")
    assert "window.hacked" in page and HOSTILE not in page and "<script>window" not in page


def test_fronts_of_the_plot_are_those_of_the_tables(cells: list[Cell]) -> None:
    data = plot_data(cells)
    assert sorted(data["fronts"]["gflops|top1"][0]) == [0, 1, 2] and len(data["fronts"]["gflops|top1"]) == 1
    assert data["fronts"]["throughput|top1"] == [[0, 1, 2, 3]]
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_each_run_has_its_front_where_the_machine_sets_the_pace(run: Path, tmp_path: Path) -> None:
    again = make_run(tmp_path / "again")
    data = plot_data(load_cells([run, again]))
    first = [0, 1, 2, 3]
    assert data["fronts"]["throughput|top1"] == [first, [number + len(data["cells"]) // 2 for number in first]]
    assert len(data["fronts"]["gflops|top1"]) == 1
    assert "a front of its own" in write_report([run, again], tmp_path / "two.html").read_text()
    assert "a front of its own" not in write_report([run], tmp_path / "one.html").read_text()
    names = [cell["name"] for cell in data["cells"]]
    assert len(set(names)) == len(names) and {cell["dash"] for cell in data["cells"][:3]} == {"solid"}


def test_page_table_and_findings_name_the_same_front_of_speed() -> None:
    cells = load_cells([Path(__file__).parents[1] / "results" / "reference"])
    fronts = plot_data(cells)["fronts"]
    table = json.loads(render_table(cells, "json"))
    ((*members,),) = fronts["speedup|top1"]
    assert [members] == fronts["throughput|top1"]
    assert [number for number, row in enumerate(table) if row["front_throughput"]] == members
    told = next(text for text in findings(cells)[0].sentences if "front of top-1 against speed" in text)
    on, _, never = told.partition(";")
    names = {cell.variant for cell in cells} - {"none"}
    best = {cells[number].variant for number in members} - {"none"}
    assert best and all(variant_name(name, name) in on for name in best)
    assert names - best and all(variant_name(name, name) in never for name in names - best)


def test_cells_say_their_figures_with_their_own_intervals(cells: list[Cell]) -> None:
    cells = [changed([cells[0]], also={"top1_low": 79.0, "top1_high": 81.0})[0], *cells[1:]]
    unreduced, tome = (cell["words"] for cell in plot_data(cells)["cells"][:2])
    assert unreduced["top1"] == "80.0 [79.0, 81.0]" and unreduced["throughput"] == "100"
    assert tome["drop"] == "0.2 [−0.3, 0.7]" and tome["throughput"] == "130 [108, 144]"
    assert tome["top1"] == "79.8 [77.8, 81.8]"  # Wilson's of top-1; bars show that of the difference
    assert plot_data(cells)["cells"][1]["figures"]["top1"] == pytest.approx([79.8, 79.3, 80.3])
    assert plot_data(changed(cells, nonfinite=3))["cells"][1]["broken"] == ["NaN or infinite logits: 3 images"]


def test_what_cannot_be_written_is_one_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="call it page.html"):
        write_report([run], tmp_path / "page.pdf")
    with pytest.raises(UserError, match="no run folder"):
        write_report([tmp_path / "nowhere"], tmp_path / "page.html")
    empty = RunFolder.create(tmp_path / "empty", {}).path
    with pytest.raises(UserError, match="no records"):
        write_report([empty], tmp_path / "page.html")


# --- in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program, driver = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver); not both are here")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1200,1700",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chromium = webdriver.Chrome(options, webdriver.ChromeService(driver))
    chromium.set_page_load_timeout(60)
    yield chromium
    chromium.quit()


def open_page(browser: Any, runs: list[Path], out: Path) -> None:
    browser.get_log("browser")
    browser.get(write_report(runs, out).as_uri())


def column(browser: Any, head: str) -> list[str]:
    return browser.execute_script(
        "const heads = [...document.querySelectorAll('#cells th')];"
        "const at = heads.findIndex(th => th.textContent.trim() === arguments[0]);"
        "return [...document.querySelectorAll('#cells tbody tr')].filter(row => !row.hidden)"
        ".map(row => row.cells[at].textContent);",
        head,
    )


def press(browser: Any, head: str) -> None:
    browser.find_element("xpath", f"//th[normalize-space()='{head}']/button").click()


def test_the_page_works_in_a_browser(browser: Any, run: Path, tmp_path: Path) -> None:
    hostile = make_run(tmp_path / "hostile", model=HOSTILE, device="cuda")
    open_page(browser, [run, hostile], tmp_path / "page.html")

    points = "#plot .scatterlayer .point"
    assert len(browser.find_elements("css selector", points)) >= 5  # the plot is there
    assert browser.execute_script("return document.querySelectorAll('#plot .legendtext').length") >= 4

    press(browser, "Drop [95 %]")
    ascending = column(browser, "Drop [95 %]")
    assert ascending[:4] == ["", "", "0.2 [−0.3, 0.7] n.s.", "0.2 [−0.3, 0.7] n.s."]
    assert ascending[-1] == "10.0 [8.0, 12.0]"
    press(browser, "Drop [95 %]")
    assert column(browser, "Drop [95 %]")[0] == "10.0 [8.0, 12.0]"
    press(browser, "Top-1 %")  # the best first, whichever way that is
    assert column(browser, "Top-1 %")[0] == "80.0" and column(browser, "Top-1 %")[-1] == "70.0"
    press(browser, "Top-1 %")
    assert column(browser, "Top-1 %")[0] == "70.0"
    press(browser, "Schedule")
    press(browser, "Schedule")
    assert column(browser, "Schedule")[0] == "keep:0.7@3,6,9" and column(browser, "Schedule")[-1] == ""

    browser.find_element("id", "filter").send_keys("tome 13 hacked")
    assert column(browser, "Method") == ["tome"]
    browser.find_element("id", "filter").send_keys("\ue003" * 15)  # backspace

    browser.find_element("css selector", "#cells tbody tr[data-cell='1']").click()
    assert "ToMe at r=8" in browser.find_element("id", "pins").text
    browser.execute_script("document.getElementById('plot').emit('plotly_click', {points: [{customdata: 2}]})")
    assert "ToMe at r=13" in browser.find_element("id", "pins").text
    browser.find_element("css selector", ".pin button").click()
    assert "r=8" not in browser.find_element("id", "pins").text

    for axis, name in (("x", "gflops"), ("y", "drop"), ("group", "1")):
        chosen = browser.find_element("id", axis)
        browser.execute_script("arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change'))",
                               chosen, name)  # fmt: skip
    labels = browser.execute_script("return [...document.querySelectorAll('#plot .infolayer .g-xtitle, .g-ytitle')]"
                                    ".map(title => title.textContent)")  # fmt: skip
    assert "GFLOPs per image (lower is better)" in labels and "Top-1 drop (points) (lower is better)" in labels

    assert browser.execute_script("return window.hacked") is None
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def test_numbers_in_words_carry_their_own_intervals(browser: Any, run: Path, tmp_path: Path) -> None:
    open_page(browser, [run], tmp_path / "page.html")
    cell = load_cells([run])[2]
    browser.execute_script("document.getElementById('plot').emit('plotly_click', {points: [{customdata: 2}]})")
    told = browser.find_element("id", "pins").text
    (top1,) = [line for line in told.splitlines() if line.startswith("Top-1 accuracy")]
    bounds = [float(number) for number in re.findall(r"[\d.]+", top1.partition("[")[2])]
    assert bounds == pytest.approx([cell.also["top1_low"], cell.also["top1_high"]], abs=0.051)


def test_a_bar_that_says_nothing_is_cut_and_ends_in_an_arrow(
    browser: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = load_cells([run])
    speedup = cells[2]["speedup"]
    assert speedup is not None
    cells[2] = replace(cells[2], figures={**cells[2].figures, "speedup": Figure(speedup.value, 0.01, 76.3)})
    monkeypatch.setattr(html, "load_shown", lambda *_: cells)
    open_page(browser, [run], tmp_path / "page.html")
    ends = browser.execute_script("return document.getElementById('plot').layout.xaxis.range")
    low, high = plot_data(cells)["groups"][0]["reach"]["speedup"]
    assert ends[0] < low and high < ends[1] < 5
    arrows = browser.execute_script(
        "return document.getElementById('plot').data"
        ".filter(trace => /triangle-(left|right)/.test(trace.marker?.symbol)).map(trace => trace.x)"
    )
    assert arrows == [[pytest.approx(low)], [pytest.approx(high)]]
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def test_the_manifest_is_told_without_braces_and_without_what_is_empty(run: Path) -> None:
    conditions = {"dtype": "fp32", "models": {"m": {"input_size": [3, 4, 4], "data": None}}}
    assert html._facts({"conditions": conditions, "git": None, "plugins": {}, "command": "tokbench run"}) == {
        "conditions · dtype": "fp32",
        "conditions · models · m · input_size": "3, 4, 4",
        "command": "tokbench run",
    }


def test_the_plot_begins_with_what_is_kept_against_what_it_costs(cells: list[Cell]) -> None:
    blind = changed(cells, {"top1": None, "drop": None})
    features = changed(blind, {"agreement": None, "similarity": Figure(0.9)})
    counted = changed(features, dict.fromkeys(("similarity", "speedup", "throughput", "top5"), None))
    assert plot_data(cells)["axes"] == ["speedup", "top1"] and plot_data(blind)["axes"] == ["speedup", "agreement"]
    assert plot_data(features)["axes"] == ["speedup", "similarity"]
    assert plot_data(counted)["axes"] == ["gflops", "flops_ratio"]  # never the same twice
    assert plot_data([])["axes"] == ["", ""]


def test_long_names_leave_room_for_what_is_said_of_them(browser: Any, run: Path, tmp_path: Path) -> None:
    name = "vit_small_patch16_224.augreg_in21k_ft_in1k@my_checkpoint_of_a_model_that_was_trained_for_long@224"
    folder = RunFolder.create(tmp_path / "long", {"conditions": {"models": {name: {"data_fingerprint": "0a" * 32}}}})
    for record in plain_records(run):
        folder.append(record)
    open_page(browser, [folder.path], tmp_path / "page.html")
    widths = browser.execute_script("return [...document.querySelectorAll('dl > *')].map(part => part.clientWidth)")
    assert len(widths) >= 2 and min(widths) >= 150


def test_a_page_with_nothing_to_draw_is_still_a_page(browser: Any, run: Path, tmp_path: Path) -> None:
    cell = {"cell": "m/none", "model": "m", "method": "none", "schedule": ""}
    failure = {"kind": "failure", "phase": "setup", **cell, "message": "out of memory"}
    folder = RunFolder.create(tmp_path / "failed", {})
    folder.append(failure)
    open_page(browser, [folder.path], tmp_path / "page.html")
    assert "Nothing was measured" in browser.find_element("id", "plot").text
    assert "out of memory" in browser.find_element("tag name", "body").text
    assert [entry["message"] for entry in browser.get_log("browser")] == []
