"""Deformable DETR: names of its authors' tensors, references, and proposals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dn_detr.checkpoint import CheckpointError, load_tensors
from dn_detr.checkpoint.coco_classes import COCO_IDS
from dn_detr.config import get_config, instantiate
from dn_detr.modeling import Detector
from tests.modeling.conftest import away_from_initialisation, make_sample

ONE_STAGE, REFINED, TWO_STAGE = (
    f"digits_deformable_detr{kind}" for kind in ("", "_refine", "_two_stage")
)


def _model(name: str, **knobs: Any) -> Detector:
    cfg = get_config(name).model
    cfg.backbone.batch_norm = "frozen"
    cfg.update(knobs)
    return away_from_initialisation(cfg)


def _file(model: Detector) -> dict[str, Tensor]:
    """What the authors' code would have saved."""
    state = dict(model.state_dict())
    table = [state.pop(f"queries.{part}.weight", None) for part in ("anchors", "content")]
    file = model.key_maps[0].to_theirs(state)
    if table[0] is not None:
        file["query_embed.weight"] = torch.cat(table, dim=1)
    if model.heads.shared:
        for name in [n for n in file if n.startswith(("class_embed.0.", "bbox_embed.0."))]:
            file |= {name.replace(".0.", f".{i}.", 1): file[name] for i in (1, 2)}
    return file


@pytest.mark.parametrize("name", [ONE_STAGE, REFINED, TWO_STAGE])
def test_a_file_of_the_authors_loads(name):
    source, cfg = _model(name), get_config(name).model
    file = _file(source)
    assert {"transformer.level_embed", "class_embed.2.bias", "input_proj.2.1.weight"} <= set(file)
    expected = "pos_trans_norm" if name == TWO_STAGE else "reference_points"
    assert f"transformer.{expected}.weight" in file
    model = instantiate(cfg)
    assert load_tensors(model, file).layout == "official"
    for key, value in source.state_dict().items():
        if not key.startswith("queries.class_embed."):
            assert torch.equal(model.state_dict()[key], value), key


def test_a_file_with_box_refinement_is_refused_without():
    with pytest.raises(CheckpointError, match="they disagree"):
        load_tensors(instantiate(get_config(ONE_STAGE).model), _file(_model(REFINED)))


def test_the_row_of_the_published_head_that_ranks_the_cells_does_so_for_every_list_of_classes():
    source = _model(TWO_STAGE, num_classes=91)
    first = source.queries.class_embed.weight[0]
    cfg = get_config(TWO_STAGE).model
    cfg.num_classes = 80
    model = instantiate(cfg)
    load_tensors(model, _file(source))
    assert torch.equal(model.queries.class_embed.weight[0], first)
    last = source.heads.class_embed[2].weight[torch.tensor(COCO_IDS)]
    assert torch.equal(model.heads.class_embed[2].weight, last)


def _references(model: Detector) -> Tensor:
    images, mask = model.preprocess([make_sample(64, 80, 1, 0)])
    memory = model.encode(images, mask)
    queries = model.queries(memory)
    decoder = model.transformer.decoder
    return decoder(queries.content, queries.position, memory, model.heads)[1]


def test_without_refinement_all_layers_look_from_the_same_points():
    first, *others = _references(_model(ONE_STAGE))
    assert (first[..., 2:] == 0.5).all()
    assert all(torch.equal(first, other) for other in others)


def test_with_refinement_the_first_layer_alone_looks_from_points():
    first, second, third = _references(_model(REFINED))
    assert (first[..., 2:] == 0.5).all()
    assert (second[..., 2:] != 0.5).any() and not torch.equal(second, third)


def test_a_head_does_not_see_the_size_of_a_point():
    model = _model(ONE_STAGE)
    states, point = torch.randn(5, 128), torch.tensor([0.3, 0.6, 0.5, 0.5]).expand(5, 4)
    moves = model.heads.bbox_embed[0](states)
    boxes = model.heads.predict_boxes(0, states, point)
    assert torch.equal(boxes[:, 2:], moves[:, 2:].sigmoid())
