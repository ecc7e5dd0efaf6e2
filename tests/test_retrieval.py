"""Search, recall, intervals, rankings and PCA against slow float64 versions."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.decomposition import PCA as SklearnPCA

from sagelib import retrieval
from sagelib.retrieval import (
    PCA,
    Recall,
    open_index,
    paired_bootstrap,
    rankings_table,
    recall,
    search,
    wilson_interval,
)


def brute_force(database, queries, k):
    """Every distance in float64; equal ones in the order of the rows."""
    squared = ((queries[:, None].astype(np.float64) - database[None].astype(np.float64)) ** 2).sum(-1)
    order = np.argsort(squared, axis=1, kind="stable")[:, :k]
    return order, np.sqrt(np.take_along_axis(squared, order, 1))


# ---------------------------------------------------------------------------------------------------- search
@pytest.mark.parametrize("block_bytes", [2**28, 4 * 24 * 37])  # one block, and blocks of 37 rows
@pytest.mark.parametrize(
    ("dtype", "centre", "spread"),
    [
        (np.float16, 0, 1),
        (np.float32, 0, 1),
        # ||x||² + ||y||² - 2xy in float32 loses all digits of these distances; their order must survive.
        (np.float32, 1000, 0.01),
    ],
)
def test_search_is_a_float64_brute_force(dtype, centre, spread, block_bytes, monkeypatch, tmp_path):
    monkeypatch.setattr(retrieval, "_BLOCK_BYTES", block_bytes)
    rng = np.random.default_rng(0)
    database = (centre + spread * rng.normal(size=(300, 24))).astype(dtype)
    queries = (centre + spread * rng.normal(size=(90, 24))).astype(dtype)
    np.save(tmp_path / "d.npy", database)
    indices, distances = search(np.load(tmp_path / "d.npy", mmap_mode="r"), queries, 20)
    expected, exact = brute_force(database, queries, 20)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_allclose(distances, exact, rtol=1e-6)


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
    bad, large = good.copy(), np.full((2, 3), 1e20, np.float32)
    bad[1, 1] = np.nan
    for database, queries, k, sentence in (
        (bad, good, 1, "reference 1 has the value nan"),
        (good, bad, 1, "query 1 has the value nan"),
        (large, good, 1, r"reference 0 has the value 1e\+20, which float32 cannot square"),
        (good, good[:, :2], 1, r"shapes \(N, D\) and \(Q, D\), got \(3, 3\) and \(3, 2\)"),
        (good[:0], good, 1, r"got \(0, 3\) and \(3, 3\)"),
        (good, good, 0, "k must be a whole number of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            search(database, queries, k)


# ----------------------------------------------------------------------------------------------------- index
def clustered(n=3000, queries=60, width=32, dtype=np.float16):
    """Rows around 150 centres, and queries around the same."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(150, width))
    rows, asked = (
        (centres[rng.integers(0, 150, m)] + 0.3 * rng.normal(size=(m, width))) for m in (n, queries)
    )
    return rows.astype(dtype), asked.astype(dtype)


@pytest.mark.parametrize("shard_rows", [2**20, 1300])  # one file, and three
@pytest.mark.parametrize(
    ("spec", "least"), [("Flat", 1.0), ("SQfp16", 1.0), ("HNSW32", 0.95), ("IVF16,PQ8;nprobe=12", 0.8)]
)
def test_an_index_proposes_and_exact_distances_decide(spec, least, shard_rows, monkeypatch, tmp_path):
    monkeypatch.setattr(retrieval, "_SHARD_ROWS", shard_rows)
    monkeypatch.setattr(retrieval, "_BLOCK_BYTES", 4 * 32 * 700)  # several blocks of rows and one of queries
    rows, queries = clustered()
    exact, _ = search(rows, queries, 10)
    index = open_index(spec, rows, tmp_path, {"of": "these"})
    assert index.ntotal == len(rows) and index.count() == -(-len(rows) // shard_rows)
    indices, distances = search(rows, queries, 10, index=index)
    assert np.mean([np.isin(a, b).mean() for a, b in zip(exact, indices, strict=True)]) >= least
    by_hand = np.linalg.norm(rows[indices].astype(np.float64) - queries[:, None].astype(np.float64), axis=2)
    np.testing.assert_allclose(distances, by_hand, rtol=1e-6)
    assert (np.diff(distances, axis=1) >= 0).all()


def test_an_index_is_found_again_and_never_answers_for_others(tmp_path, monkeypatch):
    rows, queries = clustered(600)
    made, build = [], retrieval._build
    monkeypatch.setattr(retrieval, "_build", lambda *given: made.append(1) or build(*given))

    def first(values=rows, spec="IVF4,Flat;nprobe=4", **key):
        return search(values, queries, 1, index=open_index(spec, values, tmp_path, key))[0]

    assert np.array_equal(first(a=1), search(rows, queries, 1)[0]) and np.array_equal(first(a=1), first(a=1))
    assert len(made) == 1
    first(spec="IVF4,Flat;nprobe=1", a=1)
    assert len(made) == 1, "settings of the search build nothing"
    assert np.array_equal(first(rows[::-1].copy(), a=2), search(rows[::-1], queries, 1)[0])
    first(rows[:500], a=2), first(spec="IVF8,Flat", a=1)
    assert len(made) == 4 and not list(tmp_path.glob("*/.tmp*"))


def test_a_killed_index_is_built_anew(tmp_path, monkeypatch):
    rows, queries = clustered(600)
    with monkeypatch.context() as patch:
        patch.setattr(retrieval.runs, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            open_index("IVF4,Flat;nprobe=4", rows, tmp_path, {})
    next(tmp_path.glob("index-*/rows.faiss")).write_bytes(b"half")
    index = open_index("IVF4,Flat;nprobe=4", rows, tmp_path, {})
    assert np.array_equal(search(rows, queries, 5, index=index)[0], search(rows, queries, 5)[0])


def test_results_of_a_search_may_go_to_files(tmp_path):
    rows, queries = clustered(300)
    kinds = {"rows.npy": np.int64, "distances.npy": np.float32}
    out = [
        np.lib.format.open_memmap(tmp_path / n, mode="w+", dtype=k, shape=(60, 4)) for n, k in kinds.items()
    ]
    search(rows, queries, 4, out=out)
    for name, expected in zip(kinds, search(rows, queries, 4), strict=True):
        assert np.array_equal(np.load(tmp_path / name), expected)


def test_few_lists_may_find_fewer_than_asked(tmp_path):
    rows, queries = clustered(200)
    index = open_index("IVF50,Flat;nprobe=1", rows, tmp_path, {})
    indices, distances = search(rows, queries, 100, index=index)
    assert (indices == -1).any() and np.array_equal(indices == -1, np.isinf(distances))


@pytest.mark.parametrize("spec", ["FOO", "IVF4,PQ7", "IVF700,Flat", "IVF4,Flat;nprob=2", "IVF4,Flat;nprobe"])
def test_an_index_that_faiss_cannot_make_is_one_sentence(spec, tmp_path):
    with pytest.raises(ValueError, match=f"no index '{spec}' of 600 rows of 32 numbers: faiss says "):
        open_index(spec, clustered(600)[0], tmp_path, {})


# ---------------------------------------------------------------------------------------------------- recall
def test_recall_by_hand():
    indices = [[4, 2, 0], [1, 3, 2], [0, 1, 2], [3, 4, -1]]
    positives = [[0, 1], [1], [], [2]]
    counted = recall(indices, positives, ks=(1, 2, 3))
    assert counted.hits == {1: 1, 2: 1, 3: 2}
    assert counted.per_query_rank.tolist() == [3, 1, 0, 0]
    # The query without a positive stays in the denominator.
    assert (counted.n_queries, counted.n_without_positive) == (4, 1)
    assert counted.percent(3) == 50.0 and counted.percent(1) == 25.0
    assert str(counted).endswith("(4 queries, 1 without a positive)")


def test_masks_and_lists_count_the_same():
    rng = np.random.default_rng(3)
    mask = rng.random((40, 60)) < 0.03
    indices = np.argsort(rng.random((40, 60)), axis=1)[:, :20]
    lists = [np.flatnonzero(row) for row in mask]
    expected = {k: sum(bool(set(indices[q, :k]) & set(lists[q])) for q in range(40)) for k in (1, 5, 10, 20)}
    for positives in (lists, mask, list(mask), mask.astype(float), mask.astype(int)):
        assert recall(indices, positives, n_references=60).hits == expected


@pytest.mark.parametrize(
    "positives", [[[-1]] * 5, [[99]] * 5, np.full((5, 5), np.nan), np.eye(5, 6, dtype=bool)]
)
@pytest.mark.parametrize("n_references", [5, None])
def test_impossible_positives_are_refused(positives, n_references):
    ranked = np.arange(5)[:, None]
    if n_references is None and np.shape(positives) == (5, 6):
        return  # a sixth reference that nothing found is possible
    with pytest.raises(ValueError, match="positive|mask"):
        recall(ranked, positives, [1], n_references=n_references)


def test_recall_refuses_what_was_not_searched():
    for call, sentence in (
        (lambda: recall([[0, 1]], [[0]], ks=(1, 5)), "from 1 to the depth searched, 2"),
        (lambda: recall([[0], [1]], [[0]], ks=(1,)), "positives are given for 1 queries, but there are 2"),
        (lambda: recall([[0, 1]], [[0]], ks=(1, 2)).percent(3), "k must be one of 1, 2, got 3"),
        (lambda: recall([[0, 7]], [[0]], ks=(1,), n_references=5), "from 0 to 7, but there are 5 references"),
        (
            lambda: recall([[0], [1]], [[99], [0]], ks=(1,)),
            "positive 99, which is no row .* more than 2, give n_references",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()
    assert recall([[0], [1]], [[99], [0]], ks=(1,), n_references=100).hits == {1: 0}


def test_wilson_interval():
    # Newcombe (1998), table I: 81 of 263 gives 0.2553 to 0.3662; 0 of 20 gives 0 to 0.1611.
    np.testing.assert_allclose(wilson_interval(81, 263), (25.53, 36.62), atol=0.005)
    np.testing.assert_allclose(wilson_interval(0, 20), (0, 16.11), atol=0.005)
    low, high = wilson_interval(20, 20)
    assert high == 100.0 and low == pytest.approx(100 - 16.11, abs=0.005)


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
        d = paired_bootstrap(from_hits(change < 0), from_hits(change > 0), 1, seed=trial, draws=500)
        covered += d.low <= 6.0 <= d.high
        null = rng.choice([1, -1, 0], size=300, p=[0.09, 0.09, 0.82])
        d = paired_bootstrap(from_hits(null < 0), from_hits(null > 0), 1, seed=trial, draws=500)
        significant += d.p < 0.05
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
        paired_bootstrap(from_hits([1, 0]), Recall.from_ranks([1, 0], 1, (1,)))
    with pytest.raises(ValueError, match="groups must be 2 labels"):
        paired_bootstrap(from_hits([1, 0]), from_hits([1, 0]), groups=[1])


# -------------------------------------------------------------------------------------------------- rankings
class Table(SimpleNamespace):
    def __len__(self):
        return len(self.path)


def positions(paths, east, zone):
    path, east_m = np.array(paths, object), np.array(east, float)
    return Table(path=path, east_m=east_m, north_m=np.zeros(len(paths)), utm_zone=np.array(zone))


def test_rankings_file(tmp_path):
    database = positions([tmp_path / f"d/{x}.jpg" for x in "abc"], [0, 30, 5], ["10S", "10S", "11S"])
    queries = positions([tmp_path / "q/x.jpg", tmp_path / "q/y.jpg"], [3, 90], ["10S", "10S"])
    indices = np.array([[1, 0, 2], [2, 1, -1]])
    distances = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, np.inf]])
    rankings_table(indices, distances, database, queries, [[0], []]).to_csv(tmp_path / "r.csv", index=False)
    table = pd.read_csv(tmp_path / "r.csv")
    assert len(table) == 5  # the padded rank has no line
    first = table[table["query"] == 0]
    assert first["reference_path"].tolist() == ["d/b.jpg", "d/a.jpg", "d/c.jpg"]
    assert first["rank"].tolist() == [1, 2, 3] and first["positive"].tolist() == [0, 1, 0]
    assert first["metres"].tolist()[:2] == [27.0, 3.0] and np.isnan(first["metres"].iloc[2]), (
        "zones never mix"
    )
    assert first["distance"].tolist() == [0.1, 0.2, 0.3]
    assert first["first_positive_rank"].unique().tolist() == [2]
    second = table[table["query"] == 1]
    assert second["first_positive_rank"].unique().tolist() == [0]
    assert second["n_positives"].unique().tolist() == [0]


# ------------------------------------------------------------------------------------------------------- PCA
@pytest.mark.parametrize("shape", [(60, 200), (300, 40)])  # fewer samples than dimensions, and more
def test_components_are_applied_as_scikit_learn_does(shape):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) * np.linspace(3, 0.1, shape[1]) + rng.normal(size=shape[1])
    x, new = x.astype(np.float32), rng.normal(size=(20, shape[1])).astype(np.float32)
    for whiten in (False, True):
        expected = SklearnPCA(10, whiten=whiten, svd_solver="full").fit(x.astype(np.float64)).transform(new)
        if whiten:
            expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(PCA.fit(x, 10, whiten=whiten).transform(new), expected, atol=1e-5)


def test_pca_refuses_more_than_the_rank_with_the_arithmetic(monkeypatch):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 200))
    with pytest.raises(ValueError, match="50 descriptors of 200 dimensions, must be .* from 1 to 49, got 50"):
        PCA.fit(x, 50)
    assert PCA.fit(x, 49).components.shape == (49, 200)
    with pytest.raises(ValueError, match="which span 9, must be a number from 1 to 9, got 20"):
        PCA.fit(np.repeat(rng.normal(size=(10, 200)), 5, axis=0), 20)
    monkeypatch.setattr(retrieval, "_PCA_SAMPLES", 20)
    with pytest.raises(ValueError, match="size, of 20 descriptors"):
        PCA.fit(x, 30)


def test_pca_files_belong_to_one_model(tmp_path):
    x = np.random.default_rng(0).normal(size=(80, 24)).astype(np.float32)
    fitted = SimpleNamespace(values=x, manifest={"model": "abc", "data": "d1", "context": "none"})
    pca = PCA.fit(fitted, 6, whiten=True)
    pca.save(tmp_path / "pca.safetensors")
    back = PCA.load(tmp_path / "pca.safetensors")
    assert (back.whiten, back.model, back.data, back.context) == (True, "abc", "d1", "none")
    np.testing.assert_allclose(back.transform(fitted), pca.transform(x), rtol=1e-6)
    for change, sentence in (
        ({"model": "xyz"}, "model abc, not xyz"),
        ({"context": "solo"}, "none, not solo"),
    ):
        with pytest.raises(ValueError, match=sentence):
            back.transform(SimpleNamespace(values=x, manifest=fitted.manifest | change))
    with pytest.raises(ValueError, match=r"shape \(n, 24\)"):
        back.transform(x[:, :10])
