"""One table of metrics, and runs as one table of cells. Any metric goes on any axis of a plot; the Pareto front
follows from which way each is better. A new metric is a new row of `METRICS` and its value in `_VALUES`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from tokbench.errors import UserError, nearest, printable
from tokbench.store import RunFolder

Record = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """One measured quantity.

    Attributes:
        label: with its unit, for an axis.
        short: with its unit, for a table's head.
        column: of the table `load_table` gives.
        better: which way is better.
        digits: after the decimal point, in tables.
        low, high: columns of its 95 % interval, drawn as error bars; "" where there is none.
        tie: values closer than this share of each other count as equal on a Pareto front.
        paced: whether it follows the machine's pace, which is another in every run (see docs/measuring.md).
    """

    label: str
    short: str
    column: str
    better: Literal["higher", "lower"]
    digits: int
    low: str = ""
    high: str = ""
    tie: float = 0.0
    paced: bool = False


# Schedules that aim at the same FLOPs end a fraction of a percent apart, which must not decide who is on a front.
_TIE = 0.01

METRICS: dict[str, Metric] = {
    # The bars of top-1 are the paired interval of the drop, laid around the cell's top-1: all cells saw the same
    # images, so the far wider interval of top-1 itself (columns top1_low, top1_high) would hide real differences.
    "top1": Metric("Top-1 accuracy (%)", "Top-1 %", "top1", "higher", 2, "top1_paired_low", "top1_paired_high"),
    "top5": Metric("Top-5 accuracy (%)", "Top-5 %", "top5", "higher", 2, "top5_low", "top5_high"),
    "drop": Metric("Top-1 drop (points)", "Drop (points)", "drop", "lower", 2, "drop_low", "drop_high"),
    "agreement": Metric(
        "Agreement with the unreduced model (%)", "Agree %", "agreement", "higher", 2, "agreement_low", "agreement_high"
    ),
    "kl": Metric("KL divergence from the unreduced model (nats)", "KL nats", "kl", "lower", 4, "kl_low", "kl_high"),
    "similarity": Metric(
        "Cosine of features to the unreduced model's",
        "Cosine",
        "similarity",
        "higher",
        4,
        "similarity_low",
        "similarity_high",
    ),
    "gflops": Metric("GFLOPs per image", "GFLOPs", "gflops", "lower", 3, tie=_TIE),
    "flops_ratio": Metric("FLOPs relative to the unreduced model", "FLOPs ratio", "flops_ratio", "lower", 2, tie=_TIE),
    "gflops_attention": Metric(
        "GFLOPs of attention per image", "Attn GFLOPs", "gflops_attention", "lower", 3, tie=_TIE
    ),
    "gflops_mlp": Metric("GFLOPs of the MLPs per image", "MLP GFLOPs", "gflops_mlp", "lower", 3, tie=_TIE),
    "gflops_method": Metric(
        "GFLOPs the method itself adds per image", "Method GFLOPs", "gflops_method", "lower", 4, tie=_TIE
    ),
    "gflops_rest": Metric("GFLOPs of all else per image", "Other GFLOPs", "gflops_rest", "lower", 4, tie=_TIE),
    "method_share": Metric(
        "The method's own share of the FLOPs (%)", "Overhead %", "method_share", "lower", 2, tie=_TIE
    ),
    "throughput": Metric(
        "Throughput (images/s)", "Images/s", "throughput", "higher", 0, "throughput_low", "throughput_high", _TIE, True
    ),
    "speedup": Metric(
        "Speed-up over the unreduced model (×)", "Speed-up", "speedup", "higher", 2, "speedup_low", "speedup_high", _TIE
    ),
    "latency": Metric(
        "Latency at batch 1 (ms)",
        "Latency ms",
        "latency_ms",
        "lower",
        2,
        "latency_low_ms",
        "latency_high_ms",
        _TIE,
        True,
    ),
    "latency_p95": Metric(
        "Latency at batch 1, 95th percentile (ms)", "p95 ms", "latency_p95_ms", "lower", 2, tie=_TIE, paced=True
    ),
    "latency_speedup": Metric(
        "Speed-up at batch 1 (×)",
        "× at batch 1",
        "latency_speedup",
        "higher",
        2,
        "latency_speedup_low",
        "latency_speedup_high",
        _TIE,
    ),
    "efficiency": Metric(
        'Efficiency (speed relative to the control "free")',
        "Efficiency",
        "efficiency",
        "higher",
        2,
        "efficiency_low",
        "efficiency_high",
        _TIE,
    ),
    "memory": Metric("Peak memory (MiB)", "Memory MiB", "memory_mib", "lower", 0, tie=_TIE),
}

# What is to be kept of a model, best first: without labels there is no top-1, without classes no agreement.
GAINS = ("top1", "agreement", "similarity")

# Cells that agree in all of these may be compared with each other, whichever run they come from.
COMPARABLE = (
    "model",
    "weights_sha256",
    "input_size",
    "data",
    "data_fingerprint",
    "device",
    "machine",
    "dtype",
    "compiled",
)
# Cells that agree in these lie in the same panel of a plot, so that machines can be laid over each other.
PANEL = ("model", "weights_sha256", "input_size", "data", "data_fingerprint")

COLUMNS = (
    "run", "model", "method", "variant", "params", "schedule", "resolved", "is_baseline", "tokens_final", "gflops",
    "gflops_attention", "gflops_mlp", "gflops_method", "gflops_rest", "method_share",
    "flops_ratio", "throughput", "throughput_low", "throughput_high", "speedup", "speedup_low", "speedup_high",
    "latency_ms",
    "latency_low_ms", "latency_high_ms", "latency_p95_ms",
    "latency_speedup", "latency_speedup_low", "latency_speedup_high",
    "efficiency", "efficiency_low", "efficiency_high", "free_speedup", "memory_mib",
    "top1", "top1_low", "top1_high", "top1_paired_low", "top1_paired_high", "top5", "top5_low", "top5_high", "drop",
    "drop_low", "drop_high", "mcnemar_p", "agreement", "agreement_low", "agreement_high", "kl", "kl_low", "kl_high",
    "similarity", "similarity_low", "similarity_high", "images", "batch_size", "skipped", "nonfinite", "input_size",
    "data", "data_fingerprint", "device", "machine", "dtype", "compiled", "weights_sha256", "fused_attention",
    "weights", "cell", "error",
)  # fmt: skip
_TEXT = frozenset({
    "run", "model", "method", "variant", "params", "schedule", "resolved", "input_size", "data",
    "data_fingerprint", "device", "machine", "dtype", "compiled", "weights_sha256", "fused_attention", "weights",
    "cell", "error",
})  # fmt: skip
_METRIC_COLUMNS = frozenset(metric.column for metric in METRICS.values())
_INTEGER = frozenset({"tokens_final", "images", "batch_size", "skipped", "nonfinite"})


def find_metric(name: str) -> Metric:
    """The metric of that name. Raises UserError with the nearest names."""
    if name not in METRICS:
        hint = nearest(name, METRICS) or f" There are: {', '.join(METRICS)}."
        raise UserError(f"no metric {name!r}.{hint}")
    return METRICS[name]


def load_table(runs: Iterable[str | Path]) -> pd.DataFrame:
    """All cells of these runs, a row each, in the order they were first recorded (columns: `COLUMNS`).

    Accuracies and agreement are in percent, drops in points, FLOPs in 1e9 multiply-adds. What was not measured is
    NaN or None. A run is called by its folder, and by the folder above it too where names repeat; one named twice is
    read once. Raises UserError for a folder that is no run.
    """
    folders = [RunFolder.open(path) for path in dict.fromkeys(Path(run).resolve() for run in runs)]
    names = [folder.path.name for folder in folders]
    tables = [
        table_of_records(
            folder.records(),
            str(Path(folder.path.parent.name, name)) if names.count(name) > 1 else name,
            folder.manifest,
        )
        for folder, name in zip(folders, names, strict=True)
    ]
    return pd.concat(tables, ignore_index=True) if tables else table_of_records([])


def load_cells(runs: Sequence[str | Path], tell: Callable[[str], None]) -> pd.DataFrame:
    """`load_table` for runs that are to be shown. Tells which of them hold nothing; raises UserError where all do."""
    df = load_table(runs)
    empty = [str(run) for run in dict.fromkeys(runs) if not RunFolder.open(run).records()]
    holds = f"{', '.join(empty)} {'holds' if len(empty) == 1 else 'hold'} no records"
    if df.empty:
        raise UserError(f"nothing to show: {holds}.")
    if empty:
        tell(f"{holds}, and so is not shown." if len(empty) == 1 else f"{holds}, and so are not shown.")
    return df


def run_names(df: pd.DataFrame) -> dict[str, str]:
    """What tells the runs of a table apart, in words: machine, dtype, batch size, two of them, or the folder."""
    runs = df.drop_duplicates("run").set_index("run")
    runs["batch"] = runs["batch_size"].map(lambda size: f"batch {size}", na_action="ignore")
    for columns in (["machine"], ["dtype"], ["batch"], ["machine", "dtype"], ["dtype", "batch"], ["machine", "batch"]):
        if runs[columns].notna().all(axis=None) and not runs.duplicated(columns).any():
            return {str(run): ", ".join(row) for run, row in runs[columns].iterrows()}
    return {str(run): str(run) for run in runs.index}


def table_of_records(
    records: Iterable[Record], run: str = "", manifest: Mapping[str, Any] | None = None
) -> pd.DataFrame:
    """`load_table` for records in memory, as they are while a run is going on.

    A later record of a cell replaces an earlier one of the same kind, and a failure to measure it.
    `manifest["machine"]` names the hardware where it has "gpu" (for CUDA devices) or "cpu".
    """
    cells: dict[tuple[Any, ...], dict[str, Record]] = {}
    for record in records:
        key = (record["cell"], record.get("weights_sha256"), tuple(record.get("input_size") or ()))
        kinds = cells.setdefault(key, {})
        if kinds.get("failure", {}).get("phase") in (record["kind"], "setup"):
            del kinds["failure"]
        kinds[record["kind"]] = record
    machine = (manifest or {}).get("machine") or {}
    frame = pd.DataFrame([_row(kinds, run, machine) for kinds in cells.values()], columns=list(COLUMNS))
    for column in COLUMNS:
        if column == "is_baseline":
            frame[column] = frame[column].astype(bool)
        elif column in _INTEGER:
            frame[column] = pd.to_numeric(frame[column]).astype("Int64")
        else:
            frame[column] = frame[column].astype(object if column in _TEXT else float)
    return _fill_conditions(frame)


_OPERATORS: dict[str, Callable[[pd.Series, float], pd.Series]] = {
    "<=": pd.Series.le,
    ">=": pd.Series.ge,
    "<": pd.Series.lt,
    ">": pd.Series.gt,
}


def filter_cells(df: pd.DataFrame, conditions: Iterable[str]) -> pd.DataFrame:
    """The rows that meet every condition: `method=tome`, `schedule=flops:*`, `drop<1`, `gflops<=2.5`.

    Text may hold the wildcards * and ?; numbers compare with <, <=, >, >= and =. Two conditions with = on one column
    are alternatives. Raises UserError for a condition that cannot be read and for an unknown column.
    """
    wanted: dict[str, pd.Series] = {}
    for number, condition in enumerate(conditions):
        name, operator, value = _split_condition(condition)
        column = METRICS[name].column if name in METRICS else name
        if column not in COLUMNS:
            options = [*METRICS, *COLUMNS]
            hint = nearest(name, options) or " Try model, method, schedule, run or a metric."
            raise UserError(f"filter {condition!r}: no column {name!r}.{hint}")
        if column in _METRIC_COLUMNS and len(df) and df[column].isna().all():
            raise UserError(f"filter {condition!r}: no cell here has {name}; measured: {measured_names(df)}.")
        meets = _meets(df[column], operator, value, condition)
        key = column if operator == "=" else f"{column} {number}"
        wanted[key] = wanted[key] | meets if key in wanted else meets
    return df[np.logical_and.reduce([np.ones(len(df), bool), *(meets.to_numpy(bool) for meets in wanted.values())])]


def _split_condition(condition: str) -> tuple[str, str, str]:
    parts = re.fullmatch(r"\s*(\w+)\s*(<=|>=|<|>|=)\s*(.+?)\s*", condition)
    if parts is None:
        raise UserError(
            f"filter {condition!r}: write COLUMN=VALUE or METRIC<NUMBER, such as 'method=tome' or 'drop<1'."
        )
    return parts[1], parts[2], parts[3]


def _meets(values: pd.Series, operator: str, value: str, condition: str) -> pd.Series:
    if operator == "=" and (values.name in _TEXT or values.name == "is_baseline"):
        return values.where(values.notna(), "").astype(str).map(lambda text: fnmatchcase(text.lower(), value.lower()))
    if values.name in _TEXT:
        raise UserError(f"filter {condition!r}: {values.name} is text, which compares with = only.")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        raise UserError(f"filter {condition!r}: {value!r} is not a number.")
    floats = values.astype("Float64").fillna(np.nan).astype(float)
    return (
        pd.Series(np.isclose(floats, number), values.index) if operator == "=" else _OPERATORS[operator](floats, number)
    )


def comparable(df: pd.DataFrame, *metrics: str) -> list[pd.DataFrame]:
    """The rows split into sets that may be compared: same model, weights, input size, data, device and dtype, and one
    batch size where several were timed.

    In these metrics; one run each where one of them is `paced`.
    """
    keys: list[Any] = [*COMPARABLE, *(["run"] if any(find_metric(name).paced for name in metrics) else [])]
    if df["batch_size"].nunique() > 1:
        keys.append(_timed_at(df))
    return [group for _, group in df.groupby(keys, sort=False, dropna=False)]


def _timed_at(df: pd.DataFrame) -> pd.Series:
    """The batch size that a run timed a model at, for each of their rows; NaN where others timed at no other."""
    sizes = df["batch_size"].astype(float).where(df["speedup"].notna() | df["throughput"].notna())
    sizes = sizes.groupby([df["run"], df["model"]], dropna=False).transform("first")
    several = sizes.groupby([df[column] for column in COMPARABLE], dropna=False).transform("nunique") > 1
    return sizes.where(several)


def known_gain(df: pd.DataFrame) -> str:
    """The first of `GAINS` that was measured; top1 where none was."""
    return next((name for name in GAINS if df[METRICS[name].column].notna().any()), GAINS[0])


def measured_names(df: pd.DataFrame) -> str:
    """The metrics that any cell has, in words."""
    return ", ".join(name for name, metric in METRICS.items() if df[metric.column].notna().any()) or "nothing"


def pareto_front(df: pd.DataFrame, x: str, y: str) -> pd.Series:
    """True for each row that no comparable row beats: as good in both metrics and better in one.

    x, y: names in `METRICS`; what differs by less than a metric's `tie` counts as equal. Throughput is judged by the
    speed-up where all rows have it: it is paired within timing rounds, so drift cannot decide, and a run's fronts over
    both agree. Rows where either is missing, or with NaN or infinite logits, are False. The index is that of `df`.
    """
    front = pd.Series(False, index=df.index)
    for group in comparable(df, x, y):
        measured = group[_measured(group, x, y) & ~nonfinite(group)]
        (no_worse_x, better_x), (no_worse_y, better_y) = (
            _compare(measured, _judged_by(measured, name)) for name in (x, y)
        )
        front[measured.index] = ~(no_worse_x & no_worse_y & (better_x | better_y)).any(axis=0)
    return front


def _measured(df: pd.DataFrame, x: str, y: str) -> pd.Series:
    return df[find_metric(x).column].notna() & df[find_metric(y).column].notna()


def nonfinite(df: pd.DataFrame) -> pd.Series:
    """True for each row whose logits were NaN or infinite for some image."""
    return df["nonfinite"].fillna(0).astype(int) > 0


def _judged_by(df: pd.DataFrame, name: str) -> str:
    return "speedup" if name == "throughput" and df["speedup"].notna().all() else name


def _compare(df: pd.DataFrame, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(n, n) each: whether row i is no worse than row j, and whether it is better, in this metric."""
    metric = find_metric(name)
    values = df[metric.column].to_numpy(float)
    mine, other = values[:, None], values[None, :]
    if metric.better == "lower":
        return mine <= other * (1 + metric.tie), mine * (1 + metric.tie) < other
    return mine * (1 + metric.tie) >= other, mine > other * (1 + metric.tie)


def _row(kinds: Mapping[str, Record], run: str, machine: Mapping[str, Any]) -> dict[str, Any]:
    known = {}
    for record in kinds.values():
        known.update({key: value for key, value in record.items() if value is not None})
    device = known.get("device")
    row = {
        **{column: known.get(column) for column in COLUMNS},
        "run": run,
        "params": json.dumps(known.get("params") or {}, sort_keys=True),
        "variant": _variant(known["method"], known.get("params") or {}),
        "is_baseline": known["method"] == "none",
        "input_size": "x".join(map(str, known.get("input_size") or ())) or None,
        "machine": machine.get("gpu" if str(device).startswith("cuda") else "cpu"),
        "error": kinds["failure"].get("message") if "failure" in kinds else None,
    }
    for column, value in _VALUES.items():
        row[column] = value(known)
    return {column: printable(value) if isinstance(value, str) else value for column, value in row.items()}


def _variant(method: str, params: Mapping[str, Any]) -> str:
    """The method as one writes it on the command line: `tome:prop_attn=false`."""
    values = {name: value if isinstance(value, str) else json.dumps(value) for name, value in params.items()}
    return method + (":" if values else "") + ",".join(f"{name}={value}" for name, value in values.items())


def _scaled(key: str, factor: float) -> Callable[[Record], float | None]:
    return lambda known: known[key] * factor if key in known else None


def _final_tokens(known: Record) -> int | None:
    return round(known["tokens"][-1]) if known.get("tokens") else None  # of some methods, a mean over images


def _compiled(known: Record) -> str | None:
    return ("yes" if known["compiled"] else "no") if "compiled" in known else None


def _method_share(known: Record) -> float | None:
    return 100 * known["flops_method"] / known["flops"] if known.get("flops") and "flops_method" in known else None


def _around_top1(bound: str) -> Callable[[Record], float | None]:
    """The cell's top-1 moved by the distance between its drop and a bound of its drop."""

    def value(known: Record) -> float | None:
        if not {"top1", "drop", bound} <= known.keys():
            return None
        return 100 * known["top1"] + known["drop"] - known[bound]

    return value


_VALUES: dict[str, Callable[[Record], float | str | None]] = {
    "tokens_final": _final_tokens,
    "compiled": _compiled,
    "gflops": _scaled("flops", 1e-9),
    "gflops_attention": _scaled("flops_attention", 1e-9),
    "gflops_mlp": _scaled("flops_mlp", 1e-9),
    "gflops_method": _scaled("flops_method", 1e-9),
    "gflops_rest": _scaled("flops_rest", 1e-9),
    "method_share": _method_share,
    "memory_mib": _scaled("peak_memory_bytes", 2**-20),
    "top1": _scaled("top1", 100),
    "top1_low": _scaled("top1_low", 100),
    "top1_high": _scaled("top1_high", 100),
    "top1_paired_low": _around_top1("drop_high"),
    "top1_paired_high": _around_top1("drop_low"),
    "top5": _scaled("top5", 100),
    "top5_low": _scaled("top5_low", 100),
    "top5_high": _scaled("top5_high", 100),
    "agreement": _scaled("agreement", 100),
    "agreement_low": _scaled("agreement_low", 100),
    "agreement_high": _scaled("agreement_high", 100),
}


def _fill_conditions(frame: pd.DataFrame) -> pd.DataFrame:
    """A cell that failed early lacks the conditions its run and model share: take them from its neighbors."""
    shared = [*COMPARABLE[1:], "images", "batch_size"]
    for _, group in frame.groupby(["run", "model"], sort=False, dropna=False):
        for column in shared:
            known = group[column].dropna().unique()
            if len(known) == 1:
                frame.loc[group.index, column] = known[0]
    frame["compiled"] = frame["compiled"].fillna("no")  # nor can what was never timed be told from it
    return frame
