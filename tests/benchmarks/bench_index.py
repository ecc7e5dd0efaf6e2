"""Large maps: an index against exact search, on descriptors with the statistics of described photographs.

    python tests/benchmarks/bench_index.py                                # 100,000 references
    SAGE_BENCH_ROWS=1000000 python tests/benchmarks/bench_index.py        # a million, about 5 GB on the disk

A town is rendered and described by a frozen network. Of its places (squares of 10 m, looking one way within
45 degrees) the means, and what is left of each image, give two covariances; a map of any size is drawn from
them, place by place, eight images each, and a query is one more image of a place. References lie in a float16
file (2 bytes a number) and are never in memory as a whole. Bytes an image are those of the index; descriptors
stay on the disk, from where those of the shortlist are read.
"""

import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from sagelib import runs
from sagelib.describe import describe
from sagelib.evaluate import open_model
from sagelib.images import Preprocess
from sagelib.places import open_training_set
from sagelib.retrieval import open_index, search
from townscape.folder import write_town

ROWS, WIDTH, PER_PLACE = int(os.environ.get("SAGE_BENCH_ROWS", 100_000)), 1024, 8
QUERIES, BLOCK = 500, 8192
SF_XL = 2_805_840  # images of the map of San Francisco XL (Berton et al., 2022)


def settings_of(rows: int) -> list[str]:
    """Indexes to compare: lists by the root of the number of references, in powers of two."""
    lists = 2 ** round(np.log2(rows**0.5))
    codes = f"IVF{lists},PQ128x4fs", f"PCAR256,IVF{lists},PQ128x4fs"  # 64 bytes, of 1024 numbers or of 256
    coarse = [f"{code};nprobe={lists // part}" for code in codes for part in (8, 4, 2)]
    fine = ("HNSW32", f"IVF{lists},PQ64")  # long to make, HNSW with all rows in memory
    return [*coarse, *(fine if rows <= 100_000 else ())]


def described_town(folder: Path, towns: int = 4, images: int = 480):
    """Descriptors (n, 1024) of a rendered town, and the place of each."""
    seeds = {"train_seeds": range(1000, 1000 + towns), "val_seeds": (), "test_seeds": ()}
    write_town(folder / "town", **seeds, images_per_town=images, size=112, progress=False)
    places = open_training_set(folder, "town")
    model, preprocess = open_model("gem2x2:tf_efficientnet_lite2"), Preprocess(112, "antialias")
    values = describe(model, places, folder / "described", preprocess=preprocess, progress=False).values
    sector = places.heading_deg // 45
    columns = (places.east_m // 10, places.north_m // 10, sector)
    place = np.unique(np.column_stack(columns), axis=0, return_inverse=True)[1]
    return np.asarray(values, np.float64), place.ravel()


def fitted(values, place):
    """The mean, and factors (rank, 1024) of the covariances between places and within them."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(values.shape[1], WIDTH)))[0]
    values = values @ basis  # a random rotation to the width wanted
    sizes = np.bincount(place)
    sums = np.zeros((len(sizes), WIDTH))
    np.add.at(sums, place, values)
    means = sums / sizes[:, None]
    within = (values - means[place])[sizes[place] > 1]
    factors = []
    for rows, freedom in ((means - means.mean(0), len(means) - 1), (within, len(within) - (sizes > 1).sum())):
        scale, directions = np.linalg.eigh(rows.T @ rows / freedom)
        some = scale > 1e-6 * scale.max()
        factors.append((directions[:, some] * np.sqrt(scale[some])).T.astype(np.float32))
    return means.mean(0).astype(np.float32), *factors


def draw_map(path: Path, rows: int, mean, between, within):
    """References in a float16 file, queries in memory, and the place of each query."""
    values = runs.new_array(path, np.float16, (rows, WIDTH))
    queries, every = [], max(1, rows // PER_PLACE // QUERIES)
    for start in range(0, rows, BLOCK):
        generator, n = np.random.default_rng([1, start]), min(BLOCK, rows - start)
        place = (start + np.arange(n)) // PER_PLACE
        middle = (
            generator.standard_normal((place[-1] - place[0] + 1, len(between)), np.float32) @ between + mean
        )
        asked = np.flatnonzero((place[0] + np.arange(len(middle))) % every == 0)
        noise = generator.standard_normal((n + len(asked), len(within)), np.float32) @ within
        block = np.concatenate([middle[place - place[0]], middle[asked]]) + noise
        block /= np.linalg.norm(block, axis=1, keepdims=True)
        values[start : start + n] = block[:n]
        queries += [(place[0] + a, row) for a, row in zip(asked, block[n:], strict=True)]
    values.flush()
    queries = queries[:QUERIES]
    return np.load(path, mmap_mode="r"), np.stack([q for _, q in queries]), np.array([p for p, _ in queries])


def table(rows: int = ROWS) -> list[dict]:
    """Recall, bytes and speed of every index beside exact search."""
    with tempfile.TemporaryDirectory(prefix="sage-index-") as folder:
        folder = Path(folder)
        database, queries, place = draw_map(folder / "map.npy", rows, *fitted(*described_town(folder)))
        lines, opened = [], {"exact search": None}
        for spec in settings_of(rows):
            began = time.perf_counter()
            opened[spec] = open_index(spec, database, folder, {"rows": rows})
            print(f"{spec}: built in {time.perf_counter() - began:.0f} s", flush=True)
        found, seconds = {}, {}
        for name, index in opened.items():
            search(database, queries[:1], 10, index=index)  # reads what it needs once
            began = time.perf_counter()
            found[name] = search(database, queries, 10, index=index)[0]
            seconds[name] = time.perf_counter() - began
        exact = found["exact search"]
        built = [runs.read_json(path) for path in folder.glob("index-*/manifest.json")]
        for name, indices in found.items():
            size = sum(facts["bytes"] for facts in built if facts["factory"] == name.partition(";")[0])
            shared = [np.isin(a, b).mean() for a, b in zip(exact, indices, strict=True)]
            lines.append(
                {
                    "index": name,
                    "R@1": 100 * np.mean(indices[:, 0] // PER_PLACE == place),
                    "exact first": 100 * np.mean(indices[:, 0] == exact[:, 0]),
                    "of exact ten": 100 * np.mean(shared),
                    "bytes/image": size / rows if size else 2.0 * WIDTH,
                    "queries/s": len(queries) / seconds[name],
                    "times as fast": seconds["exact search"] / seconds[name],
                }
            )
    return lines


def show(lines: list[dict], rows: int) -> None:
    """The table, and what its rates come to for the map of San Francisco XL."""
    print(
        f"\n{rows:,} references, {QUERIES:,} queries, {WIDTH} dimensions, {torch.get_num_threads()} threads"
    )
    print(f"{'index':30}" + "".join(f"{name:>15}" for name in list(lines[0])[1:]))
    for line in lines:
        print(f"{line['index']:30}" + "".join(f"{v:15.1f}" for v in list(line.values())[1:]))
    print(f"\nSan Francisco XL, {SF_XL:,} references, from these rates (time grows with the map):")
    for line in lines:
        size, speed = SF_XL * line["bytes/image"] / 1e9, line["queries/s"] * rows / SF_XL
        print(
            f"{line['index']:30}{size:9.2f} GB{speed:12.1f} queries/s{1000 / speed:12.0f} s for 1,000 queries"
        )


def test_index(benchmark):
    lines = benchmark.pedantic(table, rounds=1)
    show(lines, ROWS)
    exact, *indexes = lines
    small = [x for x in indexes if 16 * x["bytes/image"] <= exact["bytes/image"] and x["times as fast"] >= 10]
    assert any(exact["R@1"] - x["R@1"] <= 1 for x in small), "none loses at most a point at 1/16 of memory"


if __name__ == "__main__":
    show(table(), ROWS)
