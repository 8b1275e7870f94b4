"""Activation checkpointing: less memory, and nothing else is different, not by a bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dn_detr.config import get_config
from dn_detr.layers import run_checkpointed
from dn_detr.modeling import Detector, TimmBackbone

from .conftest import FAMILIES, away_from_initialisation, make_sample, small_model_config

PARTS = ("backbone", "encoder", "decoder")
CHOICES = {name: {name: True} for name in PARTS} | {"all": dict.fromkeys(PARTS, True)}


def _with_dropout(name: str) -> Any:
    """A family that trains from its stem on, with dropout and batch statistics."""
    cfg = small_model_config(name)
    cfg.backbone.update(frozen_stages=0, batch_norm="trainable")
    for half in (cfg.transformer.encoder, cfg.transformer.decoder):
        half.layer.update({"dropout": 0.1} if "dropout" in half.layer else {})
    return cfg


def _dilated() -> Any:
    cfg = small_model_config("dn_detr_r50")
    cfg.backbone.update(name="resnet50", dilation=True, out_features=["layer4"])
    cfg.neck.update(in_channels=[2048], in_strides=[16])
    return cfg


def _swin() -> Any:
    pytest.importorskip("timm")
    cfg = small_model_config("dn_detr_r50")
    cfg.backbone = get_config("dn_detr_swin_t_50ep.py").model.backbone
    cfg.backbone.update(weights=None, drop_path=0.3)
    cfg.backbone.arguments = dict(embed_dim=24, depths=(2, 2, 2, 2), num_heads=(1, 2, 3, 6))
    cfg.neck.update(in_channels=[192], in_strides=[32])
    return cfg


MODELS = {name: lambda name=name: _with_dropout(name) for name in FAMILIES}
MODELS |= {"dc5": _dilated, "swin": _swin}


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> Detector:
    return away_from_initialisation(MODELS[request.param]())


class _LiveMemory(TorchDispatchMode):
    """Knows every storage that an operator has returned."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for x in tree_leaves(output):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self.seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return output

    def nbytes(self) -> int:
        """Bytes of those that are still held."""
        return sum(size for storage, size in self.seen.values() if not storage.expired())


def _step(detector: Detector, **chosen: bool) -> tuple[dict[str, Tensor], int]:
    """Everything that a step of a copy computes, and the bytes held for its backward pass."""
    detector = copy.deepcopy(detector)
    detector.checkpoint_activations(**chosen)
    samples = [make_sample(64, 80 + 16 * n, n, n) for n in (3, 1)]  # one of them padded
    torch.manual_seed(0)
    with _LiveMemory() as memory:
        losses = detector(samples)
    held = memory.nbytes()
    torch.stack(list(losses.values())).sum().backward()
    results = {f"loss {name}": value.detach() for name, value in losses.items()}
    results |= {f"gradient {n}": p.grad for n, p in detector.named_parameters() if p.requires_grad}
    results |= {f"buffer {name}": value for name, value in detector.named_buffers()}
    results["denoising"] = detector.diagnostics.denoising_correct
    results |= {f"match {i}": q for i, q in enumerate(detector.diagnostics.queries)}
    return results, held


@pytest.fixture(scope="module")
def plain(model) -> tuple[dict[str, Tensor], int]:
    return _step(model)


@pytest.mark.parametrize("choice", CHOICES)
def test_checkpointing_saves_memory_and_changes_nothing_else(choice, model, plain):
    """Losses, gradients, running statistics and random numbers, with every choice of parts."""
    expected, held_without = plain
    found, held = _step(model, **CHOICES[choice])
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert held < (0.6 if choice == "all" else 1.0) * held_without


@pytest.mark.parametrize("model", ["dn_detr_r50", "dn_deformable_detr_r50"], indirect=True)
def test_mixed_precision_is_the_same_the_second_time(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, _ = _step(model)
        found, _ = _step(model, **CHOICES["all"])
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("model", ["dn_deformable_detr_r50"], indirect=True)
def test_checkpointing_leaves_weights_copies_and_predictions_alone(model):
    detector = copy.deepcopy(model)
    names = list(detector.state_dict())
    detector.checkpoint_activations(**CHOICES["all"])
    assert list(detector.state_dict()) == names
    samples = [make_sample(64, 80, 2, 0)]
    expected = model.eval().forward_tensors(*model.preprocess(samples))
    average = torch.optim.swa_utils.AveragedModel(detector)  # a deep copy
    for copied in (detector, average.module):
        found = copied.eval().forward_tensors(*copied.preprocess(samples))
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    model.train()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("model", ["dn_deformable_detr_r50"], indirect=True)
def test_a_part_without_support_is_named(part, model):
    class Mine(nn.Module):
        pass

    detector = copy.deepcopy(model)
    owner = detector if part == "backbone" else detector.transformer
    setattr(owner, part, Mine())
    with pytest.raises(ValueError, match=f"the {part} Mine does not support"):
        detector.checkpoint_activations(**{part: True})
    detector.checkpoint_activations(**{other: other != part for other in PARTS})


TIMM = {
    "convnext_tiny": dict(depths=(1, 1, 2, 1), dims=(16, 32, 48, 64)),
    "swin_tiny_patch4_window7_224": dict(embed_dim=24, depths=(2, 2, 2, 2), num_heads=(1, 2, 3, 6)),
    "resnet50": dict(layers=(1, 1, 2, 1)),
    "efficientnet_b0": {},  # timm builds it as one network
    "regnety_004": {},
}


@pytest.mark.parametrize("batch_norm", ["frozen", "trainable"])
@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm_are_the_same_to_the_bit(name, batch_norm):
    """Padding, batch statistics and skipped branches are the same the second time."""
    pytest.importorskip("timm")
    torch.manual_seed(0)
    options = dict(frozen_stages=0, batch_norm=batch_norm, drop_path=0.3, arguments=TIMM[name])
    backbone = TimmBackbone(name, **options)
    images, mask = torch.randn(2, 3, 75, 110), torch.zeros(2, 75, 110, dtype=torch.bool)
    mask[1, :, 70:] = True
    results, held = [], []
    for chosen in (False, True):
        copied = copy.deepcopy(backbone)
        copied.activation_checkpointing = chosen
        torch.manual_seed(1)
        with _LiveMemory() as memory:
            maps = copied(images, mask)
        held.append(memory.nbytes())
        torch.stack([m.square().mean() for m in maps]).sum().backward()
        gradients = [p.grad for p in copied.parameters() if p.requires_grad]
        results.append([*maps, *gradients, *copied.buffers()])
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert held[1] < 0.7 * held[0]


class _Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.activation_checkpointing = True


def test_a_step_that_changes_its_input_cannot_be_checkpointed():
    x = torch.ones(3, requires_grad=True).clone()
    with pytest.raises(ValueError, match="a step of _Stack changes its input in place"):
        run_checkpointed(_Stack(), torch.Tensor.relu_, x)


def test_nothing_is_recomputed_in_evaluation_or_without_gradients():
    runs = []

    def step(x: Tensor) -> Tensor:
        runs.append(x)
        return x.sin()

    stack, x = _Stack(), torch.ones(3, requires_grad=True)
    run_checkpointed(stack.eval(), step, x).sum().backward()
    with torch.no_grad():
        run_checkpointed(stack.train(), step, x)
    assert len(runs) == 2
    run_checkpointed(stack, step, x).sum().backward()
    assert len(runs) == 4
