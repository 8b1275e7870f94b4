"""Multi-layer perceptrons."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from .linear import Linear

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": partial(nn.ReLU, inplace=True),  # of a linear layer, which does not need its output
    "prelu": nn.PReLU,
    "gelu": nn.GELU,
}


class MLP(nn.Module):
    """`num_layers` linear layers with ReLU between them.

    Args:
        in_dim: channels of the input.
        hidden_dim: channels between the layers.
        out_dim: channels of the output.
        num_layers: number of linear layers, at least 1.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int) -> None:
        super().__init__()
        dims = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_dim) -> (..., out_dim)."""
        for layer in self.layers[:-1]:
            x = F.relu_(layer(x))
        return self.layers[-1](x)


class FeedForward(nn.Module):
    """The residual feed-forward half of a post-norm transformer layer.

    Args:
        embed_dim: channels in and out.
        feedforward_dim: channels between the two linear layers.
        dropout: probability after each of them.
        activation: `relu`, `prelu` (one learned slope) or `gelu`.

    Raises:
        ValueError: unknown activation.
    """

    def __init__(
        self,
        embed_dim: int,
        feedforward_dim: int = 2048,
        dropout: float = 0.0,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation {activation!r}: choose from {sorted(_ACTIVATIONS)}")
        self.linear1 = Linear(embed_dim, feedforward_dim)
        self.activation = _ACTIVATIONS[activation]()
        self.linear2 = Linear(feedforward_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., embed_dim) -> (..., embed_dim)."""
        hidden = self.dropout(self.activation(self.linear1(x)))
        return self.norm(x + self.dropout(self.linear2(hidden)))
