"""A run: one directory that says what was done, with which numbers, and whether it was finished.

A file appears under its name only when it is whole (`atomic_path`). A random stream is a function of a seed
and of what it is for (`rng`). A directory belongs to one configuration, others are refused (`Run.open`).
"""

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import secrets
import subprocess
import time
import warnings
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

MANIFEST, KEYS = "manifest.json", ("stage", "name", "config", "seed", "status", "metrics")
UNFINISHED = {"finished": None, "wall_time_s": None, "status": "unfinished", "metrics": {}}
STACK = "sagelib torch torchvision timm peft accelerate pytorch-metric-learning faiss-cpu numpy scipy pillow"


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary sibling of the file `path`, renamed to it if the block succeeds, else removed.

    Its name starts with a dot and ends as `path` does. Without `sync`, a power cut may leave an empty file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name[-200:]}")
    try:
        yield temporary
        if sync:
            with open(temporary, "rb+") as stream:
                os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:  # that of a full disk names no file by itself
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write `text` as UTF-8 with plain newlines, atomically; return the path."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return Path(path)


def write_json(path: str | os.PathLike, obj: Any) -> Path:
    """Write `plain(obj)` as indented JSON, atomically; return the path."""
    return write_text(path, json.dumps(plain(obj), indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def broken(path: str | os.PathLike, what: str) -> Iterator[None]:
    """Whatever goes wrong in the block, which reads a file that is there, is a ValueError that names it."""
    try:
        yield
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # libraries raise many kinds on broken bytes, wrong types and missing names
        raise ValueError(f"{path}: {what} ({error})") from error


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file, without a byte order mark; where it is none, a ValueError names the line."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text; save it as UTF-8") from None


def read_json(path: str | os.PathLike, *keys: str) -> Any:
    """Read a JSON file, a mapping with these `keys` if any; where it is none, a ValueError names the file."""
    text = read_text(path)
    with broken(path, "not JSON"):
        obj = json.loads(text)
    if keys and not (isinstance(obj, dict) and obj.keys() >= set(keys)):
        raise ValueError(f"{path}: this must hold the keys {', '.join(keys)}; repair or remove it")
    return obj


def save_array(path: str | os.PathLike, array: np.ndarray) -> Path:
    """Write one array as ``.npy`` (never pickled), atomically; return the path."""
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        np.save(stream, array, allow_pickle=False)
    return Path(path)


def load_array(path: str | os.PathLike, mmap_mode: str | None = None) -> np.ndarray:
    """Read what `save_array` wrote; what is no whole file is a ValueError that names it."""
    with broken(path, "no whole .npy file"):
        return np.load(path, mmap_mode)[...]  # which an archive of arrays does not have


def plain(obj: Any) -> Any:
    """`obj` as JSON gives it back: dataclasses are mappings, arrays and sets lists, paths and dates text."""
    return json.loads(json.dumps(obj, default=_plain))


def _plain(obj: Any) -> Any:
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return {field.name: getattr(obj, field.name) for field in dataclasses.fields(obj)}
    if isinstance(obj, set | frozenset):
        return sorted(obj)
    if isinstance(obj, os.PathLike | np.datetime64 | date):
        return str(obj)
    if isinstance(obj, np.ndarray | np.generic):
        return obj.tolist()
    raise ValueError(f"a {type(obj).__name__} cannot be written as JSON: {obj!r}")


def new_array(path: str | os.PathLike, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    """A new ``.npy`` file, mapped for writing; without room on the disk an OSError, and no file is left."""
    size = np.dtype(dtype).itemsize * math.prod(shape)
    try:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):  # on a full disk, a write to a mapped file kills the process
            with open(path, "r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, os.path.getsize(path))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            Path(path).unlink(missing_ok=True)
            raise OSError(f"{path}: the disk has no room for {size / 1e9:.3g} GB: free some") from None
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # it cannot be reserved here
            raise
    return array


@contextlib.contextmanager
def alone(directory: str | os.PathLike) -> Iterator[None]:
    """Let one process at a time work in a directory; a file system without locks gives a warning."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(Path(directory) / ".lock"))
        except (OSError, NotImplementedError) as error:
            warnings.warn(f"{directory}: no locks here ({error}); start one process at a time", stacklevel=3)
        yield


@contextlib.contextmanager
def memory_errors(sentence: str) -> Iterator[None]:
    """Raise a MemoryError with this sentence where the memory of machine or GPU runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or re.search("(not enough|allocate|out of) memory", str(error)):
            raise MemoryError(sentence) from error
        raise


def check(name: str, value, low=None, high=None, *, above=None, choices=None, whole=False, none=False):
    """`value`, if it is a number in [low, high] and > above, or one of `choices`; a ValueError otherwise.

    `whole` allows whole numbers only, `none` allows None as well.
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


def rng(seed: int, *names: str | int) -> np.random.Generator:
    """An independent NumPy generator, a function of the seed and of the names (1 is not "1") alone."""
    return np.random.default_rng(_seed_sequence(seed, names))


def torch_seed(seed: int, *names: str | int) -> int:
    """The same derivation as `rng`, as an integer in [0, 2**63) for ``torch.Generator.manual_seed``."""
    return int(_seed_sequence(seed, names).generate_state(1, np.uint64)[0] >> 1)


def _seed_sequence(seed: int, names: tuple) -> np.random.SeedSequence:
    content = json.dumps([check("seed", seed, 0, whole=True), names], default=int)
    digest = hashlib.blake2b(content.encode(), digest_size=16).digest()
    return np.random.SeedSequence(np.frombuffer(digest, "<u4").tolist())


def fingerprint(obj: Any) -> str:
    """16 hexadecimal digits, equal for equal configurations, arrays or bytes on any machine.

    The order of keys does not count, a tuple is a list, and 1 is 1.0. Arrays count with dtype and shape.
    """
    digest = hashlib.blake2b(digest_size=8)
    _feed(digest, obj)
    return digest.hexdigest()


def _feed(digest: Any, obj: Any) -> None:
    def put(tag: str, data: bytes = b"") -> None:  # tag and length keep ["ab"] and ["a", "b"] apart
        digest.update(f"{tag}{len(data)}:".encode() + data)

    if isinstance(obj, np.ndarray) and obj.dtype != object:
        obj = np.atleast_1d(obj)
        put("array", f"{obj.dtype.str}{obj.shape}".encode())
        rows = max(1, (1 << 24) // max(1, obj[:1].nbytes))  # a memory-mapped array is read 16 MiB at a time
        for start in range(0, len(obj), rows):
            digest.update(np.ascontiguousarray(obj[start : start + rows]).tobytes())
    elif isinstance(obj, bytes | bytearray | memoryview):
        put("bytes", bytes(obj))
    elif isinstance(obj, Mapping) or (dataclasses.is_dataclass(obj) and not isinstance(obj, type)):
        items = obj.items() if isinstance(obj, Mapping) else vars(obj).items()
        put("map")
        for key, value in sorted((str(k), v) for k, v in items):
            put("key", key.encode())
            _feed(digest, value)
        put("end")
    elif isinstance(obj, np.ndarray | list | tuple):
        put("list")
        for value in obj:
            _feed(digest, value)
        put("end")
    elif type(obj) not in (type(None), bool, int, float, str):
        _feed(digest, plain(obj))
    else:
        obj = int(obj) if isinstance(obj, float) and obj.is_integer() else obj
        put(type(obj).__name__ if isinstance(obj, bool | str) else "", repr(obj).encode())


class RunConflict(ValueError):
    """A directory already holds a run of another configuration; the sentence names what differs."""


class Run:
    """A directory (`dir`) ``root/stage/name`` with a `manifest`, a log and results; see `Run.open`.

    The manifest says stage, name, config, config_hash, seed, data_fingerprint, git_commit, versions, device,
    platform, started, finished (ISO 8601, UTC), wall_time_s, status ("unfinished" or "finished") and metrics.
    """

    def __init__(self, directory: str | os.PathLike, manifest: dict) -> None:
        self.dir, self.manifest, self._opened = Path(directory), manifest, time.monotonic()
        # A resumed run has already spent the time in its last log line.
        spent = [] if self.finished else [float(line.get("wall_time_s", 0.0)) for line in self.read_log()]
        self._spent_s = max(spent, default=0.0)

    @classmethod
    def open(
        cls, root, stage, name, config: Mapping, *, seed=None, data_fingerprint=None, device=None, **more
    ) -> "Run":
        """Open ``root/stage/name`` for this configuration: new, to be resumed, or already finished.

        A directory with work (beyond a manifest) of another `config` (a mapping or a dataclass), `seed`, hash
        `data_fingerprint` or `more` hashes raises `RunConflict`; `device` is merely recorded.
        """
        for what, value in (("stage", stage), ("name", name)):
            if not value or value.startswith(".") or any(mark in value for mark in '/\\:*?"<>|'):
                raise ValueError(f"the {what} of a run must be one plain folder name, got {value!r}")
        path = Path(root) / stage / name / MANIFEST
        identity = plain({"config": config, "seed": seed, "data_fingerprint": data_fingerprint, **more})
        packages = {p: d.version for p in STACK.split() for d in importlib.metadata.distributions(name=p)}
        versions = {"python": platform.python_version(), **packages}
        here = dict(git_commit=_git_commit(), versions=versions, device=device and str(device))
        here["platform"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
        fresh = dict(stage=stage, name=name, **identity, config_hash=fingerprint(identity["config"]), **here)
        fresh |= dict(started=now(), **UNFINISHED)
        manifest = read_json(path, *KEYS) if path.exists() else fresh
        finished = manifest["status"] == "finished"
        changes = differences(identity | {k: v for k, v in manifest.items() if k in identity}, identity)
        if changes and (finished or [p.name for p in path.parent.iterdir()] != [MANIFEST]):
            words = "; ".join(f"{key.removeprefix('config.')}: {a!r} -> {b!r}" for key, a, b in changes)
            advice = "choose another name, or remove that folder"
            raise RunConflict(f"{path.parent} holds a run of another configuration ({words}): {advice}")
        run = cls(path.parent, manifest if finished else fresh if changes else manifest | here)
        if not finished:
            run.save_manifest()
            log = run.path("log.jsonl")
            text = log.read_bytes() if log.exists() else b"\n"
            if not text.endswith(b"\n"):  # killed in the middle of a line
                os.truncate(log, text.rfind(b"\n") + 1)
        return run

    stage = property(lambda self: self.manifest["stage"])
    name = property(lambda self: self.manifest["name"])
    config = property(lambda self: self.manifest["config"])
    metrics = property(lambda self: self.manifest["metrics"])
    finished = property(lambda self: self.manifest["status"] == "finished")

    @property
    def wall_time_s(self) -> float:
        """Seconds of work over all sessions of a resumed run; a killed one counts to its last log line."""
        if self.finished:
            return self.manifest["wall_time_s"]
        return self._spent_s + time.monotonic() - self._opened

    def save_manifest(self) -> None:
        """Write the manifest as it now is."""
        write_json(self.dir / MANIFEST, self.manifest)

    def path(self, *parts: str) -> Path:
        """A path inside the run; its parent directories are made."""
        path = self.dir.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def log(self, row: Mapping) -> None:
        """Append a line, with ``wall_time_s``, to ``log.jsonl``."""
        line = json.dumps(plain({**row, "wall_time_s": round(self.wall_time_s, 3)}), ensure_ascii=False)
        with open(self.path("log.jsonl"), "ab") as stream:
            stream.write(line.encode() + b"\n")

    def read_log(self) -> list[dict]:
        """All whole lines of the log, oldest first."""
        path, rows = self.dir / "log.jsonl", []
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for number, line in enumerate(text.split("\n")[:-1], start=1):  # half a line has no newline
            with broken(f"{path}, line {number}", "not a JSON line; repair or remove it"):
                rows.append({**json.loads(line)})
                float(rows[-1].get("wall_time_s", 0.0))
        return rows

    def finish(self, metrics: Mapping | None = None) -> None:
        """Write the metrics and the word "finished" into the manifest: the last thing that a run does."""
        if self.finished:
            raise ValueError(f"{self.dir} is already finished: open it under another name to do it again")
        done = {"metrics": metrics or {}, "finished": now(), "wall_time_s": round(self.wall_time_s, 3)}
        self.manifest = plain({**self.manifest, **done, "status": "finished"})
        self.save_manifest()


def load_run(path: str | os.PathLike) -> Run:
    """The run in directory `path`; FileNotFoundError where there is no manifest."""
    if not (Path(path) / MANIFEST).exists():
        raise FileNotFoundError(f"{path} holds no run: there is no {MANIFEST} in it")
    return Run(path, read_json(Path(path) / MANIFEST, *KEYS))


def find_runs(root: str | os.PathLike, stage: str = "*", *, finished: bool | None = True) -> list[Run]:
    """The runs under `root`, of one stage or all, by stage and name; with `finished` None, of both kinds."""
    found = [load_run(path.parent) for path in sorted(Path(root).glob(f"{stage}/*/{MANIFEST}"))]
    return [run for run in found if finished is None or run.finished == finished]


def runs_root(folder: str | os.PathLike = "") -> Path:
    """`folder`, or else the environment's ``SAGE_RUNS``, or else ``data/runs`` of this checkout."""
    return Path(folder or os.environ.get("SAGE_RUNS") or Path(__file__).resolve().parents[1] / "data/runs")


def differences(old: Mapping, new: Mapping, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever two nested mappings differ; a missing value is None."""
    rows = []
    for key in [*old, *(key for key in new if key not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            rows += differences(a, b, f"{prefix}{key}.")
        elif fingerprint(a) != fingerprint(b):
            rows.append((prefix + key, a, b))
    return rows


def now() -> str:
    """The time in UTC, as a manifest has it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git_commit() -> str | None:
    """The commit of this package's source, with ``+changes`` where files differ; None outside git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not merely inside some other repository
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
