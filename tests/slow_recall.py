"""Recall from descriptors and the names of the image files, the slow and obvious way.

NumPy in float64 and nothing else: no index, no code of the package. Row i of an array belongs to the i-th
file of the folder, sorted by path.
"""

import pathlib

import numpy as np


def read_positions(folder):
    """Positions (n, 2) in metres and UTM zones of a folder of ``@east@north@zone@letter@...`` pictures."""
    kinds = {".jpg", ".jpeg", ".png"}
    paths = sorted(p for p in pathlib.Path(folder).rglob("*") if p.suffix.lower() in kinds)
    fields = [p.name.split("@") for p in paths]
    return np.array([[float(f[1]), float(f[2])] for f in fields]), np.array([f[3] + f[4] for f in fields])


def slow_recall(database, queries, folder, radius_m=25.0, ks=(1, 5, 10, 20)):
    """(hits at each k, queries, queries without a positive, rank of each query's first positive, 0 for none).

    Positives are references of `folder` within the radius (inclusive), in the same UTM zone; a query without
    one is a miss.
    """
    database_m, database_zone = read_positions(pathlib.Path(folder) / "database")
    queries_m, queries_zone = read_positions(pathlib.Path(folder) / "queries")
    assert len(database) == len(database_m) and len(queries) == len(queries_m), "a row for each file"
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
