"""Pictures a second: `pytest tests/benchmarks --benchmark-only -o python_files='bench_*.py'`."""

import pytest

from townscape.plan import CONDITIONS, plan_shots
from townscape.render import Town


@pytest.fixture(scope="module")
def street():
    town = Town(1110)
    shots = plan_shots(town, "test/queries", 36)
    for shot in shots:  # facades are painted when first seen
        town.render(shot.pose, shot.condition, 160, year=shot.year, visit=shot.visit)
    return town, shots


@pytest.mark.parametrize("size", [160, 224])
def test_pictures_of_all_conditions(benchmark, street, size):
    town, shots = street

    def walk():
        for shot in shots:
            town.render(shot.pose, shot.condition, size, year=shot.year, visit=shot.visit)

    benchmark.pedantic(walk, rounds=3, warmup_rounds=1)
    benchmark.extra_info["pictures_per_s"] = round(len(shots) / benchmark.stats.stats.min, 1)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_one_picture(benchmark, street, condition):
    town, shots = street
    benchmark.pedantic(town.render, args=(shots[0].pose, condition, 160), rounds=20, warmup_rounds=2)


def test_a_new_town_and_its_first_pictures(benchmark):
    """Plan, painting of the facades in sight, and 20 pictures."""

    def first_walk():
        town = Town(1111)
        for shot in plan_shots(town, "train/database", 20):
            town.render(shot.pose, shot.condition, 160, year=shot.year, visit=shot.visit)

    benchmark.pedantic(first_walk, rounds=2)
