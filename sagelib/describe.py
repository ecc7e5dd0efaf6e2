"""Pictures to descriptors on disk: streamed, resumable, and with the context of the InteractHead said aloud.

Two passes. The first sends every picture through the model once and stores its descriptor *before* the InteractHead:
a function of the picture alone. The second, much cheaper, reads those descriptors and sends them through the head in
batches composed as a `Context` says. What a descriptor depends on is then written in its manifest, and trying another
context costs no second run through the backbone.
"""

import dataclasses
import functools
import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from sagelib import runs
from sagelib.images import IMAGENET_MEAN, IMAGENET_STD, load_image
from sagelib.places import folder_name

_CHECKPOINT_S = 2.0  # progress is recorded this often; a kill costs at most this much work and one batch
_VALUES, _MANIFEST = "descriptors.npy", "manifest.json"
_PART, _PROGRESS = ".descriptors.part.npy", ".progress.json"


# --------------------------------------------------------------------------------------------------- context
@dataclass(frozen=True)
class Context:
    """Which images share a batch of the InteractHead, and so what a descriptor depends on.

    ``none``: the head is off. ``solo``: each image alone. ``sorted-n``: batches of n images in the order of their file
    names, the last one short; this is how the authors of SAGE evaluate, and where queries and references sort alike it
    puts true pairs into like batches. ``shuffled-n``: batches of n in a random order. ``anchors``: each image with one fixed
    set of reference descriptors, so that its descriptor depends on the image alone.

    Queries and references are described separately, as by two loaders that each start at the first file: no batch
    holds both.

    Examples
    --------
    >>> Context.parse("sorted-8")
    Context(kind='sorted', n=8)
    >>> str(Context.parse("sorted-8"))
    'sorted-8'
    """

    kind: str
    n: int | None = None

    def __post_init__(self):
        if self.kind not in ("none", "solo", "sorted", "shuffled", "anchors"):
            raise ValueError(f"context {self.kind!r} is unknown; {_CONTEXTS}")
        batched = self.kind in ("sorted", "shuffled")
        if batched and (self.n is None or self.n < 1):
            raise ValueError(
                f"context {self.kind!r} needs a batch size of at least 1, as in {self.kind}-8; {_CONTEXTS}"
            )
        if not batched and self.n is not None:
            raise ValueError(f"context {self.kind!r} takes no batch size, got {self.n}; {_CONTEXTS}")

    @classmethod
    def parse(cls, text: "str | Context") -> "Context":
        """Read ``none``, ``solo``, ``sorted-8``, ``shuffled-8`` or ``anchors``."""
        if isinstance(text, Context):
            return text
        match = re.fullmatch(r"([a-z]+)(?:-(\d+))?", str(text).strip())
        if match is None:
            raise ValueError(f"context {text!r} cannot be read; {_CONTEXTS}")
        return cls(match[1], None if match[2] is None else int(match[2]))

    def __str__(self):
        return self.kind if self.n is None else f"{self.kind}-{self.n}"

    def batches(
        self, paths: Sequence[str], *, seed: int = 0, loader: str = "", batch_size: int = 256
    ) -> list[np.ndarray]:
        """Cut one loader's images into batches of the head.

        Parameters
        ----------
        paths : sequence of N str
            Sorted as strings; the permutation of ``shuffled-n`` starts from that order.
        seed : int
        loader : str
            The permutation comes from `seed` and this name: references and queries need different names, or as many of both
            would be shuffled alike, and like batches would meet like batches as under ``sorted-n``.
        batch_size : int
            For the contexts in which batches have no influence.

        Returns
        -------
        list of int64 arrays
            Every index from 0 to N - 1 exactly once.
        """
        paths = [str(p) for p in paths]
        if self.kind not in ("sorted", "shuffled"):
            order, n = np.arange(len(paths)), batch_size
        else:
            order, n = np.array(sorted(range(len(paths)), key=paths.__getitem__), np.int64), self.n
        if self.kind == "shuffled":
            order = order[runs.rng(seed, "context", str(self), loader).permutation(len(order))]
        return [order[start : start + n] for start in range(0, len(order), n)]


_CONTEXTS = "give one of none, solo, sorted-n, shuffled-n (n images a batch, as in sorted-8), anchors"


# ----------------------------------------------------------------------------------------------- descriptors
@dataclass(frozen=True)
class Descriptors:
    """Descriptors on disk and what they were made of.

    Attributes
    ----------
    values : memmap (n, dim), float16 or float32, read-only
    context : str
    manifest : dict
        context, seed, anchors, model (fingerprint), data (fingerprint), preprocess, n, dim, dtype, seconds,
        images_per_s, and the pictures that were left out, with the reason.
    path : Path
        Their directory.
    """

    values: np.ndarray
    context: str
    manifest: dict
    path: Path

    def __len__(self):
        return len(self.values)

    @property
    def rows(self) -> np.ndarray:
        """Which images of the Places that were given have a descriptor, in order; shape (n,)."""
        left_out = [skipped["row"] for skipped in self.manifest["skipped"]]
        return np.setdiff1d(np.arange(self.manifest["n_given"]), left_out)

    def kept(self, places):
        """The Places of the rows of `values`; what did not decode is added to its ``left_out``."""
        if not self.manifest["skipped"]:
            return places
        reasons = tuple(skipped["reason"] for skipped in self.manifest["skipped"])
        return places[self.rows].replace(left_out=(*places.left_out, *reasons))


def load_descriptors(path) -> Descriptors:
    """Open finished descriptors.

    Raises
    ------
    FileNotFoundError
        If the directory has none, or only unfinished ones.
    ValueError
        If the array is not what its manifest says.
    """
    path = Path(path)
    if not (path / _MANIFEST).is_file():
        state = (
            "unfinished descriptors: call describe again to go on" if (path / _PROGRESS).exists() else "none"
        )
        raise FileNotFoundError(f"no finished descriptors in {path} ({state})")
    manifest = runs.read_json(path / _MANIFEST)
    values = np.load(path / _VALUES, mmap_mode="r")
    expected = (manifest["n"], manifest["dim"])
    if values.shape != expected or values.dtype != manifest["dtype"]:
        raise ValueError(
            f"{path / _VALUES} holds {values.dtype} {values.shape} but its manifest says {manifest['dtype']} "
            f"{expected}: remove the folder and describe again"
        )
    return Descriptors(values, manifest["context"], manifest, path)


def describe(
    model: Callable,
    places,
    out_dir,
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
    autocast: str | None = None,
    on_error: str = "raise",
    overwrite: bool = False,
    progress: bool = True,
) -> Descriptors:
    """Describe pictures, streaming to disk; go on where an earlier call was stopped.

    The descriptors before the head lie in `out_dir` itself, those of another context in a folder inside it whose name starts
    with the context.
    Descriptors that are there already, from the same model, pictures and settings, are returned at once. A call
    that was killed, at any moment, is continued by the same call, and ends with the same bytes as one that was not.

    Parameters
    ----------
    model : SAGE or callable
        With ``embed`` (and ``interact``, for contexts other than none), or any callable from images (B, 3, H, W) to descriptors
        (B, D). It is moved to `device` and run in evaluation mode.
    places : Places
        The pictures of one loader: references and queries are described by two calls.
    out_dir : path
    preprocess : callable, optional
        From a PIL picture to a tensor, equal in shape for all pictures; default: ``model.preprocess``.
    context : str or Context
    anchors : array (m, D), optional
        For ``context="anchors"``: descriptors before the head, see `choose_anchors`; default: the model's own.
    batch_size : int
        Pictures in memory at once, besides two batches that each worker reads ahead. Results do not depend on it, up to
        rounding; a started call that is to be continued with another one begins again.
    dtype : {"float16", "float32"}
        Of the stored values. With unit-length descriptors float16 rounds distances by less than 1e-3.
    device : str
        See `pick_device`.
    workers : int
        Processes that decode pictures.
    seed, loader : int, str
        Of the batches of ``shuffled-n``. Name the loaders of references and queries differently, see `Context.batches`.
    autocast : {None, "bfloat16", "float16"}
        Mixed precision for the pass through the model.
    on_error : {"raise", "skip"}
        A picture that does not decode raises an error with its name, or is left out: it then has no row, the manifest
        lists it, and ``Descriptors.kept(places)`` are the Places of the rows.
    overwrite : bool
        Replace descriptors of another model, of other pictures or settings, which otherwise are refused.
    progress : bool
        Show a bar with pictures per second.

    Raises
    ------
    ValueError
        For bad settings, pictures that do not decode, descriptors that are not finite, or if `out_dir` holds descriptors
        of other settings.
    """
    context = Context.parse(context)
    preprocess = getattr(model, "preprocess", None) if preprocess is None else preprocess
    _check_settings(places, preprocess, batch_size, dtype, workers, autocast, on_error)
    if context.kind != "none":
        _check_head(model, context, anchors)
    device = pick_device(device)
    if isinstance(model, torch.nn.Module):
        model.to(device)
    identity = {
        "model": model_fingerprint(model, head=False),
        "data": runs.fingerprint([places.fingerprint(), pictures_fingerprint(places)]),
        "preprocess": describe_callable(preprocess),
        "dtype": dtype,
        "autocast": autocast,
        "n_given": len(places),
    }
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    advice = (
        f"not enough memory to describe {batch_size} pictures at a time on {device}: lower batch_size, or take smaller pictures"
        + (f"; the head sees {context.n} at a time (context {context})" if context.n else "")
    )
    with runs.alone(out_dir), runs.memory_errors(advice):
        embedded = _finished(out_dir, identity, overwrite)
        if embedded is None:
            embedded = _embed(
                model, places, out_dir, identity, preprocess, batch_size, device, workers, on_error, progress
            )
        elif embedded.manifest["skipped"] and on_error == "raise":
            raise ValueError(
                f"{embedded.manifest['skipped'][0]['reason']} (descriptors without it are in {out_dir}; on_error='skip' takes them)"
            )
        if context.kind == "none":
            return embedded
        return _describe_in_context(
            model, embedded, places, context, anchors, seed, loader, device, dtype, overwrite, progress
        )


def _check_settings(places, preprocess, batch_size, dtype, workers, autocast, on_error):
    if len(places) == 0:
        raise ValueError("there is no picture to describe: places is empty")
    if preprocess is None:
        raise ValueError(
            "this model names no preprocess of its own: give one, as in preprocess=Preprocess(322)"
        )
    for name, value, allowed in (
        ("dtype", dtype, ("float16", "float32")),
        ("autocast", autocast, (None, "bfloat16", "float16")),
        ("on_error", on_error, ("raise", "skip")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")
    for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0)):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")


def _check_head(model, context, anchors):
    if not getattr(model, "has_head", hasattr(model, "interact")):
        raise ValueError(
            f"context is {context}, but this model has no InteractHead; describe it with context='none'"
        )
    if context.kind == "anchors" and anchors is None and own_anchors(model) is None:
        raise ValueError("context is anchors, but none are given and the model has none: see choose_anchors")


def _finished(directory, identity, overwrite):
    """Descriptors that are there already; None if there are none, an error if they are others."""
    if not (directory / _MANIFEST).exists():
        return None
    found = load_descriptors(directory)
    changed = [
        f"{key}: {found.manifest.get(key)!r} -> {value!r}"
        for key, value in identity.items()
        if found.manifest.get(key) != value
    ]
    if not changed:
        return found
    if not overwrite:
        raise ValueError(
            f"{directory} holds descriptors of other settings ({'; '.join(changed)}): choose another folder, or "
            "give overwrite=True"
        )
    (directory / _MANIFEST).unlink()
    return None


# ------------------------------------------------------------------------------------------------ first pass
class _Pictures(Dataset):
    """Decoded pictures; one that does not decode is given back as a sentence, for the caller to decide."""

    def __init__(self, paths, preprocess):
        self.paths, self.preprocess = paths, preprocess

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, row):
        try:
            picture = load_image(self.paths[row])
        except (OSError, ValueError) as error:
            return row, None, str(error)
        return row, self.preprocess(picture), None


def _collate(items):
    """(rows, images, failures): a batch of what decoded, and {row: sentence} of what did not."""
    failures = {row: sentence for row, image, sentence in items if image is None}
    kept = [(row, image) for row, image, _ in items if image is not None]
    shapes = {tuple(image.shape) for _, image in kept}
    if len(shapes) > 1:
        raise ValueError(f"preprocess gave tensors of several shapes {sorted(shapes)}: it must give one size")
    images = torch.stack([image for _, image in kept]) if kept else None
    return [row for row, _ in kept], images, failures


def _embed(model, places, out_dir, identity, preprocess, batch_size, device, workers, on_error, progress):
    part, progress_file, final = out_dir / _PART, out_dir / _PROGRESS, out_dir / _VALUES
    # Equal bytes after a kill need equal batches on an equal device: with others, begin again.
    settings = {**identity, "batch_size": batch_size, "device": device.type, "on_error": on_error}
    state = {"settings": settings, "done": 0, "dim": None, "skipped": [], "seconds": 0.0}
    values = None
    if progress_file.exists():
        found = runs.read_json(progress_file)
        if found["settings"] == settings and part.exists():
            state, values = found, np.lib.format.open_memmap(part, mode="r+")
        elif found["settings"] == settings and final.exists() and found["done"] == len(places):
            state = found  # killed between the renaming and the manifest
    n = len(places)
    paths = [str(p) for p in places.path]
    embed = getattr(model, "embed", model)
    loader = DataLoader(
        _Pictures(paths, preprocess),
        batch_sampler=[
            range(start, min(start + batch_size, n)) for start in range(state["done"], n, batch_size)
        ],
        collate_fn=_collate,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # otherwise a draw from torch's global one
    )
    started = saved = time.perf_counter()
    seconds_before = state["seconds"]

    def save_progress():
        if values is not None:
            values.flush()
        state["seconds"] = seconds_before + time.perf_counter() - started
        runs.write_json(progress_file, state)

    with (
        evaluating(model),
        torch.inference_mode(),
        tqdm(total=n, initial=state["done"], unit="img", desc="describe", disable=not progress) as bar,
    ):
        for rows, images, failures in loader:
            for row, sentence in sorted(failures.items()):
                if on_error == "raise":
                    raise ValueError(sentence)
                state["skipped"].append({"row": row, "path": paths[row], "reason": sentence})
            if images is not None:
                with _autocast(device, identity["autocast"]):
                    described = embed(images.to(device, non_blocking=True))
                described = _checked(described, rows, paths, identity["dtype"], state["dim"])
                if values is None:
                    state["dim"] = described.shape[1]
                    values = runs.new_array(part, identity["dtype"], (n, state["dim"]))
                values[rows] = described
                images = described = None  # the next batch is decoded before this name is bound again
            state["done"] = min(state["done"] + batch_size, n)
            bar.update(len(rows) + len(failures))
            if time.perf_counter() - saved >= _CHECKPOINT_S:
                save_progress()
                saved = time.perf_counter()
    if state["dim"] is None:
        raise ValueError(f"none of the {n} pictures decodes; the first: {state['skipped'][0]['reason']}")
    if values is not None:
        save_progress()
        if state["skipped"]:
            keep = np.setdiff1d(np.arange(n), [skipped["row"] for skipped in state["skipped"]])
            with runs.atomic_path(final) as temporary:
                packed = runs.new_array(temporary, identity["dtype"], (len(keep), state["dim"]))
                for start in range(0, len(keep), 4096):
                    packed[start : start + 4096] = values[keep[start : start + 4096]]
                packed.flush()
                del packed
        del values  # a mapped file cannot be renamed on Windows
        if state["skipped"]:
            part.unlink()
        else:
            os.replace(part, final)
    manifest = {
        **{"context": "none", "seed": None, "anchors": None},
        **identity,
        "n": n - len(state["skipped"]),
        "dim": state["dim"],
        "batch_size": batch_size,
        "device": str(device),
        "seconds": round(state["seconds"], 3),
        "images_per_s": round(n / max(state["seconds"], 1e-9), 2),
        "skipped": state["skipped"],
    }
    runs.write_json(out_dir / _MANIFEST, manifest)
    progress_file.unlink(missing_ok=True)
    return load_descriptors(out_dir)


def _checked(described, rows, paths, dtype, dim):
    """The model's output as a numpy array of the stored dtype, or an error that says what is wrong with it."""
    if not torch.is_tensor(described) or described.ndim != 2 or len(described) != len(rows):
        got = f"shape {tuple(described.shape)}" if torch.is_tensor(described) else type(described).__name__
        raise ValueError(f"the model must give a tensor ({len(rows)}, D) for {len(rows)} images, got {got}")
    if dim is not None and described.shape[1] != dim:
        raise ValueError(f"the model gave descriptors of {described.shape[1]} dimensions after {dim}")
    return _stored(described.float().cpu().numpy(), dtype, [paths[row] for row in rows])


def _stored(values, dtype, paths):
    """Descriptors (B, D) in the type in which they are kept, or an error where that type cannot hold them."""
    with np.errstate(over="ignore"):
        kept = values.astype(dtype)
    finite = np.isfinite(kept).all(axis=1)
    if not finite.all():
        first = int(np.argmin(finite))
        fits = dtype == "float16" and np.isfinite(values[first]).all()
        raise ValueError(
            f"{paths[first]}: its descriptor is not finite in {dtype}"
            + (
                "; try dtype='float32'"
                if fits
                else ": the model gives a NaN or an infinity; mend it, or try without autocast"
            )
        )
    if kept.dtype == np.float16:
        norm, lost = np.linalg.norm(values, axis=1), np.linalg.norm(values - kept.astype(np.float32), axis=1)
        if (lost > 0.01 * norm).any():
            first = int(np.argmax(lost > 0.01 * norm))
            raise ValueError(
                f"{paths[first]}: its descriptor, of length {norm[first]:.2g}, is too small for float16; give dtype='float32'"
            )
    return kept


class evaluating:
    """Evaluation mode for the time of a block, and the mode of before after it."""

    def __init__(self, model):
        self.modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []

    def __enter__(self):
        self.modes = [module.training for module in self.modules]
        if self.modules:
            self.modules[0].eval()

    def __exit__(self, *error):
        for module, mode in zip(self.modules, self.modes, strict=True):
            module.training = mode


def _autocast(device, name):
    return torch.autocast(device.type, dtype=getattr(torch, name or "bfloat16"), enabled=name is not None)


# ----------------------------------------------------------------------------------------------- second pass
def _describe_in_context(
    model, embedded, places, context, anchors, seed, loader, device, dtype, overwrite, progress
):
    if context.kind == "anchors":
        anchors = own_anchors(model) if anchors is None else np.asarray(anchors, np.float32)
    folder, source = str(context), embedded.manifest
    identity = {key: source[key] for key in ("data", "preprocess", "dtype", "autocast", "n_given")}
    identity |= {
        "model": model_fingerprint(model),
        "context": str(context),
        "seed": None,
        "anchors": None,
        "skipped": source["skipped"],
    }
    if context.kind == "shuffled":
        identity |= {"seed": seed, "loader": loader}
        folder = f"{context}-seed{seed}"
    if context.kind == "anchors":
        identity["anchors"] = runs.fingerprint(anchors)
        folder = f"{context}-{len(anchors)}-{identity['anchors'][:8]}"
    # Another head over the same embedding has a folder of its own.
    folder += f"-{identity['model'][:8]}"
    directory = embedded.path / folder
    found = _finished(directory, identity, overwrite)
    if found is not None:
        return found
    directory.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with runs.atomic_path(directory / _VALUES) as temporary:
        out = runs.new_array(temporary, dtype, embedded.values.shape)
        names = names_in_order(places[embedded.rows])
        compose(
            model,
            embedded.values,
            names,
            context,
            out,
            anchors=anchors,
            seed=seed,
            loader=loader,
            device=device,
            progress=progress,
        )
        out.flush()
        del out
    if context.kind == "anchors":
        runs.save_array(directory / "anchors.npy", anchors)  # to describe one more picture, later
    seconds = time.perf_counter() - started
    manifest = {
        **identity,
        "n": source["n"],
        "dim": source["dim"],
        "device": str(device),
        "seconds": round(seconds, 3),
        "images_per_s": round(source["n"] / max(seconds, 1e-9), 2),
        "embedding_seconds": source["seconds"],
    }
    runs.write_json(directory / _MANIFEST, manifest)
    return load_descriptors(directory)


def compose(
    model,
    values: np.ndarray,
    paths: Sequence[str],
    context: str | Context,
    out: np.ndarray | None = None,
    *,
    anchors: np.ndarray | None = None,
    seed: int = 0,
    loader: str = "",
    batch_size: int = 128,
    device: str | torch.device = "auto",
    progress: bool = False,
) -> np.ndarray:
    """Send stored descriptors through the InteractHead in the batches of a context.

    Parameters
    ----------
    model : with ``interact(descriptors (B, D), anchors=None or (m, D))``
    values : array (N, D)
        Descriptors before the head, of one loader.
    paths : sequence of N str
        Their files; ``sorted-n`` sorts them.
    context : str or Context
    out : array (N, D), optional
        Written row by row, may be a memmap; default: a new float32 array.
    anchors : array (m, D), optional
        For ``anchors``; default: the model's own.
    seed, loader : int, str
        Of ``shuffled-n``, see `Context.batches`.
    batch_size : int
        For ``solo`` and ``anchors``, where it makes no difference beyond rounding.
    device, progress
        As for `describe`.

    Returns
    -------
    array (N, D)
        `out`, in the order of `values`. With the context none, the values themselves.
    """
    context = Context.parse(context)
    if len(paths) != len(values):
        raise ValueError(f"there are {len(values)} descriptors and {len(paths)} paths; they must be as many")
    out = np.empty(values.shape, np.float32) if out is None else out
    if context.kind != "none":
        _check_head(model, context, anchors)
    device = pick_device(device)
    fixed = None
    if context.kind == "solo":
        fixed = torch.zeros(0, values.shape[1], device=device)
    elif context.kind == "anchors":
        fixed = own_anchors(model) if anchors is None else anchors
        fixed = torch.as_tensor(np.asarray(fixed, np.float32), device=device)
        if fixed.ndim != 2 or fixed.shape[1] != values.shape[1]:
            raise ValueError(f"anchors must have shape (m, {values.shape[1]}), got {tuple(fixed.shape)}")
    if isinstance(model, torch.nn.Module):
        model.to(device)
    batches = context.batches(paths, seed=seed, loader=loader, batch_size=batch_size)
    with (
        evaluating(model),
        torch.inference_mode(),
        tqdm(total=len(values), unit="img", desc=str(context), disable=not progress) as bar,
    ):
        for batch in batches:
            block = np.asarray(values[batch], np.float32)
            if context.kind != "none":
                block = (
                    model.interact(torch.from_numpy(block).to(device), anchors=fixed).float().cpu().numpy()
                )
            if not np.isfinite(block).all():
                raise ValueError(f"the InteractHead gave values that are not finite in the context {context}")
            out[batch] = _stored(block, str(out.dtype), [paths[row] for row in batch])
            bar.update(len(batch))
    return out


def rerank_in_context(
    model,
    database_values: np.ndarray,
    query_values: np.ndarray,
    indices: np.ndarray,
    m: int,
    *,
    device: str | torch.device = "auto",
) -> np.ndarray:
    """Order each query's first m references anew, seen among each other: its anchors are these m references.

    This second stage is not in the paper. The query and each of its m references attend over themselves and the same m anchors, and are
    compared by the Euclidean distance of what the head gives. The result depends on the query and the data base, on no other query; but
    these descriptors belong to one query, so nothing can be indexed once: every query costs m + 1 passes through the head.

    Parameters
    ----------
    model : with ``interact(descriptors (B, D), anchors=(m, D))``
    database_values : array (N, D), query_values : array (Q, D)
        Descriptors before the head.
    indices : array (Q, depth), int
        References found by a first stage, nearest first, -1 for none (`sagelib.retrieval.search`).
    m : int
        From 1 to depth. References behind the first m stay where they are.
    device : as for `describe`

    Returns
    -------
    array (Q, depth), int64
    """
    indices = np.array(indices, np.int64)
    if indices.ndim != 2 or len(indices) != len(query_values) or not 1 <= m <= indices.shape[1]:
        raise ValueError(
            f"m is {m}; it must be from 1 to the depth of indices, which must have a row for each of the {len(query_values)} queries, "
            f"got {indices.shape}"
        )
    _check_head(model, Context("solo"), None)
    device = pick_device(device)
    if isinstance(model, torch.nn.Module):
        model.to(device)
    with evaluating(model), torch.inference_mode():
        for row, query in zip(indices, query_values, strict=True):
            first = row[:m][row[:m] >= 0]
            values = np.concatenate([np.asarray(query, np.float32)[None], database_values[first]])
            values = torch.from_numpy(values.astype(np.float32)).to(device)
            seen = model.interact(values, anchors=values[1:]).double()
            distances = (seen[1:] - seen[0]).square().sum(1).cpu().numpy()
            row[: len(first)] = first[np.argsort(distances, kind="stable")]
    return indices


def own_anchors(model) -> np.ndarray | None:
    """The anchors (m, D) that belong to a model's InteractHead, learned or stored; None where it has none."""
    anchors = getattr(model, "anchors", None)
    return None if anchors is None else np.asarray(torch.as_tensor(anchors).detach().float().cpu())


def choose_anchors(descriptors, m: int, method: str = "sample", seed: int = 0) -> np.ndarray:
    """Choose the fixed reference descriptors of the context ``anchors``.

    This context is not in the paper.

    Parameters
    ----------
    descriptors : array (N, D) or Descriptors of the context none
        Of the data base, or of training pictures; never of queries.
    m : int
        How many, from 1 to N.
    method : {"sample", "kmeans"}
        Rows drawn without replacement; or centres of k-means (at most 256 m rows), scaled to the mean
        length of the descriptors, because a mean of unit vectors is shorter than they are.
    seed : int

    Returns
    -------
    array (m, D), float32
    """
    if isinstance(descriptors, Descriptors):
        if descriptors.context != "none":
            raise ValueError(
                f"anchors are chosen before the head, not among descriptors of context {descriptors.context}"
            )
        descriptors = descriptors.values
    n = len(descriptors)
    if not 1 <= m <= n:
        raise ValueError(f"m is {m}; it must be from 1 to the number of descriptors, {n}")
    rng = runs.rng(seed, "anchors", method)
    if method == "sample":
        return np.asarray(descriptors[np.sort(rng.choice(n, m, replace=False))], np.float32)
    if method != "kmeans":
        raise ValueError(f"method is {method!r}; it must be 'sample' or 'kmeans'")
    from sklearn.cluster import KMeans

    rows = np.sort(rng.choice(n, min(n, 256 * m), replace=False))
    x = np.ascontiguousarray(descriptors[rows], np.float32)
    kmeans = KMeans(m, n_init=1, max_iter=50, random_state=int(rng.integers(2**31))).fit(x)
    centres, length = kmeans.cluster_centers_, np.linalg.norm(x, axis=1).mean()
    return (centres * (length / np.linalg.norm(centres, axis=1, keepdims=True))).astype(np.float32)


# ---------------------------------------------------------------------------------- devices and fingerprints
def pick_device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name; ``auto`` is CUDA where there is one, then Apple's MPS, then the CPU.

    Raises
    ------
    ValueError
        If the name is unknown or this machine (or this build of PyTorch) has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device is {name!r}; it must be auto, cpu, cuda (or cuda:1, ...) or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {str(device)!r}, but PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here; "
            "use device='auto', or install a build of PyTorch for your GPU"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device is 'mps', which needs PyTorch for macOS on Apple silicon; use device='auto'")
    return device


def model_fingerprint(model, *, head: bool = True) -> str:
    """A short text that is equal for models that compute the same, and changes with whatever changes their descriptors.

    An attribute ``fingerprint`` (a str, or a method that gives one) is believed; for a module it stands for code and settings, and
    its weights count besides. Modules of this package and of the libraries that it builds on are hashed by their classes, plain
    attributes, ``config`` (without the places that weights were read from), weights and buffers. Any other callable may depend on
    what cannot be seen from outside (globals, closures, other objects), so it gets another text at every call: nothing that was
    stored for it is used again, until it has an attribute ``fingerprint``.

    Parameters
    ----------
    model : callable
    head : bool
        False leaves the InteractHead of a SAGE out: descriptors of the context none do not depend on it.
    """
    own = getattr(model, "fingerprint", None)
    own = str(own() if callable(own) else own) if own is not None else None
    if isinstance(model, torch.nn.Module):
        parts = dict(model.named_modules(remove_duplicate=False))
        settings = dict(getattr(model, "config", None) or {}) if hasattr(model, "has_head") else {}
        skipped = {"weights", "pretrained"}
        if not head and hasattr(model, "has_head"):
            parts = {name: part for name, part in parts.items() if f"{name}.".partition(".")[0] != "head"}
            skipped |= {"interact", "interact_options"}
        if own is None and not all(_is_known(part) for part in parts.values()):
            return _never_again(model)
        settings = {str(key): repr(value) for key, value in settings.items() if key not in skipped}
        state = {name: _module_state(part)[0 if own is None else 2 :] for name, part in parts.items()}
        return runs.fingerprint([type(model).__qualname__, own, settings, state])
    if own is not None:
        return own
    if dataclasses.is_dataclass(model) and _of_package(type(model), "sagelib"):
        return runs.fingerprint([type(model).__qualname__, repr(model)])
    return _never_again(model)


def _never_again(thing) -> str:
    name = getattr(thing, "__qualname__", None) or type(thing).__qualname__
    return (
        f"{name} without a fingerprint, {secrets.token_hex(4)} (it is recognised again only by an attribute "
        "fingerprint, a text that changes whenever its results would)"
    )


def _of_package(kind, *packages):
    return kind.__module__.partition(".")[0] in packages


def _is_known(part):
    """Whether a module computes what its library's class says: no code of its own, no hooks."""
    hooks = part._forward_hooks or part._forward_pre_hooks
    patched = any(callable(getattr(type(part), name, None)) for name in vars(part))
    return (
        _of_package(type(part), "sagelib", "torch", "timm", "torchvision", "peft")
        and not hooks
        and not patched
    )


def _module_state(part):
    """The class, plain attributes, weights and buffers of one module, without its submodules."""
    plain = (bool, int, float, str, type(None), tuple, list, dict)
    skipped = {"training", "config", "_fingerprints"}
    settings = {
        key: repr(value)
        for key, value in vars(part).items()
        if isinstance(value, plain) and key not in skipped and not key.startswith("_")
    }
    tensors = {
        **part._parameters,
        **part._buffers,
        **{k: v for k, v in vars(part).items() if torch.is_tensor(v)},
    }
    weights = {
        name: [str(tensor.dtype), list(tensor.shape), runs.fingerprint(_bytes(tensor))]
        for name, tensor in tensors.items()
        if tensor is not None
    }
    return [type(part).__qualname__, settings, weights]


def _bytes(tensor):
    tensor = tensor.detach().cpu().contiguous()
    return tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.zeros(0, np.uint8)


def pictures_fingerprint(places) -> str:
    """A short hash of what the files hold, in order: a picture that was replaced under its old name is another one."""
    return runs.fingerprint([file_digest(path) for path in places.path])


def file_digest(path) -> str:
    """A hash of a file's bytes, empty where there is no file; read again only when the system says that it changed."""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return _digest(str(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


@functools.lru_cache(maxsize=1_000_000)
def _digest(path, *stat):
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        return f"unreadable: {error.strerror}"


def names_in_order(places) -> list[str]:
    """The names that ``sorted-n`` sorts by: the paths.

    Pictures of Mapillary SLS as downloaded are sorted by the names that they would have in the ``@east@north@...`` layout, which
    is what the authors' batches are cut from.
    """
    if any(places.sequence):
        rows = zip(places.east_m, places.north_m, places.key, strict=True)
        return [folder_name(east, north, pano_id=key) for east, north, key in rows]
    return [str(p) for p in places.path]


def describe_callable(preprocess) -> str:
    """A preprocess as text for a manifest: the repr of one of this package, the name and `model_fingerprint` of another."""
    if dataclasses.is_dataclass(preprocess) and _of_package(type(preprocess), "sagelib"):
        return repr(preprocess)
    name = getattr(preprocess, "__qualname__", None) or type(preprocess).__qualname__
    known = model_fingerprint(preprocess)
    return known if known.startswith(name) else f"{name} {known}"


# -------------------------------------------------------------------------------------------- a first model
@dataclass(frozen=True)
class GreyPixels:
    """Preprocess of `baseline_pixels`: 8-bit grey, then the mean over boxes, as a tensor (1, size, size) in [0, 1]."""

    size: int = 32

    def __call__(self, picture: Image.Image) -> torch.Tensor:
        grey = picture.convert("L").resize((self.size, self.size), Image.Resampling.BOX)
        return torch.from_numpy(np.asarray(grey, np.float32) / 255)[None]


def baseline_pixels(images: torch.Tensor) -> torch.Tensor:
    """The first model of all, without weights: grey pixels of a 32 x 32 thumbnail, less their mean, to unit length.

    Their inner product is the correlation of two thumbnails.

    Parameters
    ----------
    images : Tensor (B, 1, H, W) grey, or (B, 3, H, W) RGB with ImageNet normalisation
        Shrunk to 32 x 32 by averaging where they are larger.

    Returns
    -------
    Tensor (B, 1024)
    """
    if images.shape[1] == 3:
        colours = [torch.tensor(c, device=images.device).view(3, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD)]
        images = images * colours[1] + colours[0]
        # Rec. 601, as Pillow's "L".
        weights = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(3, 1, 1)
        images = (images * weights).sum(dim=1, keepdim=True)
    pixels = torch.nn.functional.adaptive_avg_pool2d(images, 32).flatten(1)
    return torch.nn.functional.normalize(pixels - pixels.mean(dim=1, keepdim=True), dim=1)


baseline_pixels.name = "pixels"
baseline_pixels.preprocess = GreyPixels()
baseline_pixels.fingerprint = "pixels-32-1"
