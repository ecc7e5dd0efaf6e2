"""The geo-visual graph against all pairs, networkx and the affinity's definition."""

import itertools

import networkx as nx
import numpy as np
import oracles_graph as oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagelib.graph import (
    GeoVisualGraph,
    GraphRules,
    adjacency_bits,
    first_clique,
    greedy_weighted_clique,
    largest_clique,
    nodes_of,
    visual_distances,
)
from workbench.analysis import graph_statistics

ORDINARY = settings(max_examples=60, deadline=None)


def pair_set(pairs) -> set:
    return {tuple(sorted(pair)) for pair in np.asarray(pairs).tolist()}


@st.composite
def towns(draw, most=40):
    """Positions on a coarse grid, so that equal positions and distances of exactly the radius occur."""
    n = draw(st.integers(1, most))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    size = draw(st.sampled_from([20, 60, 200]))
    points = generator.integers(0, size, (n, 2)) * draw(st.sampled_from([1.0, 5.0, 0.1]))
    return points[:, 0] + 5e5, points[:, 1] + 5e6, generator


@st.composite
def weights(draw, most=9):
    """Small symmetric affinities with missing edges, on few values so that ties are common."""
    n = draw(st.integers(1, most))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = draw(st.sampled_from([2, 5, 10**9]))
    matrix = -generator.integers(0, values, (n, n)).astype(float)
    matrix[generator.random((n, n)) < draw(st.sampled_from([0.0, 0.3, 0.6]))] = np.nan
    matrix = np.triu(matrix, 1)
    return matrix + matrix.T


@ORDINARY
@given(towns(25), st.sampled_from([None, 0.0, 30.0, 90.0, 180.0]))
def test_edges_are_all_pairs_within_the_radius_and_heading(town, most):
    east, north, generator = town
    heading = generator.integers(0, 8, len(east)) * 45.0 + generator.choice([0.0, 360.0, -360.0], len(east))
    graph = GeoVisualGraph(east, north, heading_deg=heading, max_heading_deg=most)
    expected = oracle.all_pairs(east, north, 25.0, heading, most)
    assert graph.edges().tolist() == sorted(map(list, expected))
    assert graph.n_near == len(oracle.all_pairs(east, north, 25.0)) >= graph.n_edges
    nodes = generator.permutation(len(east))[:10]
    part = graph.subgraph(nodes)
    inside = {pair for pair in expected if set(pair) <= set(nodes.tolist())}
    assert pair_set(nodes[np.argwhere(part.joined)]) == inside


def test_the_radius_is_inclusive_and_positions_that_are_none_are_refused():
    graph = GeoVisualGraph([0.0, 15.0, 15.0], [0.0, 20.0, 20.001])
    assert graph.edges().tolist() == [[0, 1], [1, 2]] and graph.n_near == 2
    with pytest.raises(ValueError, match="799,980,000 pairs within 25 m: are these positions"):
        GeoVisualGraph(np.zeros(40_000), np.zeros(40_000)).edges()


def test_images_of_different_planes_are_never_joined():
    """Five images at one spot: a known zone is a plane whatever the city, an unknown one each city's own."""
    zones, cities = ["10S", "10T", "11S", "", ""], ["a", "b", "a", "a", "b"]
    graph = GeoVisualGraph(np.zeros(5), np.zeros(5), utm_zone=zones, city=cities)
    assert graph.edges().tolist() == [[0, 1]]
    assert np.argwhere(graph.subgraph([4, 1, 0]).joined).tolist() == [[1, 2], [2, 1]]
    assert len(set(graph.city.tolist())) == 5


def test_places_without_labels_are_squares_of_the_radius_in_each_city():
    generator = np.random.default_rng(0)
    east, north = generator.uniform(-100, 100, (2, 80))
    city = generator.integers(0, 2, 80)
    cluster = GeoVisualGraph(east, north, city=city).cluster
    square = np.column_stack([city, east // 25, north // 25])
    assert sorted(set(cluster.tolist())) == list(range(len(np.unique(square, axis=0))))
    for i, j in itertools.combinations(range(80), 2):
        assert (cluster[i] == cluster[j]) == (square[i] == square[j]).all()


@ORDINARY
@given(
    towns(20), st.sampled_from([0.0, 2.0]), st.sampled_from([1.0, 100.0]), st.booleans(),
    st.sampled_from([None, -40.0, -8.0]), st.sampled_from([None, 1, 3]),
)  # fmt: skip
def test_affinities_are_the_formula_and_pruned_as_defined(town, floor, norm, per_cluster, tau, top_k):
    east, north, generator = town
    place = generator.integers(0, 4, len(east))
    descriptors = generator.standard_normal((len(east), 33)).astype(np.float32) * norm
    graph, shared = GeoVisualGraph(east, north, place=place, min_distance_m=floor), descriptors
    if per_cluster and graph.cluster.max() + 1 < len(east):
        shared = descriptors[: graph.cluster.max() + 1]
        descriptors = shared[graph.cluster]
    full = graph.with_descriptors(shared)
    weight, dense = {}, full.subgraph(np.arange(len(east))).weight
    assert np.isfinite(dense).sum() == 2 * graph.n_edges
    for (i, j), w in zip(full.edges().tolist(), full.edge_values()["weight"], strict=True):
        expected = oracle.affinity(east, north, descriptors, i, j, floor)
        assert w == pytest.approx(expected, rel=1e-12) and dense[i, j] == pytest.approx(expected, rel=1e-9)
        weight[i, j] = weight[j, i] = float(w)
    rules = dict(tau=tau and tau * norm, top_k=top_k, min_distance_m=floor)
    pruned = GeoVisualGraph(east, north, place=place, descriptors=shared, **rules)
    kept = oracle.prune(weight, len(east), rules["tau"], top_k)
    assert pair_set(pruned.edges()) == {pair for pair in kept if pair[0] < pair[1]}
    if not per_cluster:  # ties, which rounding may decide otherwise
        assert oracle.as_dict(pruned.subgraph(np.arange(len(east))).weight).keys() == kept.keys()


def test_visual_distances_of_nearly_equal_descriptors_do_not_cancel():
    generator = np.random.default_rng(0)
    common = generator.standard_normal(512) * 100
    rows = (common + generator.standard_normal((6, 512)) * 1e-4).astype(np.float64)
    expected = np.linalg.norm(rows[:, None] - rows, axis=2)
    np.testing.assert_allclose(visual_distances(rows), expected, rtol=1e-7)
    same = np.repeat(rows[:1].astype(np.float16), 3, axis=0)
    assert (visual_distances(same) == 0).all()


@ORDINARY
@given(weights(), st.sampled_from([None, -0.5, -3.0]), st.sampled_from([None, 1, 2, 4]))
def test_pruning_is_its_definition(matrix, tau, top_k):
    i, j = np.nonzero(np.triu(np.isfinite(matrix), 1))
    kept = GraphRules(tau=tau, top_k=top_k).kept(i, j, matrix[i, j])
    expected = oracle.prune(oracle.as_dict(matrix), len(matrix), tau, top_k)
    assert pair_set(np.column_stack([i, j])[kept]) == {pair for pair in expected if pair[0] < pair[1]}


def adjacency_of(pairs, n):
    matrix = np.zeros((n, n), dtype=bool)
    for i, j in pairs:
        matrix[i, j] = matrix[j, i] = True
    return adjacency_bits(matrix)


@ORDINARY
@given(towns(30), st.integers(1, 8), st.floats(0.3, 1.0))
def test_the_first_clique_is_maximal_and_none_is_missed(town, least, share):
    east, north, generator = town
    n = len(east)
    pairs = oracle.all_pairs(east, north, 25.0)
    usable = np.flatnonzero(generator.random(n) < share).tolist()
    cliques = {frozenset(c) for c in nx.find_cliques(oracle.graph_of(pairs, n).subgraph(usable))}
    alive = sum(1 << node for node in usable)
    found, rest = first_clique(adjacency_of(pairs, n), alive, least)
    large = {c for c in cliques if len(c) >= least}
    if large:
        assert frozenset(nodes_of(found)) in large
        assert all(c <= set(nodes_of(rest)) for c in large)
    else:
        assert found == 0 and rest.bit_count() < least
    best = largest_clique(adjacency_of(pairs, n), alive, least)
    assert best.bit_count() == max((len(c) for c in large), default=0)


def test_a_search_that_runs_out_of_steps_gives_up():
    # Complete multipartite: many cliques of one node from each part, none larger.
    parts = np.arange(36) // 3
    bits, every = adjacency_bits(parts[:, None] != parts), (1 << 36) - 1
    clique, left = first_clique(bits, every, 13, steps=200)
    assert clique == 0 and left.bit_count() >= 13
    assert first_clique(bits, every, 12, steps=200)[0].bit_count() == 12
    assert largest_clique(bits, every, 3, steps=200).bit_count() == 12


def test_a_clique_of_thousands_is_found_behind_a_dead_end():
    # Nodes 0 and 1 form a clique of their own; 0 is also joined to 1,500 nodes, all joined to one another.
    matrix = np.ones((1502, 1502), dtype=bool)
    np.fill_diagonal(matrix, False)
    matrix[1, 2:] = matrix[2:, 1] = False
    assert first_clique(adjacency_bits(matrix), (1 << 1502) - 1, 1400)[0].bit_count() == 1501


@settings(max_examples=300, deadline=None)
@given(weights(), st.integers(1, 5), st.sampled_from(["closest", "farthest", "random"]))
def test_greedy_is_its_description_and_so_are_its_steps(matrix, k, prefer):
    steps = []
    chosen = greedy_weighted_clique(matrix, k, prefer=prefer, steps=steps)
    if k == 1:
        assert chosen is not None and len(chosen) == 1
    else:
        expected = oracle.greedy(oracle.as_dict(matrix), len(matrix), k, prefer)
        assert (None if chosen is None else chosen.tolist()) == expected
    if chosen is None:
        assert not steps or steps[-1].chosen is None
    else:
        assert [*steps[-1].members, steps[-1].chosen] == chosen.tolist()
    edge = np.isfinite(matrix) & ~np.eye(len(matrix), dtype=bool)
    for step in steps:
        for node in np.flatnonzero(np.isfinite(step.means)):
            others = list(step.members) or np.flatnonzero(edge[node])
            assert edge[node, others].all()
            if prefer != "random":
                assert step.means[node] == pytest.approx(matrix[node, others].mean(), abs=1e-9)


def test_ties_go_to_the_lowest_index_whatever_the_order_of_the_sums():
    # Every row holds the same three affinities in another order: plain sums would differ in the last digit.
    a, b, c = -0.1, -0.2, -0.3
    weight = np.array([[0, a, b, c], [a, 0, c, b], [b, c, 0, a], [c, b, a, 0]])
    assert greedy_weighted_clique(weight, 4).tolist()[0] == 0
    assert greedy_weighted_clique(np.zeros((6, 6)), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("weight", "k", "options", "message"),
    [
        (np.zeros((2, 3)), 2, {}, r"symmetric matrix, got shape \(2, 3\)"),
        (np.array([[0, 1.0], [2.0, 0]]), 2, {}, "symmetric"),
        (np.zeros((3, 3)), 0, {}, "k must be a whole number of at least 1, got 0"),
        (np.zeros((3, 3)), 2, {"prefer": "easy"}, "prefer must be one of closest, farthest, random"),
        (
            np.zeros((3, 3)),
            2,
            {"prefer": "hard"},
            "prefer must be one of closest, farthest, random, got 'hard'",
        ),
    ],
)
def test_greedy_refuses(weight, k, options, message):
    with pytest.raises(ValueError, match=message):
        greedy_weighted_clique(weight, k, **options)


def test_statistics_are_those_of_networkx():
    generator = np.random.default_rng(3)
    east, north = generator.uniform(0, 300, (2, 150))
    descriptors = generator.standard_normal((150, 16))
    graph = GeoVisualGraph(east, north, descriptors=descriptors, tau=-100.0)
    other = oracle.graph_of(graph.edges().tolist(), 150)
    counts = graph_statistics(graph)
    sizes = [len(c) for c in nx.find_cliques(other)]
    assert counts["edges"] == graph.n_edges == other.number_of_edges()
    assert counts["pruned_edges"] == len(oracle.all_pairs(east, north, 25.0)) - other.number_of_edges() > 0
    assert graph.degrees().tolist() == [d for _, d in other.degree()]
    assert nx.utils.graphs_equal(graph.to_networkx(), other)
    assert counts["components"] == nx.number_connected_components(other)
    assert counts["largest_component"] == max(len(c) for c in nx.connected_components(other))
    assert counts["maximal_cliques"] == len(sizes) and counts["largest_clique"] == max(sizes)


@pytest.mark.parametrize("n", [0, 1])
def test_graphs_of_no_and_one_image(n):
    graph = GeoVisualGraph(np.zeros(n), np.zeros(n), descriptors=np.ones((n, 4)))
    counts = graph_statistics(graph)
    assert graph.edges().shape == (0, 2)
    assert (len(graph), graph.n_edges, counts["components"], counts["maximal_cliques"]) == (n, 0, n, n)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"east_m": [0.0, np.nan, 1.0]}, "east_m is nan at image 1"),
        ({"city": [0, 0]}, r"city must have shape \(3,\).*got \(2,\)"),
        ({"north_m": [0.0, 1.0]}, r"north_m must have shape \(3,\).*got \(2,\)"),
        ({"radius_m": 0.0}, "radius_m must be a number above 0, got 0.0"),
        ({"max_heading_deg": 90.0}, "max_heading_deg needs heading_deg"),
        ({"tau": 1.0}, "tau must be a number of at most 0, or None"),
        ({"max_heading_deg": 90.0, "heading_deg": [0.0, np.nan, 1.0]}, "heading_deg is nan at image 1"),
        ({"descriptors": np.ones((2, 4))}, r"shape \(3, D\).*got \(2, 4\)"),
        ({"descriptors": np.diag([1.0, 1.0, np.nan])}, "descriptor of image 2 holds a NaN"),
    ],
)
def test_the_graph_refuses(options, message):
    options = {"east_m": [0.0, 1.0, 2.0], "north_m": [0.0, 0.0, 0.0], **options}
    with pytest.raises(ValueError, match=message):
        GeoVisualGraph(**options)
