"""`tokbench search`: a search for each model, method and budget, and a grid file with the results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tomli_w
from rich.table import Table

from tokbench.config import Grid, MethodSpec, Searched
from tokbench.errors import RunStopped, UserError, printable
from tokbench.progress import Progress
from tokbench.report.text import number, short_schedule, variant_name
from tokbench.running.cluster import opened
from tokbench.running.runner import find_device, load_subject
from tokbench.running.searched import searcher_for
from tokbench.searching.budget import parse_budget
from tokbench.searching.images import DEFAULT_IMAGES, search_data


def search_grid(
    grid: Grid,
    budgets: Sequence[str],
    out: Path,
    *,
    data: str | None = None,
    images: int = DEFAULT_IMAGES,
    seconds: float,
    seed: int = 0,
    tune: bool = False,
    progress: Progress,
    ray: str | None = None,
) -> list[Searched]:
    """Search, and write the results to `out` after each search; if interrupted, also the best so far.

    ray: workers to share the candidates between, if not the grid's; as in `RunOptions`.
    """
    found: list[Searched] = []
    budgets = [str(parse_budget(budget)) for budget in budgets]
    if len(grid.methods) == 1:
        raise UserError("there is no method to search a schedule for: --method tome, say")
    data = data or search_data(grid.data)
    options = replace(grid.options, only=("accuracy",), check_answers=False, ray=ray or grid.options.ray)
    device = find_device(options.device)
    with opened(options, (), data, device, progress) as cluster:
        for spec in grid.models:
            subject = load_subject(spec, replace(grid, methods=()), replace(options, only=("flops",)))
            searcher = searcher_for(subject, data, options, device, progress, images, cluster)
            searcher.seconds, searcher.seed, searcher.tune = seconds, seed, tune
            for method in grid.methods:
                for budget in budgets if method.name != "none" else ():
                    try:
                        found.append(searcher.search(method, budget))
                    except (KeyboardInterrupt, RunStopped):
                        found += filter(None, [searcher.so_far(method, budget)])
                        raise
                    finally:
                        if found:
                            write_grid(searched_grid(grid, found), out)
    return found


def searched_grid(grid: Grid, found: Sequence[Searched]) -> Grid:
    """The grid of the schedules found."""
    methods: dict[str, MethodSpec] = {}
    for one in found:
        spec = MethodSpec(one.method, (f"searched:{one.budget}",), one.params)
        known = methods.get(str(spec))
        schedules = dict.fromkeys([*(known.schedules if known else ()), *spec.schedules])
        methods[str(spec)] = replace(spec, schedules=tuple(schedules))
    return replace(grid, methods=tuple(methods.values()), searched=tuple(found))


def write_grid(grid: Grid, path: Path) -> None:
    """A grid as TOML that `Grid.from_toml` reads."""
    plain = _without_none(grid.to_dict())
    methods = [
        {"name": m["name"], "schedules": m["schedules"], **m["params"]} for m in plain["methods"] if m["name"] != "none"
    ]
    path.write_text(tomli_w.dumps({**plain, "methods": methods}), encoding="utf-8")


def _without_none(value: Any) -> Any:
    """A value without None, which TOML lacks."""
    if isinstance(value, dict):
        return {key: _without_none(own) for key, own in value.items() if own is not None}
    return [_without_none(own) for own in value] if isinstance(value, list) else value


def as_table(found: Sequence[Searched]) -> Table:
    """The results, one row per search."""
    table = Table(
        "Model", "Method", "Budget", "Distance", "searched", "Predicted", "Confirmed", "Tokens removed in each block"
    )
    for one in found:
        kind = one.budget.partition(":")[0]
        confirmed = "not yet" if one.cost is None else _cost(one.cost, kind)
        method = variant_name(one.method, str(MethodSpec(one.method, (), one.params)))
        table.add_row(
            *map(printable, (one.model, method, short_schedule(one.budget))),
            number(one.usual_distance, 4), number(one.distance, 4), _cost(one.predicted, kind), confirmed,
            one.schedule.removeprefix("list:").replace(",", " "),
        )  # fmt: skip
    return table


def _cost(share: float, kind: str) -> str:
    return f"{100 * share:.1f} % FLOPs" if kind == "flops" else f"{1 / share:.2f}× speed"
