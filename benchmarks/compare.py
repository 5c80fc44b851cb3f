"""Compare methods with the machine's limits and with other code: `python benchmarks/compare.py --out results/speed`.

The cells of a grid are timed by `tokbench run`, in OUT/DTYPE for each dtype. Then, in interleaved rounds of the
unreduced model, tokbench's method and the other code, on the same weights:

plain: ToMe and MCTF by their definitions, attention written out, as in most public code.
original: the authors' ToMe (`--tome-repo DIR`, a checkout of it), or any code (`--original METHOD=FILE.py`, whose
    `patch(model, removals)` returns the model to time; removals: tokens that go from each block).

They become cells of the same run, `METHOD-plain` and `METHOD-original`, so `tokbench table` and `plot` show them. Last
comes the roofline: what each operation of a pass needs at least, the longest of its FLOPs at the speed of a large
product, its bytes at the speed of a copy as large as a block's tokens, and the start of an empty operation. The ceiling
is the efficiency if all that a method does beyond its `free` ran at that limit, and "plans known" what is measured
where the method's choices are made beforehand: no way of choosing is more efficient.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import runpy
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Self
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tokbench import apply, run
from tokbench.config import Grid
from tokbench.fusion.anatomy import grid_for, write_attention_out
from tokbench.fusion.kernels import kernels_for
from tokbench.fusion.patch import fork
from tokbench.measure.environment import Watch
from tokbench.measure.kernels import attention_kernels
from tokbench.measure.speed import keep_freed_memory, measure_speed
from tokbench.results.cell import key_of
from tokbench.results.folder import RunFolder
from tokbench.results.records import Record
from tokbench.running.bench import DTYPES, speed_limit
from tokbench.running.figures import speed_fields
from tokbench.running.runner import find_device, load_subject

# (model, method with its parameters, schedule, tokens that go from each block) → the model to time.
Build = Callable[[Any, Record, list[int]], nn.Module]
# The goals: methods that read all of the attention, other methods, and any on single images.
GOALS = {"mctf": 0.85, "mstm": 0.85}
USUAL_GOAL, SINGLE_GOAL = 0.95, 0.92
# tokbench's kernels that do their work in one go.
KERNELS = ("mean_heads", "unit", "best_proposals", "by_energy", "softmax", "criteria", "join")
# What cells timed side by side have in common beside the fields of all records.
COMMON = {*Record.model_fields, "runtime", "provider", "threads"} - {"kind", "caveats"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grid", nargs="?", type=Path, default=Path(__file__).with_suffix(".toml"), help="a grid file")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run folders, one a dtype")
    parser.add_argument("--dtypes", default="fp32", help="fp32, bf16 and fp16, with commas (fp32)")
    parser.add_argument("--device", default="auto", help="as in `tokbench run`")
    parser.add_argument("--tome-repo", type=Path, help="a checkout of the authors' ToMe")
    parser.add_argument("--original", action="append", default=[], metavar="METHOD=FILE.py", help="other code")
    asked = parser.parse_args()
    others: dict[str, dict[str, Build]] = {"tome": {"plain": plain}, "mctf": {"plain": plain}}
    if asked.tome_repo:
        sys.path.insert(0, str(asked.tome_repo))
        others["tome"]["original"] = authors_tome
    for text in asked.original:
        method, _, path = text.partition("=")
        others.setdefault(method, {})["original"] = from_file(Path(path))
    for dtype in asked.dtypes.split(","):
        grid = Grid.from_toml(asked.grid)
        grid = replace(grid, options=replace(grid.options, dtype=dtype, device=asked.device))
        run(grid, asked.out / dtype)
        compare(grid, RunFolder.open(asked.out / dtype), others)


def plain(model: Any, record: Record, removals: list[int]) -> nn.Module:
    write_attention_out(model)
    return apply(model, record.method, record.resolved, **record.params)


def authors_tome(model: Any, record: Record, removals: list[int]) -> nn.Module:
    """As the README of the authors' ToMe has it."""
    import tome

    tome.patch.timm(model)
    model.r = removals
    return model


def from_file(path: Path) -> Build:
    build = runpy.run_path(str(path))["patch"]
    return lambda model, record, removals: build(model, removals)


def compare(grid: Grid, folder: RunFolder, others: dict[str, dict[str, Build]]) -> None:
    device, dtype = find_device(grid.options.device), DTYPES[grid.options.dtype]
    rows = []
    for spec in grid.models:
        subject = load_subject(spec, grid, grid.options)
        base = subject.model.to(device, dtype).eval()
        images = torch.rand(max(grid.options.sizes), *subject.input_size, generator=torch.Generator().manual_seed(0))
        images = images.to(device, dtype)
        records = [one for one in folder.records() if one.model == spec.label]
        timed = [one for one in records if one.kind == "speed" and one.runtime == "eager"]
        known = {(one.method, one.batch_size) for one in timed}
        for record in timed:
            for name, build in others.get(record.method, {}).items():
                if (f"{record.method}-{name}", record.batch_size) not in known:
                    add(folder, base, record, name, build, images[: record.batch_size])
        limits = Machine(device, dtype)
        ours = [one for one in timed if not one.method.endswith(("-plain", "-original"))]
        rows += [{"model": spec.label, **roofline(base, one, images, limits)} for one in ours]
    show(rows, folder.path / "roofline.csv")


def add(folder: RunFolder, base: Any, record: Any, name: str, build: Build, images: Tensor) -> None:
    """Time other code beside the unreduced model and tokbench's, and write it down as a cell."""
    tokens = [math.prod(grid_for(base)) + base.num_prefix_tokens, *record.tokens]
    removals = [int(before - after) for before, after in itertools.pairwise(tokens)]
    ours = apply(fork(base), record.method, record.resolved, **record.params)
    theirs = build(fork(base), record, removals)
    watch = Watch(images.device)
    results = measure_speed(
        {"none": base, "ours": ours, "theirs": theirs},
        batch_size=len(images), images=images, seconds=6, latency_of=("none", "ours", "theirs"),
        on_warm=lambda _: watch.begin(),
    )  # fmt: skip
    disturbance = watch.stop()
    with torch.inference_mode():
        apart = (ours(images).float() - theirs(images).float()).abs().max().item()
    method = f"{record.method}-{name}"
    identity = {key: value for key, value in record.plain().items() if key in COMMON}
    identity |= {"method": method, "cell": record.cell.replace(f"/{record.method}/", f"/{method}/")}
    fields = speed_fields([results[2]], references=[results[0]])
    again = {"reference_seconds": results[0].rounds, "reference_latency_seconds": results[0].latency}
    again |= {"other_cpu": disturbance.other_cpu, "gpu_state": disturbance.gpu}
    again["attention_kernels"] = attention_kernels(theirs, images)
    again["caveats"] = [sentence.partition(": ")[0] for sentence in disturbance.warnings]
    folder.append(identity | {"kind": "speed", **fields, **again})
    flops = next(one for one in folder.records() if one.kind == "flops" and key_of(one) == key_of(record))
    folder.append(flops.plain() | {name: identity[name] for name in ("method", "cell")})
    ours_over_theirs = median(there / here for here, there in zip(results[1].rounds, results[2].rounds, strict=True))
    print(
        f"{identity['cell']}, batch {len(images)}: tokbench is {ours_over_theirs:.2f}× as fast; "
        f"largest difference of a logit {apart:.1e}"
    )


class Machine:
    """What a machine does at best, measured: FLOPs a second in a large product, and the start of an operation."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        keep_freed_memory()
        a = torch.rand(2048, 2048, device=device, dtype=dtype)
        self.flops = 2 * 2048**3 / self.shortest(lambda: a @ a)
        one = torch.zeros(1, device=device, dtype=dtype)
        self.start = self.shortest(lambda: one.add_(1), 1000)

    def bandwidth(self, size: int) -> float:
        """Bytes a second in a copy of a tensor of `size` bytes: what is small stays in caches."""
        a = torch.rand(max(1, size // self.dtype.itemsize), device=self.device).to(self.dtype)
        b = torch.empty_like(a)
        return 2 * a.nbytes / self.shortest(lambda: b.copy_(a), 200)

    def shortest(self, work: Callable[[], Any], times: int = 20) -> float:
        seconds = []
        for _ in range(times):
            begin = time.perf_counter()
            work()
            if self.device.type != "cpu":
                torch.accelerator.synchronize(self.device)
            seconds.append(time.perf_counter() - begin)
        return min(seconds)


class Work(TorchDispatchMode):
    """Every operation of a forward pass: (multiply-adds · 2, bytes). A kernel of tokbench's is one operation."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.operations: list[tuple[float, int]] = []
        self.patches = ExitStack()
        self.kernels = kernels_for(torch.empty(0, device=device))

    def __enter__(self) -> Self:
        # Kernels go away where somebody looks at operations, unless they are asked to stay.
        self.patches.enter_context(patch("tokbench.fusion.blocks.kernels_for", lambda _: self.kernels))
        for name in KERNELS:
            if kernel := getattr(self.kernels, name, None):
                self.patches.enter_context(patch.object(self.kernels, name, self.counted(kernel)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patches.close()

    def counted(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            out = kernel(*args)
            self.operations.append((0.0, sum(map(_bytes, [*_tensors(args), *_tensors(out)]))))
            return out

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        aliases = [one.alias_info for one in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return out  # a view
        if func._schema.name.startswith("aten::") and "empty" in func._schema.name:
            return out
        made, name = _tensors(out), func._overloadpacket
        taken = _tensors([*args, *kwargs.values()])
        if name in (torch.ops.aten.index_select, torch.ops.aten.gather, torch.ops.aten.index):
            taken = [*taken[1:], *made]  # the rows that are picked, not all
        formula = flop_registry.get(name)
        if name is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            formula = flop_registry[torch.ops.aten._scaled_dot_product_flash_attention]
            args, kwargs = args[:3], {}
        flops = float(formula(*args, **kwargs, out_val=out)) if formula else 0.0
        self.operations.append((flops, sum(_bytes(one) for one in [*taken, *made])))
        return out

    def seconds(self, machine: Machine, bandwidth: float) -> float:
        return sum(max(flops / machine.flops, size / bandwidth, machine.start) for flops, size in self.operations)


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [one for value in values for one in _tensors(value)] if isinstance(values, (list, tuple)) else []


def _bytes(tensor: Tensor) -> int:
    """Of what a tensor shows: repeated rows are read once."""
    count = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= length if stride else 1
    return count * tensor.element_size()


def work_of(model: nn.Module, images: Tensor) -> Work:
    with torch.no_grad(), Work(images.device) as work:
        model(images)
    return work


def roofline(base: Any, record: Any, images: Tensor, machine: Machine) -> dict[str, Any]:
    """A cell's time and efficiency beside those at the machine's limits."""
    images = images[: record.batch_size]
    model = fork(base)
    if record.method != "none":
        apply(model, record.method, record.resolved, **record.params)
    tokens = math.prod(grid_for(base)) + base.num_prefix_tokens
    bandwidth = machine.bandwidth(len(images) * tokens * base.embed_dim * images.element_size())
    own, took = work_of(model, images).seconds(machine, bandwidth), median(record.seconds)
    row = {"cell": record.cell, "batch": record.batch_size, "ms": 1000 * took, "limit ms": 1000 * own}
    row["share"] = own / took
    if free := speed_limit(model, base) if record.free_seconds else None:
        beside = {"free": free, "known": with_known_plans(model, images)}
        known = measure_speed(beside, batch_size=len(images), images=images, seconds=6)[1]
        row |= {f"plans known{end}": getattr(known, f"speedup{end}") for end in ("", "_low", "_high")}
        more, limit = own - work_of(free, images).seconds(machine, bandwidth), median(record.free_seconds)
        ends = {end: record.plain().get(f"efficiency_{end}") for end in ("low", "high")}
        row |= {"speed-up": record.speedup, "efficiency": record.efficiency, **ends}
        row["ceiling"] = limit / (limit + max(more, 0))
        row["goal"] = GOALS.get(record.method, SINGLE_GOAL if record.batch_size == 1 else USUAL_GOAL)
    return row


def with_known_plans(model: Any, images: Tensor) -> Any:
    """The model with the plans of these images: it merges and attends as the method does, and chooses nothing."""
    fusion, plans = model.fusion, {}

    def remembered(view: Any, r: int) -> Any:
        if view.block not in plans:
            plans[view.block] = type(fusion).plan(fusion, view, r)
        return plans[view.block]

    fusion.plan = remembered
    with torch.inference_mode():
        model(images)
    return model


def show(rows: list[dict[str, Any]], path: Path) -> None:
    """Print the roofline, and write it down."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    compared = {"speed-up": "Speed-up", "efficiency": "Efficiency", "plans known": "Plans known", "ceiling": "Ceiling"}
    table = Table("Cell", "Batch", "ms", "At the limits", "Share", *compared.values(), "Goal")
    for row in rows:
        figures = [f"{row['ms']:.1f}", f"{row['limit ms']:.1f}", f"{row['share']:.0%}"]
        if "efficiency" in row:
            figures += [f"{row[name]:.2f}" for name in [*compared, "goal"]]
        table.add_row(row["cell"], str(row["batch"]), *figures)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
