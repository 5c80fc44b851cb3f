"""Every method against outputs of its authors' code, or of independent per-sample loops (see golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

import tokbench

GOLDEN = Path(__file__).parent / "golden"


def read_cases():
    for folder in ("plain", "odd"):
        spec = json.loads((GOLDEN / folder / "cases.json").read_text())
        for name, case in spec["cases"].items():
            yield pytest.param(folder, "", spec["model"], name, case, id=f"{folder}-{name}")
    for variant, spec in json.loads((GOLDEN / "variants" / "cases.json").read_text()).items():
        for name, case in spec["cases"].items():
            yield pytest.param("variants", f"{variant}.", spec["model"], name, case, id=f"{variant}-{name}")


CASES = list(read_cases())


def load(folder: str, prefix: str, arguments: dict):
    weights, expected = (load_file(GOLDEN / folder / f"{prefix}{what}.safetensors") for what in ("weights", "expected"))
    images = expected["images"] if prefix else load_file(GOLDEN / folder / "images.safetensors")["images"]
    model = VisionTransformer(**arguments).double().eval()
    model.load_state_dict({name: tensor.double() for name, tensor in weights.items()})
    return model, images.double(), expected


def tuples(params: dict) -> dict:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in params.items()}


def test_no_reference_is_left_out():
    folders = [case.values[0] for case in CASES]
    assert {folder: folders.count(folder) for folder in folders} == {"plain": 25, "odd": 25, "variants": 8}


@pytest.mark.parametrize(("folder", "prefix", "arguments", "name", "case"), CASES)
def test_method_equals_its_reference(folder, prefix, arguments, name, case):
    model, images, expected = load(folder, prefix, arguments)
    baseline = model(images)
    torch.testing.assert_close(baseline, expected["baseline"], rtol=0, atol=1e-9)

    tokbench.apply(model, case["method"], case["schedule"], trace=True, **tuples(case["params"]))
    torch.testing.assert_close(model(images), expected[name], rtol=0, atol=1e-9)
    assert tokbench.tokens_per_block(model) == case["tokens_after_block"]
    if f"{name}/trace" in expected:
        assert torch.equal(tokbench.token_map(model), expected[f"{name}/trace"].long())

    assert torch.equal(tokbench.remove(model)(images), baseline)
