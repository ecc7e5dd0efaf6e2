"""What a bad week does to a command: killed at any moment, a full disk, no locks, nothing writable, a clock
that jumps. The same command completes, and its result is that of an undisturbed run.

A few kills of each kind by default; ``make test-faults`` does a hundred, and all kinds (``SAGE_KILLS=100``).
"""

import contextlib
import errno
import functools
import importlib.util
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from sagelib import describe, evaluate, retrieval, runs
from sagelib import train as training
from sagelib.images import Preprocess
from sagelib.model import SAGE
from sagelib.places import open_set, open_training_set
from sagelib.retrieval import PCA
from townscape.folder import write_town
from workbench import grids

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="SIGKILL, mount and fork are POSIX"),
    pytest.mark.timeout(3600),
]
NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
KILLS = int(os.environ.get("SAGE_KILLS", "0"))
SEEDS = {"train_seeds": (1000,), "val_seeds": (1100,), "test_seeds": (1110,)}
TINY = {
    "backbone": "test_vit",
    "pretrained": False,
    "adapter_blocks": 1,
    "aggregator_options": {"channels": 16, "probes": 8, "token_dim": 32, "hidden": 32},
    "interact": True,
    "interact_options": {"segment_width": 32, "heads": 4, "layers": 1, "ffn": 32},
    "train_context": "anchors",
    "anchors": 4,
    "image_size": 32,
    "validation_size": 32,
    "augment": 2,
    "places_per_batch": 3,
    "images_per_place": 2,
    "similar_places": 3,
    "min_clique": 2,
    "batches_per_epoch": 4,
    "epochs": 3,
    "patience": None,
    "log_every": 2,
    "checkpoint_every": 2,
    "tensorboard": False,
}


# -- the commands: each writes into `folder` alone, and reads the town ----------------------------------
def town_rendered(folder, town):
    write_town(folder / "town", **SEEDS, images_per_town=16, size=32, progress=False)


def _model() -> SAGE:
    torch.manual_seed(0)
    options = {"aggregator_options": TINY["aggregator_options"], "interact_options": TINY["interact_options"]}
    return SAGE("test_vit", pretrained=False, adapter_blocks=1, **options).eval()


HOW = {"preprocess": Preprocess(32), "batch_size": 2, "device": "cpu", "progress": False}


def _written(path: Path, values: dict) -> Path:
    return path if path.exists() else runs.write_text(path, yaml.safe_dump(values))


def described(folder, town):
    describe.FLUSH_S = 0.0  # every batch is recorded
    places = open_set(town.parent, town.name).database
    describe.describe(_model(), places, folder, context="sorted-4", **HOW)


def trained(folder, town):
    parameters = _written(folder / "parameters.yaml", TINY)
    options = ["--data", str(town), "--runs", str(folder), "--name", "a", "--device", "cpu"]
    return training.main([str(parameters), *options])


def reduced(folder, town):
    """Principal components of the training part, kept in a file; the test part is evaluated with them."""
    describe.FLUSH_S, model, file = 0.0, _model(), folder / "pca.safetensors"
    fitted_on = describe.describe(model, open_training_set(town.parent, town.name), folder / "d", **HOW)
    PCA.fit(fitted_on, 8).save(file)
    evaluate.evaluate(model, open_set(town.parent, town.name), folder, pca=PCA.load(file), **HOW)


def indexed(folder, town):
    """An index in four files."""
    retrieval._SHARD_ROWS = 5000
    retrieval.faiss.omp_set_num_threads(1)  # the sums of k-means have an order
    values = runs.rng(0, "rows").normal(size=(20_000, 32)).astype(np.float32)
    retrieval.open_index("IVF64,Flat", values, folder, {"of": "these"})


def measured(folder, town):
    grid, rows = folder / "two.yaml", {"full": {}, "uniform": {"prefer": "random"}}
    base = {**TINY, "epochs": 1, "augment": None, "cache_limit_gb": 1.0}
    keys = {"base": base, "reference": "full", "configurations": rows, "seeds": [0]}
    options = ["--data", str(town), "--runs", str(folder / "runs"), "--device", "cpu"]
    return grids.main([str(_written(grid, keys)), *options, "--export", str(folder / "small")])


def page_run(folder, town):
    """By papermill, in a kernel of its own."""
    specification = importlib.util.spec_from_file_location("reproduce", NOTEBOOKS / "reproduce.py")
    specification.loader.exec_module(reproduce := importlib.util.module_from_spec(specification))
    values = {"data_folder": str(town.parent), "dataset": town.name, "device": "cpu"}
    parameters = _written(folder / ".page.yaml", {**values, "runs_folder": str(folder / "runs")})
    return reproduce.main(["--parameters", str(parameters), "--out", str(folder / "out"), "--only", "01"])


KINDS = {f.__name__: f for f in (town_rendered, described, trained, reduced, indexed, measured, page_run)}
SHARES = dict(zip(KINDS, (15, 15, 15, 15, 15, 15, 10), strict=True))  # of a hundred kills
QUICK = [name for name in KINDS if name != "page_run"]  # whose commands start no other program


# -- what a folder holds --------------------------------------------------------------------------------
TIMED = ("wall_time_s", "images_per_s", "refresh_share", "training_s", "started", "finished", "rendered_now")
TIMED += ("waited", "git_commit")  # somebody may commit meanwhile


def _clean(value):
    if isinstance(value, dict):
        return {k: _clean(v) for k, v in value.items() if "seconds" not in k and k not in TIMED}
    return [_clean(v) for v in value] if isinstance(value, list) else value


def _read(path: Path):
    """What a file says, without times; an error where it is not whole."""
    if path.suffix == ".json":
        return json.dumps(_clean(json.loads(path.read_text())))
    if path.name == "log.jsonl":
        return json.dumps([_clean(row) for row in runs.load_run(path.parent).read_log()])
    if path.suffix == ".pt":
        assert training.read_checkpoint(path.parent) is not None
        return "a checkpoint"
    if path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            assert list(file.keys())
    elif path.suffix == ".npy":
        np.load(path)
    elif path.suffix in (".jpg", ".png"):
        Image.open(path).load()
    return path.read_bytes()


def contents(folder: Path) -> dict:
    """All that is readable under its own name, by its path: what begins with a dot is work in progress.

    Dates of PDFs, random names in plotly's pages and papermill's own copy of the page are left out.
    """
    paths = (path for path in folder.rglob("*") if path.is_file() and "checkpoints" not in path.parts)
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    names = {k: path for k, path in names.items() if not any(part[0] == "." for part in k.split("/"))}
    return {k: _read(path) for k, path in names.items() if path.suffix not in (".pdf", ".html", ".ipynb")}


def assert_nothing_half(folder: Path, whole: dict) -> None:
    """What is finished or cannot change is as in the undisturbed run; all other files can be read."""
    for path in folder.glob("**/checkpoints/[0-9]*.pt"):
        _read(path)
    for name, value in contents(folder).items():
        done = name.endswith("manifest.json") and '"status": "unfinished"' not in value
        if done or name.endswith((".npy", ".jpg", ".csv", ".faiss")):
            assert value == whole[name], f"{name} is not that of an undisturbed run"


# -- the processes: forked from one that has imported everything, so that a kill meets the work ----------
def _work(name: str, folder: Path, town: Path, patch=None, begun=None) -> tuple[str, float]:
    """One command, in a session of its own, with a silent terminal: what it complained of, and seconds."""
    os.setsid()
    began = time.perf_counter()
    if begun is not None:
        begun.set()
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    (patch or (lambda: None))()
    with contextlib.redirect_stdout(words := io.StringIO()), contextlib.redirect_stderr(words):
        code = KINDS[name](folder, town)
    return words.getvalue() if code else "", time.perf_counter() - began


@pytest.fixture(scope="module")
def forks():
    os.environ.setdefault("MPLBACKEND", "Agg")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sagelib.train", "workbench.grids", "papermill", "sklearn.decomposition"])
    return context


@pytest.fixture(scope="module")
def call(forks):
    """Call `_work` in a process that is not killed; its errors are raised here."""

    def call(*arguments):
        with ProcessPoolExecutor(1, mp_context=forks) as pool:
            return pool.submit(_work, *arguments).result()

    return call


@pytest.fixture(scope="module")
def town(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "tiny"
    return write_town(folder, **SEEDS, images_per_town=64, size=32, progress=False)


@pytest.fixture(scope="module")
def undisturbed(call, town, tmp_path_factory):
    """Of each kind: contents, seconds and bytes of a run that nothing disturbs; made when first asked for."""
    made = {}

    def undisturbed(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            words, seconds = call(name, folder, town)
            assert words == ""
            size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
            made[name] = contents(folder), seconds, size
        return made[name]

    return undisturbed


# -- kill -9 --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", KINDS if KILLS else QUICK)
def test_killed_at_random_moments(name, forks, call, town, undisturbed, tmp_path):
    whole, seconds, _ = undisturbed(name)
    wanted, kills, completed = KILLS * SHARES[name] // 100 or 2, 0, 0
    while kills < wanted or not completed:
        folder, begun = tmp_path / f"run{completed}", forks.Event()
        process = forks.Process(target=_work, args=(name, folder, town, None, begun))
        process.start()
        begun.wait(60)
        process.join(random.uniform(0, seconds) if kills < wanted else None)
        if process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):  # alone, or with all that it has started
                random.choice([os.kill, os.killpg])(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            assert_nothing_half(folder, whole)
            continue
        assert process.exitcode == 0, f"after {kills} kills it failed"
        found = contents(folder)
        assert found.keys() == whole.keys()
        assert [k for k in whole if found[k] != whole[k]] == [], f"changed by one of {kills} kills"
        completed += 1
    print(f"{name}: {kills} kills, {completed} times completed, equal to an undisturbed run each time")


# -- disks, locks, clocks -------------------------------------------------------------------------------
@pytest.fixture
def disk(tmp_path):
    """A small disk, and a function that mounts it, or makes it larger or read-only."""
    folder, how = tmp_path / "disk", []
    folder.mkdir()

    def mount(options: str):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join([*how, options]), "tmpfs", folder])
        if done.returncode:
            pytest.skip("this machine lets no one mount")
        how[:] = ["remount"]
        return folder

    yield mount
    subprocess.run(["umount", "--lazy", folder], stderr=subprocess.DEVNULL)


def complaint(call, *arguments) -> str:
    """The line in which a command says what fails, or the whole of an error's text; "" where all is well."""
    try:
        words = call(*arguments)[0]
        assert "Traceback" not in words
        return "".join(re.findall(".*(?:No space|no room|Read-only).*", words)) or words
    except (OSError, ValueError) as error:
        return str(error)


@pytest.mark.parametrize("name", KINDS if KILLS else QUICK)
def test_a_full_disk_is_one_sentence_and_with_room_it_goes_on(name, call, town, undisturbed, disk):
    whole, _, size = undisturbed(name)
    sentences = []
    for share in (0.0, 0.1, 0.4, 0.8, 20) if KILLS and name in QUICK else (0.3, 20):
        folder = disk(f"size={int(share * size) + 32768}" if share < 1 else "size=100m") / "run"
        sentences.append(complaint(call, name, folder, town))
        assert_nothing_half(folder, whole)
    print(f"{name}: {sum(map(bool, sentences))} times on a full disk, then with room")
    assert sentences[0] and not sentences[-1] and contents(folder) == whole
    for sentence in filter(None, sentences):
        assert "\n" not in sentence and str(folder) in sentence
        assert "no room" in sentence or "No space left" in sentence


@pytest.mark.parametrize("name", QUICK if KILLS else ["described", "trained"])
def test_what_is_read_needs_no_writing(name, call, town, undisturbed, disk, tmp_path):
    """Data lie on a read-only disk; finished results do, and are read; work that is begun there says so."""
    disk("size=100m")
    data, run, fresh = (tmp_path / "disk" / part for part in (town.name, "run", "fresh"))
    shutil.copytree(town, data)
    disk("ro")
    assert complaint(call, name, tmp_path / "run", data) == ""
    assert contents(tmp_path / "run") == undisturbed(name)[0]
    disk("rw")
    shutil.copytree(tmp_path / "run", run)
    fresh.mkdir()
    disk("ro")
    again, begun = (complaint(call, name, folder, data) for folder in (run, fresh))
    writes = name in ("reduced", "measured")  # a file of components, and an export, each time
    assert ("Read-only" in again) if writes else again == ""
    assert f"Read-only file system: '{fresh}" in begun and "\n" not in begun


def no_locks(number: int) -> None:
    import fcntl

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    fcntl.flock = refuse


def another_time() -> None:
    runs.now = lambda: "1970-01-01T00:00:00+00:00"


def killed_once(forks, seconds: float, *arguments) -> None:
    process = forks.Process(target=_work, args=arguments)
    process.start()
    process.join(seconds)
    process.kill()
    process.join()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_folder_without_locks(number, forks, call, town, undisturbed, tmp_path):
    """Some network disks have none; a process that was killed there must not keep the next one out."""
    whole, seconds, _ = undisturbed("described")
    arguments = ("described", tmp_path / "run", town, functools.partial(no_locks, number))
    killed_once(forks, seconds / 2, *arguments)
    assert complaint(call, *arguments) == "" and contents(tmp_path / "run") == whole


@pytest.mark.parametrize("seconds", [0, 4e9])
@pytest.mark.parametrize("name", QUICK if KILLS else ["trained"])
def test_a_clock_that_jumps(name, seconds, forks, call, town, undisturbed, tmp_path):
    """Files come from 1970 or 2096, and the rest is done in 1970: nothing goes by a file's age."""
    whole, duration, _ = undisturbed(name)
    killed_once(forks, duration / 2, name, tmp_path / "run", town)
    for path in (tmp_path / "run").rglob("*"):
        os.utime(path, (seconds, seconds))
    assert complaint(call, name, tmp_path / "run", town, another_time) == ""
    assert contents(tmp_path / "run") == whole
