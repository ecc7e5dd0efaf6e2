"""Photographs side by side: contact sheets, what was retrieved, pages on which a person judges the truth."""

from pathlib import Path

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


def review_html(cases, *, about: dict, rule: str, searched: int, size_px: int = 220) -> str:
    """Make an HTML file with a page for each query, on which a person judges the ground truth.

    It needs neither kernel nor network. The browser keeps the verdicts where it can; buttons save them as CSV
    or JSON and load JSON again. Printed, each query starts a sheet.

    Parameters
    ----------
    cases : sequence of mappings
        ``query`` (int, different in each), ``query_path``, ``query_image``, ``note`` (text, may be empty),
        ``score`` (0 to 1, NaN unknown), ``n_positives``; ``found``: mappings of path, image, metres (NaN
        unknown) and positive, in order of rank; ``truth``: a mapping of path, image, metres and rank (0 if
        not searched), or None.
    about : mapping of str to str
        ``run``, which keys what the browser keeps, and what else goes into each saved row, such as the model.
    rule : str
        When a reference is a positive, in words.
    searched, size_px : int
        How many ranks were searched; the longer side of the photographs in the page.
    """
    import jinja2

    if "run" not in about:
        raise ValueError("about must name the run, got " + ", ".join(about))
    if len({int(case["query"]) for case in cases}) != len(cases):
        raise ValueError("two cases have the same query")

    def rounded(value) -> float | None:
        return round(float(value), 4) if np.isfinite(value) else None

    rows = []
    for case in cases:
        row = {"query": int(case["query"]), "query_path": str(case["query_path"])}
        for name, one in (("first_reference", case["found"][0]), ("nearest_positive", case["truth"])):
            row[f"{name}_path"] = str(one["path"]) if one else ""
            row[f"{name}_m"] = rounded(one["metres"]) if one else None
        rows.append(row | {"score": rounded(case["score"])})
    folder = jinja2.FileSystemLoader(Path(__file__).parent.parent)
    page = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.policies["json.dumps_kwargs"] = {}  # fields in this order, not sorted
    page.filters["metres"] = style.metres
    page.filters["jpeg"] = lambda image: style.jpeg(image, size_px)
    template = page.get_template("review.html.j2")
    return template.render(about=about, cases=cases, rows=rows, rule=rule, searched=searched)
