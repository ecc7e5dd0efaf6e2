"""A frozen vision transformer and the few parts of it that train.

The order of the file is the order of the method: the transformer itself (:func:`vit_tiny`,
:class:`Backbone`), the resampling of its position embeddings, and what is put after or into its last blocks
(:class:`DynamicPowerNorm`, or one of the alternatives for ablations).
"""

import hashlib
import math
import os
import re
import socket
from importlib import resources
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import timm
import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["ADAPTERS", "Backbone", "DynamicPowerNorm", "vit_tiny"]

TINY = "sage_vit_tiny"
PLAIN_DINOV2 = tuple(f"vit_{size}_patch14_dinov2" for size in ("small", "base", "large", "giant"))
PEFT_TUNERS = ("lora", "dora", "oft")
ADAPTERS = ("dpn", "none", *PEFT_TUNERS, "unfreeze")


def vit_tiny(*, img_size: int = 224, init_values: float = 0.1) -> VisionTransformer:
    """The architecture of the packaged small foundation, with random weights.

    A ViT of 12 blocks, 192 wide, 3 heads, patches of 14 pixels, LayerScale, a CLS token and no registers. Its
    state-dict names are timm's.

    Parameters
    ----------
    img_size : int
        Side in pixels of the images whose grid the position embeddings are made for.
    init_values : float
        Where LayerScale starts; loading weights overwrites it.
    """
    return VisionTransformer(
        img_size=img_size,
        patch_size=14,
        embed_dim=192,
        depth=12,
        num_heads=3,
        init_values=init_values,
        num_classes=0,
        dynamic_img_size=True,
    )


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
    """A vision transformer of timm, frozen but for its last LayerNorm and an adapter in the last blocks.

    The forward pass is cut in two: :meth:`prefix`, everything that no trained part precedes, which runs without
    a graph for autograd and whose output may be kept; and :meth:`suffix`, the rest.

    Parameters
    ----------
    name : str
        ``"sage_vit_tiny"`` (packaged) or a vision transformer of timm, such as ``vit_base_patch14_dinov2`` or
        ``vit_base_patch14_reg4_dinov2``.
    pretrained : bool
        Load pre-trained weights; ``False`` leaves them random.
    weights : path, optional
        A local file to load instead of the hub's: .pth or .safetensors, in timm's or the original DINOv2's
        format.
    position : {"dinov2", "timm"}, optional
        How position embeddings are resampled to another grid: the way of the original DINOv2 (bicubic, no
        antialiasing, scale factor (side + 0.1) / trained side), or timm's (bicubic with antialiasing, no
        offset). ``None`` takes the first for the four DINOv2 models without registers and the second for all
        others.
    adapter : {"dpn", "none", "lora", "dora", "oft", "unfreeze"}
        What trains in the last blocks: a :class:`DynamicPowerNorm` after each (the paper's), nothing, one of
        the tuners of ``peft`` on their linear layers, or the blocks themselves.
    adapter_blocks : int
        How many of the last blocks; 1 to the depth.
    adapter_options : dict, optional
        For ``dpn``: ``hidden`` (16), ``dropout`` (0.1). For a tuner of ``peft``: ``target_modules`` (names of
        linear layers inside a block; ``("qkv", "proj")``) and any field of its configuration, such as ``r``.
    train_norm : bool
        Train weight and bias of the final LayerNorm (the paper's: the only original parameters that train).

    Attributes
    ----------
    width : int
        M, the width of a token.
    patch : int
        Side of a patch in pixels.
    depth : int
        Number of blocks, L.
    prefix_blocks : int
        How many of them run in :meth:`prefix`: L - n + 1 where the trained part follows the block (``dpn``),
        L - n where it lies inside, L where nothing in the blocks trains.

    Raises
    ------
    ValueError
        For an unknown name or option, and for target modules that match nothing.
    OSError
        Where pre-trained weights cannot be had.
    """

    def __init__(
        self,
        name: str = "vit_large_patch14_dinov2",
        *,
        pretrained: bool = True,
        weights: str | Path | None = None,
        position: str | None = None,
        adapter: str = "dpn",
        adapter_blocks: int = 4,
        adapter_options: dict | None = None,
        train_norm: bool = True,
    ):
        super().__init__()
        if adapter not in ADAPTERS:
            raise ValueError(f"adapter must be one of {', '.join(ADAPTERS)}; got {adapter!r}")
        if position not in (None, "dinov2", "timm"):
            raise ValueError(f"position must be 'dinov2', 'timm' or None; got {position!r}")
        self.name = name
        self.vit = _build_vit(name, pretrained=pretrained, weights=weights)
        self.position = position or ("dinov2" if name.split(".")[0] in PLAIN_DINOV2 else "timm")
        self.adapter = adapter
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
        self.gradient_checkpointing = False
        self._positions: dict[tuple, Tensor] = {}
        self._fingerprints: dict[str, tuple] = {}

        self.vit.requires_grad_(False)
        originals = {id(p) for p in self.vit.parameters()}
        options = dict(adapter_options or {})
        self.dpn = nn.ModuleList()
        if adapter == "dpn":
            self.dpn.extend(DynamicPowerNorm(self.width, **options) for _ in range(adapter_blocks))
        elif adapter == "unfreeze":
            _refuse(options, "unfreeze")
            self.vit.blocks[first:].requires_grad_(True)
        elif adapter in PEFT_TUNERS:
            _inject_tuner(self.vit, adapter, range(first, self.depth), options)
        else:
            _refuse(options, "none")
        self.vit.norm.requires_grad_(train_norm)
        # The names of the original parameters that stay as they are: all that a small checkpoint may leave out.
        self.frozen_names = frozenset(
            n for n, p in self.named_parameters() if id(p) in originals and not p.requires_grad
        )

    # -- the forward pass ------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """Tokens after the final LayerNorm, (B, T, M), of ``images`` (B, 3, H, W)."""
        return self.suffix(self.prefix(images))

    @torch.no_grad()
    def prefix(self, images: Tensor) -> Tensor:
        """Tokens (B, T, M) after the last block that no trained part precedes; no gradient flows through."""
        return self._blocks(self._embed(images), 0, self.prefix_blocks, adapt=False)

    def suffix(self, tokens: Tensor) -> Tensor:
        """What is left after :meth:`prefix`: adapter, last blocks, final LayerNorm; (B, T, M) to the same."""
        if self.adapter == "dpn":
            tokens = self.dpn[0](tokens)
        tokens = self._blocks(tokens, self.prefix_blocks, self.depth)
        return self.vit.norm(tokens)

    def features(self, images: Tensor, block: int, *, norm: bool = False) -> Tensor:
        """Tokens (B, T, M) after the ``block``-th block, with the adapter that follows it.

        Parameters
        ----------
        images : Tensor (B, 3, H, W)
        block : int
            0 (the embedded patches) to the depth (after the last block).
        norm : bool
            Pass them through the final LayerNorm.
        """
        if not 0 <= block <= self.depth:
            raise ValueError(f"block must be between 0 and {self.depth}; got {block}")
        frozen = min(block, self.prefix_blocks)
        with torch.no_grad():
            tokens = self._blocks(self._embed(images), 0, frozen, adapt=False)
        if self.adapter == "dpn" and block >= self.prefix_blocks:
            tokens = self.dpn[0](tokens)
        tokens = self._blocks(tokens, frozen, block)
        return self.vit.norm(tokens) if norm else tokens

    def split(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The CLS token (B, M) and the patches (B, N, M); registers are left out.

        A transformer without a CLS token gives the mean of its patches in its place.
        """
        patches = tokens[:, self.vit.num_prefix_tokens :]
        return (tokens[:, 0] if self.vit.cls_token is not None else patches.mean(dim=1)), patches

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

    def _blocks(self, tokens: Tensor, start: int, stop: int, *, adapt: bool = True) -> Tensor:
        for i in range(start, stop):
            recompute = self.gradient_checkpointing and torch.is_grad_enabled() and self.training
            block = self.vit.blocks[i]
            tokens = checkpoint(block, tokens, use_reentrant=False) if recompute else block(tokens)
            if adapt and self.adapter == "dpn":
                tokens = self.dpn[i - self.prefix_blocks + 1](tokens)
        return tokens

    def _embed(self, images: Tensor) -> Tensor:
        # shape[0] rather than len: an exported model keeps it free.
        vit, grid, batch = self.vit, self.grid(images), images.shape[0]
        tokens = vit.patch_embed(images).reshape(batch, grid[0] * grid[1], self.width)
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

    def frozen_fingerprint(self) -> str:
        """A hash of every original parameter that does not train."""
        return self._hash("frozen", {n: p for n, p in self.named_parameters() if n in self.frozen_names})

    def _hash(self, what: str, named: dict[str, Tensor]) -> str:
        state = tuple((p.data_ptr(), p._version) for p in named.values())
        if self._fingerprints.get(what, (None,))[0] != state:
            digest = hashlib.blake2b(
                f"{self.position} {self.prefix_blocks} {self.patch}".encode(), digest_size=16
            )
            for name, p in sorted(named.items()):
                digest.update(f"{name} {p.dtype} {tuple(p.shape)}".encode())
                digest.update(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
            self._fingerprints[what] = (state, digest.hexdigest())
        return self._fingerprints[what][1]


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


# -- building and loading the transformer --------------------------------------------------------------------


def _build_vit(name: str, *, pretrained: bool, weights: str | Path | None) -> VisionTransformer:
    if name == TINY:
        if weights is None and pretrained:
            weights = _packaged_tiny()
        if weights is None:
            return vit_tiny()
        state = read_state_dict(weights)
        return _load_state(vit_tiny(img_size=_trained_side(state) or 224), state, Path(weights))
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0]}*")[:5] or [TINY, *PLAIN_DINOV2]
        raise ValueError(f"timm has no model named {name!r}; there is, for instance, {', '.join(near)}")
    options = {"num_classes": 0, "dynamic_img_size": True}
    if weights is not None:
        path = Path(weights)
        state = read_state_dict(path)
        options["img_size"] = _trained_side(state)
        return _load_state(_create(name, **options), state, path)
    if not pretrained:
        return _create(name, **options)
    repository = getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None)
    if not repository:
        raise ValueError(
            f"timm has no pre-trained weights for {name}: give weights=<file>, or pretrained=False"
        )
    try:
        cached = try_to_load_from_cache(repository, "model.safetensors")
        if isinstance(cached, str):
            options["pretrained_cfg_overlay"] = {"file": cached}
        elif not any(key.lower() == "https_proxy" for key in os.environ):
            # Without a network the hub's client would try again and again, for most of a minute.
            socket.getaddrinfo(urlsplit(huggingface_hub.constants.ENDPOINT).hostname, 443)
        return _create(name, pretrained=True, **options)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"the weights of {name} could not be had from the Hugging Face hub, {repository} "
            f"({type(error).__name__}): give weights=<a local .pth or .safetensors file, in timm's or the original "
            "DINOv2's format>, or pretrained=False for random weights"
        ) from error


def _create(name: str, **options) -> VisionTransformer:
    try:
        vit = timm.create_model(name, **options)
    except TypeError as error:
        raise ValueError(
            f"{name} is not a vision transformer of the kind timm's VisionTransformer: {error}"
        ) from error
    if not isinstance(vit, VisionTransformer) or not hasattr(vit, "blocks"):
        raise ValueError(
            f"{name} is a {type(vit).__name__}; a backbone must be one of timm's VisionTransformer"
        )
    return vit


def _packaged_tiny() -> Path:
    path = Path(str(resources.files("sagelib") / f"{TINY}.safetensors"))
    if not path.is_file():
        raise OSError(
            f"the packaged weights {path.name} are missing: install the package whole, "
            "give weights=<file>, or pretrained=False for random weights"
        )
    return path


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or .pth file by name; nothing in the file is executed."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
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


def _load_state(vit: VisionTransformer, state: dict[str, Tensor], path: Path) -> VisionTransformer:
    # timm's filter knows the original DINOv2 by its mask_token, and renames and reshapes what must be.
    if "register_tokens" in state or "blocks.0.mlp.w12.weight" in state:
        state.setdefault("mask_token", state["cls_token"])
    state = {
        k: v.float() for k, v in checkpoint_filter_fn(dict(state), vit).items() if not k.startswith("head.")
    }
    own = vit.state_dict()
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
    vit.load_state_dict(state, strict=True)
    return vit


# -- adapters other than DPN -----------------------------------------------------------------------------------


def _refuse(options: dict, adapter: str) -> None:
    if options:
        raise ValueError(f"adapter {adapter!r} takes no adapter_options; got {', '.join(options)}")


def _inject_tuner(vit: VisionTransformer, adapter: str, blocks: range, options: dict) -> None:
    import peft

    targets = options.pop("target_modules", ("qkv", "proj"))
    targets = [targets] if isinstance(targets, str) else list(targets)
    matchable = sorted(
        {n for i in blocks for n, m in vit.blocks[i].named_modules() if isinstance(m, nn.Linear)}
    )
    for target in targets:
        if not any(re.fullmatch(rf"(.*\.)?{re.escape(target)}", n) for n in matchable):
            raise ValueError(
                f"target_modules {target!r} matches no linear layer of the last {len(blocks)} blocks; "
                f"there is {', '.join(matchable)}"
            )
    numbers, names = "|".join(map(str, blocks)), "|".join(map(re.escape, targets))
    pattern = rf"blocks\.({numbers})\.(.*\.)?({names})"
    kinds = {
        "lora": (peft.LoraConfig, {"r": 8, "lora_alpha": 16}),
        "dora": (peft.LoraConfig, {"r": 8, "lora_alpha": 16, "use_dora": True}),
        "oft": (peft.OFTConfig, {"oft_block_size": 32}),
    }
    kind, defaults = kinds[adapter]
    try:
        config = kind(target_modules=pattern, **{**defaults, **options})
    except TypeError as error:
        raise ValueError(f"adapter_options of {adapter}: {error}") from error
    peft.inject_adapter_in_model(config, vit)
