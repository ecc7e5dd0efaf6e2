"""Things to click, slide and hover in JupyterLab; behind each stands a plain function that draws the same figure.

The plain functions (`retrieval_view`, `graph_view`, `patch_view`) take values and give a figure, and numbers where
there are some; they work without a browser. The widgets only pass their sliders' values on.
"""

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from sagelib.graph import GeoVisualGraph
from sagelib.images import load_image
from sagelib.places import Places, heading_difference, same_grid
from sagelib.retrieval import read_rankings
from sagelib.runs import write_text
from sagelib.sampler import SamplerConfig, harvest
from workbench import analysis, figures

__all__ = [
    "LiveCurve",
    "distances_m",
    "draw_places",
    "graph_explorer",
    "graph_view",
    "live",
    "live_curve",
    "patch_matcher",
    "patch_view",
    "retrieval_browser",
    "retrieval_map",
    "retrieval_rows",
    "retrieval_view",
    "review_view",
    "tsne_browser",
    "tsne_explorer",
    "write_review",
]


def live() -> bool:
    """Whether a Jupyter server runs this kernel for a page that somebody has open.

    A page that is executed without a browser (papermill, nbconvert, nbval) shows the static figure alone: widgets
    would draw nothing, and a plotly widget would write all of plotly.js into the stored page.
    """
    return bool(os.environ.get("JPY_SESSION_NAME"))


# --- queries and what was retrieved for them -------------------------------------------------------------------


def distances_m(database: Places, queries: Places, indices) -> np.ndarray:
    """Metres between each query and its retrieved references: (Q, k), NaN where unknown or in another UTM zone."""
    indices = np.asarray(indices)
    east = queries.east_m[:, None] - database.east_m[indices]
    north = queries.north_m[:, None] - database.north_m[indices]
    zones = same_grid(np.concatenate([queries.utm_zone, database.utm_zone]))
    same = zones[: len(queries), None] == zones[len(queries) :][indices]
    return np.where(same, np.hypot(east, north), np.nan)


def retrieval_view(
    database: Places,
    queries: Places,
    indices,
    correct,
    query: int,
    *,
    k: int = 5,
    load: Callable = load_image,
    truth: int | None = None,
):
    """Draw one query, its k first references, and if given a true reference, as photographs.

    Parameters
    ----------
    database, queries : Places
    indices : array (Q, at least k) of int
        Retrieved references, nearest first.
    correct : array (Q, at least k) of bool
        Whether each is a positive.
    query : int
    k : int
    load : callable
        Path -> image.
    truth : int, optional
        Index of a true reference.

    Returns
    -------
    matplotlib figure
    """
    _check_query(query, len(queries))
    indices, correct = np.asarray(indices)[query : query + 1, :k], np.asarray(correct)[query : query + 1, :k]
    metres = distances_m(database, queries[query : query + 1], indices)
    note = str(queries.note[query])
    return figures.retrieval_panel(
        [load(queries.path[query])],
        [[load(database.path[j]) for j in indices[0]]],
        metres,
        correct,
        query_captions=[f"query {query}" + (f"\n{note}" if note else "")],
        truth=None if truth is None else [load(database.path[truth])],
    )


def retrieval_rows(
    database: Places,
    queries: Places,
    indices,
    correct,
    chosen: Sequence[int],
    *,
    k: int = 4,
    load: Callable = load_image,
    title: str | None = None,
    tile: float = 1.3,
):
    """Draw several queries with their k first references, a row each; other arguments as in `retrieval_view`.

    Parameters
    ----------
    chosen : sequence of int
        The queries, from above; at least one.
    title, tile
        Of `workbench.figures.retrieval_panel`.
    """
    chosen = np.asarray(chosen, dtype=int)
    if not len(chosen):
        raise ValueError("chosen names no query, so there is nothing to draw")
    indices, correct = np.asarray(indices)[chosen, :k], np.asarray(correct)[chosen, :k]
    return figures.retrieval_panel(
        [load(queries.path[q]) for q in chosen],
        [[load(database.path[j]) for j in row] for row in indices],
        distances_m(database, queries[chosen], indices),
        correct,
        query_captions=[f"query {q}" for q in chosen],
        title=title,
        tile=tile,
    )


def retrieval_map(database: Places, queries: Places, indices, correct, query: int, *, k: int = 5):
    """Draw one query and its k first references on a plotly map of all places; arguments as in `retrieval_view`."""
    _check_query(query, len(queries))
    return figures.places_plotly(
        database.east_m,
        database.north_m,
        hover=[_label(database, i) for i in range(len(database))],
        query_east_m=queries.east_m,
        query_north_m=queries.north_m,
        query_hover=[f"{i}: {_label(queries, i)}" for i in range(len(queries))],
        found=np.asarray(indices)[query, :k],
        correct=np.asarray(correct)[query, :k],
        chosen=query,
    )


def retrieval_browser(
    database: Places,
    queries: Places,
    indices,
    correct,
    *,
    order: Sequence[int] | None = None,
    k: int = 5,
    load: Callable = load_image,
    truth: Sequence[int | None] | None = None,
):
    """Browse queries and their retrievals on a map: move the slider, or click a query.

    Parameters
    ----------
    order : sequence of int, optional
        Queries in the order of the slider, for instance `workbench.analysis.sort_failures`; all by default.
    truth : sequence of Q int or None, optional
        A true reference of each query.
    Others
        As in `retrieval_view`.

    Returns
    -------
    ipywidgets.VBox
        With attributes ``position`` (the slider), ``query`` (index of the query shown) and ``map``.
    """
    import ipywidgets
    import plotly.graph_objects as go

    order = np.arange(len(queries)) if order is None else np.asarray(order, dtype=int)
    if not len(order):
        raise ValueError("order names no query, so there is nothing to browse")
    position = ipywidgets.IntSlider(
        0, 0, max(len(order) - 1, 1), description="query", continuous_update=False, disabled=len(order) == 1
    )
    positions = {int(q): i for i, q in enumerate(order)}
    chart = go.FigureWidget(retrieval_map(database, queries, indices, correct, int(order[0]), k=k))
    picture, heading = ipywidgets.Image(format="png"), ipywidgets.HTML()
    box = ipywidgets.VBox([position, heading, picture, chart])
    box.position, box.map, box.query = position, chart, int(order[0])

    def show(query: int) -> None:
        box.query = query
        figure = retrieval_view(
            database,
            queries,
            indices,
            correct,
            query,
            k=k,
            load=load,
            truth=None if truth is None else truth[query],
        )
        picture.value = figures.to_png(figure)
        heading.value = f"<b>query {query}</b>: {_label(queries, query)}"
        fresh = retrieval_map(database, queries, indices, correct, query, k=k)
        with chart.batch_update():
            for old, new in zip(chart.data[2:], fresh.data[2:], strict=True):
                old.x, old.y, old.text = new.x, new.y, new.text
                old.marker.color, old.marker.symbol = new.marker.color, new.marker.symbol
            _zoom(chart, fresh)

    def clicked(_trace, points, _state) -> None:
        if points.point_inds and points.point_inds[0] in positions:
            position.value = positions[points.point_inds[0]]

    position.observe(lambda change: show(int(order[change["new"]])), "value")
    chart.data[1].on_click(clicked)
    show(int(order[0]))
    return box


def review_view(
    database: Places,
    queries: Places,
    positives,
    case,
    *,
    k: int = 5,
    max_heading_deg: float = 45.0,
    load: Callable = load_image,
):
    """Draw one suspected error of the ground truth: what was retrieved above, what is called true below.

    Parameters
    ----------
    database, queries : Places
    positives : sequence of arrays
        Rows of the references that answer each query.
    case : mapping
        One of `workbench.analysis.suspects`.
    k : int
        How many positives to show: those that look the same way first, then the nearest.
    max_heading_deg : float
        Within this angle two photographs look the same way; an unknown heading does too.
    load : callable
        Path -> image.

    Returns
    -------
    matplotlib figure
    """
    query, rows = case["query"], np.asarray(positives[case["query"]], dtype=int)
    metres = distances_m(database, queries[query : query + 1], rows[None])[0]
    turn = heading_difference(database.heading_deg[rows], queries.heading_deg[query])
    near = np.lexsort((metres, turn > max_heading_deg))[:k]
    retrieved = [
        f"#{rank} {'✓' if hit else '✗'}" + (f"  {m:.0f} m" if np.isfinite(m) else "")
        for rank, (m, hit) in enumerate(zip(case["metres"], case["positive"], strict=True), 1)
    ]
    alike = case["score"]
    return figures.review_page(
        load(queries.path[query]),
        [load(database.path[j]) for j in case["reference"]],
        [load(database.path[j]) for j in rows[near]],
        retrieved_captions=retrieved,
        positive_captions=[f"a positive  {m:.0f} m" for m in metres[near]],
        correct=case["positive"],
        query_caption=f"query {query}",
        notes=f"more alike than {alike:.0%} of the right first answers are" if np.isfinite(alike) else "",
    )


def write_review(
    result,
    test_set,
    folder,
    *,
    count: int = 12,
    k: int = 5,
    size_px: int = 220,
    load: Callable = load_image,
) -> Path:
    """Write a page for each suspected error of the ground truth, on which a person records a verdict.

    One HTML file, ``folder/review.html``, with everything inside: it opens without a kernel and without a network, keeps verdicts in the
    browser, and saves them as CSV or JSON.

    Parameters
    ----------
    result : sagelib.evaluate.Result
        With its rankings.csv.
    test_set : sagelib.places.TestSet
        That was evaluated.
    folder : path
        Of the run that keeps the page.
    count, k
        As for `workbench.analysis.suspects`.
    size_px : int
        Longer side of the photographs in the page; their bytes are what the file weighs.
    load : callable
        Path -> image.

    Returns
    -------
    Path
        Of the file.

    Raises
    ------
    ValueError
        If `test_set` is not what was evaluated.
    """
    database, queries = test_set.database, test_set.queries
    table = read_rankings(result.path / "rankings.csv")
    cases = []
    for row in analysis.suspects(table, database, queries, test_set.positives(), count=count, k=k):
        found, query, truth = row["reference"], row["query"], row["truth"]
        known = {
            "path": row["reference_path"],
            "image": [load(database.path[j]) for j in found],
            "metres": row["metres"],
            "positive": row["positive"],
        }
        case = {name: row[name] for name in ("query", "query_path", "score", "n_positives")}
        case |= {"query_image": load(queries.path[query]), "note": str(queries.note[query]), "truth": None}
        case["found"] = [
            dict(zip(known, values, strict=True)) for values in zip(*known.values(), strict=True)
        ]
        if truth is not None:
            case["truth"] = {"path": row["truth_path"], "metres": row["truth_m"], "rank": row["truth_rank"]}
            case["truth"]["image"] = load(database.path[truth])
        cases.append(case)
    names = {"model": result.model, "dataset": result.dataset, "context": result.context}
    page = figures.review_html(
        cases,
        about={**names, "run": result.path.name},
        rule=str(test_set.rule),
        searched=int(table["rank"].max()),
        size_px=size_px,
    )
    return write_text(Path(folder) / "review.html", page)


def _zoom(chart, fresh, *, whole_m: float = 2500.0, margin_m: float = 60.0) -> None:
    """Look at the query and what was found where the whole map is too large for either to be seen."""
    spans = [np.asarray([v for v in trace.x if v is not None], dtype=float) for trace in fresh.data[:2]]
    known = np.concatenate(spans)
    if not len(known) or np.nanmax(known) - np.nanmin(known) < whole_m:
        return
    for axis, key in ((chart.layout.xaxis, "x"), (chart.layout.yaxis, "y")):
        near = np.concatenate([np.asarray(trace[key], dtype=float) for trace in fresh.data[3:]])
        near = near[np.isfinite(near)]
        if len(near):
            axis.range = (near.min() - margin_m, near.max() + margin_m)


def _label(places: Places, i: int) -> str:
    return str(places.path[i]).rsplit("/", 1)[-1][:60]


def _check_query(query: int, count: int) -> None:
    if not 0 <= query < count:
        raise ValueError(f"query must lie in 0 ... {count - 1}, got {query}")


# --- the graph and the places that are drawn from it -----------------------------------------------------------


def draw_places(
    graph: GeoVisualGraph,
    *,
    images_per_place: int = 4,
    places: int = 8,
    prefer: str = "closest",
    seed: int = 0,
) -> list[list[int]]:
    """Draw places from a small graph as the sampler does from the images of one draw; see `sagelib.sampler.harvest`.

    Parameters
    ----------
    graph : GeoVisualGraph
        With descriptors; a few hundred images.
    images_per_place, places : int
        K, and the largest number of places.
    prefer : {"closest", "farthest", "random"}
    seed : int
        Order of the images before the harvest.

    Returns
    -------
    list of lists of int
        The images of each place, in the order chosen.
    """
    config = SamplerConfig(
        images_per_place=images_per_place,
        min_clique=max(10, images_per_place),
        prefer=prefer,
        **vars(graph.rules),
    )
    images = np.random.default_rng(seed).permutation(len(graph))
    return [place.images.tolist() for place in itertools.islice(harvest(graph, images, config), places)]


def graph_view(
    east_m,
    north_m,
    descriptors,
    *,
    radius_m: float = 25.0,
    tau: float | None = None,
    top_k: int | None = None,
    images_per_place: int = 4,
    places: int = 8,
    prefer: str = "closest",
    seed: int = 0,
):
    """Build the geo-visual graph, draw places from it, and draw both on a map.

    Parameters
    ----------
    east_m, north_m : array (n,)
    descriptors : array (n, D)
    radius_m, tau, top_k
        See `GeoVisualGraph`.
    images_per_place, places, prefer, seed
        See `draw_places`.

    Returns
    -------
    figure : matplotlib figure
    numbers : dict
        ``edges``, ``pruned``, ``degree`` (mean), ``places``, ``mean_weight``, ``mean_distance_m`` and
        ``mean_similarity`` of the chosen pairs (NaN where there are none).
    """
    graph = GeoVisualGraph(east_m, north_m, descriptors=descriptors, radius_m=radius_m, tau=tau, top_k=top_k)
    chosen = draw_places(graph, images_per_place=images_per_place, places=places, prefer=prefer, seed=seed)
    weight = graph.edge_values()["weight"]
    pairs = [(clique[a], clique[b]) for clique in chosen for a in range(len(clique)) for b in range(a)]
    first, second = np.array(pairs, dtype=int).reshape(-1, 2).T
    metres = np.hypot(
        graph.east_m[first] - graph.east_m[second], graph.north_m[first] - graph.north_m[second]
    )
    values = np.asarray(descriptors, dtype=np.float64)
    apart = np.linalg.norm(values[first] - values[second], axis=1)
    length = np.linalg.norm(values, axis=1)
    cosine = (values[first] * values[second]).sum(axis=1) / (length[first] * length[second])
    numbers = {
        "edges": graph.n_edges,
        "pruned": graph.statistics()["pruned_edges"],
        "degree": float(graph.degrees().mean()),
        "places": len(chosen),
        "mean_weight": _mean(-metres * apart),
        "mean_distance_m": _mean(metres),
        "mean_similarity": _mean(cosine),
    }
    figure = figures.graph_map(
        graph.east_m, graph.north_m, graph.edges(), weight, cliques=chosen, radius_m=radius_m
    )
    return figure, numbers


def graph_explorer(
    east_m, north_m, descriptors, *, images_per_place: int = 4, places: int = 8, seed: int = 0
):
    """Slide radius, tau, top_k and the preference, and see the graph and the sampled places change.

    Arguments as in `graph_view`. The steps of tau are quantiles of the affinities within the largest radius.

    Returns
    -------
    ipywidgets.VBox
        With attributes ``radius_m``, ``tau``, ``top_k``, ``prefer``, ``seed`` (the controls), ``picture``, ``text``
        and ``numbers``.
    """
    import ipywidgets

    widest = GeoVisualGraph(east_m, north_m, descriptors=descriptors, radius_m=50.0)
    steps = np.unique(np.round(np.quantile(widest.edge_values()["weight"], np.linspace(0.05, 0.95, 19)), 1))
    radius = ipywidgets.IntSlider(25, 5, 50, 1, description="radius_m", continuous_update=False)
    tau = ipywidgets.SelectionSlider(
        options=[("off", "off"), *((f"{v:g}", float(v)) for v in steps)],
        description="tau",
        continuous_update=False,
    )
    top_k = ipywidgets.SelectionSlider(
        options=[("off", "off"), *((str(v), v) for v in (20, 10, 8, 6, 5, 4, 3, 2, 1))],
        description="top_k",
        continuous_update=False,
    )
    prefer = ipywidgets.ToggleButtons(options=["closest", "farthest", "random"], description="prefer")
    draw = ipywidgets.BoundedIntText(seed, 0, 10_000, description="seed")
    picture, text = ipywidgets.Image(format="png"), ipywidgets.HTML()
    controls = ipywidgets.VBox([ipywidgets.HBox([radius, tau, top_k]), ipywidgets.HBox([prefer, draw])])
    box = ipywidgets.VBox([controls, text, picture])
    box.radius_m, box.tau, box.top_k, box.prefer, box.seed = radius, tau, top_k, prefer, draw
    box.picture, box.text = picture, text

    def show(_change=None) -> None:
        figure, box.numbers = graph_view(
            east_m,
            north_m,
            descriptors,
            radius_m=float(radius.value),
            tau=_or_none(tau.value),
            top_k=_or_none(top_k.value),
            images_per_place=images_per_place,
            places=places,
            prefer=prefer.value,
            seed=draw.value,
        )
        picture.value = figures.to_png(figure)
        text.value = (
            "{edges:,} edges, {pruned:,} pruned, {degree:.1f} neighbours an image; {places} places drawn; "
            "their pairs: W {mean_weight:.1f} m, {mean_distance_m:.1f} m apart, cosine {mean_similarity:.2f}"
        ).format(**box.numbers)

    for control in (radius, tau, top_k, prefer, draw):
        control.observe(show, "value")
    show()
    return box


def _or_none(value):
    """A selection slider cannot hold None."""
    return None if value == "off" else value


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


# --- patches ---------------------------------------------------------------------------------------------------


def patch_view(query, reference, query_patches, reference_patches, grid, row: int, column: int):
    """Draw one patch of a query and how similar each patch of a reference is to it.

    Parameters
    ----------
    query, reference : images
    query_patches, reference_patches : arrays (N, M)
        Patch tokens in row-major order.
    grid : (h, w), or a pair of them
        Patches of each picture; one pair of numbers where both are alike.
    row, column : int

    Returns
    -------
    matplotlib figure
    """
    grids = grid if np.ndim(grid) == 2 else (grid, grid)
    first, second = (tuple(int(v) for v in g) for g in grids)
    if not (0 <= row < first[0] and 0 <= column < first[1]):
        raise ValueError(f"row and column must lie within {first[0]} x {first[1]}, got {row} and {column}")
    similarity = analysis.patch_similarity(query_patches, reference_patches, row * first[1] + column)
    return figures.patch_match(query, reference, (row, column), similarity.reshape(second), grid=first)


def patch_matcher(query, reference, query_patches, reference_patches, grid):
    """Pick a patch of the query, by a click or by two sliders, and see what it matches in the reference.

    Arguments as in `patch_view`.

    Returns
    -------
    ipywidgets.VBox
        With attributes ``row``, ``column`` (sliders), ``picture`` and ``clickable``.
    """
    import ipywidgets
    import plotly.graph_objects as go

    first = tuple(int(v) for v in (grid[0] if np.ndim(grid) == 2 else grid))
    row = ipywidgets.IntSlider(first[0] // 2, 0, first[0] - 1, description="row", continuous_update=False)
    column = ipywidgets.IntSlider(
        first[1] // 2, 0, first[1] - 1, description="column", continuous_update=False
    )
    picture = ipywidgets.Image(format="png")
    pixels = np.asarray(query)[..., :3]
    clickable = go.FigureWidget(go.Image(z=pixels, hoverinfo="none"))
    clickable.update_layout(
        width=330,
        height=330 * pixels.shape[0] // pixels.shape[1] + 40,
        margin={"l": 5, "r": 5, "t": 35, "b": 5},
    )
    clickable.update_layout(title={"text": "click a patch", "font": {"size": 13}})
    clickable.update_xaxes(visible=False)
    clickable.update_yaxes(visible=False)
    # The wide picture must not squeeze the one that takes the clicks.
    left = ipywidgets.Box([clickable], layout={"flex": "0 0 340px"})
    picture.layout = {"width": "calc(100% - 345px)", "object_fit": "contain"}
    box = ipywidgets.VBox([ipywidgets.HBox([row, column]), ipywidgets.HBox([left, picture])])
    box.row, box.column, box.picture, box.clickable = row, column, picture, clickable

    def show(_change=None) -> None:
        figure = patch_view(query, reference, query_patches, reference_patches, grid, row.value, column.value)
        picture.value = figures.to_png(figure)

    def clicked(_trace, points, _state) -> None:
        if points.xs:
            column.value = min(int(points.xs[0] * first[1] / pixels.shape[1]), first[1] - 1)
            row.value = min(int(points.ys[0] * first[0] / pixels.shape[0]), first[0] - 1)

    row.observe(show, "value")
    column.observe(show, "value")
    clickable.data[0].on_click(clicked)
    show()
    return box


# --- descriptors -----------------------------------------------------------------------------------------------


def tsne_browser(figure, paths: Sequence[str], *, load: Callable = load_image, size_px: int = 240):
    """Show the photograph of the point under the mouse beside a `workbench.figures.tsne_plotly` figure.

    Parameters
    ----------
    figure : plotly figure
        With an image index first in each point's ``customdata``.
    paths : sequence of str
        Picture of each index.
    load : callable
        Path -> PIL image.
    size_px : int
        Longer side of the photograph shown.

    Returns
    -------
    ipywidgets.VBox
        With attributes ``picture``, ``text``, ``chart`` and ``show`` (a function of an image index).
    """
    import io

    import ipywidgets
    import plotly.graph_objects as go

    chart = go.FigureWidget(figure)
    picture = ipywidgets.Image(format="png", layout={"width": f"{size_px}px"})
    text = ipywidgets.HTML("hover over a point to see its photograph")
    box = ipywidgets.VBox([chart, ipywidgets.HBox([picture, text])])
    box.picture, box.text, box.chart = picture, text, chart

    def show(index: int) -> None:
        image = load_image(load(paths[index]))
        image.thumbnail((size_px, size_px))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        picture.value = buffer.getvalue()
        text.value = f"<b>{index}</b><br>{str(paths[index]).rsplit('/', 1)[-1]}"

    def hovered(trace, points, _state) -> None:
        if points.point_inds:
            show(int(trace.customdata[points.point_inds[0]][0]))

    for trace in chart.data:
        trace.on_hover(hovered)
    box.show = show
    return box


def tsne_explorer(
    descriptors: Mapping,
    place,
    paths: Sequence[str],
    *,
    aid: Mapping | None = None,
    class_aid: Mapping | None = None,
    perplexity: int = 10,
    seed: int = 0,
    load: Callable = load_image,
):
    """Slide perplexity and seed and see what of the t-SNE maps stays; hover over a point to see its photograph.

    Parameters
    ----------
    descriptors : mapping of method -> array (n, D)
    place : array (n,)
    paths : sequence of n str
    aid, class_aid
        Of the descriptors, see `workbench.figures.tsne_plotly`; the sliders do not change them.
    perplexity, seed : int
        Where the sliders start; see `workbench.analysis.tsne`.
    load : callable
        Path -> PIL image.

    Returns
    -------
    ipywidgets.VBox
        With attributes ``perplexity``, ``seed`` (sliders) and those of `tsne_browser`.
    """
    import ipywidgets

    files = [str(path).rsplit("/", 1)[-1] for path in paths]
    most = min(30, len(place) - 1)
    perplexities = ipywidgets.IntSlider(
        perplexity, 2, max(most, perplexity), description="perplexity", continuous_update=False
    )
    seeds = ipywidgets.IntSlider(seed, 0, max(9, seed), description="seed", continuous_update=False)

    def chart():
        options = dict(perplexity=perplexities.value, seed=seeds.value)
        maps = {name: analysis.tsne(values, **options) for name, values in descriptors.items()}
        return figures.tsne_plotly(maps, place, files=files, aid=aid, class_aid=class_aid)

    box = tsne_browser(chart(), paths, load=load)
    box.perplexity, box.seed = perplexities, seeds
    box.children = (ipywidgets.HBox([perplexities, seeds]), *box.children)

    def show(_change) -> None:
        fresh = chart()
        with box.chart.batch_update():
            for old, new in zip(box.chart.data, fresh.data, strict=True):
                old.x, old.y = new.x, new.y
            box.chart.layout.annotations = fresh.layout.annotations

    perplexities.observe(show, "value")
    seeds.observe(show, "value")
    return box


# --- training --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def live_curve(
    read_log: Callable, *, plateau: float | None = None, every_s: float = 2.0
) -> Iterator["LiveCurve | None"]:
    """Show the loss under a cell while the block inside trains; do nothing on a page without a browser.

    Arguments as for `LiveCurve`::

        with live_curve(run.read_log, plateau=1.477):
            train(config, run)
    """
    if not live():
        yield None
        return
    from IPython.display import display

    curve = LiveCurve(read_log, plateau=plateau, every_s=every_s)
    display(curve.widget)
    with curve:
        yield curve


class LiveCurve:
    """Draw a run's loss while it trains, from its log.

    Use it around the training; the widget is drawn again every few seconds by a thread of its own::

        curve = LiveCurve(run.read_log, plateau=1.477)
        display(curve.widget)
        with curve:
            train(config, run)

    `live_curve` does so in one line.

    Parameters
    ----------
    read_log : callable
        Gives the lines of the log, oldest first (``Run.read_log``).
    plateau : float, optional
        The loss's trivial resting place.
    every_s : float
        Seconds between two drawings.
    """

    def __init__(self, read_log: Callable, *, plateau: float | None = None, every_s: float = 2.0):
        import ipywidgets

        if not every_s > 0:
            raise ValueError(f"every_s must be above 0, got {every_s}")
        self.read_log, self.plateau, self.every_s = read_log, plateau, every_s
        self.widget = ipywidgets.Image(format="png")
        self._lines, self._stop, self._thread = -1, threading.Event(), None

    def figure(self):
        """Draw the loss curve of the log as it is now (matplotlib); ``None`` before its first step."""
        steps = analysis.log_arrays(self.read_log(), "step")
        if "loss" not in steps:
            return None
        return figures.loss_curve(steps["step"], steps["loss"], plateau=self.plateau)

    def draw(self) -> None:
        """Draw the widget again, if the log has grown."""
        lines = len(self.read_log())
        if lines != self._lines:
            self._lines = lines
            figure = self.figure()
            if figure is not None:
                self.widget.value = figures.to_png(figure)

    def __enter__(self) -> "LiveCurve":
        self._stop.clear()
        self._thread = threading.Thread(target=self._keep_drawing, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_error) -> None:
        self._stop.set()
        self._thread.join()
        self.draw()

    def _keep_drawing(self) -> None:
        while not self._stop.wait(self.every_s):
            self.draw()
