"""Exported models: what they answer, what is said of them, what is refused, and that the model stays as it was."""

from __future__ import annotations

import copy
import json
import logging
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from made_run import make_run
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import tokbench
from tokbench.errors import RunStopped
from tokbench.exporting import command, formats, runtimes, writing
from tokbench.fusion.core import METHODS, Assignment, Method, View, keep_only, register_method
from tokbench.models import weights_sha256

DOCS = Path(__file__).parents[1] / "docs"
TINY = dict(img_size=24, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=10)
FAMILIES = {
    "deit": (VisionTransformer, {}),
    "distilled": (VisionTransformerDistilled, {}),
    "registers": (VisionTransformer, dict(reg_tokens=4, no_embed_class=True, init_values=1.0)),
    "no class token": (VisionTransformer, dict(class_token=False, global_pool="avg")),
    "siglip": (VisionTransformer, dict(class_token=False, global_pool="map")),
    "dinov3": (
        Eva,
        dict(
            use_abs_pos_emb=False, use_rot_pos_emb=True, rope_type="dinov3", rope_rotate_half=True, num_reg_tokens=4,
            dynamic_img_size=True, qkv_bias=False,
        ),
    ),
}  # fmt: skip
CLASSES = [f"thing {number}" for number in range(10)]


def tiny(family: str = "deit", **changes):
    kind, options = FAMILIES[family]
    model = kind(**(TINY | options | changes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.pretrained_cfg = {"architecture": "tiny", "label_names": CLASSES, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    return model


def images(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 24, 24)


def exports(model, path) -> None:
    """To the file and back, and then on other images and another batch than the export looked at."""
    written = tokbench.export(model, path, images=images(20))
    assert written.compared.largest_difference < 1e-4 and written.compared.same_answers == 1
    x = images(5)
    with torch.inference_mode():
        torch.testing.assert_close(formats.FORMATS[path.suffix[1:]].open(path)(x), model(x), rtol=0, atol=1e-4)


def test_a_method_exports(tmp_path):
    exports(tokbench.apply(tiny("registers", depth=1), "evit", 5), tmp_path / "model.pt2")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", *METHODS])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_exports_from_every_family(family, method, monkeypatch, tmp_path):
    """To both formats, of one trace, which takes the most time."""
    model = tokbench.apply(tiny(family), method, 5 if method != "none" else 0)
    with torch.no_grad():
        program = writing._trace(model, "dynamic")
    monkeypatch.setattr(writing, "_trace", lambda model, batch: program)
    for kind in ("pt2", "onnx"):
        exports(model, tmp_path / f"model.{kind}")


class Sorts(nn.Module):
    """What methods sort: scores, chosen tokens; falling and rising; and the k-th of them."""

    def forward(self, x):
        tied = (x * 4).floor()
        return torch.cat(
            [
                tied.argsort(dim=1, descending=True, stable=True),
                tied.half().argsort(dim=1, stable=True),
                (tied < 2).to(torch.uint8).argsort(dim=1, stable=True),
                tied.kthvalue(7, 1, keepdim=True).values,
                tied.kthvalue(60).values.unsqueeze(1),
            ],
            dim=1,
        )


def test_of_equal_scores_the_lower_index_comes_first_in_every_runtime(tmp_path):
    program = torch.export.export(Sorts(), (torch.rand(3, 64),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    formats.FORMATS["onnx"].write(program, tmp_path / "sorts.onnx")
    x = torch.rand(5, 64)
    for open_ in (runtimes.open_onnxruntime, runtimes.open_openvino):
        assert torch.equal(open_(tmp_path / "sorts.onnx")(x), Sorts()(x))


class Sums(nn.Module):
    """What methods add up by index, in numbers of every width."""

    def forward(self, x):
        index = (x * 7).long()
        return torch.cat([torch.zeros_like(x).scatter_add(1, index, x).double(),
                          torch.zeros_like(x[:, :8]).half().scatter_add(1, index, x.half()).double(),
                          torch.zeros_like(index).scatter_add(1, index, index).double()], dim=1)  # fmt: skip


def test_sums_by_index_are_those_of_the_model_in_half_precision_too(tmp_path):
    program = torch.export.export(Sums(), (torch.rand(3, 16),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    formats.FORMATS["onnx"].write(program, tmp_path / "sums.onnx")
    x = torch.rand(5, 16).half().float()
    for open_ in (runtimes.open_onnxruntime, runtimes.open_openvino):
        torch.testing.assert_close(open_(tmp_path / "sums.onnx")(x), Sums()(x), rtol=0, atol=1e-2)


@dataclass
class Shipped:
    model: nn.Module
    folder: Path
    run: Path
    cell: str
    told: str


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """A cell of a run, exported by the command line."""
    folder = tmp_path_factory.mktemp("shipped")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = tiny("no class token", depth=1)
    patch = pytest.MonkeyPatch()
    patch.setattr(command, "load_model", lambda *words, **named: copy.deepcopy(model))
    run = make_run(folder / "run", model="tiny", weights_sha256=weights_sha256(model), input_size=[3, 24, 24])
    asked = dict.fromkeys(("model", "checkpoint", "input_size", "method", "schedule"))
    written = command.export_asked(
        run, "tiny/tome/constant:8", asked, folder / "model.onnx", format=None, batch="dynamic", dtype=None, force=False
    )
    patch.undo()
    yield Shipped(tokbench.apply(model, "tome", 8), folder, run, "tiny/tome/constant:8", written.text())


def test_a_cell_becomes_a_file_and_what_is_said_of_it(shipped):
    about = json.loads((shipped.folder / "model.onnx.json").read_text())
    assert about["weights_sha256"] == weights_sha256(shipped.model) and about["classes"] == CLASSES
    assert (about["method"], about["params"], about["schedule"]) == ("tome", {"prop_attn": True}, "constant:8")
    assert about["input"] == {"name": "images", "shape": ["dynamic", 3, 24, 24], "dtype": "float32"}
    assert about["preprocessing"]["mean"] == [0.5] * 3 and about["preprocessing"]["interpolation"] == "bicubic"
    assert (
        about["measured"]["top1"] == pytest.approx(79.8)
        and about["measured"]["machine"]
        and about["cell"] == shipped.cell
    )
    assert about["compared"]["batches"] == [1, 3, 16] and about["compared"]["same_answers"] == 1
    assert {"torch", "onnx", "onnxruntime", "onnxscript"} <= set(about["versions"])
    assert "100.0% equal answers on 20 images, in batches of 1, 3, 16" in shipped.told
    x = images(7)
    with torch.inference_mode():
        for open_ in (runtimes.open_onnxruntime, runtimes.open_openvino):
            torch.testing.assert_close(open_(shipped.folder / "model.onnx")(x), shipped.model(x), rtol=0, atol=1e-4)


def test_the_ten_lines_that_serve_it_answer_as_the_model_does(shipped, monkeypatch):
    monkeypatch.chdir(shipped.folder)
    pixels = np.random.RandomState(0).randint(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).resize((400, 300), Image.Resampling.BICUBIC).save("photo.png")
    (block,) = re.findall(r"^```python\n(import json.*?)^```$", (DOCS / "deploy.md").read_text(), re.M | re.S)
    names: dict = {}
    exec(block.replace("photo.jpg", "photo.png"), names)
    assert len([line for line in block.splitlines() if line and not line.startswith(("import", "from"))]) <= 12
    prepare = create_transform(**resolve_model_data_config(shipped.model, args={"input_size": (3, 24, 24)}))
    with torch.inference_mode():
        expected = shipped.model(prepare(Image.open("photo.png").convert("RGB")).unsqueeze(0))
    np.testing.assert_allclose(names["output"], expected, rtol=0, atol=2e-3)
    assert names["answer"] == CLASSES[expected.argmax()]


def test_pick_prints_the_command_that_exports_its_cell(tmp_path, tokbench_command):
    run = make_run(tmp_path / "a run")
    _, told, _ = tokbench_command("pick", run, "--max-drop", 1)
    (line,) = [line for line in told.splitlines() if line.startswith("tokbench export ")]
    words = shlex.split(line)
    assert words[2:] == [str(run), "--cell", "bundled/tome/constant:8", "--out", "model.onnx"]
    assert 'onnxruntime.InferenceSession("model.onnx")' in told
    code, _, told = tokbench_command(*words[1:-1], tmp_path / "model.pt2")
    assert code == 2 and "are not those that the run" in told and told.count("\n") == 1


@pytest.mark.parametrize("method", ["random", "dct", "ats"])
def test_an_export_leaves_nothing_in_the_model(method, tmp_path):
    """`random` and `dct` keep tensors from pass to pass, `ats` counts tokens in one."""
    model, x = tokbench.apply(tiny(depth=1), method, 5), images(4)
    with torch.no_grad():
        expected, tokens = model(x), tokbench.tokens_per_block(model)
        torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        assert tokbench.tokens_per_block(model) == tokens
        assert torch.equal(copy.deepcopy(model)(x), expected) and torch.equal(model(x), expected)
        assert torch.equal(tokbench.apply(model, method, 5)(x), expected)


class Stubborn(Method):
    """Counts its images, which no file of dynamic batch can."""

    name = "stubborn"

    def plan(self, view: View, r: int) -> Assignment:
        return keep_only(torch.arange(view.patches - r).expand(len(view.x), -1), view.prefix)


def test_what_cannot_be_exported_is_refused_by_name_and_stays_as_it_was(tmp_path):
    register_method(dataclass(frozen=True)(Stubborn))
    model, x = tokbench.apply(tiny(depth=1).train(), "stubborn", 5), images(2)
    model(x)
    with pytest.raises(
        tokbench.UserError, match="^method 'stubborn' in a VisionTransformer cannot be exported as pt2: "
    ):
        tokbench.export(model, tmp_path / "model.pt2", images=x)
    assert not list(tmp_path.iterdir()) and model.training
    assert tokbench.tokens_per_block(model) == [32]
    assert torch.equal(copy.deepcopy(model.eval())(x), tokbench.apply(model, "stubborn", 5)(x))
    assert not logging.root.manager.disable


def other_than(model):
    """A file's opener that answers something else."""

    def open_(path):
        return lambda x: model(x) + 0.5

    return open_


def test_a_file_that_answers_differently_goes_and_an_earlier_one_stays(tmp_path, monkeypatch):
    model = tiny(depth=1)
    monkeypatch.setattr(writing, "_trace", lambda model, batch: None)
    kind = formats.Format((), "", lambda program, path: path.write_text("new"), other_than(model))
    monkeypatch.setitem(formats.FORMATS, "pt2", kind)
    (tmp_path / "model.pt2").write_text("old")
    with pytest.raises(
        RunStopped, match=r"model.pt2' differs from the model by 0\.5, .*equal answers.* it was removed"
    ):
        tokbench.export(model, tmp_path / "model.pt2", images=images(3), force=True)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("model.pt2", "old")]


def test_rounding_is_what_the_next_wider_numbers_show(tmp_path, monkeypatch):
    """Half precision answers nearly as single does; a file that is as far from it as that is a good one."""
    half = tokbench.apply(tiny(), "tome", 5).half()
    single = copy.deepcopy(half).float()
    kind = formats.Format(
        (), "", lambda program, path: path.write_text("new"), lambda path: lambda x: single(x.float())
    )
    monkeypatch.setitem(formats.FORMATS, "pt2", kind)
    monkeypatch.setattr(writing, "_trace", lambda model, batch: None)
    written = tokbench.export(half, tmp_path / "model.pt2", images=images(8), batch=4)
    assert written.compared.largest_difference > 0 and written.compared.batches == (4,)


@pytest.mark.parametrize("method", ["ats", "dct"])
def test_a_jit_trace_answers_as_the_model_does(method):
    model, example, x = tokbench.apply(tiny(depth=1), method, 5), images(2), images(6)
    with torch.inference_mode():
        traced = torch.jit.trace(model, example)
        torch.testing.assert_close(traced(x), model(x))
        copy.deepcopy(model)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["RUN", "--cell", "bundled/tome/8"], r"no cell 'bundled/tome/8'\. Did you mean .*'bundled/tome/constant:8'"),
        (["RUN"], r"named by both: the run's folder, and --cell ID"),
        (["--method", "tome", "--schedule", "8"], r"name a RUN and its --cell, or a --model"),
        (["RUN", "--cell", "bundled/none/", "--method", "tome"], r"--method and --cell contradict"),
        (["--model", "bundled", "--method", "tome"], r"--method and --schedule go together"),
        (["--model", "bundled", "--method", "tomee", "--schedule", "8"], r"Did you mean 'tome'"),
        (["--model", "bundled", "--batch", "0"], r"batch must be at least 1 image"),
        (["--model", "bundled", "--batch", "many"], r"--batch must be a number of images or 'dynamic', not 'many'"),
        (["--model", "bundled", "--dtype", "bf16"], r"--dtype is fp32 or fp16, not 'bf16'"),
        (["--model", "bundled", "--format", "onxn"], r"no format 'onxn'.* Did you mean 'onnx'"),
        (["--model", "bundled", "--format", "onnx"], r"--format onnx and '.*model\.pt2' contradict each other"),
        (["--model", "bundled", "--out", "model.bin"], r"'model\.bin' must end in \.onnx or \.pt2"),
        (["--model", "bundled", "--out", "nowhere/model.pt2"], r"the folder 'nowhere' does not exist"),
        (["--model", "bundled", "--out", "THERE"], r"there\.pt2' is there already; --force replaces it"),
    ],
)
def test_wrong_words_are_told_in_a_line(words, told, tmp_path, tokbench_command):
    there = tmp_path / "there.pt2"
    there.write_text("")
    if "RUN" in words:
        words = [make_run(tmp_path / "run"), *words[1:]]
    words = [there if word == "THERE" else word for word in words]
    out = [] if "--out" in words else ["--out", tmp_path / "model.pt2"]
    code, _, err = tokbench_command("export", *words, *out)
    assert code == 2 and err.count("\n") == 1 and re.search(told, err), err
    assert not (tmp_path / "model.pt2").exists()


def test_a_missing_package_is_named_with_the_pip_line(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(tokbench.UserError, match=r"^format 'onnx' needs onnxscript: pip install 'tokbench\[onnx\]'$"):
        tokbench.export(tiny(depth=1), tmp_path / "model.onnx")
