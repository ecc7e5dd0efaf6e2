"""Streaming description: equal bytes after a kill, batches of contexts, refusals, and the first model without weights."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from sagelib import describe as describe_module
from sagelib import runs
from sagelib.describe import (
    Context,
    GreyPixels,
    baseline_pixels,
    choose_anchors,
    compose,
    describe,
    load_descriptors,
    model_fingerprint,
    names_in_order,
    pick_device,
)
from sagelib.images import Preprocess, load_image
from sagelib.interact import InteractHead
from sagelib.places import Places, folder_name

N = 11


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

    def forward(self, images):
        return self.interact(self.embed(images))


# --------------------------------------------------------------------------------------------------- context
@pytest.mark.parametrize("text", ["none", "solo", "sorted-8", "shuffled-32", "anchors"])
def test_context_reads_and_writes(text):
    assert str(Context.parse(text)) == text
    assert Context.parse(Context.parse(text)) == Context.parse(text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sorted", "'sorted' needs a batch size of at least 1, as in sorted-8"),
        ("shuffled-0", "'shuffled' needs a batch size of at least 1"),
        ("solo-3", "'solo' takes no batch size, got 3"),
        ("batch-8", "context 'batch' is unknown; give one of none, solo"),
        ("Sorted 8", "context 'Sorted 8' cannot be read"),
    ],
)
def test_context_refuses(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        Context.parse(text)


def test_sorted_batches_follow_the_names_and_the_last_is_short():
    names = ["d/@0@30@.jpg", "d/@0@1000@.jpg", "d/@0@20@.jpg", "d/@0@100@.jpg", "d/@0@5@.jpg"]
    batches = Context.parse("sorted-2").batches(names)
    # As strings: "@0@1000@" before "@0@100@" ('0' < '@'), and both before "@0@20@".
    assert [b.tolist() for b in batches] == [[1, 3], [2, 0], [4]]


def test_shuffled_batches_depend_on_seed_and_set_but_not_on_the_order_given():
    names = [f"database/{i:03d}.jpg" for i in range(50)]
    context = Context.parse("shuffled-8")

    def composed(names, seed, loader="database"):
        return [[names[i] for i in batch] for batch in context.batches(names, seed=seed, loader=loader)]

    first = composed(names, 0)
    assert [len(b) for b in first] == [8] * 6 + [2]
    assert sorted(sum(first, [])) == names
    assert first == composed(names[::-1], 0)
    assert first == [[n.removeprefix("/x/") for n in b] for b in composed([f"/x/{n}" for n in names], 0)]
    assert first != composed(names, 1)
    # As many queries with the same names are shuffled in another way: like batches must not meet.
    assert first != composed(names, 0, "queries")


def test_pictures_of_msls_as_downloaded_sort_by_their_converted_names():
    keys, east = ["zz", "aa"], np.array([500000.0, 600000.0])
    places = Places.build(
        ["m/zz.jpg", "m/aa.jpg"], east_m=east, north_m=[5e6, 5e6], key=keys, sequence=["s", "s"]
    )
    names = names_in_order(places)
    assert names == [folder_name(e, 5e6, pano_id=k) for e, k in zip(east, keys, strict=True)]
    assert [b.tolist() for b in Context.parse("sorted-1").batches(names)] == [[0], [1]]
    plain = Places.build(["m/zz.jpg", "m/aa.jpg"], east_m=east, north_m=[5e6, 5e6])
    assert names_in_order(plain) == ["m/zz.jpg", "m/aa.jpg"]


# -------------------------------------------------------------------------------------------------- describe
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_descriptors_are_those_of_the_model(places, tmp_path, dtype):
    model = Headed()
    d = describe(model, places, tmp_path / "d", batch_size=4, dtype=dtype, progress=False)
    with torch.inference_mode():
        images = torch.stack([model.preprocess(load_image(p)) for p in places.path])
        expected = model.embed(images).numpy()
    assert d.values.dtype == dtype and d.values.shape == (N, 32)
    np.testing.assert_allclose(d.values, expected, atol=1e-6 if dtype == "float32" else 1e-3)
    manifest = d.manifest
    assert (manifest["context"], manifest["n"], manifest["dim"], manifest["dtype"]) == ("none", N, 32, dtype)
    assert manifest["preprocess"] == "Preprocess(image_size=14, mode='paper')"
    assert manifest["images_per_s"] > 0 and manifest["skipped"] == []
    assert not list((tmp_path / "d").glob(".tmp-*")), "no temporary file is left"
    again = load_descriptors(tmp_path / "d")
    assert np.array_equal(again.values, d.values) and again.manifest == manifest


def test_batch_size_and_workers_make_no_difference_beyond_rounding(places, tmp_path):
    model = Headed()
    a = describe(model, places, tmp_path / "a", batch_size=11, dtype="float32", progress=False)
    b = describe(model, places, tmp_path / "b", batch_size=2, dtype="float32", workers=2, progress=False)
    np.testing.assert_allclose(a.values, b.values, atol=1e-6)


def test_mixed_precision_on_request(places, tmp_path):
    exact = describe(Headed(), places, tmp_path / "a", dtype="float32", device="cpu", progress=False)
    mixed = describe(
        Headed(), places, tmp_path / "b", dtype="float32", device="cpu", autocast="bfloat16", progress=False
    )
    error = np.abs(mixed.values - exact.values).max()
    assert 1e-6 < error < 0.02 and mixed.manifest["autocast"] == "bfloat16"


def test_finished_descriptors_are_not_made_again(places, tmp_path):
    model = Headed()
    describe(model, places, tmp_path / "d", batch_size=4, progress=False)
    assert model.embedded == N
    describe(model, places, tmp_path / "d", batch_size=3, progress=False)
    assert model.embedded == N


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no lock on a directory")
def test_two_at_once_describe_once(places, tmp_path):
    class Slow(Headed):
        def embed(self, images):
            time.sleep(0.05)
            return super().embed(images)

    model = Slow()
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(describe, model, places, tmp_path / "d", batch_size=2, progress=False)
            for _ in range(2)
        ]
        a, b = [job.result() for job in jobs]
    assert model.embedded == N and np.array_equal(a.values, b.values)


def test_other_settings_are_refused_by_name_or_replaced_on_request(places, tmp_path):
    model = Headed()
    describe(model, places, tmp_path / "d", progress=False)
    with pytest.raises(ValueError, match="dtype: 'float16' -> 'float32'"):
        describe(model, places, tmp_path / "d", dtype="float32", progress=False)
    with pytest.raises(ValueError, match=r"preprocess: .*mode='paper'.* -> .*mode='antialias'"):
        describe(model, places, tmp_path / "d", preprocess=Preprocess(14, "antialias"), progress=False)
    with pytest.raises(ValueError, match="other settings .*model:"):
        other = Headed()
        torch.nn.init.zeros_(other.project.bias)
        describe(other, places, tmp_path / "d", progress=False)
    with pytest.raises(ValueError, match="other settings .*data:"):
        describe(model, places[:5], tmp_path / "d", progress=False)
    again = describe(model, places[:5], tmp_path / "d", overwrite=True, progress=False)
    assert len(again) == 5


def test_a_picture_replaced_under_its_name_is_noticed(places, tmp_path):
    describe(baseline_pixels, places, tmp_path / "d", progress=False)
    Image.new("RGB", (50, 40)).save(places.path[3])
    with pytest.raises(ValueError, match="other settings .*data:"):
        describe(baseline_pixels, places, tmp_path / "d", progress=False)


def test_only_one_batch_of_images_lives_in_memory(places, tmp_path):
    alive = []

    class Watched(Headed):
        def embed(self, images):
            alive.append(weakref.ref(images))
            return super().embed(images)

    def preprocess(picture):
        assert not any(batch() is not None for batch in alive), "an earlier batch is still there"
        return Preprocess(14)(picture)

    describe(
        Watched(), places, tmp_path / "d", preprocess=preprocess, batch_size=2, device="cpu", progress=False
    )
    assert len(alive) == 6


def test_the_model_returns_to_the_mode_it_was_in(places, tmp_path):
    class Dropping(Headed):
        def embed(self, images):
            return torch.nn.functional.dropout(super().embed(images), 0.5, training=self.training)

    model = Dropping()
    model.project.eval()  # a frozen part inside a model that trains
    a = describe(model, places, tmp_path / "a", progress=False)
    assert model.training and not model.project.training
    b = describe(model, places, tmp_path / "b", progress=False)
    assert np.array_equal(a.values, b.values)


def test_torch_random_state_is_left_alone(places, tmp_path):
    before = torch.random.get_rng_state()
    describe(Headed(), places, tmp_path / "a", progress=False)
    assert torch.equal(before, torch.random.get_rng_state())


# ---------------------------------------------------------------------------------------------- interruption
SLOW = """
    import sys, time, pathlib
    import torch
    from sagelib import describe as module
    from sagelib.places import read_folder
    from sagelib.images import Preprocess

    module._CHECKPOINT_S = 0.0
    folder, log, pause, *outs = sys.argv[1:]

    class Slow(torch.nn.Module):
        preprocess = Preprocess(14)
        fingerprint = "slow"
        def forward(self, images):
            with open(log, "a") as stream:
                stream.write(f"{len(images)}\\n")
            time.sleep(float(pause))
            return torch.nn.functional.normalize(images.flatten(1)[:, :64].cumsum(1), dim=1)

    torch.set_num_threads(1)
    for out in outs:
        module.describe(Slow(), read_folder(folder), out, batch_size=3, device="cpu", progress=False)
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
            deadline = time.monotonic() + 120
            while not log.exists() or len(log.read_text().split()) < kills:
                assert process.poll() is None and time.monotonic() < deadline, (
                    "never came to the batch to be killed in"
                )
                time.sleep(0.01)
            os.kill(process.pid, getattr(signal, "SIGKILL", signal.SIGTERM))
        finally:
            process.wait()
        with pytest.raises(FileNotFoundError, match="unfinished descriptors: call describe again"):
            load_descriptors(tmp_path / "killed")
    subprocess.run(command(0, "killed", "whole"), check=True)
    # At most the batch in which it was killed, and one not yet recorded, were done twice at each kill.
    batches = 14
    assert 2 * batches < len(log.read_text().split()) <= 2 * batches + 4
    whole, killed = (tmp_path / name / "descriptors.npy" for name in ("whole", "killed"))
    assert killed.read_bytes() == whole.read_bytes()


class Stopping(Headed):
    """Fails at a given call, as an interruption that Python sees."""

    def __init__(self, at):
        super().__init__()
        self.at, self.calls = at, 0

    def embed(self, images):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return super().embed(images)


def interrupt(places, out, monkeypatch, **options):
    monkeypatch.setattr(describe_module, "_CHECKPOINT_S", 0.0)
    model = Stopping(at=4)
    with pytest.raises(KeyboardInterrupt):
        describe(model, places, out, progress=False, **options)
    model.at = None
    return model


def test_continued_with_another_batch_size_begins_again(places, tmp_path, monkeypatch):
    model = interrupt(places, tmp_path / "d", monkeypatch, batch_size=2)
    model.embedded = 0
    describe(model, places, tmp_path / "d", batch_size=2, progress=False)
    assert model.embedded == N - 6
    model = interrupt(places, tmp_path / "e", monkeypatch, batch_size=2)
    model.embedded = 0
    d = describe(model, places, tmp_path / "e", batch_size=3, progress=False)
    assert model.embedded == N and d.manifest["batch_size"] == 3


def test_killed_between_renaming_and_manifest(places, tmp_path, monkeypatch):
    model = Headed()
    real = runs.write_json
    with monkeypatch.context() as patch:

        def fails_at_the_manifest(path, obj):
            if path.name == "manifest.json":
                raise KeyboardInterrupt
            return real(path, obj)

        patch.setattr(runs, "write_json", fails_at_the_manifest)
        with pytest.raises(KeyboardInterrupt):
            describe(model, places, tmp_path / "d", progress=False)
    d = describe(model, places, tmp_path / "d", progress=False)
    assert model.embedded == N and len(d) == N and not list((tmp_path / "d").glob(".tmp-*"))


# -------------------------------------------------------------------------------------------------- bad data
def test_a_picture_that_does_not_decode(places, tmp_path, monkeypatch):
    good = describe(Headed(), places, tmp_path / "good", batch_size=2, progress=False)
    for row in (0, 1, 7):
        with open(places.path[row], "wb") as stream:
            stream.write(b"not a picture")
    with pytest.raises(ValueError, match="@0@0@@@@@0000.*does not decode") as error:
        describe(Headed(), places, tmp_path / "raise", batch_size=2, workers=1, progress=False)
    assert "Traceback" not in str(error.value), "one sentence, also from a worker"
    d = describe(Headed(), places, tmp_path / "skip", batch_size=2, on_error="skip", progress=False)
    kept = [2, 3, 4, 5, 6, 8, 9, 10]
    assert d.rows.tolist() == kept and len(d) == 8
    assert np.array_equal(d.values, good.values[kept])
    table = d.kept(places)
    assert table.path.tolist() == places.path[kept].tolist() and len(table.left_out) == 3
    assert [s["row"] for s in d.manifest["skipped"]] == [0, 1, 7]
    # Continued after an interruption: the same bytes and the same list.
    model = interrupt(places, tmp_path / "again", monkeypatch, batch_size=2, on_error="skip")
    e = describe(model, places, tmp_path / "again", batch_size=2, on_error="skip", progress=False)
    assert [s["row"] for s in e.manifest["skipped"]] == [0, 1, 7] and np.array_equal(e.values, d.values)
    # The head sees the rows that are there.
    composed = describe(
        Headed(), places, tmp_path / "skip", on_error="skip", context="sorted-3", progress=False
    )
    assert composed.values.shape == (8, 32) and composed.kept(places).path.tolist() == table.path.tolist()
    with pytest.raises(ValueError, match="on_error='skip' takes them"):
        describe(Headed(), places, tmp_path / "skip", progress=False)


def test_no_picture_decodes(places, tmp_path):
    for path in places.path:
        open(path, "wb").close()
    with pytest.raises(ValueError, match="none of the 11 pictures decodes"):
        describe(Headed(), places, tmp_path / "d", on_error="skip", progress=False)


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        (
            lambda images: torch.full((len(images), 4), torch.nan),
            "@0@0@.*its descriptor is not finite in float16",
        ),
        (lambda images: torch.full((len(images), 4), 1e6), "not finite in float16; try dtype='float32'"),
        (lambda images: images, r"must give a tensor \(11, D\) for 11 images, got shape \(11, 3, 14, 14\)"),
        (lambda images: [1], "got list"),
    ],
)
def test_models_that_give_no_descriptors(places, tmp_path, output, sentence):
    with pytest.raises(ValueError, match=sentence):
        describe(output, places, tmp_path / "d", preprocess=Preprocess(14), progress=False)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dtype": "float64"}, "dtype is 'float64'; it must be one of 'float16', 'float32'"),
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"workers": -1}, "workers is -1"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
        ({"autocast": "half"}, "autocast is 'half'"),
        ({"device": "tpu"}, "device is 'tpu'; it must be auto, cpu"),
        ({"device": "cuda:99"}, "'cuda:99', but PyTorch .* sees"),
        ({"preprocess": lambda p: torch.zeros(3, *p.size)}, None),
    ],
)
def test_settings_out_of_range(places, tmp_path, options, sentence):
    if sentence is None:
        Image.new("RGB", (9, 9)).save(places.path[1])
        sentence = "tensors of several shapes"
    with pytest.raises(ValueError, match=sentence):
        describe(Headed(), places, tmp_path / "d", progress=False, **options)


def test_needs_pictures_and_a_preprocess(places, tmp_path):
    with pytest.raises(ValueError, match="places is empty"):
        describe(Headed(), places[:0], tmp_path / "d")
    with pytest.raises(ValueError, match="names no preprocess of its own"):
        describe(lambda images: images.flatten(1), places, tmp_path / "d")
    with pytest.raises(FileNotFoundError, match=r"no finished descriptors in .*\(none\)"):
        load_descriptors(tmp_path / "nothing")


def test_pick_device():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    assert pick_device(torch.device("cpu")) == torch.device("cpu")


# ---------------------------------------------------------------------------------------- contexts, for real
def head_alone(model, values, batches, anchors=None):
    out = np.empty(values.shape, np.float32)
    with torch.inference_mode():
        for batch in batches:
            out[batch] = (
                model.eval().interact(torch.tensor(np.asarray(values[batch], np.float32)), anchors).numpy()
            )
    return out


def test_contexts_are_composed_from_one_embedding(places, tmp_path):
    model = Headed()
    options = dict(dtype="float32", batch_size=4, progress=False)
    base = describe(model, places, tmp_path / "d", **options)
    contexts = {
        c: describe(model, places, tmp_path / "d", context=c, **options) for c in ("solo", "sorted-4")
    }
    for seed in (0, 1):
        contexts[f"shuffled-4/{seed}"] = describe(
            model, places, tmp_path / "d", context="shuffled-4", seed=seed, **options
        )
    anchors = choose_anchors(base, 3)
    contexts["anchors"] = describe(
        model, places, tmp_path / "d", context="anchors", anchors=anchors, **options
    )
    assert model.embedded == N, "the backbone saw every picture once"

    order = np.argsort(places.path.astype(str))
    expected = head_alone(model, base.values, [order[:4], order[4:8], order[8:]])
    np.testing.assert_allclose(contexts["sorted-4"].values, expected, atol=1e-5)
    alone = head_alone(model, base.values, np.arange(N)[:, None])
    np.testing.assert_allclose(contexts["solo"].values, alone, atol=1e-5)
    np.testing.assert_allclose(
        contexts["anchors"].values,
        head_alone(model, base.values, [np.arange(N)], torch.tensor(anchors)),
        atol=1e-5,
    )
    different = [d.values for d in contexts.values()]
    for i, a in enumerate(different):
        for b in different[:i]:
            assert np.abs(a - b).max() > 0.05
    for label, d in contexts.items():
        assert d.context == d.manifest["context"] == label.split("/")[0]
        assert np.array_equal(load_descriptors(d.path).values, d.values)
    assert [contexts[f"shuffled-4/{s}"].manifest["seed"] for s in (0, 1)] == [0, 1]


def test_permuting_the_table_permutes_the_descriptors(places, tmp_path):
    model, order = Headed(), np.random.default_rng(0).permutation(N)
    values = np.random.default_rng(1).normal(size=(N, 32)).astype(np.float32)
    names = np.array(names_in_order(places))
    anchors = values[:2]
    for context in ("solo", "sorted-3", "shuffled-3", "anchors"):
        a = compose(model, values, names, context, anchors=anchors, device="cpu")
        b = compose(model, values[order], names[order], context, anchors=anchors, device="cpu")
        np.testing.assert_allclose(a[order], b, atol=1e-5)
    for context in ("solo", "anchors"):  # nor do they depend on the batch size
        a = compose(model, values, names, context, anchors=anchors, device="cpu", batch_size=1)
        b = compose(model, values, names, context, anchors=anchors, device="cpu", batch_size=7)
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert np.array_equal(compose(model, values, names, "none", device="cpu"), values)


def test_a_new_head_needs_no_new_embedding(places, tmp_path):
    model = Headed()
    before = describe(model, places, tmp_path / "d", context="solo", progress=False)
    torch.nn.init.normal_(model.head.layers[0].linear1.weight)
    assert model_fingerprint(model, head=False) == model_fingerprint(Headed(), head=False)
    after = describe(model, places, tmp_path / "d", context="solo", progress=False)
    assert model.embedded == N
    assert before.path != after.path and np.abs(before.values - after.values).max() > 0.01


def test_contexts_need_a_head_and_anchors(places, tmp_path):
    with pytest.raises(ValueError, match="context is solo, but this model has no InteractHead"):
        describe(Headed(head=False), places, tmp_path / "d", context="solo", progress=False)
    with pytest.raises(ValueError, match="context is sorted-2, but this model has no InteractHead"):
        describe(baseline_pixels, places, tmp_path / "d", context="sorted-2", progress=False)
    with pytest.raises(ValueError, match="none are given and the model has none"):
        describe(Headed(), places, tmp_path / "d", context="anchors", progress=False)
    with pytest.raises(ValueError, match=r"anchors must have shape \(m, 32\), got \(3, 8\)"):
        describe(
            Headed(), places, tmp_path / "d", context="anchors", anchors=np.zeros((3, 8)), progress=False
        )


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
    with pytest.raises(ValueError, match="m is 401; it must be from 1 to the number of descriptors, 400"):
        choose_anchors(x, 401)
    with pytest.raises(ValueError, match="method is 'random'"):
        choose_anchors(x, 4, "random")


# ---------------------------------------------------------------------------------------------- fingerprints
def test_model_fingerprints_tell_models_apart():
    a, b = Headed(), Headed()
    assert model_fingerprint(a) == model_fingerprint(b)
    with torch.no_grad():
        b.project.weight[0, 0] += 1e-6
    assert model_fingerprint(a) != model_fingerprint(b)
    assert model_fingerprint(a) == model_fingerprint(a.eval())
    half = Headed().bfloat16()
    assert model_fingerprint(half) != model_fingerprint(a)

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

    class Callable:
        def __call__(self, images):
            return images

    assert model_fingerprint(Callable()) != model_fingerprint(Callable())
    named = Callable()
    named.fingerprint = "v1"
    assert model_fingerprint(named) == "v1"


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


def test_float16_that_would_lose_descriptors_is_refused(places, tmp_path):
    with pytest.raises(ValueError, match="too small for float16; give dtype='float32'"):
        describe(
            lambda x: x.flatten(1)[:, :8] * 1e-9,
            places,
            tmp_path / "d",
            preprocess=Preprocess(14),
            progress=False,
        )


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

    with pytest.raises(
        MemoryError, match="not enough memory to describe 4 pictures at a time on cpu: lower batch_size"
    ):
        describe(
            greedy, places, tmp_path, preprocess=GreyPixels(8), batch_size=4, device="cpu", progress=False
        )


def test_a_picture_replaced_by_one_of_equal_size_and_time_is_another(places):
    path, before = places.path[0], describe_module.pictures_fingerprint(places)
    stat, data = os.stat(path), bytearray(open(path, "rb").read())
    data[-20] ^= 1
    open(path, "wb").write(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert describe_module.pictures_fingerprint(places) != before
