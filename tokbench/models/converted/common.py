"""What conversions share: files of a folder or the hub, names, and preprocessing in timm's terms."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokbench.errors import UserError, shortened
from tokbench.models import hub
from tokbench.models.checkpoints import read_checkpoint

# What values that no library writes lead to, in reading a configuration and in building what it says.
MISUNDERSTOOD = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError)

Rules = Sequence[tuple[str, str]]

# What other libraries call the activations, and timm's names for them.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}
# Pillow's numbers.
INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


@dataclass(frozen=True)
class Conversion:
    """A model in timm's terms.

    Attributes:
        build: makes the model; takes timm's `img_size` to make it at another size than that of the positions.
        state: weights under timm's names, positions as they are stored; None if there are none yet.
        path: the file they are from.
        input_size: the side of the images it is given, where that is not what its positions are for.
        antialias: whether the library resamples positions with antialiasing.
    """

    build: Callable[..., Any]
    state: dict[str, Tensor] | None
    path: Path | None
    input_size: int | None = None
    antialias: bool = True


class Repository:
    """The files of a folder, or of a repository on the hub."""

    def __init__(self, name: str, place: str) -> None:
        """`place`: a folder, or "OWNER/NAME" or "OWNER/NAME@REVISION"; `name`: what the user called it."""
        self.name, self.place = name, place
        self.folder = Path(place).expanduser()
        self.is_local = bool(place) and self.folder.is_dir()
        if not self.is_local and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", place):
            raise UserError(f"model {name!r}: there is no folder {place!r}, and it is no OWNER/NAME of the hub.")

    def file(self, name: str) -> Path | None:
        """The path of a file, downloaded if it has to be; None if there is none of that name."""
        if self.is_local:
            path = self.folder / name
            return path if path.is_file() else None
        try:
            return hub.fetch(self.place, name)
        except (OSError, hub.HubError, ValueError) as error:
            library = self.name.partition(":")[0]
            way_out = f"fetch its configuration and weights from PAGE elsewhere and give --model {library}:FOLDER"
            raise hub.cannot_download(self.name, self.place, error, way_out) from error

    def _first(self, names: Sequence[str], hint: str = "") -> Path:
        path = next(filter(None, map(self.file, names)), None)
        if path is None:
            raise UserError(f"model {self.name!r}: {self.place} has no {' or '.join(names)}{hint}.")
        return path

    def read_json(self, *names: str) -> dict[str, Any]:
        """The first of these files that there is. Raises UserError if there is none, or it is no JSON object."""
        path = self._first(names)
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise UserError(f"model {self.name!r}: {path} is no JSON: {shortened(error)}") from error
        if not isinstance(content, dict):
            raise UserError(f"model {self.name!r}: {path} holds no JSON object.")
        return content

    def weights(self, *names: str) -> Path:
        """The first of these files that there is, with the shards that it names if it is an index."""
        path = self._first(names, "; give --checkpoint FILE")
        if not self.is_local and path.name.endswith(".index.json"):
            for shard in sorted(set(self.read_json(path.name)["weight_map"].values())):
                self.file(shard)
        return path


def read_weights(path: Path, rules: Rules, unused: str, tower: str = "") -> dict[str, Tensor]:
    """The weights of a file under timm's names.

    Args:
        path: as for `read_checkpoint`.
        rules: regular expressions and what to put in their place, one after the other. Names that end up as
            `NAME[0].weight`, `NAME[1].weight`, … are joined to NAME.weight, row by row.
        unused: how names begin, after that, which do not belong to the image classifier.
        tower: how all of the model's names begin, if any name in the file does.
    """
    stored = read_checkpoint(path)
    state: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in ({n: t for n, t in stored.items() if n.startswith(tower)} or stored).items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if re.match(unused, name):
            continue
        if tensor.ndim and name in ("cls_token", "reg_token", "dist_token", "pos_embed", "attn_pool.latent"):
            tensor = tensor.reshape(1, -1, tensor.shape[-1])
        if "[" in name:
            parts[re.sub(r"\[\d\]", "", name)][name] = tensor
        else:
            state[name] = tensor
    for name, found in parts.items():
        try:
            state[name] = torch.cat([found[key] for key in sorted(found)])
        except RuntimeError as error:
            raise UserError(f"checkpoint {str(path)!r}: the parts of {name} do not fit each other.") from error
    return state


def add_zero_bias(state: dict[str, Tensor], layer: str) -> None:
    """Zeros for the bias of a layer that timm has with one, and the file without."""
    weight = state.get(f"{layer}.weight")
    if weight is not None and weight.ndim:
        state.setdefault(f"{layer}.bias", torch.zeros(len(weight)))


def cannot_understand(name: str, error: Exception) -> UserError:
    return UserError(f"model {name!r}: its configuration cannot be understood ({shortened(error)}).")


def builder(
    name: str, kind: Callable[..., Any], arguments: Mapping[str, Any], cfg: Mapping[str, Any]
) -> Callable[..., Any]:
    """Something that builds a `kind` with these arguments, or others in their place, and this `pretrained_cfg`.

    `name`: what the user called the model.
    """

    def build(**options: Any) -> Any:
        try:
            model = kind(**{**arguments, **options})
        except MISUNDERSTOOD as error:
            raise cannot_understand(name, error) from error
        model.pretrained_cfg = {"fixed_input_size": True, "first_conv": "patch_embed.proj", **cfg}
        return model

    return build


def mlp_ratio(hidden: int, width: int) -> float:
    """The ratio from which timm, which cuts off decimals, gets just this number of hidden units."""
    return (hidden + 0.5) / width if int(width * (hidden / width)) != hidden else hidden / width


def crop(image: int, resized: int) -> float:
    """The part of a resized image that is kept, such that timm, which cuts off decimals, resizes to just that."""
    return image / resized if math.floor(image / (image / resized)) == resized else image / (resized + 0.5)
