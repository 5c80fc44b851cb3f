"""What to run: the grid of cells, and how to run it. Importing this module does not import torch.

A grid comes from TOML (`Grid.from_toml`), from command line flags (`Grid.from_flags`), or straight from Python.
All three end in the same checks, so a wrong word is refused before anything is loaded.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, StrictBool, StrictInt, StrictStr
from pydantic.dataclasses import dataclass

from tokbench.errors import UserError, nearest, shortened
from tokbench.results.cell import CellKey, RecordIndex, Setting
from tokbench.schedules import GRAMMAR, parse_schedule
from tokbench.validation import FORBID, told, validated

MEASURES: tuple[Literal["flops", "accuracy", "speed"], ...] = ("flops", "accuracy", "speed")
# What runs a model while it is timed; see exporting.runtimes. In this order, so that eager is what others are told by.
RUNTIMES = ("eager", "compile", "onnxruntime", "openvino", "tensorrt")
DEFAULT_LIMIT = 1000
# What a grid has when it names no methods; the names are here as well so that --help need not import torch.
DEFAULT_METHODS = ("tome", "tofu", "mctf", "mstm", "evit", "pitome", "topk", "random")
# Equal FLOPs are fair between methods, on a model of any depth. The bundled model's curves bend between these two.
BUNDLED_SCHEDULES = ("flops:0.5", "flops:0.35")
DEFAULT_SCHEDULES = ("flops:0.75", "flops:0.6", "flops:0.45")

# The kinds of data that tokbench.data opens; here because torch is needed to open them, not to list them.
SPECS = """\
bundled                 10,000 composites of Fashion-MNIST items in clutter, for the bundled model
bundled:train           512 other ones, of training items and without labels, to search schedules on
FOLDER                  a folder of class folders; wnid names (n01440764) are put into ImageNet order; one of images
                        without class folders has no labels, which leaves agreement and KL divergence
hfds/OWNER/NAME         a Hugging Face data set (package datasets); hfids/OWNER/NAME streams it
wds/FOLDER              WebDataset shards (package webdataset), streamed
tfds/NAME               a TensorFlow data set (package tensorflow-datasets), streamed
torch/NAME:root=FOLDER  a torchvision data set
Options follow a colon: split (validation), root, input_key, target_key, download; hfds/cifar10:split=test,input_key=img
A stream is read in order, in one process, and --limit takes its first images; elsewhere a fixed random subset."""

BUNDLED_DATA = ("bundled", "bundled:train")
# The package that opens each kind of data, and the options it takes.
DATA_PACKAGES = {
    "hfds": ("datasets", ("split", "root", "input_key", "target_key")),
    "hfids": ("datasets", ("split", "root", "input_key", "target_key", "download")),
    "wds": ("webdataset", ("split", "input_key", "target_key")),
    "tfds": ("tensorflow_datasets", ("split", "root", "input_key", "target_key", "download")),
    "torch": ("torchvision", ("split", "root", "download")),
}


AtLeast1 = Annotated[StrictInt, Field(ge=1)]


def _named(specs: Any) -> Any:
    """Names stand for what they name."""
    if not isinstance(specs, list | tuple):
        raise ValueError("it must be a list, in a grid file of tables that each begin with [[models]] or [[methods]]")
    return [{"name": spec} if isinstance(spec, str) else spec for spec in specs]


def _as_batch_size(value: Any) -> Any:
    """Several sizes as a tuple, smallest first; one alone as itself."""
    if not isinstance(value, list | tuple):
        return value
    if not value or any(type(size) is not int or size < 1 for size in value):
        raise ValueError(f"several must be whole numbers of at least 1, not {list(value)}")
    return tuple(sorted(set(value))) if len(set(value)) > 1 else value[0]


def _known_runtimes(names: tuple[str, ...]) -> tuple[str, ...]:
    """In their order, each once."""
    for name in names:
        if name not in RUNTIMES:
            raise ValueError(f"unknown runtime {name!r}; use {', '.join(RUNTIMES)}.{nearest(name, RUNTIMES)}")
    return tuple(name for name in RUNTIMES if name in names)


def _known_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", device):
        close = nearest(device, ("auto", "cpu", "cuda", "mps"))
        raise ValueError(f"unknown device {device!r}; use auto, cpu, cuda, cuda:1 or mps.{close}")
    return device


def _known_cluster(value: Any) -> Any:
    """A number as text; what is no text is refused later."""
    text = str(value) if type(value) is int else value
    if isinstance(text, str) and not re.fullmatch(r"auto|[1-9]\d{0,5}|[^\s/]+:\d{1,5}", text):
        raise ValueError(f"{text!r}: write auto, a number of workers, or the HOST:PORT of a running cluster")
    return text


@told
@dataclass(frozen=True, config=FORBID)
class ModelSpec:
    """A model of the grid: a timm name or "bundled".

    checkpoint: a file of weights; None for timm's or the bundled ones. input_size: pixels; None for the model's own.
    random_weights: no weights at all, for FLOPs and speed without a download.
    `label` names it in records and plots; by default the name, checkpoint and size that were asked for.
    """

    name: StrictStr = "bundled"
    checkpoint: Path | None = None
    input_size: AtLeast1 | None = None
    label: StrictStr = ""
    random_weights: StrictBool = False

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("the model name is empty; `tokbench list models` shows the names")
        if self.random_weights and self.checkpoint is not None:
            raise ValueError(f"model '{self.name}': random_weights and a checkpoint exclude each other")
        if not self.label:
            weights = "@random" if self.random_weights else f"@{self.checkpoint.stem}" if self.checkpoint else ""
            size = f"@{self.input_size}" if self.input_size else ""
            object.__setattr__(self, "label", f"{self.name}{weights}{size}")


@told
@dataclass(frozen=True, config=FORBID)
class MethodSpec:
    """A method with its parameters and the schedules to run it at, as written by the user.

    Without schedules, a grid gives it equal shares of the FLOPs.
    """

    name: StrictStr
    schedules: tuple[StrictStr, ...] = ()
    params: dict[str, Any] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name == "none" and (self.schedules or self.params):
            raise ValueError("method 'none' is the unreduced model: it takes no schedules and no parameters")
        object.__setattr__(self, "name", self.name.lower())  # papers write ToMe
        object.__setattr__(self, "params", dict(sorted(self.params.items())))
        for text in self.schedules:
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
class PlannedCell:
    """One model × method × schedule of a grid. `schedule` is the text asked for, "" for the unreduced model."""

    model: str
    method: MethodSpec
    schedule: str = ""

    @property
    def is_baseline(self) -> bool:
        return self.method.name == "none"

    @property
    def id(self) -> str:
        """`<model>/<method[:params]>/<schedule>`; `<model>/none` for the unreduced model."""
        return "/".join(filter(None, (self.model, str(self.method), self.schedule)))

    @property
    def key(self) -> CellKey:
        """Which cell it is, however it was written."""
        return CellKey.of(self.model, self.method.name, self.method.params, self.schedule)

    def named_as(self, index: RecordIndex) -> PlannedCell:
        """The cell, written as it was when a run first recorded it."""
        for record in index.cells.get(self.key, {}).values():
            return replace(self, method=replace(self.method, params=record.params), schedule=record.schedule)
        return self


@told
@dataclass(frozen=True, config=FORBID)
class RunOptions:
    """How to run a grid.

    Attributes:
        device: "auto", "cpu", "cuda", "cuda:1", "mps".
        dtype: "fp32", "bf16", "fp16".
        batch_size: images, or "auto"; several sizes to time every cell at each.
        limit: images measured for accuracy, None for all.
        only: which of MEASURES.
        readers: processes that read images, None to choose; no more than there are cores. Once called `workers`.
        cache: a folder to keep prepared images in, and to take them from in later runs.
        labels: a file that says what each image of a folder shows.
        max_bad: per cent of the images that may be skipped because they cannot be decoded.
        runtimes: which of RUNTIMES to time every cell in; accuracy is measured in eager PyTorch.
        check_answers: compare what the models of other runtimes answer with what they answer in eager PyTorch.
        compile: the same as runtimes=("compile",).
        fused: "off" for attention written out, and methods by their definitions: no fused kernel, no shortcut.
        seconds: timing for each model that is timed; None for the usual, and longer while an interval is wide.
        rounds: in which every model has a turn, None for as many as fit.
        processes: fresh ones to share the rounds between, in turn; intervals are then over processes.
        ray: workers to share the images for accuracy between: "auto", a number of them, or a cluster's HOST:PORT.
    """

    device: Annotated[StrictStr, AfterValidator(_known_device)] = "auto"
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    batch_size: Annotated[AtLeast1 | tuple[AtLeast1, ...] | Literal["auto"], BeforeValidator(_as_batch_size)] = "auto"
    limit: AtLeast1 | None = None
    only: Annotated[tuple[Literal["flops", "accuracy", "speed"], ...], Field(min_length=1)] = MEASURES
    readers: Annotated[StrictInt, Field(ge=0)] | None = Field(
        default=None, validation_alias=AliasChoices("readers", "workers")
    )
    cache: StrictStr | None = None
    labels: StrictStr | None = None
    max_bad: Annotated[float, Field(ge=0, le=100)] = 1.0
    runtimes: Annotated[tuple[StrictStr, ...], Field(min_length=1), AfterValidator(_known_runtimes)] = ("eager",)
    check_answers: StrictBool = False
    fused: Literal["on", "off"] = "on"
    seconds: Annotated[float, Field(gt=0, le=1e6)] | None = None
    rounds: AtLeast1 | None = None
    processes: AtLeast1 = 1
    ray: Annotated[StrictStr, BeforeValidator(_known_cluster)] | None = None
    compile: InitVar[StrictBool] = False

    def __post_init__(self, compile: bool) -> None:
        object.__setattr__(self, "only", tuple(measure for measure in MEASURES if measure in self.only))
        if compile and self.runtimes not in (("eager",), ("compile",)):
            raise ValueError("compile and runtimes contradict each other: name 'compile' among the runtimes")
        if compile:
            object.__setattr__(self, "runtimes", ("compile",))
        if self.check_answers and ("speed" not in self.only or self.runtimes == ("eager",)):
            raise ValueError("check_answers compares what is timed in other runtimes: name some, and speed in `only`")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The batch sizes to time every cell at; none where it is timed at one only."""
        return self.batch_size if isinstance(self.batch_size, tuple) else ()

    def images_at_once(self, device: str) -> int:
        """What was asked for, the largest of several sizes, or the usual on a device of this type."""
        if isinstance(self.batch_size, int):
            return self.batch_size
        return max(self.sizes, default=128 if device == "cuda" else 16)

    @property
    def settings(self) -> list[Setting]:
        """The ways in which every cell is timed."""
        return [Setting(size, runtime) for size in self.sizes or (None,) for runtime in self.runtimes]


@told
@dataclass(frozen=True, config=FORBID)
class Searched:
    """What a `searched:` schedule stands for, and where it comes from: one search, which `tokbench search` writes down.

    model: its label. schedule: the removals, as `list:…`. usual: those without a search at the same cost.
    distance, usual_distance: of the answers from the unreduced model's, on `images` images of `data`. predicted, cost:
    the share of the unreduced model's FLOPs or time, cost as counted or timed in the end (None: interrupted before).
    marks: what the images are known by; see `searching.images`.
    """

    model: StrictStr
    weights_sha256: StrictStr
    method: StrictStr
    params: dict[str, Any]
    budget: StrictStr
    schedule: StrictStr
    usual: StrictStr
    distance: float
    usual_distance: float
    predicted: float
    data: StrictStr
    images: AtLeast1
    marks: StrictStr
    seed: StrictInt
    passes: float
    device: StrictStr
    dtype: StrictStr
    cost: float | None = None

    def __post_init__(self) -> None:
        for name in ("schedule", "usual"):
            if parse_schedule(getattr(self, name)).kind != "list":
                raise ValueError(f"{name} must be a list of removals such as list:8,8,0,4")

    @property
    def key(self) -> CellKey:
        """The cell it is for."""
        return CellKey.of(self.model, self.method, self.params, f"searched:{self.budget}")


@told
@dataclass(frozen=True, config=FORBID)
class Grid:
    """Models × methods × schedules on one data set. The unreduced model is always there, and first.

    Models and methods may be given by their names. searched: what its `searched:` schedules stand for; a run searches
    for those that are missing.
    """

    models: Annotated[tuple[ModelSpec, ...], BeforeValidator(_named)] = Field(default_factory=lambda: (ModelSpec(),))
    methods: Annotated[tuple[MethodSpec, ...], BeforeValidator(_named)] = ()
    data: StrictStr = "bundled"
    options: RunOptions = Field(default_factory=RunOptions)
    searched: tuple[Searched, ...] = ()

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("the grid has no model")
        drawn = [model.name for model in self.models if model.random_weights]
        if drawn and "accuracy" in self.options.only:
            raise ValueError(f"model '{drawn[0]}' with random weights has no accuracy: add --only flops,speed")
        labels = [model.label for model in self.models]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise ValueError(f"two models are called '{twice[0]}'; give one a `label` of its own")
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
        shared = table.pop("schedules", ())
        table.setdefault("methods", [{"name": name} for name in DEFAULT_METHODS])
        for entry in table["methods"] or ():
            if isinstance(entry, dict):
                default = () if entry.get("name") == "none" else shared
                own = {key: entry.pop(key) for key in [*entry] if key not in ("name", "schedules")}
                entry.update(schedules=entry.get("schedules", default), params=own)
        try:
            grid = cls.from_dict(table)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        for place, entry in enumerate(table.get("models", ())):
            if "name" not in entry:
                raise UserError(f"{path}: models[{place}] has no name")
        return grid

    @classmethod
    def from_flags(
        cls,
        base: Grid | None = None,
        *,
        models: Sequence[str] = (),
        checkpoint: Path | None = None,
        random_weights: bool = False,
        input_size: int | None = None,
        label: str | None = None,
        methods: Sequence[str] = (),
        schedules: Sequence[str] = (),
        data: str | None = None,
        **options: Any,
    ) -> Grid:
        """A grid from command line flags, on top of `base` (a grid file, say) where one is given.

        Each kind of flag replaces what `base` says on that matter; schedules replace those of every method.
        `options` are the fields of RunOptions, None where the flag was not given; `only` and `runtimes` are text with
        commas, and `batch_size` text.
        """
        grid = base or cls.default()
        for flag, value in (("--checkpoint", checkpoint), ("--label", label)):
            if value is not None and len(models) != 1:
                raise UserError(f"{flag} goes with exactly one --model, and {len(models) or 'none'} is given")
        given = {key: value for key, value in options.items() if value is not None}
        grid = replace(grid, options=replace(grid.options, **_read_options(given)))
        for flag, given_too in (("--random-weights", random_weights), ("--input-size", input_size)):
            if given_too and not models:
                raise UserError(f"{flag} says how to make the models that --model names, and none is given")
        if base is None and data not in (None, "bundled"):
            grid = replace(grid, options=replace(grid.options, limit=given.get("limit")))
        if models:
            specs = (ModelSpec(name, checkpoint, input_size, label or "", random_weights) for name in models)
            grid = replace(grid, models=tuple(specs))
            if base is None:
                grid = replace(grid, methods=_every_method())
        if methods:
            grid = replace(grid, methods=tuple(MethodSpec.from_text(text, schedules) for text in methods))
        elif schedules:
            kept = [method for method in grid.methods if method.name != "none"]
            grid = replace(grid, methods=tuple(replace(method, schedules=tuple(schedules)) for method in kept))
        return replace(grid, data=grid.data if data is None else data)

    def cells(self, model: ModelSpec) -> list[PlannedCell]:
        """The cells of one model in the order they run, without repetitions; the unreduced model first."""
        cells: dict[CellKey, PlannedCell] = {}
        for method in self.methods:
            for schedule in method.schedules or ("",):
                cell = PlannedCell(model.label, method, schedule)
                cells.setdefault(cell.key, cell)
        return list(cells.values())

    def describe(self) -> str:
        """What would be measured, for people: one line on how, then a line for each cell."""
        cells = [cell.id for model in self.models for cell in self.cells(model)]
        options = self.options
        images = f"{options.limit:,} images of {self.data}" if options.limit else f"all images of {self.data}"
        how = f"{len(cells)} cells: {', '.join(options.only)} on {images}, device {options.device}, {options.dtype}"
        sizes = ", ".join(map(str, options.sizes)) or options.batch_size
        runtimes = "" if self.options.runtimes == ("eager",) else f", timed in {', '.join(options.runtimes)}"
        return "\n".join([f"{how}, batch size {sizes}{runtimes}", *(f"  {cell}" for cell in cells)])

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, for the manifest of a run."""
        return json.loads(json.dumps(asdict(self), default=str))

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Grid:
        """The grid that `to_dict` wrote. Raises UserError for anything else, and for what this tokbench lacks."""
        return validated(cls, plain)


def _every_method() -> tuple[MethodSpec, ...]:
    return tuple(MethodSpec(name) for name in DEFAULT_METHODS)


def _read_options(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags that arrive as text, as RunOptions wants them."""
    read = dict(flags)
    if read.pop("compile", False):
        if "runtimes" in flags:
            raise UserError("--compile and --runtime contradict each other: --runtime alone can name compile, too")
        read["runtimes"] = ("compile",)
    for name in ("only", "runtimes"):
        if name in flags:
            read[name] = tuple(word.strip() for word in flags[name].split(","))
    text = str(flags.get("batch_size", ""))
    if re.fullmatch(r" *\d{1,18} *(, *\d{1,18} *)*", text):
        read["batch_size"] = tuple(map(int, text.split(",")))
    elif "," in text:
        raise UserError(f"--batch-size {text!r}: write whole numbers, as in 1,8,32")
    return read


def require_data(spec: str) -> None:
    """Raise UserError for data that are a folder which is not there: what can be told without opening any."""
    kind, slash, _ = spec.partition("/")
    if spec and spec not in BUNDLED_DATA and not (slash and kind.lower() in DATA_PACKAGES):
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
    close = nearest(folder.name, [*BUNDLED_DATA, *siblings])
    kinds = ", ".join(f"{kind}/…" for kind in DATA_PACKAGES)
    raise UserError(f"data folder {str(folder)!r} does not exist.{close or f' Other data: bundled, {kinds}.'}")


def describe_methods() -> str:
    """All methods, one a line: name, parameters with their defaults, what they look at beside the tokens, paper."""
    from tokbench.catalogue import catalogue

    rows = [("none", "", "", "the unreduced model, always measured first")]
    for entry in catalogue():
        params = ",".join(
            key if value is None else f"{key}={_write_value(value)}" for key, value in entry.parameters.items()
        )
        needs = f"needs {', '.join(entry.needs)}" if entry.needs else ""
        rows.append((entry.name, params, needs, entry.paper))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1, 2)]
    return "\n".join(
        "  ".join([*(f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    )


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
