"""The procedural town: street pictures, their positions, labels and depth, from one seed and numpy alone.

A town is a small grid of streets lined with boxes (buildings) whose faces are painted once as textures: storeys,
windows, doors, shops with lettered signs. A picture is a cast of one ray per image column against the boxes, seen
from above; because the camera never rolls, a wall met at distance t covers the rows between two heights over t, so
that all but a few look-ups per pixel are done per column. The ground is computed from its metres, cars are smaller
boxes, trees, lamps and persons are upright cards. Light, weather and the years between two visits come on top.

Why a town: neighbourhoods share an architecture, so that different places look alike (the confusion that the
geo-visual graph exists to find), and poses lie a few metres apart along the streets, so that 25 m cliques overlap.

Random decisions are integer hashes of named keys, never a generator with a state: a building looks the same
whatever was drawn before it. Arithmetic that decides *which* pixel is add, multiply, divide and compare alone, the
same on every machine; only shading uses other functions.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from sagelib.places import folder_name
from sagelib.runs import atomic_path, cores, read_json, write_json

LABELS = (
    "sky",
    "road",
    "facade",
    "window",
    "sign",
    "tree",
    "car",
    "person",
    "pavement",
    "door",
    "roof",
    "lamp",
)
"""Names of the label values: ``LABELS[labels[row, column]]``."""

CONDITIONS = ("day", "dusk", "night", "rain", "fog", "snow")
"""Light and weather that :meth:`Town.render` knows."""

SEED_RANGES = {
    "train": range(0, 1100),
    "val": range(1100, 1110),
    "test": range(1110, 1130),
}
"""Seeds of each use; they never overlap, so that no town is both learned and tested."""

UTM_ZONE, UTM_LETTER = 31, "U"
TOWN_GRID_M = 2000.0  # towns lie this far apart: a 25 m graph never joins two
FIRST_YEAR = 2020
DEFAULT_SEEDS = {"train": range(1000, 1060), "val": range(1100, 1104), "test": range(1114, 1118)}
"""Towns of the default data set of :func:`ensure_town`."""

IMAGES_PER_TOWN = 120
"""Training pictures, or references and as many queries, of each town of the default data set."""

PICTURE_SIZE = 160  # pixels a side: a multiple of 32, the last stride of most convolutional networks
PICTURE_VERSION = 5  # raised whenever the same seed gives other pictures: part of a folder's settings

_SKY, _ROAD, _FACADE, _WINDOW, _SIGN, _TREE, _CAR, _PERSON, _PAVEMENT, _DOOR, _ROOF, _LAMP = range(
    len(LABELS)
)


@dataclass(frozen=True, kw_only=True)
class TownConfig:
    """How large and how hard a town is. All of it enters the manifest of a written town.

    Parameters
    ----------
    streets : int
        Streets in each of the two directions, 2 to 5.
    neighbourhoods : int
        Architectures in one town, 1 to 6. Fewer: more places look alike.
    architecture_variety : float
        How far a building may depart from its neighbourhood's architecture, 0 (all alike) to 1.
    appearance_change : float
        Probability per year that a facade is repainted or a sign replaced, 0 to 1.
    years : int
        Pictures are spread over this many years after the first, 0 to 10.
    viewpoint_jitter_m, sideways_jitter_m : float
        Largest shift of a query or training picture from its station, along the street (0 to 12) and across it
        (0 to 3), in metres. References stand on their stations, without any of these changes.
    heading_jitter_deg : float
        Largest turn away from a station's heading, in degrees, 0 to 45.
    fov_deg, fov_jitter_deg : float
        Horizontal field of view (30 to 110) and its largest change (0 to 20), in degrees.
    height_jitter_m : float
        Largest change of the camera's height of 2.3 m, in metres, 0 to 1.5.
    tilt_jitter : float
        Largest change of the camera's tilt of 0.25 (see :class:`Pose`), 0 to 0.25.
    occlusion : float
        Share of the places at the kerb taken by cars, and the number of persons, 0 to 1.
    sensor_noise : float
        Noise of the camera in grey levels (half width of a triangular law), 0 to 40.
    train_spacing_m, reference_spacing_m : float
        Metres between two stations along a street; each station gives two pictures with different headings.
    query_conditions : tuple of str
        Conditions of the queries of val and test, in turn; the references are day pictures of the first year.
    """

    streets: int = 3
    neighbourhoods: int = 2
    architecture_variety: float = 0.5
    appearance_change: float = 0.25
    years: int = 3
    viewpoint_jitter_m: float = 6.0
    sideways_jitter_m: float = 2.0
    heading_jitter_deg: float = 25.0
    fov_deg: float = 75.0
    fov_jitter_deg: float = 18.0
    height_jitter_m: float = 0.8
    tilt_jitter: float = 0.07
    occlusion: float = 0.5
    sensor_noise: float = 5.0
    train_spacing_m: float = 4.0
    reference_spacing_m: float = 11.0
    query_conditions: tuple[str, ...] = CONDITIONS

    def __post_init__(self):
        limits = {
            "streets": (2, 5),
            "neighbourhoods": (1, 6),
            "architecture_variety": (0, 1),
            "appearance_change": (0, 1),
            "years": (0, 10),
            "viewpoint_jitter_m": (0, 12),
            "sideways_jitter_m": (0, 3),
            "heading_jitter_deg": (0, 45),
            "fov_deg": (30, 110),
            "fov_jitter_deg": (0, 20),
            "height_jitter_m": (0, 1.5),
            "tilt_jitter": (0, 0.25),
            "occlusion": (0, 1),
            "sensor_noise": (0, 40),
            "train_spacing_m": (1, 50),
            "reference_spacing_m": (1, 50),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} must lie between {low} and {high}, got {value}")
        object.__setattr__(self, "query_conditions", tuple(self.query_conditions))
        if not self.query_conditions:
            raise ValueError("query_conditions must name at least one condition, got none")
        for name in self.query_conditions:
            _check_condition(name)


@dataclass(frozen=True, kw_only=True)
class Pose:
    """A camera: where it stands, where it looks, and how wide.

    Parameters
    ----------
    east_m, north_m : float
        Position in UTM metres (zone 31U, a mock; see :attr:`Town.origin`).
    heading_deg : float
        Degrees clockwise from north.
    fov_deg : float
        Horizontal field of view.
    height_m : float
        Camera above the ground.
    tilt : float
        Upward shift of the view in half picture widths (a shift lens: verticals stay vertical).
    """

    east_m: float
    north_m: float
    heading_deg: float
    fov_deg: float = 75.0
    height_m: float = 2.3
    tilt: float = 0.25

    def __post_init__(self):
        for name, low, high in (("fov_deg", 10, 130), ("height_m", 0.3, 30), ("tilt", -1, 1)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must lie between {low} and {high}, got {getattr(self, name)}")
        for name in ("east_m", "north_m", "heading_deg"):
            if not np.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, got {getattr(self, name)}")


def city_of(note: str) -> str:
    """Name of the town from the note field of a file name: ``"town1000-night"`` gives ``"town1000"``."""
    return str(note).split("-")[0]


def condition_of(note: str) -> str:
    """Condition from the note field of a file name: ``"town1000-night"`` gives ``"night"`` (or ``""``)."""
    return str(note).partition("-")[2]


def _check_condition(name: str) -> None:
    if name not in CONDITIONS:
        raise ValueError(f"condition must be one of {', '.join(CONDITIONS)}, got {name!r}")


# ---------------------------------------------------------------------------------------------------------------
# Chance: integer hashes of named keys


def _key(*keys) -> int:
    """A 32-bit number from integers and strings, the same everywhere."""
    h = 0x9E3779B9
    for k in keys:
        k = zlib.crc32(k.encode()) if isinstance(k, str) else int(k) & 0xFFFFFFFF
        h = (h ^ k) * 0x7FEB352D & 0xFFFFFFFF
        h = (h ^ (h >> 15)) * 0x846CA68B & 0xFFFFFFFF
        h ^= h >> 16
    return h


class _Dice:
    """A row of draws that depends on the keys alone."""

    def __init__(self, *keys):
        self.key, self.turn = _key(*keys), 0

    def real(self, low=0.0, high=1.0) -> float:
        self.turn += 1
        return low + (high - low) * (_key(self.key, self.turn) / 2**32)

    def chance(self, p) -> bool:
        return self.real() < p

    def integer(self, n) -> int:
        return min(int(self.real() * n), n - 1)

    def pick(self, items):
        return items[self.integer(len(items))]


def _hash(a, b, key: int) -> np.ndarray:
    """Integer arrays ``a`` and ``b`` (broadcast) to float32 in [0, 1), by a multiply-xorshift hash."""
    a, b = np.asarray(a).astype(np.int32).view(np.uint32), np.asarray(b).astype(np.int32).view(np.uint32)
    h = (a * np.uint32(0x9E3779B1)) ^ (b * np.uint32(0x85EBCA77) + np.uint32(key))
    h = h ^ (h >> np.uint32(16))
    h = h * np.uint32(0x7FEB352D)
    h = h ^ (h >> np.uint32(15))
    h = h * np.uint32(0x846CA68B)
    h = h ^ (h >> np.uint32(16))
    return (h >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


def _noise(x, y, key: int) -> np.ndarray:
    """Smooth value noise in [0, 1) with one lattice point per unit."""
    xi, yi = np.floor(x).astype(np.int32), np.floor(y).astype(np.int32)
    fx, fy = (x - xi).astype(np.float32), (y - yi).astype(np.float32)
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    low = _hash(xi, yi, key) * (1 - fx) + _hash(xi + 1, yi, key) * fx
    high = _hash(xi, yi + 1, key) * (1 - fx) + _hash(xi + 1, yi + 1, key) * fx
    return low * (1 - fy) + high * fy


_TILE = 512


@lru_cache(maxsize=2)
def _tile(lattice: int) -> np.ndarray:
    """A square of noise that repeats without a seam, with ``lattice`` lattice points along a side."""
    at = np.arange(_TILE, dtype=np.float32) * np.float32(lattice / _TILE)
    i = np.floor(at).astype(np.int32)
    f = at - i
    f = f * f * (3 - 2 * f)
    n = np.arange(lattice)
    table = _hash(n[:, None], n[None, :], 99 + lattice)
    rows = table[i] * (1 - f[:, None]) + table[(i + 1) % lattice] * f[:, None]
    return np.ascontiguousarray(rows[:, i] * (1 - f) + rows[:, (i + 1) % lattice] * f)


def _quick_noise(x, y, scale: float, key: int = 0) -> np.ndarray:
    """Noise in [0, 1) by one look-up; ``scale`` lattice points a metre, the same again after 128 of them."""
    step = np.float32(scale * _TILE / 128)
    i = (x * step + np.float32(key % 499 + 100 * _TILE)).astype(np.int32) & (_TILE - 1)
    j = (y * step + np.float32(key % 491 + 100 * _TILE)).astype(np.int32) & (_TILE - 1)
    return _tile(128).ravel()[i * _TILE + j]


# ---------------------------------------------------------------------------------------------------------------
# Architecture: what a neighbourhood's buildings have in common


@dataclass(frozen=True)
class _Style:
    name: str
    walls: tuple  # colours a facade may be painted in
    material: str  # brick, plaster, boards, stone
    storey_m: float
    storeys: tuple[int, int]
    lot_m: tuple[float, float]
    window_m: tuple[float, float]
    pitch_m: float  # a window every so many metres
    frame: tuple
    roof: str  # flat or gable
    roof_colour: tuple
    shutters: bool = False
    arched: bool = False
    shop_share: float = 0.3
    tree_every_m: float = 14.0


_STYLES = (
    _Style(
        "canal", ((0.45, 0.24, 0.17), (0.36, 0.20, 0.16), (0.55, 0.33, 0.23), (0.30, 0.25, 0.23)), "brick",
        3.1, (3, 4), (5.5, 8.0), (1.0, 1.75), 1.75, (0.93, 0.92, 0.87), "gable", (0.30, 0.21, 0.19),
        shop_share=0.3, tree_every_m=11.0,
    ),
    _Style(
        "pastel", ((0.90, 0.74, 0.62), (0.66, 0.78, 0.80), (0.92, 0.88, 0.70), (0.77, 0.68, 0.78)), "boards",
        3.2, (2, 3), (6.5, 8.5), (1.15, 1.6), 2.3, (0.96, 0.96, 0.94), "gable", (0.38, 0.36, 0.37),
        shop_share=0.15, tree_every_m=17.0,
    ),
    _Style(
        "boulevard", ((0.82, 0.76, 0.64), (0.86, 0.81, 0.72), (0.76, 0.71, 0.62), (0.88, 0.85, 0.79)), "stone",
        3.3, (4, 5), (10.0, 15.0), (1.15, 2.1), 2.5, (0.88, 0.87, 0.83), "gable", (0.40, 0.45, 0.50),
        shutters=True, shop_share=0.55, tree_every_m=9.0,
    ),
    _Style(
        "south", ((0.87, 0.57, 0.33), (0.91, 0.76, 0.48), (0.80, 0.43, 0.33), (0.90, 0.83, 0.68)), "plaster",
        3.0, (2, 4), (7.0, 11.0), (1.0, 1.6), 2.4, (0.85, 0.82, 0.75), "gable", (0.66, 0.36, 0.24),
        shutters=True, arched=True, shop_share=0.35, tree_every_m=20.0,
    ),
    _Style(
        "terrace", ((0.62, 0.54, 0.40), (0.68, 0.60, 0.46), (0.56, 0.34, 0.27), (0.90, 0.89, 0.85)), "brick",
        2.9, (2, 3), (5.0, 6.5), (1.25, 1.6), 2.4, (0.95, 0.95, 0.95), "gable", (0.28, 0.29, 0.32),
        arched=True, shop_share=0.12, tree_every_m=13.0,
    ),
    _Style(
        "modern", ((0.70, 0.71, 0.71), (0.82, 0.82, 0.80), (0.52, 0.55, 0.58), (0.63, 0.57, 0.50)), "plaster",
        3.0, (4, 6), (12.0, 18.0), (2.1, 1.5), 3.0, (0.25, 0.26, 0.28), "flat", (0.35, 0.35, 0.36),
        shop_share=0.4, tree_every_m=16.0,
    ),
)  # fmt: skip

_SIGN_COLOURS = (
    (0.78, 0.10, 0.12), (0.10, 0.30, 0.62), (0.08, 0.45, 0.27), (0.95, 0.78, 0.15), (0.12, 0.12, 0.14),
    (0.93, 0.92, 0.88), (0.88, 0.42, 0.10), (0.45, 0.14, 0.42), (0.10, 0.52, 0.58), (0.86, 0.55, 0.62),
)  # fmt: skip
_DOOR_COLOURS = (
    (0.10, 0.22, 0.16), (0.36, 0.08, 0.09), (0.10, 0.14, 0.28), (0.30, 0.19, 0.11), (0.13, 0.13, 0.14),
    (0.78, 0.68, 0.22), (0.62, 0.66, 0.68), (0.16, 0.42, 0.48),
)  # fmt: skip
_CAR_COLOURS = (
    (0.75, 0.76, 0.78), (0.10, 0.10, 0.12), (0.92, 0.92, 0.92), (0.35, 0.37, 0.40), (0.55, 0.08, 0.09),
    (0.12, 0.22, 0.45), (0.16, 0.33, 0.25), (0.78, 0.66, 0.24), (0.52, 0.46, 0.40),
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------
# Painting a facade: an array (along the wall, up from the ground), in metres


class _Canvas:
    """One wall as texels: colour, light of its own, and label. First axis along the wall, second axis upwards."""

    def __init__(self, width_m: float, height_m: float, density: float):
        self.width_m, self.height_m, self.density = width_m, height_m, density
        nu, nv = max(4, round(width_m * density)), max(4, round(height_m * density))
        self.rgb = np.zeros((nu, nv, 3), np.float32)
        self.glow = np.zeros((nu, nv, 3), np.float32)
        self.label = np.full((nu, nv), _FACADE, np.uint8)

    def window(self, u0, u1, v0, v1):
        """Slices of the texels between two corners given in metres."""
        d, (nu, nv) = self.density, self.label.shape
        a, c = max(0, round(u0 * d)), max(0, round(v0 * d))
        return slice(a, max(a, min(nu, round(u1 * d)))), slice(c, max(c, min(nv, round(v1 * d))))

    def fill(self, u0, u1, v0, v1, colour, label=None, glow=None):
        s = self.window(u0, u1, v0, v1)
        self.rgb[s] = colour
        self.glow[s] = 0 if glow is None else glow
        if label is not None:
            self.label[s] = label

    def shade(self, u0, u1, v0, v1, factor):
        self.rgb[self.window(u0, u1, v0, v1)] *= np.float32(factor)

    def packed(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each level, half as fine as the one before: colour and label, and glow, as flat uint32 texels."""
        levels, label = [], self.label
        rgb, glow = ((np.clip(a, 0, 1) * 255 + 0.5).astype(np.uint8) for a in (self.rgb, self.glow))
        while True:
            out = []
            for colour, last in ((rgb, label), (glow, 0)):
                texel = np.empty((*label.shape, 4), np.uint8)
                texel[..., :3], texel[..., 3] = colour, last
                out.append(texel.reshape(-1).view(np.uint32))
            levels.append((label.shape, *out))
            if len(levels) == 5 or min(label.shape) < 8:
                return levels
            even = (0, 0, label.shape[1] // 2 * 2, label.shape[0] // 2 * 2)
            rgb, glow = (np.asarray(Image.fromarray(a).reduce(2, even)) for a in (rgb, glow))
            label = label[0 : even[3] : 2, 0 : even[2] : 2]


def _glyph(index: int) -> np.ndarray:
    """A letter of an alphabet nobody reads: strokes on a grid of 7 rows and 5 columns, row 0 on top."""
    dice, grid = _Dice("glyph", index), np.zeros((7, 5), bool)
    strokes = (
        np.s_[:, 0], np.s_[:, 4], np.s_[0, :], np.s_[3, :], np.s_[6, :], np.s_[:, 2], np.s_[:4, 0], np.s_[3:, 4],
    )  # fmt: skip
    for _ in range(2 + dice.integer(2)):
        grid[dice.pick(strokes)] = True
    for _ in range(dice.integer(2)):
        rising = dice.chance(0.5)
        for row in range(7):
            grid[row, round((6 - row if rising else row) * 4 / 6)] = True
    return grid


@lru_cache(maxsize=64)
def _word(key: int) -> np.ndarray:
    dice = _Dice("word", key)
    letters = [np.pad(_glyph(dice.integer(26)), ((0, 0), (0, 1))) for _ in range(4 + dice.integer(6))]
    return np.concatenate(letters, axis=1)[:, :-1]


def _lettering(canvas: _Canvas, key: int, u0, u1, v0, v1, colour, glow):
    """Write one word into the rectangle, as large as it fits, centred."""
    word = _word(key)
    cell = min((u1 - u0) / word.shape[1], (v1 - v0) / word.shape[0])
    u0 = (u0 + u1 - cell * word.shape[1]) / 2
    v0 = (v0 + v1 - cell * word.shape[0]) / 2
    su, sv = canvas.window(u0, u0 + cell * word.shape[1], v0, v0 + cell * word.shape[0])
    nu, nv = su.stop - su.start, sv.stop - sv.start
    if nu < 1 or nv < 1:
        return
    column = (np.arange(nu) * word.shape[1]) // nu
    row = word.shape[0] - 1 - (np.arange(nv) * word.shape[0]) // nv
    on = word[row[None, :], column[:, None]]
    canvas.rgb[su, sv][on] = colour
    if glow is not None:
        canvas.glow[su, sv][on] = glow


def _wall(canvas: _Canvas, material: str, colour, key: int):
    """The bare wall: masonry pattern and weather stains."""
    nu, nv = canvas.label.shape
    u = (np.arange(nu, dtype=np.float32)[:, None] + np.float32(0.5)) / np.float32(canvas.density)
    v = (np.arange(nv, dtype=np.float32)[None, :] + np.float32(0.5)) / np.float32(canvas.density)
    tone = np.ones((nu, nv), np.float32)
    if material == "brick":  # courses of 0.15 m, every other one shifted by half a brick
        row = np.floor(v / np.float32(0.15))
        along = u / np.float32(0.42) + 0.5 * (row % 2)
        tone += (_hash(np.floor(along), row, key) - 0.5) * np.float32(0.26)
        tone += (((v / np.float32(0.15)) - row) < 0.25) * np.float32(0.10)
    elif material == "boards":
        row = np.floor(v / np.float32(0.22))
        tone += (_hash(row, 0, key) - 0.5) * np.float32(0.05)
        tone -= (((v / np.float32(0.22)) - row) < 0.28) * np.float32(0.13)
    elif material == "stone":
        row = np.floor(v / np.float32(0.45))
        along = u / np.float32(0.9) + 0.5 * (row % 2)
        tone += (_hash(np.floor(along), row, key) - 0.5) * np.float32(0.08)
        joint = ((v / np.float32(0.45) - row) < 0.13) | ((along - np.floor(along)) < 0.07)
        tone -= joint * np.float32(0.12)
    else:
        tone += (_hash(np.arange(nu)[:, None], np.arange(nv)[None, :], key) - 0.5) * np.float32(0.04)
    tone += (_noise(u * 0.6, v * 0.35, key + 1) - 0.5) * np.float32(0.16)
    canvas.rgb[:] = tone[:, :, None] * np.asarray(colour, np.float32)


def _opening(canvas: _Canvas, dice: _Dice, style: _Style, u0, u1, v0, v1, frame, accent, lit_share=0.5):
    """One window: lintel, sill, frame, panes with the sky in them, curtains, and the lamp behind at night."""
    w, h = u1 - u0, v1 - v0
    curtain, lit, warm = dice.real(), dice.chance(lit_share), dice.real()
    if style.shutters:
        s = w * 0.42
        for a in (u0 - s - 0.05, u1 + 0.05):
            canvas.fill(a, a + s, v0, v1, accent)
            for k in range(5):
                canvas.shade(a + 0.06, a + s - 0.06, v0 + h * (k + 0.1) / 5, v0 + h * (k + 0.35) / 5, 0.8)
    if style.material in ("brick", "stone"):
        canvas.fill(u0 - 0.12, u1 + 0.12, v1, v1 + 0.24, np.asarray(frame, np.float32) * np.float32(0.82))
    canvas.fill(u0 - 0.06, u1 + 0.06, v0 - 0.05, v1 + 0.06, frame)
    canvas.fill(u0 - 0.14, u1 + 0.14, v0 - 0.16, v0 - 0.04, np.asarray(frame, np.float32) * np.float32(0.9))
    canvas.shade(u0 - 0.14, u1 + 0.14, v0 - 0.30, v0 - 0.16, 0.72)
    su, sv = canvas.window(u0 + 0.03, u1 - 0.03, v0 + 0.03, v1 - 0.03)
    nv = sv.stop - sv.start
    if nv < 1 or su.stop <= su.start:
        return
    up = (np.arange(nv, dtype=np.float32) / np.float32(nv))[None, :, None]
    glass = np.float32((0.10, 0.12, 0.15)) + up * np.float32((0.20, 0.26, 0.34)) * np.float32(0.4 + curtain)
    canvas.rgb[su, sv] = glass
    canvas.label[su, sv] = _WINDOW
    light = np.float32((1.0, 0.78, 0.42)) if warm < 0.75 else np.float32((0.80, 0.90, 1.0))
    canvas.glow[su, sv] = light * np.float32(0.65 + 0.35 * dice.real()) * (1 - 0.35 * up) if lit else 0.02
    if curtain > 0.45:
        part = 0.12 + 0.22 * dice.real()
        cloth = np.float32((0.86, 0.84, 0.80)) * np.float32(0.62 + 0.3 * dice.real())
        for a, b in ((u0 + 0.04, u0 + w * part), (u1 - w * part, u1 - 0.04)):
            canvas.fill(a, b, v0 + 0.04, v1 - 0.04, cloth, glow=light * np.float32(0.45) if lit else None)
    elif curtain < 0.12:
        canvas.fill(u0 + 0.04, u1 - 0.04, v0 + h * 0.45, v1 - 0.04, (0.82, 0.80, 0.74),
                    glow=light * np.float32(0.6) if lit else None)  # fmt: skip
    bar = 0.055
    panes = 2 if w < 1.5 else 3
    for k in range(1, panes):
        x = u0 + w * k / panes
        canvas.fill(x - bar / 2, x + bar / 2, v0, v1, frame)
    if style.name != "modern":
        canvas.fill(u0, u1, v0 + h * 0.62, v0 + h * 0.62 + bar, frame)
    canvas.shade(u0 + 0.03, u1 - 0.03, v1 - 0.16, v1 - 0.03, 0.6)  # the reveal's shadow
    if style.arched:
        r = w / 2
        x = (np.arange(su.start, su.stop) + 0.5) / canvas.density - (u0 + u1) / 2
        cut = np.sqrt(np.maximum(0.0, r * r - x * x)) * 0.5
        y = (np.arange(sv.start, sv.stop) + 0.5) / canvas.density - (v1 - r * 0.5)
        outside = y[None, :] > cut[:, None]
        canvas.rgb[su, sv][outside] = np.asarray(frame, np.float32) * np.float32(0.8)
        canvas.glow[su, sv][outside] = 0
        canvas.label[su, sv][outside] = _FACADE


def _door(canvas: _Canvas, dice: _Dice, u0, width, frame):
    top, colour = 2.15 + 0.3 * dice.real(), np.float32(dice.pick(_DOOR_COLOURS))
    canvas.fill(
        u0 - 0.14, u0 + width + 0.14, 0.1, top + 0.5, np.asarray(frame, np.float32) * np.float32(0.88)
    )
    canvas.fill(u0, u0 + width, 0.16, top, colour, _DOOR)
    for a, b in ((0.12, 0.46), (0.54, 0.88)):
        for c, d in ((0.5, 1.0), (1.15, 1.95)):
            canvas.shade(u0 + width * a, u0 + width * b, c, d, 0.75)
    canvas.fill(u0, u0 + width, top + 0.08, top + 0.4, (0.30, 0.34, 0.38), _WINDOW,
                glow=(0.9, 0.7, 0.35) if dice.chance(0.6) else None)  # fmt: skip
    canvas.fill(u0 + width * 0.82, u0 + width * 0.9, 1.02, 1.12, (0.85, 0.75, 0.4))
    canvas.fill(u0 - 0.3, u0 + width + 0.3, 0.0, 0.16, (0.55, 0.54, 0.52))


def _shop(canvas: _Canvas, dice: _Dice, sign: _Dice, u0, u1, top, frame):
    """A shop front: display window, door, sign band with a word, sometimes an awning."""
    wood = np.float32(sign.pick(_DOOR_COLOURS))
    board = np.float32(sign.pick(_SIGN_COLOURS))
    bright = board[0] * 0.3 + board[1] * 0.6 + board[2] * 0.1 > 0.5
    ink = np.float32((0.08, 0.08, 0.10)) if bright else np.float32((0.97, 0.95, 0.88))
    canvas.fill(u0, u1, 0.0, top, wood)
    door_w, left = 1.0, dice.chance(0.5)
    door_u = u0 + 0.2 if left else u1 - 1.2
    a, b = (u0 + 1.45, u1 - 0.2) if left else (u0 + 0.2, u1 - 1.45)
    glow = np.float32((1.0, 0.86, 0.58)) * np.float32(0.75 + 0.25 * sign.real())
    band = top - 0.75
    pane_top = min(2.75, band - 0.15)
    panes = max(1, round((b - a) / 1.7))
    for k in range(panes):
        x0, x1 = a + (b - a) * k / panes + 0.05, a + (b - a) * (k + 1) / panes - 0.05
        canvas.fill(x0, x1, 0.55, pane_top, (0.16, 0.18, 0.20), _WINDOW, glow=glow)
        su, sv = canvas.window(x0, x1, 0.55, pane_top)
        up = np.linspace(0, 1, max(1, sv.stop - sv.start), dtype=np.float32)[None, : sv.stop - sv.start, None]
        canvas.rgb[su, sv] += up * np.float32((0.16, 0.20, 0.25))
        for _ in range(4):  # wares
            c, w = x0 + (x1 - x0 - 0.35) * sign.real(), 0.18 + 0.3 * sign.real()
            ware = np.float32(sign.pick(_SIGN_COLOURS))
            canvas.fill(c, min(x1, c + w), 0.6, 0.75 + 0.8 * sign.real(), ware, _WINDOW, glow=ware * glow)
    canvas.fill(
        door_u, door_u + door_w, 0.08, pane_top, (0.14, 0.16, 0.18), _DOOR, glow=glow * np.float32(0.7)
    )
    canvas.fill(door_u, door_u + door_w, 0.08, 0.5, wood * np.float32(0.8), _DOOR)
    canvas.fill(u0 + 0.05, u1 - 0.05, band, top - 0.08, board, _SIGN, glow=board * np.float32(0.55))
    _lettering(canvas, sign.integer(1 << 16), u0 + 0.3, u1 - 0.3, band + 0.1, top - 0.18, ink, ink)
    canvas.shade(u0, u1, band - 0.12, band, 0.6)
    if sign.chance(0.35):
        cloth = np.float32(sign.pick(_SIGN_COLOURS))
        stripes = max(2, round((b - a) / 0.45))
        for k in range(stripes):
            colour = cloth if k % 2 else np.float32((0.93, 0.92, 0.88))
            x0, x1 = a + (b - a) * k / stripes, a + (b - a) * (k + 1) / stripes
            canvas.fill(x0, x1, band - 0.75, band - 0.02, colour * np.float32(0.95), _SIGN)
            canvas.fill(x0, x1, band - 0.9, band - 0.75, colour * np.float32(0.75), _SIGN)


def _paint_facade(
    style: _Style, lot: "_Lot", front: bool, width: float, paint: int, shop: int, density: float
):
    """The texture of one face of one building at one state of its paint and of its shop."""
    height = lot.height_m + lot.ridge_m + 0.05
    canvas = _Canvas(width, height, density)
    dice = _Dice(lot.key, "face", int(front))
    coat, sign = _Dice(lot.key, "paint", paint), _Dice(lot.key, "sign", shop)
    wall = np.float32(coat.pick(style.walls))
    vary = np.float32([coat.real(-1, 1), coat.real(-1, 1), coat.real(-1, 1)])
    wall = np.clip(wall * (1 + np.float32(0.10 + 0.22 * lot.freedom) * vary[0]), 0, 1)
    wall = np.clip(wall + np.float32(0.07 * lot.freedom) * vary, 0, 1)
    accent = np.float32(coat.pick(_DOOR_COLOURS)) * np.float32(1.3)
    frame = np.float32(style.frame)
    _wall(canvas, style.material, wall, _key(lot.key, "wall"))
    if not front:
        for storey in range(1, lot.storeys):  # a blind wall, now and then a small window
            v = lot.ground_m + (storey - 1) * lot.storey_m + 0.9
            if dice.chance(0.5) and width > 4:
                u = 0.8 + (width - 2.4) * dice.real()
                _opening(canvas, dice, style, u, u + 0.8, v, v + 1.2, frame, accent, 0.3)
        canvas.shade(0, width, 0, 0.5, 0.8)
        return canvas
    # storeys above the ground floor
    ww, wh = style.window_m[0] * lot.window_scale, style.window_m[1]
    count = max(1, int((width - 0.5) / (style.pitch_m * lot.window_scale)))
    if style.shutters and count * ww * 1.95 > width:
        count = max(1, int(width / (ww * 1.95)))
    step = width / count
    bay = lot.bay if count >= 3 else -1
    for storey in range(1, lot.storeys):
        base = lot.ground_m + (storey - 1) * lot.storey_m
        h = min(wh * (1.0 if storey < lot.storeys - 1 else 0.88), lot.storey_m - 0.95)
        for k in range(count):
            u = (k + 0.5) * step - ww / 2
            low = 0.75
            if storey == 1 and style.name == "boulevard":
                low = 0.35
            _opening(canvas, dice, style, u, u + ww, base + low, base + low + h, frame, accent)
            if k == bay or (lot.balconies and storey <= 2 and (k + storey) % 2 == 0):
                rail = (0.16, 0.16, 0.17)
                for x in np.arange(u - 0.25, u + ww + 0.25, 0.18):
                    canvas.fill(x, x + 0.06, base + 0.1, base + 0.95, rail)
                canvas.fill(u - 0.3, u + ww + 0.3, base + 0.92, base + 1.0, rail)
                canvas.fill(u - 0.35, u + ww + 0.35, base - 0.06, base + 0.1, wall * np.float32(0.6))
        if style.material in ("stone", "plaster") and storey > 1 and lot.bands:
            canvas.fill(0, width, base - 0.02, base + 0.16, np.clip(wall * np.float32(1.12), 0, 1))
            canvas.shade(0, width, base - 0.12, base - 0.02, 0.75)
    # ground floor
    if lot.is_shop:
        _shop(canvas, dice, sign, 0.15, width - 0.15, lot.ground_m - 0.05, frame)
    else:
        canvas.shade(0, width, 0, 0.6, 0.72)
        slot = dice.integer(count)
        for k in range(count):
            centre = (k + 0.5) * step
            if k == slot:
                _door(canvas, dice, centre - 0.5, 1.0, frame)
            elif lot.garage and count > 1 and k == (slot + 1) % count and step > 2.0:
                canvas.fill(
                    centre - 1.1, centre + 1.1, 0.05, 2.3, np.float32(dice.pick(_DOOR_COLOURS)), _DOOR
                )
                for y in (0.5, 0.95, 1.4, 1.85):
                    canvas.shade(centre - 1.1, centre + 1.1, y, y + 0.06, 0.7)
            else:
                _opening(canvas, dice, style, centre - ww / 2, centre + ww / 2, 0.95,
                         0.95 + min(wh, lot.ground_m - 1.4), frame, accent, 0.6)  # fmt: skip
    # cornice, downpipe, ivy
    trim = np.clip(np.float32(style.frame) * np.float32(0.95), 0, 1)
    canvas.fill(0, width, lot.height_m - 0.4, lot.height_m - 0.05, trim)
    canvas.shade(0, width, lot.height_m - 0.62, lot.height_m - 0.4, 0.7)
    for x in np.arange(0.2, width, 0.5):
        canvas.shade(x, x + 0.2, lot.height_m - 0.38, lot.height_m - 0.25, 0.75)
    canvas.fill(0.05, 0.16, 0.2, lot.height_m - 0.4, wall * np.float32(0.45))
    if lot.ivy:
        nu, nv = canvas.label.shape
        u, v = np.arange(nu)[:, None] / density, np.arange(nv)[None, :] / density
        leaf = _noise(u * 2.2, v * 2.2, lot.key) + 0.35 * _noise(u * 7, v * 7, lot.key + 1)
        edge = 0.45 + 0.12 * v + 0.10 * np.abs(u - lot.ivy * width)
        on = leaf > edge
        green = np.float32((0.17, 0.30, 0.12)) * (
            0.6 + 0.8 * _hash(np.arange(nu)[:, None], np.arange(nv), 7)[..., None]
        )
        canvas.rgb[on], canvas.label[on], canvas.glow[on] = green[on], _TREE, 0
    return canvas


# ---------------------------------------------------------------------------------------------------------------
# The plan of a town, in its own metres: streets along x and y, lots around every block


@dataclass(frozen=True)
class _Lot:
    """A building: a box on the plan and what it draws from its neighbourhood."""

    key: int
    style: _Style
    box: tuple[float, float, float, float]  # x0, x1, y0, y1
    fronts: tuple[bool, bool, bool, bool]  # faces -x, +x, -y, +y that look onto a street
    ridge_along_x: bool
    storeys: int
    storey_m: float
    ground_m: float
    height_m: float
    ridge_m: float
    freedom: float
    window_scale: float
    bay: int
    balconies: bool
    bands: bool
    is_shop: bool
    garage: bool
    ivy: float


@dataclass(frozen=True)
class _Street:
    along_x: bool
    centre: float  # the other coordinate
    half_road: float
    pavement: float
    tree_every_m: float
    lamp_every_m: float
    tone: float
    dashed: bool


_BLOCK_DEPTH = 11.0
_FACE_NORMALS = np.array([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])


def _make_lot(key, style: _Style, box, fronts, ridge_along_x, config: TownConfig) -> _Lot:
    dice, free = _Dice(key, "lot"), config.architecture_variety
    storeys = style.storeys[0] + dice.integer(style.storeys[1] - style.storeys[0] + 1)
    if dice.chance(0.25 * free):
        storeys = max(2, storeys + dice.pick((-1, 1)))
    storey_m = style.storey_m * (1 + 0.06 * free * dice.real(-1, 1))
    ground_m = max(storey_m, 3.0) + 0.35 + 0.3 * free * dice.real()
    height = ground_m + (storeys - 1) * storey_m + 0.5
    depth = (box[3] - box[2]) if ridge_along_x else (box[1] - box[0])
    return _Lot(
        key=key, style=style, box=box, fronts=fronts, ridge_along_x=ridge_along_x, storeys=storeys,
        storey_m=storey_m, ground_m=ground_m, height_m=height,
        ridge_m=0.0 if style.roof == "flat" else depth / 2 * (0.55 + 0.3 * dice.real()),
        freedom=free, window_scale=1 + 0.18 * free * dice.real(-1, 1),
        bay=dice.integer(5) if dice.chance(0.3) else -1, balconies=dice.chance(0.25), bands=dice.chance(0.6),
        is_shop=dice.chance(style.shop_share), garage=dice.chance(0.25),
        ivy=dice.real(0.01, 1.0) if dice.chance(0.07) else 0.0,
    )  # fmt: skip


def _plan(seed: int, config: TownConfig):
    """Streets, lots, parks and the edges of a town."""
    dice, n = _Dice(seed, "plan"), config.streets
    axes = []
    for _ in range(2):
        positions = [0.0]
        for _ in range(n - 1):
            positions.append(positions[-1] + 62 + 26 * dice.real())
        shift = positions[-1] / 2
        axes.append([p - shift for p in positions])
    streets = [
        [
            _Street(
                along_x=direction == 1, centre=c, half_road=3.8 + 1.6 * dice.real(), pavement=2.4 + 1.4 * dice.real(),
                tree_every_m=0.0, lamp_every_m=19 + 8 * dice.real(), tone=0.85 + 0.3 * dice.real(),
                dashed=dice.chance(0.65),
            )
            for c in axes[direction]
        ]
        for direction in range(2)
    ]  # fmt: skip
    order = list(range(len(_STYLES)))
    picked = [order.pop(dice.integer(len(order))) for _ in range(config.neighbourhoods)]
    # the neighbourhood of a block: the nearest of a few centres, so that one architecture covers adjacent streets
    centres = [(dice.real(-0.5, n - 0.5), dice.real(-0.5, n - 0.5), picked[k % len(picked)])
               for k in range(len(picked))]  # fmt: skip
    extent = [(a[0] - 62.0, a[-1] + 62.0) for a in axes]
    lots, parks = [], []
    for i in range(-1, n):
        for j in range(-1, n):
            sx, sy = streets
            left, right = sx[i] if i >= 0 else None, sx[i + 1] if i + 1 < n else None
            south, north = sy[j] if j >= 0 else None, sy[j + 1] if j + 1 < n else None
            x0 = left.centre + left.half_road + left.pavement if left else extent[0][0]
            x1 = right.centre - right.half_road - right.pavement if right else extent[0][1]
            y0 = south.centre + south.half_road + south.pavement if south else extent[1][0]
            y1 = north.centre - north.half_road - north.pavement if north else extent[1][1]
            near = min(centres, key=lambda c: (c[0] - i - 0.5) ** 2 + (c[1] - j - 0.5) ** 2)
            style, block, d = _STYLES[near[2]], _Dice(seed, "block", i, j), _BLOCK_DEPTH
            if block.chance(0.06):
                parks.append((x0, x1, y0, y1))
                continue
            rows = (
                (south, True, x0, x1, 2, left, right), (north, True, x0, x1, 3, left, right),
                (left, False, y0 + d, y1 - d, 0, None, None), (right, False, y0 + d, y1 - d, 1, None, None),
            )  # fmt: skip
            for street, along_x, start, stop, face, street_a, street_b in rows:
                if street is None:
                    continue
                at = start
                while at < stop - 2.0:
                    width = block.real(*style.lot_m)
                    if stop - at - width < style.lot_m[0]:
                        width = stop - at if stop - at < style.lot_m[1] * 1.3 else (stop - at) / 2
                    inner = at > start + 1 and at + width < stop - 1
                    if inner and block.chance(0.05):  # an alley
                        at += 2.5
                        continue
                    back = block.real(0.0, 0.9) if inner and block.chance(0.3) else 0.0
                    fronts = [False] * 4
                    fronts[face] = True
                    if along_x:
                        ys = (y0 + back, y0 + d) if face == 2 else (y1 - d, y1 - back)
                        box = (at, at + width, *ys)
                        fronts[0] = at <= start and street_a is not None
                        fronts[1] = at + width >= stop - 0.01 and street_b is not None
                    else:
                        xs = (x0 + back, x0 + d) if face == 0 else (x1 - d, x1 - back)
                        box = (*xs, at, at + width)
                    key = _key(seed, "building", i, j, face, round(at * 8))
                    lots.append(_make_lot(key, style, box, tuple(fronts), along_x, config))
                    at += width
    # a house across the end of every street closes the view
    for direction in range(2):
        for k, street in enumerate(streets[direction]):
            half = street.half_road + street.pavement + 2.0
            for end, sign in ((0, -1), (1, 1)):
                edge = extent[1 - direction][end]
                span = (edge - 12.0, edge) if sign < 0 else (edge, edge + 12.0)
                across = (street.centre - half, street.centre + half)
                box = (*span, *across) if direction == 1 else (*across, *span)
                fronts = [False] * 4
                fronts[(0 if direction == 1 else 2) + (1 if sign < 0 else 0)] = True
                key = _key(seed, "closing", direction, k, end)
                style = _STYLES[picked[_Dice(key).integer(len(picked))]]
                lots.append(_make_lot(key, style, box, tuple(fronts), direction == 0, config))
    return streets, lots, parks, extent


# ---------------------------------------------------------------------------------------------------------------
# Cards: trees, persons and lamps as pictures with an alpha, finest first

_CARD_TREE, _CARD_PERSON, _CARD_LAMP = range(3)


def _levels(rgba: np.ndarray) -> list[np.ndarray]:
    out = [rgba]
    while min(out[-1].shape[:2]) >= 8:
        a = out[-1]
        a = (a[0::2, 0::2] + a[1::2, 0::2] + a[0::2, 1::2] + a[1::2, 1::2]) * np.float32(0.25)
        out.append(np.ascontiguousarray(a))
    return out


@lru_cache(maxsize=64)
def _card(kind: int, variant: int) -> list[np.ndarray]:
    """Premultiplied RGBA levels, row 0 on top. Trees carry a tint of 1 in green leaves, to be coloured later."""
    key = _key("card", kind, variant)
    dice = _Dice(key)
    if kind == _CARD_TREE:
        n = 128
        y, x = np.mgrid[0:n, 0:n].astype(np.float32) / n + np.float32(0.5 / n)
        crown = np.zeros((n, n), np.float32)
        for _ in range(9):  # a crown is a few balls of leaves
            a, r = dice.real(0.28, 0.72), dice.real(0.13, 0.24)
            b = dice.real(0.2, 0.55)
            d = ((x - a) ** 2 + (y - b) ** 2) / (r * r)
            crown = np.maximum(crown, 1 - d)
        leaf = _noise(x * 28, y * 28, key) * np.float32(0.6) + _noise(x * 11, y * 11, key + 1) * np.float32(
            0.5
        )
        alpha = (
            (crown + (leaf - np.float32(0.55)) * np.float32(1.1) > np.float32(0.12)) & (crown > 0.02)
        ).astype(np.float32)
        light = np.float32(0.55) + np.float32(0.5) * leaf + np.float32(0.35) * (np.float32(0.5) - y)
        hue = np.float32([dice.real(0.20, 0.30), dice.real(0.34, 0.44), dice.real(0.12, 0.18)])
        rgb = light[..., None] * hue
        sway = np.float32(0.5) + np.float32(0.03) * np.float32(dice.real(-1, 1)) * (1 - y)
        trunk = (np.abs(x - sway) < np.float32(0.016) + np.float32(0.012) * (y > 0.9)) & (y > 0.4)
        bark = trunk & (alpha < 0.5)
        rgb[bark] = (np.float32(0.26) + np.float32(0.1) * leaf[bark])[:, None] * np.float32((1.0, 0.85, 0.7))
        alpha = np.maximum(alpha, trunk)
    elif kind == _CARD_PERSON:
        h, w = 128, 64
        y, x = np.mgrid[0:h, 0:w].astype(np.float32)
        y, x = y / h, (x - w / 2 + np.float32(0.5)) / h
        alpha = np.zeros((h, w), np.float32)
        rgb = np.zeros((h, w, 3), np.float32)
        coat, legs = np.float32(dice.pick(_SIGN_COLOURS)), np.float32(dice.pick(_DOOR_COLOURS))
        skin = np.float32(dice.pick(((0.88, 0.70, 0.58), (0.55, 0.38, 0.28), (0.72, 0.54, 0.42))))
        stride = dice.real(0.02, 0.09)
        for side in (-1, 1):
            centre = side * (np.float32(0.035) + np.maximum(0, y - np.float32(0.5)) * np.float32(2 * stride))
            on = (np.abs(x - centre) < 0.038) & (y > 0.48) & (y < 0.985)
            alpha[on], rgb[on] = 1, legs * np.float32(0.75 if side < 0 else 0.9)
        body = (np.abs(x) < 0.075 + 0.03 * (y - 0.17)) & (y > 0.165) & (y < 0.56)
        arms = (np.abs(np.abs(x) - 0.095 - 0.04 * (y - 0.2)) < 0.022) & (y > 0.19) & (y < 0.52)
        alpha[body | arms], rgb[body], rgb[arms] = 1, coat, coat * np.float32(0.8)
        head = (x / np.float32(0.045)) ** 2 + ((y - np.float32(0.095)) / np.float32(0.065)) ** 2 < 1
        alpha[head], rgb[head] = 1, skin
        hair = head & (y < 0.085)
        rgb[hair] = np.float32(dice.pick(((0.12, 0.09, 0.07), (0.35, 0.24, 0.14), (0.6, 0.58, 0.55))))
        rgb *= (np.float32(0.9) + np.float32(1.2) * x)[..., None]
    else:
        h, w = 256, 64
        y, x = np.mgrid[0:h, 0:w].astype(np.float32)
        y, x = y / h, (x - w / 2 + np.float32(0.5)) / h
        pole = (np.abs(x) < np.float32(0.009) + np.float32(0.008) * (y > 0.85)) & (y > 0.08)
        head = (np.abs(x) < 0.02 + 0.45 * (y - 0.02)) & (y > 0.02) & (y < 0.085)
        cap = (np.abs(x) < 0.07) & (y > 0.0) & (y < 0.022)
        alpha = (pole | head | cap).astype(np.float32)
        rgb = np.zeros((h, w, 3), np.float32) + np.float32((0.16, 0.18, 0.17))
        rgb[head] = (0.86, 0.84, 0.76)
    rgba = np.concatenate([rgb * alpha[..., None], alpha[..., None]], axis=2)
    return _levels(np.ascontiguousarray(rgba, dtype=np.float32))


@lru_cache(maxsize=64)
def _car_side(variant: int, end: bool) -> tuple[np.ndarray, np.ndarray]:
    """Colour (rows from the ground up, columns) of a car's lower box, painted 0.5 where the body's colour goes."""
    n, m = (24, 40) if end else (24, 96)
    y, x = np.mgrid[0:n, 0:m].astype(np.float32)
    y, x = (y + np.float32(0.5)) / n, (x + np.float32(0.5)) / m
    body = np.ones((n, m), np.float32) * (np.float32(0.85) + np.float32(0.25) * y)
    rgb = np.zeros((n, m, 3), np.float32)
    if end:
        body[y < 0.35] = 0
        rgb[y < 0.35] = (0.07, 0.07, 0.08)
        lamp = (np.abs(np.abs(x - 0.5) - 0.38) < 0.09) & (y > 0.55) & (y < 0.85)
        body[lamp], rgb[lamp] = 0, ((0.75, 0.10, 0.08) if variant % 2 else (0.92, 0.92, 0.86))
        plate = (np.abs(x - 0.5) < 0.14) & (y > 0.42) & (y < 0.58)
        body[plate], rgb[plate] = 0, (0.9, 0.88, 0.7)
    else:
        low = y < 0.16
        body[low], rgb[low] = 0, (0.08, 0.08, 0.09)
        for centre in (0.19, 0.80):
            r2 = ((x - np.float32(centre)) * np.float32(4.2)) ** 2 + (
                y * np.float32(0.8) - np.float32(0.22)
            ) ** 2
            body[r2 < 0.36**2 * 0.9], rgb[r2 < 0.36**2 * 0.9] = 0, (0.04, 0.04, 0.05)
            body[r2 < 0.19**2], rgb[r2 < 0.19**2] = 0, (0.5, 0.5, 0.52)
        for seam in (0.36, 0.62):
            body[np.abs(x - seam) < 0.006] *= np.float32(0.6)
    return body, np.ascontiguousarray(rgb.transpose(2, 0, 1))


# ---------------------------------------------------------------------------------------------------------------
# Light and weather


@dataclass(frozen=True)
class _Light:
    zenith: tuple
    horizon: tuple
    ambient: tuple
    sun: tuple
    lamps: float = 0.0
    glow: float = 0.0
    clouds: float = 0.6  # how white
    cover: float = 0.5  # how many
    haze_m: float = 900.0  # half of the colour is gone at this distance
    wet: float = 0.0
    snow: float = 0.0


_LIGHTS = {
    "day": _Light((0.30, 0.52, 0.86), (0.76, 0.86, 0.95), (0.55, 0.60, 0.68), (0.62, 0.56, 0.46), cover=0.45),
    "dusk": _Light((0.20, 0.20, 0.42), (0.96, 0.56, 0.36), (0.33, 0.28, 0.36), (0.30, 0.16, 0.08), lamps=0.45,
                   glow=0.75, clouds=0.35, haze_m=400),
    "night": _Light((0.012, 0.018, 0.05), (0.07, 0.07, 0.11), (0.075, 0.085, 0.13), (0.0, 0.0, 0.0), lamps=1.0,
                    glow=1.0, clouds=0.03),
    "rain": _Light((0.50, 0.53, 0.57), (0.66, 0.68, 0.70), (0.66, 0.68, 0.72), (0.0, 0.0, 0.0), clouds=-0.10,
                   cover=0.9, haze_m=150, wet=1.0, glow=0.25),
    "fog": _Light((0.70, 0.71, 0.73), (0.76, 0.77, 0.78), (0.66, 0.67, 0.69), (0.03, 0.03, 0.03), clouds=0.0,
                  haze_m=16, glow=0.2),
    "snow": _Light((0.68, 0.71, 0.77), (0.82, 0.84, 0.88), (0.80, 0.83, 0.90), (0.06, 0.06, 0.05), clouds=-0.06,
                   cover=0.9, haze_m=110, snow=1.0, glow=0.15),
}  # fmt: skip
_LAMP_COLOUR = np.float32((1.0, 0.72, 0.38))
_LAMP_HEIGHT_M = 5.2
_VIEW_M = 200.0
_ATLAS_TEXELS = 1 << 25  # painted walls kept in memory: 8 bytes each
_FAR_M = 400.0  # the ground ends here
_HITS = 6  # boxes followed behind each other in one column


@lru_cache(maxsize=1)
def _clouds() -> np.ndarray:
    """Cloud thickness in [0, 1] over (elevation, azimuth), once around the horizon."""
    rows, columns = 128, 1024
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32)
    total = np.zeros((rows, columns), np.float32)
    for octave, weight in ((1, 0.5), (2, 0.27), (4, 0.15), (8, 0.08)):
        period = 24 * octave
        px = x * np.float32(period / columns)
        lower = _noise(px, y * np.float32(octave * 0.07), 77 + octave)
        wrapped = _noise(px - np.float32(period), y * np.float32(octave * 0.07), 77 + octave)
        blend = x / np.float32(columns)  # so that the two ends of the strip meet
        total += np.float32(weight) * (lower * (1 - blend) + wrapped * blend)
    return total


@lru_cache(maxsize=1 << 14)
def _changes(key: int, what: str, year: int, probability: float) -> int:
    """How often something has changed from the first year to this one."""
    return sum(_key(key, what, y) / 2**32 < probability for y in range(1, year + 1))


class Town:
    """A town from one seed: a plan in metres, and pictures of it.

    Parameters
    ----------
    seed : int
        Which town. :data:`SEED_RANGES` keeps the seeds of training and test apart.
    config : TownConfig, optional
        Size and difficulty.

    Attributes
    ----------
    name : str
        ``"town<seed>"``, used as the city.
    origin : tuple of float
        UTM east and north of the town's centre, in metres (zone 31U, a mock). Towns are kilometres apart.
    """

    def __init__(self, seed: int, config: TownConfig | None = None):
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 10000:
            raise ValueError(f"seed must be a whole number from 0 to 9999, got {seed!r}")
        self.seed, self.config = int(seed), config or TownConfig()
        self.name = f"town{self.seed}"
        self.origin = self.origin_of(self.seed)
        turn = np.deg2rad(_Dice(self.seed, "turn").real(-45.0, 45.0))
        self._cos, self._sin = float(np.cos(turn)), float(np.sin(turn))
        self.turn_deg = float(np.rad2deg(turn))
        self._sun_azimuth = float(np.deg2rad(_Dice(self.seed, "sun").real(130.0, 230.0) + self.turn_deg))
        self._streets, self._lots, self._parks, self._extent = _plan(self.seed, self.config)
        lots = self._lots
        self._box = np.array([lot.box for lot in lots])
        self._centre = np.stack([self._box[:, :2].mean(1), self._box[:, 2:].mean(1)], 1)
        self._height = np.array([lot.height_m for lot in lots])
        self._ridge = np.array([lot.ridge_m for lot in lots])
        self._ridge_x = np.array([lot.ridge_along_x for lot in lots])
        self._roof_colour = np.array([lot.style.roof_colour for lot in lots], np.float32)
        self._textures: dict = {}
        self._atlas = np.zeros((2, _ATLAS_TEXELS), np.uint32)
        self._used = 0
        self._place_furniture()

    @staticmethod
    def origin_of(seed: int) -> tuple[float, float]:
        """UTM east and north of the centre of a town, in metres."""
        return 320000.0 + TOWN_GRID_M * (seed % 100), 5600000.0 + TOWN_GRID_M * (seed // 100)

    # -- frames ------------------------------------------------------------------------------------------------

    def to_utm(self, x, y):
        """Town metres to UTM east and north."""
        return (
            self.origin[0] + self._cos * x - self._sin * y,
            self.origin[1] + self._sin * x + self._cos * y,
        )

    def _from_utm(self, east, north):
        e, n = east - self.origin[0], north - self.origin[1]
        return self._cos * e + self._sin * n, -self._sin * e + self._cos * n

    # -- what stands in the streets ----------------------------------------------------------------------------

    def _all_streets(self):
        for direction in range(2):
            others = self._streets[1 - direction]
            for k, street in enumerate(self._streets[direction]):
                yield direction, k, street, others

    def _place_furniture(self):
        trees, lamps, cars, walkers = [], [], [], []
        spacings = sorted({lot.style.tree_every_m for lot in self._lots})
        for direction, k, street, others in self._all_streets():
            low, high = self._extent[1 - direction]
            crossings = [(o.centre, o.half_road + o.pavement + 1.0) for o in others]

            def point(along, across, direction=direction, street=street):
                across += street.centre
                return (across, along) if direction == 0 else (along, across)

            def clear(along, margin, crossings=crossings):
                return all(abs(along - c) > w + margin for c, w in crossings)

            for side in (-1, 1):
                dice = _Dice(self.seed, "kerb", direction, k, side)
                every = dice.pick((*spacings, 0.0))
                variant = dice.integer(12)
                at = low + dice.real(0, 10)
                while every and at < high:
                    if clear(at, 1.5) and dice.chance(0.85):
                        one = _key(self.seed, "tree", direction, k, side, round(at * 8))
                        trees.append((*point(at, side * (street.half_road + 0.75)), dice.real(4.2, 7.2),
                                      (variant + dice.integer(3)) % 12, one))  # fmt: skip
                    at += every * dice.real(0.8, 1.2)
                at = low + dice.real(0, street.lamp_every_m) + (side > 0) * street.lamp_every_m / 2
                while at < high:
                    lamps.append((*point(at, side * (street.half_road + 0.4)), _LAMP_HEIGHT_M, 0, 0))
                    at += street.lamp_every_m
                for slot in range(int((high - low) / 5.6)):
                    at = low + 5.6 * (slot + 0.5)
                    if clear(at, 3.0):
                        cars.append((*point(at, side * (street.half_road - 1.0)), float(direction), side,
                                     _key(self.seed, "car", direction, k, side, slot)))  # fmt: skip
                for slot in range(int((high - low) / 6.0)):
                    at = low + 6.0 * (slot + 0.5)
                    walkers.append((*point(at, side * (street.half_road + 0.6 + 0.6 * street.pavement)), 1.75, 0,
                                    _key(self.seed, "walker", direction, k, side, slot)))  # fmt: skip
        for k, (x0, x1, y0, y1) in enumerate(self._parks):
            dice = _Dice(self.seed, "park", k)
            for _ in range(int((x1 - x0) * (y1 - y0) / 90)):
                at = dice.real(x0 + 1, x1 - 1), dice.real(y0 + 1, y1 - 1)
                trees.append((*at, dice.real(4.5, 9.0), dice.integer(12), 0))
        self._trees, self._lamps, self._cars, self._walkers = (
            np.array(a, float).reshape(-1, 5) for a in (trees, lamps, cars, walkers)
        )

    # -- textures ----------------------------------------------------------------------------------------------

    def _texture(self, box: int, face: int, year: int, density: float, fine: bool):
        """Five levels of the texture of one face: (offset, texels along, texels up), painted when first seen.

        Level n has ``density / 2**n`` texels a metre. Walls seen from afar alone (``fine`` false) start at level 2.
        """
        lot, change = self._lots[box], self.config.appearance_change
        paint = _changes(lot.key, "repaint", year, change)
        shop = _changes(lot.key, "new sign", year, change)
        key = (box, face, paint, shop if lot.is_shop and lot.fronts[face] else 0, density, fine)
        if key not in self._textures:
            x0, x1, y0, y1 = lot.box
            width = y1 - y0 if face < 2 else x1 - x0
            painted = density if fine else density / 2
            canvas = _paint_facade(lot.style, lot, lot.fronts[face], width, paint, shop, painted)
            levels = []
            for (nu, nv), colour, glow in canvas.packed()[0 if fine else 1 :]:
                while self._used + nu * nv > self._atlas.shape[1]:
                    self._atlas = np.concatenate([self._atlas, np.zeros_like(self._atlas)], axis=1)
                self._atlas[0, self._used : self._used + nu * nv] = colour
                self._atlas[1, self._used : self._used + nu * nv] = glow
                levels.append((self._used, nu, nv))
                self._used += nu * nv
            if not fine:
                levels = [levels[0], levels[0], *levels]
            self._textures[key] = (levels + [levels[-1]] * 5)[:5]
        return self._textures[key]

    # -- the picture -------------------------------------------------------------------------------------------

    def render(
        self,
        pose: Pose,
        condition: str = "day",
        size: int | tuple[int, int] = PICTURE_SIZE,
        *,
        year: int = 0,
        visit: int = 0,
        labels: bool = False,
        depth: bool = False,
        oversample: int = 2,
    ):
        """Picture of the town from a pose.

        Parameters
        ----------
        pose : Pose
        condition : str
            One of :data:`CONDITIONS`: changes light and surface, never the geometry.
        size : int or (int, int)
            Height and width in pixels.
        year : int
            Years since the first: facades are repainted, signs change, trees grow.
        visit : int
            Which moment of that year: other cars, other persons, other clouds.
        labels, depth : bool
            Also return the label of each pixel (uint8, see :data:`LABELS`) and its depth along the viewing
            direction in metres (float32, infinite for the sky).
        oversample : int
            Rays per pixel along each side.

        Returns
        -------
        rgb : uint8 array of shape (H, W, 3)
            Followed by labels (H, W) and depth (H, W) where asked for, as a tuple.
        """
        _check_condition(condition)
        h_out, w_out = (size, size) if isinstance(size, (int, np.integer)) else size
        if min(h_out, w_out) < 8:
            raise ValueError(f"size must be at least 8 pixels a side, got {size}")
        if year < 0:
            raise ValueError(f"year must be 0 or later, got {year}")
        light = _LIGHTS[condition]
        view = _View(self, pose, h_out * oversample, w_out * oversample)
        sun_at = self._sun_azimuth + (1.4 if condition == "dusk" else 0.0)
        sun = np.sin(sun_at), np.cos(sun_at)
        self._paint_sky(view, light, sun_at, visit)
        self._paint_buildings(view, light, year, sun)
        self._paint_ground(view, light, sun)
        self._paint_objects(view, light, year, visit)
        picture = view.lit(light)
        if light.wet:
            picture = view.wet(picture, light.wet, _key(self.seed, "puddles"))
        picture = view.hazy(picture, light)
        n = oversample
        if n > 1:
            total = picture[:, 0::n, 0::n]
            for a in range(n):
                for b in range(n):
                    if a or b:
                        total = total + picture[:, a::n, b::n]
            picture = total * np.float32(1 / (n * n))
        at = (round(pose.east_m * 100), round(pose.north_m * 100), round(pose.heading_deg * 100))
        rgb = _develop(picture, light, self.config.sensor_noise, _key(*at, condition, year, visit))
        out = [rgb]
        if labels:
            out.append(np.ascontiguousarray(view.label[n // 2 :: n, n // 2 :: n]))
        if depth:
            out.append(np.ascontiguousarray(view.depth[n // 2 :: n, n // 2 :: n]))
        return out[0] if len(out) == 1 else tuple(out)

    def _paint_ground(self, view, light, sun):
        """Carriageway, markings, kerbs, pavements and grass where no wall stands in front."""
        line = np.where(np.isfinite(view.wall_at), -view.cam / np.maximum(view.wall_at, 1e-3), 0.0)
        pixel = np.flatnonzero((view.y[:, None] < line[None, :]) & (view.y[:, None] < -view.cam / _FAR_M))
        if not len(pixel):
            return
        row, column = pixel // view.w, pixel % view.w
        s = np.divide(-view.cam, view.y, out=np.ones_like(view.y), where=view.y < 0)[row]
        x = (view.ox + s * view.dx[column]).astype(np.float32)
        y = (view.oy + s * view.dy[column]).astype(np.float32)
        s = s.astype(np.float32)
        edges, offsets, tones, dashes, borders = [], [], [], [], []
        for direction, across in enumerate((x, y)):
            streets = self._streets[direction]
            which = np.zeros(across.shape, np.int8)
            for a, b in zip(streets, streets[1:], strict=False):
                which += across > np.float32((a.centre + b.centre) / 2)
            table = np.float32([[q.centre, q.half_road, q.tone, q.dashed, q.pavement] for q in streets])
            offset = across - table[:, 0][which]
            offsets.append(offset)
            edges.append(np.abs(offset) - table[:, 1][which])
            tones.append(table[:, 2][which])
            dashes.append(table[:, 3][which] > 0.5)
            borders.append(table[:, 4][which])
        ex, ey = edges
        edge = np.minimum(ex, ey)
        road = edge < 0
        fine = np.minimum(np.float32(25.0) / s, 1)
        grain = _quick_noise(x, y, 9.0) - np.float32(0.5)
        patch = _quick_noise(x, y, 0.45, _key(self.seed, "asphalt")) - np.float32(0.5)
        grey = np.where(road, np.float32(0.29) * np.where(ex < ey, *tones), np.float32(0.56))
        grey[road & (edge > -0.35)] *= np.float32(0.8)
        slab = edge > 0.22
        grey[~road & ~slab] = 0.70
        jx, jy = x * np.float32(1.25), y * np.float32(1.25)
        joint = (jx - np.floor(jx) < 0.06) | (jy - np.floor(jy) < 0.06)
        grey -= (slab & joint) * np.float32(0.09) * fine
        grey *= 1 + grain * fine * np.float32(0.22) + patch * np.float32(0.30)
        white = np.zeros(road.shape, bool)
        for across, along in ((0, 1), (1, 0)):
            other = edges[along]
            inside = edges[across] < -0.25
            dash = (y if across == 0 else x) * np.float32(1 / 6)
            stripe = offsets[across] * np.float32(1 / 1.1)
            white |= (
                inside
                & (other > 5.5)
                & dashes[across]
                & (np.abs(offsets[across]) < 0.09)
                & (dash - np.floor(dash) < 0.5)
            )
            white |= inside & (other > 1.0) & (other < 4.0) & (stripe - np.floor(stripe) < 0.5)
        white &= _quick_noise(x, y, 3.0, 11) > np.float32(0.2)
        grey[white] = 0.80
        rgb = grey * np.float32((1.0, 0.985, 0.96))[:, None]
        grass = (ex > borders[0] + 0.05) & (ey > borders[1] + 0.05)
        if grass.any():
            blade = np.float32(0.8) + np.float32(0.5) * grain[grass] + np.float32(0.5) * patch[grass]
            rgb[:, grass] = blade * np.float32((0.30, 0.40, 0.18))[:, None]
        if light.snow:
            cover = _quick_noise(x, y, 0.9, 3) + np.float32(0.35) * grain
            track = np.zeros(road.shape, bool)
            for e, offset in zip(edges, offsets, strict=True):
                track |= (e < 0) & (np.abs(np.abs(offset) - np.float32(1.5)) < 0.45)
            amount = np.clip(np.float32(2.4) * cover + np.float32(0.6) - np.float32(1.3) * track, 0, 1)
            rgb = rgb * (1 - amount) + amount * np.float32((0.90, 0.92, 0.96))[:, None]
        elif light.wet:
            rgb *= np.float32(0.70)
        bright = np.full(len(pixel), 0.9, np.float32)
        if light.sun[0] > 0.4:  # the shadow of the houses on the sun's side of each street
            for across, (own, other) in enumerate(((0, 1), (1, 0))):
                along = y if across == 0 else x
                reach = np.float32(8.5 * abs(sun[across]))
                cell = np.floor(along * np.float32(1 / 7))
                reach = reach * (np.float32(0.8) + np.float32(0.4) * _hash(cell, across, self.seed))
                line_at = borders[own] + np.abs(offsets[own]) - edges[own]  # half road + pavement
                distance = line_at - offsets[own] * np.float32(1 if sun[across] > 0 else -1)
                bright[(distance < reach) & (edges[own] < borders[own]) & (edges[other] > borders[other])] = (
                    0.14
                )
        label = np.where(road, np.uint8(_ROAD), np.uint8(_PAVEMENT))
        view.put(pixel, rgb, label, s, bright)
        if light.lamps:
            view.lamp.ravel()[pixel] = self._lamp_light(view, x, y, np.float32(_LAMP_HEIGHT_M**2))

    def _near_lamps(self, view):
        d2 = (self._lamps[:, 0] - view.ox) ** 2 + (self._lamps[:, 1] - view.oy) ** 2
        ahead = (self._lamps[:, 0] - view.ox) * view.fx + (self._lamps[:, 1] - view.oy) * view.fy
        near = np.flatnonzero((d2 < 60**2) & (ahead > -9))
        return self._lamps[near[np.argsort(d2[near], kind="stable")[:9]]]

    def _lamp_light(self, view, x, y, rise2):
        total = np.zeros(np.broadcast_shapes(x.shape, np.shape(rise2)), np.float32)
        for lamp in self._near_lamps(view):
            q = (x - np.float32(lamp[0])) ** 2 + (y - np.float32(lamp[1])) ** 2 + rise2
            q = np.float32(1) + q * np.float32(1 / 30)
            total += np.float32(1.9) / (q * q)
        return np.minimum(total, np.float32(1.15))

    def _paint_sky(self, view, light, sun_at, visit):
        """Gradient, clouds and the sun's side, by direction, so that turning the camera turns the sky."""
        bottom = int(np.count_nonzero(view.y >= -view.cam / _FAR_M))
        if not bottom:
            return
        dice = _Dice(self.seed, "sky", visit)
        up = np.clip(view.y[:bottom], 0, 1.6).astype(np.float32)
        mix = np.clip(up / (up + np.float32(0.35)) * np.float32(1.3), 0, 1)[:, None]
        azimuth = np.arctan2(view.dx, view.dy)
        side = (0.5 + 0.5 * np.cos(azimuth - sun_at)).astype(np.float32)[None, :]
        strip = _clouds()
        column = ((azimuth / (2 * np.pi) + dice.real()) % 1.0 * strip.shape[1]).astype(int) % strip.shape[1]
        row = (up * np.float32(79)).astype(int)
        cloud = strip[row[:, None], column[None, :]]
        cloud = np.clip((cloud - np.float32(0.75 - 0.5 * light.cover)) * np.float32(4), 0, 1)
        cloud *= np.clip(up * 6, 0, 1)[:, None] * np.float32(light.clouds)
        for plane, zenith, horizon, dark in zip(
            view.glow, light.zenith, light.horizon, (0.04, 0.05, 0.10), strict=True
        ):
            if light.lamps:  # after sunset the sun's side still burns, the other is dark
                low = np.float32(horizon) * (np.float32(0.45) + np.float32(0.55) * side * side) + np.float32(
                    dark
                )
                sky = low * (1 - mix) + np.float32(zenith) * mix
            else:
                sky = np.float32(horizon) * (1 - mix) + np.float32(zenith) * mix
                sky = sky * (np.float32(0.88) + np.float32(0.14) * side)
            plane[:bottom] = sky + cloud * (np.float32(1.05) - sky)
        view.depth[:bottom] = np.inf

    def _paint_buildings(self, view, light, year, sun_from):
        """Walls and roofs, by columns: the nearest boxes, the rows that each covers, then one look-up a pixel."""
        rel = self._centre - (view.ox, view.oy)
        forward = rel @ np.array([view.fx, view.fy])
        near = np.flatnonzero((forward > -20) & (np.abs(rel).max(1) < _VIEW_M + 20))
        if not len(near):  # a camera outside the town
            return
        box = self._box[near]
        with np.errstate(divide="ignore"):
            ix, iy = 1 / view.dx[:, None], 1 / view.dy[:, None]
        ix, iy = np.clip(ix, -1e9, 1e9), np.clip(iy, -1e9, 1e9)
        ax, bx = (box[:, 0] - view.ox) * ix, (box[:, 1] - view.ox) * ix
        ay, by = (box[:, 2] - view.oy) * iy, (box[:, 3] - view.oy) * iy
        in_x, in_y = np.minimum(ax, bx), np.minimum(ay, by)
        enter = np.maximum(in_x, in_y)
        leave = np.minimum(np.maximum(ax, bx), np.maximum(ay, by))
        enter = np.where((leave > enter) & (enter > 0.05), enter, np.inf)
        k_hits = min(_HITS, len(near))
        pick = np.argpartition(enter, k_hits - 1, axis=1)[:, :k_hits]
        t = np.take_along_axis(enter, pick, 1)
        order = np.argsort(t, axis=1, kind="stable")
        pick, t = np.take_along_axis(pick, order, 1), np.take_along_axis(t, order, 1)
        view.wall_at = t[:, 0]
        hit = np.isfinite(t)
        tt = np.where(hit, t, 1e6)
        through = np.where(hit, np.take_along_axis(leave, pick, 1), 2e6)
        by_x = np.take_along_axis(in_x, pick, 1) >= np.take_along_axis(in_y, pick, 1)
        face = np.where(by_x, np.where(view.dx[:, None] > 0, 0, 1), np.where(view.dy[:, None] > 0, 2, 3))
        which = near[pick]
        # position along the wall, left to right as seen from outside
        px, py = view.ox + tt * view.dx[:, None], view.oy + tt * view.dy[:, None]
        b = self._box[which]
        u = np.choose(face, [b[..., 3] - py, py - b[..., 2], px - b[..., 0], b[..., 1] - px])
        length = np.where(by_x, b[..., 3] - b[..., 2], b[..., 1] - b[..., 0])
        depth_m = np.where(by_x, b[..., 1] - b[..., 0], b[..., 3] - b[..., 2])
        incidence = np.where(by_x, np.abs(view.dx)[:, None], np.abs(view.dy)[:, None])
        height, ridge = self._height[which], self._ridge[which]
        gable = self._ridge_x[which] == by_x
        wall_top = height + np.where(gable, ridge * (1 - np.abs(2 * u / length - 1)), 0.0)
        wall_y = np.where(hit, (wall_top - view.cam) / tt, -1e9)
        t_ridge = np.minimum(tt + depth_m / 2 / np.maximum(incidence, 1e-6), through)
        rise = np.where(gable, 0.0, ridge * np.minimum(1.0, (t_ridge - tt) * incidence / (depth_m / 2)))
        roof_y = np.maximum(wall_y, np.where(hit, (height + rise - view.cam) / t_ridge, -1e9))
        cover = np.maximum.accumulate(roof_y, axis=1)
        seen = hit & (roof_y > np.concatenate([np.full((view.w, 1), -1e8), cover[:, :-1]], axis=1))
        # texture addresses of the walls in sight; a full atlas starts afresh, walls are painted again when seen
        if self._used > 0.7 * _ATLAS_TEXELS:
            self._textures, self._used = {}, 0
        density = 8.0 if view.focal < 110 else 16.0 if view.focal < 330 else 32.0
        base, up_scale, n_up = (np.zeros(t.shape, np.int64), np.zeros(t.shape), np.ones(t.shape, np.int64))
        columns, ks = np.nonzero(seen)
        if not len(columns):  # a camera that looks out of the town, past every wall
            return
        walls, inverse = np.unique(which[columns, ks] * 4 + face[columns, ks], return_inverse=True)
        cosine = incidence[columns, ks] / np.sqrt(view.dx[columns] ** 2 + view.dy[columns] ** 2)
        texels = tt[columns, ks] / view.focal * density / np.maximum(cosine, 0.06) ** 0.5
        level = np.searchsorted(np.array([1.5, 3.0, 6.0, 12.0]), texels)
        finest = np.full(len(walls), 5)
        np.minimum.at(finest, inverse, level)
        table = np.array(
            [
                self._texture(int(wall) // 4, int(wall) % 4, year, density, bool(f < 2 and n > 2))
                for wall, f, n in zip(walls, finest, np.bincount(inverse), strict=True)
            ]
        )
        offset, nu, nv = table[inverse, level].T
        iu = np.clip((u[columns, ks] / length[columns, ks] * nu).astype(np.int64), 0, nu - 1)
        base[columns, ks] = offset + iu * nv
        total = (height + ridge + 0.05)[columns, ks]
        up_scale[columns, ks] = nv / total
        n_up[columns, ks] = nv - 1
        # which box each pixel shows
        index = np.zeros((view.h, view.w), np.int8)
        rows = view.y[:, None]
        for k in range(k_hits):
            index += rows >= cover[:, k][None, :]
        ground_y = np.where(hit[:, 0], -view.cam / tt[:, 0], 0.0)
        pixel = np.flatnonzero((index < k_hits) & (rows >= ground_y[None, :]))
        row, column = pixel // view.w, pixel % view.w
        ck = column * k_hits + index.reshape(-1)[pixel]
        y = view.y[row]
        tf = tt.reshape(-1)
        tp = tf[ck]
        up = view.cam + y * tp
        on_wall = y < wall_y.reshape(-1)[ck]
        iv = np.clip((up * up_scale.reshape(-1)[ck]).astype(np.int64), 0, n_up.reshape(-1)[ck])
        where = base.reshape(-1)[ck] + iv
        texel = self._atlas[0][where].view(np.uint8).reshape(-1, 4)
        rgb = texel.astype(np.float32).T[:3]
        label = texel[:, 3].copy()
        facing = np.clip(_FACE_NORMALS @ np.array(sun_from), 0, 1)
        sun = (np.float32(0.18) + np.float32(0.95) * facing.astype(np.float32))[face].reshape(-1)[ck]
        roof = np.flatnonzero(~on_wall)
        if len(roof):
            tile = _hash(np.floor(up[roof] * 5), ck[roof] // 7, 9) * np.float32(0.16) + np.float32(0.9)
            tiled = (self._roof_colour[which.reshape(-1)[ck[roof]]] * tile[:, None]).T
            if light.snow:
                tiled = tiled * np.float32(0.15) + np.float32((0.78, 0.80, 0.84))[:, None]
            rgb[:, roof] = tiled * np.float32(255)
            label[roof] = _ROOF
            sun[roof] = 0.7
        near_ground = np.minimum(up.astype(np.float32), 2.0)
        soot = (np.float32(0.82) + np.float32(0.09) * near_ground) * np.float32(1 / 255)
        view.put(pixel, [channel * soot for channel in rgb], label, tp, sun)
        glow = None
        if light.glow:
            glow = self._atlas[1][where].view(np.uint8).reshape(-1, 4).astype(np.float32) * np.float32(
                light.glow / 255
            )
            glow[roof] = 0
        for k, plane in enumerate(view.glow.reshape(3, -1)):
            plane[pixel] = 0 if glow is None else glow[:, k]
        if light.lamps:
            rise2 = (up.astype(np.float32) - np.float32(_LAMP_HEIGHT_M - 1)) ** 2
            lit = self._lamp_light(
                view, px.reshape(-1)[ck].astype(np.float32), py.reshape(-1)[ck].astype(np.float32), rise2
            )
            view.lamp.ravel()[pixel] = lit * np.float32(0.8)

    def _paint_objects(self, view, light, year, visit):
        """Cars, trees, lamps and persons, far to near, hidden by the nearest wall of each column."""
        share, todo = self.config.occlusion, []
        for kind, things in (
            ("car", self._cars),
            ("tree", self._trees),
            ("lamp", self._lamps),
            ("walker", self._walkers),
        ):
            if not len(things):
                continue
            rx, ry = things[:, 0] - view.ox, things[:, 1] - view.oy
            ahead, aside = rx * view.fx + ry * view.fy, rx * view.fy - ry * view.fx
            # nearer than this a car cuts the picture's plane, and a tree would be all that is seen
            start, reach = {
                "car": (0.5, 70.0),
                "tree": (3.0, 110.0),
                "lamp": (1.2, 80.0),
                "walker": (1.2, 45.0),
            }[kind]
            margin = 4.5
            ok = (ahead > start) & (ahead < reach) & (np.abs(aside) < ahead * view.half + margin)
            for i in np.flatnonzero(ok):
                x, y, a, b, key = things[i]
                if kind == "car":
                    dice = _Dice(int(key), year, visit)
                    if not dice.chance(0.92 * share):
                        continue
                    todo.append((ahead[i], kind, aside[i], things[i], dice))
                elif kind == "walker":
                    dice = _Dice(int(key), year, visit)
                    if dice.chance(0.3 * share):
                        todo.append((ahead[i], kind, aside[i], things[i], dice))
                else:
                    todo.append((ahead[i], kind, aside[i], things[i], None))
        todo.sort(key=lambda item: -item[0])
        for ahead, kind, aside, thing, dice in todo[-70:]:
            if kind == "car":
                self._paint_car(view, light, ahead, thing, dice)
            elif kind == "tree":
                size = thing[2] * (1 + 0.06 * year)
                tint = np.float32((1, 1, 1, 1))
                if light.snow:
                    tint = np.float32((0.75, 0.72, 0.8, 1.0))
                self._paint_card(view, light, _card(_CARD_TREE, int(thing[3])), ahead, aside, thing, size, size * 0.8,
                                 _TREE, tint, whiten=0.45 * light.snow)  # fmt: skip
            elif kind == "walker":
                self._paint_card(view, light, _card(_CARD_PERSON, dice.integer(16)), ahead, aside, thing, 1.55 + 0.3 * dice.real(),
                                 0.85, _PERSON)  # fmt: skip
            else:
                self._paint_card(
                    view, light, _card(_CARD_LAMP, 0), ahead, aside, thing, _LAMP_HEIGHT_M, 1.3, _LAMP
                )
                if light.lamps:
                    view.halo(ahead, aside, _LAMP_HEIGHT_M * 0.95, light.lamps)

    def _paint_card(self, view, light, levels, ahead, aside, thing, tall, wide, label, tint=None, whiten=0.0):
        r0, r1 = view.row_of(tall, ahead), view.row_of(0.0, ahead)
        c0, c1 = view.column_of(aside - wide / 2, ahead), view.column_of(aside + wide / 2, ahead)
        a, b = max(0, int(np.ceil(r0 - 0.5))), min(view.h, int(np.ceil(r1 - 0.5)))
        c, d = max(0, int(np.ceil(c0 - 0.5))), min(view.w, int(np.ceil(c1 - 0.5)))
        if a >= b or c >= d:
            return
        visible = np.flatnonzero(view.wall_at[c:d] > ahead)
        if not len(visible):
            return
        c, d = c + visible[0], c + visible[-1] + 1
        level = 0
        while level + 1 < len(levels) and levels[level].shape[0] > 1.6 * (r1 - r0):
            level += 1
        card = levels[level]
        iv = np.clip(
            ((np.arange(a, b) + 0.5 - r0) / (r1 - r0) * card.shape[0]).astype(int), 0, card.shape[0] - 1
        )
        iu = np.clip(
            ((np.arange(c, d) + 0.5 - c0) / (c1 - c0) * card.shape[1]).astype(int), 0, card.shape[1] - 1
        )
        patch = card[iv[:, None], iu[None, :]]
        if visible[-1] - visible[0] + 1 != len(visible):
            patch = patch * (view.wall_at[c:d] > ahead)[None, :, None]
        if tint is not None:
            patch = patch * tint
        alpha = patch[..., 3]
        colour = patch[..., :3].transpose(2, 0, 1)
        if whiten:
            colour = colour * np.float32(1 - whiten) + alpha * np.float32(whiten * 0.9)
        keep = 1 - alpha
        s = np.s_[a:b, c:d]
        view.rgb[:, a:b, c:d] = view.rgb[:, a:b, c:d] * keep + colour
        view.glow[:, a:b, c:d] *= keep
        solid = alpha > 0.5
        view.label[s][solid] = label
        view.depth[s][solid] = ahead
        view.sun[s][solid] = 0.6
        if light.lamps:
            at = self._lamp_light(view, np.float32(thing[0]), np.float32(thing[1]), np.float32(9.0))
            view.lamp[s][solid] = at * np.float32(0.9)

    def _paint_car(self, view, light, ahead, car, dice):
        """Two boxes, body and cabin; tops are seen because the camera stands higher."""
        x, y, along_x = car[0], car[1], car[2] == 1.0
        colour, variant = np.float32(dice.pick(_CAR_COLOURS)), dice.integer(2)
        shift, tall = dice.real(-0.5, 0.5), dice.pick((0.0, 0.0, 0.12, 0.45))
        forward = dice.pick((-1, 1))
        if along_x:
            x += shift
        else:
            y += shift
        lamp = (
            float(self._lamp_light(view, np.float32(x), np.float32(y), np.float32(16.0)))
            if light.lamps
            else 0.0
        )
        parts = (
            ("shadow", 2.25, 1.05, 0.0, 0.02, 0.0),
            ("body", 2.1, 0.87, 0.05, 0.86, 0.0),
            ("cabin", 1.2, 0.76, 0.86, 1.42 + tall, 0.22),
        )
        for part, half_l, half_w, z0, z1, back in parts[0 if ahead < 25 else 1 :]:
            if back and tall > 0.3:
                half_l, back = 1.75, 0.3
            cx, cy = (x - forward * back, y) if along_x else (x, y - forward * back)
            hx, hy = (half_l, half_w) if along_x else (half_w, half_l)
            self._paint_box(
                view,
                light,
                (cx - hx, cx + hx, cy - hy, cy + hy),
                z0,
                z1,
                along_x,
                colour,
                variant,
                part,
                lamp,
            )

    def _paint_box(self, view, light, box, z0, z1, along_x, colour, variant, part, lamp):
        x0, x1, y0, y1 = box
        corners = [((x - view.ox), (y - view.oy)) for x in (x0, x1) for y in (y0, y1)]
        ahead = [p * view.fx + q * view.fy for p, q in corners]
        if min(ahead) < 0.6:
            return
        col = [view.column_of(p * view.fy - q * view.fx, s) for (p, q), s in zip(corners, ahead, strict=True)]
        c, d = max(0, int(min(col))), min(view.w, int(max(col)) + 2)
        if c >= d:
            return
        dx, dy = view.dx[c:d], view.dy[c:d]
        with np.errstate(divide="ignore", invalid="ignore"):
            ax, bx = (x0 - view.ox) / dx, (x1 - view.ox) / dx
            ay, by = (y0 - view.oy) / dy, (y1 - view.oy) / dy
        in_x, in_y = np.minimum(ax, bx), np.minimum(ay, by)
        enter, leave = np.maximum(in_x, in_y), np.minimum(np.maximum(ax, bx), np.maximum(ay, by))
        ok = (leave > enter) & (enter > 0.3) & (enter < view.wall_at[c:d])
        if not ok.any():
            return
        used = np.flatnonzero(ok)
        c, d = c + used[0], c + used[-1] + 1
        ok, enter, leave = (
            ok[used[0] : used[-1] + 1],
            enter[used[0] : used[-1] + 1],
            leave[used[0] : used[-1] + 1],
        )
        by_x = (in_x >= in_y)[used[0] : used[-1] + 1]
        enter = np.where(ok, enter, 1.0)
        leave = np.where(ok, leave, 1.0)
        low, high, far = (z0 - view.cam) / enter, (z1 - view.cam) / enter, (z1 - view.cam) / leave
        top_y = np.maximum(high, far).max()
        a = max(0, int(np.floor(view.h / 2 - 0.5 - (top_y - view.shift) * view.focal)))
        b = min(view.h, int(np.ceil(view.h / 2 - 0.5 - (low[ok].min() - view.shift) * view.focal)) + 1)
        if a >= b:
            return
        rows = view.y[a:b, None]
        wall = (rows >= low) & (rows < high) & ok
        top = (rows >= high) & (rows < far) & ok
        if part == "shadow":
            view.rgb[:, a:b, c:d][:, top] *= np.float32(0.45)
            return
        px, py = view.ox + enter * view.dx[c:d], view.oy + enter * view.dy[c:d]
        u = np.where(by_x, (py - y0) / (y1 - y0), (px - x0) / (x1 - x0)).clip(0, 0.999)
        v = ((view.cam + rows * enter - z0) / (z1 - z0)).clip(0, 0.999)
        end = by_x == along_x
        body = np.ones(wall.shape, np.float32)
        rgb = np.zeros((3, *wall.shape), np.float32)
        if part == "cabin":  # glass between pillars
            pillar = (u < 0.07) | (u > 0.93) | ((np.abs(u - 0.5) < 0.035) & ~end)
            glass = wall & ~pillar[None, :] & (v < 0.84) & (v > 0.04)
            body[glass] = 0
            rgb[:, glass] = np.float32((0.13, 0.16, 0.20))[:, None] + (v[glass] * 0.22).astype(np.float32)
        else:
            for is_end in (False, True):
                columns = np.flatnonzero(end == is_end)
                if len(columns):
                    paint, rest = _car_side(variant, is_end)
                    iv = (v[:, columns] * paint.shape[0]).astype(int)
                    iu = (u[columns] * paint.shape[1]).astype(int)[None, :]
                    body[:, columns], rgb[:, :, columns] = paint[iv, iu], rest[:, iv, iu]
        rgb += body * colour[:, None, None]
        roof = (
            np.float32((0.92, 0.94, 0.97))
            if light.snow
            else np.minimum(colour * np.float32(1.15) + np.float32(0.06), 1)
        )
        rgb[:, top] = roof[:, None]
        on = wall | top
        s = np.s_[a:b, c:d]
        view.rgb[:, a:b, c:d][:, on] = rgb[:, on]
        view.glow[:, a:b, c:d][:, on] = 0
        view.label[s][on] = _CAR
        view.depth[s][on] = np.broadcast_to(enter.astype(np.float32), on.shape)[on]
        view.sun[s][on] = np.where(top, np.float32(1.0), np.where(end, np.float32(0.5), np.float32(0.7)))[on]
        if light.lamps:
            view.lamp[s][on] = lamp


class _View:
    """The buffers of one picture and the arithmetic of its camera (all in the town's own metres)."""

    def __init__(self, town: Town, pose: Pose, h: int, w: int):
        self.h, self.w = h, w
        self.ox, self.oy = (float(a) for a in town._from_utm(pose.east_m, pose.north_m))
        angle = np.deg2rad(pose.heading_deg + town.turn_deg)
        self.fx, self.fy = float(np.sin(angle)), float(np.cos(angle))
        self.half = float(np.tan(np.deg2rad(pose.fov_deg) / 2))
        self.focal = w / 2 / self.half
        self.cam, self.shift = pose.height_m, pose.tilt * self.half
        across = (np.arange(w) + 0.5 - w / 2) / self.focal
        self.dx, self.dy = self.fx + across * self.fy, self.fy - across * self.fx
        self.y = (h / 2 - 0.5 - np.arange(h)) / self.focal + self.shift
        self.horizon = int(np.searchsorted(-self.y, 0.0, side="right"))
        # colours lie plane by plane, (3, h, w): numpy is several times slower on a last axis of 3
        self.rgb = np.zeros((3, h, w), np.float32)
        self.glow = np.zeros((3, h, w), np.float32)
        self.sun = np.zeros((h, w), np.float32)
        self.lamp = np.zeros((h, w), np.float32)
        self.label = np.zeros((h, w), np.uint8)
        self.depth = np.full((h, w), np.inf, np.float32)
        self.wall_at = np.full(w, np.inf)

    def put(self, pixel, rgb, label, depth, sun):
        """Write what opaque surfaces show, at flat pixel numbers."""
        for plane, values in zip(self.rgb.reshape(3, -1), rgb, strict=True):
            plane[pixel] = values
        self.label.ravel()[pixel] = label
        self.depth.ravel()[pixel] = depth
        self.sun.ravel()[pixel] = sun

    def row_of(self, height, ahead):
        return self.h / 2 - ((height - self.cam) / ahead - self.shift) * self.focal

    def column_of(self, aside, ahead):
        return self.w / 2 + aside / ahead * self.focal

    def halo(self, ahead, aside, height, strength):
        """A lamp seen from the street: additive, round, larger when near."""
        row, column = self.row_of(height, ahead), self.column_of(aside, ahead)
        r = max(2.0, 0.9 / ahead * self.focal)
        a, b = max(0, int(row - r)), min(self.h, int(row + r) + 1)
        c, d = max(0, int(column - r)), min(self.w, int(column + r) + 1)
        if a >= b or c >= d:
            return
        y = (np.arange(a, b) + 0.5 - row)[:, None] / r
        x = (np.arange(c, d) + 0.5 - column)[None, :] / r
        spot = np.clip(1 - (x * x + y * y), 0, 1).astype(np.float32) ** 3 * (self.wall_at[c:d] > ahead)
        self.glow[:, a:b, c:d] += (
            spot * np.float32((1.3 * strength, 1.1 * strength, 0.78 * strength))[:, None, None]
        )

    def lit(self, light: _Light) -> np.ndarray:
        """Colour (3, h, w): surface times the light that falls on it, plus its own."""
        out = np.empty_like(self.rgb)
        for k in range(3):
            np.multiply(self.sun, np.float32(light.sun[k]), out=out[k])
            out[k] += np.float32(light.ambient[k])
            if light.lamps:
                out[k] += self.lamp * (_LAMP_COLOUR[k] * np.float32(light.lamps))
        out *= self.rgb
        out += self.glow
        return out

    def wet(self, picture, amount, key) -> np.ndarray:
        """Mirror the scene in road and pavement: exact for the nearest wall of each column."""
        top = self.horizon
        if top >= self.h:
            return picture
        y = self.y[top:, None]
        mirrored = -y - np.where(np.isfinite(self.wall_at), 2 * self.cam / self.wall_at, 0.0)[None, :]
        row = self.h / 2 - 0.5 - (mirrored - self.shift) * self.focal
        far = 1 / np.maximum(-y, 0.02)
        column = np.arange(self.w)[None, :] / self.w
        ripple = _noise(column * 9 + 0.2 * far, far * 1.6, key)
        puddle = _noise((column - 0.5) * far * 1.1, far * 0.5, key + 1)
        row = np.clip(row + (ripple - 0.5) * (self.h / 42), 0, self.h - 1).astype(int)
        other = picture[:, row, np.arange(self.w)[None, :]]
        ground = (self.label[top:] == _ROAD) | (self.label[top:] == _PAVEMENT)
        share = np.clip(0.46 - 0.32 * np.minimum(-y, 0.9) + 1.1 * np.clip(puddle - 0.5, 0, 0.25), 0, 0.75)
        share = share * amount * ground
        share = share.astype(np.float32)
        picture[:, top:] = picture[:, top:] * (1 - share) + other * share
        return picture

    def hazy(self, picture, light: _Light) -> np.ndarray:
        haze = np.exp2(-self.depth / np.float32(light.haze_m))
        haze[np.isinf(self.depth)] = 1
        picture *= haze
        haze = 1 - haze
        for k in range(3):
            picture[k] += haze * np.float32(light.horizon[k])
        return picture


def _develop(picture, light: _Light, noise: float, key: int) -> np.ndarray:
    """Falling rain or snow, exposure, vignette, sensor noise, grey levels."""
    _, h, w = picture.shape
    dice = _Dice(key, "camera")
    y, x = np.arange(h)[:, None], np.arange(w)[None, :]
    if light.wet:
        slant = (x + (y * 3) // 16).astype(np.int64)
        streak = (
            _hash(slant, (y + (_hash(slant, 0, key) * 64).astype(np.int64)) // max(4, h // 12), key + 1)
            > 0.965
        )
        picture = picture + streak * np.float32(0.10)
    if light.snow:
        for scale, part in ((1, 0.988), (2, 0.99), (3, 0.993)):
            flake = _hash(x // scale, y // scale, key + scale) > part
            picture = np.where(flake, picture * np.float32(0.35) + np.float32(0.62), picture)
    exposure = np.float32(dice.real(0.88, 1.12))
    r2 = ((x - w / 2) / (w / 2)) ** 2 + ((y - h / 2) / (h / 2)) ** 2
    picture = picture * ((np.float32(1.02) - np.float32(0.10) * r2.astype(np.float32)) * exposure)
    over = np.maximum(picture - np.float32(0.7), 0)  # highlights roll off, as film does
    picture = (np.maximum(picture, 0) - over + over / (1 + np.float32(1.6) * over)) * np.float32(255)
    if noise:
        k = np.arange(3)[:, None, None] * 4096
        a, b = _hash(x + k, y, key + 11), _hash(x + k, y, key + 12)
        strength = noise * (1.6 if light.lamps > 0.9 else 1.0)
        picture = picture + (a + b - 1) * np.float32(strength)
    grey = np.clip(picture + np.float32(0.5), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(grey.transpose(1, 2, 0))


# ---------------------------------------------------------------------------------------------------------------
# Where the pictures are taken, and the folder of a town


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One picture of a written town: the pose, the moment, and where the file goes."""

    part: str  # e.g. "train/database"
    pose: Pose
    condition: str
    year: int
    visit: int
    name: str


def _stations(town: Town, spacing_m: float):
    """Street by street: (town metres of a station, heading of the street in town degrees, running number)."""
    number = 0
    for k in range(town.config.streets):
        for direction in range(2):
            street, others = town._streets[direction][k], town._streets[1 - direction]
            low, high = others[0].centre - 22.0, others[-1].centre + 22.0
            for i in range(int((high - low) / spacing_m) + 1):
                yield direction, street, low + i * spacing_m, number
                number += 1


def plan_shots(town: Town, part: str, images: int | None = None) -> list[Shot]:
    """The pictures of one town in one part of the folder.

    Parameters
    ----------
    town : Town
    part : str
        ``"train/database"``: all conditions and years; stations every ``train_spacing_m``.
        ``"val/database"``, ``"test/database"``: references, day pictures of the first year, every
        ``reference_spacing_m``. ``"val/queries"``, ``"test/queries"``: one for each reference, near it, jittered in
        position, heading and field of view, in another year and under ``query_conditions`` in turn.
    images : int, optional
        Only the first so many along the streets; all when None.

    Returns
    -------
    list of Shot
        Two for each station: along the street and across it, in turn forwards and backwards, left and right.
    """
    parts = ("train/database", "val/database", "val/queries", "test/database", "test/queries")
    if part not in parts:
        raise ValueError(f"part must be one of {', '.join(parts)}, got {part!r}")
    config, shots = town.config, []
    split, kind = part.split("/")
    spacing = config.train_spacing_m if split == "train" else config.reference_spacing_m
    conditions = CONDITIONS if split == "train" else config.query_conditions
    for direction, street, at, number in _stations(town, spacing):
        for look in range(2):
            index = len(shots)
            if images is not None and index >= images:
                return shots
            dice = _Dice(town.seed, part, index)
            lane = 0.22 * street.half_road * (1 if number % 2 else -1)
            turn = (0.0, -90.0, 180.0, 90.0)[2 * (number % 2) + look] + 90.0 * direction
            fov, height, tilt = config.fov_deg, Pose.height_m, Pose.tilt
            jittered = (split, kind) not in (("val", "database"), ("test", "database"))
            if jittered:
                at_m = at + config.viewpoint_jitter_m * dice.real(-1, 1)
                lane += config.sideways_jitter_m * dice.real(-1, 1)
                turn += config.heading_jitter_deg * dice.real(-1, 1)
                fov += config.fov_jitter_deg * dice.real(-1, 1)
                height += config.height_jitter_m * dice.real(-1, 1)
                tilt += config.tilt_jitter * dice.real(-1, 1)
                year = dice.integer(config.years + 1)
                if kind == "queries" and config.years:
                    year = 1 + dice.integer(config.years)
                # a fresh order of the conditions every round, so that none goes with one direction of view
                turns = list(conditions)
                shuffle = _Dice(town.seed, part, "conditions", index // len(turns))
                turns = [turns.pop(shuffle.integer(len(turns))) for _ in range(len(turns))]
                condition, visit = turns[index % len(turns)], index + 1
            else:
                at_m, condition, year, visit = at, "day", 0, index + 1
            across = street.centre + lane
            east, north = town.to_utm(*((across, at_m) if direction == 0 else (at_m, across)))
            pose = Pose(
                east_m=round(float(east), 2),
                north_m=round(float(north), 2),
                heading_deg=round((turn - town.turn_deg) % 360, 2),
                fov_deg=round(fov, 2),
                height_m=round(height, 2),
                tilt=round(tilt, 3),
            )
            month = 1 + dice.integer(12)
            name = folder_name(
                pose.east_m,
                pose.north_m,
                UTM_ZONE,
                UTM_LETTER,
                pano_id=f"{town.name}{kind[0]}{index:05d}",
                heading_deg=pose.heading_deg,
                height=pose.height_m,
                timestamp=f"{FIRST_YEAR + year}{month:02d}01",
                note=f"{town.name}-{condition}",
            )
            shots.append(Shot(part=part, pose=pose, condition=condition, year=year, visit=visit, name=name))
    return shots


def images_of(settings: dict, split: str) -> int | None:
    """How many pictures each town of a split has, by the ``settings.json`` of a written folder; None: every pose."""
    few = settings.get("train_images_per_town") if split == "train" else None
    return few or settings["images_per_town"]


def _shots_of(settings: dict) -> list[tuple[int, Shot]]:
    """All pictures of a folder, each with the seed of its town, town by town."""
    config, out = TownConfig(**settings["config"]), []
    for split, parts in (
        ("train", ("database",)),
        ("val", ("database", "queries")),
        ("test", ("database", "queries")),
    ):
        for seed in settings["seeds"][split]:
            town = Town(seed, config)
            for kind in parts:
                shots = plan_shots(town, f"{split}/{kind}", images_of(settings, split))
                out += [(seed, shot) for shot in shots]
    return out


def _render_files(folder: Path, settings: dict, tell, share: tuple[int, int] = (0, 1)) -> None:
    """Render what is not there yet; worker ``share[0]`` of ``share[1]`` takes a run of the pictures.

    A run holds most of its towns whole, so that few walls are painted by two workers.
    """
    config, size, town = TownConfig(**settings["config"]), settings["size"], None
    shots = _shots_of(settings)
    first, last = (len(shots) * (share[0] + k) // share[1] for k in (0, 1))
    for seed, shot in shots[first:last]:
        path = folder / "images" / shot.part / shot.name
        if path.exists():
            continue
        if town is None or town.seed != seed:
            town = Town(seed, config)
        picture = town.render(shot.pose, shot.condition, size, year=shot.year, visit=shot.visit)
        with atomic_path(path, sync=False) as temporary:
            Image.fromarray(picture).save(temporary, quality=settings["quality"])
        tell()


def _worker() -> None:
    """A process of its own: the settings come as JSON on standard input, a line goes out for each picture."""
    job = json.load(sys.stdin)
    _render_files(Path(job["folder"]), job["settings"], lambda: print(flush=True), tuple(job["share"]))


def write_town(
    folder: str | os.PathLike,
    *,
    train_seeds=(1000, 1001),
    val_seeds=(1100,),
    test_seeds=(1110,),
    images_per_town: int | None = None,
    train_images_per_town: int | None = None,
    size: int = PICTURE_SIZE,
    config: TownConfig | None = None,
    workers: int = 1,
    progress: bool = True,
    quality: int = 92,
) -> Path:
    """Render towns into a folder that any tool of the field reads.

    ``<folder>/images/train/database`` and ``<folder>/images/{val,test}/{database,queries}`` are filled with files
    ``@UTM_east@UTM_north@zone@letter@lat@lon@pano_id@tile@heading@pitch@roll@height@timestamp@note@.jpg``; the note is
    ``town<seed>-<condition>`` (:func:`city_of`, :func:`condition_of`). Every file appears whole or not at all, a
    killed run continues where it stopped, and ``manifest.json`` comes last: with it, a second call returns at once.

    Parameters
    ----------
    folder : path
    train_seeds, val_seeds, test_seeds : iterable of int
        Towns of each split, from :data:`SEED_RANGES`; may be empty.
    images_per_town : int, optional
        References (or training pictures), and as many queries, of each town: the first so many along the streets;
        None takes every pose, about 500 a training town and 200 + 200 a test town.
    train_images_per_town : int, optional
        The same for the training towns alone, where it goes before `images_per_town`.
    size : int
        Pixels a side.
    config : TownConfig, optional
        Size and difficulty of the towns.
    workers : int
        Processes that render.
    progress : bool
        Show a bar.
    quality : int
        Of the JPEG files, 1 to 95.

    Returns
    -------
    pathlib.Path
        The folder.

    Raises
    ------
    ValueError
        For a seed outside its range, and for a folder that holds anything but this town.
    """
    folder, config = Path(folder), config or TownConfig()
    seeds = {"train": train_seeds, "val": val_seeds, "test": test_seeds}
    for split, given in seeds.items():
        seeds[split] = [int(s) for s in given]
        for s in seeds[split]:
            allowed = SEED_RANGES[split]
            if s not in allowed:
                raise ValueError(f"{split}_seeds must lie in {allowed.start} to {allowed.stop - 1}, got {s}")
        if len(set(seeds[split])) < len(seeds[split]):
            raise ValueError(f"{split}_seeds names a town twice: {seeds[split]}")
    for name, value, low, high in (
        ("size", size, 16, 2048),
        ("workers", workers, 1, 256),
        ("quality", quality, 1, 95),
    ):
        if not low <= value <= high:
            raise ValueError(f"{name} must lie between {low} and {high}, got {value}")
    for name, value in (
        ("images_per_town", images_per_town),
        ("train_images_per_town", train_images_per_town),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, or None for every pose, got {value}")
    settings = {
        "picture_version": PICTURE_VERSION,
        "seeds": seeds,
        "images_per_town": images_per_town,
        "size": int(size),
        "quality": int(quality),
        "config": {**asdict(config), "query_conditions": list(config.query_conditions)},
    }
    if train_images_per_town is not None:  # folders written without it stay as they are
        settings["train_images_per_town"] = train_images_per_town
    plan, manifest = folder / "settings.json", folder / "manifest.json"
    if plan.exists():
        found = read_json(plan)
        if found != settings:
            differing = sorted(k for k in {*found, *settings} if found.get(k) != settings.get(k))
            raise ValueError(
                f"{folder} holds a town with other settings ({', '.join(differing)} differ): "
                "name another folder, or delete this one"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no town: name another folder")
    else:
        write_json(plan, settings)
    wanted = [folder / "images" / shot.part / shot.name for _, shot in _shots_of(settings)]
    present = set()
    for part in {path.parent for path in wanted}:
        part.mkdir(parents=True, exist_ok=True)
        for entry in os.scandir(part):
            if entry.name.startswith(".tmp-"):
                os.unlink(entry.path)
            else:
                present.add(entry.path)
    missing = sum(str(path) not in present for path in wanted)
    if not missing and manifest.exists():
        return folder
    started = time.perf_counter()
    with tqdm(total=missing, desc=f"rendering {folder.name}", unit="picture", disable=not progress) as bar:
        if workers == 1 or missing < 2 * workers:
            _render_files(folder, settings, bar.update)
        else:
            _render_in_processes(folder, settings, workers, bar)
    write_json(
        manifest,
        {
            **settings,
            "pictures": len(wanted),
            "rendered_now": missing,
            "seconds": round(time.perf_counter() - started, 2),
            "utm_zone": f"{UTM_ZONE}{UTM_LETTER} (a mock: the towns lie nowhere)",
        },
    )
    return folder


def _render_in_processes(folder: Path, settings: dict, workers: int, bar) -> None:
    """Plain processes rather than a pool: these work from scripts, notebooks and standard input alike."""
    command = [sys.executable, "-c", "from townscape.folder import _worker; _worker()"]
    where = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parents[1]), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        ),
    }
    running = []
    try:
        for k in range(workers):
            job = {"folder": str(folder.resolve()), "settings": settings, "share": (k, workers)}
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=where,
            )
            running.append(process)
            process.stdin.write(json.dumps(job))
            process.stdin.close()
        with ThreadPoolExecutor(workers) as listeners:
            list(listeners.map(lambda process: [bar.update() for _ in process.stdout], running))
        for process in running:
            trouble = process.stderr.read()
            if process.wait():
                raise RuntimeError(
                    f"a rendering process of {folder} failed: {trouble.strip().splitlines()[-1:]}"
                )
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()


def ensure_town(
    data_folder: str | os.PathLike,
    name: str,
    *,
    images: int | None = None,
    size: int = PICTURE_SIZE,
    workers: int | None = None,
    progress: bool = False,
) -> Path:
    """The folder ``data_folder/name``, rendered first if `name` starts with ``town`` and it is not there yet.

    Notebooks call this so that their default data set needs no download; any other name is left to its owner.

    Parameters
    ----------
    data_folder : path
    name : str
    images : int, optional
        ``images_per_town`` of :func:`write_town`, with its two training towns, one for validation and one for test.
        None or 0: the default data set, ``IMAGES_PER_TOWN`` pictures of each town of ``DEFAULT_SEEDS``; what is
        learned on few towns does not carry over to another.
    size, progress
        As for :func:`write_town`.
    workers : int, optional
        Processes that render; None takes every core.

    Raises
    ------
    FileNotFoundError
        If there is no folder `data_folder`: a town is never rendered into a misspelt one.
    """
    folder = Path(data_folder) / name
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {folder.parent.absolute()} to find or render {name} in")
    if name.startswith("town"):
        write_town(
            folder,
            images_per_town=images or IMAGES_PER_TOWN,
            **({} if images else {f"{split}_seeds": seeds for split, seeds in DEFAULT_SEEDS.items()}),
            size=size,
            workers=workers or cores(),
            progress=progress,
        )
    return folder


def main(arguments: list[str] | None = None) -> int:
    """The command ``python -m townscape.folder data/town``."""
    parser = argparse.ArgumentParser(
        prog="python -m townscape.folder", description="Render the default set of towns, or go on with it."
    )
    parser.add_argument("folder", type=Path, help="its name starts with town")
    parser.add_argument(
        "--images", type=int, help="a small set instead: so many pictures of each of four towns"
    )
    options = parser.parse_args(arguments)
    if not options.folder.name.startswith("town"):
        parser.error(f"the name of the folder must start with town, got {options.folder.name}")
    folder = Path(os.path.abspath(options.folder))
    try:
        ensure_town(folder.parent, folder.name, images=options.images, progress=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
