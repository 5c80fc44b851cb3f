"""The figures of a cell, one row each: how it is named, drawn, compared, and read from the records.

A new figure is a new row of `METRICS`; tables, plots, reports and files then have it. What is measured comes into the
records by `running.figures`. Any metric can be on any axis of a plot; the Pareto front follows from which way each is
better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from tokbench.errors import UserError, nearest
from tokbench.results.cell import Figure

Fields = Mapping[str, Any]
"""What the records of a cell say, by field, without what is None."""

_DIFFERENCE = "95 % interval of the difference from the unreduced model, same images."
_IMAGES = "95 % interval over images."
_ROUNDS = "95 % interval over timing rounds."
_MEDIAN = "95 % interval of the median latency."
# Schedules with one FLOPs target end a fraction of a percent apart, which must not decide who is on a front.
_TIE = 0.01


def ends_of(field: str) -> tuple[str, str]:
    """The fields of an interval's ends: of "drop", "drop_low" and "drop_high"; of "latency_ms", "latency_low_ms" …"""
    stem, ms = (field.removesuffix("_ms"), "_ms") if field.endswith("_ms") else (field, "")
    return f"{stem}_low{ms}", f"{stem}_high{ms}"


@dataclass(frozen=True)
class Metric:
    """One measured quantity.

    Attributes:
        label: for an axis, without the unit if `unit` gives it.
        short: with its unit, for a table's head.
        better: which way is better.
        digits: after the decimal point, in tables.
        field: of the records; the ends of its interval are beside it, under `_low` and `_high`.
        unit: as it follows a number.
        scale: from the record's unit to that of the metric.
        column: of `load_table`; default: the field's name.
        interval: columns of the 95 % interval's ends, drawn as error bars; with `bars`, the fields of the same names.
        also: further fields in files, in its unit.
        bars: what the interval is of, for a plot's footnote; "" if there is none.
        tie: values closer than this share of each other count as equal on a Pareto front.
        paced: whether it follows the machine's pace, which differs between runs (see docs/measuring.md).
        of_images: whether it is a share of images, in percent or points: few images give fewer digits.
        place: where its column stands in tables for reading; None for files only.
        rank: in a narrow terminal the highest rank is left out first, 0 never.
        note: explains it under a table.
        derive: computes it if it is no field.
    """

    label: str
    short: str
    better: Literal["higher", "lower"]
    digits: int
    field: str
    unit: str = ""
    scale: float = 1.0
    column: str = ""
    interval: tuple[str, str] | tuple[()] = ()
    also: tuple[str, ...] = ()
    bars: str = ""
    tie: float = 0.0
    paced: bool = False
    of_images: bool = False
    place: float | None = None
    rank: float = 0.0
    note: str = ""
    derive: Callable[[Fields], Figure | None] | None = None

    def __post_init__(self) -> None:
        if self.bars and not self.interval:
            object.__setattr__(self, "interval", ends_of(self.field))

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Its columns in files, in order."""
        return (self.column or self.field, *self.also, *self.interval)

    def read(self, fields: Fields) -> Figure | None:
        """The figure, None if not measured."""
        if self.derive is not None:
            return self.derive(fields)
        if self.field not in fields:
            return None
        low, high = map(fields.get, ends_of(self.field))
        if not self.interval or low is None or high is None:
            return Figure(fields[self.field] * self.scale)
        return Figure(fields[self.field] * self.scale, low * self.scale, high * self.scale)

    def digits_for(self, images: int | None) -> int:
        """Digits to print: one for a share of fewer than 10,000 images, where the second is noise."""
        return 1 if self.of_images and (images is None or images < 10_000) else self.digits


def _top1(fields: Fields) -> Figure | None:
    """Top-1 with the paired interval of the drop around it: all cells saw the same images, so the far wider interval of
    top-1 itself would hide real differences."""
    if "top1" not in fields:
        return None
    value = 100 * fields["top1"]
    if not {"drop", "drop_low", "drop_high"} <= fields.keys():
        return Figure(value)
    return Figure(value, value + fields["drop"] - fields["drop_high"], value + fields["drop"] - fields["drop_low"])


def _method_share(fields: Fields) -> Figure | None:
    return Figure(100 * fields["flops_method"] / fields["flops"]) if "flops_method" in fields else None


METRICS: dict[str, Metric] = {
    "gflops": Metric(
        "GFLOPs per image", "GFLOPs", "lower", 3, "flops", " GFLOPs", 1e-9, "gflops", tie=_TIE, place=9, rank=0.3,
    ),
    "gflops_attention": Metric(
        "GFLOPs of attention per image", "Attn GFLOPs", "lower", 3, "flops_attention", " GFLOPs", 1e-9,
        "gflops_attention", tie=_TIE,
    ),
    "gflops_mlp": Metric(
        "GFLOPs of the MLPs per image", "MLP GFLOPs", "lower", 3, "flops_mlp", " GFLOPs", 1e-9, "gflops_mlp", tie=_TIE,
    ),
    "gflops_method": Metric(
        "GFLOPs the method itself adds per image", "Method GFLOPs", "lower", 4, "flops_method", " GFLOPs", 1e-9,
        "gflops_method", tie=_TIE,
    ),
    "gflops_rest": Metric(
        "GFLOPs of all else per image", "Other GFLOPs", "lower", 4, "flops_rest", " GFLOPs", 1e-9, "gflops_rest",
        tie=_TIE,
    ),
    "method_share": Metric(
        "The method's own share of the FLOPs (%)", "Overhead %", "lower", 2, "", " %", column="method_share", tie=_TIE,
        place=11, rank=10, derive=_method_share,
    ),
    "flops_ratio": Metric(
        "FLOPs relative to the unreduced model", "FLOPs ratio", "lower", 2, "flops_ratio", tie=_TIE, place=10, rank=5,
    ),
    "throughput": Metric(
        "Throughput (images/s)", "Images/s", "higher", 0, "throughput", " images/s", bars=_ROUNDS, tie=_TIE, paced=True,
        place=12, rank=1,
    ),
    "speedup": Metric(
        "Speed-up over the unreduced model (×)", "Speed-up", "higher", 2, "speedup", "×", bars=_ROUNDS, tie=_TIE,
        place=13, rank=0.2,
    ),
    "latency": Metric(
        "Latency at batch 1 (ms)", "Latency ms", "lower", 2, "latency_ms", " ms", bars=_MEDIAN, tie=_TIE, paced=True,
        place=15, rank=3,
        note="Latency: of a single image, the median; p95: 95 % of the passes are faster.",
    ),
    "latency_p95": Metric(
        "Latency at batch 1, 95th percentile (ms)", "p95 ms", "lower", 2, "latency_p95_ms", " ms", tie=_TIE, paced=True,
        place=16, rank=9,
    ),
    "latency_speedup": Metric(
        "Speed-up at batch 1 (×)", "× at batch 1", "higher", 2, "latency_speedup", "×", bars=_ROUNDS, tie=_TIE,
        place=17, rank=6,
        note="× at batch 1: speed-up for a single image, by pairs of passes side by side.",
    ),
    "efficiency": Metric(
        'Efficiency (speed relative to the control "free")', "Efficiency", "higher", 2, "efficiency", bars=_ROUNDS,
        tie=_TIE, place=14, rank=2,
        note="Efficiency: speed relative to the control `free`, which drops as many tokens without choosing.",
    ),
    "free_speedup": Metric(
        "Speed-up of `free` with the same tokens (×)", "Speed-up of free", "higher", 2, "free_speedup", "×", tie=_TIE,
    ),
    "runtime_speedup": Metric(
        "Speed of the unreduced model over its speed in eager PyTorch (×)", "Runtime ×", "higher", 2, "runtime_speedup",
        "×", bars=_ROUNDS, tie=_TIE, place=13.5, rank=0.25,
        note="Runtime ×: what the runtime itself gives, the unreduced model there over the one in eager PyTorch; "
        "speed-ups are over the unreduced model in the same runtime.",
    ),
    "same_answers": Metric(
        "Answers that are eager PyTorch's (%)", "As eager %", "higher", 2, "same_answers", " %", 100,
        bars=_IMAGES, of_images=True, place=7.5, rank=4,
        note="As eager: share of the images on which the cell answers in this runtime as it does in eager PyTorch.",
    ),
    "memory": Metric(
        "Peak memory (MiB)", "Memory MiB", "lower", 0, "peak_memory_bytes", " MiB", 2**-20, "memory_mib", tie=_TIE,
        place=18, rank=7,
    ),
    "top1": Metric(
        "Top-1 accuracy (%)", "Top-1 %", "higher", 2, "top1", " %", 100,
        interval=("top1_paired_low", "top1_paired_high"), also=("top1_low", "top1_high"), bars=_DIFFERENCE,
        of_images=True, place=1, derive=_top1,
    ),
    "top5": Metric(
        "Top-5 accuracy (%)", "Top-5 %", "higher", 2, "top5", " %", 100, bars=_IMAGES, of_images=True, place=2, rank=6,
    ),
    "drop": Metric(
        "Top-1 drop (points)", "Drop [95 %]", "lower", 2, "drop", bars=_DIFFERENCE, of_images=True, place=3, rank=0.1,
    ),
    "mcnemar_p": Metric("McNemar's p of the drop", "McNemar p", "higher", 3, "mcnemar_p"),
    "agreement": Metric(
        "Agreement with the unreduced model (%)", "Agree %", "higher", 2, "agreement", " %", 100, bars=_IMAGES,
        of_images=True, place=4, rank=2,
        note="Agree: share of the images on which the answer is that of `none`, right or wrong.",
    ),
    "kl": Metric(
        "KL divergence from the unreduced model (nats)", "KL nats", "lower", 4, "kl", bars=_IMAGES, place=5, rank=9,
        note="KL: how far the class probabilities are from those of `none`; 0 is the same.",
    ),
    "similarity": Metric(
        "Cosine of features to the unreduced model's", "Cosine", "higher", 4, "similarity", bars=_IMAGES, place=6,
        note="Cosine: of the features with those of `none`; 1 is the same direction.",
    ),
    "knn_top1": Metric(
        "k-NN top-1 of the features (%)", "k-NN %", "higher", 2, "knn_top1", " %", 100, bars=_IMAGES, of_images=True,
        place=6.1, rank=0.2,
        note="k-NN: top-1 by the 20 nearest other images, weighted by exp(cosine / 0.07).",
    ),
    "knn_drop": Metric(
        "k-NN top-1 drop (points)", "k-NN drop [95 %]", "lower", 2, "knn_drop", bars=_DIFFERENCE, of_images=True,
        place=6.2, rank=0.3,
    ),
    "output_shift": Metric(
        "Shift of the one output (standard deviations)", "Shift σ", "lower", 4, "output_shift", bars=_IMAGES, place=7,
        rank=8,
        note="Shift: how far the model's one output moves on average, in standard deviations of `none`'s.",
    ),
    "output_correlation": Metric(
        "Correlation of the one output with the unreduced model's", "Correlation", "higher", 4, "output_correlation",
        bars=_IMAGES, place=6.5,
        note="Correlation: of the model's one output with that of `none`, over the images.",
    ),
}  # fmt: skip

# Measures of accuracy, best first, in words: without labels there is no top-1, without classes no agreement, and a
# model of one output has no features to compare.
GAINS = {
    "top1": "top-1",
    "agreement": "agreement with the unreduced model",
    "similarity": "cosine to the unreduced model's features",
    "output_correlation": "correlation with the unreduced model's output",
}


def metric_name(name: str) -> str:
    """The name in `METRICS` of a metric given by name or column (`latency_ms`). Raises UserError with the nearest."""
    known = metric_of_column(name)
    if not known:
        hint = nearest(name, METRICS) or f" There are: {', '.join(METRICS)}."
        raise UserError(f"no metric {name!r}.{hint}")
    return known


def metric_of_column(column: str) -> str:
    """The metric whose value is in that column, "" for other columns."""
    return next((name for name, metric in METRICS.items() if column in (name, metric.columns[0])), "")
