"""Probes: windows lie where they say, and who finds whom is what a loop over all pairs finds."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from sagelib.images import Preprocess
from sagelib.places import open_set, open_training_set
from townscape.folder import write_town
from workbench import probes
from workbench.probes import SHIFTS, Window, by_heart, sideways_shift


class Pixels(torch.nn.Module):
    """8 x 8 grey pixels: a descriptor that is layout and nothing else."""

    fingerprint = "8 x 8 pixels"

    def forward(self, images):
        small = torch.nn.functional.adaptive_avg_pool2d(images.mean(1, keepdim=True), 8).flatten(1)
        return torch.nn.functional.normalize(small - small.mean(1, keepdim=True))


PREPROCESS = Preprocess(56, "antialias")


@pytest.fixture(autouse=True)
def few_places(monkeypatch):
    monkeypatch.setattr(probes, "PLACES", 3)
    monkeypatch.setattr(probes, "TOWNS", 2)


@pytest.fixture(scope="module")
def town(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probes") / "town"
    seeds = dict(train_seeds=(1000, 1001), val_seeds=(), test_seeds=(1110,))
    return write_town(folder, **seeds, images_per_town=48, size=56, progress=False)


def test_a_window_is_a_part_of_the_width():
    picture = Image.fromarray(np.tile(np.arange(100, dtype=np.uint8), (10, 1)))
    seen = []
    for start in (0.0, 0.3):
        Window(lambda cut: seen.append(np.asarray(cut)), start)(picture)
    assert [(cut.shape, cut[0, 0], cut[0, -1]) for cut in seen] == [((10, 70), 0, 69), ((10, 70), 30, 99)]


def test_layout_alone_is_lost_by_a_shift(town, tmp_path):
    """Asked for itself, every picture is found where windows agree, and by pixels fewer with every step."""
    test = open_set(town.parent, town.name)
    same = dataclasses.replace(test, queries=test.database)
    table = sideways_shift(Pixels(), same, tmp_path, preprocess=PREPROCESS, progress=False)
    assert table["shift"].tolist() == list(SHIFTS) and (table["queries"] == 48).all()
    assert table["R@1"].iloc[0] == 100 and table["R@1"].iloc[-1] < 60
    assert ((table["low"] <= table["R@1"]) & (table["R@1"] <= table["high"])).all()


def test_who_finds_whom_is_what_a_loop_finds(town, tmp_path):
    places = open_training_set(town.parent, town.name)
    found = by_heart(Pixels(), places, tmp_path, preprocess=PREPROCESS, progress=False)
    pictures = torch.stack([PREPROCESS(Image.open(path).convert("RGB")) for path in places.path])
    values = Pixels()(pictures).half().double().numpy()
    turn = np.abs((places.heading_deg[:, None] - places.heading_deg + 180) % 360 - 180)
    near = np.hypot(*(x[:, None] - x for x in (places.east_m, places.north_m))) <= 25
    right = near & (turn <= 45) & ~np.eye(len(places), dtype=bool)
    distance = ((values[:, None] - values) ** 2).sum(-1) + 9 * np.eye(len(places))
    known = right.any(1)
    expected = 100 * right[np.arange(len(places)), distance.argmin(1)][known].mean()
    assert found["R@1"] == pytest.approx(expected, abs=1.5) and found["pictures"] == known.sum()
    assert found["low"] <= found["R@1"] <= found["high"] and found["loss"] > 0


def test_the_command_writes_both_tables(town, tmp_path, capsys):
    arguments = ["--models", "pixels", "--town", str(town), "--sets", str(town), "--image-size", "56"]
    arguments += ["--runs", str(tmp_path / "runs"), "--export", str(tmp_path / "out")]
    assert probes.main(arguments) == 0
    assert "unseen" in capsys.readouterr().out and (tmp_path / "out" / "sideways-shift.csv").exists()
    unseen = open_training_set(town.parent, "town-unseen")
    assert set(unseen.city) == {"town1002", "town1003"}
    assert probes.main([*arguments[:2], "--image-size", "56", "--export", str(tmp_path / "none")]) == 0
    assert probes.main(["--models", "sgae", "--image-size", "56", "--export", str(tmp_path / "no")]) == 1
    assert "there is no model 'sgae'" in capsys.readouterr().err
