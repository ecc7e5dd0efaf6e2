"""The audit of contexts: the same weights and pictures under every choice of which images share a batch.

With the InteractHead, or in somebody else's network across images, a descriptor depends on its neighbours in
the batch. Where the order of the files puts images of one place side by side, sorted batches find more than
shuffled ones: an ordering leak.

    python -m workbench.audit --models random-head:gem2x2:tf_efficientnet_lite2 MY-RUN --sets data/town
"""

import argparse
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from sagelib import describe, runs
from sagelib.describe import Context, own_anchors
from sagelib.evaluate import evaluate, open_model, training_run
from sagelib.images import Preprocess
from sagelib.interact import InteractHead
from sagelib.places import TestSet, open_set
from sagelib.retrieval import KS, recall, search, wilson_interval
from workbench.grids import keep
from workbench.tables import bootstrap_mean, query_places

STAGE = "audit"
SIZES = (2, 4, 8, 16, 32)
CONTEXTS = ("none", "solo", *(f"{kind}-{n}" for n in SIZES for kind in ("sorted", "shuffled")))


@dataclass(frozen=True)
class Audit:
    """Recall of one model on one set under several contexts, from one embedding of the pictures.

    `table` has a row for each context and shuffle: context, kind, n (0: no batch size), shuffle, n_queries,
    hits@k and R@k (percent). `ranks`, by ``context`` or ``context#shuffle``, are each query's rank of its
    first positive (0: none), `places` says which queries are of one place, and `path` is the run's directory.
    """

    model: str
    dataset: str
    table: pd.DataFrame
    ranks: dict[str, np.ndarray]
    places: np.ndarray
    path: Path

    def summary(self, k: int = 1) -> pd.DataFrame:
        """A row for each context: mean and range of R@k over the shuffles, and Wilson's interval."""
        rows = []
        for context, group in self.table.groupby("context", sort=False):
            percent, n = group[f"R@{k}"], int(group["n_queries"].iloc[0])
            low, high = wilson_interval(round(percent.mean() * n / 100), n)
            row = {"context": context, "kind": group["kind"].iloc[0], "n": int(group["n"].iloc[0])}
            row |= {"shuffles": len(group), f"R@{k}": percent.mean()}
            row |= {"spread_low": percent.min(), "spread_high": percent.max()}
            rows.append(row | {"interval_low": low, "interval_high": high})
        return pd.DataFrame(rows)

    def leak(self, k: int = 1, seed: int = 0) -> pd.DataFrame:
        """R@k under sorted-n less its mean under shuffled-n, in points, for each n, with a 95 % interval.

        An interval above zero is an ordering leak. Queries of one place are resampled together, from `seed`.
        """
        hit = {key: (ranks > 0) & (ranks <= k) for key, ranks in self.ranks.items()}
        rows = []
        for n in sorted(set(self.table.loc[self.table["kind"] == "sorted", "n"])):
            shuffled = [hits for key, hits in hit.items() if key.startswith(f"shuffled-{n}#")]
            if shuffled:
                change = hit[f"sorted-{n}"] - np.mean(shuffled, axis=0)
                points, low, high = bootstrap_mean(100 * change, seed=seed, groups=self.places)
                rows.append({"n": n, "points": points, "low": low, "high": high})
        return pd.DataFrame(rows, columns=["n", "points", "low", "high"])


def audit_contexts(
    model, test_set: TestSet, root, *, contexts=CONTEXTS, shuffles: int = 5, seed: int = 0, **options
) -> Audit:
    """Measure one model under many contexts; its pictures go through the backbone once.

    Parameters
    ----------
    model : SAGE with an InteractHead, or a network without ``embed``
        Through such a network the pictures go once for each context and shuffle, and it has no context none.
    test_set : TestSet
    root : path
        A folder of runs; the audit is written to ``root/audit/<name>/``, and found there again.
    contexts : sequence of str
    shuffles : int
        Permutations of each shuffled-n, from the seeds `seed`, `seed` + 1, ...
    **options
        Of `sagelib.evaluate.evaluate`: model_name, preprocess, device, progress, ...

    Raises
    ------
    ValueError
        For contexts that are unknown or twice there, and for a model that no other image matters to.
    """
    contexts = [Context.parse(context) for context in contexts]
    if len(set(contexts)) < len(contexts):
        raise ValueError(f"contexts must be different, got {', '.join(map(str, contexts))}")
    runs.check("shuffles", shuffles, 1, whole=True)
    whole = not hasattr(model, "embed")  # it composes its own batches
    first = dict(context=contexts[0] if whole else "none", seed=seed)
    plain = evaluate(model, test_set, root, **first, **options)  # also checks and describes the set
    anchors = own_anchors(model) if Context("anchors") in contexts else None
    config = {key: getattr(plain, key) for key in ("model", "dataset", "preprocess")}
    config["model_fingerprint"] = describe.model_fingerprint(model).whole  # with its head
    config |= {"contexts": [str(c) for c in contexts], "shuffles": shuffles, "rule": str(test_set.rule)}
    config["anchors"] = None if anchors is None else runs.fingerprint(anchors)
    name = f"{plain.path.name}-{runs.fingerprint(config)[:6]}"
    run = runs.Run.open(root, STAGE, name, config, seed=seed, data_fingerprint=plain.data_fingerprint)
    if run.finished:
        return load_audit(run.dir)
    parts = {"database": test_set.database, "queries": test_set.queries}
    stored = {part: describe.Descriptors(plain.path / plain.descriptors[part]).values for part in parts}
    names = {part: describe.names_in_order(places) for part, places in parts.items()}
    positives, rows, ranks = test_set.positives(), [], {}
    jobs = [(c, i) for c in contexts for i in range(shuffles if c.kind == "shuffled" else 1)]
    quiet = not options.get("progress", True)
    for context, shuffle in tqdm(jobs, desc=f"audit {test_set.name}", unit="context", disable=quiet):
        how = dict(anchors=anchors, seed=seed + shuffle, device=options.get("device", "auto"))
        if whole:
            one = {**options, **how, "context": context, "progress": False}
            counted = evaluate(model, test_set, root, **one).recall
        else:
            composed = [
                describe.compose(model, v, names[part], context, np.empty_like(v), loader=part, **how)
                for part, v in stored.items()
            ]
            found = search(*composed, max(KS))[0]
            counted = recall(found, positives, KS, n_references=len(test_set.database))
        ranks[f"{context}#{shuffle}" if context.kind == "shuffled" else str(context)] = counted.per_query_rank
        row = {"context": str(context), "kind": context.kind, "n": context.n or 0, "shuffle": shuffle}
        row |= {"n_queries": counted.n_queries, **{f"hits@{k}": counted.hits[k] for k in KS}}
        row |= {f"R@{k}": counted.percent(k) for k in KS}
        rows.append(row)
    table = pd.DataFrame(rows)
    with runs.atomic_path(run.path("ranks.npz")) as temporary:
        np.savez_compressed(temporary, places=query_places(test_set.queries), **ranks)
    with runs.atomic_path(run.path("audit.csv")) as temporary:
        table.to_csv(temporary, index=False)
    run.finish(table.groupby("context", sort=False)[f"R@{KS[0]}"].mean().to_dict())
    return load_audit(run.dir)


def load_audit(path) -> Audit:
    """Read a finished audit from its run directory."""
    run = runs.load_run(path)
    if run.stage != STAGE or not run.finished:
        raise FileNotFoundError(f"{path} holds no finished audit")
    with np.load(run.dir / "ranks.npz") as file:
        ranks = dict(file)
    table = pd.read_csv(run.dir / "audit.csv", keep_default_na=False)
    return Audit(run.config["model"], run.config["dataset"], table, ranks, ranks.pop("places"), run.dir)


def open_audited(spec: str, root, seed: int = 0):
    """A model by its name for `open_model`, with an InteractHead or in one piece; its training run, or None.

    Behind ``random-head:``, that model with a head of random weights from `seed`: what such a head does to
    recall is the context's doing alone. Raises a ValueError if there is no such model, or it has no head.
    """
    mark, _, rest = spec.partition(":")
    name = rest if mark == "random-head" else spec
    model, run = open_model(name, [root]), training_run(name, [root])
    if mark == "random-head":
        if not hasattr(model, "head"):
            raise ValueError(f"{name} can be given no head: it is no model of this package")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(runs.torch_seed(seed, "random head"))
            model.head = InteractHead(model.width, segment_width=math.gcd(model.width, 768)).eval()
    elif hasattr(model, "embed") and not model.has_head:
        raise ValueError(
            f"{spec} has no InteractHead to be audited; random-head:{spec} gives it one of random weights"
        )
    return model, run


def main(arguments: list[str] | None = None) -> int:
    """The command ``python -m workbench.audit``."""
    parser = argparse.ArgumentParser(prog="python -m workbench.audit", description=__doc__.splitlines()[0])
    add, look = parser.add_argument, "(default: the model's own, else {})"
    models = "a training run with a head, a released checkpoint's file, random-head: before any name, or a "
    models += "network across images: hub:OWNER/REPO:ENTRY, hub:FOLDER:ENTRY, module:function (runs its code)"
    add("--models", nargs="+", required=True, metavar="[LABEL=]NAME", help=models)
    add("--sets", type=Path, nargs="+", required=True, help="sets whose test part is measured")
    add("--runs", type=Path, default=Path("data/runs"), help="folder of runs")
    add("--export", type=Path, help="folder for a small copy, as data/results/audit")
    add("--shuffles", type=int, default=5, help="permutations of each shuffled-n")
    add("--size", type=int, help=f"pixels a side {look.format(224)}")
    add("--preprocess", help=f"mode of preprocessing {look.format('antialias')}")
    add("--seed", type=int, default=0)
    add("--device", default="auto")
    options = parser.parse_args(arguments)
    audits = []
    try:
        test_sets = [open_set(folder.parent, folder.name) for folder in options.sets]
        for text in options.models:
            match = re.fullmatch(r"([\w.-]+)=(.+)", text)
            label, spec = match.groups() if match else (Path(text).name.replace(":", "-"), text)
            model, run = open_audited(spec, options.runs, options.seed)
            trained = {} if run is None else run.config
            saved = {"image_size": 224, "mode": "antialias"} | (getattr(model, "preprocessing", None) or {})
            size = options.size or trained.get("validation_size", saved["image_size"])
            preprocess = Preprocess(size, options.preprocess or trained.get("preprocess", saved["mode"]))
            contexts = CONTEXTS if hasattr(model, "embed") else CONTEXTS[1:]  # without none
            contexts += () if own_anchors(model) is None else ("anchors",)
            how = dict(model_name=label, preprocess=preprocess, device=options.device, seed=options.seed)
            how |= dict(contexts=contexts, shuffles=options.shuffles)
            audits += [audit_contexts(model, test_set, options.runs, **how) for test_set in test_sets]
        if options.export is not None:
            keep([audit.path for audit in audits], options.export / STAGE)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    for one in audits:
        print(f"\n{one.model} on {one.dataset}: R@1, and sorted less shuffled")
        for table in (one.summary(), one.leak()):
            print(table.to_string(index=False, float_format="{:.1f}".format))
    return 0


if __name__ == "__main__":
    sys.exit(main())
