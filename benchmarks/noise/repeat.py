"""Run one grid several times and print how often its intervals overlap: `python benchmarks/noise/repeat.py`.

Each run is a separate process. Predictions, FLOPs and tokens must be identical. For speed-up, efficiency and latency,
every cell's 95 % interval is compared with the same cell's in every other run: two valid intervals rarely miss each
other, at most about one time in twenty. `--burner` lets another process take one core for seconds at random meanwhile.
Words after `--` go to `tokbench run`: `-- --processes 5`.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from tokbench.report.pick import pick_cells
from tokbench.results.folder import RunFolder
from tokbench.results.table import load_table

EXACT = ("top1", "top5", "drop", "agreement", "kl", "gflops", "tokens_final")
INTERVALS = {
    "throughput": ("throughput", "throughput_low", "throughput_high"),
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
    parser.add_argument("--burner", action="store_true", help="beside a process that burns a core at random")
    parser.add_argument("--max-drop", type=float, default=5, help="points that a pick may lose (5)")
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    asked, more = parser.parse_args(own), sys.argv[len(own) + 2 :]
    with burner(asked.burner), tempfile.TemporaryDirectory() as temporary:
        folders = [(asked.out or Path(temporary)) / f"run-{number}" for number in range(asked.runs)]
        for folder in folders:
            command = [sys.executable, "-m", "tokbench", "run", "--limit", str(asked.limit), "--out", str(folder)]
            words = [*command, *([asked.grid] if asked.grid else []), *more]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        tables = [load_table(folder).set_index("cell") for folder in folders]
        early = [name for folder in folders for name in times_below_the_fastest_pass(folder)]
        picks = [picked(folder, asked.max_drop) for folder in folders]
        differing = [
            name for name in EXACT if any(not tables[0][name].equals(other[name]) for other in tables[1:])
        ] + different_predictions(folders)
    Console().print(overlaps(tables))
    print(f"times whose interval begins below the fastest pass that was seen: {', '.join(early) or 'none'}")
    for best, alike in picks:
        print(f"pick --max-drop {asked.max_drop:g}: {best}{f', not told from {alike}' if alike else ''}")
    named = {best for best, _ in picks} - {"nothing"}
    agree = all(named <= {best, *alike} for best, alike in picks)
    print(f"the picks {'agree, or say which they cannot tell apart' if agree else 'contradict each other'}")
    if differing:
        raise SystemExit(f"not the same in every run: {', '.join(differing)}")
    print(f"identical in all {asked.runs} runs: every prediction, {', '.join(EXACT)}")


@contextmanager
def burner(wanted: bool) -> Iterator[None]:
    """Inside the block, if wanted, another process burns one core for seconds, at random a third of the time."""
    process = multiprocessing.Process(target=_burn, daemon=True)
    if wanted:
        process.start()
    try:
        yield
    finally:
        if wanted:
            process.kill()


def _burn() -> None:
    generator = random.Random()
    while True:
        time.sleep(generator.expovariate(1 / 4))
        end = time.monotonic() + generator.expovariate(1 / 2)
        while time.monotonic() < end:
            pass


def times_below_the_fastest_pass(folder: Path) -> list[str]:
    """The cells whose interval of a latency or of a batch's time begins where no pass was seen."""
    below = []
    for record in (one.plain() for one in RunFolder.open(folder).records() if one.kind == "speed"):
        for name, ends in (
            ("latency_seconds", record.get("latency_low_ms", np.inf) / 1000),
            ("seconds", record["batch_size"] / record.get("throughput_high", 1e-300)),
        ):
            if ends < min(np.concatenate([np.ravel(own) for own in record[name]])) * (1 - 1e-9):
                below.append(f"{record['cell']} {name} in {folder.name}")
    return below


def picked(folder: Path, max_drop: float) -> tuple[str, list[str]]:
    """The cell that `pick` names, and those that it cannot tell from it."""
    (pick,) = pick_cells(folder, max_drop=max_drop)
    return pick.best.id if pick.best else "nothing", [cell.id for cell in pick.alike]


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
    shown = Table("Metric", "Cells", "Pairs", "Overlap", "Share", "Median distance", "Largest", "Width", "Widest")
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
        halves = [50 * (own[high] - own[low]) / own[value] for pair in pairs for own in pair]
        width, widest = f"±{np.median(halves):.1f} %", f"±{max(halves):.1f} %"
        shown.add_row(metric, cells, str(len(pairs)), str(hits), share, middle, most, width, widest)
    return shown


if __name__ == "__main__":
    main()
