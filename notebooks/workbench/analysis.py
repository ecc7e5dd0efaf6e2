"""Numbers for figures: arrays in, arrays out.

What t-SNE maps, intra-class distances, heatmaps, contributions of patches and lists of failures show, apart from the
drawing of it (`workbench.figures`).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sagelib.places import heading_difference
from sagelib.retrieval import bootstrap_mean
from sagelib.runs import rng

__all__ = [
    "IntraClassDistance",
    "LabelPreference",
    "LocalFeatures",
    "audit_arrays",
    "average_intra_class_distance",
    "choose_places",
    "describe_patches",
    "entropy",
    "graph_cost_table",
    "graph_costs",
    "inter_class_distance",
    "integrated_contributions",
    "label_preference",
    "label_shares",
    "log_arrays",
    "mass_on_labels",
    "neighbour_purity",
    "paired_difference",
    "patch_similarity",
    "ranking_arrays",
    "score_contributions",
    "sort_failures",
    "split_by_heading",
    "suspects",
    "suspicion",
    "town_labels",
    "true_references",
    "tsne",
    "unit",
]


# --- descriptors -----------------------------------------------------------------------------------------------


def unit(descriptors) -> np.ndarray:
    """Bring each row (n, D) to length 1, in float64; a row of zeros or of what is not finite is refused."""
    values = np.asarray(descriptors, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"descriptors must have shape (n, D), got {values.shape}")
    length = np.linalg.norm(values, axis=1)
    bad = np.flatnonzero(~np.isfinite(length) | (length == 0))
    if len(bad):
        raise ValueError(
            f"descriptors must have finite rows other than zero: row {bad[0]} is not ({len(bad)} such)"
        )
    return values / length[:, None]


def tsne(descriptors, *, seed: int = 0, perplexity: float = 10.0) -> np.ndarray:
    """Map descriptors to the plane by t-SNE (van der Maaten and Hinton, JMLR 2008), scikit-learn's.

    Rows are brought to unit length, reduced to their first 50 principal components, and start from the first two, with noise of
    a tenth of their spread that the seed decides: what another seed changes was never there. Distances between far clusters in the result mean nothing, and neither do its axes.

    Parameters
    ----------
    descriptors : array (n, D)
    seed : int
    perplexity : float
        About how many neighbours each point minds, 1 <= perplexity < n; near the images of a place is sensible.

    Returns
    -------
    array (n, 2) of float32
        The same for the same arguments on one machine and one set of versions.
    """
    import threadpoolctl
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    values = unit(descriptors)
    if len(values) < 3:
        raise ValueError(f"t-SNE needs at least 3 descriptors, got {len(values)}")
    if not 1 <= perplexity < len(values):
        raise ValueError(
            f"perplexity must be in [1, {len(values)}) for {len(values)} descriptors, got {perplexity}"
        )
    values = PCA(min(50, *values.shape), svd_solver="full").fit_transform(values)
    start = "random"
    if values.shape[1] >= 2:
        start = values[:, :2] / max(values[:, 0].std(), 1e-12) + rng(seed, "t-SNE").normal(
            0, 0.1, (len(values), 2)
        )
        start = (1e-4 * start).astype(np.float32)  # the scale that scikit-learn starts from
    method = TSNE(2, perplexity=perplexity, init=start, random_state=seed)
    with threadpoolctl.threadpool_limits(1):  # threads would change the last digits, which t-SNE makes large
        return method.fit_transform(values.astype(np.float32))


def choose_places(labels, *, places: int, images: int | None = None, seed: int = 0) -> np.ndarray:
    """Choose places at random and images of each, for a figure that all methods share.

    Parameters
    ----------
    labels : array (n,) of int
        -1: no place.
    places : int
        How many, among those with at least two images (or `images`).
    images : int, optional
        So many images of each; ``None`` takes all.
    seed : int

    Returns
    -------
    array of int
        Indices, place by place.
    """
    labels = np.asarray(labels)
    names, counts = np.unique(labels[labels >= 0], return_counts=True)
    enough = names[counts >= (images or 2)]
    if len(enough) < places:
        raise ValueError(
            f"places asks for {places} places of at least {images or 2} images, and there are {len(enough)}"
        )
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(enough, places, replace=False))
    members = [np.flatnonzero(labels == name) for name in chosen]
    if images is not None:
        members = [np.sort(rng.choice(m, images, replace=False)) for m in members]
    return np.concatenate(members)


def split_by_heading(labels, heading_deg, *, max_heading_deg: float = 45.0) -> np.ndarray:
    """Split places into views: photographs of one place that look the same way.

    Within a place, the first photograph without a view leads one, and all others that look the same way as it join,
    so two photographs of a view differ by at most twice the angle.

    Parameters
    ----------
    labels : array (n,) of int
        -1: no place, and no view.
    heading_deg : array (n,)
        Degrees clockwise from north; photographs without one (NaN) are a view of their own in each place.
    max_heading_deg : float
        Largest angle to the leader, 0 < max_heading_deg <= 180.

    Returns
    -------
    array (n,) of int
        Labels from 0 in order of places, -1 where there is none.
    """
    labels, heading = np.asarray(labels), np.asarray(heading_deg, dtype=np.float64)
    if labels.shape != heading.shape or labels.ndim != 1:
        raise ValueError(
            f"labels and heading_deg must have shape (n,), got {labels.shape} and {heading.shape}"
        )
    if not 0 < max_heading_deg <= 180:
        raise ValueError(f"max_heading_deg must be in (0, 180], got {max_heading_deg}")
    views, count = np.full(len(labels), -1), 0
    for place in np.unique(labels[labels >= 0]):
        left = np.flatnonzero(labels == place)
        while len(left):
            turn = heading_difference(heading[left], heading[left[0]])
            joins = np.isnan(heading[left]) if np.isnan(heading[left[0]]) else turn <= max_heading_deg
            views[left[joins]] = count
            left, count = left[~joins], count + 1
    return views


@dataclass(frozen=True, kw_only=True)
class IntraClassDistance:
    """Average intra-class distance, and what it is the average of.

    Attributes
    ----------
    value, low, high : float
        Mean over the classes, and its 95 % interval over resampled classes.
    classes : array (C,)
        Labels of the classes that have at least two images.
    per_class : array (C,)
        Mean distance of two images, each class.
    left_out : int
        Classes of one image, which have no pair.
    """

    value: float
    low: float
    high: float
    classes: np.ndarray
    per_class: np.ndarray
    left_out: int

    def by_class(self) -> dict[int, float]:
        """Map each class to its own distance."""
        return {int(c): float(v) for c, v in zip(self.classes, self.per_class, strict=True)}


def average_intra_class_distance(
    descriptors, labels, *, seed: int = 0, draws: int = 2000, level: float = 0.95
) -> IntraClassDistance:
    """Measure how far images of one place lie apart: the mean over the places of the mean over their pairs.

    The distance is L2 between descriptors of unit length: between 0 (equal) and 2 (opposite), without a unit;
    sqrt(2) is unrelated. Every place counts the same, however many images it has. The interval resamples places
    (percentile bootstrap), so it speaks about other places of the same kind.

    Parameters
    ----------
    descriptors : array (n, D)
    labels : array (n,) of int
        -1: no place, left out.
    seed, draws, level
        Of the bootstrap.
    """
    values, labels = unit(descriptors), np.asarray(labels)
    if labels.shape != (len(values),):
        raise ValueError(f"labels must have shape ({len(values)},), got {labels.shape}")
    names, counts = np.unique(labels[labels >= 0], return_counts=True)
    classes = names[counts >= 2]
    if not len(classes):
        raise ValueError("no class has two images, so there is no intra-class distance")
    per_class = np.array([_mean_distance(values[labels == name]) for name in classes])
    value, low, high = bootstrap_mean(per_class, seed, draws=draws, level=level)
    return IntraClassDistance(
        value=value,
        low=low,
        high=high,
        classes=classes,
        per_class=per_class,
        left_out=int((counts < 2).sum()),
    )


def _mean_distance(rows: np.ndarray) -> float:
    i, j = np.triu_indices(len(rows), 1)
    return float(np.linalg.norm(rows[i] - rows[j], axis=1).mean())


def inter_class_distance(descriptors, labels) -> np.ndarray:
    """Mean distance from the images of each class to those of all other classes.

    L2 between descriptors of unit length, the scale against which `average_intra_class_distance` can be read: a
    space in which everything lies close has both small.

    Parameters
    ----------
    descriptors : array (n, D)
    labels : array (n,) of int
        -1: no place, left out.

    Returns
    -------
    array (C,)
        Of the classes that have at least two images, in ascending order, as `IntraClassDistance.classes`.
    """
    values, labels = unit(descriptors), np.asarray(labels)
    if labels.shape != (len(values),):
        raise ValueError(f"labels must have shape ({len(values)},), got {labels.shape}")
    names, counts = np.unique(labels[labels >= 0], return_counts=True)
    if len(names) < 2:
        raise ValueError(f"a distance between classes needs two of them, got {len(names)}")
    return np.array(
        [
            _cross_distances(values[labels == name], values[(labels != name) & (labels >= 0)]).mean()
            for name in names[counts >= 2]
        ]
    )


def neighbour_purity(points, labels) -> np.ndarray:
    """Whether the nearest other point of each point is of its class: (n,) of bool.

    Parameters
    ----------
    points : array (n, D)
        Descriptors (`unit` first) or their t-SNE map.
    labels : array (n,) of int
    """
    points, labels = np.asarray(points, dtype=np.float64), np.asarray(labels)
    if labels.shape != (len(points),) or len(points) < 2:
        raise ValueError(f"labels must be one for each of at least 2 points, got {labels.shape}")
    apart = _cross_distances(points, points)
    np.fill_diagonal(apart, np.inf)
    return labels[apart.argmin(axis=1)] == labels


def _cross_distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    squares = (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1) - 2 * first @ second.T
    return np.sqrt(np.maximum(squares, 0))


def paired_difference(first, second, *, seed: int = 0, draws: int = 2000, level: float = 0.95):
    """Mean of first - second over the same items, with a bootstrap interval over items: (value, low, high)."""
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if first.shape != second.shape:
        raise ValueError(
            f"first and second must be of the same items, got shapes {first.shape} and {second.shape}"
        )
    return bootstrap_mean(first - second, seed, draws=draws, level=level)


def true_references(database, queries, positives, *, max_heading_deg: float | None = None) -> np.ndarray:
    """Choose one true reference for each query: the nearest of its positives that looks the same way.

    Parameters
    ----------
    database, queries : sagelib.places.Places
    positives : sequence of arrays
        Rows of the references that answer each query (`sagelib.places.positives`).
    max_heading_deg : float, optional
        Largest angle between the two headings; ``None``, or an unknown heading of either, takes the nearest.

    Returns
    -------
    array (n, 2) of int
        Rows of query and reference; queries without such a reference are left out.
    """
    pairs = []
    for query, rows in enumerate(positives):
        rows = np.asarray(rows, dtype=np.int64)
        if max_heading_deg is not None:
            turn = heading_difference(database.heading_deg[rows], queries.heading_deg[query])
            rows = rows[np.isnan(turn) | (turn <= max_heading_deg)]
        if len(rows):
            away = (
                database.east_m[rows] - queries.east_m[query],
                database.north_m[rows] - queries.north_m[query],
            )
            pairs.append((query, rows[np.hypot(*away).argmin()]))
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


# --- heatmaps --------------------------------------------------------------------------------------------------


def entropy(weights, axis: int = -1) -> np.ndarray:
    """Entropy of weights brought to sum 1, as a share of the largest possible: 1 is uniform, 0 a single patch.

    Parameters
    ----------
    weights : array, not negative
    axis : int
        Along the patches.
    """
    weights = np.asarray(weights, dtype=np.float64)
    if (weights < 0).any() or not np.isfinite(weights).all():
        raise ValueError("weights must be finite and not negative")
    total = weights.sum(axis=axis, keepdims=True)
    if (total == 0).any():
        raise ValueError("weights must not all be zero")
    n = weights.shape[axis]
    if n == 1:
        return np.ones_like(total.squeeze(axis))
    share = weights / total
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    return -(share * logs).sum(axis=axis) / math.log(n)


def label_shares(labels, grid: tuple[int, int], count: int) -> np.ndarray:
    """Share of each label in the area of each patch.

    Parameters
    ----------
    labels : array (H, W) of int
        Label of each pixel, 0 ... count - 1.
    grid : (h, w)
        Patches; a pixel on a border is divided between its patches by area.
    count : int
        Number of labels.

    Returns
    -------
    array (h * w, count)
        Rows sum to 1.
    """
    labels = np.asarray(labels)
    if labels.ndim != 2 or labels.min() < 0 or labels.max() >= count:
        raise ValueError(
            f"labels must have shape (H, W) and lie in 0 ... {count - 1}, "
            f"got shape {labels.shape} and {labels.min()} ... {labels.max()}"
        )
    rows, columns = _overlap(labels.shape[0], grid[0]), _overlap(labels.shape[1], grid[1])
    shares = [rows @ (labels == label) @ columns.T for label in range(count)]
    return np.stack([share.ravel() for share in shares], axis=1)


def _overlap(pixels: int, cells: int) -> np.ndarray:
    """(cells, pixels): how much of each cell each pixel fills."""
    edges = np.linspace(0, pixels, cells + 1)
    low, high = (
        np.maximum(edges[:-1, None], np.arange(pixels)),
        np.minimum(edges[1:, None], np.arange(pixels) + 1),
    )
    return np.maximum(high - low, 0) * cells / pixels


def mass_on_labels(weights, shares) -> np.ndarray:
    """Share of a heatmap's mass on each label: (L,), summing to 1.

    Parameters
    ----------
    weights : array (N,), not negative
        One a patch; for contributions of both signs, pass their positive part, or their absolute values.
    shares : array (N, L)
        From `label_shares`. Uniform weights give the label's share of the picture.
    """
    weights, shares = np.asarray(weights, dtype=np.float64).ravel(), np.asarray(shares, dtype=np.float64)
    if len(weights) != len(shares):
        raise ValueError(f"shares must have a row for each of the {len(weights)} weights, got {len(shares)}")
    if (weights < 0).any() or weights.sum() == 0:
        raise ValueError("weights must not be negative, and not all zero")
    return weights @ shares / weights.sum()


@dataclass(frozen=True, kw_only=True)
class LabelPreference:
    """Where a method's weight lies, against where a method without preference would have it.

    Attributes
    ----------
    share : array (L,)
        Share of the weight on each label, mean over the pictures.
    area : array (L,)
        Share of the picture that each label covers, mean over the pictures.
    difference, low, high : array (L,)
        share - area, and its 95 % interval over resampled pictures; an interval that contains 0 shows no preference.
    pictures : array (L,) of int
        Pictures in which the label is seen at all.
    """

    share: np.ndarray
    area: np.ndarray
    difference: np.ndarray
    low: np.ndarray
    high: np.ndarray
    pictures: np.ndarray

    @property
    def ratio(self) -> np.ndarray:
        """share / area (NaN where the area is 0): above 1 preferred, below 1 avoided."""
        return np.divide(self.share, self.area, out=np.full(len(self.area), np.nan), where=self.area > 0)


def label_preference(
    weights, shares, *, seed: int = 0, draws: int = 2000, level: float = 0.95
) -> LabelPreference:
    """Compare the share of the weight on each label with that label's share of the picture, over many pictures.

    The interval resamples pictures (percentile bootstrap), each with its own pair of shares.

    Parameters
    ----------
    weights : array (n, N), not negative
        One a patch and picture; for contributions of both signs, their positive part.
    shares : array (n, N, L)
        From `label_shares`, picture by picture.
    seed, draws, level
        Of the bootstrap.
    """
    weights, shares = np.asarray(weights, dtype=np.float64), np.asarray(shares, dtype=np.float64)
    if shares.ndim != 3 or weights.shape != shares.shape[:2]:
        raise ValueError(
            f"weights (n, N) and shares (n, N, L) must agree, got {weights.shape} and {shares.shape}"
        )
    mass = np.stack([mass_on_labels(w, s) for w, s in zip(weights, shares, strict=True)])
    area = shares.mean(axis=1)
    bounds = [bootstrap_mean(d, seed, draws=draws, level=level) for d in (mass - area).T]
    difference, low, high = np.array(bounds).T
    return LabelPreference(
        share=mass.mean(axis=0),
        area=area.mean(axis=0),
        difference=difference,
        low=low,
        high=high,
        pictures=(area > 0).sum(axis=0),
    )


def town_labels(folder, paths: Iterable) -> np.ndarray:
    """Label of each pixel of pictures that `townscape.folder.write_town` wrote, from the renderer.

    The poses are planned again from the folder's settings, found by the names of the files, and rendered once more
    for their labels; light and weather change a picture and never its geometry.

    Parameters
    ----------
    folder : path
        Of the town; holds ``settings.json``.
    paths : iterable of n paths
        Pictures in ``folder/images/<split>/<part>``.

    Returns
    -------
    array (n, H, W) of uint8
        Indices into `townscape.folder.LABELS`.
    """
    from pathlib import Path

    from sagelib.runs import read_json
    from townscape.folder import Town, TownConfig, images_of, plan_shots

    settings = read_json(Path(folder) / "settings.json")
    config, planned, found = TownConfig(**settings["config"]), {}, []
    for path in map(Path, paths):
        part = f"{path.parent.parent.name}/{path.parent.name}"
        if part not in planned:
            towns = [Town(seed, config) for seed in settings["seeds"].get(path.parent.parent.name, ())]
            planned[part] = {
                shot.name: (town, shot)
                for town in towns
                for shot in plan_shots(town, part, images_of(settings, part.split("/")[0]))
            }
        if path.name not in planned[part]:
            raise ValueError(f"{path} is no picture of the town in {folder}: its settings plan no such shot")
        town, shot = planned[part][path.name]
        view = dict(year=shot.year, visit=shot.visit, labels=True)
        found.append(town.render(shot.pose, shot.condition, settings["size"], **view)[1])
    return np.stack(found)


@dataclass(frozen=True, kw_only=True)
class LocalFeatures:
    """What a model sees in pictures before and after its aggregator; on the CPU.

    Attributes
    ----------
    cls : tensor (n, M)
    patches : tensor (n, N, M)
        In row-major order of ``grid``.
    grid : (h, w)
    descriptors : tensor (n, D)
        The aggregator's, before any cross-image head.
    """

    cls: "torch.Tensor"  # noqa: F821
    patches: "torch.Tensor"  # noqa: F821
    grid: tuple[int, int]
    descriptors: "torch.Tensor"  # noqa: F821


def describe_patches(
    model, paths: Iterable, preprocess: Callable, *, batch_size: int = 32, device: str = "auto"
) -> LocalFeatures:
    """Describe pictures and keep their patches: for figures of some dozens, as all of them stay in memory.

    Parameters
    ----------
    model : sagelib.model.SAGE
        Comes back on the CPU, where `score_contributions` wants it.
    paths : iterable of n paths
    preprocess : callable
        Picture -> tensor (3, H, W), see `sagelib.images.Preprocess`.
    batch_size : int
    device : str
        See `sagelib.describe.pick_device`.
    """
    import torch

    from sagelib.describe import pick_device
    from sagelib.images import load_image

    if not hasattr(model, "local_features"):
        name = getattr(model, "__name__", type(model).__name__)
        raise ValueError(f"{name} has no patches: give a model with a backbone and an aggregator")
    images, device = [preprocess(load_image(path)) for path in paths], pick_device(device)
    model, parts = model.to(device).eval(), []
    with torch.no_grad():
        for start in range(0, len(images), batch_size):
            cls, patches, grid = model.local_features(
                torch.stack(images[start : start + batch_size]).to(device)
            )
            parts.append(
                [part.float().cpu() for part in (cls, patches, model.aggregator(cls, patches, grid))]
            )
    model.to("cpu")
    cls, patches, descriptors = (torch.cat(part) for part in zip(*parts, strict=True))
    return LocalFeatures(cls=cls, patches=patches, grid=grid, descriptors=descriptors)


def patch_similarity(query_patches, reference_patches, index: int) -> np.ndarray:
    """Cosine of one patch of a picture, (N, M), with every patch of another, (N', M): (N',)."""
    query, reference = unit(query_patches), unit(reference_patches)
    if not 0 <= index < len(query):
        raise ValueError(f"index must lie in 0 ... {len(query) - 1}, got {index}")
    return reference @ query[index]


def score_contributions(
    aggregator, cls, patches, grid: tuple[int, int], other, *, steps: int = 32
) -> np.ndarray:
    """Share out the matching score ``descriptor . other`` between an image's patches.

    Where the aggregator is a sum over its patches once its own weights and lengths are held at their values (mean,
    GeM, NetVLAD, SALAD, Soft Probing), the shares are exact: they add up to the score less what comes from the
    class token and from biases. Otherwise (MixVPR, BoQ, an InteractHead behind) they are
    `integrated_contributions`, which add up to the score less that of an image of constant patches. The two kinds
    have other zeros, so compare where the mass lies between methods, not the values.

    A patch stands for the backbone's output at its place, which has seen the whole image.

    Parameters
    ----------
    aggregator : module
        With ``forward(cls, patches, grid)``; used as it is, so put it into evaluation mode.
    cls, patches : tensors (B, M) and (B, N, M)
    grid : (h, w)
    other : tensor (B, D) or (D,)
        Descriptors of the other picture of each pair.
    steps : int
        Of the path, where the shares are not exact.

    Returns
    -------
    array (B, N) of float64
    """
    import torch

    exact = getattr(aggregator, "patch_contributions", None)
    if exact is not None:
        with torch.no_grad():
            return exact(cls, patches, grid, other).double().cpu().numpy()
    return integrated_contributions(lambda x: aggregator(cls, x, grid), patches, other, steps=steps)


def integrated_contributions(describe: Callable, patches, other, *, steps: int = 32) -> np.ndarray:
    """Share out ``describe(patches) . other`` by integrated gradients from constant patches.

    Sundararajan, Taly and Yan, "Axiomatic Attribution for Deep Networks" (ICML 2017): from every patch replaced by
    the image's mean patch, on a straight line to the patches, the gradient is averaged (midpoint rule) and
    multiplied with the way. The shares add up to the difference of the two scores, up to the error of `steps`; a
    layer norm along the positions (MixVPR) jumps where constant patches begin to differ, and that jump is missed.
    One step is gradient times (patch - mean), half way.

    Parameters
    ----------
    describe : callable
        Tensor (B, N, M) -> tensor (B, D), each image on its own.
    patches : tensor (B, N, M)
    other : tensor (B, D) or (D,)
    steps : int

    Returns
    -------
    array (B, N) of float64
    """
    import torch

    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    patches = patches.detach()
    start = patches.mean(dim=1, keepdim=True)
    way, total = patches - start, torch.zeros_like(patches)
    for step in range(steps):
        at = (start + (step + 0.5) / steps * way).requires_grad_()
        with torch.enable_grad():
            score = (describe(at) * other).sum()
            # An aggregator that reads no patch has no gradient at all.
            gradient = torch.autograd.grad(score, at, allow_unused=True)[0] if score.requires_grad else None
        if gradient is not None:
            total += gradient / steps
    return (total * way).sum(dim=-1).double().cpu().numpy()


# --- graph and training ----------------------------------------------------------------------------------------


def log_arrays(rows: Iterable[Mapping], kind: str) -> dict[str, np.ndarray]:
    """Turn the lines of a training log into columns.

    Parameters
    ----------
    rows : iterable of mappings
        As ``Run.read_log`` gives them; lines of another ``kind`` are left out.
    kind : str
        "step" or "epoch".

    Returns
    -------
    dict of arrays
        One for each number in the lines, NaN where a line lacks it; a number within a mapping is named by its path:
        ``{"recall": {"1": 40.0}}`` gives ``recall.1``.
    """
    lines = [dict(_numbers(row)) for row in rows if row.get("kind") == kind]
    names = dict.fromkeys(name for line in lines for name in line)
    return {name: np.array([line.get(name, np.nan) for line in lines], dtype=float) for name in names}


def _numbers(row: Mapping, path: str = ""):
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{path}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{path}{key}", float(value)


def graph_costs(rows: Iterable[Mapping]) -> dict:
    """What making the graph cost a training, from its log.

    Parameters
    ----------
    rows : iterable of mappings
        As ``Run.read_log`` gives them, of a training with mined places.

    Returns
    -------
    dict
        ``schedule`` ("online" or "static"); ``images`` of the mined source; ``described``, images described at each
        refresh (mean); ``seconds`` of a refresh (mean); ``train_seconds`` of an epoch's steps (mean); ``added_pct``, the
        seconds of all refreshes in percent of those of all steps; ``all_images_seconds``, an *estimate* of describing
        every image once, at the rate of this log.

    Raises
    ------
    ValueError
        If the log tells of no epoch with a graph.
    """
    epochs = [row for row in rows if row.get("kind") == "epoch" and row.get("graph", {}).get("mined")]
    graphs = [row["graph"]["mined"] for row in epochs]
    # A report stands in the log until the next refresh, so a graph counts in the epoch that made it.
    made = [i for i, graph in enumerate(graphs) if graph.get("refreshed_epoch") == graph.get("epoch")]
    if not made:
        raise ValueError("this log tells of no epoch with a graph")
    described = sum(graphs[i]["described_images"] for i in made)
    rate = sum(graphs[i]["seconds_describe"] for i in made) / max(described, 1)
    train = [row["seconds"]["train"] for row in epochs]
    refresh = [epochs[i]["seconds"]["refresh"] for i in made]
    return {
        "schedule": graphs[0]["schedule"],
        "images": graphs[0]["images"],
        "described": described / len(made),
        "seconds": sum(refresh) / len(made),
        "train_seconds": sum(train) / len(train),
        "added_pct": 100 * sum(refresh) / max(sum(train), 1e-9),
        "all_images_seconds": rate * graphs[0]["images"],
    }


def graph_cost_table(
    logs: Mapping[str, Iterable[Mapping]], published: pd.DataFrame | None = None
) -> pd.DataFrame:
    """What the graph cost, online and offline: measured in trainings, and as published.

    Parameters
    ----------
    logs : mapping of str to rows of a log
        Of finished trainings, by name; those without a graph are left out.
    published : DataFrame, optional
        ``sagelib.evaluate.published("graph")``.

    Returns
    -------
    DataFrame
        Columns who, schedule ("online" or "static"), paid ("each epoch" or "once"), seconds, added_pct (in percent of an epoch's steps; NaN
        where it is not paid each epoch), kind, context. ``kind`` is "measured", "published", or "estimated": where no training has the static
        schedule, what it would take to describe all images of the first one once, at the rate of its log.
    """
    costs = {}
    for name, rows in logs.items():
        rows = list(rows)
        if any(row.get("kind") == "epoch" and row.get("graph", {}).get("mined") for row in rows):
            costs[name] = graph_costs(rows)
    lines = []
    for name, cost in costs.items():
        online = cost["schedule"] == "online"
        told = f"{cost['described']:,.0f} of {cost['images']:,} images described"
        paid, added = ("each epoch", cost["added_pct"]) if online else ("once", math.nan)
        lines.append((name, cost["schedule"], paid, cost["seconds"], added, "measured", told))
    if costs and not any(cost["schedule"] == "static" for cost in costs.values()):
        name, cost = next(iter(costs.items()))
        told = f"all {cost['images']:,} images, at the rate of that log; no training with schedule static was timed"
        lines.append((name, "static", "once", cost["all_images_seconds"], math.nan, "estimated", told))
    for row in [] if published is None else published.to_dict("records"):
        told = f"R@1 {row['sped']} on sped, {row['msls-val']} on msls-val, context {row['context']}; {row['source']}"
        paid = "each epoch" if row["per"] == "epoch" else "once"
        lines.append(
            ("SAGE paper", row["schedule"], paid, row["seconds"], row["added_pct"], "published", told)
        )
    columns = ["who", "schedule", "paid", "seconds", "added_pct", "kind", "context"]
    return pd.DataFrame(lines, columns=columns)


def audit_arrays(table, *, k: int = 1) -> dict:
    """Turn an audit's table into what `workbench.figures.context_audit` draws for one set.

    Parameters
    ----------
    table : DataFrame
        One row a context and shuffle, with columns ``kind`` ("none", "solo", "anchors", "sorted", "shuffled"),
        ``n`` and ``R@<k>`` in percent (`sagelib.evaluate.Audit.table`).
    k : int

    Returns
    -------
    dict
        ``n``, ``sorted`` and ``shuffled`` (a column a shuffle), NaN where a context was not run, and ``none``,
        ``solo``, ``anchors`` where they were.
    """
    column = f"R@{k}"
    if column not in table:
        raise ValueError(f"the table has no column {column}; it has {', '.join(map(str, table.columns))}")
    batched = table[table["kind"].isin(["sorted", "shuffled"])]
    n = np.sort(batched["n"].unique())
    shuffles = [
        table[(table["kind"] == "shuffled") & (table["n"] == size)][column].to_numpy(float) for size in n
    ]
    shuffled = np.full((len(n), max((len(s) for s in shuffles), default=0) or 1), np.nan)
    for row, values in zip(shuffled, shuffles, strict=True):
        row[: len(values)] = values
    result = {"n": n, "shuffled": shuffled, "sorted": np.full(len(n), np.nan)}
    for i, size in enumerate(n):
        values = table[(table["kind"] == "sorted") & (table["n"] == size)][column]
        if len(values):
            result["sorted"][i] = values.mean()
    for kind in ("none", "solo", "anchors"):
        values = table[table["kind"] == kind][column]
        if len(values):
            result[kind] = float(values.mean())
    return result


# --- failures --------------------------------------------------------------------------------------------------


def sort_failures(first_hit_rank, distance_m, *, by: str = "rank") -> np.ndarray:
    """Order the queries that were wrong at rank 1, the most wrong first.

    Parameters
    ----------
    first_hit_rank : array (Q,)
        Rank of the first positive, from 1; 0 or NaN where none was among those looked at (worst of all). Queries
        at 1 are no failures and are left out.
    distance_m : array (Q,)
        Metres from the query to what was retrieved first; NaN counts as farthest.
    by : {"rank", "metres"}
        What comes first; the other breaks ties, then the index.

    Returns
    -------
    array of int
        Indices of the failures.
    """
    if by not in ("rank", "metres"):
        raise ValueError(f'by must be "rank" or "metres", got {by!r}')
    rank = np.asarray(first_hit_rank, dtype=float)
    rank = np.where(np.isnan(rank) | (rank < 1), np.inf, rank)
    metres = np.asarray(distance_m, dtype=float)
    metres = np.where(np.isnan(metres), np.inf, metres)
    if rank.shape != metres.shape or rank.ndim != 1:
        raise ValueError(
            f"first_hit_rank and distance_m must have shape (Q,), got {rank.shape} and {metres.shape}"
        )
    failed = np.flatnonzero(rank > 1)
    keys = (rank, metres) if by == "rank" else (metres, rank)
    return failed[np.lexsort((failed, -keys[1][failed], -keys[0][failed]))]


def ranking_arrays(table, k: int) -> dict[str, np.ndarray]:
    """Turn a table of rankings (`sagelib.retrieval.read_rankings`) into arrays, a row each query.

    Parameters
    ----------
    table : DataFrame
        With columns query, rank, reference, positive, distance, metres.
    k : int
        Ranks to keep; fewer where the table has fewer.

    Returns
    -------
    dict of arrays (Q, k)
        ``reference`` (int), ``positive`` (bool), ``distance`` (between descriptors) and ``metres`` (NaN unknown).

    Raises
    ------
    ValueError
        If a query lacks one of the ranks.
    """
    k = min(k, int(table["rank"].max()))
    kept = table[table["rank"] <= k].sort_values(["query", "rank"])
    count = int(kept["query"].max()) + 1
    if len(kept) != count * k or not np.array_equal(kept["query"], np.repeat(np.arange(count), k)):
        raise ValueError(
            f"the rankings of {count} queries must have ranks 1 to {k} each, got {len(kept)} lines"
        )
    kinds = {"reference": int, "positive": bool, "distance": float, "metres": float}
    return {name: kept[name].to_numpy(kind).reshape(count, k) for name, kind in kinds.items()}


def suspicion(similarity, distance_m, *, radius_m: float = 25.0, right=None) -> tuple[np.ndarray, np.ndarray]:
    """Order the wrong first answers by how much they look like an error of the ground truth.

    A wrong answer is suspect when it is as similar as right ones are: its score is the share of the right first
    answers that are less similar. One just outside the radius comes before an equally similar one far away.
    It is a list for a person to look through, no verdict.

    Parameters
    ----------
    similarity : array (Q,)
        Of each query with its first answer: the cosine, or any number that grows with likeness.
    distance_m : array (Q,)
        Metres between the two; within `radius_m` (inclusive) the answer is right.
    right : array (Q,) of bool, optional
        Whether each first answer is right, where the rule is another than a radius.

    Returns
    -------
    order : array of int
        Wrong queries, most suspect first.
    score : array of float
        Of each, 0 to 1; NaN where no answer is right, which leaves nothing to compare with.
    """
    similarity, distance = np.asarray(similarity, dtype=float), np.asarray(distance_m, dtype=float)
    if similarity.shape != distance.shape or similarity.ndim != 1:
        raise ValueError(
            f"similarity and distance_m must have shape (Q,), got {similarity.shape} and {distance.shape}"
        )
    right = distance <= radius_m if right is None else np.asarray(right, dtype=bool)
    if right.shape != distance.shape:
        raise ValueError(f"right must have shape {distance.shape}, got {right.shape}")
    wrong = np.flatnonzero(~right)
    known = np.sort(similarity[right])
    score = np.full(len(wrong), np.nan)
    if len(known):
        score = np.searchsorted(known, similarity[wrong]) / len(known)
    far = np.where(np.isnan(distance[wrong]), np.inf, distance[wrong])
    order = np.lexsort((far, -similarity[wrong], -np.nan_to_num(score)))
    return wrong[order], score[order]


def suspects(
    table,
    database,
    queries,
    positives,
    *,
    count: int = 12,
    k: int = 5,
    max_heading_deg: float = 45.0,
) -> list[dict]:
    """List the queries whose first answer is wrong, those first that look most like an error of the ground truth.

    Order and score are those of `suspicion`: a list for a person to look through, no verdict.

    Parameters
    ----------
    table : DataFrame
        Rankings (`sagelib.retrieval.read_rankings`).
    database, queries : sagelib.places.Places
    positives : sequence of arrays
        Rows of the references that answer each query (`sagelib.places.positives`).
    count : int
        How many; 0 takes all.
    k : int
        Ranks of which the references are listed.
    max_heading_deg : float
        The nearest positive is taken from those that look the same way within this angle, where there are any.

    Returns
    -------
    list of dict
        Of each query: ``query``, ``query_path`` (as in the table), ``score``, ``n_positives``; lists of at most k, nearest descriptor first:
        ``reference``, ``reference_path``, ``metres`` (NaN unknown), ``positive``; and of its nearest positive ``truth`` (row of `database`, None
        without any), ``truth_path``, ``truth_m`` and ``truth_rank`` (0: not in the table).

    Raises
    ------
    ValueError
        If table and queries do not belong together.
    """
    found = ranking_arrays(table, k)
    if not len(found["reference"]) == len(queries) == len(positives):
        raise ValueError(
            f"the rankings are those of {len(found['reference'])} queries, but there are {len(queries)} queries and the positives of "
            f"{len(positives)}"
        )
    if found["reference"].max() >= len(database):
        raise ValueError(
            f"the rankings name reference {found['reference'].max()}, but there are {len(database)} references"
        )
    order, score = suspicion(-found["distance"][:, 0], found["metres"][:, 0], right=found["positive"][:, 0])
    order, score = order[: count or None].tolist(), score[: count or None].tolist()
    nearest = dict(true_references(database, queries, positives).tolist())
    nearest |= dict(true_references(database, queries, positives, max_heading_deg=max_heading_deg).tolist())
    lines = dict(tuple(table[table["query"].isin(order)].groupby("query")))
    # Paths in the table are relative to a folder of its own: the same for those that are not in it.
    folder = str(database.path[table["reference"].iloc[0]]).removesuffix(table["reference_path"].iloc[0])
    rows = []
    for query, suspect in zip(order, score, strict=True):
        truth, ranked = nearest.get(query), lines[query].sort_values("rank")
        shown, at = ranked[ranked["rank"] <= k], ranked.loc[ranked["reference"] == truth, "rank"]
        row = {"query": query, "query_path": shown["query_path"].iloc[0], "score": suspect}
        row |= {name: shown[name].tolist() for name in ("reference", "reference_path", "metres")}
        row |= {"positive": (shown["positive"] == 1).tolist(), "n_positives": len(positives[query])}
        row |= {
            "truth": truth,
            "truth_path": "",
            "truth_m": math.nan,
            "truth_rank": int(at.iloc[0]) if len(at) else 0,
        }
        if truth is not None:
            row["truth_path"] = str(database.path[truth]).removeprefix(folder)
            row["truth_m"] = math.hypot(
                database.east_m[truth] - queries.east_m[query],
                database.north_m[truth] - queries.north_m[query],
            )
        rows.append(row)
    return rows
