"""With denoising off the model is DAB-Deformable-DETR: against numbers that detrex printed."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from dn_detr.modeling import Detector
from dn_detr.structures import Boxes, Instances

from .goldens import build_filled, detrex_name, load_module, published_config


@pytest.fixture(scope="module")
def rules(shared) -> ModuleType:
    return load_module(shared / "golden/detrex/fill.py")


@pytest.fixture(scope="module")
def golden(shared) -> dict[str, Any]:
    with np.load(shared / "golden/detrex/detrex_dab_deformable_detr_r50.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.fixture(scope="module")
def meta(golden) -> dict[str, Any]:
    return json.loads(bytes(golden["meta_json"]).decode())


@pytest.fixture(scope="module")
def model(rules) -> Detector:
    cfg = published_config(num_classes=80)
    cfg.denoising = None
    cfg.queries.indicator = False
    return build_filled(cfg, lambda name, shape: rules.fill(detrex_name(name), shape))


def _samples(rules: ModuleType, counts: tuple[int, int]) -> list[dict[str, Any]]:
    samples = []
    for sample, target in zip(rules.images(), rules.targets(counts), strict=True):
        image = torch.from_numpy(sample["image"])
        ground_truth = Instances(
            tuple(image.shape[1:]),
            gt_boxes=Boxes(torch.from_numpy(target["boxes_xyxy"])),
            gt_classes=torch.from_numpy(target["labels"]),
        )
        samples.append({**sample, "image": image, "instances": ground_truth})
    return samples


def test_parameter_count_is_the_published_one(model, meta):
    assert sum(p.numel() for p in model.parameters()) == meta["num_params"] == 47_389_032


@pytest.mark.parametrize(
    ("case", "counts"), [("train", (5, 3)), ("train_oneempty", (2, 0)), ("train_allempty", (0, 0))]
)
def test_training_gives_every_detrex_loss(case, counts, model, rules, meta):
    model.train()
    with torch.no_grad():
        losses = model(_samples(rules, counts))
    ours = {name.replace("loss_ce", "loss_class"): value.item() for name, value in losses.items()}
    assert ours == pytest.approx(meta[f"{case}_losses_weighted"], rel=5e-5, abs=5e-5)


def test_evaluation_of_an_unpadded_image_gives_the_detrex_numbers(model, rules, golden):
    model.eval()
    with torch.no_grad():
        outputs = model.forward_tensors(*model.preprocess(_samples(rules, (0, 0))[1:]))
    for name, tolerance in (("pred_logits", 3e-4), ("pred_boxes", 2e-5)):
        expected = torch.from_numpy(golden[f"eval_single1_{name}"]).reshape(outputs[name].shape)
        torch.testing.assert_close(outputs[name], expected, rtol=0, atol=tolerance)
