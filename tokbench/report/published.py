"""What papers published for models that timm has, to lay over one's own measurements. Nothing here was measured by us.

ToMe's rows are "off the shelf", without training (Bolya et al., ICLR 2023): ImageNet-1k, AugReg weights, images/s on
a V100. The others give FLOPs only (multiply-adds), as printed in the papers of MCTF (Lee et al., CVPR 2024), ToMe and
EViT (Liang et al., ICLR 2022).
"""

from __future__ import annotations

from dataclasses import dataclass, field

_AUGREG = "augreg_in21k_ft_in1k"


@dataclass(frozen=True)
class Published:
    """One printed row.

    Attributes:
        models: labels in a run that mean just these weights.
        method, schedule: as the command line writes them.
        values: by metric, as far as they were printed or follow from what was.
        where: data and hardware.
    """

    models: tuple[str, ...]
    method: str
    schedule: str
    values: dict[str, float] = field(default_factory=dict)
    where: str = ""


def _names(name: str, tag: str, *, is_default: bool = True) -> tuple[str, ...]:
    """Labels that mean these weights: a timm name without a tag has the weights timm takes by default."""
    return (f"{name}.{tag}", name) if is_default else (f"{name}.{tag}",)


def _off_the_shelf(
    models: tuple[str, ...], schedule: str, before: tuple[float, float], after: tuple[float, float]
) -> list[Published]:
    """ToMe's row and that of its unreduced model, each (top-1 in percent, images/s)."""
    where = "ImageNet-1k, V100"
    unreduced = {"top1": before[0], "drop": 0.0, "throughput": before[1], "speedup": 1.0}
    reduced = {
        "top1": after[0],
        "drop": before[0] - after[0],
        "throughput": after[1],
        "speedup": after[1] / before[1],
    }
    return [Published(models, "none", "", unreduced, where), Published(models, "tome", schedule, reduced, where)]


def _flops(models: tuple[str, ...], unreduced: float, reduced: dict[tuple[str, str], float]) -> list[Published]:
    rows = {("none", ""): unreduced, **reduced}
    return [
        Published(models, method, schedule, {"gflops": gflops, "flops_ratio": gflops / unreduced}, "as printed")
        for (method, schedule), gflops in rows.items()
    ]


_DEIT_TI, _DEIT_S = _names("deit_tiny_patch16_224", "fb_in1k"), _names("deit_small_patch16_224", "fb_in1k")
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
            ("tome", "13"): 2.71,
            ("tome", "16"): 2.30,
            ("evit", "keep:0.7@3,6,9"): 3.0,
        },
    ),
)


def published_points(model: str, *metrics: str) -> list[Published]:
    """The printed rows of a model that have all of these metrics."""
    return [row for row in PUBLISHED if model in row.models and row.values.keys() >= set(metrics)]
