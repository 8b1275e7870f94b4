"""A step over two processes is the step of one process on all images (gloo, CPU)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from dn_detr.config import get_config, instantiate
from dn_detr.modeling import Detector

from .conftest import make_sample

# Of two images: different numbers of boxes, one without boxes, none at all, and fewer than ranks.
COUNTS = [(3, 1), (4, 0), (0, 0), (0, 1)]


def _step(model: Any, samples: list[dict[str, Any]]) -> None:
    losses = model(samples)
    torch.stack(list(losses.values())).sum().backward()


def _rank_step(rank: int, cfg: Any, state: Any, store: str, out: str, cases: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    detector = instantiate(cfg).double()
    detector.load_state_dict(state)
    model = DistributedDataParallel(detector)
    gradients = []
    for counts in cases:
        model.zero_grad()
        _step(model, [make_sample(64, 80 + 16 * rank, counts[rank], rank)])
        gradients.append({n: p.grad.clone() for n, p in detector.named_parameters()})
    if rank == 0:
        torch.save(gradients, out)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def gradients_of_two_processes(tmp_path_factory) -> tuple[Detector, list[dict[str, Any]]]:
    cfg = get_config("digits_dn_deformable_detr.py").model
    cfg.backbone.batch_norm = "frozen"
    torch.manual_seed(0)
    detector: Detector = instantiate(cfg).double()  # rounding must not hide a difference
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    folder: Path = tmp_path_factory.mktemp("two_processes")
    out = folder / "gradients.pt"
    arguments = (cfg, detector.state_dict(), str(folder / "store"), str(out), COUNTS)
    mp.start_processes(_rank_step, arguments, nprocs=2, start_method="forkserver")
    return detector, torch.load(out)


@pytest.mark.parametrize("case", range(len(COUNTS)), ids=[str(c) for c in COUNTS])
def test_gradients_are_those_of_one_process_on_both_images(case, gradients_of_two_processes):
    detector, of_two = gradients_of_two_processes
    detector.zero_grad()
    _step(detector, [make_sample(64, 80 + 16 * i, n, i) for i, n in enumerate(COUNTS[case])])
    for name, parameter in detector.named_parameters():
        # Positions of cells are float32, and padding changes how they round.
        difference = (of_two[case][name] - parameter.grad).norm().item()
        assert difference <= 1e-5 * parameter.grad.norm().item(), name
