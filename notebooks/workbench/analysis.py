"""Numbers for figures: t-SNE maps, distances within places, heatmaps, graphs and batches, failures."""

import itertools
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping

import networkx as nx
import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist, pdist

from sagelib.graph import GeoVisualGraph
from sagelib.places import Places, heading_difference
from sagelib.runs import check, rng
from workbench.tables import bootstrap_mean


# ---------- descriptors
def unit(descriptors) -> np.ndarray:
    """Bring each row, (n, D), to length 1 in float64; a row that is zero or not finite is refused."""
    values = np.asarray(descriptors, dtype=np.float64)
    length = np.linalg.norm(values, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(length) & (length > 0)))
    if len(bad):
        raise ValueError(f"descriptors must be finite and not zero: row {bad[0]} is not ({len(bad)} such)")
    return values / length


def tsne(descriptors, *, perplexity: float, seed: int) -> np.ndarray:
    """Map descriptors (n, D) to the plane, (n, 2), by t-SNE (van der Maaten and Hinton, JMLR 2008).

    Unit rows, their first 50 principal components. The start is the first two of these with noise of a tenth
    of their spread, which the seed decides. `perplexity` (below n): roughly how many neighbours count.
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
        few = f"and there are {len(enough)}"
        raise ValueError(f"places asks for {places} places of at least {images} images, {few}")
    draw = np.random.default_rng(seed)
    chosen = np.sort(draw.choice(enough, places, replace=False))
    members = (np.flatnonzero(labels == name) for name in chosen)
    return np.concatenate([np.sort(draw.choice(rows, images, replace=False)) for rows in members])


def split_by_heading(labels, heading_deg, *, max_heading_deg: float) -> np.ndarray:
    """Split places into views, photographs of one place that look the same way: labels (n,), -1 for none.

    The first photograph of a place that has no view leads one, and all within `max_heading_deg` (at most 180)
    of it join; those without a heading (NaN) are a view of their own in each place. `labels` (n,) name the
    places, -1 for none.
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


def by_nearness(database: Places, queries: Places, query: int, rows, max_heading_deg: float = 45.0) -> tuple:
    """Order `rows` of the references of a query: those that look the same way first, then by metres.

    Returns the rows, their metres, and whether the headings differ by at most `max_heading_deg`, which an
    unknown heading does not rule out.
    """
    rows = np.asarray(rows, dtype=np.int64)
    east, north = database.east_m[rows], database.north_m[rows]
    metres = np.hypot(east - queries.east_m[query], north - queries.north_m[query])
    alike = ~(heading_difference(database.heading_deg[rows], queries.heading_deg[query]) > max_heading_deg)
    order = np.lexsort((metres, ~alike))
    return rows[order], metres[order], alike[order]


def true_references(database, queries, positives, *, max_heading_deg: float) -> np.ndarray:
    """Rows (query, reference) of queries and the nearest of their positives that looks the same way, if any.

    `positives` are the rows of the references that answer each query (`sagelib.places.positives`).
    """
    pairs = []
    for query, rows in enumerate(positives):
        rows, _, alike = by_nearness(database, queries, query, rows, max_heading_deg)
        if alike[:1].any():
            pairs.append((query, rows[0]))
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


# ---------- heatmaps
def label_shares(labels, grid: tuple[int, int], count: int) -> np.ndarray:
    """Share of each label in the area of each patch; a pixel across a border is divided by area.

    `labels` (H, W) are 0 ... count - 1, `grid` (h, w) the patches; returns (h * w, count), rows sum to 1.
    """

    def overlap(pixels: int, cells: int) -> np.ndarray:
        """(cells, pixels): how much of each cell each pixel fills."""
        edges, pixel = np.linspace(0, pixels, cells + 1), np.arange(pixels)
        shared = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
        return np.maximum(shared, 0) * cells / pixels

    rows, columns = (overlap(*sizes) for sizes in zip(np.shape(labels), grid, strict=True))
    return np.stack([(rows @ (labels == label) @ columns.T).ravel() for label in range(count)], axis=1)


def mass_on_labels(weights, shares) -> np.ndarray:
    """Share (..., L) of a heatmap's mass on each label, of `weights` (..., N), one a patch, not negative.

    `shares` (..., N, L) are those of `label_shares`. Uniform weights give each label's share of the picture.
    """
    weights = np.asarray(weights, dtype=np.float64)
    if (weights < 0).any() or (weights.sum(axis=-1) == 0).any():
        raise ValueError("weights must not be negative, and not all zero")
    return np.einsum("...n,...nl->...l", weights, shares) / weights.sum(axis=-1, keepdims=True)


def label_preference(weights, shares, *, seed: int) -> pd.DataFrame:
    """Compare the share of the weight on each label with the label's share of the pictures.

    Of n pictures, `weights` (n, N) and `shares` (n, N, L) as for `mass_on_labels`. A row each label:
    ``share`` of the weight and ``area``, the share of the picture (means over the pictures); ``difference``,
    share - area, with its 95 % interval over resampled pictures, ``low`` and ``high``; and ``ratio``,
    share / area (NaN where the area is 0): above 1 preferred, below 1 avoided.
    """
    mass, area = mass_on_labels(weights, shares), np.mean(shares, axis=1)
    bounds = [bootstrap_mean(picture_by_picture, seed) for picture_by_picture in (mass - area).T]
    table = pd.DataFrame(bounds, columns=["difference", "low", "high"])
    table = table.assign(share=mass.mean(axis=0), area=area.mean(axis=0))
    return table.assign(ratio=table["share"] / table["area"].where(table["area"] > 0))


LocalFeatures = namedtuple("LocalFeatures", "cls patches grid descriptors")


def describe_patches(
    model, paths: Iterable, preprocess: Callable, *, batch_size: int, device: str
) -> LocalFeatures:
    """What a model sees in n pictures before and after its aggregator; the model comes back on the CPU.

    Tensors on the CPU: ``cls`` (n, M), ``patches`` (n, N, M) in row-major order of ``grid`` (h, w), and
    ``descriptors`` (n, D), the aggregator's, before any cross-image head.
    """
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
    """Share out the matching score ``descriptor . other`` between an image's patches: (B, N) float64.

    Where the aggregator is a sum over its patches once its own weights and lengths are held at their values
    (mean, GeM, NetVLAD, SALAD, Soft Probing), the shares are exact: they add up to the score less what comes
    from the class token and from biases. Otherwise (MixVPR, BoQ) they are integrated gradients (Sundararajan,
    Taly and Yan, ICML 2017) on the straight line from the image's mean patch at every place to its patches,
    and add up to the difference of the two scores, but for a jump where a layer norm meets constant patches
    (MixVPR). The two kinds have other zeros: compare where the mass lies, not the values.

    Tensors `cls` (B, M), `patches` (B, N, M) and `other` (B, D) or (D,), descriptors of the other pictures;
    the aggregator is in evaluation mode.
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


# ---------- graphs and batches
def graph_statistics(graph: GeoVisualGraph) -> dict:
    """Counts of a graph, its first 100,000 maximal cliques at most, and means over edges and nodes."""
    nodes, values = graph.to_networkx(), graph.edge_values() | {"degree": graph.degrees()}
    cliques = [len(clique) for clique in itertools.islice(nx.find_cliques(nodes), 100_000)]
    components = [len(part) for part in nx.connected_components(nodes)]
    counts = {
        "nodes": len(graph),
        "edges": graph.n_edges,
        "pruned_edges": len(graph._pairs) - graph.n_edges,
        "components": len(components),
        "largest_component": max(components, default=0),
        "maximal_cliques": len(cliques),
        "largest_clique": max(cliques, default=0),
    }
    return counts | {f"mean_{name}": float(value.mean()) for name, value in values.items() if len(value)}


def batch_statistics(batches, descriptors, east_m, north_m, *, images_per_place: int = 4) -> dict:
    """How hard the batches of a sampler are, (P * K,) images each, K by K of a place; of n images all told.

    Arrays: per image of the batches ``hardest_negative``, the greatest cosine to an image of another place;
    per pair of images of one place ``positive_similarity`` (cosine) and ``positive_distance_m``.
    """
    values = []
    for batch in map(np.asarray, batches):
        if len(batch) % images_per_place:
            raise ValueError(f"a batch of {len(batch)} images is not made of places of {images_per_place}")
        rows = np.asarray(descriptors[batch], dtype=np.float32)
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        cosine = rows @ rows.T
        place = np.arange(len(batch)) // images_per_place
        same = place[:, None] == place
        i, j = np.nonzero(np.triu(same, 1))
        metres = np.hypot(*(x[batch[i]] - x[batch[j]] for x in (east_m, north_m)))
        hardest = np.where(same, np.nan if same.all() else -np.inf, cosine).max(axis=1)
        values.append((hardest, cosine[i, j], metres))
    names = ("hardest_negative", "positive_similarity", "positive_distance_m")
    return dict(zip(names, map(np.concatenate, zip(*values, strict=True)), strict=True))


def graph_cost_table(logs: Mapping[str, Iterable[Mapping]], published: pd.DataFrame) -> pd.DataFrame:
    """What the graph cost, online and offline: measured in finished trainings, and as published.

    `logs` are rows of logs by name (``Run.read_log``), of which those without a graph are left out;
    `published` is ``sagelib.evaluate.published("graph")``.

    Columns who, schedule ("online" or "static"), paid ("each epoch" or "once"), seconds (mean of a refresh),
    added_pct (of an epoch's steps; NaN where it is paid once), kind, context. ``kind`` is "measured",
    "published", or "estimated": where no training has the static schedule, the time to describe all images of
    the first one once, at the rate of its log.
    """
    measured, estimated = [], []
    for name, rows in logs.items():
        rows = [row for row in rows if row.get("kind") == "epoch" and "mined" in row.get("graph", {})]
        if not rows:
            continue
        epochs = pd.DataFrame([row["graph"]["mined"] | row["seconds"] for row in rows])
        # A report stands in the log until the next refresh, so a graph counts in the epoch that made it.
        made = epochs[epochs["refreshed_epoch"] == epochs["epoch"]]
        described, images = made["described_images"], int(made["images"].iloc[0])
        cost = {"who": name, "schedule": made["schedule"].iloc[0], "kind": "measured"}
        cost["seconds"] = made["refresh"].mean()
        cost["added_pct"] = 100 * made["refresh"].sum() / epochs["train"].sum()
        measured.append(cost | {"context": f"{described.mean():,.0f} of {images:,} images described"})
        seconds = images * made["seconds_describe"].sum() / max(described.sum(), 1)
        context = f"all {images:,} images, at the rate of that log; no static training was timed"
        cost = {"who": name, "schedule": "static", "kind": "estimated", "seconds": seconds}
        estimated.append(cost | {"context": context})
    if any(cost["schedule"] == "static" for cost in measured):
        estimated = []
    context = "R@1 {sped} on sped, {msls-val} on msls-val, context {context}; {source}".format
    paper = published.assign(who="SAGE paper", kind="published")
    paper["context"] = [context(**row) for row in published.to_dict("records")]
    columns = ["who", "schedule", "paid", "seconds", "added_pct", "kind", "context"]
    table = pd.DataFrame([*measured, *estimated[:1], *paper.to_dict("records")], columns=columns)
    online = table["schedule"] == "online"
    paid = np.where(online, "each epoch", "once")
    return table.assign(paid=paid, added_pct=table["added_pct"].where(online))


# ---------- rankings and failures
def ranking_arrays(table: pd.DataFrame, k: int) -> dict[str, np.ndarray]:
    """Turn ``Evaluation.rankings()`` into arrays (Q, k), a row each query.

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

    `table` are the ``Evaluation.rankings()`` of `queries` in `database` (`Places`), `positives` the rows of
    the references that answer each query, `count` how many to list (0: all).

    Each is a dict of ``query``, ``query_path``, ``score`` (NaN where no answer is right), ``n_positives``;
    ``found``, the first five as dicts of ``rank``, ``reference``, ``reference_path``, ``metres`` (NaN where
    unknown), ``positive``; and ``truth``, the nearest positive, if possible one that looks the same way, as
    dict of ``reference``, ``reference_path``, ``metres`` and ``rank`` (0: not in the table), or None.
    """
    firsts = table[table["rank"] == 1].sort_values("query")
    if len(firsts) != len(queries) or table["reference"].max() >= len(database):
        raise ValueError(f"these are no rankings of {len(queries)} queries and {len(database)} references")
    right = firsts.loc[firsts["positive"] == 1, "distance"]
    wrong = firsts[firsts["positive"] == 0].sort_values(["distance", "metres"])
    # Paths in the table are relative to a folder of its own: the same for those that are not in it.
    folder = str(database.path[table["reference"].iloc[0]]).removesuffix(table["reference_path"].iloc[0])
    ranked, cases = table.sort_values("rank").groupby("query"), []
    for first in wrong.head(count or len(wrong)).itertuples():
        rows, answers, truth = ranked.get_group(first.query), positives[first.query], None
        if len(answers):
            nearest, metres, _ = by_nearness(database, queries, first.query, answers)
            truth = {"reference": int(nearest[0])}
            truth["reference_path"] = str(database.path[nearest[0]]).removeprefix(folder)
            truth["metres"] = float(metres[0])
            truth["rank"] = int(rows.loc[rows["reference"] == nearest[0], "rank"].sum())
        found = rows[["rank", "reference", "reference_path", "metres", "positive"]].head(5).to_dict("records")
        case = {"query": first.query, "query_path": first.query_path}
        case["score"] = float((right > first.distance).mean())
        cases.append(case | {"n_positives": len(answers), "found": found, "truth": truth})
    return cases
