"""Every figure of the workbench: arrays in, a matplotlib or plotly figure out.

No function here reads or writes a file, shows anything, or knows the rest of the package. One style throughout:
letters that can be read at half size, Okabe and Ito's colours (told apart by the colour-blind, and never the only
mark of a difference), axes with units. A matplotlib figure that ends a notebook cell is drawn under it; a run saves
it as PNG and PDF.

Images are PIL images or arrays (H, W, 3); positions are metres east and north in one frame; recalls are percents;
NaN means "not run" or "unknown" and is drawn as such.
"""

import functools
import io
import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

BLACK, GREY = "#1a1a1a", "#8c8c8c"
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW = "#CC79A7", "#56B4E9", "#F0E442"
PALETTE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK, YELLOW)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
RIGHT, WRONG = BLUE, RED
HEAT = "magma"  # how much: dark to light, in order for every eye
AFFINITY = "viridis"
SIGNED = "PuOr"  # for or against: two hues that the colour-blind tell apart

STYLE = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.labelsize": 12,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "figure.titlesize": 14,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.8,
    "axes.edgecolor": "#4d4d4d",
    "axes.prop_cycle": matplotlib.cycler(color=PALETTE),
    "lines.linewidth": 2.0,
    "lines.markersize": 6.0,
    "legend.frameon": False,
    "image.interpolation": "nearest",
    "pdf.fonttype": 42,
}


class NotebookFigure(Figure):
    """A matplotlib figure that no global state knows of, and that a notebook draws when it ends a cell."""

    def _repr_png_(self) -> bytes:
        return to_png(self)


def to_png(figure: Figure, *, dpi: int = 90) -> bytes:
    """Draw a matplotlib figure into the bytes of a PNG, the way that widgets and notebooks show it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def _styled(draw):
    @functools.wraps(draw)
    def wrapped(*args, **kwargs):
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapped


def _panels(rows: int = 1, columns: int = 1, *, size: tuple[float, float], **options):
    figure = NotebookFigure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, axes


# --- what a place is -------------------------------------------------------------------------------------------


@_styled
def place_map(
    east_m,
    north_m,
    *,
    group=None,
    panel=None,
    heading_deg=None,
    title: str | None = None,
    max_panels: int = 6,
    marker_size: float = 14.0,
) -> Figure:
    """Draw photographs on a map, with equal metres on both axes.

    Parameters
    ----------
    east_m, north_m : array (n,)
    group : array (n,) of str, optional
        Colour and marker, for instance the split or the condition.
    panel : array (n,) of str, optional
        One map each, for instance the city: cities lie too far apart for one. The largest `max_panels` are drawn
        and the title of the figure says how many there are.
    heading_deg : array (n,), optional
        Draws a short line towards each heading, clockwise from north; NaN draws none.
    """
    east, north = _positions(east_m, north_m)
    group = np.full(len(east), "") if group is None else np.asarray(group).astype(str)
    panel = np.full(len(east), "") if panel is None else np.asarray(panel).astype(str)
    names, counts = np.unique(panel, return_counts=True)
    shown = names[np.argsort(-counts, kind="stable")][:max_panels]
    columns = min(len(shown), 3) or 1
    rows = max(-(-len(shown) // columns), 1)
    figure, axes = _panels(rows, columns, size=(7.2 if columns == 1 else 3.9 * columns, 5.2 * rows))
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    groups = list(dict.fromkeys(group.tolist()))
    for axis, name in zip(axes.flat, shown, strict=False):
        here = panel == name
        origin = _local_axes(axis, east[here], north[here])
        for i, label in enumerate(groups):
            at = here & (group == label)
            x, y = east[at] - origin[0], north[at] - origin[1]
            axis.scatter(
                x,
                y,
                s=marker_size,
                color=PALETTE[i % len(PALETTE)],
                marker=MARKERS[i % len(MARKERS)],
                alpha=0.75,
                linewidths=0,
            )
            if heading_deg is not None:
                angle = np.deg2rad(np.asarray(heading_deg, dtype=float)[at])
                length = 0.02 * max(np.ptp(east[here]), np.ptp(north[here]), 1.0)
                ends = np.stack([x + length * np.sin(angle), y + length * np.cos(angle)], axis=1)
                lines = np.stack([np.stack([x, y], axis=1), ends], axis=1)[np.isfinite(angle)]
                axis.add_collection(LineCollection(lines, colors=PALETTE[i % len(PALETTE)], linewidths=0.9))
        if name:
            axis.set_title(f"{name} ({here.sum():,})")
    if any(groups):
        handles = [
            Line2D(
                [],
                [],
                linestyle="",
                color=PALETTE[i % len(PALETTE)],
                marker=MARKERS[i % len(MARKERS)],
                markersize=7,
                label=f"{label} ({np.sum(group == label):,})",
            )
            for i, label in enumerate(groups)
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
    if len(names) > len(shown):
        title = f"{title + ': ' if title else ''}{len(shown)} of {len(names)} shown"
    if title:
        figure.suptitle(title)
    return figure


@_styled
def images_per_place(place, *, title: str = "How many photographs a place has") -> Figure:
    """Count the images of each place; label -1 (no place known) is left out and counted in the title."""
    place = np.asarray(place)
    known = place[place >= 0]
    counts = np.unique(known, return_counts=True)[1]
    figure, axes = _panels(size=(7.2, 4.2))
    axis = axes[0, 0]
    if len(counts):
        step = max(math.ceil((counts.max() + 1) / 40), 1)
        edges = np.arange(1, counts.max() + step + 1, step) - 0.5
        axis.hist(counts, bins=edges, color=BLUE, rwidth=0.9)
        middle = float(np.median(counts))
        axis.axvline(middle, color=RED, linestyle="--", label=f"median {middle:g}")
        axis.legend()
    left_out = len(place) - len(known)
    axis.set_title(
        f"{title}\n{len(counts):,} places" + (f", {left_out:,} images of none" if left_out else "")
    )
    axis.set_xlabel("images of the place")
    axis.set_ylabel("places")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@_styled
def distance_histogram(
    distance_m,
    *,
    radius_m: float | None = 25.0,
    what: str = "nearest reference",
    unit: str = "queries",
    title: str | None = None,
) -> Figure:
    """Draw how far something is, on a logarithmic axis where the metres span more than two decades.

    Parameters
    ----------
    distance_m : array (n,)
        Distances in metres; what is not finite is left out and counted.
    radius_m : float, optional
        The positive radius, drawn as a line, with the share of distances within it (inclusive).
    what, unit : str
        What is measured, and what is counted.
    """
    distance = np.asarray(distance_m, dtype=float).ravel()
    finite = distance[np.isfinite(distance)]
    figure, axes = _panels(size=(7.2, 4.2))
    axis = axes[0, 0]
    if len(finite):
        top = max(finite.max(), (radius_m or 0) * 1.2, 1e-9)
        if top > 100 * max(np.quantile(finite, 0.1), 0.5):
            edges = np.concatenate([[0], np.geomspace(0.5, top * 1.001, 45)])
            axis.set_xscale("symlog", linthresh=0.5)
            axis.xaxis.set_major_formatter(FuncFormatter(_plain))
        else:
            edges = np.linspace(0, top * 1.001, 46)
        axis.hist(finite, bins=edges, color=BLUE, alpha=0.9)
        axis.set_xlim(0, top * 1.02)
    if radius_m is not None:
        share = f"{np.mean(finite <= radius_m):.1%} within" if len(finite) else "none within"
        axis.axvline(radius_m, color=RED, linestyle="--", label=f"{radius_m:g} m: {share}")
        axis.legend()
    missing = len(distance) - len(finite)
    axis.set_title((title or f"Distance to the {what}") + (f" ({missing:,} have none)" if missing else ""))
    axis.set_xlabel(f"distance to the {what} (m)")
    axis.set_ylabel(unit)
    return figure


@_styled
def heading_rose(heading_deg, *, bins: int = 24, title: str = "Where the camera looks") -> Figure:
    """Draw headings as a rose, clockwise from north; each petal's area is its share. NaN is counted in the title."""
    heading = np.asarray(heading_deg, dtype=float)
    known = heading[np.isfinite(heading)] % 360
    figure = NotebookFigure(figsize=(5.2, 5.2), layout="constrained")
    axis = figure.add_subplot(projection="polar", theta_offset=np.pi / 2, theta_direction=-1)
    width = 360 / bins
    counts = np.bincount((((known + width / 2) % 360) / width).astype(int), minlength=bins)[:bins]
    axis.bar(
        np.deg2rad(np.arange(bins) * width),
        np.sqrt(counts),
        width=np.deg2rad(width) * 0.94,
        color=SKY,
        edgecolor=BLUE,
        linewidth=1,
    )
    ticks = np.sqrt(counts.max()) * np.array([0.5, 1.0]) if len(known) else []
    axis.set_yticks(ticks, [f"{round(tick**2):,}" for tick in ticks], color="#555555", fontsize=10)
    axis.set_rlabel_position(67.5)
    axis.set_xticks(np.deg2rad(np.arange(0, 360, 45)), ["N", "45°", "E", "135°", "S", "225°", "W", "315°"])
    unknown = len(heading) - len(known)
    axis.set_title(f"{title}\n{len(known):,} images" + (f", {unknown:,} with no heading" if unknown else ""))
    return figure


@_styled
def dates(date, *, group=None, title: str = "When the photographs were taken") -> Figure:
    """Count images a month (a day, where all lie within three months).

    Parameters
    ----------
    date : array (n,) of datetime64
        NaT is left out and counted in the title.
    group : array (n,) of str, optional
        One row of the figure each, for instance the split.
    """
    date = np.asarray(date, dtype="datetime64[D]")
    group = np.full(len(date), "") if group is None else np.asarray(group).astype(str)
    known = ~np.isnat(date)
    names = list(dict.fromkeys(group.tolist())) or [""]
    figure, axes = _panels(len(names), 1, size=(7.8, 1.4 + 1.8 * len(names)), sharex=True)
    if known.any():
        first, last = date[known].min(), date[known].max()
        step = "D" if last - first < np.timedelta64(92, "D") else "M"
        start = first.astype(f"datetime64[{step}]")
        n = int((last.astype(f"datetime64[{step}]") - start).astype(int)) + 1
        bars = (start + np.arange(n)).astype("datetime64[D]")
        wide = np.diff(np.append(bars, (start + n).astype("datetime64[D]"))).astype(int)
        for i, (axis, name) in enumerate(zip(axes[:, 0], names, strict=True)):
            at = known & (group == name)
            counts = np.bincount((date[at].astype(f"datetime64[{step}]") - start).astype(int), minlength=n)
            axis.bar(bars, counts, width=wide, align="edge", color=PALETTE[i % len(PALETTE)])
            axis.set_ylabel("images")
            axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))
            if name:
                axis.set_title(f"{name} ({at.sum():,})", loc="left", fontsize=12)
        axes[-1, 0].set_xlabel("month" if step == "M" else "day")
    unknown = int((~known).sum())
    figure.suptitle(title + (f" ({unknown:,} have no date)" if unknown else ""))
    return figure


@_styled
def contact_sheet(
    images: Sequence,
    captions: Sequence[str] | None = None,
    *,
    columns: int = 6,
    title: str | None = None,
    marked=None,
    tile: float = 1.9,
) -> Figure:
    """Lay photographs out in a grid.

    Parameters
    ----------
    images : sequence of images
    captions : sequence of str, optional
        One under each; it may have several lines.
    columns : int
    marked : array (n,) of bool, optional
        Draws a frame: right (blue) where true, wrong (red and dashed) where false.
    tile : float
        Width of a picture in inches.
    """
    if not len(images):
        raise ValueError("contact_sheet needs at least one image, got none")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"captions must be one an image: got {len(captions)} for {len(images)} images")
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height = tile * _aspect(images[0])
    lines = max((caption.count("\n") + 1 for caption in captions), default=0) if captions is not None else 0
    size = (tile * columns, (height + 0.2 * lines + 0.06) * rows + (0.45 if title else 0))
    figure, axes = _panels(rows, columns, size=size)
    for i, axis in enumerate(axes.flat):
        axis.set_axis_off()
        if i < len(images):
            mark = None if marked is None else bool(marked[i])
            _photograph(axis, images[i], None if captions is None else captions[i], mark)
    if title:
        figure.suptitle(title)
    return figure


@_styled
def label_map(image, labels, names: Sequence[str], *, title: str | None = None) -> Figure:
    """Show a picture beside the label of each of its pixels.

    Parameters
    ----------
    image : image (H, W, 3)
    labels : array (H, W) of int
        Index into `names`.
    """
    labels = np.asarray(labels)
    present = np.unique(labels)
    colours = [_label_colour(i) for i in range(len(names))]
    figure, axes = _panels(1, 2, size=(8.6, 3.6))
    _photograph(axes[0, 0], image)
    axes[0, 1].imshow(labels, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(names) - 0.5)
    axes[0, 1].set_axis_off()
    handles = [Patch(color=colours[i], label=f"{names[i]} {np.mean(labels == i):.0%}") for i in present]
    axes[0, 1].legend(handles=handles, loc="center left", bbox_to_anchor=(1.02, 0.5))
    if title:
        figure.suptitle(title)
    return figure


# --- retrieval -------------------------------------------------------------------------------------------------


@_styled
def retrieval_panel(
    queries: Sequence,
    retrieved: Sequence[Sequence],
    distance_m,
    correct,
    *,
    ranks=None,
    query_captions: Sequence[str] | None = None,
    truth: Sequence | None = None,
    title: str | None = None,
    tile: float = 1.75,
) -> Figure:
    """Draw queries with what was retrieved for them, a row each.

    Parameters
    ----------
    queries : sequence of Q images
    retrieved : sequence of Q sequences of k images
        In order of rank.
    distance_m, correct : array (Q, k)
        Metres between query and reference (NaN unknown), and whether it is a positive: a blue frame and a tick if
        it is, a red dashed frame and a cross if not.
    ranks : array (Q, k) of int, optional
        Ranks to write; 1, 2, ... by default.
    query_captions : sequence of Q str, optional
    truth : sequence of Q images or None, optional
        A true reference, in a last column of its own.
    """
    distance, correct = np.atleast_2d(np.asarray(distance_m, dtype=float)), np.atleast_2d(np.asarray(correct))
    count, k = distance.shape
    if not (len(queries) == len(retrieved) == count and correct.shape == distance.shape):
        raise ValueError(
            f"queries, retrieved, distance_m and correct must agree, got {len(queries)} queries, "
            f"{len(retrieved)} rows of retrieved, {distance.shape} and {correct.shape}"
        )
    ranks = np.broadcast_to(np.arange(1, k + 1), distance.shape) if ranks is None else np.atleast_2d(ranks)
    columns = 1 + k + (truth is not None)
    height = tile * max(_aspect(query) for query in queries) + 0.3
    figure, axes = _panels(count, columns, size=(tile * columns, height * count + (0.5 if title else 0.1)))
    for q in range(count):
        caption = "query" if query_captions is None else query_captions[q]
        _photograph(axes[q, 0], queries[q], caption, colour=BLACK)
        for j in range(k):
            axis = axes[q, 1 + j]
            if j >= len(retrieved[q]):
                axis.set_visible(False)
                continue
            mark = "✓" if correct[q, j] else "✗"
            _photograph(
                axis,
                retrieved[q][j],
                f"#{ranks[q, j]} {mark}  {_metres(distance[q, j])}",
                bool(correct[q, j]),
            )
        if truth is not None:
            if truth[q] is None:
                axes[q, -1].set_axis_off()
                axes[q, -1].text(0.5, 0.5, "no true\nreference", ha="center", va="center", color=GREY)
            else:
                _photograph(axes[q, -1], truth[q], "a true reference", colour=GREEN)
    if title:
        figure.suptitle(title)
    return figure


@_styled
def nearest_map(
    east_m,
    north_m,
    found,
    *,
    similarity=None,
    descriptor_distance=None,
    query_east_m: float | None = None,
    query_north_m: float | None = None,
    radius_m: float | None = 25.0,
    names: Sequence[str] | None = None,
    title: str = "Where the nearest photographs were taken",
) -> Figure:
    """Draw the references that were found for one photograph on the map of all of them.

    Parameters
    ----------
    east_m, north_m : array (n,)
        All references.
    found : array (k,) of int
        The found ones, nearest first.
    similarity, descriptor_distance : array (k,), optional
        Cosine, or L2 between descriptors; written beside each.
    query_east_m, query_north_m : float, optional
        The query's own position, where it is known, with a circle of `radius_m`.
    names : sequence of k str, optional
        Written beside each.
    """
    east, north = _positions(east_m, north_m)
    found = np.asarray(found, dtype=int)
    figure, axes = _panels(size=(8.6, 5.2))
    axis = axes[0, 0]
    known = query_east_m is not None and query_north_m is not None
    frame_east = np.append(east, query_east_m) if known else east
    frame_north = np.append(north, query_north_m) if known else north
    x0, y0 = _local_axes(axis, frame_east, frame_north)
    axis.scatter(east - x0, north - y0, s=9, color="#c4c4c4", linewidths=0, label=f"{len(east):,} references")
    x, y = east[found] - x0, north[found] - y0
    axis.scatter(x, y, s=210, color=BLUE, edgecolors="white", linewidths=1.2, zorder=3)
    near = 0.03 * max(np.ptp(frame_east), np.ptp(frame_north), 1.0)
    written = np.zeros(len(found), dtype=bool)
    for rank in range(len(found)):  # discs that would cover each other share their numbers
        here = np.flatnonzero(~written & (np.hypot(x - x[rank], y - y[rank]) < near))
        if written[rank]:
            continue
        written[here] = True
        axis.annotate(
            ",".join(str(r + 1) for r in here),
            (x[rank], y[rank]),
            color="white",
            ha="center",
            va="center",
            fontsize=11 if len(here) == 1 else 8,
            fontweight="bold",
            zorder=4,
        )
    if known:
        qx, qy = query_east_m - x0, query_north_m - y0
        axis.scatter(
            [qx], [qy], marker="*", s=420, color=RED, edgecolors="white", zorder=2.9, label="the query"
        )
        if radius_m is not None:
            turn = np.linspace(0, 2 * np.pi, 200)
            axis.plot(
                qx + radius_m * np.cos(turn),
                qy + radius_m * np.sin(turn),
                color=RED,
                linestyle="--",
                linewidth=1.2,
                label=f"{radius_m:g} m",
            )
    for rank in range(len(found)):
        parts = [f"{rank + 1}"]
        if names is not None:
            parts.append(str(names[rank]))
        if similarity is not None:
            parts.append(f"similarity {float(similarity[rank]):.2f}")
        if descriptor_distance is not None:
            parts.append(f"distance {float(descriptor_distance[rank]):.2f}")
        if known:
            parts.append(_metres(math.hypot(x[rank] - qx, y[rank] - qy)))
        axis.scatter([], [], s=60, color=BLUE, label="  ".join(parts))
    figure.legend(loc="outside right upper")
    axis.set_title(title)
    return figure


@_styled
def review_page(
    query,
    retrieved: Sequence,
    positives: Sequence,
    *,
    retrieved_captions: Sequence[str],
    positive_captions: Sequence[str],
    correct,
    query_caption: str = "query",
    notes: str = "",
    title: str = "Is the ground truth right?",
) -> Figure:
    """Make one page on which a person judges a query: what was retrieved above, what is called true below.

    Parameters
    ----------
    query : image
    retrieved, positives : sequences of images
        Each with a caption in `retrieved_captions` and `positive_captions`; `positives` may be empty.
    correct : array (len(retrieved),) of bool
    notes : str
        Why the query is suspected, as a text at the foot.
    """
    columns = max(len(retrieved), len(positives), 2) + 1
    tile = 1.9
    figure, axes = _panels(2, columns, size=(tile * columns, 2 * (tile * _aspect(query) + 0.65) + 0.9))
    for axis in axes.flat:
        axis.set_axis_off()
    _photograph(axes[0, 0], query, query_caption, colour=BLACK)
    for axis, image, caption, right in zip(axes[0, 1:], retrieved, retrieved_captions, correct, strict=False):
        _photograph(axis, image, caption, bool(right))
    axes[1, 0].text(0.5, 0.5, "the references\ncalled true", ha="center", va="center", fontsize=12)
    for axis, image, caption in zip(axes[1, 1:], positives, positive_captions, strict=False):
        _photograph(axis, image, caption, colour=GREEN)
    if not len(positives):
        axes[1, 1].text(0.5, 0.5, "none within\nthe radius", ha="center", va="center", color=GREY)
    figure.suptitle(title)
    if notes:
        figure.supxlabel(notes, fontsize=11)
    return figure


_REVIEW_STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; color: #1a1a1a; margin: 0 auto; max-width: 1280px; padding: 0 20px 60px; }
header { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #ccc; padding: 10px 0; z-index: 1; }
h1 { font-size: 20px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 18px 0 2px; } p { margin: 2px 0 8px; }
button, .file { font: inherit; padding: 4px 12px; margin-right: 6px; border: 1px solid #777; border-radius: 4px; background: #f4f4f4; cursor: pointer; }
button:focus-visible, input:focus-visible { outline: 3px solid #56B4E9; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
figure { margin: 0; min-width: 0; } figure img { width: 100%; border: 5px solid #1a1a1a; box-sizing: border-box; display: block; }
figure.right img { border-color: #0072B2; } figure.wrong img { border: 5px dashed #D55E00; } figure.truth img { border-color: #009E73; }
figcaption { font-size: 14px; } figcaption small { color: #555; display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
fieldset { border: 1px solid #ccc; margin: 14px 0 0; padding: 8px 14px 12px; } fieldset label { display: block; }
input[type=text] { font: inherit; width: min(640px, 95%); }
@media print { header button, .file { display: none; } header { position: static; } section { display: block !important; break-after: page; } }
"""

_REVIEW_SCRIPT = r"""
const about = ABOUT, cases = CASES, key = 'review ' + about.run;
const pages = [...document.querySelectorAll('section')], $ = id => document.getElementById(id);
let now = 0;
function verdict(page) {
  const chosen = page.querySelector('input[type=radio]:checked');
  return { verdict: chosen ? chosen.value : '',
           same_place: [...page.querySelectorAll('input[type=checkbox]:checked')].map(box => +box.value),
           remark: page.querySelector('input[type=text]').value };
}
function all() { return pages.map((page, i) => ({ ...about, ...cases[i], ...verdict(page) })); }
function fill(rows) {
  for (const row of rows) {
    const i = cases.findIndex(c => c.query === row.query);
    if (i < 0) continue;
    pages[i].querySelectorAll('input[type=radio]').forEach(r => { r.checked = r.value === row.verdict; });
    pages[i].querySelectorAll('input[type=checkbox]').forEach(b => { b.checked = (row.same_place || []).includes(+b.value); });
    pages[i].querySelector('input[type=text]').value = row.remark || '';
  }
}
function keep() {
  try { localStorage.setItem(key, JSON.stringify(all())); } catch (refused) { /* a browser may keep nothing: save a file */ }
  count();
}
function count() {
  $('done').textContent = all().filter(row => row.verdict).length + ' of ' + pages.length + ' judged';
}
function show(i) {
  now = Math.min(Math.max(i, 0), pages.length - 1);
  pages.forEach((page, j) => { page.style.display = j === now ? 'block' : 'none'; });
  $('where').textContent = 'page ' + (now + 1) + ' of ' + pages.length;
  $('back').disabled = now === 0; $('next').disabled = now === pages.length - 1;
}
function save(name, type, text) {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name; link.click(); URL.revokeObjectURL(link.href);
}
function csv(rows) {
  const cell = value => { const text = Array.isArray(value) ? value.join(' ') : value === null ? '' : String(value);
                          return /[",\r\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text; };
  const names = Object.keys(rows[0]);
  return [names, ...rows.map(row => names.map(name => row[name]))].map(line => line.map(cell).join(',')).join('\n') + '\n';
}
if (pages.length) {
  $('back').onclick = () => show(now - 1); $('next').onclick = () => show(now + 1);
  $('csv').onclick = () => save('verdicts.csv', 'text/csv', csv(all()));
  $('json').onclick = () => save('verdicts.json', 'application/json', JSON.stringify(all(), null, 1));
  $('load').onchange = async event => {
    try { fill(JSON.parse(await event.target.files[0].text())); keep(); } catch (error) { alert('this file holds no verdicts: ' + error.message); }
  };
  document.addEventListener('input', keep);
  document.addEventListener('keydown', event => {
    if (event.target.matches('input')) return;
    if (event.key === 'ArrowLeft') show(now - 1);
    if (event.key === 'ArrowRight') show(now + 1);
  });
  try { fill(JSON.parse(localStorage.getItem(key) || '[]')); } catch (unread) { /* nothing was kept */ }
  const asked = cases.findIndex(c => '#query-' + c.query === location.hash);
  show(Math.max(asked, 0)); count();  // and nothing is written: a page that found nothing must not replace what is kept
}
"""

_VERDICTS = {
    "truth wrong": "The ground truth is wrong: a retrieved photograph that counts as wrong shows this place (tick it above).",
    "truth right": "The ground truth is right: the method is wrong.",
    "cannot be judged": "The query cannot be judged: nothing in it tells the place.",
    "unsure": "I cannot tell.",
}


def review_html(
    cases: Sequence[Mapping],
    *,
    about: Mapping[str, str],
    rule: str = "25 m",
    searched: int = 20,
    size_px: int = 220,
) -> str:
    """Make an HTML file with a page for each query, on which a person judges whether the ground truth is right.

    Everything lies in the file: it needs neither kernel nor network. Verdicts are kept by the browser where it allows that, saved as
    CSV or JSON by a button, and loaded again from JSON. Printed, each query starts a sheet.

    Parameters
    ----------
    cases : sequence of mappings
        ``query`` (int, different in each), ``query_path``, ``query_image``, ``note`` (text, may be empty), ``score`` (0 to 1, NaN unknown),
        ``n_positives``; ``found``: mappings of path, image, metres (NaN unknown) and positive, in order of rank; ``truth``: a mapping of
        path, image, metres and rank (0: not among those searched), or None where there is no positive.
    about : mapping of str to str
        ``run``, which keys what the browser keeps, and what else goes into each saved row, such as model, dataset and context.
    rule : str
        When a reference is a positive, in words.
    searched : int
        How many ranks were searched.
    size_px : int
        Longer side of the photographs in the page.

    Returns
    -------
    str

    Raises
    ------
    ValueError
        If two cases have one query, or `about` names no run.
    """
    import html
    import json

    if "run" not in about:
        raise ValueError("about must name the run, got " + ", ".join(about))
    numbers = [int(case["query"]) for case in cases]
    if len(set(numbers)) != len(numbers):
        raise ValueError("two cases have the same query")

    def picture(kind, image, lines, tick=""):
        told = "<br>".join(html.escape(str(line)) for line in lines[:-1])
        name = html.escape(str(lines[-1]).rsplit("/", 1)[-1], quote=True)
        told += f'<small title="{name}">{name}</small>'
        source = f"data:image/jpeg;base64,{_jpeg(image, size_px)}"
        alt = html.escape(str(lines[0]), quote=True)
        return f'<figure class="{kind}"><img src="{source}" alt="{alt}"><figcaption>{told}{tick}</figcaption></figure>'

    sections, data = [], []
    for case, number in zip(cases, numbers, strict=True):
        found, truth, score = case["found"], case["truth"], float(case["score"])
        row = [picture("query", case["query_image"], ["the query", case["note"], case["query_path"]])]
        for rank, one in enumerate(found, 1):
            word = "✓ a positive" if one["positive"] else "✗ no positive"
            tick = f'<label><input type="checkbox" value="{rank}"> the same place</label>'
            lines = [f"#{rank}  {_metres(one['metres'])}", word, one["path"]]
            row.append(picture("right" if one["positive"] else "wrong", one["image"], lines, tick))
        if truth is not None:
            rank = f"ranked {truth['rank']}" if truth["rank"] else f"not among the first {searched}"
            far = ", ".join(filter(None, (_metres(truth["metres"]), rank)))
            lines = ["the nearest positive", far, truth["path"]]
            row.append(picture("truth", truth["image"], lines))
        count = int(case["n_positives"])
        why = (
            f"{count} reference{'s count as positives' if count != 1 else ' counts as a positive'} ({rule})."
        )
        if np.isfinite(score):
            why += f" The first answer is wrong and more alike than {100 * score:.0f} % of the right first answers are."
        choices = "".join(
            f'<label><input type="radio" name="verdict-{number}" value="{value}"> {html.escape(text)}</label>'
            for value, text in _VERDICTS.items()
        )
        sections.append(
            f'<section id="query-{number}"><h2>Query {number}</h2><p>{html.escape(why)}</p><div class="row">{"".join(row)}</div>'
            f"<fieldset><legend>Verdict</legend>{choices}<label>Remark <br>"
            f'<input type="text" name="remark-{number}"></label></fieldset></section>'
        )
        first = found[0] if found else {"path": "", "metres": np.nan}
        data.append(
            {
                "query": number,
                "query_path": str(case["query_path"]),
                "first_reference_path": str(first["path"]),
                "first_reference_m": _known(first["metres"]),
                "nearest_positive_path": "" if truth is None else str(truth["path"]),
                "nearest_positive_m": None if truth is None else _known(truth["metres"]),
                "score": _known(score),
            }
        )
    facts = ", ".join(f"{name} {value}" for name, value in about.items())
    script = _REVIEW_SCRIPT.replace("ABOUT", _in_script(json.dumps(dict(about))), 1)
    script = script.replace("CASES", _in_script(json.dumps(data)), 1)
    empty = "" if sections else "<p>No first answer was wrong: there is nothing to review.</p>"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Is the ground truth right?</title>'
        f"<style>{_REVIEW_STYLE}</style></head>\n<body><header><h1>Is the ground truth right?</h1>"
        f"<p>{html.escape(facts)}. Blue: a positive. Red, dashed: none. Green: the nearest of the positives.</p>"
        '<button id="back">← back</button><button id="next">next →</button><span id="where"></span>, <span id="done"></span> '
        '<button id="csv">save CSV</button><button id="json">save JSON</button>'
        '<label class="file">load JSON <input type="file" id="load" accept=".json"></label></header>\n'
        + empty
        + "\n".join(sections)
        + f"\n<script>{script}</script></body></html>\n"
    )


def _known(value) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None


def _in_script(text: str) -> str:
    """JSON that cannot end the script element it stands in."""
    return text.replace("<", "\\u003c")


def _jpeg(image, size_px: int) -> str:
    """A picture, shrunk to `size_px` on the longer side, as base64 of a JPEG."""
    import base64

    from PIL import Image

    from sagelib.images import load_image

    picture = load_image(image if isinstance(image, Image.Image) else Image.fromarray(_uint8(image)))
    picture.thumbnail((size_px, size_px))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


# --- tables as pictures ----------------------------------------------------------------------------------------


@_styled
def recall_bars(
    sets: Sequence[str],
    methods: Sequence[str],
    recall,
    low=None,
    high=None,
    *,
    published: Mapping[str, Sequence[float]] | None = None,
    k: int = 1,
    title: str | None = None,
    floor: float | None = None,
) -> Figure:
    """Draw recalls with their intervals, a group of bars a set, beside published points.

    Parameters
    ----------
    sets : sequence of S str
        The sets, with their context where it matters ("sped, sorted-2").
    methods : sequence of M str
    recall, low, high : array (M, S)
        Percents and the ends of their 95 % intervals; NaN where a run does not exist ("not run").
    published : mapping of label -> S numbers, optional
        Diamonds; the label says the context they were measured in. NaN where nothing is published.
    floor : float, optional
        Where the axis starts; by default 0, so that bars keep their proportions.
    """
    recall = np.atleast_2d(np.asarray(recall, dtype=float))
    if recall.shape != (len(methods), len(sets)):
        raise ValueError(f"recall must have shape ({len(methods)}, {len(sets)}), got {recall.shape}")
    published = dict(published or {})
    slots = len(methods) + 0.55 * len(published)
    width = 0.84 / slots
    figure, axes = _panels(size=(min(max(7.2, 1.2 + len(sets) * (0.4 + 0.32 * slots)), 14), 5.0))
    axis = axes[0, 0]
    bottom = 0.0 if floor is None else floor
    x = np.arange(len(sets), dtype=float)
    for m, method in enumerate(methods):
        at = x - 0.42 + (m + 0.5) * width
        error = None
        if low is not None and high is not None:
            ends = np.stack([recall[m] - np.atleast_2d(low)[m], np.atleast_2d(high)[m] - recall[m]])
            error = np.nan_to_num(np.maximum(ends, 0))
        axis.bar(
            at,
            np.nan_to_num(recall[m]) - bottom,
            width * 0.92,
            bottom=bottom,
            color=PALETTE[m % len(PALETTE)],
            label=method,
            yerr=error,
            error_kw={"ecolor": BLACK, "elinewidth": 1.3, "capsize": 2.5},
            hatch=("", "//", "..", "xx")[(m // len(PALETTE)) % 4],
        )
        for i in np.flatnonzero(np.isnan(recall[m])):
            axis.text(
                at[i], bottom + 1, "not run", rotation=90, ha="center", va="bottom", color=GREY, fontsize=10
            )
    for j, (label, values) in enumerate(published.items()):
        at = x - 0.42 + (len(methods) + 0.55 * (j + 0.5)) * width
        axis.scatter(
            at,
            np.asarray(values, dtype=float),
            marker=("D", "o", "^", "s")[j % 4],
            s=55,
            facecolors="none",
            edgecolors=BLACK if j % 2 == 0 else "#666666",
            linewidths=1.8,
            zorder=3,
            label=f"published: {label}",
        )
    axis.set_xticks(x, sets, rotation=0 if max(map(len, sets)) < 16 else 20)
    axis.set_ylim(bottom, 101)
    axis.set_ylabel(f"R@{k} (%)")
    axis.grid(axis="x", visible=False)
    handles, labels = axis.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i].startswith("published"))
    figure.legend(
        [handles[i] for i in order], [labels[i] for i in order], loc="outside lower center", ncols=3
    )
    axis.set_title(title or f"Recall at {k}, with 95 % intervals")
    return figure


@_styled
def recall_vs_dim(
    dims: Mapping[str, Sequence[int]],
    recall: Mapping[str, Sequence[float]],
    *,
    intervals: Mapping[str, tuple] | None = None,
    published: Mapping[str, tuple] | None = None,
    k: int = 1,
    title: str = "Recall against the size of the descriptor",
) -> Figure:
    """Draw recall against descriptor dimensions.

    Parameters
    ----------
    dims, recall : mappings of method -> equally many numbers
    intervals : mapping of method -> (low, high), optional
    published : mapping of label -> (dims, recalls), optional
        Open diamonds.
    """
    figure, axes = _panels(size=(7.6, 4.6))
    axis = axes[0, 0]
    for i, name in enumerate(recall):
        _lines(axis, dims[name], {name: recall[name]}, intervals, start=i)
    for j, (label, (x, y)) in enumerate((published or {}).items()):
        _published(axis, x, y, label, j)
    _power_axis(axis, [*dims.values(), *(x for x, _ in (published or {}).values())])
    axis.set_xlabel("dimensions of the descriptor")
    axis.set_ylabel(f"R@{k} (%)")
    axis.set_title(title)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


@_styled
def recall_vs_parameters(
    names: Sequence[str],
    parameters,
    recall,
    low=None,
    high=None,
    *,
    published: Mapping[str, tuple[float, float]] | None = None,
    k: int = 1,
    title: str = "Recall against what is trained",
) -> Figure:
    """Draw each method at its number of trainable parameters.

    Parameters
    ----------
    names : sequence of n str
    parameters : array (n,)
        Numbers of trainable parameters; methods with none stand together on the left, and those with nearly equal numbers side by side.
    recall, low, high : array (n,)
    published : mapping of label -> (parameters, recall), optional
        Open marks: points whose parameter count has a source.

    Raises
    ------
    ValueError
        If there is nothing to draw.
    """
    figure, axes = _panels(size=(7.8, 4.8))
    axis = axes[0, 0]
    parameters, recall = np.asarray(parameters, dtype=float), np.asarray(recall, dtype=float)
    counts = np.concatenate([parameters, [x for x, _ in (published or {}).values()]])
    if not len(counts):
        raise ValueError("there is neither a method nor a published point to draw")
    start = 10.0 ** np.floor(np.log10(counts[counts > 0].min() if (counts > 0).any() else 10.0))
    # Methods that train equally much, or nothing, stand side by side, or their intervals would cover each other.
    order, beside = np.argsort(parameters, kind="stable"), np.zeros(len(parameters))
    new = parameters[order] > 1.08 * np.roll(parameters[order], 1)
    for group in np.split(order, np.flatnonzero(new[1:]) + 1):
        width = 0.12 * np.where(parameters[group] == 0, start, parameters[group])
        beside[group] = width * (np.arange(len(group)) - (len(group) - 1) / 2)
    for i, name in enumerate(names):
        error = None
        if low is not None and high is not None:
            error = np.nan_to_num([[max(recall[i] - low[i], 0)], [max(high[i] - recall[i], 0)]])
        known = "" if np.isfinite(recall[i]) else ", not run"
        axis.errorbar(
            [parameters[i] + beside[i]],
            [recall[i]],
            yerr=error,
            fmt=MARKERS[i % len(MARKERS)],
            markersize=9,
            color=PALETTE[i % len(PALETTE)],
            capsize=3,
            label=f"{name} ({_count(parameters[i])}{known})",
        )
    for j, (label, (x, y)) in enumerate((published or {}).items()):
        _published(axis, [x], [y], f"{label} ({_count(x)})", j)
    end = max(2 * counts.max(), 11 * start)
    decades = start * 10.0 ** np.arange(np.floor(np.log10(end / start)) + 1)
    if (counts == 0).any():
        axis.set_xscale("symlog", linthresh=start, linscale=0.6)
        decades = np.append(0, decades)
    else:
        axis.set_xscale("log")
    axis.set_xticks(decades, [_count(v) for v in decades])
    axis.minorticks_off()
    axis.set_xlim(
        min(2 * beside[parameters == 0].min(initial=0), -0.2 * start) if (counts == 0).any() else start / 1.2,
        end,
    )
    axis.set_xlabel("trainable parameters")
    axis.set_ylabel(f"R@{k} (%)")
    axis.set_title(title)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


@_styled
def graph_cost(
    names: Sequence[str],
    seconds,
    added_pct=None,
    *,
    once=None,
    published=None,
    estimated=None,
    title: str = "What making the graph costs",
) -> Figure:
    """Draw the time of making the graph and, where known, what it adds to an epoch.

    Parameters
    ----------
    names : sequence of n str
        With how often the time is paid, as in "online, each epoch".
    seconds, added_pct : array (n,)
        Seconds of one making, and percents added to the time of an epoch's steps (NaN unknown).
    once : array (n,) of bool, optional
        Paid once and not each epoch, so that nothing is added to an epoch.
    published, estimated : array (n,) of bool, optional
        Hatched: numbers of the paper, on the paper's machine; dotted: reckoned, not measured.
    """
    seconds = np.asarray(seconds, dtype=float)
    share = np.full(len(seconds), np.nan) if added_pct is None else np.asarray(added_pct, dtype=float)
    none = np.zeros(len(seconds), dtype=bool)
    once = none if once is None else np.asarray(once, dtype=bool)
    published = none if published is None else np.asarray(published, dtype=bool)
    estimated = none if estimated is None else np.asarray(estimated, dtype=bool)
    figure, axes = _panels(1, 2, size=(9.6, 1.9 + 0.52 * len(names)), sharey=True, width_ratios=(3, 2))
    y = np.arange(len(names))[::-1]
    looks = {
        "measured here": {"facecolor": BLUE, "edgecolor": BLUE},
        "estimated here": {"facecolor": "white", "edgecolor": BLUE, "hatch": ".."},
        "the paper's": {"facecolor": SKY, "edgecolor": BLACK, "hatch": "//"},
    }
    kinds = np.where(published, "the paper's", np.where(estimated, "estimated here", "measured here"))
    for axis, values, text in (
        (axes[0, 0], seconds, _duration),
        (axes[0, 1], share, lambda v: f"+{v:.1f} %"),
    ):
        for bar, kind in zip(axis.barh(y, np.nan_to_num(values), height=0.62), kinds, strict=True):
            bar.set(**looks[kind])
        for row, value, single in zip(y, values, once, strict=True):
            known = np.isfinite(value)
            axis.annotate(
                text(value) if known else "paid once" if single else "not known",
                (value if known else 0, row),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                color=BLACK if known else GREY,
            )
        axis.grid(axis="y", visible=False)
    if (seconds[np.isfinite(seconds)] > 0).any():
        axes[0, 0].set_xscale("log")
        positive = seconds[seconds > 0]
        axes[0, 0].set_xlim(positive.min() / 3, positive.max() * 12)
        axes[0, 0].xaxis.set_major_formatter(FuncFormatter(_plain))
    top = np.nanmax(share) if np.isfinite(share).any() else 1.0
    axes[0, 1].set_xlim(0, top * 1.5)
    axes[0, 0].set_yticks(y, names)
    axes[0, 0].set_xlabel("time (s)")
    axes[0, 1].set_xlabel("added to an epoch's steps (%)")
    if len(set(kinds)) > 1:
        handles = [Patch(label=kind, **look) for kind, look in looks.items() if kind in kinds]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    figure.suptitle(title)
    return figure


@_styled
def context_audit(audits: Mapping[str, Mapping], *, k: int = 1, title: str | None = None) -> Figure:
    """Draw the recall of one checkpoint against which images shared a batch with each other.

    Parameters
    ----------
    audits : mapping of set -> mapping with
        ``n`` (m,)              batch sizes;
        ``sorted`` (m,)         recall with name-sorted batches (percent);
        ``shuffled`` (m, r)     recall of each of r shuffles;
        ``none``, ``solo``, ``anchors`` : float, optional
            recall with the head off, of batches of one, and with the fixed reference set;
        ``interval`` : float, optional
            half width of a 95 % interval (points), drawn as a bar in the corner;
        ``aligned`` : bool, optional
            whether queries and references sort alike: then sorted batches give away the answer.
    """
    columns = min(len(audits), 3)
    rows = -(-len(audits) // columns)
    figure, axes = _panels(rows, columns, size=(1.2 + 3.2 * columns, 1.0 + 3.6 * rows))
    for axis in axes.flat[len(audits) :]:
        axis.set_visible(False)
    flat = {
        "none": (BLACK, ":", "head off"),
        "solo": (GREEN, "-.", "solo"),
        "anchors": (PURPLE, "--", "anchors"),
    }
    for axis, (name, audit) in zip(axes.flat, audits.items(), strict=False):
        n = np.asarray(audit["n"])
        shuffled = np.atleast_2d(np.asarray(audit["shuffled"], dtype=float))
        axis.plot(n, audit["sorted"], color=RED, marker="s", label="sorted, as published")
        mean, low, high = _spread(shuffled)
        axis.plot(n, mean, color=BLUE, marker="o", label="shuffled: mean")
        axis.fill_between(
            n,
            low,
            high,
            color=BLUE,
            alpha=0.22,
            linewidth=0,
            label=f"shuffled: all {shuffled.shape[1]}",
        )
        for key, (colour, dash, label) in flat.items():
            if audit.get(key) is not None:
                axis.axhline(float(audit[key]), color=colour, linestyle=dash, label=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(n, [str(v) for v in n])
        axis.margins(y=0.12)
        if audit.get("interval") is not None:
            half, (low, high) = float(audit["interval"]), axis.get_ylim()
            at, centre = n[0] / 1.7, (low + high) / 2
            axis.errorbar(
                [at], [centre], yerr=[[half], [half]], fmt="none", ecolor=GREY, elinewidth=2, capsize=4
            )
            axis.annotate(
                "95 %",
                (at, centre + half),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                color="#666666",
                fontsize=10,
            )
        kind = {True: "\nqueries and references sort alike", False: "\nsorted differently"}.get(
            audit.get("aligned"), ""
        )
        axis.set_title(f"{name}{kind}", fontsize=12)
        axis.set_xlabel("images in a batch")
    for row in axes:
        row[0].set_ylabel(f"R@{k} (%)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.suptitle(title or "The same checkpoint, other company in the batch")
    return figure


@_styled
def ablation_figure(
    names: Sequence[str],
    recall,
    difference,
    low,
    high,
    *,
    reference: int = 0,
    plateau=None,
    smallest_visible: float | None = None,
    published=None,
    k: int = 1,
    title: str = "What each part is worth",
) -> Figure:
    """Draw an ablation: every seed's recall, and the paired difference against the full method.

    Parameters
    ----------
    names : sequence of C str
    recall : array (C, S)
        Percents of C configurations and S seeds; NaN where a run does not exist.
    difference, low, high : array (C,)
        Points against configuration `reference`, and the ends of the paired 95 % interval; NaN for itself.
    plateau : array (C, S) of bool, optional
        Runs that ended on the loss's plateau: drawn as crosses; the caller leaves them out of the differences.
    smallest_visible : float, optional
        Smallest difference (points) that the set could show, drawn as a band around zero.
    published : array (C,), optional
        Another's recalls of the same configurations, on another set and scale: open diamonds.
    """
    recall = np.atleast_2d(np.asarray(recall, dtype=float))
    plateau = np.zeros(recall.shape, dtype=bool) if plateau is None else np.asarray(plateau, dtype=bool)
    if recall.shape[0] != len(names):
        raise ValueError(f"recall must have a row for each of the {len(names)} names, got {recall.shape[0]}")
    difference, low, high = (np.asarray(v, dtype=float) for v in (difference, low, high))
    figure, axes = _panels(1, 2, size=(9.6, 2.3 + 0.5 * len(names)), sharey=True)
    y = np.arange(len(names))[::-1]
    left, right = axes[0]
    for c, row in enumerate(y):
        sound = recall[c][~plateau[c] & np.isfinite(recall[c])]
        stuck = recall[c][plateau[c] & np.isfinite(recall[c])]
        left.scatter(sound, np.full(len(sound), row), s=32, color=SKY, zorder=2)
        left.scatter(stuck, np.full(len(stuck), row), s=45, color=RED, marker="x", zorder=2)
        if len(sound):
            left.errorbar(
                [sound.mean()],
                [row],
                xerr=[[sound.std(ddof=1) if len(sound) > 1 else 0]] * 2,
                fmt="|",
                markersize=18,
                markeredgewidth=2.5,
                color=BLUE,
                capsize=4,
                zorder=3,
            )
        elif not len(stuck):
            left.text(
                0.97,
                row,
                "not run",
                transform=left.get_yaxis_transform(),
                ha="right",
                va="center",
                color=GREY,
            )
        if c == reference:
            right.text(0, row, "  the full method", va="center", color="#555555")
        elif np.isfinite(difference[c]):
            clear = low[c] > 0 or high[c] < 0
            right.errorbar(
                [difference[c]],
                [row],
                xerr=[[difference[c] - low[c]], [high[c] - difference[c]]],
                fmt="o",
                markersize=8,
                color=BLUE,
                markerfacecolor=BLUE if clear else "white",
                markeredgewidth=2,
                capsize=4,
            )
    if published is not None:
        left.scatter(
            np.asarray(published, dtype=float),
            y,
            marker="D",
            s=50,
            facecolors="none",
            edgecolors=BLACK,
            linewidths=1.6,
        )
    right.axvline(0, color=BLACK, linewidth=1.2)
    if smallest_visible is not None:
        right.axvspan(-smallest_visible, smallest_visible, color="#e9e9e9", zorder=0)
    left.set_yticks(y, names)
    left.set_ylim(-0.6, len(names) - 0.4)
    left.set_xlabel(f"R@{k} (%)")
    right.set_xlabel(f"difference in R@{k} (points), paired 95 %")
    handles = [
        Line2D([], [], marker="o", color=SKY, linestyle="", label="a seed"),
        Line2D(
            [], [], marker="|", color=BLUE, linestyle="-", markersize=13, label="mean, standard deviation"
        ),
        Line2D([], [], marker="o", color=BLUE, linestyle="", label="interval without zero"),
        Line2D(
            [],
            [],
            marker="o",
            color=BLUE,
            markerfacecolor="white",
            markeredgewidth=2,
            linestyle="",
            label="interval with zero",
        ),
    ]
    if plateau.any():
        handles.insert(1, Line2D([], [], marker="x", color=RED, linestyle="", label="ended on the plateau"))
    if published is not None:
        handles.append(
            Line2D(
                [],
                [],
                marker="D",
                color=BLACK,
                markerfacecolor="none",
                linestyle="",
                label="published, other set",
            )
        )
    if smallest_visible is not None:
        handles.append(Patch(color="#e0e0e0", label="smaller than the set can show"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    figure.suptitle(title)
    return figure


# --- graph and sampler -----------------------------------------------------------------------------------------


@_styled
def graph_map(
    east_m,
    north_m,
    edges,
    weight,
    *,
    cliques: Sequence[Sequence[int]] = (),
    radius_m: float | None = None,
    node_labels: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw a geo-visual graph on its map: edges by their affinity W, places (cliques) by colour and marker.

    Parameters
    ----------
    east_m, north_m : array (n,)
    edges : array (E, 2) of int
    weight : array (E,)
        W = -(d_geo d_vis), in metres; near 0 is close in both.
    cliques : sequence of sequences of int
        Node indices of each chosen place.
    radius_m : float, optional
        Drawn as a scale bar.
    """
    east, north = _positions(east_m, north_m)
    edges, weight = np.asarray(edges, dtype=int).reshape(-1, 2), np.asarray(weight, dtype=float)
    if len(edges) != len(weight):
        raise ValueError(f"weight must have one value an edge: got {len(weight)} for {len(edges)} edges")
    figure, axes = _panels(size=(8.2, 5.4))
    axis = axes[0, 0]
    _graph(figure, axis, east, north, edges, weight, cliques, node_labels)
    if radius_m is not None:
        _scale_bar(axis, radius_m)
    stated = f"{len(east):,} images, {len(edges):,} edges"
    if len(cliques):
        stated += f", {len(cliques)} places of {min(map(len, cliques))}" + (
            f"-{max(map(len, cliques))}" if len({len(c) for c in cliques}) > 1 else ""
        )
    axis.set_title(f"{title}\n{stated}" if title else stated, fontsize=12)
    return figure


@_styled
def graph_histograms(degree, clique_size, weight, *, title: str | None = None) -> Figure:
    """Draw a graph's statistics: neighbours an image has, sizes of its cliques, affinities of its edges."""
    figure, axes = _panels(1, 3, size=(10.2, 3.5))
    for axis, values, label, unit in (
        (axes[0, 0], degree, "neighbours of an image", "images"),
        (axes[0, 1], clique_size, "images in a clique", "cliques"),
    ):
        values = np.asarray(values, dtype=int)
        if len(values):
            step = max(math.ceil((values.max() - values.min() + 1) / 30), 1)
            edges = np.arange(values.min(), values.max() + step + 1, step) - 0.5
            axis.hist(values, bins=edges, color=BLUE, rwidth=0.92)
        axis.set_xlabel(label)
        axis.set_ylabel(unit)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    weight = np.asarray(weight, dtype=float)
    if len(weight):
        axes[0, 2].hist(weight, bins=40, color=GREEN)
    axes[0, 2].set_xlabel("W = -(d_geo · d_vis)  (m)")
    axes[0, 2].set_ylabel("edges")
    for axis in axes[0]:
        axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    if title:
        figure.suptitle(title)
    return figure


@_styled
def pair_matrices(d_geo_m, d_vis, weight, kept, *, title: str | None = None) -> Figure:
    """Draw the distances between all pairs of a few nodes, their affinity, and which pairs stay edges.

    Parameters
    ----------
    d_geo_m, d_vis, weight : array (n, n)
        Metres, L2 between descriptors, and their negated product.
    kept : array (n, n) of bool
        The pairs that stay edges; the others are left blank in the third panel.
    """
    kept = np.asarray(kept, dtype=bool)
    shown = np.where(kept, np.asarray(weight, dtype=float), np.nan)
    figure, axes = _panels(1, 3, size=(10.6, 3.7))
    for axis, values, colours, label in (
        (axes[0, 0], d_geo_m, "cividis_r", "d_geo (m)"),
        (axes[0, 1], d_vis, "cividis_r", "d_vis (L2)"),
        (axes[0, 2], shown, AFFINITY, "W of the edges that stay (m)"),
    ):
        values = np.asarray(values, dtype=float)
        picture = axis.imshow(values, cmap=colours)
        axis.grid(False)
        ticks = np.arange(len(values))
        axis.set_xticks(ticks, ticks + 0, fontsize=9)
        axis.set_yticks(ticks, ticks + 0, fontsize=9)
        axis.set_title(label)
        axis.set_xlabel("node")
        figure.colorbar(picture, ax=axis, shrink=0.75)
    axes[0, 0].set_ylabel("node")
    if title:
        figure.suptitle(title)
    return figure


@_styled
def greedy_steps(
    east_m,
    north_m,
    edges,
    weight,
    chosen: Sequence[Sequence[int]],
    scores,
    *,
    titles: Sequence[str] | None = None,
    title: str = "Greedy weighted sampling, step by step",
) -> Figure:
    """Draw each step of the greedy choice on a toy map.

    Parameters
    ----------
    east_m, north_m : array (n,)
    edges, weight : arrays (E, 2) and (E,)
    chosen : sequence of T sequences of int
        The clique after each step; the last node of each is the newest.
    scores : array (T, n)
        What each step compared: S(i) in the first, the mean affinity to the clique in the next; NaN for a node that
        was no candidate.
    """
    east, north = _positions(east_m, north_m)
    edges, weight = np.asarray(edges, dtype=int).reshape(-1, 2), np.asarray(weight, dtype=float)
    scores = np.asarray(scores, dtype=float)
    if scores.shape != (len(chosen), len(east)):
        raise ValueError(f"scores must have shape ({len(chosen)}, {len(east)}), got {scores.shape}")
    x0, y0 = _origin(east), _origin(north)
    east, north = east - x0, north - y0
    columns = min(len(chosen), 2 if len(chosen) in (2, 4) else 3)
    rows = -(-len(chosen) // columns)
    figure, axes = _panels(
        rows, columns, size=(3.7 * columns + 1.2, 3.1 * rows + 0.8), sharex=True, sharey=True
    )
    finite = scores[np.isfinite(scores)]
    norm = Normalize(finite.min(), finite.max()) if len(finite) else Normalize(-1, 0)
    spread = max(np.ptp(east), np.ptp(north), 1.0)
    for axis in axes.flat[len(chosen) :]:
        axis.set_visible(False)
    picture = None
    for t, (axis, clique) in enumerate(zip(axes.flat, chosen, strict=False)):
        clique = list(clique)
        ends = np.stack([east[edges], north[edges]], axis=-1)
        inside = np.isin(edges, clique).all(axis=1)
        axis.add_collection(LineCollection(ends[~inside], colors="#d4d4d4", linewidths=1, zorder=1))
        axis.add_collection(LineCollection(ends[inside], colors=RED, linewidths=3, zorder=2))
        candidate = np.isfinite(scores[t])
        axis.scatter(
            east[~candidate], north[~candidate], s=85, color="#e2e2e2", edgecolors="#b0b0b0", zorder=3
        )
        picture = axis.scatter(
            east[candidate],
            north[candidate],
            s=150,
            c=scores[t][candidate],
            cmap=AFFINITY,
            norm=norm,
            edgecolors="#444444",
            linewidths=0.8,
            zorder=4,
        )
        axis.scatter(
            east[clique], north[clique], s=230, facecolors="none", edgecolors=RED, linewidths=2.6, zorder=5
        )
        newest = clique[-1:]
        axis.scatter(
            east[newest],
            north[newest],
            s=60,
            marker="*",
            color="white",
            edgecolors=RED,
            linewidths=1,
            zorder=6,
        )
        for i in np.flatnonzero(candidate):
            text = axis.annotate(
                f"{scores[t][i]:.1f}",
                (east[i], north[i]),
                xytext=(0, 10),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                zorder=7,
            )
            text.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])
        axis.set_aspect("equal")
        axis.set_xlim(east.min() - 0.12 * spread, east.max() + 0.12 * spread)
        axis.set_ylim(north.min() - 0.15 * spread, north.max() + 0.15 * spread)
        axis.set_title(titles[t] if titles else f"step {t + 1}: node {newest[0]} joins", fontsize=12)
    for axis in axes[-1]:
        axis.set_xlabel(_axis_name("east", x0))
    for row in axes:
        row[0].set_ylabel(_axis_name("north", y0))
    if picture is not None:
        figure.colorbar(picture, ax=axes, label="what is compared: mean W (m)", shrink=0.8)
    figure.suptitle(title)
    return figure


@_styled
def sampler_comparison(samplers: Mapping[str, Mapping], *, title: str = "What the samplers draw") -> Figure:
    """Compare samplers by how hard their batches are.

    Parameters
    ----------
    samplers : mapping of name -> mapping with arrays of any length
        ``hardest_negative``: each image's highest cosine with another place of its batch;
        ``positive_distance_m`` and ``positive_similarity``: every pair of a place.
    """
    figure, axes = _panels(1, 3, size=(10.2, 1.9 + 0.55 * len(samplers)), sharey=True)
    columns = (
        ("hardest_negative", "similarity of the\nhardest negative (cosine)"),
        ("positive_similarity", "similarity of positives\n(cosine)"),
        ("positive_distance_m", "distance of positives\n(m)"),
    )
    y = np.arange(len(samplers))[::-1]
    for axis, (key, label) in zip(axes[0], columns, strict=True):
        for i, (row, sampler) in enumerate(zip(y, samplers.values(), strict=True)):
            values = np.asarray(sampler[key], dtype=float)
            values = values[np.isfinite(values)]
            if not len(values):
                axis.text(0.03, row, "none", transform=axis.get_yaxis_transform(), va="center", color=GREY)
                continue
            low, first, middle, third, high = np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
            colour = PALETTE[i % len(PALETTE)]
            axis.plot([low, high], [row, row], color=colour, linewidth=1.6)
            axis.plot(
                [first, third], [row, row], color=colour, linewidth=11, solid_capstyle="butt", alpha=0.55
            )
            axis.plot([middle], [row], marker="|", markersize=19, markeredgewidth=3, color=BLACK)
            axis.annotate(
                f"{middle:.2f}" if key != "positive_distance_m" else f"{middle:.1f}",
                (middle, row),
                xytext=(0, 12),
                textcoords="offset points",
                ha="center",
                fontsize=10,
            )
        axis.set_xlabel(label)
        axis.margins(x=0.08)
        axis.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(y, list(samplers))
    axes[0, 0].set_ylim(-0.6, len(samplers) - 0.3)
    figure.suptitle(f"{title} (line: 5-95 %, bar: middle half, mark: median)", fontsize=13)
    return figure


@_styled
def graph_change(
    epoch, gained, lost, kept, *, title: str = "What an epoch of training changes in the graph"
) -> Figure:
    """Draw the edges gained, lost and kept at each refresh against the one before it.

    Parameters
    ----------
    epoch : array (n,)
    gained, lost, kept : array (n,) of int
        Numbers of edges; the first refresh has nothing before it and is best left out.
    """
    epoch = np.asarray(epoch)
    gained, lost, kept = (np.asarray(v, dtype=float) for v in (gained, lost, kept))
    figure, axes = _panels(1, 2, size=(9.6, 3.9))
    axes[0, 0].bar(epoch, kept, color="#c9c9c9", label="kept")
    axes[0, 0].bar(epoch, gained, bottom=kept, color=BLUE, label="gained")
    axes[0, 0].bar(epoch, -lost, color=RED, hatch="//", edgecolor="white", label="lost")
    axes[0, 0].axhline(0, color=BLACK, linewidth=1)
    axes[0, 0].set_ylabel("edges")
    axes[0, 0].yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{abs(v):,.0f}"))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    union = gained + lost + kept
    axes[0, 1].plot(epoch, 100 * (gained + lost) / np.where(union > 0, union, np.nan), color=BLUE, marker="o")
    axes[0, 1].set_ylabel("edges that differ (% of either)")
    axes[0, 1].set_ylim(bottom=0)
    for axis in axes[0]:
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title)
    return figure


# --- training --------------------------------------------------------------------------------------------------


@_styled
def loss_curve(
    step,
    loss: Mapping[str, Sequence[float]] | Sequence[float],
    *,
    plateau: float | None = None,
    epoch_steps: Sequence[int] = (),
    title: str = "Training loss",
) -> Figure:
    """Draw the loss of every step, its running mean, and the plateau that it has to leave.

    Parameters
    ----------
    step : array (n,), or a mapping of run -> its own steps
    loss : array (n,), or a mapping of run -> array
    plateau : float, optional
        The loss of a batch whose similarities are all equal to the base, log K + log(P K - K + 1) / beta for the
        multi-similarity loss: a trivial resting place.
    epoch_steps : sequence of int
        Steps at which an epoch begins, drawn as thin lines.
    """
    losses = loss if isinstance(loss, Mapping) else {"loss": loss}
    steps = step if isinstance(step, Mapping) else dict.fromkeys(losses, step)
    figure, axes = _panels(size=(7.6, 4.4))
    axis = axes[0, 0]
    for i, (name, values) in enumerate(losses.items()):
        x, values = np.asarray(steps[name], dtype=float), np.asarray(values, dtype=float)
        colour = PALETTE[i % len(PALETTE)]
        axis.plot(x, values, color=colour, alpha=0.28, linewidth=1)
        axis.plot(x, _running_mean(values, max(len(values) // 25, 1)), color=colour, label=name)
    if plateau is not None:
        axis.axhline(plateau, color=BLACK, linestyle="--", linewidth=1.6, label=f"plateau: {plateau:.3f}")
    for at in epoch_steps:
        axis.axvline(at, color="#d9d9d9", linewidth=1, zorder=0)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.set_title(title)
    if plateau is not None or len(losses) > 1:
        axis.legend()
    return figure


@_styled
def training_rates(
    step, images_per_s, live_pairs_pct, learning_rate=None, *, title: str = "How training went"
) -> Figure:
    """Draw throughput, the share of pairs that still give a gradient and, if given, the learning rate.

    Parameters
    ----------
    step : array (n,)
    images_per_s, live_pairs_pct, learning_rate : array (n,)
    """
    rows = [("images a second", images_per_s, BLUE), ("pairs with a\ngradient (%)", live_pairs_pct, RED)]
    if learning_rate is not None:
        rows.append(("learning rate", learning_rate, GREEN))
    figure, axes = _panels(len(rows), 1, size=(7.6, 0.9 + 1.9 * len(rows)), sharex=True)
    for axis, (label, values, colour) in zip(axes[:, 0], rows, strict=True):
        axis.plot(step, np.asarray(values, dtype=float), color=colour)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_locator(MaxNLocator(4))
    axes[-1, 0].set_xlabel("step")
    figure.suptitle(title)
    return figure


@_styled
def recall_per_epoch(
    epoch,
    recall: Mapping[str, Sequence[float]],
    *,
    intervals: Mapping[str, tuple] | None = None,
    start: Mapping[str, float] | None = None,
    best: int | None = None,
    title: str = "Validation recall",
) -> Figure:
    """Draw validation recall after each epoch.

    Parameters
    ----------
    epoch : array (n,)
    recall : mapping of line ("R@1", "R@5", ...) -> array (n,), in percent
    intervals : mapping of line -> (low, high), optional
    start : mapping of label -> recall, optional
        Horizontal lines, for instance the frozen backbone's.
    best : int, optional
        Epoch whose checkpoint was kept, marked.
    """
    figure, axes = _panels(size=(7.6, 4.4))
    axis = axes[0, 0]
    _lines(axis, epoch, recall, intervals)
    for i, (label, value) in enumerate((start or {}).items()):
        axis.axhline(value, color=BLACK, linestyle=("--", ":", "-.")[i % 3], linewidth=1.5, label=label)
    if best is not None:
        axis.axvline(best, color=ORANGE, linewidth=6, alpha=0.35, zorder=0, label=f"best: epoch {best}")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("epoch")
    axis.set_ylabel("recall (%)")
    axis.set_title(title)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


# --- descriptors and heatmaps ----------------------------------------------------------------------------------


@_styled
def tsne_figure(
    coordinates: Mapping[str, np.ndarray],
    place,
    *,
    aid: Mapping[str, tuple[float, float, float]] | None = None,
    class_aid: Mapping[str, Mapping[int, float]] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw several methods' t-SNE maps of the same images side by side (the printed sister of `tsne_plotly`).

    Parameters
    ----------
    coordinates : mapping of method -> array (n, 2)
    place : array (n,)
        Class of each image; colour and marker.
    aid : mapping of method -> (value, low, high), optional
        Average intra-class distance, in the panel's title.
    class_aid : mapping of method -> mapping of class -> value, optional
        Each class's own, written beside its most central image, to which thin lines join the others.
    """
    place = np.asarray(place)
    columns = min(len(coordinates), 4)
    rows = -(-len(coordinates) // columns)
    figure, axes = _panels(rows, columns, size=(2.65 * columns, 3.05 * rows + 0.4))
    for axis in axes.flat[len(coordinates) :]:
        axis.set_visible(False)
    for axis, (name, points) in zip(axes.flat, coordinates.items(), strict=False):
        points = np.asarray(points)
        for i, label in enumerate(np.unique(place)):
            at = place == label
            colour, marker = _place_mark(i)
            hub = _medoid(points[at])
            spokes = LineCollection(
                [(hub, point) for point in points[at]], colors=colour, alpha=0.35, linewidths=1
            )
            axis.add_collection(spokes)
            axis.scatter(*points[at].T, s=34, color=colour, marker=marker, edgecolors="white", linewidths=0.4)
            if class_aid is not None and label in class_aid.get(name, {}):
                text = axis.annotate(
                    f"{class_aid[name][label]:.2f}",
                    hub,
                    xytext=(5, 5),
                    textcoords="offset points",
                    fontsize=9,
                    color=colour,
                )
                text.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])
        value = (
            f"\nAID {aid[name][0]:.3f} [{aid[name][1]:.3f}, {aid[name][2]:.3f}]"
            if aid and name in aid
            else ""
        )
        axis.set_title(f"{name}{value}", fontsize=12)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.grid(False)
        axis.spines[["top", "right"]].set_visible(True)
    figure.suptitle(title or "t-SNE of the same images; numbers: distance within the class")
    return figure


def tsne_plotly(
    coordinates: Mapping[str, np.ndarray],
    place,
    *,
    files: Sequence[str],
    aid: Mapping[str, tuple[float, float, float]] | None = None,
    class_aid: Mapping[str, Mapping[int, float]] | None = None,
    title: str | None = None,
):
    """Draw several methods' t-SNE maps side by side, to be hovered over.

    Every point names its file, place and method; its ``customdata`` is (image index, file, place), from which a
    widget shows the photograph (`workbench.widgets.tsne_browser`) or a stand-alone page does (`thumbnail_page`).

    Parameters
    ----------
    coordinates : mapping of method -> array (n, 2)
    place : array (n,)
    files : sequence of n str
    aid, class_aid
        As in `tsne_figure`.

    Returns
    -------
    plotly.graph_objects.Figure
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    place = np.asarray(place)
    if len(files) != len(place):
        raise ValueError(f"files must be one an image: got {len(files)} for {len(place)} images")
    columns = min(len(coordinates), 2)  # as wide as a notebook's cell
    rows = -(-len(coordinates) // columns)
    titles = []
    for name in coordinates:
        value = (
            f"<br>AID {aid[name][0]:.3f} [{aid[name][1]:.3f}, {aid[name][2]:.3f}]"
            if aid and name in aid
            else ""
        )
        titles.append(f"<b>{name}</b>{value}")
    figure = make_subplots(
        rows, columns, subplot_titles=titles, horizontal_spacing=0.02, vertical_spacing=0.12
    )
    classes = np.unique(place)
    for m, (name, points) in enumerate(coordinates.items()):
        points = np.asarray(points)
        row, column = m // columns + 1, m % columns + 1
        for i, label in enumerate(classes):
            at = np.flatnonzero(place == label)
            colour, marker = _place_mark(i)
            hub = _medoid(points[at])
            figure.add_trace(
                go.Scatter(
                    x=points[at, 0],
                    y=points[at, 1],
                    mode="markers",
                    marker={
                        "color": colour,
                        "symbol": _PLOTLY_MARKERS[marker],
                        "size": 9,
                        "line": {"color": "white", "width": 0.7},
                    },
                    customdata=[[int(j), str(files[j]), str(label)] for j in at],
                    hovertemplate=f"place %{{customdata[2]}}<br>%{{customdata[1]}}<extra>{name}</extra>",
                    name=f"place {label}",
                    showlegend=False,
                ),
                row,
                column,
            )
            if class_aid is not None and label in class_aid.get(name, {}):
                figure.add_annotation(
                    x=hub[0],
                    y=hub[1],
                    text=f"{class_aid[name][label]:.2f}",
                    showarrow=False,
                    xshift=16,
                    yshift=10,
                    font={"size": 11, "color": colour},
                    bgcolor="rgba(255,255,255,0.7)",
                    row=row,
                    col=column,
                )
    figure.update_xaxes(
        showticklabels=False, showgrid=False, zeroline=False, mirror=True, linecolor="#999999"
    )
    figure.update_yaxes(
        showticklabels=False, showgrid=False, zeroline=False, mirror=True, linecolor="#999999"
    )
    figure.update_layout(
        template="plotly_white",
        width=max(300 * columns, 420),
        height=340 * rows + 70,
        margin={"l": 15, "r": 15, "t": 105 if title else 70, "b": 15},
        title=None if title is None else {"text": title, "y": 0.98, "yanchor": "top"},
        font={"size": 13},
        hoverlabel={"font": {"size": 13}},
    )
    return figure


def thumbnail_page(figure, images: Sequence, *, size_px: int = 160) -> str:
    """Turn a plotly figure into one HTML page on which a hovered point shows its photograph, without a kernel.

    Parameters
    ----------
    figure : plotly figure
        With an image index first in each point's ``customdata``, as `tsne_plotly` makes it.
    images : sequence of images
        Shrunk to `size_px` on the longer side and written into the page, so keep them few (hundreds).

    Returns
    -------
    str
        HTML with plotly.js in it (some 5 MB), which needs no network.
    """
    import json

    encoded = [_jpeg(image, size_px) for image in images]
    script = """
const plot = document.getElementById('{plot_id}');
const pictures = PICTURES;
const card = document.createElement('img');
card.style.cssText = 'position:fixed;display:none;pointer-events:none;border:2px solid #333;background:#fff;z-index:9';
document.body.appendChild(card);
plot.on('plotly_hover', function (event) {
  const data = event.points[0].customdata;
  if (!data || pictures[data[0]] === undefined) return;
  card.src = 'data:image/jpeg;base64,' + pictures[data[0]];
  card.style.left = Math.min(event.event.clientX + 18, window.innerWidth - 190) + 'px';
  card.style.top = Math.min(event.event.clientY + 18, window.innerHeight - 190) + 'px';
  card.style.display = 'block';
});
plot.on('plotly_unhover', function () { card.style.display = 'none'; });
""".replace("PICTURES", json.dumps(encoded))
    return figure.to_html(include_plotlyjs=True, post_script=script)


@_styled
def aid_bars(
    names: Sequence[str],
    aid,
    low,
    high,
    *,
    per_class: Sequence[Sequence[float]] | None = None,
    title: str = "Average intra-class distance (lower: a place's images lie closer)",
) -> Figure:
    """Draw each method's average intra-class distance with its interval, and every class's own as a dot.

    Parameters
    ----------
    names : sequence of n str
    aid, low, high : array (n,)
        L2 between unit descriptors, so between 0 and 2 and without a unit.
    per_class : sequence of n arrays, optional
    """
    aid, low, high = (np.asarray(v, dtype=float) for v in (aid, low, high))
    figure, axes = _panels(size=(7.6, 1.7 + 0.55 * len(names)))
    axis = axes[0, 0]
    y = np.arange(len(names))[::-1]
    axis.barh(y, aid, height=0.62, color=[PALETTE[i % len(PALETTE)] for i in range(len(names))], alpha=0.45)
    axis.errorbar(
        aid, y, xerr=[aid - low, high - aid], fmt="o", color=BLACK, capsize=4, markersize=6, zorder=4
    )
    if per_class is not None:
        for row, values in zip(y, per_class, strict=True):
            shift = ((np.arange(len(values)) * 0.618) % 1 - 0.5) * 0.45
            axis.scatter(values, row + shift, s=14, color="#555555", alpha=0.6, linewidths=0, zorder=3)
    axis.set_yticks(y, names)
    axis.set_xlim(left=0)
    axis.set_xlabel("mean L2 distance of two unit descriptors of one place (0-2)")
    axis.grid(axis="y", visible=False)
    axis.set_title(title, fontsize=12)
    return figure


@_styled
def heatmap_overlay(
    images: Sequence,
    maps: Sequence,
    *,
    captions: Sequence[str] | None = None,
    label: str = "weight of the patch",
    scale: str | tuple[float, float] = "shared",
    columns: int = 4,
    alpha: float = 0.62,
    smooth: bool = False,
    title: str | None = None,
) -> Figure:
    """Lay a weight per patch over each picture, the picture itself beside it.

    Parameters
    ----------
    images : sequence of n images
    maps : sequence of n arrays (h, w)
        One value a patch.
    captions : sequence of n str, optional
        Numbers under each pair, for instance the entropy and the share of mass on the sky.
    scale : {"shared", "own"} or (low, high)
        One colour scale for all pictures, from the least to the greatest weight or between two given values, or
        a scale of each picture's own.
    smooth : bool
        Interpolate between the patches for print; off shows what the model has.
    """
    if len(images) != len(maps) or not len(images):
        raise ValueError(f"maps must be one an image, got {len(maps)} for {len(images)} images")
    maps = [np.asarray(m, dtype=float) for m in maps]
    across = min(max(columns // 2, 1), len(images))
    rows = -(-len(images) // across)
    tile = 2.15
    lines = max((c.count("\n") + 1 for c in captions), default=0) if captions is not None else 0
    height = tile * _aspect(images[0]) + 0.22 * lines + 0.12
    figure, axes = _panels(
        rows, 2 * across, size=(2 * across * tile + 1.1, rows * height + (0.5 if title else 0.1))
    )
    low, high = (
        (min(m.min() for m in maps), max(m.max() for m in maps)) if scale in ("shared", "own") else scale
    )
    for axis in axes.flat:
        axis.set_axis_off()
    picture = None
    for i, (image, values) in enumerate(zip(images, maps, strict=True)):
        left, right = axes[i // across, 2 * (i % across) : 2 * (i % across) + 2]
        _photograph(left, image, None if captions is None else captions[i])
        norm = Normalize(values.min(), values.max()) if scale == "own" else Normalize(low, high)
        picture = _overlay(right, image, values, HEAT, norm, alpha, smooth)
    if scale != "own":
        figure.colorbar(picture, ax=axes, label=label, shrink=0.85, alpha=1.0)
    if title:
        figure.suptitle(title)
    return figure


@_styled
def contributions_pair(
    query,
    reference,
    query_maps: Mapping[str, np.ndarray],
    reference_maps: Mapping[str, np.ndarray],
    *,
    captions: Mapping[str, str] | None = None,
    smooth: bool = False,
    title: str | None = None,
) -> Figure:
    """Draw what each patch gives to the matching score, over a query and its true reference, a column a method.

    Parameters
    ----------
    query, reference : images
    query_maps, reference_maps : mapping of method -> array (h, w)
        Contributions to the score; positive speaks for the match, negative against it. Each method has its own
        scale, symmetric around zero, as their scores differ.
    captions : mapping of method -> str, optional
        Numbers above each column, for instance the score.
    """
    names = list(query_maps)
    tile = 1.95
    figure, axes = _panels(
        2,
        1 + len(names),
        size=(tile * (1 + len(names)) + 1.0, 2 * tile * _aspect(query) + (1.4 if title else 0.9)),
    )
    for axis in axes.flat:
        axis.set_axis_off()
    _photograph(axes[0, 0], query)
    _photograph(axes[1, 0], reference)
    axes[0, 0].set_title("query", fontsize=12)
    axes[1, 0].set_title("true reference", fontsize=12)
    picture = None
    for c, name in enumerate(names, start=1):
        pair = [np.asarray(query_maps[name], dtype=float), np.asarray(reference_maps[name], dtype=float)]
        reach = max(np.abs(np.concatenate([m.ravel() for m in pair])).max(), 1e-12)
        for axis, image, values in zip(axes[:, c], (query, reference), pair, strict=True):
            picture = _overlay(axis, image, values / reach, SIGNED, TwoSlopeNorm(0, -1, 1), 0.68, smooth)
        caption = f"\n{captions[name]}" if captions and name in captions else ""
        axes[0, c].set_title(f"{name}{caption}", fontsize=12)
    if picture is not None:
        bar = figure.colorbar(picture, ax=axes, shrink=0.85, ticks=[-1, 0, 1])
        bar.set_ticklabels(["against", "0", "for"])
        bar.set_label("contribution to the score\n(each method's largest: 1)", fontsize=11)
    if title:
        figure.suptitle(title)
    return figure


@_styled
def mass_bars(
    methods: Sequence[str],
    labels: Sequence[str],
    share,
    *,
    area=None,
    spread=None,
    title: str = "Where the weight lies",
) -> Figure:
    """Draw the share of a method's weight on each kind of surface, beside that surface's share of the picture.

    Parameters
    ----------
    share : array (M, L)
        Shares of each method's mass on each label; rows sum to 1.
    area : array (L,), optional
        Share of the picture that each label covers: what a method without preference would give.
    spread : array (M, L), optional
        Half widths of an interval.
    """
    share = np.atleast_2d(np.asarray(share, dtype=float))
    if share.shape != (len(methods), len(labels)):
        raise ValueError(f"share must have shape ({len(methods)}, {len(labels)}), got {share.shape}")
    figure, axes = _panels(size=(max(7.2, 1.8 + 0.95 * len(labels)), 4.4))
    axis = axes[0, 0]
    x, width = np.arange(len(labels)), 0.82 / len(methods)
    for m, method in enumerate(methods):
        axis.bar(
            x - 0.41 + (m + 0.5) * width,
            100 * share[m],
            width * 0.92,
            color=PALETTE[m % len(PALETTE)],
            label=method,
            yerr=None if spread is None else 100 * np.atleast_2d(spread)[m],
            error_kw={"ecolor": BLACK, "elinewidth": 1.2, "capsize": 2},
        )
    if area is not None:
        axis.hlines(
            100 * np.asarray(area),
            x - 0.45,
            x + 0.45,
            color=BLACK,
            linewidth=2.2,
            label="share of the picture",
        )
    axis.set_xticks(x, labels)
    axis.set_ylabel("share of the weight (%)")
    axis.grid(axis="x", visible=False)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axis.set_title(title)
    return figure


@_styled
def patch_match(
    query, reference, patch: tuple[int, int], similarity, *, grid: tuple[int, int], title: str | None = None
) -> Figure:
    """Draw one patch of a picture and how similar every patch of another is to it.

    Parameters
    ----------
    query, reference : images
    patch : (row, column)
        The chosen patch, on `grid` (rows, columns) of the query.
    similarity : array (h, w)
        Cosine with each patch of the reference; the best is framed.
    """
    similarity = np.asarray(similarity, dtype=float)
    row, column = patch
    if not (0 <= row < grid[0] and 0 <= column < grid[1]):
        raise ValueError(f"patch must lie within {grid[0]} x {grid[1]}, got row {row}, column {column}")
    best = np.unravel_index(similarity.argmax(), similarity.shape)
    figure, axes = _panels(1, 2, size=(8.6, 3.9 * _aspect(query) + 0.7))
    _photograph(axes[0, 0], query)
    axes[0, 0].set_title(f"patch ({row}, {column})", fontsize=12)
    _patch_frame(axes[0, 0], query, grid, patch)
    axes[0, 1].set_axis_off()
    low, high = similarity.min(), similarity.max()
    reach = Normalize(low, max(high, low + 1e-9))
    picture = _overlay(axes[0, 1], reference, similarity, HEAT, reach, 0.6, False)
    _patch_frame(axes[0, 1], reference, similarity.shape, best)
    axes[0, 1].set_title(f"best match ({best[0]}, {best[1]}): {similarity[best]:.2f}", fontsize=12)
    figure.colorbar(picture, ax=axes, label="cosine similarity", shrink=0.85)
    if title:
        figure.suptitle(title)
    return figure


@_styled
def number_grids(
    arrays: Mapping[str, np.ndarray],
    *,
    columns: int = 4,
    digits: int = 2,
    signed: bool = False,
    title: str | None = None,
) -> Figure:
    """Write small matrices out as coloured numbers, to follow an equation on a toy.

    Parameters
    ----------
    arrays : mapping of title -> array (rows, columns) or (columns,)
        Each with a colour scale of its own.
    signed : bool
        A diverging scale, white at zero.
    """
    arrays = {name: np.atleast_2d(np.asarray(a, dtype=float)) for name, a in arrays.items()}
    columns = min(columns, len(arrays))
    rows = -(-len(arrays) // columns)
    widest = max(a.shape[1] for a in arrays.values())
    tallest = max(a.shape[0] for a in arrays.values())
    size = (columns * max(0.62 * widest + 0.4, 2.0), rows * (0.46 * tallest + 0.75) + (0.4 if title else 0))
    figure, axes = _panels(rows, columns, size=size)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, (name, values) in zip(axes.flat, arrays.items(), strict=False):
        reach = max(np.nanmax(np.abs(values)), 1e-12)
        if signed:
            colours, norm = matplotlib.colormaps[SIGNED], TwoSlopeNorm(0, -reach, reach)
        else:
            colours = LinearSegmentedColormap.from_list("", ["#ffffff", SKY, BLUE])
            norm = Normalize(np.nanmin(values), max(np.nanmax(values), np.nanmin(values) + 1e-12))
        axis.imshow(values, cmap=colours, norm=norm, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            dark = np.dot(colours(norm(value))[:3], (0.3, 0.59, 0.11)) < 0.5
            axis.text(
                j,
                i,
                f"{value:.{digits}f}",
                ha="center",
                va="center",
                fontsize=10,
                color="white" if dark else BLACK,
            )
        axis.set_title(f"{name}\n{' x '.join(map(str, values.shape))}", fontsize=11)
    if title:
        figure.suptitle(title)
    return figure


# --- maps to hover over ----------------------------------------------------------------------------------------


def places_plotly(
    east_m,
    north_m,
    *,
    hover: Sequence[str] | None = None,
    query_east_m=None,
    query_north_m=None,
    query_hover: Sequence[str] | None = None,
    found=(),
    correct=(),
    chosen: int | None = None,
    title: str | None = None,
):
    """Draw references and queries on a plotly map, one query and what was found for it in front.

    Traces, in this order: references, queries, lines from the query to what was found, what was found, the query.

    Parameters
    ----------
    east_m, north_m : array (n,)
    query_east_m, query_north_m : array (Q,), optional
    found, correct : arrays (k,)
        Indices into the references, and whether each is a positive.
    chosen : int, optional
        Index of the query in front.

    Returns
    -------
    plotly.graph_objects.Figure
    """
    import plotly.graph_objects as go

    east, north = _positions(east_m, north_m)
    queries = np.empty(0) if query_east_m is None else np.asarray(query_east_m, dtype=float)
    query_north = np.empty(0) if query_north_m is None else np.asarray(query_north_m, dtype=float)
    found, correct = np.asarray(found, dtype=int), np.asarray(correct, dtype=bool)
    both_east, both_north = np.concatenate([east, queries]), np.concatenate([north, query_north])
    x0, y0 = _origin(both_east), _origin(both_north)
    at_query = ([queries[chosen] - x0], [query_north[chosen] - y0]) if chosen is not None else ([], [])
    line_x, line_y = [], []
    for j in found:
        if chosen is not None:
            line_x += [at_query[0][0], east[j] - x0, None]
            line_y += [at_query[1][0], north[j] - y0, None]
    figure = go.Figure(
        [
            go.Scatter(
                x=east - x0,
                y=north - y0,
                mode="markers",
                name="references",
                marker={"size": 11, "color": "#c8c8c8"},  # seen around a query at the same spot
                text=None if hover is None else list(map(str, hover)),
                hovertemplate="%{text}<extra>reference</extra>" if hover is not None else None,
            ),
            go.Scatter(
                x=queries - x0,
                y=query_north - y0,
                mode="markers",
                name="queries",
                marker={"size": 5, "color": ORANGE, "symbol": "diamond"},
                text=None if query_hover is None else list(map(str, query_hover)),
                hovertemplate="%{text}<extra>query</extra>" if query_hover is not None else None,
            ),
            go.Scatter(
                x=line_x,
                y=line_y,
                mode="lines",
                name="found",
                showlegend=False,
                hoverinfo="skip",
                line={"color": "#777777", "width": 1, "dash": "dot"},
            ),
            go.Scatter(
                x=east[found] - x0,
                y=north[found] - y0,
                mode="markers+text",
                name="found, by rank",
                marker={
                    "size": 19,
                    "color": [RIGHT if c else WRONG for c in correct] or RIGHT,
                    "symbol": ["circle" if c else "square" for c in correct] or "circle",
                    "line": {"color": "white", "width": 1},
                },
                text=[str(r + 1) for r in range(len(found))],
                textfont={"color": "white", "size": 12},
                hovertemplate="rank %{text}<extra></extra>",
            ),
            go.Scatter(
                x=at_query[0],
                y=at_query[1],
                mode="markers",
                name="this query",
                marker={"size": 16, "color": BLACK, "symbol": "star"},
                hoverinfo="skip",
            ),
        ]
    )
    figure.update_xaxes(title=_axis_name("east", x0), zeroline=False)
    figure.update_yaxes(title=_axis_name("north", y0), zeroline=False, scaleanchor="x", scaleratio=1)
    figure.update_layout(
        template="plotly_white",
        title=title,
        font={"size": 13},
        width=760,
        height=470,
        margin={"l": 60, "r": 20, "t": 50 if title else 20, "b": 55},
        legend={"orientation": "h", "y": 1.08},
    )
    return figure


# --- shared parts ----------------------------------------------------------------------------------------------

_PLOTLY_MARKERS = {
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "D": "diamond",
    "v": "triangle-down",
    "P": "cross",
    "X": "x",
    "*": "star",
    "<": "triangle-left",
    ">": "triangle-right",
}


def _positions(east_m, north_m) -> tuple[np.ndarray, np.ndarray]:
    east, north = np.asarray(east_m, dtype=float), np.asarray(north_m, dtype=float)
    if east.ndim != 1 or east.shape != north.shape:
        raise ValueError(f"east_m and north_m must be two arrays (n,), got {east.shape} and {north.shape}")
    return east, north


def _origin(values: np.ndarray) -> float:
    """A round number below all values: seven digits of UTM on every tick cannot be read."""
    finite = values[np.isfinite(values)]
    if not len(finite) or np.abs(finite).max() < 10_000:
        return 0.0
    return float(np.floor(finite.min() / 100) * 100)


def _axis_name(direction: str, origin: float) -> str:
    return f"{direction} (m)" if origin == 0 else f"{direction} of {origin:,.0f} m (m)"


def _local_axes(axis, east: np.ndarray, north: np.ndarray) -> tuple[float, float]:
    x0, y0 = _origin(east), _origin(north)
    axis.set_aspect("equal", adjustable="datalim" if min(np.ptp(east), np.ptp(north)) == 0 else "box")
    axis.set_xlabel(_axis_name("east", x0))
    axis.set_ylabel(_axis_name("north", y0))
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.yaxis.set_major_locator(MaxNLocator(5))
    return x0, y0


def _uint8(image) -> np.ndarray:
    array = np.asarray(image)
    if array.dtype != np.uint8:
        array = (np.clip(array, 0, 1) * 255).round().astype(np.uint8)
    return array


def _aspect(image) -> float:
    height, width = np.asarray(image).shape[:2]
    return height / width


def _photograph(
    axis, image, caption: str | None = None, right: bool | None = None, *, colour: str | None = None
):
    array = np.asarray(image)
    axis.imshow(array, cmap="gray" if array.ndim == 2 else None, interpolation="antialiased")
    axis.grid(False)
    axis.set_axis_on()
    axis.set_xticks([])
    axis.set_yticks([])
    framed = colour is not None or right is not None
    for spine in axis.spines.values():
        spine.set_visible(framed)
        if framed:
            spine.set_color(colour or (RIGHT if right else WRONG))
            spine.set_linewidth(3.5)
            spine.set_linestyle("-" if right is not False else (0, (3, 1.5)))
    if caption:
        axis.set_xlabel(caption, fontsize=10, labelpad=3)


def _overlay(axis, image, values, colours, norm, alpha, smooth):
    """A patch is drawn over the pixels that it covers, whatever the picture's size."""
    array = np.asarray(image)
    grey = array if array.ndim == 2 else array[..., :3] @ np.array([0.299, 0.587, 0.114])
    axis.imshow(grey, cmap="gray", interpolation="antialiased")
    height, width = array.shape[:2]
    picture = axis.imshow(
        values,
        cmap=colours,
        norm=norm,
        alpha=alpha,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        interpolation="bicubic" if smooth else "nearest",
    )
    axis.set_axis_off()
    return picture


def _patch_frame(axis, image, grid, patch):
    height, width = np.asarray(image).shape[:2]
    step_y, step_x = height / grid[0], width / grid[1]
    corner = (patch[1] * step_x - 0.5, patch[0] * step_y - 0.5)
    for colour, line in (("white", 4.5), (RED, 2.5)):
        axis.add_patch(Rectangle(corner, step_x, step_y, fill=False, edgecolor=colour, linewidth=line))


def _graph(figure, axis, east, north, edges, weight, cliques, node_labels):
    x0, y0 = _local_axes(axis, east, north)
    x, y = east - x0, north - y0
    if len(edges):
        order = np.argsort(weight)  # the strongest edges on top
        lines = LineCollection(
            np.stack([x[edges], y[edges]], axis=-1)[order],
            array=weight[order],
            cmap=AFFINITY,
            linewidths=float(np.clip(400 / len(edges), 0.5, 2.5)),
            alpha=0.85,
            zorder=1,
        )
        axis.add_collection(lines)
        figure.colorbar(lines, cax=axis.inset_axes([1.02, 0, 0.025, 1]), label="W = -(d_geo · d_vis)  (m)")
    axis.scatter(
        x, y, s=float(np.clip(6000 / max(len(x), 1), 6, 60)), color="#666666", linewidths=0, zorder=2
    )
    for i, clique in enumerate(cliques):
        at = np.asarray(clique, dtype=int)
        colour, marker = _place_mark(i)
        axis.scatter(
            x[at], y[at], s=95, color=colour, marker=marker, edgecolors="white", linewidths=1, zorder=3
        )
    if node_labels is not None:
        for i, label in enumerate(node_labels):
            text = axis.annotate(
                label, (x[i], y[i]), xytext=(6, 5), textcoords="offset points", fontsize=10, zorder=4
            )
            text.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground="white")])


def _scale_bar(axis, radius_m: float):
    low_x, high_x = axis.get_xlim()
    low_y, high_y = axis.get_ylim()
    x, y = low_x + 0.04 * (high_x - low_x), low_y - 0.07 * (high_y - low_y)
    axis.plot([x, x + radius_m], [y, y], color=BLACK, linewidth=3, solid_capstyle="butt")
    axis.annotate(
        f"{radius_m:g} m",
        (x + radius_m, y),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=11,
    )


def _spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, least and greatest of each row, NaN left out; NaN for a row of nothing else."""
    known = np.isfinite(values)
    count = known.sum(axis=1)
    mean = np.divide(
        np.where(known, values, 0).sum(axis=1), count, out=np.full(len(values), np.nan), where=count > 0
    )
    low, high = np.where(known, values, np.inf).min(axis=1), np.where(known, values, -np.inf).max(axis=1)
    return mean, np.where(count > 0, low, np.nan), np.where(count > 0, high, np.nan)


def _lines(axis, x, series: Mapping[str, Sequence[float]], intervals=None, start: int = 0):
    for i, (name, values) in enumerate(series.items(), start=start):
        colour = PALETTE[i % len(PALETTE)]
        axis.plot(
            x,
            np.asarray(values, dtype=float),
            color=colour,
            marker=MARKERS[i % len(MARKERS)],
            label=name,
            zorder=3,
        )
        if intervals is not None and name in intervals:
            low, high = intervals[name]
            axis.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)


def _published(axis, x, y, label: str, index: int):
    axis.plot(
        x,
        np.asarray(y, dtype=float),
        color="#555555" if index else BLACK,
        linestyle=(":", "--", "-.")[index % 3] if len(x) > 1 else "",
        linewidth=1.3,
        marker=("D", "o", "^", "s", "v", "P")[index % 6],
        markersize=8,
        markerfacecolor="white",
        markeredgewidth=1.8,
        label=f"published: {label}",
        zorder=2,
    )


def _power_axis(axis, values: Sequence):
    """A logarithmic axis with a tick at the sizes that occur, as many as can be read."""
    axis.set_xscale("log", base=2)
    ticks = np.unique(np.concatenate([np.asarray(v, dtype=float).ravel() for v in values]))
    kept: list[float] = []
    for tick in ticks[::-1]:
        if not kept or kept[-1] / tick > 1.55:
            kept.append(float(tick))
    axis.set_xticks(kept, [f"{tick:,.0f}" for tick in kept], rotation=30)
    axis.minorticks_off()


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` values, of those that there are at the start; NaN is left out."""
    known = np.isfinite(values)
    total = np.cumsum(np.where(known, values, 0.0))
    count = np.cumsum(known)
    total[window:] -= total[:-window].copy()
    count[window:] -= count[:-window].copy()
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _medoid(points: np.ndarray) -> np.ndarray:
    """The point that lies nearest to all others."""
    apart = np.linalg.norm(points[:, None] - points, axis=2)
    return points[apart.sum(axis=1).argmin()]


def _place_mark(index: int) -> tuple[str, str]:
    """Colour and marker of the i-th place: 70 pairs before one returns, as 7 and 10 have no common factor."""
    return PALETTE[index % 7], MARKERS[index % len(MARKERS)]


def _label_colour(index: int) -> str:
    return (SKY, GREY, ORANGE, BLUE, PURPLE, GREEN, RED, BLACK, YELLOW, "#8b5a2b", "#b3de69", "#fccde5")[
        index % 12
    ]


def _metres(value: float) -> str:
    if not np.isfinite(value):
        return ""
    return f"{value:.0f} m" if value < 1000 else f"{value / 1000:.1f} km"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def _count(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def _plain(value: float, _position=None) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
