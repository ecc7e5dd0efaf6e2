"""The evaluations that are there, and what a difference between two of them is worth."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from scipy import optimize, stats

from sagelib import runs
from sagelib.describe import Context, describe_callable
from sagelib.evaluate import STAGE, Evaluation, context_of
from sagelib.places import Places
from sagelib.retrieval import resampled_means


def read_evaluations(
    root, datasets: Iterable[str], models: Iterable[str], *, context: str | Context, preprocess: Callable
) -> list[Evaluation]:
    """The finished evaluations in a folder of runs, of two alike the last; what was not run is left out.

    In the order of `models`, then of `datasets`.
    """
    latest = sorted(runs.find_runs(root, STAGE), key=lambda run: run.manifest["finished"])
    evaluations = [Evaluation.load(run.dir) for run in latest]
    by_key = {(e.model, e.dataset, e.context, e.preprocess): e for e in evaluations}
    how = describe_callable(preprocess)
    keys = [(model, d, str(context_of(context, d)), how) for model in models for d in datasets]
    return [by_key[key] for key in keys if key in by_key]


def sets_with_results(
    evaluations: Iterable[Evaluation], datasets: Sequence[str], missing: Mapping[str, str]
) -> list[str]:
    """Those of `datasets` that have an evaluation; if none has, an error with the sentences of `missing`."""
    kept = [name for name in datasets if name in {e.dataset for e in evaluations}]
    if not kept:
        reasons = list(missing.values()) or [f"no finished evaluation on {', '.join(datasets)}"]
        raise ValueError("there is nothing to show: " + "; ".join(reasons))
    return kept


def query_places(queries: Places, radius_m: float = 25.0) -> np.ndarray:
    """The place (n,) of each query, for resampling by places: its label, or else its cluster by geography.

    A query without a position is a place of its own.
    """
    labelled = (queries.place >= 0).all()
    labels = queries.labels() if labelled else queries.with_clusters(radius_m).place.copy()
    alone = labels < 0
    labels[alone] = labels.max(initial=0) + 1 + np.arange(alone.sum())
    return labels


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
