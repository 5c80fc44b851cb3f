"""The ways people run models: half precision, memory formats, input sizes, torch.compile, and all of it on Eva."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from kinds import ONE_OF_EACH, slowly
from tiny_vits import eva, rotary, vit
from torch.nn.attention import SDPBackend, sdpa_kernel

import tokbench
from tokbench.fusion.anatomy import write_attention_out
from tokbench.fusion.core import Assignment, View, make_method, merge
from tokbench.measure.compiled import compile_model
from tokbench.measure.kernels import attention_kernels

METHODS = [name for name in tokbench.list_methods() if name != "none"]


# Eva: what tests/test_fusion.py asks of VisionTransformer


@pytest.mark.parametrize("method", METHODS)
def test_an_eva_gets_its_own_forward_back(method):
    model = eva()
    x, names = torch.rand(3, 3, 32, 32), list(model.state_dict())
    expected = model(x)
    assert not torch.equal(tokbench.apply(model, method, 9)(x), expected)
    assert list(model.state_dict()) == names
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), tokbench.fork(model)):
        assert torch.equal(copied(x), model(x))
        assert torch.equal(tokbench.remove(copied)(x), expected)
    assert torch.equal(tokbench.remove(model)(x), expected)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("mctf", "mixed"),
        ("evit", "dinov3"),
        *(pytest.param(method, "axial", marks=() if method == "tofu" else pytest.mark.slow) for method in METHODS),
    ],
)
def test_an_eva_compiles_without_a_graph_break(method, kind):
    model = tokbench.apply(rotary(kind, depth=2), method, 5)
    x = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        expected = model(x)
        torch.testing.assert_close(compile_model(model, backend="aot_eager")(x), expected)


@pytest.mark.parametrize("method", slowly(name for name in METHODS if name != "ats"))  # whose FLOPs need images
def test_every_operator_in_an_eva_is_counted(method):
    model = eva()
    whole = tokbench.count_flops(model)
    reduced = tokbench.count_flops(tokbench.apply(model, method, 9))
    assert not whole.unsupported and not reduced.unsupported
    assert reduced.total < whole.total


@pytest.mark.parametrize("method", ["tome", "mctf"])
def test_flops_schedules_hold_for_an_eva(method):
    model = eva()
    whole = tokbench.count_flops(model)
    tokbench.apply(model, method, "flops:0.7")
    assert abs(tokbench.count_flops(model).total / whole.total - 0.7) < 0.02


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", slowly(METHODS))
def test_an_eva_in_half_precision(method, dtype, device):
    model = tokbench.apply(eva(global_pool="avg").to(device), method, 5)
    x = torch.rand(2, 3, 32, 32, device=device)
    exact = model(x).double()
    with torch.autocast(device, torch.bfloat16):
        outs = [model(x)]
    outs.append(model.to(dtype)(x.to(dtype)))
    assert outs[1].dtype == dtype
    for out in outs:
        assert out.isfinite().all()
        assert torch.nn.functional.cosine_similarity(out.double(), exact, dim=-1).min() > 0.999


@pytest.mark.parametrize("method", slowly(METHODS))
def test_an_image_in_an_eva_does_not_depend_on_its_batch(method):
    model = tokbench.apply(eva().double(), method, 5)
    x = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    together = model(x)
    torch.testing.assert_close(torch.cat([model(one) for one in x.split(1)]), together, rtol=0, atol=1e-9)


def test_an_eva_is_refused_where_it_drops_patches_or_is_asked_for_a_mask():
    with pytest.raises(tokbench.UnsupportedModelError, match="patch_drop_rate > 0"):
        tokbench.apply(eva(patch_drop_rate=0.5), "tome", 3)
    with pytest.raises(ValueError, match="attention mask"):
        tokbench.apply(eva(), "tome", 3)(torch.rand(1, 3, 32, 32), attn_mask=torch.zeros(1, 1, 65, 65))


# Precision


def test_long_tokens_are_merged_by_mlerp_in_half_precision():
    x = torch.randn(2, 12, 192, dtype=torch.float64) * 15_000
    source, slot = torch.arange(8, 12).expand(2, -1), torch.tensor([[0, 1, 1, 3]]).expand(2, -1)
    plan = Assignment(torch.arange(8).expand(2, -1), source, slot, combine="mlerp")
    assert x.norm(dim=-1).min() > torch.finfo(torch.float16).max
    expected = merge(x, plan, None)
    torch.testing.assert_close(merge(x.half(), plan, None).double(), expected, rtol=5e-3, atol=30)


def test_tokens_that_cancel_out_merge_to_nothing_and_not_to_nan():
    x = torch.randn(1, 2, 6).repeat(1, 2, 1) * torch.tensor([1.0, 1.0, -1.0, 1.0])[:, None]
    plan = Assignment(torch.tensor([[0, 1]]), torch.tensor([[2, 3]]), torch.tensor([[0, 1]]), combine="mlerp")
    merged = merge(x, plan, None)
    assert torch.equal(merged[0, 0], torch.zeros(6))
    torch.testing.assert_close(merged[0, 1], x[0, 1])


@pytest.mark.parametrize("params", [{}, {"bidirectional": False}, {"one_step_ahead": "precise"}])
def test_mctf_ranks_alike_in_half_precision_beside_a_token_that_nothing_attends_to(params):
    """The others' information is 1e-25 of its, and the product of two such numbers no float32."""
    strength = torch.rand(20, dtype=torch.float64).mul(1024).round() / 512
    strength[6] = 57
    x = torch.randn(1, 20, 8, dtype=torch.float64) * 3000

    def plan(dtype):
        keys = torch.zeros(1, 1, 20, 2, dtype=dtype)
        keys[..., 0] = -strength.to(dtype)
        queries = torch.ones_like(keys)
        heads = lambda: (queries, keys)  # noqa: E731
        view = View(x.to(dtype), 0, 20, 1, 4, heads, lambda: keys, 1.0, has_class_token=False, grid=(4, 5))
        return view, make_method("mctf", **params).plan(view, 8)

    exact, half = plan(torch.float64)[1], plan(torch.float16)[1]
    assert exact.source.tolist() == half.source.tolist() and exact.kept.tolist() == half.kept.tolist()
    assert exact.slot.tolist() == half.slot.tolist()
    merged, reference = merge(x.half(), half, None).double(), merge(x, exact, None)
    torch.testing.assert_close(merged, reference, rtol=5e-3, atol=30)


@pytest.mark.parametrize("build", [vit, eva])
@pytest.mark.parametrize("method", slowly(METHODS))
def test_channels_last_gives_the_same(method, build):
    model = tokbench.apply(build(), method, 9, trace=True)
    x = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        expected, where = model(x), tokbench.token_map(model)
        last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(tokbench.token_map(model), where)


# Attention kernels


@pytest.mark.parametrize("build", [vit, eva])
def test_the_kernels_that_attention_came_to_are_named(build):
    model, x = build(), torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        assert attention_kernels(model, x) == ["flash_attention_for_cpu"]
    for method in METHODS:
        assert attention_kernels(tokbench.apply(tokbench.fork(model), method, 9), x) in (
            ["flash_attention_for_cpu"],
            [],
        )
    with sdpa_kernel(SDPBackend.MATH):
        assert attention_kernels(model, x) == []
    for block in model.blocks:
        block.attn.fused_attn = False
    assert attention_kernels(model, x) == []


@pytest.mark.parametrize("method", slowly(METHODS))
def test_with_attention_written_out_a_method_gives_the_same(method):
    model, x = vit().double(), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with torch.inference_mode():
        expected = tokbench.apply(tokbench.fork(model), method, 9)(x)
        write_attention_out(model)
        plain = tokbench.apply(model, method, 9)
        torch.testing.assert_close(plain(x), expected, rtol=0, atol=1e-10)
    assert not plain.fusion.fused and attention_kernels(plain, x) == []


# Input sizes


@pytest.mark.parametrize(
    ("method", "build"),
    [*((method, vit) for method in METHODS if method in ONE_OF_EACH), ("tome", eva), ("mctf", eva), ("gtp", eva)],
)
def test_the_grid_is_that_of_the_image_in_hand(method, build):
    """A model that takes any size is, at each, what a model built for that size is."""
    flexible, fixed = build(dynamic_img_size=True), build(img_size=(24, 44))
    weights = flexible.state_dict() | {"pos_embed": torch.zeros(1, 67, flexible.embed_dim)}
    fixed.load_state_dict(weights)
    flexible.pos_embed.data.zero_()
    for size in ((32, 32), (24, 44)):
        x = torch.rand(2, 3, *size)
        reduced = tokbench.apply(flexible, method, 7)(x)
    torch.testing.assert_close(reduced, tokbench.apply(fixed, method, 7)(x))
    assert tokbench.tokens_per_block(flexible) == tokbench.tokens_per_block(fixed)
    assert tokbench.count_flops(flexible, (3, 24, 44)).total == tokbench.count_flops(fixed).total


@pytest.mark.parametrize("build", [vit, eva])
def test_a_model_may_change_its_size_after_a_method_was_put_in(build):
    model = tokbench.apply(build(), "mstm", 7)
    model.set_input_size((40, 24))
    assert model(torch.rand(2, 3, 40, 24)).isfinite().all()
    assert tokbench.tokens_per_block(model) == [54, 47, 40, 33]


@pytest.mark.parametrize("build", [vit, eva])
def test_gradient_checkpointing_is_refused_in_a_line(build):
    model = tokbench.apply(build(), "tome", 3)
    model.set_grad_checkpointing()
    with pytest.raises(tokbench.UserError, match="set_grad_checkpointing\\(False\\)"):
        model(torch.rand(1, 3, 32, 32))


@pytest.mark.parametrize("build", [vit, eva])
def test_intermediate_features_have_the_tokens_that_each_block_leaves_and_no_grid(build):
    model = tokbench.apply(build(), "tome", 3)
    images = torch.rand(2, 3, 32, 32)
    for ask in ({}, {"output_fmt": "NCHW"}):
        with pytest.raises(tokbench.UserError, match="ask for output_fmt='NLC'"):
            model.forward_intermediates(images, **ask)
    with pytest.raises(tokbench.UserError, match="get_intermediate_layers: .* forward_intermediates"):
        model.get_intermediate_layers(images, 2)
    final, features = model.forward_intermediates(images, None, False, False, False, "NLC")
    assert [f.shape[1] + model.num_prefix_tokens for f in features] == tokbench.tokens_per_block(model)
    torch.testing.assert_close(final, model.forward_features(images))


# torch.compile


@pytest.fixture
def compilations():
    """How many graphs a backend, that only counts, was given; torch takes two of one code object, usually eight."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch._dynamo.config.patch(recompile_limit=2):
        yield backend, graphs
    torch._dynamo.reset()


def test_any_number_of_cells_are_compiled_in_one_process_each_once(compilations):
    backend, graphs = compilations
    base, x = vit(depth=1), torch.rand(2, 3, 32, 32)
    cells = [base, *(tokbench.apply(tokbench.fork(base), method, r) for method in ("tome", "topk") for r in (0, 5))]
    with torch.inference_mode():
        for number, cell in enumerate(cells, start=1):  # more of each class than torch's limit
            expected = cell(x)
            compile_model(cell, backend=backend)
            for _ in range(3):
                torch.testing.assert_close(cell(x), expected)
            assert len(graphs) == number
        for cell in cells:
            cell(x)
    assert len(graphs) == len(cells)


def test_plain_compile_would_leave_cells_beyond_the_limit_uncompiled(compilations):
    """Why `compile_model` is there: should torch mend this, it can go."""
    backend, graphs = compilations
    base, x = vit(depth=1), torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        for r in range(4):
            torch.compile(tokbench.apply(tokbench.fork(base), "topk", r), backend=backend, dynamic=False)(x)
    assert len(graphs) == torch._dynamo.config.recompile_limit < 4


def test_a_compiled_cell_is_measured_copied_and_cleared_like_any_other(compilations):
    backend, graphs = compilations
    model = tokbench.apply(vit(depth=2), "tome", 5)
    with torch.inference_mode():
        x = torch.rand(2, 3, 32, 32)
        expected = compile_model(model, backend=backend)(x)
        assert tokbench.tokens_per_block(model) == [60, 55]
        (timed,) = tokbench.measure_speed({"cell": model}, batch_size=2, rounds=5, seconds=0.1)
        assert timed.throughput > 0 and len(graphs) == 1
        assert tokbench.count_flops(model).total == tokbench.count_flops(tokbench.fork(model)).total
        torch.testing.assert_close(tokbench.fork(model)(x), expected)
        torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), expected)
        assert len(graphs) == 1
        unreduced = tokbench.remove(tokbench.fork(model))(x)
        torch.testing.assert_close(tokbench.remove(model)(x), unreduced)


@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")) or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="needs a C++ compiler and Python's headers (Debian: g++, python3-dev); not both are here",
)
def test_inductor_gives_what_eager_gives():
    model, x = tokbench.apply(vit(depth=1), "tome", 5), torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        expected = model(x)
        torch.testing.assert_close(compile_model(model)(x), expected, rtol=1e-4, atol=1e-5)
