"""Training: batches of places, a gathered loss, and a run that can be killed at any moment.

The order of the file is the order of the method: what is configured (`TrainConfig`), the loss and the place where it rests
(`plateau_value`), the learning rate (`rate_factor`), and the loop (`train`). One step draws a batch of ``places x images`` from
each source (labelled places, the mined graph, or both), describes the images, lets the descriptors of all processes meet, passes
them through the cross-image head if there is one, and adds one multi-similarity loss a source.

    python -m sagelib.train params.yaml --data FOLDER --runs data/runs --name first

Every random number is drawn for a name (`sagelib.runs.rng`): the weights' start, the dropout of step 17, the augmentation of image
3 in epoch 2. So there is no generator whose state a checkpoint would have to carry, and a resumed run repeats an uninterrupted one
bit by bit on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import io
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from sagelib import runs
from sagelib.backbone import read_checkpoint as read_weights
from sagelib.describe import TokenStore, describe_batch, in_context, open_tokens, pick_device
from sagelib.graph import GeoVisualGraph
from sagelib.images import MODES, Preprocess, TrainTransform, Views, loader
from sagelib.model import SAGE
from sagelib.places import (
    Places,
    TestSet,
    open_set,
    open_training_set,
)
from sagelib.retrieval import recall, search
from sagelib.runs import Run
from sagelib.sampler import CliqueSampler, PlaceSampler, SamplerConfig

__all__ = [
    "Result",
    "TrainConfig",
    "build_loss",
    "build_miner",
    "build_model_of",
    "load_trained",
    "open_run",
    "plateau_value",
    "rate_factor",
    "train",
]

PRECISIONS = {None: None, "bfloat16": torch.bfloat16, "float16": torch.float16}
CONTEXTS = ("batch", "half", "solo", "anchors")
_KINDS = {  # of a field's value, by its annotation
    "bool": (bool, "true or false"),
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "dict": (Mapping, "a mapping of names to values"),
}
ANCESTORS_LOSS = {"alpha": 1, "beta": 50, "base": 0}
ANCESTORS_MINER = {"epsilon": 0.1}
# Where 0 or an empty text is meaningless, it means None.
OFF = (
    "weights",
    "augment",
    "crop",
    "views",
    "data_init",
    "max_heading_deg",
    "top_k",
    "patience",
    "cache_limit_gb",
    "clip_norm",
    "gradient_checkpointing",
)
# Fields that change how a run goes about its work, and nothing of what comes out of it.
EXECUTION = ("workers", "log_every", "checkpoint_every", "tensorboard")


# ---------------------------------------------------------------------------------------------------------------------
# What is configured
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that a training depends on but the data.

    The defaults are the paper's. Where the paper is silent they are those of its direct ancestors, and the entry says so.

    Parameters
    ----------
    backbone, pretrained, weights, stages, adapter, adapter_blocks, adapter_options, aggregator, aggregator_options, interact, interact_options
        Of `sagelib.model.SAGE`.
    dropout : float, optional
        One probability for every dropout of the trained parts; None keeps each part's own (0.3 in the two branches of Soft Probing, 0.1 elsewhere,
        the released model's). On a small frozen backbone 0.3 can hold the loss on its plateau.
    data_init : int, optional
        Not in the paper: centre and scale the outputs of Soft Probing's two branches on so many training images before the first step.
        None is off.
    places_per_batch : int
        Places that each source gives to a batch.
    images_per_place : int
        Images of each place, k.
    batches_per_epoch : int, optional
        Batches in an epoch (the paper is silent; 4,000 in CliqueMining). None, with labelled places alone: one pass over them.
    small_places : {"refuse", "leave_out"}
        What to do with labelled places of fewer than `images_per_place` images.
    epochs : int
        The paper is silent; 30 in EMVP.
    similar_places, radius_m, max_heading_deg, min_clique, fallback, tau, top_k, prefer, node_descriptor, schedule, refresh_every, remove, min_distance_m
        Of `sagelib.sampler.CliqueSampler`, for the mined source.
    graph_context : {"none", "solo", "anchors"}
        The cross-image head while the graph's descriptors are made: off, each image alone, or with the head's anchors. The paper is
        silent.
    graph_descriptors : {"fresh", "training"}
        ``"fresh"``: described with the current model at each refresh (the paper). ``"training"``: the descriptors that the last visits of training
        left behind, so that a refresh costs nothing after the first; they are as old as an epoch and made with dropout and augmentation.
    image_size : int
        Side in pixels of training images (the paper is silent; 224 in its ancestors).
    validation_size : int
        Side in pixels of validation images.
    augment : int, optional
        Operations of RandAugment (the paper is silent; 3 in EMVP). None is off, which allows `cache_limit_gb`.
    crop : float, optional
        Smallest share of a training picture that a random window of it covers (not in the paper nor in its ancestors; for queries that see
        part of a reference). None is off, which allows `cache_limit_gb`.
    views : int, optional
        Ours: draw this many versions of each training picture once, itself and augmented ones, and let each use take one of them at random.
        This allows `cache_limit_gb` beside augmentation. None augments anew at every use.
    preprocess : str
        Mode of `sagelib.images.Preprocess`; of it, training pictures that are augmented take only the autocontrast.
    loss, loss_options : str, dict, optional
        A loss of pytorch-metric-learning by name. None options are 1, 50, 0 for the multi-similarity loss (CliqueMining's) and the library's own
        for any other.
    miner, miner_options : str, dict, optional
        A miner of the same library; None is off. None options are epsilon 0.1 for the multi-similarity miner.
    lr, weight_decay : float
        Of AdamW. The paper is silent; EMVP's.
    head_lr : float, optional
        Learning rate of the cross-image head; None is `lr`.
    lr_schedule : {"linear", "cosine", "constant"}
        From 1 to `final_lr` times the rate over all steps. The paper is silent; linear to 0.2 in EMVP.
    final_lr : float
        Fraction of the rate at the last step.
    warmup_steps : int
        Steps over which the rate rises linearly from 0; on top of the schedule.
    clip_norm : float, optional
        Largest norm of the gradient; None is off.
    accumulate : int
        Batches whose mean gradient makes a step.
    precision : {None, "bfloat16", "float16"}
        Autocast; float16 with a scaled gradient. None is float32.
    gradient_checkpointing : int, optional
        Describe so many images at a time and compute them again in the backward pass, which bounds the memory. None is off.
    compile : bool
        `torch.compile` for the trained part.
    train_context : {"batch", "half", "solo", "anchors"}
        Among which images the head attends in training: the whole batch, each source's part of it, each image alone (the head's query and key weights
        then get no gradient), or the head's anchors. The paper is silent.
    anchors : int
        Under ``"anchors"``, without learned ones: so many training images, described at the start of every epoch.
    validate_every : int
        Epochs between two validations.
    patience : int, optional
        Stop after so many validations without a better one; None is off. (The paper is silent; 10 among the arguments of its code.)
    seed : int
        Of everything random.
    describe_batch : int
        Images at a time where nothing is learned.
    cache_limit_gb : float, optional
        Keep the frozen prefix's tokens on disk, up to so many gigabytes for each set of images: those of validation and the graph, and of training too if
        nothing is augmented or `views` is set. None is off.
    workers : int
        Processes that load images.
    log_every : int
        Steps in a line of the log.
    checkpoint_every : int
        Steps between two checkpoints; there is one at each epoch's end, too.
    tensorboard : bool
        Write scalars for TensorBoard.

    Raises
    ------
    ValueError
        For a value out of range, with name, value and range.
    """

    backbone: str = "vit_large_patch14_dinov2"
    pretrained: bool = True
    weights: str | None = None
    stages: list | None = None
    adapter: str = "dpn"
    adapter_blocks: int = 4
    adapter_options: dict = field(default_factory=dict)
    aggregator: str = "softp"
    aggregator_options: dict = field(default_factory=dict)
    interact: bool = True
    interact_options: dict = field(default_factory=dict)
    dropout: float | None = None
    data_init: int | None = None

    places_per_batch: int = 30
    images_per_place: int = 4
    batches_per_epoch: int | None = 4000
    small_places: str = "refuse"
    epochs: int = 30

    similar_places: int = 15
    radius_m: float = 25.0
    max_heading_deg: float | None = None
    min_clique: int = 10
    fallback: str | None = "draw"
    tau: float | None = None
    top_k: int | None = None
    prefer: str = "closest"
    node_descriptor: str = "image"
    schedule: str = "online"
    refresh_every: int = 1
    remove: str = "chosen"
    min_distance_m: float = 0.0
    graph_context: str = "none"
    graph_descriptors: str = "fresh"

    image_size: int = 224
    validation_size: int = 322
    augment: int | None = 3
    crop: float | None = None
    views: int | None = None
    preprocess: str = "paper"

    loss: str = "MultiSimilarityLoss"
    loss_options: dict | None = None
    miner: str | None = "MultiSimilarityMiner"
    miner_options: dict | None = None

    lr: float = 9e-4
    head_lr: float | None = None
    weight_decay: float = 9.5e-9
    lr_schedule: str = "linear"
    final_lr: float = 0.2
    warmup_steps: int = 0
    clip_norm: float | None = None
    accumulate: int = 1
    precision: str | None = None
    gradient_checkpointing: int | None = None
    compile: bool = False

    train_context: str = "batch"
    anchors: int = 64

    validate_every: int = 1
    patience: int | None = 10
    seed: int = 0
    describe_batch: int = 64
    cache_limit_gb: float | None = None
    workers: int = 0
    log_every: int = 20
    checkpoint_every: int = 200
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name, kind in ((f.name, f.type) for f in dataclasses.fields(self)):
            wanted, value = kind.removesuffix(" | None"), getattr(self, name)
            if wanted not in _KINDS or (value is None and wanted != kind):
                continue
            types, words = _KINDS[wanted]
            if not isinstance(value, types) or (isinstance(value, bool) and wanted != "bool"):
                raise ValueError(f"{name} must be {words}, got {value!r}")
        at_least = {
            "places_per_batch": 2,
            "images_per_place": 2,
            "batches_per_epoch": 1,
            "epochs": 1,
            "refresh_every": 1,
            "image_size": 1,
            "validation_size": 1,
            "augment": 1,
            "views": 2,
            "data_init": 1,
            "warmup_steps": 0,
            "accumulate": 1,
            "gradient_checkpointing": 1,
            "anchors": 1,
            "validate_every": 1,
            "patience": 1,
            "seed": 0,
            "describe_batch": 1,
            "workers": 0,
            "log_every": 1,
            "checkpoint_every": 1,
        }
        for name, low in at_least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
        for name in ("lr", "head_lr", "clip_norm", "cache_limit_gb", "radius_m", "crop"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a number > 0, got {value!r}")
        for name, low, high in (
            ("weight_decay", 0, math.inf),
            ("final_lr", 0, 1),
            ("dropout", 0, 0.99),
            ("crop", 0, 1),
            ("min_distance_m", 0, math.inf),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} must lie in [{low}, {high}], got {value!r}")
        for name, choices in (
            ("preprocess", MODES),
            ("lr_schedule", ("linear", "cosine", "constant")),
            ("precision", tuple(PRECISIONS)),
            ("train_context", CONTEXTS),
            ("small_places", ("refuse", "leave_out")),
            ("graph_context", ("none", "solo", "anchors")),
            ("graph_descriptors", ("fresh", "training")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(str, choices))}, got {getattr(self, name)!r}"
                )
        if self.views is not None and (self.cache_limit_gb is None or not self.augmented):
            raise ValueError(
                f"views = {self.views} keeps the tokens of augmented pictures: set cache_limit_gb, and augment or crop"
            )
        if self.graph_context == "anchors" and self.train_context != "anchors":
            raise ValueError(
                f"graph_context 'anchors' needs train_context 'anchors', got {self.train_context!r}: without it the head has no anchors"
            )

    @property
    def augmented(self) -> bool:
        """Whether a training picture differs from epoch to epoch."""
        return self.augment is not None or self.crop is not None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The configuration that a mapping says, such as a parameter file.

        Numbers that YAML reads as text (``9e-4`` has no dot) become numbers. Where None is off and 0 has no meaning (`OFF`), 0 is off
        too: a notebook's parameter can say 0, not None.

        Raises
        ------
        ValueError
            For a key that is no field; the nearest one is named.
        """
        kinds = {f.name: f.type for f in dataclasses.fields(cls)}
        unknown = [key for key in values if key not in kinds]
        if unknown:
            near = difflib.get_close_matches(unknown[0], kinds, 1)
            raise ValueError(
                f"a training has no parameter named {unknown[0]!r}"
                + (f": did you mean {near[0]!r}?" if near else "")
            )
        values = {key: None if key in OFF and value in (0, "") else value for key, value in values.items()}
        for key, value in values.items():
            if isinstance(value, str) and kinds[key].startswith("float"):
                try:
                    values[key] = float(value)
                except ValueError:
                    raise ValueError(f"{key} must be a number, got {value!r}") from None
        return cls(**values)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names of all parameters."""
        return tuple(f.name for f in dataclasses.fields(cls))

    def to_dict(self) -> dict[str, Any]:
        """All parameters, ready for JSON or YAML."""
        return dataclasses.asdict(self)

    def identity(self) -> dict[str, Any]:
        """The parameters on which the result depends: all but those that say how the work is done."""
        return {key: value for key, value in self.to_dict().items() if key not in EXECUTION}


@dataclass(frozen=True)
class Result:
    """A finished training.

    Attributes
    ----------
    run : Run
    model : SAGE
        With the weights of the best validation (of the last step, where nothing was validated), in evaluation mode.
    metrics : dict
        What the manifest says.
    """

    run: Run
    model: SAGE
    metrics: dict

    def lines(self, kind: str) -> list[dict]:
        """The log's lines of one kind: ``"step"`` windows or ``"epoch"`` ends (epoch 0 is before the first step)."""
        return [line for line in self.run.read_log() if line.get("kind") == kind]


# ---------------------------------------------------------------------------------------------------------------------
# Loss, plateau, learning rate
# ---------------------------------------------------------------------------------------------------------------------


def build_loss(name: str, options: Mapping | None = None) -> nn.Module:
    """A loss of pytorch-metric-learning by name.

    Parameters
    ----------
    name : str
        ``"MultiSimilarityLoss"`` or any other that needs only descriptors and labels.
    options : mapping, optional
        None: alpha 1, beta 50, base 0 on cosine for the multi-similarity loss (Wang et al. 2019 with CliqueMining's numbers), the library's
        defaults for any other.

    Raises
    ------
    ValueError
        If there is no such loss, its options are wrong, or it has weights of its own for each class: a place has no number that outlives its
        batch.
    """
    from pytorch_metric_learning import losses

    if options is None:
        options = ANCESTORS_LOSS if name == "MultiSimilarityLoss" else {}
    loss = _by_name(losses, "loss", name, options)
    if any(True for _ in loss.parameters()):
        raise ValueError(
            f"{name} learns a weight for each class, but places are numbered anew in each batch: take a loss of pairs or triplets"
        )
    return loss


def build_miner(name: str | None, options: Mapping | None = None) -> nn.Module | None:
    """A miner of pytorch-metric-learning by name; None for none.

    Parameters
    ----------
    name : str or None
    options : mapping, optional
        None: epsilon 0.1 for the multi-similarity miner, the library's defaults for any other.

    Raises
    ------
    ValueError
        If there is no such miner or its options are wrong.
    """
    from pytorch_metric_learning import miners

    if name is None:
        return None
    if options is None:
        options = ANCESTORS_MINER if name == "MultiSimilarityMiner" else {}
    return _by_name(miners, "miner", name, options)


def _by_name(library: Any, what: str, name: str, options: Mapping) -> nn.Module:
    kind = getattr(library, name, None)
    if not isinstance(kind, type):
        near = difflib.get_close_matches(name, [n for n in dir(library) if n[0].isupper()], 3)
        raise ValueError(
            f"pytorch-metric-learning has no {what} named {name!r}"
            + (f"; near: {', '.join(near)}" if near else "")
        )
    try:
        return kind(**options)
    except TypeError as error:
        raise ValueError(
            f"{what} {name} cannot be made of the options {dict(options)}: {error}. It needs only pairs or triplets here"
        ) from None


def plateau_value(
    places: int, images_per_place: int, *, alpha: float = 1.0, beta: float = 50.0, base: float = 0.0
) -> float:
    """Where the multi-similarity loss rests when it has learned nothing: its value when all similarities are zero.

    With P places of K images each anchor has K - 1 positives and P K - K negatives, all of similarity 0, and the miner
    keeps every one, so the loss is ``log(1 + (K - 1) exp(alpha base)) / alpha + log(1 + (P K - K) exp(-beta base)) / beta``; with the
    ancestors' numbers ``log K + log(P K - K + 1) / 50``.

    Parameters
    ----------
    places, images_per_place : int
        P and K.
    alpha, beta, base : float
        Of the loss.

    Examples
    --------
    >>> round(plateau_value(24, 4), 3)
    1.477
    """
    positives, negatives = images_per_place - 1, (places - 1) * images_per_place
    return (
        math.log1p(positives * math.exp(alpha * base)) / alpha
        + math.log1p(negatives * math.exp(-beta * base)) / beta
    )


def rate_factor(config: TrainConfig, step: int, steps: int) -> float:
    """By what the learning rate is multiplied at a step.

    Parameters
    ----------
    config : TrainConfig
        Its `lr_schedule`, `final_lr` and `warmup_steps`.
    step : int
        From 0.
    steps : int
        Of the whole training.

    Returns
    -------
    float
        1 at step 0 without warm-up, `final_lr` at the last step.
    """
    done = step / max(1, steps - 1)
    if config.lr_schedule == "linear":
        factor = 1 - (1 - config.final_lr) * done
    elif config.lr_schedule == "cosine":
        factor = config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * done)) / 2
    else:
        factor = 1.0
    return factor * min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else factor


# ---------------------------------------------------------------------------------------------------------------------
# The model and the run of a configuration
# ---------------------------------------------------------------------------------------------------------------------


def build_model_of(config: TrainConfig) -> SAGE:
    """The untrained model that a configuration describes; the same weights each time.

    Torch's global generator is left as it was.
    """
    interact_options = dict(config.interact_options)
    if config.interact and config.train_context == "anchors":
        if not interact_options.get("learned_anchors"):
            interact_options.setdefault("stored_anchors", config.anchors)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(runs.torch_seed(config.seed, "weights"))
        try:
            model = SAGE(
                config.backbone,
                pretrained=config.pretrained,
                weights=config.weights,
                stages=config.stages,
                adapter=config.adapter,
                adapter_blocks=config.adapter_blocks,
                adapter_options=config.adapter_options,
                aggregator=config.aggregator,
                aggregator_options=config.aggregator_options,
                interact=config.interact,
                interact_options=interact_options if config.interact else None,
            )
        except TypeError as error:
            raise ValueError(f"no model can be built of these options: {error}") from error
    if config.dropout is not None:
        _set_dropout(model, config.dropout)
    return model


def _set_dropout(model: SAGE, probability: float) -> None:
    """One probability for every dropout in the trained parts (the frozen transformer's own are 0 and stay so)."""
    for name, module in model.named_modules():
        if name.startswith(("backbone.vit", "backbone.cnn")):
            continue
        if isinstance(module, nn.Dropout):
            module.p = probability
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = probability


def open_run(
    root: str | Path,
    name: str,
    config: TrainConfig,
    *,
    mined: Places | None = None,
    labelled: Places | None = None,
    validation: TestSet | None = None,
    device: str = "auto",
) -> Run:
    """The run ``root/train/name`` of this configuration on these data: new, to be resumed, or finished.

    Raises
    ------
    RunConflict
        If the directory holds a run of another configuration or of other data.
    """
    prints = {
        "mined": None if mined is None else mined.fingerprint(),
        "labelled": None if labelled is None else labelled.fingerprint(),
        "validation": None if validation is None else validation.fingerprint(),
    }
    processes = _Processes(device)
    with processes.main_first():  # it makes the directory, the others read it
        run = Run.open(
            root,
            "train",
            name,
            config.identity(),
            seed=config.seed,
            data_fingerprint=runs.fingerprint(prints),
            device=processes.device,
        )
        if processes.main and not run.finished:
            # Sums of another order have other last digits: bits repeat on so many threads and processes only.
            run.manifest |= {"threads": torch.get_num_threads(), "processes": processes.world}
            runs.write_json(run.dir / runs.MANIFEST, run.manifest)
    return run


def load_trained(run: Run, which: str = "best") -> SAGE:
    """The model of a training run, in evaluation mode on the CPU.

    Parameters
    ----------
    run : Run
        Of stage ``"train"``.
    which : {"best", "last"}
        The best validation's weights, or the last step's.

    Raises
    ------
    FileNotFoundError
        If the run has not come so far.
    """
    folder = run.dir / which
    if not (folder / "trainable.safetensors").exists():
        raise FileNotFoundError(
            f"{run.dir} holds no {which} weights yet: its training is {run.manifest['status']}"
        )
    config = TrainConfig.from_mapping({k: v for k, v in run.config.items() if k in TrainConfig.field_names()})
    model = build_model_of(config)
    model.load_trainable_state_dict(read_weights(folder / "trainable.safetensors"))
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def train(
    config: TrainConfig,
    run: Run,
    *,
    mined: Places | None = None,
    labelled: Places | None = None,
    validation: TestSet | None = None,
    model: SAGE | None = None,
    tokens: str | Path | None = None,
    device: str = "auto",
    progress: bool = True,
) -> Result:
    """Train a model; go on where an earlier call with the same run was stopped; give the result of a finished one.

    Parameters
    ----------
    config : TrainConfig
    run : Run
        See `open_run`.
    mined : Places, optional
        Images with positions, whose places are found by `CliqueSampler`.
    labelled : Places, optional
        Images whose ``place`` says which belong together, drawn by `PlaceSampler`. With both, every batch has a half of each and their losses
        are added (CliqueMining).
    validation : TestSet, optional
        Recall is measured on it before the first step and at every epoch's end, on descriptors that do not depend on a batch: without a
        head as they are, with a head alone or over its anchors.
    model : SAGE, optional
        Trained in place instead of the one that the configuration describes.
    tokens : path, optional
        Folder of the frozen prefix's tokens, shared by runs (with `cache_limit_gb`); ``tokens`` beside the stages by default.
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"mps"``.
    progress : bool
        Show bars and sentences.

    Returns
    -------
    Result

    Raises
    ------
    ValueError
        If there are no data, a place has fewer than `images_per_place` images, a batch is larger than the set, or a cache would exceed its
        limit.
    FloatingPointError
        If the loss is not finite.
    MemoryError
        If memory runs out, with what to change.
    """
    if run.finished:
        return Result(run, load_trained(run), run.metrics)
    if mined is None and labelled is None:
        raise ValueError(
            "there is nothing to train on: give places with labels (labelled), with positions (mined), or both"
        )
    if config.train_context == "half" and (mined is None or labelled is None):
        raise ValueError("train_context 'half' needs both sources, labelled and mined: take 'batch' with one")
    # The caller's generators are left alone.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=list(devices)), runs.memory_errors(_memory_advice(config)):
        loop = _Loop(config, run, mined, labelled, validation, model, tokens, device, progress)
        return loop.fit()


def _memory_advice(config: TrainConfig) -> str:
    now = "off" if config.gradient_checkpointing is None else config.gradient_checkpointing
    return (
        f"not enough memory for batches of {config.places_per_batch} places x {config.images_per_place} images a source at "
        f"{config.image_size} pixels: set gradient_checkpointing to a few images (now {now}), which changes no result, or lower "
        f"places_per_batch or image_size; where it happened while describing, lower describe_batch (now {config.describe_batch})"
    )


class _Loop:
    """The state of one training. Its methods stand in the order in which they run."""

    def __init__(self, config, run, mined, labelled, validation, model, tokens, device, progress) -> None:
        self.config, self.run = config, run
        self.processes = _Processes(device)
        self.device = self.processes.device
        self.progress = progress and self.processes.main
        self.dtype = PRECISIONS[config.precision]
        self.loss = build_loss(config.loss, config.loss_options)
        self.miner = build_miner(config.miner, config.miner_options)
        self.model = (model if model is not None else build_model_of(config)).to(self.device)
        self.has_head = self.model.has_head
        if config.train_context == "anchors" and self.has_head and self.model.anchors is None:
            raise ValueError(
                "train_context 'anchors' needs a head with anchors: build it with stored_anchors or learned_anchors"
            )
        self.processes.same_start(self.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.embed_tokens = (
            torch.compile(self.model.embed_tokens) if config.compile else self.model.embed_tokens
        )

        folder = Path(tokens) if tokens is not None else run.dir.parent.parent / "tokens"
        self.sources: list[_Source] = []
        if labelled is not None:
            self._add_source("labelled", labelled, _place_sampler, folder)
        if mined is not None:
            self._add_source("mined", mined, _clique_sampler, folder)
        self.batches = min(source.batches for source in self.sources)
        images = len(self.sources) * config.places_per_batch * config.images_per_place
        if images % self.processes.world:
            raise ValueError(
                f"a batch of {images} images cannot be shared equally by {self.processes.world} processes: change places_per_batch"
            )
        self.steps = config.epochs * math.ceil(self.batches / config.accumulate)
        self.validation = validation
        self.feeds = ()
        if validation is not None:
            self.feeds = tuple(
                self._feed(part, config.validation_size, folder)
                for part in (validation.database, validation.queries)
            )
            self.positives = validation.positives()

        self.optimiser = torch.optim.AdamW(
            _parameter_groups(self.model, config), weight_decay=config.weight_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.writer = None
        self.state = _State(window=max(10, min(200, self.steps // 10)))

    def _feed(
        self, places: Places, size: int, folder: Path, transform: TrainTransform | None = None
    ) -> _Feed:
        """Images of `places`, from stored tokens where that is wanted: as they are, and as fixed views."""
        preprocess, store, views = Preprocess(size, self.config.preprocess), None, 1
        if transform is not None and self.config.views is not None:
            views = self.config.views
        if self.config.cache_limit_gb is not None:
            with self.processes.main_first():  # it computes them, the others find them
                store = open_tokens(
                    folder,
                    self.model,
                    places,
                    preprocess=preprocess if views == 1 else Views(preprocess, transform, views),
                    limit_gb=self.config.cache_limit_gb,
                    batch_size=self.config.describe_batch,
                    workers=self.config.workers,
                    autocast=self.dtype,
                    progress=self.progress,
                )
        return _Feed(self, places, preprocess, store, views)

    def _add_source(self, name: str, places: Places, make_sampler: Callable, folder: Path) -> None:
        sampler = said = None
        if self.processes.main:  # the graph is built once: the others are told its batches
            try:
                sampler = make_sampler(self.config, places)
                said = len(sampler)
            except ValueError as error:
                said = error
        said = self.processes.broadcast(said)
        if isinstance(said, ValueError):
            raise said
        transform = None
        if self.config.augmented:
            transform = TrainTransform(
                self.config.image_size,
                randaugment=self.config.augment,
                crop=self.config.crop,
                autocontrast=self.config.preprocess == "autocontrast",
                seed=runs.torch_seed(self.config.seed, "augment", name) % 2**31,
            )
        feed = self._feed(places, self.config.image_size, folder, transform)
        transform = transform or feed.preprocess
        source = _Source(name, places, sampler, said, feed, transform)
        if name == "mined" and self.config.graph_descriptors == "training":
            source.left_behind = np.zeros((len(places), self.model.width), np.float16)
            source.seen = np.zeros(len(places), bool)
        self.sources.append(source)

    # -- the whole -------------------------------------------------------------------------------------------------

    def fit(self) -> Result:
        """All epochs, and what is said at the end."""
        config, state = self.config, self.state
        if not self._restore():
            if config.data_init is not None:
                self._initialise_from_data()
            self._refresh_anchors()
            if self.validation is not None:
                self._validate(0)
            self._save_checkpoint()
        if config.tensorboard and self.processes.main:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.run.path("tensorboard")), purge_step=state.step + 1)
        with tqdm(
            total=self.steps, initial=state.step, unit="step", desc="training", disable=not self.progress
        ) as self.bar:
            while state.epoch < config.epochs and not self._out_of_patience():
                if state.plan is None:
                    self._begin_epoch(state.epoch + 1)
                self._train_epoch(state.epoch + 1)
                self._end_epoch(state.epoch + 1)
        if self.writer is not None:
            self.writer.close()
        return self._finish()

    def _out_of_patience(self) -> bool:
        return self.config.patience is not None and self.state.bad_validations >= self.config.patience

    # -- the beginning of an epoch -----------------------------------------------------------------------------------

    def _initialise_from_data(self) -> None:
        """Centre and scale the aggregator's branches on some training images, the same in every process."""
        chosen = self._some_images("data_init", self.config.data_init)
        self.model.initialise_from(self.sources[-1].feed.batches(chosen, self.config.describe_batch))
        self.processes.same_start(self.model)

    def _refresh_anchors(self) -> None:
        """Describe the head's stored anchors, the same training images in every epoch, with the current model."""
        if self.config.train_context != "anchors" or not self.has_head or self.model.head.learned is not None:
            return
        chosen = self._some_images("anchors", len(self.model.anchors))
        values = self._describe(self.sources[-1].feed, chosen, "none")
        self.model.set_anchors(torch.from_numpy(values).to(self.device))

    def _some_images(self, what: str, n: int) -> np.ndarray:
        total = len(self.sources[-1].places)
        if n > total:
            raise ValueError(f"{what} asks for {n} training images, and there are {total}: lower it")
        return np.sort(runs.rng(self.config.seed, what).permutation(total)[:n])

    def _begin_epoch(self, epoch: int) -> None:
        """Refresh the graph and write down all of the epoch's batches: once, by the main process, for all."""
        began, state = time.perf_counter(), self.state
        if epoch > 1:
            self._refresh_anchors()
        plan, records = {}, {}
        for source in self.sources:
            if self.processes.main:
                records[source.name] = self._refresh_graph(source, epoch)
                plan[source.name] = np.array(
                    [batch for batch, _ in zip(source.sampler, range(self.batches), strict=False)], np.int32
                )
                self.processes.broadcast(None)
            else:  # describe what the main process asks for, until it asks no more
                while (indices := self.processes.broadcast(None)) is not None:
                    self._describe_for_graph(source, indices)
            plan[source.name] = self.processes.broadcast(plan.get(source.name))
        state.plan, state.position = plan, 0
        state.epoch_sums = {}
        state.epoch_seconds = {"refresh": time.perf_counter() - began, "train": 0.0}
        if self.processes.main:
            state.graph = {
                source.name: self._graph_report(source, records[source.name]) for source in self.sources
            }

    def _refresh_graph(self, source: _Source, epoch: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Give the sampler its new graph; returns which images it asked for and what their descriptors are."""
        number, record = epoch - 1, []
        # Two are kept, as of the checkpoints: the older one may have to serve again.
        newest, before = (self.run.dir / "graph" / f"{source.name}{age}.npz" for age in ("", "-before"))
        for replay in (newest, before) if not source.refreshed else ():
            if not replay.exists():
                continue
            # A resumed run has a new sampler: give it the graph that an earlier epoch made, which may still serve.
            with np.load(replay) as stored:
                if int(stored["epoch"]) > number:
                    continue
                made = [(stored[f"0_{i}"], stored[f"1_{i}"]) for i in range(int(stored["calls"]))]
                source.sampler.refresh(int(stored["epoch"]), partial(_replayed, made))
                record = made if int(stored["epoch"]) == number else []
            break
        if source.sampler.needs_refresh(number):

            def describe(indices: np.ndarray) -> np.ndarray:
                indices = np.asarray(indices, np.int64)
                self.processes.broadcast(indices)
                values = self._describe_for_graph(source, indices)
                record.append((indices, values))
                return values

            source.sampler.refresh(number, describe)
            if number + 1 < self.config.epochs and not source.sampler.needs_refresh(number + 1):
                # Later epochs draw from this graph too.
                arrays = {f"{part}_{i}": pair[part] for i, pair in enumerate(record) for part in (0, 1)}
                if newest.exists():
                    newest.replace(before)
                with runs.atomic_path(newest) as path:
                    with open(path, "wb") as stream:
                        np.savez(stream, epoch=number, calls=len(record), **arrays)
        source.refreshed = True
        source.sampler.set_epoch(number)
        return record

    def _describe_for_graph(self, source: _Source, indices: np.ndarray) -> np.ndarray:
        """Descriptors (n, D) of some images of a source: fresh, or what training left behind."""
        context = self.config.graph_context
        if source.left_behind is None:
            return self._describe(source.feed, indices, context)
        missing = indices[~source.seen[indices]]
        if len(missing):
            source.left_behind[missing] = self._describe(source.feed, missing, "none")
            source.seen[missing] = True
        values = torch.from_numpy(source.left_behind[indices]).to(self.device, torch.float32)
        with torch.no_grad():
            self.model.eval()
            return np.concatenate(
                [
                    in_context(self.model, part, context).cpu().numpy()
                    for part in values.split(self.config.describe_batch)
                ]
            )

    def _graph_report(self, source: _Source, record: list) -> dict:
        """What the sampler tells, and which edges have come and gone since the last refresh.

        Edges are compared on a fixed part of the images, whole clusters of about 2,000, where both refreshes described both ends.
        """
        report = dict(source.sampler.report)
        if not record or self.config.node_descriptor != "image":
            return report
        clusters = source.sampler.graph.cluster
        order = runs.rng(self.config.seed, "graph report").permutation(int(clusters.max()) + 1)
        chosen = order[: np.searchsorted(np.cumsum(np.bincount(clusters)[order]), 2000) + 1]
        part = np.isin(clusters, chosen)
        rows = [(indices[part[indices]], values[part[indices]]) for indices, values in record]
        images, first = np.unique(np.concatenate([r for r, _ in rows]), return_index=True)
        values = np.concatenate([v for _, v in rows])[first]
        pairs = _edges(self.config, source.places, images, values)
        report |= {"compared_images": len(images), "edges": len(pairs)}
        before = self.state.edges.get(source.name)
        self.state.edges[source.name] = (images, pairs)
        if before is not None:
            both = np.intersect1d(images, before[0])
            now, then = (
                p[np.isin(p, both).all(axis=1)] @ np.array([len(source.places), 1])
                for p in (pairs, before[1])
            )
            report["edges_gained"] = len(np.setdiff1d(now, then))
            report["edges_lost"] = len(np.setdiff1d(then, now))
            report["edges_kept"] = len(np.intersect1d(now, then))
        return report

    # -- the steps of an epoch ---------------------------------------------------------------------------------------

    def _train_epoch(self, epoch: int) -> None:
        config, state = self.config, self.state
        self.model.train()
        batches = self._training_batches(epoch, state.position)
        images = sum(plan.shape[1] for plan in state.plan.values())
        while state.position < self.batches:
            began = time.perf_counter()
            count = min(config.accumulate, self.batches - state.position)
            factor = rate_factor(config, state.step, self.steps)
            for group in self.optimiser.param_groups:
                group["lr"] = group["base_lr"] * factor
            facts = {}
            for part in range(count):
                tokens, grid = next(batches)
                _add(facts, self._forward_backward(tokens, grid, part, count), 1 / count)
                state.position += 1
            facts["gradient_norm"] = self._update()
            facts["seconds"] = time.perf_counter() - began
            facts["images"] = images * count
            facts["steps"] = 1.0
            state.step += 1
            self._note(facts, epoch, config.lr * factor)
            if state.step % config.checkpoint_every == 0 and state.position < self.batches:
                self._save_checkpoint()

    def _training_batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """Tokens of this process's share of every batch from `start` on: from disk, or from freshly varied images."""
        parts = []
        for source, rows in zip(self.sources, self._shares(), strict=True):
            plan = self.state.plan[source.name]
            views = source.feed.views
            drawn = runs.rng(self.config.seed, "views", source.name, epoch).integers(0, views, plan.shape)
            plan, drawn = plan[start:, rows], drawn[start:, rows]
            if not plan.shape[1]:
                continue
            if source.feed.store is not None and (views > 1 or not self.config.augmented):
                parts.append(source.feed.stored(plan * views + drawn))
            else:
                if self.config.augmented:
                    source.transform.set_epoch(epoch)
                parts.append(source.feed.loaded(plan, source.transform))
        for group in zip(*parts, strict=True):
            yield torch.cat([tokens for tokens, _ in group]), group[0][1]

    def _shares(self) -> list[slice]:
        """Which columns of each source's batches this process describes: neighbours in the whole batch stay together."""
        each = self.config.places_per_batch * self.config.images_per_place
        share = each * len(self.sources) // self.processes.world
        first = self.processes.rank * share
        return [
            slice(min(max(first - i * each, 0), each), min(max(first + share - i * each, 0), each))
            for i in range(len(self.sources))
        ]

    def _forward_backward(
        self, tokens: Tensor, grid: tuple[int, int], part: int, parts: int
    ) -> dict[str, float]:
        """One batch: describe the share, gather the descriptors of all, head, losses, gradient."""
        seed, step = self.config.seed, self.state.step
        torch.manual_seed(runs.torch_seed(seed, "dropout", step, part, self.processes.rank))
        with self._autocast():
            descriptors = self._embed(tokens, grid)
        descriptors = self.processes.gather(descriptors.float())
        self._leave_behind(descriptors)
        # The head sees the whole batch in every process, and drops the same units in all of them.
        torch.manual_seed(runs.torch_seed(seed, "head dropout", step, part))
        with self._autocast():
            descriptors = self._in_context(descriptors)
        total, facts = self._losses(descriptors.float())
        if not torch.isfinite(total):
            rates = ", ".join(f"{group['lr']:.3g}" for group in self.optimiser.param_groups)
            raise FloatingPointError(
                f"the loss is {total.item()} at step {step + 1}, with a learning rate of {rates}: lower lr, set warmup_steps or clip_norm"
                + (", or take bfloat16 or no precision" if self.config.precision == "float16" else "")
                + f"; the last checkpoint in {self.run.dir / 'checkpoints'} is from before it"
            )
        self.scaler.scale(total / parts).backward()
        return facts

    def _embed(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        some = self.config.gradient_checkpointing
        if some is None:
            return self.embed_tokens(tokens, grid)
        # Only one chunk's activations live at a time; dropout repeats itself, its generator being kept.
        return torch.cat(
            [checkpoint(self.embed_tokens, chunk, grid, use_reentrant=False) for chunk in tokens.split(some)]
        )

    def _in_context(self, descriptors: Tensor) -> Tensor:
        """The head on the whole batch, as `train_context` says."""
        if not self.has_head:
            return descriptors
        context = self.config.train_context
        if context == "batch":
            return self.model.interact(descriptors)
        if context == "half":
            return torch.cat([self.model.interact(half) for half in descriptors.chunk(2)])
        return in_context(self.model, descriptors, context)

    def _losses(self, descriptors: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The losses of the sources, added, and what there is to tell of them."""
        places, images = self.config.places_per_batch, self.config.images_per_place
        labels = torch.arange(places, device=descriptors.device).repeat_interleave(images)
        same = labels[:, None] == labels
        total, facts, n = descriptors.new_zeros(()), {}, len(self.sources)
        for source, part in zip(self.sources, descriptors.split(places * images), strict=True):
            mined = None if self.miner is None else self.miner(part, labels)
            value = self.loss(part, labels, mined)
            total = total + value
            with torch.no_grad():
                unit = nn.functional.normalize(part, dim=-1)
                similarity = unit @ unit.T
                positive = (similarity[same].sum() - len(part)) / (same.sum() - len(part))
                negative = similarity[~same].mean()
            _add(
                facts,
                {
                    f"loss_{source.name}": float(value.detach()),
                    "live": _live_share(mined, places, images) / n,
                    "positive": float(positive) / n,
                    "negative": float(negative) / n,
                },
            )
        facts["loss"] = float(total.detach())
        return total, facts

    def _leave_behind(self, descriptors: Tensor) -> None:
        """Keep the descriptors just made for the next graph (`graph_descriptors` "training")."""
        each = self.config.places_per_batch * self.config.images_per_place
        for source, part in zip(self.sources, descriptors.detach().split(each), strict=True):
            if source.left_behind is not None:
                rows = self.state.plan[source.name][self.state.position]
                source.left_behind[rows] = part.cpu().numpy()
                source.seen[rows] = True

    def _update(self) -> float:
        """A step of the optimiser with the mean gradient of all processes; returns the gradient's norm."""
        self.processes.average_gradients(self.trained)
        self.scaler.unscale_(self.optimiser)
        limit = math.inf if self.config.clip_norm is None else self.config.clip_norm
        norm = float(nn.utils.clip_grad_norm_(self.trained, limit))
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        return norm

    def _note(self, facts: dict[str, float], epoch: int, rate: float) -> None:
        """Add a step to the sums, write the window's line when it is full, move the bar."""
        state = self.state
        state.tail = [*state.tail, [facts["loss"], facts["positive"] - facts["negative"]]][-state.window :]
        state.epoch_seconds["train"] += facts["seconds"]
        for sums in (state.window_sums, state.epoch_sums):
            _add(sums, facts)
        if not self.processes.main:
            return
        self.bar.set_postfix(
            loss=f"{facts['loss']:.3f}",
            rate=f"{rate:.1e}",
            live=f"{100 * facts['live']:.0f}%",
            images=f"{facts['images'] / facts['seconds']:.0f}/s",
            refresh=False,
        )
        self.bar.update()
        if state.step % self.config.log_every == 0 or state.position == self.batches:
            line = {
                "kind": "step",
                "epoch": epoch,
                "step": state.step,
                "lr": rate,
                **_means(state.window_sums),
            }
            state.window_sums = {}
            self.run.log(line)
            self._scalars(
                "train", line, ("loss", "lr", "live", "positive", "negative", "gradient_norm", "images_per_s")
            )

    def _scalars(self, group: str, line: dict, names: tuple[str, ...]) -> None:
        if self.writer is not None:
            for name in names:
                if line.get(name) is not None:
                    self.writer.add_scalar(f"{group}/{name}", line[name], self.state.step)

    # -- the end of an epoch -----------------------------------------------------------------------------------------

    def _end_epoch(self, epoch: int) -> None:
        """Measure, write the epoch's line, keep a checkpoint."""
        state = self.state
        state.seconds["refresh"] += state.epoch_seconds["refresh"]
        state.seconds["train"] += state.epoch_seconds["train"]
        state.epoch, state.plan, state.position = epoch, None, 0
        self._validate(epoch)
        self._save_checkpoint()

    def _validate(self, epoch: int) -> None:
        """Recall on descriptors that depend on one image each; the best weights are kept."""
        state, began = self.state, time.perf_counter()
        line = {"kind": "epoch", "epoch": epoch, "step": state.step}
        if epoch:
            line |= _means(state.epoch_sums) | {"graph": state.graph}
        wanted = epoch % self.config.validate_every == 0 or epoch == self.config.epochs
        if self.validation is not None and wanted:
            context = self._validation_context()
            values = [self._describe(feed, np.arange(len(feed.places)), context) for feed in self.feeds]
            measured = None
            if self.processes.main:
                found = recall(search(*values, k=20)[0], self.positives, n_references=len(values[0]))
                measured = {"hits": {str(k): n for k, n in found.hits.items()}, "queries": found.n_queries}
                measured["recall"] = {str(k): found.percent(k) for k in found.hits}
            measured = self.processes.broadcast(measured)
            line |= measured | {"context": context}
            score = [measured["hits"][k] for k in ("1", "5", "10")]
            if not state.best or score > state.best["score"]:
                state.best = {"epoch": epoch, "score": score, **measured, "context": context}
                state.bad_validations = 0
                if self.processes.main:
                    self.model.save_trainable(self.run.path("best"))
            else:
                state.bad_validations += 1
            if epoch == 0:
                state.start = measured
        spent = time.perf_counter() - began
        state.seconds["validate"] += spent
        line["seconds"] = {**(state.epoch_seconds if epoch else {}), "validate": spent}
        if self.processes.main:
            self.run.log(line)
            self._scalars("epoch", line, ("loss", "live"))
            self._scalars(
                "recall", {f"at_{k}": v for k, v in line.get("recall", {}).items()}, ("at_1", "at_5", "at_10")
            )
            if self.progress and "recall" in line:
                tqdm.write(
                    f"epoch {epoch}: "
                    + (
                        f"loss {line['loss']:.3f}, live pairs {100 * line['live']:.0f} %, "
                        if epoch
                        else "untrained, "
                    )
                    + " ".join(f"R@{k} {line['recall'][k]:.1f}" for k in ("1", "5", "10"))
                    + f" ({line['context']})"
                )

    def _validation_context(self) -> str:
        if not self.has_head:
            return "none"
        return "anchors" if self.config.train_context == "anchors" else "solo"

    @torch.no_grad()
    def _describe(self, feed: _Feed, indices: np.ndarray, context: str) -> np.ndarray:
        """Descriptors (n, D) float32 of some images, each a function of its image alone; every process does a share."""
        self.model.eval()
        share = np.array_split(np.asarray(indices), self.processes.world)[self.processes.rank]
        parts = [np.empty((0, self.model.width), np.float32)]
        for tokens, grid in feed.batches(share, self.config.describe_batch):
            values = describe_batch(self.model, (tokens, grid), context, autocast=self.dtype)
            parts.append(values.cpu().numpy())
        return np.concatenate(self.processes.everyones(np.concatenate(parts)))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    # -- the end -----------------------------------------------------------------------------------------------------

    def _finish(self) -> Result:
        config, state = self.config, self.state
        metrics = {
            "epochs": state.epoch,
            "steps": state.step,
            "stopped_early": state.epoch < config.epochs,
            "final_loss": float(np.mean([loss for loss, _ in state.tail])),
            "plateau": self._plateau(),
            "seconds": {key: round(value, 2) for key, value in state.seconds.items()},
            "refresh_share": state.seconds["refresh"]
            / max(1e-9, state.seconds["refresh"] + state.seconds["train"]),
            "trained_parameters": sum(p.numel() for p in self.trained),
        }
        if state.best:
            metrics["best"] = {key: value for key, value in state.best.items() if key != "score"}
            metrics["start"] = state.start
        if self.processes.main:
            self.model.save_trainable(self.run.path("last"))
            if not state.best:
                self.model.save_trainable(self.run.path("best"))
            self.run.finish(metrics)
            if self.progress and metrics["plateau"] and metrics["plateau"]["ended_there"]:
                tqdm.write(metrics["plateau"]["sentence"])
        self.processes.wait()
        if not self.processes.main:
            self.run = runs.load_run(self.run.dir)
        self.model.load_trainable_state_dict(read_weights(self.run.dir / "best" / "trainable.safetensors"))
        return Result(self.run, self.model.eval(), self.run.metrics)

    def _plateau(self) -> dict | None:
        """Where the loss would rest if all similarities were zero, and whether the last steps lie there."""
        config = self.config
        if config.loss != "MultiSimilarityLoss":
            return None
        options = config.loss_options if config.loss_options is not None else ANCESTORS_LOSS
        known = {key: options[key] for key in ("alpha", "beta", "base") if key in options}
        value = len(self.sources) * plateau_value(config.places_per_batch, config.images_per_place, **known)
        loss, gap = np.mean(self.state.tail, axis=0).tolist()
        # At rest positives are no more alike than negatives; a loss that only passes by this value has told them apart.
        there = loss > 0.97 * value and gap < 0.1
        sentence = (
            f"The last {len(self.state.tail)} steps have a mean loss of {loss:.3f}, no better than the plateau at {value:.3f} where all "
            f"similarities are zero, and positives only {gap:.3f} more alike than negatives: nothing was learned. Try dropout=0, data_init=256, "
            "lr=1e-3, or more steps."
        )
        return {
            "value": value,
            "loss": loss,
            "gap": gap,
            "ended_there": there,
            "sentence": sentence if there else "",
        }

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        """Write everything that the rest of the training depends on; keep the last two."""
        if self.processes.main:
            self.state.serial += 1
            log = self.run.dir / "log.jsonl"
            facts = {**self.state.facts(), "log_bytes": log.stat().st_size if log.exists() else 0}
            content = {
                "facts": json.dumps(facts),
                "plan": {name: torch.from_numpy(plan) for name, plan in (self.state.plan or {}).items()},
                "edges": {
                    name: tuple(torch.from_numpy(array) for array in arrays)
                    for name, arrays in self.state.edges.items()
                },
                "weights": self.model.trainable_state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "scaler": self.scaler.state_dict(),
                "left_behind": {
                    source.name: (torch.from_numpy(source.left_behind), torch.from_numpy(source.seen))
                    for source in self.sources
                    if source.left_behind is not None
                },
            }
            write_checkpoint(self.run.path("checkpoints"), self.state.serial, content)
        self.processes.wait()

    def _restore(self) -> bool:
        """Go back to the newest whole checkpoint; False where there is none."""
        content = read_checkpoint(self.run.dir / "checkpoints", self.device)
        self.processes.wait()  # nobody writes one before all have looked
        if content is None:
            self._cut_log(0)
            return False
        facts = json.loads(content["facts"])
        self._cut_log(facts.pop("log_bytes"))
        self.state.take(facts)
        self.state.plan = {name: plan.cpu().numpy() for name, plan in content["plan"].items()} or None
        self.state.edges = {
            name: tuple(t.cpu().numpy() for t in arrays) for name, arrays in content["edges"].items()
        }
        self.model.load_trainable_state_dict(content["weights"])
        self.optimiser.load_state_dict(content["optimiser"])
        self.scaler.load_state_dict(content["scaler"])
        for source in self.sources:
            if source.name in content["left_behind"]:
                source.left_behind, source.seen = (
                    t.cpu().numpy() for t in content["left_behind"][source.name]
                )
        if self.progress and self.state.step:
            tqdm.write(f"{self.run.dir}: going on after step {self.state.step} of {self.steps}")
        return True

    def _cut_log(self, size: int) -> None:
        """Remove the lines that were written after the checkpoint: they will be written again."""
        log = self.run.dir / "log.jsonl"
        if self.processes.main and log.exists() and log.stat().st_size > size:
            os.truncate(log, size)


# ---------------------------------------------------------------------------------------------------------------------
# Sources of batches
# ---------------------------------------------------------------------------------------------------------------------


def _sampler_config(config: TrainConfig) -> SamplerConfig:
    return SamplerConfig(**{f.name: getattr(config, f.name) for f in dataclasses.fields(SamplerConfig)})


def _clique_sampler(config: TrainConfig, places: Places) -> CliqueSampler:
    sampling = _sampler_config(config)
    return CliqueSampler(GeoVisualGraph.from_places(places, **sampling.graph_options()), sampling)


def _place_sampler(config: TrainConfig, places: Places) -> PlaceSampler:
    place = places.labels()
    labels, counts = np.unique(place[place >= 0], return_counts=True)
    if not len(labels):
        raise ValueError(
            "the labelled places carry no labels: give them as mined places, whose positions make the places"
        )
    few = labels[counts < config.images_per_place]
    if len(few) and config.small_places == "refuse":
        row = np.flatnonzero(place == few[0])[0]
        raise ValueError(
            f"place {places.place[row]} of city {str(places.city[row])!r} has {(place == few[0]).sum()} images, fewer than images_per_place = "
            f"{config.images_per_place} ({len(few)} of {len(labels)} places are so small): leave them out with small_places = 'leave_out', "
            "or lower images_per_place"
        )
    if len(labels) - len(few) < config.places_per_batch:
        raise ValueError(
            f"a batch of {config.places_per_batch} places is larger than the set of {len(labels) - len(few)} places of "
            f"{config.images_per_place} images: lower places_per_batch"
        )
    return PlaceSampler(place, _sampler_config(config))


def _edges(config: TrainConfig, places: Places, images: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The edges (E, 2) that pruning leaves among some images."""
    graph = GeoVisualGraph.from_places(places[images], values, **_sampler_config(config).graph_options())
    return images[graph.edges()].reshape(-1, 2)


class _Feed:
    """Tokens of the images of one `Places`, without augmentation unless a transform or another view is asked for."""

    def __init__(
        self, loop: _Loop, places: Places, preprocess: Preprocess, store: TokenStore | None, views: int
    ) -> None:
        self.loop, self.places, self.preprocess, self.store, self.views = (
            loop, places, preprocess, store, views
        )  # fmt: skip

    def batches(self, indices: np.ndarray, size: int) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """Tokens (n, T, M) and grid of some images in order, `size` at a time."""
        chunks = [indices[i : i + size] for i in range(0, len(indices), size)]
        if self.store is None:
            return self.loaded(chunks, self.preprocess)
        return self.stored(np.asarray(chunk) * self.views for chunk in chunks)

    def stored(self, batches) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """Tokens of some rows of the store: with V views, row ``V i + v`` is view v of image i."""
        for batch in batches:
            yield self.store[batch].to(self.loop.device), self.store.grid

    def loaded(self, batches, transform: Callable) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        backbone = self.loop.model.backbone
        batches = [[int(i) for i in batch] for batch in batches]
        for images, _ in loader(self.places, transform, workers=self.loop.config.workers, batches=batches):
            images = images.to(self.loop.device)
            with self.loop._autocast():
                tokens = backbone.prefix(images)
            yield tokens.float(), backbone.grid(images)


@dataclass
class _Source:
    """One of the two kinds of places: its images, its sampler, and what training left behind of its descriptors."""

    name: str
    places: Places
    sampler: CliqueSampler | PlaceSampler | None  # of the main process; None in the others
    batches: int  # in an epoch
    feed: _Feed
    transform: Callable
    refreshed: bool = False
    left_behind: np.ndarray | None = None  # (N, D) float16
    seen: np.ndarray | None = None  # (N,) bool


def _replayed(made: list[tuple[np.ndarray, np.ndarray]], indices: np.ndarray) -> np.ndarray:
    """The descriptors that were made for just these images before."""
    for known, values in made:
        if np.array_equal(known, indices):
            return values
    raise RuntimeError(
        "the stored descriptors of the graph are of other images: remove the run's folder and start again"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------


class _Processes:
    """What the processes of one training say to each other; a single process says nothing.

    They are started by ``accelerate launch`` or ``torchrun``. Gradients are averaged by hand instead of by a wrapper around the
    model: the loss is taken on gathered descriptors, outside of any module's forward pass.
    """

    def __init__(self, device: str) -> None:
        self.rank, self.world = 0, 1
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 or (dist.is_available() and dist.is_initialized()):
            from accelerate import PartialState

            # The others wait for as long as the main process builds a graph or stores tokens; torch would give up after minutes.
            state = PartialState(
                cpu=device == "cpu" or not torch.cuda.is_available(), timeout=timedelta(days=7)
            )
            self.rank, self.world, self.device = state.process_index, state.num_processes, state.device
        else:
            self.device = pick_device(device)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process goes through the block before the others do."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()

    def gather(self, values: Tensor) -> Tensor:
        """The rows of all processes in the order of their ranks, with a gradient to every process's own."""
        return _Gather.apply(values) if self.world > 1 else values

    def average_gradients(self, parameters: list[Tensor]) -> None:
        """The mean of the processes' gradients.

        Each process computes the loss of the whole batch, so the gradient that `gather` brings back to it is summed over equal
        losses, ``world`` times too large; the mean takes that back. The head sees the same whole batch everywhere: its mean changes nothing.
        """
        if self.world == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def same_start(self, model: SAGE) -> None:
        """The main process's trained weights, in every process."""
        if self.world > 1:
            for tensor in model.trainable_state_dict().values():
                dist.broadcast(tensor.detach(), 0)

    def broadcast(self, value: Any) -> Any:
        """The main process's value, in every process."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def everyones(self, value: Any) -> list:
        """The values of all processes, in every process."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values


class _Gather(torch.autograd.Function):
    """Concatenate equal-sized rows of all processes; backwards, sum what all of them say of each row."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


# ---------------------------------------------------------------------------------------------------------------------
# State and checkpoints
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class _State:
    """Where a training stands, besides its weights: all that `_Loop` changes and a checkpoint keeps."""

    window: int  # steps at the end that decide about the plateau
    serial: int = 0  # checkpoints written so far
    epoch: int = 0  # epochs completed
    step: int = 0  # steps of the optimiser
    position: int = 0  # batches taken from the current epoch
    plan: dict[str, np.ndarray] | None = None  # the current epoch's batches of each source, (batches, images)
    edges: dict[str, tuple] = field(
        default_factory=dict
    )  # of each source's last graph: images compared, pairs
    graph: dict = field(default_factory=dict)
    tail: list = field(default_factory=list)
    window_sums: dict = field(default_factory=dict)
    epoch_sums: dict = field(default_factory=dict)
    epoch_seconds: dict = field(default_factory=dict)
    seconds: dict = field(default_factory=lambda: {"refresh": 0.0, "train": 0.0, "validate": 0.0})
    best: dict = field(default_factory=dict)
    start: dict = field(default_factory=dict)
    bad_validations: int = 0

    def facts(self) -> dict:
        return runs.plain({key: value for key, value in vars(self).items() if key not in ("plan", "edges")})

    def take(self, facts: dict) -> None:
        for key, value in facts.items():
            setattr(self, key, value)


def write_checkpoint(folder: Path, serial: int, content: dict, *, keep: int = 2) -> Path:
    """Write a numbered checkpoint aside, rename it, and remove all but the last `keep` and what was left half-written.

    Its name carries a hash of its bytes, so one rename makes file and hash appear together.
    """
    stream = io.BytesIO()
    torch.save(content, stream)
    data = stream.getbuffer()
    path = Path(folder) / f"{serial:06d}-{hashlib.sha256(data).hexdigest()[:32]}.pt"
    with runs.atomic_path(path) as temporary:
        temporary.write_bytes(data)
    for old in [
        *_checkpoints(folder)[keep:],
        *Path(folder).glob(".tmp-*.pt"),
    ]:  # and what killed processes left
        old.unlink(missing_ok=True)
    return path


def read_checkpoint(folder: Path, device: torch.device | str = "cpu") -> dict | None:
    """The newest checkpoint whose bytes agree with its name; a damaged one is passed over with a warning.

    Returns
    -------
    dict or None
        None where there is no whole one.
    """
    for path in _checkpoints(folder):
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest()[:32] == path.stem.split("-")[-1]:
            return torch.load(io.BytesIO(data), map_location=device, weights_only=True)
        warnings.warn(
            f"{path} is damaged (its bytes do not agree with the hash in its name): going back to the checkpoint before it",
            stacklevel=2,
        )
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first; what a killed process left half-written has a dotted name."""
    return sorted((p for p in Path(folder).glob("*.pt") if not p.name.startswith(".")), reverse=True)


# ---------------------------------------------------------------------------------------------------------------------
# Small things
# ---------------------------------------------------------------------------------------------------------------------


def _parameter_groups(model: SAGE, config: TrainConfig) -> list[dict]:
    head = [p for n, p in model.named_parameters() if p.requires_grad and n.startswith("head.")]
    rest = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("head.")]
    head_lr = config.lr if config.head_lr is None else config.head_lr
    groups = [{"params": rest, "base_lr": config.lr}, {"params": head, "base_lr": head_lr}]
    groups = [{**group, "lr": group["base_lr"]} for group in groups if group["params"]]
    if not groups:
        raise ValueError(
            "nothing of this model trains: choose an adapter, an aggregator with parameters, or the final norm"
        )
    return groups


def _live_share(mined: tuple | None, places: int, images: int) -> float:
    """Share of the batch's pairs (or triplets) that the miner leaves to the loss."""
    if mined is None:
        return 1.0
    anchors, same, other = places * images, images - 1, (places - 1) * images
    if len(mined) == 3:
        return len(mined[0]) / (anchors * same * other)
    return (len(mined[0]) + len(mined[2])) / (anchors * (same + other))


def _add(sums: dict[str, float], facts: Mapping[str, float], weight: float = 1.0) -> None:
    for key, value in facts.items():
        sums[key] = sums.get(key, 0.0) + weight * value


def _means(sums: Mapping[str, float]) -> dict[str, float]:
    """Means a step; images a second instead of their sums."""
    if not sums:
        return {}
    means = {k: v / sums["steps"] for k, v in sums.items() if k not in ("steps", "images", "seconds")}
    return {
        **means,
        "images_per_s": sums["images"] / max(sums["seconds"], 1e-9),
        "step_seconds": sums["seconds"] / sums["steps"],
    }


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """The command ``python -m sagelib.train``; several processes by ``accelerate launch -m sagelib.train``."""
    parser = argparse.ArgumentParser(
        prog="python -m sagelib.train",
        description="Train a model. Killed at any moment, the same command goes on; finished, it tells the result.",
        epilog="Every field with its default and source: python -m pydoc sagelib.train.TrainConfig",
    )
    parser.add_argument(
        "parameters", type=Path, nargs="?", help="YAML file of fields; what is no field is passed over"
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        type=Path,
        metavar="SET",
        help="mined by position, its val part validates: a folder with images/train, MSLS, GSV-Cities, or photographs "
        "with a positions.csv",
    )
    data.add_argument(
        "--msls", type=Path, metavar="FOLDER", help="MSLS, mined; its validation cities are left out"
    )
    data.add_argument(
        "--gsv", type=Path, metavar="FOLDER", help="GSV-Cities, as labelled places: half of every batch"
    )
    data.add_argument(
        "--validation", type=Path, metavar="SET", help="its images/val validates instead of --data's"
    )
    data.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="skip leaves out the training pictures and rows that cannot be read, and counts them",
    )
    parser.add_argument("--name", required=True, help="of the run")
    parser.add_argument(
        "--runs", type=Path, metavar="FOLDER", default=Path("data/runs"), help="of all runs (data/runs)"
    )
    parser.add_argument(
        "--tokens", type=Path, metavar="FOLDER", help="of stored tokens (tokens beside the runs)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="fields that differ, such as lr=1e-4 augment=0",
    )
    options = parser.parse_args(arguments)
    first = os.environ.get("RANK", "0") == "0"
    try:
        values, passed_over = _fields_of(options.parameters, options.set)
        if passed_over and first:
            print(f"{options.parameters}: passed over {', '.join(passed_over)} (no fields of a training)")
        config = TrainConfig.from_mapping(values)
        mined, labelled = (
            [open_training_set(f.parent, f.name, on_error=options.on_error) for f in folders if f]
            for folders in ([options.data, options.msls], [options.gsv])
        )
        data = {
            "mined": Places.concat(mined) if mined else None,
            "labelled": labelled[0] if labelled else None,
            "validation": None,
        }
        left_out = [sentence for table in (*mined, *labelled) for sentence in table.left_out]
        for sentence in left_out[:5] if first else ():
            print(f"left out: {sentence}" + (f" ({len(left_out)} such lines)" if len(left_out) > 5 else ""))
        parts = ("images/val", "val", "train_val/cph", "train_val/sf")
        val = options.validation
        if val is None and options.data and any((options.data / part).is_dir() for part in parts):
            val = options.data
        if val is not None:
            data["validation"] = open_set(val.parent, val.name, split="val")
        run = open_run(options.runs, options.name, config, **data, device=options.device)
        result = train(config, run, **data, tokens=options.tokens, device=options.device)
    except (ValueError, OSError, RuntimeError, MemoryError, FloatingPointError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    if first:
        print(yaml.safe_dump({"run": f"train/{result.run.name} finished", **result.metrics}, sort_keys=False))
    return 0


def _fields_of(path: Path | None, pairs: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The fields that a file and the command line's pairs set, and the file's other keys."""
    try:
        values = {} if path is None else yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold lines of the form FIELD: VALUE, and is a {type(values).__name__}")
    passed_over = [str(key) for key in values if key not in TrainConfig.field_names()]
    values = {key: value for key, value in values.items() if key in TrainConfig.field_names()}
    for pair in pairs:
        key, mark, value = pair.partition("=")
        if not mark:
            raise ValueError(f"--set takes FIELD=VALUE, got {pair!r}")
        values[key] = yaml.safe_load(value)
    return values, passed_over


if __name__ == "__main__":
    sys.exit(main())
