"""A ResNet of detectron2, from torchvision's weights: `stem.conv1.weight`, `res2.0.conv1.weight`.

Source: https://github.com/facebookresearch/detectron2, detectron2/modeling/backbone/resnet.py
"""

from __future__ import annotations

import re
from collections.abc import Collection

from .layout import Layout, Pairs

RESNET = [  # (torchvision, detectron2)
    ("bn1.*", "stem.conv1.norm.*"),
    ("conv1.*", "stem.conv1.*"),
    *(
        pair
        for stage in (1, 2, 3, 4)
        for pair in (
            (f"layer{stage}.{{i}}.bn{{n}}.*", f"res{stage + 1}.{{i}}.conv{{n}}.norm.*"),
            (f"layer{stage}.{{i}}.conv{{n}}.*", f"res{stage + 1}.{{i}}.conv{{n}}.*"),
            (f"layer{stage}.{{i}}.downsample.1.*", f"res{stage + 1}.{{i}}.shortcut.norm.*"),
            (f"layer{stage}.{{i}}.downsample.0.*", f"res{stage + 1}.{{i}}.shortcut.*"),
        )
    ),
]


class Detectron2Layout(Layout):
    """The names of detectron2's ResNet.

    Backbones of Caffe2 (detectron2's MSRA R-50.pkl) have other names and do not load: they expect
    BGR images that are not divided by the standard deviation.
    """

    name = "detectron2"
    is_backbone = True
    ignored = re.compile(r"stem\.fc\.(weight|bias)")  # the classifier

    def pairs(self, names: Collection[str]) -> Pairs:
        """See `Layout.pairs`."""
        return [(f"backbone.body.{our}", their) for our, their in RESNET]
