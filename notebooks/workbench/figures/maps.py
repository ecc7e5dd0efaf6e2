"""Where and when photographs were taken, and where what was found for one of them lies."""

import math

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.spatial.distance import cdist

from workbench.figures import style
from workbench.figures.style import BLACK, BLUE, ORANGE, RED, RIGHT, SKY, WRONG, colour, marker, styled


@styled
def place_map(east_m, north_m, *, group, heading_deg, title) -> Figure:
    """Draw n photographs on a map, with equal metres on both axes.

    `group` (n,) of str, for instance "reference" and "query", gives colour and marker; a line points to each
    heading (n,), in degrees clockwise from north, NaN unknown.
    """
    start, names = style.local(east_m, north_m)
    group, angle = np.asarray(group).astype(str), np.deg2rad(np.asarray(heading_deg, dtype=float))
    figure, axis = style.panel(7.2, 5.2)
    style.metre_axes(axis, start, names)
    length = 0.02 * max(np.ptp(start, axis=0).max(), 1.0)
    end = start + length * np.stack([np.sin(angle), np.cos(angle)], axis=1)
    handles = []
    for i, label in enumerate(dict.fromkeys(group.tolist())):
        at, mark = group == label, {"color": colour(i), "marker": marker(i)}
        axis.scatter(*start[at].T, s=14, alpha=0.75, linewidths=0, **mark)
        looking = at & np.isfinite(angle)
        lines = np.stack([start[looking], end[looking]], axis=1)
        axis.add_collection(LineCollection(lines, colors=colour(i), linewidths=0.9))
        handles.append(Line2D([], [], linestyle="", markersize=7, label=f"{label} ({at.sum():,})", **mark))
    style.legend_below(figure, handles, columns=4)
    figure.suptitle(title)
    return figure


@styled
def images_per_place(place) -> Figure:
    """Count the images of each place; label -1 (no place known) is left out and counted in the title."""
    place = np.asarray(place)
    counts = np.unique(place[place >= 0], return_counts=True)[1]
    figure, axis = style.panel(7.2, 4.2)
    count_histogram(axis, counts, bars=40)
    if len(counts):
        median = float(np.median(counts))
        axis.axvline(median, color=RED, linestyle="--", label=f"median {median:g}")
        axis.legend()
    left_out = int((place < 0).sum())
    stated = f"{len(counts):,} places" + (f", {left_out:,} images of none" if left_out else "")
    axis.set(xlabel="images of the place", ylabel="places")
    axis.set_title(f"How many photographs a place has\n{stated}")
    style.whole_ticks(axis.xaxis, axis.yaxis)
    return figure


def count_histogram(axis, values: np.ndarray, bars: int) -> None:
    """A bar for each whole number, or for as many of them as it takes to have at most `bars`."""
    if len(values):
        step = max(math.ceil((values.max() - values.min() + 1) / bars), 1)
        edges = np.arange(values.min(), values.max() + step + 1, step) - 0.5
        axis.hist(values, bins=edges, color=BLUE, rwidth=0.92)


@styled
def distance_histogram(distance_m, *, radius_m: float) -> Figure:
    """Draw how far each query's nearest reference is, on a logarithmic axis if the metres span two decades.

    The positive radius is a line, with the share of distances within it (inclusive).
    """
    distance = np.asarray(distance_m, dtype=float)
    finite = distance[np.isfinite(distance)]
    figure, axis = style.panel(7.2, 4.2)
    share = "none within"
    if len(finite):
        share = f"{np.mean(finite <= radius_m):.1%} within"
        top = max(finite.max(), radius_m * 1.2)
        edges = np.linspace(0, top * 1.001, 46)
        if top > 100 * max(np.quantile(finite, 0.1), 0.5):
            edges = np.concatenate([[0], np.geomspace(0.5, top * 1.001, 45)])
            axis.set_xscale("symlog", linthresh=0.5)
            style.plain_ticks(axis.xaxis)
        axis.hist(finite, bins=edges, color=BLUE, alpha=0.9)
        axis.set_xlim(0, top * 1.02)
    axis.axvline(radius_m, color=RED, linestyle="--", label=f"{radius_m:g} m: {share}")
    axis.legend()
    missing = len(distance) - len(finite)
    title = "Distance to the nearest reference" + (f" ({missing:,} have none)" if missing else "")
    axis.set(title=title, xlabel="distance to the nearest reference (m)", ylabel="queries")
    return figure


@styled
def heading_rose(heading_deg) -> Figure:
    """Draw headings as a rose, clockwise from north; each petal's area is its share."""
    heading = np.asarray(heading_deg, dtype=float)
    finite = heading[np.isfinite(heading)] % 360
    bins, width = 24, 15.0
    counts = np.bincount((((finite + width / 2) % 360) / width).astype(int), minlength=bins)
    figure = style.NotebookFigure(figsize=(5.2, 5.2), layout="constrained")
    axis = figure.add_subplot(projection="polar", theta_offset=np.pi / 2, theta_direction=-1)
    petal = {"width": np.deg2rad(width) * 0.94, "color": SKY, "edgecolor": BLUE, "linewidth": 1}
    axis.bar(np.deg2rad(np.arange(bins) * width), np.sqrt(counts), **petal)
    ticks = np.sqrt(counts.max()) * np.array([0.5, 1.0]) if len(finite) else []
    axis.set_yticks(ticks, [f"{round(tick**2):,}" for tick in ticks], color=style.DARK, fontsize=10)
    axis.set_rlabel_position(67.5)
    axis.set_xticks(np.deg2rad(np.arange(0, 360, 45)), ["N", "45°", "E", "135°", "S", "225°", "W", "315°"])
    unknown = len(heading) - len(finite)
    stated = f"{len(finite):,} images" + (f", {unknown:,} with no heading" if unknown else "")
    axis.set_title(f"Where the camera looks\n{stated}")
    return figure


@styled
def dates(date, *, group) -> Figure:
    """Count images a month (a day, where all lie within three months), a row for each group.

    `date` (n,) is datetime64, NaT unknown; `group` (n,) is str, for instance "reference" and "query".
    """
    date, group = np.asarray(date, dtype="datetime64[D]"), np.asarray(group).astype(str)
    dated = ~np.isnat(date)
    names = list(dict.fromkeys(group.tolist())) or [""]
    figure, axes = style.panels(len(names), 1, (7.8, 1.4 + 1.8 * len(names)), sharex=True)
    if dated.any():
        first, last = date[dated].min(), date[dated].max()
        unit, label = ("D", "day") if last - first < np.timedelta64(92, "D") else ("M", "month")
        edges = np.arange(first.astype(f"datetime64[{unit}]"), last.astype(f"datetime64[{unit}]") + 2)
        for i, (axis, name) in enumerate(zip(axes[:, 0], names, strict=True)):
            at = dated & (group == name)
            axis.hist(date[at], bins=edges.astype("datetime64[D]"), color=colour(i))
            axis.set_ylabel("images")
            style.whole_ticks(axis.yaxis, most=4)
            axis.set_title(f"{name} ({at.sum():,})", loc="left", fontsize=12)
        axes[-1, 0].set_xlabel(label)
    unknown = int((~dated).sum())
    figure.suptitle("When the photographs were taken" + (f" ({unknown:,} have no date)" if unknown else ""))
    return figure


@styled
def nearest_map(
    east_m, north_m, found, *, query_east_m, query_north_m, radius_m=25, descriptor_distance=None, title=None
) -> Figure:
    """Draw the references that were found for one query on the map of all of them.

    `found` (k,) has their rows, nearest first, and `descriptor_distance` (k,) their L2; a circle of
    `radius_m` stands around the query's own position.
    """
    found = np.asarray(found, dtype=int)
    at, names = style.local(np.append(east_m, query_east_m), np.append(north_m, query_north_m))
    query, nearest = at[-1], at[found]
    figure, axis = style.panel(8.6, 5.2)
    style.metre_axes(axis, at, names)
    axis.scatter(*at[:-1].T, s=9, color="#c4c4c4", linewidths=0, label=f"{len(at) - 1:,} references")
    axis.scatter(*nearest.T, s=210, color=BLUE, edgecolors="white", linewidths=1.2, zorder=3)
    close = cdist(nearest, nearest) < 0.03 * max(np.ptp(at, axis=0).max(), 1.0)
    written = np.zeros(len(found), dtype=bool)
    for rank in range(len(found)):  # discs that would cover each other share their numbers
        here = np.flatnonzero(close[rank] & ~written)
        if not written[rank]:
            written[here] = True
            font = {"fontsize": 11 if len(here) == 1 else 8, "fontweight": "bold", "color": "white"}
            numbers = ",".join(str(r + 1) for r in here)
            axis.text(*nearest[rank], numbers, ha="center", va="center", zorder=4, **font)
    star = {"marker": "*", "s": 420, "color": RED, "edgecolors": "white", "zorder": 2.9}
    axis.scatter(*query, label="the query", **star)
    turn = np.linspace(0, 2 * np.pi, 200)
    circle = query + radius_m * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    axis.plot(*circle.T, color=RED, linestyle="--", linewidth=1.2, label=f"{radius_m:g} m")
    for rank in range(len(found)):
        parts = [f"{rank + 1}"]
        if descriptor_distance is not None:
            parts.append(f"distance {float(descriptor_distance[rank]):.2f}")
        parts.append(style.metres(math.dist(nearest[rank], query)))
        axis.scatter([], [], s=60, color=BLUE, label="  ".join(parts))
    figure.legend(loc="outside right upper")
    axis.set_title(title or "Where the nearest photographs were taken")
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
    layers = (references, queries, np.reshape(lines, (-1, 2)), references[found], queries[[chosen]])
    traces = ("references", "queries", "found", "found, by rank", "this query")
    scatters = [
        go.Scatter(x=at[:, 0], y=at[:, 1], name=name) for at, name in zip(layers, traces, strict=True)
    ]
    figure = go.Figure(scatters)
    figure.update_traces(mode="markers", hovertemplate="%{text}<extra>%{fullData.name}</extra>")
    dots = {"size": 11, "color": "#c8c8c8"}  # seen around a query at the same spot
    diamonds = {"size": 5, "color": ORANGE, "symbol": "diamond"}
    discs = {"size": 19, "color": np.where(correct, RIGHT, WRONG), "line": {"color": "white", "width": 1}}
    discs["symbol"] = np.where(correct, "circle", "square")
    numbers = {"text": [str(r + 1) for r in range(len(found))], "textfont": {"color": "white", "size": 12}}
    star = {"size": 16, "color": BLACK, "symbol": "star"}
    line = {"color": "#777777", "width": 1, "dash": "dot"}
    silent = {"hoverinfo": "skip", "hovertemplate": None}
    figure.data[0].update(marker=dots, text=hover)
    figure.data[1].update(marker=diamonds, text=query_hover)
    figure.data[2].update(mode="lines", line=line, showlegend=False, **silent)
    figure.data[3].update(mode="markers+text", marker=discs, **numbers)
    figure.data[4].update(marker=star, **silent)
    figure.update_xaxes(title=names[0], zeroline=False)
    figure.update_yaxes(title=names[1], zeroline=False, scaleanchor="x", scaleratio=1)
    size = {"width": 760, "height": 470, "margin": {"l": 60, "r": 20, "t": 20, "b": 55}}
    size |= {"font": {"size": 13}, "legend": {"orientation": "h", "y": 1.08}}
    figure.update_layout(template="plotly_white", **size)
    return figure
