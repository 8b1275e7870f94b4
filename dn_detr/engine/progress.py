"""What a person sees of a running training: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import datetime
import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from dn_detr.distributed import is_main
from dn_detr.protocols import Sample

from .callbacks import Callback
from .metrics import Record
from .setup import FILE_ONLY

if TYPE_CHECKING:
    from .run_state import RunState
    from .step import StepResult

logger = logging.getLogger(__name__)


class Progress(Callback):
    """A progress bar if standard output is a terminal, and a line in the log per log record."""

    def on_train_start(self, state: RunState) -> None:
        """Show the bar."""
        self._bar = tqdm(
            total=state.timetable.max_iter,
            initial=state.iteration,
            desc="training",
            file=sys.stdout,
            dynamic_ncols=True,
            disable=not (is_main() and sys.stdout.isatty()),
        )

    def after_step(self, state: RunState, samples: Sequence[Sample], result: StepResult) -> None:
        """Move the bar, back if a rollback came between."""
        self._bar.update(state.iteration - self._bar.n)

    def on_log(self, state: RunState, record: Record) -> None:
        """Show the means of a log record; evaluations report their results themselves."""
        if "loss" not in record:
            return
        number = {k: float("nan") if value is None else value for k, value in record.items()}
        rate = max(value for name, value in number.items() if name.startswith("lr/"))
        summary = f"loss {number['loss']:.4f}, lr {rate:.1e}, data {number['data_time']:.3f} s"
        self._bar.set_postfix_str(summary)
        left = (state.timetable.max_iter - state.iteration) * number["iter_time"]
        logger.info(
            "iteration %d/%d  epoch %.2f  loss %.4f  grad norm %.3g  lr %.1e  data %.3f s  "
            "step %.3f s  %.1f images/s  memory %.0f MiB  eta %s",
            state.iteration, state.timetable.max_iter, number["epoch"], number["loss"],
            number["grad_norm"], rate, number["data_time"], number["iter_time"],
            number["images_per_s"], number["memory_mib"],
            datetime.timedelta(seconds=round(left)),
            extra=FILE_ONLY,
        )  # fmt: skip

    def on_train_end(self, state: RunState, *, failed: bool) -> None:
        """Close the bar."""
        self._bar.close()
