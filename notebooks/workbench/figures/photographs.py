"""Photographs side by side: contact sheets, what was retrieved, pages on which a person judges the truth."""

import numpy as np
from matplotlib.figure import Figure

from workbench.figures import style
from workbench.figures.style import BLACK, GREEN, RIGHT, WRONG, photograph, styled

MIDDLE = {"ha": "center", "va": "center", "color": style.GREY}


@styled
def contact_sheet(images, captions, *, columns=6, title=None) -> Figure:
    """Lay n photographs out in a grid, a caption (of one or more lines) under each."""
    if not len(images) or len(captions) != len(images):
        raise ValueError(f"captions must be one an image, got {len(captions)} for {len(images)} images")
    tile = 1.9, 1.9 * style.aspect(images[0]) + 0.2 * style.caption_lines(captions) + 0.06
    figure, axes = style.tiles(len(images), columns, tile, margin=(0, 0.45 if title else 0))
    for axis, image, caption in zip(axes.flat, images, captions, strict=False):
        photograph(axis, image, caption)
    figure.suptitle(title)
    return figure


@styled
def retrieval_panel(
    queries, retrieved, distance_m, correct, *, query_captions=None, truth=None, title=None, tile=1.75
) -> Figure:
    """Draw Q queries with what was retrieved for them, a row each, tiles `tile` inches wide.

    `retrieved` holds up to k images of each, in order of rank; `distance_m` (Q, k) metres, NaN unknown;
    `correct` (Q, k) whether it is a positive: a blue frame and a tick, or a red dashed one and a cross.
    `truth`, an image or None of each, fills a last column with a true reference.
    """
    distance, correct = np.atleast_2d(np.asarray(distance_m, dtype=float)), np.atleast_2d(np.asarray(correct))
    if not len(queries) == len(retrieved) == len(distance) or correct.shape != distance.shape:
        raise ValueError(
            f"queries, retrieved, distance_m and correct must agree, got {len(queries)} queries, "
            f"{len(retrieved)} rows of retrieved, {distance.shape} and {correct.shape}"
        )
    columns = 1 + distance.shape[1] + (truth is not None)
    height = tile * max(style.aspect(query) for query in queries) + 0.3
    size = tile * columns, height * len(queries) + (0.5 if title else 0.1)
    figure, axes = style.panels(len(queries), columns, size)
    for q, row in enumerate(axes):
        photograph(row[0], queries[q], query_captions[q] if query_captions else "query", BLACK)
        for axis in row[1:]:
            axis.set_axis_off()
        for j, image in enumerate(retrieved[q]):
            mark, frame = ("✓", RIGHT) if correct[q, j] else ("✗", WRONG)
            photograph(row[1 + j], image, f"#{j + 1} {mark}  {style.metres(distance[q, j])}", frame)
        if truth is not None and truth[q] is None:
            row[-1].text(0.5, 0.5, "no true\nreference", **MIDDLE)
        elif truth is not None:
            photograph(row[-1], truth[q], "a true reference", GREEN)
    figure.suptitle(title)
    return figure


@styled
def review_page(
    query, retrieved, positives, *, retrieved_captions, positive_captions, correct, query_caption, notes
) -> Figure:
    """Make a page on which a person judges a query: what was retrieved above, what is called true below.

    `retrieved` and `positives` (possibly none) have a caption each; `correct` has one bool a retrieved image;
    `notes`, at the foot, say why the query is suspected.
    """
    columns = max(len(retrieved), len(positives), 2) + 1
    size = 1.9 * columns, 2 * (1.9 * style.aspect(query) + 0.65) + 0.9
    figure, axes = style.panels(2, columns, size)
    for axis in axes.flat:
        axis.set_axis_off()
    photograph(axes[0, 0], query, query_caption, BLACK)
    for axis, image, caption, right in zip(axes[0, 1:], retrieved, retrieved_captions, correct, strict=False):
        photograph(axis, image, caption, RIGHT if right else WRONG)
    axes[1, 0].text(0.5, 0.5, "the references\ncalled true", **MIDDLE)
    for axis, image, caption in zip(axes[1, 1:], positives, positive_captions, strict=False):
        photograph(axis, image, caption, GREEN)
    if not len(positives):
        axes[1, 1].text(0.5, 0.5, "none within\nthe radius", **MIDDLE)
    figure.suptitle("Is the ground truth right?")
    figure.supxlabel(notes, fontsize=11)
    return figure
