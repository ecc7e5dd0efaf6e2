"""What all figures share: style, colours, panels, axes in metres, photographs, and numbers as text."""

import base64
import io

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image

BLACK, GREY, DARK = "#1a1a1a", "#8c8c8c", "#555555"
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW = "#CC79A7", "#56B4E9", "#F0E442"
PALETTE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BLACK, YELLOW)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
RIGHT, WRONG = BLUE, RED
HEAT = "magma"  # how much: dark to light, in order for every eye
AFFINITY = "viridis"
SIGNED = "PuOr"  # for or against: two hues that the colour-blind tell apart

STYLE = {
    **dict.fromkeys(("font.size", "axes.labelsize"), 12),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 11),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **{"axes.titlesize": 13, "figure.titlesize": 14, "lines.linewidth": 2.0, "lines.markersize": 6.0},
    **{"axes.grid": True, "axes.axisbelow": True, "grid.color": "#e3e3e3", "grid.linewidth": 0.8},
    **{"axes.edgecolor": "#4d4d4d", "axes.prop_cycle": matplotlib.cycler(color=PALETTE)},
    **{"image.interpolation": "nearest", "pdf.fonttype": 42},
}
HALO = {"path_effects": [patheffects.withStroke(linewidth=2.5, foreground="white")]}  # of text on lines
LEGEND_BELOW = {"loc": "outside lower center", "ncols": 3}  # of a figure
LEGEND_RIGHT = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}  # of an axis


class NotebookFigure(Figure):
    """A matplotlib figure that no global state knows of, and that a notebook draws when it ends a cell."""

    def _repr_mimebundle_(self, **_limits) -> dict[str, str]:
        kind = "jpeg" if any(axis.images for axis in self.axes) else "png"  # of photographs a fifth as large
        return {f"image/{kind}": base64.b64encode(draw(self, kind)).decode()}


def draw(figure: Figure, kind: str = "png") -> bytes:
    """Draw a matplotlib figure into the bytes of a picture, the way that widgets and notebooks show it."""
    how = {"png": {"optimize": True}, "jpeg": {"quality": 88, "optimize": True}}[kind]
    figure.savefig(buffer := io.BytesIO(), format=kind, dpi=90, pil_kwargs=how)
    return buffer.getvalue()


def agree(**arrays) -> None:
    """Refuse arrays, given by name, that are not equally long."""
    if len({len(values) for values in arrays.values()}) > 1:
        lengths = ", ".join(f"{len(values)} {name}" for name, values in arrays.items())
        raise ValueError(f"{', '.join(arrays)} must be equally many, got {lengths}")


def panels(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A figure of so many inches, and its axes as ``matplotlib.pyplot.subplots`` gives them."""
    figure = NotebookFigure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def tiles(n: int, columns: int, tile: tuple[float, float], margin=(0.0, 0.0), **options):
    """A figure of n axes in rows of at most `columns`, each of `tile` inches; axes left over are hidden."""
    columns = max(min(columns, n), 1)
    rows = -(-n // columns)
    size = (tile[0] * columns + margin[0], tile[1] * rows + margin[1])
    figure, axes = panels(*size, rows, columns, squeeze=False, **options)
    for axis in axes.flat[n:]:
        axis.set_visible(False)
    return figure, axes


def whole_ticks(*axes, most: int | str = "auto") -> None:
    """Ticks at whole numbers alone, on each given ``axis.xaxis`` or ``axis.yaxis``."""
    for axis in axes:
        axis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))


def write(axis, text: str, at, offset=(4, 0), **options) -> None:
    """Write beside a point, `offset` printer's points away."""
    axis.annotate(text, at, xytext=offset, textcoords="offset points", **options)


def mark(index: int) -> dict:
    """Colour and marker: 70 pairs before one returns, as 7 and 10 have no common factor."""
    return {"color": PALETTE[index % 7], "marker": MARKERS[index % 10]}


def error_bars(value, low, high) -> np.ndarray:
    """Lengths below and above each value, as matplotlib's ``yerr``; 0 where an end is not known."""
    value, low, high = (np.asarray(v, dtype=float) for v in (value, low, high))
    return np.nan_to_num(np.maximum(np.stack([value - low, high - value]), 0))


def local(east_m, north_m) -> tuple[np.ndarray, list[str]]:
    """Positions (n, 2) in metres from a round origin, and names of the axes that say where it lies.

    Seven digits of UTM on every tick could not be read.
    """
    at, names = np.array([east_m, north_m], dtype=float), ["east (m)", "north (m)"]
    for i, row in enumerate(at):
        if np.nanmax(np.abs(row)) >= 10_000:
            origin = np.floor(np.nanmin(row) / 100) * 100
            row -= origin
            names[i] = names[i].replace("(", f"of {origin:,.0f} m (")
    return at.T, names


def metre_panel(width: float, height: float, east_m, north_m):
    """A figure with one map, equal metres on both axes, room beside a narrow one; and positions (n, 2)."""
    at, names = local(east_m, north_m)
    wide, high = np.maximum(np.ptp(at, axis=0), 1e-9)
    height = min(height, max(0.8 * width * high / wide + 1.6, 3.2))
    figure, axis = panels(width, height)
    axis.set_aspect("equal", adjustable="datalim" if max(wide / high, high / wide) > 3 else "box")
    axis.set(xlabel=names[0], ylabel=names[1])
    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.yaxis.set_major_locator(MaxNLocator(5))
    return figure, axis, at


def aspect(image) -> float:
    """Height over width."""
    return np.divide(*np.asarray(image).shape[:2])


def photograph(axis, image, caption: str = "", frame: str | None = None) -> None:
    """Draw a photograph with a caption below and, if asked for, a frame, dashed where it is `WRONG`."""
    array = np.asarray(image)
    axis.imshow(array, cmap="gray" if array.ndim == 2 else None, interpolation="antialiased")
    axis.grid(False)
    axis.set_axis_on()
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(visible=frame is not None, color=frame, linewidth=3.5)
        spine.set_linestyle((0, (3, 1.5)) if frame == WRONG else "-")
    axis.set_xlabel(caption, fontsize=10, labelpad=3)


def jpeg(image: Image.Image, size_px: int) -> str:
    """A picture, shrunk to `size_px` on the longer side, as base64 of a JPEG."""
    picture = image.convert("RGB")
    picture.thumbnail((size_px, size_px))
    picture.save(buffer := io.BytesIO(), "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def metres(value: float) -> str:
    if not np.isfinite(value):
        return ""
    return f"{value:.0f} m" if value < 1000 else f"{value / 1000:.1f} km"


def count(value: float) -> str:
    return EngFormatter(sep="")(float(f"{value:.3g}"))
