"""The method in a hundred lines: a plain clique sampler, as one writes it with pandas and networkx.

It does what `sagelib.sampler` does with ``node_descriptor="cluster"``, and is slow: each draw takes distances
to a whole city and to all pairs of its candidates, and every place starts a new search for a clique.
"""

import networkx as nx
import numpy as np
import pandas as pd


class PlainSampler:
    """Batches from a table with columns ``east``, ``north``, ``city``, ``cluster``; a descriptor per cluster.

    Parameters
    ----------
    images : pandas.DataFrame
        One row per image.
    descriptors : (n_clusters, D) array
        In the order of the sorted pairs (city, cluster).
    """

    def __init__(
        self, images, descriptors, *, places=30, per_place=4, similar=15, radius_m=25.0, min_clique=10, seed=0
    ):
        self.images = images
        self.groups = images.groupby(["city", "cluster"]).indices
        self.keys = pd.DataFrame(sorted(self.groups), columns=["city", "cluster"])
        self.descriptors = descriptors
        self.places, self.per_place, self.similar = places, per_place, similar
        self.radius_m, self.min_clique = radius_m, min_clique
        self.random = np.random.default_rng(seed)

    def draw(self) -> list[int]:
        """The clusters of one draw: a random one, and others of its city by similarity."""
        seed = int(self.random.integers(len(self.keys)))
        city = self.keys.index[self.keys.city == self.keys.city[seed]].to_numpy()
        unit = self.descriptors[city] / np.linalg.norm(self.descriptors[city], axis=1, keepdims=True)
        distance = 1 - unit @ unit[np.searchsorted(city, seed)]
        weight = np.where(city == seed, 0.0, distance.max() - distance)
        others = self.random.choice(
            city, min(self.similar, int((weight > 0).sum())), replace=False, p=weight / weight.sum()
        )
        return [seed, *others.tolist()]

    def graph(self, clusters, gone: set) -> nx.Graph:
        """Images of the clusters that have not left the batch, joined within the radius."""
        rows = [i for c in clusters for i in self.groups[tuple(self.keys.loc[c])] if i not in gone]
        points = self.images.iloc[rows][["east", "north"]].to_numpy()
        metres = np.linalg.norm(points[:, None] - points, axis=2)
        graph = nx.Graph()
        graph.add_nodes_from(rows)
        graph.add_edges_from((rows[i], rows[j]) for i, j in np.argwhere(np.triu(metres <= self.radius_m, 1)))
        return graph

    def choose(self, clique) -> list[int] | None:
        """Greedy weighted choice of `per_place` images of a clique; W = -(metres * d_vis)."""
        clique = list(self.random.permutation(clique))
        points = self.images.iloc[clique][["east", "north"]].to_numpy()
        owner = pd.MultiIndex.from_frame(self.images.iloc[clique][["city", "cluster"]])
        rows = pd.Index(pd.MultiIndex.from_frame(self.keys)).get_indexer(owner)
        descriptor = {row: self.descriptors[row].astype(np.float64) for row in set(rows)}
        graph = nx.Graph()
        for i in range(len(clique)):
            for j in range(i):
                d_vis = np.linalg.norm(descriptor[rows[i]] - descriptor[rows[j]])
                graph.add_edge(i, j, weight=-np.linalg.norm(points[i] - points[j]) * d_vis)
        mean = {i: np.mean([edge["weight"] for edge in graph[i].values()]) for i in graph}
        for seed in sorted(graph, key=lambda i: (-mean[i], i)):
            chosen = [seed]
            while len(chosen) < self.per_place:
                joined = set.intersection(*(set(graph[i]) for i in chosen)) - set(chosen)
                if not joined:
                    break
                gain = {c: np.mean([graph[c][i]["weight"] for i in chosen]) for c in joined}
                chosen.append(min(joined, key=lambda c: (-gain[c], c)))
            if len(chosen) == self.per_place:
                return [int(clique[i]) for i in chosen]
        return None

    def batch(self) -> list[int]:
        """One batch, place by place."""
        batch: list[int] = []
        gone: set[int] = set()
        while len(batch) < self.places * self.per_place:
            graph = self.graph(self.draw(), gone)
            while len(batch) < self.places * self.per_place:
                clique = next((c for c in nx.find_cliques(graph) if len(c) >= self.min_clique), None)
                if clique is None:
                    break
                chosen = self.choose(clique)
                batch += chosen
                for i in chosen:
                    near = np.hypot(
                        self.images.east - self.images.east[i], self.images.north - self.images.north[i]
                    )
                    same = self.images.city == self.images.city[i]
                    gone |= set(np.flatnonzero((near <= self.radius_m) & same).tolist())
                graph.remove_nodes_from(gone & set(graph))
        return batch
