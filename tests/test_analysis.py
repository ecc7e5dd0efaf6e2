"""Numbers for figures: against slow loops, closed forms and properties."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sagelib.aggregators import CLS, SALAD, BoQ, Mean, MixVPR
from sagelib.evaluate import published
from sagelib.images import Preprocess, load_image
from sagelib.model import SAGE
from sagelib.places import Places, open_set, pairwise_m
from sagelib.retrieval import rankings_table
from workbench import analysis


def clusters(spread=0.1):
    """Thirty descriptors of six places."""
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(6), 5)
    return rng.normal(size=(6, 20))[labels] + spread * rng.normal(size=(30, 20)), labels


def test_unit_rows_and_what_has_none():
    values = analysis.unit(np.array([[3, 4], [0, -2]], dtype=np.float16))
    np.testing.assert_allclose(values, [[0.6, 0.8], [0, -1]])
    with pytest.raises(ValueError, match=r"row 1 is not \(2 such\)"):
        analysis.unit([[1, 0], [0, 0], [np.nan, 1]])


def test_tsne_keeps_neighbours_and_repeats():
    values, labels = clusters()
    points = analysis.tsne(values, seed=0, perplexity=5)
    # One point of thirty may go astray: last digits differ between processors.
    assert points.shape == (30, 2) and analysis.neighbour_purity(points, labels).mean() >= 0.96
    np.testing.assert_array_equal(points, analysis.tsne(values, seed=0, perplexity=5))
    assert not np.array_equal(points, analysis.tsne(values, seed=1, perplexity=5))
    points = np.array([[0.0, 0], [1, 0], [1.5, 0], [9, 9]])
    assert analysis.neighbour_purity(points, [0, 0, 1, 1]).tolist() == [True, False, False, True]
    with pytest.raises(ValueError, match="perplexity"):
        analysis.tsne(values, seed=0, perplexity=30)


def test_distances_of_classes_equal_all_pairs():
    values, labels = clusters(spread=0.5)
    labels, values = np.r_[labels, 99], np.r_[values, np.ones((1, 20))]
    rows = [v / math.sqrt(sum(v**2)) for v in values]
    pairs = [
        (labels[i], labels[j], math.dist(rows[i], rows[j])) for i in range(31) for j in range(31) if i != j
    ]
    table = analysis.class_distances(values, labels)
    assert table.index.tolist() == list(range(6)), "a class of one image has no pair"
    for name, (within, between) in table.iterrows():
        assert within == pytest.approx(np.mean([d for a, b, d in pairs if a == b == name]))
        assert between == pytest.approx(np.mean([d for a, b, d in pairs if a == name != b]))
    for second, within in (([5, 0], 0.0), ([0, 2], math.sqrt(2)), ([-3, 0], 2.0)):  # the stated scale
        table = analysis.class_distances([[1, 0], second, [0, 1]], [7, 7, 8])
        assert table.within[7] == pytest.approx(within)


def test_chosen_places_are_whole_and_repeat():
    labels = np.r_[np.repeat(np.arange(10), 4), [10], [-1] * 5]
    chosen = analysis.choose_places(labels, places=5, images=3, seed=2)
    names, counts = np.unique(labels[chosen], return_counts=True)
    assert len(names) == 5 and set(counts) == {3} and len(set(chosen)) == 15 and names.min() >= 0
    np.testing.assert_array_equal(chosen, analysis.choose_places(labels, places=5, images=3, seed=2))
    with pytest.raises(ValueError, match="11 places of at least 2 images, and there are 10"):
        analysis.choose_places(labels, places=11, images=2, seed=0)


def test_views_split_places_by_heading():
    labels = np.array([0, 0, 0, 0, 1, 1, -1, 0])
    heading = np.array([350.0, 10.0, 180.0, 80.0, 10.0, np.nan, 10.0, np.nan])
    views = analysis.split_by_heading(labels, heading, max_heading_deg=45)
    assert views.tolist() == [0, 0, 1, 2, 4, 5, -1, 3]  # across north; not across places; unknown apart
    assert analysis.split_by_heading(labels, heading, max_heading_deg=180).tolist()[:4] == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="max_heading_deg must be"):
        analysis.split_by_heading(labels, heading, max_heading_deg=0)


def test_true_references_are_near_and_look_the_same_way(small_town):
    test = open_set(small_town.parent, small_town.name)
    answers, apart = test.positives(), pairwise_m(test.queries, test.database)
    pairs = analysis.true_references(test.database, test.queries, answers, max_heading_deg=30)
    assert len(pairs) > 20
    for query, reference in pairs:
        assert reference in answers[query]
        turn = test.database.heading_deg[reference] - test.queries.heading_deg[query]
        assert abs((turn + 180) % 360 - 180) <= 30
    nearest = analysis.true_references(test.database, test.queries, answers, max_heading_deg=180)
    assert all(apart[query, reference] == apart[query].min() for query, reference in nearest)
    unknown = test.queries.replace(heading_deg=np.full(len(test.queries), np.nan))
    any_way = analysis.true_references(test.database, unknown, answers, max_heading_deg=30)
    np.testing.assert_array_equal(any_way, nearest)


@given(*[st.integers(1, 30)] * 2, *[st.integers(1, 9)] * 2, st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_label_shares_keep_the_area(height, width, h, w, seed):
    labels = np.random.default_rng(seed).integers(0, 4, (height, width))
    shares = analysis.label_shares(labels, (h, w), 4)
    assert shares.shape == (h * w, 4)
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    area = [(labels == k).mean() for k in range(4)]
    np.testing.assert_allclose(shares.mean(axis=0), area)
    np.testing.assert_allclose(analysis.mass_on_labels(np.full(h * w, 0.2), shares), area)


def test_label_shares_count_pixels_where_patches_are_whole():
    labels, weights = np.random.default_rng(0).integers(0, 3, (28, 42)), np.eye(6)
    shares = analysis.label_shares(labels, (2, 3), 3)
    patches = [patch for row in np.split(labels, 2) for patch in np.split(row, 3, axis=1)]
    np.testing.assert_allclose(shares, [[(patch == k).mean() for k in range(3)] for patch in patches])
    np.testing.assert_allclose(analysis.mass_on_labels(weights, shares), shares)
    for wrong in (-weights[0], np.zeros(6)):
        with pytest.raises(ValueError, match="weights must not be negative, and not all zero"):
            analysis.mass_on_labels(wrong, shares)


def test_label_preference_of_uniform_and_of_one_label():
    shares = np.random.default_rng(0).dirichlet(np.ones(3), size=(20, 16))
    even = analysis.label_preference(np.ones((20, 16)), shares, seed=0)
    np.testing.assert_allclose(even.difference, 0, atol=1e-12)
    np.testing.assert_allclose(even.ratio, 1)
    sought = analysis.label_preference(shares[..., 1], shares, seed=0)
    assert sought.low[1] > 0 and sought.high[0] < 0 and sought.high[2] < 0
    np.testing.assert_allclose(sought[["share", "area", "difference"]].sum(), [1, 1, 0], atol=1e-12)


def test_patches_of_pictures_give_the_descriptors(small_town):
    paths = open_set(small_town.parent, small_town.name).queries.path[:5]
    torch.manual_seed(0)
    options = dict(pretrained=False, interact=False, aggregator_options={"channels": 4, "probes": 3})
    model, prepare = SAGE("vit_test_patch14", **options), Preprocess(56, mode="antialias")
    seen = analysis.describe_patches(model, paths, prepare, batch_size=2, device="cpu")
    assert seen.patches.shape == (5, 16, 192) and seen.grid == (4, 4)
    with torch.no_grad():
        whole = model.eval()(torch.stack([prepare(load_image(path)) for path in paths]))
    torch.testing.assert_close(seen.descriptors, whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="has no patches"):
        analysis.describe_patches(lambda x: x, paths, prepare, batch_size=2, device="cpu")


GRID, WIDTH = (3, 4), 10


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(0)
    shapes = (2, WIDTH), (2, 12, WIDTH)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def seeded(make, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(WIDTH, **options).double().eval()


MIXVPR = MixVPR, dict(grid=GRID, depth=2, channels=5, rows=2), 0.05  # its layer norm jumps at the start
BOQ = BoQ, dict(channels=8, queries=3, layers=1, rows=2, heads=2), 1e-3


@pytest.mark.parametrize("make, options, near", [MIXVPR, BOQ])
def test_integrated_contributions_add_up(tokens, make, options, near):
    """The axiom of completeness: the shares sum to the change of the score from constant patches."""
    module, (cls, patches) = seeded(make, **options), tokens
    other = torch.nn.functional.normalize(torch.ones(module.out_dim, dtype=torch.float64), dim=0)
    shares = analysis.score_contributions(module, cls, patches, GRID, other)
    with torch.no_grad():
        whole = module(cls, patches, GRID) @ other
        constant = module(cls, patches.mean(dim=1, keepdim=True).expand_as(patches), GRID) @ other
    np.testing.assert_allclose(shares.sum(axis=1), (whole - constant).numpy(), atol=near)
    assert np.abs(shares).sum() > 5 * near
    assert not any(p.grad is not None for p in module.parameters()), "no gradient is left behind"


@pytest.mark.parametrize("make, options", [(Mean, {}), (SALAD, dict(clusters=3, channels=4)), (CLS, {})])
def test_exact_contributions_are_used_where_there_are_any(tokens, make, options):
    module, (cls, patches) = seeded(make, **options), tokens
    other = torch.ones(module.out_dim, dtype=torch.float64)
    exact = module.patch_contributions(cls, patches, GRID, other).detach().numpy()
    np.testing.assert_array_equal(analysis.score_contributions(module, cls, patches, GRID, other), exact)
    assert exact.any() == (make is not CLS), "a descriptor without patches gets zeros"


@pytest.fixture
def ranked(tmp_path):
    """Four queries on a street of ten references; query 0 and 2 are answered wrongly, 3 has no positive."""
    names = [f"set/database/d{i}.jpg" for i in range(10)]
    database = Places.build(names, east_m=np.arange(10) * 20.0, north_m=np.zeros(10), utm_zone=["31U"] * 10)
    names, east = [f"set/queries/q{i}.jpg" for i in range(4)], np.array([1.0, 40, 100, 9000])
    queries = Places.build(names, east_m=east, north_m=np.zeros(4), utm_zone=["31U"] * 4)
    indices = np.array([[9, 0, 1], [2, 3, 4], [0, 9, 8], [5, 6, 7]])
    distances = np.array([[0.1, 0.3, 0.4], [0.2, 0.5, 0.6], [0.7, 0.8, 0.9], [0.3, 0.4, 0.5]])
    positives = [np.array([0, 1]), np.array([1, 2, 3]), np.array([4, 5, 6]), np.array([], int)]
    table = rankings_table(indices, distances, database, queries, positives)
    return table, database, queries, positives


def test_rankings_as_arrays(ranked):
    table = ranked[0].sample(frac=1, random_state=0)
    arrays = analysis.ranking_arrays(table, 2)
    assert arrays["reference"].tolist() == [[9, 0], [2, 3], [0, 9], [5, 6]]
    assert arrays["positive"].tolist() == [[False, True], [True, True], [False, False], [False, False]]
    assert arrays["metres"][0].tolist() == [179.0, 1.0] and arrays["distance"][0].tolist() == [0.1, 0.3]
    assert analysis.ranking_arrays(table, 50)["reference"].shape == (4, 3), "as many as there are"
    with pytest.raises(ValueError, match="some of the 4 queries lack one of the first 3 ranks"):
        analysis.ranking_arrays(ranked[0].drop(index=4), 3)


def test_suspects_are_the_wrong_ones_with_their_nearest_positive(ranked):
    table, database, queries, positives = ranked
    cases = analysis.suspects(table, database, queries, positives, count=0)
    assert [case["query"] for case in cases] == [0, 3, 2], "the most alike wrong answer first"
    assert [(case["score"], case["n_positives"]) for case in cases] == [(1, 2), (0, 0), (0, 3)]
    found = {"rank": 1, "reference": 9, "reference_path": "database/d9.jpg", "metres": 179.0, "positive": 0}
    assert cases[0]["found"][0] == found and len(cases[0]["found"]) == 3
    truth = {"reference": 0, "reference_path": "database/d0.jpg", "metres": 1.0, "rank": 2}
    assert cases[0]["truth"] == truth and cases[1]["truth"] is None
    assert cases[2]["truth"]["reference"] == 5 and cases[2]["truth"]["rank"] == 0, "not among those ranked"
    assert analysis.suspects(table, database, queries, positives, count=1) == cases[:1]
    for wrong in ((database, queries[:3]), (database[:5], queries)):
        with pytest.raises(ValueError, match="no rankings of"):
            analysis.suspects(table, *wrong, positives, count=0)


def test_suspects_that_are_alike_come_by_metres_and_positives_by_heading(ranked):
    table, database, queries, positives = ranked
    queries = queries.replace(heading_deg=np.zeros(4))
    for heading, nearest in (([180.0] + [10.0] * 9, 1), ([180.0] * 10, 0)):  # none looks there: the nearest
        turned = database.replace(heading_deg=np.array(heading))
        (case,) = analysis.suspects(table, turned, queries, positives, count=1)
        assert case["truth"]["reference"] == nearest
    table.loc[table["rank"] == 1, "distance"] = 0.5
    cases = analysis.suspects(table, database, queries, positives, count=0)
    assert [case["query"] for case in cases] == [2, 0, 3] and {case["score"] for case in cases} == {0.0}
    table["positive"] = 0
    cases = analysis.suspects(table, database, queries, positives, count=0)
    assert [case["query"] for case in cases] == [1, 2, 0, 3]
    assert np.isnan([case["score"] for case in cases]).all()


def log_of(schedule, refreshes, described=50):
    """A log of a training: per epoch the seconds of its refresh, and the epoch whose graph it used."""
    rows = [{"kind": "step", "step": 1}, {"kind": "epoch", "epoch": 0, "seconds": {"validate": 1.0}}]
    for i, (seconds, made) in enumerate(refreshes):
        graph = {"schedule": schedule, "images": 200, "epoch": i, "refreshed_epoch": made}
        graph |= {"described_images": described, "seconds_describe": 0.8 * refreshes[made][0]}
        seconds = {"refresh": seconds, "train": 10.0}
        rows.append({"kind": "epoch", "epoch": i + 1, "graph": {"mined": graph}, "seconds": seconds})
    return rows


def test_a_table_of_costs_estimates_only_what_was_not_measured():
    paper = published("graph")
    online, static = log_of("online", [(2.0, 0), (4.0, 1)]), log_of("static", [(8.0, 0), (0.1, 0)], 200)
    table = analysis.graph_cost_table({"a": online, "no graph": [{"kind": "step"}]}, paper)
    assert table["kind"].tolist() == ["measured", "estimated", "published", "published"]
    assert table["paid"].tolist() == ["each epoch", "once"] * 2 and table["who"].tolist()[:2] == ["a", "a"]
    assert table["seconds"].tolist()[:2] == [3.0, pytest.approx(0.8 * 6 / 100 * 200)]
    assert table["added_pct"][0] == 30.0 and table["added_pct"].isna().tolist() == [False, True, False, True]
    assert table["context"][0] == "50 of 200 images described"
    assert "94.5 on msls-val, context sorted" in table["context"][2]
    table = analysis.graph_cost_table({"a": online, "b": static}, paper)
    assert table["kind"].tolist() == ["measured"] * 2 + ["published"] * 2
    assert table["seconds"].tolist()[:2] == [3.0, 8.0], "the second epoch of a static training made no graph"
    assert analysis.graph_cost_table({}, paper)["kind"].tolist() == ["published"] * 2
