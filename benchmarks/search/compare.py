"""Compare ways to search, at the same number of forward passes: `python benchmarks/search/compare.py --out ways.csv`.

cma: what `tokbench search` does, CMA-ES from the usual schedule or the even one, the better of the two.
random: random changes of that schedule, kept where they help.
path: the same from the path that each block's sensitivity suggests (`surrogate.py`), if it is better.
Each is judged on the 256 images it searched on and on the 256 others of bundled:train. `prefix` is the share of block
FLOPs that another candidate before it had made already, with the same tokens up to there.
"""

from __future__ import annotations

import argparse
import csv
import time

import numpy as np
import torch
from surrogate import cheapest_path, sensitivities

from tokbench.fusion.core import make_method
from tokbench.models import load_model
from tokbench.searching.budget import parse_budget
from tokbench.searching.images import search_images
from tokbench.searching.objective import Objective
from tokbench.searching.search import Candidate, Search
from tokbench.searching.space import Removals


class Random(Search):
    """An evolution strategy of one parent and one child, which changes some blocks by much or by little."""

    def polish(self) -> None:
        random = np.random.default_rng(self.seed)
        while not self.is_over():
            point = self.logarithms(self.best.removals)
            changed = random.random(point.size) < random.choice((0.2, 0.5, 1.0))
            step = np.exp(random.uniform(*np.log((0.1, 1.5))))
            if changed.any():
                self.attempt(self.candidate(point + step * changed * random.normal(size=point.size), []))


class Path(Random):
    def polish(self) -> None:
        def alone(removals: Removals) -> float:
            return self.objective.of_batches(removals, self.method, 1)[0]

        found = sensitivities(self.space, alone, self.is_over)
        path = cheapest_path(self.space, self.cost, self.budget.share, found)
        self.attempt(Candidate(path, self.method))
        super().polish()


WAYS = {"cma": Search, "random": Random, "path": Path}


def shared_prefix(search: Search) -> float:
    """The share of the blocks' cost in candidates that an earlier one had run with the same tokens."""
    seen: set[Removals] = set()
    shared = total = 0.0
    for key in search.objective.shown:
        removals = tuple(map(int, key.split(" ")[0].split(",")))
        for block, step in enumerate(search.space.steps(removals)):
            cost = search.cost.of_block(*step)
            total += cost
            shared += cost if removals[: block + 1] in seen else 0
            seen.add(removals[: block + 1])
    return shared / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["tome", "evit", "mctf"])
    parser.add_argument("--budgets", nargs="+", default=["flops:0.5", "flops:0.35"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", default="ways.csv")
    args = parser.parse_args()
    model = load_model("bundled").eval()
    images = search_images("bundled:train", model, 512)[torch.from_numpy(np.random.RandomState(0).permutation(512))]
    with open(args.out, "a", newline="") as file:
        writer = csv.writer(file)
        for name in args.methods:
            method = make_method(name)
            others = Objective(model, images[256:])
            for budget in args.budgets:
                for seed in range(args.seeds):
                    for way in args.ways:
                        began = time.monotonic()
                        search = WAYS[way](model, method, parse_budget(budget), images[:256], seed=seed)
                        found = search.run()
                        removals = tuple(int(value) for value in found.schedule.values)
                        unseen = np.mean(others.of_batches(removals, method, len(others.batches)))
                        row = [
                            name, budget, way, seed, f"{found.before:.4f}", f"{found.distance:.4f}", f"{unseen:.4f}",
                            f"{found.cost:.4f}", f"{found.passes:.1f}", f"{shared_prefix(search):.2f}",
                            f"{time.monotonic() - began:.0f}", found.schedule,
                        ]  # fmt: skip
                        print(*row, flush=True)
                        writer.writerow(row)
                        file.flush()


if __name__ == "__main__":
    main()
