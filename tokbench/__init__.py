"""tokbench: how much speed token fusion buys on your Vision Transformer, and what it costs. See README.md.

The way of a figure: `fusion` puts a method into a model; `measure` counts, times and compares its answers; `running`
makes a run of that (`running.figures`: what its records say, with intervals); `results` keeps records and
knows what each figure is (`results.metrics`); `report` draws and words them; `check` compares runs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "apply": "tokbench.resolve",
    "list_methods": "tokbench.resolve",
    "remove": "tokbench.fusion.patch",
    "fork": "tokbench.fusion.patch",
    "tokens_per_block": "tokbench.fusion.patch",
    "token_map": "tokbench.fusion.patch",
    "UnsupportedModelError": "tokbench.fusion.patch",
    "register_method": "tokbench.fusion.core",
    "export": "tokbench.exporting",
    "count_flops": "tokbench.measure.flops",
    "measure_speed": "tokbench.measure.speed",
    "load_model": "tokbench.models",
    "open_dataset": "tokbench.data",
    "search": "tokbench.searching.searcher",
    "run": "tokbench.running.runner",
    "load_table": "tokbench.results.table",
    "Grid": "tokbench.config",
    "ModelSpec": "tokbench.config",
    "MethodSpec": "tokbench.config",
    "RunOptions": "tokbench.config",
    "UserError": "tokbench.errors",
    "ScheduleError": "tokbench.schedules",
}
__all__ = ["__version__", *_HOME]

if TYPE_CHECKING:
    from tokbench.config import Grid, MethodSpec, ModelSpec, RunOptions
    from tokbench.data import open_dataset
    from tokbench.errors import UserError
    from tokbench.exporting import export
    from tokbench.fusion.core import register_method
    from tokbench.fusion.patch import UnsupportedModelError, fork, remove, token_map, tokens_per_block
    from tokbench.measure.flops import count_flops
    from tokbench.measure.speed import measure_speed
    from tokbench.models import load_model
    from tokbench.resolve import apply, list_methods
    from tokbench.results.table import load_table
    from tokbench.running.runner import run
    from tokbench.schedules import ScheduleError
    from tokbench.searching.searcher import search


def __getattr__(name: str) -> Any:
    """Import a public name on first use: `import tokbench` alone does not import torch."""
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'tokbench' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
