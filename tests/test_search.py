"""Searching removals per block: what they cost, how far the answers move, and what becomes of a search."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stand_ins import Source, count_by_tokens, plain_records, small_grid
from timm.models.vision_transformer import VisionTransformer

import tokbench
from tokbench.config import Grid, MethodSpec
from tokbench.data import load_batches
from tokbench.errors import UserError
from tokbench.fusion.core import make_method
from tokbench.running import runner
from tokbench.schedules import Schedule
from tokbench.searching import cost as costs
from tokbench.searching import images, searcher
from tokbench.searching.budget import parse_budget
from tokbench.searching.command import search_grid, searched_grid
from tokbench.searching.cost import Cost
from tokbench.searching.objective import Memory, Objective
from tokbench.searching.search import Search
from tokbench.searching.space import Space

HALF = parse_budget("flops:0.5")


def shown(count: int = 32) -> torch.Tensor:
    return torch.stack([Source()[index][0] for index in range(count)])


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    """Six blocks whose attention matters, and differs from block to block."""
    torch.manual_seed(3)
    model = VisionTransformer(img_size=32, patch_size=4, embed_dim=24, depth=6, num_heads=2, num_classes=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setattr(searcher, "_folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def quick_counts(monkeypatch):
    """To count them takes a second."""
    monkeypatch.setattr(costs, "count_flops", count_by_tokens)


def short_search(model, name="tome", budget=HALF, **options) -> Search:
    return Search(model, make_method(name), budget, shown(), **{"most_shown": 60 * len(shown()), **options})


@pytest.mark.parametrize(
    "name", ["evit", pytest.param("tome", marks=pytest.mark.slow), pytest.param("gtp", marks=pytest.mark.slow)]
)
def test_costs_are_predicted_as_they_are_counted(model, name):
    space = Space(model, make_method(name), shown(8))
    cost = Cost(space, HALF, shown(2), batch_size=2)
    for weights in ([5, 1, 1, 1, 1, 3], [0, 4, 0, 2, 1, 0]):
        removals = space.fit(np.array(weights, float), cost, 0.5)
        assert cost(removals) == pytest.approx(cost.confirm(removals), rel=5e-3)


def test_removals_are_those_that_the_method_carries_out(model):
    space = Space(model, make_method("evit"), shown(8))
    reduced = tokbench.apply(tokbench.fork(model), "evit", "list:9,0,30,99,1,2")
    reduced(shown(1))
    after = [left for _, left in space.steps(space.of(Schedule("list", (9, 0, 30, 99, 1, 2))))]
    assert after == tokbench.tokens_per_block(reduced)


def test_a_search_comes_nearer_the_answers_within_its_budget(model, quick_counts):
    found = short_search(model).run()
    assert found.distance < 0.8 * found.before
    assert 0.99 * 0.5 <= found.cost <= 0.5
    assert short_search(model).run().schedule == found.schedule


def test_where_images_keep_tokens_of_their_own_the_budget_is_held_by_counting_them(model, quick_counts):
    found = short_search(model, "ats", most_shown=8 * 32).run()
    assert 0.9 * 0.5 < found.cost <= 0.5 and found.distance < found.before


def test_parameters_are_searched_where_asked(model, quick_counts):
    found = short_search(model, "mctf", parse_budget("flops:0.7"), tune=True).run()
    assert found.method.tau_info != make_method("mctf").tau_info and found.distance <= found.before


def test_a_speed_up_is_timed_and_the_removals_follow(model, quick_counts, monkeypatch):
    def timed(models, input_size, **_):
        none, reduced = (costs.count_flops(models[name], input_size).total for name in ("none", "reduced"))
        return [None, SimpleNamespace(speedup=none / reduced / 1.1)]  # a tenth slower than its blocks say

    monkeypatch.setattr(costs, "measure_speed", timed)
    monkeypatch.setattr(Cost, "_blocks_timed", Cost._blocks_counted)
    found = short_search(model, budget=parse_budget("speedup:1.25"), most_shown=4 * len(shown())).run()
    assert 1.25 <= 1 / found.cost <= 1.25 / 0.94


def test_a_budget_out_of_reach_names_the_nearest(model, quick_counts):
    with pytest.raises(UserError, match=r"'mctf' cannot reach flops:0\.1 on this model; the nearest is flops:0\.\d+$"):
        short_search(model, "mctf", parse_budget("flops:0.1"))


@pytest.mark.parametrize("classes", [0, 1])
def test_models_without_classes_are_compared_by_what_they_give(classes):
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, num_classes=classes).eval()
    objective = Objective(model, shown())
    whole, some, most = (
        np.mean(objective.of_batches(removals, make_method("random"), 1)) for removals in [(0,), (4,), (14,)]
    )
    assert whole == pytest.approx(0, abs=1e-6) and 0 < some < most


def test_what_was_measured_is_remembered(model, tmp_path):
    path = tmp_path / "memory.jsonl"
    first = Objective(model, shown(), Memory(path))
    distance = first.of_batches((8, 8), make_method("tome"), 1)
    path.write_text(path.read_text() + '["4,4 {', encoding="utf-8")  # killed while it wrote
    again = Objective(model, shown(), Memory(path))
    again.reduced = None  # must not be asked
    assert again.of_batches((8, 8), make_method("tome"), 1) == distance and again.passes == first.passes


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("flops:2", "above 0 and below 1, got '2'"),
        ("speedup:0.5", "a speed-up above 1"),
        ("time:3", "flops:0.35 or speedup:1.5"),
        ("", "flops:0.35 or speedup:1.5"),
    ],
)
def test_wrong_budgets_are_told(text, fault):
    with pytest.raises(UserError, match=fault) as caught:
        parse_budget(text)
    assert str(caught.value).startswith(f"budget '{text}': ") and "searched" not in str(caught.value)


@pytest.mark.parametrize("name", ["none", "free"])
def test_what_has_no_schedule_to_search_is_refused(model, name):
    with pytest.raises(UserError, match=f"method '{name}' is"):
        tokbench.search(model, name, "flops:0.5", images=shown())


def test_no_images_are_refused(model):
    with pytest.raises(UserError, match="no images"):
        tokbench.search(model, "tome", "flops:0.5", images=shown()[:0])


@pytest.fixture
def searched(source, quick_counts, monkeypatch):
    """Searches on the run's own images, of the tiny model, that take a moment."""
    monkeypatch.setattr(images, "open_dataset", lambda spec, model, labels=None: source)
    monkeypatch.setattr(Search, "is_over", lambda self: self.objective.passes >= 3)
    return MethodSpec("tome", ("searched:flops:0.5",))


def test_a_grid_searches_once_and_says_so_where_the_images_are_the_same(searched, tmp_path, monkeypatch):
    grid = small_grid(searched, only=("flops", "accuracy"))
    table = runner.run(grid, tmp_path / "run")
    assert list(table.schedule) == ["", "searched:flops:0.5"]
    accuracy = next(r for r in plain_records(tmp_path / "run") if r["kind"] == "accuracy" and r["method"] == "tome")
    assert accuracy["resolved"].startswith("list:") and accuracy["searched_on"]["images"] == 24
    assert accuracy["caveats"] == ["24 of these images are among those that the schedule was searched on"]
    monkeypatch.setattr(Search, "run", lambda self: pytest.fail("it was searched before"))
    runner.run(grid, tmp_path / "again")
    runner.run(small_grid(searched), tmp_path / "run")  # the manifest knows what was found


def test_what_was_searched_for_other_weights_is_refused(searched, tmp_path):
    grid = small_grid(searched, only=("flops",))
    found = search_grid(grid, ["flops:0.5"], tmp_path / "a.toml", images=8, seconds=60, progress=runner.Progress())

    other = replace(found[0], weights_sha256="0" * 64)
    with pytest.raises(UserError, match="searched for other weights"):
        runner.run(searched_grid(grid, [other]), tmp_path / "run")


def test_a_written_grid_reads_back(searched, tmp_path):
    grid = small_grid(MethodSpec("mctf", (), {"tau_sim": 0.5}), only=("flops",))
    found = search_grid(grid, ["flops:0.8"], tmp_path / "a.toml", images=8, seconds=60, progress=runner.Progress())
    back = Grid.from_toml(tmp_path / "a.toml")
    assert back == searched_grid(grid, found) and back.methods[1].schedules == ("searched:flops:0.8",)


def test_an_interrupted_search_leaves_the_best_so_far(searched, tmp_path, monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Search, "polish", interrupt)
    out = tmp_path / "a.toml"
    with pytest.raises(KeyboardInterrupt):
        search_grid(small_grid(searched), ["flops:0.5"], out, images=8, seconds=60, progress=runner.Progress())
    (left,) = Grid.from_toml(out).searched
    assert left.cost is None and left.distance <= left.usual_distance


def test_the_schedule_of_a_grid_needs_a_search(model):
    with pytest.raises(UserError, match=r"has to be searched first: .*tokbench\.search\(model, 'tome', 'flops:0\.3'"):
        tokbench.apply(tokbench.fork(model), "tome", "searched:flops:0.3")


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--time", "soon"], "--time 'soon'"),
        (["--out", "searched.json"], "ends in .toml"),
        (["--out", "nowhere/searched.toml"], "'nowhere' does not exist"),
        (["--images", "0"], "--images"),
        (["--method", "none", "--budget", "flops:0.5"], "no method to search"),
        (["--method", "tome", "--budget", "flops:1.5"], "budget 'flops:1.5'"),
    ],
)
def test_wrong_words_are_told_in_a_line(tokbench_command, words, fault):
    code, _, err = tokbench_command("search", *words)
    assert code == 2 and fault in err and err.count("\n") == 1


def test_bundled_search_images_are_none_of_those_that_are_measured():
    tiny = tokbench.load_model("bundled")
    source = tokbench.open_dataset("bundled:train", tiny)
    assert len(source) == 512 and source[0][1] == -1
    taken = images.search_images("bundled:train", tiny, 32)
    measured = tokbench.open_dataset("bundled", tiny, limit=64)
    for shown, same in ((measured, 0), (source, 32)):
        overlap = images.Overlap(shown, {"cell": images.written_marks(taken)})
        overlap.read_again(len(shown))
        list(overlap.watching((batch.images, batch.labels) for batch in load_batches(shown, 64, as_bytes=True)))
        assert overlap.counts == {"cell": 2 * same}
