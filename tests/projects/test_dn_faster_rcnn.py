"""Faster R-CNN: detections and losses are torchvision's, and denoising adds to them alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models import detection, mobilenet_v3_large, resnet18

from dn_detr.checkpoint import load_tensors
from dn_detr.checkpoint.coco_classes import COCO_IDS
from dn_detr.config import get_config, instantiate
from dn_detr.modeling import mean_over_ranks
from dn_detr.projects.dn_faster_rcnn.modeling import FasterRCNN, PyramidBackbone
from tests.modeling.conftest import make_sample, small_model_config

MODELS = {
    "faster_rcnn_r50_fpn_12ep": detection.fasterrcnn_resnet50_fpn,
    "faster_rcnn_r50_fpn_v2_26ep": detection.fasterrcnn_resnet50_fpn_v2,
    "faster_rcnn_mobilenet_v3_fpn_26ep": detection.fasterrcnn_mobilenet_v3_large_fpn,
}
ROWS_WITHOUT_CLASS = sorted(set(range(1, 91)) - set(COCO_IDS))


def _samples(counts: list[int]) -> list[dict[str, Any]]:
    sizes = [(64, 96), (96, 80), (64, 64)]
    return [make_sample(*sizes[i % 3], n, seed=i) for i, n in enumerate(counts)]


def _pair(name: str, classes: int, **options: Any) -> tuple[Any, FasterRCNN]:
    """torchvision's model of a config with random weights, and ours with the same ones."""
    torch.manual_seed(0)
    theirs = MODELS[name](weights=None, weights_backbone=None, num_classes=classes + 1, **options)
    theirs.transform.resize = lambda image, target: (image, target)
    with torch.no_grad():  # at initialisation all scores and boxes are alike
        for parameter in theirs.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
        if classes == 90:  # rows of no class are never seen in training
            theirs.roi_heads.box_predictor.cls_score.bias[ROWS_WITHOUT_CLASS] = -1e4
    cfg = get_config(name).model
    cfg.num_classes = 80 if classes == 90 else classes
    cfg.backbone.batch_norm = "trainable"  # torchvision freezes where it loads weights
    cfg.update(options)
    ours: FasterRCNN = instantiate(cfg)
    load_tensors(ours, theirs.state_dict())
    return theirs, ours


@pytest.fixture
def small() -> FasterRCNN:
    """A model with denoising that samples all it can, without batch statistics."""
    torch.manual_seed(0)
    model: FasterRCNN = instantiate(small_model_config("digits_dn_faster_rcnn"))
    return model


@pytest.fixture
def first_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision sample the first anchors and regions instead of random ones."""
    monkeypatch.setattr(
        torch, "randperm", lambda n, device=None, generator=None: torch.arange(n, device=device)
    )


@pytest.mark.parametrize("name", MODELS)
def test_detections_are_those_of_torchvision(name):
    theirs, ours = _pair(
        name, 90, box_score_thresh=0.0, rpn_score_thresh=0.0, rpn_post_nms_top_n_test=100
    )
    samples = _samples([0, 0])
    with torch.no_grad():
        wanted = theirs.eval()([sample["image"] / 255 for sample in samples])
        found = ours.eval()(samples)
    for expected, detected in zip(wanted, found, strict=True):
        instances = detected["instances"]
        assert len(instances) == 100
        labels = torch.tensor(COCO_IDS)[instances.pred_classes]
        assert torch.equal(labels, expected["labels"])
        boxes = instances.pred_boxes.tensor / 2  # the originals are twice as large
        torch.testing.assert_close(boxes, expected["boxes"], rtol=0, atol=1e-5)
        torch.testing.assert_close(instances.scores, expected["scores"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_losses_without_denoising_are_those_of_torchvision_to_the_bit(name):
    theirs, ours = _pair(name, 10, box_batch_size_per_image=32)
    samples = _samples([3, 0, 5])
    targets = [
        {
            "boxes": sample["instances"].gt_boxes.tensor,
            "labels": sample["instances"].gt_classes + 1,
        }
        for sample in samples
    ]
    torch.manual_seed(0)
    wanted = theirs.train()([sample["image"] / 255 for sample in samples], targets)
    torch.manual_seed(0)
    found = ours.train()(samples)
    assert found == wanted and len(found) == 4


def test_denoising_leaves_the_other_losses_as_they_are(small):
    without = copy.deepcopy(small)
    without.denoising = None
    samples = _samples([3, 5])
    torch.manual_seed(0)
    wanted = without.train()(samples)
    torch.manual_seed(0)
    found = small.train()(samples)
    assert found.keys() - wanted.keys() == {"loss_box_reg_dn"}
    assert {name: found[name] for name in wanted} == wanted


def test_noised_boxes_regress_their_own_object(small):
    """The loss of a single object, computed by hand from what its noised boxes predict."""
    (sample,) = _samples([1])
    predictions: list[tuple[Tensor, Tensor]] = []
    predictor = small.roi_heads.box_predictor
    predictor.register_forward_hook(lambda module, inputs, output: predictions.append(output))
    loss = small.train()([sample])["loss_box_reg_dn"]
    (target,) = small._targets([sample], torch.zeros(()))
    deltas = predictions[1][1].view(len(target["noised"]), 11, 4)[:, target["labels"][0]]
    noised, (box,) = target["noised"], target["boxes"]
    sides, centres = noised[:, 2:] - noised[:, :2], (noised[:, 2:] + noised[:, :2]) / 2
    moves = ((box[2:] + box[:2]) / 2 - centres) / sides
    growth = ((box[2:] - box[:2]) / sides).log()
    error = (deltas - torch.cat([10 * moves, 5 * growth], dim=1)).abs()
    smooth = torch.where(error < 1 / 9, error**2 * 9 / 2, error - 1 / 18)
    assert loss.item() == pytest.approx(smooth.sum().item() / 10, rel=1e-5)


def test_noised_boxes_lie_in_the_image_with_sides_of_a_pixel(small):
    samples = _samples([20, 3])
    samples[0]["instances"].gt_boxes.tensor[:10] = torch.tensor([5.0, 5.0, 6.0, 6.0])
    targets = small._targets(samples, torch.zeros(()))
    truth = torch.cat([target["boxes"] for target in targets])
    centres = (truth[:, 2:] + truth[:, :2]) / 2
    for sample, target in zip(samples, targets, strict=True):
        boxes, (height, width) = target["noised"], sample["image"].shape[-2:]
        assert len(boxes) == len(target["objects"])
        assert (boxes >= 0).all() and (boxes <= torch.tensor([width, height] * 2)).all()
        assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
        own = centres[target["objects"]]  # a shift of 0.4 of half a side keeps it inside
        assert ((boxes[:, :2] <= own) & (own <= boxes[:, 2:])).all()
    assert len(targets[0]["noised"]) < 200  # some fell below a pixel
    assert len(targets[1]["noised"]) == 30


def test_classes_can_be_denoised_too(small):
    small.denoise_classes = True
    losses = small.train()(_samples([3]))
    assert losses["loss_classifier_dn"] > 0
    assert small(_samples([0]))["loss_classifier_dn"] == 0


def test_the_weight_of_denoising_is_a_factor_of_its_losses_alone(small):
    found = []
    for small.denoising_weight in (1.0, 0.25):
        torch.manual_seed(0)
        found.append(small.train()(_samples([3])))
    quarter = {name: 0.25 if name.endswith("_dn") else 1.0 for name in found[0]}
    assert found[1] == {name: value * quarter[name] for name, value in found[0].items()}


def test_nothing_is_noised_in_evaluation(small):
    with torch.no_grad():
        found = small.eval()(_samples([3]))
        small.denoising = None
        again = small(_samples([3]))
    first, second = found[0]["instances"], again[0]["instances"]
    assert torch.equal(first.pred_boxes.tensor, second.pred_boxes.tensor)


def test_thousands_of_objects_have_finite_gradients(small):
    losses = small.train()(_samples([2000]))
    assert small.count_objects(_samples([2000])).denoising == small.denoising.max_queries == 500
    sum(losses.values()).backward()
    for name, parameter in small.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("counts", [[2, 3], [0, 4], [0, 0]])
@pytest.mark.usefixtures("first_samples")
def test_losses_of_a_batch_are_those_of_its_images_one_by_one(small, counts):
    samples = [make_sample(64, 96, n, seed) for seed, n in enumerate(counts)]
    small.train()
    total = mean_over_ranks(small.count_objects(samples), torch.device("cpu"))
    together = small(samples, total)
    alone = [small([sample], total) for sample in samples]
    for name, value in together.items():
        assert sum(a[name] for a in alone).item() == pytest.approx(value.item(), rel=1e-4), name


def test_coco_rows_go_to_classes_by_name_and_others_are_re_initialised():
    theirs, _ = _pair("faster_rcnn_mobilenet_v3_fpn_26ep", 10)
    theirs.roi_heads.box_predictor = detection.faster_rcnn.FastRCNNPredictor(1024, 91)
    cfg = get_config("faster_rcnn_mobilenet_v3_fpn_26ep").model
    cfg.num_classes = 3
    ours = instantiate(cfg)
    before = copy.deepcopy(ours.roi_heads.box_predictor)
    names = ["something new", "car", "person"]
    report = load_tensors(ours, theirs.state_dict(), class_names=names, fine_tune=True)
    assert report.mapped_classes == ("car", "person")
    head, source = ours.roi_heads.box_predictor, theirs.roi_heads.box_predictor
    for ours_row, row in ((1, 3), (2, 1), (3, 0)):  # car, person, background
        assert torch.equal(head.class_embed.weight[ours_row], source.cls_score.weight[row])
        assert torch.equal(head.class_embed.bias[ours_row], source.cls_score.bias[row])
    assert torch.equal(head.class_embed.weight[0], before.class_embed.weight[0])
    assert torch.equal(head.box_embed.weight[1], source.bbox_pred.weight[12:16])
    assert torch.equal(head.box_embed.bias[0], before.box_embed.bias[0])


@pytest.mark.parametrize(
    ("name", "build"), [("resnet18", resnet18), ("mobilenet_v3_large", mobilenet_v3_large)]
)
def test_the_body_starts_from_weights_of_torchvision(name, build, tmp_path):
    torch.manual_seed(0)
    source = build(weights=None)
    torch.save(source.state_dict(), tmp_path / "body.pth")
    backbone = PyramidBackbone(name, weights=str(tmp_path / "body.pth"))
    assert backbone.load_pretrained()
    assert torch.equal(
        next(backbone.body.parameters()), next(p for p in source.parameters() if p.dim() == 4)
    )


@pytest.mark.parametrize("arguments", [{"name": "vgg16"}, {"batch_norm": "none"}])
def test_a_backbone_that_torchvision_has_not_is_refused(arguments):
    with pytest.raises(ValueError, match="choose from"):
        PyramidBackbone(**arguments)


def test_a_box_without_area_is_refused_with_the_image(small):
    (sample,) = _samples([2])
    sample["instances"].gt_boxes.tensor[1, 2] = sample["instances"].gt_boxes.tensor[1, 0]
    with pytest.raises(ValueError, match="image 0: a box without area"):
        small.train()([sample])


def test_a_single_class_and_a_single_noised_box_are_enough():
    cfg = small_model_config("digits_dn_faster_rcnn")
    cfg.num_classes = cfg.denoising.num_groups = cfg.denoising.max_queries = 1
    model = instantiate(cfg)
    losses = model([make_sample(64, 96, 3, 0, num_classes=1)])
    assert all(torch.isfinite(value) for value in losses.values()) and losses["loss_box_reg_dn"] > 0
    with pytest.raises(ValueError, match=r"do not lie in \[0, 1\); set model\.num_classes"):
        model([make_sample(64, 96, 3, 0)])


def test_a_wrong_number_of_classes_is_refused():
    cfg = get_config("digits_dn_faster_rcnn").model
    cfg.denoising.num_classes = 9
    with pytest.raises(ValueError, match="of the denoising"):
        instantiate(cfg)


@pytest.mark.parametrize(
    ("name", "drops"), [("r50_fpn_12ep", [8, 11]), ("mobilenet_v3_fpn_26ep", [16, 22])]
)
def test_the_recipe_is_the_usual_one(name, drops):
    cfg = get_config(f"faster_rcnn_{name}")
    optimizer = cfg.optimizer
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (0.02, 0.9, 1e-4)
    assert list(cfg.lr_schedule.milestones) == drops and cfg.lr_schedule.gamma == 0.1
    assert cfg.dataloader.train.total_batch_size == 16 and cfg.train.clip_grad.max_norm is None
