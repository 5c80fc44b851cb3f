"""Which of timm's Vision Transformers the methods work on: a table, made by trying.

`python benchmarks/coverage.py [FILE]` builds every architecture of timm's ViT modules, and of tokbench's own, without
weights, groups those of equal structure, builds one of each small, runs every method in it, and writes what came out
(default: to the screen).
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
import timm.models
import torch
from timm.layers import weight_init
from timm.layers.patch_embed import PatchEmbed
from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaBlock
from timm.models.naflexvit import NaFlexEmbeds
from timm.models.vision_transformer import Block
from torch import nn

from tokbench.errors import UserError
from tokbench.fusion.anatomy import has_class_token, stem, takes_any_size
from tokbench.fusion.patch import REDUCED_MODELS, UnsupportedModelError, remove, tokens_per_block
from tokbench.measure._model import resolve_input_size
from tokbench.models import VIT_MODULES
from tokbench.models.converted import CONVERTED
from tokbench.models.stems import Stem
from tokbench.resolve import apply, list_methods

Structure = tuple[str, ...]
SIDE = 6  # patches along each side of a small model's image
DEPTH = 4
SHAPE_DEPTH = 1


def architectures() -> list[str]:
    """Names of all architectures in timm's ViT modules, with or without published weights."""
    return [name for name in timm.list_models() if timm.models.is_model_in_modules(name, VIT_MODULES)]


def structures() -> dict[Structure, list[str]]:
    """timm's ViT architectures by what is structurally alike for a fusion method, smallest width first."""
    groups: dict[Structure, list[tuple[int, str]]] = defaultdict(list)
    for name in architectures():
        model = build_shape(name)
        groups[describe(model)].append((model.embed_dim, name))
    return {structure: [name for _, name in sorted(members)] for structure, members in groups.items()}


def build_shape(name: str) -> Any:
    """An architecture on the meta device, cut to one block where its blocks are alike."""
    # Drawing weights takes most of the time, even where there is nothing to draw.
    with torch.device("meta"), patch.object(weight_init, "_trunc_normal_", lambda tensor, *_: tensor):
        try:
            return timm.create_model(name, depth=SHAPE_DEPTH)
        except AssertionError:  # the number of key heads is given block by block
            return timm.create_model(name)


def build_small(name: str, **options: Any) -> nn.Module:
    """An architecture in eval mode with all its parts, but few and narrow blocks and a small image; weights random.

    Weights are of ordinary size, unlike timm's fresh ones, which hardly let one token differ from the next.
    """
    shape = build_shape(name)
    options = dict(depth=DEPTH, img_size=SIDE * stem(shape).feat_ratio(), num_classes=7) | options
    if isinstance(stem(shape), PatchEmbed | NaFlexEmbeds | Stem):
        options = dict(embed_dim=96, num_heads=4) | options
    if len(shape.blocks) > SHAPE_DEPTH:
        options["num_kv_heads"] = (4, 2, 2, 4) if _shares_keys(shape) else (4,) * DEPTH
    model: nn.Module = timm.create_model(name, **options)
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if part.startswith(("patch_embed.", "embeds.", "rope.")):
                continue
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            else:
                nn.init.uniform_(parameter, 0.3, 1.0)
    return model.eval()


def describe(model: Any) -> Structure:
    """What of a model matters to token fusion, in words; models that are described alike are built alike."""
    block = model.blocks[-1]
    further = model.num_prefix_tokens - has_class_token(model)
    kind = "distillation token" if hasattr(model, "dist_token") else "register"
    pooling = {"map": "attention", "avg": "average", "": "dense"}.get(model.global_pool, model.global_pool)
    learned = getattr(model, "pos_embed", None) is not None or getattr(stem(model), "pos_embed_type", "none") != "none"
    everything = " of all tokens" if getattr(model, "pool_include_prefix", False) else ""
    parts = [
        type(model).__name__,
        type(block).__name__ if type(block) not in (Block, EvaBlock, BeitBlock) else "",
        "class token" if has_class_token(model) else "no class token",
        f"{further} {kind}{'s' if further > 1 else ''}" if further else "",
        f"{pooling} pooling{everything}",
        _describe_stem(stem(model)),
        "any input size" if takes_any_size(model) else "",
        "no position embedding" if not learned else "",
        "position bias" if getattr(getattr(block, "attn", None), "window_size", None) else "",
        type(model.rope).__name__ if getattr(model, "rope", None) is not None else "",
        "pre-norm" if not _is_identity(getattr(model, "norm_pre", None)) else "",
        *_describe_block(block),
        "shared keys" if _shares_keys(model) else "",
    ]
    return tuple(part for part in parts if part)


def _describe_stem(embed: nn.Module) -> str:
    if isinstance(embed, Stem):
        return " of ".join(
            type(part).__name__ for part in (embed, getattr(embed, "attention1", None)) if part is not None
        )
    return "" if isinstance(embed, PatchEmbed | NaFlexEmbeds) else "convolutional stem"


def _describe_block(block: Any) -> list[str]:
    scales = not _is_identity(getattr(block, "ls1", None)) or getattr(block, "gamma_1", None) is not None
    one_sided = hasattr(block, "gamma_2") and block.gamma_2 is None
    mlp = type(getattr(block, "mlp", None)).__name__
    parts = [
        f"LayerScale{' on attention' if one_sided else ''}" if scales else "",
        mlp if mlp not in ("Mlp", "NoneType") else "",
    ]
    attention = getattr(block, "attn", None)
    if attention is None:
        return parts
    return [
        type(attention).__name__ if type(attention).__name__ != "Attention" else "",
        *parts,
        "q/k norm" if not _is_identity(getattr(attention, "q_norm", None)) else "",
        "attention norm" if not _is_identity(getattr(attention, "norm", None)) else "",
        "gate" if getattr(attention, "gate", None) is not None else "",
        "separate q, k, v" if attention.qkv is None else "",
        "separate biases" if getattr(attention, "q_bias", None) is not None else "",
        "rotates halves" if getattr(attention, "rotate_half", False) else "",
    ]


def _is_identity(module: nn.Module | None) -> bool:
    return module is None or isinstance(module, nn.Identity)


def _shares_keys(model: Any) -> bool:
    return any(getattr(getattr(block, "attn", None), "num_kv_groups", 1) > 1 for block in model.blocks)


@dataclass
class Tried:
    """One structure, the architectures that share it, one of them built small, and the methods that refuse it."""

    structure: Structure
    names: list[str]
    model: nn.Module
    refusals: dict[str, str]

    @property
    def with_weights(self) -> int:
        return sum(map(timm.is_model_pretrained, self.names))


def survey(methods: Sequence[str] | None = None) -> list[Tried]:
    """Every structure in the installed timm with what came of trying these methods in it, by default every one; the
    commonest first."""
    methods = list_methods() if methods is None else methods
    tried = []
    for structure, names in sorted(structures().items(), key=lambda item: (-len(item[1]), item[0])):
        model = build_small(names[0])
        refusals = {method: reason for method in methods if (reason := try_method(model, method))}
        tried.append(Tried(structure, names, model, refusals))
    return tried


def try_method(model: Any, method: str) -> str:
    """Run a method in a small model: "" if it removes tokens and gives finite logits, else the reason it refuses."""
    images = torch.rand(2, *resolve_input_size(model, None), generator=torch.Generator().manual_seed(0))
    try:
        apply(model, method, 5)
    except UnsupportedModelError as error:
        return str(error).split(";")[0]
    with torch.inference_mode():
        logits = model(images)
    tokens = tokens_per_block(model)[-1]
    remove(model)
    if not logits.isfinite().all() or (method != "none" and tokens >= SIDE**2):
        raise UserError(f"method '{method}' does not work on a {', '.join(describe(model))}")
    return ""


def table(tried: list[Tried]) -> str:
    """The survey as Markdown: what is refused and why, then the architectures in which every method runs, by class."""
    works, refused = ([one for one in tried if bool(one.refusals) is refuses] for refuses in (False, True))
    running, known = (sum(len(one.names) for one in group) for group in (works, tried))
    *classes, last = (f"`{kind.__name__}`" for kind in REDUCED_MODELS)
    by_class: dict[str, list[Tried]] = defaultdict(list)
    for one in works:
        by_class[one.structure[0]].append(one)
    converted = [f"| {library} | `{call}` | {', '.join(kinds)} |" for library, call, kinds in CONVERTED]
    return f"""# Coverage

Every method runs on {running} of the {known} architectures in \
timm {timm.__version__} whose class is {", ".join(classes)} or {last}, T2T-ViT and LV-ViT included; \
{sum(one.with_weights for one in works)} of them have published weights. Other classes are refused. \
Made by `python benchmarks/coverage.py docs/coverage.md`, which runs every method in the smallest architecture of each \
structure, built with {SIDE}×{SIDE} patches and {DEPTH} blocks.

| refused | reason |
|---|---|
{chr(10).join(map(_refusal, refused))}

{(chr(10) * 2).join(map(_section, by_class.values()))}

## Models of other libraries

Every method runs in them: [their weights are put into timm's classes](own_model.md#models-of-other-libraries).

| library | `--model` | classes or models |
|---|---|---|
{chr(10).join(converted)}
"""


def _refusal(one: Tried) -> str:
    methods = "" if "none" in one.refusals else f"only {', '.join(one.refusals)}: "
    return f"| {_spans(one.names)} | {methods}{'; '.join(dict.fromkeys(one.refusals.values()))} |"


def _section(alike: list[Tried]) -> str:
    features = dict.fromkeys(feature for one in alike for feature in one.structure[1:])
    names = sorted(name for one in alike for name in one.names)
    return f"## {alike[0].structure[0]}\n\n{len(alike)} structures: {'; '.join(features)}.\n\n{_spans(names)}"


def _spans(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def main() -> None:
    torch.manual_seed(0)
    text = table(survey())
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
