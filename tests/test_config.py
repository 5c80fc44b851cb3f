"""Grids from TOML, flags and Python: what they mean, and how each mistake is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tokbench import list_methods
from tokbench.catalogue import CONTROLS, built_in, catalogue
from tokbench.config import (
    DEFAULT_LIMIT,
    DEFAULT_METHODS,
    DEFAULT_SCHEDULES,
    Grid,
    MethodSpec,
    ModelSpec,
    RunOptions,
    describe_methods,
)
from tokbench.errors import UserError

GRIDS = sorted((Path(__file__).parent.parent / "benchmarks").glob("*.toml"))


@pytest.fixture
def toml(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "grid.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def ids(grid: Grid) -> list[str]:
    return [cell.id for model in grid.models for cell in grid.cells(model)]


def test_default_grid_has_the_unreduced_model_first_and_no_cell_twice():
    cells = ids(Grid.default())
    assert cells[0] == "bundled/none"
    assert {"bundled/tome/flops:0.5", "bundled/mctf/flops:0.35", "bundled/random/flops:0.5"} < set(cells)
    assert len(cells) == len(set(cells))
    assert Grid.default().options.limit == DEFAULT_LIMIT


def test_toml_says_everything(toml):
    grid = Grid.from_toml(
        toml("""
        data = "some/folder"
        schedules = ["8"]
        [[models]]
        name = "deit_tiny_patch16_224"
        checkpoint = "mine/best.pth"
        input_size = 384
        [[models]]
        name = "deit_small_patch16_224"
        label = "small"
        [[methods]]
        name = "tome"
        prop_attn = false
        [[methods]]
        name = "topk"
        schedules = ["keep:0.7@3,6,9", "13"]
        [options]
        device = "cuda:1"
        dtype = "bf16"
        batch_size = 64
        limit = 500
        only = ["speed", "flops"]
        readers = 2
        """)
    )
    assert ids(grid) == [
        f"{model}/{cell}"
        for model in ("deit_tiny_patch16_224@best@384", "small")
        for cell in ("none", "tome:prop_attn=false/8", "topk/keep:0.7@3,6,9", "topk/13")
    ]
    assert grid.models[0] == ModelSpec("deit_tiny_patch16_224", Path("mine/best.pth"), 384)
    assert grid.data == "some/folder"
    assert grid.options == RunOptions("cuda:1", "bf16", 64, 500, ("flops", "speed"), 2)
    assert Grid.from_dict(json.loads(json.dumps(grid.to_dict()))) == grid


def test_an_empty_file_is_the_default_methods_on_all_images(toml):
    grid = Grid.from_toml(toml(""))
    assert ids(grid) == ids(Grid.default())
    assert grid.options.limit is None


def test_schedules_of_a_file_without_methods_are_those_of_every_method(toml):
    grid = Grid.from_toml(toml('schedules = ["13"]\n[[models]]\nname = "bundled"\n'))
    assert [(own.name, own.schedules) for own in grid.methods[1:]] == [(name, ("13",)) for name in DEFAULT_METHODS]


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.name)
def test_the_grids_we_ship_are_valid(path):
    assert len(ids(Grid.from_toml(path))) > 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data = ", ["not valid TOML"]),
        (f"data = {'9' * 5000}", ["not valid TOML", "4300 digits"]),
        (f"data = {'[' * 5000}", ["not valid TOML", "recursion"]),
        (f"data = {'{a=' * 5000}", ["not valid TOML", "recursion"]),
        ("dta = 'x'", ["no field 'dta'", "'data'"]),
        ("data = 3", ["'data' must be text, not 3"]),
        ("models = 'bundled'", ["[[models]]"]),
        ("[models]\nname = 'bundled'", ["[[models]]"]),
        ("[[models]]\nnmae = 'bundled'", ["models[0]", "no field 'nmae'", "'name'"]),
        ("[[models]]\ninput_size = 224", ["models[0]", "no name"]),
        ("[[models]]\nname = 3", ["'models[0].name' must be text"]),
        ("[[models]]\nname = 'a'\ninput_size = 'big'", ["input_size", "'big'"]),
        ("[[models]]\nname = 'a'\ninput_size = true", ["input_size", "True"]),
        ("[[models]]\nname = 'a'\ncheckpoint = 3", ["'models[0].checkpoint' must be text"]),
        ("[[models]]\nname = 'a'\n[[models]]\nname = 'a'", ["two models", "'a'", "label"]),
        ("[[methods]]\nschedules = ['8']", ["'methods[0].name' is missing"]),
        ("[[methods]]\nname = 'tme'", ["unknown method 'tme'", "'tome'"]),
        ("[[methods]]\nname = 'tome'\nschedule = ['8']", ["no parameter 'schedule'"]),
        ("[[methods]]\nname = 'tome'\nschedules = '8'", ["'methods[0].schedules' must be a list"]),
        ("[[methods]]\nname = 'tome'\nschedules = [8]", ["'methods[0].schedules[0]' must be text"]),
        ("[[methods]]\nname = 'tome'\nschedules = ['konstant:8']", ["'konstant'", "'constant'"]),
        ("[[methods]]\nname = 'tome'\nprop_attn = 'yes'", ["prop_attn='yes'"]),
        ("[[methods]]\nname = 'none'\nschedules = ['8']", ["'none'", "no schedules"]),
        ("options = 3", ["'options' must be a table"]),
        ("[options]\ndevcie = 'cpu'", ["options", "no field 'devcie'", "'device'"]),
        ("[options]\ndevice = 'gpu'", ["unknown device 'gpu'"]),
        ("[options]\ndevice = 0", ["'options.device' must be text"]),
        ("[options]\ndtype = 'fp8'", ["dtype", "'fp8'", "'fp16'"]),
        ("[options]\nbatch_size = 0", ["batch_size", "at least 1"]),
        ("[options]\nbatch_size = 1.5", ["batch_size", "1.5"]),
        ("[options]\nlimit = 0", ["limit", "at least 1"]),
        ("[options]\nlimit = '10'", ["limit", "'10'"]),
        ("[options]\nreaders = -1", ["readers", "at least 0"]),
        ("[options]\nonly = ['acuracy']", ["only", "'accuracy'"]),
        ("[options]\nonly = 'speed'", ["'options.only' must be a list"]),
        ("[options]\nonly = []", ["'options.only' must be a list of one or more"]),
    ],
)
def test_each_mistake_in_a_grid_is_one_line_that_names_file_and_field(toml, text, words):
    path = toml(text)
    with pytest.raises(UserError) as caught:
        Grid.from_toml(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in [str(path), *words]:
        assert word in message


def test_a_grid_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot read the grid .*: No such file"):
        Grid.from_toml(tmp_path / "none.toml")
    with pytest.raises(UserError, match="cannot read the grid .*: Is a directory"):
        Grid.from_toml(tmp_path)


def test_flags_alone():
    grid = Grid.from_flags(
        models=["a", "b"],
        methods=["tome:prop_attn=false", "random:seed=3"],
        schedules=["8", "13"],
        data="bundled",
        only="speed, flops",
        batch_size="64",
        device=None,
    )
    assert ids(grid)[:4] == ["a/none", "a/tome:prop_attn=false/8", "a/tome:prop_attn=false/13", "a/random:seed=3/8"]
    assert grid.methods[1].params == {"prop_attn": False}
    assert grid.options == RunOptions(batch_size=64, limit=DEFAULT_LIMIT, only=("flops", "speed"))


def test_own_data_is_not_limited_unless_asked():
    assert Grid.from_flags(data="folder").options.limit is None
    assert Grid.from_flags(data="folder", limit=10).options.limit == 10
    assert Grid.from_flags(limit=10).options.limit == 10


def test_flags_replace_what_the_file_says(toml):
    base = Grid.from_toml(
        toml("data = 'x'\n[[models]]\nname = 'a'\n[[methods]]\nname = 'tome'\nprop_attn = false\n[options]\nlimit = 5")
    )
    assert ids(Grid.from_flags(base, schedules=["3"])) == ["a/none", "a/tome:prop_attn=false/3"]
    assert ids(Grid.from_flags(base, models=["b"], methods=["topk"], schedules=["3"])) == ["b/none", "b/topk/3"]
    changed = Grid.from_flags(base, data="y", dtype="bf16")
    assert (changed.data, changed.options) == ("y", RunOptions(dtype="bf16", limit=5))
    assert Grid.from_flags(base) == base


def test_a_checkpoint_goes_with_one_model():
    grid = Grid.from_flags(models=["a"], checkpoint=Path("w/x.pth"))
    assert grid.models == (ModelSpec("a", Path("w/x.pth")),)
    assert ids(grid)[0] == "a@x/none"
    for models in ([], ["a", "b"]):
        with pytest.raises(UserError, match="exactly one --model"):
            Grid.from_flags(models=models, checkpoint=Path("x.pth"))


@pytest.mark.parametrize("text", ["tome:prop_attn", "tome:=3", "tome:prop_attn=", "tome:prop_attn=false,"])
def test_a_parameter_that_cannot_be_read(text):
    with pytest.raises(UserError, match="cannot read"):
        MethodSpec.from_text(text)


def test_numbers_too_long_to_read_and_lists_too_deep_are_refused():
    for value in ("9" * 5000, "[" * 5000 + "]" * 5000):
        with pytest.raises(UserError, match="prop_attn"):
            Grid.from_flags(methods=[f"tome:prop_attn={value}"])
    for flag in ({"batch_size": "9" * 5000}, {"device": "cuda:" + "9" * 5000}):
        with pytest.raises(UserError, match="must be a whole number|unknown device"):
            Grid.from_flags(**flag)


def test_method_text_can_be_read_back():
    spec = MethodSpec("random", ("8",), {"seed": 3})
    assert MethodSpec.from_text(str(spec), ["8"]) == spec
    assert MethodSpec.from_text("m:word=fast,size=2.5,flag=true", ["1"]).params == {
        "word": "fast",
        "size": 2.5,
        "flag": True,
    }


def test_schedules_that_mean_the_same_are_one_cell():
    grid = Grid(methods=(MethodSpec("tome", ("8", "constant:8")), MethodSpec("tome", ("8",))))
    assert ids(grid) == ["bundled/none", "bundled/tome/8"]


def test_a_method_without_schedules_gets_some():
    (_, own) = Grid(models=(ModelSpec("vit_base_patch16_224"),), methods=(MethodSpec("tome"),)).methods
    assert own.schedules == DEFAULT_SCHEDULES


def test_names_stand_for_models_and_methods():
    grid = Grid(models=("bundled",), methods=("tome", MethodSpec("topk", ("8",))))
    assert grid.models == (ModelSpec(),) and [method.name for method in grid.methods] == ["none", "tome", "topk"]
    assert Grid.from_dict({"models": ["bundled"], "methods": ["tome"]}).methods == grid.methods[:2]
    with pytest.raises(UserError, match="'name' must be text, not 3"):
        ModelSpec(3)


@pytest.mark.parametrize("flags", [{"label": "mine"}, {"input_size": 64}])
def test_flags_on_models_go_with_models(flags):
    (spec,) = Grid.from_flags(models=["a"], **flags).models
    assert spec == ModelSpec("a", **flags)
    with pytest.raises(UserError, match=f"--{[*flags][0].replace('_', '-')} .*none is given"):
        Grid.from_flags(**flags)


def test_a_grid_needs_a_model():
    with pytest.raises(UserError, match="no model"):
        Grid(models=())
    with pytest.raises(UserError, match="empty"):
        ModelSpec("")


def test_description_counts_and_names_the_cells():
    text = Grid.from_flags(methods=["tome"], schedules=["8"]).describe()
    assert text.splitlines()[0].startswith("2 cells: flops, accuracy, speed on 1,000 images of bundled")
    assert text.splitlines()[1:] == ["  bundled/none", "  bundled/tome/8"]


def test_methods_are_described_with_parameters_and_paper():
    lines = {line.split()[0]: line for line in describe_methods().splitlines()}
    assert "prop_attn=true" in lines["tome"] and "2210.09461" in lines["tome"]
    assert set(lines) >= {"none", "tome", "topk", "random"}


def test_the_catalogue_read_from_source_is_the_registry():
    import tokbench.fusion  # noqa: F401  (registers the methods)
    from tokbench.fusion.core import METHODS

    own = {name: method for name, method in METHODS.items() if method.__module__.startswith("tokbench.fusion.")}
    found = {entry.name: entry for entry in built_in()}
    assert list(found) == list(own)
    for name, method in own.items():
        assert (found[name].paper, found[name].parameters) == (method.paper, method().parameters())
    assert {entry.name: entry.needs for entry in catalogue()} == {name: found[name].needs for name in METHODS}
    assert found["ppt"].needs == ("keys", "values", "class attention") and found["random"].needs == ()
    assert found["ats"].needs[-1].startswith("images") and found["tofu"].needs == ("keys", "images for auto")


def test_the_controls_are_the_methods_that_say_so():
    assert {entry.name for entry in built_in() if entry.paper.startswith("control")} == CONTROLS


def test_the_default_grid_has_the_most_used_methods_and_the_full_one_every_method():
    assert set(DEFAULT_METHODS) < set(list_methods())
    full = Grid.from_toml(Path(__file__).parents[1] / "benchmarks" / "bundled.toml")
    assert {method.name for method in full.methods} == {*list_methods()} - {"free"}
    assert [method.name for method in Grid.default().methods] == ["none", *DEFAULT_METHODS]


def test_a_wrong_schedule_is_refused_without_importing_torch():
    code = """
import sys
from tokbench.config import Grid
try:
    Grid.from_flags(methods=["tome"], schedules=["constant:x"])
except Exception as error:
    assert "constant:x" in str(error)
else:
    raise SystemExit("accepted")
raise SystemExit("torch was imported" if "torch" in sys.modules else 0)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_another_model_gets_every_method_at_shares_of_its_flops():
    methods = Grid.from_flags(models=["vit_large_patch16_224"]).methods[1:]
    assert [method.name for method in methods] == list(DEFAULT_METHODS)
    assert all(schedule.startswith("flops:") for method in methods for schedule in method.schedules)


def test_lists_in_a_method_flag_keep_their_commas():
    method = MethodSpec.from_text("mstm:scales=[2,4],scale_weight=0.25")
    assert method.params == {"scales": [2, 4], "scale_weight": 0.25}
    assert MethodSpec.from_text(str(method)) == method


def test_a_method_without_schedules_runs_at_the_levels_of_the_default_grid():
    (_, alone), (_, first, *_) = Grid.from_flags(methods=["tome"]).methods, Grid.default().methods
    assert alone == first


def test_readers_may_have_their_old_name(toml):
    assert RunOptions(workers=2) == RunOptions(readers=2)
    assert Grid.from_toml(toml("[options]\nworkers = 2")).options.readers == 2
    with pytest.raises(UserError):
        RunOptions(workers=2, readers=2)


def test_random_weights_are_labelled_and_have_no_accuracy():
    grid = Grid.from_flags(models=["deit_tiny_patch16_224"], random_weights=True, only="flops,speed")
    assert grid.models[0].label == "deit_tiny_patch16_224@random"
    with pytest.raises(UserError, match="no accuracy: add --only flops,speed"):
        Grid.from_flags(models=["deit_tiny_patch16_224"], random_weights=True)
    with pytest.raises(UserError, match="none is given"):
        Grid.from_flags(random_weights=True)
    with pytest.raises(UserError, match="exclude each other"):
        ModelSpec("deit_tiny_patch16_224", Path("a.pth"), random_weights=True)
