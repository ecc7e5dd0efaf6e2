"""Tokens of the frozen prefix, kept on disk: what no trained part can change is computed once.

In a model whose first trained part sits behind block b, the tokens after block b are a function of the image alone. Without
augmentation, or with a fixed number of augmented versions, the image is a function of its index, so every epoch, every refresh of
the graph and every validation would compute the same tokens again. Here they are written once, in float16, and read from a
memory-mapped file by all three; all of them see the same rounding.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from sagelib import runs
from sagelib.describe import pictures_fingerprint
from sagelib.images import Preprocess, Views, loader

__all__ = ["TokenStore", "open_tokens", "token_shape"]

FLUSH_S = 10.0  # seconds of work that a killed build may lose


class TokenStore:
    """The tokens of the images of one `Places`, in its order.

    Attributes
    ----------
    values : np.memmap (N, T, M) float16
        T tokens of width M an image, as ``model.backbone.prefix`` gives them.
    grid : (int, int)
        Rows and columns of the patch grid.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest = runs.read_json(self.folder / "manifest.json")
        self.grid = tuple(self.manifest["grid"])
        self.values = np.load(self.folder / "tokens.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, indices: np.ndarray) -> torch.Tensor:
        """The tokens of some images.

        Parameters
        ----------
        indices : array (n,) of int

        Returns
        -------
        Tensor (n, T, M), float32
        """
        return torch.from_numpy(np.asarray(self.values[np.asarray(indices)])).float()


def token_shape(model: torch.nn.Module, image_size: tuple[int, int]) -> tuple[int, int]:
    """Number of tokens T and width M that the frozen prefix gives for one image of `image_size` (height, width) pixels."""
    device = next(model.parameters()).device
    with torch.no_grad():
        tokens = model.backbone.prefix(torch.zeros(1, 3, *image_size, device=device))
    return tokens.shape[1], tokens.shape[2]


def open_tokens(
    folder: str | Path,
    model: torch.nn.Module,
    places,
    *,
    preprocess: Preprocess | Views,
    limit_gb: float,
    batch_size: int = 32,
    workers: int = 0,
    autocast: torch.dtype | None = None,
    progress: bool = True,
) -> TokenStore:
    """The stored tokens of `places`, computed now where they are missing.

    They are found by a key over the frozen prefix's weights, the images, their size and preparation, and the precision, so
    another model, set or size gets a folder of its own. A build that was killed goes on where it stopped. A second process
    that asks for the same tokens waits for the first, where the file system has locks.

    Parameters
    ----------
    folder : path
        Where all token stores live.
    model : module with ``backbone.prefix`` and ``backbone.prefix_fingerprint``
    places : Places
    preprocess : Preprocess or Views
        A function of the image alone, or of the row: with V views, row ``V i + v`` is version v of image i.
    limit_gb : float
        Gigabytes (1e9 bytes) that this store may take.
    batch_size : int
        Images at a time.
    workers : int
        Processes that load images.
    autocast : torch.dtype, optional
        Lower precision in which the prefix runs; None is float32.
    progress : bool
        Print the bytes needed and a bar.

    Raises
    ------
    ValueError
        If the tokens would take more than `limit_gb`, or do not fit into float16.
    """
    plain, views = (preprocess.plain, preprocess.count) if isinstance(preprocess, Views) else (preprocess, 1)
    # A square size may be one number of pixels.
    height, width = (plain.image_size,) * 2 if isinstance(plain.image_size, int) else plain.image_size
    tokens, channels = token_shape(model, (height, width))
    need_gb = len(places) * views * tokens * channels * 2 / 1e9
    if need_gb > limit_gb:
        raise ValueError(
            f"the frozen tokens of {len(places) * views} images would take {need_gb:.3g} GB (each {tokens} x {channels} in float16), more than "
            f"cache_limit_gb = {limit_gb:g}: raise the limit, or switch the cache off with cache_limit_gb = None"
        )
    key = runs.fingerprint(
        {
            "prefix": model.backbone.prefix_fingerprint(),
            "data": pictures_fingerprint(places),
            "preprocess": repr(preprocess),
            "autocast": str(autocast),
        }
    )
    places = places[np.repeat(np.arange(len(places)), views)]
    store = Path(folder) / key
    store.mkdir(parents=True, exist_ok=True)
    with runs.alone(store):
        if not (store / "manifest.json").exists():
            if progress:
                print(f"frozen tokens of {len(places)} images: {need_gb:.3g} GB on disk")
            seconds = _build(
                store,
                model,
                places,
                (len(places), tokens, channels),
                preprocess,
                batch_size,
                workers,
                autocast,
                progress,
            )
            runs.write_json(
                store / "manifest.json",
                {
                    "images": len(places),
                    "tokens": tokens,
                    "width": channels,
                    "grid": list(model.backbone.grid((1, 3, height, width))),
                    "gigabytes": need_gb,
                    "image_size": [height, width],
                    "preprocess": repr(preprocess),
                    "seconds": seconds,
                },
            )
    return TokenStore(store)


def _build(store, model, places, shape, preprocess, batch_size, workers, autocast, progress) -> float:
    """Write ``tokens.npy``, going on behind the last batch that an earlier build had flushed; return the seconds taken."""
    began = time.perf_counter()
    device = next(model.parameters()).device
    partial, counter = store / "tokens.partial.npy", store / "flushed.json"
    start = runs.read_json(counter)["images"] if counter.exists() and partial.exists() else 0
    if start:
        values = np.lib.format.open_memmap(partial, mode="r+")
    else:
        values = runs.new_array(partial, np.float16, shape)
    flushed, done = time.perf_counter(), start
    with tqdm(total=shape[0], initial=start, unit="image", desc="frozen tokens", disable=not progress) as bar:
        # By number, so that a view is the same one wherever a build goes on.
        rows = [list(range(i, min(i + batch_size, shape[0]))) for i in range(start, shape[0], batch_size)]
        for images, _ in loader(places, preprocess, workers=workers, batches=rows):
            with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                exact = model.backbone.prefix(images.to(device)).float()
            tokens = exact.half()
            lost = torch.linalg.vector_norm((exact - tokens).flatten(1), dim=1)
            kept = lost <= 0.01 * torch.linalg.vector_norm(exact.flatten(1), dim=1)  # False for a NaN
            if not kept.all():
                raise ValueError(
                    f"{places.path[done + int(kept.int().argmin())]}: its tokens do not fit into float16 (too large, too small "
                    "or not finite): switch the cache off with cache_limit_gb = None"
                )
            values[done : done + len(tokens)] = tokens.cpu().numpy()
            done += len(tokens)
            bar.update(len(tokens))
            if time.perf_counter() - flushed >= FLUSH_S:
                values.flush()
                runs.write_json(counter, {"images": done})
                flushed = time.perf_counter()
    values.flush()
    del values
    partial.replace(store / "tokens.npy")
    counter.unlink(missing_ok=True)
    return round(time.perf_counter() - began, 2)
