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
SIDE, BATCH = 322, 64


def seconds(call, rounds: int = 10) -> float:
    """The fastest of some rounds, after two to warm up."""
    times = []
    for _ in range(rounds + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[2:])


def table() -> list[dict]:
    """A row for each network."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    peak = 2 * 8192**3 / seconds(lambda: a @ a)
    images, rows = torch.randn(BATCH, 3, SIDE, SIDE, device="cuda"), []
    for title, name in NAMES.items():
        model = build_model(name, pretrained=False, interact=False).cuda().eval()
        half = partial(describe_batch, model, images, autocast=torch.bfloat16)
        rates = {"float32": seconds(partial(describe_batch, model, images)), "bfloat16": seconds(half)}
        for block in model.backbone.vit.blocks:
            block.compile()
        rates["compiled"] = seconds(half)
        # Two operations a weight and token; attention adds 4 x tokens x width a token and block.
        vit, tokens = model.backbone.vit, (SIDE // 14) ** 2 + 1
        width, depth = vit.embed_dim, len(vit.blocks)
        work = 2 * sum(p.numel() for p in vit.blocks.parameters()) * tokens + 4 * depth * width * tokens**2
        row = {f"{key} images/s": round(BATCH / value) for key, value in rates.items()}
        row["compiled over float32"] = round(rates["float32"] / rates["compiled"], 2)
        row["share of the card's rate"] = round(BATCH * work / rates["compiled"] / peak, 3)
        rows.append({"network": title, **row})
    return rows


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is at hand")
def test_gpu(benchmark):
    for row in benchmark.pedantic(table, rounds=1):
        print(row)


if __name__ == "__main__":
    print(*table() if torch.cuda.is_available() else ["no GPU is at hand: nothing was measured"], sep="\n")
