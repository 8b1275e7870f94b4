"""Twenty losses of a small real training, held to the last bit."""

from __future__ import annotations

import json
import platform

import pytest
import torch

from .golden_losses import GOLDEN_FILE, STEPS, losses_in_a_pinned_process

GOLDEN = json.loads(GOLDEN_FILE.read_text())
# Both are of one commit (bb4072c). What differs between the processors, in spite of all that is
# pinned, is not known; on each of them every run gives the same bits.
RECORDED = [GOLDEN["losses"], GOLDEN["losses_on_intel"]]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="golden on x86-64"),
    pytest.mark.skipif(
        torch.__version__.split("+")[0] != GOLDEN["torch"].split("+")[0],
        reason=f"golden with PyTorch {GOLDEN['torch']}",
    ),
]

# As on an old processor; each of these would change what is not pinned.
OTHER_PROCESSOR = {
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-AVX512F,-FMA,-FMA4",
    "OPENBLAS_CORETYPE": "Prescott",
}


def test_losses_are_the_golden_ones_to_the_last_bit():
    assert all(len(losses) == STEPS for losses in RECORDED)
    assert losses_in_a_pinned_process() in RECORDED, "see golden_losses.py to renew them"


def test_losses_do_not_depend_on_the_instructions_of_the_processor():
    assert losses_in_a_pinned_process(**OTHER_PROCESSOR) in RECORDED


def test_a_slightly_other_learning_rate_gives_other_losses():
    """The negative control; the first loss comes before the first step."""
    found = losses_in_a_pinned_process("optimizer.lr=8.001e-4")
    assert found[0] in [losses[0] for losses in RECORDED]
    assert found[2:] not in [losses[2:] for losses in RECORDED]
