"""ResNet with frozen batch normalisation, from torchvision.

He et al., "Deep Residual Learning for Image Recognition", 2016 (https://arxiv.org/abs/1512.03385),
in torchvision's variant (stride on the 3x3 convolution). Differs from torchvision: the classifier
is dropped, batch normalisation is a constant affine map, the first stages do not train, padding is
kept at zero, and maps are worked on in place.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.ops import FrozenBatchNorm2d

from dn_detr.checkpoint import (
    Detectron2Layout,
    DetrexLayout,
    HuggingFaceLayout,
    Layout,
    OfficialLayout,
    TorchvisionLayout,
    as_layouts,
    load_backbone,
    read_weights,
)
from dn_detr.layers import run_checkpointed
from dn_detr.structures import may_hold_padding

_STAGE_STRIDES = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}
_KEY_MAPS = (
    TorchvisionLayout(),
    Detectron2Layout(),
    OfficialLayout(),
    DetrexLayout(),
    HuggingFaceLayout(),
)
_PARTS = [("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)]
logger = logging.getLogger(__name__)


class Padding:
    """The padding of a batch, for filters that must read zeros there.

    Zeros in padded cells do not stay zeros: biases and normalisations fill them, and the next 3x3
    convolution would carry them into the image. Where such a filter finds zeros, as its own zero
    padding shows them to an image that is alone, the features of an image are the same alone and
    in any batch.

    Args:
        mask: (B, H, W) bool, True = padding.
    """

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self._factors: dict[tuple[int, torch.dtype], Tensor] = {}

    def factors(self, x: Tensor, stride: int) -> Tensor:
        """Factors (B, 1, h, w) of a map (B, C, h, w): 0 in the padding, 1 elsewhere."""
        key = (stride, x.dtype)
        if key not in self._factors:
            # The map's size is not computed from the mask's: a traced graph would need a proof
            # that the arithmetic of the filters gives the same.
            rows, columns = (torch.arange(n, device=x.device) * stride for n in x.shape[-2:])
            is_image = ~self.mask[:, None, rows[:, None], columns]
            self._factors[key] = is_image.to(x.dtype)
        return self._factors[key]


class TorchvisionBackbone(nn.Module):
    """A backbone that starts from weights of a torchvision model.

    Attributes:
        body: the network, without its classifier.
        name: of torchvision's model.
        weights: see `ResNet`.
        key_maps: layouts of other code bases that a file of `weights` may have.
    """

    body: Any
    name: str
    weights: str | None
    key_maps: Sequence[Layout]

    def load_pretrained(self) -> bool:
        """Load `weights` into the backbone, for training that starts from no checkpoint.

        Weights given as a *name* come from torch's download cache or are downloaded; when that
        fails, a loud warning is logged and the backbone keeps its random start, so that the model
        still runs on a machine without network. A *file* that is missing or does not fit is an
        error.

        Returns:
            Whether weights were loaded.

        Raises:
            ValueError: no such file or name, or weights of another architecture.
        """
        if self.weights is None:
            return False
        known = torchvision.models.get_model_weights(self.name)
        if self.weights in known.__members__:
            named = known[self.weights]
            try:
                state = named.get_state_dict(progress=False, check_hash=True)
            except OSError as error:  # no network, or a cache that cannot be written
                logger.warning(
                    "THE BACKBONE STARTS FROM RANDOM WEIGHTS: torchvision's %s weights of %s could "
                    "not be fetched (%s). For a real training put the file at %s, or name a file "
                    "with model.backbone.weights=FILE",
                    self.weights,
                    self.name,
                    error,
                    Path(torch.hub.get_dir()) / "checkpoints" / Path(named.url).name,
                )
                return False
        elif Path(self.weights).is_file():
            state = read_weights(self.weights)
        else:
            raise ValueError(
                f"backbone weights {self.weights!r}: no such file, and not one of torchvision's "
                f"{sorted(known.__members__)} for {self.name}"
            )
        load_backbone(self.body, state, self.key_maps, f"backbone weights {self.weights!r}")
        return True


class ResNet(TorchvisionBackbone):
    """A torchvision ResNet that returns the feature maps of some of its stages.

    Args:
        name: torchvision's name: `resnet18` ... `resnet152`.
        out_features: stages to return, from `layer1` (stride 4) to `layer4` (stride 32).
        frozen_stages: how many parts do not train: 0 none, 1 the stem, 2 the stem and layer1 (the
            published recipe), and so on; 5 freezes everything.
        dilation: layer4 with stride 16 and dilation 2 ("DC5").
        weights: what `load_pretrained` loads: a file with a ResNet in it (of torchvision,
            detectron2 or of a detector, in one of the `key_maps`), or the name of
            torchvision weights such as `IMAGENET1K_V1`. None: nothing. Building the model
            alone reads no file and needs no network.
        batch_norm: `frozen`, or `trainable` for training from scratch. A trainable one
            normalises each process's images by themselves, unless they run on GPUs.
        mask_padding: keep padded cells at zero through all layers, so that an image has the same
            features alone and in any batch. False is the published behaviour: biases of the
            normalisation leak from the padding into the image's border.
        key_maps: layouts of other code bases that a file of `weights` may have.

    Attributes:
        activation_checkpointing: see `run_checkpointed`; stage by stage, which keeps less than
            block by block: what enters a block is two thirds of what it needs.

    Raises:
        ValueError: unknown name, stage, number of frozen parts or normalisation.
    """

    def __init__(
        self,
        name: str = "resnet50",
        *,
        out_features: Sequence[str] = ("layer2", "layer3", "layer4"),
        frozen_stages: int = 2,
        dilation: bool = False,
        weights: str | None = None,
        batch_norm: str = "frozen",
        mask_padding: bool = True,
        key_maps: Sequence[Layout] = _KEY_MAPS,
    ) -> None:
        super().__init__()
        if not 0 <= frozen_stages <= len(_PARTS):
            raise ValueError(f"frozen_stages {frozen_stages}: choose from 0 to {len(_PARTS)}")
        unknown = [stage for stage in out_features if stage not in _STAGE_STRIDES]
        if unknown or not out_features:
            raise ValueError(f"out_features {list(out_features)}: choose from layer1 ... layer4")
        full = _build_torchvision_resnet(name, batch_norm, dilation)
        self.body = IntermediateLayerGetter(full, {stage: stage for stage in out_features})
        strides = {**_STAGE_STRIDES, "layer4": 16 if dilation else 32}
        self.out_strides = [strides[stage] for stage in out_features]
        convolutions = {
            stage: [m for m in getattr(full, stage).modules() if isinstance(m, nn.Conv2d)]
            for stage in out_features
        }
        self.out_channels = [convolutions[stage][-1].out_channels for stage in out_features]
        self.name = name
        self.weights = weights
        self.mask_padding = mask_padding
        self.key_maps = as_layouts(key_maps)
        self.activation_checkpointing = False
        stride = 4
        for stage_name, stage in self.body.items():
            for index, block in stage.named_children() if stage_name in _STAGE_STRIDES else ():
                replacement = ResidualBlock(block, stride)
                stage.set_submodule(index, replacement)
                stride = replacement.out_stride
        for part in sum(_PARTS[:frozen_stages], ()):
            if part in self.body:
                self.body[part].requires_grad_(False)

    def forward(self, images: Tensor, mask: Tensor) -> list[Tensor]:
        """Features of the chosen stages.

        Args:
            images: (B, 3, H, W) normalised.
            mask: (B, H, W) bool, True = padding.

        Returns:
            One (B, C_i, ceil(H / stride_i), ceil(W / stride_i)) per stage, finest first, with
            C_i in `out_channels` and stride_i in `out_strides`.
        """
        is_masked = self.mask_padding and may_hold_padding(mask)
        padding = Padding(mask) if is_masked else None
        x = run_checkpointed(self, self._stem, images, padding)
        maps = []
        for name, stage in self.body.items():
            if name in _STAGE_STRIDES:
                x = run_checkpointed(self, _run_stage, stage, x, padding)
            if name in self.body.return_layers:
                maps.append(x)
        return maps

    def _stem(self, images: Tensor, padding: Padding | None) -> Tensor:
        """(B, 3, H, W) -> (B, 64, ceil(H / 4), ceil(W / 4))."""
        if padding is not None:
            images = images * padding.factors(images, 1)
        if images.device.type == "cpu":  # oneDNN's filters read and write this layout
            images = images.contiguous(memory_format=torch.channels_last)
        x = _normalised(self.body.conv1, self.body.bn1, images)
        x = self.body.maxpool(_activated(x, 2, padding))
        if padding is not None:  # windows beside an image have seen it
            x *= padding.factors(x, 4)
        return x


class ResidualBlock(nn.Module):
    """torchvision's residual block with in-place normalisation and ReLU; parameter names are kept.

    Filters that read neighbours find zeros in the padding, also those of a block that follows.

    Args:
        block: torchvision's basic or bottleneck block.
        in_stride: of its input, in pixels.
    """

    def __init__(self, block: nn.Module, in_stride: int) -> None:
        super().__init__()
        for name, part in block.named_children():
            self.add_module(name, part)
        self.num_filters = sum(isinstance(part, nn.Conv2d) for part in block.children())
        self.in_stride = in_stride
        self.out_stride = in_stride * math.prod(conv.stride[0] for conv, _ in self._filters())

    def forward(self, x: Tensor, padding: Padding | None = None) -> Tensor:
        """(B, C, H, W), zero in the padding if the first filter reads neighbours -> the same."""
        filters = self._filters()
        reads_neighbours = [conv.kernel_size != (1, 1) for conv, _ in filters]
        out, stride = x, self.in_stride
        for i, (conv, norm) in enumerate(filters):
            if i > 0:
                out = _activated(out, stride, padding if reads_neighbours[i] else None)
            out = _normalised(conv, norm, out)
            stride *= conv.stride[0]
        downsample = getattr(self, "downsample", None)
        out += x if downsample is None else _normalised(downsample[0], downsample[1], x)
        return _activated(out, stride, padding if reads_neighbours[0] else None)

    def _filters(self) -> list[tuple[nn.Conv2d, nn.Module]]:
        """Each convolution and the normalisation after it."""
        numbers = range(1, self.num_filters + 1)
        return [(getattr(self, f"conv{i}"), getattr(self, f"bn{i}")) for i in numbers]


def _run_stage(stage: nn.Module, x: Tensor, padding: Padding | None) -> Tensor:
    for block in stage.children():
        x = block(x, padding)
    return x


def _normalised(conv: nn.Conv2d, norm: nn.Module, x: Tensor) -> Tensor:
    """Convolution and normalisation, a constant one in place.

    Folded into the filter it was no faster, and that rounds the filter: gradients then differ from
    the published code's by more than that code's own rounding. In half types it is the other way
    round, because every pass over a map rounds the map.
    """
    if not isinstance(norm, FrozenBatchNorm2d):
        return norm(conv(x))
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = norm.bias - norm.running_mean * scale
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        weight = conv.weight * scale[:, None, None, None]
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return conv(x).mul_(scale[:, None, None]).add_(bias[:, None, None])


def _activated(x: Tensor, stride: int, padding: Padding | None) -> Tensor:
    """ReLU, and zeros in the padding, both in place: no backward pass needs what was there."""
    if padding is not None:
        x *= padding.factors(x, stride)
    return F.relu_(x)


def _build_torchvision_resnet(name: str, batch_norm: str, dilation: bool) -> nn.Module:
    norms = {"frozen": FrozenBatchNorm2d, "trainable": nn.BatchNorm2d}
    if batch_norm not in norms:
        raise ValueError(f"batch_norm {batch_norm!r}: choose from {sorted(norms)}")
    known = torchvision.models.list_models(include=["resnet*", "resnext*", "wide_resnet*"])
    if name not in known:
        raise ValueError(f"{name!r} is not a torchvision ResNet: choose from {known}")
    if dilation and name in ("resnet18", "resnet34"):
        raise ValueError(f"{name} has basic blocks, for which torchvision knows no dilation")
    return torchvision.models.get_model(
        name,
        weights=None,
        norm_layer=norms[batch_norm],
        replace_stride_with_dilation=[False, False, dilation],
    )
