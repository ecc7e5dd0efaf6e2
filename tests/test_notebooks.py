"""What every notebook promises: one cell of parameters, outputs kept, short cells, no definitions, no errors,
open exercises with solutions apart, a run that it names, help for each parameter, one sentence for a wrong
one, and key numbers that are compared."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import authors_layout
import make_sets
import numpy as np
import pandas
import papermill
import pytest
import timm
import torch
import yaml

from sagelib.describe import Descriptors
from sagelib.places import open_set, pairwise_m
from sagelib.runs import Run
from sagelib.train import TrainConfig
from sagelib.train import main as train_command

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
SOLUTIONS = sorted((ROOT / "notebooks" / "solutions").glob("*.ipynb"))
PARAMETERS = sorted((ROOT / "notebooks" / "params").glob("*.yaml"))


def cells(path: Path, kind: str = "code") -> list[dict]:
    return [
        c
        for c in json.loads(path.read_text())["cells"]
        if c["cell_type"] == kind and "".join(c["source"]).strip()
    ]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def executed(path: Path, change) -> dict:
    """The names of a page after its cells ran in this process; `change` is given them after the
    parameters. Exercises are open, and left out."""
    page = {"display": lambda *_shown: None}
    for cell in cells(path):
        if "exercise" in tags(cell):
            continue
        exec("\n".join(line for line in source(cell).splitlines() if not line.startswith("%")), page)
        if "parameters" in tags(cell):
            change(page)
    return page


def module(name: str):
    """A module that lies beside the notebooks, outside of the package."""
    specification = importlib.util.spec_from_file_location(name, ROOT / "notebooks" / f"{name}.py")
    loaded = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(loaded)
    return loaded


EXPECTED = module("expected")


def fits(asked, given) -> bool:
    """Whether the code `given` is the code `asked`, with something for every ``...`` in it."""
    if isinstance(asked, ast.AST):
        if getattr(asked.value if isinstance(asked, ast.Expr) else asked, "value", None) is ...:
            return True
        return type(asked) is type(given) and all(
            fits(getattr(asked, field, None), getattr(given, field, None)) for field in asked._fields
        )
    if isinstance(asked, list):
        return len(asked) == len(given) and all(map(fits, asked, given))
    return asked == given


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda p: p.stem)
def test_the_solutions_fit_the_exercises_of_their_page_and_run(path, monkeypatch, capsys):
    """A page has no answers: its exercises are open, and here they are, completed, each with its check."""
    page = ROOT / "notebooks" / path.name
    asked, given = ([source(c) for c in cells(p) if "exercise" in tags(c)] for p in (page, path))
    assert 2 <= len(asked) == len(given) <= 4 and "assert" in "".join(asked)
    for number, (exercise, solution) in enumerate(zip(asked, given, strict=True), 1):
        first, _, body = exercise.partition("\n")
        assert first == f"%%exercise {number}" and "..." in body and "..." not in solution
        assert fits(ast.parse(body), ast.parse(solution)), f"exercise {number} of {page.name}"
    monkeypatch.chdir(ROOT / "notebooks" / "solutions")
    names = {}
    for cell in cells(path):
        exec(source(cell), names)
    assert "solution" not in {tag for cell in cells(page) for tag in tags(cell)}


def test_a_stored_page_keeps_no_state_of_widgets_that_it_does_not_show():
    """A progress bar that never came up leaves thousands of lines behind."""
    for path in NOTEBOOKS:
        assert "widgets" not in json.loads(path.read_text())["metadata"], path.name


def test_every_page_has_solutions_and_leads_to_the_next():
    assert [path.name for path in NOTEBOOKS[1:]] == [path.name for path in SOLUTIONS]
    for path, before, after in zip(NOTEBOOKS, [None, *NOTEBOOKS], [*NOTEBOOKS[1:], None], strict=False):
        words = [source(cell) for cell in cells(path, "markdown")]
        assert before is None or f"]({before.name})" in words[0], f"{path.name} names no page before it"
        assert after is None or f"]({after.name})" in words[-1], f"{path.name} names no page after it"
        assert "## Summary" in "\n".join(words) and "**Goals" in words[0]


@pytest.mark.parametrize("path", PARAMETERS, ids=lambda p: p.stem)
def test_a_file_of_parameters_trains_the_same_on_the_page_and_by_the_command(path):
    values = yaml.safe_load(path.read_text())
    if "epochs" not in values:
        pytest.skip("nothing is trained with these")
    page = {}
    (given,) = (
        c for c in cells(next(p for p in NOTEBOOKS if "training" in p.name)) if "parameters" in tags(c)
    )
    exec(source(given), page)
    page |= {name: value for name, value in values.items() if name in page}
    fields = TrainConfig.field_names()
    by_page = TrainConfig.from_mapping({k: v for k, v in page.items() if k in fields})
    by_command = TrainConfig.from_mapping({k: v for k, v in values.items() if k in fields})
    assert by_page.identity() == by_command.identity()


@pytest.mark.parametrize("path", PARAMETERS, ids=lambda p: p.stem)
def test_the_last_page_takes_every_file_of_parameters(path, tmp_path, monkeypatch):
    """What one page calls a data set, another must not take for something else: 07 stands at the end of
    ``make reproduce``."""
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setenv("SAGE_RUNS", str(tmp_path))
    values = yaml.safe_load(path.read_text())
    page = executed(
        next(p for p in NOTEBOOKS if p.name.startswith("07")),
        lambda page: page.update({name: value for name, value in values.items() if name in page}),
    )
    assert "not run" not in page["dataset"] and len(page["summary"]) > 1
    assert list(tmp_path.glob("notebooks/07-*/figures/ablation.png"))


def test_the_papers_setting_runs_on_dinov2_from_a_file(tmp_path, monkeypatch):
    """params/dinov2.yaml on random weights of ViT-B/14's layout, with the paper's sizes of all parts, made
    small in data alone."""
    monkeypatch.chdir(ROOT / "notebooks")
    torch.manual_seed(0)
    network = timm.create_model("vit_base_patch14_dinov2", num_classes=0, img_size=518)
    torch.save({k: v.half() for k, v in network.state_dict().items()}, tmp_path / "random.pth")
    values = yaml.safe_load((ROOT / "notebooks" / "params" / "dinov2.yaml").read_text())
    values |= dict(places_per_batch=2, images_per_place=2, similar_places=2, min_clique=2, epochs=1)
    values |= dict(image_size=28, validation_size=28, batches_per_epoch=1, log_every=1, device="cpu")
    values |= dict(weights=str(tmp_path / "random.pth"), runs_folder=str(tmp_path / "runs"))
    values |= dict(data_folder=str(make_sets.papers_training_data(tmp_path / "data")))
    page = executed(
        next(p for p in NOTEBOOKS if "training" in p.name),
        lambda page: page.update({name: value for name, value in values.items() if name in page}),
    )
    model = page["result"].model
    live = model.parameter_report()["trained, head off"][0]
    assert live == 1_464_326 and model.has_head and model.width == 8448
    assert page["result"].metrics["steps"] == 1


def test_the_papers_data_train_on_the_page_and_by_the_command(tmp_path, monkeypatch):
    """Mapillary SLS mined and GSV-Cities labelled: both ways find the same run, and no validation city is
    trained on."""
    monkeypatch.chdir(ROOT / "notebooks")
    data = make_sets.papers_training_data(tmp_path / "data")
    values = dict(places_per_batch=2, images_per_place=2, similar_places=2, min_clique=2, epochs=1)
    values |= dict(
        image_size=32, validation_size=32, data_init=0, batches_per_epoch=2, log_every=1, device="cpu"
    )
    sets = dict(
        data_folder=str(data), dataset="msls", labelled_dataset="gsv-cities", runs_folder=str(tmp_path)
    )
    page = executed(
        next(p for p in NOTEBOOKS if "training" in p.name), lambda page: page.update(values | sets)
    )
    assert set(page["mined"].city) == {"zurich", "london"} and len(page["labelled"]) == 32
    assert set(page["validation"].database.city) == {"cph", "sf"}
    fields = {name: page[name] for name in TrainConfig.field_names() & page.keys()}
    (tmp_path / "page.yaml").write_text(yaml.safe_dump(fields))
    manifest = (page["run"].dir / "manifest.json").read_bytes()
    command = (
        f"{tmp_path}/page.yaml --data {data}/msls --gsv {data}/gsv-cities --runs {tmp_path} --device cpu"
    )
    assert train_command([*command.split(), "--name", page["run_name"]]) == 0
    assert (page["run"].dir / "manifest.json").read_bytes() == manifest  # the command found the page's run


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
class TestNotebook:
    def test_was_run_in_order_without_errors_and_keeps_its_outputs(self, path):
        """A notebook stripped of outputs would pass ``pytest --nbval`` without checking anything."""
        counts = [c["execution_count"] for c in cells(path)]
        assert counts == list(range(1, len(counts) + 1)), (
            f"{path.name} was not run top to bottom: `make notebooks`"
        )
        kinds = [o["output_type"] for c in cells(path) for o in c["outputs"]]
        assert "error" not in kinds
        texts = [
            o
            for c in cells(path)
            for o in c["outputs"]
            if o["output_type"] == "stream" or "text/plain" in o.get("data", {})
        ]
        assert len(texts) >= 3, f"{path.name} keeps too few outputs to be read without running"

    def test_has_one_cell_of_parameters_each_explained(self, path):
        tagged = [c for c in cells(path) if "parameters" in tags(c)]
        assert len(tagged) == 1
        for line in source(tagged[0]).splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                assert "=" in line and ":" in line.split("=")[0], f"{path.name}: give {line!r} a type"
                assert "  # " in line, f"{path.name}: say what {line!r} is, after two spaces and a #"

    def test_cells_are_short_and_define_nothing(self, path):
        for cell in cells(path):
            # One line a parameter, however many an experiment has.
            most, lines = (40 if "parameters" in tags(cell) else 15), len(source(cell).splitlines())
            assert lines <= most, f"{path.name}: a cell of {lines} lines"
            tree = ast.parse(
                "\n".join(line for line in source(cell).splitlines() if not line.startswith(("%", "!")))
            )
            defined = [n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
            assert not defined, f"{path.name} defines {defined}: functions live in sagelib"

    def test_explains_itself(self, path):
        assert source(cells(path, "markdown")[0]).startswith("# ")
        assert len(cells(path, "markdown")) >= len(cells(path)) / 3

    def test_finishes_a_run_and_names_it(self, path):
        last = cells(path)[-1]
        assert ".finish(" in source(last), f"{path.name} ends without finishing its run"
        printed = "".join("".join(o.get("text", "")) for o in last["outputs"])
        recorded = json.loads(EXPECTED.RECORDED.read_text()).get(path.stem.split("_")[0])
        assert recorded and recorded["run"] in printed, (
            f"{path.name} and its key numbers are not of one pass: make notebooks"
        )

    def test_stores_no_path_of_a_machine(self, path):
        text = path.read_text()
        assert (
            "/home/" not in text and "/work/" not in text and "/root/" not in text and "/Users/" not in text
        )

    def test_is_small_enough_for_git(self, path):
        assert path.stat().st_size < 3_000_000


@pytest.mark.parametrize("path", PARAMETERS, ids=lambda p: p.stem)
def test_parameter_files_name_only_parameters_that_exist(path):
    values = yaml.safe_load(path.read_text())
    declared = set()
    for notebook in NOTEBOOKS:
        tree = ast.parse(source(next(c for c in cells(notebook) if "parameters" in tags(c))))
        declared |= {node.target.id for node in tree.body if isinstance(node, ast.AnnAssign)}
    assert set(values) <= declared, (
        f"{path.name} sets parameters that no notebook has: {sorted(set(values) - declared)}"
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_papermill_explains_every_parameter(path):
    done = subprocess.run(
        [sys.executable, "-m", "papermill", "--help-notebook", str(path)], capture_output=True, text=True
    )
    # papermill breaks long lines.
    said, cell = " ".join(done.stdout.split()), next(c for c in cells(path) if "parameters" in tags(c))
    for line in source(cell).splitlines():
        name, meaning = line.split(":")[0].strip(), line.split("  # ", 1)[-1]
        assert f"{name}:" in said and " ".join(meaning.split()) in said, (
            f"papermill does not explain the parameter {name} of {path.name}: {done.stdout}{done.stderr}"
        )
    assert "Unknown type" not in done.stdout


# A wrong value of a parameter, and what the page says instead of a figure. The cells run as they stand,
# without a kernel, up to the first error.
WRONG = (
    ("01", "dataset", "nosuch", "nosuch: there is no images/test"),
    ("01", "split", "nosuch", "there is no images/nosuch"),
    ("01", "town_images", -5, "town_images must be at least 0, got -5"),
    ("01", "radius_m", -1.0, "radius_m must be at least 0, got -1.0"),
    ("01", "radius_m", "wide", "radius_m must be a number, got 'wide'"),
    ("02", "backbone", "nosuch", "timm has no model named 'nosuch'"),
    ("02", "image_size", 127, "cannot be cut into patches of 16"),
    ("02", "places_per_batch", 1, "places_per_batch must be at least 2, got 1"),
    ("02", "top_k", 2.5, "top_k must be a whole number, got 2.5"),
    ("03", "adapter", "nosuch", "adapter must be one of dpn, none, lora"),
    ("03", "aggregator", "nosuch", "aggregator must be one of cls, mean, gem"),
    ("03", "compare_with", "nosuch", "nosuch holds no run"),
    ("03", "epochs", 0, "epochs must be a whole number of at least 1, got 0"),
    ("03", "image_size", 127, "cannot be cut into patches of 16"),
    ("03", "interact", "yes", "interact must be true or false, got 'yes'"),
    ("03", "max_heading_deg", -1.0, "max_heading_deg must be a number from 0 to 180, or None, got -1.0"),
    ("03", "places_per_batch", 500, "lower places_per_batch by"),
    ("03", "prefer", "nosuch", "prefer must be one of closest, farthest, random, got 'nosuch'"),
    ("03", "preprocess", "nosuch", "must be one of paper, antialias, autocontrast, got 'nosuch'"),
    ("03", "run_name", "a/b", "must be one plain folder name"),
    ("04", "methods", "nosuch", "there is no model 'nosuch'"),
    ("04", "view_heading_deg", -1.0, "view_heading_deg must be at least 0, got -1.0"),
    ("04", "perplexity", 0.0, "perplexity must be at least 1, got 0.0"),
    ("04", "places", 1000, "places asks for 1000 places"),
    ("05", "batch_size", 0, "batch_size must be at least 1, got 0"),
    ("05", "methods", "gem:tf_efficientnet_lite2", "the last of methods must use Soft Probing"),
    ("07", "audit_set", "nosuch", "audit_set must be empty or one of"),
    ("07", "grid_file", "nosuch.yaml", "nosuch.yaml: there is no such file"),
    ("07", "k", 0, "k must be one of 1, 2, 3"),
    ("07", "own_runs", "yes", "own_runs must be true or false, got 'yes'"),
    ("07", "results_folder", "nosuch", "there is no folder nosuch"),
)


@pytest.mark.parametrize(("number", "name", "value", "sentence"), WRONG)
def test_a_wrong_value_is_one_sentence(number, name, value, sentence, small_town, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT / "notebooks")
    monkeypatch.setenv("SAGE_RUNS", str(tmp_path))
    path = next(p for p in NOTEBOOKS if p.name.startswith(number))

    def change(page):
        assert name in page, f"{path.name} has no parameter {name}"
        # Not a name that starts with "town": the rendered set is taken as it is.
        small = {"data_folder": str(small_town.parent), "dataset": small_town.name}
        small |= {"places": 4, "places_per_batch": 2, "similar_places": 1, "max_heading_deg": 0.0}
        small |= {"photographs_of_each": 2, "view_radius_m": 12.0, "view_heading_deg": 0.0}
        page.update({key: given for key, given in small.items() if key in page and number != "07"})
        page[name] = value

    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        executed(path, change)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_papermill_stops_with_the_sentence_and_the_place(tmp_path, monkeypatch, capsys):
    """One real kernel: the page names the sentence under its cell, and ``reproduce.py`` says it once more."""
    monkeypatch.setenv("SAGE_RUNS", str(tmp_path / "runs"))
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("radius_m: -1.0\n")
    command = ["--parameters", str(wrong), "--out", str(tmp_path / "out"), "--only", "01"]
    assert module("reproduce").main(command) == 1
    said = capsys.readouterr().err
    assert "01_data_exploration.ipynb stopped in cell" in said and "Traceback" not in said
    assert "ValueError: radius_m must be at least 0, got -1.0" in said and len(said.splitlines()) <= 3
    page = json.loads((tmp_path / "out" / "01_data_exploration.ipynb").read_text())
    errors = [o for c in page["cells"] for o in c.get("outputs", []) if o["output_type"] == "error"]
    assert [o["evalue"] for o in errors] == ["radius_m must be at least 0, got -1.0"]
    assert len(errors[0]["traceback"]) == 1, (
        "the page shows a sentence, and not where in the package it was said"
    )


def test_reproduce_stops_at_a_name_that_no_page_has(tmp_path, capsys):
    """Each page is given its own of a file for several pages, and a slip of the pen must not run on
    defaults."""
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("dataset: town-small\nradius: 10.0\n")
    with pytest.raises(SystemExit):
        module("reproduce").main(["--parameters", str(wrong), "--out", str(tmp_path / "out"), "--only", "01"])
    assert "no notebook has a parameter named radius" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_released_checkpoint_on_pitts30k_stands_above_what_was_published(tmp_path, monkeypatch):
    """The page of tables on a folder of that layout and a checkpoint of that layout, both made here."""
    monkeypatch.setenv("SAGE_RUNS", str(tmp_path / "runs"))
    make_sets.pitts_like(tmp_path, n_places=5)
    torch.save(
        {"model_state_dict": authors_layout.random_checkpoint("B", head=True)}, tmp_path / "SAGE_ViTB.pth"
    )
    parameters = {"data_folder": str(tmp_path), "datasets": "pitts30k-test, msls-val", "pca_dims": "4"}
    parameters |= {"models": str(tmp_path / "SAGE_ViTB.pth"), "context": "sorted"}
    papermill.execute_notebook(
        str(next(p for p in NOTEBOOKS if p.name.startswith("06"))),
        str(tmp_path / "out.ipynb"),
        parameters=parameters | {"preprocess": "paper", "image_size": 126},
        cwd=str(ROOT / "notebooks"),
        kernel_name="python3",
        progress_bar=False,
    )
    (written,) = tmp_path.glob("runs/notebooks/06-*/recall_table.csv")
    table = pandas.read_csv(written, dtype=str, keep_default_na=False)
    row = table[table["method"] == "SAGE_ViTB.pth"].squeeze()
    assert (row["dataset"], row["context"], row["dim"]) == ("pitts30k-test", "sorted-8", "8448")
    assert (row["queries"], row["references"]) == ("5", "10")
    # What the evaluation counted is what plain numpy counts on the same descriptors.
    (run,) = tmp_path.glob("runs/evaluate/SAGE_ViTB*")
    result = json.loads((run / "result.json").read_text())
    database, queries = (
        Descriptors(run / result["descriptors"][part]).values.astype(np.float64)
        for part in ("database", "queries")
    )
    places = open_set(tmp_path, "pitts30k")
    # The head's output has no fixed length, so the nearest is not the one of the greatest product.
    away = ((queries[:, None] - database[None]) ** 2).sum(axis=2)
    metres = pairwise_m(places.queries, places.database)
    found = np.take_along_axis(metres, away.argsort(axis=1, kind="stable"), axis=1) <= 25
    assert [int(row[f"hits@{k}"]) for k in (1, 5)] == [int(found[:, :k].any(axis=1).sum()) for k in (1, 5)]
    published = table[(table["dataset"] == "pitts30k-test") & (table["method"] == "SAGE")]
    assert {"none", "sorted"} <= set(published["context"]) and (published["source"] != "").all()
    missing = table[(table["dataset"] == "msls-val") & (table["method"] == "not run")].squeeze()
    assert "msls" in missing["source"]


class TestExpected:
    """`notebooks/expected.py` compares what a pass has written with what was recorded."""

    NUMBERS = {"R@1 best": 30.0, "loss last epoch": 1.2, "steps": 36}

    def runs(self, folder, *, figure=True, finish=True, **changes):
        run = Run.open(folder, "notebooks", "03-small-abc", {})
        for suffix in (".png", ".pdf") if figure else (".png",):
            run.path("figures", "loss" + suffix).write_bytes(b"x")
        if finish:
            run.finish(self.NUMBERS | changes)
        return EXPECTED.differences({"run": run.name, "numbers": self.NUMBERS}, "03", folder)

    def test_digits_of_training_may_differ(self, tmp_path):
        assert self.runs(tmp_path, **{"R@1 best": 31.7, "loss last epoch": 1.21}) == []

    def test_a_number_that_is_off_is_named(self, tmp_path):
        (sentence,) = self.runs(tmp_path, **{"R@1 best": 55.0})
        assert sentence.startswith("03: R@1 best is 55; 30 was recorded")

    def test_a_count_must_be_equal(self, tmp_path):
        assert len(self.runs(tmp_path, steps=37)) == 1

    def test_not_a_number_is_off(self, tmp_path):
        assert len(self.runs(tmp_path, **{"loss last epoch": float("nan")})) == 1

    def test_a_new_number_must_be_recorded(self, tmp_path):
        assert self.runs(tmp_path, more=1) == ["03: more was never recorded: make notebooks"]

    def test_a_page_that_stopped_has_no_numbers(self, tmp_path):
        assert "was not finished" in self.runs(tmp_path, finish=False)[0]

    def test_a_page_that_did_not_run_is_named(self, tmp_path):
        recorded = {"run": "03-small-abc", "numbers": self.NUMBERS}
        assert (
            "no run named 03-small-abc was written, but none"
            in EXPECTED.differences(recorded, "03", tmp_path)[0]
        )

    def test_figures_are_saved_twice(self, tmp_path):
        assert self.runs(tmp_path, figure=False) == ["03: the figure loss was saved as .png"]

    def test_numbers_are_recorded_and_then_compared(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(EXPECTED, "RECORDED", tmp_path / "expected.json")
        self.runs(tmp_path)
        assert EXPECTED.main(["record", str(tmp_path), "notebooks/03_training.ipynb"]) == 0
        assert EXPECTED.main(["compare", str(tmp_path), "notebooks/03_training.ipynb"]) == 0
        known = json.loads((tmp_path / "expected.json").read_text())
        known["03"]["numbers"]["steps"] = 40
        (tmp_path / "expected.json").write_text(json.dumps(known))
        assert EXPECTED.main(["compare", str(tmp_path), "notebooks/03_training.ipynb"]) == 1
        assert "03: steps is 36; 40 was recorded, and 0 may be off" in capsys.readouterr().err

    def test_tolerances_come_from_the_spread_of_several_passes(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(EXPECTED, "RECORDED", tmp_path / "expected.json")
        passes = [tmp_path / name for name in "ab"]
        for folder, loss, steps in zip(passes, (1.0, 1.1), (36, 36), strict=True):
            self.runs(folder, **{"loss last epoch": loss, "steps": steps})
        command = [*map(str, passes), "notebooks/03_training.ipynb"]
        assert EXPECTED.main(["record", *command]) == 0
        known = json.loads((tmp_path / "expected.json").read_text())["03"]
        assert known["numbers"]["loss last epoch"] == 1.0 and known["tolerances"]["steps"] == 0
        assert np.isclose(known["tolerances"]["loss last epoch"], 0.3)
        self.runs(tmp_path / "c", **{"loss last epoch": 1.29})
        assert EXPECTED.main(["compare", str(tmp_path / "c"), command[-1]]) == 0
        self.runs(tmp_path / "d", **{"loss last epoch": 1.31})
        assert EXPECTED.main(["compare", str(tmp_path / "d"), command[-1]]) == 1
        assert "and 0.3 may be off" in capsys.readouterr().err
        assert EXPECTED.main(["compare", *command]) == 2
