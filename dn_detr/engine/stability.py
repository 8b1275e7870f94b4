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

from dn_detr.distributed import all_gather, is_distributed, is_main

from .metrics import Ratio

_NOT_SEEN = -2  # less than what any object has that was seen, so a maximum over processes merges
_UNMATCHED = -1

logger = logging.getLogger(__name__)


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
        self._sums = [0, 0, 0]

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
            pairs = zip(self._previous[rows].tolist(), now.tolist(), strict=True)
            if known := [pair for pair in pairs if pair[0] != _NOT_SEEN]:
                counts = (*_count_queries(known), 1)
                self._sums = [a + b for a, b in zip(self._sums, counts, strict=True)]
            # the maximum, because an image that fills up a batch may come twice in an epoch
            seen = torch.maximum(self._current[rows], now.to(self._current.dtype))
            self._current[rows] = seen

    def ratios(self) -> dict[str, Ratio]:
        """Return this process's share of the numbers since the last call, and start anew.

        Returns:
            `matching/changed`: queries whose object changed over queries that were matched in
            either epoch, in [0, 1]. `matching/instability`: changed queries per image, the paper's
            measure. Images without an object of both epochs do not count, so there is nothing to
            merge in the first epoch.
        """
        changed, matched, images = self._sums
        self._sums = [0, 0, 0]
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
            "sums": [sum(column) for column in zip(*all_gather(self._sums), strict=True)],
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
            self._sums = list(state["sums"])


def _count_queries(pairs: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Count queries of an image that changed their object, and queries that had one.

    Args:
        pairs: of every object, its query in the epoch before and in this one.
    """
    changed = {query for pair in pairs if pair[0] != pair[1] for query in pair} - {_UNMATCHED}
    matched = {query for pair in pairs for query in pair} - {_UNMATCHED}
    return len(changed), len(matched)


def _maximum_over_ranks(values: Tensor) -> Tensor:
    """Return the elementwise maximum over all processes, a new tensor on the CPU."""
    if not is_distributed():
        return values.clone()
    device = torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")
    merged = values.to(device, copy=True)
    dist.all_reduce(merged, dist.ReduceOp.MAX)
    return merged.cpu()
