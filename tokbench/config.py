"""What to run: the grid of cells, and how to run it. Importing this module does not import torch.

A grid comes from TOML (`Grid.from_toml`), from command line flags (`Grid.from_flags`), or straight from Python.
All three end in the same checks, so a wrong word is refused before anything is loaded.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tokbench.errors import UserError, nearest, shortened
from tokbench.schedules import GRAMMAR, Schedule, parse_schedule

MEASURES = ("flops", "accuracy", "speed")
DTYPES = ("fp32", "bf16", "fp16")
DEFAULT_LIMIT = 1000
# What a grid has when it names no methods; the names are here as well so that --help need not import torch.
DEFAULT_METHODS = ("tome", "tofu", "mctf", "mstm", "evit", "pitome", "topk", "random")
# Equal FLOPs are fair between methods, on a model of any depth. The bundled model's curves bend between these two.
BUNDLED_SCHEDULES = ("flops:0.5", "flops:0.35")
DEFAULT_SCHEDULES = ("flops:0.75", "flops:0.6", "flops:0.45")

# The kinds of data that tokbench.data opens; here because torch is needed to open them, not to list them.
SPECS = """\
bundled                 10,000 composites of Fashion-MNIST items in clutter, for the bundled model
FOLDER                  a folder of class folders; wnid names (n01440764) are put into ImageNet order; one of images
                        without class folders has no labels, which leaves agreement and KL divergence
hfds/OWNER/NAME         a Hugging Face data set (package datasets); hfids/OWNER/NAME streams it
wds/FOLDER              WebDataset shards (package webdataset), streamed
tfds/NAME               a TensorFlow data set (package tensorflow-datasets), streamed
torch/NAME:root=FOLDER  a torchvision data set
Options follow a colon: split (validation), root, input_key, target_key, download; hfds/cifar10:split=test,input_key=img
A stream is read in order, in one process, and --limit takes its first images; elsewhere a fixed random subset."""

# The package that opens each kind of data, and the options it takes.
DATA_PACKAGES = {
    "hfds": ("datasets", ("split", "root", "input_key", "target_key")),
    "hfids": ("datasets", ("split", "root", "input_key", "target_key", "download")),
    "wds": ("webdataset", ("split", "input_key", "target_key")),
    "tfds": ("tensorflow_datasets", ("split", "root", "input_key", "target_key", "download")),
    "torch": ("torchvision", ("split", "root", "download")),
}


@dataclass(frozen=True)
class ModelSpec:
    """A model of the grid: a timm name or "bundled".

    checkpoint: a file of weights; None for timm's or the bundled ones. input_size: pixels; None for the model's own.
    random_weights: no weights at all, for FLOPs and speed without a download.
    `label` names it in records and plots; by default the name, checkpoint and size that were asked for.
    """

    name: str = "bundled"
    checkpoint: Path | None = None
    input_size: int | None = None
    label: str = ""
    random_weights: bool = False

    def __post_init__(self) -> None:
        _require_type("model name", self.name, str)
        _require_type("label", self.label, str)
        if not self.name:
            raise UserError("the model name is empty; `tokbench list models` names those there are")
        if self.checkpoint is not None:
            object.__setattr__(self, "checkpoint", Path(self.checkpoint))
        if self.input_size is not None:
            _require_positive("input_size", self.input_size)
        _require_type("random_weights", self.random_weights, bool)
        if self.random_weights and self.checkpoint is not None:
            raise UserError(f"model '{self.name}': random_weights and a checkpoint exclude each other")
        if not self.label:
            weights = "@random" if self.random_weights else f"@{self.checkpoint.stem}" if self.checkpoint else ""
            size = f"@{self.input_size}" if self.input_size else ""
            object.__setattr__(self, "label", f"{self.name}{weights}{size}")


@dataclass(frozen=True)
class MethodSpec:
    """A method with its parameters and the schedules to run it at, as written by the user.

    Without schedules, a grid gives it equal shares of the FLOPs.
    """

    name: str
    schedules: tuple[str, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_type("method name", self.name, str)
        if self.name == "none":
            if self.schedules or self.params:
                raise UserError("method 'none' is the unreduced model: it takes no schedules and no parameters")
            return
        schedules = tuple(_strings(f"{self.name}: schedules", self.schedules))
        object.__setattr__(self, "schedules", schedules)
        object.__setattr__(self, "params", dict(sorted(self.params.items())))
        for text in schedules:
            parse_schedule(text)

    @classmethod
    def from_text(cls, text: str, schedules: Sequence[str] = ()) -> MethodSpec:
        """From a flag: `tome` or `tome:prop_attn=false`. Values are read as TOML, or else as plain words."""
        name, _, rest = text.partition(":")
        params = {}
        for item in re.split(r",(?![^\[]*\])", rest) if rest else ():
            key, _, value = item.partition("=")
            if not (key and value):
                raise UserError(f"method '{text}': cannot read '{item}'; write it as {name}:{key or 'param'}=value")
            params[key.strip()] = _read_value(value.strip())
        return cls(name, () if name == "none" else tuple(schedules), params)

    def check(self) -> None:
        """Raise UserError if there is no such method, or a parameter is not one of its."""
        if self.name in DEFAULT_METHODS and not self.params:
            return  # known to be right, and torch, which the registry needs, takes seconds to import
        import tokbench.fusion  # noqa: F401  (registers the methods)
        from tokbench.fusion.core import make_method

        make_method(self.name, **self.params)
        try:
            json.dumps(self.params, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"method '{self.name}': its parameters cannot be recorded: {shortened(error)}") from error

    def __str__(self) -> str:
        params = ",".join(f"{key}={_write_value(value)}" for key, value in self.params.items())
        return f"{self.name}:{params}" if params else self.name


@dataclass(frozen=True)
class Cell:
    """One model × method × schedule. `schedule` is the text asked for, "" for the unreduced model."""

    model: str
    method: MethodSpec
    schedule: str = ""

    @property
    def is_baseline(self) -> bool:
        """Whether this is the unreduced model."""
        return self.method.name == "none"

    @property
    def id(self) -> str:
        """`<model>/<method[:params]>/<schedule>`; `<model>/none` for the unreduced model."""
        return "/".join(filter(None, (self.model, str(self.method), self.schedule)))


@dataclass(frozen=True)
class RunOptions:
    """How to run a grid.

    Attributes:
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        dtype: "fp32", "bf16", "fp16".
        batch_size: images, or "auto".
        limit: images measured for accuracy, None for all.
        only: which of MEASURES.
        workers: processes that read images, None to choose; no more than there are cores.
        labels: a file that says what each image of a folder shows.
        max_bad: per cent of the images that may be skipped because they cannot be decoded.
        compile: time models that `torch.compile` compiled; accuracy is measured without.
    """

    device: str = "auto"
    dtype: str = "fp32"
    batch_size: int | str = "auto"
    limit: int | None = None
    only: tuple[str, ...] = MEASURES
    workers: int | None = None
    labels: str | None = None
    max_bad: float = 1.0
    compile: bool = False

    def __post_init__(self) -> None:
        _require_type("device", self.device, str)
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", self.device):
            raise UserError(
                f"unknown device '{self.device}': use auto, cpu, cuda, cuda:1 or mps."
                f"{nearest(self.device, ('auto', 'cpu', 'cuda', 'mps'))}"
            )
        _require_word("dtype", self.dtype, DTYPES)
        if self.batch_size != "auto":
            _require_positive("batch_size", self.batch_size, or_else=" or 'auto'")
        _require_type("compile", self.compile, bool)
        if self.limit is not None:
            _require_positive("limit", self.limit)
        if self.labels is not None:
            _require_type("labels", self.labels, str)
        if self.workers is not None:
            _require_positive("workers", self.workers, least=0)
        if isinstance(self.max_bad, bool) or not isinstance(self.max_bad, int | float) or not 0 <= self.max_bad <= 100:
            raise UserError(f"max_bad must be a percentage from 0 to 100, not {self.max_bad!r}")
        asked = tuple(_strings("only", self.only))
        for word in asked:
            _require_word("only", word, MEASURES)
        if not asked:
            raise UserError(f"only: names no measure; use some of {', '.join(MEASURES)}")
        object.__setattr__(self, "only", tuple(measure for measure in MEASURES if measure in asked))


@dataclass(frozen=True)
class Grid:
    """Models × methods × schedules on one data set. The unreduced model is always there, and first."""

    models: tuple[ModelSpec, ...] = field(default_factory=lambda: (ModelSpec(),))
    methods: tuple[MethodSpec, ...] = ()
    data: str = "bundled"
    options: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        _require_type("data", self.data, str)
        if not self.models:
            raise UserError("the grid has no model")
        drawn = [model.name for model in self.models if model.random_weights]
        if drawn and "accuracy" in self.options.only:
            raise UserError(f"model '{drawn[0]}' with random weights has no accuracy: add --only flops,speed")
        seen: set[str] = set()
        for model in self.models:
            if model.label in seen:
                raise UserError(f"two models are called '{model.label}'; give one a `label` of its own")
            seen.add(model.label)
        shares = BUNDLED_SCHEDULES if self.models == (ModelSpec(),) else DEFAULT_SCHEDULES
        methods = tuple(
            replace(method, schedules=method.schedules or shares) for method in self.methods if method.name != "none"
        )
        for method in methods:
            method.check()
        object.__setattr__(self, "methods", (MethodSpec("none"), *methods))

    @classmethod
    def default(cls) -> Grid:
        """What `tokbench run` does without arguments: the bundled model on 1,000 of its images."""
        return cls(methods=_every_method(), options=RunOptions(limit=DEFAULT_LIMIT))

    @classmethod
    def from_toml(cls, path: str | Path) -> Grid:
        """Read a grid file. Raises UserError, naming the file and the field, if anything in it is wrong."""
        path = Path(path)
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"cannot read the grid {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:  # also for numbers of thousands of digits
            raise UserError(f"{path} is not valid TOML: {shortened(error)}") from error
        try:
            return cls._from_table(table)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    @classmethod
    def _from_table(cls, table: dict[str, Any]) -> Grid:
        _refuse_unknown("the grid", table, ("data", "models", "methods", "schedules", "options"))
        shared = _strings("schedules", table.get("schedules", ()))
        models = []
        for place, entry in _tables(table, "models"):
            _refuse_unknown(place, entry, (spec.name for spec in fields(ModelSpec)))
            if "name" not in entry:
                raise UserError(f"{place} has no name")
            if "checkpoint" in entry:
                _require_type(f"{place}: checkpoint", entry["checkpoint"], str)
            models.append(ModelSpec(**entry))
        methods = []
        for place, entry in _tables(table, "methods"):
            if "name" not in entry:
                raise UserError(f"{place} has no name")
            params = {key: value for key, value in entry.items() if key not in ("name", "schedules")}
            default = () if entry["name"] == "none" else shared
            schedules = tuple(_strings(f"{place}: schedules", entry.get("schedules", default)))
            methods.append(MethodSpec(entry["name"], schedules, params))
        options = table.get("options", {})
        _require_type("options", options, dict)
        _refuse_unknown("options", options, (spec.name for spec in fields(RunOptions)))
        chosen = tuple(models) or (ModelSpec(),)
        return cls(
            models=chosen,
            methods=tuple(methods) or _every_method(),
            data=table.get("data", "bundled"),
            options=RunOptions(**options),
        )

    @classmethod
    def from_flags(
        cls,
        base: Grid | None = None,
        *,
        models: Sequence[str] = (),
        checkpoint: Path | None = None,
        random_weights: bool = False,
        methods: Sequence[str] = (),
        schedules: Sequence[str] = (),
        data: str | None = None,
        **options: Any,
    ) -> Grid:
        """A grid from command line flags, on top of `base` (a grid file, say) where one is given.

        Each kind of flag replaces what `base` says on that matter; schedules replace those of every method.
        `options` are the fields of RunOptions, None where the flag was not given; `only` is text with commas, and
        `batch_size` text.
        """
        grid = base or cls.default()
        if checkpoint is not None and len(models) != 1:
            raise UserError(f"--checkpoint goes with exactly one --model, and {len(models) or 'none'} is given")
        given = {key: value for key, value in options.items() if value is not None}
        grid = replace(grid, options=replace(grid.options, **_read_options(given)))
        if random_weights and not models:
            raise UserError("--random-weights says how to make the models that --model names, and none is given")
        if base is None and data not in (None, "bundled"):
            grid = replace(grid, options=replace(grid.options, limit=given.get("limit")))
        if models:
            grid = replace(
                grid, models=tuple(ModelSpec(name, checkpoint, random_weights=random_weights) for name in models)
            )
            if base is None:
                grid = replace(grid, methods=_every_method())
        if methods:
            grid = replace(grid, methods=tuple(MethodSpec.from_text(text, schedules) for text in methods))
        elif schedules:
            kept = [method for method in grid.methods if method.name != "none"]
            grid = replace(grid, methods=tuple(replace(method, schedules=tuple(schedules)) for method in kept))
        return replace(grid, data=grid.data if data is None else data)

    def cells(self, model: ModelSpec) -> list[Cell]:
        """The cells of one model in the order they run, without repetitions; the unreduced model first."""
        cells: dict[tuple[str, Schedule | None], Cell] = {}
        for method in self.methods:
            for schedule in method.schedules or ("",):
                meaning = parse_schedule(schedule) if schedule else None
                cells.setdefault((str(method), meaning), Cell(model.label, method, schedule))
        return list(cells.values())

    def describe(self) -> str:
        """What would be measured, for people: one line on how, then a line for each cell."""
        cells = [cell.id for model in self.models for cell in self.cells(model)]
        options = self.options
        images = f"{options.limit:,} images of {self.data}" if options.limit else f"all images of {self.data}"
        how = f"{len(cells)} cells: {', '.join(options.only)} on {images}, device {options.device}, {options.dtype}"
        return "\n".join([f"{how}, batch size {options.batch_size}", *(f"  {cell}" for cell in cells)])

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, for the manifest of a run."""
        plain = asdict(self)
        for model in plain["models"]:
            model["checkpoint"] = str(model["checkpoint"]) if model["checkpoint"] else None
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Grid:
        """The grid that `to_dict` wrote. Raises UserError for anything else, and for what this tokbench lacks."""
        try:
            return cls(
                models=tuple(ModelSpec(**model) for model in plain["models"]),
                methods=tuple(MethodSpec(**method) for method in plain["methods"]),
                data=plain["data"],
                options=RunOptions(**plain["options"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"the grid of the run's manifest cannot be read ({type(error).__name__}: {error})"
            ) from error


def _every_method() -> tuple[MethodSpec, ...]:
    return tuple(MethodSpec(name) for name in DEFAULT_METHODS)


def _read_options(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags that arrive as text, as RunOptions wants them."""
    read = dict(flags)
    if "only" in flags:
        read["only"] = tuple(word.strip() for word in flags["only"].split(","))
    if re.fullmatch(r"\d{1,18}", str(flags.get("batch_size", ""))):
        read["batch_size"] = int(flags["batch_size"])
    return read


def require_data(spec: str) -> None:
    """Raise UserError for data that are a folder which is not there: what can be told without opening any."""
    kind, slash, _ = spec.partition("/")
    if spec and spec != "bundled" and not (slash and kind.lower() in DATA_PACKAGES):
        folder = Path(os.path.expanduser(spec))
        try:
            require_folder(folder)
        except OSError as error:
            raise UserError(f"data folder {spec!r} cannot be read: {shortened(error)}") from error


def require_folder(folder: Path) -> None:
    """Raise UserError unless it is one, with the nearest name that is."""
    if folder.is_dir():
        return
    if folder.exists():
        raise UserError(f"data {str(folder)!r} is a file; give a folder of class folders (unpack an archive first).")
    siblings = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    close = nearest(folder.name, ["bundled", *siblings])
    kinds = ", ".join(f"{kind}/…" for kind in DATA_PACKAGES)
    raise UserError(f"data folder {str(folder)!r} does not exist.{close or f' Other data: bundled, {kinds}.'}")


def describe_methods() -> str:
    """All methods, one a line: name, parameters with their defaults, paper."""
    from tokbench.catalogue import catalogue

    rows = [("none", "", "the unreduced model, always measured first")]
    for entry in catalogue():
        params = ",".join(
            key if value is None else f"{key}={_write_value(value)}" for key, value in entry.parameters.items()
        )
        rows.append((entry.name, params, entry.paper))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{name:{widths[0]}}  {params:{widths[1]}}  {paper}" for name, params, paper in rows)


def describe_schedules() -> str:
    """The schedule grammar: one example a line, and what it means."""
    width = max(len(example) for example, _ in GRAMMAR.values())
    return "\n".join(f"{example:{width}}  {meaning}" for example, meaning in GRAMMAR.values())


def _read_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _write_value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), default=repr)


def _require_type(what: str, value: object, kind: type) -> None:
    words = {str: "text", int: "a whole number", dict: "a table", bool: "true or false"}
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{what} must be {words[kind]}, not {value!r}")


def _require_positive(what: str, value: object, *, least: int = 1, or_else: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{what} must be a whole number of at least {least}{or_else}, not {value!r}")


def _require_word(what: str, value: object, words: Sequence[str]) -> None:
    if value not in words:
        raise UserError(f"{what}: unknown word {value!r}; use {', '.join(words)}.{nearest(str(value), words)}")


def _strings(what: str, value: object) -> list[str]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{what} must be a list of texts such as ['8', '13'], not {value!r}")
    return list(value)


def _refuse_unknown(where: str, table: Mapping[str, object], known: Iterable[str]) -> None:
    words = list(known)
    for key in table:
        if key not in words:
            raise UserError(f"{where} has no field '{key}'; there are {', '.join(words)}.{nearest(key, words)}")


def _tables(table: Mapping[str, Any], key: str) -> list[tuple[str, dict[str, Any]]]:
    entries = table.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{key} must be tables, each begun with [[{key}]]")
    return [(f"{key}[{index}]", entry) for index, entry in enumerate(entries)]
