"""Whole small detectors on a GPU, compared with the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("omegaconf")
pytest.importorskip("hydra")

from ..modeling.conftest import away_from_initialisation, make_sample, small_model_config

MODELS = ["dn_detr_r50", "dn_deformable_detr_r50", "dab_deformable_detr_r50_two_stage"]


@pytest.fixture(autouse=True)
def whole_float32() -> Iterator[None]:
    """Convolutions of a GPU else round their inputs to ten bits."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def _samples() -> list[dict[str, Any]]:
    return [make_sample(h, w, n, n) for h, w, n in ((64, 96, 2), (80, 64, 3))]


def _total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A small detector on the CPU."""
    return away_from_initialisation(small_model_config(request.param))


def test_predictions_are_those_of_the_cpu(device, model):
    model.eval()
    there = copy.deepcopy(model).to(device)
    with torch.no_grad():
        expected = model.forward_tensors(*model.preprocess(_samples()))
        found = there.forward_tensors(*there.preprocess(_samples()))
    for name, reference in expected.items():
        torch.testing.assert_close(found[name].cpu(), reference, rtol=0, atol=1e-3)


def test_losses_and_gradients_are_those_of_the_cpu(device, model):
    there = copy.deepcopy(model).to(device)
    expected, found = model(_samples()), there(_samples())
    for name, reference in expected.items():
        assert found[name].item() == pytest.approx(reference.item(), rel=1e-3, abs=1e-4), name
    for losses in (expected, found):
        _total(losses).backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.grad is not None]
    theirs = dict(there.named_parameters())
    largest = max(float(p.grad.abs().max()) for _, p in trained)
    for name, parameter in trained:
        difference = (theirs[name].grad.cpu() - parameter.grad).abs().max()
        assert difference <= 1e-3 * max(float(parameter.grad.abs().max()), 1e-2 * largest), name


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_training_steps_lower_the_loss(device, model, amp):
    there = model.to(device)
    trained = [p for p in there.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    totals = []
    for _ in range(8):
        with torch.autocast(device.type, dtype=amp or torch.bfloat16, enabled=amp is not None):
            total = _total(there(_samples()))
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(trained, 0.1)
        optimizer.step()
        totals.append(total.item())
    assert totals[-1] < totals[0]


def test_a_step_of_a_deformable_model_runs_the_compiled_operators_alone(device):
    model = away_from_initialisation(small_model_config("dn_deformable_detr_r50")).to(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _total(model(_samples())).backward()
    names = {event.key for event in profile.key_averages()}
    assert {f"dn_detr_C::ms_deform_attn_fused_{n}" for n in ("forward", "backward")} <= names
    assert not [name for name in names if "grid_sampler" in name]
