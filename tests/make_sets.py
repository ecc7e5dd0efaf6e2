"""Tiny generated data sets in the folder layouts of the field: real picture files, invented places.

Every function writes below `root` and returns the folder of the set. Nothing here imports sagelib, so
that a reader is never tested against its own writer.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image


def write_picture(path: str | Path, seed: int, size: tuple[int, int] = (32, 24)) -> Path:
    """A picture of smooth colours that differ from seed to seed; the suffix tells the format."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR).save(path)
    return path


def write_csv(path: str | Path, header: list[str], rows: list[list]) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


def at_name(
    east: float, north: float, zone: str = "17@T", key: str = "", tile: str = "", note: str = ""
) -> str:
    return f"@{east:010.2f}@{north:010.2f}@{zone}@@@{key}@{tile}@@@@@@{note}@.jpg"


def pitts_like(
    root: Path, name: str = "pitts30k", split: str = "test", n_places: int = 6, per_place: int = 2
) -> Path:
    """An @-folder: places 100 m apart, `per_place` references 10 m apart, a query 5 m north of the first."""
    part = root / name / "images" / split
    for place in range(n_places):
        east, north = 585000 + 100 * place, 4476400
        for i in range(per_place):
            place_name = {"key": f"{place:06d}", "tile": f"{i:02d}", "note": f"pitch1_yaw{i + 1}"}
            write_picture(part / "database" / at_name(east + 10 * i, north, **place_name), 100 * place + i)
        write_picture(part / "queries" / at_name(east, north + 5, key=f"{place:06d}"), 100 * place + 50)
    return root / name


def mock_like(root: Path, name: str, n: int, step_m: float, key: str = "{:04d}") -> Path:
    """Pairs under mock coordinates ``@0@{i * step_m}@``: SPED 1000 m; Nordland 25 / 10.5 m, a decimal."""
    for i in range(n):
        coordinate = f"{int(i * step_m * 10) / 10:07.1f}" if step_m % 1 else f"{int(i * step_m)}"
        for side in ("database", "queries"):
            file = f"@0@{coordinate}@@@@@{key.format(i)}@@@@@@@@.jpg"
            write_picture(root / name / "images" / "test" / side / file, 2 * i + (side == "queries"))
    return root / name


def converted_msls(root: Path, n_database: int = 4, n_queries: int = 3) -> Path:
    """Mapillary SLS validation as the usual converter writes it: two cities, two zones, city in the note."""
    part = root / "msls" / "images" / "val"
    for c, (city, zone, east) in enumerate((("cph", "33@U", 347000), ("sf", "10@S", 551000))):
        for side, n in (("database", n_database), ("queries", n_queries)):
            for i in range(n):
                note = f"{'night' if i % 2 else 'day'}_forward_{city}"
                file = at_name(east + 30 * i, 5_000_000 + c, zone, f"{city}{side[0]}{i}", note=note)
                write_picture(part / side / file, 1000 * c + i)
    return root / "msls"


# Well inside one zone each, except London, whose streets lie on both sides of Greenwich (zones 30 and 31).
MSLS_CITIES = {"cph": (55.68, 12.57), "sf": (37.77, -122.42), "zurich": (47.37, 8.54), "london": (51.50, 0.0)}

MSLS_COLUMNS = {
    "raw": "lon lat ca captured_at pano",
    "postprocessed": "easting northing night control_panel view_direction unique_cluster",
    "seq_info": "sequence_key frame_number",
    "subtask_index": "all s2w w2s o2n n2o d2n n2d",
}


def msls_like(root: Path, cities=("zurich", "cph", "sf"), n: int = 6, name: str = "msls") -> Path:
    """Mapillary SLS as downloaded: four CSVs beside ``images``.

    Row 1 is a panorama, odd rows are night, two rows make a cluster. Only even rows belong to the sub-task
    ``all``; photographs stand about 11 m apart along a parallel.
    """
    from pyproj import Proj

    for city in cities:
        lat, middle = MSLS_CITIES[city]
        for side in ("query", "database"):
            folder = root / name / "train_val" / city / side
            raw, post, info, tasks = [], [], [], []
            for i in range(n):
                key, lon = f"{city}-{side[0]}_{i}", middle + (i - n / 2 + 0.5) * 1.6e-4
                zone = int((lon + 180) // 6) + 1
                east, north = Proj(proj="utm", zone=zone, ellps="WGS84")(lon, lat)
                raw.append([i, key, lon, lat, 10.5 * i, f"2016-0{i % 9 + 1}-15", i == 1])
                view = "Forward" if i < 4 else "Sideways"
                post.append([i, key, east, north, bool(i % 2), False, view, i // 2])
                info.append([i, key, f"seq-{city}", 100 + i])
                tasks.append([i, key, i % 2 == 0, i % 3 == 0, False, False, False, False, False])
                write_picture(folder / "images" / f"{key}.jpg", 10 * i + len(city))
            tables = {"raw": raw, "postprocessed": post, "seq_info": info, "subtask_index": tasks}
            for table, rows in tables.items():
                write_csv(folder / f"{table}.csv", ["", "key", *MSLS_COLUMNS[table].split()], rows)
    return root / name


GSV_CITIES = {"London": (51.5101, -0.0003), "Melbourne": (-37.8136, 144.9631)}


def gsv_like(root: Path, cities=("London", "Melbourne"), n_places=3, per_place=4, name="gsv-cities") -> Path:
    """GSV-Cities: places about 110 m apart along a meridian, `per_place` pictures each, a year apart."""
    for city in cities:
        lat0, lon0 = GSV_CITIES[city]
        rows = []
        for place in range(n_places):
            for i in range(per_place):
                lat, lon = f"{lat0 + 0.001 * place + 0.00001 * i:.6f}", f"{lon0:.6f}"
                year, month, northdeg, panoid = 2008 + i, 1 + (3 * i) % 12, 90 * i, f"pano_{place}-{i}"
                rows.append([place + 1, year, month, northdeg, city, lat, lon, panoid])
                head = f"{city}_{place + 1:07d}_{year:04d}_{month:02d}_{northdeg:03d}"
                picture = root / name / "Images" / city / f"{head}_{lat}_{lon}_{panoid}.jpg"
                write_picture(picture, 100 * place + i)
        header = "place_id year month northdeg city_id lat lon panoid".split()
        write_csv(root / name / "Dataframes" / f"{city}.csv", header, rows)
    return root / name


def photos_like(root: Path, n: int = 4, name: str = "holiday") -> Path:
    """One's own photographs with ``photos.csv``: about 11 m apart in Lisbon, the first without a heading."""
    rows = []
    for i in range(n):
        write_picture(root / name / "day 1" / f"IMG_{i}.jpg", i)
        heading = "" if i == 0 else 90 * i % 360
        rows.append([f"day 1/IMG_{i}.jpg", 38.71 + 1e-4 * i, -9.14, heading, f"2024-05-0{i + 1}"])
    write_csv(root / name / "photos.csv", ["file", "lat", "lon", "heading", "date"], rows)
    return root / name


def unlabelled_like(root: Path, n: int = 5, name: str = "unlabelled") -> Path:
    for i in range(n):
        write_picture(root / name / f"frame_{i:03d}.{'png' if i % 2 else 'jpg'}", i)
    return root / name


def papers_training_data(root: Path) -> Path:
    """Mapillary SLS to mine and GSV-Cities as labelled places, beside each other."""
    msls_like(root, ("zurich", "london", "cph", "sf"), n=24)
    gsv_like(root, n_places=4)
    return root
