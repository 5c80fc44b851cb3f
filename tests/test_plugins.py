"""Methods of one's own: the documented example end to end, and what is said of files that are wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from stand_ins import plain_records
from timm.models.vision_transformer import VisionTransformer

import tokbench
from tokbench.fusion.core import METHODS, Method, make_method, register_method
from tokbench.plugins import load_plugins

EXAMPLE = Path(__file__).parents[1] / "docs" / "my_method.py"


@pytest.mark.draws
def test_the_documented_example_reaches_everything(source, tokbench_command, tmp_path):
    out = tmp_path / "run"
    words = ("--plugin", EXAMPLE, "--method", "long-keys:power=0.5", "--schedule", "flops:0.5", "--device", "cpu")
    code, told, err = tokbench_command("run", *words, "--out", out)
    assert code == 0, told + err
    own = {record["kind"]: record for record in plain_records(out) if record["method"] == "long-keys"}
    assert own.keys() == {"flops", "accuracy", "speed"}
    assert abs(own["flops"]["flops_ratio"] - 0.5) < 0.01 and own["flops"]["unsupported"] == {}
    assert own["accuracy"]["params"] == {"power": 0.5} and own["accuracy"]["tokens"][-1] < 33
    assert own["speed"]["throughput"] > 0
    assert (out / "pareto.png").stat().st_size > 10_000
    manifest = json.loads((out / "manifest.json").read_text())
    assert list(manifest["plugins"]) == ["my_method.py"] and len(manifest["plugins"]["my_method.py"]) == 64


def test_the_documented_example_does_what_it_says():
    """Per sample, in plain loops."""
    load_plugins([EXAMPLE])
    model = VisionTransformer(
        img_size=24, patch_size=4, embed_dim=24, depth=1, num_heads=3, num_classes=5, reg_tokens=1
    ).double()
    x, keys = torch.randn(2, 3, 24, 24, dtype=torch.float64), []
    handle = model.blocks[0].attn.k_norm.register_forward_hook(lambda module, args, out: keys.append(out))
    tokbench.apply(model, "long-keys", 10, trace=True)
    with torch.no_grad():
        model(x)
    handle.remove()
    where = tokbench.token_map(model)
    for image in range(2):
        key = keys[0][image].mean(0)
        longest = sorted(range(2, 38), key=lambda token: -float(key[token].norm()))
        stay = sorted(longest[:26])
        assert where[image, :2].tolist() == [0, 1]
        for token in range(2, 38):
            owner = (
                token
                if token in stay
                else max(stay, key=lambda other: float(key[token] @ key[other] / key[other].norm()))
            )
            assert where[image, token] == 2 + stay.index(owner)


def test_a_run_is_not_continued_with_another_version_of_a_plugin(source, tmp_path, tokbench_command):
    own = tmp_path / "mine.py"

    def run(schedule: int) -> tuple[int, str]:
        METHODS.pop("long-keys", None)
        words = ("--plugin", own, "--method", "long-keys", "--only", "flops", "--out", tmp_path / "run")
        code, _, err = tokbench_command("run", *words, "--schedule", schedule)
        return code, err

    own.write_text(EXAMPLE.read_text())
    assert run(8) == run(13) == (0, "")
    own.write_text(EXAMPLE.read_text().replace("descending=True", "descending=False"))
    code, err = run(20)
    assert code == 2 and "the plugin mine.py is another one than before" in err and err.count("\n") == 1


def test_wrong_plugins_are_answered_in_one_line(tmp_path):
    cases = {
        "empty.py": ("x = 1\n", "registers no method"),
        "broken.py": ("x = 1\ny = x.nothing\n", "broken.py', line 2: AttributeError"),
        "unreadable.py": ("x = (\n", "unreadable.py', line 1: SyntaxError"),
        "twin.py": (
            "import tokbench\nfrom tokbench.fusion.core import Method\n"
            "@tokbench.register_method\nclass Mine(Method):\n    name = 'tome'\n",
            "line 3: UserError: there is a method 'tome' already",
        ),
    }
    for name, (text, words) in cases.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(tokbench.UserError, match=words) as error:
            load_plugins([tmp_path / name])
        assert "\n" not in str(error.value)
    with pytest.raises(tokbench.UserError, match="emty.py' does not exist. Did you mean 'empty.py'"):
        load_plugins([tmp_path / "emty.py"])


def test_a_method_needs_a_name_that_can_be_typed():
    for name in ("", "My Method", "none"):
        with pytest.raises(tokbench.UserError):
            register_method(type("Mine", (METHODS["tome"],), {"name": name}))


MINE = """
import sys
from dataclasses import dataclass
import torch, tokbench
from tokbench.fusion.core import Assignment, Method

class Unprintable(Exception):
    def __str__(self): raise ValueError

@tokbench.register_method
@dataclass(frozen=True)
class Mine(Method):
    name = "mine"
    which: str = ""
    def plan(self, view, r):
        B, N, _ = view.x.shape
        good = torch.arange(N - r).expand(B, -1)
        joining = torch.arange(N - r, N).expand(B, -1)
        exec(PLANS[self.which], globals(), locals())
        return eval(RESULTS.get(self.which, "Assignment(good)"), globals(), locals())

PLANS, RESULTS = {}, {}
"""
# What a plan does before, and what it returns: the words of the failure.
WRONG_PLANS = {
    "nothing": ("", "None", "must be an Assignment, not NoneType"),
    "exits": ("sys.exit(0)", "", "mine.plan raised SystemExit: 0"),
    "no exception": ("raise GeneratorExit", "", "mine.plan raised GeneratorExit"),
    "unprintable": ("raise Unprintable", "", "Unprintable: \\(its message raised ValueError\\)"),
    "surrogate": ("raise ValueError('\\udcff [red]')", "", r"ValueError: \udcff \[red\]"),
    "far": ("", "Assignment(good + 1000)", "block 0: kept holds 1000 to 1056; there are 65"),
    "floats": ("", "Assignment(good.float())", "kept must be a tensor of torch.long on cpu, not torch.float32"),
    "elsewhere": ("", "Assignment(good.to('meta'))", "not torch.int64 on meta"),
    "one image": ("", "Assignment(good[:1])", "gave 1 answers to 10 images|unflatten"),
    "flat": ("", "Assignment(good[0])", "kept must be a tensor"),
    "no patch": ("", "Assignment(good[:, :1])", "kept must hold a patch token beside the 1 prefix tokens"),
    "no class token": ("", "Assignment(good + 1)", "kept must begin with the prefix tokens"),
    "twice": ("", "Assignment(good, good, good)", "a token can be kept or merged away once only"),
    "no slot": ("", "Assignment(good, joining)", "slot must be a tensor of torch.long on cpu, not None"),
    "bad slot": ("", "Assignment(good, joining, joining)", "slot holds 57 to 64; there are 57"),
    "weight": (
        "",
        "Assignment(good, joining, joining * 0, torch.ones(3))",
        r"weight must be \(1, 65\) on cpu, not \(3,\)",
    ),
    "combine": ("", "Assignment(good, combine='men')", "combine is mean, sum or mlerp, not 'men'"),
    "sliced": ("", "Assignment(torch.cat([good[:, :-1], good[:, -1:] + 1], 1), sliced=True)", "sliced promises"),
    "in place": ("view.x.mul_(2)", "", "tokens in view.x are there to be looked at, and were changed"),
    "by batch": ("", "Assignment(good[:, : N - r - (1 if B > 1 else 0)])", "removes other numbers of tokens"),
}


def test_wrong_plans_fail_alone_and_say_why(source, tmp_path, tokbench_command, one_thread):
    """Some would not fail by themselves, but look fast, or end the command as if all were well."""
    plans = "".join(f"PLANS[{name!r}] = {before!r}\n" for name, (before, _, _) in WRONG_PLANS.items())
    results = "".join(f"RESULTS[{name!r}] = {given!r}\n" for name, (_, given, _) in WRONG_PLANS.items() if given)
    (tmp_path / "mine.py").write_text(MINE + plans + results)
    methods = [f"--method=mine:which={name}" for name in WRONG_PLANS]
    words = ("--plugin", tmp_path / "mine.py", "--schedule=8", "--batch-size=10", "--readers=0", "--device=cpu")
    code, out, err = tokbench_command(
        "run", "--model=tiny", *methods, "--method=topk", *words, "--out", tmp_path / "run"
    )
    assert code == 3 and not err and f"{len(WRONG_PLANS)} failed" in out
    records = plain_records(tmp_path / "run")
    failures = {record["params"]["which"]: record["message"] for record in records if record["kind"] == "failure"}
    assert failures.keys() == WRONG_PLANS.keys()
    for name, (*_, words) in WRONG_PLANS.items():
        assert re.search(words, failures[name]), (name, failures[name])
    assert [record["kind"] for record in records if record["method"] == "topk"] == ["flops", "accuracy", "speed"]
    assert len(source.read) == len(source)


@pytest.mark.parametrize(
    "body, method, words",
    [
        ("def check_x(value, default): 1/0", "mine:x=1", r"check_x\(1\) failed: ZeroDivisionError"),
        ("def check_x(value, default): raise SystemExit(0)", "mine:x=1", "SystemExit: 0"),
        ("check_x = 5", "mine:x=1", "TypeError: 'int' object is not callable"),
        ("def check_x(value, default): return ''", "mine:x=2020-01-01", "parameters cannot be recorded"),
        ("def __post_init__(self): raise SystemExit(0)", "mine", "'mine' with no parameters failed: SystemExit: 0"),
        ("place = 'nowhere'", "mine", "place is one of start, middle, end, not 'nowhere'"),
        ("flops_shape = None", "mine", "flops_shape is one of constant, keep, not None"),
    ],
)
def test_methods_that_cannot_be_made_are_refused_before_anything_begins(
    body, method, words, tmp_path, tokbench_command
):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom tokbench.fusion.core import Method, register_method\n"
        "@register_method\n@dataclass(frozen=True)\nclass Mine(Method):\n"
        f"    name = 'mine'\n    x: int = 3\n    {body}\n"
    )
    code, _, err = tokbench_command("run", "--dry-run", "--plugin", tmp_path / "mine.py", "--method", method)
    assert code == 2 and err.count("\n") == 1 and re.search(words, err), err


def test_a_method_that_is_no_dataclass_is_refused(monkeypatch):
    monkeypatch.setitem(METHODS, "mine", type("Mine", (Method,), {"name": "mine"}))
    with pytest.raises(tokbench.UserError, match="put @dataclass.* right above class Mine"):
        make_method("mine")


def test_a_method_of_ones_own_can_measure_a_parameter_on_images(source, tmp_path, tokbench_command):
    plugin = tmp_path / "gauged.py"
    plugin.write_text(
        """
from dataclasses import dataclass, replace
import tokbench
from tokbench.fusion.core import Assignment, Method, keep_only
import torch

@tokbench.register_method
@dataclass(frozen=True)
class Gauged(Method):
    name = "gauged"
    cut: float = -1.0

    @property
    def needs_calibration(self):
        return self.cut < 0

    def countable(self):
        return replace(self, cut=0.0)

    def calibrated(self, model, schedule, images):
        assert not hasattr(model, "fusion") and schedule.kind == "list"
        return replace(self, cut=float(images.mean()))

    def plan(self, view, r):
        assert self.cut >= 0
        patches = torch.arange(view.patches - r).expand(view.x.shape[0], -1)
        return keep_only(patches, view.prefix)
"""
    )
    words = ("--plugin", plugin, "--method", "gauged:cut=-2.0", "--schedule", "flops:0.7", "--only", "flops,accuracy")
    code, out, err = tokbench_command("run", *words, "--out", tmp_path / "run")
    assert code == 0, out + err
    record = plain_records(tmp_path / "run")[-1]
    assert record["params"] == {"cut": -2.0} and record["calibrated"]["cut"] > 0.5
    with pytest.raises(tokbench.UserError, match="'gauged' with cut=-1.0 measures the model on calibration images"):
        tokbench.apply(VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2), "gauged", 2)
