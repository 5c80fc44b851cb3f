"""Published figures for models in timm, to overlay on measurements. Nothing here was measured by us.

ToMe's rows are "off the shelf", without training (Bolya et al., ICLR 2023): ImageNet-1k, AugReg weights, images/s on
a V100. Some give FLOPs only (multiply-adds), as printed in the papers of MCTF (Lee et al., CVPR 2024), ToMe and EViT
(Liang et al., ICLR 2022). Those of DiffRate, PPT and GTP are from their repositories' READMEs, off the shelf as well;
that of ATS is a user's (adaptivetokensampling/ATS, issue 2), as no such figure of its authors is known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_AUGREG = "augreg_in21k_ft_in1k"


@dataclass(frozen=True)
class Published:
    """One printed row.

    Attributes:
        models: labels in a run that mean exactly these weights.
        method, schedule: as the command line writes them.
        values: by metric, if printed or derived from what was printed.
        where: data and hardware, and parameters other than the defaults.
        left_out: the most that the printed FLOPs leave out, as a share: norms, and what choosing tokens takes.
    """

    models: tuple[str, ...]
    method: str
    schedule: str
    values: dict[str, float] = field(default_factory=dict)
    where: str = ""
    left_out: float = 0.0


def _names(name: str, tag: str, *, is_default: bool = True) -> tuple[str, ...]:
    """Labels that mean these weights: a timm name without a tag has the weights timm takes by default."""
    return (f"{name}.{tag}", name) if is_default else (f"{name}.{tag}",)


def _off_the_shelf(
    models: tuple[str, ...], schedule: str, before: tuple[float, float], after: tuple[float, float]
) -> list[Published]:
    """ToMe's row and that of its unreduced model, each (top-1 in percent, images/s)."""
    where = "ImageNet-1k, V100"
    unreduced = {"top1": before[0], "drop": 0.0, "throughput": before[1], "speedup": 1.0}
    reduced = {"top1": after[0], "drop": before[0] - after[0], "throughput": after[1], "speedup": after[1] / before[1]}
    return [Published(models, "none", "", unreduced, where), Published(models, "tome", schedule, reduced, where)]


def _flops(models: tuple[str, ...], unreduced: float, reduced: dict[tuple[str, str], float]) -> list[Published]:
    rows = {("none", ""): unreduced, **reduced}
    return [
        Published(models, method, schedule, {"gflops": gflops, "flops_ratio": gflops / unreduced}, "as printed")
        for (method, schedule), gflops in rows.items()
    ]


def _imagenet(
    models: tuple[str, ...],
    method: str,
    schedule: str,
    top1: float,
    gflops: tuple[float, float] | None = None,
    **rest: Any,
) -> Published:
    """A row off the shelf on ImageNet-1k. gflops: the reduced model's and the unreduced one's."""
    cost = {"gflops": gflops[0], "flops_ratio": gflops[0] / gflops[1]} if gflops else {}
    return Published(models, method, schedule, {"top1": top1, **cost}, **{"where": "ImageNet-1k", **rest})


_DEIT_TI, _DEIT_S = _names("deit_tiny_patch16_224", "fb_in1k"), _names("deit_small_patch16_224", "fb_in1k")
_DEIT_B = _names("deit_base_patch16_224", "fb_in1k")
_MCTF_FAST = "keep:0.65@3,6,9"

PUBLISHED: tuple[Published, ...] = (
    *_off_the_shelf(_names("vit_small_patch16_224", _AUGREG), "13", (81.41, 953), (79.30, 1564)),
    # timm's own ViT-B/16 has other weights (augreg2) unless the tag is given.
    *_off_the_shelf(_names("vit_base_patch16_224", _AUGREG, is_default=False), "13", (84.57, 309), (82.60, 511)),
    *_off_the_shelf(_names("vit_large_patch16_224", _AUGREG), "7", (85.82, 95), (84.26, 167)),
    *_off_the_shelf(_names("vit_large_patch16_384", _AUGREG), "23", (86.92, 28), (86.14, 56)),
    *_flops(_DEIT_TI, 1.26, {("mctf", "16"): 0.71, ("mctf", _MCTF_FAST): 0.75}),
    *_flops(
        _DEIT_S,
        4.61,
        {
            ("mctf", "16"): 2.60,
            ("mctf", _MCTF_FAST): 2.76,
            ("tome", "8"): 3.43,
            ("tome", "16"): 2.30,
            ("evit", "keep:0.7@3,6,9"): 3.0,
        },
    ),
    _imagenet(_DEIT_S, "tome", "13", 78.8, (2.71, 4.61)),
    _imagenet(_DEIT_S, "diffrate", "diffrate:2.9", 79.538, (2.905, 4.61), left_out=0.007),
    _imagenet(_DEIT_B, "diffrate", "diffrate:11.5", 81.498, (11.517, 17.58), left_out=0.007),
    _imagenet(_DEIT_S, "diffrate", "diffrate:2.3", 78.75, where="ImageNet-1k, by MaMe's authors"),
    _imagenet(_DEIT_B, "diffrate", "diffrate:8.7", 78.98, where="ImageNet-1k, by MaMe's authors"),
    _imagenet(_DEIT_S, "ppt", "list:0,0,0,50,0,0,50,0,0,50", 79.498, (2.944, 4.61), left_out=0.002),
    _imagenet(_DEIT_B, "gtp", "4", 81.76, where="ImageNet-1k, alpha 0.4"),
    _imagenet(_DEIT_S, "ats", "list:0,0,0,1,1,1,1,1,1,1,1,1", 79.13, (3.4, 4.61), where="ImageNet-1k, form released"),
)


def published_points(model: str, *metrics: str) -> list[Published]:
    """The printed rows of a model that have all of these metrics."""
    return [row for row in PUBLISHED if model in row.models and row.values.keys() >= set(metrics)]
