"""Describe, fit, index, search and evaluate in a loop: memory and open files stay flat, results identical.

    python tests/soak.py --minutes 30 --pictures 20000      # what `make soak` runs

Each round begins with nothing but the rendered town, in a folder that is removed after it.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from sagelib import runs
from sagelib.describe import describe
from sagelib.evaluate import evaluate, open_model
from sagelib.images import Preprocess
from sagelib.places import open_set, open_training_set
from sagelib.retrieval import PCA, open_index, search
from townscape.folder import write_town

A_TOWN = 400  # pictures of a training town that every town has
INDEX = "IVF8,Flat"
WARM_UP = 2  # rounds, in which libraries fill their caches


def a_round(model, places, test_set, folder: Path) -> str:
    """A hash of everything that a round finds."""
    how = {"preprocess": Preprocess(32), "device": "cpu", "workers": 2, "progress": False}
    how["precision"] = "float32"  # else each round measures anew which one is faster
    database = describe(model, places, folder, **how)
    pca = PCA.fit(database, 16)
    pca.save(folder / "pca.safetensors")
    small = PCA.load(folder / "pca.safetensors").transform(database)
    found = [search(values, values[:200], 10) for values in (database.values, small)]
    index = open_index(INDEX, database.values, database.path, database.manifest)
    found.append(search(database.values, database.values[:200], 10, index=index))
    results = [evaluate(model, test_set, folder, pca=pca, index=spec, **how) for spec in (None, INDEX)]
    arrays = [np.asarray(database.values), small, *(array for pair in found for array in pair)]
    return runs.fingerprint([*arrays, *(result.per_query_rank for result in results)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5, help="at least 4 rounds are made in any case")
    parser.add_argument("--pictures", type=int, default=400, help="of the data base; they are rendered first")
    parser.add_argument("--town", type=Path, help="folder to keep the rendered town in")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        town, towns = options.town or Path(scratch) / "town", -(-options.pictures // A_TOWN)
        seeds = {"train_seeds": range(1000, 1000 + towns), "val_seeds": (), "test_seeds": (1110,)}
        few = {"images_per_town": 100, "train_images_per_town": -(-options.pictures // towns)}
        write_town(town, **seeds, **few, size=32)
        places, test_set = open_training_set(town.parent, town.name), open_set(town.parent, town.name)
        model, process = open_model("gem:test_vit:random"), psutil.Process()
        rows, end = [], time.monotonic() + 60 * options.minutes
        print("round  seconds  memory MB  files  threads  result")
        while time.monotonic() < end or len(rows) < WARM_UP + 2:
            began, folder = time.monotonic(), Path(scratch) / "runs"
            found = a_round(model, places, test_set, folder)
            shutil.rmtree(folder)
            facts = process.memory_info().rss / 1e6, process.num_fds(), process.num_threads(), found
            rows.append(facts)
            shown = "{:5} {:8.1f} {:10.0f} {:6} {:8}  {}"
            print(shown.format(len(rows), time.monotonic() - began, *facts), flush=True)
    memory, files, threads, results = zip(*rows[WARM_UP:], strict=True)
    half = len(memory) // 2
    growth = float(np.median(memory[half:]) - np.median(memory[:half]))
    faults = {
        "results differ": len({row[-1] for row in rows}) > 1,
        "memory grows": growth > max(20.0, 0.02 * memory[0]),
        "files are left open": files[-1] > files[0],
        "threads are left": threads[-1] > threads[0],
    }
    verdict = ", ".join(name for name, wrong in faults.items() if wrong) or "flat, results identical"
    print(f"{len(rows)} rounds over {len(places)} pictures, memory {growth:+.1f} MB: {verdict}")
    return int(any(faults.values()))


if __name__ == "__main__":
    sys.exit(main())
