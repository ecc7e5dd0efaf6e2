"""Released checkpoints: equal descriptors, and nothing missing or left over without a word."""

import authors_layout
import pytest
import torch

from sagelib.model import SAGE
from sagelib.weights import load_authors_checkpoint


def write(path, state, prefix=""):
    torch.save({"model_state_dict": {prefix + k: v for k, v in state.items()}}, path)
    return path


def images(size, batch, seed=0):
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def small():
    """The released layout on the smallest DINOv2: for everything that is not about numbers."""
    return authors_layout.random_checkpoint("S", head=True)


@pytest.mark.parametrize(("size", "batch", "prefix"), [("B", 2, "module."), ("L", 1, "")])
def test_descriptors_equal_the_released_models(size, batch, prefix, tmp_path):
    state = authors_layout.random_checkpoint(size, head=True)
    model = load_authors_checkpoint(write(tmp_path / "sage.pth", state, prefix))
    assert model.preprocessing == {"image_size": 322, "mode": "paper"}
    (tmp_path / "sage.pth").unlink()
    assert model.backbone.name == {"B": "vit_base_patch14_dinov2", "L": "vit_large_patch14_dinov2"}[size]
    assert model.has_head and model.width == 8448 and not model.training
    with torch.no_grad():
        for side in (224, 322):
            x = images(side, batch)
            expected = authors_layout.descriptors(state, x, head=False)
            found = model.embed(x)
            assert (found - expected).abs().max() < 1e-6
            assert (model.interact(found) - authors_layout.interact(state, expected)).abs().max() < 1e-5


def test_in_float64_they_are_equal_to_the_last_digits(small, tmp_path):
    model = load_authors_checkpoint(write(tmp_path / "sage.pth", small)).double()
    state = {k: v.double() for k, v in small.items()}
    with torch.no_grad():
        for size, batch in (((126, 238), 3), (322, 1)):
            x = images(size, batch).double()
            expected = authors_layout.descriptors(state, x, head=False)
            found = model.embed(x)
            assert (found - expected).abs().max() < 1e-12
            assert (model.interact(found) - authors_layout.interact(state, expected)).abs().max() < 1e-10


def test_position_embeddings_resampled_otherwise_would_show(small, tmp_path):
    model = load_authors_checkpoint(write(tmp_path / "sage.pth", small))
    expected = authors_layout.descriptors(small, images(322, 1), head=False)
    model.backbone.position = "timm"
    with torch.no_grad():
        assert (model.embed(images(322, 1)) - expected).abs().max() > 1e-5


def test_head_is_recognised_and_may_be_absent(small, tmp_path):
    without = {k: v for k, v in small.items() if not k.startswith("encoder.")}
    model = load_authors_checkpoint(write(tmp_path / "sage.pth", without))
    assert not model.has_head
    expected = authors_layout.descriptors(small, images(224, 2), head=False)
    with torch.no_grad():
        torch.testing.assert_close(model(images(224, 2)), expected, rtol=0, atol=1e-6)


def test_every_tensor_of_the_model_comes_from_the_file(small, tmp_path):
    model = load_authors_checkpoint(write(tmp_path / "sage.pth", small))
    ours = sorted(t.double().sum().item() for t in model.state_dict().values())
    dead = ("single_branch", "mask_token")
    theirs = sorted(t.double().sum().item() for k, t in small.items() if not any(d in k for d in dead))
    assert ours == theirs and not any(t.is_meta for t in model.state_dict().values())
    assert all(
        p.requires_grad == (n not in model.backbone.frozen_names)
        for n, p in model.backbone.named_parameters()
    )


def test_what_is_dead_may_be_missing(small, tmp_path):
    without = {k: v for k, v in small.items() if "single_branch" not in k and "mask_token" not in k}
    assert len(without) == len(small) - 5
    load_authors_checkpoint(write(tmp_path / "sage.pth", without))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("-backbone.model.blocks.3.attn.qkv.bias", r"1 missing \(backbone.vit.blocks.3.attn.qkv.bias\)$"),
        ("-aggregator.gpn.projection.3.weight", r"1 missing \(aggregator.post_dpn.projection.3.weight\)$"),
        ("-encoder.layers.1.linear1.bias", r"1 missing \(head.layers.1.linear1.bias\)$"),
        ("-backbone.gpn_norms.0.projection.0.weight", r"1 missing \(backbone.dpn.0.projection.0.weight\)$"),
        ("-backbone.model.cls_token", "nothing for backbone.vit.cls_token"),
        ({"aggregator.surprise": torch.zeros(1)}, r"1 left over \(aggregator.surprise\)$"),
        ({"aggregator.single_branch.0.scale": torch.zeros(1)}, r"1 left over \(.*branch.0.scale\)$"),
        (
            {"backbone.model.norm.bias": torch.zeros(3)},
            r"of another shape \(.*norm.bias \(3,\) for \(384,\)\)$",
        ),
        ({"backbone.model.cls_token": torch.zeros(1, 1, 5)}, "5 wide of 12 blocks; known are 384"),
    ],
)
def test_what_does_not_fit_is_named(small, tmp_path, change, words):
    state = {k: v for k, v in small.items() if f"-{k}" != change} | (
        change if isinstance(change, dict) else {}
    )
    with pytest.raises(ValueError, match=words):
        load_authors_checkpoint(write(tmp_path / "sage.pth", state))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights file .*nowhere.pth"):
        load_authors_checkpoint(tmp_path / "nowhere.pth")
    torch.save({"epoch": 3, "loss": 0.1}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="no 'model_state_dict'"):
        load_authors_checkpoint(tmp_path / "x.pth")


class Dangerous:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_in_a_file_is_executed(tmp_path, capsys):
    torch.save({"model_state_dict": {"x": Dangerous()}}, tmp_path / "x.pth")
    with pytest.raises(
        ValueError, match=r"x.pth cannot be read: it is more than weights \(.*print would be run"
    ):
        load_authors_checkpoint(tmp_path / "x.pth")
    assert "executed" not in capsys.readouterr().out


def test_saved_again_in_our_own_way_it_is_the_same(small, tmp_path):
    model = load_authors_checkpoint(write(tmp_path / "sage.pth", small))
    model.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(SAGE.from_pretrained(tmp_path / "ours")(images(126, 2)), model(images(126, 2)))
