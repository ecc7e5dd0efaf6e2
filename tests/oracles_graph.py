"""Slow, obvious versions of the graph and the greedy choice, in float64 and loops, to compare with."""

import itertools
import math

import networkx as nx
import numpy as np


def turn_deg(a: float, b: float) -> float:
    difference = abs(a - b) % 360.0
    return min(difference, 360.0 - difference)


def all_pairs(east, north, radius_m, heading=None, max_heading_deg=None) -> set[tuple[int, int]]:
    """Every pair i < j within the radius, by looking at all of them."""
    return {
        (i, j)
        for i, j in itertools.combinations(range(len(east)), 2)
        if math.sqrt((east[i] - east[j]) ** 2 + (north[i] - north[j]) ** 2) <= radius_m
        and (max_heading_deg is None or turn_deg(heading[i], heading[j]) <= max_heading_deg)
    }


def affinity(east, north, descriptors, i: int, j: int, min_distance_m: float = 0.0) -> float:
    """W of one pair, from its definition."""
    d_geo = math.sqrt((float(east[i]) - float(east[j])) ** 2 + (float(north[i]) - float(north[j])) ** 2)
    d_vis = math.sqrt(
        math.fsum((float(a) - float(b)) ** 2 for a, b in zip(descriptors[i], descriptors[j], strict=True))
    )
    return -(max(d_geo, min_distance_m) * d_vis)


def prune(weight: dict, n: int, tau=None, top_k=None) -> dict:
    """`weight`: {(i, j): W} with both directions. Edges that survive, the same way."""
    left = {pair: w for pair, w in weight.items() if tau is None or w > tau}
    if top_k is None:
        return left
    keep = set()
    for i in range(n):
        mine = sorted((-w, b) for (a, b), w in left.items() if a == i)
        for _, j in mine[:top_k]:
            keep |= {(i, j), (j, i)}
    return {pair: w for pair, w in left.items() if pair in keep}


def greedy(weight: dict, n: int, k: int, prefer: str = "closest") -> list[int] | None:
    """The greedy weighted clique from its description; `weight` as for `prune`. Means are exactly rounded."""

    def mean(values):
        values = [0.0 if prefer == "random" else v for v in values]
        total = math.fsum(values) / len(values)
        return -total if prefer == "farthest" else total

    score = {i: mean([w for (a, _), w in weight.items() if a == i]) for i in {a for a, _ in weight}}
    for seed in sorted(score, key=lambda i: (-score[i], i)):
        clique = [seed]
        while len(clique) < k:
            joined = [
                c for c in range(n) if c not in clique and all((c, member) in weight for member in clique)
            ]
            if not joined:
                break
            gain = {c: mean([weight[c, member] for member in clique]) for c in joined}
            clique.append(min(joined, key=lambda c: (-gain[c], c)))
        if len(clique) == k:
            return clique
    return None


def as_dict(matrix) -> dict:
    """A dense weight matrix (NaN or -inf: no edge) as {(i, j): W}."""
    n = len(matrix)
    return {
        (i, j): float(matrix[i][j])
        for i in range(n)
        for j in range(n)
        if i != j and np.isfinite(matrix[i][j])
    }


def graph_of(pairs, n: int) -> nx.Graph:
    graph = nx.Graph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from(pairs)
    return graph
