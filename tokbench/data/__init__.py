"""Images to measure accuracy on: the bundled ones, folders, and whatever timm opens, labelled as the model counts."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import logging
import os
import re
import signal
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.dataset_factory import create_dataset
from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
from timm.data.transforms_factory import create_transform
from timm.utils.misc import natural_key
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, get_worker_info

from tokbench.bundled.clutter import CLASSES, Layout, compose, draw_layout, read_idx
from tokbench.config import DATA_PACKAGES, require_folder
from tokbench.errors import UserError, nearest, printable, shortened
from tokbench.images import ImageError, Skipped, decode
from tokbench.measure._model import resolve_input_size
from tokbench.models import HubError

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".jfif")
_SPLIT_FOLDERS = ("validation", "val", "valid", "eval", "evaluation", "test")
# How timm, torchvision and the packages behind them say what is wrong with a name, split, folder or column.
_OPENING_ERRORS = (
    AssertionError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    HubError,
)
_BUNDLED = Path(__file__).parents[1] / "bundled"
_logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Images (B, C, H, W) and labels (B,) of the places before `end` that no earlier batch held, without the skipped
    ones: B may be 0."""

    images: Tensor
    labels: Tensor
    skipped: list[Skipped]
    end: int


class Images(Protocol):
    """Images in their own form and class order. Pickleable."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


@dataclass(frozen=True)
class Preparation:
    """From an image and its data set's label to what the model takes, and how the model numbers its classes."""

    mode: str
    transform: Any
    labels: list[int] | None

    def __call__(self, image: Image.Image, label: int | None) -> tuple[Tensor, int]:
        tensor: Tensor = self.transform(image.convert(self.mode))
        if label is None or label < 0:
            return tensor, -1
        return tensor, int(label) if self.labels is None else self.labels[label]


class ImageSource(Dataset[tuple[Tensor, int]]):
    """Images by index: `source[i]` is (preprocessed (C, H, W) float tensor, label in the model's order, −1 = none).

    name: short, for titles. fingerprint: sha256 (hex) of which images these are, in which order; it does not depend on
    the model. classes: their names in the data's own order, None where they have none. num_classes: how many classes
    the data has (the model's, where the data does not tell). indices: (n,), their places in the whole data set,
    ascending. streaming: False.
    """

    streaming = False

    def __init__(
        self,
        name: str,
        images: Images,
        chosen: np.ndarray,
        prepare: Preparation,
        fingerprint: str,
        classes: list[str] | None,
        num_classes: int,
    ):
        self.name, self.fingerprint = name, fingerprint
        self.classes, self.num_classes = classes, num_classes
        self.indices = chosen
        self._images, self._prepare = images, prepare

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        place = int(self.indices[index])
        try:
            image, label = self._images[place]
            return self._prepare(image, label)
        except ImageError:
            raise
        except Exception as error:  # whatever a data set's own reader stumbles over is about this image only
            name, reason = f"{self.name}, number {place}", shortened(error)
            raise ImageError(f"image {name!r} cannot be read: {reason}", name, reason) from error


class ImageStream(IterableDataset[tuple[Tensor, int]]):
    """The first `length` images of a stream; attributes and items as ImageSource's. streaming: True.

    images: gives, for every place in order, an image and its label, or the ImageError that says why there is none.
    promised: the data itself says that it has so many images, so that those that do not come are skipped ones.
    One DataLoader worker at most: several would share out the shards, so that the first images would be others.
    """

    streaming = True

    def __init__(
        self,
        name: str,
        images: Iterable[tuple[Image.Image, int] | ImageError],
        length: int,
        prepare: Preparation,
        fingerprint: str,
        classes: list[str] | None,
        num_classes: int,
        promised: bool = False,
    ):
        self.name, self.fingerprint = name, fingerprint
        self.classes, self.num_classes = classes, num_classes
        self.indices = np.arange(length)
        self._images, self._length, self._prepare, self._promised = images, length, prepare, promised

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        for item in self.items():
            if isinstance(item, Skipped):
                raise ImageError(f"image {item.name!r} cannot be read: {item.reason}", item.name, item.reason)
            yield item

    def items(self) -> Iterator[tuple[Tensor, int] | Skipped]:
        """What iterating gives, but for images that cannot be had: these are named and not raised."""
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ImageError(f"the stream {self.name!r} is read in order by one process: use --workers 0 or 1.")
        count = 0
        for item in itertools.islice(self._images, self._length):
            yield self._prepared(count, item)
            count += 1
        if not count:
            raise ImageError(f"the stream {self.name!r} gives no images: are its folder and split right?")
        if count < self._length:
            _logger.warning("the stream %r ended after %d of %d images", self.name, count, self._length)
        for place in range(count, self._length if self._promised else count):
            yield Skipped(place, f"{self.name}, number {place}", "the stream ended before it")

    def _prepared(self, place: int, item: tuple[Image.Image, int] | ImageError) -> tuple[Tensor, int] | Skipped:
        if isinstance(item, ImageError):
            return Skipped(place, item.name, item.reason)
        try:
            return self._prepare(*item)
        except Exception as error:  # as in ImageSource
            return Skipped(place, f"{self.name}, number {place}", shortened(error))


def load_batches(
    source: ImageSource | ImageStream, batch_size: int, *, workers: int = 0, start: int = 0
) -> Iterator[Batch]:
    """The images of a source from place `start` on, which must be 0 for a stream, `batch_size` places at a time.

    An image that cannot be decoded is skipped, and named in its batch.
    """
    images: Any
    if isinstance(source, ImageStream):
        images = _ForgivingStream(source)
    else:
        images = Subset(_Forgiving(source), range(start, len(source)))
    end = start
    loader = DataLoader(
        images, batch_size=batch_size, num_workers=workers, collate_fn=list, worker_init_fn=_end_without_a_word
    )
    for items in loader:
        end += len(items)
        good = [item for item in items if not isinstance(item, Skipped)]
        labels = torch.tensor([label for _, label in good], dtype=torch.long)
        stack = torch.stack([image for image, _ in good]) if good else torch.empty(0)
        yield Batch(stack, labels, [item for item in items if isinstance(item, Skipped)], end)


def _end_without_a_word(worker: int) -> None:
    """A worker ends with the process that made it, without the handlers it inherited and without a word."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.excepthook = _unless_nobody_reads


def _unless_nobody_reads(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """What the thread says that hands images over, but for the loss of the process that took them."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


class _Forgiving(Dataset[tuple[Tensor, int] | Skipped]):
    """A source that says which images it cannot decode instead of raising."""

    def __init__(self, source: ImageSource):
        self.source = source

    def __getitem__(self, index: int) -> tuple[Tensor, int] | Skipped:
        try:
            return self.source[index]
        except ImageError as error:
            return Skipped(index, error.name, error.reason or str(error))


class _ForgivingStream(IterableDataset[tuple[Tensor, int] | Skipped]):
    """A stream likewise."""

    def __init__(self, source: ImageStream):
        self.source = source

    def __iter__(self) -> Iterator[tuple[Tensor, int] | Skipped]:
        return self.source.items()


def open_dataset(spec: str, model: nn.Module, *, limit: int | None = None) -> ImageSource | ImageStream:
    """Open images and labels with the preprocessing of the model's timm configuration.

    Args:
        spec: what `tokbench list data` shows, such as "bundled" or a folder.
        model: a timm model.
        limit: so many images at most; a fixed random subset in the data's order (a smaller limit takes a part of a
            larger one's), or a stream's first.

    Raises:
        UserError: one line, for anything that cannot be opened or labelled.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1 image, not {limit}.")
    if spec == "bundled":
        return _open_bundled(model, limit)
    if not spec:
        raise UserError("data is empty; give bundled, a folder of class folders, or what 'tokbench list data' shows.")
    kind, slash, rest = spec.partition("/")
    if slash and kind.lower() in DATA_PACKAGES:
        return _open_timm(kind.lower(), rest, model, limit)
    return _open_folder(Path(os.path.expanduser(spec)), model, limit)


def load_images(names: Sequence[str], model: nn.Module) -> Tensor:
    """Single images as the model takes them: (B, C, H, W), preprocessed by the model's timm configuration.

    names: files, or `bundled:17` for the 17th bundled image. Raises UserError naming the one that cannot be read.
    """
    prepare = _preparation(model, None)
    return torch.stack([prepare(_single_image(name), None)[0] for name in names])


def to_pictures(images: Tensor, model: nn.Module) -> np.ndarray:
    """What a model sees, to look at: preprocessed (B, C, H, W) → (B, H, W, 3), values from 0 to 1."""
    config = _data_config(model)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("mean", "std"))
    colors = (images * std + mean).clamp(0, 1).expand(-1, 3, -1, -1)
    pictures: np.ndarray = colors.permute(0, 2, 3, 1).numpy()
    return pictures


def _single_image(name: str) -> Image.Image:
    kind, _, number = name.partition(":")
    if kind == "bundled":
        composites = _read_composites()
        if not (number.isdecimal() and 1 <= int(number) <= len(composites)):
            raise UserError(f"image {name!r}: bundled images are bundled:1 to bundled:{len(composites)}.")
        return composites[int(number) - 1][0]
    path = Path(os.path.expanduser(name))
    try:
        is_folder, is_there = path.is_dir(), path.exists()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise UserError(f"image {name[:100]!r} cannot be read: {error.strerror}.") from error
    if is_folder:
        raise UserError(f"image {name!r} is a folder; give single images, such as those in it.")
    if not is_there:
        siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"image {name!r} does not exist.{nearest(path.name, siblings)}")
    return _Files(path.parent, [(path.name, -1)])[0][0]


# --- the bundled composites


@dataclass(frozen=True)
class _Composites:
    items: np.ndarray  # (10000, 28, 28) uint8
    labels: np.ndarray  # (10000,) uint8
    layout: Layout

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(compose(self.items, self.layout[index : index + 1])[0]), int(self.labels[index])


def _read_composites() -> _Composites:
    items = read_idx(_BUNDLED / "t10k-images-idx3-ubyte.gz")
    labels = read_idx(_BUNDLED / "t10k-labels-idx1-ubyte.gz")
    return _Composites(items, labels, draw_layout(np.arange(len(items)), len(items), np.random.RandomState(0)))


def _open_bundled(model: nn.Module, limit: int | None) -> ImageSource:
    composites = _read_composites()
    items, labels, layout = composites.items, composites.labels, composites.layout
    chosen = _choose(len(items), limit)
    parts = [getattr(layout, field) for field in layout.__dataclass_fields__]
    return ImageSource(
        "bundled",
        composites,
        chosen,
        _preparation(model, _model_labels(list(CLASSES), model, "'bundled'")),
        _fingerprint("bundled", items.tobytes(), labels.tobytes(), *(part.tobytes() for part in parts), chosen),
        list(CLASSES),
        len(CLASSES),
    )


# --- folders of class folders


@dataclass(frozen=True)
class _Files:
    root: Path
    files: list[tuple[str, int]]  # path below root, class

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        name, label = self.files[index]
        return decode(self.root / name, str(self.root / name)), label


def _open_folder(folder: Path, model: nn.Module, limit: int | None) -> ImageSource:
    try:
        root = _class_root(folder)
        classes = _subfolders(root)
        unheard: list[str] = []
        special: list[str] = []
        found = [_files(root, root / name, unheard, special) for name in classes or ["."]]
    except OSError as error:
        raise UserError(f"data folder {str(folder)!r} cannot be read: {shortened(error)}") from error
    names = [sorted(name for name in own if name.lower().endswith(_EXTENSIONS)) for own in found]
    files = [(name, label if classes else -1) for label, own in enumerate(names) for name in own]
    others = [repr(name) for own in found for name in own if not name.lower().endswith(_EXTENSIONS)]
    empty = [repr(name) for name, own in zip(classes, names, strict=bool(classes)) if not own]
    for what, some in (
        ("files are no images by their names", others),
        ("class folders have no images", empty),
        ("are no regular files, and are left out", special),
        ("sub-folders cannot be read, and what is in them is left out", unheard),
    ):
        if files and some:
            _logger.warning("%r: %d %s (%s)", str(root), len(some), what, _some(some))
    if not files:
        raise UserError(
            f"data folder {str(root)!r} has class folders ({_some(classes)}) but no images in them "
            f"({', '.join(_EXTENSIONS)})." + (f" {_some(unheard)} cannot be read." if unheard else "")
        )
    if not classes:
        _logger.warning("%r has no class folders: its images go without labels, and without top-1", str(root))
    labels = _model_labels(classes, model, f"data folder {str(root)!r}") if classes else None
    if labels == list(range(len(classes))) and classes != sorted(classes, key=natural_key):
        _logger.warning("class folders of %r are counted in alphabetical order, 10 before 2 and B before a", str(root))
    chosen = _choose(len(files), limit)
    sizes = [f"{files[i][0]} {_size(root / files[i][0])}\n" for i in chosen]
    return ImageSource(
        printable(f"{root.parent.name}/{root.name}" if root.name in _SPLIT_FOLDERS else root.resolve().name),
        _Files(root, files),
        chosen,
        _preparation(model, labels),
        _fingerprint("folder", "".join(sizes)),
        classes or None,
        len(classes) or _class_count(model),
    )


def _size(path: Path) -> int:
    """Bytes, −1 for a file that is not to be had: it is going to be skipped."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _class_root(folder: Path) -> Path:
    """Where the images are: the folder itself, with or without class folders, or its validation split.

    Raises UserError when there are none.
    """
    require_folder(folder)
    subfolders = _subfolders(folder)
    only_splits = {"train", *_SPLIT_FOLDERS}.issuperset(subfolders)
    for split in _SPLIT_FOLDERS:
        if split in subfolders and (only_splits or _subfolders(folder / split)):
            return _class_root(folder / split)
    images = [path.name for path in folder.iterdir() if path.name.lower().endswith(_EXTENSIONS)]
    if subfolders == ["train"]:
        raise UserError(f"data folder {str(folder)!r} has only a training split; if you mean it, give {folder}/train.")
    if subfolders:
        return folder
    if any(name.startswith("ILSVRC2012_val_") for name in images):
        raise UserError(
            f"data folder {str(folder)!r} is flat, so nothing tells the labels: move each image into a folder named by "
            "its wnid, as in n01440764/ILSVRC2012_val_00000293.JPEG (torchvision.datasets.ImageNet does it, given the "
            "devkit's archive)."
        )
    if images:
        return folder
    raise UserError(f"data folder {str(folder)!r} is empty: it should hold one folder of images for each class.")


def _subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _files(root: Path, folder: Path, unheard: list[str], special: list[str]) -> list[str]:
    """Paths of the files in a folder and below, relative to root, without hidden ones.

    Folders that cannot be read are added to `unheard`, pipes, sockets and devices to `special`, in quotes.
    """
    found = []

    def say(error: OSError) -> None:
        unheard.append(repr(Path(error.filename).relative_to(root).as_posix()))

    for parent, folders, names in os.walk(folder, onerror=say):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            name = path.relative_to(root).as_posix()
            if _is_special(path):
                special.append(repr(name))
            else:
                found.append(name)
    return found


def _is_special(path: Path) -> bool:
    """Whether reading it could wait for ever. What is not to be had is no such file: it is named when it is decoded."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


# --- what timm opens


@dataclass(frozen=True)
class _TimmSpec:
    kind: str
    name: str
    options: dict[str, str]

    def __str__(self) -> str:
        """What records call the data: where a folder lies is no part of it."""
        return f"{self.kind}/{Path(self.name).name if Path(self.name).is_dir() else self.name}"


def _open_timm(kind: str, rest: str, model: nn.Module, limit: int | None) -> ImageSource | ImageStream:
    spec = _parse_timm(kind, rest)
    mode = _mode(_data_config(model))
    opened = _create(spec, mode, limit)
    classes = _timm_classes(opened)
    prepare = _preparation(model, None if classes is None else _model_labels(classes, model, f"data {str(spec)!r}"))
    num_classes = _class_count(model) if classes is None else len(classes)
    split = spec.options.get("split", "validation")
    identity = (str(spec), split, *(classes or ()))
    if not isinstance(opened, IterableDataset):
        images = _decoding(opened, str(spec))
        _try_first(images, spec)
        chosen = _choose(len(opened), limit)
        print_ = _fingerprint(*identity, str(len(opened)), chosen)
        return ImageSource(str(spec), images, chosen, prepare, print_, classes, num_classes)
    length = _stream_length(opened, limit)
    if not length:
        raise UserError(f"data {str(spec)!r} does not tell how many images it has: say how many with --limit N.")
    print_ = _fingerprint(*identity, str(length))
    images_in_order = _streaming(spec, opened)
    # For hfids/ timm repeats the limit it was given as the length.
    promised = spec.kind != "hfids" and _stream_length(opened, None) > 0
    return ImageStream(str(spec), images_in_order, length, prepare, print_, classes, num_classes, promised)


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


@dataclass(frozen=True)
class _Read:
    """Images of a timm reader. timm's own data set answers with the next image for one that it cannot decode."""

    name: str
    reader: Any

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        file, label, *_ = self.reader[index]
        return decode(file, f"{self.name}, number {index}"), -1 if label is None else label


def _decoding(opened: Any, name: str) -> Images:
    """A data set of timm's or torchvision's with our way to decode files, where it reads files."""
    if hasattr(opened, "reader"):
        return _Read(name, opened.reader)
    if hasattr(opened, "loader"):
        opened.loader = _load
    images: Images = opened
    return images


def _streaming(spec: _TimmSpec, opened: Any) -> Iterable[tuple[Image.Image, int] | ImageError]:
    """A stream of timm's with our way to decode files, where they come as files: timm drops what it cannot decode."""
    reader = getattr(opened, "reader", None)
    if spec.kind == "wds" and reader is not None:
        key = reader.target_key or reader.split_info.alt_label
        shards = tuple(os.path.join(reader.root, name) for name in reader.split_info.filenames)
        return _Shards(shards, tuple(reader.input_key.split(";")), key or None)
    if spec.kind == "hfids" and reader is not None:
        return _Rows(str(spec), reader)
    timm_images: Iterable[tuple[Image.Image, int]] = opened
    return timm_images


@dataclass(frozen=True)
class _Shards:
    """The images of WebDataset shards, in order. A shard that cannot be read raises, after the images before it."""

    shards: tuple[str, ...]
    image_keys: tuple[str, ...]
    target_key: str | None

    def __iter__(self) -> Iterator[tuple[Image.Image, int] | ImageError]:
        webdataset: Any = importlib.import_module("webdataset")
        for sample in webdataset.DataPipeline(
            webdataset.SimpleShardList(list(self.shards)), webdataset.tarfile_to_samples()
        ):
            name = f"{Path(str(sample['__url__'])).name}/{sample['__key__']}"
            try:
                yield self._read(sample, name)
            except ImageError as error:
                yield error
            except Exception as error:  # a label or an image that is missing, or is none
                reason = shortened(error)
                yield ImageError(f"image {name!r} cannot be read: {reason}", name, reason)

    def _read(self, sample: dict[str, Any], name: str) -> tuple[Image.Image, int]:
        key = next((key for key in self.image_keys if key in sample), None)
        if key is None:
            raise ValueError(f"no {' or '.join(self.image_keys)} among its files")
        label = int(json.loads(sample["json"])[self.target_key] if self.target_key else sample["cls"])
        if label < 0:
            raise ValueError(f"its label is {label}")
        return decode(io.BytesIO(sample[key]), name), label


@dataclass(frozen=True)
class _Rows:
    """The images of a Hugging Face data set, in order, without its own decoding: that ends at the first bad image."""

    name: str
    reader: Any

    def __iter__(self) -> Iterator[tuple[Image.Image, int] | ImageError]:
        datasets: Any = importlib.import_module("datasets")
        reader = self.reader
        if reader.download:
            rows = reader.builder.as_dataset(split=reader.split).to_iterable_dataset()
        else:
            rows = reader.builder.as_streaming_dataset(split=reader.split)
        for place, row in enumerate(rows.cast_column(reader.input_key, datasets.Image(decode=False))):
            image, name = row[reader.input_key], f"{self.name}, number {place}"
            try:
                file = io.BytesIO(image["bytes"]) if image["bytes"] is not None else Path(image["path"])
                label = row[reader.target_key]
                yield decode(file, name), -1 if label is None else int(label)
            except ImageError as error:
                yield error
            except Exception as error:  # no image in this row, or no class number
                reason = shortened(error)
                yield ImageError(f"image {name!r} cannot be read: {reason}", name, reason)


def _load(path: str) -> Image.Image:
    return decode(Path(path), path)


def _try_first(images: Images, spec: _TimmSpec) -> None:
    """Read one image now, as a wrong column shows only then."""
    hint = "input_key and target_key name its columns" if spec.kind == "hfds" else "are its files complete?"
    try:
        _, label = images[0]
    except ImageError:
        return  # one image that cannot be decoded says nothing about the others
    except _OPENING_ERRORS as error:
        raise UserError(f"data {str(spec)!r}: its first image cannot be read ({shortened(error)}); {hint}.") from error
    if not isinstance(label, int | np.integer):
        raise UserError(f"data {str(spec)!r} has {type(label).__name__} labels, not class numbers; {hint}.")


def _stream_length(stream: Any, limit: int | None) -> int:
    known = len(stream)  # 0 where nobody knows
    return known if limit is None else min(limit, known or limit)


def _timm_classes(opened: Any) -> list[str] | None:
    """Class names in the data set's own order: wnids where torchvision has them, None where nobody knows."""
    reader = getattr(opened, "reader", None)
    index = getattr(reader, "class_to_idx", None)
    if index:
        return sorted(index, key=index.__getitem__)
    names = getattr(opened, "wnids", None) or getattr(opened, "classes", None)
    return None if not names else [str(name) for name in names]


# --- common to all


def _preparation(model: nn.Module, labels: list[int] | None) -> Preparation:
    config = _data_config(model)
    return Preparation(_mode(config), create_transform(**config, is_training=False), labels)


def _data_config(model: nn.Module) -> dict[str, Any]:
    """timm's preprocessing for the model, at the size and with the channels it was built for."""
    config: dict[str, Any] = resolve_model_data_config(model, args={"input_size": resolve_input_size(model, None)})
    channels = config["input_size"][0]
    for key in ("mean", "std"):
        if len(config[key]) != channels:
            config[key] = (fmean(config[key]),) * channels
    return config


def _mode(config: dict[str, Any]) -> str:
    channels = config["input_size"][0]
    if channels not in (1, 3):
        raise UserError(f"the model takes {channels} channels; images have 1 (grey) or 3 (color).")
    return "L" if channels == 1 else "RGB"


def _choose(count: int, limit: int | None) -> np.ndarray:
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(np.random.RandomState(0).permutation(count)[:limit])


def _fingerprint(*parts: str | bytes | np.ndarray) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = (
            part.encode(errors="surrogateescape")
            if isinstance(part, str)
            else part
            if isinstance(part, bytes)
            else part.tobytes()
        )
        digest.update(f"{len(data)}:".encode() + data)
    return digest.hexdigest()


def _model_labels(classes: Sequence[str], model: nn.Module, what: str) -> list[int]:
    """For each class of the data, in its own order, the model's index of it (−1 for a model without classes).

    By wnid for ImageNet models, by name where the model knows its classes' names, else in order.
    """
    count = _class_count(model)
    if count == 0:
        _logger.warning("the model has no classifier, so the images of %s go without labels", what)
        return [-1] * len(classes)
    for known, written in _known_classes(model):
        index = {name: i for i, name in enumerate(known)}
        names = [written(name) for name in classes]
        if len(index) == len(known) and len(set(names)) == len(names) and any(name in index for name in names):
            unknown = [name for name, key in zip(classes, names, strict=True) if key not in index]
            if unknown:
                raise UserError(f"{what} has classes the model does not know ({_some(unknown)}), among some it does.")
            return [index[name] for name in names]
    if len(classes) > count:
        raise UserError(f"{what} has {len(classes)} classes ({_some(classes)}), the model only {count}.")
    if len(classes) < count:
        _logger.warning(
            "%s has %d classes, the model %d: they are taken for the model's first, in order", what, len(classes), count
        )
    return list(range(len(classes)))


def _known_classes(model: nn.Module) -> Iterator[tuple[list[str], Callable[[str], str]]]:
    """What the model's classes are called, in its order, and how a name of the data is to be written to compare."""
    subset = infer_imagenet_subset(model)
    if subset is not None:
        yield ImageNetInfo(subset).label_names(), str
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    if cfg.get("label_names"):
        yield [_plain(name) for name in cfg["label_names"]], _plain


def _class_count(model: nn.Module) -> int:
    count: Any = model.num_classes
    return int(count)


def _plain(name: str) -> str:
    """A class name as it survives as a folder name: "T-shirt/top" and "t_shirt_top" are the same."""
    return re.sub(r"[\W_]+", " ", name).strip().casefold()


def _some(names: Sequence[str], shown: int = 3) -> str:
    return ", ".join(map(printable, names[:shown])) + (", …" if len(names) > shown else "")
