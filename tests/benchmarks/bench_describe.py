"""Extraction beside a plain PyTorch loop of the field's habit, on the same model and pictures, in one run.

    python tests/benchmarks/bench_describe.py                              # rendered pictures, some minutes
    SAGE_BENCH_DATA=data/town python tests/benchmarks/bench_describe.py    # of a set with a training part

The plain loop is a float32 network, a DataLoader with two workers, and one array in memory for all. Each way
runs in a process of its own, so that its peak memory (without mapped files) is its own. Precision and threads
of `describe` are what it measures to be fastest here. Then both ways go through 10,000 and 100,000 files of
tiny pictures, for their memory alone.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sagelib.describe import baseline_pixels, describe
from sagelib.evaluate import open_model
from sagelib.images import Preprocess, load_image
from sagelib.places import Places, TestSet, open_set, open_training_set
from sagelib.retrieval import recall, search
from townscape.folder import write_town

SIDE, MODEL = 160, "gem2x2:tf_efficientnet_lite2"
TINY, COUNTS = 1000, (10_000, 100_000)  # different tiny pictures, and files that hold them


class Peak(threading.Thread):
    """The greatest anonymous memory of this process in MiB, ten times a second (Linux; elsewhere 0)."""

    def __init__(self):
        super().__init__(daemon=True)
        self.mib = 0

    def run(self):
        while Path("/proc/self/status").exists():
            lines = Path("/proc/self/status").read_text().splitlines()
            self.mib = max(self.mib, *(int(x.split()[1]) // 1024 for x in lines if x.startswith("RssAnon")))
            time.sleep(0.1)


class Files(torch.utils.data.Dataset):
    """Pictures as the network takes them."""

    def __init__(self, paths, preprocess):
        self.paths, self.preprocess = paths, preprocess

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.preprocess(load_image(self.paths[i]))


def plain(model, paths, preprocess, workers=2) -> np.ndarray:
    """The descriptors, as most repositories make them."""
    values = []
    with torch.no_grad():
        for images in DataLoader(Files(paths, preprocess), batch_size=32, num_workers=workers):
            values.append(getattr(model, "embed", model)(images).numpy())
    return np.concatenate(values)


def described(way: str, model, places, preprocess, folder: Path):
    """Descriptors of one way, and what is to be said of it."""
    peak, facts = Peak(), {}
    peak.start()
    began, spent = time.perf_counter(), sum(os.times()[:4])
    if way == "plain":
        values = plain(model, places.path, preprocess)
    else:
        made = describe(model, places, folder, preprocess=preprocess, progress=False, device="cpu")
        values, facts = made.values, {"precision": made.precision}
        facts["waiting"] = round(made.manifest["waited"] / made.manifest["seconds"], 3)
    rates = {"images/s": round(len(values) / (time.perf_counter() - began), 1)}
    rates["ms of processors an image"] = round(1000 * (sum(os.times()[:4]) - spent) / len(values), 2)
    return values, {"way": way, "images": len(values), **rates, "peak MiB": peak.mib, **facts}


def speed(way: str, data: Path, folder: Path) -> dict:
    """Images a second over the pictures of a set, and recall of every second one among the others."""
    test_set, training = open_set(data.parent, data.name), open_training_set(data.parent, data.name)
    places = Places.concat([test_set.database, test_set.queries, training])
    values, facts = described(way, open_model(MODEL), places, Preprocess(SIDE, "antialias"), folder)
    halves = TestSet(name="halves", database=places[::2], queries=places[1::2])
    indices, _ = search(values[::2], values[1::2], 1)
    found = recall(indices, halves.positives(), (1,), n_references=len(halves.database))
    return facts | {"R@1": round(found.percent(1), 2)}


def memory(way: str, folder: Path, count: int) -> dict:
    """Peak memory over so many files."""
    pictures, rng = folder / "tiny", np.random.default_rng(0)
    pictures.mkdir(exist_ok=True)
    names = [pictures / f"{i:06d}.png" for i in range(count)]
    for i, name in enumerate(names):
        if i < TINY and not name.exists():
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(name)
        elif not name.exists():
            os.link(names[i % TINY], name)
    places = Places.build(names, east_m=np.zeros(count), north_m=np.zeros(count), utm_zone=["31U"] * count)
    return described(way, baseline_pixels, places, Preprocess(32), folder)[1]


def run(*arguments) -> dict:
    """One way in a process of its own."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def compare() -> list[dict]:
    """All of it, one after the other."""
    with tempfile.TemporaryDirectory(prefix="sage-describe-") as folder:
        seeds = {"train_seeds": range(1000, 1003), "val_seeds": (), "test_seeds": (1114,)}
        data = os.environ.get("SAGE_BENCH_DATA")
        if not data:
            data = write_town(Path(folder) / "town", **seeds, images_per_town=500, size=SIDE, progress=False)
        lines = [run("speed", way, Path(data).absolute(), folder) for way in ("plain", "describe")]
        return lines + [run("memory", way, folder, n) for way in ("plain", "describe") for n in COUNTS]


def show(lines: list[dict]) -> None:
    """The lines, and ratios of the first two: of time, and of work, which other programs do not change."""
    before, ours = lines[:2]
    print("", *lines, f"{ours['images/s'] / before['images/s']:.2f} times as fast", sep="\n")
    name = "ms of processors an image"
    print(f"{before[name] / ours[name]:.2f} times as little work of the processors")


def test_describe_beside_a_plain_loop(benchmark):
    lines = benchmark.pedantic(compare, rounds=1)
    show(lines)
    assert abs(lines[0]["R@1"] - lines[1]["R@1"]) <= 0.1


if __name__ == "__main__":
    if sys.argv[1:2] == ["speed"]:
        print(json.dumps(speed(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))))
    elif sys.argv[1:2] == ["memory"]:
        print(json.dumps(memory(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))))
    else:
        show(compare())
