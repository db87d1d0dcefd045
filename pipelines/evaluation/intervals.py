"""How sure a number is: bootstrap intervals, paired differences, McNemar's test.

Owns resampling and its seeds: equal values give equal intervals.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
MIN_RESAMPLES = 200
# rows x resamples: more rows are drawn less often, as their intervals are narrow
MAX_DRAWS = 40_000_000
CHUNK_DRAWS = 2_000_000
CONFIDENCE = 0.95
NORMAL = NormalDist()

Floats = npt.NDArray[np.float64]
# [resamples, rows] how often each row was drawn -> [resamples, ...]
Weighted = Callable[[Floats], Floats]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value with its interval, over `rows` rows. NaN where there are none."""

    value: float
    low: float
    high: float
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far one set of answers is above another; `p_value` is that of no difference.

    For values of 0 and 1 it is McNemar's, and `only_first` and `only_second` count the rows that
    one alone has right.
    """

    value: float
    low: float
    high: float
    p_value: float
    rows: int
    only_first: int | None = None
    only_second: int | None = None


def num_resamples(num_rows: int, wanted: int = RESAMPLES) -> int:
    return max(min(wanted, MAX_DRAWS // max(num_rows, 1)), min(wanted, MIN_RESAMPLES))


def resample(
    statistic: Weighted, num_rows: int, rng: np.random.Generator, wanted: int = RESAMPLES
) -> Floats:
    """The statistic of resamples of the rows, drawn with replacement: [resamples, ...]."""
    return np.concatenate(
        [statistic(weights) for weights in _weights(num_rows, num_resamples(num_rows, wanted), rng)]
    )


def mean_estimate(
    values: Floats, rng: np.random.Generator, confidence: float = CONFIDENCE
) -> Estimate:
    """The mean of the values that are not NaN, with its BCa interval.

    Where all values are 0, or all are 1, resampling cannot tell how sure that is: then the exact
    binomial bound of Clopper and Pearson is taken.
    """
    values = values[~np.isnan(values)]
    if not len(values):
        return Estimate(value=math.nan, low=math.nan, high=math.nan, rows=0)
    mean = float(values.mean())
    if (values == values[0]).all():
        low, high = _exact(mean, len(values), confidence) if mean in (0, 1) else (mean, mean)
        return Estimate(value=mean, low=low, high=high, rows=len(values))
    low, high = bca(_resampled_means(values, rng), mean, acceleration(values), confidence)
    return Estimate(value=mean, low=low, high=high, rows=len(values))


def bca(
    resamples: Floats, value: float, accelerated: float = 0.0, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The interval of Efron (1987). Resamples equal to the value count half as below it.

    With acceleration 0 it is bias-corrected alone.
    """
    resamples = resamples[np.isfinite(resamples)]
    if not len(resamples) or not math.isfinite(value):
        return math.nan, math.nan
    below = ((resamples < value).sum() + (resamples == value).sum() / 2) / len(resamples)
    bias = NORMAL.inv_cdf(min(max(float(below), 0.5 / len(resamples)), 1 - 0.5 / len(resamples)))
    tail = (1 - confidence) / 2
    levels = [_corrected(NORMAL.inv_cdf(level), bias, accelerated) for level in (tail, 1 - tail)]
    low, high = np.quantile(resamples, levels)
    return float(low), float(high)


def acceleration(values: Floats) -> float:
    """BCa's acceleration of a mean: a sixth of the skewness of its jackknife."""
    centred = values - values.mean()
    scale = float((centred**2).sum()) ** 1.5
    return float((centred**3).sum()) / (6 * scale) if scale > 0 else 0.0


def paired_difference(
    first: Floats, second: Floats, rng: np.random.Generator, confidence: float = CONFIDENCE
) -> Difference:
    """The mean of first - second, both [rows] of the same rows, where neither is NaN."""
    defined = ~(np.isnan(first) | np.isnan(second))
    first, second = first[defined], second[defined]
    differences = first - second
    num_rows = len(differences)
    if not num_rows:
        return Difference(value=math.nan, low=math.nan, high=math.nan, p_value=math.nan, rows=0)
    value = float(differences.mean())
    means = _resampled_means(differences, rng)
    low, high = bca(means, value, acceleration(differences))
    if np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all():
        only_first, only_second = int((differences > 0).sum()), int((differences < 0).sum())
        p_value = mcnemar(only_first, only_second)
        return Difference(
            value=value, low=low, high=high, p_value=p_value, rows=num_rows,
            only_first=only_first, only_second=only_second,
        )  # fmt: skip
    tails = min((means <= 0).mean(), (means >= 0).mean())
    p_value = min(1.0, 2 * max(float(tails), 1 / (len(means) + 1)))
    return Difference(value=value, low=low, high=high, p_value=p_value, rows=num_rows)


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's exact two-sided p-value: rows that one alone has right are tosses of a coin."""
    tosses = only_first + only_second
    if not tosses:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(only_first, tosses).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number (Holm 1979); NaN stays and does not count."""
    order = sorted(
        (number for number, p in enumerate(p_values) if not math.isnan(p)),
        key=lambda i: p_values[i],
    )
    adjusted, highest = list(p_values), 0.0
    for rank, number in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[number]))
        adjusted[number] = highest
    return adjusted


def _resampled_means(values: Floats, rng: np.random.Generator) -> Floats:
    """Few different values are drawn as counts of each, which is the same and faster."""
    different, counts = np.unique(values, return_counts=True)
    num_rows = len(values)
    if len(different) <= 64:
        drawn = rng.multinomial(num_rows, counts / num_rows, size=RESAMPLES)
        return np.asarray(drawn @ different / num_rows)
    return resample(lambda weights: weights @ values / num_rows, num_rows, rng)


def _weights(num_rows: int, resamples: int, rng: np.random.Generator) -> Iterator[Floats]:
    """[some resamples, rows]: how often each row was drawn."""
    at_once = max(1, CHUNK_DRAWS // max(num_rows, 1))
    for start in range(0, resamples, at_once):
        some = min(at_once, resamples - start)
        drawn = (
            rng.integers(0, num_rows, size=(some, num_rows)) + num_rows * np.arange(some)[:, None]
        )
        yield (
            np.bincount(drawn.ravel(), minlength=some * num_rows)
            .reshape(some, num_rows)
            .astype(np.float64)
        )


def _corrected(quantile: float, bias: float, accelerated: float) -> float:
    shifted = bias + quantile
    return NORMAL.cdf(bias + shifted / (1 - accelerated * shifted))


def _exact(share: float, num_rows: int, confidence: float) -> tuple[float, float]:
    """The binomial bounds of Clopper and Pearson for a share that is 0 or 1."""
    from scipy.stats import binomtest

    found = binomtest(round(share * num_rows), num_rows).proportion_ci(confidence, method="exact")
    return float(found.low), float(found.high)
