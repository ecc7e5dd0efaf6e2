"""Recall at 1, 5, 10, 20 from descriptors on disk and the names of the image files, the slow and obvious way.

    python tests/slow_recall.py DATABASE.npy QUERIES.npy SET/images/test

NumPy in float64 and nothing else: no index, no code of the package. Row i of an array belongs to the i-th file of the folder,
sorted by path. Positives are references within 25 m (inclusive) of a query, by the two numbers after the first two `@` of their
names, and in the same UTM zone; a query without a positive is a miss.
"""

import argparse
import pathlib

import numpy as np


def read_positions(folder):
    """Sorted paths, positions (n, 2) in metres, and UTM zones, of a folder of `@east@north@zone@letter@...` pictures."""
    kinds = {".jpg", ".jpeg", ".png"}
    paths = sorted(p for p in pathlib.Path(folder).rglob("*") if p.suffix.lower() in kinds)
    fields = [p.name.split("@") for p in paths]
    return (
        paths,
        np.array([[float(f[1]), float(f[2])] for f in fields]),
        np.array([f"{f[3]}{f[4]}" for f in fields]),
    )


def slow_recall(database, queries, folder, radius_m=25.0, ks=(1, 5, 10, 20)):
    """(hits at each k, number of queries, number of queries without a positive, rank of each first positive)."""
    _, database_m, database_zone = read_positions(pathlib.Path(folder) / "database")
    _, queries_m, queries_zone = read_positions(pathlib.Path(folder) / "queries")
    if len(database) != len(database_m) or len(queries) != len(queries_m):
        raise SystemExit(
            f"{len(database)} + {len(queries)} descriptors for {len(database_m)} + {len(queries_m)} files"
        )
    database = np.asarray(database, np.float64)
    hits, without, ranks = dict.fromkeys(ks, 0), 0, []
    for i in range(len(queries)):
        ground = np.sqrt(((database_m - queries_m[i]) ** 2).sum(axis=1))
        positive = (ground <= radius_m) & (database_zone == queries_zone[i])
        without += not positive.any()
        distance = np.sqrt(((database - np.asarray(queries[i], np.float64)) ** 2).sum(axis=1))
        ranked = positive[np.argsort(distance, kind="stable")]
        ranks.append(int(np.argmax(ranked)) + 1 if ranked.any() else 0)
        for k in ks:
            hits[k] += bool(ranked[:k].any())
    return hits, len(queries), without, ranks


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("database", help="descriptors of the references, .npy")
    parser.add_argument("queries", help="descriptors of the queries, .npy")
    parser.add_argument(
        "folder", help="folder with database/ and queries/, for example sf-streets/images/test"
    )
    parser.add_argument("--radius-m", type=float, default=25.0)
    arguments = parser.parse_args()
    hits, n, without, _ = slow_recall(
        np.load(arguments.database, mmap_mode="r"),
        np.load(arguments.queries, mmap_mode="r"),
        arguments.folder,
        arguments.radius_m,
    )
    print(
        "  ".join(f"R@{k} {100 * h / n:.4f} ({h}/{n})" for k, h in hits.items()),
        f" without a positive: {without}",
    )
