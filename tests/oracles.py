"""Every part of the model as float64 loops straight from its equations: slow, obvious, no code of the model.

Arrays are numpy's; a linear layer is a pair (weight (out, in), bias (out,)).
"""

import math

import numpy as np


def linear(x, layer):
    """Vector x (in,) through one linear layer."""
    weight, bias = layer
    return np.array([sum(weight[o, i] * x[i] for i in range(len(x))) + bias[o] for o in range(len(bias))])


def relu(x):
    return np.array([max(v, 0.0) for v in x])


def sigmoid(v):
    return 1.0 / (1.0 + math.exp(-v))


def gelu(v):
    return 0.5 * v * (1.0 + math.erf(v / math.sqrt(2.0)))


def softmax(scores):
    top = max(scores)
    exponentials = [math.exp(s - top) for s in scores]
    return np.array([e / sum(exponentials) for e in exponentials])


def unit(x):
    return x / math.sqrt(sum(v * v for v in x))


def layer_norm(x, weight, bias, epsilon):
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return np.array(
        [(x[i] - mean) / math.sqrt(variance + epsilon) * weight[i] + bias[i] for i in range(len(x))]
    )


def power_norm(x, first, second, epsilon=1e-6):
    """DPN of one image: x (rows, width); the exponent comes from the mean of the rows."""
    rows, width = x.shape
    y = np.array([sum(x[r, c] for r in range(rows)) / rows for c in range(width)])
    p = sigmoid(linear(relu(linear(y, first)), second)[0])
    out = np.zeros_like(x)
    for r in range(rows):
        for c in range(width):
            sign = int(x[r, c] > 0) - int(x[r, c] < 0)
            out[r, c] = sign * (abs(x[r, c]) + epsilon) ** p + x[r, c]
    return out


def soft_weights(patches, first, second, alpha):
    """beta of each patch (N, M)."""
    betas = []
    for x in patches:
        strength = math.sqrt(sum(v * v for v in x)) + 1e-6
        betas.append(alpha * sigmoid(linear(relu(linear([strength], first)), second)[0]))
    return np.array(betas)


def probe_maps(patches, beta, probe):
    """P (N, K): each column a softmax over the positions, after the branch's mean is subtracted."""
    scores = np.array(
        [linear(relu(linear((1 + b) * x, probe[0])), probe[1]) for x, b in zip(patches, beta, strict=True)]
    )
    scores = scores - scores.sum() / scores.size
    return np.stack([softmax(scores[:, k]) for k in range(scores.shape[1])], axis=1)


def soft_probing(cls, patches, layers, alpha):
    """The descriptor of one image; layers: weighting, token, reduction, probe, post_dpn as pairs."""
    n = len(patches)
    beta = np.zeros(n) if alpha is None else soft_weights(patches, *layers["weighting"], alpha)
    reduction = layers["reduction"]
    features = np.array(
        [
            linear(relu(linear((1 + b) * x, reduction[0])), reduction[1])
            for x, b in zip(patches, beta, strict=True)
        ]
    )
    features = features - features.sum() / features.size
    maps = probe_maps(patches, beta, layers["probe"])
    gram = np.zeros((features.shape[1], maps.shape[1]))
    for d in range(gram.shape[0]):
        for k in range(gram.shape[1]):
            gram[d, k] = sum(features[i, d] * maps[i, k] for i in range(n)) / n
    gram = power_norm(gram, *layers["post_dpn"])
    for k in range(gram.shape[1]):
        gram[:, k] = unit(gram[:, k])
    token = unit(linear(relu(linear(cls, layers["token"][0])), layers["token"][1]))
    row_major = [gram[d, k] for d in range(gram.shape[0]) for k in range(gram.shape[1])]
    return unit(np.concatenate([token, row_major]))


def attention(queries, keys, values, heads):
    """Multi-head attention of projected rows: queries (q, W), keys and values (n, W)."""
    size = queries.shape[1] // heads
    out = np.zeros_like(queries)
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        for i in range(len(queries)):
            scores = [float(queries[i, part] @ keys[j, part]) / math.sqrt(size) for j in range(len(keys))]
            weights = softmax(scores)
            for j in range(len(keys)):
                out[i, part] += weights[j] * values[j, part]
    return out


def encoder_layer(x, context, layer, heads):
    """A post-norm layer: rows x (q, W) look at the rows of context (n, W).

    layer: in_proj (3W, W), out_proj, linear1, linear2 as pairs; norm1, norm2 as pairs.
    """
    weight, bias = layer["in_proj"]
    width = x.shape[1]
    project = [(weight[s * width : (s + 1) * width], bias[s * width : (s + 1) * width]) for s in range(3)]
    q = np.array([linear(row, project[0]) for row in x])
    k = np.array([linear(row, project[1]) for row in context])
    v = np.array([linear(row, project[2]) for row in context])
    mixed = attention(q, k, v, heads)
    out = []
    for row, m in zip(x, mixed, strict=True):
        row = layer_norm(row + linear(m, layer["out_proj"]), *layer["norm1"], 1e-5)
        hidden = np.array([gelu(value) for value in linear(row, layer["linear1"])])
        out.append(layer_norm(row + linear(hidden, layer["linear2"]), *layer["norm2"], 1e-5))
    return np.array(out)


def interact_batch(descriptors, layers, segment_width, heads):
    """Every image looks at all images of the batch, segment by segment."""
    out = np.zeros_like(descriptors)
    for start in range(0, descriptors.shape[1], segment_width):
        x = descriptors[:, start : start + segment_width]
        for layer in layers:
            x = encoder_layer(x, x, layer, heads)
        out[:, start : start + segment_width] = x
    return out


def interact_anchors(descriptor, anchors, layers, segment_width, heads):
    """One image (D,) looks at itself and the anchors (m, D); the anchors look at each other only."""
    out = np.zeros_like(descriptor)
    for start in range(0, len(descriptor), segment_width):
        x = descriptor[None, start : start + segment_width]
        a = anchors[:, start : start + segment_width]
        for layer in layers:
            x, a = (
                encoder_layer(x, np.concatenate([x, a]), layer, heads),
                encoder_layer(a, a, layer, heads) if len(a) else a,
            )
        out[start : start + segment_width] = x[0]
    return out


def cubic(t, a=-0.75):
    """The kernel of bicubic interpolation."""
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    if t < 2:
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return 0.0


def resample_positions(table, rows, columns):
    """Position embeddings (side, side, M) to (rows, columns, M) as the original DINOv2 does.

    Bicubic without antialiasing; a target pixel's centre maps to the source by side / (new side + 0.1).
    """
    side = table.shape[0]
    out = np.zeros((rows, columns, table.shape[2]))
    for r in range(rows):
        for c in range(columns):
            y = (r + 0.5) * side / (rows + 0.1) - 0.5
            x = (c + 0.5) * side / (columns + 0.1) - 0.5
            for i in range(math.floor(y) - 1, math.floor(y) + 3):
                for j in range(math.floor(x) - 1, math.floor(x) + 3):
                    at = table[min(max(i, 0), side - 1), min(max(j, 0), side - 1)]
                    out[r, c] += cubic(y - i) * cubic(x - j) * at
    return out


def vit_embed(image, p, *, patch, position):
    """Tokens of one image (3, H, W) before the first block; p: arrays by timm's names, position (T, M)."""
    _, height, width = image.shape
    kernel, bias = p["patch_embed.proj.weight"], p["patch_embed.proj.bias"]
    tokens = [p["cls_token"][0, 0]]
    for r in range(height // patch):
        for c in range(width // patch):
            window = image[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch]
            tokens.append(np.array([(kernel[o] * window).sum() + bias[o] for o in range(len(bias))]))
    return np.array(tokens) + position


def vit_block(x, p, block, heads):
    """A pre-norm block with LayerScale on tokens (T, M)."""

    def pair(name):
        return p[f"{block}.{name}.weight"], p[f"{block}.{name}.bias"]

    width = x.shape[1]
    normed = np.array([layer_norm(row, *pair("norm1"), 1e-6) for row in x])
    qkv = np.array([linear(row, pair("attn.qkv")) for row in normed])
    mixed = attention(qkv[:, :width], qkv[:, width : 2 * width], qkv[:, 2 * width :], heads)
    x = x + p[f"{block}.ls1.gamma"] * np.array([linear(row, pair("attn.proj")) for row in mixed])
    normed = np.array([layer_norm(row, *pair("norm2"), 1e-6) for row in x])
    hidden = [np.array([gelu(v) for v in linear(row, pair("mlp.fc1"))]) for row in normed]
    return x + p[f"{block}.ls2.gamma"] * np.array([linear(row, pair("mlp.fc2")) for row in hidden])
