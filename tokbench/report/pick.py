"""From a run to a decision: the cell that best meets given limits, and the Python that applies it.

A limit is met if the unfavorable end of the 95 % interval meets it, and cells are ranked by that end too: a cell that
was lucky must not win. Where accuracy is limited, the fastest of those that meet the limits is the best; where only
cost is, the most accurate: by top-1, by agreement where images have no labels, by features where there are no classes.
The unreduced model takes part, with a drop of 0 and a speed-up of 1. What failed, or gave NaN, never does.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from keyword import iskeyword
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm

from tokbench.catalogue import controls
from tokbench.errors import UserError
from tokbench.report.findings import cell_name, group_title
from tokbench.report.metrics import METRICS, comparable, load_table
from tokbench.report.styles import STYLES
from tokbench.report.tables import sensible_digits
from tokbench.results.folder import RunFolder

# For each limit one may ask for: the metric, and how it is said.
LIMITS = {
    "max_drop": ("drop", "a drop of at most {} points of top-1"),
    "min_agreement": ("agreement", "at least {} % agreement with the unreduced model"),
    "min_speedup": ("speedup", "a speed-up of at least {}×"),
    "max_latency_ms": ("latency", "a median latency at batch 1 of at most {} ms"),
    "max_gflops": ("gflops", "at most {} GFLOPs an image"),
}
# Limits on what is lost; and what is lost, best known first.
_ACCURACY = ("max_drop", "min_agreement")
_QUALITIES = ("drop", "agreement", "similarity")


@dataclass(frozen=True)
class _Words:
    """How a metric is said: what has to be measured for it, its values, and cells that are first or later by it."""

    measured: str
    value: str
    best: str = ""
    worse: str = ""
    surely: str = ""


_WORDS = {
    "drop": _Words("accuracy", "a drop of {}{:.2f} points", "the most accurate", "less accurate"),
    "agreement": _Words(
        "agreement", "{}{:.2f} % agreement", "in most agreement with the unreduced model", "in less agreement"
    ),
    "similarity": _Words(
        "features", "a cosine of {}{:.4f}", "the nearest to the unreduced model's features", "further away in features"
    ),
    "speedup": _Words("speed", "{}{:.2f}× the speed", "the fastest", "slower", "faster"),
    "latency": _Words("latency", "a median latency of {}{:.2f} ms"),
    "gflops": _Words("FLOPs", "{}{:.4g} GFLOPs", "the one with the fewest FLOPs", "more FLOPs", "cheaper"),
}
# What is known of the unreduced model without measuring, being compared with itself.
_OF_ITSELF = {"drop": 0.0, "agreement": 100.0, "similarity": 1.0, "speedup": 1.0}
_FIELDS = (
    "cell", "method", "params", "schedule", "resolved", "top1", "drop", "drop_low", "drop_high", "agreement",
    "agreement_low", "agreement_high", "similarity", "similarity_low", "similarity_high", "speedup", "speedup_low",
    "speedup_high", "throughput", "latency_ms", "latency_low_ms", "latency_high_ms", "gflops",
)  # fmt: skip
_CAST = {None: "", "fp32": "", "bf16": ".bfloat16()", "fp16": ".half()"}


@dataclass
class Pick:
    """The decision for one model under one set of conditions.

    Attributes:
        model: its label.
        title: model and conditions.
        asked: the limits, in words.
        limits: the limits, by option.
        rule: what made the best the best.
        best: its row of `load_table`; None where nothing meets the limits.
        other: the runner-up, or where nothing meets the limits what comes nearest; None where there is no other.
        other_meets: whether `other` meets the limits.
        why: why `other` lost, or what it misses; without `other`, why nothing could be judged.
        misses: by how much `other` misses which limits, in the limits' units.
        notes: what else to know.
        code: lines of Python that apply the best; "" where there is none.
    """

    model: str
    title: str
    asked: str
    limits: dict[str, float]
    rule: str = ""
    best: pd.Series | None = None
    other: pd.Series | None = None
    other_meets: bool = False
    why: str = ""
    misses: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    code: str = ""

    def text(self) -> str:
        """For people."""
        lines = [self.title, f"Asked for: {self.asked}."]
        if self.best is not None:
            lines += [f"Pick: {_told(self.best, self.limits)}.", f"It is {self.rule}."]
        else:
            lines.append("Nothing meets that." if self.other is not None or not self.why else f"No answer: {self.why}.")
        if self.other is not None:
            role = "Runner-up" if self.other_meets else "Nearest"
            lines.append(f"{role}: {_told(self.other, self.limits)}; {self.why}.")
        lines += [f"Note: {note}." for note in self.notes]
        return "\n".join([*lines, *(["", self.code] if self.code else [])])

    def to_dict(self) -> dict[str, Any]:
        """For programs: plain JSON values. `nearest` is a cell that does not meet the limits."""
        return {
            "model": self.model,
            "title": self.title,
            "limits": self.limits,
            "met": self.best is not None,
            "rule": self.rule,
            "pick": _plain(self.best),
            "runner_up": _plain(self.other) if self.other_meets else None,
            "nearest": None if self.other_meets else _plain(self.other),
            "why": self.why,
            "misses": self.misses,
            "notes": self.notes,
            "code": self.code,
        }


def pick_cells(run: str | Path, **limits: float | None) -> list[Pick]:
    """The best cell of each model of a run under the limits given (keys: `LIMITS`).

    A model that cannot be judged is passed over, saying why, as long as another can be. Raises UserError for no
    limit, one that cannot be, and one on something that the run has not measured.
    """
    asked = {name: value for name, value in limits.items() if value is not None}
    if not asked:
        raise UserError(f"pick needs a limit: {', '.join(map(_option, LIMITS))}")
    for name, value in asked.items():
        if not math.isfinite(value) or (name != "max_drop" and value <= 0):
            raise UserError(
                f"{_option(name)} must be a number{'' if name == 'max_drop' else ' above 0'}, not {value:g}"
            )
        if name == "min_agreement" and value > 100:
            raise UserError(f"{_option(name)} is a percentage: at most 100, not {value:g}")
    folder = RunFolder.open(run)
    groups = comparable(_judged(load_table([run])))
    if not groups:
        raise UserError(f"the run {folder.path} has measured nothing yet")
    picks, refused = [], []
    for group in groups:
        found = Pick(str(group.iloc[0]["model"]), group_title(group), _said(asked), asked)
        try:
            _decide(found, group, folder)
        except UserError as error:
            found.why = str(error)
            refused.append(error)
        picks.append(found)
    if len(refused) == len(picks):
        raise refused[0]
    return picks


def _said(asked: Mapping[str, float]) -> str:
    words = " and ".join(LIMITS[name][1].format(f"{value:.10g}") for name, value in asked.items())
    return words.replace("at most 1 points", "at most 1 point")


def _judged(df: pd.DataFrame) -> pd.DataFrame:
    """The table with the columns that decide (`_end`), and why a cell can never be picked (`unsound`, "" if it can).

    A latency of a run that kept no interval of it counts as it is; other metrics without their interval do not.
    """
    for metric, value in _OF_ITSELF.items():
        found = METRICS[metric]
        for column in (found.column, found.low, found.high):
            df.loc[df["is_baseline"] & df[found.column].notna(), column] = value
    for metric in _WORDS:
        found = METRICS[metric]
        df[_end(metric)] = df[(found.high if found.better == "lower" else found.low) or found.column].astype(float)
    latency = METRICS["latency"]
    df["latency_without_interval"] = df[_end("latency")].isna() | (latency.high == "")
    df[_end("latency")] = df[_end("latency")].fillna(df[latency.column])
    df["unsound"] = [_unsound(row) for _, row in df.iterrows()]
    return df


def _end(metric: str) -> str:
    """The column with what counts of a metric: the unfavorable end of its interval; itself where it has none."""
    return f"end of {metric}"


def _unsound(row: pd.Series) -> str:
    if row["method"] == "free":
        return "a speed limit, and no method"
    if pd.notna(row["nonfinite"]) and row["nonfinite"]:
        return f"NaN or infinite for {row['nonfinite']:,} of {row['images']:,} images"
    return "" if pd.isna(row["error"]) else f"failed: {row['error']}"


def _decide(found: Pick, group: pd.DataFrame, folder: RunFolder) -> None:
    """Fill in a decision. Raises UserError where none can be made."""
    asked, reduced = found.limits, group[~group["is_baseline"]]
    if reduced.empty:
        raise UserError(f"the run {folder.path} holds only the unreduced {found.model}: nothing to pick from")
    sound = reduced[reduced["unsound"] == ""]
    if sound.empty:
        raise UserError(f"the run {folder.path} has no cell of {found.model} to pick: {_reasons(reduced, ())}")
    _require_measured(sound, asked, folder)
    quality = next(metric for metric in _QUALITIES if sound[_end(metric)].notna().any())
    rank = _rank(sound, asked, quality, folder)
    needed = list(dict.fromkeys([*(LIMITS[name][0] for name in asked), quality, rank]))
    known = group[(group["unsound"] == "") & group[list(map(_end, needed))].notna().all(axis=1)]
    misses = pd.DataFrame({name: _excess(known, name, limit) for name, limit in asked.items()}, index=known.index)
    met = _ranked(known[(misses <= 0).all(axis=1)], rank, quality)
    # A cell that is not faster than the unreduced model is no answer to how much accuracy may be paid for speed.
    futile = set(asked) <= set(_ACCURACY) and len(met) and met.iloc[0]["is_baseline"]
    rows = [] if futile else [row for _, row in met.iterrows()]
    found.notes = _notes(group, known, needed, asked, rank, folder)
    if rows:
        found.code, more = _code(rows[0], folder)
        found.best, found.notes = rows[0], [*found.notes, *more]
    if len(rows) > 1:
        found.rule = (
            f"{_WORDS[rank].best} of {len(rows)} that meet the limits with the unfavorable end of their intervals"
        )
        found.other, found.other_meets, found.why = rows[1], True, _why(rows[0], rows[1], rank, quality)
        return
    if rows:
        found.rule = "the only one that meets the limits with the unfavorable end of its interval"
    fails = _ranked(known[~known["is_baseline"] & ~known.index.isin([row.name for row in rows])], rank, quality)
    if len(fails):
        found.other, found.misses = _nearest(fails, misses.loc[fails.index], asked)
        found.why = " and ".join(_missed(found.other, name, asked[name], by) for name, by in found.misses.items()) or (
            f"it is within the limit, but not surely {_WORDS[rank].surely} than the unreduced model"
        )


def _require_measured(sound: pd.DataFrame, asked: Iterable[str], folder: RunFolder) -> None:
    """Raise UserError, saying what can be asked instead, for a limit that no sound cell can be held to."""
    there = {metric for metric in _WORDS if sound[_end(metric)].notna().any()}
    run = f"the run {folder.path}"
    if there.isdisjoint(_QUALITIES):
        needs = next((f"{_option(name)}: " for name in asked if name in _ACCURACY), "")
        raise UserError(f"{needs}{run} has not measured accuracy, which this needs")
    can = " or ".join(_option(name) for name, (metric, _) in LIMITS.items() if metric in there)
    hint = f"; ask for {can} instead" if can else ", nor anything else that can be limited"
    for name in asked:
        metric = LIMITS[name][0]
        if metric in there:
            continue
        why = f"has not measured {_WORDS[metric].measured}, which this needs"
        if sound[METRICS[metric].column].notna().any():
            why = f"knows no interval of {_WORDS[metric].measured}, which this needs"
        elif name in _ACCURACY and not there & {"drop", "agreement"}:
            why = "compared features only, because the model has no classes"
        elif name == "max_drop":
            why = "had images without labels, so that no drop is known"
        raise UserError(f"{_option(name)}: {run} {why}{hint}")


def _rank(sound: pd.DataFrame, asked: Iterable[str], quality: str, folder: RunFolder) -> str:
    """The metric that decides among those that meet the limits."""
    if not set(asked) & set(_ACCURACY):
        return quality
    for metric in ("speedup", "gflops"):
        if sound[_end(metric)].notna().any():
            return metric
    raise UserError(f"the run {folder.path} has measured neither speed nor FLOPs, so no cell is better than another")


def _ranked(df: pd.DataFrame, rank: str, quality: str) -> pd.DataFrame:
    """Best first; where that is equal, what loses less, then what costs less."""
    keys = _keys(df, rank, quality)
    return df.loc[keys.sort_values(list(keys), kind="stable", na_position="last").index]


def _keys(df: pd.DataFrame, rank: str, quality: str) -> pd.DataFrame:
    """What cells are sorted by, smallest first. Costs to rank by that differ too little to matter are equal."""
    keys = {}
    for metric in dict.fromkeys([rank, quality, "gflops"]):
        found, values = METRICS[metric], df[_end(metric)].astype(float)
        if metric == rank and found.tie and not found.low:
            values = np.floor(np.log(values / values.min()) / math.log1p(found.tie))
        keys[metric] = values if found.better == "lower" else -values
    return pd.DataFrame(keys, index=df.index)


def _excess(df: pd.DataFrame, name: str, limit: float) -> pd.Series:
    """By how much each cell misses a limit, in its unit; 0 or below where it meets it."""
    metric = LIMITS[name][0]
    excess = (df[_end(metric)] - limit) * (1 if METRICS[metric].better == "lower" else -1)
    return excess.mask(excess.abs() <= 1e-9 * max(1e-3, abs(limit)), 0.0)


def _nearest(cells: pd.DataFrame, misses: pd.DataFrame, asked: dict[str, float]) -> tuple[pd.Series, dict[str, float]]:
    """The cell that misses the fewest limits, and these by the least (relative to them, or in points); and its misses.

    misses: one column a limit, one row a cell.
    """
    scale = {name: 1.0 if name in _ACCURACY else limit for name, limit in asked.items()}
    over = misses.clip(lower=0)
    order = pd.DataFrame({"count": (over > 0).sum(axis=1), "most": (over / pd.Series(scale)).max(axis=1)})
    row = cells.loc[order.sort_values(["count", "most"], kind="stable").index[0]]
    return row, {name: float(by) for name, by in over.loc[row.name].items() if by > 0}


def _missed(row: pd.Series, name: str, limit: float, by: float) -> str:
    metric = LIMITS[name][0]
    more = "more" if METRICS[metric].better == "lower" else "less"
    return f"{_value(row, metric)}, {by:.3g} {more} than the limit of {limit:.10g}"


def _why(best: pd.Series, other: pd.Series, rank: str, quality: str) -> str:
    """Why the runner-up lost, and whether that is sure."""
    keys = _keys(pd.DataFrame([best, other]), rank, quality)
    differing = [metric for metric, (first, second) in keys.items() if first < second]
    if not differing:
        return "equal in everything that counts, and measured later"
    metric = differing[0]
    text = f"{_WORDS[metric].worse}: {_value(other, metric)}, against {_value(best, metric)}"
    if metric != rank:
        text = f"equal in {_WORDS[rank].measured}, but {text}"
    low, high = METRICS[metric].low, METRICS[metric].high
    if low and best[low] <= other[high] and other[low] <= best[high]:
        text += "; the intervals overlap, so that is not sure"
    return text


def _value(row: pd.Series, metric: str) -> str:
    """What counts of a cell in a metric: the unfavorable end of the interval, where there is one."""
    exact = (
        not METRICS[metric].low
        or (row["is_baseline"] and metric in _OF_ITSELF)
        or (metric == "latency" and row["latency_without_interval"])
    )
    return _WORDS[metric].value.format("" if exact else "at worst ", row[_end(metric)])


def _notes(
    group: pd.DataFrame,
    known: pd.DataFrame,
    needed: list[str],
    asked: dict[str, float],
    rank: str,
    folder: RunFolder,
) -> list[str]:
    notes = []
    if rank == "gflops":
        notes.append("speed was not measured, and fewer FLOPs need not be faster")
    if "max_latency_ms" in asked and known["latency_without_interval"].any():
        whose = known[known["latency_without_interval"]]
        of = "" if len(whose) == len(known) else f" of {', '.join(_name(row) for _, row in whose.iterrows())}"
        notes.append(f"the run has no interval of the latency{of}: that limit is held against the median itself")
    out = group[~group.index.isin(known.index)]
    if len(out):
        notes.append(f"left out: {_reasons(out, needed)}")
    images = group["images"].max()
    if pd.notna(images):
        # The end of the interval of a cell that answers just as the unreduced model does; see measure/stats.py.
        z = float(norm.ppf(0.975))
        least = 100 * z**2 / (float(images) + z**2)
        if asked.get("max_drop", least) < least:
            notes.append(
                f"on {int(images):,} images even a cell with the unreduced model's every answer may lose {least:.2f} "
                "points: a lower limit needs more images"
            )
        if asked.get("min_agreement", 0) > 100 - least:
            notes.append(
                f"on {int(images):,} images even a cell with the unreduced model's every answer surely agrees on "
                f"{100 - least:.2f} % only: a higher limit needs more images"
            )
    return notes


def _reasons(out: pd.DataFrame, needed: Iterable[str]) -> str:
    """Why these cells were left out, those of one reason together: "ToMe at r=8 (failed: out of memory)"."""
    by: dict[str, list[str]] = {}
    for _, row in out.iterrows():
        missing = ", ".join(
            f"no {_WORDS[metric].measured} {'measured' if pd.isna(row[METRICS[metric].column]) else 'interval'}"
            for metric in needed
            if pd.isna(row[_end(metric)])
        )
        by.setdefault(row["unsound"] or missing, []).append(_name(row))
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in by.items())


def _name(row: pd.Series) -> str:
    return "the unreduced model" if row["is_baseline"] else cell_name(row)


def _told(row: pd.Series, limits: Iterable[str]) -> str:
    """A cell with what is known of it."""
    parts = ["as it is"] if row["is_baseline"] else _qualities(row, limits)
    if pd.notna(row["speedup"]) and not row["is_baseline"]:
        parts.append(f"{row['speedup']:.2f}×{_interval(row, 'speedup', 2)} the speed")
    if pd.notna(row["latency_ms"]):
        parts.append(f"{row['latency_ms']:.2f} ms{_interval(row, 'latency', 2)} at batch 1")
    if pd.notna(row["gflops"]):
        parts.append(f"{row['gflops']:.4g} GFLOPs")
    return f"{_name(row)} ({', '.join(parts)})"


def _qualities(row: pd.Series, limits: Iterable[str]) -> list[str]:
    """What a reduced cell keeps of the model: by the best measure known, and by those that are limited."""
    first = next(metric for metric in _QUALITIES if pd.notna(row[METRICS[metric].column]))
    shown = {first, *(LIMITS[name][0] for name in limits)}
    forms = {"drop": "drop {} points{}", "agreement": "agreement {} %{}", "similarity": "cosine of features {}{}"}
    parts = []
    for metric, form in forms.items():
        if metric in shown:
            digits = 4 if metric == "similarity" else sensible_digits(METRICS[metric], row["images"])
            value = _rounded(row[METRICS[metric].column], digits)
            parts.append(form.format(value, _interval(row, metric, digits)))
    return parts


def _interval(row: pd.Series, metric: str, digits: int) -> str:
    low, high = METRICS[metric].low, METRICS[metric].high
    if not low or pd.isna(row[low]) or pd.isna(row[high]):
        return ""
    return f" [{_rounded(row[low], digits)}, {_rounded(row[high], digits)}]"


def _rounded(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return (text.removeprefix("-") if float(text) == 0 else text).replace("-", "−")


def _code(row: pd.Series, folder: RunFolder) -> tuple[str, list[str]]:
    """The Python that makes a cell: its model, and its method with the schedule it was resolved to; and notes on it."""
    if row["dtype"] not in _CAST:
        raise UserError(f"the run {folder.path} was made in {row['dtype']!r}, which this tokbench does not know")
    spec = _model_spec(folder, row["model"])
    words = [_literal(spec[key]) for key in ("name", "checkpoint") if spec.get(key)]
    words += [f"{key}={spec[key]!r}" for key in ("input_size", "random_weights") if spec.get(key)]
    device = f".to({_literal(row['device'])})" if row["device"] not in (None, "cpu") else ""
    lines = ["import tokbench"]
    notes: list[str] = []
    if row["method"] in controls():
        notes.append(f"{row['method']} is a control, there to be beaten")
    if row["method"] not in STYLES:
        paths, notes = _plugins(folder, row["method"])
        if paths:
            lines += ["from tokbench.plugins import load_plugins", f"load_plugins([{', '.join(map(_literal, paths))}])"]
    lines.append(f"model = tokbench.load_model({', '.join(words)}){device}{_CAST[row['dtype']]}")
    if not row["is_baseline"]:
        params = {**json.loads(row["params"]), **_calibrated(folder, row["cell"])}
        words = [_literal(value) for value in (row["method"], row["resolved"] or row["schedule"])]
        words += [f"{key}={_literal(value)}" for key, value in params.items() if _is_plain(key)]
        odd = [f"{_literal(key)}: {_literal(value)}" for key, value in params.items() if not _is_plain(key)]
        words += [f"**{{{', '.join(odd)}}}"] if odd else []
        lines.append(f"tokbench.apply(model, {', '.join(words)})")
    if _dict(folder.manifest.get("conditions")).get("compile") and pd.notna(row["speedup"]):
        lines.append("model.compile(dynamic=False, fullgraph=True)")
        notes.append("speed is that of the compiled model, for one batch size")
    return "\n".join(lines), notes


def _is_plain(name: str) -> bool:
    """Whether a name can stand before = in a call."""
    return name.isascii() and name.isidentifier() and not iskeyword(name)


def _literal(value: Any) -> str:
    """A JSON value as Python, in double quotes where they do."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    text = repr(value)
    return f'"{text[1:-1]}"' if isinstance(value, str) and "'" not in value and '"' not in value else text


def _dict(value: Any) -> dict[str, Any]:
    """What should be an object, or nothing: a manifest may have been edited."""
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _sessions(folder: RunFolder) -> list[dict[str, Any]]:
    """What was asked each time the run was continued, last first."""
    return [_dict(session) for session in reversed([folder.manifest, *_list(folder.manifest.get("continued"))])]


def _model_spec(folder: RunFolder, label: str) -> dict[str, Any]:
    for session in _sessions(folder):
        for model in map(_dict, _list(_dict(session.get("grid")).get("models"))):
            if model.get("label") == label and model.get("name"):
                return model
    return {"name": label}


def _plugins(folder: RunFolder, method: str) -> tuple[list[str], list[str]]:
    """The files with a run's own methods, as the command line named them; and what may be wrong with them now."""
    digests = _dict(folder.manifest.get("plugins"))
    if not digests:
        return [], [f"{method} is no method of tokbench, and the run loaded no plugin: register it before these lines"]
    named = {Path(path).name: path for session in reversed(_sessions(folder)) for path in _plugin_words(session)}
    paths, notes = [], []
    for name, digest in digests.items():
        path = named.get(name, name)
        paths.append(path)
        if not Path(path).is_file():
            notes.append(f"the plugin {path!r} is not found from this folder: say where it is")
        elif hashlib.sha256(Path(path).read_bytes()).hexdigest() != digest:
            notes.append(f"the plugin {path!r} is no longer the file that the run loaded")
    return paths, notes


def _plugin_words(session: Mapping[str, Any]) -> list[str]:
    try:
        words = shlex.split(str(session.get("command") or ""))
    except ValueError:  # written by hand
        return []
    after = [word for option, word in zip(words, words[1:], strict=False) if option == "--plugin"]
    return after + [word.partition("=")[2] for word in words if word.startswith("--plugin=")]


def _calibrated(folder: RunFolder, cell: str) -> dict[str, Any]:
    """What was measured on calibration images for a cell's parameters, so that nobody needs them again."""
    for record in reversed(folder.records()):
        if record["cell"] == cell and record.get("calibrated") and record.get("params"):
            return {key: value for key, value in _dict(record["calibrated"]).items() if key in record["params"]}
    return {}


def _plain(row: pd.Series | None) -> dict[str, Any] | None:
    if row is None:
        return None
    plain = {name: None if pd.isna(row.get(name)) else row[name] for name in _FIELDS}
    return {**plain, "params": json.loads(row["params"])}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
