"""The `train` section of a config, checked and typed."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, fields
from functools import lru_cache
from operator import attrgetter
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dn_detr.config import LazyConfig
from dn_detr.errors import UserError

from .schedule import parse_period

SECTIONS = ("model", "dataloader", "optimizer", "lr_schedule", "train")

_POSITIVE = ("log_period", "clip_grad.norm_type", "accumulate", "nonfinite_limit", "grace_seconds")
_POSITIVE_OR_NONE = (
    "max_iter", "clip_grad.max_norm", "checkpoint.keep", "max_hours", "early_stopping.patience",
)  # fmt: skip
_CHOICES = {
    "amp.dtype": ("float16", "bfloat16"),
    "nonfinite": ("raise", "skip", "rollback"),
    "oom": ("raise", "skip"),
    "wandb.mode": (None, "online", "offline", "disabled"),
}

# torch takes less than 2**64, and a process adds its rank.
_SEEDS = 2**63


@dataclass
class AmpSettings:
    """Automatic mixed precision: float16 scales the loss, bfloat16 needs no scaling."""

    enabled: bool = False
    dtype: str = "float16"


@dataclass
class ClipGradSettings:
    """Clipping of the global gradient norm; `max_norm` None: none."""

    max_norm: float | None = 0.1
    norm_type: float = 2.0


@dataclass
class CheckpointSettings:
    """When, how and how much to save.

    Attributes:
        period: iterations, or epochs as "1ep"; 0 or None: at the end only.
        keep: number of newest checkpoints to keep; None: all.
        best: evaluation result ("AP", "AP50", "ema/AP", "per_class/cat") whose maximum
            `checkpoints/best` keeps and early stopping watches; None: neither.
        asynchronous: write in the background while training goes on.
    """

    period: int | str | None = "1ep"
    keep: int | None = 3
    best: str | None = "AP"
    asynchronous: bool = True


@dataclass
class EmaSettings:
    """Exponential moving average of the weights, evaluated and saved beside them."""

    enabled: bool = False
    decay: float = 0.9997


@dataclass
class EarlyStoppingSettings:
    """End the run after `patience` evaluations without a gain of more than `min_delta`."""

    patience: int | None = None
    min_delta: float = 0.0


@dataclass
class ActivationCheckpointingSettings:
    """Compute activations of a part again in the backward pass instead of keeping them."""

    backbone: bool = False
    encoder: bool = False
    decoder: bool = False


@dataclass
class WandbSettings:
    """Weights & Biases.

    Attributes:
        enabled: whether log records go there; needs `pip install 'dn_detr[wandb]'`.
        project: of the run.
        name: of the run; None: wandb invents one.
        mode: "online", "offline" (kept in the output folder for `wandb sync`) or "disabled"; None:
            the environment variable WANDB_MODE, else online.
    """

    enabled: bool = False
    project: str = "dn_detr"
    name: str | None = None
    mode: str | None = None


@dataclass
class TrainSettings:
    """The `train` section of a config.

    Attributes:
        output_dir: folder of the run; `output/<name>` in a config file that leaves it open.
        init_checkpoint: weights to start from, or to evaluate; "" for none.
        init_fresh: tensors that a training does not take from there but starts from their initial
            values: names, or patterns such as "heads.quality.*".
        device: "auto", "cpu", "cuda" or "cuda:1".
        seed: of the global random number generators, in [0, 2**63); samples draw from it by
            (epoch, index).
        epochs: length of the run.
        max_iter: length in iterations; replaces `epochs` where it is not None.
        max_hours: save and stop after this time, measured from the start of this process; a
            resumed run has all of it again. None: no limit.
        eval_period: iterations, or epochs as "1ep"; 0 or None: at the end only.
        log_period: iterations between two records of metrics.jsonl.
        accumulate: in how many micro-batches a rank computes its share of a batch, one after
            the other. Results stay those of the whole batch, memory falls.
        nonfinite: what a NaN or infinite loss or gradient leads to: "raise" ends the run, "skip"
            drops the step, "rollback" goes back to the last checkpoint and on with new images.
        nonfinite_limit: how many such steps a run may have before it ends after all.
        oom: what running out of memory leads to: "raise" or "skip" the step.
        grace_seconds: how long after a signal a step may take to end and a checkpoint to be
            written, before the rank ends anyway.
        callbacks: name -> `L(MyCallback)(...)`, see `Callback`. Their nodes stay in the config:
            `build_callbacks` makes them.
    """

    output_dir: str = MISSING
    init_checkpoint: str = ""
    init_fresh: list[str] = field(default_factory=list)
    device: str = "auto"
    seed: int = 42
    epochs: float = 50.0
    max_iter: int | None = None
    max_hours: float | None = None
    eval_period: int | str | None = "1ep"
    log_period: int = 20
    amp: AmpSettings = field(default_factory=AmpSettings)
    clip_grad: ClipGradSettings = field(default_factory=ClipGradSettings)
    accumulate: int = 1
    activation_checkpointing: ActivationCheckpointingSettings = field(
        default_factory=ActivationCheckpointingSettings
    )
    ema: EmaSettings = field(default_factory=EmaSettings)
    nonfinite: str = "raise"
    nonfinite_limit: int = 10
    oom: str = "raise"
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    early_stopping: EarlyStoppingSettings = field(default_factory=EarlyStoppingSettings)
    grace_seconds: float = 120.0
    wandb: WandbSettings = field(default_factory=WandbSettings)
    callbacks: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, cfg: DictConfig) -> TrainSettings:
        """Check and convert the `train` section of a whole config.

        Raises:
            ValueError: a section is missing, an unknown key, a value of the wrong type or outside
                its range.
        """
        if absent := [name for name in SECTIONS if not OmegaConf.is_dict(cfg.get(name))]:
            raise UserError(
                f"the config has no {', '.join(absent)}; it needs {', '.join(SECTIONS)}"
            )
        try:
            settings = deepcopy(_parse(LazyConfig.to_yaml(cfg.train, resolve=True)))
        except OmegaConfBaseException as error:
            known = ", ".join(item.name for item in fields(cls))
            reason = str(error).splitlines()[0]
            where = f"train.{error.full_key}" if error.full_key else "train"
            raise UserError(f"{where}: {reason}; the keys of train are {known}") from error
        settings._check_ranges()
        return settings

    def _check_ranges(self) -> None:
        self._check("output_dir", bool, "a folder")
        self._check("seed", lambda value: 0 <= value < _SEEDS, ">= 0 and < 2**63")
        self._check("epochs", lambda value: 0 < value < float("inf"), "> 0")
        self._check("ema.decay", lambda value: 0 < value < 1, "between 0 and 1")
        for key in _POSITIVE:
            self._check(key, lambda value: value > 0, "> 0")
        for key in _POSITIVE_OR_NONE:
            self._check(key, lambda value: value is None or value > 0, "> 0 or null")
        for key, choices in _CHOICES.items():
            names = " or ".join(choice or "null" for choice in choices)
            self._check(key, choices.__contains__, names)
        patience = self.early_stopping.patience
        if patience is not None and self.checkpoint.best is None:
            raise UserError(
                "train.early_stopping.patience needs the result to watch: set train.checkpoint.best"
            )
        for period in (self.eval_period, self.checkpoint.period):
            parse_period(period, 1)

    def _check(self, key: str, accepts: Callable[..., bool], expected: str) -> None:
        value = attrgetter(key)(self)
        if not accepts(value):
            raise UserError(f"train.{key}={value}: expected {expected}")


@lru_cache(maxsize=1)  # each function that builds a part of a run asks for it
def _parse(text: str) -> TrainSettings:
    """The settings of a `train` section as YAML, in which `${...}` stands for itself."""
    values = OmegaConf.create(text)
    assert isinstance(values, DictConfig)
    values.pop("callbacks", None)
    settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainSettings), values))
    assert isinstance(settings, TrainSettings)
    return settings
