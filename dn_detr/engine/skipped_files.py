"""The images that could not be read, counted and listed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dn_detr.data import count_skipped, describe_skipped
from dn_detr.distributed import all_gather, is_main
from dn_detr.protocols import Sample

from .callbacks import Callback

if TYPE_CHECKING:
    from .run_state import RunState
    from .step import StepResult

logger = logging.getLogger(__name__)


class SkippedFiles(Callback):
    """Counts `skipped_images` and lists at the end of an epoch the files that were skipped in it.

    With `dataloader.train.on_error=skip` a loader replaces an image that cannot be read.
    """

    def __init__(self) -> None:
        self._files: Counter[str] = Counter()  # of this epoch and rank
        self._is_new = True

    def after_step(self, state: RunState, samples: Sequence[Sample], result: StepResult) -> None:
        """Count the files of a batch; exchange and report them at the end of an epoch."""
        self._is_new = False
        skipped = count_skipped(samples)
        state.metrics.count("skipped_images", skipped.total())
        self._files.update(skipped)
        epoch, position = divmod(state.batches_drawn, state.timetable.iterations_per_epoch)
        if position == 0:
            on_all_ranks = sum(all_gather(self._files), Counter())
            if is_main() and on_all_ranks:
                logger.warning("epoch %d: %s", epoch, describe_skipped(on_all_ranks))
            self._files.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the files of all ranks; a collective call."""
        return {"files": dict(sum(all_gather(self._files), Counter()))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a resumed run; a rollback takes nothing back that was skipped."""
        if self._is_new and is_main():  # a sum over ranks, so one has it
            self._files = Counter(state["files"])
