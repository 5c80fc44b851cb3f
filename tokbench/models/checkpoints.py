"""Files of weights, from anywhere: what is in them, without running what is in them."""

from __future__ import annotations

import io
import json
import pickletools
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tokbench.errors import UserError, require_file, shortened

# timm's own order: averaged weights before raw ones. The rest are names that other training scripts use: "module" is
# DeepSpeed's, "teacher" that of DINO and its followers.
_WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema",
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "teacher",
)
# How names begin that timm's own converters look for: OpenCLIP, Perception Encoder, RADIO, BEiT-3.
_MEANT = ("visual.trunk.", "visual.class_embedding", "visual.conv1.", "radio_model.", "beit3.", "blocks.")
_INDEX = ".index.json"
_GIVEN = ("checkpoint", "give the file with the weights")
# The pickles at the start of a file that torch.save wrote before it made zips: magic number, version, system, content.
_OLD_PICKLES = 4


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The weights in a file, by name, without wrappers and a prefix that all names share.

    `path`: .safetensors, an index of shards of them (`model.safetensors.index.json`), or what `torch.save` wrote.
    Nothing in it is executed: objects that are neither tensors nor plain containers are passed over. Raises UserError
    if there is nothing to read, and if the file would unpack to more than it holds.
    """
    require_file(path, *_GIVEN)
    try:
        state = _read(path)
    except UserError:
        raise
    except Exception as error:  # what a damaged or hostile file makes readers raise has no bounds
        raise UserError(f"checkpoint {str(path)!r} cannot be read: {shortened(_reason(error))}") from error
    return _strip_prefix(state)


def _reason(error: Exception) -> BaseException:
    """What stands in the way: torch hides it behind advice to let the file run programs."""
    return error.__context__ if isinstance(error, UnpicklingError) and error.__context__ else error


def count_outputs(state: Mapping[str, Tensor]) -> int | None:
    """How many outputs weights under timm's names lead to; None where their head does not tell."""
    head = state.get("head.weight")
    return len(head) if head is not None and head.ndim == 2 else None


def _read(path: Path) -> dict[str, Tensor]:
    if path.name.endswith(_INDEX):
        return _read_shards(path)
    return _find_weights(load_file(path) if path.suffix == ".safetensors" else _read_pickle(path), path)


def _read_shards(index: Path) -> dict[str, Tensor]:
    """All weights that an index of the Hugging Face kind names, from the files beside it."""
    names: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
    state: dict[str, Tensor] = {}
    for file in sorted(set(names.values())):
        shard = index.parent / file
        if shard.parent != index.parent or shard.name.endswith(_INDEX):
            raise ValueError(f"it names {file!r}, which is no file of weights beside it")
        require_file(shard, *_GIVEN)
        state |= _read(shard)
    missing = names.keys() - state.keys()
    if missing:
        raise ValueError(f"its files hold no {min(missing)}")
    return state


def _read_pickle(path: Path) -> Any:
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > size:
                raise ValueError("its parts unpack to more than the file")
            pickles = [name for name in archive.namelist() if name.lower().endswith("data.pkl")]
            names = {name for pickle in pickles for name in _globals(io.BytesIO(archive.read(pickle)))}
    else:
        try:
            with path.open("rb") as file:
                names = {name for _ in range(_OLD_PICKLES) for name in _globals(file)}
        except Exception as error:
            raise ValueError(f"it is no file of torch.save ({shortened(error)})") from error
    if "builtins.bytearray" in names:
        raise ValueError("it makes a bytearray, whose length need not be that of anything in the file")
    stand_ins: list[Any] = [(_stand_in(name), name) for name in names]
    with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of pickles that other programs wrote: they are refused, or fine
        return torch.load(path, map_location="cpu", weights_only=True)


def _globals(file: IO[bytes]) -> Iterator[str]:
    """What one pickle asks for by name, as "module.name", up to its end."""
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            yield f"{module}.{name}"


class StandIn:
    """Takes the place of an object in a pickle that is no weight, whatever that was made of."""

    def __init__(self, *args: object) -> None:
        pass

    def __new__(cls, *args: object) -> StandIn:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


def _stand_in(name: str) -> Any:
    # torch's reader fills dicts only, and gives its own classes for the names it knows.
    return (lambda *args: {}) if name == "collections.defaultdict" else type(name, (StandIn,), {})


def _find_weights(content: Any, path: Path) -> dict[str, Tensor]:
    """The first mapping with tensors, wrapped ones before what wraps them."""
    seen: set[int] = set()
    waiting: list[tuple[Any, bool]] = [(content, False)]
    while waiting:
        mapping, opened = waiting.pop()
        if opened:
            # torch's AveragedModel counts its updates in a tensor of its own
            state = {str(k): v for k, v in mapping.items() if isinstance(v, Tensor) and k != "n_averaged"}
            if state:
                _require_stored(state, path)
                return state
        elif isinstance(mapping, Mapping) and id(mapping) not in seen:
            seen.add(id(mapping))
            waiting.append((mapping, True))
            waiting += [(mapping[key], False) for key in reversed(_WRAPPERS) if key in mapping]
    raise UserError(f"checkpoint {str(path)!r} holds no weights but {_found(content)}; save model.state_dict().")


def _found(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    entries = [
        f"{key} (a {type(value).__name__})" if isinstance(value, StandIn) else str(key)
        for key, value in list(content.items())[:5]
    ]
    return f"only {', '.join(entries) or 'an empty dict'}"


def _strip_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what wrappers of modules put before every name: module., _orig_mod., model., net., backbone., …"""
    while True:
        firsts = {name.partition(".")[0] for name in state}
        if "backbone" in firsts and all("head" in first for first in firsts - {"backbone"}):
            # DINO, iBOT and DINOv2 train a projection beside the backbone, which nobody measures.
            state = {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}
        elif len(firsts) > 1 or any("." not in name or name.startswith(_MEANT) for name in state):
            return state
        state = {name.partition(".")[2]: tensor for name, tensor in state.items()}


def _require_stored(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse shapes that a file claims without holding the numbers: they would fill the memory."""
    for name, tensor in state.items():
        if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided:
            raise UserError(
                f"checkpoint {str(path)!r}: {name} is a sparse, quantized or meta tensor; save plain dense ones."
            )
        held = min(tensor.untyped_storage().nbytes(), path.stat().st_size)
        if held < tensor.numel() * tensor.element_size():
            raise UserError(
                f"checkpoint {str(path)!r}: {name} is {tuple(tensor.shape)}, and the file holds fewer numbers."
            )
