"""Named schedules: the rates that DiffRate's authors searched on ImageNet-1k, each list for one model."""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from typing import Any

from tokbench.errors import UserError
from tokbench.fusion.core import Method
from tokbench.fusion.diffrate import DiffRate
from tokbench.measure._model import resolve_input_size
from tokbench.schedules import Schedule


def look_up(model: Any, method: Method, schedule: Schedule) -> tuple[Method, Schedule]:
    """The method and the schedule with what `schedule`, such as `diffrate:2.9`, stands for in this model.

    Raises UserError for another method, a `prune` of one's own, and a model or a budget that was not searched.
    """
    if not isinstance(method, DiffRate) or method.prune != DiffRate.prune:
        raise UserError(f"schedule '{schedule}' is for method 'diffrate', and brings its own prune")
    searched = json.loads(resources.files("tokbench.fusion").joinpath("diffrate_rates.json").read_text("utf-8"))
    architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    for entry in searched["models"]:
        budgets = {float(budget): rates for budget, rates in entry["budgets"].items()}
        # A fine-tuned MAE has its architecture from the plain ViT, and averages its tokens.
        made_for = (entry["architecture"], entry["global_pool"], (224, 224))
        if (architecture, model.global_pool, resolve_input_size(model, None)[1:]) != made_for:
            continue
        if schedule.values[0] not in budgets:
            known = ", ".join(f"diffrate:{budget}" for budget in entry["budgets"])
            raise UserError(f"schedule '{schedule}' was not searched for {entry['model']}; there are {known}")
        rates = budgets[schedule.values[0]]
        found = dataclasses.replace(schedule, found=tuple(rates["removed"]))
        return dataclasses.replace(method, prune=tuple(rates["pruned"])), found
    names = ", ".join(entry["model"] for entry in searched["models"])
    raise UserError(f"schedule '{schedule}': rates were searched for {names} at 224×224, and are no other model's")
