"""Other people's aggregators, on equal terms: from the tokens of a vision transformer to one descriptor.

Every class reads ``(cls, patches, grid)`` and gives one unit vector an image, so each can take the place of Soft
Probing in the same model, under the same backbone, data, budget and loss. Each is written from the equations of
its paper; `build_aggregator` makes one by name, and `options_for_dim` finds the options that give a wished
descriptor width.

Shapes: B images, N = h * w patches in row-major order, M the width of the backbone.
"""

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "CLS",
    "BoQ",
    "GeM",
    "Mean",
    "MixVPR",
    "NetVLAD",
    "SALAD",
    "aggregator_names",
    "build_aggregator",
    "log_sinkhorn",
    "options_for_dim",
]


class CLS(nn.Module):
    """The class token itself, optionally projected, at unit length.

    Parameters
    ----------
    width : int
        M, the width of the backbone.
    dim : int, optional
        Width of a linear projection behind the token; ``None`` (off) leaves the M channels as they are.
    """

    def __init__(self, width: int, *, dim: int | None = None):
        super().__init__()
        self.project, self.out_dim = _projection(width, dim)

    def forward(self, cls: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Give (B, out_dim) unit descriptors from cls (B, M); the patches (B, N, M) are not read."""
        _check_tokens(cls, patches, grid)
        return F.normalize(self.project(cls), dim=-1)

    def patch_contributions(
        self, cls: Tensor, patches: Tensor, grid: tuple[int, int], other: Tensor
    ) -> Tensor:
        """Zeros (B, N): no patch is read. (What the token took from the patches happened in the backbone.)"""
        return patches.new_zeros(patches.shape[:2])


class Mean(nn.Module):
    """The mean of the patches, optionally projected, at unit length.

    Parameters
    ----------
    width : int
        M, the width of the backbone.
    dim : int, optional
        Width of a linear projection behind the mean; ``None`` (off) leaves the M channels as they are.
    """

    def __init__(self, width: int, *, dim: int | None = None):
        super().__init__()
        self.project, self.out_dim = _projection(width, dim)

    def forward(self, cls: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Give (B, out_dim) unit descriptors from patches (B, N, M); the class token is not read."""
        _check_tokens(cls, patches, grid)
        return F.normalize(self.project(patches.mean(dim=1)), dim=-1)

    def patch_contributions(
        self, cls: Tensor, patches: Tensor, grid: tuple[int, int], other: Tensor
    ) -> Tensor:
        """What each patch adds to ``descriptor . other``, exactly: (B, N), summing to it up to a projection's bias.

        `other` is (B, out_dim) or (out_dim,), for instance the true reference's descriptor. The length of the
        descriptor before normalisation is held at its value.
        """
        _check_tokens(cls, patches, grid)
        length = self.project(patches.mean(dim=1)).norm(dim=-1, keepdim=True)
        back = _back_through(self.project, other.expand(len(patches), -1)) / length.clamp(min=1e-12)
        return torch.einsum("bnm,bm->bn", patches, back) / patches.shape[1]


class GeM(nn.Module):
    """Generalised mean pooling: each channel's power mean over the patches.

    Equation 1 and 3 of Radenovic, Tolias and Chum, "Fine-tuning CNN Image Retrieval with No Human Annotation"
    (TPAMI 2019): ``g_c = (1/N sum_i x_ic^p)^(1/p)``, p learned, one for all channels. p = 1 is the mean, p -> inf
    the maximum. Their features follow a ReLU; those of a transformer have signs, see `negative`.

    Parameters
    ----------
    width : int
        M, the width of the backbone.
    p : float
        Exponent at the start, > 0; 3 in the paper.
    learn_p : bool
        Train p with the rest (the paper's way).
    grid : int
        Pool over each cell of a ``grid`` x ``grid`` division of the picture and concatenate the cells; 1 (the
        paper's) pools over the whole picture. Cells of an undividable picture overlap by one patch.
    negative : {"clamp", "sign"}
        What a negative value counts. The paper has none. "clamp" raises it to `eps`, as after a ReLU; "sign" takes
        the power of the absolute value, keeps the sign, and does the same with the root.
    dim : int, optional
        Width of the linear layer behind the pooling (the paper's learned whitening); ``None`` is off.
    eps : float
        Smallest value that is raised to a power.
    """

    def __init__(
        self,
        width: int,
        *,
        p: float = 3.0,
        learn_p: bool = True,
        grid: int = 1,
        negative: str = "clamp",
        dim: int | None = None,
        eps: float = 1e-6,
    ):
        super().__init__()
        if not p > 0:
            raise ValueError(f"p must be above 0, got {p}")
        if negative not in ("clamp", "sign"):
            raise ValueError(f'negative must be "clamp" or "sign", got {negative!r}')
        _check_positive(grid=grid)
        self.cells, self.negative, self.eps = grid, negative, eps
        start = torch.tensor(float(p))
        if learn_p:
            self.p = nn.Parameter(start)
        else:
            self.register_buffer("p", start)
        self.project, self.out_dim = _projection(width * grid * grid, dim)

    def forward(self, cls: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Give (B, out_dim) unit descriptors from patches (B, N, M); the class token is not read."""
        _check_tokens(cls, patches, grid)
        return F.normalize(self.project(self._pool(patches, grid)[0].flatten(1)), dim=-1)

    def _pool(self, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The pooled cells (B, cells, M), their means before the root, the powers, and who belongs to which cell."""
        size = patches.abs().clamp(min=self.eps) if self.negative == "sign" else patches.clamp(min=self.eps)
        powers = size**self.p
        if self.negative == "sign":
            powers = powers * patches.sign()
        belongs = _cell_weights(grid, self.cells).to(powers)
        means = belongs @ powers
        # Opposite signs may cancel to an exact zero, where the root has no finite gradient.
        root = means.abs().clamp(min=self.eps**3) ** (1.0 / self.p) * means.sign()
        return root, means, powers, belongs

    def patch_contributions(
        self, cls: Tensor, patches: Tensor, grid: tuple[int, int], other: Tensor
    ) -> Tensor:
        """What each patch adds to ``descriptor . other``, exactly: (B, N), summing to it up to a projection's bias.

        A channel's pooled value is shared out in proportion to the powers ``x_ic^p`` that it is the root of; the
        length of the descriptor before normalisation is held at its value. `other` is (B, out_dim) or (out_dim,).
        """
        _check_tokens(cls, patches, grid)
        root, means, powers, belongs = self._pool(patches, grid)
        length = self.project(root.flatten(1)).norm(dim=-1, keepdim=True).clamp(min=1e-12)
        back = _back_through(self.project, other.expand(len(patches), -1)) / length
        rate = torch.where(means == 0, torch.zeros_like(means), root / means)
        return torch.einsum("bnm,bcm,cn->bn", powers, back.unflatten(1, (len(belongs), -1)) * rate, belongs)


class NetVLAD(nn.Module):
    """Residuals to K learned centres, each patch softly assigned to them.

    Arandjelovic et al., "NetVLAD: CNN architecture for weakly supervised place recognition" (CVPR 2016), equation
    4: ``V(:, k) = sum_i softmax_k(w_k . x_i + b_k) (x_i - c_k)`` on L2-normalised patches, then intra-normalisation
    of each column and L2 of the whole. w, b and c are independent parameters; `start_from` ties them at the start
    as the paper does (w_k = 2 alpha c_k, b_k = -alpha ||c_k||^2).

    Parameters
    ----------
    width : int
        M, the width of the backbone.
    clusters : int
        K; 64 in the paper.
    channels : int, optional
        Width that the patches are linearly reduced to first, so that the K * channels descriptor can match
        another's; ``None`` (the paper's) is off.
    """

    def __init__(self, width: int, *, clusters: int = 64, channels: int | None = None):
        super().__init__()
        _check_positive(width=width, clusters=clusters)
        self.project, inner = _projection(width, channels)
        self.assign = nn.Linear(inner, clusters)
        self.centres = nn.Parameter(F.normalize(torch.randn(clusters, inner), dim=-1))
        self.out_dim = clusters * inner

    @torch.no_grad()
    def start_from(self, centres: Tensor, patches: Tensor, *, ratio: float = 100.0) -> float:
        """Tie the soft assignment to given centres, as sharp as the paper's.

        Parameters
        ----------
        centres : Tensor (clusters, channels or M)
            For instance k-means centres of normalised patches.
        patches : Tensor (n, M), n >= 1
            Patches of training images, on which alpha is chosen.
        ratio : float
            Wished ratio of the largest to the second largest assignment weight, in the geometric mean over the
            patches: 100 in the paper's supplement.

        Returns
        -------
        float
            alpha = log(ratio) / mean(second smallest - smallest squared distance).
        """
        if tuple(centres.shape) != tuple(self.centres.shape):
            raise ValueError(
                f"centres must have shape {tuple(self.centres.shape)}, got {tuple(centres.shape)}: "
                "one row a cluster, as wide as the (reduced) patches"
            )
        if len(self.centres) < 2 or not ratio > 1:
            raise ValueError(
                f"clusters must be at least 2 and ratio above 1, got {len(self.centres)} and {ratio}"
            )
        inner = F.normalize(self.project(patches.reshape(-1, patches.shape[-1])), dim=-1)
        centres = centres.to(inner)
        nearest = torch.cdist(inner, centres).square().topk(2, dim=1, largest=False).values
        alpha = math.log(ratio) / max(float((nearest[:, 1] - nearest[:, 0]).mean()), 1e-12)
        self.centres.copy_(centres)
        self.assign.weight.copy_(2 * alpha * centres)
        self.assign.bias.copy_(-alpha * centres.square().sum(dim=1))
        return alpha

    @torch.no_grad()
    def start_from_patches(self, patches: Tensor, *, seed: int = 0, ratio: float = 100.0) -> float:
        """Find the centres by k-means (scikit-learn) on patches (n, M) of training images, then `start_from`."""
        from sklearn.cluster import KMeans

        flat = patches.reshape(-1, patches.shape[-1])
        if len(flat) < len(self.centres):
            raise ValueError(
                f"patches must be at least as many as the {len(self.centres)} clusters, got {len(flat)}"
            )
        inner = F.normalize(self.project(flat.to(self.centres)), dim=-1).cpu().numpy()
        fitted = KMeans(len(self.centres), n_init=1, random_state=seed).fit(inner)
        return self.start_from(torch.from_numpy(fitted.cluster_centers_), flat.to(self.centres), ratio=ratio)

    def forward(self, cls: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Give (B, K * channels) unit descriptors from patches (B, N, M); the class token is not read."""
        _check_tokens(cls, patches, grid)
        return F.normalize(F.normalize(self._residuals(patches)[0], dim=-1).flatten(1), dim=-1)

    def _residuals(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """V (B, K, channels), the normalised patches (B, N, channels) and their assignment (B, N, K)."""
        inner = F.normalize(self.project(patches), dim=-1)
        soft = self.assign(inner).softmax(dim=-1)
        # sum_i a_ik (x_i - c_k), without the (B, N, K, channels) array of all differences
        return soft.transpose(1, 2) @ inner - soft.sum(dim=1).unsqueeze(-1) * self.centres, inner, soft

    def patch_contributions(
        self, cls: Tensor, patches: Tensor, grid: tuple[int, int], other: Tensor
    ) -> Tensor:
        """What each patch adds to ``descriptor . other``, exactly: (B, N), summing to it.

        The descriptor is a sum over patches once the lengths of its columns are held at their values. `other` is
        (B, out_dim) or (out_dim,).
        """
        _check_tokens(cls, patches, grid)
        vlad, inner, soft = self._residuals(patches)
        lengths = vlad.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        total = F.normalize(vlad, dim=-1).flatten(1).norm(dim=-1)
        back = other.expand(len(patches), -1).unflatten(1, self.centres.shape) / lengths  # (B, K, channels)
        along = inner @ back.transpose(1, 2) - (back * self.centres).sum(dim=-1).unsqueeze(1)
        return (soft * along).sum(dim=-1) / total.unsqueeze(-1).clamp(min=1e-12)


class SALAD(nn.Module):
    """Patches assigned to clusters, or to a dustbin, by optimal transport.

    Izquierdo and Civera, "Optimal Transport Aggregation for Visual Place Recognition" (CVPR 2024). Scores
    S = MLP(patches) (N, m) get one more column filled with a learned z, the dustbin; Sinkhorn's iterations turn
    them into an assignment R whose rows each sum to 1, whose clusters each take a mass of 1 and whose dustbin takes
    N - m. Without the dustbin, ``V_jk = sum_i R_ik f_ij`` with f = MLP(patches) (N, l); each cluster is brought to
    unit length, a token MLP(cls) is put in front, and the whole is brought to unit length.

    Parameters
    ----------
    width : int
        M, the width of the backbone.
    clusters, channels, token_dim : int
        m, l and the width of the token; 64, 128 and 256 in the paper, together 8448 dimensions. `token_dim` 0
        leaves the token out.
    hidden : int
        Width inside the three MLPs; 512 in the paper.
    dropout : float
        Inside the score and feature MLPs; 0.3 in the authors' recipe.
    iterations : int
        Sinkhorn iterations; 3 in the authors' recipe.
    """

    def __init__(
        self,
        width: int,
        *,
        clusters: int = 64,
        channels: int = 128,
        token_dim: int = 256,
        hidden: int = 512,
        dropout: float = 0.3,
        iterations: int = 3,
    ):
        super().__init__()
        _check_positive(
            width=width, clusters=clusters, channels=channels, hidden=hidden, iterations=iterations
        )
        if token_dim < 0:
            raise ValueError(f"token_dim must be at least 0, got {token_dim}")
        self.iterations = iterations
        self.token = _mlp(width, hidden, token_dim) if token_dim else None
        self.features = _mlp(width, hidden, channels, dropout)
        self.scores = _mlp(width, hidden, clusters, dropout)
        self.dustbin = nn.Parameter(torch.tensor(1.0))
        self.out_dim = token_dim + clusters * channels

    def assignment(self, patches: Tensor) -> Tensor:
        """Give R (B, N, m), the mass that each cluster takes of each patch; a row lacks what the dustbin took."""
        scores = self.scores(patches).float()  # the logarithms below need the range of float32
        batch, n, clusters = scores.shape
        if n <= clusters:
            raise ValueError(
                f"SALAD needs more patches than clusters, got {n} patches for {clusters} clusters: "
                "use larger images or a smaller `clusters`"
            )
        scores = torch.cat([scores, self.dustbin.float().expand(batch, n, 1)], dim=-1)
        columns = scores.new_ones(clusters + 1)
        columns[-1] = n - clusters
        plan = log_sinkhorn(scores, scores.new_zeros(n), columns.log(), self.iterations)
        return plan[..., :-1].exp()

    def forward(self, cls: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Give (B, token_dim + m * l) unit descriptors from cls (B, M) and patches (B, N, M)."""
        _check_tokens(cls, patches, grid)
        features = self.features(patches)
        gathered = self.assignment(patches).transpose(1, 2).to(features) @ features  # (B, m, l)
        parts = [F.normalize(gathered, dim=-1).flatten(1)]
        if self.token is not None:
            parts.insert(0, F.normalize(self.token(cls), dim=-1))
        return F.normalize(torch.cat(parts, dim=-1), dim=-1)

    def patch_contributions(
        self, cls: Tensor, patches: Tensor, grid: tuple[int, int], other: Tensor
    ) -> Tensor:
        """What each patch adds to ``descriptor . other``, exactly: (B, N), summing to it up to the token's part.

        The assignment and the lengths of the columns are held at their values. `other` is (B, out_dim) or
        (out_dim,).
        """
        _check_tokens(cls, patches, grid)
        features, assigned = self.features(patches), self.assignment(patches)
        gathered = assigned.transpose(1, 2).to(features) @ features
        lengths = gathered.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        token = 0.0 if self.token is None else F.normalize(self.token(cls), dim=-1).square().sum(-1)
        total = ((gathered / lengths).square().sum((1, 2)) + token).sqrt()
        start = self.out_dim - gathered.shape[1] * gathered.shape[2]
        back = other.expand(len(patches), -1)[:, start:].unflatten(1, gathered.shape[1:]) / lengths
        return torch.einsum("bnk,bnl,bkl->bn", assigned.to(features), features, back) / total.unsqueeze(-1)


def log_sinkhorn(scores: Tensor, log_rows: Tensor, log_columns: Tensor, iterations: int) -> Tensor:
    """Scale exp(scores) to given row and column sums, in the logarithm.

    Cuturi, "Sinkhorn Distances" (NeurIPS 2013): alternately, every column is scaled to its sum and every row to its
    own. Rows come last, so they are exact after any number of iterations and the columns in the limit.

    Parameters
    ----------
    scores : Tensor (B, n, m)
    log_rows, log_columns : Tensor (n,), (m,)
        Logarithms of the wished sums; both must add up to the same mass.
    iterations : int, >= 1

    Returns
    -------
    Tensor (B, n, m)
        Logarithm of the scaled matrix.
    """
    rows, columns = torch.zeros_like(scores[..., :1]), torch.zeros_like(scores[:, :1])
    for _ in range(iterations):
        columns = log_columns - torch.logsumexp(scores + rows, dim=1, keepdim=True)
        rows = log_rows.unsqueeze(-1) - torch.logsumexp(scores + columns, dim=2, keepdim=True)
    return scores + rows + columns


class MixVPR(nn.Module):
    """Multi-layer perceptrons that mix each channel's whole map, and two projections.

    Ali-bey, Chaib-draa and Giguere, "MixVPR: Feature Mixing for Visual Place Recognition" (WACV 2023). Each channel's
    map is one row of N values; a Feature-Mixer does ``X <- W2 relu(W1 LayerNorm(X)) + X`` along the positions (their
    equation 2), L times; then M channels are projected to d (equation 3) and N positions to r (equation 4). Its
    weights belong to the positions, so it reads one grid only.

    Parameters
    ----------
    width : int
        M, the width of the backbone.
    grid : (int, int)
        Height and width of the patch grid, for instance (16, 16) for 224 px and patches of 14 px.
    depth : int
        L, number of Feature-Mixers; 4 in the paper.
    mlp_ratio : float
        Width inside a Feature-Mixer as a multiple of N; 1 in the paper.
    channels, rows : int
        d and r; 1024 and 4 in the paper, together 4096 dimensions.
    """

    def __init__(
        self,
        width: int,
        *,
        grid: tuple[int, int],
        depth: int = 4,
        mlp_ratio: float = 1.0,
        channels: int = 1024,
        rows: int = 4,
    ):
        super().__init__()
        self.grid = tuple(int(side) for side in grid)
        if len(self.grid) != 2:
            raise ValueError(f"grid must be a height and a width in patches, got {grid}")
        _check_positive(
            width=width, height=self.grid[0], breadth=self.grid[1], depth=depth, channels=channels, rows=rows
        )
        n = self.grid[0] * self.grid[1]
        inner = int(n * mlp_ratio)
        _check_positive(mlp_ratio=inner)
        self.mixers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(n), nn.Linear(n, inner), nn.ReLU(), nn.Linear(inner, n))
            for _ in range(depth)
        )
        self.channel_projection = nn.Linear(width, channels)
        self.row_projection = nn.Linear(n, rows)
        self.out_dim = channels * rows

    def forward(self, cls: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Give (B, d * r) unit descriptors from patches (B, N, M) on the grid of the constructor."""
        _check_tokens(cls, patches, grid)
        if tuple(grid) != self.grid:
            raise ValueError(
                f"this MixVPR was built for a grid of {self.grid[0]} x {self.grid[1]} patches and got "
                f"{grid[0]} x {grid[1]}: its weights belong to the positions, so describe images of the size "
                "that it was trained with"
            )
        maps = patches.transpose(1, 2)  # (B, M, N)
        for mixer in self.mixers:
            maps = maps + mixer(maps)
        maps = self.channel_projection(maps.transpose(1, 2)).transpose(1, 2)  # (B, d, N)
        return F.normalize(self.row_projection(maps).flatten(1), dim=-1)


class BoQ(nn.Module):
    """A bag of learned queries, asked of the patches in several layers.

    Ali-bey, Chaib-draa and Giguere, "BoQ: A Place is Worth a Bag of Learnable Queries" (CVPR 2024). A 3x3
    convolution reduces the channels; layer l encodes the patches once more (a transformer encoder layer), lets its
    own queries attend to each other, and then to the patches. The outputs of all layers are projected along the
    query axis to r rows.

    Parameters
    ----------
    width : int
        M, the width of the backbone.
    channels, queries, layers, rows : int
        384, 64, 2 and 32 in the authors' DINOv2 model: 384 * 32 = 12288 dimensions.
    heads : int, optional
        Attention heads; ``None`` gives one a 64 channels, as the authors do.
    kernel : int
        Side of the first convolution, odd; 3 in the paper. With 1, the order of the patches has no effect.
    dropout : float
        Inside the attention and encoder layers; 0 in the authors' recipe.
    """

    def __init__(
        self,
        width: int,
        *,
        channels: int = 384,
        queries: int = 64,
        layers: int = 2,
        rows: int = 32,
        heads: int | None = None,
        kernel: int = 3,
        dropout: float = 0.0,
    ):
        super().__init__()
        heads = max(channels // 64, 1) if heads is None else heads
        _check_positive(
            width=width, channels=channels, queries=queries, layers=layers, rows=rows, heads=heads
        )
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and at least 1, got {kernel}")
        if channels % heads:
            raise ValueError(f"channels must be a multiple of heads, got {channels} and {heads}")
        self.reduce = nn.Conv2d(width, channels, kernel, padding=kernel // 2)
        self.norm = nn.LayerNorm(channels)
        self.layers = nn.ModuleList(_QueryLayer(channels, queries, heads, dropout) for _ in range(layers))
        self.row_projection = nn.Linear(layers * queries, rows)
        self.out_dim = channels * rows

    def forward(self, cls: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Give (B, channels * rows) unit descriptors from patches (B, N, M); the class token is not read."""
        _check_tokens(cls, patches, grid)
        maps = self.reduce(patches.transpose(1, 2).unflatten(2, tuple(grid)))
        encoded = self.norm(maps.flatten(2).transpose(1, 2))  # (B, N, channels)
        answers = []
        for layer in self.layers:
            encoded, answer = layer(encoded)
            answers.append(answer)
        rows = self.row_projection(torch.cat(answers, dim=1).transpose(1, 2))  # (B, channels, rows)
        return F.normalize(rows.flatten(1), dim=-1)


class _QueryLayer(nn.Module):
    """One layer of `BoQ`: patches encoded again, and what its queries find in them."""

    def __init__(self, channels: int, queries: int, heads: int, dropout: float):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(channels, heads, 4 * channels, dropout, batch_first=True)
        self.queries = nn.Parameter(torch.randn(1, queries, channels))
        self.among_queries = nn.MultiheadAttention(channels, heads, dropout, batch_first=True)
        self.query_norm = nn.LayerNorm(channels)
        self.to_patches = nn.MultiheadAttention(channels, heads, dropout, batch_first=True)
        self.answer_norm = nn.LayerNorm(channels)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.encoder(patches)
        queries = self.queries.expand(len(patches), -1, -1)
        queries = self.query_norm(
            queries + self.among_queries(queries, queries, queries, need_weights=False)[0]
        )
        answers = self.answer_norm(self.to_patches(queries, patches, patches, need_weights=False)[0])
        return patches, answers


_CLASSES: dict[str, Callable[..., nn.Module]] = {
    "cls": CLS,
    "mean": Mean,
    "gem": GeM,
    "netvlad": NetVLAD,
    "salad": SALAD,
    "mixvpr": MixVPR,
    "boq": BoQ,
}


def aggregator_names() -> tuple[str, ...]:
    """Names that `build_aggregator` knows; "cfp" is Soft Probing with its weighting off (EMVP's)."""
    return (*_CLASSES, "softp", "cfp")


def build_aggregator(name: str, width: int, **options) -> nn.Module:
    """Make an aggregator by name.

    Parameters
    ----------
    name : str
        One of `aggregator_names`.
    width : int
        M, the width of the backbone.
    **options
        Passed to the class.

    Raises
    ------
    ValueError
        For a name or an option that does not exist, naming those that do, and for an option that is missing.
    """
    fixed = {}
    if name in _CLASSES:
        make = _CLASSES[name]
    elif name in ("softp", "cfp"):
        from sagelib.softp import SoftProbing as make  # here, so that the comparators stand without it

        fixed = {"alpha": None} if name == "cfp" else {}
    else:
        raise ValueError(f"there is no aggregator {name!r}; there are {', '.join(aggregator_names())}")
    known = [
        parameter
        for parameter in inspect.signature(make).parameters.values()
        if parameter.name not in ("width", *fixed)
    ]
    unknown = [option for option in options if option not in [parameter.name for parameter in known]]
    if unknown:
        raise ValueError(
            f"the aggregator {name!r} has no option {', '.join(map(repr, unknown))}; "
            f"it has {', '.join(parameter.name for parameter in known)}"
        )
    missing = [p.name for p in known if p.default is inspect.Parameter.empty and p.name not in options]
    if missing:
        raise ValueError(f"the aggregator {name!r} needs the option {', '.join(map(repr, missing))}")
    return make(width, **options, **fixed)


def options_for_dim(name: str, dim: int, **options) -> dict:
    """Complete the options of an aggregator so that its descriptor has `dim` dimensions.

    Projections are sized for "cls", "mean" and "gem"; channels a cluster for "netvlad", "salad", "softp" and "cfp";
    channels a row for "mixvpr"; rows for "boq". Everything else stays as given, or at its default.

    Parameters
    ----------
    name : str
        One of `aggregator_names`.
    dim : int
        Wished width of the descriptor.
    **options
        Options that are settled already, for instance ``clusters=32``.

    Returns
    -------
    dict
        `options` and the one that was found, for `build_aggregator`.

    Raises
    ------
    ValueError
        Where no whole number gives `dim`, with the arithmetic.

    Examples
    --------
    >>> options_for_dim("salad", 8448)
    {'channels': 128}
    >>> options_for_dim("boq", 8448)
    {'rows': 22}
    """
    _check_positive(dim=dim)
    sized = {
        "cls": ("dim", 0, 1),
        "mean": ("dim", 0, 1),
        "gem": ("dim", 0, 1),
        "netvlad": ("channels", 0, options.get("clusters", 64)),
        "salad": ("channels", options.get("token_dim", 256), options.get("clusters", 64)),
        "mixvpr": ("channels", 0, options.get("rows", 4)),
        "boq": ("rows", 0, options.get("channels", 384)),
        "softp": ("channels", options.get("token_dim", 256), options.get("probes", 64)),
        "cfp": ("channels", options.get("token_dim", 256), options.get("probes", 64)),
    }
    if name not in sized:
        raise ValueError(f"there is no aggregator {name!r}; there are {', '.join(aggregator_names())}")
    option, offset, factor = sized[name]
    if option in options:
        raise ValueError(f"the option {option!r} is what is sought for {name!r}, and was given as well")
    found, rest = divmod(dim - offset, factor)
    if rest or found < 1:
        raise ValueError(
            f"dim {dim} cannot be reached by {name!r}: it must be {offset} + {factor} * {option}, "
            f"for instance {offset + factor * max(round((dim - offset) / factor), 1)}"
        )
    return {**options, option: found}


def _projection(width: int, dim: int | None) -> tuple[nn.Module, int]:
    _check_positive(width=width)
    if dim is None:
        return nn.Identity(), width
    _check_positive(dim=dim)
    return nn.Linear(width, dim), dim


def _back_through(project: nn.Module, other: Tensor) -> Tensor:
    """The vector whose product with a projection's input is the product of its output (less the bias) with other."""
    return other @ project.weight if isinstance(project, nn.Linear) else other


def _cell_weights(grid: tuple[int, int], cells: int) -> Tensor:
    """(cells^2, N): the share of each patch in the mean of each cell."""
    unit = torch.eye(grid[0] * grid[1]).unflatten(1, tuple(grid))  # (N, h, w): one patch alight in each
    return F.adaptive_avg_pool2d(unit, cells).flatten(1).T


def _mlp(width: int, hidden: int, out: int, dropout: float = 0.0) -> nn.Sequential:
    middle = [nn.Dropout(dropout)] if dropout else []
    return nn.Sequential(nn.Linear(width, hidden), *middle, nn.ReLU(), nn.Linear(hidden, out))


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_tokens(cls: Tensor, patches: Tensor, grid: tuple[int, int]) -> None:
    if patches.ndim != 3 or cls.shape != (patches.shape[0], patches.shape[2]):
        raise ValueError(
            "cls must have shape (B, M) and patches (B, N, M), "
            f"got {tuple(cls.shape)} and {tuple(patches.shape)}"
        )
    if grid[0] * grid[1] != patches.shape[1]:
        raise ValueError(
            f"grid must hold the {patches.shape[1]} patches, got {grid[0]} x {grid[1]} = {grid[0] * grid[1]}"
        )
