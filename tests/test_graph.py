"""The geo-visual graph against all pairs, networkx and the affinity's definition."""

import itertools

import networkx as nx
import numpy as np
import oracles_graph as oracle
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from sagelib.graph import (
    GeoVisualGraph,
    SearchBudget,
    adjacency_bits,
    affinity,
    bits_of,
    edge_affinities,
    explain_greedy,
    first_clique,
    geographic_distances,
    greedy_weighted_clique,
    largest_clique,
    maximal_cliques,
    neighbour_lists,
    nodes_of,
    prune,
    radius_pairs,
    visual_distances,
)

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


# -- geographic edges ---------------------------------------------------------------------------------------------------


@ORDINARY
@given(towns(), st.sampled_from([3, 7, 1 << 16]))
def test_pairs_are_all_pairs_within_the_radius(town, block):
    east, north, _ = town
    pairs = radius_pairs(east, north, 25.0, block=block)
    assert pair_set(pairs) == oracle.all_pairs(east, north, 25.0)
    assert len(pair_set(pairs)) == len(pairs)  # each once


def test_the_radius_is_inclusive():
    east, north = np.array([0.0, 15.0, 15.0]), np.array([0.0, 20.0, 20.001])
    assert pair_set(radius_pairs(east, north, 25.0)) == {(0, 1), (1, 2)}


def test_neighbour_lists_are_symmetric_and_ascending():
    indptr, indices = neighbour_lists(5, np.array([[3, 1], [0, 3], [4, 1]]))
    assert [indices[indptr[i] : indptr[i + 1]].tolist() for i in range(5)] == [[3], [3, 4], [], [0, 1], [1]]


def test_positions_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"pairs of the 40,000 images lie within 25 m.*40,000"):
        radius_pairs(np.zeros(40_000), np.zeros(40_000), 25.0)


@ORDINARY
@given(towns(25), st.sampled_from([0.0, 30.0, 90.0, 180.0]))
def test_headings_limit_the_edges(town, most):
    east, north, generator = town
    heading = generator.integers(0, 8, len(east)) * 45.0 + generator.choice([0.0, 360.0, -360.0], len(east))
    graph = GeoVisualGraph.build(east, north, heading_deg=heading, max_heading_deg=most)
    assert pair_set(graph.edges()) == oracle.all_pairs(east, north, 25.0, heading, most)


# -- affinities ---------------------------------------------------------------------------------------------------------


@ORDINARY
@given(towns(15), st.sampled_from([0.0, 2.0]), st.sampled_from([1.0, 100.0]))
def test_affinities_are_the_formula(town, floor, norm):
    east, north, generator = town
    descriptors = generator.standard_normal((len(east), 33)).astype(np.float32) * norm
    graph = GeoVisualGraph.build(east, north, descriptors=descriptors, min_distance_m=floor)
    for (i, j), weight in zip(graph.edges().tolist(), graph.edge_values()["weight"], strict=True):
        assert weight == pytest.approx(oracle.affinity(east, north, descriptors, i, j, floor), rel=1e-12)
    dense = affinity(geographic_distances(east, north), visual_distances(descriptors), min_distance_m=floor)
    for i, j in itertools.permutations(range(len(east)), 2):
        assert dense[i, j] == pytest.approx(oracle.affinity(east, north, descriptors, i, j, floor), rel=1e-9)


def test_visual_distances_of_nearly_equal_descriptors_do_not_cancel():
    generator = np.random.default_rng(0)
    common = generator.standard_normal(512) * 100
    rows = (common + generator.standard_normal((6, 512)) * 1e-4).astype(np.float64)
    expected = np.linalg.norm(rows[:, None] - rows, axis=2)
    np.testing.assert_allclose(visual_distances(rows), expected, rtol=1e-7)
    same = np.repeat(rows[:1].astype(np.float16), 3, axis=0)
    assert (visual_distances(same) == 0).all()


def test_a_descriptor_that_is_not_finite_is_named():
    descriptors = np.ones((4, 8), dtype=np.float16)
    descriptors[2, 3] = np.nan
    with pytest.raises(ValueError, match="image 2 holds a NaN"):
        edge_affinities([[0, 1], [1, 2]], np.zeros(4), np.zeros(4), descriptors)


@ORDINARY
@given(weights(), st.sampled_from([None, -0.5, -3.0]), st.sampled_from([None, 1, 2, 4]))
def test_pruning_is_its_definition(matrix, tau, top_k):
    pruned = prune(matrix, tau=tau, top_k=top_k)
    assert oracle.as_dict(pruned) == oracle.prune(oracle.as_dict(matrix), len(matrix), tau, top_k)
    assert np.isneginf(np.diagonal(pruned)).all()


@ORDINARY
@given(towns(25), st.sampled_from([None, -40.0, -8.0]), st.sampled_from([None, 1, 3]))
def test_the_graph_is_pruned_as_the_definition(town, tau, top_k):
    east, north, generator = town
    descriptors = generator.standard_normal((len(east), 8))
    graph = GeoVisualGraph.build(east, north, descriptors=descriptors, tau=tau, top_k=top_k)
    full = GeoVisualGraph.build(east, north, descriptors=descriptors)
    weight = {}
    for (i, j), w in zip(full.edges().tolist(), full.edge_values()["weight"], strict=True):
        weight[i, j] = weight[j, i] = float(w)
    kept = oracle.prune(weight, len(east), tau, top_k)
    assert pair_set(graph.edges()) == {pair for pair in kept if pair[0] < pair[1]}
    stored = graph.csr("weight").tocoo()
    assert {
        (i, j): w for i, j, w in zip(stored.row.tolist(), stored.col.tolist(), stored.data, strict=True)
    } == kept


# -- cliques ------------------------------------------------------------------------------------------------------------


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
    usable = generator.random(n) < share
    left = oracle.graph_of(pairs, n).subgraph(np.flatnonzero(usable).tolist())
    cliques = {frozenset(c) for c in nx.find_cliques(left)}
    budget = SearchBudget(10**6)
    found, rest = first_clique(adjacency_of(pairs, n), bits_of(usable), least, budget)
    large = {c for c in cliques if len(c) >= least}
    if large:
        assert frozenset(nodes_of(found)) in large
        assert all(c <= set(nodes_of(rest)) for c in large)
    else:
        assert found == 0
    best = largest_clique(adjacency_of(pairs, n), bits_of(usable), least, budget)
    assert best.bit_count() == max((len(c) for c in large), default=0)
    assert budget.cut == 0


def test_a_spent_budget_ends_the_search_and_is_counted():
    # Complete multipartite: many cliques of one node from each part, none larger, and degrees that say nothing.
    parts = np.arange(36) // 3
    matrix = parts[:, None] != parts
    budget = SearchBudget(200)
    assert first_clique(adjacency_bits(matrix), (1 << 36) - 1, 13, budget)[0] == 0
    assert budget.cut == 1 and budget.spent <= 201
    enough = SearchBudget(200)
    assert first_clique(adjacency_bits(matrix), (1 << 36) - 1, 12, enough)[0].bit_count() == 12
    assert enough.cut == 0


def test_a_clique_of_thousands_is_found_behind_a_dead_end():
    # Nodes 0 and 1 form a clique of their own; 0 is also joined to 1,500 nodes that are all joined to one another.
    matrix = np.ones((1502, 1502), dtype=bool)
    np.fill_diagonal(matrix, False)
    matrix[1, 2:] = matrix[2:, 1] = False
    budget = SearchBudget(20_000)
    found, _ = first_clique(adjacency_bits(matrix), (1 << 1502) - 1, 1400, budget)
    assert found.bit_count() == 1501 and budget.cut == 0


@ORDINARY
@given(towns(30))
def test_maximal_cliques_are_those_of_networkx(town):
    east, north, _ = town
    pairs = oracle.all_pairs(east, north, 25.0)
    indptr, indices = neighbour_lists(len(east), np.array(sorted(pairs)).reshape(-1, 2))
    found = [tuple(clique) for clique in maximal_cliques(indptr, indices)]
    assert len(found) == len(set(found))
    assert set(found) == oracle.maximal_cliques(pairs, len(east))
    assert len(list(maximal_cliques(indptr, indices, limit=2))) == min(2, len(found))


def test_bit_sets_are_the_nodes():
    mask = np.zeros(70, dtype=bool)
    mask[[0, 7, 8, 63, 64, 69]] = True
    assert nodes_of(bits_of(mask)) == [0, 7, 8, 63, 64, 69]


# -- the greedy choice --------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(weights(), st.integers(1, 5), st.sampled_from(["affine", "hard", "uniform"]))
def test_greedy_is_its_description(matrix, k, prefer):
    chosen = greedy_weighted_clique(matrix, k, prefer=prefer)
    if k == 1:
        assert chosen is not None and len(chosen) == 1
        return
    expected = oracle.greedy(oracle.as_dict(matrix), len(matrix), k, prefer)
    assert (None if chosen is None else chosen.tolist()) == expected


@settings(max_examples=100, deadline=None)
@given(weights(), st.integers(1, 5), st.sampled_from(["affine", "hard", "uniform"]))
def test_the_account_and_the_sparse_form_end_in_the_same_clique(matrix, k, prefer):
    chosen = greedy_weighted_clique(matrix, k, prefer=prefer)
    steps = list(explain_greedy(matrix, k, prefer=prefer))
    if chosen is None:
        assert not steps or steps[-1].chosen is None
    else:
        assert [*steps[-1].members, steps[-1].chosen] == chosen.tolist()
    for step in steps:
        for node, mean in zip(step.candidates, step.means, strict=True):
            if step.members and prefer != "uniform":
                assert mean == pytest.approx(matrix[node, list(step.members)].mean(), abs=1e-9)
            assert node not in step.members
    rows, columns = np.nonzero(np.isfinite(matrix) & ~np.eye(len(matrix), dtype=bool))
    sparse = sp.coo_array((matrix[rows, columns], (rows, columns)), shape=matrix.shape).tocsr()
    from_sparse = greedy_weighted_clique(sparse, k, prefer=prefer)
    assert np.array_equal(chosen, from_sparse) if chosen is not None else from_sparse is None


@settings(max_examples=60, deadline=None)
@given(weights(), st.integers(1, 5), st.sampled_from(["affine", "hard", "uniform"]))
def test_the_choice_in_a_large_sparse_graph_is_the_dense_one(matrix, k, prefer):
    n, padded = len(matrix), 3000
    rows, columns = np.nonzero(np.isfinite(matrix) & ~np.eye(n, dtype=bool))
    sparse = sp.coo_array((matrix[rows, columns], (rows, columns)), shape=(padded, padded)).tocsr()
    dense, large = (greedy_weighted_clique(w, k, prefer=prefer) for w in (matrix, sparse))
    assert np.array_equal(dense, large) if dense is not None else large is None


def test_ties_go_to_the_lowest_index_whatever_the_order_of_the_sums():
    # Every row holds the same three affinities in another order: sums taken left to right differ in the last digit.
    a, b, c = -0.1, -0.2, -0.3
    weight = np.array([[0, a, b, c], [a, 0, c, b], [b, c, 0, a], [c, b, a, 0]])
    assert greedy_weighted_clique(weight, 4).tolist()[0] == 0
    assert greedy_weighted_clique(np.zeros((6, 6)), 3).tolist() == [0, 1, 2]


def test_a_pruned_pair_is_no_edge_and_never_a_zero():
    weight = np.array([[0, -1, np.nan], [-1, 0, -9], [np.nan, -9, 0]])
    assert greedy_weighted_clique(weight, 2).tolist() == [0, 1]
    assert greedy_weighted_clique(weight, 3) is None
    stored_zero = sp.csr_array((np.zeros(2), (np.array([0, 1]), np.array([1, 0]))), shape=(3, 3))
    assert greedy_weighted_clique(stored_zero, 2).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("weight", "k", "options", "message"),
    [
        (np.zeros((2, 3)), 2, {}, "square"),
        (np.array([[0, 1.0], [2.0, 0]]), 2, {}, "symmetric"),
        (sp.csr_array(np.array([[0, 1.0], [2.0, 0]])), 2, {}, "symmetric"),
        (np.array([[0, np.inf], [np.inf, 0]]), 2, {}, "plus infinity"),
        (np.zeros((3, 3)), 0, {}, "k must be an integer of at least 1, got 0"),
        (np.zeros((3, 3)), 2, {"prefer": "easy"}, "prefer must be one of"),
    ],
)
def test_greedy_refuses(weight, k, options, message):
    with pytest.raises(ValueError, match=message):
        greedy_weighted_clique(weight, k, **options)


# -- the graph object ---------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_networkx():
    generator = np.random.default_rng(3)
    east, north = generator.uniform(0, 300, (2, 150))
    descriptors = generator.standard_normal((150, 16))
    graph = GeoVisualGraph.build(east, north, descriptors=descriptors, tau=-100.0)
    other = oracle.graph_of(graph.edges().tolist(), 150)
    counts = graph.statistics()
    sizes = [len(c) for c in nx.find_cliques(other)]
    assert counts["edges"] == graph.n_edges == other.number_of_edges()
    assert counts["pruned_edges"] == len(oracle.all_pairs(east, north, 25.0)) - other.number_of_edges() > 0
    assert graph.degrees().tolist() == [d for _, d in other.degree()]
    assert counts["components"] == nx.number_connected_components(other)
    assert counts["largest_component"] == max(len(c) for c in nx.connected_components(other))
    assert sorted(graph.clique_sizes()) == sorted(sizes)
    assert counts["largest_clique"] == max(sizes) and not counts["cliques_cut_at_limit"]


def test_new_descriptors_gain_and_lose_edges():
    generator = np.random.default_rng(5)
    east, north = generator.uniform(0, 100, (2, 60))
    before = GeoVisualGraph.build(east, north, descriptors=generator.standard_normal((60, 4)), tau=-30.0)
    after = before.with_descriptors(generator.standard_normal((60, 4)))
    change = after.compare(before)
    old, new = pair_set(before.edges()), pair_set(after.edges())
    assert pair_set(change["gained"]) == new - old and pair_set(change["lost"]) == old - new
    assert change["n_common"] == len(new & old) and change["n_gained"] > 0 and change["n_lost"] > 0
    assert change["jaccard"] == pytest.approx(len(new & old) / len(new | old))
    same = after.compare(after)
    assert (same["n_gained"], same["n_lost"], same["mean_weight_change"]) == (0, 0, 0.0)


def test_dense_part_feeds_the_greedy_choice():
    generator = np.random.default_rng(6)
    east, north = generator.uniform(0, 30, (2, 12))
    graph = GeoVisualGraph.build(east, north, descriptors=generator.standard_normal((12, 4)), tau=-40.0)
    nodes = np.array([2, 3, 5, 7, 11])
    chosen = greedy_weighted_clique(graph.dense(nodes), 3)
    assert chosen is not None
    edges = pair_set(graph.edges())
    assert all(tuple(sorted(pair)) in edges for pair in itertools.combinations(nodes[chosen].tolist(), 2))


@pytest.mark.parametrize("n", [0, 1])
def test_graphs_of_no_and_one_image(n):
    graph = GeoVisualGraph.build(np.zeros(n), np.zeros(n), descriptors=np.ones((n, 4)))
    counts = graph.statistics()
    assert (len(graph), graph.n_edges, counts["components"], counts["maximal_cliques"]) == (n, 0, n, n)
    assert graph.edges().shape == (0, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"east_m": [0.0, np.nan, 1.0]}, r"east_m is nan at image 1 \(1 of 3"),
        ({"north_m": [0.0, np.inf, 1.0]}, "north_m is inf at image 1"),
        ({"north_m": [0.0, 1.0]}, r"north_m must have shape \(3,\).*got \(2,\)"),
        ({"utm_zone": ["31N", "32N", "31N"]}, "UTM zones '31 north', '32 north' are mixed"),
        ({"utm_zone": ["31N", "", "31N"]}, "'unknown', '31 north' are mixed"),
        ({"radius_m": 0.0}, "radius_m must be a positive number of metres, got 0.0"),
        ({"tau": 0.0}, "tau must be None or below 0"),
        ({"top_k": 0}, "top_k must be None or an integer of at least 1, got 0"),
        ({"min_distance_m": -1.0}, "min_distance_m must be"),
        ({"max_heading_deg": 90.0}, "max_heading_deg needs heading_deg"),
        ({"max_heading_deg": 181.0}, r"\[0, 180\], got 181"),
        ({"max_heading_deg": 90.0, "heading_deg": [0.0, np.nan, 1.0]}, "unknown for 1 of 3 images"),
        ({"descriptors": np.ones((2, 4))}, r"shape \(3, D\).*got \(2, 4\)"),
        ({"descriptors": np.full((3, 4), np.nan)}, "holds a NaN"),
    ],
)
def test_the_graph_refuses(options, message):
    options = {"east_m": [0.0, 1.0, 2.0], "north_m": [0.0, 0.0, 0.0], **options}
    with pytest.raises(ValueError, match=message):
        GeoVisualGraph.build(**options)


def test_bands_of_one_zone_are_not_mixed_zones():
    graph = GeoVisualGraph.build([0.0, 1.0], [0.0, 1.0], utm_zone=["10S", "10T"])
    assert graph.n_edges == 1
