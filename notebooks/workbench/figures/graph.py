"""The geo-visual graph on its map, the greedy choice step by step, and what samplers draw from it."""

from collections.abc import Mapping

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from workbench.figures import style
from workbench.figures.maps import count_histogram
from workbench.figures.style import AFFINITY, BLACK, BLUE, GREEN, PALETTE, RED, whole_ticks

AFFINITY_NAME = "W = -(d_geo · d_vis)  (m)"


def graph_map(east_m, north_m, edges, weight, *, radius_m, cliques=(), node_labels=(), title=None) -> Figure:
    """Draw a geo-visual graph on its map: edges by their affinity W, places (cliques) by colour and marker.

    `edges` (E, 2) have `weight` (E,), W = -(d_geo d_vis) in metres: near 0 is close in both. `radius_m` is
    drawn as a scale bar; `cliques` holds the nodes of each chosen place.
    """
    style.agree(edges=edges, weight=weight)
    edges, weight = np.asarray(edges, dtype=int).reshape(-1, 2), np.asarray(weight, dtype=float)
    figure, axis, at = style.metre_panel(8.2, 5.4, east_m, north_m)
    if len(edges):
        order = np.argsort(weight)  # the strongest edges on top
        look = {"cmap": AFFINITY, "linewidths": np.clip(400 / len(edges), 0.5, 2.5), "alpha": 0.85}
        lines = axis.add_collection(LineCollection(at[edges[order]], array=weight[order], **look))
        figure.colorbar(lines, cax=axis.inset_axes([1.02, 0, 0.025, 1]), label=AFFINITY_NAME)
    axis.scatter(*at.T, s=np.clip(2500 / len(at), 6, 60), color="#666666", linewidths=0, zorder=2)
    for i, clique in enumerate(cliques):
        axis.scatter(*at[list(clique)].T, s=95, edgecolors="white", linewidths=1, zorder=3, **style.mark(i))
    for label, point in zip(node_labels, at, strict=False):
        style.write(axis, label, point, (6, 5), **style.HALO, fontsize=10, zorder=4)
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    x, y = left + 0.04 * (right - left), low - 0.07 * (high - low)
    axis.plot([x, x + radius_m], [y, y], color=BLACK, linewidth=3, solid_capstyle="butt")
    style.write(axis, f"{radius_m:g} m", (x + radius_m, y), (6, 0), va="center", fontsize=11)
    stated = f"{len(at):,} images, {len(edges):,} edges"
    if len(cliques):
        ends = sorted({min(map(len, cliques)), max(map(len, cliques))})
        stated += f", {len(cliques)} places of {'-'.join(map(str, ends))} images"
    axis.set_title(f"{title}\n{stated}" if title else stated, fontsize=12)
    return figure


def graph_histograms(degree, clique_size, weight) -> Figure:
    """Draw how many neighbours an image has, how large the cliques are, and the affinities of the edges."""
    figure, (neighbours, sizes, affinities) = style.panels(9.2, 3.4, 1, 3)
    count_histogram(neighbours, np.asarray(degree), bars=30)
    neighbours.set(xlabel="neighbours of an image", ylabel="images")
    count_histogram(sizes, np.asarray(clique_size), bars=30)
    sizes.set(xlabel="images in a clique", ylabel="cliques")
    affinities.hist(weight, bins=40, color=GREEN)
    affinities.set(xlabel=AFFINITY_NAME, ylabel="edges")
    whole_ticks(neighbours.xaxis, sizes.xaxis, *(axis.yaxis for axis in figure.axes), most=5)
    return figure


def pair_matrices(d_geo_m, d_vis, weight, kept, *, title) -> Figure:
    """Draw arrays (n, n): metres, L2 of descriptors, and their negated product where an edge is `kept`."""
    import seaborn

    figure, axes = style.panels(9.2, 3.3, 1, 3)
    for axis, values, scale, label in (
        (axes[0], d_geo_m, "cividis_r", "d_geo (m)"),
        (axes[1], d_vis, "cividis_r", "d_vis (L2)"),
        (axes[2], np.where(kept, weight, np.nan), AFFINITY, "W of the edges that stay (m)"),
    ):
        seaborn.heatmap(values, cmap=scale, square=True, cbar_kws={"shrink": 0.75}, ax=axis)
        axis.grid(False)
        axis.set(title=label, xlabel="node")
        axis.tick_params(labelsize=9, labelrotation=0)
    axes[0].set_ylabel("node")
    figure.suptitle(title)
    return figure


def greedy_steps(east_m, north_m, edges, chosen, scores) -> Figure:
    """Draw each step of the greedy choice on a toy map of n nodes and `edges` (E, 2).

    `chosen` holds the clique after each of T steps, the newest node last; `scores` (T, n) what the step
    compared, S(i) in the first, the mean affinity to the clique in the next; NaN for a node that was no
    candidate.
    """
    style.agree(chosen=chosen, scores=scores)
    at, names = style.local(east_m, north_m)
    columns = 2 if len(chosen) in (2, 4) else 3
    figure, axes = style.tiles(len(chosen), columns, (3.7, 3.1), (1.2, 0.8), sharex=True, sharey=True)
    norm, ring = Normalize(np.nanmin(scores), np.nanmax(scores)), {"facecolors": "none", "edgecolors": RED}
    for axis, clique, values in zip(axes.flat, map(list, chosen), scores, strict=False):
        inside, candidate = np.isin(edges, clique).all(axis=1), np.isfinite(values)
        axis.add_collection(LineCollection(at[edges[~inside]], colors="#d4d4d4", linewidths=1, zorder=1))
        axis.add_collection(LineCollection(at[edges[inside]], colors=RED, linewidths=3, zorder=2))
        axis.scatter(*at[~candidate].T, s=85, color="#e2e2e2", edgecolors="#b0b0b0", zorder=3)
        disc = {"s": 150, "edgecolors": "#444444", "linewidths": 0.8, "zorder": 4}
        picture = axis.scatter(*at[candidate].T, c=values[candidate], cmap=AFFINITY, norm=norm, **disc)
        axis.scatter(*at[clique].T, s=230, linewidths=2.6, zorder=5, **ring)
        axis.scatter(*at[clique[-1]], s=60, marker="*", color="white", edgecolors=RED, linewidths=1, zorder=6)
        for i in np.flatnonzero(candidate):
            font = {"ha": "center", "fontsize": 9, "zorder": 7} | style.HALO
            style.write(axis, f"{values[i]:.1f}", at[i], (0, 10), **font)
        axis.set_aspect("equal")
        axis.set_title(f"step {len(clique)}: node {clique[-1]} joins", fontsize=12)
    spread, low, high = np.ptp(at, axis=0).max(), at.min(axis=0), at.max(axis=0)
    axis.set_xlim(low[0] - 0.12 * spread, high[0] + 0.12 * spread)
    axis.set_ylim(low[1] - 0.15 * spread, high[1] + 0.15 * spread)
    for axis in axes.flat:
        axis.set(xlabel=names[0], ylabel=names[1])
        axis.label_outer()
    figure.colorbar(picture, ax=axes, label="what is compared: mean W (m)", shrink=0.8)
    figure.suptitle("Greedy weighted sampling, step by step")
    return figure


def sampler_comparison(samplers: Mapping[str, Mapping], *, title="What the samplers draw") -> Figure:
    """Compare samplers by how hard their batches are.

    Of each: ``hardest_negative``, an image's highest cosine with another place of its batch, and
    ``positive_distance_m`` and ``positive_similarity`` of every pair of a place.
    """
    figure, axes = style.panels(9.2, 1.9 + 0.55 * len(samplers), 1, 3, sharey=True)
    y = np.arange(len(samplers))[::-1]
    for axis, key, label, digits in (
        (axes[0], "hardest_negative", "similarity of the\nhardest negative (cosine)", 3),
        (axes[1], "positive_similarity", "similarity of positives\n(cosine)", 3),
        (axes[2], "positive_distance_m", "distance of positives\n(m)", 1),
    ):
        for i, (row, sampler) in enumerate(zip(y, samplers.values(), strict=True)):
            values, tint = np.asarray(sampler[key], dtype=float), PALETTE[i % 8]
            if not np.isfinite(values).any():
                left = {"transform": axis.get_yaxis_transform(), "va": "center", "color": style.GREY}
                axis.text(0.03, row, "none", **left)
                continue
            low, first, median, third, high = np.nanquantile(values, [0.05, 0.25, 0.5, 0.75, 0.95])
            axis.hlines(
                [row, row], [low, first], [high, third], color=tint, linewidth=[1.6, 11], alpha=[1, 0.55]
            )
            axis.plot([median], [row], marker="|", markersize=19, markeredgewidth=3, color=BLACK)
            style.write(axis, f"{median:.{digits}f}", (median, row), (0, 12), ha="center", fontsize=10)
        axis.set_xlabel(label)
        axis.locator_params(axis="x", nbins=4)
        axis.margins(x=0.08)
        axis.grid(axis="y", visible=False)
    axes[0].set(yticks=y, yticklabels=list(samplers), ylim=(-0.6, len(samplers) - 0.3))
    figure.suptitle(f"{title} (line: 5-95 %, bar: middle half, mark: median)", fontsize=13)
    return figure


def affinity_change(before, after, stayed, *, k: int) -> Figure:
    """Draw the affinities W of the same edges, (E,) each, before and after the model has learned.

    `stayed` (cliques,) says how many of the `k` images chosen from a clique are chosen again.
    """
    figure, (weights, choice) = style.panels(9.6, 4.4, 1, 2)
    low = min([-1.0, *before, *after])
    if len(before):
        dots = weights.hexbin(before, after, gridsize=45, mincnt=1, cmap=AFFINITY, linewidths=0)
        bar = figure.colorbar(dots, ax=weights, label="edges")
        whole_ticks(bar.ax.yaxis)
    weights.plot([low, 0], [low, 0], color=RED, linestyle="--", label="as before")
    weights.set(xlabel="W before (m)", ylabel="W after (m)")
    weights.legend(loc="upper left")
    weights.locator_params(nbins=5)
    choice.bar(np.arange(k + 1), np.bincount(stayed, minlength=k + 1), color=BLUE, width=0.92)
    choice.set(xlabel=f"of the {k} images chosen before,\nso many are chosen again", ylabel="cliques")
    whole_ticks(choice.xaxis, choice.yaxis)
    figure.suptitle("The same edges and cliques, for two states of the model")
    return figure
