"""Things to click, slide and hover in JupyterLab; beside each a plain function draws the same figure.

The plain functions work without a browser; the widgets only pass their controls on.
"""

import contextlib
import functools
import html
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from sagelib.graph import GeoVisualGraph, greedy_weighted_clique
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


def _slider(value: int, low: int, high: int, **options):
    import ipywidgets

    return ipywidgets.IntSlider(value, low, high, continuous_update=False, **options)


def _interactive(show: Callable, **controls):
    """The controls, and under them what `show` prints and returns, now and whenever one is moved."""
    import ipywidgets

    return ipywidgets.interactive(show, {"auto_display": True}, **controls)


def _file(path) -> str:
    return str(path).rsplit("/", 1)[-1][:60]


# ---------- queries and what was retrieved for them
def retrieval_rows(
    database: Places, queries: Places, found: Mapping, chosen, *, k=4, tile=1.3, title=None, truth=None
):
    """Draw queries with their k first references, a row each, as a matplotlib figure.

    `found` has arrays (Q, at least k) ``reference``, ``positive`` and ``metres``, see
    `workbench.analysis.ranking_arrays`; `chosen` are the queries, from above; `truth` maps each query that
    has one to a true reference, drawn in a last column.
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

    Other arguments as in `retrieval_rows`. The map looks closely where all of it would be too large.
    """
    import ipywidgets
    import plotly.graph_objects as go

    order, east = [int(query) for query in order], [*database.east_m, *queries.east_m]
    chart = go.FigureWidget(retrieval_map(database, queries, found, order[0]))
    chart._config = chart._config | {"responsive": True}  # as wide as the page, however it is resized

    def show(position: int):
        query = order[position]
        fresh = retrieval_map(database, queries, found, query)
        with chart.batch_update():
            for old, new in zip(chart.data[2:], fresh.data[2:], strict=True):
                old.update(x=new.x, y=new.y, text=new.text)
                old.marker.update(color=new.marker.color, symbol=new.marker.symbol)
            for axis, key in ((chart.layout.xaxis, "x"), (chart.layout.yaxis, "y")):
                near = np.concatenate([np.asarray(trace[key], dtype=float) for trace in fresh.data[3:]])
                if np.nanmax(east) - np.nanmin(east) >= 2500:
                    axis.range = np.nanmin(near) - 60, np.nanmax(near) + 60
        print(f"query {query}: {_file(queries.path[query])}")
        return retrieval_rows(database, queries, found, [query], k=5, tile=1.75, truth=truth)

    box = _interactive(show, position=_slider(0, 0, len(order) - 1, description="query"))

    def clicked(_trace, points, _state) -> None:
        if points.point_inds and points.point_inds[0] in order:
            box.children[0].value = order.index(points.point_inds[0])

    chart.data[1].on_click(clicked)
    return ipywidgets.VBox([box, chart])


# ---------- is the ground truth right?
def review_view(database: Places, queries: Places, positives, case: Mapping):
    """Draw one suspected error of the ground truth: what was retrieved above, what is called true below.

    `positives` are the rows of the references that answer each query, of which five are shown, first those
    that look the same way; `case` is one of `workbench.analysis.suspects`.
    """
    query, found = case["query"], case["found"]
    near, metres, _ = analysis.by_nearness(database, queries, query, positives[query])
    alike = f"more alike than {case['score']:.0%} of the right first answers are"
    ranked = [f"#{c['rank']} {'✗✓'[c['positive']]}  {style.metres(c['metres'])}" for c in found]
    return figures.review_page(
        load_image(queries.path[query]),
        [load_image(database.path[one["reference"]]) for one in found],
        [load_image(path) for path in database.path[near[:5]]],
        retrieved_captions=ranked,
        positive_captions=[f"a positive  {style.metres(m)}" for m in metres[:5]],
        correct=[one["positive"] for one in found],
        query_caption=f"query {query}",
        notes=alike if np.isfinite(case["score"]) else "",
    )


def write_review(result, test_set, folder, *, count: int) -> Path:
    """Write ``folder/review.html``, on which a person judges each suspected error of the ground truth.

    One file with everything inside: it opens without a kernel or a network, keeps verdicts in the browser,
    and saves them as CSV or JSON. `result` is the `Evaluation` on `test_set`, which must be the same;
    `count` as for `workbench.analysis.suspects`.
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


# ---------- the graph and the places that are drawn from it
def graph_view(photographs: Places, descriptors, *, places: int, seed: int, **rules):
    """Build the geo-visual graph, draw at most `places` as the sampler does, and show both on a map.

    `rules` are those of `sagelib.sampler.SamplerConfig`; the seed decides the order of the images before the
    harvest. Returns a matplotlib figure, and a dict of the graph's statistics, the number of ``places``, and
    means over the pairs within these (NaN without any): ``mean_weight`` (W), ``mean_distance_m``,
    ``mean_similarity`` (cosine).
    """
    config = SamplerConfig(**rules)
    graph = GeoVisualGraph.from_places(photographs, descriptors, **config.graph_options())
    mined = harvest(graph, np.random.default_rng(seed).permutation(len(graph)), config)
    chosen = [place.images for place in itertools.islice(mined, places)]
    rows, pairs, within = analysis.unit(descriptors), [], np.triu_indices(config.images_per_place, 1)
    for images in chosen:
        part, cosine = graph.subgraph(images), rows[images] @ rows[images].T
        weight = -part.d_geo * part.d_vis
        pairs += zip(weight[within], part.d_geo[within], cosine[within], strict=True)
    names = ["mean_weight", "mean_distance_m", "mean_similarity"]
    means = pd.DataFrame(pairs, columns=names, dtype=float).mean()
    weight, at = graph.edge_values()["weight"], (graph.east_m, graph.north_m)
    figure = figures.graph_map(*at, graph.edges(), weight, cliques=chosen, radius_m=config.radius_m)
    return figure, analysis.graph_statistics(graph) | {"places": len(chosen)} | means.to_dict()


def graph_explorer(photographs: Places, descriptors, *, radius_m, top_k, prefer, seed: int, **rules):
    """Slide radius, tau, top_k and the preference, and see the graph and the sampled places change.

    Arguments as in `graph_view`, where the controls begin; the steps of tau are quantiles of the affinities
    within 50 m.
    """
    import ipywidgets

    widest = GeoVisualGraph.from_places(photographs, descriptors, radius_m=50.0).edge_values()
    taus = np.unique(np.quantile(widest["weight"], np.linspace(0.05, 0.95, 19)).round(1)).tolist()

    def show(**values):
        values = {name: None if value == "off" else value for name, value in values.items()}
        figure, numbers = graph_view(photographs, descriptors, **rules | values)
        edges = "{edges:,} edges, {pruned_edges:,} pruned, {mean_degree:.1f} neighbours an image; "
        pairs = "W {mean_weight:.1f} m, {mean_distance_m:.1f} m apart, cosine {mean_similarity:.2f}"
        print((edges + "{places} places drawn; their pairs: " + pairs).format(**numbers))
        return figure

    steps = functools.partial(ipywidgets.SelectionSlider, continuous_update=False)  # cannot hold None
    best = sorted({20, 10, 8, 6, 5, 4, 3, 2, 1, *([top_k] if top_k else [])}, reverse=True)
    return _interactive(
        show,
        radius_m=_slider(round(radius_m), 5, max(50, round(radius_m))),
        tau=steps(options=["off", *taus]),
        top_k=steps(options=["off", *best], value=top_k or "off"),
        prefer=ipywidgets.ToggleButtons(options=["closest", "farthest", "random"], value=prefer),
        seed=ipywidgets.BoundedIntText(seed, 0, 10_000),
    )


def renewed_choice(places: Places, before, after, *, images_per_place: int, radius_m, max_heading_deg):
    """Draw how affinities and chosen images change between descriptors (n, D) `before` and `after`.

    Both graphs join the same photographs, without pruning, so that only affinities differ. Returns a
    matplotlib figure, and how many of the images chosen from each clique are chosen again, (cliques,): of
    the first 300 maximal cliques with more images than a place takes.
    """
    import networkx

    rules = {"radius_m": radius_m, "max_heading_deg": max_heading_deg}
    graphs = [GeoVisualGraph.from_places(places, values, **rules) for values in (before, after)]
    cliques = (c for c in networkx.find_cliques(graphs[0].to_networkx()) if len(c) > images_per_place)
    choices = [
        [set(c[greedy_weighted_clique(g.subgraph(c).weight, images_per_place)]) for g in graphs]
        for c in map(np.sort, itertools.islice(cliques, 300))
    ]
    stayed = np.array([len(old & new) for old, new in choices], dtype=int)
    weights = [graph.edge_values()["weight"] for graph in graphs]
    return figures.affinity_change(*weights, stayed, k=images_per_place), stayed


# ---------- patches
def patch_view(query, reference, query_patches, reference_patches, grid, row: int, column: int):
    """Draw one patch of a query and its cosine with each patch of a reference, as a matplotlib figure.

    Patch tokens are (h * w, M), in row-major order of `grid` (h, w).
    """
    patch = analysis.unit(query_patches)[row * grid[1] + column]
    similarity = analysis.unit(reference_patches) @ patch
    return figures.patch_match(query, reference, (row, column), similarity.reshape(grid), grid=grid)


def patch_matcher(query, reference, query_patches, reference_patches, grid):
    """Pick a patch of the query, by a click or by two sliders, and see what it matches in the reference.

    Arguments as in `patch_view`.
    """
    import ipywidgets
    import plotly.graph_objects as go

    pixels = np.asarray(query)
    height, width = pixels.shape[:2]
    clickable = go.FigureWidget(go.Image(z=pixels, hoverinfo="none"))
    clickable.update_layout(title={"text": "click a patch", "font": {"size": 13}}, width=330)
    clickable.update_layout(height=330 * height // width + 40, margin={"l": 5, "r": 5, "t": 35, "b": 5})
    clickable.update_xaxes(visible=False).update_yaxes(visible=False)
    clickable._config = clickable._config | {"displayModeBar": False}  # it would cover the title

    def show(row: int, column: int):
        return patch_view(query, reference, query_patches, reference_patches, grid, row, column)

    row, column = (_slider(n // 2, 0, n - 1) for n in grid)
    box = _interactive(show, row=row, column=column)
    box.layout.flex = "1 1 420px"  # where a page is too narrow for both, below the one that takes the clicks

    def clicked(_trace, points, _state) -> None:
        if points.xs:
            column.value = min(int(points.xs[0] * grid[1] / width), grid[1] - 1)
            row.value = min(int(points.ys[0] * grid[0] / height), grid[0] - 1)

    clickable.data[0].on_click(clicked)
    sides = [ipywidgets.Box([clickable], layout={"flex": "0 0 340px"}), box]
    return ipywidgets.HBox(sides, layout={"flex_flow": "row wrap"})


def heatmap_chooser(pictures: Sequence, maps: Mapping[str, tuple], names: Sequence[str]):
    """Choose a picture and what is drawn over it, and see it on one fixed scale and stretched beside it.

    `maps` gives by name the values (n, h, w) over n `pictures`, called `names`, and their scale, see
    `workbench.figures.heatmap_scales`.
    """
    import ipywidgets

    def show(picture: int, values: str):
        array, scale = maps[values]
        title = f"{names[picture]}: {values}"
        chosen = pictures[picture : picture + 1], array[picture : picture + 1]
        return figures.heatmap_scales(*chosen, scale=scale, title=title)

    queries = [(name, i) for i, name in enumerate(names)]
    choices = {"picture": queries, "values": list(maps)}
    return _interactive(show, **{name: ipywidgets.Dropdown(options=of) for name, of in choices.items()})


# ---------- descriptors
def tsne_explorer(
    descriptors: Mapping, place, paths: Sequence[str], *, names, aid, class_aid, perplexity: int, seed: int
):
    """Slide perplexity and seed and see what stays of the t-SNE maps; hover a point to see its photograph.

    `descriptors` (n, D) by method, of the photographs at n `paths`, with `names` and `place` (n,); `aid` and
    `class_aid` are theirs, see `workbench.figures.tsne_plotly`, and no slider changes them.
    """
    import ipywidgets
    import plotly.graph_objects as go

    @functools.cache
    def draw(perplexity: int, seed: int):
        maps = {n: analysis.tsne(v, perplexity=perplexity, seed=seed) for n, v in descriptors.items()}
        return figures.tsne_plotly(maps, place, names=names, aid=aid, class_aid=class_aid)

    def show(perplexity: int, seed: int) -> None:
        waiting.value = f"computing {len(descriptors)} maps ..."
        fresh = draw(perplexity, seed)
        waiting.value = ""
        with chart.batch_update():
            for old, new in zip(chart.data, fresh.data, strict=True):
                old.update(x=new.x, y=new.y)
            chart.layout.annotations = fresh.layout.annotations

    def hovered(trace, points, _state) -> None:
        for point in points.point_inds[:1]:
            index = int(trace.customdata[point][0])
            source = f"data:image/jpeg;base64,{style.jpeg(load_image(paths[index]), 200)}"
            photograph.value = f'<img src="{source}"><br>{html.escape(names[index])}'

    chart, waiting = go.FigureWidget(draw(perplexity, seed)), ipywidgets.HTML()
    photograph = ipywidgets.HTML("hover over a point to see its photograph", layout={"flex": "0 0 210px"})
    for trace in chart.data:
        trace.on_hover(hovered)
    widest = max(min(30, len(place) - 1), perplexity)
    controls = dict(perplexity=_slider(perplexity, 2, widest), seed=_slider(seed, 0, max(9, seed)))
    chart._config = chart._config | {"responsive": True}
    room = {"flex": "1 1 420px", "min_width": "0", "display": "block"}
    beside = ipywidgets.HBox([ipywidgets.Box([chart], layout=room), photograph])
    beside.layout.flex_flow = "row wrap"
    return ipywidgets.VBox([_interactive(show, **controls), waiting, beside])


# ---------- training
@contextlib.contextmanager
def live_curve(read_log: Callable, *, plateau: float, every_s: float = 2.0) -> Iterator:
    """Show the loss under a cell while the block inside trains; do nothing on a page without a browser.

    `read_log` is that of the training's run, `plateau` the loss's trivial resting place.
    """
    if not live():
        yield
        return
    import ipywidgets
    from IPython.display import display

    picture, stop = ipywidgets.Image(format="png"), threading.Event()

    def draw() -> None:
        steps = pd.DataFrame([row for row in read_log() if row.get("kind") == "step"])
        if len(steps):
            picture.value = figures.draw(figures.loss_curve(steps["step"], steps["loss"], plateau=plateau))

    def keep_drawing() -> None:
        while not stop.wait(every_s):
            draw()

    display(picture)
    thread = threading.Thread(target=keep_drawing, daemon=True)
    thread.start()
    try:
        yield picture
    finally:
        stop.set()
        thread.join()
        draw()
