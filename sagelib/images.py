"""Pictures to tensors: decode, transform, load in order.

Three named ways to prepare a picture for a model (`Preprocess`), one way to vary it in training
(`TrainTransform`), and a data set and loader that go through `sagelib.places.Places` by index. torchvision is
imported when the first tensor is made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from sagelib.runs import torch_seed

if TYPE_CHECKING:
    from sagelib.places import Places

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "PictureError",
    "PlaceImages",
    "Preprocess",
    "TrainTransform",
    "Views",
    "load_image",
    "loader",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MODES = ("paper", "antialias", "autocontrast")


class PictureError(ValueError):
    """A picture does not decode; the sentence names the file."""

    def __init__(self, message: str) -> None:
        # torch's loader raises the error of a worker process anew, with the worker's whole traceback as its
        # message; the sentence is the traceback's last line.
        if message.startswith("Caught "):
            message = message.strip().splitlines()[-1].partition(": ")[2]
        super().__init__(message)


def load_image(path: str | os.PathLike | Image.Image) -> Image.Image:
    """Decode one picture wholly, as 8-bit RGB, upright; `path` may also be an open picture.

    The orientation that phones write beside the pixels (EXIF) is applied: without it a photograph held
    upright would lie on its side. Grey pictures of more than 8 bits are scaled by their range, the smallest of 0 to 1 (only
    where pixels are fractions), 255, 65,535 and 2,147,483,647 that holds all values.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    PictureError
        A ValueError, if it does not decode as a picture; the sentence names the file.
    """
    try:
        if isinstance(path, Image.Image):
            return _upright_rgb(path)
        with Image.open(path) as picture:
            return _upright_rgb(picture)
    except FileNotFoundError:
        raise FileNotFoundError(f"{os.fspath(path)}: there is no such picture") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(path, Image.Image):
            raise PictureError(f"this picture cannot be used ({error})") from None
        # Pillow's own sentence may repeat the file's name; what counts is its last part.
        reason = str(error).replace(f" '{os.fspath(path)}'", "").replace(f" {os.fspath(path)!r}", "")
        raise PictureError(
            f"{os.fspath(path)}: this picture does not decode ({reason}); replace or remove the file"
        ) from None


def _upright_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        exif, values = picture.getexif(), np.asarray(picture)
        ranges = (1, 255, 65_535, 2**31 - 1) if picture.mode == "F" else (255, 65_535, 2**31 - 1)
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > ranges[-1]:
            raise ValueError(
                f"its pixels are not all from 0 to {ranges[-1]} (mode {picture.mode}): save it with 8 bits a channel"
            )
        scale = 255 / next(top for top in ranges if values.max() <= top)
        picture = Image.fromarray(np.rint(values * np.float64(scale)).astype(np.uint8))
        picture.info["exif"] = exif.tobytes()
    return ImageOps.exif_transpose(picture).convert("RGB")


@dataclass(frozen=True)
class Preprocess:
    """A picture as a tensor: to [0, 1], ImageNet normalisation, then bilinear resize of the tensor.

    The aspect ratio is not kept: every picture fills the size.

    Parameters
    ----------
    image_size : int or (int, int)
        Side, or height and width, in pixels. 322 is the size of the paper's evaluation; with a patch of 14
        pixels use multiples of 14.
    mode : {"paper", "antialias", "autocontrast"}
        ``"paper"``: no antialias, as the authors' evaluation code does; the mode for released weights.
        ``"antialias"``: the same with antialias, the better practice where pictures shrink.
        ``"autocontrast"``: before that, each colour channel is stretched to 0..255
        (`PIL.ImageOps.autocontrast`, per channel, so a colour cast goes too), then as ``"antialias"``. Meant
        for dark photographs.

    Raises
    ------
    ValueError
        For an unknown mode or a size below 1.

    Examples
    --------
    >>> Preprocess(28)(Image.new("RGB", (40, 30))).shape
    torch.Size([3, 28, 28])
    """

    image_size: int | tuple[int, int] = 322
    mode: str = "paper"

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", _size(self.image_size))
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        """Return a float32 tensor (3, H, W)."""
        from torchvision.transforms.v2 import functional as F

        if self.mode == "autocontrast":
            picture = ImageOps.autocontrast(picture)
        size = [self.image_size] * 2 if isinstance(self.image_size, int) else list(self.image_size)
        return F.resize(_normalised(picture), size, antialias=self.mode != "paper")


class TrainTransform:
    """A training picture: [cut a window], resize, [RandAugment], to [0, 1], ImageNet normalisation, repeatably.

    The paper does not state its training transform. Size, RandAugment with three operations and its bilinear
    interpolation are those of the direct ancestors (EMVP, SALAD); the window is not theirs. The random numbers of a picture come from
    (seed, epoch, index) alone, so they depend on neither workers nor order, and torch's global generator is
    left as it was.

    Parameters
    ----------
    image_size : int or (int, int)
        Side, or height and width, in pixels.
    randaugment : int or None
        Operations per picture, at least 1; None: no augmentation.
    magnitude : int
        Strength of each operation, 0 to 30 (torchvision's default, 9).
    crop : float or None
        Smallest share of the picture's area that a window covers, in (0, 1]; its sides keep the picture's ratio within 3:4 to
        4:3 (torchvision's `RandomResizedCrop`). None: the whole picture.
    autocontrast : bool
        Stretch each channel to 0..255 first, as `Preprocess` does in the mode of that name.
    seed : int
    """

    takes_index = True

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        *,
        randaugment: int | None = 3,
        magnitude: int = 9,
        crop: float | None = None,
        autocontrast: bool = False,
        seed: int = 0,
    ) -> None:
        self.image_size = _size(image_size)
        if randaugment is not None and randaugment < 1:
            raise ValueError(f"randaugment must be None or an integer >= 1, got {randaugment}")
        if not 0 <= magnitude <= 30:
            raise ValueError(f"magnitude must lie in 0..30, got {magnitude}")
        if crop is not None and not 0 < crop <= 1:
            raise ValueError(f"crop must be None or lie in (0, 1], got {crop}")
        self.crop, self.autocontrast = crop, autocontrast
        self.randaugment = randaugment
        self.magnitude = magnitude
        self.seed = seed
        # In shared memory, so that the loader's worker processes, which live on between epochs, see a change
        # too.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw other augmentations from now on: call it before the loader is iterated."""
        if epoch < 0:
            raise ValueError(f"epoch must be an integer >= 0, got {epoch}")
        self._epoch.fill_(epoch)

    def __call__(self, picture: Image.Image, index: int) -> torch.Tensor:
        """Return the float32 tensor (3, H, W) of the picture at this index of its table."""
        from torchvision.transforms.v2 import InterpolationMode, RandAugment, RandomResizedCrop

        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        if self.autocontrast:
            picture = ImageOps.autocontrast(picture)
        # torchvision draws from torch's global CPU generator: lend it a seed, and put its state back after.
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(
                torch_seed(self.seed, "augment", self.epoch, int(index))
            )
            if self.crop is not None:
                # Shares and ratios are those of the picture, which need not be square.
                ratio = picture.width / picture.height
                cut = RandomResizedCrop(
                    (height, width), scale=(self.crop, 1.0), ratio=(0.75 * ratio, ratio / 0.75)
                )
                picture = cut(picture)
            elif picture.size != (width, height):
                picture = picture.resize((width, height), Image.Resampling.BILINEAR)
            if self.randaugment is not None:
                picture = RandAugment(
                    self.randaugment, self.magnitude, interpolation=InterpolationMode.BILINEAR
                )(picture)
        return _normalised(picture)

    def __repr__(self) -> str:
        return (
            f"TrainTransform({self.image_size}, randaugment={self.randaugment}, magnitude={self.magnitude}, "
            f"crop={self.crop}, autocontrast={self.autocontrast}, seed={self.seed})"
        )


class Views:
    """A fixed number of versions of each picture: the picture itself, then augmented ones.

    A function of the row alone, so that what a frozen network makes of each version may be kept.

    Parameters
    ----------
    plain : Preprocess
    augmented : TrainTransform
    count : int
        Versions of a picture, the plain one among them. Row r shows version ``r % count``.
    """

    takes_index = True

    def __init__(self, plain: Preprocess, augmented: TrainTransform, count: int) -> None:
        self.plain, self.augmented, self.count = plain, augmented, count

    def __call__(self, picture: Image.Image, row: int) -> torch.Tensor:
        """Return the float32 tensor (3, H, W) of a row."""
        return self.augmented(picture, row) if row % self.count else self.plain(picture)

    def __repr__(self) -> str:
        return f"Views({self.plain}, {self.augmented}, {self.count})"


class PlaceImages(Dataset):
    """The pictures of a `Places` table as a torch data set of ``(tensor (3, H, W), index)``.

    Parameters
    ----------
    places : Places
    transform : callable
        From a PIL picture to a tensor; called with the index too if it has a true attribute ``takes_index``.
    """

    def __init__(self, places: Places, transform: Callable) -> None:
        # Only the paths: worker processes then copy no tables they do not read.
        self.paths = places.path
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        picture = load_image(self.paths[index])
        if getattr(self.transform, "takes_index", False):
            return self.transform(picture, index), index
        return self.transform(picture), index


def loader(
    places: Places,
    transform: Callable,
    batch_size: int | None = None,
    workers: int = 0,
    *,
    batches: Iterable[list[int]] | None = None,
    pin_memory: bool = False,
) -> DataLoader:
    """Batches ``(images (B, 3, H, W) float32, indices (B,) int64)`` in the table's order, the last one short.

    Parameters
    ----------
    places : Places
    transform : callable
        See `PlaceImages`.
    batch_size : int, optional
        Pictures a batch.
    workers : int
        Processes that decode ahead; 0: the calling process does.
    batches : iterable of list of int, optional
        The indices of every batch instead of `batch_size`: a sampler, or batches composed on purpose. Workers
        then live on between epochs.
    pin_memory : bool
        Page-locked batches, faster to copy to a CUDA device.

    Raises
    ------
    ValueError
        Unless exactly one of `batch_size` (at least 1) and `batches` is given, or if `workers` is negative.
        While iterating: if a picture does not decode.
    """
    if (batch_size is None) == (batches is None):
        raise ValueError("give either batch_size or batches, and not both")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be an integer >= 1, got {batch_size}")
    if workers < 0:
        raise ValueError(f"workers must be an integer >= 0, got {workers}")
    composition = {"batch_size": batch_size} if batches is None else {"batch_sampler": batches}
    return DataLoader(
        PlaceImages(places, transform),
        num_workers=workers,
        persistent_workers=workers > 0 and batches is not None,
        pin_memory=pin_memory,
        # A generator of its own: DataLoader would draw its base seed from the global one at every iteration.
        generator=torch.Generator().manual_seed(0),
        **composition,
    )


def _normalised(picture: Image.Image) -> torch.Tensor:
    from torchvision.transforms.v2 import functional as F

    return F.normalize(
        F.to_dtype(F.pil_to_tensor(picture), torch.float32, scale=True), IMAGENET_MEAN, IMAGENET_STD
    )


def _size(image_size: int | tuple[int, int]) -> int | tuple[int, int]:
    sides = [image_size] if isinstance(image_size, int) else [int(side) for side in image_size]
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise ValueError(
            f"image_size must be a side or (height, width) of at least 1 pixel, got {image_size!r}"
        )
    return image_size if isinstance(image_size, int) else tuple(sides)
