"""Model the time of accuracy runs against images, cells and workers, and check that: `python benchmarks/scaling/scaling.py`.

A folder of large JPEGs is made on the spot. What reading an image, a forward pass of each cell and the rest of a run
take is measured; then runs of several grids are made, single cells and grids in turns, and compared with what the parts
say. `--plot FILE.png` draws what they say for up to 64 devices, `--shared RUN` how many FLOPs of a run's cells are in
blocks before their first removal. OMP_NUM_THREADS=1 makes a worker of one thread.
"""

from __future__ import annotations

import argparse
import io
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from tokbench import apply, load_model, open_dataset
from tokbench.config import Grid, MethodSpec, ModelSpec, RunOptions
from tokbench.data import load_batches
from tokbench.data.bundled import read_composites
from tokbench.fusion.patch import fork
from tokbench.measure.accuracy import evaluate
from tokbench.results.folder import RunFolder
from tokbench.running import runner

CELLS = [
    MethodSpec(name, (schedule,))
    for schedule in ("8", "12", "keep:0.7@3,6,9", "keep:0.5@3,6,9")
    for name in ("tome", "pitome", "topk", "evit")
]
SIDE, BATCH = (1280, 960), 16


@dataclass
class Parts:
    """What a run is made of, in seconds: for an image, for each cell, and once.

    cells: of the unreduced model, and of each of CELLS.
    """

    read: float
    cells: list[float]
    prepare: float
    start: float

    def predict(self, images: int, cells: int, devices: int = 1, readers: int = 0) -> float:
        """Seconds of a run on so many images, the unreduced model and so many cells; the largest share decides.

        readers: processes beside each device that only read; 0 where the one that runs the models reads, too.
        """
        share = BATCH * math.ceil(images / devices / BATCH)
        chosen = self.cells[:1] + [self.cells[1 + number % (len(self.cells) - 1)] for number in range(cells)]
        forward = sum(chosen)
        image = max(self.read / readers, forward) if readers else self.read + forward
        return self.start + cells * self.prepare + min(share, images) * image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=96, help="JPEGs to make (96)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each grid (3)")
    parser.add_argument("--plot", type=Path, help="draw the model here, and measure only the parts")
    parser.add_argument("--gpu", type=float, nargs=3, default=(8000, 500, 16), metavar=("FORWARD", "READ", "READERS"),
                        help="images/s of the unreduced model on a GPU, images/s that a reader reads, readers a GPU")  # fmt: skip
    parser.add_argument("--shared", type=Path, nargs="+", help="run folders")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.shared:
        print("| run | cells | methods with shared blocks | share of the FLOPs |\n|---|---:|---|---:|")
        for run in asked.shared:
            print(shared_flops(run))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_jpegs(Path(temporary) / "images", asked.images)
        parts = measure_parts(folder)
        print(f"read {1000 * parts.read:.1f} ms an image, unreduced model {1000 * parts.cells[0]:.1f} ms, a cell "
              f"{1000 * np.mean(parts.cells[1:]):.1f} ms on average; {parts.start:.1f} s a run and {parts.prepare:.2f} s a cell")  # fmt: skip
        if asked.plot:
            draw(parts, asked.plot, *asked.gpu)
        else:
            check(parts, folder, asked.images, asked.repeats)


def make_jpegs(folder: Path, count: int) -> Path:
    """Photographs' stand-ins of 1.2 megapixels: bundled images enlarged, with grain, so that decoding has work to do."""
    folder.mkdir(parents=True)
    composites, random = read_composites(), np.random.default_rng(0)
    for number in range(count):
        large = composites[number][0].convert("RGB").resize(SIDE, Image.Resampling.BICUBIC)
        grain = random.normal(0, 8, (SIDE[1], SIDE[0], 1))
        Image.fromarray(np.clip(np.asarray(large) + grain, 0, 255).astype(np.uint8)).save(folder / f"{number:05d}.jpg", quality=90)
    return folder


def measure_parts(folder: Path) -> Parts:
    """Each alone: reading all images, each cell on all of them, and what is left of two small runs."""
    base = load_model("bundled")
    source = open_dataset(str(folder), base)
    began = time.perf_counter()
    batches = [(batch.images, batch.labels) for batch in load_batches(source, BATCH)]
    read = (time.perf_counter() - began) / len(source)
    models = [base, *(apply(fork(base), cell.name, cell.schedules[0]) for cell in CELLS)]
    forward: list[list[float]] = [[] for _ in models]
    for _ in range(3):
        for own, model in zip(forward, models, strict=True):
            began = time.perf_counter()
            evaluate({"": model}, batches, device="cpu")
            own.append((time.perf_counter() - began) / len(source))
    cells = [median(own) for own in forward]
    few = 2 * BATCH
    with timed_runs(folder, few) as run:
        one, most = (median(run(CELLS[:count])[0] for _ in range(3)) for count in (1, len(CELLS)))
    rest = [took - few * (read + sum(cells[: 1 + count])) for took, count in ((one, 1), (most, len(CELLS)))]
    prepare = max(0.0, (rest[1] - rest[0]) / (len(CELLS) - 1))
    return Parts(read, cells, prepare, max(0.0, rest[0] - prepare))


@contextmanager
def timed_runs(folder: Path, images: int, cache: str | None = None) -> Iterator[Any]:
    """A function that runs cells for accuracy, and gives the seconds and the run's records."""
    options = RunOptions(device="cpu", only=("accuracy",), batch_size=BATCH, limit=images, cache=cache)
    draw, runner._draw = runner._draw, lambda *_: []  # the plot is no part of this
    with tempfile.TemporaryDirectory() as temporary:

        def run(cells: list[MethodSpec]) -> tuple[float, list[Any]]:
            out = Path(tempfile.mkdtemp(dir=temporary)) / "run"
            grid = Grid(models=(ModelSpec(),), methods=tuple(cells), data=str(folder), options=options)
            began = time.perf_counter()
            runner.run(grid, out)
            return time.perf_counter() - began, RunFolder.open(out).records()

        try:
            yield run
        finally:
            runner._draw = draw


def check(parts: Parts, folder: Path, images: int, repeats: int) -> None:
    """Runs of single cells and grids in turns, against each other and against what the parts say."""
    counts, singles, grids = (1, 4, 16), [], {count: [] for count in (1, 4, 16)}
    passes: list[float] = []
    with timed_runs(folder, images) as run:
        for _ in range(repeats):
            singles.append([run([cell])[0] for cell in CELLS])
            for count in counts:
                took, records = run(CELLS[:count])
                grids[count].append(took)
            passes.append(records[-1].pass_seconds)
    print("\n| cells | one run | a run for each | ratio | forward passes and one decode | ratio | predicted | ratio |\n|---:|---:|---:|---:|---:|---:|---:|---:|")
    for count in counts:
        grid = median(grids[count])
        apart = median(sum(own[:count]) for own in singles)
        alone = images * (parts.read + sum(parts.cells[: 1 + count]))
        predicted = parts.predict(images, count)
        print(f"| {count} | {grid:.1f} s | {apart:.1f} s | {grid / apart:.2f} | {alone:.1f} s | {grid / alone:.2f} | "
              f"{predicted:.1f} s | {predicted / grid:.2f} |")  # fmt: skip
    with tempfile.TemporaryDirectory() as cache, timed_runs(folder, images, cache) as run:
        for which in ("first", "second"):
            took, records = run(CELLS)
            share = records[-1].reading_seconds / records[-1].pass_seconds
            print(f"\n{which} run of 16 cells with --cache: {took:.1f} s, {share:.1%} of the pass to read images")


def shared_flops(run: Path) -> str:
    """A row on the blocks before the first removal, of all cells of a run."""
    counted = {record.cell: record for record in RunFolder.open(run).records() if record.kind == "flops"}
    base = next(record for record in counted.values() if record.method == "none")
    depth, whole = len(base.tokens), sum(record.flops for record in counted.values())
    before = {
        name: next((block for block, left in enumerate(record.tokens) if left < base.tokens[0]), depth)
        for name, record in counted.items()
        if record is not base
    }
    methods = sorted({counted[name].method for name, blocks in before.items() if blocks})
    share = sum(before.values()) * base.flops / depth / whole
    return f"| {run.name} | {len(counted)} | {', '.join(methods)} | {share:.0%} |"


def draw(parts: Parts, path: Path, forward: float, read: float, readers: float) -> None:
    """Time of 50,000 images against devices: workers as measured here, and GPUs as they were described."""
    scale = [cell / parts.cells[0] / forward for cell in parts.cells]
    gpu = Parts(1 / read, scale, parts.prepare, parts.start)
    devices = np.unique(np.geomspace(1, 64, 25).round().astype(int))
    figure = Figure(figsize=(8, 3.6), dpi=80, layout="constrained")
    titles = (
        f"CPU workers of one thread\n{1000 * parts.read:.0f} ms to read an image, {1000 * parts.cells[0]:.0f} ms a pass",
        f"GPUs of {forward:,.0f} images/s (assumed),\n{readers:.0f} readers of {read:,.0f} images/s each",
    )
    panels = figure.subplots(1, 2, sharex=True)
    for axes, own, beside, title in zip(panels, (parts, gpu), (0, int(readers)), titles, strict=True):
        for cells in (1, 4, 16, 64):
            minutes = [own.predict(50_000, cells, int(count), beside) / 60 for count in devices]
            axes.plot(devices, minutes, label=f"{cells} cells")
        axes.set(xscale="log", yscale="log", xlabel="devices", ylabel="minutes", title=title)
        axes.set_xticks([1, 2, 4, 8, 16, 32, 64], labels=["1", "2", "4", "8", "16", "32", "64"])
        axes.title.set_fontsize("small")
        axes.grid(alpha=0.3)
    panels[1].legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    Image.open(picture).quantize(32).save(path, optimize=True)


if __name__ == "__main__":
    main()
