"""The figures of records and their intervals, computed from measurements."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import ceil, inf, isnan
from typing import Any

import numpy as np

from tokbench.measure.flops import FlopCount
from tokbench.measure.speed import VAGUE_WIDTH, SpeedResult
from tokbench.measure.stats import (
    correlation_interval,
    mcnemar_p,
    mean_interval,
    paired_drop,
    ratios,
    rounds_needed,
    typical,
    wilson,
)
from tokbench.results.metrics import ends_of
from tokbench.results.predictions import Predictions


def accuracy_fields(predictions: Predictions, baseline: Predictions) -> dict[str, Any]:
    """The accuracy part of a record: counts, fractions and their intervals, against the unreduced model's.

    Accuracy is over the images with a label. Without labels there are only comparisons of the two models; without
    classes, only of their features or their one output.
    """
    fields: dict[str, Any] = {"images": len(predictions.label), "nonfinite": predictions.nonfinite()}
    if predictions.labeled and predictions.classifies:
        known = predictions.with_label()
        right, right_before = known.correct, baseline.with_label().correct
        correct5 = int(known.top5.sum())
        if unlabelled := len(predictions.label) - len(known.label):
            fields["unlabelled"] = unlabelled
        fields |= {"correct": int(right.sum()), "correct5": correct5}
        fields |= _with_ends("top1", predictions.top1(), *wilson(int(right.sum()), len(right)))
        fields |= _with_ends("top5", predictions.top5_accuracy(), *wilson(correct5, len(right)))
        fields |= _with_ends("drop", *paired_drop(right_before, right))
        fields["mcnemar_p"] = mcnemar_p(right_before, right)
    if predictions.classifies:
        agree = (predictions.predicted == baseline.predicted) & (baseline.predicted >= 0)
        fields |= _with_ends("agreement", float(np.mean(agree)), *wilson(int(agree.sum()), len(agree)))
    asked = (predictions.neighbor > -2) & (baseline.neighbor > -2)
    if asked.any():
        right, right_before = (own.neighbor[asked] == own.label[asked] for own in (predictions, baseline))
        fields |= _with_ends("knn_top1", float(right.mean()), *wilson(int(right.sum()), len(right)))
        fields |= _with_ends("knn_drop", *paired_drop(right_before, right)) | {"knn_images": len(right)}
    for name, interval in output_shift(predictions, baseline).items():
        fields |= _with_ends(name, *interval)
    distances = (("kl", predictions.divergence, 0, inf), ("similarity", predictions.similarity, -1, 1))
    for name, values, least, most in distances:
        if np.isfinite(values).any():
            mean, low, high = mean_interval(values)
            # The range of the mean; rounding may put it slightly outside.
            fields |= _with_ends(name, mean, max(low, min(mean, least)), min(high, max(mean, most)))
    return fields


def _with_ends(name: str, value: float, low: float, high: float) -> dict[str, float]:
    """A figure and the ends of its interval, where it has one, under the names that records have."""
    return {name: value} | ({} if isnan(low) else dict(zip(ends_of(name), (low, high), strict=True)))


def output_shift(outputs: Predictions, unreduced: Predictions) -> dict[str, tuple[float, float, float]]:
    """How far a model of one output moved from the unreduced one on the same images: {name: (value, low, high)}.

    "output_shift": mean absolute difference over the standard deviation of the unreduced model's outputs.
    "output_correlation": Pearson's. 95 % intervals. Empty where fewer than two images have both outputs, or the
    unreduced model answers all alike; no correlation where only the other does.
    """
    both = np.isfinite(outputs.output) & np.isfinite(unreduced.output)
    now, before = outputs.output[both].astype(float), unreduced.output[both].astype(float)
    if now.size < 2 or not (spread := float(before.std(ddof=1))):
        return {}
    mean, low, high = mean_interval(np.abs(now - before) / spread)
    found = {"output_shift": (mean, max(low, 0.0), high)}
    return found | {"output_correlation": correlation_interval(now, before)} if np.ptp(now) else found


def at_chance_level(baseline: Predictions, num_classes: int) -> bool:
    """Whether a model is no better than guessing among the classes present."""
    if not (baseline.labeled and baseline.classifies):
        return False
    known = baseline.with_label()
    present = len(np.unique(known.label))
    chance = 1 / (present if present > 1 else max(num_classes, 2))
    low, _ = wilson(int(known.correct.sum()), len(known.label))
    # With few images the interval is wide, but a model far above chance must pass.
    return low <= chance and baseline.top1() <= 2 * chance


def flops_fields(count: FlopCount, limit: FlopCount, unreduced: int) -> dict[str, Any]:
    """The FLOPs part of a record. The FLOPs without the method's own work are those of its speed limit."""
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
        **({"flops_spread": count.spread} if count.spread else {}),
    }


def speed_fields(
    results: Sequence[SpeedResult],
    *,
    references: Sequence[SpeedResult],
    limits: Sequence[SpeedResult] = (),
    eager: Sequence[SpeedResult] = (),
    memory: tuple[int, int] | None = None,
    answers: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """The speed part of a record: every timing, and what follows from them.

    results: of each process. references: the unreduced model in the same runtime and rounds. limits: the cell's own
    `free` there, if it has one. eager: the unreduced model in eager PyTorch in the same rounds, where the runtime is
    another. memory: peak bytes, allocated and reserved. answers: of how many images the answer is eager PyTorch's, and
    of how many it was asked.
    """
    rounds, latencies = [own.rounds for own in results], [own.latency for own in results]
    pace, quick, slow = typical(rounds)
    size, below = results[0].batch_size, [own.rounds for own in references]
    fields = {
        "batch_size": size,
        "processes": len(results),
        "seconds": by_process(rounds),
        "iterations": results[0].iterations,
        **_with_ends("throughput", size / pace, size / slow, size / quick),
        **_with_ends("speedup", *typical([*map(ratios, below, rounds)])),
        "latency_seconds": by_process(latencies),
        **_with_ends("latency_ms", *typical([[1000 * value for value in own] for own in latencies])),
        "latency_p95_ms": 1000 * float(np.quantile(np.concatenate(latencies), 0.95)),
    }
    # Pass by pass; none of them are missing, as a model that raises once is out.
    fields |= _with_ends("latency_speedup", *typical([*map(ratios, (own.latency for own in references), latencies)]))
    if eager:
        paces = [*map(ratios, (own.rounds for own in eager), below)]
        fields |= _with_ends("runtime_speedup", *typical(paces))
    if answers:
        same, asked = answers
        fields |= _with_ends("same_answers", same / asked, *wilson(same, asked)) | {"compared_images": asked}
    if memory:
        fields |= {"peak_memory_bytes": memory[0], "reserved_memory_bytes": memory[1]}
    if limits:
        free = [own.rounds for own in limits]
        fields |= {
            "free_seconds": by_process(free),
            "free_speedup": typical([*map(ratios, below, free)])[0],
            **_with_ends("efficiency", *typical([*map(ratios, free, rounds)])),
        }
    return fields


def by_process(samples: list[list[float]]) -> list[float] | list[list[float]]:
    """Samples as in a record: a plain list if there was one process."""
    return samples[0] if len(samples) == 1 else samples


VAGUE = f"the speed-up is known to no better than ±{VAGUE_WIDTH:.0%}".replace("%", " %")


def vague_speedups(fields: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The names of cells whose speed-up is too vague to choose by, or has no interval."""
    ends = {name: (own.get("speedup_low", 0.0), own.get("speedup_high", inf)) for name, own in fields.items()}
    return [name for name, (low, high) in ends.items() if high - low > 2 * VAGUE_WIDTH * fields[name]["speedup"]]


def vague_sentence(vague: Mapping[str, int], count: int, done: int, seconds: float, unit: str) -> str:
    """A warning about vague ones among `count` speed-ups, with how long it would take to know them better.

    vague: by name, how many rounds (or processes) would do. done, seconds: how many there were, and how long they took.
    unit: "rounds" or "processes".
    """
    names, needed = list(vague), max(vague.values())
    told = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
    text = f"{len(vague)} of {count} speed-ups are known to no better than ±5 % ({told}): "
    if needed > 20 * done:
        return f"{text}measure again on a quieter machine"
    more = max(1, round(seconds * (needed / done - 1)))
    return f"{text}about {more:,} seconds more would do, in a new run with --{unit} {needed}"


def needed_for_speedup(
    fields: Mapping[str, Any], results: Sequence[SpeedResult], references: Sequence[SpeedResult]
) -> int:
    """About how many rounds like these (or processes, if there were several) would give it no caveat."""
    if len(results) == 1:
        return rounds_needed(ratios(references[0].rounds, results[0].rounds), VAGUE_WIDTH)
    half = (fields["speedup_high"] - fields["speedup_low"]) / 2 / fields["speedup"]
    return ceil(len(results) * (half / VAGUE_WIDTH) ** 2)
