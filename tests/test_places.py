"""Places: a frozen table, readers that name what is wrong, positives equal to a double loop."""

import functools
import math
import os
import re
import subprocess
import sys

import make_sets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sagelib.places import (
    BENCHMARKS,
    Places,
    PositiveRule,
    available,
    folder_name,
    heading_difference,
    latlon_to_utm,
    open_set,
    open_training_set,
    pairwise_m,
    parse_name,
    positives,
    read_folder,
    read_gsv_cities,
    read_msls,
    read_photos,
    read_unlabelled,
    same_grid,
)


def refused(sentence, function, *arguments, error=ValueError, **options):
    with pytest.raises(error, match=sentence):
        function(*arguments, **options)


absent = functools.partial(refused, error=FileNotFoundError)


# -- The table ------------------------------------------------------------------------------------------


def test_the_table_is_checked_and_cannot_be_changed():
    places = Places.build(["a", "b"])
    assert np.isnan(places.east_m).all() and np.isnat(places.date).all()
    assert (places.place == -1).all() and (places.utm_zone == "").all()
    assert Places.build("a.jpg").path.tolist() == ["a.jpg"]
    refused(r"north_m must have shape \(2,\) .* got \(3,\)", Places.build, ["a", "b"], north_m=[1, 2, 3])
    refused("nroth_m", Places.build, ["a"], nroth_m=1, error=TypeError)
    east = np.zeros(3)
    places = Places.build(["a", "b", "c"], east_m=east, north_m=0, city="x")
    with pytest.raises(ValueError, match="read-only"):
        places.east_m[0] = 1
    with pytest.raises(AttributeError):
        places.east_m = east
    east[0] = 7  # the table is a copy, not a view on what it was made of
    assert places.east_m[0] == 0


def test_slices_concat_and_labels():
    places = Places.build(list("abcde"), east_m=np.arange(5), left_out=["x: broken"])
    assert places[2].path.tolist() == ["c"] and places[-1].path.tolist() == ["e"]
    assert places[1:3].path.tolist() == ["b", "c"] and places[1:3].left_out == ("x: broken",)
    assert places[places.east_m > 2].path.tolist() == ["d", "e"]
    assert places[[4, 0, 0]].path.tolist() == ["e", "a", "a"]
    with pytest.raises(IndexError):
        places[5]
    table = Places.concat([Places.build(["a"], city="x"), Places.build(["b"], city="a much longer name")])
    assert table.city.tolist() == ["x", "a much longer name"]
    assert len(Places.concat([])) == 0
    places = Places.build(list("abcdef"), city=list("xxyyyx"), place=[7, 7, 7, 8, -1, 3])
    labels = places.labels()
    assert labels[4] == -1
    assert labels[0] == labels[1] != labels[2]
    assert sorted(set(labels[labels >= 0])) == [0, 1, 2, 3]


def test_fingerprint_follows_the_rows_and_not_the_folder():
    def table(root, north=(1.0, 2.0)):
        return Places.build([f"{root}/test/queries/a.jpg", f"{root}/test/queries/b.jpg"], north_m=north)

    assert table("/here").fingerprint() == table("/some/where/else").fingerprint()
    assert table("/here").fingerprint() != table("/here", (1.0, 2.5)).fingerprint()
    assert table("/here").fingerprint() != table("/here")[::-1].fingerprint()
    references = Places.build(["/here/test/database/a.jpg", "/here/test/database/b.jpg"], north_m=[1.0, 2.0])
    assert references.fingerprint() != table("/here").fingerprint()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(1, 60))
def test_clusters_are_tight_and_never_span_a_city_or_a_grid(seed, radius_m):
    rng, n = np.random.default_rng(seed), 60
    columns = {"city": rng.choice(["x", "y"], n), "utm_zone": rng.choice(["10S", "10T", "11S"], n)}
    east, north = rng.uniform(0, 200, (2, n))
    places = Places.build(map(str, range(n)), east_m=east, north_m=north, **columns).with_clusters(radius_m)
    label = places.place
    assert sorted(set(label)) == list(range(label.max() + 1))
    group = np.char.add(places.city, same_grid(places.utm_zone))
    for i, j in zip(*np.nonzero(label[:, None] == label), strict=True):
        assert (
            group[i] == group[j] and math.hypot(east[i] - east[j], north[i] - north[j]) <= 2 * radius_m + 1e-5
        )


def test_a_street_is_not_one_cluster():
    street = Places.build([str(i) for i in range(50)], east_m=np.arange(50) * 5.0, north_m=0.0)
    label = street.with_clusters(25).place
    assert label.max() + 1 == 9  # leaders every 30 m, the first position beyond 25 m, from 0 to 240 m
    first_come = Places.build(["a", "b", "c", "d"], east_m=[0, 20, 40, np.nan], north_m=0.0).with_clusters(25)
    assert first_come.place.tolist() == [0, 0, 1, -1]


# -- UTM ------------------------------------------------------------------------------------------------


def test_utm_of_known_points():
    """Metres by Krüger's series to the fourth order in n."""
    known = {
        (37.70664, -122.46225): ("10S", 547400.65, 4173402.98),
        (-33.87, 151.21): ("56H", 334435.71, 6250816.40),
        (60.39, 5.32): ("32V", 297230.22, 6700510.18),
        (78.22, 15.65): ("33X", 514813.53, 8683004.15),
        (-1e-9, 0.0): ("31M", 166021.44, 10000000.0),
        (84.0, -180.0): ("1X", 465005.34, 9329005.18),
        (-79.9, 179.9): ("60C", 556752.13, 1128161.37),
    }
    east, north, zone = latlon_to_utm(*zip(*known, strict=True))
    assert zone.tolist() == [row[0] for row in known.values()]
    np.testing.assert_allclose(
        np.stack([east, north], 1), [row[1:] for row in known.values()], rtol=0, atol=0.01
    )
    # Bergen lies in 31 by the rule, and Svalbard has no zones 32, 34, 36.
    lat, lon = [60.39, 78.0, 80.0, 78.0, 0.0, 10.0], [2.5, 8.9, 22.0, 35.0, 0.0, 180.0]
    assert latlon_to_utm(lat, lon)[2].tolist() == ["31V", "31X", "35X", "37X", "31N", "1P"]


def test_metres_stay_within_a_grid_and_headings_go_round():
    grids = ["10 north", "10 north", "10 south", "11 north", ""]
    assert same_grid(["10S", "10T", "10M", "11S", ""]).tolist() == grids
    a = Places.build(["a", "b"], east_m=[0, 30], north_m=[0, 40], utm_zone=["10S", "10T"])
    assert pairwise_m(a, a).tolist() == [[0, 50], [50, 0]]
    for other in ("11S", "10M"):
        b = Places.build(["c"], east_m=0, north_m=0, utm_zone=other)
        refused("different UTM zones cannot be compared", pairwise_m, a, b)
    turns = heading_difference([350, 10, 90, -170, 0, np.nan], [10, 350, 450, 170, 180, 3])
    np.testing.assert_array_equal(turns, [20, 20, 0, 20, 180, np.nan])  # the shorter way round


# -- Positives ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 5.0, 25.0, 200.0]))
def test_positives_equal_a_double_loop(seed, radius_m):
    rng = np.random.default_rng(seed)

    def table(n):
        # A lattice of whole metres: many distances are exactly 5 or 25.
        return Places.build(
            [str(i) for i in range(n)],
            east_m=547_000 + rng.integers(0, 40, n),
            north_m=4_173_000 + rng.integers(0, 40, n),
            utm_zone=["10S", "11S"] * (n // 2),
        )

    database, queries = table(40), table(20)
    answers = positives(database, queries, PositiveRule(radius_m=radius_m))
    for q in range(20):
        east, north = database.east_m - queries.east_m[q], database.north_m - queries.north_m[q]
        near = (database.utm_zone == queries.utm_zone[q]) & (east**2 + north**2 <= radius_m**2)
        assert answers[q].tolist() == [r for r in range(40) if near[r]]


def test_exactly_25_metres_in_centimetres_is_inside():
    # 1344^2 + 2108^2 = 880^2 + 2340^2 = 2500^2: 25 m on paper, but not in binary numbers.
    rng = np.random.default_rng(0)
    legs = np.array([(25.0, 0.0), (7.0, 24.0), (13.44, 21.08), (8.80, 23.40)])[rng.integers(0, 4, 400)]
    east, north = np.round(rng.uniform(1e5, 9e5, 400), 2), np.round(rng.uniform(0, 1e7, 400), 2)
    there_east, there_north = np.round(east + legs[:, 0], 2), np.round(north + legs[:, 1], 2)
    metres = np.hypot(there_east - east, there_north - north)
    assert (metres > 25).any() and (metres < 25).any()  # so the test is about something
    for i in range(400):
        here = Places.build(["r"], east_m=east[i], north_m=north[i])
        there = Places.build(["q"], east_m=there_east[i], north_m=there_north[i])
        assert positives(here, there)[0].tolist() == [0]
        beyond = there.replace(east_m=round(there_east[i] + 0.01, 2))
        assert positives(here, beyond)[0].tolist() == []


def test_zones_are_searched_apart_and_a_lonely_zone_is_refused():
    database = Places.build(["a", "b"], east_m=0.0, north_m=0.0, utm_zone=["10S", "33U"])
    queries = Places.build(["q"], east_m=0.0, north_m=0.0, utm_zone="33U")
    assert positives(database, queries)[0].tolist() == [1]
    refused("1 queries lie in UTM zone '55 south'", positives, database, queries.replace(utm_zone="55H"))
    refused("q.jpg: this query has no position .1 of 1", positives, database, Places.build(["q.jpg"]))


def test_frames_count_frames():
    step = 25 / 10.5
    north = np.floor(np.arange(30) * step * 10) / 10
    database = Places.build([str(i) for i in range(30)], east_m=0.0, north_m=north)
    queries = database[[0, 10, 29]]
    rule = PositiveRule(radius_m=None, frames=1)
    assert [p.tolist() for p in positives(database, queries, rule)] == [[0, 1], [9, 10, 11], [28, 29]]
    shuffled = np.random.default_rng(0).permutation(30)
    answers = positives(database[shuffled], queries, rule)
    assert [sorted(shuffled[p].tolist()) for p in answers] == [[0, 1], [9, 10, 11], [28, 29]]
    refused("no equally spaced straight line", positives, database[[0, 1, 2, 20]], queries, rule)
    for wrong in ({"radius_m": None}, {"frames": 1}, {"radius_m": -1.0}, {"radius_m": None, "frames": -1}):
        refused("radius_m|frames", PositiveRule, **wrong)


# -- @-names and folders --------------------------------------------------------------------------------
text = st.text(st.characters(exclude_characters="@/\\\0", exclude_categories=("Cs", "Cc")), max_size=12)


metres, zones = st.floats(-1e6, 1e7), st.none() | st.integers(1, 60)
known = {"lat": st.floats(-80, 84), "lon": st.floats(-180, 180), "heading_deg": st.floats(0, 360)}
known |= {"tile": st.integers(0, 99), "pano_id": text, "note": text}


@settings(max_examples=100, deadline=None)
@given(metres, metres, zones, st.sampled_from("CMNX"), st.fixed_dictionaries({}, optional=known))
def test_names_come_back(east, north, zone, letter, known):
    name = folder_name(east, north, zone, letter if zone else "", timestamp="20160102_030405", **known)
    assert name.count("@") == 15 and name.endswith("@.jpg")
    fields = parse_name("some/folder/" + name)
    assert [fields["east_m"], fields["north_m"]] == pytest.approx([east, north], abs=0.00501)
    assert fields["utm_zone"] == (f"{zone}{letter}" if zone else "")
    texts = known.get("pano_id", ""), known.get("note", ""), "20160102_030405"
    assert (fields["pano_id"], fields["note"], fields["timestamp"]) == texts
    for field, exact in (("heading_deg", 0.00501), ("lat", 5.1e-6), ("lon", 5.1e-6)):
        if field in known:
            assert float(fields[field]) == pytest.approx(known[field], abs=exact)
        else:
            assert fields[field] == "" or np.isnan(fields[field])


def test_a_known_name():
    name = "@0547400.64@4173402.98@10@S@037.70664@-122.46225@V7zaBFwChSOVnuyfmJImvQ@@@@@@20150601@day@.jpg"
    fields = parse_name(name)
    assert (fields["east_m"], fields["north_m"], fields["utm_zone"]) == (547400.64, 4173402.98, "10S")
    assert fields["pano_id"] == "V7zaBFwChSOVnuyfmJImvQ" and fields["note"] == "day"
    known = {"lat": 37.70664, "lon": -122.46225, "pano_id": fields["pano_id"], "timestamp": "20150601"}
    assert folder_name(547400.64, 4173402.98, 10, "S", note="day", **known) == name
    assert parse_name("@0@179000@@@@@0179@@@@@@@@.jpg")["utm_zone"] == ""
    assert parse_name("@12.5@7@.jpg")["east_m"] == 12.5  # only the first two fields are required


def test_names_that_are_refused():
    names = {"IMG_2041": "two numbers", "@12.5@": "two numbers", "@12.5@north@": "two numbers"}
    names |= {"@nan@7@": "two numbers", "@1@2@77@S@": "zone .* 1..60 .*'77'", "@1@2@10@I@": "band"}
    for name, sentence in (names | {"@1@2@10@S@@@key@@east@": "heading .* got 'east'"}).items():
        refused(sentence, parse_name, name + ".jpg")
    refused("note", folder_name, 1, 2, note="a@b")
    refused("height", folder_name, 1, 2, height=np.nan)
    refused("roof", folder_name, 1, 2, roof=1, error=KeyError)


def test_folders_and_towns(tmp_path):
    part = make_sets.pitts_like(tmp_path) / "images" / "test"
    database = read_folder(part / "database")
    assert len(database) == 12 and database.city.tolist() == ["pitts30k"] * 12
    assert database.utm_zone.tolist() == ["17T"] * 12
    assert database.path.tolist() == sorted(database.path.tolist())
    assert database.key[0] == "000000" and database.note[1] == "pitch1_yaw2"
    for i, note in enumerate(["town1000-night", "town1001-day"]):
        fields = {"pano_id": f"{note[:8]}d00000", "note": note, "timestamp": "2016"}
        make_sets.write_picture(tmp_path / "towns" / folder_name(1000.0 * i, 0, 31, "U", **fields), i)
    places = read_folder(tmp_path / "towns")
    assert places.city.tolist() == ["town1000", "town1001"]
    assert places.date.astype(str).tolist() == ["2016-01-01"] * 2


def test_bad_files_are_named_or_left_out(tmp_path):
    part = make_sets.pitts_like(tmp_path) / "images" / "test" / "database"
    whole = sorted(part.iterdir())
    make_sets.write_picture(part / "holiday.jpg", 1)
    cut = part / "@0585999.00@4476400.00@17@T@.jpg"
    cut.write_bytes(whole[0].read_bytes()[:-200])
    garbage = part / "@0585998.00@4476400.00@17@T@.jpg"
    garbage.write_bytes(b"no picture")
    again = part / "again" / whole[0].name
    again.parent.mkdir()
    again.write_bytes(whole[0].read_bytes())
    (part / ".tmp-12-@1@2@.jpg").write_bytes(b"half")  # what a killed writer leaves behind is no picture

    refused(r"holiday\.jpg: the name must begin with two numbers", read_folder, part)
    places = read_folder(part, on_error="skip")
    assert places.path.tolist() == [str(path) for path in whole]
    assert len(places.left_out) == 4
    sentences = "\n".join(places.left_out)
    for name in ("holiday.jpg", cut.name, garbage.name, str(again)):
        assert name in sentences
    assert "the same picture as" in sentences and "does not decode" in sentences
    assert all(line.count("\n") == 0 for line in places.left_out)
    unchecked = read_folder(part, on_error="skip", check_pictures=False)
    assert len(unchecked) == len(places) + 2


def test_empty_and_absent_folders(tmp_path):
    absent("nowhere: there is no such folder", read_folder, tmp_path / "nowhere")
    (tmp_path / "queries").mkdir()
    refused("queries: no pictures", read_folder, tmp_path / "queries")
    refused("queries: no pictures", read_folder, tmp_path / "queries", on_error="skip")
    refused("raise, skip, got 'ignore'", read_folder, tmp_path / "queries", on_error="ignore")
    folder = make_sets.unlabelled_like(tmp_path)
    places = read_unlabelled(folder)
    assert len(places) == 5 and np.isnan(places.east_m).all() and places.city[0] == "unlabelled"
    (folder / "frame_001.png").write_bytes((folder / "frame_001.png").read_bytes()[:60])
    refused(r"frame_001\.png: this picture does not decode", read_unlabelled, folder)
    assert len(read_unlabelled(folder, on_error="skip")) == 4


# -- GSV-Cities -----------------------------------------------------------------------------------------


def test_gsv_cities(tmp_path):
    root = make_sets.gsv_like(tmp_path)
    places = read_gsv_cities(root, check_pictures=True)
    assert len(places) == 24 and sorted(set(places.city)) == ["London", "Melbourne"]
    assert all(open(path, "rb").read(2) == b"\xff\xd8" for path in places.path)
    london, melbourne = (places[places.city == city] for city in ("London", "Melbourne"))
    assert set(melbourne.utm_zone) == {"55H"}
    assert london.place.tolist() == [1] * 4 + [2] * 4 + [3] * 4
    assert len(set(places.labels())) == 6
    assert london.heading_deg[:4].tolist() == [0, 90, 180, 270]
    assert london.date[:2].astype(str).tolist() == ["2008-01-01", "2009-04-01"]
    assert london.key[0] == "pano_0-0"
    # Places lie 0.001 degrees of latitude apart, about 111 m; pictures of a place within 4 m.
    metres = pairwise_m(london, london)
    assert metres[0, 4] == pytest.approx(111, abs=1) and metres[:4, :4].max() < 4
    assert read_gsv_cities(root, "Melbourne").fingerprint() == melbourne.fingerprint()  # a bare name is one


def test_a_city_on_a_border_has_one_grid(tmp_path):
    # Streets on both sides of Greenwich: zones 30 and 31 by the rule, one grid for the city.
    root = make_sets.gsv_like(tmp_path, ("London",), per_place=2)
    csv = root / "Dataframes" / "London.csv"
    *lines, fifth, sixth = csv.read_text().splitlines()
    csv.write_text("\n".join([*(line.replace("-0.000300", "0.000300") for line in lines), fifth, sixth]))
    for path in (root / "Images" / "London").iterdir():
        if "_0000003_" not in path.name:
            path.rename(path.with_name(path.name.replace("-0.000300", "0.000300")))
    places = read_gsv_cities(root)
    assert set(places.utm_zone) == {"31U"}
    assert pairwise_m(places, places).max() < 300


def test_gsv_mistakes_are_named(tmp_path):
    root = make_sets.gsv_like(tmp_path, ("London",))
    csv = root / "Dataframes" / "London.csv"
    good = csv.read_text().splitlines()

    def with_line(number, line):
        csv.write_text("\n".join([*good[: number - 1], line, *good[number:]]) + "\n")

    with_line(3, good[2].replace("51.510110", "north"))
    refused(r"London\.csv, line 3, column 'lat': .* got 'north'", read_gsv_cities, root)
    with_line(4, good[3].replace("London", "Paris"))
    refused(r"line 4, column 'panoid': expected a picture in .*'Paris_0000001_", read_gsv_cities, root)
    with_line(5, good[3])
    refused(r"line 5, column 'panoid': expected a picture that no line above has", read_gsv_cities, root)
    skipped = read_gsv_cities(root, on_error="skip")
    assert len(skipped) == 11 and "no line above" in skipped.left_out[0]
    assert "pictures without a good row in London.csv, left out: 1, such as London_00" in skipped.left_out[1]
    csv.write_text("\n".join(line.rsplit(",", 1)[0] for line in good) + "\n")
    refused(r"London\.csv, line 1: there is no column 'panoid'; its columns are place", read_gsv_cities, root)
    csv.write_text(good[0] + "\n")
    refused("no rows", read_gsv_cities, root)
    absent(r"Rome\.csv: there is no such file", read_gsv_cities, root, ["Rome"])


# -- Mapillary SLS --------------------------------------------------------------------------------------


def test_msls(tmp_path):
    root = make_sets.msls_like(tmp_path)
    places = read_msls(root, check_pictures=True)
    assert set(places.city) == {"zurich"}  # the validation cities stay out unless they are named
    assert len(places) == 10  # 2 x 6, less one panorama each
    query = read_msls(root, part="query")
    assert query.key.tolist() == [f"zurich-q_{i}" for i in (0, 2, 3, 4, 5)]
    assert query.place.tolist() == [0, 1, 1, 2, 2]
    notes = "forward-day forward-day forward-night sideways-day sideways-night"
    assert query.note.tolist() == notes.split()
    assert query.heading_deg.tolist() == [0, 21, 31.5, 42, 52.5]
    assert query.frame.tolist() == [100, 102, 103, 104, 105] and set(query.sequence) == {"seq-zurich"}
    assert query.date[0] == np.datetime64("2016-01-15") and set(query.utm_zone) == {"32T"}
    assert read_msls(root, part="query", chosen=True).key.tolist() == [f"zurich-q_{i}" for i in (0, 2, 4)]
    assert set(read_msls(root, "sf").city) == {"sf"}  # a bare name is one name


def test_msls_city_in_two_zones_keeps_its_own_metres(tmp_path):
    places = read_msls(make_sets.msls_like(tmp_path, ("london",)), part="query")
    assert sorted(set(places.utm_zone)) == ["30U", "31U"]
    assert ((places.utm_zone == "30U") == (places.east_m > 500_000)).all()
    refused("30 north, 31 north", pairwise_m, places, places)


def test_msls_mistakes_are_named(tmp_path):
    root = make_sets.msls_like(tmp_path, ("zurich",))
    folder = root / "train_val" / "zurich" / "query"
    absent("rome", read_msls, root, ["rome"])

    def broken(name, old, new, sentence):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace(old, new, 1))
        refused(sentence, read_msls, root)
        (folder / name).write_text(text)

    broken("postprocessed.csv", "unique_cluster", "cluster", "line 1: there is no column 'unique_cluster'")
    order = r"raw\.csv, line 4, column 'key': expected the order of postprocessed\.csv, got 'zurich-q_9'"
    broken("raw.csv", "zurich-q_2", "zurich-q_9", order)
    broken("raw.csv", ",21.0,", ",north,", r"raw\.csv, line 4, column 'ca': expected a number")
    (folder / "images" / "zurich-q_3.jpg").unlink()
    picture = r"postprocessed\.csv, line 5, column 'key': expected a picture in .*, got 'zurich-q_3\.jpg'"
    refused(picture, read_msls, root)
    assert len(read_msls(root, on_error="skip")) == 9
    (folder / "raw.csv").write_text("\n".join((folder / "raw.csv").read_text().splitlines()[:-1]) + "\n")
    refused(r"raw\.csv: 5 rows, but postprocessed\.csv has 6", read_msls, root)


# -- One's own photographs ------------------------------------------------------------------------------


def test_photos(tmp_path):
    folder = make_sets.photos_like(tmp_path)
    places = read_photos(folder)
    assert len(places) == 4 and set(places.city) == {"holiday"} and set(places.utm_zone) == {"29S"}
    assert np.isnan(places.heading_deg[0]) and places.heading_deg[1] == 90
    assert places.date.astype(str).tolist()[0] == "2024-05-01"
    assert pairwise_m(places[:1], places[1:2])[0, 0] == pytest.approx(11.1, abs=0.1)
    make_sets.write_picture(folder / "a.png", 0)
    header = ["File", "East", "North", "Zone", "place"]
    make_sets.write_csv(folder / "where.csv", header, [["a.png", 5.5, 7, "10s", 3]])
    places = read_photos(folder, "where.csv")
    assert (places.east_m[0], places.utm_zone[0], places.place[0]) == (5.5, "10S", 3)
    assert places.city[0] == folder.name
    make_sets.write_csv(folder / "where.csv", ["path", "east", "north", "zone"], [["a.png", 5, 7, "61S"]])
    refused("line 2, column 'zone': .* got '61S'", read_photos, folder, "where.csv")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("day 1/IMG_2.jpg,91,-9.14,0,2024", r", column 'lat': expected a number in -80\.\.84 .*got '91'"),
        ("day 1/IMG_2.jpg,,-9.14,0,2024", ", column 'lat': .* got ''"),
        ("day 1/IMG_2.jpg,38,-9.14,east,2024", ", column 'heading': .* got 'east'"),
        ("day 1/IMG_2.jpg,38,-9.14,0,yesterday", ", column 'date': expected YYYY.* got 'yesterday'"),
        ("day 1/none.jpg,38,-9.14,0,2024", ", column 'file': expected a picture in .*got 'day 1/none.jpg'"),
        ("day 1/IMG_1.jpg,38,-9.14,0,2024", ", column 'file': expected a picture that no line above has"),
        ("broken.jpg,38,-9.14,0,2024", r": .*broken\.jpg: this picture does not decode"),
    ],
)
def test_photo_mistakes_are_named(tmp_path, line, sentence):
    folder, sentence = make_sets.photos_like(tmp_path), rf"photos\.csv, line 4{sentence}"
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not really")
    lines = (folder / "photos.csv").read_text().splitlines()
    (folder / "photos.csv").write_text("\n".join([*lines[:3], line, *lines[4:]]) + "\n")
    refused(sentence, read_photos, folder)
    skipped = read_photos(folder, on_error="skip")
    assert len(skipped) == 3 and re.search(sentence, skipped.left_out[0])


def test_readers_raise_once_with_the_first_five_problems(tmp_path):
    folder = make_sets.photos_like(tmp_path, n=8)
    lines = (folder / "photos.csv").read_text().splitlines()
    for i in (2, 3, 4, 5, 6, 8):
        lines[i] = lines[i].replace("-9.14", "west")
    (folder / "photos.csv").write_text("\n".join(lines).replace("2024-05-01", "May"))
    with pytest.raises(ValueError) as caught:
        read_photos(folder)
    *first, last = str(caught.value).split("\n")
    assert "line 2, column 'date'" in first[0] and len(first) == 4
    assert all(f"line {i}, column 'lon'" in line for i, line in zip((3, 4, 5), first[1:], strict=True))
    assert last.endswith('(7 in all; on_error="skip" leaves them out)')
    skipped = read_photos(folder, on_error="skip")
    assert len(skipped) == 1 and len(skipped.left_out) == 7


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("file,lat,heading\n", "there is no column 'lon'; its columns are file, lat, heading"),
        ("picture,lat,lon\n", "there is no column 'file'; its columns are picture, lat, lon"),
        ("file\n", "there is no column 'lat'"),
        ("", "line 1: the file is empty"),
        ("file,lat,lon\n", "the table has no rows"),
        ("file,lat,lon\na.jpg,1,2\nb.jpg,1,2,3\n", r"line 3: 4 values under 3 columns"),
        ("file,lat,lon\n0.jpg,48,137,11,575\n", "line 2: 5 values under 3 columns"),
        ("file,lat,lon\n0.jpg,48,11\n\n1.jpg,48,11,5\n", "line 4: 4 values under 3 columns"),
        ('file,lat,lon\n0.jpg,"48,137",11\n', r"line 2, column 'lat': .*with a point\), got '48,137'"),
        ("file;lat;lon\n0.jpg;48,1;11,5\n", "its columns are file;lat;lon .needed, with commas between"),
        ("file,Lat,lon,LAT\n0.jpg,48,11,48\n", r"line 1: the columns \['Lat', 'LAT'\] have one name"),
        ("file,lat,lon\n\n0.jpg,48,11\n , ,\n1.jpg,north,11\n", "line 5, column 'lat'"),
        ("file,lat,lon,note\n0.jpg,48,11,a\n1.jpg,48,11,M\xfcnchen\n", "line 3: not UTF-8"),
        ('file,lat,lon\n0.jpg,"48,11\n1.jpg,48,11\n', "line 3: no values between commas .unexpected end"),
    ],
)
def test_one_rule_for_tables(tmp_path, text, sentence):
    for i in range(2):
        make_sets.write_picture(tmp_path / f"{i}.jpg", i)
    (tmp_path / "photos.csv").write_bytes(text.encode("latin-1"))
    refused(rf"photos\.csv.*{sentence}", read_photos, tmp_path)


# -- What is passed over, followed, refused or taken as it is, alike in every reader --------------------


def test_links_are_followed_once_and_endings_are_known(tmp_path):
    part = make_sets.pitts_like(tmp_path) / "images" / "test" / "database"
    whole = [path.name for path in sorted(part.iterdir())]
    (tmp_path / "disk2").mkdir()
    for name in whole[4:]:
        (part / name).rename(tmp_path / "disk2" / name)
    (part / "more").symlink_to(tmp_path / "disk2")
    (part / "again").symlink_to(tmp_path / "disk2")  # another way to the same pictures
    (tmp_path / "disk2" / "loop").symlink_to(part)
    for name in ("notes.txt", "IMG_1.HEIC", ".DS_Store"):
        (part / name).write_bytes(b"")
    places = read_folder(part)
    assert sorted(os.path.basename(path) for path in places.path) == whole
    (sentence,) = places.left_out
    assert "files without the ending of a picture, left out: 2, such as IMG_1.HEIC" in sentence
    assert len(read_unlabelled(part)) == 12
    (tmp_path / "endings").mkdir()
    for i, ending in enumerate((".jfif", ".jpe", ".gif", ".pgm", ".tiff", ".PNG")):
        kind = {".jfif": "JPEG", ".jpe": "JPEG", ".pgm": "PPM"}.get(ending)
        Image.new("L", (8, 8)).save(tmp_path / "endings" / f"@{i}@2@{ending}", format=kind)
    assert len(read_folder(tmp_path / "endings")) == len(read_unlabelled(tmp_path / "endings")) == 6


def test_hidden_names_are_nothing(tmp_path):
    msls, gsv = make_sets.msls_like(tmp_path), make_sets.gsv_like(tmp_path)
    (msls / "train_val" / ".ipynb_checkpoints").mkdir()
    (gsv / "Dataframes" / "._Paris.csv").write_bytes(b"\0\5\x16\7")
    (gsv / "Images" / "London" / ".DS_Store").write_bytes(b"")
    assert set(read_msls(msls).city) == {"zurich"}
    assert set(read_gsv_cities(gsv).city) == {"London", "Melbourne"} and read_gsv_cities(gsv).left_out == ()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow no such names")
def test_names_that_are_no_text_are_refused_at_reading(tmp_path):
    make_sets.write_picture(tmp_path / "@1@2@.jpg", 0)
    strange = os.fsencode(tmp_path) + b"/@1@3@@@@@@@@@@@@M\xfcnchen@.jpg"
    os.rename(make_sets.write_picture(tmp_path / "a.jpg", 1), strange)
    for reader in (read_folder, read_unlabelled):
        refused(r"M\\xfcnchen@\.jpg: this name is not UTF-8 text; rename it", reader, tmp_path)
        (sentence,) = reader(tmp_path, on_error="skip").left_out
        assert sentence.encode()


def test_blank_lines_are_nothing_in_any_table(tmp_path):
    readers = {read_photos: make_sets.photos_like, read_gsv_cities: make_sets.gsv_like}
    for reader, make in (readers | {read_msls: make_sets.msls_like}).items():
        folder = make(tmp_path)
        before = reader(folder).fingerprint()
        for csv in folder.rglob("*.csv"):
            lines = csv.read_text().splitlines()
            csv.write_text("\n".join(["", lines[0], "", *lines[1:], "," * lines[0].count(","), "", ""]))
        assert reader(folder).fingerprint() == before


def test_the_same_name_is_another_photograph_elsewhere(tmp_path):
    for i, folder in enumerate("abc"):  # another place, or another picture of the same place
        name = make_sets.at_name(1000.0 * (i // 2), 0, key="0001")
        make_sets.write_picture(tmp_path / folder / name, i)
    assert len(read_folder(tmp_path)) == 3
    for name, zone, note in (
        ("@1@2@photo_001@.jpg", "", "photo_001"),
        ("@1@2@0077@day@.jpg", "", "0077 day"),
        ("@1@2@IMG_3@@@@key@@90@@@@@night@.jpg", "", "IMG_3 night"),
        ("@1@2@10S@.jpg", "10S", ""),
        ("@1@2@10@.jpg", "10", ""),
    ):
        fields = parse_name(name)
        assert (fields["east_m"], fields["utm_zone"], fields["note"]) == (1, zone, note)


def test_a_set_knows_its_city_and_its_split(tmp_path):
    part = tmp_path / "set" / "train"  # without a folder "images" too
    for note in ("day-sunny", "night-rain", "2015-08-01", "day_front_left", "town1-x"):
        make_sets.write_picture(part / "database" / make_sets.at_name(1, 2, note=note), 0)
    make_sets.write_picture(part / "queries" / make_sets.at_name(1, 2, note="dusk"), 1)
    assert set(open_training_set(tmp_path, "set").city) == {"set"}
    for below, name in (("images", "s/images"), ("flat", "s")):
        for side in ("database", "queries"):
            make_sets.write_picture(tmp_path / below / name / "val" / side / "@1@2@.jpg", 0)
        opened = open_set(tmp_path / below, "s", "val")
        assert (opened.split, opened.database.city[0], opened.queries.city[0]) == ("val", "s", "s")


def test_msls_as_released(tmp_path):
    root = make_sets.msls_like(tmp_path, ("zurich",))
    folder = root / "train_val" / "zurich" / "query"
    (folder / "images" / "zurich-q_2.jpg").write_bytes(b"")
    places = read_msls(root, part="query")
    assert places.key.tolist() == [f"zurich-q_{i}" for i in (0, 3, 4, 5)]
    assert "empty files, left out: 1, such as zurich-q_2.jpg" in places.left_out[0]
    for name in ("raw.csv", "postprocessed.csv", "subtask_index.csv"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("True", "1").replace("False", "0"))
    assert read_msls(root, part="query").fingerprint() == places.fingerprint()
    assert read_msls(root, part="query", chosen=True).key.tolist() == ["zurich-q_0", "zurich-q_4"]
    raw = (folder / "raw.csv").read_text()
    (folder / "raw.csv").write_text(raw.replace(",0\n", ",1\n"))
    assert len(read_msls(root, part="query")) == 0  # panoramas, all of them
    (folder / "raw.csv").write_text(raw.replace(",0\n", ",perhaps\n", 1))
    refused(r"raw\.csv, line 2, column 'pano': expected true or false, 1 or 0, got", read_msls, root)


# -- Sets of one's own, and sets to train on ------------------------------------------------------------


def test_a_csv_is_found_as_it_stands_and_in_the_folder(tmp_path, monkeypatch):
    folder = make_sets.photos_like(tmp_path)
    (folder / "photos.csv").rename(folder / "positions.csv")
    monkeypatch.chdir(tmp_path)
    for csv in ("holiday/positions.csv", "positions.csv", folder / "positions.csv", None):
        assert len(read_photos("holiday", csv)) == 4
    absent(r"no such file, nor is there one in holiday", read_photos, "holiday", "spring.csv")
    (tmp_path / "positions.csv").write_text("file,lat,lon\n")
    refused(r"holiday/positions\.csv and positions\.csv are both", read_photos, "holiday", "positions.csv")


def test_photographs_and_a_csv_are_a_set(tmp_path):
    folder = make_sets.photos_like(tmp_path, n=6)
    opened = open_set(tmp_path, "holiday")
    assert (len(opened.database), len(opened.queries)) == (3, 3) and all(len(p) for p in opened.positives())
    assert len(open_training_set(tmp_path, "holiday")) == 6
    refused(r"photos\.csv: no photograph is for val/database", open_set, tmp_path, "holiday", "val")
    lines = (folder / "photos.csv").read_text().splitlines()
    parts = ["part", "train", "train", "val/database", "val/queries", "database", "test/queries"]
    (folder / "spring.csv").write_text("\n".join(f"{a},{b}" for a, b in zip(lines, parts, strict=True)))
    assert len(open_training_set(tmp_path, "holiday/spring.csv")) == 2
    for split, i in (("val", 2), ("test", 4)):
        opened = open_set(tmp_path, "holiday/spring.csv", split)
        names = [os.path.basename(path) for path in (*opened.database.path, *opened.queries.path)]
        assert names == [f"IMG_{i}.jpg", f"IMG_{i + 1}.jpg"]
    (folder / "spring.csv").write_text((folder / "spring.csv").read_text().replace("val/", "valid/"))
    refused(r"line 4, column 'part': .* got 'valid/database'", open_set, tmp_path, "holiday/spring.csv")


def test_every_format_is_a_training_set(tmp_path):
    make_sets.papers_training_data(tmp_path)
    assert set(open_training_set(tmp_path, "msls").city) == {"zurich", "london"}
    assert set(open_training_set(tmp_path, "gsv-cities").labels()) == set(range(8))
    assert set(open_set(tmp_path, "msls", "val").database.city) == {"cph", "sf"}
    make_sets.pitts_like(tmp_path, "street", "train")
    assert len(open_training_set(tmp_path, "street")) == 18
    next((tmp_path / "gsv-cities" / "Images" / "London").iterdir()).unlink()
    refused('expected a picture .*on_error="skip"', open_training_set, tmp_path, "gsv-cities")
    assert len(open_training_set(tmp_path, "gsv-cities", on_error="skip")) == 31
    absent("no set with a training part", open_training_set, tmp_path, "nowhere")


# -- Positives that a file lists ------------------------------------------------------------------------


def write_lists(path, lists):
    offsets = np.cumsum([0, *map(len, lists)])
    np.savez(path, indices=np.concatenate([np.array(rows, int) for rows in lists]), offsets=offsets)


TRUTH = [[0, 3], [], [11], [4, 5, 6], [1], [2]]  # of the 12 references of 6 queries


def truth_mask(dtype=bool):
    return np.array([[row in rows for row in range(12)] for rows in TRUTH], dtype)


def test_every_form_of_listed_positives_says_the_same(tmp_path):
    folder = make_sets.pitts_like(tmp_path)
    by_radius, file = open_set(tmp_path, "pitts30k"), folder / "positives_test.npy"
    prints = {by_radius.fingerprint()}
    padded = np.array([rows + [-1] * (3 - len(rows)) for rows in TRUTH])
    for array in (truth_mask(), truth_mask(np.uint8), truth_mask(float), padded, padded[:, ::-1]):
        np.save(file, array)
        opened = open_set(tmp_path, "pitts30k")
        assert [rows.tolist() for rows in opened.positives()] == TRUTH and opened.rule == file.name
        prints.add(opened.fingerprint())
    file.unlink()
    write_lists(folder / "lists.npz", TRUTH)
    names = [[os.path.basename(path) for path in t.path] for t in (by_radius.queries, by_radius.database)]
    pairs = [f"{names[0][q]},database/{names[1][r]}" for q, rows in enumerate(TRUTH) for r in rows[::-1]]
    (folder / "pairs.csv").write_text("\n".join(["query,reference", *pairs, pairs[0], f"{names[0][1]},"]))
    for how in ("lists.npz", "pairs.csv", folder.absolute() / "pairs.csv"):
        opened = open_set(tmp_path, "pitts30k", positives=how)
        assert [rows.tolist() for rows in opened.positives()] == TRUTH
        prints.add(opened.fingerprint())
    assert len(prints) == 2, "it is the positives that count, not the form of their file"
    np.save(folder / "one.npy", np.arange(6))
    one = open_set(tmp_path, "pitts30k", positives="one.npy")
    assert [rows.tolist() for rows in one.positives()] == [[i] for i in range(6)]
    assert one.fingerprint() not in prints


def test_positives_are_named_found_or_a_benchmarks_own(tmp_path):
    folder = make_sets.pitts_like(tmp_path)
    for how, rule in (("10 m", "10 m"), ("7.5m", "7.5 m"), (PositiveRule(radius_m=3), "3 m")):
        assert str(open_set(tmp_path, "pitts30k", positives=how).rule) == rule
    assert open_set(tmp_path, "pitts30k", positives="+-2 frames").rule.frames == 2
    np.save(folder / "positives_test.npy", truth_mask())
    assert str(open_set(tmp_path, "pitts30k-test").rule) == "25 m", "the benchmark's own"
    named = open_set(tmp_path, "pitts30k-test", positives="positives_test.npy")
    assert "the positives positives_test.npy here, but 25 m in the published" in named.warning
    assert [rows.tolist() for rows in named.positives()] == TRUTH
    make_sets.pitts_like(tmp_path, "street")
    np.save(tmp_path / "street" / "positives_test.npy", truth_mask())
    table = available(tmp_path).set_index("name")
    assert table.positives["street"] == "positives_test.npy" and table.positives["pitts30k-test"] == "25 m"
    (folder / "positives_test.csv").write_text("query,reference\n")
    refused(r"positives_test\.csv and positives_test\.npy are both there", open_set, tmp_path, "pitts30k")
    none = open_set(tmp_path, "pitts30k", positives="positives_test.csv").positives()
    assert [rows.tolist() for rows in none] == [[]] * 6
    absent("must be metres .* got '10 miles'", open_set, tmp_path, "pitts30k", positives="10 miles")


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (truth_mask().T, r"given for 12 queries, but there are 6: transpose the matrix \(12, 6\)"),
        (truth_mask()[:5], "given for 5 queries, but there are 6"),
        (truth_mask()[:, :11], r"must have 12 columns, got \[11\]"),
        (truth_mask(int)[:, :11], r"must have 12 columns, got \[11\]"),
        (np.full((6, 1), 12), "query 0 has the positive 12, which is no row of 12 references"),
        (np.full((6, 1), -2), "the positive -2"),
        (truth_mask() * 0.5, "row numbers of references, or a mask of them, got float64"),
        (np.array([[1], [2, 3]] * 3, object), r"pickle.*a = np.load\('x.npy', allow_pickle=True\)"),
        (b"", "No data left"),
        (b"version https://git-lfs.github.com/spec/v1", "no array of numbers"),
    ],
)
def test_listed_positives_that_do_not_fit_are_told(tmp_path, array, sentence):
    folder = make_sets.pitts_like(tmp_path)
    if isinstance(array, bytes):
        (folder / "x.npy").write_bytes(array)
    else:
        np.save(folder / "x.npy", array, allow_pickle=True)
    refused(rf"pitts30k/x\.npy: .*{sentence}", open_set, tmp_path, "pitts30k", positives="x.npy")


def test_the_advice_on_pickles_converts_them(tmp_path, monkeypatch):
    folder = make_sets.pitts_like(tmp_path)
    monkeypatch.chdir(folder)
    alone, paired = np.empty(6, object), np.empty((6, 2), object)
    for query, rows in enumerate(TRUTH):
        alone[query], paired[query] = rows, [query, rows]
    for array in (alone, paired):
        np.save("x.npy", array, allow_pickle=True)
        with pytest.raises(ValueError, match="pickle") as error:
            open_set(tmp_path, "pitts30k", positives="x.npy")
        exec(str(error.value).partition("convert it once: ")[2], {"np": np})
        opened = open_set(tmp_path, "pitts30k", positives="x.npz")
        assert [rows.tolist() for rows in opened.positives()] == TRUTH


def test_offsets_and_pairs_that_do_not_fit_are_told(tmp_path):
    folder = make_sets.pitts_like(tmp_path)
    for arrays, sentence in (
        ({"GThard": truth_mask()}, "it holds GThard, where indices and offsets are needed"),
        ({"indices": np.arange(3), "offsets": np.arange(4)}, "given for 3 queries, but there are 6"),
        ({"indices": np.arange(3), "offsets": np.arange(7)}, r"rise from 0 to 3, got \[0 1 2 3 4 5 6\]"),
        ({"indices": np.arange(6.0), "offsets": np.arange(7)}, "float64"),
        ({"indices": np.arange(6), "offsets": np.arange(7.0)}, "integer"),
    ):
        np.savez(folder / "x.npz", **arrays)
        refused(rf"x\.npz: .*{sentence}", open_set, tmp_path, "pitts30k", positives="x.npz")
    here = open_set(tmp_path, "pitts30k")
    query, reference = (os.path.basename(table.path[0]) for table in (here.queries, here.database))
    make_sets.write_picture(folder / "images/test/database/a/@1@2@.jpg", 1)
    make_sets.write_picture(folder / "images/test/database/b/@1@2@.jpg", 2)
    lines = ["query,reference", f"{query},{reference}", f"{reference},{query}", f"{query},@1@2@.jpg"]
    (folder / "x.csv").write_text("\n".join([*lines, f"{query},b/@1@2@.jpg", f",{reference}"]))
    with pytest.raises(ValueError) as error:
        open_set(tmp_path, "pitts30k", positives="x.csv")
    found = re.findall(r"x\.csv, line (\d), column '(\w+)': expected ([^,]*)", str(error.value))
    assert found == [
        ("3", "query", "the name of one of the 6 files"),
        ("6", "query", "the name of one of the 6 files"),
        ("4", "reference", "a name that only one file has: put its folder before it"),
    ]


def test_listed_positives_need_no_positions_and_no_gap(tmp_path):
    part = tmp_path / "plain" / "images" / "test"
    for i in range(3):
        make_sets.write_picture(part / "database" / f"{i}.jpg", i)
        make_sets.write_picture(part / "queries" / f"{i}.jpg", 10 + i)
    refused("must begin with two numbers", open_set, tmp_path, "plain")
    np.save(tmp_path / "plain" / "positives_test.npy", np.arange(3))
    plain = open_set(tmp_path, "plain")
    assert np.isnan(plain.database.east_m).all() and plain.positives()[2].tolist() == [2]
    (part / "database" / "0.jpg").write_bytes(b"broken")
    refused("does not decode", open_set, tmp_path, "plain", on_error="skip")
    (tmp_path / "plain" / "positives_test.npy").unlink()
    (tmp_path / "plain" / "positives_test.csv").write_text("query,reference\n2.jpg,2.jpg")
    skipped = open_set(tmp_path, "plain", on_error="skip")
    assert [rows.tolist() for rows in skipped.positives()] == [[], [], [1]]


def test_several_folders_of_queries_are_one_table(tmp_path):
    folder = make_sets.pitts_like(tmp_path)
    part, names = folder / "images" / "test", ("queries_day", "queries_night")
    (part / "queries").rename(part / "queries_night")
    make_sets.write_picture(part / "queries_day" / make_sets.at_name(585100, 4476400), 7)
    opened = open_set(tmp_path, "pitts30k")
    assert [os.path.basename(os.path.dirname(path)) for path in opened.queries.path] == [
        names[0],
        *[names[1]] * 6,
    ]
    assert set(opened.queries.city) == {"pitts30k"} and opened.positives()[0].tolist() == [2, 3]
    assert available(tmp_path).set_index("name").queries["pitts30k-test"] == 7


# -- Benchmarks -----------------------------------------------------------------------------------------


def test_the_benchmarks_are_as_published():
    rows = {name: (b.n_database, b.n_queries, b.sorted_batch, str(b.rule)) for name, b in BENCHMARKS.items()}
    assert rows == {
        "sped": (607, 607, 2, "25 m"),
        "amstertime": (1231, 1231, 2, "25 m"),
        "msls-val": (18871, 740, 16, "25 m"),
        "pitts30k-test": (10000, 6816, 8, "25 m"),
        "tokyo247": (75984, 315, 16, "25 m"),
        "pitts250k-test": (83952, 8280, 8, "25 m"),
        "nordland-full": (27592, 27592, 26, "25 m"),
        "nordland-2760": (27592, 2760, 26, "+-1 frames"),
        "eynsham": (23935, 23935, 20, "25 m"),
        "msls-val-full": (18871, None, 16, "25 m"),
    }


def test_open_by_benchmark_name_and_by_folder(tmp_path):
    make_sets.pitts_like(tmp_path)
    named, plain = open_set(tmp_path, "pitts30k-test"), open_set(tmp_path, "pitts30k")
    assert named.spec is BENCHMARKS["pitts30k-test"] and plain.spec is None
    assert "12 references and 6 queries here, but 10,000 and 6,816" in named.warning and plain.warning == ""
    assert [p.tolist() for p in named.positives()] == [[2 * i, 2 * i + 1] for i in range(6)]
    assert named.fingerprint() == plain.fingerprint() != open_set(tmp_path, "pitts30k").database.fingerprint()
    refused("has the split 'test', got 'val'", open_set, tmp_path, "pitts30k-test", "val")
    absent(r"no images/val with database and queries", open_set, tmp_path, "pitts30k", "val")
    absent("tokyo247 is not complete .* get it from the authors of Tokyo", open_set, tmp_path, "tokyo247")


def test_pairs_by_mock_coordinates_and_the_two_nordlands(tmp_path):
    make_sets.mock_like(tmp_path, "sped", 12, 1000)
    sped = open_set(tmp_path, "sped")
    assert [sped.database.key[p].tolist() for p in sped.positives()] == [[key] for key in sped.queries.key]
    make_sets.mock_like(tmp_path, "nordland", 45, 25 / 10.5, key="{}")
    full, few = open_set(tmp_path, "nordland-full"), open_set(tmp_path, "nordland-2760")
    assert [len(table) for table in (full.database, full.queries, few.database, few.queries)] == [
        45,
        45,
        45,
        5,
    ]
    assert all("queries" in path for path in few.database.path)
    assert all("database" in path for path in few.queries.path)
    assert few.queries.key.astype(int).tolist() == [0, 10, 20, 30, 40]
    for opened, reach in ((full, 10), (few, 1)):
        frames = opened.database.key.astype(int)
        for query, answers in zip(opened.queries.key.astype(int), opened.positives(), strict=True):
            near = range(max(0, query - reach), min(45, query + reach + 1))
            assert sorted(frames[answers]) == list(near)


def test_msls_val_never_mixes_its_two_query_sets(tmp_path):
    folder = make_sets.converted_msls(tmp_path)
    refused("write the keys of the 740 queries into query_keys.txt", open_set, tmp_path, "msls-val")
    full = open_set(tmp_path, "msls-val-full")
    assert len(full.queries) == 6 and full.warning == "" and set(full.queries.city) == {"cph", "sf"}
    (folder / "query_keys.txt").write_text("cphq0\ntrain_val/sf/query/images/sfq2.jpg\n\n")
    few = open_set(tmp_path, "msls-val")
    assert sorted(few.queries.key) == ["cphq0", "sfq2"]
    keys = [few.database.key[p].tolist() for p in few.positives()]
    assert keys == [[k.replace("q", "d")] for k in few.queries.key]
    (folder / "query_keys.txt").write_text("cphq0\nnobody\n")
    refused("1 of 2 query keys have no picture: 'nobody'", open_set, tmp_path, "msls-val")


def test_msls_val_as_downloaded(tmp_path):
    make_sets.msls_like(tmp_path, ("cph", "sf"))
    val = open_set(tmp_path, "msls-val")
    assert len(val.database) == 10 and len(val.queries) == 6 and set(val.database.city) == {"cph", "sf"}
    assert len(open_set(tmp_path, "msls-val-full").queries) == 10
    assert val.database.east_m.tolist() == sorted(val.database.east_m)  # as converted file names would sort
    for city, answers in zip(val.queries.city, val.positives(), strict=True):
        assert set(val.database.city[answers]) == {city}
    absent("no training city: cph and sf are validation cities", read_msls, tmp_path / "msls")


def test_what_is_here_and_what_is_missing(tmp_path):
    make_sets.pitts_like(tmp_path)
    make_sets.pitts_like(tmp_path, "my-street", n_places=2)
    make_sets.mock_like(tmp_path, "nordland", 21, 25 / 10.5)
    make_sets.converted_msls(tmp_path)
    (tmp_path / "sped").mkdir()
    table = available(tmp_path).set_index("name")
    assert list(table.index) == [*BENCHMARKS, "my-street"]
    here = "pitts30k-test nordland-full nordland-2760 msls-val msls-val-full my-street".split()
    assert sorted(table.index[table.present]) == sorted(here)
    pitts = table.loc["pitts30k-test", ["references", "queries", "expected"]]
    assert tuple(pitts) == (12, 6, "10,000 / 6,816")
    assert tuple(table.loc["nordland-2760", ["references", "queries"]]) == (21, 3)
    assert "images/test" in table.missing["sped"] and "no folder tokyo247" in table.missing["tokyo247"]
    assert "query keys" in table.missing["msls-val"] and table.missing["pitts30k-test"] == ""
    assert table.where_to_get["sped"].startswith("the VPR-datasets-downloader project")
    assert len(available(tmp_path / "nowhere")) == len(BENCHMARKS)


def test_real_sets(sage_data):
    counts = {"sf-streets": 425, "gardens-point": 200, "essex3in1": 210, "corridor": 111}
    for name, expected in counts.items():
        test_set = open_set(sage_data, name)
        assert len(test_set.database) == len(test_set.queries) == expected
        found = test_set.positives()
        metres = pairwise_m(test_set.queries, test_set.database)
        assert [len(p) for p in found] == (metres <= 25).sum(1).tolist()
        if name == "essex3in1":
            assert [p.tolist() for p in found] == [[i] for i in range(210)]
        if name in ("gardens-point", "corridor"):
            assert {len(p) for p in found} == {3, 4, 5}  # two frames to either side, less at the ends
    streets = read_folder(sage_data / "sf-streets" / "images" / "train" / "database")
    assert len(streets) == 1594 and set(streets.note) == {"day", "night"} and not np.isnat(streets.date).any()
    # The file names' own latitude and longitude, to 1e-5 degrees, give their metres back.
    fields = [parse_name(path) for path in streets.path[:200]]
    east, north, zone = latlon_to_utm([float(f["lat"]) for f in fields], [float(f["lon"]) for f in fields])
    away_m = np.hypot(east - streets.east_m[:200], north - streets.north_m[:200])
    assert away_m.max() < 2.0
    assert zone.tolist() == streets.utm_zone[:200].tolist()


def test_importing_places_imports_nothing_heavy():
    heavy = ("torch", "pandas", "scipy", "pyproj", "PIL")
    code = f"import sys, sagelib.places; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
