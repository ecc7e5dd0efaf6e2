"""The ablation runner: what a grid may be, what shares a run, what is skipped, what counts as evidence, and
what is kept."""

import dataclasses
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import joblib
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml
from safetensors.torch import save_file

from sagelib import runs
from sagelib.backbone import build_backbone
from sagelib.evaluate import published
from sagelib.images import Preprocess
from sagelib.places import open_set, open_training_set
from sagelib.retrieval import PCA, Recall, paired_bootstrap
from sagelib.train import TrainConfig, build_model_of
from townscape.folder import write_town
from workbench import grids
from workbench.grids import (
    FROZEN,
    Grid,
    GridResults,
    export_grid,
    holm,
    load_grid,
    pooled_difference,
    read_grid,
    run_grid,
    tidy,
)

GRIDS = sorted((Path(__file__).parent.parent / "notebooks" / "params" / "ablations").glob("*.yaml"))
BASE = {
    "backbone": "test_vit",
    "pretrained": False,
    "adapter_blocks": 1,
    "aggregator_options": {"channels": 16, "probes": 8, "token_dim": 32, "hidden": 32},
    "interact": False,
    "interact_options": {"segment_width": 32, "heads": 4, "layers": 1, "ffn": 32},
    "image_size": 64,
    "validation_size": 64,
    "augment": 0,
    "dropout": 0.0,
    "cache_limit_gb": 1.0,
    "places_per_batch": 3,
    "images_per_place": 2,
    "similar_places": 3,
    "min_clique": 2,
    "batches_per_epoch": 2,
    "epochs": 1,
    "patience": None,
    "tensorboard": False,
}
ROWS = {
    "full method": {},
    "no weighting": {"aggregator_options": {"alpha": None}},
    "mean": {"aggregator": "mean"},
    "head, anchors": {"interact": True, "train_context": "anchors", "anchors": 4},
    "head, k-means after": {"interact": True, "train_context": "solo", "anchors_from": "kmeans-3"},
    "16 components": {"pca": 16},
    "second stage": {"interact": True, "train_context": "solo", "context": "none", "rerank": 5},
}


def grid_of(configurations=ROWS, reference="full method", **changes) -> Grid:
    return Grid(
        **{"name": "tiny", "base": BASE, "seeds": (0, 1), **changes},
        reference=reference,
        configurations=configurations,
    )


@pytest.fixture(scope="module")
def town(tmp_path_factory) -> Path:
    return write_town(
        tmp_path_factory.mktemp("town") / "pair",
        train_seeds=(1000, 1001),
        val_seeds=(),
        test_seeds=(1110,),
        images_per_town=48,
        size=56,
        progress=False,
    )


@pytest.fixture(scope="module")
def data(town) -> dict:
    mined = open_training_set(town.parent, town.name)
    return {"mined": mined, "test_sets": [open_set(town.parent, town.name)]}


@pytest.fixture(scope="module")
def done(data, tmp_path_factory) -> tuple[Path, GridResults]:
    """A grid with a row of each kind, run once."""
    root = tmp_path_factory.mktemp("runs")
    return root, run_grid(grid_of(), root, **data, device="cpu", progress=False)


# --- grids


def test_a_configuration_adds_options_to_the_bases_unless_it_names_another_part():
    grid = grid_of({**ROWS, "salad": {"aggregator": "salad", "aggregator_options": {"clusters": 4}}})
    assert grid.training("no weighting", 0).aggregator_options == {
        **BASE["aggregator_options"],
        "alpha": None,
    }
    assert grid.training("mean", 0).aggregator_options == {}
    assert grid.training("salad", 0).aggregator_options == {"clusters": 4}
    assert grid.training("full method", 3).seed == 3
    assert grid.training("full method", 0).augment is None  # 0 in a parameter file is off
    nothing = grid_of({"full method": {}}, base={})
    assert nothing.training("full method", 0) == TrainConfig()


def test_measured_where_a_descriptor_depends_on_its_image_alone():
    grid = grid_of({**ROWS, "batch": {"interact": True}})
    contexts = {name: grid.measurement(name)["context"] for name in grid.configurations}
    assert contexts == {
        "full method": "none",
        "no weighting": "none",
        "mean": "none",
        "head, anchors": "anchors",
        "head, k-means after": "anchors",
        "16 components": "none",
        "second stage": "none",
        "batch": "solo",
    }


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"reference": "the best"}, "reference or published names 'the best'"),
        ({"seeds": (1, 1)}, "seeds must differ"),
        ({"seeds": ()}, "at least one"),
        ({"seeds": (-1,)}, "a seed must be a whole number of at least 0, got -1"),
        ({"name": "a/b"}, "one plain word"),
        ({"published": {"none such": "x"}}, "no configuration of this grid"),
        ({"configurations": {"full method": {"lr": -1}}}, "'full method': lr must be a number above 0"),
        ({"configurations": {"full method": {"prefers": "hard"}}}, "did you mean 'prefer'"),
        ({"configurations": {"full method": {}, "Full-Method": {}}}, "the same folder"),
        (
            {"configurations": {"full method": {"context": "sorted-8", "interact": True}}},
            "context must be one of none, solo, anchors",
        ),
        ({"configurations": {"full method": {"context": "solo"}}}, "needs interact"),
        ({"configurations": {"full method": {"context": "anchors", "interact": True}}}, "give anchors_from"),
        ({"configurations": {"full method": {"interact": True, "anchors_from": "best-4"}}}, "kmeans-m"),
        ({"configurations": {"full method": {"seed": 1}}}, "the grid's seeds"),
        ({"configurations": {"full method": {"rerank": 8}}}, "rerank needs interact"),
        (
            {"configurations": {"full method": {"interact": True, "rerank": 0}}},
            "rerank must be a whole number of at least 1",
        ),
        (
            {"configurations": {"full method": {"interact": True, "rerank": 8, "pca": 4}}},
            "rerank needs .* no pca",
        ),
    ],
)
def test_a_grid_that_cannot_be_is_told_in_a_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        grid_of(**changes)


def test_files(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("dataset: town\nlr: 5e-4\nseed: 7\n")
    path = tmp_path / "g.yaml"
    path.write_text(
        "base: base.yaml\nsettings: {epochs: 2}\nreference: a\nconfigurations: {a: , b: {prefer: farthest}}\n"
    )
    grid = read_grid(path)
    assert (grid.name, grid.base, grid.seeds) == ("g", {"lr": "5e-4", "epochs": 2}, (0, 1, 2))
    assert grid.training("b", 1).lr == 5e-4 and grid.training("b", 1).prefer == "farthest"
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(asdict(grid) | {"seeds": [0, 1, 2]}))
    assert read_grid(again) == grid
    borrower = tmp_path / "borrower.yaml"
    path.write_text(
        "base: base.yaml\nseeds: [4]\nreference: a\npublished: {a: X}\n"
        "configurations: {a: , b: {prefer: farthest}}\n"
    )
    borrower.write_text("title: Here?\nsettings: {lr: 1e-3}\nconfigurations: g.yaml\nreference: b\n")
    borrowed = read_grid(borrower)
    assert (borrowed.name, borrowed.title, borrowed.base) == ("borrower", "Here?", {"lr": "1e-3"})
    assert (borrowed.configurations, borrowed.published) == (read_grid(path).configurations, {"a": "X"})
    assert (borrowed.reference, borrowed.seeds) == ("b", (4,))
    for text, sentence in (
        ("configurations: nowhere.yaml\n", "nowhere.yaml: there is no such file"),
        ("configurations: base.yaml\nreference: a\n", "configurations is missing"),
        ("reference: a\nconfiguration: {a: }\n", "no key 'configuration'"),
        ("configurations: {a: }\n", "reference is missing"),
        ("reference: [a\n", "line 2: this is not YAML"),
        ("base: other.yaml\nreference: a\nconfigurations: {a: }\n", "other.yaml: there is no such file"),
        ("reference: a\nconfigurations: {a: {eta: 1}}\n", "g.yaml: configuration 'a': .*'eta'"),
        ("reference: a\nconfigurations: {a: 3}\n", "must be fields and values"),
    ):
        path.write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            read_grid(path)


def test_the_shipped_grids():
    assert {path.stem for path in GRIDS} == set(
        "components sampler adapter aggregator aggregator-rates k-and-P alpha descriptor-size anchors "
        "graph size components-streets components-dense "
        "sampler-streets sampler-dense aggregator-streets".split()
    )
    theirs = set(published("ablation")["configuration"])
    for path in GRIDS:
        grid = read_grid(path)
        pilot = grid.split == "val"
        assert grid.name == path.stem and grid.title.endswith("?") and len(grid.seeds) >= (1 if pilot else 3)
        assert set(grid.published.values()) <= theirs
        fields = [f.name for f in dataclasses.fields(TrainConfig) if f.name != "seed"]
        reference = grid.training(grid.reference, 0)
        for name in grid.configurations:
            config = grid.training(name, 0)
            differs = [f for f in fields if getattr(config, f) != getattr(reference, f)]
            budget = {
                "epochs",
                "batches_per_epoch",
                "lr",
                "backbone",
                "image_size",
                "validation_size",
                "augment",
            }
            assert config.min_clique >= config.images_per_place, f"{path.stem}: {name} cannot be sampled"
            if pilot or path.stem == "size":  # what they are about
                budget -= {"lr", "image_size", "validation_size"}
            if path.stem.startswith("aggregator"):  # each has the rate that the pilot chose
                budget -= {"lr"}
            assert not budget & set(differs), f"{path.stem}: {name} is not trained on equal terms: {differs}"
    rows = read_grid(next(p for p in GRIDS if p.stem == "components"))
    assert set(rows.published.values()) == theirs, "the paper's own rows are all there"


def test_the_grids_on_streets_have_the_rows_of_those_on_the_town():
    for name in ("components", "aggregator"):
        town, streets = (read_grid(GRIDS[0].parent / f"{name}{place}.yaml") for place in ("", "-streets"))
        for part in ("configurations", "reference", "published"):
            assert getattr(town, part) == getattr(streets, part)
        assert streets.base["crop"] < 1


def test_comparators_have_descriptors_of_one_width():
    grid = read_grid(GRIDS[0].parent / "aggregator.yaml")
    models = {name: build_model_of(grid.training(name, 0)) for name in grid.configurations}
    assert {model.width for model in models.values()} == {2176}
    assert all(grid.training(name, 0).data_init is None for name in grid.configurations), "equal starts"
    # The numbers that the file tells.
    told = {"SoftP": 582, "CFP": 581, "GeM": 1482, "NetVLAD": 48, "SALAD": 1161, "MixVPR": 452, "BoQ": 1584}
    for name, thousands in told.items():
        assert round(sum(p.numel() for p in models[name].aggregator.parameters()) / 1000) == thousands


def test_grids_share_their_full_method():
    """Its training is the same run in every grid that compares with it, and so is done once."""
    shared = {
        str(read_grid(p).training(read_grid(p).reference, 0).identity())
        for p in GRIDS
        if p.stem
        in ("components", "sampler", "alpha", "descriptor-size", "adapter", "graph", "size", "k-and-P")
    }
    assert len(shared) == 1


# --- running


def test_every_configuration_and_seed_is_measured(done):
    root, results = done
    assert len(results.table) == len(ROWS) * 2 + len(FROZEN) and (results.table["run"] != "").all()
    assert results.datasets == ["pair"]
    # One training serves the full method and its principal components, one the two measurements of a head
    # trained alone.
    trainings = runs.find_runs(root, "train")
    assert len(trainings) == (len(ROWS) - 2) * 2
    by_name = results.table.set_index(["configuration", "seed"])
    assert by_name.loc[("16 components", 0), "dim"] == 16
    assert by_name.loc[("full method", 0), "dim"] == 32 + 16 * 8
    fewer = by_name.loc[("full method", 0), "parameters"] - by_name.loc[("no weighting", 0), "parameters"]
    assert fewer == 385  # all that the weighting adds
    counted = by_name["hits@5"] / by_name["queries"] * 100
    np.testing.assert_allclose(by_name["R@5"].astype(float), counted.astype(float))
    assert (by_name["steps"].drop(FROZEN, level=0) == 2).all()


def test_a_second_stage_reorders_the_first_and_no_more(done, data):
    """Among the first 5 the order may change; who is among them, and all behind them, is the first
    stage's."""
    root, results = done
    rows = {"full method": {**ROWS["second stage"], "rerank": None}}
    first = run_grid(
        grid_of(rows, seeds=(0,), name="first"), root, **data, device="cpu", progress=False
    ).ranks["full method", 0, "pair"]
    after = results.ranks["second stage", 0, "pair"]
    np.testing.assert_array_equal((first > 0) & (first <= 5), (after > 0) & (after <= 5))
    np.testing.assert_array_equal(first[first > 5], after[first > 5])
    assert (first != after).any()


def test_principal_components_are_kept_with_what_they_belong_to(done):
    root, results = done
    run = root / results.table.set_index(["configuration", "seed"]).loc[("16 components", 0), "run"]
    pca = PCA.load(run / "pca.safetensors")
    assert pca.components.shape == (16, 160) and pca.model and pca.data and pca.context == "none"
    other = SimpleNamespace(values=np.zeros((1, 160)), manifest={"model": "another", "context": "none"})
    with pytest.raises(ValueError, match="fitted on descriptors of model"):
        pca.transform(other)


def test_a_changed_grid_does_not_show_the_runs_of_the_old_one(done):
    root, _ = done
    changed = {**ROWS, "no weighting": {"aggregator_options": {"alpha": 2.0}}, "16 components": {"pca": 8}}
    table = load_grid(grid_of(changed), root).table
    assert set(table[table["run"] == ""]["configuration"]) == {"no weighting", "16 components"}


def test_tokens_are_shared(done):
    """One store for training images, one for references, one for queries; of each seed, as the random
    backbone differs by seed."""
    root, _ = done
    assert len(list((root / "tokens").iterdir())) == 3 * 2


def test_measured_as_a_full_pass_through_the_model_would_be(done, data, town):
    from sagelib.evaluate import evaluate
    from sagelib.train import load_trained

    root, results = done
    test = data["test_sets"][0]
    for name in ("full method", "head, anchors"):
        run = runs.load_run(root / results.table.set_index(["configuration", "seed"]).loc[(name, 1), "run"])
        model = load_trained(runs.load_run(root / "train" / run.config["training"]), "last")
        direct = evaluate(
            model,
            test,
            root / "direct",
            preprocess=Preprocess(64, "paper"),
            context=run.config["context"],
            model_name=name.replace(", ", "-"),
            dtype="float32",
            device="cpu",
            progress=False,
        )
        # Stored tokens are rounded to float16: a rank may move where two references are equally near.
        same = np.mean(direct.per_query_rank == results.ranks[name, 1, "pair"])
        assert same > 0.9


def test_again_it_does_nothing_and_adds_only_what_is_new(done, data):
    root, results = done
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file() and p.name != "lock"}
    again = run_grid(grid_of(), root, **data, device="cpu", progress=False)
    pd.testing.assert_frame_equal(again.table, results.table)
    assert before == {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file() and p.name != "lock"}
    more = {**ROWS, "hard": {"prefer": "farthest"}}
    unfinished = load_grid(grid_of(more), root)
    unfinished.table["plateau"] = False  # so few steps may end there
    summary = unfinished.summary("pair").set_index("configuration")
    assert summary.loc["hard", "verdict"] == "not run" and np.isnan(summary.loc["hard", "R@1"])
    assert summary.loc["full method", "verdict"] == "the full method"
    assert (unfinished.table[unfinished.table["configuration"] == "hard"]["run"] == "").all()


def test_other_data_under_the_same_name_are_refused_before_any_training(done, data):
    root, _ = done
    test = data["test_sets"][0]
    other = dataclasses.replace(test, queries=test.queries[:10])
    trainings = len(runs.find_runs(root, "train", finished=None))
    with pytest.raises(runs.RunConflict, match="another configuration"):
        run_grid(grid_of(), root, mined=data["mined"], test_sets=[other], device="cpu", progress=False)
    picture = Path(data["mined"].path[0])
    whole = picture.read_bytes()
    picture.write_bytes(whole + b"\0")
    with pytest.raises(runs.RunConflict, match="pictures"):
        run_grid(grid_of(), root, **data, device="cpu", progress=False)
    picture.write_bytes(whole)
    assert len(runs.find_runs(root, "train", finished=None)) == trainings


def test_exchanged_weights_are_another_training(data, tmp_path):
    """The same name of a backbone and of a file, other weights: runs of both must not be averaged."""
    file = tmp_path / "weights.safetensors"
    grid = grid_of({"full method": {}}, base={**BASE, "weights": str(file)}, seeds=(0,))
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            save_file(build_backbone("test_vit", pretrained=False, adapter="none").vit.state_dict(), file)
        root = tmp_path / str(seed)
        run_grid(grid, root, **data, device="cpu", progress=False)
    first, second = (next((tmp_path / str(seed) / "train").iterdir()).name for seed in (0, 1))
    assert first != second


def test_two_processes_give_the_numbers_of_one(data, tmp_path, done):
    two = grid_of({"full method": {}, "no weighting": ROWS["no weighting"]}, seeds=(0,))
    results = run_grid(two, tmp_path, **data, workers=2, device="cpu", progress=False)
    for key, ranks in results.ranks.items():
        np.testing.assert_array_equal(ranks, done[1].ranks[key])


def test_a_cluster_gives_the_numbers_of_one_process(data, tmp_path, done):
    """joblib's backend of dask, with no line of ours: the trainings run on its workers."""
    distributed = pytest.importorskip("distributed")
    two = grid_of({"full method": {}, "no weighting": ROWS["no weighting"]}, seeds=(0,))
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with cluster, distributed.Client(cluster) as client, joblib.parallel_config("dask"):
        results = run_grid(two, tmp_path, **data, device="cpu", progress=False)
        assert sum(client.run(lambda: "torch" in sys.modules).values()) == 2, "both worked"
    for key, ranks in results.ranks.items():
        np.testing.assert_array_equal(ranks, done[1].ranks[key])


def test_a_backend_that_gives_its_results_at_the_end_will_do(data, done):
    class Late(joblib.parallel.SequentialBackend):  # as Ray's
        supports_return_generator = False

    joblib.register_parallel_backend("late", Late)
    shutil.rmtree(next((done[0] / "ablate").glob("*no-weighting*")))  # is measured again
    with joblib.parallel_config("late"):
        results = run_grid(grid_of(), done[0], **data, device="cpu", progress=False)
    for key, ranks in results.ranks.items():
        np.testing.assert_array_equal(ranks, done[1].ranks[key])


def test_one_failure_leaves_the_others_finished(data, tmp_path):
    rows = {"full method": {}, "too large": {"aggregator_options": {"channels": 8}, "pca": 5000}}
    with pytest.raises(RuntimeError, match="1 of 2 trainings failed.*5000") as caught:
        run_grid(grid_of(rows, seeds=(0,)), tmp_path, **data, device="cpu", progress=False)
    assert "\n" not in str(caught.value)
    results = load_grid(grid_of(rows, seeds=(0,)), tmp_path)
    assert (results.table["run"] != "").tolist()[:2] == [True, False]


def alive(process: psutil.Process) -> bool:
    """Whether it still works; one that nobody has collected does not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_killed_at_any_moment_it_goes_on(town, tmp_path, capsys):
    """The command is killed while it trains; the same command then finishes, and finishes nothing twice."""
    path = tmp_path / "g.yaml"
    rows = {"full method": {}, "uniform": {"prefer": "random"}}
    grid = {**asdict(grid_of(rows, seeds=(0,))), "name": "killed", "seeds": [0]}
    grid["base"] = {**BASE, "epochs": 12}
    path.write_text(yaml.safe_dump(grid))
    command = [sys.executable, "-m", "workbench.grids", str(path), "--data", str(town)]
    command += ["--runs", str(tmp_path / "runs"), "--device", "cpu", "--workers", "2"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **quiet)
    started = tmp_path / "runs" / "train"
    while process.poll() is None and len({f.parent for f in started.glob("*/checkpoints/*.pt")}) < 2:
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    # Its workers must not train on, unseen, beside those of the next call.
    while any(map(alive, workers)):
        time.sleep(0.02)
    arguments = [*command[3:-2], "--export", str(tmp_path / "small")]
    assert grids.main(arguments) == 0
    assert "against full method" in capsys.readouterr().out
    small = tmp_path / "small" / "killed"
    assert (load_grid(read_grid(small / "grid.yaml"), small).table["steps"] == 24).all()
    assert grids.main([*arguments, "--only-read"]) == 0
    assert "uniform" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"reference": "x"}, "g.yaml: reference or published names 'x'"),
        ({}, "nowhere"),
        ({"seeds": 3}, "seeds is missing, or no list"),
    ],
)
def test_mistakes_at_the_command_are_one_sentence(changes, sentence, tmp_path, capsys):
    path = tmp_path / "g.yaml"
    path.write_text(yaml.safe_dump({**asdict(grid_of()), "seeds": [0, 1], **changes}))
    assert grids.main([str(path), "--data", "nowhere", "--runs", str(tmp_path)]) == 1
    said = capsys.readouterr().err.strip()
    assert sentence in said and len(said.splitlines()) == 1


# --- evidence


def test_the_difference_is_that_of_the_means_and_its_interval_that_of_the_paired_bootstrap():
    rng = np.random.default_rng(0)
    a = np.where(rng.random(400) < 0.5, 1, 7)
    b = np.where(rng.random(400) < 0.3, 1, a)
    found = pooled_difference(a, b)
    library = paired_bootstrap(Recall.from_ranks(a), Recall.from_ranks(b))
    assert found.points == pytest.approx(library.points)
    assert (found.gained, found.lost) == (library.gained, library.lost)
    assert (found.low, found.high) == pytest.approx((library.low, library.high), abs=0.6)


def test_seeds_and_places_widen_the_interval():
    """Queries that move together, and seeds that disagree, say less than as many independent ones."""
    rng = np.random.default_rng(1)
    steady = np.tile(rng.choice([1, 9], 300), (3, 1))
    better = steady.copy()
    better[:, rng.random(300) < 0.2] = 1

    def width(a, b, **options):
        found = pooled_difference(a, b, **options)
        return found.high - found.low

    once = width(steady[:1], better[:1])
    assert width(steady, better) == pytest.approx(once, rel=0.15)  # repeating a query is no new query
    moody = better.copy()
    moody[0] = steady[0]
    moody[1] = 1
    assert width(steady, moody) > 1.5 * once
    together = np.repeat(np.arange(30), 10)
    whole = np.where((np.repeat(rng.random(30), 10) < 0.2)[None], 1, steady)
    assert width(steady, whole, groups=together) > 1.5 * width(steady, whole)


@pytest.mark.parametrize(
    ("seed_sd", "flips", "place_sd"),
    [(0.03, 0.02, 0.0), (0.0, 0.2, 0.0), (0.0, 0.02, 0.1), (0.02, 0.2, 0.1)],
    ids=["seeds", "single queries", "places", "all"],
)
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_the_interval_covers_the_truth_as_often_as_it_says(seeds, seed_sd, flips, place_sd):
    """50 places of 10 queries, no difference in truth: over many experiments about 95 % of the intervals
    hold 0."""
    rng = np.random.default_rng(2)
    place = np.repeat(np.arange(50), 10)

    def ranks(hardness, percent):
        drawn = np.where(rng.random(500) < flips, rng.random(500), hardness)
        return np.where(drawn < percent, 1, 9)

    inside = 0
    for _ in range(300):
        hardness, of_place = rng.random(500), rng.normal(0, place_sd, 50)[place]
        a = np.stack([ranks(hardness, 0.4) for _ in range(seeds)])
        b = np.stack([ranks(hardness, 0.4 + of_place + rng.normal(0, seed_sd)) for _ in range(seeds)])
        found = pooled_difference(a, b, groups=place, draws=400, seed=int(rng.integers(2**31)))
        inside += found.low <= 0 <= found.high
    assert 0.90 <= inside / 300 <= 0.99  # 0.93 to 0.95 of many more experiments


def test_one_seed_tells_of_places_only():
    rng = np.random.default_rng(3)
    a, b = (np.where(rng.random(300) < p, 1, 9) for p in (0.4, 0.5))
    alone, thrice = (pooled_difference(np.tile(a, (n, 1)), np.tile(b, (n, 1))) for n in (1, 3))
    assert (alone.points, alone.low, alone.high) == (thrice.points, thrice.low, thrice.high)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match="same shape"):
        pooled_difference(np.ones((2, 5)), np.ones((3, 5)))
    with pytest.raises(ValueError, match="and groups"):
        pooled_difference(np.ones((2, 5)), np.ones((2, 5)), groups=np.zeros(4))


def made_up(
    percents: dict, *, queries=200, stuck=frozenset(), changes=None, room=(14.0, 40.0)
) -> GridResults:
    """Results whose recalls are given, with the same hard queries for everybody."""
    changes = changes or {name: {"lr": 1e-3 + i * 1e-4} for i, name in enumerate(percents)}
    changes = {name: values for name, values in changes.items() if name not in FROZEN}
    grid = grid_of(changes, seeds=tuple(range(max(map(len, percents.values())))))
    rows, ranks = [], {}
    for name, values in percents.items():
        for seed, percent in enumerate(values):
            ranks[name, seed, "set"] = np.where(np.arange(queries) < percent * queries / 100, 1, 0)
            rows.append(
                {
                    "configuration": name,
                    "seed": seed,
                    "dataset": "set",
                    "plateau": (name, seed) in stuck,
                    "clique": room[0],
                    "clusters": room[1],
                    "chance@1": 2.5,
                    "run": "r",
                }
            )
    return GridResults(grid, tidy(rows), ranks, {"set": np.arange(queries)})


def test_verdicts():
    results = made_up(
        {"full method": (50, 51, 52), "worse": (30, 31, 32), "same": (50, 51, 52), "better": (70, 71, 72)}
    )
    summary = results.summary("set").set_index("configuration")
    assert summary.loc["chance", "R@1"] == 2.5
    assert summary["verdict"].drop("chance").to_dict() == {
        "full method": "the full method",
        "worse": "worse",
        "same": "no difference shown",
        "better": "better",
    }
    assert summary.loc["worse", "points"] == pytest.approx(-20)
    assert summary.loc["full method", "R@1"] == pytest.approx(51) and summary.loc[
        "full method", "sd"
    ] == pytest.approx(1)
    assert summary.loc["worse", "smallest"] > 0


def test_gains_are_over_the_best_frozen_backbone():
    """It is measured once, and compared with every seed."""
    frozen = dict(zip(FROZEN, [(20,), (30,), (25,)], strict=True))
    results = made_up({"full method": (50, 50, 50), "other": (60, 60, 60), **frozen})
    summary = results.summary("set").set_index("configuration")
    gains = summary["gain"].drop("chance").dropna().round(6).to_dict()
    assert gains.pop("full method") == 20 and gains.pop("other") == 30
    assert sorted(gains.values()) == [-10, -5]  # of the other two frozen rows
    assert set(summary.loc[list(FROZEN), "verdict"]) == {"frozen"}
    assert summary.loc[list(FROZEN), "p_holm"].isna().all(), "they are no part of the comparisons"


def test_a_choice_without_room_is_not_tested():
    rows = {"full method": {}, "random": {"prefer": "random"}, "static": {"schedule": "static"}}
    percents = dict.fromkeys(rows, (50, 51, 52)) | {"random": (10, 11, 12), "static": (80, 81, 82)}
    for room, words in (
        ((14.0, 40.0), {"random": "worse", "static": "better"}),
        ((2.3, 40.0), {"random": "not tested: cliques of 2.3", "static": "better"}),
        ((14.0, 5.0), {"random": "worse", "static": "not tested: a draw takes 4 of 5"}),
    ):
        verdicts = (
            made_up(percents, changes=rows, room=room).summary("set").set_index("configuration")["verdict"]
        )
        assert all(verdicts[name].startswith(text) for name, text in words.items())
    alone = made_up({"full method": (50,), "random": (10,)}, changes=rows | {"static": {}}).summary("set")
    assert alone.set_index("configuration").loc["random", "verdict"].startswith("one seed")


def test_holm_corrects_for_the_number_of_comparisons():
    np.testing.assert_allclose(holm([0.01, 0.04, np.nan, 0.03]), [0.03, 0.06, np.nan, 0.06])
    assert holm([0.6, 0.7]).tolist() == [1, 1] and len(holm([])) == 0


def test_a_run_on_the_plateau_is_flagged_and_no_evidence():
    runs_of = {"full method": (50, 50, 50), "one stuck": (50, 50, 2), "all stuck": (2, 2, 2)}
    stuck = {("one stuck", 2), *(("all stuck", s) for s in range(3))}
    summary = made_up(runs_of, stuck=stuck).summary("set").set_index("configuration").drop("chance")
    assert summary["plateau"].tolist() == [0, 1, 3]
    assert summary["seeds"].tolist() == [3, 2, 0]
    assert summary.loc["one stuck", "R@1"] == 50 and summary.loc["one stuck", "points"] == 0
    assert summary.loc["all stuck", "verdict"].startswith("no evidence")
    assert np.isnan(summary.loc["all stuck", "R@1"])
    percent, flagged = made_up(runs_of, stuck=stuck).recalls("set")
    assert percent[1, 2] == 2 and flagged[1, 2] and flagged.sum() == 4


def test_training_on_the_plateau_is_noticed(data, tmp_path):
    """A rate so small that nothing moves leaves the loss where all similarities are equal or the run is not
    flagged: the manifest decides."""
    rows = {"full method": {}, "still": {"lr": 1e-12}}
    results = run_grid(grid_of(rows, seeds=(0,)), tmp_path, **data, device="cpu", progress=False)
    for row in results.table[~results.table["configuration"].isin(FROZEN)].itertuples():
        run = runs.load_run(tmp_path / row.run)
        plateau = runs.load_run(tmp_path / "train" / run.config["training"]).metrics["plateau"]
        assert row.plateau == plateau["ended_there"]


# --- what is kept


def test_the_small_copy_gives_the_same_tables(done, tmp_path):
    root, results = done
    folder = export_grid(results, root, tmp_path)
    again = load_grid(read_grid(folder / "grid.yaml"), folder)
    assert again.grid == results.grid
    pd.testing.assert_frame_equal(again.summary("pair", 5), results.summary("pair", 5))
    pd.testing.assert_frame_equal(again.table, results.table)
    assert sum(f.stat().st_size for f in folder.rglob("*")) < 400_000
    assert len(runs.find_runs(folder, "trainings")) == (len(ROWS) - 2) * 2
    text = "".join(f.read_text() for f in folder.rglob("*") if f.suffix in (".json", ".csv", ".yaml"))
    assert str(root) not in text and str(tmp_path) not in text


def test_published_rows_stand_beside_and_say_whose_they_are():
    grid = read_grid(next(p for p in GRIDS if p.stem == "components"))
    table = GridResults(grid, tidy([]), {}, {}).published()
    assert {"sped", "msls-val"} <= set(table.columns) and table["note"].str.contains("second-hand").all()
    assert GridResults(grid_of(), tidy([]), {}, {}).published().empty
