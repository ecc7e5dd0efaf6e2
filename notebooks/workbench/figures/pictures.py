"""Photographs side by side, and what a model looks at in them: weights, contributions, labels, matches."""

import itertools
from collections.abc import Mapping

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from workbench.figures import style
from workbench.figures.style import BLACK, BLUE, GREEN, HEAT, RED, RIGHT, SIGNED, SKY, WRONG, photograph

LABEL_COLOURS = (style.SKY, style.GREY, style.ORANGE, style.BLUE, style.PURPLE, style.GREEN, style.RED,
                 style.BLACK, style.YELLOW, "#8b5a2b", "#b3de69", "#fccde5")  # fmt: skip


def photograph_rows(rows, title: str | None, tile: float = 1.9) -> Figure:
    """Draw rows of cells (image, caption, frame), `tile` inches wide; a cell without an image is a text."""
    lines = 1 + max(caption.count("\n") for cells in rows for _, caption, _ in cells)
    height = tile * style.aspect(rows[0][0][0]) + 0.2 * lines + 0.1
    columns = max(map(len, rows))
    figure, axes = style.tiles(len(rows) * columns, columns, (tile, height), margin=(0, 0.5 if title else 0))
    for axis in axes.flat:
        axis.set_axis_off()
    for row, cells in zip(axes, rows, strict=True):
        for axis, (image, caption, frame) in zip(row, cells, strict=False):
            if image is None:
                axis.text(0.5, 0.5, caption, ha="center", va="center", color=style.GREY)
            else:
                photograph(axis, image, caption, frame)
    figure.suptitle(title)
    return figure


def contact_sheet(images, captions, *, columns=6, title=None) -> Figure:
    """Lay n photographs out in a grid, a caption (of one or more lines) under each."""
    style.agree(images=images, captions=captions)
    cells = [(image, caption, None) for image, caption in zip(images, captions, strict=True)]
    return photograph_rows([cells[i : i + columns] for i in range(0, len(cells), columns)], title)


def retrieval_panel(
    queries, retrieved, metres, correct, *, query_captions=None, methods=(), truth=None, title=None, tile=1.75
) -> Figure:
    """Draw Q queries with what was retrieved for them, a row each, tiles `tile` inches wide.

    `retrieved` holds k images of each, in order of rank; `metres` (Q, k), NaN unknown; `correct`
    (Q, k) whether it is a positive: a blue frame and a tick, or a red dashed one and a cross. Names of k
    `methods`, whose first answers they are, stand instead of the ranks. `truth`, an image or None of each,
    fills a last column with a true reference.
    """
    style.agree(queries=queries, retrieved=retrieved, metres=metres, correct=correct)
    rows = []
    for q, query in enumerate(queries):
        row = [(query, query_captions[q] if query_captions else "query", BLACK)]
        found = zip(retrieved[q], metres[q], correct[q], strict=True)
        for rank, (image, apart, right) in enumerate(found, start=1):
            mark, frame = ("✓", RIGHT) if right else ("✗", WRONG)
            name = methods[rank - 1] + "\n" if methods else f"#{rank} "
            row.append((image, f"{name}{mark}  {style.metres(apart)}", frame))
        if truth is not None:
            caption = "no true\nreference" if truth[q] is None else "a true reference"
            row.append((truth[q], caption, GREEN))
        rows.append(row)
    return photograph_rows(rows, title, tile)


def review_page(
    query, retrieved, positives, *, retrieved_captions, positive_captions, correct, query_caption, notes
) -> Figure:
    """Make a page on which a person judges a query: what was retrieved above, what is called true below.

    `retrieved` and `positives` (possibly none) have a caption each; `correct` has one bool a retrieved image;
    `notes`, at the foot, say why the query is suspected.
    """
    frames = [RIGHT if right else WRONG for right in correct]
    above = [(query, query_caption, BLACK), *zip(retrieved, retrieved_captions, frames, strict=True)]
    below = [(image, text, GREEN) for image, text in zip(positives, positive_captions, strict=True)]
    below = [(None, "the references\ncalled true", ""), *(below or [(None, "none within\nthe radius", "")])]
    figure = photograph_rows([above, below], "Is the ground truth right?", tile=1.3)
    figure.set_figheight(figure.get_figheight() + 0.6)  # for the notes
    figure.supxlabel(notes, fontsize=11)
    return figure


def label_map(image, labels, names) -> Figure:
    """Show a picture beside the label of each of its pixels, an array (H, W) of indices into `names`."""
    figure, (left, right) = style.panels(8.6, 3.6, 1, 2)
    photograph(left, image)
    tints = ListedColormap(LABEL_COLOURS)
    right.imshow(labels, cmap=tints, vmin=-0.5, vmax=len(LABEL_COLOURS) - 0.5)
    right.set_axis_off()
    shares = {i: np.mean(labels == i) for i in np.unique(labels)}
    handles = [Patch(color=tints(i), label=f"{names[i]} {share:.0%}") for i, share in shares.items()]
    right.legend(handles=handles, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def overlay(axis, image, values, scale, norm, alpha):
    """Draw values (h, w) over the grey picture, each patch over the pixels that it covers."""
    array = np.asarray(image)
    grey = array if array.ndim == 2 else array[..., :3] @ np.array([0.299, 0.587, 0.114])
    axis.imshow(grey, cmap="gray", interpolation="antialiased")
    axis.set_axis_off()
    extent = (-0.5, grey.shape[1] - 0.5, grey.shape[0] - 0.5, -0.5)
    return axis.imshow(values, cmap=scale, norm=norm, alpha=alpha, extent=extent)


def heatmap_scales(images, maps, *, scale, captions=(), title) -> Figure:
    """Lay a value per patch over each of n pictures: on one fixed scale, and stretched to its own range.

    A row a picture, with its caption; `maps` are n arrays (h, w). A `scale` (low, high) that begins below
    zero is one of values for and against.
    """
    style.agree(images=images, maps=maps)
    signed, lines = scale[0] < 0, 1 + max((caption.count("\n") for caption in captions), default=0)
    height = len(images) * (2.5 * style.aspect(images[0]) + 0.2 * lines + 0.1) + 0.8
    figure, axes = style.panels(8.8, height, len(images), 3, squeeze=False)
    for row, image, values, caption in itertools.zip_longest(axes, images, maps, captions, fillvalue=""):
        photograph(row[0], image, caption)
        reach, name = max(np.abs(values).max(), 1e-12), "own scale: {:.3f} to {:.3f}"
        own = (-reach, reach) if signed else (np.min(values), max(np.max(values), np.min(values) + 1e-12))
        named = zip(row[1:], (scale, own), ("one fixed scale", name.format(*own)), strict=True)
        for axis, ends, label in named:
            norm = TwoSlopeNorm(0, *ends) if signed else Normalize(*ends)
            drawn = overlay(axis, image, values, SIGNED if signed else HEAT, norm, 0.65)
            axis.set_title(label, fontsize=11)
            if ends is scale:
                fixed = drawn
    figure.colorbar(fixed, ax=axes[:, 1], shrink=0.85, alpha=1.0, label="value of the patch")
    figure.suptitle(title)
    return figure


def contributions_pair(query, reference, query_maps, reference_maps, *, captions, title) -> Figure:
    """Draw what each patch gives to the matching score, over a query and its true reference.

    A column a method, with a caption; `query_maps` and `reference_maps` give its array (h, w): positive
    speaks for the match, negative against it. Each method has its own scale, symmetric around zero, as their
    scores differ.
    """
    columns, width = 1 + len(query_maps), 1.85
    figure, axes = style.panels(width * columns, 2 * width * style.aspect(query) + 2.2, 2, columns)
    for axis, image, name in zip(axes[:, 0], (query, reference), ("query", "true reference"), strict=True):
        photograph(axis, image)
        axis.set_title(name, fontsize=12)
    for column, name in zip(axes[:, 1:].T, query_maps, strict=True):
        pair = [query_maps[name], reference_maps[name]]
        reach = max(*(np.abs(values).max() for values in pair), 1e-12)
        for axis, image, values in zip(column, (query, reference), pair, strict=True):
            picture = overlay(axis, image, values / reach, SIGNED, TwoSlopeNorm(0, -1, 1), 0.68)
        column[0].set_title(f"{name}\n{captions[name]}".replace(":", ":\n", 1), fontsize=11)
    where = {"location": "bottom", "shrink": 0.6, "aspect": 40, "ticks": [-1, 0, 1]}
    bar = figure.colorbar(picture, ax=axes, **where)
    bar.set_ticklabels(["against", "0", "for"])
    bar.set_label("contribution to the score (each method's largest: 1)", fontsize=11)
    figure.suptitle(title)
    return figure


def patch_match(query, reference, patch, similarity, *, grid) -> Figure:
    """Draw a patch (row, column) of the query's `grid`, and its cosine with the reference's (h, w)."""
    best = np.unravel_index(similarity.argmax(), similarity.shape)
    figure, (left, right) = style.panels(8.6, 3.9 * style.aspect(query) + 0.7, 1, 2)
    photograph(left, query)
    frame_patch(left, query, grid, patch)
    left.set_title("patch ({}, {})".format(*patch), fontsize=12)
    norm = Normalize(similarity.min(), max(similarity.max(), similarity.min() + 1e-9))
    picture = overlay(right, reference, similarity, HEAT, norm, 0.6)
    frame_patch(right, reference, similarity.shape, best)
    right.set_title(f"best match ({best[0]}, {best[1]}): {similarity[best]:.2f}", fontsize=12)
    figure.colorbar(picture, ax=[left, right], label="cosine similarity", shrink=0.85)
    return figure


def frame_patch(axis, image, grid: tuple[int, int], patch: tuple[int, int]) -> None:
    """Frame the patch (row, column) of a picture that `grid` (rows, columns) divides."""
    height, width = np.asarray(image).shape[:2] / np.asarray(grid)
    corner = patch[1] * width - 0.5, patch[0] * height - 0.5
    for tint, line in (("white", 4.5), (RED, 2.5)):
        axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=tint, linewidth=line))


def number_grids(arrays: Mapping[str, np.ndarray], *, signed=False, title=None) -> Figure:
    """Write small matrices out as coloured numbers, to follow an equation on a toy.

    Each has a colour scale of its own; `signed` takes a diverging one, white at zero.
    """
    import seaborn

    rows, columns = np.max([values.shape for values in arrays.values()], axis=0)
    tile = max(0.62 * columns + 0.4, 2.0), 0.46 * rows + 0.75
    figure, axes = style.tiles(len(arrays), 4, tile, margin=(0, 0.4 if title else 0))
    for axis, (name, values) in zip(axes.flat, arrays.items(), strict=False):
        scale = {"cmap": LinearSegmentedColormap.from_list("", ["#ffffff", SKY, BLUE])}
        if signed:
            scale = {"cmap": SIGNED, "vmin": -np.abs(values).max(), "vmax": np.abs(values).max()}
        font = {"annot": True, "fmt": ".3f", "annot_kws": {"fontsize": 10}}
        seaborn.heatmap(values, cbar=False, xticklabels=False, yticklabels=False, ax=axis, **scale, **font)
        axis.set_title(f"{name}\n{' x '.join(map(str, values.shape))}", fontsize=11)
    figure.suptitle(title)
    return figure
