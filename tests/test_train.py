"""Training: it learns, it can be killed, several processes are one, the cache changes nothing, mistakes get a sentence."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import make_sets
import numpy as np
import pytest
import torch
import yaml

from sagelib import runs
from sagelib import train as training
from sagelib.describe import open_tokens
from sagelib.images import TrainTransform, Views
from sagelib.model import SAGE
from sagelib.places import Places, open_set, open_training_set, read_gsv_cities, read_msls
from sagelib.sampler import SamplerConfig
from sagelib.train import (
    TrainConfig,
    build_loss,
    build_miner,
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
    folder = tmp_path_factory.mktemp("town") / "pair"
    return write_town(
        folder,
        train_seeds=(1000, 1001),
        val_seeds=(1100,),
        test_seeds=(),
        images_per_town=64,
        size=56,
        progress=False,
    )


@pytest.fixture(scope="module")
def mined(town) -> Places:
    return open_training_set(town.parent, town.name)


@pytest.fixture(scope="module")
def labelled(mined) -> Places:
    places = mined.with_clusters(25.0)
    return places


@pytest.fixture(scope="module")
def validation(town):
    return open_set(town.parent, town.name, split="val")


def run_once(root, config, name="run", **data):
    run = open_run(root, name, config, **data, device="cpu")
    return train(config, run, **data, **QUIET)


def last_weights(run) -> dict[str, np.ndarray]:
    return {k: v.numpy() for k, v in load_trained(run, "last").trainable_state_dict().items()}


def assert_same_weights(a, b) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def without_times(lines: list[dict]) -> list[str]:
    """Log lines without what a clock or a speed says, as text (in which a NaN equals itself)."""

    def clean(value):
        if isinstance(value, dict):
            return {
                k: clean(v)
                for k, v in value.items()
                if "seconds" not in k and k not in ("wall_time_s", "images_per_s")
            }
        return value

    return [json.dumps(clean(line)) for line in lines]


# -- configuration, loss, schedule -------------------------------------------------------------------------------------


def test_configuration_survives_yaml():
    config = TrainConfig(lr=1e-3, aggregator_options={"probes": 8}, patience=None, precision="bfloat16")
    assert TrainConfig.from_mapping(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    assert TrainConfig.from_mapping({"lr": "9e-4", "tau": "-2e3"}) == TrainConfig(lr=9e-4, tau=-2e3)


def test_the_defaults_of_the_graph_are_the_samplers():
    """A field that the sampler knows too has its default, so that the paper's numbers stand in one place each."""
    assert {name: getattr(TrainConfig(), name) for name in vars(SamplerConfig())} == vars(SamplerConfig())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 0.0}, "lr must be a number > 0, got 0.0"),
        ({"epochs": 0}, "epochs must be an integer >= 1, got 0"),
        ({"places_per_batch": 1}, "places_per_batch must be an integer >= 2"),
        ({"final_lr": 1.5}, r"final_lr must lie in \[0, 1\], got 1.5"),
        ({"train_context": "sorted"}, "train_context must be one of batch, half, solo, anchors"),
        ({"crop": 1.5}, r"crop must lie in \[0, 1\], got 1.5"),
        ({"precision": "int8"}, "precision must be one of"),
        ({"preprocess": "foo"}, "preprocess must be one of paper, antialias, autocontrast, got 'foo'"),
        ({"graph_context": "anchors"}, "'anchors' needs train_context 'anchors', got 'batch'"),
        ({"epochs": "three"}, "epochs must be a whole number, got 'three'"),
        ({"epochs": True}, "epochs must be a whole number, got True"),
        ({"lr": [1]}, r"lr must be a number, got \[1\]"),
        ({"lr": None}, "lr must be a number, got None"),
        ({"compile": "maybe"}, "compile must be true or false, got 'maybe'"),
        ({"interact_options": 5}, "interact_options must be a mapping of names to values, got 5"),
    ],
)
def test_values_out_of_range_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**changes)


def test_an_unknown_parameter_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="'learning_rates'"):
        TrainConfig.from_mapping({"learning_rates": 1})
    with pytest.raises(ValueError, match="did you mean 'weight_decay'"):
        TrainConfig.from_mapping({"weight_decays": 1})


@pytest.mark.parametrize(
    "options", [{"alpha": 1, "beta": 50, "base": 0}, {"alpha": 2, "beta": 40, "base": 0.5}]
)
@pytest.mark.parametrize(("places", "images"), [(24, 4), (3, 2), (5, 7)])
def test_plateau_is_the_loss_of_unrelated_descriptors(places, images, options):
    """Orthogonal descriptors have similarity 0 everywhere: the library's own loss says what that costs."""
    descriptors = torch.eye(places * images, dtype=torch.float64)
    labels = torch.arange(places).repeat_interleave(images)
    pairs = build_miner("MultiSimilarityMiner")(descriptors, labels)
    loss = build_loss("MultiSimilarityLoss", options)(descriptors, labels, pairs)
    assert plateau_value(places, images, **options) == pytest.approx(float(loss), abs=1e-9)


def test_learning_rate_schedules():
    linear, cosine, constant = (TrainConfig(lr_schedule=s) for s in ("linear", "cosine", "constant"))
    for config in (linear, cosine):
        factors = [rate_factor(config, i, 101) for i in range(101)]
        assert factors[0] == 1 and factors[-1] == pytest.approx(0.2)
        assert all(a > b for a, b in zip(factors, factors[1:], strict=False))
    assert rate_factor(linear, 50, 101) == pytest.approx(0.6) and rate_factor(
        linear, 25, 101
    ) == pytest.approx(0.8)
    assert rate_factor(cosine, 25, 101) > rate_factor(linear, 25, 101)
    assert {rate_factor(constant, i, 101) for i in range(101)} == {1.0}
    warm = TrainConfig(lr_schedule="constant", warmup_steps=4)
    assert [rate_factor(warm, i, 10) for i in range(5)] == [0.25, 0.5, 0.75, 1, 1]


def test_losses_by_name_and_those_that_cannot_work():
    assert type(build_loss("TripletMarginLoss", {"margin": 0.1})).__name__ == "TripletMarginLoss"
    assert build_miner(None) is None
    with pytest.raises(ValueError, match="no loss named 'MultiSimilarity'.*MultiSimilarityLoss"):
        build_loss("MultiSimilarity")
    with pytest.raises(ValueError, match="learns a weight for each class"):
        build_loss("ProxyAnchorLoss", {"num_classes": 3, "embedding_size": 4})
    with pytest.raises(ValueError, match="cannot be made of the options"):
        build_loss("ProxyAnchorLoss")
    with pytest.raises(ValueError, match="cannot be made of the options"):
        build_miner("MultiSimilarityMiner", {"gamma": 1})


# -- it learns -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(tmp_path_factory, mined, validation):
    root = tmp_path_factory.mktemp("learned")
    config = tiny(
        backbone="tf_efficientnet_lite2",
        pretrained=True,
        image_size=64,
        validation_size=64,
        epochs=4,
        batches_per_epoch=10,
        dropout=0.0,
        data_init=32,
        lr=2e-3,
        cache_limit_gb=1.0,
        tensorboard=True,
    )
    state = torch.get_rng_state()
    result = run_once(root, config, mined=mined, validation=validation)
    assert torch.equal(state, torch.get_rng_state()), "training moved the caller's generator"
    return root, config, result


def test_the_loss_falls_and_leaves_the_plateau(learned):
    result = learned[2]
    losses = [line["loss"] for line in result.lines("epoch") if line["epoch"]]
    assert losses[-1] < 0.85 * losses[0]
    plateau = result.metrics["plateau"]
    assert plateau["value"] == pytest.approx(plateau_value(3, 2))
    assert not plateau["ended_there"] and plateau["gap"] > 0.1 and plateau["sentence"] == ""


def test_a_run_tells_what_happened(learned, validation):
    asked = len(validation.queries)
    _, config, result = learned
    steps, epochs = result.lines("step"), result.lines("epoch")
    assert [line["step"] for line in steps] == list(range(2, 41, 2))
    assert [line["epoch"] for line in epochs] == [0, 1, 2, 3, 4]
    assert all(0 <= line["live"] <= 1 and line["images_per_s"] > 0 for line in steps)
    assert steps[0]["lr"] == pytest.approx(config.lr * rate_factor(config, 1, 40))
    for line in epochs:
        assert line["context"] == "none" and line["queries"] == asked
        assert line["recall"]["1"] == pytest.approx(100 * line["hits"]["1"] / asked)
    changed = [line["graph"]["mined"] for line in epochs[2:]]
    assert all(g["edges_gained"] + g["edges_kept"] <= g["edges"] for g in changed)
    best = max((line["hits"]["1"], line["hits"]["5"], line["hits"]["10"]) for line in epochs)
    chosen = next(line for line in epochs if line["epoch"] == result.metrics["best"]["epoch"])
    assert (chosen["hits"]["1"], chosen["hits"]["5"], chosen["hits"]["10"]) == best
    manifest = runs.read_json(result.run.dir / "manifest.json")
    for key in (
        "config",
        "seed",
        "git_commit",
        "versions",
        "device",
        "data_fingerprint",
        "wall_time_s",
        "metrics",
    ):
        assert key in manifest
    assert (manifest["threads"], manifest["processes"]) == (torch.get_num_threads(), 1)
    assert list((result.run.dir / "tensorboard").glob("events.*"))


def test_the_best_weights_come_back(learned, mined):
    result = learned[2]
    size = result.run.config["image_size"]
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    again = load_trained(result.run)
    with torch.no_grad():
        torch.testing.assert_close(again(images), result.model(images), rtol=0, atol=0)


def test_a_finished_run_is_found_and_another_configuration_refused(learned, mined, validation):
    root, config, result = learned
    before = (result.run.dir / "log.jsonl").read_bytes()
    again = run_once(root, config, mined=mined, validation=validation)
    assert again.metrics == result.metrics and (result.run.dir / "log.jsonl").read_bytes() == before
    with pytest.raises(runs.RunConflict, match="lr: 0.002 -> 0.001"):
        open_run(root, "run", tiny(**{**config.to_dict(), "lr": 1e-3}), mined=mined, validation=validation)
    with pytest.raises(runs.RunConflict, match="data_fingerprint"):
        open_run(root, "run", config, mined=mined[:-1], validation=validation)
    # How the work is done is no part of what a run is.
    assert open_run(
        root, "run", tiny(**{**config.to_dict(), "log_every": 7}), mined=mined, validation=validation
    ).finished


class Unmoved(SAGE):
    """Descriptors that are unrelated whatever the images show: the loss can only rest on its plateau."""

    def embed_tokens(self, tokens, grid):
        noise = torch.randn(len(tokens), self.width)
        return torch.nn.functional.normalize(noise, dim=-1) + 0.0 * super().embed_tokens(tokens, grid)


def test_a_run_that_ends_on_the_plateau_says_so(tmp_path, mined, capsys):
    config = tiny(aggregator_options={"channels": 64, "probes": 32, "token_dim": 32, "hidden": 16})
    model = Unmoved(
        "vit_test_patch14", pretrained=False, interact=False, aggregator_options=config.aggregator_options
    )
    run = open_run(tmp_path, "rest", config, mined=mined, device="cpu")
    metrics = train(config, run, mined=mined, model=model, device="cpu", progress=True).metrics
    assert metrics["plateau"]["ended_there"]
    assert metrics["plateau"]["loss"] == pytest.approx(metrics["plateau"]["value"], rel=0.05)
    assert "nothing was learned" in metrics["plateau"]["sentence"]
    assert metrics["plateau"]["sentence"] in capsys.readouterr().out


def test_early_stopping(tmp_path, mined, validation):
    config = tiny(epochs=9, batches_per_epoch=1, lr=1e-12, patience=2)
    metrics = run_once(tmp_path, config, mined=mined, validation=validation).metrics
    assert metrics["stopped_early"] and metrics["epochs"] == 2 and metrics["best"]["epoch"] == 0


@pytest.mark.parametrize("context", ["batch", "half", "solo", "anchors"])
def test_contexts_of_the_head(tmp_path, mined, labelled, validation, context):
    config = tiny(**HEAD, train_context=context, anchors=8, epochs=1, dropout=0.0, head_lr=1e-2)
    result = run_once(tmp_path, config, mined=mined, labelled=labelled, validation=validation)
    assert result.lines("epoch")[-1]["context"] == ("anchors" if context == "anchors" else "solo")
    before = build_model_of(config).head.layers[0].self_attn.in_proj_weight.detach().chunk(3)
    after = load_trained(result.run, "last").head.layers[0].self_attn.in_proj_weight.detach().chunk(3)
    moved = [float((a - b).abs().max()) for a, b in zip(after, before, strict=True)]
    assert moved[2] > 1e-3
    # An image alone attends to itself whatever query and key say, so they learn nothing.
    assert (max(moved[:2]) < 1e-6) == (context == "solo")
    if context == "anchors":
        assert load_trained(result.run, "last").anchors.norm(dim=1).numpy() == pytest.approx(1.0, abs=1e-4)


def test_other_losses_of_the_library_train_too(tmp_path, mined):
    config = tiny(
        loss="TripletMarginLoss",
        miner="TripletMarginMiner",
        miner_options={"type_of_triplets": "all"},
        epochs=1,
    )
    result = run_once(tmp_path, config, mined=mined)
    assert result.metrics["plateau"] is None
    assert all(0 < line["live"] <= 1 for line in result.lines("step"))


# -- the same result by other means -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory, mined, validation):
    """A short float32 run without dropout, which others must agree with; its batches do not depend on descriptors."""
    return run_once(tmp_path_factory.mktemp("plain"), tiny(**STEADY), mined=mined, validation=validation)


def losses_of(result) -> np.ndarray:
    return np.array([line["loss"] for line in result.lines("step")])


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"gradient_checkpointing": 2}, 1e-4),
        ({"cache_limit_gb": 1.0}, 3e-3),
        ({"precision": "bfloat16"}, 5e-2),
        ({"precision": "float16"}, 1e-2),
        ({"workers": 1}, 0.0),
        ({"log_every": 2, "checkpoint_every": 1}, 0.0),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_other_ways_to_the_same_losses(tmp_path, plain, mined, validation, changes, tolerance):
    """Chunks, stored tokens, lower precision and workers change how a loss is computed, and not which."""
    result = run_once(tmp_path, tiny(**STEADY, **changes), mined=mined, validation=validation)
    # In lower precision a pair near the miner's bound may fall on its other side, and the paths part from there on.
    n = 2 if "precision" in changes else None
    np.testing.assert_allclose(losses_of(result)[:n], losses_of(plain)[:n], rtol=tolerance, atol=tolerance)


def test_accumulated_batches_are_the_mean_of_their_gradients(tmp_path, mined):
    """Two batches a step with a rate of nothing: losses are those of single steps, two by two."""
    still = {"lr": 1e-12, "dropout": 0.0, "schedule": "none", "epochs": 1, "log_every": 1}
    single = losses_of(run_once(tmp_path, tiny(**still), name="single", mined=mined))
    double = losses_of(run_once(tmp_path, tiny(**still, accumulate=2), name="double", mined=mined))
    np.testing.assert_allclose(double, single.reshape(-1, 2).mean(axis=1), rtol=1e-5)


# Says when a graph is built, and makes the second process come late to the checkpoints.
WATCHED = """
import os, sys, time
import conftest  # it names the small transformer of the tests
from sagelib import sampler, train
build, read = sampler.CliqueSampler._check_room, train.read_checkpoint
sampler.CliqueSampler._check_room = lambda self: (print("a graph is built"), build(self))[1]
train.read_checkpoint = lambda *given: (time.sleep(1.0 * int(os.environ["RANK"])), read(*given))[1]
sys.exit(train.main(sys.argv[1:]))
"""


def start_two(arguments: list[str]) -> list[subprocess.Popen]:
    """Two processes of one training."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    for rank in range(2):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
            "MASTER_ADDR": "127.0.0.1",
        }
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", WATCHED, *arguments],
                env={**os.environ, **environment, "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def ended_well(started: list[subprocess.Popen]) -> list[str]:
    """What each of the processes said."""
    said = []
    for process in started:
        said.append(process.communicate(timeout=300)[0])
        assert process.returncode == 0, said
    return said


def test_two_processes_train_like_one(tmp_path, town, mined, validation):
    """Half of each batch in each process, descriptors gathered with a gradient: the same losses, from one graph."""
    parameters = tmp_path / "two.yaml"
    changes = {**HEAD, "dropout": 0.0, "augment": 2}
    parameters.write_text(yaml.safe_dump({**TINY, **changes}))
    config = TrainConfig.from_mapping(yaml.safe_load(parameters.read_text()))
    started = start_two(command(parameters, town, tmp_path, "two")[3:])
    one = run_once(tmp_path, config, name="one", mined=mined, validation=validation)
    said = ended_well(started)
    assert [text.count("a graph is built") for text in said] == [1, 0]
    two = runs.load_run(tmp_path / "train" / "two")
    lines = [line for line in two.read_log() if line["kind"] == "step"]
    np.testing.assert_allclose([line["loss"] for line in lines], losses_of(one), rtol=2e-4)
    np.testing.assert_allclose(
        [line["gradient_norm"] for line in lines], [s["gradient_norm"] for s in one.lines("step")], rtol=5e-3
    )
    assert two.manifest["metrics"]["start"] == one.metrics["start"]
    assert two.manifest["processes"] == 2


def test_a_process_that_comes_late_to_the_checkpoints_starts_like_the_others(tmp_path):
    """Nothing is measured before the first checkpoint here, so nothing else holds the first process back."""
    parameters = tmp_path / "late.yaml"
    parameters.write_text(yaml.safe_dump({**TINY, "epochs": 1, "batches_per_epoch": 2}))
    folder = make_sets.gsv_like(tmp_path, n_places=4)
    started = start_two(
        [
            *(str(parameters), "--gsv", str(folder), "--runs", str(tmp_path)),
            *("--name", "late", "--device", "cpu"),
        ]
    )
    ended_well(started)
    assert runs.load_run(tmp_path / "train" / "late").metrics["steps"] == 2


# -- killed and resumed ------------------------------------------------------------------------------------------------


def command(parameters, town, root, name) -> list[str]:
    return [
        *(sys.executable, "-m", "sagelib.train", str(parameters), "--data", str(town), "--runs", str(root)),
        *("--name", name, "--device", "cpu"),
    ]


def test_three_kills_at_random_moments_change_no_bit(tmp_path, town, mined, validation):
    """Augmentation, dropout, anchors and a graph from the model's own descriptors, stopped by SIGKILL wherever it is."""
    parameters = tmp_path / "kill.yaml"
    changes = {
        **HEAD,
        "train_context": "anchors",
        "anchors": 8,
        "augment": 2,
        "epochs": 4,
        "batches_per_epoch": 12,
    }
    parameters.write_text(yaml.safe_dump({**TINY, **changes}))
    config = TrainConfig.from_mapping(yaml.safe_load(parameters.read_text()))
    whole = run_once(tmp_path, config, name="whole", mined=mined, validation=validation)

    log = tmp_path / "train" / "killed" / "log.jsonl"
    moments = random.Random()
    for number in range(3):
        process = subprocess.Popen(
            command(parameters, town, tmp_path, "killed"),
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        at_start = log.stat().st_size if log.exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:  # it has resumed once its log moves
            size = log.stat().st_size if log.exists() else 0
            if size != at_start and size:
                break
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if runs.load_run(log.parent).finished:
            assert number > 0, "the first process was done before it could be killed"
            break
    resumed = run_once(tmp_path, config, name="killed", mined=mined, validation=validation)
    assert_same_weights(last_weights(resumed.run), last_weights(whole.run))
    assert without_times(resumed.run.read_log()) == without_times(whole.run.read_log())


class Stopped(Exception):
    pass


def stop_at(monkeypatch, step: int) -> None:
    original = training._Loop._update

    def update(self):
        if self.state.step == step:
            raise Stopped
        return original(self)

    monkeypatch.setattr(training._Loop, "_update", update)


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_limit_gb": 1.0, "accumulate": 2, "lr_schedule": "cosine", "warmup_steps": 2},
        {"cache_limit_gb": 1.0, "augment": 2, "crop": 0.5, "views": 3, "schedule": "static"},
        {"refresh_every": 3, "top_k": 2, "epochs": 4},
        {"graph_descriptors": "training", "node_descriptor": "cluster"},
        {**HEAD, "train_context": "half", "graph_context": "solo", "data_init": 16, "clip_norm": 1.0},
        {"precision": "float16", "batches_per_epoch": 2, "adapter": "none", "cache_limit_gb": 1.0},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_resumed_runs_repeat_whole_ones(tmp_path, mined, labelled, validation, monkeypatch, changes):
    """Stopped in two epochs: weights and log are those of a run that was never stopped."""
    config = tiny(**changes)
    data = {"mined": mined, "validation": validation}
    if config.train_context == "half":
        data["labelled"] = labelled
    whole = run_once(tmp_path, config, name="whole", **data)
    per_epoch = -(-config.batches_per_epoch // config.accumulate)
    for epoch in (1, 2) if config.epochs == 2 else (2, config.epochs):
        step = (epoch - 1) * per_epoch + 1
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(Stopped):
                run_once(tmp_path, config, name="stopped", **data)
    resumed = run_once(tmp_path, config, name="stopped", **data)
    assert_same_weights(last_weights(resumed.run), last_weights(whole.run))
    assert without_times(resumed.run.read_log()) == without_times(whole.run.read_log())


@pytest.mark.parametrize(
    ("changes", "step"),
    # In the second, the checkpoint that is left needs the graph before the newest.
    [({}, 7), ({"refresh_every": 2, "epochs": 4, "checkpoint_every": 100}, 9)],
    ids=["every-epoch", "older-graph"],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, mined, monkeypatch, changes, step):
    config = tiny(**changes)
    whole = run_once(tmp_path, config, name="whole", mined=mined)
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Stopped):
            run_once(tmp_path, config, name="damaged", mined=mined)
    found = training._checkpoints(tmp_path / "train" / "damaged" / "checkpoints")
    assert len(found) == 2
    data = bytearray(found[0].read_bytes())
    data[len(data) // 2] ^= 1
    found[0].write_bytes(data)
    with pytest.warns(UserWarning, match=f"{found[0].name} is damaged.*checkpoint before it"):
        resumed = run_once(tmp_path, config, name="damaged", mined=mined)
    assert_same_weights(last_weights(resumed.run), last_weights(whole.run))
    assert without_times(resumed.run.read_log()) == without_times(whole.run.read_log())


def test_half_a_checkpoint_is_never_one(tmp_path):
    for serial in range(1, 5):
        training.write_checkpoint(tmp_path, serial, {"facts": str(serial)})
    (tmp_path / ".tmp-1234-000009-00.pt").write_bytes(b"half")
    assert len(training._checkpoints(tmp_path)) == 2
    assert training.read_checkpoint(tmp_path)["facts"] == "4"
    training.write_checkpoint(tmp_path, 5, {"facts": "5"})
    assert not list(tmp_path.glob(".tmp-*")), "what a killed process left takes no room for ever"
    for path in training._checkpoints(tmp_path):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="damaged"):
        assert training.read_checkpoint(tmp_path) is None


# -- stored tokens -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_model():
    torch.manual_seed(0)
    return SAGE(
        "vit_test_patch14", pretrained=False, interact=False, aggregator_options=TINY["aggregator_options"]
    ).eval()


def test_stored_tokens_give_the_same_descriptors(tmp_path, small_model, mined):
    from sagelib.images import Preprocess, loader

    preprocess = Preprocess(56)
    store = open_tokens(
        tmp_path, small_model, mined, preprocess=preprocess, limit_gb=1, batch_size=7, progress=False
    )
    images = torch.cat([batch for batch, _ in loader(mined, preprocess, batches=[range(len(mined))])])
    picks = np.array([40, 3, 3, 17])
    with torch.no_grad():
        stored = small_model.embed_tokens(store[picks], store.grid)
        fresh = small_model.embed(images[picks])
    assert store.values.dtype == np.float16 and store.values.shape == (len(mined), 17, 192)
    # float16 keeps 11 bits: descriptors of unit length agree to about 2 ** -11.
    assert float((stored - fresh).norm(dim=1).max()) < 2e-3
    assert float((stored - fresh).abs().max()) > 0, "the store is expected to round"


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_tokens_that_float16_would_lose_are_refused(tmp_path, small_model, mined, monkeypatch, scale):
    prefix = small_model.backbone.prefix
    monkeypatch.setattr(small_model.backbone, "prefix", lambda images: scale * prefix(images))
    with pytest.raises(ValueError, match="its values are too large, too small or not finite for float16"):
        open_tokens(
            tmp_path, small_model, mined, preprocess=training.Preprocess(56), limit_gb=1, progress=False
        )


def test_a_warm_store_never_runs_the_prefix(tmp_path, small_model, mined, validation, monkeypatch):
    """Training, the graph and validation all read the stored tokens."""
    config = tiny(cache_limit_gb=1.0, data_init=8, seed=3)
    model = build_model_of(config)
    parts = (mined, validation.database, validation.queries)
    for places in parts:
        open_tokens(
            tmp_path / "tokens", model, places, preprocess=training.Preprocess(56), limit_gb=1, progress=False
        )
    monkeypatch.setattr(training._Feed, "loaded", None)
    result = run_once(tmp_path, config, mined=mined, validation=validation)
    assert result.metrics["steps"] == 8 and len(list((tmp_path / "tokens").iterdir())) == len(parts)


def test_views_are_the_picture_and_fixed_variants_of_it(tmp_path, small_model, mined, monkeypatch):
    """Kept once: the graph reads the pictures themselves, each use in training one of their views."""
    plain = training.Preprocess(56)
    views = Views(plain, TrainTransform(56, randaugment=None, crop=0.3), 3)
    some = mined[:6]
    options = {"limit_gb": 1, "progress": False}
    kept = open_tokens(tmp_path, small_model, some, preprocess=views, **options)
    alone = open_tokens(tmp_path, small_model, some, preprocess=plain, **options)
    assert len(kept) == 18
    np.testing.assert_array_equal(kept.values[::3], alone.values)
    for other in (kept.values[1::3], kept.values[2::3]):
        assert all((a != b).any() for a, b in zip(other, alone.values, strict=True))
    asked = []
    stored = training._Feed.stored

    def noted(self, batches):
        batches = list(batches)
        asked.append(np.concatenate([np.ravel(b) for b in batches]) % self.views)
        return stored(self, batches)

    monkeypatch.setattr(training._Feed, "stored", noted)
    monkeypatch.setattr(training._Feed, "loaded", None)
    run_once(tmp_path, tiny(cache_limit_gb=1.0, crop=0.3, views=3), mined=mined)
    # The graph of each epoch asks for the pictures themselves, its batches for all views.
    varied = [set(rows.tolist()) for rows in asked if rows.any()]
    assert varied == [{0, 1, 2}] * 2 and len(asked) > 2
    with pytest.raises(ValueError, match="views = 3 .* set cache_limit_gb"):
        tiny(crop=0.3, views=3)


def test_the_bytes_are_told_and_refused_above_the_limit(tmp_path, small_model, mined, capsys):
    preprocess = training.Preprocess(56)
    with pytest.raises(ValueError, match=r"128 images .*0.000836 GB.*more than cache_limit_gb = 0.0008"):
        open_tokens(tmp_path, small_model, mined, preprocess=preprocess, limit_gb=0.0008, progress=False)
    assert not list(tmp_path.iterdir())
    open_tokens(tmp_path, small_model, mined, preprocess=preprocess, limit_gb=0.0009, progress=True)
    assert "0.000836 GB on disk" in capsys.readouterr().out


def test_a_killed_build_goes_on_and_other_things_get_other_stores(tmp_path, small_model, mined, monkeypatch):
    options = {"limit_gb": 1, "batch_size": 8, "progress": False}
    whole = open_tokens(tmp_path / "whole", small_model, mined, preprocess=training.Preprocess(56), **options)
    prefix, calls = small_model.backbone.prefix, []

    def failing(images):
        calls.append(len(images))
        if len(calls) == 4:
            raise Stopped
        return prefix(images)

    with monkeypatch.context() as patch:
        patch.setattr(small_model.backbone, "prefix", failing)
        patch.setattr("sagelib.describe.FLUSH_S", 0.0)
        with pytest.raises(Stopped):
            open_tokens(tmp_path / "cut", small_model, mined, preprocess=training.Preprocess(56), **options)
        calls.clear()
        patch.setattr(
            small_model.backbone, "prefix", lambda images: calls.append(len(images)) or prefix(images)
        )
        store = open_tokens(
            tmp_path / "cut", small_model, mined, preprocess=training.Preprocess(56), **options
        )
    assert sum(calls) == 1 + len(mined) - 16, (
        "what was flushed is not computed again (one image tells the shape)"
    )
    np.testing.assert_array_equal(store.values, whole.values)
    larger = open_tokens(tmp_path / "cut", small_model, mined, preprocess=training.Preprocess(70), **options)
    contrast = open_tokens(
        tmp_path / "cut", small_model, mined, preprocess=training.Preprocess(56, "antialias"), **options
    )
    assert len({store.path, larger.path, contrast.path}) == 3


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_no_data(tmp_path):
    config = tiny()
    with pytest.raises(ValueError, match="nothing to train on"):
        run_once(tmp_path, config)


def test_places_too_small_and_batches_too_large(tmp_path, mined, labelled):
    first = np.flatnonzero(labelled.place == labelled.place[0])
    thin = labelled[np.setdiff1d(np.arange(len(labelled)), first[1:])]
    few = len(np.unique(labelled.place))
    with pytest.raises(
        ValueError,
        match="of city '[^']*' has 1 images, fewer than images_per_place = 2.*small_places = 'leave_out'",
    ):
        run_once(tmp_path, tiny(), name="thin", labelled=thin)
    assert run_once(
        tmp_path, tiny(small_places="leave_out", epochs=1), name="left", labelled=thin
    ).run.finished
    with pytest.raises(ValueError, match=f"batch of {few + 1} places is larger than the set of {few} places"):
        run_once(tmp_path, tiny(places_per_batch=few + 1), name="large", labelled=labelled)
    with pytest.raises(ValueError, match="lower places_per_batch|room"):
        run_once(tmp_path, tiny(places_per_batch=100), name="huge", mined=mined)
    with pytest.raises(ValueError, match="carry no labels"):
        run_once(tmp_path, tiny(), name="none", labelled=mined)


def test_half_needs_two_sources_and_anchors_a_head_with_some(tmp_path, mined):
    with pytest.raises(ValueError, match="'half' needs both sources"):
        run_once(tmp_path, tiny(**HEAD, train_context="half"), name="half", mined=mined)
    with pytest.raises(ValueError, match="context is solo, but this model has no InteractHead"):
        run_once(tmp_path, tiny(graph_context="solo"), name="solo", mined=mined)
    with pytest.raises(ValueError, match="anchors asks for 999 training images, and there are 128"):
        run_once(tmp_path, tiny(**HEAD, train_context="anchors", anchors=999), name="anchors", mined=mined)


def test_a_loss_that_is_not_finite(tmp_path, mined):
    with pytest.raises(
        FloatingPointError, match=r"the loss is nan at step 2, with a learning rate of .*: lower lr"
    ):
        run_once(tmp_path, tiny(lr=1e30, lr_schedule="constant"), mined=mined)


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

    monkeypatch.setattr(training._Loop, "_embed", fails)
    with pytest.raises(
        MemoryError, match=r"3 places x 2 images.*56 pixels: set gradient_checkpointing.*\(now off\)"
    ):
        run_once(tmp_path, tiny(), mined=mined)


def test_the_command_says_one_sentence(tmp_path, town, capsys):
    parameters = tmp_path / "wrong.yaml"
    parameters.write_text(yaml.safe_dump({**TINY, "lr": -1.0}))
    assert training.main(command(parameters, town, tmp_path, "wrong")[3:]) == 1
    assert capsys.readouterr().err == "python -m sagelib.train: lr must be a number > 0, got -1.0\n"
    assert training.main(["--data", str(tmp_path), "--runs", str(tmp_path), "--name", "x"]) == 1
    assert "no set with a training part" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("a: [1", "cannot be read as YAML"),
        ("- 1", "must hold lines of the form FIELD: VALUE, and is a list"),
        ("aggregator_options: {foo: 1}", "no model can be built of these options: .*'foo'"),
        ("tau: -1.0e-9\nfallback: null", "lower places_per_batch by .*prune less"),
    ],
    ids=["no file", "no YAML", "a list", "a wrong option", "all pruned"],
)
def test_wrong_parameter_files_get_one_sentence(tmp_path, town, capsys, text, words):
    parameters = tmp_path / "file.yaml"
    if text is not None:
        parameters.write_text(text)
    pairs = [f"{key}={json.dumps(value)}" for key, value in TINY.items() if key not in (text or "")]
    arguments = command(parameters, town, tmp_path, "wrong")[3:]
    assert training.main([*arguments, "--set", *pairs]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(f"python -m sagelib.train: .*{words}.*", said), said


def test_the_command_tells_what_it_passes_over_and_that_it_was_stopped(tmp_path, town, capsys, monkeypatch):
    parameters = tmp_path / "file.yaml"
    parameters.write_text(yaml.safe_dump({**TINY, "dataset": "town", "learning_rate": 1e-3}))

    def stopped(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", stopped)
    assert training.main(command(parameters, town, tmp_path, "stopped")[3:]) == 130
    told = capsys.readouterr()
    assert "passed over dataset, learning_rate (no fields of a training)" in told.out
    assert "the same command goes on" in told.err


def test_a_town_that_is_not_there_or_not_whole_is_rendered(tmp_path, town, capsys, monkeypatch):
    parameters = tmp_path / "file.yaml"
    parameters.write_text(yaml.safe_dump(TINY))

    def render(data_folder, name, **named):
        shutil.copytree(town, data_folder / name, dirs_exist_ok=True)

    monkeypatch.setattr(training, "ensure_town", render)
    folder = tmp_path / "data" / "town-new"
    arguments = command(parameters, folder, tmp_path, "new")[3:]
    assert training.main(arguments) == 0
    (folder / "manifest.json").unlink()
    picture = min(folder.glob("images/train/database/*.jpg"))
    picture.unlink()
    assert training.main(arguments) == 0  # the whole town has the fingerprint of the finished run
    assert picture.exists()
    assert training.main(command(parameters, tmp_path / "streets", tmp_path, "none")[3:]) == 1
    assert "streets" in capsys.readouterr().err


def test_gsv_cities_and_msls_by_the_command(tmp_path, town, capsys):
    """Half of each batch from each; a city in two zones; the validation cities stay out, and alone they are refused."""
    labelled = make_sets.gsv_like(tmp_path, n_places=4)
    mined = make_sets.msls_like(tmp_path, cities=("zurich", "london", "cph", "sf"), n=24)
    parameters = tmp_path / "both.yaml"
    parameters.write_text(yaml.safe_dump({**TINY, **HEAD, "train_context": "half", "augment": 3}))
    rest = ["--validation", str(town), "--runs", str(tmp_path), "--name", "both", "--device", "cpu"]
    assert training.main([str(parameters), "--gsv", str(labelled), "--msls", str(mined), *rest]) == 0
    assert "train/both finished" in capsys.readouterr().out
    run = runs.load_run(tmp_path / "train" / "both")
    for line in run.read_log():
        if line["kind"] == "step":
            assert line["loss"] == pytest.approx(line["loss_labelled"] + line["loss_mined"])
        elif line["epoch"]:
            assert line["graph"]["mined"]["cities"] == 3  # Zurich, and London on both sides of Greenwich
            assert line["graph"]["mined"]["edges"] > 0 and line["graph"]["labelled"]["places"] == 8
    known = read_msls(mined, ["london", "zurich"])
    validation = open_set(town.parent, town.name, split="val")
    config = TrainConfig.from_mapping(yaml.safe_load(parameters.read_text()))
    data = {"mined": known, "labelled": read_gsv_cities(labelled), "validation": validation}
    assert open_run(tmp_path, "both", config, **data, device="cpu").finished, "trained on other pictures"

    held_out = make_sets.msls_like(tmp_path, cities=("cph", "sf"), name="held-out")
    assert training.main([str(parameters), "--msls", str(held_out), *rest[:-3], "refused"]) == 1
    assert "cph and sf are validation cities" in capsys.readouterr().err


def test_parameter_files_are_configurations():
    folder = Path(__file__).resolve().parent.parent / "notebooks" / "params"
    for path in folder.glob("*.yaml"):
        values = yaml.safe_load(path.read_text())
        TrainConfig.from_mapping({k: v for k, v in values.items() if k in TrainConfig.field_names()})


def test_log_lines_are_json_of_plain_numbers(learned):
    for line in (learned[2].run.dir / "log.jsonl").read_text().splitlines():
        assert json.loads(line)["kind"] in ("step", "epoch")


def test_zero_is_off_where_none_is():
    """A notebook's parameter cannot say None."""
    config = TrainConfig.from_mapping(
        {"augment": 0, "data_init": 0, "max_heading_deg": 0.0, "patience": 0, "warmup_steps": 0}
    )
    assert (config.augment, config.data_init, config.max_heading_deg, config.patience) == (None,) * 4
    assert config.warmup_steps == 0
