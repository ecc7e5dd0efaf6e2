"""A run: one directory that says what was done, with which numbers, and whether it was finished.

Everything that lasts is written here by three rules. A file appears under its own name only when it is whole
(`atomic_path`). Every random stream is derived from one integer seed and the names of what it is for (`rng`),
so adding a stream never shifts another. A directory belongs to one configuration (`Run.open`): the same
configuration comes back to the same run, finished or to be resumed, and another one is refused with the keys
that differ.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import math
import operator
import os
import platform
import re
import secrets
import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "Run",
    "RunConflict",
    "alone",
    "atomic_path",
    "check_parameters",
    "compare_runs",
    "cores",
    "describe_run",
    "find_runs",
    "fingerprint",
    "load_run",
    "memory_errors",
    "new_array",
    "open_notebook_run",
    "read_json",
    "rng",
    "runs_root",
    "save_array",
    "start_page",
    "torch_seed",
    "write_json",
    "write_text",
]


# --------------------------------------------------------------------------------------------------
# Files that are whole or absent
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary sibling of `path`, renamed to it when the block succeeds, removed when it fails.

    The sibling's name starts with a dot and ends as `path` does, so writers that look at the suffix work and
    readers of this package, which skip dotted names, never see it. A process killed inside the block leaves
    only such a dotted file behind.

    Parameters
    ----------
    path : path
        The final name of one file. Missing parent directories are made.
    sync : bool
        Flush file and directory to the disk before and after the rename, so that a power cut cannot leave an
        empty file under the final name. Off for thousands of small files that can be made again.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with atomic_path(folder / "a.txt") as temporary:
    ...     _ = temporary.write_text("whole")
    >>> [p.name for p in folder.iterdir()]
    ['a.txt']
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name[-200:]}")
    try:
        yield temporary
        if sync:
            _fsync(temporary)
        os.replace(temporary, path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise
    if sync and os.name == "posix":
        _fsync(path.parent)


def _fsync(path: Path) -> None:
    # Windows can flush only a file that is open for writing, and no directory at all.
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write `text` as UTF-8 with plain newlines, atomically; return the path."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return Path(path)


def write_json(path: str | os.PathLike, obj: Any) -> Path:
    """Write `obj` as indented JSON, atomically; return the path.

    NumPy scalars and arrays, dates, paths, tuples, sets and dataclasses become plain JSON; NaN and infinities
    are written the way Python's `json` reads them back.
    """
    return write_text(path, json.dumps(_plain(obj), indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file.

    Raises
    ------
    ValueError
        If the file is not JSON; the sentence names file, line and column.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})"
        ) from None


def save_array(path: str | os.PathLike, array: np.ndarray) -> Path:
    """Write one array as `.npy` (never pickled), atomically; return the path.

    Raises
    ------
    ValueError
        If the name does not end in ``.npy`` or the array holds objects.
    """
    path = Path(path)
    if path.suffix != ".npy":
        raise ValueError(f"an array is saved under a name that ends in .npy, got {path.name!r}")
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        np.save(stream, np.asarray(array), allow_pickle=False)
    return path


def reserve(handle: int, size: int, path: str | os.PathLike) -> None:
    """Take the disk space of an open file before it is mapped: on a full disk a mapped write kills the process.

    Raises
    ------
    OSError
        If the disk has no room for `size` bytes; the sentence names the file and the gigabytes.
    """
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                f"{os.fspath(path)}: the disk has no room for {size / 1e9:.3g} GB: free some, or give a folder on another disk"
            ) from None


def new_array(path: str | os.PathLike, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    """A new ``.npy`` file, mapped for writing, whose disk space is reserved; where there is none, no file is left (`reserve`)."""
    try:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        with open(path, "r+b") as stream:
            reserve(stream.fileno(), os.path.getsize(path), path)
    except BaseException:
        Path(path).unlink(missing_ok=True)
        raise
    return array


@contextlib.contextmanager
def alone(directory: str | os.PathLike) -> Iterator[None]:
    """Let one process at a time write into a directory; the next one waits, and then finds what is there.

    Where the file system has no locks, a warning says so and the work goes on.
    """
    try:
        import fcntl
    except ImportError:  # Windows, where two processes in one folder are not kept apart
        yield
        return
    # A lock on the directory itself leaves no file behind, and ends with the process, however that ends.
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            warnings.warn(
                f"{os.fspath(directory)}: this file system gives no locks ({error.strerror}); let one process at a time work here",
                stacklevel=3,
            )
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def memory_errors(sentence: str) -> Iterator[None]:
    """Raise a MemoryError with this sentence where the memory of the machine or of a GPU runs out in the block."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        marks = ("not enough memory", "can't allocate memory", "out of memory")
        if isinstance(error, MemoryError) or any(mark in str(error) for mark in marks):
            raise MemoryError(sentence) from error
        raise


# --------------------------------------------------------------------------------------------------
# Random streams and fingerprints
# --------------------------------------------------------------------------------------------------


def cores() -> int:
    """Processors that this process may use: fewer than there are where it was given a share."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def rng(seed: int, *names: str | int) -> np.random.Generator:
    """An independent NumPy generator for what `names` say, from one integer seed.

    The stream depends on the seed and the names alone: not on the process, the platform, or on how many other
    streams were drawn.

    Parameters
    ----------
    seed : int
        Not negative.
    *names : str or int
        For example ``rng(0, "sampler", epoch)``; ``1`` and ``"1"`` name different streams.

    Examples
    --------
    >>> bool(rng(0, "sampler", 3).random() == rng(0, "sampler", 3).random())
    True
    >>> bool(rng(0, "sampler", 3).random() == rng(0, "sampler", 4).random())
    False
    """
    return np.random.default_rng(np.random.SeedSequence(_entropy(seed, names)))


def torch_seed(seed: int, *names: str | int) -> int:
    """The same derivation as `rng`, as an integer in [0, 2**63) for ``torch.Generator.manual_seed``."""
    return int(np.random.SeedSequence(_entropy(seed, names)).generate_state(1, np.uint64)[0] >> 1)


def _entropy(seed: int, names: tuple) -> list[int]:
    seed = operator.index(seed)
    if seed < 0:
        raise ValueError(f"seed must be an integer >= 0, got {seed}")
    tokens = [name if isinstance(name, str) else operator.index(name) for name in names]
    digest = hashlib.blake2b(json.dumps([seed, tokens]).encode(), digest_size=16).digest()
    return [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)]


def fingerprint(obj: Any) -> str:
    """A short hash of a configuration, of arrays or of bytes: equal things give equal hashes on any machine.

    Mappings do not depend on the order of their keys, a tuple equals a list, and 1 equals 1.0, as after a
    trip through JSON. Arrays count with dtype and shape.

    Returns
    -------
    str
        16 hexadecimal digits (64 bits): enough to notice a change, no protection against forgery.

    Examples
    --------
    >>> fingerprint({"a": 1, "b": (2, 3)}) == fingerprint({"b": [2, 3], "a": 1.0})
    True
    """
    digest = hashlib.blake2b(digest_size=8)
    _feed(digest, obj)
    return digest.hexdigest()


def _feed(digest: Any, obj: Any) -> None:
    def put(tag: str, data: bytes) -> None:
        # Tag and length keep ["ab"] and ["a", "b"] apart.
        digest.update(f"{tag}{len(data)}:".encode())
        digest.update(data)

    if isinstance(obj, np.ndarray) and obj.dtype != object:
        obj = np.atleast_1d(obj) if obj.ndim == 0 else obj
        put("array", f"{obj.dtype.str}{obj.shape}".encode())
        rows = max(1, (1 << 24) // max(1, obj[:1].nbytes))  # a memory-mapped array is read 16 MiB at a time
        for start in range(0, len(obj), rows):
            digest.update(np.ascontiguousarray(obj[start : start + rows]).tobytes())
        return
    if isinstance(obj, bytes | bytearray | memoryview):
        return put("bytes", bytes(obj))
    if isinstance(obj, Mapping) or (dataclasses.is_dataclass(obj) and not isinstance(obj, type)):
        items = obj.items() if isinstance(obj, Mapping) else vars(obj).items()
        put("map", b"")
        for key, value in sorted((str(k), v) for k, v in items):
            put("key", key.encode())
            _feed(digest, value)
        return put("end", b"")
    if isinstance(obj, np.ndarray | list | tuple):
        put("list", b"")
        for value in obj:
            _feed(digest, value)
        return put("end", b"")
    obj = _plain(obj)
    if isinstance(obj, list):
        return _feed(digest, obj)
    if isinstance(obj, float) and obj.is_integer():
        obj = int(obj)
    put(type(obj).__name__ if isinstance(obj, bool | str) else "", repr(obj).encode())


def _plain(obj: Any) -> Any:
    """What JSON can say of `obj`."""
    if obj is None or isinstance(obj, bool | int | str):
        return obj
    if isinstance(obj, float):
        return float(obj)
    if isinstance(obj, Mapping):
        return {str(key): _plain(value) for key, value in obj.items()}
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: _plain(getattr(obj, field.name)) for field in dataclasses.fields(obj)}
    if isinstance(obj, np.ndarray):
        return [_plain(value) for value in obj] if obj.ndim else _plain(obj[()])
    if isinstance(obj, np.datetime64):
        return str(obj)
    if isinstance(obj, np.generic):
        return _plain(obj.item())
    if isinstance(obj, set | frozenset):
        return sorted(_plain(value) for value in obj)
    if isinstance(obj, Sequence) and not isinstance(obj, bytes | bytearray):
        return [_plain(value) for value in obj]
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    if hasattr(obj, "isoformat"):
        return obj.isoformat()
    raise ValueError(f"a {type(obj).__name__} cannot be written as JSON: {obj!r}")


# --------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------

MANIFEST = "manifest.json"
_PACKAGES = (
    "sagelib",
    "torch",
    "torchvision",
    "timm",
    "peft",
    "accelerate",
    "pytorch-metric-learning",
    "faiss-cpu",
    "numpy",
    "scipy",
    "pillow",
)


def check(name: str, value, low=None, high=None, *, above=None, choices=None, whole=False, none=False):
    """`value`, if it is in its range.

    Parameters
    ----------
    name : str
        What the sentence calls it.
    value : number or one of `choices`
    low, high : number, optional
        Least and greatest value, inclusive.
    above : number, optional
        An exclusive lower end.
    choices : sequence, optional
        All values there are.
    whole : bool
        Whole numbers only.
    none : bool
        None is allowed as well.

    Raises
    ------
    ValueError
        With the name, what is allowed, and the value.

    Examples
    --------
    >>> check("top_k", 0, 1, whole=True, none=True)
    Traceback (most recent call last):
    ValueError: top_k must be a whole number of at least 1, or None, got 0
    """
    if value is None and none:
        return value
    if choices is not None:
        good, words = value in choices, "one of " + ", ".join(map(str, choices))
    else:
        kinds = (int, np.integer) if whole else (int, float, np.integer, np.floating)
        good = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
        good = good and (low is None or value >= low) and (high is None or value <= high)
        good = good and (above is None or value > above)
        words = "a whole number" if whole else "a number"
        if above is not None:
            words += f" above {above}" + ("" if high is None else f" and at most {high}")
        elif low is not None and high is not None:
            words += f" from {low} to {high}"
        elif low is not None or high is not None:
            words += f" of at least {low}" if high is None else f" of at most {high}"
    if not good:
        raise ValueError(f"{name} must be {words}{', or None' if none else ''}, got {value!r}")
    return value


class RunConflict(ValueError):
    """A directory already holds a run of another configuration; the sentence names what differs."""


class Run:
    """A directory ``root/stage/name`` with a manifest, a log and what the stage writes; see `Run.open`.

    Attributes
    ----------
    dir : Path
    manifest : dict
        stage, name, config, config_hash, seed, data_fingerprint, git_commit, versions, device, platform,
        started, finished (ISO 8601, UTC), wall_time_s, status (``"unfinished"`` or ``"finished"``), metrics.
    """

    def __init__(self, directory: str | os.PathLike, manifest: dict) -> None:
        self.dir = Path(directory)
        self.manifest = manifest
        self._log = self.dir / "log.jsonl"
        self._opened = time.monotonic()
        # A resumed run has already spent the time that its last log line tells.
        self._spent_s = 0.0
        if not self.finished:
            self._spent_s = max(
                (float(line.get("wall_time_s", 0.0)) for line in self.read_log()), default=0.0
            )

    @classmethod
    def open(
        cls,
        root: str | os.PathLike,
        stage: str,
        name: str,
        config: Mapping,
        *,
        seed: int | None = None,
        data_fingerprint: str | None = None,
        device: Any = None,
    ) -> Run:
        """Open ``root/stage/name`` for this configuration: new, to be resumed, or already finished.

        Parameters
        ----------
        root : path
            Folder of runs, for example ``data/runs``.
        stage, name : str
            One folder name each, such as ``"evaluate"`` and ``"sage-town"``.
        config : mapping
            Everything that the result depends on, able to be written as JSON. Seed and data fingerprint count
            as part of it; device, versions and commit are recorded and do not.
        seed, data_fingerprint, device
            Recorded in the manifest.

        Raises
        ------
        RunConflict
            If the directory holds work of another configuration, seed or data: keys, old and new values are
            named. (A manifest alone is no work: a run that failed before its first line may be corrected.)
        ValueError
            If `stage` or `name` is no single folder name.
        """
        for what, value in (("stage", stage), ("name", name)):
            if not value or value.startswith(".") or any(mark in value for mark in '/\\:*?"<>|'):
                raise ValueError(f"the {what} of a run must be one plain folder name, got {value!r}")
        directory = Path(root) / stage / name
        config = _plain(config if isinstance(config, Mapping) else dataclasses.asdict(config))
        identity = {"config": config, "seed": _plain(seed), "data_fingerprint": data_fingerprint}
        fresh = {
            "stage": stage,
            "name": name,
            **identity,
            "config_hash": fingerprint(config),
            "git_commit": _git_commit(),
            "versions": _versions(),
            "device": None if device is None else str(device),
            "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
            "started": _now(),
            "finished": None,
            "wall_time_s": None,
            "status": "unfinished",
            "metrics": {},
        }
        if not (directory / MANIFEST).exists():
            write_json(directory / MANIFEST, fresh)
            return cls(directory, fresh)

        found = read_json(directory / MANIFEST)
        rows = _differences({key: found.get(key) for key in identity}, identity)
        if rows and found["status"] != "finished" and [p.name for p in directory.iterdir()] == [MANIFEST]:
            # A run that ended before its first line, on a wrong value for instance, is nobody's work.
            write_json(directory / MANIFEST, fresh)
            return cls(directory, fresh)
        if rows:
            changes = "; ".join(
                f"{key.removeprefix('config.')}: {old!r} -> {new!r}" for key, old, new in rows
            )
            raise RunConflict(
                f"{directory} holds a run of another configuration ({changes}): choose another name, or "
                "remove that folder"
            )
        if found["status"] != "finished":
            found.update({key: fresh[key] for key in ("git_commit", "versions", "device", "platform")})
            write_json(directory / MANIFEST, found)
        return cls(directory, found)

    @property
    def finished(self) -> bool:
        """Whether `finish` was reached."""
        return self.manifest["status"] == "finished"

    @property
    def stage(self) -> str:
        return self.manifest["stage"]

    @property
    def name(self) -> str:
        return self.manifest["name"]

    @property
    def config(self) -> dict:
        return self.manifest["config"]

    @property
    def metrics(self) -> dict:
        return self.manifest["metrics"]

    @property
    def wall_time_s(self) -> float:
        """Seconds of work over all sessions of a resumed run; a killed one counts to its last log line."""
        if self.finished:
            return self.manifest["wall_time_s"]
        return self._spent_s + time.monotonic() - self._opened

    def path(self, *parts: str) -> Path:
        """A path inside the run; its parent directories are made."""
        path = self.dir.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def log(self, row: Mapping) -> None:
        """Append one line to ``log.jsonl`` and flush it; the line also carries ``wall_time_s``.

        A half line left by a killed process is removed first.
        """
        line = json.dumps(_plain({**row, "wall_time_s": round(self.wall_time_s, 3)}), ensure_ascii=False)
        with open(self.path("log.jsonl"), "ab+") as stream:
            stream.seek(0, os.SEEK_END)
            if stream.tell():
                stream.seek(-1, os.SEEK_END)
                if stream.read(1) != b"\n":
                    stream.seek(0)
                    stream.truncate(stream.read().rfind(b"\n") + 1)
            stream.write(line.encode() + b"\n")
            stream.flush()

    def read_log(self) -> list[dict]:
        """All whole lines of the log, oldest first."""
        if not self._log.exists():
            return []
        text = self._log.read_text(encoding="utf-8", errors="replace")
        rows = []
        for number, line in enumerate(
            text.split("\n")[:-1], start=1
        ):  # what follows the last newline is half a line
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                raise ValueError(
                    f"{self._log}, line {number}: not a JSON line; repair or remove the file"
                ) from None
        return rows

    def finish(self, metrics: Mapping | None = None) -> None:
        """Write the metrics and the word "finished" into the manifest: the last thing that a run does.

        Raises
        ------
        ValueError
            If the run was finished before.
        """
        if self.finished:
            raise ValueError(f"{self.dir} is already finished: open it under another name to do it again")
        done = {**self.manifest, "metrics": _plain(dict(metrics or {})), "status": "finished"}
        done |= {"finished": _now(), "wall_time_s": round(self.wall_time_s, 3)}
        write_json(self.dir / MANIFEST, done)
        self.manifest = done

    def save_figure(self, figure: Any, name: str, numbers: Any = None) -> list[Path]:
        """Save a figure under ``figures/``, and the numbers it shows beside it.

        Parameters
        ----------
        figure : object
            With ``savefig`` (matplotlib): ``<name>.png`` and ``<name>.pdf``. With ``write_html`` (plotly):
            ``<name>.html``, and ``<name>.png`` where the machine has what plotly needs for it.
        name : str
        numbers : table with ``to_csv``, or anything JSON can say, optional
            Saved as ``<name>.csv`` or ``<name>.json``.

        Returns
        -------
        list of Path
            The files written.
        """
        base = self.path("figures", name)
        written = []
        if hasattr(figure, "savefig"):
            for suffix in (".png", ".pdf"):
                with atomic_path(base.with_name(name + suffix)) as temporary:
                    figure.savefig(temporary, dpi=150, bbox_inches="tight")
                written.append(base.with_name(name + suffix))
        elif hasattr(figure, "write_html"):
            with atomic_path(base.with_name(name + ".html")) as temporary:
                # plotly.js is written into the page, so that it opens anywhere without a network.
                figure.write_html(temporary, include_plotlyjs=True)
            written.append(base.with_name(name + ".html"))
            # A still picture needs a browser that plotly can drive; the page is there without it.
            with contextlib.suppress(Exception):
                with atomic_path(base.with_name(name + ".png")) as temporary:
                    figure.write_image(temporary, scale=2)
                written.append(base.with_name(name + ".png"))
        else:
            raise ValueError(f"a figure needs savefig or write_html, got a {type(figure).__name__}")
        if hasattr(numbers, "to_csv"):
            with atomic_path(base.with_name(name + ".csv")) as temporary:
                numbers.to_csv(temporary, index=False)
            written.append(base.with_name(name + ".csv"))
        elif numbers is not None:
            written.append(write_json(base.with_name(name + ".json"), numbers))
        return written

    def __repr__(self) -> str:
        return f"Run({str(self.dir)!r}, {self.manifest['status']})"


def load_run(path: str | os.PathLike) -> Run:
    """The run in directory `path`.

    Raises
    ------
    FileNotFoundError
        If there is no manifest.
    """
    path = Path(path)
    if not (path / MANIFEST).exists():
        raise FileNotFoundError(f"{path} holds no run: there is no {MANIFEST} in it")
    return Run(path, read_json(path / MANIFEST))


def find_runs(
    root: str | os.PathLike, stage: str | None = None, *, finished: bool | None = True
) -> list[Run]:
    """The runs under `root`, sorted by stage and name.

    Parameters
    ----------
    root : path
    stage : str, optional
        Only of this stage; all stages by default.
    finished : bool or None
        True: finished ones only; False: unfinished only; None: both.
    """
    runs = [load_run(manifest.parent) for manifest in sorted(Path(root).glob(f"{stage or '*'}/*/{MANIFEST}"))]
    return [run for run in runs if finished is None or run.finished == finished]


def runs_root(folder: str | os.PathLike = "") -> Path:
    """The folder of runs: `folder`, or else the environment's ``SAGE_RUNS``, or else ``data/runs`` of this checkout.

    Notebooks take an empty `folder` by default, so that one variable sends all of them elsewhere.
    """
    chosen = folder or os.environ.get("SAGE_RUNS") or Path(__file__).resolve().parent.parent / "data" / "runs"
    return Path(chosen)


def open_notebook_run(folder: str | os.PathLike, notebook: str, subject: str, **parameters: Any) -> Run:
    """The run of one notebook with these parameters: ``<runs>/notebooks/<notebook>-<subject>-<hash of parameters>``.

    Unlike other runs, it starts afresh each time: a page that is executed again writes its figures again.

    Parameters
    ----------
    folder : path
        As for `runs_root`.
    notebook : str
        Its number, such as ``"01"``.
    subject : str
        What it was about, for a name that a person recognises.
    **parameters
        What its figures depend on.
    """
    name = f"{notebook}-{subject.replace('/', '_')}-{fingerprint(_plain(parameters))[:6]}"
    run = Run.open(runs_root(folder), "notebooks", name, parameters)
    again = {"started": _now(), "finished": None, "wall_time_s": None, "status": "unfinished", "metrics": {}}
    run.manifest = {**run.manifest, **again}
    write_json(run.dir / MANIFEST, run.manifest)
    return run


NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


def start_page(namespace: Mapping[str, Any], **allowed: float | Sequence) -> None:
    """Begin a notebook: its paths start at the checkout's ``notebooks``, and its parameters are checked.

    Wherever a page is started from, a relative path means the same: ``notebooks`` becomes the working directory.

    Parameters
    ----------
    namespace, **allowed
        As for `check_parameters`.

    Raises
    ------
    ValueError
        As `check_parameters`, and where papermill was given a name that the page does not declare.
    """
    if NOTEBOOKS.is_dir():
        os.chdir(NOTEBOOKS)
    known = list(namespace.get("__annotations__", {}))
    # papermill sets what it is given in a cell of its own, which begins with this comment.
    given = [cell for cell in namespace.get("In", []) if cell.startswith("# Parameters\n")][-1:]
    unknown = [name for cell in given for name in re.findall(r"^(\w+) = ", cell, re.M) if name not in known]
    if unknown:
        raise ValueError(
            f"this page has no parameter {', '.join(unknown)}; it has {', '.join(known)} (of a file for several "
            "pages, notebooks/reproduce.py gives each page its own)"
        )
    check_parameters(namespace, **allowed)


_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    dict: "a mapping of names to values",
}


def check_parameters(namespace: Mapping[str, Any], **allowed: float | Sequence | None) -> None:
    """Check a notebook's parameters: each against the type that it is declared with, some against what is allowed.

    A command line or a file may give anything; a sentence at the top of a page is worth more than an error below it.

    Parameters
    ----------
    namespace : mapping
        The page's ``globals()``; its annotated names are the parameters.
    **allowed
        Of some of them the least value, or all values; None for those that may be None.

    Raises
    ------
    ValueError
        With the name, what is allowed, and the value.

    Examples
    --------
    >>> check_parameters({"__annotations__": {"epochs": int}, "epochs": "three"})
    Traceback (most recent call last):
    ValueError: epochs must be a whole number, got 'three'
    """
    for name, kind in namespace.get("__annotations__", {}).items():
        value = namespace.get(name)
        if value is None and name in allowed and allowed[name] is None:
            continue
        accepted = (int, float) if kind is float else kind
        if kind in _KINDS and (
            not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool)
        ):
            # papermill's -p makes a number of what looks like one.
            hint = f": on papermill's command line write -r {name} {value}" if kind is str else ""
            raise ValueError(f"{name} must be {_KINDS[kind]}, got {value!r}{hint}")
        limit = allowed.get(name)
        if isinstance(limit, int | float) and not value >= limit:
            raise ValueError(f"{name} must be at least {limit}, got {value!r}")
        if isinstance(limit, Sequence) and value not in limit:
            known = f"{limit[0]} to {limit[-1]}" if isinstance(limit, range) else ", ".join(map(str, limit))
            raise ValueError(f"{name} must be one of {known}, got {value!r}")


def describe_run(run: Run) -> str:
    """The run as a short text: what it is, its configuration, its metrics."""
    m = run.manifest
    head = f"{m['stage']}/{m['name']}  {m['status']}"
    lines = [head, "-" * len(head)]
    keys = (
        "started",
        "finished",
        "wall_time_s",
        "device",
        "platform",
        "git_commit",
        "seed",
        "data_fingerprint",
    )
    facts = (
        {key: m.get(key) for key in keys} | _flat(m["config"], "config.") | _flat(m["metrics"], "metrics.")
    )
    width = max(len(key) for key in facts)
    lines += [f"{key:<{width}}  {'-' if value is None else value}" for key, value in facts.items()]
    return "\n".join(lines)


def compare_runs(a: Run, b: Run) -> list[dict]:
    """What differs between two runs.

    Returns
    -------
    list of dict
        ``{"key", "a", "b"}`` for every differing seed, data fingerprint and ``config.*``, then for every
        ``metrics.*``; a missing value is None. `pandas.DataFrame` takes it as it is.
    """
    kinds = ("seed", "data_fingerprint", "config", "metrics")
    left, right = ({kind: run.manifest.get(kind) for kind in kinds} for run in (a, b))
    return [{"key": key, "a": old, "b": new} for key, old, new in _differences(left, right)]


def _flat(config: Any, prefix: str = "") -> dict:
    """Nested mappings as one level of dotted keys."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _differences(old: Mapping, new: Mapping) -> list[tuple[str, Any, Any]]:
    old, new = _flat(old), _flat(new)
    keys = list(old) + [key for key in new if key not in old]
    return [(k, old.get(k), new.get(k)) for k in keys if fingerprint(old.get(k)) != fingerprint(new.get(k))]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _git_commit() -> str | None:
    """The commit of this package's source, with ``+changes`` where files differ; None outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", Path(__file__).name
        )  # fails where the package is merely inside some repository
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
