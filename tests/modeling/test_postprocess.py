"""From raw predictions to detections."""

from __future__ import annotations

import pytest
import torch

from dn_detr.modeling import PostProcess, SoftmaxClassification


def _raw() -> dict[str, torch.Tensor]:
    logits = torch.tensor([[[0.0, 3.0], [2.0, -1.0], [-5.0, 1.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.5, 0.2], [0.9, 0.9, 0.4, 0.4]]])
    return {"pred_logits": logits, "pred_boxes": boxes}


def test_best_pairs_of_query_and_class_are_kept_in_order():
    (found,) = PostProcess(3)(_raw(), [(100, 200)])
    assert found.pred_classes.tolist() == [1, 0, 1]
    torch.testing.assert_close(found.scores, torch.tensor([3.0, 2.0, 1.0]).sigmoid())
    expected = [[0, 0, 200, 100], [0, 40, 100, 60], [140, 70, 220, 110]]  # not clipped
    torch.testing.assert_close(found.pred_boxes.tensor, torch.tensor(expected).float())


def test_a_query_may_appear_with_two_classes():
    (found,) = PostProcess(4)(_raw(), [(100, 200)])
    torch.testing.assert_close(found.pred_boxes.tensor[0], found.pred_boxes.tensor[3])


def test_fewer_pairs_than_wanted_are_all_kept():
    (found,) = PostProcess(100)(_raw(), [(10, 10)])
    assert len(found) == 6


def test_softmax_gives_each_query_its_likeliest_class_but_nothing():
    outputs = _raw()
    nothing = torch.tensor([9.0, 0.0, 0.0])[None, :, None]
    outputs["pred_logits"] = torch.cat([outputs["pred_logits"], nothing], dim=-1)
    (found,) = PostProcess(2, SoftmaxClassification())(outputs, [(100, 200)])
    assert found.pred_classes.tolist() == [0, 1]
    expected = torch.stack([torch.tensor(x).softmax(0).max() for x in ([2.0, -1, 0], [-5.0, 1, 0])])
    torch.testing.assert_close(found.scores, expected)


@pytest.mark.parametrize("num_select", [0, -1])
def test_a_detector_that_would_detect_nothing_is_refused(num_select):
    with pytest.raises(ValueError, match=f"num_select {num_select} must be at least 1"):
        PostProcess(num_select)
