"""The aggregators once more, slowly: float64 loops, from the papers' equations.

Each function takes the weights of a `sagelib.aggregators` module and plain arrays of one image:
``cls`` (M,), ``patches`` (N, M), ``grid`` (h, w).
"""

import math

import numpy as np
import torch


def weights(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {k: v.detach().double().numpy() for k, v in module.state_dict().items()}


def unit(v: np.ndarray) -> np.ndarray:
    return v / max(math.sqrt(sum(float(x) ** 2 for x in v)), 1e-12)


def linear(w: dict, name: str, x: np.ndarray) -> np.ndarray:
    return np.array([float(row @ x) for row in w[f"{name}.weight"]]) + w[f"{name}.bias"]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    return e / e.sum()


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    mean = sum(x) / len(x)
    var = sum((v - mean) ** 2 for v in x) / len(x)
    return (x - mean) / math.sqrt(var + 1e-5) * weight + bias


def mlp(w: dict, name: str, x: np.ndarray) -> np.ndarray:
    """Linear, ReLU, Linear: the last index is 2 without and 3 with a dropout between."""
    last = max(int(k.split(".")[1]) for k in w if k.startswith(f"{name}."))
    return linear(w, f"{name}.{last}", np.maximum(linear(w, f"{name}.0", x), 0))


def gem(patches, grid, p, cells=1, eps=1e-6):
    h, w = grid
    maps = patches.reshape(h, w, -1)
    out = []
    for r in range(cells):
        rows = range((r * h) // cells, -((-(r + 1) * h) // cells))
        for c in range(cells):
            columns = range((c * w) // cells, -((-(c + 1) * w) // cells))
            for channel in range(maps.shape[2]):
                total = 0.0
                for i in rows:
                    for j in columns:
                        total += max(float(maps[i, j, channel]), eps) ** p
                out.append((total / (len(rows) * len(columns))) ** (1 / p))
    return unit(np.array(out))


def netvlad(module, patches):
    w = weights(module)
    centres = w["centres"]
    v = np.zeros_like(centres)
    for x in patches:
        x = unit(linear(w, "project", x) if "project.weight" in w else x)
        a = softmax(linear(w, "assign", x))
        for k in range(len(centres)):
            v[k] += a[k] * (x - centres[k])
    return unit(np.concatenate([unit(row) for row in v]))


def sinkhorn(scores, rows, columns, iterations):
    """Plain multiplicative scaling: columns, then rows."""
    plan = np.exp(np.asarray(scores, dtype=np.float64))
    for _ in range(iterations):
        for j in range(plan.shape[1]):
            plan[:, j] *= float(columns[j]) / plan[:, j].sum()
        for i in range(plan.shape[0]):
            plan[i] *= float(rows[i]) / plan[i].sum()
    return plan


def salad(module, cls, patches):
    w = weights(module)
    scores = np.array([mlp(w, "scores", x) for x in patches])
    n, m = scores.shape
    scores = np.concatenate([scores, np.full((n, 1), w["dustbin"])], axis=1)
    plan = sinkhorn(scores, np.ones(n), [1.0] * m + [n - m], module.iterations)
    features = np.array([mlp(w, "features", x) for x in patches])
    parts = [unit(mlp(w, "token", cls))]
    for k in range(m):
        parts.append(unit(sum(plan[i, k] * features[i] for i in range(n))))
    return unit(np.concatenate(parts))


def mixvpr(module, patches):
    w = weights(module)
    maps = patches.T.copy()
    for depth in range(len(module.mixers)):
        for c in range(len(maps)):
            normed = layer_norm(maps[c], w[f"mixers.{depth}.0.weight"], w[f"mixers.{depth}.0.bias"])
            inner = np.maximum(linear(w, f"mixers.{depth}.1", normed), 0)
            maps[c] = maps[c] + linear(w, f"mixers.{depth}.3", inner)
    columns = np.array([linear(w, "channel_projection", column) for column in maps.T])  # (N, d)
    return unit(np.concatenate([linear(w, "row_projection", row) for row in columns.T]))


def attention(w, name, queries, keys, heads):
    """Multi-head scaled dot-product attention; one head and one query at a time."""
    size = queries.shape[1]
    step = size // heads
    in_w, in_b = w[f"{name}.in_proj_weight"], w[f"{name}.in_proj_bias"]
    q = queries @ in_w[:size].T + in_b[:size]
    k = keys @ in_w[size : 2 * size].T + in_b[size : 2 * size]
    v = keys @ in_w[2 * size :].T + in_b[2 * size :]
    out = np.zeros_like(q)
    for head in range(heads):
        part = slice(head * step, (head + 1) * step)
        for i in range(len(q)):
            a = softmax(np.array([float(q[i, part] @ key[part]) for key in k]) / math.sqrt(step))
            out[i, part] = sum(a[j] * v[j, part] for j in range(len(v)))
    return np.array([linear(w, f"{name}.out_proj", row) for row in out])


def boq(module, patches, grid, heads):
    w = weights(module)
    h, wide = grid
    kernel = w["reduce.weight"]
    half = kernel.shape[2] // 2
    maps = patches.reshape(h, wide, -1)
    encoded = []
    for i in range(h):
        for j in range(wide):
            total = w["reduce.bias"].copy()
            for a in range(-half, half + 1):
                for b in range(-half, half + 1):
                    if 0 <= i + a < h and 0 <= j + b < wide:
                        total += kernel[:, :, a + half, b + half] @ maps[i + a, j + b]
            encoded.append(layer_norm(total, w["norm.weight"], w["norm.bias"]))
    x = np.array(encoded)

    def normed(name, rows):
        return np.array([layer_norm(row, w[f"{name}.weight"], w[f"{name}.bias"]) for row in rows])

    answers = []
    for index in range(len(module.layers)):
        at = f"layers.{index}"
        x = normed(f"{at}.encoder.norm1", x + attention(w, f"{at}.encoder.self_attn", x, x, heads))
        fed = [
            linear(w, f"{at}.encoder.linear2", np.maximum(linear(w, f"{at}.encoder.linear1", row), 0))
            for row in x
        ]
        x = normed(f"{at}.encoder.norm2", x + np.array(fed))
        q = w[f"{at}.queries"][0]
        q = normed(f"{at}.query_norm", q + attention(w, f"{at}.among_queries", q, q, heads))
        answers.append(normed(f"{at}.answer_norm", attention(w, f"{at}.to_patches", q, x, heads)))
    stacked = np.concatenate(answers)  # (layers * queries, channels)
    return unit(np.concatenate([linear(w, "row_projection", column) for column in stacked.T]))
