"""What the golden files are compared with: filled models, and recordings of what they compute."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from dn_detr.checkpoint import load_tensors
from dn_detr.config import get_config, instantiate
from dn_detr.layers import PositionEmbeddingSine, sine_embed
from dn_detr.modeling import NOTHING, Detector, FocalClassification
from dn_detr.modeling.denoising import Noise
from dn_detr.modeling.queries import ProposalQueries
from dn_detr.ops import missing_kernels, use_kernels

# The published treatment of padding and of empty denoising slots. Every model masks in backbone
# and neck; the other options belong to a part that only these models have.
_EVERYWHERE = {"backbone.mask_padding": False, "neck.mask_padding": False}
_DEFORMABLE_DECODER = {"transformer.decoder.padded_query_pos": True}
_PROPOSALS = {"queries.mask_padding": False}
_DENOISING = {"denoising.mask_empty_slots": False}
_PUBLISHED: dict[str, dict[str, bool]] = {
    "dab_detr_r50": _EVERYWHERE,
    "dn_detr_r50": _EVERYWHERE | _DENOISING,
    "dab_deformable_detr_r50": _EVERYWHERE | _DEFORMABLE_DECODER,
    "dab_deformable_detr_r50_two_stage": _EVERYWHERE | _DEFORMABLE_DECODER | _PROPOSALS,
    "dn_deformable_detr_r50": _EVERYWHERE | _DEFORMABLE_DECODER | _DENOISING,
    "dn_deformable_encoder_only_r50": _EVERYWHERE | _DENOISING,
    "dino_r50_detrex": _EVERYWHERE | _DEFORMABLE_DECODER | _PROPOSALS | _DENOISING,
}

ATTENTION_KERNELS = ("compiled", "pytorch")


@contextmanager
def attention_kernels(name: str) -> Iterator[None]:
    """Compute deformable attention with these kernels; skips where they are not built."""
    problem = missing_kernels("cpu")
    if name == "compiled" and problem is not None:
        pytest.skip(problem)
    with use_kernels("auto" if name == "compiled" else name):
        yield


def load_module(path: Path) -> ModuleType:
    """Import a file that belongs to no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_arrays(path: Path) -> dict[str, Any]:
    """All arrays of an .npz file."""
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def build_published(
    config: str, tensors: Mapping[str, Tensor], *, num_classes: int, **options: Any
) -> Detector:
    """Build a model of a folder `configs/models` as published; load tensors of a layout it knows.

    An option that a part does not take is an error: nothing is left at our default unnoticed.

    Args:
        config: file name without `.py`.
        tensors: under the names of the code that they come from.
        num_classes: K.
        **options: further changes; dots are written as double underscores.
    """
    model_cfg = get_config(f"models/{config}.py").model
    model_cfg.num_classes = num_classes
    changes = {key.replace("__", "."): value for key, value in options.items()}
    published = _PUBLISHED[config]
    for option in _DEFORMABLE_DECODER | _PROPOSALS | _DENOISING:
        assert option in published or OmegaConf.select(model_cfg, option) is None, option
    for key, value in {**published, **changes}.items():
        # A config need not spell out an option; a part refuses one that it does not have.
        OmegaConf.update(model_cfg, key, value, force_add=True)
    model: Detector = instantiate(model_cfg)
    report = load_tensors(model, dict(tensors))
    assert report.fresh == (), report
    return model


@contextmanager
def recording(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Any]]]:
    """Collect what each module returns, call by call, while the context lasts."""
    calls: dict[str, list[Any]] = defaultdict(list)

    def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, output: calls[name].append(output)

    hooks = [module.register_forward_hook(record(name)) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def traced_modules(model: Detector) -> dict[str, nn.Module]:
    """The modules whose outputs detrex printed; stages and layers have its names."""
    body, transformer = model.backbone.body, model.transformer
    traced = {f"backbone.res{i + 1}": getattr(body, f"layer{i}")[-1] for i in range(1, 5)}
    traced |= {f"encoder.layers.{i}": layer for i, layer in enumerate(transformer.encoder.layers)}
    traced |= {f"decoder.layers.{i}": layer for i, layer in enumerate(transformer.decoder.layers)}
    traced |= {"neck": model.neck, "position_embedding": model.position_embedding}
    traced["transformer"] = transformer.decoder
    if isinstance(model.queries, ProposalQueries):
        traced |= {"cells": model.queries.norm, "cell_logits": model.queries.class_embed}
    return traced


@dataclass(frozen=True)
class Evaluation:
    """What a model computes for a batch on the way to its predictions.

    Attributes:
        features: maps of the backbone.
        positions: position embedding of every level.
        memory: (B, S, C).
        first_states: (B, Q, C) after the first decoder layer, before a final norm.
        states: (N, B, Q, C) that the heads see.
        references: (N, B, Q, 4).
        logits: (N, B, Q, K).
        boxes: (N, B, Q, 4).
        queries: what the queries module returned.
        calls: the outputs of `traced_modules`.
    """

    features: list[Tensor]
    positions: list[Tensor]
    memory: Tensor
    first_states: Tensor
    states: Tensor
    references: Tensor
    logits: Tensor
    boxes: Tensor
    queries: Any
    calls: dict[str, list[Any]]


def evaluate(model: Detector, images: Tensor, mask: Tensor) -> Evaluation:
    """Predict for images (B, 3, H, W) with a padding mask (B, H, W), and keep what led there."""
    parts = {
        "features": model.backbone,
        "positions": model.position_embedding,
        "memory": model.transformer.encoder,
        "first_states": model.transformer.decoder.layers[0],
        "decoder": model.transformer.decoder,
        "heads": model.heads,
        "queries": model.queries,
    }
    parts |= traced_modules(model)
    model.eval()
    with torch.no_grad(), recording(parts) as calls:
        outputs = model.forward_tensors(images, mask)
    states, references = calls["decoder"][-1]
    logits, boxes = calls["heads"][-1]["pred_logits"], calls["heads"][-1]["pred_boxes"]
    assert torch.equal(outputs["pred_logits"], logits[-1])
    assert torch.equal(outputs["pred_boxes"], boxes[-1])
    return Evaluation(
        features=calls["features"][-1],
        positions=calls["positions"],
        memory=calls["memory"][-1],
        first_states=calls["first_states"][-1],
        states=states,
        references=references,
        logits=logits,
        boxes=boxes,
        queries=calls["queries"][-1],
        calls=calls,
    )


@dataclass(frozen=True)
class Step:
    """What one training step computes.

    Attributes:
        losses: weighted terms under our names.
        total: their sum.
        gradients: under the names of a foreign layout; zeros where nothing trains.
        gradient_norm: L2 norm of all of them.
        without_gradient: our names of the trainable parameters that got none.
        noised: what the denoising returned, or None.
        matching: of the decoder's layers, then of a two-stage model's proposals.
        logits: (N, B, D + Q, K).
        boxes: (N, B, D + Q, 4).
        queries: what the queries module returned.
        calls: the outputs of `traced_modules`.
    """

    losses: dict[str, float]
    total: float
    gradients: dict[str, Tensor]
    gradient_norm: float
    without_gradient: list[str]
    noised: Any
    matching: list[Any]
    logits: Tensor
    boxes: Tensor
    queries: Any
    calls: dict[str, list[Any]]


Extra = Callable[[dict[str, list[Any]]], dict[str, Tensor]]


def train(
    model: Detector,
    losses_of: Callable[[], dict[str, Tensor]],
    layout: str,
    *,
    noise: list[Noise] | None = None,
    extra: Extra | None = None,
) -> Step:
    """Compute losses and gradients.

    Args:
        model: to be trained; its gradients are reset.
        losses_of: calls the model.
        layout: whose names the gradients get.
        noise: replaces the draws of the denoising, image by image.
        extra: from what was recorded, terms to be added to losses of the same name.
    """
    parts = {
        "heads": model.heads,
        "queries": model.queries,
        "matcher": model.criterion.matcher,
    }
    if model.denoising is not None:
        parts["denoising"] = model.denoising
    parts |= traced_modules(model)
    model.train()
    model.zero_grad(set_to_none=True)
    with pytest.MonkeyPatch.context() as patch, recording(parts) as calls:
        if noise is not None:
            draws = iter(noise)
            patch.setattr(model.denoising, "draw_noise", lambda *_: next(draws))
        losses = losses_of()
    for name, term in ({} if extra is None else extra(calls)).items():
        losses[name] = losses[name] + term
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    outputs = calls["heads"][-1]
    gradients = _gradients(model)
    return Step(
        losses={name: value.item() for name, value in losses.items()},
        total=total.item(),
        gradients=to_layout(model, gradients, layout),
        gradient_norm=sum(g.norm().item() ** 2 for g in gradients.values()) ** 0.5,
        without_gradient=[
            name for name, p in model.named_parameters() if p.requires_grad and p.grad is None
        ],
        noised=calls["denoising"][-1] if model.denoising is not None else None,
        matching=calls["matcher"],
        logits=outputs["pred_logits"].detach(),
        boxes=outputs["pred_boxes"].detach(),
        queries=calls["queries"][-1],
        calls=calls,
    )


def to_layout(model: Detector, state: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """A state of the model under the names of one of its layouts."""
    (key_map,) = (key_map for key_map in model.key_maps if key_map.name == layout)
    return key_map.to_theirs(state)


def _gradients(model: Detector) -> dict[str, Tensor]:
    """A gradient for every tensor of the model's state."""
    state = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            state[name] = parameter.grad
    return state


def foreign_names(model: Detector, parameters: Iterable[nn.Parameter], layout: str) -> set[str]:
    """The names that a foreign layout, aliases included, has for tensors of these parameters."""
    chosen = {id(parameter) for parameter in parameters}
    flags = {name: torch.zeros(()).expand(t.shape) for name, t in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        flags[name] = flags[name] + float(id(parameter) in chosen)
    return {name for name, flag in to_layout(model, flags, layout).items() if flag.any()}


def entry_tolerance(name: str, gradient: Tensor, first: list[float], norm: float) -> float:
    """How near the first entries of a recorded gradient must be, beside their own size.

    About twice what separates float32 from float64 in the authors' code: 1.1e-2 of an entry in
    the backbone, where sums nearly cancel (so an entry is at least the root mean square), and
    0.5e-2 elsewhere.
    """
    largest = max(map(abs, first))
    if name.startswith("backbone."):
        return 2e-2 * max(largest, norm / gradient.numel() ** 0.5)
    return 1e-2 * largest


def show_padding(_decoder: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A pre-hook of the decoder: in detrex's dense models it sees the padding."""
    content, anchors, memory, *rest = inputs
    nothing = torch.zeros_like(memory.levels.padding_mask)
    levels = replace(memory.levels, padding_mask=nothing)
    return content, anchors, replace(memory, levels=levels), *rest


def embed_padding(
    module: PositionEmbeddingSine, inputs: tuple[Tensor], _embedded: Tensor
) -> Tensor:
    """A hook of the embedding: the padding's positions in detrex; ours are zeros, unseen."""
    valid = (~inputs[0]).float()
    y, x = valid.cumsum(1), valid.cumsum(2)
    y = (y + module.offset) / (y[:, -1:] + module.eps)
    x = (x + module.offset) / (x[..., -1:] + module.eps)
    axes = [sine_embed(a * module.scale, module.num_pos_feats, module.temperature) for a in (y, x)]
    return torch.cat(axes, dim=-1).permute(0, 3, 1, 2)


def empty_slots_as_negatives(calls: dict[str, list[Any]]) -> dict[str, Tensor]:
    """Focal loss of the denoising slots that hold no noised box."""
    logits, noised = calls["heads"][-1]["pred_logits"], calls["denoising"][-1]
    empty = torch.ones(logits.shape[1], noised.num_slots, dtype=torch.bool)
    empty[noised.pairs.classified] = False
    negatives = logits[:, :, : noised.num_slots][:, empty]
    nothing = torch.full(negatives.shape[:-1], NOTHING)
    terms = FocalClassification().loss(negatives, nothing, max(len(noised.pairs), 1))
    *early, last = terms.unbind()
    return {"loss_ce_dn": last} | {f"loss_ce_dn_{i}": term for i, term in enumerate(early)}


def official_noise(
    counts: list[int], groups: int, flip: Tensor, chosen_labels: Tensor, box: Tensor
) -> list[Noise]:
    """The draws of the official code and detrex, by image.

    They have one entry per noised box and are group-major over the batch. Replacement labels
    were drawn for the flipped entries only.
    """
    label = torch.zeros(len(flip), dtype=torch.long)
    label[flip < 0.2] = chosen_labels
    grouped = [
        x.unflatten(0, (groups, sum(counts))).split(counts, dim=1) for x in (flip, label, box)
    ]
    return [Noise(*fields) for fields in zip(*grouped, strict=True)]


def contrastive_noise(
    counts: list[int], flip: Tensor, chosen_labels: Tensor, sign: Tensor, magnitude: Tensor
) -> list[Noise]:
    """The draws of detrex's DINO, by image.

    They have one entry per noised box, first the positives of all images, then their negatives,
    group after group. Ours draws sign and magnitude as one number.
    """
    label = torch.zeros(len(flip), dtype=torch.long)
    label[flip < 0.25] = chosen_labels
    box = ((2 * sign - 1) * magnitude + 1) / 2
    grouped = [x.unflatten(0, (-1, 2, sum(counts))).split(counts, 2) for x in (flip, label, box)]
    return [Noise(*(x.flatten(1, 2) for x in fields)) for fields in zip(*grouped, strict=True)]


@contextmanager
def chosen_cells(model: Detector, cells: Tensor) -> Iterator[None]:
    """Let a two-stage model choose these cells (B, Q), where scores tie but for rounding."""
    topk = Tensor.topk

    def choose(scores: Tensor, k: int, dim: int = -1) -> Any:
        forced = scores.dim() == 2 and k == model.num_queries
        return SimpleNamespace(indices=cells) if forced else topk(scores, k, dim)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "topk", choose)
        yield


def assert_near(ours: Tensor, golden: Any, tolerance: float) -> None:
    """Compare with an array of the same shape; the tolerance is absolute."""
    torch.testing.assert_close(ours, torch.as_tensor(golden), rtol=0, atol=tolerance)


def assert_kept_as(found: list[Any], scores: Any, labels: Any, boxes: Any) -> None:
    """Compare detections of equal predictions; neighbours whose scores tie may swap places.

    Args:
        found: B instances.
        scores: (B, n), falling.
        labels: (B, n).
        boxes: (B, n, 4) XYXY pixels.
    """
    assert_near(torch.stack([f.scores for f in found]), scores, 1e-7)
    gaps = np.diff(scores, axis=1) < -1e-6
    apart = np.pad(gaps, ((0, 0), (1, 0)), constant_values=True)
    apart &= np.pad(gaps, ((0, 0), (0, 1)), constant_values=False)
    assert apart.mean() > 0.5
    kept = torch.as_tensor(apart)
    assert torch.equal(
        torch.stack([f.pred_classes for f in found])[kept], torch.as_tensor(labels)[kept]
    )
    assert_near(torch.stack([f.pred_boxes.tensor for f in found])[kept], boxes[apart], 1e-3)
