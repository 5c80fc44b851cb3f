"""Every method against outputs of its authors' code, or of independent per-sample loops (see golden/README.md)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

import tokbench
from tokbench.fusion.patch import tokens_per_image

GOLDEN = Path(__file__).parent / "golden"


def read_cases():
    folders = {path.parent.name for path in GOLDEN.glob("*/cases.json")} - {"families"}  # of test_families.py
    for folder in sorted(folders):
        specs = json.loads((GOLDEN / folder / "cases.json").read_text())
        for variant, spec in ({"": specs} if "cases" in specs else specs).items():
            for name, case in spec["cases"].items():
                prefix = variant and f"{variant}."
                MODELS[folder, prefix] = spec["model"]
                yield pytest.param(folder, prefix, name, case, id=f"{folder}-{prefix}{name}")


MODELS: dict[tuple[str, str], dict] = {}
CASES = list(read_cases())


@cache
def load(folder: str, prefix: str):
    weights, expected = (load_file(GOLDEN / folder / f"{prefix}{what}.safetensors") for what in ("weights", "expected"))
    images = expected["images"] if prefix else load_file(GOLDEN / folder / "images.safetensors")["images"]
    model = VisionTransformer(**MODELS[folder, prefix]).double().eval()
    model.load_state_dict({name: tensor.double() for name, tensor in weights.items()})
    return model, images.double(), expected


def tuples(params: dict) -> dict:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in params.items()}


def test_no_reference_is_left_out():
    folders = [case.values[0] for case in CASES]
    assert {folder: folders.count(folder) for folder in folders} == {
        "plain": 25, "odd": 25, "variants": 8, "more": 28, "more-variants": 24, "more2": 27, "more2-variants": 21
    }  # fmt: skip


@pytest.mark.parametrize(("folder", "prefix", "name", "case"), CASES)
def test_method_equals_its_reference(folder, prefix, name, case):
    model, images, expected = load(folder, prefix)
    model = tokbench.fork(model)
    baseline = model(images)
    torch.testing.assert_close(baseline, expected["baseline"], rtol=0, atol=1e-9)

    tokbench.apply(model, case["method"], case["schedule"], trace=True, **tuples(case["params"]))
    torch.testing.assert_close(model(images), expected[name], rtol=0, atol=1e-9)
    counts = [after if isinstance(after, list) else [after] for after in case["tokens_after_block"]]
    assert [sorted(set(found)) for found in tokens_per_image(model)] == [sorted(set(count)) for count in counts]
    assert tokbench.tokens_per_block(model) == [sum(count) / len(count) for count in counts]
    if f"{name}/trace" in expected:
        assert torch.equal(tokbench.token_map(model), expected[f"{name}/trace"].long())
    if f"{name}/scale" in expected:
        torch.testing.assert_close(model.fusion.state.size, expected[f"{name}/scale"], rtol=0, atol=1e-9)

    assert torch.equal(tokbench.remove(model)(images), baseline)
