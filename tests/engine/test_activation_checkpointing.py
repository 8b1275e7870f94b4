"""Activation checkpointing by the flags of a config changes no loss by a bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from dn_detr.engine import train
from dn_detr.modeling import Detector

from .golden_losses import config
from .reference import rows, untimed

PARTS = ["backbone", "encoder", "decoder"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    train(config(str(folder), "train.max_iter=3"))
    return folder


@pytest.mark.parametrize("parts", [*([part] for part in PARTS), PARTS])
def test_three_steps_have_the_same_losses_gradients_and_results(
    parts, plain, tmp_path, monkeypatch
):
    built = []
    choose = Detector.checkpoint_activations

    def choose_and_remember(self, **chosen):
        choose(self, **chosen)
        built.append(self)

    monkeypatch.setattr(Detector, "checkpoint_activations", choose_and_remember)
    flags = [f"train.activation_checkpointing.{part}=true" for part in parts]
    train(config(str(tmp_path), "train.max_iter=3", *flags))
    (model,) = built
    stacks = (model.backbone, model.transformer.encoder, model.transformer.decoder)
    chosen = [part.activation_checkpointing for part in stacks]
    assert chosen == [name in parts for name in PARTS]
    assert [untimed(row) for row in rows(tmp_path)] == [untimed(row) for row in rows(plain)]


def test_a_detector_that_cannot_is_an_error(tiny_config):
    with pytest.raises(ValueError, match="TinyDetector has no method checkpoint_activations"):
        train(tiny_config("train.activation_checkpointing.encoder=true"))
