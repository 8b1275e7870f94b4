"""The tiny detector with steps that take as long as a test needs to interrupt them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tests.engine.dummy import TinyDetector


class SlowDetector(TinyDetector):
    """Pauses before every training step, but not once Slurm or torchrun has started it again.

    Args:
        pause: seconds.
        others: of `TinyDetector`.
    """

    def __init__(self, pause: float, **others: Any) -> None:
        super().__init__(**others)
        restarts = (
            os.environ.get(f"{name}_RESTART_COUNT", "0") for name in ("SLURM", "TORCHELASTIC")
        )
        self.pause = pause if set(restarts) == {"0"} else 0.0

    def forward(self, samples: Sequence[Mapping[str, Any]]) -> Any:
        if self.training:
            time.sleep(self.pause)
        return super().forward(samples)
