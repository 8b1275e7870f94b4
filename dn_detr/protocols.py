"""What training and evaluation ask of a model, a data set, a loader and an evaluator.

A class does not derive from these protocols, it has their members. The first of each section is
required; every other one is an optional hook, whose absence the docstring explains. The engine
looks for a hook with `isinstance(model, CountsObjects)` and so on, in the class and in the object's
own attributes, not through `__getattr__`. What a callback gets and returns is in
`dn_detr.engine.Callback`, which it does derive from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

if TYPE_CHECKING:
    from dn_detr.checkpoint import Layout
    from dn_detr.modeling import ObjectCounts
    from dn_detr.structures import Instances

Sample = Mapping[str, Any]  # of one image, see `Dataset`

# --- the model


@runtime_checkable
class Model(Protocol):
    """A detector: an `nn.Module` that takes samples.

    Attributes:
        num_classes: K; data with more classes are refused, with fewer warned about.
    """

    num_classes: int

    def __call__(self, samples: Sequence[Sample], /) -> Any:
        """Return, in training mode, a dict of scalar losses, each with its weight in it.

        In evaluation mode return one dict per image, `{"instances": Instances}`, with `pred_boxes`
        (XYXY, pixels of the original image), `scores` and `pred_classes`.

        A model with `count_objects` is called as `model(samples, counts)` in training.
        """


@runtime_checkable
class CountsObjects(Protocol):
    """A model whose losses are divided by numbers of objects.

    Each step over several ranks or micro-batches is then that of the whole batch. Without this
    hook the losses are taken for means over images.
    """

    def count_objects(self, samples: Sequence[Sample], /) -> ObjectCounts:
        """Return what the losses of these samples are about; counts of micro-batches add up.

        Their mean over ranks comes back as the second argument of `forward`.
        """


class Diagnostics(Protocol):
    """What a model says about a training batch apart from its losses.

    Attributes:
        queries: per image (n,) int64 on the CPU, the query that the last layer matched to each of
            its objects, -1 for none; for `matching/...` in the log records.
        denoising_correct: (), how many noised boxes got their class back, on the device; for
            `denoising_accuracy`.
        denoising_total: how many noised boxes there were.
    """

    @property
    def queries(self) -> Sequence[Tensor]: ...

    @property
    def denoising_correct(self) -> Tensor: ...

    @property
    def denoising_total(self) -> int: ...


@runtime_checkable
class HasDiagnostics(Protocol):
    """A model that keeps `Diagnostics` of its last training batch.

    They come to callbacks as `result.diagnostics`, one per micro-batch. Without, or where they are
    None, the log records lack `matching/...` and `denoising_accuracy`.
    """

    @property
    def diagnostics(self) -> Diagnostics | None: ...


@runtime_checkable
class HasClassTensors(Protocol):
    """A model whose classes take their part of a checkpoint by name in fine-tuning.

    Without, a checkpoint of other classes does not fit.
    """

    def class_tensors(self) -> list[str]:
        """Return the names, in the state_dict, of the tensors whose first dimension is classes."""


@runtime_checkable
class HasKeyMaps(Protocol):
    """A model that understands checkpoints of other code bases. Without, only ours load."""

    @property
    def key_maps(self) -> Sequence[Layout]:
        """Layouts, each with the names that one code base gives to the model's tensors."""


@runtime_checkable
class LoadsPretrained(Protocol):
    """A part of a model (a backbone) that starts a new training from published weights.

    It is asked on the main process, in a run that starts from no checkpoint; building a model
    alone loads nothing. Without, the part keeps the weights of its construction.
    """

    def load_pretrained(self) -> bool:
        """Load the weights; return whether there are any."""


@runtime_checkable
class CheckpointsActivations(Protocol):
    """A model that can recompute activations, for `train.activation_checkpointing`.

    Without, that setting is an error.
    """

    def checkpoint_activations(self, *, backbone: bool, encoder: bool, decoder: bool) -> None:
        """Choose the parts whose activations the backward pass computes again."""


# --- the data


@runtime_checkable
class Dataset(Protocol):
    """Images and their objects, with the class names of the annotation file.

    Attributes:
        class_names: of K classes; they are saved in checkpoints.
        category_ids: of the same classes in the annotation file; the training and the test set
            must agree in both.
        annotation_file: for messages.
    """

    @property
    def class_names(self) -> Sequence[str]: ...

    @property
    def category_ids(self) -> Sequence[int]: ...

    @property
    def annotation_file(self) -> Path: ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Sample:
        """Return a sample: of an index for evaluation, of (epoch, index) for training.

        It has `image` (3, H, W) uint8 RGB, `height` and `width` of the original, `image_id`; in
        training also `instances` with `gt_boxes` (XYXY, pixels of `image`) and `gt_classes`
        (contiguous from 0). Optional: `seed` (of the denoising noise, a function of the run's
        seed, epoch and index), `file_name` (for messages), `skipped_files` (paths that could not
        be read and that this image stands for), and `instances.gt_ids` (see `HasBoxTable`).
        """


@runtime_checkable
class HasBoxTable(Protocol):
    """A training set that numbers its objects: `instances.gt_ids` (n,) int64, in [0, num_boxes).

    Without, the log records lack `matching/...`.
    """

    @property
    def num_boxes(self) -> int: ...


class BatchSampler(Protocol):
    """What a training loader draws its batches from, `dn_detr.data.EndlessBatchSampler`.

    Attributes:
        total_batch_size: images of a step over all ranks.
        iterations_per_epoch: batches of an epoch.
        start_iteration: batches that a resumed run has behind it; set before iterating.
    """

    total_batch_size: int
    iterations_per_epoch: int
    start_iteration: int


class TrainLoader(Protocol):
    """Endless batches of this rank, lists of samples; `dn_detr.data.build_train_loader`."""

    @property
    def dataset(self) -> Any: ...

    @property
    def batch_sampler(self) -> Any: ...

    def __iter__(self) -> Iterator[Sequence[Sample]]: ...


class TestLoader(Protocol):
    """Batches of this rank's share of the test images; `dn_detr.data.build_test_loader`."""

    @property
    def dataset(self) -> Any: ...

    @property
    def batch_size(self) -> Any: ...

    def __iter__(self) -> Iterator[Sequence[Sample]]: ...


# --- the evaluator


@runtime_checkable
class Evaluator(Protocol):
    """Makes metrics of predictions; `dn_detr.evaluation.CocoEvaluator`."""

    def reset(self, dataset: Any, /) -> None:
        """Begin an evaluation of these data."""

    def process(
        self, inputs: Sequence[Sample], outputs: Sequence[Mapping[str, Instances]], /
    ) -> None:
        """Take the predictions of a batch of this rank."""

    def evaluate(self) -> dict[str, Any] | None:
        """Return the metrics of all ranks on the main process, None on the others.

        Names and numbers, "AP" in [0, 1] (-1: undefined), or further mappings of them:
        {"AP": 0.4, "per_class": {"cat": 0.5}}. A collective call.
        """


@runtime_checkable
class NamesResults(Protocol):
    """An evaluator that knows its results before it has any.

    `train.checkpoint.best` is then checked before the training; without, at the first evaluation.
    """

    def result_names(self, class_names: Sequence[str], /) -> Sequence[str]:
        """Return the names of all results for data of these classes: "AP", "per_class/cat"."""
