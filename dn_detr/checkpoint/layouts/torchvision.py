"""A ResNet of torchvision: `conv1.weight`, `layer1.0.conv1.weight`, ...

Source: https://github.com/pytorch/vision, torchvision/models/resnet.py
"""

from __future__ import annotations

import re
from collections.abc import Collection

from .layout import Layout, Pairs


class TorchvisionLayout(Layout):
    """The names of torchvision's ResNet, which ours has kept below `backbone.body`."""

    name = "torchvision"
    is_backbone = True
    ignored = re.compile(r"fc\.(weight|bias)")  # the classifier

    def pairs(self, names: Collection[str]) -> Pairs:
        """See `Layout.pairs`."""
        return [(f"backbone.body.{part}.*", f"{part}.*") for part in ("conv1", "bn1", "layer{i}")]
