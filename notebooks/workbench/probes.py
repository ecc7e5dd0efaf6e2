"""Two probes of finished models: who lives on the layout of a picture, and who learns pictures by heart?

    python -m workbench.probes --models gem:tf_efficientnet_lite2 sage --town data/town --sets data/town \\
        --image-size 160 --export data/results/probes
"""

import argparse
import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from pytorch_metric_learning.losses import MultiSimilarityLoss

from sagelib import runs
from sagelib.describe import describe
from sagelib.evaluate import open_models
from sagelib.graph import GeoVisualGraph
from sagelib.images import Preprocess
from sagelib.places import Places, TestSet, open_set, open_training_set
from sagelib.retrieval import recall, search
from sagelib.sampler import CliqueSampler, SamplerConfig
from sagelib.train import LOSS
from townscape.folder import TRAIN_IMAGES_PER_TOWN, write_town
from workbench.tables import bootstrap_mean, query_places, write_table

WINDOW = 0.7  # of a picture's width
SHIFTS = (0.0, 0.05, 0.1, 0.2, 0.3)  # of a picture's width
TOWNS = 2  # seen in training, and as many unseen
PLACES = 16  # of 4 pictures each in a batch


@dataclass(frozen=True)
class Window:
    """A preprocess of a part of each picture: `WINDOW` of its width, from `start` (a share of it) on."""

    preprocess: Preprocess
    start: float

    @property
    def fingerprint(self) -> str:
        return f"{self.preprocess} of {WINDOW} from {self.start}"

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        width = picture.width
        ends = round(self.start * width), round((self.start + WINDOW) * width)
        return self.preprocess(picture.crop((ends[0], 0, ends[1], picture.height)))


def sideways_shift(
    model, test_set: TestSet, folder, *, preprocess: Preprocess, progress=True
) -> pd.DataFrame:
    """R@1 where queries are windows that lie ever further right than those of the references.

    Both keep `WINDOW` of the width; those of the references begin at the left. What a model finds less at a
    larger shift it knew by the layout of the picture, or had its evidence in the part that was left out.

    Returns
    -------
    DataFrame
        A row for each of `SHIFTS`: shift (share of the width), R@1 in percent, low and high, its interval
        over places, and queries.
    """
    values = functools.partial(describe, model, folder=folder, progress=progress)
    references = values(test_set.database, preprocess=Window(preprocess, 0.0)).values
    positives, places, rows = test_set.positives(), query_places(test_set.queries), []
    for shift in SHIFTS:
        queries = values(test_set.queries, preprocess=Window(preprocess, shift)).values
        counted = recall(search(references, queries, 1)[0], positives, (1,), n_references=len(references))
        known = np.array([len(row) > 0 for row in positives])
        hits = 100.0 * (counted.per_query_rank[known] == 1)
        mean, low, high = bootstrap_mean(hits, groups=places[known])
        rows.append({"shift": shift, "R@1": mean, "low": low, "high": high, "queries": counted.n_queries})
    return pd.DataFrame(rows)


def by_heart(model, places: Places, folder, *, preprocess: Preprocess, progress=True) -> dict:
    """How well training pictures, or others of their kind, find each other, and what the loss says of them.

    A picture is asked about all others; right is one within 25 m that looks the same way within 45 degrees.
    The loss is that of training, on 20 batches of random places. Recall and loss far better on towns seen in
    training than on others of their kind tell of pictures learned by heart.

    Returns
    -------
    dict
        R@1 in percent, low and high, its interval over places, pictures that have an answer, and loss.
    """
    values = describe(model, places, folder, preprocess=preprocess, progress=progress).values
    values = np.asarray(values, np.float32)
    nearest = search(values, values, 2)[0]
    own = np.arange(len(places))
    answer = np.where(nearest[:, 0] == own, nearest[:, 1], nearest[:, 0])
    rules = dict(max_heading_deg=45.0, min_clique=4, schedule="none", batches_per_epoch=20)
    rules = SamplerConfig(**rules, places_per_batch=PLACES)
    graph = GeoVisualGraph.from_places(places, **rules.graph_options())
    pairs = graph.edges()
    right = set(map(tuple, np.concatenate([pairs, pairs[:, ::-1]]).tolist()))
    known = np.unique(pairs)
    hits = np.array([100.0 * ((i, answer[i]) in right) for i in known.tolist()])
    mean, low, high = bootstrap_mean(hits, groups=graph.cluster[known])
    label = torch.arange(rules.places_per_batch).repeat_interleave(rules.images_per_place)
    loss = MultiSimilarityLoss(**LOSS)
    batches = [loss(torch.from_numpy(values[batch]), label).item() for batch in CliqueSampler(graph, rules)]
    return {"R@1": mean, "low": low, "high": high, "pictures": len(known), "loss": float(np.mean(batches))}


def seen_and_unseen(town: Path, progress: bool = True) -> dict[str, Places]:
    """Pictures of `TOWNS` towns that a model was trained on, and of as many others, rendered when missing."""
    settings = runs.read_json(town / "settings.json")
    seeds, size = settings["seeds"]["train"], settings["size"]
    others = range(max(seeds) + 1, max(seeds) + 1 + TOWNS)
    unseen = write_town(
        town.with_name(f"{town.name}-unseen"),
        train_seeds=others,
        val_seeds=(),
        test_seeds=(),
        images_per_town=settings.get("train_images_per_town") or TRAIN_IMAGES_PER_TOWN,
        size=size,
        progress=progress,
    )
    seen = open_training_set(town.parent, town.name)
    part = np.isin(seen.city, [f"town{seed}" for seed in seeds[:TOWNS]])
    return {"seen in training": seen[part], "unseen": open_training_set(unseen.parent, unseen.name)}


def main(arguments: list[str] | None = None) -> int:
    """The command ``python -m workbench.probes``."""
    parser = argparse.ArgumentParser(prog="python -m workbench.probes", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", required=True, help="as in notebook 06")
    add("--town", type=Path, help="the town they were trained on: what do they know by heart?")
    add("--sets", type=Path, nargs="*", default=[], help="test sets whose queries are shifted")
    add(
        "--image-size",
        type=int,
        required=True,
        help="side of the pictures in pixels, the same for all models",
    )
    add("--runs", type=Path, default=runs.runs_root(), help="folder of runs")
    add(
        "--export",
        type=Path,
        required=True,
        help="folder of the two tables, and of trained models beside runs",
    )
    options = parser.parse_args(arguments)
    shifted, heart, how = [], [], dict(preprocess=Preprocess(options.image_size, "antialias"))
    try:
        towns = seen_and_unseen(options.town) if options.town else {}
        sets = [open_set(path.parent, path.name) for path in options.sets]
        for name, model in open_models(options.models, [options.runs, options.export.parent]).items():
            own, folder = {"model": name}, options.runs / "descriptors"
            for test in sets:
                shifted.append(sideways_shift(model, test, folder, **how).assign(dataset=test.name, **own))
            heart += [own | {"towns": t} | by_heart(model, p, folder, **how) for t, p in towns.items()]
        tables = {"sideways-shift": pd.concat(shifted or [pd.DataFrame()]), "by-heart": pd.DataFrame(heart)}
        for name, table in tables.items():
            write_table(table, options.export / f"{name}.csv")
            print(table.to_string(index=False, float_format="{:.2f}".format), end="\n\n")
    except (ValueError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
