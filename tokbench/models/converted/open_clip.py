"""OpenCLIP's image towers: its own Vision Transformer, and towers that are timm's already. They give `encode_image`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer

from tokbench.errors import UserError, nearest
from tokbench.models.converted import common
from tokbench.models.converted.common import Conversion, Repository, Rules

TOWERS = ("VisionTransformer", "TimmModel")
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_NAMES: Rules = (
    (r"^visual\.", ""),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^class_embedding", "cls_token"),
    (r"^positional_embedding", "pos_embed"),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.(\d+)\.", r"blocks.\1."),
    (r"^(blocks\.\d+\.)(ln|ls)_(\d)\.", r"\1\2\3."),
    (r"^(blocks\.\d+\.)ln(\d)\.", r"\1norm\2."),
    (r"attn\.in_proj_", "attn.qkv."),
    (r"attn\.out_proj", "attn.proj"),
    (r"mlp\.c_fc", "mlp.fc1"),
    (r"mlp\.c_proj", "mlp.fc2"),
    (r"^proj$", "head.weight"),
)
_NORM_AFTER_POOLING: Rules = ((r"^norm\.", "fc_norm."),)
_TIMM_NAMES: Rules = ((r"^visual\.trunk\.", ""), (r"^visual\.head\.proj\.", "head."))
_NOTHING = r"(?!)"
# What a tower may have that timm's class has not: the setting, and the values of it that make no difference.
_PLAIN: dict[str, tuple[Any, ...]] = dict(
    attentional_pool=(False, None),
    pool_type=("tok", "avg"),
    block_type=(None, "default"),
    qk_norm=(False,),
    scaled_cosine_attn=(False,),
    scale_heads=(False,),
    scale_attn_inner=(False,),
    scale_attn=(False,),
    scale_fc=(False,),
)
_DEFAULTS: dict[str, Any] = dict(layers=12, width=768, head_width=64, mlp_ratio=4.0, patch_size=16, image_size=224)
_PREPROCESSING: dict[str, Any] = dict(
    mean=OPENAI_CLIP_MEAN, std=OPENAI_CLIP_STD, interpolation="bicubic", resize_mode="shortest"
)
_RESIZE = {"shortest": "center", "squash": "squash"}


def convert(name: str, place: str, checkpoint: Path | None, with_weights: bool) -> Conversion:
    """The image tower of a folder or hub repository of OpenCLIP; see `converted.convert`."""
    repository = Repository(name, place)
    config = repository.read_json("open_clip_config.json")
    model = config.get("model_cfg") or {}
    tower = {**_DEFAULTS, **(model.get("vision_cfg") or {})}
    is_timm = bool(tower.get("timm_model_name"))
    kind, arguments, names = _timm_tower(tower, model, name) if is_timm else _own_tower(tower, model, name)
    path = checkpoint or (repository.weights(*_WEIGHTS) if with_weights else None)
    state = None if path is None else common.read_weights(path, names, _NOTHING, "visual.")
    if state is not None and not is_timm:
        if "head.weight" in state:
            state["head.weight"] = state["head.weight"].T
        if tower.get("no_ln_pre"):  # timm's patch embedding then has a bias
            common.add_zero_bias(state, "patch_embed.proj")
    if state is not None and arguments["num_classes"]:
        common.add_zero_bias(state, "head")
    cfg = _preprocessing(config, tower, name) | dict(
        architecture=tower.get("timm_model_name") or "open_clip",
        num_classes=arguments["num_classes"],
        classifier="head",
    )
    return Conversion(common.builder(name, kind, arguments, cfg), state, path)


def _own_tower(
    tower: Mapping[str, Any], model: Mapping[str, Any], name: str
) -> tuple[Callable[..., Any], dict[str, Any], Rules]:
    for setting, harmless in _PLAIN.items():
        if tower.get(setting, harmless[0]) not in harmless:
            raise UserError(f"model {name!r} has {setting}={tower[setting]!r}, which timm's VisionTransformer has not.")
    if not isinstance(tower["layers"], int):
        raise UserError(f"model {name!r}: its image tower is a ResNet, and token fusion needs a Vision Transformer.")
    pools = tower.get("pool_type", "tok") == "avg"
    norm_last = pools and bool(tower.get("final_ln_after_pool"))
    tanh = (tower.get("act_kwargs") or {}).get("approximate") == "tanh"
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu_tanh" if tanh else "gelu"
    arguments = dict(
        img_size=tower["image_size"],
        patch_size=tower["patch_size"],
        embed_dim=tower["width"],
        depth=tower["layers"],
        num_heads=tower["width"] // tower["head_width"],
        mlp_ratio=tower["mlp_ratio"],
        init_values=tower.get("ls_init_value"),
        pre_norm=not tower.get("no_ln_pre"),
        global_pool="avg" if pools else "token",
        fc_norm=norm_last,
        num_classes=model["embed_dim"],
        norm_layer=partial(LayerNorm, eps=(tower.get("norm_kwargs") or {}).get("eps", 1e-5)),
        act_layer=activation,
    )
    names = (*_NAMES, *_NORM_AFTER_POOLING) if norm_last else _NAMES
    return VisionTransformer, arguments, names


def _timm_tower(
    tower: Mapping[str, Any], model: Mapping[str, Any], name: str
) -> tuple[Callable[..., Any], dict[str, Any], Rules]:
    architecture, pool, projection = tower["timm_model_name"], tower.get("timm_pool", "avg"), tower.get("timm_proj")
    projection = "linear" if "timm_proj" not in tower else projection
    if architecture not in timm.list_models():
        raise UserError(f"model {name!r} is built of {architecture!r}.{nearest(architecture, timm.list_models())}")
    if pool in ("abs_attn", "rot_attn") or projection == "mlp":
        raise UserError(f"model {name!r} ends in a pool or a projection (mlp) that timm's classes have not.")
    outputs = 0 if projection == "none" else model["embed_dim"]

    def build(**options: Any) -> Any:
        trunk: Any = timm.create_model(architecture, **options)
        trunk.reset_classifier(outputs, **({"global_pool": pool} if pool else {}))
        return trunk

    return build, dict(num_classes=outputs), _TIMM_NAMES


def _preprocessing(config: Mapping[str, Any], tower: Mapping[str, Any], name: str) -> dict[str, Any]:
    settings = _PREPROCESSING | (config.get("preprocess_cfg") or {})
    if settings["resize_mode"] not in _RESIZE:
        raise UserError(f"model {name!r} pads its images (resize_mode {settings['resize_mode']!r}), timm does not.")
    side = tower["image_size"]
    return dict(
        input_size=(3, *((side, side) if isinstance(side, int) else side)),
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        interpolation=settings["interpolation"],
        crop_pct=1.0,
        crop_mode=_RESIZE[settings["resize_mode"]],
    )
