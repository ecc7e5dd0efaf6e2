"""The recipe of the small foundation: a vision transformer that learns from rendered towns and loose photographs.

``python -m sagelib.pretrain --out DIR`` makes the file that :class:`sagelib.backbone.Backbone` offers as
``sage_vit_tiny``. No place labels are used: nothing here knows which two pictures show one place. The order of the
file is the order of the recipe:

1. the material: views of towns whose seeds nobody else uses, each rendered by day and once more by the same camera in another
   light, weather or year, and a folder of frames, each packed into one array;
2. the targets: what a small convolutional network trained on photographs sees in a crop
   (:class:`MobileNetStages`), or, without such a network, the orientations of the crop's edges in patches that
   are hidden from the student (:func:`edge_orientations`);
3. the student's crops, two windows of each view: one by day, one of its other rendering, both darkened, tinted, blurred and
   noisy, so that light has to be explained away; the targets are always those of the picture by day;
4. the losses: every patch, the CLS token, the two crops of a view among those of all others, and how alike the teacher finds
   the pooled pictures of a batch;
5. the loop, which writes a checkpoint every few minutes and continues from it; the running average of the
   weights is what is exported, with a manifest.
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import platform
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageOps
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from tqdm.auto import tqdm

from sagelib.backbone import vit_tiny
from sagelib.describe import pick_device
from sagelib.images import IMAGENET_MEAN, IMAGENET_STD, load_image
from sagelib.retrieval import Recall, recall, search
from sagelib.runs import atomic_path, read_json, rng, save_array, torch_seed, write_json
from sagelib.town import CONDITIONS, SEED_RANGES, Pose, Town, TownConfig, plan_shots

__all__ = [
    "MobileNetStages",
    "PretrainConfig",
    "edge_orientations",
    "export",
    "file_sha256",
    "pack_frames",
    "pack_towns",
    "pretrain",
]

NAME = "sage_vit_tiny"
PATCH = 14
SCHEDULE = (
    "steps",
    "sides",
    "shares",
    "learning_rate",
    "muon_rate",
    "warmup",
    "average",
    "worsen_from",
    "worsen_full",
)
TEACHER_STRIDE = 16  # of the teacher's finest stage: crops are cut at 16 pixels a token and shrunk to 14


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """All numbers of the recipe.

    Parameters
    ----------
    seed : int
        Of weights, crops and augmentations.
    width, depth, heads : int
        Of the transformer; 192, 12, 3 is ``sage_vit_tiny``, 384, 12, 6 a ViT-S.
    layer_scale : float
        Where LayerScale starts. The 1e-5 of long trainings barely leaves the identity in a short one.
    steps : int
        Optimiser steps; the only number that may change between a run and its continuation.
    sides : tuple of int
        Side of the crops in pixels, one for each part of the run; multiples of 14. Small crops first: they cost less.
    shares : tuple of float
        Share of the steps of each part; they add up to 1.
    area : (float, float)
        Smallest and largest share of a picture that a crop covers.
    frame_share : float
        Share of a batch's pictures that come from the frames rather than from the towns, where both are given.
    group : int
        Pictures in a row that come from one town: they share an architecture, and are the harder to tell apart.
    learning_rate, beta2, weight_decay : float
        Of AdamW. The rate rises over `warmup` steps, then falls with a cosine to zero.
    muon_rate : float, optional
        Learning rate of Muon, which then trains the matrices inside the blocks while AdamW trains the rest: it learns
        more per step, and a step costs a quarter more. ``None``: AdamW trains all.
    warmup : int
        Steps.
    average : float
        Decay per step of the running average of the weights that is exported.
    pooled_weight, instance_weight, relation_weight : float
        Weights of the CLS token's loss, of the instances' and of the relations' beside the patches' 1; 0 is off.
    temperature : float
        Of the instances' loss.
    batch_size : int
        Pictures in a step; each gives two crops.
    hidden : float
        Share of the patches hidden from the student where there is no teacher.
    worsen_from, worsen_full : float
        Shares of the steps at which the student's pictures begin to be worsened, and at which four fifths of them are. A student
        that is shown worsened pictures from the first step hardly starts.
    towns, pictures_per_town : int
        Rendered views: that many of each of the first `towns` seeds for pre-training, each rendered twice.
    validation_towns : int
        How many of the last ten seeds for pre-training are used for validation, 0 to 10.
    picture_size, frame_size : (int, int)
        Height and width in pixels of the packed town pictures and frames.
    """

    seed: int = 0
    width: int = 192
    depth: int = 12
    heads: int = 3
    layer_scale: float = 0.5
    steps: int = 5000
    batch_size: int = 24
    sides: tuple[int, ...] = (112, 168)
    shares: tuple[float, ...] = (0.88, 0.12)
    area: tuple[float, float] = (0.25, 1.0)
    frame_share: float = 0.5
    group: int = 4
    learning_rate: float = 1e-3
    muon_rate: float | None = 3e-3
    beta2: float = 0.98
    weight_decay: float = 0.02
    warmup: int = 40
    average: float = 0.998
    pooled_weight: float = 0.2
    instance_weight: float = 0.2
    temperature: float = 0.1
    relation_weight: float = 0.0
    hidden: float = 0.4
    worsen_from: float = 0.15
    worsen_full: float = 0.6
    towns: int = 300
    pictures_per_town: int = 24
    validation_towns: int = 2
    picture_size: tuple[int, int] = (144, 200)
    frame_size: tuple[int, int] = (160, 284)

    def __post_init__(self):
        for name in ("area", "sides", "shares", "picture_size", "frame_size"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("width", "depth", "heads", "steps", "batch_size", "group", "towns", "pictures_per_town"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in ("frame_share", "average", "hidden", "worsen_from", "worsen_full"):
            _check(name, getattr(self, name), 0 <= getattr(self, name) <= 1, "0 to 1")
        _check("temperature", self.temperature, self.temperature > 0, "above 0")
        for side in self.sides:
            _check("sides", self.sides, side >= 28 and side % PATCH == 0, f"multiples of {PATCH}, 28 or more")
        whole = len(self.shares) == len(self.sides) and abs(sum(self.shares) - 1) < 1e-6
        _check("shares", self.shares, whole, f"{len(self.sides)} numbers that add up to 1")
        _check("area", self.area, 0 < self.area[0] <= self.area[1] <= 1, "0 < smallest <= largest <= 1")
        _check("validation_towns", self.validation_towns, 0 <= self.validation_towns <= 10, "0 to 10")
        _check("width", self.width, self.width % self.heads == 0, f"a multiple of heads = {self.heads}")
        _check("towns", self.towns, self.towns <= 990, "1 to 990 (the last ten seeds are for validation)")


def _check(name: str, value, good: bool, allowed: str) -> None:
    if not good:
        raise ValueError(f"{name} must be {allowed}, got {value}")


# ---------------------------------------------------------------------------------------------------------------
# 1. Material
# ---------------------------------------------------------------------------------------------------------------


def _towns_pictures(seed: int, n: int, size: tuple[int, int]) -> np.ndarray:
    """`n` views of one town, any street, heading and lens, the town as varied as it gets: (n, 2, height, width, 3).

    Each view is rendered by day, and again by the same camera in any light and weather, at another moment and, every other time,
    another year. What one camera saw is all that says the two belong together: no place has a label.
    """
    generator = rng(seed, "pretrain", "town")
    config = TownConfig(
        neighbourhoods=int(generator.integers(2, 7)),
        architecture_variety=float(generator.uniform(0.3, 1)),
        occlusion=float(generator.uniform(0, 0.8)),
        sensor_noise=float(generator.uniform(0, 8)),
    )
    town = Town(seed, config)
    shots = plan_shots(town, "train/database")
    pictures = np.empty((n, 2, *size, 3), np.uint8)
    # Walls are painted anew for every year: two years a town are enough.
    years = generator.integers(4, size=2)
    for i in range(n):
        # Any station; half of them look along the street, half at the houses beside it.
        station = shots[generator.integers(len(shots))].pose
        pose = Pose(
            east_m=station.east_m,
            north_m=station.north_m,
            heading_deg=station.heading_deg + generator.uniform(-35, 35),
            fov_deg=generator.uniform(55, 95),
            height_m=generator.uniform(1.5, 2.8),
            tilt=generator.uniform(-0.05, 0.4),
        )
        moments = [("day", years[0]), (CONDITIONS[generator.integers(len(CONDITIONS))], years[i % 2])]
        for k, (condition, year) in enumerate(moments):
            # Crops are resized anyway; one ray per pixel makes twice to four times as many pictures.
            visit = int(generator.integers(1000))
            pictures[i, k] = town.render(pose, condition, size, year=int(year), visit=visit, oversample=1)
    return pictures


def pack_towns(
    seeds: Sequence[int], n: int, size: tuple[int, int], *, workers: int = 1, progress: bool = True
) -> np.ndarray:
    """Render `n` views of each town of `seeds`, by day and in another light: uint8 (len(seeds), n, 2, height, width, 3).

    Raises
    ------
    ValueError
        If a seed is not one of those kept for pre-training.
    """
    wrong = [s for s in seeds if s not in SEED_RANGES["pretrain"]]
    if wrong:
        raise ValueError(
            f"town seeds {wrong[:5]} are not among those for pre-training, {SEED_RANGES['pretrain']}"
        )
    render = partial(_towns_pictures, n=n, size=size)
    bar = partial(tqdm, total=len(seeds), desc="rendering", unit="town", disable=not progress)
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            return np.stack(list(bar(pool.map(render, seeds))))
    return np.stack(list(bar(map(render, seeds))))


def _towns_validation(seeds: Sequence[int], n: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`n` references and `n` queries of each town as `write_town` makes them, and who lies within 25 m of whom."""
    pictures, at = [], []
    for part in ("val/database", "val/queries"):
        rendered, stands = [], []
        for seed in seeds:
            town = Town(seed)
            for shot in plan_shots(town, part, n):
                rendered.append(
                    town.render(shot.pose, shot.condition, size, year=shot.year, visit=shot.visit)
                )
                stands.append((shot.pose.east_m, shot.pose.north_m))
        pictures.append(np.stack(rendered))
        at.append(np.array(stands))
    near = np.linalg.norm(at[1][:, None] - at[0][None], axis=2) <= 25.0
    return *pictures, near


def _open_towns(config: PretrainConfig, out: Path, *, workers: int, progress: bool) -> dict:
    path, held = out / "towns.npy", out / "towns_validation.npz"
    seeds = list(SEED_RANGES["pretrain"])[: config.towns]
    renderer = out / "towns.json"
    if not path.is_file():
        # The renderer may be improved between a run and a reader's question how its pictures were made.
        write_json(renderer, {"renderer_sha256": file_sha256(sys.modules[Town.__module__].__file__)})
        save_array(
            path,
            pack_towns(
                seeds, config.pictures_per_town, config.picture_size, workers=workers, progress=progress
            ),
        )
    if not held.is_file() and config.validation_towns:
        last = list(SEED_RANGES["pretrain"])[-config.validation_towns :]
        database, queries, near = _towns_validation(last, 120, 126)
        with atomic_path(held) as temporary:
            np.savez(temporary, database=database, queries=queries, near=near)
    validation = None
    if config.validation_towns:
        with np.load(held) as arrays:
            near = [np.flatnonzero(row) for row in arrays["near"]]
            validation = arrays["database"], arrays["queries"], near
    pictures = np.load(path, mmap_mode="r")
    expected = (config.towns, config.pictures_per_town, 2, *config.picture_size, 3)
    if pictures.shape != expected:
        raise ValueError(
            f"{path} holds pictures of shape {pictures.shape}, the configuration asks for {expected}: "
            "choose another --out, or delete the file to render anew"
        )
    return {
        "pictures": pictures,
        "validation": validation,
        "about": {
            "pictures": int(np.prod(pictures.shape[:3])),
            "seeds": [seeds[0], seeds[-1]],
            "size": list(config.picture_size),
            "sha256_of_pixels": hashlib.sha256(pictures).hexdigest(),
            **(read_json(renderer) if renderer.is_file() else {}),
        },
    }


def pack_frames(
    folder: Path, size: tuple[int, int], *, progress: bool = True
) -> tuple[np.ndarray, list[str]]:
    """Read every picture of a folder into one array, resized and cut to one size.

    Parameters
    ----------
    folder : path
        Holds .jpg or .png files; names that end in a number are frames of the sequence the rest names.
    size : (int, int)
        Height and width, pixels.

    Returns
    -------
    pictures : uint8 array (n, height, width, 3)
    names : list of str
        File names without their endings, sorted.

    Raises
    ------
    ValueError
        If there is no picture in the folder.
    """
    files = sorted(p for p in Path(folder).iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        raise ValueError(f"{folder} holds no .jpg or .png files: give a folder of photographs, or none")
    pictures = np.empty((len(files), *size, 3), np.uint8)
    for i, file in enumerate(tqdm(files, desc="reading frames", unit="picture", disable=not progress)):
        pictures[i] = np.asarray(ImageOps.fit(load_image(file), size[::-1]))
    return pictures, [p.stem for p in files]


def sequence_of(name: str) -> str:
    """The sequence a frame belongs to: its name without the number at its end."""
    return re.sub(r"[_-]*(frame)?[_-]*\d+$", "", name)


def _frames_validation(pictures: np.ndarray, names: list[str], seed: int) -> tuple | None:
    """Neighbouring frames: even ones are references; odd ones, darkened and cut, are to find the frames beside them."""
    if len(pictures) < 8:
        return None
    generator = rng(seed, "pretrain", "validation")
    database, queries, positives, rows = [], [], [], {}
    members: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        members.setdefault(sequence_of(name), []).append(i)
    for sequence, frames in members.items():
        for place, i in enumerate(frames[::2]):
            rows[sequence, place] = len(database)
            database.append(pictures[i])
    height, width = pictures.shape[1:3]
    for sequence, frames in members.items():
        for place, i in enumerate(frames[1::2]):
            near = [rows[sequence, p] for p in (place, place + 1) if (sequence, p) in rows]
            share = generator.uniform(0.75, 0.95)
            h, w = round(share * height), round(share * width)
            top, left = generator.integers(height - h + 1), generator.integers(width - w + 1)
            window = torch.from_numpy(np.ascontiguousarray(pictures[i, top : top + h, left : left + w]))
            window = F.interpolate(
                window.permute(2, 0, 1)[None], (height, width), mode="bilinear", antialias=True
            )
            dark = (window[0].permute(1, 2, 0).float() / 255) ** 1.5 * generator.uniform(0.3, 0.7)
            queries.append((dark * 255).round().byte().numpy())
            positives.append(np.asarray(near))
    return np.stack(database), np.stack(queries), positives


def _material(
    config: PretrainConfig,
    out: Path,
    *,
    frames: str | Path | None,
    towns: bool,
    workers: int,
    progress: bool,
) -> dict[str, dict]:
    """Pack each source once, under `out`; open what is packed."""
    found: dict[str, dict] = {}
    if towns:
        found["towns"] = _open_towns(config, out, workers=workers, progress=progress)
    if frames is not None:
        path = out / "frames.npy"
        if not path.is_file():
            pictures, names = pack_frames(Path(frames), config.frame_size, progress=progress)
            write_json(out / "frames.json", {"names": names, "size": list(config.frame_size)})
            save_array(path, pictures)
        names = read_json(out / "frames.json")["names"]
        pictures = np.load(path, mmap_mode="r")
        sequences = sorted({sequence_of(n) for n in names})
        held = set(sequences[::8]) if len(sequences) >= 8 else set()
        kept = np.array([sequence_of(n) not in held for n in names])
        left_out = np.flatnonzero(~kept)
        found["frames"] = {
            # As towns of one view that was taken once.
            "pictures": np.ascontiguousarray(pictures[kept])[:, None, None],
            "validation": _frames_validation(pictures[left_out], [names[i] for i in left_out], config.seed),
            "about": {
                "pictures": int(kept.sum()),
                "held_out_pictures": len(left_out),
                "held_out_sequences": len(held),
                "size": list(config.frame_size),
                "sha256_of_pixels": hashlib.sha256(pictures).hexdigest(),
            },
        }
    return found


# ---------------------------------------------------------------------------------------------------------------
# 2. Targets
# ---------------------------------------------------------------------------------------------------------------


class MobileNetStages(nn.Module):
    """MobileNetV2 up to its last linear bottleneck, frozen; gives its four deepest stages.

    Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (CVPR 2018), with batch normalisation
    folded into the convolutions. The outputs of bottlenecks have no activation, which makes them good targets for a
    linear layer.

    Parameters
    ----------
    path : path
        A .npz with ``NN.w`` (out, in, k, k), ``NN.b`` and ``NN.meta`` = [stride, padded as TensorFlow's SAME,
        activation (3 = ReLU6, 0 = none), depthwise] for each convolution in the network's order: stem; depthwise,
        project; then expand, depthwise, project for each further block. The classifier at the end is not needed.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, or it holds something else.
    """

    channels = (64, 96, 160, 320)

    def __init__(self, path: str | Path):
        super().__init__()
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no teacher file {path}: give a MobileNetV2 as .npz, or none")
        self.convolutions = nn.ModuleList()
        with np.load(path) as arrays:
            for i in range(51):
                try:
                    weight, bias, meta = (arrays[f"{i:02d}.{part}"] for part in ("w", "b", "meta"))
                except KeyError as error:
                    raise ValueError(
                        f"{path} has no array {error}: a MobileNetV2 of 51 or more convolutions is needed"
                    ) from None
                stride, _, activation, depthwise = (int(m) for m in meta)
                out, inner, k, _ = weight.shape
                conv = nn.Conv2d(
                    inner * (out if depthwise else 1),
                    out,
                    k,
                    stride,
                    # At stride 1 SAME is symmetric; at stride 2 the sides differ, see `_convolve`.
                    padding=k // 2 if stride == 1 else 0,
                    groups=out if depthwise else 1,
                )
                conv.weight.data.copy_(torch.from_numpy(weight.astype(np.float32)))
                conv.bias.data.copy_(torch.from_numpy(bias.astype(np.float32)))
                conv.relu6 = activation == 3
                self.convolutions.append(conv)
        self.requires_grad_(False).to(memory_format=torch.channels_last)

    def _convolve(self, x: Tensor, i: int) -> Tensor:
        conv = self.convolutions[i]
        if conv.stride[0] > 1:
            # TensorFlow's SAME: as much padding as is needed, the odd pixel at the end.
            pads = []
            for n in (x.shape[-1], x.shape[-2]):
                total = max((math.ceil(n / conv.stride[0]) - 1) * conv.stride[0] + conv.kernel_size[0] - n, 0)
                pads += [total // 2, total - total // 2]
            x = F.pad(x, pads)
        x = conv(x)
        return F.hardtanh_(x, 0.0, 6.0) if conv.relu6 else x

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """Give the last block of each of the four deepest stages.

        Parameters
        ----------
        images : Tensor (B, 3, H, W)
            Values 0 to 1.

        Returns
        -------
        list of Tensor
            (B, 64, H/16, W/16), (B, 96, H/16, W/16), (B, 160, H/32, W/32), (B, 320, H/32, W/32).
        """
        weight = self.convolutions[0].weight
        x = (images * 2 - 1).to(weight.dtype).contiguous(memory_format=torch.channels_last)
        for i in range(3):
            x = self._convolve(x, i)
        stages: dict[int, Tensor] = {}
        for i in range(3, len(self.convolutions), 3):
            y = self._convolve(self._convolve(self._convolve(x, i), i + 1), i + 2)
            x = x + y if x.shape == y.shape else y
            stages[y.shape[1]] = x
        return [stages[c] for c in self.channels]


def edge_orientations(images: Tensor, grid: tuple[int, int], bins: int = 9) -> Tensor:
    """Histograms of edge orientations and mean colours of each patch: targets that need no teacher.

    Dalal and Triggs' histograms (CVPR 2005) over 2 x 2 cells of a patch, as used for masked pictures by Wei et al.,
    "Masked Feature Prediction" (CVPR 2022), with the cells' mean colours beside them.

    Parameters
    ----------
    images : Tensor (B, 3, H, W)
        Values 0 to 1.
    grid : (int, int)
        Rows and columns of patches, h and w.

    Returns
    -------
    Tensor (B, 4 * (bins + 3), h, w)
    """
    grey = images.mean(1, keepdim=True)
    padded = F.pad(grey, (1, 1, 1, 1), mode="replicate")
    dx = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
    dy = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
    strength = (dx**2 + dy**2).sqrt()
    angle = torch.remainder(torch.atan2(dy, dx), math.pi) / math.pi * bins
    # Each pixel shares its strength between the two nearest orientations.
    low = torch.remainder(angle.floor(), bins).long()
    part = angle - angle.floor()
    histogram = torch.zeros(len(images), bins, *images.shape[-2:], dtype=images.dtype, device=images.device)
    histogram.scatter_add_(1, low, strength * (1 - part))
    histogram.scatter_add_(1, (low + 1) % bins, strength * part)
    cells = F.adaptive_avg_pool2d(torch.cat([histogram, images], 1), (2 * grid[0], 2 * grid[1]))
    edges, colour = cells[:, :bins], cells[:, bins:]
    edges = edges / (edges.norm(dim=1, keepdim=True) + 0.02)
    return F.pixel_unshuffle(torch.cat([edges, colour], 1), 2)


class Targets(nn.Module):
    """Teacher features of each patch, every channel standardised; without a teacher, edge orientations."""

    def __init__(self, teacher: MobileNetStages | None):
        super().__init__()
        self.teacher = teacher
        self.channels = sum(teacher.channels) if teacher is not None else 4 * (9 + 3)
        self.register_buffer("mean", torch.zeros(self.channels))
        self.register_buffer("std", torch.ones(self.channels))
        self.register_buffer("pooled_std", torch.ones(self.channels))

    def raw(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, C, h, w) of images (B, 3, H, W) with values 0 to 1."""
        if self.teacher is None:
            return edge_orientations(images, grid)
        stages = [s.float() for s in self.teacher(images)]
        stages = [
            s
            if s.shape[-2:] == grid
            else F.interpolate(s, size=grid, mode="bilinear", align_corners=False, antialias=False)
            for s in stages
        ]
        return torch.cat(stages, 1)

    @torch.no_grad()
    def fit(self, batches: list[Tensor], grid: tuple[int, int]) -> None:
        """Measure means and standard deviations on batches of crops."""
        values = torch.cat([self.raw(b, grid) for b in batches])
        self.mean.copy_(values.mean((0, 2, 3)))
        self.std.copy_(values.std((0, 2, 3)) + 1e-6)
        self.pooled_std.copy_(((values.mean((2, 3)) - self.mean) / self.std).std(0) + 1e-6)

    @torch.no_grad()
    def forward(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Standardised targets (B, C, h, w)."""
        return (self.raw(images, grid) - self.mean[:, None, None]) / self.std[:, None, None]


# ---------------------------------------------------------------------------------------------------------------
# 3. Crops
# ---------------------------------------------------------------------------------------------------------------


def random_views(
    sources: Sequence[np.ndarray],
    shares: Sequence[float],
    n: int,
    side: int,
    area: tuple[float, float],
    group: int,
    generator: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Draw `n` views, cut two random windows of each, resize them to `side` x `side` pixels, mirror half of the views.

    Parameters
    ----------
    sources : sequence of uint8 arrays (towns, views, renderings, H, W, 3)
    shares : sequence of float
        Share of the views that comes from each source.
    area : (float, float)
        Smallest and largest share of the picture.
    group : int
        Views in a row from one town, at the most.

    Returns
    -------
    clear : Tensor (2n, 3, side, side)
        float32, 0 to 1: all first windows, then all second ones, of each view's first rendering.
    seen : Tensor (2n, 3, side, side)
        The same windows, the second ones of each view's last rendering.
    """
    together = [min(group, pictures.shape[1]) for pictures in sources]
    # A draw gives `together` views, so that it must come the less often.
    chances = np.array([share / size for share, size in zip(shares, together, strict=True)])
    drawn: list[np.ndarray] = []
    while len(drawn) < n:
        source = generator.choice(len(sources), p=chances / chances.sum())
        town = sources[source][generator.integers(len(sources[source]))]
        chosen = generator.choice(len(town), together[source], replace=False)
        drawn += [town[i] for i in chosen[: n - len(drawn)]]
    clear = torch.empty(2, n, 3, side, side, dtype=torch.uint8)
    seen = torch.empty_like(clear)
    for k, view in enumerate(drawn):
        height, width = view.shape[1:3]
        mirror = generator.random() < 0.5
        for which in range(2):
            wanted = generator.uniform(*area) * height * width
            ratio = math.exp(generator.uniform(-math.log(4 / 3), math.log(4 / 3)))
            h = min(height, max(8, round(math.sqrt(wanted / ratio))))
            w = min(width, max(8, round(math.sqrt(wanted * ratio))))
            top, left = generator.integers(height - h + 1), generator.integers(width - w + 1)
            window = torch.from_numpy(view[[0, -1], top : top + h, left : left + w].copy())
            window = F.interpolate(window.permute(0, 3, 1, 2), (side, side), mode="bilinear", antialias=True)
            window = window.flip(-1) if mirror else window
            clear[which, k], seen[which, k] = window[0], window[which]
    return clear.flatten(0, 1).float() / 255, seen.flatten(0, 1).float() / 255


def worsen(images: Tensor, generator: torch.Generator, share: float = 0.8) -> Tensor:
    """Another light and a poorer camera for a share of the images (B, 3, H, W) with values 0 to 1.

    Gamma and gain (more often darker than lighter), a tint, sometimes grey, blur, and noise; the other images stay as
    they are.
    """
    b = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(b, *(shape or (1, 1, 1)), generator=generator) * (high - low) + low

    def often(probability: float) -> Tensor:
        return torch.rand(b, 1, 1, 1, generator=generator) < probability

    x = images.clamp(1e-3, 1) ** torch.exp2(uniform(-0.9, 1.3))
    x = x * torch.exp2(uniform(-1.6, 0.4)) * torch.exp2(uniform(-0.25, 0.25, 3, 1, 1))
    x = x + uniform(0, 0.12) * often(0.3)
    x = torch.where(often(0.2), x.mean(1, keepdim=True), x)
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.where(often(0.25), blurred, x)
    x = x + torch.randn(x.shape, generator=generator) * uniform(0, 0.05)
    return torch.where(often(share), x, images).clamp(0, 1)


def normalised(images: Tensor) -> Tensor:
    """ImageNet's normalisation, the one the package's transforms use."""
    mean = torch.tensor(IMAGENET_MEAN)[:, None, None]
    std = torch.tensor(IMAGENET_STD)[:, None, None]
    return (images - mean) / std


# ---------------------------------------------------------------------------------------------------------------
# 4. Losses
# ---------------------------------------------------------------------------------------------------------------


def cells(patches: Tensor, grid: tuple[int, int], n: int = 2) -> Tensor:
    """GeM with p = 3 over each of n x n cells of patches (B, N, M): (B * n * n, M)."""
    maps = patches.clamp(min=1e-6).pow(3).transpose(1, 2).unflatten(2, grid)
    pooled = F.adaptive_avg_pool2d(maps, n).pow(1 / 3)
    return pooled.permute(0, 2, 3, 1).flatten(0, 2)


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """One minus the mean correlation, row by row, of two tables of cosines.

    Which pictures the teacher finds alike, the student's pooled features shall find alike; how alike in absolute
    terms is left free (the inter-class relation of Huang et al., "Knowledge Distillation from A Stronger Teacher",
    NeurIPS 2022, between images instead of classes).

    Parameters
    ----------
    student : Tensor (n, M)
    teacher : Tensor (n, C)
    """
    n = len(student)
    away = ~torch.eye(n, dtype=torch.bool, device=student.device)
    rows = []
    for x in (student, teacher):
        x = F.normalize(x, dim=1)
        row = (x @ x.T)[away].view(n, n - 1)
        rows.append(F.normalize(row - row.mean(1, keepdim=True), dim=1))
    return 1 - (rows[0] * rows[1]).sum(1).mean()


def instance_loss(pooled: Tensor, temperature: float) -> Tensor:
    """How hard it is to find the second crop of each view by its first among all crops of the batch, and the other way round.

    The normalised temperature-scaled cross entropy of Chen et al., "A Simple Framework for Contrastive Learning of Visual
    Representations" (ICML 2020), on the descriptors themselves, without a projection.

    Parameters
    ----------
    pooled : Tensor (2n, M)
        All first crops, then all second ones.
    """
    n = len(pooled) // 2
    x = F.normalize(pooled, dim=1)
    similar = x @ x.T / temperature
    similar.fill_diagonal_(-math.inf)
    partner = torch.arange(2 * n, device=x.device).roll(n)
    return F.cross_entropy(similar, partner)


class Student(nn.Module):
    """The transformer and the two linear layers that only pre-training needs."""

    def __init__(self, config: PretrainConfig, channels: int):
        super().__init__()
        if (config.width, config.depth, config.heads) == (192, 12, 3):
            self.vit = vit_tiny(init_values=config.layer_scale)
        else:
            self.vit = VisionTransformer(
                img_size=224,
                patch_size=PATCH,
                embed_dim=config.width,
                depth=config.depth,
                num_heads=config.heads,
                init_values=config.layer_scale,
                num_classes=0,
                dynamic_img_size=True,
            )
        for module in self.vit.modules():
            # Glorot and Bengio's width-aware start; timm's fixed 0.02 leaves all patches alike for a long while.
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
        for block in self.vit.blocks:
            # On short sequences the plain matrix products are 1.7 times as fast on a CPU as the fused kernel.
            block.attn.fused_attn = False
        self.patch_head = nn.Linear(config.width, channels)
        self.cls_head = nn.Linear(config.width, channels)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """CLS token (B, M), patches (B, N, M), and what the two linear layers make of them."""
        tokens = self.vit.forward_features(images)
        cls, patches = tokens[:, 0], tokens[:, 1:]
        return cls, patches, self.cls_head(cls), self.patch_head(patches)


def losses(
    student: Student,
    images: Tensor,
    target: Tensor,
    config: PretrainConfig,
    targets: Targets,
    hidden: Tensor | None,
) -> dict[str, Tensor]:
    """The losses of a batch of normalised images (B, 3, H, W) and standardised targets (B, C, h, w).

    The second half of the batch shows the views of the first again. `hidden` (B, N), where given, marks the patches the first loss is taken on.
    """
    grid = tuple(target.shape[-2:])
    with torch.autocast(images.device.type, torch.bfloat16):
        _, patches, cls_out, patch_out = student(images)
    wanted = target.flatten(2).transpose(1, 2)
    per_patch = F.smooth_l1_loss(patch_out.float(), wanted, reduction="none").mean(2)
    out = {"patch": per_patch.mean() if hidden is None else per_patch[hidden].mean()}
    if config.pooled_weight:
        pooled = target.mean((2, 3)) / targets.pooled_std
        out["pooled"] = F.smooth_l1_loss(cls_out.float(), pooled)
    if config.instance_weight:
        out["instance"] = instance_loss(cells(patches.float(), grid, 1), config.temperature)
    if config.relation_weight and targets.teacher is not None:
        seen = cells(patches.float(), grid)
        shown = F.adaptive_avg_pool2d(target, 2).permute(0, 2, 3, 1).flatten(0, 2)
        out["relation"] = relation_loss(seen, shown)
    return out


# ---------------------------------------------------------------------------------------------------------------
# 5. The loop
# ---------------------------------------------------------------------------------------------------------------


def _rate(step: int, config: PretrainConfig) -> float:
    """The learning rate as a share of its largest value."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _worsened(step: int, config: PretrainConfig) -> float:
    """The share of the student's pictures that are worsened."""
    progress = step / max(1, config.steps)
    ramp = (progress - config.worsen_from) / max(1e-9, config.worsen_full - config.worsen_from)
    return 0.8 * min(1.0, max(0.0, ramp))


def _optimisers(student: "Student", config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon (Jordan et al., 2024) for the matrices of the blocks where the configuration says so."""
    matrices = [p for p in student.vit.blocks.parameters() if p.ndim == 2] if config.muon_rate else []
    taken = {id(p) for p in matrices}
    others = [p for p in student.parameters() if id(p) not in taken]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.beta2), fused=True)
    optimisers: list[torch.optim.Optimizer] = [adamw]
    if matrices:
        optimisers.append(
            torch.optim.Muon(
                matrices,
                lr=config.muon_rate,
                weight_decay=config.weight_decay,
                # Updates as large as AdamW's, so that rates mean the same for both.
                adjust_lr_fn="match_rms_adamw",
            )
        )
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["top_lr"] = group["lr"]
    return optimisers


def _side(step: int, config: PretrainConfig) -> int:
    ends = np.cumsum(config.shares) * config.steps
    return config.sides[min(int(np.searchsorted(ends, step, side="right")), len(config.sides) - 1)]


def _batch(
    step: int, config: PretrainConfig, sources: Sequence[np.ndarray], shares: Sequence[float]
) -> tuple[Tensor, Tensor, tuple[int, int], torch.Generator]:
    """The crops of one step at the teacher's resolution; they depend on the seed and the step alone."""
    side = _side(step, config)
    grid = (side // PATCH, side // PATCH)
    clear, seen = random_views(
        sources,
        shares,
        config.batch_size,
        grid[0] * TEACHER_STRIDE,
        config.area,
        config.group,
        rng(config.seed, "pretrain", "crops", step),
    )
    generator = torch.Generator().manual_seed(torch_seed(config.seed, "pretrain", "light", step))
    return clear, seen, grid, generator


def _student_view(
    images: Tensor,
    grid: tuple[int, int],
    generator: torch.Generator,
    hidden_share: float,
    worsened_share: float = 0.8,
) -> tuple[Tensor, Tensor | None]:
    small = F.interpolate(
        images, (grid[0] * PATCH, grid[1] * PATCH), mode="bilinear", antialias=True, align_corners=False
    )
    view = normalised(worsen(small, generator, worsened_share))
    if not hidden_share:
        return view, None
    hidden = torch.rand(len(images), grid[0] * grid[1], generator=generator) < hidden_share
    mask = hidden.view(-1, 1, *grid).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    return view.masked_fill(mask, 0.0), hidden


def pretrain(
    config: PretrainConfig,
    out: str | Path,
    *,
    frames: str | Path | None = None,
    teacher: str | Path | None = None,
    towns: bool = True,
    change: bool = False,
    stop_at: int | None = None,
    checkpoint_s: float = 180.0,
    export_s: float = 900.0,
    device: str = "cpu",
    workers: int = 1,
    progress: bool = True,
) -> Path:
    """Train, or continue training, in the directory `out`; export the weights and their manifest there.

    Parameters
    ----------
    config : PretrainConfig
    out : path
        Holds the packed pictures, ``checkpoint.pt``, ``log.jsonl``, ``sage_vit_tiny.safetensors`` and ``.json``.
    frames : path, optional
        Folder of photographs to use beside the towns. Every eighth sequence is kept for validation.
    teacher : path, optional
        A MobileNetV2 for :class:`MobileNetStages`. Without it the targets are :func:`edge_orientations` of hidden
        patches: self-supervised, on pictures alone, and weaker.
    towns : bool
        Render and use towns.
    change : bool
        Continue a run under another schedule (steps, sides, shares, rates, warm-up, average); the manifest's
        ``segments`` say which steps were made under which. Otherwise only `steps` may differ.
    stop_at : int, optional
        Leave after this step, as if killed right after a checkpoint.
    checkpoint_s, export_s : float
        Seconds between two checkpoints, and between two exports of the running average.
    device : str
        ``"cpu"``, ``"cuda"``, ``"mps"``, or ``"auto"``.
    workers : int
        Processes that render.

    Returns
    -------
    path
        The exported .safetensors.

    Raises
    ------
    ValueError
        If `out` holds a checkpoint of another configuration, naming what differs, or there is no material.
    """
    out, device = Path(out), pick_device(device)
    out.mkdir(parents=True, exist_ok=True)
    if not towns and frames is None:
        raise ValueError(
            "there is nothing to learn from: use the towns (towns=True), or give a folder as frames"
        )
    material = _material(config, out, frames=frames, towns=towns, workers=workers, progress=progress)
    sources = [m["pictures"] for m in material.values()]
    shares = [1.0] if len(sources) == 1 else [1 - config.frame_share, config.frame_share]

    network = None if teacher is None else MobileNetStages(teacher).bfloat16()
    targets = Targets(network).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(config.seed, "pretrain", "weights"))
        student = Student(config, targets.channels).to(device)
    optimisers = _optimisers(student, config)
    average = {k: v.detach().clone() for k, v in student.vit.state_dict().items()}
    about = {
        "config": json.loads(json.dumps(dataclasses.asdict(config))),
        "teacher_sha256": None if teacher is None else file_sha256(teacher),
        "material": {k: m["about"] for k, m in material.items()},
    }
    state = {"step": 0, "seconds": 0.0, "crops": 0, "segments": []}
    checkpoint = out / "checkpoint.pt"
    if checkpoint.is_file():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        _same_run(saved["about"], about, checkpoint, change)
        student.load_state_dict(saved["student"])
        if len(saved["optimisers"]) == len(optimisers):
            for optimiser, values in zip(optimisers, saved["optimisers"], strict=True):
                tops = [group["top_lr"] for group in optimiser.param_groups]
                optimiser.load_state_dict(values)
                for group, top in zip(optimiser.param_groups, tops, strict=True):
                    group["top_lr"] = top
        targets.load_state_dict(saved["targets"], strict=False)
        average, state = saved["average"], saved["state"]
    else:
        grid = (config.sides[0] // PATCH,) * 2
        targets.fit([_batch(-1 - i, config, sources, shares)[0].to(device) for i in range(8)], grid)

    def save() -> None:
        with atomic_path(checkpoint) as temporary:
            torch.save(
                {
                    "about": about,
                    "student": student.state_dict(),
                    "optimisers": [o.state_dict() for o in optimisers],
                    "targets": {
                        k: v for k, v in targets.state_dict().items() if not k.startswith("teacher.")
                    },
                    "average": average,
                    "state": state,
                },
                temporary,
            )

    def give() -> Path:
        weights = {k: v.cpu() for k, v in average.items()}
        manifest = {
            **about,
            **{k: state[k] for k in ("step", "crops", "segments")},
            "wall_time_s": round(state["seconds"], 1),
            "finished": state["step"] >= config.steps,
            "validation": _validate(weights, config, material),
            "probe": _probe(weights, config),
        }
        return export(weights, out / f"{NAME}.safetensors", manifest)

    student.train()
    began_at = state["step"]
    state["segments"] = [
        *state["segments"],
        {
            "from_step": began_at,
            "schedule": {k: about["config"][k] for k in SCHEDULE},
            "device": device.type,
            **_machine(),
        },
    ]
    last = config.steps if stop_at is None else min(stop_at, config.steps)
    saved_at = exported_at = tick = time.monotonic()
    bar = tqdm(total=config.steps, initial=began_at, unit="step", disable=not progress, mininterval=5)
    log = open(out / "log.jsonl", "a", encoding="utf-8")
    hidden_share = config.hidden if teacher is None else 0.0
    with log, bar:
        for step in range(began_at, last):
            clear, seen, grid, generator = _batch(step, config, sources, shares)
            view, hidden = _student_view(seen, grid, generator, hidden_share, _worsened(step, config))
            target = targets(clear.to(device), grid)
            view, hidden = view.to(device), None if hidden is None else hidden.to(device)
            parts = losses(student, view, target, config, targets, hidden)
            total = (
                parts["patch"]
                + config.pooled_weight * parts.get("pooled", 0)
                + config.instance_weight * parts.get("instance", 0)
                + config.relation_weight * parts.get("relation", 0)
            )
            student.zero_grad(set_to_none=True)
            total.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            for optimiser in optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = group["top_lr"] * _rate(step, config)
                optimiser.step()
            keep = min(config.average, (1 + step) / (10 + step))
            with torch.no_grad():
                now = student.vit.state_dict()
                torch._foreach_lerp_(list(average.values()), [now[k] for k in average], 1 - keep)

            before, tick = tick, time.monotonic()
            state["step"], state["crops"] = step + 1, state["crops"] + len(view)
            state["seconds"] += tick - before
            bar.update()
            if step % 50 == 49 or step + 1 == last:
                line = {k: round(v.item(), 5) for k, v in parts.items()}
                log.write(
                    json.dumps({"step": step + 1, "seconds": round(state["seconds"], 1), **line}) + "\n"
                )
                log.flush()
                bar.set_postfix(line | {"crops/s": f"{len(view) / (tick - before):.0f}"})
            if tick - saved_at > checkpoint_s:
                save()
                saved_at = tick
            if tick - exported_at > export_s:
                give()
                exported_at = time.monotonic()
    save()
    return give()


@torch.inference_mode()
def _gem_recall(vit: VisionTransformer, database: np.ndarray, queries: np.ndarray, positives: list) -> Recall:
    """R@1 of frozen features, GeM-pooled over the whole picture."""

    def describe(pictures: np.ndarray) -> np.ndarray:
        rows = []
        for start in range(0, len(pictures), 32):
            x = torch.from_numpy(np.ascontiguousarray(pictures[start : start + 32])).permute(0, 3, 1, 2)
            # The nearest whole number of patches on each side.
            sides = [max(1, round(n / PATCH)) * PATCH for n in x.shape[-2:]]
            x = F.interpolate(x, sides, mode="bilinear", antialias=True).float() / 255
            patches = vit.forward_features(normalised(x))[:, 1:]
            pooled = patches.clamp(min=1e-6).pow(3).mean(1).pow(1 / 3)
            rows.append(F.normalize(pooled, dim=1).numpy())
        return np.concatenate(rows)

    indices, _ = search(describe(database), describe(queries), 5)
    return recall(indices, positives, (1, 5))


def _validate(state: dict[str, Tensor], config: PretrainConfig, material: dict) -> dict:
    """R@1 on the validation part of each source, for the weights in `state`."""
    vit = Student(config, 1).vit.eval()
    vit.load_state_dict(state)
    out = {}
    for name, source in material.items():
        if source["validation"] is not None:
            result = _gem_recall(vit, *source["validation"])
            out[name] = {
                "R@1": round(result.percent(1), 2),
                "interval": [round(v, 2) for v in result.interval(1)],
                "queries": result.n_queries,
                "references": len(source["validation"][0]),
            }
    return out


def _same_run(saved: dict, about: dict, path: Path, change: bool) -> None:
    free = SCHEDULE if change else ("steps",)
    differs = [
        f"{k} ({saved['config'].get(k)} -> {v})"
        for k, v in about["config"].items()
        if k not in free and saved["config"].get(k) != v
    ] + [k for k in ("teacher_sha256", "material") if saved[k] != about[k]]
    if differs:
        raise ValueError(
            f"{path} belongs to another run: {', '.join(differs)}; choose another --out, or delete it"
        )


def _machine() -> dict:
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        named = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        processor = named.group(1) if named else processor
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": {
            "python": platform.python_version(),
            **{p: importlib.metadata.version(p) for p in ("torch", "timm", "numpy", "pillow")},
        },
    }


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def probe_images(n: int = 3, side: int = 126) -> Tensor:
    """Pictures made by arithmetic alone (n, 3, side, side), normalised: the same everywhere, to check weights with."""
    y, x = torch.meshgrid(torch.arange(side) / side, torch.arange(side) / side, indexing="ij")
    pictures = [
        torch.stack(
            [0.5 + 0.5 * torch.sin(6.3 * (1 + k + c) * (x * (k + 1) + y * (c + 1))) for c in range(3)]
        )
        for k in range(n)
    ]
    return normalised(torch.stack(pictures))


def _probe(state: dict[str, Tensor], config: PretrainConfig) -> list[list[float]]:
    # Of the weights as they will be read back, rounded to float16.
    vit = Student(config, 1).vit
    vit.load_state_dict({k: v.half().float() for k, v in state.items()})
    return [[round(v, 5) for v in row[:8].tolist()] for row in probe_descriptors(vit)]


@torch.no_grad()
def probe_descriptors(vit: VisionTransformer) -> Tensor:
    """GeM-pooled unit descriptors (n, M) of :func:`probe_images`, in float32."""
    vit = vit.eval()
    patches = vit.forward_features(probe_images())[:, 1:]
    return F.normalize(patches.clamp(min=1e-6).pow(3).mean(1).pow(1 / 3), dim=1)


def export(state: dict[str, Tensor], path: str | Path, manifest: dict) -> Path:
    """Write weights as float16 .safetensors and, beside them, a .json that says how they were made.

    The manifest is written last and holds the weights' SHA-256.
    """
    path = Path(path)
    half = {k: v.to(torch.float16).contiguous() for k, v in state.items()}
    with atomic_path(path) as temporary:
        save_file(half, str(temporary), metadata={"format": "pt"})
        # Readable by all, as any file of the package: the writer above makes it private.
        temporary.chmod(0o644)
    write_json(
        path.with_suffix(".json"),
        {
            "name": NAME,
            "sha256": file_sha256(path),
            "bytes": path.stat().st_size,
            "parameters": sum(v.numel() for v in half.values()),
            "dtype": "float16",
            **manifest,
        },
    )
    return path


def _number_or_none(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe from the command line; ``--help`` lists every number."""
    parser = argparse.ArgumentParser(
        prog="python -m sagelib.pretrain",
        description="Pre-train the small foundation. The same command again continues where it stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", required=True, help="directory of the run, made if need be")
    parser.add_argument("--frames", help="folder of photographs to learn from beside the towns")
    parser.add_argument(
        "--teacher", help="a MobileNetV2 as .npz to learn features from; without it, edges of hidden patches"
    )
    parser.add_argument("--no-towns", action="store_true", help="learn from the frames alone")
    parser.add_argument("--change", action="store_true", help="continue under another schedule")
    parser.add_argument("--threads", type=int, help="threads of PyTorch")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps or auto")
    parser.add_argument("--workers", type=int, default=1, help="processes that render the towns")
    fields = {f.name: f for f in dataclasses.fields(PretrainConfig)}
    for name, spec in fields.items():
        several = isinstance(spec.default, tuple)
        kind = type(spec.default[0]) if several else type(spec.default)
        if name == "muon_rate":
            kind = _number_or_none
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            nargs="+" if several else None,
            default=spec.default,
            help="see PretrainConfig",
        )
    options = vars(parser.parse_args(arguments))
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    try:
        path = pretrain(
            PretrainConfig(**{name: options[name] for name in fields}),
            options["out"],
            frames=options["frames"],
            teacher=options["teacher"],
            towns=not options["no_towns"],
            change=options["change"],
            device=options["device"],
            workers=options["workers"],
        )
    except (ValueError, OSError) as error:
        sys.exit(f"sagelib.pretrain: {error}")
    print(path)


if __name__ == "__main__":
    main()
