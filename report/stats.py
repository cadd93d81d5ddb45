"""The statistics that tables and comparisons print, and the one rule on when there is an interval.

scipy is imported where it is used: loading it takes about a second.
"""

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

from base.errors import UserError


def enough(points: int, fitted: int = 1) -> bool:
    """The rule: an interval or a range needs at least two points for each number that is fitted to them. A mean and a median
    are one number. With fewer, nothing is known of the spread, and what a formula returns is no interval.
    """
    return points >= 2 * fitted


def too_few(points: int, what: str, fitted: int = 1) -> str:
    """A sentence for the note under a table without intervals; empty where there are enough points."""
    if enough(points, fitted):
        return ""
    return f" No intervals: {points} {what}{'s are' if points != 1 else ' is'} too few for one."


class Estimate(NamedTuple):
    """A number and the ends of its interval or range. Without ends there is none: see enough()."""

    middle: float
    low: float | None = None
    high: float | None = None

    @property
    def known(self) -> bool:
        """Whether it has an interval. One without width is none: the points do not vary, or a fit lies at its bound."""
        return self.low is not None and self.high is not None and self.low < self.high

    def map(self, function: Callable[[float], float]) -> "Estimate":
        """Of each number, by a rising function."""
        return Estimate(*(None if v is None else function(v) for v in self))

    def text(self, show: Callable[[float], str], unit: str = "") -> str:
        """ "1.99× [1.95, 2.02]" by show = "{:.2f}".format; without an interval "1.99×"."""
        return show(self.middle) + unit + (f" [{show(self.low)}, {show(self.high)}]" if self.known else "")


def scipy_stats():
    """scipy.stats. UserError where scipy, which training does not need, is not installed."""
    try:
        import scipy.stats
    except ModuleNotFoundError:
        raise UserError("confidence intervals need scipy: run pip install scipy") from None
    return scipy.stats


def quartiles(values: list[float]) -> Estimate:
    """Median, first and third quartile, interpolated linearly, as numpy.percentile does."""
    if not enough(len(values)):
        return Estimate(*values)
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Estimate(middle, low, high)


def extent(values: list[float]) -> Estimate:
    """Median, least and most."""
    middle = statistics.median(values)
    return Estimate(middle, min(values), max(values)) if enough(len(values)) else Estimate(middle)


def interval(values: list[float]) -> Estimate:
    """Student's 95% confidence interval of the mean."""
    mean = statistics.fmean(values)
    if not enough(len(values)) or not (spread := statistics.stdev(values)):
        return Estimate(mean)
    low, high = scipy_stats().t.interval(0.95, len(values) - 1, loc=mean, scale=spread / math.sqrt(len(values)))
    return Estimate(mean, float(low), float(high))


def error_of_ratio(ratio: float, whole: float, points: int, ss: float, sn: float, nn: float) -> float | None:
    """Standard error of Σs / Σn over points with s and n each, such as sequences with their nats and tokens: the root of
    k / (k - 1) · Σ(s - ratio · n)², over Σn. None for too few points. whole: Σn. ss, sn, nn: Σs², Σs·n, Σn².
    """
    if not enough(points):
        return None
    squares = max(0.0, ss - 2 * ratio * sn + ratio**2 * nn)
    return math.sqrt(squares * points / (points - 1)) / whole


def difference(a: list[float], b: list[float]) -> Estimate:
    """mean b - mean a with Welch's 95% confidence interval, which allows the two a different spread."""
    middle = statistics.fmean(b) - statistics.fmean(a)
    if not enough(min(len(a), len(b))) or not (statistics.variance(a) or statistics.variance(b)):
        return Estimate(middle)
    ends = scipy_stats().ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    return Estimate(middle, float(ends.low), float(ends.high))
