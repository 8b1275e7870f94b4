"""Products of many rows, which become convolutions where those are faster."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dn_detr.layers import Linear, linear


@pytest.fixture(autouse=True)
def _on_any_machine(monkeypatch) -> None:
    monkeypatch.setattr(linear, "_convolutions_are_faster", lambda: True)
    torch.manual_seed(0)


def _pair() -> tuple[Linear, nn.Linear]:
    ours, theirs = Linear(12, 20), nn.Linear(12, 20)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def _operations(out: Tensor) -> set[str]:
    """Names of the operations that led to a result."""
    names, nodes = set(), [out.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None:
            names.add(type(node).__name__)
            nodes += [parent for parent, _ in node.next_functions]
    return names


def _input(layout: str) -> Tensor:
    if layout == "rows":
        return torch.randn(2, 2500, 12)
    if layout == "every second row":
        return torch.randn(2, 5000, 12)[:, ::2]
    return torch.randn(2, 12, 50, 50).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("layout", ["rows", "every second row", "channels first"])
def test_many_rows_give_what_torchs_layer_gives(layout):
    ours, theirs = _pair()
    x = _input(layout)
    a, b = (x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
    out, expected = ours(a), theirs(b)
    assert "ConvolutionBackward0" in _operations(out)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(expected)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_many_rows_under_autocast():
    ours, theirs = _pair()
    x = torch.randn(5000, 12)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = ours(x), theirs(x)
    assert out.dtype == torch.bfloat16 and "ConvolutionBackward0" in _operations(out)
    torch.testing.assert_close(out, expected)


def test_a_layer_without_bias():
    layer = Linear(12, 20, bias=False)
    x = torch.randn(5000, 12)
    torch.testing.assert_close(layer(x), x @ layer.weight.T)


@pytest.mark.parametrize("x", [torch.randn(300, 12), torch.randn(5000, 12).double()])
def test_what_convolutions_are_slower_with_stays_a_product(x):
    ours, theirs = _pair()
    out = ours.to(x.dtype)(x)
    assert "ConvolutionBackward0" not in _operations(out)
    assert torch.equal(out, theirs.to(x.dtype)(x))


def test_no_rows():
    assert Linear(12, 20)(torch.zeros(2, 0, 12)).shape == (2, 0, 20)


def test_traced_graphs_hold_a_product():
    exported = torch.export.export(Linear(12, 20), (torch.randn(5000, 12),))
    assert "linear" in exported.graph_module.code and "conv" not in exported.graph_module.code
