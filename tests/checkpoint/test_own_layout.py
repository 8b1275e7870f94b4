"""A project's own key map: defined outside of the library and named in a config."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from dn_detr.checkpoint import Layout, read_weights
from dn_detr.config import LazyCall as L
from dn_detr.config import LazyConfig
from dn_detr.engine import train
from tests.engine.dummy import TinyDetector


class ForeignLayout(Layout):
    """A code base that calls the backbone `cnn` and the head `predict`."""

    name = "foreign"

    def pairs(self, names: Collection[str]) -> Sequence[tuple[str, str]]:
        return [
            ("backbone.*", "cnn.*"),
            ("norm.*", "ln.*"),
            ("head.*", "predict.*"),
            ("scale",) * 2,
        ]


class ProjectDetector(TinyDetector):
    """A detector of a project, which knows that code base."""

    def __init__(self, key_maps: Sequence[Layout], num_classes: int) -> None:
        super().__init__(num_classes=num_classes)
        self.key_maps = key_maps


def test_a_foreign_file_loads_through_a_layout_that_the_config_names(tmp_path):
    names = {"backbone": "cnn", "norm": "ln", "head": "predict"}
    weights = {key: torch.rand_like(value) for key, value in TinyDetector().state_dict().items()}
    foreign = {}
    for key, value in weights.items():
        part, dot, rest = key.partition(".")
        foreign[names.get(part, part) + dot + rest] = value
    torch.save({"model": foreign}, tmp_path / "foreign.pth")
    cfg = LazyConfig.load("tests/engine/tiny_config.py")
    cfg.model = L(ProjectDetector)(key_maps=[L(ForeignLayout)()], num_classes=2)
    overrides = [
        f"train.output_dir={tmp_path / 'run'}",
        f"train.init_checkpoint={tmp_path / 'foreign.pth'}",
        "train.max_iter=1",
        "optimizer.lr=0",
    ]
    train(LazyConfig.apply_overrides(cfg, overrides))
    assert "foreign.pth (foreign layout)" in (tmp_path / "run" / "log.txt").read_text()
    found = read_weights(tmp_path / "run")
    assert all(torch.equal(found[key], value) for key, value in weights.items())
