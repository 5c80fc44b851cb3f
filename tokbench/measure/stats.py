"""Intervals and tests for counts of correct images and for timing ratios. All intervals are two-sided."""

from __future__ import annotations

from collections.abc import Sequence
from math import atanh, exp, nan, sqrt, tanh
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import binomtest, norm
from scipy.stats import t as student

CONFIDENCE = 0.95
BATCHES = 5


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval, in [0, 1], of a proportion: `successes` out of `n` ≥ 1."""
    interval = binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: ArrayLike, *, resamples: int = 999, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of the finite ones of `values` (n,), with a 95 % interval that follows their skew.

    A studentized bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 12.5): divergences
    of a few images far above the rest's make the usual ±1.96 standard errors hold the mean 82 % of the time for 64
    images. Fewer than 10 values have Student's interval.
    """
    finite: NDArray[np.float64] = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    n, mean = finite.size, float(finite.mean())
    if n < 2 or np.ptp(finite) == 0:
        return mean, mean, mean
    error = float(finite.std(ddof=1)) / sqrt(n)
    if n < 10:
        reach = float(student.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
        return mean, mean - reach, mean + reach
    generator = np.random.default_rng(seed)
    scores = []
    for _ in range(resamples):
        draw = finite[generator.integers(n, size=n)]
        if own := float(draw.std(ddof=1)) / sqrt(n):
            scores.append((float(draw.mean()) - mean) / own)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(scores, [tail, 1 - tail])
    return mean, mean - float(high) * error, mean - float(low) * error


def correlation_interval(first: ArrayLike, second: ArrayLike) -> tuple[float, float, float]:
    """(r, low, high): Pearson's correlation of paired values (n,), n ≥ 2, neither constant, and its 95 % interval.

    By Fisher's transformation (Metron 1, 1921): atanh r ± 1.96 / √(n − 3). Fewer than four pairs tell nothing.
    """
    n = np.size(first)
    r = float(np.clip(np.corrcoef(np.stack([first, second]))[0, 1], -1, 1))
    if n < 4:
        return r, -1.0, 1.0
    if abs(r) == 1:
        return r, r, r
    reach = float(norm.ppf((1 + CONFIDENCE) / 2)) / sqrt(n - 3)
    return r, tanh(atanh(r) - reach), tanh(atanh(r) + reach)


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


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, low, high) of positive `values` (n,), n ≥ 1, in the order they were measured, with a 95 % interval.

    Neighbors in time are alike on a machine that drifts, so the interval is not told by how single values scatter but
    by how the medians of five consecutive batches do: Student's t on their logarithms (the method of batch means,
    Conway, Management Science 10, 1963). What drifts more slowly than all the measuring takes, it cannot know.
    One value tells nothing of itself: its interval is NaN.
    """
    middle = float(np.median(values))
    logs: NDArray[np.float64] = np.log(np.asarray(values, dtype=float) / middle)
    batches = np.array([np.median(batch) for batch in np.array_split(logs, min(BATCHES, logs.size))])
    if batches.size == 1:
        return middle, nan, nan
    reach = float(batch_quantile(batches.size) * batches.std(ddof=1) / sqrt(batches.size))
    return middle, middle * exp(-reach), middle * exp(reach)


def median_ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float, float]:
    """(median, low, high) of the ratios of paired positive measurements, with `median_interval`'s 95 % interval.

    What disturbs both of a pair (a hot CPU, a busy neighbor) cancels. Raises ValueError when the lengths differ or are
    zero.
    """
    if len(numerators) != len(denominators) or not len(numerators):
        raise ValueError(f"need as many numerators as denominators: {len(numerators)}, {len(denominators)}")
    return median_interval([above / below for above, below in zip(numerators, denominators, strict=True)])


def batch_quantile(batches: int = BATCHES) -> float:
    """Standard errors to either side in a 95 % interval from the scatter of so many batches."""
    return float(student.ppf((1 + CONFIDENCE) / 2, batches - 1))


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
