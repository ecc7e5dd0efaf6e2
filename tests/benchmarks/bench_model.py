"""The model's speed and memory beside the plain sequence of modules it is made of, in one run.

    python tests/benchmarks/bench_model.py                    # ViT-B at 224 and 322 pixels, speed and memory
    python tests/benchmarks/bench_model.py --model L --batch 4

The plain sequence is timm's transformer called block by block with the power norms between, position
embeddings resampled each time, and the aggregator of 1x1 convolutions, as one would write it down; it gives
the same descriptors. Timings alternate between the variants, and the fastest of the rounds counts. Peak
memory is that of a process of its own that makes one training step (forward, loss, backward, AdamW), beyond
what it held before.
"""

import argparse
import copy
import json
import os
import resource
import subprocess
import sys
import time

import timm
import torch
import torch.nn.functional as F
from torch import nn

from sagelib.backbone import EMBEDDED, ConvBackbone
from sagelib.model import SAGE

NAMES = {"S": "vit_small_patch14_dinov2", "B": "vit_base_patch14_dinov2", "L": "vit_large_patch14_dinov2"}


class Plain(nn.Module):
    """The same parts, one after the other, with nothing kept and nothing cut."""

    def __init__(self, model: SAGE):
        super().__init__()
        self.vit, self.dpn, self.position = model.backbone.vit, model.backbone.dpn, model.backbone.position
        self.token, self.weighting = model.aggregator.token, model.aggregator.weighting
        self.reduction = _convolutions(model.aggregator.reduction)
        self.probe = _convolutions(model.aggregator.probe)
        self.post_dpn = model.aggregator.post_dpn

    def forward(self, images):
        vit, batch = self.vit, len(images)
        x = vit.patch_embed.proj(images)
        rows, columns = x.shape[-2:]
        x = torch.cat([vit.cls_token.expand(batch, -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        side = round((vit.pos_embed.shape[1] - 1) ** 0.5)
        table = vit.pos_embed[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        scale = ((rows + 0.1) / side, (columns + 0.1) / side)
        table = F.interpolate(table, scale_factor=scale, mode="bicubic").flatten(2).transpose(1, 2)
        x = x + torch.cat([vit.pos_embed[:, :1], table], dim=1)
        first = len(vit.blocks) - len(self.dpn)
        for i, block in enumerate(vit.blocks):
            x = block(x)
            if i >= first:
                x = _power_norm(self.dpn[i - first], x)
        x = vit.norm(x)
        token, patches = F.normalize(self.token(x[:, 0]), dim=-1), x[:, 1:]
        weighted = patches * (1 + self.weighting(patches))[..., None]
        maps = weighted.transpose(1, 2).unflatten(-1, (rows, columns))
        features, scores = self.reduction(maps), self.probe(maps)
        features = features - features.mean(dim=(1, 2, 3), keepdim=True)
        scores = scores - scores.mean(dim=(1, 2, 3), keepdim=True)
        gram = features.flatten(2) @ scores.flatten(2).softmax(-1).transpose(1, 2) / (rows * columns)
        gram = F.normalize(_power_norm(self.post_dpn, gram), dim=1)
        return F.normalize(torch.cat([token, gram.flatten(1)], dim=-1), dim=-1)


def _power_norm(norm, x):
    exponent = torch.sigmoid(norm.projection(x.mean(dim=1)))[:, :, None]
    return torch.sign(x) * (x.abs() + 1e-6) ** exponent + x


def _convolutions(branch: nn.Sequential) -> nn.Sequential:
    layers = []
    for layer in branch:
        if isinstance(layer, nn.Linear):
            convolution = nn.Conv2d(layer.in_features, layer.out_features, 1)
            convolution.weight = nn.Parameter(layer.weight.detach().clone()[:, :, None, None])
            convolution.bias = nn.Parameter(layer.bias.detach().clone())
            layer = convolution
        layers.append(layer)
    return nn.Sequential(*layers)


def build(size: str) -> SAGE:
    """A random model whose every part matters."""
    torch.manual_seed(0)
    model = SAGE(NAMES[size], pretrained=False, interact=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".gamma"):
                p.uniform_(0, 0.1)
    return model


def speed(size: str, side: int, batch: int, rounds: int) -> dict:
    """Seconds of the fastest round of each variant, the ratios, and how near their descriptors are."""
    model = build(size).eval()
    plain = Plain(model).eval()
    images = torch.randn(batch, 3, side, side)

    def half():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(images)

    variants = {"plain": lambda: plain(images), "float32": lambda: model(images), "bfloat16": half}
    seconds, outputs = {name: [] for name in variants}, {}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for name, run in variants.items():
                start = time.perf_counter()
                outputs[name] = run()
                if turn:  # the first round warms up
                    seconds[name].append(time.perf_counter() - start)
    best = {name: min(values) for name, values in seconds.items()}
    return {
        "model": size,
        "side_px": side,
        "batch": batch,
        "threads": torch.get_num_threads(),
        **{f"{name}_images_per_s": round(batch / value, 2) for name, value in best.items()},
        "float32_over_plain": round(best["plain"] / best["float32"], 3),
        "bfloat16_over_float32": round(best["float32"] / best["bfloat16"], 2),
        "bfloat16_cosine": round(
            F.cosine_similarity(outputs["float32"], outputs["bfloat16"]).min().item(), 5
        ),
        "float32_difference": float((outputs["plain"] - outputs["float32"]).abs().max()),
    }


def training_step(size: str, variant: str, side: int, batch: int) -> dict:
    """Peak memory of one training step in this process, in MiB beyond what it held before."""
    net = build(size).train()
    if variant != "ours":
        net = Plain(net).train()
    if variant == "full":
        net.requires_grad_(True)
    optimiser = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4)
    images = torch.randn(batch, 3, side, side)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    out = net(images)
    (out @ out.T).exp().mean().backward()
    optimiser.step()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "variant": variant,
        "step_MiB": round((peak - before) / 1024),
        "peak_MiB": round(peak / 1024),
        "s": seconds,
    }


def memory(size: str, side: int, batch: int) -> dict:
    """The training step of each variant, each in a process of its own."""
    # Freed memory goes back to the system at once, so that the peak is of what was in use.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    rows = {}
    for variant in ("ours", "plain", "full"):
        command = [sys.executable, __file__, "--step", variant, "--model", size, "--batch", str(batch)]
        done = subprocess.run(
            [*command, "--sides", str(side)], capture_output=True, text=True, check=True, env=environment
        )
        rows[variant] = json.loads(done.stdout.splitlines()[-1])
    return {
        "model": size,
        "side_px": side,
        "batch": batch,
        **{f"{name}_MiB": row["step_MiB"] for name, row in rows.items()},
        "ours_over_plain": round(rows["ours"]["step_MiB"] / rows["plain"]["step_MiB"], 3),
        "ours_over_full": round(rows["ours"]["step_MiB"] / rows["full"]["step_MiB"], 3),
    }


def show(title: str, row: dict) -> None:
    print(f"\n{title}")
    for name, value in row.items():
        print(f"  {name:24s} {value}")


def test_speed_beside_the_plain_modules(benchmark):
    row = benchmark.pedantic(speed, args=("B", 224, 4, 3), rounds=1)
    benchmark.extra_info.update(row)
    show("speed", row)
    assert row["bfloat16_cosine"] > 0.999 and row["float32_difference"] < 1e-6


def test_memory_of_a_training_step(benchmark):
    row = benchmark.pedantic(memory, args=("B", 224, 16), rounds=1)
    benchmark.extra_info.update(row)
    show("peak memory of a training step", row)


def test_convolutional_prefix_beside_timm(benchmark):
    row = benchmark.pedantic(convolutional, args=(224, 4, 5), rounds=1)
    benchmark.extra_info.update(row)
    show("convolutional", row)


def convolutional(side: int, batch: int, rounds: int) -> dict:
    """Milliseconds an image of EfficientNet-Lite2's last three stages: timm's network as it is, and ours."""
    network = timm.create_model(EMBEDDED, num_classes=0).eval()
    model = ConvBackbone(copy.deepcopy(network), EMBEDDED, adapter="none").eval()
    images = torch.randn(batch, 3, side, side)
    variants = {"timm": lambda: network.forward_intermediates(images, 2, intermediates_only=True)}
    variants["folded, channels last"] = lambda: model.prefix(images)
    times = {name: [] for name in variants}
    with torch.no_grad():
        for _ in range(rounds + 1):
            for name, call in variants.items():
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    best = {name: 1000 * min(values[1:]) / batch for name, values in times.items()}
    return {"side": side, **{f"{name} ms": round(value, 1) for name, value in best.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=NAMES, default="B")
    parser.add_argument("--sides", type=int, nargs="+", default=[224, 322], help="image sides in pixels")
    parser.add_argument("--batch", type=int, default=4, help="images a batch for speed")
    parser.add_argument("--step-batch", type=int, default=16, help="images in the training step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step", choices=("ours", "plain", "full"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        print(json.dumps(training_step(given.model, given.step, given.sides[0], given.batch)))
        return
    for side in given.sides:
        show("speed", speed(given.model, side, given.batch, given.rounds))
        show("convolutional", convolutional(side // 16 * 16, given.batch, given.rounds))
    show("peak memory of a training step", memory(given.model, 224, given.step_batch))


if __name__ == "__main__":
    main()
