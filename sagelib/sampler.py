"""Training batches: draw places that look alike, harvest cliques of their images, describe these, choose a few of each.

`CliqueSampler` mines batches of P places x K images from the geo-visual graph; `PlaceSampler` draws them from
labelled places. Both are batch samplers for a ``torch.utils.data.DataLoader``: iterating yields lists of image
indices, place by place.

A batch of `CliqueSampler` is made so:

1. *Draw places.* A city with probability proportional to its number of places, one place in it, and `similar_places`
   more with probability proportional to ``d_max - d`` of their descriptors.
2. *Harvest cliques.* The images of these places, joined by geography, form a graph. Its first clique of at least
   `min_clique` images is taken.
3. *Describe* the images of the clique with the current model.
4. *Choose* K of them, by greedy weighted choice: a training place. They and their neighbours leave the graph and the
   harvest goes on; when no clique is left the next draw follows, until the batch has P places.

Every draw has a random stream of its own, named by (seed, epoch, batch, draw): a batch depends on these and on the
descriptors, and on nothing else.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sagelib.graph import (
    RULES,
    GeoVisualGraph,
    adjacency_bits,
    check_finite,
    check_prefer,
    check_rules,
    first_clique,
    greedy_weighted_clique,
    largest_clique,
    nodes_of,
)
from sagelib.runs import check, rng

__all__ = ["CliqueSampler", "MinedPlace", "PlaceSampler", "SamplerConfig", "batch_statistics", "harvest"]

MOST_IMAGES = 256  # of a place in a draw; a place of more lends a random choice of so many
SWEEPS = 3  # passes over all places before a batch is given up
PLANNED = 1024  # batches whose draws are planned together
ROWS, COLUMNS = 256, 4096  # of one matrix product of descriptors


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How batches are made. The defaults are the paper's; where it is silent, CliqueMining's, and the entry says so.

    Parameters
    ----------
    places_per_batch, images_per_place : int
        P and K; a batch has P x K images. The paper mines 30 x 4.
    similar_places : int
        Places drawn beside each place drawn, by their descriptors; the paper's P = 15.
    batches_per_epoch : int, optional
        The paper is silent; 4,000 in CliqueMining. None, for labelled places alone: one pass over them.
    radius_m, max_heading_deg, tau, top_k, min_distance_m
        Rules of the graph, see `GeoVisualGraph`: 25 m; no heading test; the paper's tau is not public (unit
        descriptors have ``W >= -50``); no `top_k`; no floor.
    min_clique : int
        Fewest images of a clique; 10 in the paper.
    fallback : {"draw", None}
        ``"draw"``: in a draw where no clique reaches `min_clique`, the largest of at least K images serve. The paper
        does not say.
    prefer : {"closest", "farthest", "random"}
        Of `greedy_weighted_clique`.
    node_descriptor : {"image", "cluster"}
        ``d_vis`` between the images' own descriptors, or between those of their clusters. The paper is silent.
    schedule : {"online", "static", "none"}
        New descriptors every `refresh_every` epochs, once, or never: then places are drawn at random, and so are the
        images of their cliques.
    refresh_every : int
        Epochs between refreshes of the online schedule.
    remove : {"chosen", "clique"}
        Whether the K chosen images and their neighbours leave the graph, or the clique and its neighbours.
    graph_context : {"none", "solo", "anchors"}
        The cross-image head while the graph's descriptors are made: off, each image alone, or with the head's anchors.
        The paper is silent.
    seed : int

    Raises
    ------
    ValueError
        For a value out of range, with name, value and range.
    """

    places_per_batch: int = 30
    images_per_place: int = 4
    similar_places: int = 15
    batches_per_epoch: int | None = 4000
    radius_m: float = 25.0
    max_heading_deg: float | None = None
    min_clique: int = 10
    fallback: str | None = "draw"
    tau: float | None = None
    top_k: int | None = None
    prefer: str = "closest"
    node_descriptor: str = "image"
    schedule: str = "online"
    refresh_every: int = 1
    remove: str = "chosen"
    min_distance_m: float = 0.0
    graph_context: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("places_per_batch", "images_per_place", "min_clique", "refresh_every"):
            check(name, getattr(self, name), 1, whole=True)
        check("batches_per_epoch", self.batches_per_epoch, 1, whole=True, none=True)
        check("similar_places", self.similar_places, 0, whole=True)
        check("seed", self.seed, 0, whole=True)
        check("fallback", self.fallback, choices=("draw",), none=True)
        check("node_descriptor", self.node_descriptor, choices=("image", "cluster"))
        check("schedule", self.schedule, choices=("online", "static", "none"))
        check("remove", self.remove, choices=("chosen", "clique"))
        check("graph_context", self.graph_context, choices=("none", "solo", "anchors"))
        check_prefer(self.prefer)
        check_rules(**self.graph_options())

    def graph_options(self) -> dict:
        """The rules of the graph: ``GeoVisualGraph.from_places(places, **config.graph_options())``."""
        return {name: getattr(self, name) for name in RULES}


# ------------------------------------------------------------------------------------------------
# The harvest: places among a few images
# ------------------------------------------------------------------------------------------------


class MinedPlace(NamedTuple):
    """One training place: the maximal clique it was found in, and the K images chosen, in the order chosen."""

    clique: np.ndarray
    images: np.ndarray


def harvest(
    graph: GeoVisualGraph,
    images: np.ndarray,
    config: SamplerConfig,
    *,
    choose: Callable[[np.ndarray], np.ndarray | None] | None = None,
    before: list[MinedPlace] | tuple = (),
    counts: Counter | None = None,
) -> Iterator[MinedPlace]:
    """Places among some images, one after the other, until no clique is left.

    Parameters
    ----------
    graph : GeoVisualGraph
        With descriptors, unless `choose` needs none.
    images : (n,) int
        In random order: which clique is first, and which of equal images, is decided by it.
    config : SamplerConfig
    choose : callable, optional
        From the images of a clique to positions of K among them, or None to drop the clique. Default: the greedy
        weighted choice on the clique's subgraph.
    before : sequence of MinedPlace
        Places of the same batch; neither they nor their neighbours are taken again.
    counts : Counter, optional
        Counts what the search meets, under the names of `CliqueSampler.report`.
    """
    counts = Counter() if counts is None else counts

    def greedy(clique: np.ndarray) -> np.ndarray | None:
        weight = graph.subgraph(clique).weight
        return greedy_weighted_clique(weight, config.images_per_place, prefer=config.prefer)

    choose = choose or greedy
    part = graph.subgraph(images)
    joined, near = adjacency_bits(part.joined), adjacency_bits(part.near)
    usable = (1 << len(images)) - 1
    if before:
        gone = np.concatenate([p.images if config.remove == "chosen" else p.clique for p in before])
        free = ~(graph.distances_m(images, gone) <= graph.radius_m).any(axis=1)
        usable = adjacency_bits(free[None])[0]
    clique, alive = first_clique(joined, usable, config.min_clique)
    counts["searches_cut"] += not clique and alive.bit_count() >= config.min_clique
    small = not clique and config.fallback == "draw"
    while True:
        if small:
            clique = largest_clique(joined, usable, config.images_per_place)
        if not clique:
            return
        nodes = np.array(nodes_of(clique))
        counts["cliques_found"] += 1
        counts["clique_images"] += len(nodes)
        chosen = choose(images[nodes])
        if chosen is None:
            counts["cliques_dropped"] += 1
            usable &= ~clique
        else:
            counts["places"] += 1
            counts["fallback_places"] += small
            for node in (nodes[chosen] if config.remove == "chosen" else nodes).tolist():
                usable &= ~near[node]
            yield MinedPlace(images[nodes], images[nodes[chosen]])
        if not small:
            clique, alive = first_clique(joined, alive & usable, config.min_clique)
            counts["searches_cut"] += not clique and alive.bit_count() >= config.min_clique


# ------------------------------------------------------------------------------------------------
# Batch samplers
# ------------------------------------------------------------------------------------------------


class _BatchSampler:
    """What both samplers share: the epoch, the length, and batches by their number."""

    config: SamplerConfig
    batches_per_epoch: int
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches iteration gives."""
        self.epoch = check("epoch", epoch, 0, whole=True)

    def __len__(self) -> int:
        return self.batches_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.epoch
        return (self._batch(epoch, i).ravel().tolist() for i in range(len(self)))

    def _batch(self, epoch: int, i: int) -> np.ndarray:
        raise NotImplementedError


class CliqueSampler(_BatchSampler):
    """Batches of `places_per_batch` x `images_per_place` image indices, mined from the geo-visual graph.

    Parameters
    ----------
    graph : GeoVisualGraph
        Built with the rules of `config`; its descriptors, if any, are replaced by `refresh`.
    config : SamplerConfig

    Attributes
    ----------
    graph : GeoVisualGraph
        With the descriptors of the last refresh.

    Raises
    ------
    ValueError
        If the graph has other rules, or its images have no room for P places of K images; the sentence says for how
        many they have.

    Notes
    -----
    Use it as ``DataLoader(dataset, batch_sampler=sampler)``. In each epoch: ``if sampler.needs_refresh(epoch):
    sampler.refresh(epoch, describe)``, else ``sampler.set_epoch(epoch)``; then iterate.
    """

    def __init__(self, graph: GeoVisualGraph, config: SamplerConfig):
        if graph.rules != config.graph_options():
            raise ValueError(f"the graph has the rules {graph.rules}, the sampler {config.graph_options()}")
        if config.batches_per_epoch is None:
            raise ValueError("mined places have no natural pass over them: give batches_per_epoch a number")
        check("min_clique", config.min_clique, config.images_per_place, whole=True)
        if not len(graph):
            raise ValueError(
                "there are no images: a sampler needs at least one place of images_per_place images"
            )
        self.graph, self.config, self.batches_per_epoch = graph, config, config.batches_per_epoch
        self._draws = _Draws(graph, config)
        self._refreshed: int | None = None
        self._stored: dict[int, np.ndarray] = {}  # batches (n, P, K) of epochs whose descriptors are gone
        self._missing: list[np.ndarray] | None = None  # images that a wave of batches would have described
        self._described = {
            "descriptors": None,
            "described_images": 0,
            "describe_calls": 0,
            "seconds_describe": 0.0,
        }
        self._counts = Counter()
        self._check_room()

    def representatives(self, epoch: int) -> np.ndarray:
        """(n_clusters,) int64: one random image of each cluster, the one to describe for `epoch`."""
        start = self._draws.start
        u = rng(self.config.seed, "sampler", epoch, "representatives").random(len(start) - 1)
        sizes = np.diff(start)
        return self._draws.order[start[:-1] + np.minimum((u * sizes).astype(np.int64), sizes - 1)]

    # -- describe --

    def needs_refresh(self, epoch: int) -> bool:
        """Whether `refresh` has to be called before the batches of `epoch` can be made."""
        if self.config.schedule == "none" or epoch in self._stored:
            return False
        if self._refreshed is None:
            return True
        return (
            self.config.schedule == "online" and not 0 <= epoch - self._refreshed < self.config.refresh_every
        )

    def refresh(self, epoch: int, describe: Callable | np.ndarray | None = None) -> dict:
        """Take new descriptors, and set the epoch.

        Parameters
        ----------
        epoch : int
        describe : callable or array
            A callable from image indices, (m,) int64, to their descriptors, (m, D) float, made by the current model
            in evaluation mode. It is asked for one random image of each cluster and, with ``node_descriptor="image"``,
            for the images of the cliques that the epochs up to the next refresh are made of (with the static
            schedule: for all images that have enough neighbours); these are kept in memory as they are. Or an array,
            memory-mapped or not: (n_images, D), or (n_clusters, D) for ``node_descriptor="cluster"``.

        Returns
        -------
        dict
            `report`.

        Raises
        ------
        ValueError
            For descriptors of a wrong shape, not finite, or zero.
        """
        self.set_epoch(epoch)
        self._stored = {}
        config = self.config
        if config.schedule == "none":
            return self.report
        if describe is None:
            raise ValueError(
                "refresh needs describe: a callable from image indices to descriptors, or an array"
            )
        self._described = {
            "descriptors": "described" if callable(describe) else "given",
            "described_images": 0,
        }
        self._described |= {"describe_calls": 0, "seconds_describe": 0.0}
        representatives = self.representatives(epoch)
        store = None
        if callable(describe):
            clusters = self._describe(describe, representatives)
            if config.node_descriptor == "image":
                store = _Described(len(self.graph))
                store.add(representatives, clusters)
            self.graph = self.graph.with_descriptors(clusters if store is None else store)
        else:
            self.graph = self.graph.with_descriptors(describe)
            clusters = describe if len(describe) == len(representatives) else describe[representatives]
            if config.node_descriptor == "cluster":
                self.graph = self.graph.with_descriptors(clusters)
            elif len(describe) != len(self.graph):
                raise ValueError(
                    f"node_descriptor='image' needs descriptors of all {len(self.graph)} images, got {len(describe)}"
                )
        self._draws = _Draws(self.graph, config, clusters)
        self._refreshed = int(epoch)
        if store is not None and not self._any_images:
            if config.schedule == "static":
                self._describe_all(describe, store)
            else:
                self._describe_batches(describe, store)
        return self.report

    def _describe(self, describe: Callable, images: np.ndarray) -> np.ndarray:
        started = time.perf_counter()
        values = np.asarray(describe(images))
        self._described["seconds_describe"] += time.perf_counter() - started
        self._described["described_images"] += len(images)
        self._described["describe_calls"] += 1
        if values.ndim != 2 or len(values) != len(images):
            raise ValueError(
                f"describe must return shape ({len(images)}, D), one row per image, got {values.shape}"
            )
        check_finite(values, "image", images)
        return values

    def _describe_all(self, describe: Callable, store: _Described) -> None:
        """Describe every image that has enough neighbours to be in a batch."""
        tree, k = self.graph.tree, self.config.images_per_place
        enough = tree.query(tree.data, [k])[0][:, 0] <= self.config.radius_m * (1 + 1e-9)
        images = np.flatnonzero(enough & ~store.has(np.arange(len(self.graph))))
        if len(images):
            store.add(images, self._describe(describe, images))

    def _describe_batches(self, describe: Callable, store: _Described) -> None:
        """Describe what the epochs up to the next refresh need, and make their batches.

        Which cliques a batch meets depends on the images chosen before (with ``remove="chosen"``), and these on
        descriptors. So batches are made in waves: where descriptors are missing, a batch goes on with a provisional
        choice; then what was missing is described at once, and the batches that missed any are made again. Each wave
        settles at least one more place of each batch, and in practice nearly all in the first.
        """
        config, order = self.config, self._draws.order
        self._counts = Counter()
        for epoch in range(self.epoch, self.epoch + config.refresh_every):
            batches = np.empty((len(self), config.places_per_batch, config.images_per_place), np.int32)
            todo = range(len(self))
            while todo:
                self._missing, again = [], []
                for i in todo:
                    met, counts = len(self._missing), self._counts.copy()
                    batches[i] = self._batch(epoch, i)
                    if len(self._missing) > met:
                        again.append(i)
                        self._counts = counts
                if self._missing:
                    wanted = np.zeros(len(self.graph), dtype=bool)
                    wanted[np.concatenate(self._missing)] = True
                    images = order[wanted[order]]
                    store.add(images, self._describe(describe, images))
                todo = again
            self._stored[epoch] = batches
        self._missing, self.graph = None, self.graph.with_descriptors(None)  # every batch is made

    # -- batches --

    def __iter__(self) -> Iterator[list[int]]:
        if self.needs_refresh(self.epoch):
            described = (
                "it has none yet"
                if self._refreshed is None
                else f"those it has are of epoch {self._refreshed}"
            )
            raise RuntimeError(
                f"epoch {self.epoch} needs descriptors, and {described}: call refresh(epoch, describe)"
            )
        if self.epoch in self._stored:
            return (batch.ravel().tolist() for batch in self._stored[self.epoch])
        self._counts = Counter()
        return super().__iter__()

    def _batch(self, epoch: int, i: int) -> np.ndarray:
        """(P, K) image indices of batch `i`."""
        config = self.config
        places: list[MinedPlace] = []
        draws = 4 * config.places_per_batch + 16
        if not self._fill(places, (self._draws.draw(epoch, i, draw, self._counts) for draw in range(draws))):
            # A batch not yet full takes systematic passes over all places.
            self._counts["sweeps"] += 1
            most = 0
            for attempt in range(SWEEPS):
                generator = rng(config.seed, "sampler", epoch, "sweep", i, attempt)
                if self._fill(places, self._draws.sweep(generator)):
                    break
                most = max(most, len(places))
                places = []
            else:
                raise RuntimeError(
                    f"batch {i} of epoch {epoch} needs {config.places_per_batch} places of {config.images_per_place} "
                    f"images, and at most {most} were found in {SWEEPS} passes over all places "
                    f"({self._counts['cliques_dropped']} cliques dropped by pruning): lower places_per_batch by "
                    f"{config.places_per_batch - most}, prune less (tau, top_k) or give more images"
                )
        self._counts["batches"] += 1
        return np.stack([place.images for place in places])

    def _fill(self, places: list[MinedPlace], draws) -> bool:
        """Add places from one draw after the other; whether the batch became full."""
        for clusters, generator in draws:
            self._counts["draws"] += 1
            images = self._draws.images(clusters, generator, self._counts)
            if len(images) < self.config.images_per_place:
                continue
            options = {"choose": self._choose, "before": tuple(places), "counts": self._counts}
            for place in harvest(
                self.graph, images[generator.permutation(len(images))], self.config, **options
            ):
                places.append(place)
                if len(places) == self.config.places_per_batch:
                    return True
        return False

    @property
    def _any_images(self) -> bool:
        """Whether a place is any K images of its clique, so that no affinity is looked at."""
        config = self.config
        unpruned = config.tau is None and config.top_k is None
        return config.schedule == "none" or (config.prefer == "random" and unpruned)

    def _choose(self, clique: np.ndarray) -> np.ndarray | None:
        """The K of a clique's images that make a place, as positions among them."""
        k = self.config.images_per_place
        descriptors = self.graph.descriptors
        if self._refreshed is None or self._any_images:
            return np.arange(k)  # they are in random order already
        if isinstance(descriptors, _Described) and not (has := descriptors.has(clique)).all():
            self._missing.append(clique[~has])
            return np.arange(k)
        part = self.graph.subgraph(clique)
        chosen = greedy_weighted_clique(part.weight, k, prefer=self.config.prefer)
        if chosen is not None:
            pairs = chosen[:, None], chosen
            weight = np.where(np.eye(k, dtype=bool), 0.0, part.weight[pairs])
            self._counts["pairs"] += k * (k - 1) // 2
            self._counts["mean_d_geo_m"] += part.d_geo[pairs].sum() / 2
            self._counts["mean_d_vis"] += part.d_vis[pairs].sum() / 2
            self._counts["mean_weight"] += weight.sum() / 2
            self._counts["zero_weight_decisions"] += sum(not weight[t, :t].any() for t in range(1, k))
        return chosen

    def _check_room(self) -> None:
        """Refuse places that cannot fill a batch, before an epoch is spent on finding out."""
        config, most = self.config, 0
        for attempt in range(8):
            places: list[MinedPlace] = []
            full = self._fill(places, self._draws.sweep(rng(config.seed, "sampler", "room", attempt)))
            most = max(most, len(places))
            if full or 2 * most < config.places_per_batch:
                break
        self._counts = Counter()
        if most < config.places_per_batch:
            least = config.min_clique if config.fallback is None else config.images_per_place
            raise ValueError(
                f"{len(self.graph)} images have room for about {most} places of {config.images_per_place} images more "
                f"than {config.radius_m:g} m apart (each within a clique of at least {least}), and a batch needs "
                f"{config.places_per_batch}: lower places_per_batch by {config.places_per_batch - most}, or give more "
                "images"
            )

    @property
    def report(self) -> dict:
        """What the last refresh described and what the batches made since then, or in the last pass, are like.

        ``geographic_edges`` are the pairs of images within the radius, however they face. Counts of one pass over
        the epoch: ``batches``, ``draws``, ``sweeps`` (batches that needed systematic passes), ``cliques_found``,
        ``cliques_dropped`` (no K images left connected by the pruning), ``places``, ``fallback_places`` (from cliques
        under `min_clique`), ``mean_clique_size``, ``zero_weight_decisions`` (greedy decisions won at W = 0),
        ``uniform_draws`` (all places equally far: similar ones at random), ``thinned_places`` (that lent a random
        part of their images), ``searches_cut`` (of the clique searches), and ``mean_d_geo_m``, ``mean_d_vis``,
        ``mean_weight`` over the pairs chosen.
        """
        counts = self._counts
        whole = (
            "batches draws sweeps cliques_found cliques_dropped places fallback_places zero_weight_decisions"
        )
        whole += " uniform_draws thinned_places searches_cut"
        means = {"mean_d_geo_m": "pairs", "mean_d_vis": "pairs", "mean_weight": "pairs"}
        report = {
            "epoch": self.epoch,
            "refreshed_epoch": self._refreshed,
            "schedule": self.config.schedule,
            "node_descriptor": self.config.node_descriptor,
            "graph_context": self.config.graph_context,
            "images": len(self.graph),
            "clusters": len(self._draws.start) - 1,
            "cities": int(self.graph.city.max()) + 1,
            "geographic_edges": self.graph.n_near,
            **self._described,
            **{name: int(counts[name]) for name in whole.split()},
        }
        report["mean_clique_size"] = counts["clique_images"] / (counts["cliques_found"] or np.nan)
        return report | {name: float(counts[name] / (counts[per] or np.nan)) for name, per in means.items()}


# ------------------------------------------------------------------------------------------------
# Draws: which places look alike
# ------------------------------------------------------------------------------------------------


class _Draws:
    """Places that are looked at together.

    The draws of `PLANNED` batches are planned at once, so that distances to a city's places are one matrix product.
    A plan covers them all whatever part of it is used: a product has the same shape, and rounds the same way,
    wherever iteration begins.

    Parameters
    ----------
    graph, config
    descriptors : (n_clusters, D) float, optional
        None: places are drawn at random.
    """

    def __init__(self, graph: GeoVisualGraph, config: SamplerConfig, descriptors: np.ndarray | None = None):
        self.config, self.descriptors = config, descriptors
        # Sorted by city and cluster: images of a cluster, and clusters of a city, are ranges.
        self.order = np.argsort(graph.cluster, kind="stable")
        self.start = np.concatenate([[0], np.cumsum(np.bincount(graph.cluster))])
        self.city = graph.city[self.order[self.start[:-1]]]
        self.city_start = np.searchsorted(self.city, np.arange(self.city.max(initial=-1) + 2))
        self._chunk = None
        if descriptors is not None:
            norms = np.empty(len(descriptors))
            for at in range(0, len(norms), COLUMNS):
                block = np.asarray(descriptors[at : at + COLUMNS], dtype=np.float32)
                norms[at : at + COLUMNS] = np.sqrt(np.einsum("ij,ij->i", block, block))
            bad = np.flatnonzero(norms == 0)
            if len(bad):
                raise ValueError(
                    f"the descriptor of cluster {bad[0]} is zero ({len(bad)} of {len(norms)} are)"
                )
            self.inverse_norm = (1.0 / norms).astype(np.float32)

    def images(self, clusters, generator: np.random.Generator, counts: Counter) -> np.ndarray:
        """The images of some clusters, of crowded ones a random choice."""
        parts = []
        for cluster in np.asarray(clusters).tolist():
            part = self.order[self.start[cluster] : self.start[cluster + 1]]
            if len(part) > max(MOST_IMAGES, self.config.images_per_place):
                part = generator.choice(part, MOST_IMAGES, replace=False)
                counts["thinned_places"] += 1
            parts.append(part)
        return np.concatenate(parts)

    def sweep(self, generator: np.random.Generator) -> Iterator[tuple[np.ndarray, np.random.Generator]]:
        """Every place of every city once, in random order and as many at a time as a draw has."""
        size, groups = self.config.similar_places + 1, []
        for start, stop in zip(self.city_start[:-1], self.city_start[1:], strict=True):
            clusters = generator.permutation(np.arange(start, stop))
            groups.extend(clusters[at : at + size] for at in range(0, len(clusters), size))
        for index in generator.permutation(len(groups)):
            yield groups[index], generator

    def draw(self, epoch: int, i: int, draw: int, counts: Counter) -> tuple[np.ndarray, np.random.Generator]:
        """Clusters of one draw of batch `i`, the drawn one first, and the draw's stream where it goes on."""
        if self._chunk != (epoch, i // PLANNED):
            self._chunk, self._planned = (epoch, i // PLANNED), []
        first = i // PLANNED * PLANNED
        batches = range(first, min(first + PLANNED, self.config.batches_per_epoch))
        while draw >= len(self._planned):
            rounds = 1
            if not self._planned:
                rounds = -(-self.config.places_per_batch // (self.config.similar_places + 1)) + 1
            names = [(b, len(self._planned) + d) for d in range(rounds) for b in batches]
            drawn = self._plan(
                [rng(self.config.seed, "sampler", epoch, "draw", *name) for name in names], counts
            )
            self._planned += [drawn[at : at + len(batches)] for at in range(0, len(drawn), len(batches))]
        clusters, generator = self._planned[draw][i - first]
        return clusters, copy.deepcopy(generator)  # a batch may be made again

    def _plan(self, generators: list[np.random.Generator], counts: Counter) -> list:
        """A draw for each random stream."""
        n = len(self.city)
        if self.descriptors is None:  # random places of all cities
            size = min(self.config.similar_places + 1, n)
            return [(generator.choice(n, size, replace=False), generator) for generator in generators]
        share = np.cumsum(np.diff(self.city_start)) / n
        seeds = np.empty(len(generators), dtype=np.int64)
        for at, generator in enumerate(generators):
            city = min(int(np.searchsorted(share, generator.random(), side="right")), len(share) - 1)
            seeds[at] = generator.integers(self.city_start[city], self.city_start[city + 1])
        drawn: list = [None] * len(seeds)
        for city in np.unique(self.city[seeds]):
            of_city = np.flatnonzero(self.city[seeds] == city)
            for at in range(0, len(of_city), ROWS):
                part = of_city[at : at + ROWS]
                similar = self._similar(seeds[part], int(city), [generators[p] for p in part], counts)
                for p, others in zip(part, similar, strict=True):
                    drawn[p] = np.concatenate([[seeds[p]], others]), generators[p]
        return drawn

    def _similar(self, seeds: np.ndarray, city: int, generators: list, counts: Counter) -> list[np.ndarray]:
        """For each seed, up to `similar_places` other clusters of its city, without replacement.

        Weighted sampling without replacement as by Efraimidis and Spirakis (2006): the smallest of ``E_j / w_j``
        with independent exponential E_j are distributed as draws one after the other with probabilities proportional
        to w, here ``d_max - d`` with ``d = 1 - cosine``.
        """
        start, stop = int(self.city_start[city]), int(self.city_start[city + 1])
        wanted = min(self.config.similar_places, stop - start - 1)
        if wanted <= 0:
            return [np.empty(0, dtype=np.int64)] * len(seeds)
        keys = np.stack([g.standard_exponential(stop - start, dtype=np.float32) for g in generators])
        own = np.arange(len(seeds)), seeds - start
        distance = 1.0 - self._cosines(seeds, start, stop)
        distance[own] = -np.inf
        weight = distance.max(axis=1, keepdims=True) - distance
        weight[own] = 0.0
        flat = ~(weight > 0).any(axis=1)
        counts["uniform_draws"] += int(flat.sum())
        weight[flat] = 1.0
        weight[own] = 0.0
        with np.errstate(divide="ignore", invalid="ignore"):
            keys = np.where(weight > 0, keys / weight, np.inf)
        drawable = np.minimum(wanted, (weight > 0).sum(axis=1))
        best = np.argsort(keys, axis=1, kind="stable")[:, :wanted]
        return [start + row[:count] for row, count in zip(best, drawable, strict=True)]

    def _cosines(self, rows: np.ndarray, start: int, stop: int) -> np.ndarray:
        """(len(rows), stop - start) float32: cosines of clusters `rows` to the clusters of a range."""
        query = np.asarray(self.descriptors[rows], dtype=np.float32)
        result = np.empty((len(rows), stop - start), dtype=np.float32)
        for at in range(start, stop, COLUMNS):
            end = min(at + COLUMNS, stop)
            result[:, at - start : end - start] = (
                query @ np.asarray(self.descriptors[at:end], dtype=np.float32).T
            )
        return result * self.inverse_norm[rows][:, None] * self.inverse_norm[start:stop]


class _Described:
    """Descriptors of some of the images, in blocks as they were described; indexable by images like an array."""

    def __init__(self, n: int):
        self.blocks: list[np.ndarray] = []
        self.block, self.row = np.full(n, -1), np.zeros(n, dtype=np.int64)

    def add(self, images: np.ndarray, values: np.ndarray) -> None:
        self.block[images], self.row[images] = len(self.blocks), np.arange(len(images))
        self.blocks.append(values)

    def has(self, images: np.ndarray) -> np.ndarray:
        return self.block[images] >= 0

    def __getitem__(self, images: np.ndarray) -> np.ndarray:
        rows = zip(self.block[images].tolist(), self.row[images].tolist(), strict=True)
        return np.stack([self.blocks[block][row] for block, row in rows])


# ------------------------------------------------------------------------------------------------
# Labelled places
# ------------------------------------------------------------------------------------------------


class PlaceSampler(_BatchSampler):
    """Batches of random places x random images of each, for places labelled far apart (GSV-Cities).

    Parameters
    ----------
    place_labels : (n,) int or str
        The place of each image; a label names one place in the whole data. Negative integers: no place, left out.
    config : SamplerConfig
        Its `places_per_batch`, `images_per_place`, `batches_per_epoch` (more than a pass: further passes, each in a
        new order) and `seed`. Places of too few images are left out, and counted in `report`.

    Raises
    ------
    ValueError
        If fewer than P places have K images; the sentence says how many do.
    """

    def __init__(self, place_labels, config: SamplerConfig):
        self.config = config
        labels = np.asarray(place_labels)
        with_place = labels >= 0 if labels.dtype.kind in "if" else np.ones(len(labels), dtype=bool)
        images = np.flatnonzero(with_place)
        _, code, sizes = np.unique(labels[images], return_inverse=True, return_counts=True)
        members = np.split(images[np.argsort(code, kind="stable")], np.cumsum(sizes)[:-1])
        self._members = [part for part in members if len(part) >= config.images_per_place]
        n = len(self._members)
        if n < config.places_per_batch:
            raise ValueError(
                f"{n} of {len(sizes)} places have at least {config.images_per_place} images, and a batch needs "
                f"{config.places_per_batch} places: lower places_per_batch to {n} or less, or images_per_place"
            )
        self._per_pass = n // config.places_per_batch
        self.batches_per_epoch = config.batches_per_epoch or self._per_pass
        self._pass: tuple[int, int, np.ndarray] | None = None
        self.report = {
            "places": n,
            "places_left_out": len(sizes) - n,
            "images": sum(map(len, self._members)),
            "images_without_place": int((~with_place).sum()),
            "described_images": 0,
        }

    def needs_refresh(self, epoch: int) -> bool:
        """Never: labelled places need no descriptors."""
        return False

    def _batch(self, epoch: int, i: int) -> np.ndarray:
        number, at = divmod(i, self._per_pass)
        if self._pass is None or self._pass[:2] != (epoch, number):
            order = rng(self.config.seed, "places", epoch, "order", number).permutation(len(self._members))
            self._pass = (epoch, number, order)
        generator = rng(self.config.seed, "places", epoch, "batch", i)
        size, k = self.config.places_per_batch, self.config.images_per_place
        places = self._pass[2][at * size : (at + 1) * size]
        return np.stack([generator.choice(self._members[place], k, replace=False) for place in places])


# ------------------------------------------------------------------------------------------------
# What a sampler picks
# ------------------------------------------------------------------------------------------------


def batch_statistics(
    batches, descriptors, east_m, north_m, *, images_per_place: int = 4
) -> dict[str, np.ndarray]:
    """How hard the batches of a sampler are, to compare samplers.

    Parameters
    ----------
    batches : iterable of (P * K,) int
        Image indices, place by place.
    descriptors : (n, D) float
        Of all images; need not be normalised.
    east_m, north_m : (n,) float
    images_per_place : int
        K.

    Returns
    -------
    dict of arrays
        Per image of the batches: ``hardest_negative``, the greatest cosine to an image of another place of its
        batch. Per pair of images of one place: ``positive_similarity`` (cosine) and ``positive_distance_m``.
    """
    result = {"hardest_negative": [], "positive_similarity": [], "positive_distance_m": []}
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
        hardest = np.full(len(batch), np.nan) if same.all() else np.where(same, -np.inf, cosine).max(axis=1)
        result["hardest_negative"].append(hardest)
        result["positive_similarity"].append(cosine[i, j])
        metres = np.sqrt((east_m[a] - east_m[b]) ** 2 + (north_m[a] - north_m[b]) ** 2)
        result["positive_distance_m"].append(metres)
    return {name: np.concatenate(values) if values else np.empty(0) for name, values in result.items()}
