"""Evaluation end to end against the slow script, a photograph located, models by name, published numbers."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from slow_recall import slow_recall

from sagelib import describe as describing
from sagelib import runs
from sagelib.describe import Descriptors, GreyPixels, baseline_pixels, choose_anchors, describe
from sagelib.evaluate import (
    Evaluation,
    evaluate,
    locate,
    open_model,
    open_models,
    predict,
    published,
    training_run,
)
from sagelib.images import Preprocess
from sagelib.interact import InteractHead
from sagelib.model import build_model
from sagelib.places import BENCHMARKS, PositiveRule, TestSet, open_set
from sagelib.retrieval import PCA

PLACES = 96
NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"


def write_set(root, name, *, aligned=True, n=PLACES, noise=45, seed=0, spacing_m=1000):
    """A set of n places seen twice, as 14 x 14 pictures of noise around a picture of their own."""
    rng = np.random.default_rng(seed)
    base = rng.normal(128, 40, (n, 14, 14, 3))
    # Each picture has a folder of its own, which sorts it; queries of an unaligned set sort in another order.
    order = np.arange(n) if aligned else np.random.default_rng(seed + 1).permutation(n)
    for part in ("database", "queries"):
        for i in range(n):
            folder = root / name / "images" / "test" / part / f"{order[i] if part == 'queries' else i:04d}"
            folder.mkdir(parents=True)
            pixels = np.clip(base[i] + rng.normal(0, noise, base[i].shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"@{spacing_m * i:09.2f}@0@@@@@@@@@@@@@.png")
    return open_set(root, name)


def write_two_sets(root):
    """Two sets of the same pictures: one whose references and queries sort alike, one where they do not."""
    write_set(root, "aligned")
    write_set(root, "unaligned", aligned=False)
    return root


class Noisy(torch.nn.Module):
    """A random projection of pixels, and an InteractHead of random weights that mixes its context well."""

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
    return write_two_sets(tmp_path_factory.mktemp("data"))


# ------------------------------------------------------------------------------------------------- evaluate
def slow_counts(result, folder):
    values = [
        np.load(result.path / result.descriptors[part] / "rows.npy") for part in ("database", "queries")
    ]
    return slow_recall(*values, folder / "images" / "test")


def test_an_evaluation_is_what_the_slow_script_says(data, tmp_path):
    result = evaluate(Noisy(), open_set(data, "aligned"), tmp_path, progress=False)
    hits, n, without, ranks = slow_counts(result, data / "aligned")
    assert (result.hits, result.n_queries, result.n_without_positive) == (hits, n, without)
    assert 5 < hits[1] < n, "an easy or hopeless set would prove nothing"
    np.testing.assert_array_equal(result.per_query_rank, np.array(ranks) * (np.array(ranks) <= 20))
    assert (result.n_database, result.dim, result.context, result.split) == (PLACES, 128, "none", "test")
    assert result.seconds["embed"] > 0 and result.images_per_s > 0 and result.seconds["head"] == 0
    assert str(result).startswith("random on aligned (test), context none: R@1 ")

    table = result.rankings()
    assert len(table) == PLACES * 20
    first = table.groupby("query")["first_positive_rank"].first()
    np.testing.assert_array_equal(first, result.per_query_rank)
    np.testing.assert_array_equal(table["metres"] <= 25, table["positive"] == 1)
    assert table["query_path"].str.startswith("queries/").all(), "no folder of this machine in the file"

    facts = runs.read_json(result.path / "result.json")
    assert facts["recall"]["R@1"]["percent"] == pytest.approx(100 * hits[1] / n)
    assert facts["recall"]["R@1"]["interval"] == list(result.recall.interval(1))
    assert runs.load_run(result.path).metrics["R@1"] == pytest.approx(100 * hits[1] / n, abs=1e-4)


@pytest.mark.parametrize("name", ["gardens-point", "corridor"])
def test_pixels_on_real_photographs_agree_with_the_slow_script(sage_data, tmp_path, name):
    if not (sage_data / name / "images" / "test").is_dir():
        pytest.skip(f"SAGE_DATA holds no set {name}")
    result = evaluate(baseline_pixels, open_set(sage_data, name), tmp_path, progress=False)
    hits, n, without, _ = slow_counts(result, sage_data / name)
    assert (result.hits, result.n_queries, result.n_without_positive) == (hits, n, without)
    assert 20 < result.recall.percent(1) < 50


def test_the_radius_is_inclusive_and_queries_without_a_positive_are_misses(tmp_path):
    for part, easts in (("database", [0, 1000]), ("queries", [25, 1025.01, 9000])):
        folder = tmp_path / "edge" / "images" / "test" / part
        folder.mkdir(parents=True)
        for i, east in enumerate(easts):
            picture = np.full((14, 14, 3), 60, np.uint8)
            picture[i % 2 * 7 :] = 200  # query 2 looks like reference 0
            Image.fromarray(picture).save(folder / f"@{east:07.2f}@0@@@@@@@@@@@@@.png")
    test_set, options = open_set(tmp_path, "edge"), dict(dtype="float32", progress=False)
    result = evaluate(baseline_pixels, test_set, tmp_path / "runs", **options)
    assert result.hits == {1: 1, 5: 1, 10: 1, 20: 1}  # ranks beyond the two references count them all
    assert (result.n_queries, result.n_without_positive) == (3, 2)
    assert result.per_query_rank.tolist() == [1, 0, 0]
    parts = dict(database=test_set.database, queries=test_set.queries)
    wider = TestSet(name="edge", **parts, rule=PositiveRule(radius_m=26))
    again = evaluate(baseline_pixels, wider, tmp_path / "runs", name="wider", **options)
    assert again.hits[1] == 2 and again.n_without_positive == 1


def test_finished_evaluations_are_found_and_other_settings_refused(data, tmp_path):
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


def test_unfinished_evaluations_do_not_look_finished(data, tmp_path, monkeypatch):
    from sagelib import evaluate as module

    with monkeypatch.context() as patch:
        patch.setattr(
            module.retrieval, "rankings_table", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            evaluate(Noisy(), open_set(data, "aligned"), tmp_path, progress=False)
    assert runs.find_runs(tmp_path, "evaluate") == []
    with pytest.raises(FileNotFoundError, match="no finished evaluation"):
        Evaluation.load(next((tmp_path / "evaluate").iterdir()))
    assert evaluate(Noisy(), open_set(data, "aligned"), tmp_path, progress=False).n_queries == PLACES


def test_sorted_without_a_number_takes_the_authors_batch(data, tmp_path):
    test_set = open_set(data, "aligned")
    assert evaluate(Noisy(), test_set, tmp_path, context="sorted", progress=False).context == "sorted-8"
    sped = TestSet(name="sped", database=test_set.database, queries=test_set.queries, spec=BENCHMARKS["sped"])
    assert evaluate(Noisy(), sped, tmp_path, context="sorted", progress=False).context == "sorted-2"


def test_anchors_and_shuffles(data, tmp_path):
    model, test_set = Noisy(), open_set(data, "aligned")
    base = evaluate(model, test_set, tmp_path, progress=False)
    anchors = choose_anchors(np.load(base.path / base.descriptors["database"] / "rows.npy"), 16)
    a = evaluate(model, test_set, tmp_path, context="anchors", anchors=anchors, progress=False)
    assert a.context == "anchors" and a.seed is None
    zero, one = (
        evaluate(model, test_set, tmp_path, context="shuffled-8", seed=s, progress=False) for s in (0, 1)
    )
    assert (zero.seed, one.seed) == (0, 1) and zero.path != one.path
    assert (zero.per_query_rank != one.per_query_rank).any()
    with pytest.raises(ValueError, match="none are given and the model has none"):
        evaluate(model, test_set, tmp_path, context="anchors", name="x", progress=False)


def test_components_in_evaluation(data, tmp_path):
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


def test_evaluation_by_an_index(data, tmp_path):
    test_set = open_set(data, "aligned")
    exact = evaluate(Noisy(), test_set, tmp_path, progress=False)
    flat = evaluate(Noisy(), test_set, tmp_path, index="Flat", progress=False)
    assert flat.path != exact.path and flat.rankings().equals(exact.rankings())
    few = evaluate(Noisy(), test_set, tmp_path, index="IVF24,Flat;nprobe=1", progress=False)
    assert (few.rankings().groupby("query").size() < 20).any(), "one list of 24 holds fewer than 20"
    assert 0 < few.hits[20] < exact.hits[20]
    reduced = PCA.fit(np.load(exact.path / exact.descriptors["database"] / "rows.npy"), 8)
    assert evaluate(Noisy(), test_set, tmp_path, index="Flat", pca=reduced, progress=False).dim == 8
    with pytest.raises(ValueError, match="no index 'Flut' of 96 rows of 128 numbers"):
        evaluate(Noisy(), test_set, tmp_path, index="Flut", progress=False)


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
    assert result.hits[20] > 20, "the positives are those of the rows that are left"


def test_queries_that_lie_in_the_data_base_are_counted(tmp_path):
    write_set(tmp_path, "s", n=4)
    part = tmp_path / "s" / "images" / "test"
    shutil.copy(min((part / "database").rglob("*.png")), min((part / "queries").rglob("*.png")))
    result = evaluate(Noisy(), open_set(tmp_path, "s"), tmp_path / "runs", progress=False)
    assert result.n_in_database == 1 and "1 of 4 queries lie in the data base" in result.warning


# ---------------------------------------------------------------------------------------------------- locate
@pytest.mark.parametrize("context", ["none", "solo", "anchors"])
def test_locate_a_photograph(data, tmp_path, context):
    database, model = open_set(data, "aligned").database, Noisy()
    anchors = np.random.default_rng(0).normal(size=(3, 128)) if context == "anchors" else None
    options = dict(context=context, anchors=anchors, dtype="float32", progress=False)
    described = describe(model, database, tmp_path, **options)
    found = locate(database.path[17], described, database, model)
    assert len(found) == 5 and found["rank"].tolist() == [1, 2, 3, 4, 5]
    assert found.loc[0, "path"] == database.path[17] and found.loc[0, "row"] == 17
    assert found.loc[0, "distance"] < 1e-3 < found.loc[1, "distance"]
    assert found.loc[0, "east_m"] == 17000.0
    assert locate(database.path[17], described, database, model, index="Flat").equals(found)
    opened = locate(Image.open(database.path[17]), described, database, model, k=500)
    assert len(opened) == PLACES and opened.loc[0, "row"] == 17


def test_locate_refuses_what_does_not_belong_together(data, tmp_path):
    test_set, model = open_set(data, "aligned"), Noisy()
    database, photo = test_set.database, test_set.queries.path[0]
    d = describe(model, database, tmp_path, progress=False)
    batched = describe(model, database, tmp_path, context="sorted-8", progress=False)
    for arguments, options, sentence in (
        ((batched, database, model), {}, "one photograph has no batch, as sorted-8 needs"),
        ((d, database, baseline_pixels), {"preprocess": Preprocess(14)}, "are of model"),
        ((d, database, model), {"preprocess": GreyPixels()}, "are of preprocess"),
        ((d, database[:5], model), {}, "are of places 96, not 5"),
    ):
        with pytest.raises(ValueError, match=sentence):
            locate(photo, *arguments, **options)


# ------------------------------------------------------------------------------------------- models by name
def test_models_are_opened_by_name(tmp_path):
    assert open_model("pixels") is baseline_pixels
    frozen = open_model("gem2x2:tf_efficientnet_lite2:random")
    assert frozen.width == 4 * 680 and not frozen.has_head and not frozen.training
    frozen.save_pretrained(tmp_path / "kept")
    again = open_model(str(tmp_path / "kept"))
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(images), frozen(images))
    names = ("pixels", "gem2x2:tf_efficientnet_lite2:random", str(tmp_path / "kept"))
    assert list(open_models(names)) == ["pixels", "gem2x2:tf_efficientnet_lite2:random", "kept"]
    shutil.copytree(tmp_path / "kept", tmp_path / "other" / "kept")
    with pytest.raises(ValueError, match="two models are called kept: rename"):
        open_models([str(tmp_path / "kept"), str(tmp_path / "other" / "kept")])


def test_a_misspelt_model_is_told_the_runs_found_and_where(tmp_path):
    runs.Run.open(tmp_path, "train", "sage", {})
    with pytest.raises(
        ValueError, match=f"no model 'sgae'.*Runs found: sage; searched: .*{tmp_path / 'train'}"
    ):
        open_model("sgae", iter([tmp_path]))
    assert training_run("sage", [tmp_path]) is None, "it has not finished"


def test_without_a_hub_the_sentence_says_what_to_type(monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("sagelib.backbone.snapshot_download", no_network)
    with pytest.raises(OSError, match="could not be had.*gem:resnet18:FILE.*gem:resnet18:random"):
        open_model("gem2x2:resnet18")


# ------------------------------------------------------------------------------------------------- published
def test_published_numbers():
    recalls = published()
    assert list(recalls.columns) == "method backbone dim context dataset r1 r5 r10 source".split()
    assert len(recalls) == 141 and recalls["r1"].between(0, 100).all()
    assert set(recalls["context"]) == {"none", "sorted"}
    assert set(recalls["dataset"]) - {"sf-xl-small"} <= set(BENCHMARKS)
    paper = recalls[(recalls["method"] == "SAGE") & (recalls["dim"] == 8448) & (recalls["dataset"] == "sped")]
    assert dict(zip(paper["context"], paper["r1"], strict=False))["sorted"] == 98.9
    assert len(published("ablation")) == 20
    cost = published("graph").set_index("schedule")
    assert cost.loc["online", "seconds"] == 372 and cost.loc["static", "seconds"] == 1854
    with pytest.raises(
        ValueError, match="what must be one of recalls, ablation, parameters, graph, got 'speed'"
    ):
        published("speed")


def test_published_counts_are_those_of_the_model():
    counts = published("parameters")
    plain = build_model("vit_base_patch14_dinov2", pretrained=False, aggregator="softp").parameter_report()
    base = counts[counts["backbone"] == "DINOv2 ViT-B"]["trained"].item()
    assert base == plain["trained, head off"][1] == 1_956_550
    large = counts[counts["backbone"] == "DINOv2 ViT-L"].set_index("context")["trained"]
    assert large["sorted"] - large["none"] == 7_880_192, "the head"


def test_what_is_measured_has_the_digits_of_any_machine(tmp_path, monkeypatch):
    """Extraction takes the precision that is fastest here; a recall and a ranking take float32."""
    monkeypatch.setattr(describing, "MEASURED", 1)
    monkeypatch.setattr(describing, "_fastest", lambda *_: ["bfloat16", 1])
    test_set, how = write_set(tmp_path, "few", n=4), {"preprocess": Preprocess(14), "progress": False}
    result = evaluate(baseline_pixels, test_set, tmp_path / "runs", **how)
    predict(baseline_pixels, test_set.database, test_set.queries, tmp_path / "predicted", k=2, **how)
    stores = [result.path / folder for folder in result.descriptors.values()]
    stores += (tmp_path / "predicted" / "descriptors").glob("none-*")
    assert [Descriptors(folder).precision for folder in stores] == ["float32"] * 4
    assert describe(baseline_pixels, test_set.database, tmp_path / "d", **how).precision == "bfloat16"


def test_the_tables_of_shipped_results_are_written(tmp_path, monkeypatch, capsys):
    specification = importlib.util.spec_from_file_location("ship", NOTEBOOKS / "ship.py")
    specification.loader.exec_module(ship := importlib.util.module_from_spec(specification))
    monkeypatch.setattr(ship, "RUNS", tmp_path / "runs")
    models, values = {n: baseline_pixels for n in ("pixels", ship.FROZEN[-1])}, {"validation_size": 14}
    out, sets = tmp_path / "out", [write_set(tmp_path, "few", n=4)]
    ship.measure_and_keep(models, sets, values | {"preprocess": "antialias"}, out, "table")
    assert {f"table.{ending}" for ending in ("csv", "md", "png")} <= {path.name for path in out.iterdir()}
    assert "few: pixels +0.0 points" in capsys.readouterr().out
