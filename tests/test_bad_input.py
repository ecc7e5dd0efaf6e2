"""Broken files into every reader: the right result, or one sentence that names the file.

`SAGE_FUZZ` is the number of cases in all (`make fuzz`: 10,000). Files on which a reader once failed lie in
``corpus``, in folders named as the readers below.
"""

import contextlib
import csv
import io
import os
import re
import shutil
import struct
import warnings
import zlib
from pathlib import Path

import make_sets
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from sagelib.backbone import read_state_dict
from sagelib.describe import Descriptors
from sagelib.evaluate import Evaluation
from sagelib.images import PictureError, load_image
from sagelib.model import build_model
from sagelib.places import (
    open_set,
    read_folder,
    read_gsv_cities,
    read_msls,
    read_photos,
    read_unlabelled,
)
from sagelib.retrieval import PCA
from sagelib.runs import find_runs, load_run, write_json
from sagelib.train import TrainConfig, read_parameters
from sagelib.weights import load_authors_checkpoint
from workbench.grids import Grid, read_grid

ROOT, CORPUS = Path(__file__).resolve().parent.parent, Path(__file__).resolve().parent / "corpus"
CASES = int(os.environ.get("SAGE_FUZZ", 400))
OURS = (ValueError, PictureError, OSError, FileNotFoundError, IsADirectoryError, PermissionError)


# -- A good file of each kind below a folder, and what reads it ------------------------------------------
def photos(root):
    folder = make_sets.photos_like(root)
    return folder / "photos.csv", lambda: read_photos(folder)


def gsv(root):
    folder = make_sets.gsv_like(root, ["London"])
    return folder / "Dataframes" / "London.csv", lambda: read_gsv_cities(folder)


def msls(root, table):
    folder = make_sets.msls_like(root, ["zurich"])
    file = folder / "train_val" / "zurich" / "query" / f"{table}.csv"
    return file, lambda: read_msls(folder, "zurich", part="query", chosen=table == "subtask_index")


def query_keys(root):
    file = make_sets.converted_msls(root) / "query_keys.txt"
    file.write_text("cphq0\nsfq1.jpg\nimages/sfq2\n", encoding="utf-8")
    return file, lambda: open_set(root, "msls-val")


def grid(root):
    ablations = shutil.copytree(ROOT / "notebooks" / "params" / "ablations", root / "ablations")
    return ablations / "aggregator.yaml", lambda: read_grid(ablations / "aggregator.yaml")


def parameters(root):
    file = Path(shutil.copy(ROOT / "notebooks" / "params" / "ablations" / "base" / "town.yaml", root))
    return file, lambda: read_parameters(file)


def training(root, file, read):
    run = shutil.copytree(ROOT / "data" / "results" / "train" / "sage", root / "train" / "sage")
    return run / file, lambda: read(run)


def evaluation(root, file):
    run = next((ROOT / "data" / "results" / "evaluate").glob("sage-town*"))
    run = shutil.copytree(run, root / "evaluate" / "x")
    return run / file, lambda: Evaluation.load(run)


def weights(root, ending):
    tensors, file = {f"layer.{i}.weight": torch.rand(2, 3) for i in range(3)}, root / f"x.{ending}"
    save_file(tensors, file) if ending == "safetensors" else torch.save(tensors, file)
    return file, lambda: read_state_dict(file)


def released(root):
    file = root / "released.pth"
    torch.save({"model_state_dict": {"module.backbone.model.cls_token": torch.zeros(1, 1, 384)}}, file)
    return file, lambda: load_authors_checkpoint(file)


def model(root, file):
    options = {"aggregator": "gem", "interact": False, "adapter": "none"}
    build_model("vit_test_patch14", pretrained=False, **options).save_pretrained(root / "model")
    return root / "model" / file, lambda: build_model(root / "model")


def pca(root):
    PCA.fit(np.random.default_rng(0).normal(size=(9, 5)), 3).save(root / "pca.safetensors")
    return root / "pca.safetensors", lambda: PCA.load(root / "pca.safetensors")


def rows(root, file):
    (root / "rows").mkdir()
    np.save(root / "rows" / "rows.npy", np.eye(4, dtype=np.float16))
    write_json(root / "rows" / "manifest.json", {"skipped": [], "n_given": 4, "context": "none"})
    return root / "rows" / file, lambda: Descriptors(root / "rows")


def picture(root, ending, mode="RGB", **options):
    file = root / "pictures" / f"picture.{ending}"
    file.parent.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    image.save(file, **({"append_images": [image], "save_all": True} if ending == "gif" else {}), **options)
    return file, lambda: (load_image(file), read_unlabelled(file.parent))


TABLES = {"photos": photos, "gsv": gsv}
for table in ("raw", "postprocessed", "seq_info", "subtask_index"):
    TABLES[table] = lambda root, table=table: msls(root, table)
YAML = {"grid": grid, "parameters": parameters}
OTHERS = {
    "query_keys": query_keys,
    "manifest": lambda root: training(root, "manifest.json", load_run),
    "found": lambda root: training(root, "manifest.json", lambda run: find_runs(run.parents[1])),
    "log": lambda root: training(root, "log.jsonl", lambda run: load_run(run).read_log()),
    "result": lambda root: evaluation(root, "result.json"),
    "ranks": lambda root: evaluation(root, "ranks.npy"),
    "pth": lambda root: weights(root, "pth"),
    "safetensors": lambda root: weights(root, "safetensors"),
    "released": released,
    "config": lambda root: model(root, "config.json"),
    "model": lambda root: model(root, "model.safetensors"),
    "pca": pca,
    "rows": lambda root: rows(root, "rows.npy"),
    "row_manifest": lambda root: rows(root, "manifest.json"),
}
EXIF = Image.Exif()
EXIF.update({0x0112: 6, 0x010E: "a street", 0x8825: {1: "N", 2: (48.0, 8.0, 13.0)}})
PICTURES = {
    f"{ending}-{mode}": lambda root, ending=ending, mode=mode, more=more: picture(root, ending, mode, **more)
    for ending, modes, more in (
        ("jpg", "RGB L CMYK", {"exif": EXIF}),
        ("png", "RGB RGBA P L I;16 1", {"exif": EXIF}),
        ("gif", "P", {}),
        ("tiff", "RGB CMYK I;16 F", {"compression": "tiff_lzw"}),
        ("webp", "RGB RGBA", {}),
        ("bmp", "RGB P", {}),
        ("ppm", "RGB L", {}),
        ("jp2", "RGB", {}),
        ("avif", "RGB", {}),
    )
    for mode in modes.split()
}
READERS = TABLES | YAML | OTHERS | PICTURES


def judged(file, read):
    """What `read` gives, or None where it refuses with one sentence that names the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # a picture that decodes in spite of a mistake; what an old pyproj says of a single position
        warnings.filterwarnings("ignore", module="PIL|pyproj")
        try:
            return read()
        except (ValueError, OSError) as error:
            assert type(error) in OURS, f"a foreign {type(error).__name__}: {error}"
            assert str(file.parent) in str(error), f"no name of a file: {error}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(file, read, its good bytes) of each reader, made once."""
    known = {}

    def make(kind):
        if kind not in known:
            file, read = READERS[kind](tmp_path_factory.mktemp("good"))
            known[kind] = file, read, file.read_bytes()
        return known[kind]

    return make


# -- What may go wrong with bytes, cells and values --------------------------------------------------------
TOKENS = (
    ["", "\0", "\ufeff", '"', "'", ",", ";", "\t", "\n", "\r\n", "\r", "@", "../", "/", "\\", "%s", "{}", "#"]
    + ["nan", "NaN", "inf", "-Infinity", "1e999", "-1", "0", "1.5", "1_0", "0x10", "1,5", "9" * 30, "1e-320"]
    + ["None", "null", "true", "TRUE", "yes", "north", "<script>alert(1)</script>", "=1+1", "2024-02-30"]
    + ["٣", "½", "京都.jpg", "é", "e\u0301", "😀", "\u202e", "a" * 300, "a b"]
    + ["{", "}", "[", "]", ":", "&a", "*a", "!!binary", "!!python/object:x", "---", "<<", "0x_", "1:60"]
)
BYTES = st.sampled_from([t.encode() for t in TOKENS] + [b"\xff", b"\xfe\xff", b"\xe9", b"\xff\xd9", b"IEND"])
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252", "utf-32")


@st.composite
def damaged(draw, good):
    """The good bytes, cut, overwritten, or with something put in, at one to three positions."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 3))):
        at, what = draw(st.integers(0, len(data))), draw(st.sampled_from("cut drop put set zero".split()))
        if what == "cut":
            del data[at:]
        elif what == "drop":
            del data[at : at + draw(st.integers(1, 40))]
        elif what == "put":
            data[at:at] = draw(BYTES | st.binary(max_size=8))
        else:
            new = bytes(4) if what == "zero" else draw(BYTES | st.binary(min_size=1, max_size=4))
            data[at : at + len(new)] = new
    return bytes(data)


@st.composite
def tables(draw, good):
    """A table with other cells, columns, lines or bytes."""
    header, *lines = csv.reader(io.StringIO(good.decode()))
    cell = st.sampled_from(TOKENS) | st.text(max_size=4) | st.floats().map(str) | st.integers().map(str)
    for _ in range(draw(st.integers(0, 3))):
        row, column = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(header) - 1))
        what = draw(st.sampled_from("cell cell cell name order twice lack more less again blank".split()))
        if what == "cell":
            lines[row] = [*lines[row][:column], draw(cell), *lines[row][column + 1 :]]
        elif what == "name":
            header[column] = draw(cell | st.sampled_from(header).map(str.upper))
        elif what == "order":
            order = draw(st.permutations(range(len(header))))
            header, *lines = ([line[i] for i in order if i < len(line)] for line in (header, *lines))
        elif what == "twice":
            header, *lines = ([*line, line[min(column, len(line) - 1)]] for line in (header, *lines))
        elif what == "lack":
            header, *lines = (line[:column] + line[column + 1 :] or [""] for line in (header, *lines))
        elif what in ("more", "less"):
            lines[row] = [*lines[row], draw(cell)] if what == "more" else lines[row][:column]
            lines[row] = lines[row] or [""]
        else:
            lines.insert(row, [""] if what == "blank" else lines[row])
    end, stream = draw(st.sampled_from(["\n", "\r\n", "\r"])), io.StringIO()
    csv.writer(stream, lineterminator=end).writerows([header, *lines])
    with contextlib.suppress(UnicodeEncodeError):
        return stream.getvalue().encode(draw(st.sampled_from(ENCODINGS)))
    return stream.getvalue().encode("utf-8", "surrogatepass")


def cases(share, kinds=1):
    """Settings for a share of all cases, spread over so many kinds."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    options = dict(deadline=None, suppress_health_check=checks, phases=[Phase.reuse, Phase.generate])
    return settings(max_examples=max(1, round(share * CASES / kinds)), **options)


pytestmark = pytest.mark.timeout(300 + CASES)


def judged_with(reader, data):
    """What a reader makes of these bytes in the place of its good ones."""
    file, read, good = reader
    file.write_bytes(data)
    try:
        return judged(file, read)
    finally:
        file.write_bytes(good)


@pytest.mark.parametrize("kind", READERS)
def test_good_files_are_read(made, kind):
    file, read, good = made(kind)
    assert (judged(file, read) is None) == (kind == "released")  # which holds no whole model


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_what_was_not_refused_once(made, path):
    assert judged_with(made(path.parent.name), path.read_bytes()) is None


@pytest.mark.parametrize("kind", TABLES)
@cases(0.35, len(TABLES))
@given(data=st.data())
def test_tables(made, kind, data):
    text = data.draw(tables(made(kind)[2]) | damaged(made(kind)[2]))
    places = judged_with(made(kind), text)
    if places is not None:  # nothing is dropped in silence
        lines = csv.reader(io.StringIO(text.decode("utf-8-sig"), newline=""))
        lines = sum(any(cell.strip() for cell in line) for line in lines) - 1
        # A row of Mapillary SLS is a panorama, and 3 of 6 belong to the sub-task; flags may be changed.
        assert len(places) == lines or kind in ("raw", "subtask_index") or len(places) == lines - 1


@pytest.mark.parametrize("kind", YAML | OTHERS | PICTURES)
@cases(0.35, len(YAML | OTHERS | PICTURES))
@given(data=st.data())
def test_damaged_bytes(made, kind, data):
    judged_with(made(kind), data.draw(damaged(made(kind)[2])))


NAMES = st.lists(
    st.sampled_from(TOKENS) | st.text(max_size=4) | st.floats().map(str), min_size=1, max_size=14
)


@cases(0.1)
@given(st.lists(NAMES, min_size=1, max_size=3))
def test_names(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("names")
    good = make_sets.write_picture(folder.with_suffix(".jpg"), 0)
    names = {re.sub(r"[\0/\ud800-\udfff]", "", "@".join(["", *fields])) for fields in names}
    names = {name.encode()[:240].decode(errors="ignore") + "@.jpg" for name in names}
    for name in names:
        shutil.copy(good, folder / name)
    places = judged(folder / "x", lambda: read_folder(folder, on_error="skip"))
    if places is not None:
        assert len(places) + len(places.left_out) == len(names)
        assert all(
            float(Path(p).name.split("@")[1]) == e for p, e in zip(places.path, places.east_m, strict=True)
        )
    assert judged(folder / "x", lambda: read_folder(folder)) is None or len(places) == len(names)
    shutil.rmtree(folder)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(TOKENS) | st.dates()
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(LEAVES, v, max_size=3), max_leaves=5
)


@cases(0.1)
@given(st.sampled_from([*Grid.__dataclass_fields__, "settings", "other"]), VALUES)
def test_grids(made, key, value):
    file, _, good = made("grid")
    text = yaml.safe_dump({**yaml.safe_load(good), key: value}, allow_unicode=True)
    judged_with(made("grid"), text.encode("utf-8", "surrogatepass"))


@cases(0.1)
@given(st.dictionaries(st.sampled_from(TrainConfig.field_names()) | LEAVES, VALUES, min_size=1, max_size=2))
def test_configurations(values):
    try:
        TrainConfig.from_mapping(values)
    except ValueError as error:
        assert type(error) is ValueError and any(
            f"{n}" in f"{error}" or f"{n!r}" in f"{error}" for n in values
        )


def test_pictures_that_are_odd_or_a_trap(tmp_path):
    """One pixel, no bytes, a folder, a header of 3,600 megapixels; with many cases, a picture of 100."""
    Image.new("L", (1, 1), 7).save(tmp_path / "one.png")
    assert np.asarray(load_image(tmp_path / "one.png")).tolist() == [[[7, 7, 7]]]
    good = (tmp_path / "one.png").read_bytes()
    head = b"IHDR" + struct.pack(">2I", 60_000, 60_000) + good[24:29]
    (tmp_path / "bomb.png").write_bytes(good[:12] + head + struct.pack(">I", zlib.crc32(head)) + good[33:])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    for name in ("bomb.png", "empty.jpg", "folder.jpg"):
        assert judged(tmp_path / name, lambda name=name: load_image(tmp_path / name)) is None
    places = read_unlabelled(tmp_path, on_error="skip")
    assert len(places) == 1 and [p.partition(".")[0][-4:] for p in places.left_out] == ["bomb", "mpty"]
    if CASES >= 10_000:
        Image.new("1", (10_000, 10_000), 1).save(tmp_path / "large.png")
        assert load_image(tmp_path / "large.png").size == (10_000, 10_000)
