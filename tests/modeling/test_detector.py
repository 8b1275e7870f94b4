"""The detector as a whole: protocol, padding, gradients, and what denoising must not change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dn_detr.config import ConfigError, instantiate
from dn_detr.structures import Boxes, Instances

from .conftest import make_sample

SIZES = [(75, 110), (128, 64), (33, 47)]


def _total(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(losses.values())).sum()


def _copy_content(source: Any, target: Any) -> None:
    """Give a detector without indicator the weights of one with it, indicator channel 0."""
    state = source.state_dict()
    content = state["queries.content.weight"]
    state["queries.content.weight"] = torch.cat([content, torch.zeros(len(content), 1)], dim=1)
    target.load_state_dict(
        {k: v for k, v in state.items() if not k.startswith("denoising.")}, strict=True
    )


@pytest.mark.parametrize("option", ["backbone", "neck", "decoder"])
def test_the_published_treatment_of_padding_does_depend_on_it(option, small_config):
    """Each of the three published variants is really what makes the difference."""
    if option == "decoder":
        small_config.transformer.decoder.padded_query_pos = True
    else:
        small_config[option].mask_padding = False
    torch.manual_seed(0)
    model = instantiate(small_config).eval()
    images, mask = model.preprocess([make_sample(75, 110, 0, 0)])
    wider = torch.nn.functional.pad(images, (0, 53, 0, 97))
    wider_mask = torch.nn.functional.pad(mask, (0, 53, 0, 97), value=True)
    with torch.no_grad():
        tight, loose = model.forward_tensors(images, mask), model.forward_tensors(wider, wider_mask)
    assert (tight["pred_logits"] - loose["pred_logits"]).abs().max() > 1e-4


def test_without_denoising_the_loss_is_that_of_dab_deformable_detr_to_the_bit(small, small_config):
    """DAB's queries have 256 learned channels; DN's have 255 and an indicator that is 0."""
    small_config.denoising = None
    small_config.queries.indicator = False
    dab = instantiate(small_config)
    _copy_content(small, dab)
    small.denoising = None
    samples = [make_sample(64, 80, n, n) for n in (2, 3)]
    ours, theirs = small(samples), dab(samples)
    assert {k: v.item() for k, v in ours.items()} == {k: v.item() for k, v in theirs.items()}


def test_detections_lie_in_the_original_image_and_are_sorted(small):
    sample = make_sample(64, 80, 0, 0)
    small.eval()
    with torch.no_grad():
        raw = small.forward_tensors(*small.preprocess([sample]))
        found = small([sample])[0]["instances"]
    assert found.image_size == (128, 160)
    assert (found.scores.diff() <= 0).all()
    best = raw["pred_logits"][0].flatten().argmax()
    cx, cy, w, h = (raw["pred_boxes"][0, best // 10] * torch.tensor([160, 128, 160, 128])).tolist()
    expected = torch.tensor([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    torch.testing.assert_close(found.pred_boxes.tensor[0], expected)
    assert found.pred_classes[0] == best % 10


def test_detectron2_style_instances_are_accepted(small):
    class TheirBoxes:
        def __init__(self, tensor):
            self.tensor = tensor

    class TheirInstances:
        def __init__(self, boxes, classes):
            self.gt_boxes, self.gt_classes = TheirBoxes(boxes), classes

    ours = make_sample(64, 80, 3, 0)
    theirs = dict(ours)
    fields = ours["instances"]
    theirs["instances"] = TheirInstances(fields.gt_boxes.tensor, fields.gt_classes)
    assert _total(small([ours])) == _total(small([theirs]))


def test_normalisation_is_that_of_imagenet(small):
    images, mask = small.preprocess([make_sample(8, 8, 0, 0)])
    pixels = make_sample(8, 8, 0, 0)["image"].double() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (pixels - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(images[0].double(), expected, rtol=0, atol=1e-5)
    assert not mask.any()


def test_class_outside_the_model_is_named_with_its_image(small):
    sample = make_sample(64, 80, 1, 0)
    sample["file_name"] = "cat.jpg"
    sample["instances"].gt_classes = torch.tensor([10])
    with pytest.raises(ValueError, match=r"cat\.jpg.*\[10\].*num_classes"):
        small([sample])


def test_targets_are_centres_and_sizes_relative_to_the_image(small):
    sample = make_sample(50, 200, 1, 0)  # height, width
    sample["instances"].gt_boxes = Boxes([[20, 10, 60, 40]])
    (target,) = small.prepare_targets([sample])
    torch.testing.assert_close(target["boxes"], torch.tensor([[0.2, 0.5, 0.2, 0.6]]))


@pytest.mark.parametrize(
    ("box", "classes", "complaint"),
    [
        ([60, 10, 20, 40], [1], "x1 <= x2"),
        ([20, 40, 60, 10], [1], "y1 <= y2"),
        ([20, float("nan"), 60, 10], [1], "finite"),
        ([20, 10, float("inf"), 40], [1], "finite"),
        ([20, 10, 60, 40], [1, 2], "1 boxes, 2 classes"),
    ],
)
def test_impossible_ground_truth_is_named_with_its_image(small, box, classes, complaint):
    class TheirInstances:
        gt_boxes, gt_classes = torch.tensor([box], dtype=torch.float32), torch.tensor(classes)

    sample = make_sample(50, 200, 1, 0) | {"file_name": "cat.jpg", "instances": TheirInstances()}
    with pytest.raises(ValueError, match=rf"cat\.jpg.*{complaint}"):
        small([sample])


@pytest.mark.parametrize("part", ["heads", "denoising"])
def test_number_of_classes_of_every_part_must_agree(part, small_config):
    small_config[part].num_classes = 3
    with pytest.raises(ConfigError, match=r"num_classes is 10.*has 3"):
        instantiate(small_config)


def test_training_without_ground_truth_is_refused(small):
    sample = make_sample(64, 80, 1, 0)
    del sample["instances"]
    with pytest.raises(ValueError, match="ground truth"):
        small([sample])


@pytest.mark.parametrize(
    "image", [torch.zeros(1, 8, 8), torch.zeros(8, 8), torch.zeros(3, 0, 8, dtype=torch.uint8)]
)
def test_image_of_another_shape_is_refused(small, image):
    with pytest.raises(ValueError, match=r"\(3, H, W\)"):
        small.preprocess([{"image": image, "image_id": 5}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_strides": [8, 32]}, r"strides \[8, 16\], the neck expects \[8, 32\]"),
        ({"in_channels": [128, 512]}, r"channels \[128, 256\], the neck expects \[128, 512\]"),
        ({"in_strides": [8]}, "one per map"),
    ],
)
def test_the_neck_must_expect_the_maps_of_the_backbone(change, message, small_config):
    small_config.neck.update(change)
    with pytest.raises(ConfigError, match=message):
        instantiate(small_config)


@pytest.mark.parametrize("change", [{"in_channels": [128, 512]}, {"in_strides": [8, 32]}])
def test_maps_of_a_backbone_that_does_not_say_its_channels_are_compared_too(change, small_config):
    maps = instantiate(small_config.backbone)(torch.zeros(1, 3, 64, 80), torch.zeros(1, 64, 80) > 0)
    small_config.neck.update(change)
    with pytest.raises(ValueError, match=r"\(128, 8, 10\), \(256, 4, 5\).*set model.neck.in_"):
        instantiate(small_config.neck)(maps, torch.zeros(1, 64, 80) > 0)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.zeros(3, 64, 80), "takes a list of samples"),
        ({"image": torch.zeros(3, 64, 80)}, "takes a list of samples"),
        ([torch.zeros(3, 64, 80)], "takes a list of samples"),
        ([], "no sample"),
        ([{"image": np.zeros((3, 64, 80))}], "must be a tensor, is ndarray"),
        ([{"image": torch.rand(3, 64, 80)}], r"must hold \[0, 255\]"),
    ],
)
def test_what_is_no_batch_is_refused(samples, message, small):
    with pytest.raises(ValueError, match=message):
        small.eval()(samples)


def test_a_black_float_image_is_an_image(small):
    assert len(small.eval()([{"image": torch.zeros(3, 64, 80)}])) == 1


def test_a_model_without_classes_is_refused(small_config):
    small_config.num_classes = 0
    with pytest.raises(ConfigError, match="num_classes 0 must be at least 1"):
        instantiate(small_config)


def test_number_of_patterns_must_agree(small_config):
    small_config.num_patterns = 2
    small_config.queries.num_patterns = 3
    with pytest.raises(ConfigError, match="num_patterns is 2, AnchorQueries has 3"):
        instantiate(small_config)


def test_number_of_queries_must_agree(small_config):
    small_config.queries.num_queries = 7
    with pytest.raises(ConfigError, match="num_queries is 30, AnchorQueries has 7"):
        instantiate(small_config)


def test_empty_boxes_object_is_fine(small):
    sample = make_sample(64, 80, 0, 0)
    sample["instances"] = Instances(
        (64, 80), gt_boxes=Boxes([]), gt_classes=torch.zeros(0, dtype=torch.long)
    )
    assert _total(small([sample])).isfinite()
