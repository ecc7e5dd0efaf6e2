"""Ablations: does each part earn its place? A grid of configurations and seeds, trained alike, measured alike, compared in pairs.

The order of the file is the order of the work: a grid is read (`read_grid`), every configuration is trained with every seed and
measured (`run_grid`), what has finished is read back (`load_grid`) as a tidy table with differences against the full method
(`Results`), and a small copy is kept (`export_results`).

    python -m workbench.grids notebooks/params/ablations/components.yaml --data data/town --runs data/runs --workers 2
    python -m workbench.grids audit --models random-head:gem2x2:tf_efficientnet_lite2 MY-RUN --sets data/town data/gardens-point

Configurations that share a frozen prefix share its stored tokens; those that are the same training, within a grid or across grids,
share the run. A descriptor that is measured here depends on its image alone (and on fixed anchors), never on its neighbours in a batch.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import faiss
import numpy as np
import pandas as pd
import torch
import yaml
from tqdm.auto import tqdm

from sagelib import runs
from sagelib.backbone import build_backbone
from sagelib.describe import (
    Context,
    choose_anchors,
    compose,
    model_fingerprint,
    names_in_order,
    own_anchors,
    pick_device,
    rerank_in_context,
)
from sagelib.evaluate import (
    AUDIT_CONTEXTS,
    Audit,
    _data_fingerprint,
    audit_contexts,
    open_model,
    published,
    training_run,
)
from sagelib.images import Preprocess
from sagelib.interact import InteractHead
from sagelib.places import Places, TestSet, open_set, open_training_set
from sagelib.retrieval import (
    KS,
    PCA,
    Difference,
    recall,
    search,
)
from sagelib.tokens import open_tokens
from sagelib.train import PRECISIONS, TrainConfig, open_run, train
from townscape.folder import write_town
from workbench.tables import minimal_detectable_difference

__all__ = [
    "Grid",
    "Results",
    "audit",
    "export_audits",
    "export_results",
    "load_exported",
    "load_grid",
    "open_audited",
    "pooled_difference",
    "read_grid",
    "run_grid",
]

STAGE = "ablate"
# How a configuration is measured, once it is trained; its other entries are fields of `TrainConfig`.
MEASURED = {"context": None, "anchors_from": None, "rerank": None, "pca": None, "whiten": False}
GRID_KEYS = ("name", "title", "base", "settings", "town", "seeds", "reference", "configurations", "published")


# ---------------------------------------------------------------------------------------------------------------------
# The grid
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Configurations that differ from one base in a few fields each, and the seeds that each is trained with.

    Attributes
    ----------
    name : str
        A folder's name; its runs carry it.
    title : str
        The question that it answers.
    base : dict
        Fields of `TrainConfig` that all configurations share.
    seeds : tuple of int
    reference : str
        The configuration that the others are compared with: the full method.
    configurations : dict of str to dict
        What each changes. Fields of `TrainConfig`, and how it is measured: ``context`` (none, solo or anchors; default: anchors where the
        head was trained with them, solo for another head, none without a head), ``anchors_from`` (``sample-m`` or ``kmeans-m``: m
        anchors chosen among the training descriptors after training, instead of the model's own), ``rerank`` (m: each query's first m
        references are its anchors in a second stage, `sagelib.describe.rerank_in_context`), ``pca`` (dimensions, fitted on
        training descriptors) and ``whiten``. Options (``aggregator_options``, ...) are added to the base's, unless the configuration
        names another aggregator, adapter, loss or miner, whose options they then are.
    published : dict of str to str
        Configuration to the name of its row in the published ablation.
    town : dict
        Arguments of `townscape.folder.write_town`, with which the command renders a data folder named ``town...`` that is not there yet.
    """

    name: str
    title: str = ""
    base: dict = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    reference: str
    configurations: dict[str, dict]
    published: dict[str, str] = field(default_factory=dict)
    town: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]+", self.name):
            raise ValueError(f"the name of a grid must be one plain word, got {self.name!r}")
        if not self.seeds or not all(isinstance(s, int) and s >= 0 for s in self.seeds):
            raise ValueError(f"seeds must be whole numbers from 0, at least one, got {list(self.seeds)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must differ, got {list(self.seeds)}")
        if self.reference not in self.configurations:
            raise ValueError(
                f"reference is {self.reference!r}; it must be one of the configurations {', '.join(self.configurations)}"
            )
        unknown = [name for name in self.published if name not in self.configurations]
        if unknown:
            raise ValueError(f"published names {unknown[0]!r}, which is no configuration of this grid")
        short: dict[str, str] = {}
        for name, changes in self.configurations.items():
            if (other := short.setdefault(_slug(name), name)) != name:
                raise ValueError(
                    f"configurations {other!r} and {name!r} would have the same folder: rename one"
                )
            try:
                self.training(name, self.seeds[0])
                self.measurement(name)
            except (ValueError, TypeError) as error:
                raise ValueError(f"configuration {name!r}: {error}") from None
            if "seed" in changes:
                raise ValueError(f"configuration {name!r} sets seed: the grid's seeds do that")

    def training(self, configuration: str, seed: int) -> TrainConfig:
        """How a configuration is trained with one seed."""
        base, default = self.base, TrainConfig()
        changes = {k: v for k, v in self.configurations[configuration].items() if k not in MEASURED}
        values = {**base, **changes}
        for part in ("aggregator", "adapter", "interact", "loss", "miner"):
            key = f"{part}_options"
            of_base = base.get(part, getattr(default, part))
            if part != "interact" and changes.get(part, of_base) != of_base:
                # Another part has other options: the base's are not meant for it.
                values[key] = changes.get(key, getattr(default, key))
            elif isinstance(base.get(key), dict) and isinstance(changes.get(key), dict):
                values[key] = {**base[key], **changes[key]}
        for key in ("augment", "data_init"):  # in parameter files 0 is off
            values[key] = values.get(key, TrainConfig.__dataclass_fields__[key].default) or None
        return TrainConfig.from_mapping({**values, "seed": seed})

    def measurement(self, configuration: str) -> dict:
        """How a configuration is measured: its context, anchors_from, pca and whiten, with nothing left to defaults."""
        chosen = {k: v for k, v in self.configurations[configuration].items() if k in MEASURED}
        how = {**MEASURED, **chosen}
        config = self.training(configuration, self.seeds[0])
        if how["context"] is None:
            own = "anchors" if config.train_context == "anchors" or how["anchors_from"] else "solo"
            how["context"] = own if config.interact else "none"
        kind = Context.parse(how["context"]).kind
        if kind not in ("none", "solo", "anchors"):
            raise ValueError(
                f"context is {how['context']!r}; an ablation is measured under none, solo or anchors, where a descriptor depends on its image "
                "alone (for the others there is sagelib.evaluate.audit_contexts)"
            )
        if kind != "none" and not config.interact:
            raise ValueError(f"context {how['context']!r} needs interact: true")
        if how["anchors_from"] is not None:
            _anchor_rule(how["anchors_from"])
            if kind != "anchors":
                raise ValueError(f"anchors_from needs the context anchors, not {how['context']}")
        elif kind == "anchors" and config.train_context != "anchors":
            raise ValueError("this head has no anchors of its own: give anchors_from, such as kmeans-64")
        if how["rerank"] is not None:
            if not isinstance(how["rerank"], int) or how["rerank"] < 1:
                raise ValueError(f"rerank must be a whole number from 1, got {how['rerank']!r}")
            if not config.interact or how["pca"] is not None:
                raise ValueError("rerank needs interact: true, and no pca: the head reads whole descriptors")
        return how

    def to_dict(self) -> dict:
        """The grid as it would be written into a file, with the base inline."""
        return {
            "name": self.name,
            "title": self.title,
            "base": self.base,
            "seeds": list(self.seeds),
            "reference": self.reference,
            "configurations": self.configurations,
            "published": self.published,
            "town": self.town,
        }


def read_grid(path: str | Path) -> Grid:
    """Read a grid from a YAML file.

    Its keys are those of `Grid`, but that ``base`` may name another parameter file (relative to this one; what is no field of
    `TrainConfig` in it is passed over) and ``settings`` are fields laid over it. ``configurations`` may name another grid's file: its
    configurations are then these, and so are its reference, seeds and published rows where this file has none of its own.
    Without ``name`` it is the file's.

    Raises
    ------
    FileNotFoundError
        If this file or its base is missing.
    ValueError
        For what a grid cannot be; the sentence names the file and the configuration.
    """
    path = Path(path)
    values = _read_yaml(path)
    unknown = [key for key in values if key not in GRID_KEYS]
    if unknown:
        raise ValueError(f"{path}: a grid has no key {unknown[0]!r}; it has {', '.join(GRID_KEYS)}")
    if isinstance(values.get("configurations"), str):
        theirs = _read_yaml(path.parent / values["configurations"])
        shared = {key: theirs[key] for key in ("reference", "seeds", "published") if key in theirs}
        values = {**shared, **values, "configurations": theirs.get("configurations")}
    for key in ("reference", "configurations"):
        if not values.get(key):
            raise ValueError(f"{path}: {key} is missing")
    base, settings = values.get("base") or {}, values.get("settings") or {}
    if isinstance(base, str):
        base = {k: v for k, v in _read_yaml(path.parent / base).items() if k in TrainConfig.field_names()}
    if not isinstance(values["configurations"], dict):
        raise ValueError(f"{path}: configurations must be names, each with its fields and values")
    if not isinstance(values.get("seeds", []), list):
        raise ValueError(f"{path}: seeds must be a list, as in [0, 1, 2], got {values['seeds']!r}")
    for name, changes in values["configurations"].items():
        if changes is not None and not isinstance(changes, dict):
            raise ValueError(f"{path}: configuration {name!r} must be fields and values, got {changes!r}")
    try:
        return Grid(
            name=values.get("name") or path.stem,
            title=values.get("title", ""),
            base={k: v for k, v in {**base, **settings}.items() if k != "seed"},
            seeds=tuple(values.get("seeds", (0, 1, 2))),
            reference=values["reference"],
            configurations={str(k): dict(v or {}) for k, v in values["configurations"].items()},
            published=values.get("published") or {},
            town=values.get("town") or {},
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_yaml(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise ValueError(f"{path}{line}: this is not YAML") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: it must hold names and values, got {type(values).__name__}")
    return values


def _anchor_rule(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(sample|kmeans)-([1-9]\d*)", str(text))
    if match is None:
        raise ValueError(
            f"anchors_from is {text!r}; it must be sample-m or kmeans-m, m anchors, as in kmeans-64"
        )
    return match[1], int(match[2])


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


# ---------------------------------------------------------------------------------------------------------------------
# Running it
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """What every run of a grid is trained on and measured on.

    Attributes
    ----------
    mined, labelled : Places or None
        As in `sagelib.train.train`.
    test_sets : tuple of TestSet
    """

    mined: Places | None
    labelled: Places | None
    test_sets: tuple[TestSet, ...]

    def fingerprint(self) -> str:
        """Of what is trained on."""
        return runs.fingerprint([p and p.fingerprint() for p in (self.mined, self.labelled)])


@dataclass(frozen=True)
class _Job:
    """One training, and the configurations (names, for each of its seed) that are measured on it."""

    config: TrainConfig
    name: str
    measured: tuple[str, ...]
    foundation: str = "random"


def run_grid(
    grid: Grid,
    root: str | Path,
    *,
    mined: Places | None = None,
    labelled: Places | None = None,
    test_sets: Sequence[TestSet],
    tokens: str | Path | None = None,
    workers: int = 1,
    device: str = "auto",
    progress: bool = True,
) -> Results:
    """Train and measure every configuration with every seed; what is finished is skipped, what was interrupted goes on.

    No validation chooses the weights: after the same number of steps, those of the last step are measured. Seeds are the outer loop, so
    that an unfinished grid has whole rounds.

    Parameters
    ----------
    grid : Grid
    root : path
        Folder of runs. Trainings lie in ``train/ablate-<hash>-s<seed>``, where the hash is of everything they depend on, and
        measurements in ``ablate/<grid>--<configuration>--<set>--s<seed>``.
    mined, labelled : Places, optional
        As in `sagelib.train.train`.
    test_sets : sequence of TestSet
        At least one.
    tokens : path, optional
        Folder of stored tokens; ``tokens`` in `root` by default.
    workers : int
        Processes that train at once; each gets its share of the cores.
    device : str
        As in `train`.
    progress : bool
        Show a bar over trainings.

    Raises
    ------
    RunConflict
        If a measurement of the same name was made of other data or settings: give the grid another name.
    RuntimeError
        If trainings failed, after all others have finished; the sentence says which and why.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if not test_sets:
        raise ValueError("a grid needs at least one test set")
    data = Data(mined, labelled, tuple(test_sets))
    root, tokens = Path(root), Path(root) / "tokens" if tokens is None else Path(tokens)
    jobs = _jobs(grid, data)
    waiting = [job for job in jobs if not _measured(grid, job, data, root)]
    failed: dict[str, str] = {}
    with tqdm(
        total=len(jobs), initial=len(jobs) - len(waiting), unit="training", disable=not progress
    ) as bar:
        bar.set_description(grid.name)
        for job, error in _work(grid, waiting, data, root, tokens, workers, device):
            bar.update()
            if error is not None:
                failed[job.name] = error
                tqdm.write(f"{job.measured[0]}, seed {job.config.seed}, failed: {error}")
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(jobs)} trainings failed, the others are finished; the same call tries these again. "
            + "; ".join(f"{name}: {error}" for name, error in failed.items())
        )
    return load_grid(grid, root)


def _jobs(grid: Grid, data: Data) -> list[_Job]:
    """Distinct trainings in order; configurations that differ only in how they are measured share one."""
    trained_on, found, foundations = data.fingerprint(), {}, {}
    for seed in grid.seeds:
        for configuration in grid.configurations:
            config = grid.training(configuration, seed)
            identity = {k: v for k, v in config.identity().items() if k != "seed"}
            key = (config.backbone, config.pretrained, config.weights)
            if key not in foundations:
                foundations[key] = _foundation(*key)
            name = f"ablate-{runs.fingerprint([identity, trained_on, foundations[key]])[:10]}-s{seed}"
            found.setdefault(name, (config, [], foundations[key]))[1].append(configuration)
    return [
        _Job(config, name, tuple(measured), foundation)
        for name, (config, measured, foundation) in found.items()
    ]


def _foundation(backbone: str, pretrained: bool, weights: str | None) -> str:
    """Which frozen weights a training starts from: a file may be exchanged under the same name."""
    if not pretrained and weights is None:
        return "random"
    options = dict(pretrained=pretrained, weights=weights, adapter="none", train_norm=False)
    return build_backbone(backbone, **options).frozen_fingerprint()


def _measured(grid: Grid, job: _Job, data: Data, root: Path) -> bool:
    """Whether nothing is left to do; measurements of other settings are found before any work is done."""
    opened = [
        _open_measurement(grid, configuration, job, test_set, root)
        for configuration in job.measured
        for test_set in data.test_sets
    ]
    return all(run.finished for run in opened)


def _work(grid, jobs, data, root, tokens, workers, device):
    """Yield (job, sentence or None) as they finish."""
    if workers == 1:
        for job in jobs:
            yield job, _run(grid, job, data, root, tokens, device)
        return
    threads = max(1, runs.cores() // workers)
    # A fresh interpreter each: forked ones would inherit torch's threads in an unknown state.
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(threads,),
    ) as pool:
        futures = {pool.submit(_run, grid, job, data, root, tokens, device): job for job in jobs}
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool:
                yield futures[future], "its process was killed, perhaps for want of memory: lower workers"


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would train on unseen, and meet the next call in the same run."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _run(grid: Grid, job: _Job, data: Data, root: Path, tokens: Path, device: str) -> str | None:
    """Train and measure; a mistake of the user comes back as its sentence."""
    try:
        _train_and_measure(grid, job, data, root, tokens, device)
    except (ValueError, OSError, MemoryError, FloatingPointError) as error:
        return str(error)
    return None


def _train_and_measure(grid, job, data, root, tokens, device) -> None:
    places = {"mined": data.mined, "labelled": data.labelled}
    if _foundation(job.config.backbone, job.config.pretrained, job.config.weights) != job.foundation:
        raise ValueError(
            f"the weights of {job.config.backbone} were exchanged since this grid was started: start it again, and all of it is trained "
            "with the new ones"
        )
    run = open_run(root, job.name, job.config, **places, device=device)
    model = train(job.config, run, **places, tokens=tokens, device=device, progress=False).model
    describe = _Describer(model.to(pick_device(device)), job.config, tokens, pick_device(device))
    for test_set in data.test_sets:
        for configuration in job.measured:
            measurement = _open_measurement(grid, configuration, job, test_set, root)
            if not measurement.finished:
                _measure(grid.measurement(configuration), describe, data, test_set, run, measurement)


# ---------------------------------------------------------------------------------------------------------------------
# Measuring one trained model
# ---------------------------------------------------------------------------------------------------------------------


class _Describer:
    """Descriptors before the head from stored tokens; each `Places` is described once."""

    def __init__(self, model, config: TrainConfig, tokens: Path, device: torch.device) -> None:
        self.model, self.config, self.tokens, self.device = model.eval(), config, tokens, device
        self.made: dict[tuple, np.ndarray] = {}

    def __call__(self, places: Places, size: int) -> np.ndarray:
        """Descriptors (N, D), float32."""
        key = (places.fingerprint(), size)
        if key not in self.made:
            self.made[key] = self._describe(places, size)
        return self.made[key]

    @torch.inference_mode()
    def _describe(self, places: Places, size: int) -> np.ndarray:
        dtype, rows = PRECISIONS[self.config.precision], self.config.describe_batch
        store = open_tokens(
            self.tokens,
            self.model,
            places,
            preprocess=Preprocess(size, self.config.preprocess),
            limit_gb=self.config.cache_limit_gb or math.inf,
            batch_size=rows,
            autocast=dtype,
            progress=False,
        )
        parts = []
        for start in range(0, len(places), rows):
            tokens = store[np.arange(start, min(start + rows, len(places)))].to(self.device)
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
                parts.append(self.model.embed_tokens(tokens, store.grid).float().cpu().numpy())
        return np.concatenate(parts)

    def training(self, data: Data) -> np.ndarray:
        """Of the training images, from which anchors and principal components come."""
        return self(data.mined if data.mined is not None else data.labelled, self.config.image_size)


def _open_measurement(grid: Grid, configuration: str, job: _Job, test_set: TestSet, root: Path) -> runs.Run:
    return runs.Run.open(
        root,
        STAGE,
        f"{grid.name}--{_slug(configuration)}--{test_set.name}--s{job.config.seed}",
        {
            "configuration": configuration,
            "training": job.name,
            "dataset": test_set.name,
            "rule": str(test_set.rule),
            **grid.measurement(configuration),
        },
        seed=job.config.seed,
        data_fingerprint=_data_fingerprint(test_set),
    )


def _measure(how: dict, describe: _Describer, data: Data, test_set: TestSet, trained, run) -> None:
    """Describe, search, count; everything goes into the measurement's run."""
    parts = (test_set.database, test_set.queries)
    before = values = [describe(places, describe.config.validation_size) for places in parts]
    anchors = None
    if how["anchors_from"] is not None:
        method, m = _anchor_rule(how["anchors_from"])
        anchors = choose_anchors(describe.training(data), m, method, seed=describe.config.seed)
    elif how["context"] == "anchors":
        anchors = own_anchors(describe.model)
    composed = dict(context=how["context"], anchors=anchors, device=describe.device)
    values = [
        compose(describe.model, v, names_in_order(p), **composed) for v, p in zip(values, parts, strict=True)
    ]
    if how["pca"] is not None:
        fitted_on = describe.training(data)
        if how["context"] != "none":
            fitted_on = compose(describe.model, fitted_on, [""] * len(fitted_on), **composed)
        pca = PCA.fit(
            fitted_on,
            how["pca"],
            whiten=how["whiten"],
            seed=describe.config.seed,
            model=model_fingerprint(describe.model, head=how["context"] != "none"),
            data=data.fingerprint(),
            context=how["context"],
        )
        pca.save(run.path("pca.safetensors"))
        values = [pca.transform(v) for v in values]
    positives = test_set.positives()
    indices, _ = search(*values, max(*KS, how["rerank"] or 1))
    if how["rerank"] is not None:
        indices = rerank_in_context(describe.model, *before, indices, how["rerank"], device=describe.device)
    counted = recall(indices, positives, KS, n_references=len(test_set.database))
    plateau = trained.metrics.get("plateau") or {}
    runs.save_array(run.path("ranks.npy"), counted.per_query_rank.astype(np.int32))
    # Queries of one place succeed and fail together: they are resampled together.
    runs.save_array(run.path("places.npy"), test_set.queries.with_clusters(25.0).place)
    run.finish(
        {
            "hits": {str(k): n for k, n in counted.hits.items()},
            "queries": counted.n_queries,
            "references": len(test_set.database),
            "without_positive": counted.n_without_positive,
            "dim": values[0].shape[1],
            "parameters": trained.metrics["trained_parameters"],
            "steps": trained.metrics["steps"],
            "final_loss": trained.metrics["final_loss"],
            "plateau_value": plateau.get("value"),
            "on_plateau": bool(plateau.get("ended_there", False)),
            "training_s": trained.wall_time_s,
            "refresh_share": trained.metrics["refresh_share"],
        }
    )


# ---------------------------------------------------------------------------------------------------------------------
# Reading it
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """The finished runs of a grid.

    Attributes
    ----------
    grid : Grid
    table : DataFrame
        A row for each configuration, seed and data set: configuration, seed, dataset, context, R@1, R@5, R@10 (percent), hits@k, queries,
        references, dim, plateau (whether the training ended on the loss's plateau), loss, parameters, steps, training_s (wall time),
        refresh_share, run. A configuration and seed of which no run has finished has one row whose run is empty.
    ranks : dict of (configuration, seed, dataset) to array (Q,)
        Rank of each query's first positive, 0: none found.
    places : dict of dataset to array (Q,)
        Which queries lie within 25 m of each other.
    """

    grid: Grid
    table: pd.DataFrame
    ranks: dict[tuple[str, int, str], np.ndarray]
    places: dict[str, np.ndarray]

    @property
    def datasets(self) -> list[str]:
        """The sets that anything was measured on, sorted."""
        return sorted({dataset for _, _, dataset in self.ranks})

    def recalls(self, dataset: str, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """R@k in percent and whether the training ended on the plateau, both (configurations, seeds); NaN where there is no run."""
        grid = self.grid
        percent = np.full((len(grid.configurations), len(grid.seeds)), np.nan)
        stuck = np.zeros(percent.shape, bool)
        for c, configuration in enumerate(grid.configurations):
            for s, seed in enumerate(grid.seeds):
                if (configuration, seed, dataset) in self.ranks:
                    percent[c, s] = 100 * _hit(self.ranks[configuration, seed, dataset], k).mean()
                    stuck[c, s] = self._stuck(configuration, seed)
        return percent, stuck

    def summary(self, dataset: str, k: int = 1, *, seed: int = 0) -> pd.DataFrame:
        """Each configuration against the full method, a row each.

        Runs that ended on the plateau are counted and are no evidence: neither means nor differences contain them.

        Returns
        -------
        DataFrame
            configuration; seeds (sound runs); plateau (runs that ended there); R@k, their mean, and sd, their standard deviation over seeds;
            points, low, high, p (`pooled_difference` from the reference, over the seeds that both have); smallest, the difference in
            points that so many queries could show with one seed (80 % power; they count as independent here, so it is rather larger); verdict.
        """
        percent, stuck = self.recalls(dataset, k)
        rows = []
        for c, name in enumerate(self.grid.configurations):
            there = np.isfinite(percent[c])
            sound = percent[c][there & ~stuck[c]]
            row = {
                "configuration": name,
                "seeds": len(sound),
                "plateau": int(stuck[c].sum()),
                f"R@{k}": sound.mean() if len(sound) else np.nan,
                "sd": sound.std(ddof=1) if len(sound) > 1 else np.nan,
            }
            rows.append(row | self._against_reference(name, dataset, k, seed))
            rows[-1]["verdict"] = _verdict(rows[-1], there.any(), name == self.grid.reference)
        return pd.DataFrame(rows)

    def _against_reference(self, name: str, dataset: str, k: int, seed: int) -> dict:
        reference = self.grid.reference
        empty = dict.fromkeys(("points", "low", "high", "p", "smallest"), np.nan)
        if name == reference:
            return empty
        common = [
            s
            for s in self.grid.seeds
            if all((c, s, dataset) in self.ranks and not self._stuck(c, s) for c in (reference, name))
        ]
        if not common:
            return empty
        theirs, mine = (np.stack([self.ranks[c, s, dataset] for s in common]) for c in (reference, name))
        found = pooled_difference(theirs, mine, k, groups=self.places[dataset], seed=seed)
        share = (found.gained + found.lost) / found.n_queries
        smallest = minimal_detectable_difference(mine.shape[1], share)
        return {
            "points": found.points,
            "low": found.low,
            "high": found.high,
            "p": found.p,
            "smallest": smallest,
        }

    def _stuck(self, configuration: str, seed: int) -> bool:
        rows = self.table[(self.table["configuration"] == configuration) & (self.table["seed"] == seed)]
        return bool((rows["plateau"] == True).any())  # noqa: E712  (None where there is no run)

    def published(self) -> pd.DataFrame:
        """What others published of the same configurations: second-hand, of another model on other sets; not measured here.

        Returns
        -------
        DataFrame
            configuration, a column of R@1 for each published set, and note.
        """
        theirs = published("ablation")
        rows = []
        for name, row_name in self.grid.published.items():
            row = theirs[theirs["configuration"] == row_name]
            rows.append(
                {
                    "configuration": name,
                    **dict(zip(row["dataset"], row["r1"], strict=True)),
                    "note": "; ".join(dict.fromkeys(row["note"])),
                }
            )
        return pd.DataFrame(rows, columns=None if rows else ["configuration", "note"])


def load_grid(grid: Grid, root: str | Path) -> Results:
    """The finished measurements of a grid in a folder of runs; unfinished and missing ones are rows without a run.

    A run of the same name that was trained or measured otherwise, before the grid's file was changed, is none of this grid's.
    """
    found: dict[tuple[str, int], list] = {}
    for run in runs.find_runs(root, STAGE):
        if run.name.startswith(f"{grid.name}--") and _belongs(grid, run, Path(root)):
            found.setdefault((run.config["configuration"], run.manifest["seed"]), []).append(run)
    rows, ranks, places = [], {}, {}
    for configuration in grid.configurations:
        for seed in grid.seeds:
            here = found.get((configuration, seed), [])
            rows += [_row(run) for run in here] or [{"configuration": configuration, "seed": seed, "run": ""}]
            for run in here:
                dataset = run.config["dataset"]
                ranks[configuration, seed, dataset] = np.load(run.dir / "ranks.npy")
                places[dataset] = np.load(run.dir / "places.npy")
    return Results(grid, _tidy(rows), ranks, places)


def _belongs(grid: Grid, run: runs.Run, root: Path) -> bool:
    configuration, seed = run.config["configuration"], run.manifest["seed"]
    if configuration not in grid.configurations or seed not in grid.seeds:
        return False
    how = grid.measurement(configuration)
    if {key: run.config.get(key, MEASURED[key]) for key in how} != how:
        return False
    folder = root / "train" / run.config["training"]
    if not folder.is_dir():  # removed to save space: the measurement's name has to do
        return True
    wanted = grid.training(configuration, seed).identity()
    return runs.load_run(folder).config == json.loads(json.dumps(wanted))


COLUMNS = (
    "configuration seed dataset context R@1 R@5 R@10 hits@1 hits@5 hits@10 queries references dim plateau loss parameters steps training_s "
    "refresh_share run"
).split()


def _tidy(rows: list[dict]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=COLUMNS)
    for column in "hits@1 hits@5 hits@10 queries references dim parameters steps".split():
        table[column] = table[column].astype("Int64")
    table["plateau"] = table["plateau"].astype("boolean")
    return table


def _row(run: runs.Run) -> dict:
    m, hits = run.metrics, {int(k): n for k, n in run.metrics["hits"].items()}
    return {
        "configuration": run.config["configuration"],
        "seed": run.manifest["seed"],
        "dataset": run.config["dataset"],
        "context": run.config["context"],
        **{f"R@{k}": 100 * hits[k] / m["queries"] for k in (1, 5, 10)},
        **{f"hits@{k}": hits[k] for k in (1, 5, 10)},
        "queries": m["queries"],
        "references": m["references"],
        "dim": m["dim"],
        "plateau": m["on_plateau"],
        "loss": m["final_loss"],
        "parameters": m["parameters"],
        "steps": m["steps"],
        "training_s": m["training_s"],
        "refresh_share": m["refresh_share"],
        "run": f"{run.stage}/{run.name}",
    }


def _verdict(row: dict, ran: bool, is_reference: bool) -> str:
    if not ran:
        return "not run"
    if not row["seeds"]:
        return "no evidence: every run ended on the plateau"
    if is_reference:
        return "the full method"
    if not np.isfinite(row["points"]):
        return "not comparable yet"
    if row["low"] > 0:
        return "better"
    return "worse" if row["high"] < 0 else "no difference shown"


def _hit(ranks: np.ndarray, k: int) -> np.ndarray:
    return (ranks > 0) & (ranks <= k)


def pooled_difference(
    ranks_a, ranks_b, k: int = 1, *, groups=None, seed: int = 0, draws: int = 4_000, level: float = 0.95
) -> Difference:
    """R@k of b less that of a over the same queries and seeds, pooled: a paired bootstrap over places, widened by what seeds add.

    The unit is a query under a seed: b's run of a seed against a's run of the same seed, on the same query. A draw resamples the groups of
    queries, the same ones for all seeds, because a query that is hard is hard for every seed. To it is added what the mean over S seeds
    may be wrong by: a draw from Student's t with S - 1 degrees of freedom, times the standard error of the seeds' own effects, which is
    what the S means vary by beyond the scatter of single places. So the interval tells of other seeds and other places. (Resampling three seeds
    would not do: such an interval ends at the lowest and the highest of them, and where seeds are all that varies it misses the truth one time
    in four.) One seed tells nothing of others: the interval is then that of the places alone.

    Parameters
    ----------
    ranks_a, ranks_b : array (S, Q)
        Rank of each query's first positive for each seed, 0: none.
    k : int
    groups : array (Q,), optional
        Queries with the same label are drawn together, such as those of one place; default: each alone.
    seed, draws, level
        Of the resampling.

    Returns
    -------
    sagelib.retrieval.Difference
        With ``n_queries`` = S Q; ``gained`` and ``lost`` count queries under seeds. ``p_exact`` is NaN: McNemar's test has no place for seeds.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    a, b = np.atleast_2d(ranks_a), np.atleast_2d(ranks_b)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(
            f"ranks_a and ranks_b must have the same shape (seeds, queries), got {a.shape} and {b.shape}"
        )
    groups = np.arange(a.shape[1]) if groups is None else np.asarray(groups)
    if groups.shape != (a.shape[1],):
        raise ValueError(f"groups must have shape ({a.shape[1]},), got {groups.shape}")
    change = _hit(b, k).astype(float) - _hit(a, k)
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    member = np.unique(groups, return_inverse=True)[1]
    sizes = np.bincount(member)
    per_group = np.stack([np.bincount(member, weights=row) for row in change])  # (S, G)
    rng = runs.rng(seed, "pooled_difference")
    picked = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), size=draws)
    resampled = (picked @ per_group.mean(0)) / (picked @ sizes)
    if len(a) > 1:
        error = _seeds_error((per_group - sizes * change.mean()) / sizes.mean())
        resampled = resampled + error * rng.standard_t(len(a) - 1, size=draws)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    p = min(1.0, 2 * (1 + min((resampled <= 0).sum(), (resampled >= 0).sum())) / (1 + draws))
    points = 100 * float(change.mean())
    return Difference(
        points, 100 * float(low), 100 * float(high), float(p), math.nan, gained, lost, change.size, k
    )


def _seeds_error(effects: np.ndarray) -> float:
    """Standard error, from seeds alone, of the mean of effects (S seeds, G groups): the two-way analysis of variance."""
    seeds, groups = effects.shape
    of_seeds = effects.mean(1, keepdims=True)
    scatter = effects - of_seeds - effects.mean(0) + effects.mean()
    single = (scatter**2).sum() / ((seeds - 1) * max(1, groups - 1))
    return math.sqrt(max(0.0, of_seeds.var(ddof=1) - single / groups) / seeds)


# ---------------------------------------------------------------------------------------------------------------------
# A small copy
# ---------------------------------------------------------------------------------------------------------------------


def export_results(results: Results, root: str | Path, folder: str | Path) -> Path:
    """Write what a reader needs to check the numbers, without weights and descriptors, into ``folder/<grid>/``.

    ``runs.csv`` (`Results.table`), ``summary.csv`` (each set's `Results.summary` at 1, 5 and 10), ``ranks.npz``, ``grid.yaml`` and
    ``manifests.json`` (of every measurement and its training: configuration, seed, data fingerprint, commit, versions, times, metrics).

    Parameters
    ----------
    results : Results
    root : path
        The folder of runs they came from.
    folder : path

    Returns
    -------
    Path
        ``folder/<grid>``.
    """
    out = Path(folder) / results.grid.name
    with runs.atomic_path(out / "runs.csv") as path:
        results.table.to_csv(path, index=False, lineterminator="\n", float_format="%.6g")
    parts = [
        results.summary(dataset, k).rename(columns={f"R@{k}": "percent"}).assign(dataset=dataset, k=k)
        for dataset in results.datasets
        for k in (1, 5, 10)
    ]
    summary = pd.concat(parts) if parts else pd.DataFrame()
    with runs.atomic_path(out / "summary.csv") as path:
        summary.to_csv(path, index=False, lineterminator="\n", float_format="%.6g")
    arrays = {
        f"{_slug(c)}--s{s}--{dataset}": ranks.astype(np.int16)
        for (c, s, dataset), ranks in results.ranks.items()
    }
    arrays |= {f"places--{dataset}": labels.astype(np.int32) for dataset, labels in results.places.items()}
    with runs.atomic_path(out / "ranks.npz") as path:
        with open(path, "wb") as stream:
            np.savez_compressed(stream, **arrays)
    runs.write_text(out / "grid.yaml", yaml.safe_dump(_portable(results.grid.to_dict()), sort_keys=False))
    runs.write_json(out / "manifests.json", _manifests(results, Path(root)))
    return out


def _manifests(results: Results, root: Path) -> dict:
    """The manifests of measurements and trainings; of the configurations, which repeat themselves, what is not in the grid's base."""
    base = results.grid.training(results.grid.reference, results.grid.seeds[0]).identity()
    kept = {"base": base, "versions": None, "runs": {}}
    for name in (name for name in results.table["run"] if name):
        manifest = runs.load_run(root / name).manifest
        kept["versions"] = kept["versions"] or manifest["versions"]
        kept["runs"][name] = _short(manifest)
        training = f"train/{manifest['config']['training']}"
        if training not in kept["runs"]:
            manifest = runs.load_run(root / training).manifest
            changed = {k: v for k, v in manifest["config"].items() if v != base.get(k)}
            kept["runs"][training] = _short({**manifest, "config": changed})
    return _portable(kept)


def _short(manifest: Mapping) -> dict:
    keys = "config config_hash seed data_fingerprint git_commit device platform started finished wall_time_s metrics"
    return {key: manifest[key] for key in keys.split()}


def _portable(value):
    """The same without folders of one machine: of a path, its last part."""
    if isinstance(value, Mapping):
        return {key: _portable(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(v) for v in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def load_exported(folder: str | Path) -> Results:
    """Read what `export_results` wrote.

    Raises
    ------
    FileNotFoundError
        If the folder holds no exported grid.
    """
    folder = Path(folder)
    if not (folder / "runs.csv").is_file():
        raise FileNotFoundError(
            f"{folder} holds no exported grid: there is no runs.csv in it (python -m workbench.grids writes one with --export)"
        )
    grid = read_grid(folder / "grid.yaml")
    table = pd.read_csv(folder / "runs.csv", keep_default_na=False, na_values=[""])
    table["run"] = table["run"].fillna("")
    names = {_slug(name): name for name in grid.configurations}
    ranks, places = {}, {}
    with np.load(folder / "ranks.npz") as stored:
        for key in stored.files:
            first, *rest = key.split("--")
            if first == "places":
                places[rest[0]] = stored[key].astype(np.int64)
            else:
                ranks[names[first], int(rest[0][1:]), rest[1]] = stored[key].astype(np.int32)
    return Results(grid, _tidy(table.to_dict("records")), ranks, places)


def export_audits(
    audits: Sequence[Audit],
    folder: str | Path,
    k: int = 1,
    *,
    places: Mapping[str, np.ndarray] | None = None,
    trainings: Mapping[str, runs.Run] | None = None,
) -> Path:
    """Write audits of contexts as small tables: every context's recall, and what the order of the files was worth.

    ``contexts.csv`` has `sagelib.evaluate.Audit.summary` of each model and data set, ``leak.csv`` its `Audit.leak`, ``shuffles.csv`` its table,
    and ``manifests.json`` what each audit, and the training of its model, was run with.

    Parameters
    ----------
    audits : sequence of Audit
    folder : path
    k : int
    places : dict of dataset to array (Q,), optional
        Which queries lie at one place: they are resampled together.
    trainings : dict of model to Run, optional
    """
    folder, places = Path(folder), places or {}
    for name, table in (
        (
            "contexts",
            [a.summary(k).assign(model=a.model, dataset=a.dataset, queries=_queries(a)) for a in audits],
        ),
        ("shuffles", [a.table.assign(model=a.model, dataset=a.dataset) for a in audits]),
        (
            "leak",
            [
                a.leak(k, groups=places.get(a.dataset)).assign(model=a.model, dataset=a.dataset)
                for a in audits
            ],
        ),
    ):
        table = pd.concat(table)
        table = table[["model", "dataset", *(c for c in table if c not in ("model", "dataset"))]]
        with runs.atomic_path(folder / f"{name}.csv") as path:
            table.to_csv(path, index=False, lineterminator="\n", float_format="%.6g")
    manifests = [runs.load_run(a.path).manifest for a in audits]
    kept = {
        "versions": manifests[0]["versions"],
        "trainings": {model: _short(run.manifest) for model, run in (trainings or {}).items()},
        "audits": {a.path.name: _short(m) for a, m in zip(audits, manifests, strict=True)},
    }
    runs.write_json(folder / "manifests.json", _portable(kept))
    return folder


def _queries(audit: Audit) -> int:
    return int(audit.table["n_queries"].iloc[0])


# ---------------------------------------------------------------------------------------------------------------------
# The audit of contexts
# ---------------------------------------------------------------------------------------------------------------------


def open_audited(spec: str, roots: Sequence[Path] = (), seed: int = 0):
    """A model to be audited, by name: what `sagelib.evaluate.open_model` knows, with an InteractHead.

    Parameters
    ----------
    spec : str
        A name for `open_model`; behind ``random-head:``, that model with a head of random weights, the paper's but for the width of
        its segments, which must divide the descriptors'. What such a head does to recall is the context's doing alone.
    roots : sequence of path
        Folders of runs.
    seed : int
        Of the random weights.

    Returns
    -------
    model, run : callable, Run or None
        The training run where the name is one.

    Raises
    ------
    ValueError
        If there is no such model, or it has no head.
    """
    mark, _, rest = spec.partition(":")
    name = rest if mark == "random-head" else spec
    model, run = open_model(name, roots), training_run(name, roots)
    if mark == "random-head":
        if not hasattr(model, "head"):
            raise ValueError(f"{name} can be given no head: it is no model of this package")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(runs.torch_seed(seed, "random head"))
            model.head = InteractHead(model.width, segment_width=math.gcd(model.width, 768)).eval()
    elif not getattr(model, "has_head", False):
        raise ValueError(
            f"{spec} has no InteractHead to be audited; random-head:{spec} gives it one of random weights"
        )
    return model, run


def audit(
    models: Mapping[str, str],
    test_sets: Sequence[TestSet],
    root: str | Path,
    *,
    size: int | None = None,
    mode: str | None = None,
    shuffles: int = 5,
    seed: int = 0,
    device: str = "auto",
    progress: bool = True,
) -> tuple[list[Audit], dict[str, runs.Run]]:
    """Audit several models on several sets (`sagelib.evaluate.audit_contexts`); what is finished is found again.

    Parameters
    ----------
    models : dict of label to name
        See `open_audited`.
    test_sets : sequence of TestSet
    root : path
        Folder of runs: trained models are looked for here, and audits are written here.
    size, mode : int, str, optional
        Of `sagelib.images.Preprocess`. Default: those of a model's training (at the size of its validation), or 224 and antialias for a model
        that was not trained here.
    shuffles, seed, device, progress
        As for `audit_contexts`. A head that has anchors of its own is measured over them, too.

    Returns
    -------
    audits : list of Audit
    trainings : dict of label to Run
        Of the models that have one.
    """
    audits, trainings = [], {}
    for label, spec in models.items():
        model, run = open_audited(spec, [Path(root)], seed)
        theirs = {} if run is None else run.config
        if run is not None:
            trainings[label] = run
        look = Preprocess(
            size or theirs.get("validation_size", 224), mode or theirs.get("preprocess", "antialias")
        )
        anchors = ("anchors",) if own_anchors(model) is not None else ()
        audits += [
            audit_contexts(
                model,
                test_set,
                root,
                contexts=(*AUDIT_CONTEXTS, *anchors),
                shuffles=shuffles,
                seed=seed,
                model_name=label,
                preprocess=look,
                device=device,
                progress=progress,
            )
            for test_set in test_sets
        ]
    return audits, trainings


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def _audit_command(arguments: list[str]) -> int:
    """The command ``python -m workbench.grids audit``."""
    parser = argparse.ArgumentParser(
        prog="python -m workbench.grids audit",
        description="Recall of the same weights and pictures in every context: none, solo, sorted-n and shuffled-n.",
    )
    parser.add_argument(
        "--models",
        nargs="+",
        required=True,
        metavar="[LABEL=]NAME",
        help="a training run with a head, a released checkpoint's file, or random-head: before any model's name",
    )
    parser.add_argument(
        "--sets", type=Path, nargs="+", required=True, help="sets whose test part is measured"
    )
    parser.add_argument("--runs", type=Path, default=Path("data/runs"), help="folder of runs")
    parser.add_argument("--export", type=Path, help="folder for small tables, as in data/results/audit")
    parser.add_argument("--shuffles", type=int, default=5, help="permutations of each shuffled-n")
    parser.add_argument("--size", type=int, help="pixels a side (default: of a model's training, else 224)")
    parser.add_argument(
        "--preprocess", help="mode of preprocessing (default: of a model's training, else antialias)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(arguments)
    models = {}
    for text in options.models:
        label, mark, spec = text.partition("=")
        models[label if mark else Path(text).name.replace(":", "-")] = spec if mark else text
    try:
        test_sets = [open_set(folder.parent, folder.name) for folder in options.sets]
        places = {t.name: t.queries.with_clusters(25.0).place for t in test_sets}
        looks = {"size": options.size, "mode": options.preprocess}
        how = dict(shuffles=options.shuffles, seed=options.seed, device=options.device)
        audits, trainings = audit(models, test_sets, options.runs, **looks, **how)
        if options.export is not None:
            print(f"written: {export_audits(audits, options.export, places=places, trainings=trainings)}")
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    for one in audits:
        print(f"\n{one.model} on {one.dataset}: R@1, and sorted less shuffled")
        print(one.summary().to_string(index=False, float_format="{:.1f}".format))
        leak = one.leak(groups=places[one.dataset])
        print(leak.to_string(index=False, float_format="{:.1f}".format))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """The command ``python -m workbench.grids``; with ``audit`` as its first word, the audit of contexts."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["audit"]:
        return _audit_command(arguments[1:])
    parser = argparse.ArgumentParser(prog="python -m workbench.grids", description=__doc__.splitlines()[0])
    parser.add_argument("grid", type=Path, help="YAML file of a grid")
    parser.add_argument(
        "--data", type=Path, required=True, help="set with images/train; its test part is measured"
    )
    parser.add_argument(
        "--test", type=Path, nargs="*", default=[], help="further sets whose test part is measured"
    )
    parser.add_argument("--runs", type=Path, default=Path("data/runs"), help="folder of runs")
    parser.add_argument(
        "--tokens", type=Path, help="folder of stored tokens (default: tokens in the folder of runs)"
    )
    parser.add_argument("--workers", type=int, default=1, help="trainings at once")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--export", type=Path, help="folder for a small copy of the results")
    parser.add_argument("--only-read", action="store_true", help="train nothing; report what is finished")
    options = parser.parse_args(arguments)
    try:
        grid = read_grid(options.grid)
        if options.data.name.startswith("town") and grid.town and not options.only_read:
            write_town(options.data, **grid.town, workers=options.workers)
        if options.only_read:
            results = load_grid(grid, options.runs)
        else:
            results = run_grid(
                grid,
                options.runs,
                mined=open_training_set(options.data.parent, options.data.name),
                test_sets=[open_set(folder.parent, folder.name) for folder in (options.data, *options.test)],
                tokens=options.tokens,
                workers=options.workers,
                device=options.device,
            )
        if options.export is not None:
            print(f"written: {export_results(results, options.runs, options.export)}")
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
    sys.exit(main())
