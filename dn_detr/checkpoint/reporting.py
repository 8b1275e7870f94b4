"""Telling the user what was loaded."""

from __future__ import annotations

import logging
from pathlib import Path

from .weights import LoadReport

_logger = logging.getLogger(__name__)


def log_loading(checkpoint: str | Path, report: LoadReport) -> None:
    """Say what weights a model got, and warn of what it did not get.

    Args:
        checkpoint: what was loaded.
        report: of ``load_model_weights``.
    """
    _logger.info("weights from %s (%s layout)", checkpoint, report.layout)
    for note in report.notes:
        _logger.info("%s: %s", checkpoint, note)
    if report.fresh:
        _logger.warning(
            "%d tensors keep their start values (%s%s), everything else is loaded",
            len(report.fresh),
            ", ".join(report.fresh[:3]),
            ", ..." if len(report.fresh) > 3 else "",
        )
