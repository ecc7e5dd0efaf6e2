"""Pictures of a town, with labels and depth, from numpy alone: the cast of rays, light and weather."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy import float32 as f32
from PIL import Image

from sagelib.runs import atomic_path, check
from townscape import plan
from townscape.paint import car_side, paint_facade, painted_card, quick_noise, smooth_noise
from townscape.plan import CONDITIONS, LAMP_HEIGHT_M, Dice, Plan, Pose, Shot, TownConfig, hash_grid, hashed


@dataclass(frozen=True)
class Light:
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


LIGHTS = {
    "day": Light((0.30, 0.52, 0.86), (0.76, 0.86, 0.95), (0.55, 0.60, 0.68), (0.62, 0.56, 0.46), cover=0.45),
    "dusk": Light((0.20, 0.20, 0.42), (0.96, 0.56, 0.36), (0.33, 0.28, 0.36), (0.30, 0.16, 0.08), lamps=0.45,
                   glow=0.75, clouds=0.35, haze_m=400),
    "night": Light((0.012, 0.018, 0.05), (0.07, 0.07, 0.11), (0.075, 0.085, 0.13), (0.0, 0.0, 0.0), lamps=1.0,
                    glow=1.0, clouds=0.03),
    "rain": Light((0.50, 0.53, 0.57), (0.66, 0.68, 0.70), (0.66, 0.68, 0.72), (0.0, 0.0, 0.0), clouds=-0.10,
                   cover=0.9, haze_m=150, wet=1.0, glow=0.25),
    "fog": Light((0.70, 0.71, 0.73), (0.76, 0.77, 0.78), (0.66, 0.67, 0.69), (0.03, 0.03, 0.03), clouds=0.0,
                  haze_m=16, glow=0.2),
    "snow": Light((0.68, 0.71, 0.77), (0.82, 0.84, 0.88), (0.80, 0.83, 0.90), (0.06, 0.06, 0.05),
    clouds=-0.06,
                   cover=0.9, haze_m=110, snow=1.0, glow=0.15),
}  # fmt: skip
PICTURE_SIZE = 160  # pixels a side: a multiple of 32, the last stride of most convolutional networks
OVERSAMPLE = 2  # rays per pixel along each side
LAMP_COLOUR = f32((1.0, 0.72, 0.38))
VIEW_M = 200.0
ATLAS_TEXELS = 1 << 25  # painted walls kept in memory: 8 bytes each
FAR_M = 400.0  # the ground ends here
FACE_NORMALS = np.array([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])
HITS = 6  # boxes followed behind each other in one column


@lru_cache(maxsize=1)
def clouds() -> np.ndarray:
    """Cloud thickness in [0, 1] over (elevation, azimuth), once around the horizon."""
    rows, columns = 128, 1024
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32)
    total = np.zeros((rows, columns), np.float32)
    for octave, weight in ((1, 0.5), (2, 0.27), (4, 0.15), (8, 0.08)):
        period = 24 * octave
        px = x * f32(period / columns)
        lower = smooth_noise(px, y * f32(octave * 0.07), 77 + octave)
        wrapped = smooth_noise(px - f32(period), y * f32(octave * 0.07), 77 + octave)
        blend = x / f32(columns)  # so that the two ends of the strip meet
        total += f32(weight) * (lower * (1 - blend) + wrapped * blend)
    return total


@lru_cache(maxsize=1 << 14)
def changes(key: int, what: str, year: int, probability: float) -> int:
    """How often something has changed from the first year to this one."""
    return sum(hashed(key, what, y) / 2**32 < probability for y in range(1, year + 1))


class Town(Plan):
    """Pictures of the town of a seed; parameters and attributes as of `Plan`.

    A picture is a cast of one ray per column against the boxes, seen from above; because the camera never
    rolls, a wall met at distance t covers the rows between two heights over t, so that all but a few look-ups
    per pixel are done per column. The ground is computed from its metres, cars are smaller boxes, trees,
    lamps and persons are upright cards. Light, weather and the years between two visits come on top.
    """

    def __init__(self, seed: int, config: TownConfig | None = None):
        super().__init__(seed, config)
        self.sun_azimuth = float(np.deg2rad(Dice(self.seed, "sun").real(130.0, 230.0) + self.turn_deg))
        self.box = np.array([lot.box for lot in self.lots])
        self.centre = np.stack([self.box[:, :2].mean(1), self.box[:, 2:].mean(1)], 1)
        self.height = np.array([lot.height_m for lot in self.lots])
        self.ridge = np.array([lot.ridge_m for lot in self.lots])
        self.ridge_x = np.array([lot.ridge_along_x for lot in self.lots])
        self.roof_colour = np.array([lot.style.roof_colour for lot in self.lots], np.float32)
        self.textures: dict = {}
        self.atlas, self.used = np.zeros((2, ATLAS_TEXELS), np.uint32), 0
        self.trees, self.lamps, self.cars, self.walkers = plan.furnish(self)

    def texture(self, box: int, face: int, year: int, density: float, fine: bool):
        """Five levels of the texture of one face: (offset, texels along, texels up), painted when first seen.

        Level n has ``density / 2**n`` texels a metre. Walls seen from afar alone (``fine`` false) start at
        level 2.
        """
        lot, change = self.lots[box], self.config.appearance_change
        paint = changes(lot.key, "repaint", year, change)
        shop = changes(lot.key, "new sign", year, change)
        key = (box, face, paint, shop if lot.is_shop and lot.fronts[face] else 0, density, fine)
        if key not in self.textures:
            x0, x1, y0, y1 = lot.box
            width = y1 - y0 if face < 2 else x1 - x0
            painted = density if fine else density / 2
            canvas = paint_facade(lot.style, lot, lot.fronts[face], width, paint, shop, painted)
            levels = []
            for (nu, nv), colour, glow in canvas.packed()[0 if fine else 1 :]:
                while self.used + nu * nv > self.atlas.shape[1]:
                    self.atlas = np.concatenate([self.atlas, np.zeros_like(self.atlas)], axis=1)
                self.atlas[0, self.used : self.used + nu * nv] = colour
                self.atlas[1, self.used : self.used + nu * nv] = glow
                levels.append((self.used, nu, nv))
                self.used += nu * nv
            if not fine:
                levels = [levels[0], levels[0], *levels]
            self.textures[key] = (levels + [levels[-1]] * 5)[:5]
        return self.textures[key]

    def render(
        self, pose: Pose, condition="day", size=PICTURE_SIZE, *, year=0, visit=0, labels=False, depth=False
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

        Returns
        -------
        rgb : uint8 array of shape (H, W, 3)
            Followed by labels (H, W) and depth (H, W) where asked for, as a tuple.
        """
        light = LIGHTS[check("condition", condition, choices=CONDITIONS)]
        h, w = (size, size) if np.ndim(size) == 0 else size
        check("size", min(h, w), 8)
        check("year", year, 0)
        n = OVERSAMPLE
        view = View(self, pose, h * n, w * n)
        sun_at = self.sun_azimuth + (1.4 if condition == "dusk" else 0.0)
        sun = np.sin(sun_at), np.cos(sun_at)
        self.paint_sky(view, light, sun_at, visit)
        self.paint_buildings(view, light, year, sun)
        self.paint_ground(view, light, sun)
        self.paint_objects(view, light, year, visit)
        picture = view.lit(light)
        if light.wet:
            picture = view.wet(picture, light.wet, hashed(self.seed, "puddles"))
        picture = view.hazy(picture, light)
        total = picture[:, 0::n, 0::n]
        for a, b in list(np.ndindex(n, n))[1:]:
            total = total + picture[:, a::n, b::n]
        at = (round(pose.east_m * 100), round(pose.north_m * 100), round(pose.heading_deg * 100))
        key = hashed(*at, condition, year, visit)
        rgb = develop(total * f32(1 / (n * n)), light, self.config.sensor_noise, key)
        maps = [plane for plane, wanted in ((view.label, labels), (view.depth, depth)) if wanted]
        out = (rgb, *(np.ascontiguousarray(plane[n // 2 :: n, n // 2 :: n]) for plane in maps))
        return out if maps else rgb

    def paint_ground(self, view, light, sun):
        """Carriageway, markings, kerbs, pavements and grass where no wall stands in front."""
        line = np.where(np.isfinite(view.wall_at), -view.cam / np.maximum(view.wall_at, 1e-3), 0.0)
        pixel = np.flatnonzero((view.y[:, None] < line[None, :]) & (view.y[:, None] < -view.cam / FAR_M))
        if not len(pixel):
            return
        row, column = pixel // view.w, pixel % view.w
        s = np.divide(-view.cam, view.y, out=np.ones_like(view.y), where=view.y < 0)[row]
        x = (view.ox + s * view.dx[column]).astype(np.float32)
        y = (view.oy + s * view.dy[column]).astype(np.float32)
        s = s.astype(np.float32)
        edges, offsets, tones, dashes, borders = [], [], [], [], []
        for direction, across in enumerate((x, y)):
            streets = self.streets[direction]
            which = np.zeros(across.shape, np.int8)
            for a, b in zip(streets, streets[1:], strict=False):
                which += across > f32((a.centre + b.centre) / 2)
            table = f32([[q.centre, q.half_road, q.tone, q.dashed, q.pavement] for q in streets])
            offset = across - table[:, 0][which]
            offsets.append(offset)
            edges.append(np.abs(offset) - table[:, 1][which])
            tones.append(table[:, 2][which])
            dashes.append(table[:, 3][which] > 0.5)
            borders.append(table[:, 4][which])
        ex, ey = edges
        edge = np.minimum(ex, ey)
        road = edge < 0
        fine = np.minimum(f32(25.0) / s, 1)
        grain = quick_noise(x, y, 9.0) - f32(0.5)
        patch = quick_noise(x, y, 0.45, hashed(self.seed, "asphalt")) - f32(0.5)
        grey = np.where(road, f32(0.29) * np.where(ex < ey, *tones), f32(0.56))
        grey[road & (edge > -0.35)] *= f32(0.8)
        slab = edge > 0.22
        grey[~road & ~slab] = 0.70
        jx, jy = x * f32(1.25), y * f32(1.25)
        joint = (jx - np.floor(jx) < 0.06) | (jy - np.floor(jy) < 0.06)
        grey -= (slab & joint) * f32(0.09) * fine
        grey *= 1 + grain * fine * f32(0.22) + patch * f32(0.30)
        white = np.zeros(road.shape, bool)
        for across, along in ((0, 1), (1, 0)):
            other = edges[along]
            inside = edges[across] < -0.25
            dash = (y if across == 0 else x) * f32(1 / 6)
            stripe = offsets[across] * f32(1 / 1.1)
            middle = dashes[across] & (np.abs(offsets[across]) < 0.09) & (dash - np.floor(dash) < 0.5)
            white |= inside & (other > 5.5) & middle
            white |= inside & (other > 1.0) & (other < 4.0) & (stripe - np.floor(stripe) < 0.5)
        white &= quick_noise(x, y, 3.0, 11) > f32(0.2)
        grey[white] = 0.80
        rgb = grey * f32((1.0, 0.985, 0.96))[:, None]
        grass = (ex > borders[0] + 0.05) & (ey > borders[1] + 0.05)
        if grass.any():
            blade = f32(0.8) + f32(0.5) * grain[grass] + f32(0.5) * patch[grass]
            rgb[:, grass] = blade * f32((0.30, 0.40, 0.18))[:, None]
        if light.snow:
            cover = quick_noise(x, y, 0.9, 3) + f32(0.35) * grain
            track = np.zeros(road.shape, bool)
            for e, offset in zip(edges, offsets, strict=True):
                track |= (e < 0) & (np.abs(np.abs(offset) - f32(1.5)) < 0.45)
            amount = np.clip(f32(2.4) * cover + f32(0.6) - f32(1.3) * track, 0, 1)
            rgb = rgb * (1 - amount) + amount * f32((0.90, 0.92, 0.96))[:, None]
        elif light.wet:
            rgb *= f32(0.70)
        bright = np.full(len(pixel), 0.9, np.float32)
        if light.sun[0] > 0.4:  # the shadow of the houses on the sun's side of each street
            for across, (own, other) in enumerate(((0, 1), (1, 0))):
                along = y if across == 0 else x
                reach = f32(8.5 * abs(sun[across]))
                cell = np.floor(along * f32(1 / 7))
                reach = reach * (f32(0.8) + f32(0.4) * hash_grid(cell, across, self.seed))
                line_at = borders[own] + np.abs(offsets[own]) - edges[own]  # half road + pavement
                distance = line_at - offsets[own] * f32(1 if sun[across] > 0 else -1)
                dark = (distance < reach) & (edges[own] < borders[own]) & (edges[other] > borders[other])
                bright[dark] = 0.14
        label = np.where(road, np.uint8(plan.ROAD), np.uint8(plan.PAVEMENT))
        view.put(pixel, rgb, label, s, bright)
        if light.lamps:
            view.lamp.ravel()[pixel] = self.lamp_light(view, x, y, f32(LAMP_HEIGHT_M**2))

    def lamp_light(self, view, x, y, rise2):
        """Light of the nearest nine lamps at points (x, y), `rise2` squared metres below them."""
        d2 = (self.lamps[:, 0] - view.ox) ** 2 + (self.lamps[:, 1] - view.oy) ** 2
        ahead = (self.lamps[:, 0] - view.ox) * view.fx + (self.lamps[:, 1] - view.oy) * view.fy
        near = np.flatnonzero((d2 < 60**2) & (ahead > -9))
        total = np.zeros(np.broadcast_shapes(x.shape, np.shape(rise2)), np.float32)
        for lamp in self.lamps[near[np.argsort(d2[near], kind="stable")[:9]]]:
            q = (x - f32(lamp[0])) ** 2 + (y - f32(lamp[1])) ** 2 + rise2
            q = f32(1) + q * f32(1 / 30)
            total += f32(1.9) / (q * q)
        return np.minimum(total, f32(1.15))

    def paint_sky(self, view, light, sun_at, visit):
        """Gradient, clouds and the sun's side, by direction, so that turning the camera turns the sky."""
        bottom = int(np.count_nonzero(view.y >= -view.cam / FAR_M))
        if not bottom:
            return
        dice = Dice(self.seed, "sky", visit)
        up = np.clip(view.y[:bottom], 0, 1.6).astype(np.float32)
        mix = np.clip(up / (up + f32(0.35)) * f32(1.3), 0, 1)[:, None]
        azimuth = np.arctan2(view.dx, view.dy)
        side = (0.5 + 0.5 * np.cos(azimuth - sun_at)).astype(np.float32)[None, :]
        strip = clouds()
        column = ((azimuth / (2 * np.pi) + dice.real()) % 1.0 * strip.shape[1]).astype(int) % strip.shape[1]
        row = (up * f32(79)).astype(int)
        cloud = strip[row[:, None], column[None, :]]
        cloud = np.clip((cloud - f32(0.75 - 0.5 * light.cover)) * f32(4), 0, 1)
        cloud *= np.clip(up * 6, 0, 1)[:, None] * f32(light.clouds)
        channels = (view.glow, light.zenith, light.horizon, (0.04, 0.05, 0.10))
        for plane, zenith, horizon, dark in zip(*channels, strict=True):
            if light.lamps:  # after sunset the sun's side still burns, the other is dark
                low = f32(horizon) * (f32(0.45) + f32(0.55) * side * side) + f32(dark)
                sky = low * (1 - mix) + f32(zenith) * mix
            else:
                sky = f32(horizon) * (1 - mix) + f32(zenith) * mix
                sky = sky * (f32(0.88) + f32(0.14) * side)
            plane[:bottom] = sky + cloud * (f32(1.05) - sky)
        view.depth[:bottom] = np.inf

    def paint_buildings(self, view, light, year, sun_from):
        """Walls and roofs, by columns: the nearest boxes, the rows of each, then one look-up a pixel."""
        rel = self.centre - (view.ox, view.oy)
        forward = rel @ np.array([view.fx, view.fy])
        near = np.flatnonzero((forward > -20) & (np.abs(rel).max(1) < VIEW_M + 20))
        if not len(near):  # a camera outside the town
            return
        box = self.box[near]
        with np.errstate(divide="ignore"):
            ix, iy = 1 / view.dx[:, None], 1 / view.dy[:, None]
        ix, iy = np.clip(ix, -1e9, 1e9), np.clip(iy, -1e9, 1e9)
        ax, bx = (box[:, 0] - view.ox) * ix, (box[:, 1] - view.ox) * ix
        ay, by = (box[:, 2] - view.oy) * iy, (box[:, 3] - view.oy) * iy
        in_x, in_y = np.minimum(ax, bx), np.minimum(ay, by)
        enter = np.maximum(in_x, in_y)
        leave = np.minimum(np.maximum(ax, bx), np.maximum(ay, by))
        enter = np.where((leave > enter) & (enter > 0.05), enter, np.inf)
        k_hits = min(HITS, len(near))
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
        b = self.box[which]
        u = np.choose(face, [b[..., 3] - py, py - b[..., 2], px - b[..., 0], b[..., 1] - px])
        length = np.where(by_x, b[..., 3] - b[..., 2], b[..., 1] - b[..., 0])
        depth_m = np.where(by_x, b[..., 1] - b[..., 0], b[..., 3] - b[..., 2])
        incidence = np.where(by_x, np.abs(view.dx)[:, None], np.abs(view.dy)[:, None])
        height, ridge = self.height[which], self.ridge[which]
        gable = self.ridge_x[which] == by_x
        wall_top = height + np.where(gable, ridge * (1 - np.abs(2 * u / length - 1)), 0.0)
        wall_y = np.where(hit, (wall_top - view.cam) / tt, -1e9)
        t_ridge = np.minimum(tt + depth_m / 2 / np.maximum(incidence, 1e-6), through)
        rise = np.where(gable, 0.0, ridge * np.minimum(1.0, (t_ridge - tt) * incidence / (depth_m / 2)))
        roof_y = np.maximum(wall_y, np.where(hit, (height + rise - view.cam) / t_ridge, -1e9))
        cover = np.maximum.accumulate(roof_y, axis=1)
        seen = hit & (roof_y > np.concatenate([np.full((view.w, 1), -1e8), cover[:, :-1]], axis=1))
        # texture addresses of the walls in sight; a full atlas starts afresh, walls are painted again
        if self.used > 0.7 * ATLAS_TEXELS:
            self.textures, self.used = {}, 0
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
        seen_by = zip(walls.tolist(), (finest < 2) & (np.bincount(inverse) > 2), strict=True)
        table = np.array([self.texture(*divmod(wall, 4), year, density, bool(f)) for wall, f in seen_by])
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
        texel = self.atlas[0][where].view(np.uint8).reshape(-1, 4)
        rgb = texel.astype(np.float32).T[:3]
        label = texel[:, 3].copy()
        facing = np.clip(FACE_NORMALS @ np.array(sun_from), 0, 1)
        sun = (f32(0.18) + f32(0.95) * facing.astype(np.float32))[face].reshape(-1)[ck]
        roof = np.flatnonzero(~on_wall)
        if len(roof):
            tile = hash_grid(np.floor(up[roof] * 5), ck[roof] // 7, 9) * f32(0.16) + f32(0.9)
            tiled = (self.roof_colour[which.reshape(-1)[ck[roof]]] * tile[:, None]).T
            if light.snow:
                tiled = tiled * f32(0.15) + f32((0.78, 0.80, 0.84))[:, None]
            rgb[:, roof] = tiled * f32(255)
            label[roof] = plan.ROOF
            sun[roof] = 0.7
        near_ground = np.minimum(up.astype(np.float32), 2.0)
        soot = (f32(0.82) + f32(0.09) * near_ground) * f32(1 / 255)
        view.put(pixel, [channel * soot for channel in rgb], label, tp, sun)
        glow = None
        if light.glow:
            glow = self.atlas[1][where].view(np.uint8).reshape(-1, 4).astype(np.float32)
            glow *= f32(light.glow / 255)
            glow[roof] = 0
        for k, plane in enumerate(view.glow.reshape(3, -1)):
            plane[pixel] = 0 if glow is None else glow[:, k]
        if light.lamps:
            rise2 = (up.astype(np.float32) - f32(LAMP_HEIGHT_M - 1)) ** 2
            at = (px.reshape(-1)[ck].astype(np.float32), py.reshape(-1)[ck].astype(np.float32))
            lit = self.lamp_light(view, *at, rise2)
            view.lamp.ravel()[pixel] = lit * f32(0.8)

    def paint_objects(self, view, light, year, visit):
        """Cars, trees, lamps and persons, far to near, hidden by the nearest wall of each column."""
        share, todo = self.config.occlusion, []
        # nearer than `start` a car cuts the picture's plane, and a tree would be all that is seen
        for kind, things, start, reach, chance in (
            ("car", self.cars, 0.5, 70.0, 0.92 * share),
            ("tree", self.trees, 3.0, 110.0, None),
            ("lamp", self.lamps, 1.2, 80.0, None),
            ("walker", self.walkers, 1.2, 45.0, 0.3 * share),
        ):
            rx, ry = things[:, 0] - view.ox, things[:, 1] - view.oy
            ahead, aside = rx * view.fx + ry * view.fy, rx * view.fy - ry * view.fx
            ok = (ahead > start) & (ahead < reach) & (np.abs(aside) < ahead * view.half + 4.5)
            for i in np.flatnonzero(ok):
                dice = None if chance is None else Dice(int(things[i, 4]), year, visit)
                if dice is None or dice.chance(chance):
                    todo.append((ahead[i], kind, aside[i], things[i], dice))
        todo.sort(key=lambda item: -item[0])
        for ahead, kind, aside, thing, dice in todo[-70:]:
            at = (view, light, ahead, aside, thing)
            if kind == "car":
                self.paint_car(view, light, ahead, thing, dice)
            elif kind == "tree":
                tall, snow = thing[2] * (1 + 0.06 * year), light.snow
                tint = f32((0.75, 0.72, 0.8, 1.0)) if snow else f32((1, 1, 1, 1))
                card = painted_card("tree", int(thing[3]))
                self.paint_card(*at, card, tall, tall * 0.8, plan.TREE, tint, whiten=0.45 * snow)
            elif kind == "walker":
                card = painted_card("person", dice.integer(16))
                self.paint_card(*at, card, 1.55 + 0.3 * dice.real(), 0.85, plan.PERSON)
            else:
                self.paint_card(*at, painted_card("lamp", 0), LAMP_HEIGHT_M, 1.3, plan.LAMP)
                if light.lamps:
                    view.halo(ahead, aside, LAMP_HEIGHT_M * 0.95, light.lamps)

    def paint_card(self, view, light, ahead, aside, thing, levels, tall, wide, label, tint=None, whiten=0.0):
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
        up, along = (np.arange(a, b) + 0.5 - r0) / (r1 - r0), (np.arange(c, d) + 0.5 - c0) / (c1 - c0)
        iv = np.clip((up * card.shape[0]).astype(int), 0, card.shape[0] - 1)
        iu = np.clip((along * card.shape[1]).astype(int), 0, card.shape[1] - 1)
        patch = card[iv[:, None], iu[None, :]]
        if visible[-1] - visible[0] + 1 != len(visible):
            patch = patch * (view.wall_at[c:d] > ahead)[None, :, None]
        if tint is not None:
            patch = patch * tint
        alpha = patch[..., 3]
        colour = patch[..., :3].transpose(2, 0, 1)
        if whiten:
            colour = colour * f32(1 - whiten) + alpha * f32(whiten * 0.9)
        keep = 1 - alpha
        s = np.s_[a:b, c:d]
        view.rgb[:, a:b, c:d] = view.rgb[:, a:b, c:d] * keep + colour
        view.glow[:, a:b, c:d] *= keep
        solid = alpha > 0.5
        view.label[s][solid] = label
        view.depth[s][solid] = ahead
        view.sun[s][solid] = 0.6
        if light.lamps:
            at = self.lamp_light(view, f32(thing[0]), f32(thing[1]), f32(9.0))
            view.lamp[s][solid] = at * f32(0.9)

    def paint_car(self, view, light, ahead, car, dice):
        """Two boxes, body and cabin; tops are seen because the camera stands higher."""
        x, y, along_x = car[0], car[1], car[2] == 1.0
        colour, variant = f32(dice.pick(plan.CAR_COLOURS)), dice.integer(2)
        shift, tall = dice.real(-0.5, 0.5), dice.pick((0.0, 0.0, 0.12, 0.45))
        forward = dice.pick((-1, 1))
        x, y = (x + shift, y) if along_x else (x, y + shift)
        lamp = self.lamp_light(view, f32(x), f32(y), f32(16.0)) if light.lamps else 0.0
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
            box = (cx - hx, cx + hx, cy - hy, cy + hy)
            self.paint_box(view, light, box, z0, z1, along_x, colour, variant, part, lamp)

    def paint_box(self, view, light, box, z0, z1, along_x, colour, variant, part, lamp):
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
        seen = slice(used[0], used[-1] + 1)
        c, d = c + seen.start, c + seen.stop
        ok, by_x = ok[seen], (in_x >= in_y)[seen]
        enter, leave = np.where(ok, enter[seen], 1.0), np.where(ok, leave[seen], 1.0)
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
            view.rgb[:, a:b, c:d][:, top] *= f32(0.45)
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
            rgb[:, glass] = f32((0.13, 0.16, 0.20))[:, None] + (v[glass] * 0.22).astype(np.float32)
        else:
            for is_end in (False, True):
                columns = np.flatnonzero(end == is_end)
                if len(columns):
                    paint, rest = car_side(variant, is_end)
                    iv = (v[:, columns] * paint.shape[0]).astype(int)
                    iu = (u[columns] * paint.shape[1]).astype(int)[None, :]
                    body[:, columns], rgb[:, :, columns] = paint[iv, iu], rest[:, iv, iu]
        rgb += body * colour[:, None, None]
        roof = np.minimum(colour * f32(1.15) + f32(0.06), 1)
        if light.snow:
            roof = f32((0.92, 0.94, 0.97))
        rgb[:, top] = roof[:, None]
        on = wall | top
        s = np.s_[a:b, c:d]
        view.rgb[:, a:b, c:d][:, on] = rgb[:, on]
        view.glow[:, a:b, c:d][:, on] = 0
        view.label[s][on] = plan.CAR
        view.depth[s][on] = np.broadcast_to(enter.astype(np.float32), on.shape)[on]
        view.sun[s][on] = np.where(top, f32(1.0), np.where(end, f32(0.5), f32(0.7)))[on]
        if light.lamps:
            view.lamp[s][on] = lamp


class View:
    """The buffers of one picture and the arithmetic of its camera (all in the town's own metres)."""

    def __init__(self, town: Plan, pose: Pose, h: int, w: int):
        self.h, self.w = h, w
        self.ox, self.oy = (float(a) for a in town.from_utm(pose.east_m, pose.north_m))
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
        warm = f32((1.3 * strength, 1.1 * strength, 0.78 * strength))
        self.glow[:, a:b, c:d] += spot * warm[:, None, None]

    def lit(self, light: Light) -> np.ndarray:
        """Colour (3, h, w): surface times the light that falls on it, plus its own."""
        out = np.empty_like(self.rgb)
        for k in range(3):
            np.multiply(self.sun, f32(light.sun[k]), out=out[k])
            out[k] += f32(light.ambient[k])
            if light.lamps:
                out[k] += self.lamp * (LAMP_COLOUR[k] * f32(light.lamps))
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
        ripple = smooth_noise(column * 9 + 0.2 * far, far * 1.6, key)
        puddle = smooth_noise((column - 0.5) * far * 1.1, far * 0.5, key + 1)
        row = np.clip(row + (ripple - 0.5) * (self.h / 42), 0, self.h - 1).astype(int)
        other = picture[:, row, np.arange(self.w)[None, :]]
        ground = (self.label[top:] == plan.ROAD) | (self.label[top:] == plan.PAVEMENT)
        share = np.clip(0.46 - 0.32 * np.minimum(-y, 0.9) + 1.1 * np.clip(puddle - 0.5, 0, 0.25), 0, 0.75)
        share = (share * amount * ground).astype(np.float32)
        picture[:, top:] = picture[:, top:] * (1 - share) + other * share
        return picture

    def hazy(self, picture, light: Light) -> np.ndarray:
        haze = np.exp2(-self.depth / f32(light.haze_m))
        haze[np.isinf(self.depth)] = 1
        picture *= haze
        haze = 1 - haze
        for k in range(3):
            picture[k] += haze * f32(light.horizon[k])
        return picture


def develop(picture, light: Light, noise: float, key: int) -> np.ndarray:
    """Falling rain or snow, exposure, vignette, sensor noise, grey levels."""
    _, h, w = picture.shape
    dice = Dice(key, "camera")
    y, x = np.arange(h)[:, None], np.arange(w)[None, :]
    if light.wet:
        slant = (x + (y * 3) // 16).astype(np.int64)
        start = (hash_grid(slant, 0, key) * 64).astype(np.int64)
        streak = hash_grid(slant, (y + start) // max(4, h // 12), key + 1) > 0.965
        picture = picture + streak * f32(0.10)
    if light.snow:
        for scale, part in ((1, 0.988), (2, 0.99), (3, 0.993)):
            flake = hash_grid(x // scale, y // scale, key + scale) > part
            picture = np.where(flake, picture * f32(0.35) + f32(0.62), picture)
    exposure = f32(dice.real(0.88, 1.12))
    r2 = ((x - w / 2) / (w / 2)) ** 2 + ((y - h / 2) / (h / 2)) ** 2
    picture = picture * ((f32(1.02) - f32(0.10) * r2.astype(np.float32)) * exposure)
    over = np.maximum(picture - f32(0.7), 0)  # highlights roll off, as film does
    picture = (np.maximum(picture, 0) - over + over / (1 + f32(1.6) * over)) * f32(255)
    if noise:
        k = np.arange(3)[:, None, None] * 4096
        a, b = hash_grid(x + k, y, key + 11), hash_grid(x + k, y, key + 12)
        strength = noise * (1.6 if light.lamps > 0.9 else 1.0)
        picture = picture + (a + b - 1) * f32(strength)
    grey = np.clip(picture + f32(0.5), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(grey.transpose(1, 2, 0))


@lru_cache(maxsize=1)
def town_of(seed: int, config: TownConfig) -> Town:
    """The town of the last picture: its walls are painted already."""
    return Town(seed, config)


def render_files(shots: Sequence[tuple[int, Shot, Path]], config: TownConfig, size: int, quality: int) -> int:
    """Render pictures, each of a town's seed into a JPEG file, whole or not at all; returns how many."""
    for seed, shot, path in shots:
        town = town_of(seed, config)
        picture = town.render(shot.pose, shot.condition, size, year=shot.year, visit=shot.visit)
        with atomic_path(path, sync=False) as temporary:
            Image.fromarray(picture).save(temporary, quality=quality)
    return len(shots)
