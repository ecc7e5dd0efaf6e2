"""What the packaged backbone is worth before anything is trained on it: frozen features against simple descriptors.

Run as a script::

    python tests/benchmarks/compare_foundation.py --teacher mobilenet_v2.npz --sets $SAGE_DATA --out foundation.md

Each picture is described by frozen features pooled with GeM (p = 3), by 32 x 32 grey pixels, by HOG, and by a
MobileNetV2 whose four deepest stages are standardised on the references and averaged. Nothing is fitted to the sets
but that standardisation. R@1 comes with Wilson's 95 % interval. The town is one of those kept for testing, never used
for pre-training: day pictures of the first year are the references, each condition of later years asks the queries.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.feature import hog

from sagelib.aggregators import GeM
from sagelib.backbone import Backbone
from sagelib.images import Preprocess, load_image
from sagelib.places import open_set, positives
from sagelib.pretrain import MobileNetStages
from sagelib.retrieval import Recall, recall, search
from sagelib.town import SEED_RANGES, condition_of, write_town

SETS = ("sf-streets", "gardens-point", "essex3in1", "corridor")


def grey(path: str, side: int) -> np.ndarray:
    return np.asarray(
        load_image(path).convert("L").resize((side, side), Image.Resampling.BILINEAR), np.float32
    )


def pixels(paths: list[str]) -> np.ndarray:
    """32 x 32 grey pixels, mean removed."""
    values = np.stack([grey(p, 32).ravel() for p in paths])
    return values - values.mean(1, keepdims=True)


def oriented_gradients(paths: list[str], cell: int, block: int) -> np.ndarray:
    """Dalal and Triggs' HOG of a 128 x 128 picture: 9 orientations, square cells and blocks."""
    return np.stack(
        [
            hog(grey(p, 128), orientations=9, pixels_per_cell=(cell, cell), cells_per_block=(block, block))
            for p in paths
        ]
    )


@torch.inference_mode()
def frozen(backbone: Backbone, paths: list[str], size: int, pools: tuple[int, ...]) -> dict[int, np.ndarray]:
    """GeM over 1 x 1, 2 x 2, ... cells of the final tokens."""
    transform = Preprocess(image_size=size, mode="antialias")
    heads = {g: GeM(backbone.width, grid=g).eval() for g in pools}
    rows: dict[int, list] = {g: [] for g in pools}
    for start in range(0, len(paths), 32):
        images = torch.stack([transform(load_image(p)) for p in paths[start : start + 32]])
        cls, patches = backbone.split(backbone(images))
        for g, head in heads.items():
            rows[g].append(head(cls, patches, backbone.grid(images)).numpy())
    return {g: np.concatenate(r) for g, r in rows.items()}


@torch.inference_mode()
def convolutional(
    network: MobileNetStages, paths: list[str], size: int, pools: tuple[int, ...]
) -> dict[int, np.ndarray]:
    """Four deepest stages, averaged over cells, side by side."""
    rows: dict[int, list] = {g: [] for g in pools}
    for start in range(0, len(paths), 32):
        images = torch.stack(
            [
                torch.from_numpy(
                    np.asarray(load_image(p).resize((size, size), Image.Resampling.BILINEAR)).copy()
                ).permute(2, 0, 1)
                for p in paths[start : start + 32]
            ]
        )
        stages = network(images.float() / 255)
        for g in pools:
            rows[g].append(
                torch.cat([F.adaptive_avg_pool2d(s.float(), g).flatten(1) for s in stages], 1).numpy()
            )
    return {g: np.concatenate(r) for g, r in rows.items()}


def unit(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def describe_all(
    paths: list[str], n_references: int, size: int, backbones: dict, network, pools
) -> dict[str, np.ndarray]:
    """Every descriptor of every picture; the first `n_references` are the data base."""
    out = {}
    for name, backbone in backbones.items():
        for g, values in frozen(backbone, paths, size, pools).items():
            out[f"{name}, GeM {g}x{g}"] = values
    out["pixels 32x32"] = pixels(paths)
    out["HOG, 8 px cells, 3x3 blocks"] = oriented_gradients(paths, 8, 3)
    out["HOG, 32 px cells, 2x2 blocks"] = oriented_gradients(paths, 32, 2)
    if network is not None:
        for g, values in convolutional(
            network, paths, size if size % 32 == 0 else 32 * round(size / 32), pools
        ).items():
            references = values[:n_references]
            out[f"MobileNetV2, mean {g}x{g}"] = (values - references.mean(0)) / (references.std(0) + 1e-6)
    return {k: unit(v) for k, v in out.items()}


def measure(test_set, size: int, backbones, network, pools, groups=None) -> dict[str, dict[str, Recall]]:
    """R@1 of each descriptor on the whole set, or on each group of its queries."""
    database, queries = test_set.database, test_set.queries
    found = positives(database, queries, test_set.rule)
    found = [np.asarray(p) for p in found]
    described = describe_all(
        [str(p) for p in (*database.path, *queries.path)], len(database), size, backbones, network, pools
    )
    out: dict[str, dict[str, Recall]] = {}
    for name, values in described.items():
        indices, _ = search(values[: len(database)], values[len(database) :], 10)
        for group, rows in (groups or {test_set.name: np.arange(len(queries))}).items():
            out.setdefault(group, {})[name] = recall(indices[rows], [found[i] for i in rows], (1, 5, 10))
    return out


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", help="a backbone's .safetensors; default: the packaged one")
    parser.add_argument("--teacher", help="a MobileNetV2 as .npz; default: left out")
    parser.add_argument("--sets", help=f"folder that holds {', '.join(SETS)}; default: left out")
    parser.add_argument("--town", help="where the test town is written; default: a temporary folder")
    parser.add_argument("--towns", type=int, default=2, help="how many of the test towns")
    parser.add_argument("--out", help="write the table, in Markdown, here too")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    backbones = {
        "sage_vit_tiny": Backbone("sage_vit_tiny", weights=options.weights, adapter="none").eval(),
        "random weights": Backbone("sage_vit_tiny", pretrained=False, adapter="none").eval(),
    }
    network = None if options.teacher is None else MobileNetStages(options.teacher).eval()
    pools = (1, 2)
    results: dict[str, dict[str, Recall]] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_town(
            Path(options.town or temporary) / "town",
            train_seeds=(),
            val_seeds=(),
            test_seeds=tuple(SEED_RANGES["test"])[: options.towns],
            size=126,
        )
        town = open_set(folder.parent, folder.name)
        conditions = np.array([condition_of(n) for n in town.queries.note])
        groups = {f"town: {c}": np.flatnonzero(conditions == c) for c in dict.fromkeys(conditions)}
        results |= measure(
            town, 126, backbones, network, pools, {"town": np.arange(len(conditions)), **groups}
        )
    for name in SETS if options.sets else ():
        results |= measure(open_set(options.sets, name), 224, backbones, network, pools)

    columns = list(results)
    lines = [
        "| descriptor | "
        + " | ".join(f"{c} ({results[c]['pixels 32x32'].n_queries})" for c in columns)
        + " |"
    ]
    lines.append("|---|" + "---|" * len(columns))
    for method in results[columns[0]]:
        row = []
        for c in columns:
            low, high = results[c][method].interval(1)
            row.append(f"{results[c][method].percent(1):.1f} [{low:.0f}, {high:.0f}]")
        lines.append(f"| {method} | " + " | ".join(row) + " |")
    table = "R@1 in percent [95 % interval]; the number of queries in the head\n\n" + "\n".join(lines) + "\n"
    print(table)
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    if options.out:
        Path(options.out).write_text(table, encoding="utf-8")
    return table


if __name__ == "__main__":
    main()
