"""DETR and Anchor DETR against numbers that their authors' code printed (golden files).

The files hold category ids, so the models have 91 classes. Dropout was off.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dn_detr.checkpoint import load_tensors
from dn_detr.config import get_config, instantiate
from dn_detr.modeling import Detector
from dn_detr.structures import Boxes, Instances
from tests.modeling.goldens import assert_near, load_arrays, load_module

MODELS = {
    "vanilla_detr_r50": ("detr", 2e-5),
    "anchor_detr_r50": ("anchor_detr", 1e-5),
}
COUNTS = {"train": (5, 3), "train_oneempty": (2, 0), "train_allempty": (0, 0)}
# Gradients that are zero by construction, with dust in float32.
ZERO = {"transformer.decoder.layers.0.self_attn.in_proj_weight"}
LOGITS, LOSSES, NORM = 1e-4, 5e-5, 1e-3


@dataclass
class Step:
    """What one training step computes; gradients are under the authors' names."""

    losses: dict[str, float]
    gradients: dict[str, Tensor]
    matching: Any
    outputs: dict[str, Tensor]


@dataclass
class Golden:
    """A golden file, its model and what was computed so far."""

    arrays: dict[str, Any]
    rules: ModuleType
    model: Detector
    boxes: float
    steps: dict[str, Step] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.meta: dict[str, Any] = json.loads(bytes(self.arrays["meta_json"]).decode())

    def step(self, name: str) -> Step:
        if name not in self.steps:
            self.steps[name] = _train(self, COUNTS[name])
        return self.steps[name]


@pytest.fixture(scope="module", params=MODELS)
def golden(request, shared) -> Golden:
    folder, boxes = MODELS[request.param]
    arrays = load_arrays(shared / f"golden/{folder}/{folder}_r50.npz")
    rules = load_module(shared / f"golden/{folder}/fill.py")
    cfg = get_config(f"models/{request.param}.py").model
    cfg.num_classes = 91
    cfg.backbone.mask_padding = cfg.neck.mask_padding = False  # as published
    for half in (cfg.transformer.encoder, cfg.transformer.decoder):
        published = {"dropout": 0.0, "mask_padding": False}
        half.layer.update({key: value for key, value in published.items() if key in half.layer})
    golden = Golden(arrays, rules, instantiate(cfg), boxes)
    state = {key: torch.from_numpy(rules.fill(key, s)) for key, s, _ in golden.meta["state_dict"]}
    assert load_tensors(golden.model, state).fresh == ()
    return golden


def _samples(golden: Golden, counts: tuple[int, int]) -> list[dict[str, Any]]:
    samples = []
    for pixels, target in zip(golden.rules.images(), golden.rules.targets(counts, 91), strict=True):
        image = torch.from_numpy(pixels)
        truth = Instances(
            tuple(image.shape[1:]),
            gt_boxes=Boxes(torch.as_tensor(target["boxes_xyxy"])),
            gt_classes=torch.as_tensor(target["labels"]),
        )
        samples.append({"image": image, "instances": truth})
    return samples


def _train(golden: Golden, counts: tuple[int, int]) -> Step:
    model, calls = golden.model.train(), {}
    hooks = [
        part.register_forward_hook(lambda _m, _i, out, name=name: calls.update({name: out}))
        for name, part in (("heads", model.heads), ("matcher", model.criterion.matcher))
    ]
    model.zero_grad()
    losses = model(_samples(golden, counts))
    torch.stack(list(losses.values())).sum().backward()
    for hook in hooks:
        hook.remove()
    origin = (
        model.key_maps[0]
        .to_ours({key: torch.zeros(shape) for key, shape, _ in golden.meta["state_dict"]})
        .origin
    )
    gradients = {origin[n]: p.grad for n, p in model.named_parameters() if p.requires_grad}
    values = {name: value.item() for name, value in losses.items()}
    return Step(values, gradients, calls["matcher"], calls["heads"])


@torch.no_grad()
def _predict(golden: Golden, first: int) -> dict[str, Tensor]:
    model = golden.model.eval()
    return model.forward_tensors(*model.preprocess(_samples(golden, (0, 0))[first:]))


def test_parameters_are_those_of_the_authors(golden):
    assert sum(p.numel() for p in golden.model.parameters()) == golden.meta["num_params"]


@pytest.mark.parametrize(("run", "first"), [("eval", 0), ("single1", 1)])
def test_predictions_are_those_of_the_authors(golden, run, first):
    outputs = _predict(golden, first)
    assert_near(outputs["pred_logits"], golden.arrays[f"{run}_pred_logits"], LOGITS)
    assert_near(outputs["pred_boxes"], golden.arrays[f"{run}_pred_boxes"], golden.boxes)


def test_detections_are_those_of_the_authors(golden):
    arrays = golden.arrays
    outputs = {n: torch.from_numpy(arrays[f"eval_{n}"]) for n in ("pred_logits", "pred_boxes")}
    sizes = [(int(h), int(w)) for h, w in golden.rules.ORIG_SIZES]
    for image, found in enumerate(golden.model.postprocess(outputs, sizes)):
        scores = arrays[f"eval_post{image}_scores"]
        order = np.argsort(-scores, kind="stable")  # DETR's are in the order of the queries
        assert_near(found.scores, scores[order], 1e-6)
        labels = torch.from_numpy(arrays[f"eval_post{image}_labels"][order])
        boxes = torch.from_numpy(arrays[f"eval_post{image}_boxes"][order])
        same = found.pred_classes == labels
        same &= (found.pred_boxes.tensor - boxes).abs().amax(1) < 1e-3
        assert same.float().mean() > 0.9  # neighbours whose scores tie may swap places


@pytest.mark.parametrize("run", COUNTS)
def test_every_loss_is_that_of_the_authors(golden, run):
    weights = golden.meta["weight_dict"]
    printed = golden.meta[f"{run}_losses"]
    expected = {name: weights[name] * printed[name] for name in weights if name in printed}
    assert golden.step(run).losses == pytest.approx(expected, rel=LOSSES, abs=1e-6)
    assert sum(golden.step(run).losses.values()) == pytest.approx(golden.meta[f"{run}_total"])


@pytest.mark.parametrize("run", COUNTS)
def test_matching_is_that_of_the_authors(golden, run):
    matching, first = golden.step(run).matching, torch.tensor([0, COUNTS[run][0]])
    *early, last = range(len(matching.query))
    for layer, expected in zip((last, *early), golden.meta[f"{run}_matches"], strict=True):
        for image, (queries, objects) in enumerate(expected):
            own = matching.image == image
            assert matching.query[layer, own].tolist() == queries
            assert (matching.target[layer, own] - first[image]).tolist() == objects


@pytest.mark.parametrize("run", COUNTS)
def test_gradient_norm_is_that_of_the_authors(golden, run):
    gradients = golden.step(run).gradients
    assert all(gradient is not None for gradient in gradients.values())
    norm = sum(gradient.norm().item() ** 2 for gradient in gradients.values()) ** 0.5
    assert norm == pytest.approx(golden.meta[f"{run}_grad_total_norm"], rel=NORM)


def test_gradient_of_every_parameter_is_that_of_the_authors(golden):
    gradients, norms = golden.step("train").gradients, golden.meta["train_grad_norms"]
    dust = 1e-5 * golden.meta["train_grad_total_norm"]
    compared = {n: norm for n, norm in norms.items() if n not in ZERO and norm >= dust}
    assert len(compared) > 0.85 * len(norms)
    for name, norm in compared.items():
        assert gradients[name].norm().item() == pytest.approx(norm, rel=5e-3), name


def test_boxes_of_all_layers_are_those_of_the_authors(golden):
    boxes = golden.step("train").outputs["pred_boxes"][:, :, ::3].detach()
    assert_near(boxes, golden.arrays["train_pred_boxes_all"], golden.boxes)
