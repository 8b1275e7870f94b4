"""Any hierarchical network of timm as a backbone: Swin, ConvNeXt, ResNet variants, EfficientNet.

timm (https://github.com/huggingface/pytorch-image-models) is the extra `timm`. Its networks compute
what timm publishes, in the form that it calls `features_only`. They see the padding of a batch:
the features of an image near its padding depend on the other images. `ResNet` keeps padding out.
"""

from __future__ import annotations

import difflib
import logging
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from dn_detr.checkpoint import read_weights
from dn_detr.layers import run_checkpointed

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_RESERVED = {"checkpoint_path", "cache_dir", "features_only", "out_indices", "feature_cls"}
logger = logging.getLogger(__name__)


class TimmBackbone(nn.Module):
    """A network of timm that returns the feature maps of some of its stages.

    Args:
        name: timm's name, with or without the tag that says which weights: `convnext_tiny`,
            `swin_tiny_patch4_window7_224.ms_in1k`.
        out_indices: stages to return, finest first, as timm counts them: from 0, negative from
            the end. The last stage of a Swin Transformer or ConvNeXt is 3, that of a ResNet 4.
        frozen_stages: how many parts do not train: 0 none, 1 the stem, 2 the stem and the stage
            of stride 4, and so on, as for `ResNet`.
        weights: what `load_pretrained` loads: `pretrained` for those that timm downloads for
            this name, or a file of timm's or the original authors' layout. None: nothing.
            Building the model alone reads no file and needs no network. The config's
            `pixel_mean` and `pixel_std` must be those of the weights.
        batch_norm: `frozen`, or `trainable` for training from scratch; of no effect on a
            network without batch normalisation.
        drop_path: probability with which the last block's branch is skipped in training, falling
            linearly to 0 at the first; None: timm's choice for the network.
        output_norm: normalise the channels of each map by a trained LayerNorm, as detectors with a
            Swin Transformer do, whose maps have no norm of their own. Tensors `norms.{i}`.
        arguments: further arguments of timm's constructor, such as `depths`. Networks that are
            built for one size of images get `dynamic_img_size=True`.

    Attributes:
        out_channels: channels of each returned map.
        out_strides: pixels per cell of each returned map.
        activation_checkpointing: see `run_checkpointed`; stage by stage where timm builds the
            network as a list of stages, else the whole network. (With timm's own
            `set_grad_checkpointing` batch normalisation would count every image twice.)

    Raises:
        ImportError: timm is not installed.
        ValueError: timm knows no such network, or it is none that can be a backbone; no such
            stage, number of frozen parts, normalisation or argument.
    """

    def __init__(
        self,
        name: str,
        *,
        out_indices: Sequence[int] = (-3, -2, -1),
        frozen_stages: int = 2,
        weights: str | None = None,
        batch_norm: str = "frozen",
        drop_path: float | None = None,
        output_norm: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        timm = _import_timm()
        if not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
            raise ValueError(f"timm knows no network {name!r}; did you mean {', '.join(near)}?")
        if batch_norm not in ("frozen", "trainable"):
            raise ValueError(f"batch_norm {batch_norm!r}: choose from ['frozen', 'trainable']")
        self.name = name
        self.weights = weights
        self.activation_checkpointing = False
        self._arguments = dict(arguments or {})
        if drop_path is not None:
            self._arguments["drop_path_rate"] = drop_path
        try:
            if timm.get_pretrained_cfg(name).fixed_input_size:
                self._arguments.setdefault("dynamic_img_size", True)
            body = self._create(features_only=True, out_indices=list(out_indices))
        except TypeError as error:
            raise ValueError(
                f"timm's {name} does not take the arguments {self._arguments}: {error}"
            ) from error
        except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError) as error:
            raise ValueError(
                f"timm cannot give the stages out_indices={list(out_indices)} of {name}: {error!r}"
            ) from error
        self.out_channels: list[int] = list(body.feature_info.channels())
        self.out_strides: list[int] = list(body.feature_info.reduction())
        if not out_indices or sorted(set(self.out_strides)) != self.out_strides:
            raise ValueError(
                f"out_indices {list(out_indices)} of {name} have the strides {self.out_strides}: "
                "name each stage once, finest first, of a hierarchical network (Swin, ConvNeXt, "
                "ResNet, ...), whose strides grow from stage to stage"
            )
        self._channels_last = str(getattr(body, "output_fmt", "NCHW")) == "Format.NHWC"
        self.body = timm.layers.freeze_batch_norm_2d(body) if batch_norm == "frozen" else body
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.out_channels if output_norm)
        self._freeze(frozen_stages)

    def forward(self, images: Tensor, mask: Tensor) -> list[Tensor]:
        """Features of the chosen stages.

        Args:
            images: (B, 3, H, W) normalised, of any size.
            mask: (B, H, W) bool, True = padding; not used, padding is seen as it is.

        Returns:
            One (B, C_i, ceil(H / stride_i), ceil(W / stride_i)) per stage, finest first, with
            C_i in `out_channels` and stride_i in `out_strides`.

        Raises:
            ValueError: the network's maps have other sizes.
        """
        height, width = images.shape[-2:]
        coarsest = self.out_strides[-1]
        # To whole cells of every stage: networks that halve odd sizes downwards would lose the
        # last rows, and those that pad by the parity of the size would shift their cells.
        images = F.pad(images, (0, -width % coarsest, 0, -height % coarsest))
        maps = []
        for index, features in enumerate(self._stage_maps(images)):
            stride = self.out_strides[index]
            x = features.permute(0, 3, 1, 2) if self._channels_last else features
            if (x.shape[2] * stride, x.shape[3] * stride) != images.shape[2:]:
                raise ValueError(
                    f"{self.name} cannot be a backbone: a map of stride {stride} has "
                    f"{x.shape[2]} x {x.shape[3]} cells for an image of {images.shape[2]} x "
                    f"{images.shape[3]} pixels"
                )
            x = x[:, :, : -(-height // stride), : -(-width // stride)]
            if self.norms:
                x = self.norms[index](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            maps.append(x)
        return maps

    def _stage_maps(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) of whole cells -> the chosen stages in the network's own layout."""
        body: Any = self.body
        is_list_of_stages = isinstance(body, _import_timm().models.FeatureListNet)
        if not (self.activation_checkpointing and is_list_of_stages):
            return run_checkpointed(self, body, images)
        x, maps = images, []
        for name, module in body.items():
            # A single layer keeps nothing inside, and may work in place.
            is_layer = next(module.children(), None) is None
            x = module(x) if is_layer else run_checkpointed(self, module, x)
            if name in body.return_layers:
                maps.append(x)
        return maps

    def load_pretrained(self) -> bool:
        """Load `weights` into the backbone, for training that starts from no checkpoint.

        Weights to be downloaded come from the cache of timm's downloads or are fetched; when that
        fails, a loud warning is logged and the backbone keeps its random start, so that the model
        still runs on a machine without network. A *file* that is missing or does not fit is an
        error. Nothing in a file is executed.

        Returns:
            Whether weights were loaded.

        Raises:
            ValueError: no such file, or weights of another architecture.
        """
        if self.weights is None:
            return False
        timm = _import_timm()
        source: dict[str, Any] = {}
        if self.weights != "pretrained":
            if not Path(self.weights).is_file():
                raise ValueError(
                    f"backbone weights {self.weights!r}: no such file, and not 'pretrained'"
                )
            state = {n.removeprefix("module."): x for n, x in read_weights(self.weights).items()}
            classes = _count_classes(state, timm.get_pretrained_cfg(self.name).classifier)
            source = dict(state_dict=state, num_classes=classes, label_offset=0)
        try:
            # timm is strict with whole networks only, and the backbone takes its part from one.
            network = self._create(pretrained=True, pretrained_cfg_overlay=source)
        except OSError as error:  # no network, or a cache that cannot be written
            logger.warning(
                "THE BACKBONE STARTS FROM RANDOM WEIGHTS: timm's weights of %s could not be "
                "fetched (%s). For a real training fetch them on a machine with network, or name "
                "a file with model.backbone.weights=FILE",
                self.name,
                error,
            )
            return False
        except (AttributeError, KeyError, RuntimeError, ValueError) as error:
            reason = textwrap.shorten(str(error), 600)  # it lists every tensor
            raise ValueError(
                f"backbone weights {self.weights!r} do not fit {self.name}: {reason}"
            ) from error
        loaded = {
            spelling: tensor
            for name, tensor in network.state_dict().items()
            for spelling in _spellings(name)
        }
        own = [n for n in self.body.state_dict() if not n.endswith("num_batches_tracked")]
        self.body.load_state_dict({name: loaded[name] for name in own}, strict=False)
        if self.weights == "pretrained":
            self._check_normalisation(network.pretrained_cfg)
        return True

    def _create(self, **options: Any) -> Any:
        """A network with the config's arguments, which do not say what to fetch or write."""
        reserved = [k for k in self._arguments if k in _RESERVED or k.startswith("pretrained")]
        if reserved:
            raise ValueError(f"arguments {reserved}: these are set by the backbone's own settings")
        return _import_timm().create_model(self.name, **options, **self._arguments)

    def _check_normalisation(self, pretrained: Mapping[str, Any]) -> None:
        """Warn if the weights want other pixels than the configs give by default."""
        mean, std = pretrained["mean"], pretrained["std"]
        if (tuple(mean), tuple(std)) != _IMAGENET:
            logger.warning(
                "the weights of %s were trained with another normalisation: set "
                "model.pixel_mean=%s model.pixel_std=%s",
                self.name,
                [round(255 * m, 3) for m in mean],
                [round(255 * s, 3) for s in std],
            )

    def _freeze(self, frozen_stages: int) -> None:
        """Freeze the first parts, and what comes after the last returned stage.

        timm's networks register their modules in the order in which they use them.
        """
        names, parameters = zip(*self.body.named_parameters(), strict=True)
        ends = [0]  # of the parts, as numbers of parameters
        for stage in self.body.feature_info.info:
            if not 4 <= stage["reduction"] <= self.out_strides[-1]:
                continue
            prefixes = tuple(f"{name}." for name in _spellings(stage["module"]))
            inside = [i for i, name in enumerate(names) if name.startswith(prefixes)]
            if not inside and frozen_stages:
                raise ValueError(
                    f"frozen_stages {frozen_stages}: timm does not say which modules of "
                    f"{self.name} are its {stage['module']!r}; only 0 is possible"
                )
            if not inside:
                return
            ends += [inside[0], inside[-1] + 1] if len(ends) == 1 else [inside[-1] + 1]
        if not 0 <= frozen_stages < len(ends):
            raise ValueError(f"frozen_stages {frozen_stages}: choose from 0 to {len(ends) - 1}")
        for parameter in (*parameters[: ends[frozen_stages]], *parameters[ends[-1] :]):
            parameter.requires_grad_(False)


def _import_timm() -> ModuleType:
    """The package timm, which this library needs for nothing else."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            "backbones other than ResNet come from timm, which is not installed: pip install timm"
        ) from error
    return timm


def _spellings(name: str) -> tuple[str, ...]:
    """A name in a whole network -> its possible names in a `features_only` network."""
    return name, name.replace(".", "_", 1), f"model.{name}", f"body.{name}"


def _count_classes(state: Mapping[str, Tensor], classifier: Any) -> int:
    """Rows of the classifier in a file, under timm's or the original name; 0 if it has none."""
    names = [classifier] if isinstance(classifier, str) else list(classifier or ())
    for name in [*names, *(name.partition(".")[0] for name in names)]:
        if f"{name}.weight" in state:
            return len(state[f"{name}.weight"])
    return 0
