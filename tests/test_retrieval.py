"""Search, recall, intervals, rankings and PCA against slow float64 versions."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse
from sklearn.decomposition import PCA as SklearnPCA

from sagelib import retrieval
from sagelib.retrieval import (
    PCA,
    Recall,
    minimal_detectable_difference,
    paired_bootstrap,
    read_rankings,
    recall,
    search,
    wilson_interval,
    write_rankings,
)


def brute_force(database, queries, k):
    """Every distance in float64; equal ones in the order of the rows."""
    squared = ((queries[:, None].astype(np.float64) - database[None].astype(np.float64)) ** 2).sum(-1)
    order = np.argsort(squared, axis=1, kind="stable")[:, :k]
    return order, np.sqrt(np.take_along_axis(squared, order, 1))


# ---------------------------------------------------------------------------------------------------- search
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("block_bytes", [2**28, 4 * 24 * 37])  # one block, and blocks of 37 rows
def test_search_is_a_float64_brute_force(dtype, block_bytes, monkeypatch):
    monkeypatch.setattr(retrieval, "_BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng(0)
    database = rng.normal(size=(300, 24)).astype(dtype)
    queries = rng.normal(size=(90, 24)).astype(dtype)
    indices, distances = search(database, queries, 20)
    expected, exact = brute_force(database, queries, 20)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_allclose(distances, exact, rtol=1e-6)


def test_search_of_vectors_far_from_the_origin_is_not_fooled_by_rounding():
    # ||x||² + ||y||² - 2xy in float32 loses all digits of these distances; their order must survive.
    rng = np.random.default_rng(1)
    database = (1000 + 0.01 * rng.normal(size=(400, 64))).astype(np.float32)
    queries = (1000 + 0.01 * rng.normal(size=(30, 64))).astype(np.float32)
    indices, _ = search(database, queries, 5)
    np.testing.assert_array_equal(indices, brute_force(database, queries, 5)[0])


def test_equal_distances_come_in_the_order_of_the_rows(monkeypatch):
    monkeypatch.setattr(retrieval, "_BLOCK_BYTES", 4 * 8 * 50)
    rng = np.random.default_rng(2)
    three = rng.normal(size=(3, 8)).astype(np.float32)
    which = rng.integers(0, 3, 500)
    indices, distances = search(three[which], three, 100)
    for i in range(3):
        np.testing.assert_array_equal(indices[i], np.flatnonzero(which == i)[:100])
    assert (distances == 0).all()


def test_search_deeper_than_the_database_pads():
    indices, distances = search(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), 5)
    assert indices[:, :3].tolist() == [[0, 1, 2], [1, 0, 2], [2, 0, 1]]
    assert (indices[:, 3:] == -1).all() and np.isinf(distances[:, 3:]).all()


def test_search_refuses_what_it_cannot_search():
    good = np.eye(3, dtype=np.float32)
    bad = good.copy()
    bad[1, 1] = np.nan
    with pytest.raises(ValueError, match="reference descriptor in row 1 .* not finite"):
        search(bad, good, 1)
    with pytest.raises(ValueError, match="query descriptor in row 1"):
        search(good, bad, 1)
    with pytest.raises(ValueError, match="queries have 2 dimensions and references 3"):
        search(good, good[:, :2], 1)
    with pytest.raises(ValueError, match=r"shape \(n > 0, D > 0\), got \(0, 3\)"):
        search(good[:0], good, 1)
    with pytest.raises(ValueError, match="k is 0"):
        search(good, good, 0)


def test_search_reads_a_float16_memmap(tmp_path):
    values = np.lib.format.open_memmap(tmp_path / "d.npy", mode="w+", dtype=np.float16, shape=(50, 8))
    values[:] = np.random.default_rng(0).normal(size=(50, 8))
    indices, distances = search(np.load(tmp_path / "d.npy", mmap_mode="r"), values, 1)
    assert (indices[:, 0] == np.arange(50)).all() and (distances == 0).all()


# ---------------------------------------------------------------------------------------------------- recall
def test_recall_by_hand():
    indices = [[4, 2, 0], [1, 3, 2], [0, 1, 2], [3, 4, 1]]
    positives = [[0, 1], [1], [], [2]]
    counted = recall(indices, positives, ks=(1, 2, 3))
    assert counted.hits == {1: 1, 2: 1, 3: 2}
    assert counted.per_query_rank.tolist() == [3, 1, 0, 0]
    # The query without a positive stays in the denominator.
    assert (counted.n_queries, counted.n_without_positive) == (4, 1)
    assert counted.percent(3) == 50.0 and counted.percent(1) == 25.0


def test_recall_of_a_sparse_matrix_equals_that_of_lists():
    rng = np.random.default_rng(3)
    dense = rng.random((40, 60)) < 0.03
    indices = np.argsort(rng.random((40, 60)), axis=1)[:, :20]
    lists = [np.flatnonzero(row) for row in dense]
    a, b = recall(indices, scipy.sparse.csr_matrix(dense)), recall(indices, lists)
    assert a.hits == b.hits and (a.per_query_rank == b.per_query_rank).all()
    for k in (1, 5, 10, 20):
        assert a.hits[k] == sum(bool(set(indices[q, :k]) & set(lists[q])) for q in range(40))


def test_padding_is_never_a_hit():
    assert recall([[0, -1]], [[5]], ks=(1, 2)).hits == {1: 0, 2: 0}


def test_recall_refuses_ranks_that_were_not_searched():
    with pytest.raises(ValueError, match="from 1 to the depth searched, 2"):
        recall([[0, 1]], [[0]], ks=(1, 5))
    with pytest.raises(ValueError, match="2 queries were searched but positives are given for 1"):
        recall([[0], [1]], [[0]], ks=(1,))
    with pytest.raises(ValueError, match="k is 3; this recall was counted at 1, 2"):
        recall([[0, 1]], [[0]], ks=(1, 2)).percent(3)


def test_positives_beyond_everything_found_are_warned_of():
    with pytest.warns(UserWarning, match="all positives are rows from 99 on, and no row above 1 was found"):
        assert recall([[0], [1]], [[99], [99]], ks=(1,)).hits == {1: 0}
    with pytest.raises(ValueError, match="query 0 has the positive 99: references are numbered from 0 to 1"):
        recall([[0], [1]], [[99], [99]], ks=(1,), n_references=2)


def test_wilson_interval():
    # Newcombe (1998), table I: 81 of 263 gives 0.2553 to 0.3662; 0 of 20 gives 0 to 0.1611.
    np.testing.assert_allclose(wilson_interval(81, 263), (25.53, 36.62), atol=0.005)
    np.testing.assert_allclose(wilson_interval(0, 20), (0, 16.11), atol=0.005)
    low, high = wilson_interval(20, 20)
    assert high == 100.0 and low == pytest.approx(100 - 16.11, abs=0.005)
    with pytest.raises(ValueError, match="hits is 3 of n 2"):
        wilson_interval(3, 2)


# ----------------------------------------------------------------------------------------------- differences
def from_hits(hits):
    return Recall.from_ranks(np.asarray(hits, int), ks=(1,))


def test_bootstrap_counts_and_direction():
    a, b = from_hits([1, 1, 0, 0, 0, 0]), from_hits([1, 0, 1, 1, 1, 0])
    difference = paired_bootstrap(a, b, 1)
    assert (difference.gained, difference.lost, difference.n_queries) == (3, 1, 6)
    assert difference.points == pytest.approx(b.percent(1) - a.percent(1))
    assert difference.low <= difference.points <= difference.high
    # McNemar, exact: 4 discordant, 1 on the smaller side: 2 (1 + 4) / 16.
    assert difference.p_exact == pytest.approx(10 / 16)
    same = paired_bootstrap(a, a, 1)
    assert (same.points, same.low, same.high, same.p, same.p_exact) == (0, 0, 0, 1, 1)
    assert paired_bootstrap(a, b, 1, seed=5) == paired_bootstrap(a, b, 1, seed=5)


def test_bootstrap_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = significant = 0
    trials = 400
    for trial in range(trials):
        # b gains on 12 % of queries and loses on 6 %: the truth is +6 points.
        change = rng.choice([1, -1, 0], size=300, p=[0.12, 0.06, 0.82])
        a, b = from_hits(change < 0), from_hits(change > 0)
        d = paired_bootstrap(a, b, 1, seed=trial, draws=500)
        covered += d.low <= 6.0 <= d.high
        null = rng.choice([1, -1, 0], size=300, p=[0.09, 0.09, 0.82])
        significant += (
            paired_bootstrap(from_hits(null < 0), from_hits(null > 0), 1, seed=trial, draws=500).p < 0.05
        )
    assert 0.91 <= covered / trials <= 0.985
    assert 0.015 <= significant / trials <= 0.09


def test_bootstrap_of_groups_is_wider_where_queries_depend_on_each_other():
    rng = np.random.default_rng(0)
    place = np.repeat(np.arange(40), 10)
    change = rng.choice([1, -1, 0], size=40)[place]  # all queries of a place change together
    a, b = from_hits(change < 0), from_hits(change > 0)
    alone, grouped = paired_bootstrap(a, b), paired_bootstrap(a, b, groups=place)
    assert alone.points == grouped.points
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)
    singles = paired_bootstrap(a, b, groups=np.arange(400))
    assert singles.high - singles.low == pytest.approx(alone.high - alone.low, rel=0.1)


def test_bootstrap_refuses_different_queries():
    with pytest.raises(ValueError, match="n_queries is 2 for a and 3 for b"):
        paired_bootstrap(from_hits([1, 0]), from_hits([1, 0, 0]))
    with pytest.raises(ValueError, match="n_without_positive is 0 for a and 1 for b"):
        paired_bootstrap(from_hits([1, 0]), Recall.from_ranks([1, 0], 1))
    with pytest.raises(ValueError, match=r"groups must have shape \(2,\)"):
        paired_bootstrap(from_hits([1, 0]), from_hits([1, 0]), groups=[1])


def test_bootstrap_mean_agrees_with_resampling_by_index():
    rng = np.random.default_rng(1)
    values = rng.choice([-1, -0.6, 0, 0.4, 1], size=200)
    mean, low, high = retrieval.bootstrap_mean(values, draws=20_000)
    by_index = values[rng.integers(0, 200, (20_000, 200))].mean(1)
    np.testing.assert_allclose(
        [mean, low, high], [values.mean(), *np.quantile(by_index, [0.025, 0.975])], atol=0.006
    )


def test_bootstrap_mean_of_groups_is_wider_where_queries_depend_on_each_other():
    place = np.repeat(np.arange(40), 10)
    values = np.random.default_rng(0).choice([-1, -0.4, 0, 1], size=40)[place]
    mean, low, high = retrieval.bootstrap_mean(values)
    of_places = retrieval.bootstrap_mean(values, groups=place)
    assert of_places[0] == mean and of_places[2] - of_places[1] > 2 * (high - low)
    singles = retrieval.bootstrap_mean(values, groups=np.arange(400))
    assert singles[2] - singles[1] == pytest.approx(high - low, rel=0.1)
    with pytest.raises(ValueError, match=r"groups must have shape \(400,\)"):
        retrieval.bootstrap_mean(values, groups=place[:3])


def test_minimal_detectable_difference_has_the_power_it_names():
    n, discordant = 425, 0.2
    points = minimal_detectable_difference(n, discordant)
    d = points / 100
    rng = np.random.default_rng(0)
    gained, lost, _ = rng.multinomial(
        n, [(discordant + d) / 2, (discordant - d) / 2, 1 - discordant], 20_000
    ).T
    found = np.abs(gained - lost) / np.sqrt(gained + lost) > 1.96
    assert found.mean() == pytest.approx(0.8, abs=0.02)
    assert minimal_detectable_difference(4 * n, discordant) < points
    assert np.isnan(minimal_detectable_difference(20, 0.01))
    with pytest.raises(ValueError, match="discordant is 1.5"):
        minimal_detectable_difference(n, 1.5)


# -------------------------------------------------------------------------------------------------- rankings
class Table(SimpleNamespace):
    def __len__(self):
        return len(self.path)


def positions(paths, east, zone):
    return Table(
        path=np.array(paths, object),
        east_m=np.array(east, float),
        north_m=np.zeros(len(paths)),
        utm_zone=np.array(zone),
    )


def test_rankings_file(tmp_path):
    database = positions(
        [tmp_path / "d/a.jpg", tmp_path / "d/b.jpg", tmp_path / "d/c.jpg"], [0, 30, 5], ["10S", "10S", "11S"]
    )
    queries = positions([tmp_path / "q/x.jpg", tmp_path / "q/y.jpg"], [3, 90], ["10S", "10S"])
    indices = np.array([[1, 0, 2], [2, 1, -1]])
    distances = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, np.inf]])
    write_rankings(tmp_path / "r.csv", indices, distances, database, queries, [[0], []], root=tmp_path)
    table = read_rankings(tmp_path / "r.csv")
    assert len(table) == 5  # the padded rank has no line
    first = table[table["query"] == 0]
    assert first["reference_path"].tolist() == ["d/b.jpg", "d/a.jpg", "d/c.jpg"]
    assert first["rank"].tolist() == [1, 2, 3] and first["positive"].tolist() == [0, 1, 0]
    assert first["metres"].tolist()[:2] == [27.0, 3.0] and np.isnan(
        first["metres"].iloc[2]
    )  # zones never mix
    assert first["distance"].tolist() == [0.1, 0.2, 0.3]
    assert first["first_positive_rank"].unique().tolist() == [2]
    second = table[table["query"] == 1]
    assert second["first_positive_rank"].unique().tolist() == [0]
    assert second["n_positives"].unique().tolist() == [0]
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other.csv is no file of rankings: it has no column"):
        read_rankings(tmp_path / "other.csv")


# ------------------------------------------------------------------------------------------------------- PCA
@pytest.mark.parametrize("shape", [(60, 200), (300, 40)])  # fewer samples than dimensions, and more
@pytest.mark.parametrize("whiten", [False, True])
def test_pca_agrees_with_sklearn(shape, whiten):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=shape) * np.linspace(3, 0.1, shape[1]) + rng.normal(size=shape[1])).astype(
        np.float32
    )
    new = (rng.normal(size=(20, shape[1]))).astype(np.float32)
    ours = PCA.fit(x, 10, whiten=whiten)
    theirs = SklearnPCA(10, whiten=whiten, svd_solver="full").fit(x.astype(np.float64))
    expected = theirs.transform(new.astype(np.float64))
    got = ours.transform(new)
    signs = np.sign((expected * got).sum(0))
    np.testing.assert_allclose(got, expected * signs, atol=1e-4)
    np.testing.assert_allclose(ours.variance, theirs.explained_variance_, rtol=1e-6)
    np.testing.assert_allclose(ours.components @ ours.components.T, np.eye(10), atol=1e-8)


def test_pca_neither_whitens_nor_renormalises_unless_asked():
    x = np.random.default_rng(0).normal(size=(100, 30)).astype(np.float32)
    plain = PCA.fit(x, 5).transform(x)
    np.testing.assert_allclose(plain.mean(0), 0, atol=1e-5)
    assert plain.var(0).min() > 1.2
    np.testing.assert_allclose(
        np.linalg.norm(PCA.fit(x, 5, renormalise=True).transform(x), axis=1), 1, rtol=1e-5
    )


def test_pca_refuses_more_than_the_rank_with_the_arithmetic():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 200))
    with pytest.raises(ValueError, match=r"rank at most min\(50 - 1, 200\) = 49, so it must be from 1 to 49"):
        PCA.fit(x, 50)
    assert PCA.fit(x, 49).size == 49
    repeated = np.repeat(rng.normal(size=(10, 200)), 5, axis=0)
    with pytest.raises(ValueError, match="span only 9 dimensions"):
        PCA.fit(repeated, 20)
    with pytest.raises(ValueError, match=r"min\(20 - 1, 200\) = 19"):
        PCA.fit(x, 30, max_samples=20)


def test_pca_files_belong_to_one_model(tmp_path):
    x = np.random.default_rng(0).normal(size=(80, 24)).astype(np.float32)
    pca = PCA.fit(x, 6, whiten=True, renormalise=True, model="abc", data="d1", context="none")
    pca.save(tmp_path / "pca.safetensors")
    back = PCA.load(tmp_path / "pca.safetensors", model="abc", context="none")
    assert (back.whiten, back.renormalise, back.data, back.n_samples) == (True, True, "d1", 80)
    assert back.fingerprint() == pca.fingerprint()
    np.testing.assert_allclose(back.transform(x), pca.transform(x), atol=1e-5)
    with pytest.raises(ValueError, match="descriptors of model abc and does not fit those of model xyz"):
        PCA.load(tmp_path / "pca.safetensors", model="xyz")
    with pytest.raises(ValueError, match="context none and does not fit those of context solo"):
        back.check(context="solo")
    with pytest.raises(ValueError, match=r"shape \(n, 24\)"):
        back.transform(x[:, :10])


def test_masks_are_understood_and_impossible_rows_refused():
    ranked = np.arange(5)[:, None]
    for truth in (
        np.eye(5, dtype=bool),
        list(np.eye(5, dtype=bool)),
        np.eye(5),
        np.eye(5, dtype=int),
        [[i] for i in range(5)],
    ):
        assert retrieval.recall(ranked, truth, [1]).percent(1) == 100
    for truth in ([[-1]] * 5, [[99]] * 5, np.full((5, 5), np.nan), np.eye(5, 6, dtype=bool)):
        with pytest.raises(ValueError, match="positive|mask"):
            retrieval.recall(ranked, truth, [1], n_references=5)


def test_values_that_float32_cannot_square_are_refused():
    with pytest.raises(ValueError, match="row 0 has a largest value of 1e"):
        retrieval.search(np.full((2, 3), 1e20, np.float32), np.ones((1, 3), np.float32), 1)
