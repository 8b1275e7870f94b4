"""A detector, data and an evaluator that follow the project's protocols and run in milliseconds."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dn_detr.distributed import all_gather, rank
from dn_detr.modeling.detector import Diagnostics
from dn_detr.structures import Boxes, Instances

from .pausing import pause_at

SIZE = 16


class TinyDataset(Dataset):
    """Images with one bright rectangle each; loading one is a place to pause: "image of epoch N".

    Another one, "start", is making the data set.

    Args:
        length: number of images.
        num_classes: the class is the index of the image modulo this.
    """

    def __init__(self, length: int = 12, num_classes: int = 2) -> None:
        self.image_ids = list(range(1, length + 1))
        self.class_names = [f"class{i}" for i in range(num_classes)]
        self.category_ids = list(range(1, num_classes + 1))
        self.annotation_file = Path("tiny.json")
        self.num_boxes = length
        pause_at("start")

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if index >= len(self):
            raise IndexError(index)
        pause_at(f"image of epoch {epoch}")
        generator = torch.Generator().manual_seed(1000 * epoch + index)
        x, y = torch.randint(0, SIZE // 2, (2,), generator=generator).tolist()
        box_xyxy = torch.tensor([[x, y, x + SIZE // 2, y + SIZE // 2]], dtype=torch.float32)
        image = torch.zeros(3, SIZE, SIZE, dtype=torch.uint8)
        image[:, y : y + SIZE // 2, x : x + SIZE // 2] = 200
        return {
            "image": image,
            "height": SIZE,
            "width": SIZE,
            "image_id": self.image_ids[index],
            "file_name": f"images/{index}.jpg",
            "seed": index + 7 * epoch,
            "instances": Instances(
                (SIZE, SIZE),
                gt_boxes=Boxes(box_xyxy),
                gt_classes=torch.tensor([index % len(self.class_names)]),
                gt_ids=torch.tensor([index]),
            ),
        }

    def subset(self, length: int) -> TinyDataset:
        return TinyDataset(length, len(self.class_names))


class TinyDetector(nn.Module):
    """One box per image. It draws from the global generator (dropout), as a real one may.

    Its Nth training step in a process is a place to pause, "step N".

    Args:
        num_classes: number of classes.
        dropout: probability; with 0 nothing is random.
        nan_at: the training step at which the loss is NaN on process `nan_rank`.
        nan_rank: see `nan_at`.
    """

    def __init__(
        self,
        num_classes: int = 2,
        dropout: float = 0.1,
        nan_at: int = -1,
        nan_rank: int = 0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten())
        self.norm = nn.LayerNorm(196)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(196, 4 + num_classes)
        self.register_buffer("scale", torch.tensor(255.0))
        self.nan_at, self.nan_rank = nan_at, nan_rank
        self.steps = 0
        self.diagnostics: Diagnostics | None = None

    def forward(self, samples: Sequence[Mapping[str, Any]]) -> Any:
        device = self.scale.device
        images = torch.stack([sample["image"] for sample in samples]).to(device) / self.scale
        output = self.head(self.dropout(self.norm(self.backbone(images))))
        boxes_norm, logits = output[:, :4].sigmoid(), output[:, 4:]
        return (
            self._losses(samples, boxes_norm, logits)
            if self.training
            else [
                self._instances(boxes, scores)
                for boxes, scores in zip(boxes_norm, logits.softmax(-1), strict=True)
            ]
        )

    def _losses(
        self, samples: Sequence[Mapping[str, Any]], boxes_norm: Tensor, logits: Tensor
    ) -> dict[str, Tensor]:
        self.steps += 1
        pause_at(f"step {self.steps}")
        targets = [sample["instances"].to(logits.device) for sample in samples]
        boxes = torch.stack([target.gt_boxes.tensor[0] for target in targets]) / SIZE
        classes = torch.cat([target.gt_classes for target in targets])
        # The largest coordinate stands for the query that was matched.
        queries = tuple(boxes_norm.detach().argmax(1, keepdim=True).cpu())
        correct = (logits.argmax(1) == classes).sum()
        self.diagnostics = Diagnostics(queries, correct, len(samples))
        loss_class = nn.functional.cross_entropy(logits, classes)
        if self.steps == self.nan_at and rank() == self.nan_rank:
            loss_class = loss_class * float("nan")
        return {"loss_class": loss_class, "loss_bbox": 5 * (boxes_norm - boxes).abs().mean()}

    def _instances(self, boxes_norm: Tensor, scores: Tensor) -> dict[str, Instances]:
        score, label = scores.max(-1, keepdim=True)
        boxes = Boxes((boxes_norm * SIZE)[None])
        return {
            "instances": Instances((SIZE, SIZE), pred_boxes=boxes, scores=score, pred_classes=label)
        }


class TinyEvaluator:
    """Its AP is a number that depends on every prediction; it logs it, as evaluators do.

    The first predictions of the Nth evaluation of a process are a place to pause, "evaluation N".
    """

    evaluations = 0

    def reset(self, dataset: Dataset) -> None:
        self.scores: dict[int, float] = {}
        self.evaluations += 1

    def process(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        pause_at(f"evaluation {self.evaluations}")
        for sample, output in zip(inputs, outputs, strict=True):
            instances = output["instances"]
            total = instances.scores.double().sum() + instances.pred_boxes.tensor.double().sum()
            self.scores[sample["image_id"]] = float(total)

    def evaluate(self) -> dict[str, Any] | None:
        merged = {key: value for scores in all_gather(self.scores) for key, value in scores.items()}
        if rank() != 0:
            return None
        mean = sum(merged[key] for key in sorted(merged)) / len(merged)
        logging.getLogger("dn_detr.tests").info("evaluation: AP %r", mean)
        return {"AP": mean, "AP50": -1.0, "per_class": {"class0": mean / 2, "class1": mean / 3}}
