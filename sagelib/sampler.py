"""Training batches: draw places that look alike, harvest cliques of their images, choose K of each.

`CliqueSampler` mines batches of P places x K images from the geo-visual graph; `PlaceSampler` draws them from
labelled places. Both are batch samplers for a ``torch.utils.data.DataLoader``: iterating yields lists of
image indices, place by place. A batch of `CliqueSampler` is made so:

1. *Draw places.* A city with probability proportional to its number of places, one place in it, and
   `similar_places` more with probability proportional to ``d_max - d`` of their descriptors.
2. *Harvest cliques.* The images of these places, joined by geography, form a graph; its first clique of at
   least `min_clique` images is taken.
3. *Describe* the images of the clique with the current model.
4. *Choose* K of them by greedy weighted choice: a training place. They and their neighbours leave the graph,
   and the harvest goes on; when no clique is left the next draw follows, until the batch has P places.

Every draw has a random stream of its own, named by (seed, epoch, batch, draw): a batch depends on these and
the descriptors, and on nothing else.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sagelib import graph as geo
from sagelib.graph import GeoVisualGraph, GraphRules, greedy_weighted_clique
from sagelib.runs import check, rng

__all__ = ["CliqueSampler", "MinedPlace", "PlaceSampler", "SamplerConfig", "batch_statistics", "harvest"]

MOST_IMAGES = 256  # of a place in a draw; a place of more lends a random choice of so many
SWEEPS = 3  # passes over all places before a batch is given up
PLANNED = 1024  # batches whose draws are planned together
ROWS = 256  # of one matrix product of descriptors


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(GraphRules):
    """How batches are made. The defaults are the paper's; where it is silent, CliqueMining's.

    Parameters
    ----------
    places_per_batch, images_per_place : int
        P and K; a batch has P x K images. The paper mines 30 x 4.
    similar_places : int
        Places drawn beside each place drawn, by their descriptors; the paper's P = 15.
    batches_per_epoch : int, optional
        4,000 in CliqueMining. None, for labelled places alone: one pass over them.
    min_clique : int
        Fewest images of a clique; 10 in the paper.
    fallback : {"draw", None}
        ``"draw"``: where no clique of a draw reaches `min_clique`, the largest of at least K images serve.
    prefer : {"closest", "farthest", "random"}
        Of `greedy_weighted_clique`; the paper writes the first.
    node_descriptor : {"image", "cluster"}
        ``d_vis`` between the images' own descriptors, or their places'. The paper is silent.
    schedule : {"online", "static", "none"}
        New descriptors every `refresh_every` epochs (the paper: each), once, or never, which makes batches of
        random places and random images of their cliques.
    remove : {"chosen", "clique"}
        What leaves the graph with its neighbours: the K chosen images or their clique. The paper is silent.
    graph_context : {"none", "solo", "anchors"}
        The cross-image head while the graph's descriptors are made: off, each image alone, or with the head's
        anchors. The paper is silent.
    refresh_every, seed : int
    radius_m, max_heading_deg, tau, top_k, min_distance_m
        Of `GraphRules`.
    """

    places_per_batch: int = 30
    images_per_place: int = 4
    similar_places: int = 15
    batches_per_epoch: int | None = 4000
    min_clique: int = 10
    fallback: str | None = "draw"
    prefer: str = "closest"
    node_descriptor: str = "image"
    schedule: str = "online"
    refresh_every: int = 1
    remove: str = "chosen"
    graph_context: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("places_per_batch", "images_per_place", "min_clique", "refresh_every"):
            check(name, getattr(self, name), 1, whole=True)
        check("batches_per_epoch", self.batches_per_epoch, 1, whole=True, none=True)
        check("similar_places", self.similar_places, 0, whole=True)
        check("seed", self.seed, 0, whole=True)
        check("fallback", self.fallback, choices=("draw",), none=True)
        geo.check_prefer(self.prefer)
        check("node_descriptor", self.node_descriptor, choices=("image", "cluster"))
        check("schedule", self.schedule, choices=("online", "static", "none"))
        check("remove", self.remove, choices=("chosen", "clique"))
        check("graph_context", self.graph_context, choices=("none", "solo", "anchors"))


class MinedPlace(NamedTuple):
    """One training place."""

    clique: np.ndarray  # the images of the clique it was found in
    images: np.ndarray  # the K images chosen of it, in the order chosen


def harvest(graph: GeoVisualGraph, images, config: SamplerConfig, *, choose=None, before=(), counts=None):
    """Places among some images, one after the other, until no clique is left.

    Parameters
    ----------
    graph, config : GeoVisualGraph, SamplerConfig
    images : (n,) int
        In random order: it decides which clique is first, and which of equal images.
    choose : callable, optional
        From the images of a clique to positions of K among them, or None to drop the clique. Default: the
        greedy weighted choice by the graph's descriptors.
    before : iterable of MinedPlace
        Places of the same batch; neither they nor their neighbours are taken again.
    counts : Counter, optional
        Counts what the search meets, by the names of `CliqueSampler.report`.

    Yields
    ------
    MinedPlace
    """
    counts = Counter() if counts is None else counts
    k, size, take_all = config.images_per_place, config.min_clique, config.remove == "clique"

    def greedy(clique: np.ndarray) -> np.ndarray | None:
        return greedy_weighted_clique(graph.subgraph(clique).weight, k, prefer=config.prefer)

    part = graph.subgraph(images)
    joined, near = geo.adjacency_bits(part.joined), geo.adjacency_bits(part.d_geo <= graph.rules.radius_m)
    usable = (1 << len(images)) - 1
    if gone := [place.clique if take_all else place.images for place in before]:
        metres = graph.distances_m(images[:, None], np.concatenate(gone))
        usable = geo.adjacency_bits(~(metres <= graph.rules.radius_m).any(axis=1)[None])[0]
    clique, alive = geo.first_clique(joined, usable, size)
    small = not clique and config.fallback == "draw"
    while True:
        counts["searches_cut"] += not clique and alive.bit_count() >= size
        if small:
            clique = geo.largest_clique(joined, usable, k)
        if not clique:
            return
        nodes = np.array(geo.nodes_of(clique))
        chosen = (choose or greedy)(images[nodes])
        counts.update(cliques_found=1, clique_images=len(nodes))
        if chosen is None:
            counts["cliques_dropped"] += 1
            usable &= ~clique
        else:
            counts.update(places=1, fallback_places=int(small))
            for node in (nodes if take_all else nodes[chosen]).tolist():
                usable &= ~near[node]
            yield MinedPlace(images[nodes], images[nodes[chosen]])
        if not small:
            clique, alive = geo.first_clique(joined, alive & usable, size)


class _BatchSampler:
    """What both samplers share: an epoch, a length, and batches by their number."""

    epoch = 0

    def __init__(self, config: SamplerConfig, batches_per_epoch: int):
        self.config, self.batches_per_epoch = config, batches_per_epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches iteration gives."""
        self.epoch = check("epoch", epoch, 0, whole=True)

    def __len__(self) -> int:
        return self.batches_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.epoch
        return (self._batch(epoch, i).ravel().tolist() for i in range(len(self)))


class CliqueSampler(_BatchSampler):
    """Batches of `places_per_batch` x `images_per_place` image indices, mined from the geo-visual graph.

    Before each epoch ``sampler.refresh(epoch, describe)`` if ``sampler.needs_refresh(epoch)``, else
    ``sampler.set_epoch(epoch)``. The graph is built by the rules of `config`; each refresh gives
    ``sampler.graph`` new descriptors.

    Raises
    ------
    ValueError
        If the graph has other rules, or no room for P places of K images; the sentence says for how many.
    """

    def __init__(self, graph: GeoVisualGraph, config: SamplerConfig):
        if vars(graph.rules) != config.graph_options():
            raise ValueError(f"graph and sampler differ: {vars(graph.rules)} and {config.graph_options()}")
        if config.batches_per_epoch is None:
            raise ValueError("mined places have no natural pass over them: give batches_per_epoch a number")
        check("min_clique", config.min_clique, config.images_per_place, whole=True)
        if not len(graph):
            raise ValueError("there are no images: a sampler needs at least one place of images_per_place")
        super().__init__(config, config.batches_per_epoch)
        self.graph, self._counts, self._near_pairs = graph, Counter(), graph.n_near
        self._draws = _Draws(graph, config, self._counts)
        self._refreshed: int | None = None
        self._described = _Described(None)
        self._stored: dict[int, np.ndarray] = {}  # batches (n, P, K) of epochs whose descriptors are gone
        self._missing: list[int] | None = None  # images that a wave of batches would have described
        unpruned = config.tau is None and config.top_k is None
        self._no_affinity = config.schedule == "none" or (config.prefer == "random" and unpruned)
        self._check_room()

    def representatives(self, epoch: int) -> np.ndarray:
        """(n_clusters,) int64: one random image of each cluster, the one to describe for `epoch`."""
        start, sizes = self._draws.start[:-1], np.diff(self._draws.start)
        u = rng(self.config.seed, "sampler", epoch, "representatives").random(len(sizes))
        return self._draws.order[start + np.minimum((u * sizes).astype(np.int64), sizes - 1)]

    def needs_refresh(self, epoch: int) -> bool:
        """Whether `refresh` has to be called before the batches of `epoch` can be made."""
        if self.config.schedule == "none" or epoch in self._stored:
            return False
        if self._refreshed is None or self.config.schedule == "static":
            return self._refreshed is None
        return not 0 <= epoch - self._refreshed < self.config.refresh_every

    def refresh(self, epoch: int, describe: Callable | np.ndarray | None = None) -> dict:
        """Take new descriptors, set the epoch, and give the `report`.

        Parameters
        ----------
        epoch : int
        describe : callable or array
            From image indices, (m,) int64, to their descriptors, (m, D) float, by the current model. Asked
            for one random image of each cluster and, with ``node_descriptor="image"``, for the images of the
            cliques that the epochs up to the next refresh are made of (static schedule: for all that can be
            in one). Or an array: (n_images, D), or (n_clusters, D) for ``node_descriptor="cluster"``.
        """
        self.set_epoch(epoch)
        self._stored, config, graph = {}, self.config, self.graph
        store = self._described = _Described(describe)
        if config.schedule == "none":
            return self.report
        if describe is None:
            raise ValueError("refresh needs describe: a callable, or an array of descriptors")
        representatives = self.representatives(epoch)
        if callable(describe):
            images, clusters = store, store.add(representatives)
        else:
            images = graph.with_descriptors(describe).descriptors
            clusters = images if len(images) == len(representatives) else images[representatives]
            if config.node_descriptor == "image" and len(images) != len(graph):
                raise ValueError(f"node_descriptor='image' needs descriptors of all {len(graph)} images")
        self.graph = graph.with_descriptors(images if config.node_descriptor == "image" else clusters)
        self._draws, self._refreshed = _Draws(graph, config, self._counts, clusters), epoch
        if images is store and config.node_descriptor == "image" and not self._no_affinity:
            if config.schedule == "static":
                farthest = graph.tree.query(graph.tree.data, [config.images_per_place])[0][:, 0]
                store.add(np.flatnonzero(farthest <= config.radius_m * (1 + 1e-9)))
            else:
                self._make_batches(store)
        store.describe = None  # what it refers to may be large
        return self.report

    def _make_batches(self, store: _Described) -> None:
        """Describe what the epochs up to the next refresh need, and make their batches.

        Which cliques a batch meets depends on the images chosen before (with ``remove="chosen"``), and these
        on descriptors. So batches are made in waves: where descriptors are missing, a batch goes on with a
        provisional choice; then what was missing is described at once, and the batches that missed any are
        made again. Each wave settles at least one more place of each batch, and in practice nearly all in the
        first.
        """
        config, order = self.config, self._draws.order
        self._counts.clear()
        for epoch in range(self.epoch, self.epoch + config.refresh_every):
            batches, todo = [None] * len(self), range(len(self))
            while todo:
                self._missing, again = [], []
                for i in todo:
                    missing, counts = len(self._missing), self._counts.copy()
                    batches[i] = self._batch(epoch, i)
                    if len(self._missing) > missing:
                        again.append(i)
                        self._counts.clear()
                        self._counts.update(counts)
                store.add(order[np.isin(order, self._missing)])
                todo = again
            self._stored[epoch] = np.array(batches, dtype=np.int32)
        self._missing, self.graph = None, self.graph.with_descriptors(None)
        store.clear()  # every batch is made

    def __iter__(self) -> Iterator[list[int]]:
        if self.needs_refresh(self.epoch):
            have = "has none yet" if self._refreshed is None else f"has those of epoch {self._refreshed}"
            raise RuntimeError(f"epoch {self.epoch} needs descriptors, and {have}: call refresh(epoch, ...)")
        if self.epoch in self._stored:
            return (batch.ravel().tolist() for batch in self._stored[self.epoch])
        self._counts.clear()
        return super().__iter__()

    def _batch(self, epoch: int, i: int) -> np.ndarray:
        """(P, K) image indices of batch `i`: from draws or, if these do not fill it, all places."""
        size, k, most = self.config.places_per_batch, self.config.images_per_place, 0
        for attempt in range(SWEEPS):
            draws = (self._draws.draw(epoch, i, draw) for draw in range(0 if attempt else 4 * size + 16))
            places = self._fill(itertools.chain(draws, self._draws.sweep(epoch, "sweep", i, attempt)))
            if len(places) == size:
                self._counts["batches"] += 1
                return np.stack([place.images for place in places])
            most = max(most, len(places))
        raise RuntimeError(
            f"batch {i} of epoch {epoch} needs {size} places of {k} images, and at most {most} were found "
            f"({self._counts['cliques_dropped']} cliques dropped by pruning): lower places_per_batch by "
            f"{size - most}, prune less (tau, top_k) or give more images"
        )

    def _fill(self, draws: Iterable[np.ndarray]) -> list[MinedPlace]:
        """Places from one draw after the other, until a batch is full."""
        places, options = [], {"choose": self._choose, "counts": self._counts}
        for images in draws:
            self._counts["draws"] += 1
            found = harvest(self.graph, images, self.config, before=tuple(places), **options)
            places += itertools.islice(found, self.config.places_per_batch - len(places))
            if len(places) == self.config.places_per_batch:
                break
        return places

    def _choose(self, clique: np.ndarray) -> np.ndarray | None:
        """The K of a clique's images that make a place, as positions among them."""
        k, images = self.config.images_per_place, self.graph.descriptors
        if self._refreshed is None or self._no_affinity:
            return np.arange(k)  # they are in random order already
        if self._missing is not None and (missing := [i for i in clique.tolist() if i not in images]):
            self._missing += missing
            return np.arange(k)
        weight = self.graph.subgraph(clique).weight
        chosen = greedy_weighted_clique(weight, k, prefer=self.config.prefer)
        if chosen is not None:
            zero = weight[np.ix_(chosen, chosen)] == 0
            self._counts["zero_weight_decisions"] += sum(zero[t, :t].all() for t in range(1, k))
        return chosen

    def _check_room(self) -> None:
        """Refuse places that cannot fill a batch, before an epoch is spent on finding out."""
        config, most, wanted = self.config, 0, self.config.places_per_batch
        for attempt in range(8):
            most = max(most, len(self._fill(self._draws.sweep("room", attempt))))
            if most == wanted or 2 * most < wanted:
                break
        self._counts.clear()
        if most < wanted:
            least = config.min_clique if config.fallback is None else config.images_per_place
            raise ValueError(
                f"{len(self.graph)} images have room for about {most} places of {config.images_per_place} "
                f"images more than {config.radius_m:g} m apart (each in a clique of at least {least}), and a "
                f"batch needs {wanted}: lower places_per_batch by {wanted - most}, or give more images"
            )

    @property
    def report(self) -> dict:
        """What the last refresh described, and how the batches made since then or in the last pass are.

        ``geographic_edges``: pairs of images within the radius, however they face. ``sweeps``: passes over
        all places. ``cliques_dropped``: the pruning left no K images connected. ``fallback_places``: from
        cliques under `min_clique`. ``zero_weight_decisions``: greedy decisions won at W = 0.
        ``uniform_draws``: of places all equally far. ``thinned_places``: lent a random part of their images.
        ``searches_cut``: out of steps.
        """
        counts = self._counts
        names = "batches draws sweeps cliques_found cliques_dropped places fallback_places uniform_draws"
        names += " zero_weight_decisions thinned_places searches_cut"
        report = {"epoch": self.epoch, "refreshed_epoch": self._refreshed, "schedule": self.config.schedule}
        report |= {"images": len(self.graph), "clusters": len(self._draws.city)}
        report |= {"cities": int(self.graph.city.max()) + 1, "geographic_edges": self._near_pairs}
        report |= self._described.report | {name: int(counts[name]) for name in names.split()}
        return report | {"mean_clique_size": counts["clique_images"] / (counts["cliques_found"] or np.nan)}


class _Described(dict):
    """Descriptors of some images, described when added; an array of images indexes it like an array."""

    def __init__(self, describe: Callable | None):
        self.describe = describe
        self.report = {"described_images": 0, "describe_calls": 0, "seconds_describe": 0.0}

    def add(self, images: np.ndarray) -> np.ndarray | None:
        """Describe those of some images that are not described yet."""
        images = np.array([i for i in images.tolist() if i not in self], dtype=np.int64)
        if not len(images):
            return None
        started = time.perf_counter()
        values = np.asarray(self.describe(images))
        self.report["seconds_describe"] += time.perf_counter() - started
        self.report["described_images"] += len(images)
        self.report["describe_calls"] += 1
        if values.ndim != 2 or len(values) != len(images):
            raise ValueError(f"describe must return shape ({len(images)}, D), got {values.shape}")
        geo.check_finite(values, "image", images)
        self.update(zip(images.tolist(), values, strict=True))
        return values

    def __getitem__(self, images: np.ndarray) -> np.ndarray:
        return np.stack([self.get(i) for i in images.tolist()])


class _Draws:
    """Draws of places that look alike: the images of each, in random order.

    The draws of `PLANNED` batches are planned together, so that distances to a city's places are one matrix
    product. A plan covers them all whatever part of it is used: a product has the same shape, and rounds the
    same way, wherever iteration begins. `descriptors`, (n_clusters, D), may be None: places are drawn at
    random.
    """

    def __init__(self, graph: GeoVisualGraph, config: SamplerConfig, counts: Counter, descriptors=None):
        self.config, self.counts, self.descriptors, self._chunk = config, counts, descriptors, None
        self.least = config.images_per_place
        # Sorted by city and cluster: images of a cluster, and clusters of a city, are ranges.
        self.order = np.argsort(graph.cluster, kind="stable")
        self.start = np.concatenate([[0], np.cumsum(np.bincount(graph.cluster))])
        self.city = graph.city[self.order[self.start[:-1]]]
        self.city_start = np.searchsorted(self.city, np.arange(self.city.max() + 2))
        for cluster in () if descriptors is None else np.flatnonzero(~descriptors.any(axis=1)):
            raise ValueError(f"the descriptor of cluster {cluster} is zero")

    def draw(self, epoch: int, i: int, draw: int) -> np.ndarray:
        """Images of one draw of batch `i`."""
        config, chunk = self.config, i // PLANNED
        if self._chunk != (epoch, chunk):
            self._chunk, self._planned = (epoch, chunk), {}
        if (i, draw) not in self._planned:
            batches = range(chunk * PLANNED, min((chunk + 1) * PLANNED, config.batches_per_epoch))
            ahead = -(-config.places_per_batch // (config.similar_places + 1)) + 1
            names = [(b, d) for d in range(draw, max(ahead, draw + 1)) for b in batches]
            streams = [rng(config.seed, "sampler", epoch, "draw", *name) for name in names]
            self._planned |= zip(names, zip(self._plan(streams), streams, strict=True), strict=True)
        clusters, stream = self._planned[i, draw]
        return self._images(clusters, copy.deepcopy(stream))  # a batch may be made again

    def sweep(self, *names: str | int) -> Iterator[np.ndarray]:
        """Images of all places of all cities once, in random order, as many places at a time as in a draw."""
        stream, size = rng(self.config.seed, "sampler", *names), self.config.similar_places + 1
        self.counts["sweeps"] += 1
        groups = []
        for start, stop in zip(self.city_start[:-1], self.city_start[1:], strict=True):
            clusters = stream.permutation(np.arange(start, stop))
            groups += [clusters[at : at + size] for at in range(0, len(clusters), size)]
        for index in stream.permutation(len(groups)):
            yield self._images(groups[index], stream)

    def _images(self, clusters: np.ndarray, stream: np.random.Generator) -> np.ndarray:
        parts = [self.order[self.start[c] : self.start[c + 1]] for c in clusters.tolist()]
        for at, part in enumerate(parts):
            if len(part) > MOST_IMAGES:
                parts[at] = stream.choice(part, MOST_IMAGES, replace=False)
                self.counts["thinned_places"] += 1
        images = np.concatenate(parts)
        return images[stream.permutation(len(images))] if len(images) >= self.least else images

    def _plan(self, streams: list[np.random.Generator]) -> list[np.ndarray]:
        """Clusters of a draw for each random stream, the one drawn first before those similar to it."""
        n = len(self.city)
        if self.descriptors is None:  # random places of all cities
            size = min(self.config.similar_places + 1, n)
            return [stream.choice(n, size, replace=False) for stream in streams]
        share = np.cumsum(np.diff(self.city_start)) / n
        first = np.empty(len(streams), dtype=np.int64)
        for at, stream in enumerate(streams):
            city = min(int(np.searchsorted(share, stream.random(), side="right")), len(share) - 1)
            first[at] = stream.integers(self.city_start[city], self.city_start[city + 1])
        drawn = {}
        for city in np.unique(self.city[first]):
            of_city = np.flatnonzero(self.city[first] == city)
            for rows in (of_city[at : at + ROWS] for at in range(0, len(of_city), ROWS)):
                clusters = self._similar(first[rows], int(city), [streams[row] for row in rows])
                drawn |= zip(rows.tolist(), clusters, strict=True)
        return [drawn[row] for row in range(len(streams))]

    def _similar(self, first: np.ndarray, city: int, streams: list) -> list[np.ndarray]:
        """Each of some clusters, and after it up to `similar_places` others of its city, without replacement.

        Weighted sampling without replacement as by Efraimidis and Spirakis (2006): the smallest of ``E_j /
        w_j`` with independent exponential E_j are distributed as draws one after the other with probabilities
        proportional to w, here ``d_max - d`` with ``d = 1 - cosine``.
        """
        start, stop = int(self.city_start[city]), int(self.city_start[city + 1])
        wanted = min(self.config.similar_places, stop - start - 1)
        if wanted == 0:
            return list(first[:, None])
        keys = np.stack([stream.standard_exponential(stop - start, dtype=np.float32) for stream in streams])
        query, block = (
            np.asarray(self.descriptors[rows], np.float32) for rows in (first, slice(start, stop))
        )
        norm = np.sqrt(np.einsum("ij,ij->i", block, block)).astype(np.float64)
        inverse = (1.0 / norm).astype(np.float32)
        distance = 1.0 - query @ block.T * inverse[first - start][:, None] * inverse
        own = np.arange(len(first)), first - start
        distance[own] = -np.inf
        weight = distance.max(axis=1, keepdims=True) - distance
        weight[own] = 0.0
        flat = ~(weight > 0).any(axis=1)  # all equally far
        self.counts["uniform_draws"] += int(flat.sum())
        weight[flat] = 1.0
        keys = np.divide(keys, weight, out=np.full_like(keys, np.inf), where=weight > 0)
        keys[own] = -1.0
        best = np.argsort(keys, axis=1, kind="stable")[:, : wanted + 1]
        return [start + row[keys[at, row] < np.inf] for at, row in enumerate(best)]


class PlaceSampler(_BatchSampler):
    """Batches of random places x random images of each, for places labelled far apart (GSV-Cities).

    Parameters
    ----------
    place_labels : (n,) int or str
        A label names one place in the whole data. Negative integers: no place, left out.
    config : SamplerConfig
        Places of fewer than `images_per_place` images are left out, and counted in `report`. An epoch of more
        `batches_per_epoch` than a pass over the places has is made of several, each in a new order.
    """

    def __init__(self, place_labels, config: SamplerConfig):
        size, k, labels = config.places_per_batch, config.images_per_place, np.asarray(place_labels)
        labelled = labels >= 0 if labels.dtype.kind in "if" else np.ones(len(labels), dtype=bool)
        images = np.flatnonzero(labelled)
        _, code, sizes = np.unique(labels[images], return_inverse=True, return_counts=True)
        members = np.split(images[np.argsort(code, kind="stable")], np.cumsum(sizes)[:-1])
        self._members = [part for part in members if len(part) >= k]
        n = len(self._members)
        if n < size:
            raise ValueError(
                f"{n} of {len(sizes)} places have at least {k} images, and a batch needs {size} places: "
                f"lower places_per_batch to {n} or less, or images_per_place"
            )
        self._per_pass, self._pass = n // size, None
        super().__init__(config, config.batches_per_epoch or self._per_pass)
        self.report = {"places": n, "places_left_out": len(sizes) - n, "images": sum(map(len, self._members))}
        self.report |= {"images_without_place": int((~labelled).sum()), "described_images": 0}

    def needs_refresh(self, epoch: int) -> bool:
        """Never: labelled places need no descriptors."""
        return False

    def _batch(self, epoch: int, i: int) -> np.ndarray:
        size, k, seed = self.config.places_per_batch, self.config.images_per_place, self.config.seed
        number, at = divmod(i, self._per_pass)
        if self._pass != (epoch, number):
            self._pass = (epoch, number)
            self._order = rng(seed, "places", epoch, "order", number).permutation(len(self._members))
        stream = rng(seed, "places", epoch, "batch", i)
        places = self._order[at * size : (at + 1) * size]
        return np.stack([stream.choice(self._members[place], k, replace=False) for place in places])


def batch_statistics(batches, descriptors, east_m, north_m, *, images_per_place: int = 4) -> dict:
    """How hard the batches of a sampler are, to compare samplers.

    Parameters
    ----------
    batches : iterable of (P * K,) int
        Image indices, place by place; `images_per_place` is K.
    descriptors : (n, D) float
        Of all images; need not be normalised.
    east_m, north_m : (n,) float

    Returns
    -------
    dict of arrays
        Per image of the batches: ``hardest_negative``, the greatest cosine to an image of another place of
        its batch. Per pair of images of one place: ``positive_similarity`` (cosine) and
        ``positive_distance_m``.
    """
    found = []
    for batch in map(np.asarray, batches):
        if len(batch) % images_per_place:
            raise ValueError(f"a batch of {len(batch)} images is not made of places of {images_per_place}")
        rows = np.asarray(descriptors[batch], dtype=np.float32)
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        cosine = rows @ rows.T
        place = np.arange(len(batch)) // images_per_place
        same = place[:, None] == place
        i, j = np.nonzero(np.triu(same, 1))
        a, b = batch[i], batch[j]
        metres = np.sqrt((east_m[a] - east_m[b]) ** 2 + (north_m[a] - north_m[b]) ** 2)
        hardest = np.where(same, np.nan if same.all() else -np.inf, cosine).max(axis=1)
        found.append((hardest, cosine[i, j], metres))
    names = ("hardest_negative", "positive_similarity", "positive_distance_m")
    return dict(zip(names, map(np.concatenate, zip(*found, strict=True)), strict=True))
