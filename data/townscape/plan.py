"""The plan of a town: streets, buildings and what stands between them, and where its pictures are taken.

A town is a small grid of streets lined with boxes (buildings). Neighbourhoods share an architecture, so that
different places look alike (the confusion that the geo-visual graph exists to find), and poses lie a few
metres apart along the streets, so that 25 m cliques overlap.

Random decisions are integer hashes of named keys, never a generator with a state: a building looks the same
whatever was drawn before it. Arithmetic that decides *which* pixel is add, multiply, divide and compare
alone, the same on every machine; only shading uses other functions.
"""

import zlib
from dataclasses import dataclass

import numpy as np

from sagelib.places import folder_name
from sagelib.runs import check

LABELS = tuple("sky road facade window sign tree car person pavement door roof lamp".split())
"""Names of the label values: ``LABELS[labels[row, column]]``."""
SKY, ROAD, FACADE, WINDOW, SIGN, TREE, CAR, PERSON, PAVEMENT, DOOR, ROOF, LAMP = range(len(LABELS))

CONDITIONS = ("day", "dusk", "night", "rain", "fog", "snow")
"""Light and weather that `townscape.render.Town` knows."""

SEED_RANGES = {"train": range(0, 1100), "val": range(1100, 1110), "test": range(1110, 1130)}
"""Seeds of each use; they never overlap, so that no town is both learned and tested."""

UTM_ZONE, UTM_LETTER = 31, "U"
TOWN_GRID_M = 2000.0  # towns lie this far apart: a 25 m graph never joins two
FIRST_YEAR = 2020
LAMP_HEIGHT_M = 5.2


@dataclass(frozen=True, kw_only=True)
class TownConfig:
    """How large and how hard a town is. All of it enters the manifest of a written town.

    The jitters are the largest changes of a query or training picture; references stand on their stations.
    """

    streets: int = 4  # in each of the two directions
    neighbourhoods: int = 2  # architectures in one town; fewer: more places look alike
    architecture_variety: float = 0.5  # how far a building may depart from its neighbours, 0 (all alike) to 1
    appearance_change: float = 0.25  # probability per year that a facade is repainted or a sign replaced
    years: int = 3  # pictures are spread over this many years after the first
    viewpoint_jitter_m: float = 6.0  # along the street
    sideways_jitter_m: float = 2.0  # across it
    heading_jitter_deg: float = 40.0
    fov_deg: float = 75.0  # horizontal field of view
    fov_jitter_deg: float = 18.0
    height_jitter_m: float = 1.2  # of the camera's height of 2.3 m
    tilt_jitter: float = 0.2  # of the camera's tilt of 0.25, see `Pose`
    occlusion: float = 0.5  # share of the places at the kerb taken by cars, and the number of persons, 0 to 1
    sensor_noise: float = 5.0  # in grey levels (half width of a triangular law)
    train_spacing_m: float = 4.0  # between two stations; each gives two pictures with different headings
    reference_spacing_m: float = 11.0
    query_conditions: tuple[str, ...] = CONDITIONS  # of the queries of val and test, in turn

    def __post_init__(self):
        limits = {"streets": (2, 5), "neighbourhoods": (1, 6), "years": (0, 10), "fov_deg": (30, 110)}
        limits |= {"viewpoint_jitter_m": (0, 12), "sideways_jitter_m": (0, 3), "heading_jitter_deg": (0, 45)}
        limits |= {"fov_jitter_deg": (0, 20), "height_jitter_m": (0, 1.5), "tilt_jitter": (0, 0.25)}
        limits |= dict.fromkeys(("architecture_variety", "appearance_change", "occlusion"), (0, 1))
        limits |= dict.fromkeys(("train_spacing_m", "reference_spacing_m"), (1, 50)) | {
            "sensor_noise": (0, 40)
        }
        for name, (low, high) in limits.items():
            check(name, getattr(self, name), low, high, whole=isinstance(getattr(TownConfig, name), int))
        object.__setattr__(self, "query_conditions", tuple(self.query_conditions))
        check("the number of query_conditions", len(self.query_conditions), 1)
        for name in self.query_conditions:
            check("condition", name, choices=CONDITIONS)


@dataclass(frozen=True, kw_only=True)
class Pose:
    """A camera: where it stands, where it looks, and how wide."""

    east_m: float  # UTM metres, zone 31U: a mock
    north_m: float
    heading_deg: float  # clockwise from north
    fov_deg: float = 75.0  # horizontal field of view
    height_m: float = 2.3  # above the ground
    tilt: float = 0.25  # upward shift of the view in half picture widths: verticals stay vertical

    def __post_init__(self):
        for name, low, high in (("fov_deg", 10, 130), ("height_m", 0.3, 30), ("tilt", -1, 1)):
            check(name, getattr(self, name), low, high)
        for name in ("east_m", "north_m", "heading_deg"):
            check(name, getattr(self, name))


def hashed(*keys) -> int:
    """A 32-bit number from integers and strings, the same everywhere."""
    h = 0x9E3779B9
    for k in keys:
        k = zlib.crc32(k.encode()) if isinstance(k, str) else int(k) & 0xFFFFFFFF
        h = (h ^ k) * 0x7FEB352D & 0xFFFFFFFF
        h = (h ^ (h >> 15)) * 0x846CA68B & 0xFFFFFFFF
        h ^= h >> 16
    return h


class Dice:
    """A row of draws that depends on the keys alone."""

    def __init__(self, *keys):
        self.key, self.turn = hashed(*keys), 0

    def real(self, low=0.0, high=1.0) -> float:
        self.turn += 1
        return low + (high - low) * (hashed(self.key, self.turn) / 2**32)

    def chance(self, p) -> bool:
        return self.real() < p

    def integer(self, n) -> int:
        return min(int(self.real() * n), n - 1)

    def pick(self, items):
        return items[self.integer(len(items))]


def hash_grid(a, b, key: int) -> np.ndarray:
    """Integer arrays ``a`` and ``b`` (broadcast) to float32 in [0, 1), by a multiply-xorshift hash."""
    a, b = np.asarray(a).astype(np.int32).view(np.uint32), np.asarray(b).astype(np.int32).view(np.uint32)
    h = (a * np.uint32(0x9E3779B1)) ^ (b * np.uint32(0x85EBCA77) + np.uint32(key))
    h = h ^ (h >> np.uint32(16))
    h = h * np.uint32(0x7FEB352D)
    h = h ^ (h >> np.uint32(15))
    h = h * np.uint32(0x846CA68B)
    h = h ^ (h >> np.uint32(16))
    return (h >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


@dataclass(frozen=True)
class Style:
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


STYLES = (
    Style(
        "canal", ((0.45, 0.24, 0.17), (0.36, 0.20, 0.16), (0.55, 0.33, 0.23), (0.30, 0.25, 0.23)), "brick",
        3.1, (3, 4), (5.5, 8.0), (1.0, 1.75), 1.75, (0.93, 0.92, 0.87), "gable", (0.30, 0.21, 0.19),
        shop_share=0.3, tree_every_m=11.0,
    ),
    Style(
        "pastel", ((0.90, 0.74, 0.62), (0.66, 0.78, 0.80), (0.92, 0.88, 0.70), (0.77, 0.68, 0.78)), "boards",
        3.2, (2, 3), (6.5, 8.5), (1.15, 1.6), 2.3, (0.96, 0.96, 0.94), "gable", (0.38, 0.36, 0.37),
        shop_share=0.15, tree_every_m=17.0,
    ),
    Style(
        "boulevard", ((0.82, 0.76, 0.64), (0.86, 0.81, 0.72), (0.76, 0.71, 0.62), (0.88, 0.85, 0.79)),
        "stone", 3.3, (4, 5), (10.0, 15.0), (1.15, 2.1), 2.5, (0.88, 0.87, 0.83), "gable", (0.40, 0.45, 0.50),
        shutters=True, shop_share=0.55, tree_every_m=9.0,
    ),
    Style(
        "south", ((0.87, 0.57, 0.33), (0.91, 0.76, 0.48), (0.80, 0.43, 0.33), (0.90, 0.83, 0.68)), "plaster",
        3.0, (2, 4), (7.0, 11.0), (1.0, 1.6), 2.4, (0.85, 0.82, 0.75), "gable", (0.66, 0.36, 0.24),
        shutters=True, arched=True, shop_share=0.35, tree_every_m=20.0,
    ),
    Style(
        "terrace", ((0.62, 0.54, 0.40), (0.68, 0.60, 0.46), (0.56, 0.34, 0.27), (0.90, 0.89, 0.85)), "brick",
        2.9, (2, 3), (5.0, 6.5), (1.25, 1.6), 2.4, (0.95, 0.95, 0.95), "gable", (0.28, 0.29, 0.32),
        arched=True, shop_share=0.12, tree_every_m=13.0,
    ),
    Style(
        "modern", ((0.70, 0.71, 0.71), (0.82, 0.82, 0.80), (0.52, 0.55, 0.58), (0.63, 0.57, 0.50)), "plaster",
        3.0, (4, 6), (12.0, 18.0), (2.1, 1.5), 3.0, (0.25, 0.26, 0.28), "flat", (0.35, 0.35, 0.36),
        shop_share=0.4, tree_every_m=16.0,
    ),
)  # fmt: skip

SIGN_COLOURS = (
    (0.78, 0.10, 0.12), (0.10, 0.30, 0.62), (0.08, 0.45, 0.27), (0.95, 0.78, 0.15), (0.12, 0.12, 0.14),
    (0.93, 0.92, 0.88), (0.88, 0.42, 0.10), (0.45, 0.14, 0.42), (0.10, 0.52, 0.58), (0.86, 0.55, 0.62),
)  # fmt: skip
DOOR_COLOURS = (
    (0.10, 0.22, 0.16), (0.36, 0.08, 0.09), (0.10, 0.14, 0.28), (0.30, 0.19, 0.11), (0.13, 0.13, 0.14),
    (0.78, 0.68, 0.22), (0.62, 0.66, 0.68), (0.16, 0.42, 0.48),
)  # fmt: skip
CAR_COLOURS = (
    (0.75, 0.76, 0.78), (0.10, 0.10, 0.12), (0.92, 0.92, 0.92), (0.35, 0.37, 0.40), (0.55, 0.08, 0.09),
    (0.12, 0.22, 0.45), (0.16, 0.33, 0.25), (0.78, 0.66, 0.24), (0.52, 0.46, 0.40),
)  # fmt: skip


@dataclass(frozen=True)
class Lot:
    """A building: a box on the plan and what it draws from its neighbourhood."""

    key: int
    style: Style
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
class Street:
    centre: float  # the coordinate across it
    half_road: float
    pavement: float
    lamp_every_m: float
    tone: float
    dashed: bool

    @classmethod
    def drawn(cls, centre: float, dice: Dice) -> "Street":
        widths = 3.8 + 1.6 * dice.real(), 2.4 + 1.4 * dice.real(), 19 + 8 * dice.real()
        return cls(centre, *widths, tone=0.85 + 0.3 * dice.real(), dashed=dice.chance(0.65))


BLOCK_DEPTH_M = 11.0


def make_lot(key, style: Style, box, fronts, ridge_along_x, config: TownConfig) -> Lot:
    dice, free = Dice(key, "lot"), config.architecture_variety
    storeys = style.storeys[0] + dice.integer(style.storeys[1] - style.storeys[0] + 1)
    if dice.chance(0.25 * free):
        storeys = max(2, storeys + dice.pick((-1, 1)))
    storey_m = style.storey_m * (1 + 0.06 * free * dice.real(-1, 1))
    ground_m = max(storey_m, 3.0) + 0.35 + 0.3 * free * dice.real()
    height = ground_m + (storeys - 1) * storey_m + 0.5
    depth = (box[3] - box[2]) if ridge_along_x else (box[1] - box[0])
    return Lot(
        key=key, style=style, box=box, fronts=fronts, ridge_along_x=ridge_along_x, storeys=storeys,
        storey_m=storey_m, ground_m=ground_m, height_m=height,
        ridge_m=0.0 if style.roof == "flat" else depth / 2 * (0.55 + 0.3 * dice.real()),
        freedom=free, window_scale=1 + 0.18 * free * dice.real(-1, 1),
        bay=dice.integer(5) if dice.chance(0.3) else -1, balconies=dice.chance(0.25), bands=dice.chance(0.6),
        is_shop=dice.chance(style.shop_share), garage=dice.chance(0.25),
        ivy=dice.real(0.01, 1.0) if dice.chance(0.07) else 0.0,
    )  # fmt: skip


def plan_blocks(seed: int, config: TownConfig):
    """Streets, lots, parks and the edges of a town."""
    dice, n = Dice(seed, "plan"), config.streets
    axes = []
    for _ in range(2):
        positions = [0.0]
        for _ in range(n - 1):
            positions.append(positions[-1] + 62 + 26 * dice.real())
        shift = positions[-1] / 2
        axes.append([p - shift for p in positions])
    streets = [[Street.drawn(centre, dice) for centre in centres] for centres in axes]
    order = list(range(len(STYLES)))
    picked = [order.pop(dice.integer(len(order))) for _ in range(config.neighbourhoods)]
    # a block belongs to the nearest of a few centres, so that one architecture covers adjacent streets
    centres = [(dice.real(-0.5, n - 0.5), dice.real(-0.5, n - 0.5), picked[k % len(picked)])
               for k in range(len(picked))]  # fmt: skip
    extent = [(a[0] - 62.0, a[-1] + 62.0) for a in axes]
    lots, parks = [], []
    for i, j in ((i, j) for i in range(-1, n) for j in range(-1, n)):
        sx, sy = streets
        left, right = sx[i] if i >= 0 else None, sx[i + 1] if i + 1 < n else None
        south, north = sy[j] if j >= 0 else None, sy[j + 1] if j + 1 < n else None
        x0 = left.centre + left.half_road + left.pavement if left else extent[0][0]
        x1 = right.centre - right.half_road - right.pavement if right else extent[0][1]
        y0 = south.centre + south.half_road + south.pavement if south else extent[1][0]
        y1 = north.centre - north.half_road - north.pavement if north else extent[1][1]
        near = min(centres, key=lambda c: (c[0] - i - 0.5) ** 2 + (c[1] - j - 0.5) ** 2)
        style, block, d = STYLES[near[2]], Dice(seed, "block", i, j), BLOCK_DEPTH_M
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
                key = hashed(seed, "building", i, j, face, round(at * 8))
                lots.append(make_lot(key, style, box, tuple(fronts), along_x, config))
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
                key = hashed(seed, "closing", direction, k, end)
                style = STYLES[picked[Dice(key).integer(len(picked))]]
                lots.append(make_lot(key, style, box, tuple(fronts), direction == 0, config))
    return streets, lots, parks, extent


class Plan:
    """The plan of a town from one seed, in its own metres: streets along x and y, lots around every block.

    `seed` says which town (:data:`SEED_RANGES` keeps training and test apart), `config` how large and how
    hard. Its ``name``, used as the city, is ``"town<seed>"``; ``origin`` is the UTM east and north of its
    centre, kilometres from other towns; its streets are turned by ``turn_deg`` against the clock.
    """

    def __init__(self, seed: int, config: TownConfig | None = None):
        self.seed, self.config = int(check("seed", seed, 0, 9999, whole=True)), config or TownConfig()
        self.name, self.origin = f"town{self.seed}", self.origin_of(self.seed)
        turn = np.deg2rad(Dice(self.seed, "turn").real(-45.0, 45.0))
        self.cos, self.sin = float(np.cos(turn)), float(np.sin(turn))
        self.turn_deg = float(np.rad2deg(turn))
        self.streets, self.lots, self.parks, self.extent = plan_blocks(self.seed, self.config)

    @staticmethod
    def origin_of(seed: int) -> tuple[float, float]:
        """UTM east and north of the centre of a town, in metres."""
        return 320000.0 + TOWN_GRID_M * (seed % 100), 5600000.0 + TOWN_GRID_M * (seed // 100)

    def to_utm(self, x, y):
        """Town metres to UTM east and north."""
        return self.origin[0] + self.cos * x - self.sin * y, self.origin[1] + self.sin * x + self.cos * y

    def from_utm(self, east, north):
        """UTM east and north to town metres."""
        e, n = east - self.origin[0], north - self.origin[1]
        return self.cos * e + self.sin * n, -self.sin * e + self.cos * n


def furnish(plan: Plan) -> list[np.ndarray]:
    """What stands in the streets and parks: trees, lamps, cars and walkers.

    Returns
    -------
    list of four arrays (n, 5)
        x and y in town metres, two numbers of the kind, and a key of its own draws. Trees: height in metres,
        variant; lamps: height; cars: whether the street runs along x, side; walkers: height. Cars and walkers
        are places where one may be.
    """
    trees, lamps, cars, walkers = [], [], [], []
    spacings = sorted({lot.style.tree_every_m for lot in plan.lots})
    for direction, k in ((d, k) for d in range(2) for k in range(len(plan.streets[d]))):
        street, (low, high) = plan.streets[direction][k], plan.extent[1 - direction]
        crossings = [(o.centre, o.half_road + o.pavement + 1.0) for o in plan.streets[1 - direction]]

        def point(along, across, direction=direction, street=street):
            return (across + street.centre, along) if direction == 0 else (along, across + street.centre)

        def clear(along, margin, crossings=crossings):
            return all(abs(along - c) > w + margin for c, w in crossings)

        for side in (-1, 1):
            dice, one = Dice(plan.seed, "kerb", direction, k, side), (direction, k, side)
            every, variant = dice.pick((*spacings, 0.0)), dice.integer(12)
            at = low + dice.real(0, 10)
            while every and at < high:
                if clear(at, 1.5) and dice.chance(0.85):
                    key = hashed(plan.seed, "tree", *one, round(at * 8))
                    spot, height = point(at, side * (street.half_road + 0.75)), dice.real(4.2, 7.2)
                    trees.append((*spot, height, (variant + dice.integer(3)) % 12, key))
                at += every * dice.real(0.8, 1.2)
            at = low + dice.real(0, street.lamp_every_m) + (side > 0) * street.lamp_every_m / 2
            while at < high:
                lamps.append((*point(at, side * (street.half_road + 0.4)), LAMP_HEIGHT_M, 0, 0))
                at += street.lamp_every_m
            for slot in range(int((high - low) / 5.6)):
                at, key = low + 5.6 * (slot + 0.5), hashed(plan.seed, "car", *one, slot)
                if clear(at, 3.0):
                    cars.append((*point(at, side * (street.half_road - 1.0)), float(direction), side, key))
            for slot in range(int((high - low) / 6.0)):
                at, key = low + 6.0 * (slot + 0.5), hashed(plan.seed, "walker", *one, slot)
                spot = point(at, side * (street.half_road + 0.6 + 0.6 * street.pavement))
                walkers.append((*spot, 1.75, 0, key))
    for k, (x0, x1, y0, y1) in enumerate(plan.parks):
        dice = Dice(plan.seed, "park", k)
        for _ in range(int((x1 - x0) * (y1 - y0) / 90)):
            spot = dice.real(x0 + 1, x1 - 1), dice.real(y0 + 1, y1 - 1)
            trees.append((*spot, dice.real(4.5, 9.0), dice.integer(12), 0))
    return [np.array(things, float).reshape(-1, 5) for things in (trees, lamps, cars, walkers)]


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One picture of a written town: the pose, the moment, and where the file goes."""

    part: str  # e.g. "train/database"
    pose: Pose
    condition: str
    year: int
    visit: int
    name: str


def stations(town: Plan, spacing_m: float):
    """Street by street: direction and street of a station, its metres along it, and a running number."""
    number = 0
    for k in range(town.config.streets):
        for direction in range(2):
            street, others = town.streets[direction][k], town.streets[1 - direction]
            low, high = others[0].centre - 22.0, others[-1].centre + 22.0
            for i in range(int((high - low) / spacing_m) + 1):
                yield direction, street, low + i * spacing_m, number
                number += 1


PARTS = ("train/database", "val/database", "val/queries", "test/database", "test/queries")


def plan_shots(town: Plan, part: str, images: int | None = None) -> list[Shot]:
    """The pictures of one town in one part of the folder.

    Parameters
    ----------
    town : Plan
    part : str
        ``"train/database"``: all conditions and years; stations every ``train_spacing_m``.
        ``"val/database"``, ``"test/database"``: references, day pictures of the first year, every
        ``reference_spacing_m``. ``"val/queries"``, ``"test/queries"``: one for each reference, near it,
        jittered in position, heading and field of view, in another year and under ``query_conditions`` in
        turn.
    images : int, optional
        Only the first so many along the streets; all when None.

    Returns
    -------
    list of Shot
        Two for each station: along the street and across it, in turn forwards and backwards, left and right.
    """
    split, kind = check("part", part, choices=PARTS).split("/")
    config, shots = town.config, []
    spacing = config.train_spacing_m if split == "train" else config.reference_spacing_m
    conditions = CONDITIONS if split == "train" else config.query_conditions
    for direction, street, at, number in stations(town, spacing):
        for look in range(2):
            index = len(shots)
            if images is not None and index >= images:
                return shots
            dice = Dice(town.seed, part, index)
            lane = 0.22 * street.half_road * (1 if number % 2 else -1)
            turn = (0.0, -90.0, 180.0, 90.0)[2 * (number % 2) + look] + 90.0 * direction
            fov, height, tilt, along = config.fov_deg, Pose.height_m, Pose.tilt, at
            condition, year, visit = "day", 0, index + 1
            if split == "train" or kind == "queries":
                along += config.viewpoint_jitter_m * dice.real(-1, 1)
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
                shuffle = Dice(town.seed, part, "conditions", index // len(turns))
                turns = [turns.pop(shuffle.integer(len(turns))) for _ in range(len(turns))]
                condition = turns[index % len(turns)]
            across = street.centre + lane
            east, north = town.to_utm(*((across, along) if direction == 0 else (along, across)))
            pose = Pose(
                east_m=round(float(east), 2),
                north_m=round(float(north), 2),
                heading_deg=round((turn - town.turn_deg) % 360, 2),
                fov_deg=round(fov, 2),
                height_m=round(height, 2),
                tilt=round(tilt, 3),
            )
            date = f"{FIRST_YEAR + year}{1 + dice.integer(12):02d}01"
            fields = {"pano_id": f"{town.name}{kind[0]}{index:05d}", "note": f"{town.name}-{condition}"}
            fields |= {"heading_deg": pose.heading_deg, "height": pose.height_m, "timestamp": date}
            name = folder_name(pose.east_m, pose.north_m, UTM_ZONE, UTM_LETTER, **fields)
            shots.append(Shot(part=part, pose=pose, condition=condition, year=year, visit=visit, name=name))
    return shots
