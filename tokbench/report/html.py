"""A run as one HTML file that needs no network: findings, an interactive Pareto plot, the table, the manifest."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pandas as pd

from tokbench import __version__
from tokbench.errors import UserError
from tokbench.report.findings import cell_name, findings, group_title, tell_runs_apart
from tokbench.report.metrics import COLUMNS, GAINS, METRICS, comparable, find_metric, load_cells, pareto_front
from tokbench.report.styles import method_style, variant_name
from tokbench.report.tables import readable, sensible_digits
from tokbench.results.folder import RunFolder, replace_file

_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_SYMBOLS = {
    "*": "star", "o": "circle", "s": "square", "^": "triangle-up", "v": "triangle-down", "D": "diamond",
    "h": "hexagon", "P": "cross", "X": "x", "p": "pentagon", "<": "triangle-left", ">": "triangle-right",
    "d": "diamond-tall", "8": "octagon",
}  # fmt: skip
_DASHES = ("solid", "dash", "dot", "dashdot")  # by run, where several share a plot


def write_report(runs: Sequence[str | Path], out: str | Path, *, tell: Callable[[str], None] = lambda _: None) -> Path:
    """Write the report of one or several run folders to `out`, a .html file; returns it.

    tell: is told in a line which of several runs hold nothing.

    Raises UserError without jinja2 and plotly, for a folder that is no run, for runs without records and where the
    file cannot be written.
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        name = f"{out.stem or 'report'}.html"
        raise UserError(f"cannot write the report to {out}: it is an HTML file, so call it {name}.")
    try:
        import jinja2
        from markupsafe import Markup
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError(f"the report needs a package that is not here: pip install jinja2 plotly ({error}).") from error
    df = tell_runs_apart(load_cells(runs, tell))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False}
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=", ".join(dict.fromkeys(df["model"])),
        findings=findings(df),
        plot=plot_data(df),
        table=readable(df),
        manifests=[_manifest(run) for run in dict.fromkeys(Path(run).resolve() for run in runs)],
        version=__version__,
        plotly=Markup(get_plotlyjs()),  # the library's own code
    )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, lambda file: file.write(page.encode(errors="backslashreplace")))
    except OSError as error:
        raise UserError(f"cannot write the report {out}: {error.strerror or error}.") from error
    return out


def plot_data(df: pd.DataFrame) -> dict[str, Any]:
    """What the page's plot draws, as JSON can hold it: metrics that were measured, groups, cells and fronts."""
    names = [name for name, metric in METRICS.items() if df[metric.column].notna().any()]
    metrics = {
        name: {"label": metric.label, "column": metric.column, "low": metric.low, "high": metric.high,
               "better": metric.better, "digits": sensible_digits(metric, df["images"].max())}
        for name, metric in ((name, find_metric(name)) for name in names)
    }  # fmt: skip
    groups = comparable(df)
    group_of = {index: number for number, group in enumerate(groups) for index in group.index}
    place_of = {run: place for group in groups for place, run in enumerate(dict.fromkeys(group["run"]))}
    cells = []
    for index, row in df.iterrows():
        style = method_style(row["method"])
        cells.append(
            _plain({column: row[column] for column in COLUMNS})
            | {
                "name": cell_name(row),
                "series": " · ".join(
                    filter(None, (variant_name(row["method"], row["variant"]), row.get("run_of_several")))
                ),
                "dash": _DASHES[place_of[row["run"]] % len(_DASHES)],
                "color": style.color,
                "symbol": _SYMBOLS[style.marker],
                "size": round(9 * style.size, 1),
                "group": group_of[index],
            }
        )
    fronts = {
        f"{x}|{y}": [group.index.tolist() for group in comparable(df[pareto_front(df, x, y)], x, y)]
        for x, y in permutations(names, 2)
    }
    return {
        "metrics": metrics,
        "axes": _axes(names),
        "groups": [group_title(group) for group in groups],
        "cells": cells,
        "fronts": fronts,
    }


def _axes(names: Sequence[str]) -> list[str]:
    """The metrics to begin with, x and y: what is kept of the model against what it costs, as far as that is known."""
    x = next((name for name in ("speedup", "throughput", "gflops", *names) if name in names), "")
    return [x, next((name for name in (*GAINS, "gflops", *names) if name in names and name != x), x)]


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Values as JSON has them; what is missing is null."""
    known = {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
    return {key: None if pd.isna(value) else value for key, value in known.items()}


def _manifest(run: str | Path) -> dict[str, Any]:
    folder = RunFolder.open(run)
    manifest = dict(folder.manifest)
    parts = {part: manifest.pop(part, {}) for part in ("machine", "packages", "grid", "conditions", "continued")}
    return {
        "run": folder.path.resolve().name,
        "facts": _facts(manifest | (parts["conditions"] or {})),
        "machine": {key: value for key, value in parts["machine"].items() if value is not None},
        "packages": parts["packages"],
        "grid": json.dumps(parts["grid"], indent=2, ensure_ascii=False),
    }


def _facts(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values by their path, as in "models · bundled · images"; without what is empty."""
    facts: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            facts |= _facts(value, f"{prefix}{key} · ")
        elif value not in (None, [], ""):
            facts[prefix + str(key)] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return facts
