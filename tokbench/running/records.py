"""What the records of a cell say: figures and their intervals, from what was measured."""

from __future__ import annotations

import re
from math import inf
from typing import Any

import numpy as np

from tokbench.measure.accuracy import Predictions, output_shift
from tokbench.measure.flops import FlopCount
from tokbench.measure.speed import SpeedResult
from tokbench.measure.stats import mcnemar_p, mean_interval, median_interval, median_ratio_interval, paired_drop, wilson

_LATENCY = ("latency_ms", "latency_low_ms", "latency_high_ms")


def accuracy_fields(predictions: Predictions, baseline: Predictions) -> dict[str, Any]:
    """The accuracy part of a record: counts, fractions and their intervals, against the unreduced model's.

    Accuracy is of the images with a label; without any, only what compares the two models; without classes, only their
    features or their one output.
    """
    fields: dict[str, Any] = {"images": len(predictions.label), "nonfinite": predictions.nonfinite()}
    if predictions.labeled and predictions.classifies:
        known = predictions.with_label()
        right, right_before = known.correct, baseline.with_label().correct
        correct5 = int(known.top5.sum())
        if unlabelled := len(predictions.label) - len(known.label):
            fields["unlabelled"] = unlabelled
        fields |= {"correct": int(right.sum()), "correct5": correct5}
        fields |= dict(zip(("top1_low", "top1_high"), wilson(int(right.sum()), len(right)), strict=True))
        fields |= dict(zip(("top5_low", "top5_high"), wilson(correct5, len(right)), strict=True))
        fields |= dict(zip(("drop", "drop_low", "drop_high"), paired_drop(right_before, right), strict=True))
        fields |= {"top1": predictions.top1(), "top5": predictions.top5_accuracy()}
        fields["mcnemar_p"] = mcnemar_p(right_before, right)
    if predictions.classifies:
        agree = (predictions.predicted == baseline.predicted) & (baseline.predicted >= 0)
        fields["agreement"] = float(np.mean(agree))
        fields |= dict(zip(("agreement_low", "agreement_high"), wilson(int(agree.sum()), len(agree)), strict=True))
    for name, interval in output_shift(predictions, baseline).items():
        fields |= dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))
    distances = (("kl", predictions.divergence, 0, inf), ("similarity", predictions.similarity, -1, 1))
    for name, values, least, most in distances:
        if np.isfinite(values).any():
            mean, low, high = mean_interval(values)
            # Where the mean can be. Rounded, it may itself be a little beyond.
            fields |= {
                name: mean,
                f"{name}_low": max(low, min(mean, least)),
                f"{name}_high": min(high, max(mean, most)),
            }
    return fields


def at_chance_level(baseline: Predictions, num_classes: int) -> bool:
    """Whether a model knows the labels no better than guessing among the classes that are there would."""
    if not (baseline.labeled and baseline.classifies):
        return False
    known = baseline.with_label()
    present = len(np.unique(known.label))
    chance = 1 / (present if present > 1 else max(num_classes, 2))
    low, _ = wilson(int(known.correct.sum()), len(known.label))
    # Few images make a wide interval: a model that is far above chance on them is not accused.
    return low <= chance and baseline.top1() <= 2 * chance


def flops_fields(count: FlopCount, limit: FlopCount, unreduced: int) -> dict[str, Any]:
    """The FLOPs part of a record. What the model takes without the method's own work is its speed limit's count."""
    parts = {
        part: sum(flops for name, flops in limit.by_module.items() if re.fullmatch(rf"blocks\.\d+\.{part}", name))
        for part in ("attn", "mlp")
    }
    return {
        "flops": count.total,
        "flops_ratio": count.total / unreduced,
        "flops_attention": parts["attn"],
        "flops_mlp": parts["mlp"],
        "flops_method": count.total - limit.total,
        "flops_rest": limit.total - sum(parts.values()),
        "unsupported": count.unsupported,
    }


def speed_fields(
    result: SpeedResult,
    memory: tuple[int, int] | None,
    *,
    reference: SpeedResult,
    limit: SpeedResult | None,
    compiled: bool,
) -> dict[str, Any]:
    """The speed part of a record: every timing, and what follows from them.

    memory: peak bytes, allocated and reserved. reference: the unreduced model in the same
    rounds. limit: the cell's own `free` in the same rounds.
    """
    _, quick, slow = median_interval(result.rounds)
    fields = {
        "batch_size": result.batch_size,
        "seconds": result.rounds,
        "iterations": result.iterations,
        "compiled": compiled,
        "throughput": result.throughput,
        "throughput_low": result.batch_size / slow,
        "throughput_high": result.batch_size / quick,
        "speedup": result.speedup,
        "speedup_low": result.speedup_low,
        "speedup_high": result.speedup_high,
        "latency_seconds": result.latency,
        **{name: 1000 * value for name, value in zip(_LATENCY, median_interval(result.latency), strict=True)},
        "latency_p95_ms": 1000 * float(np.quantile(result.latency, 0.95)),
    }
    # Pass by pass; none of them are missing, as a model that raises once is out.
    paired = median_ratio_interval(reference.latency, result.latency)
    fields |= dict(zip(("latency_speedup", "latency_speedup_low", "latency_speedup_high"), paired, strict=True))
    if memory:
        fields |= {"peak_memory_bytes": memory[0], "reserved_memory_bytes": memory[1]}
    if limit is not None:
        efficiency, low, high = median_ratio_interval(limit.rounds, result.rounds)
        fields |= {
            "free_seconds": limit.rounds,
            "free_speedup": median_ratio_interval(reference.rounds, limit.rounds)[0],
            "efficiency": efficiency,
            "efficiency_low": low,
            "efficiency_high": high,
        }
    return fields


def doubtful_speedups(results: list[SpeedResult]) -> list[str]:
    """A warning where speed-ups are known too badly to choose by."""
    doubtful = [result.name for result in results if result.speedup_high - result.speedup_low > 0.1 * result.speedup]
    if not doubtful:
        return []
    return [
        f"{len(doubtful)} of {len(results)} speed-ups are known to no better than ±5 % (as for {doubtful[0]}): "
        "too few rounds for so noisy a machine"
    ]
