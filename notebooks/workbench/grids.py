"""Ablations: a grid of configurations and seeds, trained alike, measured alike, compared in pairs.

The file follows the work: a grid is read (`read_grid`), every configuration is trained with every seed and
measured (`run_grid`), and what has finished is read back (`load_grid`) as a table with differences to the
reference.

    python -m workbench.grids notebooks/params/ablations/components.yaml --data data/town --workers 2

Configurations with one frozen prefix share its stored tokens; equal trainings, within a grid or across grids,
are one run. A descriptor measured here depends on its image alone (and on fixed anchors), never on its batch.

Trainings run in joblib's processes: inside ``with joblib.parallel_config("dask")`` (or "ray") on a cluster.
"""

import argparse
import functools
import json
import math
import os
import platform
import re
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import psutil
import torch
import yaml
from tqdm.auto import tqdm

from sagelib import runs
from sagelib.backbone import build_backbone
from sagelib.describe import (
    AUTOCAST,
    choose_anchors,
    compose,
    describe_batch,
    evaluating,
    model_fingerprint,
    names_in_order,
    open_tokens,
    own_anchors,
    pick_device,
    pictures_fingerprint,
)
from sagelib.evaluate import data_fingerprint, published
from sagelib.images import Preprocess
from sagelib.places import Places, TestSet, open_set, open_training_set
from sagelib.retrieval import KS, PCA, Difference, recall, search
from sagelib.train import TrainConfig, build_model_of, open_run, read_parameters, train
from townscape.folder import ensure_town
from workbench.tables import chance_recall, query_places

STAGE = "ablate"
# How a configuration is measured once it is trained; its other entries are fields of `TrainConfig`.
MEASURED = {"context": None, "anchors_from": None, "rerank": None, "pca": None, "whiten": False}
# The frozen backbone, pooled over n x n cells: rows of every grid.
FROZEN = {
    f"frozen, GeM {n} x {n}": {"adapter": "none", "aggregator": "gem", "aggregator_options": {"grid": n}}
    | {"interact": False, "data_init": None, "graph_context": "none", "train_context": "batch"}
    for n in (1, 2, 3)
}
LEAST_ROOM = 0.75  # a choice that shares more than this with any other one is not a choice


# ---------- the grid
@dataclass(frozen=True, kw_only=True)
class Grid:
    """Configurations that differ from one base in a few fields each, and the seeds that each is trained with.

    A configuration names fields of `TrainConfig`, and how it is measured: ``context`` is none, solo or
    anchors (default: none without a head, anchors where the head was trained with them, else solo);
    ``anchors_from``, ``sample-m`` or ``kmeans-m``, chooses m anchors among the training descriptors;
    ``rerank`` is the m of `rerank_in_context`; ``pca`` a number of dimensions, fitted on training
    descriptors, with ``whiten``. Options (``aggregator_options``, ...) are added to the base's, unless
    another aggregator or adapter is named. The others are compared with the configuration
    `reference`; `published` maps configurations to rows of the published ablation. A pilot, from which
    anything is chosen, is measured on the `split` "val".
    """

    name: str
    title: str = ""
    base: dict = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    reference: str
    configurations: dict[str, dict]
    published: dict[str, str] = field(default_factory=dict)
    split: str = "test"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]+", self.name):
            raise ValueError(f"the name of a grid must be one plain word, got {self.name!r}")
        for seed in self.seeds:
            runs.check("a seed", seed, 0, whole=True)
        runs.check("split", self.split, choices=("val", "test"))
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ, at least one, got {list(self.seeds)}")
        if unknown := {self.reference, *self.published} - set(self.configurations):
            raise ValueError(f"reference or published names {unknown.pop()!r}, no configuration of this grid")
        folders = {_slug(name): name for name in FROZEN}
        for name, changes in self.configurations.items():
            if (other := folders.setdefault(_slug(name), name)) != name:
                raise ValueError(f"{other!r} and {name!r} would have the same folder: rename one")
            if "seed" in changes:
                raise ValueError(f"configuration {name!r} sets seed: the grid's seeds do that")
            try:
                self.measurement(name)
            except (ValueError, TypeError) as error:
                raise ValueError(f"configuration {name!r}: {error}") from None

    def training(self, configuration: str, seed: int) -> TrainConfig:
        """How a configuration is trained with one seed."""
        base, default = self.base, TrainConfig()
        changes = {**self.configurations, **FROZEN}[configuration]
        changes = {k: v for k, v in changes.items() if k not in MEASURED}
        values = {**base, **changes, "seed": seed}
        for part in ("aggregator", "adapter", "interact"):
            key = f"{part}_options"
            of_base = base.get(part, getattr(default, part))
            if part != "interact" and changes.get(part, of_base) != of_base:  # another part, other options
                values[key] = changes.get(key, getattr(default, key))
            elif isinstance(base.get(key), dict) and isinstance(changes.get(key), dict):
                values[key] = {**base[key], **changes[key]}
        return TrainConfig.from_mapping(values)

    def measurement(self, configuration: str) -> dict:
        """How a configuration is measured: the keys of `MEASURED`, with nothing left to defaults."""
        chosen = {k: v for k, v in self.configurations.get(configuration, {}).items() if k in MEASURED}
        how, config = {**MEASURED, **chosen}, self.training(configuration, self.seeds[0])
        if how["context"] is None:
            own = "anchors" if config.train_context == "anchors" or how["anchors_from"] else "solo"
            how["context"] = own if config.interact else "none"
        runs.check("context", how["context"], choices=("none", "solo", "anchors"))
        if how["context"] != "none" and not config.interact:
            raise ValueError(f"context {how['context']} needs interact: true")
        if how["anchors_from"] is not None:
            _anchor_rule(how["anchors_from"])
            if how["context"] != "anchors":
                raise ValueError(f"anchors_from needs the context anchors, not {how['context']}")
        elif how["context"] == "anchors" and config.train_context != "anchors":
            raise ValueError("this head has no anchors of its own: give anchors_from, such as kmeans-64")
        runs.check("rerank", how["rerank"], 1, whole=True, none=True)
        if how["rerank"] is not None and (not config.interact or how["pca"] is not None):
            raise ValueError("rerank needs interact: true, and no pca: the head reads whole descriptors")
        return how


def read_grid(path: str | Path) -> Grid:
    """Read a grid from a YAML file, whose keys are the attributes of `Grid`.

    ``base`` may name a parameter file (relative to this one), of which the fields of `TrainConfig` count, and
    ``settings`` are laid over it. ``configurations`` may name another grid's file: its configurations,
    reference, seeds and published rows count where this file has none. The name is the file's by default.

    Raises
    ------
    FileNotFoundError
        If this file or one that it names is missing.
    ValueError
        For what a grid cannot be, with the file and the configuration.
    """
    path = Path(path)
    values = {key: value for key, value in read_parameters(path).items() if value is not None}
    keys = (*Grid.__dataclass_fields__, "settings")
    if unknown := [key for key in values if key not in keys]:
        raise ValueError(f"{path}: a grid has no key {unknown[0]!r}; it has {', '.join(keys)}")
    if isinstance(values.get("configurations"), str):
        other = read_parameters(path.parent / values["configurations"])
        shared = {key: other[key] for key in ("reference", "seeds", "published") if key in other}
        values = {**shared, **values, "configurations": other.get("configurations")}
    kinds = {"configurations": dict, "reference": str, "seeds": list, "base": dict | str, "name": str}
    kinds |= {"title": str, "split": str, "settings": dict, "published": dict}
    for key, value in {"configurations": None, "reference": None, "seeds": [0, 1, 2], **values}.items():
        if not isinstance(value, kinds[key]):
            raise ValueError(f"{path}: {key} is missing, or no {getattr(kinds[key], '__name__', kinds[key])}")
    for name, changes in values["configurations"].items():
        if not isinstance(changes, dict | None):
            raise ValueError(f"{path}: configuration {name!r} must be fields and values, got {changes!r}")
    base, settings = values.pop("base", {}), values.pop("settings", {})
    if isinstance(base, str):
        base = {
            k: v for k, v in read_parameters(path.parent / base).items() if k in TrainConfig.field_names()
        }
    values["base"] = {k: v for k, v in {**base, **settings}.items() if k != "seed"}
    values["seeds"] = tuple(values.get("seeds", (0, 1, 2)))
    values["configurations"] = {str(k): dict(v or {}) for k, v in values["configurations"].items()}
    try:
        return Grid(**{"name": path.stem, **values})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _anchor_rule(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(sample|kmeans)-([1-9]\d*)", str(text))
    if match is None:
        raise ValueError(f"anchors_from must be sample-m or kmeans-m, as in kmeans-64, got {text!r}")
    return match[1], int(match[2])


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


# ---------- running it
@dataclass(frozen=True)
class _Job:
    """One training, and the configurations that are measured on it; without a name, of a frozen backbone."""

    grid: Grid
    config: TrainConfig
    name: str
    measured: tuple[str, ...]
    foundation: str
    mined: Places
    test_sets: tuple[TestSet, ...]
    root: Path
    tokens: Path
    device: str

    def measurement(self, configuration: str, test_set: TestSet) -> runs.Run:
        """The run of one measurement; refused where its name stands for another one."""
        name = f"{self.grid.name}--{_slug(configuration)}--{test_set.name}--s{self.config.seed}"
        facts = {"configuration": configuration, "training": self.name, "dataset": test_set.name}
        facts |= {"rule": str(test_set.rule), "split": self.grid.split}
        facts |= self.grid.measurement(configuration)
        facts |= {} if self.name else _frozen_facts(self.config) | {"foundation": self.foundation}
        known = dict(seed=self.config.seed, data_fingerprint=data_fingerprint(test_set))
        known |= {"pictures": pictures_fingerprint(self.mined)} if self.name else {}
        return runs.Run.open(self.root, STAGE, name, facts, **known)


def run_grid(
    grid: Grid,
    root: str | Path,
    *,
    mined: Places,
    test_sets: Sequence[TestSet],
    tokens: str | Path | None = None,
    workers: int | None = None,
    device: str = "auto",
    progress: bool = True,
) -> "GridResults":
    """Train and measure every configuration with every seed, skip the finished, go on with the interrupted.

    No validation chooses the weights: those of the last step are measured. Seeds are the outer loop, so that
    an unfinished grid has whole rounds. A training is ``train/ablate-<hash of all it depends on>-s<seed>`` in
    `root`, a measurement ``ablate/<grid>--<configuration>--<set>--s<seed>``.

    Parameters
    ----------
    grid, root, mined, test_sets
        The grid, the folder of runs, what is trained on and what is measured on.
    tokens : path, optional
        Folder of stored tokens; ``tokens`` in `root` by default.
    workers : int, optional
        Trainings at once; None: as joblib's ``parallel_config`` says, or one.
    device, progress
        As in `sagelib.train.train`.

    Raises
    ------
    RunConflict
        If a measurement of the same name was made of other data or settings: give the grid another name.
    RuntimeError
        If trainings failed, after all others have finished; the sentence says which and why.
    """
    tokens = Path(root) / "tokens" if tokens is None else Path(tokens)
    common = dict(mined=mined, test_sets=tuple(test_sets), root=Path(root), tokens=tokens, device=device)
    trainings, foundation, untrained = {}, functools.cache(_foundation), []
    for name in FROZEN:
        config = grid.training(name, grid.seeds[0])
        frozen = foundation(config.backbone, config.pretrained, config.weights)
        untrained.append(_Job(grid, config, "", (name,), frozen, **common))
    for seed in grid.seeds:
        for name in grid.configurations:
            config = grid.training(name, seed)
            frozen = foundation(config.backbone, config.pretrained, config.weights)
            identity = {k: v for k, v in config.identity().items() if k != "seed"}
            key = runs.fingerprint([identity, mined.fingerprint(), frozen])[:10]
            trainings.setdefault(f"ablate-{key}-s{seed}", (config, frozen, []))[2].append(name)
    jobs = untrained + [
        _Job(grid, config, name, tuple(measured), frozen, **common)
        for name, (config, frozen, measured) in trainings.items()
    ]
    # Every measurement is opened before any work is done: conflicts show at once.
    opened = [[job.measurement(c, t).finished for c in job.measured for t in job.test_sets] for job in jobs]
    waiting = [job for job, finished in zip(jobs, opened, strict=True) if not all(finished)]
    failed, caller = {}, (platform.node(), os.getpid())
    shown = dict(unit="training", desc=grid.name, disable=not progress)
    with tqdm(total=len(jobs), initial=len(jobs) - len(waiting), **shown) as bar:
        early = joblib.parallel.get_active_backend()[0].supports_return_generator  # Ray's waits for the last
        pool = joblib.Parallel(workers, return_as="generator_unordered" if early else "list", batch_size=1)
        try:
            for name, error in pool(joblib.delayed(_run)(job, caller) for job in waiting):
                bar.update()
                if error is not None:
                    failed[name] = error
                    tqdm.write(f"{name} failed: {error}")
        except joblib.externals.loky.process_executor.TerminatedWorkerError:
            raise RuntimeError("a training was killed, perhaps for want of memory: lower workers") from None
    if failed:
        listed = "; ".join(f"{name}: {error}" for name, error in failed.items())
        words = f"{len(failed)} of {len(trainings)} trainings failed, the others are finished"
        raise RuntimeError(f"{words}; call again to retry. {listed}")
    return load_grid(grid, root)


def _foundation(backbone: str, pretrained: bool, weights: str | None) -> str:
    """Which frozen weights a training starts from: a file may be exchanged under the same name."""
    if not pretrained and weights is None:
        return "random"
    options = dict(pretrained=pretrained, weights=weights, adapter="none", train_norm=False)
    return build_backbone(backbone, **options).frozen_fingerprint()


def _frozen_facts(config: TrainConfig) -> dict:
    """On what the descriptors of a frozen backbone depend."""
    names = ("backbone", "pretrained", "weights", "validation_size", "preprocess")
    return {name: getattr(config, name) for name in names}


def _run(job: _Job, caller: tuple[str, int]) -> tuple[str, str | None]:
    """Train and measure: what it was, and the sentence of a mistake."""
    if os.getpid() != caller[1] and platform.node() == caller[0]:
        _end_with(caller[1])
    try:
        _train_and_measure(job)
    except (ValueError, OSError, MemoryError, FloatingPointError) as error:
        return f"{job.measured[0]}, seed {job.config.seed}", str(error)
    return job.name, None


@functools.cache
def _end_with(caller: int) -> None:
    """A worker whose caller was killed would train on unseen, and meet the next call in the same run."""

    def watch() -> None:
        while psutil.pid_exists(caller):
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _train_and_measure(job: _Job) -> None:
    config = job.config
    if _foundation(config.backbone, config.pretrained, config.weights) != job.foundation:
        raise ValueError(f"the weights of {config.backbone} were exchanged meanwhile: start the grid again")
    if job.name:
        run = open_run(job.root, job.name, config, mined=job.mined, device=job.device)
        options = dict(mined=job.mined, tokens=job.tokens, device=job.device, progress=False)
        model, trained = train(config, run, **options).model, _facts(run)
    else:
        model, trained = build_model_of(config), {"plateau": False, "parameters": 0}
    model = model.to(pick_device(job.device)).eval()
    described = functools.cache(functools.partial(_before_head, model, job))
    for test_set in job.test_sets:
        for configuration in job.measured:
            measurement = job.measurement(configuration, test_set)
            if not measurement.finished:
                _measure(job, configuration, test_set, model, described, trained, measurement)


def _facts(trained: runs.Run) -> dict:
    """What a training says of itself, and what room its sampler had in the last epoch."""
    facts = {column: trained.metrics.get(column) for column in COLUMNS}
    facts["plateau"] = bool((trained.metrics.get("plateau") or {}).get("ended_there", False))
    facts |= {"loss": trained.metrics["final_loss"], "parameters": trained.metrics["trained_parameters"]}
    lines = map(json.loads, trained.path("log.jsonl").read_text().splitlines())
    graphs = [line["graph"]["mined"] for line in lines if "mined" in line.get("graph", {})]
    if graphs:
        last = graphs[-1]
        facts["clique"] = last["clique_images"] / max(1, last["places"])
        facts["clusters"] = last["clusters"] / last["cities"]
    return facts | {"training_s": trained.wall_time_s}


def _before_head(model, job: _Job, part: str, name: str = "") -> np.ndarray:
    """Descriptors before the head, (N, D) float32, of the training images or of a part of a test set."""
    config, device = job.config, pick_device(job.device)
    if part == "mined":
        places, size = job.mined, config.image_size
    else:
        test_set = next(test_set for test_set in job.test_sets if test_set.name == name)
        places, size = getattr(test_set, part), config.validation_size
    dtype, rows = AUTOCAST.get(config.precision), config.describe_batch
    store = open_tokens(
        job.tokens,
        model,
        places,
        preprocess=Preprocess(size, config.preprocess),
        limit_gb=config.cache_limit_gb or math.inf,
        batch_size=rows,
        autocast=dtype,
        progress=False,
    )
    parts = []
    for start in range(0, len(places), rows):
        tokens = store[np.arange(start, min(start + rows, len(places)))].to(device)
        parts.append(describe_batch(model, (tokens, store.grid), autocast=dtype).cpu().numpy())
    return np.concatenate(parts)


def rerank_in_context(model, database_values, query_values, indices, m: int, *, device) -> np.ndarray:
    """Order each query's first m references anew, seen among each other; not in the paper.

    The query and each of its m references attend over themselves and these m, as anchors, and are compared by
    the Euclidean distance of what the head gives: m + 1 passes a query, which depend on it and the data base
    alone. Values before the head, (N, D) and (Q, D); indices, (Q, depth), as from `search`, and so returned.
    """
    indices = np.array(indices, np.int64)
    runs.check("rerank", m, 1, indices.shape[1], whole=True)
    for row, query in zip(indices, query_values, strict=True):
        first = row[:m][row[:m] >= 0]
        values = np.concatenate([np.asarray(query)[None], database_values[first]]).astype(np.float32)
        values = torch.from_numpy(values).to(pick_device(device))
        with evaluating(model):
            after = model.interact(values, anchors=values[1:]).double()
        distances = (after[1:] - after[0]).square().sum(1).cpu().numpy()
        row[: len(first)] = first[np.argsort(distances, kind="stable")]
    return indices


def _measure(job: _Job, configuration, test_set, model, described, trained: dict, run: runs.Run) -> None:
    """Describe, search, count; everything goes into the measurement's run."""
    how, seed, context = job.grid.measurement(configuration), job.config.seed, run.config["context"]
    anchors = own_anchors(model) if context == "anchors" else None
    if how["anchors_from"] is not None:
        method, m = _anchor_rule(how["anchors_from"])
        anchors = choose_anchors(described("mined"), m, method, seed=seed)
    in_context = functools.partial(compose, model, context=context, anchors=anchors, device=job.device)
    before = [described(part, test_set.name) for part in ("database", "queries")]
    values = [
        in_context(v, names_in_order(places))
        for v, places in zip(before, (test_set.database, test_set.queries), strict=True)
    ]
    if how["pca"] is not None:
        fitted = in_context(described("mined"), names_in_order(job.mined))
        belongs = dict(model=model_fingerprint(model).under(context), context=context)
        belongs["data"] = job.mined.fingerprint()
        pca = PCA.fit(fitted, how["pca"], whiten=how["whiten"], seed=seed, **belongs)
        pca.save(run.path("pca.safetensors"))
        values = [pca.transform(v) for v in values]
    indices, _ = search(*values, max(*KS, how["rerank"] or 1))
    if how["rerank"] is not None:
        indices = rerank_in_context(model, *before, indices, how["rerank"], device=job.device)
    positives, n = test_set.positives(), len(test_set.database)
    counted = recall(indices, positives, KS, n_references=n)
    runs.save_array(run.path("ranks.npy"), counted.per_query_rank.astype(np.int32))
    runs.save_array(run.path("places.npy"), query_places(test_set.queries))
    facts = trained | {"context": context} | {f"R@{k}": counted.percent(k) for k in (1, 5, 10)}
    known = [len(row) for row in positives if len(row)]
    facts |= {f"chance@{k}": chance_recall(n, known, k) for k in (1, 5, 10)}
    facts |= {f"hits@{k}": counted.hits[k] for k in (1, 5, 10)}
    facts |= {"queries": counted.n_queries, "references": n, "dim": values[0].shape[1]}
    facts["dataset"] = test_set.name
    run.finish(facts | {"configuration": configuration, "seed": seed, "run": f"{run.stage}/{run.name}"})


# ---------- reading it
COUNTS = ["hits@1", "hits@5", "hits@10", "queries", "references", "dim", "parameters", "steps"]
COLUMNS = ["configuration", "seed", "dataset", "context", "R@1", "R@5", "R@10", *COUNTS]
COLUMNS += ["plateau", "loss", "training_s", "refresh_share", "clique", "clusters"]
COLUMNS += ["chance@1", "chance@5", "chance@10", "run"]


@dataclass(frozen=True)
class GridResults:
    """The finished runs of a grid.

    Attributes
    ----------
    grid : Grid
    table : DataFrame
        A row for each configuration, seed and set, with the columns `COLUMNS`: R@k in percent, plateau
        (whether the training ended on the loss's plateau), training_s, clique (images in the cliques that
        places were chosen from, on average), clusters (of a city, of which a draw takes similar_places + 1),
        chance@k (R@k of a random ranking). Without a finished run, one row whose run is empty.
    ranks : dict of (configuration, seed, dataset) to array (Q,)
        Rank of each query's first positive, 0: none found.
    places : dict of dataset to array (Q,)
        Which queries are of one place.
    """

    grid: Grid
    table: pd.DataFrame
    ranks: dict[tuple[str, int, str], np.ndarray]
    places: dict[str, np.ndarray]

    @property
    def datasets(self) -> list[str]:
        """The sets that anything was measured on, sorted."""
        return sorted({dataset for _, _, dataset in self.ranks})

    @property
    def names(self) -> list[str]:
        """The configurations, and the frozen backbones that were measured, in the order of all tables."""
        return [*self.grid.configurations, *(n for n in FROZEN if any(n == key[0] for key in self.ranks))]

    def recalls(self, dataset: str, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """R@k in percent, NaN without a run, and whether it ended on the plateau: (`names`, seeds)."""
        keys = [[(c, s, dataset) for s in self.grid.seeds] for c in self.names]
        percent = [[self._percent(key, k) for key in row] for row in keys]
        return np.array(percent), np.array([[self._stuck(*key) for key in row] for row in keys])

    def summary(self, dataset: str, k: int = 1, *, seed: int = 0) -> pd.DataFrame:
        """Each of `names` against the reference and against the best frozen backbone, a row each; and chance.

        Runs that ended on the plateau are counted and are no evidence: neither means nor differences contain
        them.

        Returns
        -------
        DataFrame
            configuration; seeds (sound runs); plateau (runs that ended there); R@k, their mean, and sd, their
            standard deviation over seeds; points, low, high, p (`pooled_difference` from the reference, over
            the seeds that both have); p_holm, corrected for the number of configurations compared; smallest,
            the difference in points that an interval so wide would show with 80 % power; gain, gain_low,
            gain_high, the same over the best frozen backbone; clique, shared (images that two choices of K
            of a clique share when one is random), clusters; verdict, by p_holm.
        """
        recalls, rows = self.recalls(dataset, k), []
        best = max(
            (n for n in self.names if n in FROZEN), key=lambda n: self._mean(n, dataset, k), default=None
        )
        for name, percent, stuck in zip(self.names, *recalls, strict=True):
            ran = np.isfinite(percent)
            sound = percent[ran & ~stuck]
            row = {"configuration": name, "seeds": len(sound), "plateau": int(stuck.sum())}
            row[f"R@{k}"] = sound.mean() if len(sound) else np.nan
            row["sd"] = sound.std(ddof=1) if len(sound) > 1 else np.nan
            row |= self._difference(self.grid.reference, name, dataset, k, seed)
            row["smallest"] = 1.43 * (row["high"] - row["low"]) / 2  # (z(0.975) + z(0.8)) / z(0.975)
            gain = self._difference(best, name, dataset, k, seed)
            row |= {
                f"gain{end}": gain[key] for end, key in (("", "points"), ("_low", "low"), ("_high", "high"))
            }
            rows.append(row | self._room(name, dataset) | {"ran": ran.any()})
        chance = self.table.loc[self.table["dataset"] == dataset, f"chance@{k}"].dropna()
        rows += [{"configuration": "chance", f"R@{k}": level} for level in chance.iloc[:1]]
        table = pd.DataFrame(rows)
        compared = table["configuration"].isin(self.grid.configurations)
        table.insert(9, "p_holm", holm(table["p"].where(compared)))
        table["verdict"] = [self._verdict(row) for row in table.to_dict("records")]
        return table.drop(columns="ran").astype({"seeds": "Int64", "plateau": "Int64"})

    def _difference(self, a: str | None, b: str, dataset: str, k: int, seed: int) -> dict:
        """R@k of b less that of a over their common seeds; a frozen backbone has the same ranks for each."""
        keys = [
            [(c, self.grid.seeds[0] if c in FROZEN else s, dataset) for c in (a, b)] for s in self.grid.seeds
        ]
        common = [pair for pair in keys if all(key in self.ranks and not self._stuck(*key) for key in pair)]
        if a == b or not common:
            return dict.fromkeys(("points", "low", "high", "p"), np.nan)
        ranks = [np.stack([self.ranks[key] for key in column]) for column in zip(*common, strict=True)]
        found = pooled_difference(*ranks, k, groups=self.places[dataset], seed=seed)
        return dict(points=found.points, low=found.low, high=found.high, p=found.p)

    def _room(self, name: str, dataset: str) -> dict:
        """How much the sampler could choose, on average over the seeds."""
        rows = self.table.query("configuration == @name and dataset == @dataset")
        clique, clusters = (rows[c].astype(float).mean() for c in ("clique", "clusters"))
        k = self.grid.training(name, 0).images_per_place
        return {"clique": clique, "shared": k * k / clique, "clusters": clusters}

    def _verdict(self, row: dict) -> str:
        name, reference = row["configuration"], self.grid.reference
        if name == "chance":
            return "a random ranking"
        if not row["ran"]:
            return "not run"
        if not row["seeds"]:
            return "no evidence: every run ended on the plateau"
        if name == reference:
            return "the full method"
        if not np.isfinite(row["points"]):
            return "not comparable yet"
        if name in FROZEN:
            return "frozen"
        config, full = (self.grid.training(c, 0) for c in (name, reference))
        k, drawn = config.images_per_place, config.similar_places + 1
        if config.prefer != full.prefer and row["shared"] > LEAST_ROOM * k:
            return f"not tested: cliques of {row['clique']:.1f} images leave no choice of {k}"
        if config.schedule != full.schedule and drawn > LEAST_ROOM * row["clusters"]:
            return f"not tested: a draw takes {drawn} of {row['clusters']:.0f} places"
        if row["seeds"] == 1:
            return "one seed: it says nothing of others"
        if row["p_holm"] < 0.05:
            return "better" if row["points"] > 0 else "worse"
        clear = row["low"] * row["high"] > 0
        return "no difference shown" + ": one is, before the correction" * clear

    def _mean(self, name: str, dataset: str, k: int) -> float:
        return np.nanmean([self._percent((name, s, dataset), k) for s in self.grid.seeds])

    def _percent(self, key: tuple, k: int) -> float:
        return 100 * _hit(self.ranks[key], k).mean() if key in self.ranks else np.nan

    def _stuck(self, configuration: str, seed: int, dataset: str) -> bool:
        rows = self.table.query("configuration == @configuration and seed == @seed and dataset == @dataset")
        return bool(rows["plateau"].fillna(False).any())

    def published(self) -> pd.DataFrame:
        """What others published of the same configurations: R@1 in a column for each set, and a note."""
        table, rows = published("ablation"), []
        for name, row_name in self.grid.published.items():
            of = table[table["configuration"] == row_name]
            rows.append({"configuration": name, **dict(zip(of["dataset"], of["r1"], strict=True))})
            rows[-1]["note"] = "; ".join(dict.fromkeys(of["note"]))
        return pd.DataFrame(rows, columns=None if rows else ["configuration", "note"])


def load_grid(grid: Grid, root: str | Path) -> GridResults:
    """The finished measurements of a grid in a folder of runs; what is missing is a row without a run.

    A run of the same name that was trained or measured otherwise, before the grid's file was changed, does
    not count.
    """
    rows, ranks, places = [], {}, {}
    for run in runs.find_runs(root, STAGE):
        if run.name.startswith(f"{grid.name}--") and _belongs(grid, run, Path(root)):
            rows.append(run.metrics)
            dataset = run.config["dataset"]
            key = run.config["configuration"], run.manifest["seed"], dataset
            ranks[key] = runs.load_array(run.dir / "ranks.npy")
            places[dataset] = runs.load_array(run.dir / "places.npy")
    order = [(c, s) for c in grid.configurations for s in grid.seeds]
    missing = set(order) - {key[:2] for key in ranks}
    rows += [{"configuration": c, "seed": s, "run": ""} for c, s in missing]
    order += [(c, grid.seeds[0]) for c in FROZEN]
    rows.sort(key=lambda row: order.index((row["configuration"], row["seed"])))
    return GridResults(grid, tidy(rows), ranks, places)


def tidy(rows: list[dict]) -> pd.DataFrame:
    """Rows as a table with the columns `COLUMNS`, in which a count may be missing."""
    kinds = {**dict.fromkeys(COUNTS, "Int64"), "plateau": "boolean"}
    return pd.DataFrame(rows, columns=COLUMNS).astype(kinds)


def _belongs(grid: Grid, run: runs.Run, root: Path) -> bool:
    configuration, seed = run.config["configuration"], run.manifest["seed"]
    if configuration not in {*grid.configurations, *FROZEN} or seed not in grid.seeds:
        return False
    how = grid.measurement(configuration)
    if run.config.get("split") != grid.split:
        return False
    if configuration in FROZEN:
        how |= _frozen_facts(grid.training(configuration, seed))
        return seed == grid.seeds[0] and {key: run.config.get(key) for key in how} == how
    if {key: run.config.get(key, MEASURED[key]) for key in how} != how:
        return False
    folder = root / "train" / run.config["training"]
    if not folder.is_dir():  # a small copy, or removed to save space: the measurement's name has to do
        return True
    wanted = grid.training(configuration, seed).identity()
    return runs.load_run(folder).config == json.loads(json.dumps(wanted))


def holm(p) -> np.ndarray:
    """P-values corrected for their number (Holm, 1979); NaN are none."""
    p = np.asarray(p, float)
    order = np.argsort(p)[: np.isfinite(p).sum()]
    corrected = np.full(len(p), np.nan)
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return corrected


def pooled_difference(
    ranks_a, ranks_b, k: int = 1, *, groups=None, seed: int = 0, draws: int = 4_000
) -> Difference:
    """R@k of b less that of a over the same queries and seeds: a bootstrap over places, widened by seeds.

    A draw resamples the groups of queries, the same ones for all seeds, since a query that is hard is hard
    for every seed. To it is added a draw from Student's t with S - 1 degrees of freedom, times the standard
    error of the mean over the S seeds beyond the scatter of single places. So the interval speaks of other
    seeds and other places. (Resampling three seeds would not do: where seeds are all that varies, that
    interval misses the truth one time in four.) With one seed the interval is that of the places alone.

    Parameters
    ----------
    ranks_a, ranks_b : array (S, Q)
        Rank of each query's first positive for each seed, 0: none; the same seeds in both.
    k : int
    groups : array (Q,), optional
        Queries with the same label are drawn together, such as those of one place; default: each alone.
    seed, draws
        Of the resampling.

    Returns
    -------
    sagelib.retrieval.Difference
        With ``n_queries`` = S Q; ``p_exact`` is NaN: McNemar's test has no place for seeds.
    """
    a, b = np.atleast_2d(ranks_a), np.atleast_2d(ranks_b)
    groups = np.arange(a.shape[1]) if groups is None else np.asarray(groups)
    if a.shape != b.shape or groups.shape != a.shape[1:]:
        shapes = f"got {a.shape}, {b.shape} and {groups.shape}"
        raise ValueError(
            f"the ranks must have the same shape (seeds, queries), and groups (queries,), {shapes}"
        )
    change = _hit(b, k).astype(float) - _hit(a, k)
    member = np.unique(groups, return_inverse=True)[1]
    sizes = np.bincount(member)
    per_group = np.stack([np.bincount(member, weights=row) for row in change])  # (S, G)
    rng = runs.rng(seed, "pooled_difference")
    picked = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=draws)
    resampled = (picked @ per_group.mean(0)) / (picked @ sizes)
    if len(a) > 1:
        error = _seeds_error((per_group - sizes * change.mean()) / sizes.mean())
        resampled = resampled + error * rng.standard_t(len(a) - 1, size=draws)
    low, high = 100 * np.quantile(resampled, [0.025, 0.975])
    p = min(1.0, 2 * (1 + min((resampled <= 0).sum(), (resampled >= 0).sum())) / (1 + draws))
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    points = 100 * float(change.mean())
    return Difference(points, float(low), float(high), float(p), math.nan, gained, lost, change.size, k)


def _seeds_error(effects: np.ndarray) -> float:
    """Standard error, from seeds alone, of the mean of effects (S, G): the two-way analysis of variance."""
    seeds, groups = effects.shape
    of_seeds = effects.mean(1, keepdims=True)
    scatter = effects - of_seeds - effects.mean(0) + effects.mean()
    single = (scatter**2).sum() / ((seeds - 1) * max(1, groups - 1))
    return math.sqrt(max(0.0, of_seeds.var(ddof=1) - single / groups) / seeds)


def _hit(ranks: np.ndarray, k: int) -> np.ndarray:
    return (ranks > 0) & (ranks <= k)


def export_grid(results: GridResults, root: str | Path, folder: str | Path) -> Path:
    """A small copy in ``folder/<grid>/``: grid.yaml, summary.csv, measurements and the trainings' manifests.

    Parameters
    ----------
    results : GridResults
    root : path
        The folder of runs they came from.
    folder : path
    """
    out = Path(folder) / results.grid.name
    measured = [Path(root) / name for name in results.table["run"] if name]
    keep(measured, out / STAGE)
    trained = {runs.load_run(folder).config["training"] for folder in measured}
    keep([Path(root) / "train" / name for name in sorted(trained)], out / "trainings", ["manifest.json"])
    grid = asdict(results.grid) | {"seeds": list(results.grid.seeds)}
    runs.write_text(out / "grid.yaml", yaml.safe_dump(grid, sort_keys=False))
    summaries = [
        results.summary(dataset, k).rename(columns={f"R@{k}": "percent"}).assign(dataset=dataset, k=k)
        for dataset in results.datasets
        for k in (1, 5, 10)
    ]
    with runs.atomic_path(out / "summary.csv") as path:
        pd.concat(summaries or [pd.DataFrame()]).to_csv(path, index=False, float_format="%.6g")
    return out


def keep(folders: Sequence[Path], target: Path, patterns=("*.json", "*.np?", "*.csv")) -> None:
    """Copy the small files of some runs into `target`, whose old content goes; it appears whole."""
    aside = target.with_name(f".{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for folder in folders:
        for path in (path for pattern in patterns for path in folder.glob(pattern)):
            (aside / folder.name / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, aside / folder.name / path.relative_to(folder))
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


# ---------- the command
def main(arguments: list[str] | None = None) -> int:
    """The command ``python -m workbench.grids``."""
    parser = argparse.ArgumentParser(prog="python -m workbench.grids", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("grid", type=Path, help="YAML file of a grid")
    add("--data", type=Path, required=True, help="set to train on; it is measured on its other pictures")
    add("--test", type=Path, nargs="*", default=[], help="further sets that are measured")
    add("--runs", type=Path, default=Path("data/runs"), help="folder of runs")
    add("--tokens", type=Path, help="folder of stored tokens (default: tokens in the folder of runs)")
    add("--workers", type=int, default=1, help="trainings at once")
    add("--device", default="auto")
    add("--export", type=Path, help="folder for a small copy of the results")
    add("--only-read", action="store_true", help="train nothing; report what is finished")
    options = parser.parse_args(arguments)
    try:
        runs.check("--workers", options.workers, 1, whole=True)
        grid = read_grid(options.grid)
        if options.only_read:
            results = load_grid(grid, options.runs)
        else:
            if not (options.data / "manifest.json").exists():
                ensure_town(options.data.parent, options.data.name, progress=True)
            how = dict(tokens=options.tokens, workers=options.workers, device=options.device)
            how["mined"] = open_training_set(options.data.parent, options.data.name)
            sets = (options.data, *options.test)
            how["test_sets"] = [open_set(path.parent, path.name, split=grid.split) for path in sets]
            results = run_grid(grid, options.runs, **how)
        if options.export is not None:
            print(f"written: {export_grid(results, options.runs, options.export)}")
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    for dataset in results.datasets:
        print(f"\n{grid.name} on {dataset}, against {grid.reference}")
        print(results.summary(dataset).to_string(index=False, float_format="{:.1f}".format))
    if not results.datasets:
        print(f"{grid.name}: not run")
    return 0


if __name__ == "__main__":
    from workbench.grids import main  # by this name its jobs reach other processes

    sys.exit(main())
