"""Any hierarchical network of timm as a backbone: Swin, ConvNeXt, ResNet variants, EfficientNet.

timm (https://github.com/huggingface/pytorch-image-models) is the extra `timm`. Its networks are
used as they are, in the form that it calls `features_only`; what differs: stages that are not
returned do not exist, any image size is accepted, and padding is kept out of the features.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from dn_detr.layers import run_checkpointed

from .padding import (
    DryRun,
    KnownPadding,
    dry_run,
    ignore_padding_in_max_pools,
    with_known_padding,
    zero_padding_before,
)
from .timm_weights import import_timm, load_weights

_RESERVED = {"checkpoint_path", "cache_dir", "features_only", "out_indices", "feature_cls"}


class TimmBackbone(nn.Module):
    """A network of timm that returns the feature maps of some of its stages.

    With `mask_padding` an image has the same features alone and in any batch where cells meet
    only in convolutions, poolings and Swin's windows (Swin, ConvNeXt, ResNet, ResNeXt, RegNetX).
    What looks at a whole map at once sees the padding too: squeeze-and-excitation (EfficientNet,
    RegNetY, SE-ResNet), global response normalisation (ConvNeXt V2), attention other than Swin's,
    trained batch statistics. There the filters still read zeros, but the features depend on the
    batch.

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
        mask_padding: keep padding out of the features, see above.
        drop_path: probability with which the last block's branch is skipped in training, falling
            linearly to 0 at the first; None: timm's choice for the network.
        output_norm: normalise the channels of each map by a trained LayerNorm, as detectors with a
            Swin Transformer do, whose maps have no norm of their own. Tensors `norms.{i}`.
        arguments: further arguments of timm's constructor, such as `depths`.

    Attributes:
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
        mask_padding: bool = True,
        drop_path: float | None = None,
        output_norm: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        timm = import_timm()
        if not out_indices:
            raise ValueError("out_indices is empty: name the stages to return, finest first")
        if batch_norm not in ("frozen", "trainable"):
            raise ValueError(f"batch_norm {batch_norm!r}: choose from ['frozen', 'trainable']")
        self.name = name
        self.weights = weights
        self.mask_padding = mask_padding
        self.activation_checkpointing = False
        self._arguments = _constructor_arguments(name, drop_path, dict(arguments or {}))
        body = _create(name, list(out_indices), self._arguments)
        if batch_norm == "frozen":
            body = timm.layers.freeze_batch_norm_2d(body)
        self._channels_last = str(getattr(body, "output_fmt", "NCHW")) == "Format.NHWC"
        self.body = body
        stages = [i % len(_stages(body)) for i in out_indices]  # from the front
        if stages != sorted(set(stages)):
            raise ValueError(f"out_indices {list(out_indices)}: name each stage once, finest first")
        run = self._measure(stages)
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in self.out_channels if output_norm)
        self._freeze(frozen_stages, last_stage=stages[-1])
        self._hook(run)

    def forward(self, images: Tensor, mask: Tensor) -> list[Tensor]:
        """Features of the chosen stages.

        Args:
            images: (B, 3, H, W) normalised, of any size.
            mask: (B, H, W) bool, True = padding.

        Returns:
            One (B, C_i, ceil(H / stride_i), ceil(W / stride_i)) per stage, finest first, with
            C_i in `out_channels` and stride_i in `out_strides`.
        """
        height, width = images.shape[-2:]
        coarsest = self.out_strides[-1]
        # To whole cells of every stage: networks that halve odd sizes downwards would lose the
        # last rows, and those that pad by the parity of the size would shift their cells.
        pad = (0, -width % coarsest, 0, -height % coarsest)
        mask = F.pad(mask, pad, value=True)
        with KnownPadding(mask) if self.mask_padding else nullcontext():
            maps = self._stage_maps(F.pad(images, pad))
        if self._channels_last:
            maps = [features.permute(0, 3, 1, 2) for features in maps]
        maps = [
            features[..., : -(-height // stride), : -(-width // stride)]
            for features, stride in zip(maps, self.out_strides, strict=True)
        ]
        for i, norm in enumerate(self.norms):
            maps[i] = norm(maps[i].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return maps

    def _stage_maps(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) of whole cells -> the chosen stages in the network's own layout."""
        body: Any = self.body
        runs_in_order = isinstance(body, import_timm().models.FeatureListNet)
        if not (self.activation_checkpointing and runs_in_order):
            return run_checkpointed(self, with_known_padding(body), images)
        x, maps = images, []
        for name, module in body.items():
            # A single layer has nothing inside it to forget, and may work in place.
            is_layer = next(module.children(), None) is None
            x = module(x) if is_layer else run_checkpointed(self, with_known_padding(module), x)
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
        return load_weights(self.body, self.name, self.weights, self._arguments)

    def _measure(self, stages: list[int]) -> DryRun:
        """Set `out_channels` and `out_strides`; drop what the maps do not depend on."""
        coarsest = _stages(self.body)[stages[-1]]["reduction"]
        size = (3 * coarsest, 4 * coarsest)
        run = self._dry_run(size)
        dropped = _drop_unused(self.body, run.used)
        try:
            run = self._dry_run(size)
        except ValueError:  # a network of branches needs even those that lead nowhere
            for name, module in dropped.items():
                self.body.set_submodule(name, module)
            run = self._dry_run(size)
        axis = 1 if self._channels_last else -2
        heights = [output.shape[axis] for output in run.outputs]
        widths = [output.shape[axis + 1] for output in run.outputs]
        self.out_channels = [output.shape[3 * axis if axis == 1 else 1] for output in run.outputs]
        self.out_strides = [size[0] // height for height in heights]
        whole = all(
            s * h == size[0] and s * w == size[1]
            for s, h, w in zip(self.out_strides, heights, widths, strict=True)
        )
        increasing = sorted(set(self.out_strides)) == self.out_strides
        if not (whole and increasing and len(run.outputs) == len(stages)):
            found = [f"{h} x {w}" for h, w in zip(heights, widths, strict=True)]
            raise ValueError(
                f"{self.name} gives maps of {', '.join(found)} for an image of {size[0]} x "
                f"{size[1]}: a backbone needs strides that grow from map to map and divide the "
                "image. Choose other out_indices, or a hierarchical network (Swin, ConvNeXt, "
                "ResNet, ...)"
            )
        return run

    def _dry_run(self, size: tuple[int, int]) -> DryRun:
        try:
            return dry_run(self.body, *size)
        except Exception as error:  # whatever a foreign network does with a size it cannot take
            raise ValueError(
                f"{self.name} cannot be a backbone: it does not take an image of {size[0]} x "
                f"{size[1]} pixels ({error})"
            ) from error

    def _freeze(self, frozen_stages: int, last_stage: int) -> None:
        parts = _parts(self.body)
        if not 0 <= frozen_stages <= len(parts):
            raise ValueError(f"frozen_stages {frozen_stages}: choose from 0 to {len(parts)}")
        modules = [name for name, _ in self.body.named_modules()]
        for stage in _stages(self.body)[: last_stage + 1]:
            if frozen_stages and _span(modules, stage["module"])[0] == len(modules):
                raise ValueError(
                    f"frozen_stages {frozen_stages}: timm does not say which modules of "
                    f"{self.name} are its {stage['module']!r}; only 0 is possible"
                )
        for parameters in parts[:frozen_stages]:
            for parameter in parameters:
                parameter.requires_grad_(False)

    def _hook(self, run: DryRun) -> None:
        """Keep padding from what reads neighbouring cells."""
        pools = {m: s for m, s in run.filters.items() if isinstance(m, nn.MaxPool2d)}
        zero_padding_before((m, s) for m, s in run.filters.items() if m not in pools)
        ignore_padding_in_max_pools(pools.items())
        if _is_swin(self.name):
            from .swin_windows import keep_windows_from_padding  # timm may not be imported before

            strides = {s["module"].replace(".", "_"): s["reduction"] for s in _stages(self.body)}
            keep_windows_from_padding(
                [(m, strides[n]) for n, m in self.body.named_children() if n in strides]
            )


def _constructor_arguments(
    name: str, drop_path: float | None, arguments: dict[str, Any]
) -> dict[str, Any]:
    """What timm's constructor of this network gets, beside the stages."""
    timm = import_timm()
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise ValueError(f"timm knows no network {name!r}; did you mean {', '.join(near)}?")
    tags = [n.partition(".")[2] for n in timm.list_pretrained(f"{name.partition('.')[0]}.*")]
    if "." in name and name.partition(".")[2] not in tags:
        raise ValueError(f"timm has no weights {name!r}; tags of this network: {sorted(tags)}")
    reserved = [k for k in arguments if k in _RESERVED or k.startswith("pretrained")]
    if reserved:
        raise ValueError(f"arguments {reserved}: these are set by the backbone's own settings")
    if drop_path is not None:
        arguments["drop_path_rate"] = drop_path
    if _is_swin(name):
        # Detectors shift the windows of the last stage as well; at the size of pretraining, it
        # holds a single window.
        arguments = {"always_partition": True} | arguments
    return arguments


def _is_swin(name: str) -> bool:
    """Whether a network is a Swin Transformer (of the first version)."""
    entrypoint = import_timm().models.model_entrypoint(name.partition(".")[0])
    return entrypoint.__module__ == "timm.models.swin_transformer"


def _create(name: str, out_indices: list[int], arguments: dict[str, Any]) -> nn.Module:
    """A `features_only` network; `arguments` gains what makes it take any image size.

    Not every network whose size is fixed by default has an argument for that, so it is tried.
    """
    timm = import_timm()
    tries: list[dict[str, Any]] = [{}]
    if timm.get_pretrained_cfg(name).fixed_input_size:
        tries.insert(0, {"dynamic_img_size": True})
    for more in tries:
        try:
            body = timm.create_model(
                name, features_only=True, out_indices=out_indices, **arguments, **more
            )
        except TypeError as error:
            reason = error
        except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError) as error:
            raise ValueError(
                f"timm cannot give the stages out_indices={out_indices} of {name}: {error!r}"
            ) from error
        else:
            arguments.update(more)
            return body
    raise ValueError(f"timm's {name} does not take the arguments {arguments}: {reason}")


def _drop_unused(body: nn.Module, used: set[str]) -> dict[str, nn.Module]:
    """Replace the modules whose parameters have no part in the maps, and return them by name.

    Parameters without a gradient would make distributed training wait for them.
    """
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(name in used)
    dropped: dict[str, nn.Module] = {}
    for name, module in list(body.named_modules()):
        owned = [f"{name}.{n}" for n, _ in module.named_parameters()]
        replaceable = name and not isinstance(module, (nn.ModuleList, nn.ModuleDict))
        inside_dropped = any(name.startswith(f"{other}.") for other in dropped)
        if replaceable and owned and not inside_dropped and not used.intersection(owned):
            body.set_submodule(name, nn.Identity())
            dropped[name] = module
    return dropped


def _stages(body: Any) -> list[dict[str, Any]]:
    """timm's account of all stages, also of those that were not built."""
    return list(body.feature_info.info)


def _parts(body: nn.Module) -> list[list[nn.Parameter]]:
    """Parameters of the stem, of the stage of stride 4, of the stage of stride 8, and so on.

    timm's networks register their modules in the order in which they use them.
    """
    modules = [name for name, _ in body.named_modules()]
    stages = [s for s in _stages(body) if s["reduction"] >= 4]
    stem = [s for s in _stages(body) if s["reduction"] < 4]
    ends = [_span(modules, stage["module"])[1] for stage in stages]
    first = (
        _span(modules, stem[-1]["module"])[1] if stem else _span(modules, stages[0]["module"])[0]
    )
    parts: list[list[nn.Parameter]] = [[] for _ in range(1 + len(stages))]
    for name, parameter in body.named_parameters():
        owner = modules.index(name.rpartition(".")[0])
        parts[sum(owner >= end for end in [first, *ends[:-1]])].append(parameter)
    return parts


def _span(modules: list[str], feature: str) -> tuple[int, int]:
    """First and one past the last of the modules that make a stage; the end if it is not built."""
    names = {feature, feature.replace(".", "_", 1), f"model.{feature}"}
    inside = [
        i for i, n in enumerate(modules) if any(n == m or n.startswith(m + ".") for m in names)
    ]
    return (inside[0], inside[-1] + 1) if inside else (len(modules), len(modules))
