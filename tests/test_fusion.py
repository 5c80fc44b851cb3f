"""What holds for every method, on every kind of timm ViT."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import ONE_OF_EACH, slowly
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelThingsBlock, ResPostBlock, VisionTransformer

import tokbench
from tokbench.fusion.core import Assignment, attend_merged, attend_reduced, bipartite_match, merge, pick, wide
from tokbench.fusion.patch import tokens_per_image

METHODS = [name for name in tokbench.list_methods() if name != "none"]
GONE = {"evit": [4, 8, 12, 16], "mctf": [0, 5, 10, 15]}  # of 5 a block: EViT adds one back, MCTF skips block 0
TINY = dict(img_size=32, patch_size=4, embed_dim=24, depth=4, num_heads=3, num_classes=10)
VARIANTS = {
    "plain": dict(),
    "no class token": dict(class_token=False, global_pool="avg"),
    "average pooling": dict(global_pool="avg"),
    "average and maximum": dict(global_pool="avgmax"),
    "maximum pooling": dict(global_pool="max"),
    "attention pooling": dict(class_token=False, global_pool="map"),
    "registers": dict(reg_tokens=3, no_embed_class=True),
    "layer scale and q/k norm": dict(init_values=0.1, qk_norm=True),
    "pre-norm": dict(pre_norm=True),
    "post-norm blocks": dict(block_fn=ResPostBlock),
    "rectangular": dict(img_size=(24, 36)),
}


def tiny(**changes) -> VisionTransformer:
    model = VisionTransformer(**(TINY | changes)).eval()
    for parameter in model.parameters():  # timm's initial weights are so small that all tokens look alike
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def images(model, batch: int = 3, **kind) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=generator).to(**kind)


@pytest.mark.parametrize(
    ("method", "variant"),
    [
        pytest.param(method, variant, marks=() if method in ONE_OF_EACH or variant == "plain" else pytest.mark.slow)
        for method in METHODS
        for variant in VARIANTS
    ],
)
def test_runs_on_every_kind_of_vit_and_leaves_no_trace(method, variant):
    model = tiny(**VARIANTS[variant])
    x = images(model)
    before, state = model(x), copy.deepcopy(model.state_dict())
    tokbench.apply(model, method, 5)
    out = model(x)
    assert out.shape == before.shape and not torch.equal(out, before)
    first = model.patch_embed.num_patches + model.num_prefix_tokens
    most = [first - count for count in GONE.get(method, [5, 10, 15, 20])]
    left = tokbench.tokens_per_block(model)
    if method == "ats":  # in each image others
        assert all(1 < here <= limit for here, limit in zip(left, most, strict=True))
    else:
        assert left == most
    assert list(model.state_dict()) == list(state)
    tokbench.remove(model)
    assert type(model) is VisionTransformer and torch.equal(model(x), before)
    assert not any(module._forward_hooks for module in model.modules())
    assert vars(model).keys() == vars(tiny(**VARIANTS[variant])).keys()


@pytest.mark.parametrize("method", METHODS)
def test_distilled_model_keeps_both_prefix_tokens(method):
    model = VisionTransformerDistilled(**TINY).eval()
    x = images(model)
    before = model(x)
    tokbench.apply(model, method, 6, trace=True)
    model(x)
    assert torch.equal(tokbench.token_map(model)[:, :2], torch.tensor([[0, 1]] * 3))
    assert torch.equal(tokbench.remove(model)(x), before)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_remove_is_the_unreduced_model_bit_for_bit(method):
    model = tiny()
    x = images(model)
    before = model(x)
    assert torch.equal(tokbench.apply(model, method, 0)(x), before)


@pytest.mark.parametrize("method", METHODS)
def test_applying_again_replaces_the_method(method):
    model = tiny()
    x = images(model)
    expected = tokbench.apply(tiny_copy := copy.deepcopy(model), method, "keep:0.5@1")(x)
    tokbench.apply(tokbench.apply(model, "random", 9), method, "keep:0.5@1")
    assert torch.equal(model(x), expected)
    assert tokbench.tokens_per_block(model) == tokbench.tokens_per_block(tiny_copy)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), tokbench.fork])
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_is_a_model_of_its_own(method, copied):
    model = tokbench.apply(tiny(), method, 5)
    x = images(model)
    expected = model(x)
    other = copied(model)
    assert torch.equal(other(x), expected)
    tokbench.remove(other)
    assert torch.equal(model(x), expected)


def test_fork_shares_every_parameter():
    model = tiny()
    for ours, theirs in zip(model.parameters(), tokbench.fork(model).parameters(), strict=True):
        assert ours is theirs


@pytest.mark.parametrize("method", METHODS)
def test_an_image_does_not_depend_on_its_batch(method):
    model = tokbench.apply(tiny().double(), method, 5)
    x = images(model, 4, dtype=torch.float64)
    together = model(x)
    torch.testing.assert_close(torch.cat([model(one) for one in x.split(1)]), together, rtol=0, atol=1e-9)
    torch.testing.assert_close(model(x.flip(0)), together.flip(0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_large_r_leaves_a_patch_and_is_recorded(method):
    model = tokbench.apply(tiny(), method, 10_000)
    assert model(images(model)).isfinite().all()
    assert tokbench.tokens_per_block(model)[-1] >= 2


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def assert_alike(out, exact, dtype):
    """Logits of half precision: finite, of that type, and each image's in the direction of the exact ones."""
    assert out.dtype == dtype and out.isfinite().all()
    assert torch.nn.functional.cosine_similarity(out.double().cpu(), exact.double().cpu(), dim=-1).min() > 0.999


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_weights(method, dtype, device):
    model = tokbench.apply(tiny(global_pool="avg").to(device), method, 5)
    x = images(model, device=device)
    exact = model(x)
    assert_alike(model.to(dtype)(x.to(dtype)), exact, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
def test_autocast(method, device):
    model = tokbench.apply(tiny().to(device), method, 5)
    x = images(model, device=device)
    exact = model(x)
    with torch.autocast(device, torch.bfloat16):
        assert_alike(model(x), exact, torch.bfloat16)


@pytest.mark.parametrize("method", slowly(METHODS, often=("mctf", "gtp", "ats")))  # others: tests/test_modes.py
def test_compiles_without_a_graph_break(method):
    model = tokbench.apply(tiny(depth=2), method, 5)
    x = images(model)
    with torch.inference_mode():
        expected = model(x)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
        torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(compiled(x + 1), model(x + 1))


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu_it_is_what_it_is_on_the_cpu(method):
    model = tokbench.apply(tiny().double(), method, 5)
    x = images(model, dtype=torch.float64)
    expected = model(x)
    torch.testing.assert_close(model.cuda()(x.cuda()).cpu(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_no_block_holds_on_to_activations(method):
    model = tokbench.apply(tiny(), method, "keep:0.5@1,2")
    model(images(model))
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert len(hooks) == (12 if model.fusion.method.needs_values else 8)
    assert all(hook.value is None for hook in hooks) and model.fusion.state.begun is None


@pytest.mark.parametrize("method", METHODS)
def test_gradients_flow_to_the_first_layer(method):
    model = tokbench.apply(tiny(), method, 5).train()
    model(images(model)).sum().backward()
    gradient = model.patch_embed.proj.weight.grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


@pytest.mark.parametrize("method", METHODS)
def test_the_token_map_composes_and_numbers_the_final_tokens(method):
    model = tokbench.apply(tiny(), method, 7, trace=True)
    model(images(model))
    final = tokbench.token_map(model)
    last = tokens_per_image(model)[-1]
    for row, count in zip(final, last if len(last) > 1 else last * 3, strict=True):
        assert set(row.tolist()) - {-1} == set(range(count))


def test_sizes_sum_to_the_patches_and_average_pooling_weights_by_them():
    model = tiny(class_token=False, global_pool="avg").double()
    x = images(model, dtype=torch.float64)
    tokbench.apply(model, "tome", 9, trace=True)
    features = model.forward_features(x)
    size, where = model.fusion.state.size, tokbench.token_map(model)
    assert torch.equal(size.sum(1), torch.full((3,), 64.0, dtype=torch.float64))
    for image in range(3):
        members = torch.bincount(where[image], minlength=features.shape[1])
        assert torch.equal(size[image], members.double())
        mean = sum(features[image, where[image, patch]] for patch in range(64)) / 64
        torch.testing.assert_close(model.pool(features)[image], mean, rtol=0, atol=1e-12)


def test_attention_pooling_sees_a_merged_token_as_its_members():
    model = tiny(class_token=False, global_pool="map").double()
    x = images(model, dtype=torch.float64)
    tokbench.apply(model, "tome", 9, trace=True)
    features, where = model.forward_features(x), tokbench.token_map(model)
    unmerged = features.gather(1, where.unsqueeze(-1).expand(-1, -1, features.shape[-1]))
    torch.testing.assert_close(model.pool(features), model.attn_pool(unmerged), rtol=0, atol=1e-12)


@pytest.mark.parametrize("pooling", ["avgmax", "max"])
@pytest.mark.parametrize("prefix", [{}, {"class_token": False}, {"reg_tokens": 2}, {"pool_include_prefix": True}])
def test_the_maximum_is_that_of_the_members(pooling, prefix):
    model = tiny(global_pool=pooling, **prefix).double()
    x = images(model, dtype=torch.float64)
    tokbench.apply(model, "tome", 9, trace=True)
    features, where = model.forward_features(x), tokbench.token_map(model)
    members = where if prefix.get("pool_include_prefix") else where[:, model.num_prefix_tokens :]
    for image, pooled in enumerate(model.pool(features)):
        rows = torch.stack([features[image, slot] for slot in members[image]])
        largest, mean = rows.max(0).values, rows.mean(0)
        expected = largest if pooling == "max" else (largest + mean) / 2
        torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [None, "size"])
@pytest.mark.parametrize("combine", ["mean", "sum", "mlerp"])
def test_merging_has_the_gradient_of_its_definition(combine, size):
    """By finite differences, for the tokens and for the weights, be these the plan's own or the sizes."""
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(2, 7, dtype=torch.float64).add(0.5).requires_grad_()
    kept = torch.tensor([[0, 3, 1, 6], [6, 0, 2, 4]])
    source, slot = torch.tensor([[2, 5], [1, 3]]), torch.tensor([[1, 1], [0, 3]])

    def run(x, weight):
        plan = Assignment(kept, source, slot, None if size else weight, combine)
        return merge(x, plan, weight if size else None)

    assert torch.autograd.gradcheck(run, (x, weight))
    for grad in torch.autograd.grad(run(x, weight).square().sum(), (x, weight), allow_unused=True):
        assert grad is not None and grad.abs().sum() > 0


@pytest.mark.parametrize("contiguous", [True, False])
def test_picking_tokens_is_gathering_them(contiguous):
    x = torch.randn(3, 5, 7) if contiguous else torch.randn(3, 7, 5).mT
    x.requires_grad_()
    index = torch.tensor([[4, 0, 0], [1, 2, 3], [3, 4, 1]])
    picked, gathered = pick(x, index), x.gather(1, wide(index, x))
    assert torch.equal(picked, gathered)
    (ours,), (theirs,) = (torch.autograd.grad(out.square().sum(), x) for out in (picked, gathered))
    assert torch.equal(ours, theirs) and ours.abs().sum() > 0


@settings(max_examples=40)
@given(st.integers(0, 5), st.integers(2, 30), st.data())
def test_bipartite_matching_equals_its_definition(prefix, patches, data):
    r = data.draw(st.integers(1, max(1, patches // 2)))
    tokens = prefix + patches
    metric = torch.randn(2, tokens, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens * 31 + r))
    kept, source, slot = bipartite_match(metric, prefix, r)
    for image in range(2):
        a = [i for i in range(prefix, tokens) if i % 2 == 0]
        b = [i for i in range(prefix, tokens) if i % 2 == 1]
        cosine = torch.nn.functional.cosine_similarity(metric[image, :, None], metric[image, None], dim=-1)
        proposals = {i: max(b, key=lambda j, i=i: cosine[i, j].item()) for i in a}
        best = sorted(a, key=lambda i: -cosine[i, proposals[i]].item())[:r]
        assert kept[image].tolist() == [*range(prefix), *(i for i in a if i not in best), *b]
        assert source[image].tolist() == best
        assert [kept[image, s].item() for s in slot[image]] == [proposals[i] for i in best]


@settings(max_examples=30)
@given(st.integers(0, 4), st.integers(4, 24))
def test_merging_conserves_the_weighted_sum_and_leaves_others_alone(prefix, patches):
    generator = torch.Generator().manual_seed(patches)
    tokens, r = prefix + patches, patches // 2
    x = torch.randn(2, tokens, 3, dtype=torch.float64, generator=generator)
    size = torch.randint(1, 9, (2, tokens), generator=generator).double()
    plan = Assignment(*bipartite_match(torch.randn(2, tokens, 4, generator=generator), prefix, r))
    merged, sizes = merge(x, plan, size), plan.total(size)
    torch.testing.assert_close((merged * sizes[..., None]).sum(1), (x * size[..., None]).sum(1), rtol=0, atol=1e-10)
    assert torch.equal(sizes.sum(1), size.sum(1))
    assert torch.equal(merged[:, :prefix], x[:, :prefix])
    alone = torch.ones(merged.shape[:2], dtype=torch.bool).scatter(1, plan.slot, False)
    assert torch.equal(merged[alone], x.gather(1, plan.kept[..., None].expand(-1, -1, 3))[alone])


@settings(max_examples=40)
@given(st.integers(0, 3), st.integers(2, 20), st.sampled_from(["mean", "sum", "mlerp"]), st.booleans(), st.data())
def test_attending_after_a_merge_is_attending_with_the_reduced_matrix(prefix, patches, combine, drops, data):
    r = data.draw(st.integers(1, patches // 2))
    generator = torch.Generator().manual_seed(patches * 31 + r)
    tokens, heads = prefix + patches, data.draw(st.integers(1, 3))
    kept, source, slot = bipartite_match(torch.randn(2, tokens, 4, generator=generator), prefix, r)
    plan = Assignment(kept, *((None, None) if drops else (source, slot)), combine=combine)
    size = torch.randint(1, 9, (2, tokens), generator=generator).double()
    attention = torch.randn(2, heads, tokens, tokens, dtype=torch.float64, generator=generator).softmax(-1)
    values = torch.randn(2, heads, kept.shape[1], 4, dtype=torch.float64, generator=generator)
    expected = attend_reduced(attention, plan, size, values)
    torch.testing.assert_close(attend_merged(attention, plan, size, values), expected, rtol=0, atol=1e-12)


def test_random_draws_differ_by_seed_and_block_but_not_by_image():
    def kept(**params):
        model = tokbench.apply(tiny(), "random", 10, trace=True, **params)
        model(images(model))
        return tokbench.token_map(model)

    assert torch.equal(kept(), kept(seed=0)) and not torch.equal(kept(), kept(seed=1))
    assert (kept() == kept()[0]).all()


def test_topk_without_a_class_token_keeps_the_most_attended():
    model = tiny(class_token=False, global_pool="avg").double()
    x = images(model, dtype=torch.float64)
    tokens = model.patch_embed(x) + model.pos_embed
    attention, normed = model.blocks[0].attn, model.blocks[0].norm1(tokens)
    received = []
    for image in normed:
        q, k, _ = attention.qkv(image).reshape(64, 3, 3, 8).permute(1, 2, 0, 3)
        rows = [(q[h] @ k[h].T / 8**0.5).softmax(-1) for h in range(3)]
        received.append(sum(row.mean(0) for row in rows) / 3)
    tokbench.apply(model, "topk", "keep:0.25@0", trace=True)
    model(x)
    for image, where in enumerate(tokbench.token_map(model)):
        best = received[image].argsort(descending=True)[:16]
        assert torch.equal(where[best], torch.arange(16))


@pytest.mark.parametrize(
    ("method", "goal"),
    [("tome", 0.8), ("kmedoids", 0.8), ("mctf", 0.6), ("evit", 0.6), ("ats", 0.6)],
)
def test_flops_schedule_comes_as_near_as_whole_tokens_allow(method, goal):
    model = tiny(img_size=48)
    whole = tokbench.count_flops(model).total
    some = images(model, 2) if method == "ats" else None  # whose FLOPs depend on them
    tokbench.apply(model, method, f"flops:{goal}", images=some)
    assert abs(tokbench.count_flops(model, images=some).total / whole - goal) < 0.01


def test_wrong_names_are_answered_with_the_nearest_right_one():
    model = tiny()
    for arguments, params, words in [
        (("tomme", 5), {}, "Did you mean 'tome'"),
        (("tome", 5), {"prop_atn": True}, "Did you mean 'prop_attn'"),
        (("tome", 5), {"prop_attn": "yes"}, "prop_attn='yes'"),
        (("random", 5), {"seed": 0.5}, "seed=0.5"),
        (("none", 5), {"seed": 1}, "seed"),
        (("mctf", 5), {"one_step_ahead": "fast"}, "one_step_ahead='fast'"),
        (("mctf", 5), {"tau_sim": 0.0}, "tau_sim=0.0"),
        (("mstm", 5), {"scales": [2, 0]}, "scales=\\(2, 0\\)"),
        (("atc", 5), {"linkage": "ward"}, "average, single or complete"),
        (("gtp", 5), {"sparsity": 0.0}, "sparsity is a share above 0"),
        (("dpcknn", 5), {"neighbors": 0}, "a whole number, 1 or more"),
        (("diffrate", 5), {"prune": [1, -1]}, "a list of tokens by block"),
        (("ats", "flops:0.5"), {}, "FLOPs depend on the image"),
        (("tofu", 5), {"prune_blocks": "half"}, "prune_blocks='half'"),
        (("topk", "keep:0.5@9"), {}, "blocks are 0 to 3"),
    ]:
        with pytest.raises(tokbench.UserError, match=words):
            tokbench.apply(model, *arguments, **params)


def test_other_models_are_refused_with_what_was_found():
    import timm

    for model, words in [
        (timm.create_model("resnet18"), "ResNet is not a plain ViT"),
        (VisionTransformer(**TINY, block_fn=ParallelThingsBlock), "block 0 is a ParallelThingsBlock"),
        (VisionTransformer(**TINY, attn_layer="diff"), "DiffAttention"),
        (VisionTransformer(**TINY, patch_drop_rate=0.5), "patch_drop_rate"),
    ]:
        with pytest.raises(tokbench.UnsupportedModelError, match=words):
            tokbench.apply(model, "tome", 3)


def test_asking_too_early_is_answered():
    model = tokbench.apply(tiny(), "tome", 3)
    with pytest.raises(tokbench.UserError, match="no forward pass"):
        tokbench.tokens_per_block(model)
    with pytest.raises(tokbench.UserError, match="trace=True"):
        tokbench.token_map(model)


def test_free_slices_and_keeps_the_first_tokens():
    model, x = tiny(), torch.rand(2, 3, 32, 32)
    tokbench.apply(model, "free", "list:0,10,20", trace=True)
    model(x)
    start = model.num_prefix_tokens
    assert tokbench.tokens_per_block(model) == [64 + start, 54 + start, 34 + start, 34 + start]
    expected = torch.cat([torch.arange(34 + start), torch.full((30,), -1)])
    assert torch.equal(tokbench.token_map(model), expected.expand(2, -1))


@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_free_does_the_work_of_a_model_on_the_first_tokens(place):
    model, x = tiny().double(), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    first, second = model.blocks[0], model.blocks[1:]
    with torch.no_grad():
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        keep = tokens.shape[1] - 20
        tokens = tokens[:, :keep] if place == "start" else tokens
        tokens = tokens + first.ls1(first.attn(first.norm1(tokens)))
        tokens = tokens[:, :keep] if place == "middle" else tokens
        tokens = tokens + first.ls2(first.mlp(first.norm2(tokens)))
        expected = model.forward_head(model.norm(second(tokens[:, :keep])))
        tokbench.apply(model, "free", "list:20", place=place)
        assert torch.allclose(model(x), expected, atol=1e-12)


def test_tofu_prunes_where_the_mlp_is_least_linear():
    """The criterion per image and pair, in plain loops; block 2's MLP is made linear, and so must be merged in."""
    model, x = tiny().double(), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    model.blocks[2].mlp.act = torch.nn.Identity()
    model.blocks[2].norm2 = torch.nn.Identity()
    prefix, errors, inputs, keys = model.num_prefix_tokens, [], [], []
    for block in model.blocks:
        block.norm2.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
        block.attn.k_norm.register_forward_hook(lambda module, args, out: keys.append(out))
    with torch.no_grad():
        model(x)
        seen, heads = list(inputs), list(keys)
        for block, stream, key in zip(model.blocks, seen, heads, strict=True):
            parts = []
            for image in range(2):
                metric = torch.nn.functional.normalize(key[image].mean(0), dim=-1)
                a = [token for token in range(prefix, len(metric)) if token % 2 == 0]
                b = [token for token in range(prefix, len(metric)) if token % 2 == 1]
                pairs = [(i, max(b, key=lambda j: float(metric[i] @ metric[j]))) for i in a]
                pairs.sort(key=lambda pair: -float(metric[pair[0]] @ metric[pair[1]]))
                for i, j in pairs[:5]:
                    f = lambda token: block.ls2(block.mlp(block.norm2(token)))  # noqa: B023, E731
                    mean = (f(stream[image, i]) + f(stream[image, j])) / 2
                    parts.append((f((stream[image, i] + stream[image, j]) / 2) - mean).norm() / mean.norm())
            errors.append(float(torch.stack(parts).mean()))
    tokbench.apply(model, "tofu", 5, prune_blocks="auto", images=x)
    with_flops = tokbench.apply(tokbench.fork(model), "tofu", "flops:0.8", prune_blocks="auto", images=x)
    shares = {
        tokbench.count_flops(tokbench.apply(tokbench.fork(model), "tofu", 5, prune_blocks=n)).total for n in (0, 4)
    }
    assert len(with_flops.fusion.method.prune_blocks) == 2 and len(shares) == 1
    limit = sorted(errors)[1:3]
    expected = tuple(block for block, error in enumerate(errors) if error > sum(limit) / 2)
    assert model.fusion.method.prune_blocks == expected
    assert len(expected) == 2 and 2 not in expected


def test_calibration_images_are_asked_for_and_refused():
    model, x = tiny(), torch.rand(2, 3, 32, 32)
    with pytest.raises(tokbench.UserError, match="images=…"):
        tokbench.apply(model, "tofu", 5, prune_blocks="auto")
    for method, params in [("tome", {}), ("tofu", {"prune_blocks": 2})]:
        with pytest.raises(tokbench.UserError, match="takes no images"):
            tokbench.apply(model, method, 5, images=x, **params)
