"""What a model looks at: weights over pictures, contributions to a match, labels, and toys written out."""

from collections.abc import Mapping

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from workbench.figures import style
from workbench.figures.style import BLACK, BLUE, HEAT, RED, SIGNED, SKY, colour, photograph, styled

LABEL_COLOURS = (style.SKY, style.GREY, style.ORANGE, style.BLUE, style.PURPLE, style.GREEN, style.RED,
                 style.BLACK, style.YELLOW, "#8b5a2b", "#b3de69", "#fccde5")  # fmt: skip


def overlay(axis, image, values, scale, norm, alpha):
    """Draw values (h, w) over the grey picture, each patch over the pixels that it covers."""
    array = np.asarray(image)
    grey = array if array.ndim == 2 else array[..., :3] @ np.array([0.299, 0.587, 0.114])
    axis.imshow(grey, cmap="gray", interpolation="antialiased")
    axis.set_axis_off()
    extent = (-0.5, grey.shape[1] - 0.5, grey.shape[0] - 0.5, -0.5)
    return axis.imshow(values, cmap=scale, norm=norm, alpha=alpha, extent=extent)


@styled
def label_map(image, labels, names) -> Figure:
    """Show a picture beside the label of each of its pixels, an array (H, W) of indices into `names`."""
    labels = np.asarray(labels)
    tints = [LABEL_COLOURS[i % len(LABEL_COLOURS)] for i in range(len(names))]
    figure, axes = style.panels(1, 2, (8.6, 3.6))
    photograph(axes[0, 0], image)
    axes[0, 1].imshow(labels, cmap=ListedColormap(tints), vmin=-0.5, vmax=len(names) - 0.5)
    axes[0, 1].set_axis_off()
    shares = {i: f"{names[i]} {np.mean(labels == i):.0%}" for i in np.unique(labels)}
    handles = [Patch(color=tints[i], label=share) for i, share in shares.items()]
    axes[0, 1].legend(handles=handles, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


@styled
def heatmap_overlay(images, maps, *, captions=None, scale=None, title) -> Figure:
    """Lay a weight per patch over each of n pictures, the picture itself beside it.

    `maps` are n arrays (h, w); `scale` (low, high) is one colour scale for all, by default each has its own.
    """
    if len(images) != len(maps) or not len(images):
        raise ValueError(f"maps must be one an image, got {len(maps)} for {len(images)} images")
    across, width = min(2, len(images)), 2.15
    rows = -(-len(images) // across)
    height = width * style.aspect(images[0]) + 0.22 * style.caption_lines(captions) + 0.12
    figure, axes = style.panels(rows, 2 * across, (2 * across * width + 1.1, rows * height + 0.5))
    for axis in axes.flat:
        axis.set_axis_off()
    for i, (image, values) in enumerate(zip(images, maps, strict=True)):
        left, right = axes[i // across, 2 * (i % across) : 2 * (i % across) + 2]
        photograph(left, image, captions[i] if captions else "")
        norm = Normalize(*(scale or (np.min(values), np.max(values))))
        picture = overlay(right, image, np.asarray(values, dtype=float), HEAT, norm, 0.62)
    if scale:
        figure.colorbar(picture, ax=axes, label="weight of the patch", shrink=0.85, alpha=1.0)
    figure.suptitle(title)
    return figure


@styled
def contributions_pair(query, reference, query_maps, reference_maps, *, captions, title) -> Figure:
    """Draw what each patch gives to the matching score, over a query and its true reference.

    A column a method, with a caption; `query_maps` and `reference_maps` give its array (h, w): positive
    speaks for the match, negative against it. Each method has its own scale, symmetric around zero, as their
    scores differ.
    """
    columns, width = 1 + len(query_maps), 1.95
    figure, axes = style.panels(2, columns, (width * columns + 1.0, 2 * width * style.aspect(query) + 1.4))
    for axis, image, name in zip(axes[:, 0], (query, reference), ("query", "true reference"), strict=True):
        photograph(axis, image)
        axis.set_title(name, fontsize=12)
    for column, name in zip(axes[:, 1:].T, query_maps, strict=True):
        pair = [np.asarray(maps[name], dtype=float) for maps in (query_maps, reference_maps)]
        reach = max(*(np.abs(values).max() for values in pair), 1e-12)
        for axis, image, values in zip(column, (query, reference), pair, strict=True):
            picture = overlay(axis, image, values / reach, SIGNED, TwoSlopeNorm(0, -1, 1), 0.68)
        column[0].set_title(f"{name}\n{captions[name]}", fontsize=12)
    bar = figure.colorbar(picture, ax=axes, shrink=0.85, ticks=[-1, 0, 1])
    bar.set_ticklabels(["against", "0", "for"])
    bar.set_label("contribution to the score\n(each method's largest: 1)", fontsize=11)
    figure.suptitle(title)
    return figure


@styled
def mass_bars(methods, labels, share, *, area, spread, title) -> Figure:
    """Draw the share of a method's weight on each kind of surface, beside its share of the picture.

    `share` and `spread` (M, L) are M methods' shares on L labels (rows sum to 1) and half widths of their
    intervals; `area` (L,) is what a method without preference would give.
    """
    share = np.atleast_2d(np.asarray(share, dtype=float))
    if share.shape != (len(methods), len(labels)):
        raise ValueError(f"share must have shape ({len(methods)}, {len(labels)}), got {share.shape}")
    figure, axis = style.panel(max(7.2, 1.8 + 0.95 * len(labels)), 4.4)
    x, width = np.arange(len(labels)), 0.82 / len(methods)
    error = {"ecolor": BLACK, "elinewidth": 1.2, "capsize": 2}
    for m, method in enumerate(methods):
        bars = {"color": colour(m), "label": method, "yerr": 100 * np.asarray(spread[m]), "error_kw": error}
        axis.bar(x - 0.41 + (m + 0.5) * width, 100 * share[m], width * 0.92, **bars)
    line = {"color": BLACK, "linewidth": 2.2, "label": "share of the picture"}
    axis.hlines(100 * np.asarray(area), x - 0.45, x + 0.45, **line)
    axis.set_xticks(x, labels)
    axis.set(ylabel="share of the weight (%)", title=title)
    axis.grid(axis="x", visible=False)
    style.legend_right(axis)
    return figure


@styled
def patch_match(query, reference, patch, similarity, *, grid) -> Figure:
    """Draw a patch (row, column) of the query's `grid`, and its cosine with the reference's (h, w)."""
    similarity = np.asarray(similarity, dtype=float)
    best = np.unravel_index(similarity.argmax(), similarity.shape)
    figure, axes = style.panels(1, 2, (8.6, 3.9 * style.aspect(query) + 0.7))
    left, right = axes[0]
    photograph(left, query)
    frame_patch(left, query, grid, patch)
    left.set_title("patch ({}, {})".format(*patch), fontsize=12)
    norm = Normalize(similarity.min(), max(similarity.max(), similarity.min() + 1e-9))
    picture = overlay(right, reference, similarity, HEAT, norm, 0.6)
    frame_patch(right, reference, similarity.shape, best)
    right.set_title(f"best match ({best[0]}, {best[1]}): {similarity[best]:.2f}", fontsize=12)
    figure.colorbar(picture, ax=axes, label="cosine similarity", shrink=0.85)
    return figure


def frame_patch(axis, image, grid: tuple[int, int], patch: tuple[int, int]) -> None:
    """Frame the patch (row, column) of a picture that `grid` (rows, columns) divides."""
    height, width = np.asarray(image).shape[:2]
    step_y, step_x = height / grid[0], width / grid[1]
    corner = (patch[1] * step_x - 0.5, patch[0] * step_y - 0.5)
    for tint, line in (("white", 4.5), (RED, 2.5)):
        axis.add_patch(Rectangle(corner, step_x, step_y, fill=False, edgecolor=tint, linewidth=line))


@styled
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
