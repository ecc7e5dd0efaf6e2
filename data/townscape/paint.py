"""Textures, painted once: facades with windows, doors and shops; cards of trees, persons, lamps; cars."""

from functools import lru_cache

import numpy as np
from numpy import float32 as f32
from PIL import Image

from townscape import plan
from townscape.plan import Dice, Lot, Style, hash_grid, hashed


def smooth_noise(x, y, key: int) -> np.ndarray:
    """Smooth value noise in [0, 1) with one lattice point per unit."""
    xi, yi = np.floor(x).astype(np.int32), np.floor(y).astype(np.int32)
    fx, fy = (x - xi).astype(np.float32), (y - yi).astype(np.float32)
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    low = hash_grid(xi, yi, key) * (1 - fx) + hash_grid(xi + 1, yi, key) * fx
    high = hash_grid(xi, yi + 1, key) * (1 - fx) + hash_grid(xi + 1, yi + 1, key) * fx
    return low * (1 - fy) + high * fy


TILE = 512


@lru_cache(maxsize=1)
def noise_tile() -> np.ndarray:
    """A square of noise that repeats without a seam, with 128 lattice points along a side."""
    lattice = 128
    at = np.arange(TILE, dtype=np.float32) * f32(lattice / TILE)
    i = np.floor(at).astype(np.int32)
    f = at - i
    f = f * f * (3 - 2 * f)
    n = np.arange(lattice)
    table = hash_grid(n[:, None], n[None, :], 99 + lattice)
    rows = table[i] * (1 - f[:, None]) + table[(i + 1) % lattice] * f[:, None]
    return np.ascontiguousarray(rows[:, i] * (1 - f) + rows[:, (i + 1) % lattice] * f)


def quick_noise(x, y, scale: float, key: int = 0) -> np.ndarray:
    """Noise in [0, 1) by one look-up; ``scale`` lattice points a metre, the same again after 128 of them."""
    step = f32(scale * TILE / 128)
    i = (x * step + f32(key % 499 + 100 * TILE)).astype(np.int32) & (TILE - 1)
    j = (y * step + f32(key % 491 + 100 * TILE)).astype(np.int32) & (TILE - 1)
    return noise_tile().ravel()[i * TILE + j]


class Canvas:
    """One wall as texels: colour, light of its own, and label; first axis along the wall, second upwards."""

    def __init__(self, width_m: float, height_m: float, density: float):
        self.width_m, self.height_m, self.density = width_m, height_m, density
        nu, nv = max(4, round(width_m * density)), max(4, round(height_m * density))
        self.rgb = np.zeros((nu, nv, 3), np.float32)
        self.glow = np.zeros((nu, nv, 3), np.float32)
        self.label = np.full((nu, nv), plan.FACADE, np.uint8)

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
        self.rgb[self.window(u0, u1, v0, v1)] *= f32(factor)

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


def glyph(index: int) -> np.ndarray:
    """A letter of an alphabet nobody reads: strokes on a grid of 7 rows and 5 columns, row 0 on top."""
    dice, grid = Dice("glyph", index), np.zeros((7, 5), bool)
    strokes = (
        np.s_[:, 0], np.s_[:, 4], np.s_[0, :], np.s_[3, :], np.s_[6, :], np.s_[:, 2], np.s_[:4, 0], np.s_[3:,
        4],
    )  # fmt: skip
    for _ in range(2 + dice.integer(2)):
        grid[dice.pick(strokes)] = True
    for _ in range(dice.integer(2)):
        rising = dice.chance(0.5)
        for row in range(7):
            grid[row, round((6 - row if rising else row) * 4 / 6)] = True
    return grid


@lru_cache(maxsize=64)
def word_of(key: int) -> np.ndarray:
    dice = Dice("word", key)
    letters = [np.pad(glyph(dice.integer(26)), ((0, 0), (0, 1))) for _ in range(4 + dice.integer(6))]
    return np.concatenate(letters, axis=1)[:, :-1]


def lettering(canvas: Canvas, key: int, u0, u1, v0, v1, colour):
    """Write one word into the rectangle, as large as it fits, centred."""
    word = word_of(key)
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
    canvas.glow[su, sv][on] = colour


def wall_pattern(canvas: Canvas, material: str, colour, key: int):
    """The bare wall: masonry pattern and weather stains."""
    nu, nv = canvas.label.shape
    u = (np.arange(nu, dtype=np.float32)[:, None] + f32(0.5)) / f32(canvas.density)
    v = (np.arange(nv, dtype=np.float32)[None, :] + f32(0.5)) / f32(canvas.density)
    tone = np.ones((nu, nv), np.float32)
    if material == "brick":  # courses of 0.15 m, every other one shifted by half a brick
        row = np.floor(v / f32(0.15))
        along = u / f32(0.42) + 0.5 * (row % 2)
        tone += (hash_grid(np.floor(along), row, key) - 0.5) * f32(0.26)
        tone += (((v / f32(0.15)) - row) < 0.25) * f32(0.10)
    elif material == "boards":
        row = np.floor(v / f32(0.22))
        tone += (hash_grid(row, 0, key) - 0.5) * f32(0.05)
        tone -= (((v / f32(0.22)) - row) < 0.28) * f32(0.13)
    elif material == "stone":
        row = np.floor(v / f32(0.45))
        along = u / f32(0.9) + 0.5 * (row % 2)
        tone += (hash_grid(np.floor(along), row, key) - 0.5) * f32(0.08)
        joint = ((v / f32(0.45) - row) < 0.13) | ((along - np.floor(along)) < 0.07)
        tone -= joint * f32(0.12)
    else:
        tone += (hash_grid(np.arange(nu)[:, None], np.arange(nv)[None, :], key) - 0.5) * f32(0.04)
    tone += (smooth_noise(u * 0.6, v * 0.35, key + 1) - 0.5) * f32(0.16)
    canvas.rgb[:] = tone[:, :, None] * np.asarray(colour, np.float32)


def opening(canvas: Canvas, dice: Dice, style: Style, u0, u1, v0, v1, frame, accent, lit_share=0.5):
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
        canvas.fill(u0 - 0.12, u1 + 0.12, v1, v1 + 0.24, np.asarray(frame, np.float32) * f32(0.82))
    canvas.fill(u0 - 0.06, u1 + 0.06, v0 - 0.05, v1 + 0.06, frame)
    canvas.fill(u0 - 0.14, u1 + 0.14, v0 - 0.16, v0 - 0.04, np.asarray(frame, np.float32) * f32(0.9))
    canvas.shade(u0 - 0.14, u1 + 0.14, v0 - 0.30, v0 - 0.16, 0.72)
    su, sv = canvas.window(u0 + 0.03, u1 - 0.03, v0 + 0.03, v1 - 0.03)
    nv = sv.stop - sv.start
    if nv < 1 or su.stop <= su.start:
        return
    up = (np.arange(nv, dtype=np.float32) / f32(nv))[None, :, None]
    glass = f32((0.10, 0.12, 0.15)) + up * f32((0.20, 0.26, 0.34)) * f32(0.4 + curtain)
    canvas.rgb[su, sv] = glass
    canvas.label[su, sv] = plan.WINDOW
    light = f32((1.0, 0.78, 0.42)) if warm < 0.75 else f32((0.80, 0.90, 1.0))
    canvas.glow[su, sv] = light * f32(0.65 + 0.35 * dice.real()) * (1 - 0.35 * up) if lit else 0.02
    if curtain > 0.45:
        part = 0.12 + 0.22 * dice.real()
        cloth = f32((0.86, 0.84, 0.80)) * f32(0.62 + 0.3 * dice.real())
        for a, b in ((u0 + 0.04, u0 + w * part), (u1 - w * part, u1 - 0.04)):
            canvas.fill(a, b, v0 + 0.04, v1 - 0.04, cloth, glow=light * f32(0.45) if lit else None)
    elif curtain < 0.12:
        canvas.fill(u0 + 0.04, u1 - 0.04, v0 + h * 0.45, v1 - 0.04, (0.82, 0.80, 0.74),
                    glow=light * f32(0.6) if lit else None)  # fmt: skip
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
        canvas.rgb[su, sv][outside] = np.asarray(frame, np.float32) * f32(0.8)
        canvas.glow[su, sv][outside] = 0
        canvas.label[su, sv][outside] = plan.FACADE


def door(canvas: Canvas, dice: Dice, u0, width, frame):
    top, colour = 2.15 + 0.3 * dice.real(), f32(dice.pick(plan.DOOR_COLOURS))
    canvas.fill(u0 - 0.14, u0 + width + 0.14, 0.1, top + 0.5, np.asarray(frame, np.float32) * f32(0.88))
    canvas.fill(u0, u0 + width, 0.16, top, colour, plan.DOOR)
    for a, b in ((0.12, 0.46), (0.54, 0.88)):
        for c, d in ((0.5, 1.0), (1.15, 1.95)):
            canvas.shade(u0 + width * a, u0 + width * b, c, d, 0.75)
    canvas.fill(u0, u0 + width, top + 0.08, top + 0.4, (0.30, 0.34, 0.38), plan.WINDOW,
                glow=(0.9, 0.7, 0.35) if dice.chance(0.6) else None)  # fmt: skip
    canvas.fill(u0 + width * 0.82, u0 + width * 0.9, 1.02, 1.12, (0.85, 0.75, 0.4))
    canvas.fill(u0 - 0.3, u0 + width + 0.3, 0.0, 0.16, (0.55, 0.54, 0.52))


def shop_front(canvas: Canvas, dice: Dice, sign: Dice, u0, u1, top, frame):
    """A shop front: display window, door, sign band with a word, sometimes an awning."""
    wood = f32(sign.pick(plan.DOOR_COLOURS))
    board = f32(sign.pick(plan.SIGN_COLOURS))
    bright = board[0] * 0.3 + board[1] * 0.6 + board[2] * 0.1 > 0.5
    ink = f32((0.08, 0.08, 0.10)) if bright else f32((0.97, 0.95, 0.88))
    canvas.fill(u0, u1, 0.0, top, wood)
    door_w, left = 1.0, dice.chance(0.5)
    door_u = u0 + 0.2 if left else u1 - 1.2
    a, b = (u0 + 1.45, u1 - 0.2) if left else (u0 + 0.2, u1 - 1.45)
    glow = f32((1.0, 0.86, 0.58)) * f32(0.75 + 0.25 * sign.real())
    band = top - 0.75
    pane_top = min(2.75, band - 0.15)
    panes = max(1, round((b - a) / 1.7))
    for k in range(panes):
        x0, x1 = a + (b - a) * k / panes + 0.05, a + (b - a) * (k + 1) / panes - 0.05
        canvas.fill(x0, x1, 0.55, pane_top, (0.16, 0.18, 0.20), plan.WINDOW, glow=glow)
        su, sv = canvas.window(x0, x1, 0.55, pane_top)
        up = np.linspace(0, 1, max(1, sv.stop - sv.start), dtype=np.float32)[None, : sv.stop - sv.start, None]
        canvas.rgb[su, sv] += up * f32((0.16, 0.20, 0.25))
        for _ in range(4):  # wares
            c, w = x0 + (x1 - x0 - 0.35) * sign.real(), 0.18 + 0.3 * sign.real()
            ware = f32(sign.pick(plan.SIGN_COLOURS))
            canvas.fill(c, min(x1, c + w), 0.6, 0.75 + 0.8 * sign.real(), ware, plan.WINDOW, glow=ware * glow)
    canvas.fill(door_u, door_u + door_w, 0.08, pane_top, (0.14, 0.16, 0.18), plan.DOOR, glow=glow * f32(0.7))
    canvas.fill(door_u, door_u + door_w, 0.08, 0.5, wood * f32(0.8), plan.DOOR)
    canvas.fill(u0 + 0.05, u1 - 0.05, band, top - 0.08, board, plan.SIGN, glow=board * f32(0.55))
    lettering(canvas, sign.integer(1 << 16), u0 + 0.3, u1 - 0.3, band + 0.1, top - 0.18, ink)
    canvas.shade(u0, u1, band - 0.12, band, 0.6)
    if sign.chance(0.35):
        cloth = f32(sign.pick(plan.SIGN_COLOURS))
        stripes = max(2, round((b - a) / 0.45))
        for k in range(stripes):
            colour = cloth if k % 2 else f32((0.93, 0.92, 0.88))
            x0, x1 = a + (b - a) * k / stripes, a + (b - a) * (k + 1) / stripes
            canvas.fill(x0, x1, band - 0.75, band - 0.02, colour * f32(0.95), plan.SIGN)
            canvas.fill(x0, x1, band - 0.9, band - 0.75, colour * f32(0.75), plan.SIGN)


def paint_facade(style: Style, lot: "Lot", front: bool, width: float, paint: int, shop: int, density: float):
    """The texture of one face of one building at one state of its paint and of its shop."""
    height = lot.height_m + lot.ridge_m + 0.05
    canvas = Canvas(width, height, density)
    dice = Dice(lot.key, "face", int(front))
    coat, sign = Dice(lot.key, "paint", paint), Dice(lot.key, "sign", shop)
    wall = f32(coat.pick(style.walls))
    vary = f32([coat.real(-1, 1), coat.real(-1, 1), coat.real(-1, 1)])
    wall = np.clip(wall * (1 + f32(0.10 + 0.22 * lot.freedom) * vary[0]), 0, 1)
    wall = np.clip(wall + f32(0.07 * lot.freedom) * vary, 0, 1)
    accent = f32(coat.pick(plan.DOOR_COLOURS)) * f32(1.3)
    frame = f32(style.frame)
    wall_pattern(canvas, style.material, wall, hashed(lot.key, "wall"))
    if not front:
        for storey in range(1, lot.storeys):  # a blind wall, now and then a small window
            v = lot.ground_m + (storey - 1) * lot.storey_m + 0.9
            if dice.chance(0.5) and width > 4:
                u = 0.8 + (width - 2.4) * dice.real()
                opening(canvas, dice, style, u, u + 0.8, v, v + 1.2, frame, accent, 0.3)
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
            opening(canvas, dice, style, u, u + ww, base + low, base + low + h, frame, accent)
            if k == bay or (lot.balconies and storey <= 2 and (k + storey) % 2 == 0):
                rail = (0.16, 0.16, 0.17)
                for x in np.arange(u - 0.25, u + ww + 0.25, 0.18):
                    canvas.fill(x, x + 0.06, base + 0.1, base + 0.95, rail)
                canvas.fill(u - 0.3, u + ww + 0.3, base + 0.92, base + 1.0, rail)
                canvas.fill(u - 0.35, u + ww + 0.35, base - 0.06, base + 0.1, wall * f32(0.6))
        if style.material in ("stone", "plaster") and storey > 1 and lot.bands:
            canvas.fill(0, width, base - 0.02, base + 0.16, np.clip(wall * f32(1.12), 0, 1))
            canvas.shade(0, width, base - 0.12, base - 0.02, 0.75)
    # ground floor
    if lot.is_shop:
        shop_front(canvas, dice, sign, 0.15, width - 0.15, lot.ground_m - 0.05, frame)
    else:
        canvas.shade(0, width, 0, 0.6, 0.72)
        slot = dice.integer(count)
        for k in range(count):
            centre = (k + 0.5) * step
            if k == slot:
                door(canvas, dice, centre - 0.5, 1.0, frame)
            elif lot.garage and count > 1 and k == (slot + 1) % count and step > 2.0:
                colour = f32(dice.pick(plan.DOOR_COLOURS))
                canvas.fill(centre - 1.1, centre + 1.1, 0.05, 2.3, colour, plan.DOOR)
                for y in (0.5, 0.95, 1.4, 1.85):
                    canvas.shade(centre - 1.1, centre + 1.1, y, y + 0.06, 0.7)
            else:
                opening(canvas, dice, style, centre - ww / 2, centre + ww / 2, 0.95,
                         0.95 + min(wh, lot.ground_m - 1.4), frame, accent, 0.6)  # fmt: skip
    # cornice, downpipe, ivy
    trim = np.clip(f32(style.frame) * f32(0.95), 0, 1)
    canvas.fill(0, width, lot.height_m - 0.4, lot.height_m - 0.05, trim)
    canvas.shade(0, width, lot.height_m - 0.62, lot.height_m - 0.4, 0.7)
    for x in np.arange(0.2, width, 0.5):
        canvas.shade(x, x + 0.2, lot.height_m - 0.38, lot.height_m - 0.25, 0.75)
    canvas.fill(0.05, 0.16, 0.2, lot.height_m - 0.4, wall * f32(0.45))
    if lot.ivy:
        nu, nv = canvas.label.shape
        u, v = np.arange(nu)[:, None] / density, np.arange(nv)[None, :] / density
        leaf = smooth_noise(u * 2.2, v * 2.2, lot.key) + 0.35 * smooth_noise(u * 7, v * 7, lot.key + 1)
        edge = 0.45 + 0.12 * v + 0.10 * np.abs(u - lot.ivy * width)
        on = leaf > edge
        speckle = hash_grid(np.arange(nu)[:, None], np.arange(nv), 7)[..., None]
        green = f32((0.17, 0.30, 0.12)) * (0.6 + 0.8 * speckle)
        canvas.rgb[on], canvas.label[on], canvas.glow[on] = green[on], plan.TREE, 0
    return canvas


@lru_cache(maxsize=64)
def painted_card(kind: str, variant: int) -> list[np.ndarray]:
    """Premultiplied RGBA levels, finest first, row 0 on top."""
    key = hashed("card", ("tree", "person", "lamp").index(kind), variant)
    dice = Dice(key)
    if kind == "tree":
        n = 128
        y, x = np.mgrid[0:n, 0:n].astype(np.float32) / n + f32(0.5 / n)
        crown = np.zeros((n, n), np.float32)
        for _ in range(9):  # a crown is a few balls of leaves
            a, r = dice.real(0.28, 0.72), dice.real(0.13, 0.24)
            b = dice.real(0.2, 0.55)
            d = ((x - a) ** 2 + (y - b) ** 2) / (r * r)
            crown = np.maximum(crown, 1 - d)
        leaf = smooth_noise(x * 28, y * 28, key) * f32(0.6) + smooth_noise(x * 11, y * 11, key + 1) * f32(0.5)
        alpha = (crown + (leaf - f32(0.55)) * f32(1.1) > f32(0.12)) & (crown > 0.02)
        alpha = alpha.astype(np.float32)
        light = f32(0.55) + f32(0.5) * leaf + f32(0.35) * (f32(0.5) - y)
        hue = f32([dice.real(0.20, 0.30), dice.real(0.34, 0.44), dice.real(0.12, 0.18)])
        rgb = light[..., None] * hue
        sway = f32(0.5) + f32(0.03) * f32(dice.real(-1, 1)) * (1 - y)
        trunk = (np.abs(x - sway) < f32(0.016) + f32(0.012) * (y > 0.9)) & (y > 0.4)
        bark = trunk & (alpha < 0.5)
        rgb[bark] = (f32(0.26) + f32(0.1) * leaf[bark])[:, None] * f32((1.0, 0.85, 0.7))
        alpha = np.maximum(alpha, trunk)
    elif kind == "person":
        h, w = 128, 64
        y, x = np.mgrid[0:h, 0:w].astype(np.float32)
        y, x = y / h, (x - w / 2 + f32(0.5)) / h
        alpha = np.zeros((h, w), np.float32)
        rgb = np.zeros((h, w, 3), np.float32)
        coat, legs = f32(dice.pick(plan.SIGN_COLOURS)), f32(dice.pick(plan.DOOR_COLOURS))
        skin = f32(dice.pick(((0.88, 0.70, 0.58), (0.55, 0.38, 0.28), (0.72, 0.54, 0.42))))
        stride = dice.real(0.02, 0.09)
        for side in (-1, 1):
            centre = side * (f32(0.035) + np.maximum(0, y - f32(0.5)) * f32(2 * stride))
            on = (np.abs(x - centre) < 0.038) & (y > 0.48) & (y < 0.985)
            alpha[on], rgb[on] = 1, legs * f32(0.75 if side < 0 else 0.9)
        body = (np.abs(x) < 0.075 + 0.03 * (y - 0.17)) & (y > 0.165) & (y < 0.56)
        arms = (np.abs(np.abs(x) - 0.095 - 0.04 * (y - 0.2)) < 0.022) & (y > 0.19) & (y < 0.52)
        alpha[body | arms], rgb[body], rgb[arms] = 1, coat, coat * f32(0.8)
        head = (x / f32(0.045)) ** 2 + ((y - f32(0.095)) / f32(0.065)) ** 2 < 1
        alpha[head], rgb[head] = 1, skin
        hair = head & (y < 0.085)
        rgb[hair] = f32(dice.pick(((0.12, 0.09, 0.07), (0.35, 0.24, 0.14), (0.6, 0.58, 0.55))))
        rgb *= (f32(0.9) + f32(1.2) * x)[..., None]
    else:
        h, w = 256, 64
        y, x = np.mgrid[0:h, 0:w].astype(np.float32)
        y, x = y / h, (x - w / 2 + f32(0.5)) / h
        pole = (np.abs(x) < f32(0.009) + f32(0.008) * (y > 0.85)) & (y > 0.08)
        head = (np.abs(x) < 0.02 + 0.45 * (y - 0.02)) & (y > 0.02) & (y < 0.085)
        cap = (np.abs(x) < 0.07) & (y > 0.0) & (y < 0.022)
        alpha = (pole | head | cap).astype(np.float32)
        rgb = np.zeros((h, w, 3), np.float32) + f32((0.16, 0.18, 0.17))
        rgb[head] = (0.86, 0.84, 0.76)
    rgba = np.concatenate([rgb * alpha[..., None], alpha[..., None]], axis=2)
    levels = [np.ascontiguousarray(rgba, dtype=np.float32)]
    while min(levels[-1].shape[:2]) >= 8:
        a = levels[-1]
        a = (a[0::2, 0::2] + a[1::2, 0::2] + a[0::2, 1::2] + a[1::2, 1::2]) * f32(0.25)
        levels.append(np.ascontiguousarray(a))
    return levels


@lru_cache(maxsize=64)
def car_side(variant: int, end: bool) -> tuple[np.ndarray, np.ndarray]:
    """A car's lower box, rows from the ground up: share of the body's colour, and other colour (3, h, w)."""
    n, m = (24, 40) if end else (24, 96)
    y, x = np.mgrid[0:n, 0:m].astype(np.float32)
    y, x = (y + f32(0.5)) / n, (x + f32(0.5)) / m
    body = np.ones((n, m), np.float32) * (f32(0.85) + f32(0.25) * y)
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
            across, up = (x - f32(centre)) * f32(4.2), y * f32(0.8) - f32(0.22)
            r2 = across**2 + up**2
            body[r2 < 0.36**2 * 0.9], rgb[r2 < 0.36**2 * 0.9] = 0, (0.04, 0.04, 0.05)
            body[r2 < 0.19**2], rgb[r2 < 0.19**2] = 0, (0.5, 0.5, 0.52)
        for seam in (0.36, 0.62):
            body[np.abs(x - seam) < 0.006] *= f32(0.6)
    return body, np.ascontiguousarray(rgb.transpose(2, 0, 1))
