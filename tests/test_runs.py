"""Runs: files are whole or absent, seeds name their streams, a directory belongs to one configuration."""

import dataclasses
import datetime
import errno
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagelib.runs import (
    Run,
    RunConflict,
    alone,
    atomic_path,
    check,
    differences,
    find_runs,
    fingerprint,
    load_run,
    read_json,
    rng,
    save_array,
    torch_seed,
    write_json,
    write_text,
)


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "result.json"
    with atomic_path(target) as temporary:
        temporary.write_text("half")
        assert not target.exists() and temporary.parent == target.parent
        assert temporary.suffix == ".json" and temporary.name.startswith(".")
    assert target.read_text() == "half" and [p.name for p in target.parent.iterdir()] == ["result.json"]
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as temporary:
        temporary.write_text("new")
        raise KeyboardInterrupt
    assert target.read_text() == "half" and [p.name for p in target.parent.iterdir()] == ["result.json"]


def test_a_killed_write_leaves_no_file_of_that_name(tmp_path):
    code = (
        "import os, sys; from sagelib.runs import atomic_path\n"
        "with atomic_path(sys.argv[1]) as t: t.write_text('half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.txt")]).returncode == 9
    assert [p.name.startswith(".tmp-") for p in tmp_path.iterdir()] == [True]


def test_json_says_what_numpy_and_paths_say(tmp_path):
    @dataclasses.dataclass
    class Options:
        size: tuple = (2, 3)

    thing = {
        "numbers": [np.float32(0.5), np.bool_(True), np.arange(3), {3, 1}],
        "dates": (np.datetime64("2020-01-02"), datetime.date(2020, 1, 2)),
        "path": Path("x/y"),
        "options": Options(),
        "nan": float("nan"),
        "ü": None,
    }
    back = read_json(write_json(tmp_path / "a.json", thing))
    assert np.isnan(back.pop("nan"))
    assert back == {
        "numbers": [0.5, True, [0, 1, 2], [1, 3]],
        "dates": ["2020-01-02", "2020-01-02"],
        "path": str(Path("x/y")),
        "options": {"size": [2, 3]},
        "ü": None,
    }
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        write_json(tmp_path / "b.json", {"a": object()})
    assert not (tmp_path / "b.json").exists()
    (tmp_path / "c.json").write_text('{"a": 1,\n "b": }')
    with pytest.raises(ValueError, match=r"c\.json: not JSON \(.*: line 2 column 7 "):
        read_json(tmp_path / "c.json")


def test_arrays_are_saved_and_never_pickled(tmp_path):
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    back = np.load(save_array(tmp_path / "a.npy", array))
    assert back.dtype == array.dtype and (back == array).all()
    with pytest.raises(ValueError):
        save_array(tmp_path / "b.npy", np.array([object()]))
    assert not (tmp_path / "b.npy").exists()


def test_one_process_at_a_time(tmp_path):
    code = "import sys; from sagelib.runs import alone\nwith alone(sys.argv[1]): print('second', flush=True)"
    with alone(tmp_path):
        other = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(1.5)
    assert other.communicate(timeout=60)[0] == "second\n"


def test_without_locks_the_work_goes_on_with_a_warning(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("sagelib.runs.FileLock.acquire", refuse)
    worked = False
    with pytest.warns(UserWarning, match="no locks here .*No locks available"), alone(tmp_path):
        worked = True
    assert worked


@pytest.mark.parametrize(
    ("value", "options", "words"),
    [
        (0, {"low": 1, "whole": True, "none": True}, "a whole number of at least 1, or None, got 0"),
        (True, {"low": 0}, "a number of at least 0, got True"),
        (float("nan"), {"low": 0, "high": 1}, "a number from 0 to 1, got nan"),
        (0.0, {"above": 0, "high": 1}, "a number above 0 and at most 1, got 0.0"),
        (2.5, {"high": 2}, "a number of at most 2, got 2.5"),
        ("c", {"choices": ("a", "b")}, "one of a, b, got 'c'"),
    ],
)
def test_a_value_out_of_its_range_is_named_with_the_range(value, options, words):
    with pytest.raises(ValueError, match=f"x must be {words}"):
        check("x", value, **options)
    assert check("x", 1, 0, 1, whole=True) == 1 and check("x", None, none=True) is None


def test_streams_depend_on_seed_and_names_alone():
    base = rng(0, "sampler", 3).random(4)
    np.random.seed(1)  # noqa: NPY002 (the global state must not matter)
    assert (rng(0, "sampler", 3).random(4) == base).all()
    others = [(1, "sampler", 3), (0, "sampler", "3"), (0, 3, "sampler"), (0, "sampler"), (0, "sampler3")]
    assert all((rng(*names).random(4) != base).any() for names in others)
    assert rng(0, "x", 2).random() == rng(np.int64(0), "x", np.int64(2)).random()
    # Recorded numbers: a change of the derivation would change every seeded result of a user.
    assert rng(0, "sampler", 3).integers(0, 2**32, 3).tolist() == [2360216591, 1367103415, 2969358758]
    assert torch_seed(0, "augment", 1, 2) == 4038901944437503147
    for seed in (-1, 0.5):
        with pytest.raises(ValueError, match=f"seed must be a whole number of at least 0, got {seed}"):
            rng(seed)


@given(st.integers(0, 2**63), st.lists(st.text(max_size=5) | st.integers(-5, 5), max_size=3))
def test_torch_seeds_fit(seed, names):
    value = torch_seed(seed, *names)
    assert 0 <= value < 2**63 and value == torch_seed(seed, *names)


def test_fingerprints_follow_meaning():
    config = {"lr": 1, "sizes": (1, 2), "name": "x", "nested": {"a": None}}
    same = {"nested": {"a": None}, "name": "x", "sizes": [1.0, 2], "lr": 1.0}
    assert fingerprint(config) == fingerprint(same) == "be299cf5a3610b53"  # recorded in runs
    changes = [{"lr": 2}, {"lr": True}, {"lr": "1"}, {"sizes": [2, 1]}, {"nested": {"a": 0}}, {"other": None}]
    assert len({fingerprint(config | change) for change in changes} | {fingerprint(config)}) == 7
    assert fingerprint(["ab"]) != fingerprint(["a", "b"]) != fingerprint([["a"], "b"])
    assert fingerprint(np.float64(0.5)) == fingerprint(0.5)


def test_fingerprints_of_arrays(tmp_path):
    array = np.random.default_rng(0).normal(size=(1000, 7)).astype(np.float32)
    save_array(tmp_path / "a.npy", array)
    assert fingerprint(np.load(tmp_path / "a.npy", mmap_mode="r")) == fingerprint(array)
    assert fingerprint(array[:, ::-1][:, ::-1]) == fingerprint(array)  # strides do not matter
    changed = array.copy()
    changed[-1, -1] += 1
    variants = [changed, array.reshape(7, 1000), array.astype(np.float64), array.T, array[:0]]
    assert len({fingerprint(v) for v in [*variants, array.tobytes(), array]}) == 7
    assert fingerprint(np.array(["a", "b"], dtype=object)) == fingerprint(["a", "b"])


CONFIG = {"lr": 1e-3, "model": {"width": 192, "sizes": (1, 2)}}


def test_a_run_is_made_finished_and_found_again(tmp_path):
    run = Run.open(tmp_path, "train", "first", CONFIG, seed=3, data_fingerprint="abc", device="cpu")
    assert run.dir == tmp_path / "train" / "first" and not run.finished
    assert find_runs(tmp_path) == [] and len(find_runs(tmp_path, finished=None)) == 1
    assert [r.name for r in find_runs(tmp_path, finished=False)] == ["first"]
    run.finish({"r1": np.float64(42.5)})
    again = Run.open(tmp_path, "train", "first", CONFIG, seed=3, data_fingerprint="abc", device="cuda")
    assert again.finished and again.metrics == {"r1": 42.5} and again.manifest["device"] == "cpu"
    keys = "stage name config config_hash seed data_fingerprint git_commit versions device platform started"
    assert set(again.manifest) == {*keys.split(), "finished", "wall_time_s", "status", "metrics"}
    assert again.manifest["versions"]["numpy"] == np.__version__
    assert again.wall_time_s >= 0 and again.config["model"]["sizes"] == [1, 2]
    with pytest.raises(ValueError, match="already finished"):
        again.finish({})
    assert [r.dir for r in find_runs(tmp_path, "train")] == [run.dir] and not find_runs(tmp_path, "evaluate")
    assert load_run(run.dir).manifest == again.manifest
    with pytest.raises(FileNotFoundError, match="holds no run"):
        load_run(tmp_path)


def test_a_run_that_failed_before_its_first_line_may_be_corrected(tmp_path):
    Run.open(tmp_path, "train", "first", {"adapter": "nosuch"})
    run = Run.open(tmp_path, "train", "first", {"adapter": "dpn"}, seed=3)
    assert load_run(run.dir).config == {"adapter": "dpn"} and run.manifest["seed"] == 3
    run.log({"step": 1})
    with pytest.raises(RunConflict):
        Run.open(tmp_path, "train", "first", {"adapter": "lora"}, seed=3)
    Run.open(tmp_path, "train", "done", {"lr": 1.0}).finish()
    with pytest.raises(RunConflict):
        Run.open(tmp_path, "train", "done", {"lr": 2.0})


def test_another_configuration_is_refused_by_its_keys(tmp_path):
    Run.open(tmp_path, "train", "first", CONFIG, seed=0).log({"step": 1})
    other = {"lr": 0.002, "model": {"width": 192, "sizes": [1, 3]}, "new": 1}
    with pytest.raises(RunConflict) as caught:
        Run.open(tmp_path, "train", "first", other, seed=1)
    sentence = str(caught.value)
    for part in ("lr: 0.001 -> 0.002", "model.sizes: [1, 2] -> [1, 3]", "new: None -> 1", "seed: 0 -> 1"):
        assert part in sentence
    assert "width" not in sentence and isinstance(caught.value, ValueError)
    with pytest.raises(RunConflict, match="data_fingerprint: None -> 'other'"):
        Run.open(tmp_path, "train", "first", CONFIG, seed=0, data_fingerprint="other")
    assert not Run.open(tmp_path, "train", "first", CONFIG, seed=0).finished  # the refused changed nothing
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 1.0, "d": 3}}) == [
        ("a.d", None, 3),
        ("c", 2, None),
    ]


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a\\b", "a:b"])
def test_names_are_folder_names(tmp_path, name):
    with pytest.raises(ValueError, match="name of a run must be one plain folder name"):
        Run.open(tmp_path, "train", name, {})
    with pytest.raises(ValueError, match="stage of a run must be one plain folder name"):
        Run.open(tmp_path, name, "x", {})


def test_the_log_survives_a_kill(tmp_path):
    run = Run.open(tmp_path, "train", "first", {})
    run.log({"step": 1, "loss": np.float32(0.5)})
    run.log({"step": 2, "loss": float("nan")})
    with open(run.path("log.jsonl"), "a") as stream:
        stream.write('{"step": 3, "lo')  # killed in the middle of a line
    assert [row["step"] for row in load_run(run.dir).read_log()] == [1, 2]
    again = Run.open(tmp_path, "train", "first", {})
    again.log({"step": 3})
    assert [row["step"] for row in again.read_log()] == [1, 2, 3]
    run.path("log.jsonl").write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2: not a JSON line"):
        load_run(run.dir)


def test_wall_time_goes_on_after_a_resume(tmp_path):
    run = Run.open(tmp_path, "train", "first", {})
    write_text(run.path("log.jsonl"), '{"step": 1, "wall_time_s": 40.0}\n{"step": 2, "wall_time_s": 100.0}\n')
    Run.open(tmp_path, "train", "first", {}).finish()
    assert 100 <= load_run(run.dir).wall_time_s < 160
