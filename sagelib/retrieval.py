"""Exact search, recall with its uncertainty, the file of rankings, and PCA: arrays in, numbers out."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import pandas as pd
from scipy import linalg, stats
from scipy.special import ndtri

from sagelib import runs
from sagelib.places import same_grid

KS = (1, 5, 10, 20)
_BLOCK_BYTES = 256 * 2**20  # float32 copies of the descriptors are never larger than this at once
_LARGEST = 1e15  # of a descriptor's values, and 1 over the least: their squares must fit into float32
_MAX_TIED = 1024  # candidates per query that are compared in float64 before a tie is left as found


# ---------------------------------------------------------------------------------------------------- search
def search(database_values, query_values, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the k nearest references of every query by Euclidean distance, exactly.

    faiss proposes candidates from float32 inner products; their distances are then computed again in float64 as
    the root of the sum of squared differences, and sorted by (distance, row). Candidates are widened until float32
    rounding cannot have hidden one, so the result is that of a float64 brute force, and equal distances come in
    the order of the rows. (Only where more than 1,024 references are equally near are the last of them left in
    faiss's order.)

    Parameters
    ----------
    database_values : array (N, D), float16 or float32, may be a memmap
        The references. Converted to float32 block by block, never as a whole.
    query_values : array (Q, D)
        The queries.
    k : int
        How many references a query gets, at least 1.

    Returns
    -------
    indices : array (Q, k), int64
        Rows of `database_values`, nearest first; -1 where k exceeds N.
    distances : array (Q, k), float32
        Euclidean (not squared) distances; inf where there is no reference.

    Raises
    ------
    ValueError
        For empty or non-finite descriptors, values above 1e15 or all below 1e-15, different widths, or k below 1.
    """
    _check_pair(database_values, query_values)
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    n_database, width = database_values.shape
    n_queries = len(query_values)
    indices = np.full((n_queries, k), -1, np.int64)
    distances = np.full((n_queries, k), np.inf, np.float32)
    rows = max(1, _BLOCK_BYTES // (4 * width))
    depth = min(k, n_database)
    for start in range(0, n_queries, rows):
        queries = _float32(query_values[start : start + rows], "query", start)
        found, exact = _search_block(database_values, queries, depth, rows)
        indices[start : start + len(queries), :depth] = found
        distances[start : start + len(queries), :depth] = exact
    return indices, distances


def _search_block(database_values, queries, k, rows):
    """`search` for queries that fit into memory: (indices, distances), both (Q, k)."""
    n_database, width = database_values.shape
    indices = np.empty((len(queries), k), np.int64)
    distances = np.empty((len(queries), k))
    waiting = np.arange(len(queries))
    candidates = min(n_database, 2 * k + 16)
    query_norm2 = np.einsum("ij,ij->i", queries, queries, dtype=np.float64)
    while len(waiting):
        squared, found, longest2 = _faiss_candidates(database_values, queries[waiting], candidates, rows)
        # What the float32 inner products may be wrong by: rounding grows like the root of the number of terms.
        slack = 8 * np.finfo(np.float32).eps * np.sqrt(width) * (query_norm2[waiting] + longest2)
        unsure = []
        for row, query in enumerate(waiting):
            difference = np.asarray(database_values[found[row]], np.float64) - queries[query]
            exact2 = np.einsum("ij,ij->i", difference, difference)
            order = np.lexsort((found[row], exact2))[:k]
            hidden = squared[row, -1] <= exact2[order[-1]] + slack[row]
            if hidden and candidates < min(n_database, _MAX_TIED):
                unsure.append(query)
            indices[query], distances[query] = found[row][order], np.sqrt(exact2[order])
        waiting = np.array(unsure, int)
        candidates = min(n_database, 4 * candidates, max(_MAX_TIED, 2 * k + 16))
    return indices, distances


def _faiss_candidates(database_values, queries, k, rows):
    """The k nearest by faiss over blocks of the references: squared distances, rows, largest squared norm."""
    best_squared, best_rows, longest2 = None, None, 0.0
    for start in range(0, len(database_values), rows):
        block = _float32(database_values[start : start + rows], "reference", start)
        longest2 = max(longest2, float(np.einsum("ij,ij->i", block, block).max()))
        squared, found = faiss.knn(queries, block, min(k, len(block)))
        found = found.astype(np.int64) + start
        if best_rows is not None:
            squared, found = np.hstack([best_squared, squared]), np.hstack([best_rows, found])
        order = np.lexsort((found, squared), axis=1)[:, :k]
        best_squared = np.take_along_axis(squared, order, 1)
        best_rows = np.take_along_axis(found, order, 1)
    return best_squared, best_rows, longest2


def _float32(block, what, first_row):
    with np.errstate(over="ignore"):
        block = np.ascontiguousarray(block, dtype=np.float32)
    largest = np.abs(block).max(axis=1)  # NaN where there is one
    usable = (largest <= _LARGEST) & ((largest >= 1 / _LARGEST) | (largest == 0))
    if not usable.all():
        row = int(np.argmin(usable))
        raise ValueError(
            f"{what} descriptor in row {first_row + row} has "
            + (
                f"a largest value of {largest[row]:.3g}, whose square float32 cannot hold; scale all descriptors alike"
                if np.isfinite(largest[row])
                else "values that are not finite; mend the model or the file that gave them, or leave the row out"
            )
        )
    return block


def _check_pair(database_values, query_values):
    for what, values in (("database", database_values), ("query", query_values)):
        if np.ndim(values) != 2 or 0 in np.shape(values):
            raise ValueError(f"{what} descriptors must have shape (n > 0, D > 0), got {np.shape(values)}")
    if database_values.shape[1] != query_values.shape[1]:
        raise ValueError(
            f"queries have {query_values.shape[1]} dimensions and references {database_values.shape[1]}: "
            "they come from different models or sizes"
        )


# ---------------------------------------------------------------------------------------------------- recall
@dataclass(frozen=True)
class Recall:
    """Recall at k as counts: a query is a hit at k if any of its k nearest references is a positive.

    Attributes
    ----------
    hits : dict of int to int
        For each k, how many queries are hits.
    n_queries, n_without_positive : int
        All queries, and those for which the data base holds no positive: they are misses at every k, as every tool
        of the field counts them, and are counted here so that a reader can see how many there are.
    per_query_rank : array (n_queries,), int64
        Rank (from 1) of the first positive among the references searched, 0 where there is none.
    """

    hits: dict[int, int]
    n_queries: int
    n_without_positive: int
    per_query_rank: np.ndarray

    @classmethod
    def from_ranks(cls, per_query_rank, n_without_positive: int = 0, ks: Sequence[int] = KS) -> "Recall":
        """Count hits from the rank of each query's first positive (0: none found)."""
        ranks = np.asarray(per_query_rank)
        if ranks.ndim != 1 or len(ranks) == 0:
            raise ValueError(f"per_query_rank must have shape (n > 0,), got {ranks.shape}")
        if ranks.dtype.kind not in "iu" or ranks.min() < 0:
            raise ValueError(
                f"per_query_rank must hold whole numbers, 0 where no positive was found, got {ranks.dtype} from {ranks.min()}"
            )
        ranks = ranks.astype(np.int64)
        if not 0 <= n_without_positive <= (ranks == 0).sum():
            raise ValueError(
                f"n_without_positive is {n_without_positive}, but {(ranks == 0).sum()} queries have found no positive"
            )
        hits = {int(k): int(((ranks > 0) & (ranks <= k)).sum()) for k in ks}
        return cls(hits, len(ranks), int(n_without_positive), ranks)

    def percent(self, k: int) -> float:
        """R@k in percent of all queries."""
        return 100.0 * int(self.hit(k).sum()) / self.n_queries

    def hit(self, k: int) -> np.ndarray:
        """Which queries are hits at k, shape (n_queries,), bool."""
        if k not in self.hits:
            raise ValueError(f"k is {k}; this recall was counted at {', '.join(map(str, self.hits))}")
        return (self.per_query_rank > 0) & (self.per_query_rank <= k)

    def interval(self, k: int, level: float = 0.95) -> tuple[float, float]:
        """Wilson's score interval of R@k, in percent (see `wilson_interval`)."""
        return wilson_interval(int(self.hit(k).sum()), self.n_queries, level)

    def __str__(self):
        parts = []
        for k in self.hits:
            low, high = self.interval(k)
            parts.append(f"R@{k} {self.percent(k):.1f} [{low:.1f}, {high:.1f}]")
        without = f", {self.n_without_positive} without a positive" if self.n_without_positive else ""
        return f"{'  '.join(parts)}  ({self.n_queries} queries{without})"


def recall(indices, positives, ks: Sequence[int] = KS, *, n_references: int | None = None) -> Recall:
    """Count recall at k from ranked references and the positives of each query.

    Parameters
    ----------
    indices : array (Q, depth), int
        Rows of the references, nearest first, as `search` returns them; -1 stands for no reference.
    positives : sequence of Q integer arrays, or a mask or sparse matrix (Q, N)
        The references that count as the same place as each query; may be empty. See `positive_lists`.
    ks : sequence of int
        Counts are made at these; `indices` must be as deep as the largest of them.
    n_references : int, optional
        N, so that rows beyond it are refused.

    Raises
    ------
    ValueError
        If there is no query, lengths differ, rows are impossible, or `indices` is not deep enough.
    """
    indices = np.asarray(indices)
    if indices.ndim != 2 or len(indices) == 0 or indices.dtype.kind not in "iu":
        raise ValueError(
            f"indices must be integers of shape (n > 0, depth), got {indices.dtype} {indices.shape}"
        )
    lists = positive_lists(positives, n_references)
    if len(lists) != len(indices):
        raise ValueError(f"{len(indices)} queries were searched but positives are given for {len(lists)}")
    if not len(ks) or min(ks) < 1 or max(ks) > indices.shape[1]:
        raise ValueError(f"ks are {tuple(ks)}; each must be from 1 to the depth searched, {indices.shape[1]}")
    named = np.concatenate(lists)
    if n_references is None and len(named) and named.min() > indices.max():
        warnings.warn(
            f"no query found anything: all positives are rows from {named.min()} on, and no row above {indices.max()} was found; "
            "give n_references, so that rows that do not exist are refused",
            stacklevel=2,
        )
    hit = _hits(indices, lists, n_references)
    ranks = np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, 0)
    return Recall.from_ranks(ranks, sum(len(p) == 0 for p in lists), ks)


def positive_lists(positives, n_references: int | None = None) -> list[np.ndarray]:
    """One integer array of positives per query.

    Parameters
    ----------
    positives : sequence of Q integer arrays, sparse matrix (Q, N), or mask (Q, N)
        Row numbers of references; or a mask, an array or a list of rows of booleans or of 0 and 1.
    n_references : int, optional
        N.

    Raises
    ------
    ValueError
        For negative rows and rows from N on, values that are neither rows nor a mask, and integers that could be either.
    """
    if hasattr(positives, "tocsr"):
        matrix = positives.tocsr()
        widths = {matrix.shape[1]}
        lists = [
            matrix.indices[a:b][matrix.data[a:b] != 0]
            for a, b in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True)
        ]
    else:
        dense = isinstance(positives, np.ndarray) and positives.ndim == 2
        lists = [np.asarray(p).ravel() for p in positives]
        # An empty list has no type of its own.
        flat = np.concatenate([p for p in lists if len(p)] or [np.empty(0, np.int64)])
        binary = flat.dtype.kind in "iuf" and bool(np.isin(flat, (0, 1)).all())
        if dense and flat.dtype.kind in "iu" and binary and positives.shape[1] == 2:
            raise ValueError(
                "positives of 0 and 1 in two columns may be row numbers or a mask: give booleans, or lists"
            )
        # As row numbers, three values of 0 and 1 would name one reference twice.
        mask = flat.dtype.kind == "b" or (binary and (flat.dtype.kind == "f" or max(map(len, lists)) > 2))
        if not mask and any(len(p) and p.dtype.kind not in "iu" for p in lists):
            raise ValueError(
                "positives must be row numbers of references (integers), or booleans for each reference, "
                f"got {flat.dtype} such as {next(p[0] for p in lists if len(p) and p.dtype.kind not in 'iu')}"
            )
        widths = {len(p) for p in lists} if mask else set()
        lists = [np.flatnonzero(p) if mask else p.astype(np.int64) for p in lists]
    if len(widths) > 1 or (n_references is not None and not widths <= {n_references}):
        raise ValueError(
            f"a mask of positives must be as wide as there are references{'' if n_references is None else f', {n_references}'}; "
            f"widths are {', '.join(map(str, sorted(widths)))}"
        )
    top = n_references if n_references is not None else next(iter(widths), None)
    for query, rows in enumerate(lists):
        if len(rows) and (rows.min() < 0 or (top is not None and rows.max() >= top)):
            row = rows.min() if rows.min() < 0 else rows.max()
            raise ValueError(
                f"query {query} has the positive {row}: references are numbered from 0"
                + (f" to {top - 1}" if top else "")
            )
    return lists


def _hits(indices, lists, n_references=None) -> np.ndarray:
    """Which of the references found (Q, depth) are positives of their query, bool."""
    if n_references is not None and (indices.min() < -1 or indices.max() >= n_references):
        raise ValueError(
            f"indices are from {indices.min()} to {indices.max()}, but there are {n_references} references"
        )
    flat = np.concatenate(lists).astype(np.int64)
    width = 1 + max(int(indices.max(initial=0)), int(flat.max(initial=0)))
    query = np.arange(len(lists))
    positive = np.repeat(query, [len(p) for p in lists]) * width + flat
    return np.isin(query[:, None] * width + indices, positive) & (indices >= 0)


def wilson_interval(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion, in percent.

    With p = hits / n and z the normal quantile of `level`, the ends are
    ``(p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)`` (Wilson 1927).

    Raises
    ------
    ValueError
        If n < 1, hits is not from 0 to n, or level not between 0 and 1.
    """
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"hits is {hits} of n {n}; n must be at least 1 and hits from 0 to n")
    _check_fraction("level", level)
    z = float(ndtri(0.5 + level / 2))
    p = hits / n
    centre, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 100 / (1 + z * z / n)
    # A proportion of 0 or 1 has its end exactly there; rounding would leave 1e-15.
    low = 0.0 if hits == 0 else scale * (centre - half)
    high = 100.0 if hits == n else scale * (centre + half)
    return float(low), float(high)


# ----------------------------------------------------------------------------------------------- differences
@dataclass(frozen=True)
class Difference:
    """R@k of b minus R@k of a over the same queries, in percentage points.

    Attributes
    ----------
    points, low, high : float
        The difference and its percentile interval under resampling of queries (or of groups of them).
    p : float
        Two-sided: twice the smaller share of resampled differences on one side of zero (zero itself included).
    p_exact : float
        McNemar's exact test on the discordant queries, which is the better one where they are few.
    gained, lost : int
        Queries that only b hits, and that only a hits.
    n_queries, k : int
    """

    points: float
    low: float
    high: float
    p: float
    p_exact: float
    gained: int
    lost: int
    n_queries: int
    k: int

    def __str__(self):
        return (
            f"{self.points:+.1f} points at R@{self.k} [{self.low:+.1f}, {self.high:+.1f}], p = {self.p:.3f} "
            f"({self.gained} gained, {self.lost} lost of {self.n_queries})"
        )


def paired_bootstrap(
    recall_a: Recall,
    recall_b: Recall,
    k: int = 1,
    seed: int = 0,
    *,
    draws: int = 10_000,
    level: float = 0.95,
    groups=None,
) -> Difference:
    """Compare two models on the same queries by resampling the queries, both models together.

    Parameters
    ----------
    recall_a, recall_b : Recall
        Over the same queries in the same order.
    k, seed, draws, level
        The rank, the seed of the resampling, the number of resamples, and the interval's level.
    groups : array (n_queries,), optional
        Labels; whole groups are resampled. Queries of one place are not independent, so give places here where
        there are several queries each: the interval is then honestly wider.

    Raises
    ------
    ValueError
        If the numbers of queries, or of those without a positive, differ or an argument is out of range.
    """
    for what in ("n_queries", "n_without_positive"):
        mine, theirs = getattr(recall_a, what), getattr(recall_b, what)
        if mine != theirs:
            raise ValueError(
                f"{what} is {mine} for a and {theirs} for b: a paired comparison needs the same queries"
            )
    if draws < 1:
        raise ValueError(f"draws is {draws}; it must be at least 1")
    _check_fraction("level", level)
    change = recall_b.hit(k).astype(int) - recall_a.hit(k).astype(int)
    n, gained, lost = len(change), int((change > 0).sum()), int((change < 0).sum())
    rng = runs.rng(seed, "paired_bootstrap")
    if groups is None:
        # Each query's change is -1, 0 or 1, so a resample of n queries is one multinomial draw.
        counts = rng.multinomial(n, [gained / n, lost / n, (n - gained - lost) / n], size=draws)
        resampled = (counts[:, 0] - counts[:, 1]) / n
    else:
        resampled = _resampled_groups(change, groups, rng, draws)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    p = min(1.0, 2 * (1 + min((resampled <= 0).sum(), (resampled >= 0).sum())) / (1 + draws))
    p_exact = float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    points = 100 * (gained - lost) / n
    return Difference(points, 100 * float(low), 100 * float(high), p, p_exact, gained, lost, n, k)


def _resampled_groups(values, groups, rng, draws):
    """Means of values (n,) over `draws` resamples of whole groups."""
    groups = np.asarray(groups)
    if groups.shape != values.shape:
        raise ValueError(f"groups must have shape {values.shape}, got {groups.shape}")
    if pd.isna(groups).any():
        raise ValueError(f"groups is missing for {int(pd.isna(groups).sum())} of {len(groups)} queries")
    _, member = np.unique(groups, return_inverse=True)
    size, total = np.bincount(member), np.bincount(member, weights=values)
    picks = rng.multinomial(len(size), np.full(len(size), 1 / len(size)), size=draws)
    return (picks @ total) / (picks @ size)


def bootstrap_mean(
    values, seed: int = 0, *, draws: int = 2_000, level: float = 0.95, groups=None
) -> tuple[float, float, float]:
    """Mean of per-query values with its percentile interval under resampling of the queries: (mean, low, high).

    For changes that are no longer -1, 0 or 1, such as a hit less the mean of hits over several shuffles. With `groups`, an array (n,) of
    labels, whole groups are resampled, as in `paired_bootstrap`.

    Raises
    ------
    ValueError
        If `values` is not of shape (n > 0,), or `groups` not of the same.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"values must have shape (n > 0,), got {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(
            f"values must be finite; the first that is not belongs to query {int(np.argmin(np.isfinite(values)))}"
        )
    _check_fraction("level", level)
    rng = runs.rng(seed, "bootstrap_mean")
    if groups is None:
        # Queries with equal values are one cell of a multinomial: shuffles give few distinct values.
        cells, counts = np.unique(values, return_counts=True)
        resampled = rng.multinomial(len(values), counts / len(values), size=draws) @ cells / len(values)
    else:
        resampled = _resampled_groups(values, groups, rng, draws)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)


def minimal_detectable_difference(
    n_queries: int, discordant: float, *, power: float = 0.8, level: float = 0.95
) -> float:
    """The smallest difference in R@k, in percentage points, that a set of this size could show.

    Solves Connor's sample size for paired proportions,
    ``n = ((z_a sqrt(psi) + z_b sqrt(psi - d²)) / d)²``, for d, where psi is the share of queries on which two models
    disagree, z_a belongs to the two-sided `level` and z_b to `power` (Connor, Biometrics 1987).

    Parameters
    ----------
    n_queries : int
    discordant : float
        psi, from 0 to 1; of two measured models ``(gained + lost) / n_queries``. A difference cannot exceed it.
    power, level : float

    Returns
    -------
    float
        Percentage points; NaN where not even d = psi would be found.
    """
    if n_queries < 1:
        raise ValueError(f"n_queries is {n_queries}; it must be at least 1")
    _check_fraction("power", power)
    _check_fraction("level", level)
    if not 0 <= discordant <= 1:
        raise ValueError(f"discordant is {discordant}; it must be from 0 to 1")
    if discordant == 0:
        return float("nan")
    z_a, z_b = float(ndtri(0.5 + level / 2)), float(ndtri(power))

    def surplus(d):
        return np.sqrt(n_queries) * d - z_a * np.sqrt(discordant) - z_b * np.sqrt(max(discordant - d * d, 0))

    if surplus(discordant) < 0:
        return float("nan")
    low, high = 0.0, discordant
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if surplus(middle) < 0 else (low, middle)
    return 100 * high


def _check_fraction(name, value):
    if not 0 < value < 1:
        raise ValueError(f"{name} is {value}; it must lie between 0 and 1")


# -------------------------------------------------------------------------------------------------- rankings
def write_rankings(path, indices, distances, database, queries, positives, *, root=None) -> Path:
    """Write what every query found, one line per query and rank, to a CSV file that any tool opens.

    Columns: ``query, query_path, query_east_m, query_north_m, first_positive_rank (0: none), n_positives, rank,
    reference, reference_path, reference_east_m, reference_north_m, distance (between descriptors), metres (on the
    ground; empty between UTM zones or where a position is unknown), positive (0 or 1)``.

    Parameters
    ----------
    path : path of the .csv, written whole or not at all
    indices, distances : arrays (Q, depth) of `search`
    database, queries : Places of N and Q rows
    positives : as for `recall`
    root : folder, optional
        Paths inside it are written relative to it.
    """
    indices, distances = np.asarray(indices), np.asarray(distances)
    lists = positive_lists(positives, len(database))
    if indices.shape != distances.shape or not len(indices) == len(distances) == len(queries) == len(lists):
        raise ValueError(
            f"lengths differ: {len(queries)} queries, {len(indices)} rows of indices, {len(distances)} of "
            f"distances, {len(lists)} of positives"
        )
    query, rank = np.nonzero(indices >= 0)
    reference = indices[query, rank]
    hit = _hits(indices, lists, len(database))
    first = np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, 0)
    q_east, q_north = np.asarray(queries.east_m)[query], np.asarray(queries.north_m)[query]
    r_east, r_north = np.asarray(database.east_m)[reference], np.asarray(database.north_m)[reference]
    same_zone = same_grid(queries.utm_zone)[query] == same_grid(database.utm_zone)[reference]
    metres = np.where(same_zone, np.hypot(q_east - r_east, q_north - r_north), np.nan)
    table = pd.DataFrame(
        {
            "query": query,
            "query_path": _relative(queries.path, root)[query],
            "query_east_m": q_east.round(2),
            "query_north_m": q_north.round(2),
            "first_positive_rank": first[query],
            "n_positives": np.array([len(p) for p in lists])[query],
            "rank": rank + 1,
            "reference": reference,
            "reference_path": _relative(database.path, root)[reference],
            "reference_east_m": r_east.round(2),
            "reference_north_m": r_north.round(2),
            "distance": distances[query, rank],
            "metres": metres.round(2),
            "positive": hit[query, rank].astype(int),
        }
    )
    with runs.atomic_path(path) as temporary:
        table.to_csv(temporary, index=False)
    return Path(path)


def read_rankings(path) -> pd.DataFrame:
    """The table `write_rankings` wrote."""
    table = pd.read_csv(path)
    missing = {"query", "rank", "reference", "distance", "positive"} - set(table.columns)
    if missing:
        raise ValueError(f"{path} is no file of rankings: it has no column {', '.join(sorted(missing))}")
    return table


def _relative(paths, root):
    """Paths below `root` relative to it, with forward slashes; links are not followed, they are the names in the set."""
    names = [str(p) for p in paths]
    if root is not None:
        root = Path(os.path.abspath(root))
        inside = [Path(os.path.abspath(name)) for name in names]
        names = [
            p.relative_to(root).as_posix() if p.is_relative_to(root) else name
            for p, name in zip(inside, names, strict=True)
        ]
    return np.array(names, dtype=object)


# ------------------------------------------------------------------------------------------------------- PCA
@dataclass(frozen=True, kw_only=True)
class PCA:
    """Principal components of training descriptors: ``y = (x - mean) components.T``, by default nothing more.

    Fit with `PCA.fit`. `whiten` divides each component by its standard deviation on the training descriptors,
    `renormalise` brings each result to unit length; the authors of SAGE do neither.

    Attributes
    ----------
    mean : array (D,), components : array (size, D), variance : array (size,)
        float64 while fitted; the components are orthonormal rows, largest variance first, each with its largest
        entry positive.
    n_samples : int
        How many descriptors it was fitted on.
    model, data, context : str
        Fingerprints and context of what it was fitted on; `check` refuses descriptors of another model or context.
    """

    mean: np.ndarray
    components: np.ndarray
    variance: np.ndarray
    n_samples: int
    whiten: bool = False
    renormalise: bool = False
    model: str = ""
    data: str = ""
    context: str = ""

    @property
    def size(self) -> int:
        """Dimensions of a result."""
        return len(self.components)

    @classmethod
    def fit(
        cls,
        descriptors,
        size: int,
        *,
        whiten: bool = False,
        renormalise: bool = False,
        max_samples: int = 16_384,
        seed: int = 0,
        model: str = "",
        data: str = "",
        context: str = "",
    ) -> "PCA":
        """Fit on training descriptors (never on those of the test set).

        Parameters
        ----------
        descriptors : array (n, D), or Descriptors
            Of the latter, model, data and context are taken from its manifest where not given.
        size : int
            Dimensions to keep. n descriptors in D dimensions, once centred, span at most min(n - 1, D) of them:
            more is refused.
        max_samples : int
            No more than this many rows are used, drawn without replacement (16,384 in the authors' evaluation).
        seed : int
            Of that draw.

        Raises
        ------
        ValueError
            If `size` is above the rank of the descriptors, with the arithmetic.
        """
        manifest = getattr(descriptors, "manifest", None)
        if manifest is not None:
            model, data = model or manifest["model"], data or manifest["data"]
            context = context or manifest["context"]
            descriptors = descriptors.values
        n, width = descriptors.shape
        rows = np.arange(n)
        if n > max_samples:
            rows = np.sort(runs.rng(seed, "pca").choice(n, max_samples, replace=False))
        n = len(rows)
        bound = min(n - 1, width)
        if not 1 <= size <= bound:
            raise ValueError(
                f"size is {size}; {n} centred training descriptors of {width} dimensions have rank at most "
                f"min({n} - 1, {width}) = {bound}, so it must be from 1 to {bound}"
            )
        x = np.asarray(descriptors[rows], np.float64)
        if not np.isfinite(x).all():
            raise ValueError(
                f"training descriptor in row {rows[int(np.argmin(np.isfinite(x).all(axis=1)))]} has values that are not finite"
            )
        mean = x.mean(axis=0)
        x -= mean
        # The eigenvectors of the smaller of X X^T (n x n) and X^T X (D x D) give the same components.
        gram = x @ x.T if n <= width else x.T @ x
        side = len(gram)
        values, vectors = linalg.eigh(gram, subset_by_index=[side - size, side - 1], overwrite_a=True)
        values, vectors = values[::-1], vectors[:, ::-1]
        floor = values[0] * side * np.finfo(np.float64).eps
        rank = int((values > floor).sum())
        if rank < size:
            raise ValueError(
                f"size is {size}; the {n} training descriptors of {width} dimensions span only {rank} dimensions "
                f"(several are equal or dependent), so it must be from 1 to {rank}"
            )
        components = (x.T @ vectors / np.sqrt(values)).T if n <= width else vectors.T
        largest = np.abs(components).argmax(axis=1)
        components = components * np.sign(components[np.arange(size), largest])[:, None]
        return cls(
            mean=mean,
            components=np.ascontiguousarray(components),
            variance=values / (n - 1),
            n_samples=n,
            whiten=whiten,
            renormalise=renormalise,
            model=model,
            data=data,
            context=context,
        )

    def check(self, *, model: str = "", context: str = "") -> None:
        """Raise a ValueError if this PCA was fitted on descriptors of another model or another context."""
        for what, mine, theirs in (("model", self.model, model), ("context", self.context, context)):
            if mine and theirs and mine != theirs:
                raise ValueError(
                    f"this PCA was fitted on descriptors of {what} {mine} and does not fit those of {what} "
                    f"{theirs}; fit it again on training descriptors of that {what}"
                )

    def transform(self, descriptors) -> np.ndarray:
        """Project descriptors (n, D), block by block, to float32 (n, size); checks Descriptors by fingerprint."""
        manifest = getattr(descriptors, "manifest", None)
        if manifest is not None:
            self.check(model=manifest["model"], context=manifest["context"])
            descriptors = descriptors.values
        if np.ndim(descriptors) != 2 or descriptors.shape[1] != len(self.mean):
            raise ValueError(
                f"descriptors must have shape (n, {len(self.mean)}) for this PCA, got {np.shape(descriptors)}"
            )
        basis = self.components.T
        if self.whiten:
            basis = basis / np.sqrt(self.variance)
        out = np.empty((len(descriptors), self.size), np.float32)
        rows = max(1, _BLOCK_BYTES // (8 * len(self.mean)))
        for start in range(0, len(descriptors), rows):
            block = np.asarray(descriptors[start : start + rows], np.float64)
            projected = (block - self.mean) @ basis
            if self.renormalise:
                projected /= np.maximum(np.linalg.norm(projected, axis=1, keepdims=True), 1e-12)
            out[start : start + rows] = projected
        return out

    def save(self, path) -> Path:
        """Write a .safetensors file: the arrays, and settings and fingerprints as its metadata."""
        from safetensors.numpy import save_file

        metadata = {
            "format": "sagelib-pca-1",
            "n_samples": str(self.n_samples),
            "whiten": str(int(self.whiten)),
            "renormalise": str(int(self.renormalise)),
            "model": self.model,
            "data": self.data,
            "context": self.context,
        }
        arrays = {"mean": self.mean, "components": self.components, "variance": self.variance}
        arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}
        with runs.atomic_path(path) as temporary:
            save_file(arrays, temporary, metadata=metadata)
        return Path(path)

    @classmethod
    def load(cls, path, *, model: str = "", context: str = "") -> "PCA":
        """Read what `save` wrote; raises a ValueError if it was fitted for another `model` or `context`."""
        from safetensors import safe_open

        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "sagelib-pca-1":
                raise ValueError(f"{path} is no PCA file of this package: write it with PCA.save")
            arrays = {name: file.get_tensor(name) for name in ("mean", "components", "variance")}
        pca = cls(
            **arrays,
            n_samples=int(metadata["n_samples"]),
            whiten=metadata["whiten"] == "1",
            renormalise=metadata["renormalise"] == "1",
            model=metadata["model"],
            data=metadata["data"],
            context=metadata["context"],
        )
        pca.check(model=model, context=context)
        return pca

    def fingerprint(self) -> str:
        """Short hash of the arrays (as saved, in float32) and settings."""
        arrays = [np.ascontiguousarray(a, np.float32) for a in (self.mean, self.components, self.variance)]
        settings = {"whiten": self.whiten, "renormalise": self.renormalise, "model": self.model}
        return runs.fingerprint([*(runs.fingerprint(a) for a in arrays), settings])
