"""SAGE: backbone, aggregator and, if wanted, the cross-image head, in one module."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sagelib.aggregators import NetVLAD
from sagelib.backbone import PLAIN_DINOV2, ConvBackbone, build_backbone, reach_hub, read_checkpoint
from sagelib.interact import AnchorStates, InteractHead
from sagelib.runs import atomic_path, write_json
from sagelib.softp import SoftProbing

__all__ = ["SAGE", "ParameterReport", "build_model"]

WEIGHTS, TRAINABLE, CONFIG = "model.safetensors", "trainable.safetensors", "config.json"
PLAIN_POOLING = ("gem", "mean", "cls")


@dataclass(frozen=True)
class ParameterReport:
    """Counts of parameters, part by part: those that work, and those of the released model.

    The released model registers a branch that it never calls and counts it.

    Attributes
    ----------
    rows : tuple of (name, live, published)
        ``published`` is ``None`` where nothing was published of this kind.
    """

    rows: tuple[tuple[str, int, int | None], ...]

    def __getitem__(self, name: str) -> tuple[int, int | None]:
        for row in self.rows:
            if row[0] == name:
                return row[1:]
        raise KeyError(f"no row {name!r}; there is {', '.join(r[0] for r in self.rows)}")

    def __str__(self) -> str:
        """A Markdown table."""
        lines = ["| module | live | as published |", "|---|---:|---:|"]
        for name, live, published in self.rows:
            lines.append(f"| {name} | {live:,} | {'-' if published is None else f'{published:,}'} |")
        return "\n".join(lines)

    def _repr_markdown_(self) -> str:
        return str(self)


class SAGE(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="sagelib",
    tags=["visual-place-recognition"],
    paper_url="https://arxiv.org/abs/2509.25723",
):
    """Images to descriptors: backbone, aggregator, and an optional cross-image head.

    The defaults are the released model's: DINOv2 ViT-L/14 with dynamic power normalisation after its last four
    blocks, Soft Probing, and the cross-image head.

    Parameters
    ----------
    backbone : str
        See :func:`~sagelib.backbone.build_backbone`.
    aggregator : str
        ``"softp"`` (:class:`~sagelib.softp.SoftProbing`) or a name that
        :func:`sagelib.aggregators.build_aggregator` knows.
    aggregator_options : dict, optional
        Arguments of the aggregator.
    interact : bool
        Put an :class:`~sagelib.interact.InteractHead` after the aggregator.
    interact_options : dict, optional
        Arguments of the head.
    preprocessing : mapping, optional
        How the model wants its pictures: the fields of :class:`sagelib.images.Preprocess`, such as
        ``{"image_size": 322, "mode": "paper"}``. Kept as the attribute ``preprocessing``, a dict, and saved with
        the model.
    **backbone_options
        Passed to :func:`~sagelib.backbone.build_backbone`, such as ``pretrained``, ``weights``, ``adapter``,
        ``adapter_blocks`` or, for a convolutional network, ``stages``.

    Examples
    --------
    >>> model = SAGE("tf_efficientnet_lite2", pretrained=False, interact=False).eval()
    >>> model(torch.zeros(2, 3, 128, 128)).shape
    torch.Size([2, 8448])
    """

    def __init__(
        self,
        backbone: str = "vit_large_patch14_dinov2",
        *,
        aggregator: str = "softp",
        aggregator_options: dict | None = None,
        interact: bool = True,
        interact_options: dict | None = None,
        preprocessing: Mapping | None = None,
        **backbone_options,
    ):
        super().__init__()
        self.preprocessing = None if preprocessing is None else dict(preprocessing)
        weights = backbone_options.get("weights")
        self._hub_mixin_config = {
            **self._hub_mixin_config,
            "weights": None if weights is None else str(weights),
        }
        self.backbone = build_backbone(backbone, **backbone_options)
        self.aggregator = _build_aggregator(aggregator, self.backbone.width, aggregator_options or {})
        self.head = InteractHead(self.width, **(interact_options or {})) if interact else None

    @property
    def width(self) -> int:
        """Width D of a descriptor."""
        return self.aggregator.out_dim

    @property
    def has_head(self) -> bool:
        """Whether there is a cross-image head."""
        return self.head is not None

    @property
    def anchors(self) -> Tensor | None:
        """The head's own anchors (m, D), learned or stored; ``None`` where it has none."""
        return self.head.anchors if self.has_head else None

    @property
    def config(self) -> dict:
        """The constructor's arguments."""
        return {**self._hub_mixin_config, "preprocessing": self.preprocessing}

    # -- the forward pass ------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Descriptors (B, D) of ``images`` (B, 3, H, W).

        With the head on they attend over the batch that was given, or over the head's own anchors where it has
        some. Without a head they have unit length and depend on no other image.
        """
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
        cls, patches = self.backbone.split(self.backbone(images))
        return cls, patches, self.backbone.grid(images)

    def interact(self, descriptors: Tensor, anchors: "Tensor | AnchorStates | None" = None) -> Tensor:
        """The head on descriptors (B, D): over the batch, or over each image and ``anchors`` (m, D) only."""
        if not self.has_head:
            raise ValueError("this model has no cross-image head; build it with interact=True")
        return self.head(descriptors, anchors)

    def set_anchors(self, descriptors: Tensor) -> None:
        """Store reference descriptors (m, D), as :meth:`embed` gives them, as the head's anchors.

        They are saved with the model, and :meth:`forward` attends over them from then on.
        """
        if not self.has_head:
            raise ValueError("this model has no cross-image head; build it with interact=True")
        self.head.set_anchors(descriptors)
        options = {
            **(self._hub_mixin_config.get("interact_options") or {}),
            "stored_anchors": len(descriptors),
        }
        self._hub_mixin_config = {**self._hub_mixin_config, "interact_options": options}

    def initialise_from(self, batches: Iterable[Tensor | tuple[Tensor, tuple[int, int]]]) -> None:
        """Data-dependent initialisation: ``SoftProbing.initialise_from``, or k-means centres for NetVLAD.

        Before that a convolutional backbone takes the statistics of its channels from the same pictures.

        Parameters
        ----------
        batches : iterable
            Image batches (B, 3, H, W), or pairs of ``backbone.prefix`` tokens (B, T, M) and grid.

        Raises
        ------
        ValueError
            For another aggregator.
        """
        if not isinstance(self.aggregator, SoftProbing | NetVLAD):
            raise ValueError(
                f"only Soft Probing and NetVLAD start from data, not {type(self.aggregator).__name__}: switch data_init off"
            )
        was_training = self.training
        self.eval()

        backbone = self.backbone
        pairs = ((backbone.prefix(b), backbone.grid(b)) if isinstance(b, Tensor) else b for b in batches)
        if isinstance(backbone, ConvBackbone):
            pairs = list(pairs)
            backbone.standardise_from(pairs)

        def patches():
            for tokens, grid in pairs:
                yield backbone.split(backbone.suffix(tokens, grid))[1]

        with torch.no_grad():
            if isinstance(self.aggregator, NetVLAD):
                self.aggregator.start_from_patches(torch.cat([p.flatten(0, 1) for p in patches()]))
            else:
                self.aggregator.initialise_from(patches())
        self.train(was_training)

    # -- parameters ------------------------------------------------------------------------------------------

    def parameter_report(self) -> ParameterReport:
        """Trainable parameters part by part, live and as published."""
        backbone, aggregator = self.backbone, self.aggregator
        norm = _count(backbone.norm, trained=True)
        adapter = sum(p.numel() for p in backbone.parameters() if p.requires_grad) - norm
        rows = [
            (f"{backbone.adapter_blocks} x {backbone.adapter}", adapter, adapter),
            (f"final {type(backbone.norm).__name__}", norm, norm),
        ]
        dead, mask = None, 0
        if isinstance(aggregator, SoftProbing):
            parts = {
                "token MLP": aggregator.token,
                "reduction branch": aggregator.reduction,
                "probe branch": aggregator.probe,
                "post DPN": aggregator.post_dpn,
                "soft weighting": aggregator.weighting,
            }
            rows += [(name, _count(part), _count(part)) for name, part in parts.items() if part is not None]
            # The released model's unused branch: M -> hidden -> D + K.
            hidden, out = aggregator.reduction[0].out_features, aggregator.channels + aggregator.probes
            dead = (backbone.width + 1) * hidden + (hidden + 1) * out
            # ... and DINOv2's mask token, which timm leaves out.
            mask = backbone.width if backbone.name.split(".")[0] in PLAIN_DINOV2 else 0
        else:
            rows += [(type(aggregator).__name__, _count(aggregator, trained=True), None)]
        live = sum(row[1] for row in rows)
        head = _count(self.head) if self.has_head else 0
        whole = sum(p.numel() for p in self.parameters()) - head
        if dead is not None:
            rows += [("single branch (never called)", 0, dead)]
        rows += [("trained, head off", live, None if dead is None else live + dead)]
        if self.has_head:
            rows += [("InteractHead", head, head)]
        rows += [("whole model, head off", whole, None if dead is None else whole + dead + mask)]
        if self.has_head:
            rows += [
                ("whole model, head on", whole + head, None if dead is None else whole + dead + mask + head)
            ]
        return ParameterReport(tuple(rows))

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """Everything but the frozen original backbone: adapter, norm, aggregator, head; by name."""
        frozen = {f"backbone.{name}" for name in self.backbone.frozen_names}
        return {name: tensor for name, tensor in self.state_dict().items() if name not in frozen}

    def load_trainable_state_dict(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`trainable_state_dict`; anything missing or left over is an error."""
        own = self.trainable_state_dict()
        wrong = (
            ("missing", sorted(own.keys() - state.keys())),
            ("left over", sorted(state.keys() - own.keys())),
            (
                "of another shape",
                sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape),
            ),
        )
        if any(names for _, names in wrong):
            told = "; ".join(f"{what} {', '.join(names)}" for what, names in wrong if names)
            raise ValueError(f"these trained parameters do not fit the model: {told}")
        self.load_state_dict(state, strict=False)

    # -- files -----------------------------------------------------------------------------------------------

    def save_trainable(self, folder: str | Path) -> None:
        """Save what trains, the configuration, and a fingerprint of the frozen backbone it belongs to.

        Writes ``trainable.safetensors`` (float32) and ``config.json``; :meth:`from_pretrained` reads them, given
        the same backbone.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {k: v.detach().float().contiguous().cpu() for k, v in self.trainable_state_dict().items()}
        with atomic_path(folder / TRAINABLE) as path:
            save_file(state, path, metadata={"backbone_fingerprint": self.backbone.frozen_fingerprint()})
        write_json(folder / CONFIG, {**self.config, "weights": _basename(self.config.get("weights"))})

    def _save_pretrained(self, save_directory: Path) -> None:
        state = {k: v.detach().contiguous().cpu() for k, v in self.state_dict().items()}
        with atomic_path(Path(save_directory) / WEIGHTS) as path:
            save_file(state, path, metadata={"format": "pt"})
        write_json(Path(save_directory) / CONFIG, {**self.config, "weights": None})

    @classmethod
    def from_pretrained(cls, name: str | Path, **options) -> "SAGE":
        """A model from a folder written by ``save_pretrained`` or :meth:`save_trainable`, or from the hub.

        Raises
        ------
        FileNotFoundError
            If there is no such folder, and no hub's repository of this name can be had.
        """
        if not Path(name).is_dir():
            missing = f"there is no folder {name} of a saved model"
            if Path(name).is_file():
                raise FileNotFoundError(f"{missing}: it is a file; give the folder in which it lies")
            if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)):
                raise FileNotFoundError(f"{missing}, and a repository of the hub is called OWNER/NAME")
            try:
                reach_hub(str(name), CONFIG)
            except OSError as error:
                raise FileNotFoundError(
                    f"{missing}, and the Hugging Face hub cannot be reached to look for a repository of that name"
                ) from error
        return super().from_pretrained(name, **options)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id,
        revision,
        cache_dir,
        force_download,
        local_files_only,
        token,
        map_location="cpu",
        strict=True,
        **model_kwargs,
    ):
        """Whole weights where the folder or repository has them, else the trained part on its own backbone."""

        def find(name: str) -> Path | None:
            if Path(model_id).is_dir():
                path = Path(model_id) / name
                return path if path.is_file() else None
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import EntryNotFoundError

            try:
                return Path(
                    hf_hub_download(
                        model_id,
                        name,
                        revision=revision,
                        cache_dir=cache_dir,
                        force_download=force_download,
                        token=token,
                        local_files_only=local_files_only,
                    )
                )
            except EntryNotFoundError:
                return None

        if (path := find(WEIGHTS)) is not None:
            model = cls(**{**model_kwargs, "pretrained": False, "weights": None})
            model._hub_mixin_config = {**model.config, "pretrained": model_kwargs.get("pretrained", True)}
            model.load_state_dict(read_checkpoint(path), strict=strict)
        elif (path := find(TRAINABLE)) is not None:
            state, model = read_checkpoint(path), cls(**model_kwargs)
            with safe_open(path, "pt") as file:
                expected = (file.metadata() or {}).get("backbone_fingerprint")
            if expected != model.backbone.frozen_fingerprint():
                raise ValueError(
                    f"{path} was trained on another backbone than {model.backbone.name} with these weights: "
                    "give weights=<the file it was trained with>"
                )
            model.load_trainable_state_dict(state)
        else:
            raise FileNotFoundError(
                f"{model_id} holds neither {WEIGHTS} nor {TRAINABLE}: it is no saved model"
            )
        return model.to(map_location).eval()


def build_model(name_or_path: str | Path, **options) -> SAGE:
    """A model from a saved folder, or from a backbone's name.

    Parameters
    ----------
    name_or_path : str or path
        A folder written by ``save_pretrained`` or ``save_trainable``, or a backbone's name.
    **options
        Arguments of :class:`SAGE`. With one of the poolings that train nothing (``aggregator="gem"``, ``"mean"``
        or ``"cls"``) adapter and head are off unless asked for: the frozen backbone as it is.
    """
    if Path(name_or_path).is_dir():
        return SAGE.from_pretrained(str(name_or_path), **options)
    if Path(name_or_path).is_file():
        raise ValueError(
            f"{name_or_path} is a file: give a saved model's folder, or read a released checkpoint with "
            "sagelib.weights.load_authors_checkpoint"
        )
    if options.get("aggregator") in PLAIN_POOLING:
        options = {"adapter": "none", "train_norm": False, "interact": False, **options}
    return SAGE(str(name_or_path), **options)


def _build_aggregator(name: str, width: int, options: dict) -> nn.Module:
    if name == "softp":
        return SoftProbing(width, **options)
    from sagelib.aggregators import build_aggregator

    return build_aggregator(name, width, **options)


def _count(module: nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def _basename(path: str | None) -> str | None:
    return None if path is None else Path(path).name
