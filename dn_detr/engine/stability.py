"""The instability of bipartite matching: which queries find another object than an epoch before.

Li et al., "DN-DETR", 2022 (https://arxiv.org/abs/2203.01305), section 3.3: in epoch i, V_n is the
object that query n of an image is matched to (-1: none), and the image's instability is the
number of queries whose V_n differs from epoch i - 1. It differs from the paper in one respect: the
paper looks at an image as a whole, here training crops remove objects from one epoch to the next.
That is no instability of the matching, so an image is judged by the objects of both epochs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import all_gather, is_distributed, is_main
from .metrics import Ratio
from .setup import LOGGER_NAME

_NOT_SEEN = -2  # less than what any object has that was seen, so a maximum over processes merges
_UNMATCHED = -1

logger = logging.getLogger(f"{LOGGER_NAME}.engine")


class MatchingStability:
    """Follows the query of every object of a data set from epoch to epoch.

    An image may be seen by another process in the next epoch, so the processes exchange what they
    saw when an epoch ends; the numbers do not depend on how many there are. It takes 8 bytes of
    memory per object.

    Args:
        num_boxes: M, objects of the training data.
    """

    def __init__(self, num_boxes: int) -> None:
        self._epoch: int | None = None
        self._previous = torch.full((num_boxes,), _NOT_SEEN, dtype=torch.int32)
        self._current = self._previous.clone()
        # changed queries, matched queries and images since the last row, of this process
        self._sums = torch.zeros(3, dtype=torch.int64)

    def begin_iteration(self, epoch: int) -> None:
        """Say which epoch the next batch belongs to; a collective call when a new one begins.

        Args:
            epoch: from 0; the same on all processes.
        """
        if epoch == self._epoch:
            return
        if self._epoch is not None:
            is_next = epoch == self._epoch + 1
            merged = _maximum_over_ranks(self._current)
            self._previous = merged if is_next else torch.full_like(merged, _NOT_SEEN)
            self._current = torch.full_like(merged, _NOT_SEEN)
        self._epoch = epoch

    def update(self, objects: Sequence[Tensor], queries: Sequence[Tensor]) -> None:
        """Add the matching of a batch of this process.

        Args:
            objects: per image (n,) int64 on the CPU, rows of its objects in the data set's table
                of boxes, in [0, M).
            queries: per image (n,) int64 on the CPU, the query that the last decoder layer matched
                to each of them; -1 for none.
        """
        for rows, now in zip(objects, queries, strict=True):
            before = self._previous[rows]
            # the maximum, because an image that fills up a batch may come twice in an epoch
            self._current[rows] = torch.maximum(self._current[rows], now.to(torch.int32))
            is_known = before != _NOT_SEEN
            if is_known.any():
                self._sums += _compare(before[is_known], now.to(torch.int32)[is_known])

    def ratios(self) -> dict[str, Ratio]:
        """Return this process's share of the numbers since the last call, and start anew.

        Returns:
            `matching/changed`: queries whose object changed over queries that were matched in
            either epoch, in [0, 1]. `matching/instability`: changed queries per image, the paper's
            measure. Images without an object of both epochs do not count, so there is nothing to
            merge in the first epoch.
        """
        changed, matched, images = self._sums.tolist()
        self._sums.zero_()
        return {
            "matching/changed": Ratio(changed, matched),
            "matching/instability": Ratio(changed, images),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what all processes saw, equal on all; a collective call."""
        return {
            "epoch": self._epoch,
            "previous": self._previous.clone(),
            "current": _maximum_over_ranks(self._current),
            "sums": torch.stack(all_gather(self._sums)).sum(0),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, with any number of processes.

        A state of other data is left aside with a warning: the diagnostic starts anew.
        """
        if len(state["previous"]) != len(self._previous):
            logger.warning(
                "matching stability starts anew: the checkpoint followed %d objects, the data "
                "have %d", len(state["previous"]), len(self._previous),
            )  # fmt: skip
            return
        self._epoch = state["epoch"]
        self._previous = state["previous"].clone()
        self._current = state["current"].clone()
        if is_main():  # a sum of all processes, so one has it
            self._sums = state["sums"].clone()


def _compare(before: Tensor, now: Tensor) -> Tensor:
    """Compare an image's queries (n,) of the same objects in two epochs.

    Returns:
        (3,) int64: queries whose object differs, queries that had an object, and 1 for the image.
    """
    differs = before != now
    changed = torch.cat([before[differs], now[differs]]).unique()
    matched = torch.cat([before, now]).unique()
    counts = [(queries != _UNMATCHED).sum() for queries in (changed, matched)]
    return torch.stack([*counts, torch.tensor(1)])


def _maximum_over_ranks(values: Tensor) -> Tensor:
    """Return the elementwise maximum over all processes, a new tensor on the CPU."""
    if not is_distributed():
        return values.clone()
    device = torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")
    merged = values.to(device, copy=True)
    dist.all_reduce(merged, dist.ReduceOp.MAX)
    return merged.cpu()
