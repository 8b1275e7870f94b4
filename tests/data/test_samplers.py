from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dn_detr.data import EndlessBatchSampler

sizes = st.integers(1, 60)


def take(sampler: EndlessBatchSampler, count: int) -> list[list[tuple[int, int]]]:
    return list(islice(sampler, count))


@settings(deadline=None)
@given(num_images=sizes, batch=sizes, seed=sizes, kinds=st.integers(0, 3))
def test_an_epoch_visits_each_image_at_most_once_in_full_batches(
    num_images: int, batch: int, seed: int, kinds: int
) -> None:
    batch = min(batch, num_images)
    groups = [index % kinds for index in range(num_images)] if kinds else None
    sampler = EndlessBatchSampler(num_images, batch, seed=seed, groups=groups)
    batches = sampler.epoch_batches(3)
    assert len(batches) == num_images // batch == sampler.iterations_per_epoch
    assert all(len(b) == batch for b in batches)
    assert max(Counter(index for b in batches for index in b).values()) == 1


@settings(deadline=None)
@given(world_size=st.integers(1, 4), more=st.integers(0, 8), grouped=st.booleans(), seed=sizes)
def test_world_size_changes_the_shares_but_not_the_global_batches(
    world_size: int, more: int, grouped: bool, seed: int
) -> None:
    batch = world_size + more
    groups = [index % 2 for index in range(31)] if grouped else None
    alone = take(EndlessBatchSampler(31, batch, seed=seed, groups=groups), 40)
    ranks = [
        take(EndlessBatchSampler(31, batch, seed=seed, groups=groups, rank=rank,
                                 world_size=world_size), 40)
        for rank in range(world_size)
    ]  # fmt: skip
    for iteration, whole in enumerate(alone):
        shares = [rank[iteration] for rank in ranks]
        sizes = [len(share) for share in shares]
        assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
        assert sorted(key for share in shares for key in share) == sorted(whole)


@settings(deadline=None)
@given(start=st.integers(0, 50))
def test_resuming_continues_the_same_sequence(start: int) -> None:
    whole = take(EndlessBatchSampler(10, 3, seed=5), 60)
    resumed = EndlessBatchSampler(10, 3, seed=5, start_iteration=start)
    assert take(resumed, 60 - start) == whole[start:]


def test_epochs_and_seeds_differ_in_order() -> None:
    sampler = EndlessBatchSampler(100, 10, seed=0)
    assert sampler.epoch_batches(0) != sampler.epoch_batches(1)
    assert sampler.epoch_batches(0) != EndlessBatchSampler(100, 10, seed=1).epoch_batches(0)


def test_keys_count_epochs() -> None:
    keys = [key for batch in take(EndlessBatchSampler(4, 2), 6) for key in batch]
    assert [epoch for epoch, _ in keys] == [0] * 4 + [1] * 4 + [2] * 4


def test_grouping_mixes_at_most_one_batch_of_two_groups() -> None:
    groups = [int(index % 3 == 0) for index in range(50)]
    batches = EndlessBatchSampler(50, 4, groups=groups).epoch_batches(0)
    mixed = [batch for batch in batches if len({groups[index] for index in batch}) > 1]
    assert len(mixed) <= 1


def test_batch_that_leaves_a_rank_without_an_image_is_refused() -> None:
    EndlessBatchSampler(10, 3, world_size=3)
    with pytest.raises(ValueError, match=r"total_batch_size=2 .* 3 processes .*_size=3 or higher"):
        EndlessBatchSampler(10, 2, world_size=3)


def test_data_set_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"3 image.*total_batch_size=3 or lower"):
        EndlessBatchSampler(3, 4)
