"""From descriptors to training batches: similar places, cliques among their images, a few images of each.

`CliqueSampler` mines batches of P places x K images from the geo-visual graph, the current model's descriptors saying
which places look alike and which images of a place to take. `PlaceSampler` draws batches from labelled places. Both
are batch samplers for a ``torch.utils.data.DataLoader``: iterating yields lists of image indices, place by place.

A batch is made so. A city is drawn with probability proportional to its number of places, one place in it, and
`similar_places` more with probability proportional to ``d_max - d`` of their descriptors: one draw. The images of these
places, joined within `radius_m`, form a graph; its first clique of at least `min_clique` images gives the K images
of one training place by greedy weighted choice. Those and their neighbours leave the graph and the search goes on;
when no clique is left, the next draw follows, until the batch has P places.

A draw's graph is made from the positions of its images, so neither memory nor time depends on how many images of the
whole set lie within the radius of each other. What can be done together is: the draws of a thousand batches are planned
ahead, so that distances to a city's places are one matrix product. Every draw has a random stream of its own, named by
(seed, epoch, batch, draw), so a batch depends on nothing but these and the descriptors: not on workers, ranks, or the
batch at which iteration began.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from sagelib.graph import (
    MEND,
    PREFERENCES,
    SearchBudget,
    _greedy,
    adjacency_bits,
    affinity,
    bits_of,
    check_edge_options,
    check_headings,
    check_length,
    check_one_zone,
    check_positions,
    first_clique,
    geographic_distances,
    largest_clique,
    nodes_of,
    prune,
    visual_distances,
)
from sagelib.places import heading_difference, same_grid
from sagelib.runs import rng

__all__ = ["CliqueSampler", "PlaceSampler", "batch_statistics"]

NODE_DESCRIPTORS = ("image", "cluster")
SCHEDULES = ("online", "static", "none")
REMOVALS = ("chosen", "clique")
CONTEXTS = ("none", "solo", "anchors")
SPLITS = ("places", "batches")
FALLBACKS = ("draw", "step", None)

_CHUNK = 1024  # batches whose draws are planned together
_SWEEPS = 3  # passes over all places before a batch is given up
_NEAR = 1 << 17  # pairs of images whose distances are computed at once
_ROWS, _COLUMNS = 256, 4096  # rows and columns of one matrix product of cluster descriptors


class CliqueSampler:
    """Batches of `places_per_batch` x `images_per_place` image indices, mined from the geo-visual graph.

    Parameters
    ----------
    east_m, north_m : (n,) float
        UTM positions of the images, in metres. Finite.
    utm_zone : (n,) str, optional
        One zone per city; cities of one zone share a plane. Empty or not given: each city is a plane of its own.
    city : (n,) str or int, optional
        None: all images are of one city.
    cluster : (n,) str or int, optional
        The place label of each image within its city. None: squares of side `radius_m`.
    heading_deg : (n,) float, optional
        Needed by `max_heading_deg` only.
    places_per_batch, images_per_place : int
        P and K; a batch has P x K images. The paper mines 30 x 4.
    similar_places : int
        Places drawn beside each place drawn, by their descriptors; the paper's P = 15.
    batches_per_epoch : int
        The length of the sampler.
    radius_m : float
        Images at most this far apart are joined (inclusive).
    max_heading_deg : float or None
        Join only images whose headings differ by no more. None, as in the paper: facing the other way is the same
        place. Whatever it is, images within the radius of a chosen place, however they face, leave the batch.
    min_clique : int
        Fewest images of a clique.
    fallback : {"draw", "step", None}
        When cliques of fewer than `min_clique` but at least K images serve, largest first. ``"draw"``: in a draw where
        no clique reaches `min_clique`. ``"step"``: also for what is left of a draw when its large cliques are taken.
        None: never. The paper does not say.
    tau : float or None
        Keep edges of a clique with ``W > tau``; the paper's value is not public. Unit descriptors have ``W >= -50``.
    top_k : int or None
        Keep an edge of a clique that is among the `top_k` best of either end.
    prefer : {"affine", "hard", "uniform"}
        The greedy choice maximises affinity as the paper writes it, minimises it, or picks at random.
    node_descriptor : {"image", "cluster"}
        ``d_vis`` between the images' own descriptors, or between those of their clusters. The paper is silent.
    schedule : {"online", "static", "none"}
        New descriptors every `refresh_every` epochs, once, or never: without descriptors, places are drawn at random
        and so are the images of their cliques.
    refresh_every : int
        Epochs between refreshes of the online schedule.
    remove : {"chosen", "clique"}
        Whether the K chosen images and their neighbours leave the graph, or the clique and its neighbours.
    min_distance_m : float
        A floor under ``d_geo``.
    graph_context : {"none", "solo", "anchors"}
        The context in which the caller's model makes the graph's descriptors; recorded in `report`.
    split : {"places", "batches"}
        How several ranks share the work. ``"places"``: every rank takes ``P / world_size`` places of each batch, for
        training that gathers descriptors and sees the whole batch. ``"batches"``: batch i goes to rank
        ``i % world_size``. Either way the shards are disjoint and together they are the one-process result.
    max_place_images : int
        A cluster of more images contributes a random choice of so many to a draw, which bounds a draw's graph.
    search_steps : int
        Steps after which one search for a clique gives up, counted as ``searches_cut``.
    max_draws : int or None
        Draws after which a batch not yet full takes a systematic pass over all places. None: 4 P + 16.
    seed, rank, world_size : int

    Raises
    ------
    ValueError
        For coordinates that are not finite, UTM zones mixed in a city, options out of range, or images that have no
        room for P places of K images: the sentence says for how many they have.

    Notes
    -----
    Use it as ``DataLoader(dataset, batch_sampler=sampler)``. In each epoch: ``if sampler.needs_refresh(epoch):
    sampler.refresh(epoch, describe)``, else ``sampler.set_epoch(epoch)``; then iterate.
    """

    def __init__(
        self,
        east_m,
        north_m,
        *,
        utm_zone=None,
        city=None,
        cluster=None,
        heading_deg=None,
        places_per_batch: int = 30,
        images_per_place: int = 4,
        similar_places: int = 15,
        batches_per_epoch: int = 4000,
        radius_m: float = 25.0,
        max_heading_deg: float | None = None,
        min_clique: int = 10,
        fallback: str | None = "draw",
        tau: float | None = None,
        top_k: int | None = None,
        prefer: str = "affine",
        node_descriptor: str = "image",
        schedule: str = "online",
        refresh_every: int = 1,
        remove: str = "chosen",
        min_distance_m: float = 0.0,
        graph_context: str = "none",
        split: str = "places",
        max_place_images: int = 256,
        search_steps: int = 20_000,
        max_draws: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        started = time.perf_counter()
        check_edge_options(radius_m, max_heading_deg, tau, top_k, min_distance_m)
        for name, value, least in (
            ("places_per_batch", places_per_batch, 1),
            ("images_per_place", images_per_place, 1),
            ("similar_places", similar_places, 0),
            ("batches_per_epoch", batches_per_epoch, 1),
            ("min_clique", min_clique, 1),
            ("refresh_every", refresh_every, 1),
            ("max_place_images", max_place_images, images_per_place),
            ("search_steps", search_steps, 1),
            ("max_draws", 1 if max_draws is None else max_draws, 1),
            ("seed", seed, 0),
        ):
            _check_integer(name, value, least)
        for name, value, allowed in (
            ("prefer", prefer, PREFERENCES),
            ("node_descriptor", node_descriptor, NODE_DESCRIPTORS),
            ("schedule", schedule, SCHEDULES),
            ("remove", remove, REMOVALS),
            ("graph_context", graph_context, CONTEXTS),
            ("fallback", fallback, FALLBACKS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
        _check_split(split, rank, world_size, places_per_batch)
        if min_clique < images_per_place:
            raise ValueError(
                f"min_clique must be at least images_per_place: a clique of {min_clique} images cannot give "
                f"{images_per_place}"
            )
        self.places_per_batch = int(places_per_batch)
        self.images_per_place = int(images_per_place)
        self.similar_places = int(similar_places)
        self.batches_per_epoch = int(batches_per_epoch)
        self.radius_m = float(radius_m)
        self.max_heading_deg = max_heading_deg
        self.min_clique = int(min_clique)
        self.fallback = fallback
        self.tau, self.top_k = tau, top_k
        self.prefer = prefer
        self.node_descriptor = node_descriptor
        self.schedule = schedule
        self.refresh_every = int(refresh_every)
        self.remove = remove
        self.min_distance_m = float(min_distance_m)
        self.graph_context = graph_context
        self.split = split
        self.max_place_images = int(max_place_images)
        self.search_steps = int(search_steps)
        self.max_draws = 4 * self.places_per_batch + 16 if max_draws is None else int(max_draws)
        self.seed, self.rank, self.world_size = int(seed), int(rank), int(world_size)
        self.epoch = 0

        self._order_images(east_m, north_m, utm_zone, city, cluster, heading_deg)
        self._left: list[
            np.ndarray
        ] = []  # images that have left the current batch, and their neighbours with them
        self._clusters: _ClusterDescriptors | None = None
        self._images: np.ndarray | _DescribedImages | None = None
        self._refreshed: int | None = None
        self._stored: dict[int, np.ndarray] = {}
        self._chunk: _Chunk | None = None
        self._seconds_graph = time.perf_counter() - started
        self._refresh_report = {
            "descriptors": None,
            "described_images": 0,
            "describe_calls": 0,
            "seconds_describe": 0.0,
        }
        self._counts = _Counts()
        self._check_room()

    @classmethod
    def from_places(cls, places, **options) -> CliqueSampler:
        """A sampler over a `Places` table; its place labels are the clusters if every image has one.

        A city that lies in two UTM zones is taken as two cities.
        """
        labelled = len(places) > 0 and bool((np.asarray(places.place) >= 0).all())
        city = np.asarray(places.city).astype(str)
        both = np.char.add(np.char.add(city, " "), same_grid(places.utm_zone).astype(str))
        if len(np.unique(both)) > len(np.unique(city)):
            city = both
        defaults = {
            "utm_zone": places.utm_zone,
            "city": city,
            "cluster": places.place if labelled else None,
            "heading_deg": places.heading_deg,
        }
        return cls(places.east_m, places.north_m, **{**defaults, **options})

    # -- what is static -----------------------------------------------------------------------------------------------

    def _order_images(self, east_m, north_m, utm_zone, city, cluster, heading_deg) -> None:
        """Sort images by city and cluster: those of a cluster, and the clusters of a city, are then ranges."""
        east, north = check_positions(east_m, north_m)
        n = len(east)
        if n == 0:
            raise ValueError(
                "there are no images: a sampler needs at least one place of images_per_place images"
            )
        heading = check_headings(heading_deg, self.max_heading_deg, n)
        city_names, city_code = _codes("city", city, n)
        if cluster is None:
            cell = np.column_stack([np.floor(east / self.radius_m), np.floor(north / self.radius_m)])
            cluster_code = np.unique(cell, axis=0, return_inverse=True)[1].reshape(-1)
        else:
            _, cluster_code = _codes("cluster", cluster, n)
        self._order = np.lexsort((cluster_code, city_code))
        city_code, cluster_code = city_code[self._order], cluster_code[self._order]
        begins = np.flatnonzero(
            np.concatenate([[True], (np.diff(city_code) != 0) | (np.diff(cluster_code) != 0)])
        )
        self._cluster_start = np.concatenate([begins, [n]])
        self._cluster_of = np.repeat(np.arange(len(begins), dtype=np.int32), np.diff(self._cluster_start))
        self._city_of_cluster = city_code[begins]
        self._city_start = np.searchsorted(self._city_of_cluster, np.arange(len(city_names) + 1))
        self._east, self._north = east[self._order], north[self._order]
        self._heading = None if heading is None else heading[self._order]
        # Images share a plane when their cities share a known zone.
        plane = city_code
        if utm_zone is not None:
            zones = np.asarray(utm_zone).astype(str)
            check_length("utm_zone", zones, n)
            zones = zones[self._order]
            grids = same_grid(zones)
            starts = self._cluster_start[self._city_start]
            names = []
            for code, name in enumerate(city_names):
                part = zones[starts[code] : starts[code + 1]]
                check_one_zone(part, len(part), f" in city {str(name)!r}")
                names.append(grids[starts[code]] or f"?{code}")
            plane = np.unique(names, return_inverse=True)[1][city_code]
        self._plane = plane
        self.city_names = city_names

    def _planes(self) -> Iterator[tuple[np.ndarray, cKDTree]]:
        """The images of each plane, and a tree of their positions."""
        order = np.argsort(self._plane, kind="stable")
        for images in np.split(order, np.flatnonzero(np.diff(self._plane[order])) + 1):
            yield images, cKDTree(np.column_stack([self._east[images], self._north[images]]))

    @functools.cached_property
    def _pairs(self) -> int:
        """How many pairs of images lie within the radius: counted, not listed."""
        return sum(
            (int(tree.count_neighbors(tree, self.radius_m)) - len(images)) // 2
            for images, tree in self._planes()
        )

    @property
    def n_images(self) -> int:
        return len(self._east)

    @property
    def n_clusters(self) -> int:
        return len(self._city_of_cluster)

    @property
    def clusters(self) -> np.ndarray:
        """(n,) int64: the cluster of each image, numbered from 0 by city and label, both in sorted order.

        Cluster descriptors given to `refresh` as a (n_clusters, D) array are in this numbering.
        """
        result = np.empty(self.n_images, dtype=np.int64)
        result[self._order] = self._cluster_of
        return result

    def representatives(self, epoch: int) -> np.ndarray:
        """(n_clusters,) int64: one random image of each cluster, the one to describe for `epoch`."""
        u = rng(self.seed, "sampler", epoch, "representatives").random(self.n_clusters)
        sizes = np.diff(self._cluster_start)
        return self._order[self._cluster_start[:-1] + np.minimum((u * sizes).astype(np.int64), sizes - 1)]

    # -- epochs and descriptors ---------------------------------------------------------------------------------------

    @property
    def _edges_suffice(self) -> bool:
        """Whether a place is any K images of its clique, so that no affinity is looked at."""
        return self.schedule == "none" or (
            self.prefer == "uniform" and self.tau is None and self.top_k is None
        )

    def needs_refresh(self, epoch: int) -> bool:
        """Whether `refresh` has to be called before the batches of `epoch` can be made."""
        if self.schedule == "none" or epoch in self._stored:
            return False
        if self._refreshed is None:
            return True
        return self.schedule == "online" and not 0 <= epoch - self._refreshed < self.refresh_every

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches iteration gives."""
        _check_integer("epoch", epoch, 0)
        if epoch != self.epoch:
            self._chunk = None
        self.epoch = int(epoch)

    def refresh(self, epoch: int, describe: Callable | np.ndarray | None = None) -> dict:
        """Take new descriptors, and set the epoch.

        Parameters
        ----------
        epoch : int
        describe : callable or array
            A callable from image indices, (m,) int64, to their descriptors, (m, D) float16 or float32, made by the
            current model in evaluation mode. It is asked for one random image of each cluster and, with
            ``node_descriptor="image"``, for the images of the cliques that the epoch's batches are made of (with the
            static schedule: for all images that have enough neighbours). Or an array of descriptors already
            computed, memory-mapped or not: (n_images, D), or (n_clusters, D) in the numbering of `clusters` for
            ``node_descriptor="cluster"``. It is kept by reference.

        Returns
        -------
        dict
            `report`.

        Notes
        -----
        What the callable returns for the images of an epoch is kept in memory, in the type it has, until the batches up
        to the next refresh are made (the static schedule: for good). Return float16 to halve it, or give a memory map.

        Raises
        ------
        ValueError
            For descriptors of a wrong shape, not finite, or zero.
        """
        self.set_epoch(epoch)
        self._stored, self._chunk = {}, None
        if self.schedule == "none":
            return self.report
        if describe is None:
            raise ValueError(
                "refresh needs describe: a callable from image indices to descriptors, or an array"
            )
        started = time.perf_counter()
        self._refresh_report = {
            "descriptors": "described" if callable(describe) else "given",
            "described_images": 0,
            "describe_calls": 0,
            "seconds_describe": 0.0,
        }
        representatives = self.representatives(epoch)
        if callable(describe):
            values = self._describe(describe, representatives)
            self._clusters = _ClusterDescriptors(values, representatives)
            if self.node_descriptor == "image":
                self._images = _DescribedImages(self.n_images)
                self._images.add(representatives, values)
        else:
            if np.ndim(describe) != 2 or len(describe) not in (self.n_images, self.n_clusters):
                raise ValueError(
                    f"descriptors must have shape ({self.n_images}, D), one row per image, or ({self.n_clusters}, "
                    f"D), one per cluster, got {np.shape(describe)}"
                )
            _check_finite(describe, None)
            if len(describe) == self.n_images:
                self._clusters = _ClusterDescriptors(describe[representatives], representatives)
                self._images = describe
            else:
                if self.node_descriptor == "image":
                    raise ValueError(
                        f"node_descriptor='image' needs descriptors of all {self.n_images} images, got "
                        f"{len(describe)} rows, one per cluster: give them, or set node_descriptor='cluster'"
                    )
                self._clusters, self._images = _ClusterDescriptors(describe, None), None
        self._refreshed = int(epoch)
        if callable(describe) and self.node_descriptor == "image" and not self._edges_suffice:
            self._describe_images(epoch, describe)
        self._refresh_report["seconds_refresh"] = time.perf_counter() - started
        return self.report

    def _describe(self, describe: Callable, images: np.ndarray) -> np.ndarray:
        started = time.perf_counter()
        values = np.asarray(describe(images))
        self._refresh_report["seconds_describe"] += time.perf_counter() - started
        self._refresh_report["described_images"] += len(images)
        self._refresh_report["describe_calls"] += 1
        if values.ndim != 2 or len(values) != len(images):
            raise ValueError(
                f"describe must return shape ({len(images)}, D) for {len(images)} images, got {values.shape}"
            )
        _check_finite(values, images)
        return values

    def _describe_images(self, epoch: int, describe: Callable) -> None:
        """Describe the images whose affinities the coming batches need, and make these batches.

        Which cliques a batch meets may depend on the choices made before, and these on descriptors. So batches are
        made in waves: where descriptors are missing, a batch goes on with a provisional choice; then what was missing
        is described at once, and the batches that missed any are made again. Each wave settles at least one more
        place of each batch, and in practice nearly all in the first.
        """
        if self.schedule == "static":
            enough = np.zeros(self.n_images, dtype=bool)
            for images, tree in self._planes():
                farthest, _ = tree.query(tree.data, [self.images_per_place])
                enough[images] = farthest[:, 0] <= self.radius_m * (1 + 1e-9)
            images = np.setdiff1d(self._order[enough], self._images.known())
            if len(images):
                self._images.add(images, self._describe(describe, images))
            return
        total = _Counts()
        for later in range(epoch, epoch + self.refresh_every):
            batches = np.empty(
                (self.batches_per_epoch, self.places_per_batch, self.images_per_place), np.int32
            )
            todo = list(range(self.batches_per_epoch))
            while todo:
                missing: list[np.ndarray] = []
                again = []
                for i in todo:
                    before, self._counts = len(missing), _Counts()
                    batches[i] = self._make_batch(later, i, missing)
                    provisional = len(missing) > before
                    if provisional:
                        again.append(i)
                    total.add(self._counts, seconds_only=provisional)
                if missing:
                    images = self._order[np.unique(np.concatenate(missing))]
                    self._images.add(images, self._describe(describe, images))
                todo = again
            self._stored[later] = batches
        self._counts = total
        self._images = None  # every batch until the next refresh is made
        self._chunk = None

    # -- iteration ----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        if self.split == "places":
            return self.batches_per_epoch
        return len(range(self.rank, self.batches_per_epoch, self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches_from(0)

    def batches_from(self, start: int) -> Iterator[list[int]]:
        """This rank's batches of the epoch from position `start` on, to resume within an epoch."""
        _check_integer("start", start, 0)
        if self.needs_refresh(self.epoch):
            raise RuntimeError(
                f"epoch {self.epoch} has no descriptors yet: call refresh(epoch, describe) first"
                if self._refreshed is None
                else f"the descriptors of epoch {self._refreshed} do not serve epoch {self.epoch} "
                f"(refresh_every={self.refresh_every}): call refresh(epoch, describe) first"
            )
        return self._iterate(self.epoch, start)

    def _iterate(self, epoch: int, start: int) -> Iterator[list[int]]:
        if epoch not in self._stored:
            self._counts = _Counts()
        part = self.places_per_batch // self.world_size
        for position in range(start, len(self)):
            if self.split == "places":
                batch = self._batch(epoch, position)[self.rank * part : (self.rank + 1) * part]
            else:
                batch = self._batch(epoch, self.rank + position * self.world_size)
            yield batch.reshape(-1).tolist()

    def _batch(self, epoch: int, i: int) -> np.ndarray:
        return self._stored[epoch][i] if epoch in self._stored else self._make_batch(epoch, i)

    def look_at_draw(self, batch: int, draw: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The clusters of one draw of a batch of this epoch, the drawn one first, and the images of these clusters.

        For figures: the images are the candidates before any left the batch.
        """
        if self.needs_refresh(self.epoch):
            raise RuntimeError(
                f"the draws of epoch {self.epoch} need its descriptors: call refresh(epoch, describe)"
            )
        self._open_chunk(self.epoch, batch // _CHUNK)
        clusters, _ = self._chunk.draw(batch, draw)
        inside = np.isin(self._cluster_of, clusters)
        return np.asarray(clusters), np.sort(self._order[inside])

    @property
    def report(self) -> dict:
        """What the last refresh described and what the batches made since then, or in the last pass, are like.

        ``geographic_edges`` are the pairs of images within the radius, however they face.
        Counts of one pass over the epoch: ``batches``, ``draws``, ``places``, ``cliques_found``, ``mean_clique_size``,
        ``fallback_places`` (from cliques under `min_clique`), ``cliques_dropped`` (no K images left connected by the
        pruning), ``zero_weight_decisions`` (greedy decisions won at W = 0), ``uniform_draws`` (all places equally
        far: similar ones at random), ``sweeps`` (batches that needed the systematic pass), ``search_steps`` and
        ``searches_cut`` (of the clique searches), ``mean_d_geo_m``, ``mean_d_vis``, ``mean_weight`` (over the pairs
        chosen), ``seconds_batches``, ``seconds_plan``.
        """
        return {
            "epoch": self.epoch,
            "refreshed_epoch": self._refreshed,
            "schedule": self.schedule,
            "node_descriptor": self.node_descriptor,
            "graph_context": self.graph_context,
            "images": self.n_images,
            "clusters": self.n_clusters,
            "cities": len(self.city_names),
            "geographic_edges": self._pairs,
            "seconds_graph": self._seconds_graph,
            **self._refresh_report,
            **self._counts.report(),
        }

    # -- one batch ----------------------------------------------------------------------------------------------------

    def _make_batch(self, epoch: int, i: int, missing: list | None = None) -> np.ndarray:
        """(P, K) image indices of batch `i`.

        With `missing`, a list: sorted indices of images that need a description are appended to it, and the batch is
        provisional if any are.
        """
        started = time.perf_counter()
        self._open_chunk(epoch, i // _CHUNK)
        places: list[np.ndarray] = []
        self._left = []
        most = 0
        for draw in range(self.max_draws):
            clusters, generator = self._chunk.draw(i, draw)
            self._harvest(clusters, generator, places, missing)
            if len(places) == self.places_per_batch:
                break
        else:
            self._counts.sweeps += 1
            for attempt in range(_SWEEPS):
                self._sweep(rng(self.seed, "sampler", epoch, "sweep", i, attempt), places, missing)
                if len(places) == self.places_per_batch:
                    break
                most = max(most, len(places))
                places, self._left = [], []
            else:
                raise RuntimeError(
                    f"batch {i} of epoch {epoch} needs {self.places_per_batch} places of {self.images_per_place} "
                    f"images, and at most {most} were found after {self.max_draws} draws and {_SWEEPS} passes over "
                    f"all {self.n_clusters} clusters ({self._counts.cliques_dropped} cliques dropped by pruning): lower "
                    f"places_per_batch by {self.places_per_batch - most}, prune less (tau, top_k) or give more images"
                )
        self._counts.batches += 1
        self._counts.seconds_batches += time.perf_counter() - started
        return self._order[np.concatenate(places)].reshape(self.places_per_batch, self.images_per_place)

    def _open_chunk(self, epoch: int, number: int) -> None:
        if self._chunk is None or (self._chunk.epoch, self._chunk.number) != (epoch, number):
            self._chunk = _Chunk(self, epoch, number)

    def _sweep(self, generator, places: list, missing: list | None) -> None:
        """Look at every place of every city once, in random order and as many at a time as a draw has."""
        size = self.similar_places + 1
        groups = []
        for city in range(len(self.city_names)):
            clusters = np.arange(self._city_start[city], self._city_start[city + 1])
            clusters = generator.permutation(clusters)
            groups.extend(clusters[at : at + size] for at in range(0, len(clusters), size))
        for index in generator.permutation(len(groups)):
            self._harvest(groups[index], generator, places, missing)
            if len(places) == self.places_per_batch:
                return

    def _harvest(self, clusters, generator, places: list, missing: list | None) -> None:
        """Take places out of the images of `clusters` until there are no cliques left or the batch is full."""
        counts = self._counts
        counts.draws += 1
        images = self._images_of(clusters, generator)
        n = len(images)
        if n < self.images_per_place:
            return
        # Node numbers are a random permutation: which clique is first, and which of equal images, is the stream's.
        images = images[generator.permutation(n)]
        free = np.ones(n, dtype=bool)
        if self._left:
            free = ~self._near(images, np.concatenate(self._left)).any(axis=1)
        near = self._near(images, images)
        np.fill_diagonal(near, False)
        adjacency = nearby = adjacency_bits(near)
        if self._heading is not None:
            heading = self._heading[images]
            near &= heading_difference(heading[:, None], heading) <= self.max_heading_deg
            adjacency = adjacency_bits(near)
        usable, budget = bits_of(free), SearchBudget(self.search_steps)
        alive, large, found_large = usable, True, False
        while len(places) < self.places_per_batch:
            if large:
                clique, alive = first_clique(adjacency, alive, self.min_clique, budget)
                if not clique:
                    if self.fallback is None or (self.fallback == "draw" and found_large):
                        break
                    large = False
                    continue
                found_large = True
            else:
                clique = largest_clique(adjacency, usable, self.images_per_place, budget)
                if not clique:
                    break
            nodes = np.array(nodes_of(clique))
            counts.cliques_found += 1
            counts.clique_images += len(nodes)
            chosen = self._choose(images[nodes], missing)
            if chosen is None:
                counts.cliques_dropped += 1
                usable &= ~clique
            else:
                counts.fallback_places += not large
                places.append(images[nodes[chosen]])
                leaving = nodes[chosen] if self.remove == "chosen" else nodes
                for node in leaving.tolist():
                    usable &= ~(nearby[node] | 1 << node)
                self._left.append(images[leaving])
            alive &= usable
        counts.search_steps += budget.spent
        counts.searches_cut += budget.cut

    def _images_of(self, clusters, generator) -> np.ndarray:
        starts, stops = self._cluster_start[clusters], self._cluster_start[np.asarray(clusters) + 1]
        parts = []
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            part = np.arange(start, stop)
            if stop - start > self.max_place_images:
                part = generator.choice(part, self.max_place_images, replace=False)
                self._counts.thinned_places += 1
            parts.append(part)
        return np.concatenate(parts)

    def _near(self, rows, columns) -> np.ndarray:
        """Which images lie within the radius of which, (len(rows), len(columns)) bool."""
        near = np.zeros((len(rows), len(columns)), dtype=bool)
        east, north, plane = self._east[columns], self._north[columns], self._plane[columns]
        step = max(1, _NEAR // len(columns))
        for start in range(0, len(rows), step):
            part = rows[start : start + step, None]
            squared = np.square(self._east[part] - east)
            squared += np.square(self._north[part] - north)
            near[start : start + step] = np.sqrt(squared, out=squared) <= self.radius_m
            if len(self.city_names) > 1:
                near[start : start + step] &= self._plane[part] == plane
        return near

    def _choose(self, images, missing: list | None) -> np.ndarray | None:
        """The K of a clique's `images` (sorted numbering) that make a place, as positions among them."""
        k = self.images_per_place
        if self._clusters is None or self._edges_suffice:
            return np.arange(k)  # the nodes are in random order already
        if self.node_descriptor == "cluster" and self.top_k is None:
            clusters = self._cluster_of[images]
            if (clusters == clusters[0]).all():  # every affinity is 0: the greedy choice is the first k
                d_geo, zero = (
                    geographic_distances(self._east[images[:k]], self._north[images[:k]]),
                    np.zeros((k, k)),
                )
                self._counts.add_choice(d_geo, zero, zero)
                return np.arange(k)
        d_vis = self._visual(images, missing)
        if d_vis is None:
            return np.arange(k)
        d_geo = geographic_distances(self._east[images], self._north[images])
        weight = affinity(d_geo, d_vis, min_distance_m=self.min_distance_m)
        if self.tau is None and self.top_k is None:
            weight.reshape(-1)[:: len(weight) + 1] = -np.inf
        else:
            weight = prune(weight, tau=self.tau, top_k=self.top_k)
        chosen = _greedy(weight, k, self.prefer)
        if chosen is not None:
            part = (chosen[:, None], chosen)
            self._counts.add_choice(d_geo[part], d_vis[part], weight[part])
        return chosen

    def _visual(self, images, missing: list | None) -> np.ndarray | None:
        if self.node_descriptor == "cluster":
            clusters, position = np.unique(self._cluster_of[images], return_inverse=True)
            if len(clusters) == 1:
                return np.zeros((len(images), len(images)))
            return visual_distances(self._clusters.values[clusters])[position][:, position]
        original = self._order[images]
        if self._images is None:
            raise RuntimeError(
                "the descriptors of this epoch are gone since a later refresh: begin iteration again"
            )
        if isinstance(self._images, _DescribedImages):
            unknown = ~self._images.has(original)
            if unknown.any():
                if missing is None:
                    raise RuntimeError(f"image {original[unknown][0]} was not described at the last refresh")
                missing.append(images[unknown])
                return None
        d_vis = visual_distances(self._images[original])
        if not np.isfinite(d_vis).all():
            bad = [int(i) for i in original if not np.isfinite(self._images[np.array([i])]).all()]
            raise ValueError(f"the descriptor of image {bad[0]} holds a NaN or an infinity: {MEND}")
        return d_vis

    def _check_room(self) -> None:
        """Refuse places that cannot fill a batch, before an epoch is spent on finding out."""
        most = 0
        for attempt in range(8):
            places: list[np.ndarray] = []
            self._left = []
            self._sweep(rng(self.seed, "sampler", "room", attempt), places, None)
            most = max(most, len(places))
            if most == self.places_per_batch or 2 * most < self.places_per_batch:
                break
        self._counts = _Counts()
        if most < self.places_per_batch:
            least = self.min_clique if self.fallback is None else self.images_per_place
            raise ValueError(
                f"{self.n_images} images have room for about {most} places of {self.images_per_place} images more than "
                f"{self.radius_m:g} m apart (each within a clique of at least {least}), and a batch needs "
                f"{self.places_per_batch}: lower places_per_batch by {self.places_per_batch - most}, or give more images"
            )


@dataclass
class _Counts:
    """What one pass over an epoch's batches met."""

    batches: int = 0
    draws: int = 0
    sweeps: int = 0
    cliques_found: int = 0
    clique_images: int = 0
    cliques_dropped: int = 0
    fallback_places: int = 0
    zero_weight_decisions: int = 0
    uniform_draws: int = 0
    thinned_places: int = 0
    search_steps: int = 0
    searches_cut: int = 0
    pairs: int = 0
    sum_d_geo: float = 0.0
    sum_d_vis: float = 0.0
    sum_weight: float = 0.0
    seconds_batches: float = 0.0
    seconds_plan: float = 0.0

    def add(self, other: _Counts, *, seconds_only: bool = False) -> None:
        for name, value in vars(other).items():
            if not seconds_only or name.startswith("seconds_"):
                setattr(self, name, getattr(self, name) + value)

    def add_choice(self, d_geo, d_vis, weight) -> None:
        """Count the pairs of one place: distances (K, K) of the chosen images, in the order chosen."""
        k = len(d_geo)
        self.pairs += k * (k - 1) // 2
        self.sum_d_geo += float(d_geo.sum()) / 2
        self.sum_d_vis += float(d_vis.sum()) / 2
        weight.reshape(-1)[:: k + 1] = 0.0
        self.sum_weight += float(weight.sum()) / 2
        # The mean that won each decision after the seed; affinities are never positive, so 0 means all are 0.
        if np.count_nonzero(weight) < k * (k - 1):
            self.zero_weight_decisions += sum(not weight[t, :t].any() for t in range(1, k))

    def report(self) -> dict:
        result = {
            k: v
            for k, v in vars(self).items()
            if not k.startswith("sum_") and k not in ("pairs", "clique_images")
        }
        result["places"] = self.cliques_found - self.cliques_dropped
        result["mean_clique_size"] = (
            self.clique_images / self.cliques_found if self.cliques_found else float("nan")
        )
        for name, total in (
            ("mean_d_geo_m", self.sum_d_geo),
            ("mean_d_vis", self.sum_d_vis),
            ("mean_weight", self.sum_weight),
        ):
            result[name] = total / self.pairs if self.pairs else float("nan")
        return result


# ---------------------------------------------------------------------------------------------------------------------
# Draws: which places look alike
# ---------------------------------------------------------------------------------------------------------------------


class _ClusterDescriptors:
    """One descriptor per cluster, checked, with the norms that make inner products cosines."""

    def __init__(self, values, images: np.ndarray | None):
        self.values = values
        norms = np.empty(len(values), dtype=np.float64)
        for start in range(0, len(values), _COLUMNS):
            block = np.asarray(values[start : start + _COLUMNS], dtype=np.float32)
            norms[start : start + _COLUMNS] = np.sqrt(np.einsum("ij,ij->i", block, block))
        bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
        if len(bad):
            what = "is zero" if norms[bad[0]] == 0 else "holds a NaN or an infinity"
            where = f"cluster {bad[0]}" if images is None else f"image {images[bad[0]]}"
            raise ValueError(
                f"the descriptor of {where} {what} ({len(bad)} of {len(norms)} clusters): {MEND}"
            )
        self.inverse_norm = (1.0 / norms).astype(np.float32)

    def cosines(self, rows: np.ndarray, start: int, stop: int) -> np.ndarray:
        """(len(rows), stop - start) float32: cosines of clusters `rows` to the clusters of a range."""
        query = np.asarray(self.values[rows], dtype=np.float32)
        result = np.empty((len(rows), stop - start), dtype=np.float32)
        for at in range(start, stop, _COLUMNS):
            end = min(at + _COLUMNS, stop)
            result[:, at - start : end - start] = query @ np.asarray(self.values[at:end], dtype=np.float32).T
        result *= self.inverse_norm[rows][:, None]
        result *= self.inverse_norm[start:stop]
        return result


class _Chunk:
    """The draws of `_CHUNK` batches, planned together, several draws at a time.

    A plan covers the chunk whatever part of it is used, so a matrix product has the same shape, and rounds the same
    way, on every rank and wherever iteration begins.
    """

    def __init__(self, sampler: CliqueSampler, epoch: int, number: int):
        self.sampler, self.epoch, self.number = sampler, epoch, number
        self.first = number * _CHUNK
        self.batches = min(_CHUNK, sampler.batches_per_epoch - self.first)
        self.ahead = -(-sampler.places_per_batch // (sampler.similar_places + 1)) + 1
        self.clusters: list[list[np.ndarray]] = []  # [draw][batch]
        self.generators: list[list[np.random.Generator]] = []

    def draw(self, i: int, draw: int) -> tuple[np.ndarray, np.random.Generator]:
        if draw >= len(self.clusters):
            started = time.perf_counter()
            self._plan(self.ahead if not self.clusters else 1)
            self.sampler._counts.seconds_plan += time.perf_counter() - started
        at = i - self.first
        # The stream may be drawn from twice when a batch is made again, so it is handed out as a copy.
        return self.clusters[draw][at], _copy(self.generators[draw][at])

    def _plan(self, rounds: int) -> None:
        sampler = self.sampler
        begin = len(self.clusters)
        names = [
            (i, draw)
            for draw in range(begin, begin + rounds)
            for i in range(self.first, self.first + self.batches)
        ]
        generators = [rng(sampler.seed, "sampler", self.epoch, "draw", i, draw) for i, draw in names]
        if sampler.schedule == "none":  # random places of all cities
            size = min(sampler.similar_places + 1, sampler.n_clusters)
            clusters = [generator.choice(sampler.n_clusters, size, replace=False) for generator in generators]
            self._keep(rounds, clusters, generators)
            return
        share = np.cumsum(np.diff(sampler._city_start)) / sampler.n_clusters
        seeds = np.empty(len(names), dtype=np.int64)
        for at, generator in enumerate(generators):
            city = min(int(np.searchsorted(share, generator.random(), side="right")), len(share) - 1)
            seeds[at] = generator.integers(sampler._city_start[city], sampler._city_start[city + 1])
        clusters: list[np.ndarray] = [None] * len(names)
        city_of = sampler._city_of_cluster[seeds]
        for city in np.unique(city_of):
            start, stop = int(sampler._city_start[city]), int(sampler._city_start[city + 1])
            positions = np.flatnonzero(city_of == city)
            for at in range(0, len(positions), _ROWS):
                part = positions[at : at + _ROWS]
                similar = self._similar(seeds[part], start, stop, [generators[p] for p in part])
                for position, others in zip(part, similar, strict=True):
                    clusters[position] = np.concatenate([[seeds[position]], others])
        self._keep(rounds, clusters, generators)

    def _keep(self, rounds: int, clusters: list, generators: list) -> None:
        for draw in range(rounds):
            part = slice(draw * self.batches, (draw + 1) * self.batches)
            self.clusters.append(clusters[part])
            self.generators.append(generators[part])

    def _similar(self, seeds, start: int, stop: int, generators) -> list[np.ndarray]:
        """For each seed, up to `similar_places` other clusters of its city, without replacement.

        Weighted sampling without replacement as by Efraimidis and Spirakis (2006): the smallest of ``E_j / w_j`` with
        independent exponential E_j are distributed as draws one after the other with probabilities proportional to w.
        """
        sampler, wanted = self.sampler, min(self.sampler.similar_places, stop - start - 1)
        if wanted <= 0:
            return [np.empty(0, dtype=np.int64)] * len(seeds)
        keys = np.stack(
            [generator.standard_exponential(stop - start, dtype=np.float32) for generator in generators]
        )
        own = np.arange(len(seeds)), seeds - start
        distance = 1.0 - sampler._clusters.cosines(seeds, start, stop)
        distance[own] = -np.inf
        weight = distance.max(axis=1, keepdims=True) - distance
        weight[own] = 0.0
        flat = ~(weight > 0).any(axis=1)
        sampler._counts.uniform_draws += int(flat.sum())
        weight[flat] = 1.0
        weight[own] = 0.0
        with np.errstate(divide="ignore", invalid="ignore"):
            keys = np.where(weight > 0, keys / weight, np.inf)
        drawable = np.minimum(wanted, (weight > 0).sum(axis=1))
        if wanted < stop - start - 1:
            best = np.argpartition(keys, wanted, axis=1)[:, : wanted + 1]
        else:
            best = np.broadcast_to(np.arange(stop - start), keys.shape)
        order = np.argsort(np.take_along_axis(keys, best, axis=1), axis=1, kind="stable")
        best = np.take_along_axis(best, order, axis=1)
        return [start + row[:count] for row, count in zip(best, drawable, strict=True)]


def _copy(generator: np.random.Generator) -> np.random.Generator:
    twin = np.random.Generator(type(generator.bit_generator)(0))
    twin.bit_generator.state = generator.bit_generator.state
    return twin


class _DescribedImages:
    """Descriptors of some of the images, added in blocks."""

    def __init__(self, n: int):
        self.row = np.full(n, -1, dtype=np.int64)
        self.blocks: list[np.ndarray] = []
        self.starts = [0]

    def add(self, images: np.ndarray, values: np.ndarray) -> None:
        if self.blocks and values.shape[1] != self.blocks[0].shape[1]:
            raise ValueError(
                f"describe returned {values.shape[1]} dimensions after {self.blocks[0].shape[1]}"
            )
        self.row[images] = self.starts[-1] + np.arange(len(images))
        self.blocks.append(values)
        self.starts.append(self.starts[-1] + len(values))

    def has(self, images: np.ndarray) -> np.ndarray:
        return self.row[images] >= 0

    def known(self) -> np.ndarray:
        return np.flatnonzero(self.row >= 0)

    def __getitem__(self, images: np.ndarray) -> np.ndarray:
        rows = self.row[images]
        block = np.searchsorted(self.starts, rows, side="right") - 1
        result = np.empty((len(rows), self.blocks[0].shape[1]), dtype=self.blocks[0].dtype)
        for b in np.unique(block):
            result[block == b] = self.blocks[b][rows[block == b] - self.starts[b]]
        return result


# ---------------------------------------------------------------------------------------------------------------------
# Labelled places
# ---------------------------------------------------------------------------------------------------------------------


class PlaceSampler:
    """Batches of random places x random images of each, for data whose places are labelled far apart (GSV-Cities).

    Parameters
    ----------
    place_labels : (n,) int or str
        The place of each image; a label names one place in the whole data. Negative integers: no place, left out.
    places_per_batch, images_per_place : int
        P and K. Places of fewer than K images are left out, and counted in `report`.
    batches_per_epoch : int or None
        None: one pass over the places, ``n_places // P``. More are made of further passes, each in a new order.
    seed, rank, world_size, split
        As for `CliqueSampler`.

    Raises
    ------
    ValueError
        If fewer than P places have K images; the sentence says how many do.
    """

    def __init__(
        self,
        place_labels,
        *,
        places_per_batch: int = 30,
        images_per_place: int = 4,
        batches_per_epoch: int | None = None,
        split: str = "places",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        _check_integer("places_per_batch", places_per_batch, 1)
        _check_integer("images_per_place", images_per_place, 1)
        _check_integer("batches_per_epoch", 1 if batches_per_epoch is None else batches_per_epoch, 1)
        _check_integer("seed", seed, 0)
        _check_split(split, rank, world_size, places_per_batch)
        labels = np.asarray(place_labels)
        check_length("place_labels", labels, len(labels) if labels.ndim else 0)
        known = labels >= 0 if labels.dtype.kind in "if" else np.ones(len(labels), dtype=bool)
        images = np.flatnonzero(known)
        names, code = np.unique(labels[images], return_inverse=True)
        images = images[np.argsort(code, kind="stable")]
        sizes = np.bincount(code, minlength=len(names))
        members = np.split(images, np.cumsum(sizes)[:-1]) if len(names) else []
        self._members = [part for part in members if len(part) >= images_per_place]
        if len(self._members) < places_per_batch:
            raise ValueError(
                f"{len(self._members)} of {len(names)} places have at least {images_per_place} images, and a batch needs "
                f"{places_per_batch} places: lower places_per_batch to {len(self._members)} or less, or images_per_place"
            )
        self.places_per_batch, self.images_per_place = int(places_per_batch), int(images_per_place)
        self.n_places = len(self._members)
        self._per_pass = self.n_places // self.places_per_batch
        self.batches_per_epoch = self._per_pass if batches_per_epoch is None else int(batches_per_epoch)
        self.split = split
        self.seed, self.rank, self.world_size = int(seed), int(rank), int(world_size)
        self.epoch = 0
        self.report = {
            "places": self.n_places,
            "places_left_out": len(names) - self.n_places,
            "images": int(sum(len(part) for part in self._members)),
            "images_without_place": int((~known).sum()),
            "described_images": 0,
        }
        self._pass: tuple[int, int, np.ndarray] | None = None

    def needs_refresh(self, epoch: int) -> bool:
        """Never: labelled places need no descriptors."""
        return False

    def refresh(self, epoch: int, describe=None) -> dict:
        """Set the epoch; nothing is described."""
        self.set_epoch(epoch)
        return self.report

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches iteration gives."""
        _check_integer("epoch", epoch, 0)
        self.epoch = int(epoch)

    def __len__(self) -> int:
        if self.split == "places":
            return self.batches_per_epoch
        return len(range(self.rank, self.batches_per_epoch, self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches_from(0)

    def batches_from(self, start: int) -> Iterator[list[int]]:
        """This rank's batches of the epoch from position `start` on, to resume within an epoch."""
        _check_integer("start", start, 0)
        return self._iterate(self.epoch, start)

    def _iterate(self, epoch: int, start: int) -> Iterator[list[int]]:
        part = self.places_per_batch // self.world_size
        for position in range(start, len(self)):
            if self.split == "places":
                batch = self._make_batch(epoch, position)[self.rank * part : (self.rank + 1) * part]
            else:
                batch = self._make_batch(epoch, self.rank + position * self.world_size)
            yield batch.reshape(-1).tolist()

    def _make_batch(self, epoch: int, i: int) -> np.ndarray:
        number, at = divmod(i, self._per_pass)
        if self._pass is None or self._pass[:2] != (epoch, number):
            order = rng(self.seed, "places", epoch, "order", number).permutation(self.n_places)
            self._pass = (epoch, number, order)
        generator = rng(self.seed, "places", epoch, "batch", i)
        places = self._pass[2][at * self.places_per_batch : (at + 1) * self.places_per_batch]
        return np.stack(
            [generator.choice(self._members[place], self.images_per_place, replace=False) for place in places]
        )


# ---------------------------------------------------------------------------------------------------------------------
# What a sampler picks
# ---------------------------------------------------------------------------------------------------------------------


def batch_statistics(
    batches, descriptors, east_m, north_m, *, images_per_place: int = 4
) -> dict[str, np.ndarray]:
    """How hard the batches of a sampler are, to compare samplers.

    Parameters
    ----------
    batches : iterable of (P * K,) int
        Image indices, place by place.
    descriptors : (n, D) float array or memory map
        Of all images; need not be normalised.
    east_m, north_m : (n,) float
    images_per_place : int
        K.

    Returns
    -------
    dict of arrays
        Per image of the batches: ``hardest_negative``, the greatest cosine to an image of another place of its batch.
        Per pair of images of one place: ``positive_similarity`` (cosine) and ``positive_distance_m``.
    """
    _check_integer("images_per_place", images_per_place, 1)
    east, north = check_positions(east_m, north_m)
    hardest, similarity, metres = [], [], []
    for batch in batches:
        batch = np.asarray(batch)
        if len(batch) % images_per_place:
            raise ValueError(f"a batch of {len(batch)} images is not made of places of {images_per_place}")
        rows = np.asarray(descriptors[batch], dtype=np.float32)
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        cosine = rows @ rows.T
        place = np.arange(len(batch)) // images_per_place
        same = place[:, None] == place
        if same.all():
            hardest.append(np.full(len(batch), np.nan))
        else:
            hardest.append(np.where(same, -np.inf, cosine).max(axis=1))
        i, j = np.nonzero(np.triu(same, 1))
        similarity.append(cosine[i, j])
        a, b = batch[i], batch[j]
        metres.append(np.sqrt((east[a] - east[b]) ** 2 + (north[a] - north[b]) ** 2))
    return {
        name: np.concatenate(values) if values else np.empty(0)
        for name, values in (
            ("hardest_negative", hardest),
            ("positive_similarity", similarity),
            ("positive_distance_m", metres),
        )
    }


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def _check_integer(name: str, value, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _check_split(split, rank, world_size, places_per_batch) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    _check_integer("world_size", world_size, 1)
    _check_integer("rank", rank, 0)
    if rank >= world_size:
        raise ValueError(f"rank must be below world_size = {world_size}, got {rank}")
    if split == "places" and places_per_batch % world_size:
        raise ValueError(
            f"places_per_batch = {places_per_batch} cannot be shared by world_size = {world_size} ranks: make it a multiple, "
            "or set split='batches'"
        )


def _codes(name: str, labels, n: int) -> tuple[np.ndarray, np.ndarray]:
    if labels is None:
        return np.array([""]), np.zeros(n, dtype=np.int64)
    labels = np.asarray(labels)
    check_length(name, labels, n)
    if labels.dtype == object:
        labels = labels.astype(str)
    names, code = np.unique(labels, return_inverse=True)
    return names, code.reshape(-1)


def _check_finite(values, images: np.ndarray | None) -> None:
    """Refuse descriptors with a NaN or an infinity, block by block."""
    step = max(1, (1 << 23) // max(1, values.shape[1]))
    for start in range(0, len(values), step):
        block = np.asarray(values[start : start + step])
        if (
            block.dtype == np.float16
        ):  # all exponent bits set: many times quicker than isfinite in half precision
            finite = bool(((block.view(np.uint16) & 0x7FFF).max(initial=0)) < 0x7C00)
        elif block.dtype.kind == "f":
            finite = bool(np.isfinite(block).all())
        else:
            raise ValueError(f"descriptors must be floating point, got {block.dtype}")
        if not finite:
            bad = start + np.flatnonzero(~np.isfinite(block).all(axis=1))
            first = f"row {bad[0]}" if images is None else f"image {images[bad[0]]}"
            raise ValueError(
                f"the descriptor of {first} holds a NaN or an infinity ({len(bad)} such rows of the first "
                f"{min(start + step, len(values))}): {MEND}"
            )
