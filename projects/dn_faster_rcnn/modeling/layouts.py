"""Names of tensors in torchvision's Faster R-CNN, https://github.com/pytorch/vision."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from dn_detr.checkpoint import Layout
from dn_detr.checkpoint.coco_classes import COCO_IDS, NUM_ID_ROWS
from dn_detr.checkpoint.layouts.layout import Pairs

_BOX = "roi_heads.box_"


class TorchvisionDetectorLayout(Layout):
    """The names of torchvision's Faster R-CNN, and of its MobileNets: row 0 is the background's.

    91 rows are COCO's category ids, of which 80 are classes; of other numbers of rows, class k has
    row k + 1. (The ten ids without a class are dropped: training has seen none of them, so what
    they take from the scores of the others is next to nothing.)
    """

    name = "torchvision detector"
    is_coco = True

    def pairs(self, names: Collection[str]) -> Pairs:
        """See `Layout.pairs`."""
        return [
            (_BOX + "predictor.class_embed.*", _BOX + "predictor.cls_score.*"),
            (_BOX + "predictor.box_embed.*", _BOX + "predictor.bbox_pred.*"),
            *((f"{_BOX}head.{i}.*", f"{_BOX}head.fc{j}.*") for i, j in ((1, 6), (3, 7))),
            *((f"{part}.*", f"{part}.*") for part in ("backbone", "rpn", "roi_heads")),
            ("backbone.body.*", "features.*"),
        ]

    def arrange(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `Layout.arrange`: the background is our last row, and boxes have none for it."""
        for kind in ("weight", "bias"):
            scores = tensors.get(f"{_BOX}predictor.cls_score.{kind}")
            boxes = tensors.get(f"{_BOX}predictor.bbox_pred.{kind}")
            if scores is None or boxes is None or len(boxes) != 4 * len(scores):
                continue  # reported as missing or mis-shaped
            rows = list(COCO_IDS if len(scores) == NUM_ID_ROWS else range(1, len(scores)))
            tensors[f"{_BOX}predictor.cls_score.{kind}"] = scores[[*rows, 0]]
            tensors[f"{_BOX}predictor.bbox_pred.{kind}"] = boxes.unflatten(0, (-1, 4))[rows]
        return tensors
