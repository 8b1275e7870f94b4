"""The CPU operators give the same bits for any number of threads, and to concurrent callers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dn_detr.ops import use_kernels
from dn_detr.ops.library import compiled_operators

from ..threads import number_of_threads
from .cases import FEW, MANY, assert_same_bits, computed, make_case

pytestmark = pytest.mark.usefixtures("cpu_operators")


@pytest.mark.parametrize("queries", [FEW, MANY, 1000])
@pytest.mark.parametrize("coordinates", [0, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_any_number_of_threads(dtype, coordinates, queries):
    case = make_case(dtype, queries=queries, coordinates=coordinates, masked=True)
    heads = case["value"].shape[0] * case["value"].shape[2]
    with number_of_threads(1):
        alone = computed(case)
    for count in (2, 3, 8, 40):
        assert heads < 8  # the larger counts leave heads to several threads
        with number_of_threads(count):
            assert_same_bits(computed(case), alone)


def test_callers_in_several_threads_do_not_disturb_each_other():
    cases = [make_case(queries=n, coordinates=n % 2 * 2, seed=n) for n in (3, 60, 4, 61) * 8]
    alone = [computed(case) for case in cases]
    with ThreadPoolExecutor(8) as pool:
        for results, others in zip(pool.map(computed, cases), alone, strict=True):
            assert_same_bits(results, others)


def test_contexts_of_several_threads_that_overlap_leave_no_choice_behind():
    entered, left = threading.Event(), threading.Event()

    def first() -> None:
        with use_kernels("pytorch"):
            entered.set()
            left.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(10)
    with use_kernels("pytorch"):
        left.set()
        thread.join()
        assert compiled_operators(torch.device("cpu")) is None
    assert compiled_operators(torch.device("cpu")) is not None
