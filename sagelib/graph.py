"""The geo-visual graph: images as nodes, metres and descriptors on the edges between them, and cliques in it.

Two images are joined when they lie within `radius_m` of each other (and, if asked, face the same way). An edge
carries ``d_geo`` in metres, ``d_vis`` between descriptors, and the affinity ``W = -(d_geo * d_vis)``: never positive,
and the nearer zero the closer the two images are. Pruning takes edges away by their affinity. The images of one
training place are a clique of this graph, chosen greedily by affinity.

The file reads in that order: affinity, pruning, cliques, the greedy choice, and `GeoVisualGraph`, which is what
pages study and what the sampler trains on. A few nodes are looked at densely (`GeoVisualGraph.subgraph`); all edges
are listed only when asked for, so a set of millions of images costs no more than its positions.
"""

from __future__ import annotations

import copy
import itertools
from functools import cached_property
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from scipy.spatial import cKDTree

from sagelib.places import heading_difference, same_grid
from sagelib.runs import check

__all__ = [
    "GeoVisualGraph",
    "GreedyStep",
    "Subgraph",
    "affinity",
    "first_clique",
    "greedy_weighted_clique",
    "largest_clique",
    "prune",
    "visual_distances",
]

SIGN = {"closest": 1.0, "farthest": -1.0, "random": 0.0}  # of the affinities that the greedy choice maximises
RENAMED = {"affine": "closest", "hard": "farthest", "uniform": "random"}
RULES = ("radius_m", "max_heading_deg", "tau", "top_k", "min_distance_m")
MOST_EDGES = 400_000_000  # more than this many pairs within the radius are no positions in metres
SEARCH_STEPS = 20_000  # of one search for a clique; graphs of points within a radius need a few dozen


# ------------------------------------------------------------------------------------------------
# Affinities and pruning
# ------------------------------------------------------------------------------------------------


def visual_distances(descriptors) -> np.ndarray:
    """The (n, n) float64 matrix of Euclidean distances between all of few descriptors, (n, D).

    Computed from inner products of differences to the first row: the common part of similar descriptors would
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
    """``W = -(d_geo * d_vis)``; `min_distance_m` is a floor under ``d_geo``.

    Without a floor two photographs taken at one position have ``W = 0``, the best value of all, however different
    they look. A floor of a metre or so lets the descriptors decide.
    """
    return -(np.maximum(d_geo, min_distance_m) * d_vis)


def prune(weight: np.ndarray, *, tau: float | None = None, top_k: int | None = None) -> np.ndarray:
    """Take edges out of a small dense affinity matrix; a pruned pair is no edge (minus infinity), never a zero.

    Parameters
    ----------
    weight : (n, n) float
        Symmetric affinities; NaN or minus infinity where there is no edge. The diagonal is never an edge.
    tau : float, optional
        Keep edges with ``W > tau``.
    top_k : int, optional
        Of these, keep edges that are among the `top_k` best of either end; of equal ones, those to lower indices.
    """
    weight = np.where(weight > (-np.inf if tau is None else tau), weight, -np.inf)
    np.fill_diagonal(weight, -np.inf)
    if top_k is not None and top_k < len(weight) - 1:
        best = np.argsort(-weight, axis=1, kind="stable")[:, :top_k]
        keep = np.zeros(weight.shape, dtype=bool)
        np.put_along_axis(keep, best, True, axis=1)
        weight[~(keep | keep.T)] = -np.inf
    return weight


# ------------------------------------------------------------------------------------------------
# Cliques. A set of nodes is a Python integer, bit i for node i: intersections of a few hundred nodes take some 50 ns.
# ------------------------------------------------------------------------------------------------


def adjacency_bits(matrix: np.ndarray) -> list[int]:
    """Rows of a boolean matrix as bit sets: bit j of entry i is ``matrix[i, j]``."""
    return [int.from_bytes(row.tobytes(), "little") for row in np.packbits(matrix, axis=1, bitorder="little")]


def nodes_of(bits: int) -> list[int]:
    """The nodes of a bit set, ascending."""
    nodes = []
    while bits:
        low = bits & -bits
        nodes.append(low.bit_length() - 1)
        bits ^= low
    return nodes


def first_clique(
    adjacency: list[int], alive: int, min_size: int, *, steps: int = SEARCH_STEPS
) -> tuple[int, int]:
    """The first maximal clique of at least `min_size` nodes, by depth-first extension in node order.

    A clique is a set of nodes each two of which are joined; maximal, if no node of `alive` can be added to it.

    Parameters
    ----------
    adjacency : list of int
        Bit sets of neighbours.
    alive : int
        Bit set of the nodes that may be used.
    min_size : int
    steps : int
        After so many the search gives up: it is exponential in the worst graph.

    Returns
    -------
    clique : int
        Its bit set; 0 if there is none, or if the steps ran out (then `left` still has `min_size` nodes).
    left : int
        `alive` without the nodes found to be in no such clique. Taking nodes away makes no new cliques, so a later
        search of the same graph may begin from here.

    Notes
    -----
    Node by node in order, as in Bron and Kerbosch (1973), but without their set of excluded nodes: a node is dropped
    only once no clique of `min_size` holds it, and then it cannot extend one either.
    """

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
                for node in nodes_of(common):
                    if (adjacency[node] & common).bit_count() < min_size - size - 1:
                        common ^= 1 << node
            if size + common.bit_count() < min_size:
                continue
            if steps <= 0:
                return 0
            steps -= 1
            low = common & -common
            stack.append((clique, size, common ^ low, True))
            stack.append((clique | low, size + 1, common & adjacency[low.bit_length() - 1], False))
        return 0

    left = alive
    while left.bit_count() >= min_size:
        low = left & -left
        common = adjacency[low.bit_length() - 1] & left
        if common.bit_count() + 1 >= min_size:
            # Straight down first; the search with its way back only where that ends too soon.
            steps -= 1
            clique = straight_down(low, common)
            if clique.bit_count() < min_size:
                clique = search(low, common)
            if clique or steps <= 0:
                return clique, left
        left ^= low
    return 0, left


def largest_clique(adjacency: list[int], alive: int, min_size: int, *, steps: int = SEARCH_STEPS) -> int:
    """A largest clique of at least `min_size` nodes, or 0: the first of that size, then one more, ...

    When a search runs out of `steps`, the largest found so far.
    """
    best = 0
    while True:
        clique, alive = first_clique(adjacency, alive, max(min_size, best.bit_count() + 1), steps=steps)
        if not clique:
            return best
        best = clique


# ------------------------------------------------------------------------------------------------
# Greedy weighted sampling
# ------------------------------------------------------------------------------------------------


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


def check_prefer(prefer: str) -> str:
    """`prefer`, if it names what the greedy choice prefers."""
    if prefer in RENAMED:
        raise ValueError(f"prefer={prefer!r} is now called {RENAMED[prefer]!r}")
    return check("prefer", prefer, choices=tuple(SIGN))


def greedy_weighted_clique(
    weight: np.ndarray, k: int, *, prefer: str = "closest", steps: list | None = None
) -> np.ndarray | None:
    """A clique of `k` nodes, grown greedily from the node of highest mean affinity.

    The seed is ``argmax S(i)``, the mean of ``W_ij`` over the neighbours j of i; then, again and again, the node of
    highest mean affinity to the clique joins, among those with an edge to every member. When there is none before
    the clique has `k` nodes, the node of next highest ``S`` is the seed.

    Parameters
    ----------
    weight : (n, n) float
        Symmetric affinities; NaN or minus infinity where there is no edge. The diagonal is ignored.
    k : int
    prefer : {"closest", "farthest", "random"}
        Maximise the affinity (the paper), minimise it for far and dissimilar images of one place, or look at edges
        only: permute the nodes, and it is a random clique.
    steps : list, optional
        Every decision is appended, as `GreedyStep`.

    Returns
    -------
    (k,) int64 or None
        Nodes in the order chosen; None if no seed leads to `k` nodes. Neither is the total affinity the greatest
        possible, nor does None prove that there is no clique of `k` nodes.

    Raises
    ------
    ValueError
        For a matrix that is not symmetric, k < 1, or an unknown `prefer`.

    Notes
    -----
    Ties go to the lowest index. O(n^2 log n) for the seed, O(k n) for each seed tried.

    Examples
    --------
    >>> weight = np.array([[0, -1, -5, np.nan], [-1, 0, -2, -9], [-5, -2, 0, -9], [np.nan, -9, -9, 0]])
    >>> greedy_weighted_clique(weight, 3).tolist()
    [0, 1, 2]
    >>> greedy_weighted_clique(weight, 4) is None
    True
    """
    sign, k = SIGN[check_prefer(prefer)], check("k", k, 1, whole=True)
    edge = np.asarray(weight) > -np.inf
    np.fill_diagonal(edge, False)
    W = np.where(edge, sign * np.where(edge, weight, 0.0), -np.inf)
    if not np.array_equal(W, W.T):
        raise ValueError(
            f"weight must be a symmetric matrix, got shape {W.shape}, entries that differ from its own"
        )

    def record(members: list[int], means: np.ndarray, chosen: int | None) -> None:
        if steps is not None:
            nodes = np.flatnonzero(means > -np.inf)
            steps.append(GreedyStep(tuple(members), nodes, (sign or 1.0) * means[nodes], chosen))

    # Sums over sorted values: equal sets of affinities have equal means, whatever the order of the nodes.
    degree = edge.sum(axis=1)
    S = np.sort(np.where(edge, W, 0.0), axis=1).sum(axis=1) / np.maximum(degree, 1)
    S[degree == 0] = -np.inf
    for seed in np.argsort(-S, kind="stable").tolist():
        if S[seed] == -np.inf and k > 1:  # a place of one image needs no edge
            break
        record([], S, seed)
        clique = [seed]
        while len(clique) < k:
            gain = np.sort(W[clique], axis=0).mean(
                axis=0
            )  # minus infinity where an edge to any member is missing
            best = int(gain.argmax())
            if gain[best] == -np.inf:
                record(clique, gain, None)
                break
            record(clique, gain, best)
            clique.append(best)
        else:
            return np.array(clique, dtype=np.int64)
        S[seed] = -np.inf
    return None


# ------------------------------------------------------------------------------------------------
# The graph of one set of images
# ------------------------------------------------------------------------------------------------


class GeoVisualGraph:
    """Images as nodes, joined within a radius, with affinities between their descriptors on the edges.

    Parameters
    ----------
    east_m, north_m : (n,) float
        UTM positions in metres.
    city : (n,) str or int, optional
        None: all images are of one city. A city in two UTM zones is two.
    utm_zone : (n,) str, optional
        Images of one zone lie in one plane. Unknown or not given: each city is a plane of its own. Images of
        different planes are never joined.
    place : (n,) str or int, optional
        The place label of each image within its city. None: squares of side `radius_m`.
    heading_deg : (n,) float, optional
        Needed by `max_heading_deg` only.
    descriptors : (n, D) float, optional
        See `with_descriptors`. Without them the graph is geographic only.
    radius_m : float
        Images at most this far apart are joined (inclusive).
    max_heading_deg : float, optional
        Join only images whose headings differ by no more. None, as in the paper: facing the other way is the same
        place.
    tau, top_k, min_distance_m
        See `prune` and `affinity`.

    Attributes
    ----------
    east_m, north_m : (n,) float64
    city : (n,) int64
        Numbered from 0 by label.
    cluster : (n,) int64
        The place of each image, numbered from 0 by city and label.
    descriptors
        As given, or None.

    Raises
    ------
    ValueError
        For lengths that differ, positions, headings or descriptors that are not finite, or rules out of range.
    """

    def __init__(
        self,
        east_m,
        north_m,
        *,
        city=None,
        utm_zone=None,
        place=None,
        heading_deg=None,
        descriptors=None,
        radius_m: float = 25.0,
        max_heading_deg: float | None = None,
        tau: float | None = None,
        top_k: int | None = None,
        min_distance_m: float = 0.0,
    ):
        check_rules(radius_m, max_heading_deg, tau, top_k, min_distance_m)
        self.radius_m, self.max_heading_deg, self.min_distance_m = radius_m, max_heading_deg, min_distance_m
        self.tau, self.top_k = tau, top_k
        n = np.size(east_m)
        self.east_m, self.north_m = _finite("east_m", east_m, n), _finite("north_m", north_m, n)
        self.heading_deg = None
        if max_heading_deg is not None:
            if heading_deg is None:
                raise ValueError(
                    "max_heading_deg needs heading_deg, one heading per image: give it, or leave both out"
                )
            self.heading_deg = _finite("heading_deg", heading_deg, n)
        grid = same_grid(np.full(n, "") if utm_zone is None else _column("utm_zone", utm_zone, n))
        self.city = _numbered(np.zeros(n) if city is None else _column("city", city, n), grid)
        self._plane = _numbered(np.where(grid == "", self.city, -1), grid)
        if place is None:
            square = np.floor(self.east_m / radius_m), np.floor(self.north_m / radius_m)
        else:
            square = (_column("place", place, n),)
        self.cluster = _numbered(self.city, *square)
        self.descriptors, self._per_cluster = None, False
        if descriptors is not None:
            self._describe(descriptors)

    @classmethod
    def from_places(cls, places, descriptors=None, **rules) -> GeoVisualGraph:
        """The graph of a `Places` table; its place labels count if every image has one."""
        labelled = len(places) > 0 and bool((places.place >= 0).all())
        return cls(
            places.east_m,
            places.north_m,
            city=np.asarray(places.city).astype(str),
            utm_zone=places.utm_zone,
            place=places.place if labelled else None,
            heading_deg=places.heading_deg,
            descriptors=descriptors,
            **rules,
        )

    def with_descriptors(self, descriptors) -> GeoVisualGraph:
        """The same nodes and rules with other descriptors.

        Parameters
        ----------
        descriptors : (n, D) or (n_clusters, D) float, or any object indexable by an array of nodes
            One row per image, or one per cluster in the numbering of `cluster`. Kept by reference, memory-mapped or
            not; arrays are checked to be finite.
        """
        graph = copy.copy(self)
        for name in ("_values", "_kept"):
            graph.__dict__.pop(name, None)
        graph._describe(descriptors)
        return graph

    def _describe(self, descriptors) -> None:
        self._per_cluster = False
        if isinstance(descriptors, np.ndarray):
            clusters = int(self.cluster.max(initial=-1)) + 1
            if descriptors.ndim != 2 or len(descriptors) not in (len(self), clusters):
                raise ValueError(
                    f"descriptors must have shape ({len(self)}, D), one row per image, or ({clusters}, D), one per "
                    f"cluster, got {descriptors.shape}"
                )
            self._per_cluster = len(descriptors) != len(self)
            check_finite(descriptors, "cluster" if self._per_cluster else "image")
        self.descriptors = descriptors

    def __len__(self) -> int:
        return len(self.east_m)

    @property
    def rules(self) -> dict:
        """What decides about edges: `radius_m`, `max_heading_deg`, `tau`, `top_k`, `min_distance_m`."""
        return {name: getattr(self, name) for name in RULES}

    # -- few nodes, densely --

    def distances_m(self, rows, columns) -> np.ndarray:
        """Metres between nodes, (len(rows), len(columns)) float64; infinite between planes."""
        squared = np.square(self.east_m[rows][:, None] - self.east_m[columns])
        squared += np.square(self.north_m[rows][:, None] - self.north_m[columns])
        metres = np.sqrt(squared, out=squared)
        metres[self._plane[rows][:, None] != self._plane[columns]] = np.inf
        return metres

    def subgraph(self, nodes) -> Subgraph:
        """The graph of few nodes, (m,) int, densely; pruned among themselves."""
        return Subgraph(self, nodes)

    # -- all edges, when asked for --

    @cached_property
    def tree(self) -> cKDTree:
        """A tree of the positions, (east, north, plane), in which planes are far apart."""
        return cKDTree(np.column_stack([self.east_m, self.north_m, self._plane * 4.0 * self.radius_m]))

    @cached_property
    def n_near(self) -> int:
        """How many pairs of images lie within the radius, however they face: counted, not listed."""
        return (int(self.tree.count_neighbors(self.tree, self.radius_m)) - len(self)) // 2

    @cached_property
    def _pairs(self) -> np.ndarray:
        """(E, 2) int32: pairs that geography joins, once each with i < j, in ascending order."""
        if self.n_near > MOST_EDGES:
            raise ValueError(
                f"{self.n_near:,} pairs of the {len(self):,} images lie within {self.radius_m:g} m, more than "
                f"{MOST_EDGES:,}: are these the positions, in metres?"
            )
        # The margin keeps pairs that rounding would lose; the exact test follows.
        reach = self.radius_m * (1 + 1e-9) + 1e-9
        i, j = self.tree.query_pairs(reach, output_type="ndarray").astype(np.int32).T
        joined = self._metres(i, j) <= self.radius_m
        if self.heading_deg is not None:
            joined &= heading_difference(self.heading_deg[i], self.heading_deg[j]) <= self.max_heading_deg
        order = np.lexsort((j, i))
        return np.column_stack([i, j])[order[joined[order]]]

    def _metres(self, i, j) -> np.ndarray:
        return np.sqrt((self.east_m[i] - self.east_m[j]) ** 2 + (self.north_m[i] - self.north_m[j]) ** 2)

    @cached_property
    def _values(self) -> dict[str, np.ndarray]:
        """``d_geo`` of every pair that geography joins; with descriptors ``d_vis`` and ``weight`` too, (E,) float64."""
        i, j = self._pairs.T
        values = {"d_geo": self._metres(i, j)}
        if self.descriptors is not None:
            rows = self.cluster if self._per_cluster else np.arange(len(self))
            values["d_vis"] = np.empty(len(i))
            step = max(1, (1 << 21) // np.shape(self.descriptors)[1])  # bounds the memory
            for at in range(0, len(i), step):
                part = slice(at, at + step)
                first, second = (self.descriptors[rows[end[part]]].astype(np.float64) for end in (i, j))
                values["d_vis"][part] = np.sqrt(np.einsum("ij,ij->i", first - second, first - second))
            values["weight"] = affinity(values["d_geo"], values["d_vis"], min_distance_m=self.min_distance_m)
        return values

    @cached_property
    def _kept(self) -> np.ndarray:
        """(E,) bool: which of the pairs pruning leaves; see `prune`."""
        kept = np.ones(len(self._pairs), dtype=bool)
        if self.descriptors is None:
            return kept
        weight = self._values["weight"]
        if self.tau is not None:
            kept = weight > self.tau
        if self.top_k is not None:
            ends = self._pairs[kept]
            node, other = np.concatenate([ends, ends[:, ::-1]]).T
            order = np.lexsort((other, -np.tile(weight[kept], 2), node))
            rank = np.empty(len(order), dtype=np.int64)
            rank[order] = np.arange(len(order)) - np.searchsorted(node[order], node[order])
            best = rank < self.top_k
            kept[kept] = best[: len(ends)] | best[len(ends) :]
        return kept

    def edges(self) -> np.ndarray:
        """(E, 2) int32: the edges that pruning left, once each with i < j, in ascending order."""
        return self._pairs[self._kept]

    def edge_values(self) -> dict[str, np.ndarray]:
        """``d_geo``, ``d_vis`` and ``weight`` of `edges`, in the same order."""
        return {name: values[self._kept] for name, values in self._values.items()}

    @property
    def n_edges(self) -> int:
        """Edges that pruning left, each counted once."""
        return int(self._kept.sum())

    @property
    def n_pruned(self) -> int:
        """Edges that pruning took away."""
        return len(self._kept) - self.n_edges

    def degrees(self) -> np.ndarray:
        """(n,) int64: the number of edges at each node."""
        return np.bincount(self.edges().ravel(), minlength=len(self))

    def components(self) -> np.ndarray:
        """(n,) int: the connected component of each node, numbered from 0."""
        i, j = self.edges().T
        matrix = sp.coo_array((np.ones(len(i)), (i, j)), shape=(len(self), len(self)))
        return sp.csgraph.connected_components(matrix, directed=False)[1]

    def clique_sizes(self, *, limit: int = 100_000) -> np.ndarray:
        """Sizes of the maximal cliques, at most `limit` of them: their number is exponential in the worst graph."""
        import networkx

        graph = networkx.empty_graph(len(self))
        graph.add_edges_from(self.edges().tolist())
        cliques = itertools.islice(networkx.find_cliques(graph), limit)
        return np.fromiter(map(len, cliques), dtype=np.int64)

    def statistics(self, *, clique_limit: int = 100_000) -> dict:
        """Counts of the graph as a dictionary of plain numbers."""
        degrees, sizes = self.degrees(), self.clique_sizes(limit=clique_limit)
        members = np.bincount(self.components())
        values = self.edge_values()
        result = {
            "nodes": len(self),
            "geographic_edges": len(self._pairs),
            "edges": self.n_edges,
            "pruned_edges": self.n_pruned,
            "isolated_nodes": int((degrees == 0).sum()),
            "mean_degree": float(degrees.mean()) if len(self) else 0.0,
            "max_degree": int(degrees.max(initial=0)),
            "components": len(members),
            "largest_component": int(members.max(initial=0)),
            "maximal_cliques": len(sizes),
            "largest_clique": int(sizes.max(initial=0)),
            "cliques_cut_at_limit": len(sizes) >= clique_limit,
        }
        result |= {
            f"mean_{name}": float(value.mean()) if len(value) else np.nan for name, value in values.items()
        }
        if "weight" in values:
            result["zero_weight_edges"] = int((values["weight"] == 0).sum())
        return result

    def compare(self, previous: GeoVisualGraph) -> dict:
        """What changed since `previous`, a graph of the same images: edges gained, lost and in both.

        Returns
        -------
        dict
            ``gained``, ``lost`` : (E, 2) arrays; ``n_gained``, ``n_lost``, ``n_common``; ``jaccard``, common edges
            over edges in either; with descriptors ``mean_weight_change`` over the common edges.
        """
        n = len(self)
        if len(previous) != n:
            raise ValueError(f"graphs of {len(previous)} and {n} images cannot be compared edge by edge")
        now, before = (graph.edges().astype(np.int64) @ np.array([n, 1]) for graph in (self, previous))
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
        if self.descriptors is not None and previous.descriptors is not None:
            after, first = self.edge_values()["weight"], previous.edge_values()["weight"]
            change = after[np.searchsorted(now, common)] - first[np.searchsorted(before, common)]
            result["mean_weight_change"] = float(change.mean()) if len(change) else 0.0
        return result


class Subgraph:
    """Few nodes of a `GeoVisualGraph` as dense matrices, each computed when first asked for.

    Attributes
    ----------
    nodes : (m,) int64
        Numbers in the graph; all matrices below are in this order.
    """

    def __init__(self, graph: GeoVisualGraph, nodes):
        self.graph, self.nodes = graph, np.asarray(nodes, dtype=np.int64)

    @cached_property
    def d_geo(self) -> np.ndarray:
        """(m, m) float64: metres; infinite between planes."""
        return self.graph.distances_m(self.nodes, self.nodes)

    @cached_property
    def near(self) -> np.ndarray:
        """(m, m) bool: which nodes lie within the radius of each other, themselves included, however they face."""
        return self.d_geo <= self.graph.radius_m

    @cached_property
    def joined(self) -> np.ndarray:
        """(m, m) bool: the geographic edges."""
        joined = self.near & ~np.eye(len(self.nodes), dtype=bool)
        if self.graph.heading_deg is not None:
            heading = self.graph.heading_deg[self.nodes]
            joined &= heading_difference(heading[:, None], heading) <= self.graph.max_heading_deg
        return joined

    @cached_property
    def d_vis(self) -> np.ndarray:
        """(m, m) float64: distances of the descriptors."""
        graph = self.graph
        if not graph._per_cluster:
            return visual_distances(graph.descriptors[self.nodes])
        cluster, position = np.unique(graph.cluster[self.nodes], return_inverse=True)
        return visual_distances(graph.descriptors[cluster])[position][:, position]

    @cached_property
    def weight(self) -> np.ndarray:
        """(m, m) float64: affinities of the edges that pruning leaves; minus infinity where there is no edge."""
        graph, weight = self.graph, np.full(self.joined.shape, -np.inf)
        d_geo, d_vis = self.d_geo[self.joined], self.d_vis[self.joined]
        weight[self.joined] = affinity(d_geo, d_vis, min_distance_m=graph.min_distance_m)
        return prune(weight, tau=graph.tau, top_k=graph.top_k)


# ------------------------------------------------------------------------------------------------
# Checks and columns
# ------------------------------------------------------------------------------------------------


def check_rules(radius_m, max_heading_deg, tau, top_k, min_distance_m) -> None:
    """Refuse rules of the graph that are out of range."""
    check("radius_m", radius_m, above=0)
    check("max_heading_deg", max_heading_deg, 0, 180, none=True)
    check("tau", tau, high=0, none=True)  # no affinity is above 0
    check("top_k", top_k, 1, whole=True, none=True)
    check("min_distance_m", min_distance_m, 0)


def check_finite(descriptors: np.ndarray, what: str, names=None) -> None:
    """Refuse descriptors, (m, D), with a NaN or an infinity; the sentence names the first, `what` and its number."""
    step = max(1, (1 << 23) // max(1, descriptors.shape[1]))
    for at in range(0, len(descriptors), step):
        bad = np.flatnonzero(~np.isfinite(descriptors[at : at + step]).all(axis=1)) + at
        if len(bad):
            raise ValueError(
                f"the descriptor of {what} {bad[0] if names is None else names[bad[0]]} holds a NaN or an infinity: "
                "mend the model that gave it (its weights may have diverged; try without autocast)"
            )


def _column(name: str, values, n: int) -> np.ndarray:
    values = np.asarray(values)
    if values.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},), one entry per image, got {values.shape}")
    return values.astype(str) if values.dtype == object else values


def _finite(name: str, values, n: int) -> np.ndarray:
    values = _column(name, values, n).astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise ValueError(
            f"{name} is {values[bad[0]]} at image {bad[0]} (and {len(bad) - 1} more of {n}): leave these out"
        )
    return values


def _numbered(*columns: np.ndarray) -> np.ndarray:
    """Number the distinct rows of some columns of labels from 0, in sorted order: (n,) int64."""
    code = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        values, inverse = np.unique(column, return_inverse=True)
        code = np.unique(code * len(values) + inverse, return_inverse=True)[1]
    return code
