"""Hugging Face transformers: ViT, DeiT, DINOv2 with and without registers, and the image towers of CLIP and SigLIP.

The number that a converted model gives is what the class named in config.json gives: logits of a classifier, projected
image embeddings of CLIPModel and CLIPVisionModelWithProjection, and elsewhere the features before any further layer:
`pooler_output` of CLIP, SigLIP and DINOv2, and `last_hidden_state[:, 0]` of ViTModel and DeiTModel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.layers import LayerNorm
from timm.layers.attention_pool import AttentionPoolLatent
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import SwiGLUPacked, VisionTransformer
from torch import Tensor, nn

from tokbench.errors import UserError
from tokbench.models.checkpoints import count_outputs
from tokbench.models.converted import common
from tokbench.models.converted.common import Conversion, Repository, Rules

WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_NAMES: Rules = (
    (r"^(vit|deit|dinov2|dinov2_with_registers)\.", ""),
    (r"^embeddings\.(cls_token|mask_token)", r"\1"),
    (r"^embeddings\.distillation_token", "dist_token"),
    (r"^embeddings\.register_tokens", "reg_token"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^(encoder\.)?layers?\.", "blocks."),
    (r"attention\.(attention\.query|q_proj)", "attn.qkv[0]"),
    (r"attention\.(attention\.key|k_proj)", "attn.qkv[1]"),
    (r"attention\.(attention\.value|v_proj)", "attn.qkv[2]"),
    (r"attention\.(output\.dense|o_proj)", "attn.proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
    (r"mlp\.weights_in", "mlp.fc1"),
    (r"mlp\.gate_proj", "mlp.fc1[0]"),
    (r"mlp\.up_proj", "mlp.fc1[1]"),
    (r"mlp\.(weights_out|down_proj)", "mlp.fc2"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
    (r"^layernorm\.", "norm."),
    (r"^(cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
)
_TOWER_NAMES: Rules = (
    (r"^(vision_model\.)+", ""),
    (r"^embeddings\.class_embedding", "cls_token"),
    (r"^embeddings\.position_embedding\.weight", "pos_embed"),
    (r"^embeddings\.patch_embedding", "patch_embed.proj"),
    (r"^pre_layrnorm", "norm_pre"),
    (r"^post_layernorm", "norm"),
    (r"^encoder\.layers\.", "blocks."),
    (r"self_attn\.q_proj", "attn.qkv[0]"),
    (r"self_attn\.k_proj", "attn.qkv[1]"),
    (r"self_attn\.v_proj", "attn.qkv[2]"),
    (r"self_attn\.out_proj", "attn.proj"),
    (r"layer_norm(\d)", r"norm\1"),
    (r"^head\.probe", "attn_pool.latent"),
    (r"^head\.attention\.out_proj", "attn_pool.proj"),
    (r"^head\.attention\.", "attn_pool."),
    (r"^head\.layernorm", "attn_pool.norm"),
    (r"^head\.mlp\.", "attn_pool.mlp."),
    (r"^visual_projection\.", "head."),
    (r"^classifier\.", "head."),
)
_PRETRAINING = r"pooler\.|mask_token|decoder\."
_OTHER_TOWER = r"text_model\.|text_projection\.|logit_scale|logit_bias|embeddings\.position_ids"
_NO_HEAD = r"|head\."


class ClassAndMean(AttentionPoolLatent):
    """The class token beside the mean of the patches, as DINOv2's classifiers read them: (B, N, C) → (B, 2C).

    It stands where timm has pooling by attention, and takes the same mask: logarithms of how many patches each token
    stands for, (B, 1, 1, N), of which a softmax makes the share of each in the mean.
    """

    def __init__(self, prefix: int) -> None:
        nn.Module.__init__(self)
        self.prefix = prefix
        self.register_parameter("pos_embed", None)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        patches = x[:, self.prefix :]
        if attn_mask is None:
            return torch.cat([x[:, 0], patches.mean(1)], dim=1)
        shares = attn_mask[:, 0, :, self.prefix :].softmax(-1)
        return torch.cat([x[:, 0], (shares @ patches).squeeze(1)], dim=1)


def _with_class_and_mean(**arguments: Any) -> VisionTransformer:
    model = VisionTransformer(**arguments)
    model.attn_pool, model.pool_include_prefix = ClassAndMean(model.num_prefix_tokens), True
    model.head = nn.Linear(2 * model.embed_dim, model.num_classes)
    return model


@dataclass(frozen=True)
class Architecture:
    """How one class of transformers is built of timm's parts.

    Attributes:
        defaults: what its config.json may leave out.
        names, unused: see `read_weights`.
        arguments: of timm's class, beside those that config.json tells.
        head: the key in config.json that tells the number of outputs, or "" for none.
        kind: timm's class, or what builds it.
    """

    defaults: Mapping[str, Any]
    names: Rules
    unused: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    head: str = ""
    kind: Callable[..., VisionTransformer] = VisionTransformer


_COMMON = dict(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    hidden_act="gelu",
    layer_norm_eps=1e-12,
    image_size=224,
    patch_size=16,
    num_channels=3,
    qkv_bias=True,
)
_DINO = {**_COMMON, "mlp_ratio": 4, "layer_norm_eps": 1e-6, "patch_size": 14, "use_swiglu_ffn": False}
_DINO_REG = {**_DINO, "patch_size": 16, "num_register_tokens": 4}
_CLIP = {**_COMMON, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "projection_dim": 512}
_SIGLIP = {**_COMMON, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "vision_use_head": True}

_PRE_NORM: dict[str, Any] = dict(pre_norm=True)
_MEAN: dict[str, Any] = dict(pre_norm=True, global_pool="avg", final_norm=False)
_MAP: dict[str, Any] = dict(class_token=False, global_pool="map")
_SIGLIP_MEAN: dict[str, Any] = dict(class_token=False, global_pool="avg", fc_norm=False)
_PLAIN = _PRETRAINING + _NO_HEAD
# The distillation token of a DeiT without a head for it is one more token that the others attend to.
_TWO_TOKENS: dict[str, Any] = dict(reg_tokens=1)

ARCHITECTURES: dict[str, Architecture] = {
    "ViTModel": Architecture(_COMMON, _NAMES, _PLAIN),
    "ViTForImageClassification": Architecture(_COMMON, _NAMES, _PRETRAINING, head="labels"),
    "DeiTModel": Architecture(_COMMON, _NAMES, _PLAIN + r"|head_dist\.", _TWO_TOKENS),
    "DeiTForImageClassification": Architecture(
        _COMMON, _NAMES, _PRETRAINING + r"|head_dist\.", _TWO_TOKENS, head="labels"
    ),
    "DeiTForImageClassificationWithTeacher": Architecture(
        _COMMON, _NAMES, _PRETRAINING, head="labels", kind=VisionTransformerDistilled
    ),
    "Dinov2Model": Architecture(_DINO, _NAMES, _PLAIN),
    "Dinov2ForImageClassification": Architecture(_DINO, _NAMES, _PRETRAINING, head="labels", kind=_with_class_and_mean),
    "Dinov2WithRegistersModel": Architecture(_DINO_REG, _NAMES, _PLAIN),
    "Dinov2WithRegistersForImageClassification": Architecture(
        _DINO_REG, _NAMES, _PRETRAINING, head="labels", kind=_with_class_and_mean
    ),
    "CLIPModel": Architecture(_CLIP, _TOWER_NAMES, _OTHER_TOWER, _PRE_NORM, head="projection_dim"),
    "CLIPVisionModel": Architecture(_CLIP, _TOWER_NAMES, _OTHER_TOWER + _NO_HEAD, _PRE_NORM),
    "CLIPVisionModelWithProjection": Architecture(_CLIP, _TOWER_NAMES, _OTHER_TOWER, _PRE_NORM, head="projection_dim"),
    "CLIPForImageClassification": Architecture(_CLIP, _TOWER_NAMES, _OTHER_TOWER + r"|norm\.", _MEAN, head="labels"),
    "SiglipModel": Architecture(_SIGLIP, _TOWER_NAMES, _OTHER_TOWER + _NO_HEAD, _MAP),
    "SiglipVisionModel": Architecture(_SIGLIP, _TOWER_NAMES, _OTHER_TOWER + _NO_HEAD, _MAP),
    "SiglipForImageClassification": Architecture(
        _SIGLIP, _TOWER_NAMES, _OTHER_TOWER + r"|attn_pool\.", _SIGLIP_MEAN, head="labels"
    ),
}
# What an image processor does where its configuration does not say.
_HALF: dict[str, Any] = dict(image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))
_OPENAI: dict[str, Any] = dict(image_mean=OPENAI_CLIP_MEAN, image_std=OPENAI_CLIP_STD)
_PROCESSORS: dict[str, dict[str, Any]] = {
    "ViT": dict(size=dict(height=224, width=224), resample=2, **_HALF),
    "DeiT": dict(size=dict(height=256, width=256), resample=3, do_center_crop=True, crop_size=224, **_HALF),
    "Bit": dict(size=dict(shortest_edge=224), resample=3, do_center_crop=True, crop_size=224, **_OPENAI),
    "CLIP": dict(size=dict(shortest_edge=224), resample=3, do_center_crop=True, crop_size=224, **_OPENAI),
    "Siglip": dict(size=dict(height=224, width=224), resample=3, **_HALF),
}


def convert(name: str, place: str, checkpoint: Path | None, with_weights: bool) -> Conversion:
    """The model in a folder or hub repository of transformers; see `converted.convert`."""
    repository = Repository(name, place)
    config = repository.read_json("config.json")
    known = _architecture(config, name)
    settings = {**known.defaults, **config, **_vision_config(config)}
    path = checkpoint or (repository.weights(*WEIGHTS) if with_weights else None)
    state = None if path is None else _weights(path, known)
    outputs = _outputs(known, config, state)
    arguments = {**known.arguments, **_arguments(known, settings, name), "num_classes": outputs}
    native = arguments["img_size"]
    sides = (native, native) if isinstance(native, int) else tuple(native)
    cfg = _preprocessing(repository, name) | _description(known, config, outputs)
    crop = cfg.pop("crop")
    cfg["input_size"] = (settings["num_channels"], *sides)
    build = common.builder(name, known.kind, arguments, cfg)
    size = crop if sides != (crop, crop) else None
    if size is not None and "mlp_ratio" not in known.defaults:  # only DINOv2 brings its positions to any size itself
        raise UserError(
            f"model {name!r} is made for images of {sides[0]}×{sides[1]} pixels (config.json), and its image processor "
            f"gives {crop}×{crop}: transformers refuses it, too."
        )
    return Conversion(build, state, path, size, antialias=known.defaults is _DINO_REG)


def _architecture(config: Mapping[str, Any], name: str) -> Architecture:
    found = next(iter(config.get("architectures") or ()), None)
    if found not in ARCHITECTURES:
        what = f"is a {found} of transformers" if found else "has a config.json that names no architecture"
        raise UserError(f"model {name!r} {what}; these can be converted: {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[found]


def _vision_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of CLIP's and SigLIP's configurations that is about images. The projection is the whole model's."""
    part = config.get("vision_config") or config.get("vision_config_dict") or {}
    return {key: value for key, value in part.items() if key != "projection_dim"}


def _outputs(known: Architecture, config: Mapping[str, Any], state: Mapping[str, Tensor] | None) -> int:
    if known.head == "labels":
        told = count_outputs(state or {})
        return (len(config.get("id2label") or ()) or config.get("num_labels", 2)) if told is None else told
    return int(config.get(known.head, known.defaults[known.head])) if known.head else 0


def _description(known: Architecture, config: Mapping[str, Any], outputs: int) -> dict[str, Any]:
    labels = {int(key): text for key, text in (config.get("id2label") or {}).items()}
    classifier = ("head", "head_dist") if known.kind is VisionTransformerDistilled else "head"
    told = dict(architecture=config["architectures"][0], num_classes=outputs, classifier=classifier)
    named = known.head == "labels" and set(labels) == set(range(outputs))
    if named and all(text != f"LABEL_{key}" for key, text in labels.items()):
        told["label_names"] = [labels[key] for key in range(outputs)]
    return told


def _arguments(known: Architecture, settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    width, hidden, activation = settings["hidden_size"], settings["intermediate_size"], settings["hidden_act"]
    if activation not in common.ACTIVATIONS:
        known_ones = ", ".join(common.ACTIVATIONS)
        raise UserError(f"model {name!r} has the activation {activation!r}; these can be converted: {known_ones}.")
    arguments = dict(
        img_size=settings["image_size"],
        patch_size=settings["patch_size"],
        in_chans=settings["num_channels"],
        embed_dim=width,
        depth=settings["num_hidden_layers"],
        num_heads=settings["num_attention_heads"],
        qkv_bias=settings["qkv_bias"],
        norm_layer=partial(LayerNorm, eps=settings["layer_norm_eps"]),
        act_layer=common.ACTIVATIONS[activation],
    )
    if "mlp_ratio" in known.defaults:  # DINOv2
        hidden = int(width * settings["mlp_ratio"])
        arguments["init_values"] = 1.0
        arguments |= dict(reg_tokens=settings.get("num_register_tokens", 0), no_embed_class=True)
        if settings["use_swiglu_ffn"]:
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8 * 2
            arguments |= dict(mlp_layer=SwiGLUPacked, act_layer="silu")
    if not settings.get("vision_use_head", True) and known.arguments is _MAP:
        raise UserError(f"model {name!r} pools nothing (vision_use_head is false), so it has no output to compare.")
    arguments["mlp_ratio"] = common.mlp_ratio(hidden, width)
    return arguments


def _weights(path: Path, known: Architecture) -> dict[str, Tensor]:
    state = common.read_weights(path, known.names, known.unused)
    if known.head == "projection_dim":
        common.add_zero_bias(state, "head")
    if "dist_token" in state and known.kind is VisionTransformer:
        state["reg_token"] = state.pop("dist_token")
    if "mlp_ratio" in known.defaults and "pos_embed" in state and "cls_token" in state:
        # DINOv2 adds a position to the class token and none to registers, which timm can only do beforehand.
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    for kind in ("weight", "bias"):
        joined = state.pop(f"attn_pool.in_proj_{kind}", None)
        if joined is not None:
            third = len(joined) // 3
            state[f"attn_pool.q.{kind}"], state[f"attn_pool.kv.{kind}"] = joined[:third], joined[third:]
    return state


def _preprocessing(repository: Repository, name: str) -> dict[str, Any]:
    """What the image processor does, in timm's terms, and the side of its crop as "crop"."""
    config = repository.read_json("preprocessor_config.json", "processor_config.json")
    config = config.get("image_processor") or config
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type"))
    family = next((family for family in _PROCESSORS if re.match(f"{family}(ImageProc|FeatureExtr)", kind)), None)
    if family is None:
        raise UserError(
            f"model {name!r} prepares images with {kind}; these are understood: {', '.join(_PROCESSORS)}ImageProcessor."
        )
    settings = {**_PROCESSORS[family], **{key: value for key, value in config.items() if value is not None}}
    if not settings.get("do_resize", True) or abs(settings.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise UserError(f"model {name!r}: its image processor does not resize, or does not scale pixels to 0…1.")
    size = settings["size"]
    if isinstance(size, int):
        size = dict(shortest_edge=size) if family in ("Bit", "CLIP") else dict(height=size, width=size)
    resized = _side(size, name)
    cropped = _side(settings["crop_size"], name) if settings.get("do_center_crop") else resized
    if "shortest_edge" in size and not settings.get("do_center_crop"):
        raise UserError(f"model {name!r}: its image processor does not crop, so images have no common size.")
    normalized = settings.get("do_normalize", True)
    return dict(
        crop=cropped,
        crop_pct=common.crop(cropped, resized),
        crop_mode="center" if "shortest_edge" in size else "squash",
        interpolation=common.INTERPOLATIONS.get(settings["resample"], "bicubic"),
        mean=tuple(settings["image_mean"]) if normalized else (0.0,) * 3,
        std=tuple(settings["image_std"]) if normalized else (1.0,) * 3,
    )


def _side(size: Any, name: str) -> int:
    sides = set(size.values()) if isinstance(size, dict) else {size}
    side = sides.pop() if len(sides) == 1 else None
    if not isinstance(side, int) or side < 1:
        raise UserError(f"model {name!r}: its image processor makes no square of {size}.")
    return side
