"""The statistics that tables and comparisons print. scipy is imported where it is used: loading it takes about a second."""

import math
import statistics

from base.errors import UserError


def scipy_stats():
    """scipy.stats. UserError where scipy, which training does not need, is not installed."""
    try:
        import scipy.stats
    except ModuleNotFoundError:
        raise UserError("confidence intervals need scipy: run pip install scipy") from None
    return scipy.stats


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile), interpolated linearly, as numpy.percentile does."""
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def interval(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high): Student's 95% confidence interval of the mean; infinitely wide for one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    error = statistics.stdev(values) / math.sqrt(len(values))
    if not error:
        return mean, mean, mean
    low, high = scipy_stats().t.interval(0.95, len(values) - 1, loc=mean, scale=error)
    return mean, float(low), float(high)


def difference(a: list[float], b: list[float]) -> tuple[float, float, float]:
    """(mean b - mean a, low, high): Welch's 95% confidence interval, which allows the two a different spread."""
    middle = statistics.fmean(b) - statistics.fmean(a)
    if min(len(a), len(b)) < 2:
        return middle, -math.inf, math.inf
    if not statistics.variance(a) and not statistics.variance(b):  # scipy would answer with NaN
        return middle, middle, middle
    ends = scipy_stats().ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    return middle, float(ends.low), float(ends.high)
