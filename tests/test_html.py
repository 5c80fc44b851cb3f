"""The report page: what it says, what it escapes, and, where there is a Chromium, how it behaves in a browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from made_run import make_run
from stand_ins import plain_records
from tokbench.report.metrics import load_table

from tokbench.errors import UserError
from tokbench.report import html
from tokbench.report.findings import findings, tell_runs_apart
from tokbench.report.html import plot_data, write_report
from tokbench.report.styles import variant_name
from tokbench.report.tables import render_table
from tokbench.results.folder import RunFolder

HOSTILE = "<script>window.hacked = true</script><b>&amp;"


def said(*runs: Path) -> str:
    return "\n".join(sentence for finding in findings(load_table(runs)) for sentence in finding.sentences)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def only(run: Path, out: Path, keep: Any, **changed: Any) -> Path:
    """A run of those records of another that `keep` accepts, with fields changed."""
    folder = RunFolder.create(out, RunFolder.open(run).manifest)
    for record in plain_records(run):
        if keep(record):
            folder.append({**record, **changed})
    return out


# --- findings -----------------------------------------------------------------------------------------------


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


def test_the_answer_is_the_fastest_cell_without_a_significant_loss(run: Path, tmp_path: Path) -> None:
    def answer(df: pd.DataFrame) -> str:
        return findings(df)[0].answer

    df = load_table([run])
    assert answer(df) == (
        "ToMe at r=8 makes bundled 1.30 times as fast [1.29, 1.31] on this CPU in batches of 32, with no loss of "
        "accuracy that 1,000 images can show: drop 0.2 points [−0.3, 0.7], so up to 0.7 may be lost."
    )
    few = df.assign(images=pd.array([20] * 5, "Int64"), drop_low=-10.0, drop_high=[0.0, 20.0, 22.0, 24.5, 26.0])
    assert answer(few) == (
        "20 images cannot tell what is to be had without losing accuracy: top-k at keep 0.7@3,6,9, the fastest cell "
        "with no significant loss, may lose up to 24.5 points."
    )
    slow = answer(df.assign(latency_speedup=0.84, latency_speedup_low=0.8, latency_speedup_high=0.9))
    assert slow.endswith(" One image at a time it is slower than the unreduced model: 0.84×.")
    alike = answer(df.assign(latency_speedup=1.12, latency_speedup_low=1.09, latency_speedup_high=1.15))
    near = "is within 10 % of the unreduced model, by which runs differ: 1.12×."
    assert alike.endswith(f" One image at a time it {near}")
    alone = df.assign(latency_speedup=0.84, latency_speedup_low=0.8, latency_speedup_high=0.9, batch_size=1)
    assert "One image" not in answer(alone)
    faster = df.assign(latency_speedup=1.2, latency_speedup_low=1.11, latency_speedup_high=1.3)
    assert "One image" not in answer(faster)
    assert "One image" not in answer(df.assign(latency_speedup=1.0))
    free_lunch = answer(df.assign(drop_low=-1.0))
    assert free_lunch.startswith("Top-k at keep 0.7@3,6,9 makes bundled 1.80 times as fast")
    assert free_lunch.endswith(
        " Top-k is a control, there to be beaten; of the papers' methods it is ToMe at r=13, 1.70 times as fast "
        "[1.68, 1.72]."
    )
    assert answer(df.assign(drop_low=[0.0, 1.0, 1.0, -1.0, 1.0])).endswith(
        " there to be beaten; no paper's method is surely faster without such a loss."
    )
    assert answer(df.assign(speedup_low=0.9)).startswith("Nothing that was tried makes bundled surely faster with no")
    untimed = df.assign(speedup=float("nan"), speedup_low=float("nan"))
    assert answer(untimed).startswith("ToMe at r=8 takes 75 % of the FLOPs of bundled, with no loss")
    assert "not measured" in answer(untimed)
    broken = df.assign(nonfinite=pd.array([0, 3, 0, 0, 0], "Int64"))
    assert answer(broken).startswith("Nothing that was tried")
    assert answer(df.assign(drop_low=float("nan"))) == ""


def test_cells_of_two_runs_that_may_be_compared_are_told_apart(run: Path, tmp_path: Path) -> None:
    again = make_run(tmp_path / "again")
    text = said(run, again)
    assert "the model has in run 80.0 % top-1" in text and "the model has in again 80.0 %" in text
    assert "The fastest cell on this CPU is top-k at keep 0.7@3,6,9 in run: 1.80×" in text
    assert " in again" not in said(run, make_run(tmp_path / "gpu", device="cuda"))
    names = [cell["name"] for cell in plot_data(tell_runs_apart(load_table([run, again])))["cells"]]
    assert len(set(names)) == len(names)


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


def test_where_one_image_takes_no_less_time_the_findings_say_so(run: Path) -> None:
    df = load_table([run]).assign(latency_speedup=[1.0, 0.83, 0.99, 1.25, 1.43])
    df = df.assign(latency_speedup_low=df["latency_speedup"] - 0.02, latency_speedup_high=df["latency_speedup"] + 0.02)
    cells = "One image at a time it is another story: of the 4 cells faster than the unreduced model at batch 32, "
    near = "ToMe at r=13 (0.99×)"

    def told(df: pd.DataFrame, **changed: Any) -> str:
        return "\n".join(findings(df.assign(**changed))[0].sentences)

    slow, by = "1 is slower than it: ToMe at r=8 (0.83×)", "is within 10 % of it, by which runs differ"
    assert f"{cells}{slow}; 1 {by}: {near}." in told(df)
    assert f"{cells}1 {by}: {near}." in told(df.drop(index=1)).replace("the 3 cells", "the 4 cells")
    two = df.assign(latency_speedup=df["latency_speedup"].where(df["method"] != "tome", 0.8), latency_speedup_high=0.85)
    assert "2 are slower than it: ToMe at r=8 (0.80×) and ToMe at r=13 (0.80×)." in told(two.iloc[[0, 1, 2]])
    assert "another story" not in told(df, latency_speedup_low=float("nan"), latency_speedup_high=float("nan"))
    assert "another story" not in told(df.drop(index=[1, 2]))
    assert "another story" not in told(df, speedup_low=0.9)  # no faster in batches either
    assert "another story" not in told(df, batch_size=1)
    one = "One image at a time the one cell faster than the unreduced model at batch 32 "
    assert f"{one}is slower than it: ToMe at r=8 (0.83×)." in told(df.iloc[:2])
    assert f"{one}{by}: {near}." in told(df.iloc[[0, 2]])


def test_without_labels_the_findings_speak_of_agreement(run: Path) -> None:
    blind = {name: float("nan") for name in ("top1", "drop", "drop_low", "drop_high")}
    df = load_table([run]).assign(**blind, agreement=[100, 98.5, 91, 90, 70], kl=0.0123)
    df = df.assign(agreement_low=df["agreement"] - 1, agreement_high=df["agreement"] + 1)
    text = "\n".join(findings(df)[0].sentences)
    assert "Without labels top-1 is unknown" in text and "Accuracy was not measured" not in text
    assert "Of 4 reduced cells the agreement with the unreduced model is 70.0 to 98.5 %;" in text
    assert "it is the highest with ToMe at r=8: 98.5 % [97.5, 99.5], KL divergence 0.0123 nats." in text
    assert "unreduced model's speed, with the unreduced model's answer for 90.0 % of the images." in text
    assert (
        "On the front of agreement with the unreduced model against speed, by" in text and "top-1 against" not in text
    )


def test_of_a_backbone_the_features_are_compared(run: Path) -> None:
    blind = {name: float("nan") for name in ("top1", "drop", "drop_low", "drop_high", "agreement")}
    df = load_table([run]).assign(**blind, similarity=[1, 0.99, 0.95, 0.9, 0.5])
    text = "\n".join(findings(df)[0].sentences)
    assert (
        "The model has no classes" in text and "cosine to the unreduced model's features is 0.5000 to 0.9900;" in text
    )
    assert "with a cosine of 0.9000 to its features" in text
    one = "\n".join(findings(df.drop(index=[2, 3, 4]))[0].sentences)
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
    RunFolder.open(run).append({**failure, "message": "out of memory"})
    other = make_run(tmp_path / "other", model="deit", device="cuda")
    both = findings(load_table([run, other]))
    assert [finding.title.split(",")[0] for finding in both] == ["bundled", "deit"]
    assert "1 cell failed (ToFu at r=8: out of memory)." in both[0].sentences
    assert any("on A GPU" in sentence for sentence in both[1].sentences)


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


def test_fronts_of_the_plot_are_those_of_the_tables(run: Path) -> None:
    data = plot_data(load_table([run]))
    assert data["fronts"]["gflops|top1"] == [[0, 1, 2]] and data["fronts"]["throughput|top1"] == [[0, 1, 2, 3]]
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_each_run_has_its_front_where_the_machine_sets_the_pace(run: Path, tmp_path: Path) -> None:
    again = make_run(tmp_path / "again")
    data = plot_data(load_table([run, again]))
    first = [0, 1, 2, 3]
    assert data["fronts"]["throughput|top1"] == [first, [number + len(data["cells"]) // 2 for number in first]]
    assert len(data["fronts"]["gflops|top1"]) == 1
    assert "a front of its own" in write_report([run, again], tmp_path / "two.html").read_text()
    assert "a front of its own" not in write_report([run], tmp_path / "one.html").read_text()


def test_page_table_and_findings_name_the_same_front_of_speed() -> None:
    df = load_table([Path(__file__).parents[1] / "results" / "reference"])
    fronts = plot_data(df)["fronts"]
    table = json.loads(render_table(df, "json"))
    assert fronts["speedup|top1"] == fronts["throughput|top1"]
    assert [[number for number, row in enumerate(table) if row["front_throughput"]]] == fronts["speedup|top1"]
    told = next(text for text in findings(df)[0].sentences if "front of top-1 against speed" in text)
    on, _, never = told.partition(";")
    members = set(df.loc[fronts["speedup|top1"][0], "variant"]) - {"none"}
    assert members and all(variant_name(name, name) in on for name in members)
    others = set(df["variant"]) - members - {"none"}
    assert others and all(variant_name(name, name) in never for name in others)


def test_cells_that_cannot_be_told_apart_in_speed_or_gave_nan_are_named(run: Path) -> None:
    df = load_table([run])
    df.loc[1, ["speedup", "speedup_low", "speedup_high"]] = [1.01, 0.98, 1.03]
    assert "Not to be told from the unreduced model in speed: ToMe at r=8 (1.01×)." in findings(df)[0].sentences
    df["nonfinite"] = pd.array([0, 3, 0, 0, 0], "Int64")
    text = " ".join(findings(df)[0].sentences)
    assert "NaN or infinite logits" in text and "ToMe at r=8 (3 of 1,000 images)." in text
    assert text.count("ToMe at r=8") == 1


def test_what_cannot_be_written_is_one_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="call it page.html"):
        write_report([run], tmp_path / "page.pdf")
    with pytest.raises(UserError, match="no run folder"):
        write_report([tmp_path / "nowhere"], tmp_path / "page.html")
    empty = RunFolder.create(tmp_path / "empty", {}).path
    with pytest.raises(UserError, match="holds no records"):
        write_report([empty], tmp_path / "page.html")
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(UserError, match="pip install jinja2 plotly"):
        write_report([run], tmp_path / "page.html")


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
    assert ascending[:4] == ["", "", "0.2 [-0.3, 0.7] n.s.", "0.2 [-0.3, 0.7] n.s."]
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
    cell = load_table([run]).iloc[2]
    browser.execute_script("document.getElementById('plot').emit('plotly_click', {points: [{customdata: 2}]})")
    told = browser.find_element("id", "pins").text
    (top1,) = [line for line in told.splitlines() if line.startswith("Top-1 accuracy")]
    bounds = [float(number) for number in re.findall(r"[\d.]+", top1.partition("[")[2])]
    assert bounds == pytest.approx([cell["top1_low"], cell["top1_high"]], abs=0.051)
    assert cell["top1_low"] != pytest.approx(cell["top1_paired_low"], abs=0.2)


def test_the_manifest_is_told_without_braces_and_without_what_is_empty(run: Path) -> None:
    conditions = {"dtype": "fp32", "models": {"m": {"input_size": [3, 4, 4], "data": None}}}
    assert html._facts({"conditions": conditions, "git": None, "plugins": {}, "command": "tokbench run"}) == {
        "conditions · dtype": "fp32",
        "conditions · models · m · input_size": "3, 4, 4",
        "command": "tokbench run",
    }


def test_the_plot_begins_with_what_is_kept_against_what_it_costs(run: Path) -> None:
    df, missing = load_table([run]), float("nan")
    blind = df.assign(top1=missing, drop=missing)
    features = blind.assign(agreement=missing, similarity=[1, 0.99, 0.95, 0.9, 0.5])
    counted = features.assign(similarity=missing, speedup=missing, throughput=missing, top5=missing)
    assert plot_data(df)["axes"] == ["speedup", "top1"] and plot_data(blind)["axes"] == ["speedup", "agreement"]
    assert plot_data(features)["axes"] == ["speedup", "similarity"]
    assert plot_data(counted)["axes"] == ["gflops", "flops_ratio"]  # never the same twice
    assert plot_data(df[:0])["axes"] == ["", ""]


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
    failure = {"kind": "failure", **cell, "message": "out of memory"}
    folder = RunFolder.create(tmp_path / "failed", {})
    folder.append(failure)
    open_page(browser, [folder.path], tmp_path / "page.html")
    assert "Nothing was measured" in browser.find_element("id", "plot").text
    assert "out of memory" in browser.find_element("tag name", "body").text
    assert [entry["message"] for entry in browser.get_log("browser")] == []
