"""What a batch of the clique sampler costs, on synthetic cities with descriptors given, one core.

    python tests/benchmarks/bench_sampler.py                 # the stated sizes, about five minutes
    python tests/benchmarks/bench_sampler.py --quick         # 20,000 images only
    python tests/benchmarks/bench_sampler.py --scaling       # 20,000 to 1,000,000 images
    python tests/benchmarks/bench_sampler.py --images        # one descriptor per image, memory-mapped float16

Every case runs in a process of its own, so that its peak memory is its own. Milliseconds a batch include an
epoch's set-up (graph, refresh) spread over its 4,000 batches; on a machine busy with other work the processor
time, ``cpu_ms_per_batch``, is the fairer number. Peak memory is beside the descriptors.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

import numpy as np  # noqa: E402

CITIES, IMAGES_PER_CLUSTER, EPOCH = 22, 20, 4000


def synthetic_cities(clusters: int, layout: str, seed: int = 0):
    """East, north, city and cluster of ``22 x clusters x 20`` images.

    ``"lattice"``: clusters 60 m apart, images within 8 m of their middle, so that each cluster is one clique.
    ``"crowd"``: middles at random, 40 m apart on average, images 8 m (normal) around them: clusters overlap.
    """
    generator = np.random.default_rng(seed)
    shape = (CITIES, clusters, IMAGES_PER_CLUSTER)
    side = int(np.ceil(np.sqrt(clusters)))
    if layout == "lattice":
        middle = np.stack(np.divmod(np.arange(clusters), side)).astype(float)[:, None, :, None] * 60.0
        east, north = middle + generator.uniform(-8, 8, (2, *shape))
    else:
        middle = generator.uniform(0, side * 40.0, (2, CITIES, clusters, 1))
        east, north = middle + generator.normal(0, 8, (2, *shape))
    east = east + 1e5 * np.arange(CITIES)[:, None, None]
    city = np.broadcast_to(np.arange(CITIES)[:, None, None], shape)
    cluster = np.broadcast_to(np.arange(clusters)[None, :, None], shape)
    return east.ravel(), north.ravel(), city.ravel(), cluster.ravel()


def random_descriptors(n: int, dimensions: int, dtype, path=None, seed: int = 1) -> np.ndarray:
    """Unit rows; on disk when `path` is given."""
    generator = np.random.default_rng(seed)
    values = (
        np.empty((n, dimensions), dtype)
        if path is None
        else np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(n, dimensions))
    )
    for start in range(0, n, 4096):
        block = generator.random((min(4096, n - start), dimensions), dtype=np.float32) - np.float32(0.5)
        values[start : start + 4096] = block / np.linalg.norm(block, axis=1, keepdims=True)
    return values


class PeakMemory(threading.Thread):
    """The greatest anonymous memory of this process, twenty times a second (Linux; elsewhere NaN)."""

    def __init__(self):
        super().__init__(daemon=True)
        self.bytes, self.done = 0, threading.Event()

    @staticmethod
    def now() -> float:
        try:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    return int(line.split()[1]) * 1024
        except OSError:
            pass
        return float("nan")

    def run(self):
        while not self.done.wait(0.05):
            self.bytes = max(self.bytes, self.now())


def measure(
    clusters: int, dimensions: int, batches: int, layout: str, node_descriptor: str, folder: str
) -> dict:
    """One case, in this process."""
    from sagelib.graph import GeoVisualGraph
    from sagelib.sampler import CliqueSampler, SamplerConfig

    east, north, city, cluster = synthetic_cities(clusters, layout)
    n = len(east)
    per_image = node_descriptor == "image"
    if per_image:
        path = Path(folder) / "descriptors.npy"
        random_descriptors(n, dimensions, np.float16, path)
        descriptors = np.load(path, mmap_mode="r")
    else:
        descriptors = random_descriptors(CITIES * clusters, dimensions, np.float32)
    beside = 0 if per_image else descriptors.nbytes
    memory = PeakMemory()
    memory.start()
    started, worked_before = time.perf_counter(), time.process_time()
    config = SamplerConfig(batches_per_epoch=EPOCH, node_descriptor=node_descriptor)
    sampler = CliqueSampler(GeoVisualGraph(east, north, city=city, place=cluster), config)
    built = time.perf_counter()
    sampler.refresh(0, descriptors)
    refreshed, worked = time.perf_counter(), time.process_time()
    made = [batch for batch, _ in zip(sampler, range(batches), strict=False)]
    ended, worked_batches = time.perf_counter(), time.process_time() - worked
    memory.done.set()
    check(made[:: max(1, batches // 20)], east, north, city)
    per_batch = (ended - refreshed) / len(made)
    setup = refreshed - started
    report = sampler.report
    return {
        "images": n,
        "layout": layout,
        "descriptors": f"{len(descriptors):,} x {dimensions} {descriptors.dtype}",
        "neighbours_per_image": 2 * report["geographic_edges"] / n,
        "build_s": built - started,
        "refresh_s": refreshed - built,
        "batches": len(made),
        "draws_per_batch": report["draws"] / len(made),
        "ms_per_batch": (per_batch + setup / EPOCH) * 1e3,
        "cpu_ms_per_batch": (worked_batches / len(made) + (worked - worked_before) / EPOCH) * 1e3,
        "epoch_s": setup + EPOCH * per_batch,
        "epoch_cpu_s": worked - worked_before + EPOCH * worked_batches / len(made),
        "peak_GiB": (memory.bytes - beside) / 2**30,
    }


def check(batches, east, north, city) -> None:
    """The promises of a batch: cliques within 25 m, places farther apart than that."""
    for batch in batches:
        batch = np.array(batch)
        metres = np.hypot(east[batch][:, None] - east[batch], north[batch][:, None] - north[batch])
        place = np.arange(len(batch)) // 4
        same = place[:, None] == place
        assert len(batch) == 120 and len(set(batch.tolist())) == 120
        assert metres[same].max() <= 25.0
        assert metres[~same & (city[batch][:, None] == city[batch])].min(initial=np.inf) > 25.0


def measure_plain(clusters: int, dimensions: int, batches: int, layout: str) -> dict:
    """The plain sampler on the same cities."""
    import pandas as pd
    from plain_sampler import PlainSampler

    east, north, city, cluster = synthetic_cities(clusters, layout)
    descriptors = random_descriptors(CITIES * clusters, dimensions, np.float32)
    images = pd.DataFrame({"east": east, "north": north, "city": city, "cluster": cluster})
    started = time.perf_counter()
    sampler = PlainSampler(images, descriptors)
    built = time.perf_counter()
    made = [sampler.batch() for _ in range(batches)]
    ended = time.perf_counter()
    check(made, east, north, city)
    per_batch = (ended - built) / batches
    return {
        "images": len(east),
        "layout": layout,
        "sampler": "plain",
        "batches": batches,
        "ms_per_batch": (per_batch + (built - started) / EPOCH) * 1e3,
        "epoch_s": built - started + EPOCH * per_batch,
    }


def in_own_process(kind: str, *arguments) -> dict:
    """Run one case in a fresh interpreter and read its result."""
    here = Path(__file__).resolve()
    command = [sys.executable, str(here), "--case", kind, *map(str, arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=here.parent).stdout
    return json.loads(output.splitlines()[-1])


def show(rows: list[dict]) -> None:
    """A table, one line a case."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = [names] + [[_text(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in text) for i in range(len(names))]
    for line in text:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _text(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="20,000 images only")
    parser.add_argument("--scaling", action="store_true", help="20,000 to 1,000,000 images")
    parser.add_argument("--images", action="store_true", help="one descriptor per image")
    parser.add_argument("--dimensions", type=int, default=8448)
    parser.add_argument("--batches", type=int, default=1024, help="batches measured of the 4,000 of an epoch")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        kind, clusters, dimensions, batches, layout, *rest = options.case
        numbers = int(clusters), int(dimensions), int(batches), layout
        if kind == "plain":
            print(json.dumps(measure_plain(*numbers)))
        else:
            with tempfile.TemporaryDirectory() as folder:
                print(json.dumps(measure(*numbers, rest[0], folder)))
        return
    d, batches = options.dimensions, options.batches
    stated = not (options.quick or options.scaling or options.images)
    rows = []
    if options.quick:
        rows += [
            in_own_process("ours", 45, d, min(batches, 256), layout, "cluster")
            for layout in ("lattice", "crowd")
        ]
        rows += [in_own_process("plain", 45, d, 3, "lattice")]
    if stated:
        rows += [
            in_own_process("ours", clusters, d, batches, layout, "cluster")
            for clusters in (500, 2000)
            for layout in ("lattice", "crowd")
        ]
        rows += [in_own_process("plain", 500, d, 5, layout) for layout in ("lattice", "crowd")]
    if options.images:
        rows += [
            in_own_process("ours", clusters, d, min(batches, 512), "crowd", "image")
            for clusters in (45, 150, 500)
        ]
    if options.scaling:
        series = [
            in_own_process("ours", clusters, d, batches, "crowd", "cluster")
            for clusters in (45, 114, 227, 500, 1136, 2273)
        ]
        first = series[0]
        for row in series:
            n, n0 = row["images"], first["images"]
            row["epoch_cpu_vs_first"] = row["epoch_cpu_s"] / first["epoch_cpu_s"]
            row["n_log_n_vs_first"] = n * np.log(n) / (n0 * np.log(n0))
        rows += series
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def test_a_batch(benchmark):
    """For ``pytest --benchmark-only``: one batch of 30 x 4 out of 20,000 images."""
    from sagelib.graph import GeoVisualGraph
    from sagelib.sampler import CliqueSampler, SamplerConfig

    east, north, city, cluster = synthetic_cities(45, "crowd")
    graph = GeoVisualGraph(east, north, city=city, place=cluster)
    sampler = CliqueSampler(graph, SamplerConfig(node_descriptor="cluster"))
    sampler.refresh(0, random_descriptors(CITIES * 45, 256, np.float32))
    batches = iter(sampler)
    next(batches)
    benchmark.pedantic(lambda: next(batches), rounds=50)


if __name__ == "__main__":
    main()
