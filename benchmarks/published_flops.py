"""Print published GFLOPs beside those tokbench counts: `python benchmarks/published_flops.py`.

No weights are needed: FLOPs depend on shapes only. T2T-ViT's and LV-ViT's figures are without norms.
"""

from __future__ import annotations

import timm
import torch
from rich.console import Console
from rich.table import Table

import tokbench
import tokbench.models  # registers T2T-ViT and LV-ViT with timm
from tokbench.report.published import PUBLISHED

# GFLOPs at a size of image: convolutions, matrix products and attention of the authors' code.
FAMILIES = {
    ("t2t_vit_7", 224): 1.15,
    ("t2t_vit_10", 224): 1.52,
    ("t2t_vit_12", 224): 1.76,
    ("t2t_vit_14", 224): 4.78,
    ("t2t_vit_19", 224): 8.48,
    ("t2t_vit_24", 224): 13.66,
    ("t2t_vit_t_14", 224): 6.09,
    ("t2t_vit_t_19", 224): 9.78,
    ("t2t_vit_t_24", 224): 14.97,
    ("t2t_vit_14", 384): 16.4,
    ("lvvit_t", 224): 2.87,
    ("lvvit_s", 224): 6.55,
    ("lvvit_m", 224): 12.68,
    ("lvvit_l", 224): 34.6,
    ("lvvit_s", 384): 21.9,
    ("lvvit_m", 384): 41.6,
    ("lvvit_m", 448): 60.0,
    ("lvvit_l", 448): 155.1,
    ("lvvit_l", 512): 211.6,
}


def count(model: torch.nn.Module) -> tuple[float, float]:
    """GFLOPs of a model, and those without its norms."""
    counted = tokbench.count_flops(model)
    if counted.unsupported:
        raise SystemExit(f"not counted: {counted.unsupported}")
    return counted.total / 1e9, (counted.total - counted.by_operator["layer_norm"]) / 1e9


def main() -> None:
    table = Table("Model", "Method", "Schedule", "Published G", "Counted G", title="GFLOPs, multiply-adds of one image")
    for row in PUBLISHED:
        if "gflops" not in row.values or row.method == "ats":  # of ATS they depend on the image
            continue
        model = timm.create_model(row.models[1]).eval()
        if row.method != "none":
            tokbench.apply(model, row.method, row.schedule)
        table.add_row(row.models[1], row.method, row.schedule, f"{row.values['gflops']:.2f}", f"{count(model)[0]:.3f}")
    for (name, size), published in FAMILIES.items():
        with torch.device("meta"):
            model = timm.create_model(name, img_size=size)
        counted = count(model.to_empty(device="cpu"))[1]
        table.add_row(f"{name} at {size}", "none", "", f"{published:.2f}", f"{counted:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
