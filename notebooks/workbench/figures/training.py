"""A training run: its loss, its speed, and the recall after each epoch."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from workbench.figures import style
from workbench.figures.style import BLACK, BLUE, GREEN, ORANGE, RED, colour, marker, styled


@styled
def loss_curve(step, loss, *, plateau=None, epoch_steps=()) -> Figure:
    """Draw the loss of every step, its running mean, the plateau to leave, and where epochs begin.

    The plateau is the loss of a batch whose similarities all equal the base, a trivial resting place:
    log K + log(P K - K + 1) / beta for the multi-similarity loss.
    """
    import pandas as pd

    loss = pd.Series(np.asarray(loss, dtype=float))
    mean = loss.rolling(max(len(loss) // 25, 1), min_periods=1).mean()
    figure, axis = style.panel(7.6, 4.4)
    axis.plot(step, loss, color=BLUE, alpha=0.28, linewidth=1)
    axis.plot(step, mean, color=BLUE, label="loss")
    for at in epoch_steps:
        axis.axvline(at, color="#d9d9d9", linewidth=1, zorder=0)
    if plateau is not None:
        axis.axhline(plateau, color=BLACK, linestyle="--", linewidth=1.6, label=f"plateau: {plateau:.3f}")
        axis.legend()
    axis.set_ylim(bottom=0)
    axis.set(xlabel="step", ylabel="loss", title="Training loss")
    return figure


@styled
def training_rates(step, images_per_s, live_pairs_pct, learning_rate) -> Figure:
    """Draw throughput, the share of pairs that still give a gradient, and the learning rate; arrays (n,)."""
    figure, axes = style.panels(3, 1, (7.6, 6.6), sharex=True)
    for axis, label, values, line in (
        (axes[0, 0], "images a second", images_per_s, BLUE),
        (axes[1, 0], "pairs with a\ngradient (%)", live_pairs_pct, RED),
        (axes[2, 0], "learning rate", learning_rate, GREEN),
    ):
        axis.plot(step, np.asarray(values, dtype=float), color=line)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_locator(MaxNLocator(4))
    axes[-1, 0].set_xlabel("step")
    figure.suptitle("How training went")
    return figure


@styled
def recall_per_epoch(epoch, recall: Mapping, *, best: int) -> Figure:
    """Draw validation recall, a mapping of "R@1", "R@5", ... to percents (n,), and which epoch was kept."""
    figure, axis = style.panel(7.6, 4.4)
    for i, (name, values) in enumerate(recall.items()):
        axis.plot(epoch, values, color=colour(i), marker=marker(i), label=name, zorder=3)
    axis.axvline(best, color=ORANGE, linewidth=6, alpha=0.35, zorder=0, label=f"best: epoch {best}")
    style.whole_ticks(axis.xaxis)
    axis.set(xlabel="epoch", ylabel="recall (%)", title="Validation recall")
    style.legend_right(axis)
    return figure
