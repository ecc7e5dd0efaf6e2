"""The town: the same bytes from the same seed, geometry that agrees, and folders that survive a kill."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.spatial import cKDTree

from sagelib import places
from townscape.folder import ensure_town, main, town_labels, write_town
from townscape.plan import (
    CONDITIONS,
    LABELS,
    PARTS,
    SEED_RANGES,
    Plan,
    Pose,
    TownConfig,
    plan_shots,
    stations,
)
from townscape.render import Town

L = {name: number for number, name in enumerate(LABELS)}


@pytest.fixture(scope="module")
def town():
    return Town(1110)


@pytest.fixture(scope="module")
def shots(town):
    return plan_shots(town, "test/queries")


def _files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.glob("images/**/*.jpg"))}


def _write(folder, **changes):
    settings = dict(
        train_seeds=(1000,), val_seeds=(), test_seeds=(1110,), images_per_town=6, size=32, progress=False
    )
    return write_town(folder, **{**settings, **changes})


def test_same_seed_same_bytes_whatever_was_rendered_before(town, shots):
    def render(a_town, shot):
        return a_town.render(shot.pose, shot.condition, 48, year=shot.year, visit=shot.visit)

    some = shots[:60:5]
    once = [render(town, s) for s in some]
    other = Town(1110)
    again = [render(other, s) for s in reversed(some)][::-1]
    for a, b in zip(once, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(once[0], Town(1111).render(some[0].pose, some[0].condition, 48))


def test_another_processor_differs_by_one_grey_level_at_most(tmp_path):
    """numpy without the vector units of this machine stands for another machine."""
    from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

    units = [name for name in __cpu_dispatch__ if __cpu_features__[name]]
    if not units:
        pytest.skip("numpy uses no vector unit here that could be switched off")
    code = (
        "import sys, numpy as np; from townscape.plan import plan_shots; from townscape.render import Town;"
        "t = Town(1110); np.save(sys.argv[1], [t.render(s.pose, s.condition, 48, year=s.year, visit=s.visit)"
        " for s in plan_shots(t, 'test/queries')[::17]])"
    )
    pictures = []
    for name, off in (("with.npy", ""), ("without.npy", " ".join(units))):
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / name)],
            check=True,
            env={**os.environ, "NPY_DISABLE_CPU_FEATURES": off},
        )
        pictures.append(np.load(tmp_path / name).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_shapes_and_types(town, shots):
    rgb, labels, depth = town.render(shots[0].pose, "day", (40, 64), labels=True, depth=True)
    assert rgb.shape == (40, 64, 3) and rgb.dtype == np.uint8
    assert labels.shape == (40, 64) and labels.dtype == np.uint8 and labels.max() < len(LABELS)
    assert depth.shape == (40, 64) and depth.dtype == np.float32
    np.testing.assert_array_equal(np.isinf(depth), labels == L["sky"])
    assert depth.min() > 0.2
    alone = town.render(shots[0].pose, "day", (40, 64))
    np.testing.assert_array_equal(alone, rgb)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_sky_lies_above_the_road(town, shots, condition):
    seen = 0
    for shot in shots[:24:2]:  # the even ones look along the street
        _, labels = town.render(shot.pose, condition, 48, labels=True)
        rows = np.arange(48)[:, None]
        sky, road = labels == L["sky"], labels == L["road"]
        if sky.any() and road.any():
            assert np.max(rows * sky) < np.min(np.where(road, rows, 48))
            seen += 1
    assert seen >= 8


def test_the_same_place_by_night_is_the_same_geometry(town, shots):
    for shot in shots[3:40:9]:
        day = town.render(shot.pose, "day", 64, year=shot.year, visit=7, labels=True, depth=True)
        for condition in CONDITIONS[1:]:
            other = town.render(shot.pose, condition, 64, year=shot.year, visit=7, labels=True, depth=True)
            np.testing.assert_array_equal(day[1], other[1])
            np.testing.assert_array_equal(day[2], other[2])
            assert np.abs(day[0].astype(int) - other[0]).mean() > 4


def test_night_is_darker_and_its_windows_are_lit(town, shots):
    day, night, labels = [], [], []
    for shot in shots[1:80:6]:
        a, b = town.render(shot.pose, "day", 64, labels=True)
        day.append(a), labels.append(b)
        night.append(town.render(shot.pose, "night", 64))
    day, night, labels = np.stack(day).mean(-1), np.stack(night).mean(-1), np.stack(labels)
    assert night.mean() < 0.5 * day.mean()
    window, wall = labels == L["window"], labels == L["facade"]
    assert night[window].mean() > night[wall].mean()
    assert day[window].mean() < day[wall].mean()


def test_fog_takes_contrast_with_depth(town, shots):
    near, far = [], []
    for shot in shots[:40:2]:
        day, depth = town.render(shot.pose, "day", 64, depth=True)
        fog = town.render(shot.pose, "fog", 64)
        for part, out in (((depth < 9), near), ((depth > 45) & np.isfinite(depth), far)):
            if part.sum() > 50:
                out.append(fog[part].std() / day[part].std())
    assert np.median(far) < 0.4 < np.median(near)


def test_depth_of_the_road_is_the_camera_s_arithmetic(town, shots):
    pose = replace(shots[0].pose, height_m=2.0, tilt=0.0, fov_deg=90.0)
    _, labels, depth = town.render(pose, "day", 60, labels=True, depth=True)
    # 90 degrees: focal length of half the width; the lower ray of row i looks down by (i + 0.75 - 30) / 30
    expected = 2.0 / ((np.arange(60) + 0.75 - 30) / 30)
    rows, columns = np.nonzero(labels == L["road"])
    assert len(rows) > 100
    np.testing.assert_allclose(depth[rows, columns], expected[rows], rtol=1e-5)


def test_walls_lie_on_the_plan(town, shots):
    """Every facade pixel, carried out by its depth in UTM, ends on the outline of a building of the plan."""
    n = 48
    for shot in shots[:30:5]:
        pose = replace(shot.pose, fov_deg=70.0)
        _, labels, depth = town.render(pose, "day", n, labels=True, depth=True)
        rows, columns = np.nonzero((labels == L["facade"]) | (labels == L["window"]) | (labels == L["door"]))
        assert len(rows) > 50
        aside = (columns + 0.75 - n / 2) / (n / 2) * np.tan(np.deg2rad(35.0))
        a = np.deg2rad(pose.heading_deg)
        east = pose.east_m + depth[rows, columns] * (np.sin(a) + aside * np.cos(a))
        north = pose.north_m + depth[rows, columns] * (np.cos(a) - aside * np.sin(a))
        x, y = town.from_utm(east, north)
        x0, x1, y0, y1 = town.box.T[:, :, None]
        outside = np.maximum(np.maximum(x0 - x, x - x1), np.maximum(y0 - y, y - y1))
        assert np.abs(outside).min(axis=0).max() < 0.01


def test_years_repaint_and_only_if_asked(shots):
    """Without change the walls of two years are equal but for noise and exposure; with it they are not."""
    differences = {}
    for change in (0.0, 1.0):
        town = Town(1110, TownConfig(appearance_change=change, occlusion=0, sensor_noise=0))
        found = []
        for shot in shots[1:40:4]:
            (a, labels_a), (b, labels_b) = (
                town.render(shot.pose, "fog", 48, year=year, labels=True) for year in (0, 3)
            )
            wall = (labels_a == L["facade"]) & (labels_b == L["facade"])
            a, b = a[wall].astype(float), b[wall].astype(float)
            found.append(np.abs(a / a.mean() - b / b.mean()).mean())
        differences[change] = np.median(found)
    assert differences[0.0] < 0.01
    assert differences[1.0] > 5 * differences[0.0]


def test_occlusion_brings_cars_and_persons(shots):
    share = []
    for occlusion in (0.0, 0.3, 1.0):
        town = Town(1110, TownConfig(occlusion=occlusion))
        labels = [town.render(s.pose, "day", 32, labels=True)[1] for s in shots[:40:2]]
        share.append(np.isin(np.stack(labels), (L["car"], L["person"])).mean())
    assert share[0] == 0 and share[0] < share[1] < share[2]


def test_every_label_is_seen_somewhere(town, shots):
    maps = [town.render(shot.pose, "day", 64, visit=shot.visit, labels=True)[1] for shot in shots[::3]]
    assert {LABELS[k] for k in np.unique(maps)} == set(LABELS)


def test_training_towns_may_have_fewer_pictures_than_those_for_test(tmp_path):
    folder = _write(tmp_path / "few", images_per_town=5, train_images_per_town=3)
    counts = {
        part: len(list((folder / "images" / part).iterdir())) for part in ("train/database", "test/database")
    }
    assert counts == {"train/database": 3, "test/database": 5}


def test_a_camera_may_look_past_every_wall(town):
    """From the edge of the town outwards there is ground and sky alone, in every condition."""
    east, north = town.to_utm(*(v - 5.0 for v in town.box[:, [0, 2]].min(0)))
    for condition in CONDITIONS:
        for turn in (180.0, 225.0, 270.0):
            pose = Pose(
                east_m=float(east),
                north_m=float(north),
                heading_deg=(turn - town.turn_deg) % 360,
                fov_deg=60.0,
            )
            _, labels = town.render(pose, condition, 42, labels=True)
            assert not np.isin(labels, [LABELS.index(n) for n in ("facade", "window", "door", "roof")]).any()


def test_towns_lie_kilometres_apart_in_one_zone_and_each_has_one_use():
    seeds = [s for r in SEED_RANGES.values() for s in r]
    assert len(set(seeds)) == len(seeds)
    origins = np.array([Plan.origin_of(s) for s in seeds])
    nearest = cKDTree(origins).query(origins, k=2)[0][:, 1]
    assert nearest.min() >= 2000
    assert 166_000 < origins[:, 0].min() and origins[:, 0].max() < 834_000
    east, north = Plan.origin_of(1000)
    shots = plan_shots(Plan(1000), "train/database")
    assert max(np.hypot(s.pose.east_m - east, s.pose.north_m - north) for s in shots) < 500


@pytest.mark.parametrize("seed", [1100, 1110, 1112])
def test_every_query_has_a_positive_that_looks_the_same_way(seed):
    town, split = Plan(seed), "val" if seed in SEED_RANGES["val"] else "test"
    shots = (plan_shots(town, f"{split}/{kind}") for kind in ("database", "queries"))
    refs, queries = (
        np.array([(s.pose.east_m, s.pose.north_m, s.pose.heading_deg) for s in p]) for p in shots
    )
    near = np.hypot(*(queries[:, None, :2] - refs[None, :, :2]).transpose(2, 0, 1)) <= 25
    turn = np.abs((queries[:, None, 2] - refs[None, :, 2] + 180) % 360 - 180)
    assert near.any(1).all()
    assert (near & (turn <= town.config.heading_jitter_deg)).any(1).all()
    assert 300 <= len(refs) == len(queries) <= 500


@pytest.mark.parametrize("seed", [1000, 1001, 7])
def test_almost_every_training_image_belongs_to_a_clique_of_ten(seed):
    """Images within 12.5 m of one of them are pairwise within 25 m: a clique, by the triangle."""
    shots = plan_shots(Plan(seed), "train/database")
    at = np.array([(s.pose.east_m, s.pose.north_m) for s in shots])
    near = np.hypot(*(at[:, None] - at[None]).transpose(2, 0, 1)) <= 12.5
    large = near.sum(1) >= 10
    assert near[:, large].any(1).mean() > 0.97
    assert 900 <= len(shots) <= 1300


def test_queries_come_by_condition_and_from_later_years(shots):
    for condition in CONDITIONS:
        assert sum(s.condition == condition for s in shots) >= len(shots) // 6
    assert {s.year for s in shots} == {1, 2, 3}
    # a condition never goes with one direction of view only
    looks = {(s.condition, i % 2) for i, s in enumerate(shots)}
    assert len(looks) == 2 * len(CONDITIONS)
    refs = plan_shots(Plan(1110), "test/database")
    assert {(s.condition, s.year) for s in refs} == {("day", 0)}


JITTERS = ["viewpoint_jitter_m", "sideways_jitter_m", "heading_jitter_deg", "fov_jitter_deg"]
JITTERS += ["height_jitter_m", "tilt_jitter"]


def _changes(config: TownConfig) -> dict[str, np.ndarray]:
    """By how much each query's pose differs from its reference's, named as the jitters are."""
    town, out = Plan(1110, config), []
    for a, b in zip(plan_shots(town, "test/database"), plan_shots(town, "test/queries"), strict=True):
        a, b = a.pose, b.pose
        dx, dy = np.subtract(town.from_utm(b.east_m, b.north_m), town.from_utm(a.east_m, a.north_m))
        turn = (b.heading_deg - a.heading_deg + 180) % 360 - 180
        out.append((dy, dx, turn, b.fov_deg - a.fov_deg, b.height_m - a.height_m, b.tilt - a.tilt))
    out = np.array(out)
    along_x = np.repeat([direction == 1 for direction, *_ in stations(town, config.reference_spacing_m)], 2)
    out[along_x, :2] = out[along_x, 1::-1]
    return dict(zip(JITTERS, out.T, strict=True))


def test_queries_depart_from_their_references_by_up_to_the_named_numbers():
    still = _changes(TownConfig(**dict.fromkeys(JITTERS, 0)))
    assert all((change == 0).all() for change in still.values())
    config = TownConfig()
    for name, change in _changes(config).items():
        limit = getattr(config, name)
        assert 0.9 * limit < np.abs(change).max() <= limit + 0.02, name
        assert 0.4 * limit < np.abs(change).mean() < 0.6 * limit, name


def test_training_pictures_vary_as_queries_do():
    """Trained on narrower changes of view than it is asked about, a model could not learn them."""
    poses = {
        part: [s.pose for s in plan_shots(Plan(1110), part)] for part in ("train/database", "test/queries")
    }
    for value in ("fov_deg", "height_m", "tilt"):
        spread = {part: np.std([getattr(p, value) for p in found]) for part, found in poses.items()}
        assert spread["train/database"] == pytest.approx(spread["test/queries"], rel=0.1), value


def test_folder_reads_back_as_places(small_town):
    for part, n in zip(PARTS, (48,) * 5, strict=True):
        table = places.read_folder(small_town / "images" / part)
        assert len(table) == n
        assert set(table.utm_zone) == {"31U"}
        assert np.isfinite(table.heading_deg).all()
        assert len(set(table.key)) == n
        towns, conditions = zip(*(note.split("-") for note in table.note), strict=True)
        assert set(table.city) == set(towns) and set(conditions) <= set(CONDITIONS)
        with Image.open(table.path[0]) as picture:
            assert picture.size == (56, 56) and picture.mode == "RGB"
    found = places.open_set(small_town.parent, small_town.name)
    assert all(len(p) > 0 for p in places.positives(found.database, found.queries))


def test_labels_of_written_pictures_fit_their_pixels(small_town):
    """The label of the sky lies where the written picture is as bright as the sky of a day."""
    test = places.open_set(small_town.parent, small_town.name)
    paths = [*test.database.path[:8], test.queries.path[5]]
    labels = town_labels(small_town, paths)
    assert labels.shape == (9, 56, 56) and labels.max() < len(LABELS)
    open_air = [i for i, drawn in enumerate(labels[:8]) if (drawn == L["sky"]).sum() > 50]
    assert len(open_air) >= 3
    for i in open_air:
        grey, sky = np.asarray(Image.open(paths[i]).convert("L"), dtype=float), labels[i] == L["sky"]
        assert grey[sky].std() < grey[~sky].std()
    with pytest.raises(ValueError, match="no picture of the town"):
        town_labels(small_town, [paths[0] + "x"])


def test_second_call_changes_nothing_and_a_lost_file_comes_back(tmp_path):
    folder = _write(tmp_path / "t")
    before = _files(folder)
    stamps = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert _write(folder) == folder
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == stamps
    lost = sorted(folder.glob("images/**/*.jpg"))[4]
    lost.unlink()
    _write(folder)
    assert _files(folder) == before


def test_processes_write_the_same_bytes(tmp_path):
    assert _files(_write(tmp_path / "one")) == _files(_write(tmp_path / "two", workers=2))


def test_a_killed_run_is_unfinished_and_resumes_to_equal_bytes(tmp_path):
    whole = _files(_write(tmp_path / "whole", images_per_town=40))
    folder = tmp_path / "killed"
    code = (
        "from townscape.folder import write_town; write_town("
        f"{str(folder)!r}, train_seeds=(1000,), val_seeds=(), test_seeds=(1110,), "
        "images_per_town=40, size=32, progress=False)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while len(list(folder.glob("images/**/@*.jpg"))) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    part = [p for p in folder.glob("images/**/@*.jpg")]
    assert not (folder / "manifest.json").exists()
    assert 5 <= len(part) < len(whole)
    (folder / "images/train/database/.tmp-dead-left.jpg").write_bytes(b"half")
    _write(folder, images_per_town=40)
    assert _files(folder) == whole
    assert (folder / "manifest.json").exists()


def test_other_settings_are_refused_by_name(tmp_path):
    _write(tmp_path / "t")
    with pytest.raises(ValueError, match="other settings .*size"):
        _write(tmp_path / "t", size=48)
    with pytest.raises(ValueError, match="other settings .*config"):
        _write(tmp_path / "t", config=TownConfig(occlusion=0.1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match="not empty"):
        _write(tmp_path / "mine")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_seeds": (1110,)}, "train_seeds must be a whole number from 0 to 1099, got 1110"),
        ({"test_seeds": (3,)}, "test_seeds must be a whole number from 1110 to 1129, got 3"),
        ({"train_seeds": (5, 5)}, "twice"),
        ({"images_per_town": 0}, "images_per_town must be a whole number of at least 1, or None, got 0"),
        ({"train_images_per_town": 0}, "train_images_per_town must be a whole number of at least 1"),
        ({"size": 4}, "size must be a whole number from 16 to 2048, got 4"),
        ({"workers": 0}, "workers"),
    ],
)
def test_bad_arguments_of_write_town(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        _write(tmp_path / "t", **changes)
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda town, pose: town.render(pose, "noon"),
            f"condition must be one of {', '.join(CONDITIONS)}, got 'noon'",
        ),
        (lambda town, pose: town.render(pose, year=-1), "year must be a number of at least 0, got -1"),
        (lambda town, pose: town.render(pose, size=4), "size must be a number of at least 8, got 4"),
        (lambda town, pose: TownConfig(occlusion=1.5), "occlusion must be a number from 0 to 1, got 1.5"),
        (lambda town, pose: TownConfig(query_conditions=("noon",)), "'noon'"),
        (
            lambda town, pose: TownConfig(query_conditions=()),
            "query_conditions must be a number of at least 1",
        ),
        (lambda town, pose: Plan(-1), "seed must be a whole number from 0 to 9999, got -1"),
        (lambda town, pose: plan_shots(town, "test/databse"), "part must be one of"),
        (lambda town, pose: replace(pose, fov_deg=180), "fov_deg must be a number from 10 to 130"),
    ],
)
def test_bad_arguments_elsewhere(town, shots, call, words):
    with pytest.raises(ValueError, match=words):
        call(town, shots[0].pose)


def test_half_the_spacing_gives_the_same_streets_twice_as_many_training_pictures(tmp_path, monkeypatch):
    written = {}
    monkeypatch.setattr(
        "townscape.folder.write_town", lambda folder, **how: written.update({folder.name: how})
    )
    for name, spacing in (("town", []), ("town-dense", ["--spacing", "2"])):
        assert main([str(tmp_path / name), *spacing]) == 0
    plain, dense = (
        [
            [shot.pose for shot in plan_shots(Plan(1000, how["config"]), part, images)]
            for part, images in (("train/database", how["train_images_per_town"]), ("test/queries", 120))
        ]
        for how in written.values()
    )
    assert len(dense[0]) == 2 * len(plain[0]) and dense[1] == plain[1]
    spans = [np.ptp([[p.east_m, p.north_m] for p in poses[0]], axis=0) for poses in (plain, dense)]
    assert np.allclose(*spans, atol=30)


def test_no_town_is_rendered_into_a_misspelt_folder(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="there is no folder .*misspelt to find or render town-small in"
    ):
        ensure_town(tmp_path / "misspelt", "town-small", images=4)
    assert not list(tmp_path.iterdir())
