"""The small foundation: its recipe on a toy, its targets against independent ones, and the file that ships."""

import dataclasses
import hashlib
import math
import os
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torchvision.models import mobilenet_v2

from sagelib import pretrain as recipe
from sagelib.aggregators import GeM
from sagelib.backbone import Backbone, vit_tiny
from sagelib.pretrain import MobileNetStages, PretrainConfig, edge_orientations, pack_towns, pretrain
from sagelib.runs import read_json
from sagelib.town import CONDITIONS, SEED_RANGES, Town, plan_shots

TOY = PretrainConfig(
    width=24,
    depth=2,
    heads=2,
    steps=4,
    batch_size=4,
    sides=(28, 42),
    shares=(0.5, 0.5),
    warmup=1,
    group=2,
    relation_weight=0.5,
    towns=2,
    pictures_per_town=3,
    validation_towns=0,
    picture_size=(32, 40),
    frame_size=(32, 40),
)


@pytest.fixture(scope="module")
def packed():
    return pack_towns([0, 1], 3, (32, 40), progress=False)


@pytest.fixture
def run_dir(tmp_path, packed):
    """Make a run's directory whose towns are rendered already."""

    def make(name):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "towns.npy", packed)
        return tmp_path / name

    return make


@pytest.fixture(scope="module")
def folded(tmp_path_factory):
    """torchvision's MobileNetV2 with random weights, and the same network as a .npz with folded normalisation."""
    torch.manual_seed(0)
    network = mobilenet_v2(weights=None).double().eval()
    arrays, pending = {}, None
    for module in network.features.modules():
        if isinstance(module, torch.nn.Conv2d):
            pending = module
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.8, 1.6)
            module.bias.data.normal_(0, 0.2)
            scale = module.weight / (module.running_var + module.eps).sqrt()
            i = len(arrays) // 3
            arrays[f"{i:02d}.w"] = (pending.weight * scale[:, None, None, None]).detach().numpy()
            arrays[f"{i:02d}.b"] = (module.bias - module.running_mean * scale).detach().numpy()
            depthwise, linear = pending.groups > 1, pending.kernel_size == (1, 1) and pending.out_channels in (
                16, 24, 32, 64, 96, 160, 320,
            ) and pending.in_channels > pending.out_channels  # fmt: skip
            arrays[f"{i:02d}.meta"] = np.array([pending.stride[0], 1, 0 if linear else 3, depthwise])
    path = tmp_path_factory.mktemp("teacher") / "mobilenet.npz"
    np.savez(path, **arrays)
    return network, path


# -- the recipe ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_teacher", [False, True])
def test_a_run_that_was_stopped_ends_in_the_same_weights(run_dir, folded, with_teacher):
    teacher = folded[1] if with_teacher else None
    whole = pretrain(TOY, run_dir("whole"), teacher=teacher, progress=False)
    parted = run_dir("parted")
    half = pretrain(TOY, parted, teacher=teacher, stop_at=2, progress=False)
    assert read_json(half.with_suffix(".json"))["finished"] is False
    before = load_file(half)
    again = pretrain(TOY, parted, teacher=teacher, progress=False)
    for name, value in load_file(whole).items():
        assert torch.equal(value, load_file(again)[name]), name
    assert any(not torch.equal(value, load_file(again)[name]) for name, value in before.items())
    manifest = read_json(again.with_suffix(".json"))
    assert manifest["finished"] and manifest["step"] == 4 and manifest["crops"] == 32
    assert [s["from_step"] for s in manifest["segments"]] == [0, 2]
    assert manifest["sha256"] == hashlib.sha256(again.read_bytes()).hexdigest()


def test_another_configuration_is_refused_and_more_steps_are_not(run_dir):
    folder = run_dir("run")
    pretrain(TOY, folder, stop_at=1, progress=False)
    with pytest.raises(ValueError, match=r"batch_size \(4 -> 5\)"):
        pretrain(dataclasses.replace(TOY, batch_size=5), folder, progress=False)
    with pytest.raises(
        ValueError, match=r"shape \(2, 3, 2, 32, 40, 3\), the configuration asks for \(3, 3, 2, 32, 40, 3\)"
    ):
        pretrain(dataclasses.replace(TOY, towns=3), folder, progress=False)
    longer = pretrain(dataclasses.replace(TOY, steps=5), folder, progress=False)
    assert read_json(longer.with_suffix(".json"))["step"] == 5


def test_a_schedule_changes_only_on_request_and_is_recorded(run_dir):
    folder = run_dir("run")
    pretrain(dataclasses.replace(TOY, muon_rate=None), folder, stop_at=2, progress=False)
    with pytest.raises(ValueError, match=r"muon_rate \(None -> 0.003\)"):
        pretrain(TOY, folder, progress=False)
    with pytest.raises(ValueError, match=r"seed \(0 -> 1\)"):
        pretrain(dataclasses.replace(TOY, seed=1), folder, change=True, progress=False)
    segments = read_json(pretrain(TOY, folder, change=True, progress=False).with_suffix(".json"))["segments"]
    assert [(s["from_step"], s["schedule"]["muon_rate"]) for s in segments] == [(0, None), (2, 0.003)]


def test_the_light_worsens_by_degrees():
    config = PretrainConfig(steps=100, worsen_from=0.2, worsen_full=0.7)
    shares = [recipe._worsened(step, config) for step in (0, 20, 45, 70, 99)]
    assert shares == pytest.approx([0, 0, 0.4, 0.8, 0.8])
    images = torch.rand(8, 3, 28, 28)
    assert torch.equal(recipe.worsen(images, torch.Generator().manual_seed(0), share=0.0), images)


def test_the_loss_falls(run_dir):
    folder = run_dir("run")
    config = dataclasses.replace(
        TOY, steps=60, batch_size=8, sides=(28,), shares=(1.0,), warmup=5, learning_rate=3e-3
    )
    pretrain(config, folder, progress=False)
    lines = [recipe.json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    pretrain(TOY, run_dir("start"), stop_at=1, progress=False)
    start = recipe.json.loads((folder.parent / "start" / "log.jsonl").read_text().splitlines()[0])
    assert lines[-1]["patch"] < 0.9 * start["patch"]


def test_mistakes_are_named(tmp_path, run_dir):
    with pytest.raises(ValueError, match="nothing to learn from"):
        pretrain(TOY, tmp_path / "none", towns=False)
    with pytest.raises(FileNotFoundError, match="no teacher file"):
        pretrain(TOY, run_dir("run"), teacher=tmp_path / "absent.npz", progress=False)
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="other.npz has no array '00.w"):
        MobileNetStages(tmp_path / "other.npz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no .jpg or .png files"):
        recipe.pack_frames(tmp_path / "empty", (32, 40))
    with pytest.raises(ValueError, match=r"sides must be multiples of 14, 28 or more, got \(100, 112\)"):
        PretrainConfig(sides=(100, 112), shares=(0.5, 0.5))
    with pytest.raises(ValueError, match=r"shares must be 2 numbers that add up to 1, got \(0.5, 0.4\)"):
        PretrainConfig(shares=(0.5, 0.4))


def test_towns_come_from_seeds_for_pretraining_alone(packed):
    assert packed.shape == (2, 3, 2, 32, 40, 3) and packed.dtype == np.uint8
    assert np.array_equal(packed[1:], pack_towns([1], 3, (32, 40), progress=False))
    with pytest.raises(ValueError, match=r"\[1000\] are not among those for pre-training"):
        pack_towns([0, 1000], 1, (32, 40))


def test_every_number_can_be_given_on_the_command_line(run_dir):
    folder = run_dir("run")
    options = []
    for name, value in dataclasses.asdict(TOY).items():
        values = value if isinstance(value, tuple) else (value,)
        options += [f"--{name.replace('_', '-')}", *map(str, values)]
    recipe.main(["--out", str(folder), *options])
    given = read_json(folder / "sage_vit_tiny.json")["config"]
    assert given == read_json_of(TOY)


def read_json_of(config):
    return recipe.json.loads(recipe.json.dumps(dataclasses.asdict(config)))


def test_a_sequence_is_a_name_without_its_last_number():
    assert recipe.sequence_of("b0_lift_c030_frame_000012") == "b0_lift_c030"
    assert recipe.sequence_of("walk-7") == "walk"


# -- crops and targets -----------------------------------------------------------------------------------------


def test_crops_depend_on_the_generator_alone_and_stay_in_range(packed):
    def cut(seed):
        return recipe.random_views([packed], [1.0], 5, 32, (0.2, 1.0), 2, np.random.default_rng(seed))

    for one, again, other in zip(cut(1), cut(1), cut(2), strict=True):
        assert one.shape == (10, 3, 32, 32)
        assert torch.equal(one, again) and not torch.equal(one, other)
    worse = recipe.worsen(cut(1)[1], torch.Generator().manual_seed(0))
    assert worse.min() >= 0 and worse.max() <= 1 and not torch.equal(worse, cut(1)[1])


def test_a_whole_crop_is_the_picture_and_its_second_window_shows_the_other_rendering():
    view = np.random.default_rng(0).integers(0, 256, (1, 1, 2, 32, 32, 3), dtype=np.uint8)
    # A window of the whole area has the picture's shape only if the drawn ratio is near 1: look for one.
    clear, seen = recipe.random_views([view], [1.0], 400, 32, (1.0, 1.0), 1, np.random.default_rng(0))
    day, other = torch.from_numpy(view[0, 0]).permute(0, 3, 1, 2).float() / 255

    def nearest(crops, picture):
        return min((crops - p).abs().amax((1, 2, 3)).min().item() for p in (picture, picture.flip(-1)))

    for crops, picture in ((clear, day), (seen[:400], day), (seen[400:], other)):
        assert nearest(crops, picture) < 1e-6
    assert nearest(clear, other) > 0.1 and nearest(seen[400:], day) > 0.1


def test_sources_get_their_shares_and_towns_come_in_groups():
    towns = np.zeros((9, 4, 2, 28, 28, 3), np.uint8)
    towns[:] = (10 * np.arange(9) + 10)[:, None, None, None, None, None]
    frames = np.full((50, 1, 1, 28, 28, 3), 255, np.uint8)
    generator, light, groups = np.random.default_rng(0), [], 0
    for _ in range(60):
        clear, _ = recipe.random_views([towns, frames], [0.5, 0.5], 20, 28, (0.5, 1.0), 4, generator)
        values = (clear[:20].mean((1, 2, 3)) * 255).round().tolist()
        light += values
        groups += sum(a == b < 255 for a, b in zip(values, values[1:], strict=False))
    assert 0.4 < np.mean(np.array(light) == 255) < 0.6
    assert groups > 0.6 * np.sum(np.array(light) < 255)


@pytest.mark.parametrize("angle", [0, 45, 90, 135])
def test_edges_fall_into_the_bin_of_their_direction(angle):
    y, x = torch.meshgrid(torch.arange(56.0), torch.arange(56.0), indexing="ij")
    across = x * np.cos(np.deg2rad(angle)) + y * np.sin(np.deg2rad(angle))
    picture = (0.5 + 0.4 * torch.sin(across / 3)).expand(1, 3, 56, 56)
    cells = edge_orientations(picture, (4, 4), bins=4)
    assert cells.shape == (1, 28, 4, 4)
    histogram = F.pixel_shuffle(cells, 2)[0, :4, 2:-2, 2:-2].mean((1, 2))
    assert histogram.argmax() == angle // 45
    assert histogram.max() > 0.85


def test_the_teacher_is_mobilenet_v2(folded):
    network, path = folded
    # For odd sides TensorFlow's SAME padding is symmetric, as torchvision's: both must give the same.
    images = torch.rand(2, 3, 97, 97, dtype=torch.float64)
    stages = MobileNetStages(path).double()(images)
    x, expected = images * 2 - 1, {}
    for layer in network.features[:18]:
        x = layer(x)
        expected[x.shape[1]] = x
    for stage, channels in zip(stages, MobileNetStages.channels, strict=True):
        # The file's numbers pass through float32.
        torch.testing.assert_close(stage, expected[channels], rtol=1e-3, atol=1e-4)


def test_even_sides_are_padded_at_the_end(folded):
    network = MobileNetStages(folded[1]).double()
    x = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    stem = network.convolutions[0]
    expected = F.conv2d(F.pad(x, (0, 1, 0, 1)), stem.weight, stem.bias, stride=2).clamp(0, 6)
    torch.testing.assert_close(network._convolve(x, 0), expected)
    assert [tuple(s.shape[1:]) for s in network(torch.rand(1, 3, 64, 96).double())] == [
        (64, 4, 6),
        (96, 4, 6),
        (160, 2, 3),
        (320, 2, 3),
    ]


def test_the_real_teacher_knows_an_edge_from_a_flat_wall():
    path = os.environ.get("SAGE_TEACHER", "")
    if not Path(path).is_file():
        pytest.skip("SAGE_TEACHER names no MobileNetV2 .npz: the real teacher is not tried")
    network = MobileNetStages(path)
    flat = torch.full((1, 3, 128, 128), 0.5)
    edges = flat.clone()
    edges[..., ::16, :] = 0.0
    for a, b in zip(network(flat), network(edges), strict=True):
        assert torch.isfinite(b).all() and b.std() > 0
        assert (a - b).abs().mean() > 0.1 * a.abs().mean()
    half = MobileNetStages(path).bfloat16()(edges)
    for a, b in zip(network(edges), half, strict=True):
        assert F.cosine_similarity(a.flatten(), b.float().flatten(), dim=0) > 0.98


# -- losses ----------------------------------------------------------------------------------------------------


def test_relations_ignore_rotation_and_scale():
    torch.manual_seed(0)
    x = torch.randn(12, 8)
    turned = 3 * x @ torch.linalg.qr(torch.randn(8, 8))[0]
    assert recipe.relation_loss(turned, x).abs() < 1e-5
    assert recipe.relation_loss(torch.randn(12, 8), x) > 0.3


def test_relations_against_a_plain_loop():
    torch.manual_seed(0)
    a, b = torch.randn(7, 4), torch.randn(7, 5)
    total = 0.0
    for i in range(7):
        others = [j for j in range(7) if j != i]
        one = [F.cosine_similarity(a[i], a[j], dim=0).item() for j in others]
        two = [F.cosine_similarity(b[i], b[j], dim=0).item() for j in others]
        total += np.corrcoef(one, two)[0, 1] / 7
    assert recipe.relation_loss(a, b).item() == pytest.approx(1 - total, abs=1e-5)


def test_instances_against_a_plain_loop():
    torch.manual_seed(0)
    x = torch.randn(10, 6)
    unit, total = F.normalize(x, dim=1), 0.0
    for i in range(10):
        j = (i + 5) % 10
        others = [math.exp(unit[i] @ unit[k] / 0.2) for k in range(10) if k != i]
        total -= math.log(math.exp(unit[i] @ unit[j] / 0.2) / sum(others)) / 10
    assert recipe.instance_loss(x, 0.2).item() == pytest.approx(total, abs=1e-5)
    pairs = torch.randn(5, 6).repeat(2, 1)
    assert recipe.instance_loss(pairs, 0.05) < 0.2 < recipe.instance_loss(x, 0.05)


def test_cells_are_those_of_gem():
    patches = torch.randn(2, 24, 6)
    pooled = recipe.cells(patches, (4, 6)).reshape(2, -1)
    torch.testing.assert_close(F.normalize(pooled, dim=1), GeM(6, grid=2)(patches[:, 0], patches, (4, 6)))


# -- the file that ships ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    folder = Path(str(resources.files("sagelib")))
    return folder / "sage_vit_tiny.safetensors", read_json(folder / "sage_vit_tiny.json")


def test_the_shipped_file_is_the_one_its_manifest_describes(shipped):
    path, manifest = shipped
    assert path.stat().st_size == manifest["bytes"] <= 12e6
    assert hashlib.sha256(path.read_bytes()).hexdigest() == manifest["sha256"]
    weights = load_file(path)
    expected = vit_tiny().state_dict()
    assert weights.keys() == expected.keys()
    assert all(w.dtype == torch.float16 and w.shape == expected[k].shape for k, w in weights.items())
    assert all(torch.isfinite(w.float()).all() for w in weights.values())
    config = manifest["config"]
    assert manifest["crops"] == 2 * manifest["step"] * config["batch_size"]
    assert manifest["material"]["towns"]["seeds"][1] < 990


def test_the_shipped_file_gives_its_recorded_descriptors(shipped):
    path, manifest = shipped
    backbone = Backbone("sage_vit_tiny", weights=path, adapter="none").eval()
    found = recipe.probe_descriptors(backbone.vit)
    np.testing.assert_allclose(found[:, :8].numpy(), np.array(manifest["probe"]), atol=2e-4)
    # The package's own forward pass is the one the numbers were made with.
    with torch.no_grad():
        cls, patches = backbone.split(backbone(recipe.probe_images()))
    torch.testing.assert_close(GeM(192)(cls, patches, (9, 9)), found, atol=1e-4, rtol=0)


def test_the_shipped_weights_have_learned_something():
    """A view in other light and weather finds the same view by day more often than with random weights."""
    town = Town(SEED_RANGES["test"][0])
    views = [shot.pose for shot in plan_shots(town, "test/database")[::9]]
    changed = [c for c in CONDITIONS if c != "day"]

    def batch(conditions, **moment):
        pictures = [town.render(p, c, 112, **moment) for p, c in zip(views, conditions, strict=True)]
        return recipe.normalised(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255)

    references = batch(["day"] * len(views))
    queries = batch([changed[i % len(changed)] for i in range(len(views))], visit=7)

    def hits(backbone):
        with torch.no_grad():
            described = []
            for images in (references, queries):
                cls, patches = backbone.split(backbone(images))
                described.append(GeM(192, grid=2)(cls, patches, backbone.grid(images)))
        best = (described[1] @ described[0].T).argmax(1)
        return int((best == torch.arange(len(views))).sum())

    torch.manual_seed(0)
    random = hits(Backbone("sage_vit_tiny", pretrained=False, adapter="none").eval())
    learned = hits(Backbone("sage_vit_tiny", adapter="none").eval())
    assert learned >= random + 3
