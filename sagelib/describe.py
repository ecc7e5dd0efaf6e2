"""Pictures to descriptors on disk: streamed, resumable, in a stated context; and tokens of a frozen prefix.

Two passes. The first stores each picture's descriptor before the InteractHead, a function of the picture
alone. The second, cheaper, sends these through the head in batches composed as a `Context` says.
"""

import contextlib
import hashlib
import itertools
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from sagelib import runs
from sagelib.images import IMAGENET_STD, Preprocess, Views, load_image
from sagelib.places import names_in_order

FLUSH_S = 2.0  # progress is recorded this often: a kill costs this much work and one batch
MEASURED = 2048  # pictures from which on precision and threads are measured
AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16}  # the dtype of each precision
FORMAT = 2  # of the stores; those of another one are made anew
FILES = ("manifest.json", "rows.npy")  # of a finished store
LIBRARIES = ("sagelib", "torch", "timm", "torchvision", "peft")  # whose modules are what their classes say
PLAIN = (bool, int, float, str, type(None), tuple, list, dict)
NO_SETTINGS = ("training", "weights", "pretrained", "preprocessing")  # on which no descriptor depends
CONTEXTS = "it is none, solo, anchors, or with at least 1 image a batch sorted-n or shuffled-n, as sorted-8"


@dataclass(frozen=True)
class Context:
    """Which images share a batch of the InteractHead (of somebody else's network: of all of it).

    ``none``: the head is off. ``solo``: each image alone. ``sorted-n``: batches of n images in the order of
    their file names; so the authors of SAGE evaluate, and where queries and references sort alike it puts
    true pairs into like batches. ``shuffled-n``: batches of n in a random order. ``anchors``: each image with
    one fixed set of reference descriptors. No batch holds both queries and references.
    """

    kind: str
    n: int | None = None

    def __post_init__(self):
        if not re.fullmatch(r"none|solo|anchors|(sorted|shuffled)-[1-9]\d*", str(self)):
            raise ValueError(f"context {str(self)!r} is unknown; {CONTEXTS}")

    @property
    def batched(self) -> bool:
        """Whether a descriptor depends on the other images of its batch."""
        return self.kind in ("sorted", "shuffled")

    @classmethod
    def parse(cls, text: "str | Context") -> "Context":
        """Read ``none``, ``solo``, ``sorted-8``, ``shuffled-8`` or ``anchors``."""
        kind, _, n = str(text).partition("-")
        return cls(kind, int(n)) if n.isdecimal() else cls(str(text))

    def __str__(self):
        return self.kind if self.n is None else f"{self.kind}-{self.n}"

    def batches(self, names: Sequence[str], *, seed: int = 0, loader: str = "") -> list[np.ndarray]:
        """Cut one loader's images into batches of the head: arrays of indices, every index once.

        The `names` (`names_in_order`) are sorted; ``shuffled-n`` permutes that order by `seed` and `loader`.
        References and queries need different loaders: two sets of one size would be permuted alike.
        """
        order, n = np.arange(len(names)), self.n or 128
        if self.batched:
            order = np.array(sorted(order, key=[str(name) for name in names].__getitem__), np.int64)
        if self.kind == "shuffled":
            order = order[runs.rng(seed, "context", str(self), loader).permutation(len(order))]
        return [order[start : start + n] for start in range(0, len(order), n)]


@contextlib.contextmanager
def evaluating(model) -> Iterator[None]:
    """Evaluation mode, without gradients, for the time of a block."""
    modes = {part: part.training for part in model.modules()} if isinstance(model, torch.nn.Module) else {}
    try:
        for part in modes:
            part.training = False
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def describe_batch(model, images, context="none", *, anchors=None, autocast=None) -> Tensor:
    """Descriptors (B, D) float32 of one batch, in evaluation mode and without gradients.

    `images` (B, 3, H, W), or a pair of tokens (B, T, M) of ``model.backbone.prefix`` and their grid, are on
    the model's device; `context`, `anchors`: see `in_context`; `autocast`: a lower precision, or None.
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

    For ``sorted-n`` and ``shuffled-n`` the batch is the context. `anchors` (m, D): by default the model's.
    """
    context = Context.parse(context)
    if context.kind == "none" or (len(descriptors) == 1 and not hasattr(model, "embed")):
        return descriptors
    _check_head(model, context, anchors)
    anchors = model.anchors if context.kind == "anchors" and anchors is None else anchors
    anchors = None if context.batched else descriptors[:0] if context.kind == "solo" else anchors
    return model.interact(descriptors, anchors=anchors)


def mixes_images(model, image: Tensor) -> bool:
    """Whether the descriptor of an image (3, H, W) depends on the others of its batch.

    It does if it moves by over 1 % of its length beside the negative and the image upside down; rounding
    moves it a hundred times less.
    """
    beside = torch.stack([image, -image, image.flip(-2) + 1])
    alone, beside = (describe_batch(model, batch)[0] for batch in (image[None].clone(), beside))
    return bool((alone - beside).norm() > 0.01 * alone.norm())


def _check_head(model, context, anchors):
    if context.kind != "none" and not getattr(model, "has_head", hasattr(model, "interact")):
        raise ValueError(f"context is {context}, but this model has no InteractHead: take context none")
    if context.kind == "anchors" and anchors is None and own_anchors(model) is None:
        raise ValueError("context is anchors, but none are given and the model has none: see choose_anchors")


class RowStore:
    """The rows (n, ...) of one array on disk, in a folder named by a key of all that they depend on.

    Rows are written in blocks; a call that is killed goes on when it is made again. Only the whole is read:
    `values`, a memmap, and `manifest`, a dict of the key, the seconds, and the pictures that were skipped.
    """

    def __init__(self, path):
        self.path = Path(path)
        if not all((self.path / name).exists() for name in FILES):
            raise FileNotFoundError(f"there are no finished {type(self).__name__} in {path}")
        self.manifest = runs.read_json(self.path / "manifest.json", "skipped")
        self.values = runs.load_array(self.path / "rows.npy", "r")

    def __len__(self) -> int:
        return len(self.values)

    @classmethod
    def make(cls, folder, label: str, key: dict, n: int, blocks: Callable, *, batch=None, bar="", **facts):
        """The n rows of `key`, written now where they are missing; another call of the same waits.

        They lie in ``folder/<label>-<hash of key>``. The processes of one launch make a share each, cut at
        multiples of `batch`; without it the main process makes all. `blocks`, called with the numbers of rows
        read and skipped before, and the end of the share, iterates over positions, values (None where there
        are none), a dict with ``row``, ``path`` and ``reason`` of each row that is skipped, and the seconds
        that it waited. The `facts` go into the manifest, too, and `bar` before a bar of progress.
        """
        path, state = Path(folder) / f"{label}-{runs.fingerprint([FORMAT, key])}", launched()
        path.mkdir(parents=True, exist_ok=True)
        cuts = np.append(np.arange(0, n, batch or n), n)  # the ends of batches
        ends = cuts[np.linspace(0, len(cuts) - 1, min(state.num_processes, len(cuts) - 1) + 1).astype(int)]
        shares = [(path / f".rows-{a}-{b}.npy", a, b) for a, b in itertools.pairwise(ends.tolist())]
        with runs.alone(path) if state.is_main_process else contextlib.nullcontext():
            if not shared(all((path / name).exists() for name in FILES)):
                for part, start, stop in shares[state.process_index :: state.num_processes]:
                    with tqdm(total=stop - start, unit="img", desc=bar, disable=not bar) as shown:
                        cls._write(part, start, stop, blocks, shown)
                state.wait_for_everyone()
                if state.is_main_process:
                    cls._join(path, [part for part, *_ in shares], n, {**key, **facts})
            state.wait_for_everyone()
        return cls(path)

    @staticmethod
    def _write(part, start, stop, blocks, shown):
        progress, values, flushed = part.with_suffix(".json"), None, time.perf_counter()
        state = {"read": start, "skipped": [], "seconds": 0.0, "waited": 0.0}
        if part.exists() and progress.exists():
            values, state = np.lib.format.open_memmap(part, mode="r+"), runs.read_json(progress)
        shown.update(state["read"] - start)
        for positions, block, skipped, waited in blocks(state["read"], len(state["skipped"]), stop):
            if block is not None:
                if values is None:
                    values = runs.new_array(part, block.dtype, (stop - start, *block.shape[1:]))
                values[positions - start] = block
            state["read"] += len(positions) + len(skipped)
            state["skipped"] += skipped
            state["waited"] += waited
            shown.update(len(positions) + len(skipped))
            now = time.perf_counter()
            if now - flushed >= FLUSH_S or state["read"] == stop:
                if values is not None:
                    values.flush()
                state["seconds"] += now - flushed
                runs.write_json(progress, state)
                shown.set_postfix_str(f"waiting {state['waited'] / state['seconds']:.0%} of the time")
                flushed = now

    @staticmethod
    def _join(path, parts, n, facts):
        states = [runs.read_json(part.with_suffix(".json")) for part in parts]
        skipped = sum((state["skipped"] for state in states), [])
        if len(skipped) == n:
            raise ValueError(f"none of the {n} pictures decodes; the first: {skipped[0]['reason']}")
        facts |= {name: max(state[name] for state in states) for name in ("seconds", "waited")}
        runs.write_json(path / "manifest.json", {"skipped": skipped, **facts})
        if len(parts) == 1 and not skipped:
            parts[0].replace(path / "rows.npy")
        else:
            pairs = [(runs.load_array(p, "r"), s) for p, s in zip(parts, states, strict=True) if p.exists()]
            kept = [values[: len(values) - len(state["skipped"])] for values, state in pairs]
            with runs.atomic_path(path / "rows.npy") as new:
                rows = runs.new_array(new, kept[0].dtype, (n - len(skipped), *kept[0].shape[1:]))
                np.concatenate(kept, out=rows)
                rows.flush()
            del pairs, kept, rows  # a mapped file cannot be removed on Windows
        for part in path.glob(".rows-*"):
            part.unlink()


def _read(paths, preprocess, rows):
    """A batch of pictures: rows, their images by shape, and {row: sentence} of those that do not decode."""
    images, failures = {}, {}
    for row in rows:
        more = (row,) if getattr(preprocess, "takes_index", False) else ()
        try:
            picture = load_image(paths[row])
        except (OSError, ValueError) as error:
            failures[row] = str(error)
        else:
            images[row] = preprocess(picture, *more)
    shapes = [image.shape for image in images.values()]
    alike = [[i for i, other in enumerate(shapes) if other == shape] for shape in dict.fromkeys(shapes)]
    rows, images = list(images), list(images.values())
    return rows, [(at, torch.stack([images[i] for i in at])) for at in alike], failures


def _of_pictures(
    paths, preprocess, compute, dtype, advice, size, workers, on_error, start, n_skipped, stop, order=None
):
    """Blocks of a `RowStore`: what `compute` makes of batches of `size` pictures, one shape at a time.

    A thread reads the next batch meanwhile. With an `order` of the rows, a batch is what a descriptor depends
    on, and is given as it is.
    """
    whole, order = order is not None, np.arange(len(paths)) if order is None else order
    batches = [order[i : min(i + size, stop)].tolist() for i in range(start, stop, size)]
    read, own = partial(_read, paths, preprocess), torch.Generator()  # not torch's global
    coming = iter(DataLoader(batches, None, num_workers=workers, collate_fn=read, generator=own))
    with ThreadPoolExecutor(1) as thread:
        ready, began = thread.submit(next, coming, None), time.perf_counter()
        while batch := ready.result():
            waited, (rows, stacks, failures) = time.perf_counter() - began, batch
            ready, batch = thread.submit(next, coming, None), None
            if failures and (whole or on_error == "raise"):
                raise ValueError(failures[min(failures)])
            if whole and len(stacks) > 1:
                first = paths[rows[0]]
                raise ValueError(f"{first} and others of its batch differ in shape: use resize='square'")
            positions, values = order[start - n_skipped :][: len(rows)], None
            while stacks:
                at, images = stacks.pop()
                some, images = compute(images), None
                values = some.new_empty(len(rows), *some.shape[1:]) if values is None else values
                values[at] = some
            if rows:
                values = _stored(values, dtype, [paths[row] for row in rows], advice)
            skipped = [{"row": r, "path": paths[r], "reason": s} for r, s in failures.items()]
            yield positions, values, skipped, waited
            start, n_skipped = start + len(rows) + len(failures), n_skipped + len(failures)
            began = time.perf_counter()


def _stored(values: Tensor, dtype: str, paths, advice: str) -> np.ndarray:
    """Rows in the type in which they are kept, or an error where that type cannot hold them."""
    kept = values.to(getattr(torch, dtype))
    lost, length = (torch.linalg.vector_norm(x.flatten(1).float(), dim=1) for x in (values - kept, values))
    fits = lost <= 0.01 * length  # not for a NaN
    if not fits.all():
        path = paths[int(fits.int().argmin())]
        raise ValueError(f"{path}: its values are too large, too small or not finite for {dtype}; {advice}")
    return kept.cpu().numpy()


class Descriptors(RowStore):
    """Descriptors on disk, `values` (n, D) float16 or float32, of which model, pictures and context."""

    context = property(lambda self: self.manifest["context"])
    precision = property(lambda self: self.manifest.get("precision", "float32"))  # of the network

    @property
    def rows(self) -> np.ndarray:
        """Which images of the Places that were given have a descriptor, in order; shape (n,)."""
        return np.setdiff1d(np.arange(self.manifest["n_given"]), [s["row"] for s in self.manifest["skipped"]])

    def kept(self, places):
        """The Places of the rows of `values`; what did not decode is added to its ``left_out``."""
        reasons = tuple(skipped["reason"] for skipped in self.manifest["skipped"])
        return places[self.rows].replace(left_out=(*places.left_out, *reasons)) if reasons else places


def _computing(model, device, context: Context, whole: bool, lower) -> Callable:
    """What describes a batch of images; the first one shows whether the model has such a context."""
    unknown = not hasattr(model, "embed")

    def compute(images):
        nonlocal unknown
        images = images.to(device)
        values = describe_batch(model, images, autocast=lower)
        if unknown and mixes_images(model, images[0]) != whole:
            blind = "has no InteractHead and does not look at the other images of a batch: take none"
            looks = "looks at the other images of a batch: take solo, sorted-n or shuffled-n"
            raise ValueError(f"context is {context}, but this model {blind if whole else looks}")
        unknown = False
        return values

    return compute


def describe(model: Callable, places, folder, *, preprocess: Callable | None = None,
             context: str | Context = "none", anchors: np.ndarray | None = None, batch_size: int = 32,
             dtype: str = "float16", device: str | torch.device = "auto", workers: int = 0, seed: int = 0,
             loader: str = "", on_error: str = "raise", fingerprint: "ModelFingerprint | None" = None,
             precision: str | None = None, progress: bool = True) -> Descriptors:  # fmt: skip
    """Describe pictures, streaming to disk; what was described before, or begun, is found again.

    The next batch is read while the network computes; the bar says how long that waits all the same. The
    processes of one ``accelerate launch`` or ``torchrun``, which all call this alike, do a share each.

    Parameters
    ----------
    model : SAGE, or callable from images (B, 3, H, W) to descriptors (B, D)
        Moved to `device`, see `pick_device`. What has no method ``embed`` may look at its whole batch: its
        contexts are none if it does not, else solo, sorted-n and shuffled-n; see `mixes_images`.
    places, folder : Places, path
        Pictures of one loader, references or queries. In `folder`, every model, set and context has its own.
    preprocess : callable, optional
        From a PIL picture to a tensor; default: the model's, see `preprocess_of`. Shapes may differ.
    context, anchors, seed, loader : str or Context, array (m, D), int, str
        See `Context`, `choose_anchors` (default: the model's own) and `Context.batches`.
    batch_size, workers : int
        Pictures at once, and processes that decode them (0: a thread): results differ by rounding at most.
    dtype : {"float16", "float32"}
        Of the stored values. float16 rounds distances between unit vectors by less than 1e-3.
    on_error : {"raise", "skip"}
        A picture that does not decode is a ValueError, or has no row, see `Descriptors.kept`.
    fingerprint : ModelFingerprint, optional
        Of `model`, where it is at hand.
    precision : {"float32", "bfloat16"}, optional
        Of the network. Default: what is fastest here, by a measurement that is kept in `folder`, for 2,048
        pictures and more, else float32. For queries give that of their references, ``references.precision``.
    """
    context, preprocess = Context.parse(context), preprocess_of(model, preprocess)
    runs.check("dtype", dtype, choices=("float16", "float32"))
    runs.check("on_error", on_error, choices=("raise", "skip"))
    runs.check("batch_size", batch_size, 1, whole=True)
    runs.check("workers", workers, 0, whole=True)
    if not (whole := context.kind in ("solo", "sorted", "shuffled") and not hasattr(model, "embed")):
        _check_head(model, context, anchors)
    if len(places) == 0:
        raise ValueError("there is no picture to describe: places is empty")
    fingerprint, device = fingerprint or model_fingerprint(model), move_to(model, device)
    paths = [str(path) for path in places.path]
    advice = "try dtype='float32'" if dtype == "float16" else "the model gives NaN or infinity"
    key = {"model": fingerprint.embedding, "preprocess": describe_callable(preprocess), "context": "none"}
    key["data"] = runs.fingerprint([places.fingerprint(), pictures_fingerprint(places)])
    key |= {"dtype": dtype, "n_given": len(places)}
    drawn, order = {"seed": seed, "loader": loader} if context.kind == "shuffled" else {}, None
    if whole:
        key |= {"context": str(context), **drawn}
        batches = context.batches(names_in_order(places), seed=seed, loader=loader)
        order, batch_size = np.concatenate(batches), context.n or 1
    lack = f"not enough memory to describe {batch_size} pictures at a time on {device}: lower batch_size"
    lack += f", or the {context.n} of context {context}" * bool(context.n)
    main, threads, label = launched(device).is_main_process, torch.get_num_threads(), key["context"]
    key, fingerprint = shared([key, fingerprint])  # may be random, see `model_fingerprint`
    with runs.memory_errors(lack), contextlib.ExitStack() as after:
        after.callback(torch.set_num_threads, threads)
        if precision is None and not whole and len(paths) >= MEASURED:
            kept = Path(folder) / f"speed-{runs.fingerprint(key)}.json"  # for the next such call
            first = partial(_read, paths, preprocess, range(len(paths))[:batch_size])
            precision, threads = shared(_fastest(kept, model, first, device) if main else None)
        torch.set_num_threads(threads)
        lower = AUTOCAST[runs.check("precision", precision or "float32", choices=tuple(AUTOCAST))]
        key |= {"precision": precision} if lower else {}
        how = (paths, preprocess, _computing(model, device, context, whole, lower))
        how += (dtype, advice, batch_size, workers, on_error)
        blocks, batch = partial(_of_pictures, *how, order=order), None if whole else batch_size
        base = Descriptors.make(folder, label, key, len(paths), blocks, batch=batch, bar=label * progress)
        if base.manifest["skipped"] and on_error == "raise":
            raise ValueError(f"{base.manifest['skipped'][0]['reason']} (on_error='skip' leaves it out)")
        if whole or context.kind == "none":
            return base
        key |= {"model": fingerprint.whole, "context": str(context), "skipped": base.manifest["skipped"]}
        key |= drawn
        if context.kind == "anchors":
            anchors = np.asarray(own_anchors(model) if anchors is None else anchors, np.float32)
            key |= {"anchors": runs.fingerprint(anchors)}
        names, facts = names_in_order(places[base.rows]), {"embedding_seconds": base.manifest["seconds"]}
        how = (model, base.values, names, context, anchors, seed, loader, dtype, device)
        blocks, bar = partial(_through_head, *how), str(context) * progress
        made = Descriptors.make(folder, str(context), key, len(base), blocks, bar=bar, **facts)
    if context.kind == "anchors" and not (made.path / "anchors.npy").exists():
        runs.save_array(made.path / "anchors.npy", anchors)  # to describe one more picture, later
    return made


def _fastest(kept: Path, model, read, device) -> list:
    """Precision and threads that describe images soonest; bfloat16 must be near, and faster by a fifth."""
    if kept.exists():
        return runs.read_json(kept)
    best, fastest, threads = ["float32", torch.get_num_threads()], np.inf, torch.get_num_threads()
    for _, images in read()[1][:1]:
        images = (images if device.type == "cuda" else images[:4]).to(device)
        exact = describe_batch(model, images)
        for precision, n in itertools.product(AUTOCAST, sorted({1, threads})):
            torch.set_num_threads(n)
            for _ in range(3):
                began = time.perf_counter()
                values = describe_batch(model, images, autocast=AUTOCAST[precision])
                near = float(torch.nn.functional.cosine_similarity(values, exact).min()) > 0.99
                seconds = time.perf_counter() - began
                if near and seconds < fastest * (1 if precision == "float32" else 0.8):
                    best, fastest = [precision, n], seconds
                if seconds > 3 * fastest:  # bfloat16 may be 18 times slower
                    break
    runs.write_json(kept, best)
    return best


def _through_head(model, values, names, context, anchors, seed, loader, dtype, device, start=0, *_):
    """Rows of stored descriptors in their context, batch by batch, without the first `start`."""
    if anchors is not None:
        anchors = torch.as_tensor(np.asarray(anchors, np.float32), device=device)
    for rows in context.batches(names, seed=seed, loader=loader):
        if start <= 0:
            batch = torch.from_numpy(np.asarray(values[rows], np.float32)).to(device)
            with evaluating(model):
                batch = in_context(model, batch, context, anchors).float()
            yield rows, _stored(batch, dtype, [names[row] for row in rows], f"context {context}"), [], 0.0
        start -= len(rows)


def compose(
    model, values, names, context, out=None, *, anchors=None, seed=0, loader="", device="auto"
) -> np.ndarray:
    """Send stored descriptors, `values` (N, D), through the InteractHead in the batches of a context.

    The N `names` are those of `names_in_order`; the other parameters are those of `describe`. The result is
    written row by row into `out`, which may be a memmap; by default a new float32 array.
    """
    out = np.empty(values.shape, np.float32) if out is None else out
    how = (Context.parse(context), anchors, seed, loader, str(out.dtype), move_to(model, device))
    for rows, block, *_ in _through_head(model, values, names, *how):
        out[rows] = block
    return out


def own_anchors(model) -> np.ndarray | None:
    """The anchors (m, D) that belong to a model's InteractHead, learned or stored; None where it has none."""
    anchors = getattr(model, "anchors", None)
    return None if anchors is None else np.asarray(torch.as_tensor(anchors).detach().float().cpu())


def choose_anchors(descriptors, m: int, method: str = "sample", seed: int = 0) -> np.ndarray:
    """Choose the m fixed descriptors, (m, D) float32, of the context anchors, which is not in the paper.

    They come from `descriptors` (N, D) before the head, of references or training pictures, never queries:
    rows drawn without replacement (``sample``), or ``kmeans`` centres of at most 256 m rows, of their length.
    """
    if isinstance(descriptors, Descriptors):
        runs.check("the context of the descriptors", descriptors.context, choices=("none",))
        descriptors = descriptors.values
    runs.check("m", m, 1, n := len(descriptors), whole=True)
    runs.check("method", method, choices=("sample", "kmeans"))
    rng = runs.rng(seed, "anchors", method)
    if method == "sample":
        return np.asarray(descriptors[np.sort(rng.choice(n, m, replace=False))], np.float32)
    from sklearn.cluster import KMeans

    x = np.ascontiguousarray(descriptors[np.sort(rng.choice(n, min(n, 256 * m), replace=False))], np.float32)
    kmeans = KMeans(m, n_init=1, max_iter=50, random_state=int(rng.integers(2**31))).fit(x)
    centres, length = kmeans.cluster_centers_, np.linalg.norm(x, axis=1).mean()
    return (centres * (length / np.linalg.norm(centres, axis=1, keepdims=True))).astype(np.float32)


class TokenStore(RowStore):
    """Tokens after a backbone's frozen prefix, `values` (N, T, M) float16: what no training changes."""

    grid = property(lambda self: tuple(self.manifest["grid"]))  # rows and columns of the patches

    def __getitem__(self, rows: np.ndarray) -> Tensor:
        """The tokens (n, T, M), float32, of rows (n,)."""
        return torch.from_numpy(np.asarray(self.values[np.asarray(rows)])).float()


def open_tokens(
    folder, model, places, *, preprocess, limit_gb, batch_size=32, workers=0, autocast=None, progress=True
) -> TokenStore:
    """The stored tokens of `places`, computed now where they are missing.

    With a `preprocess` of V `Views`, row ``V i + v`` is version v of image i. A store of over `limit_gb`
    gigabytes (1e9 bytes) is a ValueError. `autocast` is a lower precision in which the prefix runs, or None.
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
    need = f"frozen tokens of {len(paths)} images, {tokens} x {width} each: {need_gb:.3g} GB on disk"
    if need_gb > limit_gb:
        raise ValueError(f"{need}, more than cache_limit_gb = {limit_gb:g}; raise it, or set it to None")
    how = (paths, preprocess, prefix, "float16", "set cache_limit_gb to None", batch_size, workers, "raise")

    key = {"prefix": model.backbone.prefix_fingerprint(), "data": pictures_fingerprint(places)}
    key |= {"preprocess": repr(preprocess), "autocast": str(autocast)}
    grid = model.backbone.grid((1, 3, *size))
    how, bar = partial(_of_pictures, *how), need * progress
    return TokenStore.make(folder, "tokens", key, len(paths), how, batch=batch_size, bar=bar, grid=grid)


class ModelFingerprint(NamedTuple):
    """Two hashes, equal for models that compute the same: without the InteractHead, and with it."""

    embedding: str
    whole: str

    def under(self, context: str | Context) -> str:
        """The one on which descriptors of this context depend."""
        return self.embedding if str(context) == "none" else self.whole


def model_fingerprint(model) -> ModelFingerprint:
    """Hashes that change with whatever changes a model's descriptors.

    Modules of this package and of its libraries count with classes, plain attributes, weights and buffers.
    Other code needs an attribute ``fingerprint``, a text that changes whenever code or settings do (weights
    count besides); without one the hashes are new at every call, so that it is described anew.
    """

    def is_known(part):
        altered = any(callable(getattr(type(part), name, None)) for name in vars(part))
        hooks = part._forward_hooks or part._forward_pre_hooks
        return type(part).__module__.partition(".")[0] in LIBRARIES and not altered and not hooks

    own, facts = getattr(model, "fingerprint", None), {}
    parts = dict(model.named_modules(remove_duplicate=False)) if isinstance(model, torch.nn.Module) else {}
    if own is None and not (parts and all(map(is_known, parts.values()))):
        own, parts = secrets.token_hex(8), {}
    for at, part in parts.items():
        facts[f"{at}.class"] = type(part).__qualname__
        for name, value in {**vars(part), **part._parameters, **part._buffers}.items():
            if torch.is_tensor(value):
                raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
                facts[f"{at}.{name}"] = [str(value.dtype), list(value.shape), raw]
            elif own is None and isinstance(value, PLAIN) and name[0] != "_" and name not in NO_SETTINGS:
                facts[f"{at}.{name}"] = repr(value)
    if not hasattr(model, "has_head"):
        return ModelFingerprint(*[runs.fingerprint([type(model).__qualname__, own, facts])] * 2)
    config = {k: repr(v) for k, v in (getattr(model, "config", None) or {}).items() if k not in NO_SETTINGS}
    facts |= {f"head.{k}" if k.startswith("interact") else f"config.{k}": v for k, v in config.items()}
    below = {k: v for k, v in facts.items() if not k.startswith("head.")}
    return ModelFingerprint(*(runs.fingerprint([type(model).__qualname__, own, x]) for x in (below, facts)))


def describe_callable(preprocess) -> str:
    """A preprocess as text: the repr of one of this package, name and ``fingerprint`` of another."""
    if hasattr(preprocess, "__dataclass_fields__") and type(preprocess).__module__.startswith("sagelib."):
        return repr(preprocess)
    name = getattr(preprocess, "__qualname__", type(preprocess).__qualname__)
    return f"{name} {getattr(preprocess, 'fingerprint', None) or secrets.token_hex(8)}"


def preprocess_of(model, preprocess: Callable | None = None) -> Callable:
    """`preprocess`, or the model's ``preprocess``, or that of the dict ``preprocessing`` saved with it.

    What the model's dict ``asked`` says goes first; kept aspects get multiples of the backbone's patch.
    """
    preprocess, own = preprocess or getattr(model, "preprocess", None), getattr(model, "preprocessing", None)
    if preprocess is None and not own:
        raise ValueError("this model names no preprocess: give one, as in preprocess=Preprocess(322)")
    preprocess = Preprocess(**own) if preprocess is None else preprocess
    if not isinstance(preprocess, Preprocess):
        return preprocess
    preprocess = replace(preprocess, **getattr(model, "asked", {}))
    cut = preprocess.resize != "square" and preprocess.multiple is None and hasattr(model, "backbone")
    return replace(preprocess, multiple=model.backbone.patch) if cut else preprocess


def pictures_fingerprint(*tables) -> str:
    """A short hash of what the files hold, in order: a picture replaced under its name is another one."""
    files = [path for places in tables for path in places.path]
    return runs.fingerprint([*map(file_digest, tqdm(files, "read", unit="img", disable=len(files) < 10**4))])


def file_digest(path) -> str:
    """A hash of a file's bytes, or "" where there is none; read again only when its stat has changed."""
    with contextlib.suppress(OSError):
        stat = Path(path).stat()
        return _digest(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    return ""


@lru_cache(maxsize=1_000_000)
def _digest(path, *stat):
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def launched(device="auto") -> PartialState:
    """The processes of ``accelerate launch`` or ``torchrun``, or this one alone."""
    # The others wait while the main process works alone; torch would give up after minutes.
    cpu = str(device) == "cpu" or not torch.cuda.is_available()
    return PartialState(cpu=cpu, timeout=timedelta(days=7))


def shared(value):
    """The main process's value, in every process."""
    return broadcast_object_list([value])[0]


def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name, if there is one; ``auto``: CUDA where it is, then Apple's MPS, then CPU."""
    cuda, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    runs.check("device", str(name).partition(":")[0], choices=("auto", "cpu", "cuda", "mps"))
    device = torch.device(("cuda" if cuda else "mps" if mps else "cpu") if name == "auto" else name)
    if device == torch.device("cuda"):  # of several processes each has its own
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if (device.type == "cuda" and (device.index or 0) >= cuda) or (device.type == "mps" and not mps):
        sees = f"PyTorch {torch.__version__} sees {cuda} CUDA devices and {'an' if mps else 'no'} MPS here"
        raise ValueError(f"device is {str(device)!r}, but {sees}: use device='auto', or a build for your GPU")
    return device


def move_to(model, device: str | torch.device) -> torch.device:
    """Move a model, where it is a module, to the device of that name (`pick_device`); return the device."""
    device = pick_device(device)
    if isinstance(model, torch.nn.Module):
        model.to(device)
    return device


@dataclass(frozen=True)
class GreyPixels:
    """Preprocess of `baseline_pixels`: 8-bit grey, the mean over boxes, as a tensor (1, size, size)."""

    size: int = 32

    def __call__(self, picture: Image.Image) -> Tensor:
        grey = picture.convert("L").resize((self.size, self.size), Image.Resampling.BOX)
        return torch.from_numpy(np.asarray(grey, np.float32) / 255)[None]


def baseline_pixels(images: Tensor) -> Tensor:
    """The first model of all: grey thumbnails of 32 x 32 pixels, (B, 1024), less their mean, to unit length.

    Images are (B, 1, H, W) grey, or (B, 3, H, W) RGB with ImageNet normalisation. The inner product of two
    descriptors is the correlation of their thumbnails.
    """
    if images.shape[1] == 3:  # to grey by Rec. 601, as Pillow's "L", less a constant
        grey = images.new_tensor(IMAGENET_STD) * images.new_tensor((0.299, 0.587, 0.114))
        images = torch.einsum("bchw,c->bhw", images, grey)[:, None]
    pixels = torch.nn.functional.adaptive_avg_pool2d(images, 32).flatten(1)
    return torch.nn.functional.normalize(pixels - pixels.mean(dim=1, keepdim=True), dim=1)


baseline_pixels.name = "pixels"
baseline_pixels.preprocess = GreyPixels()
baseline_pixels.fingerprint = "pixels-32-1"
