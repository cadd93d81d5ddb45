"""The law L = E + A/N^α + B/D^β, fitted to the runs of a study, with intervals and a prediction."""

import math
from collections import defaultdict

import numpy as np

from base.errors import UserError
from report.results import law_loss
from report.stats import enough

PARAMETERS = ("E", "A", "alpha", "B", "beta")


class LawFit:
    """ln L over (ln N, ln D), to be fitted as Hoffmann et al. 2022 do (section 3.3): ln(E + A/N^α + B/D^β) by the Huber loss.

    theta = (ln E, ln of A/N^α, ln of B/D^β, α, β), the terms at the middle of the data: there they hardly depend on α and β.
    """

    LOWEST, HIGHEST = [-7.0, -7.0, -7.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0, 3.0]

    def __init__(self, N: np.ndarray, D: np.ndarray, L: np.ndarray, delta: float):
        self.n, self.d, self.loss, self.delta = np.log(N), np.log(D), np.log(L), delta
        self.middle = self.n.mean(), self.d.mean()

    def terms(self, theta: np.ndarray, rows: np.ndarray) -> np.ndarray:
        n, d = self.n[rows] - self.middle[0], self.d[rows] - self.middle[1]
        return np.stack([np.full_like(n, theta[0]), theta[1] - theta[3] * n, theta[2] - theta[4] * d])

    def residuals(self, theta: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """ln L of the law minus ln L measured."""
        return np.logaddexp.reduce(self.terms(theta, rows)) - self.loss[rows]

    def jacobian(self, theta: np.ndarray, rows: np.ndarray) -> np.ndarray:
        terms = self.terms(theta, rows)
        share = np.exp(terms - np.logaddexp.reduce(terms))
        n, d = self.n[rows] - self.middle[0], self.d[rows] - self.middle[1]
        return np.stack([*share, -share[1] * n, -share[2] * d], axis=1)

    def solve(self, rows: np.ndarray, starts: list) -> np.ndarray:
        """The best theta for some of the runs (one may be named twice), from each of the starts."""
        from scipy.optimize import least_squares  # here: scipy takes half a second to load

        how = dict(loss="huber", f_scale=self.delta, bounds=(self.LOWEST, self.HIGHEST), x_scale="jac", max_nfev=300)
        found = [least_squares(self.residuals, start, self.jacobian, args=(rows,), **how) for start in starts]
        return min(found, key=lambda f: f.cost).x

    def starts(self) -> list[tuple]:
        """E as one, two or three quarters of the loss, the rest shared out equally, and slow and fast powers."""
        middle = self.loss.mean()
        return [
            (middle + math.log(e), *[middle + math.log((1 - e) / 2)] * 2, a, b)
            for e in (0.25, 0.5, 0.75)
            for a in (0.1, 0.3, 0.8)
            for b in (0.1, 0.3, 0.8)
        ]

    def law(self, theta: np.ndarray) -> dict[str, float]:
        """In the usual form."""
        e, a, b, alpha, beta = map(float, theta)
        terms = math.exp(e), math.exp(a + alpha * self.middle[0]), math.exp(b + beta * self.middle[1])
        return dict(zip(PARAMETERS, (terms[0], terms[1], alpha, terms[2], beta), strict=True))


def best_size(law: dict[str, float], C: float) -> float:
    """The N that the law finds best for C = 6ND: where αA/N^α = βB/D^β. NaN or infinite if a power is 0."""
    alpha, beta = np.float64(law["alpha"]), np.float64(law["beta"])
    with np.errstate(all="ignore"):
        ratio = (alpha * law["A"] / (beta * law["B"])) ** (1 / (alpha + beta))
        return float(ratio * (C / 6) ** (beta / (alpha + beta)))


def finite(value: float) -> float | None:
    """A number as JSON has them."""
    return float(value) if math.isfinite(value) else None


def interval(values: list[float] | np.ndarray) -> list[float | None] | None:
    """[low, high]: the middle 95%; None for an end that is not finite. None instead of both without values."""
    if not len(values):
        return None
    ordered = np.sort(np.nan_to_num(np.asarray(values, dtype=float), nan=np.inf))
    last = len(ordered) - 1
    return [finite(ordered[math.floor(0.025 * last)]), finite(ordered[math.ceil(0.975 * last)])]


class Analysis:
    """Everything that is computed from the runs of a study: once from all of them, and again from each of many resamples."""

    def __init__(self, runs: list[dict], bootstraps: int, seed: int = 0):
        self.runs, self.random = runs, np.random.default_rng(seed)
        self.points: dict[tuple, list[int]] = defaultdict(list)  # (budget, N, D) -> which runs: its seeds
        for i, run in enumerate(runs):
            self.points[run["budget"], run["N"], run["D"]].append(i)
        if len(self.points) <= len(PARAMETERS):
            known = f"{len(self.points)} points are too few for a law of {len(PARAMETERS)} parameters"
            raise UserError(f"{known}: use more --sizes or --levels")
        N, D, self.L = (np.array([r[k] for r in runs], dtype=float) for k in ("N", "D", "loss"))
        self.noise = self.noise_of_seeds()
        # 1.345 deviations: normal noise costs Huber's loss 5% there; 1e-3 is Chinchilla's, for when there is no noise
        self.surface = LawFit(N, D, self.L, max(1e-3, 1.345 * (self.noise or 0.0)))
        theta = self.surface.solve(np.arange(len(runs)), self.surface.starts())
        self.law = self.surface.law(theta)
        self.misfit = np.array([self.surface.residuals(theta, np.array(rows)).mean() for rows in self.points.values()])
        if not enough(len(self.points), len(PARAMETERS)):
            bootstraps = 0  # every resample would be nearly the same runs again
        self.laws = [self.surface.law(self.surface.solve(self.resample(), [theta])) for _ in range(bootstraps)]

    def noise_of_seeds(self) -> float | None:
        """Standard deviation of ln L between seeds, pooled over all points; None if nothing was repeated."""
        groups = [np.log(self.L[rows]) for rows in self.points.values()]
        freedom = sum(len(g) - 1 for g in groups)
        return math.sqrt(sum(((g - g.mean()) ** 2).sum() for g in groups) / freedom) if freedom else None

    def resample(self) -> np.ndarray:
        """As many points as there are, drawn with replacement, each with all its seeds: by how much the law misses a point is
        common to them. Drawn again if they are no more than the law has parameters.
        """
        rows = list(self.points.values())
        while True:
            drawn = self.random.integers(0, len(rows), len(rows))
            if len(set(drawn)) > len(PARAMETERS):
                return np.concatenate([rows[i] for i in drawn])

    def predict(self, N: float, D: float) -> dict:
        """The mean loss of a point that was not fitted, with a 95% interval: what the law of each resample says, times by how
        much the law misses a point. It misses those it was fitted to by less than others: hence the root.
        """
        if not self.laws:
            return {"loss": law_loss(self.law, N, D), "low": None, "high": None}
        root = math.sqrt(len(self.misfit) / (len(self.misfit) - len(PARAMETERS)))
        missed = np.exp(-root * self.random.choice(self.misfit, len(self.laws)))
        low, high = interval([law_loss(law, N, D) * m for law, m in zip(self.laws, missed, strict=True)])
        return {"loss": law_loss(self.law, N, D), "low": low, "high": high}

    def parabola(self, budget: float) -> tuple[dict, np.ndarray]:
        """Chinchilla's second approach: where a parabola of L over ln N through the points of a budget is least.

        Its intervals come from the noise between seeds alone; there are none if nothing was repeated, or if one parabola in
        twenty has no minimum among the sizes. Also returns ln N at the minimum: measured, then one for each draw of noise.
        """
        rows = [(math.log(N), found) for (c, N, _), found in self.points.items() if c == budget]
        x, L = np.array([n for n, _ in rows]), np.array([self.L[found].mean() for _, found in rows])
        error = (self.noise or 0.0) * L / np.sqrt([len(found) for _, found in rows])
        draws = L + error * self.random.standard_normal((len(self.laws), len(L)))
        a, b, c = np.polyfit(x - x.mean(), np.vstack([L, draws]).T, 2)
        with np.errstate(all="ignore"):
            least = x.mean() - b / (2 * a)
            least[(a <= 0) | (least < x.min()) | (least > x.max())] = math.nan
        result = dict.fromkeys(("N", "ratio", "loss", "N_interval", "ratio_interval"))
        if not math.isnan(least[0]):
            N = math.exp(least[0])
            result |= {"N": N, "ratio": budget / 6 / N**2, "loss": float(c[0] - b[0] ** 2 / (4 * a[0]))}
            if self.noise and self.laws and np.isnan(least).mean() < 0.05:
                sizes = np.exp(least[~np.isnan(least)])
                result |= {"N_interval": interval(sizes), "ratio_interval": interval(budget / 6 / sizes**2)}
        return result, least

    def optimum(self, C: float) -> dict:
        """The best size for a budget by the law, with 95% intervals."""
        sizes = np.array([best_size(law, C) for law in (self.law, *self.laws)])
        with np.errstate(all="ignore"):
            ratios = C / 6 / sizes**2
        result = {"N": finite(sizes[0]), "ratio": finite(ratios[0])}
        return result | {"N_interval": interval(sizes[1:]), "ratio_interval": interval(ratios[1:])}

    def exponents(self, minima: dict[float, np.ndarray]) -> dict:
        """a in N ∝ C^a: by the law, and through the minima of the parabolas."""
        with np.errstate(all="ignore"):
            powers = [np.float64(law["beta"]) / (law["alpha"] + law["beta"]) for law in (self.law, *self.laws)]
        result = {"law": finite(powers[0]), "law_interval": interval(powers[1:]), "parabolas": None, "parabolas_interval": None}
        known = {c: least for c, least in minima.items() if not math.isnan(least[0])}
        if len(known) > 1:
            least = np.array(list(known.values()))
            slopes = np.polyfit(np.log(list(known)), least[:, ~np.isnan(least).any(axis=0)], 1)[0]
            result["parabolas"] = float(slopes[0])
            result["parabolas_interval"] = interval(slopes[1:]) if self.noise and len(slopes) > 1 else None
        return result

    def summary(self) -> dict:
        """All of it as JSON values, but for predictions."""
        found = {c: self.parabola(c) for c in sorted({budget for budget, _, _ in self.points})}
        return {
            "law": self.law,
            "intervals": {k: interval([law[k] for law in self.laws]) for k in PARAMETERS},
            "huber_delta": self.surface.delta,
            "noise": self.noise,
            "misfit": float(np.sqrt((self.misfit**2).mean())),
            "levels": [{"budget": c, "parabola": p, "law": self.optimum(c)} for c, (p, _) in found.items()],
            "exponent": self.exponents({c: least for c, (_, least) in found.items()}),
        }
