"""A small made-up run, for tests of what is said of runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokbench.results.cell import Cell, Figure
from tokbench.results.folder import RunFolder

# method, params, schedule, top-1, FLOPs, images/s, drop with interval
CELLS: list[tuple[str, dict[str, Any], str, float, int, float, tuple[float, float, float]]] = [
    ("none", {}, "", 0.80, 400_000_000, 100.0, (0.0, 0.0, 0.0)),
    ("tome", {}, "constant:8", 0.798, 300_000_000, 130.0, (0.2, -0.3, 0.7)),
    ("tome", {}, "constant:13", 0.78, 200_000_000, 170.0, (2.0, 1.0, 3.0)),
    ("topk", {}, "keep:0.7@3,6,9", 0.77, 220_000_000, 180.0, (3.0, 2.0, 4.0)),
    ("random", {"seed": 1}, "constant:13", 0.70, 210_000_000, 165.0, (10.0, 8.0, 12.0)),
]


def make_run(path: Path, *, model: str = "bundled", images: int = 1000, **changed: Any) -> Path:
    run = RunFolder.create(path, {"machine": {"cpu": "A CPU", "gpu": "A GPU"}})
    for method, params, schedule, top1, flops, throughput, (drop, low, high) in CELLS:
        same = {
            "cell": f"{model}/{method}/{schedule}", "model": model, "weights_sha256": "ab", "method": method,
            "params": params, "schedule": schedule, "resolved": schedule, "tokens": [197, 100],
            "input_size": [1, 56, 56], "data": "bundled", "data_fingerprint": "cd", "dtype": "fp32", "device": "cpu",
        } | changed  # fmt: skip
        run.append(same | {
            "kind": "accuracy", "images": images, "correct": int(top1 * images), "top1": top1, "top1_low": top1 - 0.02,
            "top1_high": top1 + 0.02, "top5": 0.97, "drop": drop, "drop_low": low, "drop_high": high,
            "mcnemar_p": 0.5, "agreement": 0.9,
        })  # fmt: skip
        run.append(same | {"kind": "flops", "flops": flops, "flops_ratio": flops / 4e8})
        run.append(same | {
            "kind": "speed", "batch_size": 32, "throughput": throughput, "throughput_low": throughput / 1.2,
            "throughput_high": throughput / 0.9,
            "speedup": throughput / 100, "speedup_low": throughput / 101, "speedup_high": throughput / 99,
        })  # fmt: skip
    return path


def changed(cells: list[Cell], figures: Mapping[str, Figure | None] | None = None, **fields: Any) -> list[Cell]:
    """Copies of the cells with other fields and figures; a figure of None is taken away."""
    gone = {name for name, figure in (figures or {}).items() if figure is None}
    return [
        replace(
            cell,
            figures={name: own for name, own in {**cell.figures, **(figures or {})}.items() if name not in gone},
            **fields,
        )
        for cell in cells
    ]
