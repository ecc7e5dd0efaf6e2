"""Places: where every photograph was taken, read from each folder format, and who is a positive of whom.

A `Places` table holds parallel arrays (path, position in metres, UTM zone, heading, city, place, date). Each
reader turns one format of the field into it and checks what it reads: a mistake in the data gives one
sentence with file and line, or, with ``on_error="skip"``, an entry in `Places.left_out`, where files that are
passed over are counted too. Names with a leading dot are nothing to any reader. `open_set` opens a benchmark
by its name, `open_training_set` a set to train on, and `positives` says which references answer a query.

Positions are UTM metres, and metres of two UTM zones have nothing to do with each other: no function here
takes a distance across zones. The zone is the number and the hemisphere. The letter of ``"10S"`` is the
latitude band; bands C to M lie in the south, N to X in the north, and two bands of one hemisphere share one
grid, so a distance may cross them.
"""

from __future__ import annotations

import dataclasses
import filecmp
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sagelib.runs import fingerprint as _fingerprint

if TYPE_CHECKING:
    import pandas

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "MSLS_TRAIN_CITIES",
    "MSLS_VAL_CITIES",
    "Places",
    "PositiveRule",
    "TestSet",
    "available",
    "folder_name",
    "heading_difference",
    "latlon_to_utm",
    "open_set",
    "open_training_set",
    "pairwise_m",
    "parse_name",
    "positives",
    "read_folder",
    "read_gsv_cities",
    "read_msls",
    "read_photos",
    "read_unlabelled",
    "same_grid",
]

PICTURES = tuple(
    ".jpg .jpeg .jpe .jfif .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .avif".split()
)
# File names carry centimetres. A northing of millions of metres is exact to about 1e-9 m in float64, so
# without this a pair that lies 25.00 m apart in decimal numbers would be in or out by the accident of binary
# rounding.
ROUNDING_M = 1e-6


# --------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class Places:
    """A frozen table of photographs: parallel arrays of length N, read-only; made by the readers or `build`.

    Attributes
    ----------
    path : (N,) object array of str
    east_m, north_m : (N,) float64
        UTM metres; NaN where the position is not known.
    utm_zone : (N,) str array
        Number and latitude band, such as ``"10S"``; ``""`` where unknown, as for mock coordinates.
    heading_deg : (N,) float64
        Clockwise from north; NaN where unknown.
    city : (N,) str array
    place : (N,) int64
        The label of the format (GSV-Cities ``place_id``, Mapillary SLS ``unique_cluster``), else -1. Such
        labels are unique only within a city: use `labels` for training.
    date : (N,) datetime64[D]
        NaT where unknown; the first of the month or year where only that is known.
    note : (N,) str array
        Free text; here often the condition, as in ``"night"`` or ``"town1000-night"``.
    key : (N,) str array
        The picture's own name in its source (panorama id, image key); ``""`` where there is none.
    sequence : (N,) str array
    frame : (N,) int64
        The drive a picture belongs to and its number within it, where the format tells (Mapillary SLS);
        ``""`` and -1 elsewhere.
    left_out : tuple of str
        What a reader with ``on_error="skip"`` left out, one sentence each, and the files that it passed over.

    Examples
    --------
    >>> places = Places.build(["a.jpg", "b.jpg", "c.jpg"], east_m=[0, 3, 0], north_m=[0, 4, 9])
    >>> len(places[places.east_m > 0])
    1
    >>> pairwise_m(places[:1], places).tolist()
    [[0.0, 5.0, 9.0]]
    """

    path: np.ndarray
    east_m: np.ndarray
    north_m: np.ndarray
    utm_zone: np.ndarray
    heading_deg: np.ndarray
    city: np.ndarray
    place: np.ndarray
    date: np.ndarray
    note: np.ndarray
    key: np.ndarray
    sequence: np.ndarray
    frame: np.ndarray
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "left_out", tuple(self.left_out))
        for name, (dtype, _) in _COLUMNS.items():
            array = np.array(getattr(self, name), dtype=dtype)
            if array.shape != np.shape(self.path):
                raise ValueError(
                    f"{name} must have shape {np.shape(self.path)} as path has, got {array.shape}"
                )
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if self.path.ndim != 1:
            raise ValueError(f"path must be one-dimensional, got shape {self.path.shape}")
        if bad := [path for path in self.path if not _is_utf8(path)]:
            raise ValueError(_not_utf8(bad[0]))

    @classmethod
    def build(cls, path: Iterable, *, left_out: Iterable[str] = (), **columns: Any) -> Places:
        """A table from paths and any of the other columns; the missing ones are filled with their "unknown".

        Parameters
        ----------
        path : iterable of path, length N
        left_out : iterable of str
        **columns
            Arrays of length N, or one value for all.

        Raises
        ------
        ValueError
            For a column of another length, TypeError for one that does not exist.
        """
        paths = np.empty(len(path := [os.fspath(p) for p in _names(path)]), dtype=object)
        paths[:] = path
        unknown = set(columns) - set(_COLUMNS)
        if unknown:
            raise TypeError(
                f"there is no column {sorted(unknown)[0]!r}; the columns are {', '.join(_COLUMNS)}"
            )
        filled = {"path": paths, "left_out": tuple(left_out)}
        for name, (dtype, default) in _COLUMNS.items():
            if name != "path":
                value = np.asarray(columns.get(name, default), dtype=dtype)
                filled[name] = np.full(len(paths), value) if value.ndim == 0 else value
        return cls(**filled)

    @classmethod
    def concat(cls, tables: Iterable[Places]) -> Places:
        """The tables one below the other; what they left out too."""
        tables = list(tables)
        if not tables:
            return cls.build([])
        columns = {name: np.concatenate([getattr(table, name) for table in tables]) for name in _COLUMNS}
        return cls(**columns, left_out=tuple(line for table in tables for line in table.left_out))

    def __len__(self) -> int:
        return len(self.path)

    def __getitem__(self, index: Any) -> Places:
        """The rows at an integer, a slice, an array of integers or a boolean mask, as a table."""
        if isinstance(index, int | np.integer):
            index = [index]
        columns = {name: getattr(self, name)[index] for name in _COLUMNS}
        return Places(**columns, left_out=self.left_out)

    def replace(self, **columns: Any) -> Places:
        """The same table with other values in the named columns."""
        old = {name: getattr(self, name) for name in _COLUMNS} | {"left_out": self.left_out}
        return Places.build(**(old | columns))

    def labels(self) -> np.ndarray:
        """One integer per place, from 0, that two cities never share; -1 where the picture has no place.

        Returns
        -------
        (N,) int64
        """
        labels = np.full(len(self), -1, dtype=np.int64)
        known = self.place >= 0
        if known.any():
            _, city = np.unique(self.city[known], return_inverse=True)
            _, place = np.unique(self.place[known], return_inverse=True)
            _, labels[known] = np.unique(city * (place.max() + 1) + place, return_inverse=True)
        return labels

    def with_clusters(self, radius_m: float) -> Places:
        """Group the photographs by geography: `place` becomes a label that is unique in the whole table.

        Within each city and UTM zone, in order of easting and northing, the first photograph without a group
        leads one, and all others without a group within the radius join it. So a group spans at most twice
        the radius, and two leaders lie farther apart than the radius. Photographs without a position get -1.

        Parameters
        ----------
        radius_m : float
            Greater than 0.
        """
        from scipy.spatial import cKDTree

        if not radius_m > 0:
            raise ValueError(f"radius_m must be > 0, got {radius_m}")
        place = np.full(len(self), -1, dtype=np.int64)
        known = np.isfinite(self.east_m) & np.isfinite(self.north_m)
        grid = same_grid(self.utm_zone)
        next_label = 0
        for group in sorted(set(zip(self.city[known], grid[known], strict=True))):
            rows = np.flatnonzero(known & (self.city == group[0]) & (grid == group[1]))
            xy = np.column_stack([self.east_m[rows], self.north_m[rows]])
            tree = cKDTree(xy)
            for i in np.lexsort((xy[:, 1], xy[:, 0])):
                if place[rows[i]] < 0:
                    near = rows[tree.query_ball_point(xy[i], radius_m + ROUNDING_M)]
                    place[near[place[near] < 0]] = next_label
                    next_label += 1
        return self.replace(place=place)

    def to_frame(self) -> pandas.DataFrame:
        """The table as a `pandas.DataFrame`, one row a photograph."""
        import pandas

        return pandas.DataFrame({name: getattr(self, name) for name in _COLUMNS})

    def fingerprint(self) -> str:
        """A hash of what the table says; it does not change where the data are moved. Pixels are not read."""
        # What counts of a path is what lies below the common folder, and the names of that folder and its
        # parent: queries and references often have the same file names.
        paths = [Path(p).as_posix().split("/") for p in self.path]
        shared = 0
        while paths and all(len(p) > shared + 1 and p[shared] == paths[0][shared] for p in paths):
            shared += 1
        columns = {name: getattr(self, name).astype("int64") for name in ("place", "date", "frame")}
        columns |= {
            name: np.nan_to_num(getattr(self, name), nan=1e99)
            for name in ("east_m", "north_m", "heading_deg")
        }
        columns |= {n: "\n".join(getattr(self, n)) for n in ("utm_zone", "city", "note", "key", "sequence")}
        return _fingerprint(columns | {"path": "\n".join("/".join(p[max(0, shared - 2) :]) for p in paths)})

    def __repr__(self) -> str:
        cities = sorted(set(self.city))
        named = ", ".join(cities[:3]) + (f" and {len(cities) - 3} more" if len(cities) > 3 else "")
        out = f", {len(self.left_out)} left out" if self.left_out else ""
        return f"Places({len(self):,} photographs; {named or 'no city'}{out})"


def _names(names: str | os.PathLike | Iterable) -> list:
    """The names as a list; a bare name is one name, not a list of its letters."""
    return [names] if isinstance(names, str | os.PathLike) else list(names)


def _is_utf8(path: str) -> bool:
    try:
        return path.isascii() or bool(path.encode())
    except UnicodeEncodeError:
        return False


def _not_utf8(path: str) -> str:
    return f"{os.fsencode(path).decode('utf-8', 'backslashreplace')}: this name is not UTF-8 text; rename it"


# name -> (dtype, the value that means "unknown")
_COLUMNS = {
    "path": (object, ""),
    "east_m": (np.float64, np.nan),
    "north_m": (np.float64, np.nan),
    "utm_zone": (np.str_, ""),
    "heading_deg": (np.float64, np.nan),
    "city": (np.str_, ""),
    "place": (np.int64, -1),
    "date": ("datetime64[D]", np.datetime64("NaT")),
    "note": (np.str_, ""),
    "key": (np.str_, ""),
    "sequence": (np.str_, ""),
    "frame": (np.int64, -1),
}


# --------------------------------------------------------------------------------------------------
# UTM
# --------------------------------------------------------------------------------------------------

_BANDS = "CDEFGHJKLMNPQRSTUVWX"  # 8 degrees each from 80 S; X has 12


def latlon_to_utm(
    lat_deg: np.ndarray, lon_deg: np.ndarray, *, zone: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latitude and longitude (WGS 84) as UTM metres, by pyproj.

    Parameters
    ----------
    lat_deg : (N,) array
        -80 to 84, where UTM is defined.
    lon_deg : (N,) array
        -180 to 180.
    zone : int, optional
        Project everything into this zone number, so that a town on a zone's border has one grid. By default
        each point has its own zone, with the exceptions for Norway (32V) and Svalbard (31X, 33X, 35X, 37X).

    Returns
    -------
    east_m, north_m : (N,) float64
    utm_zone : (N,) str array
        Such as ``"10S"``.

    Raises
    ------
    ValueError
        For a coordinate outside the ranges above.

    Examples
    --------
    >>> east, north, zone = latlon_to_utm([37.70664], [-122.46225])
    >>> round(float(east[0])), round(float(north[0])), str(zone[0])
    (547401, 4173403, '10S')
    """
    from pyproj import Transformer

    lat, lon = np.atleast_1d(np.asarray(lat_deg, float)), np.atleast_1d(np.asarray(lon_deg, float))
    for name, value, limits in (("latitude", lat, (-80, 84)), ("longitude", lon, (-180, 180))):
        bad = ~((value >= limits[0]) & (value <= limits[1]))
        if bad.any():
            raise ValueError(f"{name} must lie in {limits[0]}..{limits[1]} degrees, got {value[bad][0]}")
    if zone is not None and not 1 <= zone <= 60:
        raise ValueError(f"zone must lie in 1..60, got {zone}")
    numbers = _zone_numbers(lat, lon) if zone is None else np.full(len(lat), zone)
    east, north = np.empty(len(lat)), np.empty(len(lat))
    south = lat < 0
    for number, is_south in sorted(set(zip(numbers.tolist(), south.tolist(), strict=True))):
        rows = (numbers == number) & (south == is_south)
        grid = Transformer.from_crs(4326, (32700 if is_south else 32600) + number, always_xy=True)
        east[rows], north[rows] = grid.transform(lon[rows], lat[rows])
    bands = np.array(list(_BANDS))[np.clip((lat + 80) // 8, 0, len(_BANDS) - 1).astype(int)]
    return east, north, np.array([f"{n}{b}" for n, b in zip(numbers, bands, strict=True)], dtype=np.str_)


def _zone_numbers(lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
    number = ((lon + 180) // 6).astype(int) % 60 + 1
    number[(lat >= 56) & (lat < 64) & (lon >= 3) & (lon < 12)] = 32
    svalbard = lat >= 72
    for low, high, zone in ((0, 9, 31), (9, 21, 33), (21, 33, 35), (33, 42, 37)):
        number[svalbard & (lon >= low) & (lon < high)] = zone
    return number


def _town_to_utm(lat: np.ndarray, lon: np.ndarray, zone: int | None = None) -> tuple[np.ndarray, ...]:
    """One town, one grid: all in the zone of its middle, unless it spreads over more than a zone."""
    if zone is None and len(lat) and np.ptp(lon) <= 6:
        zone = int(_zone_numbers(np.array([np.median(lat)]), np.array([np.median(lon)]))[0])
    return latlon_to_utm(lat, lon, zone=zone)


def same_grid(utm_zone: np.ndarray) -> np.ndarray:
    """The grid of each zone name: number and hemisphere, such as ``"10 north"``; ``""`` where unknown.

    Metres may be compared where this is equal, and nowhere else.

    Examples
    --------
    >>> same_grid(["10S", "10T", "55H", ""]).tolist()
    ['10 north', '10 north', '55 south', '']
    """
    zones, inverse = np.unique(np.asarray(utm_zone, dtype=np.str_), return_inverse=True)
    grids = []
    for zone in zones.tolist():
        number, band = zone.rstrip(_BANDS + _BANDS.lower()), zone.lstrip("0123456789").upper()
        grids.append(f"{number} {'north' if band >= 'N' else 'south'}" if band else number)
    return np.array(grids, dtype=np.str_)[inverse]


def _one_grid(*tables: Places) -> None:
    grids = sorted(set().union(*(set(same_grid(table.utm_zone).tolist()) for table in tables)))
    if len(grids) > 1:
        named = ", ".join(grid or "unknown" for grid in grids)
        raise ValueError(
            f"metres of different UTM zones cannot be compared ({named}): take one zone at a time"
        )


def pairwise_m(a: Places, b: Places) -> np.ndarray:
    """Distances in metres, all in one UTM zone.

    Returns
    -------
    (len(a), len(b)) float64

    Raises
    ------
    ValueError
        If the photographs lie in more than one UTM zone; see `same_grid`.
    """
    _one_grid(a, b)
    return np.hypot(a.east_m[:, None] - b.east_m[None], a.north_m[:, None] - b.north_m[None])


def heading_difference(first_deg: np.ndarray, second_deg: np.ndarray) -> np.ndarray:
    """Degrees between headings, 0 to 180, the shorter way round; NaN where one is unknown.

    Examples
    --------
    >>> float(heading_difference(350, 10))
    20.0
    """
    turn = np.abs(np.asarray(first_deg, np.float64) - np.asarray(second_deg, np.float64)) % 360.0
    return np.minimum(turn, 360.0 - turn)


# --------------------------------------------------------------------------------------------------
# Positives
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PositiveRule:
    """Which references count as the query's place.

    Parameters
    ----------
    radius_m : float or None
        At most this far, inclusive.
    frames : int or None
        Instead of a radius: at most this many frames away in an equally spaced drive, inclusive.
    """

    radius_m: float | None = 25.0
    frames: int | None = None

    def __post_init__(self) -> None:
        if (self.radius_m is None) == (self.frames is None):
            raise ValueError("a rule has either radius_m or frames (set the other to None)")
        if self.radius_m is not None and not (self.radius_m >= 0 and np.isfinite(self.radius_m)):
            raise ValueError(f"radius_m must be >= 0, got {self.radius_m}")
        if self.frames is not None and self.frames < 0:
            raise ValueError(f"frames must be >= 0, got {self.frames}")

    def __str__(self) -> str:
        return f"{self.radius_m:g} m" if self.frames is None else f"+-{self.frames} frames"


def positives(database: Places, queries: Places, rule: PositiveRule | None = None) -> list[np.ndarray]:
    """The references that answer each query.

    Each UTM zone is searched by itself. The radius is inclusive, to within a micrometre for the rounding of
    decimal coordinates in binary numbers.

    Parameters
    ----------
    database, queries : Places
    rule : PositiveRule, optional
        25 m by default.

    Returns
    -------
    list of (n_i,) int64 arrays
        One ascending array of rows of `database` for each query; empty where the query has no positive.

    Raises
    ------
    ValueError
        If a position is not known, if queries lie in a zone that holds no reference, or if the references are
        no equally spaced drive though the rule counts frames.
    """
    from scipy.spatial import cKDTree

    rule = PositiveRule() if rule is None else rule
    for what, table in (("reference", database), ("query", queries)):
        unknown = ~(np.isfinite(table.east_m) & np.isfinite(table.north_m))
        if unknown.any():
            raise ValueError(
                f"{table.path[unknown][0]}: this {what} has no position, so positives cannot be told "
                f"({unknown.sum()} of {len(table)} have none)"
            )
    if rule.frames is not None:
        # A frame's width is the unit: the same search, in frames instead of metres.
        _one_grid(database, queries)
        database, queries = _in_frames(database, queries)
        reach = rule.frames + 0.25
    else:
        reach = rule.radius_m + ROUNDING_M
    database_grid, query_grid = same_grid(database.utm_zone), same_grid(queries.utm_zone)
    found = [np.empty(0, dtype=np.int64)] * len(queries)
    for grid in np.unique(query_grid):
        references, asked = np.flatnonzero(database_grid == grid), np.flatnonzero(query_grid == grid)
        if not len(references):
            held = ", ".join(repr(str(g)) if g else "unknown" for g in np.unique(database_grid)) or "none"
            raise ValueError(
                f"{len(asked)} queries lie in UTM zone {str(grid) or 'unknown'!r}, which holds no reference "
                f"(zones of the references: {held}): distances are never taken across zones"
            )
        tree = cKDTree(np.column_stack([database.east_m[references], database.north_m[references]]))
        xy = np.column_stack([queries.east_m[asked], queries.north_m[asked]])
        for query, near in zip(asked, tree.query_ball_point(xy, reach), strict=True):
            found[query] = np.sort(references[near])
    return found


def _in_frames(database: Places, queries: Places) -> tuple[Places, Places]:
    """Both tables with the frame number as easting, derived from the equal spacing of the references."""
    start = np.array([database.east_m.min(initial=np.inf), database.north_m.min(initial=np.inf)])
    span = np.hypot(np.ptp(database.east_m), np.ptp(database.north_m)) if len(database) else 0.0
    spacing_m = span / max(1, len(database) - 1)

    def number(table: Places) -> np.ndarray:
        along_m = (
            np.hypot(table.east_m - start[0], table.north_m - start[1]) if spacing_m else np.zeros(len(table))
        )
        before = (table.east_m < start[0]) | (table.north_m < start[1])
        return np.rint(np.where(before, -along_m, along_m) / (spacing_m or 1.0))

    if not np.array_equal(np.sort(number(database)), np.arange(len(database))):
        raise ValueError(
            "the rule counts frames, but the references' coordinates are no equally spaced straight line "
            "with one picture a frame: use a radius in metres"
        )
    return tuple(t.replace(east_m=number(t), north_m=0.0) for t in (database, queries))


# --------------------------------------------------------------------------------------------------
# Reading: what is wrong, where
# --------------------------------------------------------------------------------------------------


_SKIP = '; get it, or leave out what is not there with on_error="skip"'


class _Problems:
    """Raises the first problem, or collects them all."""

    def __init__(self, on_error: str) -> None:
        if on_error not in ("raise", "skip"):
            raise ValueError(f'on_error must be "raise" or "skip", got {on_error!r}')
        self.skip = on_error == "skip"
        self.sentences: list[str] = []
        self.passed_over: list[str] = []

    def add(self, sentence: str) -> None:
        if not self.skip:
            raise ValueError(sentence)
        self.sentences.append(sentence)

    def pass_over(self, folder: Path, names: Iterable[str], why: str) -> None:
        """Count and name files that are no mistake, but not read either."""
        if names := sorted(name for name in names if not name.startswith(".")):
            first = os.fsencode(names[0]).decode("utf-8", "backslashreplace")
            self.passed_over.append(f"{folder}: {why}, left out: {len(names)}, such as {first}")

    @property
    def left_out(self) -> list[str]:
        return self.sentences + self.passed_over


def _list_pictures(folder: Path, problems: _Problems) -> list[Path]:
    """All pictures below a folder, sorted by their path in it; links are followed, each folder is read once."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder")
    found, others, read, root = [], [], set(), os.path.join(folder, "")
    for directory, subfolders, names in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(directory)
        names = [] if real in read else [name for name in names if not name.startswith(".")]
        # Folders come before links to folders, so that a picture has its own path where it can.
        subfolders[:] = sorted(
            (name for name in subfolders if not name.startswith(".") and real not in read),
            key=lambda name: (os.path.islink(os.path.join(directory, name)), name),
        )
        read.add(real)
        below = os.path.join(directory, "")[len(root) :]
        for name in names:
            (found if name.lower().endswith(PICTURES) else others).append(below + name)
    if others:
        endings = Counter(os.path.splitext(name)[1].lower() or "no ending" for name in others)
        listed = ", ".join(f"{ending}: {n}" for ending, n in endings.most_common(5))
        problems.pass_over(folder, others, f"files without the ending of a picture ({listed})")
    for name in (bad := [name for name in found if not _is_utf8(root + name)]):
        problems.add(_not_utf8(root + name))
    return [
        folder / name for name in sorted(set(found) - set(bad), key=lambda name: name.replace(os.sep, "/"))
    ]


def _raise(error: OSError) -> None:
    raise error


def _sizes(folder: Path) -> dict[str, int]:
    """The size in bytes of every file in a folder, by name; none where there is no such folder."""
    if not folder.is_dir():
        return {}
    return {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.is_file()}


def _undecodable(path: str | os.PathLike) -> str | None:
    """Why a picture will not decode, or None: by header and end, and decoded wholly where these look odd."""
    from PIL import Image

    try:
        size = os.path.getsize(path)
        with open(path, "rb") as stream:
            with Image.open(stream) as picture:
                kind = picture.format
            stream.seek(max(0, size - 256))
            tail = stream.read()
    except FileNotFoundError:
        return "there is no such picture"
    except Exception as error:  # Pillow's plugins raise many kinds on broken bytes
        return f"this picture does not decode ({str(error).split(' <_io')[0]})"
    if {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}.get(kind, b"\0never\0") in tail:
        return None
    try:
        with Image.open(path) as picture:
            picture.load()
    except Exception as error:
        return f"this picture does not decode ({error})"
    return None


def _check_pictures(
    paths: Sequence, problems: _Problems, where: Callable[[int], str] | None = None
) -> np.ndarray:
    """True for each path whose picture can be decoded; the others are problems."""
    with ThreadPoolExecutor(8) as pool:
        reasons = list(pool.map(_undecodable, paths, chunksize=64))
    for row, reason in enumerate(reasons):
        if reason:
            place = where(row) if where else ""
            problems.add(f"{place}{paths[row]}: {reason}; replace or remove the file")
    return np.array([reason is None for reason in reasons], dtype=bool)


def _read_csv(
    path: Path, required: Sequence[str], aliases: dict[str, Sequence[str]] | None = None
) -> pandas.DataFrame:
    """All cells as text under lower-case names, without blank lines; the index is the line in the file."""
    import pandas

    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise FileNotFoundError(f"{path}: there is no such file") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text; save it as UTF-8") from None
    table = text.lstrip("\r\n")
    first = text.count("\n", 0, len(text) - len(table)) + 1
    if not table.strip():
        raise ValueError(f"{path}, line 1: the file is empty; it needs the columns {', '.join(required)}")
    try:
        frame = pandas.read_csv(
            io.StringIO(table), header=None, dtype=str, keep_default_na=False, skip_blank_lines=False
        )
    except pandas.errors.ParserError as error:
        if extra := re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", str(error)):
            columns, line, values = map(int, extra.groups())
            if columns == 1:
                header = table.splitlines()[0]
                raise ValueError(
                    f"{path}, line {first}: its columns are {header}; put commas between columns"
                ) from None
            raise ValueError(
                f"{path}, line {line + first - 1}: {values} values under {columns} columns; put a value that "
                "holds a comma between quotes, and write decimals with a point"
            ) from None
        raise ValueError(f"{path}: not a table of values between commas ({str(error).strip()})") from None
    frame.index += first
    there = [name.strip() for name in frame.iloc[0]]
    frame.columns = [name.lower() for name in there]
    if twice := [name for name, n in Counter(frame.columns).items() if name and n > 1]:
        listed = " and ".join(repr(name) for name in there if name.lower() == twice[0])
        raise ValueError(f"{path}, line {first}: the columns {listed} have one name; keep one of them")
    frame = frame[1:]
    blank = frame.iloc[:, 0].str.strip() == ""
    if blank.any():  # only such rows can be blank as a whole
        empty = frame[blank].apply(lambda column: column.str.strip() == "").all(axis=1)
        frame = frame.drop(index=empty.index[empty])
    for name, others in (aliases or {}).items():
        for other in others:
            if name not in frame.columns and other in frame.columns:
                frame = frame.rename(columns={other: name})
    for name in required:
        if name not in frame.columns:
            listed = ", ".join(n for n in there if n)
            hint = "" if len(there) > 1 else "; put commas between columns"
            raise ValueError(
                f"{path}, line {first}: there is no column {name!r}; its columns are {listed}{hint}"
            )
    return frame


def _numbers(
    frame: pandas.DataFrame,
    column: str,
    path: Path,
    problems: _Problems,
    good: np.ndarray,
    *,
    low: float = -np.inf,
    high: float = np.inf,
    empty: float | None = None,
) -> np.ndarray:
    """A column as float64; a cell that is no number in low..high is a problem and cleared in `good`.

    With `empty`, an empty cell means that value.
    """
    import pandas

    if column not in frame.columns:
        return np.full(len(frame), np.nan if empty is None else empty)
    text = frame[column].str.strip()
    value = pandas.to_numeric(text, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    blank = (
        text.str.lower().isin(["", "nan"]).to_numpy()
        if empty is not None
        else np.zeros(len(frame), dtype=bool)
    )
    bad = ~(np.isfinite(value) & (value >= low) & (value <= high)) & ~blank
    for row in np.flatnonzero(bad & good):
        limits = f" in {low:g}..{high:g}" if np.isfinite([low, high]).all() else ""
        cell = frame[column].iloc[row]
        hint = "; write decimals with a point" if "," in cell else ""
        problems.add(
            f"{path}, line {frame.index[row]}, column {column!r}: expected a number{limits}, got {cell!r}{hint}"
        )
    good &= ~bad
    return np.where(blank, np.nan if empty is None else empty, value)


def _flags(
    frame: pandas.DataFrame, column: str, path: Path, problems: _Problems, good: np.ndarray
) -> np.ndarray:
    """A column of true and false, also written 1 and 0, as (N,) bool; an empty cell is false."""
    meaning = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False, "": False}
    text = frame[column].str.strip().str.lower()
    bad = ~text.isin(list(meaning)).to_numpy()
    for row in np.flatnonzero(bad & good):
        cell = frame[column].iloc[row]
        problems.add(
            f"{path}, line {frame.index[row]}, column {column!r}: expected true or false, 1 or 0, got {cell!r}"
        )
    good &= ~bad
    return text.isin([name for name, value in meaning.items() if value]).to_numpy()


def _dates(text: Iterable[str]) -> np.ndarray:
    """The day in YYYY[MM[DD...]], with or without - / : between; NaT for anything else."""
    days = []
    for cell in text:
        digits = re.match(r"(\d{4})(?:[-/:.]?(\d{2})(?:[-/:.]?(\d{2}))?)?", str(cell).strip())
        try:
            year, month, day = (int(part or 1) for part in digits.groups())
            days.append(np.datetime64(f"{year:04d}-{month:02d}-{day:02d}", "D"))
        except (AttributeError, ValueError):
            days.append(np.datetime64("NaT", "D"))
    return np.array(days, dtype="datetime64[D]")


def _refuse_twice(
    names: Sequence[str], good: np.ndarray, where: Callable[[int], str], problems: _Problems
) -> None:
    """The second of two equal, not empty names is a problem, and its row is cleared in `good`."""
    first: dict[Any, int] = {}
    for row in np.flatnonzero(good):
        name = names[row]
        if name and first.setdefault(name, row) != row:
            problems.add(f"{where(row)}: the same key as {where(first[name])}; keep one of the two")
            good[row] = False


def _refuse_copies(paths: Sequence[Path], good: np.ndarray, problems: _Problems) -> None:
    """A file of the same name and content as another, in another folder, is a problem."""
    first: dict[str, int] = {}
    for row, path in enumerate(paths):
        other = first.setdefault(path.name, row)
        if other != row and filecmp.cmp(path, paths[other], shallow=False):
            problems.add(f"{path}: the same picture as {paths[other]}; keep one of the two")
            good[row] = False


def _no_pictures(folder: Path, problems: _Problems) -> str:
    listed = "; ".join(problems.left_out[:2])
    return f"{folder}: this folder holds no pictures ({', '.join(PICTURES[:3])}, ...)" + (
        f"; {listed}" if listed else ""
    )


# --------------------------------------------------------------------------------------------------
# @-folders
# --------------------------------------------------------------------------------------------------

_FIELDS = (
    "east_m north_m zone_number zone_letter lat lon pano_id tile heading_deg pitch roll height timestamp note"
).split()


def folder_name(
    east_m: float,
    north_m: float,
    zone_number: int | None = None,
    zone_letter: str = "",
    lat: float | None = None,
    lon: float | None = None,
    pano_id: str = "",
    tile: int | str | None = None,
    heading_deg: float | None = None,
    pitch: float | None = None,
    roll: float | None = None,
    height: float | None = None,
    timestamp: str = "",
    note: str = "",
    *,
    extension: str = ".jpg",
) -> str:
    """The file name of the field, with everything that is known of a picture between ``@``.

    ``@UTM_east@UTM_north@zone@letter@lat@lon@pano_id@tile@heading@pitch@roll@height@timestamp@note@.jpg``

    Metres get two decimals (fixed width, so that names sort by easting), latitude and longitude five, angles
    and height two. None and "" leave a field empty.

    Raises
    ------
    ValueError
        If a text holds ``@`` or ``/`` or a number is not finite.

    Examples
    --------
    >>> folder_name(547400.64, 4173402.98, 10, "S", note="day")
    '@0547400.64@4173402.98@10@S@@@@@@@@@@day@.jpg'
    """

    def number(value: float | None, form: str) -> str:
        if value is None or (isinstance(value, float) and np.isnan(value)):
            return ""
        if not np.isfinite(value):
            raise ValueError(f"a number in a file name must be finite, got {value}")
        return format(value, form)

    if not (np.isfinite(east_m) and np.isfinite(north_m)):
        raise ValueError(f"east_m and north_m must be finite, got {east_m} and {north_m}")
    fields = [number(east_m, "010.2f"), number(north_m, "010.2f")]
    fields += ["" if zone_number in (None, "") else f"{int(zone_number):02d}", str(zone_letter)]
    fields += [number(lat, "09.5f"), number(lon, "010.5f"), str(pano_id)]
    fields += [f"{tile:02d}" if isinstance(tile, int | np.integer) else str("" if tile is None else tile)]
    fields += [number(heading_deg, "06.2f"), *(number(value, ".2f") for value in (pitch, roll, height))]
    fields += [str(timestamp), str(note)]
    for name, field in zip(_FIELDS, fields, strict=True):
        if any(mark in field for mark in "@/\\\0"):
            raise ValueError(
                f"{name} stands between @ in a file name and may hold neither @ nor a slash, got {field!r}"
            )
    return "@" + "@".join(fields) + "@" + extension


def parse_name(name: str | os.PathLike) -> dict[str, Any]:
    """The fields of such a file name; only the two coordinates must be there.

    A third field that is no UTM zone is a note, and in a short name all that follows it belongs to the note:
    ``@east@north@photo_001@.jpg``.

    Returns
    -------
    dict
        ``east_m``, ``north_m``, ``heading_deg`` (NaN if empty) as float; ``utm_zone``; all other fields as
        text.

    Raises
    ------
    ValueError
        If there are no two numbers between ``@``, if a latitude band stands beside a zone number that does not
        exist or is no band, or if the heading is no number.

    Examples
    --------
    >>> fields = parse_name("@0547400.64@4173402.98@10@S@@@@@@@@@@day@.jpg")
    >>> fields["east_m"], fields["utm_zone"], fields["note"]
    (547400.64, '10S', 'day')
    """
    name = os.path.basename(os.fspath(name))
    parts = os.path.splitext(name)[0].split("@")[1:]
    fields: dict[str, Any] = dict(zip(_FIELDS, parts + [""] * len(_FIELDS), strict=False))
    try:
        fields["east_m"], fields["north_m"] = float(fields["east_m"]), float(fields["north_m"])
        if not np.isfinite([fields["east_m"], fields["north_m"]]).all():
            raise ValueError
    except ValueError:
        raise ValueError("the name must begin with two numbers, as in @UTM_east@UTM_north@.jpg") from None
    zone, letter = fields["zone_number"].strip(), fields["zone_letter"].strip().upper()
    if zone and not (len(zone) <= 2 and zone.isdecimal() and 1 <= int(zone) <= 60):
        if re.fullmatch(rf"\d{{1,2}}[{_BANDS}]", zone.upper()) and 1 <= int(zone[:-1]) <= 60 and not letter:
            zone, letter = zone[:-1], zone[-1].upper()
        elif zone.isdecimal() and letter and letter in _BANDS:
            raise ValueError(f"the UTM zone (third field) must be a number in 1..60, got {zone!r}")
        else:
            whole = len(parts) >= len(_FIELDS)
            words = [zone, fields["note"]] if whole else parts[2:]
            fields |= dict.fromkeys(_FIELDS[2:4] if whole else _FIELDS[2:], "")
            fields["note"] = " ".join(word for word in words if word)
            zone, letter = "", letter if whole else ""
    if letter and (len(letter) > 1 or letter not in _BANDS):
        raise ValueError(
            f"the UTM latitude band (fourth field) must be a letter C to X without I and O, got {letter!r}"
        )
    fields["utm_zone"] = f"{int(zone)}{letter}" if zone else ""
    try:
        fields["heading_deg"] = float(fields["heading_deg"] or "nan")
    except ValueError:
        raise ValueError(
            f"the heading (ninth field) must be a number, got {fields['heading_deg']!r}"
        ) from None
    return fields


def _city_in(fields: dict) -> str | None:
    """The city in a key of this package's towns (``town1000d00012``) or a note of converted MSLS, else None.

    No other note names a city: two conditions of one spot would be two cities, and never meet in training.
    """
    if town := re.fullmatch(r"(town\d+)[dq]\d+", fields["pano_id"]):
        return town[1]
    converted = re.fullmatch(r"(?:day|night)_[a-z]+_([a-z]+)", fields["note"])
    return converted[1] if converted and converted[1] in (*MSLS_TRAIN_CITIES, *MSLS_VAL_CITIES) else None


def read_folder(
    part_folder: str | os.PathLike,
    *,
    city: str | Callable[[dict], str] | None = None,
    on_error: str = "raise",
    check_pictures: bool = True,
) -> Places:
    """Read one part of a set, such as ``<set>/images/test/database``, from its file names.

    All pictures below the folder count, in the order of their sorted paths, also those in linked folders; names
    that begin with a dot do not. Other files are counted in `Places.left_out`.

    Parameters
    ----------
    part_folder : path
    city : str or callable, optional
        One name for all, or a function of the fields (`parse_name`). By default the name of the set's folder,
        but for rendered towns, whose keys name the town, and for converted Mapillary SLS, where the notes end
        in the city (``day_forward_cph``).
    on_error : {"raise", "skip"}
    check_pictures : bool
        Also look whether every file is a whole picture (header and end of the file: about 0.1 ms each).

    Raises
    ------
    FileNotFoundError
        If the folder does not exist.
    ValueError
        If it holds no picture, a name has no two ``@`` numbers or is not UTF-8, a file is there twice (same name
        and content, in two folders), or a picture does not decode.
    """
    folder = Path(part_folder)
    problems = _Problems(on_error)
    paths = _list_pictures(folder, problems)
    if not paths:
        raise ValueError(_no_pictures(folder, problems))
    rows, kept = [], []
    for path in paths:
        try:
            rows.append(parse_name(path.name))
            kept.append(path)
        except ValueError as error:
            problems.add(f"{path}: {error}")
    good = np.ones(len(kept), dtype=bool)
    _refuse_copies(kept, good, problems)
    if check_pictures:
        rest = np.flatnonzero(good)
        good[rest] = _check_pictures([kept[row] for row in rest], problems)
    parts = folder.absolute().parts
    parts = parts[:-2] if parts[-1] in ("database", "queries") else parts  # without <split>/<side>
    set_name = parts[-2] if parts[-1] == "images" else parts[-1]

    def city_of(fields: dict) -> str:
        if callable(city):
            return city(fields)
        return city if city is not None else _city_in(fields) or set_name

    rows = [row for row, keep in zip(rows, good, strict=True) if keep]
    if not rows:
        raise ValueError(
            f"{folder}: no picture is left; the first of {len(paths)} problems: {problems.sentences[0]}"
        )

    def column(name: str) -> list:
        return [row[name] for row in rows]

    return Places.build(
        [path for path, keep in zip(kept, good, strict=True) if keep],
        **{name: column(name) for name in ("east_m", "north_m", "utm_zone", "heading_deg", "note")},
        key=column("pano_id"),
        date=_dates(column("timestamp")),
        city=[city_of(row) for row in rows],
        left_out=problems.left_out,
    )


# --------------------------------------------------------------------------------------------------
# GSV-Cities
# --------------------------------------------------------------------------------------------------


def read_gsv_cities(
    root: str | os.PathLike,
    cities: Sequence[str] | None = None,
    *,
    on_error: str = "raise",
    check_pictures: bool = False,
) -> Places:
    """Read GSV-Cities: ``Dataframes/<City>.csv`` and ``Images/<City>/``.

    Latitude and longitude become UTM metres, each city in the one zone of its middle. `Places.place` is
    ``place_id``.

    Parameters
    ----------
    root : path
        The folder that holds ``Dataframes`` and ``Images``.
    cities : str or sequence of str, optional
        By default all that have a CSV, sorted.
    on_error : {"raise", "skip"}
    check_pictures : bool
        Also look into every picture. Off by default, for the half million of them; that the files exist is
        always checked.

    Raises
    ------
    FileNotFoundError
        If folder or CSV is missing.
    ValueError
        For a CSV without a column, a bad value, a picture that is not there, or a row given twice.
    """
    root = Path(root)
    problems = _Problems(on_error)
    if cities is None:
        cities = sorted(p.stem for p in (root / "Dataframes").glob("*.csv") if not p.name.startswith("."))
    if not cities:
        raise FileNotFoundError(f"{root}: there is no Dataframes/<City>.csv in it")
    tables = [_gsv_city(root, city, problems, check_pictures) for city in _names(cities)]
    return Places.concat([*tables, Places.build([], left_out=problems.left_out)])


def _gsv_city(root: Path, city: str, problems: _Problems, check_pictures: bool) -> Places:
    csv = root / "Dataframes" / f"{city}.csv"
    frame = _read_csv(csv, ["place_id", "year", "month", "northdeg", "city_id", "lat", "lon", "panoid"])
    good = np.ones(len(frame), dtype=bool)
    limits = {"place_id": (0, 2**53), "year": (1, 9999), "month": (1, 12), "northdeg": (-360, 360)}
    limits |= {"lat": (-80, 84), "lon": (-180, 180)}
    value = {
        n: _numbers(frame, n, csv, problems, good, low=low, high=high) for n, (low, high) in limits.items()
    }
    folder = root / "Images" / city
    there = _sizes(folder)
    names = [""] * len(frame)
    text = {n: frame[n].str.strip().tolist() for n in ("city_id", "lat", "lon", "panoid")}
    for row in np.flatnonzero(good):
        whole = (int(value[n][row]) for n in ("place_id", "year", "month", "northdeg"))
        head = "{}_{:07d}_{:04d}_{:02d}_{:03d}".format(text["city_id"][row] or city, *whole)
        # Names were made from numbers, the CSV holds their text: 48.10 in one may be 48.1 in the other.
        candidates = [
            f"{head}_{lat}_{lon}_{text['panoid'][row]}.jpg"
            for lat, lon in ((text["lat"][row], text["lon"][row]), (value["lat"][row], value["lon"][row]))
        ]
        names[row] = next((name for name in candidates if name in there), "")
        if not there.get(names[row]):
            wrong = "is empty" if names[row] else "is not there"
            picture = folder / (names[row] or candidates[0])
            problems.add(f"{csv}, line {frame.index[row]}: its picture {picture} {wrong}{_SKIP}")
            good[row] = False
    problems.pass_over(folder, there.keys() - set(names), f"pictures without a good row in {csv.name}")
    _refuse_twice(names, good, lambda row: f"{csv}, line {frame.index[row]}", problems)
    if check_pictures:
        rest = np.flatnonzero(good)
        good[rest] = _check_pictures([folder / names[row] for row in rest], problems)
    if not good.any() and not problems.skip:
        raise ValueError(f"{csv}: the table has no rows")
    east, north, zone = _town_to_utm(value["lat"][good], value["lon"][good])
    months = zip(value["year"][good].astype(int), value["month"][good].astype(int), strict=True)
    return Places.build(
        [folder / names[row] for row in np.flatnonzero(good)],
        east_m=east,
        north_m=north,
        utm_zone=zone,
        heading_deg=value["northdeg"][good] % 360,
        city=city,
        place=value["place_id"][good].astype(np.int64),
        date=[f"{year:04d}-{month:02d}-01" for year, month in months],
        key=frame["panoid"].str.strip().to_numpy(dtype=np.str_)[good],
    )


# --------------------------------------------------------------------------------------------------
# Mapillary Street-level Sequences
# --------------------------------------------------------------------------------------------------

MSLS_TRAIN_CITIES = (
    "trondheim london boston melbourne amsterdam helsinki tokyo toronto saopaulo moscow zurich paris bangkok "
    "budapest austin berlin ottawa phoenix goa amman nairobi manila"
).split()
MSLS_VAL_CITIES = ("cph", "sf")
MSLS_SUBTASKS = ("all", "s2w", "w2s", "o2n", "n2o", "d2n", "n2d")


def read_msls(
    root: str | os.PathLike,
    cities: Sequence[str] | None = None,
    *,
    part: str | None = None,
    subtask: str | None = None,
    on_error: str = "raise",
    check_pictures: bool = False,
) -> Places:
    """Read Mapillary Street-level Sequences as downloaded: ``train_val/<city>/{query,database}``.

    Panoramas are dropped, and so are the empty files that the release holds; `Places.left_out` counts these.
    `Places.place` is ``unique_cluster``, the heading is ``ca``, `Places.note` is view
    direction and light (``"forward-night"``). Eastings and northings are the set's own; where a city lies in
    two UTM zones, each photograph gets the zone in which its latitude and longitude give these metres.

    Parameters
    ----------
    root : path
        The folder that holds ``train_val``.
    cities : str or sequence of str, optional
        By default the training cities found. Copenhagen (``cph``) and San Francisco (``sf``), on which models
        are compared, are read only when named here.
    part : {"query", "database"}, optional
        Both by default.
    subtask : str, optional
        Only the pictures of a sub-task: ``all`` (the benchmark's choice), or summer, winter, old, new, day,
        night against each other: ``s2w``, ``w2s``, ``o2n``, ``n2o``, ``d2n``, ``n2d``.
    on_error : {"raise", "skip"}
    check_pictures : bool
        Also look into every picture. Off by default, for the 1.6 million of them; that the files exist is
        always checked.

    Raises
    ------
    FileNotFoundError
        If a folder or CSV is missing.
    ValueError
        For a CSV without a column, a bad value, a key given twice or without picture, or an unknown part or
        sub-task.
    """
    root = Path(root)
    problems = _Problems(on_error)
    if part not in (None, "query", "database"):
        raise ValueError(f'part must be None, "query" or "database", got {part!r}')
    if subtask not in (None, *MSLS_SUBTASKS):
        raise ValueError(f"subtask must be None or one of {', '.join(MSLS_SUBTASKS)}, got {subtask!r}")
    if cities is None:
        there = sorted(p.name for p in (root / "train_val").glob("[!.]*") if p.is_dir())
        cities = [city for city in there if city not in MSLS_VAL_CITIES]
        if not cities:
            held_out = [city for city in there if city in MSLS_VAL_CITIES]
            also = (
                f", and {' and '.join(held_out)} are validation cities, read only when named"
                if held_out
                else ""
            )
            raise FileNotFoundError(f"{root / 'train_val'}: there is no training city in it{also}")
    tables = [
        _msls_part(root / "train_val" / city / side, city, subtask, problems, check_pictures)
        for city in _names(cities)
        for side in ((part,) if part else ("query", "database"))
    ]
    return Places.concat([*tables, Places.build([], left_out=problems.left_out)])


def _msls_part(
    folder: Path, city: str, subtask: str | None, problems: _Problems, check_pictures: bool
) -> Places:
    csv = folder / "postprocessed.csv"
    frame = _read_csv(csv, ["key", "easting", "northing", "night", "view_direction", "unique_cluster"])
    raw = _msls_join(frame, folder / "raw.csv", ["key", "lon", "lat", "ca", "captured_at", "pano"])
    good = np.ones(len(frame), dtype=bool)
    keys = frame["key"].str.strip().to_numpy(dtype=np.str_)
    good &= ~_flags(raw, "pano", folder / "raw.csv", problems, good)
    if subtask is not None:
        chosen = _msls_join(frame, folder / "subtask_index.csv", ["key", subtask])
        good &= _flags(chosen, subtask, folder / "subtask_index.csv", problems, good)
    wanted = int(good.sum())
    night = _flags(frame, "night", csv, problems, good)

    east, north = (_numbers(frame, name, csv, problems, good) for name in ("easting", "northing"))
    cluster = _numbers(frame, "unique_cluster", csv, problems, good, empty=-1)
    lat = _numbers(raw, "lat", folder / "raw.csv", problems, good, low=-80, high=84)
    lon = _numbers(raw, "lon", folder / "raw.csv", problems, good, low=-180, high=180)
    heading = _numbers(raw, "ca", folder / "raw.csv", problems, good, empty=np.nan)
    sequence, frame_number = np.full(len(frame), "", dtype=np.str_), np.full(len(frame), -1.0)
    if (folder / "seq_info.csv").exists():
        info = _msls_join(frame, folder / "seq_info.csv", ["key", "sequence_key", "frame_number"])
        sequence = info["sequence_key"].str.strip().to_numpy(dtype=np.str_)
        frame_number = _numbers(info, "frame_number", folder / "seq_info.csv", problems, good, empty=-1)

    _refuse_twice(keys, good, lambda row: f"{csv}, line {frame.index[row]} (key {keys[row]})", problems)
    pictures = folder / "images"
    names, there = [f"{key}.jpg" for key in keys.tolist()], _sizes(pictures)
    for row in np.flatnonzero(good):
        if names[row] not in there:
            picture = pictures / names[row]
            problems.add(f"{csv}, line {frame.index[row]}: its picture {picture} is not there{_SKIP}")
        good[row] = bool(there.get(names[row]))
    problems.pass_over(pictures, (name for name, size in there.items() if not size), "empty files")
    problems.pass_over(pictures, there.keys() - set(names), f"files without a row in {csv.name}")
    rows = np.flatnonzero(good)
    paths = [pictures / names[row] for row in rows]
    if check_pictures:
        decodes = _check_pictures(paths, problems)
        rows, paths = rows[decodes], [path for path, keep in zip(paths, decodes, strict=True) if keep]
    if not len(frame):
        raise ValueError(f"{csv}: the table has no rows")
    if not wanted:
        which = f" of sub-task {subtask}" if subtask else ""
        problems.passed_over.append(f"{csv}: the table has no row{which} that is not a panorama")

    light = np.where(night, "night", "day")
    view = frame["view_direction"].str.strip().str.lower().to_numpy(dtype=np.str_)
    return Places.build(
        paths,
        east_m=east[rows],
        north_m=north[rows],
        utm_zone=_zones_of_metres(lat[rows], lon[rows], east[rows], north[rows]),
        heading_deg=heading[rows] % 360,
        city=city,
        place=cluster[rows].astype(np.int64),
        date=_dates(raw["captured_at"].iloc[rows]),
        note=[f"{view[row]}-{light[row]}" if view[row] else light[row] for row in rows],
        key=keys[rows],
        sequence=sequence[rows],
        frame=frame_number[rows].astype(np.int64),
    )


def _msls_join(frame: pandas.DataFrame, path: Path, columns: Sequence[str]) -> pandas.DataFrame:
    """Another CSV of the folder; its rows must be the pictures of `frame`, row by row, as published."""
    other = _read_csv(path, columns)
    if len(other) != len(frame):
        raise ValueError(
            f"{path}: {len(other)} rows, but postprocessed.csv beside it has {len(frame)}; they must agree"
        )
    differs = other["key"].str.strip().to_numpy() != frame["key"].str.strip().to_numpy()
    if differs.any():
        row = int(np.argmax(differs))
        raise ValueError(
            f"{path}, line {other.index[row]}, column 'key': expected {frame['key'].iloc[row]!r} as in "
            f"postprocessed.csv, got {other['key'].iloc[row]!r}"
        )
    return other


def _zones_of_metres(lat: np.ndarray, lon: np.ndarray, east: np.ndarray, north: np.ndarray) -> np.ndarray:
    """The zone names in which (lat, lon) come closest to the given metres."""
    if not len(lat):
        return np.empty(0, dtype=np.str_)
    numbers = np.unique(_zone_numbers(lat, lon))
    if len(numbers) > 1:
        projected = [latlon_to_utm(lat, lon, zone=int(number)) for number in numbers]
        off_m = np.array([np.hypot(e - east, n - north) for e, n, _ in projected])
        return np.array([zone for _, _, zone in projected])[off_m.argmin(axis=0), np.arange(len(lat))]
    return latlon_to_utm(lat, lon, zone=int(numbers[0]))[2]


# --------------------------------------------------------------------------------------------------
# One's own photographs
# --------------------------------------------------------------------------------------------------


def read_photos(
    folder: str | os.PathLike,
    csv: str | os.PathLike | None = None,
    *,
    zone: int | None = None,
    city: str | None = None,
    on_error: str = "raise",
    check_pictures: bool = True,
) -> Places:
    """Read a folder of one's own photographs and a CSV that says where they were taken.

    Parameters
    ----------
    folder : path
    csv : path, optional
        As it stands or relative to the folder; by default the folder's ``positions.csv`` or ``photos.csv``.
        Columns (case does not matter): ``file`` (a path in the folder),
        and either ``lat`` and ``lon`` (degrees, WGS 84) or ``east`` and ``north`` (metres) with, if known,
        ``zone`` (such as ``10S``); if wanted ``heading`` (degrees), ``date`` (YYYY[-MM[-DD]]), ``place``
        (integer), ``city``, ``note``. ``latitude``, ``longitude``, ``east_m``, ``north_m``, ``utm_zone`` and
        ``heading_deg`` are understood too; empty optional cells mean "unknown". A column ``part`` tells
        `open_set` and `open_training_set` what a photograph is for: ``train``, or ``database`` or ``queries``,
        with the split before it if it is not the test (``val/queries``).
    zone : int, optional
        UTM zone number for ``lat`` and ``lon``. By default the zone of their middle, for all, or each its own
        if they spread over more than 6 degrees. Give it where two tables to be compared lie on a zone's
        border.
    city : str, optional
        Where the CSV has no such column; by default the folder's name.
    on_error : {"raise", "skip"}
    check_pictures : bool
        Also look whether every file is a whole picture.

    Raises
    ------
    FileNotFoundError
        If folder or CSV is missing.
    ValueError
        With file, line and column: for a missing column, a bad value, a file given twice or not there, or a
        picture that does not decode. Also if `csv` names one file as it stands and another in the folder.
    """
    return _read_photos(folder, csv, zone, city, on_error, check_pictures)[0]


def _photos_csv(folder: Path, csv: str | os.PathLike | None = None) -> Path | None:
    """The one file that a CSV's name, or no name, means for a folder of photographs; None if there is none."""
    choices = ["positions.csv", "photos.csv"] if csv is None else [csv]
    there = [folder / name for name in choices if (folder / name).is_file()]
    if csv is not None and Path(csv).is_file() and not (there and there[0].samefile(csv)):
        there.append(Path(csv))
    if len(there) > 1:
        raise ValueError(f"{there[0]} and {there[1]} are both there: give the whole path of the one you mean")
    return there[0] if there else None


def _read_photos(
    folder: str | os.PathLike,
    csv: str | os.PathLike | None,
    zone: int | None,
    city: str | None,
    on_error: str,
    check_pictures: bool,
) -> tuple[Places, np.ndarray | None]:
    """What `read_photos` returns, and the column ``part`` as (N,) object array of str, None where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder")
    named, csv = csv or "positions.csv", _photos_csv(folder, csv)
    if csv is None:
        raise FileNotFoundError(f"{named}: there is no such file, nor is there one in {folder}")
    problems = _Problems(on_error)
    aliases = {
        "lat": ["latitude"],
        "lon": ["longitude", "lng"],
        "east": ["east_m", "easting"],
        "north": ["north_m", "northing"],
        "zone": ["utm_zone"],
        "heading": ["heading_deg"],
        "file": ["path", "image", "name"],
    }
    frame = _read_csv(csv, ["file"], aliases)
    columns = set(frame.columns)
    degrees = "lat" in columns or "lon" in columns
    for name in ("lat", "lon") if degrees else ("east", "north"):
        if name not in columns:
            wanted = "lat and lon, or east and north"
            listed = ", ".join(str(column) for column in frame.columns)
            raise ValueError(
                f"{csv}, line 1: there is no column {name!r} (needed: {wanted}); its columns are {listed}"
            )
    good = np.ones(len(frame), dtype=bool)
    files = frame["file"].str.strip().to_numpy()
    paths = [folder / name for name in files]
    for row in np.flatnonzero(
        [not name or not path.is_file() for name, path in zip(files, paths, strict=True)]
    ):
        problems.add(
            f"{csv}, line {frame.index[row]}, column 'file': there is no picture {str(files[row])!r} in {folder}"
        )
        good[row] = False
    _refuse_twice(
        [os.path.normpath(p) for p in paths],
        good,
        lambda row: f"{csv}, line {frame.index[row]} ({files[row]})",
        problems,
    )

    if degrees:
        first = _numbers(frame, "lat", csv, problems, good, low=-80, high=84)
        second = _numbers(frame, "lon", csv, problems, good, low=-180, high=180)
    else:
        first = _numbers(frame, "east", csv, problems, good)
        second = _numbers(frame, "north", csv, problems, good)
    heading = _numbers(frame, "heading", csv, problems, good, low=-360, high=360, empty=np.nan)
    place = _numbers(frame, "place", csv, problems, good, low=-1, high=2**53, empty=-1)
    zones = _text(frame, "zone", "")
    for row in np.flatnonzero(good):
        if zones[row] and not degrees:
            match = re.fullmatch(rf"0*(\d+)\s*([{_BANDS}]?)", zones[row].upper())
            if match is None or not 1 <= int(match[1]) <= 60:
                problems.add(
                    f"{csv}, line {frame.index[row]}, column 'zone': expected a UTM zone such as 10S, "
                    f"got {zones[row]!r}"
                )
                good[row] = False
            else:
                zones[row] = match[1] + match[2]
    part = _text(frame, "part", "")
    for row in np.flatnonzero(good) if "part" in columns else ():
        if not re.fullmatch(r"train|((train|val|test)/)?(database|queries)", part[row]):
            problems.add(
                f"{csv}, line {frame.index[row]}, column 'part': expected train, database, queries, val/database "
                f"or val/queries, got {part[row]!r}"
            )
            good[row] = False
    dates = _text(frame, "date", "")
    days = _dates(dates)
    for row in np.flatnonzero(good & np.isnat(days) & np.array([bool(d) for d in dates], dtype=bool)):
        problems.add(
            f"{csv}, line {frame.index[row]}, column 'date': expected YYYY, YYYY-MM or YYYY-MM-DD, got {dates[row]!r}"
        )
        good[row] = False
    if check_pictures:
        rest = np.flatnonzero(good)
        where = [f"{csv}, line {frame.index[row]}: " for row in rest]
        good[rest] = _check_pictures([paths[row] for row in rest], problems, where.__getitem__)
    if not good.any():
        raise ValueError(
            f"{csv}: no row is left"
            + (f"; the first problem: {problems.sentences[0]}" if problems.sentences else "")
        )
    rows = np.flatnonzero(good)
    if degrees:
        east, north, zone_names = _town_to_utm(first[rows], second[rows], zone)
    else:
        east, north, zone_names = first[rows], second[rows], zones[rows]
    listed = {os.path.normpath(path) for path in paths}
    others = [p.name for p in _list_pictures(folder, _Problems("skip")) if os.path.normpath(p) not in listed]
    problems.pass_over(folder, others, f"pictures without a row in {csv.name}")
    places = Places.build(
        [paths[row] for row in rows],
        east_m=east,
        north_m=north,
        utm_zone=np.asarray(zone_names, dtype=np.str_),
        heading_deg=heading[rows] % 360,
        city=_text(frame, "city", city if city is not None else folder.absolute().name)[rows].astype(np.str_),
        place=place[rows].astype(np.int64),
        date=days[rows],
        note=_text(frame, "note", "")[rows].astype(np.str_),
        left_out=problems.left_out,
    )
    return places, part[rows] if "part" in columns else None


def _text(frame: pandas.DataFrame, column: str, default: str) -> np.ndarray:
    if column not in frame.columns:
        return np.full(len(frame), default, dtype=object)
    return frame[column].str.strip().replace("", default).to_numpy(dtype=object)


def read_unlabelled(
    folder: str | os.PathLike,
    *,
    city: str | None = None,
    on_error: str = "raise",
    check_pictures: bool = True,
) -> Places:
    """Read a folder of pictures of which nothing is known: for retrieval only, `positives` refuses it.

    Parameters
    ----------
    folder : path
        All pictures below it count, sorted.
    city : str, optional
        By default the folder's name.
    on_error : {"raise", "skip"}
    check_pictures : bool

    Raises
    ------
    FileNotFoundError
        If the folder does not exist.
    ValueError
        If it holds no picture or one that does not decode.
    """
    folder = Path(folder)
    problems = _Problems(on_error)
    paths = _list_pictures(folder, problems)
    if check_pictures:
        decodes = _check_pictures(paths, problems)
        paths = [path for path, keep in zip(paths, decodes, strict=True) if keep]
    if not paths:
        raise ValueError(_no_pictures(folder, problems))
    return Places.build(
        paths, city=city if city is not None else folder.absolute().name, left_out=problems.left_out
    )


# --------------------------------------------------------------------------------------------------
# Benchmarks
# --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What is known of a benchmark before it is opened.

    Attributes
    ----------
    name : str
    folders : tuple of str
        Folder names under which it is looked for, first found first taken.
    split : str
        Folder below ``images``.
    rule : PositiveRule
    n_database, n_queries : int or None
        Counts of the published evaluations.
    sorted_batch : int
        The batch in which the authors' evaluation shows name-sorted images to the InteractHead of this set.
    where_to_get : str
    """

    name: str
    folders: tuple[str, ...]
    split: str = "test"
    rule: PositiveRule = PositiveRule()
    n_database: int | None
    n_queries: int | None
    sorted_batch: int
    where_to_get: str


_DOWNLOADER = "the VPR-datasets-downloader project"
_MSLS_SITE = "the Mapillary Street-level Sequences site"

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="sped",
            folders=("sped", "SPED"),
            n_database=607,
            n_queries=607,
            sorted_batch=2,
            where_to_get=f"{_DOWNLOADER} (download_sped.py)",
        ),
        Benchmark(
            name="amstertime",
            folders=("amstertime", "AmsterTime"),
            n_database=1231,
            n_queries=1231,
            sorted_batch=2,
            where_to_get=f"{_DOWNLOADER} (download_amstertime.py)",
        ),
        Benchmark(
            name="msls-val",
            folders=("msls", "mapillary_sls", "MSLS"),
            split="val",
            n_database=18871,
            n_queries=740,
            sorted_batch=16,
            where_to_get=f"{_MSLS_SITE}; as downloaded, or converted by {_DOWNLOADER} (format_mapillary.py), "
            "and then with the list of the 740 query keys",
        ),
        Benchmark(
            name="pitts30k-test",
            folders=("pitts30k", "Pitts30k"),
            n_database=10000,
            n_queries=6816,
            sorted_batch=8,
            where_to_get=f"the authors of Pittsburgh 250k; then {_DOWNLOADER} (format_pitts30k.py)",
        ),
        Benchmark(
            name="tokyo247",
            folders=("tokyo247", "Tokyo247", "tokyo_247"),
            n_database=75984,
            n_queries=315,
            sorted_batch=16,
            where_to_get=f"the authors of Tokyo 24/7; then {_DOWNLOADER} (format_tokyo247.py)",
        ),
        Benchmark(
            name="pitts250k-test",
            folders=("pitts250k", "Pitts250k"),
            n_database=83952,
            n_queries=8280,
            sorted_batch=8,
            where_to_get=f"the authors of Pittsburgh 250k; then {_DOWNLOADER} (format_pitts250k.py)",
        ),
        Benchmark(
            name="nordland-full",
            folders=("nordland", "Nordland"),
            n_database=27592,
            n_queries=27592,
            sorted_batch=26,
            where_to_get=f"{_DOWNLOADER} (download_nordland.py)",
        ),
        Benchmark(
            name="nordland-2760",
            folders=("nordland-2760", "nordland_2760", "nordland", "Nordland"),
            rule=PositiveRule(radius_m=None, frames=1),
            n_database=27592,
            n_queries=2760,
            sorted_batch=26,
            where_to_get=f"{_DOWNLOADER} (download_nordland.py; the 2,760 are taken from the full set)",
        ),
        Benchmark(
            name="eynsham",
            folders=("eynsham", "Eynsham"),
            n_database=23935,
            n_queries=23935,
            sorted_batch=20,
            where_to_get=f"{_DOWNLOADER} (download_eynsham.py)",
        ),
        Benchmark(
            name="msls-val-full",
            folders=("msls", "mapillary_sls", "MSLS"),
            split="val",
            n_database=18871,
            n_queries=None,
            sorted_batch=16,
            where_to_get=f"{_MSLS_SITE}; as downloaded, or converted by {_DOWNLOADER} (format_mapillary.py)",
        ),
    )
}


@dataclass(frozen=True, eq=False, kw_only=True)
class TestSet:
    """References, queries and the rule that joins them. Made by `open_set`.

    Attributes
    ----------
    name : str
    database, queries : Places
    rule : PositiveRule
    spec : Benchmark or None
        None for a folder that is no named benchmark.
    split : str
    """

    __test__ = False  # no test class, whatever pytest thinks of its name

    name: str
    database: Places
    queries: Places
    rule: PositiveRule = PositiveRule()
    spec: Benchmark | None = None
    split: str = "test"

    @property
    def counts_as_expected(self) -> bool | None:
        """Whether both counts are those of the published evaluations; None where nobody states them."""
        if self.spec is None or self.spec.n_queries is None:
            return None
        return (len(self.database), len(self.queries)) == (self.spec.n_database, self.spec.n_queries)

    @property
    def warning(self) -> str:
        """A sentence if the counts are not as expected, else the empty text."""
        if self.counts_as_expected is not False:
            return ""
        return (
            f"{self.name} has {len(self.database):,} references and {len(self.queries):,} queries here, but "
            f"{self.spec.n_database:,} and {self.spec.n_queries:,} in the published evaluations: its recalls "
            "cannot be compared with published ones"
        )

    @property
    def left_out(self) -> tuple[str, ...]:
        """What reading with ``on_error="skip"`` left out, one sentence each."""
        return self.database.left_out + self.queries.left_out

    def positives(self) -> list[np.ndarray]:
        """The references that answer each query; see `positives`."""
        return positives(self.database, self.queries, self.rule)

    def fingerprint(self) -> str:
        """A hash of both tables and of the rule."""
        return _fingerprint(
            [self.database.fingerprint(), self.queries.fingerprint(), dataclasses.asdict(self.rule)]
        )

    def __repr__(self) -> str:
        expected = {True: ", counts as expected", False: ", COUNTS NOT AS EXPECTED", None: ""}[
            self.counts_as_expected
        ]
        return (
            f"TestSet({self.name!r}: {len(self.database):,} references, {len(self.queries):,} queries, "
            f"positives within {self.rule}{expected})"
        )


def open_set(
    root: str | os.PathLike,
    name: str,
    split: str | None = None,
    *,
    query_keys: str | os.PathLike | Sequence[str] | None = None,
    on_error: str = "raise",
    check_pictures: bool = True,
) -> TestSet:
    """Open a benchmark by name, a folder ``<name>/images/<split>/{database,queries}``, or photographs and a CSV.

    Parameters
    ----------
    root : path
        The folder of data sets.
    name : str
        A key of `BENCHMARKS`, or the name of a folder in `root`, whose positives lie within 25 m: of that layout,
        of Mapillary SLS as downloaded, or of photographs with a ``positions.csv`` (see `read_photos`). A CSV of
        another name is named with its folder: ``holiday/spring.csv``.
    split : str, optional
        ``"test"`` by default; a benchmark brings its own.
    query_keys : path or sequence of str, optional
        Only for ``msls-val``: the keys of its 740 queries, as a list, a text file with one key (or picture
        path) a line, or a ``.npy`` array of such texts. A file ``query_keys.txt`` in the set's folder is
        found by itself. Sets as downloaded need none: there the sub-task ``all`` selects the queries.
    on_error, check_pictures
        As in `read_folder`.

    Notes
    -----
    A benchmark is looked for under the folder names of `Benchmark.folders`: sped, amstertime, msls,
    pitts30k, tokyo247, pitts250k, nordland, eynsham, as the VPR-datasets-downloader project writes them.

    The column ``part`` of a CSV tells references from queries. Without it, every second row is a query and the
    others are the references, and there is no other split than the test.

    ``nordland-2760`` swaps the seasons of the full set (winter references, summer queries) and asks for every
    tenth frame; a folder ``nordland-2760`` of one's own is taken as it is. ``msls-val-full`` takes all of the
    validation queries (about 11,000 after conversion), and is another benchmark than ``msls-val``.

    Raises
    ------
    FileNotFoundError
        If the set is not there; the sentence says where to get it.
    ValueError
        For what `read_folder` refuses, and for ``msls-val`` converted without the list of its query keys.
    """
    root = Path(root)
    spec = BENCHMARKS.get(name)
    reading = {"on_error": on_error, "check_pictures": check_pictures}
    if query_keys is not None and name != "msls-val":
        raise ValueError(f"query_keys belong to msls-val, not to {name}")
    if spec is None:
        folder = _set_folder(root, name)
        part = _split_folder(folder, split or "test")
        if part is None and (folder / "train_val").is_dir() and split in (None, "val"):
            return dataclasses.replace(open_set(folder.parent, "msls-val", **reading), name=name)
        if part is None and (csv := _csv_of_set(folder)):
            database, queries = _open_photos(csv, split or "test", reading)
        elif part is None:
            raise FileNotFoundError(
                f"{folder}: there is no images/{split or 'test'} with database and queries in it, nor a positions.csv, "
                f"and {name!r} is none of the benchmarks {', '.join(BENCHMARKS)}"
            )
        else:
            database, queries = (read_folder(part / side, **reading) for side in ("database", "queries"))
        return TestSet(name=name, database=database, queries=queries, split=split or "test")

    if split is not None and split != spec.split:
        raise ValueError(f"the benchmark {name} has the split {spec.split!r}, got {split!r}")
    folder, missing = _find_benchmark(root, spec)
    if missing:
        raise FileNotFoundError(
            f"{name} is not complete in {root}: {missing}; get it from {spec.where_to_get}"
        )
    if (folder / "train_val").is_dir():
        return _open_msls(folder, spec, query_keys, reading)

    part = _split_folder(folder, spec.split)
    sides = _SIDES
    if name == "nordland-2760" and folder.name.lower() == "nordland":
        sides = ("queries", "database")
    database, queries = (read_folder(part / side, **reading) for side in sides)
    if name == "nordland-2760" and folder.name.lower() == "nordland":
        queries = queries[np.argsort(queries.east_m + queries.north_m, kind="stable")[::10]]
    if name == "msls-val":
        keys = _query_keys(folder, query_keys)
        if keys is None:
            raise ValueError(
                f"{folder}: msls-val asks only the curated 740 of its {len(queries):,} converted queries: "
                f"give their keys as query_keys or in {folder / 'query_keys.txt'}, or open msls-val-full"
            )
        queries = _select_keys(queries, keys, folder)
    return TestSet(name=name, database=database, queries=queries, rule=spec.rule, spec=spec, split=spec.split)


def open_training_set(root: str | os.PathLike, name: str, *, on_error: str = "raise") -> Places:
    """Open what a model may train on, in any of the formats.

    Parameters
    ----------
    root : path
        The folder of data sets.
    name : str
        A folder in it: Mapillary SLS as downloaded (its validation cities stay out), GSV-Cities, a folder with
        ``images/train/{database,queries}``, of which one is enough, or photographs with a CSV, named as for
        `open_set` (rows whose ``part`` begins with ``train``, all where it has no such column).
    on_error : {"raise", "skip"}
        With ``"skip"``, what cannot be read is left out, and every picture is looked into.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or no training part in it.
    ValueError
        For what the reader of the format refuses.
    """
    folder = _set_folder(Path(root), name)
    for inside, reader in (("train_val", read_msls), ("Dataframes", read_gsv_cities)):
        if (folder / inside).is_dir():
            return reader(folder, on_error=on_error, check_pictures=on_error == "skip")
    sides = [part / side for part in (folder / "images" / "train", folder / "train") for side in _SIDES]
    if sides := [side for side in sides if side.is_dir()]:
        return Places.concat([read_folder(side, on_error=on_error) for side in sides])
    if csv := _csv_of_set(folder):
        places, part = _read_photos(csv.parent, csv, None, None, on_error, True)
        training = np.char.startswith("train" if part is None else part.astype(np.str_), "train")
        if training.any():
            return places[np.broadcast_to(training, len(places))]
    raise FileNotFoundError(
        f"{folder} is no set with a training part: it has no images/train with database or queries, no train_val "
        "(Mapillary SLS), no Dataframes (GSV-Cities) and no positions.csv with photographs to train on"
    )


_SIDES = ("database", "queries")
_ALIASES = (
    ("msls", "mapillary_sls", "MSLS"),
    ("gsv-cities", "gsv_cities", "GSV-Cities", "GSV_Cities", "GSVCities"),
)


def _set_folder(root: Path, name: str) -> Path:
    """The folder of a set, also where it has another of its usual names."""
    others = [other for names in _ALIASES if name in names for other in names]
    return next((root / other for other in (name, *others) if (root / other).is_dir()), root / name)


def _csv_of_set(folder: Path) -> Path | None:
    """The CSV of a folder of photographs, or the CSV that is named in the folder's place."""
    if folder.suffix.lower() == ".csv" and folder.is_file():
        return folder.absolute()
    return _photos_csv(folder.absolute())


def _open_photos(csv: Path, split: str, reading: dict) -> list[Places]:
    """References and queries of one split, read together, so that they lie in one UTM zone."""
    places, part = _read_photos(csv.parent, csv, None, None, *reading.values())
    if part is None:
        part = np.array([f"test/{side}" for side in _SIDES], dtype=object)[np.arange(len(places)) % 2]
    rows = [np.isin(part, [f"{split}/{side}", *([side] if split == "test" else [])]) for side in _SIDES]
    for side, chosen in zip(_SIDES, rows, strict=True):
        if not chosen.any():
            raise ValueError(
                f"{csv}: no photograph is for {split}/{side}; say so in its column 'part', or take another set"
            )
    return [places[rows[0]], places[rows[1]].replace(left_out=())]


def _open_msls(folder: Path, spec: Benchmark, query_keys: Any, reading: dict) -> TestSet:
    """The validation cities as downloaded, in the order that the converted file names would have."""
    keys = _query_keys(folder, query_keys)
    subtask = "all" if spec.name == "msls-val" and keys is None else None
    database = read_msls(folder, MSLS_VAL_CITIES, part="database", **reading)
    queries = read_msls(folder, MSLS_VAL_CITIES, part="query", subtask=subtask, **reading)
    if spec.name == "msls-val" and keys is not None:
        queries = _select_keys(queries, keys, folder)

    def in_name_order(table: Places) -> Places:
        names = [
            folder_name(e, n, pano_id=key)
            for e, n, key in zip(table.east_m, table.north_m, table.key, strict=True)
        ]
        return table[np.argsort(np.array(names, dtype=np.str_), kind="stable")]

    return TestSet(
        name=spec.name,
        database=in_name_order(database),
        queries=in_name_order(queries),
        rule=spec.rule,
        spec=spec,
        split=spec.split,
    )


def _split_folder(folder: Path, split: str) -> Path | None:
    for part in (folder / "images" / split, folder / split):
        if all((part / side).is_dir() for side in _SIDES):
            return part
    return None


def _find_benchmark(root: Path, spec: Benchmark) -> tuple[Path | None, str]:
    """The folder of a benchmark, and what is missing (the empty text if nothing is)."""
    missing = f"there is no folder {' or '.join(spec.folders)}"
    for name in spec.folders:
        folder = root / name
        if not folder.is_dir():
            continue
        if spec.name.startswith("msls") and (folder / "train_val").is_dir():
            lacking = [
                c for c in MSLS_VAL_CITIES if not (folder / "train_val" / c / "query" / "images").is_dir()
            ]
            if not lacking:
                return folder, ""
            missing = f"{folder / 'train_val'} lacks the pictures of {' and '.join(lacking)}"
        elif _split_folder(folder, spec.split):
            return folder, ""
        else:
            missing = f"{folder} has no images/{spec.split} with database and queries in it"
    return None, missing


def _query_keys(folder: Path, query_keys: str | os.PathLike | Sequence[str] | None) -> list[str] | None:
    if query_keys is None and (folder / "query_keys.txt").exists():
        query_keys = folder / "query_keys.txt"
    if query_keys is None:
        return None
    if isinstance(query_keys, str | os.PathLike):
        source = Path(query_keys)
        if not source.exists():
            raise FileNotFoundError(f"{source}: there is no such list of query keys")
        query_keys = (
            np.load(source).tolist() if source.suffix == ".npy" else source.read_text("utf-8").splitlines()
        )
    keys = [Path(str(line).strip()).stem for line in query_keys]
    return [key for key in keys if key]


def _select_keys(queries: Places, keys: Sequence[str], folder: Path) -> Places:
    absent = sorted(set(keys) - set(queries.key.tolist()))
    if absent:
        raise ValueError(
            f"{folder}: {len(absent)} of {len(set(keys))} query keys have no picture, such as {absent[0]!r}"
        )
    return queries[np.isin(queries.key, list(keys))]


def available(root: str | os.PathLike) -> pandas.DataFrame:
    """Which sets are here, and where to get those that are not. Counts files; reads none.

    Returns
    -------
    pandas.DataFrame
        One row for each benchmark, then one for each other folder of the layout, with the columns ``name``,
        ``present`` (bool), ``references``, ``queries`` (files found), ``expected`` (counts of the published
        evaluations), ``positives``, ``missing`` (a sentence) and ``where_to_get``.
    """
    import pandas

    root = Path(root)
    rows, taken = [], set()
    for spec in BENCHMARKS.values():
        folder, missing = _find_benchmark(root, spec)
        row = {"name": spec.name, "present": folder is not None, "references": 0, "queries": 0}
        if folder is not None:
            taken.add(folder.name)
            part = _split_folder(folder, spec.split)
            if part is not None and not (folder / "train_val").is_dir():
                row |= {"references": _count(part / "database"), "queries": _count(part / "queries")}
                if spec.name == "nordland-2760" and folder.name.lower() == "nordland":
                    row |= {"references": row["queries"], "queries": -(-row["references"] // 10)}
                if spec.name == "msls-val":
                    keys = _query_keys(folder, None)
                    row["queries"] = len(keys or ())
                    if keys is None:
                        missing = f"the list of the 740 query keys ({folder.name}/query_keys.txt)"
            else:
                cities = [folder / "train_val" / city for city in MSLS_VAL_CITIES]
                row["references"] = sum(_count(city / "database") for city in cities)
                row["queries"] = sum(_count(city / "query") for city in cities)
                if spec.name == "msls-val":
                    row["queries"] = None  # the sub-task "all" tells when it is opened
        expected = [f"{n:,}" if n else "not stated" for n in (spec.n_database, spec.n_queries)]
        rows.append(row | {"expected": " / ".join(expected), "positives": str(spec.rule), "missing": missing})
        rows[-1]["where_to_get"] = spec.where_to_get
    for folder in sorted(root.glob("[!.]*")):
        part = _split_folder(folder, "test")
        if folder.name not in taken and (part is not None or (folder / "positions.csv").is_file()):
            counts = dict.fromkeys(("references", "queries"))  # a CSV tells when it is opened
            if part is not None:
                counts = {"references": _count(part / "database"), "queries": _count(part / "queries")}
            own = {
                "expected": "",
                "positives": str(PositiveRule()),
                "missing": "",
                "where_to_get": "a folder of your own",
            }
            rows.append({"name": folder.name, "present": True} | counts | own)
    return pandas.DataFrame(rows)


def _count(folder: Path) -> int:
    return len(_list_pictures(folder, _Problems("skip"))) if folder.is_dir() else 0
