"""How far searched schedules carry: `python benchmarks/search/transfer.py SEARCHED.toml`, of the bundled model.

Prints a CSV: each method's distance (mean KL divergence from the unreduced model's answers) with its usual schedule and
with the searched one, on 512 images of the kind that it was searched on, on other kinds, and with the schedules that
were searched for other methods.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config

from tokbench.bundled.clutter import compose
from tokbench.config import Grid, Searched
from tokbench.data.bundled import read_composites
from tokbench.fusion.core import make_method
from tokbench.models import load_model
from tokbench.schedules import parse_schedule
from tokbench.searching.objective import Objective


def kinds_of_images(count: int = 512) -> Mapping[str, torch.Tensor]:
    """Test composites as they are, and changed, (count, 1, 56, 56) each, prepared for the bundled model."""
    composites = read_composites()
    items, layout = composites.items, composites.layout
    first, black = layout[:count], np.zeros_like(items[:1])
    same, other = compose(items, first), compose(items, layout[count : 2 * count])
    bare = compose(np.concatenate([items, black]), replace(first, donor=np.full_like(first.donor, len(items))))
    more = np.where(bare > 0, bare, np.maximum(same, other))
    config = resolve_model_data_config(load_model("bundled"))
    prepared = {
        name: (torch.from_numpy(images).float()[:, None] / 255 - config["mean"][0]) / config["std"][0]
        for name, images in {"the same kind": same, "without clutter": bare, "more clutter": more}.items()
    }
    prepared["blurred"] = F.avg_pool2d(prepared["the same kind"], 3, stride=1, padding=1)
    return prepared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", metavar="SEARCHED.toml")
    parser.add_argument("--methods", nargs="+", default=["tome", "evit", "mctf"])
    parser.add_argument("--budget", default="flops:0.35")
    args = parser.parse_args()
    searched = {
        found.method: found
        for found in Grid.from_toml(args.grid).searched
        if found.method in args.methods and found.budget == args.budget
    }
    model = load_model("bundled").eval()
    out = csv.writer(sys.stdout)
    out.writerow(["method", "images", "schedule", "distance"])

    def write(name: str, images: str, of: str, schedule: str, objective: Objective) -> None:
        removals = tuple(int(value) for value in parse_schedule(schedule).values)
        distances = objective.of_batches(removals, make_method(name), len(objective.batches))
        out.writerow([name, images, of, f"{np.mean(distances):.4f}"])
        sys.stdout.flush()

    for images, shown in kinds_of_images().items():
        objective = Objective(model, shown)
        for name, found in searched.items():
            write(name, images, "usual", found.usual, objective)
            write(name, images, "searched", found.schedule, objective)
            others: dict[str, Searched] = searched if images == "the same kind" else {}
            for other, theirs in others.items():
                if other != name:
                    write(name, images, f"searched for {other}", theirs.schedule, objective)


if __name__ == "__main__":
    main()
