"""A process whose images show no object neither hangs the others nor spoils their steps (gloo)."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dn_detr.modeling import ObjectCounts, mean_over_ranks

from .conftest import away_from_initialisation, make_sample, small_model_config

pytestmark = pytest.mark.slow  # the fast tests have one model of these, see test_distributed.py

DETR_LIKE = [
    "dn_detr_r50",
    "dn_deformable_detr_r50",
    "dino_r50",
    "digits_dn_vanilla_detr",
    "digits_dn_anchor_detr",
    "digits_dn_conditional_detr",
    "digits_deformable_detr_two_stage",
]
MODELS = [*DETR_LIKE, "digits_dn_faster_rcnn"]
# Steps: one process without objects, both, and again some, which a process left behind would miss.
COUNTS = {"one rank without": (3, 0), "both without": (0, 0), "the other without": (0, 2)}
OBJECTS = ((2, 0), (0, 0), (1, 4), (0, 3))  # of one accumulated step: objects on each rank
RECOMPUTED = dict.fromkeys(("backbone", "encoder", "decoder"), True)
CASES = [
    (name, case, recompute)
    for name in MODELS
    for recompute in ((False, True) if name in DETR_LIKE else (False,))
    for case in COUNTS
]
Record = dict[str, Any]


def _losses_and_gradients(model: Any, detector: Any, batches: list[Any], counts: Any) -> Record:
    """A step whose gradients are exchanged once, after its last batch."""
    model.zero_grad()
    totals: list[Tensor] = []
    for index, batch in enumerate(batches):
        model.require_backward_grad_sync = index == len(batches) - 1
        losses = model(batch, counts)
        totals.append(torch.stack(list(losses.values())).sum())
        totals[-1].backward()
    gradients = {n: p.grad.clone() for n, p in detector.named_parameters() if p.requires_grad}
    return {"loss": torch.stack(totals).sum().detach(), "gradients": gradients}


def _train(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=30),  # a process that waits for ever fails
    )
    records = {}
    for name in MODELS:
        detector = away_from_initialisation(small_model_config(name)).double()
        model = DistributedDataParallel(detector)
        for case, recompute in (rest for of, *rest in CASES if of == name):
            if recompute:
                detector.checkpoint_activations(**RECOMPUTED)
            batches = [[make_sample(48, 64, COUNTS[case][rank], rank)]]
            record = _losses_and_gradients(model, detector, batches, None)
            records[name, case, recompute] = record
        batches = [[make_sample(48, 64, n[rank], 2 * i + rank)] for i, n in enumerate(OBJECTS)]
        own = sum((detector.count_objects(batch) for batch in batches), ObjectCounts())
        divisors = mean_over_ranks(own, torch.device("cpu"))
        record = _losses_and_gradients(model, detector, batches, divisors)
        records[name, "accumulated", True] = record
    torch.save(records, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> tuple[Record, Record]:
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(
        _train, (str(folder / "store"), str(folder)), nprocs=2, start_method="forkserver"
    )
    return torch.load(folder / "0.pt"), torch.load(folder / "1.pt")


@pytest.mark.parametrize(("name", "case", "recompute"), CASES)
def test_a_rank_without_objects_takes_part_in_the_step(name, case, recompute, records):
    first, second = (record[name, case, recompute] for record in records)
    assert first["loss"].isfinite() and second["loss"].isfinite()
    assert first["gradients"].keys() == second["gradients"].keys()
    for parameter, gradient in first["gradients"].items():
        assert gradient.isfinite().all(), parameter
        assert torch.equal(gradient, second["gradients"][parameter]), parameter
    assert any(gradient.any() for gradient in first["gradients"].values())


@pytest.mark.parametrize("name", DETR_LIKE)  # Faster R-CNN samples regions of each process
def test_steps_of_micro_batches_over_two_processes_are_that_of_one_batch(name, records):
    """2 processes x 4 micro-batches equal one process with all 8 images."""
    detector = away_from_initialisation(small_model_config(name)).double()
    samples = [
        make_sample(48, 64, n[rank], 2 * i + rank) for i, n in enumerate(OBJECTS) for rank in (0, 1)
    ]
    whole = _losses_and_gradients(detector, detector, [samples], None)
    first, second = (record[name, "accumulated", True] for record in records)
    torch.testing.assert_close(
        (first["loss"] + second["loss"]) / 2, whole["loss"], rtol=1e-6, atol=0
    )
    scale = max(gradient.abs().max() for gradient in whole["gradients"].values())
    for parameter, gradient in whole["gradients"].items():
        difference = (first["gradients"][parameter] - gradient).abs().max()
        # The divisor of several processes is a float32.
        assert difference < 1e-6 * scale, parameter
