"""Which rows of DETR's class head go where."""

from __future__ import annotations

import pytest
import torch

from dn_detr.checkpoint import load_tensors
from dn_detr.checkpoint.coco_classes import COCO_IDS
from dn_detr.config import get_config, instantiate


@pytest.mark.parametrize("name", ["vanilla_detr_r50_500ep", "dn_vanilla_detr_r50_300ep"])
def test_rows_of_category_ids_go_to_their_classes_and_no_object_stays_last(name):
    """A published file has 91 rows of category ids and one of "no object"."""
    published = get_config("vanilla_detr_r50_500ep").model
    published.num_classes = 91
    source = instantiate(published)
    model = instantiate(get_config(name).model)
    fine_tune = model.denoising is not None  # its label table is in no such file
    fresh = ["denoising.*"] if fine_tune else []
    file = source.key_maps[0].to_theirs(source.state_dict())
    report = load_tensors(model, file, fine_tune=fine_tune, fresh=fresh)
    rows = torch.tensor([*COCO_IDS, 91])
    expected = source.heads.class_embed[0].weight[rows]
    assert torch.equal(model.heads.class_embed[0].weight, expected)
    assert len(report.mapped_classes) == 80
