"""Evaluation end to end against the slow script, tables, the audit of contexts, one photograph located."""

import importlib.util
import shutil
import socket
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from sagelib import runs
from sagelib.describe import GreyPixels, baseline_pixels, choose_anchors, describe
from sagelib.evaluate import (
    chance_recall,
    compare,
    evaluate,
    evaluate_many,
    load_result,
    load_results,
    locate,
    open_model,
    open_models,
    published,
    published_by_parameters,
    published_by_size,
    published_recalls,
    query_places,
    read_list,
    read_results,
    recall_arrays,
    results_table,
    sets_with_results,
    to_latex,
    to_markdown,
    trained_parameters,
    training_run,
    training_runs,
    write_table,
)
from sagelib.images import Preprocess
from sagelib.interact import InteractHead
from sagelib.model import build_model
from sagelib.places import BENCHMARKS, Places, PositiveRule, TestSet, open_set
from sagelib.retrieval import PCA

spec = importlib.util.spec_from_file_location("slow_recall", Path(__file__).with_name("slow_recall.py"))
slow = importlib.util.module_from_spec(spec)
spec.loader.exec_module(slow)

PLACES = 96


def write_set(root, name, *, aligned=True, n=PLACES, noise=45, seed=0, spacing_m=1000):
    """A set of n places seen twice, as 14 x 14 pictures of noise around a picture of their own."""
    rng = np.random.default_rng(seed)
    base = rng.normal(128, 40, (n, 14, 14, 3))
    # Each picture has a folder of its own, which sorts it; where the set is not aligned, queries sort in another order.
    order = np.arange(n) if aligned else np.random.default_rng(seed + 1).permutation(n)
    for part in ("database", "queries"):
        for i in range(n):
            folder = root / name / "images" / "test" / part / f"{order[i] if part == 'queries' else i:04d}"
            folder.mkdir(parents=True)
            pixels = np.clip(base[i] + rng.normal(0, noise, base[i].shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"@{spacing_m * i:09.2f}@0@@@@@@@@@@@@@.png")
    return open_set(root, name)


class Noisy(torch.nn.Module):
    """A random projection of pixels, and an InteractHead of random weights that mixes its context strongly."""

    preprocess = Preprocess(14)
    name = "random"
    fingerprint = "random 1"
    has_head = True

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.project = torch.nn.Linear(3 * 14 * 14, 128, bias=False)
            self.head = InteractHead(128, segment_width=64, heads=4, ffn=128)
            for layer in self.head.layers:  # values and output twice as large as at initialisation
                layer.self_attn.in_proj_weight.data[128:] *= 2
                layer.self_attn.out_proj.weight.data *= 2
        self.embedded = 0

    def embed(self, images):
        self.embedded += len(images)
        return torch.nn.functional.normalize(self.project(images.flatten(1)), dim=1)

    def interact(self, descriptors, anchors=None):
        return self.head(descriptors, anchors)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_set(root, "aligned")
    write_set(root, "unaligned", aligned=False)
    return root


# ------------------------------------------------------------------------------------------------- evaluate
def test_a_result_is_what_the_slow_script_says(data, tmp_path):
    test_set = open_set(data, "aligned")
    result = evaluate(Noisy(), test_set, tmp_path, progress=False)
    folders = [result.path / result.descriptors[part] for part in ("database", "queries")]
    values = [np.load(f / "rows.npy") for f in folders]
    hits, n, without, ranks = slow.slow_recall(*values, data / "aligned" / "images" / "test")
    assert (result.hits, result.n_queries, result.n_without_positive) == (hits, n, without)
    assert 5 < hits[1] < n, "an easy or hopeless set would prove nothing"
    within = np.array(ranks) * (np.array(ranks) <= 20)
    np.testing.assert_array_equal(result.per_query_rank, within)
    assert (result.n_database, result.dim, result.context, result.split) == (PLACES, 128, "none", "test")
    assert result.seconds["embed"] > 0 and result.images_per_s > 0 and result.seconds["head"] == 0

    table = result.rankings()
    assert len(table) == PLACES * 20
    first = table.groupby("query")["first_positive_rank"].first()
    np.testing.assert_array_equal(first, result.per_query_rank)
    near = table["metres"] <= 25
    np.testing.assert_array_equal(near, table["positive"] == 1)
    assert table["query_path"].str.startswith("queries/").all(), "no folder of this machine in the file"

    facts = runs.read_json(result.path / "result.json")
    assert facts["recall"]["R@1"]["percent"] == pytest.approx(100 * hits[1] / n)
    assert facts["recall"]["R@1"]["interval"] == list(result.recall.interval(1))
    metrics = runs.load_run(result.path).metrics
    assert metrics["R@1"] == pytest.approx(100 * hits[1] / n, abs=1e-4)


def test_the_radius_is_inclusive_and_queries_without_a_positive_are_misses(tmp_path):
    for part, easts in (("database", [0, 1000]), ("queries", [25, 1025.01, 9000])):
        folder = tmp_path / "edge" / "images" / "test" / part
        folder.mkdir(parents=True)
        for i, east in enumerate(easts):
            picture = np.full((14, 14, 3), 60, np.uint8)
            picture[i % 2 * 7 :] = 200  # query 2 looks like reference 0
            Image.fromarray(picture).save(folder / f"@{east:07.2f}@0@@@@@@@@@@@@@.png")
    test_set = open_set(tmp_path, "edge")
    result = evaluate(baseline_pixels, test_set, tmp_path / "runs", dtype="float32", progress=False)
    assert result.hits == {1: 1, 5: 1, 10: 1, 20: 1}  # ranks beyond the two references count them all
    assert (result.n_queries, result.n_without_positive) == (3, 2)
    assert result.per_query_rank.tolist() == [1, 0, 0]
    wider = TestSet(
        name="edge", database=test_set.database, queries=test_set.queries, rule=PositiveRule(radius_m=26)
    )
    again = evaluate(baseline_pixels, wider, tmp_path / "runs", name="wider", dtype="float32", progress=False)
    assert again.hits[1] == 2 and again.n_without_positive == 1


def test_finished_results_are_found_and_other_settings_refused(data, tmp_path):
    model, test_set = Noisy(), open_set(data, "aligned")
    first = evaluate(model, test_set, tmp_path, progress=False)
    assert model.embedded == 2 * PLACES
    again = evaluate(model, test_set, tmp_path, progress=False, batch_size=7)
    assert model.embedded == 2 * PLACES and again.hits == first.hits and again.path == first.path
    under = evaluate(model, test_set, tmp_path, context="sorted-8", progress=False)
    assert model.embedded == 2 * PLACES, "another context needs no second embedding"
    assert under.context == "sorted-8" and under.hits != first.hits and under.seconds["head"] > 0
    other = evaluate(model, test_set, tmp_path, dtype="float32", progress=False)
    assert other.path != first.path, "other settings are another run"
    evaluate(model, test_set, tmp_path, name="mine", progress=False)
    with pytest.raises(runs.RunConflict, match="dtype: 'float16' -> 'float32'"):
        evaluate(model, test_set, tmp_path, name="mine", dtype="float32", progress=False)
    assert [
        r.context
        for r in load_results(tmp_path)
        if r.path not in (other.path, tmp_path / "evaluate" / "mine")
    ] == [
        "none",
        "sorted-8",
    ]
    assert str(first).startswith("random on aligned (test), context none: R@1 ")
    difference = compare(first, under)
    assert difference.points == pytest.approx(under.recall.percent(1) - first.recall.percent(1))


def test_results_on_different_pictures_are_not_compared(data, tmp_path):
    a, b = evaluate_many(Noisy(), data, ["aligned", "unaligned"], tmp_path, progress=False).results
    with pytest.raises(ValueError, match="cannot be compared: dataset is aligned and unaligned"):
        compare(a, b)


def test_unfinished_results_do_not_look_finished(data, tmp_path, monkeypatch):
    from sagelib import evaluate as module

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_rankings", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            evaluate(Noisy(), open_set(data, "aligned"), tmp_path, progress=False)
    assert load_results(tmp_path) == []
    with pytest.raises(FileNotFoundError, match="no finished evaluation: it is evaluate, unfinished"):
        load_result(next((tmp_path / "evaluate").iterdir()))
    assert evaluate(Noisy(), open_set(data, "aligned"), tmp_path, progress=False).n_queries == PLACES


def test_sorted_without_a_number_takes_the_authors_batch(data, tmp_path):
    test_set = open_set(data, "aligned")
    assert evaluate(Noisy(), test_set, tmp_path, context="sorted", progress=False).context == "sorted-8"
    sped = TestSet(name="sped", database=test_set.database, queries=test_set.queries, spec=BENCHMARKS["sped"])
    assert evaluate(Noisy(), sped, tmp_path, context="sorted", progress=False).context == "sorted-2"


def test_anchors_and_shuffles_in_results(data, tmp_path):
    model, test_set = Noisy(), open_set(data, "aligned")
    base = evaluate(model, test_set, tmp_path, progress=False)
    anchors = choose_anchors(np.load(base.path / base.descriptors["database"] / "rows.npy"), 16)
    a = evaluate(model, test_set, tmp_path, context="anchors", anchors=anchors, progress=False)
    assert a.context == "anchors" and a.seed is None
    seeds = [
        evaluate(model, test_set, tmp_path, context="shuffled-8", seed=s, progress=False) for s in (0, 1)
    ]
    assert [r.seed for r in seeds] == [0, 1] and seeds[0].path != seeds[1].path
    assert (seeds[0].per_query_rank != seeds[1].per_query_rank).any()
    with pytest.raises(ValueError, match="none are given and the model has none"):
        evaluate(model, test_set, tmp_path, context="anchors", name="x", progress=False)


def test_pca_in_evaluation(data, tmp_path):
    model, test_set = Noisy(), open_set(data, "aligned")
    trained = describe(model, test_set.database, tmp_path / "train", progress=False)
    full = evaluate(model, test_set, tmp_path, progress=False)
    rotated = evaluate(model, test_set, tmp_path, pca=PCA.fit(trained, PLACES - 1), progress=False)
    assert rotated.dim == PLACES - 1 and abs(rotated.hits[1] - full.hits[1]) <= 3
    small = evaluate(model, test_set, tmp_path, pca=PCA.fit(trained, 4), progress=False)
    assert small.dim == 4 and small.hits[1] < full.hits[1]
    other = PCA.fit(np.random.default_rng(0).normal(size=(200, 128)), 4, model="another")
    with pytest.raises(ValueError, match="fitted on descriptors of model another"):
        evaluate(model, test_set, tmp_path, pca=other, name="other", progress=False)


def test_skipped_pictures_are_counted(tmp_path):
    write_set(tmp_path, "broken", n=30, noise=20)
    first = sorted((tmp_path / "broken/images/test/database").rglob("*.png"))[0]
    first.write_bytes(b"broken")
    test_set = open_set(tmp_path, "broken", check_pictures=False)
    with pytest.raises(ValueError, match="does not decode"):
        evaluate(Noisy(), test_set, tmp_path / "runs", progress=False)
    result = evaluate(Noisy(), test_set, tmp_path / "runs", on_error="skip", name="skipping", progress=False)
    assert (result.n_database, result.n_queries, result.n_without_positive) == (29, 30, 1)
    assert len(result.left_out) == 1 and first.name in result.left_out[0]


def test_evaluate_many_reports_what_is_missing(data, tmp_path):
    done = evaluate_many(Noisy(), data, ["aligned", "sped", "nowhere", "unaligned"], tmp_path, progress=False)
    assert [r.dataset for r in done.results] == ["aligned", "unaligned"]
    assert set(done.missing) == {"sped", "nowhere"} and "get it from" in done.missing["sped"]
    assert "not run: " in str(done)
    everything = evaluate_many(Noisy(), data, None, tmp_path, progress=False)
    assert [r.dataset for r in everything.results] == ["aligned", "unaligned"] and not everything.missing


# -------------------------------------------------------------------------------------------- context audit
def test_one_broken_set_does_not_stop_the_others(tmp_path):
    for name in "abc":
        write_set(tmp_path, name, n=3)
    next((tmp_path / "b" / "images" / "test" / "database").rglob("*.png")).write_bytes(b"")
    done = evaluate_many(Noisy(), tmp_path, ["a", "b", "c"], tmp_path / "runs", progress=False)
    assert [r.dataset for r in done.results] == ["a", "c"]
    assert list(done.missing) == ["b"] and "does not decode" in done.missing["b"]
    alone = evaluate_many(Noisy(), tmp_path, "c", tmp_path / "runs", progress=False)
    assert [r.dataset for r in alone.results] == ["c"] and not alone.missing
    with pytest.raises(ValueError, match="does not decode"):
        evaluate_many(Noisy(), tmp_path, ["b"], tmp_path / "runs", progress=False)


def test_queries_that_lie_in_the_data_base_are_counted(tmp_path):
    write_set(tmp_path, "s", n=4)
    part = tmp_path / "s" / "images" / "test"
    shutil.copy(min((part / "database").rglob("*.png")), min((part / "queries").rglob("*.png")))
    result = evaluate(Noisy(), open_set(tmp_path, "s"), tmp_path / "runs", progress=False)
    assert result.n_in_database == 1 and "1 of 4 queries lie in the data base" in result.warning


def test_places_of_queries_are_labels_or_clusters():
    east = np.array([0.0, 20.0, 40.0, 500.0, 0.0])
    queries = Places.build(
        [f"{i}.jpg" for i in range(5)],
        east_m=east,
        north_m=np.zeros(5),
        utm_zone=np.array(["31N"] * 4 + ["32N"]),
    )
    found = query_places(queries)
    np.testing.assert_array_equal(found, [0, 0, 1, 2, 3])
    labelled = queries.replace(place=np.array([0, 0, 1, 1, 1]), city=np.array(["a", "a", "a", "a", "b"]))
    np.testing.assert_array_equal(query_places(labelled), [0, 0, 1, 1, 2])


# ---------------------------------------------------------------------------------------------------- locate
def test_locate_a_photograph(data, tmp_path):
    test_set, model = open_set(data, "aligned"), Noisy()
    for context in ("none", "solo", "anchors"):
        anchors = np.random.default_rng(0).normal(size=(3, 128)) if context == "anchors" else None
        d = describe(
            model,
            test_set.database,
            tmp_path / "d",
            context=context,
            anchors=anchors,
            dtype="float32",
            progress=False,
        )
        found = locate(test_set.database.path[17], d, test_set.database, model)
        assert len(found) == 5 and found["rank"].tolist() == [1, 2, 3, 4, 5]
        assert found.loc[0, "path"] == test_set.database.path[17] and found.loc[0, "row"] == 17
        assert found.loc[0, "distance"] < 1e-3 < found.loc[1, "distance"]
        assert found.loc[0, "east_m"] == 17000.0
        opened = locate(Image.open(test_set.database.path[17]), d, test_set.database, model, k=500)
        assert len(opened) == PLACES and opened.loc[0, "row"] == 17


def test_locate_refuses_what_does_not_belong_together(data, tmp_path):
    test_set, model = open_set(data, "aligned"), Noisy()
    photo = test_set.queries.path[0]
    d = describe(model, test_set.database, tmp_path / "d", progress=False)
    batched = describe(model, test_set.database, tmp_path / "d", context="sorted-8", progress=False)
    with pytest.raises(ValueError, match="one photograph has no place in context sorted-8"):
        locate(photo, batched, test_set.database, model)
    with pytest.raises(ValueError, match="were made with model"):
        locate(photo, d, test_set.database, baseline_pixels, preprocess=Preprocess(14))
    with pytest.raises(ValueError, match="were made with preprocess"):
        locate(photo, d, test_set.database, model, preprocess=GreyPixels())
    with pytest.raises(ValueError, match="places has 5 pictures, but the descriptors were made of 96"):
        locate(photo, d, test_set.database[:5], model)


# ---------------------------------------------------------------------------------------------------- tables
def test_published_numbers():
    recalls = published()
    assert list(recalls.columns) == "method backbone dim context dataset r1 r5 r10 source".split()
    assert len(recalls) == 141 and recalls["r1"].between(0, 100).all()
    assert set(recalls["context"]) == {"none", "sorted"}
    assert set(recalls["dataset"]) - {"sf-xl-small"} <= set(BENCHMARKS)
    paper = recalls[(recalls["method"] == "SAGE") & (recalls["dim"] == 8448) & (recalls["dataset"] == "sped")]
    assert dict(zip(paper["context"], paper["r1"], strict=False))["sorted"] == 98.9
    assert len(published("ablation")) == 20
    with pytest.raises(ValueError, match="it must be one of 'recalls', 'ablation', 'parameters', 'graph'"):
        published("speed")


def test_published_counts_and_costs():
    counts = published("parameters")
    plain = build_model("vit_base_patch14_dinov2", pretrained=False, aggregator="softp").parameter_report()
    ours = counts[counts["backbone"] == "DINOv2 ViT-B"]["trained"].item()
    assert ours == plain["trained, head off"][1] == 1_956_550
    large = counts[counts["backbone"] == "DINOv2 ViT-L"].set_index("context")["trained"]
    assert large["sorted"] - large["none"] == 7_880_192, "the head"
    points = published_by_parameters("sped")
    assert points["SAGE ViT-L, sorted"] == (10_377_926, 98.9) and len(points) == 3
    assert published_by_parameters("town-small") == {}
    cost = published("graph").set_index("schedule")
    assert cost.loc["online", "seconds"] == 372 and cost.loc["static", "seconds"] == 1854


def test_published_points_for_figures():
    sizes = published_by_size("sped")
    assert sizes["SAGE ViT-L, sorted"] == ([2048, 4096, 8448], [95.6, 97.7, 98.9])
    bars = published_recalls(["town", "sped", "msls-val"])
    assert set(bars) == {"SAGE ViT-L, sorted", "SAGE ViT-L, none", "SAGE ViT-B, none"}
    np.testing.assert_allclose(bars["SAGE ViT-L, sorted"], [np.nan, 98.9, 94.5])
    assert published_recalls(["town"]) == {} and published_by_size("town") == {}
    with pytest.raises(ValueError, match="nothing is published here of a method 'nobody'"):
        published_by_size("sped", method="nobody")


def test_without_a_hub_the_sentence_says_what_to_type(monkeypatch):
    def no_network(*_, **__):
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr("sagelib.backbone.try_to_load_from_cache", lambda *_: None)
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(OSError, match="could not be had.*gem:resnet18:FILE.*gem:resnet18:random"):
        open_model("gem2x2:resnet18")


def test_tables_put_published_numbers_beside_results(data, tmp_path):
    test_set = open_set(data, "aligned")
    sped = TestSet(name="sped", database=test_set.database, queries=test_set.queries, spec=BENCHMARKS["sped"])
    results = [evaluate(Noisy(), s, tmp_path / "runs", progress=False) for s in (test_set, sped)]
    table = results_table(results)
    assert table["dataset"].tolist() == ["aligned"] + ["sped"] * (
        1 + (published()["dataset"] == "sped").sum()
    )
    ours = table.iloc[1]
    assert (ours["method"], ours["context"], ours["queries"]) == ("random", "none", PLACES)
    assert ours["hits@1"] == results[1].hits[1] and ours["R@1 95 %"].count("-") == 1
    assert "in the published evaluations" in ours["source"], "96 pictures are not the 607 of SPED"
    theirs = table.iloc[2:]
    assert theirs["hits@1"].isna().all() and theirs["context"].notna().all()
    assert len(results_table(results, published=False)) == 2
    chance = results_table(results[:1], published=False, chance=True).iloc[0]
    level = [chance_recall(len(test_set.database), test_set.positives(), k) for k in (1, 5, 10)]
    assert chance["method"] == "chance" and np.allclose([chance[f"R@{k}"] for k in (1, 5, 10)], level)
    assert chance[["R@1 95 %", "hits@1", "context"]].isna().all()
    assert len(results_table([], chance=True)) == 0
    absent = results_table(results[:1], missing={"tokyo247": "it is not here"})
    row = absent.iloc[1]
    assert (row["dataset"], row["method"], row["source"]) == ("tokyo247", "not run", "it is not here")
    assert (
        absent["R@1"].dtype == float and np.isnan(row["R@1"]) and (absent["dataset"] == "tokyo247").sum() > 2
    )

    markdown = to_markdown(table)
    assert len(markdown.splitlines()) == len(table) + 2 and "nan" not in markdown.lower().replace(
        "nanjing", ""
    )
    assert f"{results[0].recall.percent(1):.1f}" in markdown
    latex = to_latex(table)
    assert (
        latex.startswith(r"\begin{tabular}{lll")
        and r"95 \%" in latex
        and latex.count(r"\\") == len(table) + 1
    )
    for suffix in ("csv", "md", "tex"):
        assert write_table(table, tmp_path / f"t.{suffix}").is_file()
    back = pd.read_csv(tmp_path / "t.csv")
    np.testing.assert_allclose(back["R@1"], table["R@1"].astype(float))
    with pytest.raises(ValueError, match=r"t.xlsx must end in .csv, .md, .tex"):
        write_table(table, tmp_path / "t.xlsx")


def test_what_latex_and_markdown_would_read_as_commands():
    table = pd.DataFrame(
        {"a_b": ["[x] 5 % & #1 ^~\\\\", "*y <2>|", "two\nlines"], "R@1": [1.0, np.nan, 2.25]}
    )
    lines = to_latex(table).splitlines()
    assert lines[0] == r"\begin{tabular}{lr}" and lines[2] == r"a\_b & R@1 \\"
    assert lines[4].startswith(r"{}[x] 5 \% \& \#1 \textasciicircum{}\textasciitilde{}\textbackslash{}")
    assert lines[5] == r"{}*y \textless{}2\textgreater{}\textbar{} &  \\"
    assert lines[6] == r"two lines & 2.2 \\"
    assert to_markdown(table).splitlines()[3:] == [r"| *y <2>\| |  |", "| two lines | 2.2 |"]


# --------------------------------------------------------------------------------------------- for notebooks
def test_lists_in_parameters():
    assert read_list(" a,b , c", "models") == ["a", "b", "c"]
    assert read_list("256, 64", "pca_dims", int) == [256, 64]
    assert read_list("", "pca_dims", int, least=0) == []
    for text, kind, told in (
        (" , ", str, "models is ' , ': give at least one value"),
        ("a, a", str, "models is 'a, a': it names one of them twice"),
        ("12a", int, "models is '12a': give whole numbers separated by commas"),
    ):
        with pytest.raises(ValueError, match=told):
            read_list(text, "models", kind)


def test_finished_results_are_read_by_what_they_are(data, tmp_path):
    model, names = Noisy(), ["aligned", "unaligned"]
    done = evaluate_many(model, data, names, tmp_path, context="sorted", progress=False).results
    evaluate_many(model, data, ["aligned"], tmp_path, progress=False)
    how = {"context": "sorted", "preprocess": model.preprocess}
    found = read_results(tmp_path, ["unaligned", "aligned", "sped"], ["random", "other"], **how)
    assert [r.path for r in found] == [done[1].path, done[0].path]
    assert not read_results(tmp_path, names, ["random"], context="sorted", preprocess=Preprocess(28))
    recalls, low, high = recall_arrays(found, ["random", "other"], ["aligned", "sped"])
    assert recalls[0, 0] == done[0].recall.percent(1) and np.isnan(recalls).sum() == 3
    assert low[0, 0] < recalls[0, 0] < high[0, 0]
    with pytest.raises(ValueError, match="random on aligned has two results, .*: give one of them"):
        recall_arrays(load_results(tmp_path), ["random"], ["aligned"])
    assert read_results(tmp_path, "aligned", "random", **how)[0].path == done[0].path
    assert sets_with_results(found, ["sped", "aligned"]) == ["aligned"]
    with pytest.raises(ValueError, match="nothing to show: it is not here; nor this"):
        sets_with_results([], ["a", "b"], {"a": "it is not here", "b": "nor this"})
    with pytest.raises(ValueError, match="nothing to show: no finished run on a, b"):
        sets_with_results([], ["a", "b"])


def test_how_much_was_trained(tmp_path):
    assert trained_parameters("pixels") == trained_parameters("gem2x2:tf_efficientnet_lite2") == 0
    roots = [Path(__file__).resolve().parent.parent / "data" / "results"]
    run = training_run("sage", roots)
    assert trained_parameters("sage", roots) == run.metrics["trained_parameters"]
    assert trained_parameters("sage", roots) == sum(
        p.numel() for p in open_model("sage", roots).parameters() if p.requires_grad
    )
    model = build_model("vit_test_patch14", pretrained=False, aggregator="softp", interact=True)
    model.save_pretrained(tmp_path / "kept")
    report = model.parameter_report()
    assert (
        trained_parameters(str(tmp_path / "kept"))
        == report["trained, head off"][0] + report["InteractHead"][0]
    )
    assert training_run("pixels", roots) is None and training_run(str(tmp_path / "kept")) is None
    assert list(training_runs(["pixels", "sage"], roots)) == ["sage"]
    with pytest.raises(ValueError, match="there is no finished training run 'pixels'"):
        training_runs([], roots, ["pixels"])


# ---------------------------------------------------------------------------------------- real photographs
@pytest.mark.parametrize("name", ["gardens-point", "corridor"])
def test_pixels_on_real_photographs_agree_with_the_slow_script(sage_data, tmp_path, name):
    if not (sage_data / name / "images" / "test").is_dir():
        pytest.skip(f"SAGE_DATA holds no set {name}")
    test_set = open_set(sage_data, name)
    result = evaluate(baseline_pixels, test_set, tmp_path, progress=False)
    values = [np.load(result.path / result.descriptors[p] / "rows.npy") for p in ("database", "queries")]
    hits, n, without, _ = slow.slow_recall(*values, sage_data / name / "images" / "test")
    assert (result.hits, result.n_queries, result.n_without_positive) == (hits, n, without)
    assert 20 < result.recall.percent(1) < 50


def test_models_are_opened_by_name(tmp_path):
    assert open_model("pixels") is baseline_pixels
    frozen = open_model("gem2x2:tf_efficientnet_lite2:random")
    assert frozen.width == 4 * 680 and not frozen.has_head and not frozen.training
    frozen.save_pretrained(tmp_path / "kept")
    again = open_model(str(tmp_path / "kept"))
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(images), frozen(images))
    with pytest.raises(ValueError, match="there is no model 'nothing'"):
        open_model("nothing", [tmp_path])
    names = ("pixels", "gem2x2:tf_efficientnet_lite2:random", str(tmp_path / "kept"))
    assert list(open_models(names)) == ["pixels", "gem2x2:tf_efficientnet_lite2:random", "kept"]
    shutil.copytree(tmp_path / "kept", tmp_path / "other" / "kept")
    with pytest.raises(ValueError, match="two models are called kept: rename"):
        open_models([str(tmp_path / "kept"), str(tmp_path / "other" / "kept")])


def test_a_misspelt_model_is_told_the_runs_found_and_where(tmp_path):
    runs.Run.open(tmp_path, "train", "sage", {})
    with pytest.raises(ValueError, match=f"Runs found: sage; searched: .*{tmp_path / 'train'}"):
        open_model("sgae", iter([tmp_path]))


def test_chance_is_counted_over_all_rankings():
    assert np.isclose(chance_recall(4, [[0], [0, 1], []], 2), 100 * (1 / 2 + 5 / 6 + 0) / 3)
