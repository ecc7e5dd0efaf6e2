"""Numbers for figures: t-SNE maps, distances within places, heatmaps, costs of the graph, failures."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist, pdist

from sagelib.places import heading_difference
from sagelib.runs import check, rng
from workbench.tables import bootstrap_mean

# --- descriptors --------------------------------------------------------------------------------------------


def unit(descriptors) -> np.ndarray:
    """Bring each row, (n, D), to length 1 in float64; a row that is zero or not finite is refused."""
    values = np.asarray(descriptors, dtype=np.float64)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(length) & (length > 0)))
    if len(bad):
        raise ValueError(f"descriptors must be finite and not zero: row {bad[0]} is not ({len(bad)} such)")
    return values / length


def tsne(descriptors, *, perplexity: float, seed: int) -> np.ndarray:
    """Map descriptors to the plane by scikit-learn's t-SNE (van der Maaten and Hinton, JMLR 2008).

    Unit rows, their first 50 principal components. The start is the first two of these with noise of a tenth
    of their spread, which the seed decides: what another seed changes was never there.

    Parameters
    ----------
    descriptors : array (n, D)
    perplexity : float
        About how many neighbours each point minds, below n.
    seed : int

    Returns
    -------
    array (n, 2) of float32
        Neither the axes nor distances between far clusters mean anything.
    """
    import threadpoolctl
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    values = unit(descriptors)
    values = PCA(min(50, *values.shape), svd_solver="full").fit_transform(values)
    noise = rng(seed, "t-SNE").normal(0, 0.1, (len(values), 2))
    start = 1e-4 * (values[:, :2] / max(values[:, 0].std(), 1e-12) + noise)  # scikit-learn's own scale
    method = TSNE(2, perplexity=perplexity, init=start.astype(np.float32), random_state=seed)
    with threadpoolctl.threadpool_limits(1):  # threads change the last digits, which t-SNE makes large
        return method.fit_transform(values.astype(np.float32))


def choose_places(labels, *, places: int, images: int, seed: int) -> np.ndarray:
    """Choose places and `images` of each at random: indices, place by place. A label of -1 is no place."""
    labels = np.asarray(labels)
    names, counts = np.unique(labels[labels >= 0], return_counts=True)
    enough = names[counts >= images]
    if len(enough) < places:
        words = f"{places} places of at least {images} images, and there are {len(enough)}"
        raise ValueError(f"places asks for {words}")
    draw = np.random.default_rng(seed)
    chosen = np.sort(draw.choice(enough, places, replace=False))
    members = (np.flatnonzero(labels == name) for name in chosen)
    return np.concatenate([np.sort(draw.choice(rows, images, replace=False)) for rows in members])


def split_by_heading(labels, heading_deg, *, max_heading_deg: float) -> np.ndarray:
    """Split places into views, photographs of one place that look the same way.

    The first photograph of a place that has no view leads one, and all within `max_heading_deg` of it join.

    Parameters
    ----------
    labels : array (n,) of int
        -1: no place, and no view.
    heading_deg : array (n,)
        Those without a heading (NaN) are a view of their own in each place.
    max_heading_deg : float
        At most 180.

    Returns
    -------
    array (n,) of int
        Labels from 0 in order of places, -1 where there is none.
    """
    check("max_heading_deg", max_heading_deg, above=0, high=180)
    labels, heading = np.asarray(labels), np.asarray(heading_deg, dtype=np.float64)
    views, count = np.full(len(labels), -1), 0
    for place in np.unique(labels[labels >= 0]):
        left = np.flatnonzero(labels == place)
        while len(left):
            turn = heading_difference(heading[left], heading[left[0]])
            joins = np.isnan(heading[left]) if np.isnan(heading[left[0]]) else turn <= max_heading_deg
            views[left[joins]] = count
            left, count = left[~joins], count + 1
    return views


def class_distances(descriptors, labels) -> pd.DataFrame:
    """Mean L2 distances ``within`` each class and ``between`` it and all others, of unit descriptors (n, D).

    A row for each class of at least two images, ascending. The mean of ``within``, over the pairs of a class,
    is the average intra-class distance (AID), from 0 (equal) to 2 (opposite); every class counts the same.
    ``between``, from its images to those of all others, is the scale to read it against.
    """
    values, labels, rows = unit(descriptors), np.asarray(labels), {}
    for name in np.unique(labels):
        own, others = values[labels == name], values[labels != name]
        if len(own) > 1:
            rows[name] = pdist(own).mean(), cdist(own, others).mean()
    return pd.DataFrame.from_dict(rows, orient="index", columns=["within", "between"])


def neighbour_purity(points, labels) -> np.ndarray:
    """Whether the nearest other point, of (n, D), is of the same class: (n,) of bool."""
    apart, labels = cdist(points, points), np.asarray(labels)
    np.fill_diagonal(apart, np.inf)
    return labels[apart.argmin(axis=1)] == labels


def true_references(database, queries, positives, *, max_heading_deg: float | None = None) -> np.ndarray:
    """Choose one true reference for each query: the nearest of its positives that looks the same way.

    Parameters
    ----------
    database, queries : Places
    positives : sequence of arrays
        Rows of the references that answer each query (`sagelib.places.positives`).
    max_heading_deg : float, optional
        Largest angle between the headings; None takes all. Where a heading is unknown, any angle will do.

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
            rows = rows[~(turn > max_heading_deg)]
        if len(rows):
            pairs.append((query, rows[metres_between(queries, query, database, rows).argmin()]))
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def metres_between(queries, query: int, database, rows) -> np.ndarray:
    """Metres between one query and some references, all in one UTM zone."""
    east = database.east_m[rows] - queries.east_m[query]
    return np.hypot(east, database.north_m[rows] - queries.north_m[query])


# --- heatmaps -----------------------------------------------------------------------------------------------


def label_shares(labels, grid: tuple[int, int], count: int) -> np.ndarray:
    """Share of each label in the area of each patch; a pixel across a border is divided by area.

    Parameters
    ----------
    labels : array (H, W) of int
        Label of each pixel, 0 ... count - 1.
    grid : (h, w)
        Patches.
    count : int
        Number of labels.

    Returns
    -------
    array (h * w, count)
        Rows sum to 1.
    """

    def overlap(pixels: int, cells: int) -> np.ndarray:
        """(cells, pixels): how much of each cell each pixel fills."""
        edges, pixel = np.linspace(0, pixels, cells + 1), np.arange(pixels)
        shared = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
        return np.maximum(shared, 0) * cells / pixels

    rows, columns = (overlap(*sizes) for sizes in zip(np.shape(labels), grid, strict=True))
    shares = [rows @ (labels == label) @ columns.T for label in range(count)]
    return np.stack([share.ravel() for share in shares], axis=1)


def mass_on_labels(weights, shares) -> np.ndarray:
    """Share of a heatmap's mass on each label.

    Parameters
    ----------
    weights : array (..., N), not negative
        One a patch; uniform weights give each label's share of the picture.
    shares : array (..., N, L)
        From `label_shares`.

    Returns
    -------
    array (..., L)
        Sums to 1.
    """
    weights = np.asarray(weights, dtype=np.float64)
    if (weights < 0).any() or (weights.sum(axis=-1) == 0).any():
        raise ValueError("weights must not be negative, and not all zero")
    return np.einsum("...n,...nl->...l", weights, shares) / weights.sum(axis=-1, keepdims=True)


def label_preference(weights, shares, *, seed: int) -> pd.DataFrame:
    """Compare the share of the weight on each label with the label's share of the pictures.

    Parameters
    ----------
    weights : array (n, N), not negative
        One a patch and picture; for contributions of both signs, their positive part.
    shares : array (n, N, L)
        From `label_shares`, picture by picture.
    seed : int
        Of the bootstrap.

    Returns
    -------
    DataFrame
        A row each label: ``share`` of the weight and ``area``, the share of the picture (means over the
        pictures); ``difference``, share - area, with its 95 % interval over resampled pictures, ``low`` and
        ``high``; and ``ratio``, share / area (NaN where the area is 0): above 1 preferred, below 1 avoided.
    """
    mass, area = mass_on_labels(weights, shares), np.mean(shares, axis=1)
    bounds = [bootstrap_mean(picture_by_picture, seed) for picture_by_picture in (mass - area).T]
    table = pd.DataFrame(bounds, columns=["difference", "low", "high"])
    table = table.assign(share=mass.mean(axis=0), area=area.mean(axis=0))
    return table.assign(ratio=table["share"] / table["area"].where(table["area"] > 0))


class LocalFeatures(NamedTuple):
    """What a model sees in n pictures before and after its aggregator, as tensors on the CPU.

    ``cls`` (n, M), ``patches`` (n, N, M) in row-major order of ``grid`` (h, w), and ``descriptors`` (n, D),
    the aggregator's, before any cross-image head.
    """

    cls: "torch.Tensor"  # noqa: F821
    patches: "torch.Tensor"  # noqa: F821
    grid: tuple[int, int]
    descriptors: "torch.Tensor"  # noqa: F821


def describe_patches(
    model, paths: Iterable, preprocess: Callable, *, batch_size: int, device: str
) -> LocalFeatures:
    """Describe the pictures at n paths and keep their patches in memory; the model comes back on the CPU."""
    import torch

    from sagelib.describe import pick_device
    from sagelib.images import load_image

    if not hasattr(model, "local_features"):
        name = getattr(model, "__name__", type(model).__name__)
        raise ValueError(f"{name} has no patches: give a model with a backbone and an aggregator")
    device, parts = pick_device(device), []
    model = model.to(device).eval()
    with torch.no_grad():
        for images in torch.stack([preprocess(load_image(path)) for path in paths]).split(batch_size):
            cls, patches, grid = model.local_features(images.to(device))
            features = cls, patches, model.aggregator(cls, patches, grid)
            parts.append([feature.float().cpu() for feature in features])
    model.to("cpu")
    cls, patches, descriptors = map(torch.cat, zip(*parts, strict=True))
    return LocalFeatures(cls, patches, grid, descriptors)


def score_contributions(aggregator, cls, patches, grid: tuple[int, int], other) -> np.ndarray:
    """Share out the matching score ``descriptor . other`` between an image's patches.

    Where the aggregator is a sum over its patches once its own weights and lengths are held at their values
    (mean, GeM, NetVLAD, SALAD, Soft Probing), the shares are exact: they add up to the score less what comes
    from the class token and from biases. Otherwise (MixVPR, BoQ) they are integrated gradients (Sundararajan,
    Taly and Yan, ICML 2017) on the straight line from the image's mean patch at every place to its patches,
    and add up to the difference of the two scores, but for a jump where a layer norm meets constant patches
    (MixVPR). The two kinds have other zeros: compare where the mass lies, not the values.

    Parameters
    ----------
    aggregator : module
        In evaluation mode, with ``forward(cls, patches, grid)``.
    cls, patches : tensors (B, M) and (B, N, M)
    grid : (h, w)
    other : tensor (B, D) or (D,)
        Descriptors of the other picture of each pair.

    Returns
    -------
    array (B, N) of float64
    """
    import torch

    exact = getattr(aggregator, "patch_contributions", None)
    if exact is not None:
        with torch.no_grad():
            return exact(cls, patches, grid, other).double().cpu().numpy()
    start, steps = patches.mean(dim=1, keepdim=True), 32
    way, total = patches - start, torch.zeros_like(patches)
    for step in range(steps):
        at = (start + (step + 0.5) / steps * way).requires_grad_()
        (gradient,) = torch.autograd.grad((aggregator(cls, at, grid) * other).sum(), at)
        total += gradient / steps
    return (total * way).sum(dim=-1).double().cpu().numpy()


# --- what the graph costs -----------------------------------------------------------------------------------


def graph_cost_table(logs: Mapping[str, Iterable[Mapping]], published: pd.DataFrame) -> pd.DataFrame:
    """What the graph cost, online and offline: measured in trainings, and as published.

    Parameters
    ----------
    logs : mapping of str to rows of a log
        Of finished trainings, by name (``Run.read_log``); those without a graph are left out.
    published : DataFrame
        ``sagelib.evaluate.published("graph")``.

    Returns
    -------
    DataFrame
        Columns who, schedule ("online" or "static"), paid ("each epoch" or "once"), seconds (mean of a
        refresh), added_pct (of an epoch's steps; NaN where it is paid once), kind, context. ``kind`` is
        "measured", "published", or "estimated": where no training has the static schedule, the time to
        describe all images of the first one once, at the rate of its log.
    """
    lines, estimate = [], None
    for name, rows in logs.items():
        epochs = pd.json_normalize([row for row in rows if row.get("kind") == "epoch"])
        if "graph.mined.schedule" not in epochs:
            continue
        epochs = epochs.dropna(subset=["graph.mined.schedule"])
        mined = epochs.filter(like="graph.mined.").rename(columns=lambda c: c.removeprefix("graph.mined."))
        # A report stands in the log until the next refresh, so a graph counts in the epoch that made it.
        made = mined["refreshed_epoch"] == mined["epoch"]
        mined, refresh, train = mined[made], epochs["seconds.refresh"][made], epochs["seconds.train"]
        schedule, images = mined["schedule"].iloc[0], int(mined["images"].iloc[0])
        paid, added = "once", math.nan
        if schedule == "online":
            paid, added = "each epoch", 100 * refresh.sum() / max(train.sum(), 1e-9)
        context = f"{mined['described_images'].mean():,.0f} of {images:,} images described"
        lines.append((name, schedule, paid, refresh.mean(), added, "measured", context))
        if estimate is None:
            seconds = images * mined["seconds_describe"].sum() / max(mined["described_images"].sum(), 1)
            context = (
                f"all {images:,} images, at the rate of that log; no training with schedule static was timed"
            )
            estimate = (name, "static", "once", seconds, math.nan, "estimated", context)
    if lines and all(line[1] != "static" for line in lines):
        lines.append(estimate)
    for row in published.to_dict("records"):
        context = "R@1 {sped} on sped, {msls-val} on msls-val, context {context}; {source}".format(**row)
        paid = "each epoch" if row["per"] == "epoch" else "once"
        seconds, added = row["seconds"], row["added_pct"]
        lines.append(("SAGE paper", row["schedule"], paid, seconds, added, "published", context))
    columns = ["who", "schedule", "paid", "seconds", "added_pct", "kind", "context"]
    return pd.DataFrame(lines, columns=columns)


# --- rankings and failures ----------------------------------------------------------------------------------


def ranking_arrays(table: pd.DataFrame, k: int) -> dict[str, np.ndarray]:
    """Turn ``Result.rankings()`` into arrays (Q, k), a row each query.

    ``reference``, ``positive``, ``distance`` (between descriptors), ``metres`` (NaN unknown); k may be less.
    """
    wide = table[table["rank"] <= k].pivot(index="query", columns="rank")
    if wide["reference"].isna().any(axis=None):
        raise ValueError(f"some of the {len(wide)} queries lack one of the first {k} ranks")
    kinds = {"reference": int, "positive": bool, "distance": float, "metres": float}
    return {name: wide[name].to_numpy(kind) for name, kind in kinds.items()}


def suspects(table: pd.DataFrame, database, queries, positives, *, count: int) -> list[dict]:
    """List the queries whose first answer is wrong, the likeliest errors of the ground truth first.

    A wrong answer is suspect when it is as alike as right ones are: its score is the share of the right first
    answers that are less alike; of equally alike ones the nearer comes first. No verdict, but a list to read.

    Parameters
    ----------
    table : DataFrame
        ``Evaluation.rankings()`` (`sagelib.evaluate`).
    database, queries : Places
    positives : sequence of arrays
        Rows of the references that answer each query (`sagelib.places.positives`).
    count : int
        How many; 0: all.

    Returns
    -------
    list of dict
        ``query``, ``query_path``, ``score`` (NaN where no answer is right), ``n_positives``; ``found``, the
        first five as dicts of ``rank``, ``reference``, ``reference_path``, ``metres`` (NaN unknown) and
        ``positive``; ``truth``, the nearest positive, of those that look the same way if there are any, as
        dict of ``reference``, ``reference_path``, ``metres`` and ``rank`` (0: not in the table), or None.
    """
    first = ranking_arrays(table, 1)
    if len(first["reference"]) != len(queries) or table["reference"].max() >= len(database):
        raise ValueError(f"these are no rankings of {len(queries)} queries and {len(database)} references")
    alike, metres, right = -first["distance"][:, 0], first["metres"][:, 0], first["positive"][:, 0]
    wrong = np.flatnonzero(~right)
    order = wrong[np.lexsort((np.nan_to_num(metres[wrong], nan=np.inf), -alike[wrong]))][: count or None]
    scores = np.searchsorted(np.sort(alike[right]), alike[order]) / (right.sum() or np.nan)
    nearest = dict(true_references(database, queries, positives).tolist())
    nearest |= dict(true_references(database, queries, positives, max_heading_deg=45.0).tolist())
    # Paths in the table are relative to a folder of its own: the same for those that are not in it.
    folder = str(database.path[table["reference"].iloc[0]]).removesuffix(table["reference_path"].iloc[0])
    ranked = dict(iter(table[table["query"].isin(order)].sort_values("rank").groupby("query")))
    cases = []
    for query, score in zip(order.tolist(), scores.tolist(), strict=True):
        rows, reference, truth = ranked[query], nearest.get(query), None
        if reference is not None:
            rank = rows.loc[rows["reference"] == reference, "rank"].sum()
            away = metres_between(queries, query, database, reference)
            path = str(database.path[reference]).removeprefix(folder)
            truth = {"reference": reference, "reference_path": path, "metres": float(away), "rank": int(rank)}
        found = rows[["rank", "reference", "reference_path", "metres", "positive"]].head(5).to_dict("records")
        case = {"query": query, "query_path": rows["query_path"].iloc[0], "score": score}
        cases.append(case | {"n_positives": len(positives[query]), "found": found, "truth": truth})
    return cases
