"""Checkpoints in the layout of the released ones, and their descriptors computed plainly from that layout.

Nothing here uses the package or timm: tensors are looked up by the released names and put through the
equations.
"""

import math

import torch
import torch.nn.functional as F

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16)}  # width, blocks, attention heads


def random_checkpoint(size: str, *, head: bool, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under the released names, large enough everywhere for each to matter."""
    width, depth, _ = SIZES[size]
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def matrix(name, out, *inside):
        scale = 1 / math.sqrt(math.prod(inside))
        state[f"{name}.weight"] = torch.randn(out, *inside, generator=generator).mul_(scale)
        state[f"{name}.bias"] = torch.randn(out, generator=generator).mul_(0.1)

    def norm(name, n):
        state[f"{name}.weight"] = torch.rand(n, generator=generator) + 0.5
        state[f"{name}.bias"] = torch.randn(n, generator=generator).mul_(0.1)

    vit = "backbone.model"
    state[f"{vit}.cls_token"] = torch.randn(1, 1, width, generator=generator)
    state[f"{vit}.pos_embed"] = torch.randn(1, 1370, width, generator=generator).mul_(0.5)
    state[f"{vit}.mask_token"] = torch.zeros(1, width)
    matrix(f"{vit}.patch_embed.proj", width, 3, 14, 14)
    for i in range(depth):
        block = f"{vit}.blocks.{i}"
        norm(f"{block}.norm1", width)
        matrix(f"{block}.attn.qkv", 3 * width, width)
        matrix(f"{block}.attn.proj", width, width)
        state[f"{block}.ls1.gamma"] = torch.rand(width, generator=generator).mul_(0.1)
        norm(f"{block}.norm2", width)
        matrix(f"{block}.mlp.fc1", 4 * width, width)
        matrix(f"{block}.mlp.fc2", width, 4 * width)
        state[f"{block}.ls2.gamma"] = torch.rand(width, generator=generator).mul_(0.1)
    norm(f"{vit}.norm", width)
    for i in range(4):
        matrix(f"backbone.gpn_norms.{i}.projection.0", 16, width)
        matrix(f"backbone.gpn_norms.{i}.projection.3", 1, 16)
    matrix("aggregator.soft_weighting.predictor.0", 128, 1)
    matrix("aggregator.soft_weighting.predictor.2", 1, 128)
    matrix("aggregator.token_features.0", 512, width)
    matrix("aggregator.token_features.2", 256, 512)
    for name, out in (("cluster_features", 128), ("score", 64), ("single_branch", 192)):
        matrix(f"aggregator.{name}.0", 512, width, 1, 1)
        matrix(f"aggregator.{name}.3", out, 512, 1, 1)
    matrix("aggregator.gpn.projection.0", 32, 64)
    matrix("aggregator.gpn.projection.3", 1, 32)
    if head:
        for i in range(2):
            layer = f"encoder.layers.{i}"
            matrix("attention", 3 * 768, 768)
            state[f"{layer}.self_attn.in_proj_weight"] = state.pop("attention.weight")
            state[f"{layer}.self_attn.in_proj_bias"] = state.pop("attention.bias")
            matrix(f"{layer}.self_attn.out_proj", 768, 768)
            matrix(f"{layer}.linear1", 1024, 768)
            matrix(f"{layer}.linear2", 768, 1024)
            norm(f"{layer}.norm1", 768)
            norm(f"{layer}.norm2", 768)
    return state


def descriptors(state: dict[str, torch.Tensor], images: torch.Tensor, *, head: bool) -> torch.Tensor:
    """What the released model gives for a batch of images (B, 3, H, W) in evaluation mode."""
    per_image = aggregate(state, backbone(state, images), images.shape[-2] // 14, images.shape[-1] // 14)
    return interact(state, per_image) if head else per_image


def backbone(state: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """All tokens, CLS first, after the final LayerNorm."""
    vit, batch = "backbone.model", len(images)
    width = state[f"{vit}.cls_token"].shape[-1]
    depth, heads = next((d, h) for w, d, h in SIZES.values() if w == width)

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        return F.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    x = F.conv2d(
        images, state[f"{vit}.patch_embed.proj.weight"], state[f"{vit}.patch_embed.proj.bias"], stride=14
    )
    rows, columns = x.shape[-2:]
    x = torch.cat([state[f"{vit}.cls_token"].expand(batch, -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
    position = state[f"{vit}.pos_embed"]
    table = position[:, 1:]
    if (rows, columns) != (37, 37):
        table = F.interpolate(
            table.reshape(1, 37, 37, width).permute(0, 3, 1, 2),
            scale_factor=((rows + 0.1) / 37, (columns + 0.1) / 37),
            mode="bicubic",
        )
        assert table.shape[-2:] == (rows, columns)
        table = table.permute(0, 2, 3, 1).reshape(1, rows * columns, width)
    x = x + torch.cat([position[:, :1], table], dim=1)
    for i in range(depth):
        block = f"{vit}.blocks.{i}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.reshape(batch, -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        attention = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(width // heads), dim=-1) @ v
        attention = attention.transpose(1, 2).reshape(batch, -1, width)
        x = x + state[f"{block}.ls1.gamma"] * linear(attention, f"{block}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + state[f"{block}.ls2.gamma"] * linear(hidden, f"{block}.mlp.fc2")
        if i >= depth - 4:
            x = power_norm(state, f"backbone.gpn_norms.{i - depth + 4}", x)
    return norm(x, f"{vit}.norm")


def power_norm(state, name, x):
    """Signed power plus identity of x (B, rows, width), one exponent an image."""
    y = x.mean(1) @ state[f"{name}.projection.0.weight"].T + state[f"{name}.projection.0.bias"]
    y = F.relu(y) @ state[f"{name}.projection.3.weight"].T + state[f"{name}.projection.3.bias"]
    p = torch.sigmoid(y)[:, None]
    return torch.sign(x) * torch.pow(torch.abs(x) + 1e-6, p) + x


def aggregate(state, tokens, rows, columns):
    """The per-image descriptor from all tokens."""

    def branch(x, name):
        weight, bias = f"aggregator.{name}.{{}}.weight", f"aggregator.{name}.{{}}.bias"
        x = F.relu(F.conv2d(x, state[weight.format(0)], state[bias.format(0)]))
        x = F.conv2d(x, state[weight.format(3)], state[bias.format(3)])
        return (x - x.mean(dim=(1, 2, 3), keepdim=True)).flatten(2)

    def perceptron(x, name):
        x = F.relu(x @ state[f"{name}.0.weight"].T + state[f"{name}.0.bias"])
        return x @ state[f"{name}.2.weight"].T + state[f"{name}.2.bias"]

    t, patches = tokens[:, 0], tokens[:, 1:]
    s = patches.norm(dim=-1, keepdim=True) + 1e-6
    beta = 0.5 * torch.sigmoid(perceptron(s, "aggregator.soft_weighting.predictor"))
    f = ((1 + beta) * patches).transpose(1, 2).reshape(len(tokens), -1, rows, columns)
    reduced, scores = branch(f, "cluster_features"), branch(f, "score")
    probes = torch.softmax(scores, dim=-1)
    gram = torch.einsum("bdn,bkn->bdk", reduced, probes) / (rows * columns)
    gram = F.normalize(power_norm(state, "aggregator.gpn", gram), dim=1)
    token = F.normalize(perceptron(t, "aggregator.token_features"), dim=-1)
    return F.normalize(torch.cat([token, gram.flatten(1)], dim=-1), dim=-1)


def interact(state, x):
    """torch's own encoder across the batch, segment by segment."""
    layer = torch.nn.TransformerEncoderLayer(768, 16, 1024, 0.1, activation="gelu")
    encoder = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    prefix = "encoder."
    encoder.load_state_dict({k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)})
    encoder = encoder.to(x.dtype)
    out = [encoder(x[:, s : s + 768]) for s in range(0, x.shape[1], 768)]
    return torch.cat(out, dim=1)
