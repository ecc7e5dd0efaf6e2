"""The geo-visual graph of images, cliques in it, and the greedy choice of images among them.

Two images are joined when they lie within `radius_m` of each other (and, if asked, face the same way). An
edge carries ``d_geo`` in metres, ``d_vis`` between descriptors, and the affinity ``W = -(d_geo * d_vis)``:
never positive, and nearest zero for the closest images. Pruning takes edges away by their affinity. The
images of one training place are a clique of this graph, chosen greedily by affinity. All edges are listed
only when asked for: a graph of millions of images costs no more than their positions.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import networkx as nx
import numpy as np
from scipy.spatial import cKDTree

from sagelib.places import heading_difference, same_grid
from sagelib.runs import check

SIGN = {"closest": 1.0, "farthest": -1.0, "random": 0.0}  # of the affinities that the greedy choice maximises
MOST_EDGES = 400_000_000  # listed at once
SEARCH_STEPS = 20_000  # of one search for a clique; graphs of points within a radius need a few dozen


@dataclass(frozen=True, kw_only=True)
class GraphRules:
    """What decides about edges. The defaults are the paper's, whose `tau` is not public."""

    radius_m: float = 25.0  # images at most this far apart are joined
    max_heading_deg: float | None = None  # join only images whose headings differ by no more
    tau: float | None = None  # keep edges with W > tau; descriptors of length 1 have W >= -2 radius_m
    top_k: int | None = None  # of these, keep the best of either end; of equal ones, those to lower indices
    # A floor under d_geo: two photographs of one position have W = 0, the best value, however they look.
    min_distance_m: float = 0.0

    def __post_init__(self) -> None:
        check("radius_m", self.radius_m, above=0)
        check("max_heading_deg", self.max_heading_deg, 0, 180, none=True)
        check("tau", self.tau, high=0, none=True)  # no affinity is above 0
        check("top_k", self.top_k, 1, whole=True, none=True)
        check("min_distance_m", self.min_distance_m, 0)

    def graph_options(self) -> dict:
        """These rules alone: ``GeoVisualGraph.from_places(places, **config.graph_options())``."""
        return {field.name: getattr(self, field.name) for field in fields(GraphRules)}

    def affinity(self, d_geo: np.ndarray, d_vis: np.ndarray) -> np.ndarray:
        """``W = -(d_geo * d_vis)``."""
        return -(np.maximum(d_geo, self.min_distance_m) * d_vis)

    def kept(self, i: np.ndarray, j: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """Which of the edges (i, j), given once each, pruning leaves: (E,) bool."""
        kept = np.ones(len(weight), dtype=bool) if self.tau is None else weight > self.tau
        if self.top_k is not None:
            node, other = np.stack([[i, j], [j, i]], axis=1)[:, :, kept].reshape(2, -1)
            order = np.lexsort((other, -np.tile(weight[kept], 2), node))
            rank = np.empty(len(order), dtype=np.int64)  # of an edge among those of its node
            rank[order] = np.arange(len(order)) - np.searchsorted(node[order], node[order])
            kept[kept] = (rank < self.top_k).reshape(2, -1).any(axis=0)
        return kept


def visual_distances(descriptors: np.ndarray) -> np.ndarray:
    """(n, n) float64: Euclidean distances between a few descriptors, (n, D); zero below their resolution."""
    # From inner products of differences to the first row: those of similar descriptors would cancel.
    away = np.subtract(descriptors, descriptors[:1], dtype=np.float64)
    inner = away @ away.T
    sums = np.add.outer(np.diagonal(inner), np.diagonal(inner))
    squared = sums - (inner + inner.T)
    squared[squared <= 1e-14 * sums] = 0.0
    return np.sqrt(squared)


def adjacency_bits(matrix: np.ndarray) -> list[int]:
    """Rows of a boolean matrix as sets of nodes, integers with bit j for node j, which intersect in 50 ns."""
    rows = np.packbits(matrix, axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in rows]


def nodes_of(bits: int) -> list[int]:
    """The nodes of a bit set, ascending."""
    return [node for node, bit in enumerate(reversed(f"{bits:b}")) if bit == "1"]


def first_clique(joined: list[int], alive: int, min_size: int, steps=SEARCH_STEPS) -> tuple[int, int]:
    """The first maximal clique of at least `min_size` nodes, by depth-first extension in node order.

    A clique is a set of nodes each two of which are joined; maximal, if no node of `alive` can be added to
    it. Returns the clique, 0 if there is none, and `alive` without the nodes found to be in no such clique,
    for a later search. After `steps` the search, exponential in the worst graph, gives up: there is none.
    As Bron and Kerbosch (1973), but without their set of excluded nodes: a node is dropped once no clique of
    `min_size` holds it, and then it cannot extend one either.
    """
    while alive.bit_count() >= min_size:
        first = alive & -alive
        stack = [(first, 1, joined[first.bit_length() - 1] & alive, False)]
        while stack:
            clique, size, common, failed = stack.pop()
            if size >= min_size:
                while common:  # straight on to a maximal one
                    low = common & -common
                    clique |= low
                    common &= joined[low.bit_length() - 1]
                return clique, alive
            if failed:  # only nodes with enough neighbours left can matter
                for node in nodes_of(common):
                    if (joined[node] & common).bit_count() < min_size - size - 1:
                        common ^= 1 << node
            if size + common.bit_count() < min_size:
                continue
            if steps == 0:
                return 0, alive
            steps -= 1
            low = common & -common
            stack.append((clique, size, common ^ low, True))
            stack.append((clique | low, size + 1, common & joined[low.bit_length() - 1], False))
        alive ^= first
    return 0, alive


def largest_clique(joined: list[int], alive: int, min_size: int, steps=SEARCH_STEPS) -> int:
    """A largest clique of at least `min_size` nodes, or 0; after `steps` in vain the last found."""
    best = 0
    while True:
        clique, alive = first_clique(joined, alive, max(min_size, best.bit_count() + 1), steps)
        if not clique:
            return best
        best = clique


class GreedyStep(NamedTuple):
    """One decision of the greedy choice."""

    members: tuple[int, ...]  # the clique so far; empty when a seed is chosen
    means: np.ndarray  # (n,) mean affinity to the members, or to the neighbours for a seed; NaN: no candidate
    chosen: int | None  # None: no candidate, and the next seed follows


def greedy_weighted_clique(weight: np.ndarray, k: int, *, prefer: str = "closest",
                           steps: list | None = None) -> np.ndarray | None:  # fmt: skip
    """A clique of `k` nodes, grown greedily from the node of highest mean affinity.

    The seed is ``argmax S(i)``, the mean of ``W_ij`` over the neighbours j of i; then, again and again, the
    node of highest mean affinity to the clique joins, among those with an edge to every member. If there is
    none, the next best seed follows. Ties go to the lowest index.

    Parameters
    ----------
    weight : (n, n) float, symmetric; NaN or minus infinity where there is no edge; the diagonal is ignored
    k : int
    prefer : {"closest", "farthest", "random"}, to maximise (the paper), minimise or ignore the affinity
    steps : list, to which every `GreedyStep` is appended

    Returns
    -------
    (k,) int64, in the order chosen, or None if no seed leads to `k` nodes, though there may be such a clique

    Examples
    --------
    >>> weight = np.array([[0, -1, -5, np.nan], [-1, 0, -2, -9], [-5, -2, 0, -9], [np.nan, -9, -9, 0]])
    >>> greedy_weighted_clique(weight, 3).tolist()
    [0, 1, 2]
    """
    sign, k = SIGN[check("prefer", prefer, choices=tuple(SIGN))], check("k", k, 1, whole=True)
    edge = np.asarray(weight) > -np.inf
    np.fill_diagonal(edge, False)
    W = np.where(edge, sign * np.where(edge, weight, 0.0), -np.inf)
    if not np.array_equal(W, W.T):
        raise ValueError(f"weight must be a symmetric matrix, got shape {W.shape} and another transpose")
    # Sums over sorted values: equal sets of affinities have equal means, whatever the order of the nodes.
    degree = edge.sum(axis=1)
    S = np.sort(np.where(edge, W, 0.0), axis=1).sum(axis=1) / np.maximum(degree, 1)
    lowest = np.finfo(float).min
    S[degree == 0] = -np.inf if k > 1 else lowest  # a place of one image needs no edge
    while (S > -np.inf).any():
        clique: list[int] = []
        while len(clique) < k:
            # Minus infinity where an edge to any member is missing.
            means = np.sort(W[clique], axis=0).mean(axis=0) if clique else S
            best = int(means.argmax())
            chosen = best if means[best] > -np.inf else None
            if steps is not None:
                shown = np.where(means > lowest, (sign or 1.0) * means, np.nan)
                steps.append(GreedyStep(tuple(clique), shown, chosen))
            if chosen is None:
                S[clique[0]] = -np.inf
                break
            clique.append(chosen)
        else:
            return np.array(clique, dtype=np.int64)
    return None


class GeoVisualGraph:
    """Images as nodes, joined within a radius, with affinities between their descriptors on the edges.

    Parameters
    ----------
    east_m, north_m : (n,) float, UTM metres
    city, place : (n,) str or int, labels, of places within a city; None: one city, squares of `radius_m`
    utm_zone : (n,) str, optional
        Images of one zone lie in one plane, those of an unknown zone in their city's; images of different
        planes are never joined. A city in two zones is two.
    heading_deg : (n,) float, for `max_heading_deg`
    descriptors : optional, see `with_descriptors`
    **rules : of `GraphRules`

    Attributes
    ----------
    city, cluster : (n,) int64, the city and the place of each image, numbered from 0 in order of the labels
    """

    def __init__(self, east_m, north_m, *, city=None, utm_zone=None, place=None, heading_deg=None,
                 descriptors=None, **rules):  # fmt: skip
        self.rules, n = GraphRules(**rules), np.size(east_m)
        self.east_m, self.north_m = _column("east_m", east_m, n, float), _column("north_m", north_m, n, float)
        turns = self.rules.max_heading_deg is not None
        if turns and heading_deg is None:
            raise ValueError("max_heading_deg needs heading_deg, one heading per image")
        self.heading_deg = _column("heading_deg", heading_deg if turns else np.zeros(n), n, float)
        grid = same_grid(np.full(n, "") if utm_zone is None else _column("utm_zone", utm_zone, n))
        self.city = _numbered(np.zeros(n) if city is None else _column("city", city, n), grid)
        self._plane = _numbered(np.where(grid == "", self.city, -1), grid)
        squares = [np.floor(metres / self.rules.radius_m) for metres in (self.east_m, self.north_m)]
        self.cluster = _numbered(self.city, *(squares if place is None else [_column("place", place, n)]))
        self._describe(descriptors)

    def __len__(self) -> int:
        return len(self.east_m)

    @classmethod
    def from_places(cls, places, descriptors=None, **rules) -> GeoVisualGraph:
        """The graph of a `Places` table; its place labels count if every image has one."""
        columns = {name: getattr(places, name) for name in ("city", "utm_zone", "heading_deg")}
        place = places.place if (places.place >= 0).all() else None
        return cls(places.east_m, places.north_m, place=place, descriptors=descriptors, **columns, **rules)

    def with_descriptors(self, descriptors) -> GeoVisualGraph:
        """The same nodes and rules with other descriptors, kept by reference.

        An array (n, D), or (n_clusters, D) by `cluster`; any object that an array of nodes indexes; or None.
        """
        return self.subgraph(slice(None))._describe(descriptors)

    def _describe(self, descriptors) -> GeoVisualGraph:
        n, clusters = len(self), int(self.cluster.max(initial=-1)) + 1
        self.descriptors, self._row = descriptors, np.arange(n)
        if isinstance(descriptors, np.ndarray):
            if descriptors.ndim != 2 or len(descriptors) not in (n, clusters):
                shapes = f"({n}, D), one row per image, or ({clusters}, D), one per cluster"
                raise ValueError(f"descriptors must have shape {shapes}, got {descriptors.shape}")
            check_finite(descriptors, "image" if len(descriptors) == n else "cluster")
            self._row = self._row if len(descriptors) == n else self.cluster
        return self

    def distances_m(self, i, j) -> np.ndarray:
        """Metres between nodes `i` and `j`, arrays that broadcast; infinite between planes."""
        metres = np.sqrt((self.east_m[i] - self.east_m[j]) ** 2 + (self.north_m[i] - self.north_m[j]) ** 2)
        metres[self._plane[i] != self._plane[j]] = np.inf
        return metres

    def _facing(self, i, j) -> np.ndarray | bool:
        """Whether nodes `i` and `j` face the same way, as far as the rules ask."""
        most = self.rules.max_heading_deg
        return most is None or heading_difference(self.heading_deg[i], self.heading_deg[j]) <= most

    def subgraph(self, nodes) -> GeoVisualGraph:
        """The graph of some nodes in their order. Its matrices (n, n) are for few nodes."""
        graph = object.__new__(GeoVisualGraph)
        graph.rules, graph.descriptors = self.rules, self.descriptors
        for name in ("east_m", "north_m", "heading_deg", "city", "cluster", "_plane", "_row"):
            setattr(graph, name, getattr(self, name)[nodes])
        return graph

    @cached_property
    def d_geo(self) -> np.ndarray:
        """(n, n) float64: metres, infinite between planes."""
        return self.distances_m(*np.ogrid[: len(self), : len(self)])

    @cached_property
    def joined(self) -> np.ndarray:
        """(n, n) bool: the nodes that geography joins."""
        joined = (self.d_geo <= self.rules.radius_m) & self._facing(*np.ogrid[: len(self), : len(self)])
        np.fill_diagonal(joined, False)
        return joined

    @cached_property
    def d_vis(self) -> np.ndarray:
        """(n, n) float64: distances of the descriptors."""
        row, position = np.unique(self._row, return_inverse=True)  # nodes of a cluster may share one
        return visual_distances(self.descriptors[row])[position][:, position]

    @cached_property
    def weight(self) -> np.ndarray:
        """(n, n) float64: affinities of the edges that pruning leaves; minus infinity where there is none."""
        i, j = np.triu(self.joined).nonzero()
        affinity = self.rules.affinity(self.d_geo[i, j], self.d_vis[i, j])
        kept = self.rules.kept(i, j, affinity)
        weight = np.full(self.joined.shape, -np.inf)
        weight[i[kept], j[kept]] = weight[j[kept], i[kept]] = affinity[kept]
        return weight

    @cached_property
    def tree(self) -> cKDTree:
        """A tree of the positions, (east, north, plane), in which planes are far apart."""
        return cKDTree(np.column_stack([self.east_m, self.north_m, self._plane * 4.0 * self.rules.radius_m]))

    @cached_property
    def n_near(self) -> int:
        """How many pairs of images lie within the radius, however they face: counted, not listed."""
        return (int(self.tree.count_neighbors(self.tree, self.rules.radius_m)) - len(self)) // 2

    @cached_property
    def _pairs(self) -> np.ndarray:
        """(E, 2) int32: the pairs that geography joins."""
        radius = self.rules.radius_m
        if self.n_near > MOST_EDGES:
            raise ValueError(f"{self.n_near:,} pairs within {radius:g} m: are these positions in metres?")
        # The margin keeps pairs that rounding would lose; the exact test follows.
        pairs = self.tree.query_pairs(radius * (1 + 1e-9) + 1e-9, output_type="ndarray").astype(np.int32)
        pairs = pairs[np.lexsort(pairs.T[::-1])]
        return pairs[(self.distances_m(*pairs.T) <= radius) & self._facing(*pairs.T)]

    @cached_property
    def _edges(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The pairs that pruning leaves, and their values."""
        i, j = self._pairs.T
        values = {"d_geo": self.distances_m(i, j)}
        if self.descriptors is None:
            return self._pairs, values
        d_vis = np.empty(len(i))
        for part in (slice(at, at + 256) for at in range(0, len(i), 256)):  # bounds the memory
            first, second = (self.descriptors[self._row[end[part]]].astype(np.float64) for end in (i, j))
            d_vis[part] = np.linalg.norm(first - second, axis=1)
        values |= {"d_vis": d_vis, "weight": self.rules.affinity(values["d_geo"], d_vis)}
        kept = self.rules.kept(i, j, values["weight"])
        return self._pairs[kept], {name: value[kept] for name, value in values.items()}

    def edges(self) -> np.ndarray:
        """(E, 2) int32: the edges that pruning left, once each with i < j, in ascending order."""
        return self._edges[0]

    def edge_values(self) -> dict[str, np.ndarray]:
        """``d_geo`` and, with descriptors, ``d_vis`` and ``weight`` of `edges`, in the same order."""
        return dict(self._edges[1])

    n_edges = property(lambda self: len(self.edges()), doc="How many edges pruning left.")

    def degrees(self) -> np.ndarray:
        """(n,) int64: the number of edges at each node."""
        return np.bincount(self.edges().ravel(), minlength=len(self))

    def to_networkx(self) -> nx.Graph:
        """Nodes and edges, to ask anything of: ``networkx.find_cliques(graph.to_networkx())``."""
        graph = nx.empty_graph(len(self))
        graph.add_edges_from(self.edges().tolist())
        return graph


def check_finite(descriptors: np.ndarray, what: str, names=None) -> None:
    """Refuse descriptors, (m, D), with a NaN or an infinity; the sentence names the first `what`."""
    for at in range(0, len(descriptors), 1024):  # bounds the memory
        for i in np.flatnonzero(~np.isfinite(descriptors[at : at + 1024]).all(axis=1)) + at:
            name = i if names is None else names[i]
            raise ValueError(f"the descriptor of {what} {name} holds a NaN or infinity: training diverged?")


def _column(name: str, values, n: int, kind: type | None = None) -> np.ndarray:
    values = np.asarray(values, kind)
    if values.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},), one entry per image, got {values.shape}")
    for i in np.flatnonzero(~np.isfinite(values)) if kind is float else ():
        raise ValueError(f"{name} is {values[i]} at image {i}: leave out images without it")
    return values.astype(str) if values.dtype == object else values


def _numbered(*columns: np.ndarray) -> np.ndarray:
    """Number the distinct rows of some columns of labels from 0, in sorted order: (n,) int64."""
    code = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        values, inverse = np.unique(column, return_inverse=True)
        code = np.unique(code * len(values) + inverse, return_inverse=True)[1]
    return code
