"""A model on a benchmark under a context: a result with counts, in a run directory; tables of results; the audit of contexts."""

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import hypergeom

from sagelib import places as places_module
from sagelib import runs
from sagelib.describe import (
    Context,
    Descriptors,
    baseline_pixels,
    describe,
    describe_batch,
    describe_callable,
    file_digest,
    model_fingerprint,
    move_to,
    own_anchors,
    pick_device,
    pictures_fingerprint,
    preprocess_of,
)
from sagelib.images import load_image
from sagelib.model import build_model
from sagelib.retrieval import (
    KS,
    PCA,
    Difference,
    Recall,
    paired_bootstrap,
    recall,
    search,
    write_rankings,
)
from sagelib.train import load_trained
from sagelib.weights import load_authors_checkpoint

STAGE, AUDIT_STAGE, STORE = "evaluate", "audit", "descriptors"


# --------------------------------------------------------------------------------------------------- results
@dataclass(frozen=True, kw_only=True)
class Result:
    """One model on one test set under one context.

    Attributes
    ----------
    model, dataset, split, context : str
    preprocess : str
    dim : int
        Dimensions of the descriptors that were searched.
    n_database, n_queries, n_without_positive : int
        A query without a positive is a miss.
    hits : dict of int to int
        For each k, how many queries have a positive among their k nearest references.
    seconds : dict of str to float
        Of embedding (references and queries), head and search.
    images_per_s : float
        Of embedding.
    seed : int or None
        Of a shuffled context.
    model_fingerprint, data_fingerprint : str
    descriptors : dict of str to str
        Folders of the references' and the queries' descriptors, relative to `path`.
    left_out : tuple of str
        What was skipped on request, when the set was read or described: one sentence each.
    warning : str
        A sentence where the set is not as large as in the published evaluations, or queries lie in the data base.
    n_in_database : int
        Queries that are also references: the same file, or the same pixels at distance 0.
    per_query_rank : array (n_queries,)
        Rank of each query's first positive, 0: not among those searched.
    path : Path
        The run directory, which also holds rankings.csv.
    """

    model: str
    dataset: str
    split: str
    context: str
    preprocess: str
    dim: int
    n_database: int
    n_queries: int
    n_without_positive: int
    hits: dict[int, int]
    seconds: dict[str, float]
    images_per_s: float
    seed: int | None
    model_fingerprint: str
    data_fingerprint: str
    descriptors: dict[str, str]
    left_out: tuple[str, ...] = ()
    warning: str = ""
    n_in_database: int = 0
    per_query_rank: np.ndarray = field(repr=False)
    path: Path

    def rankings(self) -> pd.DataFrame:
        """What every query found; columns as `sagelib.retrieval.write_rankings` wrote them."""
        return pd.read_csv(self.path / "rankings.csv")

    @property
    def recall(self) -> Recall:
        """Its recall, with intervals and for paired comparisons."""
        return Recall(self.hits, self.n_queries, self.n_without_positive, self.per_query_rank)

    def __str__(self):
        inside = f"; {self.n_in_database} queries lie in the data base" if self.n_in_database else ""
        return f"{self.model} on {self.dataset} ({self.split}), context {self.context}: {self.recall}{inside}"


def load_result(path) -> Result:
    """Read a finished evaluation from its run directory.

    Raises
    ------
    FileNotFoundError
        If there is no finished evaluation.
    """
    path = Path(path)
    run = runs.load_run(path)
    if run.stage != STAGE or not run.finished:
        raise FileNotFoundError(
            f"{path} holds no finished evaluation: it is {run.stage}, {run.manifest['status']}"
        )
    facts = runs.read_json(path / "result.json")
    del facts["recall"]
    facts["hits"] = {int(k): hits for k, hits in facts["hits"].items()}
    facts["left_out"] = tuple(facts["left_out"])
    return Result(**facts, per_query_rank=np.load(path / "ranks.npy"), path=path)


def load_results(root) -> list[Result]:
    """All finished evaluations in a folder of runs, sorted by name."""
    return [load_result(run.dir) for run in runs.find_runs(root, STAGE)]


def read_results(
    root,
    datasets: Iterable[str] | str,
    models: Iterable[str] | str,
    *,
    context: str | Context,
    preprocess: Callable,
) -> list[Result]:
    """The finished evaluations of these models on these sets, made in this way; what was not run is left out.

    Parameters
    ----------
    root : path
        A folder of runs.
    datasets, models : iterable of str, or str
        Names as tables give them.
    context : str or Context
        As for `evaluate`.
    preprocess : callable

    Returns
    -------
    list of Result
        In the order of `models`, then of `datasets`; of two alike, the one that was finished last.
    """
    latest = sorted(runs.find_runs(root, STAGE), key=lambda run: run.manifest["finished"])
    found = {
        (r.model, r.dataset, r.context, r.preprocess): r for r in (load_result(run.dir) for run in latest)
    }
    datasets, models = ([names] if isinstance(names, str) else list(names) for names in (datasets, models))
    how = describe_callable(preprocess)
    keys = [(m, d, str(_resolve_context(context, d)), how) for m in models for d in datasets]
    return [found[key] for key in keys if key in found]


def compare(a: Result, b: Result, k: int = 1, seed: int = 0, **options) -> Difference:
    """R@k of b less that of a over the same queries, by `paired_bootstrap`, whose `options` these are.

    Queries of one place move together: give ``groups=query_places(test_set.queries)``.

    Raises
    ------
    ValueError
        If the two were measured on different pictures.
    """
    for what in ("dataset", "data_fingerprint"):
        mine, theirs = getattr(a, what), getattr(b, what)
        if mine != theirs:
            raise ValueError(
                f"{a.path.name} and {b.path.name} cannot be compared: {what} is {mine} and {theirs}"
            )
    return paired_bootstrap(a.recall, b.recall, k, seed, **options)


def query_places(queries, radius_m: float = 25.0) -> np.ndarray:
    """The place of each query, for resampling by places: its label, or else its cluster by geography.

    Parameters
    ----------
    queries : Places
    radius_m : float
        Of `Places.with_clusters`, in metres. A query without a position is a place of its own.

    Returns
    -------
    array (n,), int64
    """
    places = queries if (queries.place >= 0).all() else queries.with_clusters(radius_m)
    labels = places.labels() if places is queries else places.place.copy()
    alone = labels < 0
    labels[alone] = labels.max(initial=0) + 1 + np.arange(alone.sum())
    return labels


# ------------------------------------------------------------------------------------------------- evaluation
def evaluate(
    model: Callable,
    test_set,
    root,
    *,
    name: str | None = None,
    model_name: str | None = None,
    preprocess: Callable | None = None,
    context: str | Context = "none",
    anchors: np.ndarray | None = None,
    pca: PCA | None = None,
    batch_size: int = 32,
    dtype: str = "float16",
    device: str | torch.device = "auto",
    workers: int = 0,
    seed: int = 0,
    on_error: str = "raise",
    ks: Sequence[int] = KS,
    progress: bool = True,
) -> Result:
    """Describe a test set, search it exactly, count recall, and write all of it into a run directory.

    ``root/evaluate/<name>/`` gets result.json, ranks.npy (each query's rank of its first positive), rankings.csv (what each query
    found, with distances and metres) and the manifest. Descriptors lie in ``root/descriptors/``, where evaluations of the same
    model under other contexts find them. The same call again returns the finished result; a call that was killed goes on. A model or
    preprocess that is not of this package needs an attribute ``fingerprint`` for that; without one it is measured anew each time.

    Parameters
    ----------
    model : SAGE or callable
        See `describe`.
    test_set : TestSet
        From `sagelib.places.open_set`.
    root : path
        A folder of runs.
    name : str, optional
        Of the run; default: model, data set, context, and a hash of the settings.
    model_name : str, optional
        How tables call the model; default: its ``name``, or that of its class.
    context : str or Context
        See `Context`. ``sorted`` without a number takes the authors' batch size for the set, 8 where they name none.
    pca : PCA, optional
        Applied to the descriptors before the search.
    ks : sequence of int
        Recall is counted at these ranks; where there are fewer references than a rank, all of them are counted.
    preprocess, anchors, batch_size, dtype, device, workers, seed, on_error, progress
        See `describe`.

    Raises
    ------
    RunConflict
        If `name` is a run of other settings.
    ValueError
        For settings that do not fit, and for what `describe` refuses.
    """
    context = _resolve_context(context, test_set.name)
    preprocess = preprocess_of(model, preprocess)
    ks = _check_ks(ks)
    device = pick_device(device)
    model_name = model_name or _name_of(model)
    if context.kind == "anchors":
        anchors = own_anchors(model) if anchors is None else np.asarray(anchors, np.float32)
        if anchors is None:
            raise ValueError(
                "context is anchors, but none are given and the model has none: see choose_anchors"
            )
    shuffled = context.kind == "shuffled"
    data_fingerprint, fingerprint = _data_fingerprint(test_set), model_fingerprint(model)
    config = {
        "model": model_name,
        "model_fingerprint": fingerprint.under(context),
        "dataset": test_set.name,
        "split": test_set.split,
        "rule": str(test_set.rule),
        "context": str(context),
        "anchors": runs.fingerprint(anchors) if context.kind == "anchors" else None,
        "preprocess": describe_callable(preprocess),
        "dtype": dtype,
        "pca": None if pca is None else runs.fingerprint(pca),
        "on_error": on_error,
        "ks": list(ks),
    }
    if name is None:
        name = f"{model_name}-{test_set.name}-{context}"
        name += f"-seed{seed}" if shuffled else ""
        name += f"-pca{len(pca.components)}" if pca is not None else ""
        # Another preprocess, size or model of the same name is another run, not a conflict.
        name += f"-{runs.fingerprint([config, data_fingerprint])[:6]}"
    run = runs.Run.open(
        root,
        STAGE,
        _plain_name(name),
        config,
        seed=seed if shuffled else None,
        data_fingerprint=data_fingerprint,
        device=device,
    )
    if run.finished:
        return load_result(run.dir)
    options = dict(
        preprocess=preprocess,
        context=context,
        anchors=anchors if context.kind == "anchors" else None,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        workers=workers,
        seed=seed,
        on_error=on_error,
        fingerprint=fingerprint,
        progress=progress,
    )
    test_set.positives()  # positions that are missing are better noticed before the pictures are described
    store = _store(root, model_name, test_set, options)
    references = describe(model, test_set.database, store / "database", loader="database", **options)
    asked = describe(model, test_set.queries, store / "queries", loader="queries", **options)
    database, queries = references.kept(test_set.database), asked.kept(test_set.queries)
    stopwatch = time.perf_counter()
    values = [references.values, asked.values]
    if pca is not None:
        values = [pca.transform(references), pca.transform(asked)]
    indices, distances, positives, counted = _retrieve(*values, database, queries, test_set.rule, ks)
    search_s = time.perf_counter() - stopwatch
    n_in_database = _in_database(database, queries, indices, distances)
    inside = f"{n_in_database} of {len(queries)} queries lie in the data base" if n_in_database else ""
    write_rankings(
        run.path("rankings.csv"),
        indices,
        distances,
        database,
        queries,
        positives,
    )
    runs.save_array(run.path("ranks.npy"), counted.per_query_rank)
    embedding_s = sum(d.manifest.get("embedding_seconds", d.manifest["seconds"]) for d in (references, asked))
    head_s = sum(d.manifest["seconds"] for d in (references, asked)) if context.kind != "none" else 0.0
    facts = {
        "model": model_name,
        "dataset": test_set.name,
        "split": config["split"],
        "context": str(context),
        "preprocess": config["preprocess"],
        "dim": values[0].shape[1],
        "n_database": len(database),
        "n_queries": counted.n_queries,
        "n_without_positive": counted.n_without_positive,
        "hits": counted.hits,
        "seconds": {"embed": round(embedding_s, 3), "head": round(head_s, 3), "search": round(search_s, 3)},
        "images_per_s": round((len(database) + len(queries)) / max(embedding_s, 1e-9), 2),
        "seed": seed if shuffled else None,
        "model_fingerprint": config["model_fingerprint"],
        "data_fingerprint": data_fingerprint,
        "descriptors": {
            "database": _relative(references.path, run.dir),
            "queries": _relative(asked.path, run.dir),
        },
        "left_out": [*database.left_out, *queries.left_out],
        "warning": "; ".join(filter(None, (test_set.warning, inside))),
        "n_in_database": n_in_database,
    }
    # For readers without this package; a Result computes them.
    percents = {f"R@{k}": {"percent": counted.percent(k), "interval": counted.interval(k)} for k in ks}
    runs.write_json(run.path("result.json"), {**facts, "recall": percents})
    run.finish(
        {
            **{f"R@{k}": round(counted.percent(k), 4) for k in ks},
            **{f"R@{k}_interval": counted.interval(k) for k in ks},
            "n_queries": counted.n_queries,
            "n_database": len(database),
            "n_without_positive": counted.n_without_positive,
            "images_per_s": facts["images_per_s"],
        }
    )
    return load_result(run.dir)


def _retrieve(database_values, query_values, database, queries, rule, ks):
    """(indices, distances, positives, Recall): ranks beyond the last reference hold -1, which is never a positive."""
    positives = places_module.positives(database, queries, rule)
    indices, distances = search(database_values, query_values, max(ks))
    return indices, distances, positives, recall(indices, positives, ks, n_references=len(database))


def _in_database(database, queries, indices, distances) -> int:
    """How many queries lie in the data base: as the same file, or with the same pixels at distance 0."""
    files = set(map(file_digest, database.path))
    count = 0
    for path, row, distance in zip(queries.path, indices[:, 0], distances[:, 0], strict=True):
        same = file_digest(path) in files
        if not same and distance == 0:
            a, b = load_image(path), load_image(database.path[row])
            same = a.size == b.size and a.tobytes() == b.tobytes()
        count += same
    return count


@dataclass(frozen=True)
class Evaluations:
    """What `evaluate_many` did.

    Attributes
    ----------
    results : tuple of Result
    missing : dict of str to str
        Data set to the sentence that says what is missing.
    """

    results: tuple[Result, ...]
    missing: dict[str, str]

    def __str__(self):
        return "\n".join([*map(str, self.results), *(f"not run: {s}" for s in self.missing.values())])


def evaluate_many(
    model: Callable,
    data_root,
    names: Iterable[str] | str | None,
    root,
    *,
    split: str | None = None,
    progress: bool = True,
    **options,
) -> Evaluations:
    """Evaluate one model on several sets of a folder of data sets.

    Parameters
    ----------
    model : SAGE or callable
    data_root : path
    names : iterable of str, str, or None
        Benchmarks or folders, or one of them; None: every set that `sagelib.places.available` finds. One that is not there is reported,
        with the sentence of `open_set`, or one that cannot be evaluated, with its error, and the others are evaluated.
    root : path
        A folder of runs.
    split : str, optional
        Default: the benchmark's own, test for other folders.
    **options
        Of `evaluate`, but for `name`.

    Raises
    ------
    OSError, ValueError, MemoryError
        The last error, where sets are there and none could be evaluated.
    """
    if names is None:
        found = places_module.available(data_root)
        names = list(found.loc[found["present"], "name"])
    names = [names] if isinstance(names, str) else names
    results, missing, failed = [], {}, None
    for name in names:
        try:
            # What does not decode is found while describing, without reading every picture twice.
            reading = {"on_error": options.get("on_error", "raise"), "check_pictures": False}
            test_set = places_module.open_set(data_root, name, split, **reading)
        except (FileNotFoundError, ValueError) as error:
            missing[name] = str(error)
            continue
        try:
            results.append(evaluate(model, test_set, root, progress=progress, **options))
        except (OSError, ValueError, MemoryError) as error:
            missing[name], failed = str(error), error
    if failed is not None and not results:
        raise failed
    return Evaluations(tuple(results), missing)


def _resolve_context(context, dataset):
    if context == "sorted":
        context = f"sorted-{getattr(places_module.BENCHMARKS.get(dataset), 'sorted_batch', None) or 8}"
    return Context.parse(context)


def _check_ks(ks):
    ks = tuple(int(k) for k in ks)
    if not ks or min(ks) < 1:
        raise ValueError(f"ks are {ks}; there must be at least one, and each at least 1")
    return ks


def _name_of(model):
    name = getattr(model, "name", None) or getattr(model, "__name__", None) or type(model).__name__
    return str(name).replace("/", "_")


def _data_fingerprint(test_set):
    return runs.fingerprint(
        [
            test_set.fingerprint(),
            pictures_fingerprint(test_set.database),
            pictures_fingerprint(test_set.queries),
        ]
    )


def _store(root, model_name, test_set, options):
    """The folder of a test set's descriptors: its name changes with whatever changes them."""
    what = [
        options["fingerprint"].embedding,
        _data_fingerprint(test_set),
        describe_callable(options["preprocess"]),
        options["dtype"],
    ]
    return Path(root) / STORE / _plain_name(f"{model_name}-{test_set.name}-{runs.fingerprint(what)[:8]}")


def _plain_name(name: str) -> str:
    """A folder's name: what a path or a model's name may hold besides letters becomes an underscore."""
    return re.sub(r'[/\\:*?"<>|\s]+', "_", name).lstrip("._")


def _relative(path, start):
    return Path(os.path.relpath(path, start)).as_posix()


# ------------------------------------------------------------------------------------------- one photograph
def locate(
    photo,
    descriptors: Descriptors,
    places,
    model: Callable,
    k: int = 5,
    *,
    preprocess: Callable | None = None,
    device: str | torch.device = "auto",
) -> pd.DataFrame:
    """Find where a photograph was taken: the k nearest of a described folder.

    Parameters
    ----------
    photo : path or PIL image
    descriptors : Descriptors
        Of the folder, in a context in which a descriptor depends on its image alone: none, solo or anchors.
    places : Places
        That were described.
    model : the model that described them
    k : int
    preprocess : callable, optional
        Default: ``model.preprocess``; must be that of the folder.

    Returns
    -------
    DataFrame
        Columns rank, path, distance (between descriptors), east_m, north_m, utm_zone, heading_deg, row (of
        `places`); nearest first, at most as many rows as the folder has.

    Raises
    ------
    ValueError
        If model, preprocess or number of places are not those of the descriptors, or the context needs a batch.
    """
    context = Context.parse(descriptors.context)
    if context.kind in ("sorted", "shuffled"):
        raise ValueError(
            f"one photograph has no place in context {context}, where a descriptor depends on its batch; describe the "
            "folder with none, solo or anchors"
        )
    preprocess = preprocess_of(model, preprocess)
    if len(places) != descriptors.manifest["n_given"]:
        raise ValueError(
            f"places has {len(places)} pictures, but the descriptors were made of {descriptors.manifest['n_given']}"
        )
    for what, mine, theirs in (
        ("model", model_fingerprint(model).under(context), descriptors.manifest["model"]),
        ("preprocess", describe_callable(preprocess), descriptors.manifest["preprocess"]),
    ):
        if mine != theirs:
            raise ValueError(
                f"the descriptors in {descriptors.path} were made with {what} {theirs}, not {mine}"
            )
    device, anchors = move_to(model, device), None
    if context.kind == "anchors":
        anchors = torch.from_numpy(np.load(descriptors.path / "anchors.npy")).to(device)
    image = preprocess(load_image(photo))[None].to(device)
    value = describe_batch(model, image, context, anchors=anchors).cpu().numpy()
    indices, distances = search(descriptors.values, value, min(k, len(descriptors)))
    rows = descriptors.rows[indices[0]]
    found = places[rows]
    return pd.DataFrame(
        {
            "rank": np.arange(1, len(rows) + 1),
            "path": found.path,
            "distance": distances[0],
            "east_m": found.east_m,
            "north_m": found.north_m,
            "utm_zone": found.utm_zone,
            "heading_deg": found.heading_deg,
            "row": rows,
        }
    )


# ----------------------------------------------------------------------------------------------- models by name
POOLINGS = {"gem": {}, "gem2x2": {"grid": 2}, "mean": {}, "cls": {}}


def open_model(spec: str, roots: Iterable = ()) -> Callable:
    """A model by the name that a command line or a notebook's parameter gives it, in evaluation mode.

    Parameters
    ----------
    spec : str
        ``pixels`` (`baseline_pixels`); ``POOLING:BACKBONE`` with gem, gem2x2, mean or cls, for a frozen backbone with plain pooling,
        ``POOLING:BACKBONE:FILE`` to read its weights from a file, ``POOLING:BACKBONE:random`` for none; the name or directory of a
        training run; a folder written by ``save_pretrained``; a released checkpoint's file.
    roots : iterable of path
        Folders of runs in which the name of a training run is looked for.

    Raises
    ------
    ValueError
        If it is none of these.
    OSError
        If the weights of a backbone cannot be had.
    """
    if spec == "pixels":
        return baseline_pixels
    pooling, colon, rest = spec.partition(":")
    if colon and pooling in POOLINGS:
        backbone, _, weights = rest.partition(":")
        source = {"pretrained": False} if weights == "random" else {"weights": weights or None}
        pool = "gem" if pooling.startswith("gem") else pooling
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # random weights are the same each time
            model = build_model(backbone, aggregator=pool, aggregator_options=POOLINGS[pooling], **source)
        return model.eval()
    roots = list(roots)
    folder = _model_folder(spec, roots)
    if folder is not None and (folder / "manifest.json").is_file():
        return load_trained(runs.load_run(folder))
    if folder is not None:
        return build_model(folder).eval()
    if Path(spec).is_file():
        return load_authors_checkpoint(spec)
    searched = [Path(root) / "train" for root in roots]
    found = sorted({path.parent.name for folder in searched for path in folder.glob("*/manifest.json")})
    raise ValueError(
        f"there is no model {spec!r}: give pixels, gem:BACKBONE or gem:BACKBONE:FILE (or gem2x2, mean, cls), a finished training "
        f"run, a folder written by save_pretrained, or a released checkpoint's file. Runs found: {', '.join(found) or 'none'}; "
        f"searched: {', '.join(str(f.absolute()) for f in (Path(), *searched))}"
    )


def _model_folder(spec, roots):
    """The folder of a training run or of a saved model; None where there is none of that name."""
    for folder in (Path(spec), *(Path(root) / "train" / spec for root in roots)):
        if (folder / "manifest.json").is_file() or (folder / "config.json").is_file():
            return folder
    return None


def training_run(spec: str, roots: Iterable = ()) -> runs.Run | None:
    """The finished training run that `open_model` would open by this name; None where the name is no such run."""
    folder = _model_folder(spec, roots)
    if folder is None or not (folder / "manifest.json").is_file():
        return None
    run = runs.load_run(folder)
    return run if run.finished else None


def training_runs(
    models: Iterable[str], roots: Iterable = (), further: Iterable[str] = ()
) -> dict[str, runs.Run]:
    """The finished training runs among `models`, by name, and those named by `further`, which must be such runs.

    Raises
    ------
    ValueError
        If one of `further` is no finished training run.
    """
    roots = list(roots)
    found = {name: training_run(name, roots) for name in [*models, *further]}
    for name in further:
        if found[name] is None:
            places = ", ".join(str(Path(root) / "train") for root in roots)
            raise ValueError(f"there is no finished training run {name!r} in {places}")
    return {name: run for name, run in found.items() if run is not None}


def open_models(specs: Iterable[str], roots: Iterable = ()) -> dict[str, Callable]:
    """Models by their short names: of a path its last part, so that a table names a file and not where it lies.

    Parameters
    ----------
    specs : iterable of str
    roots : iterable of path
        Both as for `open_model`.

    Returns
    -------
    dict of str to model
        In the order given, in evaluation mode.

    Raises
    ------
    ValueError
        As `open_model`, and where two paths end alike.
    """
    roots, opened = list(roots), {}
    for spec in specs:
        pooled = spec.partition(":")[0] in POOLINGS
        name = spec if pooled else Path(spec).name or spec
        if name in opened:
            raise ValueError(f"two models are called {name}: rename one of the files or folders")
        opened[name] = open_model(spec, roots)
    return opened


def trained_parameters(spec: str, roots: Iterable = (), model: Callable | None = None) -> int:
    """How many parameters were trained for a model, by its name.

    Parameters
    ----------
    spec, roots
        As for `open_model`.
    model : callable, optional
        The model, where it is open already.

    Returns
    -------
    int
        0 for pixels and for a frozen backbone; of a training run, what its manifest says; of other models, the parameters that
        work, with the InteractHead where there is one (see ``SAGE.parameter_report``).
    """
    if spec == "pixels" or spec.partition(":")[0] in POOLINGS:
        return 0
    run = training_run(spec, roots)
    if run is not None and "trained_parameters" in run.metrics:
        return int(run.metrics["trained_parameters"])
    report = (open_model(spec, roots) if model is None else model).parameter_report()
    live = {name: row[0] for name, *row in report.rows}
    return live["trained, head off"] + live.get("InteractHead", 0)


# ---------------------------------------------------------------------------------------------------- tables
def read_list(text: str, what: str, kind: type = str, *, least: int = 1) -> list:
    """Read a notebook's parameter that holds several values, separated by commas.

    Parameters
    ----------
    text : str
    what : str
        The parameter's name, for the message.
    kind : type
        Of each value: str or int.
    least : int
        How many there must be: 0 or 1.

    Raises
    ------
    ValueError
        If there are too few, one twice, or one of another kind.

    Examples
    --------
    >>> read_list("256, 128", "pca_dims", int)
    [256, 128]
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        values = [kind(part) for part in parts]
    except ValueError:
        raise ValueError(
            f"{what} is {text!r}: give whole numbers separated by commas, as in 256, 128"
        ) from None
    if len(values) < least:
        raise ValueError(f"{what} is {text!r}: give at least one value; several are separated by commas")
    if len(set(values)) != len(values):
        raise ValueError(f"{what} is {text!r}: it names one of them twice")
    return values


PUBLISHED = ("recalls", "ablation", "parameters", "graph")
_COUNTED = "the released model's modules, counted as published (with a branch that it never calls)"
_PAPER_GRAPH = "SAGE paper (arXiv 2509.25723), on its authors' machine"


def published(what: str = "recalls") -> pd.DataFrame:
    """Numbers that others published, as they were published; not measured here.

    Parameters
    ----------
    what : {"recalls", "ablation", "parameters", "graph"}
        ``recalls``: method, backbone, dim, context, dataset, r1, r5, r10 (percent), source. The context ``sorted``
        is that of the authors' batch size for the set. ``ablation``: configuration, dataset, r1, note. ``parameters``: method,
        backbone, dim, context, trained, source; only models whose count can be derived, the head counted where it was on.
        ``graph``: schedule, per, seconds, added_pct (to an epoch), sped, msls-val (R@1 of a model trained so), context, source.
    """
    if what not in PUBLISHED:
        raise ValueError(f"what is {what!r}; it must be one of {', '.join(map(repr, PUBLISHED))}")
    if what == "parameters":
        # With the head: two transformer layers of 768, 7,880,192 parameters.
        counts = (("ViT-B", "none", 1_956_550), ("ViT-L", "none", 2_497_734), ("ViT-L", "sorted", 10_377_926))
        columns = ["method", "backbone", "dim", "context", "trained", "source"]
        return pd.DataFrame(
            [("SAGE", f"DINOv2 {b}", 8448, c, n, _COUNTED) for b, c, n in counts], columns=columns
        )
    if what == "graph":
        rows = [
            ("online", "epoch", 6.2 * 60, 17.7, 98.9, 94.5, "sorted", _PAPER_GRAPH),
            ("static", "training", 30.9 * 60, np.nan, 98.5, 94.2, "not stated", _PAPER_GRAPH),
        ]
        columns = ["schedule", "per", "seconds", "added_pct", "sped", "msls-val", "context", "source"]
        return pd.DataFrame(rows, columns=columns)
    types = {"dim": "Int64"} if what == "recalls" else {}
    return pd.read_csv(
        Path(__file__).with_name(f"published_{what}.csv"), keep_default_na=False, na_values=[""], dtype=types
    )


_read_published = published  # `results_table` has an argument of that name


def published_recalls(datasets: Sequence[str], *, k: int = 1, method: str = "SAGE") -> dict[str, np.ndarray]:
    """What was published of a method on these sets, for `workbench.figures.recall_bars`.

    Returns
    -------
    dict of str to array (len(datasets),)
        Percents by "method backbone, context", at the method's largest descriptor; NaN where nothing is published. Empty where
        nothing is published on any of the sets.
    """
    rows = _of_method(method)
    rows = rows[(rows["dim"] == rows["dim"].max()) & rows["dataset"].isin(datasets)]
    return {
        label: group.set_index("dataset")[f"r{k}"].reindex(datasets).to_numpy(float)
        for label, group in rows.groupby("label", sort=False)
    }


def published_by_size(dataset: str, *, k: int = 1, method: str = "SAGE") -> dict[str, tuple]:
    """(dimensions, percents) of a method's published descriptors on a set, by "method backbone, context"; may be empty."""
    rows = _of_method(method)
    rows = rows[rows["dataset"] == dataset].sort_values("dim")
    return {
        label: (group["dim"].tolist(), group[f"r{k}"].tolist())
        for label, group in rows.groupby("label", sort=False)
    }


def published_by_parameters(dataset: str, *, k: int = 1) -> dict[str, tuple[int, float]]:
    """(trained parameters, percent) of the published models whose count has a source, on a set; may be empty."""
    rows = _with_label(_read_published()).merge(
        _read_published("parameters"),
        on=["method", "backbone", "dim", "context"],
        suffixes=("", " of the count"),
    )
    rows = rows[rows["dataset"] == dataset].sort_values("trained")
    return dict(
        zip(rows["label"], zip(rows["trained"].tolist(), rows[f"r{k}"].tolist(), strict=True), strict=True)
    )


def _of_method(method):
    rows = _with_label(_read_published())
    rows = rows[rows["method"] == method]
    if not len(rows):
        raise ValueError(f"nothing is published here of a method {method!r}")
    return rows


def _with_label(rows):
    backbone = rows["backbone"].fillna("").str.replace("DINOv2 ", "")
    label = (rows["method"] + " " + backbone).str.strip() + ", " + rows["context"]
    return rows.assign(label=label)


def chance_recall(n_database: int, positives: Sequence, k: int) -> float:
    """R@k that a random ranking reaches on average, in percent: the mean over queries of ``1 - C(n - p, k) / C(n, k)``.

    Parameters
    ----------
    n_database : int
        n, the references.
    positives : sequence of arrays
        Rows of the references that answer each query; p of them.
    k : int
    """
    drawn = min(k, n_database)
    return 100 * float(np.mean([1 - hypergeom.pmf(0, n_database, len(rows), drawn) for rows in positives]))


def recall_arrays(
    results: Iterable[Result], models: Sequence[str], datasets: Sequence[str], *, k: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """R@k of each model on each set and the ends of its interval, for figures.

    Returns
    -------
    recall, low, high : arrays (len(models), len(datasets))
        Percents; NaN where there is no result.

    Raises
    ------
    ValueError
        If a model has two results on one set, as under two contexts.
    """
    by_name = {}
    for result in results:
        other = by_name.setdefault((result.model, result.dataset), result)
        if other.path != result.path:
            raise ValueError(
                f"{result.model} on {result.dataset} has two results, {other.path.name} and {result.path.name}: give one of them"
            )
    arrays = np.full((3, len(models), len(datasets)), np.nan)
    for i, model in enumerate(models):
        for j, dataset in enumerate(datasets):
            if (model, dataset) in by_name:
                counted = by_name[model, dataset].recall
                arrays[:, i, j] = counted.percent(k), *counted.interval(k)
    return tuple(arrays)


def sets_with_results(
    results: Iterable[Result], datasets: Sequence[str], missing: Mapping[str, str] | None = None
) -> list[str]:
    """Those of `datasets` that have a result.

    Raises
    ------
    ValueError
        If none has: with the sentences of `missing` (set to reason, as `Evaluations` has it).
    """
    measured = {r.dataset for r in results}
    kept = [name for name in datasets if name in measured]
    if not kept:
        reasons = list((missing or {}).values()) or [
            f"no finished run on {', '.join(datasets)} with these models, context and preprocess; evaluate them first"
        ]
        raise ValueError("there is nothing to show: " + "; ".join(reasons))
    return kept


def results_table(
    results: Iterable[Result],
    *,
    published: bool = True,
    chance: bool = False,
    ks: Sequence[int] = (1, 5, 10),
    missing: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """Results side by side, with the published numbers of the same sets beneath, each with its context.

    Parameters
    ----------
    results : iterable of Result
    published : bool
        Add what was published on the data sets among `results` and `missing`.
    chance : bool
        Begin each set with what a random ranking reaches on average (`chance_recall`).
    ks : sequence of int
    missing : mapping of str to str, optional
        Set to the sentence that says why it was not run (as `Evaluations` has it): a row "not run" each.

    Returns
    -------
    DataFrame
        Columns dataset, method, backbone, dim, context, R@k for each k (percent), then for each k ``R@k 95 %`` (Wilson's
        interval as text) and ``hits@k``; queries, references, without positive, preprocess, source. What a published row does
        not tell is missing.
    """
    results = list(results)
    rows = [_chance_row(one, ks) for one in {r.dataset: r for r in results}.values()] if chance else []
    for result in results:
        counted = result.recall
        rows.append(
            {
                "dataset": result.dataset,
                "method": result.model,
                "dim": result.dim,
                "context": result.context,
                **{f"R@{k}": counted.percent(k) for k in ks},
                **{f"R@{k} 95 %": "{:.1f}-{:.1f}".format(*counted.interval(k)) for k in ks},
                **{f"hits@{k}": counted.hits[k] for k in ks},
                "queries": result.n_queries,
                "references": result.n_database,
                "without positive": result.n_without_positive,
                "preprocess": result.preprocess,
                "source": f"run {result.path.name}" + (f"; {result.warning}" if result.warning else ""),
            }
        )
    rows += [
        {"dataset": name, "method": "not run", "source": sentence}
        for name, sentence in (missing or {}).items()
    ]
    columns = ["dataset", "method", "backbone", "dim", "context", *(f"R@{k}" for k in ks)]
    columns += [f"R@{k} 95 %" for k in ks] + [f"hits@{k}" for k in ks]
    columns += ["queries", "references", "without positive", "preprocess", "source"]
    if published:
        theirs = _read_published()
        theirs = theirs[theirs["dataset"].isin({row["dataset"] for row in rows})]
        names = {"r1": "R@1", "r5": "R@5", "r10": "R@10"}
        rows += theirs.rename(columns=names).to_dict("records")
    table = pd.DataFrame(rows, columns=columns)
    for column in ("dim", "queries", "references", "without positive", *(f"hits@{k}" for k in ks)):
        table[column] = table[column].astype("Int64")
    for k in ks:
        table[f"R@{k}"] = table[f"R@{k}"].astype(float)
    order = {name: i for i, name in enumerate(dict.fromkeys(table["dataset"]))}
    return table.sort_values("dataset", key=lambda names: names.map(order), kind="stable", ignore_index=True)


def _chance_row(result, ks):
    ranking = result.rankings().groupby("query")["n_positives"].first()
    positives = [range(n) for n in ranking]
    return {
        "dataset": result.dataset,
        "method": "chance",
        **{f"R@{k}": chance_recall(result.n_database, positives, k) for k in ks},
        "queries": result.n_queries,
        "references": result.n_database,
        "without positive": result.n_without_positive,
        "source": "what a random ranking reaches on average",
    }


def to_markdown(table: pd.DataFrame) -> str:
    """A table as Markdown: percents with one decimal, missing values empty."""
    lines = [list(map(str, table.columns)), ["---:" if _numeric(table[c]) else "---" for c in table.columns]]
    lines += _cells(table)
    return (
        "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        + "\n"
    )


_LATEX_NAMES = ("backslash", "asciitilde", "asciicircum", "less", "greater", "bar")
_LATEX = str.maketrans(
    {c: "\\" + c for c in "&%$#_{}"}
    | {c: rf"\text{name}{{}}" for c, name in zip("\\~^<>|", _LATEX_NAMES, strict=True)}
)


def to_latex(table: pd.DataFrame) -> str:
    """A table as a LaTeX tabular (with booktabs' rules)."""
    align = "".join("r" if _numeric(table[c]) else "l" for c in table.columns)
    head, *lines = [
        " & ".join(cell.translate(_LATEX) for cell in line) + r" \\"
        for line in (map(str, table.columns), *_cells(table))
    ]
    # Behind a line's end or a rule, a bracket would be read as its argument, and a star as its other form.
    head, *lines = ["{}" + line if line.startswith(("[", "*")) else line for line in (head, *lines)]
    return "\n".join(
        [
            rf"\begin{{tabular}}{{{align}}}",
            r"\toprule",
            head,
            r"\midrule",
            *lines,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def write_table(table: pd.DataFrame, path) -> Path:
    """Write a table as .csv (all digits), .md or .tex, whole or not at all."""
    path = Path(path)
    writers = {
        ".csv": lambda t: t.to_csv(index=False, lineterminator="\n"),
        ".md": to_markdown,
        ".tex": to_latex,
    }
    if path.suffix not in writers:
        raise ValueError(f"{path.name} must end in {', '.join(writers)}")
    runs.write_text(path, writers[path.suffix](table))
    return path


def _numeric(column):
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _cells(table):
    def text(value):
        if pd.isna(value):
            return ""
        return f"{value:.1f}" if isinstance(value, float | np.floating) else " ".join(str(value).split())

    return [[text(value) for value in row] for row in table.itertuples(index=False, name=None)]
