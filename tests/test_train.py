"""Training: it learns, can be killed, two processes are one, kept tokens change nothing, mistakes named."""

import dataclasses
import json
import re
from pathlib import Path

import make_sets
import numpy as np
import pytest
import torch
import yaml
from launch import outputs, start_two
from pytorch_metric_learning.losses import MultiSimilarityLoss
from pytorch_metric_learning.miners import MultiSimilarityMiner

from sagelib import runs
from sagelib import train as training
from sagelib.describe import TokenStore, open_tokens
from sagelib.images import Preprocess, TrainTransform, Views, loader
from sagelib.model import SAGE
from sagelib.places import Places, open_set, open_training_set, read_gsv_cities, read_msls
from sagelib.sampler import SamplerConfig
from sagelib.train import (
    TrainConfig,
    build_model_of,
    load_trained,
    open_run,
    plateau_value,
    rate_factor,
    train,
)
from townscape.folder import write_town

TINY = {
    "backbone": "vit_test_patch14",
    "pretrained": False,
    "aggregator_options": {"channels": 16, "probes": 8, "token_dim": 32, "hidden": 32},
    "interact": False,
    "image_size": 56,
    "validation_size": 56,
    "augment": None,
    "places_per_batch": 3,
    "images_per_place": 2,
    "similar_places": 3,
    "min_clique": 2,
    "batches_per_epoch": 4,
    "epochs": 2,
    "patience": None,
    "log_every": 2,
    "checkpoint_every": 3,
    "tensorboard": False,
}
HEAD = {"interact": True, "interact_options": {"segment_width": 32, "heads": 4, "layers": 1, "ffn": 32}}
STEADY = {"dropout": 0.0, "schedule": "none"}
QUIET = {"device": "cpu", "progress": False}


def tiny(**changes) -> TrainConfig:
    return TrainConfig(**{**TINY, **changes})


@pytest.fixture(scope="module")
def town(tmp_path_factory) -> Path:
    """Two towns to train in, one to validate in: large enough for a few places a batch."""
    seeds = {"train_seeds": (1000, 1001), "val_seeds": (1100,), "test_seeds": ()}
    folder = tmp_path_factory.mktemp("town") / "pair"
    return write_town(folder, **seeds, images_per_town=64, size=56, progress=False)


@pytest.fixture(scope="module")
def mined(town) -> Places:
    return open_training_set(town.parent, town.name)


@pytest.fixture(scope="module")
def labelled(mined) -> Places:
    return mined.with_clusters(25.0)


@pytest.fixture(scope="module")
def validation(town):
    return open_set(town.parent, town.name, split="val")


def run_once(root, config, name="run", **data):
    run = open_run(root, name, config, **data, device="cpu")
    return train(config, run, **data, **QUIET)


def lines(run, kind: str) -> list[dict]:
    return [line for line in run.read_log() if line["kind"] == kind]


def losses_of(run) -> np.ndarray:
    return np.array([line["loss"] for line in lines(run, "step")])


def assert_same(run, other) -> None:
    """The same weights to the last bit, and the same log without what a clock or a speed says."""
    weights, others = (load_trained(r, "last").trainable_state_dict() for r in (run, other))
    assert weights.keys() == others.keys()
    for name in weights:
        np.testing.assert_array_equal(weights[name].numpy(), others[name].numpy(), err_msg=name)

    def clean(value):
        if not isinstance(value, dict):
            return value
        timed = ("wall_time_s", "images_per_s")
        return {k: clean(v) for k, v in value.items() if "seconds" not in k and k not in timed}

    # As text, in which a NaN equals itself.
    assert [json.dumps(clean(line)) for line in run.read_log()] == [
        json.dumps(clean(line)) for line in other.read_log()
    ]


# -- configuration, plateau, schedule ----------------------------------------------------


def test_configurations_from_yaml():
    config = TrainConfig(lr=1e-3, aggregator_options={"probes": 8}, patience=None, precision="bfloat16")
    assert TrainConfig.from_mapping(yaml.safe_load(yaml.safe_dump(dataclasses.asdict(config)))) == config
    assert TrainConfig.from_mapping({"lr": "9e-4", "tau": "-2e3"}) == TrainConfig(lr=9e-4, tau=-2e3)
    assert {name: getattr(TrainConfig(), name) for name in vars(SamplerConfig())} == vars(SamplerConfig())
    # A notebook's parameter cannot say None: 0 does where it is meaningless.
    off = {"augment": 0, "data_init": 0, "max_heading_deg": 0.0, "patience": 0, "weights": ""}
    config = TrainConfig.from_mapping({**off, "warmup_steps": 0, "dropout": 0.0})
    assert all(getattr(config, name) is None for name in off) and config.warmup_steps == config.dropout == 0
    for path in (Path(__file__).resolve().parent.parent / "notebooks" / "params").glob("*.yaml"):
        values = yaml.safe_load(path.read_text())
        TrainConfig.from_mapping({k: v for k, v in values.items() if k in TrainConfig.field_names()})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 0.0}, "lr must be a number above 0, got 0.0"),
        ({"lr": "fast"}, "lr must be a number above 0, got 'fast'"),
        ({"lr": None}, "lr must be a number above 0, got None"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
        ({"epochs": True}, "epochs must be a whole number of at least 1, got True"),
        ({"places_per_batch": 1}, "places_per_batch must be a whole number of at least 2"),
        ({"final_lr": 1.5}, "final_lr must be a number from 0 to 1, got 1.5"),
        ({"train_context": "sorted"}, "train_context must be one of batch, half, solo, anchors"),
        ({"crop": 1.5}, "crop must be a number above 0 and at most 1, or None, got 1.5"),
        ({"precision": "int8"}, "precision must be one of"),
        ({"preprocess": "foo"}, "preprocess must be one of paper, antialias, autocontrast, got 'foo'"),
        ({"graph_context": "anchors"}, "'anchors' needs train_context 'anchors'"),
        ({"tensorboard": "maybe"}, "tensorboard must be one of True, False, got 'maybe'"),
        ({"interact_options": 5}, "interact_options must be a mapping of names to values, got 5"),
        ({"crop": 0.3, "views": 3}, "views = 3 needs cache_limit_gb"),
        ({"learning_rates": 1}, "'learning_rates'"),
        ({"weight_decays": 1}, "did you mean 'weight_decay'"),
    ],
)
def test_values_out_of_range_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig.from_mapping(changes)


@pytest.mark.parametrize(("places", "images"), [(24, 4), (3, 2), (5, 7)])
def test_plateau_is_the_loss_of_unrelated_descriptors(places, images):
    """Orthogonal descriptors have similarity 0 everywhere: the library's own loss says what that costs."""
    descriptors = torch.eye(places * images, dtype=torch.float64)
    labels = torch.arange(places).repeat_interleave(images)
    pairs = MultiSimilarityMiner(epsilon=0.1)(descriptors, labels)
    loss = MultiSimilarityLoss(alpha=1, beta=50, base=0)(descriptors, labels, pairs)
    assert plateau_value(places, images) == pytest.approx(float(loss), abs=1e-9)


def test_learning_rate():
    factors = [rate_factor(TrainConfig(), i, 101) for i in range(101)]
    assert [factors[i] for i in (0, 25, 50, 100)] == pytest.approx([1, 0.8, 0.6, 0.2])
    warm = TrainConfig(final_lr=1.0, warmup_steps=4)
    assert [rate_factor(warm, i, 10) for i in range(5)] == [0.25, 0.5, 0.75, 1, 1]


# -- it learns ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(tmp_path_factory, mined, validation):
    root = tmp_path_factory.mktemp("learned")
    model = {"backbone": "tf_efficientnet_lite2", "pretrained": True, "image_size": 64, "validation_size": 64}
    steps = {"epochs": 4, "batches_per_epoch": 10, "dropout": 0.0, "data_init": 32, "lr": 2e-3}
    config = tiny(**model, **steps, cache_limit_gb=1.0, tensorboard=True)
    state = torch.get_rng_state()
    result = run_once(root, config, mined=mined, validation=validation)
    assert torch.equal(state, torch.get_rng_state()), "training moved the caller's generator"
    return root, config, result


def test_the_loss_falls_and_leaves_the_plateau(learned):
    result = learned[2]
    losses = [line["loss"] for line in lines(result.run, "epoch") if line["epoch"]]
    assert losses[-1] < 0.85 * losses[0]
    plateau = result.metrics["plateau"]
    assert plateau["value"] == pytest.approx(plateau_value(3, 2))
    assert not plateau["ended_there"] and plateau["gap"] > 0.1 and plateau["sentence"] == ""


def test_a_run_tells_what_happened(learned, validation):
    n = len(validation.queries)
    _, config, result = learned
    steps, epochs = lines(result.run, "step"), lines(result.run, "epoch")
    assert [line["step"] for line in steps] == list(range(2, 41, 2))
    assert [line["epoch"] for line in epochs] == [0, 1, 2, 3, 4]
    assert all(0 <= line["live"] <= 1 and line["images_per_s"] > 0 for line in steps)
    assert steps[0]["lr"] == pytest.approx(config.lr * rate_factor(config, 1, 40))
    for line in epochs:
        assert line["context"] == "none" and line["queries"] == n
        assert line["recall"]["1"] == pytest.approx(100 * line["hits"]["1"] / n)
    changed = [line["graph"]["mined"] for line in epochs[2:]]
    assert all(g["edges_gained"] + g["edges_kept"] <= g["edges"] for g in changed)
    best = max((line["hits"]["1"], line["hits"]["5"], line["hits"]["10"]) for line in epochs)
    chosen = next(line for line in epochs if line["epoch"] == result.metrics["best"]["epoch"])
    assert (chosen["hits"]["1"], chosen["hits"]["5"], chosen["hits"]["10"]) == best
    manifest = runs.read_json(result.run.dir / "manifest.json")
    assert (manifest["threads"], manifest["processes"]) == (torch.get_num_threads(), 1)
    assert list((result.run.dir / "tensorboard").glob("events.*"))


def test_the_best_weights_come_back_with_their_preprocessing(learned):
    result, again = learned[2], load_trained(learned[2].run)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(again(images), result.model(images), rtol=0, atol=0)
    assert again.preprocessing == result.model.preprocessing == {"image_size": 64, "mode": "paper"}
    # Of a run's configuration only the model is read: fields may have come and gone since.
    result.run.manifest["config"] |= {"stages": None, "prefer": "affine"}
    assert load_trained(result.run).width == again.width


def test_a_finished_run_is_found_and_another_configuration_refused(learned, mined, validation):
    root, config, result = learned
    before = (result.run.dir / "log.jsonl").read_bytes()
    data = {"mined": mined, "validation": validation}
    again = run_once(root, config, **data)
    assert again.metrics == result.metrics and (result.run.dir / "log.jsonl").read_bytes() == before
    with pytest.raises(runs.RunConflict, match="lr: 0.002 -> 0.001"):
        open_run(root, "run", dataclasses.replace(config, lr=1e-3), **data)
    with pytest.raises(runs.RunConflict, match="data_fingerprint"):
        open_run(root, "run", config, mined=mined[:-1], validation=validation)
    picture = Path(validation.queries.path[0])
    whole = picture.read_bytes()
    picture.write_bytes(whole + b"\0")
    with pytest.raises(runs.RunConflict, match="pictures"):
        open_run(root, "run", config, **data)
    del (old := runs.load_run(root / "train" / "run")).manifest["pictures"]  # one that did not know its own
    old.save_manifest()
    assert open_run(root, "run", config, **data).finished
    picture.write_bytes(whole)
    # How the work is done is no part of what a run is.
    assert open_run(root, "run", dataclasses.replace(config, log_every=7), **data).finished


class Unmoved(SAGE):
    """Descriptors that are unrelated whatever the images show: the loss can only rest on its plateau."""

    def embed_tokens(self, tokens, grid):
        noise = torch.randn(len(tokens), self.width)
        return torch.nn.functional.normalize(noise, dim=-1) + 0.0 * super().embed_tokens(tokens, grid)


def test_a_run_that_ends_on_the_plateau_says_so(tmp_path, mined, capsys):
    config = tiny(aggregator_options={"channels": 64, "probes": 32, "token_dim": 32, "hidden": 16})
    options = {"interact": False, "aggregator_options": config.aggregator_options}
    model = Unmoved("vit_test_patch14", pretrained=False, **options)
    run = open_run(tmp_path, "rest", config, mined=mined, device="cpu")
    plateau = train(config, run, mined=mined, model=model, device="cpu").metrics["plateau"]
    assert plateau["ended_there"] and plateau["loss"] == pytest.approx(plateau["value"], rel=0.05)
    assert "nothing was learned" in plateau["sentence"] and plateau["sentence"] in capsys.readouterr().out


def test_early_stopping(tmp_path, mined, validation):
    config = tiny(epochs=9, batches_per_epoch=1, lr=1e-12, patience=2)
    metrics = run_once(tmp_path, config, mined=mined, validation=validation).metrics
    assert metrics["stopped_early"] and metrics["epochs"] == 2 and metrics["best"]["epoch"] == 0


@pytest.mark.parametrize("context", ["batch", "half", "solo", "anchors"])
def test_contexts_of_the_head(tmp_path, mined, labelled, validation, context):
    config = tiny(**HEAD, train_context=context, anchors=8, epochs=1, dropout=0.0, lr=1e-2)
    run = run_once(tmp_path, config, mined=mined, labelled=labelled, validation=validation).run
    assert lines(run, "epoch")[-1]["context"] == ("anchors" if context == "anchors" else "solo")
    before, after = (
        model.head.layers[0].self_attn.in_proj_weight.detach().chunk(3)
        for model in (build_model_of(config), load_trained(run, "last"))
    )
    moved = [float((a - b).abs().max()) for a, b in zip(after, before, strict=True)]
    assert moved[2] > 1e-3
    # An image alone attends to itself whatever query and key say, so they learn nothing.
    assert (max(moved[:2]) < 1e-6) == (context == "solo")
    if context == "anchors":
        assert load_trained(run, "last").anchors.norm(dim=1).numpy() == pytest.approx(1.0, abs=1e-4)


# -- the same result by other means ------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory, mined, validation):
    """A short run without dropout, which others must agree with; its batches depend on no descriptors."""
    root = tmp_path_factory.mktemp("plain")
    return run_once(root, tiny(**STEADY), mined=mined, validation=validation).run


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"gradient_checkpointing": 2}, 1e-4),
        ({"cache_limit_gb": 1.0}, 3e-3),
        ({"precision": "bfloat16"}, 5e-2),
        ({"workers": 1}, 0.0),
        ({"checkpoint_every": 1}, 0.0),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_other_ways_to_the_same_losses(tmp_path, plain, mined, validation, changes, tolerance):
    """Chunks, stored tokens, lower precision and workers change how a loss is computed, and not which."""
    run = run_once(tmp_path, tiny(**STEADY, **changes), mined=mined, validation=validation).run
    # In lower precision a pair near the miner's bound may fall on its other side, and the paths part.
    n = 2 if "precision" in changes else None
    np.testing.assert_allclose(losses_of(run)[:n], losses_of(plain)[:n], rtol=tolerance, atol=tolerance)


def test_accumulated_batches_are_the_mean_of_their_gradients(tmp_path, mined):
    """Two batches a step with a rate of nothing: losses are those of single steps, two by two."""
    still = {"lr": 1e-12, **STEADY, "epochs": 1, "log_every": 1}
    single = losses_of(run_once(tmp_path, tiny(**still), name="single", mined=mined).run)
    double = losses_of(run_once(tmp_path, tiny(**still, accumulate=2), name="double", mined=mined).run)
    np.testing.assert_allclose(double, single.reshape(-1, 2).mean(axis=1), rtol=1e-5)


# Says when a sampler is built, and makes the second process come late to the checkpoints.
WATCHED = """
import os, sys, time
import conftest  # it names the small transformer of the tests
from sagelib import train
build, read = train.CliqueSampler, train.read_checkpoint
train.CliqueSampler = lambda *given: (print("a graph is built"), build(*given))[1]
train.read_checkpoint = lambda *given: (time.sleep(1.0 * int(os.environ["RANK"])), read(*given))[1]
sys.exit(train.main(sys.argv[1:]))
"""


def train_by_two(arguments: list[str], meanwhile=lambda: None) -> list[str]:
    """What two processes of one training say."""
    started = start_two(["-c", WATCHED, *arguments])
    meanwhile()
    return outputs(started)


def test_two_processes_train_like_one(tmp_path, town, mined, validation):
    """Half of each batch in each process, descriptors gathered with a gradient: the same losses, one graph"""
    parameters, found = tmp_path / "two.yaml", []
    parameters.write_text(yaml.safe_dump({**TINY, **HEAD, "dropout": 0.0, "augment": 2}))
    config = TrainConfig.from_mapping(yaml.safe_load(parameters.read_text()))
    data = {"mined": mined, "validation": validation}
    output = train_by_two(
        command(parameters, town, tmp_path, "two"),
        lambda: found.append(run_once(tmp_path, config, name="one", **data).run),
    )
    assert [text.count("a graph is built") for text in output] == [1, 0]
    one, two = found[0], runs.load_run(tmp_path / "train" / "two")
    np.testing.assert_allclose(losses_of(two), losses_of(one), rtol=2e-4)
    norms = ([line["gradient_norm"] for line in lines(run, "step")] for run in (two, one))
    np.testing.assert_allclose(*norms, rtol=5e-3)
    assert two.metrics["start"] == one.metrics["start"] and two.manifest["processes"] == 2


def test_a_process_that_comes_late_to_the_checkpoints_starts_like_the_others(tmp_path):
    """Nothing is measured before the first checkpoint here, so nothing else holds the first process back."""
    parameters = tmp_path / "late.yaml"
    parameters.write_text(yaml.safe_dump({**TINY, "epochs": 1, "batches_per_epoch": 2}))
    folder = make_sets.gsv_like(tmp_path, n_places=4)
    rest = ["--runs", str(tmp_path), "--name", "late", "--device", "cpu"]
    train_by_two([str(parameters), "--gsv", str(folder), *rest])
    assert runs.load_run(tmp_path / "train" / "late").metrics["steps"] == 2


# -- killed and resumed ------------------------------------------------------------------


def command(parameters, town, root, name) -> list[str]:
    given = [str(parameters), "--data", str(town), "--runs", str(root), "--name", name]
    return [*given, "--device", "cpu"]


class Stopped(Exception):
    pass


def stop_at(patch, step: int) -> None:
    def factor(config, now, steps):
        if now == step:
            raise Stopped
        return rate_factor(config, now, steps)

    patch.setattr(training, "rate_factor", factor)


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_limit_gb": 1.0, "accumulate": 2, "warmup_steps": 2},
        {"cache_limit_gb": 1.0, "augment": 2, "crop": 0.5, "views": 3, "schedule": "static"},
        {"refresh_every": 3, "top_k": 2, "epochs": 4},
        {"node_descriptor": "cluster", "adapter": "none", "precision": "bfloat16"},
        {**HEAD, "train_context": "half", "graph_context": "solo", "data_init": 16},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_resumed_runs_repeat_whole_ones(tmp_path, mined, labelled, validation, monkeypatch, changes):
    """Stopped in two epochs: weights and log are those of a run that was never stopped."""
    config = tiny(**changes)
    data = {"mined": mined, "validation": validation}
    if config.train_context == "half":
        data["labelled"] = labelled
    whole = run_once(tmp_path, config, name="whole", **data).run
    per_epoch = -(-config.batches_per_epoch // config.accumulate)
    for epoch in (1, 2) if config.epochs == 2 else (2, config.epochs):
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_at(patch, (epoch - 1) * per_epoch + 1)
            run_once(tmp_path, config, name="stopped", **data)
    assert_same(run_once(tmp_path, config, name="stopped", **data).run, whole)


@pytest.mark.parametrize(
    ("changes", "step"),
    # In the second, the checkpoint that is left needs the graph before the newest.
    [({}, 7), ({"refresh_every": 2, "epochs": 4, "checkpoint_every": 100}, 9)],
    ids=["every-epoch", "older-graph"],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, mined, monkeypatch, changes, step):
    config = tiny(**changes)
    whole = run_once(tmp_path, config, name="whole", mined=mined).run
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_at(patch, step)
        run_once(tmp_path, config, name="damaged", mined=mined)
    found = sorted((tmp_path / "train" / "damaged" / "checkpoints").iterdir())
    assert len(found) == 2
    data = bytearray(found[1].read_bytes())
    data[len(data) // 2] ^= 1
    found[1].write_bytes(data)
    with pytest.warns(UserWarning, match=f"{found[1].name} is damaged.*checkpoint before it"):
        resumed = run_once(tmp_path, config, name="damaged", mined=mined).run
    assert_same(resumed, whole)


def test_half_a_checkpoint_is_never_one(tmp_path):
    for serial in range(1, 5):
        training.write_checkpoint(tmp_path, serial, {"facts": str(serial)})
    (tmp_path / ".tmp-1234-000009-00.pt").write_bytes(b"half")
    assert len(list(tmp_path.glob("0*.pt"))) == 2
    assert training.read_checkpoint(tmp_path)["facts"] == "4"
    training.write_checkpoint(tmp_path, 5, {"facts": "5"})
    assert not list(tmp_path.glob(".tmp-*")), "what a killed process left takes no room for ever"
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="damaged"):
        assert training.read_checkpoint(tmp_path) is None


# -- stored tokens -----------------------------------------------------------------------


@pytest.fixture
def small_model():
    torch.manual_seed(0)
    options = {"interact": False, "aggregator_options": TINY["aggregator_options"]}
    return SAGE("vit_test_patch14", pretrained=False, **options).eval()


@pytest.fixture
def kept(tmp_path, small_model):
    """Tokens of some places, kept in a folder of the test."""

    def open_(places, preprocess=None, folder="tokens", model=small_model, **options):
        options = {"limit_gb": 1, "progress": False, "preprocess": preprocess or Preprocess(56), **options}
        return open_tokens(tmp_path / folder, model, places, **options)

    return open_


def test_stored_tokens_give_the_same_descriptors(kept, small_model, mined):
    store = kept(mined, batch_size=7)
    images = torch.cat([batch for batch, _ in loader(mined, Preprocess(56), batches=[range(len(mined))])])
    picks = np.array([40, 3, 3, 17])
    with torch.no_grad():
        stored = small_model.embed_tokens(store[picks], store.grid)
        fresh = small_model.embed(images[picks])
    assert store.values.dtype == np.float16 and store.values.shape == (len(mined), 17, 192)
    # float16 keeps 11 bits: descriptors of unit length agree to about 2 ** -11.
    assert float((stored - fresh).norm(dim=1).max()) < 2e-3
    assert float((stored - fresh).abs().max()) > 0, "the store is expected to round"


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_tokens_that_float16_would_lose_are_refused(kept, small_model, mined, monkeypatch, scale):
    prefix = small_model.backbone.prefix
    monkeypatch.setattr(small_model.backbone, "prefix", lambda images: scale * prefix(images))
    with pytest.raises(ValueError, match="float16"):
        kept(mined)


def test_a_warm_store_never_reads_a_picture(tmp_path, kept, mined, validation, monkeypatch):
    """Training, the graph and validation all read the stored tokens."""
    config = tiny(cache_limit_gb=1.0, data_init=8, seed=3)
    parts = (mined, validation.database, validation.queries)
    for places in parts:
        kept(places, model=build_model_of(config))
    monkeypatch.setattr(training, "loader", None)
    result = run_once(tmp_path, config, mined=mined, validation=validation)
    assert result.metrics["steps"] == 8 and len(list((tmp_path / "tokens").iterdir())) == len(parts)


def test_views_are_the_picture_and_fixed_variants_of_it(tmp_path, kept, mined, monkeypatch):
    """Kept once: the graph reads the pictures themselves, each use in training one of their views."""
    some, views = mined[:6], Views(Preprocess(56), TrainTransform(56, randaugment=None, crop=0.3), 3)
    varied, alone = kept(some, views).values, kept(some).values
    assert len(varied) == 18
    np.testing.assert_array_equal(varied[::3], alone)
    for other in (varied[1::3], varied[2::3]):
        assert all((a != b).any() for a, b in zip(other, alone, strict=True))
    read, original = [], TokenStore.__getitem__
    monkeypatch.setattr(
        TokenStore, "__getitem__", lambda self, rows: (read.append(rows % 3), original(self, rows))[1]
    )
    monkeypatch.setattr(training, "loader", None)
    run_once(tmp_path, tiny(cache_limit_gb=1.0, crop=0.3, views=3), mined=mined)
    batches = [rows for rows in read if len(rows) == 6 and rows.any()]
    assert set(np.concatenate(batches).tolist()) == {0, 1, 2} and 6 <= len(batches) <= 8 < len(read)


def test_the_bytes_are_told_and_refused_above_the_limit(tmp_path, kept, mined, capsys):
    with pytest.raises(ValueError, match="128 images.*0.000836 GB.*more than cache_limit_gb = 0.0008"):
        kept(mined, limit_gb=0.0008)
    assert not (tmp_path / "tokens").exists()
    kept(mined, limit_gb=0.0009, progress=True)
    assert "0.000836 GB on disk" in capsys.readouterr().err, "the bar says it"


def test_a_killed_build_goes_on_and_other_things_get_other_stores(kept, small_model, mined, monkeypatch):
    whole = kept(mined, folder="whole", batch_size=8)
    prefix, calls = small_model.backbone.prefix, []

    def counted(images):
        calls.append(len(images))
        if len(calls) == 4:
            raise Stopped
        return prefix(images)

    monkeypatch.setattr(small_model.backbone, "prefix", counted)
    monkeypatch.setattr("sagelib.describe.FLUSH_S", 0.0)
    with pytest.raises(Stopped):
        kept(mined, batch_size=8)
    store = kept(mined, batch_size=8)
    assert sum(calls[4:]) == 1 + len(mined) - 16, (
        "what was flushed is not computed again (one tells the shape)"
    )
    np.testing.assert_array_equal(store.values, whole.values)
    larger, contrast = kept(mined, Preprocess(70)), kept(mined, Preprocess(56, "antialias"))
    assert len({store.path, larger.path, contrast.path}) == 3


# -- mistakes ----------------------------------------------------------------------------


def test_data_that_do_not_suffice(tmp_path, mined, labelled):
    with pytest.raises(ValueError, match="nothing to train on"):
        run_once(tmp_path, tiny())
    few = len(np.unique(labelled.place))
    with pytest.raises(
        ValueError, match=f"{few} of {few} places have at least 2 images.*lower places_per_batch"
    ):
        run_once(tmp_path, tiny(places_per_batch=few + 1), name="large", labelled=labelled)
    with pytest.raises(ValueError, match="lower places_per_batch|room"):
        run_once(tmp_path, tiny(places_per_batch=100), name="huge", mined=mined)
    with pytest.raises(ValueError, match="carry no labels"):
        run_once(tmp_path, tiny(), name="none", labelled=mined)


def test_contexts_without_what_they_need(tmp_path, mined):
    with pytest.raises(ValueError, match="'half' needs both sources"):
        run_once(tmp_path, tiny(**HEAD, train_context="half"), name="half", mined=mined)
    with pytest.raises(ValueError, match="solo.*InteractHead"):
        run_once(tmp_path, tiny(graph_context="solo"), name="solo", mined=mined)
    with pytest.raises(ValueError, match="anchors asks for 999 training images, and there are 128"):
        run_once(tmp_path, tiny(**HEAD, train_context="anchors", anchors=999), name="anchors", mined=mined)


def test_a_loss_that_is_not_finite(tmp_path, mined):
    with pytest.raises(
        FloatingPointError, match="the loss is nan at step 2, with a learning rate of .*: lower lr"
    ):
        run_once(tmp_path, tiny(lr=1e30, final_lr=1.0), mined=mined)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried"),
    ],
)
def test_not_enough_memory(tmp_path, mined, monkeypatch, error):
    def fails(self, tokens, grid):
        raise error

    monkeypatch.setattr(SAGE, "embed_tokens", fails)
    words = r"3 places x 2 images.*56 pixels: set gradient_checkpointing.*\(now None\)"
    with pytest.raises(MemoryError, match=words):
        run_once(tmp_path, tiny(), mined=mined)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "there is no such file"),
        ("a: [1", "line 1: this is not YAML"),
        ("lr: 1\n'lr': 2", r"line 2: this is not YAML \(the key lr stands twice"),
        ("lr: 1\na: {b: [{seed: 0, seed: 1}]}", r"line 2: this is not YAML \(the key seed stands twice"),
        ("- 1", "must hold lines of the form NAME: VALUE, and is a list"),
        ("lr: -1.0", "lr must be a number above 0, got -1.0"),
        ("aggregator_options: {foo: 1}", "no model can be built of these options: .*'foo'"),
        ("tau: -1.0e-9\nfallback: null", "lower places_per_batch by .*prune less"),
    ],
    ids=["no file", "no YAML", "twice", "twice within", "a list", "range", "a wrong option", "all pruned"],
)
def test_wrong_parameter_files_get_one_sentence(tmp_path, town, capsys, text, words):
    parameters = tmp_path / "file.yaml"
    if text is not None:
        parameters.write_text(text)
    pairs = [f"{key}={json.dumps(value)}" for key, value in TINY.items() if key not in (text or "")]
    assert training.main([*command(parameters, town, tmp_path, "wrong"), "--set", *pairs]) == 1
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(f"python -m sagelib.train: .*{words}.*", sentence), sentence


def test_the_command_tells_what_it_ignores_and_that_it_was_stopped(tmp_path, town, capsys, monkeypatch):
    parameters = tmp_path / "file.yaml"
    parameters.write_text(yaml.safe_dump({**TINY, "dataset": "town", "learning_rate": 1e-3}))

    def stopped(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", stopped)
    assert training.main(command(parameters, town, tmp_path, "stopped")) == 130
    output = capsys.readouterr()
    assert "ignored dataset, learning_rate (no fields of a training)" in output.out
    assert "the same command goes on" in output.err
    assert training.main(["--data", str(tmp_path), "--runs", str(tmp_path), "--name", "x"]) == 1
    assert "no set with a training part" in capsys.readouterr().err


def test_gsv_cities_and_msls_by_the_command(tmp_path, town, capsys):
    """Half of each batch from each; a city in two zones; validation cities stay out, or are refused."""
    labelled = make_sets.gsv_like(tmp_path, n_places=4)
    mined = make_sets.msls_like(tmp_path, cities=("zurich", "london", "cph", "sf"), n=24)
    parameters = tmp_path / "both.yaml"
    parameters.write_text(yaml.safe_dump({**TINY, **HEAD, "train_context": "half", "augment": 3}))
    rest = ["--validation", str(town), "--runs", str(tmp_path), "--device", "cpu", "--name"]
    assert training.main([str(parameters), "--gsv", str(labelled), "--msls", str(mined), *rest, "both"]) == 0
    assert "train/both finished" in capsys.readouterr().out
    run = runs.load_run(tmp_path / "train" / "both")
    for line in lines(run, "step"):
        assert line["loss"] == pytest.approx(line["loss_labelled"] + line["loss_mined"])
    for line in lines(run, "epoch")[1:]:
        assert line["graph"]["mined"]["cities"] == 3  # Zurich, and London on both sides of Greenwich
        assert line["graph"]["mined"]["edges"] > 0 and line["graph"]["labelled"]["places"] == 8
    validation = open_set(town.parent, town.name, split="val")
    config = TrainConfig.from_mapping(yaml.safe_load(parameters.read_text()))
    data = {"mined": read_msls(mined, ["london", "zurich"]), "labelled": read_gsv_cities(labelled)}
    again = open_run(tmp_path, "both", config, **data, validation=validation, device="cpu")
    assert again.finished, "trained on other pictures"

    held_out = make_sets.msls_like(tmp_path, cities=("cph", "sf"), name="held-out")
    assert training.main([str(parameters), "--msls", str(held_out), *rest, "refused"]) == 1
    assert "cph and sf are validation cities" in capsys.readouterr().err
