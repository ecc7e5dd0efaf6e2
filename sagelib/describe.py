"""Pictures to descriptors on disk: streamed, resumable, in a stated context; and tokens of a frozen prefix.

Two passes. The first stores each picture's descriptor before the InteractHead, a function of the picture alone.
The second, much cheaper, sends stored descriptors through the head in batches composed as a `Context` says.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from sagelib import runs
from sagelib.images import IMAGENET_MEAN, IMAGENET_STD, Preprocess, Views, load_image
from sagelib.places import folder_name

FLUSH_S = 2.0  # progress is recorded this often: a kill costs this much work and one batch
FORMAT = 2  # of the stores; those of another one are made anew


# --------------------------------------------------------------------------------------------------- context
@dataclass(frozen=True)
class Context:
    """Which images share a batch of the InteractHead, and so what a descriptor depends on.

    ``none``: the head is off. ``solo``: each image alone. ``sorted-n``: batches of n images in the order of their
    file names; this is how the authors of SAGE evaluate, and where queries and references sort alike it puts true
    pairs into like batches. ``shuffled-n``: batches of n in a random order. ``anchors``: each image with one fixed
    set of reference descriptors. No batch holds queries and references.

    Examples
    --------
    >>> Context.parse("sorted-8")
    Context(kind='sorted', n=8)
    """

    kind: str
    n: int | None = None

    def __post_init__(self):
        if self.kind not in ("none", "solo", "sorted", "shuffled", "anchors"):
            raise ValueError(f"context {self.kind!r} is unknown; {_CONTEXTS}")
        if self.batched and not self.n:
            raise ValueError(f"context {self.kind!r} needs a batch size of at least 1; {_CONTEXTS}")
        if not self.batched and self.n is not None:
            raise ValueError(f"context {self.kind!r} takes no batch size, got {self.n}; {_CONTEXTS}")

    @property
    def batched(self) -> bool:
        """Whether a descriptor depends on the other images of its batch."""
        return self.kind in ("sorted", "shuffled")

    @classmethod
    def parse(cls, text: "str | Context") -> "Context":
        """Read ``none``, ``solo``, ``sorted-8``, ``shuffled-8`` or ``anchors``."""
        match = re.fullmatch(r"([a-z]+)(?:-(\d+))?", str(text).strip())
        if match is None:
            raise ValueError(f"context {text!r} cannot be read; {_CONTEXTS}")
        return cls(match[1], None if match[2] is None else int(match[2]))

    def __str__(self):
        return self.kind if self.n is None else f"{self.kind}-{self.n}"

    def batches(self, names: Sequence[str], *, seed: int = 0, loader: str = "") -> list[np.ndarray]:
        """Cut one loader's N images into batches of the head: int64 arrays, together every index once.

        Parameters
        ----------
        names : sequence of N str
            Sorted as strings (`names_in_order`); the permutation of ``shuffled-n`` starts from that order.
        seed, loader : int, str
            Of the permutation. References and queries need different names: two sets that are shuffled alike
            would share like batches, as under ``sorted-n``.
        """
        order, n = np.arange(len(names)), self.n or 128
        if self.batched:
            order = np.array(sorted(order, key=[str(name) for name in names].__getitem__), np.int64)
        if self.kind == "shuffled":
            order = order[runs.rng(seed, "context", str(self), loader).permutation(len(order))]
        return [order[start : start + n] for start in range(0, len(order), n)]


_CONTEXTS = "give one of none, solo, sorted-n, shuffled-n (n images a batch, as in sorted-8), anchors"


def names_in_order(places) -> list[str]:
    """The names that ``sorted-n`` sorts by: the paths.

    Pictures of Mapillary SLS as downloaded are sorted by their names in the ``@east@north@...`` layout, which is
    what the authors' batches are cut from.
    """
    if any(places.sequence):
        rows = zip(places.east_m, places.north_m, places.key, strict=True)
        return [folder_name(east, north, pano_id=key) for east, north, key in rows]
    return [str(p) for p in places.path]


# ------------------------------------------------------------------------------------------------- one batch
@contextlib.contextmanager
def evaluating(model) -> Iterator[None]:
    """Evaluation mode, without gradients, for the time of a block."""
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def describe_batch(model, images, context="none", *, anchors=None, autocast=None) -> Tensor:
    """Descriptors (B, D) float32 of one batch, in evaluation mode and without gradients.

    Parameters
    ----------
    model : SAGE or callable
        See `describe`.
    images : Tensor (B, 3, H, W), or pair of tokens (B, T, M) and grid
        On the model's device; tokens as ``model.backbone.prefix`` gives them.
    context, anchors
        See `in_context`.
    autocast : torch.dtype, optional
        Lower precision of the pass.
    """
    x, *grid = images if isinstance(images, tuple) else (images,)
    with evaluating(model), torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
        values = model.embed_tokens(x, *grid) if grid else getattr(model, "embed", model)(x)
        if not torch.is_tensor(values) or values.ndim != 2 or len(values) != len(x):
            got = f"shape {tuple(values.shape)}" if torch.is_tensor(values) else type(values).__name__
            raise ValueError(f"the model must give a tensor ({len(x)}, D) for {len(x)} images, got {got}")
        return in_context(model, values.float(), context, anchors).float()


def in_context(model, descriptors: Tensor, context, anchors: Tensor | None = None) -> Tensor:
    """The InteractHead of `model` on one batch of descriptors (B, D), in this context; with gradients.

    For ``sorted-n`` and ``shuffled-n`` the batch is the context. `anchors` (m, D) are by default the model's.
    """
    context = Context.parse(context)
    if context.kind == "none":
        return descriptors
    _check_head(model, context, anchors)
    if context.kind == "solo":
        anchors = descriptors[:0]
    elif context.kind == "anchors":
        anchors = model.anchors if anchors is None else anchors
    return model.interact(descriptors, anchors=None if context.batched else anchors)


def _check_head(model, context, anchors):
    if not getattr(model, "has_head", hasattr(model, "interact")):
        raise ValueError(f"context is {context}, but this model has no InteractHead: take context none")
    if context.kind == "anchors" and anchors is None and getattr(model, "anchors", None) is None:
        raise ValueError("context is anchors, but none are given and the model has none: see choose_anchors")


# ---------------------------------------------------------------------------------------------- rows on disk
class RowStore:
    """The rows (n, ...) of one array on disk, in a folder named by a key of all that they depend on.

    Rows are written in blocks; a call that is killed goes on when it is made again. Only the whole is read.

    Attributes
    ----------
    values : memmap (n, ...), read-only
    manifest : dict
        The key, seconds, and the pictures that were skipped, with the reason.
    path : Path
    """

    def __init__(self, path):
        self.path = Path(path)
        if not self._is_whole(self.path):
            raise FileNotFoundError(f"there are no finished {type(self).__name__} in {path}")
        self.manifest = runs.read_json(self.path / "manifest.json")
        self.values = np.load(self.path / "rows.npy", mmap_mode="r")

    def __len__(self) -> int:
        return len(self.values)

    @staticmethod
    def _is_whole(path: Path) -> bool:
        return (path / "manifest.json").exists() and (path / "rows.npy").exists()

    @classmethod
    def make(cls, folder, label: str, key: dict, n: int, blocks: Callable, *, bar: bool = False, **facts):
        """The rows of `key`, written now where they are missing; a second process waits for the first.

        Parameters
        ----------
        folder : path
            Where the store has its own folder, ``<label>-<hash of key>``.
        n : int
            Rows to be made, or skipped.
        blocks : callable
            From the numbers of rows read and skipped before to an iterator of positions, values (None where there
            are none) and a list of ``{"row", "path", "reason"}`` of what is skipped.
        bar : bool
            Show a progress bar.
        **facts
            For the manifest.
        """
        path = Path(folder) / f"{label}-{runs.fingerprint([FORMAT, key])}"
        path.mkdir(parents=True, exist_ok=True)
        with runs.alone(path):
            if not cls._is_whole(path):
                with tqdm(total=n, unit="img", desc=label, disable=not bar) as shown:
                    cls._write(path, {**key, **facts}, n, blocks, shown)
        return cls(path)

    @staticmethod
    def _write(path, facts, n, blocks, shown):
        part, progress = path / ".rows.part.npy", path / ".progress.json"
        values, state = None, {"read": 0, "skipped": [], "seconds": 0.0}
        if part.exists() and progress.exists():
            values, state = np.lib.format.open_memmap(part, mode="r+"), runs.read_json(progress)
        flushed = time.perf_counter()
        shown.update(state["read"])
        for positions, block, skipped in blocks(state["read"], len(state["skipped"])):
            if block is not None:
                if values is None:
                    values = runs.new_array(part, block.dtype, (n, *block.shape[1:]))
                values[positions] = block
            state["read"] += len(positions) + len(skipped)
            state["skipped"] += skipped
            shown.update(len(positions) + len(skipped))
            now = time.perf_counter()
            if values is not None and (now - flushed >= FLUSH_S or state["read"] == n):
                values.flush()
                state["seconds"] += now - flushed
                runs.write_json(progress, state)
                flushed = now
        if values is None:
            raise ValueError(f"none of the {n} pictures decodes; the first: {state['skipped'][0]['reason']}")
        if state["skipped"]:
            runs.save_array(path / "rows.npy", values[: n - len(state["skipped"])])
        del values  # a mapped file cannot be renamed on Windows
        pace = {"images_per_s": round(n / max(state["seconds"], 1e-9), 2)}
        runs.write_json(path / "manifest.json", {**state, **facts, **pace})
        if state["skipped"]:
            part.unlink()
        else:
            part.replace(path / "rows.npy")
        progress.unlink()


class _Pictures(Dataset):
    """(row, tensor, None) of a picture, or (row, None, sentence) where it does not decode."""

    def __init__(self, paths, preprocess):
        self.paths, self.preprocess = paths, preprocess

    def __getitem__(self, row):
        try:
            picture = load_image(self.paths[row])
        except (OSError, ValueError) as error:
            return row, None, str(error)
        takes_index = getattr(self.preprocess, "takes_index", False)
        return row, self.preprocess(picture, row) if takes_index else self.preprocess(picture), None


def _collate(items):
    decoded = [(row, image) for row, image, _ in items if image is not None]
    if len(shapes := {tuple(image.shape) for _, image in decoded}) > 1:
        raise ValueError(f"preprocess gave tensors of several shapes {sorted(shapes)}: it must give one size")
    images = torch.stack([image for _, image in decoded]) if decoded else None
    return [row for row, _ in decoded], images, {row: s for row, image, s in items if image is None}


def _batches(paths, preprocess, start, size, workers):
    """Rows, images (None where there are none) and {row: sentence} of failures, from row `start` on."""
    return DataLoader(
        _Pictures(paths, preprocess),
        batch_sampler=[range(i, min(i + size, len(paths))) for i in range(start, len(paths), size)],
        collate_fn=_collate,
        num_workers=workers,
        generator=torch.Generator(),  # otherwise a draw from torch's global one
    )


def _stored(values: Tensor, dtype: str, paths, advice: str) -> np.ndarray:
    """Rows in the type in which they are kept, or an error where that type cannot hold them."""
    kept = values.to(getattr(torch, dtype))
    lost, length = (torch.linalg.vector_norm(x.flatten(1).float(), dim=1) for x in (values - kept, values))
    fits = lost <= 0.01 * length  # not for a NaN
    if not fits.all():
        path = paths[int(fits.int().argmin())]
        raise ValueError(f"{path}: its values are too large, too small or not finite for {dtype}; {advice}")
    return kept.cpu().numpy()


# ----------------------------------------------------------------------------------------------- descriptors
class Descriptors(RowStore):
    """Descriptors on disk, `values` (n, D) float16 or float32, of which model, pictures and context."""

    @property
    def context(self) -> str:
        return self.manifest["context"]

    @property
    def rows(self) -> np.ndarray:
        """Which images of the Places that were given have a descriptor, in order; shape (n,)."""
        return np.setdiff1d(np.arange(self.manifest["n_given"]), [s["row"] for s in self.manifest["skipped"]])

    def kept(self, places):
        """The Places of the rows of `values`; what did not decode is added to its ``left_out``."""
        reasons = tuple(skipped["reason"] for skipped in self.manifest["skipped"])
        return places[self.rows].replace(left_out=(*places.left_out, *reasons)) if reasons else places


def describe(
    model: Callable,
    places,
    folder,
    *,
    preprocess: Callable | None = None,
    context: str | Context = "none",
    anchors: np.ndarray | None = None,
    batch_size: int = 32,
    dtype: str = "float16",
    device: str | torch.device = "auto",
    workers: int = 0,
    seed: int = 0,
    loader: str = "",
    on_error: str = "raise",
    fingerprint: "ModelFingerprint | None" = None,
    progress: bool = True,
) -> Descriptors:
    """Describe pictures, streaming to disk; what was described before, or begun, is found again.

    Parameters
    ----------
    model : SAGE or callable
        With ``embed`` (and ``interact``, for contexts other than none), or any callable from images
        (B, 3, H, W) to descriptors (B, D). It is moved to `device` and run in evaluation mode.
    places : Places
        The pictures of one loader: references and queries are described by two calls.
    folder : path
        For the descriptors before the head and those of every context, each in a folder of its own.
    preprocess : callable, optional
        From a PIL picture to a tensor, equal in shape for all; default: the model's, see `preprocess_of`.
    context : str or Context
    anchors : array (m, D), optional
        For ``context="anchors"``: descriptors before the head, see `choose_anchors`; default: the model's own.
    batch_size, workers : int
        Pictures at once, and processes that decode them. Both change results by rounding at most.
    dtype : {"float16", "float32"}
        Of the stored values. With unit-length descriptors float16 rounds distances by less than 1e-3.
    device : str
        See `pick_device`.
    seed, loader : int, str
        Of the batches of ``shuffled-n``, see `Context.batches`.
    on_error : {"raise", "skip"}
        A picture that does not decode raises an error, or has no row, see `Descriptors.kept`.
    fingerprint : ModelFingerprint, optional
        Of `model`, where the caller has it: making it reads all weights.
    progress : bool
        Show a bar with pictures per second.

    Raises
    ------
    ValueError
        For bad settings, pictures that do not decode, and descriptors that are not finite.
    """
    context, preprocess = Context.parse(context), preprocess_of(model, preprocess)
    runs.check("dtype", dtype, choices=("float16", "float32"))
    runs.check("on_error", on_error, choices=("raise", "skip"))
    runs.check("batch_size", batch_size, 1, whole=True)
    runs.check("workers", workers, 0, whole=True)
    if len(places) == 0:
        raise ValueError("there is no picture to describe: places is empty")
    if context.kind != "none":
        _check_head(model, context, anchors)
    fingerprint, device = fingerprint or model_fingerprint(model), move_to(model, device)
    paths = [str(path) for path in places.path]
    advice = "try dtype='float32'" if dtype == "float16" else "the model gives NaN or infinity"

    def embedded(start, n_skipped):
        for rows, images, failures in _batches(paths, preprocess, start, batch_size, workers):
            if failures and on_error == "raise":
                raise ValueError(failures[min(failures)])
            skipped = [{"row": r, "path": paths[r], "reason": failures[r]} for r in sorted(failures)]
            values, positions = None, np.arange(len(rows)) + start - n_skipped
            if images is not None:
                values, images = describe_batch(model, images.to(device)), None
                values = _stored(values, dtype, [paths[r] for r in rows], advice)
            yield positions, values, skipped
            start, n_skipped = start + len(rows) + len(failures), n_skipped + len(failures)

    key = {
        "model": fingerprint.embedding,
        "data": runs.fingerprint([places.fingerprint(), pictures_fingerprint(places)]),
        "preprocess": describe_callable(preprocess),
        "context": "none",
        "dtype": dtype,
        "n_given": len(places),
    }
    lack = f"not enough memory to describe {batch_size} pictures at a time on {device}: lower batch_size"
    lack += f"; the head sees {context.n} at a time (context {context})" if context.n else ""
    with runs.memory_errors(lack):
        base = Descriptors.make(folder, "none", key, len(places), embedded, bar=progress, device=str(device))
        if base.manifest["skipped"] and on_error == "raise":
            raise ValueError(f"{base.manifest['skipped'][0]['reason']} (on_error='skip' leaves it out)")
        if context.kind == "none":
            return base
        key |= {"model": fingerprint.whole, "context": str(context), "skipped": base.manifest["skipped"]}
        if context.kind == "shuffled":
            key |= {"seed": seed, "loader": loader}
        if context.kind == "anchors":
            anchors = np.asarray(own_anchors(model) if anchors is None else anchors, np.float32)
            key |= {"anchors": runs.fingerprint(anchors)}
        names = names_in_order(places[base.rows])
        settings = (context, anchors, seed, loader, dtype, device)
        blocks = functools.partial(_through_head, model, base.values, names, *settings)
        facts = {"device": str(device), "embedding_seconds": base.manifest["seconds"]}
        made = Descriptors.make(folder, str(context), key, len(base), blocks, bar=progress, **facts)
        if context.kind == "anchors":
            runs.save_array(made.path / "anchors.npy", anchors)  # to describe one more picture, later
        return made


def _through_head(model, values, names, context, anchors, seed, loader, dtype, device, start=0, _=0):
    """Rows of stored descriptors in their context, batch by batch, without the first `start`."""
    if anchors is not None:
        anchors = torch.as_tensor(np.asarray(anchors, np.float32), device=device)
    for rows in context.batches(names, seed=seed, loader=loader):
        if start > 0:
            start -= len(rows)
            continue
        batch = torch.from_numpy(np.asarray(values[rows], np.float32)).to(device)
        with evaluating(model):
            batch = in_context(model, batch, context, anchors).float()
        yield rows, _stored(batch, dtype, [names[row] for row in rows], f"the head, {context}"), []


def compose(
    model, values, names, context, out=None, *, anchors=None, seed=0, loader="", device="auto"
) -> np.ndarray:
    """Send stored descriptors through the InteractHead in the batches of a context.

    Parameters
    ----------
    values : array (N, D)
        Descriptors before the head, of one loader.
    names : sequence of N str
        See `names_in_order`.
    out : array (N, D), optional
        Written row by row, may be a memmap; default: a new float32 array.
    others
        As for `describe`.

    Returns
    -------
    array (N, D)
        `out`. With the context none, the values themselves.
    """
    out = np.empty(values.shape, np.float32) if out is None else out
    settings = (Context.parse(context), anchors, seed, loader, str(out.dtype), move_to(model, device))
    for rows, block, _ in _through_head(model, values, names, *settings):
        out[rows] = block
    return out


def own_anchors(model) -> np.ndarray | None:
    """The anchors (m, D) that belong to a model's InteractHead, learned or stored; None where it has none."""
    anchors = getattr(model, "anchors", None)
    return None if anchors is None else np.asarray(torch.as_tensor(anchors).detach().float().cpu())


def choose_anchors(descriptors, m: int, method: str = "sample", seed: int = 0) -> np.ndarray:
    """Choose the fixed reference descriptors (m, D), float32, of ``anchors``, a context that is not in the paper.

    Parameters
    ----------
    descriptors : array (N, D), or Descriptors of the context none
        Of the data base, or of training pictures; never of queries.
    m : int
        How many, from 1 to N.
    method : {"sample", "kmeans"}
        Rows drawn without replacement; or centres of k-means (of at most 256 m rows), scaled to the mean length
        of the descriptors, because a mean of unit vectors is shorter than they are.
    """
    if isinstance(descriptors, Descriptors):
        runs.check(
            "the context of descriptors among which anchors are", descriptors.context, choices=("none",)
        )
        descriptors = descriptors.values
    n = len(descriptors)
    runs.check("m", m, 1, n, whole=True)
    runs.check("method", method, choices=("sample", "kmeans"))
    rng = runs.rng(seed, "anchors", method)
    if method == "sample":
        return np.asarray(descriptors[np.sort(rng.choice(n, m, replace=False))], np.float32)
    from sklearn.cluster import KMeans

    rows = np.sort(rng.choice(n, min(n, 256 * m), replace=False))
    x = np.ascontiguousarray(descriptors[rows], np.float32)
    kmeans = KMeans(m, n_init=1, max_iter=50, random_state=int(rng.integers(2**31))).fit(x)
    centres, length = kmeans.cluster_centers_, np.linalg.norm(x, axis=1).mean()
    return (centres * (length / np.linalg.norm(centres, axis=1, keepdims=True))).astype(np.float32)


# ---------------------------------------------------------------------------------------------------- tokens
class TokenStore(RowStore):
    """Tokens after a backbone's frozen prefix, `values` (N, T, M) float16: what no training changes."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the patches."""
        return tuple(self.manifest["grid"])

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        """The tokens (n, T, M), float32, of rows (n,)."""
        return torch.from_numpy(np.asarray(self.values[np.asarray(rows)])).float()


def open_tokens(
    folder, model, places, *, preprocess, limit_gb, batch_size=32, workers=0, autocast=None, progress=True
) -> TokenStore:
    """The stored tokens of `places`, computed now where they are missing.

    Parameters
    ----------
    folder : path
        Where all token stores live.
    model : module with ``backbone.prefix`` and ``backbone.prefix_fingerprint``
    preprocess : Preprocess or Views
        With V views, row ``V i + v`` is version v of image i.
    limit_gb : float
        Gigabytes (1e9 bytes) that this store may take.
    autocast : torch.dtype, optional
        Lower precision in which the prefix runs.
    batch_size, workers, progress
        As for `describe`.

    Raises
    ------
    ValueError
        If the tokens would take more than `limit_gb`, do not fit into float16, or a picture does not decode.
    """
    plain, views = (preprocess.plain, preprocess.count) if isinstance(preprocess, Views) else (preprocess, 1)
    size = (plain.image_size,) * 2 if isinstance(plain.image_size, int) else plain.image_size
    device, paths = next(model.parameters()).device, np.repeat(places.path, views)

    def prefix(images):
        lower = torch.autocast(device.type, dtype=autocast, enabled=autocast is not None)
        with evaluating(model), lower:
            return model.backbone.prefix(images.to(device)).float()

    tokens, width = prefix(torch.zeros(1, 3, *size)).shape[1:]
    need_gb = len(paths) * tokens * width * 2 / 1e9
    need = (
        f"frozen tokens of {len(paths)} images ({tokens} x {width} in float16 each): {need_gb:.3g} GB on disk"
    )
    if need_gb > limit_gb:
        raise ValueError(
            f"{need}, more than cache_limit_gb = {limit_gb:g}; raise it, or set it to None: no cache"
        )

    def blocks(start, _):
        if progress:
            print(need)
        for rows, images, failures in _batches(paths, preprocess, start, batch_size, workers):
            if failures:
                raise ValueError(failures[min(failures)])
            values, images = prefix(images), None
            yield rows, _stored(values, "float16", paths[rows], "set cache_limit_gb to None: no cache"), []

    key = {
        "prefix": model.backbone.prefix_fingerprint(),
        "data": pictures_fingerprint(places),
        "preprocess": repr(preprocess),
        "autocast": str(autocast),
    }
    grid = model.backbone.grid((1, 3, *size))
    return TokenStore.make(folder, "tokens", key, len(paths), blocks, bar=progress, grid=grid)


# --------------------------------------------------------------------- what identifies a model, and pictures
class ModelFingerprint(NamedTuple):
    """Two hashes, equal for models that compute the same: without the InteractHead, and with it."""

    embedding: str
    whole: str

    def under(self, context: str | Context) -> str:
        """The one on which descriptors of this context depend."""
        return self.embedding if str(context) == "none" else self.whole


def model_fingerprint(model) -> ModelFingerprint:
    """Hashes that change with whatever changes a model's descriptors.

    Modules of this package and of its libraries count with their classes, plain attributes, weights and buffers.
    Other code needs an attribute ``fingerprint``, a text that changes whenever code or settings do (weights count
    besides); without one the hashes are new at every call, and nothing that was stored for it is used again.
    """
    own, name = getattr(model, "fingerprint", None), type(model).__qualname__
    parts = dict(model.named_modules(remove_duplicate=False)) if isinstance(model, torch.nn.Module) else {}
    if own is None and not (parts and all(map(_is_of_a_library, parts.values()))):
        own, parts = secrets.token_hex(8), {}
    state = {name: _state(part)[0 if own is None else 2 :] for name, part in parts.items()}
    config = getattr(model, "config", None) or {} if hasattr(model, "has_head") else {}
    state |= {
        f"config.{key}": repr(config[key])
        for key in config
        if key not in ("weights", "pretrained", "preprocessing")
    }
    head = ("head", "config.interact", "config.interact_options")
    below = {
        name: value for name, value in state.items() if name not in head and not name.startswith("head.")
    }
    below = below if hasattr(model, "has_head") else state
    return ModelFingerprint(runs.fingerprint([name, own, below]), runs.fingerprint([name, own, state]))


def _is_of_a_library(part) -> bool:
    """Whether a module computes what its class in a library says: it has no hooks, and no methods of its own."""
    package = type(part).__module__.partition(".")[0]
    patched = any(callable(getattr(type(part), name, None)) for name in vars(part))
    hooked = part._forward_hooks or part._forward_pre_hooks or patched
    return package in ("sagelib", "torch", "timm", "torchvision", "peft") and not hooked


def _state(part):
    """Class, plain attributes, weights and buffers of one module, without its submodules."""
    plain, skipped = (bool, int, float, str, type(None), tuple, list, dict), ("training", "preprocessing")
    attributes = {
        name: repr(value)
        for name, value in vars(part).items()
        if isinstance(value, plain) and name not in skipped and not name.startswith("_")
    }
    loose = {name: value for name, value in vars(part).items() if torch.is_tensor(value)}
    tensors = {**part._parameters, **part._buffers, **loose}
    weights = {
        name: [str(t.dtype), list(t.shape), t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()]
        for name, t in tensors.items()
        if t is not None
    }
    return [type(part).__qualname__, attributes, weights]


def describe_callable(preprocess) -> str:
    """A preprocess as text for a manifest: the repr of one of this package, name and fingerprint of another."""
    if dataclasses.is_dataclass(preprocess) and type(preprocess).__module__.startswith("sagelib."):
        return repr(preprocess)
    name = getattr(preprocess, "__qualname__", type(preprocess).__qualname__)
    return f"{name} {getattr(preprocess, 'fingerprint', None) or secrets.token_hex(8)}"


def preprocess_of(model, preprocess: Callable | None = None) -> Callable:
    """`preprocess`, or the model's ``preprocess``, or that of the dict ``preprocessing`` saved with a model."""
    preprocess = preprocess or getattr(model, "preprocess", None)
    if preprocess is None and getattr(model, "preprocessing", None):
        preprocess = Preprocess(**model.preprocessing)
    if preprocess is None:
        raise ValueError("this model names no preprocess: give one, as in preprocess=Preprocess(322)")
    return preprocess


def pictures_fingerprint(places) -> str:
    """A short hash of what the files hold, in order: a picture that was replaced under its name is another."""
    return runs.fingerprint([file_digest(path) for path in places.path])


def file_digest(path) -> str:
    """A hash of a file's bytes, empty where there is none; read again only when the system says it changed."""
    try:
        stat = os.stat(path)
    except OSError:
        return ""
    return _digest(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


@functools.lru_cache(maxsize=1_000_000)
def _digest(path, *stat):
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        return f"unreadable: {error.strerror}"


# --------------------------------------------------------------------------------- devices and a first model
def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name, if there is one; ``auto``: CUDA where there is one, then Apple's MPS, then CPU."""
    cuda, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    runs.check("device", str(name).partition(":")[0], choices=("auto", "cpu", "cuda", "mps"))
    device = torch.device(name)
    if (device.type == "cuda" and (device.index or 0) >= cuda) or (device.type == "mps" and not mps):
        raise ValueError(
            f"device is {str(device)!r}, but PyTorch {torch.__version__} sees {cuda} CUDA devices and "
            f"{'an' if mps else 'no'} MPS here: use device='auto', or a build of PyTorch for your GPU"
        )
    return device


def move_to(model, device: str | torch.device) -> torch.device:
    """Move a model, where it is a module, to the device of that name (`pick_device`); return the device."""
    device = pick_device(device)
    if isinstance(model, torch.nn.Module):
        model.to(device)
    return device


@dataclass(frozen=True)
class GreyPixels:
    """Preprocess of `baseline_pixels`: 8-bit grey, the mean over boxes, as a tensor (1, size, size) in [0, 1]."""

    size: int = 32

    def __call__(self, picture: Image.Image) -> Tensor:
        grey = picture.convert("L").resize((self.size, self.size), Image.Resampling.BOX)
        return torch.from_numpy(np.asarray(grey, np.float32) / 255)[None]


def baseline_pixels(images: Tensor) -> Tensor:
    """The first model of all: grey thumbnails of 32 x 32 pixels, (B, 1024), less their mean, to unit length.

    Images are (B, 1, H, W) grey, or (B, 3, H, W) RGB with ImageNet normalisation. The inner product of two
    descriptors is the correlation of their thumbnails.
    """
    if images.shape[1] == 3:
        # Rec. 601, as Pillow's "L".
        colours = (IMAGENET_MEAN, IMAGENET_STD, (0.299, 0.587, 0.114))
        mean, std, grey = (torch.tensor(c, device=images.device).view(3, 1, 1) for c in colours)
        images = ((images * std + mean) * grey).sum(dim=1, keepdim=True)
    pixels = torch.nn.functional.adaptive_avg_pool2d(images, 32).flatten(1)
    return torch.nn.functional.normalize(pixels - pixels.mean(dim=1, keepdim=True), dim=1)


baseline_pixels.name = "pixels"
baseline_pixels.preprocess = GreyPixels()
baseline_pixels.fingerprint = "pixels-32-1"
