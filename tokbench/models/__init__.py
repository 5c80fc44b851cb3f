"""Models to measure: timm's Vision Transformers with timm's weights or your own, and the bundled one."""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import pickle
import struct
import sys
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import timm
import timm.models
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokbench.bundled.clutter import CANVAS, CLASSES
from tokbench.errors import UserError, nearest, shortened
from tokbench.fusion.anatomy import stem
from tokbench.fusion.patch import UnsupportedModelError, require_supported
from tokbench.measure._model import resolve_input_size
from tokbench.models import lvvit, t2t  # registers them with timm

BUNDLED = "bundled"
BUNDLED_WEIGHTS = Path(__file__).parents[1] / "bundled" / "vit_clutter.safetensors"
_BUNDLED_SHAPE: dict[str, Any] = dict(patch_size=4, in_chans=1, embed_dim=96, depth=12, num_heads=3)
_BUNDLED_CFG: dict[str, Any] = dict(
    architecture="vit_clutter",
    input_size=(1, CANVAS, CANVAS),
    num_classes=len(CLASSES),
    label_names=list(CLASSES),
    mean=(0.5,),
    std=(0.5,),
    interpolation="bicubic",
    crop_pct=1.0,
    crop_mode="center",
    fixed_input_size=True,
    first_conv="patch_embed.proj",
    classifier="head",
)

# The modules that register ViTs with timm: their authors' weights are files to be given, which timm does not know.
OWN_MODULES = ("t2t", "lvvit")
# With those, the modules that build what fusion.patch.REDUCED_MODELS lists, and nothing else.
VIT_MODULES = (
    *("vision_transformer", "deit", "vision_transformer_hybrid", "vitamin", "eva", "beit", "naflexvit"),
    *OWN_MODULES,
)
# Those of them that have weights and that fusion.patch refuses, for what their blocks are.
REFUSED = (
    "vit_dlittle_patch16_reg1_gap_256",
    "vit_dpwee_patch16_reg1_gap_256",
    "vit_dwee_patch16_reg1_gap_256",
    "vit_pwee_patch16_reg1_gap_256",
)
# timm's own order: averaged weights before raw ones. The rest are names that other training scripts use.
_WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
    "state_dict",
    "model_state_dict",
    "model",
)
# What the pickle module says unpickling may raise; torch's restricted unpickler does, on files of another kind.
_UNPICKLING_ERRORS = (pickle.UnpicklingError, struct.error, EOFError, LookupError, AttributeError, ImportError)
# The base error of the HTTP library behind the hub's client, which changed with its versions.
HubError: type[Exception] = HfHubHTTPError.__bases__[0]
_HUB_TIMEOUT_S = 10
_DEEPEST_WRAPPING = 8
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
        name: "bundled", a timm model name with or without tag, or timm's "hf-hub:OWNER/NAME" and "local-dir:FOLDER".
        checkpoint: a file of weights to load instead of timm's; .safetensors, or what `torch.save` wrote, plain or
            wrapped as training scripts do (averaged weights are preferred, as in timm), under timm's names or as the
            model's authors published it, as far as timm can convert that. The number of classes is the file's; the
            input size is not guessed from it.
        input_size: side of the square input in pixels; position embeddings of another size are then resampled.
            Default: the model's own.
        random_weights: draw the weights, from a fixed seed, instead of downloading them: enough for FLOPs and speed.

    Raises:
        UserError: an unknown model, one that token fusion cannot go into, a hub that does not answer, or a checkpoint
            that cannot be read or does not fit.
    """
    if name != BUNDLED:
        name = _known_name(name, needs_weights=checkpoint is None and not random_weights)
    path = BUNDLED_WEIGHTS if name == BUNDLED and checkpoint is None and not random_weights else checkpoint
    state = None if path is None else read_checkpoint(Path(path))
    options: dict[str, Any] = {}
    if input_size is not None:
        _require_positive(input_size)
        options["img_size"] = input_size
    if state is not None and "head.weight" in state and state["head.weight"].ndim == 2:
        options["num_classes"] = len(state["head.weight"])
    build = partial(_build, name, **options)
    with torch.device("meta"):
        skeleton = build()
    _require_vit(skeleton, name, input_size)
    _require_memory(skeleton, name)
    if state is not None:
        state = _with_timms_names(state, skeleton, any_size=input_size is not None)
        if input_size is not None:
            _resample_positions(state, skeleton)
        _require_match(state, skeleton, f"checkpoint {str(path)!r} does not fit model {name!r}")
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
    vit: nn.Module = model.float().eval()
    return vit


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
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The weights in a file, by name, without wrappers and the prefixes of DDP and torch.compile.

    Never unpickles anything but tensors and plain containers. Raises UserError if there is nothing to read.
    """
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise UserError(f"checkpoint {str(path)[:100]!r} cannot be read: {error.strerror}.") from error
    if not is_file:
        if is_folder:
            raise UserError(f"checkpoint {str(path)!r} is a folder; give the file with the weights.")
        siblings = [other.name for other in path.parent.iterdir() if other.is_file()] if path.parent.is_dir() else []
        raise UserError(f"checkpoint {str(path)!r} does not exist.{nearest(path.name, siblings)}")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _torch_load(path)
    except _UNPICKLING_ERRORS as error:
        raise UserError(
            f"checkpoint {str(path)!r} cannot be read: it is no file of torch.save, or holds more than tensors "
            "(save model.state_dict(), or convert it to .safetensors)."
        ) from error
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"checkpoint {str(path)!r} cannot be read: {shortened(error)}") from error
    return _unwrap(content, path)


def _torch_load(path: Path) -> Any:
    # timm's training script stores its arguments beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of pickles that other programs wrote: they are refused, or fine
        return torch.load(path, map_location="cpu", weights_only=True)


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    for _ in range(_DEEPEST_WRAPPING):
        if not isinstance(content, Mapping):
            break
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    found = f"a {type(content).__name__}"
    if isinstance(content, Mapping):
        state = timm.models.clean_state_dict({str(key): value for key, value in content.items()})
        # torch's AveragedModel counts its updates in a tensor of its own
        state = {k: v for k, v in state.items() if isinstance(v, Tensor) and k != "n_averaged"}
        if state:
            _require_stored(state, path)
            return state
        found = f"only {', '.join(map(str, list(content)[:5])) or 'an empty dict'}"
    raise UserError(f"checkpoint {str(path)!r} holds no weights but {found}; save model.state_dict().")


def _require_stored(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse shapes that a file claims without holding the numbers: they would fill the memory."""
    for name, tensor in state.items():
        if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided:
            raise UserError(
                f"checkpoint {str(path)!r}: {name} is a sparse, quantized or meta tensor; save plain dense ones."
            )
        if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise UserError(
                f"checkpoint {str(path)!r}: {name} is {tuple(tensor.shape)}, and the file holds fewer numbers."
            )


def _known_name(name: str, needs_weights: bool) -> str:
    try:
        source, identity = timm.models.parse_model_name(name)
        if source == "hf-hub":
            hf_hub_url(identity.partition("@")[0], "config.json")  # raises where it can be no repository's name
    except ValueError as error:
        raise UserError(f"unknown model {name!r}: {shortened(error)}") from error
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


def _build(name: str, *, pretrained: bool = False, **options: Any) -> Any:
    if name == BUNDLED:
        model: Any = VisionTransformer(**{"img_size": CANVAS, "num_classes": len(CLASSES), **_BUNDLED_SHAPE, **options})
        model.pretrained_cfg = dict(_BUNDLED_CFG)
        return model
    source, identity = timm.models.parse_model_name(name)
    repo, files = (identity, ["config.json"]) if source == "hf-hub" else _hub_files(name)
    try:
        if repo and (pretrained or source == "hf-hub"):
            _require_hub(repo, files)
        return timm.create_model(name, pretrained=pretrained, **options)
    except (OSError, HubError) as error:
        raise _cannot_download(name, repo, error) if source != "local-dir" else _cannot_load(name, error) from error
    except (RuntimeError, ValueError, KeyError) as error:
        if source is None:
            raise
        raise _cannot_load(name, error) from error


def _cannot_load(name: str, error: Exception) -> UserError:
    return UserError(f"cannot load model {name!r}: {shortened(error)}")


def _cannot_download(name: str, repo: str, error: Exception) -> UserError:
    page = f"https://huggingface.co/{repo.partition('@')[0]}" if repo else "its home page"
    return UserError(
        f"cannot download the weights of model {name!r} ({shortened(error)}). Without network: fetch its weights file "
        f"from {page} elsewhere and give it as --checkpoint FILE (.safetensors, .pth, .pt or .bin), or use "
        f"--model {BUNDLED}."
    )


def _hub_files(name: str) -> tuple[str, list[str]]:
    """The hub repository of a timm model ("" if it has none) and what its weights file may be called there."""
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.hf_hub_id:
        return "", []
    return cfg.hf_hub_id, [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]


def _require_hub(repo: str, files: list[str]) -> None:
    """Ask the hub once. Its own client keeps trying for the better part of a minute when there is no network."""
    repo, _, tag = repo.partition("@")
    revision = tag or None
    if any(isinstance(try_to_load_from_cache(repo, file, revision=revision), str) for file in files):
        return
    try:
        get_hf_file_metadata(hf_hub_url(repo, files[0], revision=revision), timeout=_HUB_TIMEOUT_S)
    except EntryNotFoundError:
        return  # the hub answers and has the repository, with weights under another name


def _require_positive(input_size: int) -> None:
    if input_size < 1:
        raise UserError(f"input_size must be at least 1 pixel, not {input_size}.")
    if input_size > _LARGEST_INPUT:
        raise UserError(f"input_size must be at most {_LARGEST_INPUT} pixels.")


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
        raise UserError(
            f"the weights of model {name!r} would take {needed / 2**30:,.0f} GiB, and this machine has "
            f"{there / 2**30:,.0f} GiB."
        )


def _with_timms_names(state: dict[str, Tensor], model: Any, any_size: bool) -> dict[str, Tensor]:
    """Weights as the model's authors publish them (OpenAI's CLIP, Meta's DINOv2, …) under the names timm has for them.

    The same weights where timm knows no such conversion, or where it does not lead to this model's names. timm would
    also resample patches, and positions, of another size: that is a model nobody trained, and only done to positions,
    and only if the caller asked for a size of image (`any_size`).
    """
    own = model.state_dict().keys()
    architecture = model.pretrained_cfg.get("architecture") or ""
    if state.keys() == own or not timm.models.is_model(architecture):
        return state
    convert = sys.modules[timm.models.model_entrypoint(architecture).__module__].checkpoint_filter_fn
    try:
        converted: dict[str, Tensor] = convert(dict(state), model)
    except (LookupError, RuntimeError, ValueError, TypeError, AttributeError):
        return state  # none of the formats it knows: what does not fit is then named as it stands in the file
    # What filters resample: kernels of patches, and position biases.
    kernels = [name for name in own if name.endswith(("embed.proj.weight", "embeds.proj.weight"))]
    kernels += [name for name in own if name.endswith("relative_position_bias_table") and not any_size]
    fits = converted.keys() == own and all(_was_there(state, converted[name], 0) for name in kernels)
    if fits and not any_size and "pos_embed" in converted:
        # Some formats hold the positions of prefix tokens as well.
        fits = _was_there(state, converted["pos_embed"], model.num_prefix_tokens)
    return converted if fits else state


def _was_there(state: Mapping[str, Tensor], tensor: Tensor, more_rows: int) -> bool:
    """Whether some weight in the file has as many numbers, or those of up to so many more rows."""
    sizes = {tensor.numel() + rows * tensor.shape[-1] for rows in range(more_rows + 1)}
    return any(value.numel() in sizes for value in state.values())


def _resample_positions(state: dict[str, Tensor], model: VisionTransformer | Eva) -> None:
    old, new = state.get("pos_embed"), getattr(model, "pos_embed", None)  # NaFlexVit resamples as it runs
    prefix = _embedded_prefix_tokens(model)
    if old is None or new is None or old.ndim != 3 or old.shape[1] == new.shape[1]:
        return
    if old.numel() and len(old) == 1 and math.isqrt(max(0, old.shape[1] - prefix)) ** 2 == old.shape[1] - prefix > 0:
        grid = list(model.patch_embed.grid_size)
        state["pos_embed"] = resample_abs_pos_embed(old, grid, num_prefix_tokens=prefix)


def _embedded_prefix_tokens(model: VisionTransformer | Eva) -> int:
    return 0 if getattr(model, "no_embed_class", False) else model.num_prefix_tokens


def _require_match(state: Mapping[str, Tensor], model: VisionTransformer | Eva, complaint: str, shown: int = 3) -> None:
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    file = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = [
        f"{name} is {file[name]} in the file, {own[name]} in the model"
        for name in own
        if name in file and file[name] != own[name]
    ]
    wrong += [
        f"{name} holds {str(state[name].dtype).removeprefix('torch.')} numbers"
        for name, tensor in model.state_dict().items()
        if name in file and tensor.is_floating_point() and not state[name].is_floating_point()
    ]
    wrong += [f"{name} {own[name]} is not in the file" for name in own if name not in file]
    wrong += [f"{name} {file[name]} is not in the model" for name in file if name not in own]
    if wrong:
        more = f"; and {len(wrong) - shown} more" if len(wrong) > shown else ""
        hint = _size_hint(state["pos_embed"], model) if len(wrong) == 1 and wrong[0].startswith("pos_embed is") else ""
        raise UserError(f"{complaint}: {'; '.join(wrong[:shown])}{more}.{hint}")


def _size_hint(positions: Tensor, model: VisionTransformer | Eva) -> str:
    if positions.ndim != 3:
        return ""
    side = math.isqrt(max(0, positions.shape[1] - _embedded_prefix_tokens(model)))
    return f" Its positions look like those of input_size {side * model.patch_embed.feat_ratio()}."


def _describe_input(model: Any) -> None:
    size = resolve_input_size(model, None)
    cfg = dict(model.pretrained_cfg, input_size=size, num_classes=model.num_classes)
    if len(cfg.get("label_names") or ()) != model.num_classes:
        cfg.pop("label_names", None)
    model.pretrained_cfg = cfg
