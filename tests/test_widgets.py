"""Widgets without a browser: the plain functions, and what a moved slider or a click changes."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from sagelib.graph import GeoVisualGraph
from sagelib.places import Places, TestSet
from sagelib.retrieval import read_rankings, write_rankings
from workbench import analysis, figures, widgets

PNG = b"\x89PNG"
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)


def picture(path):
    """A plain picture whose grey is the number in its name."""
    grey = int("".join(filter(str.isdigit, path))) % 256
    return Image.new("RGB", (28, 28), (grey, 80, 160))


@pytest.fixture(scope="module")
def retrieval():
    rng = np.random.default_rng(0)
    database = Places.build(
        [f"d{i}.jpg" for i in range(30)],
        east_m=np.arange(30) * 10.0,
        north_m=np.zeros(30),
        utm_zone=["31U"] * 30,
    )
    queries = Places.build(
        [f"q{i}.jpg" for i in range(4)],
        east_m=np.array([5.0, 100, 200, np.nan]),
        north_m=np.zeros(4),
        utm_zone=["31U", "31U", "32U", "31U"],
    )
    indices = np.stack([rng.permutation(30)[:6] for _ in range(4)])
    return database, queries, indices, np.arange(24).reshape(4, 6) % 3 == 0


@pytest.fixture(scope="module")
def street():
    rng = np.random.default_rng(1)
    east, north = np.sort(rng.uniform(0, 300, 90)), rng.normal(0, 2, 90)
    return east, north, rng.normal(size=(90, 8)).cumsum(axis=0)


def test_distances_stay_within_a_zone(retrieval):
    database, queries, indices, _ = retrieval
    metres = widgets.distances_m(database, queries, indices)
    np.testing.assert_allclose(metres[0], np.abs(5.0 - 10.0 * indices[0]))
    assert np.isnan(metres[2]).all(), "another zone"
    assert np.isnan(metres[3]).all(), "no position"


def test_retrieval_view_and_map(retrieval):
    database, queries, indices, correct = retrieval
    figure = widgets.retrieval_view(database, queries, indices, correct, 0, k=3, load=picture, truth=2)
    captions = [axis.get_xlabel() for axis in figure.axes]
    assert captions[0] == "query 0" and captions[-1] == "a true reference"
    assert captions[1] == f"#1 ✓  {abs(5 - 10 * indices[0, 0]):.0f} m"
    chart = widgets.retrieval_map(database, queries, indices, correct, 1, k=3)
    found = chart.data[3]
    assert list(found.x) == [10.0 * i for i in indices[1, :3]]
    assert list(chart.data[4].x) == [100.0]
    with pytest.raises(ValueError, match=r"query must lie in 0 \.\.\. 3, got 4"):
        widgets.retrieval_view(database, queries, indices, correct, 4, load=picture)


def test_the_browser_follows_slider_and_click(retrieval):
    database, queries, indices, correct = retrieval
    box = widgets.retrieval_browser(
        database, queries, indices, correct, order=[2, 0, 1], load=picture, truth=[None, 4, None, None]
    )
    shown = box.children[2]
    assert box.query == 2 and bytes(shown.value).startswith(PNG)
    before = bytes(shown.value)
    box.position.value = 1
    assert box.query == 0 and bytes(shown.value) != before
    assert list(box.map.data[3].x) == [10.0 * i for i in indices[0, :5]]
    assert list(box.map.data[4].x) == [5.0]
    _press(box.map.data[1], [1])
    assert box.query == 1 and box.position.value == 2
    _press(box.map.data[1], [3])
    assert box.query == 1, "a query that is not among those browsed"
    with pytest.raises(ValueError, match="order names no query"):
        widgets.retrieval_browser(database, queries, indices, correct, order=[], load=picture)


def test_rows_of_retrievals(retrieval):
    database, queries, indices, correct = retrieval
    figure = widgets.retrieval_rows(database, queries, indices, correct, [1, 0], k=2, load=picture)
    captions = [axis.get_xlabel() for axis in figure.axes]
    assert captions[0] == "query 1" and captions[3] == "query 0" and len(captions) == 6
    assert captions[4] == f"#1 ✓  {abs(5 - 10 * indices[0, 0]):.0f} m"
    with pytest.raises(ValueError, match="chosen names no query"):
        widgets.retrieval_rows(database, queries, indices, correct, [], load=picture)


def review_set(tmp_path, retrieval):
    """The first two queries as an evaluated set; both are answered wrongly."""
    database, queries, indices, _ = retrieval
    test_set = TestSet(name="street", database=database, queries=queries[:2])
    positives = test_set.positives()
    wrong = [[j for j in row if j not in positives[q]] for q, row in enumerate(indices[:2])]
    ranked = np.array([row[:3] for row in wrong])
    write_rankings(tmp_path / "rankings.csv", ranked, np.full((2, 3), 0.5), database, queries[:2], positives)
    result = SimpleNamespace(path=tmp_path, model="sage", dataset="street", context="none")
    return result, test_set, positives


def test_the_review_page_of_a_result(tmp_path, retrieval):
    result, test_set, positives = review_set(tmp_path, retrieval)
    page = widgets.write_review(result, test_set, tmp_path / "run", count=0, k=2, load=picture)
    text = page.read_text()
    assert page.name == "review.html" and text.count("<section") == 2
    assert "context none, run " in text and "(25 m)" in text and "not among the first 3" in text
    first = analysis.suspects(
        read_rankings(tmp_path / "rankings.csv"), test_set.database, test_set.queries, positives
    )[0]
    figure = widgets.review_view(test_set.database, test_set.queries, positives, first, load=picture)
    captions = [axis.get_xlabel() for axis in figure.axes]
    assert captions[0].startswith("query ") and captions[1].startswith("#1 ✗")
    assert "a positive  5 m" in captions or "a positive  0 m" in captions, "the nearest positive is shown"


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no browser installed (Debian: apt install chromium)")
def test_verdicts_are_kept_saved_and_loaded_without_a_network(tmp_path, retrieval):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    result, test_set, _ = review_set(tmp_path, retrieval)
    address = widgets.write_review(result, test_set, tmp_path, k=2, load=picture).as_uri()
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        context = chromium.new_context(offline=True, accept_downloads=True)
        page, faults, asked = context.new_page(), [], []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        assert page.locator("section:visible").count() == 1
        page.locator("section:visible input[type=radio]").first.check()
        page.locator("section:visible input[type=checkbox]").nth(1).check()
        page.locator("section:visible input[type=text]").fill('the "same", door')
        page.click("#next")
        assert page.inner_text("#where") == "page 2 of 2" and page.inner_text("#done") == "1 of 2 judged"
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
    assert not faults and {url for url in asked if not url.startswith("data:")} <= {
        address,
        f"blob:{address}",
    }
    table = pd.read_csv(tmp_path / "verdicts.csv", keep_default_na=False)
    rows = json.loads((tmp_path / "verdicts.json").read_text())
    assert table["verdict"].tolist() == ["truth wrong", ""] and table["remark"][0] == 'the "same", door'
    assert rows[0]["same_place"] == [2] and rows[0]["query"] == table["query"][0]
    assert rows[0]["context"] == "none" and rows[0]["nearest_positive_path"].endswith(".jpg")


def _press(trace, indices, xs=(), ys=()):
    """What plotly does when a point of the trace is clicked."""
    from plotly.callbacks import InputDeviceState, Points

    points = Points(point_inds=list(indices), xs=list(xs), ys=list(ys), trace_name="", trace_index=0)
    trace._dispatch_on_click(points, InputDeviceState())


@pytest.mark.parametrize("prefer", ["closest", "farthest", "random"])
def test_drawn_places_are_cliques_that_do_not_touch(street, prefer):
    east, north, values = street
    graph = GeoVisualGraph(east, north, descriptors=values, tau=-60.0)
    drawn = widgets.draw_places(graph, images_per_place=3, places=6, prefer=prefer, seed=3)
    assert 2 <= len(drawn) <= 6
    kept = {tuple(edge) for edge in graph.edges().tolist()}
    for place in drawn:
        assert len(set(place)) == 3
        assert all((min(a, b), max(a, b)) in kept for a in place for b in place if a != b)
    owner = {image: i for i, place in enumerate(drawn) for image in place}
    assert len(owner) == 3 * len(drawn)
    assert not [
        edge for edge in kept if owner.get(edge[0], -1) != owner.get(edge[1], -2) and set(edge) <= set(owner)
    ]
    assert drawn == widgets.draw_places(graph, images_per_place=3, places=6, prefer=prefer, seed=3)


def test_graph_view_gives_the_graph_of_its_values(street):
    east, north, values = street
    _, loose = widgets.graph_view(east, north, values, radius_m=25)
    figure, strict = widgets.graph_view(east, north, values, radius_m=25, tau=-30.0, top_k=4)
    assert isinstance(figure, Figure)
    built = GeoVisualGraph(east, north, descriptors=values, radius_m=25, tau=-30.0, top_k=4)
    assert strict["edges"] == built.n_edges < loose["edges"]
    assert strict["edges"] + strict["pruned"] == loose["edges"] + loose["pruned"]
    assert strict["mean_weight"] > -30.0
    _, hard = widgets.graph_view(east, north, values, prefer="farthest")
    assert hard["mean_weight"] < loose["mean_weight"], "hard places are farther and less alike"


def test_graph_view_with_nothing_to_draw(street):
    east, north, values = street
    _, numbers = widgets.graph_view(east * 1000, north, values, radius_m=5)
    assert numbers["places"] == numbers["edges"] == 0 and np.isnan(numbers["mean_weight"])


def test_the_graph_explorer_follows_its_sliders(street):
    east, north, values = street
    box = widgets.graph_explorer(east, north, values, images_per_place=3)
    first, edges = bytes(box.picture.value), box.numbers["edges"]
    assert first.startswith(PNG)
    box.radius_m.value = 12
    assert box.numbers["edges"] < edges and bytes(box.picture.value) != first
    assert f"{box.numbers['edges']:,} edges" in box.text.value
    box.radius_m.value = 25
    box.top_k.value = 2
    assert box.numbers["edges"] < edges and box.numbers["pruned"] > 0
    box.top_k.value = "off"
    box.tau.value = box.tau.options[-1][1]
    assert 0 < box.numbers["edges"] < edges
    box.tau.value = "off"
    assert box.numbers["edges"] == edges


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(2)
    query, reference = rng.normal(size=(12, 5)), rng.normal(size=(16, 5))
    reference[9] = 3 * query[7]
    pictures = (
        rng.integers(0, 255, (30, 40, 3), dtype=np.uint8),
        rng.integers(0, 255, (40, 40, 3), dtype=np.uint8),
    )
    return (*pictures, query, reference, ((3, 4), (4, 4)))


def test_a_patch_finds_its_copy(pair):
    figure = widgets.patch_view(*pair, row=1, column=3)
    assert [axis.get_title() for axis in figure.axes[:2]] == ["patch (1, 3)", "best match (2, 1): 1.00"]
    with pytest.raises(ValueError, match="row and column must lie within 3 x 4, got 3 and 0"):
        widgets.patch_view(*pair, row=3, column=0)


def test_the_patch_matcher_follows_slider_and_click(pair):
    box = widgets.patch_matcher(*pair)
    first = bytes(box.picture.value)
    assert first.startswith(PNG) and (box.row.value, box.column.value) == (1, 2)
    box.column.value = 3
    assert bytes(box.picture.value) != first
    _press(box.clickable.data[0], [0], xs=[39], ys=[29])
    assert (box.row.value, box.column.value) == (2, 3)


def test_the_tsne_browser_shows_the_photograph():
    place = np.repeat([0, 1], 3)
    points = {"one": np.random.default_rng(0).normal(size=(6, 2))}
    chart = figures.tsne_plotly(points, place, files=[f"f{i}.jpg" for i in range(6)])
    box = widgets.tsne_browser(chart, [f"f{i}.jpg" for i in range(6)], load=picture)
    assert bytes(box.picture.value) == b""
    from plotly.callbacks import InputDeviceState, Points

    over = Points(point_inds=[2], xs=[], ys=[], trace_name="", trace_index=1)
    box.chart.data[1]._dispatch_on_hover(over, InputDeviceState())
    assert bytes(box.picture.value).startswith(PNG) and "f5.jpg" in box.text.value


def test_the_tsne_explorer_follows_its_sliders():
    rng = np.random.default_rng(0)
    place = np.repeat(np.arange(4), 3)
    descriptors = {"a": rng.normal(size=(12, 8)), "b": rng.normal(size=(12, 5))}
    box = widgets.tsne_explorer(
        descriptors, place, [f"f{i}.jpg" for i in range(12)], perplexity=4, load=picture
    )
    before = [np.array(trace.x) for trace in box.chart.data]
    box.perplexity.value = 6
    after = [np.array(trace.x) for trace in box.chart.data]
    assert any(not np.allclose(b, a) for b, a in zip(before, after, strict=True))
    expected = analysis.tsne(descriptors["b"], perplexity=6, seed=0)
    shown = [trace.x for trace in box.chart.data if trace.customdata[0][3] == "b"]
    np.testing.assert_allclose(np.concatenate(shown), expected[:, 0], rtol=1e-6)
    box.seed.value = 3
    box.show(7)
    assert "f7.jpg" in box.text.value and box.picture.value[:4] == b"\x89PNG"


def test_a_page_without_a_browser_is_not_live(monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert not widgets.live()
    monkeypatch.setenv("JPY_SESSION_NAME", "04.ipynb")
    assert widgets.live()


def test_the_live_curve_draws_what_the_log_holds():
    log = []
    live = widgets.LiveCurve(lambda: list(log), plateau=1.4, every_s=0.01)
    assert live.figure() is None
    with live:
        log.extend({"kind": "step", "step": i, "loss": 1.4 - i / 100} for i in range(50))
    first = bytes(live.widget.value)
    assert first.startswith(PNG)
    assert live.figure().axes[0].lines[0].get_xdata().tolist() == list(range(50))
    live.draw()
    assert bytes(live.widget.value) == first, "an equal log is not drawn again"
    with pytest.raises(ValueError, match="every_s must be above 0"):
        widgets.LiveCurve(list, every_s=0)


def test_the_live_curve_of_a_page_appears_only_where_somebody_looks(monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", shown.append)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    with widgets.live_curve(list) as curve:
        assert curve is None and shown == []
    monkeypatch.setenv("JPY_SESSION_NAME", "03.ipynb")
    log = [{"kind": "step", "step": i, "loss": 1.0} for i in range(3)]
    with widgets.live_curve(lambda: log, plateau=1.4, every_s=0.01) as curve:
        assert shown == [curve.widget]
    assert bytes(curve.widget.value).startswith(PNG)
