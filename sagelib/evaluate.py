"""A model on a test set under a context: counts, in a run directory; one photograph; models by name."""

import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml

from sagelib import describe as describing
from sagelib import retrieval, runs
from sagelib.describe import AUTOCAST, Context, Descriptors, describe
from sagelib.images import Preprocess, load_image
from sagelib.model import build_model, load_foreign
from sagelib.places import BENCHMARKS, Places, TestSet
from sagelib.retrieval import KS, PCA, Difference, Recall, paired_bootstrap, recall, search
from sagelib.train import load_trained
from sagelib.weights import load_authors_checkpoint

STAGE = "evaluate"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One model on one test set under one context, as it lies in its run directory."""

    model: str
    dataset: str
    split: str
    positives: str  # the rule or the file that says which references answer a query
    context: str
    preprocess: str
    dim: int  # of the descriptors that were searched
    n_database: int
    n_queries: int
    n_without_positive: int  # such queries are misses
    n_in_database: int  # queries that are references as well, by file or by pixels
    hits: dict[int, int]  # for each k, how many queries have a positive among their k nearest references
    seconds: dict[str, float]  # of embedding (references and queries), head and search
    images_per_s: float  # of embedding
    seed: int | None  # of a shuffled context
    model_fingerprint: str
    data_fingerprint: str
    descriptors: dict[str, str]  # folders of the references' and the queries', relative to `path`
    left_out: tuple[str, ...]  # a sentence for each picture that was skipped on request
    warning: str  # where the set is not the published one, or queries lie in the data base
    per_query_rank: np.ndarray = field(repr=False)  # (n_queries,) of the first positive; 0: beyond the ranks
    path: Path  # the run directory
    folder: str = ""  # of its queries, where it is a part: see `workbench.tables.by_folder`

    @classmethod
    def load(cls, path) -> "Evaluation":
        """Read a finished evaluation; raises a FileNotFoundError where there is none."""
        path = Path(path)
        run = runs.load_run(path)
        if run.stage != STAGE or not run.finished:
            raise FileNotFoundError(f"{path} holds no finished evaluation")
        facts, ranks = runs.read_json(path / "result.json", "recall"), runs.load_array(path / "ranks.npy")
        del facts["recall"]
        with runs.broken(path / "result.json", "no result of an evaluation"):
            facts |= {"hits": {int(k): n for k, n in facts["hits"].items()}, "positives": run.config["rule"]}
            return cls(**{**facts, "left_out": tuple(facts["left_out"])}, per_query_rank=ranks, path=path)

    @property
    def recall(self) -> Recall:
        """Its recall, with intervals and for paired comparisons."""
        return Recall(self.hits, self.n_queries, self.n_without_positive, self.per_query_rank)

    def rankings(self) -> pd.DataFrame:
        """What every query found, a row each query and rank; see `sagelib.retrieval.rankings_table`."""
        table = pd.read_csv(self.path / "rankings.csv")
        return table[table["query_path"].str.startswith(self.folder)]

    def __str__(self):
        inside = f"; {self.n_in_database} queries lie in the data base" if self.n_in_database else ""
        return f"{self.model} on {self.dataset} ({self.split}), context {self.context}: {self.recall}{inside}"


def evaluate(model: Callable, test_set: TestSet, root, *, name: str | None = None,
             model_name: str | None = None, preprocess: Callable | None = None,
             context: str | Context = "none", anchors: np.ndarray | None = None, pca: PCA | None = None,
             index: str | None = None, ks: Sequence[int] = KS, dtype: str = "float16",
             device: str | torch.device = "auto", seed: int = 0, on_error: str = "raise",
             **options) -> Evaluation:  # fmt: skip
    """Describe a test set, search it, count recall, and keep all of it in a run directory.

    ``root/evaluate/<name>/`` gets result.json, ranks.npy (of first positives), rankings.csv and a manifest;
    descriptors lie in ``root/descriptors/``. The same call again returns the finished result, or goes on, if
    model and preprocess are of this package or have a ``fingerprint``; other settings raise a `RunConflict`.

    Parameters
    ----------
    model, preprocess, anchors, dtype, device, seed, on_error, **options
        As for `describe`; ``precision`` is float32 if it is not given: the digits of any machine.
    test_set, root : TestSet, path
        From `sagelib.places.open_set`, and a folder of runs.
    name, model_name : str, optional
        Of the run, and of the model in tables (default: its ``name``, or that of its class).
    context, pca, ks : str or Context, PCA, sequence of int
        See `context_of`; applied to descriptors before the search; ranks at which recall is counted.
    index : str, optional
        For large maps, ``PCAR256,IVF1024,PQ128x4fs``, see `sagelib.retrieval.open_index`; default: exact.
    """
    context, preprocess = context_of(context, test_set.name), describing.preprocess_of(model, preprocess)
    own_name = getattr(model, "name", None) or getattr(model, "__name__", None) or type(model).__name__
    model_name = model_name or own_name.replace("/", "_")
    fingerprint = describing.model_fingerprint(model)
    if context.kind == "anchors":
        anchors = describing.own_anchors(model) if anchors is None else np.asarray(anchors, np.float32)
    config = dict(model=model_name, model_fingerprint=fingerprint.under(context), dataset=test_set.name)
    config |= dict(split=test_set.split, rule=str(test_set.rule), context=str(context), dtype=dtype)
    config["anchors"] = runs.fingerprint(anchors) if context.kind == "anchors" else None
    config |= dict(preprocess=describing.describe_callable(preprocess), on_error=on_error)
    config["pca"] = None if pca is None else runs.fingerprint(pca)
    config["ks"] = [runs.check("k", k, 1, whole=True) for k in ks]
    faster = {"index": index, "precision": options.get("precision")}
    config |= {key: value for key, value in faster.items() if value}
    data = data_fingerprint(test_set)
    seed_of_context = seed if context.kind == "shuffled" else None
    if name is None:  # another preprocess, seed or model of the same name is another run, not a conflict
        settings = runs.fingerprint([config, data, seed_of_context])[:6]
        name = f"{model_name}-{test_set.name}-{context}-{settings}"
    device = describing.move_to(model, device)
    name = re.sub(r'[/\\:*?"<>|\s]+', "_", name).lstrip("._")  # of a folder
    run = runs.Run.open(root, STAGE, name, config, seed=seed_of_context, data_fingerprint=data, device=device)
    if run.finished:
        return Evaluation.load(run.dir)

    positives = test_set.positives()  # before the hours of describing, for positions may be unknown
    options |= dict(preprocess=preprocess, context=context, anchors=anchors, fingerprint=fingerprint)
    options |= dict(dtype=dtype, device=device, seed=seed, on_error=on_error)
    options["precision"] = options.get("precision") or "float32"
    store = Path(root) / "descriptors"
    references = describe(model, test_set.database, store, loader="database", **options)
    queries = describe(model, test_set.queries, store, loader="queries", **options)
    row_of = np.full(len(test_set.database), -1)  # of each reference, unless it was skipped
    row_of[references.rows] = np.arange(len(references))
    positives = [rows[rows >= 0] for rows in (row_of[positives[query]] for query in queries.rows)]

    began = time.perf_counter()
    values = [d.values if pca is None else pca.transform(d) for d in (references, queries)]
    key = {"descriptors": references.manifest, "pca": config["pca"]}
    built = retrieval.open_index(index, values[0], references.path, key) if index else None
    indices, distances = search(*values, max(ks), index=built)
    counted = recall(indices, positives, ks, n_references=len(references))
    search_s, sides = time.perf_counter() - began, {"database": references, "queries": queries}
    parts = {name: d.kept(getattr(test_set, name)) for name, d in sides.items()}
    table = retrieval.rankings_table(indices, distances, *parts.values(), positives)
    with runs.atomic_path(run.path("rankings.csv")) as temporary:
        table.to_csv(temporary, index=False)
    runs.save_array(run.path("ranks.npy"), counted.per_query_rank)
    head_s = sum(d.manifest["seconds"] for d in sides.values() if "embedding_seconds" in d.manifest)
    embed_s = sum(d.manifest.get("embedding_seconds", d.manifest["seconds"]) for d in sides.values())
    n_inside = _in_database(*parts.values(), indices, distances)
    inside = f"{n_inside} of {counted.n_queries} queries lie in the data base" if n_inside else ""
    kept = ("model", "dataset", "split", "context", "preprocess", "model_fingerprint")
    facts = {name: run.config[name] for name in kept} | {
        **{name: getattr(counted, name) for name in ("n_queries", "n_without_positive", "hits")},
        "n_database": len(parts["database"]),
        "images_per_s": round(sum(map(len, parts.values())) / max(embed_s, 1e-9), 2),
        "dim": values[0].shape[1],
        "n_in_database": n_inside,
        "seconds": {"embed": round(embed_s, 3), "head": round(head_s, 3), "search": round(search_s, 3)},
        **{name: run.manifest[name] for name in ("seed", "data_fingerprint")},
        "descriptors": {n: Path(os.path.relpath(d.path, run.dir)).as_posix() for n, d in sides.items()},
        "left_out": [sentence for part in parts.values() for sentence in part.left_out],
        "warning": "; ".join(filter(None, (test_set.warning, inside))),
    }
    # The recall is for readers without this package.
    shown = {f"R@{k}": {"percent": counted.percent(k), "interval": counted.interval(k)} for k in counted.hits}
    runs.write_json(run.path("result.json"), {**facts, "recall": shown})
    counts = ("n_queries", "n_database", "n_without_positive", "images_per_s")
    run.finish({k: round(r["percent"], 4) for k, r in shown.items()} | {name: facts[name] for name in counts})
    return Evaluation.load(run.dir)


def data_fingerprint(test_set: TestSet) -> str:
    """A hash of a test set: its tables, its rule, and what its pictures hold."""
    pictures = [describing.pictures_fingerprint(part) for part in (test_set.database, test_set.queries)]
    return runs.fingerprint([test_set.fingerprint(), *pictures])


def _in_database(database, queries, indices, distances) -> int:
    """How many queries lie in the data base: as the same file, or with the same pixels at distance 0."""
    files, count = set(map(describing.file_digest, database.path)), 0
    for path, row, distance in zip(queries.path, indices[:, 0], distances[:, 0], strict=True):
        same = describing.file_digest(path) in files
        if not same and distance == 0:
            a, b = load_image(path), load_image(database.path[row])
            same = a.size == b.size and a.tobytes() == b.tobytes()
        count += same
    return count


def compare(a: Evaluation, b: Evaluation, k: int = 1, seed: int = 0, *, groups=None) -> Difference:
    """R@k of b less that of a over the same queries, by `paired_bootstrap`; other pictures are refused."""
    for what in ("dataset", "data_fingerprint"):
        if (of_a := getattr(a, what)) != (of_b := getattr(b, what)):
            names = f"{a.path.name} and {b.path.name}"
            raise ValueError(f"{names} cannot be compared: {what} is {of_a} and {of_b}")
    return paired_bootstrap(a.recall, b.recall, k, seed, groups=groups)


def context_of(context: str | Context, dataset: str) -> Context:
    """A context; ``sorted`` alone has the authors' batch size for the data set, 8 where they name none."""
    if context == "sorted":
        context = f"sorted-{getattr(BENCHMARKS.get(dataset), 'sorted_batch', None) or 8}"
    return Context.parse(context)


def predict(model: Callable, database: Places, queries: Places, root, *, k: int = 20, **options):
    """A DataFrame of the references ranked for each query, of which nothing need be known.

    Columns: see `sagelib.retrieval.rankings_table`. Descriptors lie in ``root/descriptors/``; options are
    those of `describe`, in float32 if no ``precision`` is given.
    """
    options["precision"] = options.get("precision") or "float32"
    tables, store = {"database": database, "queries": queries}, Path(root) / "descriptors"
    sides = {n: describe(model, table, store, loader=n, **options) for n, table in tables.items()}
    found = search(*(d.values for d in sides.values()), k)
    return retrieval.rankings_table(*found, *(d.kept(tables[n]) for n, d in sides.items()))


def locate(
    photo, descriptors: Descriptors, places: Places, model, k=5, *, preprocess=None, index=None, device="auto"
) -> pd.DataFrame:
    """Find where a photograph, a path or a PIL image, was taken: the k nearest of a described folder.

    The `descriptors` must be of these places, model and preprocess (or it is a ValueError), in a context
    without a batch: none, solo or anchors; `index` and `device` are as for `evaluate`. A DataFrame of rank,
    path, distance (of descriptors), east_m, north_m, utm_zone, heading_deg and row (of `places`).
    """
    context, preprocess = Context.parse(descriptors.context), describing.preprocess_of(model, preprocess)
    if context.batched:
        raise ValueError(f"one photograph has no batch, as {context} needs: use none, solo or anchors")
    for what, key, given in (
        ("places", "n_given", len(places)),
        ("model", "model", describing.model_fingerprint(model).under(context)),
        ("preprocess", "preprocess", describing.describe_callable(preprocess)),
    ):
        if (made := descriptors.manifest[key]) != given:
            raise ValueError(f"the descriptors in {descriptors.path} are of {what} {made}, not {given}")
    device, anchors = describing.move_to(model, device), None
    if context.kind == "anchors":
        anchors = torch.from_numpy(runs.load_array(descriptors.path / "anchors.npy")).to(device)
    image = preprocess(load_image(photo))[None].to(device)
    precision = AUTOCAST[descriptors.precision]
    value = describing.describe_batch(model, image, context, anchors=anchors, autocast=precision).cpu()
    key, k = {"descriptors": descriptors.manifest, "pca": None}, min(k, len(descriptors))
    built = retrieval.open_index(index, descriptors.values, descriptors.path, key) if index else None
    indices, distances = search(descriptors.values, value.numpy(), k, index=built)
    rows = descriptors.rows[indices[0][found := indices[0] >= 0]]
    columns = {"path": places.path[rows], "distance": distances[0][found]}
    columns |= {n: getattr(places, n)[rows] for n in ("east_m", "north_m", "utm_zone", "heading_deg")}
    return pd.DataFrame({"rank": np.arange(1, len(rows) + 1), **columns, "row": rows})


ARGUMENT = r":(?=\w+=)"  # begins an argument of a name
POOLINGS = {"gem": {}, "gem2x2": {"grid": 2}, "mean": {}, "cls": {}}


def open_model(spec: str, roots: Iterable = ()) -> Callable:
    """A model by the name that a command line or a notebook's parameter gives it, in evaluation mode.

    Parameters
    ----------
    spec : str
        ``pixels``; ``POOLING:BACKBONE``, with gem, gem2x2, mean or cls, for a frozen backbone with pooling,
        ``POOLING:BACKBONE:FILE`` to read its weights from a file, ``POOLING:BACKBONE:random`` for none; a
        training run (its folder, or its name in one of the `roots`); a folder of ``save_pretrained``; a
        released checkpoint's file; or somebody else's network, whose code is run, see `load_foreign`:
        ``hub:OWNER/REPO:ENTRY``, ``hub:FOLDER:ENTRY`` or ``module:function``. Fields of `Preprocess` and
        arguments may follow: ``hub:gmberton/CosPlace:get_trained_model:backbone=ResNet50:image_size=512``.
    roots : iterable of path
    """
    roots = list(roots)
    pooling, colon, rest = spec.partition(":")
    if spec == "pixels":
        return describing.baseline_pixels
    if colon and pooling in POOLINGS:
        backbone, _, weights = rest.partition(":")
        source = {"pretrained": False} if weights == "random" else {"weights": weights or None}
        aggregator = dict(aggregator=pooling.removesuffix("2x2"), aggregator_options=POOLINGS[pooling])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # random weights are the same each time
            return build_model(backbone, **aggregator, **source).eval()
    folder = _model_folder(spec, roots)
    if folder is not None:
        run = (folder / "manifest.json").is_file()
        return load_trained(runs.load_run(folder)) if run else build_model(folder).eval()
    if Path(spec).is_file():
        return load_authors_checkpoint(spec)
    name, *pairs = re.split(ARGUMENT, spec)
    module = re.fullmatch(r"([A-Za-z_]\w*)[\w.]*:[A-Za-z_]\w*", name)
    if name.startswith("hub:") or (module and importlib.util.find_spec(module[1]) is not None):
        values = {key: yaml.safe_load(text) for key, _, text in (pair.partition("=") for pair in pairs)}
        asked = {f.name: values.pop(f.name) for f in fields(Preprocess) if f.name in values}
        Preprocess(**asked)  # wrong values end here
        return load_foreign(name, values, **asked)
    searched = [Path(root).absolute() / "train" for root in roots]
    names = sorted({path.parent.name for folder in searched for path in folder.glob("*/manifest.json")})
    raise ValueError(
        f"there is no model {spec!r}: give pixels, gem:BACKBONE, gem:BACKBONE:FILE (or gem2x2, mean, cls), a "
        "training run, a folder written by save_pretrained, a released checkpoint's file, "
        "hub:OWNER/REPO:ENTRY, hub:FOLDER:ENTRY or module:function. Runs found: "
        f"{', '.join(names) or 'none'}; searched: {', '.join(map(str, (Path.cwd(), *searched)))}"
    )


def _model_folder(spec, roots):
    """The folder of a training run or of a saved model; None where there is none of that name."""
    folders = (Path(spec), *(Path(root) / "train" / spec for root in roots))
    return next((f for f in folders if any((f / n).exists() for n in ("manifest.json", "config.json"))), None)


def training_run(spec: str, roots: Iterable = ()) -> runs.Run | None:
    """The finished training run that `open_model` would open by this name; None where it is none."""
    folder = _model_folder(spec, roots)
    run = runs.load_run(folder) if folder is not None and (folder / "manifest.json").is_file() else None
    return run if run is not None and run.finished else None


def open_models(specs: Iterable[str], roots: Iterable = ()) -> dict[str, Callable]:
    """Models (see `open_model`) by their short names: of a path its last part, which two may not share."""
    roots, opened = list(roots), {}
    for spec in specs:
        head = re.split(ARGUMENT, spec)[0]
        short = (Path(head).name or head) + spec[len(head) :]
        name = spec if spec.partition(":")[0] in POOLINGS else short
        if name in opened:
            raise ValueError(f"two models are called {name}: rename one of the files or folders")
        opened[name] = open_model(spec, roots)
    return opened


def published(what: str = "recalls") -> pd.DataFrame:
    """Numbers that others published, as they were published; not measured here.

    ``recalls`` are R@1, 5 and 10 in percent (the context ``sorted`` has the authors' batch size for the set),
    ``ablation`` is R@1, ``parameters`` are counts that can be derived, ``graph`` is what its creation costs.
    """
    runs.check("what", what, choices=("recalls", "ablation", "parameters", "graph"))
    path = Path(__file__).with_name(f"published_{what}.csv")
    return pd.read_csv(path, keep_default_na=False, na_values=[""], dtype={"dim": "Int64"})
