from __future__ import annotations

import pytest
import torch
from torch import nn

from dn_detr.config import LazyConfig, get_config, instantiate, list_configs
from dn_detr.engine import describe_groups, parameter_groups
from dn_detr.engine.optimizer import learning_rates

DEFORMABLE_RECIPE = {"backbone": 0.1, "sampling_offsets|reference_points": 0.1}


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
    with pytest.raises(
        ValueError, match="mean backbone\\?\\); the model has backbone, transformer"
    ):
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


def test_biases_are_apart_from_weights_and_from_the_biases_of_norms(model):
    groups = by_name(parameter_groups(model, 1.0, norm_weight_decay=0.0, bias_weight_decay=0.0))
    biases = [model["backbone"][0].bias, model["transformer"][0].bias]
    assert list(map(id, groups["bias"]["params"])) == list(map(id, biases))
    assert len(groups["norm"]["params"]) == 4 and len(groups["default"]["params"]) == 2
    assert groups["bias"]["weight_decay"] == 0.0 and "weight_decay" not in groups["default"]


def test_one_rule_may_name_alternatives_of_which_the_model_has_one(model):
    model["sampling_offsets"] = nn.Linear(4, 2)
    groups = by_name(parameter_groups(model, 1.0, lr_factors=DEFORMABLE_RECIPE))
    rule = groups["sampling_offsets|reference_points"]
    assert rule["lr"] == 0.1 and len(rule["params"]) == 2


def test_a_rule_of_which_the_model_has_no_alternative_is_an_error(model):
    with pytest.raises(ValueError, match=r"contains 'sampling_offsets\|reference_points'"):
        parameter_groups(model, 1.0, lr_factors=DEFORMABLE_RECIPE)


def test_an_empty_alternative_which_would_name_everything_is_an_error(model):
    with pytest.raises(ValueError, match="empty part"):
        parameter_groups(model, 1.0, lr_factors={"backbone|": 0.1})


def test_rates_have_the_name_of_their_group(model):
    groups = parameter_groups(model, 1e-4, lr_factors={"backbone": 0.1})
    rates = learning_rates(torch.optim.AdamW(groups))
    assert rates == pytest.approx({"lr/backbone": 1e-5, "lr/default": 1e-4})


@pytest.mark.parametrize("from_command_line", [True, False])
def test_the_recipe_of_deformable_detr_holds_for_encoder_and_decoder(from_command_line):
    """A tenth for sampling offsets; DAB, which predicts no reference points, has no others."""
    cfg = get_config("dn_deformable_detr_r50_50ep.py")
    if from_command_line:
        override = "+optimizer.params.lr_factors.sampling_offsets=0.1"
        cfg = LazyConfig.apply_overrides(cfg, [override])
    else:
        cfg.optimizer.params.lr_factors = DEFORMABLE_RECIPE
    with torch.device("meta"):
        model = instantiate(cfg.model)
    groups = by_name(instantiate(cfg.optimizer.params, model=model))
    (rule,) = groups.keys() - {"default", "backbone"}
    assert groups[rule]["lr"] == pytest.approx(1e-5)
    offsets = [p for name, p in model.named_parameters() if ".sampling_offsets." in name]
    assert len(offsets) == 2 * 12
    assert list(map(id, groups[rule]["params"])) == list(map(id, offsets))


@pytest.mark.parametrize(
    "name",
    [
        name
        if name.startswith(("dn_deformable_detr_r50_50", "digits"))
        else pytest.param(name, marks=pytest.mark.slow)
        for name in list_configs()
    ],
)
def test_every_parameter_of_the_zoo_is_in_exactly_one_group(name):
    cfg = get_config(name)
    with torch.device("meta"):
        model = instantiate(cfg.model)
    rules = {"norm_weight_decay": 0.0, "bias_weight_decay": 0.0}
    for options in ({}, rules):
        groups = instantiate(cfg.optimizer.params, model=model, **options)
        grouped = [id(parameter) for group in groups for parameter in group["params"]]
        trainable = [id(p) for p in model.parameters() if p.requires_grad]
        assert sorted(grouped) == sorted(trainable)
