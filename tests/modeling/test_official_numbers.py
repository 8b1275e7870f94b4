"""DN-Deformable-DETR against numbers that the official code printed (golden files)."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dn_detr.modeling import Detector
from dn_detr.structures import pad_images

from .goldens import (
    build_filled,
    load_module,
    official_name,
    published_config,
    recorded_noise,
)


@pytest.fixture(scope="module")
def rules(shared) -> ModuleType:
    return load_module(shared / "golden/official/fill.py")


@pytest.fixture(scope="module")
def golden(shared) -> dict[str, Any]:
    with np.load(shared / "golden/official/official_dn_dab_deformable_detr_r50.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.fixture(scope="module")
def meta(golden) -> dict[str, Any]:
    return json.loads(str(golden["meta"]))


@pytest.fixture(scope="module")
def model(rules) -> Detector:
    return build_filled(
        published_config(num_classes=91),
        lambda name, shape: rules.fill_tensor(official_name(name), shape),
    )


@pytest.fixture(scope="module")
def batch(rules) -> tuple[Tensor, Tensor]:
    return pad_images([torch.from_numpy(image) for image in rules.make_images()])


def _targets(rules: ModuleType) -> list[dict[str, Tensor]]:
    return [{k: torch.from_numpy(v) for k, v in t.items()} for t in rules.make_targets()]


def _replay(model, golden, rules, patch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The golden targets; the model's denoising noise is replaced by the recorded draws."""
    targets = _targets(rules)
    draws = {k: torch.from_numpy(v) for k, v in golden.items() if k.startswith("draw")}
    flip, labels, box = (draws[k] for k in sorted(draws))
    noise = iter(recorded_noise([len(t["labels"]) for t in targets], 5, flip, labels, box))
    patch.setattr(model.denoising, "draw_noise", lambda count, generator: next(noise))
    return targets


@pytest.fixture(scope="module")
def trained(model, golden, rules, batch) -> dict[str, float]:
    """The losses of the recorded training step; leaves its gradients in the model."""
    with pytest.MonkeyPatch.context() as patch:
        targets = _replay(model, golden, rules, patch)
        model.zero_grad()
        losses = model.losses(*batch, targets)
        torch.stack(list(losses.values())).sum().backward()
    return {name: value.item() for name, value in losses.items()}


def test_every_official_tensor_has_one_of_ours(model, golden):
    schema = json.loads(str(golden["state_schema"]))
    official = {k for k in schema if not k.startswith("transformer.decoder.bbox_embed")}
    assert {official_name(k) for k in model.state_dict()} == official


def test_evaluation_gives_the_official_logits_and_boxes(model, golden, batch):
    with torch.no_grad():
        outputs = model.forward_tensors(*batch)
    torch.testing.assert_close(
        outputs["pred_logits"], torch.from_numpy(golden["eval_pred_logits"]), rtol=0, atol=1e-3
    )
    torch.testing.assert_close(
        outputs["pred_boxes"], torch.from_numpy(golden["eval_pred_boxes"]), rtol=0, atol=3e-5
    )


def test_postprocessing_keeps_the_official_scores(model, golden, rules):
    outputs = [torch.from_numpy(golden[f"eval_pred_{k}"]) for k in ("logits", "boxes")]
    found = model.postprocess(*outputs, rules.ORIG_SIZES)
    scores = torch.stack([instances.scores for instances in found])
    torch.testing.assert_close(scores, torch.from_numpy(golden["post_scores"]), rtol=0, atol=1e-7)


def test_noised_queries_and_mask_are_the_official_ones(model, golden, rules, monkeypatch):
    targets = _replay(model, golden, rules, monkeypatch)
    with torch.no_grad():
        noised = model.denoising(targets, *model.queries(2))
    slots = noised.num_slots
    assert slots == golden["dn_query_label"].shape[1]
    for ours, name in ((noised.content, "dn_query_label"), (noised.anchors, "dn_query_box_logit")):
        torch.testing.assert_close(
            ours[:, :slots], torch.from_numpy(golden[name]), rtol=0, atol=1e-5
        )
    for mask in noised.attention_mask:
        np.testing.assert_array_equal(mask.numpy(), golden["attn_mask"])


def test_matching_is_the_official_one(model, golden, batch, rules):
    targets = _targets(rules)
    with torch.no_grad():
        logits, boxes = model._decode(*batch, *model.queries(2))
    matching = model.criterion.matcher(logits, boxes, targets)
    offsets = torch.tensor([0, len(targets[0]["labels"])])
    for layer, name in enumerate([*(f"aux{i}" for i in range(5)), "last"]):
        within = matching.target[layer] - offsets[matching.image]
        np.testing.assert_array_equal(matching.query[layer].numpy(), golden[f"match_{name}_src"])
        np.testing.assert_array_equal(within.numpy(), golden[f"match_{name}_tgt"])


def test_training_gives_every_official_loss(trained, meta):
    weights = meta["weights"]
    official = {k: v * weights[k] for k, v in meta["losses"].items() if k in weights}
    renamed = {}
    for name, value in official.items():
        term, layer = name.removeprefix("tgt_"), ""
        if term[-1].isdigit():
            term, layer = term[:-2], term[-2:]
        renamed[term + ("_dn" if name.startswith("tgt_") else "") + layer] = value
    assert trained == pytest.approx(renamed, rel=1e-4)
    assert sum(trained.values()) == pytest.approx(meta["total_loss"], rel=2e-5)


def test_training_gives_the_official_gradients(trained, model, meta):
    grads = {
        official_name(n): p.grad.norm().item()
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    total = sum(g**2 for g in grads.values()) ** 0.5
    assert total == pytest.approx(meta["grad_norm"], rel=1e-3)
    skipped = set(meta["zero_gradient_by_symmetry"])
    for name, norm in meta["grad_l2"].items():
        if name not in skipped:
            assert grads[name] == pytest.approx(norm, rel=5e-3), name


@pytest.mark.parametrize("case", ["first_image_empty", "all_empty"])
def test_images_without_objects_give_the_official_loss(case, model, batch, rules, meta):
    """Denoising draws are not recorded for these; the matching losses do not depend on them."""
    targets = _targets(rules)
    for index in range(1 if case == "first_image_empty" else 2):
        targets[index] = {k: v[:0] for k, v in targets[index].items()}
    with torch.no_grad():
        losses = model.losses(*batch, targets)
    for term in ("loss_ce", "loss_bbox", "loss_giou"):
        official = meta["edge_cases"][case]["losses"][term] * meta["weights"][term]
        assert losses[term].item() == pytest.approx(official, rel=1e-4, abs=1e-6)
