"""The cross-image encoder: descriptors that look at each other, or at fixed anchors.

A descriptor that has passed through it depends on the images in its *context*. The context is an argument
here, never a consequence of how a loader happened to cut its batches.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class InteractHead(nn.Module):
    """A post-norm Transformer encoder across images, separately for each segment of their descriptors.

    Each descriptor is cut into segments; the s-th segments of all images in the context form a sequence
    without position code or mask. The output is not brought back to unit length (its length is about
    ``sqrt(width)``), as in the released model.

    Parameters
    ----------
    width, segment_width : int
        Of the descriptors, and of a segment, which is the encoder's width (768: 8,448 = 11 x 768).
    heads, layers : int
        Attention heads, a divisor of ``segment_width``, and encoder layers.
    ffn, dropout : int, float
        Hidden width of the feed-forward part (GELU), and the dropout everywhere.
    learned_anchors : int
        Not in the paper: so many anchors, (m, width), are parameters that train with the head.
    stored_anchors : int
        Not in the paper: room for so many fixed anchors, set by :meth:`set_anchors`, saved with the model.

    Widths that do not divide are a ValueError with the arithmetic.
    """

    def __init__(
        self,
        width: int,
        *,
        segment_width: int = 768,
        heads: int = 16,
        layers: int = 2,
        ffn: int = 1024,
        dropout: float = 0.1,
        learned_anchors: int = 0,
        stored_anchors: int = 0,
    ):
        super().__init__()
        if segment_width < 1 or width % segment_width:
            fits = [d for d in range(16, width + 1) if width % d == 0 and d % heads == 0]
            near = ", ".join(map(str, sorted(sorted(fits, key=lambda d: abs(d - segment_width))[:3])))
            words = f"descriptors of width {width} cannot be cut into segments of {segment_width}"
            advice = (f"; segment_width could be {near}" if near else "") + "; or set interact: false"
            raise ValueError(f"{words}: {_division(width, segment_width)}{advice}")
        if heads < 1 or segment_width % heads:
            words = f"a segment of {segment_width} cannot be shared by {heads} heads"
            raise ValueError(f"{words}: {_division(segment_width, heads)}")
        if learned_anchors and stored_anchors:
            raise ValueError("anchors are learned or stored: give one of learned_anchors, stored_anchors")
        self.width, self.segment_width, self.heads = width, segment_width, heads
        self.segments = width // segment_width
        # Only the parameters and their names are torch's; the arithmetic is written out below: a query
        # may look at other rows than those it stands in.
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(segment_width, heads, ffn, dropout, activation="gelu")
            for _ in range(layers)
        )
        learned = F.normalize(torch.randn(learned_anchors, width), dim=-1)
        self.learned = nn.Parameter(learned) if learned_anchors else None
        self.register_buffer("stored", torch.zeros(stored_anchors, width) if stored_anchors else None)

    @property
    def anchors(self) -> Tensor | None:
        """The anchors (m, width) that belong to the head, learned or stored; ``None`` where it has none."""
        return self.learned if self.learned is not None else self.stored

    @torch.no_grad()
    def set_anchors(self, descriptors: Tensor) -> None:
        """Store reference descriptors (m, width), as they are before the head, as the head's anchors."""
        if self.learned is not None:
            raise ValueError("this head learns its anchors; build it with stored_anchors to set them")
        self._cut(descriptors, "anchors")  # of this shape
        like = next(self.parameters())
        self.stored = descriptors.detach().clone().to(like.device, like.dtype)

    def forward(self, descriptors: Tensor, anchors: Tensor | None = None) -> Tensor:
        """Descriptors (B, width) in their context, (B, width).

        Parameters
        ----------
        descriptors : Tensor (B, width)
            As they are before the head.
        anchors : Tensor (m, width), optional
            ``None``: the context is the batch, each image attends over all B. Otherwise each image attends
            over itself and the m anchors only, so that its output depends on no other image; m = 0 is the
            context of an image alone.
        """
        x = self._cut(descriptors, "descriptors")
        states = [None] * len(self.layers) if anchors is None else self._keys_and_values(anchors)
        for layer, state in zip(self.layers, states, strict=True):
            qkv = self._project(layer, x)
            mixed = self._attend(layer, *qkv) if state is None else self._to_self_and(*state, layer, *qkv)
            x = self._finish(layer, x, mixed)
        return x.transpose(0, 1).flatten(1)

    def _keys_and_values(self, anchors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each layer the anchors' keys and values, (segments, heads, m, segment_width / heads).

        The anchors, (m, width), attend among themselves only: images all read the same from them.
        """
        x, states = self._cut(anchors, "anchors"), []
        for layer in self.layers:
            q, k, v = self._project(layer, x)
            states.append((k, v))
            if len(states) < len(self.layers) and len(anchors):
                x = self._finish(layer, x, self._attend(layer, q, k, v))
        return states

    def _cut(self, descriptors: Tensor, what: str) -> Tensor:
        """(n, width) to (segments, n, segment_width)."""
        if descriptors.ndim != 2 or descriptors.shape[1] != self.width:
            raise ValueError(f"{what} must have shape (n, {self.width}); got {tuple(descriptors.shape)}")
        return descriptors.unflatten(1, (self.segments, self.segment_width)).transpose(0, 1)

    def _project(self, layer: nn.TransformerEncoderLayer, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values (segments, heads, n, segment_width / heads) of x (segments, n, width)."""
        attention = layer.self_attn
        qkv = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
        return tuple(t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))

    def _attend(self, layer, q, k, v) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=layer.self_attn.dropout * self.training)

    def _to_self_and(self, anchor_k, anchor_v, layer, q, k, v) -> Tensor:
        own = (q * k).sum(-1, keepdim=True)
        scores = torch.cat([own, q @ anchor_k.transpose(-2, -1)], dim=-1) / math.sqrt(q.shape[-1])
        weights = F.dropout(scores.softmax(dim=-1), layer.self_attn.dropout * self.training)
        return weights[..., :1] * v + weights[..., 1:].to(v.dtype) @ anchor_v

    def _finish(self, layer: nn.TransformerEncoderLayer, x: Tensor, mixed: Tensor) -> Tensor:
        """All of a post-norm layer that follows the attention."""
        mixed = layer.self_attn.out_proj(mixed.transpose(1, 2).flatten(-2))
        x = layer.norm1(x + layer.dropout1(mixed))
        hidden = layer.linear2(layer.dropout(F.gelu(layer.linear1(x))))
        return layer.norm2(x + layer.dropout2(hidden))


def _division(whole: int, part: int) -> str:
    return f"{whole} = {whole // max(part, 1)} x {part} + {whole % max(part, 1)}"
