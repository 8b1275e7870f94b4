"""The attention module on a GPU: half types, the compiler."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dn_detr.layers import MSDeformAttn

SHAPES = torch.tensor([(20, 30), (10, 15), (5, 8)])


def _attention(device: torch.device) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    module = MSDeformAttn(64, 4, len(SHAPES), 4)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    cells = int(SHAPES.prod(1).sum())
    inputs = {
        "query": torch.randn(2, 50, 64),
        "reference_points": torch.rand(2, 50, len(SHAPES), 4),
        "memory": torch.randn(2, cells, 64),
    }
    return module.to(device), {name: x.to(device) for name, x in inputs.items()}


def _attend(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    starts = SHAPES.prod(1).cumsum(0) - SHAPES.prod(1)
    return module(*inputs.values(), SHAPES, starts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_computes_in_the_half_type(device, dtype):
    module, inputs = _attention(device)
    reference = _attend(module, inputs)
    with torch.autocast(device.type, dtype=dtype):
        out = _attend(module, inputs)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    error = (out.float() - reference).abs().max() / reference.abs().max()
    assert error < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_compiled_module_gives_the_numbers_of_eager_mode(device):
    module, inputs = _attention(device)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True)
    outputs = [_attend(m, inputs) for m in (module, compiled)]
    for out in outputs:
        out.square().sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    for ours, reference in zip(compiled.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-3, atol=1e-3)
