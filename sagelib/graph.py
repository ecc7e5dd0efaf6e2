"""The geo-visual graph: images as nodes, metres and descriptors on the edges between them, and cliques in it.

Two images are joined when they lie within `radius_m` of each other (and, if asked, face the same way). An
edge carries ``d_geo`` in metres, ``d_vis`` between descriptors, and the affinity ``W = -(d_geo * d_vis)``:
never positive, and the nearer zero the closer the two images are. Pruning takes edges away by their affinity.
The images of one training place are a clique of this graph, chosen greedily by affinity.

The file reads in that order: rules and pruning, cliques, the greedy choice, and `GeoVisualGraph`, which pages
study and the sampler trains on. A few nodes are looked at densely (`GeoVisualGraph.subgraph`); all edges are
listed only when asked for, so a graph of millions of images costs no more than their positions.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import networkx as nx
import numpy as np
from scipy.spatial import cKDTree

from sagelib.places import heading_difference, same_grid
from sagelib.runs import check

__all__ = ["GeoVisualGraph", "GraphRules", "GreedyStep", "first_clique", "greedy_weighted_clique"]

SIGN = {"closest": 1.0, "farthest": -1.0, "random": 0.0}  # of the affinities that the greedy choice maximises
RENAMED = {"affine": "closest", "hard": "farthest", "uniform": "random"}
MOST_EDGES = 400_000_000  # listed at once
MOST_CLIQUES = 100_000  # counted: their number is exponential in the worst graph
SEARCH_STEPS = 20_000  # of one search for a clique; graphs of points within a radius need a few dozen


@dataclass(frozen=True, kw_only=True)
class GraphRules:
    """What decides about edges.

    Parameters
    ----------
    radius_m : float
        Images at most this far apart are joined; 25 m in the paper.
    max_heading_deg : float, optional
        Join only images whose headings differ by no more. None, as in the paper: any two.
    tau : float, optional
        Keep edges with ``W > tau``. The paper's value is not public; unit descriptors have ``W >= -50``.
    top_k : int, optional
        Of these, keep edges among the `top_k` best of either end; of equal ones, those to lower indices.
    min_distance_m : float
        A floor under ``d_geo``, which the paper has not: two photographs of one position have ``W = 0``, the
        best value of all, however different they look.
    """

    radius_m: float = 25.0
    max_heading_deg: float | None = None
    tau: float | None = None
    top_k: int | None = None
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
    """The (n, n) float64 matrix of Euclidean distances between all of few descriptors, (n, D).

    From inner products of differences to the first row: the common part of similar descriptors would cancel,
    and leave rounding instead of a distance. Distances below their resolution are zero.
    """
    away = np.subtract(descriptors, descriptors[:1], dtype=np.float64)
    inner = away @ away.T
    sums = np.add.outer(np.diagonal(inner), np.diagonal(inner))
    squared = sums - (inner + inner.T)
    squared[squared <= 1e-14 * sums] = 0.0
    return np.sqrt(squared)


# A set of nodes is an integer, bit i for node i: to intersect a few hundred nodes takes some 50 ns.


def adjacency_bits(matrix: np.ndarray) -> list[int]:
    """Rows of a boolean matrix as bit sets: bit j of entry i is ``matrix[i, j]``."""
    rows = np.packbits(matrix, axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in rows]


def nodes_of(bits: int) -> list[int]:
    """The nodes of a bit set, ascending."""
    nodes = []
    while bits:
        low = bits & -bits
        nodes.append(low.bit_length() - 1)
        bits ^= low
    return nodes


def first_clique(joined: list[int], alive: int, min_size: int, steps=SEARCH_STEPS) -> tuple[int, int]:
    """The first maximal clique of at least `min_size` nodes, by depth-first extension in node order.

    A clique is a set of nodes each two of which are joined; maximal, if no node of `alive` can be added to
    it. All sets are bit sets. Returns the clique, 0 if there is none, and `alive` without the nodes found to
    be in no such clique, from which a later search may begin. After `steps` the search gives up, for it is
    exponential in the worst graph: then there is no clique, but as many nodes left as one needs.

    As in Bron and Kerbosch (1973), but without their set of excluded nodes: a node is dropped only once no
    clique of `min_size` holds it, and then it cannot extend one either.
    """
    left = alive
    while left.bit_count() >= min_size:
        first = left & -left
        stack = [(first, 1, joined[first.bit_length() - 1] & left, False)]
        while stack:
            clique, size, common, failed = stack.pop()
            if size >= min_size:
                while common:  # straight on to a maximal one
                    low = common & -common
                    clique |= low
                    common &= joined[low.bit_length() - 1]
                return clique, left
            if failed:  # only nodes with enough neighbours left can matter
                for node in nodes_of(common):
                    if (joined[node] & common).bit_count() < min_size - size - 1:
                        common ^= 1 << node
            if size + common.bit_count() < min_size:
                continue
            if steps == 0:
                return 0, left
            steps -= 1
            low = common & -common
            stack.append((clique, size, common ^ low, True))
            stack.append((clique | low, size + 1, common & joined[low.bit_length() - 1], False))
        left ^= first
    return 0, left


def largest_clique(joined: list[int], alive: int, min_size: int, steps=SEARCH_STEPS) -> int:
    """A largest clique of at least `min_size` nodes, or 0: the first of that size, then one more, ...

    When a search runs out of `steps`, the largest found so far.
    """
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
    chosen: int | None  # None: there was no candidate, and the next seed follows


def check_prefer(prefer: str) -> str:
    """`prefer`, if it says what the greedy choice prefers."""
    if prefer in RENAMED:
        raise ValueError(f"prefer={prefer!r} is now called {RENAMED[prefer]!r}")
    return check("prefer", prefer, choices=tuple(SIGN))


def greedy_weighted_clique(
    weight: np.ndarray, k: int, *, prefer: str = "closest", steps: list | None = None
) -> np.ndarray | None:
    """A clique of `k` nodes, grown greedily from the node of highest mean affinity.

    The seed is ``argmax S(i)``, the mean of ``W_ij`` over the neighbours j of i; then, again and again, the
    node of highest mean affinity to the clique joins, among those with an edge to every member. When there is
    none before the clique has `k` nodes, the next best seed follows. Ties go to the lowest index.

    Parameters
    ----------
    weight : (n, n) float
        Symmetric; NaN or minus infinity where there is no edge. The diagonal is ignored.
    k : int
    prefer : {"closest", "farthest", "random"}
        Maximise the affinity (the paper), minimise it for far and dissimilar images of one place, or look at
        edges only: permute the nodes, and it is a random clique.
    steps : list, optional
        Every decision is appended, as `GreedyStep`.

    Returns
    -------
    (k,) int64 or None
        In the order chosen; None if no seed leads to `k` nodes, which does not prove that there is no clique.

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
        raise ValueError(f"weight must be a symmetric matrix, got shape {W.shape} and another transpose")

    def record(members: list[int], means: np.ndarray, chosen: int | None) -> None:
        if steps is not None:
            means = np.where(means > -np.inf, (sign or 1.0) * means, np.nan)
            steps.append(GreedyStep(tuple(members), means, chosen))

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
            gain = np.sort(W[clique], axis=0).mean(axis=0)  # -inf where an edge to any member is missing
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


class GeoVisualGraph:
    """Images as nodes, joined within a radius, with affinities between their descriptors on the edges.

    Parameters
    ----------
    east_m, north_m : (n,) float
        UTM positions in metres.
    city, place : (n,) str or int, optional
        Labels, those of places within a city. None: one city, or squares of side `radius_m`.
    utm_zone : (n,) str, optional
        Images of one zone lie in one plane, those of an unknown zone in their city's; images of different
        planes are never joined. A city in two zones is two.
    heading_deg : (n,) float, optional
        Needed by `max_heading_deg` only.
    descriptors : optional
        See `with_descriptors`. Without them the graph is geographic only.
    **rules
        Of `GraphRules`.

    Attributes
    ----------
    city, cluster : (n,) int64
        The city of each image, numbered from 0 by label, and its place, numbered by city and label.
    """

    def __init__(self, east_m, north_m, *, city=None, utm_zone=None, place=None, heading_deg=None,
                 descriptors=None, **rules):  # fmt: skip
        self.rules, n = GraphRules(**rules), np.size(east_m)
        self.east_m, self.north_m = _column("east_m", east_m, n, float), _column("north_m", north_m, n, float)
        self.heading_deg = np.zeros(n)
        if self.rules.max_heading_deg is not None:
            if heading_deg is None:
                raise ValueError("max_heading_deg needs heading_deg, one heading per image")
            self.heading_deg = _column("heading_deg", heading_deg, n, float)
        grid = same_grid(np.full(n, "") if utm_zone is None else _column("utm_zone", utm_zone, n))
        self.city = _numbered(np.zeros(n) if city is None else _column("city", city, n), grid)
        self._plane = _numbered(np.where(grid == "", self.city, -1), grid)
        squares = [np.floor(metres / self.rules.radius_m) for metres in (self.east_m, self.north_m)]
        self.cluster = _numbered(self.city, *(squares if place is None else [_column("place", place, n)]))
        self._describe(descriptors)

    @classmethod
    def from_places(cls, places, descriptors=None, **rules) -> GeoVisualGraph:
        """The graph of a `Places` table; its place labels count if every image has one."""
        columns = {name: getattr(places, name) for name in ("city", "utm_zone", "heading_deg")}
        place = places.place if (places.place >= 0).all() else None
        return cls(places.east_m, places.north_m, place=place, descriptors=descriptors, **columns, **rules)

    def with_descriptors(self, descriptors) -> GeoVisualGraph:
        """The same nodes and rules with other descriptors, kept by reference.

        An array (n, D), one row per image, or (n_clusters, D), one per cluster in the numbering of `cluster`;
        any other object that an array of nodes indexes; or None.
        """
        graph = self.subgraph(slice(None))
        graph._describe(descriptors)
        return graph

    def _describe(self, descriptors) -> None:
        self.descriptors, self._row, n = descriptors, np.arange(len(self)), len(self)
        if isinstance(descriptors, np.ndarray):
            clusters = int(self.cluster.max(initial=-1)) + 1
            if descriptors.ndim != 2 or len(descriptors) not in (n, clusters):
                shapes = f"({n}, D), one row per image, or ({clusters}, D), one per cluster"
                raise ValueError(f"descriptors must have shape {shapes}, got {descriptors.shape}")
            check_finite(descriptors, "image" if len(descriptors) == n else "cluster")
            if len(descriptors) != n:
                self._row = self.cluster

    def __len__(self) -> int:
        return len(self.east_m)

    def distances_m(self, i, j) -> np.ndarray:
        """Metres between nodes `i` and `j`, arrays that broadcast; infinite between planes."""
        metres = np.square(self.east_m[i] - self.east_m[j])
        metres += np.square(self.north_m[i] - self.north_m[j])
        np.sqrt(metres, out=metres)
        metres[self._plane[i] != self._plane[j]] = np.inf
        return metres

    def subgraph(self, nodes) -> GeoVisualGraph:
        """The graph of some nodes in their order. Its matrices (n, n) are for few nodes."""
        graph = copy.copy(self)
        columns = ("east_m", "north_m", "heading_deg", "city", "cluster", "_plane", "_row")
        graph.__dict__ = {name: getattr(self, name)[nodes] for name in columns}
        graph.rules, graph.descriptors = self.rules, self.descriptors
        return graph

    @cached_property
    def d_geo(self) -> np.ndarray:
        """(n, n) float64: metres, infinite between planes."""
        nodes = np.arange(len(self))
        return self.distances_m(nodes[:, None], nodes)

    @cached_property
    def near(self) -> np.ndarray:
        """(n, n) bool: the nodes within the radius of each other, themselves included, however they face."""
        return self.d_geo <= self.rules.radius_m

    @cached_property
    def joined(self) -> np.ndarray:
        """(n, n) bool: the nodes that geography joins."""
        joined = self.near.copy()
        np.fill_diagonal(joined, False)
        if self.rules.max_heading_deg is not None:
            turn = heading_difference(self.heading_deg[:, None], self.heading_deg)
            joined &= turn <= self.rules.max_heading_deg
        return joined

    @cached_property
    def d_vis(self) -> np.ndarray:
        """(n, n) float64: distances of the descriptors."""
        row, position = np.unique(self._row, return_inverse=True)  # nodes of a cluster may share one
        return visual_distances(self.descriptors[row])[position][:, position]

    @cached_property
    def weight(self) -> np.ndarray:
        """(n, n) float64: affinities of the edges that pruning leaves; minus infinity where there is none."""
        i, j = self.joined.nonzero()
        weight = np.full(self.joined.shape, -np.inf)
        weight[i, j] = self.rules.affinity(self.d_geo[i, j], self.d_vis[i, j])
        if self.rules.tau is not None or self.rules.top_k is not None:
            i, j = i[i < j], j[i < j]
            pruned = ~self.rules.kept(i, j, weight[i, j])
            weight[i[pruned], j[pruned]] = weight[j[pruned], i[pruned]] = -np.inf
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
    def _pairs(self) -> np.ndarray:  # (E, 2) that geography joins
        radius, most = self.rules.radius_m, self.rules.max_heading_deg
        if self.n_near > MOST_EDGES:
            raise ValueError(f"{self.n_near:,} pairs within {radius:g} m: are these positions in metres?")
        # The margin keeps pairs that rounding would lose; the exact test follows.
        pairs = self.tree.query_pairs(radius * (1 + 1e-9) + 1e-9, output_type="ndarray").astype(np.int32)
        i, j = pairs.T
        joined = self.distances_m(i, j) <= radius
        if most is not None:
            joined &= heading_difference(self.heading_deg[i], self.heading_deg[j]) <= most
        order = np.lexsort((j, i))
        return pairs[order[joined[order]]]

    @cached_property
    def _edges(
        self,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:  # what pruning leaves of them, and its values
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

    @property
    def n_edges(self) -> int:
        """Edges that pruning left."""
        return len(self.edges())

    def degrees(self) -> np.ndarray:
        """(n,) int64: the number of edges at each node."""
        return np.bincount(self.edges().ravel(), minlength=len(self))

    def to_networkx(self) -> nx.Graph:
        """Nodes and edges, to ask anything of: ``networkx.find_cliques(graph.to_networkx())``."""
        graph = nx.empty_graph(len(self))
        graph.add_edges_from(self.edges().tolist())
        return graph

    def statistics(self) -> dict:
        """Counts of the graph as a dictionary of plain numbers."""
        degrees, values, graph = self.degrees(), self.edge_values(), self.to_networkx()
        sizes = [len(clique) for clique in itertools.islice(nx.find_cliques(graph), MOST_CLIQUES)]
        components = [len(nodes) for nodes in nx.connected_components(graph)]
        result = {"nodes": len(self), "geographic_edges": len(self._pairs), "edges": self.n_edges}
        result |= {
            "pruned_edges": len(self._pairs) - self.n_edges,
            "isolated_nodes": int((degrees == 0).sum()),
        }
        result |= {"max_degree": int(degrees.max(initial=0)), "components": len(components)}
        result |= {"largest_component": max(components, default=0), "maximal_cliques": len(sizes)}
        result |= {
            "largest_clique": max(sizes, default=0),
            "cliques_cut_at_limit": len(sizes) >= MOST_CLIQUES,
        }
        if "weight" in values:
            result["zero_weight_edges"] = int((values["weight"] == 0).sum())
        values["degree"] = degrees
        return result | {f"mean_{name}": float(value.mean()) for name, value in values.items() if len(value)}

    def compare(self, previous: GeoVisualGraph) -> dict:
        """Edges gained and lost since `previous`, a graph of the same images, and the Jaccard index."""
        now, before = ({*map(tuple, graph.edges().tolist())} for graph in (self, previous))
        common = len(now & before)
        counts = {"n_gained": len(now) - common, "n_lost": len(before) - common, "n_common": common}
        return counts | {"jaccard": common / len(now | before) if now | before else 1.0}


def check_finite(descriptors: np.ndarray, what: str, names=None) -> None:
    """Refuse descriptors, (m, D), with a NaN or an infinity; the sentence says which `what` has the first."""
    for at in range(0, len(descriptors), 1024):  # bounds the memory
        for i in np.flatnonzero(~np.isfinite(descriptors[at : at + 1024]).all(axis=1)) + at:
            raise ValueError(
                f"the descriptor of {what} {i if names is None else names[i]} holds a NaN or an infinity: "
                "mend the model that gave it (its weights may have diverged; try without autocast)"
            )


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
