"""The kernels in C give what the definitions give, on any shape, and go away where they must."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_vits import vit
from torch import Tensor

import tokbench
from tokbench.fusion.core import Assignment, View, best_proposals, bipartite_match, merge, two_sets
from tokbench.fusion.kernels import cpu, kernels_for
from tokbench.fusion.mctf import MCTF, _both_ways, criteria
from tokbench.fusion.pitome import by_energy

needs_compiler = pytest.mark.skipif(cpu.library() is None, reason="there is no C compiler that knows OpenMP")
# (images, prefix, patches): odd and even counts, a set of one token, any prefix, and more than a vector holds.
SHAPES = [(1, 1, 24), *itertools.product([3], [0, 1, 2, 5], [2, 3, 9, 67])]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def tokens_a(prefix: int, patches: int) -> int:
    return len(range(prefix + prefix % 2, prefix + patches, 2))


@needs_compiler
@pytest.mark.parametrize("images, prefix, patches", SHAPES)
def test_matching_is_that_of_the_definition(images, prefix, patches):
    metric = torch.randn(images, prefix + patches, 21)
    some_of_each = torch.randn(images, prefix + patches, 2, 21)[:, :, 1]  # with gaps between the tokens
    for r in {1, (tokens_a(prefix, patches) + 1) // 2, tokens_a(prefix, patches)}:
        for x in (metric, some_of_each):
            for own, defined in zip(cpu.match(x, prefix, r), bipartite_match(x, prefix, r), strict=True):
                assert torch.equal(own, defined)


@needs_compiler
def test_of_equal_scores_the_lower_index_comes_first():
    scores = torch.randint(0, 3, (4, 8, 9)).float()
    ours, defined = (choose(scores.clone(), 1, 4) for choose in (cpu.best_proposals, best_proposals))
    assert all(map(torch.equal, ours, defined))


@needs_compiler
@pytest.mark.parametrize("images, prefix, patches", SHAPES)
def test_both_ways_is_that_of_mctf(images, prefix, patches):
    method, tokens = MCTF(), prefix + patches
    x, alone = torch.randn(images, tokens, 12), torch.rand(images, tokens)
    for r in {1, patches // 4, patches // 2} - {0}:
        view = view_of(x, prefix)
        expected = _both_ways(method.attraction(view, alone), prefix, r)
        a, b = two_sets(cpu.unit(x), prefix)
        ours = cpu.best_proposals(a @ b.mT, prefix, r, back=(r + 1) // 2, alone=alone)
        assert all(map(torch.equal, ours, expected))


def view_of(x: Tensor, prefix: int, **more) -> View:
    heads = torch.randn(2, x.shape[0], 3, x.shape[1], 5, dtype=x.dtype)
    return View(
        x=x, prefix=prefix, patches=x.shape[1] - prefix, block=1, depth=4, heads=lambda: tuple(heads),
        values=lambda: heads[0], scale=0.4, has_class_token=False, grid=(1, x.shape[1] - prefix), **more,
    )  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("images, prefix, patches", SHAPES)
def test_attention_means_and_energies_are_those_of_the_definitions(images, prefix, patches):
    tokens = prefix + patches
    shut_out = torch.rand(images, tokens).where(torch.arange(tokens) > 0, -torch.inf)
    for log_size in (None, torch.rand(images, tokens), shut_out):
        plain = view_of(torch.randn(images, tokens, 6), prefix, log_size=log_size)
        heads = plain.heads()
        ours = view_of(plain.x, prefix, log_size=log_size, kernels=cpu)
        ours.heads = lambda heads=heads: heads
        torch.testing.assert_close(ours.attention(), plain.attention(), rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(ours.received(), plain.received(), rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(ours.mean_keys(), plain.mean_keys())
    torch.testing.assert_close(cpu.unit(plain.x), F.normalize(plain.x, dim=-1))
    for size in (None, torch.rand(images, tokens) + 1):
        ours, defined = (weigh(plain.received(), size, 20.0, 40.0) for weigh in (cpu.criteria, criteria))
        torch.testing.assert_close(ours, defined)


@needs_compiler
@pytest.mark.parametrize("images, prefix, patches", SHAPES)
def test_choosing_by_energy_is_that_of_pitome(images, prefix, patches):
    unit = F.normalize(torch.randn(images, patches, 9), dim=-1)
    for r in {1, patches // 4, patches // 2} - {0}:
        for matched in (patches, 2 * r):
            ours, defined = (choose(unit @ unit.mT, prefix, r, matched, 0.3) for choose in (cpu.by_energy, by_energy))
            assert all(map(torch.equal, ours, defined))


@needs_compiler
@pytest.mark.parametrize("combine", ["mean", "mlerp"])
@pytest.mark.parametrize("images, prefix, patches", SHAPES)
def test_merging_is_that_of_the_definition(images, prefix, patches, combine):
    tokens = prefix + patches
    x, weight = torch.randn(images, tokens, 19), torch.rand(images, tokens) + 0.1
    for r in {1, tokens_a(prefix, patches)}:
        kept, source, slot = bipartite_match(torch.randn(images, tokens, 7), prefix, r)
        defined, ours = (Assignment(kept, source, slot, weight, combine) for _ in range(2))
        size = torch.rand(images, tokens) + 1
        expected, merged = merge(x, defined, size), merge(x, ours, size, cpu)
        torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.total(size), defined.total(size))
        alone = torch.ones(kept.shape, dtype=torch.bool).scatter(1, slot, False)
        assert torch.equal(merged[alone], x.gather(1, kept.unsqueeze(-1).expand_as(merged))[alone])


@needs_compiler
def test_merged_tokens_that_cancel_out_stay_nothing():
    x, kept = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [-3.0, -4.0]]]), torch.tensor([[0, 1]])
    merged, _ = cpu.join(x, kept, torch.tensor([[2]]), torch.tensor([[1]]), torch.ones(1, 3), torch.ones(1, 3), True)
    assert merged.tolist() == [[[1, 2], [0, 0]]]


@needs_compiler
def test_a_plan_that_names_no_token_raises_and_touches_nothing():
    x, kept, weight = torch.randn(1, 6, 4), torch.arange(4)[None], torch.ones(1, 6)
    for source, slot in ((6, 0), (-1, 0), (5, 4), (5, -1)):
        with pytest.raises(IndexError):
            cpu.join(x, kept, torch.tensor([[source]]), torch.tensor([[slot]]), weight, weight, False)


@needs_compiler
def test_what_no_kernel_may_be_given_goes_by_the_definition():
    """A plugin's plans need not have been looked at."""
    x, kept, source, slot = torch.rand(2, 6, 4), *(torch.tensor([row, row]) for row in ([0, 1, 2, 3], [4], [1]))
    precise = Assignment(kept, source, slot, torch.full((2, 6), 3.0, dtype=torch.float64))
    longer = Assignment(kept, source, slot, torch.rand(2, 7))
    for plan in (precise, longer, Assignment(kept[:1], source[:1], slot[:1], torch.rand(2, 6))):
        looked_at = []
        with contextlib.suppress(RuntimeError):
            looked_at.append(merge(x, replace(plan), None))
        with contextlib.suppress(RuntimeError):
            looked_at.append(merge(x, replace(plan), None, cpu))
        assert len(looked_at) != 1 and all(torch.equal(one, looked_at[0]) for one in looked_at)
    view = view_of(torch.rand(2, 8, 4), 1, kernels=cpu)
    assert [one.shape[1] for one in view.match(view.x, 99)] == [5, 3, 3]


@needs_compiler
def test_numbers_that_are_none_stay_within_the_tokens():
    metric = torch.full((2, 21, 4), torch.nan)
    metric[1, 3:7] = torch.tensor([torch.inf, -torch.inf, 0.0, 1.0])
    for plan in (cpu.match(metric, 1, 5), cpu.best_proposals(metric[:, :10, :1] * metric[:, :10, :1].mT, 1, 5, back=3)):
        kept, source, slot = plan
        for image in range(2):
            assert sorted([*kept[image].tolist(), *source[image].tolist()]) == list(range(21))
        assert slot.min() > 0 and slot.max() < 16


@needs_compiler
@pytest.mark.parametrize("method", ["tome", "tofu", "pitome", "mctf", "ppt", "mstm", "evit"])
def test_a_model_with_kernels_answers_as_without(method):
    model = tokbench.apply(vit(), method, 3)
    x = torch.rand(2, 3, 32, 32)
    ours = model(x)
    model.fusion.fused = False
    torch.testing.assert_close(ours, model(x), rtol=1e-4, atol=1e-5)


@needs_compiler
def test_kernels_go_away_for_gradients_traces_other_precisions_and_whoever_looks_at_operations():
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.rand(1, 4, 3)
    assert kernels_for(x) is cpu
    with torch.inference_mode(False), torch.enable_grad():
        assert kernels_for(x) is None
    with FlopCounterMode(display=False):
        assert kernels_for(x) is None
    seen = []
    torch.jit.trace(lambda x: (seen.append(kernels_for(x)), x + 1)[1], x)
    assert seen[0] is None
    assert view_of(x.double(), 1, kernels=cpu).kernel("match", x.double()) is None


def test_without_a_compiler_definitions_do(tmp_path):
    code = (
        "import torch; from tokbench.fusion.kernels import cpu, kernels_for; torch.set_grad_enabled(False);"
        "assert cpu.library() is None and kernels_for(torch.rand(1, 2, 3)) is None"
    )
    places = {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path), "CC": str(tmp_path / "none")}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | places)
