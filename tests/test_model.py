"""SAGE as a whole: its size, its independence of the batch, its parameters, its files."""

import copy
import json
from types import MappingProxyType

import pytest
import torch

from sagelib.aggregators import AGGREGATORS
from sagelib.backbone import EMBEDDED
from sagelib.model import SAGE, build_model

# Parameters whose gradient softmax cancels: a constant added to all scores changes nothing.
CANCELLED = {"aggregator.probe.3.bias"}
CANCELLED_KEYS = {"head.layers.0.self_attn.in_proj_bias", "head.layers.1.self_attn.in_proj_bias"}


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    return SAGE("vit_test_patch14", pretrained=False, **options).eval()


def images(batch=3, height=56, width=70, seed=0):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def off():
    return tiny(interact=False)


NAMES = "4 x dpn|final LayerNorm|token MLP|reduction branch|probe branch|post DPN|soft weighting".split("|")
PUBLISHED = {
    "base": (49_284, 1_536, 525_056, 459_392, 426_560, 2_113, 385),
    "large": (65_668, 2_048, 656_128, 590_464, 557_632, 2_113, 385),
}


@pytest.mark.parametrize(
    ("size", "never", "trained", "millions", "with_head"),
    [("base", 492_224, 1_464_326, "88.54", "96.42"), ("large", 623_296, 1_874_438, "306.86", "314.74")],
)
def test_every_number_of_the_parameter_table(size, never, trained, millions, with_head):
    with torch.device("meta"):
        report = SAGE(f"vit_{size}_patch14_dinov2", pretrained=False).parameter_report()
    expected = {name: (n, n) for name, n in zip(NAMES, PUBLISHED[size], strict=True)}
    expected |= {"single branch (never called)": (0, never), "trained, head off": (trained, trained + never)}
    expected |= {"InteractHead": (7_880_192, 7_880_192)}
    for name, (live, published) in expected.items():
        assert report[name] == (live, published), name
        assert f"| {name} | {live:,} | {published:,} |" in str(report)
    assert f"{report['whole model, head off'][1] / 1e6:.2f}" == millions
    assert f"{report['whole model, head on'][1] / 1e6:.2f}" == with_head
    assert len(report) == len(expected) + 2


def test_the_report_counts_what_trains_for_other_parts_too():
    for options in ({"adapter": "lora"}, {"aggregator": "gem", "interact": False}, {"adapter": "unfreeze"}):
        model = tiny(**options)
        report = model.parameter_report()
        head = report["InteractHead"][0] if model.has_head else 0
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert report["trained, head off"][0] + head == trained
        assert str(report).startswith("| module | live | as published |")


def test_no_parameter_is_dead_but_the_biases_that_softmax_cancels():
    model = tiny(aggregator_options={"dropout": 0.0}).double().train()
    target = torch.randn(4, model.width, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (model(images(4).double()) * target).sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, p in trained.items() if p.grad is None]
    largest = max(p.grad.abs().max() for p in trained.values())
    for name, p in trained.items():
        if name in CANCELLED:
            assert p.grad.abs().max() < 1e-14 * largest, name
        elif name in CANCELLED_KEYS:
            query, key, value = p.grad.chunk(3)
            assert key.abs().max() < 1e-14 * largest
            assert min(query.abs().max(), value.abs().max()) > 1e-12 * largest
        else:
            assert p.grad.abs().max() > 1e-12 * largest, name
    assert CANCELLED | CANCELLED_KEYS <= trained.keys()


@pytest.mark.parametrize("size", [(224, 224), (322, 322), (518, 518), (126, 224), (322, 196)])
def test_sizes(off, size):
    out = off(images(1, *size)).detach()
    assert out.shape == (1, 8448)
    torch.testing.assert_close(out.norm(dim=1), torch.ones(1))


def test_without_head_a_descriptor_depends_on_its_image_alone(off):
    with torch.no_grad():
        x, order = images(5), torch.tensor([4, 1, 0, 3, 2])
        whole = off(x)
        assert (whole - torch.cat([off(x[:1]), off(x[1:3]), off(x[3:])])).abs().max() < 1e-6
        assert (whole[order] - off(x[order])).abs().max() < 1e-6


def test_with_head_it_depends_on_the_batch_but_not_on_its_order():
    on = tiny()
    with torch.no_grad():
        x, order = images(5), torch.tensor([4, 1, 0, 3, 2])
        whole, single = on(x), on.embed(x)
        torch.testing.assert_close(whole[order], on(x[order]), rtol=0, atol=1e-4)
        assert (whole[:2] - on(x[:2])).abs().max() > 1e-3
        torch.testing.assert_close(whole, on.interact(single), rtol=0, atol=0)
        torch.testing.assert_close(single.norm(dim=1), torch.ones(5))
        tokens = on.backbone.prefix(x)
        torch.testing.assert_close(on.embed_tokens(tokens, on.backbone.grid(x)), single, rtol=0, atol=0)


def test_with_anchors_of_its_own_it_does_not():
    model = tiny()
    with torch.no_grad():
        x = images(4)
        batch_wise = model(x)
        model.set_anchors(model.embed(images(6, seed=3)))
        whole = model(x)
        assert (whole - batch_wise).abs().max() > 1e-3
        torch.testing.assert_close(whole, torch.cat([model(x[:1]), model(x[1:])]), rtol=0, atol=1e-5)


def test_bfloat16_stays_close_to_float32(off):
    x = images(4, 126, 126)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        half = off(x)
    assert half.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(off(x), half).min() > 0.999


@pytest.mark.parametrize("name", AGGREGATORS)
def test_any_aggregator_takes_its_place(name):
    options = {"grid": [16, 16]} if name == "mixvpr" else None
    model = tiny(aggregator=name, aggregator_options=options, interact=False)
    torch.testing.assert_close(model(images(2, 224, 224)).norm(dim=1), torch.ones(2), rtol=0, atol=1e-5)


def test_another_width_works_or_is_refused_with_the_arithmetic():
    small = {"channels": 64, "probes": 60}
    with pytest.raises(ValueError, match=r"width 4096 .* 4096 = 5 x 768 \+ 256"):
        tiny(aggregator_options=small)
    model = tiny(aggregator_options=small, interact_options={"segment_width": 512})
    assert model.width == 4096 and model.head.segments == 8
    assert model(images(2)).shape == (2, 4096)


def test_without_a_head_there_is_nothing_to_interact_with(off):
    assert not off.has_head and off.anchors is None
    for use in (off.interact, off.set_anchors):
        with pytest.raises(ValueError, match="no cross-image head"):
            use(torch.zeros(1, 8448))


def test_initialisation_from_data_spreads_untrained_descriptors():
    model, x = tiny(interact=False), images(24)
    with torch.no_grad():
        before, other = model(x), copy.deepcopy(model)
        model.initialise_from(x.split(8))
        other.initialise_from((other.backbone.prefix(part), other.backbone.grid(part)) for part in x.split(8))
        after = model(x)
        torch.testing.assert_close(other(x), after, rtol=0, atol=1e-6)
    assert (after @ after.T).mean() < (before @ before.T).mean() - 0.1
    with pytest.raises(ValueError, match="only Soft Probing and NetVLAD start from data, not GeM"):
        tiny(aggregator="gem", interact=False).initialise_from([x])


def test_netvlad_starts_from_centres_of_the_patches():
    model, x = tiny(aggregator="netvlad", aggregator_options={"clusters": 4}, interact=False), images(24)
    before = model.aggregator.centres.clone()
    with torch.no_grad():
        model.initialise_from(x.split(8))
        patches = model.backbone.split(model.backbone(x))[1].flatten(0, 1)
    unit = torch.nn.functional.normalize(patches, dim=1)
    nearest = torch.cdist(unit, model.aggregator.centres).argmin(1)
    assert not torch.equal(model.aggregator.centres, before)
    for k in range(4):  # a centre is the mean of what lies nearest to it
        torch.testing.assert_close(model.aggregator.centres[k], unit[nearest == k].mean(0), rtol=0, atol=0.02)


def test_saved_whole_and_loaded_it_is_the_same(tmp_path):
    model = tiny(adapter_blocks=2, aggregator_options={"probes": 64, "alpha": 0.3})
    model.set_anchors(model.embed(images(4, seed=8)).detach())
    model.save_pretrained(tmp_path / "m")
    names = {p.name for p in (tmp_path / "m").iterdir()}
    assert {"model.safetensors", "config.json"} <= names and not [n for n in names if n.startswith(".")]
    torch.manual_seed(99)
    again = SAGE.from_pretrained(tmp_path / "m")
    assert not again.training
    assert torch.equal(again(images()), model(images()))
    assert again.aggregator.weighting.alpha == 0.3
    # ... and once more, from the model that was loaded.
    again.save_pretrained(tmp_path / "n")
    first, second = (json.loads((tmp_path / d / "config.json").read_text()) for d in "mn")
    assert first == second
    assert first["backbone"] == "vit_test_patch14" and first["interact_options"] == {"stored_anchors": 4}
    assert model.preprocessing is again.preprocessing is None
    (tmp_path / "n" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor trainable.safetensors"):
        SAGE.from_pretrained(tmp_path / "n")


@pytest.mark.parametrize("save", ["save_pretrained", "save_trainable"])
def test_the_preprocessing_is_saved_with_the_model(tmp_path, save):
    given = {"image_size": 322, "mode": "paper"}
    model = SAGE(EMBEDDED, interact=False, preprocessing=MappingProxyType(given))
    assert model.preprocessing == given
    getattr(model, save)(tmp_path / "m")
    assert SAGE.from_pretrained(tmp_path / "m").preprocessing == given
    other = build_model(tmp_path / "m", preprocessing={"image_size": 224, "mode": "antialias"})
    assert other.preprocessing["image_size"] == 224
    other.preprocessing = {"image_size": [192, 256], "mode": "antialias"}
    getattr(other, save)(tmp_path / "n")
    assert SAGE.from_pretrained(tmp_path / "n").preprocessing == other.preprocessing


@pytest.mark.parametrize("adapter", ["dpn", "lora", "unfreeze", "none"])
def test_the_trained_part_alone_is_small_and_enough(tmp_path, adapter):
    torch.save(tiny(adapter="none", interact=False).backbone.vit.state_dict(), tmp_path / "vit.pth")
    weights = str(tmp_path / "vit.pth")
    options = {"adapter": adapter, "adapter_blocks": 2, "interact": False, "weights": weights}
    torch.manual_seed(7)
    model = SAGE("vit_test_patch14", **options).eval()
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.05)
    model.save_trainable(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["weights"] == "vit.pth", "no path of this machine may go into a file"
    if adapter != "unfreeze":
        assert sum(f.stat().st_size for f in (tmp_path / "run").iterdir()) < 3e6
    again = SAGE.from_pretrained(tmp_path / "run", weights=weights)
    assert torch.equal(again(images()), model(images()))
    other = {k: v + 0.01 for k, v in torch.load(tmp_path / "vit.pth").items()}
    torch.save(other, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="trained on another backbone"):
        SAGE.from_pretrained(tmp_path / "run", weights=str(tmp_path / "other.pth"))


def test_the_trained_part_moves_between_models_and_misfits_are_named(off):
    other = tiny(seed=5, interact=False)
    frozen = {f"backbone.{n}" for n in other.backbone.frozen_names}
    state = off.trainable_state_dict()
    assert not frozen & state.keys() and frozen | state.keys() == off.state_dict().keys()
    other.load_trainable_state_dict(state)
    assert all(torch.equal(other.state_dict()[k], v) for k, v in state.items())
    name = "aggregator.token.0.bias"
    short = {**state, name: torch.zeros(3)}
    other_name = {("aggregator.extra" if k == name else k): v for k, v in state.items()}
    with pytest.raises(ValueError, match=rf"model: 1 of another shape \({name} \(3,\) for \(512,\)\)$"):
        other.load_trainable_state_dict(short)
    with pytest.raises(ValueError, match=rf"1 missing \({name}\); 1 left over \(aggregator.extra\)"):
        other.load_trainable_state_dict(other_name)


def test_build_model(tmp_path, monkeypatch, off):
    plain, x = build_model("vit_test_patch14", aggregator="cls", pretrained=False).eval(), images()
    assert not any(p.requires_grad for p in plain.backbone.parameters()) and not plain.has_head
    expected = torch.nn.functional.normalize(plain.backbone.vit.forward_features(x)[:, 0], dim=1)
    torch.testing.assert_close(plain(x), expected, rtol=0, atol=1e-6)
    off.save_pretrained(tmp_path / "m")
    assert torch.equal(build_model(tmp_path / "m")(x), off(x))
    monkeypatch.setattr("sagelib.model.snapshot_download", lambda name, **_: str(tmp_path / name[-1]))
    assert torch.equal(SAGE.from_pretrained("hub/m")(x), off(x))
    (tmp_path / "checkpoint.pth").touch()
    with pytest.raises(ValueError, match="load_authors_checkpoint"):
        build_model(tmp_path / "checkpoint.pth")


@pytest.mark.parametrize("name", ["nowhere/at/all", "./nowhere", "someone/model"])
def test_a_folder_that_is_not_there_is_said_at_once(monkeypatch, name):
    monkeypatch.setattr("sagelib.model.snapshot_download", lambda name, **_: open(name))
    with pytest.raises(FileNotFoundError, match=f"there is no folder {name} of a saved model"):
        SAGE.from_pretrained(name)


def test_a_convolutional_model_is_saved_and_read_again(tmp_path):
    options = {"pretrained": False, "stages": ["blocks.3", "blocks.4"], "interact": False}
    torch.manual_seed(0)
    model = SAGE("test_efficientnet", aggregator_options={"channels": 4, "probes": 3}, **options).eval()
    x = torch.randn(3, 3, 64, 96)
    before = model.backbone.norm.mean.clone()
    model.initialise_from([x])
    assert not torch.equal(model.backbone.norm.mean, before)
    model.save_pretrained(tmp_path / "m")
    again = SAGE.from_pretrained(tmp_path / "m")
    assert again.backbone.stages == ("blocks.3", "blocks.4") and torch.equal(again(x), model(x))
    assert model.parameter_report()["final ChannelNorm"][0] == 2 * model.backbone.width
