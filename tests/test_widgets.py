"""Widgets without a browser: the plain functions, and what a moved slider or a click changes."""

import json
import re
import shutil
from types import SimpleNamespace

import IPython.display
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from plotly.callbacks import InputDeviceState, Points

from sagelib.graph import GeoVisualGraph
from sagelib.places import Places, TestSet
from sagelib.retrieval import rankings_table
from workbench import analysis, widgets

PNG = b"\x89PNG"
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    """Thirty references on a street and three queries, with what was retrieved for these."""
    folder, rng = tmp_path_factory.mktemp("street"), np.random.default_rng(0)
    names = [str(folder / f"{kind}{i}.png") for kind, n in (("d", 30), ("q", 3)) for i in range(n)]
    for grey, name in enumerate(names):
        Image.new("RGB", (28, 28), (7 * grey, 80, 160)).save(name)
    east = np.r_[np.arange(30) * 10.0, 5.0, 100, 200]
    places = Places.build(names, east_m=east, north_m=np.zeros(33), utm_zone=["31U"] * 33)
    database, queries = places[:30], places[30:]
    reference = np.stack([rng.permutation(30)[:5] for _ in range(3)])
    metres = np.abs(queries.east_m[:, None] - database.east_m[reference])
    found = {"reference": reference, "positive": np.arange(15).reshape(3, 5) % 3 == 0, "metres": metres}
    return database, queries, found


def captions(figure):
    return [axis.get_xlabel() for axis in figure.axes]


def press(trace, indices, xs=(), ys=(), *, event="click"):
    """What plotly does when a point of the trace is clicked, or lies under the mouse."""
    points = Points(point_inds=list(indices), xs=list(xs), ys=list(ys), trace_name="", trace_index=0)
    getattr(trace, f"_dispatch_on_{event}")(points, InputDeviceState())


def test_rows_of_retrievals(street):
    found = street[2]
    shown = captions(widgets.retrieval_rows(*street, [1, 0], k=2, truth={0: 4}))
    assert shown[::4] == ["query 1", "query 0"]
    rows = [f"#{j + 1} {'✗✓'[1 - j]}  {found['metres'][0, j]:.0f} m" for j in range(2)]
    assert shown[5:] == [*rows, "a true reference"]
    assert len(captions(widgets.retrieval_rows(*street, [1]))) == 5


def test_the_browser_follows_slider_and_click(street, capsys):
    database, queries, found = street
    box, chart = widgets.retrieval_browser(*street, order=[2, 0], truth={0: 4}).children
    position = box.children[0]
    assert captions(box.result)[0] == "query 2"
    position.value = 1
    assert captions(box.result)[0] == "query 0" and "query 0: q0.png" in capsys.readouterr().out
    assert list(chart.data[3].x) == [10.0 * i for i in found["reference"][0]]
    assert list(chart.data[4].x) == [5.0]
    press(chart.data[1], [2])
    assert position.value == 0 and captions(box.result)[0] == "query 2"
    press(chart.data[1], [1])
    assert position.value == 0, "a query that is not among those browsed"
    far = database.replace(east_m=database.east_m * 1000)
    _, chart = widgets.retrieval_browser(far, queries, found, order=[0], truth={}).children
    assert chart.layout.xaxis.range == (5 - 60, found["reference"][0].max() * 10_000 + 60)


@pytest.fixture
def review(tmp_path, street):
    """The queries as an evaluated set, all answered wrongly; a script hides in a name and in a note."""
    database, queries, found = street
    name = f"{tmp_path}/<script>alert(1)<!--.png"
    Image.new("RGB", (28, 28)).save(name)
    note = np.array(["</script>night", "", ""])
    queries = queries.replace(path=np.array([name, *queries.path[1:]]), note=note)
    test_set = TestSet(name="street", database=database, queries=queries)
    positives = test_set.positives()
    wrong = np.array([np.setdiff1d(np.arange(30), rows)[:3] for rows in positives])
    alike, table = np.full((3, 3), 0.5), tmp_path / "rankings.csv"
    rankings_table(wrong, alike, database, queries, positives).to_csv(table, index=False)
    names = dict(path=tmp_path, model="sage", dataset="</script>", context="none")
    result = SimpleNamespace(**names, rankings=lambda: pd.read_csv(table))
    return result, test_set, analysis.suspects(result.rankings(), database, queries, positives, count=0)


def test_the_review_page_is_whole_and_a_script_in_a_name_or_a_note_is_text(tmp_path, review):
    result, test_set, cases = review
    page = widgets.write_review(result, test_set, tmp_path / "run", count=0)
    text = page.read_text()
    assert page.name == "review.html" and text.count("<section") == 3
    assert text.count("data:image/jpeg;base64,") == 3 * (1 + 3 + 1)
    assert text.count('type="radio"') == 3 * 4 and text.count('type="checkbox"') == 3 * 3
    elsewhere = re.search(r"""(src|href)=["'](?!data:)|https?://|@import|url\(""", text)
    assert not elsewhere, "nothing from elsewhere"
    words = " ".join(text.split())
    assert "context none, run " in words and "4 references count as positives (25 m)." in words
    assert "✗ no positive" in words and "not among the first 3" in words
    assert text.count("<script") == text.count("</script>") == 1, "the page's own"
    assert "&lt;script&gt;alert(1)&lt;!--.png" in text and "&lt;/script&gt;night" in text
    rows = json.loads(re.search(r"cases = (\[.*?\]), key", text).group(1))
    assert str(rows) == str(cases)
    assert any(row["query_path"].endswith("<script>alert(1)<!--.png") for row in rows)
    right = np.array([rows[:3] for rows in test_set.positives()])
    places = test_set.database, test_set.queries
    table = rankings_table(right, np.full((3, 3), 0.5), *places, test_set.positives())
    table.to_csv(tmp_path / "rankings.csv", index=False)
    text = widgets.write_review(result, test_set, tmp_path, count=0).read_text()
    assert "nothing to review" in text and "<section" not in text
    shown, found = (
        captions(widgets.review_view(*places, test_set.positives(), cases[0])),
        cases[0]["found"][0],
    )
    assert shown[:2] == [f"query {cases[0]['query']}", f"#1 ✗  {found['metres']:.0f} m"]
    assert "a positive  5 m" in shown, "the nearest positive is shown"


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no browser installed (Debian: apt install chromium)")
def test_verdicts_are_kept_saved_and_loaded_without_a_network(tmp_path, review):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    address = widgets.write_review(*review[:2], tmp_path, count=2).as_uri()
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        context = chromium.new_context(offline=True, accept_downloads=True)
        page, faults, requests = context.new_page(), [], []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        first = page.locator("section").first
        first.locator("input[type=radio]").first.check()
        first.locator("input[type=checkbox]").nth(1).check()
        first.locator("input[type=text]").fill('the "same", door')
        assert page.inner_text("#done") == "1 of 2 judged"
        for kind in ("csv", "json"):
            with page.expect_download() as download:
                page.click(f"#{kind}")
            download.value.save_as(tmp_path / f"verdicts.{kind}")
        for _ in range(20):  # the browser may answer a new page before it has stored what the old one gave
            page.reload()
            if page.inner_text("#done") == "1 of 2 judged":
                break
        assert page.inner_text("#done") == "1 of 2 judged", "kept by the browser"
        page.evaluate("localStorage.clear()")
        page.reload()
        assert page.inner_text("#done") == "0 of 2 judged"
        page.set_input_files("#load", tmp_path / "verdicts.json")
        page.wait_for_function("document.getElementById('done').textContent === '1 of 2 judged'")
        chromium.close()
    loaded = {url for url in requests if not url.startswith("data:")}
    assert not faults and loaded <= {address, f"blob:{address}"}
    table = pd.read_csv(tmp_path / "verdicts.csv", keep_default_na=False)
    rows = json.loads((tmp_path / "verdicts.json").read_text())
    assert table["verdict"].tolist() == ["truth wrong", ""] and table["remark"][0] == 'the "same", door'
    assert rows[0]["same_place"] == [2] and rows[0]["query"] == table["query"][0]
    assert rows[0]["context"] == "none" and rows[0]["nearest_positive_path"].endswith(".png")


OPTIONS = dict(radius_m=25.0, tau=None, top_k=None, images_per_place=4, places=8, prefer="closest", seed=0)


@pytest.fixture(scope="module")
def crowd():
    rng = np.random.default_rng(1)
    at = {"east_m": np.sort(rng.uniform(0, 300, 90)), "north_m": rng.normal(0, 2, 90)}
    return Places.build([f"{i}.jpg" for i in range(90)], **at), rng.normal(size=(90, 8)).cumsum(axis=0)


def test_graph_view_gives_the_graph_of_its_values(crowd):
    photographs, descriptors = crowd
    _, loose = widgets.graph_view(*crowd, **OPTIONS)
    figure, strict = widgets.graph_view(*crowd, **OPTIONS | dict(tau=-30.0, top_k=4))
    assert isinstance(figure, Figure)
    rules = dict(descriptors=descriptors, radius_m=25, tau=-30.0, top_k=4)
    built = GeoVisualGraph(photographs.east_m, photographs.north_m, **rules)
    assert strict["edges"] == built.n_edges < loose["edges"]
    assert strict["edges"] + strict["pruned_edges"] == loose["edges"] + loose["pruned_edges"]
    assert strict["mean_weight"] > -30.0
    _, hard = widgets.graph_view(*crowd, **OPTIONS | dict(prefer="farthest"))
    assert hard["mean_weight"] < loose["mean_weight"], "hard places are farther and less alike"
    apart = photographs.replace(east_m=photographs.east_m * 1000)
    _, empty = widgets.graph_view(apart, descriptors, **OPTIONS)
    assert empty["places"] == empty["edges"] == 0 and np.isnan(empty["mean_weight"])


def test_the_graph_explorer_begins_at_the_values_of_the_page_and_follows_its_sliders(crowd, capsys):
    rules = dict(images_per_place=3, places=8, min_clique=5)
    box = widgets.graph_explorer(*crowd, radius_m=20.0, top_k=7, prefer="random", seed=3, **rules)
    assert [control.value for control in box.children[:-1]] == [20, "off", 7, "random", 3]
    box = widgets.graph_explorer(*crowd, radius_m=25.0, top_k=None, prefer="closest", seed=0, **rules)
    radius_m, tau, top_k, _, _, _ = box.children

    def edges():
        assert isinstance(box.result, Figure)
        found = re.findall(r"([\d,]+) edges, ([\d,]+) pruned", capsys.readouterr().out)
        return [int(number.replace(",", "")) for number in found[-1]]

    all_of_them, none = edges()
    for slider, value in ((radius_m, 12), (top_k, 2), (tau, tau.options[-1])):
        before = slider.value
        slider.value = value
        assert 0 < edges()[0] < all_of_them
        slider.value = before
        assert edges() == [all_of_them, none]


def test_images_are_chosen_anew_only_where_their_affinities_change():
    rng = np.random.default_rng(0)
    places = Places.build([f"{i}.jpg" for i in range(30)], east_m=np.arange(30) * 5.0, north_m=np.zeros(30))
    before, after = analysis.unit(rng.normal(size=(2, 30, 4)).reshape(60, 4)).reshape(2, 30, 4)
    rules = {"images_per_place": 4, "radius_m": 25.0, "max_heading_deg": None}
    figure, stayed = widgets.renewed_choice(places, before, before, **rules)
    assert len(stayed) == 25 and (stayed == 4).all(), "every six neighbours of the street are a clique"
    assert figure.axes[1].patches[4].get_height() == 25
    assert (widgets.renewed_choice(places, before, after, **rules)[1] < 4).any()


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(2)
    query, reference = rng.normal(size=(12, 5)), rng.normal(size=(12, 5))
    reference[9] = 3 * query[7]
    return *rng.integers(0, 255, (2, 30, 40, 3), dtype=np.uint8), query, reference, (3, 4)


def test_the_patch_matcher_follows_slider_and_click(pair):
    left, box = widgets.patch_matcher(*pair).children
    row, column = box.children[:2]
    assert box.result.axes[0].get_title() == "patch (1, 2)"
    column.value = 3
    titles = [axis.get_title() for axis in box.result.axes[:2]]
    assert titles == ["patch (1, 3)", "best match (2, 1): 1.00"]
    press(left.children[0].data[0], [0], xs=[39], ys=[29])
    assert (row.value, column.value) == (2, 3) and box.result.axes[0].get_title() == "patch (2, 3)"


def test_the_heatmap_chooser_draws_what_is_chosen(pair):
    pictures, maps = pair[:2], {"weight": (np.eye(4)[None] * [[[0.2]], [[0.4]]], (0, 0.5))}
    maps["score"] = (-np.ones((2, 3, 3)), (-2.0, 2.0))
    box = widgets.heatmap_chooser(pictures, maps, ["day", "night"])
    picture, values = box.children[:2]
    assert box.result.get_suptitle() == "day: weight"
    picture.value, values.value = 1, "score"
    assert box.result.get_suptitle() == "night: score"
    assert box.result.axes[1].get_images()[1].get_clim() == (-2.0, 2.0)


def test_the_tsne_explorer_follows_its_sliders_and_the_mouse(street):
    rng, place, paths = np.random.default_rng(0), np.repeat(np.arange(4), 3), street[0].path[:12]
    descriptors = {"a": rng.normal(size=(12, 8)), "b": rng.normal(size=(12, 5))}
    names, said = [f"place {p} · night" for p in place], []
    box, waiting, beside = widgets.tsne_explorer(
        descriptors, place, paths, names=names, aid=None, class_aid=None, perplexity=4, seed=0
    ).children
    chart, photograph = beside.children[0].children[0], beside.children[1]
    before = np.concatenate([trace.x for trace in chart.data])
    waiting.observe(lambda change: said.append(change["new"]), "value")
    box.children[0].value = 6
    assert said == ["computing 2 maps ...", ""], "a map takes seconds, and the page says so"
    assert not np.allclose(before, np.concatenate([trace.x for trace in chart.data]))
    expected = analysis.tsne(descriptors["b"], perplexity=6, seed=0)
    shown = [trace.x for trace in chart.data if trace.customdata[0][3] == "b"]
    np.testing.assert_allclose(np.concatenate(shown), expected[:, 0], rtol=1e-6)
    trace = chart.data[1]
    press(trace, [2], event="hover")
    assert trace.customdata[2][1] in names and trace.customdata[2][1] in photograph.value
    assert "data:image/jpeg;base64," in photograph.value


def test_the_live_curve_of_a_page_appears_only_where_somebody_looks(monkeypatch):
    shown, log = [], []
    monkeypatch.setattr(IPython.display, "display", shown.append)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert not widgets.live()
    with widgets.live_curve(lambda: log, plateau=1.4):
        assert shown == []
    monkeypatch.setenv("JPY_SESSION_NAME", "03.ipynb")
    assert widgets.live()
    with widgets.live_curve(lambda: list(log), plateau=1.4, every_s=0.01) as picture:
        assert shown == [picture] and bytes(picture.value) == b"", "nothing to draw yet"
        log.extend({"kind": "step", "step": i, "loss": 1.4 - i / 100} for i in range(50))
    assert bytes(picture.value).startswith(PNG)
