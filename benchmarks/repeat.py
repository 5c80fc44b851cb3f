"""Run one grid several times and print how often its intervals overlap: `python benchmarks/repeat.py [GRID.toml]`.

Each run is a separate process. Predictions, FLOPs and tokens must be identical. For speed-up, efficiency and latency,
every cell's 95 % interval is compared with the same cell's in every other run: two valid intervals rarely miss each
other, at most about one time in twenty.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from tokbench.results.folder import RunFolder
from tokbench.results.table import load_table

EXACT = ("top1", "top5", "drop", "agreement", "kl", "gflops", "tokens_final")
INTERVALS = {
    "speed-up": ("speedup", "speedup_low", "speedup_high"),
    "efficiency": ("efficiency", "efficiency_low", "efficiency_high"),
    "speed-up at batch 1": ("latency_speedup", "latency_speedup_low", "latency_speedup_high"),
    "latency": ("latency_ms", "latency_low_ms", "latency_high_ms"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grid", nargs="?", help="a grid file; without one, the quick start's")
    parser.add_argument("--limit", type=int, default=64, help="images (64)")
    parser.add_argument("--runs", type=int, default=2, help="how often (2)")
    parser.add_argument("--out", type=Path, help="keep the run folders here")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folders = [(asked.out or Path(temporary)) / f"run-{number}" for number in range(asked.runs)]
        for folder in folders:
            command = [sys.executable, "-m", "tokbench", "run", "--limit", str(asked.limit), "--out", str(folder)]
            subprocess.run([*command, *([asked.grid] if asked.grid else [])], check=True, stdout=subprocess.DEVNULL)
        tables = [load_table(folder).set_index("cell") for folder in folders]
        differing = [
            name for name in EXACT if any(not tables[0][name].equals(other[name]) for other in tables[1:])
        ] + different_predictions(folders)
    Console().print(overlaps(tables))
    if differing:
        raise SystemExit(f"not the same in every run: {', '.join(differing)}")
    print(f"identical in all {asked.runs} runs: every prediction, {', '.join(EXACT)}")


def different_predictions(folders: list[Path]) -> list[str]:
    """The prediction archives with any array that differs from the first run's."""
    first, *others = (RunFolder.open(folder) for folder in folders)
    differing = []
    for path in sorted((first.path / "predictions").iterdir()):
        for other in others:
            with np.load(path) as one, np.load(other.path / "predictions" / path.name) as two:
                if any(not np.array_equal(one[name], two[name], equal_nan=one[name].dtype.kind == "f") for name in one):
                    differing.append(path.name)
    return differing


def overlaps(tables: list[pd.DataFrame]) -> Table:
    """Per metric: pairs of intervals of the same cell, how many overlap, and the distance between their medians."""
    shown = Table("Metric", "Cells", "Pairs", "Overlap", "Share", "Median distance", "Largest")
    for metric, (value, low, high) in INTERVALS.items():
        pairs = [
            (one.loc[cell], two.loc[cell])
            for one, two in itertools.combinations(tables, 2)
            for cell in one.index
            if not pd.isna(one.loc[cell, low]) and one.loc[cell, low] < one.loc[cell, high]
        ]
        if not pairs:
            continue
        hits = sum(a[low] <= b[high] and b[low] <= a[high] for a, b in pairs)
        apart = [100 * abs(a[value] / b[value] - 1) for a, b in pairs]
        cells = str(len({a.name for a, _ in pairs}))
        share, middle, most = f"{100 * hits / len(pairs):.0f} %", f"{np.median(apart):.1f} %", f"{max(apart):.1f} %"
        shown.add_row(metric, cells, str(len(pairs)), str(hits), share, middle, most)
    return shown


if __name__ == "__main__":
    main()
