"""Properties of every method's plans, and of what a whole model makes of them, for drawn shapes and schedules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

import tokbench
from tokbench.fusion.core import METHODS, State, View, make_method, merge
from tokbench.fusion.patch import tokens_per_image

MODES = [(bidirectional, ahead) for bidirectional in (True, False) for ahead in ("approximate", "precise", "off")]
EVERY = {name: (name, {}) for name in METHODS} | {
    f"mctf {ahead}{'' if bidirectional else ', one way'}": (
        "mctf",
        {"bidirectional": bidirectional, "one_step_ahead": ahead},
    )
    for bidirectional, ahead in MODES
}
EVERY |= {"tofu prunes": ("tofu", {"prune_blocks": 3}), "tofu merges": ("tofu", {"prune_blocks": 0})}
EVERY |= {"diffrate merges": ("diffrate", {"prune": 0.0}), "ppt merges": ("ppt", {"tau": 1.0})}
EVERY |= {"gtp sparse": ("gtp", {"sparsity": 0.6, "graph": "semantic", "neighbors": 2})}
EVERY |= {"ats released": ("ats", {"form": "released"}), "atc single": ("atc", {"linkage": "single"})}
MERGE = ("tome", "mctf", "mstm", "pitome", "atc", "cgsm", "dpcknn")  # into weighted means, and drop nothing
CONSERVE = [name for name, (method, _) in EVERY.items() if method in MERGE]
PREFIXES = {
    0: {"class_token": False, "global_pool": "avg"}, 1: {}, 2: {"reg_tokens": 1, "global_pool": "avg"},
    3: {"reg_tokens": 2}, 4: {"class_token": False, "reg_tokens": 4, "global_pool": "avg"}, 5: {"reg_tokens": 4},
}  # fmt: skip


@st.composite
def situations(draw, name):
    """A method, a block's view of drawn tokens in which earlier blocks merged some, and how many are to go."""
    method = make_method(EVERY[name][0], **EVERY[name][1])
    prefix, rows, columns = draw(st.integers(0, 5)), draw(st.integers(2, 5)), draw(st.integers(2, 5))
    merged = draw(st.integers(0, rows * columns - 2))
    patches = rows * columns - merged
    limit = min(method.limit(patches, prefix), patches - 1)
    r = draw(st.integers(1, limit)) if limit > 0 else 0
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    tokens, kind = prefix + patches, {"dtype": torch.float64, "generator": generator}
    where = torch.stack([torch.cat([  # every token owns a cell, the other cells are anyone's
        torch.arange(tokens), torch.randint(prefix, tokens, (merged,), generator=generator)
    ]) for _ in range(2)])  # fmt: skip
    size = torch.stack([torch.bincount(row, minlength=tokens) for row in where]).double()
    if method.name == "gtp":  # in which no cell is another token's
        where[:, tokens:] = -1
    q, k, v = torch.randn(3, 2, 3, tokens, 4, **kind)
    sized = method.tracks_size and merged > 0
    view = View(
        x=torch.randn(2, tokens, 6, **kind), prefix=prefix, patches=patches, block=draw(st.integers(1, 3)), depth=4,
        heads=lambda: (q, k), values=lambda: v, scale=0.5,
        has_class_token=prefix > 0 and draw(st.booleans()), grid=(rows, columns), size=size if sized else None,
        log_size=size.log() if sized and method.proportional else None, token_map=where, nominal=patches,
        begun=method.begin(torch.randn(2, tokens + merged, 6, **kind), prefix, (rows, columns)),
    )  # fmt: skip
    return method, view, r


@pytest.mark.parametrize("name", EVERY)
def test_a_plan_names_every_token_once_and_keeps_what_it_should(name):
    @settings(max_examples=15)
    @given(situations(name))
    def check(situation):
        method, view, r = situation
        if r == 0:
            return
        plan, tokens, prefix = method.plan(view, r), view.x.shape[1], view.prefix
        size = view.size if view.size is not None else torch.ones(2, tokens, dtype=torch.float64)
        weight = plan.weight if plan.weight is not None else size
        merged, total = merge(view.x, plan, view.size), plan.total(size)
        plan.require_valid(view)
        left = [tokens - r + (EVERY[name][0] == "evit")] * 2 if plan.count is None else plan.count.tolist()
        assert merged.shape == (2, max(left), 6) and torch.equal(merged[:, :prefix], view.x[:, :prefix])
        assert prefix < min(left) and (max(left) <= tokens - r or method.name in ("evit", "ats"))
        for image, target in enumerate(plan.target(tokens).tolist()):
            kept = plan.kept[image, : left[image]].tolist()
            assert kept[:prefix] == target[:prefix] == list(range(prefix))
            assert [target[one] for one in kept] == list(range(left[image]))
            if plan.mix is not None or plan.mass is not None:
                continue
            if plan.source is None:
                assert {one for one in range(tokens) if target[one] != -1} == {*kept}
                assert total[image, : left[image]].tolist() == size[image, kept].tolist()
            else:
                assert -1 not in target and total[image].sum() == size[image].sum()
            if name in CONSERVE:
                assert plan.combine == "mean"
                after, before = plan.total(weight)[image] @ merged[image], weight[image] @ view.x[image]
                torch.testing.assert_close(after, before, rtol=0, atol=1e-10)

    check()


def vit(prefix: int) -> VisionTransformer:
    model = VisionTransformer(
        img_size=20, patch_size=4, embed_dim=12, depth=3, num_heads=3, num_classes=5, **PREFIXES[prefix]
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double()


@pytest.mark.parametrize("name", EVERY)
def test_a_model_is_the_composition_of_its_plans_for_each_image_alone(name):
    models = {prefix: vit(prefix) for prefix in PREFIXES}

    @settings(max_examples=6)
    @given(
        st.sampled_from(list(PREFIXES)), st.lists(st.integers(0, 9), min_size=3, max_size=3),
        st.permutations(range(3)), st.integers(1, 2), st.integers(0, 99),
    )  # fmt: skip
    def check(prefix, removals, order, cut, seed):
        model, (method, params) = models[prefix], EVERY[name]
        x = torch.randn(3, 3, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        tokbench.apply(model, method, f"list:{','.join(map(str, removals))}", trace=True, **params)
        moves, carry_out = [], State.carry_out

        def spy(state, plan, x, *rest):
            moves.append(plan.target(x.shape[1]).tolist())
            return carry_out(state, plan, x, *rest)

        with pytest.MonkeyPatch.context() as patched, torch.inference_mode():
            patched.setattr(State, "carry_out", spy)
            out = model(x)
        where, size = tokbench.token_map(model), model.fusion.state.size
        left = tokens_per_image(model)[-1]
        composed = [list(range(25 + prefix)) for _ in range(3)]
        for image, now in enumerate(composed):
            for move in moves:
                now[:] = [-1 if token == -1 else move[image][token] for token in now]
        assert where.tolist() == composed
        for row, count in zip(composed, left if len(left) > 1 else left * 3, strict=True):
            assert {*row} - {-1} == set(range(count))
        if method in (*MERGE, "kmedoids") or name == "tofu merges":
            assert all(-1 not in row for row in composed)
            if size is not None:
                assert torch.equal(size[:, prefix:].sum(1), torch.full((3,), 25.0, dtype=torch.float64))
                assert size.tolist() == [[row.count(token) for token in range(left[0])] for row in composed]
        with torch.inference_mode():
            torch.testing.assert_close(model(x[list(order)]), out[list(order)], rtol=0, atol=1e-10)
            torch.testing.assert_close(torch.cat([model(x[:cut]), model(x[cut:])]), out, rtol=0, atol=1e-10)

    check()
