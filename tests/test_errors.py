from __future__ import annotations

import pytest
from torch.utils.data import DataLoader, Dataset

from dn_detr.checkpoint import CheckpointError, find_checkpoint
from dn_detr.config import ConfigError
from dn_detr.data import DatasetError
from dn_detr.engine import LaunchError, NonFiniteError, OutOfMemory
from dn_detr.errors import UserError, first_names, image_name, user_message


class Unreadable(Dataset):
    """Fails inside the package, as a data set does on a broken file."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index):
        return find_checkpoint("/absent/image.jpg")


@pytest.mark.parametrize(
    "kind", [CheckpointError, ConfigError, DatasetError, LaunchError, NonFiniteError, OutOfMemory]
)
def test_the_errors_of_this_package_are_for_the_user(kind):
    assert issubclass(kind, UserError)
    assert user_message(kind("train.epochs=0: expected >= 1")) == "train.epochs=0: expected >= 1"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_that_a_loader_worker_meets_is_told_in_its_own_words(workers):
    with pytest.raises(UserError) as caught:
        next(iter(DataLoader(Unreadable(), num_workers=workers)))
    assert user_message(caught.value) == "/absent/image.jpg: no such file or folder"


def test_an_image_is_named_by_its_file_else_by_its_id():
    assert image_name({"file_name": "a.jpg", "image_id": 3}) == "a.jpg"
    assert image_name({"image_id": 3}) == "3"


def test_a_long_list_of_names_is_cut():
    assert first_names(["a", "b"], 2) == "a, b"
    assert first_names(["a", "b", "c", "d"], 2) == "a, b and 2 more"


def test_a_long_name_is_cut():
    assert first_names(["x" * 300]) == "x" * 200 + "... (300 characters)"


def test_a_message_obeys_no_name_in_it():
    assert user_message(UserError("a\x1b[2J\n\t\x9bé\r")) == "a\\x1b[2J\n\t\\x9bé\\r"
