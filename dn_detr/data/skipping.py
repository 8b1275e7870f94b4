"""Training on when some image files are broken, and reporting which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch.utils.data import Dataset

from .errors import DatasetError, ImageError
from .seeding import stable_seed

OnError = Literal["raise", "skip"]
MOST_FAILURES_IN_A_ROW = 10


class SkipBrokenImages(Dataset[dict[str, Any]]):
    """A data set that gives another image where one cannot be read.

    The other image is a function of (seed, epoch, index, attempt) only, so the number of workers
    and processes and resuming change nothing. It has its own random draws, not those of the
    image that it stands for, and carries `skipped_files`, the paths of the files that could not
    be read. Only `ImageError` is skipped.

    Args:
        dataset: with (epoch, index) as keys, and a method `image_path(index)`.
        seed: of the choice.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """
        Raises:
            DatasetError: more than `MOST_FAILURES_IN_A_ROW` images could not be read.
        """
        epoch, index = key
        chosen, failures = index, list[tuple[int, ImageError]]()
        while True:
            try:
                sample: dict[str, Any] = self.dataset[epoch, chosen]
                break
            except ImageError as error:
                failures.append((chosen, error))
            if len(failures) > MOST_FAILURES_IN_A_ROW:
                raise DatasetError(
                    f"{len(failures)} image files in a row cannot be read, so these are not a few"
                    f" broken files: is the disk still there? The last one: {failures[-1][1]}"
                )
            chosen = stable_seed(self.seed, epoch, index, len(failures)) % len(self)
        if failures:
            sample["skipped_files"] = [
                str(self.dataset.image_path(failed)) for failed, _ in failures
            ]
        return sample


def count_skipped(samples: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Count how often each file was skipped for these samples.

    Counters of batches, of processes and of the parts of an interrupted epoch add up with `+`
    or `update`; `dict(counter)` is what a checkpoint keeps.
    """
    return Counter(path for sample in samples for path in sample.get("skipped_files", ()))


def describe_skipped(counts: Mapping[str, int]) -> str:
    """A message with every skipped file and how often it was skipped; empty if none was."""
    if not counts:
        return ""
    files = "\n".join(f"  {path} ({count} x)" for path, count in sorted(counts.items()))
    return (
        f"{sum(counts.values())} images were replaced by others because {len(counts)} files could"
        f" not be read (dataloader.train.on_error=skip):\n{files}"
    )
