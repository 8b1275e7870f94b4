"""torchvision's backbones with a feature pyramid.

Lin et al., "Feature Pyramid Networks for Object Detection", 2017 (https://arxiv.org/abs/1612.03144).
"""

from __future__ import annotations

from functools import partial

import torchvision
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d

from dn_detr.checkpoint import TorchvisionLayout
from dn_detr.modeling import TorchvisionBackbone

from .layouts import TorchvisionDetectorLayout


class PyramidBackbone(TorchvisionBackbone):
    """A ResNet or MobileNet of torchvision, and a feature pyramid with maps of 256 channels.

    Args:
        name: torchvision's name: `resnet18` ... `resnet152`, `mobilenet_v3_large`.
        returned_layers: stages that the pyramid is made of, as torchvision counts them (1 has
            stride 4 in a ResNet); by default all of a ResNet, the last two of a MobileNet.
        trainable_layers: of the body, from its end; as torchvision counts them, 5 are all of a
            ResNet, 6 all of a MobileNet.
        weights: of the body, what `load_pretrained` loads, see `dn_detr.modeling.ResNet`.
        batch_norm: `frozen`, or `trainable` for training from scratch.
        norm_eps: of frozen normalisation. torchvision's COCO weights of `fasterrcnn_resnet50_fpn`
            need 0, which a body with a variance of 0 would turn into NaN.
        pyramid_norm: batch normalisation after each filter of the pyramid, as torchvision's v2.

    Raises:
        ValueError: unknown name or normalisation, or more layers than there are.
    """

    def __init__(
        self,
        name: str = "resnet50",
        *,
        returned_layers: list[int] | None = None,
        trainable_layers: int = 3,
        weights: str | None = None,
        batch_norm: str = "frozen",
        norm_eps: float = 1e-5,
        pyramid_norm: bool = False,
    ) -> None:
        super().__init__()
        known = torchvision.models.list_models(include=["resnet*", "mobilenet_v3_*"])
        norms = {"frozen": partial(FrozenBatchNorm2d, eps=norm_eps), "trainable": nn.BatchNorm2d}
        if name not in known or batch_norm not in norms:
            raise ValueError(f"{name!r}, {batch_norm!r}: choose from {known} and {list(norms)}")
        options = {"norm_layer": norms[batch_norm], "trainable_layers": trainable_layers}
        mobilenet = partial(mobilenet_backbone, fpn=True)
        build = resnet_fpn_backbone if name.startswith("resnet") else mobilenet
        built = build(backbone_name=name, weights=None, returned_layers=returned_layers, **options)
        self.body, self.fpn, self.out_channels = built.body, built.fpn, built.out_channels
        if pyramid_norm:
            inputs = [block[0].in_channels for block in built.fpn.inner_blocks]
            self.fpn = FeaturePyramidNetwork(inputs, 256, built.fpn.extra_blocks, nn.BatchNorm2d)
        self.name, self.weights = name, weights
        self.key_maps = (TorchvisionLayout(), TorchvisionDetectorLayout())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) normalised -> maps (B, 256, h, w) by name: "0" (finest), ..., "pool"."""
        return dict(self.fpn(self.body(images)))
