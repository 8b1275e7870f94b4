"""The instability of bipartite matching: queries whose object is another one than an epoch before.

Li et al., "DN-DETR", 2022 (https://arxiv.org/abs/2203.01305), section 3.3: in epoch i, V_n is the
object that query n of an image is matched to (-1: none), and the image's instability is the
number of queries whose V_n differs from epoch i - 1. It differs from the paper in one respect: the
paper looks at an image as a whole, here training crops remove objects from one epoch to the next.
That is no instability of the matching, so an image is judged by the objects of both epochs.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dn_detr.distributed import is_distributed
from dn_detr.protocols import Sample

from .callbacks import Callback

if TYPE_CHECKING:
    from .run_state import RunState
    from .step import StepResult

_NOT_SEEN = -2  # less than what any object has that was seen, so a maximum over ranks merges
_UNMATCHED = -1

logger = logging.getLogger(__name__)


class MatchingStability(Callback):
    """Follows the query of every object of a data set from epoch to epoch.

    An image may be seen by another rank in the next epoch, so the ranks exchange what they saw when
    an epoch ends; the numbers do not depend on how many there are. It takes 8 bytes of memory per
    object. The log records get

    - `matching/changed`: queries whose object changed over queries that were matched in either
      epoch, in [0, 1];
    - `matching/instability`: changed queries per image, the paper's measure.

    Images without an object of both epochs do not count, so the first epoch has neither.

    Args:
        num_boxes: M, objects of the training data.
    """

    def __init__(self, num_boxes: int) -> None:
        self._epoch: int | None = None
        self._previous = torch.full((num_boxes,), _NOT_SEEN, dtype=torch.int32)
        self._current = self._previous.clone()

    def after_step(self, state: RunState, samples: Sequence[Sample], result: StepResult) -> None:
        """Add the matching of a step; a collective call when a new epoch of the data begins."""
        self.begin_epoch((state.batches_drawn - 1) // state.timetable.iterations_per_epoch)
        if not result.diagnostics:
            return
        objects = [sample["instances"].gt_ids for sample in samples]
        queries = [query for found in result.diagnostics for query in found.queries]
        changed, matched, images = self.update(objects, queries)
        state.metrics.add("matching/changed", changed, matched)
        state.metrics.add("matching/instability", changed, images)

    def begin_epoch(self, epoch: int) -> None:
        """Say which epoch the next matching belongs to; a collective call when a new one begins.

        Args:
            epoch: from 0; the same on all ranks.
        """
        if epoch == self._epoch:
            return
        if self._epoch is not None:
            is_next = epoch == self._epoch + 1
            merged = _maximum_over_ranks(self._current)
            self._previous = merged if is_next else torch.full_like(merged, _NOT_SEEN)
            self._current = torch.full_like(merged, _NOT_SEEN)
        self._epoch = epoch

    def update(self, objects: Sequence[Tensor], queries: Sequence[Tensor]) -> tuple[int, int, int]:
        """Add the matching of a batch of this rank.

        Args:
            objects: per image (n,) int64 on the CPU, indices of its objects in the data set's table
                of boxes, in [0, M).
            queries: per image (n,) int64 on the CPU, the query that the last decoder layer matched
                to each of them; -1 for none.

        Returns:
            Queries that changed, queries that were matched in either epoch, and images.
        """
        changed = matched = images = 0
        indices, now = torch.cat(list(objects)), torch.cat(list(queries))
        pairs = zip(self._previous[indices].tolist(), now.tolist(), strict=True)
        for of_image in objects:
            of_both = itertools.islice(pairs, len(of_image))
            if known := [pair for pair in of_both if pair[0] != _NOT_SEEN]:
                # of the image: queries that changed their object, queries that had one
                moved = {query for pair in known if pair[0] != pair[1] for query in pair}
                changed += len(moved - {_UNMATCHED})
                matched += len({query for pair in known for query in pair} - {_UNMATCHED})
                images += 1
        # the maximum, because an image that fills up a batch may come twice in an epoch
        self._current.scatter_reduce_(0, indices, now.to(self._current.dtype), "amax")
        return changed, matched, images

    def state_dict(self) -> dict[str, Any]:
        """Return what all ranks saw; a collective call."""
        return {
            "epoch": self._epoch,
            "previous": self._previous.clone(),
            "current": _maximum_over_ranks(self._current),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, with any number of ranks; other data begin from nothing."""
        if len(state["previous"]) != len(self._previous):
            logger.warning(
                "matching stability starts over: the checkpoint followed %d objects, the data "
                "have %d", len(state["previous"]), len(self._previous),
            )  # fmt: skip
            return
        self._epoch = state["epoch"]
        self._previous = state["previous"].clone()
        self._current = state["current"].clone()


def _maximum_over_ranks(values: Tensor) -> Tensor:
    """Return the elementwise maximum over all ranks, a new tensor on the CPU."""
    if not is_distributed():
        return values.clone()
    device = torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")
    merged = values.to(device, copy=True)
    dist.all_reduce(merged, dist.ReduceOp.MAX)
    return merged.cpu()
