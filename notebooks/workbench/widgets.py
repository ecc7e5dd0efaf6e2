"""Things to click, slide and hover in JupyterLab; beside each a plain function draws the same figure.

The plain functions work without a browser; the widgets, ``ipywidgets.VBox``, only pass their controls on.
"""

import contextlib
import html
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from sagelib.graph import GeoVisualGraph
from sagelib.images import load_image
from sagelib.places import Places
from sagelib.runs import write_text
from sagelib.sampler import SamplerConfig, harvest
from workbench import analysis, figures
from workbench.figures import style


def live() -> bool:
    """Whether a Jupyter server runs this kernel for a page that somebody has open.

    A page executed without a browser shows static figures alone: widgets would draw nothing, and a plotly
    widget would write all of plotly.js into the stored page.
    """
    return bool(os.environ.get("JPY_SESSION_NAME"))


def _slider(name: str, value: int, low: int, high: int):
    import ipywidgets

    return ipywidgets.IntSlider(value, low, high, description=name, continuous_update=False)


def _follow(show: Callable, *controls) -> None:
    """Call `show` whenever one of the controls is moved, and now."""
    for control in controls:
        control.observe(lambda _change: show(), "value")
    show()


def _file(path) -> str:
    return str(path).rsplit("/", 1)[-1][:60]


# --- queries and what was retrieved for them ----------------------------------------------------------------


def retrieval_rows(
    database: Places, queries: Places, found: Mapping, chosen, *, k=4, tile=1.3, title=None, truth=None
):
    """Draw queries with their k first references, a row each, as a matplotlib figure.

    Parameters
    ----------
    database, queries : Places
    found : mapping of arrays (Q, at least k)
        ``reference``, ``positive`` and ``metres``, see `workbench.analysis.ranking_arrays`.
    chosen : sequence of int
        The queries, from above.
    tile, title
        Of `workbench.figures.retrieval_panel`.
    truth : mapping of int to int, optional
        A true reference of each query that has one, drawn in a last column.
    """
    chosen = np.asarray(chosen, dtype=int)
    reference, positive, metres = (found[name][chosen, :k] for name in ("reference", "positive", "metres"))
    if truth is not None:
        truth = [load_image(database.path[truth[q]]) if q in truth else None for q in chosen.tolist()]
    retrieved = [[load_image(path) for path in database.path[row]] for row in reference]
    options = dict(query_captions=[f"query {q}" for q in chosen], truth=truth, title=title, tile=tile)
    pictures = [load_image(path) for path in queries.path[chosen]]
    return figures.retrieval_panel(pictures, retrieved, metres, positive, **options)


def retrieval_map(database: Places, queries: Places, found: Mapping, query: int):
    """Draw one query and what was found for it on a plotly map of all; arguments as in `retrieval_rows`."""
    hover = [_file(path) for path in database.path]
    crowd = dict(query_east_m=queries.east_m, query_north_m=queries.north_m)
    crowd |= dict(query_hover=[f"{i}: {_file(path)}" for i, path in enumerate(queries.path)])
    front = dict(found=found["reference"][query], correct=found["positive"][query], chosen=query)
    return figures.places_plotly(database.east_m, database.north_m, hover=hover, **crowd, **front)


def retrieval_browser(database: Places, queries: Places, found: Mapping, *, order: Sequence[int], truth):
    """Browse queries, in `order`, and their retrievals on a map: move the slider, or click a query.

    Other arguments as in `retrieval_rows`. Attributes: ``position`` (the slider), ``query`` (the index of the
    query shown) and ``map``.
    """
    import ipywidgets
    import plotly.graph_objects as go

    order = [int(query) for query in order]
    position = _slider("query", 0, 0, len(order) - 1)
    chart = go.FigureWidget(retrieval_map(database, queries, found, order[0]))
    picture, heading = ipywidgets.Image(format="png"), ipywidgets.HTML()
    box = ipywidgets.VBox([position, heading, picture, chart])
    box.position, box.map = position, chart

    def show() -> None:
        box.query = query = order[position.value]
        figure = retrieval_rows(database, queries, found, [query], k=5, tile=1.75, truth=truth)
        picture.value = figures.to_png(figure)
        heading.value = f"<b>query {query}</b>: {html.escape(_file(queries.path[query]))}"
        fresh = retrieval_map(database, queries, found, query)
        with chart.batch_update():
            for old, new in zip(chart.data[2:], fresh.data[2:], strict=True):
                old.x, old.y, old.text = new.x, new.y, new.text
                old.marker.color, old.marker.symbol = new.marker.color, new.marker.symbol
            _zoom(chart, fresh)

    def clicked(_trace, points, _state) -> None:
        if points.point_inds and points.point_inds[0] in order:
            position.value = order.index(points.point_inds[0])

    chart.data[1].on_click(clicked)
    _follow(show, position)
    return box


def _zoom(chart, fresh, *, whole_m: float = 2500.0, margin_m: float = 60.0) -> None:
    """Look at the query and what was found where the whole map is too large for either to be seen."""
    east = np.concatenate([np.asarray(trace.x, dtype=float) for trace in fresh.data[:2]])
    if not np.nanmax(east) - np.nanmin(east) >= whole_m:
        return
    for axis, key in ((chart.layout.xaxis, "x"), (chart.layout.yaxis, "y")):
        near = np.concatenate([np.asarray(trace[key], dtype=float) for trace in fresh.data[3:]])
        axis.range = (np.nanmin(near) - margin_m, np.nanmax(near) + margin_m)


# --- is the ground truth right? -----------------------------------------------------------------------------


def review_view(database: Places, queries: Places, positives, case: Mapping):
    """Draw one suspected error of the ground truth: what was retrieved above, what is called true below.

    Parameters
    ----------
    database, queries : Places
    positives : sequence of arrays
        Rows of the references that answer each query. Five are shown, first those that look the same way.
    case : mapping
        One of `workbench.analysis.suspects`.
    """
    query, found = case["query"], case["found"]
    near, metres, _ = analysis.by_nearness(database, queries, query, positives[query])
    captions = [f"#{c['rank']} {'✗✓'[c['positive']]}  {style.metres(c['metres'])}" for c in found]
    alike = f"more alike than {case['score']:.0%} of the right first answers are"
    return figures.review_page(
        load_image(queries.path[query]),
        [load_image(database.path[one["reference"]]) for one in found],
        [load_image(path) for path in database.path[near[:5]]],
        retrieved_captions=captions,
        positive_captions=[f"a positive  {style.metres(m)}" for m in metres[:5]],
        correct=[one["positive"] for one in found],
        query_caption=f"query {query}",
        notes=alike if np.isfinite(case["score"]) else "",
    )


def write_review(result, test_set, folder, *, count: int) -> Path:
    """Write ``folder/review.html``, on which a person judges each suspected error of the ground truth.

    One file with everything inside: it opens without a kernel or a network, keeps verdicts in the browser,
    and saves them as CSV or JSON.

    Parameters
    ----------
    result : sagelib.evaluate.Evaluation
    test_set : sagelib.places.TestSet
        That was evaluated; another one is refused.
    folder : path
    count : int
        See `workbench.analysis.suspects`.
    """
    import jinja2

    table, places = result.rankings(), {"database": test_set.database, "queries": test_set.queries}
    about = {"model": result.model, "dataset": result.dataset, "context": result.context}
    pages = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    pages.filters |= {"metres": style.metres, "jpeg": lambda path: style.jpeg(load_image(path), 220)}
    pages.policies["json.dumps_kwargs"] = {}  # keys keep their order
    page = pages.get_template("review.html.j2").render(
        about=about | {"run": result.path.name},
        cases=analysis.suspects(table, **places, positives=test_set.positives(), count=count),
        rule=test_set.rule,
        searched=table["rank"].max(),
        **places,
    )
    return write_text(Path(folder) / "review.html", page)


# --- the graph and the places that are drawn from it --------------------------------------------------------


def graph_view(east_m, north_m, descriptors, *, radius_m, tau, top_k, images_per_place, places, prefer, seed):
    """Build the geo-visual graph, draw places as the sampler does, and show both on a map.

    Parameters
    ----------
    east_m, north_m : array (n,)
    descriptors : array (n, D)
    radius_m, tau, top_k, prefer
        See `sagelib.graph.GeoVisualGraph` and `greedy_weighted_clique`.
    images_per_place, places : int
        K, and the largest number of places.
    seed : int
        Order of the images before the harvest (`sagelib.sampler.harvest`).

    Returns
    -------
    figure : matplotlib figure
    numbers : dict
        ``edges``, ``pruned``, ``degree`` (mean), ``places``; and means over the pairs within places (NaN
        without any): ``mean_weight`` (W), ``mean_distance_m``, ``mean_similarity`` (cosine).
    """
    graph = GeoVisualGraph(east_m, north_m, descriptors=descriptors, radius_m=radius_m, tau=tau, top_k=top_k)
    least = max(SamplerConfig.min_clique, images_per_place)
    config = SamplerConfig(
        images_per_place=images_per_place, min_clique=least, prefer=prefer, **vars(graph.rules)
    )
    mined = harvest(graph, np.random.default_rng(seed).permutation(len(graph)), config)
    chosen = [place.images for place in itertools.islice(mined, places)]
    rows, pairs, within = analysis.unit(descriptors), [], np.triu_indices(images_per_place, 1)
    for images in chosen:
        part, cosine = graph.subgraph(images), rows[images] @ rows[images].T
        weight = -part.d_geo * part.d_vis
        pairs += zip(weight[within], part.d_geo[within], cosine[within], strict=True)
    means = pd.DataFrame(
        pairs, columns=["mean_weight", "mean_distance_m", "mean_similarity"], dtype=float
    ).mean()
    counts = graph.statistics()
    numbers = {"edges": counts["edges"], "pruned": counts["pruned_edges"], "degree": counts["mean_degree"]}
    weight = graph.edge_values()["weight"]
    figure = figures.graph_map(east_m, north_m, graph.edges(), weight, cliques=chosen, radius_m=radius_m)
    return figure, numbers | {"places": len(chosen)} | means.to_dict()


def graph_explorer(east_m, north_m, descriptors, *, images_per_place: int, seed: int):
    """Slide radius, tau, top_k and the preference, and see the graph and the sampled places change.

    Arguments as in `graph_view`; the steps of tau are quantiles of the affinities within 50 m. Attributes:
    ``radius_m``, ``tau``, ``top_k``, ``prefer``, ``seed`` (controls), ``picture``, ``text`` and ``numbers``.
    """
    import ipywidgets

    widest = GeoVisualGraph(east_m, north_m, descriptors=descriptors, radius_m=50.0).edge_values()
    taus = np.unique(np.quantile(widest["weight"], np.linspace(0.05, 0.95, 19)).round(1)).tolist()
    controls = {"radius_m": _slider("radius_m", 25, 5, 50)}
    for name, steps in (("tau", taus), ("top_k", (20, 10, 8, 6, 5, 4, 3, 2, 1))):
        options = ["off", *steps]  # a selection slider cannot hold None
        controls[name] = ipywidgets.SelectionSlider(
            options=options, description=name, continuous_update=False
        )
    controls["prefer"] = ipywidgets.ToggleButtons(
        options=["closest", "farthest", "random"], description="prefer"
    )
    controls["seed"] = ipywidgets.BoundedIntText(seed, 0, 10_000, description="seed")
    picture, text, rows = ipywidgets.Image(format="png"), ipywidgets.HTML(), list(controls.values())
    box = ipywidgets.VBox([ipywidgets.HBox(rows[:3]), ipywidgets.HBox(rows[3:]), text, picture])
    vars(box).update(controls, picture=picture, text=text)

    def show() -> None:
        values = {name: None if c.value == "off" else c.value for name, c in controls.items()}
        values |= dict(images_per_place=images_per_place, places=8)
        figure, box.numbers = graph_view(east_m, north_m, descriptors, **values)
        picture.value = figures.to_png(figure)
        text.value = (
            "{edges:,} edges, {pruned:,} pruned, {degree:.1f} neighbours an image; {places} places drawn; "
            "their pairs: W {mean_weight:.1f} m, {mean_distance_m:.1f} m apart, cosine {mean_similarity:.2f}"
        ).format(**box.numbers)

    _follow(show, *rows)
    return box


# --- patches ------------------------------------------------------------------------------------------------


def patch_view(query, reference, query_patches, reference_patches, grid, row: int, column: int):
    """Draw one patch of a query and its cosine with each patch of a reference, as a matplotlib figure.

    Parameters
    ----------
    query, reference : images
    query_patches, reference_patches : arrays (h * w, M)
        Patch tokens in row-major order.
    grid : (h, w)
    row, column : int
    """
    patch = analysis.unit(query_patches)[row * grid[1] + column]
    similarity = analysis.unit(reference_patches) @ patch
    return figures.patch_match(query, reference, (row, column), similarity.reshape(grid), grid=grid)


def patch_matcher(query, reference, query_patches, reference_patches, grid):
    """Pick a patch of the query, by a click or by two sliders, and see what it matches in the reference.

    Arguments as in `patch_view`. Attributes: ``row``, ``column`` (sliders), ``picture`` and ``clickable``.
    """
    import ipywidgets
    import plotly.graph_objects as go

    row, column = (_slider(name, n // 2, 0, n - 1) for name, n in zip(("row", "column"), grid, strict=True))
    pixels = np.asarray(query)
    height, width = pixels.shape[:2]
    clickable = go.FigureWidget(go.Image(z=pixels, hoverinfo="none"))
    clickable.update_layout(title={"text": "click a patch", "font": {"size": 13}}, width=330)
    clickable.update_layout(height=330 * height // width + 40, margin={"l": 5, "r": 5, "t": 35, "b": 5})
    clickable.update_xaxes(visible=False).update_yaxes(visible=False)
    # The wide picture must not squeeze the one that takes the clicks.
    left = ipywidgets.Box([clickable], layout={"flex": "0 0 340px"})
    picture = ipywidgets.Image(format="png", layout={"width": "calc(100% - 345px)", "object_fit": "contain"})
    box = ipywidgets.VBox([ipywidgets.HBox([row, column]), ipywidgets.HBox([left, picture])])
    box.row, box.column, box.picture, box.clickable = row, column, picture, clickable

    def show() -> None:
        figure = patch_view(query, reference, query_patches, reference_patches, grid, row.value, column.value)
        picture.value = figures.to_png(figure)

    def clicked(_trace, points, _state) -> None:
        if points.xs:
            column.value = min(int(points.xs[0] * grid[1] / width), grid[1] - 1)
            row.value = min(int(points.ys[0] * grid[0] / height), grid[0] - 1)

    clickable.data[0].on_click(clicked)
    _follow(show, row, column)
    return box


# --- descriptors --------------------------------------------------------------------------------------------


def tsne_explorer(
    descriptors: Mapping, place, paths: Sequence[str], *, aid, class_aid, perplexity: int, seed: int
):
    """Slide perplexity and seed and see what stays of the t-SNE maps; hover a point to see its photograph.

    Attributes: ``perplexity``, ``seed`` (sliders), ``chart`` and ``photograph``.

    Parameters
    ----------
    descriptors : mapping of method -> array (n, D)
    place : array (n,)
    paths : sequence of n str
    aid, class_aid
        Of the descriptors, see `workbench.figures.tsne_plotly`; the sliders do not change them.
    perplexity, seed : int
        Where the sliders start; see `workbench.analysis.tsne`.
    """
    import ipywidgets
    import plotly.graph_objects as go

    perplexities = _slider("perplexity", perplexity, 2, max(min(30, len(place) - 1), perplexity))
    seeds = _slider("seed", seed, 0, max(9, seed))

    def draw():
        options = dict(perplexity=perplexities.value, seed=seeds.value)
        maps = {name: analysis.tsne(values, **options) for name, values in descriptors.items()}
        return figures.tsne_plotly(maps, place, files=[_file(p) for p in paths], aid=aid, class_aid=class_aid)

    chart = go.FigureWidget(draw())
    photograph = ipywidgets.HTML("hover over a point to see its photograph")
    box = ipywidgets.VBox([ipywidgets.HBox([perplexities, seeds]), chart, photograph])
    box.perplexity, box.seed, box.chart, box.photograph = perplexities, seeds, chart, photograph

    def show(_change) -> None:
        fresh = draw()
        with chart.batch_update():
            for old, new in zip(chart.data, fresh.data, strict=True):
                old.x, old.y = new.x, new.y
            chart.layout.annotations = fresh.layout.annotations

    def hovered(trace, points, _state) -> None:
        for point in points.point_inds[:1]:
            index = int(trace.customdata[point][0])
            source = f"data:image/jpeg;base64,{style.jpeg(load_image(paths[index]), 240)}"
            caption = f"<b>{index}</b> {html.escape(_file(paths[index]))}"
            photograph.value = f'<img src="{source}"><br>{caption}'

    for trace in chart.data:
        trace.on_hover(hovered)
    for slider in (perplexities, seeds):
        slider.observe(show, "value")
    return box


# --- training -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def live_curve(read_log: Callable, *, plateau: float, every_s: float = 2.0) -> Iterator:
    """Show the loss under a cell while the block inside trains; do nothing on a page without a browser::

        with live_curve(run.read_log, plateau=1.477):
            train(config, run)

    `plateau` is the loss's trivial resting place.
    """
    if not live():
        yield
        return
    import ipywidgets
    from IPython.display import display

    picture, stop, drawn = ipywidgets.Image(format="png"), threading.Event(), 0

    def draw() -> None:
        nonlocal drawn
        steps = [row for row in read_log() if row.get("kind") == "step"]
        if len(steps) > drawn:
            drawn = len(steps)
            curve = [[row[name] for row in steps] for name in ("step", "loss")]
            picture.value = figures.to_png(figures.loss_curve(*curve, plateau=plateau))

    def keep_drawing() -> None:
        while not stop.wait(every_s):
            draw()
        draw()

    display(picture)
    thread = threading.Thread(target=keep_drawing, daemon=True)
    thread.start()
    try:
        yield picture
    finally:
        stop.set()
        thread.join()
