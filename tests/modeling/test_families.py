"""What holds for a detector of every family: padding, gradients, denoising, half types, export."""

from __future__ import annotations

import copy

import pytest
import torch

from dn_detr.config import ConfigError, instantiate
from dn_detr.layers import MSDeformAttn
from dn_detr.ops import missing_kernels, use_kernels

from .conftest import FAMILIES, WITH_FASTER_RCNN, away_from_initialisation, make_sample

DENOISED = [name for name in FAMILIES if name.startswith(("dn_", "dino_", "digits_dn_"))]
DEFORMABLE = [name for name in FAMILIES if "deformable" in name or name.startswith("dino_")]
TWO_STAGE = [name for name in FAMILIES if "two_stage" in name or name.startswith("dino_")]
SIZES = [(75, 110), (128, 64), (33, 47)]


def _total(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(losses.values())).sum()


@pytest.mark.parametrize("grouping", [[0, 1, 2], [2, 1]])
def test_predictions_do_not_depend_on_the_batch(family, grouping):
    samples = [make_sample(h, w, 2, seed) for seed, (h, w) in enumerate(SIZES)]
    family.eval()
    with torch.no_grad():
        batch = family.forward_tensors(*family.preprocess([samples[i] for i in grouping]))
        for row, i in enumerate(grouping):
            alone = family.forward_tensors(*family.preprocess([samples[i]]))
            for key, value in alone.items():
                torch.testing.assert_close(batch[key][row], value[0], rtol=0, atol=1e-4)


def test_raw_predictions_do_not_depend_on_the_amount_of_padding(family):
    images, mask = family.preprocess([make_sample(75, 110, 0, 0)])
    wider = torch.nn.functional.pad(images, (0, 53, 0, 97))
    wider_mask = torch.nn.functional.pad(mask, (0, 53, 0, 97), value=True)
    family.eval()
    with torch.no_grad():
        tight, loose = (
            family.forward_tensors(images, mask),
            family.forward_tensors(wider, wider_mask),
        )
    torch.testing.assert_close(loose, tight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family_config", WITH_FASTER_RCNN, indirect=True)
@pytest.mark.parametrize("counts", [(2, 3), (0, 3), (0, 0)])
def test_every_trainable_parameter_gets_a_gradient(counts, family):
    losses = family([make_sample(64, 80, n, seed) for seed, n in enumerate(counts)])
    _total(losses).backward()
    missing = [n for n, p in family.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(p.grad.isfinite().all() for p in family.parameters() if p.grad is not None)


@pytest.mark.parametrize("family_config", DENOISED, indirect=True)
def test_matching_losses_with_denoising_are_those_without(family):
    samples = [make_sample(64, 80, n, n) for n in (2, 3)]
    with_denoising = family(samples)
    plain = copy.deepcopy(family)
    plain.denoising = None
    without = plain(samples)
    assert {name for name in with_denoising if "_dn" not in name} == set(without)
    for name, value in without.items():
        torch.testing.assert_close(with_denoising[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family_config", DENOISED, indirect=True)
def test_matching_queries_are_blind_to_denoising_queries(family):
    """Other noise, same matching part: information leaks nowhere."""
    samples = [make_sample(64, 80, 3, 0)]
    first = family(samples)
    samples[0]["seed"] = 1
    second = family(samples)
    assert first["loss_ce_dn"] != second["loss_ce_dn"]
    for name in (name for name in first if "_dn" not in name):
        assert first[name].item() == pytest.approx(second[name].item(), rel=1e-5)


@pytest.mark.parametrize("family_config", DENOISED, indirect=True)
def test_thousands_of_objects_of_a_single_class_are_denoised_in_bounded_size(family_config):
    """One step on them runs, and the counts are those of what is really noised."""
    family_config.num_classes = 1
    detector = away_from_initialisation(family_config)
    samples = [make_sample(64, 80, n, n, num_classes=1) for n in (2000, 2)]
    shapes: list[torch.Size] = []
    detector.transformer.decoder.register_forward_hook(
        lambda module, inputs, output: shapes.append(output[0].shape)
    )
    _total(detector(samples)).backward()
    matching = detector.num_queries * max(detector.num_patterns, 1)
    assert shapes[0][2] - matching == detector.denoising.max_queries
    counts = detector.count_objects(samples)
    assert (counts.matching, counts.denoising) == (2002, detector.diagnostics.denoising_total)
    assert (detector.diagnostics.queries[0] >= 0).sum() == matching
    assert all(p.grad.isfinite().all() for p in detector.parameters() if p.requires_grad)


@pytest.mark.parametrize("family_config", DENOISED, indirect=True)
def test_a_single_group_of_a_single_query_is_enough(family_config):
    family_config.denoising.update(num_groups=1, max_queries=1)
    detector = away_from_initialisation(family_config)
    losses = detector([make_sample(64, 80, n, n) for n in (3, 0)])
    assert all(value.isfinite() for value in losses.values())
    assert detector.diagnostics.denoising_total == 1


@pytest.mark.parametrize("family_config", DENOISED, indirect=True)
def test_no_queries_are_refused(family_config):
    family_config.num_queries = 0
    with pytest.raises(ConfigError, match=r"num_queries 0 .*must be at least 1"):
        instantiate(family_config)


@pytest.mark.parametrize("family_config", TWO_STAGE, indirect=True)
def test_more_proposals_than_cells_train_and_detect(family_config):
    family_config.num_queries = 900  # an image of 32 x 32 has 21 cells
    detector = away_from_initialisation(family_config)
    sample = make_sample(32, 32, 1, 0)
    assert _total(detector([sample])).isfinite()
    (found,) = detector.eval()([sample])
    assert found["instances"].pred_boxes.tensor.isfinite().all()


@pytest.mark.parametrize("family_config", DEFORMABLE, indirect=True)
def test_a_step_runs_the_compiled_operators_alone(family):
    if (problem := missing_kernels("cpu")) is not None:
        pytest.skip(problem)
    with torch.profiler.profile() as profile:
        _total(family([make_sample(64, 80, n, n) for n in (2, 3)])).backward()
    names = {event.key for event in profile.key_averages()}
    layers = sum(isinstance(module, MSDeformAttn) for module in family.modules())
    compiled = {f"dn_detr_C::ms_deform_attn_fused_{name}" for name in ("forward", "backward")}
    assert layers > 0 and compiled <= names
    assert not [name for name in names if "grid_sampler" in name]


@pytest.mark.parametrize("family_config", DEFORMABLE, indirect=True)
def test_losses_are_the_same_without_the_compiled_operators(family):
    if (problem := missing_kernels("cpu")) is not None:
        pytest.skip(problem)
    samples = [make_sample(64, 80, n, n) for n in (2, 3)]
    compiled = family(samples)
    with use_kernels("pytorch"):
        torch.testing.assert_close(family(samples), compiled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family_config", WITH_FASTER_RCNN, indirect=True)
def test_losses_in_half_types_are_those_in_float32(family):
    samples = [make_sample(64, 80, 2, 0)]
    reference = _total(family(samples)).item()
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            losses = family(samples)
        assert all(value.dtype == torch.float32 for value in losses.values())
        assert _total(losses).item() == pytest.approx(reference, rel=0.05)


def test_float64_agrees_with_float32(family):
    family.eval()
    inputs = family.preprocess([make_sample(64, 80, 0, 0), make_sample(75, 60, 0, 1)])
    with torch.no_grad():
        single = family.forward_tensors(*inputs)
        double = family.double().forward_tensors(inputs[0].double(), inputs[1])
    for key, value in double.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(single[key].double(), value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family_config", DENOISED, indirect=True)  # which leaves no trace here
def test_tensor_entry_point_exports(family):
    family.eval()
    images, mask = family.preprocess([make_sample(64, 96, 0, 0), make_sample(96, 64, 0, 1)])

    class Tensors(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.detector = family

        def forward(self, images, mask):
            return self.detector.forward_tensors(images, mask)

    with torch.no_grad():
        exported = torch.export.export(Tensors(), (images, mask)).module()
        torch.testing.assert_close(exported(images, mask), family.forward_tensors(images, mask))


@pytest.mark.parametrize("family_config", WITH_FASTER_RCNN, indirect=True)
def test_class_tensors_are_those_whose_shape_follows_the_number_of_classes(family, family_config):
    family_config.num_classes = 3
    other = instantiate(family_config).state_dict()
    differ = [
        name for name, value in family.state_dict().items() if value.shape != other[name].shape
    ]
    assert sorted(family.class_tensors()) == sorted(differ) and differ
