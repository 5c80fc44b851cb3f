"""A run's records: a pydantic model for each kind and one for the manifest, validated on writing and on reading.

Fields that an older tokbench did not write are None; unknown fields are kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from tokbench.errors import UserError
from tokbench.validation import first_fault

SCHEMA = 1

Number = Annotated[float, Field(gt=-1e300, lt=1e300)]
Positive = Annotated[float, Field(gt=0, lt=1e300)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Mean = Annotated[float, Field(ge=0, lt=2**63)]
Timings = list[Positive] | list[list[Positive]]
_LOW_HIGH = ("_low", "_high")
_ENDS = TypeAdapter(dict[str, Number], config=ConfigDict(strict=True, allow_inf_nan=False))


def _known_runtime(compiled: Any) -> str:
    """The runtime of a run that recorded only whether models were compiled."""
    return "compile" if compiled else "eager"


class _Stored(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, populate_by_name=True)

    def plain(self) -> dict[str, Any]:
        """The given fields as JSON values."""
        return self.model_dump(by_alias=True, exclude_unset=True)


class Record(_Stored):
    """Fields of all records: the cell, and the conditions it was measured under."""

    version: int = Field(SCHEMA, alias="schema")
    kind: str
    cell: str
    model: str
    method: str
    params: dict[str, Any] = {}
    schedule: str
    resolved: str | None = None
    calibrated: dict[str, Any] | None = None
    tokens: list[Count | Mean] | None = None
    weights: str | None = None
    weights_sha256: str | None = None
    input_size: list[Count] | None = None
    data: str | None = None
    data_fingerprint: str | None = None
    dtype: str | None = None
    device: str | None = None
    fused_attention: str | None = None
    caveats: list[str] = []  # why these figures may not mean what they seem to

    @model_validator(mode="after")
    def _ends_are_numbers(self) -> Record:
        """The ends of 95 % intervals are extra fields, such as `drop_low` and `latency_high_ms`."""
        given = (self.model_extra or {}).items()
        ends = {name: end for name, end in given if end is not None and name.removesuffix("_ms").endswith(_LOW_HIGH)}
        if ends:
            _ENDS.validate_python(ends)
        return self


class FlopsRecord(Record):
    """Multiply-adds per image. `flops_attention` to `flops_rest` add up to `flops`."""

    flops: Annotated[int, Field(gt=0, lt=2**63)]
    flops_ratio: Positive | None = None
    flops_attention: int | None = None
    flops_mlp: int | None = None
    flops_method: int | None = None
    flops_rest: int | None = None
    unsupported: dict[str, int] | None = None


class AccuracyRecord(Record):
    """Shares of images; `drop` in points. The ends of intervals, such as `drop_low`, come from `running.figures`.

    pass_seconds: of the pass over the images for all cells in it, since it was last interrupted; reading_seconds: of
    these, waiting for images, on average over the workers that shared them.
    """

    images: Count
    correct: Count | None = None
    correct5: Count | None = None
    unlabelled: Count | None = None
    skipped: Count | None = None
    nonfinite: Count | None = None
    top1: Share | None = None
    top5: Share | None = None
    drop: Number | None = None
    mcnemar_p: Share | None = None
    agreement: Share | None = None
    kl: Number | None = None
    similarity: Number | None = None
    knn_top1: Share | None = None
    knn_drop: Number | None = None
    knn_images: Count | None = None
    output_shift: Number | None = None
    output_correlation: Number | None = None
    batch_size: Count | None = None
    pass_seconds: Positive | None = None
    reading_seconds: Number | None = None
    workers: Count | None = None


class SpeedRecord(Record):
    """Seconds of every round and pass (a list for each process, if there were several), and derived figures.

    provider: what computes inside the runtime, such as ONNX Runtime's "CPUExecutionProvider". same_answers: the share
    of `compared_images` on which the answer is eager's.
    """

    runtime: str
    provider: str | None = None
    threads: Count | None = None
    batch_size: Count | None = None
    processes: Count | None = None
    seconds: Timings | None = None
    free_seconds: Timings | None = None
    reference_seconds: Timings | None = None
    latency_seconds: Timings | None = None
    reference_latency_seconds: Timings | None = None
    iterations: Count | None = None
    throughput: Positive | None = None
    speedup: Positive | None = None
    latency_ms: Positive | None = None
    latency_p95_ms: Positive | None = None
    latency_speedup: Positive | None = None
    efficiency: Positive | None = None
    free_speedup: Positive | None = None
    runtime_speedup: Positive | None = None
    same_answers: Share | None = None
    compared_images: Count | None = None
    peak_memory_bytes: Count | None = None
    reserved_memory_bytes: Count | None = None
    attention_kernels: list[str] | None = None
    other_cpu: Number | None = None
    gpu_state: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _before_there_were_runtimes(cls, fields: dict[str, Any]) -> dict[str, Any]:
        return {"runtime": _known_runtime(fields.get("compiled")), **fields}


class FailureRecord(Record):
    """A cell that failed in a phase: "setup", "accuracy" or, in one runtime, "speed"."""

    phase: str
    runtime: str | None = None
    message: str
    traceback: str | None = None


KINDS: dict[str, type[Record]] = {
    "flops": FlopsRecord, "accuracy": AccuracyRecord, "speed": SpeedRecord, "failure": FailureRecord,
}  # fmt: skip


class ModelConditions(_Stored):
    """Conditions of one model of a run; those of the data are None without data."""

    weights_sha256: str | None = None
    input_size: list[Count] | None = None
    data: str | None = None
    data_fingerprint: str | None = None
    images: Count | None = None


class Conditions(_Stored):
    """What must be the same in every session of a run."""

    dtype: str | None = None
    device: str | None = None
    batch_size: Count | list[Count] | None = None
    runtimes: list[str] = ["eager"]
    fused: str = "on"
    models: dict[str, ModelConditions] = {}

    @model_validator(mode="before")
    @classmethod
    def _before_there_were_runtimes(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):  # a damaged manifest
            return fields
        return {"runtimes": [_known_runtime(fields.get("compile"))], **fields}


class GridAsked(_Stored):
    """The grid as it was asked for; `Grid.from_dict` reads it."""

    models: list[dict[str, Any]] = []
    methods: list[dict[str, Any]] = []
    data: str | None = None
    options: dict[str, Any] = {}


class Session(_Stored):
    """What one command asked of a run."""

    grid: GridAsked = GridAsked()
    started: str | None = None
    command: str | None = None
    git: dict[str, Any] | None = None
    plugins: dict[str, str] = {}


class Machine(_Stored):
    """The hardware, as `measure.environment` describes it."""

    device: str | None = None
    cpu: str | None = None
    gpu: str | None = None
    threads: Count | None = None
    kernels: str | None = None

    def name(self, device: str | None) -> str | None:
        """The hardware of such a device."""
        return self.gpu if str(device).startswith("cuda") else self.cpu


class Manifest(Session):
    """The first session of a run with the conditions it was measured under, and the sessions that continued it.

    `conditions` is None in runs of the first version.
    """

    version: int = Field(SCHEMA, alias="schema")
    conditions: Conditions | None = None
    machine: Machine = Machine()
    packages: dict[str, Any] = {}
    continued: list[Session] = []

    @property
    def sessions(self) -> list[Session]:
        """All sessions, the first one first."""
        return [self, *self.continued]


S = TypeVar("S", bound=_Stored)


def read_manifest(text: str, path: Path) -> Manifest:
    """Parse a manifest. Raises UserError that names the wrong field."""
    return _made(Manifest, _json_object(text, path), path)


def read_record(line: bytes, where: str) -> Record:
    """Parse a record. Raises UserError that names the wrong field."""
    return make_record(_json_object(line, where), where)


def make_record(fields: dict[str, Any], where: str = "record") -> Record:
    """A record of its `kind` from its fields. Raises UserError for an invalid field."""
    return _made(KINDS.get(str(fields.get("kind")), Record), fields, where)


def _made(model: type[S], values: dict[str, Any], where: str | Path) -> S:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {first_fault(error)}.") from error


def _json_object(text: str | bytes, where: str | Path) -> dict[str, Any]:
    """A JSON object with a known schema. Raises UserError for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}).") from error
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(found).__name__}.")
    schema = found.get("schema")
    if not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        hint = "a newer tokbench wrote it; upgrade to read it" if newer else "no tokbench wrote that"
        raise UserError(f"{where}: schema {schema!r}, and this tokbench reads up to schema {SCHEMA}: {hint}.")
    return found
