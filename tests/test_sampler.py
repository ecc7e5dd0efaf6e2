"""Batches of the samplers: their promises on random towns, options, errors, and repeatability."""

import itertools
import tracemalloc
from collections import Counter

import networkx as nx
import numpy as np
import oracles_graph as oracle
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sagelib import sampler as sampler_module
from sagelib.graph import GeoVisualGraph
from sagelib.places import Places
from sagelib.sampler import CliqueSampler, PlaceSampler, SamplerConfig, harvest
from workbench.analysis import batch_statistics

RADIUS = 25.0
NODES = ("city", "place", "utm_zone", "heading_deg")
SMALL = dict(places_per_batch=6, images_per_place=3, similar_places=3, batches_per_epoch=5, min_clique=5)


def make_town(cities=2, clusters=12, images=12, spread=9.0):
    """Clusters on a lattice, `images` around each, cities far apart: east, north, labels, descriptors."""
    generator = np.random.default_rng(0)
    corner = 70.0 * np.stack(np.divmod(np.arange(clusters), int(np.ceil(np.sqrt(clusters)))))
    points = corner[:, None, :, None] + generator.uniform(-spread, spread, (2, cities, clusters, images))
    city, place, _ = np.indices(points.shape[1:]).reshape(3, -1)
    east, north = points.reshape(2, -1) + [[1e5], [0]] * (city + 1)
    shuffle = generator.permutation(city.size)
    mean = generator.standard_normal((cities * clusters, 16)).repeat(images, axis=0)
    descriptors = (mean + 0.5 * generator.standard_normal(mean.shape)).astype(np.float32)
    labels = {"city": city[shuffle], "place": place[shuffle]}
    return east[shuffle], north[shuffle], labels, descriptors[shuffle]


def build(east, north, kind=CliqueSampler, **options):
    """A sampler and its graph; options are columns of the graph (`NODES`) and fields of the configuration."""
    config = SamplerConfig(**{name: value for name, value in options.items() if name not in NODES})
    columns = {name: value for name, value in options.items() if name in NODES}
    return kind(GeoVisualGraph(east, north, **columns, **config.graph_options()), config)


def make_sampler(town=None, refresh=True, kind=CliqueSampler, **options):
    east, north, labels, descriptors = town or make_town()
    made = build(east, north, kind, **{**SMALL, **labels, **options})
    if refresh and made.needs_refresh(0):
        made.refresh(0, descriptors)
    return made


class Watched(CliqueSampler):
    """Keeps every clique met and what was chosen of it."""

    met = ()

    def _choose(self, clique):
        chosen = super()._choose(clique)
        self.met = [*self.met, (clique, None if chosen is None else clique[chosen])]
        return chosen

    def refresh(self, epoch, describe):
        self.met = ()
        return super().refresh(epoch, describe)


def check_batch(batch, east, north, places, images):
    assert len(batch) == len(set(batch)) == places * images
    batch, place = np.array(batch), np.arange(len(batch)) // images
    metres = np.hypot(*(x[batch][:, None] - x[batch] for x in (east, north)))
    assert ((metres <= RADIUS) == (place[:, None] == place)).all()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_every_batch_keeps_its_promises(data):
    """Every batch has P places apart, each K images of a clique by the greedy choice, where so many exist.

    The town is made of blocks 150 m apart. Each has a core, a clique in one square, and unless edges are
    pruned there may be images around it, in cliques that overlap.
    """
    draw = data.draw
    seed = draw(st.integers(0, 2**31))
    generator = np.random.default_rng(seed)
    options = {
        "images_per_place": draw(st.integers(1, 4)),
        "similar_places": draw(st.integers(0, 6)),
        "batches_per_epoch": 3,
        "min_clique": draw(st.integers(4, 8)),
        "tau": draw(st.sampled_from([None, -30.0])),
        "top_k": draw(st.sampled_from([None, 3])),
        "prefer": draw(st.sampled_from(["closest", "farthest", "random"])),
        "remove": draw(st.sampled_from(["chosen", "clique"])),
        "min_distance_m": draw(st.sampled_from([0.0, 3.0])),
        "max_heading_deg": draw(st.sampled_from([None, 120.0])),
        "seed": seed,
    }
    k, pruning = options["images_per_place"], {name: options[name] for name in ("tau", "top_k")}
    blocks, core, around = draw(st.integers(3, 12)), draw(st.integers(4, 8)), 0
    if pruning == {"tau": None, "top_k": None} and draw(st.booleans()):
        core, around = options["min_clique"], 8
    points = 4.0 + generator.integers(0, 17, (2, blocks, core + around))
    points[..., core:] = generator.integers(-20, 45, (2, blocks, around))
    heading = generator.uniform(0, 100, (blocks, core + around))
    heading[:, core:] *= 3.6
    block = np.arange(blocks).repeat(core + around)
    city = block % draw(st.integers(1, 3))
    east, north = points.reshape(2, -1) + 150.0 * block + 10_000.0 * city
    kind = draw(st.sampled_from([np.float32, np.float16]))
    descriptors = generator.standard_normal((len(block), 6)).astype(kind)

    def affinities(images):
        pairs = itertools.permutations(enumerate(images), 2)
        floor = options["min_distance_m"]
        return {(a, b): oracle.affinity(east, north, descriptors, i, j, floor) for (a, i), (b, j) in pairs}

    def gives_a_place(images):
        """Whether the greedy choice, however it prefers, cannot fail to find K of a clique's images."""
        left = oracle.graph_of(oracle.prune(affinities(images), len(images), **pruning), len(images))
        return any(all(len(c) >= k for c in nx.find_cliques(left, nodes=[seed])) for seed in left)

    places = blocks if around else sum(gives_a_place(np.flatnonzero(block == b)) for b in range(blocks))
    assume(places)
    options["places_per_batch"] = draw(st.integers(1, places))
    labels = {"place": draw(st.sampled_from([None, block, block // 2])), "heading_deg": heading.ravel()}
    made = build(east, north, Watched, city=city, **labels, **options)
    made.refresh(0, descriptors)
    for batch in made:
        check_batch(batch, east, north, options["places_per_batch"], k)
    joined = oracle.all_pairs(east, north, RADIUS, heading.ravel(), options["max_heading_deg"])
    for clique, chosen in made.met:
        clique = clique.tolist()
        assert all(tuple(sorted(pair)) in joined for pair in itertools.combinations(clique, 2))
        weight = affinities(clique)
        left = oracle.prune(weight, len(clique), **pruning)
        expected = oracle.greedy(left, len(clique), k, options["prefer"])
        if chosen is None:
            assert expected is None
            continue
        at = [clique.index(i) for i in chosen.tolist()]
        assert all(pair in left for pair in itertools.permutations(at, 2))
        if at != expected and options["prefer"] != "random" and k > 1:  # rounding decides between equal means
            pairs = (itertools.permutations(group, 2) for group in (at, expected))
            first, second = (np.mean([weight[pair] for pair in group]) for group in pairs)
            assert first == pytest.approx(second, rel=1e-6)


def test_cliques_are_large_before_the_fallback_takes_the_largest_of_at_least_k():
    made = make_sampler(make_town(spread=14.0), kind=Watched, min_clique=6, batches_per_epoch=10)
    assert len(list(made)) == 10 and made.report["fallback_places"] == 0
    assert min(len(clique) for clique, _ in made.met) >= 6
    town = make_town(images=7, spread=4.0)
    made = make_sampler(town, kind=Watched, min_clique=10)
    assert len(list(made)) == 5 and made.report["fallback_places"] == made.report["places"] == 30
    assert {len(clique) for clique, _ in made.met} == {7}
    with pytest.raises(ValueError, match="room for about 0 places.*clique of at least 10"):
        make_sampler(town, min_clique=10, fallback=None)


@pytest.mark.parametrize(("remove", "numbers"), [("chosen", {1, 2}), ("clique", {1})])
def test_chosen_images_or_their_whole_clique_leave(remove, numbers):
    """24 images along a line: 3 chosen at one end leave images beyond the radius when only they go."""
    east = np.concatenate([np.linspace(0, 24, 12), np.linspace(24.5, 48, 12)])
    generator = np.random.default_rng(0)
    graph = GeoVisualGraph(east, np.zeros(24), descriptors=generator.normal(size=(24, 4)))
    config = SamplerConfig(images_per_place=3, min_clique=3, remove=remove)
    found = [list(harvest(graph, generator.permutation(24), config)) for _ in range(30)]
    assert {len(places) for places in found} >= numbers and max(map(len, found)) == max(numbers)
    for place in itertools.chain(*found):
        assert len(place.images) == 3 and set(place.images) <= set(place.clique)


def test_places_of_the_batch_so_far_are_not_taken_again():
    east = np.array([0.0, 1, 2, 30, 31, 32, 200, 201, 202])
    graph = GeoVisualGraph(east, np.zeros(9), descriptors=np.eye(9))
    config = SamplerConfig(images_per_place=3, min_clique=3)
    first = next(harvest(graph, np.arange(3), config))
    second = harvest(graph, np.arange(9), config, before=[first])
    assert [sorted(place.images.tolist()) for place in second] == [[3, 4, 5], [6, 7, 8]]


def test_cities_are_drawn_by_their_number_of_clusters():
    east, north, labels, descriptors = make_town(cities=3, clusters=12)
    keep = ~((labels["city"] == 0) & (labels["place"] >= 3))  # 3, 12 and 12 clusters
    labels = {name: values[keep] for name, values in labels.items()}
    town = east[keep], north[keep], labels, descriptors[keep]
    made = make_sampler(town, batches_per_epoch=1000, places_per_batch=1)
    share = np.bincount(labels["city"][[batch[0] for batch in made]], minlength=3) / 1000
    np.testing.assert_allclose(share, np.array([3, 12, 12]) / 27, atol=4 * np.sqrt(0.25 / 1000))


def test_similar_places_are_drawn_by_distance_to_the_farthest():
    """Two without replacement, by d_max - d, against the probabilities of one after the other."""
    east, north, labels, _ = make_town(cities=1, clusters=5)
    angles = np.deg2rad([0.0, 20.0, 60.0, 90.0, 150.0])
    by_cluster = np.column_stack([np.cos(angles), np.sin(angles)]) * np.array([[1], [3], [0.5], [1], [2]])
    options = dict(node_descriptor="cluster", places_per_batch=3, similar_places=2, batches_per_epoch=4000)
    made = make_sampler((east, north, labels, by_cluster.astype(np.float32)), **options)
    drawn = Counter(frozenset(made.graph.cluster[batch].tolist()) for batch in made)
    distance, expected = 1 - np.cos(angles[:, None] - angles), Counter()
    for seed, x, y in itertools.permutations(range(5), 3):
        weight = distance[seed].max() - distance[seed]
        total = weight.sum() - weight[seed]
        expected[frozenset((seed, x, y))] += weight[x] / total * weight[y] / (total - weight[x]) / 5
    for triple, share in expected.items():
        error = 4 * np.sqrt(max(share * (1 - share), 1e-12) / 4000)
        assert abs(drawn[triple] / 4000 - share) <= error


def test_places_all_alike_are_drawn_at_random():
    made = make_sampler((*make_town()[:3], np.ones((288, 4), np.float32)), batches_per_epoch=50)
    assert set(made.graph.cluster[np.ravel(list(made))]) == set(range(24))


def test_schedule_none_needs_no_descriptors_and_mixes_cities():
    east, north, labels, _ = town = make_town()
    made = make_sampler(town, schedule="none", refresh=False, batches_per_epoch=20)
    assert not made.needs_refresh(0)
    batches = list(made)
    for batch in batches:
        check_batch(batch, east, north, 6, 3)
    assert any(len(np.unique(labels["city"][batch])) == 2 for batch in batches)
    assert made.refresh(3, None)["described_images"] == 0 and made.epoch == 3


def test_schedule_city_draws_random_places_of_one_city():
    town = make_town(cities=4)
    made = make_sampler(town, schedule="city", refresh=False, batches_per_epoch=40, similar_places=7)
    assert not made.needs_refresh(0) and made.refresh(0, None)["described_images"] == 0
    batches = list(made)  # a draw has 8 places, and a batch takes 6
    assert {len(np.unique(town[2]["city"][batch])) for batch in batches} == {1}
    report = made.report
    assert len(set(made.graph.cluster[np.ravel(batches)])) > 40
    assert 5 * report["places"] <= report["clique_images"] <= 12 * report["places"]


def test_a_crowded_place_lends_a_random_part(monkeypatch):
    monkeypatch.setattr(sampler_module, "MOST_IMAGES", 8)
    made = make_sampler(make_town(images=40), kind=Watched)
    assert len(list(made)) == 5
    assert max(len(clique) for clique, _ in made.met) <= 8


def test_a_camera_that_stands_still_costs_no_more_than_its_draws():
    generator = np.random.default_rng(0)
    spots = 1000.0 * np.arange(1, 21).repeat(6)
    east = np.concatenate([generator.normal(0, 1, 20_000), spots])
    tracemalloc.start()
    made = build(east, np.zeros(len(east)), places_per_batch=4, batches_per_epoch=3, schedule="none")
    batches, pairs = list(made), made.report["geographic_edges"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(batches) == 3 and pairs == 20_000 * 19_999 // 2 + 20 * 15
    assert peak < 100e6  # the pairs alone would take more than a gigabyte


def test_seed_and_epoch_decide_the_batches():
    town = make_town()
    first = make_sampler(town)
    batches = list(first)
    assert len(first) == len(batches) == 5 and all(isinstance(i, int) for i in batches[0])
    assert batches == list(first) == list(make_sampler(town))
    assert batches != list(make_sampler(town, seed=1))
    first.refresh(1, town[3])
    assert list(first) != batches
    first.refresh(0, town[3])
    assert list(first) == batches


def test_iterators_and_loaders_do_not_disturb_one_another(monkeypatch):
    monkeypatch.setattr(sampler_module, "PLANNED", 2)
    made = make_sampler()
    batches, one, two = list(made), iter(made), iter(made)
    next(two), next(two)
    mixed = [next(one), next(two), next(one), next(two)]
    assert mixed == [batches[0], batches[2], batches[1], batches[3]]
    images = torch.utils.data.TensorDataset(torch.arange(len(made.graph)))
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(images, batch_sampler=made, num_workers=workers)
        assert len(loader) == 5 and [batch.tolist() for (batch,) in loader] == batches


@pytest.mark.parametrize(
    "options", [{}, {"node_descriptor": "cluster"}, {"tau": -30.0, "prefer": "random"}, {"remove": "clique"}]
)
@pytest.mark.parametrize("spread", [9.0, 20.0])
def test_describing_what_is_needed_gives_the_batches_of_all_descriptors(options, spread):
    town = make_town(spread=spread)
    expected = list(make_sampler(town, **options))
    made, asked = make_sampler(town, refresh=False, **options), []
    report = made.refresh(0, lambda images: asked.append(images) or town[3][images])
    assert list(made) == list(made) == expected
    images = np.concatenate(asked)
    assert len(np.unique(images)) == len(images) == report["described_images"] <= len(made.graph)
    assert made.graph.cluster[asked[0]].tolist() == list(range(24))  # one image of each cluster first
    assert len(asked) == 1 or "node_descriptor" not in options
    few = make_sampler(town, refresh=False, batches_per_epoch=1, places_per_batch=3, **options)
    assert few.refresh(0, lambda images: town[3][images])["described_images"] < len(images) or len(asked) == 1


def test_schedules_ask_for_descriptors_when_they_should():
    town = make_town()
    online = make_sampler(town, refresh=False)
    assert online.needs_refresh(0)
    with pytest.raises(RuntimeError, match="epoch 0 needs descriptors, and has none yet"):
        iter(online)
    online.refresh(0, town[3])
    assert not online.needs_refresh(0) and online.needs_refresh(1)
    online.set_epoch(1)
    with pytest.raises(RuntimeError, match="epoch 1 needs descriptors, and has those of epoch 0"):
        iter(online)
    seldom, static = make_sampler(town, refresh_every=3), make_sampler(town, schedule="static")
    assert [seldom.needs_refresh(epoch) for epoch in range(5)] == [False, False, False, True, True]
    assert not any(static.needs_refresh(epoch) for epoch in range(9))


@pytest.mark.parametrize("options", [{"refresh_every": 2}, {"schedule": "static"}])
def test_described_once_serves_later_epochs(options):
    town = make_town()
    given, described = make_sampler(town, **options), make_sampler(town, refresh=False, **options)
    described.refresh(0, lambda images: town[3][images])
    for epoch in (0, 1):
        given.set_epoch(epoch), described.set_epoch(epoch)
        assert list(given) == list(described)


def test_descriptors_may_be_one_per_cluster_or_a_memory_map(tmp_path):
    town, asked = make_town(), []
    made = make_sampler(town, refresh=False, node_descriptor="cluster")
    made.refresh(0, lambda images: asked.append(images) or town[3][images])
    described = list(made)
    for values in (town[3], town[3][asked[0]]):
        made.refresh(0, values)
        assert list(made) == described
    np.save(tmp_path / "d.npy", town[3].astype(np.float16))
    half, mapped = make_sampler(town), make_sampler(town)
    half.refresh(0, town[3].astype(np.float16))
    mapped.refresh(0, np.load(tmp_path / "d.npy", mmap_mode="r"))
    assert list(half) == list(mapped)


def test_weights_of_zero_leave_the_choice_to_chance_and_are_counted():
    made = make_sampler(node_descriptor="cluster", batches_per_epoch=40)
    batches = np.array(list(made)).reshape(-1, 3)
    assert made.report["zero_weight_decisions"] == 40 * 6 * 2
    clusters = made.graph.cluster[batches[:, 0]]
    taken = {c: {tuple(sorted(b)) for b in batches[clusters == c].tolist()} for c in np.unique(clusters)}
    assert min(len(groups) for groups in taken.values()) > 1  # not the same images every time
    for floor, decisions in ((0.0, 5 * 6 * 2), (1.0, 0)):  # at one position, a floor lets descriptors decide
        made = make_sampler(make_town(spread=0.0), min_distance_m=floor)
        assert list(made) and made.report["zero_weight_decisions"] == decisions


def test_pruning_too_hard_drops_cliques_and_ends_in_a_sentence_that_counts():
    made = make_sampler(tau=-1e-12)
    with pytest.raises(
        RuntimeError, match="batch 0 of epoch 0 needs 6 places of 3 images, and at most 0 were"
    ):
        list(made)
    assert made.report["cliques_dropped"] > 0


def test_a_town_too_small_says_by_how_much():
    with pytest.raises(ValueError, match=r"room for about 24 places of 3 images.*needs 30.*by 6,"):
        make_sampler(places_per_batch=30)
    assert len(list(make_sampler(places_per_batch=24, batches_per_epoch=30))) == 30  # just room for one batch
    for n in (0, 1):
        with pytest.raises(ValueError, match=f"{n} images have room for about 0 places of 4"):
            build(np.zeros(n), np.zeros(n), places_per_batch=1)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (8, 4)])
def test_a_town_of_one_place(n, k):
    options = dict(
        places_per_batch=1, images_per_place=k, min_clique=k, batches_per_epoch=2, place=np.zeros(n)
    )
    made = build(np.arange(float(n)), np.zeros(n), **options)
    made.refresh(0, np.random.default_rng(0).normal(size=(n, 4)).astype(np.float32))
    assert [len(set(batch)) for batch in made] == [k, k]


@pytest.mark.parametrize(("name", "value"), [
    ("places_per_batch", 0), ("images_per_place", 2.5), ("similar_places", -1), ("batches_per_epoch", None),
    ("refresh_every", 0), ("min_clique", 2), ("prefer", "best"), ("schedule", "daily"), ("tau", 1.0),
    ("node_descriptor", "place"), ("remove", "none"), ("graph_context", "batch"), ("fallback", "step"),
])  # fmt: skip
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value!r}"):
        make_sampler(**{name: value})


def test_renamed_values_and_graphs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="prefer must be one of closest, farthest, random, got 'affine'"):
        make_sampler(prefer="affine")
    with pytest.raises(ValueError, match="graph and sampler differ: .*'radius_m': 20.0"):
        CliqueSampler(GeoVisualGraph([0.0], [0.0], radius_m=20.0), SamplerConfig(**SMALL))


BAD = make_town()[3].astype(np.float16)
BAD[17, 3] = np.nan


@pytest.mark.parametrize(
    ("describe", "message"),
    [
        (np.ones((5, 4)), r"shape \(288, D\).*or \(24, D\).*got \(5, 4\)"),
        (np.ones((24, 4)), "node_descriptor='image' needs descriptors of all 288 images"),
        (lambda images: np.ones((3, 4)), r"must return shape \(24, D\), got \(3, 4\)"),
        (np.zeros((288, 4)), "is zero"),
        (BAD, "image 17 holds a NaN"),
        (lambda images: BAD[images], "image 17 holds a NaN"),
    ],
)
def test_descriptors_of_wrong_shape_or_value_are_refused(describe, message):
    with pytest.raises(ValueError, match=message):
        make_sampler(refresh=False, schedule="static").refresh(0, describe)


def test_cities_of_one_zone_share_its_plane_and_others_do_not():
    """Two cities on top of each other: in one zone images are neighbours, in no known zone they are not."""
    east, north, labels, descriptors = make_town()
    town = east - 1e5 * (labels["city"] + 1), north, labels, descriptors
    assert make_sampler(town, places_per_batch=24).report["geographic_edges"] == 2 * 12 * 66
    with pytest.raises(ValueError, match="room for about 12"):
        make_sampler(town, places_per_batch=24, utm_zone=np.full(len(east), "31N"))


def test_a_table_of_places_gives_the_same_sampler():
    east, north, labels, descriptors = make_town()
    columns = dict(east_m=east, north_m=north, place=labels["place"])
    for zones, city in ((["31U", "31U"], ["town 0", "town 1"]), (["31U", "32U"], ["border", "border"])):
        zone, city = (np.array(values)[labels["city"]] for values in (zones, city))
        places = Places.build([f"{i}.jpg" for i in range(len(east))], **columns, utm_zone=zone, city=city)
        made = CliqueSampler(GeoVisualGraph.from_places(places), SamplerConfig(**SMALL))
        made.refresh(0, descriptors)
        assert made.report["cities"] == 2 and list(made) == list(make_sampler())


def test_labelled_places_come_once_a_pass_and_repeat_by_seed():
    labels = np.repeat(np.arange(10), 5)[np.random.default_rng(0).permutation(50)]
    config = SamplerConfig(places_per_batch=3, images_per_place=4, batches_per_epoch=7, seed=5)
    made = PlaceSampler(labels, config)
    batches = list(made)
    assert len(made) == 7 and batches == list(made) == list(PlaceSampler(labels, config))
    places = np.array(batches).reshape(7, 3, 4)
    assert (labels[places] == labels[places[..., :1]]).all()
    assert all(len(set(place)) == 4 for place in places.reshape(-1, 4).tolist())
    for start in (0, 3):  # a pass of 10 places has 3 batches
        assert len(np.unique(labels[places[start : start + 3, :, 0]])) == 9
    made.set_epoch(1)
    assert list(made) != batches and not made.needs_refresh(9)


def test_labelled_places_that_do_not_suffice_are_refused():
    labels = np.array([0, 0, 0, 0, 1, 1, -1, -1, -1, -1])
    made = PlaceSampler(labels, SamplerConfig(places_per_batch=1, batches_per_epoch=None))
    assert made.report["places_left_out"] == 1 and made.report["images_without_place"] == 4
    assert [sorted(batch) for batch in made] == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match="1 of 2 places have at least 4 images, and a batch needs 2"):
        PlaceSampler(labels, SamplerConfig(places_per_batch=2))


def test_batch_statistics_are_triple_loops():
    generator = np.random.default_rng(0)
    descriptors = generator.standard_normal((12, 5))
    east, north = generator.uniform(0, 50, (2, 12))
    batches = np.arange(12).reshape(2, 6)
    got = batch_statistics(batches, descriptors, east, north, images_per_place=2)
    unit = descriptors / np.linalg.norm(descriptors, axis=1, keepdims=True)
    hardest = [max(unit[i] @ unit[j] for j in batch if j // 2 != i // 2) for batch in batches for i in batch]
    np.testing.assert_allclose(got["hardest_negative"], hardest, atol=1e-6)
    i, j = np.arange(0, 12, 2), np.arange(1, 12, 2)
    np.testing.assert_allclose(got["positive_distance_m"], np.hypot(east[i] - east[j], north[i] - north[j]))
    np.testing.assert_allclose(got["positive_similarity"], (unit[i] * unit[j]).sum(axis=1), rtol=1e-5)
    with pytest.raises(ValueError, match="not made of places of 4"):
        batch_statistics(batches, descriptors, east, north)


def test_mined_batches_hold_harder_negatives_and_preferences_order_the_positives():
    town = make_town(cities=3, clusters=30)

    def means(**options):
        made = make_sampler(town, batches_per_epoch=20, **options)
        values = batch_statistics(made, town[3], *town[:2], images_per_place=3)
        return [values[name].mean() for name in ("hardest_negative", "positive_distance_m")]

    closest, random, farthest = (means(prefer=name) for name in ("closest", "random", "farthest"))
    assert closest[1] < random[1] < farthest[1]
    assert min(closest[0], random[0], farthest[0]) > means(schedule="none")[0]
