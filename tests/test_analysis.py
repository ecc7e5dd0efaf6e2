"""Numbers for figures: against slow loops, closed forms and properties."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sagelib.aggregators import CLS, SALAD, BoQ, GeM, Mean, MixVPR, NetVLAD
from sagelib.evaluate import published
from sagelib.places import Places
from sagelib.retrieval import read_rankings, write_rankings
from workbench import analysis


def clusters(seed=0, places=6, images=5, dim=20, spread=0.1):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(places, dim))
    labels = np.repeat(np.arange(places), images)
    return centres[labels] + spread * rng.normal(size=(places * images, dim)), labels


# --- descriptors -----------------------------------------------------------------------------------------------


def test_unit_rows_and_what_has_none():
    values = analysis.unit(np.array([[3, 4], [0, -2]], dtype=np.float16))
    np.testing.assert_allclose(values, [[0.6, 0.8], [0, -1]])
    with pytest.raises(ValueError, match=r"row 1 is not \(2 such\)"):
        analysis.unit([[1, 0], [0, 0], [np.nan, 1]])
    with pytest.raises(ValueError, match=r"shape \(n, D\), got \(3,\)"):
        analysis.unit([1, 2, 3])


def test_tsne_keeps_neighbours_and_repeats():
    values, labels = clusters()
    points = analysis.tsne(values, seed=0, perplexity=5)
    assert points.shape == (30, 2)
    apart = np.linalg.norm(points[:, None] - points[None], axis=2) + 1e9 * np.eye(30)
    # One point of thirty may go astray: last digits differ between processors, and the descent makes much of them.
    assert (labels[apart.argmin(axis=1)] == labels).mean() >= 0.96
    np.testing.assert_array_equal(points, analysis.tsne(values, seed=0, perplexity=5))
    assert not np.array_equal(points, analysis.tsne(values, seed=1, perplexity=5))


def test_tsne_says_what_it_cannot_do():
    values, _ = clusters()
    with pytest.raises(ValueError, match=r"perplexity must be in \[1, 30\) for 30 descriptors, got 30"):
        analysis.tsne(values, perplexity=30)
    with pytest.raises(ValueError, match="at least 3 descriptors, got 2"):
        analysis.tsne(values[:2], perplexity=1)


def test_intra_class_distance_equals_all_pairs():
    values, labels = clusters(spread=0.5)
    labels = np.r_[labels, 99, -1, -1]
    values = np.r_[values, np.random.default_rng(1).normal(size=(3, 20))]
    found = analysis.average_intra_class_distance(values, labels, seed=0)
    expected = []
    for label in range(6):
        rows = [v / math.sqrt(sum(v**2)) for v in values[labels == label]]
        pairs = [math.dist(rows[i], rows[j]) for i in range(5) for j in range(i)]
        expected.append(sum(pairs) / len(pairs))
    np.testing.assert_allclose(found.per_class, expected)
    assert found.value == pytest.approx(sum(expected) / 6)
    assert found.low < found.value < found.high
    assert found.classes.tolist() == list(range(6)) and found.left_out == 1
    assert found.by_class()[3] == pytest.approx(expected[3])


@pytest.mark.parametrize(
    "rows, value",
    [([[1, 0], [5, 0]], 0.0), ([[1, 0], [0, 2]], math.sqrt(2)), ([[1, 0], [-3, 0]], 2.0)],
)
def test_intra_class_distance_has_its_stated_scale(rows, value):
    found = analysis.average_intra_class_distance(rows, [7, 7])
    assert found.value == found.low == found.high == pytest.approx(value)


def test_every_place_counts_the_same():
    """A place of many images must not drown one of two."""
    values = np.array([[1.0, 0]] * 50 + [[1, 0], [-1, 0]])
    assert analysis.average_intra_class_distance(values, [0] * 50 + [1] * 2).value == pytest.approx(1.0)


def test_intra_class_distance_refuses_what_has_no_pair():
    with pytest.raises(ValueError, match="no class has two images"):
        analysis.average_intra_class_distance(np.eye(3), [0, 1, -1])
    with pytest.raises(ValueError, match=r"labels must have shape \(3,\), got \(2,\)"):
        analysis.average_intra_class_distance(np.eye(3), [0, 1])


def test_a_paired_difference_is_tighter_than_its_parts():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 1, 200)
    value, low, high = analysis.paired_difference(hard + 0.1 + rng.normal(0, 0.05, 200), hard)
    assert low < 0.1 < high and high - low < 0.05 and value == pytest.approx(0.1, abs=0.02)
    with pytest.raises(ValueError, match="of the same items"):
        analysis.paired_difference([1, 2], [1])


def test_chosen_places_are_whole_and_repeat():
    labels = np.r_[np.repeat(np.arange(10), 4), [10], [-1] * 5]
    chosen = analysis.choose_places(labels, places=5, images=3, seed=2)
    names, counts = np.unique(labels[chosen], return_counts=True)
    assert len(names) == 5 and set(counts) == {3} and len(set(chosen)) == 15 and names.min() >= 0
    np.testing.assert_array_equal(chosen, analysis.choose_places(labels, places=5, images=3, seed=2))
    assert len(analysis.choose_places(labels, places=10)) == 40
    with pytest.raises(ValueError, match="11 places of at least 2 images, and there are 10"):
        analysis.choose_places(labels, places=11)


def test_views_split_places_by_heading():
    labels = np.array([0, 0, 0, 0, 1, 1, -1, 0])
    heading = np.array([350.0, 10.0, 180.0, 80.0, 10.0, np.nan, 10.0, np.nan])
    views = analysis.split_by_heading(labels, heading, max_heading_deg=45)
    assert views.tolist() == [0, 0, 1, 2, 4, 5, -1, 3]  # across north; not across places; unknown apart
    assert analysis.split_by_heading(labels, heading, max_heading_deg=180).tolist()[:4] == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="max_heading_deg must be in"):
        analysis.split_by_heading(labels, heading, max_heading_deg=0)


def test_inter_class_distance_equals_all_pairs():
    values, labels = clusters(3, places=4, images=3)
    values, labels = np.vstack([values, np.ones((2, values.shape[1]))]), np.r_[labels, 9, -1]
    rows = analysis.unit(values)
    expected = [
        np.mean([np.linalg.norm(rows[i] - rows[j]) for i in range(14) for j in range(13)
                 if labels[i] == c and labels[j] != c and labels[i] >= 0])
        for c in range(4)
    ]  # fmt: skip
    np.testing.assert_allclose(analysis.inter_class_distance(values, labels), expected)
    with pytest.raises(ValueError, match="needs two of them"):
        analysis.inter_class_distance(values[:3], labels[:3])


def test_neighbour_purity_looks_at_the_nearest_other():
    points = np.array([[0.0, 0], [1, 0], [1.5, 0], [9, 9]])
    assert analysis.neighbour_purity(points, np.array([0, 0, 1, 1])).tolist() == [True, False, False, True]


# --- heatmaps --------------------------------------------------------------------------------------------------


def test_entropy_of_uniform_and_single():
    assert analysis.entropy(np.full(9, 0.3)) == pytest.approx(1.0)
    assert analysis.entropy([0, 0, 5.0]) == 0.0
    assert analysis.entropy([1, 1, 0, 0]) == pytest.approx(0.5)
    assert analysis.entropy(np.ones((2, 3, 4)), axis=1).shape == (2, 4)
    for weights in ([-1, 2], [0, 0], [np.nan, 1]):
        with pytest.raises(ValueError, match="weights must"):
            analysis.entropy(weights)


@given(
    st.integers(1, 30), st.integers(1, 30), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1)
)
@settings(max_examples=60, deadline=None)
def test_label_shares_keep_the_area(height, width, h, w, seed):
    labels = np.random.default_rng(seed).integers(0, 4, (height, width))
    shares = analysis.label_shares(labels, (h, w), 4)
    assert shares.shape == (h * w, 4)
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    np.testing.assert_allclose(shares.mean(axis=0), [(labels == k).mean() for k in range(4)])


def test_label_shares_count_pixels_where_patches_are_whole():
    labels = np.random.default_rng(0).integers(0, 3, (28, 42))
    shares = analysis.label_shares(labels, (2, 3), 3)
    for i in range(2):
        for j in range(3):
            patch = labels[14 * i : 14 * i + 14, 14 * j : 14 * j + 14]
            np.testing.assert_allclose(shares[3 * i + j], [(patch == k).mean() for k in range(3)])
    with pytest.raises(ValueError, match=r"lie in 0 \.\.\. 1"):
        analysis.label_shares(labels, (2, 3), 2)


def test_uniform_weights_have_the_mass_of_the_area():
    labels = np.random.default_rng(0).integers(0, 3, (28, 28))
    shares = analysis.label_shares(labels, (4, 4), 3)
    area = [(labels == k).mean() for k in range(3)]
    np.testing.assert_allclose(analysis.mass_on_labels(np.full(16, 0.2), shares), area)
    one = np.eye(16)[5]
    np.testing.assert_allclose(analysis.mass_on_labels(one.reshape(4, 4), shares), shares[5])
    with pytest.raises(ValueError, match="a row for each of the 3 weights, got 16"):
        analysis.mass_on_labels([1, 2, 3], shares)
    with pytest.raises(ValueError, match="must not be negative"):
        analysis.mass_on_labels(-one, shares)


def test_patch_similarity_is_a_cosine():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(6, 5)), rng.normal(size=(4, 5))
    found = analysis.patch_similarity(a, b, 2)
    expected = [a[2] @ v / math.sqrt((a[2] @ a[2]) * (v @ v)) for v in b]
    np.testing.assert_allclose(found, expected)
    with pytest.raises(ValueError, match=r"index must lie in 0 \.\.\. 5, got 6"):
        analysis.patch_similarity(a, b, 6)


GRID, WIDTH = (3, 4), 10


def tokens(seed=0):
    generator = torch.Generator().manual_seed(seed)
    cls = torch.randn(2, WIDTH, generator=generator, dtype=torch.float64)
    return cls, torch.randn(2, 12, WIDTH, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    "make, near",
    [
        (
            lambda: MixVPR(WIDTH, grid=GRID, depth=2, channels=5, rows=2),
            0.05,
        ),  # its layer norm jumps at the start
        (lambda: BoQ(WIDTH, channels=8, queries=3, layers=1, rows=2, heads=2), 1e-3),
        (lambda: NetVLAD(WIDTH, clusters=3), 1e-3),
    ],
    ids=["mixvpr", "boq", "netvlad"],
)
def test_integrated_contributions_add_up(make, near):
    """The axiom of completeness: the shares sum to the change of the score from constant patches."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make().double().eval()
    cls, patches = tokens()
    other = torch.nn.functional.normalize(torch.ones(module.out_dim, dtype=torch.float64), dim=0)
    given = analysis.integrated_contributions(lambda x: module(cls, x, GRID), patches, other, steps=100)
    with torch.no_grad():
        whole = module(cls, patches, GRID) @ other
        constant = module(cls, patches.mean(dim=1, keepdim=True).expand_as(patches), GRID) @ other
    np.testing.assert_allclose(given.sum(axis=1), (whole - constant).numpy(), atol=near)
    assert np.abs(given).sum() > 5 * near
    assert not any(p.grad is not None for p in module.parameters()), "no gradient is left behind"


def test_exact_contributions_are_used_where_there_are_any():
    cls, patches = tokens()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        modules = [Mean(WIDTH), GeM(WIDTH), NetVLAD(WIDTH, clusters=3), SALAD(WIDTH, clusters=3, channels=4)]
        boq = BoQ(WIDTH, channels=8, queries=3, layers=1, rows=2, heads=2)
    for module in modules:
        module.double().eval()
        other = torch.ones(module.out_dim, dtype=torch.float64)
        exact = module.patch_contributions(cls, patches, GRID, other).detach().numpy()
        np.testing.assert_array_equal(analysis.score_contributions(module, cls, patches, GRID, other), exact)
    boq.double().eval()
    other = torch.ones(boq.out_dim, dtype=torch.float64)
    given = analysis.score_contributions(boq, cls, patches, GRID, other, steps=8)
    expected = analysis.integrated_contributions(lambda x: boq(cls, x, GRID), patches, other, steps=8)
    np.testing.assert_array_equal(given, expected)


def test_soft_probing_shares_out_its_score():
    softp = pytest.importorskip("sagelib.softp", reason="soft probing is not here")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = softp.SoftProbing(WIDTH, channels=4, probes=3, token_dim=5).double().eval()
    cls, patches = tokens()
    other = torch.nn.functional.normalize(torch.arange(17, dtype=torch.float64) - 8, dim=0)
    given = analysis.score_contributions(module, cls, patches, GRID, other)
    with torch.no_grad():
        descriptor = module(cls, patches, GRID)
    np.testing.assert_allclose(
        given.sum(axis=1), (descriptor[:, 5:] @ other[5:]).numpy(), rtol=1e-6, atol=1e-9
    )


def test_a_patch_that_repeats_the_mean_moves_nothing():
    cls, patches = tokens()
    patches[:, 3] = patches[:, [i for i in range(12) if i != 3]].mean(dim=1)
    other = torch.ones(WIDTH, dtype=torch.float64)
    given = analysis.integrated_contributions(lambda x: torch.tanh(x).mean(dim=1), patches, other, steps=5)
    assert np.abs(given[:, 3]).max() < 1e-9 < np.abs(given).max()
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        analysis.integrated_contributions(lambda x: x.mean(dim=1), patches, other, steps=0)


def test_a_descriptor_without_patches_gets_zeros():
    cls, patches = tokens()
    other = torch.ones(WIDTH, dtype=torch.float64)
    assert not analysis.score_contributions(CLS(WIDTH), cls, patches, GRID, other).any()
    assert not analysis.integrated_contributions(lambda x: cls, patches, other).any()


def test_label_preference_of_uniform_and_of_one_label():
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(3), size=(20, 16))
    even = analysis.label_preference(np.ones((20, 16)), shares)
    np.testing.assert_allclose(even.difference, 0, atol=1e-12)
    np.testing.assert_allclose(even.ratio, 1)
    sought = analysis.label_preference(shares[..., 1], shares)
    assert sought.low[1] > 0 and sought.high[0] < 0 and sought.high[2] < 0
    np.testing.assert_allclose(
        [sought.share.sum(), sought.area.sum(), sought.difference.sum()], [1, 1, 0], atol=1e-12
    )
    assert sought.pictures.tolist() == [20, 20, 20]
    with pytest.raises(ValueError, match="must agree"):
        analysis.label_preference(np.ones((20, 9)), shares)


def test_true_references_are_near_and_look_the_same_way(small_town):
    from sagelib.places import open_set, pairwise_m

    test = open_set(small_town.parent, small_town.name)
    answers = test.positives()
    pairs = analysis.true_references(test.database, test.queries, answers, max_heading_deg=30)
    assert len(pairs) > 20
    for query, reference in pairs:
        assert reference in answers[query]
        turn = test.database.heading_deg[reference] - test.queries.heading_deg[query]
        assert abs((turn + 180) % 360 - 180) <= 30
    nearest = analysis.true_references(test.database, test.queries, answers)
    apart = pairwise_m(test.queries, test.database)
    for query, reference in nearest:
        assert apart[query, reference] == apart[query].min()


def test_patches_of_pictures_give_the_descriptors(small_town):
    from sagelib.images import Preprocess, load_image
    from sagelib.model import SAGE
    from sagelib.places import open_set

    paths = open_set(small_town.parent, small_town.name).queries.path[:5]
    torch.manual_seed(0)
    model = SAGE(
        "vit_test_patch14", pretrained=False, interact=False, aggregator_options={"channels": 4, "probes": 3}
    )
    prepare = Preprocess(56, mode="antialias")
    seen = analysis.describe_patches(model, paths, prepare, batch_size=2, device="cpu")
    assert seen.patches.shape == (5, 16, 192) and seen.grid == (4, 4)
    with torch.no_grad():
        whole = model.eval()(torch.stack([prepare(load_image(path)) for path in paths]))
    torch.testing.assert_close(seen.descriptors, whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="has no patches"):
        analysis.describe_patches(lambda x: x, paths, prepare)


def test_labels_of_written_pictures_fit_their_pixels(small_town):
    """The label of the sky lies where the written picture is as bright as the sky of a day."""
    from PIL import Image

    from sagelib.places import open_set
    from townscape.folder import LABELS

    test = open_set(small_town.parent, small_town.name)
    paths = [*test.database.path[:4], test.queries.path[5]]
    labels = analysis.town_labels(small_town, paths)
    assert labels.shape == (5, 56, 56) and labels.max() < len(LABELS)
    for path, drawn in zip(paths[:4], labels, strict=False):
        grey = np.asarray(Image.open(path).convert("L"), dtype=float)
        sky = drawn == LABELS.index("sky")
        assert grey[sky].std() < grey[~sky].std()
    with pytest.raises(ValueError, match="no picture of the town"):
        analysis.town_labels(small_town, [str(paths[0]) + "x"])


# --- graph, training, audits -----------------------------------------------------------------------------------


def test_log_lines_become_columns():
    rows = [
        {"kind": "step", "step": 1, "loss": 2.0, "name": "x", "done": True},
        {"kind": "epoch", "epoch": 1, "recall": {"1": 40.0, "5": 60}, "graph": {"mined": {"gained": 3}}},
        {"kind": "step", "step": 2, "lr": 0.1},
        {"note": "nothing"},
    ]
    steps = analysis.log_arrays(rows, "step")
    assert set(steps) == {"step", "loss", "lr"}
    np.testing.assert_array_equal(steps["loss"], [2.0, np.nan])
    epochs = analysis.log_arrays(rows, "epoch")
    assert epochs["recall.5"].tolist() == [60.0] and epochs["graph.mined.gained"].tolist() == [3.0]
    assert analysis.log_arrays([], "step") == {}


def test_an_audit_becomes_lines():
    rows = [("none", 0, 0, 50.0), ("solo", 1, 0, 40.0), ("sorted", 2, 0, 90.0), ("sorted", 8, 0, 70.0)]
    rows += [("shuffled", 2, 0, 41.0), ("shuffled", 2, 1, 43.0), ("shuffled", 4, 0, 44.0)]
    table = pd.DataFrame(rows, columns=["kind", "n", "shuffle", "R@1"])
    found = analysis.audit_arrays(table)
    assert found["n"].tolist() == [2, 4, 8]
    np.testing.assert_array_equal(found["sorted"], [90, np.nan, 70])
    np.testing.assert_array_equal(found["shuffled"], [[41, 43], [44, np.nan], [np.nan, np.nan]])
    assert found["none"] == 50.0 and found["solo"] == 40.0 and "anchors" not in found
    with pytest.raises(ValueError, match="the table has no column R@5; it has kind, n, shuffle, R@1"):
        analysis.audit_arrays(table, k=5)


# --- failures --------------------------------------------------------------------------------------------------


def test_failures_come_worst_first():
    rank = np.array([1, 3, 0, 3, 1, 9, np.nan])
    metres = np.array([0, 50, 10, 80, 0, 30, np.nan])
    assert analysis.sort_failures(rank, metres).tolist() == [6, 2, 5, 3, 1]
    assert analysis.sort_failures(rank, metres, by="metres").tolist() == [6, 3, 1, 5, 2]
    assert analysis.sort_failures([1, 1], [0, 0]).tolist() == []
    assert analysis.sort_failures([2, 2, 2], [5, 5, 5]).tolist() == [0, 1, 2], "ties keep their order"
    with pytest.raises(ValueError, match="by must be"):
        analysis.sort_failures(rank, metres, by="size")


def test_a_confident_wrong_answer_is_suspect():
    similarity = np.array([0.9, 0.8, 0.7, 0.95, 0.5, 0.75, 0.95])
    distance = np.array([1.0, 25.0, 3, 400, 900, 30, 26])
    order, score = analysis.suspicion(similarity, distance)
    assert order.tolist() == [6, 3, 5, 4], "the nearer of two alike comes first"
    np.testing.assert_allclose(score, [1, 1, 1 / 3, 0])
    order, score = analysis.suspicion([0.5, 0.6], [99, np.nan])
    assert order.tolist() == [1, 0] and np.isnan(score).all()


def test_suspicion_by_another_rule_than_a_radius():
    order, score = analysis.suspicion([0.9, 0.8, 0.7], [1, 500, 2], right=[False, True, False])
    assert order.tolist() == [0, 2]
    np.testing.assert_allclose(score, [1, 0])
    with pytest.raises(ValueError, match=r"right must have shape \(2,\), got \(3,\)"):
        analysis.suspicion([0.9, 0.8], [1, 2], right=[True, False, True])


# --- rankings and the ground truth -----------------------------------------------------------------------------


@pytest.fixture
def ranked(tmp_path):
    """Four queries on a street of ten references; query 0 and 2 are answered wrongly, 3 has no positive."""
    names = [f"set/database/d{i}.jpg" for i in range(10)]
    database = Places.build(names, east_m=np.arange(10) * 20.0, north_m=np.zeros(10), utm_zone=["31U"] * 10)
    queries = Places.build(
        [f"set/queries/q{i}.jpg" for i in range(4)],
        east_m=np.array([1.0, 40, 100, 9000]),
        north_m=np.zeros(4),
        utm_zone=["31U"] * 4,
    )
    indices = np.array([[9, 0, 1], [2, 3, 4], [0, 9, 8], [5, 6, 7]])
    distances = np.array([[0.1, 0.3, 0.4], [0.2, 0.5, 0.6], [0.7, 0.8, 0.9], [0.3, 0.4, 0.5]])
    positives = [np.array([0, 1]), np.array([1, 2, 3]), np.array([4, 5, 6]), np.array([], int)]
    path = write_rankings(tmp_path / "r.csv", indices, distances, database, queries, positives)
    return read_rankings(path), database, queries, positives, indices, distances


def test_rankings_as_arrays(ranked):
    table, _, _, _, indices, distances = ranked
    found = analysis.ranking_arrays(table.sample(frac=1, random_state=0), 2)
    np.testing.assert_array_equal(found["reference"], indices[:, :2])
    np.testing.assert_allclose(found["distance"], distances[:, :2])
    assert found["positive"].tolist() == [[False, True], [True, True], [False, False], [False, False]]
    assert found["metres"][0].tolist() == [179.0, 1.0]
    assert analysis.ranking_arrays(table, 50)["reference"].shape == (4, 3), "as many as there are"
    with pytest.raises(
        ValueError, match="the rankings of 4 queries must have ranks 1 to 3 each, got 11 lines"
    ):
        analysis.ranking_arrays(table.drop(index=4), 3)


def test_suspects_are_the_wrong_ones_with_their_nearest_positive(ranked):
    table, database, queries, positives, *_ = ranked
    rows = analysis.suspects(table, database, queries, positives, count=0, k=2)
    assert [row["query"] for row in rows] == [0, 3, 2], "the closest wrong answer first"
    first, without, last = rows
    assert first["score"] == 1 and without["score"] == last["score"] == 0
    assert first["reference"] == [9, 0] and first["positive"] == [False, True]
    assert first["metres"] == [179.0, 1.0] and first["reference_path"][0] == "database/d9.jpg"
    assert (first["truth"], first["truth_path"], first["truth_m"], first["truth_rank"]) == (
        *(0, "database/d0.jpg"),
        *(1.0, 2),
    )
    assert without["truth"] is None and without["n_positives"] == 0 and without["truth_path"] == ""
    assert (last["truth"], last["truth_m"], last["truth_rank"]) == (5, 0.0, 0), "not among those ranked"
    assert len(analysis.suspects(table, database, queries, positives, count=1)) == 1
    with pytest.raises(ValueError, match="the rankings are those of 4 queries, but there are 3 queries"):
        analysis.suspects(table, database, queries[:3], positives)
    with pytest.raises(ValueError, match="name reference 9, but there are 5 references"):
        analysis.suspects(table, database[:5], queries, positives)


def test_the_nearest_positive_looks_the_same_way_where_one_does(ranked):
    table, database, queries, positives, *_ = ranked
    database = database.replace(heading_deg=np.where(np.arange(10) == 0, 180.0, 10.0))
    queries = queries.replace(heading_deg=np.zeros(4))
    assert analysis.suspects(table, database, queries, positives)[0]["truth"] == 1
    away = database.replace(heading_deg=np.full(10, 180.0))
    assert analysis.suspects(table, away, queries, positives)[0]["truth"] == 0, "none does: the nearest"


# --- what the graph costs --------------------------------------------------------------------------------------


def log_of(schedule, refreshes, train=(10.0, 10.0), described=50):
    """A log of a training: per epoch the seconds of its refresh, and the epoch whose graph it used."""
    rows = [{"kind": "step", "step": 1}, {"kind": "epoch", "epoch": 0, "seconds": {"validate": 1.0}}]
    for i, ((seconds, made), steps) in enumerate(zip(refreshes, train, strict=True)):
        graph = {"schedule": schedule, "images": 200, "epoch": i, "refreshed_epoch": made}
        graph |= {"described_images": described, "seconds_describe": 0.8 * refreshes[made][0]}
        rows.append(
            {
                "kind": "epoch",
                "epoch": i + 1,
                "graph": {"mined": graph},
                "seconds": {"refresh": seconds, "train": steps},
            }
        )
    return rows


def test_costs_of_the_graph_online_and_offline():
    online = analysis.graph_costs(log_of("online", [(2.0, 0), (4.0, 1)]))
    assert (online["schedule"], online["images"], online["described"]) == ("online", 200, 50)
    assert online["seconds"] == 3.0 and online["train_seconds"] == 10.0 and online["added_pct"] == 30.0
    assert online["all_images_seconds"] == pytest.approx(0.8 * 6 / 100 * 200)
    static = analysis.graph_costs(log_of("static", [(8.0, 0), (0.1, 0)], described=200))
    assert static["seconds"] == 8.0, "the second epoch made no graph"
    with pytest.raises(ValueError, match="no epoch with a graph"):
        analysis.graph_costs(log_of("online", [], []))


def test_a_table_of_costs_estimates_only_what_was_not_measured():
    paper = published("graph")
    online, static = log_of("online", [(2.0, 0), (4.0, 1)]), log_of("static", [(8.0, 0), (0.1, 0)])
    table = analysis.graph_cost_table({"a": online, "no graph": [{"kind": "step"}]}, paper)
    assert table["kind"].tolist() == ["measured", "estimated", "published", "published"]
    assert table["paid"].tolist() == ["each epoch", "once"] * 2 and table["who"].tolist()[:2] == ["a", "a"]
    assert table["added_pct"].isna().tolist() == [False, True, False, True]
    assert "94.5 on msls-val, context sorted" in table["context"][2]
    table = analysis.graph_cost_table({"a": online, "b": static})
    assert table["kind"].tolist() == ["measured"] * 2 and table["seconds"].tolist() == [3.0, 8.0]
    assert analysis.graph_cost_table({}, paper)["kind"].tolist() == ["published"] * 2
