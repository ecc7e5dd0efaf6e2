"""Pages: parameters are checked, their run takes figures and numbers, and starts afresh each time."""

import re
from pathlib import Path

import numpy as np
import pandas
import pytest
from IPython.core.interactiveshell import InteractiveShell
from matplotlib.figure import Figure

from sagelib.runs import load_run
from workbench import pages
from workbench.pages import NOTEBOOKS, Page, open_notebook_run, read_list, start_page


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_parameters_are_checked_against_their_types_and_least_values():
    page = {"__annotations__": {"epochs": int, "lr": float, "name": str, "head": bool}}
    page |= {"epochs": 3, "lr": 1, "name": "a", "head": True}
    start_page(page, epochs=1, lr=0)
    assert Path.cwd() == NOTEBOOKS and (NOTEBOOKS / "01_data_exploration.ipynb").is_file()
    start_page(page | {"lr": None}, lr=None)
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
            start_page(page | wrong, epochs=1, lr=0)
    with pytest.raises(ValueError, match="name must be one of b, c, got 'a'"):
        start_page(page, name=("b", "c"))
    with pytest.raises(ValueError, match="epochs must be one of 1, 2, got 3"):
        start_page(page, epochs=range(1, 3))


def test_an_unknown_parameter_stops_the_page():
    page = {"__annotations__": {"epochs": int}, "epochs": 1}
    start_page(page | {"In": ["", "epochs: int = 1", "# Parameters\nepochs = 1\n"]})
    with pytest.raises(ValueError, match="this page has no parameter epoch; it has epochs"):
        start_page(page | {"In": ["", "epochs: int = 1", "# Parameters\nepoch = 1\nepochs = 1\n"]})


def test_an_exercise_waits_until_it_is_completed(monkeypatch, capsys):
    shell = InteractiveShell(user_ns={"known": 2})
    monkeypatch.setattr(pages, "get_ipython", lambda: shell)
    pages.exercise("1", "answer = ...\nassert answer == known")
    assert "Exercise 1 is open" in capsys.readouterr().out and "answer" not in shell.user_ns
    with pytest.raises(AssertionError, match="not yet"):
        pages.exercise("1", "answer = 3\nassert answer == known, 'not yet'")
    pages.exercise("1", "answer = 2\nassert answer == known\nprint('right')")
    assert capsys.readouterr().out == "right\n" and shell.user_ns["answer"] == 2


def test_the_run_of_a_page_starts_afresh_each_time(tmp_path):
    page = open_notebook_run(tmp_path, "01", "a/b", radius_m=25.0)
    page.finish({"n": 1})
    again = open_notebook_run(tmp_path, "01", "a/b", radius_m=25.0)
    assert again.dir == page.dir and again.name.startswith("01-a_b-") and not load_run(page.dir).finished
    assert open_notebook_run(tmp_path, "01", "a/b", radius_m=26.0).dir != page.dir


def test_figures_are_saved_with_their_numbers(tmp_path):
    run = Page.open(tmp_path, "train", "a", {})
    figure = Figure(figsize=(1, 1))
    figure.add_subplot().plot([0, 1])
    written = run.save_figure(figure, "loss", numbers=pandas.DataFrame({"x": [1, 2]}))
    assert [p.name for p in written] == ["loss.png", "loss.pdf", "loss.csv"]
    assert written[0].read_bytes().startswith(b"\x89PNG") and written[1].read_bytes().startswith(b"%PDF")
    assert written[2].read_text().split() == ["x", "1", "2"]
    written += run.save_figure(figure, "map", numbers={"a": np.arange(2)})
    assert written[-1].name == "map.json"
    assert sorted(p.name for p in (run.dir / "figures").iterdir()) == sorted(p.name for p in written)


def test_plotly_figures_are_pages(tmp_path):
    class Chart:  # plotly's two methods; a machine without its browser fails at the second
        def write_html(self, path, include_plotlyjs):
            assert include_plotlyjs is True  # the page is read without a network
            Path(path).write_text("<html>")

        def write_image(self, path, scale):
            Path(path).write_bytes(b"half a picture")
            raise RuntimeError("no browser")

    run = Page.open(tmp_path, "train", "a", {})
    assert [p.name for p in run.save_figure(Chart(), "graph")] == ["graph.html"]
    assert [p.name for p in (run.dir / "figures").iterdir()] == ["graph.html"]


def test_lists_in_parameters():
    assert read_list(" a,b , c", "models") == ["a", "b", "c"]
    assert read_list("256, 64", "pca_dims", int) == [256, 64]
    assert read_list("", "pca_dims", int, least=0) == []
    for text, kind, sentence in (
        (" , ", str, "models is ' , ': give at least one value"),
        ("a, a", str, "models is 'a, a': it names one of them twice"),
        ("12a", int, "models is '12a': give whole numbers separated by commas"),
    ):
        with pytest.raises(ValueError, match=sentence):
            read_list(text, "models", kind)
