"""Runs as cells: loading, filtering, groups of comparable cells, and Pareto fronts."""

from __future__ import annotations

import gc
import json
import math
import operator
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from tokbench.errors import UserError, nearest, printable
from tokbench.results.cell import Cell, CellKey, RecordIndex, Setting
from tokbench.results.folder import RunFolder
from tokbench.results.metrics import GAINS, METRICS, metric_name, metric_of_column
from tokbench.results.records import Machine, Record

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
# Cells that agree in all of these are comparable, also between runs.
COMPARABLE = (
    "model", "weights_sha256", "input_size", "data", "data_fingerprint", "device", "machine", "dtype", "runtime",
    "fused_attention",
)  # fmt: skip
# Cells that agree in these share a panel of a plot, so that machines can be overlaid.
PANEL = ("model", "weights_sha256", "input_size", "data", "data_fingerprint")

# The columns before the figures and behind them: attributes of a cell, but for `params`, as JSON, and `cell`, its id.
_DESCRIBED = ("run", "model", "method", "variant", "params", "schedule", "resolved", "is_baseline", "tokens_final")
_CONDITIONS = (
    "images", "batch_size", "skipped", "nonfinite", "input_size", "data", "data_fingerprint", "device", "machine",
    "dtype", "runtime", "weights_sha256", "fused_attention", "weights", "cell", "error",
)  # fmt: skip
COUNTS = frozenset({"tokens_final", "images", "batch_size", "skipped", "nonfinite"})


def figure_columns() -> list[str]:
    """The columns of measured values."""
    return [column for metric in METRICS.values() for column in metric.columns]


def all_columns() -> list[str]:
    """Every column of `load_table`, in order."""
    return [*_DESCRIBED, *figure_columns(), *_CONDITIONS]


def columns_of(cell: Cell) -> dict[str, Any]:
    """A cell as a row: every column of `load_table`, None if not known."""
    row: dict[str, Any] = dict.fromkeys(all_columns())
    row |= {name: getattr(cell, name, None) for name in (*_DESCRIBED, *_CONDITIONS)} | dict(cell.also)
    for name, figure in cell.figures.items():
        metric = METRICS[name]
        row |= dict(zip((metric.columns[0], *metric.interval), (figure.value, figure.low, figure.high), strict=False))
    return row | {"params": json.dumps(cell.params, sort_keys=True), "cell": cell.id}


def find_column(name: str, cells: Sequence[Cell], more: Collection[str] = ()) -> str:
    """The column of `load_table`, or of `more`, for the name of a metric or column.

    Raises UserError for other names, and for a metric that none of the cells has.
    """
    column, options = METRICS[name].columns[0] if name in METRICS else name, [*all_columns(), *more]
    if column not in options:
        hint = nearest(name, dict.fromkeys([*METRICS, *options])) or " Try model, method, schedule, run or a metric."
        raise UserError(f"no column {name!r}.{hint}")
    metric = metric_of_column(column)
    if metric and cells and not any(cell[metric] for cell in cells):
        raise UserError(f"no cell here has {name}; measured: {measured_names(cells)}.")
    return column


def load_table(*runs: str | Path) -> pd.DataFrame:
    """All cells of these runs, a row each, in the order of their first records.

    Accuracies and agreement are in percent, drops in points, FLOPs in 1e9 multiply-adds; the ends of 95 % intervals
    are beside their values. What was not measured is NaN or None. Raises UserError for a folder that is no run.
    """
    return frame(load_cells(runs))


def frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """Cells as a table (columns: `all_columns()`)."""
    import pandas as pd

    table = pd.DataFrame([columns_of(cell) for cell in cells], columns=all_columns())
    kinds = {name: "Int64" if name in COUNTS else object for name in (*_DESCRIBED, *_CONDITIONS)}
    return table.astype({**kinds, "is_baseline": bool, **dict.fromkeys(figure_columns(), float)})


def load_cells(runs: Iterable[str | Path]) -> list[Cell]:
    """All cells of these runs in the order of their first records.

    A run is named by its folder, and by its parent folder too if names repeat; one given twice is read once.
    Raises UserError for a folder that is no run.
    """
    return [cell for cells in _cells_by_run(runs).values() for cell in cells]


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Suspend garbage collection, which takes a third of the time of reading many records."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@_without_collecting()
def _cells_by_run(runs: Iterable[str | Path]) -> dict[str, list[Cell]]:
    """The cells of each run, by the run as given."""
    given = {Path(run).resolve(): str(run) for run in runs}
    folders = [RunFolder.open(path) for path in given]
    names = [folder.path.name for folder in folders]
    found = {}
    for run, folder, name in zip(given.values(), folders, names, strict=True):
        called = str(Path(folder.path.parent.name, name)) if names.count(name) > 1 else name
        found[run] = cells_of(folder.records(), called, folder.manifest.machine)
    return found


def load_shown(runs: Sequence[str | Path], tell: Callable[[str], None]) -> list[Cell]:
    """`load_cells` for output. Tells which runs are empty; raises UserError if all are."""
    found = _cells_by_run(runs)
    cells, empty = [cell for own in found.values() for cell in own], [run for run, own in found.items() if not own]
    holds = f"{', '.join(empty)} {'holds' if len(empty) == 1 else 'hold'} no records"
    if not cells:
        raise UserError(f"nothing to show: {holds}.")
    if empty:
        tell(f"{holds}, and so {'is' if len(empty) == 1 else 'are'} not shown.")
    return cells


def cells_of(records: Iterable[Record], run: str = "", machine: Machine | None = None) -> list[Cell]:
    """The cells of one run from its records, also while it is running."""
    index = RecordIndex(records)
    return _share_conditions([_cell(key, at, kinds, run, machine) for key, at, kinds in index.rows()])


def _cell(key: CellKey, at: Setting, kinds: Mapping[str, Record], run: str, machine: Machine | None) -> Cell:
    fields: dict[str, Any] = {}
    for record in kinds.values():
        given = vars(record) | (record.model_extra or {})
        fields.update({name: value for name, value in given.items() if value is not None})
    if "accuracy" in kinds:  # a run that grew measured the other kinds on fewer images
        fields["data_fingerprint"] = kinds["accuracy"].data_fingerprint
    if size := getattr(kinds.get("speed"), "batch_size", None):  # accuracy may have been measured in others
        fields["batch_size"] = size
    first, failure = next(iter(kinds.values())), kinds.get("failure")
    named = {name: fields.get(name) for name in _CONDITIONS if name in Cell.__dataclass_fields__}
    also = {column: metric.scale for metric in METRICS.values() for column in metric.also}
    figures = {name: metric.read(fields) for name, metric in METRICS.items()}
    values = named | {
        "id": first.cell + at.words,
        "run": run,
        "schedule": first.schedule,
        "resolved": fields.get("resolved"),
        "input_size": "x".join(map(str, fields.get("input_size") or ())) or None,
        "machine": machine.name(fields.get("device")) if machine else None,
        "error": getattr(failure, "message", None),
    }
    told: dict[str, Any] = {name: printable(own) if isinstance(own, str) else own for name, own in values.items()}
    return Cell(
        key=replace(key, model=printable(key.model), method=printable(key.method)),
        params=first.params,
        figures={name: figure for name, figure in figures.items() if figure is not None},
        also={column: fields[column] * scale for column, scale in also.items() if column in fields},
        calibrated=fields.get("calibrated"),
        tokens=tuple(fields.get("tokens") or ()),
        kinds=frozenset(kinds),
        at=at,
        processes=fields.get("processes", 1),
        caveats={kind: tuple(map(printable, record.caveats)) for kind, record in kinds.items() if record.caveats},
        **told,
    )


def _share_conditions(cells: list[Cell]) -> list[Cell]:
    """Give cells that failed early the conditions that their model's other cells share."""
    whole: dict[Cell, Cell] = {}
    for mine in group_by(cells, operator.attrgetter("model")):
        names = (*COMPARABLE[1:], "images", "batch_size")
        known = {name: {getattr(cell, name) for cell in mine} - {None} for name in names}
        # Cells that were never timed go with the first runtime.
        runtime = next((cell.runtime for cell in mine if cell.runtime), "eager")
        shared = {"runtime": runtime} | {name: values.pop() for name, values in known.items() if len(values) == 1}
        seen = {cell.data_fingerprint for cell in mine if "accuracy" in cell.kinds}
        for cell in mine:
            lacks = {name: value for name, value in shared.items() if getattr(cell, name) is None}
            if "accuracy" not in cell.kinds and len(seen) == 1:
                # In a run that grew, cells without accuracy still have the old number of images.
                lacks["data_fingerprint"], *_ = seen
            whole[cell] = replace(cell, **lacks) if lacks else cell
    return [whole[cell] for cell in cells]


def run_names(cells: Sequence[Cell]) -> dict[str, str]:
    """Short names that tell runs apart: by machine, dtype, batch size, runtime, two of them, or the folder."""
    first = [own[0] for own in group_by(cells, lambda cell: cell.run)]
    machines, dtypes, runtimes = ([getattr(cell, name) for cell in first] for name in ("machine", "dtype", "runtime"))
    batches = [cell.batch_size and f"batch {cell.batch_size}" for cell in first]
    pairs = ((machines, dtypes), (dtypes, batches), (machines, batches))
    for words in ((machines,), (dtypes,), (batches,), (runtimes,), *pairs):
        told = list(zip(*words, strict=True))
        if all(map(all, told)) and len(set(told)) == len(told):
            return {cell.run: ", ".join(map(str, parts)) for cell, parts in zip(first, told, strict=True)}
    return {cell.run: cell.run for cell in first}


_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "=": partial(math.isclose, rel_tol=1e-5, abs_tol=1e-8),
}


def filter_cells(cells: Sequence[Cell], conditions: Iterable[str]) -> list[Cell]:
    """The cells that meet every condition: `method=tome`, `schedule=flops:*`, `drop<1`, `gflops<=2.5`.

    Text may hold the wildcards * and ?; numbers compare with <, <=, >, >= and =. Two conditions with = on one column
    are alternatives. Raises UserError for a condition that cannot be read and for an unknown column.
    """
    wanted: dict[str, list[Callable[[Any], bool]]] = {}
    for number, condition in enumerate(conditions):
        parts = re.fullmatch(r"\s*(\w+)\s*(<=|>=|<|>|=)\s*(.+?)\s*", condition)
        if parts is None:
            form = "COLUMN=VALUE or METRIC<NUMBER, such as 'method=tome' or 'drop<1'"
            raise UserError(f"filter {condition!r}: write {form}.")
        name, sign, value = parts.groups()
        try:
            column = find_column(name, cells)
        except UserError as error:
            raise UserError(f"filter {condition!r}: {error}") from None
        key = column if sign == "=" else f"{column} {number}"
        wanted.setdefault(key, []).append(_test(column, sign, value, condition))
    tests = [(key.partition(" ")[0], alternatives) for key, alternatives in wanted.items()]
    if not tests:
        return list(cells)
    rows = [(cell, columns_of(cell)) for cell in cells]
    return [cell for cell, row in rows if all(any(test(row[column]) for test in own) for column, own in tests)]


def _test(column: str, sign: str, value: str, condition: str) -> Callable[[Any], bool]:
    if column not in figure_columns() and column not in COUNTS:
        if sign != "=":
            raise UserError(f"filter {condition!r}: {column} is text, which compares with = only.")
        return lambda found: fnmatchcase(str("" if found is None else found).lower(), value.lower())
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise UserError(f"filter {condition!r}: {value!r} is not a number.")
    return lambda found: found is not None and _OPERATORS[sign](float(found), number)


def group_by(items: Iterable[T], key: Callable[[T], Any]) -> list[list[T]]:
    """Items grouped by key, in the order of the keys' first occurrence."""
    groups: dict[Any, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def comparable(cells: Sequence[Cell], *metrics: str) -> list[list[Cell]]:
    """The cells split into sets that may be compared: same model, weights, input size, data, device, dtype and runtime,
    and one batch size where several were timed.

    metrics: to compare them in; if one of these is `paced`, each set is from one run.
    """
    paced = any(METRICS[metric_name(name)].paced for name in metrics)
    timed_at = _timed_at(cells)
    for cell in cells:  # cells timed at several sizes come once for each; cells never timed go with the first
        if cell.at.batch_size:
            timed_at.setdefault((cell.run, cell.model), cell.at.batch_size)

    def key(cell: Cell) -> tuple[Any, ...]:
        size = cell.at.batch_size or timed_at.get((cell.run, cell.model))
        return _conditions(cell), size, cell.run if paced else None

    return group_by(cells, key)


_conditions = operator.attrgetter(*COMPARABLE)


def _timed_at(cells: Sequence[Cell]) -> dict[tuple[str, str], int]:
    """The batch size that a run timed a model at, where otherwise comparable cells were timed at several."""
    sizes: dict[tuple[str, str], int] = {}
    for cell in cells:
        if (cell["speedup"] or cell["throughput"]) and cell.batch_size is not None:
            sizes.setdefault((cell.run, cell.model), cell.batch_size)
    several: dict[tuple[str, str], int] = {}
    for group in group_by(cells, _conditions):
        places = {(cell.run, cell.model) for cell in group} & sizes.keys()
        if len({sizes[place] for place in places}) > 1:
            several |= {place: sizes[place] for place in places}
    return several


def least_doubted(cells: Sequence[Cell]) -> list[Cell]:
    """The cells with the fewest warnings about their speed."""
    least = min((len(cell.doubts) for cell in cells), default=0)
    return [cell for cell in cells if len(cell.doubts) == least]


def known_gain(cells: Sequence[Cell]) -> str:
    """The first of `GAINS` that was measured; top1 if none was."""
    return next((name for name in GAINS if any(cell[name] for cell in cells)), next(iter(GAINS)))


def measured(cells: Sequence[Cell]) -> list[str]:
    """The metrics that any cell has."""
    return [name for name in METRICS if any(cell[name] for cell in cells)]


def measured_names(cells: Sequence[Cell]) -> str:
    """Their names as a list in words."""
    return ", ".join(measured(cells)) or "nothing"


def pareto_front(cells: Sequence[Cell], x: str, y: str) -> set[Cell]:
    """The cells that no comparable cell beats: as good in both metrics and better in one.

    x, y: names in `METRICS`; values within a metric's `tie` count as equal. Throughput is judged by the speed-up if all
    cells have it: that is paired within timing rounds, so drift does not decide, and the fronts of both agree. Cells
    that lack either metric, or with NaN or infinite logits, are on no front.
    """
    return {cell for group in comparable(cells, x, y) for cell in Rivals(group).front(x, y)}


class Rivals:
    """Cells that are all comparable in the metrics asked for, see `pareto_front`."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self._cells = [cell for cell in cells if not cell.is_broken]
        self._values: dict[str, NDArray[np.float64]] = {}

    def front(self, x: str, y: str) -> list[Cell]:
        """Those that none of the others beats."""
        known = np.flatnonzero(np.isfinite(self._figures(x)) & np.isfinite(self._figures(y)))
        (x_best, x_tied), (y_best, y_tied) = (self._costs(name, known) for name in (x, y))
        # Beaten: the best y among those clearly better in x is no worse, or among those no worse in x clearly better.
        beaten = _lowest(x_tied, y_best, x_best, "left") <= y_tied
        beaten |= _lowest(x_best, y_tied, x_tied, "right") < y_best
        return [self._cells[place] for place in known[~beaten]]

    def _figures(self, name: str) -> NDArray[np.float64]:
        """The metric's values, NaN if not measured."""
        if name not in self._values:
            self._values[name] = np.array([cell.value(name) for cell in self._cells], dtype=float)
        return self._values[name]

    def _costs(self, name: str, known: NDArray[np.intp]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Costs of these cells (lower is better), and for each the highest cost that ties with it."""
        if name == "throughput" and np.isfinite(self._figures("speedup")[known]).all():
            name = "speedup"
        metric, values = METRICS[name], self._figures(name)[known]
        if metric.better == "lower":
            return values, values * (1 + metric.tie)
        return -values * (1 + metric.tie), -values


def _lowest(
    costs: NDArray[np.float64], others: NDArray[np.float64], limits: NDArray[np.float64], side: Literal["left", "right"]
) -> NDArray[np.float64]:
    """For each limit, the lowest of `others` whose cost is below it ("left") or not above it ("right")."""
    order = np.argsort(costs)
    lowest = np.concatenate([[np.inf], np.minimum.accumulate(others[order])])
    return lowest[np.searchsorted(costs[order], limits, side)]
