"""Parameter groups by named rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from dn_detr.config.errors import did_you_mean
from dn_detr.errors import UserError

_NORM_LAYERS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    lr_factors: Mapping[str, float] | None = None,
    norm_weight_decay: float | None = None,
    bias_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Put every trainable parameter into exactly one group of an optimizer.

    Args:
        model: its trainable parameters are grouped.
        lr: learning rate of parameters that no rule names.
        lr_factors: rule -> factor of the learning rate. A rule is a part of a parameter's name, or
            several joined by "|", of which the model must have one: Deformable DETR's recipe is
            `{"backbone": 0.1, "sampling_offsets|reference_points": 0.1}`, and DAB models, which
            predict no reference points, train with it too. A parameter that several rules name
            gets the product.
        norm_weight_decay: weight decay of the parameters of normalisation layers; None leaves
            them the optimizer's.
        bias_weight_decay: the same for all other biases.

    Returns:
        Groups with `name`, `params`, `lr` and, where it differs, `weight_decay`. The name joins
        the rules by "+": "backbone", "backbone+norm"; "default" where there is none.

    Raises:
        ValueError: a rule names no parameter of the model.

    Source: DN-DETR trains everything at lr 1e-4 and weight decay 1e-4, the backbone at lr 1e-5.
    """
    factors = dict(lr_factors or {})
    _require_matches(model, factors)
    kinds = _norms_and_biases(model)
    weight_decays = {"norm": norm_weight_decay, "bias": bias_weight_decay}
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rules = [rule for rule in sorted(factors) if _names(rule, name)]
        weight_decay = weight_decays.get(kind := kinds.get(name, ""))
        title = "+".join([*rules, *([kind] if weight_decay is not None else [])]) or "default"
        group = groups.setdefault(title, {"name": title, "params": [], "lr": lr})
        if not group["params"]:
            for rule in rules:
                group["lr"] *= factors[rule]
            if weight_decay is not None:
                group["weight_decay"] = weight_decay
        group["params"].append(parameter)
    return list(groups.values())


def describe_groups(optimizer: Optimizer) -> str:
    """Return a table of the groups: name, tensors, parameters, learning rate, weight decay."""
    names = [group_name(group) for group in optimizer.param_groups]
    width = max(len(name) for name in ["parameters", *names]) + 2
    lines = [f"{'parameters':<{width}}{'tensors':>9}{'numbers':>13}{'lr':>10}{'weight decay':>14}"]
    for name, group in zip(names, optimizer.param_groups, strict=True):
        numbers = sum(parameter.numel() for parameter in group["params"])
        lines.append(
            f"{name:<{width}}{len(group['params']):>9}{numbers:>13,}{group['lr']:>10.2g}"
            f"{group.get('weight_decay', 0.0):>14.2g}"
        )
    return "\n".join(lines)


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Return `lr/<group>` of every parameter group, as a log record has it."""
    return {f"lr/{group_name(group)}": float(group["lr"]) for group in optimizer.param_groups}


def group_name(group: Mapping[str, Any]) -> str:
    """Return the name of a parameter group; a group made without a name is "default"."""
    return str(group.get("name", "default"))


def _names(rule: str, parameter: str) -> bool:
    return any(part in parameter for part in rule.split("|"))


def _require_matches(model: nn.Module, rules: Iterable[str]) -> None:
    # Frozen parameters count: a frozen backbone is no mistake in the rule that names it.
    names = [name for name, _ in model.named_parameters()]
    for rule in rules:
        if not all(rule.split("|")):
            raise UserError(
                f"optimizer.params.lr_factors: {rule!r} has an empty part, which every name "
                "contains; set optimizer.lr for all parameters"
            )
        if not any(_names(rule, name) for name in names):
            raise UserError(_no_match(rule, names))


def _no_match(rule: str, names: Iterable[str]) -> str:
    parts = dict.fromkeys(part for name in names for part in name.split("."))
    near = did_you_mean(rule, parts)
    modules = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
    return (
        f"optimizer.params.lr_factors: no parameter's name contains {rule!r}"
        f"{near}; the model has {modules}. Remove the rule, correct it, or join it to another by "
        "'|' if only some models have such parameters"
    )


def _norms_and_biases(model: nn.Module) -> dict[str, str]:
    """Name of a parameter -> "norm" or "bias"; a normalisation's bias is its own kind, "norm"."""
    kinds = {}
    for prefix, module in model.named_modules():
        for name, _ in module.named_parameters(prefix, recurse=False):
            if isinstance(module, _NORM_LAYERS):
                kinds[name] = "norm"
            elif name.endswith("bias"):
                kinds[name] = "bias"
    return kinds
