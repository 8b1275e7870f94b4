"""What a person sees of a running training: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import datetime
import logging
import sys

from tqdm import tqdm

from dn_detr.distributed import is_main

from .metrics import Row
from .schedule import Timetable
from .setup import FILE_ONLY


class Progress:
    """A progress bar if standard output is a terminal, and a line in the log per interval.

    Args:
        timetable: length of the run.
        iteration: iterations done already.
        logger: gets the lines.
    """

    def __init__(self, timetable: Timetable, iteration: int, logger: logging.Logger) -> None:
        self._timetable = timetable
        self._logger = logger
        self._bar = tqdm(
            total=timetable.max_iter,
            initial=iteration,
            desc="training",
            file=sys.stdout,
            dynamic_ncols=True,
            disable=not (is_main() and sys.stdout.isatty()),
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def move_to(self, iteration: int) -> None:
        """Say how many iterations are done."""
        self._bar.update(iteration - self._bar.n)

    def show(self, row: Row) -> None:
        """Show the averages of an interval."""
        rate = max(_number(row, name) for name in row if name.startswith("lr/"))
        loss, data_time = _number(row, "loss"), _number(row, "data_time")
        self._bar.set_postfix_str(f"loss {loss:.4f}, lr {rate:.1e}, data {data_time:.3f} s")
        iteration = int(_number(row, "iteration"))
        left = (self._timetable.max_iter - iteration) * _number(row, "iter_time")
        self._logger.info(
            "iteration %d/%d  epoch %.2f  loss %.4f  grad norm %.3g  lr %.1e  data %.3f s  "
            "step %.3f s  %.1f images/s  memory %.0f MiB  eta %s",
            iteration, self._timetable.max_iter, _number(row, "epoch"), loss,
            _number(row, "grad_norm"), rate, data_time, _number(row, "iter_time"),
            _number(row, "images_per_s"), _number(row, "memory_mib"),
            datetime.timedelta(seconds=round(left)),
            extra=FILE_ONLY,
        )  # fmt: skip


def _number(row: Row, name: str) -> float:
    value = row[name]
    return float("nan") if value is None else float(value)
