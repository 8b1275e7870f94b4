from __future__ import annotations

import pytest
import torch
from torch import nn

from dn_detr.engine import NonFiniteError, TrainingStep
from dn_detr.engine.settings import AmpSettings, ClipGradSettings

CPU = torch.device("cpu")


class Quadratic(nn.Module):
    """Loss terms a * w^2 and b * w for a batch of one sample with `a` and `b`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, batch):
        sample = batch[0]
        return {"square": sample["a"] * self.weight**2, "linear": sample["b"] * self.weight}


def make_step(model, max_norm=None, **amp):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return TrainingStep(
        model, optimizer, device=CPU, amp=AmpSettings(**amp), clip_grad=ClipGradSettings(max_norm)
    )


def test_a_step_follows_the_gradient_of_the_sum_of_all_terms():
    model = Quadratic()
    result = make_step(model)([{"a": 0.25, "b": 3.0}], 1)
    assert model.weight.item() == pytest.approx(2.0 - (2 * 0.25 * 2.0 + 3.0))
    assert dict(zip(result.names, result.losses.tolist(), strict=True)) == {
        "square": 1.0,
        "linear": 6.0,
    }


def test_gradient_norm_is_reported_before_clipping_and_applied_after():
    model = Quadratic()
    result = make_step(model, max_norm=0.1)([{"a": 1.0, "b": 0.0}], 1)
    assert result.grad_norm.item() == pytest.approx(4.0)
    assert model.weight.item() == pytest.approx(2.0 - 0.1, abs=1e-5)


@pytest.mark.parametrize(("norm_type", "norm"), [(1.0, 7.0), (2.0, 5.0)])
def test_the_norm_of_all_gradients_is_of_the_type_asked_for(norm_type, norm):
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

        def forward(self, batch):
            return {"loss": 3 * self.a + 4 * self.b}

    model = Linear()
    step = TrainingStep(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        device=CPU,
        amp=AmpSettings(),
        clip_grad=ClipGradSettings(1.0, norm_type),
    )
    assert step([{}], 1).grad_norm.item() == pytest.approx(norm)
    assert model.a.item() == pytest.approx(-3 / norm, rel=1e-4)


def test_float16_clips_the_unscaled_gradient():
    model = Quadratic()
    step = make_step(model, max_norm=0.1, enabled=True, dtype="float16")
    result = step([{"a": 0.25, "b": 0.0}], 1)
    assert result.grad_norm.item() == pytest.approx(1.0)
    assert model.weight.item() == pytest.approx(2.0 - 0.1, abs=1e-5)


def test_a_nan_gradient_under_float16_is_an_error_when_no_scale_can_mend_it():
    class FiniteLossNanGradient(Quadratic):
        def forward(self, batch):
            return {"loss": (self.weight - 2.0).abs().sqrt() * 0}  # 0 times an infinite slope

    step = make_step(FiniteLossNanGradient(), enabled=True, dtype="float16")
    with pytest.raises(NonFiniteError, match="gradient"):
        for iteration in range(1, 60):
            step([{"file_name": "cat.jpg"}], iteration)
    assert step.model.weight.item() == 2.0


def test_an_overflow_of_float16_scaling_skips_the_step_and_lowers_the_scale():
    model = Quadratic()
    step = make_step(model, enabled=True, dtype="float16")
    step([{"a": 1e35, "b": 0.0}], 1)
    assert model.weight.item() == 2.0
    assert step.scaler.get_scale() == 2.0**15


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    model = Quadratic()
    sample = {"a": 1.0, "b": float("inf"), "file_name": "images/bad.jpg"}
    with pytest.raises(NonFiniteError) as error:
        make_step(model)([sample], 17)
    message = str(error.value)
    assert "iteration 17: loss terms linear not finite" in message
    assert "square = 4" in message and "linear = inf" in message and "images/bad.jpg" in message
    assert model.weight.item() == 2.0


def test_a_gradient_that_is_not_finite_stops_though_the_loss_is_finite():
    class Root(Quadratic):
        def forward(self, batch):
            return {"root": (self.weight - 2.0).sqrt()}

    model = Root()
    with pytest.raises(NonFiniteError, match="iteration 3: the gradient not finite"):
        make_step(model)([{"image_id": 5}], 3)
    assert model.weight.item() == 2.0


def test_bfloat16_computes_in_bfloat16_and_sums_losses_in_float32():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, batch):
            output = self.linear(torch.ones(1, 4))
            self.dtype = output.dtype
            return {"loss": output.sum()}

    model = Layer()
    result = make_step(model, enabled=True, dtype="bfloat16")([{}], 1)
    assert model.dtype == torch.bfloat16
    assert result.losses.dtype == torch.float32
