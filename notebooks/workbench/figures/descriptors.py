"""Descriptors of places: t-SNE maps, printed and to be hovered over, and distances within a place."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from workbench.figures import style
from workbench.figures.style import BLACK, DARK, PALETTE, colour, styled

PLOTLY_MARKERS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "star",
                  "triangle-left", "triangle-right")  # fmt: skip
TSNE_TITLE = "t-SNE of the same images; numbers: distance within the class"


def central(points: np.ndarray) -> np.ndarray:
    """The point that lies nearest to all others."""
    apart = np.linalg.norm(points[:, None] - points, axis=2)
    return points[apart.sum(axis=1).argmin()]


def aid_text(aid: Mapping | None, name: str, line_break: str) -> str:
    """A method's average intra-class distance with its interval, for the line below its name."""
    return "{}AID {:.3f} [{:.3f}, {:.3f}]".format(line_break, *aid[name]) if aid and name in aid else ""


@styled
def tsne_figure(coordinates, place, *, aid=None, class_aid=None, title=TSNE_TITLE) -> Figure:
    """Draw several methods' t-SNE maps of the same n images side by side (in print, see `tsne_plotly`).

    Parameters
    ----------
    coordinates : mapping of method -> array (n, 2)
    place : array (n,)
        Class of each image; colour and marker.
    aid : mapping of method -> (value, low, high), optional
        Average intra-class distance, in the panel's title.
    class_aid : mapping of method -> mapping of class -> value, optional
        Each class's own, beside its most central image, to which thin lines join the others.
    """
    place = np.asarray(place)
    figure, axes = style.tiles(len(coordinates), 4, (2.65, 3.05), margin=(0, 0.4))
    for axis, (name, points) in zip(axes.flat, coordinates.items(), strict=False):
        values = (class_aid or {}).get(name, {})
        for i, label in enumerate(np.unique(place)):
            own, (tint, mark) = np.asarray(points)[place == label], style.place_mark(i)
            hub = central(own)
            spokes = [(hub, point) for point in own]
            axis.add_collection(LineCollection(spokes, colors=tint, alpha=0.35, linewidths=1))
            axis.scatter(*own.T, s=34, color=tint, marker=mark, edgecolors="white", linewidths=0.4)
            if label in values:
                style.write(axis, f"{values[label]:.2f}", hub, (5, 5), halo=True, fontsize=9, color=tint)
        axis.set_title(name + aid_text(aid, name, "\n"), fontsize=12)
        axis.set(xticks=[], yticks=[])
        axis.spines[["top", "right"]].set_visible(True)
    figure.suptitle(title)
    return figure


def tsne_plotly(coordinates, place, *, files: Sequence[str], aid=None, class_aid=None):
    """Draw t-SNE maps as in `tsne_figure`, to be hovered over; `files` names the n images.

    The ``customdata`` of a point is (image index, file, place, method), from which a widget
    (`workbench.widgets.tsne_explorer`) or a page (`thumbnail_page`) shows the photograph.
    """
    import pandas as pd
    import plotly.express as px

    place = np.asarray(place)
    if len(files) != len(place):
        raise ValueError(f"files must be one an image, got {len(files)} for {len(place)} images")
    columns = min(2, len(coordinates))  # as wide as a notebook's cell
    rows = -(-len(coordinates) // columns)
    points = pd.concat([pd.DataFrame(xy, columns=["x", "y"]) for xy in coordinates.values()])
    points["image"], points["file"] = points.index, np.asarray(files)[points.index]
    points["place"] = place.astype(str)[points.index]
    points["method"] = np.repeat(list(coordinates), len(place))
    order = {"place": np.unique(place).astype(str), "method": list(coordinates)}
    mark = {"color": "place", "symbol": "place", "custom_data": ["image", "file", "place", "method"]}
    look = {"color_discrete_sequence": PALETTE[:7], "symbol_sequence": PLOTLY_MARKERS}
    facets = {"facet_col": "method", "facet_col_wrap": columns, "facet_col_spacing": 0.02}
    facets |= {"facet_row_spacing": 0.12 if rows > 1 else None, "category_orders": order}
    figure = px.scatter(points, x="x", y="y", template="plotly_white", **mark, **look, **facets)
    for title in figure.layout.annotations:
        name = title.text.removeprefix("method=")
        title.text = f"<b>{name}</b>{aid_text(aid, name, '<br>')}"
    hover = "place %{customdata[2]}<br>%{customdata[1]}<extra>%{customdata[3]}</extra>"
    border = {"color": "white", "width": 0.7}
    figure.update_traces(hovertemplate=hover, marker={"size": 9, "line": border}, showlegend=False)
    for trace in figure.data if class_aid else ():
        _, _, label, name = trace.customdata[0]
        values = {str(key): value for key, value in class_aid.get(name, {}).items()}
        if label in values:
            x, y = central(np.stack([trace.x, trace.y], axis=1))
            written = {"font": {"size": 11, "color": trace.marker.color}, "bgcolor": "rgba(255,255,255,0.7)"}
            where = {"x": x, "y": y, "xref": trace.xaxis, "yref": trace.yaxis, "xshift": 16, "yshift": 10}
            figure.add_annotation(text=f"{values[label]:.2f}", showarrow=False, **where, **written)
    axes = {"showticklabels": False, "showgrid": False, "zeroline": False, "title": None, "matches": None}
    figure.update_xaxes(mirror=True, linecolor="#999999", **axes)
    figure.update_yaxes(mirror=True, linecolor="#999999", **axes)
    size = {"width": max(300 * columns, 420), "height": 340 * rows + 70}
    margin = {"l": 15, "r": 15, "t": 70, "b": 15}
    figure.update_layout(margin=margin, font={"size": 13}, hoverlabel={"font": {"size": 13}}, **size)
    return figure


def thumbnail_page(figure, images) -> str:
    """Turn `tsne_plotly`'s figure into an HTML page that shows a hovered point's photograph.

    The images, shrunk, and plotly.js (some 5 MB) lie in the page, so keep them few (hundreds).
    """
    script = (Path(__file__).parent.parent / "thumbnails.js").read_text()
    pictures = json.dumps([style.jpeg(image, 160) for image in images])
    return figure.to_html(include_plotlyjs=True, post_script=script.replace("PICTURES", pictures))


@styled
def aid_bars(names, aid, low, high, *, per_class) -> Figure:
    """Draw average intra-class distances (n,) with their intervals, and every class's own as a dot.

    They are L2 between unit descriptors: from 0 to 2, without a unit.
    """
    figure, axis = style.panel(7.6, 1.7 + 0.55 * len(names))
    y = np.arange(len(names))[::-1]
    axis.barh(y, aid, height=0.62, color=[colour(i) for i in range(len(names))], alpha=0.45)
    bars = {"fmt": "o", "color": BLACK, "capsize": 4, "zorder": 4}
    axis.errorbar(aid, y, xerr=style.error_bars(aid, low, high), **bars)
    for row, values in zip(y, per_class, strict=True):
        shift = ((np.arange(len(values)) * 0.618) % 1 - 0.5) * 0.45
        axis.scatter(values, row + shift, s=14, color=DARK, alpha=0.6, linewidths=0, zorder=3)
    axis.set_yticks(y, names)
    axis.set_xlim(left=0)
    axis.set_xlabel("mean L2 distance of two unit descriptors of one place (0-2)")
    axis.grid(axis="y", visible=False)
    axis.set_title("Average intra-class distance (lower: a place's images lie closer)", fontsize=12)
    return figure
