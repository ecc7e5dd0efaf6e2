"""Results: recalls with their intervals, training, costs, ablations, and the audit of contexts."""

import textwrap
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from workbench.figures import style
from workbench.figures.style import BLACK, BLUE, DARK, GREEN, GREY, ORANGE, PALETTE, PURPLE, RED, SKY, mark


def grouped_bars(axis, groups, names, values, ends, slots: int) -> np.ndarray:
    """Draw a group of bars for each of G `groups`: `values` (M, G) of M names, `ends` (2, M, G) as ``yerr``.

    Returns the middles (slots, G) of a group's slots, of which the bars take the first M.
    """
    at = np.arange(len(groups)) + 0.84 * ((np.arange(slots) + 0.5) / slots - 0.5)[:, None]
    error = {"ecolor": BLACK, "elinewidth": 1.3, "capsize": 2.5}
    for m, name in enumerate(names):
        bars = {"color": PALETTE[m % 8], "hatch": ("", "//", "..", "xx")[m // 8 % 4], "label": name}
        axis.bar(at[m], np.nan_to_num(values[m]), 0.77 / slots, yerr=ends[:, m], error_kw=error, **bars)
    axis.set_xticks(range(len(groups)), groups, rotation=0 if max(map(len, groups)) < 16 else 20)
    axis.grid(axis="x", visible=False)
    return at


def recall_bars(
    sets, methods, recall, low, high, *, published=None, title="Recall at 1, with 95 % intervals"
) -> Figure:
    """Draw R@1 with its interval, a group of bars a set, beside published points.

    `recall`, `low` and `high` (M, S) are percents of M methods on S sets, NaN not run; `published` maps a
    label, which says the context that was measured in, to S numbers, NaN unknown.
    """
    style.agree(methods=methods, recall=recall)
    recall, published = np.asarray(recall, dtype=float), published or {}
    slots = len(methods) + len(published)
    figure, axis = style.panels(min(max(7.2, 1.2 + len(sets) * (0.4 + 0.3 * slots)), 14), 5.0)
    at = grouped_bars(axis, sets, methods, recall, style.error_bars(recall, low, high), slots)
    for m, i in np.argwhere(np.isnan(recall)):
        axis.text(at[m, i], 1, "not run", rotation=90, ha="center", va="bottom", color=GREY, fontsize=10)
    for j, (label, values) in enumerate(published.items()):
        published_points(axis, at[len(methods) + j], values, label, j)
    axis.set(ylim=(0, 101), ylabel="R@1 (%)", title=title)
    figure.legend(**style.LEGEND_BELOW)
    return figure


def published_points(axis, x, y, label: str, index: int, line: str = "") -> None:
    """Open marks, told apart by `index`, with a line between them where there is one."""
    look = {"color": DARK if index else BLACK, "linestyle": line if len(x) > 1 else "", "linewidth": 1.3}
    look |= {"marker": "Do^vsP"[index % 6], "markersize": 8, "markeredgewidth": 1.8}
    axis.plot(x, y, markerfacecolor="white", label=f"published: {label}", **look)


def mass_bars(methods, labels, share, *, area, spread, title) -> Figure:
    """Draw the share of a method's weight on each kind of surface, beside its share of the picture.

    `share` and `spread` (M, L) are M methods' shares on L labels (rows sum to 1) and half widths of their
    intervals; `area` (L,) is what a method without preference would give.
    """
    style.agree(methods=methods, share=share)
    share, ends, area = (100 * np.asarray(values) for values in (share, [spread, spread], area))
    figure, axis = style.panels(max(7.2, 1.8 + 0.95 * len(labels)), 4.4)
    grouped_bars(axis, labels, methods, share, ends, len(methods))
    x = np.arange(len(labels))
    axis.hlines(area, x - 0.45, x + 0.45, color=BLACK, linewidth=2.2, label="share of the picture")
    axis.set(ylabel="share of the weight (%)", title=title)
    axis.legend(**style.LEGEND_RIGHT)
    return figure


def recall_vs_dim(dims, recall, *, intervals=None, published, title) -> Figure:
    """Draw R@1 against descriptor dimensions.

    `dims`, `recall` and `intervals` map a method to numbers, `published` a label to (dims, recalls).
    """
    figure, axis = style.panels(7.6, 4.6)
    for i, (name, values) in enumerate(recall.items()):
        axis.plot(dims[name], values, label=name, zorder=3, **mark(i))
        if intervals:
            axis.fill_between(dims[name], *intervals[name], color=mark(i)["color"], alpha=0.16, linewidth=0)
    for j, (label, (x, y)) in enumerate(published.items()):
        published_points(axis, x, y, label, j, (":", "--", "-.")[j % 3])
    axis.set_xscale("log", base=2)
    sizes = np.unique(np.concatenate([*dims.values(), *(x for x, _ in published.values())]))
    ticks = sizes[np.append(sizes[1:] / sizes[:-1] > 1.55, True)]  # as many as can be read
    axis.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks], rotation=30)
    axis.minorticks_off()
    axis.set(xlabel="dimensions of the descriptor", ylabel="R@1 (%)", title=title)
    axis.legend(**style.LEGEND_RIGHT)
    return figure


def methods_compared(groups: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw R@1 and the size of the descriptor of each method, a block of rows for each group, best above.

    A group, named by who measured it on what, is a table with the columns label, context, dim, recall, and
    low and high, the ends of the interval, where there is one. A filled mark is a descriptor of one image
    alone (context none, solo or anchors), an open one depended on its batch.
    """
    sizes = [len(table) for table in groups.values()]
    figure, axes = style.panels(
        9.6, 1.6 + 0.27 * sum(sizes) + 0.5 * len(sizes), len(sizes), 2, squeeze=False,
        height_ratios=sizes, width_ratios=(3, 1), sharey="row",
    )  # fmt: skip
    for (left, right), (title, table), tint in zip(axes, groups.items(), (GREY, BLUE, GREEN), strict=False):
        table, y = table.sort_values("recall", ascending=False), np.arange(len(table))
        alone = ~table["context"].str.match("sorted|shuffled").to_numpy()
        if "low" in table:
            ends = style.error_bars(table["recall"], table["low"], table["high"])
            left.errorbar(table["recall"], y, xerr=ends, fmt="none", ecolor=BLACK, capsize=3, zorder=2)
        kinds = (alone, tint, "one image alone"), (~alone, "white", "depends on its batch")
        for which, face, label in kinds:
            look = {"s": 60, "facecolors": face, "edgecolors": tint, "linewidths": 1.8, "label": label}
            left.scatter(table["recall"][which], y[which], zorder=3, **look)
        left.set(yticks=y, yticklabels=table["label"], ylim=(len(table) - 0.4, -0.6), xlabel="R@1 (%)")
        left.set_title(title, loc="left", fontsize=12)
        right.barh(y, table["dim"].astype("Float64").fillna(1), color=tint, alpha=0.45, height=0.6)
        for row, size in zip(y, table["dim"], strict=True):
            label = "not stated" if pd.isna(size) else f"{size:,}"
            style.write(right, label, (1, row), (3, 0), va="center", fontsize=10)
        right.set(xscale="log", xlim=(1, 1e5), xticks=[], xlabel="dimensions (log)")
        for axis in (left, right):
            axis.grid(axis="y", visible=False)
    figure.legend(handles=axes[0, 0].get_legend_handles_labels()[0], **style.LEGEND_BELOW)
    return figure


def recall_vs_parameters(names, parameters, recall, low=(), high=(), *, published, title) -> Figure:
    """Draw R@1 of each method at its number of trainable parameters.

    Methods that train nothing stand together on the left, and those with nearly equal numbers side by side,
    or their intervals would cover each other. `published` maps a label to (parameters, recall).
    """
    x = np.asarray(parameters, dtype=float)
    counts = np.append(x, [number for number, _ in published.values()])
    start = 10.0 ** np.floor(np.log10(np.min(counts, where=counts > 0, initial=1e6)))
    order = np.argsort(x, kind="stable")
    new = np.flatnonzero(x[order][1:] > 1.08 * x[order][:-1]) + 1
    figure, axis = style.panels(7.8, 4.8)
    for group in np.split(order, new):
        for i, shift in zip(group, 0.12 * (np.arange(len(group)) - (len(group) - 1) / 2), strict=True):
            label = f"{names[i]} ({style.count(x[i])}{'' if np.isfinite(recall[i]) else ', not run'})"
            ends, at = style.error_bars(recall[i], low[i], high[i])[:, None], x[i] + shift * (x[i] or start)
            axis.errorbar(at, recall[i], ends, markersize=9, linestyle="", capsize=3, label=label, **mark(i))
    for j, (label, (number, value)) in enumerate(published.items()):
        published_points(axis, [number], [value], f"{label} ({style.count(number)})", j)
    left, ticks = start / 1.2, start * 10.0 ** np.arange(9)
    if (counts == 0).any():
        axis.set_xscale("symlog", linthresh=start, linscale=0.6)
        left, ticks = -start * (0.2 + 0.09 * np.count_nonzero(x == 0)), np.append(0, ticks)
    else:
        axis.set_xscale("log")
    axis.set_xticks(ticks, [style.count(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlim(left, max(2 * counts.max(), 11 * start))
    axis.set(xlabel="trainable parameters", ylabel="R@1 (%)", title=title)
    axis.legend(**style.LEGEND_RIGHT)
    return figure


def precision_recall(curves: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw precision against recall over all thresholds: tables with these two columns, by name."""
    figure, axis = style.panels(7.6, 4.6)
    for i, (name, curve) in enumerate(curves.items()):
        x, y = np.append(0, 100 * curve["recall"]), np.append(100, 100 * curve["precision"])
        axis.plot(x, y, label=name, **mark(i) | {"marker": ""})
    axis.set(xlim=(0, 101), ylim=(0, 103), xlabel="recall of the queries that have a positive (%)")
    axis.set(ylabel="precision of the answers (%)", title="Answer, or say that it is not in the map?")
    figure.legend(**style.LEGEND_BELOW | {"ncols": 2})
    return figure


def aid_bars(names, aid, low, high, *, per_class) -> Figure:
    """Draw average intra-class distances (n,) with their intervals, and every class's own as a dot."""
    figure, axis = style.panels(7.6, 1.7 + 0.55 * len(names))
    y = np.arange(len(names))[::-1]
    for i, (row, values) in enumerate(zip(y, per_class, strict=True)):
        axis.barh(row, aid[i], height=0.62, color=PALETTE[i % 8], alpha=0.45)
        shift = ((np.arange(len(values)) * 0.618) % 1 - 0.5) * 0.45
        axis.scatter(values, row + shift, s=14, color=DARK, alpha=0.6, linewidths=0, zorder=3)
    axis.errorbar(aid, y, xerr=style.error_bars(aid, low, high), fmt="o", color=BLACK, capsize=4, zorder=4)
    axis.set(yticks=y, yticklabels=names, xlim=(0, None))
    axis.set_xlabel("mean L2 distance of two unit descriptors of one place (0-2)")
    axis.grid(axis="y", visible=False)
    axis.set_title("Average intra-class distance (lower: a place's images lie closer)", fontsize=12)
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


def graph_cost(names, seconds, added_pct, *, kind, once) -> Figure:
    """Draw the time of making the graph and, where known, what it adds to an epoch; arrays (n,).

    `seconds` of one making, and percents added to the time of an epoch's steps (NaN unknown); `kind` is
    "measured", "estimated" (reckoned), or "published" (the paper's, on the paper's machine); what is paid
    `once`, not each epoch, adds nothing to an epoch.
    """
    seconds, added = np.asarray(seconds, dtype=float), np.asarray(added_pct, dtype=float)
    figure, (time, share) = style.panels(9.6, 1.9 + 0.52 * len(names), 1, 2, sharey=True, width_ratios=(3, 2))
    y = np.arange(len(names))[::-1]
    for axis, values, text in ((time, seconds, duration), (share, added, lambda v: f"+{v:.1f} %")):
        bars = axis.barh(y, np.nan_to_num(values), height=0.62)
        for bar, row, value, of, single in zip(bars, y, values, kind, once, strict=True):
            bar.set(**COSTS[of])
            known = np.isfinite(value)
            label = text(value) if known else "paid once" if single else "not known"
            tint = BLACK if known else GREY
            style.write(axis, label, (np.nan_to_num(value), row), va="center", color=tint)
        axis.grid(axis="y", visible=False)
    positive = seconds[seconds > 0]
    if len(positive):
        time.set_xscale("log")
        time.set_xlim(positive.min() / 3, positive.max() * 12)
        time.xaxis.set_major_formatter("{x:,g}")
    share.set(xlim=(0, 1.5 * np.nanmax([*added, 0]) or 1.5), xlabel="added to an epoch's steps (%)")
    time.set(yticks=y, yticklabels=names, xlabel="time (s)")
    if len(set(kind)) > 1:
        shown = [Patch(**look) for one, look in COSTS.items() if one in set(kind)]
        figure.legend(handles=shown, **style.LEGEND_BELOW)
    figure.suptitle("What making the graph costs")
    return figure


def context_audit(audits: Mapping[str, Mapping]) -> Figure:
    """Draw R@1 of checkpoints against which images shared a batch with each other.

    Of each: batch sizes ``n`` (m,); R@1 of name-sorted batches, ``sorted`` (m,), and of r shuffles,
    ``shuffled`` (m, r), NaN not run; ``none`` (head off), ``solo`` (batches of one), ``anchors`` (a fixed
    set), or None.
    """
    figure, axes = style.tiles(len(audits), 3, (3.4, 3.6), margin=(1.2, 1.0))
    for axis, (name, audit) in zip(axes.flat, audits.items(), strict=False):
        n, shuffled = np.asarray(audit["n"]), np.ma.masked_invalid(np.asarray(audit["shuffled"], dtype=float))
        axis.plot(n, audit["sorted"], color=RED, marker="s", label="sorted by name")
        axis.plot(n, shuffled.mean(axis=1), color=BLUE, marker="o", label="shuffled: mean")
        band = {"color": BLUE, "alpha": 0.22, "linewidth": 0, "label": f"shuffled: all {shuffled.shape[1]}"}
        axis.fill_between(n, shuffled.min(axis=1), shuffled.max(axis=1), **band)
        for key, tint, dash in (("none", BLACK, ":"), ("solo", GREEN, "-."), ("anchors", PURPLE, "--")):
            if audit[key] is not None:
                axis.axhline(audit[key], color=tint, linestyle=dash, label=key.replace("none", "head off"))
        axis.set_xscale("log", base=2)
        axis.set_xticks(n, [str(v) for v in n])
        axis.margins(y=0.12)
        axis.set_title(textwrap.fill(name, 28), fontsize=12)
        axis.set_xlabel("images in a batch")
    for axis in axes[:, 0]:
        axis.set_ylabel("R@1 (%)")
    figure.legend(handles=axes[0, 0].get_legend_handles_labels()[0], **style.LEGEND_BELOW)
    figure.suptitle("The same checkpoint, other company in the batch")
    return figure


def sideways_shift(table: pd.DataFrame) -> Figure:
    """Draw R@1 and its interval against the shift of the queries, of `workbench.probes.sideways_shift`."""
    figure, axes = style.tiles(table["dataset"].nunique(), 2, (4.6, 3.6))
    for axis, (dataset, found) in zip(axes.flat, table.groupby("dataset", sort=False), strict=False):
        for i, (name, rows) in enumerate(found.groupby("model", sort=False)):
            shift, look = 100 * rows["shift"], mark(i)
            axis.plot(shift, rows["R@1"], label=name, zorder=3, **look)
            axis.fill_between(shift, rows["low"], rows["high"], color=look["color"], alpha=0.1, linewidth=0)
        axis.set(xlabel="shift of the queries (% of width)", ylabel="R@1 (%)", title=dataset)
    figure.legend(handles=axes[0, 0].get_legend_handles_labels()[0], **style.LEGEND_BELOW)
    figure.suptitle("The queries' windows shifted sideways")
    return figure


def ablation_figure(
    names, recall, difference, low, high, *, reference, plateau, smallest_visible, k, title
) -> Figure:
    """Draw an ablation: every seed's R@k, and the paired difference against the full method.

    `recall`, `plateau` (C, S), of S seeds: percents, NaN not run, and which ended on the plateau (crosses).
    `difference`, `low`, `high` (C,): points against configuration `reference` without those runs, with the
    paired 95 % interval. `smallest_visible`: the smallest difference that the set could show, or None.
    """
    recall, plateau = np.asarray(recall, dtype=float), np.asarray(plateau, dtype=bool)
    difference, low, high = (np.asarray(v, dtype=float) for v in (difference, low, high))
    figure, (left, right) = style.panels(9.6, 2.3 + 0.5 * len(names), 1, 2, sharey=True)
    y = np.arange(len(names))[::-1]
    rows, sound = np.broadcast_to(y[:, None], recall.shape), np.where(plateau, np.nan, recall)
    left.scatter(sound, rows, s=32, color=SKY, zorder=2, label="a seed")
    if plateau.any():
        cross = {"marker": "x", "color": RED, "label": "ended on the plateau"}
        left.scatter(recall[plateau], rows[plateau], s=45, zorder=2, **cross)
    seeds = pd.DataFrame(sound)
    bar = {"fmt": "|", "color": BLUE, "markersize": 18, "markeredgewidth": 2.5, "capsize": 4}
    left.errorbar(seeds.mean(axis=1), y, xerr=seeds.std(axis=1), label="mean, standard deviation", **bar)
    for row in y[np.isnan(recall).all(axis=1)]:
        at = {"transform": left.get_yaxis_transform(), "ha": "right", "va": "center"}
        left.text(0.97, row, "not run", color=GREY, **at)
    clear = (low > 0) | (high < 0)
    point = {"fmt": "o", "color": BLUE, "markersize": 8, "markeredgewidth": 2, "capsize": 4}
    for which, fill, label in ((clear, BLUE, "without zero"), (~clear, "white", "with zero")):
        ends = style.error_bars(difference[which], low[which], high[which])
        look = point | {"markerfacecolor": fill, "label": f"interval {label}"}
        right.errorbar(difference[which], y[which], xerr=ends, **look)
    right.text(0, y[reference], "  the full method", va="center", color=DARK)
    right.axvline(0, color=BLACK, linewidth=1.2)
    if smallest_visible is not None:
        band = {"color": "#e9e9e9", "label": "smaller than any row mostly shows"}
        right.axvspan(-smallest_visible, smallest_visible, zorder=0, **band)
    left.set(yticks=y, yticklabels=names, ylim=(-0.6, len(names) - 0.4), xlabel=f"R@{k} (%)")
    right.set_xlabel(f"difference in R@{k} (points), paired 95 %")
    figure.legend(**style.LEGEND_BELOW)
    figure.suptitle(title)
    return figure


def loss_curve(step, loss, *, plateau=None, epoch_steps=()) -> Figure:
    """Draw the loss of every step, its running mean, the plateau to leave, and where epochs begin."""
    loss = pd.Series(loss, dtype=float)
    mean = loss.rolling(max(len(loss) // 25, 1), min_periods=1).mean()
    figure, axis = style.panels(7.6, 4.4)
    axis.plot(step, loss, color=BLUE, alpha=0.28, linewidth=1)
    axis.plot(step, mean, color=BLUE, label="loss")
    for at in epoch_steps:
        axis.axvline(at, color="#8c8c8c", linewidth=1, zorder=0)
    if plateau is not None:
        axis.axhline(plateau, color=BLACK, linestyle="--", linewidth=1.6, label=f"plateau: {plateau:.3f}")
        axis.legend()
    axis.set(xlabel="step", ylabel="loss", ylim=(0, None), title="Training loss")
    return figure


def training_rates(step, images_per_s, live_pairs_pct, learning_rate) -> Figure:
    """Draw throughput, the share of pairs that still give a gradient, and the learning rate; arrays (n,)."""
    rates = {"images a second": images_per_s, "pairs with a\ngradient (%)": live_pairs_pct}
    table = pd.DataFrame(rates | {"learning rate": learning_rate}, index=step, dtype=float)
    figure, axes = style.panels(7.6, 6.6, 3, 1, sharex=True)
    table.plot(subplots=True, ax=axes, legend=False, xlabel="step", title="How training went")
    for axis, label in zip(axes, table, strict=True):
        axis.set(ylim=(0, None), ylabel=label)
    return figure


def recall_per_epoch(epoch, recall: Mapping, *, best: int) -> Figure:
    """Draw validation recall, a mapping of "R@1", "R@5", ... to percents (n,), and which epoch was kept."""
    figure, axis = style.panels(7.6, 4.4)
    for i, (name, values) in enumerate(recall.items()):
        axis.plot(epoch, values, label=name, zorder=3, **mark(i))
    axis.axvline(best, color=ORANGE, linewidth=6, alpha=0.35, zorder=0, label=f"best: epoch {best}")
    style.whole_ticks(axis.xaxis)
    axis.set(xlabel="epoch", ylabel="recall (%)", title="Validation recall")
    axis.legend(**style.LEGEND_RIGHT)
    return figure
