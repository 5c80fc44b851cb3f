"""Methods of one's own: the documented example end to end, and what is said of files that are wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import tokbench
from tokbench import cli, plugins
from tokbench.fusion.core import METHODS, register_method
from tokbench.plugins import load_plugins

EXAMPLE = Path(__file__).parents[1] / "docs" / "my_method.py"


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """The registry and the modules as they were before, afterwards."""
    known, loaded, modules = dict(METHODS), dict(plugins.LOADED), set(sys.modules)
    yield
    for registry, before in ((METHODS, known), (plugins.LOADED, loaded)):
        registry.clear()
        registry.update(before)
    for name in set(sys.modules) - modules:
        if name.startswith("tokbench_plugin_"):
            del sys.modules[name]


def test_the_documented_example_reaches_everything(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    arguments = ["run", "--plugin", str(EXAMPLE), "--method", "long-keys:power=0.5", "--schedule", "flops:0.5"]
    monkeypatch.setattr(sys, "argv", ["tokbench", *arguments, "--limit", "32", "--out", str(out)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 0, capsys.readouterr()
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    own = {record["kind"]: record for record in records if record["method"] == "long-keys"}
    assert own.keys() == {"flops", "accuracy", "speed"}
    assert abs(own["flops"]["flops_ratio"] - 0.5) < 0.01 and own["flops"]["unsupported"] == {}
    assert own["accuracy"]["params"] == {"power": 0.5} and own["accuracy"]["tokens"][-1] < 100
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


def test_a_run_is_not_continued_with_another_version_of_a_plugin(tmp_path, monkeypatch, capsys):
    own = tmp_path / "mine.py"
    words = ["run", "--plugin", str(own), "--method", "long-keys", "--only", "flops", "--out", str(tmp_path / "run")]

    def run(*more: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["tokbench", *words, *more])
        METHODS.pop("long-keys", None)
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return int(exit.value.code), capsys.readouterr().err

    own.write_text(EXAMPLE.read_text())
    assert run("--schedule", "8") == (0, "")
    assert run("--schedule", "13") == (0, "")
    own.write_text(EXAMPLE.read_text().replace("descending=True", "descending=False"))
    code, err = run("--schedule", "20")
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
    with pytest.raises(tokbench.UserError, match="emty.py' is not there. Did you mean 'empty.py'"):
        load_plugins([tmp_path / "emty.py"])


def test_a_method_needs_a_name_that_can_be_typed():
    for name in ("", "My Method", "none"):
        with pytest.raises(tokbench.UserError):
            register_method(type("Mine", (METHODS["tome"],), {"name": name}))
