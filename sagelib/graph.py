"""The geo-visual graph: images as nodes, metres and descriptors on the edges between them, and greedy cliques in it.

Two images are joined when they lie within `radius_m` of each other (and, if asked, look the same way). An edge
carries two distances, ``d_geo`` in metres and ``d_vis`` between descriptors, and the affinity ``W = -(d_geo * d_vis)``:
never positive, and the nearer zero the more alike the two images are. An edge may be pruned away by its affinity. The
images of one training place are a clique of this graph, chosen greedily by affinity.

The file reads in that order: geographic edges, affinities, pruning, cliques, the greedy choice, and last
`GeoVisualGraph`, which holds all of it for one set of images. Nothing here makes an n x n array of all images: edges
come from a spatial index and are kept as compressed sparse rows (CSR: the neighbours of node i are
``indices[indptr[i]:indptr[i + 1]]``, ascending).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from scipy.spatial import cKDTree

from sagelib.places import heading_difference, same_grid

__all__ = [
    "GeoVisualGraph",
    "GreedyStep",
    "affinity",
    "edge_affinities",
    "explain_greedy",
    "first_clique",
    "geographic_distances",
    "greedy_weighted_clique",
    "largest_clique",
    "maximal_cliques",
    "neighbour_lists",
    "prune",
    "radius_pairs",
    "visual_distances",
]

PREFERENCES = ("affine", "hard", "uniform")
MEND = "mend the model that gave it (its weights may have diverged; try without autocast)"
_DENSE = 2048  # nodes up to which a sparse weight is made dense for the greedy choice


# ---------------------------------------------------------------------------------------------------------------------
# Geographic edges
# ---------------------------------------------------------------------------------------------------------------------


def radius_pairs(east_m, north_m, radius_m: float, *, block: int = 1 << 16) -> np.ndarray:
    """All pairs of points at most `radius_m` apart, by a k-d tree.

    Parameters
    ----------
    east_m, north_m : (n,) float
        Positions in one plane, in metres; finite.
    radius_m : float
        Greatest distance of a pair, inclusive, in metres.
    block : int
        Points whose pairs are searched at once, which bounds the memory of the search.

    Returns
    -------
    (E, 2) int32
        Each unordered pair once, in no promised order.

    Notes
    -----
    O(n log n + E). Points are taken in strips from west to east; a pair belongs to the strip of its western end.
    """
    east = np.asarray(east_m, dtype=np.float64)
    north = np.asarray(north_m, dtype=np.float64)
    _check_crowd(east, north, radius_m)
    order = np.argsort(east, kind="stable")
    east, north = east[order], north[order]
    found = []
    for start in range(0, len(east), block):
        stop = min(start + block, len(east))
        # The margin keeps pairs that rounding would lose; the exact test follows.
        halo = int(np.searchsorted(east, east[stop - 1] + radius_m * (1 + 1e-9) + 1e-9, side="right"))
        points = np.column_stack([east[start:halo], north[start:halo]])
        pairs = cKDTree(points).query_pairs(radius_m * (1 + 1e-9) + 1e-9, output_type="ndarray")
        pairs = pairs[pairs.min(axis=1) < stop - start] + start if len(pairs) else np.empty((0, 2), np.int64)
        a, b = pairs[:, 0], pairs[:, 1]
        near = np.sqrt((east[a] - east[b]) ** 2 + (north[a] - north[b]) ** 2) <= radius_m
        found.append(order[pairs[near]].astype(np.int32))
    return np.concatenate(found) if found else np.empty((0, 2), np.int32)


def _check_crowd(east, north, radius_m: float, most: int = 400_000_000) -> None:
    """Refuse positions so crowded that the pairs alone would fill the memory: usually they are not positions."""
    side = radius_m / np.sqrt(2)  # two points of one such square are within the radius
    cells = np.column_stack([np.floor(east / side), np.floor(north / side)]).astype(np.int64)
    if not len(cells):
        return
    cells -= cells.min(axis=0)
    _, crowd = np.unique(cells[:, 0] * (cells[:, 1].max() + 1) + cells[:, 1], return_counts=True)
    pairs = int((crowd.astype(np.int64) * (crowd - 1) // 2).sum())
    if pairs > most:
        raise ValueError(
            f"at least {pairs:,} pairs of the {len(east):,} images lie within {radius_m:g} m (the most crowded square "
            f"of {side:.1f} m holds {crowd.max():,}), more than {most:,}: are these the positions, in metres?"
        )


def neighbour_lists(n: int, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs, each given once, as symmetric CSR arrays.

    Returns
    -------
    indptr : (n + 1,) int64
    indices : (2 E,) int32
        The neighbours of node i are ``indices[indptr[i]:indptr[i + 1]]``, ascending.
    """
    pairs = np.asarray(pairs, dtype=np.int32).reshape(-1, 2)
    rows = np.concatenate([pairs[:, 0], pairs[:, 1]])
    columns = np.concatenate([pairs[:, 1], pairs[:, 0]])
    matrix = sp.coo_array((np.ones(len(rows), dtype=np.bool_), (rows, columns)), shape=(n, n)).tocsr()
    matrix.sort_indices()
    return matrix.indptr.astype(np.int64), matrix.indices.astype(np.int32, copy=False)


# ---------------------------------------------------------------------------------------------------------------------
# Affinities
# ---------------------------------------------------------------------------------------------------------------------


def geographic_distances(east_m, north_m) -> np.ndarray:
    """The (n, n) float64 matrix of distances in metres between all of few points."""
    east = np.asarray(east_m, dtype=np.float64)
    north = np.asarray(north_m, dtype=np.float64)
    return np.sqrt((east[:, None] - east) ** 2 + (north[:, None] - north) ** 2)


def visual_distances(descriptors) -> np.ndarray:
    """The (n, n) float64 matrix of Euclidean distances between all of few descriptors, (n, D).

    Computed in float64 from inner products of differences to the first row: the common part of alike descriptors would
    otherwise cancel, and leave rounding instead of a distance. Distances below the resolution of these sums are zero.
    """
    rows = np.asarray(descriptors)
    n = len(rows)
    inner = np.zeros((n, n))
    if n > 1:
        away = np.subtract(rows[1:], rows[0], dtype=np.float64)
        inner[1:, 1:] = away @ away.T
    own = np.diagonal(inner)
    sums = own[:, None] + own
    squared = sums - (inner + inner.T)
    squared[squared <= 1e-14 * sums] = 0.0
    np.fill_diagonal(squared, 0.0)
    return np.sqrt(squared)


def affinity(d_geo, d_vis, *, min_distance_m: float = 0.0) -> np.ndarray:
    """``W = -(d_geo * d_vis)``, the affinity of image pairs; `min_distance_m` is a floor under ``d_geo``.

    With no floor, two photographs taken at one position have ``W = 0``, the best value of all, however different
    they look. A floor of a metre or so lets their looks decide.
    """
    d_geo = np.asarray(d_geo, dtype=np.float64)
    return -(np.maximum(d_geo, min_distance_m) * np.asarray(d_vis, dtype=np.float64))


def edge_affinities(pairs, east_m, north_m, descriptors, *, min_distance_m: float = 0.0):
    """``d_geo``, ``d_vis`` and ``W`` of the given pairs only, in float64 and bounded memory.

    Parameters
    ----------
    pairs : (E, 2) int
    east_m, north_m : (n,) float
    descriptors : (n, D) float array or memory map

    Returns
    -------
    d_geo, d_vis, weight : (E,) float64

    Raises
    ------
    ValueError
        If a descriptor on an edge holds a NaN or an infinity; the sentence names the image.
    """
    pairs = np.asarray(pairs).reshape(-1, 2)
    a, b = pairs[:, 0], pairs[:, 1]
    east, north = np.asarray(east_m, np.float64), np.asarray(north_m, np.float64)
    d_geo = np.sqrt((east[a] - east[b]) ** 2 + (north[a] - north[b]) ** 2)
    d_vis = np.empty(len(pairs), dtype=np.float64)
    step = max(1, (1 << 21) // max(1, descriptors.shape[1]))
    for start in range(0, len(pairs), step):
        part = slice(start, start + step)
        difference = descriptors[a[part]].astype(np.float64) - descriptors[b[part]].astype(np.float64)
        d_vis[part] = np.sqrt(np.einsum("ij,ij->i", difference, difference))
    if not np.isfinite(d_vis).all():
        for node in np.unique(pairs[~np.isfinite(d_vis)]):
            if not np.isfinite(descriptors[node]).all():
                raise ValueError(f"the descriptor of image {node} holds a NaN or an infinity: {MEND}")
        raise ValueError("a distance between descriptors overflows float64: scale the descriptors down")
    return d_geo, d_vis, affinity(d_geo, d_vis, min_distance_m=min_distance_m)


# ---------------------------------------------------------------------------------------------------------------------
# Pruning: a pruned pair is no edge at all
# ---------------------------------------------------------------------------------------------------------------------


def prune(weight: np.ndarray, *, tau: float | None = None, top_k: int | None = None) -> np.ndarray:
    """Take edges out of a small dense affinity matrix; a pair without an edge is minus infinity.

    Parameters
    ----------
    weight : (n, n) float64
        Symmetric affinities; NaN or minus infinity where there is no edge. The diagonal is never an edge.
    tau : float or None
        Keep edges with ``W > tau``.
    top_k : int or None
        Of the edges that `tau` leaves, keep those that are among the `top_k` best of either end; of equal ones, those
        to lower indices.
    """
    weight = _no_edge_is_minus_infinity(weight)
    if tau is not None:
        weight[~(weight > tau)] = -np.inf
    if top_k is not None and top_k < len(weight) - 1:
        best = np.argsort(-weight, axis=1, kind="stable")[:, :top_k]
        keep = np.zeros(weight.shape, dtype=bool)
        np.put_along_axis(keep, best, True, axis=1)
        weight[~(keep | keep.T)] = -np.inf
    return weight


def _no_edge_is_minus_infinity(weight) -> np.ndarray:
    weight = np.array(weight, dtype=np.float64)
    weight[np.isnan(weight)] = -np.inf
    np.fill_diagonal(weight, -np.inf)
    return weight


# ---------------------------------------------------------------------------------------------------------------------
# Cliques. A set of nodes is a Python integer, bit i for node i: intersections of a few hundred nodes take some 50 ns.
# ---------------------------------------------------------------------------------------------------------------------


def adjacency_bits(matrix: np.ndarray) -> list[int]:
    """Rows of a small boolean adjacency matrix as integers, bit j of entry i for the edge (i, j)."""
    packed = np.packbits(matrix, axis=1, bitorder="little")
    width, data = packed.shape[1], packed.tobytes()
    return (
        [int.from_bytes(data[i : i + width], "little") for i in range(0, len(data), width)] if width else []
    )


def bits_of(nodes) -> int:
    """A boolean mask, (n,), as an integer."""
    return int.from_bytes(np.packbits(nodes, bitorder="little").tobytes(), "little")


def nodes_of(bits: int) -> list[int]:
    """The nodes of an integer set, ascending."""
    nodes = []
    while bits:
        low = bits & -bits
        nodes.append(low.bit_length() - 1)
        bits ^= low
    return nodes


class SearchBudget:
    """Counts the steps of clique searches, and says when there are none left.

    Finding a clique of a given size is exponential in the worst graph. Graphs of points within a radius are far from
    it, but nothing here may run without a bound: a search that spends its budget stops, and `cut` counts it.
    """

    def __init__(self, steps: int):
        self.steps = int(steps)
        self.spent = 0
        self.cut = 0


def first_clique(adjacency: list[int], alive: int, min_size: int, budget: SearchBudget) -> tuple[int, int]:
    """The first maximal clique of at least `min_size` nodes, by depth-first extension in node order.

    A clique is a set of nodes each two of which are joined; maximal, if no node of `alive` can be added to it.

    Parameters
    ----------
    adjacency : list of int
        Bit sets of neighbours.
    alive : int
        Bit set of the nodes that may be used.
    min_size : int
    budget : SearchBudget
        Steps left for this search; when they run out the search gives up.

    Returns
    -------
    clique : int
        Its bit set, 0 if there is none (or if the budget was spent before one was found).
    left : int
        `alive` without the nodes found to be in no such clique. Taking nodes away makes no new cliques, so a later
        search of the same graph may begin from here.

    Notes
    -----
    Node by node in order, as in Bron and Kerbosch (1973), but without their set of excluded nodes: a node is dropped
    only once no clique of `min_size` holds it, and then it cannot extend one either.
    """
    steps = budget.steps

    def straight_down(clique: int, common: int) -> int:
        while common:
            low = common & -common
            clique |= low
            common &= adjacency[low.bit_length() - 1]
        return clique

    def search(clique: int, common: int) -> int:
        nonlocal steps
        stack = [(clique, 1, common, False)]
        while stack:
            clique, size, common, failed = stack.pop()
            if size >= min_size:
                return straight_down(clique, common)
            if failed:  # only nodes with enough neighbours left can matter
                rest, need = common, min_size - size - 1
                while rest:
                    node = rest & -rest
                    rest ^= node
                    if (adjacency[node.bit_length() - 1] & common).bit_count() < need:
                        common ^= node
            if size + common.bit_count() < min_size:
                continue
            if steps <= 0:
                return -1
            steps -= 1
            low = common & -common
            stack.append((clique, size, common ^ low, True))
            stack.append((clique | low, size + 1, common & adjacency[low.bit_length() - 1], False))
        return 0

    found, left = 0, alive
    while left.bit_count() >= min_size:
        low = left & -left
        common = adjacency[low.bit_length() - 1] & left
        if common.bit_count() + 1 >= min_size:
            # Straight down first; the search with its way back only where that ends too soon.
            steps -= 1
            found = straight_down(low, common)
            if found.bit_count() < min_size:
                found = search(low, common)
            if found:
                break
        left ^= low
    budget.spent += budget.steps - steps
    if found < 0:
        budget.cut += 1
        return 0, left
    return found, left


def largest_clique(adjacency: list[int], alive: int, min_size: int, budget: SearchBudget) -> int:
    """A largest clique, if it has at least `min_size` nodes (else 0): the first of that size, then one more, ...

    When the budget is spent the largest found so far is returned, and `budget.cut` counts it.
    """
    best = 0
    while True:
        found, alive = first_clique(adjacency, alive, max(min_size, best.bit_count() + 1), budget)
        if not found:
            return best
        best = found


def maximal_cliques(
    indptr: np.ndarray, indices: np.ndarray, *, limit: int | None = None
) -> Iterator[list[int]]:
    """All maximal cliques of a CSR graph, each once, as ascending node lists; at most `limit` of them.

    Bron and Kerbosch (1973) with the pivot of Tomita, Tanaka and Takahashi (2006), started at each node with the
    nodes after it. Their number is exponential in the worst graph, hence `limit`.
    """
    yielded = 0
    n = len(indptr) - 1
    for node in range(n):
        around = indices[indptr[node] : indptr[node + 1]]
        local = {int(other): i for i, other in enumerate(around)}
        adjacency = []
        for other in around:
            row = 0
            for third in indices[indptr[other] : indptr[other + 1]]:
                if int(third) in local:
                    row |= 1 << local[int(third)]
            adjacency.append(row)
        later = sum(1 << i for i, other in enumerate(around) if other > node)
        earlier = sum(1 << i for i, other in enumerate(around) if other < node)
        stack = [(0, later, earlier)]
        while stack:
            clique, candidates, excluded = stack.pop()
            if not candidates:
                if not excluded:
                    yield sorted([node, *(int(around[i]) for i in nodes_of(clique))])
                    yielded += 1
                    if limit is not None and yielded >= limit:
                        return
                continue
            pivot = max(
                nodes_of(candidates | excluded), key=lambda u: (adjacency[u] & candidates).bit_count()
            )
            for i in nodes_of(candidates & ~adjacency[pivot]):
                stack.append((clique | 1 << i, candidates & adjacency[i], excluded & adjacency[i]))
                candidates &= ~(1 << i)
                excluded |= 1 << i


# ---------------------------------------------------------------------------------------------------------------------
# Greedy weighted sampling
# ---------------------------------------------------------------------------------------------------------------------


class GreedyStep(NamedTuple):
    """One decision of the greedy choice.

    Attributes
    ----------
    members : tuple of int
        The clique before the decision; empty when a seed is chosen.
    candidates : (m,) int
        For a seed: the nodes with an edge, not tried before. Otherwise: the nodes with an edge to every member.
    means : (m,) float
        Their mean affinity, over their neighbours (a seed) or to the members.
    chosen : int or None
        The candidate taken; None when there are none, and the next seed follows.
    """

    members: tuple[int, ...]
    candidates: np.ndarray
    means: np.ndarray
    chosen: int | None


def greedy_weighted_clique(weight, k: int, *, prefer: str = "affine") -> np.ndarray | None:
    """A clique of `k` nodes, grown greedily from the node of highest mean affinity.

    ``S(i)`` is the mean of ``W_ij`` over the neighbours j of i. The seed is ``argmax S``; then, again and again, the
    node of highest mean affinity to the clique joins, among those with an edge to every member. When there is none
    before the clique has `k` nodes, the node of next highest ``S`` is the seed.

    Parameters
    ----------
    weight : (n, n) float array, or scipy.sparse array
        Symmetric affinities. Dense: NaN or minus infinity where there is no edge. Sparse: the stored entries are the
        edges, stored zeros included. The diagonal is ignored.
    k : int
        Nodes of the clique.
    prefer : {"affine", "hard", "uniform"}
        ``"affine"`` maximises the affinity; ``"hard"`` minimises it, for far and dissimilar images of one place;
        ``"uniform"`` looks at edges only: permute the nodes and it is a random clique.

    Returns
    -------
    (k,) int64 or None
        Node indices in the order chosen. None if no seed leads to `k` nodes. The method is greedy: neither is the
        total affinity the greatest possible, nor does None prove that no clique of `k` nodes exists.

    Raises
    ------
    ValueError
        For a matrix that is not square or not symmetric, infinite affinities, k < 1, or an unknown `prefer`.

    Notes
    -----
    Ties go to the lowest index. Sums are taken over sorted values, so equal sets of affinities give equal means
    whatever the order of the nodes. O(n^2 log n) for the seed; O(k n) for each seed tried.

    Examples
    --------
    >>> weight = np.array([[0, -1, -5, np.nan], [-1, 0, -2, -9], [-5, -2, 0, -9], [np.nan, -9, -9, 0]])
    >>> greedy_weighted_clique(weight, 3).tolist()
    [0, 1, 2]
    >>> greedy_weighted_clique(weight, 4) is None
    True
    """
    if sp.issparse(weight) and weight.shape[0] > _DENSE:
        _check_greedy(k, prefer, weight.shape)
        return _greedy_sparse(weight, int(k), prefer)
    matrix, k = _checked_weight(weight, k, prefer)
    return _greedy(matrix, k, prefer)


def explain_greedy(weight, k: int, *, prefer: str = "affine") -> Iterator[GreedyStep]:
    """Every decision of `greedy_weighted_clique` with the same arguments, as `GreedyStep`, in order."""
    matrix, k = _checked_weight(weight, k, prefer)
    yield from _greedy_steps(matrix, k, prefer)


def _checked_weight(weight, k, prefer):
    _check_greedy(k, prefer, weight.shape if sp.issparse(weight) else np.shape(weight))
    if sp.issparse(weight):
        rows, columns, values = _checked_entries(weight)
        matrix = np.full(weight.shape, -np.inf)
        matrix[rows, columns] = values
        return matrix, int(k)
    matrix = _no_edge_is_minus_infinity(weight)
    if np.isposinf(matrix).any():
        raise ValueError(
            "weight holds plus infinity: affinities are finite, minus infinity or NaN where no edge is"
        )
    if not np.array_equal(matrix, matrix.T):
        i, j = np.argwhere(matrix != matrix.T)[0]
        raise ValueError(
            f"weight must be symmetric, got {matrix[i, j]} at ({i}, {j}) and {matrix[j, i]} at ({j}, {i})"
        )
    return matrix, int(k)


def _check_greedy(k, prefer, shape) -> None:
    if prefer not in PREFERENCES:
        raise ValueError(f"prefer must be one of {PREFERENCES}, got {prefer!r}")
    if int(k) != k or k < 1:
        raise ValueError(f"k must be an integer of at least 1, got {k!r}")
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"weight must be a square matrix, got shape {shape}")


def _checked_entries(weight) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, column and value of the edges of a sparse matrix, by row and column."""
    entries = weight.tocoo()
    edge = (entries.row != entries.col) & ~np.isnan(entries.data) & ~np.isneginf(entries.data)
    rows, columns = entries.row[edge].astype(np.int64), entries.col[edge].astype(np.int64)
    values = entries.data[edge].astype(np.float64)
    if np.isposinf(values).any():
        raise ValueError(
            "weight holds plus infinity: affinities are finite, minus infinity or NaN where no edge is"
        )
    forth, back = np.lexsort((columns, rows)), np.lexsort((rows, columns))
    if not all(
        np.array_equal(a[forth], b[back]) for a, b in ((rows, columns), (columns, rows), (values, values))
    ):
        raise ValueError("weight must be symmetric, entry for entry")
    return rows[forth], columns[forth], values[forth]


def _greedy_sparse(weight, k: int, prefer: str) -> np.ndarray | None:
    """The greedy choice where a dense matrix would be too large: a clique lies around its seed."""
    rows, columns, values = _checked_entries(weight)
    n = weight.shape[0]
    if prefer == "uniform":
        values = np.zeros(len(values))
    sign = -1.0 if prefer == "hard" else 1.0
    indptr = np.searchsorted(rows, np.arange(n + 1))
    degree = np.diff(indptr)
    means = np.full(n, -np.inf)
    joined = np.flatnonzero(degree)
    if len(joined):
        ordered = values[np.lexsort((values, rows))]
        means[joined] = sign * np.add.reduceat(ordered, indptr[joined]) / degree[joined]
    for seed in np.argsort(-means, kind="stable"):
        if means[seed] == -np.inf and k > 1:
            return None
        around = np.union1d([seed], columns[indptr[seed] : indptr[seed + 1]])
        if len(around) < k:
            continue
        matrix = np.full((len(around), len(around)), -np.inf)
        for i, node in enumerate(around):
            part = slice(indptr[node], indptr[node + 1])
            inside = np.isin(columns[part], around)
            matrix[i, np.searchsorted(around, columns[part][inside])] = sign * values[part][inside]
        members = _extend_seed(matrix, int(np.searchsorted(around, seed)), k)
        if members is not None:
            return around[members].astype(np.int64)
    return None


def _greedy(matrix: np.ndarray, k: int, prefer: str) -> np.ndarray | None:
    """`_greedy_steps` without its account: minus infinity in a sum of rows says by itself that an edge is missing."""
    if prefer == "uniform":
        matrix = np.where(matrix > -np.inf, 0.0, -np.inf)
    elif prefer == "hard":
        matrix = np.where(matrix > -np.inf, -matrix, -np.inf)
    untried = _mean_over_neighbours(matrix, isolated=-np.inf)
    while len(untried):
        seed = int(untried.argmax())
        if untried[seed] == -np.inf and k > 1:
            return None
        members = _extend_seed(matrix, seed, k)
        if members is not None:
            return members
        untried[seed] = -np.inf
    return None


def _extend_seed(matrix: np.ndarray, seed: int, k: int) -> np.ndarray | None:
    members = [seed]
    while len(members) < k:
        means = matrix[seed] if len(members) == 1 else _mean_of_rows(matrix[members])
        chosen = int(means.argmax())
        if means[chosen] == -np.inf:
            return None
        members.append(chosen)
    return np.array(members, dtype=np.int64)


def _mean_over_neighbours(matrix: np.ndarray, isolated: float) -> np.ndarray:
    """S(i); `isolated` for a node without neighbours."""
    edge = matrix > -np.inf
    degree = edge.sum(axis=1)
    values = np.where(edge, matrix, 0.0)
    values.sort(axis=1)
    return np.where(degree > 0, values.sum(axis=1) / np.maximum(degree, 1), isolated)


def _mean_of_rows(rows: np.ndarray) -> np.ndarray:
    rows.sort(axis=0)  # sums of equal values are then equal, whatever the order of the members
    return rows.sum(axis=0) / len(rows)


def _greedy_steps(matrix: np.ndarray, k: int, prefer: str) -> Iterator[GreedyStep]:
    """`matrix`: (n, n) float64, minus infinity where there is no edge. The last step yielded completes or fails."""
    edge = matrix > -np.inf
    sign = -1.0 if prefer == "hard" else 1.0
    if prefer == "uniform":
        matrix = np.where(edge, 0.0, -np.inf)
    all_means = _mean_over_neighbours(matrix, isolated=-sign * np.inf)
    # A place of one image has no pairs: a node without neighbours will do where there is no other.
    seeds = np.arange(len(matrix)) if k == 1 else np.flatnonzero(edge.any(axis=1))
    seed_means = all_means[seeds]
    order = np.argsort(-sign * seed_means, kind="stable")
    for rank, position in enumerate(order):
        untried = np.sort(order[rank:])
        seed = int(seeds[position])
        yield GreedyStep((), seeds[untried], seed_means[untried], seed)
        if k == 1:
            return
        members, common = [seed], edge[seed]
        while len(members) < k:
            candidates = np.flatnonzero(common)
            if not len(candidates):
                yield GreedyStep(tuple(members), candidates, np.empty(0), None)
                break
            means = _mean_of_rows(matrix[members][:, candidates])
            chosen = int(candidates[np.argmax(sign * means)])
            yield GreedyStep(tuple(members), candidates, means, chosen)
            members.append(chosen)
            common = common & edge[chosen]
        else:
            return


# ---------------------------------------------------------------------------------------------------------------------
# The graph of one set of images
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GeoVisualGraph:
    """Images as nodes, joined within a radius, with affinities between their descriptors on the edges.

    Make one with `GeoVisualGraph.build`, give it new descriptors with `with_descriptors`, compare two states with
    `compare`. Edges are kept in both directions, as CSR arrays; a pruned edge stays in `indices` as a geographic
    neighbour and is False in `kept`.

    Attributes
    ----------
    east_m, north_m : (n,) float64
    place : (n,) int64
        The place (cluster) of each image, -1 where unknown.
    indptr, indices : (n + 1,) int64, (2 E,) int32
        Geographic neighbours.
    d_geo : (2 E,) float64
        Metres along each edge.
    d_vis, weight : (2 E,) float64 or None
        Distance of the descriptors, and ``W = -(d_geo * d_vis)``; None while there are no descriptors.
    kept : (2 E,) bool
        The edges that pruning left.
    radius_m, tau, top_k, min_distance_m
        What it was built with.
    """

    east_m: np.ndarray
    north_m: np.ndarray
    place: np.ndarray
    indptr: np.ndarray
    indices: np.ndarray
    d_geo: np.ndarray
    kept: np.ndarray
    radius_m: float
    d_vis: np.ndarray | None = None
    weight: np.ndarray | None = None
    tau: float | None = None
    top_k: int | None = None
    min_distance_m: float = 0.0
    _rows: np.ndarray = field(default=None, repr=False)

    @classmethod
    def build(
        cls,
        east_m,
        north_m,
        *,
        descriptors=None,
        place=None,
        heading_deg=None,
        utm_zone=None,
        radius_m: float = 25.0,
        max_heading_deg: float | None = None,
        tau: float | None = None,
        top_k: int | None = None,
        min_distance_m: float = 0.0,
    ) -> GeoVisualGraph:
        """The graph of the given images.

        Parameters
        ----------
        east_m, north_m : (n,) float
            UTM positions in metres, all of one zone.
        descriptors : (n, D) float array or memory map, optional
            Without them the graph is geographic only.
        place : (n,) int, optional
        heading_deg : (n,) float, optional
            Needed by `max_heading_deg` only.
        utm_zone : (n,) str, optional
            Checked to be one zone.
        radius_m : float
            Images at most this far apart are joined (inclusive).
        max_heading_deg : float or None
            Join only images whose headings differ by no more. None: facing the other way is the same place, as in
            the paper.
        tau, top_k, min_distance_m
            See `prune` and `affinity`.

        Raises
        ------
        ValueError
            For lengths that differ, coordinates or descriptors that are not finite, mixed UTM zones, or options out
            of range.
        """
        east, north = check_positions(east_m, north_m)
        n = len(east)
        check_edge_options(radius_m, max_heading_deg, tau, top_k, min_distance_m)
        check_one_zone(utm_zone, n)
        heading = check_headings(heading_deg, max_heading_deg, n)
        place = np.full(n, -1, np.int64) if place is None else np.asarray(place, dtype=np.int64)
        check_length("place", place, n)
        pairs = radius_pairs(east, north, radius_m)
        if max_heading_deg is not None:
            pairs = pairs[heading_difference(heading[pairs[:, 0]], heading[pairs[:, 1]]) <= max_heading_deg]
        indptr, indices = neighbour_lists(n, pairs)
        rows = np.repeat(np.arange(n, dtype=np.int32), np.diff(indptr))
        d_geo = np.sqrt((east[rows] - east[indices]) ** 2 + (north[rows] - north[indices]) ** 2)
        graph = cls(
            east_m=east,
            north_m=north,
            place=place,
            indptr=indptr,
            indices=indices,
            d_geo=d_geo,
            kept=np.ones(len(indices), dtype=bool),
            radius_m=float(radius_m),
            tau=tau,
            top_k=top_k,
            min_distance_m=float(min_distance_m),
            _rows=rows,
        )
        return graph if descriptors is None else graph.with_descriptors(descriptors)

    @classmethod
    def from_places(cls, places, descriptors=None, **options) -> GeoVisualGraph:
        """The graph of a `Places` table; options as for `build`."""
        return cls.build(
            places.east_m,
            places.north_m,
            descriptors=descriptors,
            place=places.place,
            utm_zone=places.utm_zone,
            heading_deg=places.heading_deg,
            **options,
        )

    def with_descriptors(self, descriptors) -> GeoVisualGraph:
        """The same geographic edges with the affinities of other descriptors, (n, D), pruned anew."""
        if np.ndim(descriptors) != 2 or len(descriptors) != len(self):
            raise ValueError(
                f"descriptors must have shape ({len(self)}, D), one row per image, got {np.shape(descriptors)}"
            )
        once = self._rows < self.indices
        back = np.lexsort((self._rows, self.indices))  # position of each edge's other direction
        _, d_vis, weight = edge_affinities(
            np.column_stack([self._rows, self.indices])[once],
            self.east_m,
            self.north_m,
            descriptors,
            min_distance_m=self.min_distance_m,
        )
        both_vis, both_weight = np.empty(len(once)), np.empty(len(once))
        both_vis[once], both_weight[once] = d_vis, weight
        both_vis[back[once]], both_weight[back[once]] = d_vis, weight
        kept = np.ones(len(once), dtype=bool)
        if self.tau is not None:
            kept = both_weight > self.tau
        if self.top_k is not None:
            ordered = np.lexsort((self.indices, -both_weight, ~kept, self._rows))
            rank = np.empty(len(ordered), dtype=np.int64)
            rank[ordered] = np.arange(len(ordered)) - np.repeat(self.indptr[:-1], np.diff(self.indptr))
            best = kept & (rank < self.top_k)
            kept = best | best[back]
        return replace(self, d_vis=both_vis, weight=both_weight, kept=kept)

    def __len__(self) -> int:
        return len(self.east_m)

    @property
    def n_edges(self) -> int:
        """Edges that pruning left, each counted once."""
        return int(self.kept.sum()) // 2

    def edges(self) -> np.ndarray:
        """(E, 2) int32: the edges that pruning left, once each with i < j, in ascending order."""
        once = self.kept & (self._rows < self.indices)
        return np.column_stack([self._rows[once], self.indices[once]])

    def edge_values(self) -> dict[str, np.ndarray]:
        """``d_geo``, ``d_vis`` and ``weight`` of `edges`, in the same order."""
        once = self.kept & (self._rows < self.indices)
        values = {"d_geo": self.d_geo, "d_vis": self.d_vis, "weight": self.weight}
        return {name: value[once] for name, value in values.items() if value is not None}

    def csr(self, values: str = "weight") -> sp.csr_array:
        """The pruned graph as a scipy CSR array of ``"weight"``, ``"d_geo"``, ``"d_vis"`` or ``"ones"``.

        An edge of weight zero is a stored zero: do not call ``eliminate_zeros``.
        """
        data = np.ones(len(self.indices)) if values == "ones" else getattr(self, values)
        if data is None:
            raise ValueError(f"this graph has no {values}: give it descriptors first, by with_descriptors")
        indptr = np.concatenate([[0], np.cumsum(self.degrees())])
        return sp.csr_array((data[self.kept], self.indices[self.kept], indptr), shape=(len(self), len(self)))

    def dense(self, nodes) -> np.ndarray:
        """Affinities between few nodes as a matrix, minus infinity where there is no edge: a `weight` for the
        greedy choice, whose answer counts within `nodes`."""
        nodes = np.asarray(nodes)
        part = self.csr("weight")[nodes][:, nodes].tocoo()
        matrix = np.full((len(nodes), len(nodes)), -np.inf)
        matrix[part.row, part.col] = part.data
        return matrix

    # -- statistics ---------------------------------------------------------------------------------------------------

    def degrees(self) -> np.ndarray:
        """(n,) int64: the number of edges at each node."""
        return np.bincount(self._rows[self.kept], minlength=len(self)).astype(np.int64)

    def components(self) -> np.ndarray:
        """(n,) int: the connected component of each node, numbered from 0."""
        return sp.csgraph.connected_components(self.csr("ones"), directed=False)[1]

    def cliques(self, *, limit: int | None = 100_000) -> Iterator[list[int]]:
        """The maximal cliques of the pruned graph, at most `limit`; see `maximal_cliques`."""
        matrix = self.csr("ones")
        return maximal_cliques(matrix.indptr, matrix.indices, limit=limit)

    def clique_sizes(self, *, limit: int | None = 100_000) -> np.ndarray:
        """Sizes of the maximal cliques, at most `limit` of them."""
        return np.fromiter((len(clique) for clique in self.cliques(limit=limit)), dtype=np.int64)

    def statistics(self, *, clique_limit: int = 100_000) -> dict:
        """Counts of the graph as a dictionary of plain numbers."""
        degrees, sizes = self.degrees(), self.clique_sizes(limit=clique_limit)
        _, members = np.unique(self.components(), return_counts=True)
        result = {
            "nodes": len(self),
            "geographic_edges": len(self.indices) // 2,
            "edges": self.n_edges,
            "pruned_edges": len(self.indices) // 2 - self.n_edges,
            "isolated_nodes": int((degrees == 0).sum()),
            "mean_degree": float(degrees.mean()) if len(self) else 0.0,
            "max_degree": int(degrees.max()) if len(self) else 0,
            "components": len(members),
            "largest_component": int(members.max()) if len(members) else 0,
            "maximal_cliques": len(sizes),
            "largest_clique": int(sizes.max()) if len(sizes) else 0,
            "cliques_cut_at_limit": bool(len(sizes) >= clique_limit),
        }
        for name, value in self.edge_values().items():
            result[f"mean_{name}"] = float(value.mean()) if len(value) else float("nan")
        if self.weight is not None:
            result["zero_weight_edges"] = int((self.edge_values()["weight"] == 0).sum())
        return result

    def compare(self, previous: GeoVisualGraph) -> dict:
        """What changed since `previous`, a graph of the same images: edges gained, lost and in both.

        Returns
        -------
        dict
            ``gained``, ``lost`` : (E, 2) arrays; ``n_gained``, ``n_lost``, ``n_common``; ``jaccard``, common edges
            over edges in either; with descriptors ``mean_weight_change`` over the common edges.
        """
        if len(previous) != len(self):
            raise ValueError(
                f"graphs of {len(previous)} and {len(self)} images cannot be compared edge by edge"
            )
        n = max(1, len(self))
        now, before = (g.edges().astype(np.int64) @ np.array([n, 1]) for g in (self, previous))
        gained, lost = np.setdiff1d(now, before), np.setdiff1d(before, now)
        common = np.intersect1d(now, before)
        either = len(common) + len(gained) + len(lost)
        result = {
            "gained": np.column_stack(np.divmod(gained, n)),
            "lost": np.column_stack(np.divmod(lost, n)),
            "n_gained": len(gained),
            "n_lost": len(lost),
            "n_common": len(common),
            "jaccard": len(common) / either if either else 1.0,
        }
        if self.weight is not None and previous.weight is not None:
            change = (
                self.edge_values()["weight"][np.searchsorted(now, common)]
                - previous.edge_values()["weight"][np.searchsorted(before, common)]
            )
            result["mean_weight_change"] = float(change.mean()) if len(change) else 0.0
        return result


# ---------------------------------------------------------------------------------------------------------------------
# Checks, shared with the sampler
# ---------------------------------------------------------------------------------------------------------------------


def check_length(name: str, values, n: int) -> None:
    if np.ndim(values) != 1 or len(values) != n:
        raise ValueError(f"{name} must have shape ({n},), one entry per image, got {np.shape(values)}")


def check_positions(east_m, north_m) -> tuple[np.ndarray, np.ndarray]:
    east, north = np.asarray(east_m, dtype=np.float64), np.asarray(north_m, dtype=np.float64)
    check_length("east_m", east, len(east) if east.ndim else 0)
    check_length("north_m", north, len(east))
    for name, values in (("east_m", east), ("north_m", north)):
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise ValueError(
                f"{name} is {values[bad[0]]} at image {bad[0]} ({len(bad)} of {len(east)} images have no finite "
                f"{name}): leave out images without a position"
            )
    return east, north


def check_one_zone(utm_zone, n: int, where: str = "") -> None:
    if utm_zone is None:
        return
    zones = np.asarray(utm_zone).astype(str)
    check_length("utm_zone", zones, n)
    names = np.unique(same_grid(zones))
    if len(names) > 1:
        listed = ", ".join(repr(str(name) or "unknown") for name in names[:5])
        raise ValueError(
            f"images of UTM zones {listed} are mixed{where}: distances across zones mean nothing, so give each zone "
            "its own city or its own graph"
        )


def check_headings(heading_deg, max_heading_deg, n: int) -> np.ndarray | None:
    if max_heading_deg is None:
        return None
    if heading_deg is None:
        raise ValueError(
            "max_heading_deg needs heading_deg, one heading per image: give it, or set max_heading_deg=None"
        )
    heading = np.asarray(heading_deg, dtype=np.float64)
    check_length("heading_deg", heading, n)
    bad = np.flatnonzero(~np.isfinite(heading))
    if len(bad):
        raise ValueError(
            f"heading_deg is unknown for {len(bad)} of {n} images (first: image {bad[0]}): leave these out, or set "
            "max_heading_deg=None"
        )
    return heading


def check_edge_options(radius_m, max_heading_deg, tau, top_k, min_distance_m) -> None:
    if not (np.isfinite(radius_m) and radius_m > 0):
        raise ValueError(f"radius_m must be a positive number of metres, got {radius_m!r}")
    if max_heading_deg is not None and not 0 <= max_heading_deg <= 180:
        raise ValueError(f"max_heading_deg must be None or in [0, 180], got {max_heading_deg!r}")
    if tau is not None and not tau < 0:
        raise ValueError(f"tau must be None or below 0 (no affinity is above 0), got {tau!r}")
    if top_k is not None and (int(top_k) != top_k or top_k < 1):
        raise ValueError(f"top_k must be None or an integer of at least 1, got {top_k!r}")
    if not (np.isfinite(min_distance_m) and min_distance_m >= 0):
        raise ValueError(f"min_distance_m must be a number of metres of at least 0, got {min_distance_m!r}")
