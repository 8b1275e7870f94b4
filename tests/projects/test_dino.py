"""DINO: contrastive denoising, mixed query selection and the layouts of its checkpoints.

Its numbers are compared with detrex's in `tests/modeling/test_detrex_numbers.py`, and its configs
take part in all tests of the zoo.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dn_detr.checkpoint import CheckpointError, load_tensors
from dn_detr.config import get_config, instantiate
from dn_detr.modeling import Detector
from dn_detr.projects.dino.modeling import ContrastiveDenoising
from dn_detr.structures import box_cxcywh_to_xyxy
from tests.modeling.conftest import (
    away_from_initialisation,
    make_sample,
    small_model_config,
)

CLASSES = 5


def _targets(counts: list[int]) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "labels": torch.randint(CLASSES, (n,), generator=generator),
            "boxes": 0.3 + 0.2 * torch.rand(n, 4, generator=generator),  # far from the border
        }
        for n in counts
    ]


def _shifts(noise: float, counts: list[int]) -> tuple[Tensor, Tensor]:
    """How far corners moved, in half sides times the box noise, and who is a positive."""
    targets = _targets(counts)
    noised = ContrastiveDenoising(CLASSES, box_noise=noise, num_groups=4).noise(targets)
    boxes = torch.cat([target["boxes"] for target in targets])
    first = torch.tensor([0, *counts]).cumsum(0)
    in_group = noised.slot % (2 * torch.tensor(counts))[noised.image]
    truth = boxes[first[noised.image] + in_group % torch.tensor(counts)[noised.image]]
    moved = box_cxcywh_to_xyxy(noised.boxes) - box_cxcywh_to_xyxy(truth)
    positive = torch.zeros(len(boxes := noised.boxes), dtype=torch.bool)
    paired = set(zip(noised.pairs.image.tolist(), noised.pairs.query[0].tolist(), strict=True))
    for index, place in enumerate(zip(noised.image.tolist(), noised.slot.tolist(), strict=True)):
        positive[index] = place in paired
    return moved.abs() / (truth[:, 2:].repeat(1, 2) / 2 * noise), positive


def test_positives_stay_near_and_negatives_are_farther_for_any_number_of_images():
    shifts, positive = _shifts(0.2, [3, 1, 2])
    assert positive.sum() == (~positive).sum() == 4 * 6
    assert (shifts[positive] <= 1 + 1e-4).all()
    assert ((shifts[~positive] >= 1 - 1e-4) & (shifts[~positive] <= 2 + 1e-4)).all()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.floats(0, 3))
def test_noised_boxes_lie_in_the_unit_square_with_sides_that_are_not_negative(counts, box_noise):
    targets = [{**t, "boxes": t["boxes"] * 2 - 0.5} for t in _targets(counts)]
    targets = [{**t, "boxes": t["boxes"].clamp(0, 1)} for t in targets]
    boxes = ContrastiveDenoising(CLASSES, box_noise=box_noise).noise(targets).boxes
    assert ((boxes >= 0) & (boxes <= 1)).all()


@pytest.mark.parametrize(("objects", "groups"), [(1, 100), (3, 33), (100, 1), (2000, 1)])
def test_budget_decides_how_many_groups_an_image_has(objects, groups):
    denoising = ContrastiveDenoising(CLASSES)
    noised = denoising.noise(_targets([objects]))
    noised_objects = min(objects, 100)
    assert len(noised.pairs) == denoising.num_noised([objects]) == groups * noised_objects
    assert len(noised.slot) == 2 * len(noised.pairs) <= 200


@pytest.mark.parametrize(("most", "groups"), [(1, 1), (2, 5)])
def test_a_budget_below_one_pair_still_noises_one_object(most, groups):
    noised = ContrastiveDenoising(CLASSES, max_queries=most, num_groups=groups).noise(_targets([3]))
    assert len(noised.pairs) == 1 and len(noised.slot) == 2


def test_negatives_may_be_labelled_nothing():
    noised = ContrastiveDenoising(CLASSES, unlabelled_negatives=True, label_noise=0.0).noise(
        _targets([3, 2])
    )
    assert (noised.labels == CLASSES).sum() == len(noised.pairs)


@pytest.mark.parametrize("option", ["num_groups", "max_queries"])
def test_no_group_or_query_is_refused_with_the_remedy(option):
    with pytest.raises(ValueError, match=r"model\.denoising=null"):
        ContrastiveDenoising(CLASSES, **{option: 0})


@pytest.fixture(scope="module")
def small() -> Detector:
    cfg = get_config("digits_dino").model
    cfg.backbone.batch_norm = "frozen"
    return away_from_initialisation(cfg)


def test_contents_are_learned_and_boxes_proposed(small):
    images, mask = small.preprocess([make_sample(64, 80, 1, 0), make_sample(48, 64, 1, 1)])
    queries = small.queries(small.encode(images, mask))
    assert torch.equal(queries.content[0], queries.content[1])
    assert torch.equal(queries.content[0], small.queries.content.weight)
    assert not torch.equal(queries.position[0], queries.position[1])


@pytest.mark.parametrize("layout", ["official", "detrex"])
def test_weights_come_back_from_every_layout(layout):
    cfg = get_config("digits_dino").model
    cfg.heads.shared = layout == "official"
    cfg.denoising.embed.no_object_label = layout == "official"
    model, other = away_from_initialisation(cfg), instantiate(cfg)
    (key_map,) = (key_map for key_map in model.key_maps if key_map.name == layout)
    written = key_map.to_theirs(model.state_dict())
    assert {"transformer.tgt_embed.weight", "label_enc.weight"} <= written.keys()
    assert "transformer.decoder.class_embed.2.bias" in written
    report = load_tensors(other, written)
    assert report.layout == layout and report.fresh == ()
    state = other.state_dict()
    for name, value in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(state[name], value), name


@pytest.mark.parametrize(
    ("name", "layout", "reader"),
    [
        ("dino_swin_l_4scale_12ep", "official", "swin_transformer"),
        ("dino_swin_l_5scale_12ep", "official", "swin_transformer"),
        ("dino_swin_t_4scale_12ep", "detrex", "swin_transformer"),
        ("dino_convnext_t_4scale_12ep", "detrex", "convnext"),
    ],
)
def test_backbones_have_the_names_that_timm_reads_from_their_authors(name, layout, reader):
    timm = pytest.importorskip("timm", reason="Swin Transformer and ConvNeXt are timm's")
    cfg = get_config(name).model
    with torch.device("meta"):
        model = instantiate(cfg)
        network = timm.create_model(cfg.backbone.name, **(cfg.backbone.arguments or {}))
    state = model.state_dict()
    (key_map,) = (key_map for key_map in model.key_maps if key_map.name == layout)
    written = key_map.to_theirs(state)
    prefix = "backbone.0." if layout == "official" else "backbone."
    theirs = {n.removeprefix(prefix): x for n, x in written.items() if n.startswith(prefix)}
    last = len(model.backbone.out_channels)
    norms = [
        theirs.pop(f"norm{i}.{kind}") for i in range(4 - last, 4) for kind in ("weight", "bias")
    ]
    assert [len(norm) for norm in norms[::2]] == model.backbone.out_channels
    read = getattr(timm.models, reader).checkpoint_filter_fn(theirs, network)
    ours = {n.removeprefix("backbone.body."): x for n, x in state.items() if "backbone.body" in n}
    for timm_name, value in read.items():  # a stage's name has no dot in networks of features
        joined = timm_name if "patch_embed" in timm_name else timm_name.replace(".", "_", 1)
        assert value.shape == ours.pop(joined).shape, timm_name
    assert not ours
    back = key_map.to_ours(written | {f"{prefix}layers.0.blocks.0.attn.relative_position_index": 0})
    assert back.tensors.keys() == state.keys() and not back.unknown


def test_weights_of_the_two_stage_version_of_dn_detr_come_back():
    with torch.device("meta"):
        model = instantiate(get_config("dn_dino_r50_two_stage_36ep").model)
    written = model.key_maps[0].to_theirs(model.state_dict())
    assert {"transformer.tgt_embed.weight", "class_embed.6.bias"} <= written.keys()
    assert written["label_enc.weight"].shape == (92, 255)
    ours = {name for name in model.state_dict() if not name.endswith("num_batches_tracked")}
    assert model.key_maps[0].to_ours(written).tensors.keys() == ours


def test_the_row_that_ranks_cells_is_the_first_of_files_of_dn_detr_whatever_the_classes_are():
    """A file of theirs has 91 rows of category ids, of which none is called "person" first."""
    cfg = small_model_config("dn_dino_r50_two_stage")
    cfg.num_classes = 80
    source, model = away_from_initialisation(cfg), instantiate(cfg)
    written = source.key_maps[0].to_theirs(source.state_dict())
    first = source.queries.class_embed.weight[0]
    theirs = written["class_embed.3.weight"]
    assert len(theirs) == 91 and torch.equal(theirs[0], first)
    load_tensors(model, written)
    assert torch.equal(model.queries.class_embed.weight[0], first)
    assert torch.equal(model.heads.class_embed[0].weight, source.heads.class_embed[0].weight)


@pytest.mark.parametrize("name", ["dn_dino_r50", "dn_dino_r50_two_stage"])
def test_the_version_of_dn_detr_trains(name):
    model = away_from_initialisation(small_model_config(name)).train()
    losses = model([make_sample(64, 80, count, seed) for seed, count in enumerate((2, 0))])
    assert all(torch.isfinite(value) for value in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_class_agnostic_proposals_are_ranked_and_trained_by_class_0(small):
    cfg = get_config("digits_dino").model
    cfg.queries.class_agnostic = True
    model = away_from_initialisation(cfg)
    images, mask = model.preprocess([make_sample(64, 80, 2, 0)])
    queries = model.queries(model.encode(images, mask))
    logits = queries.proposals.outputs["pred_logits"][0, 0]  # of all cells
    boxes = queries.proposals.outputs["pred_boxes"][0, 0]
    best = logits[:, 0].topk(model.num_queries).indices
    torch.testing.assert_close(queries.position[0].sigmoid(), boxes[best])
    sample = make_sample(64, 80, 2, 0)
    renamed = {**sample, "instances": copy.deepcopy(sample["instances"])}
    renamed["instances"].gt_classes = (sample["instances"].gt_classes + 1) % 10
    first, second = model([sample]), model([renamed])
    assert torch.equal(first["loss_ce_enc"], second["loss_ce_enc"])
    assert not torch.equal(first["loss_ce"], second["loss_ce"])


def test_heads_that_differ_between_layers_do_not_fit_shared_ones():
    cfg = get_config("digits_dino").model
    cfg.heads.shared = False
    model = away_from_initialisation(cfg)
    (key_map,) = (key_map for key_map in model.key_maps if key_map.name == "detrex")
    shared = instantiate(get_config("digits_dino").model)
    with pytest.raises(CheckpointError):
        load_tensors(shared, key_map.to_theirs(model.state_dict()))
