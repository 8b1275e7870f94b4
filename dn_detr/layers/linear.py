"""Linear layers that are fast on CPUs."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MANY_ROWS = 4096  # below, measured, a convolution's preparation costs more than it gains


class Linear(nn.Linear):
    """`nn.Linear` that computes products of many rows as convolutions where they are faster.

    A row is a pixel, and its channels are the last dimension of a channels-last map, so nothing is
    copied. On a Zen 4 processor torch's own product (MKL) reaches 170 GFLOP/s on two threads,
    forward and backward, and oneDNN's convolution 215 and 190.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        if not _as_convolution(input):
            return super().forward(input)
        pixels = input.reshape(1, 1, -1, self.in_features).permute(0, 3, 1, 2)
        out = F.conv2d(pixels, self.weight[:, :, None, None], self.bias)
        return out.permute(0, 2, 3, 1).reshape(*input.shape[:-1], self.out_features)


def _as_convolution(x: Tensor) -> bool:
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    many = x.numel() >= _MANY_ROWS * x.shape[-1] > 0
    return many and x.dtype in (torch.float32, torch.bfloat16) and _convolutions_are_faster()


@cache
def _convolutions_are_faster() -> bool:
    """Measured with AVX-512 only."""
    return torch.backends.mkldnn.is_available() and (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
    )
