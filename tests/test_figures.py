"""Every figure: it shows the numbers that it was given, nothing is cut off, and nothing global changes."""

import base64
import io
import json
import re

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.text import Text
from numpy import nan
from PIL import Image

from workbench import figures
from workbench.figures import PALETTE, RIGHT, WRONG
from workbench.figures.style import mark

RNG = np.random.default_rng(0)
EAST = 551_000 + RNG.uniform(0, 300, 80)
NORTH = 4_182_000 + RNG.choice([0.0, 60, 120], 80)
QUERY = {"query_east_m": 551_100.0, "query_north_m": 4_182_010.0}
IMAGES = [RNG.integers(0, 255, (28, 28, 3), dtype=np.uint8) for _ in range(9)]
EDGES = np.stack([np.arange(79), np.arange(1, 80)], axis=1)
WEIGHT = -RNG.uniform(0, 30, 79)
METHODS = ["frozen GeM", "SALAD", "EMVP's probing", "SAGE"]
PLACE = np.repeat(np.arange(10), 6)
POINTS = {name: RNG.normal(size=(60, 2)) + PLACE[:, None] for name in METHODS}
FILES = [f"{i}.jpg" for i in range(60)]
AID, CLASS_AID = (
    dict.fromkeys(METHODS, (0.8, 0.7, 0.9)),
    dict.fromkeys(METHODS, dict.fromkeys(range(10), 0.8)),
)
AUDIT = {"n": [2, 4, 8, 16, 32], "sorted": [99, 97, 93, 88, 80], "shuffled": RNG.normal(56, 1, (5, 4))}
AUDIT |= {"none": 57.0, "solo": 54.0, "anchors": 58.0}
RECALL = RNG.uniform(40, 90, (4, 3))
RECALL[1, 2] = nan
HARDNESS = dict.fromkeys(("hardest_negative", "positive_similarity", "positive_distance_m"), RNG.random(90))
REVIEW = {"retrieved_captions": ["#1\n26 m"] * 5, "correct": [0] * 5, "query_caption": "q", "notes": "why"}
BY_SIZE = {"published": {"SAGE": ([2048, 4096, 8448], [95.6, 97.7, 98.9])}, "title": "Recall"}
BY_COUNT = {"published": {"SAGE": (2.5e6, 92.0)}, "title": "Recall"}
PAID = {"once": [0, 1, 0, 0], "kind": ["measured", "measured", "estimated", "published"]}
SEEDS, STUCK = [[60, 61, 62], [58, 59, 20], [nan] * 3], [[0, 0, 0], [0, 0, 1], [0, 0, 0]]
ABLATION = {"reference": 0, "plateau": STUCK, "smallest_visible": 1.0, "k": 1, "title": "Parts"}
MASS = {"area": [0.3, 0.3, 0.4], "spread": [[0.05] * 3] * 2, "title": "Mass"}
DAYS = np.datetime64("2012-01-01") + RNG.integers(0, 3000, 300).astype("timedelta64[D]")
MAPS = {name: RNG.normal(size=(4, 4)) for name in METHODS}


def call(*arguments, **options):
    return arguments, options


PUBLISHED = pd.DataFrame(
    [("GeM", "none", 680, 60.0), ("SAGE", "sorted", 8448, 94.5), ("BoQ", "none", 12288, 93.8)],
    columns=["label", "context", "dim", "recall"],
)
SHIFT = pd.DataFrame({"shift": [0, 0.3], "R@1": [70.0, 60], "low": [60.0, 50], "high": [80.0, 70]})
SHIFT = SHIFT.assign(model="gem2x2:tf_efficientnet_lite2", dataset="gardens-point")
GALLERY = {
    "place_map": call(
        EAST, NORTH, group=["reference", "query"] * 40, heading_deg=[90, nan] * 40, title="Town"
    ),
    "images_per_place": call(RNG.integers(-1, 40, 500)),
    "distance_histogram": call(RNG.exponential(12, 300), radius_m=25.0),
    "distance_histogram, wide": call(np.exp(RNG.normal(3, 3, 300)), radius_m=25.0),
    "heading_rose": call(RNG.uniform(0, 360, 200)),
    "dates": call(DAYS, group=["a", "b", "c"] * 100),
    "contact_sheet": call(IMAGES[:7], ["one\ntwo"] * 7, title="Seven"),
    "label_map": call(IMAGES[0], np.arange(28 * 28).reshape(28, 28) % 6, list("abcdef")),
    "retrieval_panel": call(
        IMAGES[:2], [IMAGES[2:7]] * 2, [[9, 99, 999, 9999, nan]] * 2, np.eye(2, 5), truth=[IMAGES[8], None]
    ),
    "nearest_map": call(EAST, NORTH, [1, 2, 3, 40, 60], **QUERY),
    "review_page": call(IMAGES[0], IMAGES[1:6], [], positive_captions=[], **REVIEW),
    "recall_bars": call(
        ["town", "sf-streets", "sea"],
        METHODS,
        RECALL,
        RECALL - 4,
        RECALL + 4,
        published={"SAGE": [98, nan, 95]},
    ),
    "precision_recall": call(
        {"m": pd.DataFrame({"threshold": [0.1, 0.4], "precision": [1, 0.5], "recall": [0.3, 0.3]})}
    ),
    "recall_vs_dim": call(
        {"m": [128, 512, 8448]}, {"m": [50, 60, 70]}, intervals={"m": ([45, 55, 65], [55, 65, 75])}, **BY_SIZE
    ),
    "recall_vs_parameters": call(
        METHODS, [0, 1.4e6, 1.5e6, 9e6], [40, 50, 60, 65], [35] * 4, [70] * 4, **BY_COUNT
    ),
    "graph_cost": call(
        ["online", "static", "reckoned", "the paper, online"],
        [2.0, 0.4, nan, 372],
        [4, nan, nan, 17.7],
        **PAID,
    ),
    "context_audit": call(dict.fromkeys(("town, a-head-over-anchors-of-a-long-name", "two", "three"), AUDIT)),
    "sideways_shift": call(SHIFT),
    "ablation_figure": call(
        ["full", "no SoftP", "not run"], SEEDS, [nan, -2.5, nan], [nan, -4, nan], [nan, -1, nan], **ABLATION
    ),
    "graph_map": call(EAST, NORTH, EDGES, WEIGHT, cliques=[[0, 1, 2], [7, 8, 9]], radius_m=25),
    "graph_histograms": call(RNG.poisson(8, 200), RNG.integers(4, 90, 80), WEIGHT),
    "pair_matrices": call(*[np.eye(12)] * 4, title="Toy"),
    "greedy_steps": call(
        EAST[:6], NORTH[:6], EDGES[:5], [[0], [0, 1], [0, 1, 2]], np.where(np.eye(3, 6), -2.0, nan)
    ),
    "sampler_comparison": call({"random": HARDNESS, "SAGE, closest": HARDNESS}),
    "affinity_change": call(WEIGHT, 0.8 * WEIGHT, [0, 1, 4, 4, 2], k=4),
    "affinity_change, no edges": call([], [], np.zeros(0, dtype=int), k=4),
    "loss_curve": call(np.arange(50), np.linspace(1.5, 0.5, 50), plateau=1.477, epoch_steps=[0, 25]),
    "training_rates": call(*[np.arange(9)] * 4),
    "recall_per_epoch": call([0, 1, 2], {"R@1": [40, 50, 55]}, best=2),
    "tsne_figure": call(POINTS, PLACE, aid=AID, class_aid=CLASS_AID),
    "aid_bars": call(METHODS[:3], [0.9, 0.7, 0.6], [0.8, 0.6, 0.5], [1, 0.8, 0.7], per_class=[[0.5]] * 3),
    "heatmap_scales": call(
        IMAGES[:3], [RNG.random((4, 4))] * 3, captions=["entropy 0.9"] * 3, scale=(0, 1), title="Weights"
    ),
    "heatmap_scales, for and against": call(IMAGES[:1], [np.ones((4, 4))], scale=(-2, 2), title="Score"),
    "methods_compared": call({"published, msls-val": PUBLISHED, "here": PUBLISHED.assign(low=80, high=99)}),
    "contributions_pair": call(
        *IMAGES[:2], MAPS, MAPS, captions=dict.fromkeys(METHODS, "score 0.61"), title="Why"
    ),
    "mass_bars": call("ab", ["sky", "road", "car"], [[0.2, 0.3, 0.5]] * 2, **MASS),
    "patch_match": call(*IMAGES[:2], (2, 3), RNG.random((4, 4)), grid=(4, 4)),
    "number_grids": call({"x": np.arange(9.0).reshape(3, 3) - 4}, signed=True),
}


def draw(name: str):
    arguments, options = GALLERY[name]
    return getattr(figures, name.split(",")[0])(*arguments, **options)


@pytest.fixture(scope="module")
def gallery():
    """Every figure, drawn once."""
    return {name: draw(name) for name in GALLERY}


def texts(figure) -> set[str]:
    return {text.get_text() for text in figure.findobj(Text)}


@pytest.mark.parametrize("name", GALLERY)
def test_nothing_is_cut_off_or_too_small_to_read(gallery, name):
    figure = gallery[name]
    figure.draw_without_rendering()
    box = figure.get_tightbbox().padded(-0.02)
    width, height = figure.get_size_inches()
    assert box.x0 > -0.1 and box.y0 > -0.1 and box.x1 < width + 0.1 and box.y1 < height + 0.1, "cut off"
    assert width <= 14.1
    shown = [t for t in figure.findobj(Text) if t.get_text().strip() and t.get_visible()]
    # Half of the smallest is what a figure across a page of a paper has for its numbers.
    assert all(t.get_fontsize() >= 8 for t in shown)


@pytest.mark.parametrize("name", GALLERY)
def test_axes_are_labelled(gallery, name):
    def named(axes):  # names of methods or sets at the ticks need no other label
        return any(re.search("[a-z]", label.get_text()) for label in axes)

    def row(axis):  # the panels of one row share the label of its first
        return axis.get_subplotspec().rowspan.start if axis.get_subplotspec() else None

    for axis in gallery[name].axes:
        pictures = (axis.get_images() and not axis.lines) or name == "number_grids"
        if not axis.axison or not axis.get_visible() or pictures or axis.name == "polar":
            continue
        if name.startswith("tsne") or "colorbar" in axis.get_label():
            continue  # t-SNE's axes mean nothing
        across = axis.get_shared_x_axes().get_siblings(axis)
        assert any(other.get_xlabel() for other in across) or named(axis.get_xticklabels())
        beside = [other for other in gallery[name].axes if row(other) == row(axis)]
        along = axis.get_shared_y_axes().get_siblings(axis)
        ticks = [t for other in along for t in other.get_yticklabels()]
        assert any(other.get_ylabel() for other in beside) or named(ticks)


def test_nothing_global_changes_and_a_figure_draws_itself_in_a_notebook():
    import matplotlib.pyplot as plt

    before, opened = dict(matplotlib.rcParams), plt.get_fignums()
    (shown,) = figures.loss_curve([0, 1], [2, 1], plateau=1.5)._repr_mimebundle_().items()
    png = base64.b64decode(shown[1])
    draw("pair_matrices")
    assert dict(matplotlib.rcParams) == before and plt.get_fignums() == opened
    assert shown[0] == "image/png" and png.startswith(b"\x89PNG")
    assert png == figures.draw(figures.loss_curve([0, 1], [2, 1], plateau=1.5)), "the same bytes again"
    ((kind, picture),) = figures.contact_sheet(IMAGES[:1], [""])._repr_mimebundle_().items()
    assert kind == "image/jpeg" and base64.b64decode(picture).startswith(b"\xff\xd8\xff")


def test_the_colours_differ_for_the_colour_blind():
    """Machado, Oliveira and Fernandes (2009), severity 1: protan, deutan, tritan; distances in linear RGB."""
    machado = [
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    ]
    linear = np.array([to_rgb(colour) for colour in PALETTE]) ** 2.2
    for matrix in machado:
        seen = np.clip(linear @ np.array(matrix).T, 0, 1) ** (1 / 2.2)
        apart = np.linalg.norm(seen[:, None] - seen[None], axis=2) + 9 * np.eye(len(seen))
        assert apart.min() > 0.1
    assert len({tuple(mark(i).values()) for i in range(70)}) == 70, "seventy places have different marks"


@pytest.mark.parametrize(
    ("words", "name", "arguments"),
    [
        ("1 queries, 1 retrieved, 2 metres", "retrieval_panel", call(IMAGES[:1], [[]], [[3]] * 2, [[1]])),
        ("2 images, 1 captions", "contact_sheet", call(IMAGES[:2], ["a"])),
        ("4 methods, 3 recall", "recall_bars", call("ab", METHODS, RECALL[:3], RECALL, RECALL)),
        ("79 edges, 3 weight", "graph_map", call(EAST, NORTH, EDGES, [1, 2, 3], radius_m=25)),
        ("1 chosen, 2 scores", "greedy_steps", call(EAST, NORTH, EDGES, [[0]], np.zeros((2, 6)))),
        ("1 images, 2 maps", "heatmap_scales", call(IMAGES[:1], [np.eye(2)] * 2, scale=(0, 1), title="")),
        ("60 images, 1 names", "tsne_plotly", call(POINTS, PLACE, names=["a"])),
    ],
)
def test_arrays_that_do_not_fit_are_refused(words, name, arguments):
    with pytest.raises(ValueError, match=words):
        getattr(figures, name)(*arguments[0], **arguments[1])


def test_a_map_has_equal_metres_and_says_where_its_origin_is(gallery):
    axis = gallery["place_map"].axes[0]
    assert axis.get_aspect() == 1.0
    assert axis.get_xlabel() == "east of 551,000 m (m)" and axis.get_ylabel() == "north of 4,182,000 m (m)"
    drawn = np.concatenate([c.get_offsets() for c in axis.collections if not isinstance(c, LineCollection)])
    assert sorted(drawn[:, 0]) == pytest.approx(sorted(EAST - 551_000))
    assert "reference (40)" in texts(gallery["place_map"])


def test_images_of_a_place_are_counted():
    axis = figures.images_per_place([0, 0, 0, 1, 1, 2, -1]).axes[0]
    heights = {round(p.get_x() + p.get_width() / 2): p.get_height() for p in axis.patches}
    assert heights == {1: 1, 2: 1, 3: 1}
    assert "3 places, 1 images of none" in axis.get_title()
    assert figures.images_per_place([-1]).axes[0].get_title().endswith("0 places, 1 images of none")


def test_the_radius_is_inclusive_and_what_is_missing_is_said():
    shown = texts(figures.distance_histogram([1.0, 25.0, 25.1, np.inf], radius_m=25.0))
    assert {"25 m: 66.7% within", "Distance to the nearest reference (1 have none)"} <= shown
    assert "25 m: none within" in texts(figures.distance_histogram([nan], radius_m=25.0))


def test_the_rose_points_where_the_camera_looks():
    axis = figures.heading_rose([0, 359, 1, 90, nan]).axes[0]
    angles = {round(np.rad2deg(p.get_x() + p.get_width() / 2)): p.get_height() ** 2 for p in axis.patches}
    assert {a: n for a, n in angles.items() if n} == pytest.approx({0: 3, 90: 1})
    assert axis.get_theta_direction() == -1 and axis.get_theta_offset() == pytest.approx(np.pi / 2)


def test_dates_are_counted_by_month_or_day():
    def draw(*days):
        return figures.dates(np.array(days, dtype="datetime64[D]"), group=["a"] * len(days))

    months = draw("2020-01-05", "2020-01-30", "2021-03-01", "NaT").axes[0]
    heights = [p.get_height() for p in months.patches]
    assert heights[0] == 2 and heights[-1] == 1 and sum(heights) == 3 and len(heights) == 15
    few = draw("2020-01-05", "2020-01-06").axes[0]
    assert few.get_xlabel() == "day" and len(few.patches) == 2
    assert draw("NaT")._suptitle.get_text().endswith("(1 have no date)")


def test_right_and_wrong_differ_in_colour_line_and_mark():
    figure = figures.retrieval_panel(IMAGES[:1], [IMAGES[1:3]], [[3.2, 1840.0]], [[True, False]])
    _, right, wrong = figure.axes
    spines = [axis.spines["left"] for axis in (right, wrong)]
    assert [spine.get_edgecolor() for spine in spines] == [to_rgba(RIGHT), to_rgba(WRONG)]
    assert spines[0].get_linestyle() != spines[1].get_linestyle()
    assert (right.get_xlabel(), wrong.get_xlabel()) == ("#1 ✓  3 m", "#2 ✗  1.8 km")


def test_a_contact_sheet_shows_every_image_once_of_whatever_kind():
    figure = figures.contact_sheet(IMAGES[:7], list("abcdefg"), columns=4)
    shown = [axis for axis in figure.axes if axis.get_images()]
    assert [axis.get_xlabel() for axis in shown] == list("abcdefg")
    for axis, image in zip(shown, IMAGES, strict=False):
        np.testing.assert_array_equal(axis.get_images()[0].get_array(), image)
    for image in (Image.fromarray(IMAGES[0]), IMAGES[0] / 255.0, IMAGES[0][..., 0]):
        figures.draw(figures.contact_sheet([image], [""]))
        figures.draw(figures.heatmap_scales([image], [np.eye(4)], scale=(0, 1), title=""))


def test_the_nearest_are_where_they_are_and_as_far_as_they_are():
    here = {"query_east_m": 0.0, "query_north_m": 0.0}
    figure = figures.nearest_map([0, 30, 0], [0, 40, 100], [1, 2], descriptor_distance=[0.1, 0.2], **here)
    assert {"1  distance 0.10  50 m", "2  distance 0.20  100 m"} <= texts(figure)
    together = figures.nearest_map([0.0, 0.1, 100], [0.0, 0, 0], [0, 1, 2], **here)
    assert {"1,2", "3"} <= texts(together), "discs that would cover each other share their numbers"


def test_recalls_show_value_interval_absence_and_number_of_parameters(gallery):
    bars = gallery["recall_bars"].axes[0].patches
    heights = np.array([bar.get_height() for bar in bars]).reshape(4, 3)
    np.testing.assert_allclose(heights, np.nan_to_num(RECALL))
    assert {"not run", "published: SAGE"} <= texts(gallery["recall_bars"])
    axis = gallery["recall_vs_parameters"].axes[0]
    assert axis.get_xlim()[0] < 0 and "0" in [t.get_text() for t in axis.get_xticklabels()]
    assert {"frozen GeM (0)", "SALAD (1.4M)", "published: SAGE (2.5M)"} <= texts(axis)
    rest = {"published": {}, "title": ""}
    alone = {"published": {"B": (1.96e6, 93.4), "L": (2.5e6, 94.2)}, "title": ""}
    axis = figures.recall_vs_parameters([], [], [], **alone).axes[0]
    assert "0" not in [t.get_text() for t in axis.get_xticklabels()] and axis.get_xlim()[0] > 0
    two = figures.recall_vs_parameters(["a", "b"], [0, 0], [40, nan], [35, nan], [45, nan], **rest)
    assert "b (0, not run)" in texts(two)
    close = figures.recall_vs_parameters("abc", [100_000, 5, 101_000], *np.full((3, 3), 40.0), **rest).axes[0]
    x = {line.get_marker(): line.get_xdata()[0] for line in close.lines}
    assert x["s"] == 5 and x["^"] - x["o"] > 5_000, "equally many stand side by side"


def test_numbers_are_written_out(gallery):
    assert {"1.234", "-5.000", "x\n1 x 2"} <= texts(figures.number_grids({"x": np.array([[1.234, -5]])}))
    one = {"hardest_negative": [nan], "positive_similarity": [0.5, 0.7], "positive_distance_m": [3.0, 5.0]}
    assert {"none", "0.600", "4.0"} <= texts(figures.sampler_comparison({"a": one}))
    shown = texts(gallery["graph_cost"])
    assert {"2.0 s", "400 ms", "6.2 min", "+17.7 %", "not known", "paid once"} <= shown
    assert {"measured here", "estimated here", "the paper's"} <= shown


def test_the_audit_shows_each_context():
    without = AUDIT | {"shuffled": np.full((5, 1), nan), "anchors": None}
    figure = figures.context_audit({"one": AUDIT, "two": without})
    lines, fewer = ({line.get_label(): line.get_ydata() for line in axis.lines} for axis in figure.axes)
    np.testing.assert_allclose(lines["sorted by name"], AUDIT["sorted"])
    np.testing.assert_allclose(lines["shuffled: mean"], AUDIT["shuffled"].mean(axis=1))
    assert lines["anchors"][0] == 58.0 and "anchors" not in fewer


def test_the_ablation_marks_plateaus_and_clear_differences(gallery):
    left, right = gallery["ablation_figure"].axes
    stuck = [c for c in left.collections if len(c.get_offsets()) and c.get_offsets()[0][0] == 20]
    assert len(stuck) == 1, "the run on the plateau is drawn apart"
    means = next(line.get_xdata() for line in left.lines if line.get_markersize() == 18)
    assert list(means[:2]) == pytest.approx([61.0, 58.5]), "means leave the plateau out"
    clear, unclear = [line for line in right.lines if line.get_marker() == "o"]
    assert list(clear.get_xdata()) == [-2.5] and not np.isfinite(unclear.get_xdata()).any()
    assert "not run" in texts(gallery["ablation_figure"])


def test_the_graph_draws_every_edge_with_its_affinity_and_each_step_what_it_compares(gallery):
    lines = next(c for c in gallery["graph_map"].axes[0].collections if isinstance(c, LineCollection))
    assert len(lines.get_segments()) == 79
    assert (np.diff(lines.get_array()) >= 0).all(), "the strongest lie on top"
    np.testing.assert_allclose(lines.get_segments()[-1][:, 0], EAST[EDGES[WEIGHT.argmax()]] - 551_000)
    assert "80 images, 79 edges, 2 places of 3 images" in texts(gallery["graph_map"])
    bars = gallery["affinity_change"].axes[1].patches
    assert [bar.get_height() for bar in bars] == [1, 1, 1, 0, 2]
    assert "2 images, 0 edges" in texts(figures.graph_map([0.0, 9.0], [0.0, 0.0], [], [], radius_m=25))
    axes = gallery["greedy_steps"].axes[:3]
    assert [axis.get_title() for axis in axes] == [f"step {t + 1}: node {t} joins" for t in range(3)]
    assert all("-2.0" in texts(axis) for axis in axes)
    assert axes[2].get_xlabel() == "east of 551,000 m (m)", "no offset in a corner of the axes"


def test_the_loss_curve_draws_its_plateau_and_a_mean_that_forgets():
    loss = np.r_[np.full(50, 2.0), nan, np.full(49, 1.0)]
    raw, mean, plateau = figures.loss_curve(np.arange(100), loss, plateau=1.477).axes[0].lines
    np.testing.assert_array_equal(raw.get_ydata(), loss)
    assert set(plateau.get_ydata()) == {1.477} and plateau.get_label() == "plateau: 1.477"
    smooth = np.asarray(mean.get_ydata())
    assert smooth[0] == 2.0 and smooth[-1] == pytest.approx(1.0) and np.isfinite(smooth).all()
    np.testing.assert_allclose(smooth[51], np.nanmean(loss[48:52]))


def test_a_heatmap_covers_the_picture_patch_by_patch():
    values = np.arange(8.0).reshape(2, 4)
    figure = figures.heatmap_scales([np.zeros((20, 40, 3))], [values], scale=(0, 14), title="")
    fixed, own = (axis.get_images()[1] for axis in figure.axes[1:3])
    assert fixed.get_extent() == [-0.5, 39.5, 19.5, -0.5]
    np.testing.assert_array_equal(fixed.get_array(), values)
    assert fixed.origin == "upper" and fixed.get_interpolation() == "nearest"
    assert (fixed.get_clim(), own.get_clim()) == ((0, 14), (0, 7)), (
        "one fixed scale, the stretched one beside"
    )


def test_contributions_keep_their_sign_and_share_a_scale_in_a_pair():
    query, reference = np.array([[1.0, -2.0]]), np.array([[0.5, 4.0]])
    options = {"captions": {"m": ""}, "title": ""}
    figure = figures.contributions_pair(*IMAGES[:2], {"m": query}, {"m": reference}, **options)
    drawn = [axis.get_images()[1] for axis in figure.axes[:4] if len(axis.get_images()) == 2]
    np.testing.assert_allclose(drawn[0].get_array(), query / 4)
    np.testing.assert_allclose(drawn[1].get_array(), reference / 4)
    assert drawn[0].get_clim() == (-1, 1)


def test_a_chosen_patch_is_framed_and_so_is_its_match():
    similarity = np.zeros((4, 4))
    similarity[3, 1] = 0.75
    figure = figures.patch_match(*IMAGES[:2], (0, 2), similarity, grid=(4, 4))
    assert [axis.patches[0].get_xy() for axis in figure.axes[:2]] == [(13.5, -0.5), (6.5, 20.5)]
    assert "best match (3, 1): 0.75" in texts(figure)


def test_one_point_far_outside_does_not_shrink_a_map():
    cloud = np.append(POINTS["SAGE"][:12], [[1e6, 0]], axis=0)
    figure = figures.tsne_figure({"m": cloud}, np.zeros(13))
    assert np.ptp(figure.axes[0].collections[1].get_offsets(), axis=0).max() < 10 * np.ptp(cloud[:12])


def test_methods_stand_by_recall_and_an_open_mark_depends_on_its_batch():
    axis = figures.methods_compared({"here": PUBLISHED}).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["SAGE", "BoQ", "GeM"]
    alone, batch = (marks.get_offsets()[:, 0].tolist() for marks in axis.collections)
    assert (alone, batch) == ([93.8, 60.0], [94.5])


def test_tsne_points_name_their_file_and_place():
    chart, again = (
        figures.tsne_plotly(POINTS, PLACE, names=FILES, aid=AID, class_aid=CLASS_AID) for _ in range(2)
    )
    assert len(chart.data) == 4 * 10
    for trace in chart.data:
        for x, y, (index, file, place, method) in zip(trace.x, trace.y, trace.customdata, strict=True):
            assert (x, y) == tuple(POINTS[method][index])
            assert (file, place) == (FILES[index], str(PLACE[index]))
    written = [a.text for a in chart.layout.annotations]
    assert {f"<b>{m}</b><br>AID 0.800 [0.700, 0.900]" for m in METHODS} <= set(written)
    assert written.count("0.80") == 40
    assert json.loads(chart.to_json()) == json.loads(again.to_json()), "the same numbers give the same JSON"


def test_a_page_holds_a_thumbnail_for_every_point():
    chart = figures.tsne_plotly({"m": POINTS["SAGE"][:6]}, PLACE[:6], names=list("abcdef"))
    pictures = [Image.fromarray(image) for image in IMAGES]
    page = figures.thumbnail_page(chart, [*pictures[:5], pictures[5].resize((400, 200))])
    encoded = json.loads(re.search(r"const pictures = (\[.*?\]);", page).group(1))
    sizes = [Image.open(io.BytesIO(base64.b64decode(picture))).size for picture in encoded]
    assert sizes == [(28, 28)] * 5 + [(160, 80)]
    assert "{plot_id}" not in page and "plotly_hover" in page
    assert not re.search(r"<(script|link)[^>]*\b(src|href)=", page), "the page is read without a network"


def test_the_map_of_places_holds_query_and_found():
    options = {"query_east_m": EAST[:5], "query_north_m": NORTH[:5], "query_hover": list("abcde")}
    options |= {"hover": ["x"] * 80, "chosen": 2}
    chart = figures.places_plotly(EAST, NORTH, found=[7, 9], correct=[True, False], **options)
    assert [t.name for t in chart.data] == ["references", "queries", "found", "found, by rank", "this query"]
    np.testing.assert_allclose(chart.data[3].x, EAST[[7, 9]] - 551_000)
    assert chart.data[2].x[0] == chart.data[4].x[0] == EAST[2] - 551_000
    assert list(chart.data[3].marker.color) == [RIGHT, WRONG]
    assert list(chart.data[3].marker.symbol) == ["circle", "square"]
    assert chart.layout.yaxis.scaleanchor == "x"
    assert len(figures.places_plotly(EAST, NORTH, found=[], correct=[], **options).data[2].x) == 0
