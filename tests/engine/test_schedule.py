from __future__ import annotations

import math

import pytest
import torch

from dn_detr.engine import Timetable, cosine, multi_step
from dn_detr.engine.schedule import parse_period, set_learning_rates


@pytest.mark.parametrize(
    ("period", "iterations"),
    [(7, 7), ("1ep", 10), ("0.5ep", 5), ("2ep", 20), ("0.01ep", 1), (0, None), (None, None)],
)
def test_period_counts_iterations_when_int_and_epochs_when_written_so(period, iterations):
    assert parse_period(period, iterations_per_epoch=10) == iterations


@pytest.mark.parametrize("period", ["1", "ep", "1epoch", "-1ep", "0ep", "nanep", -3])
def test_malformed_period_is_an_error_that_shows_the_two_forms(period):
    with pytest.raises(ValueError, match=r"iterations \(500\), epochs \(1ep"):
        parse_period(period, iterations_per_epoch=10)


def test_max_iter_replaces_epochs():
    assert Timetable.plan(10, epochs=3, max_iter=None).max_iter == 30
    assert Timetable.plan(10, epochs=0.25, max_iter=None).max_iter == 3
    assert Timetable.plan(10, epochs=3, max_iter=4).max_iter == 4


def test_periodic_events_happen_at_multiples_and_at_the_end():
    timetable = Timetable(iterations_per_epoch=4, max_iter=10)
    assert [i for i in range(1, 11) if timetable.is_due("1ep", i)] == [4, 8, 10]
    assert [i for i in range(1, 11) if timetable.is_due(0, i)] == [10]


def test_multi_step_equals_torch_multi_step_lr():
    iterations_per_epoch, milestones = 5, [2, 4]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, [m * iterations_per_epoch for m in milestones], gamma=0.1
    )
    rule = multi_step(milestones, gamma=0.1)
    for iteration in range(30):
        ours = rule(iteration / iterations_per_epoch, 6.0)
        assert ours == pytest.approx(reference.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        reference.step()


def test_milestones_stay_in_epochs_when_the_run_is_shortened():
    rule = multi_step([2])
    assert rule(1.5, 50.0) == rule(1.5, 1.6) == 1.0
    assert rule(2.0, 50.0) == rule(2.0, 2.1) == pytest.approx(0.1)


def test_warm_up_is_linear_from_its_start_and_ends_at_one():
    rule = multi_step([], warmup_epochs=2.0, warmup_start=0.5)
    assert [rule(epoch, 10.0) for epoch in (0.0, 1.0, 2.0, 9.0)] == [0.5, 0.75, 1.0, 1.0]


def test_cosine_equals_torch_cosine_annealing():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.2)
    rule = cosine(final_factor=0.2)
    for iteration in range(20):
        assert rule(iteration / 5, 4.0) == pytest.approx(reference.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.nan])
def test_gamma_that_ends_or_inverts_learning_is_an_error(gamma):
    with pytest.raises(ValueError, match="gamma"):
        multi_step([1], gamma=gamma)


def test_learning_rates_of_groups_keep_their_ratio():
    parameters = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD(
        [
            {"params": parameters[:1], "lr": 1.0, "initial_lr": 1.0},
            {"params": parameters[1:], "lr": 0.1, "initial_lr": 0.1},
        ]
    )
    set_learning_rates(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.05]
