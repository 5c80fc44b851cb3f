"""Which interval of a time and of a speed-up is honest and useful on a noisy machine.

`python benchmarks/noise/simulate.py` prints Markdown tables. A simulated measurement is rounds in which each of twelve
models has a turn of one pass, in random order, on a machine whose pace is known at every moment. So the typical pass
(the median one) during the measurement is known, and the speed-up of two of the models, which is 1.5.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from math import log, sqrt

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr
from scipy.stats import bootstrap, mstats, quantile_test
from scipy.stats import t as student

from tokbench.measure.speed import FEWEST_ROUNDS, SHARP_WIDTH
from tokbench.measure.stats import median_interval, typical, widest
from tokbench.running.timing import PATIENCE

MODELS, NOISE, SPEEDUP, BURST = 12, 0.03, 1.5, log(5)
Interval = tuple[float, float]


def quiet(moments: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The logarithm of the machine's pace at each moment; a moment is a share of the measurement. So all of these."""
    return np.zeros(moments.size)


def drift(moments: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """It slows down by a third, with a wave over it."""
    return 0.3 * moments + 0.05 * np.sin(2 * np.pi * (moments * generator.uniform(1, 4) + generator.uniform()))


def bursts(moments: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A fifth of the passes take five times as long."""
    return np.where(generator.random(moments.size) < 0.2, BURST, 0.0)


def long_bursts(moments: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The same share of the time, but each burst lasts a fortieth of the measurement on average."""
    return BURST * _switching(moments, generator, 0.1, 0.025)


def two_regimes(moments: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Half as slow again for a third of the time, a few times in a measurement."""
    return log(1.5) * _switching(moments, generator, 0.15, 0.075)


def slow_start(moments: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """2.5 times as slow at first, which fades within a tenth of the measurement."""
    return np.log(1 + 1.5 * np.exp(-moments / 0.05))


SCENARIOS = {
    "quiet": quiet, "drift": drift, "bursts": bursts, "long bursts": long_bursts, "two regimes": two_regimes,
    "slow start": slow_start,
}  # fmt: skip


def _switching(moments: np.ndarray, generator: np.random.Generator, off: float, on: float) -> np.ndarray:
    """0 and 1 in turns that last `off` and `on` on average, exponentially distributed."""
    lengths = generator.exponential([off, on], size=(200, 2)).ravel()
    begin_on = generator.random() < on / (on + off)
    ends = np.cumsum(lengths[1:] if begin_on else lengths)
    return (np.searchsorted(ends, moments) + begin_on) % 2.0


def measurement(
    scenario: str, rounds: int, generator: np.random.Generator, noise: float = NOISE
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(seconds of the unreduced model, of a cell, the pace at each turn): the first two have a value a round."""
    pace = SCENARIOS[scenario](np.arange(rounds * MODELS) / (rounds * MODELS), generator)
    turns = generator.permuted(np.tile(np.arange(MODELS), (rounds, 1)), axis=1) + MODELS * np.arange(rounds)[:, None]
    passes = noise * generator.standard_normal((2, rounds))
    unreduced, cell = (np.exp(pace[turns[:, own]] + passes[own]) for own in (0, 1))
    return SPEEDUP * unreduced, cell, pace


def typical_pass(scenario: str, pace: np.ndarray, noise: float = NOISE) -> float:
    """The seconds of the cell's median pass while the pace was this."""
    if scenario == "bursts":  # every pass has the same chance
        pace = np.repeat([0.0, BURST], [4, 1])
    middle = brentq(lambda at: ndtr((at - pace) / noise).mean() - 0.5, pace.min() - 1, pace.max() + 1)
    return float(np.exp(middle))


def rounds_made(unreduced: np.ndarray, cell: np.ndarray, usual: int) -> int:
    """How many of these rounds `measure_speed` makes: fewer than usual where all is sharp, more while it is vague."""
    done = FEWEST_ROUNDS
    for enough, times in {SHARP_WIDTH: 1, **PATIENCE}.items():
        end = times * usual
        while done < end:
            if widest([unreduced[:done], cell[:done]]) <= enough:
                return done
            done = min(end, done + max(1, done // 8))
    return done


def batch_means(values: np.ndarray, clipped: bool = False) -> Interval:
    """What tokbench printed before: Student's t on the medians of five consecutive batches."""
    middle = np.median(values)
    logs = np.array([np.median(batch) for batch in np.array_split(np.log(values / middle), 5)])
    reach = student.ppf(0.975, 4) * logs.std(ddof=1) / sqrt(5)
    low, high = middle * np.exp(-reach), middle * np.exp(reach)
    return (max(low, values.min()), min(high, values.max())) if clipped else (low, high)


def order_statistics(values: np.ndarray) -> Interval:
    found = quantile_test(values, q=0, p=0.5).confidence_interval(0.95)
    return found.low, found.high


def hettmansperger_sheather(values: np.ndarray) -> Interval:
    low, high = mstats.median_cihs(values, 0.05)
    return low, high


def trimmed(values: np.ndarray) -> Interval:
    low, high = np.exp(mstats.trimmed_mean_ci(np.log(values), limits=(0.25, 0.25), alpha=0.05))
    return max(low, values.min()), min(high, values.max())


def bootstrapped(values: np.ndarray) -> Interval:
    found = bootstrap((values,), np.median, n_resamples=399, method="percentile", rng=0).confidence_interval
    return found.low, found.high


CANDIDATES: dict[str, Callable[[np.ndarray], Interval]] = {
    "signs of neighbors (tokbench)": lambda values: median_interval(values.tolist())[1:],
    "batch means (before)": batch_means,
    "batch means, within what was seen": partial(batch_means, clipped=True),
    "order statistics (`quantile_test`)": order_statistics,
    "Hettmansperger-Sheather (`median_cihs`)": hettmansperger_sheather,
    "trimmed mean of logs (`trimmed_mean_ci`)": trimmed,
    "bootstrap of the median": bootstrapped,
}


def coverage(candidate: Callable[[np.ndarray], Interval], rounds: int, measurements: int) -> dict[str, list[float]]:
    """By scenario: coverage of the time and of the speed-up in percent, median width of each relative to its value."""
    found = {}
    for scenario in SCENARIOS:
        generator, rows = np.random.default_rng(0), []
        for _ in range(measurements):
            unreduced, cell, pace = measurement(scenario, rounds, generator)
            truth = typical_pass(scenario, pace)
            (low, high), (least, most) = candidate(cell), candidate(unreduced / cell)
            rows.append(
                [low <= truth <= high, least <= SPEEDUP <= most, (high - low) / truth, (most - least) / SPEEDUP]
            )
        covered, widths = np.mean(rows, axis=0)[:2] * 100, np.median(rows, axis=0)[2:]
        found[scenario] = [*covered, *widths]
    return found


def print_table(rounds: int, measurements: int, candidates: list[str]) -> None:
    """Per candidate and scenario: coverage of a time / of a speed-up, and its width in those of a quiet machine."""
    print(f"\n{rounds} rounds:\n\n| interval | width when quiet | {' | '.join(SCENARIOS)} |")
    print(f"|:---|---:|{'---:|' * len(SCENARIOS)}")
    for name in candidates:
        found = coverage(CANDIDATES[name], rounds, measurements)
        calm = found["quiet"][2:]
        texts = [
            f"{time:.0f} / {ratio:.0f} %, {wide / calm[0]:.1f} / {wide_ratio / calm[1]:.1f}×"
            for time, ratio, wide, wide_ratio in found.values()
        ]
        print(f"| {name} | ±{50 * calm[0]:.1f} / ±{50 * calm[1]:.1f} % | {' | '.join(texts)} |", flush=True)


def print_processes(measurements: int) -> None:
    """The interval over processes, whose own paces lie 5 % apart: coverage of a time, and its width."""
    print("\n| processes of 10 rounds | " + " | ".join(SCENARIOS) + " |")
    print(f"|---:|{'---:|' * len(SCENARIOS)}")
    for processes in (3, 5, 10):
        texts = []
        for scenario in SCENARIOS:
            generator, rows = np.random.default_rng(0), []
            for _ in range(measurements):
                samples, truths = [], []
                for pace in np.exp(0.05 * generator.standard_normal(processes)):
                    _, cell, machine = measurement(scenario, 10, generator)
                    samples.append((pace * cell).tolist())
                    truths.append(typical_pass(scenario, machine))
                _, low, high = typical(samples)
                rows.append([low <= np.exp(np.mean(np.log(truths))) <= high, high - low])
            covered, width = np.mean(rows, axis=0)[0], np.median(rows, axis=0)[1]
            texts.append(f"{100 * covered:.0f} %, ±{50 * width:.0f} %")
        print(f"| {processes} | {' | '.join(texts)} |", flush=True)


def print_stopping(measurements: int) -> None:
    """Coverage where the number of rounds depends on the intervals; their widths, and how many rounds there were."""
    print(f"\n| noise of a pass, usual rounds | {' | '.join(SCENARIOS)} |")
    print(f"|:---|{'---:|' * len(SCENARIOS)}")
    for noise, usual in itertools.product((0.003, 0.01, 0.03, 0.1), (14, 40)):
        texts = []
        for scenario in SCENARIOS:
            generator, rows = np.random.default_rng(0), []
            for _ in range(measurements):
                unreduced, cell, pace = measurement(scenario, max(PATIENCE.values()) * usual, generator, noise)
                done = rounds_made(unreduced, cell, usual)
                truth = typical_pass(scenario, pace[: done * MODELS], noise)
                _, low, high = median_interval(cell[:done])
                middle, least, most = median_interval(unreduced[:done] / cell[:done])
                rows.append([low <= truth <= high, least <= SPEEDUP <= most, (most - least) / 2 / middle, done])
            (time, ratio), (width, done) = np.mean(rows, axis=0)[:2], np.median(rows, axis=0)[2:]
            texts.append(f"{100 * time:.0f} / {100 * ratio:.0f} %, ±{100 * width:.1f} %, {done:.0f}")
        print(f"| {100 * noise:g} %, {usual} | {' | '.join(texts)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measurements", type=int, default=1000, help="simulated of each kind (1000)")
    asked = parser.parse_args()
    print_table(40, asked.measurements, list(CANDIDATES))
    for rounds in (8, 14, 100):
        print_table(rounds, asked.measurements, [next(iter(CANDIDATES))])
    print_stopping(asked.measurements)
    print_processes(asked.measurements)


if __name__ == "__main__":
    main()
