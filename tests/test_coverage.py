"""Every architecture of timm's ViT classes: each method runs right in it, or it is refused with a reason."""

from __future__ import annotations

import copy
import inspect
import sys
from pathlib import Path

import pytest
import timm
import torch
from kinds import slowly
from survey import coverage

import tokbench
from tokbench import models
from tokbench.fusion.patch import REDUCED_MODELS
from tokbench.measure._model import resolve_input_size

COVERAGE = Path(__file__).parents[1] / "docs" / "coverage.md"
METHODS = [name for name in tokbench.list_methods() if name != "none"]


@pytest.fixture(scope="module")
def tried() -> list[coverage.Tried]:
    torch.manual_seed(0)
    return coverage.survey(["none", "tome"])  # the others are tried below


@pytest.fixture(scope="module")
def supported(tried) -> list[tuple]:
    """(structure, model, images, what the unreduced model says) of each structure that methods work on."""
    torch.manual_seed(1)  # and not what the test before left
    works = [(one.structure, one.model) for one in tried if not one.refusals]
    return [(structure, *with_output(model)) for structure, model in works]


@pytest.fixture(scope="module")
def twins(tried) -> list[tuple]:
    """As `supported`, in float64, with patch tokens that are 18 pairs of equal ones."""
    torch.manual_seed(2)
    doubled = [(one.structure, copy.deepcopy(one.model).double()) for one in tried if not one.refusals]
    for _, model in doubled:
        give_twins(model)
    return [(structure, *with_output(model)) for structure, model in doubled]


def by_turns(items: list, turn: int, among: int) -> list:
    """Every so-maniest of them: a test of every method in every structure takes minutes, so methods share them out."""
    return items[turn % among :: among]


def with_output(model) -> tuple:
    x = images(model)
    with torch.inference_mode():
        return model, x, model(x)


def images(model) -> torch.Tensor:
    return torch.rand(2, *resolve_input_size(model, None), dtype=next(model.parameters()).dtype)


def give_twins(model) -> None:
    """Let pairs of patch tokens be equal, with one place for all patches, as far as attention looks at places."""
    tokens = torch.randn(2, coverage.SIDE**2 + model.num_prefix_tokens, model.embed_dim, dtype=torch.float64)
    tokens[:, model.num_prefix_tokens + 1 :: 2] = tokens[:, model.num_prefix_tokens :: 2]

    def one_place(block, args, options):
        if options.get("rope") is not None:
            options["rope"] = options["rope"][..., :1, :].expand_as(options["rope"])
        return (tokens if block is model.blocks[0] else args[0], *args[1:]), options

    for block in model.blocks:
        block.register_forward_pre_hook(one_place, with_kwargs=True)
        table = getattr(block.attn, "relative_position_bias_table", None)
        if table is not None:
            table.data[:-3] = table.data[0]  # of patches; then the class token's ways


def test_no_other_module_of_timm_knows_these_classes():
    modules = {name.rpartition(".")[2]: module for name, module in sys.modules.items() if "timm.models." in name}
    knowing = {
        name
        for name, module in modules.items()
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, tuple(REDUCED_MODELS))
    }
    assert knowing | set(models.OWN_MODULES) == set(models.VIT_MODULES)


def test_every_architecture_is_in_the_survey(tried):
    names = [name for one in tried for name in one.names]
    assert sorted(names) == sorted(coverage.architectures()) and len(names) > 250
    assert {one.structure[0] for one in tried} == {kind.__name__ for kind in REDUCED_MODELS}


def test_a_structure_is_supported_by_every_method_or_by_none(tried):
    for one in tried:
        assert set(one.refusals) in (set(), {"none", "tome"}), one.structure
    refused = {name for one in tried if one.refusals for name in one.names}
    assert {name for name in refused if timm.is_model_pretrained(name)} == set(models.REFUSED)
    for one in tried:
        for reason in one.refusals.values():
            assert "side by side" in reason or "difference of two attentions" in reason


@pytest.mark.parametrize("method", slowly(METHODS))
def test_tokens_are_removed_as_asked(method, supported):
    for structure, model, x, _ in by_turns(supported, METHODS.index(method), 2):
        tokens = coverage.SIDE**2 + model.num_prefix_tokens
        each = {"evit": [4, 4, 4, 4], "mctf": [0, 5, 5, 5]}.get(method, [5, 5, 5, 5])
        with torch.inference_mode():
            assert tokbench.apply(model, method, 5)(x).isfinite().all(), structure
        left = [tokens - sum(each[: block + 1]) for block in range(4)]
        tokens = tokbench.tokens_per_block(model)
        if method == "ats":  # a mean over images, that may lose more
            assert all(mean <= most for mean, most in zip(tokens, left, strict=True)), structure
        else:
            assert tokens == left, structure
        tokbench.remove(model)


@pytest.mark.parametrize("method", slowly(METHODS))
def test_removing_nothing_is_the_unreduced_model_bit_for_bit(method, supported):
    for structure, model, x, expected in by_turns(supported, METHODS.index(method) + 1, 2):
        with torch.inference_mode():
            assert torch.equal(tokbench.apply(model, method, 0)(x), expected), structure
        tokbench.remove(model)


def test_a_method_leaves_no_trace_when_it_is_removed(supported):
    for structure, model, x, expected in supported:
        kinds, state = [type(module) for module in model.modules()], list(model.state_dict())
        with torch.inference_mode():
            assert not torch.equal(tokbench.apply(model, "tome", 9)(x), expected), structure
            assert list(model.state_dict()) == state
            assert torch.equal(tokbench.remove(model)(x), expected), structure
        assert [type(module) for module in model.modules()] == kinds
        assert not any(hasattr(module, "fusion") for module in model.modules())


@pytest.mark.parametrize(
    ("method", "schedule", "params", "turn", "among"),
    [
        ("tome", "list:18", {}, 0, 1),
        ("tofu", "list:18", {"prune_blocks": 0}, 0, 3),
        ("mctf", "list:0,18", {}, 0, 3),
        ("mctf", "list:0,18", {"one_step_ahead": "precise", "bidirectional": False}, 1, 3),
        ("mctf", "list:0,18", {"one_step_ahead": "off"}, 2, 3),
    ],
)
def test_merging_twins_changes_nothing(method, schedule, params, turn, among, twins):
    """To other tokens and to the pooling, two equal tokens at one place are what one token of size two is."""
    if method == "mctf":
        params = params | {"tau_info": 1e6}  # pair by similarity; merge by information all the same
    for structure, model, x, expected in by_turns(twins, turn, among):
        with torch.inference_mode():
            reduced = tokbench.apply(model, method, schedule, **params)(x)
        assert tokbench.tokens_per_block(model)[-1] == 18 + model.num_prefix_tokens
        tokbench.remove(model)
        torch.testing.assert_close(
            reduced, expected, rtol=1e-8, atol=1e-8, msg=lambda text, kind=structure: f"{kind}: {text}"
        )


def test_the_committed_table_is_that_of_this_timm(tried):
    text = COVERAGE.read_text()
    if f"timm {timm.__version__} " not in text:
        pytest.skip(f"the table is not of timm {timm.__version__}; constraints.txt pins the one it is of")
    assert text == coverage.table(tried), "run: python benchmarks/coverage.py docs/coverage.md"
