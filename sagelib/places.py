"""Places: where every photograph was taken, read from each format of the field, and who is whose positive.

A reader turns one format into `Places`. With ``on_error="raise"`` mistakes in the data are a ValueError with
the first five (file, line, column); with ``"skip"`` such photographs are left out, see `Places.left_out`.
``check_pictures`` looks whether files are whole pictures (about 0.1 ms each). Dotted names are ignored.
Positions are UTM metres, never compared between two grids: the zone's number and hemisphere. The letter of
``"10S"`` is the latitude band (C to M south, N to X north).
"""

from __future__ import annotations

import csv
import dataclasses
import filecmp
import io
import itertools
import os
import re
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sagelib.runs import check, fingerprint, read_text

# Positions have centimetres, which binary numbers round: that must not decide about exactly 25 m.
ROUNDING_M = 1e-6

_COLUMNS = {"path": object, "place": np.int64, "frame": np.int64, "date": "datetime64[D]"}
_COLUMNS |= dict.fromkeys(("east_m", "north_m", "heading_deg"), np.float64)
_COLUMNS |= dict.fromkeys(("utm_zone", "city", "note", "key", "sequence"), np.str_)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Places:
    """A frozen table of N photographs: parallel read-only arrays, made by the readers or `build`.

    `path`; `east_m`, `north_m` in UTM metres and `heading_deg` clockwise from north, NaN where unknown;
    `utm_zone` such as ``"10S"``, empty for mock coordinates; `city`; `place`, the label of the format
    (GSV-Cities ``place_id``, Mapillary SLS ``unique_cluster``), unique only within a city, or -1; `date`, NaT
    where unknown, of a month or year the first day; `note`, often the condition; `key`, the name in its
    source; `sequence` and `frame`, its drive and number there, else ``""`` and -1; `left_out`, sentences.
    """

    path: np.ndarray
    east_m: np.ndarray = np.nan
    north_m: np.ndarray = np.nan
    utm_zone: np.ndarray = ""
    heading_deg: np.ndarray = np.nan
    city: np.ndarray = ""
    place: np.ndarray = -1
    date: np.ndarray = "NaT"
    note: np.ndarray = ""
    key: np.ndarray = ""
    sequence: np.ndarray = ""
    frame: np.ndarray = -1
    left_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "left_out", tuple(self.left_out))
        for name, dtype in _COLUMNS.items():
            array = np.array(getattr(self, name), dtype=dtype)
            array = np.full(len(self.path), array) if array.ndim == 0 else array
            if array.shape != (len(self.path),):
                raise ValueError(f"{name} must have shape ({len(self.path)},) as path has, got {array.shape}")
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    @classmethod
    def build(cls, path: str | os.PathLike | Iterable, **columns: Any) -> Places:
        """A table of N paths and any of the other columns: arrays of length N, or one value for all."""
        return cls([os.fspath(p) for p in _names(path)], **columns)

    @classmethod
    def concat(cls, tables: Iterable[Places]) -> Places:
        """The tables one below the other."""
        tables = [cls([]), *tables]
        columns = {name: np.concatenate([getattr(table, name) for table in tables]) for name in _COLUMNS}
        return cls(**columns, left_out=[sentence for table in tables for sentence in table.left_out])

    def __len__(self) -> int:
        return len(self.path)

    def __repr__(self) -> str:
        return f"Places({len(self):,} photographs, {len(self.left_out)} left out)"

    def __getitem__(self, index: Any) -> Places:
        """The rows at an integer, a slice, an array of integers or a boolean mask, as a table."""
        return self.replace(**{name: np.atleast_1d(getattr(self, name)[index]) for name in _COLUMNS})

    def replace(self, **columns: Any) -> Places:
        """The same table with other values in the named columns."""
        return dataclasses.replace(self, **columns)

    def labels(self) -> np.ndarray:
        """One integer per place, (N,) int64 from 0, that two cities never share; -1 where there is none."""
        labels, known = np.full(len(self), -1, dtype=np.int64), self.place >= 0
        city, place = (np.unique(c[known], return_inverse=True)[1] for c in (self.city, self.place))
        labels[known] = np.unique(city * len(self) + place, return_inverse=True)[1]
        return labels

    def with_clusters(self, radius_m: float) -> Places:
        """Group by geography: `place` becomes a label that is unique in the table, -1 without a position.

        In each city and grid, by easting and northing, the first photograph without a group leads one, which
        all others without a group within `radius_m` join.
        """
        from scipy.spatial import cKDTree

        check("radius_m", radius_m, above=0)
        rows = np.flatnonzero(np.isfinite(self.east_m + self.north_m))
        group = np.char.add(np.char.add(self.city, "\n"), same_grid(self.utm_zone))[rows]
        apart = 1e9 * np.unique(group, return_inverse=True)[1]  # of two groups, nothing is near
        xyz = np.column_stack([self.east_m[rows], self.north_m[rows], apart])
        tree, place, label = cKDTree(xyz), np.full(len(self), -1, dtype=np.int64), 0
        for i in np.lexsort(xyz.T[[1, 0, 2]]):
            if place[rows[i]] < 0:
                near = rows[tree.query_ball_point(xyz[i], radius_m + ROUNDING_M)]
                place[near[place[near] < 0]] = label
                label += 1
        return self.replace(place=place)

    def fingerprint(self) -> str:
        """A hash of the table, not of the pixels; the same wherever the common folder's parent lies."""
        paths = [Path(p).as_posix().split("/") for p in self.path]
        shared = min([len(os.path.commonprefix(paths)), *(len(parts) - 1 for parts in paths)])
        columns = {name: getattr(self, name).astype("int64") for name in ("place", "date", "frame")}
        numbers = ("east_m", "north_m", "heading_deg")
        columns |= {name: np.nan_to_num(getattr(self, name), nan=1e99) for name in numbers}
        columns |= {n: "\n".join(getattr(self, n)) for n in ("utm_zone", "city", "note", "key", "sequence")}
        columns["path"] = "\n".join("/".join(parts[max(0, shared - 2) :]) for parts in paths)
        return fingerprint(columns)


def _names(names: str | os.PathLike | Iterable) -> list:
    """The names as a list; a bare name is one name, not a list of its letters."""
    return [names] if isinstance(names, str | os.PathLike) else list(names)


# -- UTM and headings -----------------------------------------------------------------------------------
_BANDS = "CDEFGHJKLMNPQRSTUVWX"  # 8 degrees each from 80 S; X has 12
_ZONE = re.compile(rf"0?([1-9]|[1-5]\d|60)[\s@]*([{_BANDS}]?)@?")


def latlon_to_utm(lat_deg, lon_deg, *, zone: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latitude (-80..84) and longitude (-180..180), WGS 84, as (east_m, north_m, utm_zone), all (N,).

    Each in its own zone (also in Norway, 32V, and Svalbard, 31X to 37X), or all in the given one.
    """
    from pyproj import Transformer

    lat, lon = np.asarray(lat_deg, np.float64), np.asarray(lon_deg, np.float64)
    numbers = _zone_numbers(lat, lon) if zone is None else np.full(len(lat), zone)
    east, north, south = np.empty(len(lat)), np.empty(len(lat)), lat < 0
    for number, is_south in sorted(set(zip(numbers.tolist(), south.tolist(), strict=True))):
        rows = (numbers == number) & (south == is_south)
        grid = Transformer.from_crs(4326, (32700 if is_south else 32600) + number, always_xy=True)
        east[rows], north[rows] = grid.transform(lon[rows], lat[rows])
    bands = np.array(list(_BANDS))[np.clip((lat + 80) // 8, 0, len(_BANDS) - 1).astype(int)]
    return east, north, np.char.add(numbers.astype(np.str_), bands)


def _zone_numbers(lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
    number = ((lon + 180) // 6).astype(int) % 60 + 1
    number[(lat >= 56) & (lat < 64) & (lon >= 3) & (lon < 12)] = 32
    for low, high, zone in ((0, 9, 31), (9, 21, 33), (21, 33, 35), (33, 42, 37)):
        number[(lat >= 72) & (lon >= low) & (lon < high)] = zone
    return number


def _zones_of_metres(lat: np.ndarray, lon: np.ndarray, east: np.ndarray, north: np.ndarray) -> np.ndarray:
    """The zone names in which (lat, lon) come closest to the given metres."""
    numbers = np.unique(_zone_numbers(lat, lon)).tolist()
    projected = [latlon_to_utm(lat, lon, zone=number) for number in numbers]
    off_m = np.array([np.hypot(e - east, n - north) for e, n, _ in projected])
    return np.array([zone for _, _, zone in projected])[off_m.argmin(axis=0), np.arange(len(lat))]


def same_grid(utm_zone: np.ndarray) -> np.ndarray:
    """The grid of each zone name, such as ``"10 north"``: metres may be compared where it is equal."""
    zones, inverse = np.unique(np.asarray(utm_zone, dtype=np.str_), return_inverse=True)
    grids = []
    for zone in zones.tolist():
        number, band = zone.rstrip(_BANDS + _BANDS.lower()), zone.lstrip("0123456789").upper()
        grids.append(f"{number} {'north' if band >= 'N' else 'south'}" if band else number)
    return np.array(grids, dtype=np.str_)[inverse]


def pairwise_m(a: Places, b: Places) -> np.ndarray:
    """Distances in metres, (len(a), len(b)) float64; a ValueError where they lie in more than one grid."""
    grids = sorted({*same_grid(a.utm_zone).tolist(), *same_grid(b.utm_zone).tolist()})
    if len(grids) > 1:
        named = ", ".join(grid or "unknown" for grid in grids)
        raise ValueError(f"metres of different UTM zones cannot be compared ({named}): take one at a time")
    return np.hypot(a.east_m[:, None] - b.east_m[None], a.north_m[:, None] - b.north_m[None])


def heading_difference(first_deg: np.ndarray, second_deg: np.ndarray) -> np.ndarray:
    """Degrees between headings, 0 to 180, the shorter way round; NaN where one is unknown."""
    turn = np.abs(np.asarray(first_deg, np.float64) - np.asarray(second_deg, np.float64)) % 360.0
    return np.minimum(turn, 360.0 - turn)


# -- Positives ------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class PositiveRule:
    """References within `radius_m` of a query, or `frames` of it in an equally spaced drive, answer it."""

    radius_m: float | None = 25.0
    frames: int | None = None

    def __post_init__(self) -> None:
        check("radius_m", self.radius_m, 0, none=True)
        check("frames", self.frames, 0, whole=True, none=True)
        if (self.radius_m is None) == (self.frames is None):
            raise ValueError("a rule has either radius_m or frames (set the other to None)")

    def __str__(self) -> str:
        return f"{self.radius_m:g} m" if self.frames is None else f"+-{self.frames} frames"


def positives(database: Places, queries: Places, rule: PositiveRule | None = None) -> list[np.ndarray]:
    """The rows of `database` that answer each query, ascending int64; by default those within 25 m.

    The radius is inclusive. A ValueError if a position is unknown, if queries lie in a grid without
    references, or if frames count and references are not equally spaced.
    """
    from scipy.spatial import cKDTree

    rule = rule or PositiveRule()
    for kind, table in (("reference", database), ("query", queries)):
        if n := len(lost := table.path[~np.isfinite(table.east_m + table.north_m)]):
            raise ValueError(f"{lost[0]}: this {kind} has no position ({n} of {len(table)} have none)")
    reach = (rule.frames + 0.25) * _spacing_m(database) if rule.frames is not None else rule.radius_m
    grids = [same_grid(table.utm_zone) for table in (database, queries)]
    apart = 1e9 * np.unique(np.concatenate(grids), return_inverse=True)[1]  # of two grids, nothing is near
    if len(lost := np.setdiff1d(grids[1], grids[0])):
        names = [str(grid) or "unknown" for grid in (lost[0], *np.unique(grids[0]))]
        count, known = (grids[1] == lost[0]).sum(), ", ".join(map(repr, names[1:])) or "none"
        found = f"{count} queries lie in UTM zone {names[0]!r}, which holds no reference"
        raise ValueError(f"{found} (those of the references: {known}): metres are never taken across zones")
    there = np.column_stack([database.east_m, database.north_m, apart[: len(database)]])
    here = np.column_stack([queries.east_m, queries.north_m, apart[len(database) :]])
    near = cKDTree(there).query_ball_point(here, reach + ROUNDING_M, return_sorted=True)
    return [np.array(rows, dtype=np.int64) for rows in near]


def _spacing_m(places: Places) -> float:
    """How far apart the frames of an equally spaced straight drive are; a ValueError for any other."""
    along_m = np.hypot(places.east_m - places.east_m.min(), places.north_m - places.north_m.min())
    spacing_m = along_m.max() / max(1, len(places) - 1) or 1.0
    if not np.array_equal(np.sort(np.rint(along_m / spacing_m)), np.arange(len(places))):
        raise ValueError("the rule counts frames, but the references are no equally spaced straight line")
    return spacing_m


def positive_rows(given, n_queries: int, n_references: int | None = None, found: int = 1) -> tuple[list, int]:
    """The rows of references (ascending int64) for each of Q queries, and the number of references, R.

    `given` is a mask (Q, R) of booleans or of 0 and 1, or row numbers for each query; anything else is a
    ValueError. Without `n_references`, R is the mask's width, or as many as were `found`.
    """
    shape = np.shape(given) if isinstance(given, np.ndarray) else (len(given),)
    if shape[0] != n_queries:
        turned = f": transpose the matrix {shape}" if shape == (n_references, n_queries) else ""
        raise ValueError(f"positives are given for {shape[0]} queries, but there are {n_queries}{turned}")
    lists = [np.asarray(rows).ravel() for rows in given]
    named = np.concatenate([rows for rows in lists if len(rows)] or [np.empty(0, np.int64)])
    kind, widths = named.dtype.kind, {len(rows) for rows in lists}
    # More than two 0 and 1 are no rows: they would name one twice.
    if kind == "b" or (np.isin(named, (0, 1)).all() and (kind == "f" or max(widths) > 2)):
        n_references = n_references or max(widths)
        if widths != {n_references}:
            raise ValueError(f"a mask of positives must have {n_references} columns, got {sorted(widths)}")
        return [np.flatnonzero(rows) for rows in lists], n_references
    if kind not in "iu":
        raise ValueError(f"positives must be row numbers of references, or a mask of them, got {named.dtype}")
    n = n_references or found
    for query, rows in enumerate(lists):
        for row in rows[(rows < 0) | (rows >= n)]:
            more = "" if n_references or row < 0 else f"; were there more than {n}, give n_references"
            raise ValueError(f"query {query} has the positive {row}, which is no row of {n} references{more}")
    return [np.unique(rows).astype(np.int64) for rows in lists], n


# -- Reading: rows, and what is wrong with them ---------------------------------------------------------
_PICTURE = re.compile(r"\.(jpe?g|jpe|jfif|png|webp|bmp|gif|tiff?|p[pgbn]m|jp2|avif)\Z", re.IGNORECASE)


class _Reading:
    """What one call of a reader finds: tables of photographs, problems, and files that it passes over."""

    def __init__(self, on_error: str, check_pictures: bool = True) -> None:
        self.skip = check("on_error", on_error, choices=("raise", "skip")) == "skip"
        self.check_pictures = check_pictures
        self.tables, self.problems, self.passed_over, self.n_rows = [], [], [], 0

    def pass_over(self, folder: Path, names: Iterable[str], why: str) -> None:
        """Count and name files that are no mistake, but not read either."""
        if names := sorted(name for name in names if not name.startswith(".")):
            first = os.fsencode(names[0]).decode("utf-8", "backslashreplace")
            self.passed_over.append(f"{folder}: {why}, left out: {len(names)}, such as {first}")

    def list_pictures(self, folder: Path) -> list[str]:
        """All pictures below a folder, sorted by path; links are followed, each folder is read once."""
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: there is no such folder")
        pictures, others, visited = [], [], set()
        walk = os.walk(folder, onerror=lambda error: self.problems.append(str(error)), followlinks=True)
        for directory, subfolders, names in walk:
            if (real := os.path.realpath(directory)) in visited:
                subfolders.clear()
                continue
            visited.add(real)
            links = {name for name in subfolders if os.path.islink(os.path.join(directory, name))}
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            subfolders.sort(key=links.__contains__)  # last, so that a picture has its own path where it can
            for name in (name for name in names if not name.startswith(".")):
                path = os.path.join(directory, name)
                shown = os.fsencode(path).decode("utf-8", "backslashreplace")
                if not _PICTURE.search(name):
                    others.append(os.path.relpath(path, folder))
                elif shown != path:
                    self.problems.append(f"{shown}: this name is not UTF-8 text; rename it")
                else:
                    pictures.append(path)
        self.pass_over(folder, others, "files without the ending of a picture")
        return sorted(pictures, key=lambda path: path.replace(os.sep, "/"))

    def add(self, path: Sequence[str], table: _Csv | None = None, **columns: Any) -> None:
        """The good rows of a table (by default all) become `Places`: pictures checked, degrees as metres."""
        if table and not len(path) and not self.problems:
            self.problems.append(f"{table.path}: the table has no rows")
        self.n_rows += len(path)
        rows = np.flatnonzero(table.good) if table else np.arange(len(path))
        if self.check_pictures:
            with ThreadPoolExecutor(8) as pool:
                wrong = list(pool.map(_undecodable, [path[row] for row in rows]))
            names = [f"{table.where(row)}: {path[row]}" if table else path[row] for row in rows]
            self.problems += [f"{name}: {why}" for name, why in zip(names, wrong, strict=True) if why]
            rows = rows[[why is None for why in wrong]]
        if not len(rows):
            return
        columns = {name: np.asarray(v)[rows] if np.ndim(v) else v for name, v in columns.items()}
        if "lat" in columns:
            lat, lon = columns.pop("lat"), columns.pop("lon")
            if "east_m" in columns:
                columns["utm_zone"] = _zones_of_metres(lat, lon, columns["east_m"], columns["north_m"])
            else:  # one town, one grid: the zone of its middle, unless it spreads over more than a zone
                middle = _zone_numbers(*np.median([lat, lon], axis=1, keepdims=True))[0]
                metres = latlon_to_utm(lat, lon, zone=middle if np.ptp(lon) <= 6 else None)
                columns["east_m"], columns["north_m"], columns["utm_zone"] = metres
        self.tables.append(Places.build([path[row] for row in rows], **columns))

    def places(self, source: Path) -> Places:
        """All tables as one; a ValueError if there are problems that are not to be skipped, or no rows."""
        if self.problems and not self.skip:
            first = "\n".join(self.problems[:5])
            raise ValueError(f'{first} ({len(self.problems)} in all; on_error="skip" leaves them out)')
        places = Places.concat(self.tables)
        if not len(places) and (self.problems or not self.n_rows):
            raise ValueError("; ".join([f"{source}: no pictures", *self.problems[:1], *self.passed_over[:1]]))
        return places.replace(left_out=self.problems + self.passed_over)


def _undecodable(path: str) -> str | None:
    """Why a picture will not decode, or None: by header and end, and decoded wholly where these look odd."""
    from PIL import Image

    ends = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
    try:
        with Image.open(path) as picture, open(path, "rb") as stream:
            stream.seek(max(0, os.path.getsize(path) - 256))
            if ends.get(picture.format, b"\0never\0") not in stream.read():
                picture.load()
    except Exception as error:  # Pillow's plugins raise many kinds on broken bytes
        return f"this picture does not decode ({str(error).split(' <_io')[0]}); replace or remove the file"
    return None


class _Csv:
    """A CSV as text without blank lines: `columns` of one choice (``|``), a table `beside`, by ``key``."""

    _ALIASES = dict(latitude="lat", longitude="lon", lng="lon", utm_zone="zone", heading_deg="heading")
    _ALIASES |= dict(east_m="east", easting="east", north_m="north", northing="north")
    _ALIASES |= dict.fromkeys(("path", "image", "name"), "file")

    def __init__(self, path: Path, problems: list, columns: str, beside: _Csv | None = None) -> None:
        self.path, self.problems = path, problems
        try:
            lines = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
            rows = [(lines.line_num, [cell.strip() for cell in row]) for row in lines]
        except csv.Error as error:
            raise ValueError(f"{path}, line {lines.line_num}: no values between commas ({error})") from None
        if not (rows := [(line, row) for line, row in rows if any(row)]):
            raise ValueError(f"{path}, line 1: the file is empty; it needs the columns {columns}")
        (line, header), *rows = rows
        names = [name.lower() for name in header]
        if twice := [name for name in header if name and names.count(name.lower()) > 1]:
            raise ValueError(f"{path}, line {line}: the columns {twice} have one name; keep one of them")
        for other, name in self._ALIASES.items():
            if other in names and other not in columns.split() and name not in names:
                names[names.index(other)] = name
        lacking = [[name for name in choice.split() if name not in names] for choice in columns.split("|")]
        if all(lacking):
            name = min(lacking, key=len)[0]
            words = f"{', '.join(filter(None, header))} (needed, with commas between: {columns})"
            raise ValueError(f"{path}, line {line}: there is no column {name!r}; its columns are {words}")
        advice = f"under {len(names)} columns; write decimals with a point, and text with a comma in quotes"
        long = [(line, len(row)) for line, row in rows if len(row) > len(names)]
        problems += [f"{path}, line {line}: {n} values {advice}" for line, n in long]
        rows = [(line, row) for line, row in rows if len(row) <= len(names)]
        self.lines, self.good = [line for line, _ in rows], np.ones(len(rows), dtype=bool)
        columns = itertools.zip_longest(names, *(row for _, row in rows), fillvalue="")
        self.cells = {name: np.array(cells, dtype=object) for name, *cells in columns}
        if beside is not None:
            if len(self.lines) != len(beside.lines):
                raise ValueError(f"{path}: {len(rows)} rows, but {beside.path.name} has {len(beside.lines)}")
            self.good = beside.good
            self.refuse("key", self.cells["key"] != beside.cells["key"], f"the order of {beside.path.name}")

    def where(self, row: int) -> str:
        return f"{self.path}, line {self.lines[row]}"

    def refuse(self, column: str, wrong, expected: str, values: Sequence[str] | None = None) -> None:
        """Good rows with a wrong value (by default the column's cell) become problems."""
        values, wrong = self.text(column) if values is None else values, np.asarray(wrong, dtype=bool)
        what = f"column {column!r}: expected {expected}, got"
        rows = np.flatnonzero(self.good & wrong)
        self.problems += [f"{self.where(row)}, {what} {values[row]!r}" for row in rows]
        self.good &= ~wrong

    def refuse_repeated(self, column: str, values: Sequence[str]) -> None:
        first = {value: row for row, value in reversed(list(enumerate(values)))}
        repeated = [first[value] != row for row, value in enumerate(values)]
        self.refuse(column, repeated, "a picture that no line above has", values)

    def text(self, column: str, default: str = "") -> np.ndarray:
        """A column as (n,) object array of str; `default` where a cell is empty, or the column missing."""
        cells = self.cells.get(column, np.full(len(self.lines), "", dtype=object))
        return np.where(cells == "", default, cells)

    def numbers(self, column: str, low=-1e9, high=1e9, empty=None, whole: bool = False) -> np.ndarray:
        """A column as (n,) float64 in low..high; `empty` is the number of an empty cell or missing column."""
        import pandas

        cells = self.text(column)
        value = pandas.to_numeric(pandas.Series(cells, dtype=object), errors="coerce").to_numpy(np.float64)
        blank = np.array([empty is not None and cell.lower() in ("", "nan") for cell in cells], dtype=bool)
        wrong = ~((value >= low) & (value <= high) | blank) | (whole & (np.floor(value) < value))
        kind = f"a {'whole ' if whole else ''}number in {low:g}..{high:g} (decimals with a point)"
        self.refuse(column, wrong, kind)
        return np.where(blank, np.nan if empty is None else empty, value)

    def flags(self, column: str) -> np.ndarray:
        """A column of true and false, also written 1 and 0, as (n,) bool; an empty cell is false."""
        meaning = ("true", "1", "1.0", "false", "0", "0.0", "")
        cells = [cell.lower() for cell in self.cells[column]]
        self.refuse(column, [cell not in meaning for cell in cells], "true or false, 1 or 0")
        return np.array([cell in meaning[:3] for cell in cells], dtype=bool)


def _dates(texts: Iterable[str]) -> np.ndarray:
    """The day in YYYY[MM[DD...]], with or without - / : between; NaT for anything else."""
    days = []
    for text in texts:
        match = re.match(r"(\d{4})(?:[-/:.]?(\d{2})(?:[-/:.]?(\d{2}))?)?", text)
        try:
            days.append(np.datetime64("-".join(match.groups("01")), "D"))
        except (AttributeError, ValueError):
            days.append(np.datetime64("NaT", "D"))
    return np.array(days, dtype="datetime64[D]")


def _sizes(folder: Path) -> dict[str, int]:
    """The size in bytes of every file in a folder, by name; none where there is no such folder."""
    return {e.name: e.stat().st_size for e in (os.scandir(folder) if folder.is_dir() else ()) if e.is_file()}


# -- The readers of each format -------------------------------------------------------------------------
_SIDES, _FOLDERS = ("database", "queries"), ("database/", "queries*/")  # queries may have several folders
_FIELDS = {  # name -> format of a number
    **{"east_m": "010.2f", "north_m": "010.2f", "zone_number": "02d", "zone_letter": "", "lat": "09.5f"},
    **{"lon": "010.5f", "pano_id": "", "tile": "02d", "heading_deg": "06.2f", "pitch": ".2f", "roll": ".2f"},
    **{"height": ".2f", "timestamp": "", "note": ""},
}


def folder_name(east_m, north_m, zone_number: int | None = None, zone_letter: str = "", **fields) -> str:
    """The file name of the field, with everything that is known of a picture between ``@``.

    ``@UTM_east@UTM_north@zone@letter@lat@lon@pano_id@tile@heading_deg@pitch@roll@height@timestamp@note@.jpg``
    Numbers have a fixed width, so that names sort by easting. A ValueError for one that is not finite, and
    for a text with ``@`` or a slash.

    Examples
    --------
    >>> folder_name(547400.64, 4173402.98, 10, "S", note="day")
    '@0547400.64@4173402.98@10@S@@@@@@@@@@day@.jpg'
    """
    fields |= {"east_m": east_m, "north_m": north_m, "zone_number": zone_number, "zone_letter": zone_letter}
    texts = dict.fromkeys(_FIELDS, "")
    for name, value in fields.items():
        if value is not None and _FIELDS[name] and not np.isfinite(value):
            raise ValueError(f"{name} in a file name must be finite, got {value}")
        texts[name] = "" if value is None else format(value, _FIELDS[name])
        if any(mark in texts[name] for mark in "@/\\\0"):
            raise ValueError(f"{name} in a file name may hold neither @ nor a slash, got {value!r}")
    return "@" + "@".join(texts.values()) + "@.jpg"


def parse_name(name: str | os.PathLike) -> dict[str, Any]:
    """The fields of such a file name: ``east_m``, ``north_m``, ``heading_deg`` as float, ``utm_zone``, texts.

    Only the coordinates must be there, or it is a ValueError. A third field that is no UTM zone is a note,
    and in a short name all that follows belongs to it: ``@east@north@photo_001@.jpg``.
    """
    names, parts = list(_FIELDS), os.path.splitext(os.path.basename(name))[0].split("@")[1:]
    fields: dict[str, Any] = dict(zip(names, parts + [""] * len(names), strict=False)) | {"utm_zone": ""}
    try:
        fields["east_m"], fields["north_m"] = float(fields["east_m"]), float(fields["north_m"])
        if not np.isfinite([fields["east_m"], fields["north_m"]]).all():
            raise ValueError
    except ValueError:
        raise ValueError("the name must begin with two numbers, as in @UTM_east@UTM_north@.jpg") from None
    zone, letter = fields["zone_number"].strip(), fields["zone_letter"].strip()
    if match := _ZONE.fullmatch(f"{zone}@{letter}".upper()):
        fields["utm_zone"] = match[1] + match[2]
    elif zone.isdecimal() and len(letter) == 1:
        raise ValueError(f"the UTM zone must be 1..60 with a band C to X, no I or O: {zone!r}, {letter!r}")
    elif zone:
        whole = len(parts) >= len(names)
        note = " ".join(filter(None, [zone, fields["note"]] if whole else parts[2:]))
        fields |= dict.fromkeys(names[2:4] if whole else names[2:], "") | {"note": note}
    try:
        fields["heading_deg"] = float(fields["heading_deg"] or "nan")
    except ValueError:
        raise ValueError(f"the heading (field 9) must be a number, got {fields['heading_deg']!r}") from None
    return fields


def _city_in(fields: dict) -> str | None:
    """The city in a rendered town's key (``town1000d00012``) or converted MSLS; no other note names one."""
    if town := re.fullmatch(r"(town\d+)[dq]\d+", fields["pano_id"]):
        return town[1]
    converted = re.fullmatch(r"(?:day|night)_[a-z]+_([a-z]+)", fields["note"])
    return converted[1] if converted and converted[1] in (*MSLS_TRAIN_CITIES, *MSLS_VAL_CITIES) else None


def read_folder(part_folder, *, positions=True, on_error="raise", check_pictures=True) -> Places:
    """Read one part of a set, such as ``<set>/images/test/database``, from its file names.

    All pictures below the folder, also in linked folders, by path. The city is the name of the set's folder,
    unless files name theirs (rendered towns, converted Mapillary SLS). Refused are names not in UTF-8 or
    without two ``@`` numbers (unless `positions` is False and they begin without ``@``), a file that is there
    twice (same name and content), and pictures that do not decode.
    """
    folder, reading = Path(part_folder), _Reading(on_error, check_pictures)
    parts = folder.absolute().parts
    parts = parts[:-2] if parts[-1].startswith(_SIDES) else parts  # without <split>/<side>
    set_name = parts[-2] if parts[-1] == "images" else parts[-1]
    rows, first, nowhere = {}, {}, {"east_m": np.nan, "north_m": np.nan}
    for path in reading.list_pictures(folder):
        twin = first.setdefault(os.path.basename(path), path)
        try:
            if twin != path and filecmp.cmp(path, twin, shallow=False):
                raise ValueError(f"the same picture as {twin}; keep one of the two")
            placed = positions or os.path.basename(path).startswith("@")
            rows[path] = parse_name(path) if placed else parse_name("@0@0@") | nowhere
        except ValueError as error:
            reading.problems.append(f"{path}: {error}")
    fields = rows.values()
    columns = {n: [row[n] for row in fields] for n in "east_m north_m utm_zone heading_deg note".split()}
    columns |= {"key": [row["pano_id"] for row in fields], "date": _dates(row["timestamp"] for row in fields)}
    reading.add(list(rows), city=[_city_in(row) or set_name for row in fields], **columns)
    return reading.places(folder)


def read_gsv_cities(root, cities=None, *, on_error: str = "raise", check_pictures: bool = False) -> Places:
    """Read GSV-Cities, ``Dataframes/<City>.csv`` and ``Images/<City>/``: all `cities`, or those named.

    Each city lies in the UTM zone of its middle. That the half million pictures are there is always checked.
    """
    root, reading = Path(root), _Reading(on_error, check_pictures)
    there = sorted(path.stem for path in (root / "Dataframes").glob("[!.]*.csv"))
    if not (cities := there if cities is None else _names(cities)):
        raise FileNotFoundError(f"{root}: there is no Dataframes/<City>.csv in it")
    for city in cities:
        _read_gsv_city(root, city, reading)
    return reading.places(root)


def _read_gsv_city(root: Path, city: str, reading: _Reading) -> None:
    columns = "place_id year month northdeg city_id lat lon panoid"
    table = _Csv(root / "Dataframes" / f"{city}.csv", reading.problems, columns)
    limits = {"place_id": (0, 2**53), "year": (1, 9999), "month": (1, 12), "northdeg": (-360, 360)}
    place, year, month, heading = (table.numbers(name, *limits[name], whole=True) for name in limits)
    lat, lon = table.numbers("lat", -80, 84), table.numbers("lon", -180, 180)
    folder, city_id, keys = root / "Images" / city, table.text("city_id", city), table.text("panoid")
    size, names = _sizes(folder), [""] * len(keys)
    for row in np.flatnonzero(table.good):
        whole = (int(column[row]) for column in (place, year, month, heading))
        head = "{}_{:07d}_{:04d}_{:02d}_{:03d}".format(city_id[row], *whole)
        # Names were made from numbers, the CSV holds their text: 48.10 in one may be 48.1 in the other.
        as_text = f"{head}_{table.cells['lat'][row]}_{table.cells['lon'][row]}_{keys[row]}.jpg"
        as_number = f"{head}_{lat[row]}_{lon[row]}_{keys[row]}.jpg"
        names[row] = as_number if as_number in size and as_text not in size else as_text
    table.refuse("panoid", [not size.get(name) for name in names], f"a picture in {folder}", names)
    good_names = {name for name, good in zip(names, table.good, strict=True) if good}
    reading.pass_over(folder, size.keys() - good_names, f"pictures without a good row in {table.path.name}")
    table.refuse_repeated("panoid", names)
    columns = {"city": city, "place": place, "key": keys, "heading_deg": heading % 360}
    date = _dates(f"{y:04.0f}-{m:02.0f}" for y, m in zip(year, month, strict=True))
    paths = [os.path.join(folder, name) for name in names]
    reading.add(paths, table, date=date, lat=lat, lon=lon, **columns)


MSLS_TRAIN_CITIES = (
    "trondheim london boston melbourne amsterdam helsinki tokyo toronto saopaulo moscow zurich paris bangkok "
    "budapest austin berlin ottawa phoenix goa amman nairobi manila"
).split()
MSLS_VAL_CITIES = ("cph", "sf")


def read_msls(root, cities=None, *, part=None, chosen=False, on_error="raise", check_pictures=False):
    """Read Mapillary Street-level Sequences as downloaded: ``train_val/<city>/{query,database}``.

    By default the training cities found: ``cph`` and ``sf``, on which models are compared, are read only when
    named. `part` may be ``"query"`` or ``"database"``; `chosen` takes the benchmark's sub-task ``all`` alone.
    Panoramas are dropped, empty files counted; the UTM zone is that in which degrees give the set's metres.
    `Places.place` is ``unique_cluster``, `Places.note` view direction and light (``"forward-night"``).
    """
    root, reading = Path(root), _Reading(on_error, check_pictures)
    if cities is None:
        there = {path.name for path in (root / "train_val").glob("[!.]*") if path.is_dir()}
        if not (cities := sorted(there.difference(MSLS_VAL_CITIES))):
            named = " and ".join(sorted(there)) or "none"
            raise FileNotFoundError(f"{root / 'train_val'}: no training city: {named} are validation cities")
    for city in _names(cities):
        for side in (part,) if part else ("query", "database"):
            _read_msls_part(root / "train_val" / city / side, city, chosen, reading)
    return reading.places(root)


def _read_msls_part(folder: Path, city: str, chosen: bool, reading: _Reading) -> None:
    columns = "key easting northing night view_direction unique_cluster"
    table = _Csv(folder / "postprocessed.csv", reading.problems, columns)
    raw = _Csv(folder / "raw.csv", reading.problems, "key lon lat ca captured_at pano", beside=table)
    table.good &= ~raw.flags("pano")
    if chosen:
        tasks = _Csv(folder / "subtask_index.csv", reading.problems, "key all", beside=table)
        table.good &= tasks.flags("all")
    view, light = table.text("view_direction"), np.where(table.flags("night"), "night", "day")
    columns = {"east_m": table.numbers("easting"), "north_m": table.numbers("northing")}
    columns |= {"lat": raw.numbers("lat", -80, 84), "lon": raw.numbers("lon", -180, 180)}
    columns["place"] = table.numbers("unique_cluster", empty=-1, whole=True)
    columns["date"] = _dates(raw.text("captured_at"))
    columns["heading_deg"] = raw.numbers("ca", empty=np.nan) % 360
    columns["note"] = [f"{v.lower()}-{n}" if v else str(n) for v, n in zip(view, light, strict=True)]
    if (folder / "seq_info.csv").exists():
        drive = _Csv(folder / "seq_info.csv", reading.problems, "key sequence_key frame_number", beside=table)
        columns["sequence"] = drive.text("sequence_key")
        columns["frame"] = drive.numbers("frame_number", empty=-1, whole=True)
    keys, images = table.text("key"), folder / "images"
    size, names = _sizes(images), [f"{key}.jpg" for key in keys]
    paths = [os.path.join(images, name) for name in names]
    table.refuse_repeated("key", names)
    table.refuse("key", [name not in size for name in names], f"a picture in {images}", names)
    table.good &= np.array([size.get(name, 0) > 0 for name in names], dtype=bool)
    reading.pass_over(images, (name for name in size if not size[name]), "empty files")
    reading.pass_over(images, size.keys() - set(names), f"files without a row in {table.path.name}")
    reading.add(paths, table, city=city, key=keys, **columns)


def read_photos(folder, csv=None, *, on_error: str = "raise") -> Places:
    """Read a folder of one's own photographs and a CSV that says where they were taken.

    The CSV, named as it stands or in the folder, is by default ``positions.csv`` or ``photos.csv``. Columns
    (in any case): ``file`` (a path in the folder), and ``lat`` and ``lon`` (degrees, WGS 84; in the UTM zone
    of their middle, or each in its own if they spread over more than 6 degrees) or ``east``, ``north``
    (metres) and, if known, ``zone`` (``10S``); if wanted ``heading`` (degrees), ``date`` (YYYY[-MM[-DD]]),
    ``place`` (integer), ``city``, ``note``, empty where unknown; and ``part``, for `open_set` and
    `open_training_set`: ``train``, ``database``, ``queries``, or with another split ``val/queries``.
    """
    path = _photos_csv(Path(folder), csv)
    if path is None:
        raise FileNotFoundError(f"{csv or 'positions.csv'}: no such file, nor is there one in {folder}")
    return _read_photos(Path(folder), path, _Reading(on_error))[0]


def _photos_csv(folder: Path, csv: str | os.PathLike | None = None) -> Path | None:
    """The CSV of a folder of photographs, by its name or a usual one; a CSV itself; None if there is none."""
    if folder.suffix.lower() == ".csv" and folder.is_file():
        return folder
    choices = ["positions.csv", "photos.csv"] if csv is None else [csv]
    there = [folder / name for name in choices if (folder / name).is_file()]
    if csv is not None and Path(csv).is_file() and not (there and there[0].samefile(csv)):
        there.append(Path(csv))
    if len(there) > 1:
        raise ValueError(f"{there[0]} and {there[1]} are both there: give the whole path of the one you mean")
    return there[0] if there else None


def _read_photos(folder: Path, path: Path, reading: _Reading) -> tuple[Places, np.ndarray]:
    """The photographs, and the cells of the column ``part``: empty texts if there is none."""
    table = _Csv(path, reading.problems, "file lat lon | file east north")
    paths = [str(folder / name) for name in table.cells["file"]]
    table.refuse("file", [not os.path.isfile(path) for path in paths], f"a picture in {folder}")
    whole = [os.path.normpath(path) for path in paths]
    table.refuse_repeated("file", whole)
    dates = _dates(table.text("date"))
    table.refuse("date", np.isnat(dates) & (table.text("date") != ""), "YYYY, YYYY-MM or YYYY-MM-DD")
    columns = {"city": table.text("city", folder.absolute().name), "note": table.text("note"), "date": dates}
    columns["heading_deg"] = table.numbers("heading", -360, 360, empty=np.nan) % 360
    columns["place"] = table.numbers("place", -1, 2**53, empty=-1, whole=True)
    if "lat" in table.cells:
        columns |= {"lat": table.numbers("lat", -80, 84), "lon": table.numbers("lon", -180, 180)}
    else:
        zones = [_ZONE.fullmatch(cell.upper()) for cell in table.text("zone")]
        table.refuse("zone", (table.text("zone") != "") & np.equal(zones, None), "a UTM zone such as 10S")
        columns |= {"east_m": table.numbers("east"), "north_m": table.numbers("north")}
        columns["utm_zone"] = [zone[1] + zone[2] if zone else "" for zone in zones]
    part, parts = table.text("part"), r"train|((train|val|test)/)?(database|queries)"
    if "part" in table.cells:
        wrong = [not re.fullmatch(parts, cell) for cell in part]
        table.refuse("part", wrong, "train, database, queries, val/database or val/queries")
    others = {os.path.normpath(p): os.path.basename(p) for p in _Reading("skip").list_pictures(folder)}
    others = [name for path, name in others.items() if path not in set(whole)]
    reading.pass_over(folder, others, f"pictures without a row in {path.name}")
    reading.add(paths, table, **columns)
    return reading.places(path), part[table.good]


def read_unlabelled(folder: str | os.PathLike, *, on_error: str = "raise") -> Places:
    """Read a folder of pictures of which nothing is known: for retrieval only, `positives` refuses it."""
    folder, reading = Path(folder), _Reading(on_error)
    reading.add(reading.list_pictures(folder), city=folder.absolute().name)
    return reading.places(folder)


# -- Positives from a file ------------------------------------------------------------------------------
_LISTS = (".csv", ".npy", ".npz")
_CONVERT = (
    "no array of numbers. Lists in an array of objects are a pickle, which may run any code and is never "
    "opened. If you trust it, convert it once: a = np.load({0!r}, allow_pickle=True); "
    "a = a[:, 1] if a.ndim == 2 else a; lists = [np.array(rows, int) for rows in a]; np.savez({1!r}, "
    "indices=np.concatenate(lists), offsets=np.cumsum([0, *map(len, lists)]))"
)


def read_positives(path, database: Places, queries: Places) -> list[np.ndarray]:
    """The rows of `database` that answer each of the Q `queries`, ascending int64, as a file lists them.

    A ``.csv`` has a line a pair, ``query`` and ``reference``: file names behind as many folders as tell them
    apart; a query without a line or a reference has no positive. An ``.npy`` is a mask (Q, R), or row numbers
    (Q,) or (Q, most) filled up with -1; an ``.npz`` has row numbers, ``indices``, and ``offsets`` (Q + 1,).
    """
    path = Path(path)
    if check("a file of positives ends as", path.suffix.lower(), choices=_LISTS) == ".csv":
        return _read_pairs(path, database, queries)
    try:
        given = np.load(path, allow_pickle=False)
        if isinstance(given, np.lib.npyio.NpzFile):
            if not {"indices", "offsets"} <= set(given):
                raise ValueError(f"it holds {', '.join(given)}, where indices and offsets are needed")
            rows, ends = given["indices"], given["offsets"]
            given = np.split(rows, ends[1:-1])
            if ends[0] != 0 or ends[-1] != len(rows) or (np.diff(ends) < 0).any():
                raise ValueError(f"offsets must rise from 0 to {len(rows)}, got {ends}")
        elif given.dtype.kind == "i" and (given == -1).any():
            given = [rows[rows != -1] for rows in given.reshape(len(given), -1)]
        return positive_rows(given, len(queries), len(database))[0]
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        why = _CONVERT.format(path.name, f"{path.stem}.npz") if "pickle" in str(error) else error
        raise ValueError(f"{path}: {why}") from None


def _read_pairs(path: Path, database: Places, queries: Places) -> list[np.ndarray]:
    pairs, problems = [], []
    table = _Csv(path, problems, "query reference")
    for column, places in (("query", queries), ("reference", database)):
        names, rows = table.text(column), {}
        for depth in {name.count("/") + 1 for name in names}:
            for row, parts in enumerate(Path(p).parts for p in places.path):
                name = "/".join(parts[-depth:])
                rows[name] = -2 if name in rows else row
        pairs.append(np.array([rows.get(name, -1) for name in names], dtype=np.int64))
        unknown = (pairs[-1] == -1) & ((names != "") | (column == "query"))
        table.refuse(column, unknown, f"the name of one of the {len(places)} files")
        table.refuse(column, pairs[-1] == -2, "a name that only one file has: put its folder before it")
    if problems:
        raise ValueError("\n".join([*problems[:5], f"({len(problems)} in all)"]))
    query, reference = np.unique(np.array(pairs)[:, pairs[1] >= 0], axis=1)
    return np.split(reference, np.searchsorted(query, np.arange(1, len(queries))))


# -- Benchmarks and sets --------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What is known of a benchmark before it is opened: a row of ``benchmarks.csv``."""

    name: str
    folders: tuple[str, ...]  # names under which it is looked for, first found first taken
    split: str  # the folder below ``images``
    rule: PositiveRule
    n_database: int  # counts of the published evaluations
    n_queries: int | None
    sorted_batch: int  # in which the authors' evaluation shows name-sorted images to this set's InteractHead
    where_to_get: str


def _read_benchmarks() -> dict[str, Benchmark]:
    rows = list(csv.DictReader(io.StringIO(read_text(Path(__file__).with_name("benchmarks.csv")))))
    for row in rows:
        for name in ("radius_m", "frames", "n_database", "n_queries", "sorted_batch"):
            row[name] = int(row[name]) if row[name] else None
        row["folders"] = tuple(row["folders"].split())
        row["rule"] = PositiveRule(radius_m=row.pop("radius_m"), frames=row.pop("frames"))
    return {row["name"]: Benchmark(**row) for row in rows}


BENCHMARKS = _read_benchmarks()
_USUAL_NAMES = BENCHMARKS["msls-val"].folders, "gsv-cities gsv_cities GSV-Cities GSV_Cities GSVCities".split()


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TestSet:
    """References, queries and the `rule` that joins them: a file's name where positives are `listed`."""

    __test__ = False  # no test class, whatever pytest thinks of its name

    name: str
    database: Places
    queries: Places
    rule: PositiveRule | str = PositiveRule()
    listed: Sequence[np.ndarray] | None = None
    spec: Benchmark | None = None  # None: not published
    split: str = "test"

    @property
    def warning(self) -> str:
        """A sentence if counts or rule are not those of the published evaluations, else the empty text."""
        spec, counts, differ = self.spec, (len(self.database), len(self.queries)), []
        if spec and spec.n_queries and counts != (spec.n_database, spec.n_queries):
            here = "{:,} references and {:,} queries here".format(*counts)
            differ.append(f"{here}, but {spec.n_database:,} and {spec.n_queries:,}")
        if spec and str(self.rule) != str(spec.rule):
            differ.append(f"the positives {self.rule} here, but {spec.rule}")
        end = "in the published evaluations: its recalls cannot be compared with published ones"
        return f"{self.name} has {' and '.join(differ)} {end}" if differ else ""

    def positives(self) -> list[np.ndarray]:
        """The references that answer each query; see `positives`."""
        if self.listed is not None:
            return list(self.listed)
        return positives(self.database, self.queries, self.rule)

    def fingerprint(self) -> str:
        """A hash of both tables, and of the rule or the listed positives."""
        tables = self.database.fingerprint(), self.queries.fingerprint()
        rule = dataclasses.asdict(self.rule) if self.listed is None else list(self.listed)
        return fingerprint([*tables, rule])


def open_set(root, name, split=None, *, positives=None, on_error="raise", check_pictures=True) -> TestSet:
    """Open a set in the folder `root`, by the name of a benchmark (see `BENCHMARKS`) or of a folder.

    A folder has ``images/<split>/{database,queries}`` (or several of queries, such as ``queries_night``,
    which follow each other by name), is Mapillary SLS as downloaded, has photographs with a ``positions.csv``
    (see `read_photos`; without a column ``part``, every second row is a query), or is a CSV:
    ``holiday/spring.csv``. The split is ``"test"`` by default.

    `positives` is a `PositiveRule`, its text (``"10 m"``, ``"2 frames"``), or a file that lists them (see
    `read_positives`), in the set's folder or by its whole path; file names need no positions then. By default
    a benchmark has its own, another set those in its file ``positives_<split>`` (.csv, .npy, .npz), or those
    within 25 m. Where they are listed by number, no picture can be left out.

    ``nordland-2760`` has the full set's winter as references and every tenth frame of summer as query, unless
    a folder has that name. ``msls-val`` has the 740 queries of the sub-task ``all`` or of its file
    ``query_keys.txt`` (a key or path a line); ``msls-val-full`` has all.
    """
    spec, reading = BENCHMARKS.get(name), {"on_error": on_error, "check_pictures": check_pictures}
    if spec is None:
        folder = _set_folder(Path(root), name)
        only_val = (folder / "train_val").is_dir() and not _side_folders(folder, "test")
        split = split or ("val" if only_val else "test")
    else:
        folder, missing = _find_benchmark(Path(root), spec)
        if split not in (None, spec.split):
            raise ValueError(f"the benchmark {name} has the split {spec.split!r}, got {split!r}")
        if missing:
            missing = f"{missing}; get it from {spec.where_to_get}"
            raise FileNotFoundError(f"{name} is not complete in {root}: {missing}")
        split = spec.split
    rule = _find_rule(positives, folder.parent if folder.is_file() else folder, split, spec)
    listed = isinstance(rule, Path)
    if listed and rule.suffix.lower() != ".csv":
        reading["on_error"] = "raise"
    sides, table = _side_folders(folder, split), _photos_csv(folder.absolute())
    chosen = (name == "msls-val" or not spec) and not (folder / "query_keys.txt").exists()
    if downloaded := bool(sides) and len(sides[0]) > 1:
        spec = spec or BENCHMARKS["msls-val"]
        database = read_msls(folder, MSLS_VAL_CITIES, part="database", **reading)
        queries = read_msls(folder, MSLS_VAL_CITIES, part="query", chosen=chosen, **reading)
        database, queries = (t[np.argsort(names_in_order(t), kind="stable")] for t in (database, queries))
    elif sides:
        swapped = name == "nordland-2760" and folder.name.lower() == "nordland"
        reading["positions"] = not listed
        tables = [Places.concat(read_folder(part, **reading) for part in side) for side in sides]
        database, queries = tables[::-1] if swapped else tables
        if swapped:
            queries = queries[np.argsort(queries.east_m + queries.north_m, kind="stable")[::10]]
    elif table:
        database, queries = _open_photos(table, split, reading)
    else:
        layouts = f"there is no images/{split} with database and queries in it, nor a positions.csv"
        raise FileNotFoundError(f"{folder}: {layouts}, and {name!r} is no benchmark: {', '.join(BENCHMARKS)}")
    if spec and spec.name == "msls-val" and not (downloaded and chosen):
        queries = _select_keys(queries, folder)
    rows = read_positives(rule, database, queries) if listed else None
    tables = {"database": database, "queries": queries, "listed": rows, "rule": rule.name if listed else rule}
    return TestSet(name=name, **tables, spec=spec, split=split)


def _find_rule(given, folder: Path, split: str, spec: Benchmark | None = None) -> PositiveRule | Path:
    """The rule, or the file of positives, that `open_set` is given or finds."""
    if isinstance(given, PositiveRule) or (spec and not given):
        return given or spec.rule
    if match := re.fullmatch(r"(\d+|\d+\.\d+) ?m|(?:\+-)?(\d+) ?frames?", str(given)):
        return PositiveRule(radius_m=match[1] and float(match[1]), frames=match[2] and int(match[2]))
    names = [f"positives_{split}{ending}" for ending in _LISTS] if not given else [given]
    there = [path for path in (folder / name for name in names) if path.is_file()]
    if len(there) > 1:
        raise ValueError(f"{there[0]} and {there[1].name} are both there: keep one, or name it")
    if given and not there:
        known = f"metres (25 m), frames (2 frames) or a file ({', '.join(_LISTS)}) in {folder}"
        raise FileNotFoundError(f"positives must be {known}, got {str(given)!r}")
    return there[0] if there else PositiveRule()


def _open_photos(csv: Path, split: str, reading: dict) -> list[Places]:
    """References and queries of one split, read together, so that they lie in one UTM zone."""
    places, part = _read_photos(csv.parent, csv, _Reading(**reading))
    if not any(part):
        part = np.array([f"test/{side}" for side in _SIDES], dtype=object)[np.arange(len(places)) % 2]
    tables = []
    for side in _SIDES:
        chosen = np.isin(part, [f"{split}/{side}", side if split == "test" else ""])
        if not chosen.any():
            raise ValueError(f"{csv}: no photograph is for {split}/{side}; say so in its column 'part'")
        tables.append(places[chosen].replace(left_out=() if tables else places.left_out))
    return tables


def names_in_order(places: Places) -> list[str]:
    """The paths, by which ``sorted-n`` sorts; of Mapillary SLS as downloaded, ``@east@north@...`` names."""
    if not any(places.sequence):
        return places.path.tolist()
    rows = zip(places.east_m, places.north_m, places.key, strict=True)
    return [folder_name(east, north, pano_id=key) for east, north, key in rows]


def open_training_set(root, name: str, *, on_error: str = "raise") -> Places:
    """Open what a model may train on: the folder `name` in `root`, in any of the formats.

    Those are Mapillary SLS (without its validation cities), GSV-Cities, ``images/train`` with references,
    queries or both, and photographs with a CSV (whose ``part``, if any, begins with ``train``).
    """
    folder = _set_folder(Path(root), name)
    for inside, reader in (("train_val", read_msls), ("Dataframes", read_gsv_cities)):
        if (folder / inside).is_dir():
            return reader(folder, on_error=on_error, check_pictures=on_error == "skip")
    parts = folder / "images" / "train", folder / "train"
    if sides := [side for part in parts for kind in _FOLDERS for side in sorted(part.glob(kind))]:
        return Places.concat([read_folder(side, on_error=on_error) for side in sides])
    if csv := _photos_csv(folder.absolute()):
        places, part = _read_photos(csv.parent, csv, _Reading(on_error))
        training = np.array([cell.startswith("train") for cell in part], dtype=bool) | (not any(part))
        if training.any():
            return places[training]
    formats = "images/train, train_val (Mapillary SLS), Dataframes (GSV-Cities) or positions.csv with such"
    raise FileNotFoundError(f"{folder} is no set with a training part: it has no {formats} photographs")


def _set_folder(root: Path, name: str) -> Path:
    """The folder of a set, also where it has another of its usual names."""
    others = [other for names in _USUAL_NAMES if name in names for other in names]
    return next((root / other for other in (name, *others) if (root / other).is_dir()), root / name)


def _side_folders(folder: Path, split: str) -> list[list[Path]] | None:
    """The folders of references and of queries in any layout of files; None where they are not all there."""
    cities = [folder / "train_val" / city for city in MSLS_VAL_CITIES if split == "val"]
    layouts = [[[city / side for city in cities] for side in ("database", "query")]]
    parts = folder / "images" / split, folder / split
    layouts += [[sorted(part.glob(kind)) for kind in _FOLDERS] for part in parts]
    whole = (sides for sides in layouts if all(sides) and all(path.is_dir() for path in sum(sides, [])))
    return next(whole, None)


def _find_benchmark(root: Path, spec: Benchmark) -> tuple[Path | None, str]:
    """The folder of a benchmark, and what is missing (the empty text if nothing is)."""
    there = [root / name for name in spec.folders if (root / name).is_dir()]
    if not there:
        return None, f"there is no folder {' or '.join(spec.folders)}"
    whole = [folder for folder in there if _side_folders(folder, spec.split)]
    missing = "" if whole else f"{there[-1]} has no images/{spec.split} with database and queries in it"
    return whole[0] if whole else None, missing


def _query_keys(folder: Path) -> set[str]:
    path = folder / "query_keys.txt"
    lines = read_text(path).split("\n") if path.exists() else []
    return {Path(line.strip()).stem for line in lines if line.strip()}


def _select_keys(queries: Places, folder: Path) -> Places:
    if not (keys := _query_keys(folder)):
        advice = "write the keys of the 740 queries into query_keys.txt, or open msls-val-full"
        raise ValueError(f"{folder}: {advice}")
    if absent := sorted(keys - set(queries.key.tolist())):
        raise ValueError(f"{folder}: {len(absent)} of {len(keys)} query keys have no picture: {absent[0]!r}")
    return queries[np.isin(queries.key, list(keys))]


def available(root):
    """A `pandas.DataFrame` of the sets that are here, and where to get the others; counts files, reads none.

    A row for each benchmark, then for each other set in the folder; ``references`` and ``queries`` are files
    found (None where opening tells), ``expected`` the counts that are published.
    """
    import pandas

    def counts(folder: Path | None, split: str) -> list[int | None]:
        sides = folder and _side_folders(folder, split)
        return [sum(len(_Reading("skip").list_pictures(p)) for p in side) for side in sides] if sides else []

    root, rows, taken = Path(root), [], set()
    for spec in BENCHMARKS.values():
        folder, missing = _find_benchmark(root, spec)
        found = counts(folder, spec.split) or [0, 0]
        if folder and spec.name == "nordland-2760" and folder.name.lower() == "nordland":
            found = [found[1], -(-found[0] // 10)]
        if folder and spec.name == "msls-val":
            keys, downloaded = _query_keys(folder), (folder / "train_val").is_dir()
            found[1] = len(keys) if keys else None if downloaded else 0
            if not keys and not downloaded:
                missing = f"the list of the 740 query keys ({folder.name}/query_keys.txt)"
        taken.add(folder and folder.name)
        stated = " / ".join(f"{n:,}" if n else "not stated" for n in (spec.n_database, spec.n_queries))
        rows.append([spec.name, bool(folder), *found, stated, str(spec.rule), missing, spec.where_to_get])
    for folder in sorted(root.glob("[!.]*")):
        found = counts(folder, "test") or ([None, None] if (folder / "positions.csv").is_file() else [])
        if found and folder.name not in taken:
            rule = _find_rule(None, folder, "test")
            rule = getattr(rule, "name", str(rule))  # of a file, or of a `PositiveRule`
            rows.append([folder.name, True, *found, "", rule, "", "a folder of your own"])
    columns = "name present references queries expected positives missing where_to_get".split()
    return pandas.DataFrame(rows, columns=columns)
