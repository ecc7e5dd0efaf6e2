"""Tables as pictures: recalls with their intervals, costs, ablations, and the audit of contexts."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from workbench.figures import style
from workbench.figures.style import BLACK, BLUE, DARK, GREEN, GREY, PURPLE, RED, SKY, colour, marker, styled


@styled
def recall_bars(
    sets, methods, recall, low, high, *, published=None, title="Recall at 1, with 95 % intervals"
) -> Figure:
    """Draw R@1 with its interval, a group of bars a set, beside published points.

    `recall`, `low` and `high` (M, S) are percents of M methods on S sets, NaN not run; `published` maps a
    label, which says the context that was measured in, to S numbers, NaN unknown.
    """
    recall, published = np.atleast_2d(np.asarray(recall, dtype=float)), published or {}
    if recall.shape != (len(methods), len(sets)):
        raise ValueError(f"recall must have shape ({len(methods)}, {len(sets)}), got {recall.shape}")
    slots = len(methods) + 0.55 * len(published)
    x, width = np.arange(len(sets)), 0.84 / slots
    figure, axis = style.panel(min(max(7.2, 1.2 + len(sets) * (0.4 + 0.32 * slots)), 14), 5.0)
    handles, error = [], {"ecolor": BLACK, "elinewidth": 1.3, "capsize": 2.5}
    for m, method in enumerate(methods):
        at = x - 0.42 + (m + 0.5) * width
        hatch = ("", "//", "..", "xx")[(m // len(style.PALETTE)) % 4]
        bars = {"color": colour(m), "hatch": hatch, "label": method, "error_kw": error}
        ends = style.error_bars(recall[m], low[m], high[m])
        handles.append(axis.bar(at, np.nan_to_num(recall[m]), width * 0.92, yerr=ends, **bars))
        for i in np.flatnonzero(np.isnan(recall[m])):
            axis.text(at[i], 1, "not run", rotation=90, ha="center", va="bottom", color=GREY, fontsize=10)
    for j, (label, values) in enumerate(published.items()):
        at = x - 0.42 + (len(methods) + 0.55 * (j + 0.5)) * width
        handles += published_points(axis, at, values, label, j)
    axis.set_xticks(x, sets, rotation=0 if max(map(len, sets)) < 16 else 20)
    axis.set(ylim=(0, 101), ylabel="R@1 (%)", title=title)
    axis.grid(axis="x", visible=False)
    style.legend_below(figure, handles)
    return figure


def published_points(axis, x, y, label: str, index: int, line: str = ""):
    """Open marks, told apart by `index`, with a line between them where there is one."""
    look = {"color": DARK if index else BLACK, "linestyle": line if len(x) > 1 else "", "linewidth": 1.3}
    mark = {"marker": ("D", "o", "^", "s", "v", "P")[index % 6], "markersize": 8, "markeredgewidth": 1.8}
    return axis.plot(
        x, np.asarray(y, dtype=float), markerfacecolor="white", label=f"published: {label}", **look, **mark
    )


@styled
def recall_vs_dim(dims, recall, *, intervals=None, published, title) -> Figure:
    """Draw R@1 against descriptor dimensions.

    `dims`, `recall` and `intervals` map a method to numbers (and low, high), `published` a label to (dims,
    recalls).
    """
    figure, axis = style.panel(7.6, 4.6)
    for i, (name, values) in enumerate(recall.items()):
        axis.plot(dims[name], values, color=colour(i), marker=marker(i), label=name, zorder=3)
        if name in (intervals or {}):
            axis.fill_between(dims[name], *intervals[name], color=colour(i), alpha=0.16, linewidth=0)
    for j, (label, (x, y)) in enumerate(published.items()):
        published_points(axis, x, y, label, j, (":", "--", "-.")[j % 3])
    axis.set_xscale("log", base=2)
    sizes = np.unique(np.concatenate([*dims.values(), *(x for x, _ in published.values())]))[::-1]
    ticks = list(sizes[:1])  # as many as can be read
    for size in sizes[1:]:
        if ticks[-1] / size > 1.55:
            ticks.append(size)
    axis.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks], rotation=30)
    axis.minorticks_off()
    axis.set(xlabel="dimensions of the descriptor", ylabel="R@1 (%)", title=title)
    style.legend_right(axis)
    return figure


@styled
def recall_vs_parameters(names, parameters, recall, low=(), high=(), *, published, title) -> Figure:
    """Draw R@1 of each method at its number of trainable parameters.

    Methods that train nothing stand together on the left, and those with nearly equal numbers side by side,
    or their intervals would cover each other. `published` maps a label to (parameters, recall).
    """
    parameters = np.asarray(parameters, dtype=float)
    counts = np.concatenate([parameters, [x for x, _ in published.values()]])
    if not len(counts):
        raise ValueError("there is neither a method nor a published point to draw")
    start = 10.0 ** np.floor(np.log10(counts[counts > 0].min() if (counts > 0).any() else 10.0))
    order, shift = np.argsort(parameters, kind="stable"), np.zeros(len(parameters))
    new = parameters[order] > 1.08 * np.roll(parameters[order], 1)
    for group in np.split(order, np.flatnonzero(new[1:]) + 1):
        step = 0.12 * np.where(parameters[group] == 0, start, parameters[group])
        shift[group] = step * (np.arange(len(group)) - (len(group) - 1) / 2)
    figure, axis = style.panel(7.8, 4.8)
    for i, name in enumerate(names):
        label = f"{name} ({style.count(parameters[i])}{'' if np.isfinite(recall[i]) else ', not run'})"
        ends = style.error_bars(recall[i : i + 1], low[i : i + 1], high[i : i + 1])
        look = {"fmt": marker(i), "markersize": 9, "color": colour(i), "capsize": 3, "label": label}
        axis.errorbar([parameters[i] + shift[i]], [recall[i]], yerr=ends, **look)
    for j, (label, (x, y)) in enumerate(published.items()):
        published_points(axis, [x], [y], f"{label} ({style.count(x)})", j)
    end = max(2 * counts.max(), 11 * start)
    left, decades = start / 1.2, start * 10.0 ** np.arange(np.floor(np.log10(end / start)) + 1)
    if (counts == 0).any():
        axis.set_xscale("symlog", linthresh=start, linscale=0.6)
        left = min(2 * shift[parameters == 0].min(initial=0), -0.2 * start)
        decades = np.append(0, decades)
    else:
        axis.set_xscale("log")
    axis.set_xticks(decades, [style.count(v) for v in decades])
    axis.minorticks_off()
    axis.set(xlim=(left, end), xlabel="trainable parameters", ylabel="R@1 (%)", title=title)
    style.legend_right(axis)
    return figure


COSTS = {
    "measured": {"facecolor": BLUE, "edgecolor": BLUE, "label": "measured here"},
    "estimated": {"facecolor": "white", "edgecolor": BLUE, "hatch": "..", "label": "estimated here"},
    "published": {"facecolor": SKY, "edgecolor": BLACK, "hatch": "//", "label": "the paper's"},
}


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


@styled
def graph_cost(names, seconds, added_pct, *, kind, once) -> Figure:
    """Draw the time of making the graph and, where known, what it adds to an epoch.

    Parameters
    ----------
    seconds, added_pct : array (n,)
        Seconds of one making, and percents added to the time of an epoch's steps (NaN unknown).
    kind : array (n,) of str
        "measured", "estimated" (reckoned), or "published" (the paper's, on the paper's machine).
    once : array (n,) of bool
        Paid once and not each epoch, so that nothing is added to an epoch.
    """
    seconds, added = np.asarray(seconds, dtype=float), np.asarray(added_pct, dtype=float)
    figure, axes = style.panels(1, 2, (9.6, 1.9 + 0.52 * len(names)), sharey=True, width_ratios=(3, 2))
    time, share = axes[0]
    y = np.arange(len(names))[::-1]
    for axis, values, text in ((time, seconds, duration), (share, added, lambda v: f"+{v:.1f} %")):
        for bar, one in zip(axis.barh(y, np.nan_to_num(values), height=0.62), kind, strict=True):
            bar.set(**COSTS[one])
        for row, value, single in zip(y, values, once, strict=True):
            if np.isfinite(value):
                style.write(axis, text(value), (value, row), va="center")
            else:
                style.write(axis, "paid once" if single else "not known", (0, row), va="center", color=GREY)
        axis.grid(axis="y", visible=False)
    positive = seconds[seconds > 0]
    if len(positive):
        time.set_xscale("log")
        time.set_xlim(positive.min() / 3, positive.max() * 12)
        style.plain_ticks(time.xaxis)
    share.set_xlim(0, 1.5 * (np.nanmax(added) if np.isfinite(added).any() else 1.0))
    time.set_yticks(y, names)
    time.set_xlabel("time (s)")
    share.set_xlabel("added to an epoch's steps (%)")
    if len(set(kind)) > 1:
        style.legend_below(figure, [Patch(**look) for one, look in COSTS.items() if one in set(kind)])
    figure.suptitle("What making the graph costs")
    return figure


@styled
def context_audit(audits: Mapping[str, Mapping]) -> Figure:
    """Draw R@1 of checkpoints against which images shared a batch with each other.

    Of each: batch sizes ``n`` (m,); R@1 of name-sorted batches, ``sorted`` (m,), and of r shuffles,
    ``shuffled`` (m, r), NaN not run; ``none`` (head off), ``solo`` (batches of one), ``anchors`` (a fixed
    set), or None.
    """
    flat = (("none", BLACK, ":"), ("solo", GREEN, "-."), ("anchors", PURPLE, "--"))
    figure, axes = style.tiles(len(audits), 3, (3.2, 3.6), margin=(1.2, 1.0))
    for axis, (name, audit) in zip(axes.flat, audits.items(), strict=False):
        n, shuffled = np.asarray(audit["n"]), np.ma.masked_invalid(np.asarray(audit["shuffled"], dtype=float))
        axis.plot(n, audit["sorted"], color=RED, marker="s", label="sorted, as published")
        axis.plot(n, shuffled.mean(axis=1), color=BLUE, marker="o", label="shuffled: mean")
        band = {"color": BLUE, "alpha": 0.22, "linewidth": 0, "label": f"shuffled: all {shuffled.shape[1]}"}
        axis.fill_between(n, shuffled.min(axis=1), shuffled.max(axis=1), **band)
        for key, tint, dash in flat:
            if audit[key] is not None:
                axis.axhline(audit[key], color=tint, linestyle=dash, label=key.replace("none", "head off"))
        axis.set_xscale("log", base=2)
        axis.set_xticks(n, [str(v) for v in n])
        axis.margins(y=0.12)
        axis.set_title(name, fontsize=12)
        axis.set_xlabel("images in a batch")
    for axis in axes[:, 0]:
        axis.set_ylabel("R@1 (%)")
    style.legend_below(figure, axes[0, 0].get_legend_handles_labels()[0])
    figure.suptitle("The same checkpoint, other company in the batch")
    return figure


@styled
def ablation_figure(
    names, recall, difference, low, high, *, reference, plateau, smallest_visible, k, title
) -> Figure:
    """Draw an ablation: every seed's R@k, and the paired difference against the full method.

    Parameters
    ----------
    recall, plateau : array (C, S)
        Percents of C configurations and S seeds, NaN not run; which ended on the loss's plateau (crosses).
    difference, low, high : array (C,)
        Points against configuration `reference` without those runs, and the ends of the paired 95 % interval.
    smallest_visible : float or None
        Smallest difference (points) that the set could show, drawn as a band around zero.
    """
    recall, plateau = np.asarray(recall, dtype=float), np.asarray(plateau, dtype=bool)
    difference, low, high = (np.asarray(v, dtype=float) for v in (difference, low, high))
    figure, axes = style.panels(1, 2, (9.6, 2.3 + 0.5 * len(names)), sharey=True)
    left, right = axes[0]
    y = np.arange(len(names))[::-1]
    bar = {"marker": "|", "color": BLUE, "markersize": 18, "markeredgewidth": 2.5}
    point = {"marker": "o", "color": BLUE, "linestyle": "", "markersize": 8, "markeredgewidth": 2}
    for c, row in enumerate(y):
        sound, stuck = (recall[c][np.isfinite(recall[c]) & at] for at in (~plateau[c], plateau[c]))
        left.scatter(sound, np.full(len(sound), row), s=32, color=SKY, zorder=2)
        left.scatter(stuck, np.full(len(stuck), row), s=45, color=RED, marker="x", zorder=2)
        if len(sound):
            deviation = sound.std(ddof=1) if len(sound) > 1 else 0
            left.errorbar([sound.mean()], [row], xerr=deviation, capsize=4, linestyle="", **bar)
        elif not len(stuck):
            at = {"transform": left.get_yaxis_transform(), "ha": "right", "va": "center"}
            left.text(0.97, row, "not run", color=GREY, **at)
        if c == reference:
            right.text(0, row, "  the full method", va="center", color=DARK)
        elif np.isfinite(difference[c]):
            fill = BLUE if low[c] > 0 or high[c] < 0 else "white"
            ends = style.error_bars(difference[c : c + 1], low[c : c + 1], high[c : c + 1])
            right.errorbar([difference[c]], [row], xerr=ends, capsize=4, markerfacecolor=fill, **point)
    right.axvline(0, color=BLACK, linewidth=1.2)
    left.set_yticks(y, names)
    left.set_ylim(-0.6, len(names) - 0.4)
    left.set_xlabel(f"R@{k} (%)")
    right.set_xlabel(f"difference in R@{k} (points), paired 95 %")
    handles = [
        Line2D([], [], marker="o", color=SKY, linestyle="", label="a seed"),
        Line2D([], [], **bar | {"markersize": 13}, label="mean, standard deviation"),
        Line2D([], [], **point, label="interval without zero"),
        Line2D([], [], **point, markerfacecolor="white", label="interval with zero"),
    ]
    if plateau.any():
        handles.insert(1, Line2D([], [], marker="x", color=RED, linestyle="", label="ended on the plateau"))
    if smallest_visible is not None:
        right.axvspan(-smallest_visible, smallest_visible, color="#e9e9e9", zorder=0)
        handles.append(Patch(color="#e0e0e0", label="smaller than the set can show"))
    style.legend_below(figure, handles)
    figure.suptitle(title)
    return figure
