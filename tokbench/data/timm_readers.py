"""What timm opens: torchvision and Hugging Face data sets, WebDataset shards, TensorFlow data sets."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data.dataset_factory import create_dataset
from torch import nn
from torch.utils.data import IterableDataset

from tokbench.config import DATA_PACKAGES
from tokbench.data.decoding import ImageError, decode, unreadable
from tokbench.data.folders import EXTENSIONS, SPLITS
from tokbench.data.labels import Labelling, label_classes, label_numbers, some
from tokbench.data.preparing import data_config, image_mode, preparation
from tokbench.data.sources import Images, ImageSource, ImageStream, Preparation, StreamItem, choose, fingerprint
from tokbench.errors import UserError, nearest, shortened
from tokbench.models import HubError

# How timm, torchvision and the packages behind them say what is wrong with a name, split, folder or column.
_OPENING_ERRORS = (AssertionError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError, HubError)


@dataclass(frozen=True)
class _TimmSpec:
    kind: str
    name: str
    options: dict[str, str]

    def __str__(self) -> str:
        """What records call the data: where a folder lies is no part of it."""
        return f"{self.kind}/{Path(self.name).name if Path(self.name).is_dir() else self.name}"


def open_timm(kind: str, rest: str, model: nn.Module, limit: int | None) -> ImageSource | ImageStream:
    spec = _parse_timm(kind, rest)
    mode, what = image_mode(data_config(model)), f"data {str(spec)!r}"
    if kind == "wds" and (tars := _plain_tars(spec)):
        return _open_tars(spec, tars, preparation(model, label_numbers(model, what)), limit)
    opened = _create(spec, mode, limit)
    classes = _timm_classes(opened)
    prepare = preparation(model, label_classes(classes, model, what) if classes else label_numbers(model, what))
    identity = (str(spec), spec.options.get("split", "validation"), *(classes or ()))
    known = len(opened)  # 0 where nobody knows how long a stream is
    if not isinstance(opened, IterableDataset):
        images = _decoding(opened, str(spec))
        _try_first(images, spec, prepare.labelling)
        chosen = choose(known, limit)
        return ImageSource(str(spec), images, chosen, prepare, fingerprint(*identity, str(known), chosen))
    length = known if limit is None else min(limit, known or limit)
    if not length:
        raise UserError(f"data {str(spec)!r} does not tell how many images it has: say how many with --limit N.")
    images_in_order = _streaming(spec, opened, prepare.labelling)
    # For hfids/ timm repeats the limit it was given as the length.
    promised = spec.kind != "hfids" and known > 0
    return ImageStream(str(spec), images_in_order, length, prepare, fingerprint(*identity, str(length)), promised)


def _parse_timm(kind: str, rest: str) -> _TimmSpec:
    package, allowed = DATA_PACKAGES[kind]
    name, *given = re.split(r":(?=[a-z_]+=)", rest, maxsplit=1)
    pairs = re.split(r",(?=[a-z_]+=)", given[0]) if given else []
    options = dict(pair.split("=", 1) for pair in pairs)
    for key in options:
        if key not in allowed:
            close = nearest(key, allowed) or f" It takes {', '.join(allowed)}."
            raise UserError(f"data '{kind}/{rest}': unknown option {key!r}.{close}")
    if not name:
        raise UserError(f"data '{kind}/{rest}' names no data set; 'tokbench list data' shows the forms.")
    if kind == "torch" and "root" not in options:
        raise UserError(f"data '{kind}/{rest}': say where its files are, as in torch/{name}:root=FOLDER.")
    if importlib.util.find_spec(package) is None:
        raise UserError(f"data '{kind}/{rest}' needs a package: pip install {package.replace('_', '-')}")
    return _TimmSpec(kind, name, options)


def _create(spec: _TimmSpec, mode: str, limit: int | None) -> Any:
    options: dict[str, Any] = {"split": "validation", **spec.options}
    options["download"] = options.get("download", "false").lower() in ("true", "1", "yes")
    if spec.kind == "wds":
        options["root"] = spec.name
    if spec.kind == "hfids":
        options["num_samples"] = limit
    try:
        return create_dataset(f"{spec.kind}/{spec.name}", input_img_mode=mode, **options)
    except _OPENING_ERRORS as error:
        raise UserError(f"data {str(spec)!r} cannot be opened: {shortened(error)}") from error


def _plain_tars(spec: _TimmSpec) -> list[Path]:
    """The shards of the split asked for, else of a validation split, else all, in a folder without timm's info.json.

    Empty for what timm opens. Raises UserError where there are none for the split.
    """
    folder, split = Path(spec.name).expanduser(), spec.options.get("split")
    told = any((folder / name).is_file() for name in ("info.json", "_info.json"))
    if told or not folder.is_dir() or split and ("tar" in split or ".." in split):
        return []
    tars = sorted(folder.rglob("*.tar"))
    wanted = {split} if split else set(SPLITS)
    named = [tar for tar in tars if wanted & set(re.split(r"[\W_]+", tar.relative_to(folder).as_posix()))]
    if not tars or split and not named:
        has = f"its shards are {some([tar.name for tar in tars])}" if tars else "it holds no .tar file"
        raise UserError(f"data {str(spec)!r} has no shards{f' of split {split!r}' if split else ''}: {has}.")
    if not named and all("train" in tar.relative_to(folder).as_posix() for tar in tars):
        raise UserError(f"data {str(spec)!r} has only a training split; if you mean it, add :split=train.")
    return named or tars


def _open_tars(spec: _TimmSpec, tars: list[Path], prepare: Preparation, limit: int | None) -> ImageStream:
    """Shards that tell nothing of themselves: counted here, images by every ending, labels in .cls or a JSON field."""
    try:
        count = sum(len(_samples(tar)) for tar in tars)
        sizes = [f"{tar.name} {tar.stat().st_size}" for tar in tars]
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"data {str(spec)!r} cannot be opened: {shortened(error)}") from error
    keys = spec.options.get("input_key", ";".join(ending[1:] for ending in EXTENSIONS)).split(";")
    images = _Shards(tuple(map(str, tars)), tuple(keys), spec.options.get("target_key"), prepare.labelling)
    length = count if limit is None else min(limit, count)
    return ImageStream(str(spec), images, length, prepare, fingerprint(str(spec), *sizes, str(length)), promised=True)


def _samples(tar: Path) -> set[str]:
    """What WebDataset takes for a sample: files of one name up to its first dot."""
    with tarfile.open(tar, "r:") as archive:
        names = [member.name for member in archive if member.isfile()]
    return {found[0] for name in names if (found := re.match(r"(?:.*/)?[^./]+(?=\.[^/]*$)", name))}


@dataclass(frozen=True)
class _Read:
    """Images of a timm reader. timm's own data set answers with the next image for one that it cannot decode."""

    name: str
    reader: Any

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int | str | None]:
        file, label, *_ = self.reader[index]
        return decode(file, f"{self.name}, number {index}"), label


def _decoding(opened: Any, name: str) -> Images:
    """A data set of timm's or torchvision's with our way to decode files, where it reads files."""
    if hasattr(opened, "reader"):
        return _Read(name, opened.reader)
    if hasattr(opened, "loader"):
        opened.loader = _load
    return opened


def _streaming(spec: _TimmSpec, opened: Any, labelling: Labelling) -> Iterable[StreamItem]:
    """A stream of timm's with our way to decode files, where they come as files: timm drops what it cannot decode."""
    reader = getattr(opened, "reader", None)
    if spec.kind == "wds" and reader is not None:
        key = reader.target_key or reader.split_info.alt_label
        shards = tuple(os.path.join(reader.root, name) for name in reader.split_info.filenames)
        return _Shards(shards, tuple(reader.input_key.split(";")), key or None, labelling)
    if spec.kind == "hfids" and reader is not None:
        return _Rows(str(spec), reader)
    return opened


@dataclass(frozen=True)
class _Shards:
    """The images of WebDataset shards, in order. A shard that cannot be read raises, after the images before it."""

    shards: tuple[str, ...]
    image_keys: tuple[str, ...]
    target_key: str | None
    labelling: Labelling

    def __iter__(self) -> Iterator[StreamItem]:
        webdataset: Any = importlib.import_module("webdataset")
        for sample in webdataset.DataPipeline(
            webdataset.SimpleShardList(list(self.shards)), webdataset.tarfile_to_samples()
        ):
            yield _item(self._read, sample, f"{Path(str(sample['__url__'])).name}/{sample['__key__']}")

    def _read(self, sample: dict[str, Any], name: str) -> StreamItem:
        key = next((key for key in self.image_keys if key in sample), None)
        if key is None:
            raise ValueError(f"no {' or '.join(self.image_keys)} among its files")
        label = sample["cls"].decode().strip() if "cls" in sample else None
        if self.target_key:
            label = json.loads(sample["json"])[self.target_key]
        self.labelling(label)  # what it raises is said of the image by its name
        return decode(io.BytesIO(sample[key]), name), label


@dataclass(frozen=True)
class _Rows:
    """The images of a Hugging Face data set, in order, without its own decoding: that ends at the first bad image."""

    name: str
    reader: Any

    def __iter__(self) -> Iterator[StreamItem]:
        datasets: Any = importlib.import_module("datasets")
        reader = self.reader
        if reader.download:
            rows = reader.builder.as_dataset(split=reader.split).to_iterable_dataset()
        else:
            rows = reader.builder.as_streaming_dataset(split=reader.split)
        for place, row in enumerate(rows.cast_column(reader.input_key, datasets.Image(decode=False))):
            yield _item(self._read, row, f"{self.name}, number {place}")

    def _read(self, row: dict[str, Any], name: str) -> StreamItem:
        image = row[self.reader.input_key]
        file = io.BytesIO(image["bytes"]) if image["bytes"] is not None else Path(image["path"])
        return decode(file, name), row[self.reader.target_key]


def _item(read: Callable[[dict[str, Any], str], StreamItem], sample: dict[str, Any], name: str) -> StreamItem:
    """What `read` makes of a sample, or why it cannot: an image or a label may be missing, or be none."""
    try:
        return read(sample, name)
    except ImageError as error:
        return error
    except Exception as error:
        return unreadable(name, shortened(error))


def _load(path: str) -> Image.Image:
    return decode(Path(path), path)


def _try_first(images: Images, spec: _TimmSpec, labelling: Labelling) -> None:
    """Read one image now, as a wrong column or a name that the model does not know shows only then."""
    hint = "input_key and target_key name its columns" if spec.kind == "hfds" else "are its files complete?"
    try:
        _, label = images[0]
    except ImageError:
        return  # one image that cannot be decoded says nothing about the others
    except _OPENING_ERRORS as error:
        raise UserError(f"data {str(spec)!r}: its first image cannot be read ({shortened(error)}); {hint}.") from error
    if not isinstance(label, int | np.integer | str | None):
        raise UserError(f"data {str(spec)!r} has {type(label).__name__} labels, not class numbers; {hint}.")
    try:
        labelling(label)
    except ValueError as error:
        raise UserError(f"data {str(spec)!r}, first image: {error}.") from error


def _timm_classes(opened: Any) -> list[str] | None:
    """Class names in the data set's own order: wnids where torchvision has them, None where nobody knows."""
    reader = getattr(opened, "reader", None)
    index = getattr(reader, "class_to_idx", None)
    if index:
        return sorted(index, key=index.__getitem__)
    names = getattr(opened, "wnids", None) or getattr(opened, "classes", None)
    return [*map(str, names)] if names else None
