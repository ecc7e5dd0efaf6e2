"""Batches of the clique sampler: their promises on random towns, its options, its errors, and its repeatability."""

import itertools
import tracemalloc

import numpy as np
import oracles_graph as oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sagelib import sampler as sampler_module
from sagelib.places import Places
from sagelib.sampler import CliqueSampler, PlaceSampler, batch_statistics

RADIUS = 25.0


def make_town(seed=0, cities=2, clusters=12, images=12, spread=9.0, pitch=70.0, dimensions=16):
    """Clusters on a square lattice, `images` around each, cities far apart: east, north, city, cluster, descriptors."""
    generator = np.random.default_rng(seed)
    side = int(np.ceil(np.sqrt(clusters)))
    column, row = np.divmod(np.arange(clusters), side)
    east = column[None, :, None] * pitch + generator.uniform(-spread, spread, (cities, clusters, images))
    north = row[None, :, None] * pitch + generator.uniform(-spread, spread, (cities, clusters, images))
    east = east + 1e5 * np.arange(1, cities + 1)[:, None, None]
    city = np.repeat(np.arange(cities), clusters * images)
    cluster = np.tile(np.repeat(np.arange(clusters), images), cities)
    shuffle = generator.permutation(city.size)
    looks = generator.standard_normal((cities * clusters, dimensions))
    descriptors = (
        looks.repeat(images, axis=0) + 0.5 * generator.standard_normal((city.size, dimensions))
    ).astype(np.float32)
    return (
        east.ravel()[shuffle],
        north.ravel()[shuffle],
        {"city": city[shuffle], "cluster": cluster[shuffle]},
        descriptors[shuffle],
    )


def make_sampler(town=None, refresh=True, **options):
    east, north, labels, descriptors = town or make_town()
    options = {
        "places_per_batch": 6,
        "images_per_place": 3,
        "similar_places": 3,
        "batches_per_epoch": 5,
        "min_clique": 5,
        **labels,
        **options,
    }
    made = CliqueSampler(east, north, **options)
    if refresh and made.needs_refresh(0):
        made.refresh(0, descriptors)
    return made


class Watched(CliqueSampler):
    """Keeps every clique met and what was chosen of it, in the numbering of the caller."""

    def _choose(self, images, missing):
        chosen = super()._choose(images, missing)
        self.met = getattr(self, "met", [])
        self.met.append((self._order[images], None if chosen is None else self._order[images[chosen]]))
        return chosen


def check_batch(batch, east, north, places, images):
    assert len(batch) == places * images
    assert len(set(batch)) == len(batch)
    groups = np.array(batch).reshape(places, images)
    for one in groups:
        for i, j in itertools.combinations(one, 2):
            assert np.hypot(east[i] - east[j], north[i] - north[j]) <= RADIUS
    for one, other in itertools.combinations(groups, 2):
        for i, j in itertools.product(one, other):
            assert np.hypot(east[i] - east[j], north[i] - north[j]) > RADIUS


# -- promises -----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_every_batch_keeps_its_promises(data):
    """P places apart, each K images of a clique that the greedy choice takes from the unpruned edges, never another."""
    draw = data.draw
    seed = draw(st.integers(0, 2**31))
    generator = np.random.default_rng(seed)
    cities = draw(st.integers(1, 3))
    n = draw(st.sampled_from([60, 150, 300]))
    size = draw(st.sampled_from([120, 250, 500]))
    east = generator.integers(0, size, n) * 1.0
    north = generator.integers(0, size, n) * 1.0
    city = generator.integers(0, cities, n)
    east += city * 10_000.0
    descriptors = generator.standard_normal((n, 6)).astype(draw(st.sampled_from([np.float32, np.float16])))
    options = {
        "city": city,
        "cluster": draw(st.sampled_from([None, generator.integers(0, 10, n)])),
        "places_per_batch": draw(st.integers(1, 5)),
        "images_per_place": draw(st.integers(1, 4)),
        "similar_places": draw(st.integers(0, 6)),
        "batches_per_epoch": 3,
        "min_clique": draw(st.integers(4, 8)),
        "fallback": draw(st.sampled_from(["draw", "step"])),
        "tau": draw(st.sampled_from([None, -60.0])),
        "top_k": draw(st.sampled_from([None, 3])),
        "prefer": draw(st.sampled_from(["affine", "hard", "uniform"])),
        "remove": draw(st.sampled_from(["chosen", "clique"])),
        "min_distance_m": draw(st.sampled_from([0.0, 3.0])),
        "seed": seed,
    }
    if draw(st.booleans()):
        options |= {"heading_deg": generator.uniform(0, 360, n), "max_heading_deg": 120.0}
    try:
        made = Watched(east, north, **options)
    except ValueError as error:
        assert "room for about" in str(error)
        return
    made.met = []
    made.refresh(0, descriptors)
    try:
        batches = list(made)
    except RuntimeError as error:
        assert "needs" in str(error) and (made.tau or made.top_k or options["places_per_batch"] > 1)
        batches = []
    heading, most = options.get("heading_deg"), options.get("max_heading_deg")
    joined = oracle.all_pairs(east, north, RADIUS, heading, most)
    for batch in batches:
        check_batch(batch, east, north, made.places_per_batch, made.images_per_place)
    for clique, chosen in made.met:
        clique = clique.tolist()
        assert all(tuple(sorted(pair)) in joined for pair in itertools.combinations(clique, 2))
        weight = {
            (a, b): oracle.affinity(east, north, descriptors, i, j, options["min_distance_m"])
            for (a, i), (b, j) in itertools.permutations(enumerate(clique), 2)
        }
        left = oracle.prune(weight, len(clique), made.tau, made.top_k)
        if chosen is None:
            assert oracle.greedy(left, len(clique), made.images_per_place, made.prefer) is None
            continue
        at = [clique.index(i) for i in chosen.tolist()]
        assert all(pair in left for pair in itertools.permutations(at, 2))
        if made.prefer == "uniform" or made.images_per_place == 1:
            continue
        expected = oracle.greedy(left, len(clique), made.images_per_place, made.prefer)
        if at != expected:  # rounding may decide between equal means; then they are equal
            mean = [
                np.mean([weight[p] for p in itertools.permutations(group, 2)]) for group in (at, expected)
            ]
            assert mean[0] == pytest.approx(mean[1], rel=1e-6)


def test_cliques_are_maximal_and_large_before_the_fallback_serves():
    made = Watched(
        *make_town(spread=14.0)[:2], **make_town(spread=14.0)[2], places_per_batch=6, images_per_place=3, min_clique=6,
        similar_places=3, batches_per_epoch=10,
    )  # fmt: skip
    east, north, _, descriptors = make_town(spread=14.0)
    made.met = []
    made.refresh(0, descriptors)
    assert len(list(made)) == 10
    sizes = [len(clique) for clique, _ in made.met]
    assert min(sizes) >= 6 and made.report["fallback_places"] == 0
    assert made.report["mean_clique_size"] == pytest.approx(np.mean(sizes))


@pytest.mark.parametrize("fallback", ["draw", "step"])
def test_the_fallback_takes_the_largest_clique_of_at_least_k(fallback):
    town = make_town(images=7, spread=4.0)
    made = make_sampler(town, min_clique=10, fallback=fallback)
    for batch in made:
        check_batch(batch, town[0], town[1], 6, 3)
    assert made.report["fallback_places"] == made.report["places"] == 30
    assert made.report["mean_clique_size"] == 7
    with pytest.raises(ValueError, match="room for about 0 places.*clique of at least 10"):
        make_sampler(town, min_clique=10, fallback=None)


def test_chosen_images_or_their_whole_clique_leave():
    # A clique of 12 along a line: 3 chosen at one end leave images beyond the radius when only they go.
    east = np.concatenate([np.linspace(0, 24, 12), np.linspace(24.5, 48, 12)])
    town = (
        east,
        np.zeros(24),
        {"city": None, "cluster": np.zeros(24, int)},
        np.random.default_rng(0).normal(size=(24, 4)),
    )
    taken = {}
    for remove in ("chosen", "clique"):
        found = set()
        for seed in range(30):
            made = make_sampler(
                town,
                places_per_batch=1,
                min_clique=3,
                remove=remove,
                seed=seed,
                refresh=False,
                similar_places=0,
            )
            made.refresh(0, town[3])
            places: list = []
            made._left = []
            made.places_per_batch = 9
            made._harvest(np.array([0]), np.random.default_rng(seed), places, None)
            found.add(len(places))
        taken[remove] = found
    assert max(taken["chosen"]) == 2
    assert min(taken["clique"]) == 1


def test_the_sampler_has_its_length_and_its_places_in_order():
    made = make_sampler(batches_per_epoch=7)
    batches = list(made)
    assert len(made) == len(batches) == 7
    assert all(isinstance(i, int) for i in batches[0])
    clusters = made.clusters
    for batch in batches:  # one cluster is one clique in this town: places come one after the other
        assert (np.ptp(clusters[np.array(batch).reshape(6, 3)], axis=1) == 0).all()


# -- draws --------------------------------------------------------------------------------------------------------------


def test_cities_are_drawn_by_their_number_of_clusters():
    east, north, labels, descriptors = make_town(cities=3, clusters=12)
    keep = ~((labels["city"] == 0) & (labels["cluster"] >= 3))  # 3, 12 and 12 clusters
    labels = {name: values[keep] for name, values in labels.items()}
    made = make_sampler((east[keep], north[keep], labels, descriptors[keep]), batches_per_epoch=1000)
    seeds = np.array([made.look_at_draw(i)[0][0] for i in range(1000)])
    share = np.bincount(made._city_of_cluster[seeds], minlength=3) / 1000
    np.testing.assert_allclose(share, np.array([3, 12, 12]) / 27, atol=4 * np.sqrt(0.25 / 1000))
    assert len(np.unique(seeds)) == 27


def test_similar_places_are_drawn_by_distance_to_the_farthest():
    """Pairs without replacement, proportional to d_max - d, against the probabilities of drawing one after the other."""
    east, north, labels, _ = make_town(cities=1, clusters=5)
    angles = np.deg2rad([0.0, 20.0, 60.0, 90.0, 150.0])
    by_cluster = np.column_stack([np.cos(angles), np.sin(angles)]) * np.array([[1], [3], [0.5], [1], [2]])
    made = make_sampler(
        (east, north, labels, None), refresh=False, node_descriptor="cluster", places_per_batch=3, similar_places=2,
        batches_per_epoch=4000,
    )  # fmt: skip
    made.refresh(0, by_cluster.astype(np.float32))
    drawn = [made.look_at_draw(i)[0] for i in range(4000)]
    distance = 1 - np.cos(angles[:, None] - angles)
    for seed in range(5):
        others = [c for c in range(5) if c != seed]
        weight = {c: distance[seed, others].max() - distance[seed, c] for c in others}
        total = sum(weight.values())
        pairs = [frozenset(d[1:].tolist()) for d in drawn if d[0] == seed]
        assert all(seed not in pair and len(pair) == 2 for pair in pairs)
        for a, b in itertools.combinations(others, 2):
            expected = sum(weight[x] / total * weight[y] / (total - weight[x]) for x, y in ((a, b), (b, a)))
            got = np.mean([pair == {a, b} for pair in pairs])
            assert abs(got - expected) <= 4 * np.sqrt(max(expected * (1 - expected), 1e-12) / len(pairs))


def test_places_all_alike_are_drawn_at_random_and_counted():
    town = make_town()
    made = make_sampler((*town[:3], np.ones((len(town[0]), 4), np.float32)))
    assert len(list(made)) == 5
    assert made.report["uniform_draws"] > 0


def test_schedule_none_needs_no_descriptors_and_mixes_cities():
    town = make_town()
    made = make_sampler(town, schedule="none", refresh=False, batches_per_epoch=20)
    assert not made.needs_refresh(0)
    batches = list(made)
    for batch in batches:
        check_batch(batch, town[0], town[1], 6, 3)
    assert any(len(np.unique(town[2]["city"][batch])) == 2 for batch in batches)
    assert made.refresh(3)["described_images"] == 0
    assert made.epoch == 3


def test_a_crowded_place_lends_a_random_part():
    town = make_town(images=40)
    made = make_sampler(town, max_place_images=8)
    assert len(list(made)) == 5
    assert made.report["thinned_places"] > 0 and made.report["mean_clique_size"] <= 8


def test_a_camera_that_stands_still_costs_no_more_than_its_draws():
    generator = np.random.default_rng(0)
    spots = 1000.0 * np.arange(1, 21).repeat(6)
    east = np.concatenate([generator.normal(0, 1, 20_000), spots])
    tracemalloc.start()
    made = CliqueSampler(east, np.zeros(len(east)), places_per_batch=4, batches_per_epoch=3, schedule="none")
    batches = list(made)
    pairs = made.report["geographic_edges"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(batches) == 3 and pairs == 20_000 * 19_999 // 2 + 20 * 15
    assert peak < 100e6  # the pairs alone would take more than a gigabyte


def test_the_default_clusters_are_squares_of_the_radius():
    east, north, _, descriptors = make_town()
    made = make_sampler((east, north, {}, descriptors))
    cell = np.column_stack([east // RADIUS, north // RADIUS])
    assert made.n_clusters == len(np.unique(cell, axis=0))
    for i, j in itertools.combinations(range(60), 2):
        assert (made.clusters[i] == made.clusters[j]) == (cell[i] == cell[j]).all()


# -- repeatable ---------------------------------------------------------------------------------------------------------


def test_seed_and_epoch_decide_the_batches():
    town = make_town()
    first = make_sampler(town)
    batches = list(first)
    assert batches == list(first) == list(make_sampler(town))
    assert batches != list(make_sampler(town, seed=1))
    first.refresh(1, town[3])
    assert list(first) != batches
    first.refresh(0, town[3])
    assert list(first) == batches


def test_iteration_can_begin_anywhere(monkeypatch):
    monkeypatch.setattr(sampler_module, "_CHUNK", 4)
    town = make_town()
    batches = list(make_sampler(town, batches_per_epoch=11))
    for start in (0, 3, 4, 10, 11):
        assert list(make_sampler(town, batches_per_epoch=11).batches_from(start)) == batches[start:]


def test_iterators_do_not_disturb_one_another():
    made = make_sampler()
    batches = list(made)
    one, two = iter(made), made.batches_from(2)
    mixed = [next(one), next(two), next(one), next(two)]
    assert mixed == [batches[0], batches[2], batches[1], batches[3]]


@pytest.mark.parametrize("split", ["places", "batches"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_shards_are_disjoint_and_together_the_one_process_result(split, world_size):
    town = make_town()
    whole = list(make_sampler(town))
    shards = [make_sampler(town, split=split, rank=rank, world_size=world_size) for rank in range(world_size)]
    parts = [list(shard) for shard in shards]
    assert [len(part) for part in parts] == [len(shard) for shard in shards]
    if split == "places":
        assert [sum(batches, []) for batches in zip(*parts, strict=True)] == whole
        assert all(len(shard) == 5 for shard in shards)
    else:
        together = [None] * 5
        for rank, part in enumerate(parts):
            together[rank::world_size] = part
        assert together == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_gives_the_sampler_s_batches(workers):
    made = make_sampler()
    images = torch.arange(made.n_images)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images), batch_sampler=made, num_workers=workers
    )
    assert len(loader) == 5
    assert [batch.tolist() for (batch,) in loader] == list(made)


# -- descriptors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"node_descriptor": "cluster"}, {"tau": -30.0, "prefer": "uniform"}, {"remove": "clique"}]
)
@pytest.mark.parametrize("spread", [9.0, 20.0])
def test_describing_what_is_needed_gives_the_batches_of_all_descriptors(options, spread):
    town = make_town(spread=spread)
    expected = list(make_sampler(town, **options))
    asked = []

    def describe(images):
        assert len(np.unique(images)) == len(images)
        asked.append(images)
        return town[3][images]

    made = make_sampler(town, refresh=False, **options)
    report = made.refresh(0, describe)
    assert list(made) == list(made) == expected
    images = np.concatenate(asked)
    assert len(np.unique(images)) == len(images) == report["described_images"] <= made.n_images
    assert report["describe_calls"] == len(asked)
    assert asked[0].tolist() == made.representatives(0).tolist()
    assert np.array_equal(np.sort(made.clusters[asked[0]]), np.arange(made.n_clusters))
    if "node_descriptor" in options:
        assert len(asked) == 1


def test_few_batches_describe_few_images():
    town = make_town(cities=4, clusters=30)
    made = make_sampler(town, refresh=False, batches_per_epoch=1)
    report = made.refresh(0, lambda images: town[3][images])
    assert report["described_images"] < made.n_images / 2


def test_schedules_ask_for_descriptors_when_they_should():
    town = make_town()
    online = make_sampler(town, refresh=False)
    assert online.needs_refresh(0)
    online.refresh(0, town[3])
    assert not online.needs_refresh(0) and online.needs_refresh(1)
    online.set_epoch(1)
    with pytest.raises(RuntimeError, match="descriptors of epoch 0 do not serve epoch 1"):
        iter(online)
    seldom = make_sampler(town, refresh_every=3)
    assert [seldom.needs_refresh(epoch) for epoch in range(5)] == [False, False, False, True, True]
    static = make_sampler(town, schedule="static")
    assert not any(static.needs_refresh(epoch) for epoch in range(9))
    static.set_epoch(8)
    assert len(list(static)) == 5
    with pytest.raises(RuntimeError, match="has no descriptors yet"):
        iter(make_sampler(town, refresh=False))


@pytest.mark.parametrize("options", [{"refresh_every": 2}, {"schedule": "static"}])
def test_described_once_serves_later_epochs(options):
    town = make_town()
    given, described = make_sampler(town, **options), make_sampler(town, refresh=False, **options)
    described.refresh(0, lambda images: town[3][images])
    for epoch in (0, 1):
        given.set_epoch(epoch), described.set_epoch(epoch)
        assert list(given) == list(described)


def test_descriptors_may_be_one_per_cluster_or_a_memory_map(tmp_path):
    town = make_town()
    made = make_sampler(town, refresh=False, node_descriptor="cluster")
    made.refresh(0, town[3])
    by_image = list(made)
    made.refresh(0, town[3][made.representatives(0)])
    assert list(made) == by_image
    np.save(tmp_path / "d.npy", town[3].astype(np.float16))
    mapped = np.load(tmp_path / "d.npy", mmap_mode="r")
    images = make_sampler(town, refresh=False)
    images.refresh(0, mapped)
    from_map = list(images)
    images.refresh(0, town[3].astype(np.float16))
    assert from_map == list(images)


def test_one_descriptor_per_cluster_leaves_the_choice_to_chance_and_says_so():
    made = make_sampler(node_descriptor="cluster", batches_per_epoch=40)
    batches = np.array(list(made)).reshape(-1, 3)
    assert made.report["zero_weight_decisions"] == 40 * 6 * 2 and made.report["mean_weight"] == 0
    clusters = made.clusters[batches[:, 0]]
    taken = {c: {tuple(sorted(b)) for b in batches[clusters == c].tolist()} for c in np.unique(clusters)}
    assert min(len(groups) for groups in taken.values()) > 1  # not the same images every time


def test_a_floor_under_the_distance_lets_looks_decide_at_one_position():
    east, north, labels, descriptors = make_town(spread=0.0)
    assert make_sampler((east, north, labels, descriptors)).report["zero_weight_decisions"] == 0
    without = make_sampler((east, north, labels, descriptors))
    list(without)
    with_floor = make_sampler((east, north, labels, descriptors), min_distance_m=1.0)
    list(with_floor)
    assert without.report["zero_weight_decisions"] == 5 * 6 * 2
    assert with_floor.report["zero_weight_decisions"] == 0
    assert with_floor.report["mean_weight"] == pytest.approx(-with_floor.report["mean_d_vis"])


def test_preferences_order_the_pairs_as_their_names_say():
    weight = {}
    for prefer in ("affine", "uniform", "hard"):
        made = make_sampler(prefer=prefer, tau=-1e9, batches_per_epoch=20)
        list(made)
        weight[prefer] = made.report["mean_weight"]
    assert weight["affine"] > weight["uniform"] > weight["hard"]


def test_pruning_too_hard_drops_cliques_and_ends_in_an_error_that_counts():
    made = make_sampler(tau=-1e-12)
    with pytest.raises(
        RuntimeError, match=r"batch 0 of epoch 0 needs 6 places of 3 images, and at most 0 were found"
    ):
        list(made)
    assert made.report["cliques_dropped"] > 0


# -- refusals -----------------------------------------------------------------------------------------------------------


def test_a_town_too_small_says_by_how_much():
    with pytest.raises(ValueError, match=r"room for about 24 places of 3 images.*needs 30.*by 6,"):
        make_sampler(places_per_batch=30)


def test_room_for_exactly_one_batch_is_found_every_time():
    made = make_sampler(places_per_batch=24, batches_per_epoch=30)
    assert len(list(made)) == 30


def test_no_one_and_a_few_images():
    with pytest.raises(ValueError, match="there are no images"):
        CliqueSampler([], [])
    with pytest.raises(ValueError, match="room for about 0 places of 4 images"):
        CliqueSampler([0.0], [0.0], places_per_batch=1)
    single = CliqueSampler(
        [0.0], [0.0], places_per_batch=1, images_per_place=1, min_clique=1, batches_per_epoch=2
    )
    single.refresh(0, np.ones((1, 4), np.float32))
    assert list(single) == [[0], [0]]
    one_city = CliqueSampler(
        np.arange(8) * 1.0, np.zeros(8), places_per_batch=1, batches_per_epoch=2, cluster=np.zeros(8, int)
    )
    one_city.refresh(0, np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32))
    assert all(len(set(batch)) == 4 for batch in one_city)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"places_per_batch": 0}, "places_per_batch must be an integer of at least 1, got 0"),
        ({"images_per_place": 2.5}, "images_per_place must be an integer of at least 1, got 2.5"),
        ({"similar_places": -1}, "similar_places must be an integer of at least 0"),
        ({"batches_per_epoch": 0}, "batches_per_epoch must be an integer of at least 1"),
        ({"refresh_every": 0}, "refresh_every"),
        (
            {"min_clique": 2},
            "min_clique must be at least images_per_place: a clique of 2 images cannot give 3",
        ),
        ({"prefer": "best"}, "prefer must be one of"),
        ({"schedule": "daily"}, "schedule must be one of"),
        ({"node_descriptor": "place"}, "node_descriptor must be one of"),
        ({"remove": "none"}, "remove must be one of"),
        ({"graph_context": "batch"}, "graph_context must be one of"),
        ({"fallback": "some"}, "fallback must be one of"),
        ({"split": "images"}, "split must be one of"),
        ({"rank": 2, "world_size": 2}, "rank must be below world_size = 2, got 2"),
        ({"world_size": 4}, "places_per_batch = 6 cannot be shared by world_size = 4"),
        ({"tau": 1.0}, "tau must be None or below 0"),
        ({"radius_m": -25.0}, "radius_m must be a positive number"),
        ({"city": np.zeros(3)}, r"city must have shape \(288,\)"),
        ({"max_heading_deg": 90.0}, "needs heading_deg"),
        ({"utm_zone": np.array(["31N", "32N"] * 144)}, "'31 north', '32 north' are mixed in city '0'"),
    ],
)
def test_the_sampler_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(**options)


@pytest.mark.parametrize("name", ["east", "north"])
def test_coordinates_that_are_not_finite_are_refused(name):
    east, north, labels, descriptors = make_town()
    {"east": east, "north": north}[name][17] = np.nan
    with pytest.raises(ValueError, match=f"{name}_m is nan at image 17"):
        make_sampler((east, north, labels, descriptors))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_descriptors_that_are_not_finite_are_refused(dtype):
    town = make_town()
    descriptors = town[3].astype(dtype)
    descriptors[17, 3] = np.nan
    made = make_sampler(town, refresh=False)
    with pytest.raises(ValueError, match="row 17 holds a NaN"):
        made.refresh(0, descriptors)
    everything = make_sampler(town, refresh=False, schedule="static")
    with pytest.raises(ValueError, match="image 17 holds a NaN"):
        everything.refresh(0, lambda images: descriptors[images])


def test_descriptors_of_wrong_shape_or_zero_are_refused():
    town = make_town()
    made = make_sampler(town, refresh=False)
    with pytest.raises(ValueError, match=r"shape \(288, D\).*or \(24, D\).*got \(5, 4\)"):
        made.refresh(0, np.ones((5, 4)))
    with pytest.raises(ValueError, match="node_descriptor='image' needs descriptors of all 288 images"):
        made.refresh(0, np.ones((24, 4)))
    with pytest.raises(ValueError, match=r"must return shape \(24, D\) for 24 images, got \(3, 4\)"):
        made.refresh(0, lambda images: np.ones((3, 4)))
    with pytest.raises(ValueError, match="is zero"):
        made.refresh(0, np.zeros((288, 4)))
    with pytest.raises(ValueError, match="needs describe"):
        made.refresh(0)


# -- zones and tables ---------------------------------------------------------------------------------------------------


def test_cities_of_one_zone_share_its_plane_and_others_do_not():
    """Two cities on top of each other: in one zone their images are neighbours, in no known zone they are not."""
    east, north, labels, descriptors = make_town(cities=2)
    east = east - 1e5 * (labels["city"] + 1)
    alone = make_sampler((east, north, labels, descriptors), places_per_batch=24)
    assert alone.report["geographic_edges"] == 2 * 12 * 66
    with pytest.raises(ValueError, match="room for about 12"):
        make_sampler(
            (east, north, labels, descriptors), places_per_batch=24, utm_zone=np.full(len(east), "31N")
        )


def test_a_table_of_places_gives_the_same_sampler():
    east, north, labels, descriptors = make_town()
    city = np.char.add("town ", labels["city"].astype(str))
    places = Places.build(
        [f"{i}.jpg" for i in range(len(east))], east_m=east, north_m=north, utm_zone=np.full(len(east), "31U"),
        city=city, place=labels["cluster"],
    )  # fmt: skip
    options = {
        "places_per_batch": 6,
        "images_per_place": 3,
        "similar_places": 3,
        "batches_per_epoch": 5,
        "min_clique": 5,
    }
    made = CliqueSampler.from_places(places, **options)
    made.refresh(0, descriptors)
    assert list(made) == list(make_sampler())
    halves = Places.build(
        [f"{i}.jpg" for i in range(len(east))], east_m=east, north_m=north, place=labels["cluster"],
        utm_zone=np.where(labels["city"] == 0, "31U", "32U"), city=np.full(len(east), "border"),
    )  # fmt: skip
    assert len(CliqueSampler.from_places(halves, **options).city_names) == 2


# -- labelled places ----------------------------------------------------------------------------------------------------


def test_labelled_places_come_once_a_pass():
    labels = np.repeat(np.arange(10), 5)[np.random.default_rng(0).permutation(50)]
    made = PlaceSampler(labels, places_per_batch=3, images_per_place=4)
    batches = np.array(list(made)).reshape(-1, 3, 4)
    assert len(made) == len(batches) == 3
    assert (labels[batches] == labels[batches[:, :, :1]]).all()
    assert len(np.unique(labels[batches[:, :, 0]])) == 9
    assert all(len(np.unique(place)) == 4 for batch in batches for place in batch)


def test_labelled_places_repeat_by_seed_and_shard():
    labels = np.repeat(np.arange(20), 6)
    options = {"places_per_batch": 4, "images_per_place": 2, "batches_per_epoch": 12, "seed": 5}
    whole = PlaceSampler(labels, **options)
    batches = list(whole)
    assert len(batches) == 12 and batches == list(whole) == list(PlaceSampler(labels, **options))
    assert all(len({labels[i] for i in batch}) == 4 for batch in batches)
    assert list(whole.batches_from(7)) == batches[7:]
    whole.set_epoch(1)
    assert list(whole) != batches
    shards = [list(PlaceSampler(labels, rank=r, world_size=2, **options)) for r in (0, 1)]
    assert [a + b for a, b in zip(*shards, strict=True)] == batches
    apart = [list(PlaceSampler(labels, split="batches", rank=r, world_size=2, **options)) for r in (0, 1)]
    assert apart == [batches[0::2], batches[1::2]]
    assert not whole.needs_refresh(9) and whole.refresh(2)["described_images"] == 0


def test_labelled_places_that_do_not_suffice_are_refused():
    labels = np.array([0, 0, 0, 0, 1, 1, -1, -1, -1, -1])
    made = PlaceSampler(labels, places_per_batch=1)
    assert made.report["places_left_out"] == 1 and made.report["images_without_place"] == 4
    assert set(sum(made, [])) <= {0, 1, 2, 3}
    with pytest.raises(ValueError, match="1 of 2 places have at least 4 images, and a batch needs 2"):
        PlaceSampler(labels, places_per_batch=2)


# -- statistics ---------------------------------------------------------------------------------------------------------


def test_batch_statistics_are_triple_loops():
    generator = np.random.default_rng(0)
    descriptors = generator.standard_normal((12, 5))
    east, north = generator.uniform(0, 50, (2, 12))
    batches = [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    got = batch_statistics(batches, descriptors, east, north, images_per_place=2)
    unit = descriptors / np.linalg.norm(descriptors, axis=1, keepdims=True)
    hardest = [
        max(float(unit[i] @ unit[j]) for j in batch if j // 2 != i // 2) for batch in batches for i in batch
    ]
    np.testing.assert_allclose(got["hardest_negative"], hardest, atol=1e-6)
    pairs = [(i, i + 1) for i in range(0, 12, 2)]
    np.testing.assert_allclose(
        got["positive_distance_m"], [np.hypot(east[i] - east[j], north[i] - north[j]) for i, j in pairs]
    )
    np.testing.assert_allclose(got["positive_similarity"], [unit[i] @ unit[j] for i, j in pairs], rtol=1e-5)
    with pytest.raises(ValueError, match="not made of places of 4"):
        batch_statistics(batches, descriptors, east, north)


def test_mined_batches_hold_harder_negatives_than_random_ones():
    east, north, labels, descriptors = make_town(cities=3, clusters=30)
    town = (east, north, labels, descriptors)
    mined, plain = (
        make_sampler(town, batches_per_epoch=20),
        make_sampler(town, schedule="none", batches_per_epoch=20),
    )
    hardness = [
        batch_statistics(s, descriptors, east, north, images_per_place=3)["hardest_negative"].mean()
        for s in (mined, plain)
    ]
    assert hardness[0] > hardness[1]
