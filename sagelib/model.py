"""SAGE: backbone, aggregator and, if wanted, the cross-image head, in one module; others' networks."""

import importlib
import inspect
import re
import secrets
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import PyTorchModelHubMixin, snapshot_download
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sagelib import backbone as backbones
from sagelib.aggregators import NetVLAD, build_aggregator
from sagelib.backbone import check_state, read_checkpoint
from sagelib.interact import InteractHead
from sagelib.runs import atomic_path, broken, fingerprint, read_json, write_json
from sagelib.softp import SoftProbing

WEIGHTS, TRAINABLE, CONFIG = "model.safetensors", "trainable.safetensors", "config.json"


class ParameterReport(dict):
    """Parameters by part: (live, published or None); the authors count a branch that is never called."""

    def __str__(self) -> str:
        """A Markdown table."""
        rows = (f"| {k} | {live:,} | {'-' if p is None else f'{p:,}'} |" for k, (live, p) in self.items())
        return "\n".join(["| module | live | as published |", "|---|---:|---:|", *rows])

    _repr_markdown_ = __str__


class SAGE(nn.Module, PyTorchModelHubMixin, library_name="sagelib", tags=["visual-place-recognition"],
           paper_url="https://arxiv.org/abs/2509.25723"):  # fmt: skip
    """Images to descriptors: backbone, aggregator, optional cross-image head; by default the released model.

    Parameters
    ----------
    backbone, **backbone_options : see :func:`~sagelib.backbone.build_backbone`
    aggregator, aggregator_options : see :func:`~sagelib.aggregators.build_aggregator`
    interact, interact_options : bool, dict
        Put an :class:`~sagelib.interact.InteractHead` with these options after the aggregator.
    preprocessing : mapping, optional
        How the model wants its pictures, saved with it: fields of :class:`sagelib.images.Preprocess`.
    """

    def __init__(self, backbone: str = "vit_large_patch14_dinov2", *, aggregator: str = "softp",
                 aggregator_options: dict | None = None, interact: bool = True,
                 interact_options: dict | None = None, preprocessing: Mapping | None = None,
                 **backbone_options):  # fmt: skip
        super().__init__()
        self.preprocessing = None if preprocessing is None else dict(preprocessing)
        weights = backbone_options.get("weights")
        self._set_config(weights=None if weights is None else Path(weights).name)
        self.backbone = backbones.build_backbone(backbone, **backbone_options)
        self.aggregator = build_aggregator(aggregator, self.backbone.width, **(aggregator_options or {}))
        self.head = InteractHead(self.width, **(interact_options or {})) if interact else None

    width = property(lambda self: self.aggregator.out_dim, doc="Width D of a descriptor.")
    has_head = property(lambda self: self.head is not None, doc="Whether there is a cross-image head.")
    anchors = property(lambda self: self.head and self.head.anchors, doc="Its head's own (m, D), if any.")

    @property
    def config(self) -> dict:
        """The constructor's arguments; of a file of weights the name."""
        return {**self._hub_mixin_config, "preprocessing": self.preprocessing}

    def _set_config(self, **changes) -> None:
        self._hub_mixin_config = {**self._hub_mixin_config, **changes}

    def forward(self, images: Tensor) -> Tensor:
        """Descriptors (B, D) of ``images`` (B, 3, H, W); a head attends over its anchors, or the batch."""
        descriptors = self.embed(images)
        return self.interact(descriptors, self.anchors) if self.has_head else descriptors

    def embed(self, images: Tensor) -> Tensor:
        """Per-image descriptors (B, D), before the head."""
        return self.embed_tokens(self.backbone.prefix(images), self.backbone.grid(images))

    def embed_tokens(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The same from what ``backbone.prefix`` gave, (B, T, M), and the grid of patches."""
        cls, patches = self.backbone.split(self.backbone.suffix(tokens, grid))
        return self.aggregator(cls, patches, grid)

    def local_features(self, images: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """What the aggregator is given: CLS (B, M), patches (B, N, M) and the grid (rows, columns)."""
        return *self.backbone.split(self.backbone(images)), self.backbone.grid(images)

    def interact(self, descriptors: Tensor, anchors: Tensor | None = None) -> Tensor:
        """The head on descriptors (B, D): over the batch, or over each image and ``anchors`` (m, D) only."""
        self._needs_head()
        return self.head(descriptors, anchors)

    def _needs_head(self) -> None:
        if not self.has_head:
            raise ValueError("this model has no cross-image head; build it with interact=True")

    def set_anchors(self, descriptors: Tensor) -> None:
        """Store descriptors (m, D) of :meth:`embed` as the anchors of the head, which are saved with it."""
        self._needs_head()
        self.head.set_anchors(descriptors)
        options = self.config.get("interact_options") or {}
        self._set_config(interact_options={**options, "stored_anchors": len(descriptors)})

    @torch.no_grad()
    def initialise_from(self, batches: Iterable[Tensor | tuple[Tensor, tuple[int, int]]]) -> None:
        """Data-dependent initialisation: ``SoftProbing.initialise_from``, or k-means centres for NetVLAD.

        A convolutional backbone takes its statistics from the same pictures first. A batch is of images
        (B, 3, H, W), or a pair of ``backbone.prefix`` tokens (B, T, M) and grid.
        """
        if not isinstance(self.aggregator, SoftProbing | NetVLAD):
            name = type(self.aggregator).__name__
            raise ValueError(f"only Soft Probing and NetVLAD start from data, not {name}: set data_init: 0")
        backbone, was_training = self.backbone, self.training
        self.eval()
        pairs = ((backbone.prefix(b), backbone.grid(b)) if isinstance(b, Tensor) else b for b in batches)
        if isinstance(backbone, backbones.ConvBackbone):
            pairs = list(pairs)
            backbone.standardise_from(pairs)
        patches = (backbone.split(backbone.suffix(tokens, grid))[1] for tokens, grid in pairs)
        self.aggregator.initialise_from(patches)
        self.train(was_training)

    def parameter_report(self) -> ParameterReport:
        """Trainable parameters part by part, live and as published."""
        backbone, aggregator, head = self.backbone, self.aggregator, _count(self.head)
        norm = _count(backbone.norm, trained=True)
        # (name, live, what was published beyond that)
        rows = [(f"{backbone.adapter_blocks} x {backbone.adapter}", _count(backbone, trained=True) - norm, 0)]
        rows += [(f"final {type(backbone.norm).__name__}", norm, 0)]
        if isinstance(aggregator, SoftProbing):
            parts = {"token MLP": "token", "reduction branch": "reduction", "probe branch": "probe"}
            parts |= {"post DPN": "post_dpn", "soft weighting": "weighting"}
            parts = {name: getattr(aggregator, part) for name, part in parts.items()}
            rows += [(name, _count(part), 0) for name, part in parts.items() if part is not None]
            # The released model's unused branch, M -> hidden -> D + K, and DINOv2's mask token.
            hidden, out = aggregator.reduction[0].out_features, aggregator.channels + aggregator.probes
            dead = (backbone.width + 1) * hidden + (hidden + 1) * out
            mask = backbone.width if backbone.name.split(".")[0] in backbones.PLAIN_DINOV2 else 0
            never, both = dead, dead + mask
        else:
            rows += [(type(aggregator).__name__, _count(aggregator, trained=True), None)]
            never = both = None
        live, whole = sum(row[1] for row in rows), _count(self) - head
        rows += [("single branch (never called)", 0, never)] if never else []
        rows += [("trained, head off", live, never)]
        rows += [("InteractHead", head, 0)] if head else []
        rows += [("whole model, head off", whole, both)]
        rows += [("whole model, head on", whole + head, both)] if head else []
        return ParameterReport({name: (n, None if more is None else n + more) for name, n, more in rows})

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """Everything but the frozen original backbone: adapter, norm, aggregator, head; by name."""
        frozen = {f"backbone.{name}" for name in self.backbone.frozen_names}
        return {name: tensor for name, tensor in self.state_dict().items() if name not in frozen}

    def load_trainable_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`trainable_state_dict`; anything missing or left over is an error."""
        check_state(self.trainable_state_dict(), state, "these trained parameters do not fit the model")
        self.load_state_dict(state, strict=False)

    def save_trainable(self, folder: str | Path) -> None:
        """Save what trains (float32), the configuration, and a fingerprint of the frozen backbone."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        state = {k: v.float() for k, v in self.trainable_state_dict().items()}
        self._save(Path(folder) / TRAINABLE, state, backbone_fingerprint=self.backbone.frozen_fingerprint())

    def _save_pretrained(self, save_directory: Path) -> None:
        self._save(save_directory / WEIGHTS, self.state_dict(), format="pt")

    def _save(self, file: Path, state: dict[str, Tensor], **metadata: str) -> None:
        state = {k: v.detach().contiguous().cpu() for k, v in state.items()}
        with atomic_path(file) as path:
            path.write_bytes(save(state, metadata))
        write_json(file.parent / CONFIG, self.config)

    @classmethod
    def from_pretrained(cls, name: str | Path, **options) -> "SAGE":
        """A model from a folder of ``save_pretrained`` or :meth:`save_trainable`, or by name from the hub."""
        if Path(name).is_file():
            raise ValueError(f"{name} is a file: sagelib.weights.load_authors_checkpoint reads released ones")
        if not Path(name).is_dir():
            hub = {key: options.pop(key) for key in ("revision", "cache_dir", "token") if key in options}
            try:
                name = snapshot_download(str(name), allow_patterns=[WEIGHTS, TRAINABLE, CONFIG], **hub)
            except (OSError, ValueError) as error:  # of an impossible name too
                words = f"there is no folder {name} of a saved model, nor is it to be had from the hub"
                raise FileNotFoundError(words) from error
        with broken(name, "no model can be made of these files"):
            return super().from_pretrained(name, **options)

    @classmethod
    def _from_pretrained(cls, *, model_id, map_location="cpu", **options):
        """Whole weights where the folder has them, else the trained part on its own backbone."""
        for name in ("revision", "cache_dir", "force_download", "local_files_only", "token", "position"):
            options.pop(name, None)  # of the download; the position follows from the backbone's name
        whole, trained = Path(model_id) / WEIGHTS, Path(model_id) / TRAINABLE
        read_json(Path(model_id) / CONFIG)  # without it, this would be another model
        if whole.is_file():
            model = cls(**{**options, "pretrained": False, "weights": None})
            model._set_config(pretrained=options.get("pretrained", True), weights=options.get("weights"))
            state = read_checkpoint(whole)
            check_state(model.state_dict(), state, f"{whole} does not fit the model")
            model.load_state_dict(state)
        elif trained.is_file():
            state, model = read_checkpoint(trained), cls(**options)
            with safe_open(trained, "pt") as file:
                expected = (file.metadata() or {}).get("backbone_fingerprint")
            if expected != model.backbone.frozen_fingerprint():
                words = f"another backbone than {model.backbone.name} with these weights"
                raise ValueError(f"{trained} was trained on {words}: give weights=<its file>")
            model.load_trainable_state_dict(state)
        else:
            raise FileNotFoundError(f"{model_id} is no saved model: neither {WEIGHTS} nor {TRAINABLE}")
        return model.to(map_location).eval()


def build_model(name_or_path: str | Path, **options) -> SAGE:
    """A model from a folder written by ``save_pretrained`` or ``save_trainable``, or from a backbone's name.

    The options are those of :class:`SAGE`. With one of the poolings that train nothing (``aggregator="gem"``,
    ``"mean"`` or ``"cls"``) adapter and head are off unless asked for: the frozen backbone as it is.
    """
    if Path(name_or_path).exists():
        return SAGE.from_pretrained(str(name_or_path), **options)
    if options.get("aggregator") in ("gem", "mean", "cls"):
        options = {"adapter": "none", "train_norm": False, "interact": False, **options}
    return SAGE(str(name_or_path), **options)


class ForeignModel(nn.Module):
    """Somebody else's network, images (B, 3, H, W) to descriptors (B, D); see :func:`load_foreign`.

    Of several outputs the first counts. ``asked`` has the fields of :class:`sagelib.images.Preprocess` that
    are its own; where nothing else is said, it gets squares of 322 px, with antialias.
    """

    def __init__(self, network: nn.Module, name: str, code: str, asked: Mapping):
        super().__init__()
        # DataParallel would deal a batch out to several GPUs, and each would see a part of it.
        self.network = network.module if isinstance(network, nn.DataParallel) else network
        self.name, self.fingerprint, self.asked = name, code, dict(asked)
        self.preprocessing = {"image_size": 322, "mode": "antialias", **asked}

    def forward(self, images: Tensor) -> Tensor:
        """Descriptors (B, D); what the network raises becomes a ValueError with the shape of the images."""
        try:
            out = self.network(images)
        except Exception as error:
            if "memory" in str(error):
                raise
            words = f"{self.name} fails on images of the shape {tuple(images.shape)}"
            raise ValueError(f"{words} ({type(error).__name__}: {error})") from error
        return out[0] if isinstance(out, tuple | list) else out


def load_foreign(name: str, arguments: Mapping, **asked) -> ForeignModel:
    """The network that an entry of a torch.hub folder, or a function of a module, makes of ``arguments``.

    ``name`` is ``hub:FOLDER:ENTRY`` where there is such a folder, ``hub:OWNER/REPO:ENTRY`` at GitHub (also
    ``OWNER/REPO:REF``), or ``module:function``. Their code is run, and what it wants is fetched: name only
    what you trust. ``asked`` are fields of ``Preprocess``. No ``torch.nn.Module`` is a ValueError.
    Its fingerprint is of entry, arguments and all Python files in the hub's folder, or beside those that
    define the function and the network's classes; weights count besides. Code of no file is new each time.
    """
    source, _, entry = name.removeprefix("hub:").rpartition(":")
    folder, is_hub = Path(source).expanduser().resolve(), name.startswith("hub:")
    local, paths, before = is_hub and folder.is_dir(), [*sys.path], {*sys.modules}
    if is_hub and not local and not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w./-]+)?", source):
        raise FileNotFoundError(f"{name}: there is no folder {folder}, nor is it OWNER/REPO at GitHub")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # random weights are the same each time
            if is_hub:
                how = {"source": "local"} if local else {"trust_repo": True, "verbose": False}
                make = partial(torch.hub.load, str(folder) if local else source, entry, **how)
            else:
                make = getattr(importlib.import_module(source), entry)
            network = make(**arguments)
    except Exception as error:
        advice = "" if local or not is_hub else f": without GitHub, clone it and give hub:FOLDER:{entry}"
        raise ValueError(f"{name} gives no model ({type(error).__name__}: {error}){advice}") from error
    finally:  # the modules of the next folder may have the same names
        sys.path[:] = paths
        root = str(folder) if local else torch.hub.get_dir()
        for key in {*sys.modules} - before if is_hub else ():
            if any(root in str(getattr(sys.modules[key], at, "")) for at in ("__file__", "__path__")):
                del sys.modules[key]
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name} gives no torch.nn.Module (of the type {type(network).__name__})")
    functions = [f for part in network.modules() for f in (type(part).__init__, type(part).forward)]
    codes = (getattr(inspect.unwrap(f), "__code__", None) for f in [make, *functions])
    files = {Path(code.co_filename) for code in codes if code}
    sources = {*(folder.rglob("*.py") if local else ()), *(s for f in files for s in f.parent.glob("*.py"))}
    code = fingerprint([entry, arguments, sorted(source.read_bytes() for source in sources)])
    code = code if all(file.is_file() for file in files) else secrets.token_hex(8)
    return ForeignModel(network, name, code, asked).eval()


def _count(module: nn.Module | None, *, trained: bool = False) -> int:
    parameters = () if module is None else module.parameters()
    return sum(p.numel() for p in parameters if p.requires_grad or not trained)
