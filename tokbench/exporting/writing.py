"""`export`: write a model to a file, open it again, and show that it answers as the model does."""

from __future__ import annotations

import copy
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tokbench.data import load_images
from tokbench.data.labels import model_names
from tokbench.data.preparing import data_config
from tokbench.errors import RunStopped, UserError, shortened
from tokbench.exporting.formats import FORMATS, find_format
from tokbench.exporting.runtimes import INPUT, OUTPUT, RUNTIMES, Run
from tokbench.fusion.patch import fork, require_supported
from tokbench.measure._model import placement, resolve_input_size
from tokbench.measure.compiled import compile_model
from tokbench.measure.environment import package_versions
from tokbench.models import weights_sha256

# Batches in which a file of dynamic batch is compared with its model, and what rounding alone may make of outputs of
# size 1 on the way: fp32 runtimes agree to the sixth digit.
BATCHES = (1, 3, 16)
_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
_WIDER = {torch.float32: torch.float64, torch.float16: torch.float32, torch.bfloat16: torch.float32}


@dataclass(frozen=True)
class Compared:
    """How a file's outputs differ from its model's.

    images: how many were shown, in batches of the sizes `batches`. largest_difference: of any output. same_answers: the
    share of images with the same class, None where there are no classes.
    """

    images: int
    batches: tuple[int, ...]
    largest_difference: float
    same_answers: float | None


@dataclass(frozen=True)
class Exported:
    """A file that was written, the JSON beside it that describes it, and how it compares with the model."""

    path: Path
    description: Path
    compared: Compared

    def text(self) -> str:
        """For people."""
        found = self.compared
        answers = "" if found.same_answers is None else f", {found.same_answers:.1%} equal answers"
        batches = ", ".join(map(str, found.batches))
        return (
            f"{self.path} gives what the model gives: largest difference {found.largest_difference:.1e}{answers} on "
            f"{found.images} images, in batches of {batches}\n{self.description} describes it"
        )


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    batch: int | Literal["dynamic"] = "dynamic",
    images: Tensor | None = None,
    about: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Exported:
    """Write a timm ViT, with the method that is in it, to a file; the model stays as it is.

    The file takes `images` (B, C, H, W), preprocessed, of the model's dtype and size, and gives `output` (B, D). It is
    opened again and compared with the model before it gets its name. `path` + ".json" says what is in it: model, hash
    of the weights, method, preprocessing, class names, versions.

    Args:
        model: on the device and in the dtype that it is to run in; it is exported in eval mode.
        path: ends in .onnx (needs `tokbench[onnx]`) or .pt2 (torch.export).
        format: "onnx" or "pt2"; by default what `path` ends in.
        batch: the only batch size that the file takes, or "dynamic" for any.
        images: (B, C, H, W) to compare on; by default 20 bundled ones as the model takes them.
        about: more to say in the JSON.
        force: replace a file that is there.

    Raises:
        UserError: a file that cannot be written, a package that is missing, a model that cannot be exported.
        RunStopped: the file's outputs differ from the model's by more than rounding; it was removed.
    """
    path = Path(path)
    name = find_format(path, format)
    kind = FORMATS[name]
    kind.require_packages(name)
    require_free(path, force)
    require_supported(model)
    if batch != "dynamic" and batch < 1:
        raise UserError(f"batch must be at least 1 image or 'dynamic', not {batch}")
    shown = _batches((default_images(model) if images is None else images).to(*placement(model)), batch)
    model = fork(model).eval()
    with TemporaryDirectory(dir=path.parent, prefix=".export-") as folder, torch.no_grad():
        file = Path(folder, path.name)
        with _refusing(model, name):
            kind.write(_trace(model, batch), file)
            opened = kind.open(file)
            found = torch.cat([opened(part) for part in shown])
        compared = _compare(model, found, shown, path)
        described = describe(model, name, batch) | dict(about or {}) | {"compared": asdict(compared)}
        description = _description(path)
        Path(folder, description.name).write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n")
        for part in Path(folder).iterdir():  # weights of more than 2 GB are a file of their own
            os.replace(part, path.with_name(part.name))
    return Exported(path, description, compared)


@contextmanager
def _refusing(model: nn.Module, name: str) -> Iterator[None]:
    """Raise UserError for what cannot be exported to that format."""
    with _quiet():
        try:
            yield
        except Exception as error:
            raise UserError(f"{_called(model)} cannot be exported as {name}: {_reason(error)}") from error


class Opened(nn.Module):
    """What a runtime made of a model, called as the model is: images (B, C, H, W) to outputs (B, D)."""

    def __init__(self, run: Run, model: nn.Module) -> None:
        super().__init__()
        device, dtype = placement(model)
        self.run = run
        self.place = nn.Parameter(torch.empty(0, device=device, dtype=dtype), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.run(images)


def in_runtime(model: nn.Module, name: str, files: Path) -> nn.Module:
    """A model as one of `RUNTIMES` runs it; the model stays as it is. files: a folder for what is exported meanwhile.

    Raises UserError for a model that cannot be exported, and what the runtime raises.
    """
    runtime = RUNTIMES[name]
    if name == "compile":
        return compile_model(fork(model))
    if runtime.open is None:
        return model
    file = files / f"{id(model)}.onnx"
    if not file.exists():  # else another runtime has opened it
        with _refusing(model, "onnx"), torch.no_grad():
            FORMATS["onnx"].write(_trace(fork(model).eval(), "dynamic"), file)
    device, _ = placement(model)
    with _quiet():
        return Opened(runtime.open(file, device, runtime.provider(device)), model)


def describe(model: nn.Module, format: str, batch: int | Literal["dynamic"]) -> dict[str, Any]:
    """What whoever serves the file has to know, ready for JSON."""
    config = data_config(model)
    fusion: Any = getattr(model, "fusion", None)
    known: Any = getattr(model, "pretrained_cfg", None) or {}
    _, dtype = placement(model)
    keys = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
    return {
        "format": format,
        "input": {"name": INPUT, "shape": [batch, *config["input_size"]], "dtype": str(dtype).partition(".")[2]},
        "output": {"name": OUTPUT},
        "model": known.get("architecture") or type(model).__name__,
        "weights_sha256": weights_sha256(model),
        "method": fusion.method.name if fusion else "none",
        "params": fusion.method.parameters() if fusion else {},
        "schedule": str(fusion.schedule) if fusion else "",
        "preprocessing": {key: config[key] for key in keys if key in config},
        "classes": list(model_names(model).shown),
        "versions": package_versions() | {package: version(package) for package in FORMATS[format].packages},
    }


def default_images(model: nn.Module) -> Tensor:
    """Bundled images as the model takes them, random ones where it takes neither grey nor colour: (20, C, H, W)."""
    size, count = resolve_input_size(model, None), sum(BATCHES)
    if size[0] in (1, 3):
        return load_images([f"bundled:{number + 1}" for number in range(count)], model)
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(0))


def require_free(path: Path, force: bool) -> None:
    """Raise UserError unless a file can be written there; force: one that is there may be replaced."""
    if not path.parent.is_dir():
        raise UserError(f"the folder {str(path.parent)!r} does not exist")
    for file in (path, _description(path)):
        if file.is_dir():
            raise UserError(f"{str(file)!r} is a folder")
        if file.exists() and not force:
            raise UserError(f"{str(file)!r} is there already; --force replaces it")


def _description(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _batches(images: Tensor, batch: int | Literal["dynamic"]) -> list[Tensor]:
    """All images, in batches of the sizes to compare at; repeated, where they are too few to fill them."""
    sizes = list(BATCHES if batch == "dynamic" else (batch,))
    missing = sum(sizes) - len(images)
    images = images[torch.arange(max(sum(sizes), len(images))) % len(images)] if missing > 0 else images
    rest = len(images) - sum(sizes)
    sizes += [sizes[-1]] * (rest // sizes[-1])
    return list(images[: sum(sizes)].split(sizes))


def _trace(model: nn.Module, batch: int | Literal["dynamic"]) -> torch.export.ExportedProgram:
    device, dtype = placement(model)
    example = torch.rand(BATCHES[1] if batch == "dynamic" else batch, *resolve_input_size(model, None))
    shapes = ({0: torch.export.Dim("batch")},) if batch == "dynamic" else None
    return torch.export.export(model, (example.to(device, dtype),), dynamic_shapes=shapes)


def _compare(model: nn.Module, outputs: Tensor, batches: list[Tensor], path: Path) -> Compared:
    """Raises RunStopped where a file's outputs (B, D) differ by more than rounding may make of them."""
    _, dtype = placement(model)
    expected, found = torch.cat([model(images) for images in batches]).cpu().double(), outputs.cpu().double()
    largest = float((found - expected).abs().max())
    classes = expected.shape[1] > 1 and getattr(model, "num_classes", 0) > 0
    same = float((found.argmax(1) == expected.argmax(1)).double().mean()) if classes else None
    limit = _ROUNDING[dtype] * max(1.0, float(expected.abs().max()))
    if not largest <= limit and dtype in _WIDER:
        # Tokens whose scores are nearly equal change places by rounding alone, here as in any runtime.
        wider = copy.deepcopy(model).to(_WIDER[dtype])
        exact = torch.cat([wider(images.to(_WIDER[dtype])) for images in batches]).cpu().double()
        limit = max(limit, 2 * float((exact - expected).abs().max()))
    if not largest <= limit:
        answers = "" if same is None else f", {same:.1%} equal answers"
        raise RunStopped(
            f"{str(path)!r} differs from the model by {largest:.2g}{answers}, and rounding explains {limit:.2g}: "
            "it was removed"
        )
    return Compared(len(expected), tuple(dict.fromkeys(len(images) for images in batches)), largest, same)


def _called(model: nn.Module) -> str:
    fusion: Any = getattr(model, "fusion", None)
    method = f"method {fusion.method.name!r} in " if fusion else ""
    return f"{method}a {type(model).__name__.removeprefix('Reduced')}"


def _reason(error: BaseException) -> str:
    """What was wrong in the first place: exporters wrap it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return shortened(error)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say of themselves."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
