"""Maps: where and when photographs were taken, what was found for one, and t-SNE maps of descriptors."""

import json
import math
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from scipy.spatial.distance import cdist

from workbench.figures import style
from workbench.figures.style import BLACK, BLUE, ORANGE, PALETTE, RED, RIGHT, SKY, WRONG, mark

PLOTLY_MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star",
                  "triangle-left", "triangle-right")  # fmt: skip


def place_map(east_m, north_m, *, group, heading_deg, title) -> Figure:
    """Draw n photographs on a map, with equal metres on both axes.

    `group` (n,) of str, for instance "reference" and "query", gives colour and marker; a line points to each
    heading (n,), in degrees clockwise from north, NaN unknown.
    """
    group, angle = np.asarray(group), np.deg2rad(heading_deg)
    figure, axis, at = style.metre_panel(7.2, 5.2, east_m, north_m)
    length = 0.02 * max(np.ptp(at, axis=0).max(), 1.0)
    lines = np.stack([at, at + length * np.stack([np.sin(angle), np.cos(angle)], axis=1)], axis=1)
    for i, label in enumerate(dict.fromkeys(group.tolist())):
        here = group == label
        axis.scatter(
            *at[here].T, s=14, alpha=0.75, linewidths=0, label=f"{label} ({here.sum():,})", **mark(i)
        )
        axis.add_collection(LineCollection(lines[here], colors=PALETTE[i % 8], linewidths=0.9))
    figure.legend(loc="outside lower center", ncols=4, markerscale=2)
    axis.set_title(title)
    return figure


def images_per_place(place) -> Figure:
    """Count the images of each place; label -1 (no place known) is left out and counted in the title."""
    place = np.asarray(place)
    counts = np.unique(place[place >= 0], return_counts=True)[1]
    figure, axis = style.panels(7.2, 4.2)
    if len(counts):
        count_histogram(axis, counts, bars=40)
        axis.axvline(np.median(counts), color=RED, linestyle="--", label=f"median {np.median(counts):g}")
        axis.legend()
    left_out = int((place < 0).sum())
    stated = f"{len(counts):,} places" + (f", {left_out:,} images of none" if left_out else "")
    axis.set(xlabel="images of the place", ylabel="places")
    axis.set_title(f"How many photographs a place has\n{stated}")
    style.whole_ticks(axis.xaxis, axis.yaxis)
    return figure


def count_histogram(axis, values: np.ndarray, bars: int) -> None:
    """A bar for each whole number, or for as many of them as it takes to have at most `bars`."""
    step = math.ceil((values.max() - values.min() + 1) / bars)
    edges = np.arange(values.min(), values.max() + step + 1, step) - 0.5
    axis.hist(values, bins=edges, color=BLUE, rwidth=0.92)
    beside = step * max(0, 5 - len(edges)) / 2  # one or two bars do not fill the axis
    axis.set_xlim(edges[0] - beside, edges[-1] + beside)


def distance_histogram(distance_m, *, radius_m: float) -> Figure:
    """Draw how far each query's nearest reference is, on a logarithmic axis if the metres span two decades.

    The positive radius is a line, with the share of distances within it (inclusive).
    """
    distance = np.asarray(distance_m, dtype=float)
    finite = distance[np.isfinite(distance)]
    figure, axis = style.panels(7.2, 4.2)
    share = "none within"
    if len(finite):
        share = f"{np.mean(finite <= radius_m):.1%} within"
        top = max(finite.max(), radius_m * 1.2)
        edges = np.linspace(0, top * 1.001, 46)
        if top > 100 * max(np.quantile(finite, 0.1), 0.5):
            edges = np.concatenate([[0], np.geomspace(0.5, top * 1.001, 45)])
            axis.set_xscale("symlog", linthresh=0.5)
            axis.xaxis.set_major_formatter("{x:,g}")
        axis.hist(finite, bins=edges, color=BLUE, alpha=0.9)
        axis.set_xlim(0, top * 1.02)
    axis.axvline(radius_m, color=RED, linestyle="--", label=f"{radius_m:g} m: {share}")
    axis.legend()
    missing = len(distance) - len(finite)
    title = "Distance to the nearest reference" + (f" ({missing:,} have none)" if missing else "")
    axis.set(title=title, xlabel="distance to the nearest reference (m)", ylabel="queries")
    return figure


def heading_rose(heading_deg) -> Figure:
    """Draw headings as a rose, clockwise from north; each petal's area is its share."""
    heading = np.asarray(heading_deg, dtype=float)
    finite = heading[np.isfinite(heading)]
    counts = np.histogram((finite + 7.5) % 360, bins=24, range=(0, 360))[0]
    figure = style.NotebookFigure(figsize=(5.2, 5.2), layout="constrained")
    axis = figure.add_subplot(projection="polar", theta_offset=np.pi / 2, theta_direction=-1)
    petal = {"width": np.deg2rad(14.1), "color": SKY, "edgecolor": BLUE, "linewidth": 1}
    axis.bar(np.deg2rad(np.arange(0, 360, 15)), np.sqrt(counts), **petal)
    ticks = np.sqrt(counts.max()) * np.array([0.5, 1.0]) if len(finite) else []
    axis.set_yticks(ticks, [f"{round(tick**2):,}" for tick in ticks], color=style.DARK, fontsize=10)
    axis.set_rlabel_position(67.5)
    axis.set_xticks(np.deg2rad(np.arange(0, 360, 45)), ["N", "45°", "E", "135°", "S", "225°", "W", "315°"])
    unknown = len(heading) - len(finite)
    stated = f"{len(finite):,} images" + (f", {unknown:,} with no heading" if unknown else "")
    axis.set_title(f"Where the camera looks\n{stated}")
    return figure


def dates(date, *, group) -> Figure:
    """Count images a month (a day, where all lie within three months), a row for each group.

    `date` (n,) is datetime64, NaT unknown; `group` (n,) is str, for instance "reference" and "query".
    """
    date, group = np.asarray(date, dtype="datetime64[D]"), np.asarray(group)
    dated, names = ~np.isnat(date), list(dict.fromkeys(group)) or [""]
    figure, axes = style.tiles(len(names), 1, (7.8, 1.8), margin=(0, 1.4), sharex=True)
    if dated.any():
        first, last = date[dated].min(), date[dated].max()
        unit, label = ("D", "day") if last - first < np.timedelta64(92, "D") else ("M", "month")
        ends = np.array([first, last], f"datetime64[{unit}]") + np.array([0, 2], f"timedelta64[{unit}]")
        for i, (axis, name) in enumerate(zip(axes[:, 0], names, strict=True)):
            at = dated & (group == name)
            axis.hist(date[at], bins=np.arange(*ends).astype("datetime64[D]"), color=PALETTE[i % 8])
            axis.set_ylabel("images")
            style.whole_ticks(axis.yaxis, most=4)
            axis.set_title(f"{name} ({at.sum():,})", loc="left", fontsize=12)
        axes[-1, 0].set_xlabel(label)
    unknown = int((~dated).sum())
    figure.suptitle("When the photographs were taken" + (f" ({unknown:,} have no date)" if unknown else ""))
    return figure


def nearest_map(
    east_m, north_m, found, *, query_east_m, query_north_m, radius_m=25, descriptor_distance=None, title=None
) -> Figure:
    """Draw the references that were found for one query on the map of all of them.

    `found` (k,) has their rows, nearest first, and `descriptor_distance` (k,) their L2; a circle of
    `radius_m` stands around the query's own position.
    """
    everywhere = np.append(east_m, query_east_m), np.append(north_m, query_north_m)
    figure, axis, at = style.metre_panel(8.6, 5.2, *everywhere)
    query, nearest = at[-1], at[np.asarray(found, dtype=int)]
    axis.scatter(*at[:-1].T, s=9, color="#c4c4c4", linewidths=0, label=f"{len(at) - 1:,} references")
    axis.scatter(*nearest.T, s=210, color=BLUE, edgecolors="white", linewidths=1.2, zorder=3)
    close = cdist(nearest, nearest) < 0.03 * max(np.ptp(at, axis=0).max(), 1.0)
    ranks = list(range(len(nearest)))
    while ranks:  # discs that would cover each other share their numbers
        here = [rank for rank in ranks if close[ranks[0], rank]]
        font = {"fontsize": 11 if len(here) == 1 else 8, "fontweight": "bold", "color": "white"}
        numbers = ",".join(str(rank + 1) for rank in here)
        axis.text(*nearest[ranks[0]], numbers, ha="center", va="center", zorder=4, **font)
        ranks = [rank for rank in ranks if rank not in here]
    axis.scatter(*query, marker="*", s=420, color=RED, edgecolors="white", zorder=2.9, label="the query")
    turn = np.linspace(0, 2 * np.pi, 200)
    circle = query + radius_m * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    axis.plot(*circle.T, color=RED, linestyle="--", linewidth=1.2, label=f"{radius_m:g} m")
    for rank, place in enumerate(nearest):
        apart = "" if descriptor_distance is None else f"distance {descriptor_distance[rank]:.2f}  "
        label = f"{rank + 1}  {apart}{style.metres(math.dist(place, query))}"
        axis.scatter([], [], s=60, color=BLUE, label=label)
    figure.legend(loc="outside right upper")
    axis.set_title(title or "Where the most similar photographs were taken")
    return figure


def places_plotly(
    east_m, north_m, *, hover, query_east_m, query_north_m, query_hover, found, correct, chosen
):
    """Draw n references and Q queries on a plotly map, the chosen query and what was found for it in front.

    Traces: references, queries, lines from the query to the k found, the found ones by rank, the query.
    `found` (k,) are rows of the references, `correct` (k,) says which are positives; `hover` and
    `query_hover` are texts.
    """
    import plotly.graph_objects as go

    found, correct = np.asarray(found, dtype=int), np.asarray(correct, dtype=bool)
    at, names = style.local(np.append(east_m, query_east_m), np.append(north_m, query_north_m))
    references, queries = np.split(at, [len(east_m)])
    lines = [(queries[chosen], end, (None, None)) for end in references[found]]
    figure = go.Figure()

    def layer(name: str, at, marker: dict | None = None, **options):
        shown = {"mode": "markers", "hovertemplate": "%{text}<extra>%{fullData.name}</extra>"} | options
        figure.add_scatter(x=at[:, 0], y=at[:, 1], name=name, marker=marker, **shown)

    silent = {"hoverinfo": "skip", "hovertemplate": None}
    line = {"color": "#777777", "width": 1, "dash": "dot"}
    discs = {"size": 19, "color": np.where(correct, RIGHT, WRONG), "line": {"color": "white", "width": 1}}
    discs["symbol"] = np.where(correct, "circle", "square")
    ranks = {"text": [str(r + 1) for r in range(len(found))], "textfont": {"color": "white", "size": 12}}
    # dots of references are larger, to be seen around a query at the same spot
    layer("references", references, {"size": 11, "color": "#c8c8c8"}, text=hover)
    layer("queries", queries, {"size": 5, "color": ORANGE, "symbol": "diamond"}, text=query_hover)
    layer("found", np.reshape(lines, (-1, 2)), mode="lines", line=line, showlegend=False, **silent)
    layer("found, by rank", references[found], discs, mode="markers+text", **ranks)
    layer("this query", queries[[chosen]], {"size": 16, "color": BLACK, "symbol": "star"}, **silent)
    figure.update_xaxes(title=names[0], zeroline=False)
    figure.update_yaxes(title=names[1], zeroline=False, scaleanchor="x", scaleratio=1)
    size = {"height": 470, "margin": {"l": 60, "r": 20, "t": 20, "b": 55}}
    size |= {"font": {"size": 13}, "legend": {"orientation": "h", "y": 1.08}}
    figure.update_layout(template="plotly_white", **size)
    return figure


def central(points: np.ndarray) -> np.ndarray:
    """The point that lies nearest to all others."""
    return points[cdist(points, points).sum(axis=1).argmin()]


def within_fences(points: np.ndarray) -> np.ndarray:
    """Points (n, 2), those far outside the quartiles brought to a border: one would shrink the rest."""
    low, high = np.quantile(points, [0.25, 0.75], axis=0)
    return np.clip(points, low - 1.5 * (high - low), high + 1.5 * (high - low))


def tsne_title(name: str, aid, line_break: str) -> str:
    """A method's name, and its average intra-class distance with the interval, where it is known."""
    return name + (line_break + "AID {:.3f} [{:.3f}, {:.3f}]".format(*aid) if aid else "")


def tsne_figure(coordinates, place, *, aid=None, class_aid=None, title=None) -> Figure:
    """Draw several methods' t-SNE maps of the same n images side by side (in print, see `tsne_plotly`).

    `coordinates` maps a method to an array (n, 2), `place` (n,) is each image's class (colour and marker).
    Points far outside are drawn on the border.
    `aid` maps a method to its average intra-class distance and interval (value, low, high), for the title;
    `class_aid` to a mapping of class to its own, written beside the most central image of the class.
    """
    place = np.asarray(place)
    figure, axes = style.tiles(len(coordinates), 2, (3.9, 3.8), margin=(0, 0.4))
    for axis, (name, points) in zip(axes.flat, coordinates.items(), strict=False):
        for i, label in enumerate(np.unique(place)):
            own, tint = within_fences(points)[place == label], mark(i)["color"]
            hub = central(own)
            spokes = [(hub, point) for point in own]
            axis.add_collection(LineCollection(spokes, colors=tint, alpha=0.35, linewidths=1))
            axis.scatter(*own.T, s=34, edgecolors="white", linewidths=0.4, **mark(i))
            if class_aid and label in class_aid[name]:
                text = f"{class_aid[name][label]:.2f}"
                style.write(axis, text, hub, (5, 5), **style.HALO, fontsize=9, color=tint)
        axis.set_title(tsne_title(name, aid and aid[name], "\n"), fontsize=12)
        axis.set(xticks=[], yticks=[])
        axis.spines[["top", "right"]].set_visible(True)
    figure.suptitle(title or "t-SNE of the same images; numbers: distance within the class")
    return figure


def tsne_plotly(coordinates, place, *, names, aid=None, class_aid=None):
    """Draw t-SNE maps as in `tsne_figure`, to be hovered over; `names` says what the n images are.

    The ``customdata`` of a point is (image index, name, place, method), from which a widget
    (`workbench.widgets.tsne_explorer`) or a page (`thumbnail_page`) shows the photograph.
    """
    from plotly.subplots import make_subplots

    place = np.asarray(place)
    style.agree(images=place, names=names)
    columns = min(2, len(coordinates))  # as wide as a notebook's cell
    rows = -(-len(coordinates) // columns)
    titles = [tsne_title(f"<b>{name}</b>", aid and aid[name], "<br>") for name in coordinates]
    spacing = {"horizontal_spacing": 0.02, "vertical_spacing": 0.12 if rows > 1 else None}
    figure = make_subplots(rows, columns, subplot_titles=titles, **spacing)
    figure.update_annotations(font={"size": 13})
    hover = "%{customdata[1]}<extra>%{customdata[3]}</extra>"
    for m, (name, points) in enumerate(coordinates.items()):
        points = within_fences(points)
        cell = {"row": m // columns + 1, "col": m % columns + 1}
        for i, label in enumerate(np.unique(place)):
            own, tint = np.flatnonzero(place == label), PALETTE[i % 7]
            data = [(int(image), names[image], str(label), escape(name, False)) for image in own]
            disc = {"color": tint, "symbol": PLOTLY_MARKERS[i % 10], "size": 9}
            disc["line"] = {"color": "white", "width": 0.7}
            shown = {"mode": "markers", "marker": disc, "customdata": data, "hovertemplate": hover}
            figure.add_scatter(x=points[own, 0], y=points[own, 1], **shown, **cell)
            if class_aid and label in class_aid[name]:
                x, y = central(points[own])
                look = {"font": {"size": 11, "color": tint}, "bgcolor": "rgba(255,255,255,0.7)"}
                look |= {"showarrow": False, "xshift": 16, "yshift": 10}
                figure.add_annotation(text=f"{class_aid[name][label]:.2f}", x=x, y=y, **look, **cell)
    axes = {"showticklabels": False, "showgrid": False, "zeroline": False, "mirror": True}
    figure.update_xaxes(linecolor="#999999", **axes)
    figure.update_yaxes(linecolor="#999999", **axes)
    size = {"height": 340 * rows + 70}
    margin = {"l": 15, "r": 15, "t": 70, "b": 15}
    size |= {"font": {"size": 13}, "hoverlabel": {"font": {"size": 13}}, "showlegend": False}
    figure.update_layout(template="plotly_white", margin=margin, **size)
    return figure


def thumbnail_page(figure, images) -> str:
    """Turn `tsne_plotly`'s figure into an HTML page that shows a hovered point's photograph.

    The images, shrunk, and plotly.js (some 5 MB) lie in the page, so keep them few (hundreds).
    """
    script = (Path(__file__).parent.parent / "thumbnails.js").read_text()
    pictures = json.dumps([style.jpeg(image, 160) for image in images])
    return figure.to_html(include_plotlyjs=True, post_script=script.replace("PICTURES", pictures))
