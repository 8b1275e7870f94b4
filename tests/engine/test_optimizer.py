from __future__ import annotations

import pytest
import torch
from torch import nn

from dn_detr.engine import describe_groups, parameter_groups


@pytest.fixture
def model() -> nn.Module:
    return nn.ModuleDict(
        {
            "backbone": nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)),
            "transformer": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
        }
    )


def by_name(groups):
    return {group["name"]: group for group in groups}


def test_every_trainable_parameter_is_in_exactly_one_group(model):
    model["transformer"][0].bias.requires_grad_(False)
    groups = parameter_groups(model, 1e-4, lr_factors={"backbone": 0.1}, norm_weight_decay=0.0)
    grouped = [parameter for group in groups for parameter in group["params"]]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(map(id, grouped)) == sorted(map(id, trainable))


def test_published_recipe_trains_the_backbone_at_a_tenth_and_decays_everything(model):
    groups = parameter_groups(model, 1e-4, lr_factors={"backbone": 0.1})
    optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=1e-4)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"backbone": 1e-5, "default": 1e-4})
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-4}


def test_a_parameter_that_several_rules_name_gets_the_product(model):
    groups = parameter_groups(model, 1.0, lr_factors={"transformer": 0.5, "1.weight": 0.1})
    assert by_name(groups)["1.weight+transformer"]["lr"] == pytest.approx(0.05)


def test_norm_weight_decay_finds_norms_by_type_not_by_name(model):
    groups = by_name(parameter_groups(model, 1.0, norm_weight_decay=0.0))
    norms = [*model["backbone"][1].parameters(), *model["transformer"][1].parameters()]
    assert list(map(id, groups["norm"]["params"])) == list(map(id, norms))
    assert groups["norm"]["weight_decay"] == 0.0


def test_a_rule_that_names_nothing_is_an_error_that_lists_the_modules(model):
    with pytest.raises(ValueError, match="'bakbone'; the model has backbone, transformer"):
        parameter_groups(model, 1.0, lr_factors={"bakbone": 0.1})


def test_a_rule_for_a_frozen_module_is_no_error(model):
    model["backbone"].requires_grad_(False)
    groups = parameter_groups(model, 1.0, lr_factors={"backbone": 0.1})
    assert [group["name"] for group in groups] == ["default"]


def test_table_counts_tensors_and_numbers(model):
    groups = parameter_groups(model, 1e-4, lr_factors={"backbone": 0.1})
    table = describe_groups(torch.optim.AdamW(groups, weight_decay=1e-4)).splitlines()
    assert table[1].split() == ["backbone", "4", "24", "1e-05", "0.0001"]
    assert table[2].split() == ["default", "4", "28", "0.0001", "0.0001"]
