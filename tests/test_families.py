"""T2T-ViT and LV-ViT against their authors' code; BEiT and NaFlexViT; what wraps qkv; and images of any size."""

from __future__ import annotations

import copy
import json
import pickle
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from kinds import ONE_OF_EACH
from safetensors.torch import load_file
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, batch_patchify
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.utils import parametrize

import tokbench
from tokbench.fusion.core import METHODS
from tokbench.measure._model import resolve_input_size
from tokbench.models import load_model, lvvit, model_names, t2t

GOLDEN = Path(__file__).parent / "golden" / "families"
SPEC = json.loads((GOLDEN / "cases.json").read_text())
NAMES = {"lvvit": "lvvit_s", "t2t": "t2t_vit_14", "t2t_t": "t2t_vit_t_14"}
CASES = [
    (family, name) for family, spec in SPEC.items() for name, case in spec["cases"].items() if case["method"] in METHODS
]
TINY = dict(img_size=32, patch_size=4, embed_dim=24, depth=4, num_heads=3, num_classes=10)


@cache
def build(family: str) -> VisionTransformer:
    """The model of a golden file by load_model's own way: built by timm, its authors' names converted."""
    arguments = {k: v for k, v in SPEC[family]["args"].items() if k not in ("tokens_type", "p_emb", "skip_lam")}
    model = timm.create_model(NAMES[family], **arguments).double().eval()
    convert = (lvvit if family == "lvvit" else t2t).checkpoint_filter_fn
    model.load_state_dict(convert(load_file(GOLDEN / f"{family}.weights.safetensors"), model))
    return model


def tiny(kind=VisionTransformer, **changes):
    model = kind(**(TINY | changes)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def test_the_cases_are_of_three_models():
    assert {family for family, _ in CASES} == set(NAMES) and len(CASES) >= 15


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_method_equals_its_reference(family, name):
    model, expected = tokbench.fork(build(family)), load_file(GOLDEN / f"{family}.expected.safetensors")
    case, images = SPEC[family]["cases"][name], expected["images"].double()
    with torch.inference_mode():
        baseline = model(images)
        torch.testing.assert_close(baseline, expected["baseline"], rtol=0, atol=1e-9)
        params = {key: tuple(value) if isinstance(value, list) else value for key, value in case["params"].items()}
        tokbench.apply(model, case["method"], case["schedule"], trace=True, **params)
        torch.testing.assert_close(model(images), expected[name], rtol=0, atol=1e-9)
        if not isinstance(case["tokens_after_block"][0], list):  # that is a count for each image
            assert tokbench.tokens_per_block(model) == case["tokens_after_block"]
        if f"{name}/trace" in expected:
            assert torch.equal(tokbench.token_map(model), expected[f"{name}/trace"].long())
        assert type(tokbench.remove(model)) is VisionTransformer
        assert torch.equal(model(images), baseline)


# GFLOPs, parameters in millions, and GFLOPs of the stem, without norms: counted from the authors' code.
PUBLISHED = {
    "t2t_vit_7": (1.15, 4.31, 0.28),
    "t2t_vit_14": (4.78, 21.55, 0.30),
    "t2t_vit_t_14": (6.09, 21.54, 1.60),
    "lvvit_t": (2.87, 8.53, 1.24),
    "lvvit_s": (6.55, 26.15, 1.35),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_flops_and_parameters_are_the_published_ones(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    counted = tokbench.count_flops(model.to_empty(device="cpu"))
    gflops, millions, stem = PUBLISHED[name]
    assert counted.unsupported == {}
    assert round((counted.total - counted.by_operator["layer_norm"]) / 1e9, 2) == pytest.approx(gflops, abs=0.011)
    assert counted.by_module["patch_embed"] / 1e9 == pytest.approx(stem, abs=0.02)
    constants = sum(tensor.numel() for key, tensor in model.named_parameters() if key.endswith("gamma"))
    assert (sum(map(torch.numel, model.parameters())) - constants) / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize("name", ["t2t_vit_7", "lvvit_t"])
def test_the_authors_checkpoints_load_by_name(name, tmp_path):
    """Averaged weights, of 7 classes, under the prefix of DDP, at the size they were trained for."""
    model = timm.create_model(name, num_classes=7, img_size=64)
    names = {"patch_embed.": "tokens_to_token."} if name.startswith("t2t") else {"head.aux.": "aux_head."}
    (ours, theirs), *_ = names.items()
    state = {key.replace(ours, theirs): tensor for key, tensor in model.state_dict().items() if "gamma" not in key}
    wrapped = {f"module.{key}": tensor for key, tensor in state.items()}
    torch.save({"state_dict": {"x": torch.zeros(1)}, "state_dict_ema": wrapped}, tmp_path / "authors.pth.tar")
    loaded = load_model(name, tmp_path / "authors.pth.tar", input_size=64)
    assert loaded.num_classes == 7 and loaded.pretrained_cfg["input_size"] == (3, 64, 64)
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(loaded(x), model.eval()(x))
    with pytest.raises(tokbench.UserError, match="Its positions look like those of input_size 64"):
        load_model(name, tmp_path / "authors.pth.tar")


def test_families_are_listed_and_ask_for_their_checkpoint():
    assert {"t2t_vit_14", "lvvit_s"} <= set(model_names())
    assert "t2t_vit_t_24" in model_names("t2t") and "bundled" not in model_names("t2t")
    with pytest.raises(tokbench.UserError, match="no pretrained weights for model 'lvvit_m'; give yours"):
        load_model("lvvit_m")


def test_the_performer_does_not_overflow_in_half_precision():
    step = t2t.PerformerStep(12)
    x = 30 * torch.randn(1, 40, 12)
    with torch.inference_mode():
        step.norm1.weight.mul_(20)
        exact = step(x)
        with torch.autocast("cpu", torch.float16):
            assert torch.nn.functional.cosine_similarity(step(x).float(), exact, dim=-1).min() > 0.99


BEITS = {
    "own bias": dict(use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.5),
    "shared bias": dict(use_shared_rel_pos_bias=True, global_pool="token"),
    "both": dict(use_rel_pos_bias=True, use_shared_rel_pos_bias=True, qkv_bias=False),
    "no bias": dict(use_abs_pos_emb=True),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", BEITS)
def test_beit_is_timms_until_something_goes_and_again_afterwards(kind, fused):
    model, x = tiny(Beit, depth=2, **BEITS[kind]), torch.rand(2, 3, 32, 32)
    for block in model.blocks:
        block.attn.fused_attn = fused
    modules, keys = [type(part) for part in model.modules()], list(model.state_dict())
    with torch.inference_mode():
        expected = model(x)
        untouched = tokbench.apply(model, "tome", 0)(x)
        assert torch.equal(untouched, expected) if kind != "both" else torch.allclose(untouched, expected, atol=1e-5)
        for method in [name for name in METHODS if kind == "both" or name in ONE_OF_EACH]:
            assert not torch.equal(tokbench.apply(model, method, 5)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), copy.deepcopy(model)(x))
        assert list(model.state_dict()) == keys
        assert torch.equal(tokbench.remove(model)(x), expected)
    assert [type(part) for part in model.modules()] == modules
    assert not any("fusion" in vars(part) for part in model.modules())


def test_beit_attends_fused_and_fused_is_what_unfused_is(monkeypatch):
    model, x, calls = tiny(Beit, **BEITS["own bias"]).double(), torch.rand(2, 3, 32, 32).double(), []
    fused = nn.functional.scaled_dot_product_attention

    def attend(*tensors, attn_mask, dropout_p):
        calls.append(attn_mask.shape)
        return fused(*tensors, attn_mask=attn_mask, dropout_p=dropout_p)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attend)
    out = tokbench.apply(model, "tome", 9)(x)
    assert calls == [(1, 3, 65, 65), (2, 3, 56, 56), (2, 3, 47, 47), (2, 3, 38, 38)]
    for block in model.blocks:
        block.attn.fused_attn = False
    torch.testing.assert_close(model(x), out, rtol=0, atol=1e-10)
    assert len(calls) == 4


def test_beit_compiles_and_refuses_gradient_checkpointing():
    model, x = tokbench.apply(tiny(Beit, depth=2, **BEITS["own bias"]), "tome", 5), torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
        torch.testing.assert_close(compiled(x), model(x))
    model.set_grad_checkpointing()
    with pytest.raises(tokbench.UserError, match="gradient checkpointing"):
        model(x)


ROPE = dict(rope_type="axial", attn_type="rope", pos_embed="none")
NAFLEX = {
    "learned": dict(global_pool="avg"),
    "factorized": dict(pos_embed="factorized", global_pool="map"),
    "rotary": dict(**ROPE, class_token=True, global_pool="token"),
    "rotary for each head": dict(ROPE, rope_type="mixed", global_pool="avg", reg_tokens=2),
}


@pytest.mark.parametrize("kind", NAFLEX)
def test_naflex_runs_on_images_and_on_patches_of_one_size(kind):
    model = tiny(NaFlexVit, embed_proj_type="linear", pos_embed_grid_size=(8, 8), **NAFLEX[kind]).double()
    x = torch.rand(2, 3, 24, 36, dtype=torch.float64)
    patches, (rows, columns) = batch_patchify(x, (4, 4))
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).flatten(0, 1)
    packed = dict(patches=patches, patch_coord=grid.expand(2, -1, -1), patch_valid=torch.ones(2, 54, dtype=torch.bool))
    with torch.inference_mode():
        expected = model(x)
        for method in METHODS:
            out = tokbench.apply(model, method, 5)(x)
            assert not torch.equal(out, expected) and model.fusion.grid == (6, 9)
            torch.testing.assert_close(model(packed), out, rtol=0, atol=1e-9)
            assert model.fusion.grid == (6, 9)
        packed["patch_valid"][1, -1] = False
        with pytest.raises(tokbench.UserError, match="mask of images of several sizes"):
            model(packed)
        other = dict(packed, patch_valid=torch.ones(2, 54, dtype=torch.bool))
        other["patch_coord"] = torch.stack([grid, grid.flip(1)])
        with pytest.raises(tokbench.UserError, match="mask of images of several sizes"):
            model(other)
        assert torch.equal(tokbench.remove(model)(x), expected)


# Places where a method looks at queries and keys: before, inside and after a block.
PLACES = [
    ("tome", {}),
    ("evit", {}),
    ("mctf", {}),
    ("mctf", {"one_step_ahead": "precise"}),
    ("mctf", {"one_step_ahead": "off"}),
]


class Lora(nn.Linear):
    """A joint projection with an adapter of low rank beside its weight."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features)
        self.weight, self.bias = base.weight, base.bias
        self.down, self.up = nn.Parameter(torch.randn(4, base.in_features)), nn.Parameter(torch.randn(72, 4) / 4)

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


def with_lora(attention, delta):
    attention.qkv = Lora(attention.qkv)
    attention.qkv.down.data, attention.qkv.up.data = delta


def with_hook(attention, delta):
    down, up = delta
    attention.qkv.register_forward_hook(lambda module, args, out: out + args[0] @ down.T @ up.T)


def with_parametrization(attention, delta):
    class Added(nn.Module):
        def forward(self, weight):
            return weight + delta[1] @ delta[0]

    parametrize.register_parametrization(attention.qkv, "weight", Added())


def with_own_forward(attention, delta):
    plain, (down, up) = attention.qkv.forward, delta
    attention.qkv.forward = lambda x: plain(x) + x @ down.T @ up.T


@pytest.mark.parametrize(("method", "params"), PLACES)
@pytest.mark.parametrize("wrap", [with_lora, with_hook, with_parametrization, with_own_forward])
def test_what_wraps_qkv_is_honoured_at_every_place(wrap, method, params):
    wrapped = tiny().double()
    merged, x = copy.deepcopy(wrapped), torch.rand(2, 3, 32, 32).double()
    for one, two in zip(wrapped.blocks, merged.blocks, strict=True):
        delta = torch.randn(4, 24).double(), torch.randn(72, 4).double() / 4
        two.attn.qkv.weight.data += delta[1] @ delta[0]
        wrap(one.attn, delta)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(x), merged(x), rtol=0, atol=1e-9)
        for model in (wrapped, merged):
            tokbench.apply(model, method, 7, **params)
        torch.testing.assert_close(wrapped(x), merged(x), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("method", "params"), PLACES)
def test_hooks_on_the_attention_run_at_every_place(method, params):
    model, x = tiny(), torch.rand(2, 3, 32, 32)
    for block in model.blocks:
        block.attn.register_forward_hook(lambda module, args, out: out * 0)
    shapes = []
    model.blocks[2].register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    silent = copy.deepcopy(model)
    for block in silent.blocks:
        nn.init.zeros_(block.attn.proj.weight)
        nn.init.zeros_(block.attn.proj.bias)
    outs = [tokbench.apply(one, method, 7, **params)(x) for one in (model, silent)]
    torch.testing.assert_close(*outs)
    assert len(shapes) == 2


@pytest.mark.parametrize("kind", [Eva, Beit])
def test_what_timm_itself_does_not_call_is_refused_by_name(kind):
    model = tiny(kind)
    tokbench.remove(tokbench.apply(model, "tome", 3))
    handle = model.blocks[1].attn.qkv.register_forward_hook(lambda module, args, out: out)
    with pytest.raises(tokbench.UnsupportedModelError, match="qkv in block 1 is a Linear with hooks, which timm's"):
        tokbench.apply(model, "tome", 3)
    handle.remove()
    model.blocks[2].attn.qkv = Lora(model.blocks[2].attn.qkv)
    with pytest.raises(tokbench.UnsupportedModelError, match="qkv in block 2 is a Lora"):
        tokbench.apply(model, "mctf", 3)


def test_counting_flops_does_not_mistake_its_own_hooks_for_somebodys():
    """Queries and keys of all tokens, values of those that are left: qkv is called for neither, nor counted whole."""
    model = tokbench.apply(tiny(), "mctf", "list:0,7")
    ahead, block = 65 * 24 * 48 + 58 * 24 * 24, tokbench.count_flops(model).by_module["blocks.1.attn.proj"]
    assert block == 58 * 24 * 24
    plain = tokbench.count_flops(model).total
    model.blocks[1].attn.qkv.register_forward_hook(lambda module, args, out: None)
    assert tokbench.count_flops(model).total - plain == (65 + 58) * 24 * 72 - ahead


@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "vitamin_small_224"])
@pytest.mark.parametrize("changes", [{}, {"img_size": 64, "in_chans": 1}])
def test_size_and_channels_are_those_of_the_image(name, changes):
    """Of hybrids, whose projection takes a CNN's features, at their published size and at another."""
    with torch.device("meta"):
        model = timm.create_model(name, **changes)
    side = changes.get("img_size", 224)
    assert resolve_input_size(model, None) == (changes.get("in_chans", 3), side, side)
    assert resolve_input_size(model, 96) == (changes.get("in_chans", 3), 96, 96)


def test_a_hybrid_is_counted_and_reduced():
    model = timm.create_model("vit_tiny_r_s16_p8_224", img_size=64, depth=2).eval()
    whole = tokbench.count_flops(model).total
    assert whole == tokbench.count_flops(model, (3, 64, 64)).total
    tokbench.apply(model, "tome", 1)
    model(torch.rand(1, 3, 64, 64))
    assert tokbench.tokens_per_block(model) == [4, 3] and tokbench.count_flops(model).total < whole


@pytest.mark.parametrize("kind", ["vit", "naflex"])
def test_unreduced_models_of_any_size_tell_what_they_last_saw(kind):
    model = tiny(dynamic_img_size=True) if kind == "vit" else tiny(NaFlexVit, global_pool="avg", class_token=True)
    with pytest.raises(tokbench.UserError, match="no forward pass has been seen"):
        tokbench.tokens_per_block(model)
    before = model(torch.rand(1, 3, 48, 32))
    tokbench.apply(model, "none")
    for side in (48, 32):
        assert model(torch.rand(1, 3, side, 48)).shape == before.shape
        assert tokbench.tokens_per_block(model) == [side // 4 * 12 + 1] * 4
    tokbench.remove(model)
    assert not any(part._forward_hooks for part in model.modules())
    assert tokbench.tokens_per_block(tiny()) == [65] * 4


def test_flops_schedules_hold_for_the_size_that_is_given():
    model = tiny(dynamic_img_size=True)
    shares = {}
    for size in (32, 64):
        whole = tokbench.count_flops(tokbench.remove(model), size).total
        tokbench.apply(model, "tome", "flops:0.7", input_size=size)
        shares[size] = tokbench.count_flops(model, size).total / whole
        schedule = model.fusion.schedule.values
        assert sum(schedule) > 100 if size == 64 else sum(schedule) < 60
    assert all(abs(share - 0.7) < 0.01 for share in shares.values())
    with pytest.raises(tokbench.UserError, match="takes images of 32×32 pixels, not 64×64"):
        tokbench.apply(tiny(), "tome", "flops:0.7", input_size=64)
