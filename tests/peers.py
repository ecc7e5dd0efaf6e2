"""A peer for tables of photographs: MobileNetV2 (ImageNet) from an archive of its folded convolutions.

``SAGE_DATA`` names the folder of the photographs; the archive lies in ``weights`` beside it. Name it
``peers:mobilenet_v2:cells=2`` with this folder on ``PYTHONPATH``.
"""

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from sagelib.images import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from sagelib.places import open_training_set

ARCHIVE = "mobilenet_v2_imagenet_fp16.npz"
TAPS = (10, 13, 14, 16)  # of its blocks, as in the sets' own reference points


class MobileNetV2(nn.Module):
    """Pictures as `Preprocess` gives them -> four stages, channels standardised, means over cells."""

    def __init__(self, archive: Path, cells: int):
        super().__init__()
        self.cells, stored = cells, np.load(archive)
        self.layers = []
        for i in range(len(stored.files) // 3):
            weight, bias = (torch.from_numpy(stored[f"{i:02d}.{k}"].astype(np.float32)) for k in "wb")
            self.register_buffer(f"weight{i}", weight)
            self.register_buffer(f"bias{i}", bias)
            self.layers.append([int(v) for v in stored[f"{i:02d}.meta"]])
        self.of = [torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)]
        width = sum(len(getattr(self, f"bias{3 * tap + 2}")) for tap in TAPS)
        self.register_buffer("mean", torch.zeros(1, width, 1, 1))
        self.register_buffer("std", torch.ones(1, width, 1, 1))

    def convolve(self, x, i):
        stride, same, activation, depthwise = self.layers[i]
        weight = getattr(self, f"weight{i}")
        if same and (size := weight.shape[-1]) > 1:  # TensorFlow's rule: the odd pixel goes right and below
            pads = [max((-(-n // stride) - 1) * stride + size - n, 0) for n in (x.shape[3], x.shape[2])]
            x = F.pad(x, [side for p in pads for side in (p // 2, p - p // 2)])
        groups = x.shape[1] if depthwise else 1
        x = F.conv2d(x, weight, getattr(self, f"bias{i}"), stride, groups=groups)
        return x.clamp(0, 6) if activation else x

    def stages(self, images):
        """Outputs of the stem's project, of each block, and of the last convolution before the classes."""
        x = 2 * (images * self.of[1] + self.of[0]) - 1
        for i in range(3):
            x = self.convolve(x, i)
        maps = [x]
        for first in range(3, 51, 3):
            y = self.convolve(self.convolve(self.convolve(x, first), first + 1), first + 2)
            x = x + y if x.shape == y.shape else y
            maps.append(x)
        return [*maps, self.convolve(x, 51)]

    def classify(self, images):
        pooled = self.stages(images)[-1].mean((2, 3), keepdim=True)
        return self.convolve(pooled, 52).flatten(1)

    def taps(self, images):
        maps = self.stages(images)
        size = maps[TAPS[0]].shape[2:]
        return torch.cat([F.interpolate(maps[t], size, mode="bilinear") for t in TAPS], 1)

    @torch.no_grad()
    def standardise_from(self, pictures):
        maps = self.taps(torch.stack(pictures))
        self.std, self.mean = torch.std_mean(maps, (0, 2, 3), keepdim=True)

    def forward(self, images):
        maps = (self.taps(images) - self.mean) / self.std
        return F.normalize(F.adaptive_avg_pool2d(maps, self.cells).flatten(1), dim=1)


def mobilenet_v2(cells: int = 1) -> MobileNetV2:
    """The network, standardised by 256 training pictures of ``sf-streets``, as SAGE's features are there."""
    data = Path(os.environ["SAGE_DATA"])
    model = MobileNetV2(data.parent / "weights" / ARCHIVE, cells).eval()
    places = open_training_set(data, "sf-streets")
    chosen = np.random.default_rng(0).choice(len(places), 256, replace=False)
    look = Preprocess(224, mode="antialias")
    model.standardise_from([look(Image.open(places.path[i]).convert("RGB")) for i in chosen])
    return model
