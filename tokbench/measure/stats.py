"""Confidence intervals and tests for accuracy and for timing ratios. All intervals are two-sided."""

from __future__ import annotations

from collections.abc import Sequence
from math import atanh, ceil, exp, nan, sqrt, tanh
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import binomtest, norm
from scipy.stats import t as student

CONFIDENCE = 0.95
# With fewer, the signs of neighbors are too few to tell a drift: the interval would cover too often, or not enough.
FEWEST_VALUES = 8
_TWO_SIDED = float(norm.ppf((1 + CONFIDENCE) / 2))


def wilson(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval, in [0, 1], of the proportion `successes` / `n`, n ≥ 1."""
    interval = binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: ArrayLike, *, resamples: int = 999, seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high) of the finite `values` (n,), with a 95 % interval that follows their skew.

    A studentized bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 12.5), because a few
    images with a divergence far above the rest make the usual ±1.96 standard errors too narrow. Fewer than 10 values
    get Student's interval.
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
    reach = _TWO_SIDED / sqrt(n - 3)
    return r, tanh(atanh(r) - reach), tanh(atanh(r) + reach)


def paired_drop(baseline_correct: ArrayLike, cell_correct: ArrayLike) -> tuple[float, float, float]:
    """(drop, low, high) in points: the baseline's accuracy minus the cell's, with a 95 % interval.

    Both arguments are bool (n,), whether each image is right, in the same order; a gain is negative. The interval is
    Tango's score interval for paired proportions (Statistics in Medicine 17, 1998). It keeps its coverage when few
    images change, and excludes zero exactly when McNemar's chi-squared test rejects at 5 % (the exact test of
    `mcnemar_p` is slightly stricter). Raises ValueError if the lengths differ or are zero.

    `running.figures` records it, and the row "drop" of `results.metrics` shows it; `check` calls it between two runs.
    """
    lost, gained, n = _discordant(baseline_correct, cell_correct)
    low = _score_limit(lost, gained, n)
    high = -_score_limit(gained, lost, n)
    return 100 * (lost - gained) / n, 100 * low, 100 * high


def mcnemar_p(
    baseline_correct: ArrayLike, cell_correct: ArrayLike, alternative: Literal["two-sided", "greater"] = "two-sided"
) -> float:
    """p value of McNemar's exact test that both are right equally often; arguments as in `paired_drop`.

    alternative "greater" is one-sided: p is small only if the baseline is right more often.
    """
    lost, gained, _ = _discordant(baseline_correct, cell_correct)
    return float(binomtest(lost, lost + gained, alternative=alternative).pvalue) if lost + gained else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for multiple tests, in the order given.

    Holm's step-down procedure (Scandinavian Journal of Statistics 6, 1979): it bounds the family-wise error rate for
    any dependence between the tests, and is never weaker than Bonferroni's correction.
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, (len(p_values) - rank) * p_values[place])
        adjusted[place] = min(1.0, largest)
    return adjusted


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, low, high) of positive `values` (n,), n ≥ 1, in the order measured, with a 95 % interval.

    The interval of the typical value *during this measurement*, from the signs of the values around their median: how
    many lie below it varies with a variance of half the number of times that neighbors in time are on different sides
    (n / 4 where they know nothing of each other; von Neumann's mean square successive difference, Annals of
    Mathematical Statistics 12, 1941), and the ends are the quantiles that far from the middle. So neither bursts nor
    drift make it useless, and it never ends beyond what was seen. Fewer than `FEWEST_VALUES` have no interval: NaN.
    """
    seen: NDArray[np.float64] = np.asarray(values, dtype=float)
    ordered, n = np.sort(seen), seen.size
    middle = float(ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    if n < FEWEST_VALUES:
        return middle, nan, nan
    changes = np.count_nonzero(np.diff(seen > middle))
    reach = _TWO_SIDED * sqrt(changes / 2 / n / (n - 1))
    # Hazen's quantiles, as NumPy's, which takes ten times as long.
    low, high = np.interp(n * np.array([0.5 - reach, 0.5 + reach]) - 0.5, np.arange(n), ordered)
    return middle, float(low), float(high)


def median_ratio_interval(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float, float]:
    """(median, low, high) of the ratios of paired positive measurements, with the interval of `median_interval`.

    Disturbances of both values of a pair (a hot CPU, other load) cancel. Raises ValueError if the lengths differ or
    are zero.
    """
    return median_interval(ratios(numerators, denominators))


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Of paired measurements. Raises ValueError if the lengths differ or are zero."""
    if len(numerators) != len(denominators) or not len(numerators):
        raise ValueError(f"need as many numerators as denominators: {len(numerators)}, {len(denominators)}")
    return [above / below for above, below in zip(numerators, denominators, strict=True)]


def typical(samples: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """(typical value, low, high) of the positive values that each of several processes measured, in their order.

    Of one process, see `median_interval`. Of several, the geometric mean of their medians, with Student's interval on
    the logarithms: processes are independent, and few. It does not end beyond what was seen.
    """
    if len(samples) == 1:
        return median_interval(samples[0])
    logs: NDArray[np.float64] = np.log([np.median(values) for values in samples])
    middle, n = float(logs.mean()), logs.size
    reach = float(student.ppf((1 + CONFIDENCE) / 2, n - 1) * logs.std(ddof=1)) / sqrt(n)
    least, most = min(map(min, samples)), max(map(max, samples))
    return exp(middle), max(exp(middle - reach), least), min(exp(middle + reach), most)


def widest(timings: Sequence[Sequence[float]]) -> float:
    """The largest half-width of an interval, relative to its value, of a model's time or of a speed-up over the first.

    timings: of each model, in the same rounds, at least `FEWEST_VALUES`.
    """
    samples = [*timings, *(ratios(timings[0], own) for own in timings[1:])]
    return max((high - low) / 2 / middle for middle, low, high in map(median_interval, samples))


def rounds_needed(values: Sequence[float], width: float) -> int:
    """About how many values like these give `median_interval` a half-width of `width`, relative to the median.

    The nearer to the middle two quantiles of what was seen have to be, the more values it takes.
    """
    seen: NDArray[np.float64] = np.asarray(values, dtype=float)
    middle, shares = float(np.median(seen)), np.linspace(0.5, 0, 101)[:-1]
    low, high = np.quantile(seen, [0.5 - shares, 0.5 + shares], method="hazen")
    narrow = shares[(high - low) / 2 <= width * middle]
    reach = float(narrow[0]) if narrow.size else float(shares[-1])
    return max(FEWEST_VALUES, ceil((_TWO_SIDED / 2 / reach) ** 2))


def _discordant(baseline_correct: ArrayLike, cell_correct: ArrayLike) -> tuple[int, int, int]:
    """(images only the baseline gets right, images only the cell gets right, images)."""
    before: NDArray[np.bool_] = np.asarray(baseline_correct, dtype=bool)
    after: NDArray[np.bool_] = np.asarray(cell_correct, dtype=bool)
    if before.shape != after.shape or before.ndim != 1 or not before.size:
        raise ValueError(f"need two equally long lists of images: {before.shape}, {after.shape}")
    return int((before & ~after).sum()), int((after & ~before).sum()), before.size


def _score_limit(more: int, less: int, n: int) -> float:
    """Lower limit of the score interval for the difference (more − less) / n of paired proportions."""
    z = _TWO_SIDED
    observed = (more - less) / n

    def excess(delta: float) -> float:
        """How far the data exceed what a true difference `delta` allows."""
        # The maximum-likelihood estimate, given that difference, of the proportion of the images in `less`.
        linear = (2 * n - more + less) * delta - more - less
        share = (sqrt(max(linear**2 + 8 * n * less * delta * (1 - delta), 0.0)) - linear) / (4 * n)
        return more - less - n * delta - z * sqrt(max(n * (2 * share + delta * (1 - delta)), 0.0))

    if observed == -1:
        return -1.0
    # Search just below the observed difference: at it, zero variance may give a root that is not the limit.
    return float(brentq(excess, -1.0, observed - 1e-9, xtol=1e-12))
