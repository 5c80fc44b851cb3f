"""Intervals and tests for counts of correct images and for timing ratios. All intervals are two-sided."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import binomtest, norm, quantile_test

CONFIDENCE = 0.95


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval, in [0, 1], of a proportion: `successes` out of `n` ≥ 1."""
    interval = binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: ArrayLike) -> tuple[float, float, float]:
    """(mean, low, high) of the finite ones of `values` (n,), with a 95 % interval from their standard error."""
    finite: NDArray[np.float64] = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    mean = float(finite.mean())
    reach = float(norm.ppf((1 + CONFIDENCE) / 2) * finite.std(ddof=1) / sqrt(finite.size)) if finite.size > 1 else 0.0
    return mean, mean - reach, mean + reach


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, low, high) of `values` (n,), n ≥ 1, with a 95 % interval that assumes nothing of their distribution.

    Its ends are order statistics, found by the sign test (scipy's `quantile_test`). Fewer than six values have no
    such interval: their extremes are given, which hold the median of a population 94 % of the time for five.
    """
    interval = quantile_test(values, p=0.5).confidence_interval(CONFIDENCE)
    low, high = (
        float(bound if np.isfinite(bound) else extreme)
        for bound, extreme in zip(interval, (min(values), max(values)), strict=True)
    )
    return float(np.median(values)), low, high


def paired_drop(baseline_correct: ArrayLike, cell_correct: ArrayLike) -> tuple[float, float, float]:
    """(drop, low, high) in points: how much less often the cell is right than the baseline on its images.

    Both arguments are bool (n,), image by image in the same order; a gain is negative. The interval is
    Tango's score interval for paired proportions (Statistics in Medicine 17, 1998) at 95 %: it keeps its
    coverage when few images change, and leaves out zero just when McNemar's chi-squared test rejects at 5 %
    (the exact test of `mcnemar_p` is a little stricter). Raises ValueError when lengths differ or are zero.
    """
    lost, gained, n = _discordant(baseline_correct, cell_correct)
    low = _score_limit(lost, gained, n)
    high = -_score_limit(gained, lost, n)
    return 100 * (lost - gained) / n, 100 * low, 100 * high


def mcnemar_p(
    baseline_correct: ArrayLike, cell_correct: ArrayLike, alternative: Literal["two-sided", "greater"] = "two-sided"
) -> float:
    """p value of McNemar's exact test that both are right equally often; see `paired_drop`.

    alternative "greater": one-sided, small where the baseline is right more often; a gain is then no evidence.
    """
    lost, gained, _ = _discordant(baseline_correct, cell_correct)
    return float(binomtest(lost, lost + gained, alternative=alternative).pvalue) if lost + gained else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for their number, in the order given: compare each with the level meant for all together.

    Holm's step-down procedure (Scandinavian Journal of Statistics 6, 1979): the chance of any false alarm stays below
    that level however the tests depend on each other, and no test gains less than by Bonferroni's correction.
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, (len(p_values) - rank) * p_values[place])
        adjusted[place] = min(1.0, largest)
    return adjusted


def median_ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], *, resamples: int = 5000, seed: int = 0
) -> tuple[float, float, float]:
    """(median, low, high) of the ratios of paired positive measurements, with a 95 % percentile bootstrap.

    Pairs are resampled, never their halves, so what disturbed both (a hot CPU, a busy neighbor) cancels.
    Raises ValueError when the lengths differ or are zero.
    """
    if len(numerators) != len(denominators) or not len(numerators):
        raise ValueError(f"need as many numerators as denominators: {len(numerators)}, {len(denominators)}")
    ratios = np.asarray(numerators, dtype=float) / np.asarray(denominators, dtype=float)
    draws = np.random.default_rng(seed).integers(len(ratios), size=(resamples, len(ratios)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.median(ratios[draws], axis=1), [tail, 1 - tail])
    return float(np.median(ratios)), float(low), float(high)


def _discordant(baseline_correct: ArrayLike, cell_correct: ArrayLike) -> tuple[int, int, int]:
    """(images only the baseline gets right, images only the cell gets right, images)."""
    before: NDArray[np.bool_] = np.asarray(baseline_correct, dtype=bool)
    after: NDArray[np.bool_] = np.asarray(cell_correct, dtype=bool)
    if before.shape != after.shape or before.ndim != 1 or not before.size:
        raise ValueError(f"need two equally long lists of images: {before.shape}, {after.shape}")
    return int((before & ~after).sum()), int((after & ~before).sum()), before.size


def _score_limit(more: int, less: int, n: int) -> float:
    """Lower limit of the score interval for the difference (more − less) / n of paired proportions."""
    z = float(norm.ppf((1 + CONFIDENCE) / 2))
    observed = (more - less) / n

    def excess(delta: float) -> float:
        """How far the data lie above what a true difference `delta` allows."""
        # The likelihood's maximum under that difference gives the share of images of the smaller kind.
        linear = (2 * n - more + less) * delta - more - less
        share = (sqrt(max(linear**2 + 8 * n * less * delta * (1 - delta), 0.0)) - linear) / (4 * n)
        return more - less - n * delta - z * sqrt(max(n * (2 * share + delta * (1 - delta)), 0.0))

    if observed == -1:
        return -1.0
    # Just below the observed difference, because at it the variance may be zero, and a root that is no limit.
    return float(brentq(excess, -1.0, observed - 1e-9, xtol=1e-12))
