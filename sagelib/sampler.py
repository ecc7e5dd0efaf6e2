"""Training batches: draw places that look alike, harvest cliques of their images, choose K of each.

`CliqueSampler` mines batches of P places x K images from the geo-visual graph; `PlaceSampler` draws them from
labelled places. Both are batch samplers for a ``torch.utils.data.DataLoader``: iterating yields lists of
image indices, place by place, which depend on (seed, epoch, batch) and on the descriptors. `CliqueSampler`:

1. *Draw places.* A city with probability proportional to its number of places, one place in it, and
   `similar_places` more with probability proportional to ``d_max - d`` of their descriptors.
2. *Harvest cliques.* Of the images of these places, joined by geography, the first of `min_clique` or more.
3. *Describe* the images of the clique with the current model.
4. *Choose* K of them by greedy weighted choice: a training place. They and their neighbours leave the graph,
   and the harvest goes on; when no clique is left the next draw follows, until the batch has P places.
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

MOST_IMAGES = 256  # of a place in a draw; a place of more lends a random choice of so many
PLANNED = 1024  # batches whose draws are planned together
ROWS = 256  # of one matrix product of descriptors


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(GraphRules):
    """How batches are made. The defaults are the paper's, where it says; the length is CliqueMining's."""

    places_per_batch: int = 30  # P; a batch has P x K images
    images_per_place: int = 4  # K
    similar_places: int = 15  # drawn beside each place drawn, by their descriptors; the paper's P
    batches_per_epoch: int | None = 4000  # None: one pass over labelled places, where there are no others
    min_clique: int = 10  # images
    # "draw": where no clique of a draw has `min_clique` images, the largest of at least K serves.
    fallback: str | None = "draw"
    prefer: str = "closest"  # the paper's; or "farthest", "random": see `greedy_weighted_clique`
    node_descriptor: str = "image"  # `d_vis` between images' own descriptors, or between those of a "cluster"
    # New descriptors every `refresh_every` epochs; "static": once. Never, with "none", random places of all
    # cities, or "city", random places of one city a draw.
    schedule: str = "online"
    refresh_every: int = 1
    remove: str = "chosen"  # what leaves the graph with its neighbours: the K images, or the whole "clique"
    graph_context: str = "none"  # of the cross-image head while images are described: or "solo", "anchors"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        lowest = dict(places_per_batch=1, images_per_place=1, min_clique=1, refresh_every=1)
        for name, low in {**lowest, "similar_places": 0, "seed": 0}.items():
            check(name, getattr(self, name), low, whole=True)
        check("batches_per_epoch", self.batches_per_epoch, 1, whole=True, none=True)
        check("fallback", self.fallback, choices=("draw",), none=True)
        check("prefer", self.prefer, choices=tuple(geo.SIGN))
        check("node_descriptor", self.node_descriptor, choices=("image", "cluster"))
        check("schedule", self.schedule, choices=("online", "static", "none", "city"))
        check("remove", self.remove, choices=("chosen", "clique"))
        check("graph_context", self.graph_context, choices=("none", "solo", "anchors"))


class MinedPlace(NamedTuple):
    """One training place."""

    clique: np.ndarray  # the images of the clique it was found in
    images: np.ndarray  # the K images chosen of it, in the order chosen


def harvest(graph: GeoVisualGraph, images, config: SamplerConfig, *, choose=None,
            before=()) -> Iterator[MinedPlace]:  # fmt: skip
    """Places among some images, one after the other, until no clique is left.

    Parameters
    ----------
    images : (n,) int, in random order: it decides which clique is first, and which of equal images
    choose : callable, optional
        From the images of a clique to positions of K among them, or None to drop the clique. Default: the
        greedy weighted choice by the graph's descriptors.
    before : sequence of MinedPlace, of the same batch: neither they nor their neighbours are taken again
    """
    k, radius, take_all = config.images_per_place, graph.rules.radius_m, config.remove == "clique"
    choose = choose or (lambda c: greedy_weighted_clique(graph.subgraph(c).weight, k, prefer=config.prefer))
    part = graph.subgraph(images)
    joined, near = geo.adjacency_bits(part.joined), geo.adjacency_bits(part.d_geo <= radius)
    usable = (1 << len(images)) - 1
    if gone := [place.clique if take_all else place.images for place in before]:
        apart = (graph.distances_m(images[:, None], np.concatenate(gone)) > radius).all(axis=1)
        [usable] = geo.adjacency_bits(apart[None])
    clique, alive = geo.first_clique(joined, usable, config.min_clique)
    small = not clique and config.fallback == "draw"
    while clique or small:
        if small and not (clique := geo.largest_clique(joined, usable, k)):
            return
        nodes = np.array(geo.nodes_of(clique))
        chosen = choose(images[nodes])
        if chosen is None:
            usable &= ~clique
        else:
            for node in (nodes if take_all else nodes[chosen]).tolist():
                usable &= ~near[node]
            yield MinedPlace(images[nodes], images[nodes[chosen]])
        if not small:
            clique, alive = geo.first_clique(joined, alive & usable, config.min_clique)


class _BatchSampler:
    """What both samplers share: an epoch, a length, and batches by their number."""

    epoch = 0

    def __init__(self, config: SamplerConfig, batches_per_epoch: int):
        self.config, self.batches_per_epoch = config, batches_per_epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches iteration gives."""
        self.epoch = check("epoch", epoch, 0, whole=True)

    def needs_refresh(self, epoch: int) -> bool:
        """Whether the batches of `epoch` need other descriptors, by `refresh`; never with labelled places."""
        return False

    def __len__(self) -> int:
        return self.batches_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.epoch
        return (self._batch(epoch, i).ravel().tolist() for i in range(len(self)))


class CliqueSampler(_BatchSampler):
    """Batches of `places_per_batch` x `images_per_place` images, mined from a graph by the rules of `config`.

    Before each epoch ``sampler.refresh(epoch, describe)`` if ``sampler.needs_refresh(epoch)``, else
    ``sampler.set_epoch(epoch)``. A graph without room for P places of K images is refused.
    """

    def __init__(self, graph: GeoVisualGraph, config: SamplerConfig):
        if vars(graph.rules) != config.graph_options():
            raise ValueError(f"graph and sampler differ: {vars(graph.rules)} and {config.graph_options()}")
        check("min_clique", config.min_clique, config.images_per_place, whole=True)
        super().__init__(config, check("batches_per_epoch", config.batches_per_epoch, 1, whole=True))
        self.graph = graph.with_descriptors(None)  # those that the choice needs
        self._draws, self._described, self._counts = _Draws(graph, config), _Described(None), Counter()
        self._facts = {"images": len(graph), "geographic_edges": graph.n_near}
        self._facts |= {"cities": len(self._draws.city_start) - 1, "clusters": len(self._draws.city)}
        self._refreshed: int | None = None
        self._stored: dict[int, np.ndarray] = {}  # batches (n, P, K) of epochs whose descriptors are gone
        self._missing: list[int] = []  # images that a wave of batches would have described
        self._check_room()

    def needs_refresh(self, epoch: int) -> bool:
        if self.config.schedule in ("none", "city") or epoch in self._stored:
            return False
        if self._refreshed is None or self.config.schedule == "static":
            return self._refreshed is None
        return not 0 <= epoch - self._refreshed < self.config.refresh_every

    def refresh(self, epoch: int, describe: Callable | np.ndarray) -> dict:
        """Take new descriptors, set the epoch, and give the `report`.

        Parameters
        ----------
        describe : callable or array
            From images, (m,) int64, to their descriptors, (m, D): asked for a random image of each cluster
            and, with ``node_descriptor="image"``, for those in the cliques of the epochs until the next
            refresh (static: that can be in one). Or an array (n_images, D) or, by cluster, (n_clusters, D).
        """
        self.set_epoch(epoch)
        self._stored, config, graph = {}, self.config, self.graph
        store = self._described = _Described(describe)
        if config.schedule in ("none", "city"):
            return self.report
        start, stream = self._draws.start, rng(config.seed, "sampler", epoch, "representatives")
        one = (stream.random(len(start) - 1) * np.diff(start)).astype(np.int64)  # image of each cluster
        representatives = self._draws.order[start[:-1] + one]
        if callable(describe):
            images, clusters = store, store.add(representatives)
        else:
            images = graph.with_descriptors(describe).descriptors
            clusters = images if len(images) == len(representatives) else images[representatives]
            if config.node_descriptor == "image" and len(images) != len(graph):
                raise ValueError(f"node_descriptor='image' needs descriptors of all {len(graph)} images")
        needed = config.prefer != "random" or config.tau is not None or config.top_k is not None
        nodes = images if config.node_descriptor == "image" else clusters
        self.graph = graph.with_descriptors(nodes if needed else None)
        self._draws, self._refreshed = _Draws(graph, config, clusters), epoch
        if self.graph.descriptors is store and config.schedule == "online":
            self._make_batches(store)
        elif self.graph.descriptors is store:
            farthest = graph.tree.query(graph.tree.data, [config.images_per_place])[0][:, 0]
            store.add(np.flatnonzero(farthest <= config.radius_m * (1 + 1e-9)))
        store.describe = None  # what it refers to may be large
        return self.report

    def _make_batches(self, store: _Described) -> None:
        """Describe what the epochs up to the next refresh need, and make their batches.

        Which cliques a batch meets depends on the images chosen before, by their descriptors. Where any lack,
        it goes on with a provisional choice; then all that lack are described at once, and such batches made
        again. Each wave settles another place of each batch, mostly nearly all.
        """
        self._counts.clear()
        for epoch in range(self.epoch, self.epoch + self.config.refresh_every):
            batches, todo = [None] * len(self), range(len(self))
            while todo:
                self._missing, again = [], []
                for i in todo:
                    missing, counts = len(self._missing), self._counts.copy()
                    batches[i] = self._batch(epoch, i)
                    if len(self._missing) > missing:
                        again.append(i)
                        self._counts = counts
                store.add(self._draws.order[np.isin(self._draws.order, self._missing)])
                todo = again
            self._stored[epoch] = np.array(batches, dtype=np.int32)
        self.graph = self.graph.with_descriptors(None)  # every batch is made
        store.clear()

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
        for attempt in range(3):
            draws = (self._draws.draw(epoch, i, draw) for draw in range(0 if attempt else 4 * size + 16))
            places = self._fill(itertools.chain(draws, self._draws.sweep(epoch, "sweep", i, attempt)))
            if len(places) == size:
                self._counts["batches"] += 1
                return np.stack([place.images for place in places])
            most = max(most, len(places))
        words = f"batch {i} of epoch {epoch} needs {size} places of {k} images, and at most {most} were found"
        advice = f"lower places_per_batch by {size - most}, prune less (tau, top_k) or give more images"
        raise RuntimeError(f"{words}: {advice}")

    def _fill(self, draws: Iterable[np.ndarray]) -> list[MinedPlace]:
        """Places from one draw after the other, until a batch is full."""
        places, size = [], self.config.places_per_batch
        for images in draws:
            self._counts["draws"] += 1
            found = harvest(self.graph, images, self.config, choose=self._choose, before=places)
            places += itertools.islice(found, size - len(places))
            if len(places) == size:
                break
        return places

    def _choose(self, clique: np.ndarray) -> np.ndarray | None:
        """The K of a clique's images that make a place, as positions among them."""
        config, counts, store = self.config, self._counts, self.graph.descriptors
        chosen = np.arange(config.images_per_place)  # they are in random order already
        if isinstance(store, _Described) and (missing := [i for i in clique.tolist() if i not in store]):
            self._missing += missing
        elif store is not None:
            weight = self.graph.subgraph(clique).weight
            chosen = greedy_weighted_clique(weight, len(chosen), prefer=config.prefer)
            if chosen is None:
                counts["cliques_dropped"] += 1
                return None
            zero = weight[np.ix_(chosen, chosen)] == 0
            counts["zero_weight_decisions"] += sum(zero[t, :t].all() for t in range(1, len(chosen)))
        counts.update(places=1, clique_images=len(clique), fallback_places=len(clique) < config.min_clique)
        return chosen

    def _check_room(self) -> None:
        """Refuse places that cannot fill a batch, before an epoch is spent on finding out."""
        config, size = self.config, self.config.places_per_batch
        most = max(len(self._fill(self._draws.sweep("room", attempt))) for attempt in range(8))
        self._counts.clear()
        if most < size:
            least = config.min_clique if config.fallback is None else config.images_per_place
            words = f"{len(self.graph)} images have room for about {most} places of {config.images_per_place}"
            apart = f"{config.radius_m:g} m apart (each in a clique of at least {least})"
            advice = f"lower places_per_batch by {size - most}, or give more images"
            raise ValueError(f"{words} images more than {apart}, and a batch needs {size}: {advice}")

    @property
    def report(self) -> dict:
        """What the last refresh described, and counts of the batches made since then or in the last pass.

        ``geographic_edges`` are pairs within the radius; ``fallback_places`` come from cliques smaller than
        `min_clique`, ``cliques_dropped`` gave none; ``zero_weight_decisions`` were won at W = 0.
        """
        names = "batches draws places clique_images fallback_places cliques_dropped zero_weight_decisions"
        report = {"epoch": self.epoch, "refreshed_epoch": self._refreshed, "schedule": self.config.schedule}
        report |= self._facts | self._described.report
        return report | {name: int(self._counts[name]) for name in names.split()}


class _Described(dict):
    """Descriptors of some images, described when added; an array of images indexes it like an array."""

    def __init__(self, describe: Callable | None):
        self.describe, self.report = describe, {"described_images": 0, "seconds_describe": 0.0}

    def add(self, images: np.ndarray) -> np.ndarray | None:
        """Describe those of some images that are not described yet."""
        images = np.array([i for i in images.tolist() if i not in self], dtype=np.int64)
        if not len(images):
            return None
        started = time.perf_counter()
        values = np.asarray(self.describe(images))
        self.report["seconds_describe"] += time.perf_counter() - started
        self.report["described_images"] += len(images)
        if values.ndim != 2 or len(values) != len(images):
            raise ValueError(f"describe must return shape ({len(images)}, D), got {values.shape}")
        geo.check_finite(values, "image", images)
        self.update(zip(images.tolist(), values, strict=True))
        return values

    def __getitem__(self, images: np.ndarray) -> np.ndarray:
        return np.stack([self.get(i) for i in images.tolist()])


class _Draws:
    """Draws of places that look alike: the images of each, in random order.

    Those of `PLANNED` batches are planned together: distances to a city's places are one matrix product, of
    the same shape, and rounding, wherever iteration begins. Without `descriptors` (n_clusters, D): at random.
    """

    def __init__(self, graph: GeoVisualGraph, config: SamplerConfig, descriptors=None):
        self.config, self.descriptors, self._chunk = config, descriptors, None
        # Sorted by city and cluster: images of a cluster, and clusters of a city, are ranges.
        self.order = np.argsort(graph.cluster, kind="stable")
        self.start = np.concatenate([[0], np.cumsum(np.bincount(graph.cluster))])
        self.city = graph.city[self.order[self.start[:-1]]]
        self.city_start = np.searchsorted(self.city, np.arange(self.city.max(initial=-1) + 2))
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
        groups = []
        for start, stop in zip(self.city_start[:-1], self.city_start[1:], strict=True):
            clusters = stream.permutation(np.arange(start, stop))
            groups += [clusters[at : at + size] for at in range(0, len(clusters), size)]
        for index in stream.permutation(len(groups)):
            yield self._images(groups[index], stream)

    def _images(self, clusters: np.ndarray, stream: np.random.Generator) -> np.ndarray:
        parts = [self.order[self.start[c] : self.start[c + 1]] for c in clusters.tolist()]
        few = [p if len(p) <= MOST_IMAGES else stream.choice(p, MOST_IMAGES, replace=False) for p in parts]
        images = np.concatenate(few)
        return stream.permutation(images) if len(images) >= self.config.images_per_place else images

    def _plan(self, streams: list[np.random.Generator]) -> list[np.ndarray]:
        """Clusters of a draw for each random stream, the one drawn first before those similar to it."""
        n, size = len(self.city), self.config.similar_places + 1
        if self.config.schedule == "none":
            return [stream.choice(n, min(size, n), replace=False) for stream in streams]
        share = np.cumsum(np.diff(self.city_start)) / n
        city = np.searchsorted(share, [stream.random() for stream in streams], side="right")
        ends = list(zip(streams, self.city_start[city], self.city_start[city + 1], strict=True))
        if self.descriptors is None:
            return [low + s.choice(high - low, min(size, high - low), replace=False) for s, low, high in ends]
        first = np.array([stream.integers(start, stop) for stream, start, stop in ends])
        drawn = {}
        for rows in (np.flatnonzero(city == c) for c in np.unique(city)):
            for part in np.split(rows, range(ROWS, len(rows), ROWS)):
                clusters = self._similar(first[part], int(city[part[0]]), [streams[row] for row in part])
                drawn |= zip(part.tolist(), clusters, strict=True)
        return [drawn[row] for row in range(len(streams))]

    def _similar(self, first: np.ndarray, city: int, streams: list) -> list[np.ndarray]:
        """Each of some clusters, and after it up to `similar_places` others of its city, without replacement.

        By Efraimidis and Spirakis (2006): the smallest ``E_j / w_j`` of independent exponential E_j are draws
        with probabilities proportional to w, here ``d_max - d`` with ``d = 1 - cosine``.
        """
        start, stop = int(self.city_start[city]), int(self.city_start[city + 1])
        wanted = min(self.config.similar_places, stop - start - 1)
        if wanted == 0:
            return list(first[:, None])
        keys = np.stack([stream.standard_exponential(stop - start, dtype=np.float32) for stream in streams])
        query = np.asarray(self.descriptors[first], np.float32)
        block = np.asarray(self.descriptors[start:stop], np.float32)
        inverse = (1.0 / np.sqrt(np.einsum("ij,ij->i", block, block)).astype(np.float64)).astype(np.float32)
        distance = 1.0 - query @ block.T * inverse[first - start][:, None] * inverse
        own = np.arange(len(first)), first - start
        distance[own] = -np.inf
        weight = distance.max(axis=1, keepdims=True) - distance
        weight[own] = 0.0
        weight[~(weight > 0).any(axis=1)] = 1.0  # all equally far
        keys = np.divide(keys, weight, out=np.full_like(keys, np.inf), where=weight > 0)
        keys[own] = -1.0
        best = np.argsort(keys, axis=1, kind="stable")[:, : wanted + 1]
        return [start + row[keys[at, row] < np.inf] for at, row in enumerate(best)]


class PlaceSampler(_BatchSampler):
    """Batches of random places x random images of each, for places labelled far apart (GSV-Cities).

    Parameters
    ----------
    place_labels : (n,) int or str
        Names of places, one each in the whole data; negative integers: none. Images of none, and places of
        fewer than `images_per_place` images, are left out, and counted in `report`.
    config : SamplerConfig; an epoch longer than a pass over the places is made of several in new orders
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
            words = f"{n} of {len(sizes)} places have at least {k} images, and a batch needs {size} places"
            raise ValueError(f"{words}: lower places_per_batch to {n} or less, or images_per_place")
        self._per_pass, self._pass = n // size, None
        super().__init__(config, config.batches_per_epoch or self._per_pass)
        self.report = {"places": n, "places_left_out": len(sizes) - n, "images": sum(map(len, self._members))}
        self.report |= {"images_without_place": int((~labelled).sum())}

    def _batch(self, epoch: int, i: int) -> np.ndarray:
        size, k, seed = self.config.places_per_batch, self.config.images_per_place, self.config.seed
        number, at = divmod(i, self._per_pass)
        if self._pass != (epoch, number):
            self._pass = (epoch, number)
            self._order = rng(seed, "places", epoch, "order", number).permutation(len(self._members))
        stream = rng(seed, "places", epoch, "batch", i)
        places = self._order[at * size : (at + 1) * size]
        return np.stack([stream.choice(self._members[place], k, replace=False) for place in places])
