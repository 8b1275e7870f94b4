"""The `train` section of a config, checked and typed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .schedule import parse_period

SECTIONS = ("model", "dataloader", "optimizer", "lr_schedule", "train")
AMP_DTYPES = ("float16", "bfloat16")


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
    """How often to save, and how many of the newest checkpoints to keep (None: all)."""

    period: int | str | None = "1ep"
    keep: int | None = 3


@dataclass
class TrainSettings:
    """The `train` section of a config.

    Attributes:
        output_dir: folder of the run.
        init_checkpoint: weights to start from, or to evaluate; "" for none.
        device: "auto", "cpu", "cuda" or "cuda:1".
        seed: of the global random number generators; samples draw from it by (epoch, index).
        epochs: length of the run.
        max_iter: length in iterations; replaces `epochs` where it is not None.
        eval_period: iterations, or epochs as "1ep"; 0 or None: at the end only.
        log_period: iterations between two rows of metrics.jsonl.
    """

    output_dir: str = "output"
    init_checkpoint: str = ""
    device: str = "auto"
    seed: int = 42
    epochs: float = 50.0
    max_iter: int | None = None
    eval_period: int | str | None = "1ep"
    log_period: int = 20
    amp: AmpSettings = field(default_factory=AmpSettings)
    clip_grad: ClipGradSettings = field(default_factory=ClipGradSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)

    @classmethod
    def from_config(cls, cfg: DictConfig) -> TrainSettings:
        """Check and convert the `train` section of a whole config.

        Raises:
            ValueError: a section is missing, an unknown key, a value of the wrong type or outside
                its range.
        """
        if absent := [name for name in SECTIONS if name not in cfg]:
            raise ValueError(
                f"the config has no {', '.join(absent)}; it needs {', '.join(SECTIONS)}"
            )
        try:
            values = OmegaConf.to_container(cfg.train, resolve=True)
            settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values))
        except OmegaConfBaseException as error:
            known = ", ".join(item.name for item in fields(cls))
            reason = str(error).splitlines()[0]
            where = f"train.{error.full_key}" if error.full_key else "train"
            raise ValueError(f"{where}: {reason}; the keys of train are {known}") from error
        assert isinstance(settings, cls)
        settings._check_ranges()
        return settings

    def _check_ranges(self) -> None:
        _check("output_dir", self.output_dir, bool, "a folder")
        _check("seed", self.seed, lambda value: value >= 0, ">= 0")
        _check("epochs", self.epochs, lambda value: 0 < value < float("inf"), "> 0")
        _check("max_iter", self.max_iter, lambda value: value is None or value > 0, "> 0 or null")
        _check("log_period", self.log_period, lambda value: value > 0, "> 0")
        _check("amp.dtype", self.amp.dtype, AMP_DTYPES.__contains__, " or ".join(AMP_DTYPES))
        _check("clip_grad.max_norm", self.clip_grad.max_norm, _positive_or_none, "> 0 or null")
        _check("clip_grad.norm_type", self.clip_grad.norm_type, lambda value: value > 0, "> 0")
        _check("checkpoint.keep", self.checkpoint.keep, _positive_or_none, ">= 1 or null for all")
        for period in (self.eval_period, self.checkpoint.period):
            parse_period(period, 1)


def _positive_or_none(value: float | None) -> bool:
    return value is None or value > 0


def _check(key: str, value: object, accepts: Callable[..., bool], expected: str) -> None:
    if not accepts(value):
        raise ValueError(f"train.{key}={value}: expected {expected}")
