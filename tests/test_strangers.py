"""Files of strangers: nothing in them is executed, nothing is fetched unasked, and what they hold is text."""

import ast
import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from plotly.callbacks import InputDeviceState, Points

from sagelib import runs
from sagelib.backbone import read_checkpoint
from sagelib.describe import RowStore
from sagelib.evaluate import Evaluation, open_model
from sagelib.model import build_model
from sagelib.retrieval import PCA
from sagelib.train import main, read_parameters
from sagelib.train import read_checkpoint as read_training
from workbench import figures, tables, widgets
from workbench.figures.maps import thumbnail_page
from workbench.grids import read_grid
from workbench.pages import Page

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = ROOT / "tests" / "offline"
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)


# -- no pickle ------------------------------------------------------------------------------------------
class Evil:
    """Whoever unpickles it makes the folder `mark`."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def _written(path: Path, evil: Evil, how: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if how == "yaml":
        path.write_text(f"epochs: 1\nlr: !!python/object/apply:os.mkdir [{evil.mark}]\n")
    elif how == "torch":
        torch.save({"model_state_dict": {"a": evil}}, path)
    elif how == "npy":
        with open(path, "wb") as stream:
            np.save(stream, np.array([evil, evil]), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(evil, 2))
    return path


def _training_checkpoint(file: Path):
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:32]
    shutil.copy(file, file.with_name(f"000001-{digest}.pt"))
    read_training(file.parent)


def _run(file: Path):
    """A finished training whose weights are the file."""
    config = {"backbone": "test_vit", "pretrained": False, "aggregator": "gem", "interact": False}
    run = runs.Run.open(file.parent, "train", "a", config)
    shutil.copy(file, run.path("best", "trainable.safetensors"))
    run.finish()
    open_model("a", [file.parent])


def _saved(file: Path):
    build_model("test_vit", pretrained=False, aggregator="gem").save_pretrained(file.parent / "m")
    shutil.copy(file, file.parent / "m" / "model.safetensors")
    open_model(str(file.parent / "m"))


def _rows(file: Path):
    shutil.copy(file, file.with_name("rows.npy"))
    runs.write_json(file.with_name("manifest.json"), {"context": "none"})
    RowStore(file.parent)


def _evaluation(file: Path):
    run = runs.Run.open(file.parent, "evaluate", "a", {})
    names = [name for name in Evaluation.__dataclass_fields__ if name not in ("per_query_rank", "path")]
    values = dict.fromkeys(names, 0) | {"hits": {}, "left_out": [], "recall": {}}
    runs.write_json(run.path("result.json"), values)
    shutil.copy(file, run.path("ranks.npy"))
    run.finish()
    Evaluation.load(run.dir)


READERS = [
    ("weights.pth", "torch", lambda file: open_model(f"gem:test_vit:{file}")),
    ("weights.pth", "pickle", lambda file: open_model(f"gem:test_vit:{file}")),
    ("released.pth", "torch", lambda file: open_model(str(file))),
    ("released.torch", "pickle", lambda file: open_model(str(file))),
    ("a.safetensors", "pickle", read_checkpoint),
    ("last.bin", "torch", _training_checkpoint),
    ("trainable.bin", "torch", _run),
    ("trainable.bin", "pickle", _run),
    ("model.bin", "pickle", _saved),
    ("pca.safetensors", "pickle", PCA.load),
    ("pca.pkl", "torch", PCA.load),
    ("values.bin", "npy", _rows),
    ("values.bin", "pickle", _rows),
    ("ranks.bin", "npy", _evaluation),
    ("train.yaml", "yaml", read_parameters),
    ("grid.yaml", "yaml", read_grid),
]


@pytest.mark.parametrize(
    ("name", "how", "read"), READERS, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_file_that_would_run_code_is_refused(name, how, read, tmp_path):
    """A sentence about it, and no traceback at a command: each of these is a ValueError."""
    mark = tmp_path / "executed"
    file = _written(tmp_path / "given" / name, Evil(mark), how)
    with pytest.raises(ValueError) as refused:
        read(file)
    assert not mark.exists()
    assert str(refused.value).strip() and "\n" not in str(refused.value)


def test_the_command_line_builds_no_objects(tmp_path, capsys):
    mark = tmp_path / "executed"
    given = f"lr=!!python/object/apply:os.mkdir [{mark}]"
    assert main(["--data", str(tmp_path), "--name", "a", "--runs", str(tmp_path), "--set", given]) == 1
    assert not mark.exists() and len(capsys.readouterr().err.splitlines()) == 1


def _sources():
    for folder in ("sagelib", "notebooks", "data/townscape"):
        for path in (ROOT / folder).rglob("*.py"):
            yield path, path.read_text()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        text = "\n".join("".join(cell["source"]) for cell in cells)
        yield path, re.sub("^%.*", "", text, flags=re.M)


def test_no_source_reads_pickles_or_runs_text():
    """Joblib's and multiprocessing's own messages between our processes are no files."""
    for path, text in _sources():
        for node in ast.walk(ast.parse(text)):
            name = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name | ast.keyword) else ""
            assert name not in ("allow_pickle=True", "weights_only=False", "eval", "exec", "yaml.load"), path
            assert not re.match(r"(pickle|joblib\.(load|dump)|yaml\.(unsafe|full)_load)\b", name), path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in map(ast.unparse, node.keywords), path


# -- no network -----------------------------------------------------------------------------------------
ASKS_NOBODY = """
import sys
from pathlib import Path
from sagelib.evaluate import open_models
from sagelib.model import build_model
from test_notebooks import NOTEBOOKS, executed

town, out = map(Path, sys.argv[1:])
build_model("test_vit", pretrained=False, aggregator="gem").save_pretrained(out / "saved")
names = ["pixels", "gem:tf_efficientnet_lite2", "gem2x2:test_vit:random", "sage", str(out / "saved")]
open_models(names, [Path("data/results").absolute()])
where = {"data_folder": str(town.parent), "dataset": town.name, "town_images": 0, "runs_folder": str(out)}
executed(next(p for p in NOTEBOOKS if "exploration" in p.name), lambda page: page.update(where, device="cpu"))
import requests
try:
    requests.get("https://huggingface.co")
except OSError:
    print("done, and whoever does ask is seen")
"""


def test_local_names_and_pages_ask_no_network(small_town, tmp_path):
    """In ``make test`` no test and no page has a network; here it is seen that nobody even tries."""
    folders = [OFFLINE, ROOT, ROOT / "notebooks", ROOT / "data", ROOT / "tests"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "MPLBACKEND": "Agg"}
    environment["SAGE_ATTEMPTS"] = str(tmp_path / "attempts.txt")
    command = [sys.executable, "-c", ASKS_NOBODY, str(small_town), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("done, and whoever does ask is seen\n"), done.stderr
    assert set((tmp_path / "attempts.txt").read_text().split()) == {"huggingface.co"}


# -- names are text -------------------------------------------------------------------------------------
EVIL = ["<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", '" onclick="alert(1)" \'']
TAME = ["a", "b", "c"]


class _Elements(HTMLParser):
    """The elements of a page, each with the names of its attributes, and all text outside of scripts."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, sorted(name for name, _ in attributes)))

    def handle_data(self, data):
        self.text += "" if self.found and self.found[-1][0] in ("script", "style") else data


def _tsne_page(names, folder):
    maps = {name: np.arange(6.0).reshape(3, 2) + i for i, name in enumerate(names)}
    known = dict.fromkeys(names, (0.1, 0.0, 0.2))
    chart = figures.tsne_plotly(maps, names, names=names, aid=known)
    return thumbnail_page(chart, [Image.new("RGB", (8, 8))] * 3)


def _map_page(names, folder):
    at, query = np.arange(3.0), dict(query_east_m=np.zeros(3), query_north_m=np.zeros(3), query_hover=names)
    found = dict(found=[0, 1], correct=[True, False], chosen=0)
    chart = figures.places_plotly(at, at, hover=names, **query, **found)
    run = Page.open(folder, "notebooks", "a", {})
    return run.save_figure(chart, "map", pd.DataFrame({"name": names}))[0].read_text()


def _table(names):
    return pd.DataFrame({"dataset": names, "method": names, "R@1": [0.5] * 3})


def _table_output(names, folder):
    return _table(names)._repr_html_()


def _markdown_output(names, folder):
    from nbconvert.filters import markdown2html

    return markdown2html(tables.to_markdown(_table(names)))


def _hovered_photograph(names, folder):
    paths = [str(folder / f"{i}-{name.rpartition('/')[2]}.png") for i, name in enumerate(names)]
    for path in paths:
        Image.new("RGB", (8, 8)).save(path)
    values, given = {"m": np.random.default_rng(0).normal(size=(3, 4))}, {"aid": None, "class_aid": None}
    box = widgets.tsne_explorer(values, np.arange(3), paths, names=names, perplexity=2, seed=0, **given)
    wrapped, photograph = box.children[-1].children
    [chart] = wrapped.children
    pages = []
    for trace in chart.data:
        trace._dispatch_on_hover(Points([0], [], [], "", 0), InputDeviceState())
        pages.append(photograph.value)
    return "".join(pages)


WRITERS = [_tsne_page, _map_page, _table_output, _markdown_output, _hovered_photograph]


@pytest.mark.parametrize("write", WRITERS)
def test_a_name_makes_no_element_of_a_page(write, tmp_path):
    (tmp_path / "evil").mkdir(), (tmp_path / "tame").mkdir()
    evil, tame = write(EVIL, tmp_path / "evil"), _Elements(write(TAME, tmp_path / "tame"))
    shown = _Elements(evil)
    assert shown.found == tame.found, "elements or attributes come from a name"
    if "plotly" in evil:  # it draws what its JSON says, as text
        assert "\\u003cscript\\u003ealert(1)" in evil
    elif write is _hovered_photograph:
        assert 'onclick="alert(1)"' in shown.text
    else:
        assert all(" ".join(name.split()) in " ".join(shown.text.split()) for name in EVIL)


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no browser installed (Debian: apt install chromium)")
def test_a_browser_shows_the_name_and_runs_no_script_of_it(tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    (tmp_path / "t.html").write_text(_tsne_page(EVIL, tmp_path))
    (tmp_path / "m.html").write_text(_map_page(EVIL, tmp_path))
    alerts, shown = [], {}
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = chromium.new_page()
        page.on("dialog", lambda dialog: (alerts.append(dialog.message), dialog.dismiss()))
        for file, curve in (("t.html", 2), ("m.html", 0)):  # of the first name
            page.goto((tmp_path / file).as_uri())
            page.wait_for_selector(".plotly-graph-div .scatterlayer path.point")
            point = f"[{{curveNumber: {curve}, pointNumber: 0}}]"
            page.evaluate(f"Plotly.Fx.hover(document.querySelector('.plotly-graph-div'), {point})")
            page.wait_for_selector(".hoverlayer text")
            shown[file] = page.text_content(".hoverlayer")
        shown["titles"] = page.goto((tmp_path / "t.html").as_uri()) and page.text_content(".infolayer")
        chromium.close()
    assert not alerts
    assert all(EVIL[0] in text for text in shown.values()), shown
