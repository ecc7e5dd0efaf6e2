"""Other people's aggregators, on equal terms: from the tokens of a backbone to one descriptor.

Each is written from its paper's equations and reads cls (B, M), patches (B, N, M), row by row, and the grid
(h, w); M is ``width``; :func:`build_aggregator` makes one by name. With weights and lengths held, what each
patch adds to ``descriptor . other`` is ``patch_contributions(cls, patches, grid, other)`` (B, N), for others
(B, out_dim) or (out_dim,): all of it but for the class token and biases.
"""

import inspect
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sagelib.runs import check
from sagelib.softp import SoftProbing, branch


class CLS(nn.Module):
    """The class token itself, at unit length."""

    def __init__(self, width: int):
        super().__init__()
        self.out_dim = width

    def forward(self, cls: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return F.normalize(cls, dim=-1)

    def patch_contributions(self, cls, patches, grid, other) -> Tensor:
        """Zeros: no patch is read."""
        return patches.new_zeros(patches.shape[:2])


class Mean(CLS):
    """In its place the mean of the patches, at unit length."""

    def forward(self, cls: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return F.normalize(patches.mean(dim=1), dim=-1)

    def patch_contributions(self, cls, patches, grid, other) -> Tensor:
        """See the module."""
        length = patches.mean(dim=1).norm(dim=-1, keepdim=True).clamp(min=1e-12)
        back = other.expand(len(patches), -1) / length
        return torch.einsum("bnm,bm->bn", patches, back) / patches.shape[1]


class GeM(nn.Module):
    """Generalised mean pooling: each channel's power mean over the patches.

    Equations 1 and 3 of Radenovic, Tolias and Chum, "Fine-tuning CNN Image Retrieval with No Human
    Annotation" (TPAMI 2019): ``g_c = (1/N sum_i max(x_ic, eps)^p)^(1/p)``, p learned, one for all channels.

    Parameters
    ----------
    p : float
        Exponent at the start, above 0; 3 in the paper.
    grid : int
        Pool over, and concatenate, ``grid`` x ``grid`` cells, which may overlap by a patch; 1 in the paper.
    dim : int, optional
        Width of the linear layer behind the pooling (the paper's learned whitening); ``None`` is off.
    """

    eps = 1e-6

    def __init__(self, width: int, *, p: float = 3.0, grid: int = 1, dim: int | None = None):
        super().__init__()
        self.p, self.cells = nn.Parameter(torch.tensor(float(check("p", p, above=0)))), grid
        self.project, self.out_dim = _projection(width * grid * grid, dim)

    def forward(self, cls: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return F.normalize(self.project(self._pool(patches, grid)[0].flatten(1)), dim=-1)

    def _pool(self, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pooled cells (B, cells, M), means before the root, powers, and each patch's share of a cell."""
        powers = patches.clamp(min=self.eps) ** self.p
        lit = torch.eye(grid[0] * grid[1]).unflatten(1, tuple(grid))  # (N, h, w): one patch alight in each
        belongs = F.adaptive_avg_pool2d(lit, self.cells).flatten(1).T.to(powers)
        means = belongs @ powers
        # A small mean may vanish in float32, where the root has no finite gradient.
        return means.clamp(min=self.eps**3) ** (1.0 / self.p), means, powers, belongs

    def patch_contributions(self, cls, patches, grid, other) -> Tensor:
        """See the module; a channel's pooled value is shared out in proportion to the powers ``x_ic^p``."""
        root, means, powers, belongs = self._pool(patches, grid)
        length = self.project(root.flatten(1)).norm(dim=-1, keepdim=True).clamp(min=1e-12)
        back = other.expand(len(patches), -1)
        back = (back @ self.project.weight if isinstance(self.project, nn.Linear) else back) / length
        rate = root / means.clamp(min=1e-38)
        return torch.einsum("bnm,bcm,cn->bn", powers, back.unflatten(1, (len(belongs), -1)) * rate, belongs)


class NetVLAD(nn.Module):
    """Residuals to K learned centres, each patch softly assigned to them.

    Arandjelovic et al., "NetVLAD: CNN architecture for weakly supervised place recognition" (CVPR 2016),
    equation 4: ``V(:, k) = sum_i softmax_k(w_k . x_i + b_k) (x_i - c_k)`` on L2-normalised patches; columns,
    then the whole, at unit length. :meth:`initialise_from` ties w, b and c at the start, as in the paper.

    Parameters
    ----------
    clusters, channels : int
        K; width that the patches are linearly reduced to first, unless ``None`` (the paper's).
    """

    def __init__(self, width: int, *, clusters: int = 64, channels: int | None = None):
        super().__init__()
        self.project, inner = _projection(width, channels)
        self.assign = nn.Linear(inner, clusters)
        self.centres = nn.Parameter(F.normalize(torch.randn(clusters, inner), dim=-1))
        self.out_dim = clusters * inner

    @torch.no_grad()
    def initialise_from(self, patches: Iterable[Tensor]) -> float:
        """k-means centres of training patches, and ``w_k = 2 alpha c_k``, ``b_k = -alpha ||c_k||^2``.

        Returned is alpha, by which the largest assignment weight is on (geometric) average 100 times the
        second largest, as in the paper's supplement.
        """
        from sklearn.cluster import KMeans

        flat = torch.cat([batch.flatten(0, 1) for batch in patches])
        if not 2 <= len(self.centres) <= len(flat):
            raise ValueError(f"{len(self.centres)} clusters cannot start from {len(flat)} patches")
        inner = F.normalize(self.project(flat.to(self.centres)), dim=-1)
        fitted = KMeans(len(self.centres), n_init=1, random_state=0).fit(inner.cpu().numpy())
        centres = torch.from_numpy(fitted.cluster_centers_).to(inner)
        nearest = torch.cdist(inner, centres).square().topk(2, dim=1, largest=False).values
        alpha = math.log(100) / max(float((nearest[:, 1] - nearest[:, 0]).mean()), 1e-12)
        self.centres.copy_(centres)
        self.assign.weight.copy_(2 * alpha * centres)
        self.assign.bias.copy_(-alpha * centres.square().sum(dim=1))
        return alpha

    def forward(self, cls: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return F.normalize(F.normalize(self._residuals(patches)[0], dim=-1).flatten(1), dim=-1)

    def _residuals(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """V (B, K, channels), the normalised patches (B, N, channels) and their assignment (B, N, K)."""
        inner = F.normalize(self.project(patches), dim=-1)
        soft = self.assign(inner).softmax(dim=-1)
        # sum_i a_ik (x_i - c_k), without the (B, N, K, channels) array of all differences
        return soft.transpose(1, 2) @ inner - soft.sum(dim=1).unsqueeze(-1) * self.centres, inner, soft

    def patch_contributions(self, cls, patches, grid, other) -> Tensor:
        """See the module."""
        vlad, inner, soft = self._residuals(patches)
        lengths = vlad.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        total = F.normalize(vlad, dim=-1).flatten(1).norm(dim=-1)
        back = other.expand(len(patches), -1).unflatten(1, self.centres.shape) / lengths  # (B, K, channels)
        along = inner @ back.transpose(1, 2) - (back * self.centres).sum(dim=-1).unsqueeze(1)
        return (soft * along).sum(dim=-1) / total.unsqueeze(-1).clamp(min=1e-12)


class SALAD(nn.Module):
    """Patches assigned to clusters, or to a dustbin, by optimal transport.

    Izquierdo and Civera, "Optimal Transport Aggregation for Visual Place Recognition" (CVPR 2024). Scores S =
    MLP(patches) (N, m) get a learned column z, the dustbin; Sinkhorn's iterations (3) turn them into an
    assignment R: rows sum to 1, clusters take a mass of 1 each, and the dustbin N - m. As columns are scaled
    first, z cancels. Without the dustbin, ``V_jk = sum_i R_ik f_ij`` with f = MLP(patches) (N, l), each
    cluster at unit length; behind a token MLP(cls), also at unit length, the whole has unit length.

    Parameters
    ----------
    clusters, channels, token_dim, hidden : int
        m, l, the width of the token and that inside the three MLPs; together 8448 dimensions in the paper.
    """

    iterations = 3

    def __init__(
        self, width: int, *, clusters: int = 64, channels: int = 128, token_dim: int = 256, hidden: int = 512
    ):
        super().__init__()
        self.token = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, token_dim))
        self.features = branch(width, hidden, channels, 0.3)
        self.scores = branch(width, hidden, clusters, 0.3)
        self.dustbin = nn.Parameter(torch.tensor(1.0))
        self.out_dim = token_dim + clusters * channels

    def assignment(self, patches: Tensor) -> Tensor:
        """R (B, N, m), the mass that each cluster takes of each patch; a row lacks what the dustbin took."""
        scores = self.scores(patches).float()  # the logarithms below need the range of float32
        batch, n, clusters = scores.shape
        if n <= clusters:
            words = f"got {n} patches for {clusters} clusters: use larger images"
            raise ValueError(f"SALAD needs more patches than clusters, {words}")
        scores = torch.cat([scores, self.dustbin.float().expand(batch, n, 1)], dim=-1)
        columns = scores.new_ones(clusters + 1)
        columns[-1] = n - clusters
        plan = log_sinkhorn(scores, scores.new_zeros(n), columns.log(), self.iterations)
        return plan[..., :-1].exp()

    def forward(self, cls: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        features = self.features(patches)
        gathered = self.assignment(patches).transpose(1, 2).to(features) @ features  # (B, m, l)
        token = F.normalize(self.token(cls), dim=-1)
        return F.normalize(torch.cat([token, F.normalize(gathered, dim=-1).flatten(1)], dim=-1), dim=-1)

    def patch_contributions(self, cls, patches, grid, other) -> Tensor:
        """See the module."""
        features, assigned = self.features(patches), self.assignment(patches)
        gathered = assigned.transpose(1, 2).to(features) @ features
        lengths = gathered.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        token = F.normalize(self.token(cls), dim=-1)
        total = ((gathered / lengths).square().sum((1, 2)) + token.square().sum(-1)).sqrt()
        back = other.expand(len(patches), -1)[:, token.shape[1] :].unflatten(1, gathered.shape[1:]) / lengths
        return torch.einsum("bnk,bnl,bkl->bn", assigned.to(features), features, back) / total.unsqueeze(-1)


def log_sinkhorn(scores: Tensor, log_rows: Tensor, log_columns: Tensor, iterations: int) -> Tensor:
    """The logarithm (B, n, m) of exp(scores) scaled to row and column sums, given as logarithms.

    Cuturi, "Sinkhorn Distances" (NeurIPS 2013): columns and rows in turn; rows, the last, are always exact.
    """
    rows, columns = torch.zeros_like(scores[..., :1]), torch.zeros_like(scores[:, :1])
    for _ in range(iterations):
        columns = log_columns - torch.logsumexp(scores + rows, dim=1, keepdim=True)
        rows = log_rows.unsqueeze(-1) - torch.logsumexp(scores + columns, dim=2, keepdim=True)
    return scores + rows + columns


class MixVPR(nn.Module):
    """Multi-layer perceptrons that mix each channel's whole map, and two projections.

    Ali-bey, Chaib-draa and Giguere, "MixVPR: Feature Mixing for Visual Place Recognition" (WACV 2023). Each
    channel's map is a row of N values; L Feature-Mixers do ``X <- W2 relu(W1 LayerNorm(X)) + X`` along it
    (their equation 2); then M channels are projected to d (3) and N positions to r (4): it reads one grid.

    Parameters
    ----------
    grid : (int, int)
        Height and width of the patch grid, for instance (16, 16) for 224 px and patches of 14 px.
    depth, channels, rows : int
        L, d and r; 4, 1024 and 4 in the paper, together 4096 dimensions.
    """

    def __init__(self, width: int, *, grid, depth: int = 4, channels: int = 1024, rows: int = 4):
        super().__init__()
        if len(grid) != 2:
            raise ValueError(f"grid must be a height and a width in patches, got {grid}")
        self.grid = tuple(check("grid", side, 1, whole=True) for side in grid)
        n = math.prod(self.grid)
        self.mixers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(n), nn.Linear(n, n), nn.ReLU(), nn.Linear(n, n)) for _ in range(depth)
        )
        self.channel_projection = nn.Linear(width, channels)
        self.row_projection = nn.Linear(n, rows)
        self.out_dim = channels * rows

    def forward(self, cls: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        if tuple(grid) != self.grid:
            wanted, got = (f"{rows} x {columns}" for rows, columns in (self.grid, grid))
            words = f"this MixVPR was built for a grid of {wanted} patches and got {got}"
            raise ValueError(f"{words}: give images of the size it was trained with")
        maps = patches.transpose(1, 2)  # (B, M, N)
        for mixer in self.mixers:
            maps = maps + mixer(maps)
        maps = self.channel_projection(maps.transpose(1, 2)).transpose(1, 2)  # (B, d, N)
        return F.normalize(self.row_projection(maps).flatten(1), dim=-1)


class BoQ(nn.Module):
    """A bag of learned queries, asked of the patches in several layers.

    Ali-bey, Chaib-draa and Giguere, "BoQ: A Place is Worth a Bag of Learnable Queries" (CVPR 2024). A 3x3
    convolution reduces the channels; each layer encodes the patches once more (a transformer encoder layer)
    and lets its queries attend to each other, then to the patches. All outputs are projected to r rows.

    Parameters
    ----------
    channels, queries, layers, rows, heads : int
        384, 64, 2 and 32 in the authors' DINOv2 model: 12288 dimensions; a head for 64 channels if ``None``.
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
    ):
        super().__init__()
        heads = heads or max(channels // 64, 1)
        if channels % heads:
            raise ValueError(f"channels must be a multiple of heads, got {channels} and {heads}")
        self.reduce = nn.Conv2d(width, channels, 3, padding=1)
        self.norm = nn.LayerNorm(channels)
        self.layers = nn.ModuleList(_QueryLayer(channels, queries, heads) for _ in range(layers))
        self.row_projection = nn.Linear(layers * queries, rows)
        self.out_dim = channels * rows

    def forward(self, cls: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        maps = self.reduce(patches.transpose(1, 2).unflatten(2, tuple(grid)))
        encoded, answers = self.norm(maps.flatten(2).transpose(1, 2)), []  # (B, N, channels)
        for layer in self.layers:
            encoded, answer = layer(encoded)
            answers.append(answer)
        rows = self.row_projection(torch.cat(answers, dim=1).transpose(1, 2))  # (B, channels, rows)
        return F.normalize(rows.flatten(1), dim=-1)


class _QueryLayer(nn.Module):
    """One layer of `BoQ`: patches encoded again, and what its queries find in them."""

    def __init__(self, channels: int, queries: int, heads: int):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(channels, heads, 4 * channels, 0.0, batch_first=True)
        self.queries = nn.Parameter(torch.randn(1, queries, channels))
        self.among_queries = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.query_norm = nn.LayerNorm(channels)
        self.to_patches = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.answer_norm = nn.LayerNorm(channels)

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.encoder(patches)
        queries = self.queries.expand(len(patches), -1, -1)
        mixed = self.among_queries(queries, queries, queries, need_weights=False)[0]
        queries = self.query_norm(queries + mixed)
        answers = self.answer_norm(self.to_patches(queries, patches, patches, need_weights=False)[0])
        return patches, answers


AGGREGATORS = {kind.__name__.lower(): kind for kind in (CLS, Mean, GeM, NetVLAD, SALAD, MixVPR, BoQ)}
AGGREGATORS |= {"softp": SoftProbing, "cfp": SoftProbing}  # cfp: with its weighting off (EMVP's)


def build_aggregator(name: str, width: int, **options) -> nn.Module:
    """The aggregator of a name in `AGGREGATORS`, for a backbone's width, with options of its class."""
    make = AGGREGATORS[check("aggregator", name, choices=AGGREGATORS)]
    known = {k: p for k, p in inspect.signature(make).parameters.items() if k != "width"}
    for option, value in options.items():
        if option in known and known[option].annotation in (int, int | None):
            check(option, value, 1, whole=True, none=known[option].default is None)
    fixed = {"alpha": None} if name == "cfp" else {}
    try:
        return make(width, **options, **fixed)
    except TypeError as error:
        words = f"no model can be built of these options: {error}; {name} has {', '.join(known)}"
        raise ValueError(words) from error


def _projection(width: int, dim: int | None) -> tuple[nn.Module, int]:
    return (nn.Identity(), width) if dim is None else (nn.Linear(width, dim), dim)
