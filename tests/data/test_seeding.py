from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dn_detr.data import stable_seed


def test_seeds_never_change_between_versions_and_machines() -> None:
    # from `printf 0,0,0 | b2sum -l 64`, read as a little-endian number and halved
    assert stable_seed(0, 0, 0) == 9169699564768075551
    assert stable_seed(42, 3, 117) == 7473009488094785902


@given(numbers=st.lists(st.integers(), max_size=4))
def test_seeds_fit_in_63_bits(numbers: list[int]) -> None:
    assert 0 <= stable_seed(*numbers) < 2**63


def test_order_and_grouping_of_numbers_matter() -> None:
    assert len({stable_seed(1, 2), stable_seed(2, 1), stable_seed(12), stable_seed(1, 2, 0)}) == 4
