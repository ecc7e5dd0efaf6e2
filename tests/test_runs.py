"""Runs: files are whole or absent, seeds name their streams, a directory belongs to one configuration."""

import dataclasses
import datetime
import errno
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagelib.runs import (
    NOTEBOOKS,
    Run,
    RunConflict,
    alone,
    atomic_path,
    check_parameters,
    compare_runs,
    describe_run,
    find_runs,
    fingerprint,
    load_run,
    read_json,
    rng,
    save_array,
    start_page,
    torch_seed,
    write_json,
    write_text,
)

# ---------------------------------------------------------------------------------------------------
# Whole or absent
# ---------------------------------------------------------------------------------------------------


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "result.json"
    with atomic_path(target) as temporary:
        temporary.write_text("half")
        assert not target.exists() and temporary.parent == target.parent
        assert temporary.suffix == ".json" and temporary.name.startswith(".")
    assert target.read_text() == "half" and [p.name for p in target.parent.iterdir()] == ["result.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    target = write_text(tmp_path / "a.txt", "old")
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as temporary:
        temporary.write_text("new")
        raise KeyboardInterrupt
    assert target.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_killed_write_leaves_no_file_of_that_name(tmp_path):
    code = (
        "import os, sys; from sagelib.runs import atomic_path\n"
        "with atomic_path(sys.argv[1]) as t: t.write_text('half'); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.txt")]).returncode == 9
    assert not (tmp_path / "a.txt").exists()
    assert [p.name.startswith(".tmp-") for p in tmp_path.iterdir()] == [True]


def test_json_says_what_numpy_and_paths_say(tmp_path):
    @dataclasses.dataclass
    class Options:
        size: tuple = (2, 3)

    thing = {
        "a": np.float32(0.5),
        "b": np.arange(3),
        "c": Path("x/y"),
        "d": Options(),
        "e": {3, 1},
        "f": np.datetime64("2020-01-02"),
        "g": datetime.date(2020, 1, 2),
        "h": np.bool_(True),
        "i": float("nan"),
        "ü": None,
    }
    back = read_json(write_json(tmp_path / "a.json", thing))
    assert np.isnan(back.pop("i"))
    assert back == {
        "a": 0.5,
        "b": [0, 1, 2],
        "c": str(Path("x/y")),
        "d": {"size": [2, 3]},
        "e": [1, 3],
        "f": "2020-01-02",
        "g": "2020-01-02",
        "h": True,
        "ü": None,
    }
    with pytest.raises(ValueError, match="cannot be written as JSON"):
        write_json(tmp_path / "b.json", {"a": object()})
    assert not (tmp_path / "b.json").exists()
    (tmp_path / "c.json").write_text('{"a": 1,\n "b": }')
    with pytest.raises(ValueError, match=r"c\.json, line 2, column 7: not JSON"):
        read_json(tmp_path / "c.json")


def test_arrays_are_saved_under_their_name(tmp_path):
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    back = np.load(save_array(tmp_path / "a.npy", array))
    assert back.dtype == array.dtype and (back == array).all()
    with pytest.raises(ValueError, match=r"ends in \.npy, got 'a\.npz'"):
        save_array(tmp_path / "a.npz", array)
    with pytest.raises(ValueError):
        save_array(tmp_path / "b.npy", np.array([object()]))
    assert not (tmp_path / "b.npy").exists()


# ---------------------------------------------------------------------------------------------------
# Streams and fingerprints
# ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no lock on a directory")
def test_without_locks_the_work_goes_on_with_a_warning(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match="gives no locks .No locks available."), alone(tmp_path):
        worked = True
    assert worked


def test_streams_depend_on_seed_and_names_alone():
    base = rng(0, "sampler", 3).random(4)
    np.random.seed(1)  # noqa: NPY002 (the global state must not matter)
    assert (rng(0, "sampler", 3).random(4) == base).all()
    others = [
        rng(1, "sampler", 3),
        rng(0, "sampler", "3"),
        rng(0, 3, "sampler"),
        rng(0, "sampler"),
        rng(0, "sampler3"),
    ]
    assert all((other.random(4) != base).any() for other in others)
    assert rng(0, "x").random() == rng(np.int64(0), "x").random()


def test_streams_are_the_same_everywhere():
    # Recorded numbers: a change of the derivation would change every seeded result of a user.
    assert rng(0, "sampler", 3).integers(0, 2**32, 3).tolist() == [2360216591, 1367103415, 2969358758]
    assert torch_seed(0, "augment", 1, 2) == 4038901944437503147


@settings(deadline=None)
@given(st.integers(0, 2**63), st.lists(st.text(max_size=5) | st.integers(-5, 5), max_size=3))
def test_torch_seeds_fit(seed, names):
    value = torch_seed(seed, *names)
    assert 0 <= value < 2**63 and value == torch_seed(seed, *names)


def test_seeds_out_of_range():
    with pytest.raises(ValueError, match="seed must be an integer >= 0, got -1"):
        rng(-1)
    with pytest.raises(TypeError):
        rng(0.5)


def test_fingerprints_follow_meaning():
    config = {"lr": 1, "sizes": (1, 2), "name": "x", "nested": {"a": None}}
    same = {"nested": {"a": None}, "name": "x", "sizes": [1.0, 2], "lr": 1.0}
    assert fingerprint(config) == fingerprint(same) and len(fingerprint(config)) == 16
    changes = [{"lr": 2}, {"lr": True}, {"lr": "1"}, {"sizes": [2, 1]}, {"nested": {"a": 0}}, {"other": None}]
    assert len({fingerprint(config | change) for change in changes} | {fingerprint(config)}) == 7
    assert fingerprint(["ab"]) != fingerprint(["a", "b"]) != fingerprint([["a"], "b"])


def test_fingerprints_of_arrays(tmp_path):
    array = np.random.default_rng(0).normal(size=(1000, 7)).astype(np.float32)
    save_array(tmp_path / "a.npy", array)
    assert fingerprint(np.load(tmp_path / "a.npy", mmap_mode="r")) == fingerprint(array)
    assert fingerprint(array[:, ::-1][:, ::-1]) == fingerprint(array)  # strides do not matter
    changed = array.copy()
    changed[-1, -1] += 1
    variants = [
        changed,
        array.reshape(7, 1000),
        array.astype(np.float64),
        array.T,
        array[:0],
        array.tobytes(),
    ]
    assert len({fingerprint(v) for v in variants} | {fingerprint(array)}) == 7
    assert fingerprint(np.array(["a", "b"], dtype=object)) == fingerprint(["a", "b"])


# ---------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------

CONFIG = {"lr": 1e-3, "model": {"width": 192, "sizes": (1, 2)}}


def test_a_run_is_made_finished_and_found_again(tmp_path):
    run = Run.open(tmp_path, "train", "first", CONFIG, seed=3, data_fingerprint="abc", device="cpu")
    assert run.dir == tmp_path / "train" / "first" and not run.finished
    assert find_runs(tmp_path) == []
    write_text(run.path("tables", "a.csv"), "x")
    run.finish({"r1": np.float64(42.5)})
    again = Run.open(tmp_path, "train", "first", CONFIG, seed=3, data_fingerprint="abc", device="cuda")
    assert again.finished and again.metrics == {"r1": 42.5} and again.manifest["device"] == "cpu"
    keys = "stage name config config_hash seed data_fingerprint git_commit versions device platform started"
    assert set(again.manifest) == {*keys.split(), "finished", "wall_time_s", "status", "metrics"}
    assert again.manifest["versions"]["numpy"] == np.__version__
    assert again.wall_time_s >= 0 and again.config["model"]["sizes"] == [1, 2]
    with pytest.raises(ValueError, match="already finished"):
        again.finish({})
    assert [r.dir for r in find_runs(tmp_path, "train")] == [run.dir] and find_runs(
        tmp_path, "evaluate"
    ) == []
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


def test_parameters_of_a_page_are_checked_against_their_types_and_least_values():
    page = {"__annotations__": {"epochs": int, "lr": float, "name": str, "head": bool}}
    page |= {"epochs": 3, "lr": 1, "name": "a", "head": True}
    check_parameters(page, epochs=1, lr=0)
    for wrong, sentence in (
        ({"epochs": 2.5}, "epochs must be a whole number, got 2.5"),
        ({"epochs": True}, "epochs must be a whole number, got True"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"lr": "fast"}, "lr must be a number, got 'fast'"),
        ({"lr": float("nan")}, "lr must be at least 0, got nan"),
        ({"name": 3}, "name must be a text, got 3: on papermill's command line write -r name 3"),
        ({"head": "yes"}, "head must be true or false, got 'yes'"),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            check_parameters(page | wrong, epochs=1, lr=0)
    with pytest.raises(ValueError, match="name must be one of b, c, got 'a'"):
        check_parameters(page, name=("b", "c"))
    with pytest.raises(ValueError, match="epochs must be one of 1 to 2, got 3"):
        check_parameters(page, epochs=range(1, 3))


def test_another_configuration_is_refused_by_its_keys(tmp_path):
    Run.open(tmp_path, "train", "first", CONFIG, seed=0).log({"step": 1})
    with pytest.raises(RunConflict) as caught:
        Run.open(
            tmp_path,
            "train",
            "first",
            {"lr": 0.002, "model": {"width": 192, "sizes": [1, 3]}, "new": 1},
            seed=1,
        )
    sentence = str(caught.value)
    for part in ("lr: 0.001 -> 0.002", "model.sizes: [1, 2] -> [1, 3]", "new: None -> 1", "seed: 0 -> 1"):
        assert part in sentence
    assert "width" not in sentence and isinstance(caught.value, ValueError)
    with pytest.raises(RunConflict, match="data_fingerprint: None -> 'other'"):
        Run.open(tmp_path, "train", "first", CONFIG, seed=0, data_fingerprint="other")
    assert not Run.open(
        tmp_path, "train", "first", CONFIG, seed=0
    ).finished  # the refused ones changed nothing


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
    again = Run.open(tmp_path, "train", "first", {})
    assert [row["step"] for row in again.read_log()] == [1, 2]
    again.log({"step": 3})
    assert [row["step"] for row in again.read_log()] == [1, 2, 3]
    run.path("log.jsonl").write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(ValueError, match=r"log\.jsonl, line 2: not a JSON line"):
        load_run(run.dir)


def test_wall_time_goes_on_after_a_resume(tmp_path):
    run = Run.open(tmp_path, "train", "first", {})
    write_text(run.path("log.jsonl"), '{"step": 1, "wall_time_s": 40.0}\n{"step": 2, "wall_time_s": 100.0}\n')
    again = Run.open(tmp_path, "train", "first", {})
    again.finish()
    assert 100 <= load_run(run.dir).wall_time_s < 160


def test_runs_are_described_and_compared(tmp_path):
    a = Run.open(tmp_path, "train", "a", {"lr": 1, "model": {"width": 192}})
    b = Run.open(tmp_path, "train", "b", {"lr": 2, "model": {"width": 192}}, seed=5)
    a.finish({"r1": 40, "n": 3})
    b.finish({"r1": 50, "n": 3})
    assert compare_runs(a, b) == [
        {"key": "seed", "a": None, "b": 5},
        {"key": "config.lr", "a": 1, "b": 2},
        {"key": "metrics.r1", "a": 40, "b": 50},
    ]
    text = describe_run(load_run(a.dir))
    assert "train/a  finished" in text and "config.model.width" in text and "metrics.r1" in text


def test_unfinished_runs_are_not_read_as_results(tmp_path):
    Run.open(tmp_path, "train", "a", {})
    Run.open(tmp_path, "train", "b", {}).finish()
    assert [r.name for r in find_runs(tmp_path)] == ["b"]
    assert [r.name for r in find_runs(tmp_path, finished=False)] == ["a"]
    assert [r.name for r in find_runs(tmp_path, finished=None)] == ["a", "b"]


def test_figures_are_saved_with_their_numbers(tmp_path):
    import pandas
    from matplotlib.figure import Figure

    run = Run.open(tmp_path, "train", "a", {})
    figure = Figure(figsize=(1, 1))
    figure.add_subplot().plot([0, 1])
    written = run.save_figure(figure, "loss", numbers=pandas.DataFrame({"x": [1, 2]}))
    assert [p.name for p in written] == ["loss.png", "loss.pdf", "loss.csv"]
    assert written[0].read_bytes().startswith(b"\x89PNG") and written[1].read_bytes().startswith(b"%PDF")
    assert written[2].read_text().split() == ["x", "1", "2"]
    assert run.save_figure(figure, "map", numbers={"a": np.arange(2)})[-1].name == "map.json"
    assert {p.name for p in (run.dir / "figures").iterdir()} == {p.name for p in written} | {
        "map.png",
        "map.pdf",
        "map.json",
    }
    with pytest.raises(ValueError, match="needs savefig or write_html, got a int"):
        run.save_figure(3, "none")


def test_plotly_figures_are_pages(tmp_path):
    class Page:  # plotly's two methods; a machine without its browser fails at the second
        def write_html(self, path, include_plotlyjs):
            assert include_plotlyjs is True  # the page is read without a network
            Path(path).write_text("<html>")

        def write_image(self, path, scale):
            Path(path).write_bytes(b"half a picture")
            raise RuntimeError("no browser")

    run = Run.open(tmp_path, "train", "a", {})
    assert [p.name for p in run.save_figure(Page(), "graph")] == ["graph.html"]
    assert [p.name for p in (run.dir / "figures").iterdir()] == ["graph.html"]


def test_a_page_starts_in_the_checkout_and_stops_at_an_unknown_parameter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = {"__annotations__": {"epochs": int}, "epochs": 1}
    start_page(page | {"In": ["", "epochs: int = 1", "# Parameters\nepochs = 1\n"]})
    assert Path.cwd() == NOTEBOOKS and (NOTEBOOKS / "01_data_exploration.ipynb").is_file()
    with pytest.raises(ValueError, match="this page has no parameter epoch; it has epochs"):
        start_page(page | {"In": ["", "epochs: int = 1", "# Parameters\nepoch = 1\nepochs = 1\n"]})
