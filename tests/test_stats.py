"""Intervals and tests against published figures, closed forms and small simulations."""

from __future__ import annotations

from itertools import product
from math import sqrt

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import multinomial, norm, sem

from tokbench.measure.stats import (
    holm,
    mcnemar_p,
    mean_interval,
    median_interval,
    median_ratio_interval,
    paired_drop,
    rounds_needed,
    typical,
    wilson,
)

Z = 1.959963984540054
Outcomes = tuple[NDArray[np.bool_], NDArray[np.bool_]]


def outcomes(lost: int, gained: int, n: int) -> Outcomes:
    """Baseline and cell over n images, of which so many only one of them gets right; the rest both."""
    baseline, cell = np.ones(n, bool), np.ones(n, bool)
    cell[:lost] = False
    baseline[lost : lost + gained] = False
    return baseline, cell


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # The examples of Newcombe, Statistics in Medicine 17 (1998) 857, to the four digits given there.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_published(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))


def test_wilson_refuses_nonsense() -> None:
    with pytest.raises(ValueError):
        wilson(3, 2)
    with pytest.raises(ValueError):
        wilson(0, 0)


def test_drop_is_in_points_and_signed() -> None:
    assert paired_drop(*outcomes(12, 2, 50))[0] == pytest.approx(20)
    assert paired_drop(*outcomes(2, 12, 50))[0] == pytest.approx(-20)
    assert paired_drop([True, False, 1, 1], [False, True, 0, 1])[0] == pytest.approx(25)


def test_drop_interval_when_nothing_changes() -> None:
    # Closed form: with no discordant image the score limits are ±z²/(n + z²).
    for n in (1, 10, 1000, 1_000_000):
        limit = 100 * Z**2 / (n + Z**2)
        assert paired_drop(*outcomes(0, 0, n)) == (0, pytest.approx(-limit), pytest.approx(limit))


def constrained_score(lost: int, gained: int, n: int, delta: float) -> float:
    """The score statistic at a true difference, with the nuisance share found by brute force."""
    floor = max(0.0, -delta)
    shares = np.linspace(floor, (1 - delta) / 2, 400_001)[1:-1]
    rest = n - lost - gained
    likelihood = lost * np.log(shares + delta) + gained * np.log(shares)
    share = shares[(likelihood + rest * np.log1p(-2 * shares - delta)).argmax()]
    return float((lost - gained - n * delta) / sqrt(n * (2 * share + delta - delta**2)))


@pytest.mark.parametrize(("lost", "gained", "n"), [(12, 2, 50), (3, 4, 100), (1, 6, 9), (40, 25, 1000)])
def test_drop_limits_solve_the_score_equation(lost: int, gained: int, n: int) -> None:
    _, low, high = paired_drop(*outcomes(lost, gained, n))
    assert constrained_score(lost, gained, n, low / 100) == pytest.approx(Z, abs=1e-3)
    assert constrained_score(lost, gained, n, high / 100) == pytest.approx(-Z, abs=1e-3)


def test_drop_of_every_small_table() -> None:
    for n in range(1, 13):
        for lost in range(n + 1):
            for gained in range(n + 1 - lost):
                drop, low, high = paired_drop(*outcomes(lost, gained, n))
                assert -100 <= low <= drop <= high <= 100
                assert low < high
                mirrored = paired_drop(*outcomes(gained, lost, n))
                assert mirrored == (pytest.approx(-drop), pytest.approx(-high), pytest.approx(-low))
                rejected = (lost - gained) ** 2 > Z**2 * (lost + gained)
                assert (low > 0 or high < 0) == rejected


def test_drop_interval_narrows_with_images_and_nears_walds() -> None:
    lost, gained, n = 900, 600, 50_000
    drop, low, high = paired_drop(*outcomes(lost, gained, n))
    wald = Z * sqrt(lost + gained - (lost - gained) ** 2 / n) / n
    assert (low, high) == pytest.approx((drop - 100 * wald, drop + 100 * wald), rel=0.01)


@pytest.mark.parametrize(("lost", "gained"), [(0.02, 0.02), (0.03, 0.01), (0.12, 0.06)])
def test_drop_interval_covers(lost: float, gained: float) -> None:
    n, covered = 100, 0.0
    chances = multinomial(n, [lost, gained, 1 - lost - gained])
    for more, less in product(range(26), range(18)):
        chance = chances.pmf([more, less, n - more - less])
        if chance > 1e-5:
            _, low, high = paired_drop(*outcomes(more, less, n))
            covered += chance * (low <= 100 * (lost - gained) <= high)
    assert 0.93 < covered < 0.98


def test_pairs_must_match() -> None:
    for before, after in ([[True], [True, False]], [[], []], [[[True]], [[True]]]):
        with pytest.raises(ValueError, match="two equally long lists"):
            paired_drop(before, after)
        with pytest.raises(ValueError, match="two equally long lists"):
            mcnemar_p(before, after)


def test_mcnemar_is_the_exact_binomial_test() -> None:
    assert mcnemar_p(*outcomes(0, 0, 10)) == 1
    assert mcnemar_p(*outcomes(3, 3, 10)) == pytest.approx(1)
    assert mcnemar_p(*outcomes(5, 0, 10)) == pytest.approx(2 * 0.5**5)
    assert mcnemar_p(*outcomes(2, 12, 50)) == pytest.approx(2 * (1 + 14 + 91) / 2**14)
    assert mcnemar_p(*outcomes(12, 2, 50)) == mcnemar_p(*outcomes(2, 12, 5000))


def test_mcnemar_p_is_uniform_where_nothing_changed() -> None:
    generator = np.random.default_rng(5)
    before, after = (np.ones(5000, bool) for _ in range(2))
    p_values = []
    for _ in range(1000):
        # Of 400 images whose answer changed, each is lost or gained by a fair throw.
        lost = generator.random(400) < 0.5
        before[:400], after[:400] = lost, ~lost
        p_values.append(mcnemar_p(before, after))
    for level in (0.05, 0.1, 0.25, 0.5, 0.75):
        share = np.mean(np.array(p_values) <= level)
        # Counts are whole, so that an exact test stays a little below its level; three standard errors above.
        assert level - 0.08 < share < level + 3 * np.sqrt(level * (1 - level) / 1000)


def test_one_sided_mcnemar_sees_losses_only() -> None:
    assert mcnemar_p(*outcomes(5, 0, 10), "greater") == pytest.approx(0.5**5)
    assert mcnemar_p(*outcomes(0, 5, 10), "greater") == 1
    assert mcnemar_p(*outcomes(0, 0, 10), "greater") == 1
    assert mcnemar_p(*outcomes(12, 2, 50), "greater") == pytest.approx((1 + 14 + 91) / 2**14)


@pytest.mark.parametrize(
    ("raw", "adjusted"),
    [
        # By hand: in rising order, times m, m − 1, …, 1, and never falling.
        ([0.01, 0.02, 0.03, 0.04, 0.05], [0.05, 0.08, 0.09, 0.09, 0.09]),
        ([0.04, 0.001, 0.03], [0.06, 0.003, 0.06]),
        ([0.6, 0.5], [1, 1]),
        ([0.02], [0.02]),
        ([], []),
    ],
)
def test_holm(raw: list[float], adjusted: list[float]) -> None:
    assert holm(raw) == pytest.approx(adjusted)


def test_holm_rarely_raises_a_false_alarm() -> None:
    generator = np.random.default_rng(3)
    alarms = sum(min(holm(generator.uniform(size=17).tolist())) < 0.05 for _ in range(2000))
    assert 0.03 < alarms / 2000 < 0.065


def test_median_ratio_is_of_pairs() -> None:
    # Every round the machine is another time slower, and the ratio always 2.
    slower = [1.0, 5.0, 3.0, 10.0, 2.0, 4.0, 8.0, 7.0]
    assert median_ratio_interval([2 * value for value in slower], slower) == (2, 2, 2)


@pytest.mark.parametrize("rounds", [8, 14, 40])
def test_median_ratio_interval_covers(rounds: int) -> None:
    generator = np.random.default_rng(2)
    hits = 0
    for _ in range(600):
        above, below = generator.lognormal(sigma=0.1, size=(2, rounds))
        middle, low, high = median_ratio_interval(1.5 * above, below)
        assert low <= middle <= high
        hits += low <= 1.5 <= high
    assert 0.92 < hits / 600 < 0.98


def test_median_interval_is_honest_and_useful_on_a_noisy_machine() -> None:
    # More, and what else there might be, is in benchmarks/noise.
    generator = np.random.default_rng(5)
    drift = np.linspace(0, 0.3, 40)
    found = {}
    for name, pace in (("quiet", 0 * drift), ("drift", drift), ("bursts", 0 * drift)):
        hits, widths = 0, []
        for _ in range(400):
            logs = pace + 0.03 * generator.standard_normal(40)
            if name == "bursts":
                logs += np.where(generator.random(40) < 0.2, np.log(5), 0)
            _, low, high = median_interval(np.exp(logs))
            # The median of what may take five times as long in a fifth of the cases is the 62.5th percentile of it.
            hits += low <= np.exp(np.median(pace) + (name == "bursts") * 0.03 * 0.3186) <= high
            widths.append(high / low - 1)
        found[name] = hits / 400, np.median(widths)
    assert all(0.9 <= covered <= 0.98 for covered, _ in found.values()), found
    assert found["bursts"][1] < 3 * found["quiet"][1]


def test_median_interval_of_known_values() -> None:
    # By hand: neighbors are on different sides seven times, 1.96 √(7 / 2 / 8 / 7) = 0.49; sorted they are once, 0.185.
    assert median_interval([1, 8, 2, 7, 3, 6, 4, 5]) == (4.5, 1, 8)
    assert median_interval([1, 2, 3, 4, 5, 6, 7, 8]) == pytest.approx((4.5, 3.018, 5.982), abs=1e-3)
    assert median_interval([7.0] * 9) == (7, 7, 7)
    middle, low, high = median_interval([7.0, 6.0, 7.0, 8.0, 9.0])
    assert middle == 7 and np.isnan(low) and np.isnan(high)


def test_over_processes_the_interval_is_of_their_medians() -> None:
    one = [1.0, 9.0, 2.0, 3.0, 2.0, 2.0, 4.0, 1.0]
    assert typical([one]) == median_interval(one)
    # By hand: logarithms 0, 1 and 2 deviate by 1, and t of 2 is 4.3027.
    samples = [[1.0] * 3, [np.exp(1)] * 3, [np.exp(2)] * 3]
    reach = 4.3027 / 3**0.5
    wide = [[1e-9, *own, 1e9] for own in samples]
    assert typical(wide) == pytest.approx((np.exp(1), np.exp(1 - reach), np.exp(1 + reach)), rel=1e-4)
    assert typical(samples) == pytest.approx((np.exp(1), 1, np.exp(2)))  # no more than was seen


def test_rounds_needed_are_those_with_a_narrow_interval() -> None:
    generator = np.random.default_rng(4)
    values = generator.lognormal(sigma=0.2, size=30)
    needed = rounds_needed(values, 0.03)
    widths = [
        high - low for _, low, high in (median_interval(generator.lognormal(sigma=0.2, size=needed)) for _ in range(50))
    ]
    assert np.median(widths) / 2 == pytest.approx(0.03, rel=0.5)
    assert rounds_needed([1.0] * 8, 0.05) == 8


def test_median_ratio_needs_pairs() -> None:
    for pair in ([[1.0], []], [[], []]):
        with pytest.raises(ValueError, match="as many numerators as denominators"):
            median_ratio_interval(*pair)


@pytest.mark.parametrize(("n", "at_least"), [(64, 0.9), (400, 0.93)])
def test_mean_interval_covers_in_spite_of_skew(n: int, at_least: float) -> None:
    # The divergences of a real run have a skewness of 2 to 10; the usual interval covers 0.86 here for n = 64.
    generator = np.random.default_rng(6)
    hits, simulations = 0, 200
    for _ in range(simulations):
        mean, low, high = mean_interval(generator.gamma(0.15, size=n), resamples=199)
        assert low < mean < high
        hits += low <= 0.15 <= high
    assert at_least < hits / simulations < 0.98


def test_mean_interval_nears_the_normal_one_and_leaves_out_what_is_not_finite() -> None:
    values = np.random.default_rng(0).normal(5, 1, size=4000)
    low, high = norm.interval(0.95, values.mean(), sem(values))
    assert mean_interval([*values, np.nan, np.inf]) == pytest.approx((values.mean(), low, high), abs=0.004)
    assert mean_interval(values) == mean_interval(values) != mean_interval(values, seed=1)


def test_mean_interval_of_few_or_equal_values() -> None:
    assert mean_interval([2.0]) == mean_interval([2.0] * 50) == (2, 2, 2)
    # Student's, by the table: 12.706 for one degree of freedom.
    assert mean_interval([1.0, 3.0]) == (2, pytest.approx(2 - 12.706, abs=1e-3), pytest.approx(2 + 12.706, abs=1e-3))
    # Nearly all zeros: some resamples have no spread, and say nothing.
    assert all(np.isfinite(mean_interval([0.0] * 30 + [1.0])))
