from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from dn_detr.data import CocoDetection, build_test_loader
from dn_detr.engine import evaluate_model
from dn_detr.evaluation import CocoEvaluator
from dn_detr.structures import Boxes, Instances


class Oracle(torch.nn.Module):
    """Answers with the ground truth, and remembers how it was called."""

    def __init__(self, dataset: CocoDetection) -> None:
        super().__init__()
        self.dataset = dataset
        self.modes: set[tuple[bool, bool]] = set()

    def forward(self, samples: list[dict[str, Any]]) -> list[dict[str, Instances]]:
        self.modes.add((self.training, torch.is_grad_enabled()))
        return [{"instances": self.answer(sample["image_id"])} for sample in samples]

    def answer(self, image_id: int) -> Instances:
        truth = [a for a in self.dataset.coco.imgToAnns[image_id] if not a["iscrowd"]]
        boxes_xyxy = torch.tensor([a["bbox"] for a in truth], dtype=torch.float32).reshape(-1, 4)
        boxes_xyxy[:, 2:] += boxes_xyxy[:, :2]
        classes = [self.dataset.category_ids.index(a["category_id"]) for a in truth]
        return Instances(
            (1, 1),
            pred_boxes=Boxes(boxes_xyxy),
            scores=torch.linspace(0.9, 0.1, len(truth)),
            pred_classes=torch.tensor(classes, dtype=torch.int64),
        )


def write_data(root: Path) -> None:
    """Four black images with six objects of one class."""
    image_ids = [3, 7, 12, 40]
    for id_ in image_ids:
        Image.new("RGB", (400, 400)).save(root / f"{id_}.jpg")
    content = {
        "images": [
            {"id": id_, "file_name": f"{id_}.jpg", "width": 400, "height": 400} for id_ in image_ids
        ],
        "annotations": [
            {"id": id_, "image_id": image_id, "category_id": 5, "bbox": [10 * id_, 20, 40, 30]}
            for id_, image_id in enumerate([3, 3, 7, 12, 40, 40], start=1)
        ],
        "categories": [{"id": 5, "name": "five"}],
    }
    (root / "instances.json").write_text(json.dumps(content))


def open_data(root: Path, limit: int) -> CocoDetection:
    return CocoDetection(root, root / "instances.json", train=False).subset(limit)


@pytest.mark.parametrize("training", [True, False])
def test_inference_runs_without_gradients_and_restores_the_mode(
    tmp_path: Path, training: bool
) -> None:
    write_data(tmp_path)
    dataset = open_data(tmp_path, 4)
    model = Oracle(dataset).train(training)
    loader = build_test_loader(dataset, 3, num_workers=0)
    assert evaluate_model(model, loader, CocoEvaluator())["AP"] == pytest.approx(1)
    assert model.modes == {(False, False)}
    assert model.training is training


def _evaluate_on_rank(rank: int, root: Path, limits: list[int]) -> None:
    store = f"file://{root / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    outcomes = [_evaluate_share(root, limit) for limit in limits]
    (root / f"rank{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


def _evaluate_share(root: Path, limit: int) -> dict[str, Any]:
    dataset = open_data(root, limit)
    oracle, evaluator = Oracle(dataset), CocoEvaluator()
    evaluator.reset(dataset)
    share = list(build_test_loader(dataset, num_workers=0).sampler)
    for index in share:
        samples = [{"image_id": dataset.image_ids[index]}]
        evaluator.process(samples, oracle(samples))
    if dist.get_rank() == 1:  # an image of rank 0 again, with nothing found in it
        nothing = [{"instances": oracle.answer(image_id=-1)}]
        evaluator.process([{"image_id": dataset.image_ids[0]}], nothing)
    return {"metrics": evaluator.evaluate(), "share": share}


def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    limits, shares = [4, 1], [[[0, 2], [0]], [[1, 3], []]]
    write_data(tmp_path)
    alone = [evaluate_oracle(open_data(tmp_path, limit)) for limit in limits]
    mp.start_processes(_evaluate_on_rank, (tmp_path, limits), nprocs=2, start_method="forkserver")
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [[o["metrics"] for o in rank] for rank in ranks] == [alone, [None, None]]
    assert [[o["share"] for o in rank] for rank in ranks] == shares


def evaluate_oracle(dataset: CocoDetection) -> dict[str, Any] | None:
    evaluator, oracle = CocoEvaluator(), Oracle(dataset)
    evaluator.reset(dataset)
    for image_id in dataset.image_ids:
        evaluator.process([{"image_id": image_id}], oracle([{"image_id": image_id}]))
    return evaluator.evaluate()
