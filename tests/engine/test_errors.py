from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from dn_detr.checkpoint import CheckpointError, find_checkpoint
from dn_detr.engine import NonFiniteError, is_user_error, user_message


class Unreadable(Dataset):
    """Fails inside the package, as a data set does on a broken file."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index):
        return find_checkpoint("/absent/image.jpg")


def error_of(function, *arguments):
    with pytest.raises(Exception) as caught:
        function(*arguments)
    return caught.value


def test_what_this_package_raises_is_for_the_user(tmp_path):
    error = error_of(find_checkpoint, tmp_path / "absent")
    assert isinstance(error, CheckpointError) and is_user_error(error)


def test_a_value_error_of_another_library_keeps_its_traceback():
    assert not is_user_error(error_of(torch.nn.Linear(2, 2), torch.ones(1, 3)))
    assert not is_user_error(error_of(torch.optim.SGD, [], 0.1))
    assert not is_user_error(error_of(int, "x"))


def test_a_loss_that_is_not_finite_is_for_the_user():
    assert is_user_error(NonFiniteError("iteration 1"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_that_a_loader_worker_meets_is_told_in_its_own_words(workers):
    error = error_of(next, iter(DataLoader(Unreadable(), num_workers=workers)))
    assert is_user_error(error)
    assert user_message(error) == "/absent/image.jpg: no such file or folder"
