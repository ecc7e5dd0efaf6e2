"""Search, exact or by an index, recall with its uncertainty, rankings, and PCA: arrays in, numbers out."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import pandas as pd
from safetensors import safe_open
from safetensors.numpy import save
from scipy import stats

from sagelib import runs
from sagelib.backbone import read_checkpoint
from sagelib.places import positive_rows, same_grid

KS = (1, 5, 10, 20)
_BLOCK_BYTES = 256 * 2**20  # copies of the descriptors are never larger than this at once
_MAX_TIED = 1024  # candidates per query that are compared in float64 before a tie is left as found
_PCA_SAMPLES = 16_384  # as in the authors' evaluation
_SHARD_ROWS = 2**20  # of one file of an index
_TRAINED_ON = 65_536  # descriptors, or 64 for each list where these are more
SHORTLIST = 128  # candidates of an index, whose distances are then computed exactly


def search(database_values, query_values, k: int, *, index=None, out=None) -> tuple[np.ndarray, np.ndarray]:
    """Find the k nearest references of every query by Euclidean distance: exactly, or among a shortlist.

    faiss proposes candidates from float32 inner products. Their distances are computed again in float64 and
    sorted by (distance, row), over ever more candidates until float32 rounding cannot have hidden one: the
    result is that of a float64 brute force (where over 1,024 references tie, the last are in faiss's order).
    An `index` (`open_index`) proposes a shortlist, whose distances are as exact.

    Parameters
    ----------
    database_values, query_values : arrays (N, D) and (Q, D), float16 or float32, may be memmaps
        Finite and below 1e15; they are converted to float32 block by block, never as a whole.
    out : two arrays (Q, k), int64 and float32, such as memmaps, optional

    Returns
    -------
    indices, distances : arrays (Q, k), int64 and float32; they are `out`, if given
        Rows of `database_values`, nearest first, and Euclidean distances; -1 and inf where fewer are found.
    """
    shapes = np.shape(database_values), np.shape(query_values)
    if any(len(shape) != 2 or 0 in shape for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError("descriptors must have shapes (N, D) and (Q, D), got {} and {}".format(*shapes))
    (n, width), (n_queries, _) = shapes
    depth = min(runs.check("k", k, 1, whole=True), n)
    rows = max(1, _BLOCK_BYTES // (4 * width))
    indices, distances = out or (np.empty((n_queries, k), kind) for kind in (np.int64, np.float32))
    indices[:], distances[:] = -1, np.inf
    for start in range(0, n_queries, rows):
        queries = _float32(query_values[start : start + rows], "query", start)
        unsure, count = np.arange(len(queries)), min(n, 2 * depth + 16)
        while len(unsure):
            if index is None:
                candidates, least = _candidates(database_values, queries[unsure], count, rows)
            else:
                candidates = index.search(queries, min(n, max(4 * depth, SHORTLIST)))[1]
                least = np.full(len(queries), np.inf)
            hidden = np.zeros(len(unsure), bool)
            for i, query in enumerate(unsure):
                found = candidates[i][candidates[i] >= 0]
                difference = np.asarray(database_values[found], np.float64) - queries[query]
                squared = np.einsum("ij,ij->i", difference, difference)
                order = np.lexsort((found, squared))[:depth]
                indices[start + query, : len(order)] = found[order]
                distances[start + query, : len(order)] = np.sqrt(squared[order])
                hidden[i] = least[i] <= squared[order].max(initial=-np.inf)
            unsure = unsure[hidden] if count < min(n, _MAX_TIED) else unsure[:0]
            count = min(n, 4 * count, max(_MAX_TIED, 2 * depth + 16))
    return indices, distances


def open_index(spec: str, values, folder, key: Mapping) -> faiss.IndexShards:
    """The index that faiss builds of stored descriptors by a factory string; found again where it was built.

    Trained on a random sample and filled block by block: a memory-mapped file for every 2**20 rows, each of
    which another process may build. ``faiss.IndexShards`` searches them as one.

    Parameters
    ----------
    spec : str
        ``Flat``, ``SQfp16``, ``HNSW32``, ``PCAR256,IVF1024,PQ128x4fs`` (good for millions), ...; after it
        settings of the search, as in ``IVF1024,PQ64;nprobe=32``. By default half of the lists is searched.
    values : array (N, D), may be a memmap
    folder, key : path, mapping
        Where the files lie, and all that `values` depend on: the index of others is not found.
    """
    factory, _, settings = spec.partition(";")
    shards = faiss.IndexShards(values.shape[1], False, True)  # one after the other; rows are numbered on
    starts = range(0, len(values), _SHARD_ROWS)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    opened = {}
    for start in dict.fromkeys([*starts[rank::world], *starts]):  # this process's share, then the others
        part = values[start : start + _SHARD_ROWS]
        facts = {"factory": factory, "first_row": start, "shape": part.shape, "of": key}
        path = Path(folder) / f"index-{runs.fingerprint(facts)}"
        path.mkdir(parents=True, exist_ok=True)
        try:
            with runs.alone(path):
                if not (path / "manifest.json").exists():
                    with runs.atomic_path(path / "rows.faiss") as temporary:
                        faiss.write_index(_build(factory, part, start), str(temporary))
                    facts["bytes"] = (path / "rows.faiss").stat().st_size
                    runs.write_json(path / "manifest.json", facts)
            how = getattr(faiss, "IO_FLAG_MMAP_IFC", faiss.IO_FLAG_MMAP)
            index = faiss.read_index(str(path / "rows.faiss"), how)
            if lists := faiss.try_extract_index_ivf(index):
                lists.nprobe = -(-lists.nlist // 2)
            faiss.ParameterSpace().set_index_parameters(index, settings)
        except RuntimeError as error:
            words = f"{path}: no index {spec!r} of {len(part)} rows of {part.shape[1]} numbers: faiss says "
            raise ValueError(words + str(error).rpartition(": ")[2]) from None
        opened[start] = index
    for start in starts:
        shards.add_shard(opened[start])
    return shards


def _build(factory: str, values, first_row: int):
    """An index of the rows of `values`, trained on some of them."""
    index = faiss.index_factory(values.shape[1], factory)
    lists, rows = faiss.try_extract_index_ivf(index), max(1, _BLOCK_BYTES // (4 * values.shape[1]))
    n = min(len(values), max(_TRAINED_ON, 64 * lists.nlist if lists is not None else 0))
    quantiser = faiss.downcast_index(lists or index)
    if hasattr(quantiser, "do_polysemous_training"):
        quantiser.do_polysemous_training = False  # takes minutes, for a search that is not made here
    sample = np.sort(runs.rng(0, "index").choice(len(values), n, replace=False))
    index.train(np.ascontiguousarray(values[sample], np.float32))
    for start in range(0, len(values), rows):
        index.add(_float32(values[start : start + rows], "reference", first_row + start))
    return index


def _candidates(database_values, queries, count, rows):
    """Rows (q, count) that faiss finds, and a lower bound (q,) of the squared distance to every other row."""
    squared, found, longest = np.empty((len(queries), 0)), np.empty((len(queries), 0), np.int64), 0.0
    for start in range(0, len(database_values), rows):
        block = _float32(database_values[start : start + rows], "reference", start)
        longest = max(longest, float(np.einsum("ij,ij->i", block, block).max()))
        block_squared, block_rows = faiss.knn(queries, block, min(count, len(block)))
        squared, found = np.hstack([squared, block_squared]), np.hstack([found, block_rows + start])
        order = np.lexsort((found, squared), axis=1)[:, :count]
        squared, found = np.take_along_axis(squared, order, 1), np.take_along_axis(found, order, 1)
    # The rounding of a float32 inner product grows like the root of the number of its terms.
    scale = np.einsum("ij,ij->i", queries, queries, dtype=np.float64) + longest
    return found, squared[:, -1] - 8 * np.finfo(np.float32).eps * np.sqrt(queries.shape[1]) * scale


def _float32(block, what, first_row):
    with np.errstate(over="ignore"):
        block = np.ascontiguousarray(block, dtype=np.float32)
    largest = np.abs(block).max(axis=1)  # NaN where there is one
    wrong = ~((largest <= 1e15) & ((largest >= 1e-15) | (largest == 0)))
    if wrong.any():
        row, value = wrong.argmax(), largest[wrong][0]
        raise ValueError(f"{what} {first_row + row} has the value {value:.3g}, which float32 cannot square")
    return block


@dataclass(frozen=True)
class Recall:
    """Recall at k as counts: a query is a hit at k if any of its k nearest references is a positive."""

    hits: dict[int, int]  # for each k, how many queries are hits
    n_queries: int
    n_without_positive: int  # misses at every k, as in all tools of the field
    per_query_rank: np.ndarray  # (n_queries,) of the first positive among those searched, from 1; 0: none

    @classmethod
    def from_ranks(cls, per_query_rank, n_without_positive: int = 0, ks: Sequence[int] = KS) -> "Recall":
        """Count hits from the rank of each query's first positive (0: none found)."""
        ranks = np.asarray(per_query_rank, np.int64)
        hits = {int(k): int(((ranks > 0) & (ranks <= k)).sum()) for k in ks}
        return cls(hits, len(ranks), n_without_positive, ranks)

    def hit(self, k: int) -> np.ndarray:
        """Which queries are hits at k, shape (n_queries,), bool."""
        runs.check("k", k, choices=tuple(self.hits))
        return (self.per_query_rank > 0) & (self.per_query_rank <= k)

    def percent(self, k: int) -> float:
        """R@k in percent of all queries."""
        return 100.0 * int(self.hit(k).sum()) / self.n_queries

    def interval(self, k: int) -> tuple[float, float]:
        """Wilson's score interval of R@k (95 %), in percent."""
        return wilson_interval(int(self.hit(k).sum()), self.n_queries)

    def __str__(self):
        text = "R@{} {:.1f} [{:.1f}, {:.1f}]"
        parts = [text.format(k, self.percent(k), *self.interval(k)) for k in self.hits]
        without = f", {self.n_without_positive} without a positive" if self.n_without_positive else ""
        return f"{'  '.join(parts)}  ({self.n_queries} queries{without})"


def recall(indices, positives, ks: Sequence[int] = KS, *, n_references: int | None = None) -> Recall:
    """Count recall at k from ranked references and the positives of each query.

    Parameters
    ----------
    indices : array (Q, depth), int
        Rows of the references, nearest first, as `search` returns them; -1 stands for no reference.
    positives : Q sequences of int, or a mask (Q, N)
        The rows of the references that answer each query; or booleans, or 0 and 1, for all references.
    ks : sequence of int, from 1 to depth
    n_references : int, optional
        N; default: the mask's width, or one more than the largest row found. Other positives are refused.
    """
    indices = np.asarray(indices)
    if indices.ndim != 2 or len(indices) == 0 or indices.dtype.kind not in "iu":
        raise ValueError(f"indices must be integers (n > 0, depth), got {indices.dtype} {indices.shape}")
    if not len(ks) or min(ks) < 1 or max(ks) > indices.shape[1]:
        raise ValueError(f"ks are {tuple(ks)}; each must be from 1 to the depth searched, {indices.shape[1]}")
    _, ranks, counts = _hits(indices, positives, n_references)
    return Recall.from_ranks(ranks, int((counts == 0).sum()), ks)


def _hits(indices, positives, n_references=None):
    """Which references found are positives (Q, depth); the rank of the first, and their number (Q,)."""
    lists, n = positive_rows(positives, len(indices), n_references, 1 + int(indices.max()))
    if indices.min() < -1 or indices.max() >= n:
        raise ValueError(f"indices are from {indices.min()} to {indices.max()}, but there are {n} references")
    hit = np.stack([np.isin(row, rows) for row, rows in zip(indices, lists, strict=True)])
    first = np.where(hit.any(axis=1), hit.argmax(axis=1) + 1, 0)
    return hit, first, np.array([len(rows) for rows in lists])


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """Wilson's score interval (95 %) of the proportion hits / n, in percent (Wilson 1927)."""
    low, high = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    return 100 * float(low), 100 * float(high)


def precision_recall(distances, right, answerable) -> pd.DataFrame:
    """Precision and recall where only queries whose nearest reference is within a threshold are answered.

    Of Q queries each: the distance of that reference, whether it is a positive, and whether there is one at
    all. To answer a query that has none is wrong, and recall is that of the queries that have one (Schubert
    et al., Visual Place Recognition: A Tutorial, 2023). A row for each threshold, ascending.
    """
    answers = pd.DataFrame({"threshold": distances, "right": np.asarray(right, bool)}).groupby("threshold")
    counts = answers["right"].agg(["sum", "count"]).cumsum()  # equal distances are answered together
    recalls = counts["sum"] / max(1, np.count_nonzero(answerable))
    return pd.DataFrame({"precision": counts["sum"] / counts["count"], "recall": recalls}).reset_index()


@dataclass(frozen=True)
class Difference:
    """R@k of b less that of a over the same queries, in percentage points, and its 95 % interval."""

    points: float
    low: float
    high: float
    p: float  # two-sided: twice the smaller share of resampled differences on one side of zero, or at zero
    p_exact: float  # McNemar's exact test on the discordant queries, the better one where they are few
    gained: int  # queries that only b hits
    lost: int  # queries that only a hits
    n_queries: int
    k: int

    def __str__(self):
        p = "p < 0.001" if self.p < 0.001 else f"p = {self.p:.2g}"
        changed = f"{p} ({self.gained} gained, {self.lost} lost of {self.n_queries})"
        return f"{self.points:+.1f} points at R@{self.k} [{self.low:+.1f}, {self.high:+.1f}], {changed}"


def paired_bootstrap(a: Recall, b: Recall, k=1, seed=0, *, groups=None, draws: int = 10_000) -> Difference:
    """R@k of b less that of a over the same queries, with the percentile interval of resampled queries.

    `groups`, an array (n_queries,) of labels, resamples whole groups: queries of one place depend on each
    other, and the honest interval is wider. Recalls over different queries raise a ValueError.
    """
    for what in ("n_queries", "n_without_positive"):
        if (of_a := getattr(a, what)) != (of_b := getattr(b, what)):
            raise ValueError(f"{what} is {of_a} for a and {of_b} for b: compare over the same queries")
    change = b.hit(k).astype(int) - a.hit(k).astype(int)
    n, gained, lost = len(change), int((change > 0).sum()), int((change < 0).sum())
    resampled = resampled_means(change, (1, -1, 0), runs.rng(seed, "paired_bootstrap"), draws, groups)
    low, high = 100 * np.quantile(resampled, [0.025, 0.975])
    p = min(1.0, 2 * (1 + min((resampled <= 0).sum(), (resampled >= 0).sum())) / (1 + draws))
    exact = float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return Difference(100 * (gained - lost) / n, float(low), float(high), p, exact, gained, lost, n, k)


def resampled_means(values, cells, rng, draws: int, groups=None) -> np.ndarray:
    """Means (draws,) of values (n,), all among `cells`, where they, or whole `groups`, are resampled."""
    n = len(values)
    if groups is None:  # equal values are one cell of a multinomial
        shares = np.array([(values == cell).sum() for cell in cells]) / n
        return rng.multinomial(n, shares, size=draws) @ np.asarray(cells) / n
    groups = np.asarray(groups)
    if groups.shape != (n,) or pd.isna(groups).any():
        raise ValueError(f"groups must be {n} labels, none of them missing, got shape {groups.shape}")
    _, member = np.unique(groups, return_inverse=True)
    size, total = np.bincount(member), np.bincount(member, weights=values)
    picks = rng.multinomial(len(size), np.full(len(size), 1 / len(size)), size=draws)
    return (picks @ total) / (picks @ size)


def rankings_table(indices, distances, database, queries, positives=None) -> pd.DataFrame:
    """What every query found, a row for each query and rank.

    ``distance`` is between descriptors, ``metres`` on the ground (NaN across UTM zones, or if unknown),
    ``first_positive_rank`` 0 where there is none. Paths begin below the folder that holds all pictures.
    Without `positives`, nothing is said of them.
    """
    root = os.path.commonpath({os.path.dirname(os.path.abspath(p)) for p in (*database.path, *queries.path)})
    query, rank = np.nonzero(indices >= 0)
    reference = indices[query, rank]

    def columns(name, places, row):
        paths = np.array([Path(os.path.relpath(p, root)).as_posix() for p in places.path], object)
        metres = {f"{name}_{axis}": getattr(places, axis)[row].round(2) for axis in ("east_m", "north_m")}
        return {name: row, f"{name}_path": paths[row], **metres}

    apart = [getattr(queries, a)[query] - getattr(database, a)[reference] for a in ("east_m", "north_m")]
    same_zone = same_grid(queries.utm_zone)[query] == same_grid(database.utm_zone)[reference]
    table = columns("query", queries, query)
    if positives is not None:
        hit, first, n_positives = _hits(indices, positives, len(database))
        table |= {"first_positive_rank": first[query], "n_positives": n_positives[query]}
    table |= {"rank": rank + 1, **columns("reference", database, reference)}
    table["distance"] = distances[query, rank]
    table["metres"] = np.where(same_zone, np.hypot(*apart), np.nan).round(2)
    if positives is not None:
        table["positive"] = hit[query, rank].astype(int)
    return pd.DataFrame(table)


@dataclass(frozen=True, kw_only=True)
class PCA:
    """Principal components of training descriptors: ``y = (x - mean) components.T``, as the authors do."""

    mean: np.ndarray  # (D,)
    components: np.ndarray  # (size, D), orthonormal, largest variance first
    variance: np.ndarray  # (size,)
    whiten: bool = False  # divide by the standard deviations, then bring each result to unit length
    model: str = ""  # fingerprints and context of what it was fitted on
    data: str = ""
    context: str = ""

    @classmethod
    def fit(cls, descriptors, size: int, *, whiten=False, seed: int = 0, **fitted_on: str) -> "PCA":
        """Fit on at most 16,384 training descriptors (n, D), drawn by `seed`; `size` is at most their rank.

        `fitted_on`: model, data and context, which `Descriptors` know.
        """
        from sklearn import decomposition  # not above: it draws from `random` when it is imported

        values = getattr(descriptors, "values", descriptors)
        if values is not descriptors:
            fitted_on = {name: descriptors.manifest[name] for name in ("model", "data", "context")}
        if len(values) > _PCA_SAMPLES:
            values = values[np.sort(runs.rng(seed, "pca").choice(len(values), _PCA_SAMPLES, replace=False))]
        n, width = values.shape
        name = f"size, of {n} descriptors of {width} dimensions,"
        runs.check(name, size, 1, min(n - 1, width), whole=True)
        pca = decomposition.PCA(size, svd_solver="full" if n <= width else "covariance_eigh")
        variance = pca.fit(np.asarray(values, np.float64)).explained_variance_
        rank = int((variance > variance[0] * max(n, width) * np.finfo(np.float64).eps).sum())
        runs.check(f"{name} which span {rank},", size, 1, rank)
        return cls(mean=pca.mean_, components=pca.components_, variance=variance, whiten=whiten, **fitted_on)

    def transform(self, descriptors) -> np.ndarray:
        """Project (n, D) to float32 (n, size); `Descriptors` of another model or context are refused."""
        values = getattr(descriptors, "values", descriptors)
        for what in ("model", "context") if values is not descriptors else ():
            own, other = getattr(self, what), descriptors.manifest[what]
            if own and own != other:
                raise ValueError(f"this PCA was fitted on descriptors of {what} {own}, not {other}")
        if np.ndim(values) != 2 or values.shape[1] != len(self.mean):
            raise ValueError(f"descriptors must have shape (n, {len(self.mean)}), got {np.shape(values)}")
        basis = self.components.T / (np.sqrt(self.variance) if self.whiten else 1)
        rows = max(1, _BLOCK_BYTES // (8 * len(self.mean)))
        out = np.empty((len(values), len(self.components)), np.float32)
        for start in range(0, len(values), rows):
            out[start : start + rows] = (values[start : start + rows] - self.mean) @ basis
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12) if self.whiten else out

    def save(self, path) -> None:
        """Write a .safetensors file: the arrays, with settings and fingerprints as its metadata."""
        arrays = {a: np.ascontiguousarray(getattr(self, a)) for a in ("mean", "components", "variance")}
        settings = json.dumps({name: value for name, value in vars(self).items() if name not in arrays})
        with runs.atomic_path(path) as temporary:
            temporary.write_bytes(save(arrays, {"settings": settings}))

    @classmethod
    def load(cls, path) -> "PCA":
        """Read what `save` wrote; what is none is a ValueError, and nothing in it is executed."""
        arrays = {name: tensor.numpy() for name, tensor in read_checkpoint(path).items()}
        with runs.broken(path, "no saved PCA"), safe_open(path, framework="numpy") as file:
            return cls(**arrays, **json.loads(file.metadata()["settings"]))
