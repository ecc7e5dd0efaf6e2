"""ViT-B/14 and ViT-L/14 at 322 pixels with random weights on one GPU: images a second, and share of its rate.

    python tests/benchmarks/bench_gpu.py

The plain loop runs float32; beside it bfloat16, and bfloat16 with every block compiled (``torch.compile``).
The card's rate is that of one large bfloat16 matrix product in the same run. Without a GPU it says so.
"""

import time
from functools import partial

import pytest
import torch

from sagelib.describe import describe_batch
from sagelib.model import build_model

NAMES = {"ViT-B/14": "vit_base_patch14_dinov2", "ViT-L/14": "vit_large_patch14_dinov2"}
NO_GPU = "no GPU is at hand: nothing was measured"


def seconds(call, device: str, rounds: int = 10) -> float:
    """The fastest of some rounds, after two to warm up."""
    wait, times = torch.cuda.synchronize if device == "cuda" else (lambda: None), []
    for _ in range(rounds + 2):
        wait()
        began = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - began)
    return min(times[2:])


def table(
    device="cuda", names=NAMES, side: int = 322, batch: int = 64, width: int = 8192, **how
) -> list[dict]:
    """A row for each network; the matrices of the card's rate are `width` wide, `how` is to compile."""
    a = torch.randn(width, width, device=device, dtype=torch.bfloat16)
    peak = 2 * width**3 / seconds(lambda: a @ a, device)
    images, rows = torch.randn(batch, 3, side, side, device=device), []
    for title, name in names.items():
        model = build_model(name, pretrained=False, interact=False).to(device).eval()
        half = partial(describe_batch, model, images, autocast=torch.bfloat16)
        rates = {"float32": seconds(partial(describe_batch, model, images), device)}
        rates["bfloat16"] = seconds(half, device)
        for block in model.backbone.vit.blocks:
            block.compile(**how)
        rates["compiled"] = seconds(half, device)
        # Two operations a weight and token; attention adds 4 x tokens x width a token and block.
        vit, tokens = model.backbone.vit, (side // 14) ** 2 + 1
        attention = 4 * len(vit.blocks) * vit.embed_dim * tokens**2
        work = 2 * sum(p.numel() for p in vit.blocks.parameters()) * tokens + attention
        row = {f"{key} images/s": round(batch / value, 1) for key, value in rates.items()}
        row["compiled over float32"] = round(rates["float32"] / rates["compiled"], 2)
        row["share of the card's rate"] = round(batch * work / rates["compiled"] / peak, 3)
        rows.append({"network": title, **row})
    return rows


@pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_GPU)
def test_gpu(benchmark):
    print("", *benchmark.pedantic(table, rounds=1), sep="\n")


if __name__ == "__main__":
    print(*table() if torch.cuda.is_available() else [NO_GPU], sep="\n")
