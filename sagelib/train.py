"""Training: batches of places, a loss over the whole batch, and a run that can be killed at any moment.

An epoch refreshes the graph and writes down its batches of ``places x images`` from each source (labelled
places, the mined graph, or both). A step describes its images, gathers the descriptors of all processes, puts
them through the cross-image head, and adds one multi-similarity loss a source. Then recall is measured. Each
random number is drawn for a name (`sagelib.runs.rng`): a resumed run repeats an uninterrupted one on a CPU.

    python -m sagelib.train params.yaml --data FOLDER --runs data/runs --name first
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import io
import itertools
import math
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from accelerate.utils import broadcast, gather_object, reduce
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from sagelib import describe, runs
from sagelib.backbone import read_checkpoint as read_weights
from sagelib.describe import AUTOCAST, describe_batch, in_context, launched, open_tokens, pick_device, shared
from sagelib.graph import GeoVisualGraph
from sagelib.images import MODES, Preprocess, TrainTransform, Views, loader
from sagelib.model import SAGE
from sagelib.places import Places, TestSet, open_set, open_training_set
from sagelib.retrieval import recall, search
from sagelib.runs import Run, check, rng, torch_seed
from sagelib.sampler import CliqueSampler, PlaceSampler, SamplerConfig

LOSS, MINER = {"alpha": 1.0, "beta": 50.0, "base": 0.0}, {"epsilon": 0.1}  # of the ancestors (CliqueMining)
MODEL = "backbone pretrained weights adapter adapter_blocks adapter_options aggregator aggregator_options "
MODEL = (MODEL + "interact interact_options").split()  # arguments of `SAGE`
EXECUTION = ("workers", "log_every", "checkpoint_every", "tensorboard")  # change nothing of what comes out


@dataclass(frozen=True, kw_only=True)
class TrainConfig(SamplerConfig):
    """Everything that a training depends on but the data; how batches are made is `SamplerConfig`'s.

    The defaults are the paper's or, as fields say, its ancestors' (EMVP, CliqueMining). None is off.
    """

    # The model, see `sagelib.model.SAGE`
    backbone: str = "vit_large_patch14_dinov2"
    pretrained: bool = True
    weights: str | None = None
    adapter: str = "dpn"
    adapter_blocks: int = 4
    adapter_options: dict = field(default_factory=dict)
    aggregator: str = "softp"
    aggregator_options: dict = field(default_factory=dict)
    interact: bool = True
    interact_options: dict = field(default_factory=dict)
    dropout: float | None = None  # of all trained parts; None: 0.3 in Soft Probing's branches, else 0.1
    data_init: int | None = None  # ours: training images that centre and scale Soft Probing at first
    # The pictures
    image_size: int = 224  # side in pixels (the paper is silent; its ancestors')
    validation_size: int = 322
    preprocess: str = "paper"  # mode of `sagelib.images.Preprocess`; of it, augmentation takes autocontrast
    augment: int | None = 3  # operations of RandAugment (the paper is silent; EMVP's)
    crop: float | None = None  # ours: the smallest share of a picture that a random window covers
    views: int | None = None  # ours: versions of a picture, itself and augmented ones, whose tokens are kept
    cache_limit_gb: float | None = None  # of frozen tokens on disk, for each set of pictures that do not vary
    describe_batch: int = 64  # images at a time where nothing is learned
    workers: int = 0  # processes that load images
    # The steps (the paper is silent on epochs and AdamW's rate, decay and schedule: EMVP's)
    epochs: int = 30
    lr: float = 9e-4
    weight_decay: float = 9.5e-9
    final_lr: float = 0.2  # the rate falls linearly to so many times itself over all steps
    warmup_steps: int = 0  # in which the rate rises linearly from 0, on top of the schedule
    accumulate: int = 1  # batches whose mean gradient makes a step
    precision: str | None = None  # of autocast: "bfloat16", or None for float32
    gradient_checkpointing: int | None = None  # images described at a time, and again in the backward pass
    # What the head attends to (the paper is silent): "batch", each source's "half", "solo", or "anchors"
    train_context: str = "batch"
    anchors: int = 64  # unless learned: so many training images, described at the start of every epoch
    patience: int | None = 10  # validations without a better one before it stops (in the authors' arguments)
    log_every: int = 20  # steps
    checkpoint_every: int = 200  # steps; there is one at each epoch's end, too
    tensorboard: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = {f.name: f.type for f in fields(self)}

        def checked(names: str, *ends: float, **allowed) -> None:
            for name in names.split():
                check(name, getattr(self, name), *ends, none="None" in kinds[name], **allowed)

        checked("warmup_steps workers adapter_blocks", 0, whole=True)
        checked("epochs image_size validation_size augment data_init accumulate anchors", 1, whole=True)
        checked("gradient_checkpointing patience describe_batch log_every checkpoint_every", 1, whole=True)
        checked("places_per_batch images_per_place views", 2, whole=True)
        checked("lr cache_limit_gb", above=0)
        checked("weight_decay", 0)
        checked("final_lr dropout", 0, 1)
        checked("crop", None, 1, above=0)
        checked("preprocess", choices=MODES)
        checked("precision", choices=(None, "bfloat16"))
        checked("train_context", choices=("batch", "half", "solo", "anchors"))
        checked("pretrained interact tensorboard", choices=(True, False))
        types = {"dict": (Mapping, "a mapping of names to values"), "str": (str, "text")}
        for name, kind in kinds.items():
            type_, words = types.get(kind, (object, ""))
            if not isinstance(getattr(self, name), type_):
                raise ValueError(f"{name} must be {words}, got {getattr(self, name)!r}")
        if self.views and not (self.cache_limit_gb and (self.augment or self.crop)):
            raise ValueError(f"views = {self.views} needs cache_limit_gb, and augment or crop")
        if self.graph_context == "anchors" != self.train_context:
            raise ValueError("graph_context 'anchors' needs train_context 'anchors'")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The configuration in a mapping, such as a file; an unknown key is refused with the nearest.

        Numbers that YAML reads as text (``9e-4``) become numbers; a meaningless 0 or empty text means None.
        """
        kinds, values = {f.name: f.type for f in fields(cls)}, dict(values)
        for key, value in values.items():
            if key not in kinds:
                near = difflib.get_close_matches(str(key), kinds, 1)
                hint = f": did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"a training has no parameter named {key!r}{hint}")
            if kinds[key].endswith("None") and key not in ("dropout", "tau") and value in (0, ""):
                values[key] = None
            elif kinds[key].startswith("float") and isinstance(value, str):
                with contextlib.suppress(ValueError):
                    values[key] = float(value)
        return cls(**values)

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names of all parameters."""
        return tuple(f.name for f in fields(cls))

    def identity(self) -> dict[str, Any]:
        """The parameters on which the result depends: all but those that say how the work is done."""
        return {key: value for key, value in asdict(self).items() if key not in EXECUTION}


class TrainResult(NamedTuple):
    """A finished training; the model has the weights of the best validation, or else of the last step."""

    run: Run
    model: SAGE
    metrics: dict


def plateau_value(places: int, images_per_place: int) -> float:
    """Where the multi-similarity loss rests when nothing is learned: its value for similarities of zero.

    ``log K + log(P K - K + 1) / 50`` for P places of K images, for then the miner keeps all pairs.
    """
    positives, negatives = images_per_place - 1, (places - 1) * images_per_place
    return math.log1p(positives) / LOSS["alpha"] + math.log1p(negatives) / LOSS["beta"]


def rate_factor(config: TrainConfig, step: int, steps: int) -> float:
    """By what the learning rate is multiplied at `step` (from 0) of `steps`: from 1 to `final_lr`."""
    factor = 1 - (1 - config.final_lr) * step / max(1, steps - 1)
    return factor * min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else factor


def build_model_of(config: TrainConfig) -> SAGE:
    """The untrained model that a configuration describes; the same weights each time."""
    options = {name: getattr(config, name) for name in MODEL}
    learned = config.interact_options.get("learned_anchors")
    if config.interact and config.train_context == "anchors" and not learned:
        options["interact_options"] = {"stored_anchors": config.anchors, **config.interact_options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(config.seed, "weights"))
        try:
            model = SAGE(**options)
        except TypeError as error:
            raise ValueError(f"no model can be built of these options: {error}") from error
    model.preprocessing = {"image_size": config.validation_size, "mode": config.preprocess}
    for name, module in model.named_modules() if config.dropout is not None else ():
        rate = {nn.Dropout: "p", nn.MultiheadAttention: "dropout"}.get(type(module))
        if rate and not name.startswith(("backbone.vit", "backbone.cnn")):  # the frozen network's own stay 0
            setattr(module, rate, config.dropout)
    return model


def open_run(root, name: str, config: TrainConfig, *, mined=None, labelled=None, validation=None,
             device="auto"):  # fmt: skip
    """The `Run` ``root/train/name`` of this configuration, tables and pictures: new, begun, or finished."""
    data = {"mined": mined, "labelled": labelled, "validation": validation}
    prints = {key: None if value is None else value.fingerprint() for key, value in data.items()}
    processes, device = launched(device), pick_device(device)
    tables = (mined, labelled, *((validation.database, validation.queries) if validation else ()))
    pictures = shared(processes.is_main_process and describe.pictures_fingerprint(*filter(None, tables)))
    with processes.main_process_first():  # it makes the directory, the others read it
        facts = {"data_fingerprint": runs.fingerprint(prints), "device": device, "pictures": pictures}
        run = Run.open(root, "train", name, config.identity(), seed=config.seed, **facts)
        if processes.is_main_process and not run.finished:
            # Sums of another order have other last digits: bits repeat on so many threads and processes only.
            run.manifest |= {"threads": torch.get_num_threads(), "processes": processes.num_processes}
            run.save_manifest()
    return run


def load_trained(run: Run, which: str = "best") -> SAGE:
    """A run's model with its ``"best"`` or ``"last"`` weights, to evaluate, or a FileNotFoundError."""
    path = run.dir / which / "trainable.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{run.dir} has no {which} weights yet: it is {run.manifest['status']}")
    names = [*MODEL, "seed", "dropout", "train_context", "anchors", "validation_size", "preprocess"]
    model = build_model_of(TrainConfig(**{name: run.config[name] for name in names if name in run.config}))
    model.load_trainable_state_dict(read_weights(path))
    return model.eval()


def train(config: TrainConfig, run: Run, *, mined: Places | None = None, labelled: Places | None = None,
          validation: TestSet | None = None, model: SAGE | None = None, tokens: str | Path | None = None,
          device: str = "auto", progress: bool = True) -> TrainResult:  # fmt: skip
    """Train a model; go on where a call with the same run was stopped; give the result of a finished one.

    With `mined` places (by the graph) and `labelled` ones, a batch has half of each (CliqueMining). Recall on
    `validation` is measured before the first step and at every epoch's end, on descriptors of one image
    each: without a head as they are, with a head alone or over its anchors. A `model` is trained in place of
    the configuration's. `tokens` is the folder of kept tokens, shared by runs; by default beside the stages.
    Too few data raise a ValueError, a loss that is not finite a FloatingPointError.
    """
    if run.finished:
        return TrainResult(run, load_trained(run), run.metrics)
    data = {name: p for name, p in (("labelled", labelled), ("mined", mined)) if p is not None}
    if not data:
        raise ValueError("nothing to train on: give labelled places, places to be mined, or both")
    if labelled is not None and not (labelled.labels() >= 0).any():
        raise ValueError("the labelled places carry no labels: give them as mined places")
    if config.train_context == "half" and len(data) < 2:
        raise ValueError("train_context 'half' needs both sources, labelled and mined: take 'batch' with one")
    size = f"{config.places_per_batch} places x {config.images_per_place} images"
    advice = f"not enough memory for {size} at {config.image_size} pixels: set gradient_checkpointing to a "
    advice += f"few images (now {config.gradient_checkpointing}), or lower places_per_batch, image_size or "
    advice += f"describe_batch (now {config.describe_batch})"
    folder = Path(tokens) if tokens is not None else run.dir.parent.parent / "tokens"
    with torch.random.fork_rng(list(range(torch.cuda.device_count()))), runs.memory_errors(advice):
        return _Training(config, run, data, validation, model, folder, device, progress).fit()


@dataclass
class _State:
    """Where a training stands, besides its weights: all that a checkpoint keeps."""

    serial: int = 0  # checkpoints written so far
    epoch: int = 0  # epochs completed
    step: int = 0  # steps of the optimiser
    position: int = 0  # batches taken from the current epoch
    plans: dict = field(default_factory=dict)  # batches (batches, images) of each source, by epoch
    graph: dict = field(default_factory=dict)  # reports of each source's sampler, by epoch
    edges: dict = field(default_factory=dict)  # of each source's last graph: images compared, pairs
    tail: list = field(default_factory=list)  # loss and gap of the steps that decide about the plateau
    sums: dict = field(default_factory=lambda: {"window": Counter(), "epoch": Counter()})  # of steps' facts
    epoch_seconds: dict = field(default_factory=dict)
    seconds: dict = field(default_factory=lambda: {"refresh": 0.0, "train": 0.0, "validate": 0.0})
    best: dict = field(default_factory=dict)
    start: dict = field(default_factory=dict)
    bad_validations: int = 0


class _Training:
    """One training. Its methods stand in the order in which they run."""

    def __init__(self, config, run, data, validation, model, folder, device, progress) -> None:
        from pytorch_metric_learning import losses, miners

        self.config, self.run, self.folder, self.state = config, run, folder, _State()
        self.processes, self.device = launched(device), pick_device(device)
        self.main, self.world = self.processes.is_main_process, self.processes.num_processes
        self.progress, self.dtype, self.writer = progress and self.main, AUTOCAST.get(config.precision), None
        self.autocast = partial(torch.autocast, self.device.type, self.dtype, enabled=self.dtype is not None)
        self.loss, self.miner = losses.MultiSimilarityLoss(**LOSS), miners.MultiSimilarityMiner(**MINER)
        self.model = (model if model is not None else build_model_of(config)).to(self.device)
        self.model.preprocessing = {"image_size": config.validation_size, "mode": config.preprocess}
        if config.train_context == "anchors" and self.model.has_head and self.model.anchors is None:
            raise ValueError("train_context 'anchors' needs a head with stored_anchors or learned_anchors")
        self.same_start()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        if not self.trained:
            raise ValueError("nothing of this model trains: choose an adapter, or another aggregator")
        self.optimiser = torch.optim.AdamW(self.trained, lr=config.lr, weight_decay=config.weight_decay)
        self.make_samplers(data)
        self.steps = config.epochs * math.ceil(self.batches / config.accumulate)
        self.each = config.places_per_batch * config.images_per_place  # images of a source in a batch
        if self.each * len(data) % self.world:
            raise ValueError(f"{self.world} processes cannot share a batch equally: change places_per_batch")
        self.sources = {name: _Images(self, places, config.image_size, name) for name, places in data.items()}
        self.positives = None if validation is None else validation.positives()
        parts = (validation.database, validation.queries) if validation is not None else ()
        self.validated = [_Images(self, part, config.validation_size) for part in parts]

    def make_samplers(self, data: dict[str, Places]) -> None:
        """The sources' samplers: in the main process, which tells the others their batches."""
        self.samplers, answer = {}, None
        try:
            if self.main and "labelled" in data:
                self.samplers["labelled"] = PlaceSampler(data["labelled"].labels(), self.config)
            if self.main and "mined" in data:
                graph = GeoVisualGraph.from_places(data["mined"], **self.config.graph_options())
                self.samplers["mined"] = CliqueSampler(graph, self.config)
            answer = min((len(sampler) for sampler in self.samplers.values()), default=None)
        except ValueError as error:
            answer = error
        self.batches = shared(answer)
        if isinstance(self.batches, ValueError):
            raise self.batches

    def same_start(self) -> None:
        """The main process's trained weights, in every process."""
        for tensor in self.model.trainable_state_dict().values():
            broadcast(tensor)

    def fit(self) -> TrainResult:
        """All epochs: refresh the graph, train on its batches, validate, write a checkpoint."""
        config, state = self.config, self.state
        if not self.restore():
            if config.data_init is not None:
                source, images = self.some_images("data_init", config.data_init)
                self.model.initialise_from(source.plain(images))
                self.same_start()
            self.refresh_anchors()
            self.validate(0)
            self.save_checkpoint()
        if config.tensorboard and self.main:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.run.path("tensorboard")), purge_step=state.step + 1)
        with tqdm(range(self.steps), "training", initial=state.step, disable=not self.progress) as self.bar:
            while state.epoch < config.epochs and state.bad_validations < (config.patience or math.inf):
                epoch = state.epoch + 1
                if not state.epoch_seconds:
                    self.begin_epoch(epoch)
                self.train_epoch(epoch)
                self.validate(epoch)
                state.epoch, state.position, state.epoch_seconds = epoch, 0, {}
                for by_epoch in (*state.plans.values(), state.graph):
                    by_epoch.pop(epoch, None)
                self.save_checkpoint()
        if self.writer is not None:
            self.writer.close()
        return self.finish()

    def some_images(self, name: str, n: int) -> tuple[_Images, np.ndarray]:
        """The last source and `n` of its images, the same in every epoch and process."""
        *_, source = self.sources.values()
        if n > (total := len(source.places)):
            raise ValueError(f"{name} asks for {n} training images, and there are {total}: lower it")
        return source, np.sort(rng(self.config.seed, name).permutation(total)[:n])

    def refresh_anchors(self) -> None:
        """Describe the head's stored anchors, the same images in every epoch, with the current model."""
        if self.config.train_context == "anchors" and self.model.has_head and self.model.head.learned is None:
            values = self.describe(*self.some_images("anchors", len(self.model.anchors)), "none")
            self.model.set_anchors(torch.from_numpy(values).to(self.device))

    def begin_epoch(self, epoch: int) -> None:
        """Refresh the graph and write down the batches of all epochs that draw from it, for all processes."""
        began, state = time.perf_counter(), self.state
        if epoch > 1:
            self.refresh_anchors()
        for name, source in self.sources.items():
            if epoch in state.plans.setdefault(name, {}):
                continue
            plans = None
            if self.main:
                plans = self.plan(name, epoch)
                shared(None)
            else:  # describe what the main process asks for, until it asks no more
                while (images := shared(None)) is not None:
                    self.describe(source, images, self.config.graph_context)
            state.plans[name] = shared(plans)
        state.sums["epoch"] = Counter()
        state.epoch_seconds = {"refresh": time.perf_counter() - began, "train": 0.0}

    def plan(self, name: str, epoch: int) -> dict[int, Tensor]:
        """The batches of an epoch, and of those after it that need no new descriptors."""
        sampler, described, epochs = self.samplers[name], [], [epoch]

        def describe(images: np.ndarray) -> np.ndarray:
            shared(images)
            described.append((images, self.describe(self.sources[name], images, self.config.graph_context)))
            return described[-1][1]

        if sampler.needs_refresh(epoch - 1):
            sampler.refresh(epoch - 1, describe)
            later = range(epoch + 1, self.config.epochs + 1)
            epochs += itertools.takewhile(lambda e: not sampler.needs_refresh(e - 1), later)
        plans = {}
        for number in epochs:
            sampler.set_epoch(number - 1)
            plans[number] = torch.tensor(list(itertools.islice(sampler, self.batches)), dtype=torch.int32)
            self.state.graph.setdefault(number, {})[name] = runs.plain(sampler.report)
        if described and self.config.node_descriptor == "image":
            self.state.graph[epoch][name] |= self.compare_edges(name, described)
        return plans

    def compare_edges(self, name: str, described: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, int]:
        """Edges come and gone since the last refresh, among some 2,000 images, those described both times."""
        places, cluster, seen = self.sources[name].places, self.samplers[name].graph.cluster, self.state.edges
        order = rng(self.config.seed, "graph report").permutation(int(cluster.max()) + 1)
        part = np.isin(cluster, order[: np.searchsorted(np.cumsum(np.bincount(cluster)[order]), 2000) + 1])
        images, first = np.unique(np.concatenate([i[part[i]] for i, _ in described]), return_index=True)
        values = np.concatenate([v[part[i]] for i, v in described])[first]
        graph = GeoVisualGraph.from_places(places[images], values, **self.config.graph_options())
        pairs = images[graph.edges()]
        facts = {"compared_images": len(images), "edges": len(pairs)}
        if name in seen:
            images_before, pairs_before = (tensor.numpy() for tensor in seen[name])
            both = np.intersect1d(images, images_before)
            kept = (p[np.isin(p, both).all(axis=1)] for p in (pairs, pairs_before))
            now, then = (set(map(tuple, p.tolist())) for p in kept)
            facts |= {"edges_gained": len(now - then), "edges_lost": len(then - now)}
            facts["edges_kept"] = len(now & then)
        seen[name] = (torch.from_numpy(images), torch.from_numpy(pairs))
        return facts

    def train_epoch(self, epoch: int) -> None:
        """The steps of an epoch, from the current position on."""
        config, state = self.config, self.state
        self.model.train()
        batches = self.epoch_batches(epoch)
        while state.position < self.batches:
            began, facts = time.perf_counter(), Counter()
            count = min(config.accumulate, self.batches - state.position)
            rate = config.lr * rate_factor(config, state.step, self.steps)
            self.optimiser.param_groups[0]["lr"] = rate
            for part in range(count):
                loss, found = self.batch_loss(*next(batches), part, rate)
                (loss / count).backward()
                facts.update({name: value / count for name, value in found.items()})
                state.position += 1
            facts["gradient_norm"] = self.update()
            state.step += 1
            facts["steps"], facts["images"] = 1.0, self.each * len(self.sources) * count
            facts["seconds"] = time.perf_counter() - began
            self.log_step(facts, epoch, rate)
            if state.step % config.checkpoint_every == 0 and state.position < self.batches:
                self.save_checkpoint()

    def epoch_batches(self, epoch: int) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """Tokens of this process's share of each batch that is left; neighbours in a batch stay together."""
        share = self.each * len(self.sources) // self.world
        first, parts = self.processes.process_index * share, []
        for i, (name, source) in enumerate(self.sources.items()):
            start, stop = np.clip([first - i * self.each, first + share - i * self.each], 0, self.each)
            if start < stop:
                plan = self.state.plans[name][epoch].numpy()
                parts.append(source.varied(plan, epoch, self.state.position, slice(start, stop)))
        for group in zip(*parts, strict=True):
            yield torch.cat([tokens for tokens, _ in group]), group[0][1]

    def batch_loss(self, tokens: Tensor, grid: tuple, part: int, rate: float) -> tuple[Tensor, Counter]:
        """One batch: describe the share, gather the descriptors of all, head, losses."""
        seed, step, chunk = self.config.seed, self.state.step, self.config.gradient_checkpointing
        torch.manual_seed(torch_seed(seed, "dropout", step, part, self.processes.process_index))
        embed, chunks = self.model.embed_tokens, [tokens]
        if chunk is not None:  # only one chunk's activations live at a time; dropout repeats itself
            embed, chunks = partial(checkpoint, embed, use_reentrant=False), tokens.split(chunk)
        with self.autocast():
            descriptors = torch.cat([embed(some, grid) for some in chunks]).float()
        if self.world > 1:
            descriptors = torch.cat(all_gather(descriptors))
        # The head sees the whole batch in every process, and drops the same units in all of them.
        torch.manual_seed(torch_seed(seed, "head dropout", step, part))
        with self.autocast():
            context, head = self.config.train_context, self.model.has_head
            if head and context in ("batch", "half"):
                parts = descriptors.chunk(2 if context == "half" else 1)
                descriptors = torch.cat([self.model.interact(part) for part in parts])
            elif head:
                descriptors = in_context(self.model, descriptors, context)
        loss, facts = self.losses(descriptors.float())
        if not torch.isfinite(loss):
            words = f"the loss is {loss.item()} at step {step + 1}, with a learning rate of {rate:.3g}"
            advice = f"{self.run.dir / 'checkpoints'} holds a checkpoint from before it"
            raise FloatingPointError(f"{words}: lower lr or set warmup_steps; {advice}")
        return loss, facts

    def losses(self, descriptors: Tensor) -> tuple[Tensor, Counter]:
        """The sources' losses, added; the share of pairs that the miner leaves, and mean similarities."""
        places, images, n = self.config.places_per_batch, self.config.images_per_place, len(self.sources)
        labels = torch.arange(places, device=descriptors.device).repeat_interleave(images)
        same = labels[:, None] == labels
        total, facts = descriptors.new_zeros(()), Counter()
        for name, part in zip(self.sources, descriptors.split(len(labels)), strict=True):
            pairs = self.miner(part, labels)
            loss = self.loss(part, labels, pairs)
            total = total + loss
            with torch.no_grad():
                unit = nn.functional.normalize(part, dim=-1)
                similarity = unit @ unit.T
                positive = (similarity[same].sum() - len(part)) / (same.sum() - len(part))
                negative = similarity[~same].mean()
            live = (len(pairs[0]) + len(pairs[2])) / (len(part) * (len(part) - 1))
            facts[f"loss_{name}"] = float(loss.detach())
            facts.update(live=live / n, positive=float(positive) / n, negative=float(negative) / n)
        facts["loss"] = float(total.detach())
        return total, facts

    def update(self) -> float:
        """A step of the optimiser with the mean gradient of all processes; returns the gradient's norm."""
        # Each has the loss of the whole batch: gathering summed over equal losses, which the mean takes back.
        gradients = [p.grad for p in self.trained if p.grad is not None]
        for gradient in gradients if self.world > 1 else ():
            gradient.copy_(reduce(gradient, "mean"))
        norm = float(nn.utils.get_total_norm(gradients))
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return norm

    def log_step(self, facts: Counter, epoch: int, rate: float) -> None:
        """Add a step to the sums, write the window's line when it is full, move the bar."""
        state, decisive = self.state, max(10, min(200, self.steps // 10))
        state.tail = [*state.tail, [facts["loss"], facts["positive"] - facts["negative"]]][-decisive:]
        state.epoch_seconds["train"] += facts["seconds"]
        for sums in state.sums.values():
            sums.update(facts)
        self.bar.set_postfix(loss=f"{facts['loss']:.3f}", live=f"{100 * facts['live']:.0f}%", refresh=False)
        self.bar.update()
        if state.step % self.config.log_every == 0 or state.position == self.batches:
            line = {"kind": "step", "epoch": epoch, "step": state.step, "lr": rate}
            self.log(line | _means(state.sums["window"]))
            state.sums["window"] = Counter()

    def log(self, line: dict) -> None:
        """A line of the log, and its numbers for TensorBoard."""
        if self.main:
            self.run.log(line)
        recalls = {f"recall_at_{k}": value for k, value in line.get("recall", {}).items()}
        for name, value in (line | recalls).items() if self.writer is not None else ():
            if isinstance(value, float):
                self.writer.add_scalar(f"{line['kind']}/{name}", value, self.state.step)

    def validate(self, epoch: int) -> None:
        """Recall on descriptors of one image each; the best weights are kept, the epoch's line is written."""
        state, began = self.state, time.perf_counter()
        line = {"kind": "epoch", "epoch": epoch, "step": state.step}
        if epoch:
            line |= _means(state.sums["epoch"]) | {"graph": state.graph.get(epoch, {})}
        if self.positives is not None:
            context = "anchors" if self.config.train_context == "anchors" else "solo"
            context = context if self.model.has_head else "none"
            values = [self.describe(part, np.arange(len(part.places)), context) for part in self.validated]
            measured = None
            if self.main:
                found = recall(search(*values, k=20)[0], self.positives, n_references=len(values[0]))
                measured = runs.plain({"hits": found.hits, "queries": found.n_queries, "context": context})
            measured = shared(measured)
            measured["recall"] = {k: 100 * n / measured["queries"] for k, n in measured["hits"].items()}
            line |= measured
            score = [measured["hits"][k] for k in ("1", "5", "10")]
            state.bad_validations += 1
            if not state.best or score > state.best["score"]:
                state.best, state.bad_validations = {"epoch": epoch, "score": score, **measured}, 0
                if self.main:
                    self.model.save_trainable(self.run.path("best"))
            state.start = state.start if epoch else measured
        line["seconds"] = {**state.epoch_seconds, "validate": time.perf_counter() - began}
        for part, seconds in line["seconds"].items():
            state.seconds[part] += seconds
        self.log(line)
        if self.progress and "recall" in line:
            loss = f"loss {line['loss']:.3f}, live pairs {100 * line['live']:.0f} %" if epoch else "untrained"
            recalls = " ".join(f"R@{k} {line['recall'][k]:.1f}" for k in ("1", "5", "10"))
            tqdm.write(f"epoch {epoch}: {loss}, {recalls} ({line['context']})")

    def describe(self, images: _Images, rows: np.ndarray, context: str) -> np.ndarray:
        """Descriptors (n, D) float32, each a function of its image alone; every process does a share."""
        share = np.array_split(np.asarray(rows), self.world)[self.processes.process_index]
        parts = [np.empty((0, self.model.width), np.float32)]
        for tokens in images.plain(share):
            parts.append(describe_batch(self.model, tokens, context, autocast=self.dtype).cpu().numpy())
        return np.concatenate(gather_object(parts))

    def finish(self) -> TrainResult:
        """The metrics, and the model with its best weights."""
        state, refresh = self.state, self.state.seconds["refresh"]
        metrics = dict(epochs=state.epoch, steps=state.step, stopped_early=state.epoch < self.config.epochs)
        metrics |= {"final_loss": float(np.mean([x for x, _ in state.tail])), "plateau": self.plateau()}
        metrics["seconds"] = {key: round(value, 2) for key, value in state.seconds.items()}
        metrics["refresh_share"] = refresh / max(1e-9, refresh + state.seconds["train"])
        metrics["trained_parameters"] = sum(p.numel() for p in self.trained)
        if state.best:
            best = {key: value for key, value in state.best.items() if key != "score"}
            metrics |= {"best": best, "start": state.start}
        if self.main:
            for which in ("last",) if state.best else ("last", "best"):
                self.model.save_trainable(self.run.path(which))
            self.run.finish(metrics)
            if self.progress and metrics["plateau"]["ended_there"]:
                tqdm.write(metrics["plateau"]["sentence"])
        self.processes.wait_for_everyone()
        run = self.run if self.main else runs.load_run(self.run.dir)
        self.model.load_trainable_state_dict(read_weights(run.dir / "best" / "trainable.safetensors"))
        return TrainResult(run, self.model.eval(), run.metrics)

    def plateau(self) -> dict:
        """Where the loss would rest if all similarities were zero, and whether the last steps lie there."""
        value = len(self.sources) * plateau_value(self.config.places_per_batch, self.config.images_per_place)
        loss, gap = np.mean(self.state.tail, axis=0).tolist()
        # At rest positives are no more alike than negatives; a loss that passes by tells them apart.
        there = loss > 0.97 * value and gap < 0.1
        sentence = (
            f"The last {len(self.state.tail)} steps have a mean loss of {loss:.3f}, no better than the "
            f"plateau at {value:.3f} where all similarities are zero, and positives only {gap:.3f} more "
            "alike than negatives: nothing was learned. Try dropout=0, data_init=256, lr=1e-3, or more steps."
        )
        return {"value": value, "loss": loss, "gap": gap, "ended_there": there, "sentence": sentence * there}

    def save_checkpoint(self) -> None:
        """Write everything that the rest of the training depends on; keep the last two."""
        if self.main:
            self.state.serial += 1
            log = self.run.dir / "log.jsonl"
            content = {"state": vars(self.state), "log_bytes": log.stat().st_size if log.exists() else 0}
            content["weights"] = self.model.trainable_state_dict()
            content["optimiser"] = self.optimiser.state_dict()
            write_checkpoint(self.run.path("checkpoints"), self.state.serial, content)
        self.processes.wait_for_everyone()

    def restore(self) -> bool:
        """Go back to the newest whole checkpoint; False where there is none."""
        content = read_checkpoint(self.run.dir / "checkpoints") or {"log_bytes": 0}
        self.processes.wait_for_everyone()  # nobody writes one before all have looked
        log = self.run.dir / "log.jsonl"
        if self.main and log.exists() and log.stat().st_size > content["log_bytes"]:
            os.truncate(log, content["log_bytes"])  # these lines will be written again
        if "state" not in content:
            return False
        vars(self.state).update(content["state"])
        self.model.load_trainable_state_dict(content["weights"])
        self.optimiser.load_state_dict(content["optimiser"])
        if self.progress and self.state.step:
            tqdm.write(f"{self.run.dir}: going on after step {self.state.step} of {self.steps}")
        return True


class _Images:
    """The images of one `Places` as tokens of the frozen prefix; with a source's name, varied in training."""

    def __init__(self, training: _Training, places: Places, size: int, name: str = "") -> None:
        config = training.config
        self.training, self.places, self.name, self.store, self.views = training, places, name, None, 1
        self.preprocess = self.transform = Preprocess(size, config.preprocess)
        if name and (config.augment or config.crop):
            options = {"randaugment": config.augment, "crop": config.crop}
            options["autocontrast"] = config.preprocess == "autocontrast"
            options["seed"] = torch_seed(config.seed, "augment", name) % 2**31
            self.transform, self.views = TrainTransform(size, **options), config.views or 1
        kept = Views(self.preprocess, self.transform, self.views) if self.views > 1 else self.preprocess
        if config.cache_limit_gb is not None:
            options = {"limit_gb": config.cache_limit_gb, "batch_size": config.describe_batch}
            options |= {"workers": config.workers, "autocast": training.dtype, "progress": training.progress}
            self.store = open_tokens(training.folder, training.model, places, preprocess=kept, **options)

    def plain(self, rows: np.ndarray) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        """Tokens (n, T, M) and grid of some images as they are, `describe_batch` at a time."""
        size = self.training.config.describe_batch
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        return self.tokens(batches, self.preprocess, itertools.repeat(0))

    def varied(self, plan: np.ndarray, epoch: int, start: int, columns: slice):
        """The same of an epoch's training pictures `plan` (batches, images), from batch `start` on."""
        drawn = rng(self.training.config.seed, "views", self.name, epoch).integers(0, self.views, plan.shape)
        if self.transform is not self.preprocess:
            self.transform.set_epoch(epoch)
        return self.tokens(plan[start:, columns], self.transform, drawn[start:, columns])

    def tokens(self, batches, transform, drawn) -> Iterator[tuple[Tensor, tuple[int, int]]]:
        training, backbone = self.training, self.training.model.backbone
        if self.store is not None and (self.views > 1 or transform is self.preprocess):
            for rows, views in zip(batches, drawn, strict=False):
                # Row V i + v of the store is view v of image i.
                yield self.store[np.asarray(rows) * self.views + views].to(training.device), self.store.grid
            return
        batches = [[int(i) for i in batch] for batch in batches]
        for images, _ in loader(self.places, transform, workers=training.config.workers, batches=batches):
            with training.autocast():
                tokens = backbone.prefix(images.to(training.device))
            yield tokens.float(), backbone.grid(images)


def write_checkpoint(folder: Path, serial: int, content: dict) -> None:
    """Write a numbered checkpoint, its name with a hash of its bytes; keep two, and nothing half-written."""
    stream = io.BytesIO()
    torch.save(content, stream)
    data = stream.getbuffer()
    with runs.atomic_path(folder / f"{serial:06d}-{hashlib.sha256(data).hexdigest()[:32]}.pt") as path:
        path.write_bytes(data)
    for old in [*sorted(folder.glob("[0-9]*.pt"))[:-2], *folder.glob(".tmp-*.pt")]:
        old.unlink(missing_ok=True)


def read_checkpoint(folder: Path) -> dict | None:
    """The newest checkpoint whose bytes agree with its name, or None; a damaged one gives a warning."""
    for path in sorted(folder.glob("[0-9]*.pt"), reverse=True):
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest()[:32] == path.stem.split("-")[-1]:
            return read_weights(path)
        warnings.warn(f"{path} is damaged: going back to the checkpoint before it", stacklevel=2)
    return None


def _means(sums: Counter) -> dict[str, float]:
    """Means a step; images a second instead of their sums."""
    means = {k: v / sums["steps"] for k, v in sums.items() if k not in ("steps", "images", "seconds")}
    return {**means, "images_per_s": sums["images"] / max(sums["seconds"], 1e-9)} if sums else {}


def main(arguments: list[str] | None = None) -> int:
    """The command ``python -m sagelib.train``; several processes: ``accelerate launch`` or ``torchrun``."""
    parser = argparse.ArgumentParser("python -m sagelib.train", description="Train, or go on training.")
    add, folder = parser.add_argument, {"type": Path, "metavar": "FOLDER"}
    add("parameters", type=Path, nargs="?", help="YAML file of fields of TrainConfig; other keys are ignored")
    add("--data", **folder, help="a set whose training part is mined and whose val part validates")
    add("--msls", **folder, help="MSLS, mined; its validation cities are left out")
    add("--gsv", **folder, help="GSV-Cities, as labelled places: half of every batch")
    add("--validation", **folder, help="a set whose val part validates instead of --data's")
    add("--on-error", choices=("raise", "skip"), default="raise", help="skip leaves out what is broken")
    add("--name", required=True, help="of the run")
    add("--runs", **folder, default=Path("data/runs"), help="of all runs (data/runs)")
    add("--tokens", **folder, help="of stored tokens (tokens beside the runs)")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="such as lr=1e-4 augment=0")
    options, first = parser.parse_args(arguments), os.environ.get("RANK", "0") == "0"
    try:
        values, ignored = _fields(options.parameters, options.set)
        if ignored and first:
            print(f"{options.parameters}: ignored {', '.join(ignored)} (no fields of a training)")
        config, data = TrainConfig.from_mapping(values), _data(options, first)
        run = open_run(options.runs, options.name, config, **data, device=options.device)
        run = train(config, run, **data, tokens=options.tokens, device=options.device).run
    except (ValueError, OSError, RuntimeError, MemoryError, FloatingPointError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    if first:
        print(yaml.safe_dump({"run": f"train/{run.name} finished", **run.metrics}, sort_keys=False))
    return 0


class _EachKeyOnce(yaml.SafeLoader):
    """YAML in which a key that stands twice in a mapping is an error, not overwritten."""

    def construct_mapping(self, node, deep=False):
        first = {}
        for key, _ in node.value:
            if first.setdefault(str(key.value), key) is not key:
                raise yaml.MarkedYAMLError(None, None, f"the key {key.value} stands twice", key.start_mark)
        return super().construct_mapping(node, deep)


def read_parameters(path: Path) -> dict[str, Any]:
    """The names and values of a YAML file; a ValueError names the file and the line."""
    text = runs.read_text(path)
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("aliases, *NAME, are not read: write the value out")
        values = _EachKeyOnce(text).get_single_data() or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also of a day that does not exist
        line = f", line {mark.line + 1}" if (mark := getattr(error, "problem_mark", None)) else ""
        raise ValueError(f"{path}{line}: this is not YAML ({getattr(error, 'problem', error)})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold lines of the form NAME: VALUE, and is a {type(values).__name__}")
    return values


def _fields(path: Path | None, pairs: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The fields that a file and the command line's pairs set, and the file's other keys."""
    values = {} if path is None else read_parameters(path)
    chosen = {key: value for key, value in values.items() if key in TrainConfig.field_names()}
    for pair in pairs:
        try:
            key, value = pair.split("=", 1)
            chosen[key] = yaml.safe_load(value)
        except (ValueError, yaml.YAMLError):
            raise ValueError(f"--set takes FIELD=VALUE, got {pair!r}") from None
    return chosen, [str(key) for key in values if key not in TrainConfig.field_names()]


def _data(options: argparse.Namespace, first: bool) -> dict[str, Places | TestSet | None]:
    """What the command trains and validates on."""
    val, parts = options.validation, ("images/val", "val", "train_val/cph", "train_val/sf")
    if val is None and options.data and any((options.data / part).is_dir() for part in parts):
        val = options.data
    read = partial(open_training_set, on_error=options.on_error)
    mined = [read(f.parent, f.name) for f in (options.data, options.msls) if f]
    labelled = [read(options.gsv.parent, options.gsv.name)] if options.gsv else []
    left_out = [sentence for places in (*mined, *labelled) for sentence in places.left_out]
    for sentence in left_out[:5] if first else ():
        print(f"left out: {sentence}" + (f" ({len(left_out)} such lines)" if len(left_out) > 5 else ""))
    data = {"mined": Places.concat(mined) if mined else None, "labelled": labelled[0] if labelled else None}
    return data | {"validation": None if val is None else open_set(val.parent, val.name, split="val")}


if __name__ == "__main__":
    sys.exit(main())
