"""Batches come out of a worker as they went in, in one piece of shared memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torchvision.tv_tensors import Mask

from dn_detr.data import CocoDetection, DatasetError
from dn_detr.data.packing import pack, unpack

TENSORS = [
    torch.arange(5, dtype=torch.uint8),
    torch.tensor([True, False, True]),
    torch.tensor(3.5, dtype=torch.float64),
    torch.arange(12.0).reshape(3, 4).t()[1:],
    torch.randn(3, 2).bfloat16(),
    torch.zeros(0, 4),
    torch.tensor([2**40, -1]),
    torch.complex(torch.ones(2), torch.zeros(2)),
    Mask(torch.ones(1, 2, 2, dtype=torch.uint8)),
]


def test_tensors_keep_numbers_type_and_shape() -> None:
    for tensor, copy in zip(TENSORS, unpack(pack(TENSORS)), strict=True):
        assert type(copy) is type(tensor) and copy.dtype == tensor.dtype
        assert torch.equal(copy, tensor)


def test_samples_keep_everything(dataset: CocoDetection):
    samples = [dataset[0], dataset[1] | {"depth": np.arange(3), "note": ("a", None)}]
    for sample, copy in zip(samples, unpack(pack(samples)), strict=True):
        assert copy.keys() == sample.keys()
        assert torch.equal(copy["image"], sample["image"])
        ours, theirs = sample["instances"], copy["instances"]
        assert theirs.image_size == ours.image_size and len(theirs) == len(ours)
        assert torch.equal(theirs.gt_boxes.tensor, ours.gt_boxes.tensor)
        assert torch.equal(theirs.gt_ids, ours.gt_ids)
    assert copy["note"] == ("a", None) and copy["depth"].tolist() == [0, 1, 2]


def test_a_batch_is_one_piece_of_memory(dataset: CocoDetection):
    batch = unpack(pack([dataset[0], dataset[1]]))
    tensors = [batch[0]["image"], batch[1]["image"], batch[1]["instances"].gt_boxes.tensor]
    assert all(tensor.is_shared() for tensor in tensors)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


def test_memory_that_is_not_there_is_an_error_with_the_remedy(monkeypatch: pytest.MonkeyPatch):
    def full(tensor: torch.Tensor) -> Any:
        raise RuntimeError("unable to allocate shared memory: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(DatasetError, match=r"batch of 2 MiB.*No space left.*Enlarge /dev/shm"):
        pack([torch.zeros(2 * 2**20, dtype=torch.uint8)])
