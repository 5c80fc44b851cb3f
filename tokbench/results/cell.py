"""A measured cell: its identity and its figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, NamedTuple

from tokbench.errors import printable
from tokbench.results.records import Record
from tokbench.schedules import Schedule, parse_schedule


@dataclass(frozen=True)
class CellKey:
    """A cell's identity, however its schedule and parameters are written: `13` is `constant:13`, and 1 is 1.0."""

    model: str
    method: str
    params: str
    schedule: Schedule | None

    @classmethod
    def of(cls, model: str, method: str, params: Mapping[str, Any], schedule: str) -> CellKey:
        """Raises ScheduleError for a schedule that does not parse."""
        meaning = json.dumps(_by_value(params), sort_keys=True)
        return cls(model, method, meaning, _parsed(schedule) if schedule else None)


_parsed = cache(parse_schedule)  # the same few in thousands of records


def key_of(record: Record) -> CellKey:
    """The cell that a record is about."""
    return CellKey.of(record.model, record.method, record.params, record.schedule)


def _by_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _by_value(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_by_value(own) for own in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Setting(NamedTuple):
    """The batch size and runtime of a timing, where a run has several; None matches any."""

    batch_size: int | None = None
    runtime: str | None = None

    @classmethod
    def of(cls, record: Record) -> Setting:
        """The setting of a timing, or of a failed one; other records have none."""
        if record.kind not in ("speed", "failure"):
            return cls()
        return cls(getattr(record, "batch_size", None), getattr(record, "runtime", None))

    def fits(self, other: Setting) -> bool:
        """Whether both agree where both are set."""
        return all(mine is None or its is None or mine == its for mine, its in zip(self, other, strict=True))

    @property
    def words(self) -> str:
        """The setting as printed after a cell's name."""
        size, runtime = self
        return (f" at batch {size}" if size else "") + (f" in {runtime}" if runtime else "")


ANYHOW = Setting()


class RecordIndex:
    """The records of a run by cell and kind, and speed by setting, in the order of the cells' first records.

    A later record replaces an earlier one of its cell, kind and setting, and a failure to measure it.
    """

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self.cells: dict[CellKey, dict[tuple[str, Setting], Record]] = {}
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        kinds, at = self.cells.setdefault(key_of(record), {}), Setting.of(record)
        for slot, other in [*kinds.items()]:
            if getattr(other, "phase", None) in (record.kind, "setup") and slot[1].fits(at):
                del kinds[slot]
        kinds[record.kind, at] = record

    def find(self, key: CellKey, kind: str, at: Setting = ANYHOW) -> Any:
        """The last record of that kind for the cell (of speed: in that setting), None if there is none."""
        kinds = self.cells.get(key, {})
        return next((kinds[slot] for slot in reversed(kinds) if slot[0] == kind and slot[1].fits(at)), None)

    def rows(self) -> list[tuple[CellKey, Setting, dict[str, Record]]]:
        """Each cell with a setting and its records by kind; once for each setting that cells were timed in."""
        told = {key: [slot[1] for slot in kinds if slot[1] != ANYHOW] for key, kinds in self.cells.items()}
        sizes, runtimes = (
            any(len({setting[axis] for setting in own} - {None}) > 1 for own in told.values()) for axis in range(2)
        )
        rows: list[tuple[CellKey, Setting, dict[str, Record]]] = []
        for key, kinds in self.cells.items():
            apart = [Setting(at.batch_size if sizes else None, at.runtime if runtimes else None) for at in told[key]]
            settings = [
                at
                for at in dict.fromkeys(apart)
                if not any(at.fits(other) and at.count(None) > other.count(None) for other in apart)
            ]
            rows += [
                (key, at, {slot[0]: record for slot, record in kinds.items() if slot[1].fits(at)})
                for at in settings or [ANYHOW]
            ]
        order = [*dict.fromkeys(at.runtime for _, at, _ in rows)]
        return sorted(rows, key=lambda row: (row[1].batch_size or 0, order.index(row[1].runtime)))


@dataclass(frozen=True)
class Figure:
    """A measured value in the unit of its metric, and the ends of its 95 % interval if known."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends, None if one is not known."""
        return None if self.low is None or self.high is None else (self.low, self.high)


@dataclass(frozen=True, eq=False)
class Cell:
    """One model × method × schedule as a run measured it. What is not known is None.

    Attributes:
        run: what the run is called in a table.
        schedule, id: as they were written when the cell was first recorded.
        variant: the method as the command line writes it: `tome:prop_attn=false`.
        tokens: left after each block, prefix included; their mean if images differ.
        figures: the measured ones, by their names in `results.metrics.METRICS`.
        also: figures other than metrics, by column.
        weights: "trained" or "random".
        runtime: that it was timed in: "eager", "compile", "onnxruntime", …
        error: why it failed.
        kinds: of its records, such as "accuracy".
        caveats: warnings given while it was measured, by kind.
        calibrated: parameters measured on images.
        at: the setting it was timed in, if the run has several: there is a cell for each.
        processes: how many timed it.
    """

    key: CellKey
    id: str
    run: str
    params: Mapping[str, Any]
    schedule: str
    figures: Mapping[str, Figure]
    also: Mapping[str, float]
    resolved: str | None = None
    calibrated: Mapping[str, Any] | None = None
    tokens: tuple[float, ...] = ()
    images: int | None = None
    batch_size: int | None = None
    skipped: int | None = None
    nonfinite: int | None = None
    input_size: str | None = None
    data: str | None = None
    data_fingerprint: str | None = None
    device: str | None = None
    machine: str | None = None
    dtype: str | None = None
    runtime: str | None = None
    weights_sha256: str | None = None
    fused_attention: str | None = None
    weights: str | None = None
    error: str | None = None
    kinds: frozenset[str] = frozenset()
    caveats: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    at: Setting = ANYHOW
    processes: int = 1

    def __getitem__(self, metric: str) -> Figure | None:
        """The figure of that metric, None if not measured."""
        return self.figures.get(metric)

    def value(self, metric: str) -> float | None:
        """The figure's value alone."""
        figure = self.figures.get(metric)
        return None if figure is None else figure.value

    @property
    def model(self) -> str:
        return self.key.model

    @property
    def method(self) -> str:
        return self.key.method

    @cached_property
    def variant(self) -> str:
        values = {name: value if isinstance(value, str) else json.dumps(value) for name, value in self.params.items()}
        text = self.method + (":" if values else "") + ",".join(f"{name}={value}" for name, value in values.items())
        return printable(text)

    @property
    def tokens_final(self) -> int | None:
        """Tokens left after the last block, rounded."""
        return round(self.tokens[-1]) if self.tokens else None

    @property
    def ran(self) -> str:
        """The runtime as in titles; "" for eager PyTorch if the run has no other."""
        return {"eager": self.at.runtime or "", "compile": "compiled"}.get(runtime := self.runtime or "eager", runtime)

    @property
    def is_baseline(self) -> bool:
        return self.method == "none"

    @property
    def is_searched(self) -> bool:
        return bool(self.key.schedule and self.key.schedule.budget)

    @property
    def doubts(self) -> tuple[str, ...]:
        """Warnings given while its speed was measured."""
        return self.caveats.get("speed", ())

    @property
    def is_broken(self) -> bool:
        """Whether its logits were NaN or infinite for some image."""
        return bool(self.nonfinite)
