from __future__ import annotations

import pytest

from dn_detr.config import ConfigError, LazyConfig
from dn_detr.engine import TrainSettings
from dn_detr.engine.random_state import preserved_random_state, seed_everything


def test_values_of_the_config_arrive_typed(tiny_config):
    settings = TrainSettings.from_config(tiny_config("train.eval_period=5", "train.seed=7"))
    assert (settings.eval_period, settings.seed, settings.epochs) == (5, 7, 3.0)
    assert settings.clip_grad.max_norm == pytest.approx(0.1)


def test_the_largest_seed_is_one_for_every_process(tiny_config):
    settings = TrainSettings.from_config(tiny_config(f"train.seed={2**63 - 1}"))
    with preserved_random_state():
        for rank in (0, 1, 100_000):
            seed_everything(settings.seed + rank)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train.seed = 1.5", "Value '1.5' of type 'float' could not be converted to Integer"),
        ("train.sede = 1", "Key 'sede' not in 'TrainSettings' full_key: sede (did you mean seed?)"),
        ("train.ema.enable = True", "full_key: ema.enable (did you mean enabled?)"),
        ("train.amp.enabled = 0.5", "full_key: amp.enabled"),
        ("train.epochs = None", "full_key: epochs"),
    ],
)
def test_a_wrong_setting_in_a_config_file_is_an_error_with_its_line(tmp_path, line, message):
    config = tmp_path / "my_config.py"
    config.write_text(f"from dn_detr.configs.common.train import train\n\n{line}\n")
    with pytest.raises(ConfigError, match=r"my_config\.py, line 3") as error:
        LazyConfig.load(config)
    assert message in str(error.value)


def test_an_int_is_a_float_in_a_config_file(tmp_path):
    config = tmp_path / "my_config.py"
    config.write_text("from dn_detr.configs.common.train import train\n\ntrain.epochs = 3\n")
    cfg = LazyConfig.load(config, overrides=["train.epochs=1.5", "train.clip_grad.max_norm=1"])
    assert (cfg.train.epochs, cfg.train.clip_grad.max_norm) == (1.5, 1.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+train.warmup=1", "there is no key train.warmup"),
        ("train.epochs=0", "train.epochs=0.0: expected > 0"),
        ("train.seed=-1", "train.seed=-1: expected >= 0 and < 2**63"),
        (f"train.seed={2**63}", f"train.seed={2**63}: expected >= 0 and < 2**63"),
        ("train.max_iter=-1", "train.max_iter=-1: expected > 0"),
        ("train.log_period=0", "train.log_period=0: expected > 0"),
        ("train.amp.dtype=float8", "expected float16 or bfloat16"),
        ("train.wandb.mode=off", "train.wandb.mode=off: expected null or online or offline or dis"),
        ("train.nonfinite=ignore", "train.nonfinite=ignore: expected raise or skip or rollback"),
        ("train.ema.decay=1", "train.ema.decay=1.0: expected between 0 and 1"),
        ("train.checkpoint.keep=0", "train.checkpoint.keep=0: expected > 0 or null"),
        ("train.clip_grad.max_norm=-1.0", "expected > 0 or null"),
        ("train.eval_period=-4", "expected iterations"),
        ("~lr_schedule", "the config has no lr_schedule"),
        ("model=null", "the config has no model"),
    ],
)
def test_a_bad_setting_is_an_error_that_names_it(tiny_config, override, message):
    with pytest.raises(ValueError) as error:
        TrainSettings.from_config(tiny_config(override))
    assert message in str(error.value)
