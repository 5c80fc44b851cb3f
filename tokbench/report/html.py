"""A run as one HTML file that needs no network: findings, an interactive Pareto plot, the table, the manifest."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from tokbench import __version__
from tokbench.errors import UserError
from tokbench.report.findings import findings
from tokbench.report.scene import bar_reach
from tokbench.report.styles import method_style
from tokbench.report.tables import readable
from tokbench.report.text import cell_name, group_title, interval, number, variant_name
from tokbench.results.cell import Cell, Figure
from tokbench.results.folder import RunFolder, write_out
from tokbench.results.metrics import GAINS, METRICS
from tokbench.results.table import Rivals, comparable, load_shown, measured

_TEMPLATE, _SCRIPT = (Path(__file__).with_name(name) for name in ("report.html.jinja", "report.js"))
_SYMBOLS: dict[str | tuple[int, int, int], str] = {
    "*": "star", "o": "circle", "s": "square", "^": "triangle-up", "v": "triangle-down", "D": "diamond",
    "h": "hexagon", "P": "cross", "X": "x", "p": "pentagon", "<": "triangle-left", ">": "triangle-right",
    "d": "diamond-tall", "8": "octagon", "H": "hexagon2", (3, 1, 0): "star-triangle-up", (4, 1, 0): "star-diamond",
    (5, 1, 0): "star-square", (6, 1, 0): "hexagram", (8, 1, 0): "diamond-wide",
}  # fmt: skip
_DASHES = ("solid", "dash", "dot", "dashdot")  # by run, where several share a plot


def write_report(runs: Sequence[str | Path], out: str | Path, *, tell: Callable[[str], None] = lambda _: None) -> Path:
    """Write the report of one or several run folders to `out`, a .html file; returns it.

    tell: called with a line about runs that hold nothing.

    Raises UserError for a folder that is no run, for runs without records, and if the file cannot be written.
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        name = f"{out.stem or 'report'}.html"
        raise UserError(f"cannot write the report to {out}: it is an HTML file, so call it {name}.")
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    cells = load_shown(runs, tell)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "allow_nan": False}
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=", ".join(dict.fromkeys(cell.model for cell in cells)),
        findings=findings(cells),
        plot=plot_data(cells),
        table=readable(cells),
        manifests=[_manifest(run) for run in dict.fromkeys(Path(run).resolve() for run in runs)],
        version=__version__,
        plotly=Markup(get_plotlyjs()),  # the library's own code, and ours
        script=Markup(_SCRIPT.read_text(encoding="utf-8")),
    )
    write_out(out, lambda file: file.write(page.encode(errors="backslashreplace")))
    return out


def plot_data(cells: Sequence[Cell]) -> dict[str, Any]:
    """The page's plot as JSON values: measured metrics, groups, cells and fronts.

    Fronts hold indices into `cells`; `fronts` has each pair of metrics in one order.
    """
    names, groups = measured(cells), comparable(cells)
    group_of = {cell: number for number, group in enumerate(groups) for cell in group}
    number_of = {cell: number for number, cell in enumerate(cells)}
    runs = [list(dict.fromkeys(cell.run for cell in group)) for group in groups]
    searched = any(cell.is_searched for cell in cells)
    each = {
        paced: [Rivals(own) for own in comparable(cells, *(name for name in names if METRICS[name].paced == paced))]
        for paced in (False, True)
    }
    fronts = {
        f"{x}|{y}": [rivals.front(x, y) for rivals in each[METRICS[x].paced or METRICS[y].paced]]
        for x, y in combinations(names, 2)
    }
    return {
        "metrics": {name: {"label": METRICS[name].label, "better": METRICS[name].better} for name in names},
        "axes": _axes(names),
        "groups": [
            {"title": group_title(group), "reach": {name: [*bar_reach(group, name)] for name in names}}
            for group in groups
        ],
        "cells": [_drawn(cell, runs[group_of[cell]], searched) | {"group": group_of[cell]} for cell in cells],
        "fronts": {pair: [[number_of[cell] for cell in own] for own in found if own] for pair, found in fronts.items()},
    }


def _drawn(cell: Cell, runs: Sequence[str], searched: bool) -> dict[str, Any]:
    """A cell's name, marker and figures in a plot of these runs. searched: whether any schedule is searched, so that
    others are hollow."""
    style, changed, several = method_style(cell.method), cell.variant != cell.method, len(runs) > 1
    place, figures = runs.index(cell.run), cell.figures.items()
    changed = changed or (searched and not (cell.is_searched or cell.is_baseline))
    return {
        "name": cell_name(cell, several),
        "series": variant_name(cell.method, cell.variant)
        + (" · searched" if cell.is_searched else "")
        + (f" · {cell.run}" if several else ""),
        "baseline": cell.is_baseline,
        "tokens": list(cell.tokens),
        "dash": _DASHES[(place or changed) % len(_DASHES)],
        "color": style.color,
        "symbol": _SYMBOLS[style.marker] + ("-open" if changed else ""),
        "size": round(9 * style.size, 1),
        # Unrounded numbers would be most of a large page.
        "figures": {name: [float(f"{own:.6g}") for own in (f.value, *(f.interval or ()))] for name, f in figures},
        "words": {name: _in_words(cell, name) for name in METRICS if cell[name]},
        "broken": [f"NaN or infinite logits: {cell.nonfinite:,} images"] if cell.is_broken else [],
    }


def _in_words(cell: Cell, name: str) -> str:
    """The figure with its own interval: Wilson's for top-1, whose bars show the interval of the difference."""
    figure, digits = cell.figures[name], METRICS[name].digits_for(cell.images)
    own = [cell.also[column] for column in METRICS[name].also if column in cell.also]
    ends = "" if cell.is_baseline else interval(figure, digits)
    if METRICS[name].also:
        ends = interval(Figure(figure.value, *own), digits)
    return f"{number(figure.value, digits)} {ends}".strip()


def _axes(names: Sequence[str]) -> list[str]:
    """The initial x and y: a cost and a measure of accuracy, as far as they were measured."""
    x = next((name for name in ("speedup", "throughput", "gflops", *names) if name in names), "")
    return [x, next((name for name in (*GAINS, "gflops", *names) if name in names and name != x), x)]


def _manifest(run: str | Path) -> dict[str, Any]:
    folder = RunFolder.open(run)
    manifest = folder.manifest.plain()
    parts = {part: manifest.pop(part, {}) for part in ("machine", "packages", "grid", "conditions", "continued")}
    return {
        "run": folder.path.resolve().name,
        "facts": _facts(manifest | (parts["conditions"] or {})),
        "machine": {key: value for key, value in parts["machine"].items() if value is not None},
        "packages": parts["packages"],
        "grid": json.dumps(parts["grid"], indent=2, ensure_ascii=False),
    }


def _facts(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values by their path, as in "models · bundled · images"; empty ones are left out."""
    facts: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            facts |= _facts(value, f"{prefix}{key} · ")
        elif value not in (None, [], ""):
            facts[prefix + str(key)] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return facts
