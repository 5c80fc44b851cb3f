"""Print published GFLOPs beside those tokbench counts: `python benchmarks/published_flops.py`.

No weights are needed: FLOPs depend on shapes only.
"""

from __future__ import annotations

import timm
from rich.console import Console
from rich.table import Table

import tokbench
from tokbench.report.published import PUBLISHED


def main() -> None:
    table = Table("Model", "Method", "Schedule", "Published G", "Counted G", title="GFLOPs, multiply-adds of one image")
    for row in PUBLISHED:
        if "gflops" not in row.values or row.method == "ats":  # of ATS they depend on the image
            continue
        model = timm.create_model(row.models[1]).eval()
        if row.method != "none":
            tokbench.apply(model, row.method, row.schedule)
        counted = tokbench.count_flops(model)
        if counted.unsupported:
            raise SystemExit(f"{row.method}: not counted: {counted.unsupported}")
        table.add_row(
            row.models[1], row.method, row.schedule, f"{row.values['gflops']:.2f}", f"{counted.total / 1e9:.3f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
