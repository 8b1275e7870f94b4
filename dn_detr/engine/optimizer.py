"""Parameter groups by named rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

_NORM_LAYERS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    lr_factors: Mapping[str, float] | None = None,
    norm_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Put every trainable parameter into exactly one group of an optimizer.

    Args:
        model: its trainable parameters are grouped.
        lr: learning rate of parameters that no rule names.
        lr_factors: part of a parameter's name -> factor of its learning rate. A parameter whose
            name contains several of them gets the product.
        norm_weight_decay: weight decay of the parameters of normalisation layers; None leaves
            them the optimizer's.

    Returns:
        Groups with `name`, `params`, `lr` and, where it differs, `weight_decay`.

    Raises:
        ValueError: a rule names no parameter of the model.

    Source: DN-DETR trains everything at lr 1e-4 and weight decay 1e-4, the backbone at lr 1e-5.
    """
    factors = dict(lr_factors or {})
    _require_matches(model, factors)
    norm_names = set(_norm_parameter_names(model)) if norm_weight_decay is not None else set()
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rules = [rule for rule in sorted(factors) if rule in name]
        is_norm = name in norm_names
        title = "+".join([*rules, *(["norm"] if is_norm else [])]) or "default"
        group = groups.setdefault(title, {"name": title, "params": [], "lr": lr})
        if not group["params"]:
            for rule in rules:
                group["lr"] *= factors[rule]
            if is_norm:
                group["weight_decay"] = norm_weight_decay
        group["params"].append(parameter)
    return list(groups.values())


def describe_groups(optimizer: Optimizer) -> str:
    """Return a table of the groups: name, tensors, parameters, learning rate, weight decay."""
    lines = [f"{'parameters':<24}{'tensors':>9}{'numbers':>13}{'lr':>10}{'weight decay':>14}"]
    for group in optimizer.param_groups:
        numbers = sum(parameter.numel() for parameter in group["params"])
        lines.append(
            f"{group_name(group):<24}{len(group['params']):>9}{numbers:>13,}{group['lr']:>10.2g}"
            f"{group.get('weight_decay', 0.0):>14.2g}"
        )
    return "\n".join(lines)


def group_name(group: Mapping[str, Any]) -> str:
    """Return the name of a parameter group; a group made without a name is "default"."""
    return str(group.get("name", "default"))


def _require_matches(model: nn.Module, rules: Iterable[str]) -> None:
    # Frozen parameters count: a frozen backbone is no mistake in the rule that names it.
    names = [name for name, _ in model.named_parameters()]
    for rule in rules:
        if not any(rule in name for name in names):
            modules = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
            raise ValueError(
                f"optimizer.params.lr_factors: no parameter's name contains {rule!r}; the model "
                f"has {modules}. Remove the rule or correct its name"
            )


def _norm_parameter_names(model: nn.Module) -> Iterable[str]:
    for prefix, module in model.named_modules():
        if isinstance(module, _NORM_LAYERS):
            for name, _ in module.named_parameters(recurse=False):
                yield f"{prefix}.{name}" if prefix else name
