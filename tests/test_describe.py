"""Description: equal bytes after a kill, batches of contexts, stores found by their key, the first model."""

import os
import runpy
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launch import outputs, start_two
from PIL import Image

from sagelib import describe as describe_module
from sagelib.describe import (
    Context,
    Descriptors,
    GreyPixels,
    baseline_pixels,
    choose_anchors,
    compose,
    describe,
    describe_batch,
    model_fingerprint,
    names_in_order,
    pick_device,
    pictures_fingerprint,
    preprocess_of,
)
from sagelib.images import Preprocess, load_image
from sagelib.interact import InteractHead
from sagelib.places import Places, folder_name, read_folder

N = 11
QUIET = {"device": "cpu", "progress": False}


def write_pictures(folder, n=N, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    paths = [folder / f"@{i * 1000}@0@@@@@{i:04d}@@@@@@@@.png" for i in range(n)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(path)
    return Places.build(paths, east_m=np.arange(n) * 1000.0, north_m=np.zeros(n))


@pytest.fixture
def places(tmp_path):
    return write_pictures(tmp_path / "pictures")


class Headed(torch.nn.Module):
    """A stand-in for SAGE: a random projection of pixels, and a small real InteractHead."""

    preprocess = Preprocess(14)
    fingerprint = "headed"

    def __init__(self, width=32, head=True):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.project = torch.nn.Linear(3 * 14 * 14, width)
            self.head = InteractHead(width, segment_width=16, heads=2, ffn=32) if head else None
        self.embedded = 0

    @property
    def has_head(self):
        return self.head is not None

    def embed(self, images):
        self.embedded += len(images)
        return torch.nn.functional.normalize(self.project(images.flatten(1)), dim=1)

    def interact(self, descriptors, anchors=None):
        return self.head(descriptors, anchors)


# --------------------------------------------------------------------------------------------------- context
@pytest.mark.parametrize("text", ["none", "solo", "sorted-8", "shuffled-32", "anchors"])
def test_context_reads_and_writes(text):
    assert str(Context.parse(text)) == text
    assert Context.parse(Context.parse(text)) == Context.parse(text)


@pytest.mark.parametrize("text", ["sorted", "shuffled-0", "solo-3", "batch-8", "Sorted 8"])
def test_context_refuses(text):
    with pytest.raises(ValueError, match=f"context '{text}' is unknown; it is none, solo, anchors, or"):
        Context.parse(text)


def test_sorted_batches_follow_the_names_and_the_last_is_short():
    names = ["d/@0@30@.jpg", "d/@0@1000@.jpg", "d/@0@20@.jpg", "d/@0@100@.jpg", "d/@0@5@.jpg"]
    batches = Context.parse("sorted-2").batches(names)
    # As strings: "@0@1000@" before "@0@100@" ('0' < '@'), and both before "@0@20@".
    assert [b.tolist() for b in batches] == [[1, 3], [2, 0], [4]]


def test_shuffled_batches_depend_on_seed_and_set_but_not_on_the_order_given():
    names = [f"database/{i:03d}.jpg" for i in range(50)]

    def composed(names, seed, loader="database"):
        batches = Context.parse("shuffled-8").batches(names, seed=seed, loader=loader)
        return [[names[i] for i in batch] for batch in batches]

    first = composed(names, 0)
    assert [len(b) for b in first] == [8] * 6 + [2]
    assert sorted(sum(first, [])) == names
    assert first == composed(names[::-1], 0)
    assert first == [[n.removeprefix("/x/") for n in b] for b in composed([f"/x/{n}" for n in names], 0)]
    assert first != composed(names, 1)
    # As many queries with the same names are shuffled in another way: like batches must not meet.
    assert first != composed(names, 0, "queries")


def test_pictures_of_msls_as_downloaded_sort_by_their_converted_names():
    files, keys, east = ["m/zz.jpg", "m/aa.jpg"], ["zz", "aa"], np.array([500000.0, 600000.0])
    names = names_in_order(
        Places.build(files, east_m=east, north_m=[5e6, 5e6], key=keys, sequence=["s", "s"])
    )
    assert names == [folder_name(e, 5e6, pano_id=k) for e, k in zip(east, keys, strict=True)]
    assert [b.tolist() for b in Context.parse("sorted-1").batches(names)] == [[0], [1]]
    assert names_in_order(Places.build(files, east_m=east, north_m=[5e6, 5e6])) == files


# -------------------------------------------------------------------------------------------------- describe
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_descriptors_are_those_of_the_model(places, tmp_path, dtype):
    model, before = Headed(), torch.random.get_rng_state()
    d = describe(model, places, tmp_path / "d", batch_size=4, dtype=dtype, **QUIET)
    assert torch.equal(before, torch.random.get_rng_state())
    images = torch.stack([model.preprocess(load_image(p)) for p in places.path])
    expected = describe_batch(model, images).numpy()
    np.testing.assert_array_equal(expected, model.embed(images).detach().numpy())
    assert d.values.dtype == dtype and d.values.shape == (N, 32) and len(d) == N
    np.testing.assert_allclose(d.values, expected, atol=1e-6 if dtype == "float32" else 1e-3)
    assert (d.context, d.manifest["dtype"], d.manifest["skipped"]) == ("none", dtype, [])
    assert d.manifest["preprocess"] == "Preprocess(image_size=14, mode='paper')"
    assert d.manifest["seconds"] > 0
    assert {p.name for p in d.path.iterdir()} - {".lock"} == {"manifest.json", "rows.npy"}
    again = Descriptors(d.path)
    assert np.array_equal(again.values, d.values) and again.manifest == d.manifest


def test_batch_size_and_workers_make_no_difference_beyond_rounding(places, tmp_path):
    a = describe(Headed(), places, tmp_path / "a", batch_size=11, dtype="float32", **QUIET)
    b = describe(Headed(), places, tmp_path / "b", batch_size=2, dtype="float32", workers=2, **QUIET)
    np.testing.assert_allclose(a.values, b.values, atol=1e-6)


def test_every_descriptor_is_found_by_all_that_it_depends_on(places, tmp_path):
    model, made = Headed(), []

    def again(model=model, places=places, **options):
        made.append(describe(model, places, tmp_path / "d", **QUIET, **options).path)
        return model.embedded

    assert again() == N and again(batch_size=3) == N and made[0] == made[1]
    assert again(dtype="float32") == 2 * N
    assert again(preprocess=Preprocess(14, "antialias")) == 3 * N
    assert again(places=places[:5]) == 3 * N + 5
    Image.new("RGB", (50, 40)).save(places.path[3])
    assert again() == 4 * N + 5, "a picture was replaced under its name"
    other = Headed()
    torch.nn.init.zeros_(other.project.bias)
    assert again(model=other) == N
    assert len(set(made)) == len(made) - 1


def test_without_a_fingerprint_everything_is_described_anew(places, tmp_path):
    def flat(images):
        return images.flatten(1)

    paths = [describe(flat, places, tmp_path, preprocess=Preprocess(14), **QUIET).path for _ in range(2)]
    grey = [
        describe(baseline_pixels, places, tmp_path, preprocess=grey, **QUIET).path
        for grey in [GreyPixels()] * 2
    ]
    assert paths[0] != paths[1] and grey[0] == grey[1]
    own = [
        describe(baseline_pixels, places, tmp_path, preprocess=lambda p: GreyPixels()(p), **QUIET).path
        for _ in range(2)
    ]
    assert own[0] != own[1]


def test_the_weights_are_hashed_by_the_caller_or_here(places, tmp_path, monkeypatch):
    model = Headed()
    made = describe(model, places, tmp_path, context="solo", **QUIET)
    fingerprint = model_fingerprint(model)
    monkeypatch.setattr(describe_module, "model_fingerprint", None)
    assert (
        describe(model, places, tmp_path, context="solo", fingerprint=fingerprint, **QUIET).path == made.path
    )


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no lock on a directory")
def test_two_at_once_describe_once(places, tmp_path):
    class Slow(Headed):
        def embed(self, images):
            time.sleep(0.05)
            return super().embed(images)

    model = Slow()
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(describe, model, places, tmp_path / "d", batch_size=2, **QUIET) for _ in range(2)]
        a, b = [job.result() for job in jobs]
    assert model.embedded == N and np.array_equal(a.values, b.values)


def test_only_the_batch_at_work_and_the_next_live_in_memory(places, tmp_path):
    alive = []

    class Watched(Headed):
        def embed(self, images):
            alive.append(weakref.ref(images))
            return super().embed(images)

    def preprocess(picture):
        assert sum(batch() is not None for batch in alive) <= 1, (
            "a batch before the one at work is still there"
        )
        return Preprocess(14)(picture)

    describe(Watched(), places, tmp_path / "d", preprocess=preprocess, batch_size=2, **QUIET)
    assert len(alive) == 6


def test_the_model_returns_to_the_mode_it_was_in(places, tmp_path):
    class Dropping(Headed):
        def embed(self, images):
            return torch.nn.functional.dropout(super().embed(images), 0.5, training=self.training)

    model = Dropping()
    model.project.eval()  # a frozen part inside a model that trains
    a = describe(model, places, tmp_path / "a", **QUIET)
    assert model.training and not model.project.training
    assert np.array_equal(a.values, describe(model, places, tmp_path / "b", **QUIET).values)


# --------------------------------------------------------------------------------------------------- speed
def test_the_next_batch_is_read_while_the_network_is_at_work(places, tmp_path):
    read = threading.Semaphore(0)

    class Watched(Headed):
        def embed(self, images):  # the first picture of the next batch comes while this one is described
            due = len(images) + (self.embedded == 0) - (self.embedded + len(images) == N)
            assert all(read.acquire(timeout=60) for _ in range(due)), "nothing was read meanwhile"
            return super().embed(images)

    def preprocess(picture):
        read.release()
        return Preprocess(14)(picture)

    made = describe(Watched(), places, tmp_path / "d", preprocess=preprocess, batch_size=2, **QUIET)
    assert 0 <= made.manifest["waited"] <= made.manifest["seconds"]


class Precise(Headed):
    """A model with a time and an error of its own in each precision and number of threads."""

    slow, error = {}, 0.0

    def embed(self, images):
        lower = torch.is_autocast_enabled("cpu")
        time.sleep(self.slow.get((lower, torch.get_num_threads()), 0.0))
        return super().embed(images).float() + (self.error * torch.arange(32) if lower else 0)


@pytest.mark.parametrize(
    ("slow", "error", "expected"),
    [
        ({(False, 1): 0.2, (True, 1): 0.01}, 0.0, "bfloat16"),
        ({(False, 1): 0.01, (True, 1): 0.2}, 0.0, "float32"),
        ({(False, 1): 0.2, (True, 1): 0.01}, 1.0, "float32"),  # fast and wrong
    ],
)
def test_precision_is_measured_and_the_descriptors_are_found_by_it(
    places, tmp_path, monkeypatch, slow, error, expected
):
    monkeypatch.setattr(describe_module, "MEASURED", N)
    model, threads = Precise(), torch.get_num_threads()
    model.slow, model.error = {(lower, n): s for (lower, _), s in slow.items() for n in {1, threads}}, error
    made = describe(model, places, tmp_path, **QUIET)
    assert made.precision == expected and torch.get_num_threads() == threads
    named = describe(model, places, tmp_path, precision=expected, **QUIET)
    model.slow, embedded = {}, model.embedded  # another measurement might say something else
    assert describe(model, places, tmp_path, **QUIET).path == made.path == named.path
    assert model.embedded == embedded
    other = "float32" if expected == "bfloat16" else "bfloat16"
    assert describe(model, places, tmp_path, precision=other, **QUIET).path != made.path
    few = describe(model, places[:4], tmp_path, **QUIET)
    assert few.precision == "float32", "nothing is measured for a few pictures"
    with pytest.raises(ValueError, match="precision must be one of float32, bfloat16, got 'float16'"):
        describe(model, places, tmp_path, precision="float16", **QUIET)


def test_the_script_for_a_gpu_measures_what_it_is_given(capsys):
    script = Path(__file__).parent / "benchmarks" / "bench_gpu.py"
    names = {"S": "vit_small_patch14_dinov2"}
    [row] = runpy.run_path(str(script))["table"]("cpu", names, 28, batch=2, width=64, backend="eager")
    assert row.pop("network") == "S" and len(row) == 5 and min(row.values()) > 0
    if not torch.cuda.is_available():
        runpy.run_path(str(script), run_name="__main__")
        assert capsys.readouterr().out == "no GPU is at hand: nothing was measured\n"


# ---------------------------------------------------------------------------------------------- interruption
SLOW = """
    import sys, time
    import torch
    from sagelib import describe as module
    from sagelib.places import read_folder
    from sagelib.images import Preprocess

    module.FLUSH_S = 0.0
    folder, log, pauses, *outs = sys.argv[1:]
    pauses = [float(seconds) for seconds in pauses.split(",")]  # before each batch, and before all after them

    class Slow(torch.nn.Module):
        preprocess = Preprocess(14)
        fingerprint = "slow"
        def embed(self, images):
            with open(log, "a") as stream:
                stream.write(f"{len(images)}\\n")
            time.sleep(pauses.pop(0) if len(pauses) > 1 else pauses[0])
            return torch.nn.functional.normalize(images.flatten(1)[:, :64].cumsum(1), dim=1)

    torch.set_num_threads(1)
    for out in outs:
        places = read_folder(folder, check_pictures=False)
        module.describe(Slow(), places, out, batch_size=3, device="cpu", progress=False)
"""


def test_killed_and_continued_gives_equal_bytes(tmp_path):
    write_pictures(tmp_path / "pictures", n=40)
    script = tmp_path / "slow.py"
    script.write_text(textwrap.dedent(SLOW))
    log = tmp_path / "log"

    def command(pause, *outs):
        arguments = [tmp_path / "pictures", log, pause, *(tmp_path / out for out in outs)]
        return [sys.executable, str(script), *map(str, arguments)]

    for kills in (2, 6):  # killed twice, the second time after a continuation
        process = subprocess.Popen(command(0.15, "killed"))
        try:
            deadline = time.monotonic() + 600
            while not log.exists() or len(log.read_text().split()) < kills:
                assert process.poll() is None and time.monotonic() < deadline, "never came to its batch"
                time.sleep(0.01)
            os.kill(process.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
        finally:
            process.wait()
        with pytest.raises(FileNotFoundError, match="there are no finished Descriptors in"):
            Descriptors(next((tmp_path / "killed").iterdir()))
    subprocess.run(command(0, "killed", "whole"), check=True)
    # At most the batch in which it was killed, and one not yet recorded, were done twice at each kill.
    batches = 14
    assert 2 * batches < len(log.read_text().split()) <= 2 * batches + 4
    whole, killed = (next((tmp_path / name).iterdir()) / "rows.npy" for name in ("whole", "killed"))
    assert killed.read_bytes() == whole.read_bytes() and killed.parent.name == whole.parent.name


def test_two_processes_describe_a_share_each_and_give_the_bytes_of_one(tmp_path):
    write_pictures(tmp_path / "pictures", n=40)
    places = read_folder(tmp_path / "pictures")
    for row in (3, 38):  # one in each share
        Path(places.path[row]).write_bytes(b"not a picture")
    script, log = tmp_path / "slow.py", tmp_path / "log"
    script.write_text(textwrap.dedent(SLOW).replace("device=", "on_error='skip', device="))

    def arguments(pauses, out):
        return [str(x) for x in (script, tmp_path / "pictures", log, pauses, tmp_path / out)]

    processes, deadline = start_two(arguments("0,0,0,600", "two")), time.monotonic() + 300
    try:  # each comes to its fourth batch, and stays there
        while not log.exists() or len(log.read_text().split()) < 8:
            assert all(p.poll() is None for p in processes) and time.monotonic() < deadline, (
                "never came there"
            )
            time.sleep(0.01)
    finally:
        for process in reversed(processes):
            process.kill()
            process.communicate()
    with pytest.raises(FileNotFoundError, match="there are no finished Descriptors in"):
        Descriptors(next((tmp_path / "two").iterdir()))
    outputs(start_two(arguments("0", "two")))
    assert len(log.read_text().split()) == 14 + 2, "each did again the batch at which it was killed, no more"
    subprocess.run([sys.executable, *arguments("0", "one")], check=True)
    two, one = (Descriptors(next((tmp_path / name).iterdir())) for name in ("two", "one"))
    assert (two.path / "rows.npy").read_bytes() == (one.path / "rows.npy").read_bytes()
    assert two.path.name == one.path.name and two.manifest["skipped"] == one.manifest["skipped"]
    assert two.rows.tolist() == [i for i in range(40) if i not in (3, 38)]
    assert {p.name for p in two.path.iterdir()} - {".lock"} == {"manifest.json", "rows.npy"}


class Stopping(Headed):
    """Fails at a given call, as an interruption that Python sees."""

    at, calls = 4, 0

    def embed(self, images):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return super().embed(images)

    def interact(self, descriptors, anchors=None):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return super().interact(descriptors, anchors)


@pytest.mark.parametrize("stop", ["manifest.json", "rows.npy"])
def test_killed_at_the_very_end(places, tmp_path, monkeypatch, stop):
    model, replace = Headed(), Path.replace

    def killed(path, target):
        if Path(target).name == stop:
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            describe(model, places, tmp_path / "d", **QUIET)
    d = describe(model, places, tmp_path / "d", **QUIET)
    assert model.embedded == N and len(d) == N and not list(d.path.glob(".[!l]*"))


def test_both_passes_go_on_where_they_stopped(places, tmp_path, monkeypatch):
    monkeypatch.setattr(describe_module, "FLUSH_S", 0.0)
    options = dict(QUIET, batch_size=2, context="sorted-2")
    whole = describe(Headed(), places, tmp_path / "whole", **options)
    model = Stopping()
    for calls in (4, 4 + 4 + 2):  # in the first pass, and in the second after the rest of the first
        model.at = calls
        with pytest.raises(KeyboardInterrupt):
            describe(model, places, tmp_path / "d", **options)
    model.at = None
    assert np.array_equal(describe(model, places, tmp_path / "d", **options).values, whole.values)
    assert model.embedded == N and model.calls == 6 + 6 + 2


# -------------------------------------------------------------------------------------------------- bad data
def test_a_picture_that_does_not_decode(places, tmp_path, monkeypatch):
    good = describe(Headed(), places, tmp_path / "good", batch_size=2, **QUIET)
    for row in (0, 1, 7):
        with open(places.path[row], "wb") as stream:
            stream.write(b"not a picture")
    with pytest.raises(ValueError, match="@0@0@@@@@0000.*does not decode") as error:
        describe(Headed(), places, tmp_path / "raise", batch_size=2, workers=1, **QUIET)
    assert "Traceback" not in str(error.value), "one sentence, also from a worker"
    skip = dict(QUIET, batch_size=2, on_error="skip")
    d = describe(Headed(), places, tmp_path / "skip", **skip)
    kept = [2, 3, 4, 5, 6, 8, 9, 10]
    assert d.rows.tolist() == kept and len(d) == 8
    assert np.array_equal(d.values, good.values[kept])
    table = d.kept(places)
    assert table.path.tolist() == places.path[kept].tolist() and len(table.left_out) == 3
    assert [s["row"] for s in d.manifest["skipped"]] == [0, 1, 7]
    # Continued after an interruption: the same bytes and the same list.
    monkeypatch.setattr(describe_module, "FLUSH_S", 0.0)
    model = Stopping()
    with pytest.raises(KeyboardInterrupt):
        describe(model, places, tmp_path / "again", **skip)
    e = describe(model, places, tmp_path / "again", **skip)
    assert e.manifest["skipped"] == d.manifest["skipped"] and np.array_equal(e.values, d.values)
    # The head sees the rows that are there.
    composed = describe(Headed(), places, tmp_path / "skip", context="sorted-3", **skip)
    assert composed.values.shape == (8, 32) and composed.kept(places).path.tolist() == table.path.tolist()
    with pytest.raises(ValueError, match="does not decode .*on_error='skip' leaves it out"):
        describe(Headed(), places, tmp_path / "skip", **QUIET)


def test_no_picture_decodes(places, tmp_path):
    for path in places.path:
        open(path, "wb").close()
    with pytest.raises(ValueError, match="none of the 11 pictures decodes"):
        describe(Headed(), places, tmp_path / "d", on_error="skip", **QUIET)


@pytest.mark.parametrize(
    ("output", "dtype", "sentence"),
    [
        (lambda x: x.flatten(1) * torch.nan, "float32", "@0@0@.*not finite for float32; the model gives NaN"),
        (lambda x: x.flatten(1)[:, :8] * 1e6, "float16", "too large, .* for float16; try dtype='float32'"),
        (lambda x: x.flatten(1)[:, :8] * 1e-9, "float16", "too small .* for float16; try dtype='float32'"),
        (lambda x: x, "float16", r"must give a tensor \(11, D\) for 11 images, got shape \(11, 3, 14, 14\)"),
        (lambda x: [1], "float16", "got list"),
    ],
)
def test_models_that_give_no_descriptors(places, tmp_path, output, dtype, sentence):
    with pytest.raises(ValueError, match=sentence):
        describe(output, places, tmp_path / "d", dtype=dtype, preprocess=Preprocess(14), **QUIET)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dtype": "float64"}, "dtype must be one of float16, float32, got 'float64'"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"workers": -1}, "workers must be"),
        ({"on_error": "ignore"}, "on_error must be one of raise, skip, got 'ignore'"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, mps, got 'tpu'"),
        ({"device": "cuda:99"}, "'cuda:99', but PyTorch .* sees"),
        ({"context": "anchors"}, "none are given and the model has none"),
        (
            {"context": "anchors", "anchors": np.zeros((3, 8))},
            r"anchors must have shape \(n, 32\); got \(3, 8\)",
        ),
    ],
)
def test_settings_out_of_range(places, tmp_path, options, sentence):
    Image.new("RGB", (9, 9)).save(places.path[1])
    with pytest.raises(ValueError, match=sentence):
        describe(Headed(), places, tmp_path / "d", **(QUIET | options))


def test_needs_pictures_a_preprocess_and_for_contexts_a_head(places, tmp_path):
    with pytest.raises(ValueError, match="places is empty"):
        describe(Headed(), places[:0], tmp_path / "d")
    with pytest.raises(ValueError, match="names no preprocess: give one"):
        describe(lambda images: images.flatten(1), places, tmp_path / "d")
    for model in (Headed(head=False), baseline_pixels):
        with pytest.raises(ValueError, match="context is solo, but this model has no InteractHead"):
            describe(model, places, tmp_path / "d", context="solo", **QUIET)
    with pytest.raises(FileNotFoundError, match="there are no finished Descriptors in"):
        Descriptors(tmp_path / "nothing")


def test_the_preprocess_is_the_one_given_or_the_models_own():
    class Model:
        preprocessing = {"image_size": 28, "mode": "antialias"}

    assert preprocess_of(Model()) == Preprocess(28, "antialias")
    assert preprocess_of(Headed()) == Preprocess(14)
    assert preprocess_of(Headed(), Preprocess(70)) == Preprocess(70)


def test_what_a_name_asks_for_goes_first_and_the_patch_cuts_pictures_that_keep_their_aspect():
    class Model:
        preprocessing = {"image_size": 512}
        asked = {"image_size": 512}

    assert preprocess_of(Model()) == Preprocess(512)
    assert preprocess_of(Model(), Preprocess(70, "antialias")) == Preprocess(512, "antialias")
    cut = SimpleNamespace(backbone=SimpleNamespace(patch=14))
    assert preprocess_of(cut, Preprocess(70)) == Preprocess(70)
    assert preprocess_of(cut, Preprocess(70, resize="long")) == Preprocess(70, resize="long", multiple=14)
    given = Preprocess(70, resize="short", multiple=28)
    assert preprocess_of(cut, given) == given


def pooled(images):
    """Any size of picture to a descriptor of 12 numbers."""
    return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


pooled.fingerprint = "pooled"


def test_pictures_of_several_shapes_share_a_store_in_order(tmp_path):
    """Upright and lying ones, mixed, in batches of either kind, equal one picture at a time."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    paths = [folder / f"@{i * 1000}@0@{i:02d}.png" for i in range(9)]
    for path, size in zip(paths, [(20, 30), (30, 20), (24, 24)] * 3, strict=True):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path)
    places = Places.build(paths, east_m=np.arange(9) * 1000.0, north_m=np.zeros(9))
    prepare = Preprocess(20, "antialias", resize="short")
    made = [
        describe(pooled, places, tmp_path / f"{size}", preprocess=prepare, batch_size=size, **QUIET).values
        for size in (1, 4, 9)
    ]
    expected = torch.cat([pooled(prepare(Image.open(path))[None]) for path in paths])
    for values in made:
        np.testing.assert_allclose(values, expected.numpy(), rtol=0, atol=2e-3)
    with pytest.raises(ValueError, match="of its batch differ in shape: use resize"):
        describe(mixing, places, tmp_path / "d", preprocess=prepare, context="sorted-4", **QUIET)


def mixing(images):
    """A network that looks at its whole batch: less the batch's mean."""
    return pooled(images) - 0.5 * pooled(images).mean(dim=0)


mixing.fingerprint = "mixing"


def test_a_network_that_looks_at_its_batch_is_described_in_a_context_or_not_at_all(places, tmp_path):
    how = dict(preprocess=Preprocess(14), dtype="float32", **QUIET)
    with pytest.raises(ValueError, match="none, but this model looks at the other images of a batch: take"):
        describe(mixing, places, tmp_path, **how)
    with pytest.raises(
        ValueError, match="sorted-4, but .* does not look at the other images of a batch: take"
    ):
        describe(pooled, places, tmp_path, context="sorted-4", **how)
    images = torch.stack([Preprocess(14)(Image.open(path)) for path in places.path])
    names = names_in_order(places)
    for context in ("solo", "sorted-4", "shuffled-4"):
        made = describe(mixing, places, tmp_path, context=context, seed=3, loader="queries", **how)
        batches = Context.parse(context).batches(names, seed=3, loader="queries")
        batches = [[i] for i in range(N)] if context == "solo" else batches
        assert made.context == context
        for rows in batches:
            np.testing.assert_allclose(made.values[rows], mixing(images[rows]), rtol=0, atol=1e-5)
        again = describe(mixing, places, tmp_path, context=context, seed=3, loader="queries", **how)
        assert again.path == made.path
    other = describe(mixing, places, tmp_path, context="shuffled-4", seed=4, loader="queries", **how)
    assert other.path != made.path
    open(places.path[1], "wb").close()
    with pytest.raises(ValueError, match="does not decode"):
        describe(mixing, places, tmp_path, context="sorted-4", on_error="skip", **how)


def test_pick_device():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    assert pick_device(torch.device("cpu")) == torch.device("cpu")


# ---------------------------------------------------------------------------------------- contexts, for real
def test_contexts_are_composed_from_one_embedding(places, tmp_path):
    model = Headed()
    options = dict(QUIET, dtype="float32", batch_size=4)
    base = describe(model, places, tmp_path / "d", **options)
    anchors = choose_anchors(base, 3)
    made = {
        (context, seed): describe(
            model, places, tmp_path / "d", context=context, seed=seed, anchors=anchors, **options
        )
        for context, seed in (
            ("solo", 0),
            ("sorted-4", 0),
            ("shuffled-4", 0),
            ("shuffled-4", 1),
            ("anchors", 0),
        )
    }
    assert model.embedded == N, "the backbone saw every picture once"

    def by_hand(batches, anchors=None):
        out = np.empty(base.values.shape, np.float32)
        for batch in batches:
            with torch.no_grad():
                out[batch] = model.eval().interact(torch.from_numpy(base.values[batch]), anchors)
        return out

    order = np.argsort(places.path.astype(str))
    expected = {
        "sorted-4": by_hand([order[:4], order[4:8], order[8:]]),
        "solo": by_hand(np.arange(N)[:, None]),
        "anchors": by_hand([np.arange(N)], torch.from_numpy(anchors)),
    }
    for context, values in expected.items():
        np.testing.assert_allclose(made[context, 0].values, values, atol=1e-5)
    different = [d.values for d in made.values()]
    for i, a in enumerate(different):
        for b in different[:i]:
            assert np.abs(a - b).max() > 0.05
    for (context, seed), d in made.items():
        assert d.context == context and d.manifest.get("seed", 0) == seed
        assert np.array_equal(Descriptors(d.path).values, d.values)


def test_permuting_the_table_permutes_the_descriptors(places):
    model, order = Headed(), np.random.default_rng(0).permutation(N)
    values = np.random.default_rng(1).normal(size=(N, 32)).astype(np.float32)
    names = np.array(names_in_order(places))
    for context in ("solo", "sorted-3", "shuffled-3", "anchors"):
        a = compose(model, values, names, context, anchors=values[:2], device="cpu")
        b = compose(model, values[order], names[order], context, anchors=values[:2], device="cpu")
        np.testing.assert_allclose(a[order], b, atol=1e-5)
    assert np.array_equal(compose(model, values, names, "none", device="cpu"), values)


def test_a_new_head_needs_no_new_embedding(places, tmp_path):
    model = Headed()
    before = describe(model, places, tmp_path / "d", context="solo", **QUIET)
    torch.nn.init.normal_(model.head.layers[0].linear1.weight)
    assert model_fingerprint(model).under("none") == model_fingerprint(Headed()).under("none")
    after = describe(model, places, tmp_path / "d", context="solo", **QUIET)
    assert model.embedded == N
    assert before.path != after.path and np.abs(before.values - after.values).max() > 0.01


@pytest.mark.parametrize("method", ["sample", "kmeans"])
def test_anchors(method):
    rng = np.random.default_rng(0)
    centres = np.eye(4, 16)
    x = centres[rng.integers(0, 4, 400)] + 0.05 * rng.normal(size=(400, 16))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    anchors = choose_anchors(x, 4, method, seed=1)
    assert anchors.shape == (4, 16) and anchors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(anchors, axis=1), 1, atol=2e-3)
    np.testing.assert_array_equal(anchors, choose_anchors(x, 4, method, seed=1))
    if method == "sample":
        assert all((x.astype(np.float32) == a).all(1).any() for a in anchors)
    else:
        assert sorted((anchors @ centres.T).argmax(1)) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="m must be a whole number from 1 to 400, got 401"):
        choose_anchors(x, 401)
    with pytest.raises(ValueError, match="method must be one of sample, kmeans, got 'random'"):
        choose_anchors(x, 4, "random")


# ---------------------------------------------------------------------------------------------- fingerprints
def test_model_fingerprints_tell_models_apart():
    a, b = Headed(), Headed()
    assert model_fingerprint(a) == model_fingerprint(b) == model_fingerprint(b.eval())
    with torch.no_grad():
        b.project.weight[0, 0] += 1e-6
    assert model_fingerprint(a) != model_fingerprint(b)
    assert model_fingerprint(a) != model_fingerprint(Headed().bfloat16())
    b = Headed()
    b.fingerprint = "headed, another code"
    assert model_fingerprint(a) != model_fingerprint(b)

    def anything(images):
        return images

    # What a function, or a module of another's code, depends on cannot be told.
    assert model_fingerprint(anything) != model_fingerprint(anything)
    flat, other = torch.nn.Flatten(), torch.nn.Flatten()
    assert model_fingerprint(flat) == model_fingerprint(other)
    other.end_dim = 2
    assert model_fingerprint(flat) != model_fingerprint(other)
    other.forward = anything
    assert model_fingerprint(other) != model_fingerprint(other)
    anything.fingerprint = "v1"
    assert model_fingerprint(anything) == model_fingerprint(anything)


def test_a_picture_replaced_by_one_of_equal_size_and_time_is_another(places):
    path, before = places.path[0], pictures_fingerprint(places)
    stat, data = os.stat(path), bytearray(open(path, "rb").read())
    data[-20] ^= 1
    open(path, "wb").write(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert pictures_fingerprint(places) != before


# -------------------------------------------------------------------------------------------- a first model
def test_pixels_are_the_correlation_of_thumbnails():
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)) for _ in range(2)]
    d = baseline_pixels(torch.stack([GreyPixels()(p) for p in pictures])).double()
    flat = [np.asarray(p.convert("L").resize((32, 32), Image.Resampling.BOX)).ravel() for p in pictures]
    assert d.shape == (2, 1024)
    assert float(d[0] @ d[1]) == pytest.approx(np.corrcoef(*flat)[0, 1], abs=1e-6)
    # From the usual normalised tensor it is nearly the same descriptor (Pillow rounds grey to integers).
    e = baseline_pixels(torch.stack([Preprocess(64)(p) for p in pictures])).double()
    assert float((d * e).sum(1).min()) > 0.999


def test_a_full_disk_is_one_sentence(tmp_path):
    code = f"from sagelib import runs; runs.new_array('{tmp_path}/x.npy', 'float32', (1000, 1000))"
    run = f'mount -t tmpfs -o size=1m tmpfs {tmp_path} && {sys.executable} -c "{code}"; ls {tmp_path}'
    done = subprocess.run(["unshare", "-rm", "bash", "-c", run], capture_output=True, text=True)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip("this machine lets no one mount")
    assert "the disk has no room for 0.004 GB" in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")]
)
def test_too_little_memory_says_what_to_lower(places, tmp_path, error):
    def greedy(images):
        raise error

    with pytest.raises(MemoryError, match="not enough memory to describe 4 pictures at a time on cpu: lower"):
        describe(greedy, places, tmp_path, preprocess=GreyPixels(8), batch_size=4, **QUIET)
