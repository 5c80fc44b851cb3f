"""From a model's name to the model: timm's Vision Transformers, converted ones, and the bundled one."""

from __future__ import annotations

import hashlib
import os
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import timm
import timm.models
import torch
from huggingface_hub import hf_hub_url
from torch import nn

from tokbench.errors import UserError, nearest, shortened
from tokbench.fusion.anatomy import grid_for, stem
from tokbench.fusion.patch import UnsupportedModelError, require_supported
from tokbench.measure._model import resolve_input_size
from tokbench.models import fitting, hub
from tokbench.models.bundled import BUNDLED, BUNDLED_WEIGHTS, build_bundled
from tokbench.models.checkpoints import count_outputs, read_checkpoint
from tokbench.models.converted import PREFIXES, convert
from tokbench.models.converted.common import Conversion

# The modules that register ViTs with timm: their authors' weights are files to be given, which timm does not know.
OWN_MODULES = ("t2t", "lvvit")
# With those, the modules that build what fusion.patch.REDUCED_MODELS lists, and nothing else.
VIT_MODULES = (
    *("vision_transformer", "deit", "vision_transformer_hybrid", "vitamin", "eva", "beit", "naflexvit"),
    *OWN_MODULES,
)
# Those of them that have weights and that fusion.patch refuses, for what their blocks are.
REFUSED = tuple(f"vit_{size}_patch16_reg1_gap_256" for size in ("dlittle", "dpwee", "dwee", "pwee"))
# Above it even one patch in 16 pixels squared asks for more positions than any memory holds.
_LARGEST_INPUT = 2**16


def load_model(
    name: str = BUNDLED,
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    input_size: int | None = None,
    random_weights: bool = False,
) -> nn.Module:
    """A timm ViT in eval mode, on the CPU, in float32.

    `model.pretrained_cfg` describes the input as it now is, so `timm.data.resolve_model_data_config(model)` gives
    the preprocessing.

    Args:
        name: "bundled"; a timm model name with or without tag; timm's "hf-hub:OWNER/NAME" and "local-dir:FOLDER"; or
            a model of another library, converted: "hf:OWNER/NAME" and "hf:FOLDER" (Hugging Face transformers),
            "openclip:OWNER/NAME" and "openclip:FOLDER", "tv:NAME" (torchvision, with a checkpoint).
        checkpoint: a file of weights to load instead of the model's own; .safetensors, or what `torch.save` wrote,
            plain or wrapped as training scripts do (averaged weights are preferred, as in timm), under timm's names
            or as the model's authors published it, as far as timm can convert that; of a converted model, under its
            library's names. The number of classes is the file's; the input size is not guessed from it, but for
            torchvision's.
        input_size: side of the square input in pixels; position embeddings of another size are then resampled.
            Default: the model's own.
        random_weights: draw the weights, from a fixed seed, instead of downloading them: enough for FLOPs and speed.

    Raises:
        UserError: an unknown model, one that token fusion cannot go into, a hub that does not answer, or a checkpoint
            that cannot be read or does not fit.
    """
    path = Path(checkpoint) if checkpoint is not None else None
    if input_size is not None and not 1 <= input_size <= _LARGEST_INPUT:
        raise UserError(f"input_size must be 1 to {_LARGEST_INPUT} pixels, not {input_size}.")
    source = _source(name, path, random_weights)
    build, state, size = source.build, source.state, input_size or source.input_size
    with torch.device("meta"):
        skeleton = build()
        _require_vit(skeleton, name, input_size)
        native = grid_for(skeleton)
        if size is not None:
            build = partial(build, img_size=size)
            skeleton = build()
    _require_memory(skeleton, name)
    if state is not None:
        state = fitting.with_timms_names(state, skeleton, any_size=input_size is not None)
        if size is not None:
            fitting.resample_positions(state, skeleton, native, antialias=source.antialias)
        fitting.require_match(state, skeleton, f"checkpoint {str(source.path)!r} does not fit model {name!r}")
    if random_weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build()
    elif state is None:
        model = build(pretrained=True)
    else:
        model = build()
        model.load_state_dict(state)
    _describe_input(model)
    return model.float().eval()


def model_names(pattern: str = "") -> list[str]:
    """ "bundled", T2T-ViT and LV-ViT, which need a --checkpoint, and timm's ViTs that have pretrained weights.

    pattern: part of the name, or a wildcard.
    """
    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    own = timm.list_models(glob, module=OWN_MODULES)
    timms = timm.list_models(glob, module=VIT_MODULES, pretrained=True)
    hidden = tuple(f"{name}." for name in REFUSED)
    return ([BUNDLED] if pattern in BUNDLED else []) + own + [name for name in timms if not name.startswith(hidden)]


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 (hex) over the names, shapes, dtypes and bytes of the state_dict, whatever its order and device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode(errors="surrogatepass"))
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _known_name(name: str, needs_weights: bool) -> str:
    try:
        source, identity = timm.models.parse_model_name(name)
        if source == "hf-hub":
            hf_hub_url(identity.partition("@")[0], "config.json")  # raises where it can be no repository's name
    except ValueError as error:
        others = " Models of transformers are hf:OWNER/NAME, of OpenCLIP openclip:OWNER/NAME." if "/" in name else ""
        raise UserError(f"unknown model {name!r}: {shortened(error)}{others}") from error
    if source is not None:
        return name
    name = timm.models.get_deprecated_models().get(name) or name
    known = {*timm.list_models(), *timm.list_models(include_tags=True)}
    if name not in known:
        close = nearest(name, [BUNDLED, *sorted(known)]) or " 'tokbench list models' shows those that work."
        raise UserError(f"unknown model {name!r}.{close}")
    if needs_weights and timm.models.is_model_in_modules(name, VIT_MODULES) and not timm.is_model_pretrained(name):
        raise UserError(f"timm has no pretrained weights for model {name!r}; give yours with --checkpoint FILE.")
    return name


def _source(name: str, checkpoint: Path | None, random_weights: bool) -> Conversion:
    """How to build a model, and the weights that are not timm's to download."""
    if name.startswith(PREFIXES):
        return convert(name, checkpoint, with_weights=not random_weights)
    if name == BUNDLED:
        build, default = build_bundled, None if random_weights else BUNDLED_WEIGHTS
    else:
        name = _known_name(name, needs_weights=checkpoint is None and not random_weights)
        build, default = partial(_build_timms, name), None
    path = checkpoint or default
    state = None if path is None else read_checkpoint(path)
    if (outputs := count_outputs(state or {})) is not None:
        build = partial(build, num_classes=outputs)
    return Conversion(build, state, path)


def _build_timms(name: str, *, pretrained: bool = False, **options: Any) -> Any:
    source, identity = timm.models.parse_model_name(name)
    repo, files = (identity, ["config.json"]) if source == "hf-hub" else hub.hub_files(name)
    try:
        if repo and (pretrained or source == "hf-hub"):
            hub.require_hub(repo, files)
        return timm.create_model(name, pretrained=pretrained, **options)
    except (OSError, hub.HubError, RuntimeError, ValueError, KeyError) as error:
        if source != "local-dir" and isinstance(error, OSError | hub.HubError):
            raise hub.cannot_download(name, repo, error) from error
        if source is None:
            raise
        raise UserError(f"cannot load model {name!r}: {shortened(error)}") from error


def _require_vit(model: Any, name: str, input_size: int | None) -> None:
    try:
        require_supported(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"model {name!r}: {error}") from error
    patch = stem(model).feat_ratio()
    if input_size is not None and input_size % patch:
        below = input_size // patch * patch
        fits = f"{below} or {below + patch}" if below else f"{patch}"
        raise UserError(f"input_size {input_size} is no multiple of the {patch}-pixel patches of {name!r}; try {fits}.")


def _require_memory(skeleton: nn.Module, name: str) -> None:
    needed = sum(tensor.numel() * tensor.element_size() for tensor in skeleton.state_dict().values())
    there = psutil.virtual_memory().total
    if needed > there:
        needed_gib, there_gib = f"{needed / 2**30:,.0f} GiB", f"{there / 2**30:,.0f} GiB"
        raise UserError(f"the weights of model {name!r} would take {needed_gib}, and this machine has {there_gib}.")


def _describe_input(model: Any) -> None:
    size = resolve_input_size(model, None)
    cfg = dict(model.pretrained_cfg, input_size=size, num_classes=model.num_classes)
    if len(cfg.get("label_names") or ()) != model.num_classes:
        cfg.pop("label_names", None)
    model.pretrained_cfg = cfg
