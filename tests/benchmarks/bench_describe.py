"""Extraction beside a plain PyTorch loop of the field's habit, on the same model and pictures, in one run.

    python tests/benchmarks/bench_describe.py                                  # 2,100 pictures of a town
    SAGE_BENCH_PICTURES=10000 python tests/benchmarks/bench_describe.py

The plain loop is a float32 network, a DataLoader with two workers, and one array in memory for all. Each runs
in a process of its own, so that its peak memory (without mapped files) is its own. Precision and threads of
`describe` are what it measures to be fastest here.
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
from torch.utils.data import DataLoader

from sagelib.describe import describe
from sagelib.evaluate import open_model
from sagelib.images import Preprocess, load_image
from sagelib.places import open_set
from sagelib.retrieval import recall, search
from townscape.folder import write_town

PICTURES, SIDE, MODEL = int(os.environ.get("SAGE_BENCH_PICTURES", 2100)), 160, "gem2x2:tf_efficientnet_lite2"


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
    def __init__(self, paths):
        self.paths, self.preprocess = paths, Preprocess(SIDE, "antialias")

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return self.preprocess(load_image(self.paths[i]))


def plain(model, paths) -> np.ndarray:
    values = []
    with torch.no_grad():
        for images in DataLoader(Files(paths), batch_size=32, num_workers=2):
            values.append(model.embed(images).numpy())
    return np.concatenate(values)


def one(way: str, data: Path) -> dict:
    """Images a second, peak memory and recall of one way."""
    peak, model, test_set = Peak(), open_model(MODEL), open_set(data.parent, data.name)
    few = len(test_set.database) // len(test_set.queries)
    peak.start()
    began = time.perf_counter()
    if way == "plain":
        values, facts = plain(model, test_set.database.path), {}
    else:
        how = {"preprocess": Preprocess(SIDE, "antialias"), "progress": False, "device": "cpu"}
        made = describe(model, test_set.database, data.parent / "described", **how)
        values, facts = made.values, {"precision": made.precision}
        facts["waiting"] = round(made.manifest["waited"] / made.manifest["seconds"], 3)
    seconds, mib = time.perf_counter() - began, peak.mib
    found = recall(search(values, plain(model, test_set.queries.path), 1)[0], test_set.positives(), (1,))
    facts |= {"images/s": round(len(values) / seconds, 1), "peak MiB": mib, "R@1": round(found.percent(1), 2)}
    return {"way": way, "references per query": few, **facts}


def compare(pictures: int = PICTURES) -> list[dict]:
    """Both ways, one after the other."""
    with tempfile.TemporaryDirectory(prefix="sage-describe-") as folder:
        seeds = {"train_seeds": (), "val_seeds": (), "test_seeds": range(1114, 1118)}
        data = write_town(
            Path(folder) / "town", **seeds, images_per_town=pictures // 4, size=SIDE, progress=False
        )
        command = [sys.executable, __file__, "--one"]
        return [
            json.loads(
                subprocess.run([*command, way, str(data)], capture_output=True, text=True, check=True).stdout
            )
            for way in ("plain", "describe")
        ]


def test_describe_beside_a_plain_loop(benchmark):
    before, ours = benchmark.pedantic(compare, rounds=1)
    print(f"\n{before}\n{ours}\n{ours['images/s'] / before['images/s']:.2f} times as fast")
    assert abs(ours["R@1"] - before["R@1"]) <= 0.5


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(sys.argv[2], Path(sys.argv[3]))))
    else:
        plainly, ours = compare()
        print(f"{plainly}\n{ours}\n{ours['images/s'] / plainly['images/s']:.2f} times as fast")
