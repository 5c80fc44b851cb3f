"""From a run to a decision: the cell that best meets given limits, and the Python that applies it.

A limit is met if the unfavorable end of the 95 % interval meets it, and cells are ranked by that end too: a cell that
was lucky must not win. Where accuracy is limited, the fastest of those that meet the limits is the best; where only
cost is, the most accurate. The unreduced model takes part, with a drop of 0 and a speed-up of 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm

from tokbench.errors import UserError
from tokbench.report.findings import cell_name, group_title
from tokbench.report.metrics import METRICS, comparable, load_table
from tokbench.store import RunFolder

# For each limit one may ask for: the metric, and how it is said.
LIMITS = {
    "max_drop": ("drop", "a drop of at most {:g} points of top-1"),
    "min_speedup": ("speedup", "a speed-up of at least {:g}×"),
    "max_latency_ms": ("latency", "a median latency of at most {:g} ms"),
    "max_gflops": ("gflops", "at most {:g} GFLOPs an image"),
}


@dataclass(frozen=True)
class _Words:
    """How a metric is said: what has to be measured for it, its values, and cells that are first or later by it."""

    measured: str
    value: str
    best: str = ""
    worse: str = ""
    surely: str = ""


_WORDS = {
    "drop": _Words("accuracy", "a drop of {:.2f} points", "the most accurate", "less accurate"),
    "speedup": _Words("speed", "{:.2f}× the speed", "the fastest", "slower", "faster"),
    "latency": _Words("latency", "a median of {:.2f} ms"),
    "gflops": _Words("FLOPs", "{:.4g} GFLOPs", "the one with the fewest FLOPs", "more FLOPs", "cheaper"),
}
_FIELDS = (
    "cell", "method", "params", "schedule", "resolved", "top1", "drop", "drop_low", "drop_high", "speedup",
    "speedup_low", "speedup_high", "throughput", "latency_ms", "gflops",
)  # fmt: skip
_CAST = {"fp32": "", "bf16": ".bfloat16()", "fp16": ".half()"}


@dataclass
class Pick:
    """The decision for one model under one set of conditions.

    Attributes:
        title: model and conditions.
        asked: the limits, in words.
        limits: the limits, by option.
        rule: what made the best the best.
        best: its row of `load_table`; None where nothing meets the limits.
        other: the runner-up, or where nothing meets the limits what comes nearest; None where there is no other.
        other_meets: whether `other` meets the limits.
        why: why `other` lost, or what it misses.
        notes: what else to know.
        code: lines of Python that apply the best; "" where there is none.
    """

    title: str
    asked: str
    limits: dict[str, float]
    rule: str
    best: pd.Series | None
    other: pd.Series | None
    other_meets: bool
    why: str
    notes: list[str]
    code: str

    def text(self) -> str:
        """For people."""
        lines = [self.title, f"Asked for: {self.asked}."]
        if self.best is None:
            lines.append("Nothing meets that.")
        else:
            lines += [f"Pick: {_told(self.best)}.", f"It is {self.rule}."]
        if self.other is not None:
            lines.append(f"{'Runner-up' if self.other_meets else 'Nearest'}: {_told(self.other)}; {self.why}.")
        lines += [f"Note: {note}." for note in self.notes]
        return "\n".join([*lines, *(["", self.code] if self.code else [])])

    def to_dict(self) -> dict[str, Any]:
        """For programs: plain JSON values. `nearest` is a cell that does not meet the limits."""
        return {
            "model": self.title,
            "limits": self.limits,
            "met": self.best is not None,
            "rule": self.rule,
            "pick": _plain(self.best),
            "runner_up": _plain(self.other) if self.other_meets else None,
            "nearest": None if self.other_meets else _plain(self.other),
            "why": self.why,
            "notes": self.notes,
            "code": self.code,
        }


def pick_cells(run: str | Path, **limits: float | None) -> list[Pick]:
    """The best cell of each model of a run under the limits given (keys: `LIMITS`).

    Raises UserError for no limit, one that cannot be, and one on something that the run has not measured.
    """
    asked = {name: value for name, value in limits.items() if value is not None}
    if not asked:
        raise UserError(f"pick needs a limit: {', '.join(map(_option, LIMITS))}")
    for name, value in asked.items():
        if not math.isfinite(value) or (name != "max_drop" and value <= 0):
            raise UserError(
                f"{_option(name)} must be a number{'' if name == 'max_drop' else ' above 0'}, not {value:g}"
            )
    folder = RunFolder.open(run)
    return [_pick(group, asked, folder) for group in comparable(_judged(load_table([run])))]


def _judged(df: pd.DataFrame) -> pd.DataFrame:
    """The table with what is known of the unreduced model without measuring: it loses nothing against itself."""
    for prefix, value in (("drop", 0.0), ("speedup", 1.0)):
        for column in (prefix, f"{prefix}_low", f"{prefix}_high"):
            df.loc[df["is_baseline"] & df[prefix].notna(), column] = value
    return df


def _pick(group: pd.DataFrame, asked: dict[str, float], folder: RunFolder) -> Pick:
    reduced = group[~group["is_baseline"]]
    if reduced.empty:
        raise UserError(
            f"the run {folder.path} holds only the unreduced {group.iloc[0]['model']}: nothing to pick from"
        )
    for name in [*asked, "max_drop"]:
        metric = LIMITS[name][0]
        if reduced[METRICS[metric].column].isna().all():
            needs = f"{_option(name)}: " if name in asked else ""
            raise UserError(
                f"{needs}the run {folder.path} has not measured {_WORDS[metric].measured}, which this needs"
            )
    rank = _rank(reduced, asked, folder)
    known = group[group[[_worst(LIMITS[name][0]) for name in asked]].notna().all(axis=1)]
    known = known[known[[_worst("drop"), _worst(rank)]].notna().all(axis=1)]
    ranked = known.loc[_order(known, rank)]
    misses = {name: _miss(ranked, name, limit) for name, limit in asked.items()}
    met = ranked[pd.DataFrame(misses, index=ranked.index).le(0).all(axis=1)]
    # A cell that is not faster than the unreduced model is no answer to how much accuracy may be paid for speed.
    futile = list(asked) == ["max_drop"] and len(met) and met.iloc[0]["is_baseline"]
    rows = [] if futile else [row for _, row in met.iterrows()]
    notes = _notes(group, reduced, known, asked, rank, folder)
    title, said = group_title(group), " and ".join(LIMITS[name][1].format(value) for name, value in asked.items())
    if len(rows) > 1:
        best, other = rows[:2]
        rule = f"{_WORDS[rank].best} of {len(rows)} that meet the limits with the unfavorable end of their intervals"
        return Pick(title, said, asked, rule, best, other, True, _why(best, other, rank), notes, _code(best, folder))
    fails = ranked[~ranked["is_baseline"] & ~ranked.index.isin([row.name for row in rows])]
    other, why = _nearest(fails, asked, rank)
    if not rows:
        return Pick(title, said, asked, "", None, other, False, why, notes, "")
    rule = "the only one that meets the limits with the unfavorable end of its interval"
    return Pick(title, said, asked, rule, rows[0], other, False, why, notes, _code(rows[0], folder))


def _rank(reduced: pd.DataFrame, asked: dict[str, float], folder: RunFolder) -> str:
    """The metric that decides among those that meet the limits."""
    if "max_drop" not in asked:
        return "drop"
    for metric in ("speedup", "gflops"):
        if reduced[METRICS[metric].column].notna().any():
            return metric
    raise UserError(f"the run {folder.path} has measured neither speed nor FLOPs, so no cell is better than another")


def _worst(metric: str) -> str:
    """The column with the unfavorable end of a metric's interval; the metric's own where it has none."""
    found = METRICS[metric]
    return (found.high if found.better == "lower" else found.low) or found.column


def _order(df: pd.DataFrame, rank: str) -> pd.Index:
    """Best first; where that is equal, what loses less, then what costs less."""
    keys = pd.DataFrame({metric: _key(df, metric) for metric in dict.fromkeys([rank, "drop", "gflops"])})
    return keys.sort_values(list(keys), kind="stable", na_position="last").index


def _key(df: pd.DataFrame, metric: str) -> pd.Series:
    """What cells are sorted by, smallest first. Of what has no interval, differences too small to matter are none."""
    found, values = METRICS[metric], df[_worst(metric)].astype(float)
    if found.low or not found.tie:
        return values if found.better == "lower" else -values
    steps = np.log(values / values.min()) / math.log1p(found.tie)
    return np.floor(steps) if found.better == "lower" else -np.ceil(steps)


def _miss(df: pd.DataFrame, name: str, limit: float) -> pd.Series:
    """By how much each cell misses a limit, relative to it (a drop in points); 0 or below where it meets it."""
    metric = LIMITS[name][0]
    excess = df[_worst(metric)] - limit
    return (excess if METRICS[metric].better == "lower" else -excess) / (1 if metric == "drop" else limit)


def _nearest(cells: pd.DataFrame, asked: dict[str, float], rank: str) -> tuple[pd.Series | None, str]:
    """The cell that misses the fewest limits, and these by the least; and what it misses."""
    if cells.empty:
        return None, ""
    misses = pd.DataFrame({name: _miss(cells, name, limit) for name, limit in asked.items()}).clip(lower=0)
    order = pd.DataFrame({"count": (misses > 0).sum(axis=1), "most": misses.max(axis=1)})
    row = cells.loc[order.sort_values(["count", "most"], kind="stable").index[0]]
    missed = [name for name in asked if misses.loc[row.name, name] > 0]
    if not missed:
        return row, f"it is within the limit, but not surely {_WORDS[rank].surely} than the unreduced model"
    return row, " and ".join(_missed(row, name, asked[name]) for name in missed)


def _missed(row: pd.Series, name: str, limit: float) -> str:
    metric = LIMITS[name][0]
    return f"{_value(row, metric)}, and the limit is {limit:g}"


def _why(best: pd.Series, other: pd.Series, rank: str) -> str:
    """Why the runner-up lost, and whether that is sure."""
    both = pd.DataFrame([best, other])
    for metric in dict.fromkeys([rank, "drop", "gflops"]):
        first, second = _key(both, metric)
        if first != second:
            break
    else:
        return "equal in everything that counts, and measured later"
    text = f"{_WORDS[metric].worse}: {_value(other, metric)}, against {_value(best, metric)}"
    if metric != rank:
        text = f"equal in {_WORDS[rank].measured}, but {text}"
    low, high = METRICS[metric].low, METRICS[metric].high
    if low and best[low] <= other[high] and other[low] <= best[high]:
        text += "; the intervals overlap, so that is not sure"
    return text


def _value(row: pd.Series, metric: str) -> str:
    """What counts of a cell in a metric: the unfavorable end of the interval, where there is one."""
    column = _worst(metric)
    end = "" if column == METRICS[metric].column else "up to " if metric == "drop" else "down to "
    return end + _WORDS[metric].value.format(row[column])


def _notes(
    group: pd.DataFrame,
    reduced: pd.DataFrame,
    known: pd.DataFrame,
    asked: dict[str, float],
    rank: str,
    folder: RunFolder,
) -> list[str]:
    notes = []
    plugins = folder.manifest.get("plugins")
    if plugins:
        notes.append(
            f"the run had methods from plugins ({', '.join(plugins)}); tokbench.plugins.load_plugins loads them"
        )
    if rank == "gflops":
        notes.append("speed was not measured, and fewer FLOPs need not be faster")
    out = reduced[~reduced.index.isin(known.index)]
    if len(out):
        notes.append(f"left out, not measured or failed: {', '.join(cell_name(row) for _, row in out.iterrows())}")
    images = group["images"].max()
    if "max_drop" in asked and pd.notna(images):
        # The end of the interval of a cell that answers just as the unreduced model does; see measure/stats.py.
        z = float(norm.ppf(0.975))
        least = 100 * z**2 / (float(images) + z**2)
        if asked["max_drop"] < least:
            notes.append(
                f"on {int(images):,} images even a cell with the unreduced model's every answer may lose {least:.2f} "
                "points: a lower limit needs more images"
            )
    return notes


def _told(row: pd.Series) -> str:
    """A cell with what is known of it."""
    digits = 2 if pd.notna(row["images"]) and row["images"] >= 10_000 else 1
    parts = []
    if row["is_baseline"]:
        parts.append("as it is")
    else:
        parts.append(
            f"drop {row['drop']:.{digits}f} points [{row['drop_low']:.{digits}f}, {row['drop_high']:.{digits}f}]"
        )
        if pd.notna(row["speedup"]):
            parts.append(f"{row['speedup']:.2f}× [{row['speedup_low']:.2f}, {row['speedup_high']:.2f}] the speed")
    if pd.notna(row["latency_ms"]):
        parts.append(f"{row['latency_ms']:.2f} ms")
    if pd.notna(row["gflops"]):
        parts.append(f"{row['gflops']:.4g} GFLOPs")
    return f"{'the unreduced model' if row['is_baseline'] else cell_name(row)} ({', '.join(parts)})"


def _code(row: pd.Series, folder: RunFolder) -> str:
    """The Python that makes a cell: its model, and its method with the schedule it was resolved to."""
    spec = _model_spec(folder, row["model"])
    words = [_literal(spec[key]) for key in ("name", "checkpoint") if spec.get(key)]
    words += [f"input_size={spec['input_size']}"] if spec.get("input_size") else []
    device = f'.to("{row["device"]}")' if row["device"] not in (None, "cpu") else ""
    lines = ["import tokbench", f"model = tokbench.load_model({', '.join(words)}){device}{_CAST.get(row['dtype'], '')}"]
    if not row["is_baseline"]:
        params = {**json.loads(row["params"]), **_calibrated(folder, row["cell"])}
        words = [_literal(value) for value in (row["method"], row["resolved"] or row["schedule"])]
        words += [f"{key}={_literal(value)}" for key, value in params.items()]
        lines.append(f"tokbench.apply(model, {', '.join(words)})")
    return "\n".join(lines)


def _literal(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _model_spec(folder: RunFolder, label: str) -> Mapping[str, Any]:
    for session in (folder.manifest, *folder.manifest.get("continued", [])):
        for model in (session.get("grid") or {}).get("models", []):
            if isinstance(model, dict) and model.get("label") == label:
                found: Mapping[str, Any] = model
                return found
    return {"name": label}


def _calibrated(folder: RunFolder, cell: str) -> dict[str, Any]:
    """What was measured on calibration images for a cell's parameters, so that nobody needs them again."""
    for record in reversed(folder.records()):
        if record["cell"] == cell and record.get("calibrated"):
            return {key: value for key, value in record["calibrated"].items() if key in record["params"]}
    return {}


def _plain(row: pd.Series | None) -> dict[str, Any] | None:
    if row is None:
        return None
    plain = {field: None if pd.isna(row[field]) else row[field] for field in _FIELDS}
    return {**plain, "params": json.loads(row["params"])}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
