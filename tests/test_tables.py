"""What pages show of evaluations: tables beside published numbers, points, what differences are worth."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from make_sets import write_picture
from test_evaluate import PLACES, Noisy, write_set

from sagelib.describe import baseline_pixels
from sagelib.evaluate import compare, open_model, predict, published, training_run
from sagelib.images import Preprocess
from sagelib.model import build_model
from sagelib.places import Places, read_folder, read_unlabelled
from sagelib.retrieval import Recall, paired_bootstrap
from workbench import tables


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder of runs: one model on three sets, one of them called like a benchmark, and what is missing."""
    data, root = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("runs")
    write_set(data, "aligned")
    write_set(data, "unaligned", aligned=False, n=20)
    write_set(data, "sped", aligned=False, n=20)
    names = ["aligned", "unaligned", "sped", "tokyo247"]
    evaluations, missing = tables.evaluate_many(Noisy(), data, names, root, progress=False)
    (under,), _ = tables.evaluate_many(Noisy(), data, "aligned", root, context="sorted", progress=False)
    return root, evaluations, under, missing


def test_what_is_missing_or_broken_does_not_stop_the_others(tmp_path):
    for name in "abc":
        write_set(tmp_path, name, n=3)
    next((tmp_path / "b" / "images" / "test" / "database").rglob("*.png")).write_bytes(b"")
    names, root = ["a", "b", "sped", "nowhere", "c"], tmp_path / "runs"
    evaluations, missing = tables.evaluate_many(Noisy(), tmp_path, names, root, progress=False)
    assert [e.dataset for e in evaluations] == ["a", "c"] and list(missing) == ["b", "sped", "nowhere"]
    assert "does not decode" in missing["b"] and "get it from" in missing["sped"]
    evaluations, missing = tables.evaluate_many(Noisy(), tmp_path, None, root, progress=False)
    assert [e.dataset for e in evaluations] == ["a", "c"] and list(missing) == ["b"]
    evaluations, missing = tables.evaluate_many(Noisy(), tmp_path, "c", root, progress=False)
    assert [e.dataset for e in evaluations] == ["c"] and not missing
    with pytest.raises(ValueError, match="does not decode"):
        tables.evaluate_many(Noisy(), tmp_path, ["b"], root, progress=False)


def test_tables_put_published_numbers_beside_evaluations(measured):
    _, evaluations, _, missing = measured
    table = tables.results_table(evaluations, missing)
    n_published = (published()["dataset"] == "sped").sum()
    ours = table[table["dataset"] == "sped"].iloc[1]
    assert (table["dataset"] == "sped").sum() == 2 + n_published
    assert (ours["method"], ours["context"], ours["queries"]) == ("random", "none", 20)
    assert ours["hits@1"] == evaluations[2].hits[1] and ours["R@1 95 %"].count("-") == 1
    assert "in the published evaluations" in ours["source"], "20 pictures are not the 607 of SPED"
    others = table[table["dataset"] == "sped"].iloc[2:]
    assert others["hits@1"].isna().all() and others["context"].notna().all()
    chance = table.iloc[0]
    level = [tables.chance_recall(PLACES, [1] * PLACES, k) for k in (1, 5, 10)]
    assert chance["method"] == "chance" and np.allclose([chance[f"R@{k}"] for k in (1, 5, 10)], level)
    assert chance[["R@1 95 %", "hits@1", "context"]].isna().all()
    absent = table[table["dataset"] == "tokyo247"]
    assert absent["method"].iloc[0] == "not run" and "get it from" in absent["source"].iloc[0]
    assert len(absent) > 2 and np.isnan(absent["R@1"].iloc[0]) and absent["R@1"].dtype == float
    assert len(tables.results_table(evaluations[:1], beside=False)) == 2
    assert len(tables.results_table([])) == 0
    assert np.isclose(tables.chance_recall(4, [1, 2, 0], 2), 100 * (1 / 2 + 5 / 6 + 0) / 3)


def test_tables_are_written_for_readers_and_for_programs(measured, tmp_path):
    table = tables.results_table(measured[1])
    markdown, latex = tables.to_markdown(table), tables.to_latex(table)
    assert len(markdown.splitlines()) == len(table) + 2
    assert "nan" not in markdown.lower().replace("nanjing", "")
    assert f"{measured[1][0].recall.percent(1):.1f}" in markdown
    assert latex.startswith(r"\begin{tabular}{lllrl") and r"95 \%" in latex
    assert latex.count(r"\\") == len(table) + 1
    for suffix in ("csv", "md", "tex"):
        tables.write_table(table, tmp_path / f"t.{suffix}")
    np.testing.assert_allclose(pd.read_csv(tmp_path / "t.csv")["R@1"], table["R@1"].astype(float))
    assert (tmp_path / "t.tex").read_text() == latex
    with pytest.raises(ValueError, match="the ending must be one of .csv, .md, .tex, got '.xlsx'"):
        tables.write_table(table, tmp_path / "t.xlsx")
    short = tables.for_print(table)
    recall, ends = measured[1][0].recall.percent(1), measured[1][0].recall.interval(1)
    assert short["R@1 [95 %]"][1] == "{:.1f} [{:.1f}, {:.1f}]".format(recall, *ends)
    assert short["R@1 [95 %]"].iloc[-1].count("[") == 0, "published numbers have no interval"
    ours = tables.for_print(tables.results_table(measured[1][:1], beside=False))
    assert ours["method"].tolist() == ["chance", measured[1][0].model], "where nothing is published"
    floating = tables.to_latex(short, "Recall at 1.")
    assert floating.startswith("\\begin{table}[t]\n\\centering\n\\caption{Recall at 1.}")
    # What LaTeX and Markdown would read as commands.
    table = pd.DataFrame({"a_b": ["[x] 5 % & #1", "*y |", "two\nlines"], "R@1": [1.0, np.nan, 2.25]})
    lines = tables.to_latex(table).splitlines()
    assert lines[0] == r"\begin{tabular}{lr}" and lines[2] == r"a\_b & R@1 \\"
    assert lines[4:7] == [r"{}[x] 5 \% \& \#1 & 1.0 \\", r"{}*y | &  \\", r"two lines & 2.2 \\"]
    assert tables.to_markdown(table).splitlines()[3:] == [r"| *y \| |  |", "| two lines | 2.2 |"]


def test_published_points():
    assert tables.published_by_size("sped")["SAGE ViT-L, sorted"] == ([2048, 4096, 8448], [95.6, 97.7, 98.9])
    bars = tables.published_recalls(["town", "sped", "msls-val"])
    assert set(bars) == {"SAGE ViT-L, sorted", "SAGE ViT-L, none", "SAGE ViT-B, none"}
    np.testing.assert_allclose(bars["SAGE ViT-L, sorted"], [np.nan, 98.9, 94.5])
    points = tables.published_by_parameters("sped")
    assert points["SAGE ViT-L, sorted"] == (10_377_926, 98.9) and len(points) == 3
    assert tables.published_recalls(["town"]) == tables.published_by_size("town") == {}
    assert tables.published_by_parameters("town") == {}


def test_how_much_was_trained(tmp_path):
    for spec in ("pixels", "gem2x2:tf_efficientnet_lite2"):
        assert tables.trained_parameters(spec, [], None) == 0
    roots = [Path(__file__).resolve().parent.parent / "data" / "results"]
    model = open_model("sage", roots)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert tables.trained_parameters("sage", roots, model) == trained
    model = build_model("vit_test_patch14", pretrained=False, aggregator="softp", interact=True)
    model.save_pretrained(tmp_path / "kept")
    report, kept = model.parameter_report(), str(tmp_path / "kept")
    trained = report["trained, head off"][0] + report["InteractHead"][0]
    assert tables.trained_parameters(kept, [], model) == trained
    assert training_run("pixels", roots) is None and training_run(kept) is None


def test_finished_evaluations_are_read_and_compared_by_what_they_are(measured):
    root, evaluations, under, _ = measured
    how = {"context": "none", "preprocess": Noisy.preprocess}
    found = tables.read_evaluations(root, ["unaligned", "aligned", "tokyo247"], ["random", "other"], **how)
    assert [e.path for e in found] == [evaluations[1].path, evaluations[0].path]
    (again,) = tables.read_evaluations(root, ["aligned"], ["random"], **how | {"context": "sorted"})
    assert again.path == under.path
    assert not tables.read_evaluations(root, ["aligned"], ["random"], **how | {"preprocess": Preprocess(28)})
    recalls, low, high = tables.recall_arrays(found, ["random", "other"], ["aligned", "sped"])
    assert np.isnan(recalls).sum() == 3
    assert low[0, 0] < recalls[0, 0] == evaluations[0].recall.percent(1) < high[0, 0]
    with pytest.raises(ValueError, match="duplicate"):
        tables.recall_arrays([*found, under], ["random"], ["aligned"])
    a, b, _ = evaluations
    assert compare(a, under).points == pytest.approx(under.recall.percent(1) - a.recall.percent(1))
    with pytest.raises(ValueError, match="cannot be compared: dataset is aligned and unaligned"):
        compare(a, b)


def test_places_of_queries_are_labels_or_clusters():
    east, zones = np.array([0.0, 20.0, 40.0, 500.0, 0.0]), np.array(["31N"] * 4 + ["32N"])
    queries = Places.build([f"{i}.jpg" for i in range(5)], east_m=east, north_m=np.zeros(5), utm_zone=zones)
    np.testing.assert_array_equal(tables.query_places(queries), [0, 0, 1, 2, 3])
    labelled = queries.replace(place=np.array([0, 0, 1, 1, 1]), city=np.array(["a", "a", "a", "a", "b"]))
    np.testing.assert_array_equal(tables.query_places(labelled), [0, 0, 1, 1, 2])


def test_bootstrap_mean_agrees_with_resampling_by_index_and_is_wider_over_groups():
    rng, place = np.random.default_rng(1), np.repeat(np.arange(40), 10)
    values = rng.choice([-1, -0.6, 0, 0.4, 1], size=200)
    by_index = values[rng.integers(0, 200, (20_000, 200))].mean(1)
    expected = [values.mean(), *np.quantile(by_index, [0.025, 0.975])]
    np.testing.assert_allclose(tables.bootstrap_mean(values), expected, atol=0.01)
    values = rng.choice([-1, -0.4, 0, 1], size=40)[place]
    mean, low, high = tables.bootstrap_mean(values)
    of_places = tables.bootstrap_mean(values, groups=place)
    assert of_places[0] == mean and of_places[2] - of_places[1] > 2 * (high - low)
    with pytest.raises(ValueError, match="groups must be 400 labels"):
        tables.bootstrap_mean(values, groups=place[:3])


def test_minimal_detectable_difference_has_the_power_it_names():
    n, discordant = 425, 0.2
    points = tables.minimal_detectable_difference(n, discordant)
    gain, rng = points / 200, np.random.default_rng(0)
    shares = [discordant / 2 + gain, discordant / 2 - gain, 1 - discordant]
    gained, lost, _ = rng.multinomial(n, shares, 20_000).T
    found = np.abs(gained - lost) / np.sqrt(gained + lost) > 1.96
    assert found.mean() == pytest.approx(0.8, abs=0.02)
    assert tables.minimal_detectable_difference(4 * n, discordant) < points
    assert np.isnan(tables.minimal_detectable_difference(20, 0.01))
    with pytest.raises(ValueError, match="discordant must be a number from 0 to 1, got 1.5"):
        tables.minimal_detectable_difference(n, 1.5)


@pytest.mark.parametrize(
    ("difference", "options", "sentence"),
    [
        ((12.4, 8.1, 16.9), {}, "SAGE finds 12.4 points [8.1, 16.9] more than GeM."),
        (tuple(np.array([-2.0, -3.5, -0.5])), {}, "SAGE finds 2.0 points [0.5, 3.5] less than GeM."),
        (
            (-0.02, -0.035, -0.005),
            {"verb": "draws negatives", "unit": "of cosine", "words": ("harder", "easier"), "digits": 3},
            "SAGE draws negatives 0.020 of cosine [0.005, 0.035] easier than GeM.",
        ),
        (
            (1.0, -1.96, 1.96),
            {},
            "No difference between SAGE and GeM is shown: +1.0 points [-2.0, +2.0]; one of less than about "
            "2.8 would mostly go unseen.",
        ),
        ((0.0, 0.0, 0.0), {}, "No difference between SAGE and GeM is shown: +0.0 points [+0.0, +0.0]."),
    ],
)
def test_a_verdict_says_how_much_or_what_would_go_unseen(difference, options, sentence):
    assert tables.verdict(difference, "SAGE", "GeM", **options) == sentence


def test_a_verdict_reads_a_difference_of_recalls():
    a, b = Recall.from_ranks([0] * 40, 0, (1,)), Recall.from_ranks([1] * 30 + [0] * 10, 0, (1,))
    assert tables.verdict(paired_bootstrap(a, b), "SAGE", "GeM").startswith("SAGE finds 75.0 points [6")


# -- Ground truth of any form, and answers without one ---------------------------------------------------
def test_folders_of_queries_have_their_own_rows_and_one_together(tmp_path):
    write_set(tmp_path, "days", n=30)
    part = tmp_path / "days" / "images" / "test"
    (part / "queries").rename(part / "queries_night")
    for folder in sorted((part / "queries_night").iterdir())[:10]:
        (part / "queries_day").mkdir(exist_ok=True)
        folder.rename(part / "queries_day" / folder.name)
    ((whole,), _) = tables.evaluate_many(Noisy(), tmp_path, "days", tmp_path / "runs", progress=False)
    _, day, night = tables.by_folder([whole])
    assert [e.dataset for e in (day, night)] == ["days/queries_day", "days/queries_night"]
    assert (day.n_queries, night.n_queries, whole.n_queries) == (10, 20, 30)
    np.testing.assert_array_equal([*day.per_query_rank, *night.per_query_rank], whole.per_query_rank)
    assert {k: day.hits[k] + night.hits[k] for k in whole.hits} == whole.hits
    assert len(day.rankings()) == 10 * 20 and tables.by_folder([night]) == [night]
    table = tables.results_table([whole])
    assert table["dataset"].tolist() == [d for e in (whole, day, night) for d in 2 * [e.dataset]]
    assert table["queries"].tolist() == [30, 30, 10, 10, 20, 20] and set(table["positives"]) == {"25 m"}


def test_other_ground_truth_is_another_evaluation(tmp_path):
    folder, root = tmp_path / "s", tmp_path / "runs"
    write_set(tmp_path, "s", n=12, noise=1)
    how = {"context": "none", "preprocess": Noisy.preprocess}

    def hits(**options):
        (found,), _ = tables.evaluate_many(Noisy(), tmp_path, "s", root, progress=False, **options)
        return found, found.hits[1]

    by_radius, n = hits()
    assert n == 12
    for shift, positives, expected in ((0, 12, 12), (1, 12, 0), (0, 6, 6)):  # one name, three ground truths
        rows = np.roll(np.arange(12), shift)
        np.save(folder / "positives_test.npy", np.where(np.arange(12) < positives, rows, -1))
        listed, n = hits()
        assert n == expected and listed.n_without_positive == 12 - positives
        assert listed.positives == "positives_test.npy"
    again, _ = hits(positives="25 m")
    assert again.path == by_radius.path
    with pytest.raises(ValueError, match="cannot be compared: data_fingerprint"):
        compare(by_radius, listed)
    for positives, expected in (("25 m", by_radius), ("positives_test.npy", listed)):
        (found,) = tables.read_evaluations(root, ["s"], ["random"], **how, positives=positives)
        assert found.path == expected.path
    table = tables.results_table([by_radius, listed], beside=False)
    assert table["R@10"].tolist()[:2] == [pytest.approx(1000 / 12), pytest.approx(500 / 12)], "chance"


def test_a_threshold_tells_places_that_are_not_in_the_map(tmp_path):
    test_set = write_set(tmp_path, "s", n=40, noise=70)
    truth = np.where(np.arange(40) < 25, np.arange(40), -1)  # the last 15 queries have no positive
    for path in test_set.database.path[25:]:
        Path(path).unlink()
    np.save(tmp_path / "s" / "positives_test.npy", truth)
    ((found,), _) = tables.evaluate_many(Noisy(), tmp_path, "s", tmp_path / "runs", progress=False)
    table, curves = tables.answer_or_refuse([found])
    firsts = found.rankings().query("`rank` == 1")
    distance, right = firsts["distance"].to_numpy(), firsts["reference"].to_numpy() == truth
    slow = []
    for threshold in sorted(set(distance)):
        answered = distance <= threshold
        slow.append((threshold, (answered & right).sum() / answered.sum(), (answered & right).sum() / 25))
    curve = curves["random, s"]
    np.testing.assert_allclose(curve.to_numpy(), slow)
    precision, recalls = np.array(slow).T[1:]
    sure = recalls[precision == 1].max(initial=0)
    area = sum(
        (b - a) * (p + q) / 2
        for a, b, p, q in zip([0, *recalls], recalls, [1, *precision], precision, strict=False)
    )
    row = table.iloc[0]
    assert (row["queries"], row["without positive"]) == (40, 15)
    assert row["R@100P"] == pytest.approx(100 * sure) and row["AUC"] == pytest.approx(area)
    assert 0 < sure < recalls[-1] < 1, "some answers are wrong, and a threshold matters"
    assert right[distance <= row["up to"]].all()


def test_predictions_need_no_ground_truth(tmp_path):
    names = ("@0@0@@@@@k{}@@@@@@@@.jpg", "photo {}.jpg")
    database, queries = (
        read(write_pictures(tmp_path / side, name, n))
        for read, side, name, n in (
            (read_folder, "database", names[0], 4),
            (read_unlabelled, "mine", names[1], 3),
        )
    )
    table = predict(baseline_pixels, database, queries, tmp_path / "runs", k=2, progress=False)
    assert table["reference"].tolist()[::2] == [0, 1, 2] and not {"positive", "n_positives"} & set(table)
    tables.write_predictions(table, tmp_path / "p.csv")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "p.csv"), table, check_dtype=False)
    with pytest.raises(ValueError, match="photo 0.jpg: its key has a space"):
        tables.write_predictions(table, tmp_path / "p.txt")
    table["query_path"] = table["query_path"].str.replace(" ", "_")
    tables.write_predictions(table.iloc[::-1], tmp_path / "p.txt")
    lines = (tmp_path / "p.txt").read_text().splitlines()
    assert sorted(line.split()[:2] for line in lines) == [[f"photo_{i}", f"k{i}"] for i in range(3)]
    assert {len(line.split(" ")) for line in lines} == {3}
    with pytest.raises(ValueError, match="the ending must be one of .csv, .txt, got '.json'"):
        tables.write_predictions(table, tmp_path / "p.json")


def write_pictures(folder, name, n):
    for i in range(n):
        write_picture(folder / name.format(i), i)
    return folder
