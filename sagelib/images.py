"""Pictures to tensors: decode, transform, load in order.

`Preprocess` prepares a picture for a model, `TrainTransform` varies it in training, and `loader` goes through
a `sagelib.places.Places` by index. torchvision is imported when the first tensor is made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from sagelib.runs import check, torch_seed

if TYPE_CHECKING:
    from sagelib.places import Places

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MODES = ("paper", "antialias", "autocontrast")


class PictureError(ValueError):
    """A picture does not decode; the sentence names the file."""

    def __init__(self, message: str) -> None:
        # torch's loader raises a worker's error anew with its traceback as message: its last line is ours.
        if message.startswith("Caught "):
            message = message.strip().splitlines()[-1].partition(": ")[2]
        super().__init__(message)


def load_image(path: str | os.PathLike | Image.Image) -> Image.Image:
    """Decode one picture wholly, as 8-bit RGB, upright; `path` may also be an open picture.

    EXIF's orientation is applied. Grey of more than 8 bits is scaled by the smallest range that holds all
    values: 0 to 1 (only where pixels are fractions), 255, 65,535 or 2,147,483,647. Raises FileNotFoundError,
    or PictureError if it does not decode.
    """
    try:
        if isinstance(path, Image.Image):
            return _upright_rgb(path)
        with Image.open(path) as picture:
            return _upright_rgb(picture)
    except FileNotFoundError:
        raise FileNotFoundError(f"{os.fspath(path)}: there is no such picture") from None
    except Exception as error:  # Pillow's plugins raise many kinds on broken bytes
        if isinstance(path, Image.Image):
            raise PictureError(f"this picture cannot be used ({error})") from None
        name = os.fspath(path)  # which Pillow's own sentence may repeat
        reason = str(error).replace(f" '{name}'", "").replace(f" {name!r}", "")
        words = f"this picture does not decode ({reason}); replace or remove the file"
        raise PictureError(f"{name}: {words}") from None


def _upright_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        exif, values = picture.getexif(), np.asarray(picture)
        ranges = (1, 255, 65_535, 2**31 - 1) if picture.mode == "F" else (255, 65_535, 2**31 - 1)
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > ranges[-1]:
            raise ValueError(f"its pixels are not all from 0 to {ranges[-1]}: save it with 8 bits a channel")
        scale = 255 / next(top for top in ranges if values.max() <= top)
        picture = Image.fromarray(np.rint(values * np.float64(scale)).astype(np.uint8))
        picture.info["exif"] = exif.tobytes()
    return ImageOps.exif_transpose(picture).convert("RGB")


@dataclass(frozen=True)
class Preprocess:
    """A picture as a float32 tensor (3, H, W): to [0, 1], ``(x - mean) / std``, then bilinear resize.

    Parameters
    ----------
    image_size : int or (int, int)
        Side, or height and width, in pixels: a multiple of the model's patch. 322 is the paper's evaluation.
    mode : {"paper", "antialias", "autocontrast"}
        ``"paper"``: no antialias, as the authors evaluate; the mode for released weights. ``"antialias"``:
        the better practice where pictures shrink. ``"autocontrast"``: antialias, and each colour channel is
        first stretched to 0..255, colour casts too; meant for dark photographs.
    resize : {"square", "short", "long"}
        ``"square"`` (the paper's): stretched to both sides. Else `image_size` is the short side or the long.
    multiple : int or None
        To which sides are rounded where the aspect is kept, in pixels; None: the model's patch.
    mean, std : float or (float, float, float)
        Of red, green and blue in [0, 1]; those of ImageNet, which every model of this package expects.

    Examples
    --------
    >>> Preprocess(28, resize="short", multiple=14)(Image.new("RGB", (40, 30))).shape
    torch.Size([3, 28, 42])
    """

    image_size: int | tuple[int, int] = 322
    mode: str = "paper"
    resize: str = "square"
    multiple: int | None = None
    mean: float | tuple[float, float, float] = IMAGENET_MEAN
    std: float | tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        check("mode", self.mode, choices=MODES)
        check("resize", self.resize, choices=("square", "short", "long"))
        check("multiple", self.multiple, 1, whole=True, none=True)
        if len(set(_sides(self.image_size))) > 1 and self.resize != "square":
            raise ValueError(f"resize {self.resize!r} needs one side as image_size, got {self.image_size}")
        if not isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", tuple(self.image_size))
        for name, least in (("mean", None), ("std", 0)):
            values = getattr(self, name)
            values = values if isinstance(values, list | tuple) else [values] * 3
            check(f"the number of values of {name}", len(values), choices=(3,))
            values = tuple(float(check(name, value, above=least)) for value in values)
            object.__setattr__(self, name, values)

    def __repr__(self) -> str:
        """Size, mode and what is not as usual: descriptors are found by it."""
        shown = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        words = (f"{n}={v!r}" for n, v, usual in shown if v != usual or n in ("image_size", "mode"))
        return f"Preprocess({', '.join(words)})"

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        from torchvision.transforms.v2 import functional as F

        if self.mode == "autocontrast":
            picture = ImageOps.autocontrast(picture)
        sides = _sides(self.image_size)
        if self.resize != "square":
            edge = min(picture.size) if self.resize == "short" else max(picture.size)
            unit = self.multiple or 1
            scaled = (side * sides[0] / edge / unit for side in (picture.height, picture.width))
            sides = [max(1, round(side)) * unit for side in scaled]
        return F.resize(_normalised(picture, self.mean, self.std), sides, antialias=self.mode != "paper")


@dataclass(frozen=True)
class TrainTransform:
    """A training picture: [cut a window], resize, [RandAugment], to [0, 1], ImageNet normalisation.

    The paper does not state its own: size and RandAugment (three operations, bilinear) are those of its
    ancestors (EMVP, SALAD); the window is not. A picture's random numbers come from (seed, epoch, index)
    alone, whatever the workers and the order, and torch's global generator is left as it was.

    Parameters
    ----------
    image_size, autocontrast, seed : int or (int, int), bool, int
        In pixels; as the mode of `Preprocess`; of the random numbers.
    randaugment : int or None
        Operations per picture, at least 1; None: no augmentation.
    crop : float or None
        Smallest share of the picture's area that a window covers, in (0, 1]; its sides keep the picture's
        ratio within 3:4 to 4:3. None: the whole picture.
    """

    image_size: int | tuple[int, int] = 224
    randaugment: int | None = 3
    crop: float | None = None
    autocontrast: bool = False
    seed: int = 0
    takes_index = True

    def __post_init__(self) -> None:
        _sides(self.image_size)
        check("randaugment", self.randaugment, 1, whole=True, none=True)
        check("crop", self.crop, above=0, high=1, none=True)
        # In shared memory, so that worker processes, which live on between epochs, see a change too.
        object.__setattr__(self, "_epoch", torch.zeros((), dtype=torch.int64).share_memory_())

    def set_epoch(self, epoch: int) -> None:
        """Draw other augmentations from now on: call it before the loader is iterated."""
        self._epoch.fill_(check("epoch", epoch, 0, whole=True))

    def __call__(self, picture: Image.Image, index: int) -> torch.Tensor:
        """The float32 tensor (3, H, W) of the picture at this index of its table."""
        from torchvision.transforms.v2 import InterpolationMode, RandAugment, RandomResizedCrop

        height, width = _sides(self.image_size)
        if self.autocontrast:
            picture = ImageOps.autocontrast(picture)
        # torchvision draws from torch's global CPU generator: lend it a seed, and put its state back after.
        with torch.random.fork_rng(devices=[]):
            seed = torch_seed(self.seed, "augment", int(self._epoch), int(index))
            torch.random.default_generator.manual_seed(seed)
            if self.crop is not None:
                ratio = picture.width / picture.height  # which need not be 1
                ratios = (0.75 * ratio, ratio / 0.75)
                picture = RandomResizedCrop((height, width), scale=(self.crop, 1.0), ratio=ratios)(picture)
            elif picture.size != (width, height):
                picture = picture.resize((width, height), Image.Resampling.BILINEAR)
            if self.randaugment is not None:
                picture = RandAugment(self.randaugment, interpolation=InterpolationMode.BILINEAR)(picture)
        return _normalised(picture)


@dataclass(frozen=True)
class Views:
    """Versions of each picture: row r shows number ``r % count``, the plain one, then augmented ones."""

    plain: Preprocess
    augmented: TrainTransform
    count: int
    takes_index = True

    def __call__(self, picture: Image.Image, row: int) -> torch.Tensor:
        return self.augmented(picture, row) if row % self.count else self.plain(picture)


class _Pictures(Dataset):
    def __init__(self, paths: np.ndarray, transform: Callable) -> None:
        self.paths, self.transform = paths, transform

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        more = (index,) if getattr(self.transform, "takes_index", False) else ()
        return self.transform(load_image(self.paths[index]), *more), index


def loader(places: Places, transform: Callable, *, batches: Iterable[list[int]], workers: int = 0):
    """A DataLoader of ``(images (B, 3, H, W) float32, indices (B,) int64)``; PictureError if one is broken.

    Parameters
    ----------
    transform : callable
        From a PIL picture to a tensor; called with the index too if it has a true attribute ``takes_index``.
    batches, workers : iterable of list of int, int
        The indices of every batch; processes that decode ahead, and live on between epochs (0: none).
    """
    return DataLoader(
        _Pictures(places.path, transform),
        batch_sampler=batches,
        num_workers=check("workers", workers, 0, whole=True),
        persistent_workers=workers > 0,
        # A generator of its own: DataLoader would draw its base seed from the global one at every iteration.
        generator=torch.Generator().manual_seed(0),
    )


def _normalised(picture: Image.Image, mean=IMAGENET_MEAN, std=IMAGENET_STD) -> torch.Tensor:
    from torchvision.transforms.v2 import functional as F

    pixels = F.to_dtype(F.pil_to_tensor(picture), torch.float32, scale=True)
    return F.normalize(pixels, mean, std)


def _sides(image_size: int | tuple[int, int]) -> list[int]:
    sides = [image_size] * 2 if isinstance(image_size, int) else list(image_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
        raise ValueError(f"image_size must be a side or (height, width) of at least 1 pixel, got {sides}")
    return sides
