"""Soft Probing: patches weighted softly, probed, and pooled into one descriptor.

``SoftProbing(alpha=None)`` is EMVP's centroid-free probing; all that is added is :class:`SoftWeighting`.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sagelib.backbone import DynamicPowerNorm
from sagelib.runs import check


class SoftWeighting(nn.Module):
    """Weights each patch by a function of its norm alone.

    ``s_i = ||x_i|| + 1e-6`` and ``beta_i = alpha * sigmoid(predictor(s_i))``, so that a patch is multiplied
    by ``1 + beta_i``, between 1 and 1 + alpha.

    Parameters
    ----------
    alpha, hidden : float, int
        The largest weight that can be added, positive, and the width of the predictor's hidden layer.
    standardise : bool
        Not in the paper: feed the predictor ``(s_i - mean) / std``, of the lengths in training images, which
        :meth:`SoftProbing.initialise_from` stores. Raw lengths are large and vary little (26 on average for
        680 standardised channels): they saturate the sigmoid, and all patches weigh the same.
    """

    def __init__(self, alpha: float = 0.5, *, hidden: int = 128, standardise: bool = False):
        super().__init__()
        check("alpha", alpha, above=0)
        self.alpha, self.standardise = alpha, standardise
        self.predictor = nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        if standardise:
            self.register_buffer("mean", torch.zeros(()))
            self.register_buffer("std", torch.ones(()))

    def forward(self, patches: Tensor) -> Tensor:
        """The weights beta (B, N) of ``patches`` (B, N, M)."""
        strength = patches.norm(dim=-1, keepdim=True) + 1e-6
        if self.standardise:
            strength = (strength - self.mean) / self.std
        return self.alpha * torch.sigmoid(self.predictor(strength)).squeeze(-1)


class SoftProbing(nn.Module):
    """Compress, probe, multiply: the descriptor of an image from its CLS token and its patches.

    For patches ``x_i`` (i = 1..N), weighted by :class:`SoftWeighting`::

        F = reduction(x) - mean(reduction(x))        (N, D)   one scalar per image is subtracted
        P = softmax(probe(x)) over the N positions   (N, K)   constant normalisation: each probe sums to 1
        G = F^T P / N                                (D, K)
        G = DPN(G), each of the K columns to length 1
        t = token(cls) to length 1                   (g,)
        descriptor = [t ; G row by row] to length 1  (g + D K,)

    The released model subtracts a scalar on the probe branch too, where the softmax cancels it, as it does
    that branch's last bias, whose gradient is zero.

    Parameters
    ----------
    width : int
        M, the width of a token.
    channels, probes, token_dim : int
        D, channels after the reduction; K, number of probes (in each cell); g, dimensions from the CLS token.
    alpha : float, optional
        Strength of the soft weighting; ``None`` switches it off.
    dropout, norm_dropout : float
        Inside the two branches (a small data set may need 0 to leave the plateau) and the power norm on G.
    hidden : int
        Hidden width of the branches and of the token's layers.
    cells, standardise : int, bool
        Not in the paper, which forgets where a patch lies: each of ``cells x cells`` parts of the grid has a
        G (softmax, power norm and lengths) of its own. Nor this: see :class:`SoftWeighting`.
    """

    def __init__(
        self,
        width: int,
        *,
        channels: int = 128,
        probes: int = 64,
        token_dim: int = 256,
        alpha: float | None = 0.5,
        dropout: float = 0.3,
        hidden: int = 512,
        norm_dropout: float = 0.1,
        cells: int = 1,
        standardise: bool = False,
    ):
        super().__init__()
        check("dropout", dropout, 0, 0.999)
        for name, n in dict(channels=channels, probes=probes, token_dim=token_dim, cells=cells).items():
            check(name, n, 1, whole=True)
        self.channels, self.probes, self.token_dim, self.cells = channels, probes, token_dim, cells
        self.out_dim = token_dim + channels * probes * cells**2
        self.weighting = None if alpha is None else SoftWeighting(alpha, standardise=standardise)
        self.token = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, token_dim))
        # 1x1 convolutions over a map are linear layers over its positions.
        self.reduction = branch(width, hidden, channels, dropout)
        self.probe = branch(width, hidden, probes, dropout)
        self.post_dpn = DynamicPowerNorm(probes, max(1, probes // 2), dropout=norm_dropout)

    def forward(self, cls: Tensor, patches: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Descriptors (B, g + D K cells^2) of unit length, float32 (float64 stays float64).

        Of ``cls`` (B, M), ``patches`` (B, N, M) and, for more than one cell, their ``grid`` (rows, columns).
        """
        token = F.normalize(_full(self.token(cls)), dim=-1)
        normed = (self.post_dpn(grams) for _, grams, _, _ in self._bilinear(patches, grid))
        pooled = [F.normalize(columns, dim=1).flatten(1) for columns in normed]
        return F.normalize(torch.cat([token, *pooled], dim=-1), dim=-1)

    def patch_weights(self, patches: Tensor) -> Tensor:
        """The soft weights beta (B, N) of ``patches`` (B, N, M); zeros where the weighting is off."""
        return patches.new_zeros(patches.shape[:2]) if self.weighting is None else self.weighting(patches)

    def probe_maps(self, patches: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Where each probe looks: (B, K, N), or (B, K, rows, columns) with ``grid``; a cell sums to 1."""
        maps = patches.new_zeros(*patches.shape[:2], self.probes)
        for rows, _, _, part in self._bilinear(patches, grid):
            maps[:, rows] = part.to(maps.dtype)
        maps = maps.transpose(1, 2)
        return maps if grid is None else maps.unflatten(-1, grid)

    def patch_contributions(
        self, cls: Tensor, patches: Tensor, grid: tuple[int, int] | None, other_descriptor: Tensor
    ) -> Tensor:
        """What each patch adds, (B, N), to ``descriptor . other_descriptor``, (B, out_dim) or (out_dim,).

        G is a sum over patches, and the power norm multiplies each entry by a gain, ``DPN(G) = r * G`` with
        ``r = 1 + (|G| + epsilon)^p / |G|``. With these gains and the lengths of the columns held, the product
        is linear in the patches (each of which has seen the whole image)::

            contributions.sum(1) + <token part> == (descriptor * other_descriptor).sum(1)
        """
        parts = [(*part, self.post_dpn(part[1])) for part in self._bilinear(patches, grid)]
        token = F.normalize(_full(self.token(cls)), dim=-1)
        total = token.square().sum(-1)
        share = patches.new_zeros(patches.shape[:2], dtype=token.dtype)
        other = other_descriptor.to(token.dtype).expand(len(patches), -1)[:, self.token_dim :]
        others = other.unflatten(-1, (len(parts), self.channels, self.probes)).unbind(1)
        for (rows, grams, features, maps, normed), wanted in zip(parts, others, strict=True):
            gain = torch.where(grams == 0, torch.ones_like(grams), normed / grams)
            lengths = normed.norm(dim=1, keepdim=True).clamp_min(1e-12)
            total = total + (normed / lengths).square().sum((1, 2))
            weight = wanted * gain / (lengths * maps.shape[1])
            share[:, rows] = torch.einsum("bnd,bdk,bnk->bn", features, weight, maps)
        return share / total.sqrt()[:, None]

    @torch.no_grad()
    def initialise_from(self, patches: Iterable[Tensor]) -> None:
        """Centre and scale the outputs of both branches on given images, before the first step.

        Not in the paper: weight and bias of each branch's last layer change so that over all patches, batches
        (B, N, M) of a few hundred images, a channel has mean 0 and standard deviation 1. Untrained
        descriptors of different images are otherwise nearly parallel.
        """
        was_training = self.training
        self.eval()
        if self.weighting is not None and self.weighting.standardise:
            patches = list(patches)
            lengths = torch.cat([batch.norm(dim=-1).flatten() for batch in patches])
            self.weighting.mean.copy_(lengths.mean())
            self.weighting.std.copy_(lengths.std())
        moments = {branch: [0, 0.0, 0.0] for branch in (self.reduction, self.probe)}
        for batch in patches:
            weighted = self._weighted(batch)
            for branch, sums in moments.items():
                out = branch(weighted).flatten(0, 1).double()
                for i, value in enumerate((len(out), out.sum(0), out.square().sum(0))):
                    sums[i] = sums[i] + value
        self.train(was_training)
        for branch, (n, total, squares) in moments.items():
            if n < 2:
                raise ValueError("initialise_from needs the patches of at least one image; got none")
            mean = total / n
            scale = (squares / n - mean.square()).clamp_min(1e-12).sqrt()
            branch[-1].weight.copy_(branch[-1].weight / scale[:, None])
            branch[-1].bias.copy_((branch[-1].bias - mean) / scale)

    def _weighted(self, patches: Tensor) -> Tensor:
        return patches if self.weighting is None else patches * (1 + self.weighting(patches))[..., None]

    def _bilinear(self, patches: Tensor, grid: tuple[int, int] | None) -> list[tuple]:
        """For each cell, in float32: rows of patches, G (B, D, K), features (B, n, D), maps (B, n, K)."""
        weighted = self._weighted(patches)
        features, scores = _full(self.reduction(weighted)), _full(self.probe(weighted))
        with torch.autocast(patches.device.type, enabled=False):
            features = features - features.mean(dim=(1, 2), keepdim=True)
            parts = []
            for rows in self._cells(grid, patches.device):
                f, maps = features[:, rows], scores[:, rows].softmax(dim=1)
                parts.append((rows, f.transpose(1, 2) @ maps / f.shape[1], f, maps))
            return parts

    def _cells(self, grid: tuple[int, int] | None, device: torch.device) -> list[Tensor | slice]:
        """The indices of the patches in each cell, row by row."""
        if self.cells == 1:
            return [slice(None)]
        if grid is None or min(grid) < self.cells:
            raise ValueError(f"{self.cells} x {self.cells} cells need a grid of as many patches; got {grid}")
        number = torch.arange(grid[0] * grid[1], device=device).unflatten(0, grid)
        bands = number.tensor_split(self.cells, 0)
        return [part.flatten() for band in bands for part in band.tensor_split(self.cells, 1)]


def branch(width: int, hidden: int, out: int, dropout: float) -> nn.Sequential:
    """Two layers with dropout and ReLU between them, as SALAD has them too."""
    return nn.Sequential(nn.Linear(width, hidden), nn.Dropout(dropout), nn.ReLU(), nn.Linear(hidden, out))


def _full(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
