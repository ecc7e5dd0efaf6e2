"""What the pages' tables and figures of results need: intervals, published points, lists of parameters."""

import numpy as np
from scipy import optimize, stats

from sagelib import runs
from sagelib.retrieval import resampled_means


def bootstrap_mean(
    values, seed: int = 0, *, draws: int = 2_000, level: float = 0.95, groups=None
) -> tuple[float, float, float]:
    """Mean of finite values (n,), one a query, with its percentile interval: (mean, low, high).

    Queries, or whole `groups` of them, are resampled as in `sagelib.retrieval.paired_bootstrap`.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"values must be finite and of shape (n > 0,), got shape {values.shape}")
    resampled = resampled_means(values, np.unique(values), runs.rng(seed, "bootstrap_mean"), draws, groups)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


def minimal_detectable_difference(n_queries: int, discordant: float) -> float:
    """The smallest difference in R@k, in percentage points, that so many queries show with 80 % power.

    Solves Connor's sample size for paired proportions, ``n = ((z_a sqrt(psi) + z_b sqrt(psi - d^2)) / d)^2``,
    for d (Biometrics 1987); psi is `discordant`, the share of queries that only one of two models hits, z_a
    belongs to the two-sided level of 5 %. NaN where not even d = psi would be found.
    """
    psi, (z_a, z_b) = runs.check("discordant", discordant, 0, 1), stats.norm.ppf([0.975, 0.8])

    def surplus(d):
        return np.sqrt(n_queries) * d - z_a * np.sqrt(psi) - z_b * np.sqrt(max(psi - d * d, 0))

    return 100 * optimize.brentq(surplus, 0, psi) if psi and surplus(psi) >= 0 else float("nan")
