"""Model the time of runs for accuracy, and check that: `python benchmarks/scaling/scaling.py`.

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
from itertools import cycle, islice
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
from tokbench.running.shared import blocks_before_removal

CELLS = [
    MethodSpec(name, (schedule,))
    for schedule in ("8", "12", "keep:0.7@3,6,9", "keep:0.5@3,6,9")
    for name in ("tome", "pitome", "topk", "evit")
]
SIDE, BATCH = (1280, 960), 16
COUNTS = (1, 4, 16)
# Seconds that this process works, here and in the runs it makes: other work on the machine does not count.
time.monotonic = time.process_time


@dataclass
class Parts:
    """What a run is made of, in seconds: for an image, for each cell, and once.

    cells: of the unreduced model, and of each of CELLS; beside: in a pass that shares blocks with the unreduced model.
    """

    read: float
    cells: list[float]
    beside: list[float]
    prepare: float
    start: float

    def predict(self, images: int, cells: int, devices: int = 1, readers: int = 0) -> float:
        """Seconds of a run on so many images, the unreduced model and so many cells; the largest shard decides.

        readers: processes beside each device that only read; 0 where the one that runs the models reads, too.
        """
        shard = min(images, BATCH * math.ceil(images / devices / BATCH))
        forward = self.cells[0] + sum(islice(cycle(self.beside[1:]), cells))
        image = max(self.read / readers, forward) if readers else self.read + forward
        return self.start + cells * self.prepare + shard * image

    def text(self) -> str:
        """One line."""
        each, saved = 1000 * np.mean(self.cells[1:]), 1 - sum(self.beside) / sum(self.cells)
        return (
            f"{1000 * self.read:.1f} ms to read an image, {1000 * self.cells[0]:.1f} ms in the unreduced model, "
            f"{each:.1f} ms in a cell on average; of all forward passes {saved:.0%} are shared blocks; "
            f"{self.start:.2f} s a run and {self.prepare:.2f} s a cell"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=96, help="JPEGs to make (96)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each grid (3); 0 for the parts alone")
    parser.add_argument("--plot", type=Path, help="draw the model here")
    gpu = ("FORWARD", "READ", "READERS")
    about = "images/s of the unreduced model on a GPU, images/s that a reader reads, readers beside each GPU"
    parser.add_argument("--gpu", type=float, nargs=3, default=(8000, 150, 8), metavar=gpu, help=about)
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
        print(parts.text())
        if asked.plot:
            draw(parts, asked.plot, *asked.gpu)
        if asked.repeats:
            check(parts, folder, asked.images, asked.repeats)


def make_jpegs(folder: Path, count: int) -> Path:
    """Bundled images enlarged to 1.2 megapixels, with grain, so that decoding has as much to do as with photographs."""
    folder.mkdir(parents=True)
    composites, random = read_composites(), np.random.default_rng(0)
    for number in range(count):
        large = composites[number][0].convert("RGB").resize(SIDE, Image.Resampling.BICUBIC)
        grain = random.normal(0, 8, (SIDE[1], SIDE[0], 1))
        grainy = np.clip(np.asarray(large) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(grainy).save(folder / f"{number:05d}.jpg", quality=90)
    return folder


def measure_parts(folder: Path) -> Parts:
    """Each alone: reading all images, each cell on all of them, and what is left of two small runs."""
    base = load_model("bundled")
    source = open_dataset(str(folder), base)
    began = time.process_time()
    batches = [(batch.images, batch.labels) for batch in load_batches(source, BATCH)]
    read = (time.process_time() - began) / len(source)
    models = [base, *(apply(fork(base), cell.name, cell.schedules[0]) for cell in CELLS)]
    forward: list[list[float]] = [[] for _ in models]
    for _ in range(3):
        for own, model in zip(forward, models, strict=True):
            began = time.process_time()
            evaluate({"": model}, batches, device="cpu")
            own.append((time.process_time() - began) / len(source))
    cells = [median(own) for own in forward]
    before = [0.0, *(blocks_before_removal(model.fusion) / model.fusion.depth for model in models[1:])]
    beside = [own - part * cells[0] for own, part in zip(cells, before, strict=True)]
    few = 2 * BATCH
    with timed_runs(folder, few) as run:
        one, most = (median(run(CELLS[:count])[0] for _ in range(3)) for count in (1, len(CELLS)))
    rest = [took - few * (read + sum(beside[: 1 + count])) for took, count in ((one, 1), (most, len(CELLS)))]
    prepare = max(0.0, (rest[1] - rest[0]) / (len(CELLS) - 1))
    return Parts(read, cells, beside, prepare, max(0.0, rest[0] - prepare))


@contextmanager
def timed_runs(folder: Path, images: int, cache: str | None = None) -> Iterator[Any]:
    """A function that runs cells for accuracy, and gives the seconds and the run's records."""
    options = RunOptions(device="cpu", only=("accuracy",), batch_size=BATCH, limit=images, cache=cache)
    draw, runner._draw = runner._draw, lambda *_: []  # the plot is no part of this
    with tempfile.TemporaryDirectory() as temporary:

        def run(cells: list[MethodSpec]) -> tuple[float, list[Any]]:
            out = Path(tempfile.mkdtemp(dir=temporary)) / "run"
            grid = Grid(models=(ModelSpec(),), methods=tuple(cells), data=str(folder), options=options)
            began = time.process_time()
            runner.run(grid, out)
            return time.process_time() - began, RunFolder.open(out).records()

        try:
            yield run
        finally:
            runner._draw = draw


def check(parts: Parts, folder: Path, images: int, repeats: int) -> None:
    """Runs of single cells and grids in turns, against each other and against what the parts say."""
    singles: list[list[float]] = []
    grids: dict[int, list[float]] = {count: [] for count in COUNTS}
    with timed_runs(folder, images) as run:
        for _ in range(repeats):
            singles.append([run([cell])[0] for cell in CELLS])
            for count in COUNTS:
                grids[count].append(run(CELLS[:count])[0])
    print(
        "\n| cells | one run | a run for each | ratio | every pass alone and one decode | ratio | predicted | ratio |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for count in COUNTS:
        grid = median(grids[count])
        others = (
            median(sum(own[:count]) for own in singles),
            images * (parts.read + sum(parts.cells[: 1 + count])),
            parts.predict(images, count),
        )
        fields = [f"{count}", f"{grid:.1f} s"]
        for other, ratio in zip(others, (grid / others[0], grid / others[1], others[2] / grid), strict=True):
            fields += [f"{other:.1f} s", f"{ratio:.2f}"]
        print(f"| {' | '.join(fields)} |")
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
    beside = [cell / parts.cells[0] / forward for cell in parts.beside]
    gpu = Parts(1 / read, scale, beside, parts.prepare, parts.start)
    devices = np.unique(np.geomspace(1, 64, 25).round().astype(int))
    figure = Figure(figsize=(8, 3.6), dpi=80, layout="constrained")
    titles = (
        f"CPU workers (measured): {1e3 * parts.read:.0f} ms\nto read an image, {1e3 * parts.cells[0]:.0f} ms a pass",
        f"GPUs of {forward:,.0f} images/s (assumed),\n{readers:.0f} readers of {read:,.0f} images/s each",
    )
    panels = figure.subplots(1, 2, sharex=True)
    for axes, own, beside, title in zip(panels, (parts, gpu), (0, int(readers)), titles, strict=True):
        for cells in (1, 4, 16, 64):
            minutes = [own.predict(50_000, cells, int(count), beside) / 60 for count in devices]
            axes.plot(devices, minutes, label=f"{cells} cell{'s' if cells > 1 else ''}")
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
